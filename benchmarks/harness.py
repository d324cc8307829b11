"""What all benchmarks share: a model and data by name, alternating repetitions, and one form of JSON.

Two things are compared in one process, A B A B .., after a run of each that is not timed. What is quoted is
the median of the ratios pair by pair: they hold where the machine's speed drifts. Where bytes are counted, it
is in a run of its own, for counting slows down; it comes first, and on a CPU is the one that is not timed.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cases import RESULTS, case, ratio  # noqa: E402, F401
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    Qwen3Config,
)

PACKAGES = ("torch", "transformers", "trl", "deepspeed", "liger-kernel", "flash-attn", "accelerate", "numpy")


def parse(description, **defaults):
    """The command line of a benchmark: --device, --quick, --repeats, and further flags with defaults."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="the demo's model and data, few repetitions")
    parser.add_argument("--repeats", type=int, help="timed repetitions of each way")
    parser.add_argument("--results", type=Path, help="folder for the JSON; with --quick, outputs/bench-quick")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = parser.parse_args()
    if options.results is None:  # README's numbers are not those of a quick run
        options.results = ROOT / "outputs/bench-quick" if options.quick else RESULTS
    options.commit = commit()  # of the code that is loaded by now
    return options


def qwen3_config(size):
    """The configuration of Qwen3-0.6B or Qwen3-1.7B, which differ in their widths alone."""
    hidden, intermediate = {"0.6B": (1024, 3072), "1.7B": (2048, 6144)}[size]
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )


def smollm2_config():
    """The configuration of SmolLM2-135M."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def save_random(config, folder, device, tokenizer=ROOT / "demo/model"):
    """Write a model with random weights in bf16, and the tokenizer of another folder, into `folder`."""
    torch.manual_seed(0)
    config.dtype = "bfloat16"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def model_folder(options, scratch):
    """Folder of the model to measure with.

    --quick: the demo's. $BENCH_MODEL: a local folder; of one without weights, the configuration and the
    tokenizer, with random weights written into `scratch`. Otherwise random weights in SmolLM2-135M's shape,
    on CUDA in Qwen3-0.6B's, with the demo's tokenizer: the same work for each token, other token counts.
    """
    if options.quick:
        return ROOT / "demo/model"
    if named := os.environ.get("BENCH_MODEL"):
        if not Path(named).is_dir():
            sys.exit(f"BENCH_MODEL {named} is no folder: wanted is one with a model, or a config.json.")
        files = {path.suffix for path in Path(named).iterdir()}
        if ".safetensors" in files:
            return Path(named)
        if files & {".bin", ".pt", ".pth"}:
            sys.exit(f"BENCH_MODEL {named} has weights, but no *.safetensors.")
        config = AutoConfig.from_pretrained(named)
        return save_random(config, Path(scratch) / f"random-{Path(named).name}", options.device, named)
    if options.device == "cuda":
        return save_random(qwen3_config("0.6B"), Path(scratch) / "random-Qwen3-0.6B", "cuda")
    return save_random(smollm2_config(), Path(scratch) / "random-SmolLM2-135M", "cpu")


def tokenizer_folder(options):
    """The folder that model_folder would name, for a benchmark that needs no weights: none are made."""
    named = os.environ.get("BENCH_MODEL")
    return Path(named) if named and not options.quick else ROOT / "demo/model"


def data_file(name, options, demo):
    """$BENCH_DATA/<name>.jsonl; with --quick, or without that folder, the demo's file `demo`."""
    folder = os.environ.get("BENCH_DATA")
    return ROOT / "demo" / demo if options.quick or not folder else Path(folder) / f"{name}.jsonl"


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def count_warm_ups(options):
    """On a GPU one, in which its allocator asks for memory. On a CPU counting a step's bytes is enough."""
    return int(options.device == "cuda")


def alternate(ways, repeats, device="cpu", warm_up=1):
    """Run each way in turn, `repeats` times after the warm-up.

    Args:    ways: {name: function without arguments, returning a dict of what else it measured, or None}.
    Returns: {name: [{"seconds": .., **measured}, ..]}, the repetitions in their order.
    """
    repetitions = {name: [] for name in ways}
    for count in range(warm_up + repeats):
        for name, way in ways.items():
            synchronize(device)
            started = time.perf_counter()
            measured = way() or {}
            synchronize(device)
            if count >= warm_up:
                repetitions[name].append({"seconds": time.perf_counter() - started, **measured})
    return repetitions


def hardware(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            name = line.split(":")[1].strip()
    return f"{name}, {os.cpu_count()} cores"


def installed():
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit():
    """The commit that was measured, with "+changes" where files differ from it (results aside).

    $BENCH_COMMIT says it where the files came without their repository.
    """
    if given := os.environ.get("BENCH_COMMIT"):
        return given
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        paths = ["--", ".", ":!benchmarks/results", ":!benchmarks/figures", ":!README.md"]
        changed = subprocess.run(
            [*git, "status", "--porcelain", *paths], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def write(what, options, model, cases, reads=("BENCH_MODEL", "BENCH_DATA"), complete=True):
    """Write results/<what>-<device>.json (with --quick, <what>-quick.json; with --only, -<only> added):
    everything a reader would need to repeat or doubt it.

    Args: model: its name; cases: list of `case`s, each of which may hold further keys, like "ratios"; reads:
          variables of the environment that choose model and data; complete: whether these are all cases;
          fewer go to a file that ends in .partial, until the whole is there.
    """
    ranks = os.environ.get("WORLD_SIZE")
    launcher = f"OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node {ranks}" if ranks else "python"
    # where the file goes is no part of the measurement
    flags = re.sub(r"--results[ =]\S+", "", " ".join(sys.argv[1:])).split()
    given = [f"{name}=<folder>" for name in reads if os.environ.get(name) and not options.quick]
    document = {
        "what": what,
        "device": options.device,
        "hardware": hardware(options.device),
        "threads": torch.get_num_threads(),
        "versions": installed(),
        "commit": getattr(options, "commit", None) or commit(),
        "command": " ".join([*given, launcher, f"benchmarks/{Path(sys.argv[0]).name}", *flags]),
        "date": datetime.date.today().isoformat(),
        "model": (Path(model).name if model != ROOT / "demo/model" else "demo model") if model else None,
        "cases": cases,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    only = f"-{options.only}" if getattr(options, "only", "") else ""  # beside the whole, not over it
    path = options.results / f"{what}-{'quick' if options.quick else options.device}{only}.json"
    partial = path.with_suffix(".partial")
    path = path if complete else partial
    path.write_text(json.dumps(document, indent=1) + "\n")
    if complete:
        partial.unlink(missing_ok=True)
    print(f"wrote {path}", file=sys.stderr)
    return document
