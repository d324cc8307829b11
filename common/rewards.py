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
    return [float(word == wanted or _as_number(word) == _as_number(wanted)) for word, wanted in pairs]


def last_number(prompts, completions, answer, **columns):
    """1 where the number after "####", or else the last number, equals that of the column `answer`.

    >>> last_number([""] * 3, ["#### 1,200 coins", "12 or 13.0", "none"], ["1200", "so: #### 13", "1"])
    [1.0, 1.0, 0.0]
    >>> last_number([""] * 2, ["so 10-7", "so -7"], ["7", "-7"])
    [1.0, 1.0]
    """
    pairs = zip(map(text_of, completions), map(str, answer))
    return [float(_find_number(text) == _find_number(wanted)) for text, wanted in pairs]


def _find_number(text):
    marked = NUMBER.search(text.split("####")[-1]) if "####" in text else None
    found = [marked.group()] if marked else NUMBER.findall(text)
    return _as_number(found[-1] if found else "")


def _as_number(text):
    """The number that the whole text is, or NaN, which equals nothing. Exact: floats keep 16 digits of 20."""
    return Decimal(text.replace(",", "") if NUMBER.fullmatch(text) else "nan")


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
    taken = ", ".join(name for name in GIVEN if name in columns)
    refuse(taken, f"the dataset's column {taken} has the name of what a reward is given: rename it.")
    functions, given = {}, dict.fromkeys([*GIVEN, *columns])
    for name in map(str.strip, names.split(",")):
        functions[name] = _find_function(name)
        try:
            inspect.signature(functions[name]).bind(**_arguments(functions[name], given))
        except (TypeError, ValueError) as error:  # other parameters; not callable, or written in C
            raise Refusal(
                f"--reward_funcs {name} cannot be called with {', '.join(given)}: {error}; give the dataset "
                "a column that is missing, and the function **columns for those that it does not read."
            ) from error
    return functions


def _find_function(name):
    module, colon, function = name.partition(":")
    if not colon:
        known = ", ".join(BUILT_IN)
        refuse(name not in BUILT_IN, f"--reward_funcs {name}: choose {known}, or name a module:function.")
        return BUILT_IN[name]
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module's own code raises
        raise Refusal(f"--reward_funcs {name} cannot be imported: {error}") from error


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


def _arguments(function, arguments):
    """What a function is called with: all arguments, but completion_ids only if it takes them."""
    left_out = () if _takes(function, "completion_ids") else ("completion_ids",)
    return {name: values for name, values in arguments.items() if name not in left_out}


def call_rewards(functions, prompts, completions, columns, completion_ids):
    """Each function's rewards: {name: list of B finite floats}.

    Args:   prompts, completions (B); columns: {name: list of B values}; completion_ids: B lists of ids, for
            the functions that take them.
    Raises: ValueError naming the function, if it is async, or returns no list, or another count; with prompt
            and completion, if it raises (with its line, too), or returns something that is no finite number.
    """
    rewards, arguments = {}, dict(zip(GIVEN, (prompts, completions, completion_ids))) | columns
    for name, function in functions.items():
        try:
            values = _call(function, arguments)
        except (Exception, SystemExit) as error:  # a library's sys.exit would end the run without a word
            raised = f"raised {type(error).__name__}: {error}{_place(error, function)}"
            pair = _pair(arguments, _culprit(function, arguments))
            raise Refusal(f"reward {name} {raised}; {pair}") from error
        wanted = f"wanted: a list of {len(completions)} numbers, one for each completion, and nothing async."
        refuse(not isinstance(values, list), f"reward {name} returned {values!r}; {wanted}")
        refuse(len(values) != len(completions), f"reward {name} returned {len(values)} values; {wanted}")
        for i, value in enumerate(values):
            if not _is_finite(value):
                wanted = f"wanted: a finite number; {_pair(arguments, i)}"
                raise Refusal(f"reward {name} returned {value!r}; {wanted}")
        rewards[name] = [float(value) for value in values]
    return rewards


def _call(function, arguments):
    """What one function returns, as a list if it can be one: a generator's body runs, and raises, in here.

    It is given copies: what it changes in them, no other reward sees, and nobody trains on.
    """
    values = function(**copy.deepcopy(_arguments(function, arguments)))
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
    except (TypeError, ValueError, OverflowError):  # None, a list, a tensor of several numbers, 10**400
        return False


def _culprit(function, arguments):
    """The first completion for which the function raises alone; 0 if it only raises for all together."""
    for i in range(len(arguments["completions"])):
        try:
            _call(function, {name: values[i : i + 1] for name, values in arguments.items()})
        except (Exception, SystemExit):
            return i
    return 0


def _pair(arguments, i):
    return f"prompt {arguments['prompts'][i]!r}, completion {arguments['completions'][i]!r}"
