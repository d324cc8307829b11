"""Log-probabilities without the [N, V] logits: the head runs over chunks of tokens, and no chunk is kept.

N = 16,384 tokens over V = 151,936 is 4.6 GiB of bf16 logits, and as much again for their gradient. A chunk's
logits take 320 MiB at most, and turn into their own gradient in place: on CUDA by one Triton kernel, which
passes over them twice, elsewhere by PyTorch's operations. Results are exact: every chunk sees the whole
vocabulary, and softmax and sums are fp32.
"""

import functools
import os
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensor  # a dry run's
from torch.nn.functional import linear

from common import Refusal

try:
    import triton
    import triton.language as tl
except ImportError:  # it is made for Linux
    triton = None

# Bytes of a chunk's logits. A GPU wants large chunks: each one reads and writes the whole weight's gradient.
# A CPU is as fast with small ones.
CHUNK_BYTES = {"cuda": 320 * 2**20, "cpu": 48 * 2**20}
VOCAB_BLOCK = 8192  # on a CPU, rows of the weight's gradient made at once in half precision
BLOCK_ELEMENTS = 2**20  # of what PyTorch's operations cast to fp32 at once: 4 MiB, which stay in a cache


def token_logps(hidden, weight, target_ids, *, bias=None, temperature=1.0, chunk_size=None):
    """log softmax((hidden @ weight.T + bias) / temperature)[target_ids], chunk by chunk.

    The logits are computed again in backward (4 matrix products in all), because their gradient depends on
    what the loss does with the log-probabilities. For a sum whose weights are known, `nll_sum` needs 3.

    Args:    hidden (N, H), weight (V, H), bias (V,) or None; target_ids (N,) int64; chunk_size in tokens,
             None = as many as CHUNK_BYTES allows. N = 0 is fine. The products run in hidden's dtype, softmax
             and sums in fp32.
    Returns: (N,) float32, with gradients for hidden, weight and bias.
    Raises:  ValueError for shapes that do not fit, a chunk below 1, or a temperature of 0.
    Memory:  chunk_size * V elements of hidden's dtype beyond inputs and gradients.
    """
    chunk_size = _check(hidden, weight, target_ids, chunk_size, temperature)
    return _TokenLogps.apply(hidden, weight, bias, target_ids, temperature, chunk_size)


def nll_sum(hidden, weight, target_ids, *, weights=None, bias=None, temperature=1.0, chunk_size=None):
    """Sum of weights * negative log-probabilities of target_ids; 3 products, for the gradient is taken in
    forward.

    The sum's gradient in every logit is known up to one factor, so forward can finish each chunk while its
    logits are there, and backward only multiplies by that factor. Hence backward runs once: retain_graph is
    refused.

    Args:    weights (N,), without a gradient, None = 1 for each token; others as for `token_logps`.
    Returns: () float32, with gradients for hidden, weight and bias. Divide it by the number of items
             yourself.
    Memory:  chunk_size * V elements of hidden's dtype, and from forward to backward the gradients themselves:
             N * H in hidden's dtype and V * H in weight's (fp32 until the last chunk is done).
    Source:  the idea of Liger's fused linear cross entropy, arXiv 2410.10989.
    """
    chunk_size = _check(hidden, weight, target_ids, chunk_size, temperature)
    if weights is None:
        weights = torch.ones_like(target_ids, dtype=torch.float32)
    if weights.shape != target_ids.shape or weights.requires_grad:
        raise ValueError(f"weights {tuple(weights.shape)} must be one per target, without a gradient.")
    weights = weights.float()
    options = temperature, chunk_size, torch.is_grad_enabled()
    return _NllSum.apply(hidden, weight, bias, target_ids, weights, *options)


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


@contextmanager
def head_computes(model, function):
    """While inside, the model's output head returns function(hidden, weight, bias) instead of logits.

    The weight may be sharded (FSDP, ZeRO-3): it is whole only while the head's own forward runs, so the loss
    has to be computed there. Call the whole model as usual and read the result from `outputs.logits`.
    """
    head = model.get_output_embeddings()
    before = vars(head).get("forward")  # set on the instance by somebody else, or by an outer head_computes
    head.forward = lambda hidden: function(hidden, head.weight, head.bias)
    try:
        yield
    finally:
        if before is None:
            del head.forward  # the class's own method shows again
        else:
            head.forward = before


# What of a batch goes into the model's forward; everything else is the script's.
INPUTS = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q")
INPUTS += ("max_length_k", "kv_index")


def at_scored(model, batch, compute):
    """Run the model on a batch, and compute(hidden, weight, target_ids, bias) in the place of its logits.

    Args:    batch: of collators.py, with score_index and score_ids; compute: function of hidden (M, H), the
             hidden states that predict the M scored tokens, the head's weight (V, H), target_ids (M,) and the
             head's bias (V,) or None. A prompt costs no logits.
    Returns: what compute returned: it arrives as `model(..).logits`.
    """

    def head(hidden, weight, bias):
        hidden = hidden.flatten(0, 1).index_select(0, batch["score_index"])
        return compute(hidden, weight, batch["score_ids"], bias)

    inputs = {name: batch[name] for name in INPUTS if name in batch}
    with head_computes(getattr(model, "module", model), head):  # DeepSpeed's engine holds the model
        # With a cache or a mask, transformers ignores that position_ids restart: documents mix.
        return model(**inputs, use_cache=False).logits


def _check(hidden, weight, target_ids, chunk_size, temperature=1.0):
    """Raise ValueError for what does not fit. Returns the chunk size, chosen if it is None."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (N, H) and (V, H)."
        )
    if target_ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"target_ids {tuple(target_ids.shape)} must be one per hidden state: ({hidden.shape[0]},)."
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; give a number above 0.")
    if chunk_size is None:
        # a dry run's tensors are on a pretended CPU, and stand for a GPU's
        device = "cpu" if hidden.device.type == "cpu" and not isinstance(hidden, FakeTensor) else "cuda"
        chunk_size = max(1, CHUNK_BYTES[device] // (len(weight) * hidden.element_size()))
        # of whole tiles, as matrix products are computed
        chunk_size -= chunk_size % 128 if chunk_size > 128 else 0
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; give a number of tokens >= 1.")
    return chunk_size


# --- Logits -> log-probabilities, and their gradient in the logits' place ---


def logps_(logits, target_ids, temperature=1.0, factors=None):
    """Log-probabilities of target_ids (n,) by logits (n, V): (n,) float32.

    With factors (n,) float32, the logits become the gradient of sum(factors * log-probabilities) by them:
    factor / temperature * (onehot(target) - softmax(logits / temperature)), rounded to their dtype. Without,
    what they hold afterwards means nothing.
    """
    if _kernel_runs(logits.is_cuda):
        return _logps_by_kernel(logits, target_ids, temperature, factors)
    logps = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for rows in _chunks(len(logits), max(1, BLOCK_ELEMENTS // logits.shape[1])):
        block = logits[rows].float()  # fp32 logits are their own block
        if temperature != 1.0:
            block /= temperature
        target = target_ids[rows, None]
        of_target = block.gather(1, target)
        largest = block.amax(1, keepdim=True)
        total = block.sub_(largest).exp_().sum(1, keepdim=True)
        logps[rows] = (of_target - largest - total.log())[:, 0]
        if factors is not None:
            factor = factors[rows, None] / temperature
            block.mul_(-factor / total).scatter_add_(1, target, factor)
            logits[rows] = block
        del block  # or it would live on while the next one is made
    return logps


@functools.cache
def _kernel_runs(is_cuda):
    if is_cuda and triton is None:
        print("Triton is not installed: the loss head runs PyTorch's operations, exact as well, but slower.")
    return triton is not None and (is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def _logps_by_kernel(logits, target_ids, temperature, factors):
    assert logits.stride(1) == 1, "the kernel reads rows without gaps"
    logps = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block = min(triton.next_power_of_2(logits.shape[1]), 8192)
    _logps_kernel[(len(logits),)](
        logits,
        logits.stride(0),
        target_ids.contiguous(),
        logps if factors is None else factors.contiguous(),  # not read, where there are none
        logps,
        logits.shape[1],
        1 / temperature,
        HAS_FACTORS=factors is not None,
        BLOCK=block,
        num_warps=16 if block == 8192 else 4,
    )
    return logps


if triton is not None:

    @triton.jit
    def _logps_kernel(
        logits,
        row_stride,
        target_ids,
        factors,
        logps,
        vocab_size,
        inverse_temperature,
        HAS_FACTORS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program for each row of logits: `logps_` in two passes over it, one to read, one to write."""
        row = tl.program_id(0).to(tl.int64)  # a row's place may be beyond 2^31
        logits += row * row_stride
        target = tl.load(target_ids + row)
        known = (target >= 0) & (target < vocab_size)  # no other row is read for a wrong one: NaN
        of_target = tl.load(logits + target, known, float("nan")).to(tl.float32) * inverse_temperature
        # softmax's maximum and sum so far: a larger maximum scales down what is summed already
        largest, total = -3.4e38, 0.0  # finite: a whole block may be ruled out
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, columns < vocab_size, -float("inf")).to(tl.float32)
            x *= inverse_temperature
            larger = tl.maximum(largest, tl.max(x, 0))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
            largest = larger
        log_z = largest + tl.log(total)
        tl.store(logps + row, of_target - log_z)
        if HAS_FACTORS:
            factor = tl.load(factors + row) * inverse_temperature
            for start in range(0, vocab_size, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                inside = columns < vocab_size
                x = tl.load(logits + columns, inside, -float("inf")).to(tl.float32)
                p = tl.exp(x * inverse_temperature - log_z)
                gradient = factor * (tl.where(columns == target, 1.0, 0.0) - p)
                tl.store(logits + columns, gradient.to(logits.dtype.element_ty), inside)


# --- Chunk by chunk ---


few_chunks = False  # in a dry run: after the second chunk, the others would hold the same bytes again


def _chunks(n, chunk_size):
    chunks = [slice(i, min(i + chunk_size, n)) for i in range(0, n, chunk_size)]
    return chunks[:2] if few_chunks else chunks


@contextmanager
def two_chunks_only():
    """Inside, losses run over the first two of their chunks, and of a chunk's blocks: wrong values, but the
    bytes of all of them.
    """
    global few_chunks
    few_chunks = True
    try:
        yield
    finally:
        few_chunks = False


class _Gradients:
    """Buffers for the gradients of hidden, weight and bias, filled chunk by chunk from the logits'
    gradient.
    """

    def __init__(self, hidden, weight, bias, needs_grad):
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
        # fp32 even for bf16 weights: a sum over many chunks would lose small addends in bf16
        fp32 = {"dtype": torch.float32, "device": weight.device}
        self.grad_weight = torch.zeros(weight.shape, **fp32) if needs_grad[1] else None
        self.grad_bias = torch.zeros(bias.shape, **fp32) if bias is not None and needs_grad[2] else None

    def add(self, chunk, grad_logits):
        """chunk: slice of tokens; grad_logits (chunk, V) in hidden's dtype."""
        hidden = self.hidden[chunk]
        if self.grad_bias is not None:
            self.grad_bias += grad_logits.sum(0, dtype=torch.float32)
        if self.grad_hidden is not None:
            self.grad_hidden[chunk] = grad_logits @ self.weight.to(hidden.dtype)
        if self.grad_weight is None:
            return
        total = self.grad_weight
        if hidden.dtype == torch.float32:
            total.addmm_(grad_logits.T, hidden)
        elif hidden.is_cuda:  # products in half precision, summed in fp32 by the matrix units themselves
            torch.addmm(total, grad_logits.T, hidden, out_dtype=torch.float32, out=total)
        else:
            for part, columns in zip(total.split(VOCAB_BLOCK), grad_logits.split(VOCAB_BLOCK, dim=1)):
                part += columns.T @ hidden

    def result(self):
        return (
            self.grad_hidden,
            None if self.grad_weight is None else self.grad_weight.to(self.weight.dtype),
            None if self.grad_bias is None else self.grad_bias.to(self.bias.dtype),
        )


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, temperature, chunk_size):
        ctx.save_for_backward(hidden, weight, bias, target_ids)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        for chunk in _chunks(len(hidden), chunk_size):
            logits = _logits(hidden[chunk], weight, bias)
            logps[chunk] = logps_(logits, target_ids[chunk], temperature)
            del logits  # or it would live on while the next chunk's logits are made
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        hidden, weight, bias, target_ids = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        for chunk in _chunks(len(hidden), ctx.chunk_size):
            logits = _logits(hidden[chunk], weight, bias)
            logps_(logits, target_ids[chunk], ctx.temperature, grad_logps[chunk])
            gradients.add(chunk, logits)
            del logits
        return *gradients.result(), None, None, None


class _NllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, weights, temperature, chunk_size, grad_enabled):
        # under no_grad (evaluation) needs_input_grad still says True for a parameter
        needs_grad = [needs and grad_enabled for needs in ctx.needs_input_grad[:3]]
        gradients = _Gradients(hidden, weight, bias, needs_grad)
        total = hidden.new_zeros((), dtype=torch.float32)
        for chunk in _chunks(len(hidden), chunk_size):
            logits = _logits(hidden[chunk], weight, bias)
            factors = -weights[chunk] if any(needs_grad) else None
            total -= weights[chunk] @ logps_(logits, target_ids[chunk], temperature, factors)
            if any(needs_grad):
                gradients.add(chunk, logits)
            del logits  # or it would live on while the next chunk's logits are made
        # plain attributes, not save_for_backward: offloading hooks must not carry these to the host and back
        ctx.gradients = gradients.result()
        return total

    @staticmethod
    def backward(ctx, grad_total):
        if ctx.gradients is None:
            raise RuntimeError(
                "nll_sum's backward runs once: its gradients were made in forward and are given away."
            )
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                # in place: a second V * H buffer would cost as much as the head itself
                gradient.mul_(grad_total)
        return *gradients, None, None, None, None, None


def _logits(hidden, weight, bias):
    """(n, V), as transformers computes them: in hidden's dtype."""
    return linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
