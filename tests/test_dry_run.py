"""A dry run's bytes against those counted in a real step over the same batch."""

import pytest

import dpo_padding_free
import sft_packing
from common.dry_run import load_config
from common.memory import MemoryMeter

DEMO = sft_packing.Arguments.model_name_or_path


def measured_step(script, args, monkeypatch):
    """Train for two steps; returns the batch of the step that MemTracker watched, and its bytes."""
    meters = []

    class Kept(MemoryMeter):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            meters.append(self)

    monkeypatch.setattr(script, "MemoryMeter", Kept)
    script.main(args)
    return meters[0].largest_batch, meters[0].measured


WAYS = {
    "packed": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "padding-free": {"packing": False, "per_device_train_batch_size": 4},
    "padded": {"packing": False, "padding_free": False, "per_device_train_batch_size": 4},
    "bf16": {"bf16": True},
    "accumulated": {"gradient_accumulation_steps": 3},
    "sdpa": {"attn_implementation": "sdpa", "gradient_checkpointing": False},
    "offloaded": {"activation_offloading": True, "gradient_checkpointing": False},
    "chunks": {"loss_chunk_size": 32},
}


def assert_close(found, measured):
    assert found.keys() == measured.keys()
    for name, (_, count) in found.items():
        assert count == pytest.approx(measured[name], rel=0.02, abs=2**14), name


@pytest.mark.parametrize("way", WAYS)
def test_sft(way, tmp_path, monkeypatch):
    options = {"max_steps": 2, "output_dir": str(tmp_path), "measure_memory": True, "max_length": 256}
    args = sft_packing.Arguments(**options | WAYS[way])
    batch, measured = measured_step(sft_packing, args, monkeypatch)
    assert_close(sft_packing.pretend_step(args, load_config(DEMO), 1, batch), measured)


DPO_WAYS = {
    "shared": {},
    "padding-free": {"share_prompt": False},
    "padded": {"padding_free": False},
    "reference beside": {"precompute_ref_log_probs": False},
    "bf16": {"bf16": True},
    "no checkpointing, accumulated": {"gradient_checkpointing": False, "gradient_accumulation_steps": 2},
    "offloaded": {"activation_offloading": True, "gradient_checkpointing": False},
}


@pytest.mark.parametrize("way", DPO_WAYS)
def test_dpo(way, tmp_path, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(open(dpo_padding_free.HERE / "demo/preferences.jsonl").readlines()[:16]))
    options = {"max_steps": 2, "output_dir": str(tmp_path / "run"), "measure_memory": True}
    args = dpo_padding_free.Arguments(**options | {"dataset_name": str(data)} | DPO_WAYS[way])
    batch, measured = measured_step(dpo_padding_free, args, monkeypatch)
    assert_close(dpo_padding_free.pretend_step(args, load_config(DEMO), 1, batch), measured)
