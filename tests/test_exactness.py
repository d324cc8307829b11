"""check_exact passes what computes as transformers does, and sees each way in which a run may not."""

from itertools import product

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
PADDED = {"join": lambda rows: pad(rows, 0), "attend": "sdpa"}


def unchanged(model, batch):
    pass


def prove(model, change=unchanged, ids=IDS, max_length=200, join=flatten, **options):
    """As the scripts do it: the untouched model, what the run changes, the run's own row.

    Args: change: function of the model and of the run's row, which it may change in place.
    """
    cut = [proof_tokens(each, model.config, max_length) for each in ids]
    sequences = [(each, min(len(each) - 1, NUM_TOKENS)) for each in cut]
    rows = [{"input_ids": x, "labels": [IGNORE] * (len(x) - n) + x[-n:]} for x, n in sequences]
    return compare(model, sequences, add_scored(join(rows)), change, max_length=max_length, **options)


def prove_shared(model, change=unchanged, **options):
    """The same with a row of shared prompts, as DPO and GRPO have them."""
    sequences = [(prompt + each, len(each)) for prompt, completions in PAIR for each in completions]
    return compare(model, sequences, flatten_shared_prompt(PAIR), change, **options)


def compare(model, sequences, batch, change, attend="varlen", bf16=False, max_length=200):
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    expected = logps_alone(model, sequences)
    model.set_attn_implementation(attend)
    change(model, batch)

    def logps(hidden, weight, target_ids, bias):
        return token_logps(hidden, weight, target_ids, bias=bias)

    options = {"bf16": bf16, "max_length": max_length, "what": "in a packed row", "remedy": "Pad."}
    return check_exact(model, expected, lambda: at_scored(model, batch, logps), **options)


# --- What passes ---


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "phi"])  # learned positions; a head with a bias
def test_what_computes_the_same_passes(family):
    for way in ({}, PADDED):
        for training in (True, False):
            model = tiny_model(family).train(training)
            assert prove(model, **way) <= 1e-5
            assert model.training == training
    assert prove_shared(tiny_model(family)) <= 1e-5


SPARSE = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 48, "attn_temperature_tuning": False}
ARRIVE = {  # windows that reach the attention
    "mistral": {"sliding_window": LONG},
    "gemma3_text": {"sliding_window": LONG},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": LONG},
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
    model = tiny_model(family, **BY_MASK[family])
    message = f"attends within .* {LONG} by a mask, which a flat row lacks. Pad."
    for bf16 in (False, True):  # whose tolerance may be larger than the difference
        with pytest.raises(Refusal, match=message):
            prove(model, max_length=LONG + 2, bf16=bf16)
    # no scored token looks back as far; the mask is there
    for way in ({"max_length": LONG}, PADDED):
        assert prove(model, **way) <= 1e-5


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
        layer.mlp.act_fn = torch.nn.ReLU()


def a_norm_less(model, batch):
    model.model.norm.forward = lambda x: x


def chosen_leaks_into_rejected(model, batch):
    # the second completion's prompt gives way to the first completion
    batch["kv_index"][batch["cu_seq_lens_k"][2]] = 7


def another_prompt(model, batch):
    batch["kv_index"][-6] = 0  # in the place of the second prompt, for its first completion


def positions_one_off(model, batch):
    batch["position_ids"][0, 7 + 6 :] += 1


SEEN = [one_segment, shifted_boundaries, positions_not_reset, wrong_target, broken_weight]
SEEN += [another_activation, a_norm_less]
SHARED = [chosen_leaks_into_rejected, another_prompt, positions_one_off]


@pytest.mark.parametrize("bf16, change", [*product((False, True), SEEN), *product((False,), SHARED)])
def test_what_computes_something_else_is_seen(bf16, change):
    # rotary positions are relative: only learned ones tell
    model = tiny_model("gpt2" if change is positions_not_reset else "llama").train()
    with pytest.raises(Refusal, match="computes something else in a packed row than .* Pad."):
        (prove_shared if change in SHARED else prove)(model, change, bf16=bf16)
    assert model.training


@pytest.mark.parametrize("change", [None, -1])
def test_a_window_ignored_or_one_off_is_seen(change, monkeypatch):
    real, model = attention._causal_mask, tiny_model("mistral", sliding_window=LONG)
    wrong = lambda q, k, window, device: real(q, k, change and window + change, device)  # noqa: E731
    monkeypatch.setattr(attention, "_causal_mask", wrong)
    with pytest.raises(Refusal, match="computes something else"):
        prove(model)


BEHIND = {
    "gemma2": {"final_logit_softcapping": 30.0, "attn_logit_softcapping": None, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
}


@pytest.mark.parametrize("family", BEHIND)
def test_logits_that_change_behind_the_head_are_seen_and_named(family):
    model, (name, value) = tiny_model(family, "eager", **BEHIND[family]), next(iter(BEHIND[family].items()))
    for way in ({}, {**PADDED, "attend": "eager"}):
        with pytest.raises(Refusal, match=f"changes its logits after the output head .*{name}': {value}"):
            prove(model, **way, bf16=True)  # whatever the tolerance


def test_weights_that_are_not_finite_are_named():
    model = tiny_model("llama")
    model.model.norm.weight.data[3] = torch.inf
    with pytest.raises(Refusal, match="LlamaForCausalLM gives logits that are not finite: its weights are"):
        prove(model)


def test_states_and_convolutions_that_run_through_the_row_are_seen():
    """A convolution shows in a document's first tokens alone, and the tolerance of bf16 is wide."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model("falcon_mamba", vocab_size=VOCAB, initializer_range=0.2, **sizes)
    with pytest.raises(Refusal, match="FalconMambaForCausalLM computes something else"):
        prove(AutoModelForCausalLM.from_config(config), attend=None, bf16=True)
    layers = {"layer_types": ["conv", "full_attention"], "block_dim": 32, "conv_dim": 32, "conv_dim_out": 32}
    with pytest.raises(Refusal, match="Lfm2ForCausalLM computes something else"):
        prove(tiny_model("lfm2", full_attn_idxs=None, **layers), bf16=True)


# --- What a model refuses itself ---

LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "num_hidden_layers": 4}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
NOT_SUPPORTED = "varlen attention does not support"
REFUSING = {
    "stablelm": ({}, "does not hand keyword arguments on"),  # its layers would not learn of boundaries
    "gemma2": ({"query_pre_attn_scalar": 8, "final_logit_softcapping": None}, f"{NOT_SUPPORTED} softcap"),
    "gpt_oss": ({"num_local_experts": 2, "num_experts_per_tok": 1}, f"{NOT_SUPPORTED} s_aux"),
    "qwen3_5_text": (LINEAR, "Qwen3_5ForCausalLM refuses this run's rows: .*packed sequences.* Pad."),
}


@pytest.mark.parametrize("family", REFUSING)
def test_what_a_model_refuses_is_the_users_to_change(family):
    fields, message = REFUSING[family]
    with pytest.raises(Refusal, match=message):
        prove(tiny_model(family, "eager", **fields))


def test_a_mistake_elsewhere_stays_what_it_is():
    def edited():
        raise ValueError("too many values to unpack")

    options = {"bf16": False, "max_length": 9, "what": "", "remedy": ""}
    with pytest.raises(ValueError, match="too many values") as raised:
        check_exact(tiny_model("llama"), torch.zeros(1), edited, **options)
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
