"""DPO without padding: three ways to batch, one loss; a reference that resuming does not move."""

import ast
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import (
    FROZEN,
    alone_on_the_cpu,
    documents,
    freeze_first,
    gradients,
    tiny_model,
    worst,
    write_jsonl,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerFast

import dpo_padding_free
from common.checkpoints import list_checkpoints
from common.collators import flatten_shared_prompt
from common.reference import REFERENCE
from dpo_padding_free import (
    METRICS,
    TOKENS,
    Arguments,
    Pairs,
    batch_loss,
    collate,
    cut_pair,
    dpo_loss,
    load_examples,
    main,
    sequence_logps,
    tokenize,
)

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "dpo_padding_free.py"
DEMO_MODEL = ROOT / "demo/model"
END = 257  # the demo tokenizer's end of sequence
VOCAB = 261
WAYS = {
    "shared": {},
    "shared with prefix": {"share_prefix": True},
    "padding-free": {"share_prompt": False},
    "padded": {"padding_free": False},
}


# --- Models, data and runs ---


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with alone_on_the_cpu(tmp_path_factory.mktemp("cache")) as folder:
        yield folder


def write_model(path, family="llama", dtype=torch.float32, chat_template=None, **overrides):
    """A tiny random model with the demo's tokenizer, as a Hugging Face folder."""
    special = {"pad_token_id": 256, "bos_token_id": None, "eos_token_id": END}
    attention = "eager" if family == "mamba" else "varlen"
    model = tiny_model(family, attention, **{"vocab_size": VOCAB, **special, **overrides})
    model.to(dtype).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    tokenizer.save_pretrained(path)
    return str(path)


def random_text(generator, longest):
    return "".join(generator.choices("abcdef ", k=generator.randint(1, longest)))


def random_preferences(seed, count):
    generator = random.Random(seed)
    return [
        {
            "prompt": random_text(generator, 30),
            "chosen": random_text(generator, 15) + "x",
            "rejected": random_text(generator, 15) + "y",
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Flags of a run of a fraction of a second: 10 pairs, 4 + 4 + 2 to a step."""
    folder = tmp_path_factory.mktemp("base")
    return {
        "model_name_or_path": write_model(folder / "model"),
        "dataset_name": write_jsonl(folder / "train.jsonl", random_preferences(0, 10)),
        "max_length": 64,
        "learning_rate": 1e-3,
    }


@pytest.fixture(scope="module")
def evaluated(base, tmp_path_factory):
    """The same with an evaluation of 5 pairs."""
    name = write_jsonl(tmp_path_factory.mktemp("evaluated") / "eval.jsonl", random_preferences(6, 5))
    return {**base, "eval_dataset_name": name}


Run = namedtuple("Run", ["returned", "metrics", "weights"])


def run(output_dir, flags, **changes):
    returned = main(Arguments(output_dir=str(output_dir), **{**flags, **changes}))
    return read_run(output_dir, returned)


def read_run(output_dir, returned=None):
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    weights = Path(output_dir) / "model.safetensors"
    weights = load_file(weights) if weights.exists() else None
    return Run(returned, [json.loads(line) for line in lines], weights)


def values(a_run, name):
    return [step[name] for step in a_run.metrics]


def losses(a_run):
    return values(a_run, "loss")


def curve_difference(first, second):
    """How far two runs' metrics of pairs and gradient norms are apart, the norms relative to their size."""
    assert len(first.metrics) == len(second.metrics)
    pairs = list(zip(first.metrics, second.metrics))
    return max(
        *(abs(a[name] - b[name]) for a, b in pairs for name in METRICS if not name.startswith("logps")),
        *(abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs for name in ("logps/chosen", "grad_norm")),
    )


def assert_same_bits(first, second):
    for name in (*METRICS, "grad_norm"):
        assert values(first, name) == values(second, name), name
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


# --- 1. Equality ---

FAMILIES = ("llama", "qwen3", "mistral", "gemma3_text", "gpt2")


@functools.cache
def shared_model(family):
    return tiny_model(family)


def make_pairs(seed, shapes):
    """Pairs of random tokens; shapes: lengths of prompt, chosen, rejected, and of their common beginning."""
    pairs = []
    parts = iter(documents(seed, [n + 1 for shape in shapes for n in shape]))
    for shape in shapes:
        prompt, chosen, rejected, prefix = (next(parts)["input_ids"][:n] for n in shape)
        n = min(len(chosen), len(rejected), len(prefix))
        chosen, rejected = prefix[:n] + chosen[n:], prefix[:n] + rejected[n:]
        pairs.append(cut_pair(prompt, chosen, rejected, {**NO_LIMITS, "max_length": 1000}))
    return pairs


NO_LIMITS = {"max_prompt_length": None, "max_completion_length": None, "truncation_mode": "keep_end"}


def make_reference(count):
    """What some reference model said, not far from nothing: a preference of its own for each pair."""
    return torch.randn(2 * count, generator=torch.Generator().manual_seed(count)) - 20


def naive_logps(model, pairs):
    model.set_attn_implementation("sdpa")
    logps = []
    for pair in pairs:
        for prompt, completion in (TOKENS[:2], TOKENS[2:]):
            ids = torch.tensor(pair[prompt] + pair[completion])
            log_p = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            first = max(len(pair[prompt]), 1)
            logps.append(log_p[range(first - 1, len(ids) - 1), ids[first:]].sum())
    return torch.stack(logps)


def naive(model, pairs):
    """Log-probabilities, mean loss and gradients: each sequence alone, from all its logits; DPO's formula."""
    logps = naive_logps(model, pairs)
    ratios = logps - make_reference(len(pairs))
    loss = -torch.nn.functional.logsigmoid(0.1 * (ratios[0::2] - ratios[1::2])).mean()
    loss.backward()
    return {"logps": logps.detach(), "loss": loss.detach(), **gradients(model)}


def computed(model, pairs, attn_implementation=None, pad_token_id=0, **flags):
    """The same by the script: collated, one forward."""
    args = Arguments(loss_chunk_size=5, **flags)
    model.set_attn_implementation(attn_implementation or ("varlen" if args.padding_free else "sdpa"))
    batch = collate(pairs, args, pad_token_id)
    batch["ref_logps"] = make_reference(len(pairs))
    loss, _ = batch_loss(model, None, batch, args)
    (loss / len(pairs)).backward()
    logps = sequence_logps(model, batch, args.loss_chunk_size).detach()
    return {"logps": logps, "loss": (loss / len(pairs)).detach(), **gradients(model)}


def difference(model, pairs, **flags):
    """The worst difference in a log-probability (relative, it is a sum), the loss or any gradient."""
    found, expected = computed(model, pairs, **flags), naive(model, pairs)
    size = expected.pop("logps")
    return max(worst(found.pop("logps") / size, size / size), worst(found, expected))


lengths = st.integers(1, 9)
shapes = st.lists(
    st.one_of(
        st.tuples(lengths, lengths, lengths, st.integers(0, 9)),
        # no prompt, as keep_end may leave it: the first token is not scored
        st.tuples(st.just(0), st.integers(2, 9), st.integers(2, 9), st.integers(0, 9)),
    ),
    min_size=1,
    max_size=4,
)
SHAPES = [(7, 5, 3, 0), (9, 1, 4, 0), (1, 6, 6, 4), (0, 5, 3, 2), (12, 4, 8, 3), (0, 2, 2, 0), (3, 1, 1, 0)]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=12)
@given(seed=st.integers(0, 999), shapes=shapes)
def test_logps_loss_and_every_gradient_are_those_of_sequences_alone(way, seed, shapes):
    assert difference(shared_model("llama"), make_pairs(seed, shapes), **WAYS[way]) <= 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_naive_gradients(family, way):
    """Mistral's and Gemma's windows of 4 tokens are shorter than most of these prompts."""
    assert difference(shared_model(family), make_pairs(1, SHAPES), **WAYS[way]) <= 1e-5


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_row_of_whole_sequences_runs_on_transformers_own_attention(attn_implementation):
    flags = {"attn_implementation": attn_implementation, **WAYS["padding-free"]}
    assert difference(shared_model("llama"), make_pairs(1, SHAPES), **flags) <= 1e-5


def test_flash_attention_is_accepted_where_sequences_are_whole():
    flags = {"attn_implementation": "flash_attention_2", "bf16": True}
    dpo_padding_free.check_arguments(Arguments(**flags, share_prompt=False))
    with pytest.raises(ValueError, match="flash_attention_2 ignores kv_index.*--no_share_prompt"):
        dpo_padding_free.check_arguments(Arguments(**flags))


@pytest.mark.parametrize("way", WAYS)
def test_prompts_that_keep_end_left_different(way):
    limits = {**NO_LIMITS, "max_length": 8}
    parts = iter(documents(3, [6, 4, 7, 6, 9, 9]))
    ids = [next(parts)["input_ids"] for _ in range(6)]
    pairs = [cut_pair(*ids[:3], limits), cut_pair(*ids[3:], limits)]
    assert [[len(pair[name]) for name in TOKENS] for pair in pairs] == [[4, 4, 1, 7], [0, 8, 0, 8]]
    assert difference(shared_model("llama"), pairs, **WAYS[way]) <= 1e-5


@pytest.mark.parametrize("pad_token_id", [0, 2, 5])
def test_a_padding_id_may_be_any_token(pad_token_id):
    pairs = make_pairs(2, SHAPES)
    for pair in pairs:
        pair["chosen_ids"][-1] = pair["rejected_ids"][-1] = pad_token_id  # as if it ended in EOS
    model = shared_model("llama")
    padded = computed(model, pairs, pad_token_id=pad_token_id, padding_free=False)
    assert worst(padded, computed(model, pairs)) <= 2e-5
    assert collate(pairs, Arguments(padding_free=False), pad_token_id)["completion_lengths"].tolist() == [
        n - (prompt == 0) for prompt, *two, _ in SHAPES for n in two
    ]


def test_how_many_tokens_each_way_computes():
    pairs = make_pairs(0, [(10, 5, 3, 2), (6, 4, 8, 0)])
    tokens = {way: collate(pairs, Arguments(**flags), 0)["input_ids"].numel() for way, flags in WAYS.items()}
    assert tokens == {"shared": 36, "shared with prefix": 34, "padding-free": 52, "padded": 60}
    for way, flags in WAYS.items():
        examples = datasets.Dataset.from_list([{"example": 0, **pair} for pair in pairs])
        costs = Pairs(examples, Arguments(**flags), "x").costs
        assert (4 * costs[0] // 2 if way == "padded" else costs.sum()) == tokens[way]


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_one_batch_of_4_is_4_batches_of_1(loss_type, base, tmp_path):
    """The last window is smaller: 10 pairs are 4 + 4 + 2."""
    flags = {**base, "loss_type": loss_type}
    four = run(tmp_path / "4x1", flags, per_device_train_batch_size=4)
    ones = run(tmp_path / "1x4", flags, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert len(four.metrics) == 3
    assert curve_difference(four, ones) <= 1e-5
    assert worst(four.weights, ones.weights) <= 1e-4
    for name in ("num_tokens", "num_scored_tokens", "learning_rate", "epoch"):
        assert values(four, name) == values(ones, name)


@pytest.fixture(scope="module")
def naive_run(evaluated, tmp_path_factory):
    """Padded, with a second model as the reference."""
    flags = {"padding_free": False, "precompute_ref_log_probs": False, "eval_steps": 1}
    return run(tmp_path_factory.mktemp("naive"), evaluated, **flags)


@pytest.mark.parametrize("precompute_ref_log_probs", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_every_run_is_the_naive_run(way, precompute_ref_log_probs, naive_run, evaluated, tmp_path):
    """Steps, reference and evaluation."""
    changes = {**WAYS[way], "precompute_ref_log_probs": precompute_ref_log_probs, "eval_steps": 1}
    found = run(tmp_path, evaluated, **changes)
    assert curve_difference(found, naive_run) <= 1e-5
    assert worst(found.weights, naive_run.weights) <= 1e-4
    for name in METRICS:
        assert values(found, f"eval_{name}") == pytest.approx(values(naive_run, f"eval_{name}"), abs=2e-5)


def test_metrics_are_those_of_each_sequence_alone(evaluated, tmp_path):
    """All ten pairs in one step that changes nothing: the policy is the reference."""
    done = run(tmp_path, evaluated, per_device_train_batch_size=10, learning_rate=0.0)
    model = AutoModelForCausalLM.from_pretrained(evaluated["model_name_or_path"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(evaluated["model_name_or_path"])
    [line] = done.metrics
    for prefix, name in (("", "dataset_name"), ("eval_", "eval_dataset_name")):
        examples, _ = load_examples(evaluated[name], "train", tokenizer, Arguments(max_length=64))
        logps = naive_logps(model, list(examples))
        assert line[f"{prefix}logps/chosen"] == pytest.approx(logps[0::2].mean().item(), rel=1e-5)
        assert line[f"{prefix}logps/rejected"] == pytest.approx(logps[1::2].mean().item(), rel=1e-5)
        assert line[f"{prefix}loss"] == pytest.approx(math.log(2), abs=1e-5)


# --- 2. Mutations: what the comparisons above would catch ---


def change_shared_rows(monkeypatch, change):
    def changed(groups):
        row = flatten_shared_prompt(groups)
        change(row)
        return row

    monkeypatch.setattr(dpo_padding_free, "flatten_shared_prompt", changed)


def second_goes_on_after_the_first(row):
    """Position ids of the rejected completion count on from the chosen's."""
    bounds = row["cu_seq_lens_q"].tolist()
    row["position_ids"][0, bounds[2] : bounds[3]] += bounds[2] - bounds[1]


def keys_of_another_prompt(row):
    bounds = row["cu_seq_lens_k"].tolist()
    row["kv_index"][bounds[2]] = row["kv_index"][bounds[2] + 1]


def second_reads_the_first(row):
    """The rejected's keys: of its prompt's last token, the chosen's first."""
    bounds_q, bounds_k = row["cu_seq_lens_q"].tolist(), row["cu_seq_lens_k"].tolist()
    length = bounds_q[3] - bounds_q[2]
    row["kv_index"][bounds_k[3] - length - 1] = bounds_q[1]


def scores_from_the_token_before_in_the_row(row):
    lengths = row["completion_lengths"].tolist()
    first = lengths[0]
    row["score_index"][first] = row["cu_seq_lens_q"][2] - 1


def lengths_change_places(row):
    row["completion_lengths"] = row["completion_lengths"].flip(0)


@pytest.mark.parametrize(
    "family, change",
    [
        # learned positions tell; rotary ones are relative, but the prompt is not moved along
        ("gpt2", second_goes_on_after_the_first),
        ("llama", second_goes_on_after_the_first),
        ("llama", keys_of_another_prompt),
        ("llama", second_reads_the_first),
        ("llama", scores_from_the_token_before_in_the_row),
        ("llama", lengths_change_places),
    ],
)
def test_a_shared_row_with_a_mistake_is_found(family, change, monkeypatch):
    model, pairs = shared_model(family), make_pairs(4, [(5, 4, 6, 0), (3, 2, 5, 0)])
    assert difference(model, pairs) <= 1e-5
    change_shared_rows(monkeypatch, change)
    assert difference(model, pairs) > 1e-3


def test_the_start_up_check_finds_it_too(base, tmp_path, monkeypatch):
    change_shared_rows(monkeypatch, second_reads_the_first)
    with pytest.raises(ValueError, match="mixes the sequences of a row of shared prompts.*--no_share_prompt"):
        run(tmp_path / "out", base)
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out", base, check_isolation=False)


def prompts_scored(sequences):
    return [{**s, "labels": s["input_ids"]} for s in sequences]


@pytest.mark.parametrize("way, collator", [("padding-free", "flatten"), ("padded", "pad")])
def test_a_loss_mask_taken_away_is_found(way, collator, monkeypatch):
    model, pairs = shared_model("llama"), make_pairs(4, [(5, 4, 6, 0), (3, 2, 5, 0)])
    original = getattr(dpo_padding_free, collator)
    monkeypatch.setattr(dpo_padding_free, collator, lambda s, *args: original(prompts_scored(s), *args))
    with pytest.raises((AssertionError, RuntimeError)):  # more scores than the sequences have scored tokens
        assert difference(model, pairs, **WAYS[way]) <= 1e-3


def test_an_attention_mask_that_hides_a_token_is_found(monkeypatch):
    model, pairs = shared_model("llama"), make_pairs(4, [(5, 4, 6, 0), (3, 2, 5, 0)])
    original = dpo_padding_free.pad

    def hides(sequences, pad_token_id):
        batch = original(sequences, pad_token_id)
        batch["attention_mask"][:, 2] = 0
        return batch

    monkeypatch.setattr(dpo_padding_free, "pad", hides)
    assert difference(model, pairs, **WAYS["padded"]) > 1e-3


def test_a_mean_per_micro_batch_is_found(base, tmp_path, monkeypatch):
    """10 pairs in one step, cut 4 + 4 + 2: a mean of means weighs the last two double."""
    size = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    one = run(tmp_path / "one", base, per_device_train_batch_size=10)
    assert curve_difference(run(tmp_path / "three", base, **size), one) <= 1e-5
    monkeypatch.setattr(
        dpo_padding_free,
        "batch_loss",
        lambda model, reference, batch, args: [
            10 / 3 * x / (len(batch["completion_lengths"]) // 2)
            for x in batch_loss(model, reference, batch, args)
        ],
    )
    assert curve_difference(run(tmp_path / "means", base, **size), one) > 1e-3


def test_ipo_over_the_batchs_tokens_is_found(monkeypatch):
    model, pairs = shared_model("llama"), make_pairs(4, [(5, 4, 6, 0), (3, 2, 5, 0)])

    def loss(change):
        batch = change(collate(pairs, Arguments(), 0) | {"ref_logps": make_reference(2)})
        return batch_loss(model, None, batch, Arguments(loss_type="ipo"))[0].item()

    model.set_attn_implementation("varlen")
    ratios = computed(model, pairs)["logps"] - make_reference(2)
    h = [ratios[0] / 4 - ratios[1] / 6, ratios[2] / 2 - ratios[3] / 5]
    expected = sum((x - 5) ** 2 for x in h).item()
    assert loss(lambda batch: batch) == pytest.approx(expected, rel=1e-5)
    whole = torch.tensor([6, 11, 6, 11])
    original = dpo_padding_free.dpo_loss
    monkeypatch.setattr(
        dpo_padding_free,
        "dpo_loss",
        lambda *args, chosen_lengths, rejected_lengths: original(
            *args, chosen_lengths=whole[0::2], rejected_lengths=whole[1::2]
        ),
    )
    assert abs(loss(lambda batch: batch) / expected - 1) > 1e-2


# --- 3. Isolation ---


def logps_of(pairs, **flags):
    args = Arguments(**flags)
    model = shared_model("llama")
    model.set_attn_implementation("varlen" if args.padding_free else "sdpa")
    with torch.no_grad():
        return sequence_logps(model, collate(pairs, args, 0), 5).view(-1, 2)


@pytest.mark.parametrize("way", WAYS)
def test_no_other_pair_and_no_other_completion_moves(way):
    before = logps_of(make_pairs(5, SHAPES), **WAYS[way])
    for name, moved in (("chosen_ids", [0]), ("rejected_ids", [1]), ("chosen_prompt_ids", [0, 1])):
        pairs = make_pairs(5, SHAPES)
        pairs[4][name] = [(token + 1) % 64 for token in pairs[4][name]]
        if name == "chosen_prompt_ids":
            pairs[4]["rejected_prompt_ids"] = pairs[4][name]
        elif way == "shared with prefix":
            pairs[4]["prefix_length"] = 0
        change = (logps_of(pairs, **WAYS[way]) - before).abs()
        assert change[4, moved].min() > 1e-2
        change[4, moved] = 0
        assert change.max() <= 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_permuted_pairs_give_permuted_results(way):
    pairs = make_pairs(6, SHAPES)
    order = [3, 0, 6, 2, 5, 1, 4]
    permuted = logps_of([pairs[i] for i in order], **WAYS[way])
    assert worst(permuted, logps_of(pairs, **WAYS[way])[order]) <= 1e-5


def test_collating_changes_no_pair():
    for flags in WAYS.values():
        pairs = make_pairs(7, SHAPES)
        collate(pairs, Arguments(**flags), 0)
        assert pairs == make_pairs(7, SHAPES)


# --- 4. The loss ---


def example_loss(loss_type, label_smoothing=0.0, beta=0.1):
    logps = [torch.tensor([x], requires_grad=i < 2) for i, x in enumerate((-10.0, -30.0, -12.0, -26.0))]
    lengths = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([8])}
    return dpo_loss(*logps, beta, loss_type, label_smoothing, **lengths)


@pytest.mark.parametrize(
    "loss_type, label_smoothing, expected",
    [
        # log-ratios: chosen -10 + 12 = 2, rejected -30 + 26 = -4; beta times their difference is 0.6
        ("sigmoid", 0.0, math.log(1 + math.exp(-0.6))),
        ("sigmoid", 0.25, 0.75 * math.log(1 + math.exp(-0.6)) + 0.25 * math.log(1 + math.exp(0.6))),
        ("hinge", 0.0, 0.4),
        # per token: 2 / 4 + 4 / 8 = 1; 1 / (2 beta) = 5; (1 - 5)^2
        ("ipo", 0.0, 16.0),
    ],
)
def test_losses_by_hand(loss_type, label_smoothing, expected):
    losses, chosen_rewards, rejected_rewards = example_loss(loss_type, label_smoothing)
    assert losses.tolist() == pytest.approx([expected], rel=1e-6)
    assert (chosen_rewards.item(), rejected_rewards.item()) == pytest.approx((0.2, -0.4))
    assert losses.requires_grad and not chosen_rewards.requires_grad and not rejected_rewards.requires_grad


def test_a_loss_that_has_no_formula_is_no_other_loss(monkeypatch):
    """Whoever adds a name to LOSSES and forgets the formula is told."""
    monkeypatch.setattr(dpo_padding_free, "LOSSES", (*dpo_padding_free.LOSSES, "robust"))
    lengths = {"chosen_lengths": torch.ones(1), "rejected_lengths": torch.ones(1)}
    with pytest.raises(ValueError, match="loss_type robust has no formula"):
        dpo_loss(*torch.zeros(4, 1), beta=0.1, loss_type="robust", **lengths)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("kto",), "loss_type is 'kto'; choose one of sigmoid, ipo, hinge"),
        (("ipo", 0.1), "label_smoothing 0.1 is not defined for loss_type ipo"),
        (("hinge", 0.1), "label_smoothing 0.1 is not defined for loss_type hinge"),
        (("sigmoid", 0.5), "label_smoothing is 0.5"),
        (("sigmoid", -0.1), "label_smoothing is -0.1"),
        (("sigmoid", 0.0, 0.0), "beta is 0.0"),
        (("ipo", 0.0, math.inf), "beta is inf"),
    ],
)
def test_losses_refuse(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        example_loss(*arguments)


def test_ipo_without_lengths_is_refused():
    with pytest.raises(ValueError, match="chosen_lengths"):
        dpo_loss(*[torch.zeros(1)] * 4, 0.1, "ipo")


def test_the_losses_gradients_push_apart():
    for loss_type in ("sigmoid", "ipo", "hinge"):
        chosen, rejected = (torch.tensor([-20.0], requires_grad=True) for _ in range(2))
        lengths = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([8])}
        reference = torch.tensor([-20.0])
        dpo_loss(chosen, rejected, reference, reference, 0.1, loss_type, **lengths)[0].sum().backward()
        assert chosen.grad < 0 < rejected.grad


# --- 5. Data ---


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TALK = [user("hi"), assistant("yo"), user("so")]
TALK_TEXT = "<|user|>hi<|end|><|assistant|>yo<|end|><|user|>so<|end|><|assistant|>"
FORMS = {
    "plain": {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
    "plain, implicit": {"chosen": "1+1=2", "rejected": "1+1=3"},
    "conversational": {"prompt": TALK, "chosen": [assistant("2")], "rejected": [assistant("3")]},
    "conversational, implicit": {"chosen": [*TALK, assistant("2")], "rejected": [*TALK, assistant("3")]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_preferences(form, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    name = write_jsonl(tmp_path / "rows.jsonl", [FORMS[form]])
    examples, data = load_examples(name, "train", tokenizer, Arguments())
    prompt = "1+1=" if "plain" in form else TALK_TEXT
    texts = [tokenizer.decode(examples[0][column]) for column in TOKENS]
    assert texts == [prompt, "2<|end|>", prompt, "3<|end|>"]
    assert data["boundaries_moved"] == 0 and data["examples_used"] == 1
    found = {
        n: examples[0][n] for n in ("chosen_length", "rejected_length", "shared_length", "prefix_length")
    }
    size = len(tokenizer(prompt).input_ids)
    assert found == dict(zip(found, (size + 2, size + 2, size, 0)))


@pytest.mark.parametrize(
    "row, prompt, chosen, rejected",
    [
        # of more turns than one
        (
            {
                "prompt": [user("a")],
                "chosen": [assistant("b"), user("c"), assistant("d")],
                "rejected": [assistant("e")],
            },
            "<|user|>a<|end|><|assistant|>",
            "b<|end|><|user|>c<|end|><|assistant|>d<|end|>",
            "e<|end|>",
        ),
        # an answer that both begin with belongs to the prompt, but never the last one
        (
            {
                "chosen": [user("a"), assistant("b")],
                "rejected": [user("a"), assistant("b"), user("c"), assistant("d")],
            },
            "<|user|>a<|end|><|assistant|>",
            "b<|end|>",
            "b<|end|><|user|>c<|end|><|assistant|>d<|end|>",
        ),
        # the conversations part at a question: no generation prompt
        (
            {
                "chosen": [*TALK[:2], user("c"), assistant("b")],
                "rejected": [*TALK[:2], user("d"), assistant("e")],
            },
            "<|user|>hi<|end|><|assistant|>yo<|end|>",
            "<|user|>c<|end|><|assistant|>b<|end|>",
            "<|user|>d<|end|><|assistant|>e<|end|>",
        ),
        # nothing in common: no prompt
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]},
            "",
            "<|user|>a<|end|><|assistant|>b<|end|>",
            "<|user|>c<|end|><|assistant|>b<|end|>",
        ),
        # whole conversations beside their prompt
        (
            {
                "prompt": [user("a")],
                "chosen": [user("a"), assistant("b")],
                "rejected": [user("a"), assistant("c")],
            },
            "<|user|>a<|end|><|assistant|>",
            "b<|end|>",
            "c<|end|>",
        ),
        # a turn that the prompt has begun goes on
        (
            {"prompt": [user("a"), assistant("b")], "chosen": [assistant("c")], "rejected": [assistant("d")]},
            "<|user|>a<|end|><|assistant|>b",
            "c<|end|>",
            "d<|end|>",
        ),
        # one is the other's beginning
        ({"chosen": "ab", "rejected": "abc"}, "ab", "<|end|>", "c<|end|>"),
        ({"chosen": "ab<|end|>", "rejected": "ac"}, "a", "b<|end|>", "c<|end|>"),
        ({"prompt": "", "chosen": "ab", "rejected": "ac"}, "", "ab<|end|>", "ac<|end|>"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "a", "<|end|>", "b<|end|>"),
    ],
)
def test_where_prompts_end(row, prompt, chosen, rejected):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    found = [tokenizer.decode(ids) for ids in tokenize(row, tokenizer)[:3]]
    assert found == [prompt, chosen, rejected]


def test_a_line_break_after_the_end_of_a_turn_is_left_out():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    prompt, chosen, rejected, moved = tokenize(FORMS["conversational"], tokenizer)
    assert [tokenizer.decode(ids) for ids in (chosen, rejected)] == ["2<|end|>", "3<|end|>"]
    assert tokenizer.decode(prompt).endswith("so<|end|>\n<|assistant|>") and not moved


def test_nothing_is_added_behind_an_end_that_the_model_names():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|assistant|>\n{% endfor %}"
    end = tokenizer.convert_tokens_to_ids("<|assistant|>")
    for ends, chosen in (((), "2<|assistant|>\n<|end|>"), ((END, end), "2<|assistant|>")):
        assert tokenizer.decode(tokenize(FORMS["conversational"], tokenizer, ends)[1]) == chosen


def test_a_template_without_eos_gets_one():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert tokenizer.decode(tokenize(FORMS["conversational"], tokenizer)[1]) == "[2]<|end|>"


def test_the_prompt_ends_where_joint_and_separate_tokenisation_part(tmp_path):
    pieces = ["<eos>", "x", "a", "b", "y", "ab"]
    byte_pairs = models.BPE({piece: i for i, piece in enumerate(pieces)}, [("a", "b")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(byte_pairs), eos_token="<eos>")
    # together: x ab y and x a y; "ab" holds a piece of the completion, so both completions begin there
    rows = [
        {"prompt": "xa", "chosen": "by", "rejected": "y"},
        {"prompt": "x", "chosen": "a", "rejected": "y"},
    ]
    assert tokenize(rows[0], tokenizer) == ([1], [5, 4, 0], [2, 4, 0], True)
    _, data = load_examples(write_jsonl(tmp_path / "rows.jsonl", rows), "train", tokenizer, Arguments())
    assert data["boundaries_moved"] == 1


P, C, R = [464, 6766, 318], [4171, 2], [4077, 2]


@pytest.mark.parametrize(
    "limits, expected",
    [
        ({}, (P, C, P, R)),
        ({"max_prompt_length": 2, "max_completion_length": 1}, ([6766, 318], [4171], [6766, 318], [4077])),
        ({"max_prompt_length": 1}, ([318], C, [318], R)),
        ({"max_length": 4}, (P, [4171], P, [4077])),
        ({"max_length": 3}, (P, [], P, [])),
        ({"max_length": 4, "truncation_mode": "keep_end"}, ([6766, 318], C, [6766, 318], R)),
        ({"max_length": 2, "truncation_mode": "keep_end"}, ([], C, [], R)),
        ({"max_length": 1, "truncation_mode": "keep_end"}, ([], [2], [], [2])),
        (
            {"max_prompt_length": 2, "max_length": 3, "truncation_mode": "keep_start"},
            ([6766, 318], [4171], [6766, 318], [4077]),
        ),
        (
            {"max_completion_length": 1, "max_length": 2, "truncation_mode": "keep_end"},
            ([318], [4171], [318], [4077]),
        ),
    ],
)
def test_the_truncation_table(limits, expected):
    limits = {**NO_LIMITS, "max_length": 1000, "truncation_mode": "keep_start", **limits}
    cut = cut_pair(P, C, R, limits)
    assert tuple(cut[name] for name in TOKENS) == expected
    assert cut["chosen_length"] == len(expected[0] + expected[1])
    assert cut["tokens_cut"] == 10 - sum(map(len, expected))
    assert cut["completions_without_eos"] == 2 - (expected[1][-1:] == [2]) - (expected[3][-1:] == [2])
    assert cut["unscored"] == (len(expected[0] + expected[1]) < 2 or not expected[1])
    assert cut["prompts_truncated"] == (expected[0] != P)
    assert cut["completions_truncated"] == (expected[1] != C) + (expected[3] != R)
    assert (P, C, R) == ([464, 6766, 318], [4171, 2], [4077, 2])  # not mutated


def plain(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


TO_CUT = [
    plain("p" * 9, "ab", "ac"),  # 12 tokens each
    plain("p" * 9, "a" * 8 + "x", "a" * 8 + "y"),  # 19 each
    plain("p" * 20, "ab", "ac"),  # 23 each
    plain("p", "ab", "ab"),  # equal from the start
    plain("p" * 9, "a", "b" * 6),  # 11 and 16
]


@pytest.mark.parametrize(
    "flags, used, equal, unscored, pairs, prompts, parted, completions, eos",
    [
        ({}, 4, 1, 0, 0, 0, 0, 0, 0),
        ({"max_completion_length": 8}, 3, 2, 0, 0, 0, 0, 0, 0),
        ({"max_prompt_length": 5}, 4, 1, 0, 4, 4, 0, 0, 0),
        ({"max_length": 16}, 2, 2, 1, 0, 0, 0, 0, 0),
        ({"max_length": 15}, 2, 2, 1, 1, 0, 0, 1, 1),
        ({"max_length": 15, "truncation_mode": "keep_end"}, 4, 1, 0, 3, 3, 1, 0, 0),
    ],
)
def test_cuts_and_drops_are_counted(
    flags, used, equal, unscored, pairs, prompts, parted, completions, eos, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    name = write_jsonl(tmp_path / "rows.jsonl", TO_CUT)
    examples, data = load_examples(name, "train", tokenizer, Arguments(**flags))
    expected = {
        "examples_read": 5,
        "examples_used": used,
        "examples_equal": equal,
        "examples_unscored": unscored,
        "examples_truncated": pairs,
        "prompts_truncated": prompts,
        "prompts_parted": parted,
        "completions_truncated": completions,
        "completions_without_eos": eos,
    }
    assert {name: data[name] for name in expected} == expected
    kept = sum(len(example[name]) for example in examples for name in TOKENS)
    assert len(examples) == used and data["tokens_kept"] == kept


def test_edited_tokenisation_is_not_taken_from_the_cache(tmp_path):
    """Whoever edits what turns text into tokens, in either file, trains on the new tokens."""
    shutil.copy(SCRIPT, tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common")
    name = write_jsonl(tmp_path / "rows.jsonl", [FORMS["plain"]])
    code = f"""
import importlib, sys
sys.path.insert(0, {str(tmp_path)!r})
import common.data, dpo_padding_free
from transformers import AutoTokenizer

def load(file, edit):
    with open({str(tmp_path)!r} + file, "a") as source:
        source.write(edit)
    importlib.reload(common.data)
    importlib.reload(dpo_padding_free)
    tokenizer = AutoTokenizer.from_pretrained({str(DEMO_MODEL)!r})
    args = dpo_padding_free.Arguments()
    examples, _ = dpo_padding_free.load_examples({name!r}, "train", tokenizer, args)
    print(examples[0]["chosen_ids"][1:])

load("/common/data.py", "")
load("/common/data.py", "\\ndef end_with_eos(input_ids, *_): return [*input_ids, 7]")
load("/dpo_padding_free.py", "\\ndef tokenize(*args): return [1], [2, 3], [2, 4], False")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [f"[{END}]", "[7]", "[3]"], done.stderr


def test_tokens_are_cached_until_something_they_depend_on_changes(cache, tmp_path):
    def load(name, **flags):
        tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
        load_examples(name, "train", tokenizer, Arguments(**flags))
        return {path for path in cache.rglob("*.arrow") if path.parent.name == "tokenised"}

    name = write_jsonl(tmp_path / "rows.jsonl", [FORMS["plain"]])
    first = load(name)
    assert load(name, learning_rate=1.0, seed=7, share_prompt=False, output_dir="elsewhere") == first
    assert len(load(name, max_length=9) - first) == 1


# --- Batches by tokens ---


@settings(max_examples=50)
@given(
    sizes=st.lists(st.tuples(lengths, lengths, lengths, st.just(0)), min_size=1, max_size=20),
    slack=st.integers(0, 60),
    start=st.integers(0, 20),
    way=st.sampled_from(list(WAYS)),
)
def test_batches_hold_as_many_pairs_as_their_tokens_allow(sizes, slack, start, way):
    pairs = [{"example": 0, **pair} for pair in make_pairs(0, sizes)]
    examples = datasets.Dataset.from_list(pairs)
    budget = int(Pairs(examples, Arguments(**WAYS[way]), "x").costs.max()) + slack
    planned = Pairs(examples, Arguments(max_tokens_per_batch=budget, **WAYS[way]), "x")
    chunks = list(planned.cut(planned.order(0)))
    assert np.concatenate(chunks).tolist() == planned.order(0).tolist()  # each pair once, in order

    def computed_tokens(numbers):
        return collate([pairs[i] for i in numbers], planned.args, 0)["input_ids"].numel()

    for chunk, following in zip(chunks, [*chunks[1:], []]):
        assert computed_tokens(chunk) <= budget
        assert len(following) == 0 or computed_tokens([*chunk, following[0]]) > budget
    # from any batch's end on, the rest is cut as before: a resumed run meets the same batches
    start %= len(chunks)
    done = sum(map(len, chunks[:start]))
    again = list(planned.cut(planned.order(0)[done:]))
    assert [chunk.tolist() for chunk in again] == [chunk.tolist() for chunk in chunks[start:]]


def test_every_epoch_and_seed_has_an_order_of_its_own(base):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    examples, _ = load_examples(base["dataset_name"], "train", tokenizer, Arguments(max_length=64))
    orders = [
        Pairs(examples, Arguments(max_length=64, seed=seed), "data").order(epoch).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in [*orders, range(10)]}) == 5
    assert all(sorted(order) == list(range(10)) for order in orders)


def test_a_thousand_empty_prompts_first(tmp_path):
    """The first rows that datasets writes have no prompt's type to show."""
    rows = [{"prompt": "", "chosen": "a", "rejected": "b"}] * 1001
    name = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"prompt": "c", "chosen": "a", "rejected": "b"}])
    examples, data = load_examples(name, "train", AutoTokenizer.from_pretrained(DEMO_MODEL), Arguments())
    assert data["examples_used"] == 1002 and examples[1001]["chosen_prompt_ids"] == [66]  # "c"


def test_the_start_up_check_looks_at_pairs_that_share(base, tmp_path, monkeypatch):
    rows = [{"prompt": "", "chosen": "a", "rejected": "b"}] * 2 + random_preferences(0, 4)
    name = write_jsonl(tmp_path / "rows.jsonl", rows)
    change_shared_rows(monkeypatch, keys_of_another_prompt)
    with pytest.raises(ValueError, match="mixes the sequences"):
        run(tmp_path / "out", base, dataset_name=name)


def test_ranks_that_find_different_files_all_compute(base, tmp_path, monkeypatch):
    """As if another rank had not found what this one has of pair 3."""
    flags = {**base, "bf16": True, "lr_scheduler_type": "constant"}
    through = run(tmp_path / "0", flags, num_train_epochs=2)
    run(tmp_path / "1", flags, save_steps=3)
    computed, all_reduce = computed_pairs(monkeypatch), torch.distributed.all_reduce

    def with_another_rank(tensor, op=torch.distributed.ReduceOp.SUM):
        all_reduce(tensor, op)
        if op == torch.distributed.ReduceOp.MAX:
            tensor[3] = 1

    monkeypatch.setattr(torch.distributed, "all_reduce", with_another_rank)
    resumed = run(tmp_path / "1", flags, num_train_epochs=2, resume_from_checkpoint="latest")
    [chunk] = computed
    assert 3 in chunk and len(chunk) <= 4
    assert_same_bits(resumed, through)


def test_steps_by_tokens(base, tmp_path):
    flags = {**base, "max_tokens_per_batch": 80, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    done = run(tmp_path, flags)
    assert max(values(done, "num_tokens")) <= 160
    epochs = values(done, "epoch")
    assert epochs[-1] == 2.0 and 1.0 in epochs and epochs == sorted(epochs)
    every = run(tmp_path / "pairs", base, num_train_epochs=2)
    assert sum(values(done, "num_scored_tokens")) == sum(values(every, "num_scored_tokens"))


@pytest.mark.parametrize("epochs", [1, 2, 1.6])
@pytest.mark.parametrize("budget", [None, 40])
def test_planned_steps_are_the_steps_there_are(epochs, budget):
    pairs = [{"example": 0, **pair} for pair in make_pairs(0, [(n, 3, 4, 0) for n in range(1, 18)])]
    args = Arguments(max_tokens_per_batch=budget, num_train_epochs=epochs)
    planned = Pairs(datasets.Dataset.from_list(pairs), args, "x")
    progress = {"step": 0, "epoch": 0, "pairs_done": 0}
    total = dpo_padding_free.count_steps(args, planned, 1, progress)
    trained = []
    while progress["step"] < total:  # as train() walks through the pairs
        for step in planned.steps(progress["epoch"], progress["pairs_done"], 1):
            # counted again at every step, and on other ranks, the total is the same or as many pairs
            assert dpo_padding_free.count_steps(args, planned, 1, progress) == total
            trained += np.concatenate(step).tolist()
            progress["step"] += 1
            progress["pairs_done"] += sum(map(len, step))
            if progress["step"] == total:
                break
        progress["epoch"], progress["pairs_done"] = progress["epoch"] + 1, 0
    assert epochs * 17 <= len(trained) < epochs * 17 + 4
    assert sorted(trained[:17]) == list(range(17))


@pytest.mark.parametrize("budget", [None, 90])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("steps_done, total_steps", [(0, 1), (0, 2), (1, 2), (2, 2), (1, 4)])
def test_the_references_micro_batches_are_those_of_training(steps_done, total_steps, world, budget):
    pairs = [{"example": 0, **pair} for pair in make_pairs(0, [(n, 3, 4, 0) for n in range(1, 41)])]
    args = Arguments(max_tokens_per_batch=budget, gradient_accumulation_steps=2)
    args.per_device_train_batch_size = 3 if budget is None else None
    planned = Pairs(datasets.Dataset.from_list(pairs), args, "x")
    steps = list(planned.steps(0, 0, world))
    done = sum(map(len, sum(steps[:steps_done], [])))
    progress = {"step": steps_done, "epoch": 0, "pairs_done": done}
    found = [chunk.tolist() for chunk in planned.reference_chunks(progress, total_steps, world)]
    ahead = sum(steps[steps_done:total_steps], [])
    if total_steps <= len(steps):
        assert found == [chunk.tolist() for chunk in ahead]
    else:  # the second epoch visits what the first steps did
        assert found[: len(ahead)] == [chunk.tolist() for chunk in ahead] and len(found) > len(ahead)


# --- 6. Refusals ---


class Make:
    """Files for a bad input."""

    def __init__(self, path):
        self.path = path

    def data(self, *rows, raw=None, name="bad.jsonl"):
        path = self.path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) if raw is None else raw)
        return {"dataset_name": str(path)}

    def model(self, *args, **overrides):
        return {"model_name_or_path": write_model(self.path / "model", *args, **overrides)}


def without_template(make):
    flags = make.model()
    (Path(flags["model_name_or_path"]) / "chat_template.jinja").unlink()
    return {**make.data(FORMS["conversational"]), **flags}


PLAIN = FORMS["plain"]
BAD_DATA = {
    "missing file": (
        lambda make: {"dataset_name": str(make.path / "none.jsonl")},
        "none.jsonl does not exist",
    ),
    "empty file": (lambda make: make.data(), "bad.jsonl is empty"),
    "malformed line": (
        lambda make: make.data(raw='{"prompt": "a"}\n{"prompt": \n'),
        "bad.jsonl, line 2: not valid JSON",
    ),
    "missing columns": (
        lambda make: make.data({"prompt": "a", "completion": "b"}),
        "has the columns prompt, completion; wanted: chosen and rejected",
    ),
    "no rejected": (lambda make: make.data({"prompt": "a", "chosen": "b"}), "prompt, chosen; wanted"),
    "a null": (lambda make: make.data(PLAIN, {**PLAIN, "rejected": None}), "bad.jsonl, example 1: "),
    "a number": (lambda make: make.data({"prompt": 1, "chosen": 2, "rejected": 3}), "bad.jsonl, example 0: "),
    "a string and messages": (
        lambda make: make.data({**FORMS["conversational"], "prompt": "a"}),
        "bad.jsonl, example 0: ",
    ),
    "unknown role": (
        lambda make: make.data({**FORMS["conversational"], "prompt": [{"role": "tool", "content": "a"}]}),
        "example 0: .*role tool",
    ),
    "no answer": (
        lambda make: make.data({"chosen": [user("a"), assistant("b")], "rejected": [user("a")]}),
        "example 0: rejected ends with a message of role user",
    ),
    "no prompt": (
        lambda make: make.data({"question": "a", "score": 1, "chosen": "b", "rejected": "c"}),
        "have no beginning in common .* the other columns: question, score",
    ),
    "the prompt once more": (
        lambda make: make.data({"prompt": "ab", "chosen": "abc", "rejected": "abd"}),
        "in 1 of 1 rows the completion begins with the whole prompt",
    ),
    "a null prompt": (
        lambda make: make.data(FORMS["plain"], {**FORMS["plain"], "prompt": None}),
        "example 1: prompt is None",
    ),
    "a message without content": (
        lambda make: make.data({**FORMS["conversational"], "chosen": [{"role": "assistant"}]}),
        "example 0: chosen holds .*a message has a role and a content",
    ),
    "tools": (
        lambda make: make.data({**FORMS["plain"], "tools": "x"}),
        "example 0: tools is 'x', which these scripts do not support",
    ),
    "tool calls": (
        lambda make: make.data(
            {**FORMS["conversational"], "chosen": [{**assistant("b"), "tool_calls": [{"name": "x"}]}]}
        ),
        "example 0: chosen holds tool calls",
    ),
    "no message": (lambda make: make.data({**FORMS["conversational"], "chosen": []}), "example 0: "),
    "all equal": (
        lambda make: make.data(plain("a", "b", "b")),
        "no pair whose completions differ .* within max_length 64.*'examples_equal': 1",
    ),
    "all too long": (
        lambda make: make.data(plain("a" * 99, "b", "c")),
        "no pair whose .* max_length 64.*'examples_unscored': 1",
    ),
    "over the budget": (
        lambda make: {**make.data(PLAIN, plain("a" * 9, "b", "c")), "max_tokens_per_batch": 12},
        "bad.jsonl, example 1 takes 13 tokens, over --max_tokens_per_batch 12: raise it",
    ),
    "bad evaluation data": (
        lambda make: {"eval_dataset_name": make.data({"a": "b"})["dataset_name"]},
        "has the columns a; wanted",
    ),
    "no chat template": (without_template, "no chat template"),
    "id outside the vocabulary": (
        lambda make: make.model(vocab_size=200, pad_token_id=0, eos_token_id=1),
        "token id 257 is outside the vocabulary of 200",
    ),
    "id outside the vocabulary in the evaluation": (
        lambda make: {
            "eval_dataset_name": make.data(FORMS["conversational"])["dataset_name"],
            **make.model(vocab_size=258),
        },
        "token id 2.. is outside the vocabulary of 258",
    ),
}
BAD_MODELS = {
    "missing model": (lambda make: {"model_name_or_path": str(make.path / "none")}, "none cannot be loaded"),
    "max_length over positions": (
        lambda make: {"max_length": 257},
        "--max_length 257 is over the model's 256",
    ),
    "sequences mix": (lambda make: make.model("mamba"), "mixes the sequences .* --no_padding_free"),
    "a convolution crosses over": (
        lambda make: make.model("lfm2", full_attn_idxs=[1]),
        "mixes the sequences of a row of shared prompts.* --no_share_prompt",
    ),
    "boundaries are not passed on": (lambda make: make.model("stablelm"), "keep documents apart"),
    "attention sinks": (lambda make: make.model("gpt_oss"), "s_aux"),
    "scaled logits": (lambda make: make.model("granite", logits_scaling=8.0), "changes its logits"),
}
BAD_FLAGS = [
    {"warmup_steps": 2, "lr_scheduler_type": "constant"},
    {"seed": -1},
    *({name: 0} for name in ("max_length", "max_prompt_length", "max_completion_length")),
    *({name: 0} for name in ("per_device_train_batch_size", "max_tokens_per_batch", "loss_chunk_size")),
    {"gradient_accumulation_steps": -1},
    {"save_steps": 0},
    {"save_total_limit": 0},
    {"learning_rate": math.nan},
    {"learning_rate": -1.0},
    {"max_grad_norm": math.inf},
    {"max_steps": 0},
    {"num_train_epochs": 0.0},
    {"num_train_epochs": math.inf},
    {"max_length": 1},
    {"max_prompt_length": 64},
    {"max_completion_length": 64},
    {"truncation_mode": "keep_middle"},
    {"beta": 0.0},
    {"loss_type": "kto"},
    {"label_smoothing": 0.7},
    {"loss_type": "hinge", "label_smoothing": 0.1},
    {"max_tokens_per_batch": 99, "per_device_train_batch_size": 2},
    {"share_prefix": True, "share_prompt": False},
    {"share_prefix": True, "padding_free": False},
    {"attn_implementation": "flash_attention_2", "bf16": True},
    {"attn_implementation": "sdpa"},
    {"attn_implementation": "eager"},
    {"attn_implementation": "flash_attention_2", "share_prompt": False},
    {"attn_implementation": "varlen", "padding_free": False},
    {"attn_implementation": "nonsense", "share_prompt": False},
    {"eval_steps": 2},
]


@pytest.fixture(scope="module")
def earlier_run(base, tmp_path_factory):
    """The folder of a finished run of 3 steps with the checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    run(folder, base, save_steps=1)
    return folder


@pytest.fixture
def copied_run(earlier_run, tmp_path):
    return shutil.copytree(earlier_run, tmp_path / "run")


def contents(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def assert_refused(folder, flags, message):
    """main raises ValueError with this message, and leaves what is in `folder` as it was."""
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        run(folder, flags)
    assert contents(folder) == before


@pytest.mark.parametrize("name", [*BAD_DATA, *BAD_MODELS])
def test_bad_data_and_models_are_refused(name, base, copied_run, tmp_path):
    flags, message = {**BAD_DATA, **BAD_MODELS}[name]
    assert_refused(copied_run, {**base, "overwrite_output_dir": True, **flags(Make(tmp_path))}, message)


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=str)
def test_contradictory_flags_are_refused(flags, base, copied_run):
    """Naming the flag and its value."""
    name, value = [*flags.items()][-1 if len(flags) == 2 and "loss_type" in flags else 0]
    message = f"{name}.*{re.escape(str(value))}" if not isinstance(value, bool) else name
    if name == "eval_steps":
        message = "--eval_steps needs --eval_dataset_name"
    if name == "max_tokens_per_batch" and value:
        message = "drop one"
    assert_refused(copied_run, {**base, "overwrite_output_dir": True, **flags}, message)


def test_a_model_that_mixes_sequences_may_run_padded(base, tmp_path):
    changes = {"model_name_or_path": write_model(tmp_path / "model", "lfm2", full_attn_idxs=[1])}
    assert len(run(tmp_path / "out", base, max_steps=1, padding_free=False, **changes).metrics) == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ({}, "holds another run .*--resume_from_checkpoint latest.*--overwrite_output_dir"),
        ({"resume_from_checkpoint": "latest", "max_length": 16}, "other data"),
        ({"resume_from_checkpoint": "latest", "seed": 1}, "other data"),
        ({"resume_from_checkpoint": "latest", "bf16": True}, "its precision is not this one's"),
        (
            {"resume_from_checkpoint": "latest", "eval_dataset_name": str(ROOT / "demo/preferences.jsonl")},
            "its evaluation data is not this one's",
        ),
    ],
)
def test_a_folder_that_holds_another_run_is_refused(flags, message, base, copied_run):
    assert_refused(copied_run, {**base, **flags}, message)


@pytest.mark.parametrize("how", ["file there", "file gone", "second model"])
def test_resuming_with_another_model_is_refused(how, base, copied_run, tmp_path):
    """Its log-probabilities would be another reference than that of the steps before."""
    name = write_model(tmp_path / "other", initializer_range=0.1)
    if how == "file gone":
        (Path(copied_run) / REFERENCE).unlink()
    flags = {**base, "model_name_or_path": name, "resume_from_checkpoint": "latest"}
    flags["precompute_ref_log_probs"] = how != "second model"
    assert_refused(copied_run, flags, "checkpoint-3 began with another model")


@pytest.mark.parametrize("change", [{"beta": 0.5}, {"loss_type": "hinge"}, {"label_smoothing": 0.1}])
def test_resuming_with_another_loss_is_refused(change, base, copied_run):
    assert_refused(copied_run, {**base, **change, "resume_from_checkpoint": "latest"}, "limits or losses")


def test_a_finished_run_is_left_as_it_is(base, copied_run):
    assert_refused(copied_run, {**base, "resume_from_checkpoint": "latest"}, "has finished its 3 steps")


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_resuming_with_other_data_is_refused(column, base, copied_run, tmp_path):
    rows = [json.loads(line) for line in open(base["dataset_name"])]
    rows[7][column] = "".join(chr(ord(c) + 1) for c in rows[7][column])  # as long as before
    name = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert_refused(
        copied_run, {**base, "dataset_name": name, "resume_from_checkpoint": "latest"}, "other data"
    )


def test_a_reference_that_is_not_finite_stops_the_run(base, tmp_path):
    folder = write_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    token = AutoTokenizer.from_pretrained(folder)("y")["input_ids"]  # of all rejected completions
    model.model.embed_tokens.weight.data[token] = math.inf
    model.save_pretrained(folder)
    flags = {**base, "model_name_or_path": folder, "check_isolation": False}
    with pytest.raises((ValueError, FloatingPointError), match="finite"):
        run(tmp_path / "out", flags)
    assert not (tmp_path / "out").exists()


# --- 7. The reference ---


def test_the_reference_is_kept_and_not_computed_again(base, copied_run, monkeypatch):
    kept = load_file(copied_run / REFERENCE)["data"]
    assert kept.shape == (10, 2) and kept.dtype == torch.float32
    monkeypatch.setattr(dpo_padding_free, "compute_reference", None)
    run(copied_run, base, resume_from_checkpoint="latest", max_steps=5)
    assert torch.equal(load_file(copied_run / REFERENCE)["data"], kept)


def test_without_its_file_the_reference_is_still_the_first_model(base, copied_run, tmp_path):
    through = run(tmp_path / "through", base)
    kept = load_file(copied_run / REFERENCE)["data"]
    (copied_run / REFERENCE).unlink()
    resumed = run(copied_run, base, resume_from_checkpoint=str(copied_run / "checkpoint-1"))
    found = load_file(copied_run / REFERENCE)["data"]
    ahead = ~found.isnan().any(1)  # the pairs of the steps that are left
    assert ahead.sum() == 6 and torch.equal(found[ahead], kept[ahead])
    assert_same_bits(resumed, through)


def test_a_reference_of_the_trained_model_is_found(base, copied_run, tmp_path):
    """As if a resumed run had computed it from the weights of its checkpoint."""
    through = run(tmp_path / "through", base)
    trained = {**base, "model_name_or_path": str(tmp_path / "through")}
    run(tmp_path / "trained", trained)
    wrong, metadata = load_file(tmp_path / "trained" / REFERENCE), metadata_of(copied_run / REFERENCE)
    save_file(wrong, copied_run / REFERENCE, metadata=metadata)
    resumed = run(copied_run, base, resume_from_checkpoint=str(copied_run / "checkpoint-1"))
    assert losses(resumed)[0] == losses(through)[0]
    assert abs(losses(resumed)[1] - losses(through)[1]) > 1e-5


BATCHES = {
    "shared": {},
    "shared with prefix": {"share_prefix": True},
    "padding-free": {"share_prompt": False},
    "padded": {"padding_free": False},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "by tokens": {"per_device_train_batch_size": None, "max_tokens_per_batch": 80},
    "not checkpointed": {"gradient_checkpointing": False},
}


def computed_pairs(monkeypatch):
    """A list that fills with the pairs of each micro-batch in which the reference is computed."""
    computed, compute = [], dpo_padding_free.compute_reference

    def note(*args):
        computed.extend(chunk.tolist() for chunk in args[-1])
        return compute(*args)

    monkeypatch.setattr(dpo_padding_free, "compute_reference", note)
    return computed


@pytest.fixture
def rows_matter(monkeypatch):
    """On every processor as bf16 is on some: a completion's number depends on what else is in its row."""
    sequence_logps = dpo_padding_free.sequence_logps

    def noisy(model, batch, chunk_size):
        logps = sequence_logps(model, batch, chunk_size)
        return logps + int(batch["input_ids"].sum()) % 89 / 89 * (torch.arange(len(logps)) % 2)

    monkeypatch.setattr(dpo_padding_free, "sequence_logps", noisy)


def assert_equal_models(done):
    """In every step and evaluation policy and reference have one number, not two nearly equal ones."""
    for line in done.metrics:
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert line["rewards/chosen"] == line["rewards/rejected"] == line["rewards/margins"] == 0.0
        assert line["rewards/accuracies"] == 0.0 and line.get("eval_rewards/margins", 0.0) == 0.0


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("form", BATCHES)
def test_a_policy_that_has_not_moved_is_its_reference(form, bf16, evaluated, rows_matter, tmp_path):
    """To the last bit, in all of the first epoch."""
    flags = {**evaluated, "learning_rate": 0.0, "bf16": bf16, **BATCHES[form]}
    done = run(tmp_path, flags)
    assert done.metrics[-1]["epoch"] == 1.0
    assert_equal_models(done)


def test_a_reference_computed_in_other_rows_would_be_seen(base, rows_matter, tmp_path, monkeypatch):
    def in_order(self, progress, total_steps, world):
        return list(self.cut(np.arange(len(self))))

    monkeypatch.setattr(Pairs, "reference_chunks", in_order)
    done = run(tmp_path, base, learning_rate=0.0)
    assert any(abs(line["rewards/margins"]) > 1e-3 for line in done.metrics)


def test_the_reference_is_computed_for_the_pairs_that_training_visits(
    base, rows_matter, tmp_path, monkeypatch
):
    computed = computed_pairs(monkeypatch)
    order = np.random.default_rng([0, 0]).permutation(10).tolist()
    through = run(tmp_path / "through", base, lr_scheduler_type="constant", num_train_epochs=2)
    assert computed == [order[:4], order[4:8], order[8:]]
    whole = load_file(tmp_path / "through" / REFERENCE)["data"]
    flags = {**base, "lr_scheduler_type": "constant", "save_steps": 1}
    for max_steps, pairs in ((1, [order[:4]]), (2, [order[4:8]]), (5, [order[8:]]), (6, [])):
        computed.clear()
        resume = {"resume_from_checkpoint": "latest"} if max_steps > 1 else {}
        prolonged = run(tmp_path / "prolonged", flags, max_steps=max_steps, **resume)
        assert computed == pairs
        kept = load_file(tmp_path / "prolonged" / REFERENCE)["data"]
        known = ~kept.isnan().any(1)
        assert known.nonzero()[:, 0].tolist() == sorted(order[: min(4 * max_steps, 10)])
        assert torch.equal(kept[known], whole[known])
    assert_same_bits(prolonged, through)


@pytest.mark.parametrize("step", [1, 4])
def test_a_lost_reference_is_computed_in_the_first_epochs_rows(step, base, rows_matter, tmp_path):
    """Whether training goes on in the first epoch or in the second."""
    flags = {**base, "lr_scheduler_type": "constant", "num_train_epochs": 2, "save_steps": 1}
    through = run(tmp_path / "through", flags)
    folder = cut_after(tmp_path / "through", step, tmp_path / "cut")
    (folder / REFERENCE).unlink()
    assert_same_bits(run(folder, flags, resume_from_checkpoint="latest"), through)


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_run_killed_before_its_first_step_goes_on_with_its_reference(base, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dpo_padding_free, "clip_gradients", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, base)
    assert sorted(path.name for path in tmp_path.iterdir()) == [REFERENCE, "run_files.json"]
    monkeypatch.setattr(dpo_padding_free, "compute_reference", None)
    assert len(run(tmp_path, base).metrics) == 3


def test_overwriting_replaces_the_whole_run(base, copied_run, tmp_path):
    before = load_file(copied_run / REFERENCE)["data"]
    name = write_model(tmp_path / "other", initializer_range=0.1)
    again = run(copied_run, base, overwrite_output_dir=True, max_steps=3, model_name_or_path=name)
    assert len(again.metrics) == 3 and list_checkpoints(copied_run) == []
    assert worst(load_file(copied_run / REFERENCE)["data"], before) > 0.1
    run(copied_run, base, overwrite_output_dir=True, max_steps=1, precompute_ref_log_probs=False)
    assert not (copied_run / REFERENCE).exists()


def test_a_second_model_is_not_trained(base, tmp_path, monkeypatch):
    models, load_model = [], dpo_padding_free.load_model
    monkeypatch.setattr(
        dpo_padding_free, "load_model", lambda *args: models.append(load_model(*args)) or models[-1]
    )
    run(tmp_path, base, precompute_ref_log_probs=False)
    policy, reference = models
    assert policy.training and not reference.training
    original = load_file(Path(base["model_name_or_path"]) / "model.safetensors")
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, original[name]) and parameter.grad is None
    assert any(not torch.equal(p, original[name]) for name, p in policy.named_parameters())


# --- 8. Checkpoints ---


@pytest.fixture(scope="module")
def dropout(base, tmp_path_factory):
    """Flags of a run whose every step depends on all that a checkpoint holds: 8 steps, 5 to an epoch."""
    folder = tmp_path_factory.mktemp("dropout")
    return {
        **base,
        "model_name_or_path": write_model(folder / "model", attention_dropout=0.2),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1.6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
    }


@pytest.fixture(scope="module")
def uninterrupted(dropout, tmp_path_factory):
    return run(tmp_path_factory.mktemp("uninterrupted"), dropout)


def cut_after(run_folder, step, folder):
    """A copy of a finished run as it was right after the checkpoint of `step`."""
    folder.mkdir()
    shutil.copytree(run_folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copy(run_folder / REFERENCE, folder)
    lines = (run_folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: step + 1]) + '{"step": ')  # killed while writing
    return folder


def test_dropout_is_off(base, dropout, uninterrupted, tmp_path):
    without = run(tmp_path, dropout, model_name_or_path=base["model_name_or_path"])
    assert values(uninterrupted, "rewards/margins")[0] == pytest.approx(0, abs=1e-5)  # from equal models
    assert_same_bits(uninterrupted, without)


@pytest.mark.parametrize("step, budget", [(2, None), (4, None), (6, None), (4, 90)])
def test_a_resumed_run_is_the_uninterrupted_one(step, budget, dropout, uninterrupted, tmp_path):
    """Within the warm-up, before the epoch's end and after it: the same bits."""
    flags = dropout
    if budget is not None:
        flags = {**dropout, "per_device_train_batch_size": None, "max_tokens_per_batch": budget}
    whole = run(tmp_path / "whole", flags, save_steps=2)
    if budget is None:
        assert_same_bits(whole, uninterrupted)  # saving changes nothing
    folder = cut_after(tmp_path / "whole", step, tmp_path / "cut")
    resumed = run(folder, flags, save_steps=2, resume_from_checkpoint="latest")
    assert_same_bits(resumed, whole)
    for name in ("step", "epoch", "learning_rate", "num_tokens", "num_scored_tokens"):
        assert values(resumed, name) == values(whole, name)


@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"precompute_ref_log_probs": False}], ids=str)
def test_frozen_layers_cost_their_weights_alone(changes, dropout, tmp_path, monkeypatch):
    flags = {**dropout, **changes, "save_steps": 2, "measure_memory": True}
    in_graph = freeze_first(dpo_padding_free, monkeypatch)
    whole = run(tmp_path / "whole", flags)
    assert not any(in_graph) and len(in_graph) >= 8
    state = load_file(next((tmp_path / "whole/checkpoint-4").glob("*.safetensors")))
    assert not [name for name in state if name.split(".", 1)[1].startswith(FROZEN)]
    came = load_file(Path(flags["model_name_or_path"]) / "model.safetensors")
    for name, weight in whole.weights.items():
        assert torch.equal(weight, came[name]) == name.startswith(FROZEN), name
    trained = sum(w.numel() for name, w in came.items() if not name.startswith(FROZEN))
    found = {row["name"]: row for row in whole.returned["ledger"]}
    assert found["gradients"]["measured"] == found["gradients"]["predicted"] == 4 * trained
    assert found["optimizer"]["predicted"] == 8 * trained
    assert found["optimizer"]["measured"] == pytest.approx(8 * trained, rel=0.01)
    folder = cut_after(tmp_path / "whole", 4, tmp_path / "cut") if len(changes) == 0 else tmp_path / "whole"
    checkpoint = {"resume_from_checkpoint": str(folder / "checkpoint-4")}
    assert_same_bits(run(folder, flags, **checkpoint), whole)
    monkeypatch.undo()
    assert_refused(folder, {**flags, **checkpoint}, "was frozen .* is trained now")


def test_evaluating_changes_no_step(dropout, uninterrupted, evaluated, tmp_path):
    flags = {**dropout, "eval_dataset_name": evaluated["eval_dataset_name"]}
    assert_same_bits(run(tmp_path, flags, eval_steps=1), uninterrupted)


def test_nothing_is_pickled(base, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("torch.load or torch.save was called")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    run(tmp_path, base, save_steps=2)
    run(cut_after(tmp_path, 2, tmp_path / "cut"), base, resume_from_checkpoint="latest")
    files = [path for path in (tmp_path / "checkpoint-2").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".rng", ".json"}


def command(flags, **changes):
    options = [f"--{name}={value}" for name, value in {**flags, **changes}.items()]
    return [sys.executable, str(SCRIPT), *options]


def test_sigterm_saves_a_checkpoint_and_ends_with_code_0(base, tmp_path):
    flags = {**base, "lr_scheduler_type": "constant"}
    arguments = command(flags, output_dir=tmp_path / "stopped", max_steps=100_000)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        metrics, deadline = tmp_path / "stopped/metrics.jsonl", time.monotonic() + 100
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "--resume_from_checkpoint latest" in stderr
    [(step, _)] = list_checkpoints(tmp_path / "stopped")
    assert step >= 3 and f"checkpoint-{step}" in stderr
    changes = {"max_steps": step + 2}
    resumed = run(tmp_path / "stopped", flags, resume_from_checkpoint="latest", **changes)
    assert_same_bits(resumed, run(tmp_path / "through", flags, **changes))


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(base, tmp_path, monkeypatch):
    original = dpo_padding_free.dpo_loss

    def breaks(chosen, *args, **kwargs):
        broken = [math.inf if n == 5 else 1.0 for n in kwargs["chosen_lengths"].tolist()]
        losses, *rewards = original(chosen, *args, **kwargs)
        return losses * torch.tensor(broken), *rewards

    monkeypatch.setattr(dpo_padding_free, "dpo_loss", breaks)
    rows = [plain("a", "b" * n, "c") for n in (1, 2, 3, 4, 6, 7)]  # and EOS: the fourth has 5 scored tokens
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows), "seed": 1}
    with pytest.raises(FloatingPointError, match=r"Pairs \[3\], examples \[3\]") as caught:
        run(tmp_path / "out", flags, per_device_train_batch_size=1, save_steps=1)
    step = int(re.match(r"step (\d+): loss (nan|inf)", str(caught.value))[1])
    assert (
        step > 1
        and losses(read_run(tmp_path / "out"))
        and len(list_checkpoints(tmp_path / "out")) == step - 1
    )


# --- Ranks ---

TWO_EPOCHS = {"num_train_epochs": 2, "save_steps": 2, "lr_scheduler_type": "constant"}


def torchrun(flags, **changes):
    """Two ranks, killed with all their processes if they hang. Returns the exit code and stderr."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*launcher, *command(flags, **changes)[1:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        stderr = process.communicate(timeout=180)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, stderr


@pytest.fixture(scope="module")
def two_ranks(evaluated, tmp_path_factory):
    """Steps of 4 pairs on 2 ranks, 2 x 1 on each: 4 + 4 + 2, where the last leaves nothing to accumulate."""
    folder = tmp_path_factory.mktemp("two") / "ranks"
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    returncode, stderr = torchrun(evaluated, output_dir=folder, **TWO_EPOCHS, **sizes)
    assert returncode == 0, stderr[-3000:]
    return folder


def assert_same_curve(first, second):
    assert curve_difference(first, second) <= 1e-4
    assert max(abs(a - b) for a, b in zip(losses(first), losses(second), strict=True)) <= 1e-5
    assert worst(first.weights, second.weights) <= 1e-4
    for name in METRICS:
        assert first.metrics[-1][f"eval_{name}"] == pytest.approx(
            second.metrics[-1][f"eval_{name}"], abs=1e-4
        )
    for name in ("num_scored_tokens", "epoch", "learning_rate"):
        assert values(first, name) == values(second, name)


def test_two_ranks_are_one_rank(two_ranks, evaluated, tmp_path):
    one = run(tmp_path, evaluated, **TWO_EPOCHS)
    two = read_run(two_ranks)
    assert_same_curve(two, one)
    assert values(two, "rewards/margins")[0] == values(one, "rewards/margins")[0] == 0.0
    summary = json.loads((two_ranks / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["data"] == one.returned["data"]
    assert worst(load_file(two_ranks / REFERENCE)["data"], load_file(tmp_path / REFERENCE)["data"]) <= 2e-5
    assert metadata_of(two_ranks / REFERENCE) == metadata_of(tmp_path / REFERENCE)


def test_two_ranks_leave_a_checkpoint_that_one_rank_resumes(two_ranks, evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo_padding_free, "compute_reference", None)  # theirs is taken
    folder = cut_after(two_ranks, 2, tmp_path / "cut")
    resumed = run(folder, evaluated, **TWO_EPOCHS, resume_from_checkpoint="latest")
    assert_same_curve(resumed, read_run(two_ranks))
    assert losses(resumed)[:2] == losses(read_run(two_ranks))[:2]


def test_two_ranks_with_a_second_model_and_batches_by_tokens(evaluated, tmp_path):
    """5 pairs in uneven batches: one rank runs a batch without a pair."""
    rows = random_preferences(0, 5)
    flags = {**evaluated, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows)}
    flags |= {"precompute_ref_log_probs": False, "max_steps": 3, "share_prefix": True}
    returncode, stderr = torchrun(flags, output_dir=tmp_path / "two", max_tokens_per_batch=60)
    assert returncode == 0, stderr[-3000:]
    two = read_run(tmp_path / "two")
    one = run(tmp_path / "one", flags, max_tokens_per_batch=60, gradient_accumulation_steps=2)
    assert_same_curve(two, one)
    assert any(a - b == 2 for a, b in zip(values(two, "num_tokens"), values(one, "num_tokens")))


# --- 9. Contract ---

RUN_METRICS = (
    "step epoch grad_norm learning_rate num_tokens num_scored_tokens tokens_per_second step_seconds "
    "peak_memory_bytes"
)
SUMMARY = "args versions device world_size data throughput ledger activation_offloading final_metrics"


def parsed():
    return ast.parse(SCRIPT.read_text())


def test_every_flag_is_read_beyond_its_check():
    """args.name or self.args.name, loaded somewhere outside of check_arguments."""
    checks = next(node for node in parsed().body if getattr(node, "name", None) == "check_arguments")
    lines = range(checks.lineno, checks.end_lineno + 1)
    read = {
        node.attr
        for node in ast.walk(parsed())
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.lineno not in lines
        if getattr(node.value, "id", None) == "args" or getattr(node.value, "attr", None) == "args"
    }
    assert {field.name for field in fields(Arguments)} - read == set()


def test_no_flag_is_written():
    written = [node for node in ast.walk(parsed()) if isinstance(node, ast.Attribute)]
    assert not [
        n.attr for n in written if isinstance(n.ctx, ast.Store) and getattr(n.value, "id", None) == "args"
    ]


def test_importing_does_nothing():
    """Only definitions, constants and imports stand at the top; the guard at the end is the one exception."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
    first, *body, last = parsed().body
    assert isinstance(first, ast.Expr) and isinstance(first.value.value, str)
    assert all(isinstance(node, allowed) for node in body)
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"


REPEATED = (
    "start_distributed barrier all_sum load_model prepare_model decoder_layers shard training_state "
    "to_device save_checkpoint clip_gradients save_model main"
)


@pytest.mark.parametrize("name", REPEATED.split())
def test_what_two_scripts_repeat_is_the_same_to_the_letter(name):
    def source(script):
        text = (ROOT / script).read_text()
        (node,) = [n for n in ast.parse(text).body if getattr(n, "name", None) == name]
        return ast.get_source_segment(text, node)

    assert source("dpo_padding_free.py") == source("sft_packing.py")


def test_both_scripts_end_alike():
    """With exit code 2 and one line for what a user got wrong."""
    ends = [script.read_text().split("if __name__")[1] for script in (SCRIPT, ROOT / "sft_packing.py")]
    assert ends[0] == ends[1]


def test_flags_on_the_command_line():
    parser = HfArgumentParser(Arguments)
    [args] = parser.parse_args_into_dataclasses(
        [
            "--max-length",
            "7",
            "--no_share_prompt",
            "--no_precompute_ref_log_probs",
            "--max_prompt_length",
            "3",
        ]
    )
    assert (args.max_length, args.share_prompt, args.precompute_ref_log_probs) == (7, False, False)
    assert args.max_prompt_length == 3
    assert parser.parse_args_into_dataclasses([]) == (Arguments(),)


def test_what_a_run_leaves_behind(evaluated, tmp_path, capsys):
    done = run(tmp_path, evaluated, eval_steps=2, save_steps=2, logging_steps=2)
    for line in done.metrics:
        evaluates = line["step"] in (2, 3)  # and at the end
        names = {*RUN_METRICS.split(), *METRICS}
        assert set(line) == names | ({f"eval_{name}" for name in METRICS} if evaluates else set())
        assert line["tokens_per_second"] == pytest.approx(line["num_tokens"] / line["step_seconds"])
        assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"])
    assert done.metrics[-1]["epoch"] == 1.0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == set(SUMMARY.split())
    assert json.loads(json.dumps(done.returned)) == summary
    assert summary["args"]["max_length"] == 64 and summary["final_metrics"] == done.metrics[-1]
    tokens = sum(values(done, "num_tokens"))
    assert summary["throughput"]["num_tokens"] == tokens
    assert summary["data"]["computed_fraction"] == pytest.approx(tokens / summary["data"]["tokens_kept"])
    assert summary["data"]["eval"]["examples_used"] == 5
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]
    page = capsys.readouterr().out
    assert "read 10  used 10  equal 0" in page and "boundaries_moved 0" in page and "memory ledger" in page


@pytest.mark.parametrize("dtype, tied", [(torch.float32, False), (torch.bfloat16, True)])
def test_the_saved_model_is_the_trained_one(dtype, tied, base, tmp_path):
    folder = write_model(tmp_path / "model", dtype=dtype, tie_word_embeddings=tied)
    done = run(tmp_path / "out", base, model_name_or_path=folder, save_steps=3, learning_rate=1e-2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    checkpoint = load_file(next((tmp_path / "out/checkpoint-3").glob("*.safetensors")))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, checkpoint[f"weight.{name}"].to(dtype))
        assert parameter.ne(load_file(Path(folder) / "model.safetensors")[name]).any()
    assert done.weights.keys() == load_file(Path(folder) / "model.safetensors").keys()  # a tied weight once


def test_bf16_follows_fp32(base, tmp_path):
    exact = run(tmp_path / "fp32", base)
    half = run(tmp_path / "bf16", base, bf16=True)
    assert not torch.distributed.is_initialized()
    assert values(half, "logps/chosen") != values(exact, "logps/chosen")
    assert values(half, "logps/chosen") == pytest.approx(values(exact, "logps/chosen"), rel=0.02)
    assert losses(half) == pytest.approx(losses(exact), rel=0.05)
    assert all(weight.dtype == torch.float32 for weight in half.weights.values())


def test_gradient_checkpointing_changes_no_loss(dropout, uninterrupted, tmp_path):
    without = run(tmp_path, dropout, gradient_checkpointing=False)
    assert curve_difference(without, uninterrupted) <= 1e-5


@pytest.mark.parametrize("change", [{"beta": 0.5}, {"loss_type": "ipo"}, {"label_smoothing": 0.2}])
def test_flags_of_the_loss_change_it(change, base, tmp_path):
    before, after = run(tmp_path / "0", base), run(tmp_path / "1", base, **change)
    assert abs(losses(before)[-1] - losses(after)[-1]) > 1e-3


def test_the_first_update_is_adamw_on_the_mean_loss(base, tmp_path):
    """One step on all pairs, from weights to weights, against torch's own optimizer on the plain loss."""
    done = run(tmp_path, base, per_device_train_batch_size=10, weight_decay=10.0, max_grad_norm=0.05)
    model = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(base["model_name_or_path"])
    ratios = []
    for row in map(json.loads, open(base["dataset_name"])):
        start = len(tokenizer(row["prompt"]).input_ids)
        for name in ("chosen", "rejected"):
            ids = torch.tensor(tokenizer(row["prompt"] + row[name]).input_ids + [END])
            log_p = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            logp = log_p[range(start - 1, len(ids) - 1), ids[start:]].sum()
            ratios.append(logp - logp.detach())
    ratios = torch.stack(ratios)
    loss = -torch.nn.functional.logsigmoid(0.1 * (ratios[0::2] - ratios[1::2])).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    matrices = [p for name, p in model.named_parameters() if "norm" not in name]
    for parameters, weight_decay in ((matrices, 10.0), (norms, 0.0)):
        torch.optim.AdamW(parameters, lr=1e-3, weight_decay=weight_decay).step()
    assert losses(done) == pytest.approx([math.log(2)], abs=1e-7)
    assert done.metrics[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.05
    assert worst(done.weights, {name: p.detach() for name, p in model.named_parameters()}) <= 1e-4


def test_training_on_the_demo_raises_accuracy_and_margin_on_held_out_pairs(tmp_path):
    rows = (ROOT / "demo/preferences.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:160]))
    (tmp_path / "eval.jsonl").write_text("".join(rows[-40:]))
    flags = {"dataset_name": str(tmp_path / "train.jsonl"), "eval_dataset_name": str(tmp_path / "eval.jsonl")}
    done = run(tmp_path / "out", flags, learning_rate=3e-4, per_device_train_batch_size=8, eval_steps=5)
    early, last = done.metrics[4], done.metrics[-1]
    assert len(done.metrics) == 20
    # before the first step the margin is 0, the loss log 2 and no margin is above 0
    assert last["eval_rewards/margins"] > early["eval_rewards/margins"] > 0.03
    assert last["eval_loss"] < early["eval_loss"] < math.log(2) - 0.01
    assert last["eval_rewards/accuracies"] > 0.6


# --- Memory ---


def bytes_of(summary):
    return {row["name"]: row["measured"] for row in summary["ledger"]}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"share_prompt": False},
        {"padding_free": False},
        {"bf16": True},
        {"gradient_checkpointing": False},
        {"precompute_ref_log_probs": False},
        {"gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_the_ledger_is_filled_and_foretold(flags, tmp_path):
    rows = (ROOT / "demo/preferences.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:16]))
    flags = {"dataset_name": str(tmp_path / "rows.jsonl"), "max_steps": 2, **flags}
    ledger = run(tmp_path / "out", flags, measure_memory=True).returned["ledger"]
    reference = [] if flags.get("precompute_ref_log_probs", True) else ["reference"]
    names = ["parameters", *reference, "gradients", "optimizer", "activations", "loss_head", "peak"]
    assert [row["name"] for row in ledger] == names
    for row in ledger:
        if row["name"] == "loss_head" and "gradient_accumulation_steps" in flags:
            continue  # measured on the micro-batch with the most scored tokens, predicted for the longest one
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.1), row


def test_bytes_fall_from_padded_to_padding_free_to_shared(base, tmp_path):
    """One step on the same 6 pairs, of which one is long; prompts of 40 tokens."""
    rows = [plain("p" * 40, "a" * n, "b" * n) for n in (10, 14, 150, 20, 12, 18)]
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows), "max_length": 256}
    found, tokens = {}, {}
    for way in ("padded", "padding-free", "shared"):
        changes = {"per_device_train_batch_size": 6, "measure_memory": True, **WAYS[way]}
        done = run(tmp_path / way, flags, **changes)
        found[way], tokens[way] = bytes_of(done.returned), done.metrics[0]["num_tokens"]
    assert tokens == {"padded": 12 * 191, "padding-free": 940, "shared": 700}
    for less, more in (("padding-free", "padded"), ("shared", "padding-free")):
        assert found[less]["activations"] <= 1.1 * found[more]["activations"] * tokens[less] / tokens[more]
        assert found[less]["peak"] < found[more]["peak"]
        assert found[less]["parameters"] == found[more]["parameters"]
    assert found["shared"]["peak"] < 0.5 * found["padded"]["peak"]


def test_a_computed_reference_costs_no_second_model(tmp_path):
    rows = (ROOT / "demo/preferences.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:8]))
    flags = {"dataset_name": str(tmp_path / "rows.jsonl"), "measure_memory": True}
    once = bytes_of(run(tmp_path / "once", flags).returned)
    twice = bytes_of(run(tmp_path / "twice", flags, precompute_ref_log_probs=False).returned)
    assert "reference" not in once and twice["reference"] == once["parameters"]
    assert twice["peak"] - once["peak"] == pytest.approx(once["parameters"], rel=0.1)


# --- Offloading and Liger's kernels ---


@pytest.mark.parametrize(
    "changes",
    [
        *WAYS.values(),
        {"gradient_checkpointing": False, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": False, "precompute_ref_log_probs": False, "bf16": True},
    ],
    ids=str,
)
def test_offloading_changes_only_where_activations_wait(changes, evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr("common.offload.MIN_BYTES", 1)
    plain = run(tmp_path / "plain", evaluated, **changes)
    offloaded = run(tmp_path / "offloaded", evaluated, activation_offloading=True, **changes)
    assert_same_bits(plain, offloaded)
    assert plain.metrics[-1]["eval_loss"] == offloaded.metrics[-1]["eval_loss"]
    assert plain.returned["activation_offloading"] is None
    report = offloaded.returned["activation_offloading"]
    assert report["offloaded_bytes"] > 0 and report["peak_host_bytes"] >= report["offloaded_bytes"]
    if changes.get("gradient_checkpointing", True):  # of two layers' inputs the first one's; 32 fp32 numbers
        tokens = {line["num_tokens"] for line in offloaded.metrics[1:]}
        assert report["offloaded_bytes"] in {count * 32 * 4 for count in tokens}


def test_the_ledger_of_an_offloaded_run(tmp_path, capsys):
    flags = {"dataset_name": str(ROOT / "demo/preferences.jsonl"), "max_steps": 2, "measure_memory": True}
    done = run(tmp_path, flags, per_device_train_batch_size=16, activation_offloading=True)
    for row in done.returned["ledger"]:
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.1), row
    assert done.returned["ledger"][-1]["name"] == "on_host"
    assert "on a pretend device" in capsys.readouterr().out


def test_liger_is_refused_before_anything_is_touched(base, tmp_path, monkeypatch):
    flags = {**base, "use_liger_kernel": True, "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="needs a GPU, and torch sees none"):
        main(Arguments(**flags))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpt2 = write_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ValueError, match="no kernels for model type 'gpt2'"):
        main(Arguments(**{**flags, "model_name_or_path": gpt2}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precompute_ref_log_probs", [True, False])
def test_both_models_get_the_kernels(precompute_ref_log_probs, base, copied_run, tmp_path, monkeypatch):
    """Kernels round otherwise: policy and reference must agree, and one's reference is not the other's."""
    patched = []
    monkeypatch.setattr(dpo_padding_free, "check_liger", lambda model_type: None)
    monkeypatch.setattr(dpo_padding_free, "apply_liger_kernels", lambda model, ids: patched.append(model))
    flags = {"use_liger_kernel": True, "precompute_ref_log_probs": precompute_ref_log_probs}
    run(tmp_path, base, max_steps=1, **flags)
    assert len({id(model) for model in patched}) == (1 if precompute_ref_log_probs else 2)
    if precompute_ref_log_probs:
        with pytest.raises(ValueError, match="its precision is not this one's"):
            main(Arguments(**{**base, **flags, "output_dir": copied_run, "resume_from_checkpoint": "latest"}))


# --- README ---


def readme_commands():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    return [
        line.split("dpo_padding_free.py", 1)[1].split()
        for line in text.splitlines()
        if " dpo_padding_free.py --" in line
    ]


def test_the_readmes_commands_are_accepted():
    assert len(readme_commands()) >= 2
    for command in readme_commands():
        (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(command)
        dpo_padding_free.check_arguments(args)
