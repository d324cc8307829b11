"""A pretrained model comes in and goes out as its files have it, on one rank and on two."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from grpo_cases import DEMO_MODEL, write_model
from helpers import tiny_model, worst
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_padding_free
import grpo_zero3
import sft_packing
from common.pretrained import load_whole, read_pretrained, write_pretrained, write_pretrained_streamed

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
        patch.setenv("HF_DATASETS_CACHE", str(folder))  # for subprocesses
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield folder


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(name, **options):
    """What was read of a folder, and its model."""
    pretrained = read_pretrained(str(name), **options)
    return pretrained, load_whole(pretrained, CPU)


def tensors_of(folder):
    return {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}


def names_in(folder):
    return {name for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys()}


def assert_same_files(folder, expected):
    found, wanted = tensors_of(folder), tensors_of(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# --- Writing ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000, 1])
def test_shards_make_the_model(max_shard_bytes, tied, tmp_path):
    name = write_model(tmp_path / "model", torch.bfloat16, tie_word_embeddings=tied)
    pretrained, _ = loaded(name)
    trained = tiny_model("llama", vocab_size=261, tie_word_embeddings=tied)
    for i, parameter in enumerate(trained.parameters()):
        parameter.data += i
    weights = dict(trained.named_parameters())
    (tmp_path / "out").mkdir()
    held = []

    def one_by_one():
        for key, parameter in weights.items():
            tensor = parameter.clone()
            yield key, tensor
            tensor.fill_(0)  # gathered weights are gone when the next one comes
            held.append(key)

    shapes = {key: parameter.shape for key, parameter in weights.items()}
    write_pretrained_streamed(tmp_path / "out", pretrained, shapes, one_by_one(), max_shard_bytes)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == {2**30: 1, 20_000: len(files), 1: len(weights)}[max_shard_bytes]
    assert (len(files) > 1) == (tmp_path / "out/model.safetensors.index.json").exists()
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in read.parameters()} == {torch.bfloat16}
    expected = {key: parameter.to(torch.bfloat16) for key, parameter in weights.items()}
    assert worst(dict(read.named_parameters()), expected) == 0
    assert held == list(weights)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
JOINED = {"qwen3_moe": EXPERTS, "mixtral": {"num_local_experts": 4}, "phi3": {}}


@pytest.mark.parametrize("family", JOINED)
@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000, None])
def test_what_was_joined_is_written_as_it_came(max_shard_bytes, family, tmp_path):
    """Experts, for example; None: all tensors at once."""
    came, left = tmp_path / "came", tmp_path / "left"
    tiny_model(family, vocab_size=261, attn_implementation="sdpa", **JOINED[family]).save_pretrained(came)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(came)
    pretrained, model = loaded(came)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    assert family == "phi3" or names_in(came) != set(weights)
    left.mkdir()
    if max_shard_bytes is None:
        write_pretrained(left, pretrained, weights)
    else:
        shapes = {name: weight.shape for name, weight in weights.items()}
        write_pretrained_streamed(left, pretrained, shapes, weights.items(), max_shard_bytes)
    assert names_in(left) == names_in(came)
    read = dict(AutoModelForCausalLM.from_pretrained(left).named_parameters())
    assert worst(read, weights) == 0


ROUTED = {  # a bias that chooses the experts, kept in fp32 beside bf16 weights
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
FILES = ("one", "shards", "torch", "torch shards")


@pytest.mark.parametrize("files", FILES)
def test_each_tensor_is_written_in_the_dtype_of_its_file(files, tmp_path):
    came, left = tmp_path / "came", tmp_path / "left"
    model = tiny_model("deepseek_v3", "sdpa", vocab_size=261, **ROUTED).to(torch.bfloat16)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.data = torch.randn(buffer.shape)
    model.save_pretrained(came, max_shard_size="20KB" if files == "shards" else "1GB")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(came)
    tensors = tensors_of(came)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.bfloat16}
    if "torch" in files:
        (came / "model.safetensors").unlink()
        parts = [dict(list(tensors.items())[i::2]) for i in range(2)] if "shards" in files else [tensors]
        names = [f"pytorch_model-{i}.bin" for i in range(2)] if "shards" in files else ["pytorch_model.bin"]
        for name, part in zip(names, parts):
            torch.save(part, came / name)
        weight_map = {tensor: name for name, part in zip(names, parts) for tensor in part}
        if "shards" in files:
            index = {"metadata": {}, "weight_map": weight_map}
            (came / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    pretrained, whole = loaded(came)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}  # the widest
    left.mkdir()
    shutil.rmtree(came)  # nothing of it is needed any more
    write_pretrained(left, pretrained, whole.state_dict())
    found = tensors_of(left)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# --- Whole runs: at a learning rate of 0, what is written is what came ---


def write_apart(folder):
    """A configuration that ties, files that do not; and some tensors in fp32 beside bf16 ones."""
    write_model(folder, torch.bfloat16, tie_word_embeddings=False, initializer_range=0.1)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "norm" in name:
            tensors[name] = 1 + torch.randn(tensor.shape, generator=generator) / 100
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    # transformers takes this for invalid
    (folder / "generation_config.json").write_text('{"num_return_sequences": 3, "eos_token_id": 257}')
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Each script's smallest data, as flags."""
    folder = tmp_path_factory.mktemp("data")
    texts = [{"text": "abcdef "[i % 5 :] * (2 + i % 4)} for i in range(8)]
    pairs = [{"prompt": "ab" * (1 + i), "chosen": "cd" * (1 + i), "rejected": "e"} for i in range(4)]
    prompts = [{"prompt": "abcdefgh"[: 2 + i % 6]} for i in range(4)]
    rewards = {"reward_funcs": "grpo_cases:upper", "num_generations": 2, "max_prompt_length": 8}
    flags = {
        "sft_packing": {"dataset_name": write_jsonl(folder / "texts.jsonl", texts), "max_length": 64},
        "dpo_padding_free": {"dataset_name": write_jsonl(folder / "pairs.jsonl", pairs), "max_length": 64},
        "grpo_zero3": rewards | {"dataset_name": write_jsonl(folder / "prompts.jsonl", prompts)},
    }
    flags["sft_packing"]["eval_dataset_name"] = flags["sft_packing"]["dataset_name"]
    flags["sft_packing"]["per_device_train_batch_size"] = 2
    flags["dpo_padding_free"]["precompute_ref_log_probs"] = False
    flags["grpo_zero3"] |= {"per_device_train_batch_size": 4, "max_completion_length": 4, "beta": 0.1}
    return {name: each | {"max_steps": 1, "learning_rate": 0.0} for name, each in flags.items()}


SCRIPTS = {script.__name__: script for script in (sft_packing, dpo_padding_free, grpo_zero3)}


def start(script, flags, output_dir, **changes):
    script = SCRIPTS[script]
    return script.main(script.Arguments(**{**flags, "output_dir": str(output_dir), **changes}))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_learns_nothing_writes_what_came(script, bf16, data, tmp_path):
    name = write_apart(tmp_path / "model")
    flags = data[script] | {"model_name_or_path": name, "bf16": bf16}
    shutil.copytree(name, tmp_path / "came")
    if script == "sft_packing":  # the folder is only needed at the start
        flags["eval_dataset_name"] = None
    summary = start(script, flags, tmp_path / "out")
    assert_same_files(tmp_path / "out", tmp_path / "came")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    generation = "generation_config.json"
    assert (tmp_path / "out" / generation).read_text() == (tmp_path / "came" / generation).read_text()
    if script == "dpo_padding_free":
        # policy and reference are one model
        assert summary["final_metrics"]["loss"] == pytest.approx(0.6931, abs=1e-3 if bf16 else 1e-4)
    if script == "grpo_zero3":
        assert summary["final_metrics"]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_that_cannot_be_written_is_refused_before_the_first_step(script, data, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise TypeError("Object of type set is not JSON serializable")

    flags = data[script] | {"model_name_or_path": write_model(tmp_path / "model")}
    tokenizer = type(AutoTokenizer.from_pretrained(flags["model_name_or_path"]))
    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(ValueError, match="once trained it could not be written, for TypeError: Object of"):
        start(script, flags, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_files_that_lack_a_weight_are_refused(script, data, tmp_path):
    """Its head, for instance, of a configuration that does not tie: a random one would be trained."""
    name = write_model(tmp_path / "model", tie_word_embeddings=True)
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match="lack 1 of the model's weights, such as lm_head.weight"):
        start(script, data[script] | {"model_name_or_path": name}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_that_are_not_the_files_are_seen(tmp_path, monkeypatch, data):
    flags = data["sft_packing"] | {"model_name_or_path": write_model(tmp_path / "model"), "bf16": True}
    spread = sft_packing.set_model_state_dict

    def one_off(model, state, options):
        spread(model, state, options=options)
        model.model.norm.weight.data.mul_(1.5)

    monkeypatch.setattr(sft_packing, "set_model_state_dict", one_off)
    with pytest.raises(AssertionError, match="do not hold what the files do: .'model.norm.weight'."):
        start("sft_packing", flags, tmp_path / "out")


def on_two_ranks(jobs, folder):
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests/script_runs.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
        # DeepSpeed looks for ninja on PATH
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"results{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    """The scripts' runs of a model on two ranks, and their results."""
    folder = tmp_path_factory.mktemp("two")
    apart = write_apart(folder / "apart")
    jobs = {}
    for script, flags in data.items():
        for bf16 in (False, True):
            name = f"{script} {bf16}"
            jobs[name] = [script, flags | {"model_name_or_path": apart, "bf16": bf16}]
            jobs[name][1]["output_dir"] = str(folder / name)
    lacking = write_model(folder / "lacking", tie_word_embeddings=True)
    config = json.loads((folder / "lacking/config.json").read_text())
    (folder / "lacking/config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    for script, flags in data.items():
        flags = flags | {"model_name_or_path": lacking, "output_dir": str(folder / "none")}
        jobs[f"{script} lacking"] = [script, flags]
    return folder, on_two_ranks(jobs, folder / "runs")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_write_what_came(script, bf16, two_ranks):
    folder, results = two_ranks
    assert "error" not in results[0][f"{script} {bf16}"], results[0]
    assert_same_files(folder / f"{script} {bf16}", folder / "apart")
    config = json.loads((folder / f"{script} {bf16}" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_an_untied_head_gives_one_loss_on_every_path(two_ranks, data, tmp_path):
    folder, results = two_ranks
    flags = data["sft_packing"] | {"model_name_or_path": str(folder / "apart")}
    expected = start("sft_packing", flags, tmp_path)["final_metrics"]["eval_loss"]
    found = results[0]["sft_packing False"]["returned"]["final_metrics"]["eval_loss"]
    half = results[0]["sft_packing True"]["returned"]["final_metrics"]["eval_loss"]
    assert found == pytest.approx(expected, abs=1e-5) and half == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_the_first_rank_alone_sees_ends_both(script, two_ranks):
    first, second = [result[f"{script} lacking"]["error"] for result in two_ranks[1]]
    assert "lm_head.weight" in first and "its own message says why" in second
