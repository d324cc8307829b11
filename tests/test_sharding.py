"""A pretrained model comes in and goes out as its files have it, on one rank and on two."""

import importlib
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import helpers
import pytest
import torch
from helpers import DEMO_MODEL, documents, inputs, tiny_model, worst, write_jsonl, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

from common import Refusal, sharding
from common.collators import flatten
from common.run import Run
from common.sharding import ShardedArguments, check_liger, load_whole, read_pretrained, set_kernels, trained

SCRIPTS = ["sft_packing", "dpo_padding_free", "grpo_zero3"]
SPECIAL = {"vocab_size": 261, "pad_token_id": 256, "bos_token_id": None, "eos_token_id": 257}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with helpers.alone_on_the_cpu(tmp_path_factory.mktemp("cache")) as folder:
        yield folder


@pytest.fixture
def run(tmp_path):
    with Run(ShardedArguments(output_dir=str(tmp_path / "out")), "TEST") as opened:
        (tmp_path / "out").mkdir()
        yield opened


def change_config(folder, inside=None, **fields):
    config = json.loads((folder / "config.json").read_text())
    (config[inside] if inside else config).update(fields)
    (folder / "config.json").write_text(json.dumps(config))


def tensors_of(folder):
    return {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_tensors(folder, expected):
    found = tensors_of(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# --- In and out ---

ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
ROUTED |= {"moe_intermediate_size": 16, "first_k_dense_replace": 0, "num_key_value_heads": 4}
ROUTED |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
CASES = {  # of which transformers joins some tensors: experts, for example
    "llama": {},
    "phi3": {"tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v3": ROUTED,  # a bias that chooses the experts is kept in fp32 beside bf16 weights
}


def write_weights(folder, tensors, num_files=1):
    """These tensors as a model's files, in one or in several beside their index."""
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(num_files):
        file = "model.safetensors" if num_files == 1 else f"{i}-model.safetensors"
        part = dict(list(tensors.items())[i::num_files])
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file, metadata={"format": "pt"})
    if num_files > 1:
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)


@pytest.mark.parametrize("family, num_files", [*((f, 1) for f in CASES), ("deepseek_v3", 2)])
def test_each_tensor_is_written_as_its_file_has_it(family, num_files, tmp_path, run):
    came, left = tmp_path / "came", tmp_path / "out"
    write_model(came, family, torch.bfloat16, **CASES[family])
    tensors = tensors_of(came)
    for name in [name for name in tensors if "e_score_correction_bias" in name or "layernorm" in name]:
        tensors[name] = torch.randn(tensors[name].shape)
    write_weights(came, tensors, num_files)
    pretrained = read_pretrained(str(came))
    whole = load_whole(pretrained, run)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}  # the widest
    assert family in ("llama", "phi3") or whole.state_dict().keys() != tensors.keys()
    shutil.rmtree(came)  # nothing of it is needed any more
    sharding.try_to_write(run, whole, pretrained)
    weights = whole.state_dict()
    sharding.write_pretrained(left, pretrained, {name: weights[name] for name in sharding.saved_names(whole)})
    assert_same_tensors(left, tensors)
    read = AutoModelForCausalLM.from_pretrained(left, dtype=torch.float32)
    assert worst(dict(read.named_parameters()), dict(whole.named_parameters())) == 0
    assert (left / "model.safetensors").stat().st_mode & 0o044  # not for its owner alone


def write_apart(folder):
    """A configuration that ties, files that do not; norms in fp32 beside bf16; a generation configuration
    that transformers takes for invalid.
    """
    write_model(folder, dtype=torch.bfloat16, initializer_range=0.1, num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "norm" in name:
            tensors[name] = 1 + torch.randn(tensor.shape, generator=generator) / 100
    write_weights(folder, tensors)
    change_config(folder, tie_word_embeddings=True)
    (folder / "generation_config.json").write_text('{"num_return_sequences": 3, "eos_token_id": 257}')
    return str(folder)


def assert_same_model(folder, came, rounded=False):
    expected = tensors_of(came)
    if rounded:
        expected = {name: tensor.bfloat16().to(tensor.dtype) for name, tensor in expected.items()}
    assert_same_tensors(folder, expected)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    generation = "generation_config.json"
    assert (folder / generation).read_text() == (came / generation).read_text()


TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2, **SPECIAL}
VISION = {"hidden_size": 16, "intermediate_size": 24}
GEMMA3 = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
INSIDE = {
    "gemma3": {
        "text_config": {**TEXT, **GEMMA3, "num_hidden_layers": 2, "query_pre_attn_scalar": 16},
        "vision_config": {**VISION, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "qwen3_5": {
        "text_config": {**TEXT, **LINEAR, "num_hidden_layers": 4},
        "vision_config": {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 32},
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


@pytest.mark.parametrize("family, bf16", [("gemma3", False), ("qwen3_5", True)])
def test_a_text_model_inside_another_is_trained_alone_and_goes_back_into_it(family, bf16, tmp_path, run):
    """transformers makes a model of text alone of one of them: the rest is written beside it."""
    name = write_inside(tmp_path / "model", family, torch.bfloat16)
    pretrained = read_pretrained(name)
    run.args.bf16 = bf16
    model = sharding.load_model(run.args, run, pretrained)
    assert all("vision" in name or "projector" in name for name in sharding.frozen_names(model))
    with torch.no_grad():
        for parameter in trained(model):
            parameter.mul_(1.5).add_(0.1)
    sharding.save_model(run, model, pretrained)
    assert_text_alone_is_trained(tmp_path / "out", tmp_path / "model")


# --- What cannot be read, loaded or written ---


FOREIGN_CODE = {
    "a configuration": {"model_type": "none", "auto_map": {"AutoConfig": "evil.C"}},
    "a model": {"model_type": "t5", "auto_map": {"AutoModelForCausalLM": "evil.M"}},
    "both, of a known type": {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}},
    "a kernel": {"_attn_implementation": "kernels-community/none"},
}


@pytest.mark.parametrize("config_only", [True, False])
@pytest.mark.parametrize("what", FOREIGN_CODE)
def test_no_code_of_a_models_folder_runs(what, config_only, tmp_path, run, monkeypatch):
    """Nobody is asked either: a rank would wait for the answer."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    write_model(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text()) | FOREIGN_CODE[what]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass M: pass\nC = M\n")
    known = what == "both, of a known type"  # which is then transformers' own
    said = "would be downloaded and run" if what == "a kernel" else "wants to run code of its own, which no"
    with nullcontext() if known else pytest.raises(Refusal, match=said):
        pretrained = read_pretrained(str(tmp_path / "model"), config_only=config_only)
        model = sharding.empty_model(pretrained.config) if config_only else load_whole(pretrained, run)
    assert not (tmp_path / "ran").exists()
    assert not known or type(model).__module__.startswith("transformers.")


@pytest.mark.parametrize("inside", [None, "text_config"])
def test_quantised_weights_are_refused(inside, tmp_path):
    name = write_inside(tmp_path, "gemma3") if inside else write_model(tmp_path)
    change_config(tmp_path, inside, quantization_config={"quant_method": "gptq", "bits": 4})
    for config_only in (False, True):  # a dry run's way as well
        with pytest.raises(Refusal, match="gptq.: full training of a quantised model is not supported"):
            read_pretrained(name, config_only=config_only)


def test_models_that_are_not_there_or_not_whole_are_refused(tmp_path, run):
    def refused(message):
        with pytest.raises(Refusal, match=message):
            load_whole(read_pretrained(name), run)

    name = "/nowhere"
    refused("/nowhere cannot be loaded: no such folder")
    folder = tmp_path / "model"
    name = write_model(folder, tie_word_embeddings=True)
    (folder / "generation_config.json").write_text("{")
    refused("cannot be loaded; wanted")
    (folder / "generation_config.json").unlink()
    change_config(folder, tie_word_embeddings=False)
    refused("lack 1 of the model's weights, such as lm_head.weight")
    (folder / "model.safetensors").write_bytes(b"x")
    refused("cannot be loaded: ")
    (folder / "model.safetensors").unlink()
    refused("it has no model.safetensors")


def test_what_ends_a_generation_and_a_vocabulary(tmp_path):
    name = write_model(tmp_path)
    assert read_pretrained(name).vocab_size == 261
    file = tmp_path / "generation_config.json"
    assert "257" in file.read_text() and read_pretrained(name).eos_token_id == 257
    file.write_text('{"eos_token_id": [3, 4]}')
    assert read_pretrained(name).eos_token_id == [3, 4]
    file.unlink()
    assert read_pretrained(name).eos_token_id == 257


DROPS = {"attn_pdrop": 0.2, "embd_pdrop": 0.2, "resid_pdrop": 0.2}


def test_dropout_is_off_where_it_is_asked_for_and_written_as_it_came(tmp_path, monkeypatch, run):
    name = write_model(tmp_path / "model", "gpt2", n_positions=64, **DROPS)
    for dropout in (True, False):
        pretrained = read_pretrained(name, dropout=dropout)
        model, ids = load_whole(pretrained, run).train(), torch.arange(9)[None]
        assert torch.equal(model(ids).logits, model(ids).logits) == (not dropout)
    sharding.write_pretrained(tmp_path / "out", pretrained, model.state_dict())
    assert json.loads((tmp_path / "out/config.json").read_text())["resid_pdrop"] == 0.2
    made = LlamaMLP.__init__

    def with_dropout(self, config):
        made(self, config)
        self.drop = torch.nn.Dropout(0.1)

    monkeypatch.setattr(LlamaMLP, "__init__", with_dropout)
    name = write_model(tmp_path / "llama")
    load_whole(read_pretrained(name), run)
    with pytest.raises(Refusal, match="that its configuration does not name .*layers.0.mlp.drop"):
        load_whole(read_pretrained(name, dropout=False), run)


POSITIONS = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
ROPE = {"factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10_000.0}
DYNAMIC = ROPE | {"rope_type": "dynamic"}
LONGROPE = ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}


@pytest.mark.parametrize("family, rope", [("gemma3", None), ("phi3", LONGROPE), ("llama", DYNAMIC)])
def test_more_positions_than_a_model_computes_alike_are_refused(family, rope, tmp_path):
    if rope is None:
        name, limit = write_inside(tmp_path, family), 64
        message = "--max_length 65 is over the model's 64 positions"
    else:
        name, limit = write_model(tmp_path, family, rope_parameters=rope, **POSITIONS), 16
        message = f"17 is over the model's 16 original positions, beyond which rope_type {rope['rope_type']}"
    read_pretrained(name, limit)
    with pytest.raises(Refusal, match=message):
        read_pretrained(name, limit + 1)


@torch.no_grad()
def test_within_its_original_positions_longrope_computes_packed_documents_as_alone():
    model = tiny_model("phi3", rope_parameters=LONGROPE, **POSITIONS)
    for longest, exact in ((16, True), (17, False)):
        sequences = documents(0, [longest, 9])
        packed = model(**inputs(flatten(sequences)), use_cache=False).logits[0, longest:]
        alone = model(**inputs(flatten(sequences[1:])), use_cache=False).logits[0]
        assert (worst(packed, alone) <= 1e-5) == exact
    default = {"rope_type": "default", "rope_theta": 10_000.0}
    ropes = {"full_attention": LONGROPE, "sliding_attention": default}
    text = INSIDE["gemma3"]["text_config"] | {"rope_parameters": ropes}
    assert sharding.max_positions(AutoConfig.for_model("gemma3", text_config=text))[0] == 16


# --- Flags and kernels ---


@pytest.mark.parametrize(
    "flat, flags, message",
    [
        (False, {"attn_implementation": "varlen"}, "varlen is for flat rows"),
        (True, {"attn_implementation": "flash_attention_2"}, "flash_attention_2 rejects fp32: add --bf16"),
        (True, {"eval_steps": 2}, "--eval_steps needs --eval_dataset_name"),
        (True, {"dry_run": True, "use_liger_kernel": True}, "--dry_run cannot look into Triton's kernels"),
        (True, {"max_steps": 0}, "--max_steps 0"),  # of all scripts
    ],
)
def test_flags_that_contradict_each_other_are_refused(flat, flags, message):
    sharding.check_sharded_arguments(ShardedArguments(), flat)
    with pytest.raises(Refusal, match=message):
        sharding.check_sharded_arguments(ShardedArguments(**flags), flat)


def test_kernels_that_are_not_here_or_do_not_fit_are_refused(monkeypatch):
    llama4 = {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": None}
    model = tiny_model("llama4_text", "sdpa", attn_temperature_tuning=True, **llama4)
    with pytest.raises(Refusal, match="attn_temperature_tuning"):
        set_kernels(model, ShardedArguments(), flat=True)
    set_kernels(model, ShardedArguments(), flat=False)  # padded: each row begins at 0
    args, model = ShardedArguments(attn_implementation="flash_attention_2"), tiny_model("llama", "sdpa")
    with pytest.raises(Refusal, match="flash_attention_2: flash-attn is not installed"):
        set_kernels(model, args, flat=True)
    set_kernels(model, args, flat=True, pretends=True)
    assert model.config._attn_implementation == "varlen"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(Refusal, match="needs a GPU, and torch sees none"):
        check_liger()
    for missing in ("triton", "liger_kernel.transformers.monkey_patch", "liger_kernel"):
        for name in [missing, *(name for name in sys.modules if name.startswith(f"{missing}."))]:
            monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
        with pytest.raises(Refusal, match=f"here: .*{missing}.* Install requirements.txt"):
            check_liger()
        monkeypatch.undo()


# --- What is trained ---


def test_matrices_decay_and_norms_and_biases_and_what_is_frozen_do_not():
    model = tiny_model("gpt2", "sdpa")
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, kept = sharding.parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {*decayed["params"], *kept["params"]} == names.keys()
    scales = {parameter for parameter, name in names.items() if name.endswith("bias") or "ln_" in name}
    assert {*kept["params"]} == scales and not scales & {*decayed["params"]}
    module = torch.nn.Module()
    for name in ("gate_up_proj", "gate_up_proj_bias", "shard", "vector"):  # as experts have them
        shape = (2, 3) if "gate" in name else (3,)
        module.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))
    module.shard.ds_shape = (2, 3)  # ZeRO-3's part of a matrix
    decayed, kept = ({*group["params"]} for group in sharding.parameter_groups(module, 0.1))
    assert decayed == {module.gate_up_proj, module.shard}
    assert kept == {module.gate_up_proj_bias, module.vector}
    model = tiny_model("llama").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    [group] = sharding.parameter_groups(model, 0.1)  # no norm is trained: the fused AdamW gets no empty group
    assert group["params"] == trained(model) == [model.lm_head.weight]
    assert set(sharding.frozen_names(model)) == {n for n, _ in model.named_parameters()} - {"lm_head.weight"}


# --- Training state ---


def test_a_training_state_comes_back_and_a_new_rank_keeps_its_seed(tmp_path, run):
    """Of frozen weights it holds nothing; whole runs: test_fsdp_runs.py."""
    models = [tiny_model("llama"), tiny_model("llama")]
    for model in models:
        model.model.norm.requires_grad_(False)
    optimizers = [torch.optim.AdamW(sharding.parameter_groups(model, 0.1), fused=True) for model in models]
    model(**inputs(flatten(documents(0, [5]))), use_cache=False).logits.sum().backward()
    optimizers[1].step()
    sharding.save_training_state(tmp_path, run, models[1], optimizers[1])
    drawn = torch.rand(4)
    run.checkpoint, run.progress["updates"] = tmp_path, 1
    sharding.load_training_state(run, models[0], optimizers[0])
    assert torch.equal(torch.rand(4), drawn)
    found, expected = (sharding.training_state(*each) for each in zip(models, optimizers))
    assert worst(found, expected) == 0 and len(found) == 3 * len(trained(models[0]))
    run.rank = 5
    torch.manual_seed(3)
    seeded = torch.rand(4)
    torch.manual_seed(3)
    sharding.load_training_state(run, models[0], optimizers[0])
    assert torch.equal(torch.rand(4), seeded)


def test_a_fingerprint_names_weights_and_configuration(run):
    def changed(change=lambda model: None, attention="varlen", **fields):
        model = tiny_model("llama", attention, **fields)
        with torch.no_grad():
            change(model)
        return sharding.model_fingerprint(model)

    def one_bit(model):
        weight = model.model.norm.weight
        weight[3] = torch.nextafter(weight[3], torch.tensor(2.0))

    def swapped(model):
        first, second = (layer.self_attn.q_proj for layer in model.model.layers)
        first.weight, second.weight = second.weight, first.weight

    name = changed()
    assert changed(attention="sdpa") == name
    others = {changed(rms_norm_eps=0.1), changed(tie_word_embeddings=True)}
    assert len({name, *others, changed(one_bit), changed(swapped)}) == 5


# --- Whole runs: at a learning rate of 0, what is written is what came ---


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Each script's smallest data, as flags."""
    folder = tmp_path_factory.mktemp("data")
    rows = {
        "sft_packing": [{"text": "abcdef "[i % 5 :] * (2 + i % 4)} for i in range(8)],
        "dpo_padding_free": [{"prompt": "ab" * i, "chosen": "cd" * i, "rejected": "e"} for i in range(1, 5)],
        "grpo_zero3": [{"prompt": "abcdefgh"[: 2 + i % 6]} for i in range(4)],
    }
    flags = {
        "sft_packing": {"max_length": 64},
        "dpo_padding_free": {"precompute_ref_log_probs": False, "max_length": 64},
        "grpo_zero3": {"reward_funcs": "grpo_cases:upper", "num_generations": 2, "max_prompt_length": 8}
        | {"per_device_train_batch_size": 4, "max_completion_length": 4, "beta": 0.1},
    }
    for script in SCRIPTS:
        name = write_jsonl(folder / f"{script}.jsonl", rows[script])
        flags[script] |= {"dataset_name": name, "max_steps": 1, "learning_rate": 0.0}
    flags["sft_packing"]["eval_dataset_name"] = flags["sft_packing"]["dataset_name"]
    return flags


def start(script, flags, output_dir, **changes):
    script = importlib.import_module(script)
    return script.main(script.Arguments(**{**flags, "output_dir": str(output_dir), **changes}))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_that_cannot_be_written_is_refused_before_the_first_step(script, data, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise TypeError("Object of type set is not JSON serializable")

    flags = data[script] | {"model_name_or_path": write_model(tmp_path / "model")}
    tokenizer = type(AutoTokenizer.from_pretrained(flags["model_name_or_path"]))
    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(Refusal, match="once trained it could not be written, for TypeError: Object of"):
        start(script, flags, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_preferences_compare_two_models_without_dropout(data, tmp_path):
    name = write_model(tmp_path / "model", "gpt2", n_positions=64, **DROPS)
    flags = data["dpo_padding_free"] | {"model_name_or_path": name}
    metrics = start("dpo_padding_free", flags, tmp_path / "out")["final_metrics"]
    assert metrics["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    """The scripts' runs on two ranks in one start: their folder, and what each rank returned or raised."""
    folder, jobs = tmp_path_factory.mktemp("two"), {}
    apart, inside = write_apart(folder / "apart"), write_inside(folder / "inside", "gemma3")
    lacking = write_model(folder / "lacking", tie_word_embeddings=True)
    change_config(folder / "lacking", tie_word_embeddings=False)
    for script, flags in data.items():
        learns = {"learning_rate": 1e-2} | ({"reward_funcs": "grpo_cases:spread"} if "grpo" in script else {})
        jobs[f"{script} bf16"] = [script, flags | {"model_name_or_path": apart, "bf16": True}]
        if script == "dpo_padding_free":  # which reads and writes as SFT does
            continue
        jobs[f"{script} fp32"] = [script, flags | {"model_name_or_path": apart}]
        jobs[f"{script} inside"] = [script, flags | learns | {"model_name_or_path": inside, "bf16": True}]
        jobs[f"{script} lacking"] = [script, flags | {"model_name_or_path": lacking}]
    counted = {"max_length": 128, "bf16": True, "measure_memory": True, "max_steps": 2}
    counted["dataset_name"] = write_jsonl(folder / "texts.jsonl", [{"text": "abcdefgh" * 32}] * 8)
    jobs["counted"] = ["sft_packing", counted]
    return folder, helpers.run_on_two_ranks(jobs, folder)


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_write_what_came(script, two_ranks):
    folder, (results, second) = two_ranks
    ours = {name: result for name, result in results.items() if name.startswith(script)}
    for name, result in ours.items():
        assert ("error" in result) == ("lacking" in name), result
        if name.endswith(("fp32", "bf16")):
            # ZeRO-3 in bf16 begins from bf16 weights
            assert_same_model(folder / name, folder / "apart", rounded=name == "grpo_zero3 bf16")
    if script != "dpo_padding_free":
        assert_text_alone_is_trained(folder / f"{script} inside", folder / "inside")
        assert "lm_head.weight" in ours[f"{script} lacking"]["error"]
        assert "its own message says why" in second[f"{script} lacking"]["error"]


def test_an_untied_head_gives_one_loss_on_every_path(two_ranks, data, tmp_path):
    """And one rank writes in fp32 what came."""
    folder, (results, _) = two_ranks
    flags = data["sft_packing"] | {"model_name_or_path": str(folder / "apart")}
    expected = start("sft_packing", flags, tmp_path / "out")["final_metrics"]["eval_loss"]
    assert_same_model(tmp_path / "out", folder / "apart")
    for way, tolerance in (("fp32", {"abs": 1e-5}), ("bf16", {"rel": 1e-2})):
        found = results[f"sft_packing {way}"]["returned"]["final_metrics"]["eval_loss"]
        assert found == pytest.approx(expected, **tolerance)


def test_a_dry_run_foretells_the_bytes_of_two_ranks(two_ranks):
    """Of one rank, test_memory.py."""
    script = importlib.import_module("sft_packing")
    measured = {row["name"]: row["bytes"] for row in two_ranks[1][0]["counted"]["returned"]["ledger"]}
    args = script.Arguments(max_length=128, bf16=True, dry_run=True, dry_run_world_size=2)
    found, _ = script.pretend_step(args, read_pretrained(args.model_name_or_path, config_only=True))
    assert found == {name: pytest.approx(measured[name], rel=0.02, abs=2**14) for name in measured}
    assert found["parameters"] < 0.51 * 4 * 1_020_000 and "peak" in found
