"""What holds for all three scripts: read, started, copied and edited alike."""

import ast
import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import alone_on_the_cpu, write_jsonl

from common.run import parse_arguments

ROOT = Path(__file__).parents[1]
SCRIPTS = ("sft_packing", "dpo_padding_free", "grpo_zero3")


def source(name):
    return (ROOT / f"{name}.py").read_text()


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_does_nothing(script):
    """Only definitions, constants and imports stand at the top; the guard at the end is the one exception."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AugAssign)
    first, *body, last = ast.parse(source(script)).body
    assert isinstance(first, ast.Expr) and isinstance(first.value.value, str)
    assert all(isinstance(node, allowed) for node in body)
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_beyond_its_check_and_none_is_written(script):
    read, written = set(), set()
    for name in (script, *(f"common/{path.stem}" for path in (ROOT / "common").glob("*.py"))):
        tree = ast.parse(source(name))
        checks = [range(f.lineno, f.end_lineno) for f in functions(tree) if f.name.startswith("check_")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and "args" in ast.unparse(node.value).split("."):
                if not isinstance(node.ctx, ast.Load):
                    written.add(node.attr)
                elif not any(node.lineno in lines for lines in checks):
                    read.add(node.attr)
    flags = {field.name for field in fields(importlib.import_module(script).Arguments)}
    # that which only checks can read: see folders.check_output_dir, and who calls check_exact
    assert flags - read <= {"overwrite_output_dir"} and not written


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_function_takes_a_step(script):
    """Nothing else of a script, the dry run included, runs a backward and an update."""
    tree = ast.parse(source(script))
    for word in ("backward", "step"):
        of_engines = {"optimizer", "engine"} if word == "step" else None
        callers = {
            function.name
            for function in functions(tree)
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == word
            if of_engines is None or getattr(node.func.value, "id", None) in of_engines
        }
        # a stand-in for DeepSpeed's engine has methods of those names
        assert callers - {word} == {"train_step"}, callers


def test_no_two_scripts_share_a_block_of_eight_lines():
    """What stands in two belongs into common/; imports, which name what is used, aside."""
    blocks = {}
    for script in SCRIPTS:
        text = source(script)
        text = text[text.index("# --- 1. Arguments") :]
        lines = [line.strip() for line in text.splitlines()]
        lines = [line for line in lines if len(line) > 3]  # brackets alone tell nothing
        blocks[script] = {tuple(lines[i : i + 8]) for i in range(len(lines) - 7)}
    for i, first in enumerate(SCRIPTS):
        for second in SCRIPTS[i + 1 :]:
            shared = blocks[first] & blocks[second]
            assert not shared, "\n".join(min(shared))


def readme_commands():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    found = re.findall(rf"({'|'.join(SCRIPTS)})\.py (--[^`\n]*)", text)
    return [(script, options.split()) for script, options in found if "..." not in options]


@pytest.mark.parametrize("script, words", readme_commands(), ids=lambda value: str(value)[-40:])
def test_the_readmes_commands_are_accepted(script, words):
    script = importlib.import_module(script)
    script.check_arguments(parse_arguments(script.Arguments, words))


def test_the_readmes_laptop_command_runs(tmp_path, monkeypatch):
    """SFT's, its own flags, with the demo's model and three chats."""
    monkeypatch.chdir(tmp_path)
    [words] = [words for script, words in readme_commands() if "my_chats.jsonl" in words]
    words[words.index("--model_name_or_path") + 1] = str(ROOT / "demo/model")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    write_jsonl(tmp_path / "my_chats.jsonl", [{"messages": chat}] * 3)
    sft_packing = importlib.import_module("sft_packing")
    with alone_on_the_cpu(tmp_path / "cache"):
        summary = sft_packing.main(parse_arguments(sft_packing.Arguments, words))
    assert summary["data"]["examples_used"] == 3
    assert (tmp_path / "outputs/laptop/model.safetensors").exists()
