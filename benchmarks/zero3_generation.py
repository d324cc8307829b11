"""Generation under ZeRO-3: seconds and bytes for each way to hold the weights, in turn, with the same tokens.

torchrun --standalone --nproc_per_node 2 benchmarks/zero3_generation.py [--device cuda] [--quick]

"none" computes single tokens where the weights are; "streamed" is the same without that: it gathers a layer
at a time. "hooks per module" is what generation without gathering was before: transformers' own generate on
DeepSpeed's hooks, which gather matrix by matrix, and release each after its use. What DeepSpeed's default
settings let it hold and gather in advance is scaled by this model's size to an 8B model's, of which they hold
an eighth. Without --quick, also with --larger 32 sequences on each rank (0 = not), "hooks per module" aside.
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

SHARES = {"all": 1, "half": 0.5, "none": 0, "streamed": 0}  # of the weights, held whole throughout
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
        self.module, self.most_whole = module, 0
        self.gathered, self.exchanged, self.forwards = 0, 0, 0

    def __enter__(self):
        self.hooks = [register_module_forward_hook(self.look)]  # runs before the hooks that release
        self.hooks.append(self.module.register_forward_pre_hook(self.begin))
        self.patched = patch.object(grpo_zero3, "exchange", partial(self.exchange, grpo_zero3.exchange))
        self.patched.__enter__()
        self.exchanges = False
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        self.patched.__exit__(*error)
        return super().__exit__(*error)

    def begin(self, *_):
        self.forwards += 1

    def exchange(self, function, *args):
        self.exchanges = True
        try:
            return function(*args)
        finally:
            self.exchanges = False

    def look(self, *_):
        held = sum(parameter.nbytes for parameter in self.module.parameters())  # of one that is not whole: 0
        self.most_whole = max(self.most_whole, held)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        collective = any(name in function.name() for name in ("allgather", "alltoall"))
        if collective and self.forwards > 1:  # of single tokens, not of the prompts
            brought = sum(x.nbytes for x in tree_leaves(args[0]) if torch.is_tensor(x))
            self.exchanged += brought * self.exchanges
            self.gathered += brought * (not self.exchanges)
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


def rollout(engine, budget, streams, prompts, args, run, counter):
    """Returns completions, and what the clock measured; streams: nothing is computed in place; counter: a
    context manager around generating.
    """
    clock = Clock(run.device)
    in_place = patch.object(grpo_zero3, "shard_rows", lambda _: None) if streams else nullcontext()
    with in_place, generation_weights(engine, budget, size=len(prompts)) as model:
        with counter, patch.object(run, "watch", clock.note):  # told of each token
            completions = generate(model, prompts, args, run, end_ids=[])[0]
    clock.note()
    return completions, clock.measured()


def rollout_by_transformers(engine, prompts, args, run, counter):
    """The same by transformers' generate."""
    clock, device, width = Clock(run.device), run.device, max(map(len, prompts))

    def after_token(ids, _):
        clock.note()
        return torch.zeros(len(ids), dtype=torch.bool, device=device)  # none is done

    module = engine.module.eval()
    module.set_attn_implementation("sdpa")
    with counter:
        out = module.generate(
            input_ids=torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).to(device),
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
    """The script's engine; another, with DeepSpeed's hooks as on a large model."""
    engine = load_engine(args, run, pretrained)
    scale = sum(p.ds_numel for p in engine.module.parameters()) / LARGE
    scaled = {"stage": 3, **{name: int(scale * numel) for name, numel in HELD.items()}}
    config = grpo_zero3.deepspeed_config

    changed = {"deepspeed_config": lambda *given: config(*given) | {"zero_optimization": scaled}}
    with patch.multiple(grpo_zero3, **changed, set_z3_leaf_modules=lambda *_: None):
        return engine, load_engine(args, run, pretrained)


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
            "gathered_bytes_per_token": gathers.gathered / (gathers.forwards - 1),
            "exchanged_bytes_per_token": gathers.exchanged / (gathers.forwards - 1),
            "peak_whole_bytes": gathers.most_whole,
            "same_tokens_on_all_ranks": same == run.world,
        }
    timed = {way: lambda roll=roll: roll(nullcontext())[1] for way, (_, roll) in ways.items()}
    # counting was the warm-up
    runs = alternate(timed, options.repeats, options.device, warm_up=0)
    return case(f"{setup['sequences']} sequences", setup, runs, once)


def main():
    options = parse(__doc__, tokens=12, sequences=8, larger=32, dtype="bf16")
    flags = {"bf16": options.dtype == "bf16", "max_completion_length": options.tokens, "num_generations": 1}
    run_of_script = script_run(grpo_zero3, options, temperature=0.0, **flags)
    with run_of_script as (_, args, run), deepspeed_groups(run):
        pretrained = read_pretrained(args.model_name_or_path, dropout=False)
        engine, hooked = load_engines(args, run, pretrained)
        total = whole_bytes(engine.module.parameters())
        file = data_file("gsm8k_prompts", options, "prompts.jsonl")
        most = max(options.sequences, options.larger)
        lines = file.read_text().splitlines()[run.rank * most :][:most]
        rows = [json.loads(line)["prompt"] for line in lines]
        prompts = pretrained.tokenizer.apply_chat_template(rows, add_generation_prompt=True)["input_ids"]

        def held(name, sequences):
            budget, streams = None if name == "all" else int(SHARES[name] * total), name == "streamed"
            return engine, partial(rollout, engine, budget, streams, prompts[:sequences], args, run)

        ways = {name: held(name, options.sequences) for name in SHARES}
        by_hooks = partial(rollout_by_transformers, hooked, prompts[: options.sequences], args, run)
        batches = {options.sequences: ways | {"hooks per module": (hooked, by_hooks)}}
        if options.larger and not options.quick:
            batches[options.larger] = {name: held(name, options.larger) for name in SHARES}
        setup = {"ranks": run.world, "dtype": options.dtype, "weights_bytes": total, "tokens": options.tokens}
        cases = []
        for n, chosen in batches.items():
            cases.append(compare({**setup, "sequences": n}, chosen, args, run, options))
            if run.first:  # case by case: the larger one takes its time
                write("generation", options, args.model_name_or_path, cases)


if __name__ == "__main__":
    main()
