"""Bytes: what a meter counts of a step, and what a dry run foretells of one."""

import math
import re
from pathlib import Path

import pytest
import torch
from helpers import OneRank, alone_on_the_cpu, documents, freeze_first, inputs, tiny_model, write_jsonl
from safetensors.torch import load_file
from transformers import AutoTokenizer

import sft_packing
from common import Refusal, memory
from common.collators import add_scored, flatten, pad
from common.memory import GIB, ByteCounter, MemoryMeter, format_ledger, ledger, pretend
from common.sharding import Pretrained, read_pretrained, wrap_layers
from sft_packing import Arguments, train_step

CPU = torch.device("cpu")
DEMO = Arguments.model_name_or_path
LENGTHS = [300, 200, 129, 395]
SIZES = {  # 1.0 M parameters
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "head_dim": 32,
    "vocab_size": 261,
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with alone_on_the_cpu(tmp_path_factory.mktemp("cache")) as folder:
        yield folder


# --- The meter ---


def training(padded=False, checkpointing=False, track=True, track_step=1, **sizes):
    """A model with what trains it; a function of micro-batches that takes a measured step; the meter."""
    model = tiny_model("llama", "sdpa" if padded else "varlen", **sizes).train()
    if checkpointing:
        wrap_layers(model, checkpoints=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    meter = MemoryMeter(model, optimizer, CPU, track, track_step)

    def step(*batches):
        with meter.step(batches):
            train_step(model, optimizer, batches, Arguments(), OneRank())

    return model, step, meter


def row(seed, lengths, padded=False, vocab=64):
    sequences = documents(seed, lengths, vocab)
    return add_scored(pad(sequences, 0) if padded else flatten(sequences))


def test_what_the_techniques_save_shows_in_the_measured_bytes():
    found = {}
    for name, ways in {"plain": {}, "flat": {"checkpointing": True}, "padded": {"padded": True}}.items():
        ways = ways | {"checkpointing": name != "plain"}
        model, step, meter = training(track_step=2, **ways, **SIZES)
        for _ in range(2):
            assert "peak" not in meter.measured
            step(row(0, LENGTHS, name == "padded", SIZES["vocab_size"]))
        found[name] = meter.measured
        assert meter.counting and meter.peak_moment.startswith("in ")
    flat, padded, plain = found["flat"], found["padded"], found["plain"]
    num_parameters = sum(p.numel() for p in model.parameters())
    assert {name: flat[name] for name in ("parameters", "gradients")} == dict.fromkeys(
        ("parameters", "gradients"), 4 * num_parameters
    )
    assert flat["optimizer"] == pytest.approx(8 * num_parameters, rel=1e-3)
    assert flat["activations"] < plain["activations"] / 8  # 5 layers' inputs instead of all they save
    assert flat["activations"] < 0.7 * padded["activations"]  # 1,024 tokens instead of 4 * 395
    assert flat["peak"] < 0.8 * padded["peak"] and flat["peak"] < plain["peak"] / 2
    held = sum(flat[name] for name in ("parameters", "optimizer", "activations", "loss_head"))
    assert held < plain["peak"]


def test_one_step_is_measured_and_the_model_is_left_as_it_was():
    model, step, meter = training()
    step(row(0, [5, 3]), row(1, [9, 6]))
    measured = dict(meter.measured)
    assert meter.counting and measured["activations"] > 0 and measured["loss_head"] > 0
    step(row(2, [40]))
    assert not meter.counting and {n: x for n, x in meter.measured.items() if n in measured} == measured
    head = model.get_output_embeddings()
    assert not head._forward_hooks and not head._forward_pre_hooks
    assert not meter.optimizer._optimizer_step_pre_hooks
    with pytest.raises(KeyError), meter.step([row(0, [5])]):
        raise KeyError("within the step")
    assert not head._forward_pre_hooks and meter.tracker is None
    model(**inputs(row(0, [5])), use_cache=False)


@pytest.mark.parametrize("options", [{"track": False}, {"track_step": 3}])
def test_steps_that_are_not_tracked_measure_what_is_held_alone(options):
    _, step, meter = training(**options)
    for seed in (0, 1):
        step(row(seed, [9, 6]))
    assert meter.measured.keys() == {"parameters", "gradients", "optimizer"}
    assert memory.peak_memory_bytes(CPU) > 2**20  # of the process


def test_steps_that_compute_nothing_are_not_measured():
    _, step, meter = training(track_step=2)
    nothing = row(0, [1, 1])  # no token is scored
    step(row(0, [5, 3]))
    step(nothing)
    assert not meter.counting and "peak" not in meter.measured
    step(row(0, [5, 3]))  # the second that computes
    assert meter.counting and meter.measured["peak"] > 0
    step(nothing)
    assert not meter.counting


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


# --- The table ---


def test_the_ledger_as_printed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    rows = ledger({"peak": 2 * GIB, "parameters": GIB // 2, "loss_head": 3 * GIB // 100}, "in a forward")
    assert rows[1] == {
        "name": "loss_head",
        "bytes": 3 * GIB // 100,
        "decided_by": "a chunk's logits, the head's gradient",
        "made_smaller_by": "--loss_chunk_size",
    }
    assert format_ledger("demo  cpu  world 1", rows).splitlines() == [
        "memory ledger  demo  cpu  world 1",
        "                         GiB   decided by                              made smaller by",
        "parameters              0.50   this rank's share of the weights        more ranks",
        "loss head             0.0300   a chunk's logits, the head's gradient   --loss_chunk_size",
        f"peak                    2.00   {'in a forward':<40}what makes that moment's rows smaller",
    ]
    assert "not measured; on a CPU --measure_memory" in format_ledger("x", ledger({"parameters": 1}, ""))
    monkeypatch.setenv("COLUMNS", "80")
    narrow = format_ledger("demo  cpu  world 1", rows).splitlines()
    assert max(map(len, narrow)) <= 80 and len(narrow) == 2 + 2 * 3
    assert narrow[3] == f"{'':<20}smaller by: more ranks"


# --- A dry run ---

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


def counted(args, tmp_path):
    """{name: bytes} of a run's second step, over documents as long as --max_length; every other one is a
    token shorter, or a padded batch would have no mask.
    """
    texts = [{"text": "abcdefgh" * 64}, {"text": "a" * (args.max_length - 2)}] * 8
    args.dataset_name = write_jsonl(tmp_path / "texts.jsonl", texts)
    args.output_dir, args.max_steps, args.measure_memory = str(tmp_path / "run"), 2, True
    return {each["name"]: each["bytes"] for each in sft_packing.main(args)["ledger"]}


def assert_close(found, measured):
    assert found.keys() == measured.keys() and "peak" in found
    for name, count in found.items():
        assert count == pytest.approx(measured[name], rel=0.02, abs=2**14), name


@pytest.fixture(scope="module")
def model(cache):
    """The demo's sizes in three layers, of which offloading moves one."""
    tiny_model("llama", "sdpa", **SIZES | {"num_hidden_layers": 3}).save_pretrained(cache / "model")
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(cache / "model")
    return str(cache / "model")


@pytest.mark.parametrize("way", WAYS)
def test_a_dry_run_foretells_the_bytes_of_a_step(way, model, tmp_path):
    args = Arguments(model_name_or_path=model, max_length=256, check_exact=False, **WAYS[way])
    measured = counted(args, tmp_path)
    found, moment = sft_packing.pretend_step(args, read_pretrained(model, config_only=True))
    assert_close(found, measured)
    assert moment.startswith("in ") and not torch.distributed.is_initialized()


def test_what_waits_on_the_host_is_no_part_of_the_peak(model, tmp_path):
    """Here the host is the device: a real step's peak holds all of it."""
    flags = {"model_name_or_path": model, "max_length": 256, "check_exact": False, "offload_param": True}
    args = Arguments(**flags, bf16=True)
    found, _ = sft_packing.pretend_step(args, read_pretrained(model, config_only=True))
    args.gradient_accumulation_steps = 2
    measured = counted(args, tmp_path)
    outside = 4 * (2 * SIZES["vocab_size"] + 1) * SIZES["hidden_size"]  # embedding, head and a norm
    visit = (measured["parameters"] - outside) // 3  # of one of three layers
    state = sum(measured.pop(name) for name in ("parameters", "gradients", "optimizer"))
    # torch gives each pinned tensor a power of two: weights and their gradients, but not AdamW's moments
    sizes = [4 * weight.numel() for weight in load_file(Path(model) / "model.safetensors").values()]
    pinned = 2 * sum(2 ** math.ceil(math.log2(size)) - size for size in sizes)
    assert pinned > 0.05 * state
    moved = {
        "state_on_host": state + pinned,
        "peak": measured["peak"] - state + visit,
        "visiting_weights": visit + visit // 2,
    }
    assert_close(found, measured | moved)


def test_what_is_frozen_has_neither_gradients_nor_moments(model, tmp_path, monkeypatch):
    args = Arguments(model_name_or_path=model, max_length=256, bf16=True, check_exact=False)
    pretrained = read_pretrained(model, config_only=True)
    all_trained, _ = sft_packing.pretend_step(args, pretrained)
    freeze_first(sft_packing, monkeypatch)
    found, _ = sft_packing.pretend_step(args, pretrained)
    for name in ("gradients", "optimizer"):
        assert found[name] < 0.9 * all_trained[name]
    assert_close(found, counted(args, tmp_path))


def test_a_configuration_is_enough_and_nothing_is_left_behind(tmp_path, capsys, monkeypatch):
    """Of the script, one step is counted; the other counts are made up, or they would take their time."""
    monkeypatch.setenv("COLUMNS", "300")
    folder, tried, pretend_step = tmp_path / "model", [], sft_packing.pretend_step
    folder.mkdir()
    (folder / "config.json").write_bytes((sft_packing.ROOT / "demo/model/config.json").read_bytes())

    def count(args, pretrained):
        tried.append(args)
        if len(tried) == 1:
            return pretend_step(args, pretrained)
        return {"peak": (2**14 * args.max_length + 2**24) // args.dry_run_world_size}, "never"

    monkeypatch.setattr(sft_packing, "pretend_step", count)
    gib = (12 / 1024 + 1 + 1e-9) / 0.95  # of which 12 MiB are left for a step
    flags = {"model_name_or_path": str(folder), "output_dir": str(tmp_path / "out"), "dataset_name": "none"}
    flags |= {"gradient_checkpointing": False, "dry_run_world_size": 2, "gpu_memory_gib": gib}
    found = sft_packing.main(Arguments(**flags, dry_run=True))
    assert not (tmp_path / "out").exists() and not torch.distributed.is_initialized()
    shown, peak = capsys.readouterr().out, {x["name"]: x["bytes"] for x in found["ledger"]}["peak"]
    assert shown.startswith("A step over 2 x 512 tokens takes 0.0") and "of each of 2 GPUs; the peak" in shown
    assert "dry run  world 2" in shown and "single changes" not in shown and found["savings"] == {}
    assert found["fits"] is False and peak > 12 * 2**20 and "It does not fit into" in shown
    assert found["cheapest_set"] == ["--bf16"]  # with whose made-up 12 MiB it does
    assert "Cheapest flags with which it fits: --bf16." in shown
    # with --bf16 all lengths up to 512 fit: 2 * 12 MiB are 2^24 + 2^14 * 512
    assert (found["length_flag"], found["longest"]) == ("max_length", 512)
    assert "Longest --max_length that fits with those: 512." in shown
    assert len(tried) == len({repr(args) for args in tried})  # none is counted twice
    tried.clear()
    del flags["gpu_memory_gib"]
    found = sft_packing.main(Arguments(**flags, dry_run=True))
    assert list(found["savings"].values()) == sorted(found["savings"].values(), reverse=True)
    assert found["savings"]["4 ranks"] == peak - (2**23 + 2**24) // 4
    assert found["cheapest_set"] is found["longest"] is None
    assert re.search(r"saves +0\.\d{4}  --gradient_checkpointing$", capsys.readouterr().out, re.M)


def explored(count, gpu_memory_gib, changes=None, most=1024, capsys=None, **flags):
    args = Arguments(gpu_memory_gib=gpu_memory_gib, dry_run=True, **flags)
    steps = memory.DryRun(args, sft_packing.check_arguments, lambda args: ({"peak": count(args)}, "never"))
    words = {"what": "a row", "host_flags": ["--offload_param"], "length_flag": "max_length", "most": most}
    found = memory.dry_run(steps, changes or {}, {}, **words)
    return found, capsys.readouterr().out


def usable(gib):
    """Of a card of so many GiB, a twentieth and one are left free."""
    return gib * 0.95 - 1


@pytest.mark.parametrize(
    "fitting, longest", [(0, 0), (63, 0), (64, 64), (700, 640), (1023, 960), (1024, 1024)]
)
def test_the_longest_that_fits(fitting, longest, capsys):
    card = (fitting + 1.0001) / 0.95
    assert usable(card) == pytest.approx(fitting, abs=1e-3)
    found, shown = explored(lambda args: args.max_length * GIB, card, max_length=32, capsys=capsys)
    assert (found["longest"], found["fits"]) == (longest, fitting >= 32)
    assert f"Longest --max_length that fits with the flags as they are: {longest or 'none'}" in shown


@pytest.mark.parametrize(
    "peak",
    [
        lambda n: n,
        lambda n: max(30_000, 3 * n),  # first flat
        lambda n: n * n // 8_000,
        lambda n: max(n, 1.01 * n - 10),  # a step of 64 hardly shows
    ],
)
@pytest.mark.parametrize("usable_gib", [64, 30_001, 32_000, 40_000])
def test_the_longest_is_found_in_few_counts(peak, usable_gib):
    tried = []

    def count(args):
        tried.append(args.max_length)
        return {"peak": peak(args.max_length) * GIB}, "never"

    found = memory.DryRun(Arguments(gpu_memory_gib=100, dry_run=True), sft_packing.check_arguments, count)
    found.usable = usable_gib * GIB
    lengths = [*range(64, 40_960, 64), 40_960]
    fitting = [n for n in lengths if peak(n) <= usable_gib]
    assert found.longest("max_length", 40_960, {}) == max(fitting, default=0)
    assert len(tried) <= (6 if peak(100) == 100 else 22)  # halves alone: 11


CHANGES = {
    "--bf16": {"bf16": True},
    "--loss_chunk_size 128": {"loss_chunk_size": 128},
    "--activation_offloading": {"activation_offloading": True},
    "--offload_param": {"offload_param": True},
}


@pytest.mark.parametrize(
    "room, expected",
    [
        (100, None),  # it fits as it is
        (89, ["--bf16"]),
        (70, ["--bf16", "--activation_offloading"]),  # the chunk is not needed
        (69, ["--bf16", "--loss_chunk_size 128", "--activation_offloading"]),
        (42, ["--bf16", "--offload_param"]),  # the dearest that is not needed goes first
        (20, ["--bf16", "--activation_offloading", "--offload_param"]),
        (19, list(CHANGES)),
        (18, None),  # nothing does
    ],
)
def test_the_cheapest_set_of_flags(room, expected, capsys):
    """Each saves what it saves, whatever else is on."""

    def count(args):
        chunk = args.loss_chunk_size is not None
        saved = 11 * args.bf16 + 1 * chunk + 19 * args.activation_offloading + 50 * args.offload_param
        return (100 - saved) * GIB

    found, shown = explored(count, (room + 1.0001) / 0.95, CHANGES, capsys=capsys)
    assert found["fits"] == (room >= 100) and found["cheapest_set"] == expected
    assert ("Cheapest flags" in shown) == (room < 100)
    if room == 18:
        assert "Cheapest flags with which it fits: none." in shown


def test_where_the_state_does_not_fit_the_host_comes_first(capsys):
    """Nothing else is tried before it, and what it makes superfluous is left out."""
    tried = []

    def count(args):
        tried.append(args)
        state = 0 if args.offload_param else 60 * GIB
        return {"parameters": state, "peak": state + (30 - 20 * args.activation_offloading) * GIB}, "never"

    args = Arguments(gpu_memory_gib=(20 + 1.0001) / 0.95, dry_run=True)
    found = memory.DryRun(args, sft_packing.check_arguments, count)
    assert found.cheapest_set(CHANGES, ["--offload_param"]) == ["--activation_offloading", "--offload_param"]
    assert found.helping(CHANGES, ["--offload_param", "--bf16"]) == ["--offload_param"]
    assert all(each.offload_param for each in tried[1:4])
    found.count = lambda args: ({"peak": 1, "state_on_host": 3 * GIB, "on_host": GIB}, "never")
    found.known.clear()
    text = "--offload_param, and 4.00 GiB (4.3 GB) of the host's memory"
    assert found.described(["--offload_param"], CHANGES) == text and found.described(None, CHANGES) == "none"
    sentences = list(memory.answer(found, "a row", CHANGES, ["--offload_param"]))
    assert sentences[1] == "For each GPU, its host's memory holds 4.00 GiB (4.3 GB) more."


def test_what_no_flag_makes_smaller_is_said(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    counts = {"parameters": 20 * GIB, "gradients": 20 * GIB, "optimizer": 40 * GIB, "peak": 90 * GIB}

    def count(args):
        return ({"peak": GIB} if args.offload_param else counts), "in a backward"

    args = Arguments(gpu_memory_gib=80.0, dry_run=True)
    steps = memory.DryRun(args, sft_packing.check_arguments, count)
    # the second one, which changes nothing of the state, is not named
    words = {"host_flags": ["--offload_param", "--bf16"], "length_flag": "max_length", "most": 128}
    memory.dry_run(steps, CHANGES, {}, what="a row", **words)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "A step over a row takes 90.00 GiB (96.6 GB) of one GPU; the peak is in a backward."
    assert lines[1].startswith("It does not fit into 80.00 GiB (85.9 GB), of which 5.0 GiB are left free")
    assert lines[2].startswith("Weights, gradients and optimizer alone take 80.00 GiB (85.9 GB), however")
    assert lines[2].endswith("2 ranks at least, or --offload_param.")


def test_more_ranks_do_not_divide_the_bucket():
    counts = {"optimizer": 120 * GIB, "bucket": 25 * GIB, "peak": 150 * GIB}
    args = Arguments(gpu_memory_gib=(75 + 1.0001) / 0.95, dry_run=True)
    steps = memory.DryRun(args, sft_packing.check_arguments, lambda args: (counts, "never"))
    assert "3 ranks at least." in list(memory.answer(steps, "a row", {}, []))[2]  # 120 / (75 - 25)


def test_a_flag_that_raises_the_peak_is_no_part_of_the_cheapest_set():
    def count(args):
        return {"peak": (100 + 5 * args.bf16 - 10 * (args.loss_chunk_size is not None)) * GIB}, "never"

    args = Arguments(gpu_memory_gib=(92 + 1.0001) / 0.95, dry_run=True)
    found = memory.DryRun(args, sft_packing.check_arguments, count)
    assert found.cheapest_set(CHANGES, []) == ["--loss_chunk_size 128"]


def test_a_model_that_is_not_there_is_refused():
    with pytest.raises(Refusal, match="/nowhere cannot be loaded"):
        sft_packing.main(Arguments(dry_run=True, model_name_or_path="/nowhere"))


def test_a_line_that_reads_a_value_is_named(monkeypatch):
    plain = sft_packing.batch_loss

    def edited(*args):
        nll, metrics = plain(*args)
        print(nll.item())
        return nll, metrics

    monkeypatch.setattr(sft_packing, "batch_loss", edited)
    with pytest.raises(Refusal, match=r"this line reads one .*\n.*test_memory.py:\d+: print\(nll.item\(\)\)"):
        sft_packing.main(Arguments(dry_run=True, max_length=64))
    with pytest.raises(Refusal, match="this line reads one .*\n.*: torch.ones\\(3\\).nonzero"):
        with pretend(Arguments(), sharded=False):
            torch.ones(3).nonzero()


def test_what_a_model_refuses_of_a_flat_row_is_refused_by_a_dry_run():
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "num_hidden_layers": 4}
    config = tiny_model(
        "qwen3_5_text", "eager", linear_key_head_dim=8, linear_value_head_dim=8, **linear
    ).config
    with pytest.raises(
        Refusal, match="Qwen3_5ForCausalLM refuses this run's rows: .*The dry run cannot go on"
    ):
        sft_packing.pretend_step(Arguments(max_length=64), Pretrained("x", config, config))
