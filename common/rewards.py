"""Reward functions: built-in ones, others by name, and a call that trusts none of them.

A reward function has TRL's signature: (prompts, completions, **columns) -> a number for each completion.
Prompts and completions are strings, or lists of messages where the dataset holds conversations; columns are
the dataset's other ones, a list with a value for each completion.
"""

import importlib
import inspect
import math
import re
import sys

from common.flags import Refusal

NUMBER = re.compile(r"(?:(?<![\d.])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")  # in 10-7 the second number is 7


def text_of(completion):
    """The text of a completion that may be a list of messages."""
    return completion if isinstance(completion, str) else "".join(m["content"] for m in completion)


def last_word(prompts, completions, answer, **columns):
    """1 where the last word, without a full stop, is the column `answer`; 0 elsewhere.

    >>> last_word(["", ""], ["3 + 4 = 7.", "8"], ["7", "7"])
    [1.0, 0.0]
    """
    words = [(text_of(c).split() or [""])[-1].rstrip(".") for c in completions]
    return [float(word == str(wanted)) for word, wanted in zip(words, answer)]


def last_number(prompts, completions, answer, **columns):
    """1 where the number after "####", or else the last number, equals that of the column `answer`.

    >>> last_number([""] * 3, ["#### 1,200 coins", "12 or 13.0", "none"], ["1200", "so: #### 13", "1"])
    [1.0, 1.0, 0.0]
    >>> last_number([""] * 2, ["so 10-7", "so -7"], ["7", "-7"])
    [1.0, 1.0]
    """
    pairs = zip(map(text_of, completions), map(str, answer))
    return [float(_number(text) is not None and _number(text) == _number(wanted)) for text, wanted in pairs]


def _number(text):
    marked = NUMBER.search(text.split("####")[-1]) if "####" in text else None
    found = [marked.group()] if marked else NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


BUILT_IN = {"last_word": last_word, "last_number": last_number}


def load_reward_funcs(names, columns):
    """Built-in rewards by name, others as module:function (of an installed module, or of the current folder).

    Args:    names: separated by commas. columns: names of what `call_rewards` will be given.
    Returns: {name: function}.
    Raises:  ValueError for what cannot be found or called, or wants a column that is not there.
    """
    functions, taken = {}, {"prompts", "completions"} & set(columns)
    if taken:
        raise Refusal(
            f"the dataset's column {', '.join(taken)} has the name of what a reward is given: rename it."
        )
    for name in names.split(","):
        module, colon, function = name.partition(":")
        if not colon:
            if name not in BUILT_IN:
                raise Refusal(
                    f"--reward_funcs {name}: choose {', '.join(BUILT_IN)}, or name a module:function."
                )
            functions[name] = BUILT_IN[name]
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")
            try:
                functions[name] = getattr(importlib.import_module(module), function)
            except Exception as error:  # whatever the module's own code raises
                raise Refusal(f"--reward_funcs {name} cannot be imported: {error}") from error
        if not callable(functions[name]):
            raise Refusal(
                f"--reward_funcs {name} is {functions[name]!r}: wanted a function (prompts, completions, ..)."
            )
        wanted = [
            parameter.name
            for parameter in inspect.signature(functions[name]).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        missing = set(wanted) - {"prompts", "completions"} - set(columns)
        if missing:
            raise Refusal(
                f"--reward_funcs {name} wants the column {', '.join(sorted(missing))}; beside prompts and "
                f"completions it is given {', '.join(sorted(columns)) or 'nothing'}."
            )
    return functions


def call_rewards(functions, prompts, completions, columns):
    """Each function's rewards: {name: list of B finite floats}.

    Raises: ValueError naming function, prompt and completion, if one raises, or returns another count or
            something that is not a finite number.
    """
    rewards = {}
    for name, function in functions.items():
        try:
            values = _call(function, prompts, completions, columns)
        except Exception as error:
            i = _culprit(function, prompts, completions, columns)
            raise Refusal(
                f"reward {name} raised {type(error).__name__}: {error}; {_pair(prompts, completions, i)}"
            ) from error
        if len(values) != len(completions):
            raise Refusal(
                f"reward {name} returned {len(values)} numbers for {len(completions)} completions; first: "
                f"{_pair(prompts, completions, 0)}"
            )
        for i, value in enumerate(values):
            if not _is_finite(value):
                raise Refusal(
                    f"reward {name} returned {value!r}; wanted: a finite number; "
                    f"{_pair(prompts, completions, i)}"
                )
        rewards[name] = [float(value) for value in values]
    return rewards


def _call(function, prompts, completions, columns):
    """What one function returns, as a list: a generator's body runs, and raises, in here."""
    values = function(prompts=prompts, completions=completions, **columns)
    if isinstance(values, dict):
        raise TypeError("a dict came back; wanted: a list of numbers")
    return list(values) if hasattr(values, "__iter__") else [values]


def _is_finite(value):
    try:
        return math.isfinite(value)
    # a list, a tensor of several numbers, 10**400
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _culprit(function, prompts, completions, columns):
    """The first completion for which the function raises alone; 0 if it only raises for all together."""
    for i in range(len(completions)):
        try:
            one = {name: values[i : i + 1] for name, values in columns.items()}
            _call(function, prompts[i : i + 1], completions[i : i + 1], one)
        except Exception:
            return i
    return 0


def _pair(prompts, completions, i):
    return f"prompt {prompts[i]!r}, completion {completions[i]!r}"
