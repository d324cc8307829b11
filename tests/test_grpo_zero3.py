"""GRPO under ZeRO-3: the same tokens from gathered and streamed weights, the naive loss, and exact runs."""

import ast
import copy
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import deepspeed
import pytest
import torch
from grpo_cases import (
    DEMO_MODEL,
    GROUPS,
    LIMIT,
    LOSS_CASES,
    all_advantages,
    case_tensors,
    noise,
    prompt_ids,
    scored_lengths,
    write_model,
)
from helpers import FROZEN, alone_on_the_cpu, freeze_first, tiny_model, worst, write_jsonl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers.generation import StopStringCriteria

import grpo_zero3
from common.checkpoints import list_checkpoints
from common.collators import flatten
from common.flags import Refusal, parse_arguments
from grpo_zero3 import (
    Arguments,
    Prompts,
    budget_bytes,
    check_arguments,
    deepspeed_config,
    generate,
    generation_weights,
    group_advantages,
    grpo_loss,
    load_engine,
    main,
    sample,
    start_distributed,
)

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "grpo_zero3.py"
MODES = ("all", "none", "third", "half", "exact", "byte")
TIMEOUT = 600  # DeepSpeed builds an extension at its first use on a CPU


def ranks(program, *arguments, count=2, timeout=TIMEOUT, env=()):
    """Run on `count` ranks, killed with all their processes if they hang. Returns exit code and output."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    process = subprocess.Popen(
        [*launcher, str(program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # DeepSpeed looks for ninja on PATH
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **dict(env)},
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


# --- 1. What two ranks answered ---


@functools.cache
def model(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=dtype, attn_implementation="sdpa")


def naive_logps(prompt, completion, temperature):
    """Log-probabilities of one completion alone, from all its logits."""
    # in fp64: with the rounding of both sides, a difference would be up to twice that of ours
    logits = model(torch.float64)(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    logps = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)
    return logps.gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """The answers of tests/grpo_worker.py: one for each rank; its folder."""
    folder = tmp_path_factory.mktemp("worker")
    shutil.copytree(DEMO_MODEL, folder / "model")
    base = {}
    with torch.no_grad():
        for name, flags in LOSS_CASES.items():
            temperature = flags.get("temperature", 1.0)
            base[name] = [naive_logps(p, c, temperature).tolist() for p, cs in GROUPS for c in cs]
    (folder / "base.json").write_text(json.dumps(base))
    returncode, output = ranks(ROOT / "tests/grpo_worker.py", folder)
    assert returncode == 0, output[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)], folder, base


@functools.cache
def unsharded(rank):
    """Greedy completions of plain transformers, each prompt alone."""
    found = []
    for ids in prompt_ids(rank):
        out = model().generate(torch.tensor([ids]), max_new_tokens=LIMIT, do_sample=False)
        found += [out[0, len(ids) :].tolist()] * 2
    return found


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_unsharded_models_tokens(mode, worker):
    for rank, answers in enumerate(worker[0]):
        assert answers[f"mode {mode}"]["completions"] == unsharded(rank)
        assert answers[f"mode {mode}"]["finished"] == [ids[-1] == 257 for ids in unsharded(rank)]


@pytest.mark.parametrize("mode", MODES)
def test_ranks_that_stop_at_different_lengths_step_together(mode, worker):
    lengths = [max(map(len, unsharded(rank))) for rank in range(2)]
    assert lengths[0] < lengths[1]
    assert [answers[f"mode {mode}"]["forwards"] for answers in worker[0]] == [lengths[1]] * 2


@pytest.mark.parametrize("mode", MODES)
def test_between_forwards_the_residents_alone_are_whole(mode, worker):
    for answers in worker[0]:
        answer = answers[f"mode {mode}"]
        assert set(answer["between"]) == {answer["resident"]}
        assert answer["budget"] is None or answer["resident"] <= answer["budget"]
        assert answer["peak"] <= answer["resident"] + answer["largest"]
        layer = 4 * sum(p.numel() for p in model().model.layers[0].parameters())
        assert mode in ("none", "byte") or answer["peak"] <= answer["resident"] + layer
    assert worker[0][0]["mode all"]["resident"] == worker[0][0]["mode exact"]["resident"] > 4_000_000
    assert 0 == worker[0][0]["mode byte"]["resident"] < worker[0][0]["mode third"]["resident"]
    assert worker[0][0]["mode third"]["resident"] < worker[0][0]["mode half"]["resident"]


@pytest.mark.parametrize("mode", MODES)
def test_the_bytes_announced_are_gathered(mode, worker):
    for answers in worker[0]:
        answer = answers[f"mode {mode}"]
        assert answer["gathered"] == answer["streamed"] * answer["forwards"]
        # one gather for each of 5 layers, the last norm, and the embedding, kept for the head
        if mode == "none":
            assert answer["gathers"] == (5 + 1 + 1) * answer["forwards"]
        if mode in ("all", "exact"):
            assert answer["gathers"] == 0


@pytest.mark.parametrize("count, flags", [(3, {}), (2, {"offload_optimizer": True, "offload_param": True})])
def test_padded_shards_and_shards_on_the_host_give_the_same_tokens(count, flags, tmp_path):
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    returncode, output = ranks(ROOT / "tests/grpo_worker.py", tmp_path, json.dumps(flags), count=count)
    assert returncode == 0, output[-4000:]
    for rank in range(count):
        answers = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert (answers["padded"] > 0) == (count == 3)
        assert answers["on host"] == bool(flags)
        for mode in MODES:
            assert answers[f"mode {mode}"]["completions"] == unsharded(rank)
            assert answers[f"mode {mode}"]["restored"]


@pytest.mark.parametrize("mode", MODES)
def test_all_is_put_back_after_a_rollout(mode, worker):
    assert all(answers[f"mode {mode}"]["restored"] for answers in worker[0])


ERRORS = [(error, mode) for error in ("Crash", "KeyboardInterrupt") for mode in ("all", "none", "half")]


@pytest.mark.parametrize("error, mode", [*ERRORS, ("gather", "none"), ("gather", "half")])
def test_an_exception_in_mid_generation_leaves_a_working_engine(error, mode, worker):
    for answers in worker[0]:
        answer = answers[f"{error} {mode}"]
        assert answer["raised"] and answer["restored"] and answer["again"]
        assert answer["step"] == answers["steps"][0]


def test_the_step_after_a_rollout_is_the_step_without(worker):
    for answers in worker[0]:
        assert len(answers["steps"]) == 1 + 3
        assert all(step == answers["steps"][0] for step in answers["steps"])
        for step in answers["steps"]:  # each layer once more in backward: checkpointing is on again
            assert step["layer_forwards"] == 2 * step["batches"]


def test_hooks_of_zero3_that_stay_would_be_seen(worker):
    for answers in worker[0]:
        assert set(answers["hooks stay"]["between"]) != {answers["mode half"]["resident"]}


def test_the_weights_are_sharded_and_tied(worker):
    total = sum(p.numel() for p in model().parameters())
    for answers in worker[0]:
        assert answers["tied"] and total / 2 <= answers["shards"] <= 1.01 * total / 2


# --- 2. The loss ---


def naive(name, base):
    """GRPO in one process: every completion alone, every mean written out."""
    flags = LOSS_CASES[name]
    args = Arguments(**flags)
    _, advantages, _, _, lengths = case_tensors(name, 0, 1, base)
    old, ref, i, per_completion = noise(1), noise(2), 0, []
    for prompt, completions in GROUPS:
        for completion in completions:
            logps = naive_logps(prompt, completion, args.temperature)
            before = torch.tensor(base[i]) + old[i]
            ratio, high = torch.exp(logps - before), args.epsilon_high or args.epsilon
            a = all_advantages()[i]
            losses = -torch.min(ratio * a, torch.clamp(ratio, 1 - args.epsilon, 1 + high) * a)
            if args.beta:
                d = torch.tensor(base[i]) + ref[i] - logps
                losses = losses + args.beta * (d.exp() - d - 1)
            per_completion.append(losses if scored_lengths(name)[i] else losses[:0])
            i += 1
    kept = [losses for losses in per_completion if len(losses)]
    if args.loss_type == "dapo":
        loss = torch.cat(kept).mean()
    elif args.loss_type == "grpo":
        loss = torch.stack([losses.mean() for losses in kept]).mean()
    elif args.loss_type == "bnpo":
        groups = [torch.cat(per_completion[g : g + 3]) for g in range(0, 15, 3)]
        loss = torch.stack([losses.mean() for losses in groups if len(losses)]).mean()
    else:
        loss = torch.cat(kept).sum() / (len(kept) * 9)
    model(torch.float64).zero_grad()
    loss.backward()
    return loss.item(), {key: p.grad.clone() for key, p in model(torch.float64).named_parameters()}


@pytest.mark.parametrize("name", LOSS_CASES)
def test_loss_and_gradients_are_the_naive_ones(name, worker):
    (first, second), folder, base = worker
    loss, gradients = naive(name, base[name])
    assert first[f"loss {name}"]["sums"] == second[f"loss {name}"]["sums"]
    assert abs(first[f"loss {name}"]["sums"][0] - loss) <= 1e-5
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert worst(load_file(folder / f"{name}.safetensors"), gradients) <= 1e-5 * max(1, largest)
    assert first[f"loss {name}"]["batches"] >= 2


def test_bf16_gradients_are_summed_over_ranks_in_fp32(worker):
    assert all(answers["lost in reduction"] <= 1e-6 for answers in worker[0])


def test_a_mask_off_by_one_would_be_seen(worker):
    (first, _), _, base = worker
    assert abs(first["off by one"]["sums"][0] - naive("dapo", base["dapo"])[0]) > 1e-3


# --- 3. Whole runs ---


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with alone_on_the_cpu(tmp_path_factory.mktemp("cache")) as folder:
        yield folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Flags of a run of a few steps: 12 prompts of 2 to 7 tokens, 4 of them in each rollout."""
    folder = tmp_path_factory.mktemp("base")
    rows = [{"prompt": "abcdefgh"[: 2 + i % 6] + "xyz"[i % 3], "wanted": "abc"[i % 3]} for i in range(12)]
    return {
        "model_name_or_path": write_model(folder / "model"),
        "dataset_name": write_jsonl(folder / "prompts.jsonl", rows),
        "reward_funcs": "grpo_cases:upper",
        "max_prompt_length": 8,
        "max_completion_length": 6,
        "num_generations": 3,
        "per_device_train_batch_size": 12,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "loss_chunk_size": 5,
        "max_steps": 4,
    }


Run = namedtuple("Run", ["returned", "metrics", "weights"])


def run(output_dir, flags, **changes):
    return read_run(output_dir, main(Arguments(output_dir=str(output_dir), **{**flags, **changes})))


def read_run(output_dir, returned=None):
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    weights = Path(output_dir) / "model.safetensors"
    weights = load_file(weights) if weights.exists() else None
    return Run(returned, [json.loads(line) for line in lines], weights)


def assert_same_bits(first, second):
    for name in ("loss", "grad_norm", "reward", "entropy", "kl", "num_tokens", "learning_rate", "epoch"):
        assert [s[name] for s in first.metrics] == [s[name] for s in second.metrics], name
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def assert_same_curve(first, second):
    assert len(first.metrics) == len(second.metrics)
    for a, b in zip(first.metrics, second.metrics):
        for name in ("loss", "reward", "reward_std", "entropy", "kl", "clip_ratio", "epoch"):
            assert a[name] == pytest.approx(b[name], abs=1e-5), name
        for name in ("num_scored_tokens", "completions/mean_length", "frac_reward_zero_std"):
            assert a[name] == b[name]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert worst(first.weights, second.weights) <= 1e-4


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Runs on two ranks, all in one process each: {name: its folder}, their results on both ranks."""
    folder = tmp_path_factory.mktemp("runs")
    half = {"per_device_train_batch_size": 6}  # 12 completions on two ranks, as base has on one
    dropout = {**half, "model_name_or_path": write_model(folder / "dropout", attention_dropout=0.2)}
    dropout |= {"max_steps": 6, "num_iterations": 2, "reward_funcs": "grpo_cases:by_column,grpo_cases:upper"}
    resume = {"resume_from_checkpoint": "latest"}
    jobs = {
        "two": {"flags": half},
        "streamed": {"flags": {**half, "ds3_gather_for_generation": False}},
        "budget": {"flags": {**half, "gather_budget_gib": 5e-5}},
        "through": {"flags": {**dropout, "save_steps": 2, "save_total_limit": 2}},
        "resumed": {"flags": {**dropout, **resume, "save_steps": 2}, "copy": ["through", "resumed", 4]},
        "stopped": {"flags": dropout, "sigterm": 1},
        "continued": {"flags": {**dropout, **resume}, "copy": ["stopped", "continued", 4]},
        "reference": {"flags": {**half, "beta": 0.2, "max_steps": 3}},
        "masked": {
            "flags": {**half, "mask_truncated_completions": True, "max_completion_length": 1, "max_steps": 2}
        },
        "offloaded": {"flags": {**half, "offload_optimizer": True, "offload_param": True, "max_steps": 2}},
        "frozen": {"flags": {**half, "save_steps": 2}, "freeze": True},
        "frozen resumed": {
            "flags": {**half, **resume},
            "copy": ["frozen", "frozen resumed", 2],
            "freeze": True,
        },
        "thawed": {"flags": {**half, **resume}, "copy": ["frozen", "thawed", 2]},
        "broken reward": {"flags": {**half, "reward_funcs": "grpo_cases:raises_on_the_second_rank"}},
        "broken start": {"flags": {**half, "reward_funcs": "grpo_cases:not_on_the_first_rank"}},
        "bf16": {"flags": {**half, "bf16": True, "max_steps": 2}},
        "bf16 at rest": {"flags": {**half, "bf16": True, "max_steps": 1, "learning_rate": 0.0}},
    }
    for name, job in jobs.items():
        job["flags"] = {**base, **job["flags"], "output_dir": str(folder / name)}
        if "copy" in job:
            source, target, step = job["copy"]
            job["copy"] = [str(folder / source), str(folder / target), step]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    returncode, output = ranks(ROOT / "tests/grpo_runs.py", folder)
    assert returncode == 0, output[-4000:]
    results = [json.loads((folder / f"results{rank}.json").read_text()) for rank in range(2)]
    return {name: folder / name for name in jobs}, results


def test_two_ranks_are_one_rank(runs, base, tmp_path):
    one, two = run(tmp_path, base), read_run(runs[0]["two"])
    assert len(one.metrics) == 4 and len({step["reward"] for step in one.metrics}) > 1
    assert_same_curve(two, one)


@pytest.mark.parametrize("name", ["streamed", "budget"])
def test_every_way_to_generate_takes_the_same_steps(name, runs):
    assert_same_curve(read_run(runs[0][name]), read_run(runs[0]["two"]))


def test_the_metrics_tell_the_ways_apart(runs):
    gathered = {name: read_run(runs[0][name]).metrics[0] for name in ("two", "streamed", "budget")}
    assert gathered["two"]["gathered_bytes_per_token"] == 0 == gathered["streamed"]["resident_bytes"]
    for name in ("gathered_bytes_per_token", "resident_bytes"):
        ordered = sorted(gathered, key=lambda way: gathered[way][name])
        assert ordered == ["two", "budget", "streamed"][:: 1 if name.startswith("gathered") else -1]
    assert 0 < gathered["budget"]["resident_bytes"] <= 5e-5 * 2**30


@pytest.mark.parametrize("name", ["two", "streamed", "budget"])
def test_the_weights_planned_for_a_rollout_are_whole_in_it(name, runs):
    rows = json.loads((runs[0][name] / "summary.json").read_text())["ledger"]
    [row] = [row for row in rows if row["name"] == "rollout_weights"]
    assert row["measured"] == row["predicted"] > 0


@pytest.mark.parametrize("name", ["resumed", "continued"])
def test_a_resumed_run_is_the_uninterrupted_one(name, runs):
    through = read_run(runs[0]["through"])
    assert len(through.metrics) == 6
    assert_same_bits(read_run(runs[0][name]), through)


def assert_frozen(folder, came):
    """What a run under helpers.freeze_first leaves."""
    done = read_run(folder)
    for name, weight in done.weights.items():
        assert torch.equal(weight, came[name]) == name.startswith(FROZEN), name
    trained = sum(w.numel() for name, w in came.items() if not name.startswith(FROZEN))
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary["ledger"]:
        count = {"gradients": 4, "optimizer": 12}.get(row["name"], 0) * trained / summary["world_size"]
        if count:
            assert row["predicted"] == row["measured"] == count and "trained P" in row["formula"]
    for path in folder.rglob("*_model_states.pt"):
        state = torch.load(path, weights_only=False)
        assert state["frozen_param_fragments"] is None
        assert not [name for name in state["module"] if name.startswith(FROZEN)]


def test_frozen_layers_cost_their_weights_alone(runs, base):
    came = load_file(Path(base["model_name_or_path"]) / "model.safetensors")
    assert_frozen(runs[0]["frozen"], came)
    assert list(runs[0]["frozen"].rglob("*_model_states.pt"))
    assert_same_bits(read_run(runs[0]["frozen resumed"]), read_run(runs[0]["frozen"]))
    for results in runs[1]:
        assert "was frozen when the checkpoint was written, and is trained now" in results["thawed"]["error"]


@pytest.mark.parametrize("offload_optimizer", [False, True])
def test_frozen_layers_in_bf16_and_on_the_host(offload_optimizer, base, tmp_path, monkeypatch):
    in_graph = freeze_first(grpo_zero3, monkeypatch)
    name = write_model(tmp_path / "model", dtype=torch.bfloat16)
    flags = {"model_name_or_path": name, "bf16": True, "offload_optimizer": offload_optimizer, "max_steps": 2}
    run(tmp_path / "out", base, weight_decay=0.1, learning_rate=1e-2, **flags)
    assert in_graph and not any(in_graph)
    assert_frozen(tmp_path / "out", load_file(Path(name) / "model.safetensors"))


def test_sigterm_on_one_rank_saves_a_checkpoint_after_the_rollout(runs):
    """It comes in the second rollout, with step 3 of 3 and 4."""
    assert [results["stopped"]["returned"] for results in runs[1]] == [{"stopped_at_step": 4}] * 2
    assert [step for step, _ in list_checkpoints(runs[0]["stopped"])] == [4]


def test_a_resumed_run_on_the_host_is_the_uninterrupted_one(base, tmp_path):
    flags = {**base, "offload_optimizer": True, "max_steps": 8, "max_completion_length": 4}
    through = run(tmp_path / "through", flags, save_steps=5)
    checkpoint = str(tmp_path / "through/checkpoint-5")
    resumed = run(tmp_path / "resumed", flags, resume_from_checkpoint=checkpoint)
    assert [step["step"] for step in resumed.metrics] == [6, 7, 8]
    assert_same_bits(resumed, through._replace(metrics=through.metrics[5:]))


def test_a_resumed_run_decays_by_its_own_flag(base, tmp_path, monkeypatch):
    seen, save = [], grpo_zero3.save_model

    def save_model(args, engine, *others):
        seen.append([group["weight_decay"] for group in engine.optimizer.param_groups])
        save(args, engine, *others)

    monkeypatch.setattr(grpo_zero3, "save_model", save_model)
    flags = {**base, "max_completion_length": 2, "save_steps": 1}
    run(tmp_path, flags, weight_decay=0.1, max_steps=1)
    more = {"max_steps": 2, "resume_from_checkpoint": "latest"}
    run(tmp_path, flags, weight_decay=0.2, **more)
    assert seen == [[0.1, 0.0], [0.2, 0.0]]
    groups = grpo_zero3.parameter_groups
    monkeypatch.setattr(grpo_zero3, "parameter_groups", lambda *args: groups(*args)[:1])
    with pytest.raises(Refusal, match="checkpoint-2 holds the state of another optimizer"):
        run(tmp_path, flags, **{**more, "max_steps": 3})


def test_the_newest_checkpoints_are_kept(runs):
    assert [step for step, _ in list_checkpoints(runs[0]["through"])] == [4, 6]
    assert not [path for path in runs[0]["through"].iterdir() if path.suffix in (".tmp", ".deleted")]


def test_another_number_of_ranks_is_refused(runs, tmp_path):
    folder = shutil.copytree(runs[0]["stopped"], tmp_path / "run")
    before = contents(folder)
    flags = json.loads((runs[0]["stopped"].parent / "jobs.json").read_text())["stopped"]["flags"]
    with pytest.raises(ValueError, match="written by 2 ranks, and this run has 1.*Resume with 2 ranks"):
        main(Arguments(**{**flags, "output_dir": str(folder), "resume_from_checkpoint": "latest"}))
    assert contents(folder) == before


def test_the_first_iteration_is_on_policy_and_the_second_is_not(runs):
    steps = read_run(runs[0]["two"]).metrics
    assert all(step["clip_ratio"] == 0 == step["kl"] for step in steps)
    reference = read_run(runs[0]["reference"]).metrics
    assert reference[0]["kl"] == pytest.approx(0, abs=1e-6) and reference[2]["kl"] > 1e-5


def test_a_rollout_without_a_scored_token_changes_nothing(runs, base):
    masked = read_run(runs[0]["masked"])
    assert worst(masked.weights, load_file(Path(base["model_name_or_path"]) / "model.safetensors")) == 0
    for step in masked.metrics:
        assert step["loss"] == step["grad_norm"] == step["num_scored_tokens"] == 0
        assert step["completions/clipped_ratio"] == 1 and all(map(math.isfinite, step.values()))


@pytest.mark.parametrize(
    "name, culprit, message",
    [
        ("broken reward", 1, "raises_on_the_second_rank raised ZeroDivisionError"),
        ("broken start", 0, "not_on_the_first_rank cannot be imported"),
    ],
)
def test_what_fails_on_one_rank_ends_all(name, culprit, message, runs):
    """In step: the same processes made the runs after it."""
    errors = [results[name]["error"] for results in runs[1]]
    assert message in errors[culprit] and errors[culprit].startswith("Refusal: ")
    assert errors[1 - culprit] == "Refusal: another rank cannot go on; its own message says why."


def test_offloading_changes_the_place_alone(runs):
    offloaded, two = read_run(runs[0]["offloaded"]), read_run(runs[0]["two"])
    for a, b in zip(offloaded.metrics, two.metrics):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_bf16_follows_fp32(runs):
    first, expected = read_run(runs[0]["bf16"]).metrics[0], read_run(runs[0]["two"]).metrics[0]
    # a few of the sampled tokens are others
    for name, tolerance in (("entropy", 0.05), ("grad_norm", 0.3)):
        assert first[name] == pytest.approx(expected[name], rel=tolerance) and first[name] != expected[name]


def test_bf16_trains_the_fp32_weights_of_the_files(runs, base, tmp_path):
    """At a learning rate of 0 they leave as they came: on two ranks, and with the optimizer on the host."""
    came = load_file(Path(base["model_name_or_path"]) / "model.safetensors")
    offloaded = run(tmp_path, base, bf16=True, offload_optimizer=True, learning_rate=0.0, max_steps=1)
    for left in (read_run(runs[0]["bf16 at rest"]).weights, offloaded.weights):
        assert left.keys() == came.keys()
        assert all(torch.equal(left[name], came[name]) for name in came)
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in came.values())


def contents(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# --- 4. Functions ---


@pytest.fixture
def engine(base, cache):
    """The tiny model in an engine of one rank, in fp32."""
    with engine_of(base) as engine:
        yield engine


@contextmanager
def engine_of(flags, **options):
    args = Arguments(**flags)
    device = start_distributed(args)[3]
    try:
        yield load_engine(args, device, **options)
    finally:
        deepspeed.comm.destroy_process_group()


def modes_and_hooks(engine):
    modules = list(engine.module.modules())
    return (
        [(m.training, list(m._forward_pre_hooks), list(m._forward_hooks)) for m in modules],
        engine.module.config._attn_implementation,
    )


def test_advantages_are_those_of_each_group():
    rewards = torch.tensor([0.0, 1.0, 2.0, 10.0, 10.0, 16.0])
    found = group_advantages(rewards, 3)
    for i in (0, 3):
        group = rewards[i : i + 3]
        expected = (group - group.mean()) / (group.std() + 1e-4)
        assert worst(found[i : i + 3], expected) <= 1e-6
    assert worst(found, group_advantages(rewards, 6)) > 0.1  # across groups
    assert group_advantages(rewards, 3, scale_rewards=False).tolist() == [-1, 0, 1, -2, -2, 4]


@pytest.mark.parametrize("count", [1, 5, 7])
def test_rewards_that_are_no_whole_groups_are_refused(count):
    with pytest.raises(ValueError, match=f"{count} rewards are no whole groups of num_generations 3"):
        group_advantages(torch.zeros(count), 3)


@pytest.mark.parametrize("scale_rewards", [True, False])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1e8])
def test_equal_rewards_give_exactly_0(reward, scale_rewards):
    rewards = torch.tensor([reward] * 6 + [1.0, 2.0, 3.0])
    found = group_advantages(rewards, 3, scale_rewards)
    assert found[:6].tolist() == [0.0] * 6 and found[6:].abs().sum() > 0


def draw(logits, uniform, **options):
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    return sample(logits.expand(len(uniform), -1), uniform, **options)


def test_sampling_has_the_softmaxs_frequencies():
    logits = torch.tensor([[1.0, -1.0, 0.5, 3.0, -20.0]])
    uniform = torch.linspace(0, 1, 20_001)[:-1]
    for temperature in (0.5, 1.0, 2.0):
        ids, entropy = draw(logits, uniform, temperature=temperature)
        probs = torch.softmax(logits[0] / temperature, dim=0)
        assert worst(ids.bincount(minlength=5) / len(ids), probs) <= 2e-4
        assert entropy[0].item() == pytest.approx(-(probs * probs.log()).sum().item(), rel=1e-5)


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([[0.1, 0.5, 0.3, 0.06, 0.04]]).log()
    uniform = torch.linspace(0, 1, 10_001)[:-1]

    def shares(**options):
        return (draw(logits, uniform, **options)[0].bincount(minlength=5) / 10_000).tolist()

    assert shares(top_k=2) == pytest.approx([0, 0.625, 0.375, 0, 0], abs=1e-3)
    # top_p of what top_k has left: 0.5 of 0.8 is 0.625
    assert shares(top_k=2, top_p=0.6) == [0, 1, 0, 0, 0]
    assert shares(top_p=0.5) == shares(top_k=1) == [0, 1, 0, 0, 0]
    assert shares(top_p=0.81) == pytest.approx([1 / 9, 5 / 9, 3 / 9, 0, 0], abs=1e-3)
    assert shares(top_k=9) == pytest.approx([0.1, 0.5, 0.3, 0.06, 0.04], abs=1e-3)
    assert draw(logits, uniform[:3], temperature=0)[0].tolist() == [1, 1, 1]


def test_a_token_of_probability_0_is_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    extremes = torch.tensor([0.0, 0.4999999, 0.5, 1 - 2**-24])
    for options in ({}, {"top_k": 4}, {"top_p": 0.9}):
        ids, entropy = draw(logits, extremes, **options)
        assert set(ids.tolist()) == {1, 3} and entropy.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0}])
@pytest.mark.parametrize("logits", [[math.nan, 1.0, 2.0], [math.inf, 1.0, 2.0], [-math.inf] * 3])
def test_logits_that_are_not_finite_are_told_by_the_entropy(logits, options):
    ids, entropy = draw(torch.tensor([logits]), torch.tensor([0.0, 0.9]), **options)
    assert entropy.isnan().all() and ((0 <= ids) & (ids < 3)).all()


@pytest.mark.parametrize("here, elsewhere", [(True, 0), (False, 1)])
def test_logits_that_are_not_finite_on_any_rank_end_the_rollout(here, elsewhere):
    broken = copy.deepcopy(model())
    if here:
        broken.lm_head.weight.data[7] = math.nan
    with pytest.raises(FloatingPointError, match="token 1: the logits of [13] completions are not finite"):
        generate(
            broken,
            prompt_ids(0)[:1],
            3,
            4,
            end_ids=[257],
            uniform=torch.zeros(3, 4),
            all_sum=lambda counts: [counts[0], counts[1] + elsewhere],
        )


def test_a_rollout_that_cannot_begin_leaves_all_as_it_was(engine, monkeypatch):
    before = modes_and_hooks(engine)

    def fail(*_):
        monkeypatch.undo()
        raise RuntimeError("not today")

    for name in ("eval", "set_attn_implementation"):
        monkeypatch.setattr(engine.module, name, fail)
        with pytest.raises(RuntimeError, match="not today"), generation_weights(engine, None):
            pass
        assert modes_and_hooks(engine) == before


@pytest.mark.parametrize("offload", [False, True])
def test_one_rank_streams_its_own_shards(offload, base, cache):
    flags = {**base, "offload_optimizer": offload, "offload_param": offload}
    with engine_of(flags) as engine:
        parameters, found = list(engine.module.parameters()), []
        for budget in (None, 0, grpo_zero3.whole_bytes(parameters) // 2):
            with generation_weights(engine, budget) as model:
                found.append(generate(model, [[5, 6, 7], [8]], 2, 6, end_ids=[], temperature=0))
            assert all(p.numel() == 0 for p in parameters)
        assert found[0] == found[1] == found[2] and len(found[0][0]) == 4


def test_clip_and_kl_of_single_tokens():
    old, advantages = torch.zeros(6), torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    ratio = torch.tensor([0.7, 1.0, 1.5, 0.7, 1.0, 1.5])
    ref = torch.tensor([0.5, 0.0, -0.5, 0.1, -2.0, 1.0])
    options = {"epsilon": 0.2, "epsilon_high": 0.4}
    losses, kl, clipped = grpo_loss(ratio.log(), old, advantages, **options)
    assert worst(losses, -torch.tensor([0.7, 1.0, 1.4, -0.8, -1.0, -1.5])) <= 1e-6
    assert clipped.tolist() == [False, False, True, True, False, False] and kl.tolist() == [0] * 6
    with_kl, kl, _ = grpo_loss(ratio.log(), old, advantages, **options, beta=0.3, ref_per_token_logps=ref)
    quotient = ref.exp() / ratio
    assert worst(kl, quotient - quotient.log() - 1) <= 1e-6
    assert worst(with_kl, losses + 0.3 * kl) <= 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prompts_of_any_length_are_completed_as_alone(family):
    """gpt2 has learned positions: padding on the left must not shift them."""
    tiny = tiny_model(family, attn_implementation="sdpa", eos_token_id=63)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
    completions, _, _ = generate(tiny, prompts, 2, 9, end_ids=[63], temperature=0)
    for i, prompt in enumerate(prompts):
        out = tiny.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=63)
        assert completions[2 * i] == completions[2 * i + 1] == out[0, len(prompt) :].tolist()


def test_a_reference_has_no_dropout(base, tmp_path):
    dropout = write_model(tmp_path, attention_dropout=0.5)
    row = flatten([{"input_ids": list(range(9)), "labels": list(range(9))}])
    del row["labels"]
    with engine_of({**base, "model_name_or_path": dropout}, trainable=False) as reference, torch.no_grad():
        first, second = (reference(**row, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)


def test_the_budget_is_in_gib():
    assert budget_bytes(Arguments(gather_budget_gib=1.5)) == 1.5 * 2**30
    assert budget_bytes(Arguments()) is None
    assert budget_bytes(Arguments(ds3_gather_for_generation=False)) == 0


@pytest.fixture
def rollouts(monkeypatch):
    """What each rollout of the test's runs holds, in order."""
    found, original = [], grpo_zero3.rollout_metrics

    def record(rollout, *args):
        found.append(rollout)
        return original(rollout, *args)

    monkeypatch.setattr(grpo_zero3, "rollout_metrics", record)
    return found


@pytest.mark.parametrize("scale_rewards", [True, False])
def test_the_first_steps_metrics_are_those_of_its_completions(scale_rewards, base, rollouts, tmp_path):
    flags = {"reward_funcs": "grpo_cases:spread", "temperature": 0.7, "stop_strings": list("aeiouxyz")}
    flags |= {"scale_rewards": scale_rewards, "mask_truncated_completions": not scale_rewards}
    [step] = run(tmp_path, base, **flags, max_completion_length=12, max_steps=1).metrics
    [rollout] = rollouts
    trained = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"])
    lengths, entropies = [], []
    for prompt, completions in rollout["groups"]:
        for ids in completions:
            lengths.append(len(ids))
            with torch.no_grad():
                logits = trained(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.7
            entropies += torch.distributions.Categorical(logits=logits).entropy().tolist()
    finished = rollout["finished"].tolist()
    scored = lengths if scale_rewards else [n * done for n, done in zip(lengths, finished)]
    assert 0 < sum(finished) < len(finished) and 0 < sum(scored) <= sum(lengths)
    assert step["completions/mean_length"] == sum(lengths) / len(lengths)
    assert step["completions/clipped_ratio"] == finished.count(False) / len(finished)
    assert step["entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)
    assert step["num_scored_tokens"] == sum(scored)
    groups = rollout["reward"].view(-1, 3)
    assert step["reward_std"] == pytest.approx(groups.std(1).mean().item())
    advantages = groups - groups.mean(1, keepdim=True)
    if scale_rewards:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    loss = -sum(a * n for a, n in zip(advantages.flatten().tolist(), scored)) / sum(scored)
    assert step["loss"] == pytest.approx(loss, abs=1e-6) and abs(loss) > 1e-3


@pytest.mark.parametrize("changed", ["temperature", None])
def test_a_rollout_is_scored_at_the_temperature_that_it_was_sampled_at(changed, base, rollouts, tmp_path):
    """Whatever the flag says by then: policy and reference, in both steps that a rollout is used for."""
    scored, original = [], grpo_zero3.per_token_logps

    def record(engine, batch, args):
        logps = original(engine, batch, args)
        scored.append((batch, logps.detach()))
        return logps

    def sample_warm(self, progress):
        self.args = Arguments(**{**vars(self.args), "temperature": 3.0})
        return sample_rollout(self, progress)

    sample_rollout = grpo_zero3.Rollouts.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_zero3, "per_token_logps", record)
        if changed:
            patch.setattr(grpo_zero3.Rollouts, "sample", sample_warm)
        flags = {"temperature": 0.7, "num_iterations": 2, "max_steps": 2, "beta": 0.1, "learning_rate": 0.0}
        run(tmp_path, base, **flags)
    sampled_at = 3.0 if changed else 0.7
    tiny = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"])
    expected = []
    for prompt, completions in rollouts[0]["groups"]:
        for ids in completions:
            with torch.no_grad():
                logits = tiny(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logps = torch.log_softmax(logits / sampled_at, dim=-1)
            expected += logps.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
    reference, *steps = torch.cat([logps for _, logps in scored]).split(len(expected))
    assert len(steps) == 2
    for found in (reference, *steps):
        assert worst(found, torch.tensor(expected)) <= 1e-5


@pytest.mark.parametrize("flags", [{"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_flags_reach_the_rollout(flags, base, rollouts, tmp_path):
    """Each of these leaves the likeliest token alone: all completions of a group are one."""
    run(tmp_path, base, max_steps=1, **flags)
    assert all(a == b == c and len(a) > 1 for _, (a, b, c) in rollouts[0]["groups"])


def test_each_rollout_draws_anew(base, rollouts, tmp_path):
    name = write_jsonl(tmp_path / "same.jsonl", [{"prompt": "abc"}] * 4)
    run(tmp_path / "out", base, dataset_name=name, learning_rate=0.0, max_steps=2)
    first, second = (rollout["groups"] for rollout in rollouts)
    assert [prompt for prompt, _ in first] == [prompt for prompt, _ in second] and first != second
    assert len({str(group) for group in first}) > 1  # nor do a rollout's groups share their numbers


def test_old_log_probabilities_are_those_of_the_rollout(base, tmp_path):
    flags = {"num_iterations": 3, "max_steps": 6, "epsilon": 1e-5, "learning_rate": 1e-3}
    ratios = [step["clip_ratio"] for step in run(tmp_path, base, **flags).metrics]
    assert ratios[0] == ratios[3] == 0
    # every token has moved, about half of them the way that the clip holds up
    assert all(0.2 < ratios[i] < 0.9 for i in (1, 2, 4, 5))


def test_the_kl_that_is_shown_is_the_one_in_the_loss(base, tmp_path):
    """With one token each, a group's advantages cancel, and the loss is beta times the divergence."""
    flags = {"max_completion_length": 1, "beta": 0.5, "learning_rate": 1e-2, "max_steps": 3}
    last = run(tmp_path, base, **flags).metrics[-1]
    assert last["kl"] > 1e-4 and last["loss"] == pytest.approx(0.5 * last["kl"], abs=1e-6)


def test_weights_decay(base, tmp_path):
    flags = {"reward_funcs": "grpo_cases:equal", "learning_rate": 0.01, "weight_decay": 0.5, "max_steps": 1}
    left = run(tmp_path, base, **flags).weights
    came = load_file(Path(base["model_name_or_path"]) / "model.safetensors")
    decayed = {name: weight * (1 - 0.01 * 0.5 * ("norm" not in name)) for name, weight in came.items()}
    assert worst(left, decayed) <= 1e-6


def test_the_generation_configs_ends_count(base, rollouts, tmp_path):
    folder = shutil.copytree(base["model_name_or_path"], tmp_path / "model")
    ends = [*range(0, 256, 2), 257]
    GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    run(tmp_path / "out", base, model_name_or_path=str(folder), max_steps=1)
    for _, completions in rollouts[0]["groups"]:
        assert not any(token in ends for ids in completions for token in ids[:-1])
    assert rollouts[0]["finished"].sum() > 6


def test_completions_are_shown(base, rollouts, tmp_path, capsys):
    run(tmp_path, base, max_steps=2, log_completions_steps=2)
    shown = capsys.readouterr().out
    assert "step 2  prompt" in shown and "step 1  prompt" not in shown
    prompt, completion = rollouts[1]["texts"][0]
    assert prompt in shown and " ".join(completion.split()) in shown


def test_stop_strings_end_a_completion(base, tmp_path):
    through = run(tmp_path / "through", base, max_steps=1, max_completion_length=12)
    stop = {
        "ds3_gather_for_generation": False,
        "stop_strings": list("abcdefghijklmnopqrstuvwxyz"),
        "max_completion_length": 12,
    }
    stopped = run(tmp_path / "stopped", base, max_steps=1, **stop)
    [before], [after] = through.metrics, stopped.metrics
    # one token in ten of a random model is such a letter
    assert after["completions/mean_length"] < before["completions/mean_length"] - 2
    assert after["completions/clipped_ratio"] < before["completions/clipped_ratio"]


def test_a_stop_string_is_looked_for_in_the_completion_alone():
    tokenizer, prompt = AutoTokenizer.from_pretrained(DEMO_MODEL), prompt_ids(0)[0]

    def complete(stop_string=None):
        criteria = stop_string and StopStringCriteria(tokenizer, [stop_string])
        stopped = criteria and (lambda ids: criteria(ids, None))
        [completion], [finished], _ = generate(
            model(), [prompt], 1, 12, end_ids=[257], temperature=0, stopped=stopped
        )
        return tokenizer.decode(completion), finished

    whole, finished = complete()
    across_the_border = tokenizer.decode(prompt)[-1] + whole[0]
    assert across_the_border not in whole
    assert complete(across_the_border) == (whole, finished)
    assert complete(whole[2:5]) == (whole[:5], True)


def test_equal_rewards_teach_nothing(base, tmp_path):
    done = run(tmp_path, base, reward_funcs="grpo_cases:equal", max_steps=2)
    for step in done.metrics:
        assert step["loss"] == step["grad_norm"] == step["reward_std"] == 0
        assert step["frac_reward_zero_std"] == 1 and step["num_scored_tokens"] > 0
    assert worst(done.weights, load_file(Path(base["model_name_or_path"]) / "model.safetensors")) == 0


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        grpo_zero3, "group_advantages", lambda rewards, *_: torch.full((len(rewards),), torch.nan)
    )
    with pytest.raises(FloatingPointError, match="step 1: loss nan, gradient norm .* Prompts 0 to 3"):
        run(tmp_path, base, save_steps=1)
    assert list_checkpoints(tmp_path) == [] and not (tmp_path / "model.safetensors").exists()


def test_the_reward_rises(tmp_path):
    """Of the demo's model on 8 of the demo's prompts, about the half of which it gets right."""
    rows = (ROOT / "demo/prompts.jsonl").read_text().splitlines(keepends=True)[44:52]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    flags = {"dataset_name": str(tmp_path / "prompts.jsonl"), "learning_rate": 3e-4, "max_steps": 12}
    flags |= {"per_device_train_batch_size": 64, "max_completion_length": 32}
    rewards = [step["reward"] for step in run(tmp_path / "out", flags).metrics]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1


def test_an_engine_in_bf16_keeps_rotary_frequencies_in_fp32(base):
    phases = []
    with engine_of({**base, "bf16": True}, watch=phases.append) as engine:
        expected = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"], dtype=torch.bfloat16)
        found = dict(engine.module.named_buffers())
        assert found.keys() == dict(expected.named_buffers()).keys() and found
        for name, buffer in expected.named_buffers():
            assert found[name].dtype == torch.float32 and torch.equal(found[name], buffer)
        assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
        # the watchdog hears of each weight: large models take their time
        for name, _ in engine.module.named_parameters():
            assert phases.count(f"loading {name}") == phases.count(f"loading {name} in fp32") == 1


def test_prompts_come_in_epochs_without_a_gap(base):
    tokenizer = AutoTokenizer.from_pretrained(base["model_name_or_path"])
    prompts = Prompts(Arguments(**base), tokenizer)
    stream = prompts.numbers(0, 36)
    assert [sorted(stream[i : i + 12]) for i in (0, 12, 24)] == [list(range(12))] * 3
    assert stream[:12] != stream[12:24]
    assert [*prompts.numbers(0, 7), *prompts.numbers(7, 29)] == stream
    texts, columns = prompts.columns(stream[:2], 3)
    assert len(texts) == 6 and texts[:3] == [prompts.rows[stream[0]]["prompt"]] * 3
    assert columns == {"wanted": [prompts.rows[i]["wanted"] for i in stream[:2] for _ in range(3)]}


def test_a_completion_in_the_data_is_no_column_of_a_reward(base, tmp_path):
    rows = [{"prompt": "a", "completion": "b", "wanted": "c"}]
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows)}
    prompts = Prompts(Arguments(**flags), AutoTokenizer.from_pretrained(base["model_name_or_path"]))
    assert prompts.reward_columns == ["wanted"] and prompts.columns([0], 2)[1] == {"wanted": ["c", "c"]}
    with pytest.raises(ValueError, match="wants the column completion"):
        run(tmp_path / "out", flags, reward_funcs="grpo_cases:wants_the_completion")


def test_rewards_are_summed_in_fp64(base, tmp_path):
    rewards = "grpo_cases:large,grpo_cases:upper"
    [step] = run(tmp_path, base, reward_funcs=rewards, max_steps=1).metrics
    others = step["reward"] - step["rewards/grpo_cases:upper/mean"]
    assert others == pytest.approx(2**24 + 1, rel=0, abs=0.01)


def test_prompts_end_where_the_answer_begins(base, tmp_path):
    """With the generation prompt, in the middle of a turn that has begun, or with a text's own end."""
    tokenizer = AutoTokenizer.from_pretrained(base["model_name_or_path"])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role[0] }}{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}[a{{ mood or '' }}{% endif %}"
    )
    asked, begun = {"role": "user", "content": "q"}, {"role": "assistant", "content": "so"}
    kwargs = {"chat_template_kwargs": {"mood": "!"}}
    cases = [
        (
            [{"prompt": [asked]}, {"prompt": [asked, begun]}, {"prompt": [asked], **kwargs}],
            ["[uq][a", "[uq][aso"],
        ),
        ([{"prompt": "abc"}], ["abc"]),
    ]
    cases[0][1].append("[uq][a!")
    for rows, expected in cases:
        name = write_jsonl(tmp_path / f"{len(rows)}.jsonl", rows)
        prompts = Prompts(Arguments(**{**base, "dataset_name": name, "max_prompt_length": 32}), tokenizer)
        assert [tokenizer.decode(ids) for ids in prompts.examples["input_ids"]] == expected


def test_long_prompts_keep_their_end(base, tmp_path):
    name = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "0123456789abc"}, {"prompt": "xyz"}])
    tokenizer = AutoTokenizer.from_pretrained(base["model_name_or_path"])
    prompts = Prompts(Arguments(**{**base, "dataset_name": name}), tokenizer)
    assert tokenizer.decode(prompts.examples[0]["input_ids"]) == "56789abc"
    assert prompts.data["examples_truncated"] == 1 and prompts.data["tokens_cut"] == 5


# --- 5. Refusals ---

BAD_FLAGS = [
    ({"max_completion_length": 0}, "--max_completion_length is 0"),
    ({"num_generations": 1}, "--num_generations 1"),
    ({"seed": -1}, "--seed -1"),
    ({"per_device_train_batch_size": 10}, "not a multiple of --num_generations 3.*Choose 9"),
    ({"loss_type": "ppo"}, "--loss_type ppo: choose one of dapo"),
    ({"epsilon": 1.0}, "--epsilon 1.0"),
    ({"epsilon_high": 0.0}, "--epsilon_high 0.0"),
    ({"beta": -0.1}, "--beta is -0.1"),
    ({"temperature": 0.0}, "--temperature 0.0"),
    ({"top_p": 0.0}, "--top_p 0.0"),
    (
        {"warmup_steps": 2, "lr_scheduler_type": "constant"},
        "--warmup_steps 2 needs --lr_scheduler_type constant_with_warmup",
    ),
    ({"collective_timeout_s": float("inf")}, "--collective_timeout_s inf"),
    ({"top_k": -1}, "--top_k -1"),
    ({"stop_strings": ["a", ""]}, '--stop_strings "" would end every completion'),
    ({"max_tokens_per_batch": 25}, "--max_tokens_per_batch 25 is too small: a group may take 26"),
    ({"gather_budget_gib": -1.0}, "--gather_budget_gib -1.0"),
    ({"gather_budget_gib": 1.0, "ds3_gather_for_generation": False}, "drop one"),
    ({"save_steps": 3, "num_iterations": 2}, "--save_steps 3 .* multiple of --num_iterations 2"),
    ({"max_steps": 5, "num_iterations": 2}, "--max_steps 5 .* multiple of --num_iterations 2"),
    ({"offload_param": True}, "add --offload_optimizer"),
    ({"collective_timeout_s": 0.0}, "--collective_timeout_s 0.0"),
    ({"deepspeed": "none.json"}, "--deepspeed none.json"),
    ({"learning_rate": math.nan}, "--learning_rate is nan"),
    ({"max_steps": 0}, "--max_steps 0"),
    ({"reward_funcs": "best"}, "--reward_funcs best: choose last_word, last_number"),
    ({"reward_funcs": "no_such_module:f"}, "no_such_module:f cannot be imported"),
    (
        {"reward_funcs": "last_word"},
        "wants the column answer; beside prompts, completions, completion_ids it is given wanted",
    ),
    (
        {"max_prompt_length": 300},
        r"--max_prompt_length \+ --max_completion_length 306 is over the model's 256",
    ),
]
BAD_DATA = {
    "missing": (None, "none.jsonl does not exist"),
    "no prompt": ([{"text": "a"}], "has the columns text; wanted: prompt"),
    "empty prompt": ([{"prompt": "a"}, {"prompt": ""}], "example 1: the prompt is empty"),
    "a null": ([{"prompt": "a"}, {"prompt": None}], "example 1: "),
    "tools": ([{"prompt": "a", "tools": [{"type": "function"}]}], "example 0: tools is .* do not support"),
    "images": ([{"prompt": "a", "images": ["b.png"]}], "example 0: images is .* do not support"),
    "a weight": (
        [{"prompt": [{"role": "user", "content": "a", "weight": 0}]}],
        "holds conversations|a message of weight 0",
    ),
}


@pytest.fixture(scope="module")
def earlier_run(base, tmp_path_factory):
    """The folder of a finished run of 4 steps with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    run(folder, base, save_steps=2)
    return folder


def assert_refused(folder, flags, message):
    """main raises ValueError with this message, and leaves what is in `folder` as it was."""
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        run(folder, flags)
    assert contents(folder) == before


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_contradictory_flags_are_refused(flags, message, base, earlier_run):
    assert_refused(earlier_run, {**base, "overwrite_output_dir": True, **flags}, message)


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused(name, base, earlier_run, tmp_path):
    rows, message = BAD_DATA[name]
    file = str(tmp_path / "none.jsonl") if rows is None else write_jsonl(tmp_path / "bad.jsonl", rows)
    assert_refused(earlier_run, {**base, "overwrite_output_dir": True, "dataset_name": file}, message)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({}, "holds another run .*--resume_from_checkpoint latest.*--overwrite_output_dir"),
        ({"resume_from_checkpoint": "latest", "seed": 1}, "other data"),
        ({"resume_from_checkpoint": "latest", "max_prompt_length": 3}, "other data"),
        ({"resume_from_checkpoint": "latest", "max_steps": 3}, "past --max_steps 3"),
        ({"resume_from_checkpoint": "latest"}, "has finished its 4 steps: raise --max_steps to go on"),
    ],
)
def test_a_folder_that_holds_another_run_is_refused(flags, message, base, earlier_run):
    assert_refused(earlier_run, {**base, **flags}, message)


def test_a_run_that_was_stopped_after_its_last_step_still_leaves_its_model(base, earlier_run, tmp_path):
    folder = shutil.copytree(earlier_run, tmp_path / "run")
    for name in ("summary.json", "model.safetensors"):
        (folder / name).unlink()
    left = run(folder, base, resume_from_checkpoint="latest").weights
    expected = read_run(earlier_run).weights
    assert all(torch.equal(left[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "function, message",
    [
        (
            "raises",
            r"raised ZeroDivisionError: .* at .*grpo_cases.py:\d+, `return .*; prompt '...', completion",
        ),
        ("too_few", "returned 11 numbers for 12 completions; .*prompt"),
        ("not_a_number", "returned nan; .*prompt 'bcd', completion"),
    ],
)
def test_a_broken_reward_stops_the_run_and_is_named(function, message, base, tmp_path):
    rows = [{"prompt": text} for text in ("abcde", "bcd", "cdef", "defgh")]
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "prompts.jsonl", rows)}
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", flags, reward_funcs=f"grpo_cases:{function}")
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize(
    "flags, answers, message",
    [
        ({"reward_funcs": "grpo_cases:waits"}, "77", "waits is async: make it a plain function"),
        ({"reward_funcs": "grpo_cases:returns_nothing"}, "77", "made-up .* returned None; wanted: a list"),
        ({"reward_funcs": "grpo_cases:takes_no_column"}, "77", "does not take answer: add the parameter"),
        (
            {"reward_funcs": "last_word"},
            "7 ",
            "bad.jsonl, example 1: answer is ' '; --reward_funcs last_word",
        ),
        ({"reward_funcs": "last_number"}, "7x", "bad.jsonl, example 1: answer is 'x'; .* wants a number"),
    ],
)
def test_a_reward_that_never_works_is_refused_before_the_model_is_loaded(
    flags, answers, message, base, tmp_path, monkeypatch
):
    monkeypatch.delattr(grpo_zero3, "load_engine")
    rows = [{"prompt": "abc", "answer": answer} for answer in answers]
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "bad.jsonl", rows), **flags}
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", flags)


def test_a_blank_in_a_csv_file_changes_no_other_answer(base, tmp_path):
    """And is refused itself: with it the completions could earn nothing, and without it they do."""
    path = tmp_path / "rows.csv"
    path.write_text("prompt,answer\nab,7\ncd,\n")
    with pytest.raises(ValueError, match="rows.csv, example 1: answer is None; --reward_funcs last_word"):
        run(tmp_path / "out", base, dataset_name=str(path), reward_funcs="last_word")
    args = Arguments(**{**base, "dataset_name": str(path)})
    prompts = Prompts(args, AutoTokenizer.from_pretrained(base["model_name_or_path"]))
    assert prompts.columns([0], 2)[1] == {"answer": ["7", "7"]}


def test_rewards_are_tried_on_a_group_and_then_given_the_rollouts_ids(base, rollouts, tmp_path, monkeypatch):
    seen = []

    def keeps(prompts, completions, **columns):
        seen.append((completions, columns["completion_ids"]))
        return [0.0] * len(completions)

    monkeypatch.setattr("grpo_cases.equal", keeps)
    run(tmp_path, base, reward_funcs="grpo_cases:equal", max_steps=1)
    (tried, tried_ids), (texts, ids) = seen
    tokenizer = AutoTokenizer.from_pretrained(base["model_name_or_path"])
    assert len(set(tried)) == 1 and tokenizer.batch_decode(tried_ids) == tried and len(tried) == 3
    assert ids == [ids for _, completions in rollouts[0]["groups"] for ids in completions]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"zero_optimization": {"stage": 2}}, "sets stage to 2; the script and its flags say 3: drop it"),
        ({"zero_optimization": {"stage3_param_persistence_threshold": 9}}, "threshold to 9; .* say 0"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "sets offload_param to .* say None"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "sets offload_optimizer to"),
        ({"train_batch_size": 64}, "sets train_batch_size to 64; .* say None"),
        ({"train_micro_batch_size_per_gpu": "auto"}, "sets train_micro_batch_size_per_gpu to auto"),
        ({"gradient_accumulation_steps": 4}, "sets gradient_accumulation_steps to 4"),
        ({"gradient_clipping": 2}, "sets gradient_clipping to 2; .* say 1.0"),
        ({"bf16": {"enabled": True}}, "sets bf16 to {'enabled': True}; .* say {'enabled': False}"),
        ({"fp16": {"enabled": True}}, "sets fp16 to {'enabled': True}; .* say None"),
        ({"optimizer": {"type": "Adam"}}, "sets optimizer to"),
        ({"scheduler": {"type": "WarmupLR"}}, "sets scheduler to"),
        ({"zero_optimization": None}, "ds.json, zero_optimization: found None, wanted a JSON object"),
        ({"bf16": True}, "ds.json, bf16: found True, wanted a JSON object"),
        ([1], r"ds.json: found \[1\], wanted a JSON object"),
    ],
)
def test_deepspeed_settings_that_break_the_script_are_refused(settings, message, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        deepspeed_config(Arguments(deepspeed=str(tmp_path / "ds.json")))


def test_deepspeed_settings_replace_single_ones(tmp_path):
    settings = {"zero_optimization": {"reduce_bucket_size": 7, "stage": 3}, "gradient_clipping": 0.5}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    found = deepspeed_config(Arguments(deepspeed=str(tmp_path / "ds.json"), max_grad_norm=0.5))
    assert found["zero_optimization"]["reduce_bucket_size"] == 7
    assert found["zero_optimization"]["stage"] == 3 and found["gradient_clipping"] == 0.5


# --- 6. Contract ---

METRICS = (
    "step epoch loss reward rewards/grpo_cases:upper/mean reward_std frac_reward_zero_std "
    "completions/mean_length completions/clipped_ratio entropy gathered_bytes_per_token resident_bytes "
    "gather_seconds generation_seconds generation_steps kl clip_ratio grad_norm learning_rate num_tokens "
    "num_scored_tokens tokens_per_second step_seconds update_seconds peak_memory_bytes"
)
SUMMARY = "args versions device world_size data throughput ledger activation_offloading final_metrics"


def parsed():
    return ast.parse(SCRIPT.read_text())


def test_every_flag_is_read_beyond_its_check():
    """args.name or self.args.name, loaded somewhere outside of check_arguments."""
    checks = next(node for node in parsed().body if getattr(node, "name", None) == "check_arguments")
    lines = range(checks.lineno, checks.end_lineno + 1)
    read = {
        node.attr
        for node in ast.walk(parsed())
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.lineno not in lines
        if getattr(node.value, "id", None) == "args" or getattr(node.value, "attr", None) == "args"
    }
    assert {field.name for field in fields(Arguments)} - read == set()


def test_no_flag_is_written():
    written = [node for node in ast.walk(parsed()) if isinstance(node, ast.Attribute)]
    assert not [
        n.attr for n in written if isinstance(n.ctx, ast.Store) and getattr(n.value, "id", None) == "args"
    ]


def test_importing_does_nothing():
    """Only definitions, constants and imports stand at the top; the guard at the end is the one exception."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AugAssign)
    first, *body, last = parsed().body
    assert isinstance(first, ast.Expr) and isinstance(first.value.value, str)
    assert all(isinstance(node, allowed) for node in body)
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"


def test_what_a_run_leaves_behind(base, earlier_run):
    done = read_run(earlier_run)
    assert [list(step) for step in done.metrics] == [METRICS.split()] * 4
    summary = json.loads((earlier_run / "summary.json").read_text())
    assert list(summary) == SUMMARY.split()
    assert summary["final_metrics"] == done.metrics[-1]
    args, throughput = summary["args"], summary["throughput"]
    size = args["per_device_train_batch_size"] * summary["world_size"]
    of_completions = sum(step["completions/mean_length"] * size for step in done.metrics)
    of_prompts = throughput["num_tokens"] - of_completions  # computed once for a group
    of_data = of_completions + of_prompts * args["num_generations"]
    assert throughput["real_tokens_per_second"] * throughput["seconds"] == pytest.approx(of_data)
    ledger = {row["name"]: row for row in summary["ledger"]}
    for name in ("parameters", "gradients", "optimizer", "rollout_weights"):
        assert ledger[name]["measured"] == pytest.approx(ledger[name]["predicted"], rel=0.02)
    saved = AutoModelForCausalLM.from_pretrained(earlier_run)
    before = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"])
    assert saved.config.to_diff_dict() | {"_name_or_path": ""} == before.config.to_diff_dict() | {
        "_name_or_path": ""
    }
    difference = worst(dict(saved.named_parameters()), dict(before.named_parameters()))
    assert 1e-4 < difference < 0.1


def test_the_launchers_flag_is_swallowed(base):
    flags = [
        "--local_rank=1",
        "--max_steps",
        "3",
        "--no_ds3_gather_for_generation",
        "--stop_strings",
        "a",
        "b",
    ]
    args = parse_arguments(Arguments, flags)
    assert (args.max_steps, args.ds3_gather_for_generation, args.stop_strings) == (3, False, ["a", "b"])


def readme_commands():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = [
        line.split("grpo_zero3.py", 1)[1].split() for line in text.splitlines() if "grpo_zero3.py --" in line
    ]
    return commands


def test_the_readmes_commands_are_accepted():
    assert len(readme_commands()) >= 2
    for command in readme_commands():
        (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(command)
        check_arguments(args)


def test_deepspeeds_launcher_runs_the_script(base, tmp_path):
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", "29611"]
    flags = {**base, "output_dir": tmp_path / "out", "max_steps": 1, "per_device_train_batch_size": 6}
    flags = [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(
        [*launcher, SCRIPT, *flags],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["world_size"] == 2


def test_unequal_micro_batches_hang_and_the_watchdog_says_where(base, tmp_path):
    flags = {**base, "output_dir": str(tmp_path), "per_device_train_batch_size": 6}
    flags |= {"max_tokens_per_batch": 26, "collective_timeout_s": 25.0}
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import grpo_zero3
original = grpo_zero3.make_batches

def unequal(*args, **options):
    batches = original(*args, **options)
    return batches[: 1 if grpo_zero3.dist.get_rank() else 2]

grpo_zero3.make_batches = unequal
grpo_zero3.main(grpo_zero3.Arguments(**{flags!r}))
"""
    (tmp_path / "unequal.py").write_text(code)
    returncode, output = ranks(tmp_path / "unequal.py")
    assert returncode != 0
    assert "nothing has moved for" in output and "--collective_timeout_s 25.0" in output
    assert "micro-batch 2 of 2" in output or "optimizer step" in output
