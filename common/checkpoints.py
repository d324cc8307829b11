"""Folders that are either whole or not there: a killed process never leaves a half checkpoint to resume
from.
"""

import os
import re
import shutil
from pathlib import Path

NAME = re.compile(r"checkpoint-(\d+)")


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
    # the rename may reach the disk before the data does: a power cut would leave empty files under the final
    # name
    for file in Path(temporary).rglob("*"):
        _sync(file)
    _sync(temporary)
    os.rename(temporary, path)
    _sync(Path(path).parent)


def commit_files(temporary, folder):
    """Move each file of `temporary` into `folder`, replacing what is there file by file, and remove
    `temporary`.
    """
    for file in sorted(Path(temporary).iterdir()):
        _sync(file)
        os.replace(file, Path(folder) / file.name)
    os.rmdir(temporary)


def list_checkpoints(output_dir):
    """Whole checkpoints of a run, oldest first: [(step, Path), ..]. Unfinished ones carry another name."""
    folder = Path(output_dir)
    matches = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]), path) for match, path in matches if match)


def find_checkpoint(output_dir, name):
    """The folder to resume from: `name` is a path, or "latest" for the newest whole checkpoint in output_dir.

    Raises: ValueError if there is none.
    """
    if name != "latest":
        if not NAME.fullmatch(Path(name).name) or not Path(name).is_dir():
            raise ValueError(f"--resume_from_checkpoint {name}: not a folder checkpoint-<step>.")
        return Path(name)
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        raise ValueError(f"--resume_from_checkpoint latest: no checkpoint in {output_dir}.")
    return checkpoints[-1][1]


def rotate_checkpoints(output_dir, limit):
    """Keep the newest `limit` checkpoints; None keeps all."""
    for _, path in list_checkpoints(output_dir)[: -limit if limit else 0]:
        # renamed first: a kill in the middle of rmtree must not leave a half folder that looks whole
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
