"""What watches a run: trackers, its picture, and what happens to the run when they fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import alone_on_the_cpu, assert_refused, assert_same_bits, read_run, run, small_run

import sft_packing
from common import Refusal
from common import run as harness
from common.plot import PANELS, draw, read_metrics

ROOT = Path(__file__).parents[1]
TRACKED = {"loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_bytes", "epoch"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    with alone_on_the_cpu(tmp_path_factory.mktemp("cache")):
        yield {**small_run(sft_packing, tmp_path_factory.mktemp("small")), "max_steps": 3, "eval_steps": 2}


@pytest.fixture(scope="module")
def done(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done") / "run"
    run(sft_packing, folder, flags)
    return folder


# --- Trackers ---


def test_tensorboard_holds_every_metric_of_every_step(flags, done, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked = run(sft_packing, tmp_path / "run", flags, report_to="tensorboard")
    assert_same_bits(tracked, read_run(done))
    [folder] = (tmp_path / "run/runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault(event.step, {})[name] = event.value
    ledger = {f"ledger/{row['name']}": row["bytes"] for row in tracked.returned["ledger"]}
    for step in tracked.metrics:
        number = step.pop("step")
        assert found[number] == pytest.approx(step | (ledger if number == 3 else {}), rel=1e-6)
    assert TRACKED | {"eval_loss"} < tracked.metrics[1].keys()
    arguments = events.Tensors("arguments/text_summary")[0].tensor_proto.string_val[0]
    assert json.loads(arguments) == tracked.returned["args"]


# each in a process of its own: they leave threads, and files where their settings say
SERVICES = {
    "wandb": ({"WANDB_MODE": "offline", "WANDB_SILENT": "true"}, "wandb/offline-run-*/run-*.wandb"),
    "trackio": ({"TRACKIO_DIR": "."}, "post-training.db"),
}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_is_offline_takes_the_metrics(name, flags, done, tmp_path):
    environment, pattern = SERVICES[name]
    words = [f"--{flag}={value}" for flag, value in flags.items()]
    words += [f"--report_to={name}", f"--output_dir={tmp_path}/run"]
    process = subprocess.run(
        [sys.executable, ROOT / "sft_packing.py", *words],
        cwd=tmp_path,
        env=os.environ | environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "failed" not in process.stderr
    assert_same_bits(read_run(tmp_path / "run"), read_run(done))
    [file] = tmp_path.glob(pattern)
    content = file.read_bytes()
    for metric in (b"grad_norm", b"eval_loss", b"ledger/parameters", b"max_length"):
        assert metric in content, metric


class Failing:
    """A tracker that takes one step."""

    def __init__(self, args):
        self.calls = []

    def log(self, step, values):
        self.calls.append(step)
        if step > 1:
            raise ConnectionError("gone")

    def close(self, failed):
        raise AssertionError("it was left out")


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(flags, done, tmp_path, monkeypatch, capsys):
    trackers = []

    def make(args):
        trackers.append(Failing(args))
        return trackers[0]

    monkeypatch.setitem(harness.TRACKERS, "wandb", make)
    found = run(sft_packing, tmp_path / "run", flags, report_to="wandb")
    assert_same_bits(found, read_run(done))
    assert trackers[0].calls == [1, 2]
    assert capsys.readouterr().err.count("--report_to wandb failed, and is left out from here on") == 1


def test_a_tracker_that_cannot_start_or_is_not_there_is_refused(flags, done, tmp_path, monkeypatch):
    """And the run whose place it would have taken is left as it was."""

    def cannot(args):
        raise ConnectionError("no key")

    with monkeypatch.context() as patch:
        patch.setitem(harness.TRACKERS, "wandb", cannot)
        folder = shutil.copytree(done, tmp_path / "run")
        message = "--report_to wandb cannot start: ConnectionError: no key"
        change = {"overwrite_output_dir": True, "report_to": "tensorboard,wandb"}
        assert_refused(sft_packing, folder, {**flags, **change}, message)
    # before anything is loaded
    monkeypatch.setattr(sft_packing, "read_pretrained", None)
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    for report_to, message in (
        ("trackio", "the package trackio is not installed: pip install trackio"),
        ("tensorboard,clearml", "the package tensorboard is not"),
        ("clearml", "choose none, or of tensorboard, wandb, trackio"),
    ):
        with pytest.raises(Refusal, match=message):
            run(sft_packing, tmp_path / "other", flags, report_to=report_to)
    assert not (tmp_path / "other").exists()


# --- The picture ---


def drawn_lines(monkeypatch):
    """What `draw` gives matplotlib: of each picture {title: [(label, steps, values), ..]}."""
    from matplotlib.figure import Figure

    pictures, save = [], Figure.savefig

    def saved(figure, *args, **options):
        pictures.append(
            {
                axes.get_title(): [
                    (line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
                ]
                for axes in figure.axes
            }
        )
        return save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return pictures


def test_a_run_leaves_its_picture(flags, tmp_path, monkeypatch):
    pictures = drawn_lines(monkeypatch)
    found = run(sft_packing, tmp_path / "run", flags)
    assert (tmp_path / "run/training.png").read_bytes().startswith(b"\x89PNG")
    [panels] = pictures
    assert list(panels) == ["loss", "tokens/s computed", "peak memory so far, GiB"]
    (_, *curve), (_, *evaluated) = panels["loss"]
    assert curve == [[1, 2, 3], [step["loss"] for step in found.metrics]]
    assert evaluated == [[2, 3], [step["eval_loss"] for step in found.metrics[1:]]]
    memory = [step["peak_memory_bytes"] / 2**30 for step in found.metrics]
    assert panels["peak memory so far, GiB"][0][2] == memory


def test_several_runs_are_drawn_beside_one_another(done, tmp_path, monkeypatch):
    """What one alone has, a reward, is drawn as well."""
    other = tmp_path / "other"
    other.mkdir()
    lines = [{"step": 1, "reward": 0.5, "loss": 1.0}, {"step": 2, "reward": 0.75, "loss": 0.5}]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures = drawn_lines(monkeypatch)
    draw([done, other], tmp_path / "both.png")
    [panels] = pictures
    assert [label for label, *_ in panels["loss"] if not label.startswith("_")] == [str(done), str(other)]
    assert [steps for _, steps, _ in panels["reward"] if steps] == [[1, 2]]
    assert {title for _, title, _ in PANELS} - panels.keys() == {"reward margin"}


def test_the_command_line_draws(done, tmp_path):
    words = [sys.executable, "-m", "common.plot", str(done), "--output", str(tmp_path / "a.png")]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.stdout == f"wrote {tmp_path}/a.png\n" and process.stderr == ""
    nothing = subprocess.run(
        [*words[:3], str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert nothing.returncode == 2 and "it is no run's folder" in nothing.stderr.splitlines()[-1]
    assert (tmp_path / "a.png").stat().st_size > 5000 and len(read_metrics(done)) == 3


def test_a_picture_that_fails_does_not_end_the_run(flags, done, tmp_path, monkeypatch, capsys):
    def fails(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(harness, "draw", fails)
    assert_same_bits(run(sft_packing, tmp_path / "run", flags), read_run(done))
    assert (
        "training.png failed, and is left out from here on: RuntimeError: no font" in capsys.readouterr().err
    )
    assert (tmp_path / "run/summary.json").exists()
    assert torch.distributed.is_initialized() is False
