"""GRPO's policy update alone: shared prompts, each completion with its own prompt, and TRL's GRPOTrainer.

BENCH_MODEL=<folder> BENCH_DATA=<folder> python benchmarks/grpo_update.py [--device cuda] [--quick]

All ways take the same rollout: real prompts, each with G = 8 real answers to other questions as completions,
so that the lengths vary as they do in a rollout. A completion's tokens count as P + C in every way. Ours runs
as a plain module that casts weights as FSDP2 does: what DeepSpeed's engine adds is not measured here. The
loss of a first step on a rollout is a sum of advantages, whatever the model computes: whether two ways agree,
the gradient's norm tells, best in fp32 (--dtype fp32).
"""

import json
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from against_trl import compare_cases, prepare, trl_options, trl_way
from datasets import Dataset
from harness import Way, data_file
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad, shuffle_sequence_dict, split_tensor_dict

import grpo_zero3
from common import collators
from common.attention import register_varlen_attention
from common.sharding import load_model, wrap_layers
from grpo_zero3 import (
    Unsharded,
    group_advantages,
    loss_denominators,
    make_batches,
    prepare_training,
    train_step,
)

G = 8
WAYS = {  # (flags of grpo_zero3.py, whether a prompt is computed once)
    "shared": ({}, True),
    "shared, no checkpointing": ({"gradient_checkpointing": False}, True),
    "padding-free": ({}, False),
}
TRL_WAYS = {"TRL": True, "TRL, tuned": False}  # whether layers are checkpointed, as they are by default


def sample_rollouts(bench):
    """The rollout of each step: [(groups as make_batches takes them, rewards (B,)), ..]."""
    tokenizer, options = bench.pretrained.tokenizer, bench.options
    prompts = answers = bench.lines("prompts.jsonl")
    if bench.case != "lognormal":
        answers = data_file("gsm8k_prompt_completion", options, "preferences.jsonl").read_text().splitlines()
    rng, rollouts = np.random.default_rng(0), []
    for size in bench.sizes:
        groups, left = [], size  # groups, on CUDA tokens that are computed
        while left > 0:
            prompt = json.loads(prompts[rng.integers(len(prompts))])["prompt"]
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            completions = []
            for i in rng.choice(len(answers), G, replace=False):
                answer = json.loads(answers[i])
                answer = (answer.get("completion") or answer["chosen"])[-1]["content"]
                completions.append(tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id])
            groups.append((tokenizer(text)["input_ids"], completions))
            tokens = len(groups[-1][0]) + sum(map(len, completions))
            left -= tokens if options.device == "cuda" else 1
        rollouts.append((groups, torch.from_numpy(rng.random(len(groups) * G))))
    return rollouts


def our_ways(bench, rollouts):
    model = load_model(bench.args, bench.run, bench.pretrained)
    register_varlen_attention()
    model.set_attn_implementation("varlen")
    optimizer = prepare_training(model, bench.args, bench.run)
    engine = Unsharded(model, optimizer, bench.args.max_grad_norm)
    ways = {}
    for way, (flags, shares) in WAYS.items():
        args = replace(bench.args, **flags)
        step = partial(our_step, engine, args, bench.run)
        switch = partial(wrap_layers, model, args.gradient_checkpointing, args.torch_compile)
        batches = [our_batches(bench, *rollout, shares) for rollout in rollouts]
        ways[way] = Way(model, optimizer, step, batches, switch=switch)
    return ways


def our_batches(bench, groups, rewards, shares):
    lengths = torch.tensor([len(c) for _, completions in groups for c in completions])
    limit = bench.args.max_completion_length
    denominators = loss_denominators(lengths, G, bench.args.loss_type, limit, bench.run.sum)
    budget = max(len(p) * (1 if shares else G) + sum(map(len, c)) for p, c in groups)
    if bench.options.device == "cuda":
        budget = max(budget, bench.options.tokens)
    make = partial(make_batches, budget=budget, run=bench.run)
    if shares:
        return make(groups, group_advantages(rewards, G), denominators)
    groups = [(prompt, [c]) for prompt, completions in groups for c in completions]
    with patch.object(collators, "_root_length", lambda prompts: 0):  # else they would share it as a root
        return make(groups, group_advantages(rewards, G), denominators)


def our_step(engine, args, run, batches):
    sums, grad_norm = train_step(engine, batches, args, run)
    return {"loss": sums["loss"], "grad_norm": grad_norm}


def their_ways(bench, rollouts, longest):
    """GRPOTrainer's steps on rollouts padded, shuffled and split as it does after generating."""
    settings = trl_options(bench, max_completion_length=longest)
    dataset, model = Dataset.from_dict({"prompt": ["never sampled"]}), bench.args.model_name_or_path
    trainer = GRPOTrainer(model, [lambda **_: [0.0]], GRPOConfig(**settings), train_dataset=dataset)
    prepare(trainer)._prepare_inputs = lambda batch: batch  # it would generate, and score
    batches = []
    for groups, rewards in rollouts:
        columns = {"prompt": [], "completion": []}
        for prompt, completions in groups:
            columns["prompt"] += [torch.tensor(prompt)] * G
            columns["completion"] += map(torch.tensor, completions)
        rollout = {"advantages": group_advantages(rewards, G)}
        for (name, sequences), side in zip(columns.items(), ("left", "right")):
            rollout[f"{name}_ids"] = pad(sequences, trainer._tokenizer.pad_token_id, side)
            rollout[f"{name}_mask"] = pad([torch.ones_like(ids) for ids in sequences], 0, side)
        torch.manual_seed(0)
        num_batches = len(groups)
        if bench.options.device == "cuda":  # as many padded tokens in a forward as ours have
            padded = sum(rollout[f"{name}_ids"].numel() for name in columns)
            fewest, size = -(-padded // bench.options.tokens), len(groups) * G
            # TRL drops what is over where they do not divide the completions
            num_batches = next(n for n in range(min(fewest, len(groups)), size + 1) if size % n == 0)
        split = split_tensor_dict(shuffle_sequence_dict(rollout), num_batches)
        num_items = rollout["completion_mask"].sum()
        for batch in split:
            batch["num_items_in_batch"] = num_items
            # what TRL makes of the two itself; here for the counts
            batch["input_ids"] = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        batches.append([bench.run.to_device(batch) for batch in split])
    return {way: trl_way(trainer, batches, checkpointing) for way, checkpointing in TRL_WAYS.items()}


def compare(bench):
    rollouts = sample_rollouts(bench)
    longest = max(len(c) for groups, _ in rollouts for _, completions in groups for c in completions)
    bench.args = replace(bench.args, max_completion_length=longest)
    sides = [partial(our_ways, bench, rollouts), partial(their_ways, bench, rollouts, longest)]
    real_tokens = [sum(len(p) + len(c) for p, cs in groups for c in cs) for groups, _ in rollouts]
    return bench.setup("groups", "ours: varlen", num_generations=G), sides, real_tokens


if __name__ == "__main__":
    compare_cases("grpo_update", __doc__, grpo_zero3, compare)
