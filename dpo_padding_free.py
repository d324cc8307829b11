"""DPO without padding, with the prompt computed once for both completions.

A pair of a prompt (P tokens), a chosen (C) and a rejected completion (R), B pairs to a forward:
padded, it computes 2 B * max(P + C, P + R) tokens; padding-free, sum(2 P + C + R); shared, sum(P + C + R).
Logits exist for C + R tokens only, a chunk at a time; the reference's log-probabilities are computed once,
before training, and its weights are gone by then. Each way gives the same loss and gradients, to rounding.
Dropout is off, as in TRL: the policy would drop what its reference keeps.
Left out to stay readable: LoRA, vision inputs, tools in chats, other losses than three, a moving reference.

laptop   python dpo_padding_free.py
1 GPU    python dpo_padding_free.py --model_name_or_path Qwen/Qwen3-0.6B \
             --dataset_name trl-lib/ultrafeedback_binarized --bf16
8 GPUs   torchrun --standalone --nproc_per_node 8 dpo_padding_free.py --model_name_or_path Qwen/Qwen3-8B ...
no GPU   python dpo_padding_free.py --dry_run --dry_run_world_size 8 --gpu_memory_gib 80 ... says what fits
Sources: arXiv 2305.18290 (DPO), arXiv 2310.12036 (IPO), arXiv 2305.10425 (SLiC-HF, the hinge)
"""

import hashlib
import math
from bisect import bisect_right
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from datasets import Features, List, Value
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from common import refuse
from common.collators import IGNORE, add_scored, count_padding, flatten, flatten_shared_prompt, pad
from common.data import (
    check_chat_template,
    check_repeats,
    check_row,
    check_token_ids,
    encode_completion,
    end_token_ids,
    load_rows,
    map_rows,
    repeats_prompt,
    shared_prefix_length,
    template_kwargs,
    unused_columns,
    without_nulls,
)
from common.exactness import NUM_TOKENS, check_exact, logps_alone, proof_tokens
from common.folders import commit_files, fresh_folder
from common.logps import at_scored, token_logps
from common.memory import DryRun, MemoryMeter, count_step, dry_run, pretend, single_changes
from common.offload import OffloadActivations
from common.run import (
    DATA,
    FILES,
    ROOT,
    TRAINING,
    Epochs,
    Run,
    Tally,
    check_finite,
    clip_gradients,
    flag,
    run_script,
)
from common.sharding import (
    ShardedArguments,
    check_liger,
    check_sharded_arguments,
    decoder_layers,
    frozen_names,
    is_sharded,
    load_model,
    load_training_state,
    max_positions,
    model_fingerprint,
    parameter_groups,
    read_pretrained,
    save_model,
    save_training_state,
    set_kernels,
    try_to_write,
)
from common.truncation import truncate_pair

# of a pair, once cut: keep_end may leave the two sequences different ends of one prompt
TOKENS = ("chosen_prompt_ids", "chosen_ids", "rejected_prompt_ids", "rejected_ids")
REFERENCE = "reference_logps.safetensors"  # in output_dir


# --- 1. Arguments ---


@dataclass
class Arguments(ShardedArguments):
    dataset_name: str = flag(
        str(ROOT / "demo/preferences.jsonl"), "Hub name, file, or folder written by save_to_disk", DATA
    )
    output_dir: str = flag("outputs/dpo", "folder for model, checkpoints, metrics.jsonl, summary.json", FILES)
    learning_rate: float = flag(1e-6, "peak of the schedule", TRAINING, at_least=0)

    max_prompt_length: int | None = flag(None, "first limit, in tokens: a prompt keeps its end", at_least=1)
    max_completion_length: int | None = flag(None, "second: a completion keeps its start", at_least=1)
    max_length: int = flag(1024, "last: tokens of prompt and completion together", at_least=2)
    truncation_mode: Literal["keep_start", "keep_end"] = flag("keep_start", "what max_length keeps")
    share_prompt: bool = flag(True, "compute a pair's prompt once for both completions")
    per_device_train_batch_size: int | None = flag(None, "pairs per forward; 4 if not given", at_least=1)
    max_tokens_per_batch: int | None = flag(None, "instead: tokens per forward, of whole pairs", at_least=1)
    # the bounds of these three are those of dpo_loss
    beta: float = flag(0.1, "how dearly leaving the reference is paid for; for ipo, its tau")
    loss_type: str = flag("sigmoid", "sigmoid (DPO), ipo, hinge")
    label_smoothing: float = flag(0.0, "sigmoid: the share of pairs taken to be labelled the wrong way round")
    precompute_ref_log_probs: bool = flag(True, "compute the reference once, and do not keep its weights")


def check_arguments(args):
    """Raise ValueError for values and combinations that would be wrong or ignored."""
    check_sharded_arguments(args, args.padding_free)
    check_loss(args.beta, args.loss_type, args.label_smoothing)
    for name in ("max_prompt_length", "max_completion_length"):
        limit = getattr(args, name) or 0
        no_room = f"--{name} {limit} leaves no room for the rest within --max_length {args.max_length}: "
        refuse(limit >= args.max_length, no_room + "lower the first or raise the second.")
    budget, attention, shares = args.max_tokens_per_batch, args.attn_implementation, shares_prompts(args)
    both = budget and args.per_device_train_batch_size
    refuse(both, "--max_tokens_per_batch and --per_device_train_batch_size both size a batch: drop one.")
    ignores = f"--attn_implementation {attention} ignores kv_index, which shared prompts are made of: "
    refuse(shares and attention not in (None, "varlen"), ignores + "add --no_share_prompt, or drop it.")
    cost = largest_pair(args)[2]
    over = f"--dry_run: a pair may take {cost} tokens, over --max_tokens_per_batch {budget}: "
    refuse(args.dry_run and cost > (budget or cost), over + "raise it, or lower --max_length.")


def shares_prompts(args):
    return args.padding_free and args.share_prompt


def largest_pair(args):
    """Tokens of the largest pair that the flags allow: its prompt, each completion, and what they cost."""
    completion = min(args.max_completion_length or args.max_length, args.max_length - 1)
    prompt = min(args.max_prompt_length or args.max_length, args.max_length - completion)
    return prompt, completion, (1 if shares_prompts(args) else 2) * prompt + 2 * completion


# --- 2. Data ---


def tokenize(example, tokenizer, end_ids=()):
    """One pair of any supported form -> (prompt_ids, chosen_ids, rejected_ids, moved).

    The prompt ends with the chat template's generation prompt, or in the middle of a turn that the
    completions continue. It is tokenised alone and together with each completion; where that differs, it ends
    at the last token which all share, and moved is True.
    """
    check_row(example, [name for name in ("prompt", "chosen", "rejected") if name in example])
    prompt, *pair = (without_nulls(example.get(name)) for name in ("prompt", "chosen", "rejected"))
    implicit, conversation = prompt is None, isinstance(pair[0], list)
    if conversation:
        for name, messages in zip(("chosen", "rejected"), pair):
            role = messages[-1]["role"]
            refuse(role != "assistant", f"{name} ends with a message of role {role}: no answer.")
    if implicit and conversation:
        # the messages that both begin with, but never the last one: the answers may be equal up to there
        length = min(shared_prefix_length(*pair), len(pair[0]) - 1, len(pair[1]) - 1)
        prompt, pair = pair[0][:length], [messages[length:] for messages in pair]
    kwargs = template_kwargs(example)
    encoded = [
        encode_completion(prompt or type(one)(), one, tokenizer, template_kwargs=kwargs, end_ids=end_ids)
        for one in pair
    ]
    prompts, whole = [prompt_ids for prompt_ids, _, _ in encoded], [input_ids for _, input_ids, _ in encoded]
    if implicit and not conversation:
        # the tokens that both begin with, but never all: one may be the other's beginning
        length = min(shared_prefix_length(*whole), len(whole[0]) - 1, len(whole[1]) - 1)
        prompts = [whole[0][:length]] * 2
    shared = min(shared_prefix_length(prompts[i], whole[j]) for i in (0, 1) for j in (0, 1))
    return prompts[0][:shared], whole[0][shared:], whole[1][shared:], shared < max(map(len, prompts))


def cut_pair(prompt_ids, chosen_ids, rejected_ids, limits):
    """Apply the limits to both sequences of a pair, and say what that did to them."""
    sequences = [truncate_pair(prompt_ids, ids, **limits) for ids in (chosen_ids, rejected_ids)]
    (chosen_prompt, chosen), (rejected_prompt, rejected) = sequences
    same = chosen_prompt == rejected_prompt
    kept = sum(len(prompt) + len(completion) for prompt, completion in sequences)
    return {
        **dict(zip(TOKENS, (chosen_prompt, chosen, rejected_prompt, rejected))),
        "chosen_length": len(chosen_prompt) + len(chosen),
        "rejected_length": len(rejected_prompt) + len(rejected),
        "shared_length": len(chosen_prompt) if same else 0,
        "equal": same and chosen == rejected,
        # a sequence's first token is never predicted
        "unscored": any(len(completion) + bool(prompt) < 2 for prompt, completion in sequences),
        "prompts_truncated": any(len(prompt) < len(prompt_ids) for prompt, _ in sequences),
        "prompts_parted": not same,  # not shared, then
        "completions_truncated": (len(chosen) < len(chosen_ids)) + (len(rejected) < len(rejected_ids)),
        "completions_without_eos": (chosen[-1:] != chosen_ids[-1:]) + (rejected[-1:] != rejected_ids[-1:]),
        "tokens_cut": 2 * len(prompt_ids) + len(chosen_ids) + len(rejected_ids) - kept,
    }


def load_examples(name, split, pretrained, args):
    """Tokenised pairs, cut to the limits; none without a difference, none with a completion of no scored
    token.

    Returns: a datasets.Dataset with the columns of `cut_pair`, and example, a number; the counts for
             summary.json.
    """
    rows, tokenizer = load_rows(name, split), pretrained.tokenizer
    wanted = "chosen and rejected, and prompt unless they begin with it"
    missing = not {"chosen", "rejected"} <= set(rows.column_names)
    refuse(missing, f"{name} has the columns {', '.join(rows.column_names)}; wanted: {wanted}.")
    if isinstance(rows[0]["chosen"], list):
        check_chat_template(tokenizer, name, args.model_name_or_path)
    # the cache's key is a hash of all that the function refers to: not of args, then
    end_ids = end_token_ids(tokenizer, pretrained.eos_token_id)
    limits = {
        "max_prompt_length": args.max_prompt_length,
        "max_completion_length": args.max_completion_length,
        "max_length": args.max_length,
        "truncation_mode": args.truncation_mode,
    }

    def encode(example, index):
        prompt_ids, chosen_ids, rejected_ids, moved = tokenize(example, tokenizer, end_ids)
        marks = {
            "boundaries_moved": moved,
            "promptless": set(prompt_ids) <= {tokenizer.bos_token_id},
            "repeats": repeats_prompt(example.get("prompt"), example["chosen"], example["rejected"]),
        }
        return {"example": index, **marks, **cut_pair(prompt_ids, chosen_ids, rejected_ids, limits)}

    # datasets would guess types from the first 1,000 rows: of prompts that are all empty, none
    kinds = {list: List(Value("int64")), bool: Value("bool"), int: Value("int64")}
    made_up = encode({"prompt": "a", "chosen": "b", "rejected": "c"}, 0)
    features = Features({column: kinds[type(value)] for column, value in made_up.items()})
    examples = map_rows(rows, encode, name, __file__, args.dataset_num_proc, features)
    check_token_ids(examples, pretrained.vocab_size, name, TOKENS)
    data, used = describe(examples, unused_columns(rows, ("prompt", "chosen", "rejected")))
    check_repeats(name, examples["repeats"][:])
    promptless = sum(examples["promptless"][:])
    guessed = "prompt" not in rows.column_names and promptless > len(rows) / 2
    refuse(
        guessed,
        f"{name} has no column prompt, and chosen and rejected of {promptless} of its {len(rows)} pairs have "
        "no beginning in common that could be one. Rename the column that holds it to prompt; the other "
        f"columns: {', '.join(data['columns_unused']) or 'none'}.",
    )
    what = "no pair whose completions differ and have a scored token within max_length"
    refuse(not len(used), f"{name} has {what} {args.max_length}: {data}.")
    return examples.select(used), data


def describe(examples, columns_unused):
    """Counts of what became of the pairs, for summary.json; and which pairs are used."""
    counts = {name: np.array(examples[name][:]) for name in examples.column_names if name not in TOKENS}
    used = ~(counts["equal"] | counts["unscored"])
    summed = ("prompts_truncated", "prompts_parted", "completions_truncated", "completions_without_eos")
    summed += ("boundaries_moved", "tokens_cut")
    data = {
        "examples_read": len(examples),
        "examples_used": int(used.sum()),
        "examples_equal": int((counts["equal"] & ~counts["unscored"]).sum()),
        "examples_unscored": int(counts["unscored"].sum()),
        "examples_truncated": int((counts["tokens_cut"] > 0)[used].sum()),
        **{name: int(counts[name][used].sum()) for name in summed},
        "tokens_kept": int((counts["chosen_length"] + counts["rejected_length"])[used].sum()),
        "columns_unused": columns_unused,
    }
    return data, np.flatnonzero(used)


# --- 3. The technique ---


def shared_row(pairs):
    """One flat row in which each pair's prompt stands once: [prompt, chosen, rejected, prompt, ..].

    Args:    pairs: dicts with the columns of `cut_pair`.
    Returns: the keys of flatten_shared_prompt; scores in the order chosen, rejected, chosen, ..
    """
    groups = []
    for pair in pairs:
        prompt, chosen, other_prompt, rejected = (pair[name] for name in TOKENS)
        if prompt and prompt == other_prompt:
            groups.append((prompt, [chosen, rejected]))
            continue
        # keep_end left two different prompts, or none: nothing to share
        for own_prompt, completion in ((prompt, chosen), (other_prompt, rejected)):
            first = own_prompt or completion[:1]  # a sequence's first token is never scored
            groups.append((first, [(own_prompt + completion)[len(first) :]]))
    return flatten_shared_prompt(groups)


def collate(pairs, args, pad_token_id=0):
    """Pairs -> a batch: shared prompts, padding-free or padded. No pairs: two unscored tokens, no sequence.

    Returns: what the model takes, and score_index (M,) int64: which flattened position predicts the m-th
             scored token; score_ids (M,): that token; completion_lengths (2 B,): how many each sequence has,
             in the order chosen, rejected, chosen, ..
    """
    if pairs and shares_prompts(args):
        return shared_row(pairs)
    sequences = [
        {
            "input_ids": pair[prompt] + pair[completion],
            "labels": [IGNORE] * len(pair[prompt]) + pair[completion],
        }
        for pair in pairs
        for prompt, completion in (TOKENS[:2], TOKENS[2:])
    ]
    lengths = [sum(label != IGNORE for label in each["labels"][1:]) for each in sequences]
    sequences = sequences or [{"input_ids": [0, 0], "labels": [IGNORE, IGNORE]}]
    batch = add_scored(flatten(sequences) if args.padding_free else pad(sequences, pad_token_id))
    return batch | {"completion_lengths": torch.tensor(lengths, dtype=torch.int64)}


class Pairs(Epochs):
    """Tokenised pairs: their cost, and batches of them."""

    def __init__(self, examples, args, name, pad_token_id=0, world=1):
        super().__init__(args, world)
        columns = ("chosen_length", "rejected_length", "shared_length")
        chosen, rejected, shared = (np.array(examples[column][:]) for column in columns)
        self.num_tokens = chosen + rejected  # of both sequences, a shared prompt counted twice
        self.costs = self.num_tokens  # tokens computed for the pair alone
        if shares_prompts(args):
            self.costs = self.costs - shared
        elif not args.padding_free:
            self.costs = 2 * np.maximum(chosen, rejected)
        self.has_prompt = shared > 0
        self.examples, self.pad_token_id = examples, pad_token_id
        # (E, 2) float32: the reference's log-probabilities of chosen and rejected; NaN: not computed
        self.reference = None
        largest, budget = int(self.costs.argmax()), args.max_tokens_per_batch
        cost = self.costs[largest]
        over = f"{name}, example {examples[largest]['example']} takes {cost} tokens, over "
        over += f"--max_tokens_per_batch {budget}: raise it, or lower --max_length."
        refuse(cost > (budget or cost), over)

    def __len__(self):
        return len(self.costs)

    def fingerprint(self):
        """Names the tokens of all pairs: so the data, the tokenizer and the limits."""
        name = hashlib.sha256()
        for batch in self.examples.with_format("arrow").iter(10_000):
            for column in TOKENS:
                values = batch[column].combine_chunks()
                for numbers in (values.value_lengths(), values.flatten()):
                    name.update(numbers.to_numpy(zero_copy_only=False).tobytes())
        return name.hexdigest()

    def cut(self, numbers):
        """Cut pair numbers, in their order, into micro-batches: of so many pairs, or of so many tokens."""
        size, budget = self.args.per_device_train_batch_size or 4, self.args.max_tokens_per_batch
        start, total, longest = 0, 0, 0
        for i, cost in enumerate(self.costs[numbers].tolist()):
            count, total, longest = i + 1 - start, total + cost, max(longest, cost)
            tokens = total if self.args.padding_free else count * longest
            if count > size if budget is None else tokens > budget:
                yield numbers[start:i]
                start, total, longest = i, cost, cost
        if len(numbers):
            yield numbers[start:]

    def reference_chunks(self, progress, total_steps):
        """The micro-batches in which the reference is computed for the steps from `progress` to total_steps.

        In bf16 a pair's log-probability depends on what else is in its row. So these are training's own of
        the first epoch: there, a policy that has not moved has the reference's numbers to the last bit. Later
        epochs put the pairs into other rows, and to their margins that adds the noise of bf16.
        """
        in_first, steps_left = progress["epoch"] == 0, total_steps - progress["step"]
        done = progress["done"] if in_first else 0
        steps = list(self.steps(0, done))
        if in_first and steps_left <= len(steps):
            return list(chain(*steps[:steps_left]))
        return [*chain(*steps), *self.cut(self.order(0)[:done])]

    def name(self, numbers):
        """What an error message says of these pairs."""
        return f"Pairs {numbers.tolist()}, examples {sorted(self.examples[numbers]['example'])}."

    def batch(self, numbers):
        """The batch of these pairs, with the reference's log-probabilities where they are known."""
        rows = self.examples[numbers] if len(numbers) else {}
        pairs = [dict(zip(rows, values)) for values in zip(*rows.values())]
        batch = collate(pairs, self.args, self.pad_token_id)
        return batch if self.reference is None else batch | {"ref_logps": self.reference[numbers].flatten()}


# --- 4. Loss ---


def sigmoid_loss(chosen_logratios, rejected_logratios, beta, label_smoothing, **_):
    """DPO: -(1 - eps) log sigmoid(h) - eps log sigmoid(-h).

    Source: arXiv 2305.18290, equation 7; smoothed: E. Mitchell, "A note on DPO with noisy preferences"
            (cDPO), 2023.
    """
    h = beta * (chosen_logratios - rejected_logratios)
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def ipo_loss(chosen_logratios, rejected_logratios, beta, chosen_lengths, rejected_lengths, **_):
    """IPO: (h - 1 / (2 tau))^2, h of means per token. Source: arXiv 2310.12036, equation 17."""
    if chosen_lengths is None or rejected_lengths is None:
        raise ValueError("loss_type ipo divides by lengths: give chosen_lengths and rejected_lengths.")
    # of sums, the long answers alone would decide; each divides by its own scored tokens, not by the batch's
    h = chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths
    return (h - 1 / (2 * beta)) ** 2


def hinge_loss(chosen_logratios, rejected_logratios, beta, **_):
    """SLiC-HF: max(0, 1 - h). Source: arXiv 2305.10425."""
    return torch.relu(1 - beta * (chosen_logratios - rejected_logratios))


# A new loss is a function here: of log pi(y|x) / pi_ref(y|x) of chosen and rejected, (B,), and of dpo_loss's
# beta, label_smoothing, chosen_lengths and rejected_lengths, by name; it returns losses (B,).
LOSSES = {"sigmoid": sigmoid_loss, "ipo": ipo_loss, "hinge": hinge_loss}


def check_loss(beta, loss_type, label_smoothing):
    """Raise ValueError for settings of the loss that would be wrong or ignored."""
    refuse(loss_type not in LOSSES, f"loss_type is {loss_type!r}; choose one of {', '.join(LOSSES)}.")
    refuse(not 0 < beta < math.inf, f"beta is {beta}; it must be a finite number above 0.")
    smooth = 0 <= label_smoothing < 0.5
    refuse(not smooth, f"label_smoothing is {label_smoothing}; it must be at least 0 and below 0.5.")
    undefined = f"label_smoothing {label_smoothing} is not defined for loss_type {loss_type}: use sigmoid."
    refuse(label_smoothing > 0 and loss_type != "sigmoid", undefined)


def dpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta,
    loss_type="sigmoid",
    label_smoothing=0.0,
    *,
    chosen_lengths=None,
    rejected_lengths=None,
):
    """How far the policy prefers chosen to rejected, more than the reference does.

    Args:    four times (B,): log-probabilities in nats, summed over each completion's scored tokens.
             beta: per nat. label_smoothing: for sigmoid, the probability that a label is the wrong way round.
             chosen_lengths, rejected_lengths (B,): scored tokens of each completion; ipo needs them.
    Returns: losses (B,); chosen_rewards, rejected_rewards (B,), without gradient: beta * log(pi / pi_ref).
    Raises:  ValueError for an unknown loss, beta <= 0, smoothing outside [0, 0.5) or with another loss, and
             for ipo without lengths.
    Source:  of each loss, at its function.

    >>> losses, *rewards = dpo_loss(*torch.tensor([[-10.0], [-30.0], [-12.0], [-26.0]]), beta=0.1)
    >>> round(losses.item(), 4), [round(reward.item(), 4) for reward in rewards]
    (0.4375, [0.2, -0.4])
    """
    check_loss(beta, loss_type, label_smoothing)
    chosen_logratios = policy_chosen_logps - ref_chosen_logps  # log pi(y_w|x) / pi_ref(y_w|x)
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    losses = LOSSES[loss_type](
        chosen_logratios,
        rejected_logratios,
        beta=beta,
        label_smoothing=label_smoothing,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def per_token_logps(model, batch, chunk_size):
    """Log-probabilities of the batch's score_ids, (M,) float32; no logits are kept, none of prompts made."""

    def head(hidden, weight, target_ids, bias):
        return token_logps(hidden, weight, target_ids, bias=bias, chunk_size=chunk_size)

    return at_scored(model, batch, head)


def sequence_logps(model, batch, chunk_size):
    """Log-probabilities of whole completions, (2 B,) float32: chosen, rejected, chosen, .."""
    logps, lengths = per_token_logps(model, batch, chunk_size), batch["completion_lengths"]
    sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(
        lengths, output_size=len(logps)
    )
    return logps.new_zeros(len(lengths)).index_add(0, sequence, logps)


def batch_loss(model, reference_model, batch, args):
    """The loss to take gradients of, a sum over the batch's pairs; and named sums for the metrics."""
    if reference_model is not None:  # before the policy's forward, whose activations then do not wait for it
        with torch.no_grad():
            batch = {**batch, "ref_logps": sequence_logps(reference_model, batch, args.loss_chunk_size)}
    logps = sequence_logps(model, batch, args.loss_chunk_size)
    # chosen and rejected take turns: (2, B)
    logps, ref_logps, lengths = (
        values.view(-1, 2).T for values in (logps, batch["ref_logps"], batch["completion_lengths"])
    )
    lengths = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        *logps, *ref_logps, args.beta, args.loss_type, args.label_smoothing, **lengths
    )
    margins = chosen_rewards - rejected_rewards
    metrics = {  # (B,) each
        "loss": losses,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": margins > 0,
        "rewards/margins": margins,
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }
    return losses.sum(), {name: values.detach().double().sum() for name, values in metrics.items()}


def set_kernels_and_prove(model, pairs, args, run):
    """Set attention and kernels, and prove on two pairs that the run computes what transformers does.

    Looks at a prompt's last and a completion's first tokens: a mask, a state or a convolution that crosses
    from one sequence into another, or from chosen into rejected, shows there.
    """
    # pairs that share a prompt, if there are any: others would prove nothing about sharing
    first = [pairs.examples[i] for i in np.argsort(~pairs.has_prompt, kind="stable")[:2].tolist()]
    for i, pair in enumerate(first):
        prompt = pair["chosen_prompt_ids"] or pair["rejected_prompt_ids"]
        prompt = prompt and proof_tokens(prompt[-NUM_TOKENS:], model.config, args.max_length)
        completions = [pair[name][:NUM_TOKENS] for name in ("chosen_ids", "rejected_ids")]
        if not shares_prompts(args) and len(prompt) <= NUM_TOKENS:  # then its tokens are scored as well
            prompt, completions = [], [prompt + completion for completion in completions]
        room = max(1, args.max_length - max(map(len, completions)))
        first[i] = cut_pair(prompt, *completions, {"max_prompt_length": room, "max_length": args.max_length})
    sequences = [
        (pair[prompt] + pair[completion], len(pair[completion]) - (not pair[prompt]))
        for pair in first
        for prompt, completion in (TOKENS[:2], TOKENS[2:])
    ]
    expected = logps_alone(model, sequences, run.device) if args.check_exact else None
    set_kernels(model, args, args.padding_free)
    if not args.check_exact:
        return
    if shares_prompts(args):
        what, remedy = "in a row of shared prompts", "Use --no_share_prompt or --no_padding_free"
    elif args.padding_free:
        what, remedy = "in a padding-free row", "Use --no_padding_free"
    else:
        what, remedy = "in a padded batch", "Drop --use_liger_kernel, if given,"
    batch = run.to_device(collate(first, args, pairs.pad_token_id))
    compute = partial(per_token_logps, model, batch, args.loss_chunk_size)
    remedy = f"{remedy} or choose another model."
    options = {"bf16": args.bf16, "max_length": args.max_length}
    check_exact(model, expected, compute, what=what, remedy=remedy, **options)


# --- 5. The reference ---


@torch.no_grad()
def compute_reference(model, pairs, chunks, run):
    """Fill in pairs.reference for these micro-batches (arrays of pair numbers), the same on all ranks."""
    found = torch.zeros(len(pairs), 2, device=run.device)
    for start in tqdm(range(0, len(chunks), run.world), "Reference", leave=False, disable=not run.first):
        run.watch("computing the reference")
        one_each = chunks[start : start + run.world]
        [batch] = pairs.micro_batches(one_each, run)
        logps = sequence_logps(model, run.to_device(batch), pairs.args.loss_chunk_size)
        if run.rank < len(one_each):
            found[torch.from_numpy(one_each[run.rank]).to(run.device)] = logps.view(-1, 2)
    dist.all_reduce(found)  # each pair was computed on one rank, and is 0 on the others
    for number in (~found.isfinite()).any(1).nonzero()[:1, 0].tolist():
        example = pairs.examples[number]["example"]
        raise FloatingPointError(f"the reference's log-probabilities of example {example} are not finite.")
    numbers = np.concatenate(chunks)
    pairs.reference[numbers] = found.cpu()[numbers]


def read_reference(output_dir, fingerprint):
    """The tensors that an earlier start of this run wrote, {} if there are none.

    Raises: ValueError if their fingerprint ({what: its name}) is another one.
    """
    path = Path(output_dir) / REFERENCE
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        found = file.metadata() or {}
        other = " and its ".join(what for what in fingerprint if found.get(what) != fingerprint[what])
        remedy = "Use that run's model, data and limits, or remove the file to have it computed again."
        refuse(other, f"{path} belongs to another run: its {other} is not this one's. {remedy}")
        return {name: file.get_tensor(name) for name in file.keys()}


def prepare_reference(model, pairs, eval_pairs, args, run):
    """Give pairs their reference: what an earlier start of this run kept in output_dir, or computed now.

    By the weights that the run began with: a resumed one has not loaded its own yet.

    Returns: the tensors to keep, and their fingerprint.
    Raises:  ValueError if output_dir holds that of another model, data, limits or precision.
    """
    sets = {"data": (pairs, pairs.reference_chunks(run.progress, run.total_steps))}
    if eval_pairs:
        sets["evaluation data"] = eval_pairs, eval_pairs.in_order()
    precision = ("bf16" if args.bf16 else "fp32") + (" Liger" if args.use_liger_kernel else "")
    fingerprint = {"model": run.progress["reference_model"], "precision": precision}
    fingerprint |= {name: some.fingerprint() for name, (some, _) in sets.items()}
    with run.together():
        kept = {} if args.overwrite_output_dir else read_reference(args.output_dir, fingerprint)
    for name, (some, chunks) in sets.items():
        some.reference = kept.get(name, torch.full((len(some), 2), math.nan))
        missing = some.reference.isnan().any(1).to(run.device, torch.uint8)
        # computing is a collective: what one rank lacks (its file is its own machine's), all compute
        dist.all_reduce(missing, dist.ReduceOp.MAX)
        missing = missing.cpu()
        if chunks := [chunk for chunk in chunks if missing[chunk].any()]:
            compute_reference(model, some, chunks, run)
    return {name: some.reference for name, (some, _) in sets.items()}, fingerprint


def write_reference(output_dir, tensors, fingerprint):
    """Put the file in its place in one step."""
    temporary = fresh_folder(Path(output_dir) / "reference.tmp")
    save_file(tensors, temporary / REFERENCE, metadata=fingerprint)
    commit_files(temporary, output_dir)


# --- 6. Training ---


def prepare_training(model, args, run):
    """The optimizer, and what waits on the host: a dry run has the same.

    The place to freeze what is not to be trained: model.get_input_embeddings().requires_grad_(False), say.
    """
    # fused: the default makes temporaries as large as the weights while it updates
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay), lr=args.learning_rate, fused=True
    )
    if not args.activation_offloading:
        return optimizer, None
    return optimizer, OffloadActivations(model, decoder_layers(model), run.device)


def load_reference_model(args, run, pretrained):
    """A second model beside the policy, or None where its log-probabilities are computed before training."""
    if args.precompute_ref_log_probs:
        return None
    # it runs under no_grad, and no optimizer knows it
    model = load_model(args, run, pretrained)
    set_kernels(model, args, args.padding_free, pretends=run.pretends)
    return model


def train_step(model, optimizer, batches, args, run, offload=None, reference_model=None):
    """One optimizer step over this rank's micro-batches.

    Returns: counts of all ranks: num_pairs, num_scored_tokens, num_tokens (computed), padding among these;
             and means over the step's pairs of what `batch_loss` names, with grad_norm, of the gradient
             before it was clipped.
    Raises:  FloatingPointError, before the update, if loss or gradient are not finite.
    """
    counts = run.sum(
        {
            "num_pairs": sum(len(batch["completion_lengths"]) // 2 for batch in batches),
            "num_scored_tokens": sum(len(batch["score_ids"]) for batch in batches),
            "num_tokens": sum(batch["input_ids"].numel() for batch in batches),
            "padding": sum(map(count_padding, batches)),
        }
    )
    # The mean runs over the pairs of the whole step, all micro-batches and all ranks: one batch of 8,
    # 8 batches of 1 and 2 ranks of 4 take the same step.
    num_pairs, tally = counts["num_pairs"], Tally()
    for batch in batches:
        with offload or nullcontext():
            loss, sums = batch_loss(model, reference_model, run.to_device(batch), args)
        # FSDP averages gradients over ranks: times world cancels that
        (loss * (run.world / num_pairs)).backward()
        tally.add(sums)
    if offload:
        offload.end_step()
    grad_norm = run.value(clip_gradients(model, args.max_grad_norm))
    means = {name: total / num_pairs for name, total in tally.of_all_ranks(run).items()}
    check_finite(means["loss"], grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return counts, {**means, "grad_norm": grad_norm}


@torch.no_grad()
def evaluate(model, reference_model, pairs, args, run):
    """Means over all pairs and ranks of what `batch_loss` names, each with the prefix eval_."""
    tally = Tally()
    for batch in pairs.micro_batches(pairs.in_order(), run):
        run.watch("evaluation")
        tally.add(batch_loss(model, reference_model, run.to_device(batch), args)[1])
    means = {f"eval_{name}": total / len(pairs) for name, total in tally.of_all_ranks(run).items()}
    check_finite(means["eval_loss"])
    return means


def prepare_data(args, pretrained, world):
    """Returns training pairs, evaluation pairs (None without --eval_dataset_name), and counts."""

    def load(name, split):
        examples, counts = load_examples(name, split, pretrained, args)
        # masked: any id will do
        return Pairs(examples, args, name, pretrained.tokenizer.pad_token_id or 0, world), counts

    pairs, data = load(args.dataset_name, args.dataset_train_split)
    if not args.eval_dataset_name:
        return pairs, None, data
    eval_pairs, data["eval"] = load(args.eval_dataset_name, args.dataset_test_split)
    return pairs, eval_pairs, data


def main(args):
    """Train. Returns what summary.json holds; {"stopped_at_step": step} if stopped; of a dry run, its
    counts. Raises what `Run` says.
    """
    check_arguments(args)
    if args.dry_run:
        return explore(args)
    shown = {"loss": "loss", "margin": "rewards/margins", "acc": "rewards/accuracies"}
    with Run(args, "DPO", unfinished=[REFERENCE], shown=shown) as run:
        pretrained = read_pretrained(args.model_name_or_path, args.max_length, dropout=False)
        if args.use_liger_kernel:
            check_liger(pretrained.config.model_type)
        pairs, eval_pairs, data = run.on_each_machine(prepare_data, args, pretrained, run.world)
        run.resume()
        run.match("data", f"{pairs.fingerprint()} {args.seed}", "Use its dataset, limits and seed.")
        objective = f"{args.loss_type} {args.beta} {args.label_smoothing}"
        run.match("objective", objective, "Use its loss_type, beta and label_smoothing.")
        run.plan(pairs.count_steps(run.progress))

        model = load_model(args, run, pretrained)
        # the weights that a run begins with are its reference
        run.match("reference_model", model_fingerprint(model), "Use the model that it began with.")
        set_kernels_and_prove(model, pairs, args, run)
        reference_model = load_reference_model(args, run, pretrained)
        reference = None if reference_model else prepare_reference(model, pairs, eval_pairs, args, run)
        optimizer, offload = prepare_training(model, args, run)
        run.match("optimizer", type(optimizer).__name__, "Use the one that it was trained with.")
        run.match("frozen_parameters", frozen_names(model), "Freeze what was frozen, or begin a new run.")
        if run.checkpoint:
            load_training_state(run, model, optimizer)
        try_to_write(run, model, pretrained)  # what cannot be written shows now, not after the last step
        run.start(data, keep=[REFERENCE] if reference else [])
        if run.first and reference:
            write_reference(args.output_dir, *reference)
        options = args.measure_memory, run.counted_step, offload, [reference_model], args.offload_param
        meter = MemoryMeter(model, optimizer, run.device, *options)

        for numbers, batches in pairs.remaining_steps(run):
            with run.step(optimizer, partial(pairs.name, numbers)), meter.step(batches):
                counts, means = train_step(model, optimizer, batches, args, run, offload, reference_model)
            run.progress["updates"] += 1
            metrics = {
                "epoch": pairs.advance(run.progress, numbers),
                **means,
                "num_tokens": counts["num_tokens"],
                "num_scored_tokens": counts["num_scored_tokens"],
            }
            if eval_pairs and (run.due(args.eval_steps) or not run.unfinished):
                metrics |= evaluate(model, reference_model, eval_pairs, args, run)
            real_tokens = int(pairs.num_tokens[numbers].sum())
            run.log(
                metrics,
                padding=counts["padding"],
                real_tokens=real_tokens,
                counts=not meter.counting,
                peak_bytes=meter.peak_bytes(),
            )
            if run.save_when_due(lambda folder: save_training_state(folder, run, model, optimizer)):
                return {"stopped_at_step": run.progress["step"]}

        save_model(run, model, pretrained)
        totals = run.totals
        data["padding_fraction"] = totals["padding"] / max(totals["num_tokens"], 1)
        data["computed_fraction"] = totals["num_tokens"] / max(totals["real_tokens"], 1)
        return run.finish(data, meter.ledger(), offload and offload.report())


# --- 7. Memory before the GPU ---


def pretend_batch(args):
    """A batch of pairs that computes as many tokens as the flags allow.

    That is: completions as long as they may be, and the prompt what --max_length leaves of them. The prompts
    differ from their first token on: nothing of them is shared.
    """
    prompt, completion, cost = largest_pair(args)
    size, budget = args.per_device_train_batch_size or 4, args.max_tokens_per_batch
    lengths = [completion] * (size if budget is None else budget // cost)
    rest = 0 if budget is None else (budget % cost - (cost - 2 * completion)) // 2
    lengths += [rest] if rest >= 1 and args.padding_free else []
    pairs = [
        {name: [i] * count for name, count in zip(TOKENS, (prompt, tokens, prompt, tokens))}
        for i, tokens in enumerate(lengths)
    ]
    batch = collate(pairs, args)
    if not args.padding_free:
        batch["attention_mask"][0, -1] = 0  # one token of padding, so that there is a mask
    return batch | {"ref_logps": torch.zeros(2 * len(pairs))}


def pretend_step(args, pretrained):
    """The bytes that one optimizer step holds on a rank, with as many tokens as the flags allow: {name:
    bytes}, and when the peak is.
    """
    # later micro-batches hold what the second does
    batches = [pretend_batch(args)] * (2 if args.gradient_accumulation_steps > 1 or args.offload_param else 1)
    with pretend(args, is_sharded(args, args.dry_run_world_size)) as run:
        model = load_model(args, run, pretrained)
        set_kernels(model, args, args.padding_free, pretends=True)
        reference_model = load_reference_model(args, run, pretrained)
        optimizer, offload = prepare_training(model, args, run)
        step = partial(train_step, model, optimizer, batches, args, run, offload, reference_model)
        others = [reference_model]
        return count_step(step, batches, model, optimizer, offload, others, args.offload_param)


def explore(args):
    """Count the bytes of one step; say whether it fits, what would help, and the longest pairs that fit."""
    pretrained = read_pretrained(args.model_name_or_path, args.max_length, dropout=False, config_only=True)
    size = 1 if args.max_tokens_per_batch else args.per_device_train_batch_size or 4
    switches = ("bf16", "padding_free", "share_prompt", "precompute_ref_log_probs", "gradient_checkpointing")
    changes, others = single_changes(args, switches, size, ["max_length", "max_tokens_per_batch"])
    most = max_positions(pretrained.config)[0] or args.max_length
    if args.max_tokens_per_batch:  # which has to hold a pair

        def cost(length):
            return largest_pair(replace(args, max_length=length))[2]

        most = bisect_right(range(most + 1), args.max_tokens_per_batch, lo=2, key=cost) - 1
    batch = pretend_batch(args)
    return dry_run(
        DryRun(args, check_arguments, partial(pretend_step, pretrained=pretrained)),
        changes,
        others,
        what=f"{len(batch['ref_logps'])} completions of pairs, in all {batch['input_ids'].numel()} tokens,",
        host_flags=["--offload_param"],
        length_flag="max_length",
        most=most,
    )


if __name__ == "__main__":
    run_script(main, Arguments)
