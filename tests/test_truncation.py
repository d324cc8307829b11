"""Length limits: nothing is ever longer than its limit, and nothing else changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.truncation import OVERFLOW, TRUNCATION_MODES, check_limit, fit_to_length, truncate_pair

LIMITS = ("max_prompt_length", "max_completion_length", "max_length")
ids = st.lists(st.integers(0, 9), max_size=20)
limit = st.none() | st.integers(1, 25)


@pytest.mark.parametrize("bad", [0, -1, True, False, 2.0, "3"])
def test_bad_limits_raise_and_name_the_value(bad):
    with pytest.raises(ValueError, match=f"max_length is {bad!r}"):
        check_limit("max_length", bad)
    for overflow in OVERFLOW:
        with pytest.raises(ValueError, match="max_length"):
            fit_to_length([1], [1], bad, overflow)
    for name in LIMITS:
        with pytest.raises(ValueError, match=f"{name} is {bad!r}"):
            truncate_pair([1], [2], **{name: bad})


def test_none_and_one_are_limits():
    check_limit("max_length", None)
    check_limit("max_length", 1)


@pytest.mark.parametrize("overflow", OVERFLOW)
@pytest.mark.parametrize("max_length", [None, 3, 4])
def test_an_example_that_fits_is_left_as_it_is(overflow, max_length):
    assert fit_to_length([1, 2, 3], [-100, 2, 3], max_length, overflow) == [([1, 2, 3], [-100, 2, 3])]


def test_over_long_examples_by_mode():
    example = [1, 2, 3, 4, 5], [-100, -100, 3, 4, 5]
    assert fit_to_length(*example, 2, "truncate") == [([1, 2], [-100, -100])]
    assert fit_to_length(*example, 2, "split") == [([1, 2], [-100, -100]), ([3, 4], [3, 4]), ([5], [5])]
    assert fit_to_length(*example, 2, "drop") == []
    with pytest.raises(ValueError, match="5 tokens, max_length is 2"):
        fit_to_length(*example, 2, "error")


def test_a_length_that_max_length_divides_leaves_no_empty_piece():
    assert fit_to_length([1, 2, 3, 4], [1, 2, 3, 4], 2, "split") == [([1, 2], [1, 2]), ([3, 4], [3, 4])]


def test_unknown_modes_and_unequal_lists_raise():
    with pytest.raises(ValueError, match="overflow is 'cut'"):
        fit_to_length([1], [1], None, "cut")
    with pytest.raises(ValueError, match="2 input_ids but 1 labels"):
        fit_to_length([1, 2], [1], None, "split")
    with pytest.raises(ValueError, match="truncation_mode is 'keep_middle'"):
        truncate_pair([1], [2], truncation_mode="keep_middle")


@given(ids, limit, st.sampled_from(["truncate", "split", "drop"]))
def test_fit_to_length_keeps_the_limit_and_the_tokens(input_ids, max_length, overflow):
    labels = [-100 if token % 2 else token for token in input_ids]
    given_ids, given_labels = list(input_ids), list(labels)
    pieces = fit_to_length(given_ids, given_labels, max_length, overflow)
    assert (given_ids, given_labels) == (input_ids, labels)  # not mutated
    for piece_ids, piece_labels in pieces:
        assert max_length is None or len(piece_ids) <= max_length
        assert piece_labels == [-100 if token % 2 else token for token in piece_ids]  # cut together
    joined = [token for piece, _ in pieces for token in piece]
    if overflow == "split":
        assert joined == input_ids
        assert all(len(piece) == max_length for piece, _ in pieces[:-1])
    elif overflow == "truncate":
        assert joined == input_ids[:max_length]
    else:
        assert joined == (input_ids if max_length is None or len(input_ids) <= max_length else [])


def test_prompt_keeps_its_end_and_completion_its_start():
    assert truncate_pair([1, 2, 3], [4, 5, 6], max_prompt_length=2) == ([2, 3], [4, 5, 6])
    assert truncate_pair([1, 2, 3], [4, 5, 6], max_completion_length=2) == ([1, 2, 3], [4, 5])


@pytest.mark.parametrize("mode", TRUNCATION_MODES)
def test_exact_fit_changes_nothing(mode):
    limits = {"max_prompt_length": 3, "max_completion_length": 2, "max_length": 5}
    assert truncate_pair([1, 2, 3], [4, 5], **limits, truncation_mode=mode) == ([1, 2, 3], [4, 5])


@pytest.mark.parametrize(
    "max_length, keep_start, keep_end",
    [
        (4, ([1, 2, 3], [4]), ([3], [4, 5, 6])),
        (3, ([1, 2, 3], []), ([], [4, 5, 6])),
        (2, ([1, 2], []), ([], [5, 6])),  # keep_end has eaten the whole prompt, and a token of the completion
        (1, ([1], []), ([], [6])),
    ],
)
def test_max_length_by_mode(max_length, keep_start, keep_end):
    pair = [1, 2, 3], [4, 5, 6]
    assert truncate_pair(*pair, max_length=max_length) == keep_start
    assert truncate_pair(*pair, max_length=max_length, truncation_mode="keep_end") == keep_end


def test_max_length_comes_after_the_other_two():
    limits = {"max_prompt_length": 2, "max_completion_length": 2, "max_length": 3}
    assert truncate_pair([1, 2, 3], [4, 5, 6], **limits) == ([2, 3], [4])
    assert truncate_pair([1, 2, 3], [4, 5, 6], **limits, truncation_mode="keep_end") == ([3], [4, 5])


@given(ids, ids, limit, limit, limit, st.sampled_from(TRUNCATION_MODES))
def test_truncate_pair_keeps_every_limit(prompt, completion, most_prompt, most_completion, most, mode):
    given_prompt, given_completion = list(prompt), list(completion)
    kept_prompt, kept_completion = truncate_pair(
        given_prompt,
        given_completion,
        max_prompt_length=most_prompt,
        max_completion_length=most_completion,
        max_length=most,
        truncation_mode=mode,
    )
    assert (given_prompt, given_completion) == (prompt, completion)  # not mutated
    assert kept_prompt is not given_prompt and kept_completion is not given_completion
    prompt = prompt[max(0, len(prompt) - (most_prompt or 99)) :]
    whole = prompt + completion[:most_completion]
    expected = whole[:most] if mode == "keep_start" else whole[max(0, len(whole) - (most or 99)) :]
    assert kept_prompt + kept_completion == expected
    cut = len(whole) - len(expected)
    assert len(kept_prompt) == (
        min(len(prompt), most or 99) if mode == "keep_start" else max(0, len(prompt) - cut)
    )
