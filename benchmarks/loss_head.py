"""The loss head alone: forward and backward over N hidden states, V tokens of vocabulary, H hidden size.

Nobody can do without three products of 2 N V H operations: logits, and the gradients of hidden states and
weight. They are measured as a way of their own, in turn with the others, and are the unit of the table. Bytes
are those beyond the inputs, both gradients included, by MemTracker on a CPU, by the allocator on CUDA.

python benchmarks/loss_head.py [--device cuda] [--quick]
"""

import itertools
from functools import partial

import torch
from harness import alternate, case, parse, write

from common.logps import liger_nll_sum, nll_sum, token_logps
from common.memory import ByteCounter

# N, V, H: SmolLM2-135M's; on CUDA also Qwen3-0.6B's and Qwen3-1.7B's
SHAPES = {
    "cpu": [(1024, 49152, 576)],
    "cuda": [(8192, 49152, 576), (8192, 151936, 1024), (8192, 151936, 2048)],
}


def three_products(hidden, weight, targets):
    logits = hidden.detach() @ weight.detach().T
    logits @ weight.detach()
    logits.T @ hidden.detach()


def full_logits(hidden, weight, targets, bias=None):
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def trl_fused_head(hidden, weight, targets):
    """What SFTTrainer computes: add_fused_lm_head without the model, with the outputs that SFT asks for."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    outputs = ("log_probs", "entropy", "is_top1")
    settings = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs)
    return -ChunkedLogProbFunction.apply(hidden, weight, None, targets, *settings)[0].sum()


def trl_selective_log_softmax(hidden, weight, targets):
    from trl.trainer.utils import selective_log_softmax

    return -selective_log_softmax((hidden @ weight.T)[None], targets[None]).sum()


WAYS = {
    "three products": three_products,
    "full logits": full_logits,
    "nll_sum": nll_sum,
    "token_logps": lambda hidden, weight, targets: -token_logps(hidden, weight, targets).sum(),
    "TRL fused head": trl_fused_head,
    "TRL selective_log_softmax": trl_selective_log_softmax,
    "Liger": liger_nll_sum,
}


def run(way, inputs):
    """Forward and backward; returns the mean loss. The gradients are left in the inputs."""
    for tensor in inputs:
        tensor.grad = None
    loss = way(*inputs)
    if loss is None:
        return {}
    loss.backward()
    return {"loss": loss.item() / len(inputs[2])}


def count_bytes(way, inputs, device):
    """Peak bytes beyond the inputs."""
    for tensor in inputs:
        tensor.grad = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(way, inputs)
        return torch.cuda.max_memory_allocated() - before
    tracker, cpu = ByteCounter(), torch.device("cpu")
    tracker.track_external(*inputs)
    with tracker:
        before = tracker.peak_bytes(cpu)
        run(way, inputs)
    return tracker.peak_bytes(cpu) - before


def compare(shape, dtype, options):
    n, vocabulary, size = shape
    generator = torch.Generator(options.device).manual_seed(0)
    draw = {"generator": generator, "device": options.device, "dtype": dtype}
    hidden = torch.randn(n, size, **draw).requires_grad_()
    weight = (torch.randn(vocabulary, size, **draw) / size**0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (n,), generator=generator, device=options.device)
    inputs = (hidden, weight, targets)
    # Triton's interpreter, on a CPU, shows nothing about time
    ways = {name: way for name, way in WAYS.items() if name != "Liger" or options.device == "cuda"}
    once = {name: {"peak_bytes": count_bytes(way, inputs, options.device)} for name, way in ways.items()}
    timed = {name: partial(run, way, inputs) for name, way in ways.items()}
    runs = alternate(timed, options.repeats, options.device, options.warm_up)
    name = str(dtype).removeprefix("torch.")
    setup = {"N": n, "V": vocabulary, "H": size, "dtype": name}
    # without a GPU, TRL's head folds its tiles in PyTorch
    setup["TRL fused head"] = "Triton kernels" if options.device == "cuda" else "its PyTorch version"
    return case(f"{name}, N {n:,}, V {vocabulary:,}, H {size:,}", setup, runs, once)


def main():
    options = parse(__doc__)
    shapes = [(256, 512, 64)] if options.quick else SHAPES[options.device]
    dtypes = (torch.float32, torch.bfloat16)
    cases = [compare(shape, dtype, options) for shape, dtype in itertools.product(shapes, dtypes)]
    write("loss_head", options, None, cases, reads=())


if __name__ == "__main__":
    main()
