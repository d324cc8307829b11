"""Folders that are either whole or not there: a killed process never leaves a half checkpoint to resume
from.
"""

import errno
import json
import os
import re
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from common import Refusal
from common.reference import REFERENCE

NAME = re.compile(r"checkpoint-(\d+)")
LEFTOVER = re.compile(r"(checkpoint-\d+|model|reference)\.(tmp|deleted)")  # what a killed run may leave
PROGRESS = "progress.json"  # in each checkpoint, by which it is known as one of ours


def check_output_dir(output_dir, overwrite, resume, model_name=None):
    """Raise Refusal for a folder that holds another run, a user's files or the base model, or that cannot be
    written, before anything in it is touched.

    Args: overwrite, resume: the flags --overwrite_output_dir, --resume_from_checkpoint; model_name: the base.
    """
    folder = Path(output_dir)
    if overwrite and resume:
        raise Refusal(
            "--overwrite_output_dir removes what --resume_from_checkpoint needs: drop one of the two."
        )
    _try_to_write(folder)
    if model_name and folder.is_dir() and Path(model_name).is_dir() and folder.samefile(model_name):
        raise Refusal(
            f"--output_dir {folder} is the folder of --model_name_or_path: the run would replace the model "
            "that it starts from. Choose another folder."
        )
    resumes_here = resume and (resume == "latest" or Path(resume).resolve().parent == folder.resolve())
    taken = _taken_names(folder)
    foreign = [name for name in taken if not _is_ours(folder, name)]
    if foreign and not resumes_here:
        raise Refusal(
            f"--output_dir {folder} holds files of a run's names that no run says it wrote "
            f"({', '.join(foreign[:4])}): a user's, or of an earlier version. --overwrite_output_dir leaves "
            "them alone: choose another folder, or move them away."
        )
    if taken and not overwrite and not resumes_here:
        raise Refusal(
            f"--output_dir {folder} holds another run ({', '.join(taken[:4])}): choose another folder, "
            "continue it with --resume_from_checkpoint latest, or replace it with --overwrite_output_dir."
        )


# Files that a run writes, besides its checkpoints; those of the model go by what transformers may write.
RUN_FILES = ("metrics.jsonl", "summary.json")
MODEL_FILES = ("*.safetensors*", "*config.json", "tokenizer*", "*chat_template*", "vocab*", "merges.txt")
MODEL_FILES += ("special_tokens_map.json", "added_tokens.json", "*.model")
RECORD = "run_files.json"  # in output_dir: the names of the files in it that runs wrote


def _taken_names(folder):
    """Names in the folder that a run may write, or would have to remove: its own, or a user's.

    Not what a run that was killed before its first step has left: the next one clears it, or goes on with it.
    """
    files = {path.name for pattern in (*RUN_FILES, *MODEL_FILES) for path in folder.glob(pattern)}
    started = {name for name in files if name != REFERENCE or not _is_ours(folder, name)}
    folders = {path.name for path in folder.glob("*") if NAME.fullmatch(path.name)}
    left = {path.name for path in folder.glob("*") if LEFTOVER.fullmatch(path.name)}
    folders |= {name for name in left if not _is_ours(folder, name)}
    return sorted(started & set(RUN_FILES)) + sorted(folders) + sorted(started - set(RUN_FILES))


def _is_ours(folder, name):
    """Whether a run wrote this: a file that the record names, or a checkpoint of these scripts."""
    if NAME.fullmatch(name):
        return (folder / name / PROGRESS).is_file()
    if LEFTOVER.fullmatch(name):
        return (folder / RECORD).exists()
    return name in {Path(file).parts[0] for file in _read_record(folder)}


def _read_record(folder):
    try:
        return set(json.loads((Path(folder) / RECORD).read_text()))
    except FileNotFoundError:
        return set()


def _write_record(folder, names):
    temporary = Path(folder) / f"{RECORD}.tmp"
    temporary.write_text(json.dumps(sorted(names), indent=1))
    os.replace(temporary, Path(folder) / RECORD)


def _try_to_write(folder):
    """Raise Refusal unless files can be written in the folder, or where it would be made; leaves no trace."""
    try:
        if folder.exists() and not folder.is_dir():
            raise Refusal(f"--output_dir {folder} is a file.")
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        raise Refusal(
            f"--output_dir {folder} cannot be written: {error.strerror}. Choose another folder."
        ) from error


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
        of_disk = [cause for cause in _causes(error) if _is_of_the_disk(cause, output_dir)]
        if not of_disk:
            raise
        whole = list_checkpoints(output_dir)
        remedy = "it holds no checkpoint."
        if whole:
            remedy = f"{whole[-1][1].name} is whole: continue with --resume_from_checkpoint latest."
        reason = " ".join(str(of_disk[-1]).split())
        raise Refusal(f"--output_dir {output_dir} can no longer be written: {reason}; {remedy}") from error


def _causes(error):
    """The errors of all ranks, where torch's checkpoint has gathered them."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    return [error, *(cause for cause, _ in failures)]


def _is_of_the_disk(error, output_dir):
    folder = Path(output_dir).resolve()
    if isinstance(error, OSError):
        inside = error.filename is None or folder in Path(str(error.filename)).resolve().parents
        return inside and (error.errno in DISK_ERRORS or not folder.is_dir())
    # in words of safetensors, and of torch.save
    return any(words in str(error) for words in ("os error", "inline_container", "iostream error"))


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
        if LEFTOVER.fullmatch(path.name) and _is_ours(folder, path.name):
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
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    names = [file.relative_to(temporary).as_posix() for file in files]
    # before the files, so that no kill leaves one that the record does not name
    _write_record(folder, _read_record(folder) | set(names))
    for file, name in zip(files, names):
        file.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read
        _sync(file)
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(file, folder / name)
    shutil.rmtree(temporary)


def list_checkpoints(output_dir):
    """Whole checkpoints of these scripts, oldest first: [(step, Path), ..]. Unfinished ones carry another
    name.
    """
    folder = Path(output_dir)
    matches = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]), path) for match, path in matches if match and (path / PROGRESS).is_file())


def find_checkpoint(output_dir, name):
    """The folder to resume from: `name` is a path, or "latest" for the newest whole checkpoint in output_dir.

    Raises: ValueError if there is none.
    """
    if name != "latest":
        if not NAME.fullmatch(Path(name).name) or not (Path(name) / PROGRESS).is_file():
            raise Refusal(
                f"--resume_from_checkpoint {name}: not a folder checkpoint-<step> of one of these scripts."
            )
        return Path(name)
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        raise Refusal(f"--resume_from_checkpoint latest: no checkpoint in {output_dir}.")
    return checkpoints[-1][1]


def rotate_checkpoints(output_dir, limit):
    """Keep the newest `limit` checkpoints; None keeps all."""
    for _, path in list_checkpoints(output_dir)[: -limit if limit else 0]:
        _remove_checkpoint(path)


def write_training_state(folder, tensors, progress, rank):
    """Write one rank's part of a checkpoint into an existing folder; the first rank adds what all share.

    Args:    tensors: name -> plain or sharded tensor, the same names on all ranks; progress: anything JSON
             holds.
    Files:   shard-*.safetensors, random_state_<rank>.rng (safetensors too), progress.json. Nothing is
    pickled.
    """
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # true of one process, and meant
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    random_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    save_file(random_state, folder / f"random_state_{rank}.rng")
    if rank == 0:
        (folder / PROGRESS).write_text(json.dumps(progress, indent=1))


def read_training_state(folder, tensors, rank):
    """Fill `tensors` in place, whatever the number of ranks that wrote them, and set this rank's random
    state.

    A rank that the earlier run did not have keeps the random state of its seed.
    """
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    reader = HuggingFaceStorageReader(str(folder))
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    file = folder / f"random_state_{rank}.rng"
    if file.exists():
        random_state = load_file(file)
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state and torch.cuda.is_available():
            torch.cuda.set_rng_state(random_state["cuda"])


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
