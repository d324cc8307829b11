"""What AdamW is given of a model, how far down backward runs, and what a resumed run has to freeze again."""

import pytest
import torch
from helpers import documents, gradients, inputs, tiny_model, worst

from common.collators import flatten
from common.flags import Refusal
from common.trained import check_frozen, checkpoint_layers, parameter_groups, trained


def test_matrices_decay_and_norms_and_biases_do_not():
    model = tiny_model("gpt2", "sdpa")
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(names[id(p)] for p in decayed["params"] + kept["params"]) == sorted(names.values())
    for parameter in decayed["params"]:
        assert names[id(parameter)].endswith("weight") and "ln_" not in names[id(parameter)]
    for parameter in kept["params"]:
        assert "ln_" in names[id(parameter)] or names[id(parameter)].endswith("bias")


def test_a_matrix_of_biases_and_a_shard_of_a_matrix():
    model = torch.nn.Module()
    for name in ("gate_up_proj", "gate_up_proj_bias", "shard", "vector"):  # as experts have them
        shape = (2, 3) if "gate" in name else (3,)
        model.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))
    model.shard.ds_shape = (2, 3)
    decayed, kept = (group["params"] for group in parameter_groups(model, 0.1))
    assert {id(p) for p in decayed} == {id(model.gate_up_proj), id(model.shard)}
    assert {id(p) for p in kept} == {id(model.gate_up_proj_bias), id(model.vector)}


def test_what_is_frozen_is_in_no_group():
    model = tiny_model("llama")
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    [group] = parameter_groups(model, 0.1)  # no norm is trained: the fused AdamW gets no empty group
    assert group["params"] == trained(model) == [model.lm_head.weight]
    model.requires_grad_(False).model.norm.requires_grad_(True)
    [group] = parameter_groups(model, 0.1)
    assert group["params"] == [model.model.norm.weight] and group["weight_decay"] == 0.0


@pytest.mark.parametrize("frozen_layers", [0, 1])
def test_backward_ends_where_nothing_below_is_trained(frozen_layers):
    plain, checkpointed = tiny_model("llama").train(), tiny_model("llama").train()
    checkpoint_layers(checkpointed)
    found = []
    for model in (plain, checkpointed):
        for module in (model.get_input_embeddings(), *model.model.layers[:frozen_layers]):
            module.requires_grad_(False)
        in_graph = []
        for module in (model.get_input_embeddings(), *model.model.layers):
            module.register_forward_hook(
                lambda _, __, output, seen=in_graph: seen.append(output.requires_grad)
            )
        row = inputs(flatten(documents(0, [5, 9])))
        model(**row, use_cache=False).logits.logsumexp(-1).sum().backward()
        assert in_graph[:3] == [False, *([False] * frozen_layers + [True, True])[:2]]
        found.append(gradients(model))
    assert worst(*found) <= 1e-5 and len(found[0]) == len(trained(plain))


def test_a_checkpoint_has_to_be_frozen_as_before():
    model, progress = tiny_model("llama"), {"step": 3}
    check_frozen(model, progress)
    assert progress == {"step": 3, "frozen": []}
    model.model.norm.requires_grad_(False)
    with pytest.raises(Refusal, match="model.norm.weight was trained when .* is frozen now"):
        check_frozen(model, progress)
    with pytest.raises(Refusal, match="lm_head.weight was frozen when .* is trained now"):
        check_frozen(model, {"frozen": ["model.norm.weight", "lm_head.weight"]})
    check_frozen(model, {"frozen": ["model.norm.weight"]})
