"""A user's files are never removed, and a checkpoint is whole or not there, however the process ends."""

import errno
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import alone_on_the_cpu

import sft_packing
from common import Refusal
from common.folders import (
    RUN_FILES,
    check_output_dir,
    commit_files,
    commit_folder,
    disk_errors_refused,
    find_checkpoint,
    fresh_folder,
    list_checkpoints,
    prepare_output_dir,
    rotate_checkpoints,
)
from common.run import parse_arguments, run_script


def write(folder, **files):
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def save(output_dir, step):
    """A checkpoint of two files, as a run writes it."""
    path = Path(output_dir) / f"checkpoint-{step}"
    files = {"weights": f"w{step}", "progress.json": "{}"}
    commit_folder(write(fresh_folder(path.with_suffix(".tmp")), **files), path)
    return path


def check(folder, overwrite=False, resume=None, unfinished=(), model="a/hub-name"):
    flags = {"overwrite_output_dir": overwrite, "resume_from_checkpoint": resume, "model_name_or_path": model}
    check_output_dir(SimpleNamespace(output_dir=str(folder), **flags), unfinished)


def steps(output_dir):
    return [step for step, _ in list_checkpoints(output_dir)]


def is_whole(path):
    return sorted(file.name for file in path.iterdir()) == ["progress.json", "weights"]


def contents(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- Checkpoints ---


def test_checkpoints_are_listed_by_number_and_never_replaced(tmp_path):
    assert list_checkpoints(tmp_path / "missing") == []
    for step in (10, 9, 100):
        save(tmp_path, step)
    others = ("checkpoint-8.tmp", "checkpoint-7.deleted", "checkpoint-", "checkpoint-x", "my-checkpoint-5")
    for name in others:
        write(fresh_folder(tmp_path / name), **{"progress.json": "{}"})
    assert list_checkpoints(tmp_path) == [(n, tmp_path / f"checkpoint-{n}") for n in (9, 10, 100)]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-100"
    assert find_checkpoint(tmp_path, f"{tmp_path}/checkpoint-9/") == tmp_path / "checkpoint-9"
    for name in ("checkpoint-1", "checkpoint-8.tmp", "checkpoint-x", "."):
        with pytest.raises(Refusal, match=f"--resume_from_checkpoint {tmp_path}/{name}: not a folder"):
            find_checkpoint(tmp_path, f"{tmp_path}/{name}")
    with pytest.raises(Refusal, match="--resume_from_checkpoint latest: no checkpoint in"):
        find_checkpoint(tmp_path / "checkpoint-8.tmp", "latest")
    temporary = fresh_folder(tmp_path / "checkpoint-9.tmp")
    write(fresh_folder(temporary / "inner"), weights="other")
    with pytest.raises(FileExistsError, match="checkpoint-9"):
        commit_folder(temporary, tmp_path / "checkpoint-9")
    assert is_whole(tmp_path / "checkpoint-9") and (tmp_path / "checkpoint-9/weights").read_text() == "w9"
    commit_folder(temporary, tmp_path / "checkpoint-11")
    assert contents(tmp_path / "checkpoint-11") == {"inner/weights"} and not temporary.exists()


def test_rotation_keeps_the_newest(tmp_path):
    for step in (2, 10, 1):
        save(tmp_path, step)
    for limit, kept in ((None, [1, 2, 10]), (5, [1, 2, 10]), (2, [2, 10]), (1, [10])):
        rotate_checkpoints(tmp_path, limit)
        assert steps(tmp_path) == kept and len(list(tmp_path.iterdir())) == len(kept)


# --- Processes that are killed ---


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_halfway(path, **_):
    """shutil.rmtree, killed after the first file."""
    if Path(path).exists():
        (Path(path) / "weights").unlink()
        die()


def killed(module, name, replacement, function, *args):
    """Run function in a process of its own, with module.name replaced by what kills it."""
    child = os.fork()
    if child == 0:
        setattr(module, name, replacement)
        try:
            function(*args)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_before_the_commit_nothing_is_listed_and_the_rest_is_replaced(tmp_path):
    save(tmp_path, 1)
    killed(os, "rename", die, save, tmp_path, 2)
    assert (tmp_path / "checkpoint-2.tmp").is_dir()
    assert steps(tmp_path) == [1] and find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    assert is_whole(save(tmp_path, 2)) and steps(tmp_path) == [1, 2]
    assert not (tmp_path / "checkpoint-2.tmp").exists()


def test_killed_while_removing_no_half_checkpoint_is_listed_and_the_next_start_clears_it(tmp_path):
    prepare_output_dir(tmp_path, step=0)
    for step in (1, 2, 3):
        save(tmp_path, step)
    killed(shutil, "rmtree", die_halfway, rotate_checkpoints, tmp_path, 1)
    assert (tmp_path / "checkpoint-1.deleted").is_dir() and steps(tmp_path) == [2, 3]
    killed(shutil, "rmtree", die_halfway, prepare_output_dir, tmp_path, 0)  # overwriting
    assert all(is_whole(path) for _, path in list_checkpoints(tmp_path))
    fresh_folder(tmp_path / "checkpoint-4.tmp")
    prepare_output_dir(tmp_path, step=3)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3"}


def test_a_file_that_a_kill_left_behind_is_in_the_record(tmp_path):
    prepare_output_dir(tmp_path, step=0)
    temporary = write(fresh_folder(tmp_path / "model.tmp"), **{"a_config.json": "1", "b.json": "2"})
    replace = lambda a, b: die() if "b.json" in str(b) else os.rename(a, b)  # noqa: E731
    killed(os, "replace", replace, commit_files, temporary, tmp_path)
    assert (tmp_path / "a_config.json").exists()
    prepare_output_dir(tmp_path, step=0)
    assert contents(tmp_path) == {"run_files.json"}


# --- The output folder ---


def commit(folder, name, content="ours"):
    """One file of the model, as a run writes it."""
    temporary = fresh_folder(folder / "model.tmp")
    (temporary / name).parent.mkdir(exist_ok=True)
    commit_files(write(temporary, **{name: content}), folder)


def a_finished_run(folder, *files):
    """As a run leaves it: the record, metrics, a checkpoint, and `files` of its model."""
    prepare_output_dir(folder, step=0)
    write(folder, **{"metrics.jsonl": '{"step": 1}\n', "summary.json": "{}"})
    save(folder, 1)
    for name in files:
        commit(folder, name)
    return folder


def test_a_finished_runs_folder_is_taken_and_may_be_replaced_or_continued(tmp_path):
    check(tmp_path / "missing" / "folder")
    assert not (tmp_path / "missing").exists()
    check(write(tmp_path, notes="mine"))
    a_finished_run(tmp_path, "config.json", "model.safetensors")
    with pytest.raises(Refusal, match="holds another run \\(checkpoint-1, config.json, metrics.jsonl, model"):
        check(tmp_path)
    check(tmp_path, overwrite=True)
    check(tmp_path, resume="latest")
    check(tmp_path, resume=f"{tmp_path}/checkpoint-1")
    with pytest.raises(Refusal, match="holds another run"):
        check(tmp_path, resume="elsewhere/checkpoint-1")


FOREIGN = ["ds_config.json", "my_adapter.safetensors", "tokenizer_notes.txt", "vocab_sft.jsonl"]
FOREIGN += ["metrics.jsonl", "summary.json", "training.png", "checkpoint-4/trainer_state.json"]
FOREIGN += ["model.tmp/x", "reference.tmp/x", "checkpoint-3.deleted/x"]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_a_users_files_is_taken_even_if_overwritten(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write(tmp_path, **{name: "mine"})
    assert list_checkpoints(tmp_path) == []
    first = name.split("/")[0]
    for overwrite in (False, True):
        with pytest.raises(Refusal, match=f"no run says it wrote \\({first}\\): a user's, or of an earlier"):
            check(tmp_path, overwrite)
    # Beside a run it outlives that run, but for folders of names that a killed run may leave.
    prepare_output_dir(a_finished_run(tmp_path, "model-00001-of-00002.safetensors", "merges.txt"), step=0)
    leftover = first.endswith((".tmp", ".deleted"))
    later = {name} - ({name} if leftover else {*RUN_FILES})
    assert contents(tmp_path) == {"metrics.jsonl", "run_files.json"} | later
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_what_no_run_would_write_is_in_nobodys_way(tmp_path):
    for name in ("checkpoint-5-notes/x", "my-checkpoint-5/x", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, **{name: "mine"})
    before = contents(tmp_path)
    check(tmp_path)
    prepare_output_dir(tmp_path, step=0)
    assert contents(tmp_path) == {"run_files.json", *before}


def test_committed_files_replace_those_of_their_names_and_go_with_their_run(tmp_path):
    """Folders too, such as additional_chat_templates/, where a tokenizer has several named templates."""
    prepare_output_dir(write(tmp_path, notes="mine"), step=0)
    for content in ("first", "second"):
        for name in ("config.json", "templates/rag.jinja"):
            commit(tmp_path, name, content)
            assert (tmp_path / name).read_text() == content
            assert name in json.loads((tmp_path / "run_files.json").read_text())
        assert (tmp_path / "notes").read_text() == "mine" and not (tmp_path / "model.tmp").exists()
        assert (tmp_path / "templates").stat().st_mode & 0o111
        check(tmp_path, overwrite=True)
    prepare_output_dir(tmp_path, step=0)
    assert {path.name for path in tmp_path.iterdir()} == {"run_files.json", "notes"}


def test_what_is_written_before_the_first_step_is_no_other_run(tmp_path):
    name = "reference_logps.safetensors"
    prepare_output_dir(tmp_path, step=0)
    commit(tmp_path, name)
    check(tmp_path, unfinished=[name])
    with pytest.raises(Refusal, match="holds another run"):
        check(tmp_path)
    for _ in range(2):  # it is still in the record
        prepare_output_dir(tmp_path, step=0, keep=[name])
        assert contents(tmp_path) == {name, "run_files.json"}
    prepare_output_dir(tmp_path, step=0)
    assert contents(tmp_path) == {"run_files.json"}


@pytest.mark.parametrize("recorded", [True, False])
def test_a_resumed_run_has_neither_later_metrics_nor_a_summary(recorded, tmp_path):
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    files = {"metrics.jsonl": "".join(lines) + '{"step": 4, "lo', "summary.json": "{}"}  # killed in mid-line
    write(tmp_path, **files | ({"run_files.json": json.dumps(sorted(files))} if recorded else {}))
    for step in (2, 3):
        save(tmp_path, step)
    prepare_output_dir(tmp_path, step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2])
    assert not (tmp_path / "summary.json").exists() and steps(tmp_path) == [2]


def test_the_base_models_folder_is_no_output_folder(tmp_path):
    model = write(fresh_folder(tmp_path / "model"), **{"config.json": "{}"})
    save(model, 1)
    (tmp_path / "link").symlink_to(model)
    for flags in ({"overwrite": True}, {"resume": "latest"}, {}):
        for name in (model, tmp_path / "link"):
            with pytest.raises(Refusal, match="is the folder of --model_name_or_path"):
                check(f"{model}/", model=str(name), **flags)


# --- Disks ---


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    write(tmp_path, file="x")
    with pytest.raises(Refusal, match="is a file"):
        check(tmp_path / "file", overwrite=True)
    for folder in (tmp_path / "file" / "below", Path("/proc/nowhere/run")):
        message = f"--output_dir {folder} cannot be written: .*Choose another folder"
        with pytest.raises(Refusal, match=message):
            check(folder)


def test_what_is_the_disks_fault_and_what_is_not(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    missing = OSError(errno.ENOENT, "none", f"{folder}/x")
    for error, refused in (
        (OSError(errno.ENOSPC, "full", f"{folder}/x"), True),
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.EACCES, "no", "/elsewhere/x"), False),
        (missing, False),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos"), True),
        (RuntimeError("shapes"), False),
        (ValueError("too many values to unpack"), False),
    ):
        with pytest.raises(Refusal if refused else type(error)) as raised, disk_errors_refused(folder):
            raise error
        assert refused or raised.value is error
    folder.rmdir()  # by the user, in mid-run
    with pytest.raises(Refusal, match="can no longer be written: .*it holds no checkpoint"):
        with disk_errors_refused(folder):
            raise missing


def test_a_full_disk_ends_in_one_line_that_names_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    flags = [f"--output_dir={tmp_path}", "--save_steps=1", "--max_length=64", "--no_check_exact"]
    with alone_on_the_cpu(tmp_path / "cache"):
        sft_packing.main(parse_arguments(sft_packing.Arguments, [*flags, "--max_steps=1"]))
        monkeypatch.setattr(sys, "argv", ["x", *flags, "--max_steps=2", "--resume_from_checkpoint=latest"])
        # as on a full disk, writing fails: here in files of more than a MiB, which only those of weights are
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
        try:
            with pytest.raises(SystemExit, match="2"):
                run_script(sft_packing.main, sft_packing.Arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"ValueError: --output_dir {tmp_path} can no longer be written: ")
    assert line.endswith("checkpoint-1 is whole: continue with --resume_from_checkpoint latest.")
    assert steps(tmp_path) == [1]
