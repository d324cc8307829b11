"""SFT: padded, padding-free, packed and checkpointed steps of sft_packing.py and of TRL's SFTTrainer.

BENCH_MODEL=<folder> BENCH_DATA=<folder> python benchmarks/sft.py [--device cuda] [--quick]

Both sides take the same documents in the same steps; each tokenises, joins and packs them by its own functions.
"""

import json
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from against_trl import Way, compare, has_real_data, quiet, show, trl_attention, trl_options, trl_way
from datasets import load_dataset
from harness import data_file, model_folder, parse, write
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer, pack_dataset

from common.offload import OffloadActivations
from sft_packing import (
    Arguments,
    Rows,
    batch_nll_sum,
    clip_gradients,
    count,
    decoder_layers,
    load_examples,
    load_model,
    start_distributed,
    to_device,
    tokenize,
)

# --documents of a step; on a CPU, as many as make a step of some ten seconds
CASES = {"chat_messages": {"cpu": 4, "cuda": 8}, "gsm8k_prompt_completion": {"cpu": 8, "cuda": 8}}
WAYS = {  # flags of sft_packing.py
    "padded": {"packing": False, "padding_free": False, "gradient_checkpointing": False},
    "padding-free": {"packing": False, "gradient_checkpointing": False},
    "packed": {"gradient_checkpointing": False},
    "packed + checkpointing": {},
    "packed + checkpointing + offload": {"activation_offloading": True},
}
TRL_WAYS = {  # settings of SFTConfig
    "TRL padded": {},  # its defaults: checkpointing is on
    "TRL padding-free": {"padding_free": True, "max_length": None, "gradient_checkpointing": False},
    "TRL packed": {"packing": True, "gradient_checkpointing": False},
    "TRL packed + checkpointing": {"packing": True},
    "TRL packed + checkpointing + offload": {"packing": True, "activation_offloading": True},
}
PAIRS = [
    ("packed", "TRL packed"),
    ("packed", "TRL padding-free"),
    ("packed", "TRL padded"),
    ("packed", "padded"),
    ("packed + checkpointing", "TRL packed + checkpointing"),
    ("packed + checkpointing", "TRL padded"),
    ("packed + checkpointing + offload", "TRL packed + checkpointing + offload"),
]


def choose(path, num_documents, max_length, tokenizer, scratch):
    """A file of that many of the data's examples, drawn at random among those of up to max_length tokens."""
    lines = Path(path).read_text().splitlines()
    chosen, lengths = [], []
    for i in np.random.default_rng(0).permutation(len(lines)):
        length = len(tokenize(json.loads(lines[i]), tokenizer, False)[0])
        if length <= max_length:
            chosen.append(lines[i])
            lengths.append(length)
        if len(chosen) == num_documents:
            break
    file = Path(scratch) / "documents.jsonl"
    file.write_text("\n".join(chosen) + "\n")
    return str(file), lengths


def our_way(args, steps, tokenizer, device):
    """sft_packing.train's loop body as a function, and the batches that it would be given."""
    examples, data = load_examples(args.dataset_name, "train", tokenizer, args, "truncate")
    batches = []
    for numbers in steps:
        rows = Rows(examples.select(numbers), data, args, "truncate")
        batches.append([rows.batch(np.arange(len(rows)), tokenizer.pad_token_id or 0)])
    flat = args.packing or args.padding_free
    model = load_model(args, device, "varlen" if flat else "sdpa")
    offload = OffloadActivations(model, decoder_layers(model), device) if args.activation_offloading else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)

    def step(micro_batches):
        num_items_in_batch = sum(count(batch)[0] for batch in micro_batches)
        nll_total = 0.0
        for batch in micro_batches:
            batch = to_device(batch, device)
            with offload or nullcontext():
                nll = batch_nll_sum(model, batch, args.loss_chunk_size)
            (nll / num_items_in_batch).backward()
            nll_total += nll.item()
        if offload:
            offload.end_step()
        grad_norm = clip_gradients(model, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": nll_total / num_items_in_batch, "grad_norm": grad_norm}

    return Way(model, optimizer, step, batches, offload)


def their_way(settings, model, documents, steps, options, scratch):
    """SFTTrainer with these settings, and the batches of its own packer and collator."""
    init = {"attn_implementation": trl_attention(options.device)}
    config = SFTConfig(**trl_options(options, scratch, model_init_kwargs=init, **settings))
    trainer = SFTTrainer(str(model), config, train_dataset=documents)
    if not settings.get("packing"):
        documents = trainer.train_dataset  # cut to max_length
    batches = []
    for numbers in steps:
        chosen = documents.select(numbers)
        if config.packing:  # what the trainer itself does with a dataset, here with one step's documents
            chosen = pack_dataset(chosen, config.max_length, config.packing_strategy)
        batches.append([trainer.data_collator(list(chosen))])
    return trl_way(trainer, batches)


def their_documents(model, file, options, scratch):
    """The examples as SFTTrainer tokenises them: columns input_ids and labels."""
    config = SFTConfig(**trl_options(options, scratch))
    rows = load_dataset("json", data_files=file, split="train")
    return SFTTrainer(str(model), config, train_dataset=rows).train_dataset.select_columns(
        ["input_ids", "labels"]
    )


def main():
    options = parse(__doc__, dtype="bf16", max_length=1024, documents=0)
    quiet()
    repeats = options.repeats or (2 if options.quick else 3)
    cases = CASES if has_real_data(options) else {"demo": {"cpu": 8, "cuda": 8}}
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        model = model_folder(options, scratch)
        tokenizer = AutoTokenizer.from_pretrained(model)
        shared = {"max_length": options.max_length, "bf16": options.dtype == "bf16", "learning_rate": 0.0}
        args = Arguments(model_name_or_path=str(model), output_dir=scratch, **shared)
        device = start_distributed(args)[3]
        for name, sizes in cases.items():
            size = options.documents or sizes[options.device]
            # on a CPU one document is enough to warm up with
            counts = [size if options.device == "cuda" else 1] + [size] * repeats
            ends = np.cumsum(counts)
            steps = [list(range(end - n, end)) for n, end in zip(counts, ends)]
            file, lengths = choose(
                data_file(name, options, "sft.jsonl"), ends[-1], options.max_length, tokenizer, scratch
            )
            documents = their_documents(model, file, options, scratch)
            builds = {}
            for way, flags in WAYS.items():
                ours = replace(args, dataset_name=file, **flags)
                builds[way] = partial(our_way, ours, steps, tokenizer, device)
            for way, settings in TRL_WAYS.items():
                settings = {"max_length": options.max_length, "per_device_train_batch_size": size, **settings}
                builds[way] = partial(their_way, settings, model, documents, steps, options, scratch)
            if options.device == "cpu":  # the host's memory is the device's
                builds = {way: build for way, build in builds.items() if "offload" not in way}
            setup = {
                "documents_per_step": size,
                "max_length": options.max_length,
                "dtype": f"fp32 weights, {options.dtype} compute",
                "optimizer": "AdamW, fused",
                "attention": "ours: sdpa (padded), varlen (flat); TRL: " + trl_attention(options.device),
            }
            pairs = [pair for pair in PAIRS if set(pair) <= set(builds)]
            real_tokens = [sum(lengths[i] for i in numbers) for numbers in steps]
            found.append(compare(name, setup, builds, real_tokens, options, pairs))
    document = write("sft", options, model, found)
    for one in document["cases"]:
        show(one)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
