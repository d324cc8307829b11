"""What all benchmarks share: a command line, a model and data by name, a script's run, turns, bytes and JSON.

What is compared runs in one process. Bytes are counted first, in a step of their own, for counting slows it
down. Then all ways take turns, A B A B .., so that quotients pair by pair hold where the machine's speed
drifts. The learning rate is 0: each step does all of its work and leaves the weights as they were, so that
losses and gradients of all ways can be compared.
"""

import argparse
import datetime
import gc
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from cases import RESULTS, case
from tables import TABLES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sft_packing  # noqa: E402
from common.collators import add_scored, flatten, pad  # noqa: E402
from common.memory import count_step  # noqa: E402
from common.run import Run  # noqa: E402
from common.sharding import set_kernels, wrap_layers  # noqa: E402

GIB = 2**30
PACKAGES = ("torch", "transformers", "trl", "deepspeed", "liger-kernel", "flash-attn", "accelerate", "numpy")

# --- The command line ---


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
    if options.results is None:  # the tables' numbers are not those of a quick run
        options.results = ROOT / "outputs/bench-quick" if options.quick else RESULTS
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a script's run would take the GPU
    elif not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU.")
    options.repeats = options.repeats or (2 if options.quick else 3)
    # On a GPU a step that is not timed, in which the allocator asks for memory; on a CPU counting is enough.
    options.warm_up = int(options.device == "cuda")
    options.commit = commit()  # of the code that is loaded by now
    return options


# --- Models and data ---

SHARED = {"tie_word_embeddings": True}
QWEN3 = SHARED | {"vocab_size": 151936, "num_hidden_layers": 28, "num_attention_heads": 16}
QWEN3 |= {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
SMOLLM2 = SHARED | {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
SMOLLM2 |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
SHAPES = {
    "SmolLM2-135M": ("llama", SMOLLM2 | {"max_position_embeddings": 8192}),
    "Qwen3-0.6B": ("qwen3", QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072}),
    "Qwen3-1.7B": ("qwen3", QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144}),
}


def random_model(shape, folder, device="cpu", tokenizer=ROOT / "demo/model", **changes):
    """Write random bf16 weights of one of SHAPES, or of a configuration, and a tokenizer. Returns the folder.

    Args: changes: fields of the configuration that are to be others.
    """
    if isinstance(shape, str):
        family, fields = SHAPES[shape]
        shape = AutoConfig.for_model(family, **fields | changes)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def model_folder(options, scratch):
    """Folder of the model to measure with.

    --quick: the demo's. $BENCH_MODEL: a local folder; of one without weights, the configuration and the
    tokenizer, with random weights written into `scratch`. Otherwise random weights in SmolLM2-135M's shape,
    on CUDA in Qwen3-0.6B's, with the demo's tokenizer: the same work for each token, other token counts.
    """
    scratch, device = Path(scratch), options.device
    if options.quick:
        return ROOT / "demo/model"
    if named := os.environ.get("BENCH_MODEL"):
        if list(Path(named).glob("*.safetensors")):
            return Path(named)
        config = AutoConfig.from_pretrained(named)
        return random_model(config, scratch / f"random-{Path(named).name}", device, named)
    shape = getattr(options, "shape", "") or ("Qwen3-0.6B" if device == "cuda" else "SmolLM2-135M")
    return random_model(shape, scratch / f"random-{shape}", device)


def data_file(name, options, demo):
    """$BENCH_DATA/<name>.jsonl; with --quick, or without that folder, the demo's file `demo`."""
    folder = os.environ.get("BENCH_DATA")
    return ROOT / "demo" / demo if options.quick or not folder else Path(folder) / f"{name}.jsonl"


def random_rows(what, count=4000, longest=3000):
    """Rows of random letters, whose numbers are lognormal as those of real documents are, for a GPU without
    data beside it. what: "sft", or else conversations with a prompt, a chosen and a rejected answer.
    """
    rng = np.random.default_rng(0)

    def message(role, median):
        size = int(min(longest, 1 + rng.lognormal(math.log(median))))
        return [{"role": role, "content": bytes(rng.integers(97, 123, size).tolist()).decode()}]

    if what == "sft":
        return [{"messages": message("user", 40) + message("assistant", 400)} for _ in range(count)]
    sizes = {"prompt": ("user", 300), "chosen": ("assistant", 150), "rejected": ("assistant", 150)}
    return [{name: message(*size) for name, size in sizes.items()} for _ in range(count)]


def random_batch(lengths, vocabulary=1000, flat=True):
    """Random documents of these lengths, every token scored: a flat row of them, or a padded batch."""
    ids = [torch.randint(0, vocabulary, (length,)).tolist() for length in lengths]
    documents = [{"input_ids": x, "labels": x} for x in ids]
    return add_scored(flatten(documents) if flat else pad(documents, 0))


# --- A script's run ---


@contextmanager
def script_run(script, options, model=model_folder, **flags):
    """A run of one of the scripts in a folder that goes afterwards, as its own `main` would begin it.

    Args:   model: function of options and a folder that makes the model; flags: of the script.
    Yields: the folder; the script's Arguments; a Run.
    """
    with tempfile.TemporaryDirectory() as scratch:
        args = script.Arguments(
            model_name_or_path=str(model(options, scratch)),
            output_dir=f"{scratch}/run",
            learning_rate=0.0,
            collective_timeout_s=1e6,  # a benchmark says nothing of its phases
            **flags,
        )
        with Run(args, script.__name__) as run:
            yield Path(scratch), args, run


@dataclass
class Way:
    """One way to take an optimizer step, ready to run.

    step: function of a list of micro-batches (dicts of tensors) that takes a whole optimizer step and returns
    {"loss": .., "grad_norm": ..}. steps: the micro-batches of the step whose bytes are counted, and then of
    those that are timed, warm-ups first. others: further models that run in a step. switch: lets models that
    ways share compute as this one does, before the clock starts.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable
    steps: list
    offload: object = None  # an OffloadActivations
    others: tuple = ()
    switch: Callable = lambda: None

    def take(self, number):
        return self.step([dict(batch) for batch in self.steps[number]])  # copies: a step may add keys

    def count_bytes(self, device):
        """Peak bytes of the first step, and what they consist of."""
        self.switch()
        if device == "cuda":
            self.take(0)  # makes what kernels keep for their work
        step, first = partial(self.take, 0), self.steps[0]
        measured, _ = count_step(step, first, self.model, self.optimizer, self.offload, self.others)
        # TRL computes its loss outside of the head's module: what the meter reads there is 0
        measured = {name: count for name, count in measured.items() if count}
        peak_bytes, tokens = measured.pop("peak"), sum(batch["input_ids"].numel() for batch in first)
        return {"peak_bytes": peak_bytes, "bytes": measured, "tokens_in_peak_step": tokens}


def use(model, args, flat):
    """Let a model that several ways share compute as one of them does."""
    layers = (args.gradient_checkpointing, args.torch_compile)
    wanted = (*layers, args.attn_implementation, flat)
    if getattr(model, "used", None) != wanted:
        wrap_layers(model, *layers)
        set_kernels(model, args, flat)
        model.used = wanted


def sft_way(args, run, model, optimizer, steps):
    """sft_packing.py's own step, as these Arguments have it."""
    offload = sft_packing.prepare_training(model, args, run)[1]

    def step(batches):
        return sft_packing.train_step(model, optimizer, batches, args, run, offload)[1]

    switch = partial(use, model, args, sft_packing.is_flat(args))
    return Way(model, optimizer, step, steps, offload, switch=switch)


# --- Measuring ---

left_out = []  # what went wrong, for the exit code


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def alternate(ways, repeats, device="cpu", warm_up=1, switches=None):
    """Run each way in turn, `repeats` times after the warm-up.

    Args:    ways: {name: function without arguments, returning a dict of what else it measured, or None}.
             switches: {name: function}: what a way needs before its time is taken.
    Returns: {name: [{"seconds": .., **measured}, ..]}, the repetitions in their order.
    """
    repetitions = {name: [] for name in ways}
    for count in range(warm_up + repeats):
        for name, way in ways.items():
            if switches:
                switches[name]()
            synchronize(device)
            started = time.perf_counter()
            measured = way() or {}
            synchronize(device)
            if count >= warm_up:
                repetitions[name].append({"seconds": time.perf_counter() - started, **measured})
    return repetitions


def measure(name, setup, sides, options, real_tokens=None, mfu=False):
    """Count the bytes of a step of each way, then time all ways in turn, on the same data in each turn.

    Args:    sides: functions that make {name: Way}, of ways that share a model and an optimizer; real_tokens:
             of the data, in each of a Way's steps. mfu: whether to say how much of the GPU's bf16 speed is
             used, 6 operations for each weight and token of the data (a token that is computed once).
    Returns: a case for `write`; a way that cannot run (out of memory, say) is left out, and said.
    """
    once, ways = {}, {}

    def leave_out(what):
        left_out.append(f"{name}, {what}")
        print(f"{left_out[-1]}: left out", file=sys.stderr)
        traceback.print_exc(limit=-3)

    for side in sides:
        # on CUDA, the models of sides made before are in the allocator's count
        others = torch.cuda.memory_allocated() if options.device == "cuda" else 0
        try:
            made = side()
        except Exception:
            leave_out("a whole side")
            continue
        for way, ready in made.items():
            try:
                once[way] = ready.count_bytes(options.device)
                once[way]["peak_bytes"] -= others
                ways[way] = ready
            except Exception:
                leave_out(way)
                ready.optimizer.zero_grad()
    steps, flops = {}, 0
    if options.device == "cuda" and mfu and options.dtype == "bf16":
        setup["peak_tflops"] = round(peak_flops() / 1e12)
        flops = 6 * sum(p.numel() for p in next(iter(ways.values())).model.parameters())
    for way, ready in ways.items():
        numbers = itertools.count(1)
        steps[way] = lambda ready=ready, numbers=numbers: ready.take(next(numbers))
    switches = {way: ready.switch for way, ready in ways.items()}
    runs = alternate(steps, options.repeats, options.device, options.warm_up, switches)
    for repetitions in runs.values():
        for repetition, tokens in zip(repetitions, (real_tokens or [])[-options.repeats :]):
            speed = repetition["real_tokens_per_second"] = tokens / repetition["seconds"]
            if flops:
                repetition["mfu"] = flops * speed / (setup["peak_tflops"] * 1e12)
    steps.clear()
    switches.clear()
    free(ways)
    found = case(name, setup, runs, once)
    results = sorted(next(iter(runs.values()))[0].keys() - {"seconds", "real_tokens_per_second", "mfu"})
    return found | {"disagreement": {each: disagreement(runs, each) for each in results}}


def peak_flops(size=8192, repeats=20):
    """Operations per second of a bf16 matrix product: what model FLOP utilisation is measured against."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for count in (3, repeats):
        synchronize("cuda")
        started = time.perf_counter()
        for _ in range(count):
            a @ b
        synchronize("cuda")
    return repeats * 2 * size**3 / (time.perf_counter() - started)


def disagreement(runs, measure):
    """Over all steps, the largest difference between any two ways, relative to the step's largest value."""
    steps = zip(*([run[measure] for run in repetitions] for repetitions in runs.values()))
    return max((max(values) - min(values)) / max(*map(abs, values), 1e-30) for values in steps)


def free(ways):
    """Give back what the ways hold. Hooks of FSDP2 and of the byte counter keep a model, and its weights."""
    for way in ways.values():
        way.optimizer.zero_grad()
        way.optimizer.state.clear()
        for module in filter(None, (way.model, *way.others)):
            for weight in module.parameters():
                if hasattr(weight, "to_local"):
                    weight.detach().to_local().untyped_storage().resize_(0)
                else:
                    weight.data = weight.new_empty(0)
    ways.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- What a JSON file says of its making ---


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
    """The commit that was measured, with "+changes" where files differ from it (results and pages aside).

    $BENCH_COMMIT says it where the files came without their repository.
    """
    if given := os.environ.get("BENCH_COMMIT"):
        return given
    others = ("benchmarks/results", "benchmarks/figures", "*.md")

    def git(*words):
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", *(f":!{path}" for path in others))
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(what, options, model, cases, reads=("BENCH_MODEL", "BENCH_DATA")):
    """Write results/<what>-<device>.json (with --quick, <what>-quick.json): everything a reader would need to
    repeat or doubt it. Prints it as its table.

    Args: model: its name or folder; cases: list of `case`s; reads: variables of the environment that choose
          model and data.
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
        "commit": options.commit,
        "command": " ".join([*given, launcher, f"benchmarks/{Path(sys.argv[0]).name}", *flags]),
        "date": datetime.date.today().isoformat(),
        "model": model and ("demo model" if Path(model) == ROOT / "demo/model" else Path(model).name),
        "cases": cases,
    }
    path = options.results / f"{what}-{'quick' if options.quick else options.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(TABLES[what]({(what, options.device): document}))
    print(f"wrote {path}", file=sys.stderr)
    if left_out:
        sys.exit("left out: " + "; ".join(left_out))
