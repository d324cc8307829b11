"""A pretrained model by name: configuration, tokenizer, weights; and the trained model, written as it came.

All that saving needs of the name is read before the first step: what happens to its folder later changes
nothing, and a model that cannot be written is refused before it is trained.
"""

import copy
import functools
import itertools
import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from common import Refusal
from common.flags import together
from common.reference import sum_bits


@dataclass
class Pretrained:
    """What building and saving need of a Hub name or folder."""

    name: str
    tokenizer: Any
    config: PreTrainedConfig  # as it came; the trained model's
    model_config: PreTrainedConfig  # the same, or without dropout: what models are built from
    dropout: bool
    generation_config: str | None  # the file's text
    # Filled on the first rank, which alone reads the weights, by `load_whole`:
    dtypes: dict = field(default_factory=dict)  # {name in the files: dtype}
    conversions: list | None = None  # transformers' changes of the files' names and shapes
    frozen: dict = field(default_factory=dict)  # {name: tensor} that need not be gathered to be written
    unused: dict = field(default_factory=dict)  # {name in the files: tensor} that only a larger model has

    @property
    def dtype(self):
        """What the configuration says; single tensors may differ."""
        return self.config.dtype or self.config.get_text_config().dtype or torch.float32

    @property
    def eos_token_id(self):
        """What ends a generation: an id, several, or None."""
        if self.generation_config is not None:
            return json.loads(self.generation_config).get("eos_token_id")
        return getattr(self.config.get_text_config(), "eos_token_id", None)

    def file_dtype(self, name, prefix):
        """A tensor's dtype in the files, by its name there; files of a model without its head lack the
        prefix.
        """
        return self.dtypes.get(name) or self.dtypes.get(name.removeprefix(f"{prefix}."), self.dtype)


# --- Reading ---


def load_config(name, dropout=True):
    """A model's configuration by Hub name or folder; nothing else of it is needed.

    Args:   dropout: False: without it, for losses that compare a model in training with one at rest.
    Raises: ValueError for what cannot be read, and for quantised weights.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        wanted = "wanted: a folder with a config.json, or a Hub name"
        raise Refusal(f"--model_name_or_path {name} cannot be loaded; {wanted}: {error}") from error
    for each in (config, config.get_text_config()):
        if quantised := getattr(each, "quantization_config", None):
            settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
            raise Refusal(
                f"--model_name_or_path {name} is quantised ({settings.get('quant_method', 'some method')}): "
                "full training of a quantised model is not supported. Choose the model that it was made of."
            )
    return config if dropout else without_dropout(config)


def without_dropout(config):
    """A copy of a configuration in which nothing is random: dropout and the routers' jitter are 0."""
    config = copy.deepcopy(config)
    for each in (config, config.get_text_config()):
        for name, value in vars(each).items():
            if ("drop" in name or "jitter" in name) and type(value) in (int, float):
                setattr(each, name, type(value)(0))
    return config


def max_positions(config):
    """The longest sequence that a model computes alike in every batch, and what of it ends there.

    Two kinds of rotary embedding choose their frequencies by the longest position in the batch: a short
    document beside a long one would be computed as another model.
    """
    config = config.get_text_config()
    limits = [(getattr(config, "max_position_embeddings", None), "positions")]
    ropes = getattr(config, "rope_parameters", None) or {}
    nested = [rope for rope in ropes.values() if isinstance(rope, dict)]  # one for each type of layers
    for rope in nested or [ropes]:
        if rope.get("rope_type") in ("longrope", "dynamic"):
            why = f"original positions, beyond which rope_type {rope['rope_type']} computes all tokens anew"
            limits.append((rope.get("original_max_position_embeddings"), why))
    return min((limit for limit in limits if limit[0] is not None), default=(None, "positions"))


def read_pretrained(name, max_length=0, flags="--max_length", dropout=True):
    """Read what a Hub name or folder says of its model, but for the weights.

    Args:   max_length: the longest sequence that will be computed, which `flags` set; dropout: see
            `load_config`.
    Raises: ValueError for a model that is not there, is quantised, or has fewer positions than max_length.
    """
    config = load_config(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        file = cached_file(name, "generation_config.json", _raise_exceptions_for_missing_entries=False)
        generation_config = file and Path(file).read_text()
        json.loads(generation_config or "{}")
    except (OSError, ValueError) as error:
        raise Refusal(f"--model_name_or_path {name} cannot be loaded: {error}") from error
    limit, why = max_positions(config)
    if limit is not None and max_length > limit:
        raise Refusal(f"{flags} {max_length} is over the model's {limit} {why}: lower it.")
    return Pretrained(
        name=name,
        tokenizer=tokenizer,
        config=config,
        model_config=config if dropout else without_dropout(config),
        dropout=dropout,
        generation_config=generation_config,
    )


def weight_files(name):
    """The files of a model's weights, looked for as transformers does."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        options = {"_raise_exceptions_for_missing_entries": False}
        if (file := cached_file(name, single, **options)) is not None:
            return [file]
        if (index := cached_file(name, f"{single}.index.json", **options)) is not None:
            return get_checkpoint_shard_files(name, index)[0]
    raise OSError("it has neither model.safetensors nor pytorch_model.bin.")


def read_dtypes(files):
    """{tensor's name: dtype}; of safetensors, their headers alone are read."""
    dtypes = {}
    for file in files:
        if not file.endswith(".safetensors"):
            tensors = torch.load(file, map_location="meta", weights_only=True)
            dtypes |= {name: tensor.dtype for name, tensor in tensors.items()}
            continue
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                part = tensors.get_slice(name)
                # nothing of a tensor says its dtype as well as all of it
                dtypes[name] = (part[:0] if part.get_shape() else tensors.get_tensor(name)).dtype
    return dtypes


def read_tensors(files, wanted):
    """Copies of the wanted names' tensors."""
    found = {}
    for file in files:
        if not file.endswith(".safetensors"):
            tensors = torch.load(file, mmap=True, weights_only=True)
            found |= {name: tensors[name].clone() for name in wanted & tensors.keys()}
            continue
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name).clone() for name in wanted & set(tensors.keys())}
    return found


# --- Loading ---


def load_whole(pretrained, device, dtype=None, **options):
    """The model with its weights, on the host of the first rank; None on the others, which hold shards alone.

    Afterwards all ranks' configurations say whether head and embedding are one tensor, as the files have it:
    transformers does not tie what the files hold apart, whatever the configuration says.

    Args:   dtype: None = one that holds every tensor of the files; options: from_pretrained's.
    Raises: ValueError, on all ranks, for files that cannot be read or lack a weight.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    model, tied = None, torch.zeros((), device=device)
    with together(device):
        if first:
            model = _from_files(pretrained, dtype, options)
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
            tied.fill_(head is not None and head.weight is embedding.weight)
    if dist.is_initialized():
        dist.broadcast(tied, src=0)
    for config in (pretrained.config, pretrained.model_config, *([model.config] if first else [])):
        for each in (config, config.get_text_config()):
            each.tie_word_embeddings = bool(tied)
    return model


def _from_files(pretrained, dtype, options):
    name = pretrained.name
    try:
        files = weight_files(name)
        pretrained.dtypes = read_dtypes(files)
        floats = [each for each in pretrained.dtypes.values() if each.is_floating_point]
        dtype = dtype or functools.reduce(torch.promote_types, floats)
        options |= {
            "config": copy.deepcopy(pretrained.model_config),  # transformers writes the dtype into it
            "generation_config": GenerationConfig(),  # the files' may be invalid, and is not asked
        }
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise Refusal(f"--model_name_or_path {name} cannot be loaded: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise Refusal(
            f"--model_name_or_path {name}: its files lack {len(missing)} of the model's weights, such as "
            f"{missing[0]}, and random ones would take their place. Mend the files or the configuration "
            "(tie_word_embeddings, if it is the head)."
        )
    if not pretrained.dropout:
        check_no_dropout(model)
    pretrained.conversions = model._weight_conversions
    if type(model.config) is not type(pretrained.config):  # a text model was taken out of a larger one
        whole = model.state_dict().items()
        own = {key for key, _ in as_in_files(model, ((key, tensor.to("meta")) for key, tensor in whole))}
        pretrained.unused = read_tensors(files, pretrained.dtypes.keys() - own)
    return freeze_others(model)


def empty_model(config, **options):
    """A model of this configuration whose weights are still to come, in the surrounding context's tensors."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
    model.tie_weights()
    return freeze_others(model)


def freeze_others(model):
    """Freeze what text does not pass through: a vision tower, say, of a model with a text model inside."""
    if model.config.get_text_config() is not model.config:
        text = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
        trained = {id(p) for part in text for p in part.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
    return model


def check_no_dropout(model):
    """Raise ValueError for dropout that `without_dropout` did not reach."""
    left = [name for name, part in model.named_modules() if getattr(part, "p", 0) and "Dropout" in str(part)]
    if left:
        raise Refusal(
            f"{type(model).__name__} has dropout that its configuration does not name ({left[0]}): the loss "
            "would compare a model with dropout to one without. Choose another model."
        )


def assert_loaded(whole, shards, device):
    """Assert that the ranks together hold the first rank's weights: tensor by tensor, their bits' sums.

    Args: whole: the model, None on all ranks but the first. shards: {name: this rank's part, no padding}.
    """
    found = torch.stack([sum_bits(shard).to(device) for shard in shards.values()])
    names, wanted = list(shards), torch.zeros_like(found)
    if whole is not None:
        weights = dict(whole.named_parameters())
        assert weights.keys() == shards.keys(), f"weights differ: {weights.keys() ^ shards.keys()}"
        wanted = torch.stack([sum_bits(weights[name].to(shards[name].dtype)) for name in names]).to(device)
    dist.all_reduce(found)
    dist.broadcast(wanted, src=0)
    wrong = [name for name, equal in zip(names, (found == wanted).tolist()) if not equal]
    assert not wrong, f"the ranks do not hold what the files do: {wrong}"


# --- Writing ---


def saved_shapes(model):
    """{name: shape} of what a model file holds: parameters and some buffers, a tied weight once."""
    kept = set(model.state_dict())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: getattr(t, "ds_shape", t.shape) for name, t in tensors if name in kept}


def try_to_write(pretrained, shapes):
    """Write all but the weights into a folder that is gone afterwards, and plan the weights' files.

    Raises: ValueError for a model that could be trained, but not written.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            _write_all_but_weights(Path(folder), pretrained, shapes)
        except Exception as error:
            raise Refusal(
                f"--model_name_or_path {pretrained.name}: once trained it could not be written, for "
                f"{type(error).__name__}: {error}. Mend its folder, or choose another model."
            ) from error


def write_pretrained(folder, pretrained, weights):
    """Write a trained model in Hugging Face format, each tensor in the dtype that it came in.

    Args: folder: an existing one. pretrained: what the training began with. weights: {name: whole tensor}, a
          tied weight once.
    """
    shapes = {name: weight.shape for name, weight in weights.items()}
    write_pretrained_streamed(folder, pretrained, shapes, weights.items())


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


def _write_all_but_weights(folder, pretrained, shapes, max_shard_bytes=2 * 2**30):
    """Configurations and tokenizer. Returns the model without weights, and which file holds which tensor."""
    with torch.device("meta"):  # a shell that knows names, ties and config
        shell = empty_model(pretrained.config, dtype=pretrained.dtype)
        shell._weight_conversions = pretrained.conversions
        promised = [(name, torch.empty(shape)) for name, shape in shapes.items()]
    prefix = shell.base_model_prefix
    plan = split_torch_state_dict_into_shards(
        {name: x.to(pretrained.file_dtype(name, prefix)) for name, x in as_in_files(shell, promised)}
        | pretrained.unused,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    config = copy.deepcopy(pretrained.config)
    config.architectures = config.architectures or [type(shell).__name__]
    config.save_pretrained(folder)
    if pretrained.generation_config is not None:
        # to the letter: transformers would not write what it takes for invalid
        (folder / "generation_config.json").write_text(pretrained.generation_config)
    pretrained.tokenizer.save_pretrained(folder)
    return shell, plan


def write_pretrained_streamed(folder, pretrained, shapes, tensors, max_shard_bytes=2 * 2**30):
    """The same from tensors that come one by one: at most a file's worth and a layer are held at a time.

    Args: shapes: {name: shape}, a tied weight once. tensors: iterable of (name, whole tensor), each once, in
          the same order of names, layer by layer; they are copied.
    """
    folder = Path(folder)
    shell, plan = _write_all_but_weights(folder, pretrained, shapes, max_shard_bytes)
    held = {file: {} for file in plan.filename_to_tensors}
    file_of = {key: file for file, keys in plan.filename_to_tensors.items() for key in keys}
    copies = ((key, tensor.detach().to("cpu", copy=True)) for key, tensor in tensors)
    for key, tensor in itertools.chain(as_in_files(shell, copies), pretrained.unused.items()):
        file, dtype = file_of[key], pretrained.file_dtype(key, shell.base_model_prefix)
        # a copy: experts are views of one tensor
        held[file][key] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if len(held[file]) == len(plan.filename_to_tensors[file]):
            save_file(held.pop(file), folder / file, metadata={"format": "pt"})
    assert not held, f"tensors are missing of {', '.join(held)}"
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
