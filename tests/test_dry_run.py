"""A dry run's bytes against those counted in a real step over the same batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import freeze_first
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import dpo_padding_free
import grpo_zero3
import sft_packing
from common.dry_run import longest_that_fits, pretend
from common.memory import MemoryMeter
from common.pretrained import load_config

ROOT = Path(__file__).parents[1]

DEMO = sft_packing.Arguments.model_name_or_path


def measured_step(script, args, monkeypatch):
    """Train for two steps; returns the batch of the step that MemTracker watched, and its bytes."""
    meters = []

    class Kept(MemoryMeter):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            meters.append(self)

    monkeypatch.setattr(script, "MemoryMeter", Kept)
    script.main(args)
    return meters[0].largest_batch, meters[0].measured


WAYS = {
    "packed": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "padding-free": {"packing": False, "per_device_train_batch_size": 4},
    "padded": {"packing": False, "padding_free": False, "per_device_train_batch_size": 4},
    "bf16": {"bf16": True},
    "accumulated": {"gradient_accumulation_steps": 3},
    "sdpa": {"attn_implementation": "sdpa", "gradient_checkpointing": False},
    "offloaded": {"activation_offloading": True, "gradient_checkpointing": False},
    "chunks": {"loss_chunk_size": 32},
}


def assert_close(found, measured):
    assert found.keys() == measured.keys()
    for name, (_, count) in found.items():
        assert count == pytest.approx(measured[name], rel=0.02, abs=2**14), name


@pytest.mark.parametrize("way", WAYS)
def test_sft(way, tmp_path, monkeypatch):
    options = {"max_steps": 2, "output_dir": str(tmp_path), "measure_memory": True, "max_length": 256}
    args = sft_packing.Arguments(**options | WAYS[way])
    batch, measured = measured_step(sft_packing, args, monkeypatch)
    assert_close(sft_packing.pretend_step(args, load_config(DEMO), 1, batch), measured)


@pytest.mark.parametrize("script", [sft_packing, dpo_padding_free], ids=lambda script: script.__name__)
@pytest.mark.parametrize("changes", [{}, {"bf16": True}], ids=str)
def test_what_is_frozen_has_neither_gradients_nor_moments(script, changes, tmp_path, monkeypatch):
    options = {"max_steps": 2, "output_dir": str(tmp_path / "run"), "measure_memory": True, "max_length": 256}
    args = script.Arguments(**options | changes)
    all_trained = script.pretend_step(args, load_config(DEMO), 1)
    freeze_first(script, monkeypatch)
    found = script.pretend_step(args, load_config(DEMO), 1)
    for name in ("gradients", "optimizer"):
        assert "trained P" in found[name][0] and found[name][1] < 0.9 * all_trained[name][1]
    batch, measured = measured_step(script, args, monkeypatch)
    assert_close(script.pretend_step(args, load_config(DEMO), 1, batch), measured)


DPO_WAYS = {
    "shared": {},
    "padding-free": {"share_prompt": False},
    "padded": {"padding_free": False},
    "reference beside": {"precompute_ref_log_probs": False},
    "bf16": {"bf16": True},
    "no checkpointing, accumulated": {"gradient_checkpointing": False, "gradient_accumulation_steps": 2},
    "offloaded": {"activation_offloading": True, "gradient_checkpointing": False},
}


@pytest.mark.parametrize("way", DPO_WAYS)
def test_dpo(way, tmp_path, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(open(dpo_padding_free.HERE / "demo/preferences.jsonl").readlines()[:16]))
    options = {"max_steps": 2, "output_dir": str(tmp_path / "run"), "measure_memory": True}
    args = dpo_padding_free.Arguments(**options | {"dataset_name": str(data)} | DPO_WAYS[way])
    batch, measured = measured_step(dpo_padding_free, args, monkeypatch)
    assert_close(dpo_padding_free.pretend_step(args, load_config(DEMO), 1, batch), measured)


def on_ranks(what, jobs, folder, world=2):
    """What dry_run_worker.py measures for each job's flags."""
    (folder / f"{what}.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # DeepSpeed looks for ninja
    run = subprocess.run(
        [*command, "tests/dry_run_worker.py", what, str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(folder / f"{what}.pt", weights_only=True)


def test_sft_on_two_ranks(tmp_path):
    flags = {"max_steps": 2, "output_dir": str(tmp_path / "run"), "measure_memory": True, "bf16": True}
    [found] = on_ranks("sft", {"bf16": flags}, tmp_path).values()
    args = sft_packing.Arguments(**flags)
    assert_close(sft_packing.pretend_step(args, load_config(DEMO), 2, found["batch"]), found["measured"])


GRPO_WAYS = {
    "all": {},
    "none": {"ds3_gather_for_generation": False},
    "half": {"gather_budget_gib": 2 / 1024},
    "bf16, all": {"bf16": True},
    "bf16, none": {"bf16": True, "ds3_gather_for_generation": False},
    "no checkpointing": {"gradient_checkpointing": False},
    "three micro-batches": {"per_device_train_batch_size": 24, "ds3_gather_for_generation": False},
}
GRPO_WAYS |= {
    "all gradients in a bucket": {"bf16": True},
    "a bucket for small gradients": {"bf16": True},
    "a bucket for small gradients, fp32": {},
}
GRPO_BUCKETS = {  # elements; the model has a million, a layer's MLP three times 49,152
    "all gradients in a bucket": 2_000_000,
    "a bucket for small gradients": 40_000,
    "a bucket for small gradients, fp32": 40_000,
}
GRPO_SIZES = {"max_prompt_length": 64, "max_completion_length": 16, "per_device_train_batch_size": 8}


@pytest.mark.parametrize("world", [1, 2])
def test_grpo(world, tmp_path):
    # DeepSpeed's bucket of 50 million elements would hide all else of so small a model
    jobs = {}
    for name, flags in GRPO_WAYS.items():
        bucket = GRPO_BUCKETS.get(name, 100_000)
        settings = tmp_path / f"{bucket}.json"
        settings.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": bucket}}))
        jobs[name] = GRPO_SIZES | {"deepspeed": str(settings)} | flags
    config = load_config(DEMO)
    with torch.device("meta"):
        model = grpo_zero3.pretend_model(grpo_zero3.Arguments(), config)
    layer_bytes = grpo_zero3.whole_bytes(grpo_zero3.decoder_layers(model)[0].parameters())
    # where DeepSpeed gathers, it is chance whether the buffer of an earlier gather has gone at the peak
    tolerance = {"rel": 0.02, "abs": layer_bytes * 1.01 if world > 1 else 0}
    for name, measured in on_ranks("grpo", jobs, tmp_path, world).items():
        args = grpo_zero3.Arguments(**jobs[name])
        rollout, _, _ = grpo_zero3.pretend_rollout(args, config, world)
        update = grpo_zero3.pretend_update(args, config, world)["peak"]
        rows = grpo_zero3.pretend_step(args, config, world)
        held = sum(rows[row][1] for row in ("parameters", "gradients", "bucket", "optimizer"))
        assert held == pytest.approx(measured["held"], rel=0.02), name
        assert held + rollout == pytest.approx(measured["rollout"], rel=0.02), name
        step = rows["gradients"][1]  # the optimizer's step wants them once more
        assert held + max(update, step) == pytest.approx(measured["update"], **tolerance), name
        largest = max(measured["rollout"], measured["update"])
        assert rows["peak"][1] == pytest.approx(largest, **tolerance), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_the_formula_counts_what_ranks_hold_of_a_large_vocabulary(world, bf16, accumulation, tied):
    """Short rows: the peak is at the loss head, or where the embedding's gradient meets the head's."""
    config = load_config(DEMO)
    config.vocab_size, config.tie_word_embeddings = 8192, tied
    flags = {"max_length": 32, "bf16": bf16, "gradient_accumulation_steps": accumulation}
    args = sft_packing.Arguments(per_device_train_batch_size=1, **flags)
    row = sft_packing.flatten([{"input_ids": [0] * 32, "labels": [0] * 32}])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    predicted = sft_packing.predict(args, model, sft_packing.add_scored(row), world)["peak"][1]
    counted = sft_packing.pretend_step(args, config, world)["peak"][1]
    assert predicted == pytest.approx(counted, rel=0.12)


@given(
    slope=st.integers(1, 100),
    start=st.integers(0, 10_000),
    bend=st.integers(0, 5000),
    available=st.integers(0, 500_000),
    most=st.integers(1, 5000),
)
def test_longest_that_fits(slope, start, bend, available, most):
    def peak(length):
        return start + slope * length + max(0, 3 * slope * (length - bend))

    found = longest_that_fits(peak, available, most, unit=64)
    fitting = [n for n in (*range(64, most, 64), most) if peak(n) <= available]
    assert found == max(fitting, default=0)


SCRIPTS = {"sft": sft_packing, "dpo": dpo_padding_free, "grpo": grpo_zero3}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_configuration_is_enough_and_nothing_is_left_behind(name, tmp_path, capsys, monkeypatch):
    script, tried = SCRIPTS[name], []
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((Path(DEMO) / "config.json").read_text())
    pretend_step = script.pretend_step

    def counted(args, config, world):
        tried.append((args, world))
        # one step for real; the others would only take time
        return pretend_step(args, config, world) if len(tried) == 1 else {"peak": ("", 2**24 // world)}

    monkeypatch.setattr(script, "pretend_step", counted)
    output_dir = tmp_path / "out"
    flags = {"model_name_or_path": str(folder), "output_dir": str(output_dir), "dataset_name": "none.jsonl"}
    flags |= {"gradient_checkpointing": False, "dry_run_world_size": 2, "gpu_memory_gib": 0.04}
    found = script.main(script.Arguments(**flags, dry_run=True))
    assert not output_dir.exists() and not torch.distributed.is_initialized()
    assert tried[0][1] == 2
    shown = capsys.readouterr().out
    assert "dry run  world 2" in shown and "--gradient_checkpointing" in shown
    assert ("fits into" if found["fits"] else "does not fit into") + " 0.04 GiB" in shown
    assert list(found["savings"].values()) == sorted(found["savings"].values(), reverse=True)
    peak = found["ledger"][[row["name"] for row in found["ledger"]].index("peak")]["predicted"]
    assert found["savings"]["4 ranks"] == peak - 2**22
    lengths = [getattr(args, found["length_flag"]) for args, _ in tried]
    assert found["longest"] == max(lengths)  # of those above, each "fits"


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    "flags, message",
    [
        ({"dry_run_world_size": 2}, "add --dry_run"),
        ({"gpu_memory_gib": 80.0}, "add --dry_run"),
        ({"dry_run": True, "gpu_memory_gib": 0.0}, "--gpu_memory_gib 0.0"),
        ({"dry_run": True, "dry_run_world_size": 0}, "--dry_run_world_size 0"),
        ({"dry_run": True, "model_name_or_path": "/nowhere"}, "/nowhere cannot be loaded"),
    ],
)
def test_refusals(name, flags, message):
    with pytest.raises(ValueError, match=message):
        SCRIPTS[name].main(SCRIPTS[name].Arguments(**flags))


def test_what_a_dry_run_cannot_follow_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="--use_liger_kernel"):
        sft_packing.check_arguments(sft_packing.Arguments(dry_run=True, use_liger_kernel=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--dry_run is one process"):
        sft_packing.check_arguments(sft_packing.Arguments(dry_run=True))
    with pytest.raises(ValueError, match="this line reads one .*\n.*: torch.ones\\(3\\).nonzero"), pretend():
        torch.ones(3).nonzero()


@given(
    limits=st.tuples(*[st.none() | st.integers(1, 19)] * 2),
    max_length=st.integers(20, 40),
    way=st.sampled_from([{}, {"share_prompt": False}, {"padding_free": False}]),
)
def test_no_pair_is_larger_than_the_one_that_dpo_counts(limits, max_length, way):
    flags = {"max_prompt_length": limits[0], "max_completion_length": limits[1], "max_length": max_length}
    args = dpo_padding_free.Arguments(per_device_train_batch_size=1, **flags | way)
    most_prompt, most_completion = (limit or max_length for limit in limits)
    pairs = [
        (prompt, completion)
        for prompt in range(1, most_prompt + 1)
        for completion in range(1, min(most_completion, max_length - prompt) + 1)
    ]
    shares = dpo_padding_free.shares_prompts(args)
    largest = max(p + 2 * c if shares else 2 * (p + c) for p, c in pairs)
    assert dpo_padding_free.pretend_batch(args)["input_ids"].numel() == largest


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_budget_of_tokens_is_counted_in_full(share_prompt):
    limits = {"max_length": 64, "max_prompt_length": 20, "share_prompt": share_prompt}
    for budget in range(200, 300):
        args = dpo_padding_free.Arguments(max_tokens_per_batch=budget, **limits)
        # whole pairs of 107 or 128 tokens, and one of what is left, if it holds a prompt and two completions
        least = (20 if share_prompt else 40) + 2
        counted = dpo_padding_free.pretend_batch(args)["input_ids"].numel()
        assert budget - least < counted <= budget


@pytest.mark.parametrize("way", [{}, {"share_prompt": False}])
def test_a_budget_below_a_pair_is_refused_and_bounds_the_lengths_that_are_tried(way, monkeypatch):
    flags = {"dry_run": True, "gpu_memory_gib": 1.0, "max_tokens_per_batch": 100} | way
    pair = 127 if not way else 128
    with pytest.raises(ValueError, match=f"a pair may take {pair} tokens, over --max_tokens_per_batch 100"):
        dpo_padding_free.main(dpo_padding_free.Arguments(max_length=64, **flags))
    monkeypatch.setattr(dpo_padding_free, "pretend_step", lambda *_: {"peak": ("", 1)})
    found = dpo_padding_free.dry_run(dpo_padding_free.Arguments(max_length=32, **flags))
    # a prompt of one token and two completions of 49, 99 tokens; or two sequences of 50
    assert found["longest"] == 50


def test_grpo_counts_its_flags():
    config, sizes = load_config(DEMO), {"max_prompt_length": 16, "max_completion_length": 8}

    def peak(world=2, **flags):
        args = grpo_zero3.Arguments(per_device_train_batch_size=16, **sizes | flags)
        grpo_zero3.check_arguments(args)
        return grpo_zero3.pretend_update(args, config, world)

    one_rank = peak(1)["peak"]
    assert peak(1, max_tokens_per_batch=130)["peak"] > one_rank  # a group of 80 tokens, and one of 50
    assert peak(beta=0.1)["reference"] > 0
    assert peak(1, offload_optimizer=True, offload_param=True)["peak"] > one_rank  # weights have to come back
    found = grpo_zero3.main(
        grpo_zero3.Arguments(
            per_device_train_batch_size=8,
            max_tokens_per_batch=100,
            dry_run=True,
            gpu_memory_gib=1.0,
            **sizes,
        )
    )
    assert found["longest"] == (100 - 16) // 8
