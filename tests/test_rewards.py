"""Rewards: what counts as right, and what a function that is not to be trusted does."""

import functools
import json
import math
from pathlib import Path

import datasets
import pytest
import torch

from common.rewards import (
    call_rewards,
    check_answers,
    columns_read,
    last_number,
    last_word,
    load_reward_funcs,
)


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
        ("so 7", 7.0, 1.0),
        ("so 7.0", 7, 1.0),
        ("so 8", 7.0, 0.0),
        ("so 1,200.", 1200, 1.0),
        ("1,2,3", "123", 0.0),
        ("12", " 12 ", 1.0),
        ("012", "12", 1.0),
        ("so 10000000000000000", 1e16, 1.0),
        ("so 12345678901234567891", "12345678901234567892", 0.0),
        ("7\u00b0", 7, 0.0),
        ("1", True, 0.0),
        ("True.", True, 1.0),
        ("nan", "inf", 0.0),
        ("1_0", "10", 0.0),
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
        ("so 7", 7.0, 1.0),
        ("about 0.00001", 1e-05, 1.0),
        ("1e-05", 1e-05, 1.0),
        ("so -5", 1e-05, 0.0),
        ("so 16", 1e16, 0.0),
        ("12345678901234567891", 12345678901234567892, 0.0),
        ("12345678901234567891", 12345678901234567891, 1.0),
        ("of 1,2,3", 3, 1.0),
        ("1e99999999999999999999999", 7, 0.0),
        ("0x3e8a is 8", "8", 1.0),
    ],
)
def test_the_last_number(text, answer, reward):
    assert last_number([""], [text], answer=[answer]) == last_number([""], said(text), [answer]) == [reward]


@pytest.mark.parametrize(
    "name, answer",
    [
        ("last_word", None),
        ("last_word", math.nan),
        ("last_word", " "),
        ("last_number", None),
        ("last_number", "seven"),
        ("last_number", math.inf),
    ],
)
def test_an_answer_that_no_completion_can_give_is_refused(name, answer):
    rows = datasets.Dataset.from_list(
        [{"answer": 7.0 if isinstance(answer, float) else "7"}, {"answer": answer}]
    )
    rewards = load_reward_funcs(f"common.rewards:{name}", ["answer"])  # the same function by another name
    for functions in (rewards, load_reward_funcs(name, ["answer"])):
        check_answers(functions, rows.select([0]), "some.csv")
        with pytest.raises(ValueError, match=f"some.csv, example 1: answer is {answer!r}; .*{name} wants a"):
            check_answers(functions, rows, "some.csv")
    # others judge nulls for themselves
    check_answers(load_reward_funcs("grpo_cases:upper", ["answer"]), rows, "some.csv")


def test_built_in_and_imported_functions_are_found():
    found = load_reward_funcs("last_word,grpo_cases:upper", ["prompt", "answer"])
    assert found["last_word"] is last_word and list(found) == ["last_word", "grpo_cases:upper"]


@pytest.mark.parametrize(
    "names, message",
    [
        ("first_word", "first_word: choose last_word, last_number, or name a module:function"),
        ("no_module:f", "no_module:f cannot be imported"),
        ("grpo_cases:f", "grpo_cases:f cannot be imported"),
        ("last_word,", "'last_word,' names nothing"),
        (
            "grpo_cases:by_column",
            "wants the column wanted; beside prompts, completions, completion_ids it is given answer",
        ),
        (
            "grpo_cases:takes_no_column",
            "takes_no_column does not take answer: add the parameter \\*\\*columns",
        ),
        ("grpo_cases:takes_no_prompts", "takes_no_prompts does not take prompts: add the parameter"),
        ("builtins:max", "builtins:max does not say what it takes"),
        ("math:pi", "math:pi is 3.14.*: wanted a function"),
        (":f", "--reward_funcs :f cannot be imported"),
    ],
)
def test_what_cannot_be_found_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        load_reward_funcs(names, ["answer"])


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_a_column_with_the_name_of_what_a_reward_is_given_is_refused(name):
    with pytest.raises(
        ValueError, match=f"the dataset's column {name} has the name of what a reward is given"
    ):
        load_reward_funcs("grpo_cases:upper", ["answer", name])


def fails_for_b(prompts, completions, **columns):
    if "b" in completions:
        raise KeyError("b")
    return [0.0] * len(completions)


def generates_up_to_b(prompts, completions, **columns):
    for completion in completions:
        if completion == "b":
            raise KeyError("b")
        yield 0.0


async def waits(prompts, completions, **columns):
    return [0.0] * len(completions)


async def generates_while_waiting(prompts, completions, **columns):
    yield 0.0


def calls_a_library(prompts, completions, **columns):
    return [json.loads(completion) for completion in completions]


@functools.wraps(calls_a_library)
def wrapped(*args, **kwargs):
    return calls_a_library(*args, **kwargs)


@pytest.mark.parametrize(
    "function, message",
    [
        (generates_up_to_b, "reward f raised KeyError: 'b' at .*; prompt 'p2', completion 'b'"),
        (lambda prompts, completions, **_: torch.ones(3, 2), r"returned tensor\(\[1., 1.\]\); .*'p1'"),
        (lambda prompts, completions, **_: torch.tensor(1.0), r"returned tensor\(1.\); wanted: a list"),
        (lambda prompts, completions, **_: [0, 10**400, 0], "returned 1000*; .*prompt 'p2'"),
        (lambda prompts, completions, **_: dict.fromkeys((0, 1, 2), 1.0), "returned {.*}; wanted: a list"),
        (fails_for_b, "reward f raised KeyError: 'b' at .*; prompt 'p2', completion 'b'"),
        (lambda prompts, completions, **_: [1.0], "returned 1 numbers for 3 completions"),
        (lambda prompts, completions, **_: 1.0, "returned 1.0; wanted: a list with a number for each"),
        (lambda prompts, completions, **_: None, "returned None; wanted: a list with a number for each"),
        (waits, "reward f is async: make it a plain function, e.g. with asyncio.run inside"),
        (generates_while_waiting, "reward f is async"),
        (lambda prompts, completions, **_: [0.0, float("nan"), 0.0], "returned nan; .*prompt 'p2'"),
        (lambda prompts, completions, **_: [0.0, 0.0, None], "returned None; .*'p3', completion 'c'"),
        (lambda prompts, completions, **_: [float("inf"), 0, 0], "returned inf; .*prompt 'p1'"),
    ],
)
def test_a_function_that_misbehaves_is_named_with_its_prompt(function, message):
    with pytest.raises(ValueError, match=message):
        call(function)


def call(function):
    columns = {"answer": ["x", "y", "z"]}
    return call_rewards({"f": function}, ["p1", "p2", "p3"], ["a", "b", "c"], columns, [[1], [2, 3], []])


def line_of(function, offset):
    return f"{Path(__file__)}:{function.__code__.co_firstlineno + offset}, `"


@pytest.mark.parametrize(
    "function, place",
    [
        (fails_for_b, line_of(fails_for_b, 2) + 'raise KeyError("b")`'),
        (generates_up_to_b, line_of(generates_up_to_b, 3) + 'raise KeyError("b")`'),
        (calls_a_library, line_of(calls_a_library, 1) + "return [json.loads(completion) for"),
        (wrapped, line_of(calls_a_library, 1)),
        (functools.partial(fails_for_b), line_of(fails_for_b, 2)),
    ],
)
def test_a_function_that_raises_is_shown_with_its_line(function, place):
    with pytest.raises(ValueError) as caught:
        call(function)
    assert f" at {place}" in str(caught.value)


def test_a_function_that_was_never_entered_has_no_line():
    with pytest.raises(ValueError, match="raised TypeError: .* argument: 'prompts'; prompt 'p1'"):
        call(lambda prompts, /, completions, **columns: [])


def test_token_ids_go_to_the_functions_that_take_them():
    ids, seen = [[1], [2, 3], []], []

    def names_them(prompts, completions, answer, completion_ids):
        seen.append([list(ids) for ids in completion_ids])
        completion_ids[0].append(9)  # what is trained on stays as it is
        return [0.0] * 3

    def takes_all(prompts, completions, **columns):
        seen.append(columns["completion_ids"])
        return [0.0] * 3

    def names_the_columns(prompts, completions, answer):
        return [0.0] * 3

    functions = {f.__name__: f for f in (names_them, takes_all, names_the_columns)}
    call_rewards(functions, ["p"] * 3, ["c"] * 3, {"answer": [1, 2, 3]}, ids)
    assert seen == [ids, ids] and ids == [[1], [2, 3], []]


def test_the_columns_that_a_reward_may_read():
    def any_column(prompts, completions, **columns):
        pass

    def two(prompts, completions, level, answer):
        pass

    columns = ["answer", "level", "source"]
    assert columns_read({"a": last_word}, columns) == {"answer"}
    assert columns_read({"a": two}, columns) == {"answer", "level"}
    assert columns_read({"a": last_word, "b": any_column}, columns) == set(columns)


def test_columns_and_numbers_pass():
    seen = {}

    def function(prompts, completions, answer, **columns):
        seen.update(columns, answer=answer)
        return [True, 2, 0.5]

    columns, ids = {"answer": [1, 2, 3], "level": [4, 5, 6]}, [[1], [2], [3]]
    assert call_rewards({"f": function}, ["p"] * 3, ["c"] * 3, columns, ids) == {"f": [1.0, 2.0, 0.5]}
    assert seen == {**columns, "completion_ids": ids}


def test_what_one_reward_changes_no_other_sees():
    def spoils(prompts, completions, answer, completion_ids):
        completions[0] = answer[0] = "changed"
        completion_ids[0].clear()
        return [0.0]

    seen, ids = [], [[5, 6]]

    def sees(prompts, completions, answer, completion_ids):
        seen.append((completions, answer, completion_ids))
        return [0.0]

    call_rewards({"a": spoils, "b": sees}, ["p"], ["c"], {"answer": ["x"]}, ids)
    assert seen == [(["c"], ["x"], [[5, 6]])] and ids == [[5, 6]]


def test_a_reward_that_exits_is_named():
    def leaves(prompts, completions, **columns):
        raise SystemExit(3)

    with pytest.raises(ValueError, match="reward a raised SystemExit: 3 at .*test_rewards.py"):
        call_rewards({"a": leaves}, ["p"], ["c"], {}, [[5]])


def test_names_may_have_blanks_around_them():
    assert list(load_reward_funcs("last_word, last_number", ["answer"])) == ["last_word", "last_number"]
    with pytest.raises(ValueError, match="'last_word,' names nothing"):
        load_reward_funcs("last_word,", ["answer"])
