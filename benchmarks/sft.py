"""SFT: padded, padding-free, packed and checkpointed steps of sft_packing.py and of TRL's SFTTrainer.

BENCH_MODEL=<folder> BENCH_DATA=<folder> python benchmarks/sft.py [--device cuda] [--quick]
    [--tokens 16384] [--shape Qwen3-1.7B] [--liger 1]

Both sides take the same documents in the same steps; each tokenises, joins and packs them in its own way.
--liger 1: only the ways with Liger's kernels, of both: in one process with the others they would change all.
"""

from dataclasses import replace
from functools import partial

import numpy as np
from against_trl import compare_cases, prepare, trl_options, trl_way
from datasets import load_dataset
from harness import sft_way
from trl import SFTConfig, SFTTrainer, pack_dataset

import sft_packing
from sft_packing import Rows, load_documents, load_model, prepare_training, tokenize

WAYS = {  # flags of sft_packing.py
    "padded": {
        "packing": False,
        "padding_free": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": False,
    },
    "padding-free": {"packing": False, "gradient_checkpointing": False},
    "packed": {"gradient_checkpointing": False},
    "packed + checkpointing": {},
    "packed + checkpointing + offload": {"activation_offloading": True},
}
TRL_WAYS = {  # settings of SFTConfig; its defaults: padding, and checkpointing
    "TRL padded": {},
    "TRL padding-free": {"padding_free": True, "gradient_checkpointing": False},
    "TRL packed": {"packing": True, "gradient_checkpointing": False},
    "TRL packed + checkpointing": {"packing": True},
}
ON_A_GPU = {
    "packed, compiled": {"gradient_checkpointing": False, "torch_compile": True},
    "packed + checkpointing, compiled": {"torch_compile": True},
}
WITH_LIGER = {
    "packed + Liger": {"gradient_checkpointing": False, "use_liger_kernel": True},
    "packed + checkpointing + Liger": {"use_liger_kernel": True},
}
TRL_PACKED = {name: TRL_WAYS[name] for name in ("TRL packed", "TRL packed + checkpointing")}
# by itself, for it leaves hooks on its model
TRL_OFFLOAD = {"TRL packed + checkpointing + offload": {"packing": True}}


def our_ways(bench, file, steps):
    model = load_model(bench.args, bench.run, bench.pretrained)
    optimizer, _ = prepare_training(model, bench.args, bench.run)
    encoded, documents, _ = load_documents(file, "train", bench.pretrained, bench.args)

    def batch(args, numbers):
        chosen = documents[np.isin(documents[:, 0], numbers)]
        rows = Rows(encoded, chosen, {}, args, bench.pretrained, bench.run.world)
        return rows.batch(np.arange(len(rows)))

    chosen, ways = WITH_LIGER if bench.options.liger else WAYS, {}
    if bench.options.device == "cuda" and not bench.options.liger:
        chosen = chosen | ON_A_GPU
    for way, flags in chosen.items():
        # a CPU has no other memory to offload to
        if bench.options.device == "cuda" or "offload" not in way:
            args = replace(bench.args, **flags)
            batches = [[batch(args, numbers)] for numbers in steps]
            ways[way] = sft_way(args, bench.run, model, optimizer, batches)
    return ways


def sft_trainer(bench, rows, **settings):
    """An SFTTrainer with TRL's defaults. Its train_dataset has the columns input_ids and labels."""
    config = SFTConfig(**trl_options(bench, max_length=bench.args.max_length, **settings))
    return SFTTrainer(bench.args.model_name_or_path, config, train_dataset=rows)


def their_ways(bench, documents, steps, ways, **settings):
    """SFTTrainer's steps on what its packer and its collator make of the documents with each way's settings.

    One trainer is enough: nothing else in it depends on them.
    """
    trainer = prepare(sft_trainer(bench, documents, **settings))
    flatten = replace(trainer.data_collator, padding_free=True)
    found = {}
    for way, chosen in ways.items():
        collate = flatten if chosen.get("padding_free") or chosen.get("packing") else trainer.data_collator
        rows = [documents.select(numbers) for numbers in steps]
        if chosen.get("packing"):
            rows = [pack_dataset(some, bench.args.max_length, trainer.args.packing_strategy) for some in rows]
        batches = [[collate(list(some))] for some in rows]
        found[way] = trl_way(trainer, batches, chosen.get("gradient_checkpointing", True))
    return found


def compare(bench):
    def examine(example):
        num_tokens = len(tokenize(example, bench.pretrained.tokenizer, False)[0])
        return (example, num_tokens) if num_tokens <= bench.args.max_length else None

    file, steps, real_tokens = bench.choose("sft.jsonl", examine)
    rows = load_dataset("json", data_files=file, split="train")
    documents = sft_trainer(bench, rows).train_dataset.select_columns(["input_ids", "labels"])
    theirs = partial(their_ways, bench, documents, steps)
    ours = partial(our_ways, bench, file, steps)
    if bench.options.liger:
        sides = [ours, partial(theirs, TRL_PACKED, use_liger_kernel=True)]
    elif bench.options.device == "cuda":
        sides = [ours, partial(theirs, TRL_WAYS)]
        if not bench.options.shape:  # of a larger model, so many do not fit side by side
            compiled = {f"{name}, compiled": way for name, way in TRL_PACKED.items()}
            sides.append(partial(theirs, compiled, torch_compile=True))
            sides.append(partial(theirs, TRL_OFFLOAD, activation_offloading=True))
    else:
        sides = [ours, partial(theirs, TRL_WAYS)]
    return bench.setup("documents", max_length=bench.args.max_length), sides, real_tokens


if __name__ == "__main__":
    compare_cases("sft", __doc__, sft_packing, compare, liger=0)
