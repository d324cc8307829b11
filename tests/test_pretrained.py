"""Tokenizer and configuration by name; a model written as it came."""

from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.pretrained import load_tokenizer_and_config, write_pretrained

DEMO_MODEL = str(Path(__file__).parents[1] / "demo/model")


def test_the_demos_own():
    tokenizer, config = load_tokenizer_and_config(DEMO_MODEL, max_length=1024)
    assert len(tokenizer) == config.vocab_size


@pytest.mark.parametrize(
    "name, max_length, message",
    [
        ("no/such-model-here", 8, "--model_name_or_path no/such-model-here cannot be loaded"),
        (DEMO_MODEL, 1025, "--max_length 1025 is over the model's 1024 positions"),
    ],
)
def test_refusals(name, max_length, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer_and_config(name, max_length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_in_the_dtype_that_the_model_had(dtype, tmp_path):
    first, written = tmp_path / "first", tmp_path / "written"
    tiny_model("llama", tie_word_embeddings=True).to(dtype).save_pretrained(first)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(first)
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    weights = {name: parameter.detach() + 1 for name, parameter in model.named_parameters()}
    written.mkdir()
    write_pretrained(written, str(first), weights, AutoTokenizer.from_pretrained(first))
    again = AutoModelForCausalLM.from_pretrained(written)
    for name, parameter in again.named_parameters():
        assert parameter.dtype == dtype and torch.equal(parameter, weights[name].to(dtype))
    assert AutoTokenizer.from_pretrained(written)("a<|end|>").input_ids
