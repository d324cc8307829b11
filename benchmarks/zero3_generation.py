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
import time
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import torch
from harness import alternate, case, data_file, parse, script_run, synchronize, write
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo_zero3
from common.sharding import read_pretrained
from grpo_zero3 import deepspeed_groups, generate, generation_weights, load_engine, whole_bytes

SHARES = {"all": 1, "75 %": 0.75, "half": 0.5, "25 %": 0.25, "none": 0}  # held whole throughout
BATCHES, BATCH_WAYS = (1, 4), ("all", "half", "none")  # sequences on each rank, and what is held for them
# DeepSpeed's defaults, in elements: what it may hold, for how long, and gather in advance
HELD = {
    "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 10**9,
    "stage3_prefetch_bucket_size": 5 * 10**7,
}
LARGE = 8 * 10**9  # parameters of a model of which that is a small part


class Gathers(TorchDispatchMode):
    """Counts, inside, the bytes that are gathered, and the most bytes of weights that are whole at once."""

    def __init__(self, module):
        super().__init__()
        self.module, self.bytes, self.count, self.most_whole = module, 0, 0, 0

    def __enter__(self):
        self.hook = register_module_forward_hook(self.look)  # runs before the hooks that release
        return super().__enter__()

    def __exit__(self, *error):
        self.hook.remove()
        return super().__exit__(*error)

    def look(self, *_):
        held = sum(parameter.nbytes for parameter in self.module.parameters())  # of one that is not whole: 0
        self.most_whole = max(self.most_whole, held)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "allgather" in function.name():
            self.bytes += sum(x.nbytes for x in tree_leaves(args[0]) if torch.is_tensor(x))
            self.count += 1
        return function(*args, **(kwargs or {}))


class Clock:
    """Notes a rollout's times: its start, when each token was there, its end."""

    def __init__(self, device):
        self.device, self.times = device, []
        self.note()

    def note(self, *_):
        synchronize(self.device.type)
        self.times.append(time.perf_counter())

    def measured(self):
        start, first, *_, last, end = self.times
        return {"seconds": end - start, "seconds_per_token": (last - first) / (len(self.times) - 3)}


def rollout(engine, budget, prompts, args, run, counter):
    """Returns completions, and what the clock measured; counter: a context manager around generating."""
    clock = Clock(run.device)
    with generation_weights(engine, budget) as model:
        with counter, patch.object(run, "watch", clock.note):  # told of each token
            completions = generate(model, prompts, args, run, end_ids=[])[0]
    clock.note()
    return completions, clock.measured()


def rollout_by_transformers(engine, weights, prompts, args, run, counter):
    """The same by transformers' generate; weights: function of the engine that makes a context manager."""
    clock, device, width = Clock(run.device), run.device, max(map(len, prompts))

    def after_token(ids, _):
        clock.note()
        return torch.zeros(len(ids), dtype=torch.bool, device=device)  # none is done

    with weights(engine) as module:
        module.set_attn_implementation("sdpa")
        with counter:
            out = module.generate(
                input_ids=torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device),
                attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).to(
                    device
                ),
                max_new_tokens=args.max_completion_length,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                synced_gpus=True,
                stopping_criteria=[after_token],
            )
    clock.note()
    return out[:, width:].tolist(), clock.measured()


def load_engines(args, run, pretrained):
    """The script's engine; {name: another}, with DeepSpeed's hooks as on a large model, and as they are."""
    engine = load_engine(args, run, pretrained)
    scale = sum(p.ds_numel for p in engine.module.parameters()) / LARGE
    scaled = {"stage": 3, **{name: int(scale * numel) for name, numel in HELD.items()}}
    config = grpo_zero3.deepspeed_config

    def other(zero, leaves=False):
        changed = {"deepspeed_config": lambda *given: config(*given) | {"zero_optimization": zero}}
        changed |= {} if leaves else {"set_z3_leaf_modules": lambda *_: None}
        with patch.multiple(grpo_zero3, **changed):
            return load_engine(args, run, pretrained)

    others = {"hooks per layer": other(scaled, leaves=True), "hooks per module": other(scaled)}
    return engine, others | {"DeepSpeed's defaults": other({"stage": 3})}


def compare(setup, ways, args, run, options):
    """Count what each way gathers in one rollout, then time them all in turn.

    Args: ways: {name: (engine, function of a counter that makes a rollout)}; the first one's completions are
          those that the others must have.
    """
    once, expected = {}, None
    for way, (engine, roll) in ways.items():
        gathers = Gathers(engine.module)
        completions, _ = roll(gathers)
        expected = expected or completions
        same = run.sum({"same": completions == expected})["same"]
        once[way] = {
            "gathered_bytes_per_token": gathers.bytes / args.max_completion_length,
            "gathers_per_token": gathers.count / args.max_completion_length,
            "peak_whole_bytes": gathers.most_whole,
            "same_tokens_on_all_ranks": same == run.world,
        }
        if way in SHARES:
            once[way]["resident_share"] = SHARES[way]
    timed = {way: lambda roll=roll: roll(nullcontext())[1] for way, (_, roll) in ways.items()}
    # counting was the warm-up
    runs = alternate(timed, options.repeats, options.device, warm_up=0)
    return case(f"{setup['sequences']} sequences", setup, runs, once)


def main():
    options = parse(__doc__, tokens=12, sequences=8, dtype="bf16")
    flags = {"bf16": options.dtype == "bf16", "max_completion_length": options.tokens, "num_generations": 1}
    run_of_script = script_run(grpo_zero3, options, temperature=0.0, **flags)
    with run_of_script as (_, args, run), deepspeed_groups(run):
        pretrained = read_pretrained(args.model_name_or_path, dropout=False)
        engine, others = load_engines(args, run, pretrained)
        total = whole_bytes(engine.module.parameters())
        file = data_file("gsm8k_prompts", options, "prompts.jsonl")
        most = max(options.sequences, *BATCHES)
        lines = file.read_text().splitlines()[run.rank * most :][:most]
        rows = [json.loads(line)["prompt"] for line in lines]
        prompts = pretrained.tokenizer.apply_chat_template(rows, add_generation_prompt=True)["input_ids"]

        def held(name, sequences):
            budget = None if name == "all" else int(SHARES[name] * total)
            return engine, partial(rollout, engine, budget, prompts[:sequences], args, run)

        def by_transformers(engine, weights):
            chosen = prompts[: options.sequences]
            return engine, partial(rollout_by_transformers, engine, weights, chosen, args, run)

        ways = {name: held(name, options.sequences) for name in SHARES}
        # as TRL gathers: all weights whole and all hooks away
        ways["all, transformers' generate"] = by_transformers(engine, lambda e: generation_weights(e, None))
        for name, other in others.items():
            ways[name] = by_transformers(other, lambda e: nullcontext(e.module.eval()))
        batches = {options.sequences: ways}
        if not options.quick:
            sizes = (n for n in BATCHES if n != options.sequences)
            batches |= {n: {name: held(name, n) for name in BATCH_WAYS} for n in sizes}
        setup = {"ranks": run.world, "dtype": options.dtype, "weights_bytes": total, "tokens": options.tokens}
        cases = [
            compare({**setup, "sequences": n}, chosen, args, run, options) for n, chosen in batches.items()
        ]
        if run.first:
            write("generation", options, args.model_name_or_path, cases)


if __name__ == "__main__":
    main()
