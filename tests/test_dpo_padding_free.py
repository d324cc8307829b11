"""DPO without padding: four ways to batch, one loss; a reference that resuming does not move."""

import functools
import math
import re
import shutil
from pathlib import Path

import datasets
import helpers
import numpy as np
import pytest
import torch
from helpers import assert_same_bits, assert_same_curve, read_run, talk, values, worst, write_jsonl
from helpers import preference as plain
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_padding_free
from common.collators import flatten_shared_prompt
from common.folders import list_checkpoints
from common.sharding import read_pretrained
from dpo_padding_free import REFERENCE, TOKENS, Arguments, Pairs, batch_loss, collate, cut_pair, dpo_loss

run = functools.partial(helpers.run, dpo_padding_free)
assert_refused = functools.partial(helpers.assert_refused, dpo_padding_free)
RESUME = {"resume_from_checkpoint": "latest"}
WAYS = {
    "shared": {},
    "padding-free": {"share_prompt": False},
    "padded": {"padding_free": False},
}
LOSS = {"beta": 0.3, "label_smoothing": 0.2}  # not the defaults
NO_LIMITS = {"max_prompt_length": None, "max_completion_length": None, "truncation_mode": "keep_end"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with helpers.alone_on_the_cpu(tmp_path_factory.mktemp("cache")) as folder:
        yield folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    return helpers.small_run(dpo_padding_free, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def base(evaluated):
    return {name: value for name, value in evaluated.items() if name != "eval_dataset_name"}


@pytest.fixture(scope="module")
def earlier_run(base, tmp_path_factory):
    """The folder of a finished run of 3 steps with the checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    run(folder, base, save_steps=1)
    return folder


def load(name, args, tokenizer=None):
    """What load_examples says of a file, with the demo's tokenizer or another one."""
    pretrained = read_pretrained(helpers.DEMO_MODEL)
    pretrained.tokenizer = tokenizer or pretrained.tokenizer
    return dpo_padding_free.load_examples(name, "train", pretrained, args)


def kept_reference(folder):
    return load_file(Path(folder) / REFERENCE)["data"]


# --- 1. Equality ---


@functools.cache
def shared_model(family):
    return helpers.tiny_model(family)


def make_pairs(seed, shapes, max_length=1000):
    """Pairs of random tokens; shapes: lengths of prompt, chosen, rejected, and of their common beginning."""
    pairs = []
    parts = iter(helpers.documents(seed, [n + 1 for shape in shapes for n in shape]))
    for shape in shapes:
        prompt, chosen, rejected, prefix = (next(parts)["input_ids"][:n] for n in shape)
        n = min(len(chosen), len(rejected), len(prefix))
        chosen, rejected = prefix[:n] + chosen[n:], prefix[:n] + rejected[n:]
        pairs.append(cut_pair(prompt, chosen, rejected, {**NO_LIMITS, "max_length": max_length}))
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
    h = LOSS["beta"] * (ratios[0::2] - ratios[1::2])
    loss = -(0.8 * logsigmoid(h) + 0.2 * logsigmoid(-h)).mean()
    loss.backward()
    return {"logps": logps.detach(), "loss": loss.detach(), **helpers.gradients(model)}


def computed(model, pairs, attn_implementation=None, pad_token_id=0, **flags):
    """The same by the script: planned, collated, one step of several micro-batches."""
    sizes = {"per_device_train_batch_size": 3, "loss_chunk_size": 5, "max_grad_norm": 0.0}
    args = Arguments(**sizes, **LOSS, **flags)
    model.set_attn_implementation(attn_implementation or ("varlen" if args.padding_free else "sdpa"))
    some = planned(pairs, args, pad_token_id=pad_token_id)
    some.reference = make_reference(len(pairs)).view(-1, 2)
    batches = list(some.micro_batches(some.in_order(), helpers.OneRank()))
    (_, means), found = helpers.step_by(dpo_padding_free, model, batches, args)
    with torch.no_grad():
        logps = torch.cat(
            [dpo_padding_free.sequence_logps(model, batch, args.loss_chunk_size) for batch in batches]
        )
    return {"logps": logps, "loss": torch.tensor(means["loss"]), **found}


def difference(model, pairs, **flags):
    """The worst difference in a log-probability (relative, it is a sum), the loss or any gradient."""
    found, expected = computed(model, pairs, **flags), naive(model, pairs)
    size = expected.pop("logps")
    return max(worst(found.pop("logps") / size, size / size), worst(found, expected))


lengths = st.integers(1, 9)
SHAPES = [(7, 5, 3, 0), (9, 1, 4, 0), (1, 6, 6, 4), (0, 5, 3, 2), (12, 4, 8, 3), (0, 2, 2, 0), (3, 1, 1, 0)]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=8)
@given(
    seed=st.integers(0, 999),
    shapes=st.lists(st.tuples(lengths, lengths, lengths, st.integers(0, 9)), min_size=1, max_size=4),
    max_length=st.sampled_from([1000, 5]),
)
@example(seed=3, shapes=[(6, 4, 7, 0), (6, 9, 9, 0)], max_length=8)
def test_logps_loss_and_every_gradient_are_those_of_sequences_alone(way, seed, shapes, max_length):
    """Also where keep_end has left different prompts, or none: then the first token is not scored."""
    pairs = make_pairs(seed, shapes, max_length)
    if max_length == 8:
        assert [[len(pair[name]) for name in TOKENS] for pair in pairs] == [[4, 4, 1, 7], [0, 8, 0, 8]]
    assert difference(shared_model("llama"), pairs, **WAYS[way]) <= 1e-5


FAMILIES = [(family, WAYS["shared"]) for family in ("qwen3", "mistral", "gemma3_text", "gpt2")]
FAMILIES += [("mistral", WAYS["padded"]), ("gpt2", WAYS["padded"])]
# a row of whole sequences runs on transformers' own attention as well
FAMILIES += [("gemma3_text", {"share_prompt": False, "attn_implementation": a}) for a in ("sdpa", "eager")]


@pytest.mark.parametrize("family, flags", FAMILIES, ids=str)
def test_every_family_gives_the_naive_gradients(family, flags):
    """Mistral's and Gemma's windows of 4 tokens are shorter than most of these prompts."""
    assert difference(shared_model(family), make_pairs(1, SHAPES), **flags) <= 1e-5


@pytest.mark.parametrize("pad_token_id", [0, 2, 5])
def test_a_padding_id_may_be_any_token(pad_token_id):
    pairs = make_pairs(2, SHAPES)
    for pair in pairs:
        pair["chosen_ids"][-1] = pair["rejected_ids"][-1] = pad_token_id  # as if it ended in EOS
    padded = computed(shared_model("llama"), pairs, pad_token_id=pad_token_id, padding_free=False)
    assert worst(padded, computed(shared_model("llama"), pairs)) <= 2e-5
    found = collate(pairs, Arguments(padding_free=False), pad_token_id)["completion_lengths"]
    assert found.tolist() == [n - (prompt == 0) for prompt, *two, _ in SHAPES for n in two]


@pytest.fixture(scope="module")
def naive_run(evaluated, tmp_path_factory):
    """Padded, with a second model as the reference."""
    flags = {"padding_free": False, "precompute_ref_log_probs": False, "eval_steps": 1}
    return run(tmp_path_factory.mktemp("naive"), evaluated, **flags)


@pytest.mark.parametrize(
    "way, precompute_ref_log_probs", [("shared", True), ("padding-free", True), ("shared", False)]
)
def test_every_run_is_the_naive_run(way, precompute_ref_log_probs, naive_run, evaluated, tmp_path):
    """Steps, reference and evaluation."""
    changes = {**WAYS[way], "precompute_ref_log_probs": precompute_ref_log_probs, "eval_steps": 1}
    assert_same_curve(run(tmp_path, evaluated, **changes), naive_run, tolerance=2e-5)


def test_metrics_and_the_first_update_are_those_of_each_sequence_alone(evaluated, tmp_path):
    """One step on all pairs, against plain formulas and torch's own optimizer, and an evaluation after it."""
    flags = {"per_device_train_batch_size": 10, "weight_decay": 10.0, "max_grad_norm": 0.05}
    done = run(tmp_path, evaluated, **flags)
    [line], before = done.metrics, AutoModelForCausalLM.from_pretrained(evaluated["model_name_or_path"])
    after = AutoModelForCausalLM.from_pretrained(tmp_path)
    train, some = (
        list(load(evaluated[name], Arguments(max_length=64))[0])
        for name in ("dataset_name", "eval_dataset_name")
    )
    logps = naive_logps(before, train)
    ratios = {"": logps - logps.detach()}
    ratios["eval_"] = (naive_logps(after, some) - naive_logps(before, some)).detach()
    for prefix, expected in (("", logps), ("eval_", naive_logps(after, some))):
        assert line[f"{prefix}logps/chosen"] == pytest.approx(expected[0::2].mean().item(), rel=1e-5)
        assert line[f"{prefix}logps/rejected"] == pytest.approx(expected[1::2].mean().item(), rel=1e-5)
        margins = 0.1 * (ratios[prefix][0::2] - ratios[prefix][1::2])
        loss = -logsigmoid(margins).mean()
        assert line[f"{prefix}loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert line[f"{prefix}rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-5)
        assert line[f"{prefix}rewards/accuracies"] == (margins > 0).float().mean().item()
        if not prefix:
            loss.backward()
    weights, norm = helpers.update_plainly(before, 1e-3, 0.05)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.05
    assert worst(done.weights, weights) <= 1e-4


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


def windowless(model):
    model.config.sliding_window = None


def another_norm(model):
    """As if Liger's kernels had been put into a model of another configuration."""
    model.model.norm.variance_epsilon = 1.0


@pytest.mark.parametrize(
    "way, mistake, message",
    [
        (
            "shared",
            second_reads_the_first,
            "row of shared prompts .*Use --no_share_prompt or --no_padding_free",
        ),
        ("shared", second_goes_on_after_the_first, "row of shared prompts "),
        ("shared", windowless, "row of shared prompts "),
        ("padding-free", another_norm, "padding-free row .*Use --no_padding_free"),
        ("padded", another_norm, "padded batch .*Drop --use_liger_kernel"),
    ],
)
def test_the_start_up_proof_finds_it_too(way, mistake, message, base, tmp_path, monkeypatch):
    """Among pairs that share nothing, it looks at those that do; and back as far as a window of 60 tokens, so
    that prompts, of at most 30, are repeated.
    """
    rows = [plain("", "a", "b")] * 2 + helpers.random_preferences(0, 4)
    flags = {**base, **WAYS[way], "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows), "max_steps": 1}
    flags["model_name_or_path"] = helpers.write_model(tmp_path / "model", "mistral", sliding_window=60)
    flags["max_length"], set_kernels = 100, dpo_padding_free.set_kernels

    def set_wrongly(model, *args):
        set_kernels(model, *args)
        mistake(model)

    run(tmp_path / "unchanged", flags)
    if mistake in (windowless, another_norm):
        monkeypatch.setattr(dpo_padding_free, "set_kernels", set_wrongly)
    else:
        change_shared_rows(monkeypatch, mistake)
    assert_refused(tmp_path, flags, f"computes something else in a {message}")
    run(tmp_path / "unproved", flags, check_exact=False)


@pytest.mark.parametrize("way, collator", [("padding-free", "flatten"), ("padded", "pad")])
def test_a_loss_mask_taken_away_is_found(way, collator, monkeypatch):
    original = getattr(dpo_padding_free, collator)

    def scored(sequences, *args):
        return original([{**s, "labels": s["input_ids"]} for s in sequences], *args)

    monkeypatch.setattr(dpo_padding_free, collator, scored)
    with pytest.raises(RuntimeError):  # more scores than the sequences have scored tokens
        difference(shared_model("llama"), make_pairs(4, TWO), **WAYS[way])


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
        return dpo_padding_free.sequence_logps(model, collate(pairs, args), 5).view(-1, 2)


@pytest.mark.parametrize("way", WAYS)
def test_no_other_pair_and_no_other_completion_moves(way):
    before = logps_of(make_pairs(5, SHAPES), **WAYS[way])
    for name, moved in (("chosen_ids", [0]), ("rejected_ids", [1]), ("chosen_prompt_ids", [0, 1])):
        pairs = make_pairs(5, SHAPES)
        pairs[4][name] = [(token + 1) % 64 for token in pairs[4][name]]
        if name == "chosen_prompt_ids":
            pairs[4]["rejected_prompt_ids"] = pairs[4][name]
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
        (("sigmoid", 0.5), "label_smoothing is 0.5"),
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

PLAIN = plain("1+1=", "2", "3")
TALK = talk("hi", "yo", "so")
TALK_TEXT = "<|user|>hi<|end|><|assistant|>yo<|end|><|user|>so<|end|><|assistant|>"
ANSWERS = talk("", "2")[1:], talk("", "3")[1:]


def implicit(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


def test_a_conversation_without_a_prompt_as_it_is_loaded(tmp_path):
    rows = [implicit(TALK + ANSWERS[0], TALK + ANSWERS[1])]
    examples, data = load(write_jsonl(tmp_path / "rows.jsonl", rows), Arguments())
    tokenizer = AutoTokenizer.from_pretrained(helpers.DEMO_MODEL)
    expected = [TALK_TEXT, "2<|end|>", TALK_TEXT, "3<|end|>"]
    assert [tokenizer.decode(examples[0][name]) for name in TOKENS] == expected
    assert data["boundaries_moved"] == 0 and data["examples_used"] == 1


PROMPTS_END = [  # a row; its prompt, chosen and rejected, in which U, A and E stand for the template's tokens
    (PLAIN, ["1+1=", "2E", "3E"]),
    (implicit("1+1=2", "1+1=3"), ["1+1=", "2E", "3E"]),
    (plain(talk("a"), *ANSWERS), ["UaEA", "2E", "3E"]),
    # an answer that both begin with is the prompt's, but not the last one
    (implicit(talk("a", "b"), talk("a", "b", "c", "d")), ["UaEA", "bE", "bEUcEAdE"]),
    # they part at a question: no generation prompt
    (implicit(talk("a", "b", "c", "d"), talk("a", "b", "e", "f")), ["UaEAbE", "UcEAdE", "UeEAfE"]),
    # nothing in common
    (implicit(talk("a", "b"), talk("c", "b")), ["", "UaEAbE", "UcEAbE"]),
    # whole conversations beside their prompt
    (plain(talk("a"), talk("a", "b"), talk("a", "c")), ["UaEA", "bE", "cE"]),
    # a turn that goes on
    (plain(talk("a", "b"), *ANSWERS), ["UaEAb", "2E", "3E"]),
    # one is the other's beginning
    (implicit("ab", "abc"), ["ab", "E", "cE"]),
    # an end that is there
    (implicit("ab<|end|>", "ac"), ["a", "bE", "cE"]),
    # no prompt; no answer
    (plain("", "ab", "ac"), ["", "abE", "acE"]),
    (plain("a", "", "b"), ["a", "E", "bE"]),
]


@pytest.mark.parametrize("row, expected", PROMPTS_END)
def test_where_prompts_end(row, expected):
    tokenizer = AutoTokenizer.from_pretrained(helpers.DEMO_MODEL)
    found = [tokenizer.decode(ids) for ids in dpo_padding_free.tokenize(row, tokenizer)[:3]]
    for letter, token in (("U", "<|user|>"), ("A", "<|assistant|>"), ("E", "<|end|>")):
        found = [text.replace(token, letter) for text in found]
    assert found == expected


def test_the_prompt_ends_where_joint_and_separate_tokenisation_part(tmp_path):
    # together: x ab y and x a y; "ab" holds a piece of the completion, so both completions begin there
    rows, tokenizer = [plain("xa", "by", "y"), plain("x", "a", "y")], helpers.byte_pair_tokenizer()
    assert dpo_padding_free.tokenize(rows[0], tokenizer) == ([1], [5, 4, 0], [2, 4, 0], True)
    _, data = load(write_jsonl(tmp_path / "rows.jsonl", rows), Arguments(), tokenizer)
    assert data["boundaries_moved"] == 1


TO_CUT = [
    plain("p" * 9, "ab", "ac"),  # 12 tokens each
    plain("p" * 9, "a" * 8 + "x", "a" * 8 + "y"),  # 19 each
    plain("p" * 20, "ab", "ac"),  # 23 each
    plain("p", "ab", "ab"),  # equal from the start
    plain("p" * 9, "a", "b" * 6),  # 11 and 16
]
WHOLE = [24, 38, 46, 0, 27]  # tokens of both sequences
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
    assert kept + data["tokens_cut"] == sum(WHOLE[number] for number in examples["example"])


def test_a_thousand_empty_prompts_first(tmp_path):
    """The first rows that datasets writes have no prompt's type to show."""
    rows = [plain("", "a", "b")] * 1001 + [plain("c", "a", "b")]
    examples, data = load(write_jsonl(tmp_path / "rows.jsonl", rows), Arguments())
    assert data["examples_used"] == 1002 and examples[1001]["chosen_prompt_ids"] == [66]  # "c"


# --- 6. Batches by tokens ---


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


# --- 7. Refusals ---

USERS = {"chosen": talk("a", "b"), "rejected": talk("a")}
GUESSED = {"question": "a", "score": 1, "chosen": "b", "rejected": "c"}
BAD = [  # rows of the dataset, or None; flags; what the message says
    ([PLAIN, {**PLAIN, "rejected": None}], {}, "bad.jsonl, example 1: rejected is None"),
    ([USERS], {}, "example 0: rejected ends with a message of role user"),
    ([GUESSED], {}, "have no beginning in common .* the other columns: question, score"),
    ([plain("ab", "abc", "abd")], {}, "in 1 of 1 rows the completion begins with the"),
    ([plain("a", "b", "b")], {}, "no pair whose .* within max_length 64.*'examples_equal': 1"),
    (None, {"max_prompt_length": 64}, "--max_prompt_length 64 leaves no room"),
    (None, {"max_completion_length": 64}, "--max_completion_length 64 leaves no room"),
    (None, {"loss_type": "kto"}, "loss_type is 'kto'; choose one of sigmoid, ipo, hinge"),
    (None, {"max_tokens_per_batch": 99, "per_device_train_batch_size": 2}, "both size a batch"),
    (None, {"attn_implementation": "sdpa"}, "sdpa ignores kv_index"),
    (None, {"dry_run": True, "max_tokens_per_batch": 99}, "a pair may take 127 tokens, over --max_tok"),
    (None, {"max_tokens_per_batch": 12}, "takes .* tokens, over --max_tokens_per_batch 12: raise it"),
]


@pytest.mark.parametrize("rows, flags, message", BAD, ids=lambda value: str(value)[-60:])
def test_what_is_bad_is_refused(rows, flags, message, base, tmp_path):
    if rows:
        flags = {"dataset_name": write_jsonl(tmp_path / "bad.jsonl", rows)}
    assert_refused(tmp_path, {**base, **flags}, message)


def test_a_model_that_mixes_sequences_is_refused_unless_they_are_padded(base, tmp_path):
    """By a convolution that crosses over."""
    model = helpers.write_model(tmp_path / "model", "lfm2", full_attn_idxs=[1])
    flags = {**base, "model_name_or_path": model, "max_steps": 1}
    assert_refused(tmp_path, flags, "something else in a row of shared prompts.* --no_share_prompt")
    assert len(run(tmp_path / "out", flags, padding_free=False).metrics) == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"beta": 0.5}, "its objective and this run's differ. Use its loss_type, beta"),
        ({"loss_type": "hinge"}, "its objective"),
        ({"label_smoothing": 0.1}, "its objective"),
        ({"bf16": True, "max_steps": 4}, "its precision is not this one's"),
        ({"eval_dataset_name": "other", "max_steps": 4}, "its evaluation data is not this one's"),
        ({"model_name_or_path": "other", "max_steps": 4}, "its reference model and this run's differ"),
    ],
    ids=str,
)
def test_resuming_with_another_objective_or_reference_is_refused(flags, message, base, earlier_run, tmp_path):
    """Another model's log-probabilities would be another reference than that of the steps before."""
    others = {"eval_dataset_name": base["dataset_name"]}
    others["model_name_or_path"] = helpers.write_model(tmp_path, initializer_range=0.1)
    flags = {name: others[name] if value == "other" else value for name, value in flags.items()}
    assert_refused(earlier_run, {**base, **RESUME, **flags}, message)


def test_other_tokens_of_any_column_are_other_data():
    def name(*changes):
        pairs = make_pairs(0, [(4, 3, 3, 0), (5, 2, 2, 0)])
        for column in changes:
            pairs[1][column][0] ^= 1
        return planned(pairs, Arguments()).fingerprint()

    assert name() == name() and len({name(), *map(name, TOKENS)}) == 5


def test_a_reference_that_is_not_finite_stops_the_run(base, tmp_path, monkeypatch):
    sequence_logps = dpo_padding_free.sequence_logps
    monkeypatch.setattr(dpo_padding_free, "sequence_logps", lambda *args: sequence_logps(*args) * math.inf)
    with pytest.raises(FloatingPointError, match="log-probabilities of example . are not finite"):
        run(tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


# --- 8. The reference ---

FINGERPRINT = {"model": "m", "data": "d", "precision": "fp32"}


def test_a_kept_reference_is_read_by_its_own_run_alone(tmp_path):
    tensors = {"data": torch.tensor([[-1.5, math.nan], [-3.0, float(2**-20)]])}
    assert dpo_padding_free.read_reference(tmp_path, FINGERPRINT) == {}
    dpo_padding_free.write_reference(tmp_path, tensors, FINGERPRINT)
    found = dpo_padding_free.read_reference(tmp_path, FINGERPRINT)
    assert found.keys() == tensors.keys()
    assert torch.equal(found["data"].nan_to_num(), tensors["data"].nan_to_num())
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


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"max_tokens_per_batch": 80},
        {"share_prompt": False, "bf16": True, "gradient_checkpointing": False},
        {"padding_free": False},
        {"precompute_ref_log_probs": False, "bf16": True},  # a second model, by the same kernels
    ],
    ids=str,
)
def test_a_policy_that_has_not_moved_is_its_reference(changes, evaluated, rows_matter, tmp_path):
    """To the last bit, in all of the first epoch and in every evaluation."""
    done = run(tmp_path, evaluated, learning_rate=0.0, **changes)
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
    for max_steps, pairs in ((1, [order[:4]]), (5, [order[4:8], order[8:]]), (6, [])):
        computed.clear()
        resume = RESUME if max_steps > 1 else {}
        prolonged = run(tmp_path / "prolonged", flags, max_steps=max_steps, save_steps=1, **resume)
        assert computed == pairs
        kept = kept_reference(tmp_path / "prolonged")
        known = ~kept.isnan().any(1)
        assert known.nonzero()[:, 0].tolist() == sorted(order[: min(4 * max_steps, 10)])
        assert torch.equal(kept[known], whole[known])
    assert_same_bits(prolonged, through)


def test_another_reference_is_found(base, earlier_run, tmp_path, monkeypatch):
    """As if a resumed run had computed one from the weights of its checkpoint."""
    through, cut = read_run(earlier_run), helpers.cut_after(earlier_run, 1, tmp_path / "cut")
    other = {"data": kept_reference(cut) + torch.tensor([0.1, 0.0])}
    monkeypatch.setattr(dpo_padding_free, "read_reference", lambda *_: other)
    losses = values(run(cut, base, **RESUME), "loss")
    assert losses[0] == values(through, "loss")[0] and abs(losses[1] - values(through, "loss")[1]) > 1e-3


def test_ranks_that_find_different_files_all_compute(base, rows_matter, tmp_path, monkeypatch):
    """As if another rank had not found what this one has of pair 3."""
    flags = {**base, "lr_scheduler_type": "constant"}
    through = run(tmp_path / "0", flags, num_train_epochs=2, save_steps=3)
    cut = helpers.cut_after(tmp_path / "0", 3, tmp_path / "1")
    computed, all_reduce = computed_pairs(monkeypatch), torch.distributed.all_reduce

    def with_another_rank(tensor, op=torch.distributed.ReduceOp.SUM):
        all_reduce(tensor, op)
        if op == torch.distributed.ReduceOp.MAX:
            tensor[3] = 1

    monkeypatch.setattr(torch.distributed, "all_reduce", with_another_rank)
    resumed = run(cut, flags, num_train_epochs=2, **RESUME)
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


def test_overwriting_replaces_the_whole_run(base, earlier_run, tmp_path):
    folder = shutil.copytree(earlier_run, tmp_path / "run")
    flags = {**base, "overwrite_output_dir": True}
    other = helpers.write_model(tmp_path / "other", initializer_range=0.1)
    again = run(folder, flags, max_steps=3, model_name_or_path=other)
    assert len(again.metrics) == 3 and list_checkpoints(folder) == []
    assert worst(kept_reference(folder), kept_reference(earlier_run)) > 0.1
    run(folder, flags, max_steps=1, precompute_ref_log_probs=False)
    assert not (folder / REFERENCE).exists()


# --- 9. Memory ---

COUNTED = {
    "shared": {},
    "padded": {"padding_free": False, "gradient_accumulation_steps": 2},
    "reference beside": {"precompute_ref_log_probs": False, "bf16": True},
}


@pytest.mark.parametrize("way", COUNTED)
def test_a_dry_run_counts_what_a_step_holds(way, base, tmp_path, monkeypatch):
    """Over the same batches, which in this dataset are all alike."""
    batches, batch = [], Pairs.batch
    monkeypatch.setattr(Pairs, "batch", lambda *args: batches.append(batch(*args)) or batches[-1])
    rows = write_jsonl(tmp_path / "rows.jsonl", [plain("p" * 40, "a" * 30, "b" * 50)] * 8)
    flags = {**base, "dataset_name": rows, "max_length": 256, "max_steps": 2, "measure_memory": True}
    args = Arguments(output_dir=str(tmp_path / "out"), **flags, **COUNTED[way])
    measured = helpers.bytes_of(dpo_padding_free.main(args))
    monkeypatch.setattr(dpo_padding_free, "pretend_batch", lambda args: batches[-1])
    pretrained = read_pretrained(base["model_name_or_path"], dropout=False)
    found, moment = dpo_padding_free.pretend_step(args, pretrained)
    assert found.keys() == measured.keys() and moment
    assert found.get("reference", 0) == (measured["parameters"] if way == "reference beside" else 0)
    for name, count in found.items():
        assert count == pytest.approx(measured[name], rel=0.02, abs=2**11), name


def test_both_models_wait_on_the_host(base):
    flags = {**base, "bf16": True, "precompute_ref_log_probs": False, "max_length": 64}
    pretrained = read_pretrained(base["model_name_or_path"], dropout=False)
    here, there = (
        dpo_padding_free.pretend_step(Arguments(**flags, offload_param=moves), pretrained)[0]
        for moves in (False, True)
    )
    state = sum(here[name] for name in ("parameters", "reference", "gradients", "optimizer"))
    # weights twice, and gradients, in pinned memory
    assert state <= there["state_on_host"] <= state + 3 * here["parameters"]
    assert not {"parameters", "reference"} & there.keys() and there["peak"] < here["peak"] - state / 2


@given(
    limits=st.tuples(*[st.none() | st.integers(1, 19)] * 2),
    max_length=st.integers(20, 40),
    way=st.sampled_from(list(WAYS)),
)
def test_no_pair_is_larger_than_the_one_that_a_dry_run_counts(limits, max_length, way):
    flags = {"max_prompt_length": limits[0], "max_completion_length": limits[1], "max_length": max_length}
    args = Arguments(per_device_train_batch_size=1, **flags | WAYS[way])
    most_prompt, most_completion = (limit or max_length for limit in limits)
    pairs = [
        (prompt, completion)
        for prompt in range(1, most_prompt + 1)
        for completion in range(1, min(most_completion, max_length - prompt) + 1)
    ]
    largest = max(p + 2 * c if way == "shared" else 2 * (p + c) for p, c in pairs)
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
    flags = {"dry_run": True, "gpu_memory_gib": 9.0, "max_length": 32, "share_prompt": share_prompt}
    # of lengths whose pair is within the budget: a prompt of one token and two completions of 49, 99 tokens;
    # or two sequences of 50
    assert dpo_padding_free.main(Arguments(max_tokens_per_batch=100, **flags))["longest"] == 50
