"""DPO without padding: four ways to batch, one loss; a reference that resuming does not move."""

import functools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import (
    FROZEN,
    OneRank,
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
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import dpo_padding_free
from common.collators import flatten_shared_prompt
from common.folders import list_checkpoints
from common.sharding import read_pretrained
from dpo_padding_free import (
    REFERENCE,
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
DEMO_MODEL = str(ROOT / "demo/model")
END = 257  # the demo tokenizer's end of sequence
VOCAB = 261
WAYS = {
    "shared": {},
    "shared with prefix": {"share_prefix": True},
    "padding-free": {"share_prompt": False},
    "padded": {"padding_free": False},
}
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
METRICS += ("logps/chosen", "logps/rejected")
NO_LIMITS = {"max_prompt_length": None, "max_completion_length": None, "truncation_mode": "keep_end"}


# --- Models, data and runs ---


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with alone_on_the_cpu(tmp_path_factory.mktemp("cache")) as folder:
        yield folder


def write_model(path, family="llama", **overrides):
    """A tiny random model with the demo's tokenizer, as a Hugging Face folder."""
    special = {"pad_token_id": 256, "bos_token_id": None, "eos_token_id": END}
    attention = "eager" if family == "mamba" else "varlen"
    model = tiny_model(family, attention, **{"vocab_size": VOCAB, **special, **overrides})
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(path)
    return str(path)


def random_preferences(seed, count):
    generator = random.Random(seed)

    def text(longest):
        return "".join(generator.choices("abcdef ", k=generator.randint(1, longest)))

    return [plain(text(30), text(15) + "x", text(15) + "y") for _ in range(count)]


def plain(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


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


def curve_difference(first, second):
    """How far two runs' metrics of pairs and gradient norms are apart, the norms relative to their size."""
    assert len(first.metrics) == len(second.metrics)
    pairs = list(zip(first.metrics, second.metrics))
    return max(
        *(abs(a[name] - b[name]) for a, b in pairs for name in METRICS if not name.startswith("logps")),
        *(abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs for name in ("logps/chosen", "grad_norm")),
    )


def assert_same_bits(first, second):
    for name in (*METRICS, "grad_norm", "step", "epoch", "learning_rate", "num_tokens", "num_scored_tokens"):
        assert values(first, name) == values(second, name), name
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def load(name, args, tokenizer=None):
    """What load_examples says of a file, with the demo's tokenizer or another one."""
    pretrained = read_pretrained(DEMO_MODEL)
    pretrained.tokenizer = tokenizer or pretrained.tokenizer
    return load_examples(name, "train", pretrained, args)


def kept_reference(folder):
    return load_file(Path(folder) / REFERENCE)["data"]


def metadata_of(folder):
    with safe_open(Path(folder) / REFERENCE, "pt") as file:
        return file.metadata()


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


def planned(pairs, args, **options):
    examples = datasets.Dataset.from_list([{"example": i, **pair} for i, pair in enumerate(pairs)])
    return Pairs(examples, args, "x", **options)


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
    loss = -logsigmoid(0.1 * (ratios[0::2] - ratios[1::2])).mean()
    loss.backward()
    return {"logps": logps.detach(), "loss": loss.detach(), **gradients(model)}


def computed(model, pairs, attn_implementation=None, pad_token_id=0, **flags):
    """The same by the script: planned, collated, one step of several micro-batches."""
    sizes = {"per_device_train_batch_size": 3, "loss_chunk_size": 5, "max_grad_norm": 0.0}
    args = Arguments(**{**sizes, **flags})
    model.set_attn_implementation(attn_implementation or ("varlen" if args.padding_free else "sdpa"))
    some = planned(pairs, args, pad_token_id=pad_token_id)
    some.reference = make_reference(len(pairs)).view(-1, 2)
    batches = list(some.micro_batches(some.in_order(), OneRank()))
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.0), {}
    optimizer.register_step_pre_hook(lambda *_: found.update(gradients(model)))
    _, means = dpo_padding_free.train_step(model, optimizer, batches, args, OneRank())
    with torch.no_grad():
        logps = torch.cat([sequence_logps(model, batch, args.loss_chunk_size) for batch in batches])
    return {"logps": logps, "loss": torch.tensor(means["loss"]), **found}


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
@settings(max_examples=8)
@given(seed=st.integers(0, 999), shapes=shapes)
def test_logps_loss_and_every_gradient_are_those_of_sequences_alone(way, seed, shapes):
    assert difference(shared_model("llama"), make_pairs(seed, shapes), **WAYS[way]) <= 1e-5


ATTENTION = {name: {"attn_implementation": name, "share_prompt": False} for name in ("sdpa", "eager")}


@pytest.mark.parametrize("way", [*WAYS, *ATTENTION])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_naive_gradients(family, way):
    """Mistral's and Gemma's windows of 4 tokens are shorter than most of these prompts. A row of whole
    sequences runs on transformers' own attention as well.
    """
    assert difference(shared_model(family), make_pairs(1, SHAPES), **{**WAYS, **ATTENTION}[way]) <= 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_prompts_that_keep_end_left_different(way):
    parts = iter(documents(3, [6, 4, 7, 6, 9, 9]))
    ids = [next(parts)["input_ids"] for _ in range(6)]
    pairs = [cut_pair(*three, {**NO_LIMITS, "max_length": 8}) for three in (ids[:3], ids[3:])]
    assert [[len(pair[name]) for name in TOKENS] for pair in pairs] == [[4, 4, 1, 7], [0, 8, 0, 8]]
    assert difference(shared_model("llama"), pairs, **WAYS[way]) <= 1e-5


@pytest.mark.parametrize("pad_token_id", [0, 2, 5])
def test_a_padding_id_may_be_any_token(pad_token_id):
    pairs = make_pairs(2, SHAPES)
    for pair in pairs:
        pair["chosen_ids"][-1] = pair["rejected_ids"][-1] = pad_token_id  # as if it ended in EOS
    padded = computed(shared_model("llama"), pairs, pad_token_id=pad_token_id, padding_free=False)
    assert worst(padded, computed(shared_model("llama"), pairs)) <= 2e-5
    found = collate(pairs, Arguments(padding_free=False), pad_token_id)["completion_lengths"]
    assert found.tolist() == [n - (prompt == 0) for prompt, *two, _ in SHAPES for n in two]


def test_how_many_tokens_each_way_computes():
    pairs = make_pairs(0, [(10, 5, 3, 2), (6, 4, 8, 0)])
    before = json.dumps(pairs)
    tokens = {way: collate(pairs, Arguments(**flags))["input_ids"].numel() for way, flags in WAYS.items()}
    assert tokens == {"shared": 36, "shared with prefix": 34, "padding-free": 52, "padded": 60}
    assert json.dumps(pairs) == before  # not mutated
    for way, flags in WAYS.items():
        costs = planned(pairs, Arguments(**flags)).costs
        assert (4 * costs[0] // 2 if way == "padded" else costs.sum()) == tokens[way]


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
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


@pytest.mark.parametrize(
    "way, precompute_ref_log_probs", [*((way, True) for way in WAYS), ("shared with prefix", False)]
)
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
    [line] = done.metrics
    for prefix, name in (("", "dataset_name"), ("eval_", "eval_dataset_name")):
        examples, _ = load(evaluated[name], Arguments(max_length=64))
        logps = naive_logps(model, list(examples))
        assert line[f"{prefix}logps/chosen"] == pytest.approx(logps[0::2].mean().item(), rel=1e-5)
        assert line[f"{prefix}logps/rejected"] == pytest.approx(logps[1::2].mean().item(), rel=1e-5)
        assert line[f"{prefix}loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_first_update_is_adamw_on_the_mean_loss(base, tmp_path):
    """One step on all pairs, from weights to weights, against torch's own optimizer on the plain loss."""
    done = run(tmp_path, base, per_device_train_batch_size=10, weight_decay=10.0, max_grad_norm=0.05)
    model = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"])
    logps = naive_logps(model, list(load(base["dataset_name"], Arguments(max_length=64))[0]))
    ratios = logps - logps.detach()
    (-logsigmoid(0.1 * (ratios[0::2] - ratios[1::2])).mean()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    matrices = [p for name, p in model.named_parameters() if "norm" not in name]
    for parameters, weight_decay in ((matrices, 10.0), (norms, 0.0)):
        torch.optim.AdamW(parameters, lr=1e-3, weight_decay=weight_decay).step()
    assert values(done, "loss") == pytest.approx([math.log(2)], abs=1e-7)
    assert done.metrics[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.05
    assert worst(done.weights, {name: p.detach() for name, p in model.named_parameters()}) <= 1e-4


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
    row["score_index"][row["completion_lengths"][0]] = row["cu_seq_lens_q"][2] - 1


def lengths_change_places(row):
    row["completion_lengths"] = row["completion_lengths"].flip(0)


TWO = [(5, 4, 6, 0), (3, 2, 5, 0)]


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
    model, pairs = shared_model(family), make_pairs(4, TWO)
    assert difference(model, pairs) <= 1e-5
    change_shared_rows(monkeypatch, change)
    assert difference(model, pairs) > 1e-3


@pytest.mark.parametrize("change", [second_reads_the_first, keys_of_another_prompt])
def test_the_start_up_proof_finds_it_too(change, base, tmp_path, monkeypatch):
    """Among pairs that share nothing, it looks at those that do."""
    rows = [plain("", "a", "b")] * 2 + random_preferences(0, 4)
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows), "max_steps": 1}
    change_shared_rows(monkeypatch, change)
    with pytest.raises(ValueError, match="else in a row of shared prompts than .*--no_share_prompt"):
        run(tmp_path / "out", flags)
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out", flags, check_exact=False)


def test_the_proof_looks_back_as_far_as_the_window(base, tmp_path, monkeypatch):
    """Prompts of at most 30 tokens, a window of 60: repeated, the prompt passes it, within max_length."""
    seen, window = [], 60
    flags = {**base, "model_name_or_path": write_model(tmp_path / "model", "mistral", sliding_window=window)}
    alone = dpo_padding_free.logps_alone
    monkeypatch.setattr(
        dpo_padding_free, "logps_alone", lambda model, found: seen.append(found) or alone(model, found)
    )
    run(tmp_path / "out", flags, max_length=100, max_steps=1)
    assert len(seen[0]) == 4
    assert all(window < len(ids) - scored and len(ids) <= 100 and scored <= 64 for ids, scored in seen[0])
    attention = dpo_padding_free.set_kernels

    def ignored(model, *args):
        attention(model, *args)
        model.config.sliding_window = None

    monkeypatch.setattr(dpo_padding_free, "set_kernels", ignored)
    with pytest.raises(ValueError, match="computes something else in a row of shared prompts"):
        run(tmp_path / "out", flags, max_length=100, overwrite_output_dir=True)


@pytest.mark.parametrize("way, collator", [("padding-free", "flatten"), ("padded", "pad")])
def test_a_loss_mask_taken_away_is_found(way, collator, monkeypatch):
    original = getattr(dpo_padding_free, collator)

    def scored(sequences, *args):
        return original([{**s, "labels": s["input_ids"]} for s in sequences], *args)

    monkeypatch.setattr(dpo_padding_free, collator, scored)
    with pytest.raises(RuntimeError):  # more scores than the sequences have scored tokens
        difference(shared_model("llama"), make_pairs(4, TWO), **WAYS[way])


def test_an_attention_mask_that_hides_a_token_is_found(monkeypatch):
    original = dpo_padding_free.pad

    def hides(sequences, pad_token_id):
        batch = original(sequences, pad_token_id)
        batch["attention_mask"][:, 2] = 0
        return batch

    monkeypatch.setattr(dpo_padding_free, "pad", hides)
    assert difference(shared_model("llama"), make_pairs(4, TWO), **WAYS["padded"]) > 1e-3


def test_a_mean_per_micro_batch_is_found(monkeypatch):
    """7 pairs cut 3 + 3 + 1: a mean of means weighs the last one threefold."""

    def mean(model, reference_model, batch, args):
        loss, sums = batch_loss(model, reference_model, batch, args)
        return 7 / 3 * loss / (len(batch["completion_lengths"]) // 2), sums

    monkeypatch.setattr(dpo_padding_free, "batch_loss", mean)
    assert difference(shared_model("llama"), make_pairs(1, SHAPES)) > 1e-3


def test_ipo_over_the_batchs_tokens_is_found(monkeypatch):
    model, pairs, args = shared_model("llama"), make_pairs(4, TWO), Arguments(loss_type="ipo")
    batch = collate(pairs, args) | {"ref_logps": make_reference(2)}
    model.set_attn_implementation("varlen")
    ratios = computed(model, pairs)["logps"] - make_reference(2)
    h = [ratios[0] / 4 - ratios[1] / 6, ratios[2] / 2 - ratios[3] / 5]
    expected = sum((x - 5) ** 2 for x in h).item()
    assert batch_loss(model, None, batch, args)[0].item() == pytest.approx(expected, rel=1e-5)
    ipo, whole = dpo_padding_free.ipo_loss, {"chosen_lengths": 6, "rejected_lengths": 11}
    monkeypatch.setitem(dpo_padding_free.LOSSES, "ipo", lambda *two, **rest: ipo(*two, **{**rest, **whole}))
    assert abs(batch_loss(model, None, batch, args)[0].item() / expected - 1) > 1e-2


# --- 3. Isolation ---


def logps_of(pairs, **flags):
    args, model = Arguments(**flags), shared_model("llama")
    model.set_attn_implementation("varlen" if args.padding_free else "sdpa")
    with torch.no_grad():
        return sequence_logps(model, collate(pairs, args), 5).view(-1, 2)


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
    order = [3, 0, 6, 2, 5, 1, 4]
    permuted = logps_of([make_pairs(5, SHAPES)[i] for i in order], **WAYS[way])
    assert worst(permuted, before[order]) <= 1e-5


# --- 4. The loss ---


def example_loss(loss_type="sigmoid", label_smoothing=0.0, beta=0.1, lengths=(4, 8)):
    logps = [torch.tensor([x], requires_grad=i < 2) for i, x in enumerate((-10.0, -30.0, -12.0, -26.0))]
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), map(torch.tensor, lengths)))
    return logps, dpo_loss(*logps, beta, loss_type, label_smoothing, **lengths)


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
    logps, (losses, *rewards) = example_loss(loss_type, label_smoothing)
    assert losses.tolist() == pytest.approx([expected], rel=1e-6)
    assert [reward.item() for reward in rewards] == pytest.approx([0.2, -0.4])
    assert not any(reward.requires_grad for reward in rewards)
    losses.sum().backward()
    assert logps[0].grad < 0 < logps[1].grad  # pushed apart


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
        (("ipo", 0.0, 0.1, ()), "chosen_lengths"),
    ],
)
def test_losses_refuse(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        example_loss(*arguments)


def test_a_new_loss_is_one_function_and_one_name(base, tmp_path, monkeypatch):
    def exponential(chosen_logratios, rejected_logratios, beta, **_):
        return torch.exp(-beta * (chosen_logratios - rejected_logratios))

    monkeypatch.setitem(dpo_padding_free.LOSSES, "exponential", exponential)
    done = run(tmp_path, base, loss_type="exponential")
    assert values(done, "loss")[0] == pytest.approx(1.0) and values(done, "loss")[-1] < 0.999


# --- 5. Data ---


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TALK = [user("hi"), assistant("yo"), user("so")]
TALK_TEXT = "<|user|>hi<|end|><|assistant|>yo<|end|><|user|>so<|end|><|assistant|>"
CHAT = plain(TALK, [assistant("2")], [assistant("3")])
FORMS = {
    "plain": plain("1+1=", "2", "3"),
    "plain, implicit": {"chosen": "1+1=2", "rejected": "1+1=3"},
    "conversational": CHAT,
    "conversational, implicit": {name: [*TALK, *CHAT[name]] for name in ("chosen", "rejected")},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_preferences(form, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    examples, data = load(write_jsonl(tmp_path / "rows.jsonl", [FORMS[form]]), Arguments())
    prompt = "1+1=" if "plain" in form else TALK_TEXT
    assert [tokenizer.decode(examples[0][name]) for name in TOKENS] == [
        prompt,
        "2<|end|>",
        prompt,
        "3<|end|>",
    ]
    assert data["boundaries_moved"] == 0 and data["examples_used"] == 1
    size = len(tokenizer(prompt).input_ids)
    names = ("chosen_length", "rejected_length", "shared_length", "prefix_length")
    assert [examples[0][name] for name in names] == [size + 2, size + 2, size, 0]


def talk(*contents):
    """A conversation in which user and assistant take turns."""
    return [(user, assistant)[i % 2](content) for i, content in enumerate(contents)]


PROMPTS_END = {
    "an answer that both begin with is the prompt's, but not the last one": (
        {"chosen": talk("a", "b"), "rejected": talk("a", "b", "c", "d")},
        ["<|user|>a<|end|><|assistant|>", "b<|end|>", "b<|end|><|user|>c<|end|><|assistant|>d<|end|>"],
    ),
    "they part at a question: no generation prompt": (
        {"chosen": talk("a", "b", "c", "d"), "rejected": talk("a", "b", "e", "f")},
        [
            "<|user|>a<|end|><|assistant|>b<|end|>",
            "<|user|>c<|end|><|assistant|>d<|end|>",
            "<|user|>e<|end|><|assistant|>f<|end|>",
        ],
    ),
    "nothing in common": (
        {"chosen": talk("a", "b"), "rejected": talk("c", "b")},
        ["", "<|user|>a<|end|><|assistant|>b<|end|>", "<|user|>c<|end|><|assistant|>b<|end|>"],
    ),
    "whole conversations beside their prompt": (
        plain(talk("a"), talk("a", "b"), talk("a", "c")),
        ["<|user|>a<|end|><|assistant|>", "b<|end|>", "c<|end|>"],
    ),
    "a turn that goes on": (
        plain(talk("a", "b"), [assistant("c")], [assistant("d")]),
        ["<|user|>a<|end|><|assistant|>b", "c<|end|>", "d<|end|>"],
    ),
    "one is the other's beginning": ({"chosen": "ab", "rejected": "abc"}, ["ab", "<|end|>", "c<|end|>"]),
    "an end that is there": ({"chosen": "ab<|end|>", "rejected": "ac"}, ["a", "b<|end|>", "c<|end|>"]),
    "no prompt": (plain("", "ab", "ac"), ["", "ab<|end|>", "ac<|end|>"]),
    "no answer": (plain("a", "", "b"), ["a", "<|end|>", "b<|end|>"]),
}


@pytest.mark.parametrize("case", PROMPTS_END)
def test_where_prompts_end(case):
    row, expected = PROMPTS_END[case]
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    assert [tokenizer.decode(ids) for ids in tokenize(row, tokenizer)[:3]] == expected


def test_the_prompt_ends_where_joint_and_separate_tokenisation_part(tmp_path):
    pieces = ["<eos>", "x", "a", "b", "y", "ab"]
    byte_pairs = models.BPE({piece: i for i, piece in enumerate(pieces)}, [("a", "b")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(byte_pairs), eos_token="<eos>")
    # together: x ab y and x a y; "ab" holds a piece of the completion, so both completions begin there
    rows = [plain("xa", "by", "y"), plain("x", "a", "y")]
    assert tokenize(rows[0], tokenizer) == ([1], [5, 4, 0], [2, 4, 0], True)
    _, data = load(write_jsonl(tmp_path / "rows.jsonl", rows), Arguments(), tokenizer)
    assert data["boundaries_moved"] == 1


P, C, R = [464, 6766, 318], [4171, 2], [4077, 2]
KEEP_END = {"truncation_mode": "keep_end"}


@pytest.mark.parametrize(
    "limits, prompt, chosen",
    [
        ({}, P, C),
        ({"max_prompt_length": 2, "max_completion_length": 1}, [6766, 318], [4171]),
        ({"max_length": 4}, P, [4171]),
        ({"max_length": 3}, P, []),
        ({"max_length": 4, **KEEP_END}, [6766, 318], C),
        ({"max_length": 2, **KEEP_END}, [], C),
        ({"max_length": 1, **KEEP_END}, [], [2]),
        ({"max_prompt_length": 2, "max_length": 3}, [6766, 318], [4171]),
        ({"max_completion_length": 1, "max_length": 2, **KEEP_END}, [318], [4171]),
    ],
)
def test_the_truncation_table(limits, prompt, chosen):
    cut = cut_pair(P, C, R, {**NO_LIMITS, "max_length": 1000, "truncation_mode": "keep_start", **limits})
    rejected = [4077 if token == 4171 else token for token in chosen]
    assert [cut[name] for name in TOKENS] == [prompt, chosen, prompt, rejected]
    assert cut["chosen_length"] == len(prompt + chosen)
    assert cut["tokens_cut"] == 10 - 2 * len(prompt + chosen)
    assert cut["completions_without_eos"] == 2 * (chosen[-1:] != [2])
    assert cut["unscored"] == (len(prompt + chosen) < 2 or not chosen)
    assert cut["prompts_truncated"] == (prompt != P)
    assert cut["completions_truncated"] == 2 * (chosen != C)
    assert (P, C, R) == ([464, 6766, 318], [4171, 2], [4077, 2])  # not mutated


TO_CUT = [
    plain("p" * 9, "ab", "ac"),  # 12 tokens each
    plain("p" * 9, "a" * 8 + "x", "a" * 8 + "y"),  # 19 each
    plain("p" * 20, "ab", "ac"),  # 23 each
    plain("p", "ab", "ab"),  # equal from the start
    plain("p" * 9, "a", "b" * 6),  # 11 and 16
]
COUNTS = ("used", "equal", "unscored", "truncated")
COUNTS = ("examples_read", *(f"examples_{name}" for name in COUNTS), "prompts_truncated", "prompts_parted")
COUNTS += ("completions_truncated", "completions_without_eos")


@pytest.mark.parametrize(
    "flags, counts",
    [
        ({}, (5, 4, 1, 0, 0, 0, 0, 0, 0)),
        ({"max_completion_length": 8}, (5, 3, 2, 0, 0, 0, 0, 0, 0)),
        ({"max_prompt_length": 5}, (5, 4, 1, 0, 4, 4, 0, 0, 0)),
        ({"max_length": 16}, (5, 2, 2, 1, 0, 0, 0, 0, 0)),
        ({"max_length": 15}, (5, 2, 2, 1, 1, 0, 0, 1, 1)),
        ({"max_length": 15, "truncation_mode": "keep_end"}, (5, 4, 1, 0, 3, 3, 1, 0, 0)),
    ],
)
def test_cuts_and_drops_are_counted(flags, counts, tmp_path):
    examples, data = load(write_jsonl(tmp_path / "rows.jsonl", TO_CUT), Arguments(**flags))
    assert {name: data[name] for name in COUNTS} == dict(zip(COUNTS, counts))
    kept = sum(len(example[name]) for example in examples for name in TOKENS)
    assert len(examples) == data["examples_used"] and data["tokens_kept"] == kept


def test_tokens_are_cached_until_something_they_depend_on_changes(cache, tmp_path):
    name = write_jsonl(tmp_path / "rows.jsonl", [FORMS["plain"]])

    def files(**flags):
        load(name, Arguments(**flags))
        return {path for path in cache.rglob("*.arrow") if path.parent.name == "tokenised"}

    first = files()
    assert files(learning_rate=1.0, seed=7, share_prompt=False, output_dir="elsewhere") == first
    assert len(files(max_length=9) - first) == 1


def test_a_thousand_empty_prompts_first(tmp_path):
    """The first rows that datasets writes have no prompt's type to show."""
    rows = [plain("", "a", "b")] * 1001 + [plain("c", "a", "b")]
    examples, data = load(write_jsonl(tmp_path / "rows.jsonl", rows), Arguments())
    assert data["examples_used"] == 1002 and examples[1001]["chosen_prompt_ids"] == [66]  # "c"


# --- 6. Batches by tokens, and those of the reference ---


@settings(max_examples=20)
@given(
    sizes=st.lists(st.tuples(lengths, lengths, lengths, st.just(0)), min_size=1, max_size=20),
    slack=st.integers(0, 60),
    start=st.integers(0, 20),
    way=st.sampled_from(list(WAYS)),
)
def test_batches_hold_as_many_pairs_as_their_tokens_allow(sizes, slack, start, way):
    pairs = make_pairs(0, sizes)
    budget = int(planned(pairs, Arguments(**WAYS[way])).costs.max()) + slack
    some = planned(pairs, Arguments(max_tokens_per_batch=budget, **WAYS[way]))
    chunks = list(some.cut(some.order(0)))
    assert np.concatenate(chunks).tolist() == some.order(0).tolist()  # each pair once, in order

    def computed_tokens(numbers):
        return collate([pairs[i] for i in numbers], some.args)["input_ids"].numel()

    for chunk, following in zip(chunks, [*chunks[1:], []]):
        assert computed_tokens(chunk) <= budget
        assert len(following) == 0 or computed_tokens([*chunk, following[0]]) > budget
    # from any batch's end on, the rest is cut as before: a resumed run meets the same batches
    start %= len(chunks)
    again = some.cut(some.order(0)[sum(map(len, chunks[:start])) :])
    assert [chunk.tolist() for chunk in again] == [chunk.tolist() for chunk in chunks[start:]]


@pytest.mark.parametrize("budget", [None, 90])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("steps_done, total_steps", [(0, 1), (0, 2), (1, 2), (2, 2), (1, 4)])
def test_the_references_micro_batches_are_those_of_training(steps_done, total_steps, world, budget):
    args = Arguments(max_tokens_per_batch=budget, gradient_accumulation_steps=2)
    args.per_device_train_batch_size = 3 if budget is None else None
    some = planned(make_pairs(0, [(n, 3, 4, 0) for n in range(1, 41)]), args, world=world)
    steps = list(some.steps(0, 0))
    progress = {"step": steps_done, "epoch": 0, "done": sum(map(len, sum(steps[:steps_done], [])))}
    found = [chunk.tolist() for chunk in some.reference_chunks(progress, total_steps)]
    ahead = [chunk.tolist() for chunk in sum(steps[steps_done:total_steps], [])]
    assert found[: len(ahead)] == ahead
    # the second epoch visits what the first steps did
    assert len(found) == len(ahead) if total_steps <= len(steps) else sorted(sum(found, [])) == [*range(40)]


# --- 7. Refusals ---

PLAIN = FORMS["plain"]
BAD_DATA = {
    "missing columns": ([{"prompt": "a", "completion": "b"}], "has the columns prompt, completion; wanted"),
    "no rejected": ([{"prompt": "a", "chosen": "b"}], "prompt, chosen; wanted: chosen and rejected"),
    "a null": ([PLAIN, {**PLAIN, "rejected": None}], "bad.jsonl, example 1: rejected is None"),
    "no answer": (
        [{"chosen": [user("a"), assistant("b")], "rejected": [user("a")]}],
        "example 0: rejected ends with a message of role user",
    ),
    "no prompt": (
        [{"question": "a", "score": 1, "chosen": "b", "rejected": "c"}],
        "have no beginning in common .* the other columns: question, score",
    ),
    "the prompt once more": ([plain("ab", "abc", "abd")], "in 1 of 1 rows the completion begins with the"),
    "all equal": ([plain("a", "b", "b")], "no pair whose .* within max_length 64.*'examples_equal': 1"),
    "all too long": ([plain("a" * 99, "b", "c")], "no pair whose .* max_length 64.*'examples_unscored': 1"),
}
BAD_MODELS = {
    "sequences mix": ("mamba", {}, "refuses this run's rows|computes something else .*--no_padding_free"),
    "a convolution crosses over": (
        "lfm2",
        {"full_attn_idxs": [1]},
        "computes something else in a row of shared prompts.* --no_share_prompt",
    ),
    "softcap": ("gemma2", {"final_logit_softcapping": 1.0}, "softcap"),
    "scaled logits": ("granite", {"logits_scaling": 8.0}, "logits_scaling 8.0"),
    "id outside the vocabulary": (
        "llama",
        {"vocab_size": 200, "pad_token_id": 0, "eos_token_id": 1},
        "token id 257 is outside the vocabulary of 200",
    ),
}
FLASH = "flash_attention_2"
BAD_FLAGS = {
    "--max_length is 1": {"max_length": 1},
    "--max_prompt_length 64 leaves no room": {"max_prompt_length": 64},
    "--max_completion_length 64 leaves no room": {"max_completion_length": 64},
    "--truncation_mode is 'keep_middle'; choose one of keep_start": {"truncation_mode": "keep_middle"},
    "beta is 0.0": {"beta": 0.0},
    "loss_type is 'kto'; choose one of sigmoid, ipo, hinge": {"loss_type": "kto"},
    "label_smoothing is 0.7": {"label_smoothing": 0.7},
    "not defined for loss_type hinge": {"loss_type": "hinge", "label_smoothing": 0.1},
    "both size a batch": {"max_tokens_per_batch": 99, "per_device_train_batch_size": 2},
    "--max_tokens_per_batch is 0": {"max_tokens_per_batch": 0},
    "--share_prefix needs": {"share_prefix": True, "share_prompt": False},
    "--share_prefix needs shared": {"share_prefix": True, "padding_free": False},
    "flash_attention_2 ignores kv_index": {"attn_implementation": FLASH, "bf16": True},
    "sdpa ignores kv_index": {"attn_implementation": "sdpa"},
    "flash_attention_2 rejects fp32": {"attn_implementation": FLASH, "share_prompt": False},
    "varlen is for flat rows": {"attn_implementation": "varlen", "padding_free": False},
    "--eval_steps needs": {"eval_steps": 2},
    "a pair may take 127 tokens, over --max_tokens_per_batch 99": {
        "dry_run": True,
        "max_tokens_per_batch": 99,
    },
    "takes .* tokens, over --max_tokens_per_batch 12: raise it": {"max_tokens_per_batch": 12},
    "needs a GPU, and torch sees none": {"use_liger_kernel": True},
}


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


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused(name, base, earlier_run, tmp_path):
    rows, message = BAD_DATA[name]
    bad = write_jsonl(tmp_path / "bad.jsonl", rows)
    flags = {**base, "overwrite_output_dir": True}
    assert_refused(earlier_run, {**flags, "dataset_name": bad}, message)
    if name == "missing columns":
        assert_refused(earlier_run, {**flags, "eval_dataset_name": bad}, message)


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_refused(name, base, earlier_run, tmp_path):
    family, overrides, message = BAD_MODELS[name]
    model = write_model(tmp_path / "model", family, **overrides)
    assert_refused(earlier_run, {**base, "overwrite_output_dir": True, "model_name_or_path": model}, message)
    if family == "lfm2":  # which mixes sequences, but not if they are padded
        flags = {"max_steps": 1, "padding_free": False, "model_name_or_path": model}
        assert len(run(tmp_path / "out", base, **flags).metrics) == 1


@pytest.mark.parametrize("message", BAD_FLAGS)
def test_contradictory_flags_are_refused(message, base, earlier_run):
    assert_refused(earlier_run, {**base, "overwrite_output_dir": True, **BAD_FLAGS[message]}, message)


@pytest.mark.parametrize("way", ["shared", "padded"])
def test_kernels_that_compute_something_else_are_refused(way, base, tmp_path, monkeypatch):
    """As if Liger's had been put into a model of another configuration."""
    original = dpo_padding_free.set_kernels

    def wrong(model, args, flat, pretends=False):
        original(model, args, flat)
        model.model.norm.variance_epsilon = 1.0

    monkeypatch.setattr(dpo_padding_free, "set_kernels", wrong)
    rows = {"shared": "row of shared prompts", "padded": "padded batch.*Drop --use_liger_kernel"}[way]
    with pytest.raises(ValueError, match=f"computes something else in a {rows}"):
        run(tmp_path, base, **WAYS[way])


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"resume_from_checkpoint": None}, "holds another run .*--resume_from_checkpoint latest"),
        ({"max_length": 16}, "its data and this run's differ. Use its dataset, limits"),
        ({"seed": 1}, "its data and this run's differ"),
        ({"beta": 0.5}, "its objective and this run's differ. Use its loss_type, beta"),
        ({"loss_type": "hinge"}, "its objective"),
        ({"label_smoothing": 0.1}, "its objective"),
        ({"bf16": True}, "its precision is not this one's"),
        ({}, "has finished its 3 steps"),
    ],
    ids=str,
)
def test_a_folder_that_holds_another_run_is_refused(flags, message, base, earlier_run):
    resume = {"resume_from_checkpoint": "latest", "max_steps": 4 if "precision" in message else 3}
    assert_refused(earlier_run, {**base, **resume, **flags}, message)


def test_resuming_with_an_evaluation_that_was_not_there_is_refused(evaluated, earlier_run):
    flags = {**evaluated, "resume_from_checkpoint": "latest", "max_steps": 4}
    assert_refused(earlier_run, flags, "its evaluation data is not this one's")


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_resuming_with_other_data_is_refused(column, base, earlier_run, tmp_path):
    rows = [json.loads(line) for line in open(base["dataset_name"])]
    rows[7][column] = "".join(chr(ord(c) + 1) for c in rows[7][column])  # as long as before
    name = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = {**base, "dataset_name": name, "resume_from_checkpoint": "latest"}
    assert_refused(earlier_run, flags, "its data and this run's differ")


@pytest.mark.parametrize("how", ["file there", "file gone", "second model"])
def test_resuming_with_another_model_is_refused(how, base, copied_run, tmp_path):
    """Its log-probabilities would be another reference than that of the steps before."""
    name = write_model(tmp_path / "other", initializer_range=0.1)
    if how == "file gone":
        (copied_run / REFERENCE).unlink()
    flags = {**base, "model_name_or_path": name, "resume_from_checkpoint": "latest", "max_steps": 4}
    flags["precompute_ref_log_probs"] = how != "second model"
    assert_refused(copied_run, flags, "its reference model and this run's differ")


@pytest.mark.parametrize("check_exact", [True, False])
def test_a_reference_that_is_not_finite_stops_the_run(check_exact, base, tmp_path):
    folder = write_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    token = AutoTokenizer.from_pretrained(folder)("y")["input_ids"]  # of all rejected completions
    model.model.embed_tokens.weight.data[token] = math.inf
    model.save_pretrained(folder)
    message = "not finite: its weights" if check_exact else "log-probabilities of example . are not finite"
    with pytest.raises((ValueError, FloatingPointError), match=message):
        run(tmp_path / "out", base, model_name_or_path=folder, check_exact=check_exact)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(base, tmp_path, monkeypatch):
    def breaks(chosen_logratios, rejected_logratios, chosen_lengths, **_):
        return (chosen_logratios - rejected_logratios) * (chosen_lengths == 5) / 0.0

    monkeypatch.setitem(dpo_padding_free.LOSSES, "sigmoid", breaks)
    rows = [plain("a", "b" * n, "c") for n in (4,)]  # and EOS: 5 scored tokens
    flags = {**base, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows)}
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan.* Pairs \[0\], examples \[0\]"):
        run(tmp_path / "out", flags, save_steps=1)
    assert not list_checkpoints(tmp_path / "out")


# --- 8. The reference ---

FINGERPRINT = {"model": "m", "data": "d", "precision": "fp32"}


def test_a_kept_reference_is_read_by_its_own_run_alone(tmp_path):
    tensors = {"data": torch.tensor([[-1.5, math.nan], [-3.0, float(2**-20)]])}
    assert dpo_padding_free.read_reference(tmp_path, FINGERPRINT) == {}
    dpo_padding_free.write_reference(tmp_path, tensors, FINGERPRINT)
    found = dpo_padding_free.read_reference(tmp_path, FINGERPRINT)
    assert found.keys() == tensors.keys() and torch.equal(
        found["data"].nan_to_num(), tensors["data"].nan_to_num()
    )
    for other in (*FINGERPRINT, "more"):
        message = f"{REFERENCE} belongs to another run: its {other} is not this one's.*remove the file"
        with pytest.raises(ValueError, match=message):
            dpo_padding_free.read_reference(tmp_path, {**FINGERPRINT, other: "x"})


def computed_pairs(monkeypatch):
    """A list that fills with the pairs of each micro-batch in which the reference is computed."""
    computed, compute = [], dpo_padding_free.compute_reference

    def note(model, pairs, chunks, run):
        computed.extend(chunk.tolist() for chunk in chunks)
        return compute(model, pairs, chunks, run)

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


BATCHES = {
    "shared": {"bf16": True},
    "shared with prefix": {"share_prefix": True},
    "padding-free": {"share_prompt": False, "bf16": True},
    "padded": {"padding_free": False},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": True},
    "by tokens": {"per_device_train_batch_size": None, "max_tokens_per_batch": 80},
    "not checkpointed": {"gradient_checkpointing": False, "bf16": True},
}


@pytest.mark.parametrize("form", BATCHES)
def test_a_policy_that_has_not_moved_is_its_reference(form, evaluated, rows_matter, tmp_path):
    """To the last bit, in all of the first epoch and in every evaluation."""
    done = run(tmp_path, evaluated, learning_rate=0.0, **BATCHES[form])
    assert done.metrics[-1]["epoch"] == 1.0
    for line in done.metrics:
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert line["rewards/chosen"] == line["rewards/rejected"] == line["rewards/margins"] == 0.0
        assert line["rewards/accuracies"] == 0.0 and line.get("eval_rewards/margins", 0.0) == 0.0


def test_a_reference_computed_in_other_rows_would_be_seen(base, rows_matter, tmp_path, monkeypatch):
    monkeypatch.setattr(Pairs, "reference_chunks", lambda self, *_: self.in_order())
    done = run(tmp_path, base, learning_rate=0.0)
    assert any(abs(margin) > 1e-3 for margin in values(done, "rewards/margins"))


def test_the_reference_is_computed_for_the_pairs_that_training_visits(
    base, rows_matter, tmp_path, monkeypatch
):
    computed = computed_pairs(monkeypatch)
    order = np.random.default_rng([0, 0]).permutation(10).tolist()
    flags = {**base, "lr_scheduler_type": "constant"}
    through = run(tmp_path / "through", flags, num_train_epochs=2)
    assert computed == [order[:4], order[4:8], order[8:]]
    whole = kept_reference(tmp_path / "through")
    assert whole.shape == (10, 2) and whole.dtype == torch.float32
    for max_steps, pairs in ((1, [order[:4]]), (2, [order[4:8]]), (5, [order[8:]]), (6, [])):
        computed.clear()
        resume = {"resume_from_checkpoint": "latest"} if max_steps > 1 else {}
        prolonged = run(tmp_path / "prolonged", flags, max_steps=max_steps, save_steps=1, **resume)
        assert computed == pairs
        kept = kept_reference(tmp_path / "prolonged")
        known = ~kept.isnan().any(1)
        assert known.nonzero()[:, 0].tolist() == sorted(order[: min(4 * max_steps, 10)])
        assert torch.equal(kept[known], whole[known])
    assert_same_bits(prolonged, through)


def test_a_reference_of_the_trained_model_is_found(base, copied_run, tmp_path):
    """As if a resumed run had computed it from the weights of its checkpoint."""
    through = read_run(copied_run)
    run(tmp_path / "trained", base, model_name_or_path=str(copied_run))
    wrong, metadata = {"data": kept_reference(tmp_path / "trained")}, metadata_of(copied_run)
    save_file(wrong, copied_run / REFERENCE, metadata=metadata)
    resumed = run(copied_run, base, resume_from_checkpoint=str(copied_run / "checkpoint-1"))
    assert values(resumed, "loss")[0] == values(through, "loss")[0]
    assert abs(values(resumed, "loss")[1] - values(through, "loss")[1]) > 1e-5


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
    before = kept_reference(copied_run)
    name = write_model(tmp_path / "other", initializer_range=0.1)
    again = run(copied_run, base, overwrite_output_dir=True, max_steps=3, model_name_or_path=name)
    assert len(again.metrics) == 3 and list_checkpoints(copied_run) == []
    assert worst(kept_reference(copied_run), before) > 0.1
    run(copied_run, base, overwrite_output_dir=True, max_steps=1, precompute_ref_log_probs=False)
    assert not (copied_run / REFERENCE).exists()


def test_a_second_model_is_not_trained_and_has_the_same_kernels(base, tmp_path, monkeypatch):
    kernels, set_kernels = [], dpo_padding_free.set_kernels
    monkeypatch.setattr(
        dpo_padding_free,
        "set_kernels",
        lambda model, *args, **rest: kernels.append((model, args)) or set_kernels(model, *args, **rest),
    )
    run(tmp_path, base, precompute_ref_log_probs=False)
    (policy, first), (reference, second) = kernels
    assert first == second
    assert policy.training and not reference.training
    original = load_file(Path(base["model_name_or_path"]) / "model.safetensors")
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, original[name]) and parameter.grad is None
    assert any(not torch.equal(p, original[name]) for name, p in policy.named_parameters())


# --- 9. Checkpoints ---


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
def saved_folder(dropout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "run"
    run(folder, dropout, save_steps=2)
    return folder


def cut_after(run_folder, step, folder):
    """A copy of a finished run as it was right after the checkpoint of `step`."""
    folder.mkdir()
    shutil.copytree(run_folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copy(run_folder / REFERENCE, folder)
    lines = (run_folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: step + 1]) + '{"step": ')  # killed while writing
    return folder


@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("lost", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(step, lost, dropout, saved_folder, tmp_path):
    """Within the warm-up, before the epoch's end and after it: the same bits. A lost reference is computed
    anew in the first epoch's rows, from the first weights.
    """
    folder, kept = cut_after(saved_folder, step, tmp_path / "cut"), kept_reference(saved_folder)
    if lost:
        (folder / REFERENCE).unlink()
    resumed = run(folder, dropout, save_steps=2, resume_from_checkpoint="latest")
    assert_same_bits(resumed, read_run(saved_folder))
    found = kept_reference(folder)
    assert torch.equal(found[~found.isnan()], kept[~found.isnan()])


def test_dropout_saving_and_evaluating_change_no_step(
    base, dropout, saved_folder, evaluated, tmp_path, monkeypatch
):
    """Checkpointing neither, to rounding."""
    saved = read_run(saved_folder)
    assert values(saved, "rewards/margins")[0] == 0.0  # from equal models
    assert_same_bits(saved, run(tmp_path / "0", dropout, model_name_or_path=base["model_name_or_path"]))
    name = {"eval_dataset_name": evaluated["eval_dataset_name"]}
    assert_same_bits(saved, run(tmp_path / "1", dropout, **name, eval_steps=1))
    assert curve_difference(saved, run(tmp_path / "2", dropout, gradient_checkpointing=False)) <= 1e-5


@pytest.mark.parametrize("changes", [{}, {"bf16": True, "precompute_ref_log_probs": False}], ids=str)
def test_frozen_layers_cost_their_weights_alone(changes, dropout, tmp_path, monkeypatch):
    flags = {**dropout, **changes, "save_steps": 4, "measure_memory": True}
    in_graph = freeze_first(dpo_padding_free, monkeypatch)
    whole = run(tmp_path / "whole", flags)
    assert not any(in_graph) and len(in_graph) >= 8
    came = load_file(Path(flags["model_name_or_path"]) / "model.safetensors")
    for name, weight in whole.weights.items():
        assert torch.equal(weight, came[name]) == name.startswith(FROZEN), name
    trained = sum(w.numel() for name, w in came.items() if not name.startswith(FROZEN))
    found = bytes_of(whole.returned)
    assert found["gradients"] == 4 * trained
    assert found["optimizer"] == pytest.approx(8 * trained, rel=0.01)
    folder = tmp_path / "whole" if changes else cut_after(tmp_path / "whole", 4, tmp_path / "cut")
    checkpoint = {"resume_from_checkpoint": str(folder / "checkpoint-4")}
    assert_same_bits(run(folder, flags, **checkpoint), whole)
    monkeypatch.undo()
    assert_refused(folder, {**flags, **checkpoint}, "its frozen parameters and this run's differ")


# --- 10. Ranks ---

TWO_EPOCHS = {"num_train_epochs": 2, "save_steps": 2, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def two_ranks(evaluated, tmp_path_factory):
    """Two runs on 2 ranks. "pairs": steps of 4 pairs, 2 x 1 on each: 4 + 4 + 2, where the last leaves nothing
    to accumulate. "tokens": 5 pairs in uneven batches, where one rank runs a batch without a pair.
    """
    folder = tmp_path_factory.mktemp("two")
    few = write_jsonl(folder / "rows.jsonl", random_preferences(0, 5))
    flags = {
        "pairs": {**evaluated, **TWO_EPOCHS},
        "tokens": {**evaluated, "dataset_name": few, "max_steps": 3, "share_prefix": True}
        | {"precompute_ref_log_probs": False, "max_tokens_per_batch": 60},
    }
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    jobs = {
        name: [*SCRIPT.stem.split(), {**each, "output_dir": str(folder / name)}]
        for name, each in flags.items()
    }
    jobs["pairs"][1] |= sizes
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "tests/script_runs.py"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads((folder / f"results{rank}.json").read_text()) for rank in (0, 1)]
    assert all("error" not in result for each in results for result in each.values()), results
    return folder, flags


def assert_same_curve(first, second):
    assert curve_difference(first, second) <= 1e-4
    assert values(first, "loss") == pytest.approx(values(second, "loss"), abs=1e-5)
    assert worst(first.weights, second.weights) <= 1e-4
    for name in METRICS:
        assert first.metrics[-1][f"eval_{name}"] == pytest.approx(
            second.metrics[-1][f"eval_{name}"], abs=1e-4
        )
    for name in ("num_scored_tokens", "epoch", "learning_rate"):
        assert values(first, name) == values(second, name)


def test_two_ranks_are_one_rank(two_ranks, tmp_path, monkeypatch):
    folder, flags = two_ranks[0] / "pairs", two_ranks[1]["pairs"]
    one, two = run(tmp_path / "one", flags), read_run(folder)
    assert_same_curve(two, one)
    assert values(two, "rewards/margins")[0] == values(one, "rewards/margins")[0] == 0.0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["data"] == one.returned["data"]
    assert worst(kept_reference(folder), kept_reference(tmp_path / "one")) <= 2e-5
    assert metadata_of(folder) == metadata_of(tmp_path / "one")
    # one rank resumes their checkpoint, and takes their reference
    monkeypatch.setattr(dpo_padding_free, "compute_reference", None)
    cut = cut_after(folder, 2, tmp_path / "cut")
    resumed = run(cut, flags, resume_from_checkpoint="latest")
    assert_same_curve(resumed, two)
    assert values(resumed, "loss")[:2] == values(two, "loss")[:2]


def test_two_ranks_with_a_second_model_and_batches_by_tokens(two_ranks, tmp_path):
    two = read_run(two_ranks[0] / "tokens")
    one = run(tmp_path, two_ranks[1]["tokens"], gradient_accumulation_steps=2)
    assert_same_curve(two, one)
    assert any(a - b == 2 for a, b in zip(values(two, "num_tokens"), values(one, "num_tokens")))


# --- 11. Contract ---


def test_what_a_run_leaves_behind(evaluated, tmp_path, capsys):
    done = run(tmp_path, evaluated, eval_steps=2, save_steps=2)
    own = {"step", "epoch", "grad_norm", "learning_rate", "num_tokens", "num_scored_tokens"}
    own |= {"tokens_per_second", "step_seconds", "peak_memory_bytes", *METRICS}
    for line in done.metrics:
        evaluates = line["step"] in (2, 3)  # and at the end
        assert set(line) == own | ({f"eval_{name}" for name in METRICS} if evaluates else set())
        assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert json.loads(json.dumps(done.returned)) == summary
    tokens = sum(values(done, "num_tokens"))
    assert summary["throughput"]["num_tokens"] == tokens
    assert summary["data"]["computed_fraction"] == pytest.approx(tokens / summary["data"]["tokens_kept"])
    assert summary["data"]["eval"]["examples_used"] == 5
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]
    page = capsys.readouterr().out
    assert "read 10  used 10  equal 0" in page and "boundaries_moved 0" in page and "memory ledger" in page


def test_bf16_follows_fp32(base, tmp_path):
    exact, half = run(tmp_path / "fp32", base), run(tmp_path / "bf16", base, bf16=True)
    assert values(half, "logps/chosen") != values(exact, "logps/chosen")
    assert values(half, "logps/chosen") == pytest.approx(values(exact, "logps/chosen"), rel=0.02)
    assert values(half, "loss") == pytest.approx(values(exact, "loss"), rel=0.05)
    assert all(weight.dtype == torch.float32 for weight in half.weights.values())


@pytest.mark.parametrize("change", [{"beta": 0.5}, {"loss_type": "ipo"}, {"label_smoothing": 0.2}])
def test_flags_of_the_loss_change_it(change, base, earlier_run, tmp_path):
    after = run(tmp_path, base, **change)
    assert abs(values(read_run(earlier_run), "loss")[-1] - values(after, "loss")[-1]) > 1e-3


# --- 12. Memory ---


def bytes_of(summary):
    return {row["name"]: row["bytes"] for row in summary["ledger"]}


COUNTED = {
    "shared": {},
    "padded": {"padding_free": False},
    "reference beside": {"precompute_ref_log_probs": False},
    "bf16": {"bf16": True},
    "accumulated": {"gradient_checkpointing": False, "gradient_accumulation_steps": 2},
    "offloaded": {"activation_offloading": True, "gradient_checkpointing": False},
}


@pytest.mark.parametrize("way", COUNTED)
def test_a_dry_run_counts_what_a_step_holds(way, base, tmp_path, monkeypatch):
    """Over the same batches, which in this dataset are all alike."""
    batches, batch = [], Pairs.batch
    monkeypatch.setattr(Pairs, "batch", lambda *args: batches.append(batch(*args)) or batches[-1])
    rows = write_jsonl(tmp_path / "rows.jsonl", [plain("p" * 40, "a" * 30, "b" * 50)] * 8)
    flags = {**base, "dataset_name": rows, "max_length": 256, "max_steps": 2, "measure_memory": True}
    args = Arguments(output_dir=str(tmp_path / "out"), **flags, **COUNTED[way])
    measured = bytes_of(main(args))
    monkeypatch.setattr(dpo_padding_free, "pretend_batch", lambda args: batches[-1])
    pretrained = read_pretrained(base["model_name_or_path"], dropout=False)
    found, moment = dpo_padding_free.pretend_step(args, pretrained)
    assert found.keys() == measured.keys() and moment
    assert found.get("reference", 0) == (measured["parameters"] if way == "reference beside" else 0)
    for name, count in found.items():
        assert count == pytest.approx(measured[name], rel=0.03, abs=2**11), name


@given(
    limits=st.tuples(*[st.none() | st.integers(1, 19)] * 2),
    max_length=st.integers(20, 40),
    way=st.sampled_from([{}, {"share_prompt": False}, {"padding_free": False}]),
)
def test_no_pair_is_larger_than_the_one_that_a_dry_run_counts(limits, max_length, way):
    flags = {"max_prompt_length": limits[0], "max_completion_length": limits[1], "max_length": max_length}
    args = Arguments(per_device_train_batch_size=1, **flags | way)
    most_prompt, most_completion = (limit or max_length for limit in limits)
    pairs = [
        (prompt, completion)
        for prompt in range(1, most_prompt + 1)
        for completion in range(1, min(most_completion, max_length - prompt) + 1)
    ]
    largest = max(p + 2 * c if way == {} else 2 * (p + c) for p, c in pairs)
    assert dpo_padding_free.pretend_batch(args)["input_ids"].numel() == largest


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_budget_of_tokens_is_counted_in_full(share_prompt, monkeypatch):
    limits = {"max_length": 64, "max_prompt_length": 20, "share_prompt": share_prompt}
    for budget in range(200, 300):
        # whole pairs of 107 or 128 tokens, and one of what is left, if it holds a prompt and two completions
        least = (20 if share_prompt else 40) + 2
        counted = dpo_padding_free.pretend_batch(Arguments(max_tokens_per_batch=budget, **limits))
        assert budget - least < counted["input_ids"].numel() <= budget
    monkeypatch.setattr(dpo_padding_free, "pretend_step", lambda args, pretrained: ({"peak": 1}, ""))
    flags = {"dry_run": True, "gpu_memory_gib": 1.0, "max_length": 32, "share_prompt": share_prompt}
    # of lengths whose pair is within the budget: a prompt of one token and two completions of 49, 99 tokens;
    # or two sequences of 50
    assert main(Arguments(max_tokens_per_batch=100, **flags))["longest"] == 50


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
    assert found["shared"]["peak"] < 0.5 * found["padded"]["peak"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"padding_free": False},
        {"gradient_checkpointing": False, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": False, "precompute_ref_log_probs": False, "bf16": True},
    ],
    ids=str,
)
def test_offloading_changes_only_where_activations_wait(changes, evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr("common.offload.MIN_BYTES", 1)
    kept = run(tmp_path / "kept", evaluated, **changes)
    offloaded = run(tmp_path / "offloaded", evaluated, activation_offloading=True, **changes)
    assert_same_bits(kept, offloaded)
    assert kept.metrics[-1]["eval_loss"] == offloaded.metrics[-1]["eval_loss"]
    assert kept.returned["activation_offloading"] is None
    report = offloaded.returned["activation_offloading"]
    assert report["offloaded_bytes"] > 0 and report["peak_host_bytes"] >= report["offloaded_bytes"]
