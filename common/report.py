"""What a run shows and leaves behind: a progress bar, metrics.jsonl, summary.json and a last page on the
screen.
"""

import json
import platform
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
        tqdm.write(f"step {metrics['step']}: eval_loss {metrics['eval_loss']:.4f}")
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
