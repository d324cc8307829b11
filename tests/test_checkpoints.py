"""A checkpoint is whole or not there, however the process ends."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoints import (
    check_output_dir,
    commit_files,
    commit_folder,
    find_checkpoint,
    fresh_folder,
    list_checkpoints,
    prepare_output_dir,
    read_training_state,
    rotate_checkpoints,
    write_training_state,
)


def write(folder, **files):
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def save(output_dir, step):
    """A checkpoint of two files, as a run writes it."""
    path = Path(output_dir) / f"checkpoint-{step}"
    commit_folder(write(fresh_folder(path.with_suffix(".tmp")), weights=f"w{step}", progress="{}"), path)
    return path


def steps(output_dir):
    return [step for step, _ in list_checkpoints(output_dir)]


def is_whole(path):
    return sorted(file.name for file in path.iterdir()) == ["progress", "weights"]


# --- Folders ---


def test_a_saved_checkpoint_holds_what_was_written(tmp_path):
    path = save(tmp_path / "run", 3)
    assert (path / "weights").read_text() == "w3"
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["checkpoint-3"]


def test_a_fresh_folder_is_empty(tmp_path):
    folder = write(fresh_folder(tmp_path / "a" / "b"), old="x")
    assert folder == tmp_path / "a" / "b"
    assert list(fresh_folder(str(folder)).iterdir()) == []


def test_an_existing_checkpoint_is_never_replaced(tmp_path):
    path = save(tmp_path, 3)
    temporary = write(fresh_folder(tmp_path / "checkpoint-3.tmp"), weights="other")
    with pytest.raises(FileExistsError, match="checkpoint-3"):
        commit_folder(temporary, path)
    assert (path / "weights").read_text() == "w3"


def test_folders_within_a_checkpoint_are_committed(tmp_path):
    temporary = fresh_folder(tmp_path / "checkpoint-1.tmp")
    write(fresh_folder(temporary / "inner"), weights="w")
    commit_folder(temporary, tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1/inner/weights").read_text() == "w"


def test_files_replace_files_of_the_same_name_only(tmp_path):
    folder = write(fresh_folder(tmp_path / "run"), config="old", metrics="kept")
    temporary = write(fresh_folder(tmp_path / "model.tmp"), config="new", weights="new")
    commit_files(temporary, folder)
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "config": "new",
        "metrics": "kept",
        "weights": "new",
    }
    assert not temporary.exists()


def test_checkpoints_are_listed_by_number(tmp_path):
    assert list_checkpoints(tmp_path / "missing") == []
    for step in (10, 9, 100):
        save(tmp_path, step)
    for name in (
        "checkpoint-8.tmp",
        "checkpoint-7.deleted",
        "checkpoint-",
        "checkpoint-x",
        "my-checkpoint-5",
    ):
        fresh_folder(tmp_path / name)
    assert list_checkpoints(tmp_path) == [(n, tmp_path / f"checkpoint-{n}") for n in (9, 10, 100)]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-100"
    assert find_checkpoint(tmp_path, f"{tmp_path}/checkpoint-9/") == tmp_path / "checkpoint-9"


@pytest.mark.parametrize("name", ["latest", "checkpoint-1", "checkpoint-2.tmp", "."])
def test_nothing_to_resume_from(name, tmp_path):
    fresh_folder(tmp_path / "checkpoint-2.tmp")
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint .*{name}"):
        find_checkpoint(tmp_path, name if name == "latest" else str(tmp_path / name))


@pytest.mark.parametrize("limit, kept", [(None, [1, 2, 10]), (1, [10]), (2, [2, 10]), (5, [1, 2, 10])])
def test_rotation_keeps_the_newest(limit, kept, tmp_path):
    for step in (2, 10, 1):
        save(tmp_path, step)
    rotate_checkpoints(tmp_path, limit)
    assert steps(tmp_path) == kept
    assert len(list(tmp_path.iterdir())) == len(kept)


# --- Processes that are killed ---

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from common import checkpoints
from test_checkpoints import save, write

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def die_halfway(path, **kwargs):  # instead of shutil.rmtree
    if Path(path).exists():
        (Path(path) / "weights").unlink()
        die()

folder = Path({folder!r})
{action}
"""
FOLDERS = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]


def run_until_killed(folder, action):
    code = KILLED.format(paths=FOLDERS, folder=str(folder), action=action)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.parametrize(
    "action",
    [
        "write(checkpoints.fresh_folder(folder / 'checkpoint-2.tmp'), weights='half'); die()",
        "checkpoints.os.rename = die; save(folder, 2)",
    ],
    ids=["while writing", "just before the rename"],
)
def test_killed_before_the_commit_nothing_is_listed_and_the_rest_is_replaced(action, tmp_path):
    save(tmp_path, 1)
    run_until_killed(tmp_path, action)
    assert (tmp_path / "checkpoint-2.tmp").is_dir()
    assert steps(tmp_path) == [1]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    assert is_whole(save(tmp_path, 2)) and steps(tmp_path) == [1, 2]
    assert not (tmp_path / "checkpoint-2.tmp").exists()


def test_killed_while_rotating_no_half_checkpoint_is_listed(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    run_until_killed(
        tmp_path, "checkpoints.shutil.rmtree = die_halfway; checkpoints.rotate_checkpoints(folder, 1)"
    )
    assert steps(tmp_path) == [2, 3]
    assert all(is_whole(path) for _, path in list_checkpoints(tmp_path))
    rotate_checkpoints(tmp_path, 1)
    assert steps(tmp_path) == [3]


def test_killed_while_overwriting_no_half_checkpoint_is_listed(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    run_until_killed(
        tmp_path, "checkpoints.shutil.rmtree = die_halfway; checkpoints.prepare_output_dir(folder, 0)"
    )
    assert all(is_whole(path) for _, path in list_checkpoints(tmp_path))


# --- The output folder ---


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "config.json", "checkpoint-4"])
def test_another_runs_folder_is_refused(name, tmp_path):
    check_output_dir(tmp_path / "missing", overwrite=False, resume=None)
    check_output_dir(write(tmp_path, notes="mine"), overwrite=False, resume=None)
    if name == "checkpoint-4":
        save(tmp_path, 4)
    else:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"holds another run \\({name}\\)"):
        check_output_dir(tmp_path, overwrite=False, resume=None)
    check_output_dir(tmp_path, overwrite=True, resume=None)
    check_output_dir(tmp_path, overwrite=False, resume="latest")


def test_a_file_as_folder_and_two_wishes_at_once_are_refused(tmp_path):
    write(tmp_path, file="x")
    with pytest.raises(ValueError, match="is a file"):
        check_output_dir(tmp_path / "file", overwrite=True, resume=None)
    with pytest.raises(ValueError, match="drop one of the two"):
        check_output_dir(tmp_path, overwrite=True, resume="latest")


def test_resuming_drops_the_metrics_of_later_steps(tmp_path):
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "lo')  # killed in mid-line
    (tmp_path / "summary.json").write_text("{}")
    save(tmp_path, 2)
    prepare_output_dir(tmp_path, step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2])
    assert not (tmp_path / "summary.json").exists() and steps(tmp_path) == [2]


def test_overwriting_leaves_nothing_of_the_other_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    save(tmp_path, 1)
    prepare_output_dir(tmp_path, step=0)
    assert steps(tmp_path) == [] and (tmp_path / "metrics.jsonl").read_text() == ""
    prepare_output_dir(tmp_path / "new" / "folder", step=0)
    assert (tmp_path / "new" / "folder").is_dir()


# --- The training state ---


def test_a_training_state_comes_back(tmp_path):
    tensors = {
        "weight.a": torch.randn(3, 5),
        "exp_avg.a": torch.randn(3, 5).bfloat16(),
        "step": torch.tensor(7.0),
    }
    torch.manual_seed(1)
    write_training_state(tmp_path, tensors, {"step": 7, "seen": [1, 2]}, rank=0)
    expected = torch.rand(4)
    assert json.loads((tmp_path / "progress.json").read_text()) == {"step": 7, "seen": [1, 2]}
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".pt", ".bin", ".pkl", ".distcp")]

    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    torch.manual_seed(2)
    read_training_state(tmp_path, loaded, rank=0)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert torch.equal(torch.rand(4), expected)

    torch.manual_seed(3)
    seeded = torch.rand(4)
    torch.manual_seed(3)
    read_training_state(tmp_path, loaded, rank=1)  # a rank that the earlier run did not have
    assert torch.equal(torch.rand(4), seeded)
