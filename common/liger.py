"""Liger's Triton kernels in a transformers model: rotary embedding, norms, gated MLP, and a loss head.

A fused kernel reads its input once and keeps fewer intermediate results for backward than the same formula
in PyTorch. `apply_liger_kernels` puts them into a loaded model and proves on a few tokens that its logits
stay; `liger_nll_sum` takes the place of `nll_sum` (logps.py).
"""

import os

import torch
import torch.distributed.tensor  # Liger 0.8.0 uses this module without importing it

from common import Refusal


def check_liger(model_type=None):
    """Raise ValueError, before anything is loaded, for a machine or a model type that Liger cannot serve."""
    try:
        import triton  # noqa: F401
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise Refusal(
            f"Liger's kernels need liger-kernel and triton, and here: {error}. Install requirements.txt "
            "(Triton is made for Linux), or drop --use_liger_kernel and --liger_cross_entropy."
        ) from error
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise Refusal(
            "Liger's kernels are written in Triton, which needs a GPU, and torch sees none: drop "
            "--use_liger_kernel and --liger_cross_entropy. (TRITON_INTERPRET=1 runs some kernels on the "
            "CPU, for tests: far slower, and Liger's norms and MLPs not at all.)"
        )
    if model_type is not None and model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise Refusal(
            f"--use_liger_kernel: Liger has no kernels for model type {model_type!r}: drop the flag, or see "
            "whether a newer liger-kernel has. Known here (liger_kernel/transformers/monkey_patch.py): "
            f"{', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}."
        )


@torch.no_grad()
def apply_liger_kernels(model, input_ids):
    """Replace rotary embedding, norms and gated MLP of this model by Liger's kernels; the loss stays.

    Liger goes by the model type alone. It does not look whether this configuration computes something else
    (another activation, say), so the logits before and after are compared. Call it on the loaded model,
    sharded or not, on every rank: it binds new forwards to the modules that are there.

    Args:    model: a transformers causal LM. input_ids (1, N) int64 on its device; 64 tokens are plenty.
    Returns: the worst absolute difference of logits, plain against Liger.
    Raises:  ValueError for what `check_liger` refuses, if nothing was replaced, if a kernel fails, or if the
             difference is above 1e-4 (fp32) or 5e-2 (half precision) of the largest logit.
    Notes:   the rotary embedding is a function of the family's module: it changes for all its models in this
             process, and for those built later norms and MLP as well. In backward the kernels write
             gradients over saved tensors: retain_graph would read garbage.
    """
    check_liger(model.config.model_type)
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    training = model.training
    model.eval()
    plain = _logits(model, input_ids)
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    if not any(_runs_liger(module) for module in model.modules()):
        raise Refusal(f"--use_liger_kernel replaced nothing in {type(model).__name__}: drop the flag.")
    try:
        difference = (_logits(model, input_ids) - plain).abs().max().item()
    except Exception as error:  # no compiler, an old GPU, an operation that the interpreter lacks: any type
        raise Refusal(
            f"--use_liger_kernel: a kernel failed on {input_ids.device}, {type(error).__name__}: {error}. "
            "Mend Triton (on a GPU it needs a C compiler), or drop the flag."
        ) from error
    tolerance = (1e-4 if plain.dtype == torch.float32 else 5e-2) * plain.abs().max().clamp(min=1.0).item()
    if not difference <= tolerance:  # written so that NaN fails too
        raise Refusal(
            f"--use_liger_kernel changes the logits of {type(model).__name__} by {difference:.3g}, tolerance "
            f"{tolerance:.3g}: Liger's kernels do not fit this configuration. Drop the flag."
        )
    model.train(training)
    return difference


def _runs_liger(module):
    return getattr(vars(module).get("forward"), "__module__", "").startswith("liger_kernel.")


def _logits(model, input_ids):
    """Logits (1, N, V) of one document, laid out so that every attention implementation takes it."""
    length = input_ids.shape[1]
    offsets = torch.tensor([0, length], dtype=torch.int32, device=input_ids.device)
    bounds = {f"cu_seq_lens_{x}": offsets for x in "qk"} | {f"max_length_{x}": length for x in "qk"}
    position_ids = torch.arange(length, device=input_ids.device)[None]
    return model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **bounds).logits


def liger_nll_sum(hidden, weight, target_ids, *, bias=None):
    """`nll_sum` by Liger's fused linear cross entropy, which chooses the size of its chunks itself.

    The logits' gradients are written over the logits in forward, the gradients of hidden, weight and bias
    are saved, and backward scales those in place: no hook may move saved tensors, and backward runs once.

    Args:    hidden (N, H), weight (V, H), bias (V,) or None, of one dtype; target_ids (N,) int64, all scored.
    Returns: () float32, with gradients for hidden, weight and bias, summed over chunks in fp32.
    Raises:  ValueError if weight wants a gradient and hidden does not: Liger would leave it out.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if torch.is_grad_enabled() and weight.requires_grad and not hidden.requires_grad:
        raise Refusal(
            "Liger's cross entropy gives the head no gradient while nothing below it is trained: "
            "drop --liger_cross_entropy."
        )
    if len(hidden) == 0:
        # Liger divides by the number of tokens. Sums over nothing are 0, and so are their gradients.
        nothing = [hidden.sum(), weight[:0].sum(), *([] if bias is None else [bias[:0].sum()])]
        return sum(x.float() for x in nothing)
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return loss(weight, hidden, target_ids, bias)
