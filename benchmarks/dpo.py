"""DPO: padded, padding-free and shared-prompt steps of dpo_padding_free.py and of TRL's DPOTrainer.

BENCH_MODEL=<folder> BENCH_DATA=<folder> python benchmarks/dpo.py [--device cuda] [--quick]

Both sides take the same pairs in the same steps, with gradient checkpointing, which is the default of both.
Policy and reference are the same weights, so every loss is ln 2, but for rounding in bf16; gradients and
log-probabilities tell whether two ways agree. A pair's tokens count as 2 P + C + R in every way, whatever the
way computes.
"""

import argparse
import tempfile
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from against_trl import (
    Way,
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
from trl import DPOConfig, DPOTrainer

from dpo_padding_free import (
    METRICS,
    Arguments,
    Pairs,
    batch_loss,
    clip_gradients,
    compute_reference,
    load_examples,
    load_model,
    start_distributed,
    to_device,
    tokenize,
)

# --pairs of a step, on a CPU few; "bytes": of the one whose bytes are counted there, if not a timed one;
# "cpu_max_length": there, the longest pairs that are taken have so many tokens, unless --max_length says more
CASES = {
    "gsm8k_preferences": {"cpu": 2, "cuda": 16, "bytes": 4},
    "gsm8k_preferences_4shot": {"cpu": 1, "cuda": 16, "bytes": None},
    "chat_preferences": {"cpu": 2, "cuda": 16, "bytes": None, "cpu_max_length": 512},
}
# flags of dpo_padding_free.py; the ways of a side share one model, and a reference where it runs in each step
SIDES = (
    {"padding-free": {"share_prompt": False}, "shared": {}},
    {
        "padded, reference each step": {"padding_free": False, "precompute_ref_log_probs": False},
        "shared, reference each step": {"precompute_ref_log_probs": False},
    },
)
TRL_WAYS = {  # settings of DPOConfig
    "TRL padded": {},  # its defaults: the reference model runs in each step
    "TRL padded, precomputed": {"precompute_ref_log_probs": True},
}
COMPARED = [
    ("shared", "TRL padded, precomputed"),
    ("shared, reference each step", "TRL padded"),
    ("shared, reference each step", "padded, reference each step"),
    ("shared", "TRL padded"),
    ("padding-free", "TRL padded, precomputed"),
]
LOGPS = ("logps/chosen", "logps/rejected")


def as_text(example, tokenizer):
    """A conversation as plain strings, so that both sides score the same tokens.

    Of a conversation, TRL also scores the line break with which some templates follow the end of a turn.
    """
    prompt = tokenizer.apply_chat_template(example["prompt"], tokenize=False, add_generation_prompt=True)
    texts = {"prompt": prompt}
    for name in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(example["prompt"] + example[name], tokenize=False)
        texts[name] = whole[len(prompt) :].removesuffix("\n")
    return texts


def our_ways(flags, args, file, steps, tokenizer, device):
    """dpo_padding_free.train's loop body as a function, and the batches it would be given, for each way."""
    model = load_model(args, device, "varlen")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    asks = any(not some.get("precompute_ref_log_probs", True) for some in flags.values())
    reference_model = load_model(args, device, "varlen").eval() if asks else None
    return {
        way: our_way(replace(args, **some), file, steps, tokenizer, device, model, reference_model, optimizer)
        for way, some in flags.items()
    }


def our_way(args, file, steps, tokenizer, device, model, reference_model, optimizer):
    pairs = Pairs(load_examples(file, "train", tokenizer, args)[0], args, file)
    pad_token_id = tokenizer.pad_token_id or 0
    models = [model] if reference_model is None else [model, reference_model]

    def attend():
        for each in models:
            each.set_attn_implementation("varlen" if args.padding_free else "sdpa")

    attend()
    if args.precompute_ref_log_probs:
        pairs.reference = compute_reference(model, pairs, args, 0, 1, device, pad_token_id)
    batches = [[pairs.batch(np.array(numbers), pad_token_id)] for numbers in steps]

    def step(micro_batches):
        attend()
        num_pairs = sum(len(batch["completion_lengths"]) // 2 for batch in micro_batches)
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        for batch in micro_batches:
            loss_sum, batch_sums = batch_loss(model, reference_model, to_device(batch, device), args)
            (loss_sum / num_pairs).backward()
            sums += batch_sums
        grad_norm = clip_gradients(model, args.max_grad_norm)
        means = dict(zip(METRICS, (sums / num_pairs).tolist()))
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": means["loss"], "grad_norm": grad_norm, **{name: means[name] for name in LOGPS}}

    return Way(model, optimizer, step, batches, others=models[1:])


def their_way(way, model, file, steps, options, scratch):
    """DPOTrainer with this way's settings, and the batches of its own collator."""
    init = {"attn_implementation": trl_attention(options)}
    settings = {"max_length": options.max_length, "model_init_kwargs": init, **TRL_WAYS[way]}
    config = DPOConfig(**trl_options(options, scratch, **settings))
    rows = load_dataset("json", data_files=file, split="train")
    trainer = prepare(DPOTrainer(str(model), args=config, train_dataset=rows))
    batches = [[trainer.data_collator(list(trainer.train_dataset.select(numbers)))] for numbers in steps]
    return {way: trl_way(trainer, batches, metrics=LOGPS)}


def compare_on(name, size, for_bytes, model, args, device, options, scratch):
    """The case of one data set, `size` pairs to a step, and `for_bytes` to the one whose bytes count."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def examine(example):
        texts = as_text(example, tokenizer)
        prompt, chosen, rejected, _ = tokenize(texts, tokenizer)
        fits = len(prompt) + max(len(chosen), len(rejected)) <= options.max_length
        num_tokens = 2 * len(prompt) + len(chosen) + len(rejected)
        return (texts, num_tokens) if fits and chosen != rejected else None

    steps = plan_steps(options, size, for_bytes)
    data = data_file(name, options, "preferences.jsonl")
    file, lengths = choose(data, steps[-1][-1] + 1, examine, scratch)
    sides = [partial(our_ways, flags, args, file, steps, tokenizer, device) for flags in SIDES]
    sides += [partial(their_way, way, model, file, steps, options, scratch) for way in TRL_WAYS]
    setup = {
        "pairs_per_step": size,
        "pairs_of_counted_step": for_bytes or size,
        "max_length": options.max_length,
        "dtype": f"fp32 weights, {options.dtype} compute",
        "optimizer": "AdamW, fused",
        "attention": f"ours: sdpa (padded), varlen (flat); TRL: {trl_attention(options)}",
    }
    real_tokens = [sum(lengths[i] for i in numbers) for numbers in steps]
    return compare(name, setup, sides, real_tokens, options, COMPARED)


def main():
    options = parse(__doc__, dtype="bf16", max_length=0, pairs=0, only="")  # 0: what the case says
    quiet()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        model = model_folder(options, scratch)
        shared = {"bf16": options.dtype == "bf16", "learning_rate": 0.0}
        args = Arguments(model_name_or_path=str(model), output_dir=scratch, **shared)
        device = start_distributed(args)[3]
        assert device.type == options.device, "hide the GPU to measure on the CPU: CUDA_VISIBLE_DEVICES="
        for name, sizes in chosen_cases(CASES, options).items():
            counts = step_sizes(sizes, options.pairs, options)
            max_length = options.max_length or sizes.get(f"{options.device}_max_length", 1024)
            limited = argparse.Namespace(**vars(options) | {"max_length": max_length})
            args = replace(args, max_length=max_length)
            found.append(compare_on(name, *counts, model, args, device, limited, scratch))
            show(found[-1])
            write("dpo", options, model, found, complete=False)
    write("dpo", options, model, found)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
