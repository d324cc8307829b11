"""DeepSpeed's ZeRO-3 around a model: groups, shards of the first rank's weights, checkpoints, final model.

How a model generates from its shards stands in grpo_zero3.py, with DeepSpeed's configuration.
"""

import os
import warnings
from collections import defaultdict
from contextlib import contextmanager
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_get_full_fp32_param, set_z3_leaf_modules

from common.run import teardown_waits
from common.sharding import (
    decoder_layers,
    empty_model,
    load_whole,
    trained,
    unreadable_refused,
    write_pretrained,
)


@contextmanager
def deepspeed_groups(run):
    """DeepSpeed's process groups beside the run's own, which go with it."""
    # torch 2.11 knows only the older names of some functions, by which DeepSpeed calls them as well
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    # For a CPU's sums over ranks it would compile an extension, for minutes, and load it under a lock: a run
    # that is killed meanwhile would leave that, and all later ones would wait for it. gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # takes the group that is there
    failed = True
    try:
        yield
        failed = False
    finally:
        if run.owns_group and not (failed and teardown_waits()):
            deepspeed.comm.destroy_process_group()  # with torch's


def load_shards(pretrained, run, config, dtype):
    """The model, each rank holding its shards alone; and the whole one on the first rank, None on the others.

    Args: config: DeepSpeed's; dtype: of the shards.
    """
    whole = load_whole(pretrained, run)  # in the dtype of its files, whatever the shards' will be
    # inside Init, each module's weights are sharded as soon as it is made
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = empty_model(pretrained.model_config, dtype=dtype)
    hand_out(whole, model, run)
    # For training, too: a leaf module's weights come in one coalesced gather, not one for each matrix in it.
    set_z3_leaf_modules(model, list({type(layer) for layer in decoder_layers(model)}))
    return model, whole


@torch.no_grad()
def hand_out(whole, model, run):
    """Give the ranks' shards the first one's weights; whole: the model there, None on the others."""
    for name, parameter in model.named_parameters():
        run.watch(f"loading {name}")
        with GatheredParameters([parameter], modifier_rank=0):  # the first rank's is dealt out at the end
            if run.first:
                parameter.copy_(whole.get_parameter(name))
    for name, buffer in model.named_buffers():
        # Init makes every tensor in the weights' dtype: rotary frequencies in bf16 would be wrong ones
        dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
        shared = torch.empty(buffer.shape, dtype=dtype, device=run.device)
        dist.broadcast(shared.copy_(whole.get_buffer(name)) if run.first else shared, 0)
        buffer.data = shared


def ask_for_an_inputs_gradient(layers):
    """ZeRO-3 reduces a leaf module's gradients when that of its input is there.

    So the first layer that is trained needs one even where all below it is frozen: without, its gradients
    would be reduced before they are computed.
    """

    def ask(layer, inputs):
        if torch.is_grad_enabled():
            inputs[0].requires_grad_()

    for layer in layers:
        if trained(layer):
            layer.register_forward_pre_hook(ask)
            return


def save_training_state(folder, engine):
    """Write this rank's part of a checkpoint: DeepSpeed's files (shards, moments), and its random states."""
    random_states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states["cuda"] = torch.cuda.get_rng_state()
    # no file "latest" of DeepSpeed's: the newest folder with its final name is the latest one
    options = {"save_latest": False, "exclude_frozen_parameters": True}
    engine.save_checkpoint(str(folder), "zero3", {"random_states": random_states}, **options)


def load_training_state(run, engine):
    """Restore weights, moments and this rank's random states, of run.checkpoint."""
    run.watch("loading the checkpoint")
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    # not strict: what is frozen is not in there, and the run has seen that nothing else is missing
    options = {"load_module_strict": False, "load_lr_scheduler_states": False}
    # DeepSpeed's files are pickled: read from them tensors, plain values and these two, and run no other code
    allowed = torch.serialization.safe_globals([ZeroStageEnum, LossScaler])
    only = patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1")
    with run.together(), unreadable_refused(run.checkpoint), allowed, only:
        _, state = engine.load_checkpoint(str(run.checkpoint), "zero3", **options)
    for group, weight_decay in zip(engine.optimizer.param_groups, decays):
        group["weight_decay"] = weight_decay  # this run's flag, not that of the run which wrote it
    torch.set_rng_state(state["random_states"]["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random_states"]["cuda"])


def save_model(run, engine, pretrained):
    """The final model in Hugging Face format, in the dtypes that it came in; collected on the first rank."""
    model, weights = engine.module, {}
    for name, parameter in model.named_parameters():  # a tied weight once
        run.watch(f"saving {name}")
        with GatheredParameters([parameter]):
            whole = parameter
            if parameter.requires_grad and parameter.dtype != torch.float32:
                whole = safe_get_full_fp32_param(parameter)  # what came in fp32 leaves with its precision
            if run.first:
                weights[name] = whole.detach().to("cpu", copy=True)
    kept = set(model.state_dict())  # among the buffers, those that a model file holds
    weights |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in kept}
    with run.together():
        if run.first:
            write_pretrained(run.args.output_dir, pretrained, weights | pretrained.frozen)


def held_bytes(engine):
    """What this rank holds of a ZeRO-3 engine that has trained: {name: bytes}."""
    optimizer = engine.optimizer
    states = [v for s in optimizer.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    tensors = {
        "parameters": [p.ds_tensor for p in engine.module.parameters()],
        # of those on the host DeepSpeed holds a second buffer, for the optimizer
        "gradients": [
            optimizer.grad_partitions_flat_buffer,
            *(flat.grad for flat in optimizer.fp32_partitioned_groups_flat if flat.grad is not None),
        ],
        # ZeRO's own fp32 copy, which the optimizer updates, and AdamW's two moments
        "optimizer": [*(v for v in states if v.dim()), *optimizer.fp32_partitioned_groups_flat],
    }
    bytes_of, device = defaultdict(int), engine.device.type
    for name, held in tensors.items():
        for tensor in held:
            bytes_of[name if tensor.device.type == device else "state_on_host"] += tensor.nbytes
    return bytes_of
