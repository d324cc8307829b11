"""A pretrained model by name: its configuration and tokenizer, and the trained weights written as it came."""

import itertools
import json
import re
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from common.flags import Refusal


def load_tokenizer_and_config(name, max_length, flags="--max_length"):
    """Returns the tokenizer and the configuration of a Hub name or folder.

    Raises: ValueError for a model that is not there, or that has fewer positions than max_length, which the
            flags set.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise Refusal(f"--model_name_or_path {name} cannot be loaded: {error}") from error
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise Refusal(f"{flags} {max_length} is over the model's {positions} positions: lower it.")
    return tokenizer, config


def load_generation_config(name, config):
    """How the model generates by default, or what its configuration says of it."""
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:  # the model came without one
        return GenerationConfig.from_model_config(config)


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


def as_in_files(shell, tensors):
    """(name, tensor) pairs of a model under the names, and in the shapes, that its files have.

    transformers joins the experts of a layer into one tensor when it loads them; files hold each one alone.
    What is joined or split lies within a layer, so a layer's tensors are converted together.
    """

    def layer_of(pair):
        numbered = re.match(r".*?\.\d+\.", pair[0])
        return numbered.group() if numbered else pair[0]

    for _, layer in itertools.groupby(tensors, layer_of):
        yield from revert_weight_conversion(shell, dict(layer)).items()


def write_pretrained_streamed(folder, name, shapes, tensors, tokenizer, max_shard_bytes=2 * 2**30):
    """The same from tensors that come one by one: at most a file's worth and a layer are held at a time.

    Args: shapes: {name: shape}, a tied weight once. tensors: iterable of (name, whole tensor), each once, in
          the same order of names, layer by layer; they are copied.
    """
    folder, config = Path(folder), AutoConfig.from_pretrained(name)
    dtype = config.dtype or torch.float32
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, dtype=dtype)
        promised = [(key, torch.empty(shape, dtype=dtype)) for key, shape in shapes.items()]
    plan = split_torch_state_dict_into_shards(
        dict(as_in_files(shell, promised)),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    held = {file: {} for file in plan.filename_to_tensors}
    file_of = {key: file for file, keys in plan.filename_to_tensors.items() for key in keys}
    copies = ((key, tensor.detach().to("cpu", dtype, copy=True)) for key, tensor in tensors)
    for key, tensor in as_in_files(shell, copies):
        file = file_of[key]
        # a copy: experts are views of one tensor
        held[file][key] = tensor.clone(memory_format=torch.contiguous_format)
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
