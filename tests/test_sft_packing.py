"""SFT with packing: the naive path's gradients, whole rows, what is scored, and refusals of its own."""

import bisect
import functools
import itertools
import json
import math
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import helpers
import hypothesis
import numpy as np
import pytest
import torch
from helpers import assert_same_bits, talk, values, worst, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import common.data
import sft_packing
from common.collators import IGNORE, flatten
from common.sharding import read_pretrained
from sft_packing import Arguments, Rows, load_documents, plan_rows, prepare_data, tokenize

run = functools.partial(helpers.run, sft_packing)
FORMS = {
    "packed": {},
    "wrapped": {"packing_strategy": "wrapped"},
    "padding-free": {"packing": False},
    "padded": {"packing": False, "padding_free": False},
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with helpers.alone_on_the_cpu(tmp_path_factory.mktemp("cache")) as folder:
        yield folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    return helpers.small_run(sft_packing, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def base(evaluated):
    return {name: value for name, value in evaluated.items() if name != "eval_dataset_name"}


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


def difference(model, sequences, attn_implementation=None, **flags):
    """The worst difference in the loss or in any gradient: naive against the script's, planned, collated, one
    step of several micro-batches.
    """
    sizes = {"max_length": 16, "per_device_train_batch_size": 3, "loss_chunk_size": 5, "max_grad_norm": 0.0}
    args = Arguments(**sizes, **flags)
    rows = in_rows(sequences, args)
    pieces = [{name: s[name][a:b] for name in s} for i, a, b in rows.spans.tolist() for s in [sequences[i]]]
    assert sum(len(piece["labels"]) for piece in pieces) == sum(len(each["labels"]) for each in sequences)
    expected = naive(model, pieces)
    model.set_attn_implementation(attn_implementation or ("varlen" if sft_packing.is_flat(args) else "sdpa"))
    batches = list(rows.micro_batches(rows.in_order(), helpers.OneRank()))
    (_, means), found = helpers.step_by(sft_packing, model, batches, args)
    if not found:  # nothing was scored: no gradient, no update
        assert means["loss"] == 0 and all(torch.count_nonzero(value) == 0 for value in expected.values())
        return 0.0
    return worst({"loss": torch.tensor(means["loss"]), **found}, expected)


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
@hypothesis.example(seed=0, lengths=[1])  # nothing is scored
def test_loss_and_every_gradient_are_those_of_documents_alone(form, seed, lengths):
    assert difference(shared_model("llama"), masked_documents(seed, lengths), **FORMS[form]) <= 1e-5


@pytest.mark.parametrize("form", ["packed", "wrapped"])
def test_split_pieces_train_as_documents_of_their_own(form):
    assert difference(shared_model("llama"), masked_documents(3, [40, 7, 33]), **FORMS[form]) <= 1e-5


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3_text", "gpt2"])
def test_every_family_gives_the_naive_gradients(family):
    sequences = masked_documents(1, [7, 16, 3, 1, 9, 12, 2, 5])
    assert difference(shared_model(family), sequences) <= 1e-5
    if family in ("gemma3_text", "gpt2"):  # padded, windows and learned positions are transformers' own
        assert difference(shared_model(family), sequences, **FORMS["padded"]) <= 1e-5


# --- 2. Mutations: what the comparisons above would catch ---


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
    def changed(sequences):
        row = flatten(sequences)
        change(row, row["cu_seq_lens_q"][:-1].long())
        return row

    sequences, flags = masked_documents(2, [5, 11, 8, 3, 8]), {"attn_implementation": attn_implementation}
    assert difference(shared_model(family), sequences, **flags) <= 1e-5
    monkeypatch.setattr(sft_packing, "flatten", changed)
    assert difference(shared_model(family), sequences, **flags) > 1e-3


def test_a_mean_per_micro_batch_is_found(monkeypatch):
    """The mean of means that plain gradient accumulation takes; 7 documents are 3 + 3 + 1."""
    sequences, batch_loss = masked_documents(2, [5, 11, 8, 3, 8, 9, 12]), sft_packing.batch_loss
    total = sum(label != IGNORE for s in sequences for label in s["labels"][1:])

    def mean(model, batch, args):
        loss, metrics = batch_loss(model, batch, args)
        return loss / len(batch["score_ids"]) * total / 3, metrics

    assert difference(shared_model("llama"), sequences, packing=False) <= 1e-5
    monkeypatch.setattr(sft_packing, "batch_loss", mean)
    assert difference(shared_model("llama"), sequences, packing=False) > 1e-3


# --- 3. The plan ---

STRATEGIES = ("bfd", "wrapped")
lengths_and_limits = st.tuples(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 24))


def rows_of(plan):
    row_offsets, spans = plan
    assert row_offsets.dtype == spans.dtype == np.int64 and spans.shape == (row_offsets[-1], 3)
    assert row_offsets[0] == 0
    return [[tuple(span) for span in spans[a:b].tolist()] for a, b in zip(row_offsets[:-1], row_offsets[1:])]


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


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=100)
@given(case=lengths_and_limits, seed=st.integers(0, 9))
@hypothesis.example(case=([], 8), seed=0)
def test_a_plan_keeps_tokens_limits_and_documents(strategy, case, seed):
    lengths, max_length = case
    rows = rows_of(plan_rows(lengths, max_length, strategy, seed))
    assert all(0 < fill <= max_length for fill in fills(rows))
    for example, length in enumerate(lengths):  # every token once
        pieces = sorted(span for row in rows for span in row if span[0] == example)
        bounds = [start for _, start, _ in pieces] + [length]
        assert bounds[0] == 0 and [stop for _, _, stop in pieces] == bounds[1:]
        assert bounds == sorted(set(bounds))
        if strategy == "bfd":  # one piece if it fits: whole, in one row
            assert len(pieces) == math.ceil(length / max_length)
    stream = [example for row in rows for example, _, _ in row]
    assert len(set(stream)) == len(lengths)
    if strategy == "bfd":
        sizes = [stop - start for row in rows for _, start, stop in row]
        assert sorted(fills(rows)) == sorted(item_by_item(sizes, max_length))  # so never more rows either
    else:
        assert all(fill == max_length for fill in fills(rows)[:-1])
        assert len(list(itertools.groupby(stream))) == len(lengths)  # an example's pieces follow one another


@pytest.mark.parametrize(
    "lengths, max_length, strategy, message",
    [
        ([3], 0, "bfd", "max_length is 0"),
        ([3, 0], 8, "bfd", "lengths"),
        ([[3]], 8, "wrapped", "lengths"),
        ([3], 8, "bfd_split", "strategy is 'bfd_split'"),
    ],
)
def test_plan_rows_refuses(lengths, max_length, strategy, message):
    with pytest.raises(ValueError, match=message):
        plan_rows(lengths, max_length, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_million_lengths_are_planned_at_once(strategy):
    lengths = np.random.default_rng(0).lognormal(6, 1, 1_000_000).astype(int).clip(1, 4096)
    started = time.process_time()
    row_offsets, spans = plan_rows(lengths, 4096, strategy)
    assert time.process_time() - started < 2
    assert (spans[:, 2] - spans[:, 1]).sum() == lengths.sum()
    assert len(row_offsets) - 1 <= math.ceil(1.001 * lengths.sum() / 4096)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_plan_is_shuffled_as_the_seed_says(strategy):
    """Neighbours in the data are no neighbours in a row, and long documents do not come first."""
    lengths = np.array([8] * 1000)
    first, again, other = (plan_rows(lengths, 16, strategy, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first[1], other[1]) and lengths.tolist() == [8] * 1000
    pairs = rows_of(first)
    assert all(len(row) == 2 for row in pairs)
    assert sum(abs(one[0] - two[0]) == 1 for one, two in pairs) < 20  # 1 expected by chance
    if strategy == "bfd":
        rows = rows_of(plan_rows(list(range(51, 101)), 100))
        assert abs(np.corrcoef(fills(rows), np.arange(50))[0, 1]) < 0.5


ROWS = [{"input_ids": [1, 2], "labels": [1, 2]}]


def test_every_epoch_and_seed_has_an_order_of_its_own():
    """Which a checkpoint's data has in its name: unpacked, the plan is the same for every seed."""
    orders, names = [], []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        args = Arguments(packing=False, seed=seed, per_device_train_batch_size=1)
        rows = in_rows(ROWS * 20, args)
        orders.append(np.concatenate([chunk for [chunk] in rows.steps(epoch, 0)]).tolist())
        names.append(rows.fingerprint())
        assert sorted(orders[-1]) == list(range(20))
    assert len(set(map(tuple, orders))) == 3 and names[0] == names[1] != names[2]


SHAPES = [(0, 4, 4), (16, 1, 4), (15, 1, 4), (16, 4, 1), (32, 4, 3), (4, 4, 3), (15, 5, 16), (10, 2, 16)]


@pytest.mark.parametrize("rows_done, before, after", SHAPES)
def test_a_run_resumed_with_other_batches_trains_each_row_as_often(rows_done, before, after):
    args = Arguments(packing=False, per_device_train_batch_size=after)
    rows = in_rows(ROWS * 35, args)
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


# --- 4. Data ---

TALK = talk("hi", "yo", "so", "no")
TALK_TEXT = "<|user|>hi<|end|><|assistant|>yo<|end|><|user|>so<|end|><|assistant|>no<|end|>"
ASKED = {"prompt": TALK[:3], "completion": TALK[3:]}
BEGUN = {"prompt": talk("hi", "yo", "so", "n"), "completion": talk("", "o")[1:]}  # a turn goes on
WHOLE = {"prompt": TALK[:3], "completion": [{**message, "name": None} for message in TALK]}  # once more


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


def test_the_prompt_ends_where_joint_and_separate_tokenisation_part():
    # together: x ab y; "ab" holds a piece of the completion, so it is scored
    row, tokenizer = {"prompt": "xa", "completion": "by"}, helpers.byte_pair_tokenizer()
    assert tokenizer("xa")["input_ids"] == [1, 2]
    assert tokenize(row, tokenizer, False) == ([1, 5, 4, 0], [IGNORE, 5, 4, 0])


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


def test_wrapped_cuts_one_stream_and_counts_what_it_split(base):
    flags = {"dataset_name": base["dataset_name"], "packing_strategy": "wrapped", "max_length": 32}
    rows, _, data = prepare_data(Arguments(**flags), read_pretrained(helpers.DEMO_MODEL), 1)
    tokens = sum(len(json.loads(line)["text"]) + 1 for line in open(base["dataset_name"]))
    assert (data["tokens_kept"], data["tokens_cut"], data["examples_used"]) == (tokens, 0, 20)
    assert data["rows"] == math.ceil(tokens / 32) and data["examples_truncated"] == 0
    pieces = Counter(rows.spans[:, 0].tolist())
    assert data["examples_split"] == sum(count > 1 for count in pieces.values()) > 0


def test_the_first_thousand_may_be_too_long(base, tmp_path):
    """datasets guesses columns' types from the first ones, and a single step counts for the throughput."""
    rows = [{"text": "a" * 99}] * 1001 + [{"text": "abc"}] * 3
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows), "overflow": "drop"}
    done = run(tmp_path / "out", flags, measure_memory=True)
    assert done.returned["data"]["examples_used"] == 3 and len(done.metrics) == 1
    assert done.returned["throughput"]["num_tokens"] == 3 * 4


def test_tokens_are_cached_until_something_they_depend_on_changes(cache, tmp_path, monkeypatch):
    """Flags, and the text of the script and of what is beside it: whoever edits it gets new tokens. Two
    processes make the same ones as one.
    """
    pretrained = read_pretrained(helpers.DEMO_MODEL)
    name = write_jsonl(tmp_path / "rows.jsonl", [{"messages": TALK}] * 3)

    def load(**flags):
        before = set(cache.rglob("tokenised/*.arrow"))
        examples, spans, counts = load_documents(
            name, "train", pretrained, Arguments(**{"max_length": 16, **flags})
        )
        files = len(set(cache.rglob("tokenised/*.arrow")) - before)
        return files, (examples.to_list(), spans.tolist(), counts)

    files, whole = load(dataset_num_proc=2)
    assert files == 2
    assert load() == load(learning_rate=1.0, seed=7, output_dir="elsewhere") == (0, whole)
    for changes in ({"max_length": 8}, {"assistant_only_loss": True}):
        files, other = load(**changes)
        assert files == 1 and other != whole
    for module in (common.data, sft_packing):
        folder = shutil.copytree(helpers.ROOT / "common", tmp_path / module.__name__)
        edited = Path(shutil.copy(module.__file__, folder))
        edited.write_text(edited.read_text() + "\n")
        monkeypatch.setattr(module, "__file__", str(edited))
        assert load() == (1, whole)


# --- 5. Refusals ---

NO_MARKERS = "{% for message in messages %}{{ message.content }}{% endfor %}"
MARKED = {"assistant_only_loss": True}
LONG = [{"text": "a" * 99}]
NONE_LEFT = "no example with a scored token within --max_length 64"
BAD = [  # rows of the dataset, or None; flags; what the message says
    ([{"text": "a"}, {"text": None}], {}, "bad.jsonl, example 1: "),
    ([{"prompt": "ab", "completion": "abc"}], {}, "in 1 of 1 rows the completion begins with the whole"),
    ([{"text": ""}], {}, NONE_LEFT),
    (LONG, {"overflow": "drop"}, NONE_LEFT),
    (LONG, {"overflow": "error"}, "example 0: .*100 tokens.* 64"),
    ([{"messages": TALK}], {"model": {"chat_template": NO_MARKERS}, **MARKED}, "marks no assistant turns"),
    ([{"text": "a"}], MARKED, "holds plain text"),
    (None, {"model": {"family": "mamba"}}, "sequences of a row.* --no_packing --no_padding_free"),
    (None, {"packing": False, "packing_strategy": "wrapped"}, "wrapped needs packing"),
    (None, {"packing_strategy": "wrapped", "overflow": "drop"}, "--overflow drop"),
    (None, {"padding_free": False}, "--no_padding_free"),
]


@pytest.mark.parametrize("rows, flags, message", BAD, ids=lambda value: str(value)[-60:])
def test_what_is_bad_is_refused(rows, flags, message, base, tmp_path):
    flags = {**base, **flags}
    if rows:
        flags["dataset_name"] = write_jsonl(tmp_path / "bad.jsonl", rows)
    if "model" in flags:
        flags["model_name_or_path"] = helpers.write_model(tmp_path / "model", **flags.pop("model"))
    helpers.assert_refused(sft_packing, tmp_path, flags, message)


# --- 6. Runs ---


def test_an_edited_loss_and_a_further_sum_are_logged_and_evaluated(base, tmp_path, monkeypatch):
    flags = {**base, "max_steps": 2, "eval_dataset_name": base["dataset_name"]}
    plain, batch_loss = run(tmp_path / "plain", flags).metrics, sft_packing.batch_loss

    def edited(model, batch, args):
        loss, _ = batch_loss(model, batch, args)
        return 2 * loss, {"thirds": loss / 3}

    monkeypatch.setattr(sft_packing, "batch_loss", edited)
    for edit, line in zip(run(tmp_path / "edited", flags, learning_rate=0.0).metrics, plain):
        if line["step"] == 1:  # of the same weights
            assert edit["loss"] == pytest.approx(2 * line["loss"])
            assert edit["grad_norm"] == pytest.approx(2 * line["grad_norm"])
        assert edit["thirds"] == pytest.approx(edit["loss"] / 6)
    assert edit["eval_thirds"] == pytest.approx(edit["eval_loss"] / 6)


@pytest.fixture(scope="module")
def long_prompts(base, tmp_path_factory):
    """A run by one row a step, of which most lie within a prompt: its flags, its folder, what it returned."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = [{"prompt": row["text"], "completion": "abc"} for row in helpers.random_texts(3, 4, longest=400)]
    flags = {**base, "dataset_name": write_jsonl(folder / "rows.jsonl", rows), "max_length": 32}
    flags |= {"packing_strategy": "wrapped", "per_device_train_batch_size": 1, "weight_decay": 0.5}
    flags |= {"learning_rate": 1e-2, "num_train_epochs": 1.5, "measure_memory": True}
    return flags, folder / "out", run(folder / "out", flags, save_steps=1)


def test_a_step_without_a_scored_token_changes_nothing_and_is_counted(long_prompts):
    _, folder, done = long_prompts
    scored = [line["num_scored_tokens"] > 0 for line in done.metrics]
    assert not all(scored[scored.index(True) + 1 :])  # after an update, with moments that could move weights
    files = [next((folder / f"checkpoint-{line['step']}").glob("*.safetensors")) for line in done.metrics]
    for earlier, later, line in zip(files, files[1:], done.metrics[1:]):
        before, after = load_file(earlier), load_file(later)
        moved = any(not torch.equal(before[name], after[name]) for name in before)
        assert moved == (line["num_scored_tokens"] > 0)
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
    assert_same_bits(run(cut, flags, resume_from_checkpoint="latest"), whole)


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_the_evaluation_weighs_tokens_drops_none_and_knows_no_dropout(form, evaluated, tmp_path):
    flags = {**evaluated, **FORMS[form], "max_steps": 2}
    flags["model_name_or_path"] = helpers.write_model(tmp_path / "model", attention_dropout=0.2)
    done = run(tmp_path / "out", flags)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    pairs = [tokenize(json.loads(row), tokenizer, False) for row in open(evaluated["eval_dataset_name"])]
    expected = naive(model, [{"input_ids": input_ids, "labels": labels} for input_ids, labels in pairs])
    assert done.metrics[-1]["eval_loss"] == pytest.approx(expected["loss"].item(), abs=1e-5)


def test_the_first_update_is_adamw_on_the_mean_loss(base, tmp_path):
    """One step on all examples, from weights to weights, against torch's own optimizer on the naive loss."""
    flags = {"packing": False, "per_device_train_batch_size": 20, "weight_decay": 10.0, "max_grad_norm": 0.5}
    done = run(tmp_path, base, **flags, learning_rate=1e-4)
    model = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(base["model_name_or_path"])
    texts = [json.loads(line)["text"] for line in open(base["dataset_name"])]
    ids = [tokenizer(text).input_ids + [helpers.END] for text in texts]
    expected = naive(model, [{"input_ids": x, "labels": x} for x in ids])
    for name, parameter in model.named_parameters():
        parameter.grad = expected[name]
    weights, norm = helpers.update_plainly(model, 1e-4, 0.5)
    assert values(done, "loss") == pytest.approx([expected["loss"].item()], abs=1e-5)
    assert done.metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.5
    assert worst(done.weights, weights) <= 1e-5


def test_the_ledgers_host_bytes_are_those_of_the_measured_step(base, tmp_path, monkeypatch, capsys):
    """Of two steps, which offload the first of 2 layers, the shorter one is measured."""
    monkeypatch.setattr("common.offload.MIN_BYTES", 1)
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", [{"text": "aaaa"}] * 16)}
    flags |= {"packing": False, "per_device_train_batch_size": 10, "measure_memory": True}
    done = run(tmp_path / "out", flags, activation_offloading=True)
    assert values(done, "num_tokens") == [50, 30]
    assert helpers.bytes_of(done.returned)["on_host"] == math.ceil(30 * 32 * 4 / 512) * 512
    report = done.returned["activation_offloading"]
    assert report["offloaded_bytes"] == 50 * 32 * 4 <= report["peak_host_bytes"]
    moved = f"{report['offloaded_bytes'] / 2**30:.4f} GiB of a forward to the host, which here is"
    assert moved in capsys.readouterr().out


def test_what_waits_on_the_host_is_no_activation_here(tmp_path):
    flags = {"dataset_name": str(helpers.ROOT / "demo/sft_eval.jsonl"), "max_length": 256, "max_steps": 2}
    flags |= {"per_device_train_batch_size": 4, "gradient_checkpointing": False, "measure_memory": True}
    plain, offloaded = (
        helpers.bytes_of(run(tmp_path / str(moves), flags, activation_offloading=moves).returned)
        for moves in (False, True)
    )
    moved = plain["activations"] - offloaded["activations"]
    assert moved == pytest.approx(offloaded["on_host"], rel=0.02) and "on_host" not in plain
    assert offloaded["peak"] < 0.7 * plain["peak"]
