"""Runs of any of the three scripts, one after another on the same ranks; <folder>/jobs.json lists them:
{name: [script, flags]}. What each one returned or raised goes to <folder>/results<rank>.json.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def run(script, flags):
    script = importlib.import_module(script)
    try:
        return {"returned": script.main(script.Arguments(**flags))}
    except (ValueError, FloatingPointError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    # DeepSpeed's launcher puts --local_rank before what it was given
    folder, rank = Path(sys.argv[-1]), int(os.environ["RANK"])
    # once: a second group from the launcher's store would meet the addresses of the first
    torch.distributed.init_process_group("gloo")
    torch.distributed.destroy_process_group = lambda: None
    jobs = json.loads((folder / "jobs.json").read_text())
    results = {name: run(*job) for name, job in jobs.items()}
    (folder / f"results{rank}.json").write_text(json.dumps(results))
