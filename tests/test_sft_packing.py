"""SFT with packing: the naive path's gradients, whole rows, refusals, and runs that go on bit for bit."""

import bisect
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import helpers
import hypothesis
import numpy as np
import pytest
import torch
from helpers import assert_same_bits, assert_same_curve, read_run, talk, values, worst, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import common.data
import sft_packing
from common.collators import IGNORE, flatten
from common.folders import list_checkpoints
from common.run import run_script
from common.sharding import read_pretrained
from common.truncation import fit_to_length
from sft_packing import Arguments, Rows, load_documents, plan_rows, prepare_data, tokenize

run = functools.partial(helpers.run, sft_packing)
assert_refused = functools.partial(helpers.assert_refused, sft_packing)
SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
FORMS = {
    "packed": {"packing": True},
    "padding-free": {"packing": False},
    "padded": {"packing": False, "padding_free": False},
}


# --- Models, data and runs ---


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with helpers.alone_on_the_cpu(tmp_path_factory.mktemp("cache")) as folder:
        yield folder


def random_texts(seed, count, longest=50):
    generator = random.Random(seed)
    return [{"text": helpers.random_text(generator, 3, longest)} for _ in range(count)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Flags of a run of a fraction of a second: 20 texts of 4 to 51 tokens, in 9 rows if packed."""
    folder = tmp_path_factory.mktemp("base")
    return {
        "model_name_or_path": helpers.write_model(folder / "model"),
        "dataset_name": write_jsonl(folder / "train.jsonl", random_texts(0, 20)),
        "max_length": 64,
        "per_device_train_batch_size": 2,
    }


@pytest.fixture(scope="module")
def evaluated(base, tmp_path_factory):
    """The same with an evaluation of 7 examples of uneven lengths, prompts not scored."""
    generator, folder = random.Random(6), tmp_path_factory.mktemp("evaluated")
    rows = [
        {"prompt": "p" * generator.randint(1, 20), "completion": "c" * generator.randint(1, 30)}
        for _ in range(7)
    ]
    return {**base, "eval_dataset_name": write_jsonl(folder / "eval.jsonl", rows)}


@pytest.fixture(scope="module")
def earlier_run(base, tmp_path_factory):
    """The folder of a finished run of 5 steps with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    run(folder, base, save_steps=2)
    return folder


# --- 1. Equality ---


@functools.cache
def shared_model(family):
    return helpers.tiny_model(family)


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
    return {"loss": total.detach() / max(count, 1), **helpers.gradients(model)}


def in_rows(sequences, args):
    """These sequences, as the script has planned them."""
    examples = datasets.Dataset.from_list(sequences)
    spans = np.array([(i, 0, len(s["input_ids"])) for i, s in enumerate(sequences)])
    pretrained = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    return Rows(examples, spans, {}, args, pretrained, world=1)


def computed(model, sequences, attn_implementation=None, **flags):
    """The same by the script: planned, collated, one step of several micro-batches."""
    sizes = {"max_length": 16, "per_device_train_batch_size": 3, "loss_chunk_size": 5, "max_grad_norm": 0.0}
    args = Arguments(**sizes, **flags)
    model.set_attn_implementation(attn_implementation or ("varlen" if sft_packing.is_flat(args) else "sdpa"))
    rows = in_rows(sequences, args)
    batches = list(rows.micro_batches(rows.in_order(), helpers.OneRank()))
    (sums, _), found = helpers.step_by(sft_packing, model, batches, args)
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
    sequences = helpers.documents(seed, lengths)
    generator = random.Random(seed)
    for sequence in sequences:
        sequence["labels"] = [x if generator.random() < 0.5 else IGNORE for x in sequence["labels"]]
    return sequences


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8)
@given(seed=st.integers(0, 999), lengths=st.lists(st.integers(1, 16), min_size=1, max_size=10))
def test_loss_and_every_gradient_are_those_of_documents_alone(form, seed, lengths):
    assert difference(shared_model("llama"), masked_documents(seed, lengths), **FORMS[form]) <= 1e-5


FAMILIES = [(family, "packed") for family in ("qwen3", "mistral", "gemma3_text", "gpt2")]


@pytest.mark.parametrize("family, form", [*FAMILIES, ("gemma3_text", "padded"), ("gpt2", "padded")])
def test_every_family_gives_the_naive_gradients(family, form):
    """Padded, windows and learned positions are transformers' own."""
    sequences = masked_documents(1, [7, 16, 3, 1, 9, 12, 2, 5])
    assert difference(shared_model(family), sequences, **FORMS[form]) <= 1e-5


def test_nothing_scored_changes_nothing():
    sequences = helpers.documents(0, [4, 7])
    for sequence in sequences:
        sequence["labels"] = [IGNORE] * len(sequence["labels"])
    assert computed(shared_model("llama"), sequences) == {"loss": 0}  # no gradient, no update


@pytest.mark.parametrize("packing, num_steps", [(True, 2), (False, 3)])
def test_one_batch_of_8_is_8_batches_of_1(packing, num_steps, base, tmp_path):
    """The last window is smaller: 9 rows are 8 + 1, and 20 examples are 8 + 8 + 4."""
    one = run(tmp_path / "8x1", base, packing=packing, **dict(zip(SIZES, (8, 1))))
    eight = run(tmp_path / "1x8", base, packing=packing, **dict(zip(SIZES, (1, 8))))
    assert len(one.metrics) == num_steps
    assert_same_curve(one, eight, other_data=())


def test_a_padded_run_is_a_padding_free_run(base, tmp_path):
    padded = run(tmp_path / "padded", base, **FORMS["padded"])
    flat = run(tmp_path / "flat", base, **FORMS["padding-free"])
    assert_same_curve(padded, flat)
    padding = 1 - sum(values(flat, "num_tokens")) / sum(values(padded, "num_tokens"))
    assert padded.returned["data"]["padding_fraction"] == pytest.approx(padding) and padding > 0.1
    assert flat.returned["data"]["padding_fraction"] == 0


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


@pytest.mark.parametrize(
    "family, attn_implementation, change",
    [
        ("llama", None, score_across_boundaries),
        ("llama", None, score_everything),
        ("gpt2", None, count_positions_on),  # learned positions: rotary ones are relative, a shift is nothing
        ("llama", "sdpa", count_positions_on),  # which tells documents apart by their positions
    ],
)
def test_a_flat_row_with_a_mistake_is_found(family, attn_implementation, change, monkeypatch):
    sequences, flags = masked_documents(2, [5, 11, 8, 3, 8]), {"attn_implementation": attn_implementation}
    assert difference(shared_model(family), sequences, **flags) <= 1e-5
    change_flat_rows(monkeypatch, change)
    assert difference(shared_model(family), sequences, **flags) > 1e-3


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


@settings(max_examples=100)
@given(lengths_and_limits, st.integers(0, 9))
@hypothesis.example(([], 8), 0)
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
@hypothesis.example(([], 8), 0)
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
def test_the_seed_decides_the_plan_and_lengths_are_not_changed(strategy):
    lengths = np.array([1 + i % 7 for i in range(100)])
    before = lengths.tolist()
    first, again, other = (plan_rows(lengths, 5, strategy, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first[1], other[1]) and lengths.tolist() == before


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

TALK = talk("hi", "yo", "so", "no")
TALK_TEXT = "<|user|>hi<|end|><|assistant|>yo<|end|><|user|>so<|end|><|assistant|>no<|end|>"
ASKED = {"prompt": TALK[:3], "completion": TALK[3:]}
BEGUN = {"prompt": talk("hi", "yo", "so", "n"), "completion": talk("", "o")[1:]}  # a turn goes on
WHOLE = {"prompt": TALK[:3], "completion": TALK}  # once more


@pytest.mark.parametrize(
    "row, assistant_only_loss, whole, scored",
    [
        ({"text": "abc"}, False, "abc<|end|>", "abc<|end|>"),
        ({"text": "abc<|end|>"}, False, "abc<|end|>", "abc<|end|>"),
        ({"messages": TALK}, False, TALK_TEXT, TALK_TEXT),
        ({"messages": TALK}, True, TALK_TEXT, "yo<|end|>no<|end|>"),
        ({"prompt": "1+1=", "completion": "2"}, False, "1+1=2<|end|>", "2<|end|>"),
        (ASKED, False, TALK_TEXT, "no<|end|>"),
        (ASKED, True, TALK_TEXT, "no<|end|>"),
        (BEGUN, False, TALK_TEXT, "o<|end|>"),
        (WHOLE, False, TALK_TEXT, "no<|end|>"),
    ],
)
def test_what_is_scored(row, assistant_only_loss, whole, scored):
    tokenizer = AutoTokenizer.from_pretrained(helpers.DEMO_MODEL)
    input_ids, labels = tokenize(row, tokenizer, assistant_only_loss)
    assert tokenizer.decode(input_ids) == whole and len(labels) == len(input_ids)
    assert all(label in (token, IGNORE) for token, label in zip(input_ids, labels))
    assert tokenizer.decode([label for label in labels if label != IGNORE]) == scored


def test_every_end_that_the_model_names_is_an_end(tmp_path):
    """Gemma's style: turns end in a token of their own, which is not the tokenizer's EOS."""
    turns = "{% for m in messages %}{{ m.content }}<|assistant|>\n{% endfor %}"
    model = helpers.write_model(tmp_path / "model", chat_template=turns)
    end = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("<|assistant|>")
    name = write_jsonl(tmp_path / "rows.jsonl", [{"messages": TALK}])
    # of each turn 2 letters, its end and a line break; behind the last one, EOS in its place, or nothing
    for eos, num_tokens in ((helpers.END, 4 * 4 + 1), ([helpers.END, end], 4 * 4 - 1)):
        GenerationConfig(eos_token_id=eos).save_pretrained(model)
        examples, *_ = load_documents(name, "train", read_pretrained(model), Arguments())
        assert len(examples[0]["input_ids"]) == num_tokens


def test_the_prompt_ends_where_joint_and_separate_tokenisation_part():
    # together: x ab y; "ab" holds a piece of the completion, so it is scored
    row, tokenizer = {"prompt": "xa", "completion": "by"}, helpers.byte_pair_tokenizer()
    assert tokenizer("xa")["input_ids"] == [1, 2]
    assert tokenize(row, tokenizer, False) == ([1, 5, 4, 0], [IGNORE, 5, 4, 0])


def prompt_and_completion(prompt, completion):
    return {"prompt": "p" * prompt, "completion": "c" * completion}


OVERLONG = [prompt_and_completion(9, 1), prompt_and_completion(9, 20)]  # of 11 and 30 tokens; max_length 32
OVERLONG += [prompt_and_completion(9, 50), prompt_and_completion(40, 1)]  # of 60 and 42
NO_SCORE = [{"text": text, "source": "x"} for text in ("", "abc", "")]
COUNTS = ("used", "unscored", "truncated", "split", "dropped")
COUNTS = [*(f"examples_{name}" for name in COUNTS), "tokens_kept", "tokens_cut", "tokens_unscored"]


@pytest.mark.parametrize(
    "rows, flags, counts",
    [
        # of the last, truncated, nothing scored is left
        (OVERLONG, {}, (3, 1, 1, 0, 0, 11 + 30 + 32, 28 + 10, 32)),
        (OVERLONG, {"overflow": "drop"}, (2, 0, 0, 0, 2, 11 + 30, 60 + 42, 0)),
        # split, the last is 32 tokens of prompt, left out, and a piece with the completion
        (OVERLONG, {"overflow": "split"}, (4, 0, 0, 2, 0, 11 + 30 + 60 + 10, 0, 32)),
        (OVERLONG, {"packing_strategy": "bfd_split"}, (4, 0, 0, 2, 0, 11 + 30 + 60 + 10, 0, 32)),
        (NO_SCORE, {}, (1, 2, 0, 0, 0, 4, 0, 2)),
    ],
)
def test_examples_and_tokens_are_counted(rows, flags, counts, tmp_path):
    name, pretrained = write_jsonl(tmp_path / "rows.jsonl", rows), read_pretrained(helpers.DEMO_MODEL)
    _, _, data = prepare_data(Arguments(dataset_name=name, max_length=32, **flags), pretrained, 1)
    assert {name: data[name] for name in COUNTS} == dict(zip(COUNTS, counts))
    assert data["examples_read"] == len(rows) and data["columns_unused"] == ["source"] * (rows is NO_SCORE)
    assert data["fill_fraction"] == pytest.approx(data["tokens_kept"] / (data["rows"] * 32))


def test_the_first_thousand_may_be_too_long(base, tmp_path):
    """datasets guesses columns' types from the first ones, and a single step counts for the throughput."""
    rows = [{"text": "a" * 99}] * 1001 + [{"text": "abc"}] * 3
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows), "overflow": "drop"}
    done = run(tmp_path / "out", flags, measure_memory=True)
    assert done.returned["data"]["examples_used"] == 3 and len(done.metrics) == 1
    assert done.returned["throughput"]["num_tokens"] == 3 * 4


def test_wrapped_cuts_one_stream_and_counts_what_it_split(base):
    flags = {"dataset_name": base["dataset_name"], "packing_strategy": "wrapped", "max_length": 32}
    rows, _, data = prepare_data(Arguments(**flags), read_pretrained(helpers.DEMO_MODEL), 1)
    tokens = sum(len(json.loads(line)["text"]) + 1 for line in open(base["dataset_name"]))
    assert (data["tokens_kept"], data["tokens_cut"], data["examples_used"]) == (tokens, 0, 20)
    assert data["rows"] == math.ceil(tokens / 32) and data["examples_truncated"] == 0
    pieces = Counter(rows.spans[:, 0].tolist())
    assert data["examples_split"] == sum(count > 1 for count in pieces.values()) > 0


def test_split_pieces_train_as_documents_of_their_own():
    sequences = masked_documents(3, [40, 7, 33])
    pieces = [pair for s in sequences for pair in fit_to_length(s["input_ids"], s["labels"], 16, "split")]
    pieces = [{"input_ids": input_ids, "labels": labels} for input_ids, labels in pieces]
    assert difference(shared_model("llama"), pieces) <= 1e-5


def test_tokens_are_cached_until_something_they_depend_on_changes(cache, tmp_path, monkeypatch):
    """Flags, and the text of the script and of what is beside it: whoever edits it gets new tokens."""
    pretrained = read_pretrained(helpers.DEMO_MODEL)
    name = write_jsonl(tmp_path / "rows.jsonl", [{"messages": TALK}])

    def load(**flags):
        before = set(cache.rglob("tokenised/*.arrow"))
        examples, *_ = load_documents(name, "train", pretrained, Arguments(**{"max_length": 16, **flags}))
        return len(set(cache.rglob("tokenised/*.arrow")) - before), examples[0]["input_ids"]

    _, whole = load()
    assert load() == load(learning_rate=1.0, seed=7, output_dir="elsewhere") == (0, whole)
    assert load(max_length=8) == load(assistant_only_loss=True) == (1, whole)
    for module in (common.data, sft_packing):
        folder = shutil.copytree(helpers.ROOT / "common", tmp_path / module.__name__)
        edited = Path(shutil.copy(module.__file__, folder))
        edited.write_text(edited.read_text() + "\n")
        monkeypatch.setattr(module, "__file__", str(edited))
        assert load() == (1, whole)


def test_several_processes_tokenise_alike(tmp_path):
    name, pretrained = (
        write_jsonl(tmp_path / "rows.jsonl", random_texts(4, 12)),
        read_pretrained(helpers.DEMO_MODEL),
    )
    one, spans, counts = load_documents(name, "train", pretrained, Arguments())
    two, *same = load_documents(name, "train", pretrained, Arguments(dataset_num_proc=2))
    assert one.to_list() == two.to_list() and counts == same[1] and np.array_equal(spans, same[0])


# --- 5. Refusals ---

NO_MARKERS = "{% for message in messages %}{{ message.content }}{% endfor %}"
CHAT = {"messages": TALK}
LONG = [{"text": "a" * 99}]
UNMARKED = {"chat_template": NO_MARKERS, "assistant_only_loss": True}
SMALL = {"vocab_size": 200, "pad_token_id": 0, "eos_token_id": 1}
BAD = [  # rows of the dataset, or None; flags; what the message says
    (
        [{"question": "a"}],
        {},
        "has the columns question; wanted: messages, or text, or prompt and completion",
    ),
    ([{"text": "a"}, {"text": None}], {}, "bad.jsonl, example 1: "),
    ([{"prompt": "ab", "completion": "abc"}], {}, "in 1 of 1 rows the completion begins with the whole"),
    ([{"text": ""}], {}, "no example with a scored token within --max_length 64"),
    (LONG, {"overflow": "drop"}, "no example with a scored token within --max_length 64"),
    (LONG, {"overflow": "error"}, "example 0: .*100 tokens.* 64"),
    ([CHAT], UNMARKED, "marks no assistant turns"),
    ([{"text": "a"}], {"assistant_only_loss": True}, "holds plain text"),
    (None, {"model": SMALL}, "token id 257 is outside"),
    (None, {"model": {"vocab_size": 258}, "eval_dataset_name": [CHAT]}, "token id 2.. is outside the voc"),
    (None, {"max_length": 257}, "--max_length 257 is over the model's 256"),
    (None, {"model": {"family": "mamba"}}, "sequences of a row.* --no_packing --no_padding_free"),
    (None, {"max_length": 1}, "--max_length is 1"),
    (None, {"packing": False, "packing_strategy": "wrapped"}, "wrapped needs packing"),
    (None, {"packing_strategy": "wrapped", "overflow": "drop"}, "--overflow drop"),
    (None, {"padding_free": False}, "--no_padding_free"),
    (None, {**FORMS["padded"], "attn_implementation": "varlen"}, "varlen is for flat rows"),
    (None, {"attn_implementation": "nonsense"}, "nonsense"),
]


@pytest.mark.parametrize("rows, flags, message", BAD, ids=lambda value: str(value)[-60:])
def test_what_is_bad_is_refused(rows, flags, message, base, earlier_run, tmp_path):
    flags = {**base, "overwrite_output_dir": True, **flags}
    if rows is not None:
        flags["dataset_name"] = write_jsonl(tmp_path / "bad.jsonl", rows)
    if isinstance(flags.get("eval_dataset_name"), list):
        flags["eval_dataset_name"] = write_jsonl(tmp_path / "eval.jsonl", flags["eval_dataset_name"])
    of_model = {"chat_template": flags.pop("chat_template", None), **flags.pop("model", {})}
    if any(of_model.values()):
        flags["model_name_or_path"] = helpers.write_model(tmp_path / "model", **of_model)
    assert_refused(earlier_run, flags, message)


RESUME = {"resume_from_checkpoint": "latest"}


@pytest.mark.parametrize(
    "flags, message",
    [
        ({}, "holds another run .*--resume_from_checkpoint latest.*--overwrite_output_dir"),
        # a checkpoint of another folder does not make this folder its own
        ({"resume_from_checkpoint": "checkpoint-2"}, "holds another run"),
        ({**RESUME, "max_length": 32}, "its data and this run's differ"),
        ({**RESUME, "seed": 1}, "its data and this run's differ"),
    ],
)
def test_a_folder_that_holds_another_run_is_refused(flags, message, base, earlier_run):
    assert_refused(earlier_run, {**base, **flags}, message)


def test_resuming_with_other_data_or_another_order_is_refused(base, earlier_run, tmp_path):
    rows = [json.loads(line) for line in open(base["dataset_name"])]
    rows[7]["text"] = rows[7]["text"][::-1]  # as long as before: the plan is the same
    other = {"dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows)}
    assert_refused(earlier_run, {**base, **other, **RESUME}, "its data and this run's differ")
    # unpacked, the plan is the same for every seed, but the order of the rows is not
    spans = [{"input_ids": [1, 2], "labels": [1, 2]}] * 3
    args = [Arguments(packing=False, seed=seed) for seed in (0, 0, 1)]
    first, again, second = (in_rows(spans, each).fingerprint() for each in args)
    assert first == again != second


# --- 6. Checkpoints ---


@pytest.fixture(scope="module")
def dropout(base, tmp_path_factory):
    """Flags of a run whose every step depends on all that a checkpoint holds: 8 steps, 5 to an epoch."""
    folder = tmp_path_factory.mktemp("dropout")
    return {
        **base,
        "model_name_or_path": helpers.write_model(folder / "model", attention_dropout=0.2),
        "num_train_epochs": 1.6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
    }


@pytest.fixture(scope="module")
def uninterrupted(dropout, tmp_path_factory):
    return run(tmp_path_factory.mktemp("uninterrupted"), dropout)


@pytest.fixture(scope="module")
def saved(dropout, uninterrupted, tmp_path_factory):
    """The folder of the same run with the checkpoints 2, 4, 6 and 8, which change nothing."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    assert_same_bits(run(folder, dropout, save_steps=2), uninterrupted)
    return folder


@pytest.mark.parametrize("step", [2, 6])
def test_a_resumed_run_is_the_uninterrupted_one(step, dropout, uninterrupted, saved, tmp_path, monkeypatch):
    """Within the warm-up and the first epoch, and after both: the same bits. Nothing is pickled."""

    def pickles(*args, **options):
        raise AssertionError("torch.load or torch.save was called")

    monkeypatch.setattr(torch, "load", pickles)
    monkeypatch.setattr(torch, "save", pickles)
    folder = helpers.cut_after(saved, step, tmp_path / "cut")
    resumed = run(folder, dropout, save_steps=2, **RESUME)
    assert_same_bits(resumed, uninterrupted)
    assert [step for step, _ in list_checkpoints(folder)] == [s for s in (2, 4, 6, 8) if s >= step]
    files = [path for path in (folder / "checkpoint-8").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".rng", ".json"}
    for path in files:
        json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def test_dropout_is_at_work_and_checkpointing_repeats_it(base, dropout, uninterrupted, tmp_path):
    without = run(tmp_path / "0", dropout, model_name_or_path=base["model_name_or_path"], max_steps=1)
    assert values(without, "loss")[0] != values(uninterrupted, "loss")[0]
    assert_same_curve(run(tmp_path / "1", dropout, gradient_checkpointing=False), uninterrupted)


def state_after(folder, step):
    return load_file(next((folder / f"checkpoint-{step}").glob("*.safetensors")))


@pytest.mark.parametrize(
    "make", [partial(torch.optim.SGD, momentum=0.9), partial(torch.optim.AdamW, amsgrad=True)]
)
def test_another_optimizer_is_one_edit(make, dropout, tmp_path, monkeypatch):
    """Its states are in the checkpoints, whatever their names; only the same optimizer goes on with them."""
    with monkeypatch.context() as patch:
        patch.setattr(
            sft_packing, "prepare_training", lambda model, args, run: (make(model.parameters()), None)
        )
        whole = run(tmp_path / "whole", dropout, save_steps=2)
        cut = helpers.cut_after(tmp_path / "whole", 4, tmp_path / "cut")
        assert_same_bits(run(cut, dropout, save_steps=2, **RESUME), whole)
    if make.func is torch.optim.SGD:
        assert_refused(
            tmp_path / "whole", {**dropout, **RESUME, "max_steps": 9}, "its optimizer and this run's"
        )


def test_resuming_from_an_earlier_checkpoint_replaces_the_later_ones(base, earlier_run, tmp_path):
    folder = shutil.copytree(earlier_run, tmp_path / "run")
    before = state_after(folder, 4)
    changes = {"gradient_accumulation_steps": 2, "max_steps": 4}
    run(folder, base, save_steps=2, resume_from_checkpoint=str(folder / "checkpoint-2"), **changes)
    name = next(name for name in before if name.startswith("weight."))
    assert not torch.equal(before[name], state_after(folder, 4)[name])


@pytest.fixture(scope="module")
def poisoned(base, tmp_path_factory):
    """Flags of a run in which example 5 alone holds the byte "z", whose embedding is infinite."""
    folder = tmp_path_factory.mktemp("poisoned")
    rows = [{"text": ""}, *random_texts(5, 7)]  # the first one is dropped
    rows[5]["text"] += "z"
    model = AutoModelForCausalLM.from_pretrained(helpers.write_model(folder / "model"))
    z = AutoTokenizer.from_pretrained(folder / "model")("z")["input_ids"]
    model.model.embed_tokens.weight.data[z] = math.inf
    model.save_pretrained(folder / "model")
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
    """A run by one row a step, of which most lie within a prompt: its flags, its folder, what it returned."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = [{"prompt": row["text"], "completion": "abc"} for row in random_texts(3, 4, longest=400)]
    flags = {**base, "dataset_name": write_jsonl(folder / "rows.jsonl", rows), "max_length": 32}
    flags |= {"packing_strategy": "wrapped", "per_device_train_batch_size": 1, "weight_decay": 0.5}
    flags |= {"learning_rate": 1e-2, "num_train_epochs": 1.5, "measure_memory": True}
    return flags, folder / "out", run(folder / "out", flags, save_steps=1)


def test_a_step_without_a_scored_token_changes_nothing_and_is_counted(long_prompts):
    _, folder, done = long_prompts
    scored = [line["num_scored_tokens"] > 0 for line in done.metrics]
    after_an_update = scored.index(True) + 1
    assert not all(scored[after_an_update:])  # with moments that could move weights
    for step, line in enumerate(done.metrics[1:], 2):
        before, after = state_after(folder, step - 1), state_after(folder, step)
        moved = any(not torch.equal(before[name], after[name]) for name in before)
        assert moved == scored[step - 1]
        assert (line["grad_norm"] > 0) == (line["loss"] > 0) == (line["num_tokens"] > 0) == moved
    rates = values(done, "learning_rate")
    assert rates == pytest.approx([1e-2 * (1 - i / len(rates)) for i in range(len(rates))])
    assert not scored[1]  # the step that would be measured: a later one is, which computes
    assert helpers.bytes_of(done.returned)["optimizer"] >= 8 * 1000


def test_resuming_after_steps_without_a_scored_token(long_prompts, tmp_path):
    """Adam's bias correction goes by the updates, the schedule by the steps."""
    flags, folder, whole = long_prompts
    scored = [line["num_scored_tokens"] > 0 for line in whole.metrics]
    step = len(scored) - scored[::-1].index(True) - 1  # before the last update
    assert 0 < sum(scored[:step]) < step
    cut = helpers.cut_after(folder, step, tmp_path / "cut")
    assert_same_bits(run(cut, flags, **RESUME), whole)


def test_frozen_layers_cost_their_weights_alone(dropout, tmp_path, monkeypatch):
    """In bf16, that is, through FSDP; in fp32, test_dpo_padding_free.py."""
    flags = {**dropout, "bf16": True, "save_steps": 4, "measure_memory": True}
    all_trained = helpers.bytes_of(run(tmp_path / "all", flags, max_steps=2).returned)
    in_graph = helpers.freeze_first(sft_packing, monkeypatch)
    whole = run(tmp_path / "whole", flags)
    assert not any(in_graph) and len(in_graph) >= 8
    state = state_after(tmp_path / "whole", 4)
    assert not [name for name in state if name.split(".", 1)[1].startswith(helpers.FROZEN)]
    helpers.assert_first_is_frozen(whole, load_file(Path(flags["model_name_or_path"]) / "model.safetensors"))
    found = helpers.bytes_of(whole.returned)
    assert found["parameters"] == all_trained["parameters"]
    assert found["activations"] < all_trained["activations"] and found["peak"] < all_trained["peak"]
    assert_same_bits(run(helpers.cut_after(tmp_path / "whole", 4, tmp_path / "cut"), flags, **RESUME), whole)


@pytest.mark.parametrize("function", ["run.commit_folder", "save_model"])
def test_a_run_killed_while_saving_can_be_finished(
    function, dropout, uninterrupted, saved, tmp_path, monkeypatch
):
    """The checkpoint lacks its name alone; or it is the last one, and the model is not written."""

    def killed(*args):
        raise KeyboardInterrupt

    step = 6 if "commit" in function else 8
    helpers.cut_after(saved, step - 2 if "commit" in function else step, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "common.run.commit_folder" if "commit" in function else "sft_packing.save_model", killed
        )
        run(tmp_path / "run", dropout, save_steps=2, **RESUME)
    assert (tmp_path / "run/checkpoint-6.tmp").is_dir() == ("commit" in function)
    assert not (tmp_path / "run/summary.json").exists()
    assert_same_bits(run(tmp_path / "run", dropout, save_steps=2, **RESUME), uninterrupted)
    assert not list((tmp_path / "run").glob("*.tmp")) and (tmp_path / "run/summary.json").exists()


def test_sigterm_saves_a_checkpoint_and_ends_with_code_0(base, earlier_run, tmp_path, monkeypatch, capsys):
    """In its third step, by the command line; and it goes on to the same end."""
    flags, calls, batch_loss = {**base, "output_dir": tmp_path / "run"}, [], sft_packing.batch_loss

    def terminated(*args):
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_loss(*args)

    monkeypatch.setattr(sys, "argv", ["x", *(f"--{name}={value}" for name, value in flags.items())])
    monkeypatch.setattr(sft_packing, "batch_loss", terminated)
    run_script(sft_packing.main, Arguments)  # which a code other than 0 would leave by SystemExit
    assert "saved checkpoint-3; continue with --resume_from_checkpoint latest" in capsys.readouterr().err
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [3] and len(calls) == 3
    assert_same_bits(run(tmp_path / "run", base, **RESUME), read_run(earlier_run))


# --- 7. Ranks ---

OFFLOADED = {  # layer inputs of 64 KiB and more, or nothing would move
    "dataset_name": str(helpers.ROOT / "demo/sft_eval.jsonl"),
    "max_length": 128,
    "learning_rate": 1e-3,
    "max_steps": 2,
}
TWO_EPOCHS = {"num_train_epochs": 2, "learning_rate": 1e-3, "save_steps": 2}  # 9 rows: 4 + 4 + 1, twice


@pytest.fixture(scope="module")
def two_ranks(evaluated, base, tmp_path_factory):
    """Several runs on two ranks, one after another, in one start: their folder, and each rank's results."""
    folder = tmp_path_factory.mktemp("two")
    jobs = {
        # steps of 4 rows on 2 ranks, 2 x 1 on each; the last step of an epoch leaves the second a dummy
        "curve": {**evaluated, **TWO_EPOCHS, **dict(zip(SIZES, (1, 2)))},
        "plain": OFFLOADED,
        "offloaded": {**OFFLOADED, "activation_offloading": True},
        "missing": {**base, "dataset_name": "none.jsonl"},
    }
    return folder, helpers.run_on_two_ranks("sft_packing", jobs, folder)


def test_two_ranks_are_one_rank(two_ranks, evaluated, tmp_path):
    folder = two_ranks[0] / "curve"
    one = run(tmp_path / "one", evaluated, **TWO_EPOCHS, gradient_accumulation_steps=2)
    two = read_run(folder)
    assert_same_curve(two, one)
    assert [a["num_tokens"] - b["num_tokens"] for a, b in zip(two.metrics, one.metrics)] == [0, 0, 2, 0, 0, 2]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["data"] == one.returned["data"]
    # and one rank goes on with their checkpoint
    cut = helpers.cut_after(folder, 2, tmp_path / "cut")
    resumed = run(cut, evaluated, **TWO_EPOCHS, **dict(zip(SIZES, (4, 1))), **RESUME)
    assert_same_curve(resumed, two)
    assert values(resumed, "loss")[:2] == values(two, "loss")[:2]


def test_offloading_changes_nothing_on_two_ranks(two_ranks):
    plain, offloaded = (read_run(two_ranks[0] / name) for name in ("plain", "offloaded"))
    assert_same_bits(plain, offloaded)
    report = two_ranks[1][0]["offloaded"]["returned"]["activation_offloading"]
    assert 0.9 * 4 * 256 * 128 * 4 < report["offloaded_bytes"] <= 4 * 256 * 128 * 4


def test_an_error_on_the_first_rank_ends_the_other(two_ranks):
    folder, (first, second) = two_ranks
    assert "none.jsonl does not exist" in first["missing"]["error"]
    assert "another rank cannot go on" in second["missing"]["error"]
    assert not (folder / "missing").exists()


# --- 8. What a run leaves behind ---

METRICS = (
    "step epoch loss grad_norm learning_rate num_tokens num_scored_tokens tokens_per_second step_seconds"
)
SUMMARY = "args versions device world_size data throughput ledger activation_offloading final_metrics"


def test_what_a_run_leaves_behind(evaluated, tmp_path):
    done = run(tmp_path, evaluated, eval_steps=2, save_steps=3, logging_steps=2)
    for line in done.metrics:
        evaluates = line["step"] in (2, 4, 5)  # and at the end
        assert set(line) == {*METRICS.split(), "peak_memory_bytes"} | ({"eval_loss"} if evaluates else set())
        assert line["tokens_per_second"] == pytest.approx(line["num_tokens"] / line["step_seconds"])
    assert values(done, "step") == [1, 2, 3, 4, 5] and done.metrics[-1]["epoch"] == 1.0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == set(SUMMARY.split()) and json.loads(json.dumps(done.returned)) == summary
    assert summary["args"]["max_length"] == 64 and summary["final_metrics"] == done.metrics[-1]
    tokens = sum(values(done, "num_tokens"))
    assert summary["throughput"]["num_tokens"] == summary["data"]["tokens_kept"] == tokens
    assert list(helpers.bytes_of(summary)) == [
        "parameters",
        "gradients",
        "optimizer",
    ]  # nothing else was measured
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_saved_model_is_the_trained_one(base, tmp_path):
    """Here in bf16, its head tied; every tensor of other models: test_sharding.py."""
    folder = helpers.write_model(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True)
    done = run(tmp_path / "out", base, model_name_or_path=folder, save_steps=5, learning_rate=1e-2)
    model, state = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), state_after(tmp_path / "out", 5)
    came = load_file(Path(folder) / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, state[f"weight.{name}"].bfloat16()) and parameter.ne(came[name]).any()
    assert done.weights.keys() == came.keys()  # a tied weight once
    tokenizer, original = map(AutoTokenizer.from_pretrained, (tmp_path / "out", helpers.DEMO_MODEL))
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer("a<|end|>").input_ids == original("a<|end|>").input_ids
    # and it can go straight into the next run
    run(tmp_path / "next", base, model_name_or_path=str(tmp_path / "out"), max_steps=1)


def test_bf16_follows_fp32(base, earlier_run, tmp_path):
    exact, half = read_run(earlier_run), run(tmp_path / "bf16", base, bf16=True)
    assert not torch.distributed.is_initialized()
    assert values(half, "loss") != values(exact, "loss")
    assert values(half, "loss") == pytest.approx(values(exact, "loss"), rel=0.01)
    assert all(weight.dtype == torch.float32 for weight in half.weights.values())


@pytest.mark.parametrize(
    "changes",
    [{"bf16": True, "gradient_accumulation_steps": 2}, {"gradient_checkpointing": False}, FORMS["padded"]],
    ids=str,
)
def test_offloading_changes_only_where_activations_wait(changes, base, tmp_path, monkeypatch):
    monkeypatch.setattr("common.offload.MIN_BYTES", 1)
    plain = run(tmp_path / "plain", base, **changes, max_steps=3)
    offloaded = run(tmp_path / "offloaded", base, activation_offloading=True, **changes, max_steps=3)
    assert_same_bits(plain, offloaded)
    assert plain.returned["activation_offloading"] is None
    report = offloaded.returned["activation_offloading"]
    assert report["peak_host_bytes"] >= report["offloaded_bytes"] > 0


def test_the_ledgers_host_bytes_are_those_of_the_measured_step(base, tmp_path, monkeypatch):
    """Two steps of 8 examples, of which one is measured; the other ones are longer."""
    monkeypatch.setattr("common.offload.MIN_BYTES", 1)
    rows = [{"text": "a" * length} for length in [4] * 16]
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows), "packing": False}
    flags |= {"per_device_train_batch_size": 10, "measure_memory": True, "activation_offloading": True}
    done = run(tmp_path / "out", flags)
    tokens = [line["num_tokens"] for line in done.metrics]
    assert tokens == [50, 30]
    assert (
        helpers.bytes_of(done.returned)["on_host"] == -(-30 * 32 * 4 // 512) * 512
    )  # of 2 layers the first one's
    assert done.returned["activation_offloading"]["offloaded_bytes"] == 50 * 32 * 4


def test_the_ledger_of_an_offloaded_run(tmp_path, capsys):
    flags = {**OFFLOADED, "max_length": 256, "per_device_train_batch_size": 4, "measure_memory": True}
    flags["gradient_checkpointing"] = False
    plain = helpers.bytes_of(run(tmp_path / "plain", flags).returned)
    done = run(tmp_path / "offloaded", flags, activation_offloading=True)
    offloaded, report = helpers.bytes_of(done.returned), done.returned["activation_offloading"]
    assert offloaded["on_host"] <= report["peak_host_bytes"] and plain.get("on_host") is None
    moved = plain["activations"] - offloaded["activations"]
    assert moved == pytest.approx(offloaded["on_host"], rel=0.02)
    assert offloaded["peak"] < 0.7 * plain["peak"]
    moved = f"{report['offloaded_bytes'] / 2**30:.4f} GiB of a forward to the host, a pretended one"
    assert moved in capsys.readouterr().out


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_the_evaluation_weighs_tokens_and_drops_none(form, evaluated, dropout, tmp_path):
    flags = {**evaluated, "model_name_or_path": dropout["model_name_or_path"]}
    done = run(tmp_path, flags, max_steps=2, **FORMS[form])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    rows = map(json.loads, open(evaluated["eval_dataset_name"]))
    pairs = [tokenize(row, tokenizer, False) for row in rows]
    expected = naive(model, [{"input_ids": input_ids, "labels": labels} for input_ids, labels in pairs])
    assert done.metrics[-1]["eval_loss"] == pytest.approx(expected["loss"].item(), abs=1e-5)
    assert done.returned["data"]["eval"]["examples_used"] == 7


def test_every_epoch_has_an_order_of_its_own():
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        args = Arguments(packing=False, seed=seed, per_device_train_batch_size=1)
        rows = in_rows([{"input_ids": [1, 2], "labels": [1, 2]}] * 20, args)
        orders.append(np.concatenate([chunk for [chunk] in rows.steps(epoch, 0)]).tolist())
        assert sorted(orders[-1]) == list(range(20))
    assert len(set(map(tuple, orders))) == 3


def test_steps_and_schedule(base, tmp_path):
    done = run(tmp_path, base, max_steps=7, warmup_steps=2, learning_rate=1.0, max_grad_norm=1e-3)
    assert [line["learning_rate"] for line in done.metrics] == pytest.approx([0, 0.5, 1, 0.8, 0.6, 0.4, 0.2])
    epochs = [line["epoch"] for line in done.metrics]
    assert epochs == pytest.approx([2 / 9, 4 / 9, 6 / 9, 8 / 9, 1, 11 / 9, 13 / 9])


def test_the_first_update_is_adamw_on_the_mean_loss(base, tmp_path):
    """One step on all examples, from weights to weights, against torch's own optimizer on the naive loss."""
    flags = {"packing": False, "per_device_train_batch_size": 20, "weight_decay": 10.0, "max_grad_norm": 0.5}
    done = run(tmp_path, base, **flags)
    model = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(base["model_name_or_path"])
    ids = [
        tokenizer(json.loads(line)["text"]).input_ids + [helpers.END] for line in open(base["dataset_name"])
    ]
    expected = naive(model, [{"input_ids": x, "labels": x} for x in ids])
    for name, parameter in model.named_parameters():
        parameter.grad = expected[name]
    weights, norm = helpers.update_plainly(model, 1e-4, 0.5)
    assert values(done, "loss") == pytest.approx([expected["loss"].item()], abs=1e-5)
    assert done.metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.5
    assert worst(done.weights, weights) <= 1e-5


# --- 9. Memory ---


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
        found[form], tokens[form] = helpers.bytes_of(done.returned), done.metrics[0]["num_tokens"]
    assert tokens == {"packed": 327, "padding-free": 327, "padded": 1600}
    for form in ("packed", "padding-free"):
        ratio = found[form]["activations"] / found["padded"]["activations"]
        assert ratio <= 1.05 * 327 / 1600  # less still: a mask makes SDPA repeat keys and values
        assert found[form]["peak"] < 0.5 * found["padded"]["peak"]
        assert found[form]["parameters"] == found["padded"]["parameters"]


SHAPES = [(0, 4, 4), (16, 1, 4), (15, 1, 4), (16, 4, 1), (32, 4, 3), (4, 4, 3), (15, 5, 16), (10, 2, 16)]


@pytest.mark.parametrize("rows_done, before, after", SHAPES)
def test_a_run_resumed_with_other_batches_trains_each_row_as_often(rows_done, before, after):
    args = Arguments(packing=False, per_device_train_batch_size=after)
    rows = in_rows([{"input_ids": [1, 2], "labels": [1, 2]}] * 35, args)
    for args.num_train_epochs, epoch in itertools.product([1, 2, 1.6, 1.9, 0.5], [0, 1]):
        step = epoch * -(-35 // before) - (-rows_done // before)
        progress = {"step": step, "epoch": epoch, "done": rows_done}
        left, wanted = rows.count_steps(progress) - step, (args.num_train_epochs - epoch) * 35 - rows_done
        if wanted <= 0:
            assert left == 0
            continue
        trained = 0
        for _ in range(left):  # as main walks through the rows
            taken = min(after, 35 - progress["done"])
            rows.advance(progress, range(taken))
            trained += taken
        assert wanted - 1e-9 <= trained < wanted + after  # part of an epoch is rounded up to whole steps
        whole = args.num_train_epochs == int(args.num_train_epochs)
        assert not whole or (progress["epoch"], progress["done"]) == (args.num_train_epochs, 0)
