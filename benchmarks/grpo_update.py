"""GRPO's policy update alone: shared prompts, each completion with its own prompt, and TRL's GRPOTrainer.

BENCH_MODEL=<folder> BENCH_DATA=<folder> python benchmarks/grpo_update.py [--device cuda] [--quick]

All ways take the same rollout: real prompts, each with G = 8 real answers to other questions as completions,
so that the lengths vary as they do in a rollout. A completion's tokens count as P + C in every way. Ours runs
as a plain module that casts weights as FSDP2 does: what DeepSpeed's engine adds is not measured here.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from against_trl import (
    Way,
    checkpoint_layers,
    chosen_cases,
    compare,
    count_repeats,
    disagreement,
    free,
    prepare,
    quiet,
    show,
    trl_attention,
    trl_options,
    trl_way,
)
from datasets import Dataset
from harness import count_warm_ups, data_file, model_folder, parse, write
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad, shuffle_sequence_dict, split_tensor_dict

import sft_packing
from grpo_zero3 import (
    Arguments,
    group_advantages,
    grpo_loss,
    loss_denominators,
    make_batches,
    per_token_logps,
)

G = 8
CASES = {"gsm8k_prompts": {"cpu": 1, "cuda": 8}}  # --groups of a step
WAYS = {  # (flags of grpo_zero3.py, whether a prompt is computed once)
    "shared": ({}, True),
    "shared, no checkpointing": ({"gradient_checkpointing": False}, True),
    "padding-free": ({}, False),
}
TRL_WAYS = {"TRL": True, "TRL, tuned": False}  # whether layers are checkpointed, as they are by default
PAIRS = [
    ("shared", "TRL"),
    ("shared, no checkpointing", "TRL, tuned"),
    ("shared", "padding-free"),
    ("padding-free", "TRL"),
]


def sample_rollouts(groups_per_step, options, tokenizer):
    """A small rollout, then those of all steps: [(groups as make_batches takes them, rewards (B,)), ..]."""
    prompts = data_file("gsm8k_prompts", options, "prompts.jsonl").read_text().splitlines()
    answers = data_file("gsm8k_prompt_completion", options, "preferences.jsonl").read_text().splitlines()
    rng, rollouts = np.random.default_rng(0), []
    for step in range(1 + count_warm_ups(options) + count_repeats(options)):
        groups = []
        for _ in range(groups_per_step):
            prompt = json.loads(prompts[rng.integers(len(prompts))])["prompt"]
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            completions = []
            for i in rng.choice(len(answers), G, replace=False):
                answer = json.loads(answers[i])
                answer = (answer.get("completion") or answer["chosen"])[-1]["content"]
                completion_ids = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
                if step == 0:
                    # Of one length, their advantages would cancel out, and the loss would be nothing but
                    # rounding errors.
                    completion_ids = completion_ids[-8 * (len(completions) + 1) :]
                completions.append(completion_ids)
            groups.append((tokenizer(text)["input_ids"], completions))
        rollouts.append((groups, torch.from_numpy(rng.random(groups_per_step * G))))
    return rollouts


def our_ways(args, rollouts, device):
    """grpo_zero3.update as a function, for a module without DeepSpeed, and the batches it would be given."""
    model = sft_packing.load_model(args, device, "varlen")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    return {
        way: our_way(replace(args, **flags), shares, rollouts, device, model, optimizer)
        for way, (flags, shares) in WAYS.items()
    }


def our_way(args, shares, rollouts, device, model, optimizer):
    engine = Engine(model)
    batches = []
    for groups, rewards in rollouts:
        advantages = group_advantages(rewards, G)
        lengths = torch.tensor([len(c) for _, completions in groups for c in completions])
        denominators = loss_denominators(
            lengths, G, "dapo", args.max_completion_length, lambda values: values
        )
        budget = max(len(p) * (1 if shares else G) + sum(map(len, c)) for p, c in groups)
        if not shares:
            groups = [(prompt, [c]) for prompt, completions in groups for c in completions]
        batches.append(
            make_batches(groups, advantages, denominators, budget, device, int, temperature=args.temperature)
        )

    def step(micro_batches):
        checkpoint_layers(model, args.gradient_checkpointing)
        total = 0.0
        for batch in micro_batches:
            logps = per_token_logps(engine, batch, args)
            losses, _, _ = grpo_loss(logps, logps.detach(), batch["advantages"], epsilon=args.epsilon)
            loss = (losses / batch["denominators"]).sum()
            loss.backward()
            total += loss.item()
        grad_norm = sft_packing.clip_gradients(model, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": total, "grad_norm": grad_norm}

    return Way(model, optimizer, step, batches)


class Engine:
    """What grpo_zero3.per_token_logps asks of DeepSpeed's engine."""

    def __init__(self, module):
        self.module = module

    def __call__(self, **inputs):
        return self.module(**inputs)


def their_ways(model, rollouts, longest, options, scratch):
    """GRPOTrainer's steps on rollouts padded, shuffled and split as it does after generating."""
    init = {"attn_implementation": trl_attention(options)}
    num_batches = len(rollouts[0][0])
    config = GRPOConfig(
        **trl_options(options, scratch, model_init_kwargs=init, gradient_accumulation_steps=num_batches),
        max_completion_length=longest,
    )
    dataset = Dataset.from_dict({"prompt": ["never sampled"]})
    trainer = prepare(GRPOTrainer(str(model), [lambda **_: [0.0]], config, train_dataset=dataset))
    trainer._prepare_inputs = lambda batch: batch  # it would generate, and score
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
        split = split_tensor_dict(shuffle_sequence_dict(rollout), num_batches)
        num_items = rollout["completion_mask"].sum()
        for batch in split:
            batch["num_items_in_batch"] = num_items
            # what TRL makes of the two itself; here for the counts
            batch["input_ids"] = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        batches.append([{k: v.to(config.device) for k, v in batch.items()} for batch in split])
    return {way: trl_way(trainer, batches, checkpointing) for way, checkpointing in TRL_WAYS.items()}


def agreement(sides):
    """What one small step of each way gives in fp32, and the largest relative difference between two ways."""
    steps = {}
    for side in sides:
        ways = side()
        steps |= {name: way.step(way.batches[0]) for name, way in ways.items()}
        free(ways)
    repetitions = {"ways": {name: {"repetitions": [step]} for name, step in steps.items()}}
    return {"ways": steps, **{name: disagreement(repetitions, name) for name in ("loss", "grad_norm")}}


def main():
    options = parse(__doc__, dtype="bf16", groups=0, only="")
    quiet()
    ((name, sizes),) = chosen_cases(CASES, options).items()
    size = options.groups or sizes[options.device]
    with tempfile.TemporaryDirectory() as scratch:
        model = model_folder(options, scratch)
        small, *rollouts = sample_rollouts(size, options, AutoTokenizer.from_pretrained(model))
        longest = max(len(c) for groups, _ in rollouts for _, completions in groups for c in completions)
        shared = {"bf16": options.dtype == "bf16", "max_completion_length": longest, "learning_rate": 0.0}
        args = Arguments(model_name_or_path=str(model), output_dir=scratch, **shared)
        device = sft_packing.start_distributed(args)[3]
        assert device.type == options.device, "hide the GPU to measure on the CPU: CUDA_VISIBLE_DEVICES="

        def sides(rollouts, options, args):
            theirs = partial(their_ways, model, rollouts, longest, options, scratch)
            return [partial(our_ways, args, rollouts, device), theirs]

        fp32 = argparse.Namespace(**vars(options) | {"dtype": "fp32"})
        in_fp32 = agreement(sides([small], fp32, replace(args, bf16=False)))
        setup = {
            "groups_per_step": size,
            "num_generations": G,
            "dtype": f"fp32 weights, {options.dtype} compute",
            "optimizer": "AdamW, fused",
            "attention": f"ours: varlen; TRL: {trl_attention(options)}",
        }
        real_tokens = [sum(len(p) + len(c) for p, cs in groups for c in cs) for groups, _ in rollouts]
        found = compare(name, setup, sides(rollouts, options, args), real_tokens, options, PAIRS)
        found["one_step_in_fp32"] = in_fp32
        show(found)
        worst = f"loss {in_fp32['loss']:.1e}  grad_norm {in_fp32['grad_norm']:.1e}"
        print(f"  the same in one small step in fp32: {worst}")
    write("grpo_update", options, model, [found])
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
