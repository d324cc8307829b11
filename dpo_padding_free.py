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
import itertools
import json
import math
import os
import signal
import sys
import time
import warnings
from bisect import bisect_right
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from datasets import Features, List, Value
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import get_scheduler
from transformers.utils import is_flash_attn_2_available

from common.attention import check_isolation, refusals_of, register_varlen_attention
from common.checkpoints import (
    check_output_dir,
    commit_files,
    commit_folder,
    disk_errors_refused,
    find_checkpoint,
    fresh_folder,
    prepare_output_dir,
    read_training_state,
    rotate_checkpoints,
    write_training_state,
)
from common.collators import IGNORE, flatten, flatten_shared_prompt, pad
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
    source_hash,
    template_kwargs,
    unused_columns,
    without_nulls,
)
from common.dry_run import explore, pretend
from common.flags import Refusal, check_dry_run, flag, refuse, run_script, together
from common.liger import apply_liger_kernels, check_liger
from common.logps import check_head, head_computes, token_logps, two_chunks_only
from common.memory import (
    MemoryMeter,
    format_ledger,
    format_traffic,
    measure_bandwidth,
    memory_ledger,
    predict_ledger,
    traffic,
)
from common.offload import MIN_BYTES, OffloadActivations, keep_on_device
from common.pretrained import (
    assert_loaded,
    empty_model,
    load_config,
    load_whole,
    max_positions,
    read_pretrained,
    saved_shapes,
    try_to_write,
    write_pretrained,
)
from common.reference import REFERENCE, model_fingerprint, read_reference, write_reference
from common.report import (
    describe_dry_run,
    describe_pairs,
    describe_speed,
    describe_start,
    ledger_title,
    summarize,
    write_metrics,
)
from common.trained import check_frozen, checkpoint_layers, parameter_groups, trained
from common.truncation import TRUNCATION_MODES, check_limit, truncate_pair

HERE = Path(__file__).resolve().parent
DROPOUT = False  # whether the model's own is on in training
# of a pair, once cut: keep_end may leave the two sequences different ends of one prompt
TOKENS = ("chosen_prompt_ids", "chosen_ids", "rejected_prompt_ids", "rejected_ids")
COUNTED = (
    "prompts_truncated",
    "prompts_parted",
    "completions_truncated",
    "completions_without_eos",
    "boundaries_moved",
    "tokens_cut",
)


# --- 1. Arguments ---


Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]


@dataclass
class Arguments:
    model_name_or_path: str = flag(str(HERE / "demo/model"), "Hub name or folder of a causal language model")
    attn_implementation: str | None = flag(None, "default: varlen for flat rows, sdpa for padded ones")
    dataset_name: str = flag(
        str(HERE / "demo/preferences.jsonl"), "Hub name, file, or folder by save_to_disk"
    )
    dataset_train_split: str = flag("train", "split of a Hub dataset to train on")
    eval_dataset_name: str | None = flag(None, "dataset for evaluation, named like dataset_name")
    dataset_test_split: str = flag("test", "split of a Hub dataset to evaluate on")
    dataset_num_proc: int | None = flag(None, "processes that tokenise")
    output_dir: str = flag("outputs/dpo", "folder for model, checkpoints, metrics.jsonl and summary.json")
    overwrite_output_dir: bool = flag(False, "replace the run that output_dir holds")

    max_prompt_length: int | None = flag(None, "tokens of a prompt, whose end is kept; applied first")
    max_completion_length: int | None = flag(None, "tokens of a completion, whose start is kept; second")
    max_length: int = flag(1024, "tokens of prompt and completion together; applied last")
    truncation_mode: str = flag("keep_start", "what max_length keeps: keep_start or keep_end")
    padding_free: bool = flag(True, "whether to join the batch's sequences into one flat row")
    share_prompt: bool = flag(True, "whether to compute a pair's prompt once for both completions")
    share_prefix: bool = flag(
        False, "with share_prompt: share the tokens that the completions begin with, too"
    )
    per_device_train_batch_size: int | None = flag(None, "pairs per forward and rank; 4 if not given")
    max_tokens_per_batch: int | None = flag(
        None, "instead: as many pairs per forward as compute these tokens"
    )
    gradient_accumulation_steps: int = flag(1, "forwards and backwards per optimizer step")

    beta: float = flag(0.1, "how dearly leaving the reference is paid for; for ipo, its tau")
    loss_type: str = flag("sigmoid", "sigmoid (DPO), ipo, hinge")
    label_smoothing: float = flag(0.0, "sigmoid: the share of pairs taken to be labelled the wrong way round")
    precompute_ref_log_probs: bool = flag(
        True, "whether to compute the reference once, and not keep its weights"
    )

    learning_rate: float = flag(1e-6, "peak of the schedule")
    lr_scheduler_type: Schedule = flag("linear", "how the learning rate decays")
    warmup_steps: int = flag(0, "steps of linear warm-up")
    weight_decay: float = flag(0.0, "AdamW's, of matrices: norms and biases do not decay")
    max_grad_norm: float = flag(1.0, "clip the global gradient norm to this; 0 = no clipping")
    num_train_epochs: float = flag(1.0, "passes over the data")
    max_steps: int = flag(-1, "optimizer steps, overriding num_train_epochs; -1 = off")
    gradient_checkpointing: bool = flag(
        True, "whether to keep layers' inputs only and compute the rest again"
    )
    activation_offloading: bool = flag(False, "activations wait for backward in the host's memory")
    use_liger_kernel: bool = flag(False, "Liger's rotary embedding, norms and gated MLP, in Triton on a GPU")
    bf16: bool = flag(False, "compute in bfloat16; weights, gradients and optimizer states stay in fp32")
    loss_chunk_size: int = flag(256, "tokens per chunk of the loss head")
    seed: int = flag(0, "order of the data")

    eval_steps: int | None = flag(None, "evaluate every so many steps as well as at the end")
    logging_steps: int = flag(1, "refresh the progress bar every so many steps; metrics.jsonl has each step")
    save_steps: int | None = flag(None, "write a checkpoint every so many steps; None = only on SIGTERM")
    save_total_limit: int | None = flag(None, "keep this many newest checkpoints; None = all")
    resume_from_checkpoint: str | None = flag(None, "a folder checkpoint-<step>, or 'latest' in output_dir")
    check_isolation: bool = flag(True, "whether to prove on the first pairs that batching is exact")
    measure_memory: bool = flag(False, "without CUDA: count every byte of one (slower) step, for the ledger")
    dry_run: bool = flag(False, "do not train: from the model's configuration, count the bytes of one step")
    dry_run_world_size: int = flag(1, "with --dry_run: the number of ranks to count for")
    gpu_memory_gib: float | None = flag(None, "with --dry_run: say what fits into so many GiB")


def check_arguments(args):
    """Raise ValueError for values and combinations that would be wrong or ignored."""
    for name in ("max_length", "gradient_accumulation_steps", "loss_chunk_size", "logging_steps"):
        check_limit(f"--{name}", getattr(args, name) or 0)
    optional = ("per_device_train_batch_size", "max_tokens_per_batch", "max_prompt_length")
    optional += ("max_completion_length", "eval_steps", "save_steps", "save_total_limit", "dataset_num_proc")
    for name in optional:
        check_limit(f"--{name}", getattr(args, name))
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
        if not 0 <= getattr(args, name) < math.inf:
            raise Refusal(f"--{name} is {getattr(args, name)}; it must be a finite number >= 0.")
    steps, epochs, attention = args.max_steps, args.num_train_epochs, args.attn_implementation
    refuse(steps < 1 and steps != -1, f"--max_steps {steps}: give a number >= 1, or -1 for num_train_epochs.")
    ignored = args.warmup_steps and args.lr_scheduler_type == "constant"
    refuse(ignored, f"--warmup_steps {args.warmup_steps} needs --lr_scheduler_type constant_with_warmup.")
    refuse(args.seed < 0, f"--seed {args.seed}: give a number >= 0.")
    refuse(not 0 < epochs < math.inf, f"--num_train_epochs {epochs}: it must be a finite number above 0.")
    never = "a sequence's first token is never predicted"
    refuse(args.max_length < 2, f"--max_length 1: {never}; give at least 2.")
    mode, modes = args.truncation_mode, ", ".join(TRUNCATION_MODES)
    refuse(mode not in TRUNCATION_MODES, f"--truncation_mode {mode}: choose one of {modes}.")
    for name in ("max_prompt_length", "max_completion_length"):
        limit = getattr(args, name) or 0
        no_room = f"--{name} {limit} leaves no room for the rest within --max_length {args.max_length}: "
        refuse(limit >= args.max_length, no_room + "lower the first or raise the second.")
    check_loss(args.beta, args.loss_type, args.label_smoothing)
    both = args.max_tokens_per_batch and args.per_device_train_batch_size
    refuse(both, "--max_tokens_per_batch and --per_device_train_batch_size both size a batch: drop one.")
    shares = shares_prompts(args)
    refuse(args.share_prefix and not shares, "--share_prefix needs shared prompts, which this run turns off.")
    ignores = f"--attn_implementation {attention} ignores kv_index, which shared prompts are made of: "
    refuse(shares and attention not in (None, "varlen"), ignores + "add --no_share_prompt, or drop it.")
    masked = not args.padding_free and attention == "varlen"
    refuse(masked, "--attn_implementation varlen is for flat rows: drop --no_padding_free, or choose sdpa.")
    fp32_flash = attention == "flash_attention_2" and not args.bf16
    refuse(fp32_flash, "--attn_implementation flash_attention_2 rejects fp32: add --bf16.")
    refuse(args.eval_steps and not args.eval_dataset_name, "--eval_steps needs --eval_dataset_name.")
    twice = args.measure_memory and torch.cuda.is_available()
    refuse(twice, "--measure_memory is for CPUs: on CUDA every step is measured, drop it.")
    check_dry_run(args)
    cost, budget = largest_pair(args)[2], args.max_tokens_per_batch
    small = args.dry_run and budget is not None and cost > budget
    refuse(
        small,
        f"--dry_run: a pair may take {cost} tokens, over --max_tokens_per_batch {budget}: "
        "raise it, or lower --max_length.",
    )


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
            if messages[-1]["role"] != "assistant":
                raise Refusal(f"{name} ends with a message of role {messages[-1]['role']}: no answer.")
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


def check_columns(rows, name, tokenizer, args):
    """Raise ValueError for columns and templates that do not go together."""
    columns, first = rows.column_names, rows[0]
    if not {"chosen", "rejected"} <= set(columns):
        wanted = "chosen and rejected, and prompt unless they begin with it"
        raise Refusal(f"{name} has the columns {', '.join(columns)}; wanted: {wanted}.")
    if isinstance(first["chosen"], list):
        check_chat_template(tokenizer, name, args.model_name_or_path)


def load_examples(name, split, tokenizer, args, end_ids=()):
    """Tokenised pairs, cut to the limits; none without a difference, none with a completion of no scored
    token.

    Returns: a datasets.Dataset with the columns TOKENS, example, the lengths (chosen_length, rejected_length
             of whole sequences; shared_length, prefix_length: the prompt, if both have it, and the tokens
             that the completions begin with); and the counts for summary.json.
    """
    rows = load_rows(name, split)
    check_columns(rows, name, tokenizer, args)
    # the cache's key is a hash of all that the function refers to: not of args, then
    limits = {
        "max_prompt_length": args.max_prompt_length,
        "max_completion_length": args.max_completion_length,
        "max_length": args.max_length,
        "truncation_mode": args.truncation_mode,
    }

    def encode(example, index):
        try:
            prompt_ids, chosen_ids, rejected_ids, moved = tokenize(example, tokenizer, end_ids)
        except Refusal as error:  # a null, a number, a role that the template refuses: say in which example
            raise Refusal(f"{name}, example {index}: {error}") from error
        marks = {
            "boundaries_moved": moved,
            "promptless": set(prompt_ids) <= {tokenizer.bos_token_id},
            "repeats": repeats_prompt(example.get("prompt"), example["chosen"], example["rejected"]),
        }
        return {"example": index, **marks, **cut_pair(prompt_ids, chosen_ids, rejected_ids, limits)}

    # datasets would guess types from the first 1,000 rows: of prompts that are all empty, none
    ids, number, mark = List(Value("int64")), Value("int64"), Value("bool")
    first = encode(rows[0], 0).items()
    kinds = {n: ids if n in TOKENS else mark if isinstance(value, bool) else number for n, value in first}
    examples = map_rows(
        rows,
        encode,
        source_hash(__file__),
        features=Features(kinds),
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=args.dataset_num_proc,
        desc=f"Tokenising {name}",
    )
    counts = {n: np.array(examples[n]) for n in examples.column_names if n not in TOKENS}
    check_repeats(name, counts["repeats"].tolist())
    unused = unused_columns(rows, ("prompt", "chosen", "rejected"))
    if "prompt" not in rows.column_names and counts["promptless"].mean() > 0.5:
        raise Refusal(
            f"{name} has no column prompt, and chosen and rejected of {counts['promptless'].sum()} of its "
            f"{len(examples)} pairs have no beginning in common that could be one. Rename the column that "
            f"holds it to prompt; the other columns: {', '.join(unused) or 'none'}."
        )
    used = ~(counts["equal"] | counts["unscored"])
    data = {
        "examples_read": len(examples),
        "examples_used": int(used.sum()),
        "examples_equal": int((counts["equal"] & ~counts["unscored"]).sum()),
        "examples_unscored": int(counts["unscored"].sum()),
        "examples_truncated": int((counts["tokens_cut"] > 0)[used].sum()),
        **{name: int(counts[name][used].sum()) for name in COUNTED},
        "tokens_kept": int((counts["chosen_length"] + counts["rejected_length"])[used].sum()),
        "columns_unused": unused,
    }
    if not used.any():
        raise Refusal(
            f"{name} has no pair whose completions differ and have a scored token within max_length "
            f"{args.max_length}: {data}."
        )
    return examples.select(np.flatnonzero(used)), data


def cut_pair(prompt_ids, chosen_ids, rejected_ids, limits):
    """Apply the limits to both sequences of a pair, and say what that did to them."""
    sequences = [truncate_pair(prompt_ids, ids, **limits) for ids in (chosen_ids, rejected_ids)]
    (chosen_prompt, chosen), (rejected_prompt, rejected) = sequences
    same = chosen_prompt == rejected_prompt
    # short of the whole of either completion, one of which may be the other's beginning
    prefix = min(shared_prefix_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    kept = sum(len(prompt) + len(completion) for prompt, completion in sequences)
    return {
        **dict(zip(TOKENS, (chosen_prompt, chosen, rejected_prompt, rejected))),
        "chosen_length": len(chosen_prompt) + len(chosen),
        "rejected_length": len(rejected_prompt) + len(rejected),
        "shared_length": len(chosen_prompt) if same else 0,
        "prefix_length": max(0, prefix) if same else 0,
        "equal": same and chosen == rejected,
        # a sequence's first token is never predicted
        "unscored": any(len(completion) + bool(prompt) < 2 for prompt, completion in sequences),
        "prompts_truncated": any(len(prompt) < len(prompt_ids) for prompt, _ in sequences),
        "prompts_parted": not same,  # not shared, then
        "completions_truncated": (len(chosen) < len(chosen_ids)) + (len(rejected) < len(rejected_ids)),
        "completions_without_eos": (chosen[-1:] != chosen_ids[-1:]) + (rejected[-1:] != rejected_ids[-1:]),
        "tokens_cut": 2 * len(prompt_ids) + len(chosen_ids) + len(rejected_ids) - kept,
    }


# --- 3. The technique ---


def share_prompts(pairs, share_prefix):
    """One flat row in which each pair's prompt stands once: [prompt, chosen, rejected, prompt, ..].

    Args:    pairs: dicts with the columns of load_examples.
             share_prefix: the tokens that both completions begin with move to the shared part as well.
    Returns: the keys of flatten_shared_prompt; scores in the order chosen, rejected, chosen, ..
    """
    groups, prefixes = [], []  # prefixes: of each sequence, the scored tokens that lie in its shared part
    for pair in pairs:
        prompt, other = pair["chosen_prompt_ids"], pair["rejected_prompt_ids"]
        chosen, rejected = pair["chosen_ids"], pair["rejected_ids"]
        prefix = pair["prefix_length"] if share_prefix else 0
        shared = prompt + chosen[:prefix]
        if prompt == other and shared:
            groups.append((shared, [chosen[prefix:], rejected[prefix:]]))
            prefixes += [shared[max(len(prompt), 1) :]] * 2  # a sequence's first token is never predicted
        else:  # keep_end left two different prompts, or none: nothing to share
            for own_prompt, completion in ((prompt, chosen), (other, rejected)):
                first = own_prompt or completion[:1]
                groups.append((first, [(own_prompt + completion)[len(first) :]]))
            prefixes += [[], []]
    row = flatten_shared_prompt(groups)
    if share_prefix:  # a token of the shared prefix has the same log-probability in both: scored for each
        lengths = row["completion_lengths"].tolist()
        index, ids = [], []
        for places, tokens, prefix in zip(
            row["score_index"].split(lengths), row["score_ids"].split(lengths), prefixes
        ):
            last = places[0]  # of the shared part: what predicts the first token after it
            index += [torch.arange(last - len(prefix), last), places]
            ids += [torch.tensor(prefix, dtype=torch.int64), tokens]
        row["score_index"], row["score_ids"] = torch.cat(index), torch.cat(ids)
        row["completion_lengths"] = row["completion_lengths"] + torch.tensor([len(p) for p in prefixes])
    return row


def collate(pairs, args, pad_token_id):
    """Pairs -> a batch: shared prompts, padding-free or padded. No pairs: two unscored tokens, no sequence.

    Returns: what the model takes, and score_index (M,) int64: which flattened position predicts the m-th
             scored token; score_ids (M,): that token; completion_lengths (2 B,): how many each sequence has,
             in the order chosen, rejected, chosen, ..
    """
    if pairs and shares_prompts(args):
        return share_prompts(pairs, args.share_prefix)
    sequences = []
    for pair in pairs:
        for prompt, completion in (TOKENS[:2], TOKENS[2:]):
            labels = [IGNORE] * len(pair[prompt]) + pair[completion]
            sequences.append({"input_ids": pair[prompt] + pair[completion], "labels": labels})
    if not pairs:
        sequences = [{"input_ids": [0, 0], "labels": [IGNORE, IGNORE]}]
    batch = flatten(sequences) if args.padding_free else pad(sequences, pad_token_id)
    # position t predicts the label at t + 1; collators have set each sequence's first label to -100
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
    batch["score_index"] = (targets != IGNORE).nonzero()[:, 0]
    batch["score_ids"] = targets[batch["score_index"]]
    lengths = [sum(label != IGNORE for label in s["labels"][1:]) for s in sequences] if pairs else []
    batch["completion_lengths"] = torch.tensor(lengths, dtype=torch.int64)
    return batch


class Pairs:
    """Tokenised pairs: their order, their cost, and batches of them."""

    def __init__(self, examples, args, name):
        columns = ("chosen_length", "rejected_length", "shared_length", "prefix_length")
        chosen, rejected, shared, prefix = (np.array(examples[column]) for column in columns)
        self.num_tokens = chosen + rejected  # of both sequences, a shared prompt counted twice
        self.costs = self.num_tokens  # tokens computed for the pair alone
        if shares_prompts(args):
            self.costs = self.costs - shared - (prefix if args.share_prefix else 0)
        elif not args.padding_free:
            self.costs = 2 * np.maximum(chosen, rejected)
        self.shares = (shared > 0) + (prefix > 0).astype(int)  # of prompt and prefix, how many both have
        self.examples, self.args = examples, args
        # (E, 2) float32: the reference's log-probabilities of chosen and rejected; NaN: not computed
        self.reference = None
        largest, budget = int(self.costs.argmax()), args.max_tokens_per_batch
        if budget is not None and self.costs[largest] > budget:
            raise Refusal(
                f"{name}, example {examples[largest]['example']} takes {self.costs[largest]} tokens, over "
                f"--max_tokens_per_batch {budget}: raise it, or lower --max_length."
            )

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

    def order(self, epoch):
        """The epoch's shuffle: a function of seed and epoch, so that a checkpoint need not store it."""
        return np.random.default_rng([self.args.seed, epoch]).permutation(len(self))

    def cut(self, numbers):
        """Cut pair numbers, in their order, into micro-batches: of so many pairs, or of so many tokens."""
        size, budget = self.args.per_device_train_batch_size or 4, self.args.max_tokens_per_batch
        if budget is None:
            yield from (numbers[i : i + size] for i in range(0, len(numbers), size))
            return
        start, tokens, longest = 0, 0, 0
        for stop, cost in enumerate(self.costs[numbers].tolist()):
            tokens, longest = tokens + cost, max(longest, cost)
            if (tokens if self.args.padding_free else longest * (stop + 1 - start)) > budget:
                yield numbers[start:stop]
                start, tokens, longest = stop, cost, cost
        if len(numbers):
            yield numbers[start:]

    def steps(self, epoch, pairs_done, world):
        """What is left of an epoch, one optimizer step after another: lists of micro-batches, of all ranks.

        A micro-batch's end depends on the pairs since the last one's end alone, and so a resumed run cuts as
        the first one did.
        """
        chunks = self.cut(self.order(epoch)[pairs_done:])
        while step := list(itertools.islice(chunks, self.args.gradient_accumulation_steps * world)):
            yield step

    def reference_chunks(self, progress, total_steps, world):
        """The micro-batches in which the reference is computed for the steps from `progress` to total_steps.

        In bf16 a pair's log-probability depends on what else is in its row. So these are training's own of
        the first epoch: there, a policy that has not moved has the reference's numbers to the last bit. Later
        epochs put the pairs into other rows, and to their margins that adds the noise of bf16.
        """
        visited = np.zeros(len(self), dtype=bool)
        epoch, done, steps_left = progress["epoch"], progress["pairs_done"], total_steps - progress["step"]
        while steps_left > 0 and not visited.all():
            for step in itertools.islice(self.steps(epoch, done, world), steps_left):
                visited[np.concatenate(step)] = True
                steps_left -= 1
            epoch, done = epoch + 1, 0
        order, done = self.order(0), progress["pairs_done"] if progress["epoch"] == 0 else 0
        chunks = *self.cut(order[done:]), *self.cut(order[:done])
        return [chunk for chunk in chunks if visited[chunk].any()]

    def batch(self, numbers, pad_token_id):
        """The batch of these pairs, with the reference's log-probabilities where they are known."""
        rows = self.examples[numbers] if len(numbers) else {}
        pairs = [dict(zip(rows, values)) for values in zip(*rows.values())]
        batch = collate(pairs, self.args, pad_token_id)
        if self.reference is not None:
            batch["ref_logps"] = self.reference[numbers].flatten()
        return batch

    def micro_batches(self, chunks, rank, world, pad_token_id):
        """Deal micro-batches out: rank r takes every world-th, and all ranks equally many."""
        # Ranks must run equally many forwards, or collectives stall: some get a batch without a pair.
        chunks = list(chunks)
        chunks += [np.array([], dtype=np.int64)] * (-len(chunks) % world)
        for chunk in chunks[rank::world]:
            yield self.batch(chunk, pad_token_id)


@torch.no_grad()
def check_batching(model, pairs, args, device, max_tokens=64):
    """Prove on two pairs that this model gives in a flat row what it gives each sequence alone.

    Looks at pairs that share something, if there are any, and of each at the prompt's last and the
    completions' first max_tokens tokens.

    Raises: ValueError if a log-probability is off by more than 1e-4 (fp32) or 5e-2 (bf16) of the largest.
    """
    # a pair without a common prompt would prove nothing about sharing
    first = [pairs.examples[i] for i in np.argsort(-pairs.shares, kind="stable")[:2].tolist()]
    for pair in first:
        for name in TOKENS:
            pair[name] = pair[name][-max_tokens:] if "prompt" in name else pair[name][:max_tokens]
        shortest = min(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        pair["prefix_length"] = min(pair["prefix_length"], shortest - 1)
    training, implementation = model.training, model.config._attn_implementation
    model.eval()
    try:
        with refusals_of(model, "Use --no_padding_free for this model."):
            found = per_token_logps(model, to_device(collate(first, args, 0), device), args.loss_chunk_size)
        # Alone as transformers itself computes it: a mask, a state or a convolution that crosses from one
        # sequence into another, or from chosen into rejected, shows here.
        model.set_attn_implementation("sdpa" if model._supports_sdpa else implementation)
        padded = collate(first, replace(args, padding_free=False), 0)
        alone = per_token_logps(model, to_device(padded, device), args.loss_chunk_size)
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
    worst = (found - alone).abs().max().item()
    tolerance = (5e-2 if args.bf16 else 1e-4) * alone.abs().max().clamp(min=1.0).item()
    if not worst <= tolerance:  # written so that NaN fails too
        way, remedy = "a flat row", "--no_padding_free"
        if shares_prompts(args):
            way, remedy = "a row of shared prompts", "--no_share_prompt or --no_padding_free"
        raise Refusal(
            f"{type(model).__name__} mixes the sequences of {way}: log-probabilities differ by {worst:.3g} "
            f"between batched and alone, tolerance {tolerance:.3g}. Use {remedy} for this model."
        )


# --- 4. Loss ---


LOSSES = ("sigmoid", "ipo", "hinge")
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
METRICS = ("loss", *REWARDS, "logps/chosen", "logps/rejected")


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
    Source:  sigmoid: arXiv 2305.18290, equation 7; smoothed: E. Mitchell, "A note on DPO with noisy
             preferences" (cDPO), 2023; ipo: arXiv 2310.12036, equation 17; hinge: arXiv 2305.10425 (SLiC-HF).

    >>> losses, *rewards = dpo_loss(*torch.tensor([[-10.0], [-30.0], [-12.0], [-26.0]]), beta=0.1)
    >>> round(losses.item(), 4), [round(reward.item(), 4) for reward in rewards]
    (0.4375, [0.2, -0.4])
    """
    check_loss(beta, loss_type, label_smoothing)
    chosen_logratios = policy_chosen_logps - ref_chosen_logps  # log pi(y_w|x) / pi_ref(y_w|x)
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    logits = beta * (chosen_logratios - rejected_logratios)
    if loss_type == "sigmoid":
        # -(1 - eps) log sigmoid(h) - eps log sigmoid(-h)
        losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    elif loss_type == "hinge":
        losses = torch.relu(1 - logits)  # max(0, 1 - h)
    elif loss_type == "ipo":
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError("loss_type ipo divides by lengths: give chosen_lengths and rejected_lengths.")
        # (h - 1 / (2 tau))^2, h of means per token: of sums, the long answers alone would decide. Each
        # sequence divides by its own scored tokens, never by the batch's.
        h = chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"loss_type {loss_type} has no formula here: write one.")
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def per_token_logps(model, batch, chunk_size):
    """Log-probabilities of the batch's score_ids, (M,) float32; no logits are kept, none of prompts made."""

    def head(hidden, weight, bias):
        hidden = hidden.flatten(0, 1).index_select(0, batch["score_index"])
        with keep_on_device():  # backward begins here: what this saves would come straight back
            return token_logps(hidden, weight, batch["score_ids"], bias=bias, chunk_size=chunk_size)

    not_inputs = ("labels", "score_index", "score_ids", "completion_lengths", "ref_logps")
    inputs = {name: value for name, value in batch.items() if name not in not_inputs}
    with head_computes(model, head):
        # With a cache or a mask, transformers ignores that position_ids restart: sequences mix.
        return model(**inputs, use_cache=False).logits


def sequence_logps(model, batch, chunk_size):
    """Log-probabilities of whole completions, (2 B,) float32: chosen, rejected, chosen, .."""
    logps, lengths = per_token_logps(model, batch, chunk_size), batch["completion_lengths"]
    sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(
        lengths, output_size=len(logps)
    )
    return logps.new_zeros(len(lengths)).index_add(0, sequence, logps)


def batch_loss(model, reference_model, batch, args):
    """Sum of the batch's losses, () with gradient; sums over its pairs of what METRICS names, (7,)."""
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
    per_pair = (losses, chosen_rewards, rejected_rewards, margins > 0, margins, *logps)
    return losses.sum(), torch.stack([values.detach().double().sum() for values in per_pair])


def count(batch):
    """Pairs, scored tokens, tokens computed, and padding among them."""
    lengths = batch["completion_lengths"]
    padding = (batch["attention_mask"] == 0).sum().item() if "attention_mask" in batch else 0
    return len(lengths) // 2, lengths.sum().item(), batch["input_ids"].numel(), padding


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


@torch.no_grad()
def evaluate(model, reference_model, pairs, args, rank, world, device, pad_token_id):
    """Means over all pairs and ranks of what METRICS names, each with the prefix eval_."""
    model.eval()
    sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
    for batch in pairs.micro_batches(pairs.cut(np.arange(len(pairs))), rank, world, pad_token_id):
        sums += batch_loss(model, reference_model, to_device(batch, device), args)[1]
    model.train()
    means = [total / len(pairs) for total in all_sum(sums.tolist(), device)]
    if not math.isfinite(means[0]):
        raise FloatingPointError(f"the evaluation's loss is {means[0]}.")
    return {f"eval_{name}": mean for name, mean in zip(METRICS, means)}


@torch.no_grad()
def compute_reference(model, pairs, args, rank, world, device, pad_token_id, chunks=None):
    """Log-probabilities of chosen and rejected, (E, 2) float32, the same on all ranks.

    Args: chunks: arrays of pair numbers, each a micro-batch; the other pairs' are NaN. None = all, in order.
    """
    training = model.training
    model.eval()
    reference = torch.zeros(len(pairs), 2, device=device)
    chunks = list(pairs.cut(np.arange(len(pairs)))) if chunks is None else chunks
    mine = chunks[rank::world]
    batches = pairs.micro_batches(chunks, rank, world, pad_token_id)
    for i, batch in enumerate(tqdm(batches, "Reference", -(-len(chunks) // world), False, disable=rank != 0)):
        logps = sequence_logps(model, to_device(batch, device), args.loss_chunk_size)
        if i < len(mine):
            reference[torch.from_numpy(mine[i]).to(device)] = logps.view(-1, 2)
    model.train(training)
    if dist.is_initialized():
        dist.all_reduce(reference)  # each pair was computed on one rank, and is 0 on the others
    broken = (~reference.isfinite()).any(1).nonzero()[:, 0].tolist()
    if broken:
        example = pairs.examples[broken[0]]["example"]
        raise FloatingPointError(f"the reference's log-probabilities of example {example} are not finite.")
    left_out = torch.ones(len(pairs), dtype=torch.bool)
    left_out[np.concatenate(chunks)] = False
    return reference.cpu().masked_fill_(left_out[:, None], math.nan)


def prepare_reference(model, pairs, chunks, eval_pairs, args, rank, world, device, pad_token_id):
    """Give pairs their reference: what an earlier start of this run kept in output_dir, or computed now.

    Args:    chunks: micro-batches of those pairs that training will visit; of eval_pairs, all are prepared.
    Returns: what write_reference takes.
    Raises:  ValueError if output_dir holds that of another model, data, limits or precision.
    """
    sets = {"data": (pairs, chunks)}
    if eval_pairs:  # as `evaluate` cuts them
        sets["evaluation data"] = eval_pairs, eval_pairs.cut(np.arange(len(eval_pairs)))
    precision = ("bf16" if args.bf16 else "fp32") + (" Liger" if args.use_liger_kernel else "")
    fingerprint = {"model": model_fingerprint(model), "precision": precision}
    fingerprint |= {name: some.fingerprint() for name, (some, _) in sets.items()}
    tensors = {} if args.overwrite_output_dir else read_reference(args.output_dir, fingerprint)
    for name, (some, chunks) in sets.items():
        known = tensors.get(name, torch.full((len(some), 2), math.nan))
        missing = known.isnan().any(1).to(device, torch.uint8)
        if dist.is_initialized():
            # computing is a collective: what one rank lacks (its file is its own machine's), all compute
            dist.all_reduce(missing, dist.ReduceOp.MAX)
        missing = missing.cpu().bool()
        chunks = [chunk for chunk in chunks if missing[chunk].any()]
        if chunks:
            computed = compute_reference(model, some, args, rank, world, device, pad_token_id, chunks)
            known = torch.where(missing[:, None], computed, known)
        some.reference = tensors[name] = known
    return {"tensors": {name: tensors[name] for name in sets}, "fingerprint": fingerprint}


# --- 5. Training ---


def start_distributed(args):
    """Returns rank, local rank, world size and device.

    FSDP2 wants a process group: torchrun describes it in the environment; a bf16 run on one process makes
    its own.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if (world > 1 or args.bf16) and not dist.is_initialized():
        alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        backend = "nccl" if device.type == "cuda" else "gloo"
        # long, for the other ranks wait while the first one tokenises; finite, for a lost rank
        dist.init_process_group(backend, timeout=timedelta(hours=1), **alone)
    return int(os.environ.get("RANK", 0)), local_rank, world, device


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_sum(values, device):
    """Sum each of a list of numbers over all ranks, in float64."""
    if not dist.is_initialized():
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def load_model(args, device, attn_implementation, pretrained=None):
    """The model in fp32, sharded by FSDP2 if there are several ranks or if it computes in bf16.

    pretrained: what was read of the name before; None = read it now.
    """
    register_varlen_attention()
    options = {"dtype": torch.float32, "attn_implementation": attn_implementation}
    if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise Refusal(
            "--attn_implementation flash_attention_2: flash-attn is not installed, or there is no GPU."
        )
    pretrained = pretrained or read_pretrained(args.model_name_or_path, dropout=DROPOUT)
    whole = load_whole(pretrained, device, **options)
    if not dist.is_initialized():
        model = whole.to(device)
    else:
        # The first rank reads the weights and hands out the shards: no other ever holds the whole model.
        first = whole is not None
        with torch.device("meta"):
            model = empty_model(pretrained.model_config, **options)
        shard(model, init_device_mesh(device.type, (dist.get_world_size(),)), args.bf16)
        model.to_empty(device=device)
        spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, whole.state_dict() if first else {}, options=spread)
        # rotary frequencies and the like, which no state dict holds
        for name, buffer in model.named_buffers():
            if first:
                buffer.copy_(whole.get_buffer(name))
            dist.broadcast(buffer, src=0)
        assert_loaded(whole, {name: p.to_local() for name, p in model.named_parameters()}, device)
    return prepare_model(model, args)


def prepare_model(model, args):
    """What a real model and a dry run's have to share. The place to freeze what is not to be trained, with
    model.get_input_embeddings().requires_grad_(False), say.
    """
    if args.gradient_checkpointing:
        checkpoint_layers(model)
    return model.train()


def decoder_layers(model):
    """The model's repeated blocks, in order, before and after FSDP2 has given them a class of its own."""
    names = model._no_split_modules or ()
    return [m for m in model.modules() if type(m).__name__.removeprefix("FSDP") in names]


def shard(model, mesh, bf16):
    """FSDP2: each rank keeps a slice of the weights in fp32 and gathers a layer's while the layer runs.

    In bf16, a layer's weights are cast as they are gathered. So the hidden states are bf16 too; autocast
    would keep them, and with them the layers' inputs that wait for backward, in fp32.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for module in [*decoder_layers(model), model]:
        # True for the outermost as well: after a forward without backward (checks, evaluation) its weights
        # would stay gathered, and the optimizer and the checkpoints would take those for the shards.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def training_state(model, optimizer):
    """What a checkpoint holds of the tensors: name -> weight, exp_avg or exp_avg_sq, whole or sharded."""
    state = {}
    for name, parameter in model.named_parameters():  # a tied weight once
        if not parameter.requires_grad:  # the model that the run began with has it
            continue
        moments = optimizer.state[parameter]
        if not moments:  # before the first step: loading wants tensors to load into
            moments["step"] = torch.tensor(0.0, device=parameter.device if parameter.is_cuda else None)
            moments["exp_avg"] = torch.zeros_like(parameter)
            moments["exp_avg_sq"] = torch.zeros_like(parameter)
        state[f"weight.{name}"] = parameter.detach()
        state[f"exp_avg.{name}"] = moments["exp_avg"]
        state[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
    return state


def save_checkpoint(args, model, optimizer, progress, rank):
    """checkpoint-<step>/: weights and moments, the position in schedule and data, random states."""
    path = Path(args.output_dir) / f"checkpoint-{progress['step']}"
    temporary = path.with_suffix(".tmp")
    if rank == 0:
        fresh_folder(temporary)
    barrier()
    state = training_state(model, optimizer)
    write_training_state(temporary, state, progress, rank)
    barrier()
    if rank == 0:
        commit_folder(temporary, path)
        rotate_checkpoints(args.output_dir, args.save_total_limit)


def read_progress(path, fingerprint):
    """Where a checkpoint stands: step, epoch, rows done in it."""
    progress = json.loads((path / "progress.json").read_text())
    if progress["fingerprint"] != fingerprint:
        raise Refusal(
            f"{path} belongs to other data, limits or losses: use its dataset, max_length, loss and seed."
        )
    return progress


def load_checkpoint(path, model, optimizer, scheduler, progress, rank):
    """Restore weights, moments, learning rate and random states, on any number of ranks."""
    read_training_state(path, training_state(model, optimizer), rank)
    for moments in optimizer.state.values():
        moments["step"].fill_(progress["step"])
    scheduler.last_epoch = progress["step"] - 1  # the rate is a function of the step alone
    with warnings.catch_warnings():
        # torch takes a step of the schedule before the first one of the optimizer for a mistake
        warnings.simplefilter("ignore")
        scheduler.step()


def count_steps(args, pairs, world, progress):
    """Optimizer steps of the whole run, those that `progress` has done included.

    Counted from the pairs that are left: a run resumed with other ranks or batches trains each pair as often
    as before. Part of an epoch is rounded up to whole steps.
    """
    if args.max_steps > 0:
        return args.max_steps
    total, done = progress["step"], progress["pairs_done"]
    for epoch in range(progress["epoch"], math.ceil(args.num_train_epochs)):
        # 1e-9: 1.6 - 1 is 0.6000000000000001
        last = math.ceil(min(1, args.num_train_epochs - epoch) * len(pairs) - 1e-9)
        for step in pairs.steps(epoch, done, world):
            total += done < last
            done += sum(map(len, step))
        done = 0
    return total


def save_model(args, model, pretrained, rank):
    """The final model in Hugging Face format, each tensor in the dtype that it came in."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        weights = {name: weights[name] for name in saved_shapes(model)}
        temporary = fresh_folder(Path(args.output_dir) / "model.tmp")
        write_pretrained(temporary, pretrained, weights)
        commit_files(temporary, args.output_dir)
    barrier()


def prepare_data(args, tokenizer, vocab_size, end_ids=()):
    """Returns training pairs, evaluation pairs (None without --eval_dataset_name), and counts."""
    examples, data = load_examples(args.dataset_name, args.dataset_train_split, tokenizer, args, end_ids)
    check_token_ids(examples, vocab_size, args.dataset_name, TOKENS)
    pairs, eval_pairs = Pairs(examples, args, args.dataset_name), None
    if args.eval_dataset_name:
        name, split = args.eval_dataset_name, args.dataset_test_split
        examples, data["eval"] = load_examples(name, split, tokenizer, args, end_ids)
        check_token_ids(examples, vocab_size, name, TOKENS)
        eval_pairs = Pairs(examples, args, name)
    return pairs, eval_pairs, data


def clip_gradients(model, max_grad_norm):
    """Scale the gradients to a global norm of max_grad_norm at most (0 = any); returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def predict(args, model, batch, world):
    """The ledger's predicted side, for the batch that its measured side saw; {} where none is known."""
    attention = model.config._attn_implementation
    # Liger's kernels keep less than the formulas here count
    if batch is None or attention == "eager" or args.use_liger_kernel:
        return {}
    _, num_scored, num_tokens, num_padding = count(batch)
    num_parameters, num_masked = sum(p.numel() for p in model.parameters()), 0
    # where SDPA runs segment by segment (attention.py), a completion's takes a mask
    if "kv_index" in batch and (model.device.type == "cpu" or not args.bf16):
        lengths_q, lengths_k = batch["cu_seq_lens_q"].diff(), batch["cu_seq_lens_k"].diff()
        num_masked = int((lengths_q * lengths_k)[lengths_q != lengths_k].sum())
    return predict_ledger(
        model.config,
        num_tokens,
        num_scored,
        num_parameters=num_parameters,
        num_trained=sum(p.numel() for p in trained(model)),
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=args.bf16,
        chunk_size=args.loss_chunk_size,
        rows=len(batch["input_ids"]),
        masked=num_padding > 0 or "cu_seq_lens_q" in batch and attention == "sdpa",
        accumulates=args.gradient_accumulation_steps > 1,
        offload_min_bytes=MIN_BYTES if args.activation_offloading else None,
        world=world,
        num_keys=len(batch["kv_index"]) if "kv_index" in batch else None,
        num_masked=num_masked,
        head_recomputes=True,
        num_frozen=0 if args.precompute_ref_log_probs else num_parameters,
    )


def main(args):
    """Train. Returns what summary.json holds; after SIGTERM, {"stopped_at_step": step}; of a dry run, what it
    counted.

    Raises: ValueError for what the arguments, the data or the model make impossible, before output_dir is
            touched; FloatingPointError for a non-finite loss or gradient, before the weights and the
            checkpoints are.
    """
    check_arguments(args)
    if args.dry_run:
        return dry_run(args)
    check_output_dir(
        args.output_dir, args.overwrite_output_dir, args.resume_from_checkpoint, args.model_name_or_path
    )
    rank, local_rank, world, device = start_distributed(args)
    sigterm = []
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: sigterm.append(True))
    try:
        with disk_errors_refused(args.output_dir):
            return train(args, rank, local_rank, world, device, sigterm)
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def train(args, rank, local_rank, world, device, sigterm):
    torch.manual_seed(args.seed + rank)  # the order of the data has a generator of its own
    pretrained = read_pretrained(args.model_name_or_path, args.max_length, dropout=DROPOUT)
    tokenizer, config = pretrained.tokenizer, pretrained.config
    if args.use_liger_kernel:
        check_liger(config.model_type)
    vocab_size = config.get_text_config().vocab_size
    end_ids = end_token_ids(tokenizer, pretrained.eos_token_id)
    for first_rank in (True, False):  # of each machine: it tokenises, and the others then read its cache
        with together(device):
            if (local_rank == 0) == first_rank:
                pairs, eval_pairs, data = prepare_data(args, tokenizer, vocab_size, end_ids)
    pad_token_id = tokenizer.pad_token_id or 0  # masked: any id will do
    objective = f"{args.loss_type} {args.beta} {args.label_smoothing}"
    fingerprint = f"{pairs.fingerprint()} {args.seed} {objective}"
    progress = {"step": 0, "epoch": 0, "pairs_done": 0, "fingerprint": fingerprint}
    if args.resume_from_checkpoint:
        checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
        progress = read_progress(checkpoint, progress["fingerprint"])
    total_steps = count_steps(args, pairs, world, progress)
    if progress["step"] > total_steps:
        raise Refusal(f"{checkpoint} is past --max_steps {total_steps}: raise it.")

    attention = args.attn_implementation or ("varlen" if args.padding_free else "sdpa")
    model = load_model(args, device, attention, pretrained)
    check_frozen(model, progress)
    reference_model_name = model_fingerprint(model)  # the weights that a run begins with are its reference
    if progress.setdefault("reference_model", reference_model_name) != reference_model_name:
        raise Refusal(f"{checkpoint} began with another model, its reference: use that one.")
    first_batch = to_device(pairs.batch(np.array([0]), pad_token_id), device)
    if args.use_liger_kernel:
        apply_liger_kernels(model, first_batch["input_ids"][:1, :64])
    if args.check_isolation and args.padding_free:
        check_batching(model, pairs, args, device)
        remedy = "Use --no_padding_free for this model."
        check_isolation(model, first_batch, remedy=remedy, max_length=args.max_length)
    check_head(model, first_batch)
    offload = OffloadActivations(model, decoder_layers(model), device) if args.activation_offloading else None
    reference_model, reference = None, {}
    if args.precompute_ref_log_probs:
        # by the weights that the run began with: a resumed one has not loaded its own yet
        chunks, ranks = pairs.reference_chunks(progress, total_steps, world), (rank, world, device)
        reference = prepare_reference(model, pairs, chunks, eval_pairs, args, *ranks, pad_token_id)
    else:
        # frozen: it runs under no_grad, and no optimizer knows it
        reference_model = load_model(args, device, attention, pretrained).eval()
        if args.use_liger_kernel:
            apply_liger_kernels(reference_model, first_batch["input_ids"][:1, :64])
    # fused: the default makes temporaries as large as the weights while it updates
    groups = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, total_steps)

    if progress["step"] == total_steps and (Path(args.output_dir) / "summary.json").exists():
        raise Refusal(f"{args.output_dir} has finished its {total_steps} steps: raise --max_steps to go on.")
    if args.resume_from_checkpoint:
        load_checkpoint(checkpoint, model, optimizer, scheduler, progress, rank)
    with together(device):  # what cannot be written shows now, not after the last step
        if rank == 0:
            try_to_write(pretrained, saved_shapes(model))
    if rank == 0:
        prepare_output_dir(args.output_dir, progress["step"], keep=[REFERENCE] if reference else [])
        if reference:
            temporary = fresh_folder(Path(args.output_dir) / "reference.tmp")
            write_reference(temporary, **reference)
            commit_files(temporary, args.output_dir)
    metrics, totals = {}, {"seconds": 0.0, "tokens": 0, "padding": 0, "real_tokens": 0}
    others = [reference_model] if reference_model else []
    track_step = min(2, total_steps - progress["step"])
    meter = MemoryMeter(model, optimizer, device, args.measure_memory, track_step, offload, others)
    if rank == 0:
        print(describe_start(args, data, total_steps))
    bar = tqdm(total=total_steps, initial=progress["step"], desc="DPO", unit="step", disable=rank != 0)
    steps = pairs.steps(progress["epoch"], progress["pairs_done"], world)

    while progress["step"] < total_steps:
        step_started = time.perf_counter()
        chunks = next(steps)
        step_pairs = np.concatenate(chunks)
        batches = list(pairs.micro_batches(chunks, rank, world, pad_token_id))

        # The mean runs over the pairs of the whole step, all micro-batches and all ranks: one batch of 8,
        # 8 batches of 1 and 2 ranks of 4 take the same step.
        counts = [sum(n) for n in zip(*map(count, batches))]
        num_pairs, num_scored, num_tokens, num_padding = all_sum(counts, device)
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        with meter.step(batches):
            for batch in batches:
                with offload or nullcontext():
                    loss_sum, batch_sums = batch_loss(model, reference_model, to_device(batch, device), args)
                # FSDP averages gradients over ranks: times world cancels that
                (loss_sum * (world / num_pairs)).backward()
                sums += batch_sums
            if offload:
                offload.end_step()
            grad_norm = clip_gradients(model, args.max_grad_norm)
            *sums, stop = all_sum([*sums.tolist(), len(sigterm)], device)  # SIGTERM on one rank stops all
            means = {name: total / num_pairs for name, total in zip(METRICS, sums)}
            if not (math.isfinite(means["loss"]) and math.isfinite(grad_norm)):
                examples = sorted(pairs.examples[step_pairs]["example"])
                raise FloatingPointError(
                    f"step {progress['step'] + 1}: loss {means['loss']}, gradient norm {grad_norm}; stopped "
                    f"before the update. Pairs {step_pairs.tolist()}, examples {examples}."
                )
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

        seconds = time.perf_counter() - step_started
        progress["step"] += 1
        progress["pairs_done"] += len(step_pairs)
        metrics = {
            "step": progress["step"],
            "epoch": progress["epoch"] + progress["pairs_done"] / len(pairs),
            **means,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "num_tokens": int(num_tokens),
            "num_scored_tokens": int(num_scored),
            "tokens_per_second": num_tokens / seconds,
            "step_seconds": seconds,
            "peak_memory_bytes": meter.peak_bytes(),
        }
        if not meter.counting or total_steps == 1:  # counting bytes slows a step down
            for name, value in (("seconds", seconds), ("tokens", num_tokens), ("padding", num_padding)):
                totals[name] += value
            totals["real_tokens"] += int(pairs.num_tokens[step_pairs].sum())
        if progress["pairs_done"] == len(pairs):
            progress["epoch"], progress["pairs_done"] = progress["epoch"] + 1, 0
            steps = pairs.steps(progress["epoch"], 0, world)
        at_end = progress["step"] == total_steps
        if eval_pairs and (at_end or args.eval_steps and progress["step"] % args.eval_steps == 0):
            metrics |= evaluate(model, reference_model, eval_pairs, args, rank, world, device, pad_token_id)
        if rank == 0:
            write_metrics(metrics, args.output_dir, bar, args.logging_steps)
        if stop or args.save_steps and progress["step"] % args.save_steps == 0:
            save_checkpoint(args, model, optimizer, progress, rank)
        if stop:
            if rank == 0:
                remedy = "continue with --resume_from_checkpoint latest"
                tqdm.write(f"SIGTERM: saved checkpoint-{progress['step']}; {remedy}", file=sys.stderr)
            return {"stopped_at_step": progress["step"]}
    bar.close()

    save_model(args, model, pretrained, rank)
    ledger = memory_ledger(predict(args, model, meter.largest_batch, world), meter.measured)
    data["padding_fraction"] = totals["padding"] / max(totals["tokens"], 1)
    data["computed_fraction"] = totals["tokens"] / max(totals["real_tokens"], 1)
    moved = traffic(offload.report(), measure_bandwidth(device)) if offload else None
    summary = summarize(args, device, world, data, totals, ledger, moved, metrics)
    if rank == 0:
        (Path(args.output_dir) / "summary.json").write_text(json.dumps(summary, indent=1))
        print(describe_pairs(data))
        print(describe_speed(summary))
        print(format_ledger(ledger_title(summary), ledger))
        if moved:
            print(format_traffic(moved))
    return summary


# --- 6. Memory before the GPU ---


def pretend_batch(args):
    """A batch of pairs that computes as many tokens as the flags allow.

    That is: completions as long as they may be, and the prompt what --max_length leaves of them.
    """
    prompt, completion, cost = largest_pair(args)

    def pair(length):
        ids = {"chosen_ids": [0] * length, "rejected_ids": [0] * length, "prefix_length": 0}
        return ids | {"chosen_prompt_ids": [0] * prompt, "rejected_prompt_ids": [0] * prompt}

    size, budget = args.per_device_train_batch_size or 4, args.max_tokens_per_batch
    pairs = [pair(completion)] * size
    if budget is not None:
        pairs = [pair(completion)] * (budget // cost)
        rest = (budget % cost - (1 if shares_prompts(args) else 2) * prompt) // 2
        if rest >= 1 and args.padding_free:
            pairs.append(pair(rest))
    if not args.padding_free:  # one token of padding, so that there is a mask
        pairs[0] = pairs[0] | {"rejected_ids": pairs[0]["rejected_ids"][1:]}
    batch = collate(pairs, args, 0)
    return batch | {"ref_logps": torch.zeros(2 * len(pairs))}


def pretend_step(args, config, world, batch=None):
    """The bytes that one optimizer step holds on each of `world` ranks, by pretended tensors.

    Args:    batch: of each forward; None = as many tokens as the flags allow.
    Returns: {row of the ledger: (formula, bytes)}.
    """
    batch = pretend_batch(args) if batch is None else batch
    device, accumulation = torch.device("cpu"), args.gradient_accumulation_steps
    attention = args.attn_implementation or ("varlen" if "cu_seq_lens_q" in batch else "sdpa")
    attention = "varlen" if attention == "flash_attention_2" else attention  # keeps the same tensors
    register_varlen_attention()

    def new_model(mesh):
        model = empty_model(config, dtype=torch.float32, attn_implementation=attention)
        if mesh is not None:
            shard(model, mesh, args.bf16)
        return prepare_model(model, args)

    sharded = world > 1 or args.bf16
    with two_chunks_only(), pretend(world if sharded else None, args.activation_offloading) as mesh:
        model = new_model(mesh)
        reference_model = None if args.precompute_ref_log_probs else new_model(mesh).eval()
        others = [] if reference_model is None else [reference_model]
        offload = args.activation_offloading or None
        offload = offload and OffloadActivations(model, decoder_layers(model), device)
        optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), fused=True)

        def update():
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()

        for parameter in trained(model):
            parameter.grad = torch.zeros_like(parameter)
        update()  # makes AdamW's moments
        meter = MemoryMeter(model, optimizer, device, True, 1, offload, others)
        batches = [batch] * min(accumulation, 2)  # later ones hold what the second does
        with meter.step(batches):
            for batch in batches:
                with offload or nullcontext(), refusals_of(model, "Add --no_padding_free."):
                    loss_sum, _ = batch_loss(model, reference_model, batch, args)
                loss_sum.backward()
            if offload:
                offload.step_host_bytes = offload.host.step_peak  # end_step would take real memory
            update()
    predicted = predict(args, model, batch, world)
    return {name: (predicted.get(name, [""])[0], count) for name, count in meter.measured.items()}


def dry_run(args):
    """Count the bytes of one step, those that single flags would save, and the longest pairs that fit."""
    config = load_config(args.model_name_or_path, dropout=DROPOUT)
    world, size = args.dry_run_world_size, args.per_device_train_batch_size or 4
    tokens = args.max_tokens_per_batch or 0
    changes = {
        "--bf16": {"bf16": True},
        "--gradient_checkpointing": {"gradient_checkpointing": True},
        "--activation_offloading": {"activation_offloading": True},
        "--padding_free": {"padding_free": True},
        "--share_prompt": {"share_prompt": True},
        "--precompute_ref_log_probs": {"precompute_ref_log_probs": True},
        f"--loss_chunk_size {args.loss_chunk_size // 4}": {"loss_chunk_size": args.loss_chunk_size // 4},
        f"--per_device_train_batch_size {size // 2}": {"per_device_train_batch_size": size // 2},
        f"--max_length {args.max_length // 2}": {"max_length": args.max_length // 2},
        f"--max_tokens_per_batch {tokens // 2}": {"max_tokens_per_batch": tokens // 2},
        f"{2 * world} ranks": {"dry_run_world_size": 2 * world},
    }
    most = max_positions(config)[0] or args.max_length
    if tokens:  # which have to hold a pair

        def cost(length):
            return largest_pair(replace(args, max_length=length))[2]

        most = bisect_right(range(most + 1), tokens, lo=2, key=cost) - 1
    rows = pretend_step(args, config, world)
    ledger = memory_ledger(rows, {})
    print(format_ledger(f"{Path(args.model_name_or_path).name}  dry run  world {world}", ledger))
    found = explore(
        args,
        rows["peak"][1],
        check_arguments,
        lambda changed: pretend_step(changed, config, changed.dry_run_world_size),
        changes,
        "max_length",
        most,
    )
    print(describe_dry_run(found, args.gpu_memory_gib))
    return {"args": asdict(args), "ledger": ledger, **found}


if __name__ == "__main__":
    run_script(main, Arguments)
