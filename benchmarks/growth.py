"""Growth of an SFT step of sft_packing.py: with tokens in a row, with documents in a row, with ranks.

Few layers keep this short on a CPU: SmolLM2-135M's, random, over the demo's vocabulary. A row of whole
documents should cost the same for each token however long it is, and less the more documents share it.

python benchmarks/growth.py [--device cuda] [--quick]
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from harness import ROOT, alternate, case, count_warm_ups, parse, ratio, synchronize, write
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common.collators import flatten
from common.memory import MemoryMeter
from sft_packing import (
    Arguments,
    add_scored,
    batch_nll_sum,
    clip_gradients,
    count,
    load_model,
    start_distributed,
    to_device,
)

LAYERS = {"cpu": 4, "cuda": 30}
TOKENS = {"cpu": (512, 2048, 8192), "cuda": (512, 1024, 2048, 4096, 8192, 16384, 32768)}
DOCUMENT = 256  # tokens of each document where the row grows
ROW = {"cpu": 2048, "cuda": 8192}  # tokens of the row where its documents grow in number
DOCUMENTS = (1, 4, 16)


def small_model(folder, layers):
    """Write a random model of SmolLM2-135M's width, of so many layers, with the demo's vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/model")
    width = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    positions = {"max_position_embeddings": max(TOKENS["cuda"])}
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": layers, "tie_word_embeddings": True}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**width, **positions, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def row(tokens, documents, vocabulary, device):
    """A flat row of equally long random documents, every token scored."""
    ids = torch.randint(0, vocabulary, (documents, tokens // documents)).tolist()
    return to_device(add_scored(flatten([{"input_ids": x, "labels": x} for x in ids])), device)


class Trainer:
    """sft_packing.py's model and optimizer. The learning rate is 0: every step sees the same weights."""

    def __init__(self, folder, device):
        args = Arguments(model_name_or_path=str(folder), bf16=device.type == "cuda")
        self.device, self.model = device, load_model(args, device, "varlen")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

    def step(self, batch, attention="varlen"):
        """One optimizer step; returns what was measured of it."""
        self.model.set_attn_implementation(attention)  # cheap: one model serves both
        started = time.perf_counter()
        nll = batch_nll_sum(self.model, batch, chunk_size=256)
        (nll / count(batch)[0]).backward()
        clip_gradients(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss = nll.item() / count(batch)[0]
        synchronize(self.device.type)
        seconds = time.perf_counter() - started
        return {"loss": loss, "seconds_per_token": seconds / batch["input_ids"].numel()}

    def count_bytes(self, batch, attention):
        """Of a step, when the optimizer has its states: the peak, and what a token takes of it."""
        meter = MemoryMeter(self.model, self.optimizer, self.device, track=True, track_step=1)
        with meter.step([batch]):
            self.step(batch, attention)
        tokens, peak = batch["input_ids"].numel(), meter.measured["peak"]
        activations = meter.measured["activations"] / tokens  # held from forward to backward
        each = {"bytes_per_token": peak / tokens, "activation_bytes_per_token": activations}
        return {"peak_bytes": peak, **each}


def measure(axis, setup, trainer, attentions, batch, options, repeats):
    """One case: the bytes of a step on this row with each attention, then its time, in turn."""
    tokens = batch["input_ids"].numel()
    once = {name: trainer.count_bytes(batch, name) for name in attentions}
    ways = {name: lambda name=name: trainer.step(batch, name) for name in attentions}
    runs = alternate(ways, repeats, options.device, count_warm_ups(options))
    found = case(f"{axis}: {setup[axis.split()[0]]:,}", {"axis": axis, **setup}, runs, once)
    if "sdpa" in attentions:
        found["ratios"] = {"sdpa": ratio(found, "varlen", "sdpa")}
    for name, values in found["ways"].items():
        seconds, loss = values["median"]["seconds"], values["median"]["loss"]
        print(
            f"{found['case']:<28}{name:<8}{seconds:9.3f} s {seconds / tokens * 1e3:8.3f} ms/token "
            f"{values['peak_bytes'] / 2**20:9.1f} MiB  loss {loss:.6f}",
            flush=True,
        )
    return found


def worker(options):
    """One rank of torchrun: times steps on a row of its own; the first rank prints the seconds."""
    args = Arguments(model_name_or_path=options.folder, bf16=options.device == "cuda")
    rank, _, _, device = start_distributed(args)
    trainer = Trainer(options.folder, device)
    torch.manual_seed(rank)
    batch = row(options.tokens, options.tokens // DOCUMENT or 1, trainer.model.config.vocab_size, device)
    runs = alternate({"step": lambda: trainer.step(batch)}, options.repeats, device.type)["step"]
    if rank == 0:
        print(json.dumps(runs))
    if dist.is_initialized():
        dist.destroy_process_group()


def measure_ranks(folder, tokens, options, setup, repeats):
    """Cases of 1 and 2 ranks, launched in turn, one thread each: a row of so many tokens for every rank.

    Args: repeats: timed steps of each launch.
    """
    launches = 1 if options.quick else 2
    runs = {1: [], 2: []}
    for ranks in [*runs] * launches:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        flags = {"device": options.device, "folder": folder, "tokens": tokens, "repeats": repeats}
        command = [sys.executable, *launcher, __file__, *(f"--{k}={v}" for k, v in flags.items())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        runs[ranks] += json.loads(done.stdout.splitlines()[-1])
    cases = []
    for ranks, repetitions in runs.items():
        repetitions = [{**r, "tokens_per_second": ranks * tokens / r["seconds"]} for r in repetitions]
        sizes = {"axis": "ranks", "ranks": ranks, "tokens_per_rank": tokens, "threads_per_rank": 1}
        cases.append(case(f"ranks: {ranks}", {**sizes, **setup}, {"varlen": repetitions}))
        speed = cases[-1]["ways"]["varlen"]["median"]["tokens_per_second"]
        print(f"ranks: {ranks:<21}varlen  {speed:9.1f} tokens/s", flush=True)
    return cases


def main():
    options = parse(__doc__, folder="", tokens=0)
    if options.folder:
        return worker(options)
    repeats = options.repeats or (2 if options.quick else 3)
    layers = 2 if options.quick else LAYERS[options.device]
    lengths = (256, 512) if options.quick else TOKENS[options.device]
    numbers, length = ((1, 4), 256) if options.quick else (DOCUMENTS, ROW[options.device])
    setup = {"layers": layers, "width": 576, "dtype": "bf16" if options.device == "cuda" else "fp32"}
    cases, model = [], f"random Llama of {layers} layers, width 576"
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = small_model(folder, layers)
        device = start_distributed(Arguments(bf16=options.device == "cuda"))[3]
        trainer = Trainer(folder, device)
        trainer.step(row(DOCUMENT, 1, vocabulary, device))  # makes the optimizer's states
        for n in lengths:
            batch = row(n, n // DOCUMENT, vocabulary, device)
            sizes = {"tokens": n, "tokens_per_document": DOCUMENT, **setup}
            cases.append(measure("tokens per row", sizes, trainer, ["varlen"], batch, options, repeats))
        for documents in numbers:
            batch = row(length, documents, vocabulary, device)
            sizes = {"documents": documents, "tokens": length, **setup}
            cases.append(
                measure("documents per row", sizes, trainer, ["varlen", "sdpa"], batch, options, repeats)
            )
        write("growth", options, model, cases, reads=(), complete=False)
        if options.device == "cpu" or torch.cuda.device_count() > 1:
            cases += measure_ranks(folder, length, options, setup, options.repeats or 2)
    if dist.is_initialized():
        dist.destroy_process_group()
    write("growth", options, model, cases, reads=())


if __name__ == "__main__":
    main()
