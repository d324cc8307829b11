"""SFT with packing: pay for tokens, not for padding.

Padded, a step computes B * max(T_i) tokens; packed, sum(T_i), in rows filled to max_length by
best-fit-decreasing. Attention costs sum(T_i^2), the loss head chunk * V elements instead of N * V, and the
result is the same to the last rounding: each document sees itself alone, and each scored token of the step
weighs the same. With --activation_offloading, what backward needs waits on the host, layer by layer.
Dropout is as the model's configuration says.
Left out to stay readable: LoRA, vision inputs, tools in chats, mixture-of-experts balancing.

laptop   python sft_packing.py
1 GPU    python sft_packing.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara --bf16
8 GPUs   torchrun --standalone --nproc_per_node 8 sft_packing.py --model_name_or_path Qwen/Qwen3-8B ...
no GPU   python sft_packing.py --dry_run --dry_run_world_size 8 --gpu_memory_gib 80 ... says what fits
Sources: arXiv 2107.02027 (histogram packing), arXiv 2404.10830 (best-fit packing)
"""

import bisect
import hashlib
import json
import math
import os
import signal
import sys
import time
import warnings
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
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
from common.collators import IGNORE, flatten, pad
from common.data import (
    check_chat_template,
    check_repeats,
    check_row,
    check_token_ids,
    encode_completion,
    end_token_ids,
    end_with_eos,
    load_rows,
    map_rows,
    render_chat,
    repeats_prompt,
    shared_prefix_length,
    source_hash,
    template_kwargs,
    text_ids,
    unused_columns,
)
from common.dry_run import explore, pretend
from common.flags import Refusal, check_dry_run, flag, refuse, run_script, together
from common.liger import apply_liger_kernels, check_liger, liger_nll_sum
from common.logps import check_head, head_computes, nll_sum, two_chunks_only
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
from common.report import (
    describe_data,
    describe_dry_run,
    describe_speed,
    describe_start,
    ledger_title,
    summarize,
    write_metrics,
)
from common.trained import check_frozen, checkpoint_layers, parameter_groups, trained
from common.truncation import OVERFLOW, check_limit, fit_to_length

HERE = Path(__file__).resolve().parent
DROPOUT = True  # whether the model's own is on in training


# --- 1. Arguments ---


Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]


@dataclass
class Arguments:
    model_name_or_path: str = flag(str(HERE / "demo/model"), "Hub name or folder of a causal language model")
    attn_implementation: str | None = flag(None, "default: varlen for flat rows, sdpa for padded ones")
    dataset_name: str = flag(str(HERE / "demo/sft.jsonl"), "Hub name, file, or folder by save_to_disk")
    dataset_train_split: str = flag("train", "split of a Hub dataset to train on")
    eval_dataset_name: str | None = flag(None, "dataset for evaluation, named like dataset_name")
    dataset_test_split: str = flag("test", "split of a Hub dataset to evaluate on")
    dataset_num_proc: int | None = flag(None, "processes that tokenise")
    output_dir: str = flag("outputs/sft", "folder for model, checkpoints, metrics.jsonl and summary.json")
    overwrite_output_dir: bool = flag(False, "replace the run that output_dir holds")

    max_length: int = flag(512, "tokens: the longest document, and the length of a packed row")
    overflow: str | None = flag(None, "over-long examples: truncate (default), split, drop, error")
    packing: bool = flag(True, "whether to fill rows of max_length with whole documents")
    packing_strategy: str = flag("bfd", "bfd, bfd_split (bfd with overflow split), wrapped (one stream)")
    padding_free: bool = flag(True, "without packing: whether to join the batch's examples into a flat row")
    assistant_only_loss: bool = flag(False, "score assistant turns only; the template must mark them")
    per_device_train_batch_size: int = flag(2, "rows (packed) or examples (not packed) per forward and rank")
    gradient_accumulation_steps: int = flag(1, "forwards and backwards per optimizer step")

    learning_rate: float = flag(1e-4, "peak of the schedule")
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
    liger_cross_entropy: bool = flag(False, "Liger's fused linear cross entropy; it chooses its own chunks")
    bf16: bool = flag(False, "compute in bfloat16; weights, gradients and optimizer states stay in fp32")
    loss_chunk_size: int = flag(256, "tokens per chunk of the loss head")
    seed: int = flag(0, "order of the data and dropout")

    eval_steps: int | None = flag(None, "evaluate every so many steps as well as at the end")
    logging_steps: int = flag(1, "refresh the progress bar every so many steps; metrics.jsonl has each step")
    save_steps: int | None = flag(None, "write a checkpoint every so many steps; None = only on SIGTERM")
    save_total_limit: int | None = flag(None, "keep this many newest checkpoints; None = all")
    resume_from_checkpoint: str | None = flag(None, "a folder checkpoint-<step>, or 'latest' in output_dir")
    check_isolation: bool = flag(True, "whether to prove on the first row that documents do not mix")
    measure_memory: bool = flag(False, "without CUDA: count every byte of one (slower) step, for the ledger")
    dry_run: bool = flag(False, "do not train: from the model's configuration, count the bytes of one step")
    dry_run_world_size: int = flag(1, "with --dry_run: the number of ranks to count for")
    gpu_memory_gib: float | None = flag(None, "with --dry_run: say what fits into so many GiB")


def check_arguments(args):
    """Raise ValueError for values and combinations that would be wrong or ignored."""
    required = ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "loss_chunk_size")
    for name in (*required, "logging_steps"):
        check_limit(f"--{name}", getattr(args, name) or 0)
    for name in ("eval_steps", "save_steps", "save_total_limit", "dataset_num_proc"):
        check_limit(f"--{name}", getattr(args, name))
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
        if not 0 <= getattr(args, name) < math.inf:
            raise Refusal(f"--{name} is {getattr(args, name)}; it must be a finite number >= 0.")
    strategy, overflow, attention = args.packing_strategy, args.overflow, args.attn_implementation
    flat, splits = args.packing or args.padding_free, strategy != "bfd"
    steps, epochs = args.max_steps, args.num_train_epochs
    refuse(
        args.max_length < 2, "--max_length 1: a document's first token is never predicted; give at least 2."
    )
    refuse(steps < 1 and steps != -1, f"--max_steps {steps}: give a number >= 1, or -1 for num_train_epochs.")
    ignored = args.warmup_steps and args.lr_scheduler_type == "constant"
    refuse(ignored, f"--warmup_steps {args.warmup_steps} needs --lr_scheduler_type constant_with_warmup.")
    refuse(args.seed < 0, f"--seed {args.seed}: give a number >= 0.")
    refuse(not 0 < epochs < math.inf, f"--num_train_epochs {epochs}: it must be a finite number above 0.")
    refuse(overflow not in (None, *OVERFLOW), f"--overflow {overflow}: choose one of {', '.join(OVERFLOW)}.")
    known = strategy in ("bfd", "bfd_split", "wrapped")
    refuse(not known, f"--packing_strategy {strategy}: choose bfd, bfd_split or wrapped.")
    refuse(splits and not args.packing, f"--packing_strategy {strategy} needs packing: drop --no_packing.")
    cut = f"--packing_strategy {strategy} splits long examples, --overflow {overflow} does not: drop one."
    refuse(splits and overflow not in (None, "split"), cut)
    pads = args.packing and not args.padding_free
    refuse(pads, "--no_padding_free pads, packing never does: add --no_packing for padded batches.")
    masked = not flat and attention == "varlen"
    refuse(masked, "--attn_implementation varlen is for flat rows: drop --no_padding_free, or choose sdpa.")
    fp32_flash = attention == "flash_attention_2" and not args.bf16
    refuse(fp32_flash, "--attn_implementation flash_attention_2 rejects fp32: add --bf16.")
    refuse(args.eval_steps and not args.eval_dataset_name, "--eval_steps needs --eval_dataset_name.")
    twice = args.measure_memory and torch.cuda.is_available()
    refuse(twice, "--measure_memory is for CPUs: on CUDA every step is measured, drop it.")
    overwritten = (
        "--activation_offloading with Liger's cross entropy would offload logits that Liger overwrites in "
        "place.\nKeep --use_liger_kernel and drop --liger_cross_entropy, or drop --activation_offloading."
    )
    refuse(args.activation_offloading and args.liger_cross_entropy, overwritten)
    ignored = args.liger_cross_entropy and args.loss_chunk_size != Arguments.loss_chunk_size
    chunk = f"--loss_chunk_size {args.loss_chunk_size} with --liger_cross_entropy, which chooses its own: "
    refuse(ignored, f"{chunk}drop one.")
    check_dry_run(args)


# --- 2. Data ---


# columns, in the order in which they are looked for
TYPES = (("messages",), ("text",), ("prompt", "completion"))


def tokenize(example, tokenizer, assistant_only_loss, end_ids=()):
    """One example of any supported type -> (input_ids, labels), of one length; labels -100 = not scored."""
    columns = next(columns for columns in TYPES if set(columns) <= set(example))
    check_row(example, columns)
    kwargs = template_kwargs(example)
    if columns == ("messages",):
        input_ids, scored = render_chat(
            example["messages"], tokenizer, assistant_only_loss, kwargs, end_ids=end_ids
        )
    elif columns == ("text",):
        input_ids = end_with_eos(text_ids(example["text"], tokenizer), tokenizer, end_ids)
        scored = [True] * len(input_ids)
    else:
        prompt_ids, input_ids, scored = encode_completion(
            example["prompt"],
            example["completion"],
            tokenizer,
            template_kwargs=kwargs,
            end_ids=end_ids,
            assistant_only_loss=assistant_only_loss,
        )
        shared = shared_prefix_length(prompt_ids, input_ids)
        scored[:shared] = [False] * shared
    return input_ids, [token if keep else IGNORE for token, keep in zip(input_ids, scored)]


def check_columns(rows, name, tokenizer, args):
    """Raise ValueError for columns, templates and flags that do not go together."""
    columns, first = rows.column_names, rows[0]
    wanted = "messages, or text, or prompt and completion"
    if not ("messages" in columns or "text" in columns or {"prompt", "completion"} <= set(columns)):
        raise Refusal(f"{name} has the columns {', '.join(columns)}; wanted: {wanted}.")
    chat = "messages" in columns or "text" not in columns and isinstance(first["prompt"], list)
    if args.assistant_only_loss and not chat:
        raise Refusal(f"--assistant_only_loss needs conversations; {name} holds plain text.")
    if chat:
        check_chat_template(tokenizer, name, args.model_name_or_path, args.assistant_only_loss)


def load_examples(name, split, tokenizer, args, overflow, end_ids=()):
    """Tokenised examples, none longer than max_length unless `wrapped` cuts them later, none without a
    scored token.

    Returns: a datasets.Dataset with input_ids, labels, num_tokens and num_scored; and the counts for
             summary.json.
    """
    rows = load_rows(name, split)
    check_columns(rows, name, tokenizer, args)
    # the cache's key is a hash of all that a function refers to: not of args, then
    assistant_only_loss = args.assistant_only_loss
    limit = None if args.packing_strategy == "wrapped" else args.max_length

    def encode(example, index):
        try:
            input_ids, labels = tokenize(example, tokenizer, assistant_only_loss, end_ids)
        except Refusal as error:  # a null, a number, a role that the template refuses: say in which example
            raise Refusal(f"{name}, example {index}: {error}") from error
        repeats = "completion" in example and repeats_prompt(example["prompt"], example["completion"])
        lengths = {"num_tokens": len(input_ids), "example": index, "repeats": repeats}
        return {"input_ids": input_ids, "labels": labels, **lengths}

    def fit(batch):
        fitted = {name: [] for name in ("example", "input_ids", "labels", "num_tokens", "num_scored")}
        for example, input_ids, labels in zip(batch["example"], batch["input_ids"], batch["labels"]):
            try:
                pieces = fit_to_length(input_ids, labels, limit, overflow)
            except Refusal as error:
                raise Refusal(f"{name}, example {example}: {error}") from error
            for input_ids, labels in pieces:
                fitted["example"].append(example)
                fitted["input_ids"].append(input_ids)
                fitted["labels"].append(labels)
                fitted["num_tokens"].append(len(input_ids))
                # a document's first token is never predicted
                fitted["num_scored"].append(sum(label != IGNORE for label in labels[1:]))
        return fitted

    code, options = source_hash(__file__), {"num_proc": args.dataset_num_proc}
    tokenising = {"with_indices": True, "desc": f"Tokenising {name}", **options}
    encoded = map_rows(rows, encode, code, remove_columns=rows.column_names, **tokenising)
    check_repeats(name, encoded["repeats"][:])
    fitting = {"remove_columns": ["repeats"], "desc": "Fitting to max_length", **options}
    examples = map_rows(encoded, fit, code, batched=True, **fitting)
    lengths = np.array(encoded["num_tokens"])
    # where no example is left, datasets leaves no columns either
    scored = np.array(examples["num_scored"] if len(examples) else [], dtype=np.int64)
    examples = examples.select(np.flatnonzero(scored > 0))
    used = np.unique(examples["example"]) if len(examples) else np.array([], dtype=np.int64)
    data = describe(lengths, used, args.max_length, overflow)
    columns = next(columns for columns in TYPES if set(columns) <= set(rows.column_names))
    data["columns_unused"] = unused_columns(rows, columns)
    if len(examples) == 0:
        raise Refusal(
            f"{name} has no example with a scored token within max_length {args.max_length}: {data}."
        )
    data["tokens_kept"] = int(sum(examples["num_tokens"]))
    data["tokens_unscored"] = int(lengths.sum()) - data["tokens_kept"] - data["tokens_cut"]
    return examples, data


def describe(lengths, used, max_length, overflow):
    """What became of the examples: their lengths (E,) in tokens, and which of them are used."""
    too_long = lengths > max_length
    of_used = int(too_long[used].sum())
    dropped = int(too_long.sum()) if overflow == "drop" else 0
    excess = {"truncate": lengths - max_length, "drop": lengths}.get(overflow, np.zeros_like(lengths))
    return {
        "examples_read": len(lengths),
        "examples_used": len(used),
        "examples_unscored": len(lengths) - len(used) - dropped,
        "examples_truncated": of_used if overflow == "truncate" else 0,
        "examples_split": of_used if overflow == "split" else 0,
        "examples_dropped": dropped,
        "tokens_cut": int(excess[too_long].sum()),
    }


# --- 3. The technique ---


def plan_rows(lengths, max_length, strategy="bfd", seed=0):
    """Decide which documents share a row, without touching a token.

    Args:    lengths: (E,) tokens of each example, >= 1. max_length: tokens in a row.
             strategy: "bfd" = best-fit-decreasing over all examples; one longer than max_length is first cut
             into pieces of max_length tokens. "wrapped" = all examples as one stream, cut every max_length
             tokens. seed: shuffles equal lengths and rows (bfd), or the examples (wrapped).
    Returns: row_offsets (R+1,) int64 and spans (S, 3) int64: row r holds
             spans[row_offsets[r]:row_offsets[r+1]], each (example, start, stop). Every token is in exactly
             one span.
    Raises:  ValueError for lengths or a limit below 1, or an unknown strategy.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    check_limit("max_length", max_length)
    if lengths.ndim != 1 or len(lengths) and lengths.min() < 1:
        raise ValueError("lengths must be one number >= 1 for each example.")
    if strategy not in ("bfd", "wrapped"):
        raise ValueError(f"strategy is {strategy!r}; choose bfd or wrapped.")
    rng = np.random.default_rng(seed)
    if strategy == "wrapped":
        order = rng.permutation(len(lengths))
        ends = lengths[order].cumsum()
        spans = cut_spans(ends - lengths[order], ends, max_length)
        spans[:, 0] = order[spans[:, 0]]
        # a span starts a row where the tokens before it fill whole rows
        starts = (spans[:, 2] - spans[:, 1]).cumsum() - (spans[:, 2] - spans[:, 1])
        return np.append(np.flatnonzero(starts % max_length == 0), len(spans)), spans
    if lengths.max(initial=0) <= max_length:  # whole documents, as nearly always
        spans = np.stack([np.arange(len(lengths)), np.zeros_like(lengths), lengths], axis=1)
    else:
        spans = cut_spans(np.zeros_like(lengths), lengths, max_length)
    order, row = best_fit_decreasing(spans[:, 2] - spans[:, 1], max_length, rng)
    row_sizes = np.bincount(row)
    # best-fit-decreasing puts long documents into the first rows: shuffle
    shuffled = rng.permutation(len(row_sizes)).astype(np.min_scalar_type(len(row_sizes)))
    row_offsets = np.zeros(len(row_sizes) + 1, dtype=np.int64)
    row_offsets[shuffled + 1] = row_sizes
    # take: for whole rows of an array it is twice as fast as an index in brackets
    return row_offsets.cumsum(), spans.take(order[radix_argsort(shuffled[row])], axis=0)


def cut_spans(begins, ends, max_length):
    """Cut stretches of a stream, [begins, ends) of each example, at every multiple of max_length.

    Returns: spans (S, 3) int64, each (example, start, stop) counted from the example's own begin, in stream
             order.
    """
    first_cell = begins // max_length
    pieces = (ends - 1) // max_length - first_cell + 1
    example = np.repeat(np.arange(len(begins)), pieces)
    piece = np.arange(len(example)) - np.repeat(pieces.cumsum() - pieces, pieces)
    cell = (first_cell[example] + piece) * max_length
    starts = np.maximum(cell, begins[example]) - begins[example]
    stops = np.minimum(cell + max_length, ends[example]) - begins[example]
    return np.stack([example, starts, stops], axis=1)


def best_fit_decreasing(lengths, max_length, rng):
    """Pack items, longest first, each into the fullest row that still holds it; whole lengths at a time.

    An item put into the row with the smallest fitting residual leaves a residual smaller still, so the next
    equal item goes to the same row: each open row takes residual // length of them at once. The work grows
    with the number of distinct lengths and residuals, not with the number of items, and the rows are those
    of the item-by-item rule.

    Args:    lengths (S,) int64, 1 <= length <= max_length.
    Returns: order (S,): the items, longest first; row (S,): the row of each item of `order`.
    """
    # Equal lengths are shuffled first, or neighbours in the data would stay neighbours in a row.
    order = rng.permutation(len(lengths))
    key = (max_length - lengths).astype(np.min_scalar_type(max_length))  # small: they are read at random
    order = order[radix_argsort(key[order])]
    rows_taken, items_each = [], []  # in the order in which items are placed: rows, and how many each takes
    num_rows = 0
    residuals = []  # of open rows, sorted
    rows_with = defaultdict(list)  # residual -> arrays of row numbers
    counts = np.bincount(lengths, minlength=max_length + 1)
    for length in np.flatnonzero(counts)[::-1].tolist():
        remaining = int(counts[length])
        while remaining:
            fits = bisect.bisect_left(residuals, length)
            if fits < len(residuals):
                residual = residuals[fits]
                rows = rows_with[residual].pop()
                if not rows_with[residual]:
                    del residuals[fits]
            else:
                residual = max_length
                new = -(-remaining // (max_length // length))
                rows = np.arange(num_rows, num_rows + new)
                num_rows += new
            each = residual // length
            full = min(len(rows), remaining // each)  # rows that take `each` items
            last = min(remaining - full * each, each) if full < len(rows) else 0  # items of one more row
            for taken, items in ((rows[:full], each), (rows[full : full + 1], last)):
                if len(taken) and items:
                    rows_taken.append(taken)
                    items_each.append(items)
                    keep_rows(residuals, rows_with, residual - items * length, taken)
            remaining -= full * each + last
            keep_rows(residuals, rows_with, residual, rows[full + (last > 0) :])
    items = np.repeat(np.array(items_each, dtype=np.int64), [len(taken) for taken in rows_taken])
    return order, np.repeat(np.concatenate([np.empty(0, dtype=np.int64), *rows_taken]), items)


def radix_argsort(keys):
    """Stable argsort of unsigned keys (S,) of up to 32 bits. numpy sorts 16-bit numbers by radix, ten times
    as fast as wider ones, so the lower 16 bits are sorted first, then the upper ones.
    """
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    if keys.dtype.itemsize <= 2:
        return order
    return order[np.argsort((keys >> 16).astype(np.uint16)[order], kind="stable")]


def keep_rows(residuals, rows_with, residual, rows):
    """Note that `rows` have `residual` tokens left."""
    if residual > 0 and len(rows):
        if not rows_with[residual]:
            bisect.insort(residuals, residual)
        rows_with[residual].append(rows)


def add_scored(batch):
    """Add to a batch score_index (M,) int64: which flattened position predicts the m-th scored token; and
    score_ids (M,): that token.
    """
    # position t predicts the label at t + 1; collators have set each document's first label to -100, so no
    # document is asked to predict the next one's beginning
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
    batch["score_index"] = (targets != IGNORE).nonzero()[:, 0]
    batch["score_ids"] = targets[batch["score_index"]]
    return batch


class Rows:
    """Rows of a plan, joined from the tokenised examples when a batch needs them, not in advance."""

    def __init__(self, examples, data, args, overflow):
        lengths = np.array(examples["num_tokens"])
        if args.packing:
            strategy = args.packing_strategy.removesuffix("_split")
            self.row_offsets, self.spans = plan_rows(lengths, args.max_length, strategy, args.seed)
        else:
            self.row_offsets = np.arange(len(lengths) + 1)
            self.spans = np.stack([self.row_offsets[:-1], np.zeros_like(lengths), lengths], axis=1)
        if overflow == "split" and args.packing_strategy == "wrapped":
            data["examples_split"] = int((np.bincount(self.spans[:, 0]) > 1).sum())
        data["rows"] = len(self)
        data["fill_fraction"] = int(lengths.sum()) / (len(self) * args.max_length)
        self.examples, self.args = examples, args

    def __len__(self):
        return len(self.row_offsets) - 1

    def fingerprint(self):
        """Names this data and plan: a position in it means nothing in another one."""
        name = hashlib.sha256(
            self.spans.tobytes() + self.row_offsets.tobytes() + bytes(str(self.args.seed), "ascii")
        )
        for column in ("input_ids", "labels"):
            for batch in self.examples.with_format("arrow").iter(10_000):
                values = batch[column].combine_chunks().flatten()
                name.update(values.to_numpy(zero_copy_only=False).tobytes())
        return name.hexdigest()

    def order(self, epoch):
        """The epoch's shuffle: a function of seed and epoch, so that a checkpoint need not store it."""
        return np.random.default_rng([self.args.seed, epoch]).permutation(len(self))

    def example_numbers(self, row_numbers):
        spans = [self.spans[self.row_offsets[r] : self.row_offsets[r + 1], 0] for r in row_numbers]
        return sorted(set(self.examples[np.concatenate(spans).tolist()]["example"]))

    def batch(self, row_numbers, pad_token_id):
        """The batch of these rows: flat (no padding), or padded. No rows: one unscored dummy."""
        if len(row_numbers) == 0:
            # Ranks must run equally many forwards, or collectives stall. None of these two tokens is scored.
            input_ids = self.examples[0]["input_ids"][:2]
            sequences = [{"input_ids": input_ids, "labels": [IGNORE] * len(input_ids)}]
        else:
            spans = np.concatenate(
                [self.spans[self.row_offsets[r] : self.row_offsets[r + 1]] for r in row_numbers]
            )
            rows = self.examples[spans[:, 0].tolist()]
            sequences = [
                {"input_ids": rows["input_ids"][i][start:stop], "labels": rows["labels"][i][start:stop]}
                for i, (_, start, stop) in enumerate(spans.tolist())
            ]
        flat = self.args.packing or self.args.padding_free
        return add_scored(flatten(sequences) if flat else pad(sequences, pad_token_id))

    def micro_batches(self, row_numbers, rank, world, pad_token_id):
        """Deal rows out: rank r takes every world-th micro-batch, and all ranks equally many."""
        size = self.args.per_device_train_batch_size
        chunks = [row_numbers[i : i + size] for i in range(0, len(row_numbers), size)]
        chunks += [[]] * (-len(chunks) % world)
        for chunk in chunks[rank::world]:
            yield self.batch(chunk, pad_token_id)


# --- 4. Loss ---


def batch_nll_sum(model, batch, chunk_size, liger_cross_entropy=False):
    """Sum of the negative log-likelihood over the batch's scored tokens, () float32; no logits are kept."""

    def head(hidden, weight, bias):
        # only scored positions reach the head: a prompt costs no logits
        hidden = hidden.flatten(0, 1).index_select(0, batch["score_index"])
        if liger_cross_entropy:
            return liger_nll_sum(hidden, weight, batch["score_ids"], bias=bias)
        with keep_on_device():  # backward begins here: what this saves would come straight back
            return nll_sum(hidden, weight, batch["score_ids"], bias=bias, chunk_size=chunk_size)

    not_inputs = ("labels", "score_index", "score_ids")
    inputs = {name: value for name, value in batch.items() if name not in not_inputs}
    with head_computes(model, head):
        # With a cache or a mask, transformers ignores that position_ids restart: documents mix.
        return model(**inputs, use_cache=False).logits


def count(batch):
    """Scored tokens, tokens computed, and padding among them."""
    padding = (batch["attention_mask"] == 0).sum().item() if "attention_mask" in batch else 0
    return len(batch["score_ids"]), batch["input_ids"].numel(), padding


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


@torch.no_grad()
def evaluate(model, rows, args, rank, world, device, pad_token_id):
    """Mean negative log-likelihood per scored token over all rows and ranks."""
    model.eval()
    nll_total, num_scored = 0.0, 0
    for batch in rows.micro_batches(np.arange(len(rows)), rank, world, pad_token_id):
        batch = to_device(batch, device)
        nll_total += batch_nll_sum(model, batch, args.loss_chunk_size, args.liger_cross_entropy).item()
        num_scored += count(batch)[0]
    model.train()
    nll_total, num_scored = all_sum([nll_total, num_scored], device)
    if not math.isfinite(nll_total):
        raise FloatingPointError(f"the evaluation's loss is {nll_total / num_scored}.")
    return nll_total / max(num_scored, 1)


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
    """Where a checkpoint stands: step, updates among them, epoch, rows done in it."""
    progress = json.loads((path / "progress.json").read_text())
    if progress["fingerprint"] != fingerprint:
        raise Refusal(f"{path} belongs to other data or another plan: use its dataset, max_length and seed.")
    return {"updates": progress["step"], **progress}


def load_checkpoint(path, model, optimizer, scheduler, progress, rank):
    """Restore weights, moments, learning rate and random states, on any number of ranks."""
    read_training_state(path, training_state(model, optimizer), rank)
    for moments in optimizer.state.values():
        moments["step"].fill_(progress["updates"])
    scheduler.last_epoch = progress["step"] - 1  # the rate is a function of the step alone
    with warnings.catch_warnings():
        # torch takes a step of the schedule before the first one of the optimizer for a mistake
        warnings.simplefilter("ignore")
        scheduler.step()


def count_steps(args, num_rows, rows_per_step, progress):
    """Optimizer steps of the whole run, those that `progress` has done included.

    Counted from the rows that are left: a run resumed with other ranks or batches trains each row as often
    as before. Part of an epoch is rounded up to whole steps.
    """
    if args.max_steps > 0:
        return args.max_steps
    total, done = progress["step"], progress["rows_done"]
    for epoch in range(progress["epoch"], math.ceil(args.num_train_epochs)):
        # 1e-9: 1.6 - 1 is 0.6000000000000001
        last = math.ceil(min(1, args.num_train_epochs - epoch) * num_rows - 1e-9)
        total += math.ceil(max(0, last - done) / rows_per_step)
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
    """Returns training rows, evaluation rows (None without --eval_dataset_name), and counts."""
    overflow = args.overflow or ("truncate" if args.packing_strategy == "bfd" else "split")
    examples, data = load_examples(
        args.dataset_name, args.dataset_train_split, tokenizer, args, overflow, end_ids
    )
    check_token_ids(examples, vocab_size, args.dataset_name)
    rows, eval_rows = Rows(examples, data, args, overflow), None
    if args.eval_dataset_name:
        name, split = args.eval_dataset_name, args.dataset_test_split
        examples, eval_data = load_examples(name, split, tokenizer, args, overflow, end_ids)
        eval_rows = Rows(examples, eval_data, args, overflow)
        data["eval"] = eval_data
        check_token_ids(examples, vocab_size, name)
    return rows, eval_rows, data


def clip_gradients(model, max_grad_norm):
    """Scale the gradients to a global norm of max_grad_norm at most (0 = any); returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def predict(args, model, batch, world):
    """The ledger's predicted side, for the batch that its measured side saw; {} where none is known."""
    attention = model.config._attn_implementation
    # Liger's kernels keep less than the formulas here count
    if batch is None or attention == "eager" or args.use_liger_kernel or args.liger_cross_entropy:
        return {}
    num_scored, num_tokens, num_padding = count(batch)
    return predict_ledger(
        model.config,
        num_tokens,
        num_scored,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trained=sum(p.numel() for p in trained(model)),
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=args.bf16,
        chunk_size=args.loss_chunk_size,
        rows=len(batch["input_ids"]),
        masked=num_padding > 0 or "cu_seq_lens_q" in batch and attention == "sdpa",
        accumulates=args.gradient_accumulation_steps > 1,
        offload_min_bytes=MIN_BYTES if args.activation_offloading else None,
        world=world,
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
    torch.manual_seed(args.seed + rank)  # for dropout; the order of the data has a generator of its own
    flat = args.packing or args.padding_free
    pretrained = read_pretrained(args.model_name_or_path, args.max_length, dropout=DROPOUT)
    tokenizer, config = pretrained.tokenizer, pretrained.config
    if args.use_liger_kernel or args.liger_cross_entropy:
        check_liger(config.model_type if args.use_liger_kernel else None)
    vocab_size = config.get_text_config().vocab_size
    end_ids = end_token_ids(tokenizer, pretrained.eos_token_id)
    for first_rank in (True, False):  # of each machine: it tokenises, and the others then read its cache
        with together(device):
            if (local_rank == 0) == first_rank:
                rows, eval_rows, data = prepare_data(args, tokenizer, vocab_size, end_ids)
    pad_token_id = tokenizer.pad_token_id or 0  # masked: any id will do
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    progress = {"step": 0, "updates": 0, "epoch": 0, "rows_done": 0, "fingerprint": rows.fingerprint()}
    if args.resume_from_checkpoint:
        checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
        progress = read_progress(checkpoint, progress["fingerprint"])
    total_steps = count_steps(args, len(rows), rows_per_step, progress)
    if progress["step"] > total_steps:
        raise Refusal(f"{checkpoint} is past --max_steps {total_steps}: raise it.")

    model = load_model(args, device, args.attn_implementation or ("varlen" if flat else "sdpa"), pretrained)
    check_frozen(model, progress)
    first_batch = to_device(rows.batch([0], pad_token_id), device)
    if args.use_liger_kernel:
        apply_liger_kernels(model, first_batch["input_ids"][:1, :64])
    if args.check_isolation and flat:
        check_isolation(model, first_batch, max_length=args.max_length)
    check_head(model, first_batch)
    offload = OffloadActivations(model, decoder_layers(model), device) if args.activation_offloading else None
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
        prepare_output_dir(args.output_dir, progress["step"])
    metrics, totals = {}, {"seconds": 0.0, "tokens": 0, "padding": 0}
    track_step = min(2, total_steps - progress["step"])
    meter = MemoryMeter(model, optimizer, device, args.measure_memory, track_step, offload)
    if rank == 0:
        print(describe_start(args, data, total_steps))
    bar = tqdm(total=total_steps, initial=progress["step"], desc="SFT", unit="step", disable=rank != 0)
    order = rows.order(progress["epoch"])

    while progress["step"] < total_steps:
        step_started = time.perf_counter()
        step_rows = order[progress["rows_done"] : progress["rows_done"] + rows_per_step]
        batches = list(rows.micro_batches(step_rows, rank, world, pad_token_id))

        # The mean runs over the scored tokens of the whole step, all micro-batches and all ranks: one batch
        # of 8, 8 batches of 1 and 2 ranks of 4 take the same step.
        num_scored, num_tokens, num_padding = all_sum([sum(n) for n in zip(*map(count, batches))], device)
        if not num_scored:  # wrapped rows of a long prompt: without a gradient AdamW changes nothing at all
            batches, num_tokens, num_padding = [], 0, 0
        num_items_in_batch = max(num_scored, 1)
        nll_total = 0.0
        with meter.step(batches):
            for batch in batches:
                batch = to_device(batch, device)
                with offload or nullcontext():
                    nll = batch_nll_sum(model, batch, args.loss_chunk_size, args.liger_cross_entropy)
                # FSDP averages gradients over ranks: times world cancels that
                (nll * (world / num_items_in_batch)).backward()
                nll_total += nll.item()
            if offload:
                offload.end_step()
            grad_norm = clip_gradients(model, args.max_grad_norm)
            nll_total, stop = all_sum([nll_total, len(sigterm)], device)  # SIGTERM on one rank stops all
            loss = nll_total / num_items_in_batch
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise FloatingPointError(
                    f"step {progress['step'] + 1}: loss {loss}, gradient norm {grad_norm}; stopped before "
                    f"the update. Rows {step_rows.tolist()}, examples {rows.example_numbers(step_rows)}."
                )
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

        seconds = time.perf_counter() - step_started
        progress["step"] += 1
        progress["updates"] += bool(num_scored)
        progress["rows_done"] += len(step_rows)
        metrics = {
            "step": progress["step"],
            "epoch": progress["epoch"] + progress["rows_done"] / len(rows),
            "loss": loss,
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
        if progress["rows_done"] == len(rows):
            progress["epoch"], progress["rows_done"] = progress["epoch"] + 1, 0
            order = rows.order(progress["epoch"])
        at_end = progress["step"] == total_steps
        if eval_rows and (at_end or args.eval_steps and progress["step"] % args.eval_steps == 0):
            metrics["eval_loss"] = evaluate(model, eval_rows, args, rank, world, device, pad_token_id)
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
    moved = traffic(offload.report(), measure_bandwidth(device)) if offload else None
    totals["real_tokens"] = totals["tokens"] - totals["padding"]
    summary = summarize(args, device, world, data, totals, ledger, moved, metrics)
    if rank == 0:
        (Path(args.output_dir) / "summary.json").write_text(json.dumps(summary, indent=1))
        print(describe_data(data, args.max_length))
        print(describe_speed(summary))
        print(format_ledger(ledger_title(summary), ledger))
        if moved:
            print(format_traffic(moved))
    return summary


# --- 6. Memory before the GPU ---


def pretend_step(args, config, world, batch=None):
    """The bytes that one optimizer step holds on each of `world` ranks, by pretended tensors.

    Args:    batch: of each forward; None = as many tokens as the flags allow, all scored.
    Returns: {row of the ledger: (formula, bytes)}.
    """
    if batch is None:
        sequences = [{"input_ids": [0] * args.max_length, "labels": [0] * args.max_length}]
        sequences *= args.per_device_train_batch_size
        flat = args.packing or args.padding_free
        batch = add_scored(flatten(sequences) if flat else pad(sequences, 0))
        if not flat:
            batch["attention_mask"][0, -1] = 0  # one token of padding, so that there is a mask
    device, accumulation = torch.device("cpu"), args.gradient_accumulation_steps
    attention = args.attn_implementation or ("varlen" if "cu_seq_lens_q" in batch else "sdpa")
    attention = "varlen" if attention == "flash_attention_2" else attention  # keeps the same tensors
    register_varlen_attention()
    sharded = world > 1 or args.bf16
    with two_chunks_only(), pretend(world if sharded else None, args.activation_offloading) as mesh:
        model = empty_model(config, dtype=torch.float32, attn_implementation=attention)
        if mesh is not None:
            shard(model, mesh, args.bf16)
        prepare_model(model, args)
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
        meter = MemoryMeter(model, optimizer, device, track=True, track_step=1, offload=offload)
        batches = [batch] * min(accumulation, 2)  # later ones hold what the second does
        with meter.step(batches):
            for batch in batches:
                with offload or nullcontext(), refusals_of(model, "Add --no_packing --no_padding_free."):
                    nll = batch_nll_sum(model, batch, args.loss_chunk_size)
                nll.backward()
            if offload:
                offload.step_host_bytes = offload.host.step_peak  # end_step would take real memory
            update()
    predicted = predict(args, model, batch, world)
    return {name: (predicted.get(name, [""])[0], count) for name, count in meter.measured.items()}


def dry_run(args):
    """Count the bytes of one step, those that single flags would save, and the longest rows that fit."""
    config = load_config(args.model_name_or_path, dropout=DROPOUT)
    world, size = args.dry_run_world_size, args.per_device_train_batch_size
    changes = {
        "--bf16": {"bf16": True},
        "--gradient_checkpointing": {"gradient_checkpointing": True},
        "--activation_offloading": {"activation_offloading": True},
        "--padding_free": {"padding_free": True},
        f"--loss_chunk_size {args.loss_chunk_size // 4}": {"loss_chunk_size": args.loss_chunk_size // 4},
        f"--per_device_train_batch_size {size // 2}": {"per_device_train_batch_size": size // 2},
        f"--max_length {args.max_length // 2}": {"max_length": args.max_length // 2},
        f"{2 * world} ranks": {"dry_run_world_size": 2 * world},
    }
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
        max_positions(config)[0] or args.max_length,
    )
    print(describe_dry_run(found, args.gpu_memory_gib))
    return {"args": asdict(args), "ledger": ledger, **found}


if __name__ == "__main__":
    run_script(main, Arguments)
