"""What test_grpo_zero3.py asks of two ranks, all in one start; every answer goes to <folder>/rank<r>.json.

deepspeed --num_gpus 2 tests/grpo_worker.py <folder>

<folder>/jobs.json lists runs of grpo_zero3.main: {name: {"flags": .., "sigterm": the rank that receives it in
the middle of the job's second rollout, "freeze": whether helpers.freeze_first}}. In the end the ranks hang.
"""

import gc
import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from deepspeed.runtime.comm import coalesced_collectives  # noqa: E402
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus  # noqa: E402
from deepspeed.utils import safe_get_full_grad  # noqa: E402
from grpo_cases import BUCKET, LIMIT, LOSS_CASES, case_tensors, prompt_ids  # noqa: E402
from helpers import freeze_first  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import grpo_zero3  # noqa: E402
from common.memory import ByteCounter  # noqa: E402
from common.run import Run  # noqa: E402
from common.sharding import read_pretrained  # noqa: E402
from grpo_zero3 import (  # noqa: E402
    Arguments,
    budget_bytes,
    deepspeed_groups,
    generate,
    generation_units,
    generation_weights,
    load_engine,
    longest_group,
    loss_denominators,
    make_batches,
    per_token_logps,
    plan_residents,
    train_step,
    whole_bytes,
)

CPU = torch.device("cpu")


class Crash(Exception):
    pass


def engine_of(run, **flags):
    """The run's model in an engine, on rows; with other flags than the run's."""
    args = Arguments(**{**vars(run.args), **flags})
    pretrained = read_pretrained(args.model_name_or_path, dropout=False)
    engine = load_engine(args, run, pretrained)
    engine.module.set_attn_implementation("varlen")
    return engine


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

    def __init__(self, engine, run):
        self.module, self.run = engine.module, run
        self.forwards, self.gathered, self.peak, self.between = 0, [], 0, []
        self.started = False  # what is gathered before the first forward is resident

    def start(self, *_):
        self.started = True

    def note(self, *_):
        self.peak = max(self.peak, whole_bytes(available(self.module)))

    def __enter__(self):
        self.original, grpo_zero3.gather = grpo_zero3.gather, self.gather
        self.run.watch = lambda phase: self.between.append(whole_bytes(available(self.module)))
        self.hooks = [m.register_forward_hook(self.note) for m in self.module.modules()]
        self.hooks.append(self.module.register_forward_pre_hook(self.start))
        self.hooks.append(self.module.register_forward_hook(self.count))
        return self

    def __exit__(self, *_):
        grpo_zero3.gather = self.original
        del self.run.watch
        for hook in self.hooks:
            hook.remove()

    def count(self, *_):
        self.forwards += 1

    def gather(self, parameters, device):
        if self.started:
            self.gathered.append(whole_bytes(parameters))
        self.original(parameters, device)


def rollout(engine, run, budget, limit=LIMIT):
    args = Arguments(num_generations=2, max_completion_length=limit, temperature=0.0)
    with generation_weights(engine, budget) as model:
        return generate(model, prompt_ids(run.rank), args, run, end_ids=[257])


def budgets(engine):
    sizes = [whole_bytes(parameters) for parameters, _ in generation_units(engine.module)]
    total = sum(sizes)
    return {"all": None, "none": 0, "half": total // 2, "exact": total, "byte": 1}


def check_modes(engine, run, answers, names=("all", "none", "half", "exact", "byte")):
    before = state(engine)
    for name in names:
        budget = budgets(engine)[name]
        resident, streamed, largest = plan_residents(engine.module, budget)
        with Watched(engine, run) as watched:
            completions, finished, _, steps = rollout(engine, run, budget)
        answers[f"mode {name}"] = {
            "completions": completions,
            "finished": finished,
            "steps": steps,
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


def case_batches(run, args, name, base):
    """A case of grpo_cases as `train_step` takes it."""
    groups, advantages, old, ref, lengths = case_tensors(name, run.rank, run.world, base)
    denominators = loss_denominators(lengths, len(groups[0][1]), args.loss_type, 9, run.sum)
    batches, done = make_batches(groups, advantages, denominators, 40, run), 0
    for batch in batches:
        if done == len(old):
            break  # a dummy
        count = len(batch["score_ids"])
        batch["old_per_token_logps"] = old[done : done + count]
        if args.beta:
            batch["ref_per_token_logps"] = ref[done : done + count]
        done += count
    return batches


def step(engine, run, folder, name="dapo", change=lambda batches: None, save=False):
    """One step on a case of grpo_cases; its gradients go to a file. Returns its sums, and more."""
    args = Arguments(loss_chunk_size=7, **LOSS_CASES[name])
    batches = case_batches(run, args, name, json.loads((folder / "base.json").read_text())[name])
    change(batches)
    for group in engine.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    gradients, engine_step, forwards = {}, engine.step, []
    hook = grpo_zero3.decoder_layers(engine.module)[2].mlp.register_forward_pre_hook(
        lambda *_: forwards.append(1)
    )

    def read_then_step():
        for key, parameter in engine.module.named_parameters():
            gradients[key] = safe_get_full_grad(parameter).clone()
        engine_step()

    engine.step = read_then_step
    try:
        sums, norm = train_step(engine, batches, args, run)
    finally:
        hook.remove()
        del engine.step
    if save and run.first:
        save_file(gradients, folder / f"{name}.safetensors")
    return {"sums": sums, "norm": norm, "batches": len(batches), "layer_forwards": len(forwards)}


def check_exceptions(engine, run, folder, answers):
    """In a module, or in mid-gather: the engine works on."""
    before, expected = state(engine), rollout(engine, run, None, 4)
    layer = grpo_zero3.decoder_layers(engine.module)[2].mlp
    for error, name in ((Crash, "all"), (Crash, "half"), (KeyboardInterrupt, "none"), (RuntimeError, "half")):
        calls, budget, gather, raised = [], budgets(engine)[name], grpo_zero3.gather, False

        def crash(*_, calls=calls, error=error):
            calls.append(1)
            if len(calls) == 3:
                raise error

        def fail(parameters, device, gather=gather, calls=calls):
            calls.append(1)
            gather(parameters, "nowhere" if len(calls) == 3 else device)

        in_gather = error is RuntimeError
        hook = None if in_gather else layer.register_forward_pre_hook(crash)
        grpo_zero3.gather = fail if in_gather else gather
        try:
            rollout(engine, run, budget, 4)
        except error:
            raised = True
        finally:
            grpo_zero3.gather = gather
            if hook is not None:
                hook.remove()
        answers[f"{error.__name__} {name}"] = {
            "raised": raised,
            "restored": state(engine) == before,
            "again": rollout(engine, run, budget, 4) == expected,
            "step": step(engine, run, folder),
        }


def check_hooks(engine, run, answers):
    """ZeRO-3's own hooks left in place: what the tests would see."""
    hooks_taken, grpo_zero3.hooks_taken = grpo_zero3.hooks_taken, lambda handles: nullcontext()
    try:
        with Watched(engine, run) as watched:
            rollout(engine, run, budgets(engine)["half"], 4)
    finally:
        grpo_zero3.hooks_taken = hooks_taken
    answers["hooks stay"] = {"between": watched.between}


def check_reduction(run, answers):
    """In bf16: gradients of the two ranks together, less those of each one alone, in parts of the largest."""
    engine, args = engine_of(run, bf16=True, max_grad_norm=0.0), Arguments()
    ids = [7 * run.rank + i for i in range(20)]

    def gradients(weights):
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
        engine.set_gradient_accumulation_boundary(True)
        [batch] = make_batches([(ids, [ids])], torch.ones(1), torch.ones(1), 40, run)
        loss = per_token_logps(engine, batch, args).sum()
        engine.backward(loss * weights[run.rank] * run.world, scale_wrt_gas=False)
        found = [safe_get_full_grad(parameter).clone() for parameter in engine.module.parameters()]
        engine.step()
        return found

    parts = zip(gradients([1, 1]), gradients([1, 0]), gradients([0, 1]))
    answers["lost in reduction"] = max(float((x - a - b).abs().max() / x.abs().max()) for x, a, b in parts)


# --- Bytes ---


def tensors_in(value, depth=6):
    if torch.is_tensor(value):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for v in values for tensor in tensors_in(v, depth - 1)] if depth else []


def hold_no_more_than_nccl(patch):
    """gloo reduces a copy of the gradients, and its thread lets go of gathered weights a little late."""
    gather = grpo_zero3.gather

    def reduce_in_place(gradients, share, group=None, **_):  # share is a view of gradients
        torch.distributed.all_reduce(gradients, group=group)

    def gather_and_wait(parameters, device):
        gather(parameters, device)
        time.sleep(0.01)

    patch.setattr(coalesced_collectives, "_torch_reduce_scatter_fn", reduce_in_place)
    patch.setattr(grpo_zero3, "gather", gather_and_wait)


def small_buckets(patch):
    """DeepSpeed's bucket of 50 million elements would hide all else of a small model."""
    config = grpo_zero3.deepspeed_config

    def configured(*args):
        found = config(*args)
        found["zero_optimization"]["reduce_bucket_size"] = BUCKET
        return found

    patch.setattr(grpo_zero3, "deepspeed_config", configured)


def count_bytes(run, flags):
    """ZeRO-3: the peaks of a rollout and of an update with its optimizer's step; what is held throughout."""
    args = Arguments(**{**vars(run.args), **flags})
    engine = engine_of(run, **flags)
    size, group = args.per_device_train_batch_size, args.num_generations
    prompts = [[5] * args.max_prompt_length for _ in range(size // group)]
    completions = [[7] * args.max_completion_length for _ in range(group)]

    def update():
        groups, ones = [(prompt, completions) for prompt in prompts], torch.ones(size)
        train_step(engine, make_batches(groups, ones, ones, longest_group(args), run), args, run)

    def roll_out():
        with generation_weights(engine, budget_bytes(args)) as model:
            uniform = torch.rand(size, args.max_completion_length)
            generate(model, prompts, args, run, end_ids=[], uniform=uniform)

    update()  # makes buffers and moments
    peaks, optimizer = {}, engine.optimizer
    for name, phase in (("rollout", roll_out), ("update", update)):
        tracker = ByteCounter()
        states = [vars(bucket) for bucket in optimizer.ipg_buckets.values()]
        states += [vars(optimizer), *optimizer.optimizer.state.values()]
        tracker.track_external(*tensors_in([p.ds_tensor for p in engine.module.parameters()] + states))
        held = tracker.get_tracker_snapshot()[CPU]["Total"]
        # DeepSpeed's gathers leave cycles, whose buffers would wait for the collector, by chance: let it look
        # often, and at what is new alone, or it would take all of the time
        gc.collect()
        gc.freeze()
        gc.set_threshold(100)
        with tracker:
            phase()
        peaks[name] = tracker.peak_bytes(CPU)
        gc.set_threshold(700)
        gc.unfreeze()
    return {"held": held, **peaks}


# --- Runs ---


def run_job(job, rank):
    original, calls = grpo_zero3.generate, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 and job.get("sigterm") == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_zero3, "generate", interrupted)
        if job.get("freeze"):
            freeze_first(grpo_zero3, patch)
        try:
            return {"returned": grpo_zero3.main(Arguments(**job["flags"]))}
        except (ValueError, FloatingPointError) as error:
            return {"error": f"{type(error).__name__}: {error}"}


def check_all(folder, answers):
    args = Arguments(
        model_name_or_path=str(folder / "model"), output_dir=str(folder / "none"), collective_timeout_s=120.0
    )
    with Run(args, "GRPO") as run, deepspeed_groups(run):
        engine = engine_of(run)
        answers["tied"] = engine.module.lm_head.weight is engine.module.model.embed_tokens.weight
        answers["shards"] = sum(p.ds_tensor.numel() for p in engine.module.parameters())
        for name in LOSS_CASES:
            answers[f"loss {name}"] = step(engine, run, folder, name, save=True)

        def off_by_one(batches):
            for batch in batches:
                batch["score_index"] = (batch["score_index"] + 1).clamp(max=batch["input_ids"].shape[1] - 1)

        answers["off by one"] = step(engine, run, folder, change=off_by_one)
        check_modes(engine, run, answers)
        answers["steps"] = [step(engine, run, folder)]
        for name in ("all", "none", "half"):
            rollout(engine, run, budgets(engine)[name], 4)
            answers["steps"].append(step(engine, run, folder))
        check_exceptions(engine, run, folder, answers)
        check_hooks(engine, run, answers)
        check_reduction(run, answers)
        flags = {"model_name_or_path": str(folder / "odd"), "offload_optimizer": True, "offload_param": True}
        answers["odd"] = {}
        engine = engine_of(run, **flags)
        parameters = list(engine.module.parameters())
        answers["odd"]["on host"] = engine.zero_offload_param() is not None
        answers["odd"]["padded"] = sum(p.ds_tensor.numel() * run.world - p.ds_numel for p in parameters)
        check_modes(engine, run, answers["odd"], ["none", "half"])
        with pytest.MonkeyPatch.context() as patch:
            small_buckets(patch)
            hold_no_more_than_nccl(patch)
            ways = json.loads((folder / "ways.json").read_text())
            names = ("half", "three micro-batches")
            answers["bytes"] = {name: count_bytes(run, ways[name]) for name in names}


def hang(folder):
    """Unequally many micro-batches."""
    flags = {"model_name_or_path": str(folder / "model"), "output_dir": str(folder / "none")}
    with Run(Arguments(**flags, collective_timeout_s=4.0), "GRPO") as run, deepspeed_groups(run):
        engine, args = engine_of(run), Arguments(**LOSS_CASES["dapo"])
        batches = case_batches(run, args, "dapo", json.loads((folder / "base.json").read_text())["dapo"])
        train_step(engine, batches[: 1 if run.rank else 2], args, run)


if __name__ == "__main__":
    folder, rank = Path(sys.argv[-1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    answers = {"launcher's words": sys.argv[1:-1]}
    # once: a second group from the launcher's store would meet the addresses of the first
    torch.distributed.init_process_group("gloo")
    check_all(folder, answers)
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        answers[f"job {name}"] = run_job(job, rank)
    (folder / f"rank{rank}.json").write_text(json.dumps(answers))
    torch.distributed.barrier()
    hang(folder)
