"""Rewards: what counts as right, and what a function that is not to be trusted does."""

import pytest
import torch

from common.rewards import call_rewards, last_number, last_word, load_reward_funcs


def said(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize(
    "text, answer, reward",
    [
        ("The sum is 12.", "12", 1.0),
        ("12 is the sum", "12", 0.0),
        ("", "12", 0.0),
        ("112", "12", 0.0),
        ("spelt a-b", "a-b", 1.0),
    ],
)
def test_the_last_word(text, answer, reward):
    assert last_word([""], [text], answer=[answer]) == last_word([""], said(text), [answer]) == [reward]


@pytest.mark.parametrize(
    "text, answer, reward",
    [
        ("so 3 + 4 = 7", "7", 1.0),
        ("7 then 8", "7", 0.0),
        ("first 8\n#### 7 because of 8", "7", 1.0),
        ("$1,234.50", "1234.5", 1.0),
        ("-3", "-3", 1.0),
        ("3", "-3", 0.0),
        ("no number", "0", 0.0),
        ("7.", "7", 1.0),
        ("70", "#### 70", 1.0),
    ],
)
def test_the_last_number(text, answer, reward):
    assert last_number([""], [text], answer=[answer]) == last_number([""], said(text), [answer]) == [reward]


def test_built_in_and_imported_functions_are_found():
    found = load_reward_funcs("last_word,grpo_cases:upper", ["prompt", "answer"])
    assert found["last_word"] is last_word and list(found) == ["last_word", "grpo_cases:upper"]


@pytest.mark.parametrize(
    "names, message",
    [
        ("first_word", "first_word: choose last_word, last_number, or name a module:function"),
        ("no_module:f", "no_module:f cannot be imported"),
        ("grpo_cases:f", "grpo_cases:f cannot be imported"),
        ("last_word,", "--reward_funcs : choose"),
        (
            "grpo_cases:by_column",
            "wants the column wanted; beside prompts and completions it is given answer",
        ),
        ("math:pi", "math:pi is 3.14.*: wanted a function"),
        (":f", "--reward_funcs :f cannot be imported"),
    ],
)
def test_what_cannot_be_found_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        load_reward_funcs(names, ["answer"])


def fails_for_b(prompts, completions, **columns):
    if "b" in completions:
        raise KeyError("b")
    return [0.0] * len(completions)


def generates_up_to_b(prompts, completions, **columns):
    for completion in completions:
        if completion == "b":
            raise KeyError("b")
        yield 0.0


@pytest.mark.parametrize(
    "function, message",
    [
        (generates_up_to_b, "reward f raised KeyError: 'b'; prompt 'p2', completion 'b'"),
        (lambda prompts, completions, **_: torch.ones(3, 2), r"returned tensor\(\[1., 1.\]\); .*'p1'"),
        (lambda prompts, completions, **_: torch.tensor(1.0), "raised TypeError: .*0-d tensor"),
        (lambda prompts, completions, **_: [0, 10**400, 0], "returned 1000*; .*prompt 'p2'"),
        (lambda prompts, completions, **_: dict.fromkeys((0, 1, 2), 1.0), "TypeError: a dict came back"),
        (fails_for_b, "reward f raised KeyError: 'b'; prompt 'p2', completion 'b'"),
        (lambda prompts, completions, **_: [1.0], "returned 1 numbers for 3 completions"),
        (lambda prompts, completions, **_: 1.0, "returned 1 numbers for 3 completions"),
        (lambda prompts, completions, **_: None, "returned 1 numbers for 3 completions"),
        (lambda prompts, completions, **_: [0.0, float("nan"), 0.0], "returned nan; .*prompt 'p2'"),
        (lambda prompts, completions, **_: [0.0, 0.0, None], "returned None; .*'p3', completion 'c'"),
        (lambda prompts, completions, **_: [float("inf"), 0, 0], "returned inf; .*prompt 'p1'"),
    ],
)
def test_a_function_that_misbehaves_is_named_with_its_prompt(function, message):
    with pytest.raises(ValueError, match=message):
        call_rewards({"f": function}, ["p1", "p2", "p3"], ["a", "b", "c"], {"answer": ["x", "y", "z"]})


def test_columns_and_numbers_pass():
    seen = {}

    def function(prompts, completions, answer, **columns):
        seen.update(columns, answer=answer)
        return [True, 2, 0.5]

    columns = {"answer": [1, 2, 3], "level": [4, 5, 6]}
    assert call_rewards({"f": function}, ["p"] * 3, ["c"] * 3, columns) == {"f": [1.0, 2.0, 0.5]}
    assert seen == columns
