"""The ladder: how long a document may be before the GPU's memory ends, with one switch more on each rung.

A step holds two documents, one of N tokens and one of N / 2; padded they are 2 N tokens, joined 1.5 N. Models
are random, in the shapes of Qwen3-0.6B and Qwen3-1.7B. N is found by trying: the longest was run, and
something at most 3 % longer ran out of memory. Needs a CUDA device.

python benchmarks/ladder.py --device cuda [--models 0.6B] [--memory_gib 16] [--limit 65536]

--memory_gib: what PyTorch may take, to stand for a smaller GPU.
"""

import itertools
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import torch
from harness import GIB, case, free, parse, random_batch, random_model, script_run, sft_way, use, write
from loss_head import full_logits

import sft_packing
from common.sharding import read_pretrained

START = 256  # tokens, the shortest document that is tried
# rung r has the first r on: on the first one, nothing
SWITCHES = ("bf16", "no padding", "chunked loss", "checkpointing", "offloading", "Liger's kernels")


def longest(fits, start, limit, precision=0.03):
    """The largest length that fits, as long as any shorter one fits too.

    Args:    fits: function of a length; start: the first to try; limit: nothing beyond it is tried.
    Returns: a length that was tried and fits, at most `precision` of it below one that does not (or that is
             beyond the limit); 0 if start does not fit.
    """
    low, high = 0, start
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while low and high - low > max(1, int(precision * low)):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


class Rung:
    """Training with the first so many switches on: what a step on documents of a length takes."""

    def __init__(self, args, run, number):
        self.on, self.run, self.way, self.reached = SWITCHES[:number], run, None, None
        self.flat = "no padding" in self.on
        self.args = replace(
            args,
            bf16="bf16" in self.on,
            packing=False,
            padding_free=self.flat,
            gradient_checkpointing="checkpointing" in self.on,
            activation_offloading="offloading" in self.on,
            use_liger_kernel="Liger's kernels" in self.on,
        )

    def build(self):
        pretrained = read_pretrained(self.args.model_name_or_path)
        model = sft_packing.load_model(self.args, self.run, pretrained)
        use(model, self.args, self.flat)
        optimizer, _ = sft_packing.prepare_training(model, self.args, self.run)
        return sft_way(self.args, self.run, model, optimizer, [])

    def step(self, batch):
        whole = patch.object(sft_packing, "loss_head", lambda args: full_logits)
        with nullcontext() if "chunked loss" in self.on else whole:
            self.way.step([batch])
        torch.cuda.synchronize()

    def fits(self, length):
        """Whether a step on documents of this length fits; `reached` notes what it took."""
        fitted = False
        try:
            batch = self.run.to_device(random_batch([length, length // 2], flat=self.flat))
            self.way = self.way or self.build()
            self.step(batch)  # makes the optimizer's states, and the allocator ask for what it needs
            torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            self.step(batch)
            seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated()
            self.reached = {"longest": length, "peak_bytes": peak, "seconds": seconds}
            fitted = True
        except torch.cuda.OutOfMemoryError:
            pass
        # outside of `except`: there the exception would hold the frames, and with them the tensors
        if not fitted:
            self.leave()  # what an interrupted step leaves of hooks and gathered weights serves nobody
        print(f"    {length:9,} tokens {'fit' if fitted else 'do not fit'}", file=sys.stderr, flush=True)
        return fitted

    def leave(self):
        free({"rung": self.way} if self.way else {})
        self.way = None


def allow(gib):
    """Let PyTorch take so much of the GPU's memory, 0 = all. Returns: the bytes."""
    total = torch.cuda.get_device_properties(0).total_memory
    available = min(int(gib * GIB) or total, total)
    torch.cuda.set_per_process_memory_fraction(available / total)
    return available


def main():
    options = parse(__doc__, models="0.6B,1.7B", memory_gib=0.0, limit=131072)
    if options.device != "cuda":
        sys.exit("ladder.py looks for the end of a GPU's memory: it needs --device cuda, and such a device.")
    limit, available = 2048 if options.quick else options.limit, allow(options.memory_gib)
    setup = {"documents": "N and N / 2 tokens", "memory_gib": round(available / GIB, 1)}
    setup |= {"start": START, "limit": limit, "precision": 0.03}
    found = {name: {} for name in options.models.split(",")}
    with script_run(sft_packing, options, lambda *_: "") as (scratch, args, run):
        for name in found:
            random_model(f"Qwen3-{name}", scratch / name, "cuda")
        # rung by rung, not model by model: Liger's kernels come last, for they change all models built later
        for number, name in itertools.product(range(len(SWITCHES) + 1), found):
            way = f"+ {SWITCHES[number - 1]}" if number else "plain"
            rung = Rung(replace(args, model_name_or_path=str(scratch / name)), run, number)
            if longest(rung.fits, START, limit):
                found[name][way] = rung.reached
            rung.leave()
            print(f"{name} {way}: {rung.reached or 'the shortest does not fit'}", flush=True)
    cases = []
    for name, ways in found.items():
        runs = {way: [{"seconds": reached["seconds"]}] for way, reached in ways.items()}
        cases.append(case(f"Qwen3-{name}", setup, runs, ways))
    write("ladder", options, "random weights, Qwen3's shapes", cases, reads=())


if __name__ == "__main__":
    main()
