"""Length limits: nothing is ever longer than its limit, and nothing else changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.truncation import OVERFLOW, TRUNCATION_MODES, check_limit, fit_to_length, truncate_pair

LIMITS = ("max_prompt_length", "max_completion_length", "max_length")
ids = st.lists(st.integers(0, 9), max_size=20)
limit = st.none() | st.integers(1, 9)


@pytest.mark.parametrize("bad", [0, -1, True, False, 2.0, "3"])
def test_bad_limits_raise_and_name_the_value(bad):
    for overflow in OVERFLOW:
        with pytest.raises(ValueError, match=f"max_length is {bad!r}; give a whole number >= 1"):
            fit_to_length([1], [1], bad, overflow)
    for name in LIMITS:
        with pytest.raises(ValueError, match=f"{name} is {bad!r}"):
            truncate_pair([1], [2], **{name: bad})
        check_limit(name, None)
        check_limit(name, 1)


def test_unknown_modes_and_unequal_lists_raise():
    with pytest.raises(ValueError, match="overflow is 'cut'; choose one of truncate, split, drop, error"):
        fit_to_length([1], [1], None, "cut")
    with pytest.raises(ValueError, match="2 input_ids but 1 labels"):
        fit_to_length([1, 2], [1], None, "split")
    with pytest.raises(ValueError, match="truncation_mode is 'keep_middle'"):
        truncate_pair([1], [2], truncation_mode="keep_middle")


def test_an_over_long_example_by_overflow():
    example = [1, 2, 3, 4, 5], [-100, -100, 3, 4, 5]
    assert fit_to_length(*example, 2, "truncate") == [([1, 2], [-100, -100])]
    assert fit_to_length(*example, 2, "split") == [([1, 2], [-100, -100]), ([3, 4], [3, 4]), ([5], [5])]
    assert fit_to_length(*example, 2, "drop") == []
    with pytest.raises(ValueError, match="5 tokens, max_length is 2: raise it, or choose overflow"):
        fit_to_length(*example, 2, "error")
    for overflow in OVERFLOW:
        assert fit_to_length(*example, 5, overflow) == fit_to_length(*example, None, overflow) == [example]


@given(ids, limit, st.sampled_from(["truncate", "split", "drop"]))
def test_fit_to_length_keeps_the_limit_and_the_tokens(input_ids, max_length, overflow):
    labels = [-100 if token % 2 else token for token in input_ids]
    given_ids, given_labels = list(input_ids), list(labels)
    length, whole = len(input_ids), [(input_ids, labels)]
    if max_length is None or length <= max_length:
        assert fit_to_length(given_ids, given_labels, max_length, overflow) == whole
    else:
        starts = {"truncate": [0], "drop": [], "split": range(0, length, max_length)}[overflow]
        pieces = [(input_ids[i : i + max_length], labels[i : i + max_length]) for i in starts]
        assert fit_to_length(given_ids, given_labels, max_length, overflow) == pieces
    assert (given_ids, given_labels) == (input_ids, labels)  # not mutated


PAIR = [1, 2, 3], [4, 5, 6]


@pytest.mark.parametrize(
    "limits, keep_start, keep_end",
    [
        ({"max_prompt_length": 2}, ([2, 3], [4, 5, 6]), ([2, 3], [4, 5, 6])),
        ({"max_completion_length": 2}, ([1, 2, 3], [4, 5]), ([1, 2, 3], [4, 5])),
        (dict(zip(LIMITS, (3, 3, 6))), PAIR, PAIR),  # an exact fit
        (dict(zip(LIMITS, (2, 2, 3))), ([2, 3], [4]), ([3], [4, 5])),  # max_length comes last
        ({"max_length": 4}, ([1, 2, 3], [4]), ([3], [4, 5, 6])),
        ({"max_length": 3}, ([1, 2, 3], []), ([], [4, 5, 6])),
        ({"max_length": 2}, ([1, 2], []), ([], [5, 6])),  # keep_end eats the whole prompt, and more
        ({"max_length": 1}, ([1], []), ([], [6])),
    ],
)
def test_a_pair_by_limit_and_mode(limits, keep_start, keep_end):
    assert truncate_pair(*PAIR, **limits) == keep_start
    assert truncate_pair(*PAIR, **limits, truncation_mode="keep_end") == keep_end


@given(ids, ids, limit, limit, limit, st.sampled_from(TRUNCATION_MODES))
def test_truncate_pair_keeps_every_limit(prompt, completion, most_prompt, most_completion, most, mode):
    given_prompt, given_completion = list(prompt), list(completion)
    limits = dict(zip(LIMITS, (most_prompt, most_completion, most)))
    kept_prompt, kept_completion = truncate_pair(
        given_prompt, given_completion, **limits, truncation_mode=mode
    )
    assert (given_prompt, given_completion) == (prompt, completion)  # not mutated
    assert kept_prompt is not given_prompt and kept_completion is not given_completion
    prompt = prompt[max(0, len(prompt) - (most_prompt or 99)) :]
    whole = prompt + completion[:most_completion]
    expected = whole[:most] if mode == "keep_start" else whole[max(0, len(whole) - (most or 99)) :]
    assert kept_prompt + kept_completion == expected
    from_start, from_end = min(len(prompt), most or 99), len(prompt) - len(whole) + len(expected)
    assert len(kept_prompt) == (from_start if mode == "keep_start" else max(0, from_end))
