"""DPO: padded, padding-free and shared-prompt steps of dpo_padding_free.py and of TRL's DPOTrainer.

BENCH_MODEL=<folder> BENCH_DATA=<folder> python benchmarks/dpo.py [--device cuda] [--quick]

Both sides take the same pairs in the same steps, with gradient checkpointing, which is the default of both.
Policy and reference are the same weights, so every loss is ln 2, but for rounding in bf16; gradients and
log-probabilities tell whether two ways agree. A pair's tokens count as 2 P + C + R in every way, whatever the
way computes.
"""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from against_trl import compare_cases, prepare, trl_options, trl_way
from datasets import load_dataset
from harness import Way, use
from trl import DPOConfig, DPOTrainer

import dpo_padding_free
from dpo_padding_free import (
    Pairs,
    compute_reference,
    load_examples,
    load_model,
    load_reference_model,
    prepare_training,
    tokenize,
    train_step,
)

# flags of dpo_padding_free.py; the ways of a side share one model, and a reference where it runs in each step
SIDES = (
    {"padding-free": {"share_prompt": False}, "shared": {}},
    {
        "padded, reference each step": {"padding_free": False, "attn_implementation": "sdpa"},
        "shared, reference each step": {},
    },
)
TRL_WAYS = {  # settings of DPOConfig
    "TRL padded": {},  # its defaults: the reference model runs in each step
    "TRL padded, precomputed": {"precompute_ref_log_probs": True},
}
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


def our_ways(bench, file, steps, ways):
    precomputes = "shared" in ways
    common_args = replace(bench.args, precompute_ref_log_probs=precomputes)
    model = load_model(common_args, bench.run, bench.pretrained)
    optimizer, _ = prepare_training(model, common_args, bench.run)
    reference_model = load_reference_model(common_args, bench.run, bench.pretrained)
    found = {}
    for way, flags in ways.items():
        args = replace(common_args, **flags)
        pairs = Pairs(load_examples(file, "train", bench.pretrained, args)[0], args, file)
        step = partial(our_step, model, reference_model, optimizer, args, bench.run)
        if precomputes:
            use(model, args, args.padding_free)
            pairs.reference = torch.full((len(pairs), 2), math.nan)
            compute_reference(model, pairs, [np.array(numbers) for numbers in steps], bench.run)
        batches = [[pairs.batch(np.array(numbers))] for numbers in steps]
        switch = partial(use_both, model, reference_model, args)
        found[way] = Way(model, optimizer, step, batches, others=(reference_model,), switch=switch)
    return found


def use_both(model, reference_model, args):
    for each in filter(None, (model, reference_model)):
        use(each, args, args.padding_free)


def our_step(model, reference_model, optimizer, args, run, batches):
    means = train_step(model, optimizer, batches, args, run, reference_model=reference_model)[1]
    return {name: means[name] for name in ("loss", "grad_norm", *LOGPS)}


def their_way(bench, file, steps, way):
    """DPOTrainer with this way's settings, and the batches of its own collator."""
    config = DPOConfig(**trl_options(bench, max_length=bench.args.max_length, **TRL_WAYS[way]))
    rows = load_dataset("json", data_files=file, split="train")
    trainer = prepare(DPOTrainer(bench.args.model_name_or_path, args=config, train_dataset=rows))
    batches = [[trainer.data_collator(list(trainer.train_dataset.select(numbers)))] for numbers in steps]
    return {way: trl_way(trainer, batches, metrics=LOGPS)}


def compare(bench):
    tokenizer = bench.pretrained.tokenizer

    def examine(example):
        texts = as_text(example, tokenizer)
        prompt, chosen, rejected, _ = tokenize(texts, tokenizer)
        fits = len(prompt) + max(len(chosen), len(rejected)) <= bench.args.max_length
        num_tokens = 2 * len(prompt) + len(chosen) + len(rejected)
        return (texts, num_tokens) if fits and chosen != rejected else None

    file, steps, real_tokens = bench.choose("preferences.jsonl", examine)
    sides = [partial(our_ways, bench, file, steps, ways) for ways in SIDES]
    sides += [partial(their_way, bench, file, steps, way) for way in TRL_WAYS]
    return bench.setup("pairs", max_length=bench.args.max_length), sides, real_tokens


if __name__ == "__main__":
    compare_cases("dpo", __doc__, dpo_padding_free, compare)
