"""Several runs of grpo_zero3.main, one after another on the same two ranks; <folder>/jobs.json lists them.

A job: flags; optionally copy ([from, to, step]: a run cut off after a step), sigterm (the rank that receives
it, in the middle of the job's second rollout), freeze (helpers.freeze_first). Results go to
<folder>/results<rank>.json.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import freeze_first  # noqa: E402

import grpo_zero3  # noqa: E402


def cut_after(run_folder, step, folder):
    """A copy of a run as it stood after `step`."""
    shutil.copytree(run_folder, folder)
    for checkpoint in Path(folder).glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    metrics = Path(folder) / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[: step + 1]))
    for file in Path(folder).glob("*.safetensors"):
        file.unlink()


def run(job, rank):
    if "copy" in job:
        source, target, step = job["copy"]
        ready = Path(f"{target}.ready")
        if rank == 0:
            cut_after(source, step, target)
            ready.touch()
        while not ready.exists():
            time.sleep(0.01)
    generate, calls = grpo_zero3.generate, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 and job.get("sigterm") == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(*args, **kwargs)

    grpo_zero3.generate, patch = interrupted, pytest.MonkeyPatch()
    if "freeze" in job:
        freeze_first(grpo_zero3, patch)
    try:
        return {"returned": grpo_zero3.main(grpo_zero3.Arguments(**job["flags"]))}
    except (ValueError, FloatingPointError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        grpo_zero3.generate = generate
        patch.undo()


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    results = {}
    # once: a second group from the launcher's store would meet the addresses of the first
    torch.distributed.init_process_group("gloo")
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        results[name] = run(job, rank)
    (folder / f"results{rank}.json").write_text(json.dumps(results))
