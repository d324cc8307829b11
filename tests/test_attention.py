"""Varlen attention: a flat row gives what each document gives alone, in logits and in gradients."""

import pytest
import torch
from helpers import FAMILIES, VOCAB, WINDOW, documents, gradients, inputs, tiny_model, worst
from torch.nn.functional import cross_entropy, log_softmax

from common import Refusal, attention
from common.attention import varlen_attention_forward
from common.collators import flatten, flatten_shared_prompt

TOLERANCE = 1e-5
LENGTHS = [7, 1, WINDOW + 1, 12, WINDOW]
GROUPS = [  # one completion only; more than one; prompts and completions on both sides of the sliding window
    ([3, 0, 9, 9, 1, 7, 22], [[5, 6, 0, 8, 2, 11], [2], [40, 41, 42]]),
    ([8], [[1, 2, 3, 4, 5, 6, 7, 2]]),
    ([13, 14], [[50, 2], [50, 51]]),
]
families = pytest.mark.parametrize("family", FAMILIES)


def row_logits(model, row):
    return model(**inputs(row), use_cache=False).logits[0]


def alone_logits(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def shared_logps(model, row):
    """Log-probabilities of all completion tokens of a shared-prompt row."""
    logits = row_logits(model, row)[row["score_index"]]
    return log_softmax(logits, -1).gather(1, row["score_ids"][:, None])[:, 0]


def separate_logps(model, groups):
    """The same, each prompt + completion a sequence of its own."""
    logps = []
    for prompt, completions in groups:
        for completion in completions:
            logits = alone_logits(model, prompt + completion)[len(prompt) - 1 : -1]
            logps.append(log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(logps)


# --- Equality with the naive path ---


@families
def test_logits_and_gradients_are_those_of_the_documents_alone(family):
    sequences, row = documents(1, LENGTHS), flatten(documents(1, LENGTHS))
    sdpa, varlen = tiny_model(family, "sdpa"), tiny_model(family)
    expected = torch.cat([alone_logits(sdpa, s["input_ids"]) for s in sequences])
    logits = row_logits(varlen, row)
    assert worst(logits, expected) <= TOLERANCE
    for each in (logits, expected):
        cross_entropy(each[:-1], row["labels"][0, 1:]).backward()
    assert worst(gradients(varlen), gradients(sdpa)) <= TOLERANCE


@families
def test_shared_prompts_are_exact_in_log_probabilities_and_gradients(family):
    sdpa, varlen = tiny_model(family, "sdpa"), tiny_model(family)
    expected, logps = separate_logps(sdpa, GROUPS), shared_logps(varlen, flatten_shared_prompt(GROUPS))
    assert worst(logps, expected) <= TOLERANCE
    # each token weighs differently, and both signs occur, as with advantages
    weights = torch.linspace(-1, 1, len(logps)) / len(logps)
    (weights @ expected).backward()
    (weights @ logps).backward()
    assert worst(gradients(varlen), gradients(sdpa)) <= TOLERANCE


@torch.no_grad()
def test_a_wrong_kv_index_is_seen():
    model, row = tiny_model("llama"), flatten_shared_prompt(GROUPS)
    expected = separate_logps(tiny_model("llama", "sdpa"), GROUPS)
    for at in (0, 7, len(row["kv_index"]) - 2):  # a prompt's own keys, a completion's prompt, a completion
        wrong = row["kv_index"].clone()
        wrong[at] = (wrong[at] + 1) % row["input_ids"].numel()
        assert worst(shared_logps(model, {**row, "kv_index": wrong}), expected) > 100 * TOLERANCE


# --- Isolation ---


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # one with windows
@torch.no_grad()
def test_changing_one_sequence_moves_no_other(shared, family):
    """Of a row of shared prompts, the prompt moves its completions: they alone are changed."""
    row = flatten_shared_prompt(GROUPS) if shared else flatten(documents(2, LENGTHS))
    model, bounds = tiny_model(family), row["cu_seq_lens_q"].tolist()
    before = row_logits(model, row)
    segments = list(zip(bounds[:-1], bounds[1:]))
    for start, stop in segments[1:4] if shared else segments:
        ids = row["input_ids"].clone()
        ids[0, start:stop] = (ids[0, start:stop] + 1) % VOCAB
        moved = (row_logits(model, {**row, "input_ids": ids}) - before).abs().amax(1)
        assert moved[start:stop].min() > 0
        moved[start:stop] = 0
        assert moved.max() == 0


# --- Sliding windows ---


@pytest.mark.parametrize(
    "family, change", [("mistral", None), ("mistral", 1), ("gemma3_text", None), ("gemma3_text", -1)]
)
@torch.no_grad()
def test_a_sliding_window_ignored_or_off_by_one_is_seen(family, change, monkeypatch):
    real = attention._causal_mask

    def wrong(length_q, length_k, sliding_window, device):
        if sliding_window is not None:
            sliding_window = None if change is None else sliding_window + change
        return real(length_q, length_k, sliding_window, device)

    sequences, sdpa, varlen = documents(0, LENGTHS), tiny_model(family, "sdpa"), tiny_model(family)
    monkeypatch.setattr(attention, "_causal_mask", wrong)
    alone = torch.cat([alone_logits(sdpa, s["input_ids"]) for s in sequences])
    assert worst(row_logits(varlen, flatten(sequences)), alone) > 100 * TOLERANCE
    shared = shared_logps(varlen, flatten_shared_prompt(GROUPS))
    assert worst(shared, separate_logps(sdpa, GROUPS)) > 100 * TOLERANCE


# --- Refusals ---


def call(**changes):
    row = flatten(documents(0, [3, 2]))
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    arguments = {"attention_mask": None, "cu_seq_lens_q": row["cu_seq_lens_q"], **changes}
    arguments.setdefault("cu_seq_lens_k", row["cu_seq_lens_k"])
    return varlen_attention_forward(torch.nn.Module(), query, key, key, **arguments)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cu_seq_lens_q": None}, "needs cu_seq_lens_q"),
        ({"cu_seq_lens_k": None}, "needs cu_seq_lens_q"),
        ({"attention_mask": torch.ones(1, 1, 5, 5, dtype=torch.bool)}, "leave the mask out"),
        ({"softcap": 50.0}, "does not support softcap, which Module"),
        ({"s_aux": torch.zeros(4)}, "does not support s_aux, which Module"),
    ],
)
def test_refuses_what_would_be_ignored(changes, message):
    output, weights = call()
    assert output.shape == (1, 5, 4, 8) and weights is None
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 1, 5, 5), torch.tensor([[1, 0, 1, 1, 1]])], ids=str)
def test_models_run_into_the_refusals(mask):
    row = inputs(flatten(documents(0, [3, 2]))) | {"attention_mask": mask}
    with pytest.raises(Refusal, match="needs cu_seq_lens_q" if mask is None else "leave the mask out"):
        tiny_model("llama")(**({"input_ids": row["input_ids"]} if mask is None else row))


# --- CUDA: the kernels in bf16 against the loop in fp32 ---

FLASH = pytest.param(
    "flash_attn", marks=pytest.mark.skipif(attention.flash_attn_varlen_func is None, reason="no flash-attn")
)
ROWS = {"documents": flatten(documents(5, [70, 1, 33, 128])), "shared": flatten_shared_prompt(GROUPS)}


def attend(row, device, dtype, key_heads, sliding_window):
    """Output (1, N, H, D) of one call and the gradients of query, key and value, as fp32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    row = {name: v.to(device) if torch.is_tensor(v) else v for name, v in inputs(row).items()}
    tokens = row.pop("input_ids").numel()
    del row["position_ids"]
    # rounded to bf16 first: both sides compute on the same numbers
    tensors = [
        torch.randn(1, heads, tokens, 32, generator=generator).bfloat16().to(device, dtype).requires_grad_()
        for heads in (4, key_heads, key_heads)
    ]
    output, _ = varlen_attention_forward(
        torch.nn.Module(), *tensors, None, scaling=0.2, sliding_window=sliding_window, **row
    )
    (output.float() * torch.linspace(-1, 1, 32, device=device)).sum().backward()
    return [x.detach().float().cpu() for x in (output, *(t.grad for t in tensors))]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["torch", FLASH])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("sliding_window", [None, WINDOW])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_kernel_is_as_close_to_fp32_as_bf16_allows(kernel, key_heads, sliding_window, row, monkeypatch):
    if kernel == "torch":
        monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    exact = attend(row, "cpu", torch.float32, key_heads, sliding_window)
    naive = attend(row, "cpu", torch.bfloat16, key_heads, sliding_window)
    found = attend(row, "cuda", torch.bfloat16, key_heads, sliding_window)
    for x, rounded, expected in zip(found, naive, exact):
        assert worst(x, expected) <= 2 * worst(rounded, expected) + 2**-8 * expected.abs().max()


@pytest.mark.gpu
@families
@torch.no_grad()
def test_fp32_on_cuda_runs_the_loop(family):
    row = flatten(documents(0, LENGTHS))
    expected = row_logits(tiny_model(family), row)
    on_cuda = {name: v.cuda() if torch.is_tensor(v) else v for name, v in row.items()}
    assert worst(row_logits(tiny_model(family).cuda(), on_cuda).cpu(), expected) <= 1e-4


# --- what the CUDA kernels are called with, checked on the CPU by stand-ins with their signatures ---


def flash_attn_stand_in(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, **rest
):
    """flash_attn_varlen_func written plainly: (N, H, D), grouped heads, masks aligned bottom-right."""
    window_size = rest.pop("window_size", (-1, -1))
    assert rest == {"causal": True} and dropout_p == 0.0 and window_size[1] == 0
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    outputs = []
    for i in range(len(cu_seqlens_q) - 1):
        queries = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
        keys, values = (x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]] for x in (k, v))
        distance = torch.arange(len(queries))[:, None] + len(keys) - len(queries) - torch.arange(len(keys))
        seen = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * softmax_scale
        scores = scores.masked_fill(~seen, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outputs)


def torch_2_13_stand_in(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    options = {"softmax_scale": scale, "causal": True, "window_size": window_size}
    return flash_attn_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)


def torch_2_11_stand_in(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] == key.shape[1]
    options = {"scale": scale, "window_size": window_size, "enable_gqa": False}
    return torch_2_13_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)


@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("kernel", ["flash_attn", torch_2_11_stand_in, torch_2_13_stand_in])
def test_the_kernels_are_called_with_what_the_cpu_computes(kernel, sliding_window, monkeypatch):
    row = flatten_shared_prompt([([1, 2, 3], [[4, 5], [6, 7, 8, 9]]), ([1], [[2]])])
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 11, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 8)
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    bounds = {name: row[name] for name in names}
    options = {"sliding_window": sliding_window, "kv_index": row["kv_index"], **bounds}
    expected, _ = varlen_attention_forward(None, query, key, value, None, 0.3, **options)
    if kernel == "flash_attn":
        monkeypatch.setattr(attention, "flash_attn_varlen_func", flash_attn_stand_in)
    else:
        monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    keys_and_values = (x[0].index_select(1, row["kv_index"]).transpose(0, 1) for x in (key, value))
    offsets, longest = (bounds[names[0]], bounds[names[1]]), (bounds[names[2]], bounds[names[3]])
    rest = (offsets, longest, 0.3, sliding_window, 0.0)
    output = attention._varlen_kernel(query[0].transpose(0, 1), *keys_and_values, *rest)
    assert worst(output, expected[0]) <= 1e-5
