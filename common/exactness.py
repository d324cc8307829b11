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
from transformers import AttentionInterface

from common import Refusal, refuse
from common.logps import head_computes

NUM_TOKENS = 64  # of a sequence, where no layer looks back through a window; and at most so many scored


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


@contextmanager
def nothing_random(model):
    """Inside, a model with dropout is in evaluation mode; another one stays as training has it."""
    names = ("drop", "jitter")
    rates = (
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if any(each in name for each in names) or (name == "p" and "Dropout" in type(module).__name__)
    )
    training = model.training
    model.train(training and not any(rate for rate in rates if isinstance(rate, float)))
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def logps_alone(model, sequences, device=None):
    """What plain transformers computes: call it before attention or kernels of the model are changed.

    Args:    sequences: [(input_ids, num_scored), ..]: lists of ids, whose last num_scored are scored; device:
             where the model computes, if not where its weights, or their shards, are.
    Returns: log-probabilities of all scored tokens, (M,) float32; every rank has to call it, for as many
             sequences.
    Raises:  ValueError for logits that are not finite, or that change behind the output head.
    """
    logps, of_head = [], []

    def keep(hidden, weight, bias):
        of_head.append(torch.nn.functional.linear(hidden, weight, bias))
        return of_head[-1]

    for ids, num_scored in sequences:
        input_ids = torch.tensor([ids], device=device or next(model.parameters()).device)
        plain = torch.compiler.set_stance("force_eager")  # whatever has been asked of the layers
        with nothing_random(model), head_computes(model, keep), plain:
            logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=num_scored + 1).logits
        _check_logits(model, logits.float(), of_head.pop().float())
        scored = input_ids[0, -num_scored:, None]
        logps.append(torch.log_softmax(logits[0, :-1].float(), dim=-1).gather(1, scored)[:, 0])
    return torch.cat(logps)


def _check_logits(model, logits, of_head):
    name, config = type(model).__name__, model.config.get_text_config()
    refuse(not of_head.isfinite().all(), f"{name} gives logits that are not finite: its weights are broken.")
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    settings = {each: getattr(config, each, None) for each in names}
    refuse(
        not torch.equal(logits, of_head),
        f"{name} changes its logits after the output head ({settings}), which the chunked loss does not "
        "follow. Choose another model, or write the change into common/logps.py.",
    )


@contextmanager
def windows_noted(implementation):
    """Yields a set that gets the sliding_window of each call of this attention implementation."""
    attend, windows = AttentionInterface()[implementation], set()

    def noting(*args, sliding_window=None, **kwargs):
        windows.add(sliding_window)
        return attend(*args, sliding_window=sliding_window, **kwargs)

    AttentionInterface.register(implementation, noting)
    try:
        yield windows
    finally:
        AttentionInterface.register(implementation, attend)


@torch.no_grad()
def check_exact(model, expected, compute, *, bf16, max_length, what, remedy):
    """Raise Refusal if the run would compute other log-probabilities than transformers.

    Args:    expected: of `logps_alone`; compute: function that returns the same tokens' log-probabilities, in
             the same order, as the run computes them; bf16: whether it computes in bf16; max_length: tokens
             of the run's longest sequence; what: names its rows, for the message, and remedy: other ones.
    Returns: the largest absolute difference, in nats.
    Raises:  ValueError if that is above 1e-4 (fp32) or 5e-2 (bf16) of the largest log-probability, or if a
             window of the configuration never reaches the attention.
    """
    name, implementation = type(model).__name__, model.config._attn_implementation
    with refusals_of(model, remedy), nothing_random(model):
        found = compute()
    # In bf16 the difference that a lost window makes may be within the tolerance.
    windows = {field: size for field, size in named_windows(model.config).items() if size < max_length}
    if windows and implementation not in ("sdpa", "eager"):  # which attend within what the model's mask says
        with windows_noted(implementation) as arrived, torch.compiler.set_stance("force_eager"):
            compute()
        for field, size in windows.items():
            lost = f"{name} attends within {field} {size} by a mask, which a flat row lacks. {remedy}"
            refuse(size not in arrived, lost)
    difference = (found - expected).abs().max().item()
    tolerance = (5e-2 if bf16 else 1e-4) * expected.abs().max().clamp(min=1.0).item()
    if not difference <= tolerance:  # written so that NaN fails too
        raise Refusal(
            f"{name} computes something else {what} than for each sequence alone: log-probabilities differ "
            f"by {difference:.3g}, tolerance {tolerance:.3g}. Perhaps it mixes the sequences of a row, or "
            f"kernels do not fit its configuration. {remedy}"
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
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
        raise Refusal(f"--torch_compile cannot compile the layers: {error} Drop the flag.") from error
    except Exception as error:
        # no compiler, an old GPU, an operation that Triton's interpreter lacks: any type
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if not any("liger_kernel" in file for file in files):
            raise
        kind = f"{type(error).__name__}: {error}"
        raise Refusal(
            f"--use_liger_kernel: a kernel failed: {kind}. Mend Triton, or drop the flag."
        ) from error
