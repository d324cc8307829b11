"""Folders that are either whole or not there: a killed process never leaves a half checkpoint to resume
from.
"""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from common.flags import Refusal

NAME = re.compile(r"checkpoint-(\d+)")


def check_output_dir(output_dir, overwrite, resume):
    """Raise ValueError for a folder that holds another run, before anything in it is touched."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise Refusal(f"--output_dir {folder} is a file.")
    taken = [name for name in ("metrics.jsonl", "summary.json", "config.json") if (folder / name).exists()]
    taken += [path.name for _, path in list_checkpoints(folder)]
    resumes_here = resume and (resume == "latest" or Path(resume).resolve().parent == folder.resolve())
    if taken and not overwrite and not resumes_here:
        raise Refusal(
            f"--output_dir {folder} holds another run ({', '.join(taken[:4])}): choose another folder, "
            "continue it with --resume_from_checkpoint latest, or replace it with --overwrite_output_dir."
        )
    if overwrite and resume:
        raise Refusal(
            "--overwrite_output_dir removes what --resume_from_checkpoint needs: drop one of the two."
        )


MODEL_FILES = ("*.safetensors*", "*config.json", "tokenizer*", "chat_template*", "vocab*", "merges.txt")


def prepare_output_dir(output_dir, step, keep=()):
    """Remove what an abandoned run left after `step` (0 for a new run): checkpoints, metrics, summary,
    model; files named in `keep` stay.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in list_checkpoints(folder):
        if number > step:  # or "latest" would go back to it
            _remove_checkpoint(path)
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        lines = metrics.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a killed run may have left half a line
        metrics.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
    # a file that the new model does not write would be read as a part of it
    for pattern in ("summary.json", *MODEL_FILES):
        for file in folder.glob(pattern):
            if file.name not in keep:
                file.unlink()


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
    """Move each file of `temporary` into `folder`, replacing what is there file by file, and remove
    `temporary`.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in sorted(Path(temporary).iterdir()):
        file.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read
        _sync(file)
        os.replace(file, Path(folder) / file.name)
    os.rmdir(temporary)


def list_checkpoints(output_dir):
    """Whole checkpoints of a run, oldest first: [(step, Path), ..]. Unfinished ones carry another name."""
    folder = Path(output_dir)
    matches = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())


def find_checkpoint(output_dir, name):
    """The folder to resume from: `name` is a path, or "latest" for the newest whole checkpoint in output_dir.

    Raises: ValueError if there is none.
    """
    if name != "latest":
        if not NAME.fullmatch(Path(name).name) or not Path(name).is_dir():
            raise Refusal(f"--resume_from_checkpoint {name}: not a folder checkpoint-<step>.")
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
        (folder / "progress.json").write_text(json.dumps(progress, indent=1))


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
