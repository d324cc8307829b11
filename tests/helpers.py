"""Tiny random models of five families, random documents, and a place of their own for runs."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.attention import register_varlen_attention
from common.memory import PretendedRun

VOCAB = 64
WINDOW = 4  # shorter than the tests' documents
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,  # a scaling that is not SDPA's default
    },
    "phi3": {},
}


def tiny_model(family, attn_implementation="varlen", **overrides):
    """A random fp32 model in eval mode, the same at every call; overrides: fields of its configuration."""
    register_varlen_attention()
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # large enough that a wrong attention moves the logits
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    config = AutoConfig.for_model(family, **{**fields, **FAMILIES.get(family, {}), **overrides})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attn_implementation
    )
    return model.eval()


@contextmanager
def alone_on_the_cpu(cache):
    """Inside, datasets are cached in this folder, and no GPU is seen, by subprocesses neither: a run on one
    rank and a run on two are to be compared to the last digits.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield cache


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def documents(seed, lengths, vocab=VOCAB):
    """Random sequences of these lengths, every token scored: [{"input_ids": [..], "labels": [..]}, ..]."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": x, "labels": list(x)} for x in ids]


def enable_checkpointing(model):
    # newer releases of transformers call it activation checkpointing
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def freeze_first(script, monkeypatch):
    """In this script's models, nothing up to the first decoder layer is trained.

    Returns: a list that fills with whether that layer's output took part in a graph, once a forward.
    """
    prepare, in_graph = script.prepare_training, []

    def prepare_frozen(model, *rest):
        layer = script.decoder_layers(model)[0]
        for module in (model.get_input_embeddings(), layer):
            module.requires_grad_(False)
        layer.register_forward_hook(lambda module, args, output: in_graph.append(output.requires_grad))
        return prepare(model, *rest)

    monkeypatch.setattr(script, "prepare_training", prepare_frozen)
    return in_graph


FROZEN = ("model.embed_tokens.", "model.layers.0.")  # of a Llama


def inputs(batch):
    """What of a batch goes into the model."""
    names = ("labels", "score_index", "score_ids", "completion_lengths")
    return {name: value for name, value in batch.items() if name not in names}


def gradients(model):
    """{name: gradient} of every parameter that has one, cleared from the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def worst(found, expected):
    """The largest absolute difference between two tensors, or between two dicts of gradients."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        return max(worst(found[name], expected[name]) for name in expected)
    assert found.shape == expected.shape
    return (found.float() - expected.float()).abs().max().item()


class OneRank(PretendedRun):
    """A run on one rank, without a folder and a process group, for the functions that want one."""

    pretends, first = False, True

    def __init__(self):
        super().__init__(1, None)

    def sum(self, values):
        return {name: float(value) for name, value in values.items()}

    max = sum

    def value(self, tensor):
        return float(tensor)


def run_on_two_ranks(script, jobs, folder):
    """Run {name: flags} of a script, one after another, on the same two gloo ranks, into folder/name.

    What each rank's runs returned or raised stands in folder/results<rank>.json afterwards.
    """
    listed = {name: [script, {**flags, "output_dir": str(folder / name)}] for name, flags in jobs.items()}
    (folder / "jobs.json").write_text(json.dumps(listed))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*launcher, str(Path(__file__).with_name("script_runs.py")), str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        stderr = process.communicate(timeout=240)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, stderr[-3000:]
