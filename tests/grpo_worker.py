"""What test_grpo_zero3.py asks of some ranks, one process each; every answer goes to <folder>/rank<r>.json.

python -m torch.distributed.run --nproc_per_node 2 tests/grpo_worker.py <folder>

With flags of the script as JSON behind the folder: rollouts alone, on any number of ranks.
"""

import json
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus  # noqa: E402
from deepspeed.utils import safe_get_full_grad  # noqa: E402
from grpo_cases import LIMIT, LOSS_CASES, case_tensors, prompt_ids  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import grpo_zero3  # noqa: E402
from common.collators import flatten  # noqa: E402
from grpo_zero3 import (  # noqa: E402
    Arguments,
    all_max,
    all_sum,
    generate,
    generation_units,
    generation_weights,
    load_engine,
    loss_denominators,
    make_batches,
    plan_residents,
    update,
    whole_bytes,
)

CPU = torch.device("cpu")


class Crash(Exception):
    pass


def available(module):
    return [p for p in module.parameters() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]


def state(engine):
    """All that a rollout has to leave as it found it."""
    module, offload = engine.module, engine.optimizer.parameter_offload
    return {
        "hooks": [
            [list(hooks) for hooks in (m._forward_pre_hooks, m._forward_hooks)] for m in module.modules()
        ],
        "handles": len(offload.forward_hooks) + len(offload.backward_hooks),
        "whole": len(available(module)),
        "markers": sum(len(p.ds_active_sub_modules) for p in module.parameters()),
        "training": [m.training for m in module.modules()],
        "attention": module.config._attn_implementation,
        "stack": len(FWD_MODULE_STACK),
        "in forward": sum(m._parameters._in_forward for m in module.modules()),
    }


class Watched:
    """Counts what a rollout gathers and holds, and how many forwards it takes."""

    def __init__(self, engine):
        self.module, self.forwards, self.gathered, self.peak, self.between = engine.module, 0, [], 0, []
        self.started = False  # what is gathered before the first forward is resident

    def note(self, *_):
        self.started = True
        self.peak = max(self.peak, whole_bytes(available(self.module)))

    def __enter__(self):
        self.original, grpo_zero3.gather = grpo_zero3.gather, self.gather
        self.hooks = [m.register_forward_hook(self.note) for m in self.module.modules()]
        self.hooks += [m.register_forward_pre_hook(self.note) for m in self.module.modules()]
        self.hooks.append(self.module.register_forward_hook(self.count))
        return self

    def __exit__(self, *_):
        grpo_zero3.gather = self.original
        for hook in self.hooks:
            hook.remove()

    def count(self, *_):
        self.forwards += 1

    def gather(self, parameters, device):
        if self.started:
            self.gathered.append(whole_bytes(parameters))
        self.original(parameters, device)

    def after_token(self, _):
        self.between.append(whole_bytes(available(self.module)))


def rollout(engine, rank, budget, watched=None, limit=LIMIT, **options):
    with generation_weights(engine, budget) as model:
        completions, finished, entropies = generate(
            model,
            prompt_ids(rank),
            2,
            limit,
            end_ids=[257],
            temperature=0,
            all_sum=lambda values: all_sum(values, CPU),
            after_token=watched.after_token if watched else lambda _: None,
            **options,
        )
    return {"completions": completions, "finished": finished, "entropies": entropies}


def budgets(engine):
    sizes = [whole_bytes(parameters) for parameters, _ in generation_units(engine.module)]
    total = sum(sizes)
    return {"all": None, "none": 0, "third": total // 3, "half": total // 2, "exact": total, "byte": 1}


def check_modes(engine, rank, answers):
    before = state(engine)
    for name, budget in budgets(engine).items():
        resident, streamed, largest = plan_residents(engine.module, budget)
        with Watched(engine) as watched:
            answer = rollout(engine, rank, budget, watched)
        answers[f"mode {name}"] = answer | {
            "budget": budget,
            "resident": whole_bytes(resident),
            "streamed": streamed,
            "largest": largest,
            "forwards": watched.forwards,
            "gathered": sum(watched.gathered),
            "gathers": len(watched.gathered),
            "peak": watched.peak,
            "between": watched.between,
            "restored": state(engine) == before,
        }


def train_step(engine, name, rank, world, folder, change=lambda batches: None, save=False):
    """One update on a case of grpo_cases; its gradients go to a file. Returns loss, kl and clip sums."""
    flags = LOSS_CASES[name]
    args = Arguments(loss_chunk_size=7, **flags)
    base = json.loads((folder / "base.json").read_text())[name]
    groups, advantages, old, ref, lengths = case_tensors(name, rank, world, base)

    def sum_ranks(values):
        return all_sum(values, CPU)

    size = len(groups[0][1])
    denominators = loss_denominators(lengths, size, args.loss_type, 9, sum_ranks)
    options = {"temperature": args.temperature}
    batches = make_batches(groups, advantages, denominators, 40, CPU, lambda n: all_max(n, CPU), **options)
    done = 0
    for batch in batches:
        if done == len(old):
            break  # a dummy
        count = len(batch["score_ids"])
        batch["old_per_token_logps"] = old[done : done + count]
        if args.beta:
            batch["ref_per_token_logps"] = ref[done : done + count]
        done += count
    change(batches)
    for group in engine.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    gradients, step, forwards = {}, engine.step, []
    hook = grpo_zero3.decoder_layers(engine.module)[2].mlp.register_forward_pre_hook(
        lambda *_: forwards.append(1)
    )

    def read_then_step():
        for key, parameter in engine.module.named_parameters():
            gradients[key] = safe_get_full_grad(parameter).clone()
        step()

    engine.step = read_then_step
    try:
        sums = update(engine, batches, args, world, lambda phase: None)
    finally:
        hook.remove()
        del engine.step
    if save and rank == 0:
        save_file(gradients, folder / f"{name}.safetensors")
    sums = all_sum(sums, CPU)
    norm = float(engine.get_global_grad_norm())
    return {"sums": sums, "norm": norm, "batches": len(batches), "layer_forwards": len(forwards)}


def check_exceptions(engine, rank, folder, answers):
    before = state(engine)
    expected = rollout(engine, rank, None, limit=8)
    layer = grpo_zero3.decoder_layers(engine.module)[2].mlp

    def afterwards(budget):
        return {
            "restored": state(engine) == before,
            "again": rollout(engine, rank, budget, limit=8) == expected,
            "step": train_step(engine, "dapo", rank, 2, folder),
        }

    for error in (Crash, KeyboardInterrupt):
        for name in ("all", "none", "half"):
            calls, budget = [], budgets(engine)[name]

            def crash(*_, calls=calls, error=error):
                calls.append(1)
                if len(calls) == 3:
                    raise error

            hook = layer.register_forward_pre_hook(crash)
            try:
                rollout(engine, rank, budget, limit=8)
                raised = False
            except error:
                raised = True
            finally:
                hook.remove()
            answers[f"{error.__name__} {name}"] = {"raised": raised} | afterwards(budget)
    for name in ("none", "half"):
        gather, calls, budget = grpo_zero3.gather, [], budgets(engine)[name]

        def fail(parameters, device, gather=gather, calls=calls):
            calls.append(1)
            gather(parameters, "nowhere" if len(calls) == 3 else device)

        grpo_zero3.gather = fail
        try:
            rollout(engine, rank, budget, limit=8)
            raised = False
        except RuntimeError as error:
            raised = "nowhere" in str(error)
        finally:
            grpo_zero3.gather = gather
        answers[f"gather {name}"] = {"raised": raised} | afterwards(budget)


def check_step(engine, rank, folder, answers):
    """The step after a rollout, against one without."""
    plain = train_step(engine, "dapo", rank, 2, folder)
    steps = [plain]
    for name in ("all", "none", "half"):
        rollout(engine, rank, budgets(engine)[name], limit=8)
        steps.append(train_step(engine, "dapo", rank, 2, folder))
    answers["steps"] = steps


def check_hooks(engine, rank, answers):
    """ZeRO-3's own hooks left in place: what the tests would see."""
    hooks_taken = grpo_zero3.hooks_taken
    grpo_zero3.hooks_taken = lambda handles: nullcontext()
    try:
        with Watched(engine) as watched:
            rollout(engine, rank, budgets(engine)["half"], watched)
    finally:
        grpo_zero3.hooks_taken = hooks_taken
    answers["hooks stay"] = {"between": watched.between}


def check_reduction(args, device, rank, world, answers):
    """In bf16: gradients of the two ranks together, less those of each one alone, in parts of the largest."""
    engine = load_engine(Arguments(**{**vars(args), "bf16": True, "max_grad_norm": 0.0}), device)
    row = flatten([{"input_ids": [7 * rank + i for i in range(20)], "labels": [0] * 20}])
    del row["labels"]

    def gradients(weights):
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
        engine.set_gradient_accumulation_boundary(True)
        logits = engine(**row, use_cache=False).logits.float()
        loss = torch.log_softmax(logits, dim=-1)[..., 5].sum()
        engine.backward(loss * weights[rank] * world, scale_wrt_gas=False)
        found = [safe_get_full_grad(parameter).clone() for parameter in engine.module.parameters()]
        engine.step()
        return found

    parts = zip(gradients([1, 1]), gradients([1, 0]), gradients([0, 1]))
    answers["lost in reduction"] = max(float((x - a - b).abs().max() / x.abs().max()) for x, a, b in parts)


def check_all(engine, args, device, rank, world, folder, answers):
    answers["tied"] = engine.module.lm_head.weight is engine.module.model.embed_tokens.weight
    answers["shards"] = sum(p.ds_tensor.numel() for p in engine.module.parameters())
    for name in LOSS_CASES:
        answers[f"loss {name}"] = train_step(engine, name, rank, world, folder, save=True)

    def off_by_one(batches):
        for batch in batches:
            batch["score_index"] = (batch["score_index"] + 1).clamp(max=batch["input_ids"].shape[1] - 1)

    answers["off by one"] = train_step(engine, "dapo", rank, world, folder, off_by_one)
    check_modes(engine, rank, answers)
    check_step(engine, rank, folder, answers)
    check_exceptions(engine, rank, folder, answers)
    check_hooks(engine, rank, answers)
    check_reduction(args, device, rank, world, answers)


def run(folder, flags=None):
    answers = {}
    args = Arguments(model_name_or_path=str(folder / "model"), collective_timeout_s=60.0, **(flags or {}))
    rank, _, world, device = grpo_zero3.start_distributed(args)
    watch = grpo_zero3.Watchdog(600.0, rank)
    try:
        engine = load_engine(args, device)
        if flags is None:
            check_all(engine, args, device, rank, world, folder, answers)
        else:
            parameters = list(engine.module.parameters())
            answers["on host"] = engine.zero_offload_param() is not None
            answers["padded"] = sum(p.ds_tensor.numel() * world - p.ds_numel for p in parameters)
            check_modes(engine, rank, answers)
    except BaseException:
        answers["error"] = traceback.format_exc()
    (folder / f"rank{rank}.json").write_text(json.dumps(answers))
    watch.close()
    if "error" in answers:
        print(answers["error"], file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(Path(sys.argv[1]), *map(json.loads, sys.argv[2:]))
