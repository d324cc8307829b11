"""One proof at start-up: what a run will compute is what transformers computes for each sequence alone.

A few tokens are scored twice: by the model as it was loaded, and in the run's own rows, with its attention,
its kernels and its loss head. That finds documents that read each other, completions that leak into one
another, logits that are changed behind the head, kernels that compute something else, and weights that are
not finite.
"""

import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

from common import Refusal, attention, refuse

NUM_SCORED = 16  # of a sequence: its last tokens
NUM_TOKENS = 64  # of a sequence, where no layer looks back through a window


def named_windows(config):
    """{field: tokens} of the windows and chunks within which the configuration says that layers attend."""
    config = config.get_text_config()
    types, found = getattr(config, "layer_types", None), {}
    for name, kind in (("sliding_window", "sliding"), ("attention_chunk_size", "chunked")):
        used = types is None or any(kind in str(each) for each in types)
        if getattr(config, f"use_{name}", True) and used and getattr(config, name, None):
            found[name] = getattr(config, name)
    return found


def proof_tokens(ids, config, max_length):
    """A few of the ids; many, repeated, where layers look back through a window: all of it has to be seen.

    Args: ids: a list of at least one; max_length: tokens of the longest sequence of the run: a window that
          reaches as far changes nothing.
    Returns: a list of at most max_length ids.
    """
    windows = [window for window in named_windows(config).values() if window < max_length]
    if not windows:
        return ids[: min(NUM_TOKENS, max_length)]
    length = min(min(windows) + NUM_TOKENS, max_length)
    return (ids * -(-length // len(ids)))[:length]


@torch.no_grad()
def logps_alone(model, sequences, device=None):
    """What plain transformers computes: call it before attention or kernels of the model are changed.

    Args:    sequences: [(input_ids, num_scored), ..]: lists of ids, whose last num_scored are scored; device:
             where the model computes, if not where its weights, or their shards, are.
    Returns: log-probabilities of all scored tokens, (M,) float32; every rank has to call it, for as many
             sequences.
    """
    training, logps = model.training, []
    model.eval()
    for ids, num_scored in sequences:
        input_ids = torch.tensor([ids], device=device or next(model.parameters()).device)
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=num_scored + 1).logits[0, :-1]
        scored = input_ids[0, -num_scored:, None]
        logps.append(torch.log_softmax(logits.float(), dim=-1).gather(1, scored)[:, 0])
    model.train(training)
    return torch.cat(logps)


@torch.no_grad()
def check_exact(model, expected, compute, *, bf16, what, remedy):
    """Raise Refusal if the run would compute other log-probabilities than transformers.

    Args:    expected: of `logps_alone`; compute: function that returns the same tokens' log-probabilities, in
             the same order, as the run computes them; bf16: whether it computes in bf16; what: names its
             rows, for the message, and remedy: other ones.
    Returns: the largest absolute difference, in nats.
    Raises:  ValueError if that is above 1e-4 (fp32) or 5e-2 (bf16) of the largest log-probability, if
             expected is not finite, or if a window of the configuration never reaches the attention.
    """
    name, config, training = type(model).__name__, model.config.get_text_config(), model.training
    refuse(not expected.isfinite().all(), f"{name} gives logits that are not finite: its weights are broken.")
    model.eval()
    attention.noted = calls = set()
    try:
        with refusals_of(model, remedy):
            found = compute()
    finally:
        attention.noted = None
        model.train(training)
    for field, window in named_windows(config).items() if calls else ():
        # in bf16 the difference that a lost window makes may be within the tolerance
        lost = max(longest for _, longest in calls) > window not in {arrived for arrived, _ in calls}
        refuse(lost, f"{name} attends within {field} {window} by a mask, which a flat row lacks. {remedy}")
    difference = (found - expected).abs().max().item()
    tolerance = (5e-2 if bf16 else 1e-4) * expected.abs().max().clamp(min=1.0).item()
    if not difference <= tolerance:  # written so that NaN fails too
        names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
        behind = [f"{each} {getattr(config, each)}" for each in names if getattr(config, each, None)]
        causes = "it mixes the sequences of a row, or kernels do not fit its configuration"
        if behind:
            causes = f"logits change behind the head ({', '.join(behind)}), or {causes}"
        raise Refusal(
            f"{name} computes something else {what} than for each sequence alone: log-probabilities differ "
            f"by {difference:.3g}, tolerance {tolerance:.3g}. Perhaps {causes}. {remedy}"
        )
    return difference


@contextmanager
def refusals_of(model, remedy):
    """A ValueError that transformers' model raises for a row becomes the user's: another way, or model.

    What is raised elsewhere, by a mistake in a script say, stays what it is.
    """
    try:
        yield
    except Refusal:
        raise
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if Path(transformers.__file__).parent not in raised_in.parents:
            raise
        raise Refusal(f"{type(model).__name__} refuses this run's rows: {error} {remedy}") from error
