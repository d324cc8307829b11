"""The loss head alone: forward and backward over N hidden states, V tokens of vocabulary, H hidden size.

Nobody can do without three products of 2 N V H operations: logits, and the gradients of hidden states and
weight. They are measured as a way of their own, in turn with the others, and are the unit of the table. Bytes are those
beyond the inputs, both gradients included, by MemTracker on a CPU, by the allocator on CUDA. Gradients are compared with those of full logits in fp32.

python benchmarks/loss_head.py [--device cuda] [--quick]
"""

import itertools
from functools import partial

import torch
from harness import MIB, alternate, case, parse, ratio, write

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
    """Peak bytes beyond the inputs, and the weight's gradient (None for the three products)."""
    for tensor in inputs:
        tensor.grad = None
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(way, inputs)
        return torch.cuda.max_memory_allocated() - before, inputs[1].grad
    tracker = ByteCounter()
    tracker.track_external(*inputs)
    with tracker:
        before = tracker.peak_bytes(torch.device("cpu"))
        run(way, inputs)
    return tracker.peak_bytes(torch.device("cpu")) - before, inputs[1].grad


def compare(shape, dtype, options):
    n, vocabulary, size = shape
    generator = torch.Generator(options.device).manual_seed(0)
    draw = {"generator": generator, "device": options.device, "dtype": dtype}
    hidden = torch.randn(n, size, **draw).requires_grad_()
    weight = (torch.randn(vocabulary, size, **draw) / size**0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (n,), generator=generator, device=options.device)
    inputs = (hidden, weight, targets)
    exact = weight.detach().float().requires_grad_()
    run(full_logits, (hidden.detach().float(), exact, targets))
    once, timed = {}, {}
    for name, way in WAYS.items():
        if name == "Liger" and options.device == "cpu":
            continue  # Triton's interpreter shows nothing about time
        peak, gradient = count_bytes(way, inputs, options.device)
        once[name] = {"peak_bytes": peak}
        if gradient is not None:
            worst = (gradient.float() - exact.grad).abs().max() / exact.grad.abs().max()
            once[name]["gradient_difference"] = worst.item()
        timed[name] = partial(run, way, inputs)
    name = str(dtype).removeprefix("torch.")
    setup = {"N": n, "V": vocabulary, "H": size, "dtype": name, "chunk_size": 256}
    # without a GPU, TRL's head folds its tiles in PyTorch
    setup["TRL fused head"] = "Triton kernels" if options.device == "cuda" else "its PyTorch version"
    runs = alternate(timed, options.repeats, options.device, options.warm_up)
    found = case(f"{name}, N {n:,}, V {vocabulary:,}, H {size:,}", setup, runs, once)
    found["ratios"] = {way: ratio(found, "nll_sum", way) for way in timed if way != "nll_sum"}
    return found


def show(found):
    print(f"{found['case']:<44}x three products    seconds  peak MiB      loss  gradient's difference")
    for way, values in found["ways"].items():
        median = values["median"]
        units = 1 / ratio(found, way, "three products")["median"]
        losses = ""
        if "loss" in median:
            losses = f"{median['loss']:10.6f}{values['gradient_difference']:12.1e}"
        peak = values["peak_bytes"] / MIB
        print(f"  {way:<42}{units:16.2f}{median['seconds']:11.4f}{peak:10.1f}{losses}", flush=True)


def main():
    options = parse(__doc__)
    shapes = [(256, 512, 64)] if options.quick else SHAPES[options.device]
    cases = []
    for shape, dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        cases.append(compare(shape, dtype, options))
        show(cases[-1])
        write("loss_head", options, None, cases, reads=(), complete=False)
    write("loss_head", options, None, cases, reads=())


if __name__ == "__main__":
    main()
