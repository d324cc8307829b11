"""A reference model's log-probabilities on disk, with a fingerprint of all that they depend on."""

import hashlib
import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from common import Refusal

REFERENCE = "reference_logps.safetensors"  # in output_dir


def sum_bits(tensor):
    """A tensor's bits as whole numbers, summed mod 2^64: () int64, the same in any order."""
    numbers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    pieces = tensor.detach().flatten().view(numbers).split(2**24)  # widened to 64 bits 128 MiB at a time
    return sum(piece.sum(dtype=torch.int64) for piece in pieces)


def model_fingerprint(model):
    """Names a model, on any number of ranks: configuration, and each weight's fp32 bits summed mod 2^64."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "dtype", "transformers_version"):  # the same model by another way
        config.pop(name, None)
    names, sums = [json.dumps(config, sort_keys=True, default=str)], []
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        names.append(name)
        sums.append(sum_bits(local))
    sums = torch.stack(sums)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return hashlib.sha256(json.dumps([names, sums.tolist()]).encode()).hexdigest()


def read_reference(output_dir, fingerprint):
    """The tensors that an earlier start of this run wrote, {} if there are none.

    Raises: ValueError if their fingerprint ({what: its name}) is another one.
    """
    path = Path(output_dir) / REFERENCE
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        found = file.metadata() or {}
        other = [what for what in fingerprint if found.get(what) != fingerprint[what]]
        if other:
            raise Refusal(
                f"{path} belongs to another run: its {' and its '.join(other)} is not this one's. Use that "
                "run's model, data and limits, or remove the file to have the reference computed again."
            )
        return {name: file.get_tensor(name) for name in file.keys()}


def write_reference(temporary, tensors, fingerprint):
    """Write into an existing folder, from which checkpoints.commit_files moves the file to its place."""
    save_file(tensors, Path(temporary) / REFERENCE, metadata=fingerprint)
