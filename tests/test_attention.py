"""Varlen attention: a flat row gives what each document gives alone, in logits and in gradients."""

import pytest
import torch
from helpers import FAMILIES, VOCAB, WINDOW, documents, gradients, inputs, tiny_model, worst
from torch.nn.functional import log_softmax

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


def row_logits(model, row):
    return model(**inputs(row), use_cache=False).logits[0]


def documents_row():
    """A row; the positions in it whose logits are compared; each sequence alone, and its same positions."""
    sequences = documents(1, LENGTHS)
    return flatten(sequences), slice(None), [(s["input_ids"], slice(None)) for s in sequences]


def shared_row(groups=GROUPS):
    row = flatten_shared_prompt(groups)
    alone = [(prompt + c, slice(len(prompt) - 1, -1)) for prompt, completions in groups for c in completions]
    return row, row["score_index"], alone


def rooted_row():
    """All prompts begin with 20 tokens that stand once."""
    root = documents(7, [20])[0]["input_ids"]
    row, positions, alone = shared_row([(root + prompt, completions) for prompt, completions in GROUPS])
    assert row["input_ids"].shape[1] == shared_row()[0]["input_ids"].shape[1] + 20
    return row, positions, alone


def alone_logits(model, sequences):
    found = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, at] for ids, at in sequences]
    return torch.cat(found)


families = pytest.mark.parametrize("family", FAMILIES)
rows = pytest.mark.parametrize("make_row", [documents_row, shared_row, rooted_row])


# --- Equality with the naive path ---


@rows
@families
def test_logits_and_gradients_are_those_of_each_sequence_alone(family, make_row):
    row, positions, sequences = make_row()
    sdpa, varlen = tiny_model(family, "sdpa"), tiny_model(family)
    logits, expected = row_logits(varlen, row)[positions], alone_logits(sdpa, sequences)
    assert worst(logits, expected) <= TOLERANCE
    # each token weighs differently, and both signs occur, as with advantages
    weights = torch.linspace(-1, 1, len(logits)) / len(logits)
    for each in (logits, expected):
        (weights @ log_softmax(each, -1)[:, ::9]).sum().backward()
    assert worst(gradients(varlen), gradients(sdpa)) <= TOLERANCE


@torch.no_grad()
def test_a_wrong_kv_index_is_seen():
    row, positions, sequences = shared_row()
    model, expected = tiny_model("llama"), alone_logits(tiny_model("llama", "sdpa"), sequences)
    for at in (0, 7, len(row["kv_index"]) - 2):  # a prompt's own keys, a completion's prompt, a completion
        wrong = row["kv_index"].clone()
        wrong[at] = (wrong[at] + 1) % row["input_ids"].numel()
        found = row_logits(model, {**row, "kv_index": wrong})[positions]
        assert worst(found, expected) > 100 * TOLERANCE


@rows
@pytest.mark.parametrize(
    "family, change", [("mistral", None), ("mistral", 1), ("gemma3_text", None), ("gemma3_text", -1)]
)
@torch.no_grad()
def test_a_sliding_window_ignored_or_off_by_one_is_seen(family, change, make_row, monkeypatch):
    real = attention._causal_mask

    def wrong(length_q, length_k, sliding_window, device):
        changed = change and sliding_window and sliding_window + change
        return real(length_q, length_k, changed, device)

    monkeypatch.setattr(attention, "_causal_mask", wrong)
    row, positions, sequences = make_row()
    expected = alone_logits(tiny_model(family, "sdpa"), sequences)
    assert worst(row_logits(tiny_model(family), row)[positions], expected) > 100 * TOLERANCE


# --- Isolation ---


@rows
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # one with windows
@torch.no_grad()
def test_changing_one_sequence_moves_no_other(make_row, family):
    """Of a row of shared prompts, the prompts move their completions: three of these alone are changed."""
    row, model = make_row()[0], tiny_model(family)
    before, bounds = row_logits(model, row), row["cu_seq_lens_q"].tolist()
    segments = list(zip(bounds[:-1], bounds[1:]))
    if make_row is not documents_row:
        above = 1 if make_row is shared_row else 2  # the first prompt, and the root
        segments = segments[above : above + 3]
    for start, stop in segments:
        ids = row["input_ids"].clone()
        ids[0, start:stop] = (ids[0, start:stop] + 1) % VOCAB
        moved = (row_logits(model, {**row, "input_ids": ids}) - before).abs().amax(1)
        assert moved[start:stop].min() > 0
        moved[start:stop] = 0
        assert moved.max() == 0


# --- Refusals; softcap and attention sinks: test_exactness.py, by models that have them ---


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cu_seq_lens_q": None}, "needs cu_seq_lens_q"),
        ({"cu_seq_lens_k": None}, "needs cu_seq_lens_q"),
        ({"attention_mask": torch.zeros(1, 1, 5, 5)}, "leave the mask out"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1]])}, "leave the mask out"),
    ],
)
def test_what_would_be_ignored_is_refused(changes, message):
    row, model = inputs(flatten(documents(0, [3, 2]))), tiny_model("llama")
    model(**row)
    with pytest.raises(Refusal, match=message):
        model(**row | changes)


# --- CUDA: the kernels in bf16 against the loop in fp32 ---

FLASH = pytest.param(
    "flash_attn", marks=pytest.mark.skipif(attention.flash_attn_varlen_func is None, reason="no flash-attn")
)
ROWS = [flatten(documents(5, [70, 1, 33, 128])), flatten_shared_prompt(GROUPS)]


def attend(row, device, dtype, key_heads, sliding_window):
    """Output (1, N, H, D) of one call and the gradients of query, key and value, as fp32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    row = {name: v.to(device) if torch.is_tensor(v) else v for name, v in inputs(row).items()}
    tokens = row["input_ids"].numel()
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
@pytest.mark.parametrize("row", ROWS, ids=["documents", "shared"])
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


def torch_2_13_stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size, enable_gqa=False):
    assert enable_gqa == (q.shape[1] != k.shape[1])
    options = {"softmax_scale": scale, "causal": True, "window_size": window_size}
    return flash_attn_stand_in(q, k, v, cu_q, cu_k, max_q, max_k, **options)


def torch_2_11_stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    return torch_2_13_stand_in(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("kernel", [flash_attn_stand_in, torch_2_11_stand_in, torch_2_13_stand_in])
def test_the_kernels_are_called_with_what_the_cpu_computes(kernel, sliding_window, monkeypatch):
    row = flatten_shared_prompt([([1, 2, 3], [[4, 5], [6, 7, 8, 9]]), ([1], [[2]])])
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 11, 8) for heads in (4, 2, 2))
    options = {"sliding_window": sliding_window, **inputs(row)}
    expected, _ = varlen_attention_forward(None, query, key, value, None, 0.3, **options)
    flash_attn = kernel if kernel is flash_attn_stand_in else None
    monkeypatch.setattr(attention, "flash_attn_varlen_func", flash_attn)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "TAKES_GQA", kernel is torch_2_13_stand_in)
    tensors = [query, key.index_select(2, row["kv_index"]), value.index_select(2, row["kv_index"])]
    offsets = (row["cu_seq_lens_q"], row["cu_seq_lens_k"])
    longest = (row["max_length_q"], row["max_length_k"])
    tensors = [x[0].transpose(0, 1) for x in tensors]
    output = attention._varlen_kernel(*tensors, offsets, longest, 0.3, sliding_window, 0.0)
    assert worst(output, expected[0]) <= 1e-5
