"""A model written tensor by tensor is the model that was written."""

import pytest
import torch
from grpo_cases import DEMO_MODEL, write_model
from helpers import tiny_model, worst
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.pretrained import write_pretrained, write_pretrained_streamed


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000, 1])
def test_shards_make_the_model(max_shard_bytes, tied, tmp_path):
    name = write_model(tmp_path / "model", torch.bfloat16, tie_word_embeddings=tied)
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
    tokenizer = AutoTokenizer.from_pretrained(name)
    write_pretrained_streamed(tmp_path / "out", name, shapes, one_by_one(), tokenizer, max_shard_bytes)
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


def names_in(folder):
    return {name for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys()}


@pytest.mark.parametrize("family", JOINED)
@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000, None])
def test_what_was_joined_is_written_as_it_came(max_shard_bytes, family, tmp_path):
    """Experts, for example; None: all tensors at once."""
    came, left = tmp_path / "came", tmp_path / "left"
    tiny_model(family, vocab_size=261, attn_implementation="sdpa", **JOINED[family]).save_pretrained(came)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(came)
    tokenizer = AutoTokenizer.from_pretrained(came)
    weights = {name: p.detach() for name, p in AutoModelForCausalLM.from_pretrained(came).named_parameters()}
    assert family == "phi3" or names_in(came) != set(weights)
    left.mkdir()
    if max_shard_bytes is None:
        write_pretrained(left, str(came), weights, tokenizer)
    else:
        shapes = {name: weight.shape for name, weight in weights.items()}
        write_pretrained_streamed(left, str(came), shapes, weights.items(), tokenizer, max_shard_bytes)
    assert names_in(left) == names_in(came)
    read = dict(AutoModelForCausalLM.from_pretrained(left).named_parameters())
    assert worst(read, weights) == 0
