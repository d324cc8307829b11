"""What the comparisons with TRL share: their table of cases, and a step of TRL's trainers as a function."""

import itertools
import json
import os
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from harness import Way, data_file, measure, parse, random_rows, script_run, write
from transformers import logging
from transformers.utils import is_flash_attn_2_available

from common.sharding import read_pretrained

# Examples of a step on a CPU: --examples, or these. A step that is timed often has to be so small there that
# weights and optimizer hide all else: "bytes" are those of the step whose bytes are counted. On CUDA a step
# holds as many examples as fit into --tokens. "cpu_max_length": the longest examples that are taken on a CPU,
# unless --max_length says more.
CASES = {
    "sft": {"chat_messages": {"cpu": 2, "bytes": 4}, "gsm8k_prompt_completion": {"cpu": 3}},
    "dpo": {
        "gsm8k_preferences": {"cpu": 2, "bytes": 4},
        "gsm8k_preferences_4shot": {"cpu": 1},
        "chat_preferences": {"cpu": 2, "cpu_max_length": 512},
    },
    "grpo_update": {"gsm8k_prompts": {"cpu": 1}},
}
MAX_LENGTH = {"cpu": 1024, "cuda": 4096}


@dataclass
class Bench:
    """A benchmark at one of its cases."""

    options: Any
    scratch: Path
    args: Any  # the script's Arguments
    run: Any
    pretrained: Any
    case: str
    # examples of each step, on CUDA tokens: of the one whose bytes are counted, of warm-ups, of those timed
    sizes: list

    def setup(self, unit, attention="ours: sdpa (padded), varlen (flat)", **more):
        """What the JSON says of the case; unit: what the examples are called."""
        counted, timed = self.sizes[0], self.sizes[-1]
        if self.options.device == "cuda":
            unit = "tokens"
        return {
            f"{unit}_per_step": timed,
            f"{unit}_of_counted_step": counted,
            **more,
            "dtype": f"fp32 weights, {self.options.dtype} compute",
            "optimizer": "AdamW, fused",
            "attention": f"{attention}; TRL: {trl_attention(self.options)}",
        }

    def choose(self, demo, examine):
        """Draw the steps' examples at random, among those that `examine` takes, into a file.

        Args:    demo: the file in demo/ that stands for the case's data; examine: function of an example,
                 returning it, perhaps rewritten, and its number of tokens; or None to leave it out.
        Returns: the file's name; the numbers of the examples of each step; tokens of each step.
        """
        lines = self.lines(demo)
        drawn = (examine(json.loads(lines[i])) for i in np.random.default_rng(0).permutation(len(lines)))
        drawn, chosen, steps = filter(None, drawn), [], []
        for size in self.sizes:
            examples = fill(drawn, size) if self.options.device == "cuda" else itertools.islice(drawn, size)
            chosen += examples
            steps.append(list(range(steps[-1][-1] + 1 if steps else 0, len(chosen))))
        if not all(steps) or self.options.device == "cpu" and len(chosen) < sum(self.sizes):
            raise ValueError(f"{self.case}: {len(chosen)} examples fit, which are too few for all steps.")
        file = self.scratch / f"{self.case}.jsonl"
        file.write_text("".join(json.dumps(example) + "\n" for example, _ in chosen))
        return str(file), steps, [sum(chosen[i][1] for i in numbers) for numbers in steps]

    def lines(self, demo):
        """The case's examples, a line of JSON each."""
        if self.case == "lognormal":
            return [json.dumps(row) for row in random_rows(demo.removesuffix(".jsonl"))]
        return data_file(self.case, self.options, demo).read_text().splitlines()


def fill(drawn, num_tokens):
    """The next of (example, tokens) as long as they fit; the first one that does not is left out."""
    taken = []
    for example, tokens in drawn:
        num_tokens -= tokens
        if num_tokens < 0:
            break
        taken.append((example, tokens))
    return taken


def step_sizes(case, options):
    """Sizes of the steps of a case, as Bench has them."""
    if options.device == "cuda":
        return [options.tokens] * (1 + options.warm_up + options.repeats)
    timed = options.examples or case["cpu"]
    larger = not options.quick and not options.examples
    return [case.get("bytes", timed) if larger else timed] + [timed] * (options.warm_up + options.repeats)


def compare_cases(what, description, script, compare, **more):
    """A whole benchmark: every case of it compared. Without $BENCH_DATA: on CUDA documents of lognormal
    length, on a CPU the demo's data.

    Args: compare: function of a Bench: what `measure` calls setup, sides and real_tokens. more: further flags
          of the command line.
    """
    defaults = {"dtype": "bf16", "max_length": 0, "examples": 0, "tokens": 16384, "shape": ""}
    options = parse(description, **defaults, **more)
    quiet()
    cases, found = CASES[what], []
    if options.quick or not os.environ.get("BENCH_DATA"):
        name = "lognormal" if options.device == "cuda" and not options.quick else "demo"
        cases = {name: next(iter(cases.values()))}
    with script_run(script, options, bf16=options.dtype == "bf16") as (scratch, args, run):
        pretrained = read_pretrained(args.model_name_or_path)
        for name, case in cases.items():
            if hasattr(args, "max_length"):
                limit = case.get(f"{options.device}_max_length", MAX_LENGTH[options.device])
                args = replace(args, max_length=options.max_length or limit)
            bench = Bench(options, scratch, args, run, pretrained, name, step_sizes(case, options))
            setup, sides, real_tokens = compare(bench)
            found.append(measure(name, setup, sides, options, real_tokens, mfu=what == "sft"))
            print(f"{what}: {name} is measured", file=sys.stderr)
    kind = "_liger" if getattr(options, "liger", 0) else "_large" if options.shape else ""
    write(what + kind, options, args.model_name_or_path, found)


# --- TRL's side ---


def trl_attention(options):
    """What TRL recommends where it can run, and transformers' own choice where it cannot."""
    flash = options.device == "cuda" and options.dtype == "bf16" and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "sdpa"


def trl_options(bench, **settings):
    """Settings of a TRL configuration that a comparison needs; what is left out keeps TRL's default."""
    options = bench.options
    return {
        "output_dir": str(bench.scratch / "trl"),
        "bf16": options.dtype == "bf16",
        "use_cpu": options.device == "cpu",
        "learning_rate": 0.0,
        "report_to": "none",
        "disable_tqdm": True,
        "model_init_kwargs": {"attn_implementation": trl_attention(options)},
        **settings,
    }


def prepare(trainer):
    """What a trainer's train() does before its first step: optimizer, device, autocast."""
    trainer.create_optimizer()
    prepared = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped, trainer.optimizer = prepared
    return trainer


def switch_checkpointing(model, wanted):
    """transformers' own, for the ways that share a model."""
    if wanted:
        newer = getattr(model, "activation_checkpointing_enable", None)  # its name in newer releases
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    else:
        newer = getattr(model, "activation_checkpointing_disable", None)
        (newer or model.gradient_checkpointing_disable)()


def trl_way(trainer, steps, gradient_checkpointing=True, metrics=()):
    """A step of a prepared TRL trainer: what its train() does for each, without logging and callbacks.

    Args: steps: as for Way, made as the trainer makes them. metrics: which of those that it logs to return.
    """
    model, optimizer, args = trainer.model_wrapped, trainer.optimizer, trainer.args

    def switch():
        switch_checkpointing(trainer.model, gradient_checkpointing)
        torch._dynamo.config.fail_on_recompile_limit_hit = False  # as TRL has it; ours sets it

    def step(micro_batches):
        inputs, num_items = trainer.get_batch_samples(iter(micro_batches), len(micro_batches), args.device)
        trainer.current_gradient_accumulation_steps = len(inputs)
        loss = sum(trainer.training_step(model, batch, num_items).item() for batch in inputs)
        grad_norm = trainer.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
        optimizer.step()
        model.zero_grad()
        logged = {name: trainer._metrics["train"][name][-1] for name in metrics}
        return {"loss": loss, "grad_norm": grad_norm, **logged}

    # In a list of modules, whose forward nobody calls: the meter would take a reference's forward, which TRL
    # runs between the policy's forward and backward, for the beginning of another step.
    reference = getattr(trainer, "ref_model", None)
    others = (torch.nn.ModuleList([reference]),) if reference is not None else ()
    return Way(trainer.model, optimizer.optimizer, step, steps, others=others, switch=switch)


def quiet():
    """Leave out the libraries' progress bars and notes."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
