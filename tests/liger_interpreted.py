"""Liger's own kernels on the CPU, in Triton's interpreter. test_liger.py runs this file in a process of its
own with TRITON_INTERPRET=1, which Triton reads at import; run as part of the other tests it would find no
test (its name does not begin with test_).

The interpreter lacks three things that Liger's norms and MLPs need. `interpreter` supplies them; every kernel
remains Liger's own, line for line.
"""

import importlib
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import FAMILIES, documents, gradients, tiny_model, worst
from safetensors.torch import load_file
from transformers import AutoTokenizer

import common.offload
import dpo_padding_free
import sft_packing
from common.collators import IGNORE, flatten, pad
from common.liger import _runs_liger, apply_liger_kernels, liger_nll_sum
from common.logps import nll_sum


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


# --- The hazard: Liger's cross entropy and an offloading hook that copies late ---


def offloaded(cross_entropy, late):
    """What a hook would have stored of the saved logits, the logits, and their version after the loss."""
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    saved, stored = [], {}

    def pack(tensor):
        # an asynchronous copy may run at once, or only after the kernels that were launched later
        saved.append(tensor)
        if not late:
            stored[len(saved) - 1] = tensor.detach().clone()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = hidden.tanh()  # saves its result for backward
        expected, version = logits.detach().clone(), logits._version
        cross_entropy(logits, torch.tensor([0, 3, 1, 2, 2]))
    found = saved[0].detach().clone() if late else stored[0]
    return found, expected, logits._version - version


def test_a_late_copy_of_liger_logits_holds_gradients():
    from liger_kernel.transformers import LigerCrossEntropyLoss

    found, expected, versions = offloaded(LigerCrossEntropyLoss(), late=True)
    assert worst(found, expected) > 0.1
    assert versions == 0  # so autograd cannot notice
    softmax = F.softmax(expected, 1) - F.one_hot(torch.tensor([0, 3, 1, 2, 2]), 4)
    assert worst(found, softmax / 5) <= 1e-6  # it is the gradient of the mean loss
    found, expected, _ = offloaded(LigerCrossEntropyLoss(), late=False)
    assert torch.equal(found, expected)
    for late in (True, False):
        found, expected, _ = offloaded(F.cross_entropy, late)
        assert torch.equal(found, expected)


# --- The loss head ---


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_liger_nll_sum_is_nll_sum(num_tokens, bias):
    """Factor 0.25: the loop divides by the number of items before backward."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(num_tokens, 8), (40, 8), *([(40,)] if bias else [])]  # V = 5 H: several of Liger's chunks
    leaves = [torch.randn(shape, generator=generator) for shape in shapes]
    targets = torch.randint(0, 40, (num_tokens,), generator=generator)
    results = []
    for function in (liger_nll_sum, nll_sum):
        hidden, weight, *rest = inputs = [x.clone().requires_grad_() for x in leaves]
        loss = function(hidden, weight, targets, bias=rest[0] if rest else None)
        assert loss.dtype == torch.float32 and loss.shape == ()
        (loss * 0.25).backward()
        with torch.no_grad():
            again = function(hidden, weight, targets, bias=rest[0] if rest else None)
        results.append([loss.detach(), again, *(x.grad for x in inputs)])
    for found, expected in zip(*results):
        assert found.isfinite().all() and worst(found, expected) <= 1e-5 if found.numel() else True


def test_half_precision_gradients_are_summed_in_fp32():
    """Over 128 chunks of 4 tokens: a sum in half precision would lose small addends."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(512, 4, generator=generator).half() for _ in range(2))
    hidden += 2  # so that addends have one sign, and the sums grow
    targets = torch.randint(0, 2, (512,), generator=generator)
    results = []
    for function, dtype in ((nll_sum, torch.float32), (nll_sum, torch.half), (liger_nll_sum, torch.half)):
        head = weight.to(dtype, copy=True).requires_grad_()
        function(hidden.to(dtype, copy=True).requires_grad_(), head, targets).backward()
        results.append(head.grad.float())
    exact, ours, ligers = results
    assert (ligers - exact).norm() <= 2 * (ours - exact).norm()


def test_a_frozen_body_is_refused():
    with pytest.raises(ValueError, match="no gradient"):
        liger_nll_sum(torch.randn(3, 4), torch.randn(8, 4).requires_grad_(), torch.zeros(3, dtype=torch.long))


def batch_gradients(model, batches, liger):
    total = 0.0
    for batch in batches:
        nll = sft_packing.batch_nll_sum(model, sft_packing.add_scored(batch), 5, liger)
        (nll / 20).backward()
        total += nll.detach()
    return {"loss": total, **gradients(model)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("join", [flatten, lambda sequences: pad(sequences, 0)])
def test_batches_accumulate_as_without_liger(join, tied):
    """The last batch scores nothing."""
    model = tiny_model("llama", "varlen" if join is flatten else "sdpa", tie_word_embeddings=tied)
    sequences = documents(0, [7, 5, 1, 9, 4])
    sequences[4]["labels"] = [IGNORE] * 4
    batches = [join(sequences[:2]), join(sequences[2:4]), join(sequences[4:])]
    found, expected = (batch_gradients(model, batches, liger) for liger in (True, False))
    assert worst(found, expected) <= 1e-5
    empty = batch_gradients(model, batches[2:], liger=True)
    assert all(torch.count_nonzero(value) == 0 for value in empty.values())


# --- Rotary embedding, norms and MLP ---


def calls_of(monkeypatch):
    """Count the calls of each kernel's autograd function."""
    from liger_kernel import ops

    calls = {}
    for name in ("LigerRopeFunction", "LigerRMSNormFunction", "LigerSiLUMulFunction", "LigerGELUMulFunction"):
        function, calls[name] = getattr(ops, name), 0

        def forward(ctx, *args, name=name, original=function.forward, **kwargs):
            calls[name] += 1
            return original(ctx, *args, **kwargs)

        monkeypatch.setattr(function, "forward", staticmethod(forward))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_models_give_plain_logits_and_gradients(family, monkeypatch):
    batch = flatten(documents(3, [4, 2]))
    model = tiny_model(family)
    expected = batch_gradients(model, [batch], liger=False)
    assert apply_liger_kernels(model, batch["input_ids"]) <= 1e-5
    calls = calls_of(monkeypatch)
    assert worst(batch_gradients(model, [batch], liger=False), expected) <= 1e-5
    mlp = "LigerGELUMulFunction" if family == "gemma3_text" else "LigerSiLUMulFunction"
    # two in each of two layers, and the last one; Liger 0.8.0 leaves Qwen3's norms of q and k as they are
    assert calls.pop("LigerRMSNormFunction") >= 5
    assert calls == {**dict.fromkeys(calls, 0), "LigerRopeFunction": 2, mlp: 2}


def test_another_activation_is_refused():
    """Liger would compute silu without a word."""
    model = tiny_model("llama", hidden_act="relu")
    with pytest.raises(ValueError, match="changes the logits of LlamaForCausalLM"):
        apply_liger_kernels(model, torch.arange(12)[None])


def test_nothing_replaced_is_refused(monkeypatch):
    import liger_kernel.transformers

    monkeypatch.setattr(liger_kernel.transformers, "_apply_liger_kernel_to_instance", lambda model, **_: None)
    with pytest.raises(ValueError, match="replaced nothing in LlamaForCausalLM"):
        apply_liger_kernels(tiny_model("llama"), torch.arange(12)[None])


def test_a_kernel_that_fails_is_told(monkeypatch):
    from liger_kernel.ops import rms_norm

    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: 1 / 0)
    with pytest.raises(ValueError, match="a kernel failed on cpu, InterpreterError"):
        apply_liger_kernels(tiny_model("llama"), torch.arange(12)[None])


def test_the_mode_is_kept_and_other_models_are_not_touched():
    model, other = tiny_model("llama").train(), tiny_model("llama")
    apply_liger_kernels(model, torch.arange(12)[None])
    assert model.training and all(module.training for module in model.modules())
    assert any(map(_runs_liger, model.modules())) and not any(map(_runs_liger, other.modules()))
    assert model.state_dict().keys() == other.state_dict().keys()
    # and neither is the loss: Liger's default would put its cross entropy into the model's own forward
    assert "forward" not in vars(model) and F.cross_entropy.__module__ == "torch.nn.functional"


# --- The script ---


LIGER = ("use_liger_kernel", "liger_cross_entropy")


def run(folder, flags, name):
    args = sft_packing.Arguments(
        model_name_or_path=str(folder / "model"),
        dataset_name=str(folder / "train.jsonl"),
        eval_dataset_name=str(folder / "train.jsonl"),
        output_dir=str(folder / name),
        max_length=8,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=2,
        check_isolation=False,  # two more forwards, which the interpreter takes its time for
        **flags,
    )
    ledger = sft_packing.main(args)["ledger"]
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return ledger, lines, load_file(folder / name / "model.safetensors")


def write_inputs(folder, num_hidden_layers):
    """A model and four texts, small enough for the interpreter."""
    tiny_model("llama", vocab_size=261, num_hidden_layers=num_hidden_layers).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(sft_packing.HERE / "demo/model").save_pretrained(folder / "model")
    texts = ("abc", "de", "fghi", "klm")
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_with_liger_is_a_run_without(sharded, tmp_path, monkeypatch):
    """Sharded: by FSDP2, on one rank and in fp32 (the interpreter cannot multiply in bf16)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_inputs(tmp_path, num_hidden_layers=1)
    calls, losses, called, results = calls_of(monkeypatch), [], [], []
    counted = lambda *args, **options: losses.append(1) or liger_nll_sum(*args, **options)  # noqa: E731
    monkeypatch.setattr(sft_packing, "liger_nll_sum", counted)
    for flags, name in (({}, "plain"), (dict.fromkeys(LIGER, True), "liger")):
        if sharded:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        results.append(run(tmp_path, flags, name))
        called.append((len(losses), sum(calls.values())))
    (_, plain, weights), (ledger, lines, trained) = results
    # 2 rows: both in each of the 2 steps, and evaluated at the end
    assert called[0] == (0, 0) and called[1][0] == 6 and called[1][1] >= 6 * 4
    assert len(lines) == 2 and "eval_loss" in lines[-1]
    for found, expected in zip(lines, plain):
        for metric in {"loss", "grad_norm", "eval_loss"} & expected.keys():
            assert found[metric] == pytest.approx(expected[metric], rel=1e-5)
    assert worst(trained, weights) <= 1e-5
    assert ledger == []  # nothing is measured here, and no prediction made for Liger's kernels


@pytest.mark.parametrize("precompute", [True, False])
def test_preferences_with_ligers_kernels_are_preferences_without(precompute, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_inputs(tmp_path, num_hidden_layers=1)
    pairs = [
        {"prompt": "ab", "chosen": "cd", "rejected": "e"},
        {"prompt": "f", "chosen": "g", "rejected": "hi"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    calls, results = calls_of(monkeypatch), []
    for name in ("plain", "liger"):
        args = dpo_padding_free.Arguments(
            model_name_or_path=str(tmp_path / "model"),
            dataset_name=str(tmp_path / "pairs.jsonl"),
            output_dir=str(tmp_path / name),
            max_length=8,
            max_steps=2,
            learning_rate=1e-2,
            precompute_ref_log_probs=precompute,
            use_liger_kernel=name == "liger",
            check_isolation=False,
        )
        results.append(dpo_padding_free.main(args)["final_metrics"])
        assert (calls["LigerRMSNormFunction"] > 0) == (name == "liger")
    plain, liger = results
    for metric in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
        assert liger[metric] == pytest.approx(plain[metric], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_offloading_beside_ligers_kernels_trains_the_same_weights(
    gradient_checkpointing, tmp_path, monkeypatch
):
    """Liger's MLP writes gradients over what it unpacks: no other user of a host copy may see that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(common.offload, "MIN_BYTES", 1)
    write_inputs(tmp_path, num_hidden_layers=2)
    calls, results = calls_of(monkeypatch), []
    flags = {"use_liger_kernel": True, "gradient_checkpointing": gradient_checkpointing}
    for name in ("plain", "offloaded"):
        offloading = {"activation_offloading": name == "offloaded"}
        results.append(run(tmp_path, {**flags, **offloading}, name))
    (_, plain, weights), (_, lines, trained) = results
    assert calls["LigerSiLUMulFunction"] > 0
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain]
    assert all(torch.equal(trained[name], weights[name]) for name in weights)
    summary = json.loads((tmp_path / "offloaded/summary.json").read_text())
    assert summary["activation_offloading"]["offloaded_bytes"] > 0
