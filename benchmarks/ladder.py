"""The ladder: how long a document may be before the GPU's memory ends, with one switch more on each rung.

A step holds two documents, one of N tokens and one of N / 2; padded they are 2 N tokens, joined 1.5 N. Models
are random, in the shapes of Qwen3-0.6B and Qwen3-1.7B. N is found from the bytes of shorter steps, and by
trying: the longest was run, and something at most 3 % longer ran out of memory. Needs a CUDA device.

python benchmarks/ladder.py --device cuda [--models 0.6B] [--memory_gib 16] [--limit 65536]

--memory_gib: what PyTorch may take, one number for all models or one for each, to stand for a smaller GPU.
"""

import gc
import itertools
import sys
import tempfile
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from harness import case, parse, qwen3_config, save_random, write

from common.collators import flatten, pad
from common.liger import apply_liger_kernels
from common.offload import OffloadActivations
from sft_packing import (
    Arguments,
    add_scored,
    batch_nll_sum,
    clip_gradients,
    count,
    decoder_layers,
    load_model,
    start_distributed,
    to_device,
)

DEVICE = torch.device("cuda")
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


def full_nll_sum(model, batch):
    """What batch_nll_sum computes, with all logits at once."""
    not_inputs = ("labels", "score_index", "score_ids")
    inputs = {name: value for name, value in batch.items() if name not in not_inputs}
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(
        logits[batch["score_index"]], batch["score_ids"], reduction="sum"
    )


class Rung:
    """Training with the first so many switches on: what a step on documents of a length takes."""

    def __init__(self, folder, number):
        self.on, self.ready, self.seconds = SWITCHES[:number], None, None
        self.args = Arguments(
            model_name_or_path=folder,
            bf16="bf16" in self.on,
            packing=False,
            padding_free="no padding" in self.on,
            gradient_checkpointing="checkpointing" in self.on,
        )

    def build(self, batch):
        device = start_distributed(self.args)[3]
        model = load_model(self.args, device, "varlen" if "no padding" in self.on else "sdpa")
        if "Liger's kernels" in self.on:
            apply_liger_kernels(model, batch["input_ids"][:1, :64])
        offloads = "offloading" in self.on
        offload = OffloadActivations(model, decoder_layers(model), device) if offloads else None
        return model, torch.optim.AdamW(model.parameters(), lr=0.0, fused=True), offload

    def batch(self, length):
        ids = [torch.randint(0, 1000, (n,)).tolist() for n in (length, length // 2)]
        documents = [{"input_ids": x, "labels": x} for x in ids]
        joined = flatten(documents) if "no padding" in self.on else pad(documents, 0)
        return to_device(add_scored(joined), DEVICE)

    def step(self, batch):
        model, optimizer, offload = self.ready
        with offload or nullcontext():
            chunked = "chunked loss" in self.on
            nll = batch_nll_sum(model, batch, 256) if chunked else full_nll_sum(model, batch)
        (nll / count(batch)[0]).backward()
        if offload:
            offload.end_step()
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def peak_bytes(self, length):
        """Highest allocation of a step on documents of this length, or None if it does not fit."""
        try:
            batch = self.batch(length)
            self.ready = self.ready or self.build(batch)
            self.step(batch)  # makes the optimizer's states, and the allocator ask for what it needs
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            started = time.perf_counter()
            self.step(batch)
            torch.cuda.synchronize()
            self.seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated()
        except torch.cuda.OutOfMemoryError:
            peak = None
        # outside of `except`: there the exception would hold the frames, and with them the tensors
        if peak is None:
            self.release()  # what an interrupted step leaves of hooks and gathered weights serves nobody
        print(f"    {length:9,} tokens {'fit' if peak else 'do not fit'}", file=sys.stderr, flush=True)
        return peak

    def release(self):
        self.ready = None
        gc.collect()
        torch.cuda.empty_cache()

    def leave(self):
        self.release()
        if dist.is_initialized():  # the first rung, in fp32, runs without a process group
            dist.destroy_process_group()


def climb(folder, number, limit, available):
    """One rung's longest document, with seconds and peak bytes of a step; None if START tokens do not fit."""
    rung, tries = Rung(folder, number), {}

    def peak_bytes(length):
        peak = rung.peak_bytes(length)
        tries[length] = {"longest": length, "peak_bytes": peak, "seconds": rung.seconds}
        return peak

    length = longest(peak_bytes, START, limit, available)
    rung.leave()
    return tries.get(length)


def allow(gib):
    """Let PyTorch take so much of the GPU's memory, 0 = all. Returns: the bytes."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    available = int(gib * 2**30) or total
    torch.cuda.set_per_process_memory_fraction(min(1.0, available / total))
    return min(available, total)


def main():
    options = parse(__doc__, models="0.6B,1.7B", memory_gib="0", limit=131072)
    if options.device != "cuda" or not torch.cuda.is_available():
        sys.exit("ladder.py looks for the end of a GPU's memory: it needs --device cuda, and such a device.")
    limit = 2048 if options.quick else options.limit
    names, gib = options.models.split(","), [float(x) for x in options.memory_gib.split(",")]
    gib = dict(zip(names, gib * len(names) if len(gib) == 1 else gib, strict=True))
    runs, once, setups, cases = {name: {} for name in names}, {name: {} for name in names}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            save_random(qwen3_config(name), f"{folder}/{name}", "cuda")
        # rung by rung, not model by model: Liger's kernels come last, for they change all models built later
        for number, name in itertools.product(range(len(SWITCHES) + 1), names):
            available = allow(gib[name])
            setups[name] = {
                "documents": "N and N / 2 tokens",
                "memory_gib": round(available / 2**30, 1),
                "start": START,
                "limit": limit,
                "precision": 0.03,
            }
            way = f"+ {SWITCHES[number - 1]}" if number else "plain"
            found = climb(f"{folder}/{name}", number, limit, available)
            if found is None:
                print(f"{name} {way:<20} {START} tokens do not fit", flush=True)
                continue
            seconds, peak = found.pop("seconds"), found["peak_bytes"] / 2**30
            print(f"{name} {way:<20}{found['longest']:9,} tokens {seconds:8.2f} s/step {peak:8.2f} GiB")
            runs[name][way] = [{"seconds": seconds}]
            once[name][way] = found
            cases = [case(f"Qwen3-{n}", setups[n], runs[n], once[n]) for n in setups]
            write("ladder", options, MODEL, cases, reads=(), complete=False)
    write("ladder", options, MODEL, cases, reads=())


if __name__ == "__main__":
    main()
