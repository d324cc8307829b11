"""A pretrained model comes in and goes out as its files have it, on one rank and on two."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from grpo_cases import DEMO_MODEL, write_model
from helpers import alone_on_the_cpu, documents, inputs, tiny_model, worst, write_jsonl
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import dpo_padding_free
import grpo_zero3
import sft_packing
from common.collators import flatten
from common.flags import Refusal
from common.pretrained import (
    load_config,
    load_whole,
    max_positions,
    read_pretrained,
    write_pretrained,
    write_pretrained_streamed,
)

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with alone_on_the_cpu(tmp_path_factory.mktemp("cache")) as folder:
        yield folder


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


# --- A text model inside ---

TEXT = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 256,
}
GEMMA3 = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
INSIDE = {
    "gemma3": {
        "text_config": {**TEXT, **GEMMA3, "num_hidden_layers": 2, "query_pre_attn_scalar": 16},
        "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "qwen3_5": {
        "text_config": {**TEXT, **LINEAR, "num_hidden_layers": 4},
        "vision_config": {"hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2}
        | {"out_hidden_size": 32},
    },
}


def write_inside(folder, family, dtype=torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **INSIDE[family])
    AutoModelForImageTextToText.from_config(config, dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return str(folder)


def assert_text_alone_is_trained(folder, came):
    found, before = tensors_of(folder), tensors_of(came)
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        assert found[name].dtype == tensor.dtype
        seen = any(part in name for part in ("vision", "visual", "multi_modal"))
        assert torch.equal(found[name], tensor) == seen, name
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.shape == (261, 32)


@pytest.mark.parametrize("way", ["fp32", "bf16", "dry run"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_text_model_inside_another_is_trained_alone(script, way, data, tmp_path):
    name = write_inside(tmp_path / "model", "gemma3")
    flags = data[script] | {"model_name_or_path": name, "learning_rate": 1e-2, "bf16": way == "bf16"}
    if script == "grpo_zero3":
        flags["reward_funcs"] = "grpo_cases:spread"
    if way == "dry run":
        args = SCRIPTS[script].Arguments(**flags)
        assert SCRIPTS[script].pretend_step(args, load_config(name), 2)["peak"][1] > 0
        return
    start(script, flags, tmp_path / "out")
    assert_text_alone_is_trained(tmp_path / "out", tmp_path / "model")


PADDED = {
    "sft_packing": {"packing": False, "padding_free": False},
    "dpo_padding_free": {"padding_free": False},
}


@pytest.mark.parametrize("script", PADDED)
def test_a_text_model_taken_out_of_another_goes_back_into_it(script, data, tmp_path):
    """transformers makes a model of text alone: the rest of the files is written beside it."""
    name = write_inside(tmp_path / "model", "qwen3_5", torch.bfloat16)
    flags = data[script] | {"model_name_or_path": name, "learning_rate": 1e-1}
    start(script, flags | PADDED[script], tmp_path / "out")
    assert_text_alone_is_trained(tmp_path / "out", tmp_path / "model")


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_states_in_the_place_of_keys_and_values_are_refused(script, dry_run, data, tmp_path):
    name = write_inside(tmp_path / "model", "qwen3_5")
    why = "keeps states" if script == "grpo_zero3" else "refuses a flat row"
    with pytest.raises(Refusal, match=why):
        start(script, data[script] | {"model_name_or_path": name}, tmp_path / "out", dry_run=dry_run)


def test_more_positions_than_the_text_model_has_are_refused(data, tmp_path):
    flags = data["sft_packing"] | {"model_name_or_path": write_inside(tmp_path / "model", "gemma3")}
    with pytest.raises(ValueError, match="--max_length 65 is over the model's 64 positions"):
        start("sft_packing", flags, tmp_path / "out", max_length=65)


# --- What configurations say ---


QUANTISED = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_quantised_weights_are_refused(script, dry_run, inside, data, tmp_path):
    name = write_inside(tmp_path / "model", "gemma3") if inside else write_model(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (config["text_config"] if inside else config)["quantization_config"] = QUANTISED
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match="gptq.: full training of a quantised model is not supported"):
        start(script, data[script] | {"model_name_or_path": name}, tmp_path / "out", dry_run=dry_run)


DROPS = {"attn_pdrop": 0.2, "embd_pdrop": 0.2, "resid_pdrop": 0.2}


def write_gpt2(folder):
    special = {"pad_token_id": 256, "bos_token_id": None, "eos_token_id": 257}
    tiny_model("gpt2", vocab_size=261, n_positions=64, **special, **DROPS).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("script", SCRIPTS)
def test_dropout_is_off_where_two_models_are_compared(script, data, tmp_path):
    flags = data[script] | {"model_name_or_path": write_gpt2(tmp_path / "model"), "dry_run": False}
    if script == "grpo_zero3":  # the second step on a rollout, with the weights that sampled it
        flags |= {"num_iterations": 2, "max_steps": 2, "epsilon": 1e-4}
    metrics = start(script, flags, tmp_path / "out")["final_metrics"]
    if script == "sft_packing":
        assert abs(metrics["loss"] - metrics["eval_loss"]) > 1e-3
    if script == "dpo_padding_free":
        assert metrics["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)
    if script == "grpo_zero3":
        assert metrics["clip_ratio"] == 0 and metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert json.loads((tmp_path / "out/config.json").read_text())["resid_pdrop"] == 0.2


def test_dropout_that_no_configuration_names_is_refused(data, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    made = LlamaMLP.__init__

    def with_dropout(self, config):
        made(self, config)
        self.drop = torch.nn.Dropout(0.1)

    monkeypatch.setattr(LlamaMLP, "__init__", with_dropout)
    flags = data["dpo_padding_free"] | {"model_name_or_path": write_model(tmp_path / "model")}
    with pytest.raises(
        Refusal, match="dropout that its configuration does not name .model.layers.0.mlp.drop"
    ):
        start("dpo_padding_free", flags, tmp_path / "out")


ROPES = {
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0], "factor": 4.0}
    | {"original_max_position_embeddings": 16},
    "dynamic": {"factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("rope_type", ROPES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_positions_where_a_rope_changes_for_all_tokens_are_refused(script, rope_type, data, tmp_path):
    rope = ROPES[rope_type] | {"rope_type": rope_type, "rope_theta": 10_000.0}
    special = {"pad_token_id": 256, "bos_token_id": None, "eos_token_id": 257}
    positions = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    family = "phi3" if rope_type == "longrope" else "llama"
    tiny_model(family, rope_parameters=rope, vocab_size=261, **positions, **special).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path)
    limits = [{"max_length": 16}, {"max_length": 17}]
    if script == "grpo_zero3":
        limits = [{"max_prompt_length": 8, "max_completion_length": n} for n in (8, 9)]
    flags = data[script] | {"model_name_or_path": str(tmp_path), "save_steps": None}
    start(script, flags | limits[0], tmp_path / "out")
    over = f"17 is over the model's 16 original positions, beyond which rope_type {rope_type}"
    with pytest.raises(Refusal, match=over):
        start(script, flags | limits[1], tmp_path / "out17")


@torch.no_grad()
def test_within_its_original_positions_longrope_computes_packed_documents_as_alone():
    rope = ROPES["longrope"] | {"rope_type": "longrope", "rope_theta": 10_000.0}
    positions = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    model = tiny_model("phi3", rope_parameters=rope, **positions)
    for longest, exact in ((16, True), (17, False)):
        sequences = documents(0, [longest, 9])
        packed = model(**inputs(flatten(sequences)), use_cache=False).logits[0, longest:]
        alone = model(**inputs(flatten(sequences[1:])), use_cache=False).logits[0]
        assert (worst(packed, alone) <= 1e-5) == exact


def test_ropes_of_single_layer_types_and_inner_models_count():
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 16, "rope_theta": 10_000.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0}
    ropes = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    text = INSIDE["gemma3"]["text_config"] | {"rope_parameters": ropes}
    assert max_positions(AutoConfig.for_model("gemma3", text_config=text))[0] == 16
    assert max_positions(AutoConfig.for_model("gemma3", **INSIDE["gemma3"]))[0] == 64


# --- Two ranks ---


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
    inside = write_inside(folder / "inside", "gemma3")
    for script, flags in data.items():
        flags = flags | {"model_name_or_path": inside, "learning_rate": 1e-2, "bf16": True}
        flags["output_dir"] = str(folder / f"{script} inside")
        if script == "grpo_zero3":
            flags["reward_funcs"] = "grpo_cases:spread"
        jobs[f"{script} inside"] = [script, flags]
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_train_the_text_model_inside_alone(script, two_ranks):
    folder, results = two_ranks
    assert "error" not in results[0][f"{script} inside"], results[0]
    assert_text_alone_is_trained(folder / f"{script} inside", folder / "inside")
