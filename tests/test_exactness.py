"""check_exact passes what computes as transformers does, and sees each way in which a run may not."""

import pytest
import torch
from helpers import FAMILIES, VOCAB, WINDOW, documents, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from common import Refusal, attention
from common.collators import IGNORE, add_scored, flatten, flatten_shared_prompt, pad
from common.exactness import NUM_TOKENS, check_exact, logps_alone, proof_tokens
from common.logps import at_scored, token_logps

LONG = 100  # a window beyond the tokens that a proof without windows looks at
IDS = [each["input_ids"] for each in documents(0, [7, 2, 130, WINDOW + 1])]
PAIR = [([3, 0, 9, 9, 1, 7, 22], [[5, 6, 0, 8, 2, 11], [2, 40]]), ([8], [[1, 2, 3], [50]])]


def row_of(sequences, join=flatten):
    """The batch in which a run would compute these (input_ids, num_scored)."""
    return add_scored(
        join([{"input_ids": x, "labels": [IGNORE] * (len(x) - n) + x[-n:]} for x, n in sequences])
    )


def prove(
    model,
    change=lambda model, batch: None,
    *,
    ids=IDS,
    max_length=200,
    join=flatten,
    attend="varlen",
    **options,
):
    """As the scripts do it: the untouched model, what the run changes, the run's own row.

    Args: change: function of the model and of the run's row, which it may change in place.
    """
    cut = [proof_tokens(each, model.config, max_length) for each in ids]
    sequences = [(each, min(len(each) - 1, NUM_TOKENS)) for each in cut]
    return compare(
        model, sequences, row_of(sequences, join), change, attend, max_length=max_length, **options
    )


def compare(model, sequences, batch, change=lambda model, batch: None, attend="varlen", **options):
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    expected = logps_alone(model, sequences)
    model.set_attn_implementation(attend)
    change(model, batch)
    options = {"bf16": False, "max_length": 200, "what": "in a packed row", "remedy": "Pad.", **options}
    return check_exact(model, expected, lambda: at_scored(model, batch, token_logps_of), **options)


def token_logps_of(hidden, weight, target_ids, bias):
    return token_logps(hidden, weight, target_ids, bias=bias)


def shared_pairs():
    """Rows of shared prompts as DPO and GRPO have them: sequences alone, and the row."""
    sequences = [(prompt + each, len(each)) for prompt, completions in PAIR for each in completions]
    return sequences, flatten_shared_prompt(PAIR)


# --- What passes ---


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "phi"])  # learned positions; a head with a bias
def test_what_computes_the_same_passes(family):
    for join, attend in ((flatten, "varlen"), (lambda rows: pad(rows, 0), "sdpa")):
        for training in (True, False):
            model = tiny_model(family).train(training)
            assert prove(model, join=join, attend=attend) <= 1e-5
            assert model.training == training
    assert compare(tiny_model(family), *shared_pairs()) <= 1e-5


SPARSE = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 48, "attn_temperature_tuning": False}
ARRIVE = {  # windows that reach the attention
    "mistral": {"sliding_window": LONG},
    "gemma3_text": {"sliding_window": LONG},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": LONG},
    "olmo3": {"sliding_window": LONG},
    "cohere2": {"sliding_window": LONG, "logit_scale": 1.0},
    "smollm3": {"use_sliding_window": True, "sliding_window": LONG},
    "qwen2_moe": {**SPARSE, "use_sliding_window": False, "sliding_window": LONG},
}
BY_MASK = {  # that a mask alone would say
    "qwen2_moe": {**SPARSE, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": LONG},
    "phimoe": {"num_local_experts": 4, "sliding_window": LONG},
    "llama4_text": {**LLAMA4, "attention_chunk_size": LONG},
}


@pytest.mark.parametrize("family", ARRIVE)
def test_windows_that_reach_the_attention_pass(family):
    assert prove(tiny_model(family, **ARRIVE[family])) <= 1e-5


@pytest.mark.parametrize("family", BY_MASK)
def test_windows_that_live_in_a_mask_are_seen(family):
    for bf16 in (False, True):  # whose tolerance may be larger than the difference
        with pytest.raises(
            Refusal, match=f"attends within .* {LONG} by a mask, which a flat row lacks. Pad."
        ):
            prove(tiny_model(family, **BY_MASK[family]), max_length=LONG + 2, bf16=bf16)
    # no scored token looks back as far; the mask is there
    assert prove(tiny_model(family, **BY_MASK[family]), max_length=LONG) <= 1e-5
    padded = {"join": lambda rows: pad(rows, 0), "attend": "sdpa"}
    assert prove(tiny_model(family, **BY_MASK[family]), **padded) <= 1e-5


# --- What is seen ---


def one_segment(model, batch):
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = batch["cu_seq_lens_q"][[0, -1]]


def shifted_boundaries(model, batch):
    batch["cu_seq_lens_q"][1:-1] += 1
    batch["cu_seq_lens_k"][1:-1] += 1


def positions_not_reset(model, batch):
    batch["position_ids"] = torch.arange(batch["input_ids"].numel())[None]


def wrong_target(model, batch):
    batch["score_ids"] = batch["score_ids"].roll(1)


def broken_weight(model, batch):
    model.get_output_embeddings().weight.data[3] = torch.nan


def another_activation(model, batch):
    """As Liger's MLP does, which computes silu whatever the configuration says."""
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(
            torch.nn.functional.relu(mlp.gate_proj(x)) * mlp.up_proj(x)
        )


def a_norm_less(model, batch):
    model.model.norm.forward = lambda x: x


SEEN = {
    "one segment": ("llama", {}, one_segment),
    "boundaries one off": ("llama", {}, shifted_boundaries),
    "positions not reset": ("gpt2", {}, positions_not_reset),
    "another token": ("llama", {}, wrong_target),
    "weights broken later": ("llama", {}, broken_weight),
    "an MLP that does not fit": ("llama", {}, another_activation),
    "a norm that does not fit": ("llama", {}, a_norm_less),
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", SEEN)
def test_what_computes_something_else_is_seen(name, bf16):
    family, fields, change = SEEN[name]
    model = tiny_model(family, **fields).train()
    with pytest.raises(Refusal, match="computes something else in a packed row than .* Pad."):
        prove(model, change, bf16=bf16)
    assert model.training


@pytest.mark.parametrize("change", [None, -1])
def test_a_window_ignored_or_one_off_is_seen(change, monkeypatch):
    real, model = attention._causal_mask, tiny_model("mistral", sliding_window=LONG)
    wrong = lambda q, k, window, device: real(q, k, change and window + change, device)  # noqa: E731
    monkeypatch.setattr(attention, "_causal_mask", wrong)
    with pytest.raises(Refusal, match="computes something else"):
        prove(model)


def leak(name):
    """Of a row of shared prompts: completions that read each other, or another prompt."""

    def change(model, batch):
        keys = batch["kv_index"]
        first = batch["cu_seq_lens_k"][2]  # where the second completion's keys begin
        if name == "chosen leaks into rejected":
            keys[first] = 7  # its prompt's first token gives way to the first completion's
        elif name == "another prompt":
            keys[-6] = 0  # in the place of the second prompt, for its first completion
        else:
            batch["position_ids"][0, 7 + 6 :] += 1

    return change


@pytest.mark.parametrize("name", ["chosen leaks into rejected", "another prompt", "positions one off"])
def test_shared_prompts_that_are_wrong_are_seen(name):
    with pytest.raises(Refusal, match="computes something else"):
        compare(tiny_model("llama"), *shared_pairs(), leak(name))


BEHIND = {
    "gemma2": (
        {"final_logit_softcapping": 30.0, "attn_logit_softcapping": None},
        "final_logit_softcapping': 30.0",
    ),
    "granite": ({"logits_scaling": 8.0}, "logits_scaling': 8.0"),
    "cohere": ({"logit_scale": 0.0625}, "logit_scale': 0.0625"),
}


@pytest.mark.parametrize("family", BEHIND)
def test_logits_that_change_behind_the_head_are_seen_and_named(family):
    fields, setting = BEHIND[family]
    model = tiny_model(family, "eager", query_pre_attn_scalar=8, **fields)
    for join, attend in ((flatten, "varlen"), (lambda rows: pad(rows, 0), "eager")):
        with pytest.raises(Refusal, match=f"changes its logits after the output head .*{setting}"):
            prove(model, join=join, attend=attend, bf16=True)  # whatever the tolerance


def test_weights_that_are_not_finite_are_named():
    model = tiny_model("llama")
    model.model.norm.weight.data[3] = torch.inf
    with pytest.raises(Refusal, match="LlamaForCausalLM gives logits that are not finite: its weights are"):
        prove(model)


@pytest.mark.parametrize("bf16", [False, True])
def test_states_that_run_through_the_row_are_seen(bf16):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model("falcon_mamba", vocab_size=VOCAB, initializer_range=0.2, **sizes)
    with pytest.raises(Refusal, match="FalconMambaForCausalLM computes something else"):
        prove(AutoModelForCausalLM.from_config(config), attend=None, bf16=bf16)


def test_a_convolution_over_a_boundary_is_seen_in_bf16():
    """It shows in a document's first tokens alone, and the tolerance is wide."""
    layers = {"layer_types": ["conv", "full_attention"], "block_dim": 32, "conv_dim": 32, "conv_dim_out": 32}
    model = tiny_model("lfm2", full_attn_idxs=None, **layers)
    with pytest.raises(Refusal, match="Lfm2ForCausalLM computes something else"):
        prove(model, bf16=True)


# --- What a model refuses itself ---

REFUSING = {
    "stablelm": ({}, "does not hand keyword arguments on"),  # its layers would not learn of boundaries
    "gemma2": (
        {"query_pre_attn_scalar": 8, "final_logit_softcapping": None},
        "varlen attention does not support softcap",
    ),
    "gpt_oss": (
        {"num_local_experts": 2, "num_experts_per_tok": 1},
        "varlen attention does not support s_aux",
    ),
    "qwen3_5_text": (
        {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_hidden_layers": 4},
        "Qwen3_5ForCausalLM refuses this run's rows: .*packed sequences.* Pad.",
    ),
}


@pytest.mark.parametrize("family", REFUSING)
def test_what_a_model_refuses_is_the_users_to_change(family):
    fields, message = REFUSING[family]
    with pytest.raises(Refusal, match=message):
        prove(tiny_model(family, "eager", **fields))


def test_a_mistake_elsewhere_stays_what_it_is():
    def edited(hidden, weight, target_ids, bias):
        raise ValueError("too many values to unpack")

    model = tiny_model("llama")
    with pytest.raises(ValueError, match="too many values") as raised:
        check_exact(
            model, torch.zeros(1), lambda: edited(0, 0, 0, 0), bf16=False, max_length=9, what="", remedy=""
        )
    assert not isinstance(raised.value, Refusal)


# --- What it costs ---


@pytest.mark.parametrize(
    "window, max_length, length",
    [(None, 10, 10), (None, 500, 64), (100, 500, 164), (100, 120, 120), (100, 100, 64), (100, 64, 64)],
)
def test_the_tokens_of_a_proof(window, max_length, length):
    config = tiny_model("mistral", sliding_window=window).config
    for ids in ([5], list(range(30)), list(range(1000))):
        found = proof_tokens(ids, config, max_length)
        short = window is None or window >= max_length
        assert len(found) == (min(length, len(ids)) if short else length)
        assert found == (ids * length)[: len(found)]
    assert NUM_TOKENS == 64


def test_few_logits_are_made():
    model, seen = tiny_model("mistral", "sdpa", sliding_window=LONG), []
    model.get_output_embeddings().register_forward_hook(lambda _, given, logits: seen.append(logits.shape[1]))
    found = logps_alone(model, [(IDS[2], NUM_TOKENS), (IDS[0], 6)])
    assert seen == [NUM_TOKENS + 1, 7] and found.shape == (NUM_TOKENS + 6,) and not found.requires_grad
