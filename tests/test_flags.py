"""A script's start and end: refusals are one line, mistakes in the script keep their traceback."""

import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.flags import Refusal, parse_arguments, refuse

ROOT = Path(__file__).parents[1]
SCRIPTS = ["sft_packing", "dpo_padding_free", "grpo_zero3"]


def test_a_refusal_is_a_value_error_of_its_own():
    with pytest.raises(ValueError, match="^too small$") as raised:
        refuse(True, "too small")
    assert type(raised.value) is Refusal
    refuse(False, "fine")


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_the_launcher_adds_is_taken_and_ignored(script):
    arguments = importlib.import_module(script).Arguments
    for words in (["--local_rank=1"], ["--local-rank=1"]):
        assert parse_arguments(arguments, [*words, "--seed", "3"]) == arguments(seed=3)
    with pytest.raises(Refusal, match="unknown arguments: --no_such_flag 3; --help"):
        parse_arguments(arguments, ["--no_such_flag", "3", "--seed", "3"])


def test_a_mistake_in_an_edited_script_keeps_its_traceback(tmp_path):
    """The same exception type that a refusal has: only its class tells them apart."""
    shutil.copytree(ROOT / "common", tmp_path / "common")
    source = (ROOT / "sft_packing.py").read_text()
    line = '    not_inputs = ("labels", "score_index", "score_ids")\n'
    assert source.count(line) == 1
    (tmp_path / "sft_packing.py").write_text(source.replace(line, line + "    first, second = 1, 2, 3\n"))
    number = source[: source.index(line)].count("\n") + 2
    flags = ["--model_name_or_path", ROOT / "demo/model", "--dataset_name", ROOT / "demo/sft_eval.jsonl"]
    flags += ["--output_dir", tmp_path / "out", "--max_length", "64"]
    for more in ([], ["--dry_run"]):
        command = [sys.executable, tmp_path / "sft_packing.py", *flags, *more]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 1, ended.stderr
        assert f'sft_packing.py", line {number}, in batch_nll_sum' in ended.stderr
        assert "ValueError: too many values to unpack" in ended.stderr
    command = [sys.executable, tmp_path / "sft_packing.py", *flags, "--seed", "-1"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1] == "ValueError: --seed -1: give a number >= 0."


def test_a_dry_run_names_the_line_that_reads_a_value(monkeypatch):
    import sft_packing

    plain = sft_packing.batch_nll_sum

    def edited(*args, **kwargs):
        nll = plain(*args, **kwargs)
        print(nll.item())
        return nll

    monkeypatch.setattr(sft_packing, "batch_nll_sum", edited)
    with pytest.raises(Refusal, match=r"test_flags.py:\d+: print\(nll.item\(\)\)"):
        sft_packing.main(sft_packing.Arguments(dry_run=True, max_length=64))


@pytest.mark.parametrize("script", ["sft_packing", "dpo_padding_free"])
def test_deepspeeds_launcher_runs_the_script_on_two_ranks(script, tmp_path):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    data = {"sft_packing": "sft_eval.jsonl", "dpo_padding_free": "preferences.jsonl"}[script]
    rows = (ROOT / "demo" / data).read_text().splitlines()[:16]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", str(port)]
    flags = ["--dataset_name", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out", "--max_steps", "1"]
    # deepspeed looks for the package "deepspeed" in what is installed, and for ninja beside it
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*launcher, ROOT / f"{script}.py", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["world_size"] == 2 and re.search(r"examples  16 read", done.stdout)
