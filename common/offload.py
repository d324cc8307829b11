"""Activation offloading: what backward needs waits in host memory instead of on the accelerator.

    compute     | layer 0 | layer 1 | layer 2 | head | layer 2' | layer 1' | layer 0' |
    to host      x0        x1
    to device                                         x1         x0

x is a layer's input; x2 stays, for it is needed at once. With gradient checkpointing x is all that a layer
saves, c N h bytes, and its copy hides behind the layer's compute; without, a layer saves some 20 times more.

Autograd hands each tensor that an operation saves to `_pack`, and hands what `_pack` returned to `_unpack`
when backward needs it (torch.autograd.graph.saved_tensors_hooks). Five rules make that exact and free the
memory:
1. Storages are copied, not tensors. q, k and v are projections of one input: a copy for each would move it
   three times, and one alias left behind would keep the whole storage on the device.
2. Weights stay, as do integers (token ids, indices: the batch holds them anyway) and small storages.
3. What the last layer, the head and the loss save stays: backward asks for it at once.
4. Memory is given back only when its copy is done, and a copy is read only when it is complete.
5. Host copies belong to the graph: when autograd lets go of it, they are gone, and a step leaves nothing.

On a CPU the same bookkeeping runs with host memory on both sides, to try and to test it: a pretend device.
Sources: the idea of torch.autograd.graph.save_on_cpu; prefetch and streams as in torchtune's recipes.
"""

import statistics
import time
import weakref
from collections import Counter, defaultdict, deque
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensor  # a dry run's (dry_run.py)
from torch.autograd.graph import saved_tensors_hooks
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from common import Refusal

MIN_BYTES = 2**16  # below, launching a copy costs more than it frees
ALIGNMENT = 512  # of the pieces of the slab, as CUDA aligns its own blocks


@dataclass(slots=True)
class _Saved:
    """What autograd keeps in a saved tensor's place: the tensor, or a view of a host copy."""

    group: int
    version: int  # the tensor's; it grows with each change in place
    tensor: torch.Tensor | None = None
    copy: "_HostCopy | None" = None
    dtype: torch.dtype | None = None
    view: tuple = ()  # offset, size, stride


class _HostCopy:
    """One storage on the host. Alive as long as autograd holds a _Saved of it."""

    def __init__(self, offload, host, version):
        self.offload, self.host, self.num_bytes, self.version = offload, host, len(host), version
        self.stored = self.loaded = None  # events: the copy to the host, and back, is complete
        self.changed = False  # the tensor was written to while it was copied
        self.data = self.stream = None  # back on the device, and the stream that its memory was taken on
        self.aliases = self.to_unpack = (
            0  # saved tensors of this storage; those that backward has yet to ask for
        )

    def __del__(self):
        if self.data is not None:
            # prefetched and perhaps never used: the copy may still be writing into what is freed here, and
            # reading what the current stream's next copy to the host may overwrite
            self.stream.wait_event(self.loaded)
            self.offload.streams.current_stream().wait_event(self.loaded)


def _backward_id():
    """Names the backward that is running, -1 outside of any (autograd has no public word for it)."""
    return torch._C._current_graph_task_id()


class OffloadActivations:
    """Context manager around forward and loss; backward may run inside or after it.

        offload = OffloadActivations(model, layers, device)
        with offload:
            loss = model(**batch).loss
        loss.backward()
        offload.end_step()  # after each step

    Args:    model: its parameters and buffers stay where they are, also those that FSDP2 gathers.
             layers: its decoder layers, in order: what they save comes back layer by layer, one ahead of
             its use. None: each saved tensor counts as a layer, and none as the last one.
             device: the accelerator; torch.device("cpu") is the pretend device.
             min_bytes: smaller storages stay (MIN_BYTES). keep_layers: what so many of the last layers save
             stays.
    Raises:  ValueError if keep_layers leaves nothing to offload; RuntimeError for a `with` inside another; in
             `end_step` for host copies that outlive the step; and in backward for a saved tensor that was
             changed in place while its copy may have been under way, or at any time where it stayed. Writes
             that autograd cannot see (through .data, or by a foreign kernel) are not seen here either.
    """

    active = None  # the one that is entered; keep_on_device asks for it

    def __init__(self, model, layers, device, *, min_bytes=None, keep_layers=1):
        if layers is not None and len(layers) <= keep_layers:
            raise Refusal(
                f"activation offloading has nothing to move: of {len(layers)} decoder layers the last "
                f"{keep_layers} keep what they save on the device. Do without it for this model."
            )
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.model, self.layers, self.device = model, layers, device
        self.min_bytes = MIN_BYTES if min_bytes is None else min_bytes
        self.keep_layers = keep_layers
        self.streams = torch.get_device_module(device)  # torch.cpu has streams and events that do nothing
        # one for each direction: the link carries both at once, and neither waits behind the other
        self.to_host, self.to_device = self.streams.Stream(), self.streams.Stream()
        self.host = _HostMemory(pinned=device.type == "cuda")
        # Keys are storages by identity: PyTorch keeps one Python object for each, and a dead one drops out.
        self.weights = WeakIdKeyDictionary()  # storage -> True
        self.copies = WeakIdKeyDictionary()  # storage -> weak reference to its host copy
        self.live = weakref.WeakSet()  # all host copies
        # A group is what one layer saves in one forward. The count goes on: several forwards may wait.
        self.group, self.groups = 0, defaultdict(weakref.WeakSet)  # group -> its host copies
        self.in_flight = deque()  # (group, stream, tensor, host copy): a copy may still be reading the tensor
        self.backward = self.lowest_group = None  # the id of the latest backward, and how far down it is
        self.keeping = False  # inside keep_on_device
        self.marks, self.bytes = [], Counter()  # this forward's layer times; its bytes, moved and kept
        self.largest_marks, self.largest, self.largest_rank = [], Counter(), (False, 0)
        self.step_host_bytes = 0

    # The region: hooks in, hooks out.

    def __enter__(self):
        if OffloadActivations.active is not None:
            raise RuntimeError("OffloadActivations inside another: autograd would ask the inner one only.")
        self.bytes, self.marks, self.layer = Counter(), [], 0
        self.stayed = WeakIdKeyDictionary()  # storage -> reason
        self.hooks = saved_tensors_hooks(self._pack, self._unpack)
        self.hooks.__enter__()
        OffloadActivations.active = self
        self._note_weights(self.model)
        self.module_hooks = [self.model.register_forward_pre_hook(self._forward_starts)]
        for i, layer in enumerate(self.layers or ()):
            self.module_hooks.append(layer.register_forward_pre_hook(partial(self._layer_starts, i)))
            self.module_hooks.append(layer.register_forward_hook(partial(self._layer_ends, i)))
        return self

    def __exit__(self, *_):
        OffloadActivations.active = None
        self.hooks.__exit__()
        for hook in self.module_hooks:
            hook.remove()
        self._give_back(self.group + 1)
        # the first step's copies to ordinary memory make the host wait, and its layers seem slow
        rank = (len(self.host.slab) > 0, self.bytes["offloaded"])
        if rank >= self.largest_rank:
            self.largest_rank, self.largest, self.largest_marks = rank, self.bytes, self.marks

    def end_step(self):
        """After a step's last backward: check that nothing is left, and size the slab for the next step."""
        if self.live:
            raise RuntimeError(
                f"{len(self.live)} host copies, {sum(copy.num_bytes for copy in self.live)} bytes, outlive "
                "the step: a graph without backward, or with retain_graph, is held. Drop its loss first."
            )
        self.groups.clear()
        self.step_host_bytes = self.host.end_step(self.streams)

    def _note_weights(self, module):
        """FSDP2 gathers weights when their layer starts: only then do they have a storage to recognise."""
        for tensors in (module.parameters(), module.buffers()):
            for tensor in tensors:
                if not hasattr(tensor, "to_local"):
                    self.weights[tensor.untyped_storage()] = True

    def _forward_starts(self, *_):
        self._note_weights(self.model)
        self.layer = 0
        self.group += 1

    def _layer_starts(self, i, layer, _):
        if _backward_id() == -1:  # else a checkpointed layer is computed again, with backward in the region
            self.layer = i
            self._note_weights(layer)
            self.marks.append(self._mark())

    def _layer_ends(self, i, *_):
        if _backward_id() == -1:
            self.marks.append(self._mark())
            self._give_back(self.group)  # the copies of the layer before had this layer's compute to finish
            self.layer = i + 1
            self.group += 1

    # Forward: device -> host.

    def _pack(self, tensor):
        reason = self._why_stay(tensor)
        if reason is not None:
            return self._keep(tensor, reason)
        if self.layers is None:
            self._give_back(self.group)
            self.group += 1
        storage = tensor.untyped_storage()
        copy = self.copies.get(storage, lambda: None)()
        if copy is None or copy.version != tensor._version:  # new, or written to since it was copied
            copy = self._store(tensor, storage)
        self.groups[self.group].add(copy)
        copy.aliases += 1
        copy.to_unpack += 1
        view = (tensor.storage_offset(), tensor.size(), tensor.stride())
        return _Saved(self.group, tensor._version, copy=copy, dtype=tensor.dtype, view=view)

    def _why_stay(self, tensor):
        if _backward_id() != -1:
            return "backward"  # a layer computed again: what it saves is used at once
        if (
            type(tensor) not in (torch.Tensor, torch.nn.Parameter, FakeTensor)
            or tensor.layout != torch.strided
        ):
            return "kind"
        if tensor.device != self.device:
            return "elsewhere"
        storage = tensor.untyped_storage()
        if storage in self.weights:
            return "weights"
        if storage in self.stayed:
            return self.stayed[storage]  # saved before, and stayed: a copy of it would free nothing
        if not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
            return "integers"
        if tensor.is_conj() or tensor.is_neg():
            return "kind"  # their values are not those of their bytes
        if storage.nbytes() < self.min_bytes:
            return "small"
        if self.layers is not None and self.layer >= len(self.layers) - self.keep_layers:
            return "last layers" if self.layer < len(self.layers) else "head and loss"
        return "kept on device" if self.keeping else None

    def _keep(self, tensor, reason):
        """Pack the tensor as it is; count its storage, once, if it is an activation that could have moved."""
        if reason not in ("backward", "kind", "elsewhere", "weights", "integers"):
            storage = tensor.untyped_storage()
            if storage not in self.stayed:
                self.stayed[storage] = reason
                self.bytes[reason] += storage.nbytes()
        # Not the tensor itself: if it is its node's own output, it would hold itself, and never be freed.
        # detach() shares the storage, and the version that _unpack checks.
        return _Saved(self.group, tensor._version, tensor=tensor.detach())

    def _store(self, tensor, storage):
        """Start the copy of a whole storage to the host."""
        copy = _HostCopy(self, self.host.take(storage.nbytes(), self.live), tensor._version)
        source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        # its values must be there before they are copied. The current stream is asked for at every use:
        # a user may change it between two layers, and autograd sets it in backward.
        current = self.streams.current_stream()
        self.to_host.wait_event(current.record_event())
        copy.stored = self._copy(self.to_host, copy.host, source)
        self.in_flight.append((self.group, current, tensor.detach(), copy))
        self.copies[storage] = weakref.ref(copy)
        self.live.add(copy)
        self.bytes["offloaded"] += copy.num_bytes
        return copy

    def _copy(self, stream, destination, source):
        # modes off: on the pretend device MemTracker would count the host's memory as the device's
        with self.streams.stream(stream), _disable_current_modes():
            destination.copy_(source, non_blocking=True)
            return stream.record_event()

    def _give_back(self, group):
        """Let go of the device memory that groups before `group` have copied."""
        while self.in_flight and self.in_flight[0][0] < group:
            _, stream, tensor, copy = self.in_flight.popleft()
            # Freed memory goes to the next operation of its stream, which must not write before the copy
            # has read. Where the link is slow, waiting here also bounds what is in flight to two layers.
            stream.wait_event(copy.stored)
            self.streams.current_stream().wait_event(copy.stored)
            copy.changed = tensor._version != copy.version  # then the copy may hold either; see _unpack

    # Backward: host -> device.

    def _unpack(self, saved):
        self._prefetch(saved.group)
        copy = saved.copy
        changed = copy.changed if copy else saved.tensor._version != saved.version
        if changed:  # autograd's own check of what it saves does not see through hooks
            raise RuntimeError(
                "a tensor that backward needs was changed in place after it was saved: its gradient would be "
                "wrong. Compute out of place, or without OffloadActivations."
            )
        if copy is None:
            return saved.tensor
        data = self._load(copy)
        current = self.streams.current_stream()
        current.wait_event(copy.loaded)  # the values must have arrived before they are read
        if current != copy.stream:
            # else the allocator would hand the memory on while this stream still reads
            data.record_stream(current)
        tensor = torch.empty(0, dtype=saved.dtype, device=data.device)
        tensor.set_(data.untyped_storage(), *saved.view)
        copy.to_unpack -= 1
        if copy.to_unpack == 0:
            # Every alias is out, and autograd holds what it still needs. If the graph is retained, another
            # backward will ask for all of them again, and the host still has the bytes.
            copy.data, copy.to_unpack = None, copy.aliases
        return tensor

    def _prefetch(self, group):
        """When a backward comes down to a layer: load the one before it, while this one computes."""
        if _backward_id() != self.backward or group < self.lowest_group:
            self.backward, self.lowest_group = _backward_id(), group
            for number in (group, group - 1):
                for copy in list(self.groups.get(number, ())):
                    self._load(copy)

    def _load(self, copy):
        """Start the copy of a storage back to the device, unless it is on its way or there."""
        if copy.data is None:
            # Taken on the compute stream, where it will be read and freed ...
            copy.data = torch.empty(copy.num_bytes, dtype=torch.uint8, device=self.device)
            copy.stream = self.streams.current_stream()
            # ... whose earlier work may still be reading what this memory held before
            self.to_device.wait_event(copy.stream.record_event())
            self.to_device.wait_event(copy.stored)  # a half-written host copy must not be read
            copy.loaded = self._copy(self.to_device, copy.data, copy.host)
        return copy.data

    # Accounting.

    def _mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def report(self):
        """Bytes and layer times of the forward that moved most.

        Returns: pretend (no accelerator), offloaded_bytes, bytes_per_layer, stayed_bytes {reason: bytes},
                 peak_host_bytes (of all steps), layer_seconds (median of a layer's forward; on the pretend
                 device its copies included).
        """
        pairs = list(zip(self.largest_marks[::2], self.largest_marks[1::2]))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            seconds = [start.elapsed_time(end) / 1000 for start, end in pairs]
        else:
            seconds = [end - start for start, end in pairs]
        offloaded = self.largest["offloaded"]
        return {
            "pretend": self.device.type != "cuda",
            "offloaded_bytes": offloaded,
            "bytes_per_layer": offloaded / (len(self.layers) - self.keep_layers) if self.layers else 0,
            "stayed_bytes": {name: n for name, n in self.largest.items() if name != "offloaded"},
            "peak_host_bytes": self.host.peak,
            "layer_seconds": statistics.median(seconds or [0.0]),
        }


@contextmanager
def keep_on_device():
    """A region whose saved tensors stay: the head and the loss, say. Without offloading, does nothing."""
    offload = OffloadActivations.active
    if offload is None:
        yield
        return
    # A flag, and no hooks of its own: inside a checkpointed function those would hide tensors from the
    # checkpoint, which counts what is saved, and takes one for another when it computes them again.
    before, offload.keeping = offload.keeping, True
    try:
        yield
    finally:
        offload.keeping = before


class _HostMemory:
    """One pinned slab, cut from the bottom up, and used again from the bottom when no copy lives.

    One slab because PyTorch rounds each pinned block up to a power of two; registered with CUDA as it is
    for the same reason. The first step copies to ordinary memory, slower, and tells how much is needed.
    """

    def __init__(self, pinned):
        self.pinned, self.slab = pinned, torch.empty(0, dtype=torch.uint8)
        self.top = self.step_peak = self.peak = 0
        self.unpin = lambda: None

    def take(self, num_bytes, live):
        """num_bytes of host memory, uint8, from the bottom if no copy is live.

        Earlier copies may then still be on their way out of the same bytes. They are not overwritten: the
        compute stream has waited for each of them (in _unpack, or in __del__ if nobody used it), and the
        next copy into the slab waits for the compute stream. Copies into it follow one another on one stream.
        """
        if not live:
            self.top = 0
        start = self.top
        self.top += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        self.step_peak = max(self.step_peak, self.top)
        with _disable_current_modes():
            if self.top <= len(self.slab):
                return self.slab[start : start + num_bytes]
            return torch.empty(num_bytes, dtype=torch.uint8)

    def end_step(self, streams):
        """Make the slab as large as any step needed so far. Returns the bytes that this one needed."""
        step_peak, self.step_peak = self.step_peak, 0
        self.peak = max(self.peak, step_peak)
        if self.peak > len(self.slab):
            streams.synchronize()  # the device may still be reading the old slab
            self.unpin()
            with _disable_current_modes():
                self.slab = torch.empty(self.peak, dtype=torch.uint8)
            if self.pinned:
                pin_memory(self.slab.data_ptr(), len(self.slab))
                self.unpin = weakref.finalize(self, unpin_memory, self.slab.data_ptr())
        return step_peak
