"""SFT: padded, padding-free, packed and checkpointed steps of sft_packing.py and of TRL's SFTTrainer.

BENCH_MODEL=<folder> BENCH_DATA=<folder> python benchmarks/sft.py [--device cuda] [--quick]

Both sides take the same documents in the same steps; each tokenises, joins and packs them in its own way.
"""

import tempfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from against_trl import (
    Way,
    checkpoint_layers,
    choose,
    chosen_cases,
    compare,
    plan_steps,
    prepare,
    quiet,
    show,
    step_sizes,
    trl_attention,
    trl_options,
    trl_way,
)
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

# --documents of a step, on a CPU few; "bytes": of the one whose bytes are counted there, if not a timed one
CASES = {
    "chat_messages": {"cpu": 2, "cuda": 16, "bytes": 4},
    "gsm8k_prompt_completion": {"cpu": 3, "cuda": 16, "bytes": None},
}
WAYS = {  # flags of sft_packing.py
    "padded": {"packing": False, "padding_free": False, "gradient_checkpointing": False},
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
# by itself, for it leaves hooks on its model
TRL_OFFLOAD = {"TRL packed + checkpointing + offload": {"packing": True}}
PAIRS = [
    ("packed", "TRL packed"),
    ("packed", "TRL padding-free"),
    ("packed", "TRL padded"),
    ("packed", "padded"),
    ("packed + checkpointing", "TRL packed + checkpointing"),
    ("packed + checkpointing", "TRL padded"),
    ("packed + checkpointing + offload", "TRL packed + checkpointing + offload"),
]


def our_ways(args, steps, tokenizer, device, options):
    """sft_packing.train's loop body as a function, and the batches it would be given, for each of WAYS."""
    model = load_model(args, device, "varlen")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    return {
        way: our_way(replace(args, **flags), steps, tokenizer, device, model, optimizer)
        for way, flags in WAYS.items()
        if runs_on(way, options.device)
    }


def our_way(args, steps, tokenizer, device, model, optimizer):
    examples, data = load_examples(args.dataset_name, "train", tokenizer, args, "truncate")
    batches = []
    for numbers in steps:
        rows = Rows(examples.select(numbers), data, args, "truncate")
        batches.append([rows.batch(np.arange(len(rows)), tokenizer.pad_token_id or 0)])
    attention = "varlen" if args.packing or args.padding_free else "sdpa"
    offload = OffloadActivations(model, decoder_layers(model), device) if args.activation_offloading else None

    def step(micro_batches):
        model.set_attn_implementation(attention)
        checkpoint_layers(model, args.gradient_checkpointing)
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


def runs_on(way, device):
    return device == "cuda" or "offload" not in way  # a CPU has no other memory to offload to


def sft_trainer(model, rows, options, scratch, **settings):
    """An SFTTrainer with TRL's defaults. Its train_dataset has the columns input_ids and labels."""
    init = {"attn_implementation": trl_attention(options)}
    settings |= {"max_length": options.max_length, "model_init_kwargs": init}
    config = SFTConfig(**trl_options(options, scratch, **settings))
    return SFTTrainer(str(model), config, train_dataset=rows)


def their_ways(ways, model, documents, steps, options, scratch, **settings):
    """SFTTrainer's steps on what its packer and its collator make of the documents with each way's settings.

    One trainer is enough: nothing else in it depends on them.
    """
    trainer = prepare(sft_trainer(model, documents, options, scratch, **settings))
    flatten = replace(trainer.data_collator, padding_free=True)
    found = {}
    for way, chosen in ways.items():
        collate = flatten if chosen.get("padding_free") or chosen.get("packing") else trainer.data_collator
        rows = [documents.select(numbers) for numbers in steps]
        if chosen.get("packing"):
            rows = [pack_dataset(some, options.max_length, trainer.args.packing_strategy) for some in rows]
        batches = [[collate(list(some))] for some in rows]
        found[way] = trl_way(trainer, batches, chosen.get("gradient_checkpointing", True))
    return found


def compare_on(name, size, for_bytes, model, args, device, options, scratch):
    """The case of one data set, `size` documents to a step, and `for_bytes` to the one whose bytes count."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def examine(example):
        num_tokens = len(tokenize(example, tokenizer, False)[0])
        return (example, num_tokens) if num_tokens <= options.max_length else None

    steps = plan_steps(options, size, for_bytes)
    data = data_file(name, options, "sft.jsonl")
    file, lengths = choose(data, steps[-1][-1] + 1, examine, scratch)
    rows = load_dataset("json", data_files=file, split="train")
    documents = sft_trainer(model, rows, options, scratch).train_dataset
    documents = documents.select_columns(["input_ids", "labels"])
    sides = [
        partial(our_ways, replace(args, dataset_name=file), steps, tokenizer, device, options),
        partial(their_ways, TRL_WAYS, model, documents, steps, options, scratch),
    ]
    if options.device == "cuda":
        offload = {"activation_offloading": True}
        sides.append(partial(their_ways, TRL_OFFLOAD, model, documents, steps, options, scratch, **offload))
    setup = {
        "documents_per_step": size,
        "documents_of_counted_step": for_bytes or size,
        "max_length": options.max_length,
        "dtype": f"fp32 weights, {options.dtype} compute",
        "optimizer": "AdamW, fused",
        "attention": f"ours: sdpa (padded), varlen (flat); TRL: {trl_attention(options)}",
    }
    pairs = [pair for pair in PAIRS if runs_on(pair[0], options.device)]
    real_tokens = [sum(lengths[i] for i in numbers) for numbers in steps]
    return compare(name, setup, sides, real_tokens, options, pairs)


def main():
    options = parse(__doc__, dtype="bf16", max_length=1024, documents=0, only="")
    quiet()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        model = model_folder(options, scratch)
        shared = {"max_length": options.max_length, "bf16": options.dtype == "bf16", "learning_rate": 0.0}
        args = Arguments(model_name_or_path=str(model), output_dir=scratch, **shared)
        device = start_distributed(args)[3]
        assert device.type == options.device, "hide the GPU to measure on the CPU: CUDA_VISIBLE_DEVICES="
        for name, sizes in chosen_cases(CASES, options).items():
            counts = step_sizes(sizes, options.documents, options)
            found.append(compare_on(name, *counts, model, args, device, options, scratch))
            show(found[-1])
            write("sft", options, model, found, complete=False)
    write("sft", options, model, found)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
