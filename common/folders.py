"""The output folder: only what a run wrote is ever removed, and a checkpoint is whole or not there.

A killed process never leaves a half checkpoint to resume from.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from common import Refusal, refuse

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LEFTOVER = re.compile(r"(checkpoint-\d+|model|reference)\.(tmp|deleted)")  # what a killed run may leave
PROGRESS = "progress.json"  # in each checkpoint, by which it is known as one of ours
RECORD = "run_files.json"  # in output_dir: the names of the files in it that runs wrote
# Files that a run writes, besides its checkpoints; those of the model go by what transformers may write.
RUN_FILES = ("metrics.jsonl", "summary.json", "training.png")
MODEL_FILES = ("*.safetensors*", "*config.json", "tokenizer*", "*chat_template*", "vocab*", "merges.txt")
MODEL_FILES += ("special_tokens_map.json", "added_tokens.json", "*.model")


def check_output_dir(args, unfinished=()):
    """Raise Refusal for a folder that holds another run, a user's files or the base model, or that cannot be
    written, before anything in it is touched.

    Args: unfinished: names of files that a run writes before its first step: they alone are no other run.
    """
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    refuse(folder.exists() and not folder.is_dir(), f"--output_dir {folder} is a file.")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        cannot = f"--output_dir {folder} cannot be written: {error.strerror}. Choose another folder."
        raise Refusal(cannot) from error
    if (
        folder.is_dir()
        and Path(args.model_name_or_path).is_dir()
        and folder.samefile(args.model_name_or_path)
    ):
        raise Refusal(
            f"--output_dir {folder} is the folder of --model_name_or_path: the run would replace the model "
            "that it starts from. Choose another folder."
        )
    if resume and (resume == "latest" or Path(resume).resolve().parent == folder.resolve()):
        return
    files = {path.name for pattern in (*RUN_FILES, *MODEL_FILES) for path in folder.glob(pattern)}
    folders = {path.name for path in folder.glob("*") if CHECKPOINT.fullmatch(path.name)}
    left = {path.name for path in folder.glob("*") if LEFTOVER.fullmatch(path.name)}
    foreign = {name for name in files | folders | left if not _is_ours(folder, name)}
    taken = sorted(foreign or (files | folders) - set(unfinished))
    refuse(
        foreign,
        f"--output_dir {folder} holds files of a run's names that no run says it wrote "
        f"({', '.join(taken[:4])}): a user's, or of an earlier version. --overwrite_output_dir leaves them "
        "alone: choose another folder, or move them away.",
    )
    goes_on = "continue it with --resume_from_checkpoint latest, " if list_checkpoints(folder) else ""
    refuse(
        taken and not args.overwrite_output_dir,
        f"--output_dir {folder} holds another run ({', '.join(taken[:4])}): choose another folder, {goes_on}"
        "or replace it with --overwrite_output_dir.",
    )


def _is_ours(folder, name):
    if CHECKPOINT.fullmatch(name):
        return (folder / name / PROGRESS).is_file()
    if LEFTOVER.fullmatch(name):
        return (folder / RECORD).exists()
    return name in {Path(file).parts[0] for file in _read_record(folder)}


def _read_record(folder):
    record = Path(folder) / RECORD
    return set(json.loads(record.read_text())) if record.exists() else set()


def _write_record(folder, names):
    temporary = Path(folder) / f"{RECORD}.tmp"
    temporary.write_text(json.dumps(sorted(names), indent=1))
    os.replace(temporary, Path(folder) / RECORD)


def prepare_output_dir(output_dir, step, keep=()):
    """Remove what an abandoned run left after `step` (0 for a new run): checkpoints, metrics, summary,
    model; files named in `keep` stay, and so does every file that no run says it wrote.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in list_checkpoints(folder):
        if number > step:  # or "latest" would go back to it
            _remove_checkpoint(path)
    ours = _read_record(folder)
    for path in folder.glob("*"):  # what a kill left of a folder that was being written or deleted
        if LEFTOVER.fullmatch(path.name) and path.is_dir() and _is_ours(folder, path.name):
            shutil.rmtree(path)
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        lines = metrics.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a killed run may have left half a line
        metrics.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
    # A file that the new model does not write would be read as a part of it; a summary says that a run ended.
    for name in (ours | {"summary.json"}) - {"metrics.jsonl", *keep}:
        (folder / name).unlink(missing_ok=True)
        parent = (folder / name).parent  # of a tokenizer's folder, say
        if parent != folder and parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
    _write_record(folder, {*RUN_FILES, *(ours & set(keep))})


def fresh_folder(path):
    """Create an empty folder, removing what a killed run left under that name. Returns its Path."""
    shutil.rmtree(path, ignore_errors=True)
    path = Path(path)
    path.mkdir(parents=True)
    return path


def commit_folder(temporary, path):
    """Give a fully written folder its final name, in one step that either happened or did not.

    Raises: FileExistsError if `path` is already there.
    """
    if Path(path).exists():
        raise FileExistsError(f"{path} is already there.")
    # the rename may reach the disk before the data does: a power cut would leave empty files
    for file in Path(temporary).rglob("*"):
        _sync(file)
    _sync(temporary)
    os.rename(temporary, path)
    _sync(Path(path).parent)


def commit_files(temporary, folder):
    """Move each file of `temporary`, and of folders in it, into `folder`, replacing what is there file by
    file, and remove `temporary`.
    """
    umask = os.umask(0)
    os.umask(umask)
    temporary, folder = Path(temporary), Path(folder)
    names = [file.relative_to(temporary).as_posix() for file in temporary.rglob("*") if file.is_file()]
    # before the files, so that no kill leaves one that the record does not name
    _write_record(folder, _read_record(folder) | set(names))
    for name in sorted(names):
        (temporary / name).chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read
        _sync(temporary / name)
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(temporary / name, folder / name)
    shutil.rmtree(temporary)


def list_checkpoints(output_dir):
    """Whole checkpoints, oldest first: [(step, Path), ..]; unfinished ones have other names."""
    folder = Path(output_dir)
    matches = [(CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("*")]
    return sorted((int(match[1]), path) for match, path in matches if match and (path / PROGRESS).is_file())


def find_checkpoint(output_dir, name):
    """The folder to resume from: `name` is a path, or "latest" for the newest whole one in output_dir.

    Raises: ValueError if there is none.
    """
    if name == "latest":
        checkpoints = list_checkpoints(output_dir)
        refuse(not checkpoints, f"--resume_from_checkpoint latest: no checkpoint in {output_dir}.")
        return checkpoints[-1][1]
    known = CHECKPOINT.fullmatch(Path(name).name) and (Path(name) / PROGRESS).is_file()
    refuse(
        not known, f"--resume_from_checkpoint {name}: not a folder checkpoint-<step> of one of these scripts."
    )
    return Path(name)


def rotate_checkpoints(output_dir, limit):
    """Keep the newest `limit` checkpoints; None keeps all."""
    for _, path in list_checkpoints(output_dir)[: -limit if limit else 0]:
        _remove_checkpoint(path)


def _remove_checkpoint(path):
    """Renamed first: a kill in the middle of rmtree must not leave a half folder that looks whole."""
    trash = path.with_suffix(".deleted")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# disk full, quota, read-only, too large, no permission, broken disk
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EIO)


@contextmanager
def disk_errors_refused(output_dir):
    """What goes wrong with the disk while a run writes ends in one line that names the last good checkpoint.

    Each library has an error of its own for a full disk: safetensors, torch.save and torch's distributed
    checkpoints do not raise an OSError.
    """
    try:
        yield
    except (OSError, SafetensorError, CheckpointException, RuntimeError) as error:
        # torch's checkpoint has gathered the errors of all ranks
        ranks = error.failures.values() if isinstance(error, CheckpointException) else ()
        of_disk = [cause for cause in (error, *(c for c, _ in ranks)) if _is_of_the_disk(cause, output_dir)]
        if not of_disk:
            raise
        whole = list_checkpoints(output_dir)
        remedy = "it holds no checkpoint."
        if whole:
            remedy = f"{whole[-1][1].name} is whole: continue with --resume_from_checkpoint latest."
        reason = " ".join(str(of_disk[-1]).split())
        raise Refusal(f"--output_dir {output_dir} can no longer be written: {reason}; {remedy}") from error


def _is_of_the_disk(error, output_dir):
    folder = Path(output_dir).resolve()
    if isinstance(error, OSError):
        inside = error.filename is None or folder in Path(str(error.filename)).resolve().parents
        return inside and (error.errno in DISK_ERRORS or not folder.is_dir())
    # in words of safetensors, and of torch.save
    return any(words in str(error) for words in ("os error", "inline_container", "iostream error"))
