"""What stands on the screen before the first step."""

import sys

from common.report import bold, describe_start
from sft_packing import Arguments

DATA = {"examples_read": 100, "examples_used": 88, "columns_unused": []}


class Terminal:
    @staticmethod
    def isatty():
        return True


def test_what_is_cut_is_counted_and_bold_above_a_tenth(monkeypatch):
    args = Arguments(max_length=64)
    assert describe_start(args, DATA, 10) == "examples  100 read; --max_length 64"
    data = DATA | {"examples_truncated": 11, "examples_unscored": 10, "completions_truncated": 21}
    few, many = "unscored 10 (10.0%)", ["truncated 11 (11.0%)", "completions truncated 21 (10.5%)"]
    parts = f"examples  100 read, {many[0]}, {few}, {many[1]}; --max_length 64"
    assert describe_start(args, data, 10) == parts  # into a file: no escape codes
    monkeypatch.setattr(sys, "stdout", Terminal)
    found = describe_start(args, data, 10)
    assert all(bold(part) == f"\033[1m{part}\033[0m" and bold(part) in found for part in many)
    assert few in found and bold(few) not in found


def test_columns_that_nobody_reads_are_named():
    lines = describe_start(Arguments(), DATA | {"columns_unused": ["question", "source"]}, 10).splitlines()
    assert lines[1:] == ["columns   not used: question, source"]


def test_a_warm_up_that_the_run_does_not_outlast_is_said():
    for warmup, said in ((9, False), (10, True), (50, True)):
        text = describe_start(Arguments(warmup_steps=warmup, learning_rate=1e-4), DATA, 10)
        assert (f"--warmup_steps {warmup}, and 10 steps in all: the learning rate never" in text) == said
