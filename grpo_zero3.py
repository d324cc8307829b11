"""GRPO under ZeRO-3: generate with all of the weights gathered, with none, or with a budget of them.

ZeRO-3 keeps 1/W of all P weights on each of W ranks. Training gathers a layer once for thousands of tokens;
generation would gather it for every token, c P bytes each. This script holds `--gather_budget_gib` of the
weights whole during a rollout. The rest comes in for the prompts, a layer at a time; for single tokens it
stays where it is, and activations travel: for a linear layer and B sequences a rank, c B (W in + out) bytes.
The peak is the budget plus one layer (and an embedding that is the head as well, if it does not fit), and the
tokens are the same.
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

import hashlib
import inspect
import itertools
import json
import math
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param
from torch.nn.functional import linear
from tqdm import tqdm
from transformers import DynamicCache
from transformers.generation import StopStringCriteria

from common import Refusal, refuse
from common.attention import register_varlen_attention
from common.collators import flatten_shared_prompt
from common.data import (
    check_chat_template,
    check_row,
    check_token_ids,
    encode_prompt,
    end_token_ids,
    load_rows,
    map_rows,
    template_kwargs,
    unused_columns,
)
from common.exactness import NUM_TOKENS, check_exact, logps_alone, proof_tokens
from common.logps import at_scored, nll_sum, token_logps
from common.memory import (
    ByteCounter,
    DryRun,
    PretendedRun,
    count_step,
    dry_run,
    ledger,
    more_ranks,
    peak_memory_bytes,
    pretend,
)
from common.offload import OffloadActivations
from common.plot import read_metrics
from common.rewards import call_rewards, check_answers, columns_read, load_reward_funcs
from common.run import (
    DATA,
    FILES,
    MEMORY,
    ROOT,
    TRAINING,
    Epochs,
    Run,
    RunArguments,
    Tally,
    check_finite,
    check_run_arguments,
    clip_gradients,
    flag,
    run_script,
    show_lines,
)
from common.sharding import (
    check_flat,
    check_liger,
    decoder_layers,
    empty_model,
    frozen_names,
    max_positions,
    parameter_groups,
    read_pretrained,
    set_liger_kernels,
    trained,
    try_to_write,
    wrap_layers,
)
from common.truncation import truncate_pair
from common.zero3 import (
    ask_for_an_inputs_gradient,
    deepspeed_groups,
    held_bytes,
    load_shards,
    load_training_state,
    save_model,
    save_training_state,
)

# --- 1. Arguments ---


@dataclass
class Arguments(RunArguments):
    dataset_name: str = flag(str(ROOT / "demo/prompts.jsonl"), "Hub name, file, or folder of datasets", DATA)
    output_dir: str = flag("outputs/grpo", "folder for model, checkpoints, metrics, summary.json", FILES)
    reward_funcs: str = flag("last_word", "last_word, last_number, module:function; or several, a,b", DATA)

    max_prompt_length: int = flag(256, "tokens of a prompt, whose end is kept", at_least=1)
    max_completion_length: int = flag(64, "tokens after which a completion is cut off", at_least=1)
    num_generations: int = flag(8, "completions of a prompt, compared with one another", at_least=2)
    per_device_train_batch_size: int = flag(32, "completions per rank and rollout, whole groups", at_least=1)
    max_tokens_per_batch: int | None = flag(None, "tokens per forward; None = the longest group", at_least=1)
    # at 0, every completion of a group would be the same one, and teach nothing
    temperature: float = flag(1.0, "of sampling, and of the log-probabilities", above=0)
    top_k: int = flag(0, "sample from the k likeliest tokens; 0 = all", at_least=0)
    top_p: float = flag(1.0, "sample from the likeliest tokens of this probability", above=0, at_most=1)
    stop_strings: list[str] | None = flag(None, "texts that end a completion as well as the EOS token")

    ds3_gather_for_generation: bool = flag(True, "gather all weights for a rollout; --no_..: none", MEMORY)
    gather_budget_gib: float | None = flag(None, "instead: GiB to keep gathered, a rank", MEMORY, at_least=0)
    offload_optimizer: bool = flag(False, "keep the optimizer's states, and update, on the host", MEMORY)
    offload_param: bool = flag(False, "keep the shards on the host, too", MEMORY)
    bf16: bool = flag(False, "weights, activations and gathers in bfloat16; the optimizer in fp32", MEMORY)

    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = flag("dapo", "what a token's loss is divided by")
    scale_rewards: bool = flag(True, "divide advantages by the standard deviation of the group's rewards")
    epsilon: float = flag(0.2, "clip the probability ratio below 1 - epsilon", at_least=0, below=1)
    epsilon_high: float | None = flag(None, "and above 1 + epsilon_high; None = epsilon", above=0)
    num_iterations: int = flag(1, "optimizer steps on each rollout", at_least=1)
    beta: float = flag(0.0, "weight of the KL divergence from the reference; 0 = no reference", at_least=0)
    mask_truncated_completions: bool = flag(False, "completions that were cut off teach nothing")
    learning_rate: float = flag(1e-6, "peak of the schedule", TRAINING, at_least=0)
    log_completions_steps: int | None = flag(None, "show completions every so many steps", FILES, at_least=1)


def check_arguments(args):
    """Raise ValueError for values and combinations that would be wrong or ignored."""
    check_run_arguments(args)
    size, group = args.per_device_train_batch_size, args.num_generations
    whole = f"--per_device_train_batch_size {size} is not a multiple of --num_generations {group}: groups are"
    refuse(size % group, f"{whole} not split over ranks. Choose {max(size // group, 1) * group}.")
    budget, longest = args.max_tokens_per_batch, longest_group(args)
    needs = f"a group may take {longest} (max_prompt_length + num_generations * max_completion_length)."
    small = f"--max_tokens_per_batch {budget} is too small: {needs} Raise it."
    refuse(budget and budget < longest, small)
    empty = '--stop_strings "" would end every completion at its first token: drop it.'
    refuse("" in (args.stop_strings or ()), empty)
    both = "--gather_budget_gib says how much to gather, --no_ds3_gather_for_generation nothing: drop one."
    refuse(args.gather_budget_gib is not None and not args.ds3_gather_for_generation, both)
    every = args.num_iterations
    for name in ("save_steps", "max_steps"):
        count = getattr(args, name) or 0
        mid = f"--{name} {count} falls into mid-rollout: give a multiple of --num_iterations {every}."
        refuse(count > 0 and count % every, mid)
    host = "--offload_param keeps shards on the host, where the optimizer must be: add --offload_optimizer."
    refuse(args.offload_param and not args.offload_optimizer, host)
    kept = "--activation_offloading would keep the weights that ZeRO-3 gathers for layers that are not "
    kept += "checkpointed: drop --no_gradient_checkpointing."
    refuse(args.activation_offloading and not args.gradient_checkpointing, kept)


def longest_group(args):
    """Tokens of a prompt and its completions at their longest."""
    return args.max_prompt_length + args.num_generations * args.max_completion_length


# --- 2. Data ---


class Prompts(Epochs):
    """Tokenised prompts in an endless, shuffled stream, with their columns for the rewards."""

    def __init__(self, args, tokenizer, world=1):
        super().__init__(args, world)
        self.tokenizer = tokenizer
        name, limit = args.dataset_name, args.max_prompt_length
        self.rows = load_rows(name, args.dataset_train_split)
        columns = self.rows.column_names
        refuse("prompt" not in columns, f"{name} has the columns {', '.join(columns)}; wanted: prompt.")
        self.conversational = isinstance(self.rows[0]["prompt"], list)
        if self.conversational:
            check_chat_template(tokenizer, name, args.model_name_or_path)

        # the cache's key is a hash of all that a function refers to: not of args, then
        def encode(example, index):
            check_row(example, ["prompt"])
            prompt_ids = encode_prompt(example["prompt"], tokenizer, template_kwargs(example))
            refuse(not prompt_ids, "the prompt is empty.")
            kept, _ = truncate_pair(prompt_ids, [], max_prompt_length=limit)
            return {"input_ids": kept, "tokens_cut": len(prompt_ids) - len(kept)}

        self.examples = map_rows(self.rows, encode, name, __file__, args.dataset_num_proc)
        # a completion in the data is not the one that a reward judges
        self.reward_columns = [column for column in columns if column not in ("prompt", "completion")]
        cut = np.array(self.examples["tokens_cut"][:])
        self.data = {
            "examples_read": len(self),
            "examples_truncated": int((cut > 0).sum()),
            "tokens_kept": sum(map(len, self.examples["input_ids"][:])),
            "tokens_cut": int(cut.sum()),
        }

    def __len__(self):
        return len(self.rows)

    def fingerprint(self):
        """Names the prompts' tokens and their order: a position in it means nothing in another one."""
        text = json.dumps([self.examples["input_ids"][:], self.args.seed])
        return hashlib.sha256(text.encode()).hexdigest()

    def place(self, progress):
        """How many prompts of the stream are done."""
        return progress["epoch"] * len(self) + progress["done"]

    def next_rollout(self, progress):
        """The numbers of the next rollout's prompts, of all ranks: each epoch has an order of its own, and
        the next one may begin in the middle of a rollout.
        """
        count = self.args.per_device_train_batch_size // self.args.num_generations * self.world
        start = self.place(progress)
        places = [divmod(place, len(self)) for place in range(start, start + count)]
        orders = {epoch: self.order(epoch) for epoch in {epoch for epoch, _ in places}}
        return [int(orders[epoch][place]) for epoch, place in places]

    def advance(self, progress, numbers):
        """Move `progress` on by these prompts. Returns the epochs done, as a fraction."""
        done = self.place(progress) + len(numbers)
        progress["epoch"], progress["done"] = divmod(done, len(self))
        return done / len(self)

    def count_steps(self, progress):
        """Optimizer steps of the whole run, those that `progress` has done included."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        wanted = math.ceil(self.args.num_train_epochs * len(self) - 1e-9)
        left = max(0, wanted - self.place(progress))
        rollouts = math.ceil(left / len(self.next_rollout(progress)))
        return progress["step"] + rollouts * self.args.num_iterations

    def judge(self, functions, numbers, completion_ids):
        """What the reward functions say of num_generations completions of each prompt.

        Returns: {name of a function: a number for each completion}; pairs of texts, prompt and completion.
        """
        rows = self.rows[[number for number in numbers for _ in range(self.args.num_generations)]]
        prompts, columns = rows["prompt"], {name: rows[name] for name in self.reward_columns}
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        completions, asked = texts, prompts
        if self.conversational:
            completions = [[{"role": "assistant", "content": text}] for text in texts]
            asked = [prompt[-1]["content"] for prompt in prompts]
        return call_rewards(functions, prompts, completions, columns, completion_ids), list(zip(asked, texts))


def load_prompts(args, pretrained, run):
    """Returns the prompts, and {name: reward function}, each of which has been tried."""
    prompts = Prompts(args, pretrained.tokenizer, run.world)
    check_token_ids(prompts.examples, pretrained.vocab_size, args.dataset_name)
    functions = load_reward_funcs(args.reward_funcs, prompts.reward_columns)
    check_answers(functions, prompts.rows, args.dataset_name)
    read = columns_read(functions, prompts.reward_columns)
    prompts.data["columns_unused"] = unused_columns(prompts.rows, ("prompt", *read))
    run.watch("trying the rewards")
    made_up = pretrained.tokenizer("The answer is 7.", add_special_tokens=False)["input_ids"]
    try:
        prompts.judge(functions, [0], [made_up] * args.num_generations)
    except Refusal as error:
        raise Refusal(f"before the first rollout, for a made-up completion: {error}") from error
    return prompts, functions


def prepare_data(args, pretrained, run):
    """Returns prompts, those of the evaluation (None without --eval_dataset_name), and reward functions."""
    prompts, functions = load_prompts(args, pretrained, run)
    if not args.eval_dataset_name:
        return prompts, None, functions
    names = {"dataset_name": args.eval_dataset_name, "dataset_train_split": args.dataset_test_split}
    eval_prompts, _ = load_prompts(replace(args, **names, num_generations=1), pretrained, run)
    prompts.data["eval"] = eval_prompts.data
    return prompts, eval_prompts, functions


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


def whole_bytes(parameters):
    """Bytes of parameters once they are gathered, where ZeRO-3 has sharded them."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters)


def is_small(parameter):
    """Norms and biases: whole throughout, whatever the budget."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) < 2


def plan_residents(module, budget_bytes):
    """Which weights stay gathered for a whole rollout.

    Args:    budget_bytes: of gathered matrices on each rank; None = no limit, 0 = none.
    Returns: the parameters, norms and biases among them; bytes that are gathered for the prompts on each
             rank; the most of these at once.
    """
    resident, room = [], math.inf if budget_bytes is None else budget_bytes
    passing, held = [0], 0
    for parameters, owners in generation_units(module):
        small, large = [p for p in parameters if is_small(p)], [p for p in parameters if not is_small(p)]
        resident, size = resident + small, whole_bytes(large)
        if size <= room:
            resident, room = resident + large, room - size
        elif len(owners) == 1:
            passing.append(size)
        else:
            held += size  # from its first owner to its last
    return resident, held + sum(passing), held + max(passing)


@contextmanager
def generation_weights(engine, budget_bytes, *, places=None, size=0):
    """Hold as much of a ZeRO-3 model whole as the budget allows; compute with the rest where it is.

    ZeRO-3 keeps 1/W of every weight on each of W ranks, and its hooks gather a module's weights for its
    forward. They are made for training, and are taken away here. None gathers all weights once. With a
    budget, what fits is gathered once. The rest comes in for the prompts, a decoder layer at a time: one
    gather serves many tokens. While single tokens are decoded it stays where it is, and activations travel
    (InPlace); what cannot be computed so is gathered for each token. Peak: the budget and one layer, and an
    embedding that is the head as well, if the budget had no room for it.

    Args:    engine: a DeepSpeed ZeRO-3 engine around a transformers model; budget_bytes: None, 0 or bytes.
             places: a list that keeps what is learned of the model, from one call to the next. size: how many
             sequences a rank will decode at once: so many that their activations would outweigh a weight let
             it be gathered; 0 = never.
    Yields:  the model, in eval mode and on SDPA, which takes the padding masks that "varlen" refuses. All
             ranks have to call it together, for as many sequences.
    After:   whatever happened inside: hooks, mode and attention as before, every weight a shard, and no
             trace: the next training forward records it anew.
    """
    module, offload = engine.module, engine.optimizer.parameter_offload
    coordinator = offload.get_param_coordinator()
    training, attention = module.training, module.config._attn_implementation
    resident = {id(p) for p in plan_residents(module, budget_bytes)[0]}
    handles = [engine.module_forward_pre_hook, engine.module_forward_post_hook, offload.fwd_pre_hook]
    handles += offload.forward_hooks + offload.backward_hooks
    try:
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        coordinator.release_and_reset_all(module)  # what training kept whole for its next forward
        module.eval()
        module.set_attn_implementation("sdpa")
        in_place = InPlace(module, resident, [] if places is None else places, size)
        with hooks_taken(handles), streamed(module, resident, in_place, engine.device), in_place:
            yield module
    finally:
        module.set_attn_implementation(attention)
        module.train(training)


@contextmanager
def streamed(module, resident, in_place, device):
    """Inside, resident weights are whole; the others are while their owners run: from the first one's forward
    to the last one's, a prompt's; of a single token's, those that in_place leaves over.

    Args: resident: ids of parameters.
    """

    def before(owner, parameters):
        wanted = in_place.left_over(owner, parameters)
        gather([p for p in wanted if p.ds_status != ZeroParamStatus.AVAILABLE], device)

    def after(owner, owners, parameters):
        if owner is owners[-1] or not in_place.left_over(owners[-1], parameters):
            release(parameters)

    hooks, units = [], generation_units(module)
    try:
        for parameters, owners in units:
            gather([p for p in parameters if id(p) in resident], device)
            passing = [p for p in parameters if id(p) not in resident]
            for owner in owners if passing else ():
                hooks.append(owner.register_forward_pre_hook(lambda o, *_, p=passing: before(o, p)))
                hooks.append(
                    owner.register_forward_hook(lambda o, *_, all=owners, p=passing: after(o, all, p))
                )
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameters, _ in units:
            release(parameters)


class InPlace:
    """Linear layers and embeddings of single tokens, computed where the rows of their weights are.

    Three ranks, a weight of six rows A .. F, and two sequences on each rank:

                   rank 0              rank 1              rank 2
        holds      A, B                C, D                E, F                 its shard: whole rows
        has        x0, x1              x2, x3              x4, x5               (B, in)
        gathers    x0 .. x5            x0 .. x5            x0 .. x5             (W B, in)
        computes   A, B of x0 .. x5    C, D of x0 .. x5    E, F of x0 .. x5     (W B, out / W)
        swaps      A .. F of x0, x1    A .. F of x2, x3    A .. F of x4, x5     (B, out)

    Parts that read one tensor (q, k and v; gate and up) share both exchanges. Which do is seen while the
    first prompts run. Left over are weights whose rows the ranks do not divide, those on the host, those that
    are not used by the forward of their module, or not on all tokens (experts), and those that `travel`.
    """

    def __init__(self, module, resident, groups, size):
        """resident: ids of parameters; groups: lists of parts that read one tensor, [] = not yet known."""
        self.module, self.groups, self.num_sequences = module, groups, size
        self.rows = {  # of each part: (out / W, in)
            part: rows
            for part in module.modules()
            if type(part) in (torch.nn.Linear, torch.nn.Embedding)
            if id(part.weight) not in resident and (rows := shard_rows(part.weight)) is not None
        }
        self.decodes, self.calls = False, []
        self.input, self.outputs = None, {}
        self.prompted = False  # a prompt of one token is no token that is decoded: other ranks' may be longer
        self._know()

    def _know(self):
        stay = [group for group in self.groups if not travel(group, self.num_sequences)]
        self.group_of = {part: group for group in stay for part in group if part in self.rows}
        self.wanted = {}  # owner -> which of its parameters have to be whole for a single token

    def __enter__(self):
        start = self.module.register_forward_pre_hook(self._start, with_kwargs=True)
        self.hooks = [start, self.module.register_forward_hook(self._learn)]
        for part in self.rows:
            part.forward = partial(self._forward, part, part.forward)
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()
        for part in self.rows:
            del part.forward  # the class's own method shows again
        self.input, self.outputs = None, {}

    def left_over(self, owner, parameters):
        """Those of an owner's parameters that have to be whole for the forward at hand."""
        if not self.decodes:
            return parameters
        if owner not in self.wanted:
            placed = {id(part.weight) for part in owner.modules() if part in self.group_of}
            self.wanted[owner] = [p for p in parameters if id(p) not in placed]
        return self.wanted[owner]

    def _start(self, module, args, kwargs):
        self.decodes = self.prompted and bool(self.groups) and kwargs["input_ids"].shape[1] == 1
        self.prompted, self.calls, self.size = True, [], len(kwargs["input_ids"])

    def _learn(self, *_):
        if not self.groups:
            of_one_tensor = itertools.groupby(self.calls, lambda call: id(call[1]))
            self.groups += [[part for part, _ in calls] for _, calls in of_one_tensor]
            self._know()
        self.calls = []

    def _forward(self, part, plain, x):
        if not self.decodes:
            # all tokens, sequence by sequence: every rank has as many
            whole = len(x) == self.size and x.dim() == (3 if isinstance(part, torch.nn.Linear) else 2)
            if whole and not self.groups:
                self.calls.append((part, x))
            return plain(x)
        if part not in self.group_of:
            return plain(x)
        if x is not self.input or part not in self.outputs:
            rows = {each: self.rows[each] for each in self.group_of[part] if each in self.rows}
            self.input, self.outputs = x, exchange(x, rows)
        return self.outputs.pop(part)


def shard_rows(parameter):
    """This rank's rows of a weight (out, in), as a view of its shard: (out / W, in). None if they are not
    whole rows, or wait on the host.
    """
    world = dist.get_world_size(parameter.ds_process_group)
    here = parameter.ds_tensor.device == parameter.device
    if world == 1 or not here or is_small(parameter) or parameter.ds_shape[0] % world:
        return None
    return parameter.ds_tensor.view(-1, parameter.ds_shape[1])


def travel(group, size):
    """Whether the weights of parts that read one tensor take fewer bytes than what `size` sequences on each
    rank would exchange for them.
    """
    weights = [part.weight for part in group]
    world, width = dist.get_world_size(weights[0].ds_process_group), weights[0].ds_shape[1]
    out = sum(weight.ds_shape[0] for weight in weights)
    results = 0 if isinstance(group[0], torch.nn.Embedding) else out  # its rows come back, of `width` each
    return size * (world * width + results) >= out * width


def exchange(x, rows):
    """What parts that read one tensor make of it, each of their rows computed where it is.

    Args:    x (B, 1, in), or of an embedding ids (B, 1); rows: {part: this rank's (out / W, in)}.
    Returns: {part: (B, 1, out)}.
    """
    assert x.shape[1] == 1, "a single token of each sequence"
    first = next(iter(rows))
    group, size = first.weight.ds_process_group, len(x)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    inputs = x.new_empty(world * size, *x.shape[2:])  # of all ranks' sequences
    dist.all_gather_into_tensor(inputs, x[:, 0].contiguous(), group)
    if isinstance(first, torch.nn.Embedding):
        [table] = rows.values()
        ids = inputs - rank * len(table)
        here = (ids >= 0) & (ids < len(table))
        outputs = table[ids.where(here, 0)].where(here[:, None], 0)  # zeros for rows that others have
    else:
        outputs = torch.cat([linear(inputs, each) for each in rows.values()], dim=1)  # (W B, sum of out / W)
    swapped = torch.empty_like(outputs)
    dist.all_to_all_single(swapped, outputs, group=group)
    swapped = swapped.view(world, size, -1)  # block r: what rank r computed for this rank's sequences
    if isinstance(first, torch.nn.Embedding):
        return {first: swapped.sum(0)[:, None]}  # one of them is not zero
    made = {}
    for part, columns in zip(rows, swapped.split([len(each) for each in rows.values()], dim=2)):
        y = columns.transpose(0, 1).reshape(size, 1, -1)  # rank 0's rows, rank 1's, ..
        made[part] = y if part.bias is None else y + part.bias
    return made


@torch.no_grad()
def rollout_costs(engine, budget_bytes, places, size):
    """What a rollout of `size` completions on each rank brings there, in bytes: {name: number}.

    Args: places: as of `generation_weights`; filled here, if it is empty, by a forward over a few tokens.
    """
    module, device = engine.module, engine.device
    resident, prompt_bytes, _ = plan_residents(module, budget_bytes)
    if prompt_bytes and not places:
        with generation_weights(engine, budget_bytes, places=places) as model:
            # with a cache, as a rollout's: else layers would be compiled, if training's are
            model(input_ids=torch.zeros(2, 3, dtype=torch.int64, device=device), use_cache=True)
    exchanged, stay = 0, [group for group in places if not travel(group, size)]
    for group in stay:
        weights, out = [part.weight for part in group], sum(part.weight.ds_shape[0] for part in group)
        world, width = dist.get_world_size(weights[0].ds_process_group), weights[0].ds_shape[1]
        if isinstance(group[0], torch.nn.Embedding):  # ids go round, and a row comes from every rank
            exchanged += size * world * (8 + width * weights[0].element_size())
        else:
            exchanged += size * (world * width + out) * weights[0].element_size()
    placed = {part for group in stay for part in group}
    elsewhere = {id(p) for part in module.modules() if part not in placed for p in part.parameters(False)}
    left = elsewhere - {id(p) for p in resident}
    return {
        "resident_bytes": whole_bytes(resident),
        "prompt_gathered_bytes": prompt_bytes,
        "gathered_bytes_per_token": whole_bytes(p for p in module.parameters() if id(p) in left),
        "exchanged_bytes_per_token": exchanged,
    }


def gather(parameters, device):
    """Make sharded weights whole in one coalesced collective, in which each arrives at its own place."""
    if not parameters:
        return
    group = parameters[0].ds_process_group
    ranks = dist.get_world_size(group)
    # with --offload_param from the host
    shards = [p.ds_tensor.to(device, non_blocking=True) for p in parameters]
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
def generate(model, prompts, args, run, *, end_ids, uniform=None, stopped=None):
    """Complete every prompt num_generations times, in one batch.

    Args:    prompts: lists of ids, padded on the left here; end_ids: ids that end a completion, and belong to
             it; uniform (B * G, max_completion_length): see `sample`; stopped: ids of the completions so far
             (B * G, T) -> bool (B * G,), for stop strings.
    Returns: completions: lists of >= 1 ids, those of a prompt side by side; finished: whether each ended by
             itself; entropies: the mean over each one's tokens; how many tokens the longest one took.
    Raises:  FloatingPointError, on all ranks alike, for logits that are not finite.
    """
    device, width, group = run.device, max(map(len, prompts)), args.num_generations
    input_ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    size = len(prompts) * group
    tokens = input_ids.repeat_interleave(group, 0)
    finished = torch.zeros(size, dtype=torch.bool, device=device)
    lengths, entropies = torch.zeros(2, size, device=device)
    ends = torch.tensor(sorted(end_ids), device=device)
    uniform = None if uniform is None else uniform.to(device)
    steps = range(args.max_completion_length)
    for step in tqdm(steps, "rollout", unit="token", leave=False, disable=not run.first):
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **as_argument(cache, model),
        ).logits[:, -1]
        if step == 0:  # a prompt is computed once, and its keys and values are copied for its completions
            cache.batch_repeat_interleave(group)
            logits, mask, position_ids = (
                x.repeat_interleave(group, 0) for x in (logits, mask, position_ids[:, -1:])
            )
        drawn = None if uniform is None else uniform[:, step]
        ids, entropy = sample(logits, drawn, args.temperature, args.top_k, args.top_p)
        lengths += ~finished
        entropies += entropy * ~finished
        tokens = torch.cat([tokens, ids[:, None]], dim=1)
        finished = finished | torch.isin(ids, ends)
        if stopped is not None:
            finished = finished | stopped(tokens[:, width:])  # a stop string never begins in the prompt
        run.watch(f"a rollout, after token {step + 1} of {args.max_completion_length}")
        # All ranks step on until the last one is done: each forward is a collective where weights stream.
        counts = run.sum({"unfinished": (~finished).sum(), "broken": entropy.isnan().sum()})
        if counts["broken"]:
            raise FloatingPointError(
                f"token {step + 1}: the logits of {int(counts['broken'])} completions are not finite: an "
                "update has broken the weights; go on from an earlier checkpoint, at a lower --learning_rate."
            )
        if not counts["unfinished"]:
            break
        input_ids, position_ids = ids[:, None], position_ids + 1
        mask = torch.cat([mask, mask.new_ones(size, 1)], dim=1)
    completions = [row[:n] for row, n in zip(tokens[:, width:].tolist(), lengths.int().tolist())]
    return completions, finished.tolist(), (entropies / lengths).tolist(), step + 1


# --- 4. Loss ---


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


def loss_denominators(lengths, num_generations, loss_type, max_completion_length, sum_ranks=dict):
    """What each completion's token losses are divided by, so that the loss is one sum over all tokens.

    dapo      sum_i sum_t l_it / sum_i |o_i|              each token of the step weighs the same
    grpo      1/B sum_i 1/|o_i| sum_t l_it                each completion
    bnpo      1/K sum_k (sum_it l_it / sum_i |o_i|)       each group; TRL: each micro-batch, whatever it holds
    dr_grpo   1/(B L) sum_i sum_t l_it                    L = max_completion_length: no length in it

    Args:    lengths (B,): scored tokens of this rank's completions; 0 = masked, and then counted nowhere.
             sum_ranks: Run.sum: all micro-batches and ranks make one mean; of one rank alone dict.
    Returns: (B,) float64; inf for a masked completion.
    Source:  arXiv 2503.14476, equation 8 (dapo); arXiv 2402.03300, equation 3 (grpo); arXiv 2503.20783,
             section 3 (dr_grpo); bnpo is named by TRL.
    """
    lengths = lengths.double()
    of_group = lengths.view(-1, num_generations).sum(1)
    counts = {"tokens": lengths.sum(), "completions": (lengths > 0).sum(), "groups": (of_group > 0).sum()}
    tokens, completions, groups = map(float, sum_ranks(counts).values())
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
    """Log-probabilities of the batch's completion tokens, at the temperature of sampling: (M,) float32."""

    def head(hidden, weight, target_ids, bias):
        options = {"temperature": args.temperature, "chunk_size": args.loss_chunk_size}
        return token_logps(hidden, weight, target_ids, bias=bias, **options)

    return at_scored(engine, batch, head)


def on_policy_loss(engine, batch, args):
    """`batch_loss` where the weights are those that sampled, and there is no reference.

    Every ratio is 1 then, and the gradient of a token's loss by its log-probability is -A / denominator: that
    of a weighted sum whose weights are known in advance, for which the head needs three products, not four.
    """
    weights = batch["advantages"] / batch["denominators"]

    def head(hidden, weight, target_ids, bias):
        options = {"temperature": args.temperature, "chunk_size": args.loss_chunk_size}
        return nll_sum(hidden, weight, target_ids, weights=weights, bias=bias, **options)

    return at_scored(engine, batch, head), {"loss": -weights.sum(), "kl": 0.0, "clipped": 0.0}


def batch_loss(engine, batch, args):
    """The loss to take gradients of, summed over the batch's tokens; and named sums for the metrics."""
    later = args.num_iterations > 1 or "old_per_token_logps" in batch
    if not later and "ref_per_token_logps" not in batch:
        return on_policy_loss(engine, batch, args)
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
    scored = batch["denominators"].isfinite()
    return loss, {"loss": loss, "kl": kl.where(scored, 0).sum(), "clipped": (clipped & scored).sum()}


# --- 5. Training ---


def make_batches(groups, advantages, denominators, budget, run):
    """Groups -> micro-batches of at most `budget` tokens, equally many on all ranks.

    Args:    groups: this rank's [(prompt_ids, [completion_ids, ..]), ..]; advantages, denominators (B,): of
             their completions.
    Returns: flat rows with shared prompts (collators.flatten_shared_prompt), on the device, with, for each
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
        # of the data: a prompt counts once for each completion
        row["real_tokens"] = sum(len(prompt) * len(ids) + sum(map(len, ids)) for prompt, ids in chunk)
        batches.append(row)
    # Ranks must run equally many forwards and backwards, or collectives stall: tokens that weigh nothing.
    most = int(run.max({"batches": len(batches)})["batches"])
    nothing = {"advantages": torch.zeros(1), "denominators": torch.full((1,), math.inf), "real_tokens": 0}
    one_token = groups[0][0][:1]
    while len(batches) < most:
        batches.append(flatten_shared_prompt([(one_token, [one_token])]) | nothing)
    return [run.to_device(batch) for batch in batches]


def train_step(engine, batches, args, run, offload=None):
    """One optimizer step over this rank's micro-batches; where no token is scored it changes nothing.

    Args:    engine: DeepSpeed's, or an Unsharded model; offload: an OffloadActivations, or None.
    Returns: sums over all ranks: num_scored_tokens, num_tokens (computed), real_tokens (of the data), and
             those of `batch_loss`; the norm of the gradient before it was clipped.
    Raises:  FloatingPointError if loss or gradient are not finite: DeepSpeed has skipped the update.
    """
    counts = {
        "num_scored_tokens": sum(batch["denominators"].isfinite().sum() for batch in batches),
        "num_tokens": sum(batch["input_ids"].numel() for batch in batches),
        "real_tokens": sum(batch["real_tokens"] for batch in batches),
    }
    sums = run.sum(counts)
    if not sums["num_scored_tokens"]:  # every completion masked: not even Adam's momentum may move a weight
        return defaultdict(float), 0.0
    tally = Tally()
    for i, batch in enumerate(batches):
        run.watch(f"micro-batch {i + 1} of {len(batches)}")
        engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
        with offload or nullcontext():
            loss, metrics = batch_loss(engine, batch, args)
        # DeepSpeed averages gradients over ranks: times world cancels that; and micro-batches are summed
        engine.backward(loss * run.world, scale_wrt_gas=False)
        tally.add(metrics)
    if offload:
        offload.end_step()
    run.watch("optimizer step")
    engine.step()
    grad_norm = run.value(engine.get_global_grad_norm())
    sums |= tally.of_all_ranks(run)
    check_finite(sums["loss"], grad_norm)
    return sums, grad_norm


def deepspeed_config(args, trainable=True):
    """DeepSpeed's configuration. The place to change what no flag says."""
    config = {
        # The two that DeepSpeed insists on. Micro-batches are cut by tokens, and their number varies:
        # `train_step` says itself where a step ends, and divides by nothing but the loss's own denominators.
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
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if args.offload_param or not trainable:  # a reference is read once per rollout: it lives on the host
        config["zero_optimization"]["offload_param"] = host
    if args.offload_optimizer and trainable:
        config["zero_optimization"]["offload_optimizer"] = host
    return config


def prepare_training(model, args, run):
    """What a real run and a dry run have to share: the optimizer.

    The place to freeze what is not to be trained: model.get_input_embeddings().requires_grad_(False), say.
    """
    wrap_layers(model, args.gradient_checkpointing, args.torch_compile)
    groups, options = parameter_groups(model, args.weight_decay), {"lr": args.learning_rate}
    if args.offload_optimizer and not run.pretends:
        # DeepSpeed's own updates on the host from vector registers; it refuses torch's there
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    # fused: the default makes temporaries as large as the weights while it updates
    return torch.optim.AdamW(groups, fused=True, **options)


def prepare_offloading(model, args, run):
    """What sends layers' inputs to the host until backward; None without --activation_offloading."""
    return (
        OffloadActivations(model, decoder_layers(model), run.device) if args.activation_offloading else None
    )


def load_engine(args, run, pretrained, trainable=True):
    """The model in a ZeRO-3 engine: no rank but the first ever holds more of it than its shards.

    It computes as transformers has it; what is not trainable, a reference, as the update does.
    """
    run.watch("loading the model")
    register_varlen_attention()
    config = deepspeed_config(args, trainable)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model, whole = load_shards(pretrained, run, config, dtype)
    check_flat(model)
    if not trainable:
        set_kernels(model, args)
        return deepspeed.initialize(model=model.requires_grad_(False).eval(), config=config)[0]
    optimizer = prepare_training(model.train(), args, run)
    if run.first:  # of what leaves as it came, where the shards hold a rounded copy
        kept = {name: whole.get_parameter(name) for name in frozen_names(model)}
        pretrained.frozen = {name: weight for name, weight in kept.items() if weight.dtype != dtype}
    ask_for_an_inputs_gradient(decoder_layers(model))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def set_kernels(model, args):
    """Let a model compute as updates do."""
    model.set_attn_implementation("varlen")
    if args.use_liger_kernel:
        set_liger_kernels(model)


def set_kernels_and_prove(engine, prompts, args, run):
    """Set the kernels, and prove on two prompts that the update computes what transformers does.

    There are no completions yet: the beginning and the end of one prompt follow the other.
    """
    model, longest = engine.module, args.max_prompt_length + args.max_completion_length
    num_scored = min(NUM_TOKENS, args.max_completion_length)
    first, last = (prompts.examples[i]["input_ids"] for i in (0, len(prompts) - 1))
    groups = []
    for ids, other in ((first, last), (last, first)):
        prompt = proof_tokens(ids, model.config, longest)[: longest - num_scored]
        groups.append((prompt, [other[:num_scored], other[-num_scored:]]))
    sequences = [(prompt + ids, len(ids)) for prompt, completions in groups for ids in completions]
    expected = logps_alone(model, sequences, run.device) if args.check_exact else None
    set_kernels(model, args)
    if args.check_exact:
        batch = run.to_device(flatten_shared_prompt(groups))
        check_exact(
            model,
            expected,
            lambda: per_token_logps(model, batch, replace(args, temperature=1.0)),
            bf16=args.bf16,
            max_length=longest,
            what="where completions share a prompt",
            remedy="Choose another model: the update of this script knows no other rows.",
        )


def load_engines(args, run, pretrained, prompts):
    """The engine to train, proved, as it was when the checkpoint was written; the reference, or None."""
    engine = load_engine(args, run, pretrained)
    set_kernels_and_prove(engine, prompts, args, run)
    reference = load_engine(args, run, pretrained, trainable=False) if args.beta else None
    frozen = frozen_names(engine.module)
    run.match("frozen_parameters", frozen, "Freeze what was frozen then, or begin a new run.")
    if run.checkpoint:
        load_training_state(run, engine)
    try_to_write(run, engine.module, pretrained)  # what cannot be written shows now, not after the last step
    return engine, reference


def budget_bytes(args):
    """Of gathered weights during a rollout, as `generation_weights` takes it."""
    if args.gather_budget_gib is not None:
        return int(args.gather_budget_gib * 2**30)
    return None if args.ds3_gather_for_generation else 0


class Rollouts:
    """Samples completions with the engine's present weights, and lets the rewards judge them."""

    def __init__(self, args, run, engine, prompts, pretrained, functions):
        self.args, self.run, self.engine, self.prompts = args, run, engine, prompts
        self.functions, self.stopped = functions, None
        self.end_ids = end_token_ids(pretrained.tokenizer, pretrained.eos_token_id)
        if args.stop_strings:
            criteria = StopStringCriteria(pretrained.tokenizer, args.stop_strings)
            self.stopped = lambda completion_ids: criteria(completion_ids, None)
        self.places, self.most_whole_bytes = [], 0
        size = args.per_device_train_batch_size
        self.costs = rollout_costs(engine, budget_bytes(args), self.places, size)
        if run.first and (run.world > 1 or args.offload_param):
            mib = [f"{count / 2**20:.1f} MiB" for count in self.costs.values()]
            text = (
                f"{mib[0]} of weights stay whole on each rank; {mib[1]} come in for the prompts; for each "
                f"token of all {size} completions {mib[2]} are gathered and {mib[3]} exchanged"
            )
            show_lines([("rollouts", text)])

    def sample(self, numbers):
        """One rollout, of all ranks' prompts `numbers`: this rank's groups, rewards, and what the update and
        the metrics want to know.
        """
        args, run, started = self.args, self.run, time.perf_counter()
        size, share = args.per_device_train_batch_size, len(numbers) // run.world
        mine = numbers[run.rank * share : (run.rank + 1) * share]
        prompt_ids = self.prompts.examples[mine]["input_ids"]
        # of every rank's completions, so that sampling depends on the seed and the rollout alone
        rng = np.random.default_rng([args.seed, run.progress["step"] // args.num_iterations])
        uniform = rng.random((size * run.world, args.max_completion_length), dtype=np.float32)
        uniform = torch.from_numpy(uniform[run.rank * size : (run.rank + 1) * size])
        weights = generation_weights(self.engine, budget_bytes(args), places=self.places, size=size)
        # every rollout holds the same weights: the first one shows how many
        measured = nullcontext({}) if self.most_whole_bytes else most_whole(self.engine.module)
        with weights as model, measured as most:
            gathered = time.perf_counter()
            completions, finished, entropies, num_steps = generate(
                model, prompt_ids, args, run, end_ids=self.end_ids, uniform=uniform, stopped=self.stopped
            )
        seconds = time.perf_counter() - started
        self.most_whole_bytes = most.get("bytes", self.most_whole_bytes)
        run.watch("the rewards")
        with run.together():
            rewards, texts = self.prompts.judge(self.functions, mine, completions)
        lengths = torch.tensor([len(ids) for ids in completions])
        groups = [completions[i : i + args.num_generations] for i in range(0, size, args.num_generations)]
        return {
            "groups": list(zip(prompt_ids, groups)),
            "rewards": rewards,
            "reward": torch.tensor(list(rewards.values()), dtype=torch.float64).sum(0),
            "lengths": lengths,
            "finished": torch.tensor(finished),
            "entropy_sum": float(sum(e * n for e, n in zip(entropies, lengths.tolist()))),
            "texts": texts,
            "costs": {
                **self.costs,
                "gather_seconds": gathered - started,
                "generation_seconds": seconds,
                "generation_steps": num_steps,
            },
        }

    def evaluate(self, prompts):
        """Means over held-out prompts, of one greedy completion of each."""
        args, run = replace(self.args, temperature=0.0, num_generations=1), self.run
        # as many prompts as a rollout has: that it fits into memory is known
        size = self.args.per_device_train_batch_size // self.args.num_generations
        sums = Counter()
        for start in range(run.rank * size, len(prompts) + run.rank * size, size * run.world):
            # ranks generate equally many: after the last prompt they begin anew, and do not count those
            numbers = [place % len(prompts) for place in range(start, start + size)]
            with generation_weights(self.engine, budget_bytes(args), places=self.places, size=size) as model:
                prompt_ids, options = prompts.examples[numbers]["input_ids"], {"stopped": self.stopped}
                completions, finished, _, _ = generate(
                    model, prompt_ids, args, run, end_ids=self.end_ids, **options
                )
            with run.together():
                rewards, _ = prompts.judge(self.functions, numbers, completions)
            kept = max(0, min(size, len(prompts) - start))
            sums["reward"] += sum(sum(values[:kept]) for values in rewards.values())
            sums["completions/mean_length"] += sum(map(len, completions[:kept]))
            sums["completions/clipped_ratio"] += kept - sum(finished[:kept])
        return {f"eval_{name}": total / len(prompts) for name, total in run.sum(sums).items()}


@contextmanager
def most_whole(module):
    """Yields {"bytes": the most bytes of weights that were whole at once on this rank}.

    It looks as the forward of each module starts for the first time: one forward shows them all.
    """
    most, hooks = {"bytes": 0}, {}

    def look(part, *_):
        hooks.pop(part).remove()
        held = sum(parameter.nbytes for parameter in module.parameters())  # of one that is not whole: 0
        most["bytes"] = max(most["bytes"], held)

    for part in module.modules():
        hooks[part] = part.register_forward_pre_hook(look)
    try:
        yield most
    finally:
        for hook in hooks.values():
            hook.remove()


def prepare_update(rollout, args, run, reference=None):
    """The rollout's micro-batches, with advantages, and with the reference's log-probabilities."""
    advantages = group_advantages(rollout["reward"], args.num_generations, args.scale_rewards)
    lengths, size, limit = rollout["lengths"], args.num_generations, args.max_completion_length
    if args.mask_truncated_completions:
        lengths = lengths * rollout["finished"]
    batches = make_batches(
        rollout["groups"],
        advantages,
        loss_denominators(lengths, size, args.loss_type, limit, run.sum),
        args.max_tokens_per_batch or longest_group(args),
        run,
    )
    for i, batch in enumerate(batches if reference else ()):
        run.watch(f"reference, micro-batch {i + 1} of {len(batches)}")
        with torch.no_grad():
            batch["ref_per_token_logps"] = per_token_logps(reference, batch, args)
    return batches


def rollout_metrics(rollout, args, run):
    """This rollout's metrics over all ranks, under TRL's names."""
    reward, groups = rollout["reward"], rollout["reward"].view(-1, args.num_generations)
    means = {  # name: (this rank's sum, and of how many)
        "reward": (reward.sum(), len(reward)),
        **{f"rewards/{name}/mean": (sum(x), len(x)) for name, x in rollout["rewards"].items()},
        "reward_std": (groups.std(1).sum(), len(groups)),
        "frac_reward_zero_std": ((groups.amax(1) == groups.amin(1)).sum(), len(groups)),
        "completions/mean_length": (rollout["lengths"].sum(), len(reward)),
        "completions/clipped_ratio": ((~rollout["finished"]).sum(), len(reward)),
        "entropy": (rollout["entropy_sum"], rollout["lengths"].sum()),
    }
    sums = run.sum({name: total for name, (total, _) in means.items()})
    counts = run.sum({name: count for name, (_, count) in means.items()})
    return {name: sums[name] / counts[name] for name in means} | rollout["costs"]


def show_completions(step, rollout, num_generations):
    """A few lines: prompts, completions and their rewards. The end of a text is what counts."""
    rows = [(*texts, reward) for texts, reward in zip(rollout["texts"], rollout["reward"].tolist())]
    for prompt, completion, reward in rows[: 2 * num_generations : 4]:
        prompt, completion = (" ".join(text.split())[-50:] for text in (prompt, completion))
        tqdm.write(f"step {step}  reward {reward:6.2f}  {prompt:>50}  ->  {completion}")


def describe_rewards(output_dir):
    """Lines: the mean reward of the first and of the last tenth of the run's rollouts."""
    there = (Path(output_dir) / "metrics.jsonl").exists()  # not where a last checkpoint is resumed elsewhere
    rewards = [step["reward"] for step in read_metrics(output_dir)] if there else []
    if len(rewards) < 2:
        return []
    part = max(2, len(rewards) // 10)
    first, last = (sum(values) / part for values in (rewards[:part], rewards[-part:]))
    return [("reward", f"{first:.3f} in the first {part} steps, {last:.3f} in the last {part}")]


def main(args):
    """Train. Returns what summary.json holds; {"stopped_at_step": step} if stopped; of a dry run, its
    counts. Raises what `Run` says; a reward's mistake with some completions shows when it is given them.
    """
    check_arguments(args)
    if args.dry_run:
        return explore(args)
    with Run(args, "GRPO", shown={"reward": "reward"}) as run, deepspeed_groups(run):
        torch.manual_seed(args.seed + run.rank)  # order and sampling have generators of their own
        longest = args.max_prompt_length + args.max_completion_length
        limits = "--max_prompt_length + --max_completion_length"
        pretrained = read_pretrained(args.model_name_or_path, longest, limits, dropout=False)
        check_cache(pretrained.config)
        if args.use_liger_kernel:
            check_liger(pretrained.config.model_type)
        prompts, eval_prompts, functions = run.on_each_machine(prepare_data, args, pretrained, run)
        run.resume()
        run.match("data", prompts.fingerprint(), "Use its dataset, max_prompt_length and seed.")
        ranks = run.progress.get("world_size")
        run.match("world_size", run.world, f"DeepSpeed's shards are bound to it: resume with {ranks} ranks.")
        run.match("num_iterations", args.num_iterations, "Use the number that it was trained with.")
        run.plan(prompts.count_steps(run.progress))

        engine, reference = load_engines(args, run, pretrained, prompts)
        offload = prepare_offloading(engine.module, args, run)
        rollouts = Rollouts(args, run, engine, prompts, pretrained, functions)
        run.start(prompts.data)

        while run.unfinished:
            if fresh := run.due(args.num_iterations):
                numbers = prompts.next_rollout(run.progress)
            with run.step(engine.optimizer, lambda numbers=numbers: f"Prompts {numbers} of the data."):
                if fresh:
                    rollout = rollouts.sample(numbers)
                    batches = prepare_update(rollout, args, run, reference)
                    sampled = rollout_metrics(rollout, args, run)
                    epoch = prompts.advance(run.progress, numbers)
                update_started = time.perf_counter()
                sums, grad_norm = train_step(engine, batches, args, run, offload)
                update_seconds = time.perf_counter() - update_started
            scored = max(sums["num_scored_tokens"], 1)
            run.progress["updates"] += sums["num_scored_tokens"] > 0
            metrics = {
                "epoch": epoch,
                "loss": sums["loss"],
                **sampled,
                "kl": sums["kl"] / scored,
                "clip_ratio": sums["clipped"] / scored,
                "grad_norm": grad_norm,
                "num_tokens": sums["num_tokens"],
                "num_scored_tokens": sums["num_scored_tokens"],
                "update_seconds": update_seconds,
            }
            if eval_prompts and (run.due(args.eval_steps) or not run.unfinished):
                metrics |= rollouts.evaluate(eval_prompts)
            run.log(metrics, real_tokens=sums["real_tokens"])
            if run.first and run.due(args.log_completions_steps):
                show_completions(run.progress["step"], rollout, args.num_generations)
            # a checkpoint holds no half-used rollout
            if run.save_when_due(lambda folder: save_training_state(folder, engine), args.num_iterations):
                return {"stopped_at_step": run.progress["step"]}

        save_model(run, engine, pretrained)
        moments = {"rollout_weights": rollouts.most_whole_bytes, "peak": peak_memory_bytes(run.device)}
        if offload:
            moments["on_host"] = offload.report()["peak_host_bytes"]
        rows = ledger(held_bytes(engine) | moments, "allocated on CUDA, resident on a CPU")
        lines = describe_rewards(args.output_dir) if run.first else []
        return run.finish(prompts.data, rows, offload and offload.report(), lines)


# --- 6. Memory before the GPU ---


class Unsharded:
    """A whole model and its optimizer in the place of DeepSpeed's engine."""

    def __init__(self, module, optimizer, max_grad_norm):
        self.module, self.optimizer, self.max_grad_norm = module, optimizer, max_grad_norm

    def __call__(self, **inputs):
        return self.module(**inputs)

    def set_gradient_accumulation_boundary(self, is_boundary):
        pass

    def backward(self, loss, scale_wrt_gas):
        loss.backward()

    def step(self):
        self.grad_norm = clip_gradients(self.module, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self):
        return self.grad_norm


def largest_batch(args):
    """The largest micro-batch that an update may see, of at most all prompts of a rollout."""
    prompt, length, group = args.max_prompt_length, args.max_completion_length, args.num_generations
    longest, most = longest_group(args), args.per_device_train_batch_size // group
    budget = args.max_tokens_per_batch or longest
    lengths = [length] * min(most, budget // longest)
    rest = (budget % longest - prompt) // group  # room for one more group, of shorter completions
    lengths += [rest] if rest >= 1 and len(lengths) < most else []
    # prompts that differ from their first token on: nothing of them is shared
    groups = [([i] + [0] * (prompt - 1), [[0] * tokens] * group) for i, tokens in enumerate(lengths)]
    ones = torch.ones(len(groups) * group)
    [batch] = make_batches(groups, ones, ones, math.inf, PretendedRun(1, None))
    return batch, len(groups) == most


def pretend_rollout(model, args):
    """Bytes of all completions' keys and values; and the most that is held at the end, weights aside."""
    size, length = args.per_device_train_batch_size, args.max_prompt_length + args.max_completion_length
    cache, tracker = DynamicCache(config=model.config), ByteCounter()

    def forward(num_tokens, mask_length):
        input_ids = torch.zeros(size, num_tokens, dtype=torch.int64)
        mask = torch.ones(size, mask_length, dtype=torch.int64)
        options = {"attention_mask": mask, "use_cache": True, "logits_to_keep": 1}
        return model(input_ids=input_ids, **options, **as_argument(cache, model)).logits[:, -1]

    with torch.no_grad():
        forward(length, length)
        cached = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        num_bytes = sum(tensor.nbytes for tensor in cached)
        tracker.track_external(model, *cached)
        del cached  # the next token's forward replaces them
        with tracker:
            sample(forward(1, length + 1), torch.rand(size), args.temperature, args.top_k, args.top_p)
    peak = tracker.peak_bytes(model.device) - whole_bytes(model.parameters())
    return num_bytes, peak


def pretend_step(args, pretrained):
    """The bytes of a rollout, its update and the optimizer's step on a rank: {name: bytes}, and when the peak
    is. Activations, loss head and the last token of a rollout are pretended; the rest is added up.
    """
    batch, whole_rollout = largest_batch(args)
    with pretend(args, sharded=False) as run:
        register_varlen_attention()
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        model = empty_model(pretrained.model_config, dtype=dtype)
        kv_cache, rollout = pretend_rollout(model.eval(), args)
        model.set_attn_implementation("varlen")
        optimizer = prepare_training(model.train(), args, run)
        for parameter in trained(model):  # ZeRO-3 takes a gradient away as soon as it is there
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        offload = prepare_offloading(model, args, run)
        engine = Unsharded(model, optimizer, args.max_grad_norm)
        step = partial(train_step, engine, [batch], args, run, offload)
        update, _ = count_step(step, [batch], model, optimizer, offload)

    zero, world = deepspeed_config(args)["zero_optimization"], args.dry_run_world_size
    weights, num_trained = whole_bytes(model.parameters()), sum(p.numel() for p in trained(model))
    share = {  # of this rank; on the host, DeepSpeed has a second buffer of gradients
        "parameters": weights // world,
        "gradients": (8 if args.offload_optimizer else 4) * num_trained // world,
        # ZeRO's fp32 copy of the weights, and what the optimizer keeps of each of its numbers
        "optimizer": int(4 * (num_trained + update["optimizer"] / dtype.itemsize) / world),
    }
    hosts = ["gradients", "optimizer"] * args.offload_optimizer + ["parameters"] * args.offload_param
    held = {name: 0 if name in hosts else num_bytes for name, num_bytes in share.items()}
    held["bucket"] = 4 * zero["reduce_bucket_size"]
    resident, _, largest = plan_residents(model, budget_bytes(args))
    unit = max(whole_bytes(parameters) for parameters, _ in generation_units(model))
    # The first forward and backward after a rollout gather for a module at a time, in a buffer of which each
    # weight is cut. ZeRO-3 learns their order, and in the others keeps by default what is used again within
    # 1e9 elements.
    learned = min(weights, dtype.itemsize * 10**9)
    repeats = not whole_rollout or args.num_iterations > 1
    gathered = {"rollout": whole_bytes(resident) + largest, "update": learned if repeats else 2 * unit}
    if world == 1 and not args.offload_param:  # the shards are the weights
        gathered = dict.fromkeys(gathered, 0)
    update["peak"] += gathered["update"] - update["parameters"] - update["optimizer"]
    moments = {
        "in the rollout": gathered["rollout"] + rollout,
        "in the update's forward and backward": update["peak"],
        "in the optimizer's step": held["gradients"],  # once more, as the optimizer wants them
    }
    counts = held | {name: update[name] for name in ("activations", "loss_head", "on_host") if name in update}
    counts |= {"rollout_weights": gathered["rollout"], "kv_cache": kv_cache}
    if hosts:
        counts["state_on_host"] = sum(share[name] for name in hosts)
    if args.beta:
        counts["reference_on_host"] = weights // world
        moments["in the reference's forward"] = learned + update["loss_head"]
    moment = max(moments, key=moments.get)
    return counts | {"peak": sum(held.values()) + moments[moment]}, moment


def explore(args):
    """Count the bytes of a rollout and its update; say whether they fit, what would help, and what fits."""
    longest = args.max_prompt_length + args.max_completion_length
    limits = "--max_prompt_length + --max_completion_length"
    pretrained = read_pretrained(args.model_name_or_path, longest, limits, dropout=False, config_only=True)
    check_cache(pretrained.config)
    size, group, length = args.per_device_train_batch_size, args.num_generations, args.max_completion_length
    none = {"ds3_gather_for_generation": False, "gather_budget_gib": None}
    changes = {  # the cheapest first
        "--bf16": {"bf16": True},
        "--loss_chunk_size 128": {"loss_chunk_size": 128},
        "--gradient_checkpointing": {"gradient_checkpointing": True},
        "--activation_offloading": {"activation_offloading": True},
        "--no_ds3_gather_for_generation": none,
        "--offload_optimizer": {"offload_optimizer": True},
        "--offload_optimizer --offload_param": {"offload_optimizer": True, "offload_param": True},
    }
    others = {
        "--gather_budget_gib 1": {"gather_budget_gib": 1.0, "ds3_gather_for_generation": True},
        f"--per_device_train_batch_size {group}": {"per_device_train_batch_size": min(size, group)},
        **more_ranks(args),
    }
    most = (max_positions(pretrained.config)[0] or 2**17) - args.max_prompt_length
    if args.max_tokens_per_batch:  # which has to hold a group
        most = min(most, (args.max_tokens_per_batch - args.max_prompt_length) // group)
    return dry_run(
        DryRun(args, check_arguments, partial(pretend_step, pretrained=pretrained)),
        changes,
        others,
        what=f"{size} completions of {length} tokens, {group} of each prompt of {args.max_prompt_length},",
        host_flags=["--offload_optimizer", "--offload_optimizer --offload_param"],
        length_flag="max_completion_length",
        most=most,
    )


if __name__ == "__main__":
    run_script(main, Arguments)
