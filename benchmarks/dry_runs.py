"""What --dry_run says that a step will hold, beside what the step held, in the modes of each script.

BENCH_MODEL=<folder> BENCH_DATA=<folder> python benchmarks/dry_runs.py [--device cuda] [--quick]

SFT and DPO train on a few real examples; the dry run is given the batch of the step that was counted, on CUDA
the largest. GRPO's dry run takes prompts and completions as long as the flags allow, and so does the rollout
here. Measured by the allocator on CUDA, by MemTracker on a CPU. One rank.
"""

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from against_trl import quiet, release
from harness import case, data_file, model_folder, parse, write

import dpo_padding_free
import grpo_zero3
import sft_packing
from common.pretrained import load_config

EXAMPLES = 16  # of the data
WAYS = {  # flags of each script
    "sft_packing.py": {
        "packed, fp32": {},
        "packed": {"bf16": True},
        "packed, no checkpointing": {"bf16": True, "gradient_checkpointing": False},
        "packed, offloading": {
            "bf16": True,
            "gradient_checkpointing": False,
            "activation_offloading": True,
        },
        "padded": {
            "bf16": True,
            "packing": False,
            "padding_free": False,
            "per_device_train_batch_size": 4,
        },
    },
    "dpo_padding_free.py": {
        "shared": {"bf16": True},
        "shared, reference each step": {"bf16": True, "precompute_ref_log_probs": False},
        "shared, no checkpointing": {"bf16": True, "gradient_checkpointing": False},
        "padded": {"bf16": True, "padding_free": False},
    },
    "grpo_zero3.py": {
        "bf16": {"bf16": True},
        "bf16, no checkpointing": {"bf16": True, "gradient_checkpointing": False},
    },
}


def measure_training(script, args, config, options):
    """A step's bytes, predicted and measured, and the dry run's seconds, of a script that trains on data."""
    meters, meter_class = [], script.MemoryMeter

    def kept(*given, **named):
        meters.append(meter_class(*given, **named))
        return meters[0]

    args.measure_memory = options.device == "cpu"  # on CUDA every step is measured
    script.MemoryMeter = kept
    try:
        script.main(args)
    finally:
        script.MemoryMeter = meter_class
    meter = meters.pop()
    batch = {name: v.cpu() if torch.is_tensor(v) else v for name, v in meter.largest_batch.items()}
    return *timed(script.pretend_step, args, config, 1, batch), meter.measured["peak"]


def measure_grpo(args, config, options):
    """The same of a rollout and its update, with all prompts and completions at their longest."""
    device = grpo_zero3.start_distributed(args)[3]
    before = torch.cuda.memory_allocated(device)
    engine = grpo_zero3.load_engine(args, device)
    size, group = args.per_device_train_batch_size, args.num_generations
    prompts = [[5] * args.max_prompt_length for _ in range(size // group)]
    groups = [(prompt, [[7] * args.max_completion_length] * group) for prompt in prompts]
    longest = args.max_prompt_length + group * args.max_completion_length
    for _ in range(2):  # the first makes buffers and moments
        torch.cuda.reset_peak_memory_stats()
        with grpo_zero3.generation_weights(engine, grpo_zero3.budget_bytes(args)) as model:
            uniform = torch.rand(size, args.max_completion_length, device=device)
            most = args.max_completion_length
            grpo_zero3.generate(model, prompts, group, most, end_ids=[], device=device, uniform=uniform)
        ones = torch.ones(size)
        batches = grpo_zero3.make_batches(groups, ones, ones, longest, device, int, temperature=1.0)
        grpo_zero3.update(engine, batches, args, 1, lambda phase: None)
        measured = torch.cuda.max_memory_allocated() - before
    return *timed(grpo_zero3.pretend_step, args, config, 1), measured


def timed(pretend_step, *given):
    """The peak of a dry run, and its seconds."""
    started = time.perf_counter()
    peak = pretend_step(*given)["peak"][1]
    return peak, time.perf_counter() - started


def few_examples(name, options, demo, folder):
    """A file of the first examples of some data."""
    lines = data_file(name, options, demo).read_text().splitlines(keepends=True)
    file = Path(folder) / f"{name}.jsonl"
    file.write_text("".join(lines[:EXAMPLES]))
    return str(file)


def main():
    options = parse(__doc__, max_length=2048)
    quiet()
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        model = str(model_folder(options, scratch))
        config = load_config(model)
        length = 256 if options.quick else options.max_length
        data = {
            "sft_packing.py": few_examples("chat_messages", options, "sft.jsonl", scratch),
            "dpo_padding_free.py": few_examples("chat_preferences", options, "preferences.jsonl", scratch),
        }
        for name, ways in WAYS.items():
            if name == "grpo_zero3.py" and options.device == "cpu":
                continue  # its bytes are not what this process holds: tests/test_dry_run.py counts them
            script = {s.__name__: s for s in (sft_packing, dpo_padding_free, grpo_zero3)}[Path(name).stem]
            counted, runs = {}, {}
            for way, flags in ways.items():
                limits = {"max_prompt_length": length // 4, "max_completion_length": length // 4}
                limits |= {"per_device_train_batch_size": 16, "num_generations": 8}
                if name in data:
                    # of two epochs: in the second, the largest batch finds the optimizer's states there
                    limits = {"max_length": length, "num_train_epochs": 2, "dataset_name": data[name]}
                output = {"output_dir": f"{scratch}/{script.__name__}", "overwrite_output_dir": True}
                run = {"model_name_or_path": model, **output}
                args = script.Arguments(**run | limits | flags)
                if name in data:
                    predicted, seconds, measured = measure_training(script, args, config, options)
                else:
                    predicted, seconds, measured = measure_grpo(args, config, options)
                release()  # what is left of one run would count in the next one's peak
                counted[way] = {"predicted_bytes": predicted, "peak_bytes": measured}
                runs[way] = [{"seconds": seconds}]
                print(
                    f"{name:<22}{way:<34}predicted {predicted / 2**20:10.1f} MiB  "
                    f"measured {measured / 2**20:10.1f} MiB  {predicted / measured - 1:+.2%}",
                    flush=True,
                )
            setup = {k: v for k, v in limits.items() if k != "dataset_name"}
            cases.append(case(name, setup, runs, counted))
            write("dry_runs", options, Path(model), cases, complete=False)
    write("dry_runs", options, Path(model), cases)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
