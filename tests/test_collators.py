"""Sequences -> padded batch or flat row: every token once, nothing scored across a boundary."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from common.collators import IGNORE, add_scored, count_padding, flatten, flatten_shared_prompt, pad

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
ids = st.lists(st.integers(0, 63), min_size=1, max_size=9)
# documents whose first third of tokens is not scored
sequences = st.lists(ids, min_size=1, max_size=8).map(
    lambda rows: [{"input_ids": x, "labels": [IGNORE] * (len(x) // 3) + x[len(x) // 3 :]} for x in rows]
)


def unchanged(collate, sequences):
    """What collate makes of sequences, which it leaves as they are; the dtypes are those of a batch."""
    before = copy.deepcopy(sequences)
    row = collate(sequences)
    assert sequences == before
    for name, value in row.items():
        if name in ("max_length_q", "max_length_k"):
            assert type(value) is int
        else:
            assert value.dtype == (torch.int32 if name in BOUNDARIES else torch.int64), name
    return row


def check_scored(batch, sequences):
    """All labels but each first one are scored, once, in order, by the position before."""
    scored = add_scored(batch)
    assert "score_index" not in batch and scored.keys() - batch.keys() == {"score_index", "score_ids"}
    assert scored["score_index"].dtype == scored["score_ids"].dtype == torch.int64
    expected = [
        (s["input_ids"][i], s["labels"][i + 1]) for s in sequences for i in range(len(s["labels"]) - 1)
    ]
    expected = [(before, label) for before, label in expected if label != IGNORE]
    before = batch["input_ids"].flatten()[scored["score_index"]].tolist()
    assert list(zip(before, scored["score_ids"].tolist())) == expected


# --- flatten, pad; rows by hand: the docstrings of collators.py ---


@given(sequences)
def test_flat_row_is_that_of_transformers_and_scores_none_across_a_boundary(sequences):
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(copy.deepcopy(sequences))
    row = unchanged(flatten, sequences)
    assert theirs.keys() - row.keys() <= {"attention_mask"}
    for name in row:
        assert torch.equal(torch.as_tensor(row[name]), torch.as_tensor(theirs[name])), name
    check_scored(row, sequences)
    assert count_padding(row) == 0


@given(sequences)
def test_pad_masks_by_length_and_scores_what_flatten_scores(sequences):
    pad_token_id = sequences[0]["input_ids"][-1]  # a real token as well
    batch = unchanged(lambda sequences: pad(sequences, pad_token_id), sequences)
    lengths = [len(s["labels"]) for s in sequences]
    rest = [max(lengths) - length for length in lengths]
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [s["input_ids"] + [pad_token_id] * n for s, n in zip(sequences, rest)],
        "attention_mask": [[1] * length + [0] * n for length, n in zip(lengths, rest)],
        "labels": [[IGNORE, *s["labels"][1:]] + [IGNORE] * n for s, n in zip(sequences, rest)],
    }
    check_scored(batch, sequences)
    assert count_padding(batch) == sum(rest)


WHOLE, EMPTY, UNEVEN = (
    {"input_ids": ids, "labels": labels} for ids, labels in (([1], [1]), ([], []), ([1, 2], [1]))
)


@pytest.mark.parametrize(
    "collate, given, message",
    [
        (flatten, [], "no sequences"),
        (flatten, [WHOLE, EMPTY], "sequence 1 has 0 input_ids"),
        (lambda sequences: pad(sequences, 0), [UNEVEN], "sequence 0 has 2 input_ids and 1 labels"),
        (flatten_shared_prompt, [], "no groups"),
        (flatten_shared_prompt, [([1], [[2]]), ([], [[2]])], "group 1 has an empty prompt or completion"),
        (flatten_shared_prompt, [([1], [[2]]), ([1], [])], "group 1 has .* or no completions"),
        (flatten_shared_prompt, [([1], [[2], []])], "group 0 has an empty prompt or completion"),
    ],
)
def test_what_is_no_row_is_refused(collate, given, message):
    with pytest.raises(ValueError, match=message):
        collate(given)


# --- shared prompts ---

groups = st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=4)), min_size=1, max_size=4)


@given(st.lists(st.integers(0, 63), max_size=5), groups)
def test_shared_prompt_layout_is_consistent(root, groups):
    """Of prompts that begin with `root` it stands once, and with them whatever else they all begin with."""
    groups = [(root + prompt, completions) for prompt, completions in groups]
    row = unchanged(flatten_shared_prompt, groups)
    tokens, positions = row["input_ids"][0], row["position_ids"][0]
    bounds_q, bounds_k = row["cu_seq_lens_q"].tolist(), row["cu_seq_lens_k"].tolist()
    shared = 0
    if len(groups) > 1:  # the most that all prompts have in common, of which none is all
        while all(p[: shared + 1] == groups[0][0][: shared + 1] and len(p) > shared + 1 for p, _ in groups):
            shared += 1
    assert shared >= len(root) * (len(groups) > 1)
    once = sum(len(p) - shared + sum(map(len, cs)) for p, cs in groups)
    assert len(tokens) == shared + once == bounds_q[-1]
    assert len(row["kv_index"]) == bounds_k[-1]
    # key segments, read through kv_index: root, prompt, prompt + c1, .., prompt + cG, at positions 0, 1, ..
    wholes = [whole for p, cs in groups for whole in (p, *(p + c for c in cs))]
    queries = [part for p, cs in groups for part in (p[shared:], *cs)]
    if shared:
        wholes, queries = [groups[0][0][:shared], *wholes], [groups[0][0][:shared], *queries]
    assert len(bounds_q) == len(bounds_k) == len(wholes) + 1
    for i, (whole, query) in enumerate(zip(wholes, queries)):
        keys = row["kv_index"][bounds_k[i] : bounds_k[i + 1]]
        assert tokens[keys].tolist() == whole
        assert positions[keys].tolist() == list(range(len(whole)))
        # bottom-right: the segment's queries are its last keys
        assert keys[-len(query) :].tolist() == list(range(bounds_q[i], bounds_q[i + 1]))
    assert row["max_length_q"] == max(map(len, queries)) and row["max_length_k"] == max(map(len, wholes))
    # score_index points at the row position of the token before the scored one
    completions = [(p, c) for p, cs in groups for c in cs]
    assert row["completion_lengths"].tolist() == [len(c) for _, c in completions]
    assert row["score_ids"].tolist() == [token for _, c in completions for token in c]
    predecessors = tokens[row["score_index"]].split(row["completion_lengths"].tolist())
    assert [x.tolist() for x in predecessors] == [[p[-1], *c[:-1]] for p, c in completions]
    scored_at = row["labels"][0].ne(IGNORE).nonzero()[:, 0]
    assert torch.equal(tokens[scored_at], row["score_ids"])
    assert torch.equal(positions[row["score_index"]] + 1, positions[scored_at])
