"""Liger's own kernels on the CPU, in Triton's interpreter: test_logps.py runs this file in a process of its
own with TRITON_INTERPRET=1 (its name does not begin with test_).

The interpreter lacks three things that Liger's norms and MLPs need. `interpreter` supplies them; every kernel
remains Liger's own, line for line. Left to a GPU: arithmetic in bf16, compilation, and atomicity.
"""

import importlib
from types import SimpleNamespace

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
import sft_packing
from common import Refusal
from common.collators import IGNORE, add_scored, flatten
from common.exactness import check_exact, logps_alone
from common.logps import at_scored, liger_nll_sum, nll_sum
from common.sharding import check_liger, set_kernels

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


def test_liger_writes_over_logits_where_autograd_cannot_see_it():
    """Why its cross entropy is refused beside offloading, whose copies may run later."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_().tanh()
    before, version = logits.detach().clone(), logits._version
    LigerCrossEntropyLoss()(logits, torch.tensor([0, 3, 1, 2, 2]))
    assert worst(logits.detach(), before) > 0.1 and logits._version == version


# --- Rotary embedding, norms and MLP ---


def nll_and_gradients(model, sequences, head):
    row = add_scored(flatten(sequences))
    nll = at_scored(model, row, lambda hidden, weight, ids, bias: head(hidden, weight, ids, bias=bias))
    (nll / 20).backward()
    return {"loss": nll.detach(), **gradients(model)}


def prove(model, args=LIGER):
    """What the scripts do, on a few tokens: the interpreter takes its time."""
    ids = [each["input_ids"] for each in documents(3, [4, 2])]
    row = add_scored(flatten([{"input_ids": x, "labels": x} for x in ids]))
    model.set_attn_implementation("sdpa")
    expected = logps_alone(model, [(x, len(x) - 1) for x in ids])
    set_kernels(model, args, flat=True)

    def compute():
        logits = at_scored(model, row, lambda hidden, weight, ids, bias: hidden @ weight.T)
        return torch.log_softmax(logits, -1).gather(1, row["score_ids"][:, None])[:, 0]

    return check_exact(
        model, expected, compute, bf16=False, max_length=64, what="in a packed row", remedy="Drop the flag."
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_ligers_kernels_give_plain_losses_and_gradients(family, monkeypatch):
    """The last document scores nothing."""
    from liger_kernel import ops

    calls = {}
    for name in ("LigerRopeFunction", "LigerRMSNormFunction", "LigerSiLUMulFunction", "LigerGELUMulFunction"):
        function, calls[name] = getattr(ops, name), 0

        def forward(ctx, *args, name=name, original=function.forward, **kwargs):
            calls[name] += 1
            return original(ctx, *args, **kwargs)

        monkeypatch.setattr(function, "forward", staticmethod(forward))
    model, other, sequences = tiny_model(family).train(), tiny_model(family), documents(3, [3, 2, 2])
    sequences[2]["labels"] = [IGNORE] * 2
    expected = nll_and_gradients(model, sequences, nll_sum)
    check_liger(model.config.model_type)
    assert prove(model) <= 1e-5 and model.training
    calls.update(dict.fromkeys(calls, 0))
    assert worst(nll_and_gradients(model, sequences, liger_nll_sum), expected) <= 1e-5
    mlp = "LigerGELUMulFunction" if family == "gemma3_text" else "LigerSiLUMulFunction"
    # two in each of two layers, and the last one; Liger 0.8.0 leaves Qwen3's norms of q and k as they are
    assert calls.pop("LigerRMSNormFunction") >= 5
    assert calls == {**dict.fromkeys(calls, 0), "LigerRopeFunction": 2, mlp: 2}
    assert model.state_dict().keys() == other.state_dict().keys()
    assert not any("forward" in vars(module) for module in other.modules())
    # nor is the loss: Liger's default would put its cross entropy into the model's own forward
    assert "forward" not in vars(model)
    assert torch.nn.functional.cross_entropy.__module__ == "torch.nn.functional"


def test_an_activation_that_liger_does_not_compute_is_seen():
    """It would compute silu without a word."""
    with pytest.raises(Refusal, match="LlamaForCausalLM computes something else.*kernels do not fit"):
        prove(tiny_model("llama", hidden_act="relu"))


def test_what_liger_does_not_know_is_refused(monkeypatch):
    import liger_kernel.transformers

    with pytest.raises(Refusal, match="no kernels for model type 'gpt2'.* llama, "):
        check_liger("gpt2")
    monkeypatch.setattr(liger_kernel.transformers, "_apply_liger_kernel_to_instance", lambda model, **_: None)
    with pytest.raises(Refusal, match="replaced nothing in LlamaForCausalLM"):
        prove(tiny_model("llama"))


# --- The script ---


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
    ways = {"plain": {}, "liger": {"use_liger_kernel": True}}
    ways["offloaded"] = {"use_liger_kernel": True, "activation_offloading": True}
    ways["with its loss"] = {"use_liger_kernel": True, "liger_cross_entropy": True}
    done = {way: run(sft_packing, tmp_path / way, flags, **changes) for way, changes in ways.items()}
    assert done["offloaded"].returned["activation_offloading"]["offloaded_bytes"] > 0
    assert_same_curve(done["liger"], done["plain"])
    assert_same_curve(done["with its loss"], done["plain"])
    assert_same_bits(done["offloaded"], done["liger"])
