"""A pretrained model by name: its configuration and tokenizer, and the trained weights written as it came."""

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def load_tokenizer_and_config(name, max_length, flags="--max_length"):
    """Returns the tokenizer and the configuration of a Hub name or folder.

    Raises: ValueError for a model that is not there, or that has fewer positions than max_length, which the
            flags set.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model_name_or_path {name} cannot be loaded: {error}") from error
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(f"{flags} {max_length} is over the model's {positions} positions: lower it.")
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


def write_pretrained_streamed(folder, name, shapes, tensors, tokenizer, max_shard_bytes=2 * 2**30):
    """The same from tensors that come one by one: at most one file's worth of them is held at a time.

    Args: shapes: {name: shape}, a tied weight once. tensors: iterable of (name, whole tensor), each once, in
          any order of names that stays the same; they are copied.
    """
    folder, config = Path(folder), AutoConfig.from_pretrained(name)
    dtype = config.dtype or torch.float32
    plan = split_torch_state_dict_into_shards(
        {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    held = {file: {} for file in plan.filename_to_tensors}
    file_of = {key: file for file, keys in plan.filename_to_tensors.items() for key in keys}
    for key, tensor in tensors:
        file = file_of[key]
        held[file][key] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if len(held[file]) == len(plan.filename_to_tensors[file]):
            save_file(held.pop(file), folder / file, metadata={"format": "pt"})
    assert not held, f"tensors are missing of {', '.join(held)}"
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config.save_pretrained(folder)
    try:
        GenerationConfig.from_pretrained(name).save_pretrained(folder)
    except OSError:
        pass  # the model came without one
    tokenizer.save_pretrained(folder)
