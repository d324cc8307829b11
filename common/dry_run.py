"""Memory before there is a GPU: a script's own step on tensors that have shapes and no storage.

Each script takes one step inside `pretend` and counts its bytes as it does in a real one, with
memory.MemoryMeter; `explore` asks the same of other flags and lengths.
"""

import itertools
import traceback
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from tqdm import tqdm

from common import Refusal


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
def pretend(world=None, sets_storages=False):
    """Inside, new tensors are pretended ones, on a pretended CPU.

    Real tensors may join them, and those that Python has to read (a row's boundaries) should stay real.

    Args:    world: ranks of a process group whose collectives move nothing; None = no group.
             sets_storages: whether Tensor.set_ will be called: FakeTensorMode's cache, which makes the rest
             twice as fast, would keep each storage given to it alive.
    Yields:  a device mesh of the group, or None.
    Raises:  ValueError for a model that looks at its tensors' values to decide what to compute.
    """
    if world is not None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        mesh = None if world is None else init_device_mesh("cpu", (world,))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        mode.cache_enabled = not sets_storages
        with plans_uncounted(), mode:
            yield mesh
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
        if world is not None:
            dist.destroy_process_group()


def longest_that_fits(peak_bytes, available_bytes, most, unit=64):
    """The largest multiple of `unit` tokens below `most` whose peak is within available_bytes, or `most`; 0
    if there is none.

    Args: peak_bytes: function of a length in tokens, growing with it, in nearly straight lines.
    """
    if most < 1:
        return 0
    bytes_high = peak_bytes(most)
    if most <= unit or bytes_high <= available_bytes:
        return most if bytes_high <= available_bytes else 0
    if (bytes_low := peak_bytes(unit)) > available_bytes:
        return 0
    low, high = unit, most  # the first fits, the second does not
    for turn in itertools.count(1):
        if high - low <= unit:
            return low
        # where the straight line between the two meets the border; now and then the middle, in case of a bend
        share = 0.5 if turn % 3 == 0 else (available_bytes - bytes_low) / (bytes_high - bytes_low)
        length = int(low + share * (high - low)) // unit * unit
        length = min(max(length, low + unit), (high - 1) // unit * unit)
        if (count := peak_bytes(length)) <= available_bytes:
            low, bytes_low = length, count
        else:
            high, bytes_high = length, count


def explore(args, peak, check, measure, changes, length_flag, most):
    """What single flags would save of a run's peak, and the longest that fits.

    Args:    args: the script's Arguments, and the peak that they lead to; check: raises ValueError for wrong
             ones. measure: function of Arguments: {row: (formula, bytes)} of one rank, among them "peak".
             changes: {what one would type: {flag: value}}. length_flag: the flag whose largest fitting value
             --gpu_memory_gib asks for; most: its largest value.
    Returns: savings: {what one would type: bytes less at the peak}, the largest first, without what is
             refused or changes less than a thousandth; length_flag; fits, longest: None without
             --gpu_memory_gib.
    """

    def peak_bytes(changed):
        return measure(changed)["peak"][1]

    savings, fits, longest = {}, None, None
    for text, change in tqdm(changes.items(), "Flags that may save memory", leave=False):
        changed = replace(args, **change)
        try:
            check(changed)
        except Refusal:
            continue
        if changed != args:
            saved = peak - peak_bytes(changed)
            if abs(saved) > peak / 1000:
                savings[text] = saved
    if args.gpu_memory_gib is not None:
        available = int(args.gpu_memory_gib * 2**30)
        fits = peak <= available
        with tqdm(desc="Lengths that may fit", unit="try", leave=False) as bar:

            def peak_at(length):
                bar.update()
                return peak_bytes(replace(args, **{length_flag: length}))

            longest = longest_that_fits(peak_at, available, most)
    savings = dict(sorted(savings.items(), key=lambda item: -item[1]))
    return {"savings": savings, "length_flag": length_flag, "fits": fits, "longest": longest}
