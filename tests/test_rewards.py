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

CASES = [
    (last_word, "The sum is 12.", "12", 1.0),
    (last_word, "12 is the sum", "12", 0.0),
    (last_word, "", "12", 0.0),
    (last_word, "112", "12", 0.0),
    (last_word, "spelt a-b", "a-b", 1.0),
    (last_word, "so 1,200.", 1200, 1.0),
    (last_word, "1,2,3", "123", 0.0),
    (last_word, "012", " 12 ", 1.0),
    (last_word, "so 10000000000000000", 1e16, 1.0),
    (last_word, "so 12345678901234567891", "12345678901234567892", 0.0),
    (last_word, "7\u00b0", 7, 0.0),
    (last_word, "1", True, 0.0),
    (last_word, "True.", True, 1.0),
    (last_word, "nan", "inf", 0.0),
    (last_word, "1_0", "10", 0.0),
    (last_number, "7 then 8", "7", 0.0),
    (last_number, "first 8\n#### 7 because of 8", "7", 1.0),
    (last_number, "$1,234.50", "1234.5", 1.0),
    (last_number, "3", "-3", 0.0),
    (last_number, "no number", "0", 0.0),
    (last_number, "no number", "none", 0.0),
    (last_number, "70.", "#### 70", 1.0),
    (last_number, "about 0.00001", 1e-05, 1.0),
    (last_number, "1e-05", 1e-05, 1.0),
    (last_number, "so -5", 1e-05, 0.0),
    (last_number, "so 16", 1e16, 0.0),
    (last_number, "12345678901234567891", 12345678901234567892, 0.0),
    (last_number, "12345678901234567891", 12345678901234567891, 1.0),
    (last_number, "of 1,2,3", 3, 1.0),
    (last_number, "1e99999999999999999999999", 7, 0.0),
    (last_number, "0x3e8a is 8", "8", 1.0),
]


@pytest.mark.parametrize("function, text, answer, reward", CASES)
def test_what_is_right(function, text, answer, reward):
    said = [[{"role": "assistant", "content": text}]]
    assert function([""], [text], answer=[answer]) == function([""], said, [answer]) == [reward]


@pytest.mark.parametrize("name", ["last_word", "last_number"])
@pytest.mark.parametrize("answer", [None, math.nan, " ", "seven words", math.inf])
def test_an_answer_that_no_completion_can_give_is_refused(name, answer):
    good = 7.0 if isinstance(answer, float) else "7"
    rows = datasets.Dataset.from_list([{"answer": good}, {"answer": answer}])
    rewards = load_reward_funcs(f"common.rewards:{name}", ["answer"])  # the same function by another name
    for functions in (rewards, load_reward_funcs(name, ["answer"])):
        check_answers(functions, rows.select([0]), "some.csv")
        if (name, answer) == ("last_word", math.inf):  # a word
            continue
        with pytest.raises(ValueError, match=f"some.csv, example 1: answer is {answer!r}; .*{name} wants a"):
            check_answers(functions, rows, "some.csv")
    # others judge nulls for themselves
    check_answers(load_reward_funcs("grpo_cases:upper", ["answer"]), rows, "some.csv")


def test_built_in_and_imported_functions_are_found_and_what_they_may_read():
    found = load_reward_funcs("last_word, grpo_cases:upper", ["prompt", "answer"])
    assert found["last_word"] is last_word and list(found) == ["last_word", "grpo_cases:upper"]
    columns = ["answer", "level", "source"]
    assert columns_read({"a": last_word}, columns) == {"answer"}
    assert columns_read({"a": lambda prompts, completions, level, answer: []}, columns) == {"answer", "level"}
    assert columns_read(found, columns) == set(columns)


def takes_no_column(prompts, completions):
    return [0.0] * len(completions)


def positional(prompts, /, completions, **columns):
    return []


@pytest.mark.parametrize(
    "names, message",
    [
        ("first_word", "first_word: choose last_word, last_number, or name a module:function"),
        ("last_word,", "--reward_funcs : choose last_word"),
        ("no_module:f", "no_module:f cannot be imported"),
        ("test_rewards:f", "test_rewards:f cannot be imported"),
        (":f", "--reward_funcs :f cannot be imported"),
        ("grpo_cases:by_column", "with .*, answer: missing a required argument: 'wanted'"),
        ("test_rewards:takes_no_column", "argument 'answer'; give .* the function ..columns"),
        ("test_rewards:positional", "'prompts' parameter is positional only"),
        ("builtins:max", "builtins:max cannot be called with .*no signature"),
        ("math:pi", "math:pi cannot be called with .*3.14.* is not a callable"),
    ],
)
def test_what_cannot_be_found_or_called_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        load_reward_funcs(names, ["answer"])


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_a_column_with_the_name_of_what_a_reward_is_given_is_refused(name):
    with pytest.raises(ValueError, match=f"column {name} has the name of what a reward is given"):
        load_reward_funcs("grpo_cases:upper", ["answer", name])


def fails_for_b(prompts, completions, **columns):
    if "b" in completions:
        raise KeyError("b")
    return [0.0] * len(completions)


def generates_up_to_b(prompts, completions, **columns):
    for completion in completions:
        yield fails_for_b(prompts, [completion])[0]


def leaves(prompts, completions, **columns):
    raise SystemExit(3)


async def generates_while_waiting(prompts, completions, **columns):
    yield 0.0


def calls_a_library(prompts, completions, **columns):
    return [json.loads(completion) for completion in completions]


@functools.wraps(calls_a_library)
def wrapped(*args, **kwargs):
    return calls_a_library(*args, **kwargs)


def line_of(function, offset):
    return f" at {Path(__file__)}:{function.__code__.co_firstlineno + offset}, `"


AT_B = line_of(fails_for_b, 2) + "raise KeyError(\"b\")`; prompt 'p2', completion 'b'"
NO_LIST = "; wanted: a list of 3 numbers, one for each completion, and nothing async."


@pytest.mark.parametrize(
    "function, message",
    [
        (fails_for_b, f"reward f raised KeyError: 'b'{AT_B}"),
        (generates_up_to_b, f"reward f raised KeyError: 'b'{AT_B}"),
        (functools.partial(fails_for_b), f"reward f raised KeyError: 'b'{AT_B}"),
        (calls_a_library, line_of(calls_a_library, 1) + "return [json.loads(completion) for"),
        (wrapped, line_of(calls_a_library, 1)),
        (leaves, f"reward f raised SystemExit: 3{line_of(leaves, 1)}"),
        (positional, "argument: 'prompts'; prompt 'p1', completion 'a'"),  # never entered: no line
        (generates_while_waiting, NO_LIST),
        (torch.tensor(1.0), f"returned tensor(1.){NO_LIST}"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "returned {0: 1.0, 1: 1.0, 2: 1.0}" + NO_LIST),
        (None, f"returned None{NO_LIST}"),
        ([1.0], f"returned 1 values{NO_LIST}"),
        (torch.ones(3, 2), "returned tensor([1., 1.]); wanted: a finite number; prompt 'p1', completion 'a'"),
        ([0, 10**400, 0], "; wanted: a finite number; prompt 'p2', completion 'b'"),
        ([0.0, math.nan, 0.0], "returned nan; wanted: a finite number; prompt 'p2'"),
        ([0.0, "1", 0.0], "returned '1'; wanted: a finite number; prompt 'p2'"),
    ],
)
def test_a_function_that_misbehaves_is_named_with_its_prompt(function, message):
    if not callable(function):
        values, function = function, lambda prompts, completions, **columns: values
    with pytest.raises(ValueError) as caught:
        call_rewards({"f": function}, ["p1", "p2", "p3"], ["a", "b", "c"], {"x": [1, 2, 3]}, [[1], [2], []])
    assert message in str(caught.value)


def test_each_function_is_given_a_copy_of_what_it_takes():
    """What one changes in it, no other sees, and nobody trains on."""
    columns, ids, seen = {"answer": ["x", "y"], "level": [4, 5]}, [[5, 6], [7]], []

    def spoils(prompts, completions, answer, level, completion_ids):
        completions[0] = answer[0] = "changed"
        completion_ids[0].clear()
        return [True, 2]

    def takes_all(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return torch.tensor([0.5, 1.0])

    def names_the_columns(prompts, completions, answer, level):
        seen.append((prompts, completions, {"answer": answer, "level": level}))
        return (reward for reward in (3, 4))

    functions = {f.__name__: f for f in (spoils, takes_all, names_the_columns)}
    rewards = call_rewards(functions, ["p", "q"], ["c", "d"], columns, ids)
    assert rewards == {"spoils": [1.0, 2.0], "takes_all": [0.5, 1.0], "names_the_columns": [3.0, 4.0]}
    given = {"answer": ["x", "y"], "level": [4, 5]}
    ours = ["p", "q"], ["c", "d"]
    assert seen == [(*ours, {**given, "completion_ids": [[5, 6], [7]]}), (*ours, given)]
    assert columns == given and ids == [[5, 6], [7]]
