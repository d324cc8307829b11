"""Sequences -> padded batch or flat row: every token once, nothing scored across a boundary."""

import copy

import pytest
import torch
from helpers import documents
from hypothesis import given
from hypothesis import strategies as st

from common.collators import IGNORE, flatten, flatten_shared_prompt, pad

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
lengths = st.lists(st.integers(1, 12), min_size=1, max_size=8)
seeds = st.integers(0, 999)


def scored_tokens(labels):
    """What a causal LM's loss sees: labels shifted by one."""
    return labels[:, 1:][labels[:, 1:] != IGNORE].tolist()


def expected_tokens(sequences):
    return [label for s in sequences for label in s["labels"][1:] if label != IGNORE]


def masked_documents(seed, lengths):
    """Documents whose first third of tokens is not scored."""
    sequences = documents(seed, lengths)
    for s in sequences:
        prompt = len(s["labels"]) // 3
        s["labels"][:prompt] = [IGNORE] * prompt
    return sequences


def check_dtypes(row):
    for name, value in row.items():
        if name in ("max_length_q", "max_length_k"):
            assert type(value) is int
        else:
            assert value.dtype == (torch.int32 if name in BOUNDARIES else torch.int64), name


# --- flatten ---


def test_flat_row_by_hand():
    row = flatten([{"input_ids": [5, 6, 0], "labels": [-100, 6, 0]}, {"input_ids": [7, 8], "labels": [7, 8]}])
    check_dtypes(row)
    assert {name: value.tolist() for name, value in row.items() if torch.is_tensor(value)} == {
        "input_ids": [[5, 6, 0, 7, 8]],
        "labels": [[-100, 6, 0, -100, 8]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "cu_seq_lens_q": [0, 3, 5],
        "cu_seq_lens_k": [0, 3, 5],
    }
    assert row["max_length_q"] == row["max_length_k"] == 3


def test_flat_row_is_that_of_transformers():
    from transformers import DataCollatorWithFlattening

    sequences = documents(0, [3, 1, 5])
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(copy.deepcopy(sequences))
    ours = flatten(sequences)
    assert theirs.keys() - ours.keys() <= {"attention_mask"}
    for name in ours:
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])), name


@given(seeds, lengths)
def test_flatten_keeps_each_token_and_scores_none_across_a_boundary(seed, lengths):
    sequences = masked_documents(seed, lengths)
    before = copy.deepcopy(sequences)
    row = flatten(sequences)
    assert sequences == before  # not mutated
    check_dtypes(row)
    assert row["input_ids"].shape == row["labels"].shape == row["position_ids"].shape == (1, sum(lengths))
    bounds = row["cu_seq_lens_q"].tolist()
    assert bounds[0] == 0 and bounds == row["cu_seq_lens_k"].tolist()
    for sequence, start, stop in zip(sequences, bounds[:-1], bounds[1:]):
        assert row["input_ids"][0, start:stop].tolist() == sequence["input_ids"]
        assert row["position_ids"][0, start:stop].tolist() == list(range(stop - start))
        assert row["labels"][0, start:stop].tolist() == [IGNORE, *sequence["labels"][1:]]
    assert row["max_length_q"] == row["max_length_k"] == max(lengths)
    assert scored_tokens(row["labels"]) == expected_tokens(sequences)


def test_one_token_documents_score_nothing():
    row = flatten(documents(0, [1, 1, 1]))
    assert row["labels"].tolist() == [[IGNORE] * 3]
    assert row["position_ids"].tolist() == [[0, 0, 0]]
    assert row["cu_seq_lens_q"].tolist() == [0, 1, 2, 3]


# --- pad ---


@given(seeds, lengths, st.integers(0, 63))
def test_pad_masks_by_length_and_scores_what_flatten_scores(seed, lengths, pad_token_id):
    sequences = masked_documents(seed, lengths)
    before = copy.deepcopy(sequences)
    batch = pad(sequences, pad_token_id)
    assert sequences == before  # not mutated
    check_dtypes(batch)
    assert batch["input_ids"].shape == batch["labels"].shape == (len(lengths), max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for b, (sequence, length) in enumerate(zip(sequences, lengths)):
        assert batch["input_ids"][b, :length].tolist() == sequence["input_ids"]
        assert batch["input_ids"][b, length:].tolist() == [pad_token_id] * (max(lengths) - length)
        assert batch["labels"][b, length:].tolist() == [IGNORE] * (max(lengths) - length)
        assert batch["attention_mask"][b].tolist() == [1] * length + [0] * (max(lengths) - length)
    assert scored_tokens(batch["labels"]) == scored_tokens(flatten(sequences)["labels"])


@pytest.mark.parametrize("token", [0, 2])
def test_a_real_token_that_equals_the_padding_is_attended_and_scored(token):
    sequences = [{"input_ids": [token, 5, token], "labels": [token, 5, token]}, *documents(0, [5])]
    batch = pad(sequences, pad_token_id=token)
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]
    assert batch["labels"][0].tolist() == [IGNORE, 5, token, IGNORE, IGNORE]


@pytest.mark.parametrize("collate", [flatten, lambda sequences: pad(sequences, 0)])
@pytest.mark.parametrize(
    "sequences, message",
    [
        ([], "no sequences"),
        ([*documents(0, [2]), {"input_ids": [], "labels": []}], "sequence 1 is empty"),
        ([{"input_ids": [1, 2], "labels": [1]}], "sequence 0 has 2 input_ids and 1 labels"),
    ],
)
def test_pad_and_flatten_refuse(collate, sequences, message):
    with pytest.raises(ValueError, match=message):
        collate(sequences)


# --- shared prompts ---

groups_of_lengths = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=4)), min_size=1, max_size=4
)


def make_groups(seed, groups_of_lengths):
    parts = documents(seed, [n for prompt, completions in groups_of_lengths for n in (prompt, *completions)])
    parts = iter(s["input_ids"] for s in parts)
    return [(next(parts), [next(parts) for _ in completions]) for _, completions in groups_of_lengths]


def test_shared_prompt_by_hand():
    row = flatten_shared_prompt([([1, 2], [[3, 4], [5]]), ([0], [[0, 7]])])
    check_dtypes(row)
    assert {name: value.tolist() for name, value in row.items() if torch.is_tensor(value)} == {
        "input_ids": [[1, 2, 3, 4, 5, 0, 0, 7]],
        "labels": [[-100, -100, 3, 4, 5, -100, 0, 7]],
        "position_ids": [[0, 1, 2, 3, 2, 0, 1, 2]],
        "cu_seq_lens_q": [0, 2, 4, 5, 6, 8],
        "cu_seq_lens_k": [0, 2, 6, 9, 10, 13],
        "kv_index": [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 5, 6, 7],
        "score_index": [1, 2, 1, 5, 6],
        "score_ids": [3, 4, 5, 0, 7],
        "completion_lengths": [2, 1, 2],
    }
    assert (row["max_length_q"], row["max_length_k"]) == (2, 4)


@given(seeds, groups_of_lengths)
def test_shared_prompt_layout_is_consistent(seed, groups_of_lengths):
    groups = make_groups(seed, groups_of_lengths)
    before = copy.deepcopy(groups)
    row = flatten_shared_prompt(groups)
    assert groups == before  # not mutated
    check_dtypes(row)
    tokens, positions = row["input_ids"][0], row["position_ids"][0]
    bounds_q, bounds_k = row["cu_seq_lens_q"].tolist(), row["cu_seq_lens_k"].tolist()
    assert len(tokens) == sum(len(p) + sum(map(len, cs)) for p, cs in groups) == bounds_q[-1]
    assert len(row["kv_index"]) == bounds_k[-1]

    # key segments, read through kv_index: prompt, prompt + c1, .., prompt + cG, at positions 0, 1, ..
    sequences = [whole for p, cs in groups for whole in (p, *(p + c for c in cs))]
    queries = [part for p, cs in groups for part in (p, *cs)]
    assert len(bounds_q) == len(bounds_k) == len(sequences) + 1
    for i, (sequence, query) in enumerate(zip(sequences, queries)):
        keys = row["kv_index"][bounds_k[i] : bounds_k[i + 1]]
        assert tokens[keys].tolist() == sequence
        assert positions[keys].tolist() == list(range(len(sequence)))
        # bottom-right: the segment's queries are its last keys
        assert keys[-len(query) :].tolist() == list(range(bounds_q[i], bounds_q[i + 1]))
    assert row["max_length_q"] == max(map(len, queries)) and row["max_length_k"] == max(map(len, sequences))

    # score_index points at the row position of the token before the scored one
    completions = [(p, c) for p, cs in groups for c in cs]
    assert row["completion_lengths"].tolist() == [len(c) for _, c in completions]
    assert row["score_ids"].tolist() == [token for _, c in completions for token in c]
    predecessors = tokens[row["score_index"]].split(row["completion_lengths"].tolist())
    assert [x.tolist() for x in predecessors] == [[p[-1], *c[:-1]] for p, c in completions]
    scored_at = row["labels"][0].ne(IGNORE).nonzero()[:, 0]
    assert torch.equal(tokens[scored_at], row["score_ids"])
    assert torch.equal(positions[row["score_index"]] + 1, positions[scored_at])


@pytest.mark.parametrize(
    "groups, message",
    [
        ([], "no groups"),
        ([([1], [[2]]), ([], [[2]])], "group 1"),
        ([([1], [])], "group 0"),
        ([([1], [[2], []])], "group 0"),
    ],
)
def test_shared_prompt_refuses(groups, message):
    with pytest.raises(ValueError, match=message):
        flatten_shared_prompt(groups)
