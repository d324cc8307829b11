"""GRPO under ZeRO-3: generate with all of the weights gathered, with none, or with a budget of them.

ZeRO-3 keeps 1/W of all P weights on each of W ranks. Training gathers a layer once for thousands of tokens;
generation gathers it for every token. This script holds `--gather_budget_gib` of the weights whole during a
rollout (all: c P bytes; none: 0) and streams the rest, one gather per layer and token: the peak is the budget
plus one layer (and an embedding that is the head as well, if it does not fit), and the tokens are the same.
The update computes each prompt once for its G completions: P + sum(C_i) tokens instead of G P + sum(C_i).
Dropout is off: the rollout that an update is compared with, and the reference, are computed without.
Left out to stay readable: vLLM, LoRA, vision inputs, tools, several updates from parts of one rollout.

laptop   python grpo_zero3.py
2 GPUs   deepspeed --num_gpus 2 grpo_zero3.py --model_name_or_path Qwen/Qwen3-1.7B --bf16 \
             --dataset_name my_questions.jsonl --reward_funcs last_number
nodes    deepspeed --hostfile hosts grpo_zero3.py --gather_budget_gib 8 ...; torchrun works as well
no GPU   python grpo_zero3.py --dry_run --dry_run_world_size 8 --gpu_memory_gib 80 ... says what fits
Sources: arXiv 2402.03300 (GRPO), 2503.14476 (DAPO), 2503.20783 (Dr. GRPO), 1910.02054 (ZeRO)
"""

import copy
import hashlib
import inspect
import json
import math
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param
from deepspeed.utils import safe_get_full_fp32_param, safe_set_local_fp32_param, set_z3_leaf_modules
from tqdm import tqdm
from transformers import DynamicCache, get_scheduler
from transformers.generation import StopStringCriteria

from common.attention import check_isolation, register_varlen_attention
from common.checkpoints import (
    check_output_dir,
    commit_files,
    commit_folder,
    disk_errors_refused,
    find_checkpoint,
    fresh_folder,
    prepare_output_dir,
    rotate_checkpoints,
)
from common.collators import flatten, flatten_shared_prompt
from common.data import (
    check_chat_template,
    check_row,
    check_token_ids,
    encode_prompt,
    end_token_ids,
    load_rows,
    map_rows,
    source_hash,
    template_kwargs,
    unused_columns,
)
from common.dry_run import explore, pretend
from common.flags import Refusal, check_dry_run, flag, refuse, run_script, together
from common.logps import check_head, head_computes, token_logps, two_chunks_only
from common.memory import ByteCounter, MemoryMeter, format_ledger, memory_ledger, peak_memory_bytes
from common.pretrained import (
    assert_loaded,
    empty_model,
    load_config,
    load_whole,
    max_positions,
    read_pretrained,
    saved_shapes,
    try_to_write,
    write_pretrained_streamed,
)
from common.report import (
    describe_dry_run,
    describe_prompts,
    describe_rewards,
    describe_speed,
    describe_start,
    format_completions,
    ledger_title,
    summarize,
    write_metrics,
)
from common.rewards import call_rewards, check_answers, columns_read, load_reward_funcs
from common.trained import check_frozen, checkpoint_layers, parameter_groups, trained
from common.truncation import check_limit, truncate_pair
from common.watchdog import Watchdog
from common.zero3 import (
    ReducesPretended,
    gathers_pretended,
    most_whole,
    zero3_learned_bytes,
    zero3_ledger,
    zero3_moments,
)

HERE = Path(__file__).resolve().parent


# --- 1. Arguments ---


Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]


@dataclass
class Arguments:
    model_name_or_path: str = flag(str(HERE / "demo/model"), "Hub name or folder of a causal language model")
    dataset_name: str = flag(str(HERE / "demo/prompts.jsonl"), "Hub name, file, or folder by save_to_disk")
    dataset_train_split: str = flag("train", "split of a Hub dataset to train on")
    dataset_num_proc: int | None = flag(None, "processes that tokenise")
    output_dir: str = flag("outputs/grpo", "folder for model, checkpoints, metrics.jsonl and summary.json")
    overwrite_output_dir: bool = flag(False, "replace the run that output_dir holds")
    reward_funcs: str = flag("last_word", "last_word, last_number, or module:function; several with commas")

    max_prompt_length: int = flag(256, "tokens of a prompt, whose end is kept")
    max_completion_length: int = flag(64, "tokens after which a completion is cut off")
    num_generations: int = flag(8, "completions of a prompt, which are compared with one another")
    per_device_train_batch_size: int = flag(32, "completions per rank and rollout, whole groups")
    max_tokens_per_batch: int | None = flag(
        None, "tokens per forward of the update; None = the longest possible group"
    )
    temperature: float = flag(1.0, "of sampling, and of the log-probabilities")
    top_k: int = flag(0, "sample from the k likeliest tokens; 0 = all")
    top_p: float = flag(1.0, "sample from the likeliest tokens whose probabilities sum up to this")
    stop_strings: list[str] | None = flag(None, "texts that end a completion as well as the EOS token")

    ds3_gather_for_generation: bool = flag(True, "gather all weights for a rollout; --no_..: none")
    gather_budget_gib: float | None = flag(None, "instead: GiB of weights to keep gathered on each rank")
    offload_optimizer: bool = flag(False, "keep the optimizer's states, and update, on the host")
    offload_param: bool = flag(False, "keep the shards on the host, too")
    deepspeed: str | None = flag(None, "a JSON file with DeepSpeed settings that replace this script's")
    collective_timeout_s: float = flag(1800.0, "end a run in which nothing has moved for so many seconds")

    loss_type: str = flag("dapo", "what a token's loss is divided by: dapo, grpo, bnpo, dr_grpo")
    scale_rewards: bool = flag(True, "divide advantages by the standard deviation of the group's rewards")
    epsilon: float = flag(0.2, "clip the probability ratio below 1 - epsilon")
    epsilon_high: float | None = flag(None, "and above 1 + epsilon_high; None = epsilon")
    num_iterations: int = flag(1, "optimizer steps on each rollout")
    beta: float = flag(0.0, "weight of the KL divergence from the reference; 0 = no reference model")
    mask_truncated_completions: bool = flag(False, "completions that were cut off teach nothing")

    learning_rate: float = flag(1e-6, "peak of the schedule")
    lr_scheduler_type: Schedule = flag("linear", "how the learning rate decays")
    warmup_steps: int = flag(0, "steps of linear warm-up")
    weight_decay: float = flag(0.0, "AdamW's, of matrices: norms and biases do not decay")
    max_grad_norm: float = flag(1.0, "clip the global gradient norm to this; 0 = no clipping")
    num_train_epochs: float = flag(1.0, "passes over the prompts, rounded up to whole rollouts")
    max_steps: int = flag(-1, "optimizer steps, overriding num_train_epochs; -1 = off")
    gradient_checkpointing: bool = flag(True, "keep the layers' inputs only; compute the rest again")
    bf16: bool = flag(False, "weights, activations and gathers in bfloat16; the optimizer stays in fp32")
    loss_chunk_size: int = flag(256, "tokens per chunk of the loss head")
    seed: int = flag(0, "order of the prompts, and sampling")

    logging_steps: int = flag(1, "refresh the progress bar every so many steps; metrics.jsonl has each step")
    log_completions_steps: int | None = flag(None, "show a few completions every so many steps")
    save_steps: int | None = flag(None, "write a checkpoint every so many steps; None = only on SIGTERM")
    save_total_limit: int | None = flag(None, "keep this many newest checkpoints; None = all")
    resume_from_checkpoint: str | None = flag(None, "a folder checkpoint-<step>, or 'latest' in output_dir")
    check_isolation: bool = flag(True, "before training, prove on the first prompts that they do not mix")
    dry_run: bool = flag(False, "do not train: from the model's configuration, count the bytes of one step")
    dry_run_world_size: int = flag(1, "with --dry_run: the number of ranks to count for")
    gpu_memory_gib: float | None = flag(None, "with --dry_run: say what fits into so many GiB")


def check_arguments(args):
    """Raise ValueError for values and combinations that would be wrong or ignored."""
    required = ("max_prompt_length", "max_completion_length", "per_device_train_batch_size", "num_iterations")
    for name in (*required, "loss_chunk_size", "logging_steps"):
        check_limit(f"--{name}", getattr(args, name) or 0)
    optional = ("max_tokens_per_batch", "save_steps", "save_total_limit", "log_completions_steps")
    for name in (*optional, "dataset_num_proc"):
        check_limit(f"--{name}", getattr(args, name))
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "beta", "epsilon"):
        if not 0 <= getattr(args, name) < math.inf:
            raise Refusal(f"--{name} is {getattr(args, name)}; it must be a finite number >= 0.")
    steps, epochs, group = args.max_steps, args.num_train_epochs, args.num_generations
    refuse(steps < 1 and steps != -1, f"--max_steps {steps}: give a number >= 1, or -1 for num_train_epochs.")
    ignored = args.warmup_steps and args.lr_scheduler_type == "constant"
    refuse(ignored, f"--warmup_steps {args.warmup_steps} needs --lr_scheduler_type constant_with_warmup.")
    refuse(not 0 < epochs < math.inf, f"--num_train_epochs {epochs}: it must be a finite number above 0.")
    refuse(args.seed < 0, f"--seed {args.seed}: give a number >= 0.")
    refuse(group < 2, f"--num_generations {group}: a completion needs another one to be compared with.")
    size = args.per_device_train_batch_size
    whole = f"--per_device_train_batch_size {size} is not a multiple of --num_generations {group}: groups are"
    refuse(size % group, f"{whole} not split over ranks. Choose {max(size // group, 1) * group}.")
    refuse(args.loss_type not in LOSSES, f"--loss_type {args.loss_type}: choose one of {', '.join(LOSSES)}.")
    refuse(args.epsilon >= 1, f"--epsilon {args.epsilon}: a ratio is above 0, so clip below 1 - epsilon > 0.")
    high = args.epsilon_high
    refuse(high is not None and not 0 < high < math.inf, f"--epsilon_high {high}: give a number above 0.")
    longest = args.max_prompt_length + group * args.max_completion_length
    budget = args.max_tokens_per_batch
    needs = f"a group may take {longest} (max_prompt_length + num_generations * max_completion_length)."
    refuse(budget and budget < longest, f"--max_tokens_per_batch {budget} is too small: {needs} Raise it.")
    same = "every completion of a group would be the same one, and teach nothing: give a number above 0."
    refuse(not 0 < args.temperature < math.inf, f"--temperature {args.temperature}: {same}")
    refuse(args.top_k < 0, f"--top_k {args.top_k}: give a number of tokens, or 0 for all.")
    refuse(not 0 < args.top_p <= 1, f"--top_p {args.top_p}: give a number above 0 and up to 1.")
    empty = '--stop_strings "" would end every completion at its first token: drop it.'
    refuse("" in (args.stop_strings or ()), empty)
    gather = args.gather_budget_gib
    refuse(gather is not None and not 0 <= gather < math.inf, f"--gather_budget_gib {gather}: give GiB >= 0.")
    both = (
        "--gather_budget_gib says how much to gather, --no_ds3_gather_for_generation says nothing: drop one."
    )
    refuse(gather is not None and not args.ds3_gather_for_generation, both)
    every = args.num_iterations
    for name in ("save_steps", "max_steps"):
        count = getattr(args, name)
        mid = f"--{name} {count} falls into mid-rollout: give a multiple of --num_iterations {every}."
        refuse(count and count > 0 and count % every, mid)
    seconds = args.collective_timeout_s
    refuse(not 0 < seconds < 1e9, f"--collective_timeout_s {seconds}: give a finite number above 0.")
    host = (
        "--offload_param keeps the shards on the host, where the optimizer must be: add --offload_optimizer."
    )
    refuse(args.offload_param and not args.offload_optimizer, host)
    check_dry_run(args)
    deepspeed_config(args)  # reads the file of --deepspeed


# --- 2. Data ---


class Prompts:
    """Tokenised prompts in an endless, shuffled stream, with their columns for the rewards."""

    def __init__(self, args, tokenizer):
        name = args.dataset_name
        rows = load_rows(name, args.dataset_train_split)
        if "prompt" not in rows.column_names:
            raise Refusal(f"{name} has the columns {', '.join(rows.column_names)}; wanted: prompt.")
        self.conversational = isinstance(rows[0]["prompt"], list)
        if self.conversational:
            check_chat_template(tokenizer, name, args.model_name_or_path)
        # by itself: the cache's key is a hash of all that the function refers to
        limit = args.max_prompt_length

        def encode(example, index):
            try:
                check_row(example, ["prompt"])
                prompt_ids = encode_prompt(example["prompt"], tokenizer, template_kwargs(example))
            except Refusal as error:  # a null, a number, a role that the template refuses
                raise Refusal(f"{name}, example {index}: {error}") from error
            if not prompt_ids:
                raise Refusal(f"{name}, example {index}: the prompt is empty.")
            kept, _ = truncate_pair(prompt_ids, [], max_prompt_length=limit)
            return {"input_ids": kept, "tokens_cut": len(prompt_ids) - len(kept)}

        self.examples = map_rows(
            rows,
            encode,
            source_hash(__file__),
            with_indices=True,
            remove_columns=rows.column_names,
            num_proc=args.dataset_num_proc,
            desc=f"Tokenising {name}",
        )
        self.rows, self.seed = rows, args.seed
        # a completion in the data is not the one that a reward judges
        self.reward_columns = [name for name in rows.column_names if name not in ("prompt", "completion")]
        cut = np.array(self.examples["tokens_cut"])
        self.data = {
            "examples_read": len(rows),
            "examples_truncated": int((cut > 0).sum()),
            "tokens_kept": sum(map(len, self.examples["input_ids"])),
            "tokens_cut": int(cut.sum()),
        }

    def __len__(self):
        return len(self.examples)

    def fingerprint(self):
        """Names the prompts' tokens and their order: a position in it means nothing in another one."""
        text = json.dumps([self.examples["input_ids"][:], self.seed])
        return hashlib.sha256(text.encode()).hexdigest()

    def numbers(self, start, count):
        """The stream's prompts start .. start + count: each epoch in an order of its own, without a gap."""
        places = np.arange(start, start + count)
        epochs = {e: np.random.default_rng([self.seed, e]) for e in set((places // len(self)).tolist())}
        orders = {epoch: rng.permutation(len(self)) for epoch, rng in epochs.items()}
        return [int(orders[place // len(self)][place % len(self)]) for place in places.tolist()]

    def columns(self, numbers, num_generations):
        """Prompts and further columns as the rewards want them: a value for each completion."""
        rows = self.rows[[number for number in numbers for _ in range(num_generations)]]
        return rows["prompt"], {name: rows[name] for name in self.reward_columns}

    def as_completions(self, texts):
        """Texts in the form of the prompts: strings, or an assistant's message each."""
        if not self.conversational:
            return texts
        return [[{"role": "assistant", "content": text}] for text in texts]

    def try_rewards(self, functions, tokenizer, num_generations):
        """Raise ValueError for a reward that fails with one made-up completion, given as a whole group."""
        text = "The answer is 7."
        prompts, columns = self.columns([0], num_generations)
        completions = self.as_completions([text] * num_generations)
        completion_ids = [tokenizer(text, add_special_tokens=False)["input_ids"]] * num_generations
        try:
            call_rewards(functions, prompts, completions, columns, completion_ids)
        except Refusal as error:
            raise Refusal(f"before the first rollout, for a made-up completion: {error}") from error


# --- 3. The technique ---


def generation_units(module):
    """What ZeRO-3 gathers at once while generating: a decoder layer, or a module outside the layers.

    Returns: [(parameters, owners)]: first what is outside. owners: the modules that use the parameters, in
             order; two for an embedding that is the head as well.
    """
    layers = decoder_layers(module)
    seen, units = {id(p) for layer in layers for p in layer.parameters()}, []
    for part in module.modules():
        own = [p for p in part.parameters(recurse=False) if id(p) not in seen]
        if own:
            seen |= {id(p) for p in own}
            owners = [m for m in module.modules() if any(p is own[0] for p in m.parameters(recurse=False))]
            units.append((own, owners))
    # The layers last: while the embedding streams, the largest gather is the embedding, not a layer.
    return units + [(list(layer.parameters()), [layer]) for layer in layers]


def decoder_layers(module):
    return [m for m in module.modules() if type(m).__name__ in (module._no_split_modules or ())]


def whole_bytes(parameters):
    """Bytes of ZeRO-3 parameters once gathered."""
    return sum(p.ds_numel * p.element_size() for p in parameters)


def plan_residents(module, budget_bytes):
    """Which weights stay gathered for a whole rollout.

    Args:    budget_bytes: of gathered weights on each rank; None = no limit, 0 = none.
    Returns: the parameters; bytes gathered per generated token on each rank; the most of these at once.
    """
    resident, room, passing, held = [], math.inf if budget_bytes is None else budget_bytes, [0], 0
    for parameters, owners in generation_units(module):
        size = whole_bytes(parameters)
        if size <= room:
            resident, room = resident + parameters, room - size
        elif len(owners) == 1:
            passing.append(size)
        else:
            held += size  # from its first owner to its last
    return resident, held + sum(passing), held + max(passing)


@contextmanager
def generation_weights(engine, budget_bytes):
    """Hold as much of a ZeRO-3 model whole as the budget allows; the rest streams in, a layer at a time.

    ZeRO-3 keeps 1/W of every weight on each of W ranks, and its hooks gather a module's weights for its
    forward. They are made for training: they learn the modules' order, gather in advance, hold on to weights,
    and cut each one out of a buffer. Here they are taken away, and `streamed` does the little that is needed.
    None gathers all weights once; 0 streams all of them, for each generated token anew, a decoder layer at a
    time; a budget gathers once what fits, and streams the rest. Peak: the budget and one layer, and an
    embedding for which the budget had no room.

    Args:    engine: a DeepSpeed ZeRO-3 engine around a transformers model; budget_bytes: None, 0 or bytes.
    Yields:  the model, in eval mode (which also turns gradient checkpointing off) and on SDPA, which takes
             the padding masks that "varlen" refuses.
    After:   whatever happened inside: hooks, mode and attention as before, every weight a shard, and no
             trace: the next training forward records it anew.
    """
    module, offload = engine.module, engine.optimizer.parameter_offload
    coordinator = offload.get_param_coordinator()
    training, attention = module.training, module.config._attn_implementation
    whole = {id(p) for p in plan_residents(module, budget_bytes)[0]}
    units = generation_units(module)
    handles = [engine.module_forward_pre_hook, engine.module_forward_post_hook, offload.fwd_pre_hook]
    handles += offload.forward_hooks + offload.backward_hooks
    try:
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        coordinator.release_and_reset_all(module)  # what training kept whole for its next forward
        module.eval()
        module.set_attn_implementation("sdpa")
        with hooks_taken(handles), streamed(units, whole, engine.device):
            yield module
    finally:
        module.set_attn_implementation(attention)
        module.train(training)


@contextmanager
def streamed(units, resident, device):
    """Inside, resident weights are whole; others are from their first owner's forward to their last one's.

    Args: units: as `generation_units` returns them; resident: ids of parameters.
    """
    hooks = []
    try:
        for parameters, owners in units:
            if id(parameters[0]) in resident:
                gather(parameters, device)
            else:
                hooks.append(owners[0].register_forward_pre_hook(lambda *_, p=parameters: gather(p, device)))
                hooks.append(owners[-1].register_forward_hook(lambda *_, p=parameters: release(p)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameters, _ in units:
            release(parameters)


def gather(parameters, device):
    """Make sharded weights whole in one coalesced collective, in which each arrives at its own place."""
    group = parameters[0].ds_process_group
    ranks = dist.get_world_size(group)
    shards = [p.ds_tensor.to(device) for p in parameters]  # from the host, with --offload_param
    wholes = shards if ranks == 1 else [shard.new_empty(ranks * shard.numel()) for shard in shards]
    if ranks > 1:
        with dist._coalescing_manager(group):  # nothing in it may fail: it would stay open
            for whole, shard in zip(wholes, shards):
                dist.all_gather_into_tensor(whole, shard, group)
    for parameter, whole in zip(parameters, wholes):
        parameter.ds_status = ZeroParamStatus.AVAILABLE
        parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)  # the last shard is padded


def release(parameters):
    for parameter in parameters:
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:
            free_param(parameter)


@contextmanager
def hooks_taken(handles):
    """Take hooks out of their modules, and put the same ones back at the same places afterwards."""
    taken = {id(h.hooks_dict_ref()): h.hooks_dict_ref() for h in handles}
    before = [(hooks, list(hooks.items())) for hooks in taken.values()]
    for handle in handles:
        handle.hooks_dict_ref().pop(handle.id)
    try:
        yield
    finally:
        for hooks, items in before:
            hooks.clear()
            hooks.update(items)


def sample(logits, uniform, temperature, top_k, top_p):
    """Draw one token for each sequence, by its uniform number alone: the ranks' layout changes nothing.

    Args:    logits (B, V); uniform (B,) float32 in [0, 1); temperature 0 = the likeliest token;
             top_k: 0 = all; top_p: the likeliest tokens whose probabilities sum up to it, 1 = all.
    Returns: ids (B,) int64; entropy (B,) in nats, of the distribution before top_k and top_p; NaN where the
             logits give none, and the id then means nothing.
    """
    probs = torch.softmax(logits.float() / (temperature or 1.0), dim=-1)
    entropy = torch.special.entr(probs).sum(-1)
    if temperature == 0:
        return logits.argmax(-1), entropy
    ids = None
    if top_k or top_p < 1:
        probs, ids = probs.sort(descending=True)
        if top_k:
            probs[:, top_k:] = 0
        # of what top_k has left; the first token always
        kept = probs.cumsum(-1) - probs < top_p * probs.sum(-1, keepdim=True)
        probs = probs * kept
    # fp64: the sum over 150,000 tokens decides which one a number near a border falls on
    cumulated = probs.cumsum(-1, dtype=torch.float64)
    choice = torch.searchsorted(cumulated, uniform.double()[:, None] * cumulated[:, -1:], right=True)
    choice = choice.clamp(max=logits.shape[-1] - 1)  # NaN would leave the vocabulary
    return (choice if ids is None else ids.gather(1, choice))[:, 0], entropy


def as_argument(cache, model):
    """The cache as a keyword of the model's forward; models with code of their own know the older name."""
    newer = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if newer else "past_key_values": cache}


def check_cache(config):
    """Raise ValueError for a model with layers that keep a state instead of keys and values."""
    whole = all(hasattr(layer, "batch_repeat_interleave") for layer in DynamicCache(config=config).layers)
    states = f"model type {config.model_type} keeps states (linear attention, convolutions) as it generates"
    refuse(not whole, f"{states}, which are not copied for a prompt's completions: choose another model.")


@torch.no_grad()
def generate(
    model,
    prompts,
    num_generations,
    max_completion_length,
    *,
    end_ids,
    device=None,
    uniform=None,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    stopped=None,
    all_sum=lambda values: values,
    after_token=lambda count: None,
):
    """Complete every prompt num_generations times, in one batch.

    Args:    prompts: lists of ids, padded on the left here; end_ids: ids that end a completion, and belong to
             it; device: where gathered weights are, if not where their shards are; uniform (B * G,
             max_completion_length): see `sample`; stopped: ids of the completions so far (B * G, T) -> bool
             (B * G,), for stop strings; all_sum: sums a list over ranks; after_token: called with their
             number.
    Returns: completions: lists of >= 1 ids, those of a prompt side by side; finished: whether each ended by
             itself; entropies: the mean over each one's tokens.
    Raises:  FloatingPointError, on all ranks alike, for logits that are not finite.
    """
    device, width = device or model.device, max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    size = len(prompts) * num_generations
    tokens = input_ids.repeat_interleave(num_generations, 0)
    finished = torch.zeros(size, dtype=torch.bool, device=device)
    lengths, entropies = torch.zeros(2, size, device=device)
    ends = torch.tensor(sorted(end_ids), device=device)
    for step in range(max_completion_length):
        out = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **as_argument(cache, model),
        )
        logits = out.logits[:, -1]
        if step == 0:  # a prompt is computed once, and its keys and values are copied for its completions
            cache.batch_repeat_interleave(num_generations)
            logits, mask, position_ids = (
                x.repeat_interleave(num_generations, 0) for x in (logits, mask, position_ids[:, -1:])
            )
        drawn = None if uniform is None else uniform[:, step].to(device)
        ids, entropy = sample(logits, drawn, temperature, top_k, top_p)
        lengths += ~finished
        entropies += entropy * ~finished
        tokens = torch.cat([tokens, ids[:, None]], dim=1)
        finished = finished | torch.isin(ids, ends)
        if stopped is not None:
            finished = finished | stopped(tokens[:, width:])  # a stop string never begins in the prompt
        after_token(step + 1)
        # All ranks step on until the last one is done: each forward is a collective where weights stream.
        unfinished, broken = all_sum(torch.stack([(~finished).sum(), entropy.isnan().sum()]).tolist())
        if broken:
            raise FloatingPointError(
                f"token {step + 1}: the logits of {int(broken)} completions are not finite: an update has "
                "broken the weights. Go on from an earlier checkpoint with a lower --learning_rate."
            )
        if unfinished == 0:
            break
        input_ids, position_ids = ids[:, None], position_ids + 1
        mask = torch.cat([mask, mask.new_ones(size, 1)], dim=1)
    completions = [row[:n] for row, n in zip(tokens[:, width:].tolist(), lengths.int().tolist())]
    return completions, finished.tolist(), (entropies / lengths).tolist()


# --- 4. Loss ---


LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo")


def group_advantages(rewards, num_generations, scale_rewards=True):
    """How much better each completion is than the others of its prompt: A_i = (r_i - mean) / std.

    Args:    rewards (B,), those of a prompt side by side; B a multiple of num_generations. scale_rewards:
             False leaves the division out, which favours prompts of equal rewards (Dr. GRPO).
    Returns: (B,) float32. A group of equal rewards gives 0.
    Raises:  ValueError for a B that is no multiple of num_generations.
    Source:  arXiv 2402.03300, section 4.1.2; arXiv 2503.20783, section 3.

    >>> group_advantages(torch.tensor([1.0, 0.0, 5.0, 5.0]), 2, scale_rewards=False).tolist()
    [0.5, -0.5, 0.0, 0.0]
    """
    if len(rewards) % num_generations:
        raise ValueError(f"{len(rewards)} rewards are no whole groups of num_generations {num_generations}.")
    groups = rewards.double().view(-1, num_generations)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale_rewards:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    # the mean of equal numbers may be off by a rounding error, and so would its tiny deviation
    advantages[groups.amax(1) == groups.amin(1)] = 0
    return advantages.flatten().float()


def loss_denominators(lengths, num_generations, loss_type, max_completion_length, all_sum):
    """What each completion's token losses are divided by, so that the loss is one sum over all tokens.

    dapo      sum_i sum_t l_it / sum_i |o_i|              each token of the step weighs the same
    grpo      1/B sum_i 1/|o_i| sum_t l_it                each completion
    bnpo      1/K sum_k (sum_it l_it / sum_i |o_i|)       each group; TRL: each micro-batch, whatever it holds
    dr_grpo   1/(B L) sum_i sum_t l_it                    L = max_completion_length: no length in it

    Args:    lengths (B,): scored tokens of this rank's completions; 0 = masked, and then counted nowhere.
             all_sum: sums a list over ranks: all micro-batches and ranks make one mean.
    Returns: (B,) float64; inf for a masked completion.
    Source:  arXiv 2503.14476, equation 8 (dapo); arXiv 2402.03300, equation 3 (grpo); arXiv 2503.20783,
             section 3 (dr_grpo); bnpo is named by TRL.
    """
    lengths = lengths.double()
    of_group = lengths.view(-1, num_generations).sum(1)
    totals = all_sum([lengths.sum().item(), (lengths > 0).sum().item(), (of_group > 0).sum().item()])
    tokens, completions, groups = totals
    denominators = {
        "dapo": torch.full_like(lengths, tokens),
        "grpo": completions * lengths,
        "bnpo": groups * of_group.repeat_interleave(num_generations),
        "dr_grpo": torch.full_like(lengths, completions * max_completion_length),
    }[loss_type]
    return denominators.masked_fill(lengths == 0, math.inf)


def grpo_loss(
    per_token_logps,
    old_per_token_logps,
    advantages,
    *,
    epsilon=0.2,
    epsilon_high=None,
    beta=0.0,
    ref_per_token_logps=None,
):
    """The clipped surrogate of each token, with the KL divergence from the reference.

    l = -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta (e^d - d - 1),
    rho = pi / pi_old, d = log pi_ref - log pi

    Args:    four times (M,): log-probabilities in nats; advantages of each token's completion.
    Returns: losses (M,); kl (M,) without gradient, 0 without a reference; clipped (M,) bool: whether the
             clip takes the gradient away.
    Source:  arXiv 2402.03300, equations 3 and 4 (the k3 estimator); arXiv 2503.14476, section 3.1.
    """
    ratio = torch.exp(per_token_logps - old_per_token_logps)
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    kl = torch.zeros_like(losses)
    if ref_per_token_logps is not None:
        difference = ref_per_token_logps - per_token_logps
        kl = torch.exp(difference) - difference - 1
    return losses + beta * kl, kl.detach(), clipped


def per_token_logps(engine, batch, args):
    """Log-probabilities of the batch's completion tokens at their rollout's temperature, (M,) float32."""

    def head(hidden, weight, bias):
        # here, because the weight is whole only while the head runs; prompts cost no logits
        hidden = hidden.flatten(0, 1).index_select(0, batch["score_index"])
        return token_logps(
            hidden,
            weight,
            batch["score_ids"],
            bias=bias,
            temperature=batch["temperature"],
            chunk_size=args.loss_chunk_size,
        )

    inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    with head_computes(engine.module, head):
        # With a cache or a mask, transformers ignores that position_ids restart: completions mix.
        return engine(**inputs, use_cache=False).logits


NOT_INPUTS = ("labels", "score_index", "score_ids", "completion_lengths", "advantages", "denominators")
NOT_INPUTS += ("temperature", "old_per_token_logps", "ref_per_token_logps")


def make_batches(groups, advantages, denominators, budget, device, all_max, *, temperature):
    """Groups -> micro-batches of at most `budget` tokens, equally many on all ranks.

    Args:    groups: this rank's [(prompt_ids, [completion_ids, ..]), ..]; advantages, denominators (B,): of
             their completions; all_max: the largest of a number over ranks; temperature: what the
             completions were sampled at.
    Returns: flat rows with shared prompts (collators.flatten_shared_prompt), their temperature and, for each
             completion token, advantages and denominators (M,).
    """
    chunks, tokens = [], 0
    for group in groups:
        cost = len(group[0]) + sum(map(len, group[1]))
        if not chunks or tokens + cost > budget:
            chunks.append([])
            tokens = 0
        chunks[-1].append(group)
        tokens += cost
    batches, done = [], 0
    for chunk in chunks:
        row = flatten_shared_prompt(chunk)
        lengths = row["completion_lengths"]
        for name, values in (("advantages", advantages), ("denominators", denominators)):
            row[name] = values[done : done + len(lengths)].float().repeat_interleave(lengths)
        done += len(lengths)
        batches.append(row)
    # Ranks must run equally many forwards and backwards, or collectives stall: tokens that weigh nothing.
    for _ in range(int(all_max(len(batches))) - len(batches)):
        row = flatten_shared_prompt([(groups[0][0][:1], [groups[0][0][:1]])])
        batches.append(row | {"advantages": torch.zeros(1), "denominators": torch.full((1,), math.inf)})
    return [to_device(batch | {"temperature": temperature}, device) for batch in batches]


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def update(engine, batches, args, world, watch):
    """One optimizer step over all micro-batches. Returns this rank's sums: loss, kl, clipped tokens."""
    sums = torch.zeros(3, dtype=torch.float64)
    bar = tqdm(batches, "update", unit="batch", leave=False, disable=dist.get_rank() != 0)
    for i, batch in enumerate(bar):
        watch(f"micro-batch {i + 1} of {len(batches)}")
        engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
        logps = per_token_logps(engine, batch, args)
        # the first step on a rollout is taken by the weights that sampled it: they are their own old ones
        old = batch.setdefault("old_per_token_logps", logps.detach())
        losses, kl, clipped = grpo_loss(
            logps,
            old,
            batch["advantages"],
            epsilon=args.epsilon,
            epsilon_high=args.epsilon_high,
            beta=args.beta,
            ref_per_token_logps=batch.get("ref_per_token_logps"),
        )
        loss = (losses / batch["denominators"]).sum()
        # DeepSpeed averages gradients over ranks: times world cancels that; and micro-batches are summed
        engine.backward(loss * world, scale_wrt_gas=False)
        scored = batch["denominators"].isfinite()
        sums += torch.stack(
            [x.detach().double().cpu() for x in (loss, kl[scored].sum(), clipped[scored].sum())]
        )
    watch("optimizer step")
    engine.step()
    return sums.tolist()


# --- 5. Training ---


def deepspeed_config(args, trainable=True):
    """DeepSpeed's configuration; --deepspeed replaces single settings of it."""
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config = {
        # The two that DeepSpeed insists on. Micro-batches are cut by tokens, and their number varies:
        # `update` says itself where a step ends, and divides by nothing but the loss's own denominators.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": args.max_grad_norm,
        "bf16": {"enabled": args.bf16},
        # A sum in bf16 loses small addends: over micro-batches, and over ranks, where fp32 costs 2 bytes more
        # for each element of the bucket below.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": 3,
            # By default, weights of up to 100,000 elements are never sharded: a budget has to bound every
            # byte, and a layer's norms ride along in its one gather.
            "stage3_param_persistence_threshold": 0,
            # A buffer of so many elements exists on every rank; the default is 500 million.
            "reduce_bucket_size": 50_000_000,
        },
        "steps_per_print": 10**9,  # the script has a progress bar
    }
    if args.offload_param or not trainable:  # a reference is read once per rollout: it lives on the host
        config["zero_optimization"]["offload_param"] = host
    if args.offload_optimizer and trainable:
        config["zero_optimization"]["offload_optimizer"] = host
    if args.deepspeed:
        try:
            settings = json.loads(Path(args.deepspeed).read_text())
        except (OSError, ValueError) as error:
            raise Refusal(f"--deepspeed {args.deepspeed} is no JSON file: {error}") from error
        ours = copy.deepcopy(config)
        merge(config, settings, f"--deepspeed {args.deepspeed}")
        for section, names in SET_BY_FLAGS.items():
            new, old = (c[section] if section else c for c in (config, ours))
            for name in names:
                found, wanted = new.get(name), old.get(name)
                taken = f"--deepspeed {args.deepspeed} sets {name} to {found}; the script and its flags say"
                refuse(found != wanted, f"{taken} {wanted}: drop it from the file.")
    return config


SET_BY_FLAGS = {
    None: (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16",
        "fp16",
        "optimizer",
        "scheduler",
    ),
    "zero_optimization": (
        "stage",
        "stage3_param_persistence_threshold",
        "offload_optimizer",
        "offload_param",
    ),
}


def merge(config, other, where):
    """Let other's values replace config's, at any depth."""
    refuse(not isinstance(other, dict), f"{where}: found {other!r}, wanted a JSON object.")
    for name, value in other.items():
        if isinstance(config.get(name), dict):
            merge(config[name], value, f"{where}, {name}")
        else:
            config[name] = value


def start_distributed(args):
    """Returns rank, local rank, world size and device. Every launcher describes them in the environment."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        backend = "nccl" if device.type == "cuda" else "gloo"
        # longer than the watchdog's, which knows the phase
        timeout = timedelta(seconds=2 * args.collective_timeout_s + 60)
        dist.init_process_group(backend, timeout=timeout, **alone)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # takes the group that is there
    return int(os.environ.get("RANK", 0)), local_rank, world, device


def all_sum(values, device):
    """Sum each of a list of numbers over all ranks, in float64."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def all_max(value, device):
    value = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def load_engine(args, device, trainable=True, watch=lambda phase: None, pretrained=None):
    """The model in a ZeRO-3 engine: no rank but the first ever holds more of it than its shards.

    pretrained: what was read of the name before; None = read it now.
    """
    pretrained = pretrained or read_pretrained(args.model_name_or_path, dropout=False)
    register_varlen_attention()
    config = deepspeed_config(args, trainable)
    options = {"dtype": torch.bfloat16 if args.bf16 else torch.float32}
    # in the dtype of its files, whatever the shards' will be: see `write_fp32_weights`
    whole = load_whole(pretrained, device)
    first = whole is not None
    # inside Init, each module's weights are sharded as soon as it is made
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = empty_model(pretrained.model_config, attn_implementation="varlen", **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            watch(f"loading {name}")
            with GatheredParameters([parameter], modifier_rank=0):  # the first rank's is dealt out at the end
                if first:
                    parameter.copy_(whole.get_parameter(name))
        for name, buffer in model.named_buffers():
            # Init makes every tensor in the weights' dtype: rotary frequencies in bf16 would be wrong ones
            dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
            shared = torch.empty(buffer.shape, dtype=dtype, device=device)
            dist.broadcast(shared.copy_(whole.get_buffer(name)) if first else shared, 0)
            buffer.data = shared
    assert_loaded(whole, dict(own_shards(model)), device)
    # For training, too: a leaf module's weights come in one coalesced gather, not one for each matrix in it.
    set_z3_leaf_modules(model, list({type(layer) for layer in decoder_layers(model)}))
    if not trainable:
        return deepspeed.initialize(model=model.requires_grad_(False).eval(), config=config)[0]
    prepare_model(model, args)
    keep_frozen(pretrained, model, whole, device)
    ask_for_an_inputs_gradient(decoder_layers(model))
    groups, options = parameter_groups(model, args.weight_decay), {"lr": args.learning_rate}
    if args.offload_optimizer:
        # DeepSpeed's own updates on the host from vector registers; it refuses torch's there
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    else:
        # fused: the default makes temporaries as large as the weights while it updates
        optimizer = torch.optim.AdamW(groups, fused=True, **options)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    if args.bf16:
        write_fp32_weights(model, whole, device, watch)
    return engine


def keep_frozen(pretrained, model, whole, device):
    """Keep, on the first rank's host, the frozen weights of which the shards hold a rounded copy only."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if not frozen:
        return
    rounded = torch.zeros(len(frozen), device=device)
    if whole is not None:
        dtypes = [whole.get_parameter(name).dtype for name in frozen]
        rounded[:] = torch.tensor([dtype != model.dtype for dtype in dtypes])
    dist.broadcast(rounded, 0)  # all ranks have to know what will not be gathered
    kept = [name for name, is_rounded in zip(frozen, rounded.tolist()) if is_rounded]
    pretrained.frozen = {name: whole.get_parameter(name) if whole is not None else None for name in kept}


def own_shards(model):
    """(name, this rank's elements) of each weight: of the shard, what is no padding."""
    for name, parameter in model.named_parameters():
        shard = parameter.ds_tensor.flatten()
        yield name, shard[: max(0, parameter.ds_numel - dist.get_rank() * len(shard))]


def write_fp32_weights(model, whole, device, watch):
    """Give the optimizer's fp32 copy the weights as the first rank loaded them: it was made of bf16 ones."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # the optimizer has no copy of it
            continue
        watch(f"loading {name} in fp32")
        share = parameter.ds_tensor.numel()  # equal on all ranks: the last one's is padded
        flat = torch.zeros(share * world, device=device)
        if rank == 0:
            flat[: parameter.ds_numel] = whole.get_parameter(name).detach().flatten()
        dist.broadcast(flat, 0)
        safe_set_local_fp32_param(parameter, flat[rank * share : (rank + 1) * share])


def prepare_model(model, args):
    """What a real model and a dry run's have to share. The place to freeze what is not to be trained, with
    model.get_input_embeddings().requires_grad_(False), say.
    """
    if args.gradient_checkpointing:
        checkpoint_layers(model)
    return model.train()


def ask_for_an_inputs_gradient(layers):
    """ZeRO-3 reduces a leaf module's gradients when that of its input is there.

    So the first layer that is trained needs one even where all below it is frozen: without, its gradients
    would be reduced before they are computed.
    """

    def ask(layer, inputs):
        if torch.is_grad_enabled():
            inputs[0].requires_grad_()

    for layer in layers:
        if trained(layer):
            layer.register_forward_pre_hook(ask)
            return


def budget_bytes(args):
    """Of gathered weights during a rollout, as `generation_weights` takes it."""
    if args.gather_budget_gib is not None:
        return int(args.gather_budget_gib * 2**30)
    return None if args.ds3_gather_for_generation else 0


class Rollouts:
    """Samples completions with the engine's present weights, and lets the rewards judge them."""

    def __init__(self, args, engine, prompts, pretrained, functions, rank, world, device, watch):
        tokenizer = pretrained.tokenizer
        self.args, self.engine, self.prompts, self.tokenizer = args, engine, prompts, tokenizer
        self.functions, self.rank, self.world, self.device, self.watch = functions, rank, world, device, watch
        self.end_ids = end_token_ids(tokenizer, pretrained.eos_token_id)
        self.stopped = None
        if args.stop_strings:
            criteria = StopStringCriteria(tokenizer, args.stop_strings)
            self.stopped = lambda completion_ids: criteria(completion_ids, None)
        self.budget_bytes = budget_bytes(args)
        resident, self.gathered_bytes_per_token, largest = plan_residents(engine.module, self.budget_bytes)
        self.resident_bytes = whole_bytes(resident)
        self.held_bytes = self.resident_bytes + largest
        self.seconds = self.tokens = self.most_whole_bytes = 0
        if rank == 0:
            tqdm.write(self.describe())

    def describe(self):
        total = whole_bytes(self.engine.module.parameters())
        return (
            f"generation: {self.resident_bytes / 2**20:.1f} of {total / 2**20:.1f} MiB of weights stay "
            f"gathered on each rank; {self.gathered_bytes_per_token / 2**20:.1f} MiB are gathered for each "
            f"of up to {self.args.max_completion_length} tokens, which all "
            f"{self.args.per_device_train_batch_size} completions of a rank share"
        )

    def sample(self, progress):
        """One rollout of whole groups on this rank: groups, rewards and what the update wants to know."""
        args, temperature, started = self.args, self.args.temperature, time.perf_counter()
        count = args.per_device_train_batch_size // args.num_generations
        everyone = self.prompts.numbers(progress["prompts_done"], count * self.world)
        mine = everyone[self.rank * count : (self.rank + 1) * count]
        prompt_ids = [self.prompts.examples[number]["input_ids"] for number in mine]
        # of every rank's completions, so that sampling depends on the seed and the rollout alone
        rng = np.random.default_rng([args.seed, progress["rollout"]])
        size = args.per_device_train_batch_size
        uniform = rng.random((size * self.world, args.max_completion_length), dtype=np.float32)
        uniform = torch.from_numpy(uniform[self.rank * size : (self.rank + 1) * size])
        rollout, limit = progress["rollout"] + 1, args.max_completion_length
        bar = tqdm(total=limit, desc=f"rollout {rollout}", unit="token", leave=False, disable=self.rank != 0)
        if self.seconds:  # of the rollout before
            bar.set_postfix({"last": f"{self.seconds:.1f} s", "update": f"{self.update_seconds:.1f} s"})

        def after_token(number):
            self.watch(f"rollout {rollout}, after token {number} of {limit}")
            bar.update()
            self.tokens = number

        self.watch(f"rollout {rollout}, gathering weights")
        with generation_weights(self.engine, self.budget_bytes) as model, most_whole(model) as most:
            gathered = time.perf_counter()
            completions, finished, entropies = generate(
                model,
                prompt_ids,
                args.num_generations,
                limit,
                end_ids=self.end_ids,
                device=self.device,
                uniform=uniform,
                temperature=temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                stopped=self.stopped,
                all_sum=lambda values: all_sum(values, self.device),
                after_token=after_token,
            )
        bar.close()
        self.most_whole_bytes = max(self.most_whole_bytes, most["bytes"])
        self.seconds = time.perf_counter() - started
        self.watch(f"rollout {rollout}, rewards")
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        prompts, columns = self.prompts.columns(mine, args.num_generations)
        judged = self.prompts.as_completions(texts)
        with together(self.device):
            rewards = call_rewards(self.functions, prompts, judged, columns, completions)
        lengths = torch.tensor([len(ids) for ids in completions])
        groups = [completions[i : i + args.num_generations] for i in range(0, size, args.num_generations)]
        return {
            "groups": list(zip(prompt_ids, groups)),
            "temperature": temperature,  # the update scores at it, whatever the flag says by then
            "rewards": rewards,
            "reward": torch.tensor(list(rewards.values()), dtype=torch.float64).sum(0),
            "lengths": lengths,
            "scored_lengths": lengths * torch.tensor(finished)
            if args.mask_truncated_completions
            else lengths,
            "finished": torch.tensor(finished),
            "entropy_sum": float(sum(e * n for e, n in zip(entropies, lengths.tolist()))),
            "gather_seconds": gathered - started,
            "texts": list(zip(map(prompt_text, prompts), texts)),
            "num_prompts": count * self.world,
            # of the data: a prompt counts once for each completion
            "num_tokens": int(lengths.sum()) + args.num_generations * sum(map(len, prompt_ids)),
        }


def prompt_text(prompt):
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def prepare_update(rollout, args, reference, device, watch):
    """Advantages, and micro-batches on the device. Returns the batches and the scored tokens of all ranks."""

    def sum_ranks(values):
        return all_sum(values, device)

    advantages = group_advantages(rollout["reward"], args.num_generations, args.scale_rewards)
    lengths, size = rollout["scored_lengths"], args.num_generations
    denominators = loss_denominators(lengths, size, args.loss_type, args.max_completion_length, sum_ranks)
    budget = args.max_tokens_per_batch or args.max_prompt_length + size * args.max_completion_length
    batches = make_batches(
        rollout["groups"],
        advantages,
        denominators,
        budget,
        device,
        lambda n: all_max(n, device),
        temperature=rollout["temperature"],
    )
    if reference is not None:
        for i, batch in enumerate(batches):
            watch(f"reference, micro-batch {i + 1} of {len(batches)}")
            with torch.no_grad():
                batch["ref_per_token_logps"] = per_token_logps(reference, batch, args)
    return batches, sum_ranks([lengths.sum().item()])[0]


def rollout_metrics(rollout, args, gathers):
    """This rollout's metrics over all ranks, under TRL's names."""
    reward, groups = rollout["reward"], rollout["reward"].view(-1, args.num_generations)
    deviations = groups.std(1)
    sums = {
        "completions": len(reward),
        "groups": len(groups),
        "tokens": rollout["lengths"].sum().item(),
        "reward": reward.sum().item(),
        "reward_std": deviations.sum().item(),
        "zero": (groups.amax(1) == groups.amin(1)).sum().item(),
        "clipped": (~rollout["finished"]).sum().item(),
        "entropy": rollout["entropy_sum"],
        **{f"rewards/{name}/mean": sum(values) for name, values in rollout["rewards"].items()},
    }
    sums = dict(zip(sums, all_sum(list(sums.values()), gathers.device)))
    of_completions = {n: sums[n] / sums["completions"] for n in sums if n == "reward" or "/" in n}
    return {
        **of_completions,
        "reward_std": sums["reward_std"] / sums["groups"],
        "frac_reward_zero_std": sums["zero"] / sums["groups"],
        "completions/mean_length": sums["tokens"] / sums["completions"],
        "completions/clipped_ratio": sums["clipped"] / sums["completions"],
        "entropy": sums["entropy"] / sums["tokens"],
        "gathered_bytes_per_token": gathers.gathered_bytes_per_token,
        "resident_bytes": gathers.resident_bytes,
        "gather_seconds": rollout["gather_seconds"],
        "generation_seconds": gathers.seconds,
        "generation_steps": gathers.tokens,
    }


def save_checkpoint(args, engine, progress, rank):
    """checkpoint-<step>/: DeepSpeed's files (shards, moments, random states) and the position in the data."""
    path = Path(args.output_dir) / f"checkpoint-{progress['step']}"
    temporary = path.with_suffix(".tmp")
    if rank == 0:
        fresh_folder(temporary)
    dist.barrier()
    random_states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states["cuda"] = torch.cuda.get_rng_state()
    # no file "latest" of DeepSpeed's: the newest folder with its final name is the latest one
    engine.save_checkpoint(
        str(temporary),
        "zero3",
        {"random_states": random_states},
        save_latest=False,
        exclude_frozen_parameters=True,
    )
    dist.barrier()
    if rank == 0:
        (temporary / "progress.json").write_text(json.dumps(progress, indent=1))
        commit_folder(temporary, path)
        rotate_checkpoints(args.output_dir, args.save_total_limit)
    dist.barrier()


def read_progress(path, fingerprint, world):
    """Where a checkpoint stands: step, rollouts, prompts done."""
    progress = json.loads((path / "progress.json").read_text())
    if progress["fingerprint"] != fingerprint:
        raise Refusal(f"{path} belongs to other data: use its dataset, max_prompt_length and seed.")
    if progress["world_size"] != world:
        raise Refusal(
            f"{path} was written by {progress['world_size']} ranks, and this run has {world}: DeepSpeed's "
            f"shards are bound to their number. Resume with {progress['world_size']} ranks."
        )
    return progress


def load_checkpoint(engine, path):
    """Restore weights, moments and this rank's random states."""
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    try:
        # not strict: what is frozen is not in there, and `check_frozen` has seen that nothing else is missing
        _, state = engine.load_checkpoint(
            str(path), "zero3", load_module_strict=False, load_lr_scheduler_states=False
        )
    except ValueError as error:  # torch's, of groups of parameters
        raise Refusal(
            f"{path} holds the state of another optimizer, of an earlier version of this script: {error}. "
            "Begin a new run."
        ) from error
    for group, weight_decay in zip(engine.optimizer.param_groups, decays):
        group["weight_decay"] = weight_decay  # this run's flag, not that of the run which wrote it
    adam = engine.optimizer.optimizer
    if isinstance(adam, deepspeed.ops.adam.DeepSpeedCPUAdam):
        count_steps_again(adam)
    torch.set_rng_state(state["random_states"]["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random_states"]["cuda"])


def count_steps_again(adam):
    """Bring DeepSpeedCPUAdam's inner powers beta ** step to where they stood when the checkpoint was written.

    No checkpoint holds them. They are multiplied up step by step in fp32; resumed, they would be taken with
    pow() instead, which ends in other digits. So all steps are taken again, on one number that nobody reads.
    """
    (beta1, beta2), eps = adam.defaults["betas"], adam.defaults["eps"]
    learning_rate, weight_decay, bias_correction = 0.0, 0.0, True
    settings = (learning_rate, beta1, beta2, eps, weight_decay, bias_correction)
    weight, gradient, *moments = (torch.zeros(1) for _ in range(4))
    steps_done = int(max(state["step"] for state in adam.state.values()))
    for step in range(1, steps_done + 1):
        adam.ds_opt_adam.adam_update(adam.opt_id, step, *settings, weight, gradient, *moments)


def whole_weights(engine, frozen, bf16, watch):
    """Each weight in turn, gathered on every rank, with its name: (name, tensor), a tied one once; of frozen
    ones, what the first rank has kept.
    """
    for name, parameter in engine.module.named_parameters():
        watch(f"saving {name}")
        if name in frozen:
            yield name, frozen[name]
        elif bf16 and parameter.requires_grad:  # the optimizer's copy: what came in fp32 leaves in fp32
            yield name, safe_get_full_fp32_param(parameter)
        else:
            with GatheredParameters([parameter]):
                yield name, parameter
    kept = set(engine.module.state_dict())  # among the buffers, those that a model file holds
    yield from ((name, buffer) for name, buffer in engine.module.named_buffers() if name in kept)


def save_model(args, engine, pretrained, rank, watch):
    """The final model in Hugging Face format, in the dtypes that it came in, gathered weight by weight."""
    weights = whole_weights(engine, pretrained.frozen, args.bf16, watch)
    if rank == 0:
        temporary = fresh_folder(Path(args.output_dir) / "model.tmp")
        write_pretrained_streamed(temporary, pretrained, saved_shapes(engine.module), weights)
        commit_files(temporary, args.output_dir)
    else:
        for _ in weights:  # each gather needs all ranks
            pass
    dist.barrier()


def learning_rates(args, total_steps):
    """The schedule as a function of the steps done: nothing that a checkpoint would have to hold."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, total_steps)
    return lambda step: args.learning_rate * scheduler.lr_lambdas[0](step)


def main(args):
    """Train. Returns what summary.json holds; after SIGTERM, {"stopped_at_step": step}; of a dry run, what it
    counted.

    Raises: ValueError for what the arguments, the data, the rewards or the model make impossible, before
            output_dir is touched (a reward's mistake with some completions shows when it is given them);
            FloatingPointError for a non-finite loss or gradient, before the weights and the checkpoints are.
    """
    check_arguments(args)
    if args.dry_run:
        return dry_run(args)
    check_output_dir(
        args.output_dir, args.overwrite_output_dir, args.resume_from_checkpoint, args.model_name_or_path
    )
    # torch 2.11 knows only the older names of some functions, by which DeepSpeed calls them as well
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    sigterm = []
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: sigterm.append(True))
    watch, ours = None, not dist.is_initialized()
    try:
        rank, local_rank, world, device = start_distributed(args)
        watch = Watchdog(args.collective_timeout_s, rank)
        with disk_errors_refused(args.output_dir):
            return train(args, rank, local_rank, world, device, sigterm, watch)
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
        if ours and dist.is_initialized() and deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()  # DeepSpeed's groups with torch's
        if watch is not None:  # to the last: leaving a group may hang as well
            watch.close()


def train(args, rank, local_rank, world, device, sigterm, watch):
    torch.manual_seed(args.seed + rank)  # order and sampling have generators of their own
    longest = args.max_prompt_length + args.max_completion_length
    watch("tokenising the prompts")
    # the first rank of each machine tokenises; the others then read its cache
    for first_rank in (True, False):
        with together(device):
            if (local_rank == 0) == first_rank:
                flags = "--max_prompt_length + --max_completion_length"
                pretrained = read_pretrained(args.model_name_or_path, longest, flags, dropout=False)
                prompts = Prompts(args, pretrained.tokenizer)
                vocab_size = pretrained.config.get_text_config().vocab_size
                check_token_ids(prompts.examples, vocab_size, args.dataset_name)
                functions = load_reward_funcs(args.reward_funcs, prompts.reward_columns)
                check_answers(functions, prompts.rows, args.dataset_name)
                read = columns_read(functions, prompts.reward_columns)
                prompts.data["columns_unused"] = unused_columns(prompts.rows, ("prompt", *read))
                watch("trying the rewards")
                prompts.try_rewards(functions, pretrained.tokenizer, args.num_generations)
    prompts_per_rollout = args.per_device_train_batch_size // args.num_generations * world
    progress = {"step": 0, "rollout": 0, "prompts_done": 0}
    progress |= {"fingerprint": prompts.fingerprint(), "world_size": world}
    if args.resume_from_checkpoint:
        checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
        progress = read_progress(checkpoint, progress["fingerprint"], world)
    left = max(0, math.ceil(args.num_train_epochs * len(prompts) - 1e-9) - progress["prompts_done"])
    total_steps = progress["step"] + math.ceil(left / prompts_per_rollout) * args.num_iterations
    total_steps = args.max_steps if args.max_steps > 0 else total_steps
    if progress["step"] > total_steps:
        raise Refusal(f"{checkpoint} is past --max_steps {total_steps}: raise it.")
    if progress["step"] == total_steps and (Path(args.output_dir) / "summary.json").exists():
        raise Refusal(f"{args.output_dir} has finished its {total_steps} steps: raise --max_steps to go on.")
    if progress["step"] % args.num_iterations:
        raise Refusal(
            f"{checkpoint} is in the middle of a rollout of --num_iterations {args.num_iterations}: use the "
            "number that it was trained with."
        )

    check_cache(pretrained.config)
    watch("loading the model")
    engine = load_engine(args, device, watch=watch, pretrained=pretrained)
    check_frozen(engine.module, progress)
    reference = None
    if args.beta > 0:
        watch("loading the reference")
        reference = load_engine(args, device, trainable=False, watch=watch, pretrained=pretrained)
    watch("checking the model")
    first = flatten([{"input_ids": ids, "labels": ids} for ids in prompts.examples[:2]["input_ids"]])
    if args.check_isolation:
        remedy = "Choose another model: the update of this script knows no other rows."
        check_isolation(engine.module, to_device(first, device), remedy=remedy, max_length=longest)
    check_head(engine.module, to_device(first, device))
    rollouts = Rollouts(args, engine, prompts, pretrained, functions, rank, world, device, watch)
    learning_rate_at = learning_rates(args, total_steps)
    if args.resume_from_checkpoint:
        watch("loading the checkpoint")
        load_checkpoint(engine, checkpoint)
    with together(device):  # what cannot be written shows now, not after the last step
        if rank == 0:
            try_to_write(pretrained, saved_shapes(engine.module))
    if rank == 0:
        prepare_output_dir(args.output_dir, progress["step"])
    dist.barrier()
    metrics, totals = {}, {"seconds": 0.0, "tokens": 0, "real_tokens": 0}
    if rank == 0:
        print(describe_start(args, prompts.data, total_steps))
    bar = tqdm(total=total_steps, initial=progress["step"], desc="GRPO", unit="step", disable=rank != 0)

    while progress["step"] < total_steps:
        step_started = time.perf_counter()
        if progress["step"] % args.num_iterations == 0:
            rollout = rollouts.sample(progress)
            batches, num_scored = prepare_update(rollout, args, reference, device, watch)
            sampled = rollout_metrics(rollout, args, rollouts)
            progress["rollout"] += 1
            progress["prompts_done"] += rollout["num_prompts"]
        update_started = time.perf_counter()
        learning_rate = learning_rate_at(progress["step"])
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        sums, grad_norm = [0.0, 0.0, 0.0], 0.0
        if num_scored:  # every completion masked: not even Adam's momentum may move a weight
            sums = update(engine, batches, args, world, watch)
            grad_norm = float(engine.get_global_grad_norm())
        num_tokens = sum(batch["input_ids"].numel() for batch in batches) if num_scored else 0
        real_tokens = rollout["num_tokens"] if num_scored else 0
        of_ranks = [*sums, num_tokens, real_tokens, len(sigterm)]
        loss, kl, clipped, num_tokens, real_tokens, stop = all_sum(of_ranks, device)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            # DeepSpeed skips an update whose gradients are not finite
            raise FloatingPointError(
                f"step {progress['step'] + 1}: loss {loss}, gradient norm {grad_norm}; the weights are still "
                f"finite. Prompts {progress['prompts_done'] - rollout['num_prompts']} to "
                f"{progress['prompts_done'] - 1} of the stream."
            )

        seconds = time.perf_counter() - step_started
        rollouts.update_seconds = time.perf_counter() - update_started
        progress["step"] += 1
        metrics = {
            "step": progress["step"],
            "epoch": progress["prompts_done"] / len(prompts),
            "loss": loss,
            **sampled,
            "kl": kl / max(num_scored, 1),
            "clip_ratio": clipped / max(num_scored, 1),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "num_tokens": int(num_tokens),
            "num_scored_tokens": int(num_scored),
            "tokens_per_second": num_tokens / seconds,
            "step_seconds": seconds,
            "update_seconds": rollouts.update_seconds,
            "peak_memory_bytes": peak_memory_bytes(device),
        }
        for name, value in (("seconds", seconds), ("tokens", num_tokens), ("real_tokens", real_tokens)):
            totals[name] += value
        if rank == 0:
            write_metrics(metrics, args.output_dir, bar, args.logging_steps)
            every = args.log_completions_steps
            if every and progress["step"] % every == 0:
                shown = [(*texts, r) for texts, r in zip(rollout["texts"], rollout["reward"].tolist())]
                tqdm.write(format_completions(progress["step"], shown[: 2 * args.num_generations : 4]))
        stop = stop and progress["step"] % args.num_iterations == 0  # a checkpoint holds no half-used rollout
        if stop or args.save_steps and progress["step"] % args.save_steps == 0:
            watch("checkpoint")
            save_checkpoint(args, engine, progress, rank)
        if stop:
            if rank == 0:
                remedy = "continue with --resume_from_checkpoint latest"
                tqdm.write(f"SIGTERM: saved checkpoint-{progress['step']}; {remedy}", file=sys.stderr)
            return {"stopped_at_step": progress["step"]}
    bar.close()

    watch("saving the model")
    save_model(args, engine, pretrained, rank, watch)
    rollout_bytes = rollouts.held_bytes, rollouts.most_whole_bytes
    ledger = memory_ledger(*zero3_ledger(engine, *rollout_bytes, peak_memory_bytes(device)))
    summary = summarize(args, device, world, prompts.data, totals, ledger, None, metrics)
    if rank == 0:
        (Path(args.output_dir) / "summary.json").write_text(json.dumps(summary, indent=1))
        print(describe_prompts(prompts.data))
        print(describe_speed(summary))
        print(describe_rewards(args.output_dir))
        print(format_ledger(ledger_title(summary), ledger))
    return summary


# --- 6. Memory before the GPU ---


class Unsharded:
    """A whole model where an engine is expected."""

    def __init__(self, module):
        self.module = module

    def __call__(self, **inputs):
        return self.module(**inputs)


def pretend_model(args, config):
    """The model in the dtype it is sharded in, with what ZeRO-3 would say of its parameters."""
    register_varlen_attention()
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = empty_model(config, dtype=dtype, attn_implementation="varlen")
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
    return model


def pretend_rollout(args, config, world):
    """The most bytes that a rollout holds on one rank beyond the shards, by pretended tensors.

    Returns: the peak; of it, keys and values of all completions, and weights gathered at once.
    """
    size, prompt, completion = (
        args.per_device_train_batch_size,
        args.max_prompt_length,
        args.max_completion_length,
    )
    with pretend():
        model = pretend_model(args, config).eval()
        model.set_attn_implementation("sdpa")
        gathers = gathers_weights(args, world)
        # where shards come from the host, the device holds those of a unit beside what is gathered of them
        copied = 1 / world if args.offload_param and world > 1 else 0
        resident, _, largest = plan_residents(model, budget_bytes(args))
        whole = {id(p) for p in resident}
        streaming = [unit for unit in generation_units(model) if id(unit[0][0]) not in whole]
        tracker = ByteCounter()
        tracker.track_external(model)
        with gathers_pretended(streaming if gathers else [], copied), tracker, torch.no_grad():

            def step(tokens, length, cache):
                mask = torch.ones(len(tokens), length, dtype=torch.int64)
                return model(
                    input_ids=tokens,
                    attention_mask=mask,
                    position_ids=mask.cumsum(1)[:, -tokens.shape[1] :] - 1,
                    use_cache=True,
                    logits_to_keep=1,
                    **as_argument(cache, model),
                ).logits[:, -1]

            cache = DynamicCache(config=config)
            step(torch.zeros(size // args.num_generations, prompt, dtype=torch.int64), prompt, cache)
            cache.batch_repeat_interleave(args.num_generations)
            for i, layer in enumerate(cache.layers):  # the completions, short of their last token
                shape = (*layer.keys.shape[:2], completion - 1, layer.keys.shape[3])
                cache.update(layer.keys.new_empty(shape), layer.values.new_empty(shape), i)
            logits = step(torch.zeros(size, 1, dtype=torch.int64), prompt + completion, cache)
            sample(logits, torch.rand(size), args.temperature, args.top_k, args.top_p)
            cached = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        peak = tracker.peak_bytes(model.device) - whole_bytes(model.parameters())
    gathered = whole_bytes(resident) if gathers else 0
    return gathered + peak, cached, gathered + (largest if gathers else 0)


def gathers_weights(args, world):
    """Whether weights have to be brought together: a single rank's shards on the device are the weights."""
    return world > 1 or args.offload_param


def pretend_update(args, config, world):
    """The most bytes that an update's forward and backward hold on one rank beyond the shards.

    Returns: {"activations", "loss_head", "peak"}, of the largest micro-batch; with --beta also "reference":
             the most that the reference's forward holds.
    """
    prompt, length, generations = args.max_prompt_length, args.max_completion_length, args.num_generations
    longest = prompt + generations * length
    budget, all_groups = args.max_tokens_per_batch or longest, args.per_device_train_batch_size // generations
    groups = [([0] * prompt, [[0] * length] * generations)] * min(all_groups, budget // longest)
    rest = (budget % longest - prompt) // generations  # room for one more group, of shorter completions
    if rest >= 1 and len(groups) < all_groups:
        groups.append(([0] * prompt, [[0] * rest] * generations))
    size = len(groups) * generations
    repeats = len(groups) < all_groups or args.num_iterations > 1
    ones, temperature = torch.ones(size), args.temperature
    [batch] = make_batches(groups, ones, ones, 10**18, torch.device("cpu"), int, temperature=temperature)
    with two_chunks_only(), pretend():
        model = prepare_model(pretend_model(args, config), args)
        weights, zero = whole_bytes(model.parameters()), deepspeed_config(args)["zero_optimization"]
        reduces = ReducesPretended(trained(model), zero["reduce_bucket_size"])
        optimizer = torch.optim.SGD(trained(model))  # ZeRO's states are counted apart
        meter = MemoryMeter(model, optimizer, torch.device("cpu"), track=True, track_step=1)
        # The first forward and backward after a rollout gather for one module at a time. ZeRO-3 learns their
        # order, and for the others gathers in advance, and keeps, what zero3_learned_bytes says.
        learned, in_advance = zero3_learned_bytes(model.num_parameters(), model.dtype, zero)
        gathers, keeps_all = gathers_weights(args, world), repeats and learned == weights
        units = generation_units(model) if gathers and (keeps_all or not repeats) else []
        if not keeps_all:
            units = [(parameters, [owner]) for parameters, owners in units for owner in owners]
        with peaks_before_head(model, lambda: meter.tracker) as forward:
            with gathers_pretended(units, kept=keeps_all), meter.step([batch]):
                logps = per_token_logps(Unsharded(model), batch, args)
                losses, *_ = grpo_loss(logps, logps.detach(), batch["advantages"], epsilon=args.epsilon)
                (losses / batch["denominators"]).sum().backward()
                reduces.reduce()
                optimizer.step()  # finds no gradient; the meter waits for it
        tracker = ByteCounter()
        tracker.track_external(model)
        if args.beta:
            with peaks_before_head(model, lambda: tracker) as reference_forward, tracker, torch.no_grad():
                per_token_logps(Unsharded(model.eval()), batch, args)
    measured = meter.measured
    measured["peak"] -= weights
    if repeats and gathers:  # what is gathered in advance lies beside what the layers' forwards need
        measured["peak"] = max(in_advance + forward[0] - weights, measured["peak"])
        measured["peak"] += 0 if keeps_all else learned
    if args.beta:  # on the host: it gathers on a single rank as well
        peaks = in_advance + reference_forward[0], tracker.peak_bytes(model.device)
        measured["reference"] = learned + max(peaks) - weights
    return measured


@contextmanager
def peaks_before_head(model, tracker):
    """Yields a list to which each start of the output head adds the peak so far, in bytes.

    Args: tracker: function that returns the ByteCounter at work; one that is made later is seen, too.
    """
    peaks = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda *_: peaks.append(tracker().peak_bytes(model.device)))
    try:
        yield peaks
    finally:
        hook.remove()


def pretend_step(args, config, world):
    """The bytes of rollout, update and optimizer step on each of `world` ranks: {row: (formula, bytes)}."""
    rollout, cached, gathered = pretend_rollout(args, config, world)
    update = pretend_update(args, config, world)
    with torch.device("meta"):
        model = prepare_model(pretend_model(args, config), args)
    numel, dtype = sum(p.numel() for p in model.parameters()), model.dtype
    num_trained = sum(p.numel() for p in trained(model))
    held, moments = zero3_moments(
        numel,
        dtype,
        deepspeed_config(args),
        world,
        rollout=rollout,
        update=update["peak"],
        num_trained=num_trained,
    )
    share, letter = " / W" if world > 1 else "", "trained P" if num_trained < numel else "P"
    formulas = {
        "parameters": f"{dtype.itemsize} P{share}",
        "gradients": f"fp32   4 {letter}{share}",
        "bucket": "of gradients on their way to their shards",
        "optimizer": f"fp32 copy 4 {letter}{share}, AdamW 8 {letter}{share}",
    }
    rows = {name: (formulas[name], count) for name, count in held.items()}
    alone = "on one rank the shards are the weights"
    planned = "gathered for the rollout + the largest gather"
    rows["rollout_weights"] = (planned if gathered else alone, gathered)
    rows["kv_cache"] = ("keys and values of all completions", cached)
    rows |= {name: ("of an update's forward", update[name]) for name in ("activations", "loss_head")}
    if args.beta:
        moments["in the reference's forward"] = sum(held.values()) + update["reference"]
        rows["reference_on_host"] = (f"{dtype.itemsize} P{share}", dtype.itemsize * numel // world)
    return rows | {"peak": (max(moments, key=moments.get), max(moments.values()))}


def dry_run(args):
    """Count the bytes of a rollout and its update, those that single flags would save, and what fits."""
    config = load_config(args.model_name_or_path, dropout=False)
    check_cache(config)
    world, size, group = args.dry_run_world_size, args.per_device_train_batch_size, args.num_generations
    changes = {
        "--bf16": {"bf16": True},
        "--gradient_checkpointing": {"gradient_checkpointing": True},
        "--no_ds3_gather_for_generation": {"ds3_gather_for_generation": False, "gather_budget_gib": None},
        "--gather_budget_gib 1": {"gather_budget_gib": 1.0, "ds3_gather_for_generation": True},
        "--offload_optimizer": {"offload_optimizer": True},
        "--offload_optimizer --offload_param": {"offload_optimizer": True, "offload_param": True},
        f"--loss_chunk_size {args.loss_chunk_size // 4}": {"loss_chunk_size": args.loss_chunk_size // 4},
        f"--per_device_train_batch_size {group}": {"per_device_train_batch_size": min(size, group)},
        f"{2 * world} ranks": {"dry_run_world_size": 2 * world},
    }
    most = (max_positions(config)[0] or 2**17) - args.max_prompt_length
    if args.max_tokens_per_batch:  # which has to hold a group
        most = min(most, (args.max_tokens_per_batch - args.max_prompt_length) // group)
    rows = pretend_step(args, config, world)
    ledger = memory_ledger(rows, {})
    print(format_ledger(f"{Path(args.model_name_or_path).name}  dry run  world {world}", ledger))
    found = explore(
        args,
        rows["peak"][1],
        check_arguments,
        lambda changed: pretend_step(changed, config, changed.dry_run_world_size),
        changes,
        "max_completion_length",
        most,
    )
    print(describe_dry_run(found, args.gpu_memory_gib))
    return {"args": asdict(args), "ledger": ledger, **found}


if __name__ == "__main__":
    run_script(main, Arguments)
