"""What surrounds a loop: flags, refusals, the order of the data, the screen, and how a run ends."""

import importlib.util
import json
import math
import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest
import torch
from helpers import alone_on_the_cpu
from tqdm import tqdm

from common import Refusal, refuse, run
from common.run import (
    BOUNDS,
    Epochs,
    Run,
    RunArguments,
    Tally,
    bold,
    check_finite,
    check_run_arguments,
    describe_start,
    flag,
    learning_rates,
    parse_arguments,
    show_lines,
)

ROOT = Path(__file__).parents[1]
SCRIPTS = ["sft_packing", "dpo_padding_free", "grpo_zero3"]


@dataclass
class Arguments(RunArguments):
    """As a script has them, with one flag of each kind."""

    share: float = flag(0.5, "a number between", above=0, below=1)
    ways: Literal["one", "two"] | None = flag(None, "a choice, or none")
    max_length: int = flag(64, "tokens", at_least=2)
    gradient_accumulation_steps: int = flag(1, "micro-batches", at_least=1)


# --- Flags ---


# beside a limit, what it lets through and what it does not
EDGES = {"at_least": (0, -1), "above": (1e-6, 0), "below": (-1e-6, 0), "at_most": (0, 1)}
BOUNDED = [
    (each.name, b, each.metadata[b]) for each in fields(Arguments) for b in BOUNDS if b in each.metadata
]


@pytest.mark.parametrize("name, bound, limit", BOUNDED)
def test_bounded_numbers_are_finite_and_end_at_their_bound(name, bound, limit):
    inside, outside = (limit + difference for difference in EDGES[bound])
    flags = {"dry_run": name in ("dry_run_world_size", "gpu_memory_gib")}
    flags |= {"lr_scheduler_type": "constant_with_warmup", "eval_dataset_name": "rows.jsonl"}
    check_run_arguments(Arguments(**{**flags, name: inside}))
    for value in (outside, math.nan, math.inf, -math.inf):
        message = f"--{name} is {value}; it must be finite, and .*{bound.replace('_', ' ')} {limit}"
        with pytest.raises(Refusal, match=message):
            check_run_arguments(Arguments(**{**flags, name: value}))


CONSTANT = {"lr_scheduler_type": "constant", "warmup_steps": 3}


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"ways": "three"}, "--ways is 'three'; choose one of one, two"),
        ({"max_steps": 0}, "--max_steps 0: give a number >= 1, or -1"),
        ({"eval_steps": 3}, "--eval_steps needs --eval_dataset_name"),
        (CONSTANT, "--warmup_steps 3 needs .*constant_with_warmup"),
        ({"overwrite_output_dir": True, "resume_from_checkpoint": "latest"}, "drop one of the two"),
        ({"dry_run_world_size": 2}, "add --dry_run"),
        ({"gpu_memory_gib": 80.0}, "add --dry_run"),
        ({"dry_run": True}, "--dry_run is one process"),
    ],
)
def test_unknown_choices_and_flags_that_contradict_each_other_are_refused(flags, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_run_arguments(Arguments(ways="two", lr_scheduler_type="cosine"))
    with pytest.raises(Refusal, match=message):
        check_run_arguments(Arguments(**flags))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_command_line(script, capsys):
    arguments = importlib.import_module(script).Arguments
    for word in ("--local_rank=1", "--local-rank=1"):
        words = [word, "--max-steps", "7", "--no_gradient_checkpointing", "--bf16"]
        expected = arguments(max_steps=7, gradient_checkpointing=False, bf16=True)
        assert parse_arguments(arguments, words) == expected
    with pytest.raises(Refusal, match=r"unknown arguments: --sed 3; did you mean --seed\?"):
        parse_arguments(arguments, ["--sed", "3"])
    with pytest.raises(Refusal, match="unknown arguments: --no_such_flag 3; --help"):
        parse_arguments(arguments, ["--no_such_flag", "3", "--seed", "3"])
    with pytest.raises(SystemExit):
        parse_arguments(arguments, ["--lr_scheduler_type", "polynomial"])
    with pytest.raises(SystemExit, match="0"):
        parse_arguments(arguments, ["--help"])
    shown = capsys.readouterr().out
    titles = re.findall(r"^(\w.*):$", shown, re.M)
    assert {*titles} == {"options", *(each.metadata["group"] for each in fields(arguments))}
    assert len(titles) == len({*titles}) and titles[1] == "model and data"
    for each in fields(arguments):
        help_text = " ".join(each.metadata["help"].split())
        assert f"--{each.name}" in shown and help_text in " ".join(shown.split()), each.name


@pytest.mark.parametrize(
    "error, code", [(Refusal("why"), 2), (FloatingPointError("nan"), 2), (ValueError("a mistake"), None)]
)
def test_only_a_refusal_and_a_loss_that_is_not_finite_are_one_line(error, code, monkeypatch, capsys):
    def main(args):
        assert args == Arguments(seed=3) and issubclass(Refusal, ValueError)
        refuse(False, "fine")
        refuse(type(error) is Refusal, str(error))
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py", "--seed", "3"])
    with pytest.raises(SystemExit if code else ValueError) as raised:
        run.run_script(main, Arguments)
    assert not code or raised.value.code == code
    kind = "ValueError" if type(error) is Refusal else "FloatingPointError"
    assert capsys.readouterr().err == (f"{kind}: {error}\n" if code else "")


@pytest.mark.parametrize("error, code", [(MemoryError("full"), 1), (Refusal("why"), 2)])
def test_where_leaving_the_group_would_wait_a_failed_rank_speaks_and_ends(
    error, code, tmp_path, monkeypatch, capsys
):
    """NCCL's way, on gloo: Python's own end would wait, with the traceback still to be printed."""

    def main(args):
        args.output_dir = str(tmp_path / "run")
        with Run(args, "SFT"):
            raise error

    def ended(code):
        raise SystemExit(f"at once, {code}")

    monkeypatch.setattr(run, "teardown_waits", torch.distributed.is_initialized)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(os, "_exit", ended)
    with pytest.raises(SystemExit, match=f"at once, {code}"):
        run.run_script(main, Arguments)
    assert torch.distributed.is_initialized() and str(error) in capsys.readouterr().err
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("flags", [{}, {"dry_run": True}])
def test_a_mistake_in_an_edited_script_keeps_its_traceback(flags, tmp_path):
    """The same exception type that a refusal has: only its class tells them apart."""
    source = (ROOT / "sft_packing.py").read_text()
    line = "    loss = at_scored(model, batch, loss_head(args))\n"
    assert source.count(line) == 1
    (tmp_path / "edited.py").write_text(source.replace(line, line + "    first, second = 1, 2, 3\n"))
    spec = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
    edited = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(edited)
    args = edited.Arguments(output_dir=str(tmp_path / "out"), max_length=64, **flags)
    with pytest.raises(ValueError, match="too many values to unpack") as raised:
        edited.main(args)
    assert raised.type is ValueError and raised.traceback[-1].name == "batch_loss"


def test_learning_rates_follow_the_schedule():
    for name, expected in (("linear", [2.0, 1.5, 1.0, 0.5, 0.0]), ("constant", [2.0] * 5)):
        rate = learning_rates(Arguments(learning_rate=2.0, lr_scheduler_type=name), 4)
        assert [rate(step) for step in range(5)] == expected
    warm = learning_rates(Arguments(learning_rate=2.0, warmup_steps=2, lr_scheduler_type="cosine"), 4)
    assert [warm(step) for step in range(4)] == pytest.approx([0.0, 1.0, 2.0, 1.0])


# --- A run ---


@pytest.fixture(autouse=True)
def no_gpu(tmp_path):
    with alone_on_the_cpu(tmp_path / "cache"):
        yield


class Items(Epochs):
    """Eight items, in micro-batches of two."""

    def __len__(self):
        return 8

    def cut(self, numbers):
        return (numbers[i : i + 2] for i in range(0, len(numbers), 2))

    def batch(self, numbers):
        return {"items": numbers, "thread": threading.current_thread()}


def train(folder, seen=None, terminated_at=None, broken_at=None, data="d", **flags):
    """A loop as the scripts have it; seen: a list that fills with the items."""
    args = Arguments(output_dir=str(folder), lr_scheduler_type="constant", **flags)
    check_run_arguments(args)
    with Run(args, "TEST") as run:
        run.resume()
        run.match("data", data, "Use its data.")
        items, optimizer = Items(args, world=1), torch.optim.SGD([torch.zeros(1)])
        run.plan(items.count_steps(run.progress))
        run.start({"examples_read": 8, "columns_unused": []})
        for numbers, [batch] in items.remaining_steps(run):
            assert batch["items"].tolist() == numbers.tolist() and batch["thread"] != threading.main_thread()
            with run.step(optimizer, lambda numbers=numbers: f"Items {numbers.tolist()}."):
                if run.progress["step"] + 1 == terminated_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                check_finite(1.0, float("nan") if run.progress["step"] + 1 == broken_at else 0.0)
                sums = run.sum({"num_tokens": len(numbers)})
            if seen is not None:
                seen.extend(numbers.tolist())
            run.log({"epoch": items.advance(run.progress, numbers), "loss": 1.0, **sums}, padding=1)
            if run.save_when_due(lambda folder: (folder / "state").write_text("whole")):
                return {"stopped_at_step": run.progress["step"]}
        return run.finish({"examples_read": 8, "fill_fraction": 0.5}, [])


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_where_it_was_stopped_until_nothing_is_left(tmp_path, capsys):
    """What else it leaves behind: test_fsdp_runs.py."""
    flags, whole, seen = {"num_train_epochs": 2.0}, [], []
    speed = train(tmp_path / "whole", whole, save_steps=3, save_total_limit=1, **flags)["throughput"]
    assert speed["num_tokens"] == 16
    assert speed["real_tokens_per_second"] == pytest.approx(speed["tokens_per_second"] / 2)
    shown = capsys.readouterr().out
    assert "run       TEST, steps 1 to 8 on cpu" in shown and "further   fill_fraction 50.0%" in shown
    assert "equal" not in shown  # a count that is 0
    assert f"writes    {tmp_path}/whole: metrics.jsonl" in shown and "model     " in shown.split("ledger")[1]
    assert "memory ledger  demo/model  cpu" in shown
    assert [path.name for path in (tmp_path / "whole").glob("checkpoint-*")] == ["checkpoint-6"]
    parts, handler = tmp_path / "parts", signal.getsignal(signal.SIGTERM)
    assert train(parts, seen, 3, **flags) == {"stopped_at_step": 3}
    assert signal.getsignal(signal.SIGTERM) == handler
    assert (parts / "checkpoint-3/state").read_text() == "whole" and not (parts / "summary.json").exists()
    # another five steps, and then it is over for all who do not ask for more
    resumed = {"resume_from_checkpoint": "latest"}
    assert train(parts, seen, 8, **flags, **resumed) == {"stopped_at_step": 8}
    assert re.search(
        r"^run       TEST, steps 4 to 8 on .*, from checkpoint-3$", capsys.readouterr().out, re.M
    )
    assert train(parts, seen, **flags, **resumed)["final_metrics"] == {}
    assert seen == whole and steps_of(parts) == list(range(1, 9))
    for changes, message in (
        (flags, "has finished its 8 steps: raise --max_steps to go on"),
        ({"max_steps": 7}, "checkpoint-8 is past --max_steps 7: raise it"),
        ({"max_steps": 9, "data": "other"}, "its data and this run's differ. Use its data."),
    ):
        with pytest.raises(Refusal, match=message):
            train(parts, **changes, **resumed)
    assert train(parts, seen, max_steps=9, **resumed)["final_metrics"]["step"] == 9
    for text in ('{"steps": 2}', "[]"):
        (parts / "checkpoint-8/progress.json").write_text(text)
        with pytest.raises(Refusal, match="checkpoint-8 is of an earlier version of this script"):
            train(parts, max_steps=10, **resumed)
    (parts / "checkpoint-8/progress.json").write_text("{")
    with pytest.raises(Refusal, match="progress.json is no JSON: take another"):
        train(parts, max_steps=10, **resumed)


def test_a_batch_that_cannot_be_made_ends_the_run_at_its_step(tmp_path, monkeypatch):
    """Made while the step before is taken, which still ends."""
    made = []

    def batch(self, numbers):
        made.append(numbers)
        if len(made) == 3:
            raise Refusal("no such item")
        return {"items": numbers, "thread": threading.current_thread()}

    monkeypatch.setattr(Items, "batch", batch)
    with pytest.raises(Refusal, match="no such item"):
        train(tmp_path)
    assert steps_of(tmp_path) == [1, 2]


def test_a_loss_that_is_not_finite_names_step_and_data_and_keeps_the_checkpoints(tmp_path, capsys):
    message = "step 3: loss 1.0, gradient norm nan; .* Items .[0-7], [0-7]."
    with pytest.raises(FloatingPointError, match=message) as raised:
        train(tmp_path, broken_at=3, save_steps=1)
    # the bar is closed (not only when it is collected: `raised` holds it): what follows begins a line
    assert capsys.readouterr().err.endswith("\n") and raised.value.__cause__
    assert steps_of(tmp_path) == [1, 2]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_sigterm_before_the_first_step_ends_the_process_at_once(tmp_path):
    """Loading, tokenising or waiting for another process: there is nothing to save yet."""
    child = os.fork()
    if child == 0:
        with Run(Arguments(output_dir=str(tmp_path)), "TEST"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


@pytest.fixture
def ctrl_c():
    """It is heard, also where these tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_is_ignored_stays_so(tmp_path, ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Run(Arguments(output_dir=str(tmp_path)), "TEST"):
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_ctrl_c_saves_as_sigterm_does_and_a_second_one_ends_at_once(tmp_path, ctrl_c, monkeypatch, capfd):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "check_finite", interrupted)
        assert train(tmp_path / "saved") == {"stopped_at_step": 1}
    shown = capfd.readouterr().err
    assert "stopping after this step, with a checkpoint; Ctrl-C ends at once" in shown
    assert "stopped: saved checkpoint-1; continue with --resume_from_checkpoint latest" in shown
    monkeypatch.setattr(sys, "argv", ["script.py", f"--output_dir={tmp_path}/ended"])

    def twice(args):
        with Run(args, "TEST") as run:
            run.bar = tqdm(disable=True)
            interrupted()
            interrupted()  # torchrun's, at the same moment
            run.asked_to_stop[0] -= 3
            interrupted()
            raise AssertionError("not at once")

    with pytest.raises(SystemExit, match="130"):
        run.run_script(twice, Arguments)
    assert capfd.readouterr().err.endswith("\ninterrupted\n")


def test_a_resumed_run_says_that_its_steps_have_changed(tmp_path, capsys):
    train(tmp_path, terminated_at=3)
    progress = tmp_path / "checkpoint-3/progress.json"
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"world_size": 2}))
    train(tmp_path, resume_from_checkpoint="latest")
    assert "from checkpoint-3 of 2 ranks: a step is 0.5 times as large" in capsys.readouterr().out
    assert json.loads(progress.read_text())["world_size"] == 2


def test_a_tally_adds_sums_and_keeps_maxima(tmp_path):
    with Run(Arguments(output_dir=str(tmp_path)), "TEST") as run:
        tally = Tally()
        tally.add({"nll": torch.tensor(2.0, requires_grad=True), "n": 1}, {"most": 3})
        tally.add({"nll": torch.tensor(2.0**-30), "n": 2}, {"most": torch.tensor(-1.0)})
        assert tally.of_all_ranks(run) == {"nll": 2.0 + 2.0**-30, "n": 3.0, "most": 3.0}  # in float64
        with pytest.raises(KeyError), run.together():
            raise KeyError("this rank's own error")


# --- The watchdog ---


@pytest.mark.parametrize("moves, code", [(True, 0), (False, 3)])
def test_a_phase_that_lasts_too_long_ends_the_process_and_is_named(moves, code, tmp_path):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(tmp_path / "stderr", os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w")
        watchdog = run.Watchdog(0.8, rank=7)
        for turn in range(8 if moves else 1):
            watchdog.begin(f"rollout {turn}")
            time.sleep(0.2 if moves else 30)
        watchdog.close()
        time.sleep(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    said = (tmp_path / "stderr").read_text()
    where_it_hung = "in test_a_phase"
    parts = ["rank 7: rollout 0: nothing has moved for", "--collective_timeout_s 1.6 for", where_it_hung]
    assert said == "" if moves else all(part in said for part in parts)


# --- The screen ---

DATA = {"examples_read": 100, "examples_used": 88, "columns_unused": []}


def start_lines(data=DATA, **flags):
    args = Arguments(model_name_or_path="m", dataset_name="d", output_dir=str(Path.cwd() / "out"), **flags)
    return describe_start(args, data, 10)


def test_what_is_cut_is_counted_and_bold_above_a_tenth(monkeypatch):
    model, data, writes = start_lines()
    assert model == ("model", "m, computed in fp32") and writes[1].startswith("out: metrics.jsonl with each")
    assert data == ("data", "d: 100 examples; --max_length 64")
    counts = DATA | {"examples_truncated": 11, "examples_unscored": 10, "completions_truncated": 21}
    few, many = "unscored 10 (10.0%)", ["truncated 11 (11.0%)", "completions truncated 21 (10.5%)"]
    parts = f"d: 100 examples, {many[0]}, {few}, {many[1]}; --max_length 64"
    assert start_lines(counts)[1] == ("data", parts)  # into a file: no escape codes
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    found = start_lines(counts)[1][1]
    assert all(bold(part) == f"\033[1m{part}\033[0m" and bold(part) in found for part in many)
    assert few in found and bold(few) not in found


def test_what_nobody_reads_and_a_warm_up_that_never_ends_are_said():
    lines = start_lines(DATA | {"columns_unused": ["question", "source"]})
    assert lines[3:] == [("columns", "not used: question, source")]
    for warmup, said in ((9, False), (10, True), (50, True)):
        lines = start_lines(warmup_steps=warmup, learning_rate=1e-4)
        words = f"--warmup_steps {warmup}, and 10 steps in all: the learning rate never"
        assert any(words in text for _, text in lines) == said


def test_lines_are_no_longer_than_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    show_lines([("data", "many words " * 9), ("next", "one"), ("writes", "a-path/" * 9)])
    *first, last, heading, path = capsys.readouterr().out.splitlines()
    assert heading.strip() == "writes" and path.strip() == "a-path/" * 9  # too long, but whole
    assert len(first) > 2 and all(len(line) <= 40 for line in first) and last == "next      one"
    assert first[0].startswith("data      many") and all(line.startswith(" " * 10) for line in first[1:])
