"""Reward functions: built-in ones, others by name, and a call that trusts none of them.

A reward function has TRL's signature: (prompts, completions, **columns) -> a number for each completion.
Prompts and completions are strings, or lists of messages where the dataset holds conversations; columns are
the dataset's other ones, a list with a value for each completion, and completion_ids, lists of token ids.
"""

import copy
import importlib
import inspect
import math
import re
import sys
import traceback
from decimal import Decimal

from common import Refusal, refuse

# In 10-7 the second number is 7, and in 1,2,3 the last one is 3. Exponents, as Python writes floats: 1e-05.
NUMBER = re.compile(
    r"(?:(?<![\d.])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}\b)?"
)


def text_of(completion):
    """The text of a completion that may be a list of messages."""
    return completion if isinstance(completion, str) else "".join(m["content"] for m in completion)


def last_word(prompts, completions, answer, **columns):
    """1 where the last word, without a full stop, is the column `answer`, or the same number; 0 elsewhere.

    >>> last_word([""] * 3, ["3 + 4 = 7.", "8", "7"], ["7", "7", 7.0])
    [1.0, 0.0, 1.0]
    """
    words = [(text_of(c).split() or [""])[-1].rstrip(".") for c in completions]
    pairs = zip(words, (str(wanted).strip() for wanted in answer))
    return [float(word == wanted or _equal(_as_number(word), _as_number(wanted))) for word, wanted in pairs]


def last_number(prompts, completions, answer, **columns):
    """1 where the number after "####", or else the last number, equals that of the column `answer`.

    >>> last_number([""] * 3, ["#### 1,200 coins", "12 or 13.0", "none"], ["1200", "so: #### 13", "1"])
    [1.0, 1.0, 0.0]
    >>> last_number([""] * 2, ["so 10-7", "so -7"], ["7", "-7"])
    [1.0, 1.0]
    """
    pairs = zip(map(text_of, completions), map(str, answer))
    return [float(_equal(_find_number(text), _find_number(wanted))) for text, wanted in pairs]


def _find_number(text):
    marked = NUMBER.search(text.split("####")[-1]) if "####" in text else None
    found = [marked.group()] if marked else NUMBER.findall(text)
    return _as_number(found[-1]) if found else None


def _as_number(text):
    """The number that the whole text is, or None. Exact: in a float, 20 digits would be rounded to 16."""
    return Decimal(text.replace(",", "")) if NUMBER.fullmatch(text) else None


def _equal(number, wanted):
    return number is not None and number == wanted


BUILT_IN = {"last_word": last_word, "last_number": last_number}
GIVEN = ("prompts", "completions", "completion_ids")  # to each reward, beside the dataset's columns


def check_answers(functions, rows, dataset):
    """Raise ValueError for an answer that a built-in reward would never find, naming dataset and example.

    Args: functions: as `load_reward_funcs` returns them; others than the built-in ones judge for themselves.
    """
    for name, function in functions.items():
        if function not in BUILT_IN.values():
            continue
        wanted = "number" if function is last_number else "single word, without a full stop,"
        for i, answer in enumerate(rows["answer"]):
            missing = answer is None or answer != answer or not str(answer).strip()  # NaN is not NaN
            if missing or function([""], [str(answer)], [answer]) != [1.0]:
                raise Refusal(
                    f"{dataset}, example {i}: answer is {answer!r}; --reward_funcs {name} wants a {wanted} "
                    "and would never find this one: change it, or leave the example out."
                )


def load_reward_funcs(names, columns):
    """Built-in rewards by name, others as module:function (of an installed module, or of the current folder).

    Args:    names: separated by commas. columns: names of the dataset's columns that they will be given.
    Returns: {name: function}.
    Raises:  ValueError for what cannot be found or called, wants a column that is not there, or does not take
             one that is.
    """
    functions, taken = {}, [name for name in GIVEN if name in columns]
    if taken:
        raise Refusal(
            f"the dataset's column {', '.join(taken)} has the name of what a reward is given: rename it."
        )
    for name in map(str.strip, names.split(",")):
        refuse(not name, f"--reward_funcs {names!r} names nothing between two commas, or at an end.")
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
        try:
            parameters = inspect.signature(functions[name]).parameters.values()
        except (TypeError, ValueError) as error:  # some that are written in C
            raise Refusal(f"--reward_funcs {name} does not say what it takes: {error}") from error
        wanted = [
            parameter.name
            for parameter in parameters
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        missing = set(wanted) - set(GIVEN) - set(columns)
        if missing:
            raise Refusal(
                f"--reward_funcs {name} wants the column {', '.join(sorted(missing))}; beside "
                f"{', '.join(GIVEN)} it is given {', '.join(sorted(columns)) or 'nothing'}."
            )
        left_over = [
            given
            for given in ("prompts", "completions", *sorted(columns))
            if not _takes(functions[name], given)
        ]
        if left_over:
            raise Refusal(
                f"--reward_funcs {name} does not take {', '.join(left_over)}: add the parameter **columns."
            )
    return functions


def columns_read(functions, columns):
    """Those of the columns that a reward may read: with **columns, all; the built-in ones read `answer`."""
    read = set()
    for function in functions.values():
        built_in = function in BUILT_IN.values()
        read |= {name for name in columns if (name == "answer" if built_in else _takes(function, name))}
    return read


def _takes(function, name):
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def call_rewards(functions, prompts, completions, columns, completion_ids):
    """Each function's rewards: {name: list of B finite floats}.

    Args:   prompts, completions (B); columns: {name: list of B values}; completion_ids: B lists of ids, for
            the functions that take them.
    Raises: ValueError naming function, prompt and completion, if one raises (with its line), is async, or
            returns no list, another count or something that is not a finite number.
    """
    rewards, columns = {}, {**columns, "completion_ids": completion_ids}
    for name, function in functions.items():
        try:
            values = _call(function, prompts, completions, columns)
        except (Exception, SystemExit) as error:  # a library's sys.exit would end the run without a word
            i = _culprit(function, prompts, completions, columns)
            raise Refusal(
                f"reward {name} raised {type(error).__name__}: {error}{_place(error, function)}; "
                f"{_pair(prompts, completions, i)}"
            ) from error
        if hasattr(values, "__await__") or hasattr(values, "__aiter__"):
            if inspect.iscoroutine(values):
                values.close()  # or Python would warn that nobody awaited it
            raise Refusal(f"reward {name} is async: make it a plain function, e.g. with asyncio.run inside.")
        if not isinstance(values, list):
            raise Refusal(
                f"reward {name} returned {values!r}; wanted: a list with a number for each completion; "
                f"first: {_pair(prompts, completions, 0)}"
            )
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
    """What one function returns, as a list if it can be one: a generator's body runs, and raises, in here.

    It is given copies: what it changes in them, no other reward sees, and nobody trains on.
    """
    prompts, completions, columns = copy.deepcopy((prompts, completions, columns))
    if not _takes(function, "completion_ids"):
        del columns["completion_ids"]
    values = function(prompts=prompts, completions=completions, **columns)
    number = not hasattr(values, "__iter__") or getattr(values, "ndim", 1) == 0  # a tensor of one number, too
    return values if number or isinstance(values, dict) else list(values)


def _place(error, function):
    """Where a function raised: the last line in its own file, whatever that called; "" if it never ran."""
    frames = traceback.extract_tb(error.__traceback__)[2:]  # without call_rewards and _call
    file = getattr(sys.modules.get(getattr(function, "__module__", None)), "__file__", None)
    own = [frame for frame in frames if frame.filename == file] or frames
    return f" at {own[-1].filename}:{own[-1].lineno}, `{own[-1].line}`" if own else ""


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
        except (Exception, SystemExit):
            return i
    return 0


def _pair(prompts, completions, i):
    return f"prompt {prompts[i]!r}, completion {completions[i]!r}"
