"""--torch_compile: the layers' own code, compiled, gives their numbers; once for all layers and lengths."""

import re

import pytest
import torch
from helpers import (
    FAMILIES,
    alone_on_the_cpu,
    assert_same_curve,
    documents,
    gradients,
    random_preferences,
    random_texts,
    run,
    tiny_model,
    worst,
    write_jsonl,
    write_model,
)
from torch._dynamo.utils import counters

import dpo_padding_free
import grpo_zero3
import sft_packing
from common import Refusal
from common.collators import add_scored, flatten
from common.exactness import refusals_of
from common.logps import at_scored, nll_sum
from common.sharding import wrap_layers

ROWS = [add_scored(flatten(documents(i, [5 + i, 3, 9 + 2 * i]))) for i in range(10)]


@pytest.fixture(autouse=True)
def nothing_compiled(tmp_path):
    torch.compiler.reset()
    with alone_on_the_cpu(tmp_path / "cache"):
        yield
    torch.compiler.reset()


def num_graphs():
    return counters["stats"]["unique_graphs"]


def nll(model, row):
    return at_scored(model, row, lambda hidden, weight, ids, bias: nll_sum(hidden, weight, ids, bias=bias))


def loss_and_gradients(model, row):
    model.zero_grad()
    loss = nll(model, row)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_layers_and_rows_of_any_length_share_their_graphs(family):
    """A Llama's layers are all alike, Gemma's of two kinds. Outside the graphs is the CPU's attention."""
    types = {"layer_types": FAMILIES[family]["layer_types"] * 2} if family == "gemma3_text" else {}
    model = tiny_model(family, num_hidden_layers=4, **types).train()
    expected = [loss_and_gradients(model, row) for row in ROWS]
    wrap_layers(model, checkpoints=True, compiles=True)
    before = num_graphs()
    with torch.no_grad():  # as the proof at start-up does
        at_rest = nll(model, ROWS[0])
    made = num_graphs() - before
    assert 0 < made <= (4 if family == "llama" else 9)
    assert abs(at_rest - expected[0]["loss"]) <= 1e-5 * expected[0]["loss"]
    for checkpoints in (True, False):
        wrap_layers(model, checkpoints, compiles=True)
        for row, each in zip(ROWS, expected):
            found = loss_and_gradients(model, row)
            assert worst(found, each) <= 1e-5 * each["loss"]
    assert num_graphs() - before == made


@torch._dynamo.config.patch(recompile_limit=1)
def test_too_many_kinds_of_layers_are_an_error_and_not_a_slow_run():
    model = tiny_model("gemma3_text").train()
    wrap_layers(model, checkpoints=True, compiles=True)
    with pytest.raises(Refusal, match="--torch_compile cannot compile the layers"), refusals_of(model, ""):
        nll(model, ROWS[0])


def flags_of(folder, rows, **flags):
    model = write_model(folder / "model", max_position_embeddings=256)
    data = write_jsonl(folder / "rows.jsonl", rows)
    return {"model_name_or_path": model, "dataset_name": data, "max_steps": 3, **flags}


def test_sft_as_it_is_and_offloaded(tmp_path, capsys):
    flags = flags_of(tmp_path, random_texts(0, 12), max_length=64, learning_rate=1e-3)
    plain = run(sft_packing, tmp_path / "plain", flags)
    assert_same_curve(run(sft_packing, tmp_path / "compiled", flags, torch_compile=True), plain)
    shown = capsys.readouterr().out
    assert len(re.findall(r"torch_compile: \d+ graphs more; \d+ s of compiling so far", shown)) == 1
    offloads = {"activation_offloading": True, "gradient_checkpointing": False, "torch_compile": True}
    assert_same_curve(run(sft_packing, tmp_path / "offloaded", flags, **offloads), plain)


def test_a_compiled_policy_that_has_not_moved_is_its_reference(tmp_path):
    """To the last bit: the reference is computed by the graphs of training."""
    flags = flags_of(tmp_path, random_preferences(0, 8), bf16=True, learning_rate=0.0, max_length=64)
    for line in run(dpo_padding_free, tmp_path / "out", flags, torch_compile=True).metrics:
        assert line["rewards/margins"] == 0 and line["rewards/chosen"] == 0


def test_grpo(tmp_path):
    """Generation, which brings a cache, takes the layers' plain code."""
    rows = [{"prompt": text["text"], "answer": "a"} for text in random_texts(1, 6)]
    sizes = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 5}
    flags = flags_of(tmp_path, rows, **sizes, max_prompt_length=40, learning_rate=1e-3)
    ways = {name: {"torch_compile": name == "compiled"} for name in ("plain", "compiled")}
    done = {name: run(grpo_zero3, tmp_path / name, flags, **change) for name, change in ways.items()}
    assert_same_curve(done["compiled"], done["plain"])
