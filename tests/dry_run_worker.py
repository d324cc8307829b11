"""Bytes counted on real ranks, for test_dry_run.py; the first rank writes them to <folder>/<what>.pt.

python -m torch.distributed.run --nproc_per_node 2 tests/dry_run_worker.py sft|grpo <folder>
"""

import gc
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from deepspeed.runtime.comm import coalesced_collectives  # noqa: E402

from common.memory import ByteCounter, MemoryMeter  # noqa: E402

CPU = torch.device("cpu")


def sft(flags):
    """FSDP2: {"batch", "measured"} of a run's second step."""
    import sft_packing

    meters = []

    class Kept(MemoryMeter):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            meters.append(self)

    sft_packing.MemoryMeter = Kept
    sft_packing.main(sft_packing.Arguments(**flags))
    return {"batch": meters[0].largest_batch, "measured": meters[0].measured}


def tensors_in(value, depth=6):
    if torch.is_tensor(value):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for v in values for tensor in tensors_in(v, depth - 1)] if depth else []


def hold_no_more_than_nccl(script):
    """gloo reduces a copy of the gradients, and its thread lets go of gathered weights a little late."""
    gather = script.gather

    def reduce_in_place(gradients, share, group=None, **_):  # share is a view of gradients
        torch.distributed.all_reduce(gradients, group=group)

    def gather_and_wait(parameters, device):
        gather(parameters, device)
        time.sleep(0.01)

    coalesced_collectives._torch_reduce_scatter_fn = reduce_in_place
    script.gather = gather_and_wait


def grpo(flags):
    """ZeRO-3: the peaks of a rollout and of an update with its optimizer step; what is held throughout."""
    import grpo_zero3 as script

    args = script.Arguments(**flags)
    engine = script.load_engine(args, CPU)
    optimizer = engine.optimizer
    size, group = args.per_device_train_batch_size, args.num_generations
    prompts = [[5] * args.max_prompt_length for _ in range(size // group)]
    completions = [[7] * args.max_completion_length for _ in range(group)]
    world = script.dist.get_world_size()

    def update():
        groups, ones = [(prompt, completions) for prompt in prompts], torch.ones(size)
        longest = args.max_prompt_length + group * args.max_completion_length
        batches = script.make_batches(groups, ones, ones, longest, CPU, int, temperature=1.0)
        script.update(engine, batches, args, world, lambda phase: None)

    def rollout():
        with script.generation_weights(engine, script.budget_bytes(args)) as model:
            uniform = torch.rand(size, args.max_completion_length)
            script.generate(model, prompts, group, args.max_completion_length, end_ids=[], uniform=uniform)

    update()  # makes buffers and moments
    peaks = {}
    for name, phase in (("rollout", rollout), ("update", update)):
        tracker = ByteCounter()
        states = [vars(bucket) for bucket in optimizer.ipg_buckets.values()]
        states += [vars(optimizer), *optimizer.optimizer.state.values()]
        tracker.track_external(*tensors_in([p.ds_tensor for p in engine.module.parameters()] + states))
        held = tracker.get_tracker_snapshot()[CPU]["Total"]
        # DeepSpeed's gathers leave cycles, whose buffers would wait for the collector, by chance: let it look
        # often, and at what is new alone, or it would take all of the time
        gc.collect()
        gc.freeze()
        gc.set_threshold(100)
        with tracker:
            phase()
        peaks[name] = tracker._peak_mem[CPU]
    return {"held": held, **peaks}


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    if what == "grpo":
        import grpo_zero3

        grpo_zero3.start_distributed(grpo_zero3.Arguments())
        hold_no_more_than_nccl(grpo_zero3)
    jobs = json.loads((folder / f"{what}.json").read_text())
    found = {name: {"sft": sft, "grpo": grpo}[what](flags) for name, flags in jobs.items()}
    if rank == 0:
        torch.save(found, folder / f"{what}.pt")
