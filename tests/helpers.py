"""Tiny random models of five families, random documents, and runs of the scripts, which are compared."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from common.attention import register_varlen_attention
from common.memory import PretendedRun

ROOT = Path(__file__).parents[1]
DEMO_MODEL = str(ROOT / "demo/model")
END = 257  # the demo tokenizer's end of sequence
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


def write_model(path, family="llama", dtype=torch.float32, chat_template=None, **overrides):
    """A tiny random model with the demo's tokenizer, as a Hugging Face folder."""
    fields = {"vocab_size": 261, "pad_token_id": 256, "bos_token_id": None, "eos_token_id": END, **overrides}
    tiny_model(family, "eager", **fields).to(dtype).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    tokenizer.save_pretrained(path)
    return str(path)


def byte_pair_tokenizer():
    """Which joins an "a" and a "b" that meet: <eos> 0, x 1, a 2, b 3, y 4, ab 5."""
    byte_pairs = models.BPE(
        {piece: i for i, piece in enumerate(["<eos>", "x", "a", "b", "y", "ab"])}, [("a", "b")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(byte_pairs), eos_token="<eos>")


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


def random_text(generator, shortest, longest):
    return "".join(generator.choices("abcdef ", k=generator.randint(shortest, longest)))


def random_texts(seed, count, longest=50):
    generator = random.Random(seed)
    return [{"text": random_text(generator, 3, longest)} for _ in range(count)]


def preference(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def random_preferences(seed, count):
    text = partial(random_text, random.Random(seed), 1)
    return [preference(text(30), text(15) + "x", text(15) + "y") for _ in range(count)]


def small_run(script, folder):
    """Flags of a run of a fraction of a second. SFT: 20 texts of 4 to 51 tokens, in 9 rows if packed, and an
    evaluation of 7 examples of uneven lengths. DPO: 10 pairs, and an evaluation of 5.
    """
    if script.__name__ == "sft_packing":
        lengths = [(3, 20), (17, 5), (8, 30), (1, 1), (20, 12), (11, 2), (5, 26)]
        rows, some = random_texts(0, 20), [{"prompt": "p" * n, "completion": "c" * m} for n, m in lengths]
    else:
        rows, some = random_preferences(0, 10), random_preferences(6, 5)
    return {
        "model_name_or_path": write_model(folder / "model"),
        "dataset_name": write_jsonl(folder / "train.jsonl", rows),
        "eval_dataset_name": write_jsonl(folder / "eval.jsonl", some),
        "max_length": 64,
        "learning_rate": 1e-3,
    }


def talk(*contents):
    """A conversation in which user and assistant take turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def enable_checkpointing(model):
    # newer releases of transformers call it activation checkpointing
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


FROZEN = ("model.embed_tokens.", "model.layers.0.")  # of a Llama


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


def step_by(script, model, batches, args):
    """What a script's train_step returns of these micro-batches, and its gradients, before any update."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.0), {}
    optimizer.register_step_pre_hook(lambda *_: found.update(gradients(model)))
    return script.train_step(model, optimizer, batches, args, OneRank()), found


def update_plainly(model, learning_rate, max_grad_norm):
    """One update by torch's own AdamW from the gradients in `model`. Returns weights, and gradients' norm."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    named = list(model.named_parameters())
    for is_norm, weight_decay in ((False, 10.0), (True, 0.0)):
        parameters = [p for name, p in named if ("norm" in name) == is_norm]
        torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay).step()
    return {name: p.detach() for name, p in named}, norm


# --- Runs of the scripts ---

FinishedRun = namedtuple("FinishedRun", ["returned", "metrics", "weights"])
CLOCK = {"tokens_per_second", "step_seconds", "peak_memory_bytes"}
CLOCK |= {"gather_seconds", "generation_seconds", "update_seconds"}  # GRPO's


def run(script, output_dir, flags, **changes):
    returned = script.main(script.Arguments(output_dir=str(output_dir), **{**flags, **changes}))
    return read_run(output_dir, returned)


def read_run(output_dir, returned=None):
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    weights = Path(output_dir) / "model.safetensors"
    weights = load_file(weights) if weights.exists() else None
    return FinishedRun(returned, [json.loads(line) for line in lines], weights)


def values(a_run, name):
    return [step[name] for step in a_run.metrics]


def bytes_of(summary):
    return {row["name"]: row["bytes"] for row in summary["ledger"]}


def assert_same_bits(first, second):
    """In every metric that both runs have, but what the clock says; and in the weights."""
    for one, other in zip(first.metrics, second.metrics, strict=True):
        names = (one.keys() & other.keys()) - CLOCK
        assert {name: one[name] for name in names} == {name: other[name] for name in names}
    assert {"loss", "grad_norm", "step", "epoch", "learning_rate", "num_scored_tokens"} < names
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def assert_same_curve(first, second, tolerance=1e-5, other_data=("num_tokens",)):
    """To rounding: sums and norms to `tolerance` of their size, the rest absolutely; counts exactly."""
    for one, other in zip(first.metrics, second.metrics, strict=True):
        for name in (one.keys() & other.keys()) - CLOCK - set(other_data):
            relative = name.startswith(("logps", "eval_logps", "grad_norm"))
            exact = name in ("step", "epoch", "learning_rate", "num_tokens", "num_scored_tokens")
            size = max(abs(other[name]), 1e-9) if relative else 1
            assert abs(one[name] - other[name]) <= (0 if exact else tolerance * size), name
    assert worst(first.weights, second.weights) <= 1e-4


def cut_after(run_folder, step, folder):
    """A copy of a finished run as it was right after the checkpoint of `step`."""
    folder.mkdir()
    shutil.copytree(run_folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    for reference in run_folder.glob("reference_logps.safetensors"):
        shutil.copy(reference, folder)
    lines = (run_folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: step + 1]) + '{"step": ')  # killed while writing
    return folder


def assert_refused(script, folder, flags, message):
    """main raises ValueError with this message, and leaves what is in `folder` as it was."""

    def contents():
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = contents()
    with pytest.raises(ValueError, match=message):
        run(script, folder, flags)
    assert contents() == before


def assert_first_is_frozen(done, came):
    """Of a run after freeze_first: only the rest has moved, and has gradients and an optimizer's state."""
    for name, weight in done.weights.items():
        assert torch.equal(weight, came[name]) == name.startswith(FROZEN), name
    trained, found = (
        sum(w.numel() for name, w in came.items() if not name.startswith(FROZEN)),
        bytes_of(done.returned),
    )
    assert found["gradients"] == 4 * trained
    assert found["optimizer"] == pytest.approx(8 * trained, rel=0.01)


def run_on_two_ranks(jobs, folder):
    """Run {name: [script, flags]}, one after another, on the same two gloo ranks, into folder/name.

    Returns: what each rank's runs returned or raised.
    """
    listed = {
        name: [script, {**flags, "output_dir": str(folder / name)}] for name, (script, flags) in jobs.items()
    }
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
    return [json.loads((folder / f"results{rank}.json").read_text()) for rank in (0, 1)]
