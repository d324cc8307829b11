"""What a run shows and leaves behind: a progress bar, metrics.jsonl, summary.json and a last page on the
screen.
"""

import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
import transformers
from tqdm import tqdm


def write_metrics(metrics, output_dir, bar, every):
    """Append one step's metrics to metrics.jsonl, and show them on the progress bar every so many steps."""
    with open(Path(output_dir) / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
    bar.update()
    if "eval_loss" in metrics:
        evaluated = {name: value for name, value in metrics.items() if name.startswith("eval_")}
        values = "  ".join(f"{name} {value:.4f}" for name, value in evaluated.items())
        tqdm.write(f"step {metrics['step']}: {values}")
    if metrics["step"] % every == 0:
        loss, speed = f"{metrics['loss']:.4f}", f"{metrics['tokens_per_second']:.0f}"
        bar.set_postfix(
            {"loss": loss, "tok/s": speed, "mem": f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB"}
        )


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"


def versions():
    modules = {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
    return {"python": platform.python_version(), **modules}


def bold(text):
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text


# counts of examples that are cut or left out, of all three scripts
LOST = ("examples_truncated", "examples_dropped", "examples_unscored", "examples_equal")
LOST += ("prompts_truncated", "completions_truncated")


def describe_start(args, data, total_steps):
    """Lines for the screen before the first step: what of the data is cut or left out, in bold where it is
    more than a tenth; columns that nobody reads; a warm-up that the run does not outlast.
    """
    read, parts = data["examples_read"], [f"{data['examples_read']} read"]
    for name in LOST:
        if data.get(name):
            share = data[name] / read / (2 if name.startswith("completions") else 1)  # of a pair, two
            part = f"{name.replace('examples_', '').replace('_', ' ')} {data[name]} ({share:.1%})"
            parts.append(bold(part) if share > 0.1 else part)
    limits = [name for name in vars(args) if name.startswith("max_") and name.endswith("_length")]
    limits = "  ".join(f"--{name} {getattr(args, name)}" for name in limits if getattr(args, name))
    lines = [f"examples  {', '.join(parts)}; {limits}"]
    if data["columns_unused"]:
        lines.append(f"columns   not used: {', '.join(data['columns_unused'])}")
    if args.warmup_steps and args.warmup_steps >= total_steps:
        lines.append(
            bold(
                f"schedule  --warmup_steps {args.warmup_steps}, and {total_steps} steps in all: the learning "
                f"rate never reaches {args.learning_rate:g}"
            )
        )
    return "\n".join(lines)


def describe_data(data, max_length):
    """Two lines about what became of the examples."""
    examples = "  ".join(
        f"{k.removeprefix('examples_')} {v}" for k, v in data.items() if k.startswith("examples_")
    )
    tokens = "  ".join(f"{k.removeprefix('tokens_')} {v}" for k, v in data.items() if k.startswith("tokens_"))
    return (
        f"examples  {examples}; tokens  {tokens}\n"
        f"rows      {data['rows']}, filled {data['fill_fraction']:.1%} of max_length {max_length}; "
        f"padding {data['padding_fraction']:.1%} of the tokens computed"
    )


def describe_pairs(data):
    """Three lines about what became of the pairs."""
    groups = {"examples_": "", "tokens_": ""}
    for group in groups:
        groups[group] = "  ".join(
            f"{k.removeprefix(group)} {v}" for k, v in data.items() if k.startswith(group)
        )
    cut = (
        "prompts_truncated",
        "prompts_parted",
        "completions_truncated",
        "completions_without_eos",
        "boundaries_moved",
    )
    return (
        f"pairs     {groups['examples_']}; tokens  {groups['tokens_']}\n"
        f"cut       {'  '.join(f'{name} {data[name]}' for name in cut)}\n"
        f"computed  {data['computed_fraction']:.1%} of the pairs' tokens; "
        f"padding {data['padding_fraction']:.1%} of the tokens computed"
    )


def summarize(args, device, world, data, totals, ledger, offloading, metrics):
    """What summary.json holds.

    Args: data: counts of examples, tokens and rows. totals: seconds, tokens (computed) and real_tokens (of
          the data) of the steps that count. ledger: its rows. offloading: memory.traffic's report, or None.
          metrics: of the last step.
    """
    seconds = max(totals["seconds"], 1e-9)
    return {
        "args": asdict(args),
        "versions": versions(),
        "device": device_name(device),
        "world_size": world,
        "data": data,
        "throughput": {
            "tokens_per_second": totals["tokens"] / seconds,
            "real_tokens_per_second": totals["real_tokens"] / seconds,
            "num_tokens": int(totals["tokens"]),
            "seconds": totals["seconds"],
        },
        "ledger": ledger,
        "activation_offloading": offloading,
        "final_metrics": metrics,
    }


def describe_speed(summary):
    computed, real = (summary["throughput"][name] for name in ("tokens_per_second", "real_tokens_per_second"))
    return f"speed     {computed:.0f} tokens/s computed, {real:.0f} tokens/s of the data"


def ledger_title(summary):
    name = Path(summary["args"]["model_name_or_path"]).name
    return f"{name}  {summary['device']}  world {summary['world_size']}"


def format_completions(step, rows, width=100):
    """A table of sampled completions: rows of (prompt, completion, reward), texts cut to about `width`."""

    def shortened(text, length):
        text = " ".join(text.split())
        return text if len(text) <= length else "..." + text[3 - length :]  # the end is what counts

    lines = [f"step {step}  {'prompt':<{width // 2}}  {'completion':<{width // 2}}  reward"]
    margin = " " * len(f"step {step}")
    for prompt, completion, reward in rows:
        texts = "  ".join(f"{shortened(text, width // 2):<{width // 2}}" for text in (prompt, completion))
        lines.append(f"{margin}  {texts}  {reward:6.2f}")
    return "\n".join(lines)


def describe_prompts(data):
    """One line about what became of the prompts."""
    counts = {name: value for name, value in data.items() if name != "columns_unused"}
    return "prompts   " + "  ".join(f"{name} {value}" for name, value in counts.items())


def describe_rewards(output_dir):
    """One line: the mean reward of the first and of the last tenth of the run's rollouts."""
    lines = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in lines]
    part = max(1, len(rewards) // 10)
    first, last = (sum(values) / part for values in (rewards[:part], rewards[-part:]))
    return f"reward    {first:.3f} in the first {part} steps, {last:.3f} in the last {part}"


def describe_dry_run(found, gpu_memory_gib):
    """Lines under a dry run's ledger: what single changes save, and what fits. found: dry_run.explore's."""
    lines = ["single changes, at the peak (GiB)"] if found["savings"] else []
    for text, saved in found["savings"].items():
        lines.append(f"{text:<67}{'saves' if saved >= 0 else 'costs'} {abs(saved) / 2**30:10.4f}")
    if found["fits"] is not None:
        verdict, longest = "fits into" if found["fits"] else "does not fit into", found["longest"] or "none"
        lines.append(
            f"{verdict} {gpu_memory_gib:g} GiB; longest --{found['length_flag']} that fits: {longest}"
        )
    lines.append(
        "leave room for what is not counted: CUDA context, NCCL, gaps between the allocator's blocks"
    )
    return "\n".join(lines)
