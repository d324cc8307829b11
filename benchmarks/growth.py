"""Growth of an SFT step of sft_packing.py: with tokens in a row, with documents in a row, with ranks.

Few layers keep this short on a CPU: SmolLM2-135M's, random, over the demo's vocabulary. A row of whole
documents should cost the same for each token however long it is, and less the more documents share it.

python benchmarks/growth.py [--device cuda] [--quick]
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import torch
from harness import (
    ROOT,
    alternate,
    case,
    measure,
    parse,
    random_batch,
    random_model,
    script_run,
    sft_way,
    write,
)
from transformers import AutoTokenizer

import sft_packing
from common.sharding import read_pretrained

LAYERS = {"cpu": 4, "cuda": 30}
TOKENS = {"cpu": (512, 2048, 8192), "cuda": (512, 1024, 2048, 4096, 8192, 16384, 32768)}
DOCUMENT = 256  # tokens of each document where the row grows
ROW = {"cpu": 2048, "cuda": 8192}  # tokens of the row where its documents grow in number
DOCUMENTS = (1, 4, 16)


def small_model(options, scratch):
    """SmolLM2-135M's width, few layers and the demo's vocabulary; the folder of --folder, if given."""
    if options.folder:
        return options.folder
    layers = 2 if options.quick else LAYERS[options.device]
    changes = {"num_hidden_layers": layers, "max_position_embeddings": max(TOKENS["cuda"])}
    changes["vocab_size"] = len(AutoTokenizer.from_pretrained(ROOT / "demo/model"))
    return random_model("SmolLM2-135M", f"{scratch}/small", **changes)


class Trainer:
    """sft_packing.py's model and optimizer, and its steps on one row."""

    def __init__(self, args, run):
        pretrained = read_pretrained(args.model_name_or_path)
        self.args, self.run, self.vocab_size = args, run, pretrained.vocab_size
        self.model = sft_packing.load_model(args, run, pretrained)
        self.optimizer, _ = sft_packing.prepare_training(self.model, args, run)

    def row(self, tokens, documents):
        return random_batch([tokens // documents] * documents, self.vocab_size)

    def ways(self, batch, attentions, num_steps):
        found = {name: replace(self.args, attn_implementation=name) for name in attentions}
        steps = [[batch]] * num_steps
        return {n: sft_way(args, self.run, self.model, self.optimizer, steps) for n, args in found.items()}


def grow(axis, setup, trainer, tokens, documents, attentions, options):
    """One case: a row of so many tokens and documents, with each attention."""
    batch = trainer.row(tokens, documents)
    ways = trainer.ways(batch, attentions, 1 + options.warm_up + options.repeats)
    pairs = [("varlen", name) for name in attentions[1:]]
    name = f"{axis}: {setup[axis.split()[0]]:,}"
    found = measure(name, {"axis": axis, **setup}, [lambda: ways], options, pairs=pairs)
    for values in found["ways"].values():
        values["seconds_per_token"] = values["median"]["seconds"] / tokens
        values["bytes_per_token"] = values["peak_bytes"] / tokens
        values["activation_bytes_per_token"] = values["bytes"]["activations"] / tokens
    return found


def worker(options):
    """One rank of torchrun: times steps on a row of its own; the first rank prints them."""
    with script_run(sft_packing, options, small_model, bf16=options.device == "cuda") as (_, args, run):
        trainer = Trainer(args, run)
        torch.manual_seed(run.rank)
        batch = trainer.row(options.tokens, options.tokens // DOCUMENT)
        way = trainer.ways(batch, ["varlen"], 1)["varlen"]
        runs = alternate({"step": lambda: way.take(0)}, options.repeats, options.device)["step"]
        if run.first:
            print(json.dumps(runs))


def measure_ranks(folder, tokens, options, setup):
    """Cases of 1 and 2 ranks, launched in turn, one thread each: a row of so many tokens for every rank."""
    runs = {1: [], 2: []}
    for ranks in [*runs] * (1 if options.quick else 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        flags = {"device": options.device, "folder": folder, "tokens": tokens, "repeats": 2}
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
    lengths = (256, 512) if options.quick else TOKENS[options.device]
    numbers, length = ((1, 4), 256) if options.quick else (DOCUMENTS, ROW[options.device])
    cases, dtype = [], "bf16" if options.device == "cuda" else "fp32"
    with script_run(sft_packing, options, small_model, bf16=dtype == "bf16") as (_, args, run):
        trainer = Trainer(args, run)
        layers = trainer.model.config.num_hidden_layers
        setup, model = {"layers": layers, "width": 576, "dtype": dtype}, f"random Llama of {layers} layers"
        for n in lengths:
            sizes = {"tokens": n, "tokens_per_document": DOCUMENT, **setup}
            cases.append(grow("tokens per row", sizes, trainer, n, n // DOCUMENT, ["varlen"], options))
        for n in numbers:
            sizes, attentions = {"documents": n, "tokens": length, **setup}, ["varlen", "sdpa"]
            cases.append(grow("documents per row", sizes, trainer, length, n, attentions, options))
        if options.device == "cpu" or torch.cuda.device_count() > 1:
            cases += measure_ranks(args.model_name_or_path, length, options, setup)
    write("growth", options, f"{model}, width 576", cases, reads=())


if __name__ == "__main__":
    main()
