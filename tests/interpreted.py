"""Kernels on the CPU, ours and Liger's, in Triton's interpreter: test_logps.py runs this file in a process of
its own with TRITON_INTERPRET=1 (its name does not begin with test_).

The interpreter lacks three things that Liger's norms and MLPs need. `interpreter` supplies them; every kernel
remains as it is, line for line. Left to a GPU: arithmetic in bf16, compilation, and atomicity.
"""

import importlib
from collections import Counter
from types import SimpleNamespace

import liger_kernel.ops
import liger_kernel.transformers
import numpy as np
import pytest
import torch
from helpers import (
    FAMILIES,
    assert_same_bits,
    assert_same_curve,
    documents,
    gradients,
    run,
    tiny_model,
    worst,
    write_jsonl,
    write_model,
)

import common.offload
import grpo_zero3
import sft_packing
from common import Refusal, logps
from common.collators import IGNORE, add_scored, flatten
from common.exactness import check_exact, logps_alone
from common.logps import at_scored, liger_nll_sum, nll_sum, token_logps
from common.sharding import check_liger, set_kernels, set_liger_kernels

LIGER = SimpleNamespace(attn_implementation="varlen", use_liger_kernel=True)


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm
    from triton.runtime import interpreter

    # The compiler hands a float to the kernel as an fp32 scalar; the interpreter leaves a Python float.
    convert = interpreter._implicit_cvt

    def convert_floats_too(arg):
        if not isinstance(arg, float):
            return convert(arg)
        handle = interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = convert_floats_too

    # CUDA's libdevice functions return None in the interpreter.
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)
    geglu.tanh = lambda x: 2 / (1 + tl.exp(-2 * x)) - 1

    # Triton 3.6 turns arrays of one element into integers in a way that numpy 2.4 refuses.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_index_too(tensor, *scope):
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_index_too


@pytest.fixture(autouse=True)
def families_as_they_were():
    """Liger also replaces functions and classes of a family's module: put them back."""
    names = {family.removesuffix("_text") for family in FAMILIES}
    modules = [importlib.import_module(f"transformers.models.{x}.modeling_{x}") for x in names]
    before = [dict(vars(module)) for module in modules]
    yield
    for module, attributes in zip(modules, before):
        vars(module).update(attributes)


# --- The loss head ---


@pytest.mark.parametrize("dtype, size", [(torch.float32, 40), (torch.float32, 9001), (torch.bfloat16, 101)])
def test_our_kernel_computes_what_pytorchs_operations_do(dtype, size, monkeypatch):
    """Over 9,001 columns it takes two blocks, the second one nearly empty."""
    generator = torch.Generator().manual_seed(0)
    wider = 9 * torch.randn(6, size + 3, generator=generator).to(dtype)
    wider[:, 2] = -torch.inf  # a token that is ruled out
    wider[0, 9 : 9 + 8192] = -torch.inf
    wider[0, :9] = -torch.inf if size > 9000 else 0.5  # of a row a whole block
    every_second = torch.tensor(
        [size - 2 if size > 9000 else 0, 0, size - 1, 0, 1, 0, 5, 0, size // 2, 0, 3, 0]
    )
    logits, targets = wider[:, :size], every_second[::2]
    factors, results = torch.linspace(-1, 1, 6), []
    assert logps._kernel_runs(False)
    for runs in (True, False):
        monkeypatch.setattr(logps, "_kernel_runs", lambda is_cuda, runs=runs: runs)
        gradient = logits.clone()
        alone = logps.logps_(logits.clone(), targets, 0.7)
        found = logps.logps_(gradient, targets, 0.7, factors)
        assert torch.equal(alone, found) and gradient.dtype == dtype
        results.append((found, gradient.float()))
    # the interpreter cuts off what does not fit into bf16, instead of rounding it
    (logps_found, found), (logps_expected, expected) = results
    assert worst(logps_found, logps_expected) <= 1e-6 * logps_expected.abs().max()
    assert found.isfinite().all() and worst(found, expected) <= (2e-6 if dtype == torch.float32 else 1e-2)
    # rows of a wider buffer: what lies between them stays
    monkeypatch.setattr(logps, "_kernel_runs", lambda is_cuda: True)
    row = wider.clone()
    logps.logps_(row[:, :size], targets, 0.7, factors)
    assert torch.equal(row[:, :size].float(), found) and torch.equal(row[:, size:], wider[:, size:])


@pytest.mark.parametrize("num_tokens, bias", [(0, True), (1, False), (13, True)])
def test_liger_nll_sum_is_nll_sum(num_tokens, bias):
    """Factor 0.25: the loop divides by the number of items before backward."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(num_tokens, 8), (40, 8), *([(40,)] if bias else [])]  # V = 5 H: several of Liger's chunks
    leaves = [torch.randn(shape, generator=generator) for shape in shapes]
    targets = torch.randint(0, 40, (num_tokens,), generator=generator)
    results = []
    for function in (liger_nll_sum, nll_sum):
        hidden, weight, *rest = parts = [x.clone().requires_grad_() for x in leaves]
        loss = function(hidden, weight, targets, bias=rest[0] if rest else None)
        assert loss.dtype == torch.float32 and loss.shape == ()
        (loss * 0.25).backward()
        with torch.no_grad():
            again = function(hidden, weight, targets, bias=rest[0] if rest else None)
        results.append([loss.detach(), again, *(x.grad for x in parts)])
    for found, expected in zip(*results):
        assert found.isfinite().all() and (found.numel() == 0 or worst(found, expected) <= 1e-5)


def test_half_precision_gradients_are_summed_in_fp32():
    """Over 64 chunks of 4 tokens: a sum in half precision would lose small addends."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(256, 4, generator=generator).half() for _ in range(2))
    hidden += 2  # so that addends have one sign, and the sums grow
    targets = torch.randint(0, 2, (256,), generator=generator)
    results = []
    for function, dtype in ((nll_sum, torch.float32), (nll_sum, torch.half), (liger_nll_sum, torch.half)):
        head = weight.to(dtype, copy=True).requires_grad_()
        function(hidden.to(dtype, copy=True).requires_grad_(), head, targets).backward()
        results.append(head.grad.float())
    exact, ours, ligers = results
    assert (ligers - exact).norm() <= 2 * (ours - exact).norm()


def test_a_frozen_body_is_refused():
    with pytest.raises(Refusal, match="no gradient"):
        liger_nll_sum(torch.randn(3, 4), torch.randn(8, 4).requires_grad_(), torch.zeros(3, dtype=torch.long))


# --- Rotary embedding, norms and MLP ---


def score(model, row, function):
    return at_scored(model, row, lambda hidden, weight, ids, bias: function(hidden, weight, ids, bias=bias))


def nll_and_gradients(model, sequences, head):
    nll = score(model, add_scored(flatten(sequences)), head)
    (nll / 20).backward()
    return {"loss": nll.detach(), **gradients(model)}


def prove(model):
    """What the scripts do, on a few tokens: the interpreter takes its time."""
    ids = [each["input_ids"] for each in documents(3, [4, 2])]
    row = add_scored(flatten([{"input_ids": x, "labels": x} for x in ids]))
    model.set_attn_implementation("sdpa")
    expected = logps_alone(model, [(x, len(x) - 1) for x in ids])
    set_kernels(model, LIGER, flat=True)

    options = {"bf16": False, "max_length": 64, "what": "in a packed row", "remedy": "Drop the flag."}
    return check_exact(model, expected, lambda: score(model, row, token_logps), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_ligers_kernels_give_plain_losses_and_gradients(family, monkeypatch):
    """The last document scores nothing."""
    calls = Counter()
    for name in ("LigerRopeFunction", "LigerRMSNormFunction", "LigerSiLUMulFunction", "LigerGELUMulFunction"):
        function = getattr(liger_kernel.ops, name)

        def forward(ctx, *args, name=name, original=function.forward, **kwargs):
            calls[name] += 1
            return original(ctx, *args, **kwargs)

        monkeypatch.setattr(function, "forward", staticmethod(forward))
    model, other, sequences = tiny_model(family).train(), tiny_model(family), documents(3, [3, 2, 2])
    sequences[2]["labels"] = [IGNORE] * 2
    expected = nll_and_gradients(model, sequences, nll_sum)
    check_liger(model.config.model_type)
    assert prove(model) <= 1e-5 and model.training
    calls.clear()
    assert worst(nll_and_gradients(model, sequences, liger_nll_sum), expected) <= 1e-5
    mlp = "LigerGELUMulFunction" if family == "gemma3_text" else "LigerSiLUMulFunction"
    # two in each of two layers, and the last one; Liger 0.8.0 leaves Qwen3's norms of q and k as they are
    assert calls.pop("LigerRMSNormFunction") >= 5
    assert calls == {"LigerRopeFunction": 2, mlp: 2}
    assert model.state_dict().keys() == other.state_dict().keys()
    # neither another model is changed, nor the loss: Liger's default puts its own into the model's forward
    assert not any("forward" in vars(module) for module in (*other.modules(), model))
    assert torch.nn.functional.cross_entropy.__module__ == "torch.nn.functional"


def test_an_activation_that_liger_does_not_compute_is_seen():
    """It would compute silu without a word."""
    with pytest.raises(Refusal, match="LlamaForCausalLM computes something else.*kernels do not fit"):
        prove(tiny_model("llama", hidden_act="relu"))


def test_what_liger_does_not_know_is_refused(monkeypatch):
    with pytest.raises(Refusal, match="no kernels for model type 'gpt2'.* llama, "):
        check_liger("gpt2")
    monkeypatch.setattr(liger_kernel.transformers, "_apply_liger_kernel_to_instance", lambda model, **_: None)
    with pytest.raises(Refusal, match="replaced nothing in LlamaForCausalLM"):
        prove(tiny_model("llama"))


# --- The scripts ---


def test_runs_with_liger_are_runs_without(tmp_path, monkeypatch):
    """Of the offloaded one, to the last bit: Liger's MLP writes gradients over what it unpacks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(common.offload, "MIN_BYTES", 1)
    rows = [{"text": text} for text in ("ab", "c", "d", "ef")]
    flags = {
        "model_name_or_path": write_model(tmp_path / "model"),
        "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows),
        "max_length": 5,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "gradient_checkpointing": False,
        "check_exact": False,
    }
    plain = run(sft_packing, tmp_path / "plain", flags)
    flags["use_liger_kernel"] = True
    liger = run(sft_packing, tmp_path / "liger", flags)
    assert_same_curve(liger, plain)
    offloaded = run(sft_packing, tmp_path / "offloaded", flags, activation_offloading=True)
    assert_same_bits(offloaded, liger)
    assert offloaded.returned["activation_offloading"]["offloaded_bytes"] > 0
    assert_same_curve(run(sft_packing, tmp_path / "with its loss", flags, liger_cross_entropy=True), plain)


def test_grpo_with_liger_is_grpo_without(tmp_path, monkeypatch):
    """Rollout, reference and update; the proof at start-up compares them with plain transformers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = {
        "model_name_or_path": write_model(tmp_path / "model"),
        "dataset_name": write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "ab"}]),
        "reward_funcs": "grpo_cases:spread",
        "num_generations": 2,
        "max_prompt_length": 8,
        "per_device_train_batch_size": 2,
        "max_completion_length": 2,
        "max_steps": 2,
        "beta": 0.1,
        "learning_rate": 1e-3,
    }
    plain, replaced = run(grpo_zero3, tmp_path / "plain", flags), []
    monkeypatch.setattr(
        grpo_zero3, "set_liger_kernels", lambda model: replaced.append(set_liger_kernels(model))
    )
    assert_same_curve(run(grpo_zero3, tmp_path / "liger", flags, use_liger_kernel=True), plain)
    assert len(replaced) == 2  # the policy's and the reference's
