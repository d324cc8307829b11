"""Liger's kernels: refusals here, the kernels themselves in Triton's interpreter (liger_interpreted.py) and,
marked gpu, on CUDA.

Of Liger 0.8.5 the interpreter runs the cross entropies and the rotary embedding as they are. The norms and
gated MLPs want three things that it lacks (floats as fp32 scalars, libdevice's rsqrt and tanh);
liger_interpreted.py supplies those. Left to a GPU: arithmetic in bf16, compilation, and atomicity.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import documents, gradients, inputs, tiny_model, worst
from liger_interpreted import families_as_they_were  # noqa: F401 (a fixture: no patch outlives its test)
from transformers import AutoTokenizer

import sft_packing
from common.collators import flatten
from common.liger import apply_liger_kernels, check_liger, liger_nll_sum
from common.logps import nll_sum
from sft_packing import Arguments, check_arguments, main

ROOT = Path(__file__).parents[1]
INTERPRETED = ROOT / "tests/liger_interpreted.py"


# --- In the interpreter ---


@pytest.fixture(scope="module")
def report():
    """What pytest says of liger_interpreted.py, in a process where Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(INTERPRETED)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", re.findall(r"^def (test_\w+)", INTERPRETED.read_text(), re.M))
def test_in_the_interpreter(name, report):
    outcomes = re.findall(rf"^([A-Z]+) tests/liger_interpreted\.py::{name}(?:\[| |$)", report, re.M)
    assert outcomes and set(outcomes) == {"PASSED"}, report


# --- Refusals ---


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("module", ["triton", "liger_kernel", "liger_kernel.transformers.monkey_patch"])
def test_a_missing_package_is_named(module, monkeypatch):
    for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
    with pytest.raises(ValueError, match=f"here: .*{module}.* Install requirements.txt"):
        check_liger()


def test_a_machine_without_a_gpu_is_refused(no_gpu):
    with pytest.raises(ValueError, match="needs a GPU, and torch sees none"):
        check_liger()


def test_an_unknown_model_type_is_refused(no_gpu, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_liger()
    check_liger("qwen3")
    with pytest.raises(ValueError, match="no kernels for model type 'gpt2'.* llama, "):
        check_liger("gpt2")
    with pytest.raises(ValueError, match="no kernels for model type 'gpt2'"):
        apply_liger_kernels(tiny_model("gpt2"), torch.arange(4)[None])


@pytest.mark.parametrize("flag", ["use_liger_kernel", "liger_cross_entropy"])
def test_the_script_refuses_before_it_touches_anything(flag, no_gpu, tmp_path):
    """Before the data, too: its path is wrong, and that is not what the error is about."""
    flags = {flag: True, "dataset_name": "none.jsonl", "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="needs a GPU, and torch sees none"):
        main(Arguments(**flags))
    assert not (tmp_path / "out").exists()


def test_the_script_refuses_an_unknown_model_type(no_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tiny_model("gpt2").save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(ROOT / "demo/model").save_pretrained(tmp_path)
    flags = {"model_name_or_path": str(tmp_path), "dataset_name": "none.jsonl", "max_length": 64}
    with pytest.raises(ValueError, match="no kernels for model type 'gpt2'"):
        main(Arguments(use_liger_kernel=True, **flags))


def test_offloading_with_ligers_cross_entropy_is_refused(tmp_path):
    flags = ("--activation_offloading", "--use_liger_kernel", "--liger_cross_entropy")
    done = subprocess.run(
        [sys.executable, str(ROOT / "sft_packing.py"), *flags, "--output_dir", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr == (
        "ValueError: --activation_offloading with Liger's cross entropy would offload logits that Liger "
        "overwrites in place.\n"
        "Keep --use_liger_kernel and drop --liger_cross_entropy, or drop --activation_offloading.\n"
    )
    check_arguments(Arguments(activation_offloading=True, use_liger_kernel=True))


def test_a_chunk_size_that_liger_would_ignore_is_refused():
    check_arguments(Arguments(loss_chunk_size=64))
    check_arguments(Arguments(liger_cross_entropy=True))
    with pytest.raises(ValueError, match="--loss_chunk_size 64 with --liger_cross_entropy"):
        check_arguments(Arguments(liger_cross_entropy=True, loss_chunk_size=64))


# --- On a GPU ---


def logits_and_gradients(model, batch, head):
    batch = {name: x.to(model.device) if torch.is_tensor(x) else x for name, x in batch.items()}
    logits = model(**inputs(batch), use_cache=False).logits.detach()
    batch = sft_packing.add_scored(batch)
    (sft_packing.batch_nll_sum(model, batch, 256, liger_cross_entropy=head) / 100).backward()
    return {"logits": logits, **gradients(model)}


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_kernels_on_cuda(family):
    """fp32: as plain. bf16: not further from fp32 than plain bf16 is, by a factor of two."""
    batch, size = flatten(documents(5, [60, 30, 9])), {"hidden_size": 128, "head_dim": 32}
    model = tiny_model(family, "sdpa", **size).cuda()
    half = tiny_model(family, "sdpa", **size).cuda().bfloat16()
    exact, plain_half = (logits_and_gradients(m, batch, head=False) for m in (model, half))
    for m in (model, half):
        apply_liger_kernels(m, batch["input_ids"].cuda())
    for head in (False, True):
        found, found_half = (logits_and_gradients(m, batch, head) for m in (model, half))
        for name, expected in exact.items():
            scale = expected.abs().max().item()
            assert worst(found[name], expected) <= 1e-4 * max(scale, 1), name
            assert (
                worst(found_half[name], expected) <= 2 * worst(plain_half[name], expected) + 1e-2 * scale
            ), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_head_on_cuda(dtype):
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


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_on_cuda(bf16, tmp_path):
    results = []
    for name, flags in (("plain", {}), ("liger", {"use_liger_kernel": True, "liger_cross_entropy": True})):
        done = main(Arguments(max_steps=3, bf16=bf16, output_dir=str(tmp_path / name), **flags))
        results.append(done["final_metrics"])
    liger, plain = results[::-1]
    for metric in ("loss", "grad_norm"):
        assert liger[metric] == pytest.approx(plain[metric], rel=2e-2 if bf16 else 1e-4)
