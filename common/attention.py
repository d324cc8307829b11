"""Attention over a flat row: each document attends to itself alone, at a cost of sum(L_i^2) instead of N^2.

`register_varlen_attention()` adds "varlen" to transformers' attention implementations; an unmodified model
then takes the row's boundaries (collators.py) as keyword arguments of its forward.
"""

import inspect

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from common import Refusal

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

# torch 2.13; 2.11 wants one key head for each query head
TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


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
    options = scaling, sliding_window, dropout
    return _by_segments(query, key, value, cu_seq_lens_q, cu_seq_lens_k, *options), None


# torch.compile leaves it outside: how many segments there are is only known when it runs
@torch.compiler.disable
def _by_segments(query, key, value, cu_seq_lens_q, cu_seq_lens_k, scaling, sliding_window, dropout):
    """SDPA, segment by segment. Shapes as of `varlen_attention_forward`."""
    if query.is_cuda:  # fp32: for groups of heads, CUDA has no kernel but one that writes all scores down
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
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
    return torch.cat([x.transpose(1, 2) for x in outputs], dim=1)


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
    if dropout:
        raise Refusal(
            "torch's varlen_attn has no dropout: install flash-attn, or set attention_dropout to 0."
        )
    options = {}
    if TAKES_GQA:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    elif query.shape[1] != key.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return varlen_attn(
        query, key, value, *offsets, *longest, scale=scaling, window_size=window_size, **options
    )
