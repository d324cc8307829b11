"""The ledger of a DeepSpeed ZeRO-3 engine: what each rank holds, counted on its tensors."""

import torch


def zero3_ledger(engine, rollout_bytes, peak_bytes):
    """Bytes of this rank, as memory.memory_ledger takes them.

    Args:    engine: a ZeRO-3 engine that has trained. rollout_bytes: weights whole at once in a rollout.
    Returns: {name: (formula, bytes)} and {name: bytes}.
    """
    parameters = list(engine.module.parameters())
    numel, c = sum(p.ds_numel for p in parameters), parameters[0].element_size()
    world, optimizer = engine.world_size, engine.optimizer
    states = [v for s in optimizer.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    tensors = {
        "parameters": [p.ds_tensor for p in parameters],
        # ZeRO's own fp32 copy, which the optimizer updates, and AdamW's two moments
        "optimizer": [*(v for v in states if v.dim()), *optimizer.fp32_partitioned_groups_flat],
    }
    share = " / W" if world > 1 else ""
    predicted = {
        "parameters": (f"{c} P{share}", c * numel // world),
        "gradients": (f"fp32   4 P{share}", 4 * numel // world),
        "optimizer": (f"fp32 copy 4 P{share}, AdamW 8 P{share}", 12 * numel // world),
        "rollout_weights": ("gathered for the rollout + the largest gather", rollout_bytes),
        "peak": ("measured alone", None),
    }
    measured = {name: sum(t.numel() * t.element_size() for t in held) for name, held in tensors.items()}
    return predicted, measured | {"peak": peak_bytes}
