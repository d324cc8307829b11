"""The ledger of a DeepSpeed ZeRO-3 engine: what a rank holds, counted on its tensors, or foretold."""

from contextlib import contextmanager

import torch

from common.trained import trained


def zero3_ledger(engine, planned_bytes, rollout_bytes, peak_bytes):
    """Bytes of this rank, as memory.memory_ledger takes them.

    Args:    engine: a ZeRO-3 engine that has trained. planned_bytes, rollout_bytes: weights that were to be
             whole at once in a rollout, and that were.
    Returns: {name: (formula, bytes)} and {name: bytes}.
    """
    parameters = list(engine.module.parameters())
    numel, c = sum(p.ds_numel for p in parameters), parameters[0].element_size()
    num_trained = sum(p.ds_numel for p in trained(engine.module))
    world, optimizer = engine.world_size, engine.optimizer
    states = [v for s in optimizer.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    tensors = {
        "parameters": [p.ds_tensor for p in parameters],
        "gradients": [optimizer.grad_partitions_flat_buffer],
        # ZeRO's own fp32 copy, which the optimizer updates, and AdamW's two moments
        "optimizer": [*(v for v in states if v.dim()), *optimizer.fp32_partitioned_groups_flat],
    }
    share = " / W" if world > 1 else ""
    letter = "trained P" if num_trained < numel else "P"
    predicted = {
        "parameters": (f"{c} P{share}", c * numel // world),
        "gradients": (f"fp32   4 {letter}{share}", 4 * num_trained // world),
        "optimizer": (f"fp32 copy 4 {letter}{share}, AdamW 8 {letter}{share}", 12 * num_trained // world),
        "rollout_weights": ("gathered for the rollout + the largest gather", planned_bytes),
        "peak": ("CUDA: allocated; CPU: resident in the process", None),
    }
    measured = {name: sum(t.numel() * t.element_size() for t in held) for name, held in tensors.items()}
    return predicted, measured | {"rollout_weights": rollout_bytes, "peak": peak_bytes}


@contextmanager
def most_whole(module):
    """Yields {"bytes": the most bytes of weights that were whole at once on this rank}.

    It looks as the forward of each module starts for the first time: one forward shows them all.
    """
    most, hooks = {"bytes": 0}, {}

    def look(part, *_):
        hooks.pop(part).remove()
        held = sum(parameter.nbytes for parameter in module.parameters())  # of one that is not whole: 0
        most["bytes"] = max(most["bytes"], held)

    for part in module.modules():
        hooks[part] = part.register_forward_pre_hook(look)
    try:
        yield most
    finally:
        for hook in hooks.values():
            hook.remove()


@contextmanager
def gathers_pretended(units, copied=None, kept=False):
    """Inside, a forward or backward allocates what ZeRO-3 would gather for it, and its end frees that.

    Args: units: [(parameters, owners)]: gathered at once before the first owner's forward, gone after the
          last one's. copied: the share of them that is there twice for a moment; None: in training, several
          arrive in one buffer, and each is copied out of it. kept: what a forward gathers stays until its
          backward.
    """
    hooks, whole = [], {}
    for i, (parameters, owners) in enumerate(units):

        def gather(*_, i=i, parameters=parameters):
            if i not in whole:
                size = sum(p.numel() * p.element_size() for p in parameters)
                twice = len(parameters) > 1 if copied is None else copied
                buffer = torch.empty(int(size * twice), dtype=torch.uint8)
                whole[i] = torch.empty(size, dtype=torch.uint8)
                del buffer

        def release(*_, i=i):
            whole.pop(i, None)

        hooks.append(owners[0].register_forward_pre_hook(gather))
        if not kept:
            hooks.append(owners[-1].register_forward_hook(release))
        if torch.is_grad_enabled():
            hooks.append(owners[0].register_full_backward_pre_hook(gather))
            last = owners[0] if kept else owners[-1]  # backward runs the other way
            hooks.append(last.register_full_backward_hook(release))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class ReducesPretended:
    """Allocates, while a backward runs, what ZeRO-3 would to reduce its gradients.

    Gradients are copied into a bucket, in fp32, and leave the model; one that is larger than it stays. When
    the next one finds no room, all that wait are put in the ranks' order, which takes a copy of them.

    Args: parameters: of the model; bucket_size: in elements.
    """

    def __init__(self, parameters, bucket_size):
        self.bucket_size, self.numels, self.large = bucket_size, [], None
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.arrive)

    def arrive(self, parameter):
        numel = parameter.numel()
        if self.numels and sum(self.numels) + numel > self.bucket_size:
            self.reduce()
        if numel > self.bucket_size:
            self.large = parameter.grad
        parameter.grad = None
        self.numels.append(numel)

    def reduce(self):
        # One gradient alone is in order as it is, but not always in fp32.
        copied = len(self.numels) > 1 or (self.large is not None and self.large.dtype != torch.float32)
        torch.empty(sum(self.numels) if copied else 0, dtype=torch.float32)
        self.numels, self.large = [], None


def zero3_learned_bytes(numel, dtype, zero):
    """Weights whole in a forward or backward whose order ZeRO-3 has learned from an earlier one.

    Args:    numel: parameters of the model, in dtype; zero: the configuration's "zero_optimization".
    Returns: bytes kept whole, for by default a weight stays that is used again within 1e9 elements; and those
             of two buffers, each of the next 50 million elements, that wait for weights to be cut from them.
    """
    kept = min(numel, zero.get("stage3_max_live_parameters", 10**9))
    in_advance = min(numel, 2 * zero.get("stage3_prefetch_bucket_size", 5 * 10**7))
    return dtype.itemsize * kept, dtype.itemsize * in_advance


def zero3_moments(numel, dtype, config, world, *, rollout, update, num_trained=None):
    """What ZeRO-3 holds of a model on each rank, and the peaks of the three phases of a GRPO step.

    Args:    numel: parameters of the model, in dtype; num_trained: of them, None = all; config: the engine's;
             rollout, update: the most bytes that those hold beyond the shards.
    Returns: {row: bytes held throughout}, {moment: bytes}.
    """
    zero, c = config["zero_optimization"], dtype.itemsize
    on_host = "offload_optimizer" in zero
    states = 0 if on_host else (numel if num_trained is None else num_trained) // world  # elements
    held = {
        "parameters": 0 if "offload_param" in zero else c * numel // world,
        "gradients": 4 * states,
        "bucket": 4 * zero["reduce_bucket_size"],  # fp32
        "optimizer": 12 * states,
    }
    always = sum(held.values())
    moments = {
        "in the rollout": always + rollout,
        "in the update's forward and backward": always + update,
        "in the optimizer's step": always
        + 4 * states,  # the gradients once more, as the optimizer wants them
    }
    return held, moments
