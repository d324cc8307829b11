"""Generation under ZeRO-3: seconds and bytes for each way to hold the weights, in turn, with the same tokens.

torchrun --standalone --nproc_per_node 2 benchmarks/zero3_generation.py [--device cuda] [--quick]

"hooks per module" is what generation without gathering was before: transformers' own generate on DeepSpeed's
hooks, which gather matrix by matrix, and release each after its use. What DeepSpeed's default settings let it
hold and gather in advance is scaled by this model's size to an 8B model's, of which they hold an eighth.
"hooks per layer": the same, with decoder layers as DeepSpeed's leaf modules. "DeepSpeed's defaults": as they
are, by which they hold all of so small a model at once.
Without --quick, also the growth with the sequences of a batch.
"""

import json
import tempfile
import time

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import (
    PartitionedParameterCoordinator as Coordinator,
)
from harness import alternate, case, data_file, model_folder, parse, ratio, synchronize, write
from transformers import AutoTokenizer

import grpo_zero3
from grpo_zero3 import Arguments, all_sum, generate, generation_weights, load_engine, whole_bytes

GATHER = "_PartitionedParameterCoordinator__all_gather_params_"
SHARES = {"all": 1, "75 %": 0.75, "half": 0.5, "25 %": 0.25, "none": 0}  # held whole throughout
BATCHES, BATCH_WAYS = (1, 4), ("all", "half", "none")  # sequences on each rank, and what is held for them
# DeepSpeed's defaults, in elements: what it may hold, for how long, and gather in advance
HELD = {
    "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 10**9,
    "stage3_prefetch_bucket_size": 5 * 10**7,
}
LARGE = 8 * 10**9  # parameters of a model of which that is a small part


class Counter:
    """Bytes gathered, by the script or by DeepSpeed's hooks, and the most held whole, in one rollout."""

    def __init__(self, module):
        self.module, self.gathered, self.gathers, self.peak = module, 0, 0, 0
        self.started = False  # what the script gathers before the first forward is resident

    def __enter__(self):
        self.originals = grpo_zero3.gather, getattr(Coordinator, GATHER)
        grpo_zero3.gather = self.gather
        setattr(Coordinator, GATHER, lambda *args, **kwargs: self.gather_by_hooks(*args, **kwargs))
        self.hook = self.module.register_forward_pre_hook(self.start)
        return self

    def __exit__(self, *_):
        grpo_zero3.gather = self.originals[0]
        setattr(Coordinator, GATHER, self.originals[1])
        self.hook.remove()

    def start(self, *_):
        self.started = True
        self.note()

    def count(self, params):
        missing = whole_bytes(p for p in params if p.ds_status == ZeroParamStatus.NOT_AVAILABLE)
        self.gathered, self.gathers = self.gathered + missing, self.gathers + (missing > 0)

    def gather(self, parameters, device):
        if self.started:
            self.count(parameters)
        self.originals[0](parameters, device)
        self.note()

    def gather_by_hooks(self, coordinator, params, forward, quantize=False):
        self.count(params)
        self.originals[1](coordinator, params, forward, quantize)
        self.note()

    def note(self):
        held = whole_bytes(
            p for p in self.module.parameters() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE
        )
        self.peak = max(self.peak, held)


class Clock:
    """Notes a rollout's times: its start, when its weights were there, when each token was, its end."""

    def __init__(self, device):
        self.device, self.times = device, []
        self.note()

    def note(self, *_):
        synchronize(self.device.type)
        self.times.append(time.perf_counter())

    def measured(self):
        start, gathered, first, *_, last, end = self.times
        return {
            "seconds": end - start,
            "gather_seconds": gathered - start,
            "prefill_seconds": first - start,
            "seconds_per_token": (last - first) / (len(self.times) - 4),  # of those after the first
        }


def rollout(engine, prompts, budget, tokens, device):
    """Returns completions and what the clock measured."""
    clock = Clock(device)
    with generation_weights(engine, budget) as model:
        clock.note()
        completions, _, _ = generate(
            model,
            prompts,
            1,
            tokens,
            end_ids=[],
            temperature=0,
            all_sum=lambda values: all_sum(values, device),
            after_token=clock.note,
        )
    clock.note()
    return completions, clock.measured()


def rollout_by_hooks(engine, prompts, tokens, device):
    clock = Clock(device)
    completions = generate_by_transformers(engine.module.eval(), prompts, tokens, device, clock)
    clock.note()
    return completions, clock.measured()


def rollout_gathered(engine, prompts, tokens, device):
    """As TRL gathers: all weights whole and all hooks away, and transformers' own generate."""
    clock = Clock(device)
    with generation_weights(engine, None) as module:  # no hook is left
        completions = generate_by_transformers(module, prompts, tokens, device, clock)
    clock.note()
    return completions, clock.measured()


def generate_by_transformers(module, prompts, tokens, device, clock):
    module.set_attn_implementation("sdpa")
    clock.note()
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)

    def after_token(ids, _):
        clock.note()
        return torch.zeros(len(ids), dtype=torch.bool, device=device)  # none is done

    out = module.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        synced_gpus=True,
        stopping_criteria=[after_token],
    )
    return out[:, width:].tolist()


def load_engines(args, device):
    """The script's engine; DeepSpeed's hooks per layer, and per module, as on a large model; its defaults."""
    leaf_modules, config = grpo_zero3.set_z3_leaf_modules, grpo_zero3.deepspeed_config

    def configured(zero, leaves):
        grpo_zero3.deepspeed_config = lambda *given: {**config(*given), "zero_optimization": zero}
        grpo_zero3.set_z3_leaf_modules = leaf_modules if leaves else lambda *_: None
        return load_engine(args, device)

    try:
        engine = load_engine(args, device)
        scale = sum(p.ds_numel for p in engine.module.parameters()) / LARGE
        scaled = {"stage": 3, **{name: int(scale * numel) for name, numel in HELD.items()}}
        per_layer, per_module = configured(scaled, True), configured(scaled, False)
        return engine, per_layer, per_module, configured({"stage": 3}, False)
    finally:
        grpo_zero3.set_z3_leaf_modules, grpo_zero3.deepspeed_config = leaf_modules, config


def compare(setup, ways, tokens, repeats, device):
    """Count what each way gathers in one rollout, then time them all in turn.

    Args:    ways: {name: (engine, function of a number of tokens that makes a rollout)}; the first one's
             completions are those that the others must have.
    Returns: {way: repetitions}, {way: what was counted}.
    """
    counted, expected = {}, None
    for way, (engine, roll) in ways.items():
        with Counter(engine.module) as counter:
            completions, _ = roll(tokens)
        expected = completions if expected is None else expected
        counted[way] = {
            "gathered_bytes_per_token": counter.gathered / tokens,
            "gathers_per_token": counter.gathers / tokens,
            "peak_whole_bytes": counter.peak,
            "same_tokens_on_all_ranks": all_sum([completions == expected], device)[0] == setup["ranks"],
        }
    runs = {way: lambda roll=roll: roll(tokens)[1] for way, (_, roll) in ways.items()}
    return alternate(runs, repeats, device.type, warm_up=0), counted  # counting was the warm-up


def show(found):
    for way, values in found["ways"].items():
        median = values["median"]
        print(
            f"{found['case']:<16}{way:<30}{median['seconds_per_token']:8.3f} s/token "
            f"{median['seconds']:7.2f} s {values['gathered_bytes_per_token'] / 2**20:8.1f} MiB/token "
            f"{values['gathers_per_token']:.0f} gathers {values['peak_whole_bytes'] / 2**20:.1f} MiB peak "
            f" {values['same_tokens_on_all_ranks']}",
            flush=True,
        )


def main():
    options = parse(__doc__, tokens=12, sequences=8, dtype="bf16")
    rank, _, ranks, device = grpo_zero3.start_distributed(Arguments())
    repeats = options.repeats or (2 if options.quick else 3)
    scratch = tempfile.TemporaryDirectory()
    folder = [model_folder(options, scratch.name) if rank == 0 else None]
    dist.broadcast_object_list(folder)  # the first rank may have made it
    model = folder[0]
    args = Arguments(model_name_or_path=str(model), bf16=options.dtype == "bf16")
    engine, *others = load_engines(args, device)
    total = whole_bytes(engine.module.parameters())
    setup = {"ranks": ranks, "dtype": options.dtype, "weights_bytes": total, "tokens": options.tokens}

    tokenizer = AutoTokenizer.from_pretrained(model)
    file, most = data_file("gsm8k_prompts", options, "prompts.jsonl"), max(options.sequences, *BATCHES)
    rows = [json.loads(line)["prompt"] for line in open(file, encoding="utf-8")][rank * most :][:most]
    prompts = tokenizer.apply_chat_template(rows, add_generation_prompt=True)["input_ids"]

    def held(name, sequences):
        budget = None if name == "all" else int(SHARES[name] * total)
        return engine, lambda tokens: rollout(engine, prompts[:sequences], budget, tokens, device)

    chosen = prompts[: options.sequences]
    ways = {name: held(name, options.sequences) for name in SHARES}
    ways["all, transformers' generate"] = engine, lambda n: rollout_gathered(engine, chosen, n, device)
    for name, other in zip(("hooks per layer", "hooks per module", "DeepSpeed's defaults"), others):
        ways[name] = other, lambda n, other=other: rollout_by_hooks(other, chosen, n, device)
    batches = {options.sequences: ways}
    if not options.quick:
        others = (n for n in BATCHES if n != options.sequences)
        batches |= {n: {name: held(name, n) for name in BATCH_WAYS} for n in others}
    cases = []
    for sequences, ways in batches.items():
        sizes = {**setup, "sequences": sequences}
        runs, counted = compare(sizes, ways, options.tokens, repeats, device)
        for name in SHARES.keys() & ways.keys():
            counted[name]["resident_share"] = SHARES[name]
        cases.append(case(f"{sequences} sequences", sizes, runs, counted))
    first, measure = cases[0], "seconds_per_token"
    first["ratios"] = {way: ratio(first, way, "hooks per module", measure) for way in first["ways"]}
    if rank == 0:
        for found in cases:
            show(found)
        write("generation", options, model, cases)
    dist.barrier()
    scratch.cleanup()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
