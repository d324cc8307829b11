"""Activation offloading on the pretend device: exact, freed for real, gone after each step."""

import gc
import json
import weakref
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from helpers import FAMILIES, documents, enable_checkpointing, gradients, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from common.collators import flatten, pad
from common.offload import OffloadActivations, keep_on_device
from sft_packing import add_scored, batch_nll_sum, decoder_layers, shard

CPU = torch.device("cpu")


def offloader(layers=None, model=None, kind=OffloadActivations, **options):
    options = {"min_bytes": 1, **options}
    return kind(model or torch.nn.Module(), layers, CPU, **options)


def leaf(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_()


def storage_of(tensor):
    return weakref.ref(tensor.untyped_storage())


# --- views and aliases ---


def projections(x, w):
    """q, k and v: three products that save the same input."""
    return sum((x @ w[i]).square().sum() for i in range(3))


def transposed(x, w):
    return (x.T @ x).square().sum()


def expanded(x, w):
    return (x.sum(0, keepdim=True).expand(6, 4) * x).sin().sum()


def offset(x, w):
    return (x[2:5, 1:3].exp() * x[1:4, 2:4]).sum()


def strided(x, w):
    return (x[::2, ::3] * x.flatten()[1::2].view(3, 4)[:, :2]).square().sum()


def halves(x, w):
    gate, up = (x @ w[0]).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).sum()


def own_output(x, w):
    return x.exp().tanh().sum()


def cast(x, w):
    return (x.bfloat16() * x.double()[:, :1]).float().sin().sum()


def masked(x, w):
    return x.masked_fill(x > 0, 0.5).where(x < 1, x.square()).exp().sum()


def as_complex(x, w):
    z = torch.view_as_complex(x.view(6, 2, 2) * 1)
    return (z * z.conj() * (1 + 2j)).real.square().sum()


COMPUTATIONS = [
    projections, transposed, expanded, offset, strided, halves, own_output, cast, masked, as_complex,
]  # fmt: skip


def compute(function, offload=None, backwards=1):
    """function(x, w) on intermediate tensors, so that what it saves is no leaf; its gradients."""
    x, w = leaf(6, 4), leaf(3, 4, 4, seed=1)
    if offload is None:
        loss = function(x * 1.5, w * 0.5)
    else:
        with offload:
            loss = function(x * 1.5, w * 0.5)
    for i in range(backwards):
        loss.backward(retain_graph=i + 1 < backwards)
    return x.grad, w.grad


def assert_equal(found, expected):
    for f, e in zip(found, expected):
        assert (f is None) == (e is None)
        assert e is None or torch.equal(f, e)


@pytest.mark.parametrize("function", COMPUTATIONS)
def test_every_view_comes_back_with_its_own_strides_and_values(function):
    offload = offloader()
    assert_equal(compute(function, offload), compute(function))
    assert offload.largest["offloaded"] > 0
    offload.end_step()


def test_an_unpacked_view_has_the_strides_of_the_saved_one():
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            views = (x, x.T, x[1:, 2:], x[:, ::2], x[:1].expand(5, 4), x.view(-1))
            ctx.save_for_backward(*views)
            seen.extend((v.size(), v.stride(), v.storage_offset(), v.clone()) for v in views)
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            for (size, stride, start, values), back in zip(seen, ctx.saved_tensors):
                assert (back.size(), back.stride(), back.storage_offset()) == (size, stride, start)
                assert torch.equal(back, values)
            seen.clear()
            return grad.expand(6, 4)

    with offloader() as offload:
        loss = Look.apply(leaf(6, 4) * 1)
    assert (len(offload.live), offload.largest["offloaded"]) == (1, 6 * 4 * 4)
    loss.backward()
    assert not seen


def test_a_storage_is_copied_once_however_many_aliases_are_saved():
    offload = offloader()
    x, w = leaf(6, 4), leaf(3, 4, 4, seed=1)
    with offload:
        h = x * 1.5
        size = h.untyped_storage().nbytes()
        loss = sum((h @ w[i]).sum() for i in range(3))
    [copy] = [c for c in offload.live if c.num_bytes == size]  # the weights' storage is twice as large
    assert copy.aliases == 3 and copy.host.numel() == size
    del copy
    loss.backward()
    offload.end_step()


class CountsCopies(OffloadActivations):
    copies_back = 0

    def _copy(self, stream, destination, source):
        self.copies_back += stream is self.to_device
        return super()._copy(stream, destination, source)


def test_a_storage_comes_back_once_for_all_its_aliases_and_goes_with_the_last_one():
    offload = offloader(kind=CountsCopies)
    x = leaf(6, 4)
    with offload:
        h = x * 1.5
        loss = sum((h @ leaf(4, 4, seed=i)).sum() for i in range(3)) + h.sin().sum()
    del h
    loss.backward(retain_graph=True)
    copies, offload.copies_back = offload.copies_back, 0
    assert copies == len(offload.live) == 4  # h and three weights
    assert all(copy.data is None for copy in offload.live)
    loss.backward()
    assert offload.copies_back == 4


def test_without_aliasing_the_storage_would_be_copied_three_times(monkeypatch):
    monkeypatch.setattr(torch.utils.weak.WeakIdKeyDictionary, "get", lambda self, key, default: default)
    offload = offloader()
    compute(projections, offload)
    assert offload.largest["offloaded"] >= 3 * 6 * 4 * 4
    with pytest.raises(ValueError):
        test_a_storage_is_copied_once_however_many_aliases_are_saved()


def test_device_memory_is_free_before_backward():
    offload = offloader()
    with offload:
        h = leaf(6, 4) * 1.5
        freed, left = storage_of(h), leaf(3, 4, seed=2)
        loss = (h.T @ h).sum() + h.exp().sum()
        kept = (left * 2).sin()
    del h
    gc.collect()
    assert freed() is None
    loss.backward()
    kept.sum().backward()


def test_an_alias_left_behind_would_keep_the_memory(monkeypatch):
    """The other way round: packing the second alias as it is keeps the whole storage."""
    packed = []
    whole = OffloadActivations._pack

    def pack(self, tensor):
        packed.append(tensor)
        return whole(self, tensor) if len(packed) == 1 else self._keep(tensor, "kept on device")

    monkeypatch.setattr(OffloadActivations, "_pack", pack)
    with pytest.raises(AssertionError):
        test_device_memory_is_free_before_backward()


def test_a_changed_storage_is_copied_again():
    """x.add_ between two saves: the first save has the old values, the second one the new ones."""
    x = leaf(6, 4)
    offload = offloader()
    with offload:
        y = x * 1
        first = y.square()
        offload._give_back(offload.group + 1)  # the first copy is done
        y.add_(1)
        second = y.square()
    (first + second).sum().backward()
    assert torch.allclose(x.grad, 2 * x + 2 * (x + 1))


# --- what stays ---


def test_weights_buffers_and_their_views_stay():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6).eval(), torch.nn.Linear(6, 4))
    offload = offloader(model=model)
    x = leaf(5, 4)
    with offload:
        loss = (model(x) @ model[0].weight[1:3].T).square().sum()
    weights = {t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    assert offload.largest["offloaded"] > 0
    assert not [s for s in offload.copies if s in weights]
    moved = offload.largest["offloaded"]
    loss.backward()
    offload.end_step()
    unaware = offloader()
    with unaware:
        loss = (model(x) @ model[0].weight[1:3].T).square().sum()
    assert unaware.largest["offloaded"] > moved  # the rule is what kept them
    loss.backward()


def test_small_storages_and_integers_stay_and_are_counted():
    offload = offloader(min_bytes=100)
    x, table = leaf(6, 4), leaf(9, 4)
    with offload:
        small, large = (x[:2] * 1).exp(), (x * 2).exp()  # 32 and 96 bytes; 6 x 4 fp32
        huge = (torch.cat([x, x]) * 1).exp()
        looked_up = torch.nn.functional.embedding(torch.arange(9).repeat(99), table)
    assert offload.largest == {"offloaded": 192, "small": 32 + 96}
    (small.sum() + large.sum() + huge.sum() + looked_up.sum()).backward()
    offload.end_step()


def test_a_small_view_moves_the_large_storage_that_it_keeps_alive():
    offload = offloader(min_bytes=100)
    with offload:
        h = leaf(60, 4) * 1
        freed, loss = storage_of(h), h[:1].exp().sin().sum() + h[:1].square().sum()
    del h
    assert offload.largest["offloaded"] == 960 and freed() is None
    loss.backward()


def test_tensors_elsewhere_stay():
    offload = offloader()
    with offload:
        y = torch.randn(6, 4, device="meta", requires_grad=True).exp()
    assert not offload.largest
    y.sum().backward()


def test_a_kept_region_stays_and_is_counted():
    offload = offloader()
    x = leaf(6, 4)
    with offload:
        h = (x * 2).exp()
        with keep_on_device():
            freed, loss = storage_of(h), h.sin().sum() + h.cos().sum()
        del h
    # exp saved its output, which moved; the region then kept the same storage on the device
    assert offload.largest == {"offloaded": 96, "kept on device": 96}
    assert freed() is not None
    loss.backward()
    plain = leaf(6, 4)
    h = (plain * 2).exp()
    (h.sin().sum() + h.cos().sum()).backward()
    assert torch.equal(x.grad, plain.grad)
    offload.end_step()


def test_a_storage_that_stays_is_not_copied_as_well():
    offload = offloader()
    with offload:
        h = leaf(6, 4) * 2
        with keep_on_device():
            first = h[:1].sin().sum()  # a view: its whole storage stays
        loss = first + h.cos().sum()
    assert offload.largest == {"kept on device": 96}
    loss.backward()


def test_masks_move():
    offload = offloader()
    with offload:
        loss = (leaf(6, 4) * 2).masked_fill(torch.ones(6, 4, dtype=torch.bool), 0.0).sum()
    assert offload.largest == {"offloaded": 24}
    loss.backward()


def test_keep_on_device_alone_does_nothing():
    x = leaf(6, 4)
    with keep_on_device():
        loss = x.exp().sum()
    loss.backward()
    assert torch.equal(x.grad, x.detach().exp())


def test_what_a_node_saves_of_its_own_output_is_no_cycle():
    """A kept tensor packed as itself would be: tensor -> node -> saved tensor -> tensor."""
    gc.disable()
    try:
        with offloader(min_bytes=10**6):
            y = leaf(6, 4).exp()
        freed = storage_of(y)
        del y
        assert freed() is None
    finally:
        gc.enable()


# --- lifetime ---


@pytest.mark.parametrize("function", COMPUTATIONS)
def test_a_retained_graph_allows_two_backwards(function):
    offload = offloader()
    assert_equal(compute(function, offload, backwards=2), compute(function, backwards=2))
    offload.end_step()


def test_several_forwards_before_one_backward():
    def losses(offload):
        x = leaf(6, 4)
        total = 0.0
        for scale in (1.0, 2.0, 3.0):
            with offload or no_offload():
                total = total + (x * scale).exp().sin().sum()
        total.backward()
        return (x.grad,)

    offload = offloader()
    assert_equal(losses(offload), losses(None))
    offload.end_step()


def test_several_backwards_in_any_order():
    def run(offload):
        x, pending = leaf(6, 4), []
        for scale in (1.0, 2.0, 3.0):
            with offload or no_offload():
                pending.append((x * scale).exp().sin().sum())
        for i in (1, 2, 0):
            pending[i].backward()
        return (x.grad,)

    offload = offloader()
    assert_equal(run(offload), run(None))
    offload.end_step()


@contextmanager
def no_offload():
    yield


def test_an_unused_branch_goes_with_its_tensor():
    offload = offloader()
    x = leaf(6, 4)
    with offload:
        h = x * 2
        loss, unused = h.exp().sum(), h.sin().cos()
    loss.backward()
    assert torch.equal(x.grad, 2 * (2 * x.detach()).exp())
    with pytest.raises(RuntimeError, match="host copies, .* bytes, outlive the step"):
        offload.end_step()
    del unused
    offload.end_step()


def test_a_forward_without_backward_leaves_nothing_once_its_loss_is_gone():
    offload = offloader()
    with offload:
        loss = leaf(6, 4).exp().sin().sum()
    with pytest.raises(RuntimeError, match="Drop its loss"):
        offload.end_step()
    del loss
    offload.end_step()
    assert_equal(compute(halves, offload), compute(halves))


def test_an_exception_in_forward_leaves_the_offloader_usable():
    offload = offloader()
    with pytest.raises(ZeroDivisionError):
        with offload:
            y = leaf(6, 4).exp().sin()
            raise ZeroDivisionError
    assert OffloadActivations.active is None and not offload.in_flight
    del y
    offload.end_step()
    assert_equal(compute(halves, offload), compute(halves))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        leaf(2, 2).exp()
    assert packed  # no hook of ours is left on top


def test_a_layer_called_twice_is_the_same_layer():
    """Of three layers, each called twice in a row, the last one's two calls stay."""
    layers = torch.nn.ModuleList(torch.nn.Tanh() for _ in range(3))
    for orders in ([0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2]):
        offload = offloader(layers)
        with offload:
            h = leaf(6, 4) * 1
            for i in orders:
                h = layers[i](h)
        assert offload.largest == {"offloaded": 4 * 96, "last layers": 2 * 96}
        h.sum().backward()


def test_a_backward_inside_moves_no_layer_count(monkeypatch):
    """A checkpointed layer computed again runs its hooks again, where transformers calls it so."""
    layers = torch.nn.ModuleList(torch.nn.Tanh() for _ in range(3))
    offload = offloader(layers)
    with offload:
        h = leaf(6, 4) * 1
        for layer in layers:
            with set_checkpoint_early_stop(False):
                h = checkpoint(layer, h, use_reentrant=False)
        before = offload.layer, offload.group, len(offload.marks)
        with set_checkpoint_early_stop(False):
            h.sum().backward()
        assert (offload.layer, offload.group, len(offload.marks)) == before


def test_backward_inside_the_context():
    x = leaf(6, 4)
    offload = offloader()
    with offload:
        (x * 2).exp().sin().sum().backward()
    offload.end_step()
    y = leaf(6, 4)
    (y * 2).exp().sin().sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpoints_save_their_inputs_alone(use_reentrant, inside):
    def run(offload):
        x = leaf(6, 4)

        def layer(h):
            return (h.exp().sin() * h).tanh()

        with offload or no_offload():
            h = x * 0.5
            for _ in range(3):
                h = checkpoint(layer, h, use_reentrant=use_reentrant)
            loss = h.sum()
            del h
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return (x.grad,)

    offload = offloader()
    assert_equal(run(offload), run(None))
    assert offload.largest["offloaded"] == 3 * 96
    offload.end_step()


def test_a_double_backward_works():
    def run(offload):
        x = leaf(6, 4)
        with offload or no_offload():
            [grad] = torch.autograd.grad((x * 2).exp().sin().sum(), x, create_graph=True)
            grad.square().sum().backward()
        return (x.grad,)

    offload = offloader()
    assert_equal(run(offload), run(None))


def test_a_change_in_place_while_copied_is_refused_in_backward():
    offload = offloader()
    with offload:
        y = leaf(6, 4) * 1
        loss = y.square().sum()
        y.add_(1)
    with pytest.raises(RuntimeError, match="changed in place after it was saved"):
        loss.backward()
    del loss
    offload.end_step()


@pytest.mark.parametrize("min_bytes", [1, 10**6])
def test_a_change_in_place_that_no_backward_sees_is_none(min_bytes):
    def run(offload):
        x = leaf(6, 4)
        with offload or no_offload():
            h = x * 2
            unused = h.square().mean()
            h += 1
            loss = h.exp().sum()
        loss.backward()
        del unused
        return (x.grad,)

    offload = offloader(min_bytes=min_bytes)
    assert_equal(run(offload), run(None))
    offload.end_step()


def test_a_change_in_place_of_what_stayed_is_refused_in_backward():
    with offloader(min_bytes=10**6):
        y = leaf(6, 4) * 1
        loss = y.square().sum()
        y.add_(1)
    with pytest.raises(RuntimeError, match="changed in place after it was saved"):
        loss.backward()


@pytest.mark.parametrize("inside", [True, False])
def test_a_kept_region_in_a_checkpointed_function(inside):
    def run(offload):
        x = leaf(6, 4)

        def layer(h):
            y = h.exp()
            with keep_on_device():
                y = y.sin().cos()
            return y.tanh() * h

        with offload or no_offload():
            h = x * 0.5
            for _ in range(3):
                h = checkpoint(layer, h, use_reentrant=False)
            loss = h.sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return (x.grad,)

    assert_equal(run(offloader()), run(None))


def test_hooks_that_autograd_refuses_leave_nothing_behind():
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match="not today"):
        with torch.autograd.graph.disable_saved_tensors_hooks("not today"):
            with offloader(decoder_layers(model), model):
                model(torch.arange(4)[None])
    assert OffloadActivations.active is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_one_inside_another_is_refused():
    with offloader(), pytest.raises(RuntimeError, match="inside another"):
        with offloader():
            pass
    assert OffloadActivations.active is None


def test_the_slab_is_sized_by_the_first_step_and_grows():
    offload = offloader()
    for rows in (6, 6, 60):
        taken = []
        with offload:
            loss = (leaf(rows, 4) * 2).exp().sin().cos().sum()  # saves the outputs of exp and of sin
            taken = [copy.host.untyped_storage().data_ptr() for copy in offload.live]
        loss.backward()
        in_slab = [pointer == offload.host.slab.untyped_storage().data_ptr() for pointer in taken]
        assert len(taken) == 2 and all(in_slab) == (rows == 6 and offload.host.slab.numel() > 0)
        needed = 2 * -(-rows * 16 // 512) * 512
        offload.end_step()
        assert len(offload.host.slab) == offload.host.peak == needed


# --- models ---


def train(model, batches, offload, accumulate=1):
    """Two steps' gradients, over `accumulate` batches each. Returns losses and gradients."""
    losses, found = [], []
    for start in range(0, 2 * accumulate, accumulate):
        for batch in batches[start : start + accumulate]:
            with offload or no_offload():
                loss = batch_nll_sum(model, batch, 8)
            loss.backward()
            losses.append(loss.item())
        if offload:
            offload.end_step()
        found.append(gradients(model))
    return losses, found


def rows(count, padded=False, seed=0):
    join = (lambda sequences: pad(sequences, 0)) if padded else flatten
    return [add_scored(join(documents(seed + i, [5 + i, 9, 3]))) for i in range(count)]


def assert_trains_alike(make, batches, accumulate=1, **options):
    plain_model, model = make(), make()
    offload = offloader(decoder_layers(model), model, **options)
    plain, found = train(plain_model, batches, None, accumulate), train(model, batches, offload, accumulate)
    assert found[0] == plain[0]
    for step, expected in zip(found[1], plain[1]):
        assert step.keys() == expected.keys()
        assert all(torch.equal(step[name], expected[name]) for name in expected)
    return offload


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_are_bit_equal(checkpointing, tied, padded, accumulate):
    def make():
        model = tiny_model("llama", "sdpa" if padded else "varlen", tie_word_embeddings=tied).train()
        if checkpointing:
            enable_checkpointing(model)
        return model

    batches = rows(2 * accumulate, padded)
    offload = assert_trains_alike(make, batches, accumulate)
    largest = max(batch["input_ids"].numel() for batch in batches)
    if checkpointing:  # of two layers the second one's input stays; 32 fp32 numbers a token
        assert offload.largest["offloaded"] == offload.largest["last layers"] == largest * 32 * 4
    else:
        assert offload.largest["offloaded"] > 10 * largest * 32 * 4


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_bit_equal_for_every_family(family, dtype, checkpointing):
    def make():
        model = tiny_model(family, num_hidden_layers=2).to(dtype).train()
        if checkpointing:
            enable_checkpointing(model)
        return model

    assert_trains_alike(make, rows(2))


@settings(max_examples=15)
@given(keep=st.integers(1, 4), min_bytes=st.sampled_from([1, 500, 2000, 10**6]), checkpointing=st.booleans())
def test_gradients_are_bit_equal_whatever_stays(keep, min_bytes, checkpointing):
    def make():
        model = tiny_model("llama", num_hidden_layers=5).train()
        if checkpointing:
            enable_checkpointing(model)
        return model

    assert_trains_alike(make, rows(2), min_bytes=min_bytes, keep_layers=keep)


def test_two_forwards_in_one_context_are_two_forwards():
    def losses(offload):
        model = tiny_model("llama", num_hidden_layers=3).train()
        offload = offload and offloader(decoder_layers(model), model)
        first, second = rows(2)
        with offload or no_offload():
            loss = batch_nll_sum(model, first, 8) - batch_nll_sum(model, second, 8)
        loss.backward()
        return gradients(model), offload

    def offloaded_alone(batch):
        model = tiny_model("llama", num_hidden_layers=3).train()
        offload = offloader(decoder_layers(model), model)
        with offload:
            batch_nll_sum(model, batch, 8)
        return offload.largest["offloaded"]

    (found, offload), (expected, _) = losses(True), losses(False)
    offload.end_step()
    assert offload.largest["offloaded"] == sum(offloaded_alone(batch) for batch in rows(2))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_fsdp_gathers_stay(tied, checkpointing):
    """Sharded or not, the same bytes move. bf16 makes FSDP2 gather even a group of one into new storages."""
    found = {}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for sharded in (False, True):
            model = tiny_model("llama", num_hidden_layers=3, tie_word_embeddings=tied).train()
            if sharded:
                shard(model, init_device_mesh("cpu", (1,)), bf16=True)
            else:
                model.bfloat16()
            if checkpointing:
                enable_checkpointing(model)
            offload = offloader(decoder_layers(model), model)
            for batch in rows(2):
                with offload:
                    loss = batch_nll_sum(model, batch, 8)
                loss.backward()
                offload.end_step()
            found[sharded] = offload.largest
    finally:
        dist.destroy_process_group()
    assert found[True] == found[False]


def test_a_model_of_one_layer_has_nothing_to_offload():
    model = tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match="nothing to move: of 1 decoder layers the last 1 keep"):
        offloader(decoder_layers(model), model)


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama").train()

    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before = hooks()
    with offloader(decoder_layers(model), model):
        assert hooks() != before
    assert hooks() == before


# --- bytes ---


def held_after_forward(checkpointing, offloads):
    """MemTracker's bytes between forward and backward, beyond those before; the peak of the whole."""
    model = tiny_model("llama", num_hidden_layers=6, hidden_size=64).train()
    if checkpointing:
        enable_checkpointing(model)
    batch = add_scored(flatten(documents(0, [90, 50, 60])))
    offload = offloader(decoder_layers(model), model) if offloads else None
    train(model, [batch, batch], offload)  # the slab is there
    tracker = MemTracker()
    tracker.track_external(model, *[v for v in batch.values() if torch.is_tensor(v)])
    with tracker:
        before = tracker.get_tracker_snapshot("current")[CPU]["Total"]
        with offload or no_offload():
            loss = batch_nll_sum(model, batch, 8)
        held = tracker.get_tracker_snapshot("current")[CPU]["Total"] - before
        loss.backward()
    return held, tracker._peak_mem[CPU]


def test_what_stays_on_the_device_by_memtracker():
    """Checkpointed: 1 of 6 layers' inputs stays. Not checkpointed: 1 of 6 layers' saved tensors."""
    unit = 200 * 64 * 4  # one layer's input
    checkpointed, offloaded = held_after_forward(True, False), held_after_forward(True, True)
    assert checkpointed[0] - offloaded[0] == 5 * unit
    everything, moved = held_after_forward(False, False), held_after_forward(False, True)
    head = checkpointed[0] - 6 * unit  # what the norm, the rotary tables and the head hold
    assert moved[0] - head < 0.21 * (everything[0] - head)
    assert moved[1] < 0.6 * everything[1] and offloaded[1] <= checkpointed[1]


def test_the_report_adds_up():
    model = tiny_model("llama", num_hidden_layers=3).train()
    enable_checkpointing(model)
    offload = offloader(decoder_layers(model), model)
    small, large = (add_scored(flatten(documents(*d))) for d in ((0, [4, 3]), (1, [9, 8, 7])))
    larger = add_scored(
        flatten(documents(1, [9, 8, 9]))
    )  # in the first step, whose copies are slow: not reported
    train(model, [larger, small, large, small], offload, accumulate=2)
    assert not offload.groups and not offload.live  # nothing piles up from step to step
    report = offload.report()
    assert report["pretend"] is True
    assert report["offloaded_bytes"] == 2 * 24 * 32 * 4 == 2 * report["bytes_per_layer"]
    assert report["stayed_bytes"]["last layers"] == 24 * 32 * 4
    assert report["peak_host_bytes"] == 2 * -(-26 * 32 * 4 // 512) * 512
    assert 0 < report["layer_seconds"] < 1
    json.dumps(report)


# --- streams, simulated: every copy runs as late as its waits allow ---


class Event:
    def __init__(self, stream, position):
        self.stream, self.position = stream, position


class ComputeStream:
    """Runs at once. Waiting for another stream's event makes that stream catch up."""

    def __init__(self, deaf_to=None):
        self.deaf_to = deaf_to

    def record_event(self):
        return Event(self, None)

    def wait_event(self, event):
        if event.stream is not self and event.stream.name != self.deaf_to:
            event.stream.run_to(event.position)


class SideStream:
    """Runs only as far as somebody waits for it."""

    def __init__(self, name, deaf=False):
        self.name, self.queue, self.done, self.deaf = name, [], 0, deaf

    def record_event(self):
        return Event(self, len(self.queue))

    def wait_event(self, event):
        if not self.deaf:
            self.queue.append(event)

    def copy(self, destination, source):
        waited = self.queue[-2:]
        assert any(isinstance(event.stream, ComputeStream) for event in waited if isinstance(event, Event)), (
            f"{self.name}: a copy was started without waiting for the compute stream"
        )
        destination.fill_(255)  # NaN in every float type: whoever reads too early is seen
        refs = [(weakref.ref(t.untyped_storage()), t.storage_offset(), len(t)) for t in (destination, source)]
        self.queue.append(refs)

    def run_to(self, position):
        while self.done < position:
            item = self.queue[self.done]
            self.done += 1
            if isinstance(item, Event):
                if isinstance(item.stream, SideStream):
                    item.stream.run_to(item.position)
                continue
            tensors = []
            for storage, start, length in item:
                assert storage() is not None, f"{self.name}: memory was freed while a copy was under way"
                whole = torch.empty(0, dtype=torch.uint8).set_(storage())
                tensors.append(whole[start : start + length])
            tensors[0].copy_(tensors[1])


class LateOffload(OffloadActivations):
    deaf_to = deaf = None

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.compute = ComputeStream(self.deaf_to)
        self.to_host = SideStream("to_host", self.deaf == "to_host")
        self.to_device = SideStream("to_device", self.deaf == "to_device")
        self.streams = self

    def current_stream(self):
        return self.compute

    def synchronize(self):
        for stream in (self.to_host, self.to_device):
            stream.run_to(len(stream.queue))

    def _copy(self, stream, destination, source):
        stream.copy(destination, source)
        return stream.record_event()


def late_run(kind, inside=False, checkpointing=True, keep_layers=1):
    model = tiny_model("llama", num_hidden_layers=4).train()
    if checkpointing:
        enable_checkpointing(model)
    options = {"kind": kind, "keep_layers": keep_layers}
    offload = offloader(decoder_layers(model), model, **options) if kind else None
    for batch in rows(3):
        with offload or no_offload():
            loss = batch_nll_sum(model, batch, 8)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        if offload:
            offload.end_step()
    return gradients(model)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("keep_layers", [0, 1, 2])
def test_copies_as_late_as_allowed_change_nothing(inside, checkpointing, keep_layers):
    found = late_run(LateOffload, inside, checkpointing, keep_layers)
    expected = late_run(None, False, checkpointing)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class DoesNotWaitBeforeFreeing(LateOffload):
    deaf_to = "to_host"


class DoesNotWaitBeforeReading(LateOffload):
    deaf_to = "to_device"


class CopiesOutBeforeValuesAreThere(LateOffload):
    deaf = "to_host"


class CopiesInBeforeMemoryIsFree(LateOffload):
    deaf = "to_device"


class FreesTooEarly(LateOffload):
    def _give_back(self, group):
        self.in_flight.clear()


class LoadsHalfWritten(LateOffload):
    def _load(self, copy):
        copy.stored = self.compute.record_event()  # always complete
        return super()._load(copy)


@pytest.mark.parametrize(
    "kind",
    [
        DoesNotWaitBeforeFreeing,
        DoesNotWaitBeforeReading,
        CopiesOutBeforeValuesAreThere,
        CopiesInBeforeMemoryIsFree,
        FreesTooEarly,
        LoadsHalfWritten,
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # raised in __del__ as well
def test_a_missing_wait_is_seen(kind):
    expected = late_run(None)
    try:
        # inside, no layer kept: the last copies to the host are under way when backward asks for them
        found = late_run(kind, inside=True, keep_layers=0)
    except (AssertionError, RuntimeError) as error:
        assert "copy was" in str(error)
    else:
        assert not all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_prefetch_that_nobody_used_is_waited_for_before_its_memory_goes():
    offload = offloader(kind=LateOffload)
    x = leaf(6, 4)
    with offload:
        branch = (x * 2).exp()  # saved first, so prefetched with what comes after
        loss = (leaf(6, 4, seed=1) * 1).sin().sum()
    loss.backward()
    [copy] = offload.live
    assert copy.data is not None and offload.to_device.done < len(offload.to_device.queue)
    del copy, branch
    assert offload.to_device.done == len(offload.to_device.queue)
    offload.end_step()


def test_a_copy_and_its_event_are_on_the_side_stream():
    """The one line that the simulation replaces."""
    log, values = [], (torch.zeros(4, dtype=torch.uint8), torch.arange(4, dtype=torch.uint8))

    class Stream:
        def record_event(self):
            log.append(("event after the copy", self, torch.equal(*values)))
            return "event"

    class Streams:
        @contextmanager
        def stream(self, stream):
            log.append(("enter", stream, torch.equal(*values)))
            yield
            log.append(("exit", stream, torch.equal(*values)))

    offload, side = offloader(), Stream()
    offload.streams = Streams()
    assert offload._copy(side, *values) == "event"
    assert log == [("enter", side, False), ("event after the copy", side, True), ("exit", side, True)]


def test_memory_is_given_back_to_the_stream_that_it_came_from():
    """Packed and loaded on one stream, let go on another: both wait."""
    offload = offloader(kind=LateOffload)
    first, second = offload.compute, ComputeStream()
    waits = Counter()
    for stream in (first, second):
        wait = stream.wait_event
        stream.wait_event = lambda event, stream=stream, wait=wait: waits.update([stream]) or wait(event)
    with offload:
        loss = (leaf(6, 4) * 2).exp().sin().sum()  # sin saves what exp saved: one copy
        offload.compute = second
    assert waits == {first: 1, second: 1}
    offload.compute = first
    [copy] = offload.live
    offload._load(copy)
    offload.compute = second
    waits.clear()
    del copy, loss
    assert waits == {first: 1, second: 1}
    offload.end_step()


def test_the_current_stream_is_asked_for_at_every_use(monkeypatch):
    """Backward on another stream than forward: it waits itself, and the allocator hears of it."""
    recorded = Counter()
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, s: recorded.update([s]), raising=False)
    offload = offloader(kind=LateOffload)
    x = leaf(6, 4)
    with offload:
        h = (x * 2).exp()
        loss = h.sin().sum()
        del h
    prefetch, backward = offload.compute, ComputeStream()
    load = offload._load

    def load_on_first(copy):
        offload.compute = prefetch
        data = load(copy)
        offload.compute = backward
        return data

    offload._load = load_on_first
    loss.backward()
    assert recorded[backward] > 0 and not recorded[prefetch]
    assert torch.equal(x.grad, (2 * (2 * x.detach()).exp().cos() * (2 * x.detach()).exp()))
    offload.end_step()


# --- CUDA ---


def cuda_model(checkpointing, layers=6):
    size = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": layers}
    model = tiny_model("llama", **size).to("cuda", torch.bfloat16).train()
    if checkpointing:
        enable_checkpointing(model)
    return model


def cuda_row(seed=0, lengths=(2800, 2600, 3000)):
    batch = add_scored(flatten(documents(seed, lengths)))
    return {name: v.cuda() if torch.is_tensor(v) else v for name, v in batch.items()}


def cuda_train(model, offloads, steps=3, kind=OffloadActivations, each_layer=None):
    """Gradients of the last step, and the peak of the steps after the first, in bytes."""
    device = torch.device("cuda", torch.cuda.current_device())
    offload = kind(model, decoder_layers(model), device) if offloads else None
    hooks = [m.register_forward_hook(each_layer) for m in decoder_layers(model)] if each_layer else []
    for step in range(steps):
        batch = cuda_row(step)  # another one each time: the host must not show the step before's
        model.zero_grad()
        if step == 1:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with offload or no_offload():
            loss = batch_nll_sum(model, batch, 64)
        loss.backward()
        del loss
        if offload:
            offload.end_step()
    torch.cuda.synchronize()
    for hook in hooks:
        hook.remove()
    return gradients(model), torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [True, False])
def test_cuda_gradients_are_bit_equal_and_memory_is_free(checkpointing, monkeypatch):
    # the embedding's and attention's backward add up in any order otherwise
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        plain, plain_peak = cuda_train(cuda_model(checkpointing), False)
        found, peak = cuda_train(cuda_model(checkpointing), True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    layer_input = 8400 * 256 * 2
    assert plain_peak - peak > (2 * layer_input if checkpointing else 20 * layer_input)


def assert_near(found, expected):
    """To the order of additions in bf16. A stale or half-written layer is off by its whole size."""
    for name in expected:
        difference = (found[name] - expected[name]).float().norm()
        assert difference <= 0.02 * expected[name].float().norm(), name


def sleep(*_):
    torch.cuda._sleep(20_000_000)  # some 10 ms: the host runs ahead, and copies have no excuse to be late


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [True, False])
def test_cuda_copies_wait_for_values_that_are_computed_late(checkpointing):
    plain, _ = cuda_train(cuda_model(checkpointing), False)
    found, _ = cuda_train(cuda_model(checkpointing), True, each_layer=sleep)
    assert_near(found, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [True, False])
def test_cuda_on_a_stream_that_is_not_the_default_one(checkpointing):
    plain, _ = cuda_train(cuda_model(checkpointing), False)
    model, stream = cuda_model(checkpointing), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found, _ = cuda_train(model, True, each_layer=sleep)
    torch.cuda.current_stream().wait_stream(stream)
    assert_near(found, plain)


class LateView(torch.autograd.Function):
    """Backward uses a view of what it unpacked, after the unpacked tensor itself is gone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        [x] = ctx.saved_tensors
        view = x[:, 1:]
        del x
        ctx.maybe_clear_saved_tensors()
        sleep()
        for _ in range(4):  # whatever was freed too early is taken and overwritten here
            torch.full_like(grad, float("nan"))
        return torch.cat([torch.zeros_like(grad[:, :1]), 2 * grad[:, 1:] * view], dim=1)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointed", [True, False])
def test_cuda_a_view_outlives_the_unpacked_tensor(checkpointed):
    """Also through a checkpoint whose input is a view: the recomputation gets a tensor with its strides."""

    def run(offload):
        x = torch.linspace(-1, 1, 2**20, device="cuda").view(1024, 1024).requires_grad_()
        with offload or no_offload():
            h = x * 1.5
            for _ in range(4):
                part = h.T[:, 1:]
                if checkpointed:
                    y = checkpoint(LateView.apply, part, use_reentrant=False)
                else:
                    y = LateView.apply(part)
                h = torch.nn.functional.pad(y, (1, 0)).T * 0.5 + h
            loss = h.sum()
            del h, part, y
        loss.backward()
        return x.grad

    offload = OffloadActivations(torch.nn.Module(), None, torch.device("cuda"), min_bytes=1)
    expected = run(None)
    for _ in range(3):  # pageable memory first, then the slab
        assert torch.equal(run(offload), expected)
        offload.end_step()


@pytest.mark.gpu
def test_cuda_the_slab_is_pinned_and_not_rounded_up():
    model = cuda_model(True)
    offload = OffloadActivations(model, decoder_layers(model), torch.device("cuda"))
    for _ in range(2):
        with offload:
            loss = batch_nll_sum(model, cuda_row(), 64)
        loss.backward()
        offload.end_step()
    assert offload.host.slab.is_pinned() and len(offload.host.slab) == offload.host.peak == 5 * 8400 * 512
    report = offload.report()
    assert report["pretend"] is False and report["layer_seconds"] > 0
