"""What test_grpo_zero3.py asks of two ranks, all in one start; every answer goes to <folder>/rank<r>.json.

PYTHONPATH=. deepspeed --num_gpus 2 tests/grpo_worker.py <folder>

<folder>/jobs.json lists runs of grpo_zero3.main: {name: {"flags": .., "sigterm": the rank that receives it in
the middle of the job's second rollout, "freeze": whether helpers.freeze_first}}. In the end the ranks hang.
"""

import gc
import itertools
import json
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.comm import coalesced_collectives
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_grad
from grpo_cases import BUCKET, LIMIT, LOSS_CASES, case_tensors, prompt_ids
from helpers import freeze_first
from safetensors.torch import save_file

import grpo_zero3
from common import offload
from common.memory import ByteCounter
from common.run import Run
from common.sharding import decoder_layers, read_pretrained
from grpo_zero3 import Arguments, generate, generation_weights, make_batches, train_step, whole_bytes

CPU = torch.device("cpu")


class Crash(Exception):
    pass


# where a rollout breaks, RuntimeError in mid-gather and the others in a layer; and with which budget
BREAKS = [(Crash, "all"), (Crash, "half"), (KeyboardInterrupt, "none"), (RuntimeError, "half")]


def engine_of(run, trainable=True, **flags):
    """The run's model in an engine, on rows; with other flags than the run's."""
    args = Arguments(**{**vars(run.args), **flags})
    pretrained = read_pretrained(args.model_name_or_path, dropout=False)
    engine = grpo_zero3.load_engine(args, run, pretrained, trainable)
    engine.module.set_attn_implementation("varlen")
    return engine


# --- Generation ---


def available(module):
    return [p for p in module.parameters() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]


def state(engine):
    """All that a rollout has to leave as it found it."""
    module, offload = engine.module, engine.optimizer.parameter_offload
    return {
        "hooks": [(list(m._forward_pre_hooks), list(m._forward_hooks)) for m in module.modules()],
        "handles": len(offload.forward_hooks) + len(offload.backward_hooks),
        "whole": len(available(module)),
        "markers": sum(len(p.ds_active_sub_modules) for p in module.parameters()),
        "training": [m.training for m in module.modules()],
        "attention": module.config._attn_implementation,
        "stack": len(FWD_MODULE_STACK),
        "in forward": sum(m._parameters._in_forward for m in module.modules()),
        "replaced": [name for name, m in module.named_modules() if "forward" in vars(m)],
    }


@contextmanager
def watched(engine, run):
    """Yields what a rollout gathers and exchanges once it has begun, by forward; what it holds."""
    seen = {"forwards": 0, "gathers": [], "gathered": [], "exchanged": [], "peak": 0, "between": []}
    module, gather, exchange = engine.module, grpo_zero3.gather, grpo_zero3.exchange

    def start(*_):
        seen["forwards"] += 1
        for name in ("gathers", "gathered", "exchanged"):
            seen[name].append(0)

    def note(*_):
        seen["peak"] = max(seen["peak"], whole_bytes(available(module)))

    def count(parameters, device):
        if seen["forwards"] and parameters:  # what is gathered before is resident
            seen["gathers"][-1] += 1
            seen["gathered"][-1] += whole_bytes(parameters)
        gather(parameters, device)

    def collective(function, output, *args, **kwargs):
        seen["exchanged"][-1] += output.nbytes
        return function(output, *args, **kwargs)

    def count_exchange(*args):
        with pytest.MonkeyPatch.context() as inner:
            for name in ("all_gather_into_tensor", "all_to_all_single"):
                inner.setattr(torch.distributed, name, partial(collective, getattr(torch.distributed, name)))
            return exchange(*args)

    hooks = [m.register_forward_hook(note) for m in module.modules()]
    hooks.append(module.register_forward_pre_hook(start))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_zero3, "gather", count)
        patch.setattr(grpo_zero3, "exchange", count_exchange)
        patch.setattr(run, "watch", lambda phase: seen["between"].append(whole_bytes(available(module))))
        yield seen
    for hook in hooks:
        hook.remove()


def rollout(engine, run, budget, limit=LIMIT, places=None, prompts=None, size=0):
    args = Arguments(num_generations=2, max_completion_length=limit, temperature=0.0)
    with generation_weights(engine, budget, places=places, size=size) as model:
        return generate(model, prompts or prompt_ids(run.rank), args, run, end_ids=[257])


def budgets(engine):
    total = whole_bytes(p for p in engine.module.parameters() if not grpo_zero3.is_small(p))
    return {"all": None, "none": 0, "half": total // 2, "exact": total, "byte": 1}


def check_mode(engine, run, mode):
    before, budget, places = state(engine), budgets(engine)[mode], []
    resident, streamed, largest = grpo_zero3.plan_residents(engine.module, budget)
    with watched(engine, run) as seen:
        completions, finished, _, steps = rollout(engine, run, budget, places=places)
    costs = grpo_zero3.rollout_costs(engine, budget, places, len(completions))
    return seen | {
        "costs": costs,
        "small": whole_bytes(p for p in engine.module.parameters() if grpo_zero3.is_small(p)),
        "completions": completions,
        "finished": finished,
        "steps": steps,
        "budget": budget,
        "resident": whole_bytes(resident),
        "streamed": streamed,
        "largest": largest,
        "restored": state(engine) == before,
    }


def raised(engine, run, budget, error):
    """Whether a rollout raises this error, which it meets in the third call of a layer, or of `gather`."""
    layer, gather, calls = decoder_layers(engine.module)[2].mlp, grpo_zero3.gather, itertools.count(1)

    def crash(*_):
        if error is not RuntimeError and next(calls) == 3:
            raise error

    def fail(parameters, device):
        third = error is RuntimeError and parameters and next(calls) == 3
        gather(parameters, "nowhere" if third else device)

    hook = layer.register_forward_pre_hook(crash)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_zero3, "gather", fail)
        try:
            rollout(engine, run, budget, 4)
        except error:
            return True
        finally:
            hook.remove()


def check_exceptions(engine, run, folder, answers):
    before, expected = state(engine), rollout(engine, run, None, 4)
    for error, mode in BREAKS:
        answers[f"{error.__name__}, {mode}"] = {
            "raised": raised(engine, run, budgets(engine)[mode], error),
            "restored": state(engine) == before,
            "again": rollout(engine, run, budgets(engine)[mode], 4) == expected,
            "step": step(engine, run, folder),
        }


def check_hooks(engine, run, answers):
    """ZeRO-3's own hooks left in place: what the tests would see."""
    with pytest.MonkeyPatch.context() as patch, watched(engine, run) as answers["hooks stay"]:
        patch.setattr(grpo_zero3, "hooks_taken", lambda handles: nullcontext())
        rollout(engine, run, budgets(engine)["half"], 4)


def check_three_ranks(run, folder, answers):
    """Models whose rows three ranks divide: biases, grouped queries, an untied head; windows, a tied one."""
    for name in ("qwen2", "mistral"):
        engine = engine_of(run, model_name_or_path=str(folder / name))
        for mode in budgets(engine):
            answers[f"{name}, {mode}"] = check_mode(engine, run, mode)
        # so many sequences that q, k and v (of 48, 24 and 24 rows) travel, and not gate and up (of 96 each)
        with watched(engine, run) as seen:
            found = rollout(engine, run, 0, 4, places := [], size=20)[0]
        announced = grpo_zero3.rollout_costs(engine, 0, places, 20)
        answers[f"{name}, many"] = {
            "same": found == rollout(engine, run, None, 4)[0],
            "gathered": [seen["gathered"][-1], announced["gathered_bytes_per_token"]],
            "exchanged": seen["exchanged"][-1] / len(found) == announced["exchanged_bytes_per_token"] / 20,
        }
        # a prompt of one token, beside other ranks' longer ones, is no token that is decoded
        places, short = [], [[5], [7]] if run.rank == 0 else [[5, 6, 7], [8, 9]]
        rollout(engine, run, 0, 2, places)
        found = [rollout(engine, run, budget, 4, places, short)[0] for budget in (0, None)]
        answers[f"{name}, short prompts"] = bool(places) and found[0] == found[1]
        for mutation in (other_ranks_rows, stale_inputs):
            with pytest.MonkeyPatch.context() as patch:
                mutation(patch)
                answers[f"{name}, {mutation.__name__}"] = rollout(engine, run, 0)[0]


def other_ranks_rows(patch):
    exchange = grpo_zero3.exchange

    def swapped(x, rows):
        made = exchange(x, rows)
        return {part: y.unflatten(-1, (3, -1)).flip(-2).flatten(-2) for part, y in made.items()}

    patch.setattr(grpo_zero3, "exchange", swapped)


def stale_inputs(patch):
    """Of each part what it gave first."""
    exchange, first = grpo_zero3.exchange, {}

    def stale(x, rows):
        return {part: first.setdefault(part, y) for part, y in exchange(x, rows).items()}

    patch.setattr(grpo_zero3, "exchange", stale)


# --- Updates ---


def case_batches(run, args, name, folder):
    """A case of grpo_cases as `train_step` takes it."""
    base = json.loads((folder / "base.json").read_text())[name]
    groups, advantages, old, ref, lengths = case_tensors(name, run.rank, run.world, base)
    denominators = grpo_zero3.loss_denominators(lengths, 3, args.loss_type, 9, run.sum)
    batches, done = make_batches(groups, advantages, denominators, 40, run), 0
    for batch in batches:
        if done == len(old):
            break  # a dummy
        part = slice(done, done + len(batch["completion_lengths"]))
        if args.num_iterations > 1:
            batch["old_per_token_logps"] = torch.cat(old[part])
        if args.beta:
            batch["ref_per_token_logps"] = torch.cat(ref[part])
        done = part.stop
    return batches


def step(engine, run, folder, name="dapo", change=lambda batch: None, save=False):
    """One step on a case of grpo_cases; its gradients go to a file. Returns its sums, and more."""
    args = Arguments(**{"loss_chunk_size": 7, "num_iterations": 2} | LOSS_CASES[name])
    batches = case_batches(run, args, name, folder)
    for batch in batches:
        change(batch)
    for group in engine.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    gradients, engine_step, forwards = {}, engine.step, []

    def read_then_step():
        for key, parameter in engine.module.named_parameters():
            gradients[key] = safe_get_full_grad(parameter).clone()
        engine_step()

    layer = decoder_layers(engine.module)[2].mlp
    hook = layer.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "step", read_then_step)
        sums, norm = train_step(engine, batches, args, run)
    hook.remove()
    if save and run.first:
        save_file(gradients, folder / f"{name}.safetensors")
    return {"sums": sums, "norm": norm, "batches": len(batches), "layer_forwards": len(forwards)}


def off_by_one(batch):
    batch["score_index"] = (batch["score_index"] + 1).clamp(max=batch["input_ids"].shape[1] - 1)


def lost_in_reduction(run):
    """In bf16: gradients of the two ranks together, less those of each one alone, in parts of the largest."""
    engine, args = engine_of(run, bf16=True, max_grad_norm=0.0), Arguments()
    ids = [7 * run.rank + i for i in range(20)]

    def gradients(weights):
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
        engine.set_gradient_accumulation_boundary(True)
        [batch] = make_batches([(ids, [ids])], torch.ones(1), torch.ones(1), 40, run)
        loss = grpo_zero3.per_token_logps(engine, batch, args).sum()
        engine.backward(loss * weights[run.rank] * run.world, scale_wrt_gas=False)
        found = [safe_get_full_grad(parameter).clone() for parameter in engine.module.parameters()]
        engine.step()
        return found

    parts = zip(gradients([1, 1]), gradients([1, 0]), gradients([0, 1]))
    return max(float((x - a - b).abs().max() / x.abs().max()) for x, a, b in parts)


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
    engine, args = engine_of(run, **flags), Arguments(**flags)
    size, group = args.per_device_train_batch_size, args.num_generations
    prompts = [[5 + i] * args.max_prompt_length for i in range(size // group)]  # without a common beginning
    completions = [[7] * args.max_completion_length for _ in range(group)]

    def update():
        groups, ones = [(prompt, completions) for prompt in prompts], torch.ones(size)
        train_step(engine, make_batches(groups, ones, ones, grpo_zero3.longest_group(args), run), args, run)

    def roll_out():
        with generation_weights(engine, grpo_zero3.budget_bytes(args)) as model:
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
    original, calls = grpo_zero3.generate, itertools.count(1)

    def interrupted(*args, **kwargs):
        if next(calls) == 2 and job.get("sigterm") == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_zero3, "generate", interrupted)
        patch.setattr(offload, "MIN_BYTES", 1)
        if job.get("freeze"):
            freeze_first(grpo_zero3, patch)
        try:
            return {"returned": grpo_zero3.main(Arguments(**job["flags"]))}
        except (ValueError, FloatingPointError) as error:
            return {"error": f"{type(error).__name__}: {error}"}


def check_all(run, folder, answers):
    engine = engine_of(run)
    answers["tied"] = engine.module.lm_head.weight is engine.module.model.embed_tokens.weight
    answers["shards"] = sum(p.ds_tensor.numel() for p in engine.module.parameters())
    for name in LOSS_CASES:
        answers[f"loss {name}"] = step(engine, run, folder, name, save=True)
    answers["off by one"] = step(engine, run, folder, change=off_by_one)
    for mode in budgets(engine):
        answers[f"demo, {mode}"] = check_mode(engine, run, mode)
    answers["steps"] = [step(engine, run, folder)]
    for mode in ("all", "none", "half"):
        rollout(engine, run, budgets(engine)[mode], 4)
        answers["steps"].append(step(engine, run, folder))
    check_exceptions(engine, run, folder, answers)
    check_hooks(engine, run, answers)
    answers["lost in reduction"] = lost_in_reduction(run)
    odd = {"model_name_or_path": str(folder / "odd"), "offload_optimizer": True, "offload_param": True}
    engine = engine_of(run, **odd)
    answers["on host"] = engine.zero_offload_param() is not None
    shards = [(p.ds_tensor.numel(), p.ds_numel) for p in engine.module.parameters()]
    answers["padded"] = sum(shard * run.world - whole for shard, whole in shards)
    for mode in ("none", "half"):
        answers[f"odd, {mode}"] = check_mode(engine, run, mode)
    with pytest.MonkeyPatch.context() as patch:
        small_buckets(patch)
        hold_no_more_than_nccl(patch)
        for name, flags in json.loads((folder / "ways.json").read_text()).items():
            answers[f"bytes {name}"] = count_bytes(run, flags)


def hang(run, folder, _):
    """Unequally many micro-batches."""
    engine, args = engine_of(run), Arguments(**LOSS_CASES["dapo"])
    train_step(engine, case_batches(run, args, "dapo", folder)[: 1 if run.rank else 2], args, run)


def in_a_run(function, folder, answers, timeout):
    names = {"model_name_or_path": str(folder / "model"), "output_dir": str(folder / "none")}
    args = Arguments(**names, collective_timeout_s=timeout)
    with Run(args, "GRPO") as run, grpo_zero3.deepspeed_groups(run):
        function(run, folder, answers)


if __name__ == "__main__":
    folder, rank = Path(sys.argv[-1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    answers = {"launcher's words": sys.argv[1:-1]}
    # once: a second group from the launcher's store would meet the addresses of the first
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_world_size() == 3:
        in_a_run(check_three_ranks, folder, answers, timeout=120.0)
        (folder / f"rank{rank}.json").write_text(json.dumps(answers))
        sys.exit()
    in_a_run(check_all, folder, answers, timeout=120.0)
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        answers[f"job {name}"] = run_job(job, rank)
    (folder / f"rank{rank}.json").write_text(json.dumps(answers))
    torch.distributed.barrier()
    in_a_run(hang, folder, answers, timeout=4.0)
