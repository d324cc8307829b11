"""A checkpoint is whole or not there, however the process ends."""

import errno
import importlib
import json
import os
import shutil
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
    disk_errors_refused,
    find_checkpoint,
    fresh_folder,
    list_checkpoints,
    prepare_output_dir,
    read_training_state,
    rotate_checkpoints,
    write_training_state,
)
from common.flags import Refusal


def write(folder, **files):
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def save(output_dir, step):
    """A checkpoint of two files, as a run writes it."""
    path = Path(output_dir) / f"checkpoint-{step}"
    temporary = write(
        fresh_folder(path.with_suffix(".tmp")), **{"weights": f"w{step}", "progress.json": "{}"}
    )
    commit_folder(temporary, path)
    return path


def steps(output_dir):
    return [step for step, _ in list_checkpoints(output_dir)]


def is_whole(path):
    return sorted(file.name for file in path.iterdir()) == ["progress.json", "weights"]


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
        "run_files.json": '[\n "config",\n "weights"\n]',
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
        write(fresh_folder(tmp_path / name), **{"progress.json": "{}"})
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


def a_finished_run(folder, *files):
    """As a run leaves it: the record, metrics, a checkpoint, and `files` of its model."""
    prepare_output_dir(folder, step=0)
    write(folder, **{"metrics.jsonl": '{"step": 1}\n', "summary.json": "{}"})
    save(folder, 1)
    commit_files(write(fresh_folder(folder / "model.tmp"), **{name: "ours" for name in files}), folder)
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_runs_folder_is_taken_and_may_be_replaced_or_continued(tmp_path):
    check_output_dir(tmp_path / "missing" / "folder", overwrite=False, resume=None)
    assert not (tmp_path / "missing").exists()  # tried, and gone again
    check_output_dir(write(tmp_path, notes="mine"), overwrite=False, resume=None)
    a_finished_run(tmp_path, "config.json", "model.safetensors")
    with pytest.raises(Refusal, match="holds another run \\(metrics.jsonl, summary.json, checkpoint-1"):
        check_output_dir(tmp_path, overwrite=False, resume=None)
    check_output_dir(tmp_path, overwrite=True, resume=None)
    check_output_dir(tmp_path, overwrite=False, resume="latest")


FOREIGN = [
    "ds_config.json",
    "my_adapter.safetensors",
    "tokenizer_notes.txt",
    "vocab_sft.jsonl",
    "config.json",
]


@pytest.mark.parametrize("name", [*FOREIGN, "config.json", "metrics.jsonl", "summary.json", "checkpoint-4"])
def test_a_folder_with_a_users_files_is_taken_even_if_overwritten(name, tmp_path):
    if name == "checkpoint-4":  # another trainer's
        (tmp_path / name).mkdir()
        write(tmp_path / name, **{"trainer_state.json": "{}"})
        assert list_checkpoints(tmp_path) == []
    else:
        write(tmp_path, **{name: "mine"})
    for overwrite in (False, True):
        with pytest.raises(Refusal, match=f"no run says it wrote \\({name}\\): a user's, or of an earlier"):
            check_output_dir(tmp_path, overwrite=overwrite, resume=None)


def test_what_a_user_put_beside_a_run_outlives_it(tmp_path):
    a_finished_run(tmp_path, "config.json", "model-00001-of-00002.safetensors", "tokenizer.json")
    write(tmp_path, **{"ds_config.json": "mine", "tokenizer_notes.txt": "mine"})
    (tmp_path / "checkpoint-9").mkdir()
    write(tmp_path / "checkpoint-9", **{"trainer_state.json": "{}"})
    with pytest.raises(Refusal, match="checkpoint-9, ds_config.json, tokenizer_notes.txt"):
        check_output_dir(tmp_path, overwrite=True, resume=None)
    prepare_output_dir(tmp_path, step=0)
    kept = {"metrics.jsonl", "run_files.json", "ds_config.json", "tokenizer_notes.txt"}
    assert contents(tmp_path) == kept | {"checkpoint-9/trainer_state.json"}
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_folders_of_a_tokenizer_are_committed_and_removed(tmp_path):
    """Such as additional_chat_templates/, where a tokenizer has several named templates."""
    prepare_output_dir(tmp_path, step=0)
    for content in ("first", "second"):
        part = fresh_folder(tmp_path / "model.tmp")
        (part / "additional_chat_templates").mkdir()
        write(part / "additional_chat_templates", **{"rag.jinja": content})
        commit_files(part, tmp_path)
        assert (tmp_path / "additional_chat_templates" / "rag.jinja").read_text() == content
        assert (tmp_path / "additional_chat_templates").stat().st_mode & 0o111
        check_output_dir(tmp_path, overwrite=True, resume=None)
        with pytest.raises(Refusal, match="holds another run"):
            check_output_dir(tmp_path, overwrite=False, resume=None)
    prepare_output_dir(tmp_path, step=0)
    assert contents(tmp_path) == {"run_files.json"} and not (tmp_path / "additional_chat_templates").exists()


@pytest.mark.parametrize("name", ["model.tmp", "reference.tmp", "checkpoint-3.tmp", "checkpoint-3.deleted"])
def test_a_folder_of_a_leftovers_name_is_a_users_unless_a_run_was_here(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(Refusal, match=f"no run says it wrote \\({name}\\)"):
        check_output_dir(tmp_path, overwrite=True, resume=None)
    (tmp_path / "run_files.json").write_text("[]")
    check_output_dir(tmp_path, overwrite=False, resume=None)
    prepare_output_dir(tmp_path, step=0)
    assert contents(tmp_path) == {"run_files.json"} and not (tmp_path / name).exists()


def test_what_only_begins_like_a_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "checkpoint-5-notes").mkdir()
    check_output_dir(tmp_path, overwrite=False, resume=None)
    prepare_output_dir(tmp_path, step=0)
    assert (tmp_path / "checkpoint-5-notes").is_dir()


def test_a_reference_that_a_kill_left_is_no_other_run(tmp_path):
    write(tmp_path, **{"reference_logps.safetensors": "mine"})
    with pytest.raises(Refusal, match="no run says it wrote"):
        check_output_dir(tmp_path, overwrite=False, resume=None)
    (tmp_path / "reference_logps.safetensors").unlink()
    prepare_output_dir(tmp_path, step=0)
    commit_files(
        write(fresh_folder(tmp_path / "reference.tmp"), **{"reference_logps.safetensors": "ours"}), tmp_path
    )
    check_output_dir(tmp_path, overwrite=False, resume=None)


def test_a_resumed_run_has_no_summary_before_its_end(tmp_path):
    """Nor one of a run that left no record: it would say that all steps were done."""
    save(tmp_path, 2)
    write(tmp_path, **{"summary.json": "{}"})
    prepare_output_dir(tmp_path, step=2)
    assert not (tmp_path / "summary.json").exists()


def test_what_is_the_disks_fault_and_what_is_not(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    full, other = OSError(errno.ENOSPC, "full", f"{folder}/x"), OSError(errno.EACCES, "no", "/elsewhere/x")
    missing = OSError(errno.ENOENT, "none", f"{folder}/x")
    for error, refused in (
        (full, True),
        (OSError(errno.ENOSPC, "full"), True),
        (other, False),
        (missing, False),
    ):
        with pytest.raises(Refusal if refused else OSError):
            with disk_errors_refused(folder):
                raise error
    folder.rmdir()  # by the user, in mid-run
    with pytest.raises(Refusal, match="can no longer be written"), disk_errors_refused(folder):
        raise missing
    with pytest.raises(ValueError, match="too many"), disk_errors_refused(folder):
        raise ValueError("too many values to unpack")


def test_a_file_that_a_kill_left_behind_is_in_the_record(tmp_path):
    prepare_output_dir(tmp_path, step=0)
    action = "import os; os.replace = lambda a, b: die() if 'b.json' in str(b) else os.rename(a, b)\n"
    action += "files = {'a_config.json': '1', 'b.json': '2'}\n"
    action += (
        "checkpoints.commit_files(write(checkpoints.fresh_folder(folder / 'model.tmp'), **files), folder)"
    )
    run_until_killed(tmp_path, action)
    assert (tmp_path / "a_config.json").exists()
    prepare_output_dir(tmp_path, step=0)
    assert not (tmp_path / "a_config.json").exists()


def test_what_kills_left_of_checkpoints_is_cleared_at_the_next_start(tmp_path):
    a_finished_run(tmp_path)
    save(tmp_path, 2)
    action = "checkpoints.shutil.rmtree = die_halfway; checkpoints.rotate_checkpoints(folder, 1)"
    run_until_killed(tmp_path, action)
    fresh_folder(tmp_path / "checkpoint-3.tmp")
    assert (tmp_path / "checkpoint-1.deleted").is_dir()
    prepare_output_dir(tmp_path, step=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]


def test_a_file_as_folder_and_two_wishes_at_once_are_refused(tmp_path):
    write(tmp_path, file="x")
    with pytest.raises(ValueError, match="is a file"):
        check_output_dir(tmp_path / "file", overwrite=True, resume=None)
    for folder in (tmp_path / "file" / "below", Path("/proc/nowhere/run")):
        with pytest.raises(
            Refusal, match=f"--output_dir {folder} cannot be written: .*Choose another folder"
        ):
            check_output_dir(folder, overwrite=False, resume=None)
    with pytest.raises(ValueError, match="drop one of the two"):
        check_output_dir(tmp_path, overwrite=True, resume="latest")


def test_resuming_drops_the_metrics_of_later_steps(tmp_path):
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "lo')  # killed in mid-line
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "run_files.json").write_text('["metrics.jsonl", "summary.json"]')
    save(tmp_path, 2)
    prepare_output_dir(tmp_path, step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2])
    assert not (tmp_path / "summary.json").exists() and steps(tmp_path) == [2]


@pytest.mark.parametrize("script", ["sft_packing", "dpo_padding_free", "grpo_zero3"])
@pytest.mark.parametrize("flags", [{"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}, {}])
def test_the_base_models_folder_is_no_output_folder(flags, script, tmp_path):
    module = importlib.import_module(script)
    model = tmp_path / "model"
    shutil.copytree(Path(__file__).parents[1] / "demo" / "model", model)
    save(model, 1)
    before = contents(model)
    (tmp_path / "link").symlink_to(model)
    for name in (model, tmp_path / "link"):
        args = module.Arguments(model_name_or_path=str(name), output_dir=f"{model}/", **flags)
        with pytest.raises(Refusal, match="is the folder of --model_name_or_path"):
            module.main(args)
    assert contents(model) == before


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path.insert(0, {root!r})
import {script} as script
from common.flags import run_script

def main(args):
    # as on a full disk, writing fails: here in files of more than a MiB, which only those of weights are
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    script.main(args)

if {full}:
    sys.argv[1:] = {flags!r}
    run_script(main, script.Arguments)
else:
    script.main(script.Arguments(**{settings!r}))
"""


@pytest.mark.parametrize("script", ["sft_packing", "grpo_zero3"])
def test_a_full_disk_ends_in_one_line_that_names_the_last_checkpoint(script, tmp_path):
    settings = {"output_dir": str(tmp_path), "save_steps": 1, "max_steps": 1}
    if script == "sft_packing":
        settings["max_length"] = 64
    else:
        settings |= {"max_completion_length": 2, "per_device_train_batch_size": 8}

    def run(full):
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        root = str(Path(__file__).parents[1])
        code = FULL.format(root=root, script=script, full=full, flags=flags, settings=settings)
        # DeepSpeed looks for ninja on PATH, and may have to compile first
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)

    done = run(full=False)
    assert done.returncode == 0, done.stderr
    settings |= {"max_steps": 2, "resume_from_checkpoint": "latest"}
    ended = run(full=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert f"ValueError: --output_dir {tmp_path} can no longer be written: " in ended.stderr
    assert "checkpoint-1 is whole: continue with --resume_from_checkpoint latest." in ended.stderr
    assert steps(tmp_path) == [1]


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
