"""The memory ledger: the bytes that a training step holds, measured, or counted without a GPU.

A dry run takes the script's own step on tensors that have shapes and no storage, and counts bytes as a real
run does.
"""

import itertools
import math
import resource
import sys
import traceback
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.distributed._tools.mem_tracker import MemTracker  # private: the only exact counter on a CPU
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from tqdm import tqdm

from common import Refusal, refuse, terminal_width, wrapped
from common.exactness import refusals_of
from common.logps import two_chunks_only

GIB = 2**30


def _local(tensor):
    """This rank's part of a sharded tensor (DTensor); the tensor itself otherwise."""
    return getattr(tensor, "_local_tensor", tensor)  # many times as fast as to_local(), each step


def _bytes(tensors):
    return sum(_local(t).numel() * t.element_size() for t in tensors)


def _pinning(model, others):
    """What page-locked memory takes beyond the bytes of weights and gradients.

    torch gives each tensor a power of two (ATen/core/CachingHostAllocator.h).
    """
    gradients = [p for p in model.parameters() if p.requires_grad]
    waiting = [*gradients, *(p for each in (model, *others) for p in each.parameters())]
    return sum(2 ** (size - 1).bit_length() - size for size in (_bytes([p]) for p in waiting) if size)


def is_fsdp(module):
    return hasattr(module, "_get_fsdp_state")


def _gather_buffer_bytes(model):
    """What FSDP2's latest gather came in: it lives until the next one."""
    if not is_fsdp(model):
        return 0
    latest = model._get_fsdp_state()._comm_ctx.all_gather_state
    return latest.all_gather_result.all_gather_output.untyped_storage().nbytes() if latest else 0


def _largest_visit(model):
    """Of the FSDP2 unit whose weights are the most: bytes of this rank's shards; and of them gathered."""
    units = [module._get_fsdp_state()._fsdp_param_group for module in model.modules() if is_fsdp(module)]
    return max(
        (
            _bytes(each.sharded_param for each in unit.fsdp_params),
            sum(
                each._orig_size.numel() * (each.param_dtype or each.orig_dtype).itemsize
                for each in unit.fsdp_params
            ),
        )
        for unit in units
    )


class ByteCounter(MemTracker):
    """MemTracker without its statistics of each module: the same bytes, in a tenth of the time.

    Those also refuse a second forward in one step, and leave callbacks behind where no backward follows.
    Autograd adds up gradients in place, except where a dispatch mode like this one looks on: the peak leaves
    out the old sum, which is freed at once.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        self.adds_up = in_backward and func is torch.ops.aten.add.Tensor
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _update_peak_stats(self, peak_state):
        if not self.adds_up:
            super()._update_peak_stats(peak_state)

    def _pre_fw_hook(self, *_):
        pass

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook

    def peak_bytes(self, device):
        return self._peak_mem[device]


class MemoryMeter:
    """Measures training steps: on CUDA all, by the allocator's statistics; on a CPU one, by MemTracker.

    Args:    model, optimizer; device: where the model runs; track: count on a CPU as well (slows that step).
             track_step: which call of `step` MemTracker watches; the second one finds the optimizer's state
             there. offload: an OffloadActivations, for on_host. others: further, frozen models, or None.
             state_on_host: whether weights, gradients and optimizer states wait there.
    After:   measured: the most that any measured step held, in bytes of this rank: parameters, gradients,
             optimizer, and if steps were measured activations (held when the loss head starts), loss_head
             (its own peak beyond that) and peak; peak_moment: in which part of the step it was.
    """

    def __init__(
        self,
        model,
        optimizer,
        device,
        track=False,
        track_step=2,
        offload=None,
        others=(),
        state_on_host=False,
    ):
        self.model, self.optimizer, self.device, self.offload = model, optimizer, device, offload
        self.track, self.track_step, self.calls = track and device.type == "cpu", track_step, 0
        self.others, self.tracker = [model for model in others if model is not None], None
        # on a CPU, the device and its host are one
        self.state_on_host = state_on_host and device.type == "cuda"
        self.measured, self.peak_moment = {}, ""
        self.counting = False  # whether MemTracker watched the latest step

    @contextmanager
    def step(self, batches):
        """Wrap one optimizer step: forwards, backwards and update; batches: its inputs, dicts of tensors.

        A step without an update has computed nothing: it measures nothing.
        """
        self.counting = self.track and self.calls + 1 == self.track_step
        measures = self.counting or self.device.type == "cuda"
        now = defaultdict(int)  # bytes by name
        hooks = [self.optimizer.register_step_pre_hook(lambda *_: self._before_update(now))]
        if measures:
            hooks += self._phase_hooks(now)
        if self.counting:
            self.tracker = ByteCounter()
            tensors = [v for batch in batches for v in batch.values() if torch.is_tensor(v)]
            self.tracker.track_external(self.model, *self.others, self.optimizer, *tensors)
        try:
            with self.tracker or nullcontext():
                if measures:
                    self._reset_peak()
                yield
                if measures:
                    self._note_peak(now, "in the optimizer's step")
        finally:
            for hook in hooks:
                hook.remove()
            self.tracker = None
        if "gradients" not in now:  # no update
            self.counting = False
            return
        self.calls += 1
        states = [v for state in self.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        now |= {"parameters": _bytes(self.model.parameters()), "optimizer": _bytes(states)}
        if self.others:
            now["reference"] = _bytes(p for model in self.others for p in model.parameters())
        if self.offload is not None and measures:
            now["on_host"] = self.offload.step_host_bytes
        self.measured = {name: max(n, self.measured.get(name, 0)) for name, n in now.items()} | {
            name: n for name, n in self.measured.items() if name not in now
        }

    def peak_bytes(self):
        """The highest of all steps so far, for run.log; None on a CPU, where the resident size tells more."""
        return self.measured.get("peak") if self.device.type == "cuda" else None

    def ledger(self):
        """Rows for summary.json and the screen."""
        counts = self.measured
        if self.state_on_host:
            counts = move_state(counts, self.model, self.others)
        return ledger(counts, self.peak_moment)

    def _before_update(self, now):
        now["gradients"] = _bytes(p.grad for p in self.model.parameters() if p.grad is not None)
        if "peak" in now:
            self._note_peak(now, "in a backward")

    def _phase_hooks(self, now):
        start = {}

        def forward_starts(*_):  # by now FSDP has gathered the outer weights: they are no activations
            self._note_peak(now, "in a backward")
            start["forward"] = self._allocated() - _gather_buffer_bytes(self.model)

        def head_starts(*_):
            self._note_peak(now, "in a forward")
            start["head"] = self._reset_peak()
            held = start["head"] - _gather_buffer_bytes(self.model)
            now["activations"] = max(now["activations"], held - start["forward"])

        def head_ends(*_):
            now["loss_head"] = max(now["loss_head"], self._peak() - start["head"])
            self._note_peak(now, "in the loss head")

        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        return [
            embedding.register_forward_pre_hook(forward_starts),
            head.register_forward_pre_hook(head_starts),
            head.register_forward_hook(head_ends),
        ]

    def _note_peak(self, now, moment):
        if self._peak() > max(now["peak"], self.measured.get("peak", 0)):
            self.peak_moment = moment
        now["peak"] = max(now["peak"], self._peak())

    def _allocated(self):
        if self.tracker is None:
            return torch.cuda.memory_allocated(self.device)
        return self.tracker.get_tracker_snapshot("current")[self.device]["Total"]

    def _peak(self):
        if self.tracker is None:
            return torch.cuda.max_memory_allocated(self.device)
        return self.tracker.peak_bytes(self.device)

    def _reset_peak(self):
        """Forget the peak so far; returns the bytes allocated now."""
        if self.tracker is None:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.tracker._peak_mem[self.device] = self._allocated()
        return self._allocated()


def peak_memory_bytes(device):
    """Highest so far: on CUDA allocated by tensors, on a CPU resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- The table ---

# What decides a row, and what makes it smaller; names as in MemoryMeter.measured, and of GRPO.
WORDS = {
    "parameters": ("this rank's share of the weights", "more ranks"),
    "reference": ("a second model's weights", "--precompute_ref_log_probs, more ranks"),
    "gradients": ("4 bytes for each trained weight", "more ranks, frozen layers"),
    "bucket": ("gradients on their way to their shards", "reduce_bucket_size"),
    "optimizer": ("fp32 states of the trained weights", "more ranks, frozen layers"),
    "visiting_weights": ("the largest unit's, in fp32 and gathered", ""),
    "activations": ("kept for backward when the head starts", "checkpointing, offloading, shorter rows"),
    "loss_head": ("a chunk's logits, the head's gradient", "--loss_chunk_size"),
    "state_on_host": ("weights, gradients, optimizer that wait", "more ranks"),
    "on_host": ("activations that waited on the host", ""),
    "rollout_weights": ("whole at once in a rollout", "--gather_budget_gib"),
    "kv_cache": ("keys and values of all completions", "fewer or shorter completions"),
    "reference_on_host": ("the reference's shards", "more ranks"),
}


STATE = ("parameters", "reference", "gradients", "optimizer")  # held throughout, and divided by the ranks


def move_state(counts, model, others):
    """The state in one row, that of the host; and a row of what of it visits the device at once."""
    moved = sum(counts.get(name, 0) for name in STATE) + _pinning(model, others)
    rows = {"visiting_weights": sum(_largest_visit(model)), "state_on_host": moved}
    return {name: n for name, n in counts.items() if name not in STATE} | rows


def ledger(counts, peak_moment):
    """{name: bytes} -> rows for summary.json and the screen: name, bytes, decided_by, made_smaller_by."""
    words = WORDS | {"peak": (peak_moment, "what makes that moment's rows smaller")}
    return [
        {"name": name, "bytes": counts[name], "decided_by": decided_by, "made_smaller_by": smaller}
        for name, (decided_by, smaller) in words.items()
        if name in counts
    ]


def shown_gib(num_bytes):
    gib = num_bytes / GIB
    return f"{gib:.2f}" if gib >= 0.1 else f"{gib:.4f}"  # of a model of a few megabytes


def format_ledger(title, rows):
    """The table that a run ends with; on a narrow terminal in two lines for each row."""
    wide = terminal_width() >= 110
    between = "" if wide else f"\n{'':<20}smaller by: "
    lines = [f"memory ledger  {title}"]
    lines.append(f"{'':<18}{'GiB':>10}   {'decided by':<40}{'made smaller by' if wide else ''}".rstrip())
    for row in rows:
        name, shown = row["name"].replace("_", " "), shown_gib(row["bytes"])
        smaller = row["made_smaller_by"] and between + row["made_smaller_by"]
        lines.append(f"{name:<18}{shown:>10}   {row['decided_by']:<{40 if wide else 0}}{smaller}".rstrip())
    if not any(row["name"] == "peak" for row in rows):
        lines.append("activations and peak: not measured; on a CPU --measure_memory counts one,")
        lines.append("slower, step")
    return "\n".join(lines)


# --- Memory before the GPU ---


class PretendedRun:
    """Stands in for a run.Run where tensors have no values: its numbers are ones that nobody needs."""

    rank, pretends = 0, True

    def __init__(self, world, mesh):
        self.world, self.mesh, self.device = world, mesh, torch.device("cpu")

    def sum(self, values):
        return dict.fromkeys(values, 1.0)

    max = sum

    def value(self, tensor):
        return 1.0

    def to_device(self, batch):
        return batch

    def watch(self, phase):
        pass


@contextmanager
def plans_uncounted():
    """Hide from counters what DTensor plans an operation with: pretended tensors of whole size."""
    plan = ShardingPropagator._propagate_tensor_meta_non_cached

    def plan_uncounted(*args):
        with _disable_current_modes():
            return plan(*args)

    ShardingPropagator._propagate_tensor_meta_non_cached = plan_uncounted
    try:
        yield
    finally:
        ShardingPropagator._propagate_tensor_meta_non_cached = plan


@contextmanager
def pretend(args, sharded):
    """Inside, new tensors are pretended ones, on a pretended CPU. Yields a PretendedRun.

    Real tensors may join them, and those that Python has to read (a row's boundaries) should stay real.

    Args:   sharded: whether FSDP2 shards on args.dry_run_world_size ranks.
    Raises: ValueError for a model that looks at its tensors' values to decide what to compute.
    """
    world, mesh = args.dry_run_world_size, None
    if sharded:
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        mesh = init_device_mesh("cpu", (world,))
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        # The cache, which makes the rest twice as fast, would keep each storage alive that offloading sets.
        mode.cache_enabled = not args.activation_offloading
        with plans_uncounted(), two_chunks_only(), mode:
            yield PretendedRun(world, mesh)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        # the innermost line that is not torch's own: the model's, or the script's
        torchs_own = str(Path(torch.__file__).parent)
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if not f.filename.startswith(torchs_own) and f.name != "__torch_dispatch__"]
        line = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}"
        raise Refusal(
            f"--dry_run has tensors without values, and this line reads one ({error}):\n{line}"
        ) from error
    finally:
        if sharded:
            dist.destroy_process_group()


def count_step(step, batches, model, optimizer, offload=None, others=(), state_on_host=False):
    """Count step(), an optimizer step over batches, on pretended tensors or on real ones.

    Args:    state_on_host: count for a device on which weights, gradients and optimizer states are not. They
             are here, so that they are taken off the peak: with two batches, all gradients are a part of it.
    Returns: {name: bytes}, and the moment of the peak.
    """
    for parameter in model.parameters():  # the first step makes AdamW's moments: count a later one
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    device = next(model.parameters()).device
    meter = MemoryMeter(model, optimizer, device, True, 1, offload, others)
    with meter.step(batches), refusals_of(model, "The dry run cannot go on."):
        step()
    counts = meter.measured
    if state_on_host:
        assert len(batches) > 1
        # a layer's shards visit the device in fp32, before they are cast and gathered
        counts["peak"] += _largest_visit(model)[0] - sum(counts.get(name, 0) for name in STATE)
        counts = move_state(counts, model, meter.others)
    return counts, meter.peak_moment


def single_changes(args, switches, size, others):
    """What `dry_run` may change: {what one would type: {flag: value}}.

    Args:    switches: flags to turn on, the cheapest first; the host's memory comes last. size: sequences in
             a forward. others: numbers to halve.
    Returns: changes that leave a step's batch what it is, the cheapest first; and those that do not.
    """
    last = ("activation_offloading", "offload_param")
    changes = {f"--{name}": {name: True} for name in switches}
    changes["--loss_chunk_size 128"] = {"loss_chunk_size": 128}
    if size > 1:  # the same step, of more forwards
        forwards = size * args.gradient_accumulation_steps
        text = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {forwards}"
        changes[text] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": forwards}
    changes |= {f"--{name}": {name: True} for name in last}
    halves = {name: getattr(args, name) // 2 for name in others if getattr(args, name)}
    return changes, {f"--{name} {half}": {name: half} for name, half in halves.items()} | more_ranks(args)


def more_ranks(args):
    ranks = 2 * args.dry_run_world_size
    return {f"{ranks} ranks": {"dry_run_world_size": ranks}}


# What `dry_run` leaves free of a card for what it does not count: a guess, not a measurement.
CONTEXT_BYTES, GAPS = GIB, 0.05  # CUDA context and NCCL; gaps between the allocator's blocks


class DryRun:
    """Counts pretended steps, each of them once.

    Args: args: the script's Arguments. check: raises Refusal for wrong ones. count: function of Arguments:
          {name: bytes} of one rank, among them "peak", and when the peak is.
    """

    def __init__(self, args, check, count):
        self.args, self.check, self.count, self.known = args, check, count, {}
        self.usable = None
        if args.gpu_memory_gib is not None:
            self.usable = args.gpu_memory_gib * GIB * (1 - GAPS) - CONTEXT_BYTES
            small = (
                f"--gpu_memory_gib {args.gpu_memory_gib:g}: {CONTEXT_BYTES / GIB:g} GiB are left free for "
            )
            refuse(self.usable <= 0, f"{small}what is not counted, and then there is nothing: give more.")

    def counts(self, change):
        """counts and moment with {flag: value} changed; None where that is refused, or changes nothing."""
        changed = replace(self.args, **change)
        useless = change and changed == self.args or not self.allows(change)
        return None if useless else self._counted(changed)

    def allows(self, change):
        """Whether the script takes {flag: value}."""
        try:
            self.check(replace(self.args, **change))
        except Refusal:
            return False
        return True

    def _counted(self, args):
        key = repr(args)
        if key not in self.known:
            self.known[key] = self.count(args)
        return self.known[key]

    def peak(self, change):
        return self.counts(change)[0]["peak"]

    def savings(self, changes):
        """Yields what one would type, and bytes less at the peak; not what changes less than a thousandth."""
        peak = self.peak({})
        for text, change in tqdm(changes.items(), "Flags that may save memory", leave=False):
            if self.counts(change) and abs(peak - self.peak(change)) > peak / 1000:
                yield text, peak - self.peak(change)

    def state(self, change=()):
        """Bytes that are held throughout a step, however short the sequences."""
        counts = self.counts(dict(change))
        return sum(counts[0].get(name, 0) for name in (*STATE, "bucket")) if counts else math.inf

    def helping(self, changes, host_flags):
        """Those of host_flags that move enough of the state to the host."""
        return [text for text in host_flags if text in changes and self.state(changes[text]) <= self.usable]

    def cheapest_set(self, changes, host_flags):
        """The first of `changes`, from the cheapest on, that fit together; without those that need not be.
        Where the state alone does not fit, the first of host_flags comes first with which it does.

        Returns: what one would type; None where all of them do not fit.
        """

        def fits(texts):
            change = together(texts, changes)
            return self.counts(change) and self.peak(change) <= self.usable

        first = self.helping(changes, host_flags)[:1] if self.state() > self.usable else []
        taken = []
        for text in tqdm([*first, *(text for text in changes if text not in first)], "Sets", leave=False):
            tried = [*taken, text]
            change = together(tried, changes)
            if self.counts(change) and self.peak(change) <= self.peak(together(taken, changes)):
                taken = tried
                if fits(taken):
                    break
        else:
            return None
        for text in sorted(taken[:-1], key=list(changes).index, reverse=True):
            fewer = [each for each in taken if each != text]
            taken = fewer if fits(fewer) else taken
        return sorted(taken, key=list(changes).index)

    def described(self, texts, changes):
        """A set of changes for the screen, with the bytes of the host that it asks for."""
        if not texts:
            return "none"
        counts, _ = self.counts(together(texts, changes))
        on_host = host_bytes(counts)
        return " ".join(texts) + (f", and {gibibytes(on_host)} of the host's memory" if on_host else "")

    def longest(self, flag, most, change):
        """The largest value of `flag`, up to `most`, with which a step with `change` fits; 0 for none."""
        lengths = [*range(64, most, 64), most]  # growing, and the peak with them
        lengths = [length for length in lengths if self.allows(change | {flag: length})]

        def peak_at(length):
            return self._counted(replace(self.args, **change, **{flag: length}))[0]["peak"]

        if not lengths or peak_at(lengths[0]) > self.usable:
            return 0
        if peak_at(lengths[-1]) <= self.usable:
            return lengths[-1]
        fits, beyond = 0, len(lengths) - 1
        for straight in itertools.cycle((True, True, False)):
            if beyond - fits == 1:
                return lengths[fits]
            # Long rows' peaks lie on a straight line: try where it crosses the limit. They may not: then
            # halves of what is left come to an end.
            low, high = peak_at(lengths[fits]), peak_at(lengths[beyond])
            share = (self.usable - low) / (high - low) if straight else 0.5
            tried = min(max(fits + int(share * (beyond - fits)), fits + 1), beyond - 1)
            fits, beyond = (tried, beyond) if peak_at(lengths[tried]) <= self.usable else (fits, tried)


def together(texts, changes):
    """The changes of several texts as one."""
    return {name: value for text in texts for name, value in changes[text].items()}


def host_bytes(counts):
    return sum(num_bytes for name, num_bytes in counts.items() if name.endswith("on_host"))


def gibibytes(num_bytes):
    """In both units: what a card is called by is not always what it has."""
    return f"{num_bytes / GIB:.2f} GiB ({num_bytes / 1e9:.1f} GB)"


def answer(found, what, changes, host_flags):
    """Sentences: what a step takes, whether that fits, and what cannot be made smaller; see `dry_run`."""
    args, (counts, moment) = found.args, found.counts({})
    world = args.dry_run_world_size
    where = "one GPU" if world == 1 else f"each of {world} GPUs"
    yield f"A step over {what} takes {gibibytes(counts['peak'])} of {where}; the peak is {moment}."
    if on_host := host_bytes(counts):
        yield f"For each GPU, its host's memory holds {gibibytes(on_host)} more."
    if found.usable is None:
        return
    room = args.gpu_memory_gib * GIB - found.usable
    verdict = "fits into" if counts["peak"] <= found.usable else "does not fit into"
    yield (
        f"It {verdict} {gibibytes(args.gpu_memory_gib * GIB)}, of which {room / GIB:.1f} GiB are left free "
        "for what is not counted: CUDA context, NCCL, gaps between the allocator's blocks (a guess)."
    )
    if found.state() > found.usable:
        of_each_rank = counts.get("bucket", 0)
        divided = world * (found.state() - of_each_rank)
        needs = [f"{math.ceil(divided / (found.usable - of_each_rank))} ranks at least"]
        if of_each_rank >= found.usable:
            needs = ["a larger GPU"]
        yield (
            f"Weights, gradients and optimizer alone take {gibibytes(found.state())}, however short the "
            f"sequences are: {', or '.join([*needs, *found.helping(changes, host_flags)])}."
        )


def dry_run(found, changes, others, *, what, host_flags, length_flag, most):
    """Print what a step takes, and the ledger.

    With --gpu_memory_gib also whether that fits, with which flags it does, and the longest sequences that fit
    then; without it, and where no flags help, what each one saves.

    Args:    found: a DryRun. changes, others: {what one would type: {flag: value}}, the cheapest first, that
             leave the batch what it is, and that do not. what: the batch that is counted. host_flags: those
             of the changes that move state to the host. length_flag: the flag whose largest fitting value
             --gpu_memory_gib asks for; most: its largest value.
    Returns: args, ledger; savings: see DryRun; length_flag; fits, cheapest_set, longest: None without
             --gpu_memory_gib.
    """

    def say(text):  # each line when it is known: counting takes its time
        print(wrapped(text), flush=True)

    args, (counts, moment) = found.args, found.counts({})
    for sentence in answer(found, what, changes, host_flags):
        say(sentence)
    rows, fits, cheapest, longest = ledger(counts, moment), None, None, None
    name = Path(args.model_name_or_path).name
    print(format_ledger(f"{name}  dry run  world {args.dry_run_world_size}", rows), flush=True)
    say("(The peak is no sum of the rows: they are not all held at one moment.)")
    if found.usable is not None:
        fits = counts["peak"] <= found.usable
        if not fits:
            cheapest = found.cheapest_set(changes, host_flags)
            say(f"Cheapest flags with which it fits: {found.described(cheapest, changes)}.")
        flags = "the flags as they are" if fits or not cheapest else "those"
        longest = found.longest(length_flag, most, together(cheapest or (), changes))
        limit = " (the longest that was tried)" if longest == most else ""
        say(f"Longest --{length_flag} that fits with {flags}: {longest or 'none'}{limit}.")
    savings = {}
    for text, saved in found.savings(changes | others) if not (fits or cheapest) else ():
        if not savings:
            tqdm.write("single changes, at the peak (GiB)")
        savings[text] = saved
        tqdm.write(f"{'saves' if saved >= 0 else 'costs'} {shown_gib(abs(saved)):>8}  {text}")
    savings = dict(sorted(savings.items(), key=lambda item: -item[1]))
    answers = {"fits": fits, "cheapest_set": cheapest, "longest": longest}
    return {"args": asdict(args), "ledger": rows, "savings": savings, "length_flag": length_flag, **answers}
