"""The reference on disk: read back as written, and only by a run that it belongs to."""

import pytest
import torch
from helpers import tiny_model

from common.reference import REFERENCE, model_fingerprint, read_reference, write_reference

FINGERPRINT = {"model": "m", "data": "d", "precision": "fp32"}
TENSORS = {"data": torch.tensor([[-1.5, -2.5], [-3.0, float(2**-20)]])}


def test_what_is_written_is_read(tmp_path):
    assert read_reference(tmp_path, FINGERPRINT) == {}
    write_reference(tmp_path, TENSORS, FINGERPRINT)
    assert [path.name for path in tmp_path.iterdir()] == [REFERENCE]
    found = read_reference(tmp_path, FINGERPRINT)
    assert found.keys() == TENSORS.keys() and torch.equal(found["data"], TENSORS["data"])


@pytest.mark.parametrize("other", FINGERPRINT)
def test_that_of_another_run_is_refused(other, tmp_path):
    write_reference(tmp_path, TENSORS, FINGERPRINT)
    message = f"{REFERENCE} belongs to another run: its {other} is not this one's.*remove the file"
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path, {**FINGERPRINT, other: "x"})
    with pytest.raises(ValueError, match="its more is not"):
        read_reference(tmp_path, {**FINGERPRINT, "more": "x"})


def test_equal_weights_have_one_name_and_others_another():
    first, second = tiny_model("llama"), tiny_model("llama", "sdpa")
    assert model_fingerprint(first) == model_fingerprint(second)
    assert model_fingerprint(first) != model_fingerprint(tiny_model("llama", tie_word_embeddings=True))
    with torch.no_grad():
        weight = second.model.norm.weight
        weight[3] = torch.nextafter(weight[3], torch.tensor(2.0))
    assert model_fingerprint(first) != model_fingerprint(second)


def test_the_same_weights_under_another_configuration_or_name_have_another_name():
    name = model_fingerprint(tiny_model("llama"))
    assert model_fingerprint(tiny_model("llama", rms_norm_eps=0.1)) != name
    swapped = tiny_model("llama")
    first, second = (layer.self_attn.q_proj.weight.data for layer in swapped.model.layers)
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)
    assert model_fingerprint(swapped) != name
