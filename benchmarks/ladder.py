"""The ladder: how long a document may be before the GPU's memory ends, with one switch more on each rung.

A step holds two documents, one of N tokens and one of N / 2; padded they are 2 N tokens, joined 1.5 N. Models
are random, in the shapes of Qwen3-0.6B and Qwen3-1.7B. N is found by doubling, then halving the gap; each try
is two optimizer steps, for the first makes the optimizer's states. Needs a CUDA device.

python benchmarks/ladder.py --device cuda [--models 0.6B] [--limit 65536]
"""

import gc
import itertools
import sys
import tempfile
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from harness import case, parse, write
from transformers import Qwen3Config, Qwen3ForCausalLM

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
SHAPES = {"0.6B": (1024, 3072), "1.7B": (2048, 6144)}  # hidden and intermediate size; the rest is the same
# rung r has the first r on: on the first one, nothing
SWITCHES = ("bf16", "no padding", "chunked loss", "checkpointing", "offloading", "Liger's kernels")


def longest(fits, start, limit, precision=0.03):
    """The largest length that fits, as long as any shorter one fits too.

    Args:    fits: function of a length; start: the first to try; limit: nothing beyond it is tried.
    Returns: a length that was tried and fits, at most `precision` of it below one that does not (or that is
             beyond the limit); 0 if start does not fit.
    """
    if start > limit or not fits(start):
        return 0
    low, high = start, 2 * start
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > max(1, precision * low):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def random_model(folder, name):
    hidden, intermediate = SHAPES[name]
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with DEVICE:
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)


def full_nll_sum(model, batch):
    """What batch_nll_sum computes, with all logits at once."""
    not_inputs = ("labels", "score_index", "score_ids")
    inputs = {name: value for name, value in batch.items() if name not in not_inputs}
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(
        logits[batch["score_index"]], batch["score_ids"], reduction="sum"
    )


class Rung:
    """Training with the first so many switches on; `fits` tries a length and remembers what it measured."""

    def __init__(self, folder, number):
        self.folder, self.on, self.ready, self.tries = folder, SWITCHES[:number], None, {}
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

    def fits(self, length):
        torch.cuda.reset_peak_memory_stats()
        try:
            batch = self.batch(length)
            self.ready = self.ready or self.build(batch)
            self.step(batch)
            torch.cuda.synchronize()
            started = time.perf_counter()
            self.step(batch)
            torch.cuda.synchronize()
        except torch.cuda.OutOfMemoryError:
            fitted = False
        else:
            fitted = True
            seconds = time.perf_counter() - started
            self.tries[length] = {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated()}
        # outside of `except`: there the exception would hold the frames, and with them the tensors
        if not fitted:
            self.release()  # what an interrupted step leaves of hooks and gathered weights serves nobody
        print(f"    {length:9,} tokens {'fit' if fitted else 'do not fit'}", file=sys.stderr, flush=True)
        return fitted

    def release(self):
        self.ready = None
        gc.collect()
        torch.cuda.empty_cache()

    def leave(self):
        self.release()
        if dist.is_initialized():  # the first rung, in fp32, runs without a process group
            dist.destroy_process_group()


def climb(folder, number, limit):
    """One rung's longest document, with seconds and peak bytes of a step; None if 512 tokens do not fit."""
    rung = Rung(folder, number)
    length = longest(rung.fits, 512, limit)
    rung.leave()
    return {"longest": length, **rung.tries[length]} if length else None


def main():
    options = parse(__doc__, models=",".join(SHAPES), limit=131072)
    if options.device != "cuda" or not torch.cuda.is_available():
        sys.exit("ladder.py looks for the end of a GPU's memory: it needs --device cuda, and such a device.")
    limit = 2048 if options.quick else options.limit
    names = options.models.split(",")
    runs, once = {name: {} for name in names}, {name: {} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            random_model(f"{folder}/{name}", name)
        # rung by rung, not model by model: Liger's kernels come last, for they change all models built later
        for number, name in itertools.product(range(len(SWITCHES) + 1), names):
            way = f"+ {SWITCHES[number - 1]}" if number else "plain"
            found = climb(f"{folder}/{name}", number, limit)
            if found is None:
                print(f"{name} {way:<20} 512 tokens do not fit", flush=True)
                continue
            length, seconds, peak = found["longest"], found["seconds"], found["peak_bytes"] / 2**30
            print(f"{name} {way:<20}{length:9,} tokens {seconds:8.2f} s/step {peak:8.2f} GiB", flush=True)
            runs[name][way] = [{"seconds": seconds}]
            once[name][way] = {"longest": length, "peak_bytes": found["peak_bytes"]}
            setup = {"documents": "N and N / 2 tokens", "start": 512, "limit": limit, "precision": 0.03}
            cases = [case(f"Qwen3-{n}", setup, runs[n], once[n]) for n in names]
            write("ladder", options, "random weights, Qwen3's shapes", cases)  # so far: a crash keeps it


if __name__ == "__main__":
    main()
