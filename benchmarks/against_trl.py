"""What the comparisons with TRL share: a step of either side as a function, its bytes, and the table.

The learning rate is 0: each step does all of its work, the optimizer's included, and leaves the weights as
they were. So every step of every way sees the same weights, and losses and gradient norms can be compared.
"""

import gc
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from harness import alternate, case, count_warm_ups, ratio, synchronize
from transformers import logging
from transformers.utils import is_flash_attn_2_available

from common.memory import MemoryMeter

MIB = 2**20
TIMES = ("seconds", "real_tokens_per_second")  # what a step measures besides its results


@dataclass
class Way:
    """One way to take an optimizer step, ready to run.

    step: function of a list of micro-batches (dicts of tensors) that takes a whole optimizer step on them and
    returns {"loss": .., "grad_norm": ..}. batches: the micro-batches of each step, as `plan_steps` orders
    them.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable
    batches: list
    offload: object = None  # an OffloadActivations
    others: list = field(default_factory=list)  # further models that run in a step


def trl_attention(options):
    """What TRL recommends where it can run, and transformers' own choice where it cannot."""
    flash = options.device == "cuda" and options.dtype == "bf16" and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "sdpa"


def trl_options(options, scratch, **settings):
    """Settings of a TRL configuration that a comparison needs; what is left out keeps TRL's default."""
    return {
        "output_dir": str(scratch),
        "bf16": options.dtype == "bf16",
        "use_cpu": options.device == "cpu",
        "learning_rate": 0.0,
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }


def prepare(trainer):
    """What a trainer's train() does before its first step: optimizer, device, autocast."""
    trainer.create_optimizer()
    prepared = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped, trainer.optimizer = prepared
    return trainer


def trl_way(trainer, batches, gradient_checkpointing=True, metrics=()):
    """A step of a prepared TRL trainer: what its train() does for each, without logging and callbacks.

    Args: batches: as for Way, made as the trainer makes them. metrics: which of those that it logs to return.
    """
    model, optimizer, args = trainer.model_wrapped, trainer.optimizer, trainer.args

    def step(micro_batches):
        checkpoint_layers(trainer.model, gradient_checkpointing)
        inputs = map(dict, micro_batches)  # copies: TRL adds keys to its inputs
        inputs, num_items = trainer.get_batch_samples(inputs, len(micro_batches), args.device)
        trainer.current_gradient_accumulation_steps = len(inputs)
        loss = 0.0
        for batch in inputs:
            loss += trainer.training_step(model, batch, num_items).item()
        grad_norm = trainer.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
        optimizer.step()
        model.zero_grad()
        logged = {name: trainer._metrics["train"][name][-1] for name in metrics}
        return {"loss": loss, "grad_norm": grad_norm, **logged}

    # In a list of modules, whose forward nobody calls: the meter would take a reference's forward, which TRL
    # runs between the policy's forward and backward, for the beginning of another step.
    reference = getattr(trainer, "ref_model", None)
    others = [torch.nn.ModuleList([reference])] if reference is not None else []
    return Way(trainer.model, optimizer.optimizer, step, batches, others=others)


def checkpoint_layers(model, wanted):
    """Switch gradient checkpointing, for the ways that share a model."""
    if wanted:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def count_tokens(micro_batches):
    return sum(batch["input_ids"].numel() for batch in micro_batches)


def count_bytes(way, number, device):
    """Peak bytes of the way's step of that number, and what they consist of."""
    if device == "cuda":
        way.step(way.batches[0])  # makes the optimizer's states, and what kernels keep for their work
    elif not way.optimizer.state:  # a step of zeros makes them, as big as they will be
        for parameter in way.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        way.optimizer.step()
        way.optimizer.zero_grad()
    largest = way.batches[number]
    meter = MemoryMeter(way.model, way.optimizer, torch.device(device), True, 1, way.offload, way.others)
    with meter.step(largest):
        way.step(largest)
    # TRL computes its loss outside of the head's module: what the meter reads there is 0
    measured = {name: count for name, count in meter.measured.items() if count}
    peak_bytes = measured.pop("peak")
    return {"peak_bytes": peak_bytes, "bytes": measured, "tokens_in_peak_step": count_tokens(largest)}


def free(ways):
    """Give the memory of the ways back. MemTracker's hooks keep the tensors themselves alive."""
    for way in ways.values():
        states = [v for state in way.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        others = (p for module in way.others for p in module.parameters())
        for tensor in (*way.model.parameters(), *states, *others):
            if hasattr(tensor, "to_local"):
                tensor.detach().to_local().untyped_storage().resize_(0)
            else:
                tensor.data = tensor.new_empty(0)
    ways.clear()
    release()


def release():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(name, setup, sides, real_tokens, options, pairs):
    """Count the bytes of one step in each way, the one that is there for it or else the largest; then time
    all ways in turn.

    Args:    sides: functions that make {name: Way} of ways that share one model and optimizer; real_tokens:
             of each step, as `plan_steps` orders them; pairs: [(way, baseline), ..] whose ratios are wanted.
    Returns: a case for harness.write, with ratios.
    """
    once, ways, warm_up = {}, {}, count_warm_ups(options)
    timed = slice(warm_up, warm_up + count_repeats(options))
    counted = count_in_step(real_tokens, timed)
    release()
    for side in sides:
        made = side()
        for way, ready in made.items():
            once[way] = count_bytes(ready, counted, options.device)
            once[way]["tokens_computed"] = sum(map(count_tokens, ready.batches[timed]))
            once[way]["real_tokens"] = sum(real_tokens[timed])
        if options.device == "cuda":  # or the allocator would count one side's models in another's peak
            free(made)
        ways |= made
    if options.device == "cuda":
        ways = {way: ready for side in sides for way, ready in side().items()}
    steps = {way: timed_step(ready, real_tokens, options.device) for way, ready in ways.items()}
    found = case(name, setup, alternate(steps, count_repeats(options), options.device, warm_up), once)
    free(ways)
    found["ratios"] = {}
    for way, baseline in pairs:
        peaks = [found["ways"][n]["peak_bytes"] for n in (way, baseline)]
        quotient = {"seconds": ratio(found, way, baseline), "peak_bytes": peaks[0] / peaks[1]}
        found["ratios"][f"{way} against {baseline}"] = quotient
    results = [name for name in found["ways"][way]["median"] if name not in TIMES]
    found["disagreement"] = {name: disagreement(found, name) for name in results}
    return found


def count_in_step(real_tokens, timed):
    """Number of the step whose bytes are counted: the one behind the timed ones, or the largest."""
    if len(real_tokens) > timed.stop:
        return timed.stop
    return max(range(len(real_tokens)), key=lambda number: real_tokens[number])


def timed_step(way, real_tokens, device):
    numbers = itertools.count()

    def run():
        number = next(numbers)
        started = time.perf_counter()
        result = way.step(way.batches[number])
        synchronize(device)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "real_tokens_per_second": real_tokens[number] / seconds, **result}

    return run


def disagreement(found, measure):
    """Over all steps, the largest difference between any two ways, relative to the step's largest value."""
    steps = zip(*([run[measure] for run in way["repetitions"]] for way in found["ways"].values()))
    return max((max(values) - min(values)) / max(*map(abs, values), 1e-30) for values in steps)


def choose(path, num_examples, examine, scratch):
    """Draw that many of the data's examples at random, among those that `examine` takes, into a file.

    Args:    examine: function of an example, returning it, perhaps rewritten, and its number of tokens; or
             None to leave it out.
    Returns: the file's name; the examples' numbers of tokens.
    """
    lines = Path(path).read_text().splitlines()
    drawn = (examine(json.loads(lines[i])) for i in np.random.default_rng(0).permutation(len(lines)))
    chosen = list(itertools.islice(filter(None, drawn), num_examples))
    if len(chosen) < num_examples:
        raise ValueError(f"{path} has {len(chosen)} examples that fit, and {num_examples} are needed.")
    file = Path(scratch) / "examples.jsonl"
    file.write_text("".join(json.dumps(example) + "\n" for example, _ in chosen))
    return str(file), [num_tokens for _, num_tokens in chosen]


def plan_steps(options, size, for_bytes=None):
    """Numbers of the examples of each step: warm-ups first, then those that are timed.

    Args: for_bytes: examples of one more step, the last, whose bytes alone are counted.
    """
    counts = [size] * (count_warm_ups(options) + count_repeats(options))
    counts += [for_bytes] if for_bytes else []
    return [list(range(end - n, end)) for n, end in zip(counts, itertools.accumulate(counts))]


def step_sizes(sizes, given, options):
    """Examples of a timed step, and of the one whose bytes are counted, or None if it is a timed one.

    A step that is timed often has to be so small on a CPU that weights and optimizer hide all else.
    """
    counts_another = options.device == "cpu" and not options.quick and not given
    return given or sizes[options.device], sizes["bytes"] if counts_another else None


def count_repeats(options):
    return options.repeats or (2 if options.quick else 3)


def chosen_cases(cases, options):
    """Those of --only, or all; with --quick, or without $BENCH_DATA, the demo's data in their place.

    Args: cases: {name: what `step_sizes` takes}.
    """
    if options.quick or not os.environ.get("BENCH_DATA"):
        return {"demo": next(iter(cases.values()))}
    if options.only and options.only not in cases:
        raise ValueError(f"--only {options.only}: choose one of {', '.join(cases)}.")
    return {name: sizes for name, sizes in cases.items() if options.only in ("", name)}


def quiet():
    """Leave out the libraries' progress bars and notes."""
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def show(found):
    """The table of one case."""
    setup = "  ".join(f"{key} {value}" for key, value in found["setup"].items())
    print(f"\n{found['case']}: {setup}")
    print(f"{'way':<36}{'seconds':>9}{'real tok/s':>12}{'peak MiB':>10}{'loss':>12}{'grad norm':>11}")
    for way, values in found["ways"].items():
        median = values["median"]
        print(
            f"{way:<36}{median['seconds']:9.3f}{median['real_tokens_per_second']:12.1f}"
            f"{values['peak_bytes'] / MIB:10.1f}{median['loss']:12.6f}{median['grad_norm']:11.4f}"
        )
    for pair, values in found["ratios"].items():
        r = values["seconds"]
        spread = f"{r['median']:5.2f} x faster ({r['min']:.2f} to {r['max']:.2f}, {r['pairs']} pairs)"
        print(f"  {pair:<60}{spread}; {values['peak_bytes']:.2f} of its peak bytes")
    worst = "  ".join(f"{measure} {value:.1e}" for measure, value in found["disagreement"].items())
    print(f"  largest relative difference between two ways in one step: {worst}")
