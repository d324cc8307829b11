"""The ladder: how long a document may be before the GPU's memory ends, with one switch more on each rung.

A step holds two documents, one of N tokens and one of N / 2; padded they are 2 N tokens, joined 1.5 N. Models
are random, in the shapes of Qwen3-0.6B and Qwen3-1.7B. N is found from the bytes of shorter steps, and by
trying: the longest was run, and something at most 3 % longer ran out of memory. Needs a CUDA device.

python benchmarks/ladder.py --device cuda [--models 0.6B] [--memory_gib 16] [--limit 65536]

--memory_gib: what PyTorch may take, one number for all models or one for each, to stand for a smaller GPU.
"""

import itertools
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import torch
from harness import GIB, case, parse, random_batch, random_model, release, script_run, sft_way, use, write
from loss_head import full_logits

import sft_packing
from common.sharding import read_pretrained

MODEL = "random weights, Qwen3's shapes"
START = 256  # tokens, the shortest document that is tried
# rung r has the first r on: on the first one, nothing
SWITCHES = ("bf16", "no padding", "chunked loss", "checkpointing", "offloading", "Liger's kernels")


def longest(peak_bytes, start, limit, available, precision=0.03):
    """The largest length that fits, as long as any shorter one fits too.

    Args:    peak_bytes: function of a length: the bytes it takes, or None if it does not fit; start: the
             first to try; limit: nothing beyond it is tried; available: the bytes there are.
    Returns: a length that was tried and fits, at most `precision` of it below one that does not (or that is
             beyond the limit); 0 if start does not fit.
    """
    fitting, high = [], limit + 1  # [(length, bytes), ..] and the shortest that does not fit
    length = start
    while length < high:
        count = peak_bytes(length)
        if count is None:
            high = length
        else:
            fitting.append((length, count))
        if not fitting:
            return 0
        low, bytes_low = fitting[-1]
        gap = max(1, int(precision * low))
        if high - low <= gap:
            return low
        guess = 2 * low
        if len(fitting) > 1:
            before, bytes_before = fitting[-2]
            growth = (bytes_low - bytes_before) / (low - before)
            if growth > 0:  # where a straight line through the two meets the end, and a little less
                guess = min(guess, int((1 - precision / 3) * (low + (available - bytes_low) / growth)))
        if high <= limit and guess > high - gap:
            guess = (low + high) // 2
        length = min(max(guess, low + gap), high - 1)
    return 0


class Rung:
    """Training with the first so many switches on: what a step on documents of a length takes."""

    def __init__(self, args, run, number):
        self.on, self.run, self.way, self.seconds = SWITCHES[:number], run, None, None
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

    def peak_bytes(self, length):
        """Highest allocation of a step on documents of this length, or None if it does not fit."""
        try:
            batch = self.run.to_device(random_batch([length, length // 2], flat=self.flat))
            self.way = self.way or self.build()
            self.step(batch)  # makes the optimizer's states, and the allocator ask for what it needs
            torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            self.step(batch)
            self.seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated()
        except torch.cuda.OutOfMemoryError:
            peak = None
        # outside of `except`: there the exception would hold the frames, and with them the tensors
        if peak is None:
            self.leave()  # what an interrupted step leaves of hooks and gathered weights serves nobody
        print(f"    {length:9,} tokens {'fit' if peak else 'do not fit'}", file=sys.stderr, flush=True)
        return peak

    def leave(self):
        self.way = None
        release()


def climb(rung, limit, available):
    """One rung's longest document, with seconds and peak bytes of a step; None if START tokens do not fit."""
    tries = {}

    def peak_bytes(length):
        peak = rung.peak_bytes(length)
        tries[length] = {"longest": length, "peak_bytes": peak, "seconds": rung.seconds}
        return peak

    length = longest(peak_bytes, START, limit, available)
    rung.leave()
    return tries.get(length)


def allow(gib):
    """Let PyTorch take so much of the GPU's memory, 0 = all. Returns: the bytes."""
    total = torch.cuda.get_device_properties(0).total_memory
    available = min(int(gib * GIB) or total, total)
    torch.cuda.set_per_process_memory_fraction(available / total)
    return available


def main():
    options = parse(__doc__, models="0.6B,1.7B", memory_gib="0", limit=131072)
    if options.device != "cuda":
        sys.exit("ladder.py looks for the end of a GPU's memory: it needs --device cuda, and such a device.")
    limit = 2048 if options.quick else options.limit
    names, gib = options.models.split(","), [float(x) for x in options.memory_gib.split(",")]
    gib = dict(zip(names, gib * len(names) if len(gib) == 1 else gib, strict=True))
    runs, once, setups, cases = {name: {} for name in names}, {name: {} for name in names}, {}, []
    with script_run(sft_packing, options, lambda *_: "") as (scratch, args, run):
        for name in names:
            random_model(f"Qwen3-{name}", scratch / name, "cuda")
        # rung by rung, not model by model: Liger's kernels come last, for they change all models built later
        for number, name in itertools.product(range(len(SWITCHES) + 1), names):
            available = allow(gib[name])
            setups[name] = {
                "documents": "N and N / 2 tokens",
                "memory_gib": round(available / GIB, 1),
                "start": START,
                "limit": limit,
                "precision": 0.03,
            }
            way = f"+ {SWITCHES[number - 1]}" if number else "plain"
            rung = Rung(replace(args, model_name_or_path=str(scratch / name)), run, number)
            found = climb(rung, limit, available)
            if found is None:
                print(f"{name} {way:<20} {START} tokens do not fit", flush=True)
                continue
            seconds, peak = found.pop("seconds"), found["peak_bytes"] / GIB
            print(f"{name} {way:<20}{found['longest']:9,} tokens {seconds:8.2f} s/step {peak:8.2f} GiB")
            runs[name][way] = [{"seconds": seconds}]
            once[name][way] = found
            cases = [case(f"Qwen3-{n}", setups[n], runs[n], once[n]) for n in setups]
            write("ladder", options, MODEL, cases, reads=(), complete=False)
    write("ladder", options, MODEL, cases, reads=())


if __name__ == "__main__":
    main()
