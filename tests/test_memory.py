"""The ledger: what is predicted from the configuration, beside bytes counted one by one."""

import pytest
import torch
import torch.distributed as dist
from helpers import documents, enable_checkpointing, inputs, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig

from common.collators import IGNORE, flatten, pad
from common.logps import head_computes, nll_sum
from common.memory import (
    GIB,
    ByteCounter,
    MemoryMeter,
    format_gib,
    format_ledger,
    format_traffic,
    measure_bandwidth,
    memory_ledger,
    predict_ledger,
    traffic,
)

ROWS = ["parameters", "gradients", "optimizer", "activations", "loss_head", "peak"]
CPU = torch.device("cpu")
LENGTHS = [300, 200, 129, 395]
CHUNK_SIZE = 256
SIZES = {  # 1.0 M parameters
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "head_dim": 32,
    "vocab_size": 261,
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
}


def scored(batch):
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
    positions = (targets != IGNORE).nonzero()[:, 0]
    return positions, targets[positions]


def train_step(model, optimizer, meter, batches):
    with meter.step(batches):
        for batch in batches:
            positions, targets = scored(batch)

            def head(hidden, weight, bias, positions=positions, targets=targets):
                hidden = hidden.flatten(0, 1).index_select(0, positions)
                return nll_sum(hidden, weight, targets, bias=bias, chunk_size=CHUNK_SIZE)

            with head_computes(model, head):
                loss = model(**inputs(batch), use_cache=False).logits / len(targets)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def measure(*, lengths=LENGTHS, padded=False, tied=True, checkpointing=False, micro_batches=1, mesh=None):
    """Two steps, the second of them counted. Returns the predicted and the measured bytes of each row."""
    model = tiny_model("llama", "sdpa" if padded else "varlen", tie_word_embeddings=tied, **SIZES).train()
    if checkpointing:
        enable_checkpointing(model)
    if mesh is not None:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for module in [*model.model.layers, model]:
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    meter = MemoryMeter(model, optimizer, CPU, track=True)
    sequences = documents(0, lengths, SIZES["vocab_size"])
    batch = pad(sequences, 0) if padded else flatten(sequences)
    for _ in range(2):
        assert meter.measured == {}
        train_step(model, optimizer, meter, [batch] * micro_batches)
    predicted = predict_ledger(
        model.config,
        num_tokens=batch["input_ids"].numel(),
        num_scored=len(scored(batch)[1]),
        num_parameters=sum(p.numel() for p in model.parameters()),
        gradient_checkpointing=checkpointing,
        bf16=mesh is not None,
        chunk_size=CHUNK_SIZE,
        rows=len(batch["input_ids"]),
        masked=padded and bool((batch["attention_mask"] == 0).any()),
        accumulates=micro_batches > 1,
    )
    assert list(predicted) == ROWS and meter.measured.keys() == predicted.keys()
    return {name: count for name, (_, count) in predicted.items()}, meter.measured


def check(predicted, measured):
    ratios = {name: predicted[name] / measured[name] for name in ROWS}
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios.values()), ratios
    for name in ("parameters", "gradients", "optimizer"):  # AdamW's step counters are all that is left out
        assert 0.999 <= ratios[name] <= 1.001


# --- Predicted against measured ---


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_flat_rows_in_fp32(checkpointing, micro_batches, tied):
    check(*measure(checkpointing=checkpointing, micro_batches=micro_batches, tied=tied))


@pytest.fixture(scope="module")
def mesh():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_flat_rows_in_bf16_through_fsdp(checkpointing, micro_batches, mesh):
    check(*measure(checkpointing=checkpointing, micro_batches=micro_batches, mesh=mesh))


@pytest.mark.parametrize(
    "lengths, checkpointing, bf16",
    [
        (LENGTHS, True, False),
        (LENGTHS, False, False),
        (LENGTHS, False, True),
        (LENGTHS, True, True),
        ([1000, 500], True, False),
        ([1000, 500], False, False),
    ],
)
def test_padded_batches(lengths, checkpointing, bf16, mesh):
    # the mesh is there for all: a group that is not used changes nothing
    check(*measure(lengths=lengths, padded=True, checkpointing=checkpointing, mesh=mesh if bf16 else None))


def test_what_the_techniques_save_shows_in_the_measured_bytes():
    flat, padded = measure(checkpointing=True)[1], measure(checkpointing=True, padded=True)[1]
    plain = measure()[1]
    assert flat["activations"] < plain["activations"] / 8  # 5 layers' inputs instead of all they save
    assert flat["activations"] < 0.7 * padded["activations"]  # 1,024 tokens instead of 4 * 395
    assert flat["peak"] < 0.8 * padded["peak"] and flat["peak"] < plain["peak"] / 2
    assert flat["parameters"] == padded["parameters"] == plain["parameters"]


# --- The meter ---


def small_training():
    model = tiny_model("llama")
    return model, torch.optim.AdamW(model.parameters())


def test_the_meter_measures_one_step_and_leaves_the_model_as_it_was():
    model, optimizer = small_training()
    meter = MemoryMeter(model, optimizer, CPU, track=True, track_step=1)
    small, large = flatten(documents(0, [5, 3])), flatten(documents(1, [9, 6]))
    train_step(model, optimizer, meter, [small, large])
    measured = meter.measured
    num_parameters = sum(p.numel() for p in model.parameters())
    assert measured["parameters"] == measured["gradients"] == 4 * num_parameters
    assert meter.largest_batch is large
    train_step(model, optimizer, meter, [flatten(documents(2, [40]))])
    assert meter.measured is measured and meter.largest_batch is large  # of the measured step
    head = model.get_output_embeddings()
    assert not head._forward_hooks and not head._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("options", [{}, {"track": True, "track_step": 3}])
def test_steps_that_are_not_tracked_leave_nothing_measured(options):
    model, optimizer = small_training()
    meter = MemoryMeter(model, optimizer, CPU, **options)
    small, large = flatten(documents(0, [5, 3])), flatten(documents(1, [9, 6]))
    train_step(model, optimizer, meter, [large])
    train_step(model, optimizer, meter, [small])
    assert meter.measured == {} and meter.largest_batch is large
    assert meter.peak_bytes() > 2**20  # of the process


def test_steps_that_compute_nothing_are_not_measured():
    model, optimizer = small_training()
    meter = MemoryMeter(model, optimizer, CPU, track=True)
    batch = flatten(documents(0, [5, 3]))
    train_step(model, optimizer, meter, [batch])
    with meter.step([]):
        optimizer.step()
    assert meter.measured == {} and not meter.counting
    train_step(model, optimizer, meter, [batch])  # the second that computes
    assert meter.counting and meter.measured["optimizer"] > 0
    with meter.step([]):
        optimizer.step()
    assert not meter.counting and meter.largest_batch is batch


def test_before_any_step_was_measured_the_peak_is_the_devices(monkeypatch):
    model, optimizer = small_training()
    meter = MemoryMeter(model, optimizer, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 77)
    with meter.step([]):
        optimizer.step()
    assert meter.peak_bytes() == 77


class KeepsBothSummands(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        kept = [grad * 2, grad * 3]
        total = kept[0] + kept[1]
        return total.mul_(kept[0].sum() * kept[1].sum())


@pytest.mark.parametrize("function, grown", [(lambda x: x * 1.0 + x * 2.0, 2), (KeepsBothSummands.apply, 3)])
def test_a_sum_of_gradients_is_made_in_place(function, grown):
    """Autograd's own sums take no third buffer; one whose summands stay alive does."""
    x = torch.ones(1000, 1000, requires_grad=True)
    output = function(x)
    gradient = torch.ones_like(output)
    counter = ByteCounter()
    counter.track_external(x, output, gradient)
    with counter:
        before = counter.get_tracker_snapshot()[CPU]["Total"]
        output.backward(gradient)
    assert counter.peak_bytes(CPU) - before == pytest.approx(grown * x.nbytes, rel=1e-3)


def test_an_error_within_the_step_comes_through_and_removes_the_hooks():
    model, optimizer = small_training()
    meter = MemoryMeter(model, optimizer, CPU, track=True, track_step=1)
    with pytest.raises(KeyError), meter.step([flatten(documents(0, [5]))]):
        raise KeyError("within the step")
    assert meter.measured == {} and not model.get_output_embeddings()._forward_pre_hooks
    model(**inputs(flatten(documents(0, [5]))), use_cache=False)


# --- Predictions without a run ---


def predict(config, **changes):
    options = {"num_tokens": 1000, "num_scored": 1000, "num_parameters": 10**6, "chunk_size": CHUNK_SIZE}
    options |= {"gradient_checkpointing": False, "bf16": False}
    return predict_ledger(config, **{**options, **changes})


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3_moe", "falcon_mamba"])
def test_an_unknown_architecture_is_not_predicted(family):
    assert predict(AutoConfig.for_model(family)) == {}


def test_what_the_prediction_says():
    config = tiny_model("llama", **SIZES).config
    one, two = predict(config), predict(config, world=2)
    assert one["parameters"] == ("fp32   4 P", 4 * 10**6)
    assert one["optimizer"] == ("AdamW  8 P", 8 * 10**6)
    assert two["gradients"] == ("fp32   4 P / W", 2 * 10**6)
    assert one["peak"][0] == "in the last layer's backward"
    checkpointed = predict(config, gradient_checkpointing=True, bf16=True)
    assert checkpointed["activations"][0] == "layer inputs 2 N h L"
    assert checkpointed["activations"][1] < one["activations"][1] / 8


# --- The table ---


def test_ledger_as_printed():
    predicted = {"parameters": ("fp32   4 P", GIB // 2), "loss_head": ("chunk x V", 3 * GIB // 100)}
    rows = memory_ledger(predicted, {"parameters": GIB // 2})
    assert rows[1] == {
        "name": "loss_head",
        "formula": "chunk x V",
        "predicted": 3 * GIB // 100,
        "measured": None,
    }
    assert format_ledger("demo  cpu  world 1", rows).splitlines() == [
        "memory ledger  demo  cpu  world 1                                    predicted   measured   (GiB)",
        "parameters      fp32   4 P                                               0.50       0.50",
        "loss head       chunk x V                                              0.0300          -",
        "P parameters, N tokens of a forward, h hidden size, L layers, V vocabulary, W ranks",
    ]


def test_ledger_with_a_side_missing():
    assert memory_ledger({}, {}) == []
    assert format_ledger("x", []).count("\n") == 0
    (row,) = memory_ledger({}, {"peak": 7})
    assert row == {"name": "peak", "formula": "", "predicted": None, "measured": 7}
    (row,) = memory_ledger({"peak": ("at the loss head", 8)}, {})
    assert row == {"name": "peak", "formula": "at the loss head", "predicted": 8, "measured": None}


def test_gib_keep_enough_digits():
    assert [format_gib(x).strip() for x in (None, GIB, GIB // 4, GIB // 100, 0)] == [
        "-",
        "1.00",
        "0.25",
        "0.0100",
        "0.0000",
    ]
    assert {len(format_gib(x)) for x in (None, GIB, GIB // 100, 12345 * GIB)} == {10}


# --- offloading ---

REPORT = {
    "pretend": False,
    "offloaded_bytes": 3 * 2**20,
    "bytes_per_layer": 2**20,
    "stayed_bytes": {"last layers": 2**20, "small": 2**19},
    "peak_host_bytes": 3 * 2**20,
    "layer_seconds": 0.002,
}


@pytest.mark.parametrize("to_host, hides", [(2**29 + 1, True), (2**29, True), (2**29 - 2**20, False)])
def test_copies_hide_if_they_take_no_longer_than_a_layer(to_host, hides):
    """1 MiB in 2 ms: 2^29 bytes a second."""
    report = {**REPORT, "layer_seconds": 2**-9}
    found = traffic(report, {"to_host": to_host, "to_device": 1})
    assert found["hides"] is hides
    assert found["copy_seconds_per_layer"] == 2**20 / to_host
    assert {**found, **report} == found
    assert f"the copies {'hide' if hides else 'do not hide'}" in format_traffic(found)


def test_the_lines_about_offloading():
    bandwidth = {"to_host": 2.0e9, "to_device": 3.0e9}
    assert format_traffic(traffic(REPORT, bandwidth)).splitlines() == [
        "offloading   3.00 MiB of a forward moved; last layers 1.00, small 0.50 stayed",
        f"{'':13}a layer's 1.00 MiB at 2.0 GB/s take 0.52 ms, its forward takes 2.00 ms: the copies hide",
    ]
    pretend = traffic({**REPORT, "pretend": True}, None)
    assert pretend["hides"] is None and "pretend device" in format_traffic(pretend)
    nothing = {**REPORT, "offloaded_bytes": 0, "bytes_per_layer": 0}
    assert "nothing moved" in format_traffic(traffic(nothing, bandwidth))


def test_bandwidth_is_bytes_per_second():
    found = measure_bandwidth(torch.device("cpu"), num_bytes=2**22)
    assert found.keys() == {"to_host", "to_device"}
    assert all(1e8 < speed < 1e12 for speed in found.values())
