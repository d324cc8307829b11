"""Chunked log-probabilities: what the full [N, V] logits give, in a fraction of their bytes."""

import functools
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, documents, gradients, inputs, tiny_model, worst
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from common import logps
from common.collators import add_scored, pad
from common.logps import at_scored, head_computes, liger_nll_sum, nll_sum, token_logps

N, H, V = 23, 16, 101
TOLERANCE = 1e-5


def make(n=N, bias=True, hidden_dtype=torch.float32, weight_dtype=torch.float32, seed=0):
    """Leaves hidden, weight, bias and the target ids; token 0 and the last token among them."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, H, generator=g).to(hidden_dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=g) / 2).to(weight_dtype).requires_grad_()
    bias = torch.randn(V, generator=g).to(weight_dtype).requires_grad_() if bias else None
    targets = torch.randint(0, V, (n,), generator=g)
    targets[:2] = torch.tensor([0, V - 1])[:n]
    return hidden, weight, bias, targets


def naive_logps(hidden, weight, bias, targets, temperature=1.0):
    bias = None if bias is None else bias.to(hidden.dtype)
    logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias).float()
    return torch.log_softmax(logits / temperature, -1).gather(1, targets[:, None])[:, 0]


def compare(found, expected, leaves, weights):
    """Worst difference of the values, and of the gradients of weights @ values."""
    leaves = [leaf for leaf in leaves if leaf is not None]
    expected_grads = torch.autograd.grad(expected @ weights, leaves)
    found_grads = torch.autograd.grad(found @ weights, leaves)
    for leaf, grad in zip(leaves, found_grads):
        assert grad.dtype == leaf.dtype
    return max(worst(a, b) for a, b in zip((found, *found_grads), (expected, *expected_grads)))


# --- Equality with full logits ---


@pytest.mark.parametrize(
    "chunk_size, bias, temperature", [(1, True, 1.0), (7, False, 0.7), (23, True, 3.0), (256, False, 1.0)]
)
def test_values_and_gradients_are_those_of_full_logits(chunk_size, bias, temperature):
    hidden, weight, bias, targets = leaves = make(bias=bias)
    before = [leaf.detach().clone() for leaf in leaves if leaf is not None]
    options = {"bias": bias, "chunk_size": chunk_size}
    found = token_logps(hidden, weight, targets, temperature=temperature, **options)
    assert found.shape == (N,) and found.dtype == torch.float32
    expected = naive_logps(hidden, weight, bias, targets, temperature)
    # each token weighs differently, and both signs occur, as with advantages
    assert compare(found, expected, leaves[:3], torch.linspace(-1, 1, N)) <= TOLERANCE
    # the mean, as a caller takes it: backward meets a factor other than 1
    for weights in (None, torch.linspace(-1, 1, N)):
        options |= {"weights": weights, "temperature": temperature}
        found = nll_sum(hidden, weight, targets, **options)[None] / N
        assert found.shape == (1,) and found.dtype == torch.float32
        expected = naive_logps(hidden, weight, bias, targets, temperature)
        expected = -(expected if weights is None else expected * weights).sum()[None] / N
        assert compare(found, expected, leaves[:3], torch.ones(1)) <= TOLERANCE
    assert all(map(torch.equal, before, (leaf for leaf in leaves if leaf is not None)))


def test_no_tokens():
    hidden, weight, bias, targets = make(n=0)
    found = token_logps(hidden, weight, targets, bias=bias)
    total = nll_sum(hidden, weight, targets, bias=bias)
    assert found.shape == (0,) and total == 0
    for value in (found.sum(), total):
        assert not any(gradient.any() for gradient in torch.autograd.grad(value, (hidden, weight, bias)))


def test_logits_beyond_the_range_of_exp_stay_exact():
    hidden, weight, bias, targets = make()
    with torch.no_grad():
        hidden *= 1000
        bias[5] = -torch.inf  # a token that is ruled out
        targets[targets == 5] = 6
    found = token_logps(hidden, weight, targets, bias=bias)
    expected = naive_logps(hidden, weight, bias, targets)
    assert torch.isfinite(found).all() and found.min() < -1000
    torch.testing.assert_close(found, expected)
    total = nll_sum(hidden, weight, targets, bias=bias)
    torch.testing.assert_close(total, -expected.sum())
    assert all(x.isfinite().all() for x in torch.autograd.grad(total, (hidden, weight, bias)))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", ["token_logps", "nll_sum"])
def test_bf16_is_as_close_to_fp32_as_the_naive_path(weight_dtype, function):
    hidden, weight, bias, targets = make(200, hidden_dtype=torch.bfloat16, weight_dtype=weight_dtype)
    leaves = hidden, weight, bias
    if function == "token_logps":
        found = token_logps(hidden, weight, targets, bias=bias, chunk_size=16).sum()
    else:
        found = -nll_sum(hidden, weight, targets, bias=bias, chunk_size=16)
    naive = naive_logps(*leaves, targets).sum()
    exact_leaves = [leaf.detach().float().requires_grad_() for leaf in leaves]
    exact = naive_logps(*exact_leaves, targets).sum()
    assert abs(found - exact) <= abs(naive - exact) + 1e-6 * abs(exact)
    gradients_of = [torch.autograd.grad(found, leaves), torch.autograd.grad(naive, leaves)]
    for ours, naives, exacts in zip(*gradients_of, torch.autograd.grad(exact, exact_leaves)):
        # the weight's gradient: bf16 rounds each chunk's product here, and their sum if the weight is bf16
        assert (ours - exacts).norm() <= 1.25 * (naives - exacts).norm()


# --- A mutation: the equality above sees it ---


def test_a_wrong_normaliser_is_seen(monkeypatch):
    def without_a_token(logits, *args):
        return real(logits[:, 1:], *args)

    hidden, weight, bias, targets = make()
    targets = targets.clamp(max=V - 2)  # of the others
    expected = naive_logps(hidden, weight, bias, targets + 1)
    real = logps.logps_
    monkeypatch.setattr(logps, "logps_", without_a_token)
    found = token_logps(hidden, weight, targets, bias=bias)
    assert compare(found, expected, (hidden, weight, bias), torch.ones(N)) > 100 * TOLERANCE
    assert abs(nll_sum(hidden, weight, targets, bias=bias) + expected.sum()) > 100 * TOLERANCE


# --- Autograd ---


def test_a_second_backward_is_the_same_or_refused():
    hidden, weight, bias, targets = make()
    total = nll_sum(hidden, weight, targets, bias=bias)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        total.backward()
    total = token_logps(hidden, weight, targets, bias=bias).sum()
    first, second = (torch.autograd.grad(total, (hidden, weight, bias), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_only_what_needs_a_gradient_gets_one(monkeypatch):
    made = []
    real = logps._Gradients.__init__

    def spy(self, *args):
        real(self, *args)
        made.append([x is not None for x in (self.grad_hidden, self.grad_weight, self.grad_bias)])

    monkeypatch.setattr(logps._Gradients, "__init__", spy)
    hidden, weight, bias, targets = make()
    expected = -naive_logps(hidden, weight, bias, targets).sum()
    with torch.no_grad():
        total = nll_sum(hidden, weight, targets, bias=bias)
    assert not total.requires_grad and abs(total - expected) <= 1e-3
    assert made == [[False, False, False]]
    nll_sum(hidden, weight.detach(), targets, bias=bias.detach()).backward()
    assert made[1:] == [[True, False, False]]
    assert worst(hidden.grad, torch.autograd.grad(expected, hidden)[0]) <= TOLERANCE
    token_logps(hidden.detach(), weight, targets).sum().backward()
    assert made[2:] == [[False, True, False]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(1, N, H)}, "hidden"),
        ({"weight": torch.zeros(V, H + 1)}, "weight"),
        ({"target_ids": torch.zeros(N + 1, dtype=torch.int64)}, "target_ids"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    hidden, weight, _, targets = make()
    for function in (token_logps, nll_sum):
        with pytest.raises(ValueError, match=message):
            function(**{"hidden": hidden, "weight": weight, "target_ids": targets, **change})


@pytest.mark.parametrize("weights", [torch.ones(N + 1), torch.ones(N, 1), torch.ones(N, requires_grad=True)])
def test_refuses_weights_that_do_not_fit(weights):
    hidden, weight, _, targets = make()
    with pytest.raises(ValueError, match="must be one per target, without a gradient"):
        nll_sum(hidden, weight, targets, weights=weights)


# --- Memory ---


def extra_peak(function, *leaves):
    """Bytes that forward and backward hold at most, beyond the leaves."""
    tracker = MemTracker()
    tracker.track_external(*leaves)
    with tracker:
        function().backward()
    peak = tracker.get_tracker_snapshot("peak")[leaves[0].device]["Total"]
    return peak - sum(x.numel() * x.element_size() for x in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [token_logps, nll_sum])
def test_peak_is_one_chunk_and_the_gradients(function, dtype, monkeypatch):
    n, h, v, chunk_size = 1024, 16, 4096, 64
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, v, (n,), generator=g)
    leaves = hidden, weight, targets

    # as small beside these logits as it is beside real ones
    monkeypatch.setattr(logps, "BLOCK_ELEMENTS", 2**17)
    naive = extra_peak(lambda: naive_logps(hidden, weight, None, targets).sum(), *leaves)
    hidden.grad = weight.grad = None
    ours = extra_peak(lambda: function(hidden, weight, targets, chunk_size=chunk_size).sum(), *leaves)
    size = hidden.element_size()
    # the logits, and in bf16 the block of them that is fp32
    chunk = chunk_size * v * size + (0 if dtype == torch.float32 else 2**17 * 4)
    # the weight's gradient is summed in fp32, and for bf16 cast once at the end
    gradients_bytes = n * h * size + v * h * (4 if dtype == torch.float32 else 6)
    assert naive >= 2 * n * v * 4
    assert ours <= 1.1 * (chunk + gradients_bytes)
    assert ours <= naive / 20


@pytest.mark.parametrize("pretended, expected", [(False, 128), (True, 1024)])
def test_a_chunk_is_as_large_as_its_device_wants(pretended, expected):
    """151,936 tokens in bf16 are 297 KiB a row of logits: 165 are 48 MiB, and 1,104 are 320 MiB."""
    with FakeTensorMode() if pretended else torch.device("meta"):
        hidden, weight = (torch.empty(size, 8, dtype=torch.bfloat16) for size in (5, 151_936))
        targets = torch.zeros(5, dtype=torch.int64)
    if not pretended:
        hidden = torch.empty(5, 8, dtype=torch.bfloat16)
    assert logps._check(hidden, weight, targets, None) == expected
    assert logps._check(hidden, weight, targets, 7) == 7


def test_without_triton_it_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(logps, "triton", None)
    runs = functools.cache(logps._kernel_runs.__wrapped__)
    assert not runs(True) and not runs(True) and not runs(False)
    assert capsys.readouterr().out.count("Triton is not installed") == 1


# --- In a model ---


@pytest.mark.parametrize(
    "family, tied, function",
    [("llama", False, nll_sum), ("gemma3_text", True, token_logps), ("phi", False, token_logps)]
    + [("phi", True, nll_sum)],  # phi's head has a bias
)
def test_a_model_scores_its_tokens_without_logits(family, tied, function):
    """The head alone sees what is scored; the batch's other keys do not reach the model."""
    batch = add_scored(pad(documents(0, [9, 5, 1]), 0))
    index, ids, seen = batch["score_index"], batch["score_ids"], []

    def compute(hidden, weight, target_ids, bias):
        seen.append(hidden.shape[0])
        found = function(hidden, weight, target_ids, bias=bias, chunk_size=5)
        return found if function is nll_sum else -found.sum()

    model = tiny_model(family, "sdpa", tie_word_embeddings=tied)
    logits = model(**inputs(batch), use_cache=False).logits.flatten(0, 1)[index]
    expected = torch.nn.functional.cross_entropy(logits, ids)
    expected.backward()
    expected_gradients = gradients(model)
    loss = at_scored(model, batch, compute) / len(ids)
    loss.backward()
    assert abs(loss - expected) <= TOLERANCE and seen == [12]
    found = gradients(model)
    assert ("lm_head.weight" in found) == (not tied)
    assert worst(found, expected_gradients) <= TOLERANCE


def test_head_computes_restores_the_head():
    model, batch = tiny_model("llama", "sdpa"), pad(documents(0, [5]), 0)
    before = model(**inputs(batch)).logits
    with head_computes(model, lambda hidden, weight, bias: torch.zeros(())):
        assert model(**inputs(batch)).logits.shape == ()
        with head_computes(model, lambda hidden, weight, bias: torch.zeros(2)):
            assert model(**inputs(batch)).logits.shape == (2,)
        assert model(**inputs(batch)).logits.shape == ()
    assert torch.equal(model(**inputs(batch)).logits, before)
    with pytest.raises(KeyError), head_computes(model, lambda hidden, weight, bias: {}["missing"]):
        model(**inputs(batch))
    assert torch.equal(model(**inputs(batch)).logits, before)
    assert "forward" not in vars(model.get_output_embeddings())


# --- Kernels, in Triton's interpreter (interpreted.py) ---


def test_in_the_interpreter():
    """Its tests run in a process in which Triton interprets: it looks when it is imported."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:logging",
    ]
    done = subprocess.run(
        [*command, "tests/interpreted.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert re.search(r"^\d+ passed(, \d+ warnings)? in", done.stdout, re.M), done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [token_logps, nll_sum])
def test_the_loss_head_on_cuda(function, dtype):
    """Of 20,001 tokens the kernel takes three blocks; 300 are no whole chunks."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(size, 64, generator=generator).to(dtype) for size in (300, 20_001))
    targets, results = torch.randint(0, 20_001, (300,), generator=generator), []
    for device in ("cuda", "cpu"):
        leaves = [x.to(device, copy=True).requires_grad_() for x in (hidden, weight / 8)]
        total = function(*leaves, targets.to(device), temperature=0.7, chunk_size=128).sum()
        (total / 300).backward()
        results.append([total.detach().cpu(), *(x.grad.cpu() for x in leaves)])
    for found, expected in zip(*results):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert worst(found, expected) <= tolerance * expected.abs().max().item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ligers_loss_head_on_cuda(dtype):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(size, 64, generator=generator).to("cuda", dtype) for size in (300, 1000))
    targets = torch.randint(0, 1000, (300,), generator=generator).cuda()
    results = []
    for function in (liger_nll_sum, nll_sum):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = function(*leaves, targets)
        (loss / 300).backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for found, expected in zip(*results):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert worst(found, expected) <= tolerance * max(expected.abs().max().item(), 1)
