"""SFT with packing: the naive path's gradients, whole rows, refusals, and runs that go on bit for bit."""

import bisect
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, namedtuple
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import (
    FROZEN,
    OneRank,
    alone_on_the_cpu,
    documents,
    freeze_first,
    gradients,
    run_on_two_ranks,
    tiny_model,
    worst,
    write_jsonl,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import sft_packing
from common.collators import IGNORE, flatten
from common.folders import list_checkpoints
from common.sharding import Pretrained
from common.truncation import fit_to_length
from sft_packing import Arguments, Rows, load_documents, main, plan_rows, tokenize

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "sft_packing.py"
DEMO_MODEL = ROOT / "demo/model"
END = 257  # the demo tokenizer's end of sequence
VOCAB = 261


# --- Models, data and runs ---


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with alone_on_the_cpu(tmp_path_factory.mktemp("cache")) as folder:
        yield folder


def write_model(path, family="llama", dtype=torch.float32, chat_template=None, **overrides):
    """A tiny random model with the demo's tokenizer, as a Hugging Face folder."""
    special = {"pad_token_id": 256, "bos_token_id": None, "eos_token_id": END}
    attention = "eager" if family == "mamba" else "varlen"
    model = tiny_model(family, attention, **{"vocab_size": VOCAB, **special, **overrides})
    model.to(dtype).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    tokenizer.save_pretrained(path)
    return str(path)


def random_texts(seed, count, longest=50):
    generator = random.Random(seed)
    lengths = [generator.randint(3, longest) for _ in range(count)]
    return [{"text": "".join(generator.choices("abcdef ", k=length))} for length in lengths]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Flags of a run of a fraction of a second: 20 texts of 4 to 51 tokens, in 9 rows if packed."""
    folder = tmp_path_factory.mktemp("base")
    return {
        "model_name_or_path": write_model(folder / "model"),
        "dataset_name": write_jsonl(folder / "train.jsonl", random_texts(0, 20)),
        "max_length": 64,
        "per_device_train_batch_size": 2,
    }


Run = namedtuple("Run", ["returned", "metrics", "weights"])


def run(output_dir, flags, **changes):
    returned = main(Arguments(output_dir=str(output_dir), **{**flags, **changes}))
    return read_run(output_dir, returned)


def read_run(output_dir, returned=None):
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    weights = Path(output_dir) / "model.safetensors"
    weights = load_file(weights) if weights.exists() else None
    return Run(returned, [json.loads(line) for line in lines], weights)


def losses(a_run):
    return [step["loss"] for step in a_run.metrics]


def curve_difference(first, second):
    """How far two runs' losses and gradient norms are apart, the norms relative to their size."""
    assert len(first.metrics) == len(second.metrics)
    pairs = list(zip(first.metrics, second.metrics))
    return max(
        *(abs(a["loss"] - b["loss"]) for a, b in pairs),
        *(abs(a["grad_norm"] - b["grad_norm"]) / b["grad_norm"] for a, b in pairs),
    )


def assert_same_bits(first, second):
    assert losses(first) == losses(second)
    assert [s["grad_norm"] for s in first.metrics] == [s["grad_norm"] for s in second.metrics]
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


# --- 1. Equality ---

FORMS = {
    "packed": {"packing": True},
    "padding-free": {"packing": False},
    "padded": {"packing": False, "padding_free": False},
}
FAMILIES = ("llama", "qwen3", "mistral", "gemma3_text", "gpt2")


@functools.cache
def shared_model(family):
    return tiny_model(family)


def naive(model, sequences):
    """Loss per scored token and gradients, each document alone, from all its logits."""
    model.set_attn_implementation("sdpa")
    total, count = 0.0, 0
    for sequence in sequences:
        labels = torch.tensor(sequence["labels"])[1:]
        logits = model(input_ids=torch.tensor([sequence["input_ids"]]), use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits, labels, reduction="sum", ignore_index=IGNORE
        )
        count += int((labels != IGNORE).sum())
    (total / max(count, 1)).backward()
    return {"loss": total.detach() / max(count, 1), **gradients(model)}


def in_rows(sequences, args):
    """These sequences, as the script has planned them."""
    examples = datasets.Dataset.from_list(sequences)
    spans = np.array([(i, 0, len(s["input_ids"])) for i, s in enumerate(sequences)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="x")
    return Rows(examples, spans, {}, args, Pretrained("", None, None, tokenizer), world=1)


def computed(model, sequences, attn_implementation=None, **flags):
    """The same by the script: planned, collated, one step of several micro-batches."""
    sizes = {"max_length": 16, "per_device_train_batch_size": 3, "loss_chunk_size": 5, "max_grad_norm": 0.0}
    args = Arguments(**sizes, **flags)
    model.set_attn_implementation(attn_implementation or ("varlen" if sft_packing.is_flat(args) else "sdpa"))
    rows = in_rows(sequences, args)
    batches = list(rows.micro_batches(rows.in_order(), OneRank()))
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.0), {}
    optimizer.register_step_pre_hook(lambda *_: found.update(gradients(model)))
    sums, _ = sft_packing.train_step(model, optimizer, batches, args, OneRank())
    return {"loss": torch.tensor(sums["nll"] / max(sums["num_scored_tokens"], 1)), **found}


def difference(model, sequences, **flags):
    """The worst difference in the loss or in any gradient, script against naive."""
    found, expected = computed(model, sequences, **flags), naive(model, sequences)
    if found.keys() == {"loss"}:  # nothing was scored
        assert all(torch.count_nonzero(value) == 0 for value in expected.values())
        return 0.0
    return worst(found, expected)


def masked_documents(seed, lengths):
    """Documents of these lengths with a random half of the tokens not scored."""
    sequences = documents(seed, lengths)
    generator = random.Random(seed)
    for sequence in sequences:
        sequence["labels"] = [x if generator.random() < 0.5 else IGNORE for x in sequence["labels"]]
    return sequences


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=10)
@given(seed=st.integers(0, 999), lengths=st.lists(st.integers(1, 16), min_size=1, max_size=10))
def test_loss_and_every_gradient_are_those_of_documents_alone(form, seed, lengths):
    assert difference(shared_model("llama"), masked_documents(seed, lengths), **FORMS[form]) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_naive_gradients(family, form):
    sequences = masked_documents(1, [7, 16, 3, 1, 9, 12, 2, 5])
    assert difference(shared_model(family), sequences, **FORMS[form]) <= 1e-5


def test_nothing_scored_changes_nothing():
    sequences = documents(0, [4, 7])
    for sequence in sequences:
        sequence["labels"] = [IGNORE] * len(sequence["labels"])
    assert computed(shared_model("llama"), sequences) == {"loss": 0}  # no gradient, no update


@pytest.mark.parametrize("packing, num_steps", [(True, 2), (False, 3)])
def test_one_batch_of_8_is_8_batches_of_1(packing, num_steps, base, tmp_path):
    """The last window is smaller: 9 rows are 8 + 1, and 20 examples are 8 + 8 + 4."""
    one = run(tmp_path / "8x1", base, packing=packing, **dict(zip(SIZES, (8, 1))))
    eight = run(tmp_path / "1x8", base, packing=packing, **dict(zip(SIZES, (1, 8))))
    assert len(one.metrics) == num_steps
    assert curve_difference(one, eight) <= 1e-5
    assert worst(one.weights, eight.weights) <= 1e-4
    for name in ("num_tokens", "num_scored_tokens", "learning_rate", "epoch"):
        assert [step[name] for step in one.metrics] == [step[name] for step in eight.metrics]


def test_a_padded_run_is_a_padding_free_run(base, tmp_path):
    padded = run(tmp_path / "padded", base, **FORMS["padded"])
    flat = run(tmp_path / "flat", base, **FORMS["padding-free"])
    assert curve_difference(padded, flat) <= 1e-5
    assert worst(padded.weights, flat.weights) <= 1e-4
    tokens = {
        name: sum(step["num_tokens"] for step in r.metrics)
        for name, r in (("padded", padded), ("flat", flat))
    }
    assert flat.returned["data"]["padding_fraction"] == 0
    padding = 1 - tokens["flat"] / tokens["padded"]
    assert padded.returned["data"]["padding_fraction"] == pytest.approx(padding) and padding > 0.1


# --- 2. Mutations: what the comparisons above would catch ---


def change_flat_rows(monkeypatch, change):
    def changed(sequences):
        row = flatten(sequences)
        change(row, row["cu_seq_lens_q"][:-1].long())
        return row

    monkeypatch.setattr(sft_packing, "flatten", changed)


def score_across_boundaries(row, starts):
    row["labels"][0, starts] = row["input_ids"][0, starts]


def score_everything(row, starts):
    row["labels"] = row["input_ids"].clone()
    row["labels"][0, starts] = IGNORE


def count_positions_on(row, starts):
    row["position_ids"] = torch.arange(row["input_ids"].shape[1])[None]


@pytest.mark.parametrize("form", ["packed", "padding-free"])
@pytest.mark.parametrize(
    "family, attn_implementation, change",
    [
        ("llama", None, score_across_boundaries),
        ("llama", None, score_everything),
        ("gpt2", None, count_positions_on),  # learned positions: rotary ones are relative, a shift is nothing
        ("llama", "sdpa", count_positions_on),  # which tells documents apart by their positions
    ],
)
def test_a_flat_row_with_a_mistake_is_found(family, attn_implementation, change, form, monkeypatch):
    sequences, flags = masked_documents(2, [5, 11, 8, 3, 8]), {"attn_implementation": attn_implementation}
    assert difference(shared_model(family), sequences, **flags, **FORMS[form]) <= 1e-5
    change_flat_rows(monkeypatch, change)
    assert difference(shared_model(family), sequences, **flags, **FORMS[form]) > 1e-3


def test_a_mean_per_micro_batch_is_found(monkeypatch):
    """The mean of means that plain gradient accumulation takes."""
    sequences, batch_loss = masked_documents(2, [5, 11, 8, 3, 8, 9, 12]), sft_packing.batch_loss
    sizes = {"packing": False}  # 7 documents: 3 + 3 + 1
    total = sum(label != IGNORE for s in sequences for label in s["labels"][1:])
    assert difference(shared_model("llama"), sequences, **sizes) <= 1e-5

    def mean(model, batch, args):
        loss, metrics = batch_loss(model, batch, args)
        return loss / len(batch["score_ids"]) * total / 3, metrics

    monkeypatch.setattr(sft_packing, "batch_loss", mean)
    assert difference(shared_model("llama"), sequences, **sizes) > 1e-3


# --- 3. The plan ---

lengths_and_limits = st.tuples(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 24))


def rows_of(plan):
    row_offsets, spans = plan
    assert row_offsets.dtype == spans.dtype == np.int64 and spans.shape == (row_offsets[-1], 3)
    assert row_offsets[0] == 0
    return [[tuple(span) for span in spans[a:b].tolist()] for a, b in zip(row_offsets[:-1], row_offsets[1:])]


def assert_every_token_once(rows, lengths):
    pieces = sorted(span for row in rows for span in row)
    for example, length in enumerate(lengths):
        bounds = [0]
        for _, start, stop in (piece for piece in pieces if piece[0] == example):
            assert start == bounds[-1] < stop
            bounds.append(stop)
        assert bounds[-1] == length
    assert len({example for example, _, _ in pieces}) == len(lengths)


def fills(rows):
    return [sum(stop - start for _, start, stop in row) for row in rows]


def item_by_item(pieces, max_length):
    """Best-fit-decreasing as the textbook has it: tokens in each row."""
    residuals = []
    for length in sorted(pieces, reverse=True):
        fits = bisect.bisect_left(residuals, length)
        residual = residuals.pop(fits) if fits < len(residuals) else max_length
        bisect.insort(residuals, residual - length)
    return [max_length - residual for residual in residuals]


@given(lengths_and_limits, st.integers(0, 9))
@settings(max_examples=200)
def test_bfd_keeps_tokens_limits_and_whole_documents(case, seed):
    lengths, max_length = case
    rows = rows_of(plan_rows(lengths, max_length, "bfd", seed))
    assert_every_token_once(rows, lengths)
    assert all(0 < fill <= max_length for fill in fills(rows))
    pieces = Counter(example for row in rows for example, _, _ in row)
    for example, length in enumerate(lengths):
        assert pieces[example] == math.ceil(length / max_length)  # one if it fits: whole, in one row
    sizes = [stop - start for row in rows for _, start, stop in row]
    assert sorted(fills(rows)) == sorted(item_by_item(sizes, max_length))  # so never more rows either


@given(lengths_and_limits, st.integers(0, 9))
def test_wrapped_rows_are_full_and_cut_one_stream(case, seed):
    lengths, max_length = case
    rows = rows_of(plan_rows(lengths, max_length, "wrapped", seed))
    assert_every_token_once(rows, lengths)
    assert all(fill == max_length for fill in fills(rows)[:-1])
    assert all(0 < fill <= max_length for fill in fills(rows)[-1:])
    stream = [example for row in rows for example, _, _ in row]
    runs = [example for i, example in enumerate(stream) if i == 0 or stream[i - 1] != example]
    assert len(runs) == len(lengths)  # an example's pieces follow one another


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_the_seed_decides_the_plan(strategy):
    lengths = [1 + i % 7 for i in range(100)]
    first, again, other = (plan_rows(lengths, 16, strategy, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first[1], other[1])


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_no_examples_no_rows(strategy):
    assert rows_of(plan_rows([], 8, strategy)) == []


@pytest.mark.parametrize(
    "lengths, max_length, strategy, message",
    [
        ([3], 0, "bfd", "max_length is 0"),
        ([3], -1, "wrapped", "max_length is -1"),
        ([3, 0], 8, "bfd", "lengths"),
        ([[3]], 8, "wrapped", "lengths"),
        ([3], 8, "bfd_split", "strategy is 'bfd_split'"),
    ],
)
def test_plan_rows_refuses(lengths, max_length, strategy, message):
    with pytest.raises(ValueError, match=message):
        plan_rows(lengths, max_length, strategy)


def test_lengths_are_not_changed():
    lengths = np.array([5, 3, 9])
    plan_rows(lengths, 4)
    assert lengths.tolist() == [5, 3, 9]


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_a_million_lengths_are_planned_at_once(strategy):
    lengths = np.random.default_rng(0).lognormal(6, 1, 1_000_000).astype(int).clip(1, 4096)
    started = time.perf_counter()
    row_offsets, spans = plan_rows(lengths, 4096, strategy)
    assert time.perf_counter() - started < 2
    assert (spans[:, 2] - spans[:, 1]).sum() == lengths.sum()
    assert len(row_offsets) - 1 <= math.ceil(1.001 * lengths.sum() / 4096)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_neighbours_in_the_data_are_no_neighbours_in_a_row(strategy):
    rows = rows_of(plan_rows([8] * 1000, 16, strategy))
    assert all(len(row) == 2 for row in rows)
    assert sum(abs(first[0] - second[0]) == 1 for first, second in rows) < 20  # 1 expected by chance


def test_long_documents_do_not_come_first():
    rows = rows_of(plan_rows(list(range(51, 101)), 100))
    assert fills(rows) != sorted(fills(rows), reverse=True)
    assert abs(np.corrcoef(fills(rows), np.arange(50))[0, 1]) < 0.5


# --- 4. Data ---


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TALK = [user("hi"), assistant("yo"), user("so"), assistant("no")]
TALK_TEXT = "<|user|>hi<|end|><|assistant|>yo<|end|><|user|>so<|end|><|assistant|>no<|end|>"
CONVERSATIONAL = {"prompt": TALK[:3], "completion": TALK[3:]}


@pytest.mark.parametrize(
    "row, flags, whole, scored",
    [
        ({"text": "abc"}, {}, "abc<|end|>", "abc<|end|>"),
        ({"text": "abc<|end|>"}, {}, "abc<|end|>", "abc<|end|>"),  # once
        ({"messages": TALK}, {}, TALK_TEXT, TALK_TEXT),
        ({"messages": TALK}, {"assistant_only_loss": True}, TALK_TEXT, "yo<|end|>no<|end|>"),
        ({"prompt": "1+1=", "completion": "2"}, {}, "1+1=2<|end|>", "2<|end|>"),
        (CONVERSATIONAL, {}, TALK_TEXT, "no<|end|>"),
        (CONVERSATIONAL, {"assistant_only_loss": True}, TALK_TEXT, "no<|end|>"),
        # a turn that the prompt has begun goes on
        (
            {"prompt": [*TALK[:3], assistant("n")], "completion": [assistant("o")]},
            {},
            TALK_TEXT,
            "o<|end|>",
        ),
        # a whole conversation as completion
        ({**CONVERSATIONAL, "completion": TALK}, {}, TALK_TEXT, "no<|end|>"),
    ],
)
def test_what_is_scored(row, flags, whole, scored, tmp_path):
    pretrained = sft_packing.read_pretrained(str(DEMO_MODEL))
    name = write_jsonl(tmp_path / "rows.jsonl", [row])
    examples, spans, _ = load_documents(name, "train", pretrained, Arguments(**flags))
    example, tokenizer = examples[0], pretrained.tokenizer
    assert tokenizer.decode(example["input_ids"]) == whole
    marked = zip(example["input_ids"], example["labels"])
    assert all(label in (token, IGNORE) for token, label in marked)
    kept = [label for label in example["labels"] if label != IGNORE]
    assert tokenizer.decode(kept) == scored
    assert spans.tolist() == [[0, 0, len(example["input_ids"])]]


def test_every_end_that_the_model_names_is_an_end(base, tmp_path):
    """Gemma's style: turns end in a token of their own, which is not the tokenizer's EOS."""
    turns = "{% for m in messages %}{{ m.content }}<|assistant|>\n{% endfor %}"
    model = write_model(tmp_path / "model", chat_template=turns)
    end = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("<|assistant|>")
    flags = {**base, "model_name_or_path": model, "max_steps": 1, "packing": False}
    flags["dataset_name"] = write_jsonl(tmp_path / "rows.jsonl", [{"messages": TALK}])
    # of each turn 2 letters, its end and a line break; behind the last one, EOS in its place, or nothing
    for name, eos, num_tokens in (("one", END, 4 * 4 + 1), ("two", [END, end], 4 * 4 - 1)):
        GenerationConfig(eos_token_id=eos).save_pretrained(model)
        [step] = run(tmp_path / name, flags).metrics
        assert step["num_tokens"] == num_tokens


def test_columns_that_are_not_used_are_named(base, tmp_path, capsys):
    rows = [{"text": "abc", "source": "x", "chat_template_kwargs": None, "tools": None}]
    data = run(tmp_path / "out", base, dataset_name=write_jsonl(tmp_path / "r.jsonl", rows)).returned["data"]
    assert data["columns_unused"] == ["source"]
    assert "columns   not used: source" in capsys.readouterr().out


def test_the_prompt_ends_where_joint_and_separate_tokenisation_part():
    pieces = ["<eos>", "x", "a", "b", "y", "ab"]
    byte_pairs = models.BPE({piece: i for i, piece in enumerate(pieces)}, [("a", "b")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(byte_pairs), eos_token="<eos>")
    assert tokenizer("xa")["input_ids"] == [1, 2]
    # together: x ab y; "ab" holds a piece of the completion, so it is scored
    assert tokenize({"prompt": "xa", "completion": "by"}, tokenizer, False) == (
        [1, 5, 4, 0],
        [IGNORE, 5, 4, 0],
    )


OVERLONG = [
    *({"prompt": "p" * 9, "completion": "c" * n} for n in (1, 20, 50)),
    {"prompt": "p" * 40, "completion": "c"},
]


@pytest.mark.parametrize(
    "flags, used, unscored, truncated, split, dropped, kept, cut",
    [
        # 11, 30, 60 and 42 tokens; max_length 32. Of the last, truncated, nothing scored is left
        ({}, 3, 1, 1, 0, 0, 11 + 30 + 32, 28 + 10),
        ({"overflow": "drop"}, 2, 0, 0, 0, 2, 11 + 30, 60 + 42),
        # split, the last is 32 tokens of prompt, left out, and a piece with the completion
        ({"overflow": "split"}, 4, 0, 0, 2, 0, 11 + 30 + 60 + 10, 0),
        ({"packing_strategy": "bfd_split"}, 4, 0, 0, 2, 0, 11 + 30 + 60 + 10, 0),
    ],
)
def test_over_long_examples_are_counted(
    flags, used, unscored, truncated, split, dropped, kept, cut, base, tmp_path
):
    name = write_jsonl(tmp_path / "rows.jsonl", OVERLONG)
    data = run(tmp_path / "out", base, dataset_name=name, max_length=32, **flags).returned["data"]
    expected = {
        "examples_read": 4,
        "examples_used": used,
        "examples_unscored": unscored,
        "examples_truncated": truncated,
        "examples_split": split,
        "examples_dropped": dropped,
        "tokens_kept": kept,
        "tokens_cut": cut,
    }
    assert {name: data[name] for name in expected} == expected
    assert data["fill_fraction"] == pytest.approx(kept / (data["rows"] * 32))


def test_wrapped_cuts_one_stream_and_counts_what_it_split(base, tmp_path):
    data = run(tmp_path, base, packing_strategy="wrapped", max_length=32).returned["data"]
    tokens = sum(len(json.loads(line)["text"]) + 1 for line in open(base["dataset_name"]))
    assert (data["tokens_kept"], data["tokens_cut"], data["examples_used"]) == (tokens, 0, 20)
    assert data["rows"] == math.ceil(tokens / 32)
    assert 0 < data["examples_split"] <= 20 and data["examples_truncated"] == 0


def test_split_pieces_train_as_documents_of_their_own():
    sequences = masked_documents(3, [40, 7, 33])
    pieces = [pair for s in sequences for pair in fit_to_length(s["input_ids"], s["labels"], 16, "split")]
    pieces = [{"input_ids": input_ids, "labels": labels} for input_ids, labels in pieces]
    assert difference(shared_model("llama"), pieces) <= 1e-5


def test_examples_without_a_scored_token_are_dropped_and_counted(base, tmp_path):
    name = write_jsonl(tmp_path / "rows.jsonl", [{"text": ""}, {"text": "abc"}, {"text": ""}])
    data = run(tmp_path / "out", base, dataset_name=name).returned["data"]
    assert (data["examples_read"], data["examples_used"], data["examples_unscored"]) == (3, 1, 2)
    assert (data["tokens_kept"], data["tokens_cut"], data["tokens_unscored"]) == (4, 0, 2)


def test_tokens_are_cached_until_something_they_depend_on_changes(cache, tmp_path):
    pretrained = sft_packing.read_pretrained(str(DEMO_MODEL))

    def load(name, **flags):
        load_documents(name, "train", pretrained, Arguments(**{"max_length": 16, **flags}))
        return {path for path in cache.rglob("*.arrow") if path.parent.name == "tokenised"}

    path = tmp_path / "rows.jsonl"
    first = load(write_jsonl(path, [{"messages": TALK}]))
    assert load(str(path)) == first  # not tokenised again
    assert load(str(path), learning_rate=1.0, seed=7, output_dir="elsewhere") == first
    shorter = load(str(path), max_length=8)
    assert len(shorter - first) == 1
    assert len(load(str(path), assistant_only_loss=True) - shorter) == 1


def test_edited_tokenisation_is_not_taken_from_the_cache(tmp_path):
    """Whoever edits what turns text into tokens, in either file, trains on the new tokens."""
    shutil.copy(SCRIPT, tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common")
    name = write_jsonl(tmp_path / "rows.jsonl", [{"text": "abc"}])
    code = f"""
import importlib, sys
sys.path.insert(0, {str(tmp_path)!r})
import common.data, sft_packing

def load(file, edit):
    with open({str(tmp_path)!r} + file, "a") as source:
        source.write(edit)
    importlib.reload(common.data)
    importlib.reload(sft_packing)
    pretrained = sft_packing.read_pretrained({str(DEMO_MODEL)!r})
    examples, *_ = sft_packing.load_documents({name!r}, "train", pretrained, sft_packing.Arguments())
    print(examples[0]["input_ids"][3:])

load("/common/data.py", "")
load("/common/data.py", "\\ndef end_with_eos(input_ids, *_): return [*input_ids, 7]")
load("/sft_packing.py", "\\ndef tokenize(*args): return [1, 2, 3, 4], [1, 2, 3, 4]")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [f"[{END}]", "[7]", "[4]"], done.stderr


def test_several_processes_tokenise_alike(tmp_path):
    pretrained = sft_packing.read_pretrained(str(DEMO_MODEL))
    name = write_jsonl(tmp_path / "rows.jsonl", random_texts(4, 12))
    one, spans, counts = load_documents(name, "train", pretrained, Arguments())
    two, *same = load_documents(name, "train", pretrained, Arguments(dataset_num_proc=2))
    assert one.to_list() == two.to_list() and counts == same[1] and np.array_equal(spans, same[0])


# --- 5. Refusals ---


SYSTEM = {"role": "system", "content": "s"}
MOVES = (  # into the user's turn, but only into a last one
    "{% for m in messages if m.role != 'system' %}<|user|>"
    "{% if loop.last and m.role == 'user' %}{{ messages[0].content }}{% endif %}{{ m.content }}{% endfor %}"
)
NO_MARKERS = "{% for message in messages %}{{ message.content }}{% endfor %}"
CHAT = {"messages": TALK}
NULL = [{"text": "a"}, {"text": None}]
MOVED = [{"prompt": [SYSTEM, user("a")], "completion": [assistant("b")]}]
TWICE = [{"prompt": "ab", "completion": "abc"}]
LONG, TOOLS = [{"text": "a" * 99}], [{"text": "a", "tools": "x"}]
PADDED_VARLEN = {"packing": False, "padding_free": False, "attn_implementation": "varlen"}
BAD = [  # rows of the dataset, or None; flags; what the message says
    (None, {"dataset_name": "none.jsonl"}, "none.jsonl does not exist"),
    (
        [{"question": "a"}],
        {},
        "has the columns question; wanted: messages, or text, or prompt and completion",
    ),
    (NULL, {}, "bad.jsonl, example 1: "),
    (MOVED, {"chat_template": MOVES}, "example 0: the chat template renders .*, '<.user.>sa' alone"),
    (TWICE, {}, "in 1 of 1 rows the completion begins with the whole prompt"),
    (TOOLS, {}, "example 0: tools is 'x'"),
    ([{"text": ""}], {}, "no example with a scored token within --max_length 64"),
    (LONG, {"overflow": "drop"}, "no example with a scored token within --max_length 64"),
    (LONG, {"overflow": "error"}, "example 0: .*100 tokens.* 64"),
    ([CHAT], {"chat_template": NO_MARKERS, "assistant_only_loss": True}, "marks no assistant turns"),
    ([{"text": "a"}], {"assistant_only_loss": True}, "holds plain text"),
    (None, {"model": {"vocab_size": 200, "pad_token_id": 0, "eos_token_id": 1}}, "token id 257 is outside"),
    (None, {"model": {"vocab_size": 258}, "eval_dataset_name": [CHAT]}, "token id 2.. is outside the voc"),
    (None, {"eval_dataset_name": [{"a": "b"}]}, "has the columns a; wanted"),
    (None, {"model_name_or_path": "none"}, "none cannot be loaded"),
    (None, {"max_length": 257}, "--max_length 257 is over the model's 256"),
    (None, {"model": {"family": "mamba"}}, "sequences of a row.* --no_packing --no_padding_free"),
    (None, {"model": {"family": "stablelm"}}, "keep documents apart"),
    (None, {"model": {"family": "gpt_oss"}}, "s_aux"),
    (None, {"model": {"family": "granite", "logits_scaling": 8.0}}, "logits_scaling 8.0"),
    (None, {"learning_rate": math.nan}, "--learning_rate is nan"),
    (None, {"overflow": "cut"}, "--overflow is 'cut'; choose one of truncate"),
    (None, {"max_length": 1}, "--max_length is 1"),
    (None, {"packing": False, "packing_strategy": "wrapped"}, "wrapped needs packing"),
    (None, {"packing_strategy": "wrapped", "overflow": "drop"}, "--overflow drop"),
    (None, {"padding_free": False}, "--no_padding_free"),
    (None, PADDED_VARLEN, "varlen is for flat rows"),
    (None, {"attn_implementation": "flash_attention_2"}, "--bf16"),
    (None, {"attn_implementation": "nonsense"}, "nonsense"),
    (None, {"eval_steps": 2}, "--eval_steps needs --eval_dataset_name"),
]


@pytest.fixture(scope="module")
def earlier_run(base, tmp_path_factory):
    """The folder of a finished run of 5 steps with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    run(folder, base, save_steps=2)
    return folder


def contents(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def assert_refused(folder, flags, message):
    """main raises ValueError with this message, and leaves what is in `folder` as it was."""
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        run(folder, flags)
    assert contents(folder) == before


@pytest.mark.parametrize("rows, flags, message", BAD, ids=lambda value: str(value)[-60:])
def test_what_is_bad_is_refused(rows, flags, message, base, earlier_run, tmp_path):
    flags = {**base, "overwrite_output_dir": True, **flags}
    if rows is not None:
        flags["dataset_name"] = write_jsonl(tmp_path / "bad.jsonl", rows)
    if isinstance(flags.get("eval_dataset_name"), list):
        flags["eval_dataset_name"] = write_jsonl(tmp_path / "eval.jsonl", flags["eval_dataset_name"])
    of_model = {"chat_template": flags.pop("chat_template", None), **flags.pop("model", {})}
    if any(of_model.values()):
        flags["model_name_or_path"] = write_model(tmp_path / "model", **of_model)
    assert_refused(earlier_run, flags, message)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({}, "holds another run .*--resume_from_checkpoint latest.*--overwrite_output_dir"),
        # a checkpoint of another folder does not make this folder its own
        ({"resume_from_checkpoint": "checkpoint-2"}, "holds another run"),
        ({"resume_from_checkpoint": "latest", "max_length": 32}, "its data and this run's differ"),
        ({"resume_from_checkpoint": "latest", "seed": 1}, "its data and this run's differ"),
        ({"resume_from_checkpoint": "latest", "packing": False}, "its data and this run's differ"),
        ({"resume_from_checkpoint": "latest", "max_steps": 3}, "is past --max_steps 3"),
        ({"resume_from_checkpoint": "latest", "max_steps": 4}, "has finished its 4 steps"),
    ],
)
def test_a_folder_that_holds_another_run_is_refused(flags, message, base, earlier_run):
    assert_refused(earlier_run, {**base, **flags}, message)


def test_resuming_with_other_data_or_another_order_is_refused(base, earlier_run, tmp_path):
    rows = [json.loads(line) for line in open(base["dataset_name"])]
    rows[7]["text"] = rows[7]["text"][::-1]  # as long as before: the plan is the same
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows)}
    assert_refused(
        earlier_run, {**flags, "resume_from_checkpoint": "latest"}, "its data and this run's differ"
    )
    # unpacked, the plan is the same for every seed, but the order of the rows is not
    run(tmp_path / "out", base, packing=False, save_steps=2)
    flags = {**base, "packing": False, "resume_from_checkpoint": "latest", "seed": 1}
    assert_refused(tmp_path / "out", flags, "its data and this run's differ")


def command(flags, **changes):
    options = [f"--{name}={value}" for name, value in {**flags, **changes}.items()]
    return [sys.executable, str(SCRIPT), *options]


# --- 6. Checkpoints ---


@pytest.fixture(scope="module")
def dropout(base, tmp_path_factory):
    """Flags of a run whose every step depends on all that a checkpoint holds: 8 steps, 5 to an epoch."""
    folder = tmp_path_factory.mktemp("dropout")
    return {
        **base,
        "model_name_or_path": write_model(folder / "model", attention_dropout=0.2),
        "num_train_epochs": 1.6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
    }


@pytest.fixture(scope="module")
def uninterrupted(dropout, tmp_path_factory):
    return run(tmp_path_factory.mktemp("uninterrupted"), dropout)


def cut_after(run_folder, step, folder):
    """A copy of a finished run as it was right after the checkpoint of `step`."""
    folder.mkdir()
    shutil.copytree(run_folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    lines = (run_folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: step + 1]) + '{"step": ')  # killed while writing
    return folder


def test_dropout_is_at_work(base, dropout, uninterrupted, tmp_path):
    without = run(tmp_path, dropout, model_name_or_path=base["model_name_or_path"])
    assert losses(without)[0] != losses(uninterrupted)[0]


@pytest.fixture(scope="module")
def saved(dropout, tmp_path_factory):
    """The folder of the same run with the checkpoints 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run(folder, dropout, save_steps=2)
    return folder


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resumed_run_is_the_uninterrupted_one(step, dropout, uninterrupted, saved, tmp_path):
    """Within the warm-up, before the epoch's end and after it: the same bits."""
    assert_same_bits(read_run(saved), uninterrupted)  # saving changes nothing
    folder = cut_after(saved, step, tmp_path / "cut")
    resumed = run(folder, dropout, save_steps=2, resume_from_checkpoint="latest")
    assert [line["step"] for line in resumed.metrics] == list(range(1, 9))
    assert_same_bits(resumed, uninterrupted)
    for name in ("epoch", "learning_rate", "num_tokens", "num_scored_tokens"):
        assert [line[name] for line in resumed.metrics] == [line[name] for line in uninterrupted.metrics]
    assert [step for step, _ in list_checkpoints(folder)] == [s for s in (2, 4, 6, 8) if s >= step]


def test_resuming_from_an_earlier_checkpoint_replaces_the_later_ones(base, tmp_path):
    run(tmp_path, base, save_steps=2)
    before = load_file(next((tmp_path / "checkpoint-4").glob("*.safetensors")))
    changes = {"gradient_accumulation_steps": 2, "max_steps": 4}
    run(tmp_path, base, save_steps=2, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **changes)
    after = load_file(next((tmp_path / "checkpoint-4").glob("*.safetensors")))
    name = next(name for name in before if name.startswith("weight."))
    assert not torch.equal(before[name], after[name])


def test_nothing_is_pickled(base, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("torch.load or torch.save was called")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    run(tmp_path, base, save_steps=4)
    run(cut_after(tmp_path, 4, tmp_path / "cut"), base, resume_from_checkpoint="latest")
    files = [path for path in (tmp_path / "checkpoint-4").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".rng", ".json"}
    for path in files:
        json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


@pytest.fixture(scope="module")
def poisoned(base, tmp_path_factory):
    """Flags of a run in which example 5 alone holds the byte "z", whose embedding is infinite."""
    folder = tmp_path_factory.mktemp("poisoned")
    rows = [{"text": ""}, *random_texts(5, 7)]  # the first one is dropped
    rows[5]["text"] += "z"
    model = tiny_model("llama", vocab_size=VOCAB, pad_token_id=256, bos_token_id=None, eos_token_id=END)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model.model.embed_tokens.weight.data[tokenizer("z")["input_ids"]] = math.inf
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return {
        **base,
        "model_name_or_path": str(folder / "model"),
        "dataset_name": write_jsonl(folder / "rows.jsonl", rows),
        "packing": False,
        "per_device_train_batch_size": 1,
    }


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(poisoned, tmp_path):
    with pytest.raises(FloatingPointError, match=r"Rows \[4\], examples \[5\]") as caught:
        run(tmp_path, poisoned, save_steps=1)
    step = int(re.match(r"step (\d+): loss (nan|inf)", str(caught.value))[1])
    assert step > 1
    assert [line["step"] for line in read_run(tmp_path).metrics] == list(range(1, step))
    assert [step for step, _ in list_checkpoints(tmp_path)] == list(range(1, step))
    for _, path in list_checkpoints(tmp_path):
        for shard in path.glob("*.safetensors"):
            for name, tensor in load_file(shard).items():
                assert name == "weight.model.embed_tokens.weight" or tensor.isfinite().all()
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(FloatingPointError, match=f"step {step}: .*Rows \\[4\\]"):
        run(tmp_path, poisoned, save_steps=1, resume_from_checkpoint="latest")


@pytest.fixture(scope="module")
def long_prompts(base, tmp_path_factory):
    """A run by one row a step, of which most lie within a prompt; its flags and its folder."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = [{"prompt": row["text"], "completion": "abc"} for row in random_texts(3, 4, longest=400)]
    flags = {**base, "dataset_name": write_jsonl(folder / "rows.jsonl", rows), "max_length": 32}
    flags |= {"packing_strategy": "wrapped", "per_device_train_batch_size": 1, "weight_decay": 0.5}
    run(folder / "out", flags, learning_rate=1e-2, num_train_epochs=1.5, save_steps=1)
    return {**flags, "learning_rate": 1e-2, "num_train_epochs": 1.5}, folder / "out"


def state_after(folder, step):
    return load_file(next((folder / f"checkpoint-{step}").glob("*.safetensors")))


def test_a_step_without_a_scored_token_changes_nothing_and_is_counted(long_prompts):
    flags, folder = long_prompts
    done = read_run(folder)
    scored = [line["num_scored_tokens"] > 0 for line in done.metrics]
    after_an_update = scored.index(True) + 1
    assert not all(scored[after_an_update:])  # with moments that could move weights
    for step, line in enumerate(done.metrics[1:], 2):
        before, after = state_after(folder, step - 1), state_after(folder, step)
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert bool(moved) == scored[step - 1]
        assert (line["grad_norm"] > 0) == (line["loss"] > 0) == (line["num_tokens"] > 0) == scored[step - 1]
    assert [line["step"] for line in done.metrics] == list(range(1, len(scored) + 1))
    rates = [line["learning_rate"] for line in done.metrics]
    assert rates == pytest.approx([1e-2 * (1 - i / len(rates)) for i in range(len(rates))])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["throughput"]["num_tokens"] == sum(line["num_tokens"] for line in done.metrics)


def test_resuming_after_steps_without_a_scored_token(long_prompts, tmp_path):
    """Adam's bias correction goes by the updates, the schedule by the steps."""
    flags, folder = long_prompts
    whole = read_run(folder)
    scored = [line["num_scored_tokens"] > 0 for line in whole.metrics]
    step = len(scored) - scored[::-1].index(True) - 1  # before the last update
    assert 0 < sum(scored[:step]) < step
    cut = cut_after(folder, step, tmp_path / "cut")
    assert_same_bits(run(cut, flags, resume_from_checkpoint="latest"), whole)


def test_bytes_are_counted_in_a_step_that_computes(long_prompts, tmp_path):
    flags, folder = long_prompts
    scored = [line["num_scored_tokens"] > 0 for line in read_run(folder).metrics]
    assert not scored[1]  # the step that would be measured
    ledger = run(tmp_path, flags, measure_memory=True).returned["ledger"]
    assert bytes_of({"ledger": ledger})["optimizer"] >= 8 * 1000


@pytest.mark.parametrize("changes", [{"bf16": True}, {"activation_offloading": True}], ids=str)
def test_frozen_layers_cost_their_weights_alone(changes, dropout, tmp_path, monkeypatch):
    flags = {**dropout, **changes, "save_steps": 2, "measure_memory": True}
    if "activation_offloading" in changes:
        flags["model_name_or_path"] = write_model(tmp_path / "model", num_hidden_layers=3)
        monkeypatch.setattr("common.offload.MIN_BYTES", 1)
    all_trained = bytes_of(run(tmp_path / "all", flags, max_steps=2).returned)
    in_graph = freeze_first(sft_packing, monkeypatch)
    whole = run(tmp_path / "whole", flags)
    assert not any(in_graph) and len(in_graph) >= 8
    state = state_after(tmp_path / "whole", 4)
    assert not [name for name in state if name.split(".", 1)[1].startswith(FROZEN)]
    came = load_file(Path(flags["model_name_or_path"]) / "model.safetensors")
    for name, weight in whole.weights.items():
        assert torch.equal(weight, came[name]) == name.startswith(FROZEN), name
    trained = sum(w.numel() for name, w in came.items() if not name.startswith(FROZEN))
    found = bytes_of(whole.returned)
    assert found["gradients"] == 4 * trained
    assert found["optimizer"] == pytest.approx(8 * trained, rel=0.01)
    assert found["parameters"] == all_trained["parameters"] > 1.2 * 4 * trained
    if "activation_offloading" not in changes:  # which leaves one layer's on the device in any case
        assert found["activations"] < all_trained["activations"]
    assert found["peak"] < all_trained["peak"]
    resumed = run(cut_after(tmp_path / "whole", 4, tmp_path / "cut"), flags, resume_from_checkpoint="latest")
    assert_same_bits(resumed, whole)


def test_what_was_frozen_stays_frozen(dropout, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        freeze_first(sft_packing, patch)
        run(tmp_path, dropout, save_steps=2, max_steps=2)
    flags = {**dropout, "resume_from_checkpoint": "latest"}
    assert_refused(
        tmp_path, flags, "its frozen parameters and this run's differ. Freeze what was frozen then"
    )


def test_killed_while_saving_the_earlier_checkpoint_is_there(dropout, uninterrupted, tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import sft_packing
from common import run
commit_folder = run.commit_folder

def killed(temporary, path):
    if path.name == "checkpoint-4":
        os.kill(os.getpid(), signal.SIGKILL)
    commit_folder(temporary, path)

run.commit_folder = killed
sft_packing.main(sft_packing.Arguments(**{ {**dropout, "output_dir": str(tmp_path), "save_steps": 2}!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "checkpoint-4.tmp").is_dir()  # all but its name was there
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]
    resumed = run(tmp_path, dropout, save_steps=2, resume_from_checkpoint="latest")
    assert_same_bits(resumed, uninterrupted)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_sigterm_saves_a_checkpoint_and_ends_with_code_0(base, tmp_path):
    flags = {**base, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    arguments = command(flags, output_dir=tmp_path / "stopped", max_steps=100_000)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        metrics, deadline = tmp_path / "stopped/metrics.jsonl", time.monotonic() + 100
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "--resume_from_checkpoint latest" in stderr
    [(step, _)] = list_checkpoints(tmp_path / "stopped")
    assert step >= 3 and f"checkpoint-{step}" in stderr
    changes = {"max_steps": step + 2}
    resumed = run(tmp_path / "stopped", flags, resume_from_checkpoint="latest", **changes)
    assert_same_bits(resumed, run(tmp_path / "through", flags, **changes))


def ends_in_last_step(monkeypatch, how):
    """SIGTERM in the fifth and last step, or the process ends between the checkpoint and the model."""
    calls, batch_loss = [], sft_packing.batch_loss

    def counted(*args):
        calls.append(args)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_loss(*args)

    def interrupted(*args):
        raise KeyboardInterrupt

    if how == "SIGTERM":
        monkeypatch.setattr(sft_packing, "batch_loss", counted)
    else:
        monkeypatch.setattr(sft_packing, "save_model", interrupted)


@pytest.mark.parametrize("how", ["SIGTERM", "killed"])
def test_a_run_stopped_in_its_last_step_can_be_finished(how, base, tmp_path, monkeypatch):
    through = run(tmp_path / "through", base)
    with monkeypatch.context() as patch:
        ends_in_last_step(patch, how)
        try:
            returned = main(Arguments(**base, output_dir=str(tmp_path / "stopped"), save_steps=5))
        except KeyboardInterrupt:
            returned = None
    if returned is None or "stopped_at_step" in returned:
        run(tmp_path / "stopped", base, resume_from_checkpoint="latest")
    assert_same_bits(read_run(tmp_path / "stopped"), through)
    assert (tmp_path / "stopped/summary.json").exists()


# --- Ranks ---

OFFLOADED = {  # layer inputs of 64 KiB and more, or nothing would move
    "dataset_name": str(ROOT / "demo/sft_eval.jsonl"),
    "max_length": 128,
    "learning_rate": 1e-3,
    "max_steps": 3,
}


SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
TWO_EPOCHS = {"num_train_epochs": 2, "learning_rate": 1e-3, "save_steps": 2}  # 9 rows: 4 + 4 + 1, twice


@pytest.fixture(scope="module")
def evaluated(base, tmp_path_factory):
    """Flags with an evaluation of 7 examples of uneven lengths, prompts not scored."""
    generator = random.Random(6)
    rows = [
        {"prompt": "p" * generator.randint(1, 20), "completion": "c" * generator.randint(1, 30)}
        for _ in range(7)
    ]
    folder = tmp_path_factory.mktemp("evaluated")
    return {**base, "eval_dataset_name": write_jsonl(folder / "eval.jsonl", rows)}


@pytest.fixture(scope="module")
def two_ranks(evaluated, base, tmp_path_factory):
    """The folder of several runs on two ranks, one after another, in one start."""
    folder = tmp_path_factory.mktemp("two")
    jobs = {
        # steps of 4 rows on 2 ranks, 2 x 1 on each; the last step of an epoch leaves the second a dummy
        "curve": {**evaluated, **TWO_EPOCHS, **dict(zip(SIZES, (1, 2)))},
        "plain": OFFLOADED,
        "offloaded": {**OFFLOADED, "activation_offloading": True},
        "missing": {**base, "dataset_name": "none.jsonl"},
    }
    run_on_two_ranks("sft_packing", jobs, folder)
    return folder


def assert_same_curve(first, second):
    assert max(abs(a - b) for a, b in zip(losses(first), losses(second), strict=True)) <= 1e-5
    assert curve_difference(first, second) <= 1e-4
    assert worst(first.weights, second.weights) <= 1e-4
    assert first.metrics[-1]["eval_loss"] == pytest.approx(second.metrics[-1]["eval_loss"], abs=1e-5)
    for name in ("num_scored_tokens", "epoch", "learning_rate"):
        assert [line[name] for line in first.metrics] == [line[name] for line in second.metrics]


def test_two_ranks_are_one_rank(two_ranks, evaluated, tmp_path):
    one = run(tmp_path / "one", evaluated, **TWO_EPOCHS, gradient_accumulation_steps=2)
    two = read_run(two_ranks / "curve")
    assert_same_curve(two, one)
    assert [a["num_tokens"] - b["num_tokens"] for a, b in zip(two.metrics, one.metrics)] == [0, 0, 2, 0, 0, 2]
    summary = json.loads((two_ranks / "curve/summary.json").read_text())
    assert summary["world_size"] == 2 and summary["data"] == one.returned["data"]
    # and one rank goes on with their checkpoint
    cut = cut_after(two_ranks / "curve", 2, tmp_path / "cut")
    sizes = dict(zip(SIZES, (4, 1)))
    resumed = run(cut, evaluated, **TWO_EPOCHS, **sizes, resume_from_checkpoint="latest")
    assert_same_curve(resumed, two)
    assert losses(resumed)[:2] == losses(two)[:2]


def test_offloading_changes_nothing_on_two_ranks(two_ranks):
    assert_same_bits(read_run(two_ranks / "plain"), read_run(two_ranks / "offloaded"))
    report = json.loads((two_ranks / "offloaded/summary.json").read_text())["activation_offloading"]
    assert 0.9 * 4 * 256 * 128 * 4 < report["offloaded_bytes"] <= 4 * 256 * 128 * 4


def test_an_error_on_the_first_rank_ends_the_other(two_ranks):
    first, second = (json.loads((two_ranks / f"results{rank}.json").read_text()) for rank in (0, 1))
    assert "none.jsonl does not exist" in first["missing"]["error"]
    assert "another rank cannot go on" in second["missing"]["error"]
    assert not (two_ranks / "missing").exists()


# --- What a run leaves behind ---

METRICS = (
    "step epoch loss grad_norm learning_rate num_tokens num_scored_tokens tokens_per_second step_seconds "
    "peak_memory_bytes"
)
SUMMARY = "args versions device world_size data throughput ledger activation_offloading final_metrics"


def test_what_a_run_leaves_behind(evaluated, tmp_path):
    done = run(tmp_path, evaluated, eval_steps=2, save_steps=3, logging_steps=2)
    for line in done.metrics:
        evaluates = line["step"] in (2, 4, 5)  # and at the end
        assert set(line) == set(METRICS.split()) | ({"eval_loss"} if evaluates else set())
        assert line["tokens_per_second"] == pytest.approx(line["num_tokens"] / line["step_seconds"])
    assert [line["step"] for line in done.metrics] == [1, 2, 3, 4, 5]
    assert done.metrics[-1]["epoch"] == 1.0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == set(SUMMARY.split())
    assert json.loads(json.dumps(done.returned)) == summary
    assert summary["args"]["max_length"] == 64 and summary["final_metrics"] == done.metrics[-1]
    assert summary["throughput"]["num_tokens"] == sum(line["num_tokens"] for line in done.metrics)
    assert summary["data"]["tokens_kept"] == sum(line["num_tokens"] for line in done.metrics)
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


@pytest.mark.parametrize(
    "dtype, tied", [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)]
)
def test_the_saved_model_is_the_trained_one(dtype, tied, base, tmp_path):
    folder = write_model(tmp_path / "model", dtype=dtype, tie_word_embeddings=tied)
    done = run(tmp_path / "out", base, model_name_or_path=folder, save_steps=5, learning_rate=1e-2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    checkpoint = load_file(next((tmp_path / "out/checkpoint-5").glob("*.safetensors")))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, checkpoint[f"weight.{name}"].to(dtype))
        assert parameter.ne(load_file(Path(folder) / "model.safetensors")[name]).any()
    assert done.weights.keys() == load_file(Path(folder) / "model.safetensors").keys()  # a tied weight once
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    original = AutoTokenizer.from_pretrained(DEMO_MODEL)
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer("a<|end|>").input_ids == original("a<|end|>").input_ids
    # and it can go straight into the next run
    run(tmp_path / "next", base, model_name_or_path=str(tmp_path / "out"), max_steps=1)


def test_bf16_follows_fp32(base, tmp_path):
    exact = run(tmp_path / "fp32", base)
    half = run(tmp_path / "bf16", base, bf16=True)
    assert not torch.distributed.is_initialized()
    assert losses(half) != losses(exact)
    assert losses(half) == pytest.approx(losses(exact), rel=0.01)
    assert all(weight.dtype == torch.float32 for weight in half.weights.values())


def test_gradient_checkpointing_changes_no_loss(dropout, uninterrupted, tmp_path):
    assert dropout.get("gradient_checkpointing", True)
    without = run(tmp_path, dropout, gradient_checkpointing=False)
    assert curve_difference(without, uninterrupted) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True, "max_steps": 2},
        {"gradient_accumulation_steps": 3, "gradient_checkpointing": False},
        {**FORMS["padded"], "per_device_train_batch_size": 4},
    ],
    ids=str,
)
def test_offloading_changes_only_where_activations_wait(changes, tmp_path):
    flags = {**OFFLOADED, **changes}
    plain = run(tmp_path / "plain", flags)
    offloaded = run(tmp_path / "offloaded", flags, activation_offloading=True)
    assert_same_bits(plain, offloaded)
    assert plain.returned["activation_offloading"] is None
    report = offloaded.returned["activation_offloading"]
    if "gradient_checkpointing" not in flags:
        largest = max(line["num_tokens"] for line in offloaded.metrics)
        layer_input = largest * 128 * (2 if flags.get("bf16") else 4)
        assert report["offloaded_bytes"] == 4 * layer_input  # of 5 layers
    assert report["offloaded_bytes"] > 0
    assert report["peak_host_bytes"] >= report["offloaded_bytes"]


def test_the_ledgers_host_bytes_are_those_of_the_measured_step(base, tmp_path, monkeypatch):
    """Two steps of 8 examples, of which one is measured; the other ones are longer."""
    monkeypatch.setattr("common.offload.MIN_BYTES", 1)
    rows = [{"text": "a" * length} for length in [4] * 16]
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows), "packing": False}
    flags |= {"per_device_train_batch_size": 10, "measure_memory": True, "activation_offloading": True}
    done = run(tmp_path / "out", flags)
    tokens = [line["num_tokens"] for line in done.metrics]
    assert tokens == [50, 30]
    assert bytes_of(done.returned)["on_host"] == -(-30 * 32 * 4 // 512) * 512  # of 2 layers the first one's
    assert done.returned["activation_offloading"]["offloaded_bytes"] == 50 * 32 * 4


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_the_ledger_of_an_offloaded_run(gradient_checkpointing, tmp_path, capsys):
    flags = {**OFFLOADED, "max_length": 512, "per_device_train_batch_size": 4, "measure_memory": True}
    flags["gradient_checkpointing"] = gradient_checkpointing
    ledgers = []
    for name in ("plain", "offloaded"):
        done = run(tmp_path / name, flags, activation_offloading=name == "offloaded")
        ledgers.append(bytes_of(done.returned))
    plain, offloaded = ledgers
    report = done.returned["activation_offloading"]
    assert offloaded["on_host"] <= report["peak_host_bytes"] and plain.get("on_host") is None
    moved = plain["activations"] - offloaded["activations"]
    assert moved == pytest.approx(offloaded["on_host"], rel=0.02)
    assert offloaded["peak"] < (1.001 if gradient_checkpointing else 0.6) * plain["peak"]
    moved = f"{report['offloaded_bytes'] / 2**30:.4f} GiB of a forward to the host, a pretended one"
    assert moved in capsys.readouterr().out


@pytest.mark.parametrize("form", FORMS)
def test_the_evaluation_weighs_tokens(form, evaluated, tmp_path):
    done = run(tmp_path, evaluated, max_steps=2, **FORMS[form])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    sequences = []
    for row in map(json.loads, open(evaluated["eval_dataset_name"])):
        prompt, completion = (tokenizer(row[name]).input_ids for name in ("prompt", "completion"))
        labels = [IGNORE] * len(prompt) + completion + [END]
        sequences.append({"input_ids": prompt + completion + [END], "labels": labels})
    assert done.metrics[-1]["eval_loss"] == pytest.approx(naive(model, sequences)["loss"].item(), abs=1e-5)
    assert done.returned["data"]["eval"]["examples_used"] == 7


def test_every_epoch_has_an_order_of_its_own(base, tmp_path):
    """One row a step: the tokens of the steps tell the rows apart."""
    flags = {**base, "packing": False, "per_device_train_batch_size": 1, "num_train_epochs": 2}
    tokens = [line["num_tokens"] for line in run(tmp_path / "0", flags).metrics]
    first, second = tokens[:20], tokens[20:]
    assert first != second and sorted(first) == sorted(second)
    assert [line["num_tokens"] for line in run(tmp_path / "1", flags, seed=1).metrics][:20] != first


def test_steps_and_schedule(base, tmp_path):
    done = run(tmp_path, base, max_steps=7, warmup_steps=2, learning_rate=1.0, max_grad_norm=1e-3)
    assert [line["learning_rate"] for line in done.metrics] == pytest.approx([0, 0.5, 1, 0.8, 0.6, 0.4, 0.2])
    epochs = [line["epoch"] for line in done.metrics]
    assert epochs == pytest.approx([2 / 9, 4 / 9, 6 / 9, 8 / 9, 1, 11 / 9, 13 / 9])


def test_the_first_update_is_adamw_on_the_mean_loss(base, tmp_path):
    """One step on all examples, from weights to weights, against torch's own optimizer on the naive loss."""
    done = run(
        tmp_path, base, packing=False, per_device_train_batch_size=20, weight_decay=10.0, max_grad_norm=0.5
    )
    model = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(base["model_name_or_path"])
    ids = [tokenizer(json.loads(line)["text"]).input_ids + [END] for line in open(base["dataset_name"])]
    expected = naive(model, [{"input_ids": x, "labels": x} for x in ids])
    for name, parameter in model.named_parameters():
        parameter.grad = expected[name]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    matrices = [p for name, p in model.named_parameters() if "norm" not in name]
    for parameters, weight_decay in ((matrices, 10.0), (norms, 0.0)):
        torch.optim.AdamW(parameters, lr=1e-4, weight_decay=weight_decay).step()
    assert losses(done) == pytest.approx([expected["loss"].item()], abs=1e-5)
    assert done.metrics[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert worst(done.weights, {name: p.detach() for name, p in model.named_parameters()}) <= 1e-5


# --- Memory ---


def bytes_of(summary):
    return {row["name"]: row["bytes"] for row in summary["ledger"]}


def test_without_measuring_the_ledger_has_what_tensors_tell(earlier_run):
    summary = json.loads((earlier_run / "summary.json").read_text())
    assert list(bytes_of(summary)) == ["parameters", "gradients", "optimizer"]


def test_padding_costs_bytes_that_packing_saves(base, tmp_path):
    """One step on the same 8 examples, of which one is long."""
    rows = [{"text": "a" * length} for length in (10, 14, 199, 20, 24, 12, 18, 22)]
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows), "max_length": 256}
    sizes = {"packed": 2, "padding-free": 8, "padded": 8}
    found, tokens = {}, {}
    for form, size in sizes.items():
        changes = {"per_device_train_batch_size": size, "measure_memory": True, **FORMS[form]}
        done = run(tmp_path / form, flags, **changes)
        assert len(done.metrics) == 1 and done.metrics[0]["num_scored_tokens"] == 319
        found[form], tokens[form] = bytes_of(done.returned), done.metrics[0]["num_tokens"]
    assert tokens == {"packed": 327, "padding-free": 327, "padded": 1600}
    for form in ("packed", "padding-free"):
        ratio = found[form]["activations"] / found["padded"]["activations"]
        assert ratio <= 1.05 * 327 / 1600  # less still: a mask makes SDPA repeat keys and values
        assert found[form]["peak"] < 0.5 * found["padded"]["peak"]
        assert found[form]["parameters"] == found["padded"]["parameters"]


@pytest.mark.parametrize("epochs", [1, 2, 1.6, 1.9, 0.5])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize(
    "rows_done, before, after",
    [(0, 4, 4), (16, 1, 4), (15, 1, 4), (16, 4, 1), (32, 4, 3), (4, 4, 3), (15, 5, 16), (10, 2, 16)],
)
def test_a_run_resumed_with_other_batches_trains_each_row_as_often(epochs, epoch, rows_done, before, after):
    args = Arguments(num_train_epochs=epochs, packing=False, per_device_train_batch_size=after)
    rows = in_rows([{"input_ids": [1, 2], "labels": [1, 2]}] * 35, args)
    progress = {"step": epoch * -(-35 // before) - (-rows_done // before), "epoch": epoch, "done": rows_done}
    left = rows.count_steps(progress) - progress["step"]
    if epoch + rows_done / 35 >= epochs:
        assert left == 0
        return
    trained, position = 0, rows_done
    for _ in range(left):  # as main walks through the rows
        taken = min(after, 35 - position)
        trained, position = trained + taken, position + taken
        if position == 35:
            epoch, position = epoch + 1, 0
    left_over = epochs * 35 - progress["epoch"] * 35 - rows_done
    assert left_over - 1e-9 <= trained < left_over + after  # part of an epoch is rounded up to whole steps
    assert epochs != int(epochs) or (epoch, position) == (epochs, 0)
