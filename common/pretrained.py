"""A pretrained model by name: its configuration and tokenizer, and the trained weights written as it came."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def load_tokenizer_and_config(name, max_length):
    """Returns the tokenizer and the configuration of a Hub name or folder.

    Raises: ValueError for a model that is not there, or that has fewer positions than max_length.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model_name_or_path {name} cannot be loaded: {error}") from error
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(f"--max_length {max_length} is over the model's {positions} positions: lower it.")
    return tokenizer, config


def write_pretrained(folder, name, weights, tokenizer):
    """Write a trained model in Hugging Face format, in the dtype that it came in.

    Args: folder: an existing one. name: the Hub name or folder of the model that the training began with.
          weights: {name: whole tensor}, a tied weight once.
    """
    config = AutoConfig.from_pretrained(name)
    dtype = config.dtype or torch.float32
    with torch.device("meta"):  # a shell that knows names, ties and config; the weights are handed to it
        shell = AutoModelForCausalLM.from_config(config, dtype=dtype)
    try:
        shell.generation_config = GenerationConfig.from_pretrained(name)
    except OSError:
        pass  # the model came without one
    shell.save_pretrained(folder, state_dict={k: v.to(dtype) for k, v in weights.items()})
    tokenizer.save_pretrained(folder)
