"""Length limits: what to do with an example that is too long. Ids and labels are always cut together."""

from common import refuse

OVERFLOW = ("truncate", "split", "drop", "error")
TRUNCATION_MODES = ("keep_start", "keep_end")


def check_limit(name, limit):
    """Raise ValueError unless `limit` is None (off) or a whole number >= 1."""
    wrong = limit is not None and (type(limit) is not int or limit < 1)  # True is an int as well
    refuse(wrong, f"{name} is {limit!r}; give a whole number >= 1, or leave it out.")


def fit_to_length(input_ids, labels, max_length, overflow):
    """Bring one example under `max_length` tokens.

    Args:    input_ids, labels: lists of one length T >= 0; labels -100 = not scored. They are not changed.
             max_length: tokens, or None for no limit.
             overflow: "truncate" keeps the first max_length tokens, "split" cuts the example into pieces of
             max_length tokens (the last may be shorter), "drop" returns nothing, "error" raises.
    Returns: a list of (input_ids, labels): one pair if it fits, no pair if dropped, several if split.
             The first token of a later piece has lost its context; collators do not score it.
    Raises:  ValueError for a bad limit, an unknown overflow, unequal lengths, or "error" and too long.

    >>> fit_to_length([1, 2, 3], [-100, 2, 3], 2, "split")
    [([1, 2], [-100, 2]), ([3], [3])]
    >>> fit_to_length([1, 2, 3], [-100, 2, 3], 2, "truncate")
    [([1, 2], [-100, 2])]
    """
    check_limit("max_length", max_length)
    length, remedy = len(input_ids), "raise it, or choose overflow truncate, split or drop."
    refuse(overflow not in OVERFLOW, f"overflow is {overflow!r}; choose one of {', '.join(OVERFLOW)}.")
    refuse(length != len(labels), f"an example has {length} input_ids but {len(labels)} labels.")
    if max_length is None or length <= max_length:
        return [(input_ids, labels)]
    refuse(overflow == "error", f"an example has {length} tokens, max_length is {max_length}: {remedy}")
    pieces = {"drop": 0, "truncate": 1}.get(overflow)  # None = all
    starts = range(0, length, max_length)[:pieces]
    return [(input_ids[i : i + max_length], labels[i : i + max_length]) for i in starts]


def truncate_pair(
    prompt_ids,
    completion_ids,
    *,
    max_prompt_length=None,
    max_completion_length=None,
    max_length=None,
    truncation_mode="keep_start",
):
    """Apply three limits, in this order: the prompt keeps its end (nearest the answer), the completion its
    start, then prompt + completion together keep their first ("keep_start") or last ("keep_end") max_length
    tokens.

    Args:    prompt_ids, completion_ids: lists of token ids; the limits in tokens, None = off.
    Returns: (prompt_ids, completion_ids), new lists.
    Raises:  ValueError for limits below 1 or an unknown mode.
    Source:  the three limits of TRL's DPOConfig.

    >>> truncate_pair([1, 2, 3], [4, 5, 6], max_prompt_length=2, max_length=4)
    ([2, 3], [4, 5])
    >>> truncate_pair([1, 2, 3], [4, 5, 6], max_length=2, truncation_mode="keep_end")
    ([], [5, 6])
    """
    check_limit("max_prompt_length", max_prompt_length)
    check_limit("max_completion_length", max_completion_length)
    check_limit("max_length", max_length)
    unknown = truncation_mode not in TRUNCATION_MODES
    refuse(unknown, f"truncation_mode is {truncation_mode!r}; choose keep_start or keep_end.")
    # list[-0:] would be the whole list: safe only because no limit is 0
    prompt_ids = list(prompt_ids)[-max_prompt_length:] if max_prompt_length else list(prompt_ids)
    completion_ids = list(completion_ids)[:max_completion_length]
    excess = 0 if max_length is None else len(prompt_ids) + len(completion_ids) - max_length
    if excess <= 0:
        return prompt_ids, completion_ids
    if truncation_mode == "keep_start":
        return prompt_ids[:max_length], completion_ids[: max(0, max_length - len(prompt_ids))]
    return prompt_ids[excess:], completion_ids[max(0, excess - len(prompt_ids)) :]
