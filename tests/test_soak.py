"""A short form of benchmarks/soak.py: runs that are killed, stopped, left by a rank, and given bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORK = """
import random, sys
from pathlib import Path
import datasets
sys.path.insert(0, "benchmarks")
import bad_inputs, soak
scratch = Path(sys.argv[1])
datasets.config.HF_DATASETS_CACHE = str(scratch / "cache")
random.seed(int(sys.argv[2]))
def said(wrong):
    print("wrong:", wrong)
"""
PARTS = {
    "disturbed": """
target = soak.Target("sft_packing", 1, scratch)
killed, ended = (soak.disturbed(target, n, how) for n, how in ((2, soak.killed), (1, soak.terminated)))
assert killed["disturbed"] == 2 and ended["disturbed"] == 1 and killed["runs"] >= 1, (killed, ended)
said(killed["wrong"] + ended["wrong"])
""",
    "left": """
target = soak.Target("sft_packing", 2, scratch)
said([soak.rank_lost(target, which, random) for which in (soak.signal.SIGKILL, soak.signal.SIGSTOP)])
""",
    "bad": """
found = [soak.refused(i, bad, scratch) for i, bad in enumerate(bad_inputs.ALL[5::9])]
assert len(found) >= 7
said([each["wrong"] for each in found])
""",
    "seen": """
target = soak.Target("sft_packing", 1, scratch)
steps, weights, files = target.expected
assert len(steps) == soak.STEPS
assert len(weights) == 2 and len(weights[1]) > 2 * len(weights[0])  # the model; a checkpoint, with moments
name, content = next(iter(weights[1].items()))
changed = [weights[0], weights[1] | {name: bytes([content[0] ^ 1]) + content[1:]}]
others = [(steps[1:], weights, files), (steps, changed, files), (steps, weights, [*files, "x.tmp"])]
others.append(([{**steps[0], "loss": 0.0}, *steps[1:]], weights, files))
said([soak.difference(other, target.expected) for other in others])
bad = soak.refused(0, lambda folder: ("sft_packing", "none", ["--max_length=1"], "another message"), scratch)
assert bad["wrong"], bad
""",
}
EXPECTED = {
    "disturbed": "[]",
    "left": "[None, None]",
    "bad": str([[]] * 8),
    "seen": "['steps [2, 3, 4, 5, 6, 7, 8]', 'weights', \"files ['x.tmp']\", \"step 1: ['loss']\"]",
}


@pytest.mark.parametrize("part", PARTS)
def test_under_fire(part, tmp_path):
    """In a process of its own, which forks. "seen": that the comparison sees differences."""
    process = subprocess.run(
        [sys.executable, "-c", WORK + PARTS[part], str(tmp_path), "1"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.splitlines()[-1] == f"wrong: {EXPECTED[part]}", process.stdout + process.stderr
