"""Log-probabilities without the [N, V] logits: the head runs over chunks of tokens, and no chunk is kept.

N = 16,384 tokens over V = 151,936 is 9.3 GiB of fp32 logits, and as much again for their gradient; a chunk
of 256 tokens is 0.15 GiB. Results are exact: every chunk sees the whole vocabulary.
"""

from contextlib import contextmanager

import torch

from common import Refusal

VOCAB_BLOCK = 8192  # rows of the weight's gradient made at once where they need a cast: block * H elements


def token_logps(hidden, weight, target_ids, *, bias=None, temperature=1.0, chunk_size=256):
    """log softmax(hidden @ weight.T / temperature + bias / temperature)[target_ids], chunk by chunk.

    The logits are computed again in backward (4 matrix products in all), because their gradient depends on
    what the loss does with the log-probabilities. For a plain sum, `nll_sum` needs 3.

    Args:    hidden (N, H), weight (V, H), bias (V,) or None; target_ids (N,) int64; chunk_size in tokens.
             N = 0 is fine. The products run in hidden's dtype, softmax and sums in fp32.
    Returns: (N,) float32, with gradients for hidden, weight and bias.
    Raises:  ValueError for shapes that do not fit, or a chunk below 1.
    Memory:  chunk_size * V fp32 elements (and as many in hidden's dtype) beyond inputs and gradients.
    """
    _check(hidden, weight, target_ids, chunk_size)
    return _TokenLogps.apply(hidden, weight, bias, target_ids, temperature, chunk_size)


def nll_sum(hidden, weight, target_ids, *, bias=None, chunk_size=256):
    """Sum of negative log-probabilities of target_ids; the gradient is taken in forward (3 products, not 4).

    The sum's gradient in every logit is known up to one factor, so forward can finish each chunk while its
    logits are there, and backward only multiplies by that factor. Hence backward runs once: retain_graph is
    refused.

    Args:    as for `token_logps`.
    Returns: () float32, with gradients for hidden, weight and bias. Divide it by the number of items
             yourself.
    Memory:  chunk_size * V fp32 elements (and as many in hidden's dtype), and from forward to backward the
             gradients themselves: N * H in hidden's dtype and V * H in weight's (fp32 until the last chunk
             is done).
    Source:  the idea of Liger's fused linear cross entropy, arXiv 2410.10989.
    """
    _check(hidden, weight, target_ids, chunk_size)
    return _NllSum.apply(hidden, weight, bias, target_ids, chunk_size, torch.is_grad_enabled())


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


def _check(hidden, weight, target_ids, chunk_size):
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (N, H) and (V, H)."
        )
    if target_ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"target_ids {tuple(target_ids.shape)} must be one per hidden state: ({hidden.shape[0]},)."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; give a number of tokens >= 1.")


def _chunk_logits(hidden, weight, bias, temperature):
    """fp32 logits (chunk, V). The bias is added in fp32."""
    logits = (hidden @ weight.to(hidden.dtype).T).float()
    if bias is not None:
        logits += bias
    return logits if temperature == 1.0 else logits.div_(temperature)


def _exp_(logits):
    """Turn logits (chunk, V) into exp(logits - largest), in their own storage: over their sum, the softmax.

    Returns: that sum; log sum exp(logits). Both (chunk, 1).
    """
    largest = logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    return total, largest + total.log()


class _Gradients:
    """Buffers for the gradients of hidden, weight and bias, filled chunk by chunk from the logits'
    gradient.
    """

    def __init__(self, hidden, weight, bias, needs_grad):
        self.weight = weight
        self.grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
        # fp32 even for bf16 weights: a sum over many chunks would lose small addends in bf16
        fp32 = {"dtype": torch.float32, "device": weight.device}
        self.grad_weight = torch.zeros(weight.shape, **fp32) if needs_grad[1] else None
        self.grad_bias = torch.zeros(bias.shape, **fp32) if bias is not None and needs_grad[2] else None

    def add(self, chunk, hidden, grad_logits):
        """chunk: slice of tokens; hidden (chunk, H); grad_logits (chunk, V) fp32."""
        if self.grad_bias is not None:
            self.grad_bias += grad_logits.sum(0)
        grad_logits = grad_logits.to(hidden.dtype)
        if self.grad_hidden is not None:
            self.grad_hidden[chunk] = grad_logits @ self.weight.to(hidden.dtype)
        if self.grad_weight is None:
            return
        if hidden.dtype == torch.float32:
            self.grad_weight.addmm_(grad_logits.T, hidden)
        else:
            for grad, block in zip(
                self.grad_weight.split(VOCAB_BLOCK), grad_logits.split(VOCAB_BLOCK, dim=1)
            ):
                grad += block.T @ hidden

    def result(self, bias):
        return (
            self.grad_hidden,
            None if self.grad_weight is None else self.grad_weight.to(self.weight.dtype),
            None if self.grad_bias is None else self.grad_bias.to(bias.dtype),
        )


few_chunks = False  # in a dry run: after the second chunk, the others would hold the same bytes again


def _chunks(n, chunk_size):
    chunks = [slice(i, min(i + chunk_size, n)) for i in range(0, n, chunk_size)]
    return chunks[:2] if few_chunks else chunks


@contextmanager
def two_chunks_only():
    """Inside, losses run over their first two chunks: wrong values, but the bytes of all of them."""
    global few_chunks
    few_chunks = True
    try:
        yield
    finally:
        few_chunks = False


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, temperature, chunk_size):
        ctx.save_for_backward(hidden, weight, bias, target_ids)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        for chunk in _chunks(len(hidden), chunk_size):
            logits = _chunk_logits(hidden[chunk], weight, bias, temperature)
            logps[chunk] = logits.gather(1, target_ids[chunk, None])[:, 0]
            logps[chunk] -= _exp_(logits)[1][:, 0]
            del logits  # or it would live on while the next chunk's logits are made
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        hidden, weight, bias, target_ids = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        for chunk in _chunks(len(hidden), ctx.chunk_size):
            logits = _chunk_logits(hidden[chunk], weight, bias, ctx.temperature)
            sum_exp, _ = _exp_(logits)
            # d logp / d logits = onehot(target) - softmax
            factor = grad_logps[chunk, None] / ctx.temperature
            grad_logits = logits.mul_(-factor / sum_exp)
            grad_logits.scatter_add_(1, target_ids[chunk, None], factor)
            gradients.add(chunk, hidden[chunk], grad_logits)
            del logits, grad_logits
        return *gradients.result(bias), None, None, None


class _NllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, chunk_size, grad_enabled):
        # under no_grad (evaluation) needs_input_grad still says True for a parameter
        needs_grad = [needs and grad_enabled for needs in ctx.needs_input_grad[:3]]
        gradients = _Gradients(hidden, weight, bias, needs_grad)
        total = hidden.new_zeros((), dtype=torch.float32)
        for chunk in _chunks(len(hidden), chunk_size):
            logits = _chunk_logits(hidden[chunk], weight, bias, 1.0)
            target = target_ids[chunk, None]
            target_logits = logits.gather(1, target)
            sum_exp, log_z = _exp_(logits)
            total += (log_z - target_logits).sum()
            if any(needs_grad):
                # d nll / d logits = softmax - onehot(target)
                grad_logits = logits.div_(sum_exp).scatter_add_(1, target, torch.full_like(log_z, -1.0))
                gradients.add(chunk, hidden[chunk], grad_logits)
                del grad_logits
            del logits  # or it would live on while the next chunk's logits are made
        # plain attributes, not save_for_backward: offloading hooks must not carry these to the host and back
        ctx.gradients = gradients.result(bias)
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
        return *gradients, None, None, None
