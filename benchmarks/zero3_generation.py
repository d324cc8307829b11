"""Generation under ZeRO-3: seconds and bytes for each way to hold the weights, alternating, same tokens.

torchrun --standalone --nproc_per_node 2 benchmarks/zero3_generation.py --model <folder> --prompts <jsonl> \
    --output benchmarks/results/zero3_generation.json

"no leaf modules" is "none" with every linear layer gathering its weights for itself. "hooks per module" is
what generation without gathering was before: transformers' own generate with DeepSpeed's default settings,
which prefetch and hold whatever the next billion elements of the forward will need: whole models at once.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import deepspeed  # noqa: E402
import transformers  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus  # noqa: E402
from deepspeed.runtime.zero.partitioned_param_coordinator import (  # noqa: E402
    PartitionedParameterCoordinator as Coordinator,
)
from transformers import AutoTokenizer  # noqa: E402

import grpo_zero3  # noqa: E402
from common.report import device_name  # noqa: E402
from grpo_zero3 import Arguments, all_sum, generate, generation_weights, load_engine, whole_bytes  # noqa: E402

GATHER = "_PartitionedParameterCoordinator__all_gather_params_"


class Counter:
    """Bytes gathered and the most held whole, in one rollout that is not timed."""

    def __init__(self, module):
        self.module, self.gathered, self.gathers, self.peak = module, 0, 0, 0

    def __enter__(self):
        self.original = getattr(Coordinator, GATHER)
        setattr(Coordinator, GATHER, lambda *args, **kwargs: self.gather(*args, **kwargs))
        self.hooks = [m.register_forward_pre_hook(self.note) for m in self.module.modules()]
        return self

    def __exit__(self, *_):
        setattr(Coordinator, GATHER, self.original)
        for hook in self.hooks:
            hook.remove()

    def gather(self, coordinator, params, forward, quantize=False):
        missing = whole_bytes(p for p in params if p.ds_status == ZeroParamStatus.NOT_AVAILABLE)
        self.gathered, self.gathers = self.gathered + missing, self.gathers + (missing > 0)
        self.original(coordinator, params, forward, quantize)

    def note(self, *_):
        held = whole_bytes(
            p for p in self.module.parameters() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE
        )
        self.peak = max(self.peak, held)


def rollout(engine, prompts, budget, tokens, device):
    """Returns completions, seconds until the weights were there, and seconds of the whole."""
    started = time.perf_counter()
    with generation_weights(engine, budget) as model:
        gathered = time.perf_counter()
        completions, _, _ = generate(
            model, prompts, 1, tokens, end_ids=[], temperature=0, all_sum=lambda v: all_sum(v, device)
        )
    return completions, gathered - started, time.perf_counter() - started


def rollout_per_module(engine, prompts, tokens, device):
    module, started = engine.module.eval(), time.perf_counter()
    module.set_attn_implementation("sdpa")
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    out = module.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        synced_gpus=True,
    )
    return out[:, width:].tolist(), 0.0, time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, help="a .jsonl file with prompt")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=8, help="on each rank")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fp32", action="store_true")
    options = parser.parse_args()
    args = Arguments(model_name_or_path=options.model, bf16=not options.fp32)
    rank, _, world, device = grpo_zero3.start_distributed(args)
    engine = load_engine(args, device)
    leaf_modules, config = grpo_zero3.set_z3_leaf_modules, grpo_zero3.deepspeed_config

    def default_config(*given):
        changed = config(*given)
        changed["zero_optimization"] = {"stage": 3}
        return changed

    grpo_zero3.set_z3_leaf_modules = lambda *_: None
    no_leaves = load_engine(args, device)
    grpo_zero3.deepspeed_config = default_config
    per_module = load_engine(args, device)
    grpo_zero3.set_z3_leaf_modules, grpo_zero3.deepspeed_config = leaf_modules, config

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [json.loads(line)["prompt"] for line in open(options.prompts)]
    rows = rows[rank * options.sequences : (rank + 1) * options.sequences]
    prompts = tokenizer.apply_chat_template(rows, add_generation_prompt=True)["input_ids"]
    total = whole_bytes(engine.module.parameters())
    ways = {
        name: (engine, lambda n, b=budget: rollout(engine, prompts, b, n, device))
        for name, budget in (("all", None), ("none", 0), ("half", total // 2), ("90 %", total * 9 // 10))
    }
    ways["no leaf modules"] = no_leaves, lambda n: rollout(no_leaves, prompts, 0, n, device)
    ways["hooks per module"] = per_module, lambda n: rollout_per_module(per_module, prompts, n, device)

    results = {}
    for name, (used, way) in ways.items():
        with Counter(used.module) as counter:
            completions, _, _ = way(options.tokens)
        results[name] = {
            "completions": completions,
            "gathered_bytes_per_token": counter.gathered / options.tokens,
            "gathers_per_token": counter.gathers / options.tokens,
            "peak_whole_bytes": counter.peak,
            "gather_seconds": [],
            "prefill_seconds": [],
            "seconds": [],
        }
    for _ in range(options.repeats):
        for name, (_, way) in ways.items():
            _, _, first = way(1)  # gathering and prompts; what is beyond it is paid for each token
            completions, gather, seconds = way(options.tokens)
            results[name]["gather_seconds"].append(gather)
            results[name]["prefill_seconds"].append(first)
            results[name]["seconds"].append(seconds)
            assert completions == results[name]["completions"]
    expected = results["all"]["completions"]
    for result in results.values():
        beyond = statistics.median(result["seconds"]) - statistics.median(result["prefill_seconds"])
        result["seconds_per_token"] = beyond / (options.tokens - 1)
        same = result.pop("completions") == expected
        result["same_tokens_on_all_ranks"] = all_sum([int(same)], device)[0] == world
    if rank == 0:
        versions = {m.__name__: m.__version__ for m in (torch, transformers, deepspeed)}
        document = {
            "model": Path(options.model).name,
            "world_size": world,
            "dtype": "fp32" if options.fp32 else "bf16",
            "weights_bytes": total,
            "sequences_per_rank": options.sequences,
            "tokens": options.tokens,
            "device": device_name(device),
            "python": platform.python_version(),
            **versions,
            "ways": results,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1))
        for name, r in results.items():
            print(
                f"{name:<18}{r['seconds_per_token']:8.3f} s/token  {statistics.median(r['seconds']):7.2f} s "
                f"{r['gathered_bytes_per_token'] / 2**20:8.1f} MiB/token {r['gathers_per_token']:.0f} gathers"
                f" {r['peak_whole_bytes'] / 2**20:.1f} MiB peak  {r['same_tokens_on_all_ranks']}"
            )


if __name__ == "__main__":
    main()
