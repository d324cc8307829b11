"""Activation offloading: what backward needs waits in host memory instead of on the accelerator.

    compute     | layer 0 | layer 1 | layer 2 | head | layer 2' | layer 1' | layer 0' |
    to host      x0        x1
    to device                                         x1         x0

x is a layer's input; x2 stays, for it is needed at once. With gradient checkpointing x is all that a layer
saves, c N h bytes, and its copy hides behind the layer's compute; without, a layer saves some 20 times more.

Autograd gives each tensor that an operation saves to `_pack`, and calls what `_pack` returned when backward
needs the tensor (torch.autograd.graph.saved_tensors_hooks). Five rules make that exact and free the memory:
1. Storages are copied, not tensors. q, k and v are projections of one input: a copy for each would move it
   three times, and one alias left behind would keep the whole storage on the device.
2. Weights stay, as do integers (token ids, indices: the batch holds them anyway) and small storages.
3. What the last layer, the head and the loss save stays: backward asks for it at once.
4. Memory is given back only when its copy is done, and a copy is read only when it is complete.
5. Host copies belong to the graph: when autograd lets go of it, they are gone, and a step leaves nothing.

On a CPU the same bookkeeping runs with host memory on both sides, to try and to test it: a pretend device.
Sources: the idea of torch.autograd.graph.save_on_cpu; prefetch and streams as in torchtune's recipes.
"""

import weakref
from collections import defaultdict, deque
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensor  # a dry run's
from torch.autograd.graph import saved_tensors_hooks
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from common import refuse

MIN_BYTES = 2**16  # below, launching a copy costs more than it frees
ALIGNMENT = 512  # of the pieces of the slab, as CUDA aligns its own blocks


class OffloadActivations(saved_tensors_hooks):
    """Context manager around forward and loss; backward may run inside or after it.

        offload = OffloadActivations(model, layers, device)
        with offload:
            loss = model(**batch).loss
        loss.backward()
        offload.end_step()  # after a step's last backward; step_host_bytes is what it needed of the host

    Args:    model: its parameters and buffers stay where they are, also those that FSDP2 gathers.
             layers: its decoder layers, in order: what they save comes back layer by layer, one ahead of
             its use. device: the accelerator; torch.device("cpu") is the pretend device.
    Raises:  ValueError for a single layer; RuntimeError in `end_step` for host copies that outlive the step,
             and in backward for a saved tensor that was changed in place while its copy may have been under
             way, or at any time where it stayed. Writes that autograd cannot see (through .data, or by a
             foreign kernel) are not seen here either.
    """

    def __init__(self, model, layers, device):
        refuse(
            len(layers) < 2,
            f"activation offloading has nothing to move: of {len(layers)} decoder layers the last one keeps "
            "what it saves on the device. Do without it for this model.",
        )
        super().__init__(self._pack, lambda unpack: unpack())
        self.model, self.layers = model, layers
        empty = torch.empty(0, device=device)
        self.device = empty.device  # "cuda" has become "cuda:0"
        self.streams = torch.get_device_module(device)  # torch.cpu has streams and events that do nothing
        # one for each direction: the link carries both at once, and neither waits behind the other
        self.to_host, self.to_device = self.streams.Stream(), self.streams.Stream()
        self.host = _HostMemory("meta" if isinstance(empty, FakeTensor) else "cpu", device.type == "cuda")
        # Keys are storages by identity: PyTorch keeps one Python object for each, and a dead one drops out.
        self.weights = WeakIdKeyDictionary()  # storage -> True
        self.copies = WeakIdKeyDictionary()  # storage -> weak reference to its host copy
        self.live = weakref.WeakSet()  # all host copies
        # A group is what one layer saves in one forward. The count goes on: several forwards may wait.
        self.group, self.groups = 0, defaultdict(weakref.WeakSet)  # group -> its host copies
        self.in_flight = deque()  # host copies that may still be reading the device's memory
        self.step_host_bytes = 0
        self.moved_bytes = self.largest_bytes = 0  # of the latest forward, and of the one that moved most

    def __enter__(self):
        super().__enter__()
        self.layer = 0  # the one that is running; len(layers) in the head and the loss
        self.moved_bytes = 0
        self.module_hooks = [self.model.register_forward_pre_hook(self._forward_starts)]
        for i, layer in enumerate(self.layers):
            self.module_hooks.append(layer.register_forward_pre_hook(self._layer_starts))
            self.module_hooks.append(layer.register_forward_hook(partial(self._layer_ends, i)))
        return self

    def __exit__(self, *_):
        super().__exit__()
        for hook in self.module_hooks:
            hook.remove()
        self._give_back(self.group + 1)
        self.largest_bytes = max(self.largest_bytes, self.moved_bytes)

    def end_step(self):
        """After a step's last backward: check that nothing is left, and size the slab for the next step."""
        if self.live:
            raise RuntimeError(
                f"{len(self.live)} host copies, {sum(len(copy.host) for copy in self.live)} bytes, outlive "
                "the step: a graph without backward, or with retain_graph, is held. Drop its loss first."
            )
        self.groups.clear()
        self.step_host_bytes = self.host.end_step(self.streams)

    def report(self):
        """For the last page: pretend (no accelerator), offloaded_bytes of the forward that moved most,
        peak_host_bytes of all steps.
        """
        return {
            "pretend": self.device.type != "cuda",
            "offloaded_bytes": self.largest_bytes,
            "peak_host_bytes": len(self.host.slab),
        }

    def _forward_starts(self, *_):
        self._note_weights(self.model)
        self.layer = 0
        self.group += 1

    def _layer_starts(self, layer, _):
        self._note_weights(layer)

    def _layer_ends(self, i, *_):
        self._give_back(self.group)  # the copies of the layer before had this layer's compute to finish
        self.layer = i + 1
        self.group += 1

    def _note_weights(self, module):
        """FSDP2 gathers weights when their layer starts: only then do they have a storage to recognise."""
        for tensor in (*module.parameters(), *module.buffers()):
            if not hasattr(tensor, "to_local"):
                self.weights[tensor.untyped_storage()] = True

    def _stays(self, tensor):
        """Rules 2 and 3."""
        if self.layer >= len(self.layers) - 1:
            return True
        # a Parameter, a tensor that is more than a view of bytes, or one that is on the host already
        if type(tensor) not in (torch.Tensor, FakeTensor) or tensor.layout != torch.strided:
            return True
        if tensor.is_conj() or tensor.is_neg() or tensor.device != self.device:
            return True
        if not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
            return True
        storage = tensor.untyped_storage()
        return storage in self.weights or storage.nbytes() < MIN_BYTES

    def _pack(self, tensor):
        if isinstance(tensor, Parameter):  # itself: ZeRO-3 takes its values away, and brings them again
            return partial(self._unpack_kept, self.group, tensor, tensor._version)
        if self._stays(tensor):
            # Not the tensor itself: if it is its node's own output, it would hold itself, and never be freed.
            # detach() shares the storage, and the version, which grows with each change in place.
            return partial(self._unpack_kept, self.group, tensor.detach(), tensor._version)
        storage = tensor.untyped_storage()
        copy = self.copies.get(storage, lambda: None)()
        if copy is None or copy.version != tensor._version:  # new, or written to since it was copied
            copy = _HostCopy(self, tensor, self.host.take(storage.nbytes(), self.live))
            self.copies[storage] = weakref.ref(copy)
            self.live.add(copy)
            self.in_flight.append(copy)
            self.moved_bytes += storage.nbytes()
        self.groups[self.group].add(copy)
        copy.to_unpack += 1
        view = (tensor.storage_offset(), tensor.size(), tensor.stride())
        return partial(self._unpack_copied, self.group, copy, tensor.dtype, view)

    def _give_back(self, group):
        """Let go of the device memory that groups before `group` have copied."""
        while self.in_flight and self.in_flight[0].group < group:
            copy = self.in_flight.popleft()
            # where the link is slow, waiting here also bounds what is in flight to two layers
            copy.wait()
            copy.changed = copy.on_device._version != copy.version  # then the copy may hold either
            copy.on_device = None

    def _unpack_kept(self, group, tensor, version):
        self._prefetch(group)
        self._check(tensor._version != version)
        return tensor

    def _unpack_copied(self, group, copy, dtype, view):
        self._prefetch(group)
        self._check(copy.changed)
        copy.load()
        copy.wait()
        current = self.streams.current_stream()
        if current != copy.stream:
            # else the allocator would hand the memory on while this stream still reads
            copy.on_device.record_stream(current)
        storage = copy.on_device.untyped_storage()
        copy.to_unpack -= 1
        if copy.to_unpack <= 0:  # every alias is out, and autograd holds what it still needs
            copy.on_device = None  # a retained graph may ask again: the host still has the bytes
        return torch.empty(0, dtype=dtype, device=self.device).set_(storage, *view)

    def _prefetch(self, group):
        """When backward comes down to a layer: load the one before it, while this one computes."""
        self._give_back(self.group + 1)  # a backward inside the region may be earlier than its end
        for number in (group, group - 1):
            for copy in self.groups.pop(number, ()):
                copy.load()

    def _check(self, changed):
        if changed:  # autograd's own check of what it saves does not see through hooks
            raise RuntimeError(
                "a tensor that backward needs was changed in place after it was saved: its gradient would be "
                "wrong. Compute out of place, or without OffloadActivations."
            )

    def _copy(self, stream, destination, source):
        # modes off: on the pretend device MemTracker would count the host's memory as the device's
        with self.streams.stream(stream), _disable_current_modes():
            destination.copy_(source, non_blocking=True)
            return stream.record_event()


class _HostCopy:
    """One storage on the host. Alive as long as autograd holds what _pack returned for it."""

    def __init__(self, offload, tensor, host):
        self.offload, self.host = offload, host
        self.group, self.version = offload.group, tensor._version
        self.changed = False  # the tensor was written to while it was copied
        self.to_unpack = 0  # saved tensors of this storage that backward has yet to ask for
        self.on_device = tensor.detach()  # what a copy reads or has written, else None
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        self._start(offload.to_host, host, whole)

    def load(self):
        """Start the copy back to the device, unless it is on its way or there."""
        if self.on_device is None:
            self.on_device = torch.empty(len(self.host), dtype=torch.uint8, device=self.offload.device)
            self.offload.to_device.wait_event(self.done)  # a half-written host copy must not be read
            self._start(self.offload.to_device, self.on_device, self.host)

    def _start(self, side, destination, source):
        # The compute stream is asked for at every use: a user may change it between two layers, and autograd
        # sets it in backward. Its earlier work makes the values that are copied to the host, and may still be
        # reading what the memory that is written here held before.
        self.stream = self.offload.streams.current_stream()
        side.wait_event(self.stream.record_event())
        self.done = self.offload._copy(side, destination, source)

    def wait(self):
        """Before memory on the device is read or let go: its stream, and the current one, wait for the copy.

        Memory that is freed goes to the next operation of the stream that it was taken on.
        """
        self.stream.wait_event(self.done)
        self.offload.streams.current_stream().wait_event(self.done)

    def __del__(self):
        if self.on_device is not None:  # prefetched and perhaps never used
            self.wait()


class _HostMemory:
    """One pinned slab, cut from the bottom up, and used again from the bottom when no copy lives.

    One slab because PyTorch rounds each pinned block up to a power of two; registered with CUDA as it is
    for the same reason. The first step copies to ordinary memory, slower, and tells how much is needed.
    """

    def __init__(self, device, pinned):
        self.device, self.pinned = device, pinned  # a dry run's is "meta", and takes no memory
        self.slab = self._empty(0)
        self.top = self.step_peak = 0
        self.unpin = lambda: None

    def _empty(self, num_bytes):
        with _disable_current_modes():
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def take(self, num_bytes, live):
        """num_bytes of host memory, uint8, from the bottom if no copy is live.

        Earlier copies may then still be on their way out of the same bytes. They are not overwritten: the
        compute stream has waited for each of them (_HostCopy.wait), and the next copy into the slab waits
        for the compute stream. Copies into it follow one another on one stream.
        """
        start = self.top if live else 0
        self.top = start + -(-num_bytes // ALIGNMENT) * ALIGNMENT
        self.step_peak = max(self.step_peak, self.top)
        if self.top > len(self.slab):
            return self._empty(num_bytes)
        with _disable_current_modes():
            return self.slab[start : start + num_bytes]

    def end_step(self, streams):
        """Make the slab as large as any step needed so far. Returns the bytes that this one needed."""
        step_peak, self.step_peak = self.step_peak, 0
        if step_peak > len(self.slab):
            streams.synchronize()  # the device may still be reading the old slab
            self.unpin()
            self.slab = self._empty(step_peak)
            if self.pinned:
                pin_memory(self.slab.data_ptr(), len(self.slab))
                self.unpin = weakref.finalize(self, unpin_memory, self.slab.data_ptr())
        return step_peak
