"""Fields of a script's Arguments, and the refusal of values that contradict each other."""

import math
import os
from dataclasses import field


def flag(default, text):
    return field(default=default, metadata={"help": text})


def refuse(wrong, message):
    if wrong:
        raise ValueError(message)


def check_dry_run(args):
    """Raise ValueError for flags of a dry run that would be ignored, or that it cannot follow."""
    world, memory = args.dry_run_world_size, args.gpu_memory_gib
    refuse(world < 1, f"--dry_run_world_size {world}: give a number of ranks >= 1.")
    refuse(memory is not None and not 0 < memory < math.inf, f"--gpu_memory_gib {memory}: give GiB above 0.")
    ignored = not args.dry_run and (world > 1 or memory is not None)
    refuse(ignored, "--dry_run_world_size and --gpu_memory_gib say what to count: add --dry_run.")
    triton = [name for name in ("use_liger_kernel", "liger_cross_entropy") if getattr(args, name, False)]
    refuse(
        args.dry_run and triton, f"--dry_run cannot look into Triton's kernels: drop --{' --'.join(triton)}."
    )
    launched = args.dry_run and int(os.environ.get("WORLD_SIZE", 1)) > 1
    refuse(
        launched, "--dry_run is one process: start it with python, and name ranks by --dry_run_world_size."
    )
