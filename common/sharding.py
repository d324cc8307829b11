"""The model: read by name, loaded, sharded by FSDP2, checkpointed, and written as it came.

All that saving needs of the name is read before the first step: what happens to its folder later changes
nothing, and a model that cannot be written is refused before it is trained.
"""

import copy
import hashlib
import json
import logging
import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file, is_flash_attn_2_available
from transformers.utils.hub import get_checkpoint_shard_files

from common import Refusal, refuse
from common.attention import register_varlen_attention
from common.folders import commit_files, fresh_folder
from common.run import FILES, MEMORY, TRAINING, RunArguments, check_run_arguments, flag, is_of_a_collective


@dataclass
class ShardedArguments(RunArguments):
    """The flags that SFT and DPO share."""

    attn_implementation: Literal["varlen", "sdpa", "eager", "flash_attention_2"] | None = flag(
        None, "default: varlen for flat rows, sdpa for padded ones", MEMORY
    )
    gradient_accumulation_steps: int = flag(
        1, "forwards and backwards per optimizer step", TRAINING, at_least=1
    )
    padding_free: bool = flag(True, "join a batch's sequences into one flat row, without padding", MEMORY)
    measure_memory: bool = flag(False, "without CUDA: count every byte of one (slower) step", FILES)


def check_sharded_arguments(args, flat):
    """Raise Refusal for shared flags that contradict each other; flat: whether rows are flat."""
    check_run_arguments(args)
    attention = args.attn_implementation
    masked = not flat and attention == "varlen"
    refuse(masked, "--attn_implementation varlen is for flat rows: drop --no_padding_free, or choose sdpa.")
    fp32_flash = attention == "flash_attention_2" and not args.bf16
    refuse(fp32_flash, "--attn_implementation flash_attention_2 rejects fp32: add --bf16.")
    twice = args.measure_memory and torch.cuda.is_available()
    refuse(twice, "--measure_memory is for CPUs: on CUDA every step is measured, drop it.")


# --- A pretrained model by name ---


@dataclass
class Pretrained:
    """What building and saving need of a Hub name or folder."""

    name: str
    config: PreTrainedConfig  # as it came; the trained model's
    model_config: PreTrainedConfig  # the same, or without dropout: what models are built from
    tokenizer: Any = None
    generation_config: str | None = None  # the file's text
    # Filled on the first rank, which alone reads the weights:
    dtypes: dict = field(default_factory=dict)  # {name in the files: dtype}
    conversions: list | None = None  # transformers' changes of the files' names and shapes
    unused: dict = field(default_factory=dict)  # {name in the files: tensor} that only a larger model has
    frozen: dict = field(default_factory=dict)  # {name in the model: tensor} whose shards are rounded

    @property
    def dtype(self):
        """What the configuration says; single tensors may differ."""
        return self.config.dtype or self.config.get_text_config().dtype or torch.float32

    @property
    def eos_token_id(self):
        """What ends a generation: an id, several, or None."""
        if self.generation_config is not None:
            return json.loads(self.generation_config).get("eos_token_id")
        return getattr(self.config.get_text_config(), "eos_token_id", None)

    @property
    def vocab_size(self):
        return self.config.get_text_config().vocab_size


def read_pretrained(name, max_length=0, flags="--max_length", dropout=True, config_only=False):
    """Read what a Hub name or folder says of its model, but for the weights.

    Args:   max_length: the longest sequence that will be computed, which `flags` set; dropout: False for
            losses that compare a model in training with one at rest; config_only: enough for a dry run.
    Raises: ValueError for a model that is not there, is quantised, or has fewer positions than max_length.
    """
    tokenizer = generation_config = None
    # what has one slash may be a Hub name, even where a folder of its first part is here
    local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    gone = f"--model_name_or_path {name} cannot be loaded: no such folder."
    refuse(local and not Path(name).is_dir(), gone)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if not config_only:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            file = cached_file(name, "generation_config.json", _raise_exceptions_for_missing_entries=False)
            generation_config = file and Path(file).read_text()
            json.loads(generation_config or "{}")  # what is no JSON is refused now, not when it is written
    except (OSError, ValueError) as error:
        wanted = f"cannot be loaded; wanted: a folder with a config.json, or a Hub name: {in_one_line(error)}"
        raise Refusal(f"--model_name_or_path {name} {wanted}") from error
    for each in (config, config.get_text_config()):
        if quantised := getattr(each, "quantization_config", None):
            settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
            raise Refusal(
                f"--model_name_or_path {name} is quantised ({settings.get('quant_method', 'some method')}): "
                "full training of a quantised model is not supported. Choose the model that it was made of."
            )
        kernel = str(each._attn_implementation)
        foreign = f"--model_name_or_path {name}: its attention, {kernel}, would be downloaded and run: take "
        refuse("/" in kernel, foreign + "that line out of its config.json.")
    limit, why = max_positions(config)
    over = limit is not None and max_length > limit
    refuse(over, f"{flags} {max_length} is over the model's {limit} {why}: lower it.")
    model_config = config if dropout else without_dropout(config)
    return Pretrained(name, config, model_config, tokenizer, generation_config)


def in_one_line(error):
    """An error of transformers; where it advises to run a folder's code, what is the case here."""
    if "trust_remote_code" in str(error):
        return "the model wants to run code of its own, which no script here does"
    return " ".join(str(error).split())


def without_dropout(config):
    """A copy of a configuration in which nothing is random: dropout and the routers' jitter are 0."""
    config = copy.deepcopy(config)
    for each in (config, config.get_text_config()):
        for name, value in vars(each).items():
            if ("drop" in name or "jitter" in name) and type(value) in (int, float):
                setattr(each, name, type(value)(0))
    return config


def max_positions(config):
    """The longest sequence that a model computes alike in every batch, and what of it ends there.

    Two kinds of rotary embedding choose their frequencies by the longest position in the batch: a short
    document beside a long one would be computed as another model.
    """
    config = config.get_text_config()
    limits = [(getattr(config, "max_position_embeddings", None), "positions")]
    ropes = getattr(config, "rope_parameters", None) or {}
    nested = [rope for rope in ropes.values() if isinstance(rope, dict)]  # one for each type of layers
    for rope in nested or [ropes]:
        if rope.get("rope_type") in ("longrope", "dynamic"):
            why = f"original positions, beyond which rope_type {rope['rope_type']} computes all tokens anew"
            limits.append((rope.get("original_max_position_embeddings"), why))
    return min((limit for limit in limits if limit[0] is not None), default=(None, "positions"))


def read_weights(name):
    """{name: tensor} of a model's safetensors, mapped into memory: nothing is read before it is used."""
    options = {"_raise_exceptions_for_missing_entries": False}
    files = [cached_file(name, "model.safetensors", **options)]
    if files == [None]:
        index = cached_file(name, "model.safetensors.index.json", **options)
        if index is None:
            raise OSError("it has no model.safetensors: load an older format by transformers, and save it.")
        files = get_checkpoint_shard_files(name, index)[0]
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def load_whole(pretrained, run, dtype=None):
    """The model with its weights, on the host of the first rank; None on the others, which hold shards alone.

    Afterwards all ranks' configurations say whether head and embedding are one tensor, as the files have it:
    transformers does not tie what the files hold apart, whatever the configuration says.

    Args:   dtype: None = one that holds every tensor of the files.
    Raises: ValueError, on all ranks, for files that cannot be read or lack a weight.
    """
    model, tied = None, 0
    with run.together():
        if run.first:
            model = _from_files(pretrained, dtype)
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
            tied = int(head is not None and head.weight is embedding.weight)
    tied = bool(run.sum({"tied": tied})["tied"])
    for config in (pretrained.config, pretrained.model_config, *([model.config] if run.first else [])):
        for each in (config, config.get_text_config()):
            each.tie_word_embeddings = tied
    return model


def _from_files(pretrained, dtype):
    name = pretrained.name
    try:
        weights = read_weights(name)
        pretrained.dtypes = {key: tensor.dtype for key, tensor in weights.items()}
        floats = [each for each in pretrained.dtypes.values() if each.is_floating_point]
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            config=copy.deepcopy(pretrained.model_config),  # transformers writes the dtype into it
            trust_remote_code=False,
            generation_config=GenerationConfig(),  # the files' may be invalid, and is not asked
            dtype=dtype or reduce(torch.promote_types, floats),
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise Refusal(f"--model_name_or_path {name} cannot be loaded: {in_one_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise Refusal(
            f"--model_name_or_path {name}: its files lack {len(missing)} of the model's weights, such as "
            f"{missing[0]}, and random ones would take their place. Mend the files or the configuration "
            "(tie_word_embeddings, if it is the head)."
        )
    if pretrained.model_config is not pretrained.config:
        left = [n for n, part in model.named_modules() if getattr(part, "p", 0) and "Dropout" in str(part)]
        refuse(
            left,
            f"{type(model).__name__} has dropout that its configuration does not name ({left[:1]}): the loss "
            "would compare a model with dropout to one without. Choose another model.",
        )
    pretrained.conversions = model._weight_conversions
    if type(model.config) is not type(pretrained.config):  # a text model was taken out of a larger one
        own = revert_weight_conversion(model, {key: x.to("meta") for key, x in model.state_dict().items()})
        pretrained.unused = {key: x.clone() for key, x in weights.items() if key not in own}
    return freeze_others(model)


def empty_model(config, **options):
    """A model of this configuration whose weights are still to come, in the surrounding context's tensors."""
    options |= {"config": copy.deepcopy(config), "trust_remote_code": False}
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(**options)
    except ValueError as error:
        what = f"--model_name_or_path: transformers has no causal LM of type {config.model_type!r}, or not of"
        raise Refusal(f"{what} this configuration: {in_one_line(error)}") from error
    model.tie_weights()
    return freeze_others(model)


def freeze_others(model):
    """Freeze what text does not pass through: a vision tower, say, of a model with a text model inside."""
    if model.config.get_text_config() is not model.config:
        text = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
        trained = {id(p) for part in text for p in part.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
    return model


# --- The model on its ranks ---


def is_sharded(args, world):
    """Whether FSDP2 is at work: for several ranks, and for what it does on one rank as well."""
    return world > 1 or args.bf16 or args.offload_param


def load_model(args, run, pretrained):
    """The model in fp32, sharded by FSDP2 if `is_sharded`.

    It attends as transformers has it: `set_kernels` changes that. In a dry run it has no weights.
    """
    run.watch("loading the model")
    sharded, config = is_sharded(args, run.world), pretrained.model_config
    if run.pretends:
        model = empty_model(config, dtype=torch.float32)
        if sharded:
            shard(model, run.mesh, args)
    elif not sharded:
        model = load_whole(pretrained, run, torch.float32).to(run.device)
    else:
        # The first rank reads the weights and hands out the shards: no other ever holds the whole model.
        whole = load_whole(pretrained, run, torch.float32)
        with torch.device("meta"):
            model = empty_model(config, dtype=torch.float32)
        shard(model, run.mesh, args)
        hand_out(whole, model, torch.device("cpu") if args.offload_param else run.device, run.device)
    wrap_layers(model, args.gradient_checkpointing, args.torch_compile)
    return model.train()


def hand_out(whole, model, shards_device, device):
    """Give the ranks' shards the first one's weights; whole: the model there, None on the others."""
    model.to_empty(device=shards_device)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole.state_dict() if whole is not None else {}, options=spread)
    for name, buffer in model.named_buffers():  # rotary frequencies and the like, which no state dict holds
        buffer.data = buffer.data.to(device)  # they are used where the model computes
        if whole is not None:
            buffer.copy_(whole.get_buffer(name))
        dist.broadcast(buffer, src=0)


def sum_bits(tensor):
    """A tensor's bits as whole numbers, summed mod 2^64: () int64, the same in any order."""
    numbers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    pieces = tensor.detach().flatten().view(numbers).split(2**24)  # widened to 64 bits 128 MiB at a time
    return sum(piece.sum(dtype=torch.int64) for piece in pieces)


def model_fingerprint(model):
    """Names a model, on any number of ranks: configuration, and each weight's fp32 bits summed mod 2^64."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "dtype", "transformers_version"):  # the same model by another way
        config.pop(name, None)
    parts = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
    sums = torch.stack([sum_bits(part) for part in parts])
    dist.all_reduce(sums)
    names = [json.dumps(config, sort_keys=True, default=str), *(name for name, _ in model.named_parameters())]
    return hashlib.sha256(json.dumps([names, sums.tolist()]).encode()).hexdigest()


def shard(model, mesh, args):
    """FSDP2: each rank keeps a slice of the weights in fp32 and gathers a layer's while the layer runs.

    In bf16, a layer's weights are cast as they are gathered. So the hidden states are bf16 too; autocast
    would keep them, and with them the layers' inputs that wait for backward, in fp32.
    With --offload_param slices wait on the host, and visit the device when they are gathered; gradients
    leave it as soon as they are reduced, so that the optimizer finds both on the host, and its states too.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if args.bf16 else MixedPrecisionPolicy()
    pinned = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    offload_policy = pinned if args.offload_param else OffloadPolicy()
    for module in [*decoder_layers(model), model]:
        # True for the outermost as well: after a forward without backward (checks, evaluation) its weights
        # would stay gathered, and the optimizer and the checkpoints would take those for the shards.
        fully_shard(
            module, mesh=mesh, mp_policy=policy, offload_policy=offload_policy, reshard_after_forward=True
        )


def decoder_layers(model):
    """The model's repeated blocks, in order: those that transformers itself can checkpoint."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def wrap_layers(model, checkpoints, compiles=False):
    """Let each decoder layer run compiled, and keep its input only and compute the rest again in backward.

    Each layer's own forward is replaced; its hooks, FSDP2's or ZeRO-3's, stay around it. All layers share one
    compiled code, for rows of any length. A second call replaces the first one's work.
    """
    layers = decoder_layers(model)
    gone = f"{type(model).__name__} has no layers that could be checkpointed or compiled: add "
    refuse((checkpoints or compiles) and not layers, gone + "--no_gradient_checkpointing.")
    if compiles:  # else layers of too many kinds would run as if not compiled, and nobody would know
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    for layer in layers:
        vars(layer).pop("forward", None)
        plain = layer.forward
        if compiles or checkpoints:
            compiled = torch.compile(plain, dynamic=True) if compiles else None
            layer.forward = partial(_run_layer, plain, compiled, checkpoints)


def _run_layer(plain, compiled, checkpoints, *args, **kwargs):
    generates = any(isinstance(each, Cache) for each in (*args, *kwargs.values()))
    forward = compiled if compiled and args and not generates else plain
    if torch.is_grad_enabled() and checkpoints:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    if torch.is_grad_enabled() or forward is plain:
        return forward(*args, **kwargs)
    # By the code that training runs, so that proof, reference and policy round alike: it wants a gradient.
    with torch.enable_grad():
        hidden, *others = args
        output = forward(hidden.detach().requires_grad_(), *others, **kwargs)
    return tree_map_only(torch.Tensor, torch.Tensor.detach, output)


def check_flat(model):
    """Raise Refusal for a model that looks at a token's place in a flat row."""
    name, config = type(model).__name__, model.config.get_text_config()
    tuned = getattr(config, "attn_temperature_tuning", False)
    refuse(
        tuned,  # too slowly for check_exact's few tokens to show
        f"{name} scales queries by their place in the row (attn_temperature_tuning), whichever document they "
        "belong to: pad its batches (--no_padding_free, and of SFT --no_packing), or choose another model.",
    )


def set_kernels(model, args, flat, pretends=False):
    """Let the model compute as this run wants it: its attention, and Liger's kernels.

    Args:   flat: whether it will see flat rows. pretends: a dry run, in which flash-attention keeps the same
            tensors as "varlen".
    Raises: ValueError for kernels that are not here, or that Liger does not have, and for a model that looks
            at a token's place in a flat row.
    """
    if flat:
        check_flat(model)
    register_varlen_attention()
    attention = args.attn_implementation or ("varlen" if flat else None)
    if attention == "flash_attention_2":
        gone = "flash-attn is not installed, or there is no GPU."
        refuse(not pretends and not is_flash_attn_2_available(), f"--attn_implementation {attention}: {gone}")
        attention = "varlen" if pretends else attention
    if attention is not None:
        model.set_attn_implementation(attention)
    if args.use_liger_kernel:
        set_liger_kernels(model)


def set_liger_kernels(model):
    """Let Liger compute rotary embeddings, norms and MLPs; raise Refusal where it replaces nothing."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # By the model's type alone; whether this configuration computes something else, check_exact sees. The
    # rotary embedding is a function of the family's module: it changes for all models of this process.
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    forwards = [vars(module).get("forward") for module in model.modules()]
    replaced = [f for f in forwards if getattr(f, "__module__", "").startswith("liger_kernel.")]
    name = type(model).__name__
    refuse(not replaced, f"--use_liger_kernel replaced nothing in {name}: drop the flag.")


def check_liger(model_type=None):
    """Raise Refusal, before anything is loaded, for a machine or a model type that Liger cannot serve."""
    try:
        import torch.distributed.tensor  # noqa: F401  Liger 0.8.0 uses this module without importing it
        import triton  # noqa: F401
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise Refusal(
            f"Liger's kernels need liger-kernel and triton, and here: {error}. Install requirements.txt "
            "(Triton is made for Linux), or drop --use_liger_kernel and --liger_cross_entropy."
        ) from error
    refuse(
        not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
        "Liger's kernels are written in Triton, which needs a GPU, and torch sees none: drop "
        "--use_liger_kernel and --liger_cross_entropy. (TRITON_INTERPRET=1 runs some on the CPU, for tests.)",
    )
    refuse(
        model_type is not None and model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN,
        f"--use_liger_kernel: Liger has no kernels for model type {model_type!r}: drop the flag. It has them "
        f"for {', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}.",
    )


# --- What is trained ---


def trained(model):
    """Parameters that require a gradient. A frozen one costs its weight, no more."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def frozen_names(model):
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def parameter_groups(model, weight_decay):
    """What AdamW is given: matrices decay; biases and the scales of norms do not.

    Returns: those two groups, of trained parameters only: a checkpoint wants moments for all that is here.
    """
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        # under ZeRO-3 a rank's part of a matrix is a vector
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decays = len(shape) > 1 and not name.endswith("bias")
        if parameter.requires_grad:
            (decayed if decays else kept).append(parameter)
    groups = {"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}
    return [group for group in groups if group["params"]]


# --- Checkpoints, on any number of ranks ---


def training_state(model, optimizer):
    """What a checkpoint holds of the tensors: name -> weight, or moment of it, whole or sharded."""
    if not optimizer.state:  # before the first step: loading wants tensors to load into
        make_moments(model, optimizer)
    state = {}
    for name, parameter in model.named_parameters():  # a tied weight once
        if parameter.requires_grad:  # the model that the run began with has the others
            state[f"weight.{name}"] = parameter.detach()
            for moment, value in optimizer.state[parameter].items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    state[f"{moment}.{name}"] = value
    return state


def make_moments(model, optimizer):
    """Let an optimizer make what it keeps for each weight, by a step without gradient at a rate of 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    _set_steps(optimizer, 0)


def _set_steps(optimizer, steps):
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].fill_(steps)


def save_training_state(folder, run, model, optimizer):
    """Write this rank's part of a checkpoint into an existing folder; nothing is pickled.

    Files: shard-*.safetensors; random_state_<rank>.rng, in safetensors' format too.
    """
    dcp.save(
        training_state(model, optimizer),
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
    )
    random_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    with run.together():
        save_file(random_state, folder / f"random_state_{run.rank}.rng")


def load_training_state(run, model, optimizer):
    """Restore weights, moments and random states of run.checkpoint, whatever number of ranks wrote it.

    A rank that the earlier run did not have keeps the random state of its seed.
    """
    run.watch("loading the checkpoint")
    reader = HuggingFaceStorageReader(str(run.checkpoint))
    with unreadable_refused(run.checkpoint):
        dcp.load(training_state(model, optimizer), storage_reader=reader)
    _set_steps(optimizer, run.progress["updates"])
    file = run.checkpoint / f"random_state_{run.rank}.rng"
    with run.together(), unreadable_refused(run.checkpoint):
        if file.exists():
            random_state = load_file(file)
            torch.set_rng_state(random_state["cpu"])
            if "cuda" in random_state and torch.cuda.is_available():
                torch.cuda.set_rng_state(random_state["cuda"])


@contextmanager
def unreadable_refused(checkpoint):
    """Whatever goes wrong as a damaged checkpoint is read, each library has an error of its own for it."""
    logging.disable(logging.WARNING)  # torch would log a traceback beside the error that it raises
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is none of the former
        if is_of_a_collective(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        first = next(iter(getattr(error, "failures", {0: (error, None)}).values()))[0]  # of the ranks
        reason = f"{type(first).__name__}: {' '.join(str(first).split())[:200]}"
        if isinstance(first, UnpicklingError):  # torch's words name a way to run the code all the same
            reason = "it holds more than tensors and plain values"
        raise Refusal(f"{checkpoint} cannot be read; take another checkpoint. ({reason})") from error
    finally:
        logging.disable(logging.NOTSET)


# --- The final model, in Hugging Face format ---


def saved_names(model):
    """Names of what a model file holds: parameters and some buffers, a tied weight once."""
    kept = set(model.state_dict())
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name in kept]


def save_model(run, model, pretrained):
    """Write the trained model into the output folder, each tensor in the dtype that it came in."""
    run.watch("saving the model")
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with run.together():
        if run.first:
            names = saved_names(model)
            write_pretrained(run.args.output_dir, pretrained, {name: weights[name] for name in names})


def write_pretrained(output_dir, pretrained, weights):
    """Write a model; weights: {name: whole tensor}, a tied weight once."""
    temporary = fresh_folder(Path(output_dir) / "model.tmp")
    tensors = _write_all_but_weights(temporary, pretrained, weights)
    save_torch_state_dict(tensors, temporary, max_shard_size="2GB")
    commit_files(temporary, output_dir)


def try_to_write(run, model, pretrained):
    """Raise Refusal for a model that could be trained, but not written."""
    with run.together():
        if run.first:
            weights = model.state_dict(keep_vars=True)  # ZeRO-3 notes the shape on the parameter itself
            shapes = {n: getattr(weights[n], "ds_shape", weights[n].shape) for n in saved_names(model)}
            with tempfile.TemporaryDirectory() as folder:
                try:
                    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
                    _write_all_but_weights(Path(folder), pretrained, empty)
                except Exception as error:
                    raise Refusal(
                        f"--model_name_or_path {pretrained.name}: once trained it could not be written, for "
                        f"{type(error).__name__}: {error}. Mend its folder, or choose another model."
                    ) from error


def _write_all_but_weights(folder, pretrained, weights):
    """Configurations and tokenizer. Returns the weights under the names, and in the shapes and dtypes, that
    the files had: transformers joins the experts of a layer, for one, and files hold each one alone.
    """
    with torch.device("meta"):  # a shell that knows names, ties and config
        shell = empty_model(pretrained.config, dtype=pretrained.dtype)
    shell._weight_conversions = pretrained.conversions
    config = copy.deepcopy(pretrained.config)
    config.architectures = config.architectures or [type(shell).__name__]
    config.save_pretrained(folder)
    if pretrained.generation_config is not None:
        # to the letter: transformers would not write what it takes for invalid
        (folder / "generation_config.json").write_text(pretrained.generation_config)
    pretrained.tokenizer.save_pretrained(folder)
    tensors = {}
    for name, tensor in revert_weight_conversion(shell, weights).items():
        bare = name.removeprefix(f"{shell.base_model_prefix}.")  # in files of a model without its head
        dtype = pretrained.dtypes.get(name) or pretrained.dtypes.get(bare, pretrained.dtype)
        tensor = tensor.to(dtype)
        # a part of a larger storage (a gathered shard with its padding, an expert) cannot be saved alone
        part = not tensor.is_meta and tensor.untyped_storage().nbytes() > tensor.nbytes
        tensors[name] = tensor.clone() if part else tensor
    return tensors | pretrained.unused
