"""What SFT and DPO promise alike: a run goes on bit for bit, two ranks are one, and it says what it did."""

import json
import math
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import assert_same_bits, assert_same_curve, read_run, run, values, worst, write_jsonl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import common.sharding
import dpo_padding_free
import sft_packing
from common.folders import list_checkpoints
from common.run import run_script

SCRIPTS = {"SFT": sft_packing, "DPO": dpo_padding_free}
RESUME = {"resume_from_checkpoint": "latest"}
SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
PADDED = {sft_packing: {"packing": False, "padding_free": False}, dpo_padding_free: {"padding_free": False}}


# --- Data and runs ---


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with helpers.alone_on_the_cpu(tmp_path_factory.mktemp("cache")) as folder:
        yield folder


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return SCRIPTS[request.param]


@pytest.fixture(scope="module")
def evaluated(script, tmp_path_factory):
    return helpers.small_run(script, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def base(evaluated):
    return {name: value for name, value in evaluated.items() if name != "eval_dataset_name"}


@pytest.fixture(scope="module")
def dropout(base, tmp_path_factory):
    """Flags of a run whose every step depends on all that a checkpoint holds: 8 steps, 5 to an epoch."""
    return {
        **base,
        "model_name_or_path": helpers.write_model(tmp_path_factory.mktemp("dropout"), attention_dropout=0.2),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1.6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
    }


@pytest.fixture(scope="module")
def saved(script, dropout, tmp_path_factory):
    """The folder of a finished run with the checkpoints 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run(script, folder, dropout, save_steps=2)
    return folder


def steps_saved(folder):
    return [step for step, _ in list_checkpoints(folder)]


def state_after(folder, step):
    return load_file(next((folder / f"checkpoint-{step}").glob("*.safetensors")))


# --- Checkpoints ---


def test_saving_evaluating_and_checkpointing_change_no_step(script, dropout, evaluated, saved, tmp_path):
    """SFT's dropout is at work, and repeated. DPO has none, or its reference would be another model."""
    whole = read_run(saved)
    evaluation = {"eval_dataset_name": evaluated["eval_dataset_name"], "eval_steps": 1}
    assert_same_bits(run(script, tmp_path / "evaluated", dropout, **evaluation), whole)
    assert_same_curve(run(script, tmp_path / "kept", dropout, gradient_checkpointing=False), whole)
    model = evaluated["model_name_or_path"]
    without = run(script, tmp_path / "without", dropout, model_name_or_path=model, max_steps=1)
    assert (values(without, "grad_norm")[0] == values(whole, "grad_norm")[0]) == (script is dpo_padding_free)


@pytest.mark.parametrize("step, killed", [(2, False), (6, True)])
def test_a_resumed_run_is_the_uninterrupted_one(step, killed, script, dropout, saved, tmp_path, monkeypatch):
    """From an earlier checkpoint of a finished run, within the warm-up and the first epoch; and from the last
    one of a killed run, after both. A lost reference is computed anew. Nothing is pickled.
    """

    def pickles(*args, **options):
        raise AssertionError("torch.load or torch.save was called")

    monkeypatch.setattr(torch, "load", pickles)
    monkeypatch.setattr(torch, "save", pickles)
    cut = helpers.cut_after if killed else lambda folder, step, copy: shutil.copytree(folder, copy)
    folder = cut(saved, step, tmp_path / "run")
    for reference in folder.glob("reference*"):
        reference.unlink()
    checkpoint = {"resume_from_checkpoint": "latest" if killed else str(folder / f"checkpoint-{step}")}
    assert_same_bits(run(script, folder, dropout, save_steps=2, **checkpoint), read_run(saved))
    assert steps_saved(folder) == [each for each in (2, 4, 6, 8) if each >= step]
    files = [path for path in (folder / "checkpoint-8").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".rng", ".json"}
    for path in files:
        json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
    for reference in folder.glob("reference*"):
        found, kept = (load_file(each / reference.name)["data"] for each in (folder, saved))
        assert torch.equal(found[~found.isnan()], kept[~found.isnan()])


def test_a_run_killed_while_saving_can_be_finished(script, dropout, saved, tmp_path, monkeypatch):
    """Twice: a checkpoint lacks its name alone; and the last one is there, but the model is not written."""

    def killed(*args):
        raise KeyboardInterrupt

    folder = helpers.cut_after(saved, 4, tmp_path / "run")
    for target, left in (("common.run.commit_folder", [4]), (f"{script.__name__}.save_model", [4, 6, 8])):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(target, killed)
            run(script, folder, dropout, save_steps=2, **RESUME)
        assert steps_saved(folder) == left and (folder / "checkpoint-6.tmp").is_dir() == (left == [4])
        assert not (folder / "summary.json").exists()
    assert_same_bits(run(script, folder, dropout, save_steps=2, **RESUME), read_run(saved))
    assert not list(folder.glob("*.tmp")) and (folder / "summary.json").exists()


def on_third_batch(script, monkeypatch, happens):
    """Let `happens` take what batch_loss returns for a run's third batch. Returns: the list of all calls."""
    calls, batch_loss = [], script.batch_loss

    def noted(*args):
        calls.append(args)
        found = batch_loss(*args)
        return happens(*found) if len(calls) == 3 else found

    monkeypatch.setattr(script, "batch_loss", noted)
    return calls


def test_sigterm_saves_and_ends_with_code_0(script, dropout, saved, tmp_path, monkeypatch, capsys):
    """In its third step, by the command line; and it goes on to the same end."""

    def terminated(*found):
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    flags = {**dropout, "output_dir": tmp_path / "run"}
    monkeypatch.setattr(sys, "argv", ["x", *(f"--{name}={value}" for name, value in flags.items())])
    calls = on_third_batch(script, monkeypatch, terminated)
    run_script(script.main, script.Arguments)  # which a code other than 0 would leave by SystemExit
    assert "saved checkpoint-3; continue with --resume_from_checkpoint latest" in capsys.readouterr().err
    assert steps_saved(tmp_path / "run") == [3] and len(calls) == 3
    assert_same_bits(run(script, tmp_path / "run", dropout, **RESUME), read_run(saved))


@pytest.mark.parametrize(
    "script, make",
    [("SFT", partial(torch.optim.SGD, momentum=0.9)), ("DPO", partial(torch.optim.Adam, amsgrad=True))],
    indirect=["script"],
)
def test_another_optimizer_is_one_edit(script, make, dropout, tmp_path, monkeypatch):
    """Its states are in the checkpoints, whatever their names; only the same optimizer goes on with them."""

    def edited(model, args, run):
        return make(model.parameters()), None

    with monkeypatch.context() as patch:
        patch.setattr(script, "prepare_training", edited)
        whole = run(script, tmp_path / "whole", dropout, save_steps=2)
        cut = helpers.cut_after(tmp_path / "whole", 4, tmp_path / "cut")
        assert_same_bits(run(script, cut, dropout, save_steps=2, **RESUME), whole)
    flags = {**dropout, **RESUME, "max_steps": 9}
    helpers.assert_refused(script, tmp_path / "whole", flags, "its optimizer and this run's")


@pytest.mark.parametrize("script, bf16", [("SFT", True), ("DPO", False)], indirect=["script"])
def test_frozen_layers_cost_their_weights_alone(script, bf16, dropout, tmp_path, monkeypatch):
    """And a run with others frozen is another run. In bf16 FSDP keeps the weights apart."""
    flags = {**dropout, "bf16": bf16, "save_steps": 4, "measure_memory": True}
    all_trained = helpers.bytes_of(run(script, tmp_path / "all", flags, max_steps=2).returned)
    with monkeypatch.context() as patch:
        in_graph = helpers.freeze_first(script, patch)
        whole = run(script, tmp_path / "whole", flags)
        assert not any(in_graph) and len(in_graph) >= 8
        cut = helpers.cut_after(tmp_path / "whole", 4, tmp_path / "cut")
        assert_same_bits(run(script, cut, flags, **RESUME), whole)
    state = state_after(tmp_path / "whole", 4)
    assert not [name for name in state if name.split(".", 1)[1].startswith(helpers.FROZEN)]
    helpers.assert_first_is_frozen(whole, load_file(Path(flags["model_name_or_path"]) / "model.safetensors"))
    found = helpers.bytes_of(whole.returned)
    assert found["parameters"] == all_trained["parameters"]
    assert found["activations"] < all_trained["activations"] and found["peak"] < all_trained["peak"]
    message = "its frozen parameters and this run's differ. Freeze what was frozen"
    helpers.assert_refused(script, cut, {**flags, **RESUME, "max_steps": 9}, message)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(script, base, tmp_path, monkeypatch):
    """Of the third example that is used, one later in the data: the first one of all is left out."""
    rows = [json.loads(line) for line in open(base["dataset_name"])]
    unused = {"text": "", **helpers.preference("a", "b", "b")}
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", [unused, *rows])}
    flags |= {"per_device_train_batch_size": 1, "save_steps": 1, "max_steps": 4}
    flags |= {"packing": False} if script is sft_packing else {}
    used = np.random.default_rng([0, 0]).permutation(len(rows))[2]
    on_third_batch(script, monkeypatch, lambda loss, sums: (loss * math.nan, sums))
    message = rf"step 3: .*gradient norm nan.* (Rows|Pairs) \[{used}\], examples \[{used + 1}\]"
    with pytest.raises(FloatingPointError, match=message):
        run(script, tmp_path / "out", flags)
    assert values(read_run(tmp_path / "out"), "step") == steps_saved(tmp_path / "out") == [1, 2]
    assert not (tmp_path / "out/model.safetensors").exists()
    monkeypatch.undo()
    resumed = run(script, tmp_path / "out", flags, **RESUME)
    assert_same_bits(resumed, run(script, tmp_path / "whole", flags))


# --- Refusals ---

OTHER, COLUMNS = "its data and this run's differ", "has the columns question; wanted"
OVERWRITE = {"overwrite_output_dir": True}


@pytest.mark.parametrize(
    "flags, message",
    [
        ({}, "holds another run .*--resume_from_checkpoint latest.*--overwrite_output_dir"),
        # a checkpoint of another folder does not make this folder its own
        ({"resume_from_checkpoint": "checkpoint-2"}, "holds another run"),
        ({**RESUME, "max_length": 16}, OTHER),
        ({**RESUME, "seed": 1}, OTHER),
        ({**RESUME, "dataset_name": "of the same lengths"}, OTHER),
        ({**OVERWRITE, "dataset_name": "of other columns"}, COLUMNS),
        ({**OVERWRITE, "eval_dataset_name": "of other columns"}, COLUMNS),
        ({**OVERWRITE, "max_length": 1}, "--max_length is 1"),
        ({**OVERWRITE, "max_length": 257}, "--max_length 257 is over the model's 256"),
        ({**OVERWRITE, "attn_implementation": "varlen"}, "varlen is for flat rows"),
        ({**OVERWRITE, "model_name_or_path": "of a small vocabulary"}, "token id 257 is outside the voc"),
    ],
    ids=str,
)
def test_a_run_that_cannot_be_is_refused(flags, message, script, dropout, saved, tmp_path):
    rows = [json.loads(line) for line in open(dropout["dataset_name"])]
    rows[7] = {name: text[::-1] for name, text in rows[7].items()}
    small = {"vocab_size": 200, "pad_token_id": 0, "eos_token_id": 1}
    others = {
        "of the same lengths": write_jsonl(tmp_path / "rows.jsonl", rows),
        "of other columns": write_jsonl(tmp_path / "columns.jsonl", [{"question": "a"}]),
        "of a small vocabulary": helpers.write_model(tmp_path / "model", **small),
    }
    flags = {name: others.get(value, value) for name, value in flags.items()}
    if "attn_implementation" in flags:
        flags |= PADDED[script]
    helpers.assert_refused(script, saved, {**dropout, **flags}, message)


# --- Ranks ---

# layer inputs of 64 KiB and more, or nothing would move
OFFLOADED = {"dataset_name": str(helpers.ROOT / "demo/sft_eval.jsonl"), "max_length": 128, "max_steps": 2}
TWO_EPOCHS = {"num_train_epochs": 2, "save_steps": 2, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Runs on two ranks, one after another, in one start: their folder, flags, and each rank's results."""
    folder = tmp_path_factory.mktemp("two")
    jobs = {"plain": OFFLOADED, "offloaded": {**OFFLOADED, "activation_offloading": True}}
    jobs = {name: ["sft_packing", flags] for name, flags in jobs.items()}
    for name, script in SCRIPTS.items():
        (folder / script.__name__).mkdir()
        flags = {**helpers.small_run(script, folder / script.__name__), **TWO_EPOCHS}
        # steps of 4 rows or pairs, 2 x 1 on each rank: 9 rows are 4 + 4 + 1, where one rank gets a dummy in
        # the end; 10 pairs are 4 + 4 + 2, where there is nothing to accumulate
        jobs[name] = [script.__name__, {**flags, **dict(zip(SIZES, (1, 2)))}]
        jobs[f"{name} on the host"] = [script.__name__, {**jobs[name][1], "offload_param": True}]
        jobs[f"{name} missing"] = [script.__name__, {**flags, "dataset_name": "none.jsonl"}]
    # uneven batches by tokens, where one rank runs one without a pair; and the reference beside the policy
    tokens = {
        "max_tokens_per_batch": 60,
        "precompute_ref_log_probs": False,
        "loss_type": "ipo",
        "max_steps": 3,
    }
    tokens["dataset_name"] = write_jsonl(folder / "five.jsonl", helpers.random_preferences(0, 5))
    jobs["tokens"] = ["dpo_padding_free", {**flags, **tokens}]
    return folder, jobs, helpers.run_on_two_ranks(jobs, folder)


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_ranks_are_one_rank(name, two_ranks, tmp_path, monkeypatch):
    """And one rank goes on with their checkpoint, and with their reference."""
    folder, (_, flags), script = two_ranks[0] / name, two_ranks[1][name], SCRIPTS[name]
    flags = {**flags, "save_steps": None, **dict(zip(SIZES, (2, 2)))}
    one, two = run(script, tmp_path / "one", flags), read_run(folder)
    assert_same_curve(two, one, tolerance=1e-5 if name == "SFT" else 1e-4)
    assert values(one, "loss") == pytest.approx(values(two, "loss"), abs=1e-5)
    summary = json.loads((folder / "summary.json").read_text())
    counts = [each["data"] | {"computed_fraction": None} for each in (summary, one.returned)]  # of other rows
    assert summary["world_size"] == 2 and counts[0] == counts[1]
    if name == "SFT":
        dummies = [a - b for a, b in zip(values(two, "num_tokens"), values(one, "num_tokens"))]
        assert dummies == [0, 0, 2, 0, 0, 2]
    else:
        assert values(two, "rewards/margins")[0] == values(one, "rewards/margins")[0] == 0.0
        first, second = (load_file(each / script.REFERENCE)["data"] for each in (folder, tmp_path / "one"))
        assert worst(first, second) <= 2e-5
        monkeypatch.setattr(script, "compute_reference", None)
    cut = helpers.cut_after(folder, 2, tmp_path / "cut")
    resumed = run(script, cut, flags, **dict(zip(SIZES, (4, 1))), **RESUME)
    assert_same_curve(resumed, two, tolerance=1e-5 if name == "SFT" else 1e-4)
    assert values(resumed, "loss")[:2] == values(two, "loss")[:2]


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_ranks_whose_shards_wait_on_the_host_are_the_same(name, two_ranks):
    assert_same_bits(*(read_run(two_ranks[0] / each) for each in (name, f"{name} on the host")))


def test_two_ranks_with_a_second_model_and_batches_by_tokens(two_ranks, tmp_path):
    flags = {**two_ranks[1]["tokens"][1], "gradient_accumulation_steps": 2}
    two, one = read_run(two_ranks[0] / "tokens"), run(dpo_padding_free, tmp_path, flags)
    assert_same_curve(two, one, tolerance=1e-4)
    assert any(a - b == 2 for a, b in zip(values(two, "num_tokens"), values(one, "num_tokens")))


def test_offloading_changes_nothing_on_two_ranks(two_ranks):
    plain, offloaded = (read_run(two_ranks[0] / name) for name in ("plain", "offloaded"))
    assert_same_bits(plain, offloaded)
    report = two_ranks[2][0]["offloaded"]["returned"]["activation_offloading"]
    assert 0.9 * 4 * 256 * 128 * 4 < report["offloaded_bytes"] <= 4 * 256 * 128 * 4


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_error_on_the_first_rank_ends_the_other(name, two_ranks):
    folder, _, (first, second) = two_ranks
    assert "none.jsonl does not exist" in first[f"{name} missing"]["error"]
    assert "another rank cannot go on" in second[f"{name} missing"]["error"]
    assert not (folder / f"{name} missing").exists()


# --- What a run leaves behind ---

METRICS = "step epoch grad_norm learning_rate num_tokens num_scored_tokens tokens_per_second step_seconds"
PREFERENCES = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"]
PREFERENCES += ["logps/chosen", "logps/rejected"]
SUMMARY = "activation_offloading args data device final_metrics ledger throughput versions world_size"


def test_what_a_run_leaves_behind(script, evaluated, tmp_path, capsys):
    """Two epochs, of 9 rows or of 10 pairs, with a warm-up of two steps."""
    measured, sizes, examples = ["loss", *PREFERENCES], [4, 4, 2], (10, 5)
    if script is sft_packing:
        measured, sizes, examples = ["loss"], [2, 2, 2, 2, 1], (20, 7)
    own, last = {*METRICS.split(), "peak_memory_bytes", *measured}, 2 * len(sizes)
    flags = {"num_train_epochs": 2, "warmup_steps": 2, "eval_steps": 4, "save_steps": 4, "logging_steps": 2}
    done = run(script, tmp_path, evaluated, **flags)
    for line in done.metrics:
        evaluates = line["step"] % 4 == 0 or line["step"] == last
        assert set(line) == own | ({f"eval_{name}" for name in measured} if evaluates else set())
        assert line["tokens_per_second"] == pytest.approx(line["num_tokens"] / line["step_seconds"])
    assert values(done, "step") == list(range(1, last + 1))
    assert values(done, "epoch") == pytest.approx(np.cumsum(2 * sizes) / sum(sizes))
    decay = [1 - i / (last - 2) for i in range(last - 2)]
    assert values(done, "learning_rate") == pytest.approx([1e-3 * rate for rate in (0, 0.5, *decay)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == set(SUMMARY.split()) and json.loads(json.dumps(done.returned)) == summary
    assert summary["args"]["max_length"] == 64 and summary["final_metrics"] == done.metrics[-1]
    data, tokens = summary["data"], sum(values(done, "num_tokens"))
    assert summary["throughput"]["num_tokens"] == tokens
    assert data.get("computed_fraction", 1) == pytest.approx(tokens / (2 * data["tokens_kept"]))
    assert (data["examples_used"], data["eval"]["examples_used"]) == examples
    assert list(helpers.bytes_of(summary)) == ["parameters", "gradients", "optimizer"]  # without the flag
    assert steps_saved(tmp_path) == [step for step in range(1, last) if step % 4 == 0]
    assert not list(tmp_path.rglob("*.tmp"))
    page = capsys.readouterr().out
    assert f"read {examples[0]}  used {examples[0]}" in page and "memory ledger" in page


def test_the_saved_model_is_the_trained_one(script, base, tmp_path):
    """Here in bf16, its head tied; every tensor of other models: test_sharding.py."""
    folder = helpers.write_model(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True)
    flags = {**base, "model_name_or_path": folder, "learning_rate": 1e-2, "max_steps": 2}
    done = run(script, tmp_path / "out", flags, save_steps=2)
    model, state = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), state_after(tmp_path / "out", 2)
    came = load_file(Path(folder) / "model.safetensors")
    assert done.weights.keys() == came.keys()  # a tied weight once
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, state[f"weight.{name}"].bfloat16()) and parameter.ne(came[name]).any()
    tokenizer, original = map(AutoTokenizer.from_pretrained, (tmp_path / "out", helpers.DEMO_MODEL))
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer("a<|end|>").input_ids == original("a<|end|>").input_ids
    # and it can go straight into the next run
    run(script, tmp_path / "next", flags, model_name_or_path=str(tmp_path / "out"), max_steps=1)


def test_bf16_follows_fp32(script, base, tmp_path):
    exact, half = (run(script, tmp_path / str(bf16), base, bf16=bf16) for bf16 in (False, True))
    assert not torch.distributed.is_initialized()
    assert values(half, "loss") != values(exact, "loss")
    assert values(half, "loss") == pytest.approx(values(exact, "loss"), rel=0.01)
    assert all(weight.dtype == torch.float32 for weight in half.weights.values())


# --- Bytes ---


@pytest.mark.parametrize(
    "script, flags",
    [
        ("SFT", {"bf16": True, "gradient_accumulation_steps": 2}),
        ("SFT", {"gradient_checkpointing": False}),
        ("SFT", PADDED[sft_packing]),
        ("DPO", {"bf16": True, "gradient_checkpointing": False, "precompute_ref_log_probs": False}),
    ],
    indirect=["script"],
    ids=str,
)
def test_offloading_changes_only_where_activations_wait(script, flags, evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr("common.offload.MIN_BYTES", 1)
    flags = {**evaluated, **flags, "max_steps": 3}
    kept = run(script, tmp_path / "kept", flags)
    offloaded = run(script, tmp_path / "offloaded", flags, activation_offloading=True)
    assert_same_bits(kept, offloaded)
    assert kept.returned["activation_offloading"] is None
    report = offloaded.returned["activation_offloading"]
    assert report["peak_host_bytes"] >= report["offloaded_bytes"] > 0


@pytest.mark.parametrize("flags", [{}, {"bf16": True, "activation_offloading": True}], ids=str)
def test_shards_that_wait_on_the_host_change_no_bit(script, flags, dropout, tmp_path, monkeypatch):
    """Over accumulated batches; and a run without them goes on with the checkpoint of one with them."""
    policies, fully_shard = set(), common.sharding.fully_shard

    def noted(module, offload_policy, **options):
        policies.add(type(offload_policy).__name__)
        return fully_shard(module, offload_policy=offload_policy, **options)

    monkeypatch.setattr(common.sharding, "fully_shard", noted)
    monkeypatch.setattr("common.offload.MIN_BYTES", 1)
    flags = {**dropout, **flags, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    kept = run(script, tmp_path / "kept", flags)
    assert policies == ({"OffloadPolicy"} if "bf16" in flags else set())
    policies.clear()
    host = run(script, tmp_path / "host", flags, offload_param=True, save_steps=4)
    assert policies == {"CPUOffloadPolicy"}
    assert_same_bits(host, kept)
    cut = helpers.cut_after(tmp_path / "host", 4, tmp_path / "cut")
    assert_same_bits(run(script, cut, flags, save_steps=4, **RESUME), kept)


TEXTS = [{"text": "a" * length} for length in (10, 14, 199, 20, 24, 12, 18, 22)]
PAIRS = [helpers.preference("p" * 40, "a" * n, "b" * n) for n in (10, 14, 150, 20, 12, 18)]


@pytest.mark.parametrize(
    "script, rows, ways, tokens",
    [
        ("SFT", TEXTS, [PADDED[sft_packing], {"packing": False}, {SIZES[0]: 2}], [8 * 200, 327, 327]),
        ("DPO", PAIRS, [{"padding_free": False}, {"share_prompt": False}, {}], [12 * 191, 940, 505]),
    ],
    indirect=["script"],
)
def test_padding_costs_bytes(script, rows, ways, tokens, base, tmp_path):
    """One step on the same examples, one of them long: padded, flat, and packed or with shared prompts.

    Of the prompts, 6 of 40 equal letters, the first 39 stand once for all.
    """
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows), "max_length": 256}
    flags |= {SIZES[0]: len(rows), "measure_memory": True}
    runs = [run(script, tmp_path / str(i), flags, **way) for i, way in enumerate(ways)]
    assert [values(done, "num_tokens") for done in runs] == [[count] for count in tokens]
    scored = sum(len(row[name]) + 1 for row in rows for name in row if name != "prompt")
    scored -= len(rows) if script is sft_packing else 0
    assert [values(done, "num_scored_tokens") for done in runs] == 3 * [[scored]]
    paddings = [done.returned["data"]["padding_fraction"] for done in runs]
    assert paddings == pytest.approx([1 - tokens[1] / tokens[0], 0, 0])
    assert_same_curve(runs[0], runs[1])
    assert_same_curve(runs[2], runs[1])
    padded, flat, technique = (helpers.bytes_of(done.returned) for done in runs)
    # less still than by tokens: a mask makes SDPA repeat keys and values
    assert flat["activations"] <= 1.05 * padded["activations"] * tokens[1] / tokens[0]
    assert technique["activations"] <= 1.05 * flat["activations"] * tokens[2] / tokens[1]
    assert technique["peak"] <= flat["peak"] < 0.5 * padded["peak"]
    assert padded["parameters"] == flat["parameters"] == technique["parameters"]
