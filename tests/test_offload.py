"""Activation offloading on the pretend device: exact, freed for real, gone after each step."""

import gc
import weakref
from collections import Counter, namedtuple
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import FAMILIES, documents, enable_checkpointing, gradients, inputs, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from common.collators import flatten
from common.offload import OffloadActivations

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_size_is_small(monkeypatch):
    monkeypatch.setattr("common.offload.MIN_BYTES", 1)


def offloader(kind=OffloadActivations, model=None, layers=None):
    """Without layers, whatever is saved counts as saved by the first of two: it moves."""
    return kind(model or torch.nn.Module(), layers or [torch.nn.Identity(), torch.nn.Identity()], CPU)


def of_model(model):
    return OffloadActivations(model, model.model.layers, CPU)


def leaf(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_()


# --- Rule 1: storages, not tensors ---


def views(x, w):
    """q, k and v are three products that save the same input; other views have strides and offsets."""
    products = sum((x @ w[i]).square().sum() for i in range(3)) + (x.T @ x).square().sum()
    gate, up = (x @ w[0]).chunk(2, dim=-1)
    strided = x[::2, ::3] * x.flatten()[1::2].view(3, 4)[:, :2] + x[2:5, 1:3].exp() * x[1:4, 2:4]
    return products + (gate.sigmoid() * up).sum() + (x.sum(0).expand(6, 4) * x).sin().sum() + strided.sum()


def kinds(x, w):
    z = torch.view_as_complex(x.view(6, 2, 2) * 1)
    mixed = (x.bfloat16() * x.double()[:, :1]).float().exp().tanh().sum()
    masked = x.masked_fill(x > 0, 0.5).where(x < 1, x.square()).exp().sum()
    return mixed + masked + (z * z.conj() * (1 + 2j)).real.square().sum()


def checkpointed(x, w, use_reentrant=False):
    for _ in range(3):  # a region inside must not hide tensors from the checkpoint
        x = checkpoint(lambda x: x.sin().exp().sin().tanh() * x, x, use_reentrant=use_reentrant)
    return x.sum()


def differentiated_twice(x, w):
    [grad] = torch.autograd.grad(x.exp().sin().sum(), x, create_graph=True)
    return grad.square().sum()


def changed_unseen(x, w):
    h = x * 2
    unused = h.square().mean()
    h += 1
    return h.exp().sum() + 0 * unused.detach()


COMPUTATIONS = [views, kinds, checkpointed, differentiated_twice, changed_unseen]
COMPUTATIONS += [partial(checkpointed, use_reentrant=True)]


def compute(function, offload=None, inside=False, order=(0,), retain=False):
    """Gradients of function(x, w): a forward for each of `order`, then their backwards in that order."""
    x, w = leaf(6, 4), leaf(3, 4, 4, seed=1)
    losses = []
    for i in range(len(order)):
        with offload or nullcontext():
            losses.append(function(x * (1.5 + i), w * 0.5))  # what it saves is no leaf
            if inside:
                losses[0].backward()
    for i in () if inside else order:
        if retain:
            losses[i].backward(retain_graph=True)
        losses[i].backward()
    if offload:
        losses.clear()
        offload.end_step()
    return x.grad, w.grad


@pytest.mark.parametrize("way", [{}, {"inside": True}, {"retain": True}, {"order": (1, 2, 0)}], ids=str)
@pytest.mark.parametrize("function", COMPUTATIONS, ids=lambda f: getattr(f, "__name__", "reentrant"))
def test_gradients_are_bit_equal(function, way):
    offload, expected = offloader(), compute(function, **way)
    for _ in range(2):  # the second time with a slab
        found = compute(function, offload, **way)
        assert all(f is e is None or torch.equal(f, e) for f, e in zip(found, expected))
    assert offload.moved_bytes > 0


def test_a_storage_goes_and_comes_back_once_and_its_memory_is_free_between():
    offload, copied = offloader(), []
    copy = offload._copy
    offload._copy = lambda *args: copied.append(1) or copy(*args)
    with offload:
        h = leaf(6, 4) * 1.5
        loss = h.sin().sum() + sum((h[:1] @ leaf(4, 4, seed=i)).sum() for i in range(3))
    freed = weakref.ref(h.untyped_storage())
    assert freed() is not None
    del h
    assert freed() is None
    assert len(copied) == len(offload.live) == 4  # h and three weights
    loss.backward(retain_graph=True)
    assert len(copied) == 8
    assert all(copy.on_device is None for copy in offload.live)
    del loss
    offload.end_step()


def test_a_changed_storage_is_copied_again():
    """y.add_ between two saves: the first save has the old values, the second one the new ones."""
    x, offload = leaf(6, 4), offloader()
    with offload:
        y = x * 1
        first = y.square()
        offload._give_back(offload.group + 1)  # the first copy is done
        y.add_(1)
        second = y.square()
    (first + second).sum().backward()
    assert torch.allclose(x.grad, 2 * x + 2 * (x + 1))


@pytest.mark.parametrize("min_bytes", [1, 10**6], ids=["moved", "stayed"])
def test_a_change_in_place_is_refused_in_backward(min_bytes, monkeypatch):
    monkeypatch.setattr("common.offload.MIN_BYTES", min_bytes)
    with offloader():
        y = leaf(6, 4) * 1
        loss = y.square().sum()
        y.add_(1)
    with pytest.raises(RuntimeError, match="changed in place after it was saved"):
        loss.backward()


# --- Rules 2 and 3: what stays ---


def test_weights_buffers_and_their_views_stay():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6).eval(), torch.nn.Linear(6, 4))
    offload = offloader(model=model)
    with offload:
        loss = (model(leaf(5, 4)) @ model[0].weight[1:3].T).square().sum()
        weights = {t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
        assert offload.in_flight and not any(storage in weights for storage in offload.copies)
    loss.backward()


def test_a_weight_may_lose_its_values_between_forward_and_backward():
    """ZeRO-3 takes them away after a forward, and brings them again for the backward."""
    x, weight = leaf(6, 4), torch.nn.Parameter(leaf(4).detach())
    whole, offload = weight.data, offloader()
    with offload:
        loss = (x * weight).sum()
    gone = weakref.ref(whole.untyped_storage())
    weight.data, values = torch.empty(0), whole.clone()
    del whole
    assert gone() is None
    weight.data = values
    loss.backward()
    assert torch.equal(x.grad, values.expand(6, 4))


def test_small_storages_integers_and_what_is_elsewhere_stay_and_masks_move(monkeypatch):
    monkeypatch.setattr("common.offload.MIN_BYTES", 100)
    x, offload = leaf(6, 4), offloader()
    with offload:
        stayed = [(x * 2).exp(), torch.nn.functional.embedding(torch.arange(9).repeat(99), leaf(9, 4))]
        elsewhere = torch.randn(60, 4, device="meta", requires_grad=True).exp()
        assert not offload.copies
        large = leaf(60, 4) * 1
        seen_in_part = large[:1].exp().sin().sum() + large[:1].square().sum()
        assert offload.moved_bytes == 960
        filled = (leaf(60, 4) * 2).masked_fill(torch.ones(60, 4, dtype=torch.bool), 0.0)
        assert offload.moved_bytes == 960 + 240
    sum(t.sum() for t in (*stayed, seen_in_part, filled)).backward()
    elsewhere.sum().backward()


def test_what_the_last_layer_the_head_and_a_kept_region_save_stays():
    layers = [torch.nn.Tanh() for _ in range(3)]  # each saves its output
    model = torch.nn.Sequential(*layers)
    offload, in_flight, loaded = offloader(model=model, layers=layers), [], []

    def count_loaded(_):  # when backward comes to this layer
        loaded.append(sum(copy.on_device is not None for copy in offload.live))

    layers[1].register_forward_hook(lambda module, args, output: output.register_hook(count_loaded) and None)
    layers[2].register_forward_pre_hook(lambda *_: in_flight.append(len(offload.in_flight)))
    with offload:
        for forward in (1, 2):  # two forwards in one region are two forwards
            loss = model(leaf(6, 4) * 1).exp().sin().sum()
            assert offload.moved_bytes == forward * 2 * 96
    loss.backward()
    assert in_flight == [1, 1] and loaded == [1]  # a copy has the next layer's time, there and back
    assert offload.report()["offloaded_bytes"] == 4 * 96


def test_what_a_node_saves_of_its_own_output_is_no_cycle(monkeypatch):
    """A kept tensor packed as itself would be: tensor -> node -> saved tensor -> tensor."""
    monkeypatch.setattr("common.offload.MIN_BYTES", 10**6)  # what is saved stays
    gc.disable()
    try:
        with offloader():
            y = leaf(6, 4).exp()
        freed = weakref.ref(y.untyped_storage())
        del y
        assert freed() is None
    finally:
        gc.enable()


def test_a_model_of_one_layer_has_nothing_to_offload():
    with pytest.raises(ValueError, match="nothing to move: of 1 decoder layers the last one keeps"):
        of_model(tiny_model("llama", num_hidden_layers=1))


# --- Rule 5: a step leaves nothing ---


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_a_graph_that_outlives_its_step_is_refused(error):
    """Here without a backward; an exception in forward leaves the offloader usable."""
    offload = offloader()
    with pytest.raises(error) if error else nullcontext(), offload:
        held = leaf(6, 4).exp().sin()
        if error:
            raise error
    assert not offload.in_flight
    with pytest.raises(RuntimeError, match=r"1 host copies, 96 bytes, outlive the step.*Drop its loss first"):
        offload.end_step()
    del held
    offload.end_step()
    assert torch.equal(compute(views, offload)[0], compute(views)[0])


def test_the_slab_is_sized_by_the_first_step_and_grows():
    offload, largest = offloader(), 0
    for rows, in_slab, reported in ((9, False, 9), (6, True, 9), (90, False, 90), (9, True, 90)):
        with offload:
            loss = (leaf(rows, 4) * 2).exp().sin().cos().sum()  # saves the outputs of exp and of sin
            slab = offload.host.slab.untyped_storage().data_ptr()
            assert [copy.host.untyped_storage().data_ptr() == slab for copy in offload.live] == [in_slab] * 2
        loss.backward()
        offload.end_step()
        needed = 2 * -(-rows * 16 // 512) * 512
        largest = max(largest, needed)
        assert offload.step_host_bytes == needed
        report = offload.report()
        assert len(offload.host.slab) == report["peak_host_bytes"] == largest
        assert report["offloaded_bytes"] == 2 * reported * 16


# --- Models ---


def make_row(seed=0, lengths=(5, 9, 3)):
    return flatten(documents(seed, lengths))


def loss_of(model, row):
    """The sum of the scored tokens' negative log-likelihoods, with the labels' shift."""
    logits = model(**inputs(row), use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits[0, :-1], row["labels"][0, 1:], reduction="sum")


def train(model, offload=None, accumulate=1, inside=False, rows=make_row):
    """Loss and gradients of each of three steps; inside: backward within the region."""
    found = []
    for step in range(3):
        for i in range(accumulate):
            with offload or nullcontext():
                loss = loss_of(model, rows(accumulate * step + i))
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            loss = loss.detach()
        if offload:
            offload.end_step()
        found.append({**gradients(model), "loss": loss})
    return found


def make_model(checkpointing, family="llama", dtype=torch.float32, device=CPU, **fields):
    model = tiny_model(family, **fields).to(device, dtype).train()
    if checkpointing:
        enable_checkpointing(model)
    return model


def assert_same_bits(found, expected):
    for f, e in zip(found, expected, strict=True):
        assert f.keys() == e.keys()
        assert all(torch.equal(f[name], e[name]) for name in e)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_moves_is_off_the_device_after_forward(family, checkpointing):
    model = make_model(checkpointing, family, torch.bfloat16)
    offload, layer_input = of_model(model), 17 * 32 * 2  # of two layers
    with offload:
        loss = loss_of(model, make_row())
    left = sum(storage.nbytes() for storage in offload.copies)  # of what moved, still on the device
    assert offload.live and left <= 2 * 17 * 8 * 2  # rotary tables: the last layer keeps them
    moved = offload.moved_bytes
    assert moved == layer_input if checkpointing else moved > 10 * layer_input
    loss.backward()


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_fsdp_gathers_stay(tied, checkpointing):
    """Sharded or not, the same bytes move. bf16 makes FSDP2 gather even a group of one into new storages."""
    moved = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for sharded in (False, True):
            dtype = torch.float32 if sharded else torch.bfloat16
            model = make_model(checkpointing, dtype=dtype, num_hidden_layers=3, tie_word_embeddings=tied)
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            for part in (*model.model.layers, model) if sharded else ():
                fully_shard(part, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
            offload = of_model(model)
            train(model, offload)
            moved.append(offload.moved_bytes)
    finally:
        dist.destroy_process_group()
    assert moved[0] == moved[1] > 0


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama").train()

    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before, offload = hooks(), of_model(model)
    with offload:
        assert hooks() != before
    assert hooks() == before
    with torch.autograd.graph.disable_saved_tensors_hooks("not today"):
        with pytest.raises(RuntimeError, match="not today"), offload:
            model(torch.arange(4)[None])
    assert hooks() == before


def test_a_dry_run_takes_the_same_steps_and_no_memory():
    found = []
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), nullcontext()):
        with mode:
            layers = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(3)]
            model = torch.nn.Sequential(*layers)
            offload = offloader(model=model, layers=layers)
            for rows in (10, 20, 10):
                with offload:
                    loss = model(torch.ones(rows, 4)).sum()
                loss.backward()
                offload.end_step()
                found.append((offload.step_host_bytes, offload.report()))
        assert offload.host.slab.is_meta == isinstance(mode, FakeTensorMode)
    assert found[:3] == found[3:] and [size for size, _ in found[:3]] == 3 * [3 * 512]


# --- Rule 4: streams, simulated; every copy runs as late as its waits allow ---

Event = namedtuple("Event", ["stream", "position"])


class Stream:
    """The compute stream runs at once, the others only as far as somebody waits for them.

    deaf: it waits for nothing. unheard: the name of a stream that is not waited for.
    """

    def __init__(self, name="compute", deaf=False, unheard=None):
        self.name, self.deaf, self.unheard = name, deaf, unheard
        self.queue, self.done, self.waited_for = [], 0, []

    def record_event(self):
        return Event(self, len(self.queue))

    def wait_event(self, event):
        self.waited_for.append(event)
        if self.name != "compute" and not self.deaf:
            self.queue.append(event)
        elif self.name == "compute" and event.stream.name != self.unheard:
            event.stream.run_to(event.position)

    def copy(self, destination, source):
        waited = self.queue and isinstance(self.queue[-1], Event) and self.queue[-1].stream.name == "compute"
        assert waited, f"{self.name}: a copy was started without waiting for the compute stream"
        destination.fill_(255)  # NaN in every float type: whoever reads too early is seen
        both = (destination, source)
        self.queue.append([(weakref.ref(t.untyped_storage()), t.storage_offset(), len(t)) for t in both])

    def run_to(self, position):
        while self.done < position:
            item = self.queue[self.done]
            self.done += 1
            if isinstance(item, Event):
                item.stream.run_to(item.position)
            else:
                destination, source = (self.find(*place) for place in item)
                destination.copy_(source)

    def find(self, storage, start, length):
        assert storage() is not None, f"{self.name}: memory was freed while a copy was under way"
        return torch.empty(0, dtype=torch.uint8).set_(storage(), start, (length,), (1,))


class LateOffload(OffloadActivations):
    """deaf: a stream whose copies wait for nothing; unheard: one whose copies nothing waits for."""

    def __init__(self, *args, deaf=None, unheard=None):
        super().__init__(*args)
        self.compute, self.streams = Stream(unheard=unheard), self
        self.to_host, self.to_device = (Stream(name, name == deaf) for name in ("to_host", "to_device"))

    def current_stream(self):
        return self.compute

    def synchronize(self):
        for stream in (self.to_host, self.to_device):
            stream.run_to(len(stream.queue))

    def _copy(self, stream, destination, source):
        stream.copy(destination, source)
        return stream.record_event()


def late_run(kind, checkpointing, accumulate=1, inside=False, last_layer_moves=False, **options):
    """Losses and gradients with this kind of offloader, and without one."""
    options = {"num_hidden_layers": 4, **options}
    model, plain = (make_model(checkpointing, **options) for _ in range(2))
    more = [torch.nn.Identity()] if last_layer_moves else []
    offload = kind(model, [*model.model.layers, *more], CPU)
    return train(model, offload, accumulate, inside), train(plain, None, accumulate)


WAYS = [{}, {"inside": True}, {"last_layer_moves": True}, {"inside": True, "last_layer_moves": True}]
WAYS += [{"accumulate": 3, "tie_word_embeddings": True}]
WAYS += [{"family": name, "dtype": torch.bfloat16, "num_hidden_layers": 2} for name in FAMILIES]


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_models_gradients_are_bit_equal_with_copies_as_late_as_allowed(way, checkpointing):
    assert_same_bits(*late_run(LateOffload, checkpointing, **way))


class FreesTooEarly(LateOffload):
    def _give_back(self, group):
        for copy in self.in_flight:
            copy.on_device = None
        self.in_flight.clear()


MISTAKES = [FreesTooEarly, partial(LateOffload, deaf="to_host"), partial(LateOffload, deaf="to_device")]
MISTAKES += [partial(LateOffload, unheard="to_host"), partial(LateOffload, unheard="to_device")]


@pytest.mark.parametrize("kind", MISTAKES)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # raised in __del__ as well
def test_a_missing_wait_is_seen(kind):
    # inside, all layers moving: the last copies to the host are under way when backward asks for them
    with pytest.raises(AssertionError):  # other gradients, or what the simulation asserts
        assert_same_bits(*late_run(kind, checkpointing=True, inside=True, last_layer_moves=True))


def test_a_prefetch_that_nobody_used_is_waited_for_before_its_memory_goes():
    offload = offloader(LateOffload)
    with offload:
        branch = (leaf(6, 4) * 2).exp()
        offload.group += 1  # the group of the layer before: prefetched after what backward needs
        loss = (leaf(6, 4, seed=1) * 1).sin().sum()
    loss.backward()
    [copy] = offload.live
    assert copy.on_device is not None and offload.to_device.done < len(offload.to_device.queue)
    del copy, branch
    assert offload.to_device.done == len(offload.to_device.queue)
    offload.end_step()


def test_a_copy_and_its_event_are_on_the_side_stream():
    """The one function that the simulation replaces."""
    log, values = [], (torch.zeros(4, dtype=torch.uint8), torch.arange(4, dtype=torch.uint8))

    def note(what):
        log.append((what, torch.equal(*values)))

    @contextmanager
    def stream(used):
        note(used)
        yield
        note("left")

    offload, side = offloader(), SimpleNamespace(record_event=lambda: note("event"))
    offload.streams = SimpleNamespace(stream=stream)
    offload._copy(side, *values)
    assert log == [(side, False), ("event", True), ("left", True)]


def test_another_stream_between_forward_and_backward(monkeypatch):
    """Memory goes back to the stream that it came from: it waits as well as the one that is running."""
    recorded = Counter()
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, s: recorded.update([s]), raising=False)
    offload, x = offloader(LateOffload), leaf(6, 4)
    forward, backward = offload.compute, Stream()
    with offload:
        h = (x * 2).exp()
        loss = h.sin().sum()  # sin saves what exp saved: one copy
        del h
        offload.compute = backward
    [copy] = offload.live
    stored = copy.done
    assert forward.waited_for == backward.waited_for == [stored]
    offload.compute = forward
    copy.load()
    assert stored in offload.to_device.queue  # a half-written host copy is not read
    assert not recorded
    offload.compute = backward
    loss.backward()
    assert recorded == {backward: 2}  # the allocator hears of it
    assert forward.waited_for == backward.waited_for == [stored, copy.done, copy.done]
    doubled = 2 * x.detach()
    assert torch.equal(x.grad, 2 * doubled.exp().cos() * doubled.exp())
    del copy, loss
    offload.end_step()


# --- CUDA ---


def cuda_train(checkpointing, offloads):
    """Gradients of three steps, the peak of the latter two in bytes, and the offloader."""
    device = torch.device("cuda")
    fields = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 6}
    model = make_model(checkpointing, "llama", torch.bfloat16, device, **fields)
    offload = OffloadActivations(model, model.model.layers, device) if offloads else None
    for layer in model.model.layers:
        # some 10 ms: the host runs ahead, and copies have no excuse to be late
        layer.register_forward_hook(lambda *_: torch.cuda._sleep(20_000_000))

    def rows(seed):  # another one each time: the host must not show the step before's
        if seed == 1:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        on_host = make_row(seed, (2800, 2600, 3000))
        return {name: v.cuda() if torch.is_tensor(v) else v for name, v in on_host.items()}

    found = train(model, offload, rows=rows)
    torch.cuda.synchronize()
    return found, torch.cuda.max_memory_allocated(), offload


@pytest.mark.gpu
@pytest.mark.parametrize("default_stream", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_cuda_gradients_are_bit_equal_and_memory_is_free(checkpointing, default_stream, monkeypatch):
    monkeypatch.setattr("common.offload.MIN_BYTES", 2**16)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    stream = torch.cuda.current_stream() if default_stream else torch.cuda.Stream()
    # the embedding's and attention's backward add up in any order otherwise
    torch.use_deterministic_algorithms(True)
    try:
        plain, plain_peak, _ = cuda_train(checkpointing, False)
        with torch.cuda.stream(stream):
            found, peak, offload = cuda_train(checkpointing, True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(found, plain)
    layer_input = 8400 * 256 * 2
    assert plain_peak - peak > (2 * layer_input if checkpointing else 20 * layer_input)
    report = offload.report()
    assert report["pretend"] is False
    assert offload.host.slab.is_pinned()
    if checkpointing:  # not rounded up
        assert len(offload.host.slab) == report["peak_host_bytes"] == 5 * layer_input
