"""Fields of a script's Arguments, the refusal of what cannot be done, and a script's start from the shell."""

import math
import os
import sys
from contextlib import contextmanager
from dataclasses import field

import torch
import torch.distributed as dist
from transformers import HfArgumentParser

from common import Refusal, refuse


def flag(default, text):
    return field(default=default, metadata={"help": text})


@contextmanager
def together(device):
    """What goes wrong inside on one rank ends all of them: the others would wait for it, or lose it."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    failed = torch.tensor(float(error is not None), device=device)
    if dist.is_initialized():
        dist.all_reduce(failed)
    if failed:
        raise error or Refusal("another rank cannot go on; its own message says why.")


def parse_arguments(arguments_class, arguments):
    """Command-line words -> an instance of arguments_class.

    --local_rank, which DeepSpeed's launcher adds, is ignored: the environment says the same.
    """
    ours = [word for word in arguments if not word.startswith(("--local_rank", "--local-rank"))]
    parser = HfArgumentParser(arguments_class)
    args, unknown = parser.parse_args_into_dataclasses(ours, return_remaining_strings=True)
    refuse(unknown, f"unknown arguments: {' '.join(unknown)}; --help lists those that there are.")
    return args


def run_script(main, arguments_class):
    """main(args) with what the command line says; a refusal, or a loss that is not finite, ends in code 2."""
    try:
        main(parse_arguments(arguments_class, sys.argv[1:]))
    except (Refusal, FloatingPointError) as error:
        kind = "ValueError" if isinstance(error, Refusal) else "FloatingPointError"
        print(f"{kind}: {error}", file=sys.stderr)
        sys.exit(2)


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
