"""GRPO under ZeRO-3: the same tokens from gathered and streamed weights, the naive loss, and exact runs."""

import copy
import functools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import grpo_cases
import grpo_worker
import helpers
import pytest
import torch
from grpo_cases import GROUPS, LIMIT, LOSS_CASES, case_tensors, prompt_ids
from helpers import DEMO_MODEL, FROZEN, freeze_first, read_run, values, worst, write_jsonl, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation import StopStringCriteria

import grpo_zero3
from common import Refusal, offload
from common.folders import list_checkpoints
from common.run import Run, parse_arguments
from common.sharding import read_pretrained
from grpo_zero3 import Arguments, Prompts, generate, generation_weights, group_advantages

TIMEOUT = 500  # DeepSpeed builds an extension at its first use on a CPU
NUM_TINY = sum(p.numel() for p in helpers.tiny_model("llama", vocab_size=261).parameters())
run = functools.partial(helpers.run, grpo_zero3)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with helpers.alone_on_the_cpu(tmp_path_factory.mktemp("cache")) as folder:
        yield folder


# --- 1. What two ranks answered ---

HALF = {"per_device_train_batch_size": 6}  # 12 completions on two ranks, as `base` has on one
GRADUAL = {"num_iterations": 2, "max_steps": 6, "reward_funcs": "grpo_cases:by_column,grpo_cases:upper"}
RESUME = {"resume_from_checkpoint": "latest"}
JOBS = {
    "two": {},
    "streamed": {"ds3_gather_for_generation": False, "max_steps": 2},
    "budget": {"gather_budget_gib": 5e-5, "max_steps": 2},
    "through": {**GRADUAL, "save_steps": 2, "save_total_limit": 2},
    "stopped": GRADUAL,
    "reference": {"beta": 0.2, "max_steps": 3},
    "masked": {"mask_truncated_completions": True, "max_completion_length": 1, "max_steps": 2},
    "offloaded": {"offload_optimizer": True, "offload_param": True, "max_steps": 2},
    "activations on the host": {"activation_offloading": True, "max_steps": 2},
    "broken reward": {"reward_funcs": "grpo_cases:raises_on_the_second_rank"},
    "broken start": {"reward_funcs": "grpo_cases:not_on_the_first_rank"},
    "bf16": {"bf16": True, "max_steps": 1},
}


def launched(folder, ranks=2):
    """Run grpo_worker.py, as DeepSpeed's launcher does. Returns exit code and output."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", ranks, "--master_port", port]
    process = subprocess.Popen(
        list(map(str, [*command, Path(grpo_worker.__file__), folder])),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(helpers.ROOT)},
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


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
        "eval_dataset_name": write_jsonl(folder / "eval.jsonl", [rows[i] for i in (1, 5, 6, 8, 11)]),
        "eval_steps": 3,
    }


Worker = namedtuple("Worker", ["answers", "folder", "base", "output"])


@pytest.fixture(scope="module")
def worker(base, ways, tmp_path_factory):
    """The answers of tests/grpo_worker.py, one for each rank; its folder; the model's log-probabilities."""
    folder = tmp_path_factory.mktemp("worker")
    shutil.copytree(DEMO_MODEL, folder / "model")
    write_model(folder / "odd", hidden_size=27, num_attention_heads=3, num_key_value_heads=1)
    logps = {}
    with torch.no_grad():
        for name, flags in LOSS_CASES.items():
            temperature = flags.get("temperature", 1.0)
            logps[name] = [naive_logps(p, c, temperature).tolist() for p, cs in GROUPS for c in cs]
    jobs = {name: {"flags": {**base, **HALF, **flags}} for name, flags in JOBS.items()}
    for name, job in jobs.items():
        job["flags"]["output_dir"] = str(folder / name)
    # the model is trained with dropout 0.2 in its configuration, and nothing up to its first layer
    dropout = write_model(folder / "dropout", attention_dropout=0.2)
    for name in ("through", "stopped"):
        jobs[name]["flags"]["model_name_or_path"] = dropout
        jobs[name]["freeze"] = True
    jobs["stopped"]["sigterm"] = 1
    jobs["thawed"] = {"flags": jobs["stopped"]["flags"] | RESUME}
    jobs["continued"] = jobs["thawed"] | {"freeze": True}
    counted = {name: ways[name] for name in WAYS[2]}
    for name, content in (("base", logps), ("jobs", jobs), ("ways", counted)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    returncode, output = launched(folder)
    files = [folder / f"rank{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), output[-6000:]
    assert returncode != 0  # for in the end they hang
    return Worker([json.loads(file.read_text()) for file in files], folder, logps, output)


@functools.cache
def model(dtype=torch.float32, name=DEMO_MODEL):
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa")


def distributions(network, prompt, completion, temperature):
    """Of each token of one completion, alone, from all its logits."""
    logits = network(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    return torch.distributions.Categorical(logits=logits[len(prompt) - 1 : -1] / temperature)


def naive_logps(prompt, completion, temperature):
    # in fp64: with the rounding of both sides, a difference would be up to twice that of ours
    found = distributions(model(torch.float64), prompt, completion, temperature)
    return found.log_prob(torch.tensor(completion))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The same of three ranks, about generation alone."""
    folder = tmp_path_factory.mktemp("three")
    shutil.copytree(DEMO_MODEL, folder / "model")
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 96}
    write_model(folder / "qwen2", "qwen2", **sizes)
    write_model(folder / "mistral", "mistral", **sizes, tie_word_embeddings=True)
    returncode, output = launched(folder, ranks=3)
    assert returncode == 0, output[-6000:]
    answers = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(3)]
    return Worker(answers, folder, None, output)


@functools.cache
def unsharded(rank, name):
    """Greedy completions of plain transformers, each prompt alone; twice, as num_generations is 2."""
    found, options = [], {"max_new_tokens": LIMIT, "do_sample": False, "eos_token_id": 257}
    for ids in prompt_ids(rank):
        out = model(name=name).generate(torch.tensor([ids]), **options)
        found += [out[0, len(ids) :].tolist()] * 2
    return found


MODES = [f"demo, {mode}" for mode in ("all", "none", "half", "exact", "byte")] + ["odd, none", "odd, half"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_unsharded_models_tokens_and_puts_all_back(mode, worker):
    """Ranks that stop at different lengths step together. The odd model's shards are padded, on the host."""
    is_odd = mode.startswith("odd")
    expected = [unsharded(rank, str(worker.folder / "odd") if is_odd else DEMO_MODEL) for rank in range(2)]
    longest = [max(map(len, completions)) for completions in expected]
    assert is_odd or longest[0] < longest[1]
    for answers, completions in zip(worker.answers, expected):
        answer = answers[mode]
        assert answer["completions"] == completions
        assert answer["finished"] == [ids[-1] == 257 for ids in completions]
        assert answer["forwards"] == answer["steps"] == max(longest)
        assert answer["restored"]
        assert answers["padded"] > 0 and answers["on host"]


THREE = [f"{name}, {mode}" for name in ("qwen2", "mistral") for mode in ("all", "none", "half", "byte")]


@pytest.mark.parametrize("mode", THREE)
def test_on_three_ranks_too(mode, three):
    """Which divide all rows of these models, embedding and head among them: nothing is left over."""
    name = mode.split(",")[0]
    for rank, answers in enumerate(three.answers):
        answer, expected = answers[mode], unsharded(rank, str(three.folder / name))
        assert answer["completions"] == expected and answer["restored"]
        assert_as_planned(answer)
        assert sum(answer["gathered"][1:]) == 0
        assert (answer["exchanged"][1] > 0) == (not mode.endswith("all"))
        assert answers[f"{name}, short prompts"]
        many = answers[f"{name}, many"]
        assert many["same"] and many["exchanged"] and many["gathered"][0] == many["gathered"][1] > 0
        for mutation in (grpo_worker.other_ranks_rows, grpo_worker.stale_inputs):
            assert answers[f"{name}, {mutation.__name__}"] != expected


def assert_as_planned(answer):
    """The bytes counted at the collectives are those that were announced."""
    costs, (prompt, *tokens) = answer["costs"], answer["gathered"]
    assert prompt == answer["streamed"] == costs["prompt_gathered_bytes"]
    assert set(tokens) == {costs["gathered_bytes_per_token"]}
    assert answer["exchanged"][0] == 0
    assert set(answer["exchanged"][1:]) == {costs["exchanged_bytes_per_token"]}
    assert set(answer["between"]) == {answer["resident"]} == {costs["resident_bytes"]}
    assert answer["budget"] is None or answer["resident"] - answer["small"] <= answer["budget"]
    assert answer["peak"] == answer["resident"] + answer["largest"]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_planned_is_whole_and_travels(mode, worker):
    layer = 4 * sum(p.numel() for p in model().model.layers[0].parameters())
    # for the prompts one gather for each of 5 layers and the embedding, kept for the head; two ranks do not
    # divide its 261 rows: it is gathered for each token
    gathers = {"demo, none": [5 + 1, 1], "demo, all": [0, 0], "demo, exact": [0, 0]}
    for answer in (answers[mode] for answers in worker.answers):
        assert_as_planned(answer)
        assert mode not in gathers or answer["gathers"][:2] == gathers[mode]
        assert (answer["exchanged"][1] > 0) == (mode not in ("demo, all", "demo, exact"))
        # the odd model's embedding and head are larger than a layer
        assert (
            mode in ("demo, none", "demo, byte", *MODES[5:]) or answer["peak"] <= answer["resident"] + layer
        )
    resident = {mode: worker.answers[0][mode]["resident"] for mode in MODES}
    assert resident["demo, all"] == resident["demo, exact"] > 4_000_000
    assert worker.answers[0]["demo, none"]["small"] == resident["demo, byte"] < resident["demo, half"]
    assert resident["demo, half"] < resident["demo, all"]


@pytest.mark.parametrize("error, mode", grpo_worker.BREAKS)
def test_an_exception_in_mid_generation_leaves_a_working_engine(error, mode, worker):
    for answers in worker.answers:
        answer = answers[f"{error.__name__}, {mode}"]
        assert answer["raised"] and answer["restored"] and answer["again"]
        assert answer["step"] == answers["steps"][0]


def test_the_step_after_a_rollout_is_the_step_without(worker):
    for answers in worker.answers:
        first, *others = answers["steps"]
        assert others == [first] * 3
        # each layer once more in backward: checkpointing is on again
        assert first["layer_forwards"] == 2 * first["batches"]


def test_the_weights_are_sharded_and_hooks_that_stay_would_be_seen(worker):
    total = sum(p.numel() for p in model().parameters())
    for answers in worker.answers:
        assert answers["tied"] and total / 2 <= answers["shards"] <= 1.01 * total / 2
        assert set(answers["hooks stay"]["between"]) != {answers["demo, half"]["resident"]}
        assert len(answers["launcher's words"]) == 1 and "local_rank" in answers["launcher's words"][0]


def test_no_extension_is_compiled_for_the_sums_of_a_cpu(worker):
    """A killed run would leave its lock, and all later ones would wait."""
    assert "shm_comm" not in worker.output


def test_unequal_micro_batches_hang_and_the_watchdog_says_where(worker):
    assert "nothing has moved for" in worker.output and "--collective_timeout_s 4.0" in worker.output
    assert "micro-batch 2 of 2" in worker.output or "optimizer step" in worker.output


# --- 2. The loss ---


def naive(name, base):
    """GRPO in one process: every completion alone, every mean written out."""
    args, every = Arguments(**LOSS_CASES[name]), []
    groups, *tensors = case_tensors(name, 0, 1, base)
    pairs = [(prompt, completion) for prompt, completions in groups for completion in completions]
    for pair, a, old, ref, scored in zip(pairs, *tensors):
        logps = naive_logps(*pair, args.temperature)
        old = logps.detach() if name == "on_policy" else old
        ratio, high = torch.exp(logps - old), args.epsilon_high or args.epsilon
        losses = -torch.min(ratio * a, torch.clamp(ratio, 1 - args.epsilon, 1 + high) * a)
        if args.beta:
            losses = losses + args.beta * ((ref - logps).exp() - (ref - logps) - 1)
        every.append(losses if scored else losses[:0])
    kept = [losses for losses in every if len(losses)]
    if args.loss_type == "dapo":
        loss = torch.cat(kept).mean()
    elif args.loss_type == "grpo":
        loss = torch.stack([losses.mean() for losses in kept]).mean()
    elif args.loss_type == "bnpo":
        of_groups = [torch.cat(every[g : g + 3]) for g in range(0, 15, 3)]
        loss = torch.stack([losses.mean() for losses in of_groups if len(losses)]).mean()
    else:
        loss = torch.cat(kept).sum() / (len(kept) * 9)
    model(torch.float64).zero_grad()
    loss.backward()
    return loss.item(), {key: p.grad.clone() for key, p in model(torch.float64).named_parameters()}


@pytest.mark.parametrize("name", LOSS_CASES)
def test_loss_and_gradients_are_the_naive_ones(name, worker):
    first, second = (answers[f"loss {name}"] for answers in worker.answers)
    loss, gradients = naive(name, worker.base[name])
    assert first["sums"] == second["sums"] and first["batches"] >= 2
    assert abs(first["sums"]["loss"] - loss) <= 1e-5
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert worst(load_file(worker.folder / f"{name}.safetensors"), gradients) <= 1e-5 * max(1, largest)
    if name == "dapo":  # a mask off by one would be seen
        assert abs(worker.answers[0]["off by one"]["sums"]["loss"] - loss) > 1e-3


def test_bf16_gradients_are_summed_over_ranks_in_fp32(worker):
    assert all(answers["lost in reduction"] <= 1e-6 for answers in worker.answers)


# --- 3. Whole runs ---


@pytest.fixture(scope="module")
def earlier_run(base, tmp_path_factory):
    """The folder of a finished run of 4 steps with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    run(folder, base, save_steps=2)
    return folder


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def weights_of(name):
    return load_file(Path(name) / "model.safetensors")


def test_two_ranks_are_one_rank(worker, earlier_run):
    one, two = read_run(earlier_run), read_run(worker.folder / "two")
    assert len(one.metrics) == 4 and len(set(values(one, "reward"))) > 1
    helpers.assert_same_curve(two, one)


def test_an_evaluation_is_the_mean_reward_of_greedy_completions(base, earlier_run):
    """Of five prompts, which two ranks do not divide (they are one rank's, above)."""
    steps = read_run(earlier_run).metrics
    assert ["eval_reward" in step for step in steps] == [False, False, True, True]
    trained, tokenizer = model(name=str(earlier_run)), AutoTokenizer.from_pretrained(earlier_run)
    rows, texts = [json.loads(line) for line in open(base["eval_dataset_name"])], []
    for row in rows:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        out = trained.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=257)[0, ids.shape[1] :]
        texts.append((len(out), tokenizer.decode(out, skip_special_tokens=True)))
    rewards = grpo_cases.upper([row["prompt"] for row in rows], [text for _, text in texts])
    assert steps[-1]["eval_reward"] == pytest.approx(sum(rewards) / 5)
    assert steps[-1]["eval_completions/mean_length"] == sum(length for length, _ in texts) / 5


@pytest.mark.parametrize("name", ["streamed", "budget", "offloaded"])
def test_wherever_the_weights_are_the_steps_are_the_same(name, worker):
    found, two = read_run(worker.folder / name), read_run(worker.folder / "two")
    assert len(found.metrics) == 2
    for metric in ("loss", "reward", "entropy"):
        assert values(found, metric) == pytest.approx(values(two, metric)[:2], abs=1e-5)
    assert values(found, "grad_norm") == pytest.approx(values(two, "grad_norm")[:2], rel=1e-4)


def test_activations_that_wait_on_the_host_change_no_bit(worker):
    name = "activations on the host"
    found, two = read_run(worker.folder / name), read_run(worker.folder / "two")
    for metric in ("loss", "grad_norm", "reward"):
        assert values(found, metric) == values(two, metric)[:2]
    # the input of one of two layers, and the angles of the rotary embedding
    assert summary_of(worker.folder / name)["activation_offloading"]["offloaded_bytes"] > 0


def test_bf16_follows_fp32(worker):
    bf16, fp32 = (read_run(worker.folder / name).metrics[0] for name in ("bf16", "two"))
    # a few of the sampled tokens are others
    for name, tolerance in (("entropy", 0.05), ("grad_norm", 0.3)):
        assert bf16[name] == pytest.approx(fp32[name], rel=tolerance) and bf16[name] != fp32[name]


def test_the_metrics_tell_the_ways_apart(worker):
    names = ("two", "budget", "streamed")
    first = [read_run(worker.folder / name).metrics[0] for name in names]
    gathered, exchanged, resident = (
        [s[name] for s in first]
        for name in ("prompt_gathered_bytes", "exchanged_bytes_per_token", "resident_bytes")
    )
    assert 0 == gathered[0] < gathered[1] < gathered[2] and 0 == exchanged[0] < exchanged[1] <= exchanged[2]
    assert resident[0] > 5e-5 * 2**30 + resident[2] >= resident[1] > resident[2] > 0
    for name, stay in zip(names, resident):
        whole = helpers.bytes_of(summary_of(worker.folder / name))["rollout_weights"]
        assert stay + (name != "two") <= whole <= 4 * NUM_TINY


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(worker):
    """SIGTERM reaches one rank in the second rollout, with step 3 of 3 and 4."""
    through, continued = read_run(worker.folder / "through"), read_run(worker.folder / "stopped")
    assert [a["job stopped"]["returned"] for a in worker.answers] == [{"stopped_at_step": 4}] * 2
    assert len(through.metrics) == 6 and len(set(values(through, "entropy"))) == 3
    helpers.assert_same_bits(continued, through)
    assert [step for step, _ in list_checkpoints(worker.folder / "stopped")] == [4]
    assert [step for step, _ in list_checkpoints(worker.folder / "through")] == [4, 6]  # the newest are kept
    assert not [p for p in (worker.folder / "through").iterdir() if p.suffix in (".tmp", ".deleted")]


def assert_frozen(folder, came, gradient_buffers=1):
    """What a run under helpers.freeze_first leaves."""
    for name, weight in weights_of(folder).items():
        assert torch.equal(weight, came[name]) == name.startswith(FROZEN), name
    trained, summary = (
        sum(w.numel() for name, w in came.items() if not name.startswith(FROZEN)),
        summary_of(folder),
    )
    counts, world = helpers.bytes_of(summary), summary["world_size"]
    held = (counts["gradients"], counts["optimizer"])
    assert held == (4 * trained / world * gradient_buffers, 12 * trained / world)


def test_frozen_layers_cost_their_weights_alone(worker):
    folder = worker.folder / "through"
    assert_frozen(folder, weights_of(worker.folder / "dropout"))
    states = [torch.load(path, weights_only=False) for path in folder.rglob("*_model_states.pt")]
    assert states and all(state["frozen_param_fragments"] is None for state in states)
    assert not [name for state in states for name in state["module"] if name.startswith(FROZEN)]
    for answers in worker.answers:
        assert "its frozen parameters and this run's differ" in answers["job thawed"]["error"]


@pytest.mark.parametrize("dtype, offload", [(torch.bfloat16, False), (torch.float32, True)])
def test_frozen_layers_in_bf16_and_on_the_host(dtype, offload, base, tmp_path, monkeypatch):
    """They leave to the bit as they came, also in fp32, of which the shards hold a rounded copy."""
    in_graph = freeze_first(grpo_zero3, monkeypatch)
    name = write_model(tmp_path / "model", dtype=dtype)
    flags = {"model_name_or_path": name, "bf16": True, "offload_optimizer": offload, "max_steps": 2}
    run(tmp_path / "out", base, weight_decay=0.1, learning_rate=1e-2, **flags)
    assert in_graph and not any(in_graph)
    assert_frozen(tmp_path / "out", weights_of(name), gradient_buffers=1 + offload)


def test_a_resumed_run_on_the_host_is_the_uninterrupted_one(base, tmp_path):
    """Up to the powers of beta, which DeepSpeedCPUAdam takes anew."""
    flags = {**base, "offload_optimizer": True, "max_completion_length": 4}
    through = run(tmp_path / "through", flags, save_steps=2)
    checkpoint = str(tmp_path / "through/checkpoint-2")
    resumed = run(tmp_path / "resumed", flags, resume_from_checkpoint=checkpoint)
    assert values(resumed, "step") == [3, 4]
    helpers.assert_same_curve(resumed, through._replace(metrics=through.metrics[2:]))
    assert worst(resumed.weights, through.weights) <= 1e-6


def test_a_resumed_run_decays_by_its_own_flag(base, earlier_run, tmp_path, monkeypatch):
    seen, save = [], grpo_zero3.save_model

    def save_model(run, engine, pretrained):
        seen.append([group["weight_decay"] for group in engine.optimizer.param_groups])
        save(run, engine, pretrained)

    monkeypatch.setattr(grpo_zero3, "save_model", save_model)
    run(tmp_path, base, weight_decay=0.2, resume_from_checkpoint=str(earlier_run / "checkpoint-2"))
    assert seen == [[0.2, 0.0]]


def test_a_run_that_was_stopped_after_its_last_step_still_leaves_its_model(base, earlier_run, tmp_path):
    folder = shutil.copytree(earlier_run, tmp_path / "run")
    for name in ("summary.json", "model.safetensors"):
        (folder / name).unlink()
    assert worst(run(folder, base, **RESUME).weights, weights_of(earlier_run)) == 0


def test_the_first_iteration_is_on_policy_and_the_others_are_not(base, worker, tmp_path):
    """The old log-probabilities are those of the rollout."""
    two, kl = read_run(worker.folder / "two"), values(read_run(worker.folder / "reference"), "kl")
    assert values(two, "clip_ratio") == values(two, "kl") == [0] * 4
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[2] > 1e-5
    ratios = values(run(tmp_path, base, num_iterations=3, max_steps=6, epsilon=1e-5), "clip_ratio")
    assert ratios[0] == ratios[3] == 0
    # every token has moved, about half of them the way that the clip holds up
    assert all(0.2 < ratios[i] < 0.9 for i in (1, 2, 4, 5))


def test_a_rollout_without_a_scored_token_changes_nothing(worker, base):
    masked = read_run(worker.folder / "masked")
    assert worst(masked.weights, weights_of(base["model_name_or_path"])) == 0
    for step in masked.metrics:
        assert step["loss"] == step["grad_norm"] == step["num_scored_tokens"] == step["num_tokens"] == 0
        assert step["completions/clipped_ratio"] == 1 and all(map(math.isfinite, step.values()))


CULPRITS = [
    ("broken reward", 1, "raises_on_the_second_rank raised ZeroDivisionError"),
    ("broken start", 0, "not_on_the_first_rank cannot be imported"),
]


@pytest.mark.parametrize("name, culprit, message", CULPRITS)
def test_what_fails_on_one_rank_ends_all(name, culprit, message, worker):
    """In step: the same processes made the runs after it."""
    errors = [answers[f"job {name}"]["error"] for answers in worker.answers]
    assert message in errors[culprit] and errors[culprit].startswith("Refusal: ")
    assert errors[1 - culprit] == "Refusal: another rank cannot go on; its own message says why."


# --- 4. Functions ---


@contextmanager
def engine_of(flags, tmp_path, **options):
    """The tiny model in an engine of one rank, and its run."""
    args = Arguments(**{**flags, "output_dir": str(tmp_path / "none")})
    with Run(args, "GRPO") as one, grpo_zero3.deepspeed_groups(one):
        yield grpo_worker.engine_of(one, **options), one


def test_advantages_are_those_of_each_group():
    rewards = torch.tensor([0.0, 1.0, 2.0, 10.0, 10.0, 16.0])
    found = group_advantages(rewards, 3)
    for group, advantages in zip(rewards.split(3), found.split(3)):
        assert worst(advantages, (group - group.mean()) / (group.std() + 1e-4)) <= 1e-6
    assert worst(found, group_advantages(rewards, 6)) > 0.1  # across groups
    assert group_advantages(rewards, 3, scale_rewards=False).tolist() == [-1, 0, 1, -2, -2, 4]
    with pytest.raises(ValueError, match="5 rewards are no whole groups of num_generations 3"):
        group_advantages(rewards[:5], 3)


@pytest.mark.parametrize("scale_rewards", [True, False])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1e8])
def test_equal_rewards_give_exactly_0(reward, scale_rewards):
    found = group_advantages(torch.tensor([reward] * 6 + [1.0, 2.0, 3.0]), 3, scale_rewards)
    assert found[:6].tolist() == [0.0] * 6 and found[6:].abs().sum() > 0


def draw(logits, uniform, **options):
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    return grpo_zero3.sample(logits.expand(len(uniform), -1), uniform, **options)


def test_sampling_has_the_softmaxs_frequencies():
    logits = torch.tensor([[1.0, -1.0, 0.5, 3.0, -20.0]])
    uniform = torch.linspace(0, 1, 20_001)[:-1]
    for temperature in (0.5, 1.0, 2.0):
        ids, entropy = draw(logits, uniform, temperature=temperature)
        expected = torch.distributions.Categorical(logits=logits[0] / temperature)
        assert worst(ids.bincount(minlength=5) / len(ids), expected.probs) <= 2e-4
        assert entropy[0].item() == pytest.approx(expected.entropy().item(), rel=1e-5)


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([[0.1, 0.5, 0.3, 0.06, 0.04]]).log()
    uniform = torch.linspace(0, 1, 10_001)[:-1]

    def shares(**options):
        return (draw(logits, uniform, **options)[0].bincount(minlength=5) / 10_000).tolist()

    assert shares(top_k=2) == pytest.approx([0, 0.625, 0.375, 0, 0], abs=1e-3)
    # top_p of what top_k has left: 0.5 of 0.8 is 0.625
    assert shares(top_k=2, top_p=0.6) == [0, 1, 0, 0, 0]
    assert shares(top_p=0.5) == shares(top_k=1) == shares(temperature=0) == [0, 1, 0, 0, 0]
    assert shares(top_p=0.81) == pytest.approx([1 / 9, 5 / 9, 3 / 9, 0, 0], abs=1e-3)
    assert shares(top_k=9) == pytest.approx([0.1, 0.5, 0.3, 0.06, 0.04], abs=1e-3)


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
def test_logits_that_are_not_finite_on_any_rank_end_the_rollout(here, elsewhere, monkeypatch):
    broken, one = copy.deepcopy(model()), helpers.OneRank()
    if here:
        broken.lm_head.weight.data[7] = math.nan
    monkeypatch.setattr(one, "sum", lambda counts: counts | {"broken": counts["broken"] + elsewhere})
    args = Arguments(num_generations=3, max_completion_length=4)
    with pytest.raises(FloatingPointError, match="token 1: the logits of [13] completions are not finite"):
        generate(broken, prompt_ids(0)[:1], args, one, end_ids=[257], uniform=torch.zeros(3, 4))


@pytest.mark.parametrize("offload", [False, True])
def test_one_rank_streams_its_own_shards(offload, base, tmp_path, monkeypatch):
    """And a rollout that cannot begin leaves all as it was."""
    args = Arguments(num_generations=2, max_completion_length=6, temperature=0.0)
    flags = {**base, "offload_optimizer": offload, "offload_param": offload}
    with engine_of(flags, tmp_path) as (engine, one):
        parameters, found = list(engine.module.parameters()), []
        for budget in (None, 0, grpo_zero3.whole_bytes(parameters) // 2):
            with generation_weights(engine, budget) as whole:
                found.append(generate(whole, [[5, 6, 7], [8]], args, one, end_ids=[]))
            assert all(p.numel() == 0 for p in parameters)
        assert found[0] == found[1] == found[2] and len(found[0][0]) == 4
        before = grpo_worker.state(engine)

        def fail(*_):
            monkeypatch.undo()
            raise RuntimeError("not today")

        for name in ("eval", "set_attn_implementation"):
            monkeypatch.setattr(engine.module, name, fail)
            with pytest.raises(RuntimeError, match="not today"), generation_weights(engine, None):
                pass
            assert grpo_worker.state(engine) == before


def test_clip_and_kl_of_single_tokens():
    old, advantages = torch.zeros(6), torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    ratio = torch.tensor([0.7, 1.0, 1.5, 0.7, 1.0, 1.5])
    ref = torch.tensor([0.5, 0.0, -0.5, 0.1, -2.0, 1.0])
    loss = functools.partial(
        grpo_zero3.grpo_loss, ratio.log(), old, advantages, epsilon=0.2, epsilon_high=0.4
    )
    losses, kl, clipped = loss()
    assert worst(losses, -torch.tensor([0.7, 1.0, 1.4, -0.8, -1.0, -1.5])) <= 1e-6
    assert clipped.tolist() == [False, False, True, True, False, False] and kl.tolist() == [0] * 6
    with_kl, kl, _ = loss(beta=0.3, ref_per_token_logps=ref)
    quotient = ref.exp() / ratio
    assert worst(kl, quotient - quotient.log() - 1) <= 1e-6
    assert worst(with_kl, losses + 0.3 * kl) <= 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prompts_of_any_length_are_completed_as_alone(family):
    """gpt2 has learned positions: padding on the left must not shift them."""
    tiny = helpers.tiny_model(family, attn_implementation="sdpa", eos_token_id=63)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
    args = Arguments(num_generations=2, max_completion_length=9, temperature=0.0)
    completions = generate(tiny, prompts, args, helpers.OneRank(), end_ids=[63])[0]
    for i, prompt in enumerate(prompts):
        out = tiny.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=63)
        assert completions[2 * i] == completions[2 * i + 1] == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("flags", [{"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}, {}])
def test_sampling_flags_reach_the_rollout(flags):
    """Each of these leaves the likeliest token alone: all completions of a group are one."""
    args, uniform = Arguments(num_generations=3, max_completion_length=6, **flags), torch.rand(3, 6)
    a, b, c = generate(model(), prompt_ids(0)[:1], args, helpers.OneRank(), end_ids=[], uniform=uniform)[0]
    assert (a == b == c) == bool(flags) and len(a) == 6


def test_a_stop_string_is_looked_for_in_the_completion_alone():
    tokenizer, prompt = AutoTokenizer.from_pretrained(DEMO_MODEL), prompt_ids(0)[0]
    args = Arguments(max_completion_length=12, temperature=0.0, num_generations=2)

    def complete(stop_string=None):
        criteria = stop_string and StopStringCriteria(tokenizer, [stop_string])
        stopped = criteria and (lambda ids: criteria(ids, None))
        found = generate(model(), [prompt], args, helpers.OneRank(), end_ids=[257], stopped=stopped)
        return tokenizer.decode(found[0][0]), found[1][0]

    whole, finished = complete()
    across_the_border = tokenizer.decode(prompt)[-1] + whole[0]
    assert across_the_border not in whole
    assert complete(across_the_border) == (whole, finished)
    assert complete(whole[2:5]) == (whole[:5], True)


def test_a_reference_has_no_dropout_and_bf16_keeps_rotary_frequencies_in_fp32(base, tmp_path):
    name = write_model(tmp_path / "model", attention_dropout=0.5)
    flags = {**base, "model_name_or_path": name, "bf16": True}
    with engine_of(flags, tmp_path, trainable=False) as (reference, one), torch.no_grad():
        [row] = grpo_zero3.make_batches([([5], [[6, 7, 8]])], torch.ones(1), torch.ones(1), 9, one)
        first, second = (grpo_zero3.per_token_logps(reference, row, one.args) for _ in range(2))
        assert torch.equal(first, second)
        expected = dict(model(torch.bfloat16, base["model_name_or_path"]).named_buffers())
        found = dict(reference.module.named_buffers())
        assert {buffer.dtype for buffer in found.values()} == {torch.float32}
        assert worst(found, expected) == 0
        assert {p.dtype for p in reference.module.parameters()} == {torch.bfloat16}


def test_a_row_that_mixes_completions_is_refused_before_training(base, tmp_path, monkeypatch):
    """Completions that begin where the prompt does; and whoever drops the proof trains on that."""
    original = grpo_zero3.flatten_shared_prompt

    def shifted(groups):
        row = original(groups)
        row["position_ids"][0, len(groups[0][0]) :] -= 1
        return row

    monkeypatch.setattr(grpo_zero3, "flatten_shared_prompt", shifted)
    with pytest.raises(Refusal, match="computes something else where completions share a prompt"):
        run(tmp_path / "out", base, max_steps=1)
    assert not (tmp_path / "out").exists()
    assert len(run(tmp_path / "out", base, max_steps=1, check_exact=False).metrics) == 1


@pytest.fixture
def rollouts(monkeypatch):
    """What each rollout of the test's runs holds, in order."""
    found, original = [], grpo_zero3.prepare_update

    def record(rollout, *args):
        found.append(rollout)
        return original(rollout, *args)

    monkeypatch.setattr(grpo_zero3, "prepare_update", record)
    return found


def completions_of(rollout):
    return [(prompt, ids) for prompt, completions in rollout["groups"] for ids in completions]


@pytest.mark.parametrize("scale_rewards", [True, False])
def test_the_first_steps_metrics_are_those_of_its_completions(scale_rewards, base, rollouts, tmp_path):
    flags = {"reward_funcs": "grpo_cases:spread", "temperature": 0.7, "stop_strings": list("aeiouxyz")}
    flags |= {"scale_rewards": scale_rewards, "mask_truncated_completions": not scale_rewards}
    [step] = run(tmp_path, base, **flags, max_completion_length=12, max_steps=1).metrics
    [rollout] = rollouts
    network, entropies = model(name=base["model_name_or_path"]), []
    for prompt, ids in completions_of(rollout):
        entropies += distributions(network, prompt, ids, 0.7).entropy().tolist()
    lengths, finished = [len(ids) for _, ids in completions_of(rollout)], rollout["finished"].tolist()
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


def test_all_is_scored_at_the_temperature_of_sampling(base, rollouts, tmp_path, monkeypatch):
    """By policy and reference, in both steps of a rollout; and the next one of equal prompts draws anew."""
    scored, original = [], grpo_zero3.per_token_logps

    def record(*args):
        logps = original(*args)
        scored.append(logps.detach())
        return logps

    monkeypatch.setattr(grpo_zero3, "per_token_logps", record)
    flags = {"temperature": 0.7, "num_iterations": 2, "max_steps": 4, "beta": 0.1, "learning_rate": 0.0}
    flags |= {"dataset_name": write_jsonl(tmp_path / "same.jsonl", [{"prompt": "abc"}] * 4)}
    run(tmp_path / "out", base, **flags, check_exact=False)
    network, expected = model(name=base["model_name_or_path"]), []
    for prompt, ids in completions_of(rollouts[0]):
        expected += distributions(network, prompt, ids, 0.7).log_prob(torch.tensor(ids)).tolist()
    for found in torch.cat(scored)[: 3 * len(expected)].split(len(expected)):
        assert worst(found, torch.tensor(expected)) <= 1e-5
    first, second = (rollout["groups"] for rollout in rollouts)
    assert [prompt for prompt, _ in first] == [prompt for prompt, _ in second] and first != second
    assert len({str(group) for group in first}) > 1  # nor do a rollout's groups share their numbers


def test_the_kl_that_is_shown_is_the_one_in_the_loss(base, tmp_path):
    """With one token each, a group's advantages cancel, and the loss is beta times the divergence."""
    flags = {"max_completion_length": 1, "beta": 0.5, "learning_rate": 1e-2, "max_steps": 3}
    last = run(tmp_path, base, **flags).metrics[-1]
    assert last["kl"] > 1e-4 and last["loss"] == pytest.approx(0.5 * last["kl"], abs=1e-6)


def test_equal_rewards_teach_nothing_and_weights_decay(base, tmp_path):
    flags = {"reward_funcs": "grpo_cases:equal", "learning_rate": 0.01, "weight_decay": 0.5, "max_steps": 1}
    done = run(tmp_path, base, **flags)
    [step] = done.metrics
    assert step["loss"] == step["grad_norm"] == step["reward_std"] == 0
    assert step["frac_reward_zero_std"] == 1 and step["num_scored_tokens"] > 0
    came = weights_of(base["model_name_or_path"])
    decayed = {name: weight * (1 - 0.01 * 0.5 * ("norm" not in name)) for name, weight in came.items()}
    assert worst(done.weights, decayed) <= 1e-6


def test_what_a_rollout_is_given_and_gives(base, rollouts, tmp_path, monkeypatch, capsys):
    """Ends of the generation's configuration; rewards in fp64, tried on a group, then given the ids."""
    seen, ends = [], [*range(0, 256, 2), 257]

    def keeps(prompts, completions, **columns):
        seen.append((completions, columns["completion_ids"]))
        return [0.0] * len(completions)

    monkeypatch.setattr("grpo_cases.equal", keeps)
    folder = shutil.copytree(base["model_name_or_path"], tmp_path / "model")
    GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    flags = {"reward_funcs": "grpo_cases:large,grpo_cases:upper,grpo_cases:equal", "log_completions_steps": 2}
    flags |= {"eval_dataset_name": None, "eval_steps": None, "model_name_or_path": str(folder)}
    first, _ = run(tmp_path / "out", base, max_steps=2, **flags).metrics
    expected = [ids for _, ids in completions_of(rollouts[0])]
    assert not any(token in ends for ids in expected for token in ids[:-1])
    assert rollouts[0]["finished"].sum() > 6
    others = first["reward"] - first["rewards/grpo_cases:upper/mean"]
    assert others == pytest.approx(2**24 + 1, rel=0, abs=0.01)
    (tried, tried_ids), (texts, ids), _ = seen
    tokenizer = AutoTokenizer.from_pretrained(base["model_name_or_path"])
    assert len(set(tried)) == 1 and tokenizer.batch_decode(tried_ids) == tried and len(tried) == 3
    assert ids == expected and tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    shown = capsys.readouterr().out
    prompt, completion = rollouts[1]["texts"][0]
    assert "step 2  reward" in shown and "step 1  reward" not in shown
    assert prompt in shown and " ".join(completion.split()) in shown and "in the last 2" in shown


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(base, tmp_path, monkeypatch):
    nan = torch.full((12,), torch.nan)
    monkeypatch.setattr(grpo_zero3, "group_advantages", lambda *_: nan)
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan, gradient norm .* Prompts \["):
        run(tmp_path, base, save_steps=1)
    assert list_checkpoints(tmp_path) == [] and not (tmp_path / "model.safetensors").exists()


def test_the_reward_rises(base, tmp_path):
    flags = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 24}
    rewards = values(run(tmp_path, base, **flags), "reward")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def prompts_of(base, template=None, **flags):
    tokenizer = AutoTokenizer.from_pretrained(base["model_name_or_path"])
    tokenizer.chat_template = template
    return Prompts(Arguments(**base | flags), tokenizer)


def test_prompts_come_in_epochs_without_a_gap(base):
    prompts = prompts_of(base, per_device_train_batch_size=15)  # 5 of 12 prompts
    progress, stream = {"epoch": 0, "done": 0}, []
    for _ in range(8):
        stream += prompts.next_rollout(progress)
        assert prompts.advance(progress, stream[-5:]) == len(stream) / 12
    assert [sorted(stream[i : i + 12]) for i in (0, 12, 24)] == [list(range(12))] * 3
    assert stream[:12] != stream[12:24] and progress == {"epoch": 3, "done": 4}
    prompts.args = replace(prompts.args, max_steps=-1, num_train_epochs=2.0, num_iterations=2)
    assert prompts.count_steps({"step": 4, "epoch": 0, "done": 10}) == 4 + 3 * 2


def test_a_completion_in_the_data_is_no_column_of_a_reward(base, tmp_path):
    rows = [{"prompt": "a", "completion": "b", "wanted": "c"}]
    prompts, seen = prompts_of(base, dataset_name=write_jsonl(tmp_path / "rows.jsonl", rows)), []

    def keeps(prompts, completions, **columns):
        seen.append((prompts, columns))
        return [0.0] * 3

    ids = [[65], [66], [67, 257]]
    rewards, texts = prompts.judge({"keeps": keeps}, [0], ids)
    assert rewards == {"keeps": [0.0] * 3} and texts == [("a", "b"), ("a", "c"), ("a", "d")]
    assert seen == [(["a"] * 3, {"wanted": ["c"] * 3, "completion_ids": ids})]


def test_prompts_end_where_the_answer_begins(base, tmp_path):
    """With the generation prompt, in the middle of a turn that has begun, or with a text's own end."""
    template = (
        "{% for m in messages %}[{{ m.role[0] }}{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}[a{{ mood or '' }}{% endif %}"
    )
    asked, begun = {"role": "user", "content": "q"}, {"role": "assistant", "content": "so"}
    mood = {"chat_template_kwargs": {"mood": "!"}}
    chats = [{"prompt": [asked]}, {"prompt": [asked, begun]}, {"prompt": [asked], **mood}]
    texts = [{"prompt": "abc"}, {"prompt": "0123456789abc"}]
    for rows, expected in ((chats, ["[uq][a", "[uq][aso", "[uq][a!"]), (texts, ["abc", "56789abc"])):
        name = write_jsonl(tmp_path / f"{len(rows)}.jsonl", rows)
        prompts = prompts_of(base, template, dataset_name=name)
        assert [prompts.tokenizer.decode(ids) for ids in prompts.examples["input_ids"]] == expected
    # of the texts, a long one keeps its end
    assert prompts.data["examples_truncated"] == 1 and prompts.data["tokens_cut"] == 5


# --- 5. Refusals ---

BAD_FLAGS = [  # of bounds, an example of each
    ({"per_device_train_batch_size": 10}, "not a multiple of --num_generations 3.*Choose 9"),
    ({"loss_type": "ppo"}, "--loss_type is 'ppo'; choose one of dapo"),
    ({"epsilon": 1.0}, "--epsilon is 1.0"),
    ({"temperature": 0.0}, "--temperature is 0.0"),
    ({"top_p": 1.1}, "--top_p is 1.1"),
    ({"stop_strings": ["a", ""]}, '--stop_strings "" would end every completion'),
    ({"max_tokens_per_batch": 25}, "--max_tokens_per_batch 25 is too small: a group may take 26"),
    ({"gather_budget_gib": 1.0, "ds3_gather_for_generation": False}, "drop one"),
    ({"save_steps": 3, "num_iterations": 2}, "--save_steps 3 .* multiple of --num_iterations 2"),
    ({"max_steps": 5, "num_iterations": 2}, "--max_steps 5 .* multiple of --num_iterations 2"),
    ({"offload_param": True}, "add --offload_optimizer"),
    ({"activation_offloading": True, "gradient_checkpointing": False}, "drop --no_gradient_checkpointing"),
    ({"use_liger_kernel": True, "torch_compile": True}, "drop one of the two"),
    ({"use_liger_kernel": True}, "drop --use_liger_kernel"),
    ({"reward_funcs": "best"}, "--reward_funcs best: choose last_word, last_number"),
    ({"reward_funcs": "grpo_cases:returns_nothing"}, "made-up .* returned None; wanted: a list"),
    ({"max_prompt_length": 300}, r"max_prompt_length \+ --max_completion_length 306 is over the model's 256"),
]
BAD_ROWS = [
    ({"text": "a"}, "has the columns text; wanted: prompt"),
    ({"prompt": ""}, "example 1: the prompt is empty"),
    ({"prompt": None}, "example 1: "),
    ({"prompt": "a", "answer": " "}, "example 1: answer is"),
]
BAD_FOLDERS = [
    ({}, "holds another run .*--resume_from_checkpoint latest.*--overwrite_output_dir"),
    ({**RESUME, "seed": 1}, "its data and this run's differ"),
    ({**RESUME, "max_prompt_length": 3}, "its data and this run's differ"),
    ({**RESUME, "num_iterations": 2}, "its num iterations and this run's differ"),
    ({**RESUME, "max_steps": 3}, "past --max_steps 3"),
    (RESUME, "has finished its 4 steps: raise --max_steps to go on"),
]


def assert_refused(folder, flags, message):
    """Before the model is loaded, and `folder` is left as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(grpo_zero3, "load_engine")
        helpers.assert_refused(grpo_zero3, folder, flags, message)


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_contradictory_flags_are_refused(flags, message, base, earlier_run):
    assert_refused(earlier_run, {**base, "overwrite_output_dir": True, **flags}, message)


@pytest.mark.parametrize("row, message", BAD_ROWS)
def test_bad_data_is_refused(row, message, base, earlier_run, tmp_path):
    name = write_jsonl(tmp_path / "bad.jsonl", [dict.fromkeys(row, "7"), row])
    reward = "last_word" if "answer" in row else base["reward_funcs"]
    flags = {"overwrite_output_dir": True, "dataset_name": name, "reward_funcs": reward}
    assert_refused(earlier_run, base | flags, message)


@pytest.mark.parametrize("flags, message", BAD_FOLDERS)
def test_a_folder_that_holds_another_run_is_refused(flags, message, base, earlier_run):
    assert_refused(earlier_run, {**base, **flags}, message)


def test_another_number_of_ranks_is_refused(base, worker, tmp_path):
    folder = shutil.copytree(worker.folder / "stopped", tmp_path / "run")
    (folder / "summary.json").unlink()
    message = "its world size and this run's differ.*resume with 2 ranks"
    assert_refused(folder, base | HALF | GRADUAL | RESUME, message)


class Evil:
    """Would make a file as it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_a_damaged_checkpoint_is_refused_and_runs_no_code(base, tmp_path):
    flags, out, ran = (
        {**base, "max_steps": 2, "eval_dataset_name": None, "eval_steps": None},
        {},
        tmp_path / "ran",
    )
    run(tmp_path / "run", flags, save_steps=1)
    for name, pattern in (("model", "*model_states.pt"), ("optimizer", "*optim_states.pt")):
        for damage in ("evil", "half", "empty", "missing"):
            folder = tmp_path / f"{name} {damage}"
            shutil.copytree(tmp_path / "run/checkpoint-1", folder / "checkpoint-1")
            [file] = folder.rglob(pattern)
            content = file.read_bytes()
            if damage == "evil":
                torch.save({"module": Evil(ran), "optimizer_state_dict": Evil(ran)}, file)
            elif damage == "missing":
                file.unlink()
            else:
                file.write_bytes(content[: len(content) // 2 if damage == "half" else 0])
            with pytest.raises(
                Refusal, match="checkpoint-1 cannot be read; take another checkpoint"
            ) as raised:
                run(folder, flags, resume_from_checkpoint="latest")
            out[name, damage] = str(raised.value)
    assert not ran.exists()
    for name in ("model", "optimizer"):
        assert out[name, "evil"].endswith("(it holds more than tensors and plain values)")


def test_a_broken_reward_stops_the_run_and_is_named(base, tmp_path):
    rows = [{"prompt": text} for text in ("abcde", "bcd", "cdef", "defgh")]
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "prompts.jsonl", rows)}
    message = r"raised ZeroDivisionError: .* at .*grpo_cases.py:\d+, `return .*; prompt '...', completion"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", flags, reward_funcs="grpo_cases:raises")
    assert not (tmp_path / "out/model.safetensors").exists()


def test_the_last_page_tells_how_the_reward_rose(base, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"reward": {i}}}\n' for i in range(25)))
    [line] = grpo_zero3.describe_rewards(tmp_path)
    assert line == ("reward", "0.500 in the first 2 steps, 23.500 in the last 2")
    # a checkpoint of the last step, resumed elsewhere, leaves the model and no step
    flags = {**base, "max_steps": 1, "eval_dataset_name": None, "eval_steps": None}
    run(tmp_path / "run", flags, save_steps=1)
    args = Arguments(**flags, output_dir=str(tmp_path / "other"))
    args.resume_from_checkpoint = str(tmp_path / "run/checkpoint-1")
    assert grpo_zero3.main(args)["final_metrics"] == {} and (tmp_path / "other/model.safetensors").exists()


# --- 6. Bytes ---

SIZES = {"max_prompt_length": 64, "max_completion_length": 6, "per_device_train_batch_size": 8}
WAYS = {  # of so many ranks
    1: {
        "none, bf16": {"ds3_gather_for_generation": False, "bf16": True},
        "no checkpointing": {"gradient_checkpointing": False},
    },
    2: {
        "half": {"gather_budget_gib": 2e-4},
        "three micro-batches": {"per_device_train_batch_size": 24, "ds3_gather_for_generation": False},
    },
}


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """{name: flags} of what is counted, with a model of a hundred thousand parameters."""
    name = write_model(tmp_path_factory.mktemp("bytes"), hidden_size=64, intermediate_size=128, head_dim=16)
    return {way: {**SIZES, "model_name_or_path": name, **flags} for way, flags in (WAYS[1] | WAYS[2]).items()}


@pytest.mark.parametrize("world, name", [(world, name) for world in WAYS for name in WAYS[world]])
def test_a_dry_run_counts_what_a_step_holds(world, name, ways, worker, tmp_path, monkeypatch):
    grpo_worker.small_buckets(monkeypatch)
    if world == 1:
        with engine_of(ways[name], tmp_path) as (_, one):
            counted = grpo_worker.count_bytes(one, ways[name])
    else:
        counted = worker.answers[0][f"bytes {name}"]
    args = Arguments(**ways[name], dry_run=True, dry_run_world_size=world)
    pretrained = read_pretrained(args.model_name_or_path, dropout=False)
    found, moment = grpo_zero3.pretend_step(args, pretrained)
    held = sum(found[row] for row in ("parameters", "gradients", "bucket", "optimizer"))
    assert held == pytest.approx(counted["held"], rel=0.02)
    assert found["peak"] == pytest.approx(max(counted["rollout"], counted["update"]), rel=0.1)
    if name != "three micro-batches":  # of which both are about the same
        assert ("rollout" in moment) == (counted["rollout"] > counted["update"])


def test_a_dry_run_counts_its_flags(ways, tmp_path, monkeypatch):
    name = ways["half"]["model_name_or_path"]
    weights = 4 * sum(weight.numel() for weight in weights_of(name).values())
    pretrained, sizes = read_pretrained(name, dropout=False), {**SIZES, "model_name_or_path": name}
    grpo_worker.small_buckets(monkeypatch)

    def count(**flags):
        args = Arguments(**sizes | {"dry_run": True, "per_device_train_batch_size": 16} | flags)
        grpo_zero3.check_arguments(args)
        return grpo_zero3.pretend_step(args, pretrained)[0]

    one = count()
    assert one["parameters"] == weights and one["rollout_weights"] == 0
    assert count(dry_run_world_size=2)["rollout_weights"] == weights
    assert count(max_tokens_per_batch=200)["activations"] > one["activations"]  # 112 tokens, and 88 more
    assert count(beta=0.1)["reference_on_host"] == weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "MIN_BYTES", 1)
        moved = count(activation_offloading=True)
    assert 0 < moved["on_host"] and moved["activations"] < one["activations"]
    offloaded = count(offload_optimizer=True, offload_param=True)
    assert offloaded["parameters"] == offloaded["gradients"] == offloaded["optimizer"] == 0
    state = ("parameters", "gradients", "optimizer")
    # DeepSpeed holds gradients twice there
    assert offloaded["state_on_host"] == sum(one[name] for name in state) + one["gradients"]
    assert "state_on_host" not in one
    with pytest.MonkeyPatch.context() as patch:
        freeze_first(grpo_zero3, patch)
        frozen = count()
    assert all(frozen[name] < 0.9 * one[name] for name in ("gradients", "optimizer"))
    # one step for real; the others would only take time
    monkeypatch.setattr(grpo_zero3, "pretend_step", lambda args, pretrained: ({"peak": 1}, "never"))
    flags = {"max_tokens_per_batch": 120, "dry_run": True, "gpu_memory_gib": 9.0}
    found = grpo_zero3.main(Arguments(**sizes | flags, output_dir=str(tmp_path / "out")))
    assert found["longest"] == (120 - 64) // 8 and not (tmp_path / "out").exists()


def test_what_lies_elsewhere_than_the_engine_is_on_the_host():
    """A CPU stands for the GPU here, and the device "meta" for its host."""

    def numbers(count, device):
        return torch.zeros(count, device=device)

    module, shard = torch.nn.Linear(2, 2), numbers(8, "cpu")
    for parameter in module.parameters():
        parameter.ds_tensor = shard
    states = {"weight": {"exp_avg": numbers(5, "meta"), "step": torch.tensor(1.0)}}
    optimizer = SimpleNamespace(
        optimizer=SimpleNamespace(state=states),
        grad_partitions_flat_buffer=numbers(3, "meta"),
        fp32_partitioned_groups_flat=[numbers(5, "meta")],
    )
    engine = SimpleNamespace(module=module, optimizer=optimizer, device=torch.device("cpu"))
    assert grpo_zero3.held_bytes(engine) == {"parameters": 64, "state_on_host": 4 * 13}


# --- 7. Contract ---

METRICS = (
    "step epoch loss reward rewards/grpo_cases:upper/mean reward_std frac_reward_zero_std "
    "completions/mean_length completions/clipped_ratio entropy gathered_bytes_per_token resident_bytes "
    "prompt_gathered_bytes exchanged_bytes_per_token "
    "gather_seconds generation_seconds generation_steps kl clip_ratio grad_norm learning_rate num_tokens "
    "num_scored_tokens tokens_per_second step_seconds update_seconds peak_memory_bytes"
)
SUMMARY = "args versions device world_size data throughput ledger activation_offloading final_metrics"


def test_what_a_run_leaves_behind(base, earlier_run):
    done, summary = read_run(earlier_run), summary_of(earlier_run)
    found = [sorted(name for name in step if not name.startswith("eval_")) for step in done.metrics]
    assert found == [sorted(METRICS.split())] * 4
    assert list(summary) == SUMMARY.split()
    assert summary["final_metrics"] == done.metrics[-1]
    args, throughput = summary["args"], summary["throughput"]
    size = args["per_device_train_batch_size"] * summary["world_size"]
    of_completions = sum(length * size for length in values(done, "completions/mean_length"))
    of_prompts = throughput["num_tokens"] - of_completions  # computed once for a group
    of_data = of_completions + of_prompts * args["num_generations"]
    assert throughput["real_tokens_per_second"] * throughput["seconds"] == pytest.approx(of_data)
    counts = helpers.bytes_of(summary)
    assert counts.pop("peak") > 10_000_000
    expected = {"parameters": 4, "gradients": 4, "optimizer": 12, "rollout_weights": 4}
    assert counts == {name: count * NUM_TINY for name, count in expected.items()}
    saved, came = map(AutoModelForCausalLM.from_pretrained, (earlier_run, base["model_name_or_path"]))
    nameless = {"_name_or_path": ""}
    assert saved.config.to_diff_dict() | nameless == came.config.to_diff_dict() | nameless
    assert 1e-4 < worst(dict(saved.named_parameters()), dict(came.named_parameters())) < 0.1


def test_the_words_of_a_command():
    words = "--local_rank=1 --max_steps 3 --no_ds3_gather_for_generation --stop_strings a b".split()
    args = parse_arguments(Arguments, words)
    assert (args.max_steps, args.ds3_gather_for_generation, args.stop_strings) == (3, False, ["a", "b"])
    assert grpo_zero3.budget_bytes(args) == 0 and grpo_zero3.budget_bytes(Arguments()) is None
    assert grpo_zero3.budget_bytes(Arguments(gather_budget_gib=1.5)) == 1.5 * 2**30
