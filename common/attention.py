"""Attention over a flat row: each document attends to itself alone, at a cost of sum(L_i^2) instead of N^2.

`register_varlen_attention()` adds "varlen" to transformers' attention implementations; an unmodified model
then takes the row's boundaries (collators.py) as keyword arguments of its forward.
"""

import inspect
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from common import Refusal
from common.logps import head_computes

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


def register_varlen_attention():
    """Make attn_implementation="varlen" known to transformers. Calling it twice changes nothing."""
    AttentionInterface.register("varlen", varlen_attention_forward)
    AttentionMaskInterface.register("varlen", _no_mask)


def _no_mask(*args, attention_mask=None, **kwargs):
    """The boundaries say all that a mask would say, without its N x N bytes."""
    if attention_mask is not None:
        raise Refusal("a flat row has boundaries, not an attention_mask: leave the mask out.")


def varlen_attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    max_length_q=None,
    max_length_k=None,
    kv_index=None,
    **kwargs,
):
    """Causal attention within the segments of one flat row; called by transformers in every layer.

    Args:    query (1, H, N, D), key and value (1, Hkv, N, D); cu_seq_lens_q, cu_seq_lens_k (S+1,) int32;
             kv_index (Nk,) int64 or None: which tokens are keys and values, segment by segment;
             sliding_window: a token sees itself and the sliding_window - 1 tokens before it.
    Returns: (1, N, H, D), None (no attention weights).
    Raises:  ValueError for what would otherwise be ignored: no boundaries, a mask, softcap, attention sinks.
    Notes:   causal masks align bottom-right: a segment's last query sees all of the segment's keys.
             On CUDA, half precision runs flash-attn if installed, else torch's varlen_attn; fp32 and CPU run
             SDPA segment by segment.
    """
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        raise Refusal(
            'attn_implementation="varlen" needs cu_seq_lens_q and cu_seq_lens_k: pass a flat row '
            "(collators.flatten), or use sdpa for padded batches and generation. If a flat row was passed, "
            "this model does not hand keyword arguments on to its attention, and cannot keep documents apart."
        )
    if attention_mask is not None:
        raise Refusal("a flat row has boundaries, not an attention_mask: leave the mask out.")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise Refusal(f"varlen attention does not support {name}, which {type(module).__name__} uses.")
    if kv_index is not None:
        # backward of index_select adds up a shared prompt's gradients from all its completions
        key, value = key.index_select(2, kv_index), value.index_select(2, kv_index)
    if torch.is_autocast_enabled(query.device.type):
        # autocast leaves the rotated queries and keys in fp32 beside bf16 values; kernels want one dtype
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        output = _varlen_kernel(
            *(x[0].transpose(0, 1) for x in (query, key, value)),  # (N, H, D)
            (cu_seq_lens_q, cu_seq_lens_k),
            (max_length_q, max_length_k),
            scaling,
            sliding_window,
            dropout,
        )
        return output[None], None
    outputs = []
    bounds_q, bounds_k = cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist()
    for i in range(len(bounds_q) - 1):
        q = query[:, :, bounds_q[i] : bounds_q[i + 1]]
        k, v = (x[:, :, bounds_k[i] : bounds_k[i + 1]] for x in (key, value))
        mask = _causal_mask(q.shape[2], k.shape[2], sliding_window, q.device)
        outputs.append(
            scaled_dot_product_attention(
                q,
                k,
                v,
                mask,
                dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    # joined along tokens in (1, N, H, D) order, which is what the layer reads: no copy after this one
    return torch.cat([x.transpose(1, 2) for x in outputs], dim=1), None


def _causal_mask(length_q, length_k, sliding_window, device):
    """(length_q, length_k) bool, aligned bottom-right; None where SDPA's own is_causal says the same."""
    if length_q == length_k and (sliding_window is None or sliding_window >= length_k):
        return None
    position_q = torch.arange(length_k - length_q, length_k, device=device)[:, None]
    position_k = torch.arange(length_k, device=device)
    mask = position_k <= position_q
    if sliding_window is not None:
        mask &= position_k > position_q - sliding_window
    return mask


def _varlen_kernel(query, key, value, offsets, longest, scaling, sliding_window, dropout):
    """One CUDA kernel for all segments. Shapes: query (N, H, D), key and value (Nk, Hkv, D)."""
    # tokens to the left and to the right that are seen besides the token itself; -1 = all
    window_size = (-1 if sliding_window is None else sliding_window - 1, 0)
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(
            query, key, value, *offsets, *longest, dropout, scaling, causal=True, window_size=window_size
        )
    from torch.nn.attention.varlen import varlen_attn  # imported here: the module wants a CUDA build

    if dropout:
        raise Refusal(
            "torch's varlen_attn has no dropout: install flash-attn, or set attention_dropout to 0."
        )
    options = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.13
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    elif query.shape[1] != key.shape[1]:  # torch 2.11 wants one key head for each query head
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return varlen_attn(
        query, key, value, *offsets, *longest, scale=scaling, window_size=window_size, **options
    )


def named_windows(config):
    """{field: tokens} of the windows and chunks within which the configuration says that layers attend."""
    config = config.get_text_config()
    types, found = getattr(config, "layer_types", None), {}
    for name, kind in (("sliding_window", "sliding"), ("attention_chunk_size", "chunked")):
        used = types is None or any(kind in str(each) for each in types)
        if getattr(config, f"use_{name}", True) and used and getattr(config, name, None):
            found[name] = getattr(config, name)
    return found


@contextmanager
def windows_noted(implementation):
    """Yields a set that gets the sliding_window of each call of this attention implementation."""
    if implementation == "eager":  # each model's own function
        yield set()
        return
    attend, windows = AttentionInterface()[implementation], set()

    def noting(*args, sliding_window=None, **kwargs):
        windows.add(sliding_window)
        return attend(*args, sliding_window=sliding_window, **kwargs)

    AttentionInterface.register(implementation, noting)
    try:
        yield windows
    finally:
        AttentionInterface.register(implementation, attend)


@contextmanager
def refusals_of(model, remedy):
    """A ValueError that transformers' model raises for a flat row becomes the user's: another way, or model.

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
        raise Refusal(f"{type(model).__name__} refuses a flat row: {error} {remedy}") from error


@torch.no_grad()
def check_isolation(
    model,
    row,
    max_tokens=64,
    remedy="Use --no_packing --no_padding_free for this model.",
    max_length=None,
):
    """Prove on a few tokens of `row` that this model keeps documents apart.

    Two documents are put into one flat row; the second one's logits must be what it gives alone,
    through sdpa. Always two forwards, of at most 2 * max_tokens and max_tokens tokens whatever the row holds,
    so that sharded ranks stay in step; where layers look back through a window, documents are longer than the
    smallest one, and their last max_tokens tokens are compared.

    Args:    model: a transformers causal LM with the attention implementation that training will use.
             row: a flat row on the model's device (collators.flatten); a single document is cut into two.
             remedy: the end of the error's message. max_length: tokens of the longest document that the run
             can have; windows that reach as far change nothing.
    Returns: the worst absolute difference of logits, packed against alone.
    Raises:  ValueError if it is above 1e-4 (fp32) or 5e-2 (half precision) of the largest logit; and for what
             a few tokens would not show: a window that never reaches the attention, or a temperature that
             grows along the row.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if getattr(config, "attn_temperature_tuning", False):
        raise Refusal(
            f"{name} scales queries by their place in the row (attn_temperature_tuning), whichever document "
            f"they belong to. {remedy}"
        )
    windows = named_windows(config)
    windows = {field: w for field, w in windows.items() if max_length is None or w < max_length}
    ids, offsets = row["input_ids"][0], row["cu_seq_lens_q"].tolist()
    if len(offsets) > 2:
        documents = [ids[offsets[0] : offsets[1]], ids[offsets[1] : offsets[2]]]
    else:
        documents = [ids[: (len(ids) + 1) // 2], ids[len(ids) // 2 :]]
    documents = [document[:max_tokens] for document in documents]
    if windows:
        length = min(windows.values()) + max_tokens
        length = length if max_length is None else min(length, max_length)
        documents = [x.repeat(-(-length // len(x)))[:length] for x in documents]
    training = model.training
    model.eval()
    implementation = model.config._attn_implementation
    try:
        with windows_noted(implementation) as arrived, refusals_of(model, remedy):
            packed = _last_logits(model, documents, max_tokens)
        # sdpa and eager attend within what the model's mask says
        lost = {} if implementation in ("sdpa", "eager") else windows
        for field, window in lost.items():
            if window not in arrived:
                longest = "any length" if max_length is None else f"up to {max_length} tokens"
                raise Refusal(
                    f"{name} attends within {field} {window} by a mask, which a flat row does not have, and "
                    f"documents of {longest} need it. {remedy}"
                )
        # Alone as transformers itself computes it: so a bidirectional or chunked mask that "varlen" is never
        # told of shows as well.
        model.set_attn_implementation("sdpa" if model._supports_sdpa else implementation)
        alone = _last_logits(model, documents[1:], max_tokens, flat=False)
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
    packed = packed[-len(alone) :]
    if not alone.isfinite().all():
        raise Refusal(f"{name} gives logits that are not finite: its weights are broken.")
    worst = (packed - alone).abs().max().item()
    tolerance = (1e-4 if packed.dtype == torch.float32 else 5e-2) * alone.abs().max().clamp(min=1.0).item()
    if not worst <= tolerance:  # written so that NaN fails too
        raise Refusal(
            f"{name} mixes the documents of a flat row: logits differ by {worst:.3g} "
            f"between packed and alone, tolerance {tolerance:.3g}. {remedy}"
        )
    return worst


def _last_logits(model, documents, count, flat=True):
    """Logits (count, V), or of as many tokens as there are, of the last tokens of documents in one row."""
    lengths = [len(ids) for ids in documents]
    device = documents[0].device
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    row = {"input_ids": torch.cat(documents)[None]}
    if flat:
        row |= {
            "position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None],
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }

    def head(hidden, weight, bias):  # [N, V] logits of a window's documents would be gigabytes
        return torch.nn.functional.linear(hidden[:, -count:], weight, bias)

    with head_computes(model, head):
        return model(**row, use_cache=False).logits[0]
