"""What surrounds any training loop: flags, ranks, the output folder, progress, metrics, the last page.

A script's `main` opens a `Run`, asks it where to go on, and tells it of each step. Nothing here knows what a
step computes.
"""

import difflib
import faulthandler
import importlib
import importlib.util
import itertools
import json
import math
import operator
import os
import platform
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, get_args, get_origin

import datasets
import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm
from transformers import HfArgumentParser, get_scheduler

from common import Refusal, refuse, wrapped
from common.folders import (
    PROGRESS,
    check_output_dir,
    commit_folder,
    disk_errors_refused,
    find_checkpoint,
    fresh_folder,
    prepare_output_dir,
    rotate_checkpoints,
)
from common.memory import GIB, format_ledger, peak_memory_bytes
from common.plot import draw

ROOT = Path(__file__).resolve().parents[1]

# --- Arguments ---


def flag(default, text, group="technique", **bounds):
    """A field of a script's Arguments: its default, its line in --help, and bounds as in BOUNDS."""
    return field(default=default, metadata={"help": text, "group": group, **bounds})


BOUNDS = {"at_least": operator.ge, "above": operator.gt, "below": operator.lt, "at_most": operator.le}
DATA, TRAINING, MEMORY, FILES, DRY_RUN = (
    "model and data",
    "training",
    "memory",
    "progress and files",
    "dry run",
)


@dataclass
class RunArguments:
    """The flags that all three scripts share; a script's own class gives other defaults where it has to."""

    model_name_or_path: str = flag(str(ROOT / "demo/model"), "Hub name or folder of a causal LM", DATA)
    dataset_name: str = flag("", "Hub name, file, or folder written by save_to_disk", DATA)
    dataset_train_split: str = flag("train", "split of a Hub dataset to train on", DATA)
    eval_dataset_name: str | None = flag(None, "dataset for evaluation, named like dataset_name", DATA)
    dataset_test_split: str = flag("test", "split of a Hub dataset to evaluate on", DATA)
    dataset_num_proc: int | None = flag(None, "processes that tokenise", DATA, at_least=1)

    learning_rate: float = flag(1e-4, "peak of the schedule", TRAINING, at_least=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = flag(
        "linear", "how the learning rate decays", TRAINING
    )
    warmup_steps: int = flag(0, "steps of linear warm-up", TRAINING, at_least=0)
    weight_decay: float = flag(
        0.0, "AdamW's, of matrices: norms and biases do not decay", TRAINING, at_least=0
    )
    max_grad_norm: float = flag(
        1.0, "clip the global gradient norm to this; 0 = no clipping", TRAINING, at_least=0
    )
    num_train_epochs: float = flag(1.0, "passes over the data", TRAINING, above=0)
    max_steps: int = flag(-1, "optimizer steps, overriding num_train_epochs; -1 = off", TRAINING, at_least=-1)
    seed: int = flag(0, "order of the data, and what is drawn", TRAINING, at_least=0)

    gradient_checkpointing: bool = flag(True, "keep layers' inputs only; compute the rest again", MEMORY)
    bf16: bool = flag(False, "compute in bfloat16; gradients and optimizer states stay in fp32", MEMORY)
    torch_compile: bool = flag(
        False, "compile the decoder layers: faster on a GPU, after a minute or so at the start", MEMORY
    )
    activation_offloading: bool = flag(False, "activations wait for backward in the host's memory", MEMORY)
    offload_param: bool = flag(
        False, "weights, gradients and optimizer states wait in the host's memory, where AdamW runs", MEMORY
    )
    use_liger_kernel: bool = flag(False, "Liger's rotary embedding, norms and gated MLP, on a GPU", MEMORY)
    loss_chunk_size: int | None = flag(
        None,
        "tokens per chunk of the loss head; default: 320 MiB of logits (on a CPU 48)",
        MEMORY,
        at_least=1,
    )

    report_to: str = flag("none", "tensorboard, wandb, trackio; or several, a,b", FILES)
    output_dir: str = flag("", "folder for model, checkpoints, metrics.jsonl and summary.json", FILES)
    overwrite_output_dir: bool = flag(False, "replace the run that output_dir holds", FILES)
    logging_steps: int = flag(
        1, "refresh the bar every so many steps; metrics.jsonl has each", FILES, at_least=1
    )
    save_steps: int | None = flag(
        None, "steps between checkpoints; None = only when stopped", FILES, at_least=1
    )
    save_total_limit: int | None = flag(
        None, "newest checkpoints that are kept; None = all", FILES, at_least=1
    )
    resume_from_checkpoint: str | None = flag(None, "path of a folder checkpoint-<step>, or latest", FILES)
    eval_steps: int | None = flag(
        None, "evaluate every so many steps as well as at the end", FILES, at_least=1
    )
    check_exact: bool = flag(
        True, "prove on a few tokens that this run computes what transformers does", FILES
    )
    collective_timeout_s: float = flag(
        3600.0, "end a run in which nothing has moved for so many seconds", FILES, above=0, below=1e9
    )

    dry_run: bool = flag(False, "do not train: count the bytes of one step, from the configuration", DRY_RUN)
    dry_run_world_size: int = flag(1, "the number of ranks to count for", DRY_RUN, at_least=1)
    gpu_memory_gib: float | None = flag(None, "say what fits into so many GiB", DRY_RUN, above=0)


def choices(hint):
    """The values of a Literal, also of one or None; () for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(value for part in get_args(hint) for value in choices(part))


def check_run_arguments(args):
    """Raise Refusal for a value outside its flag's bounds, and for shared flags that contradict others."""
    for each in fields(args):
        value, bounds = getattr(args, each.name), {n: each.metadata[n] for n in BOUNDS if n in each.metadata}
        if value is None:
            continue
        options = choices(each.type)
        unknown = options and value not in options
        refuse(unknown, f"--{each.name} is {value!r}; choose one of {', '.join(map(str, options))}.")
        if bounds and not (math.isfinite(value) and all(BOUNDS[n](value, at) for n, at in bounds.items())):
            wanted = " and ".join(f"{n.replace('_', ' ')} {at}" for n, at in bounds.items())
            raise Refusal(f"--{each.name} is {value}; it must be finite, and {wanted}.")
    check_trackers(args.report_to)
    refuse(args.max_steps == 0, "--max_steps 0: give a number >= 1, or -1 for num_train_epochs.")
    refuse(args.eval_steps and not args.eval_dataset_name, "--eval_steps needs --eval_dataset_name.")
    constant = args.warmup_steps and args.lr_scheduler_type == "constant"
    refuse(constant, f"--warmup_steps {args.warmup_steps} needs --lr_scheduler_type constant_with_warmup.")
    both = args.overwrite_output_dir and args.resume_from_checkpoint
    refuse(both, "--overwrite_output_dir removes what --resume_from_checkpoint needs: drop one of the two.")
    counts = args.dry_run_world_size > 1 or args.gpu_memory_gib is not None
    alone = "--dry_run_world_size and --gpu_memory_gib say what to count: add --dry_run."
    refuse(counts and not args.dry_run, alone)
    compiled = "--dry_run cannot look into compiled layers: drop --torch_compile."
    refuse(args.dry_run and args.torch_compile, compiled)
    both = args.torch_compile and args.use_liger_kernel
    refuse(both, "--torch_compile cannot compile what --use_liger_kernel has patched: drop one of the two.")
    triton = args.dry_run and args.use_liger_kernel
    refuse(triton, "--dry_run cannot look into Triton's kernels: drop --use_liger_kernel.")
    launched = args.dry_run and int(os.environ.get("WORLD_SIZE", 1)) > 1
    refuse(launched, "--dry_run is one process: start it with python; --dry_run_world_size names the ranks.")


class Parser(HfArgumentParser):
    """Shows the flags in their groups; transformers' own would hand a field's bounds on to argparse."""

    def _parse_dataclass_field(self, parser, each):
        title = each.metadata["group"]
        known = {group.title: group for group in self._action_groups}
        signs = {"at_least": ">=", "above": ">", "below": "<", "at_most": "<="}
        bounds = [f"{signs[name]} {each.metadata[name]}" for name in BOUNDS if name in each.metadata]
        text = each.metadata["help"] + (f" ({', '.join(bounds)})" if bounds else "")
        bare = field(default=each.default, metadata={"help": text})
        bare.name, bare.type = each.name, each.type
        section = known.get(title) or self.add_argument_group(title)
        super()._parse_dataclass_field(section, bare)
        switch = section._group_actions[-1]
        if switch.option_strings[0] == f"--no_{each.name}":
            switch.help = f"turn --{each.name} off"


def parse_arguments(arguments_class, words):
    """Command-line words -> an instance of arguments_class.

    --local_rank, which DeepSpeed's launcher adds, is ignored: the environment says the same.
    """
    ours = [word for word in words if not word.startswith(("--local_rank", "--local-rank"))]
    args, unknown = Parser(
        arguments_class, usage="%(prog)s [flags]", allow_abbrev=False
    ).parse_args_into_dataclasses(ours, return_remaining_strings=True)
    flags = [f"--{each.name}" for each in fields(arguments_class)]
    near = [close for word in unknown for close in difflib.get_close_matches(word, flags, 1)]
    meant = f"did you mean {' '.join(near)}?" if near else "--help lists those that there are."
    refuse(unknown, f"unknown arguments: {' '.join(unknown)}; {meant}")
    return args


def run_script(main, arguments_class):
    """main(args) with what the command line says; a refusal, or a loss that is not finite, ends in code 2."""
    try:
        main(parse_arguments(arguments_class, sys.argv[1:]))
    except (Refusal, FloatingPointError) as error:
        kind = "ValueError" if isinstance(error, Refusal) else "FloatingPointError"
        print(f"{kind}: {error}", file=sys.stderr)
        end_process(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        end_process(130)
    except Exception:
        if not teardown_waits():
            raise
        traceback.print_exc()
        end_process(1)


def teardown_waits():
    """Whether leaving the process group waits for the other ranks, which may never leave it: NCCL's does."""
    return torch.cuda.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def end_process(code):
    if teardown_waits():  # Python's own end would leave the group
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def learning_rates(args, total_steps):
    """The schedule as a function of the steps done: nothing that a checkpoint would have to hold."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, total_steps)
    return lambda step: args.learning_rate * scheduler.lr_lambdas[0](step)


# --- Trackers ---


class TensorBoard:
    def __init__(self, args):
        from torch.utils.tensorboard import SummaryWriter

        # a folder for each start: a run that goes on, or begins anew, adds a curve and hides none
        self.writer = SummaryWriter(Path(args.output_dir) / "runs" / time.strftime("%Y-%m-%d_%H-%M-%S"))
        self.writer.add_text("arguments", json.dumps(asdict(args), indent=1))

    def log(self, step, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, failed):
        self.writer.close()


class Service:
    """wandb and trackio, whose modules have the same functions."""

    def __init__(self, name, args):
        self.module = importlib.import_module(name)
        project = os.environ.get(f"{name.upper()}_PROJECT", "post-training")
        self.module.init(project=project, name=Path(args.output_dir).name, config=asdict(args))

    def log(self, step, values):
        self.module.log(values, step=step)

    def close(self, failed):
        # trackio knows no exit code
        self.module.finish(**({"exit_code": 1} if failed and self.module.__name__ == "wandb" else {}))


TRACKERS = {
    "tensorboard": TensorBoard,
    "wandb": partial(Service, "wandb"),
    "trackio": partial(Service, "trackio"),
}


def tracker_names(report_to):
    names = [name.strip() for name in report_to.split(",")]
    return [] if report_to == "none" else list(dict.fromkeys(names))


def check_trackers(report_to):
    """Raise Refusal for a tracker that is not known, or not installed."""
    for name in tracker_names(report_to):
        refuse(name not in TRACKERS, f"--report_to {name}: choose none, or of {', '.join(TRACKERS)}.")
        missing = importlib.util.find_spec(name) is None
        refuse(missing, f"--report_to {name}: the package {name} is not installed: pip install {name}.")


# --- One process among several ---

HUNG = 3  # the exit code of a run that the watchdog ends
STOPS = (signal.SIGTERM, signal.SIGINT)  # each saves a checkpoint and ends the run, with code 0


class Watchdog:
    """A thread that ends the process if no phase begins within timeout_s seconds of the one before.

    A lost rank leaves the others waiting in a collective, and the process group's own timeout names no phase.
    """

    def __init__(self, timeout_s, rank):
        self.timeout_s, self.rank = timeout_s, rank
        self.phase, self.since = "start", time.monotonic()
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def begin(self, phase):
        self.phase, self.since = phase, time.monotonic()

    def close(self):
        self.closed.set()
        self.thread.join()

    def _watch(self):
        while not self.closed.wait(min(1.0, self.timeout_s / 4)):
            phase, waited = self.phase, time.monotonic() - self.since
            if waited > self.timeout_s:
                print(
                    f"rank {self.rank}: {phase}: nothing has moved for {waited:.0f} s, over "
                    f"--collective_timeout_s {self.timeout_s}. Another rank is lost or hangs; or this phase "
                    "is only slow (a large model or dataset, a reward that takes its time): then start again "
                    f"with a larger limit, --collective_timeout_s {2 * self.timeout_s:g} for example.",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(HUNG)  # the main thread is inside a collective: no exception reaches it


def is_of_a_collective(error):
    """Whether an exception is what a lost rank leaves to the others: NCCL's has a type of its own."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)


class Run:
    """Ranks and device, the output folder, signals, and where the run stands; a context manager.

        with Run(args, "SFT") as run:
            run.resume(); run.match(..); run.plan(..)
            run.start(..)
            for .. in ..:
                with run.step(..):
                    ..
                run.log(..)
                if run.save_when_due(..):
                    return ..
            return run.finish(..)

    Has:    rank, local_rank, world, device; first: whether this is rank 0; checkpoint: the folder to resume
            from, or None; progress: what progress.json of a checkpoint holds: "step", optimizer steps done;
            "updates", those of them that changed weights; "epoch"; "done", items done in it; and what else
            `match` notes.
    Raises: ValueError for what arguments, data or model make impossible, before output_dir is touched, and
            for a disk that can no longer be written; FloatingPointError for a loss or gradient that is not
            finite, before weights and checkpoints are touched.
    """

    pretends = False  # see memory.PretendedRun

    def __init__(self, args, name, unfinished=(), shown=None):
        check_output_dir(args, unfinished)
        self.args, self.name, self.stop = args, name, False
        self.shown = shown or {"loss": "loss"}  # {word on the bar: metric}
        self.trackers = {}
        self.rank, self.local_rank, self.world = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        )
        self.first = self.rank == 0
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.local_rank) if cuda else torch.device("cpu")
        self.checkpoint, self.progress = None, {"step": 0, "updates": 0, "epoch": 0, "done": 0}
        self.metrics = {}  # of the latest step; a resumed run may have none left
        self.totals = {"seconds": 0.0, "num_tokens": 0, "padding": 0, "real_tokens": 0}
        self.bar, self.num_graphs = None, 0
        self.wait_began = None  # when the loop asked for the step's batches

    def __enter__(self):
        if self.device.type == "cuda":
            self._prepare_cuda()
        self.owns_group = not dist.is_initialized()
        if self.owns_group:
            # torchrun and deepspeed describe the group in the environment; a single process makes its own
            alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            alone = {} if "WORLD_SIZE" in os.environ else alone
            # longer than the watchdog's limit, which knows the phase
            timeout = timedelta(seconds=2 * self.args.collective_timeout_s + 60)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            if backend == "nccl" and self.args.offload_param:
                backend = "cpu:gloo,cuda:nccl"  # the gradients' norm is summed over ranks on the host
            dist.init_process_group(backend, timeout=timeout, **alone)
        self.asked_to_stop = []  # when
        # a shell lets what it runs in the background ignore Ctrl-C: that stays
        heard = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
        self.handlers = {number: signal.signal(number, self._on_signal) for number in heard}
        self.watchdog = Watchdog(self.args.collective_timeout_s, self.rank)
        self.disk = disk_errors_refused(self.args.output_dir)
        self.disk.__enter__()
        return self

    def _prepare_cuda(self):
        torch.cuda.set_device(self.device)
        # its backward gives NaN for some padded batches in bf16: github.com/pytorch/pytorch/issues/196678
        torch.backends.cuda.enable_cudnn_sdp(False)
        if self.args.offload_param or getattr(self.args, "offload_optimizer", False):
            # AdamW runs on the host, where torchrun gives each rank one thread
            ranks_here = min(self.world, torch.cuda.device_count())
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()  # an error's message would stand behind it
        self._tell_trackers("close", error[0] is not None)
        if is_of_a_collective(error[1]):
            broke = "a collective broke off: another rank is gone, whose own message may say why."
            print(f"rank {self.rank}: {self.watchdog.phase}: {broke}", file=sys.stderr, flush=True)
        try:
            return self.disk.__exit__(*error)
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            if self.owns_group and dist.is_initialized() and not (error[0] and teardown_waits()):
                dist.destroy_process_group()
            self.watchdog.close()  # last: leaving a group may hang as well

    def _on_signal(self, number, frame):
        """SIGTERM or Ctrl-C: note it for the end of the step.

        Before the first one nothing could be saved, and whoever presses Ctrl-C again does not want to wait:
        end at once.
        """
        self.asked_to_stop.append(time.monotonic())
        # torchrun hands a terminal's Ctrl-C on to ranks that have it already
        again = number == signal.SIGINT and self.asked_to_stop[-1] - self.asked_to_stop[0] > 2
        if self.bar is None or again:
            signal.signal(number, self.handlers[number])
            os.kill(os.getpid(), number)
        elif self.first:
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C ends at once\n")

    @property
    def device_name(self):
        cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if cuda else f"cpu {platform.machine()}"

    @property
    def hardware(self):
        return f"{self.device_name}, world {self.world}"

    @cached_property
    def mesh(self):
        """What FSDP2 shards on: all ranks."""
        return init_device_mesh(self.device.type, (self.world,))

    def watch(self, phase):
        """Say what begins: the watchdog counts from here, and names it where nothing follows."""
        self.watchdog.begin(phase)

    # Ranks.

    def sum(self, values):
        """{name: number or () tensor} -> {name: float}, summed over all ranks in float64.

        Every rank has to call it, with the same names; a signal to one rank sets `stop` on all of them.
        """
        if self.world == 1:  # numbers of the host need not visit the device
            self.stop = bool(self.asked_to_stop)
            return {name: float(value) for name, value in values.items()}
        numbers = self._stack([*values.values(), len(self.asked_to_stop)])
        dist.all_reduce(numbers)
        *sums, stop = numbers.tolist()
        self.stop = stop > 0
        return dict(zip(values, sums))

    def max(self, values):
        """The same, but the largest of all ranks."""
        numbers = self._stack(values.values())
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return dict(zip(values, numbers.tolist()))

    def _stack(self, numbers):
        # a Python float would become a float32 on its way
        to_double = {"device": self.device, "dtype": torch.float64}
        return torch.stack([torch.as_tensor(number, **to_double).detach() for number in numbers])

    def value(self, tensor):
        """A () tensor's number, the same on all ranks already."""
        return float(tensor)

    def to_device(self, batch):
        return {k: self._sent(v) if torch.is_tensor(v) else v for k, v in batch.items()}

    def _sent(self, tensor):
        if tensor.device == self.device:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)  # from other memory the host would wait

    @contextmanager
    def together(self):
        """What goes wrong inside on one rank ends all of them: the others would wait for it, or lose it."""
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        failed = torch.tensor(float(error is not None), device=self.device)
        dist.all_reduce(failed)
        if failed:
            raise error or Refusal("another rank cannot go on; its own message says why.")

    def on_each_machine(self, function, *args):
        """function(*args) on every rank, the first one of each machine before the others.

        It fills the machine's cache of tokenised data, and the others read it.
        """
        for turn in (True, False):
            self.watch("reading the data")
            with self.together():
                if (self.local_rank == 0) == turn:
                    result = function(*args)
        return result

    # Where the run stands.

    def resume(self):
        """Look up --resume_from_checkpoint, and take over its progress."""
        if name := self.args.resume_from_checkpoint:
            self.checkpoint = find_checkpoint(self.args.output_dir, name)
            try:
                found = json.loads((self.checkpoint / PROGRESS).read_text())
            except ValueError as error:
                raise Refusal(f"{self.checkpoint}/{PROGRESS} is no JSON: take another checkpoint.") from error
            earlier = f"{self.checkpoint} is of an earlier version of this script: begin a new run."
            refuse(not isinstance(found, dict) or not self.progress.keys() <= found.keys(), earlier)
            self.progress = found

    def match(self, name, value, remedy):
        """Note in `progress` a fact that a resumed run has to share with the one that it goes on with."""
        same = self.progress.setdefault(name, value) == value
        refuse(not same, f"{self.checkpoint}: its {name.replace('_', ' ')} and this run's differ. {remedy}")

    def plan(self, total_steps):
        """The run's last step is known: raise Refusal if the checkpoint is past it, or the run has ended."""
        self.total_steps, done, folder = total_steps, self.progress["step"], Path(self.args.output_dir)
        refuse(done > total_steps, f"{self.checkpoint} is past --max_steps {total_steps}: raise it.")
        ended = done == total_steps and (folder / "summary.json").exists()
        refuse(ended, f"{folder} has finished its {total_steps} steps: raise --max_steps to go on.")

    def start(self, data, keep=()):
        """Before the first step: clear the output folder of what is not this run's, and say what begins."""
        with self.together():
            if self.first:
                self._start_trackers()  # one that cannot start leaves the folder as it was
                prepare_output_dir(self.args.output_dir, self.progress["step"], keep)
                steps = f"steps {self.progress['step'] + 1} to {self.total_steps}"
                origin = f", from {self.checkpoint.name}" if self.checkpoint else ""
                if (ranks := self.progress.get("world_size", self.world)) != self.world:
                    origin += f" of {ranks} ranks: a step is {self.world / ranks:g} times as large"
                what = f"{self.name}, {steps} on {self.hardware}{origin}"
                show_lines([("run", what), *describe_start(self.args, data, self.total_steps)])
        done, self.progress["world_size"] = self.progress["step"], self.world
        self.bar = tqdm(
            total=self.total_steps,
            initial=done,
            desc=self.name,
            disable=not self.first,
            bar_format="{desc} {n_fmt}/{total_fmt} {bar} <{remaining}{postfix}",
        )
        self.learning_rate_at = learning_rates(self.args, self.total_steps)

    @property
    def counted_step(self):
        """Of the steps to come, the one whose bytes are counted on a CPU: the second finds AdamW's states."""
        return min(2, self.total_steps - self.progress["step"])

    @property
    def unfinished(self):
        return self.progress["step"] < self.total_steps

    @contextmanager
    def step(self, optimizer, what):
        """One optimizer step: sets the learning rate, takes the time, and moves `progress` on by a step.

        Args: what: function that names the step's data, for the message of a FloatingPointError.
        """
        self.watch(f"step {self.progress['step'] + 1}")
        self.learning_rate = self.learning_rate_at(self.progress["step"])
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate
        # a batch that had to be waited for is a part of its step
        started, self.wait_began = self.wait_began or time.perf_counter(), None
        try:
            yield
        except FloatingPointError as error:
            raise FloatingPointError(f"step {self.progress['step'] + 1}: {error} {what()}") from error
        self.step_seconds = time.perf_counter() - started
        self.progress["step"] += 1

    def due(self, every):
        """Whether something that happens every so many steps (None = never) does so after this one."""
        return bool(every) and self.progress["step"] % every == 0

    def log(self, metrics, *, padding=0, real_tokens=None, counts=True, peak_bytes=None):
        """One line of metrics.jsonl, and the progress bar.

        Args: metrics: {name: number}, num_tokens (computed, of all ranks) among them. padding: of those;
              real_tokens: of the data, None = all but padding; counts: whether the step counts for the
              throughput (one whose bytes are counted is slower); peak_bytes: the highest so far, None = as
              the device says.
        """
        seconds, tokens = self.step_seconds, metrics["num_tokens"]
        metrics = {"step": self.progress["step"], **metrics, "learning_rate": self.learning_rate}
        metrics |= {"tokens_per_second": tokens / seconds, "step_seconds": seconds}
        metrics["peak_memory_bytes"] = peak_bytes or peak_memory_bytes(self.device)
        self.metrics = {name: int(x) if name.startswith("num_") else x for name, x in metrics.items()}
        counts = not self._compiled() and counts
        if counts or not self.unfinished and not self.totals["seconds"]:  # the only step is better than none
            real_tokens = tokens - padding if real_tokens is None else real_tokens
            done = {"seconds": seconds, "num_tokens": tokens, "padding": padding, "real_tokens": real_tokens}
            self.totals = {name: total + done[name] for name, total in self.totals.items()}
        if not self.first:
            return
        with open(Path(self.args.output_dir) / "metrics.jsonl", "a") as file:
            file.write(json.dumps(self.metrics) + "\n")
        values = {name: value for name, value in self.metrics.items() if name != "step"}
        self._tell_trackers("log", metrics["step"], values)
        self.bar.update()
        evaluated = [f"{name} {x:.4f}" for name, x in metrics.items() if name.startswith("eval_")]
        if evaluated:
            tqdm.write(f"step {metrics['step']}: {'  '.join(evaluated)}")
        if self.due(self.args.logging_steps):
            shown = [f"{word} {metrics[name]:.3f}" for word, name in self.shown.items()]
            holder = "GPU" if self.device.type == "cuda" else "RSS"  # tensors'; all that the process holds
            held = f"{holder} {metrics['peak_memory_bytes'] / GIB:.2f} GiB"
            self.bar.set_postfix_str(" ".join([*shown, f"{tokens / seconds:.0f} tok/s", held]))

    def _start_trackers(self):
        # tensorboard last: it writes into the folder, and another may fail yet
        for name in sorted(tracker_names(self.args.report_to), key="tensorboard".__eq__):
            try:
                self.trackers[name] = TRACKERS[name](self.args)
            except Exception as error:
                raise Refusal(f"--report_to {name} cannot start: {type(error).__name__}: {error}") from error

    def _tell_trackers(self, what, *args):
        for name, tracker in list(self.trackers.items()):
            if not watched(f"--report_to {name}", getattr(tracker, what), *args):
                del self.trackers[name]

    def _compiled(self):
        """Whether torch.compile has made graphs since the step before; says so."""
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if self.args.torch_compile else 0
        new, self.num_graphs = graphs - self.num_graphs, graphs
        if new and self.first:
            took = torch._dynamo.utils.calculate_time_spent().get("total_wall_time", 0.0)
            tqdm.write(f"torch_compile: {new} graphs more; {took:.0f} s of compiling so far")
        return new > 0

    def save_when_due(self, write, stop_every=1):
        """Write a checkpoint every --save_steps steps and when asked to stop. Returns whether to stop.

        Args: write: function of a folder, called on all ranks, that writes what is not in `progress`.
              stop_every: a checkpoint holds a whole number of so many steps.
        """
        stop = self.stop and self.due(stop_every)
        if stop or self.due(self.args.save_steps):
            self.watch("saving a checkpoint")
            path = Path(self.args.output_dir) / f"checkpoint-{self.progress['step']}"
            temporary = path.with_suffix(".tmp")
            if self.first:
                fresh_folder(temporary)
            dist.barrier()
            write(temporary)  # a collective of its own, which one rank's error ends for all
            dist.barrier()
            if self.first:
                (temporary / PROGRESS).write_text(json.dumps(self.progress, indent=1))
                commit_folder(temporary, path)
                rotate_checkpoints(self.args.output_dir, self.args.save_total_limit)
            dist.barrier()
        if stop and self.first:
            remedy = "continue with --resume_from_checkpoint latest"
            tqdm.write(f"stopped: saved checkpoint-{self.progress['step']}; {remedy}", file=sys.stderr)
        return stop

    # The last page.

    def finish(self, data, ledger, offloading=None, lines=()):
        """Write summary.json and show the last page. Returns what summary.json holds.

        Args: data: counts of what became of the examples. ledger: memory.ledger's rows. offloading: the
              report of OffloadActivations. lines: of the script's own, pairs of a word and a text.
        """
        self.bar.close()
        totals, seconds = self.totals, max(self.totals["seconds"], 1e-9)
        modules = {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
        summary = {
            "args": asdict(self.args),
            "versions": {"python": platform.python_version(), **modules},
            "device": self.device_name,
            "world_size": self.world,
            "data": data,
            "throughput": {
                "tokens_per_second": totals["num_tokens"] / seconds,
                "real_tokens_per_second": totals["real_tokens"] / seconds,
                "num_tokens": int(totals["num_tokens"]),
                "seconds": totals["seconds"],
            },
            "ledger": ledger,
            "activation_offloading": offloading,
            "final_metrics": self.metrics,
        }
        if self.first:
            folder = Path(self.args.output_dir)
            held = {f"ledger/{row['name']}": row["bytes"] for row in ledger}
            self._tell_trackers("log", self.progress["step"], held)
            if importlib.util.find_spec("matplotlib"):
                watched("training.png", draw, [folder], folder / "training.png")
            # last: it says that the run has ended
            (folder / "summary.json").write_text(json.dumps(summary, indent=1))
            speed = summary["throughput"]
            title = f"{shown_path(self.args.model_name_or_path)}  {self.hardware}"
            page = [
                *describe_data(data),
                *lines,
                (
                    "speed",
                    f"{speed['tokens_per_second']:.0f} tokens/s computed, "
                    f"{speed['real_tokens_per_second']:.0f} tokens/s of the data",
                ),
            ]
            if offloading:
                moved = f"{offloading['offloaded_bytes'] / GIB:.4f} GiB of a forward to the host"
                pretend = ", which here is the device: nothing is saved" if offloading["pretend"] else ""
                page.append(("offloaded", moved + pretend))
            show_lines(page)
            print(format_ledger(title, ledger))
            show_lines(describe_end(self.args))
        return summary


def watched(what, function, *args):
    """function(*args), of what only watches a run: it must not end it. Returns whether it went well."""
    try:
        function(*args)
        return True
    except Exception as error:
        failed = f"{what} failed, and is left out from here on: {type(error).__name__}: {error}"
        tqdm.write(failed, file=sys.stderr)
        return False


class Tally:
    """Named sums, and named maxima, over a step's micro-batches; they stay on the device until asked for."""

    def __init__(self):
        self.sums, self.maxima = {}, {}

    def add(self, sums, maxima=None):
        """Add {name: number or () tensor} of one micro-batch."""
        for name, value in sums.items():
            value = value.detach().double() if torch.is_tensor(value) else value
            self.sums[name] = self.sums.get(name, 0) + value
        for name, value in (maxima or {}).items():
            before = self.maxima.get(name, -math.inf)
            self.maxima[name] = torch.as_tensor(value).detach().double().clamp(min=before)

    def of_all_ranks(self, run):
        return run.sum(self.sums) | (run.max(self.maxima) if self.maxima else {})


def clip_gradients(model, max_grad_norm):
    """Scale the gradients to a global norm of max_grad_norm at most (0 = any). Returns the one before, ()."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def check_finite(loss, grad_norm=None):
    """Raise FloatingPointError unless a step's two numbers, or an evaluation's loss, are finite."""
    if grad_norm is None and not math.isfinite(loss):
        raise FloatingPointError(f"the evaluation's loss is {loss}.")
    if grad_norm is not None and not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise FloatingPointError(f"loss {loss}, gradient norm {grad_norm}; stopped before the update.")


# --- The order of the data ---


class Epochs:
    """Numbered items of training data: an order of its own for each epoch, dealt to ranks in micro-batches.

    A subclass has `__len__`; `cut(numbers)`, which yields micro-batches, as arrays of item numbers; and
    `batch(numbers)`, a micro-batch's tensors, of no numbers one in which nothing is scored.
    """

    def __init__(self, args, world):
        self.args, self.world = args, world

    def order(self, epoch):
        """The epoch's shuffle: a function of seed and epoch, so that a checkpoint need not store it."""
        return np.random.default_rng([self.args.seed, epoch]).permutation(len(self))

    def steps(self, epoch, done):
        """What is left of an epoch after `done` items: for each optimizer step, all ranks' micro-batches.

        Where one ends depends on what follows the last one's end alone: a resumed run cuts as the first did.
        """
        chunks = self.cut(self.order(epoch)[done:])
        while step := list(itertools.islice(chunks, self.args.gradient_accumulation_steps * self.world)):
            yield step

    def count_steps(self, progress):
        """Optimizer steps of the whole run, those that `progress` has done included.

        Counted from the items that are left: a run resumed with other ranks or batches trains each one as
        often as before. Part of an epoch is rounded up to whole steps.
        """
        if self.args.max_steps > 0:
            return self.args.max_steps
        total, done = progress["step"], progress["done"]
        for epoch in range(progress["epoch"], math.ceil(self.args.num_train_epochs)):
            # 1e-9: 1.6 - 1 is 0.6000000000000001
            last = math.ceil(min(1, self.args.num_train_epochs - epoch) * len(self) - 1e-9)
            for step in self.steps(epoch, done):
                total += done < last
                done += sum(map(len, step))
            done = 0
        return total

    def remaining_steps(self, run):
        """Yields the run's remaining steps: item numbers, and this rank's micro-batches.

        A thread makes those of the next step while the device computes this one.
        """

        def make(chunks):
            return np.concatenate(chunks), list(self.micro_batches(chunks, run))

        with ThreadPoolExecutor(1) as thread:
            this_step = None
            for chunks in itertools.chain(self._remaining_chunks(run.progress, run.total_steps), [None]):
                next_step = chunks and thread.submit(make, chunks)
                if this_step:
                    run.wait_began = time.perf_counter()
                    yield this_step.result()
                this_step = next_step

    def _remaining_chunks(self, progress, total_steps):
        step, epoch, done = (progress[name] for name in ("step", "epoch", "done"))
        while step < total_steps:
            for chunks in itertools.islice(self.steps(epoch, done), total_steps - step):
                yield chunks
                step += 1
            epoch, done = epoch + 1, 0

    def in_order(self):
        """All micro-batches of the data in its own order, for an evaluation."""
        return self.cut(np.arange(len(self)))

    def advance(self, progress, numbers):
        """Move `progress` on by these items. Returns the epochs done, as a fraction."""
        progress["done"] += len(numbers)
        epoch = progress["epoch"] + progress["done"] / len(self)
        if progress["done"] == len(self):
            progress["epoch"], progress["done"] = progress["epoch"] + 1, 0
        return epoch

    def micro_batches(self, chunks, run):
        """This rank's: every world-th one; its tensors are made when it is its turn."""
        # Ranks must run equally many forwards, or collectives stall: some get a batch without an item.
        chunks = list(chunks)
        chunks += [np.array([], dtype=np.int64)] * (-len(chunks) % run.world)
        return (self.batch(chunk) for chunk in chunks[run.rank :: run.world])


# --- What the screen says of the data ---

# counts of examples that are cut or left out, of all three scripts
LOST = ("examples_truncated", "examples_dropped", "examples_unscored", "examples_equal")
LOST += ("prompts_truncated", "completions_truncated")


def bold(text):
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text


def show_lines(lines):
    """Print pairs of a word and a text, wrapped to the terminal."""
    for word, text in lines:
        print(wrapped(f"{word:<10}{text}", " " * 10))


def shown_path(name):
    """A path as one would type it here; a Hub name as it is."""
    inside = os.path.isabs(name) and Path(name).is_relative_to(Path.cwd())
    return str(Path(name).relative_to(Path.cwd())) if inside else name


def describe_start(args, data, total_steps):
    """What the screen says before the first step: the model, the data and what of it is cut or left out, in
    bold where it is more than a tenth; where the run writes; columns that nobody reads; a warm-up that the
    run does not outlast.
    """
    read, parts = data["examples_read"], [f"{data['examples_read']} examples"]
    for name in LOST:
        if data.get(name):
            share = data[name] / read / (2 if name.startswith("completions") else 1)  # of a pair, two
            part = f"{name.replace('examples_', '').replace('_', ' ')} {data[name]} ({share:.1%})"
            parts.append(bold(part) if share > 0.1 else part)
    limits = [name for name in vars(args) if name.startswith("max_") and name.endswith("_length")]
    limits = "  ".join(f"--{name} {getattr(args, name)}" for name in limits if getattr(args, name))
    folder = shown_path(args.output_dir)
    lines = [
        ("model", f"{shown_path(args.model_name_or_path)}, computed in {'bf16' if args.bf16 else 'fp32'}"),
        ("data", f"{shown_path(args.dataset_name)}: {', '.join(parts)}; {limits}"),
        ("writes", f"{folder}: metrics.jsonl with each step, in the end the model and summary.json"),
    ]
    if data["columns_unused"]:
        lines.append(("columns", f"not used: {', '.join(data['columns_unused'])}"))
    if args.warmup_steps and args.warmup_steps >= total_steps:
        steps = f"--warmup_steps {args.warmup_steps}, and {total_steps} steps in all"
        lines.append(("schedule", bold(f"{steps}: the learning rate never reaches {args.learning_rate:g}")))
    return lines


def describe_data(data):
    """Lines of the last page: the counts of `data` that are not 0, of examples and of tokens side by side."""
    groups = {"examples": [], "tokens": [], "further": []}
    for name, value in data.items():
        if isinstance(value, (int, float)) and value:
            group, _, rest = name.partition("_")
            text = f"{value:.1%}" if isinstance(value, float) else value
            known = group in groups
            groups[group if known else "further"].append(f"{rest if known else name} {text}")
    return [(name, "  ".join(counts)) for name, counts in groups.items() if counts]


def describe_end(args):
    """Where the model lies; of the demo's model also what to try next."""
    folder = shown_path(args.output_dir)
    lines = [("model", f"{folder}: AutoModelForCausalLM.from_pretrained takes it")]
    if args.model_name_or_path == str(ROOT / "demo/model"):
        script = shown_path(sys.argv[0])
        lines += [
            ("next", f"python {script} --model_name_or_path .. --dataset_name .."),
            ("", "trains a model of yours; --dry_run says what that takes, --help lists all flags"),
        ]
    return lines
