"""SFT with packing: pay for tokens, not for padding.

Padded, a step computes B * max(T_i) tokens; packed, sum(T_i), in rows filled to max_length by
best-fit-decreasing. Attention costs sum(T_i^2), the loss head chunk * V elements instead of N * V, and the
result is the same to the last rounding: each document sees itself alone, and each scored token of the step
weighs the same. With --activation_offloading, what backward needs waits on the host, layer by layer.
Dropout is as the model's configuration says.
Left out to stay readable: LoRA, vision inputs, tools in chats, mixture-of-experts balancing.

Words: an example is what the dataset holds; a document is its tokens, or a piece of them; a row is what a
forward sees of several documents, one after another.

laptop   python sft_packing.py
1 GPU    python sft_packing.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara --bf16
8 GPUs   torchrun --standalone --nproc_per_node 8 sft_packing.py --model_name_or_path Qwen/Qwen3-8B ...
no GPU   python sft_packing.py --dry_run --dry_run_world_size 8 --gpu_memory_gib 80 ... says what fits
Sources: arXiv 2107.02027 (histogram packing), arXiv 2404.10830 (best-fit packing)
"""

import bisect
import hashlib
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from datasets import Features, List, Value

from common import refuse
from common.collators import IGNORE, add_scored, count_padding, flatten, pad
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
    template_kwargs,
    text_ids,
    unused_columns,
)
from common.exactness import NUM_TOKENS, check_exact, logps_alone, nothing_random, proof_tokens
from common.logps import at_scored, liger_nll_sum, nll_sum
from common.memory import DryRun, MemoryMeter, count_step, dry_run, pretend, single_changes
from common.offload import OffloadActivations
from common.run import DATA, FILES, ROOT, Epochs, Run, Tally, check_finite, clip_gradients, flag, run_script
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
    parameter_groups,
    read_pretrained,
    save_model,
    save_training_state,
    set_kernels,
    try_to_write,
)
from common.truncation import check_limit, fit_to_length

# --- 1. Arguments ---


@dataclass
class Arguments(ShardedArguments):
    dataset_name: str = flag(
        str(ROOT / "demo/sft.jsonl"), "Hub name, file, or folder written by save_to_disk", DATA
    )
    output_dir: str = flag("outputs/sft", "folder for model, checkpoints, metrics.jsonl, summary.json", FILES)

    max_length: int = flag(512, "tokens: the longest document, and the length of a packed row", at_least=2)
    overflow: Literal["truncate", "split", "drop", "error"] | None = flag(
        None, "examples over max_length; default: truncate, or split where the packing splits"
    )
    packing: bool = flag(True, "fill rows of max_length with whole documents")
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = flag(
        "bfd", "whole documents, best fit first; the same, long ones split; one stream, cut every max_length"
    )
    assistant_only_loss: bool = flag(False, "score assistant turns only; the template must mark them")
    per_device_train_batch_size: int = flag(2, "rows, or without packing examples, per forward", at_least=1)
    liger_cross_entropy: bool = flag(False, "Liger's fused linear cross entropy, which sizes its own chunks")


def check_arguments(args):
    """Raise ValueError for values and combinations that would be wrong or ignored."""
    check_sharded_arguments(args, is_flat(args))
    strategy, splits = args.packing_strategy, args.packing_strategy != "bfd"
    refuse(splits and not args.packing, f"--packing_strategy {strategy} needs packing: drop --no_packing.")
    cut = (
        f"--packing_strategy {strategy} splits long examples, --overflow {args.overflow} does not: drop one."
    )
    refuse(splits and args.overflow not in (None, "split"), cut)
    pads = args.packing and not args.padding_free
    refuse(pads, "--no_padding_free pads, packing never does: add --no_packing for padded batches.")
    overwritten = (
        "--activation_offloading with Liger's cross entropy would offload logits that Liger overwrites in "
        "place.\nKeep --use_liger_kernel and drop --liger_cross_entropy, or drop --activation_offloading."
    )
    refuse(args.activation_offloading and args.liger_cross_entropy, overwritten)
    refuse(args.dry_run and args.liger_cross_entropy, "--dry_run cannot look into --liger_cross_entropy.")
    ignored = args.liger_cross_entropy and args.loss_chunk_size is not None
    refuse(ignored, "--loss_chunk_size with --liger_cross_entropy, which chooses its own: drop one.")


def is_flat(args):
    return args.packing or args.padding_free


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


def find_columns(examples, name, pretrained, args):
    """Which of TYPES the dataset is. Raises ValueError for columns, templates and flags that do not fit."""
    found = [columns for columns in TYPES if set(columns) <= set(examples.column_names)]
    wanted = "messages, or text, or prompt and completion"
    refuse(not found, f"{name} has the columns {', '.join(examples.column_names)}; wanted: {wanted}.")
    chat = isinstance(examples[0][found[0][0]], list)
    plain = f"--assistant_only_loss needs conversations; {name} holds plain text."
    refuse(args.assistant_only_loss and not chat, plain)
    if chat:
        check_chat_template(pretrained.tokenizer, name, args.model_name_or_path, args.assistant_only_loss)
    return found[0]


def load_documents(name, split, pretrained, args):
    """Tokenised examples, and the documents in them, of max_length tokens at most (`wrapped` cuts later).

    Returns: a datasets.Dataset with input_ids and labels; documents (D, 3) int64, each (example, start, stop)
             with a scored token; the counts for summary.json.
    """
    examples, tokenizer = load_rows(name, split), pretrained.tokenizer
    columns = find_columns(examples, name, pretrained, args)
    # the cache's key is a hash of all that a function refers to, so `encode` must not refer to args
    assistant_only_loss, end_ids = args.assistant_only_loss, end_token_ids(tokenizer, pretrained.eos_token_id)
    limit = None if args.packing_strategy == "wrapped" else args.max_length
    overflow = args.overflow or ("truncate" if args.packing_strategy == "bfd" else "split")

    def encode(example, index):
        input_ids, labels = tokenize(example, tokenizer, assistant_only_loss, end_ids)
        pieces = fit_to_length(input_ids, labels, limit, overflow)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "num_tokens": len(input_ids),
            "piece_tokens": [len(ids) for ids, _ in pieces],
            # a document's first token is never predicted
            "piece_scored": [sum(label != IGNORE for label in labels[1:]) for _, labels in pieces],
            "repeats": "completion" in example and repeats_prompt(example["prompt"], example["completion"]),
        }

    numbers = List(Value("int64"))  # datasets would guess from the first ones, which may all be dropped
    columns_made = ("input_ids", "labels", "piece_tokens", "piece_scored")
    ones = {"num_tokens": Value("int64"), "repeats": Value("bool")}
    features = Features(dict.fromkeys(columns_made, numbers) | ones)
    encoded = map_rows(examples, encode, name, __file__, args.dataset_num_proc, features)
    check_repeats(name, encoded["repeats"][:])
    check_token_ids(encoded, pretrained.vocab_size, name)
    lengths = np.array(encoded["num_tokens"][:])
    documents = [  # fit_to_length cuts every max_length tokens
        (example, i * args.max_length, i * args.max_length + num_tokens)
        for example, pieces in enumerate(zip(encoded["piece_tokens"][:], encoded["piece_scored"][:]))
        for i, (num_tokens, num_scored) in enumerate(zip(*pieces))
        if num_scored
    ]
    documents = np.array(documents, dtype=np.int64).reshape(-1, 3)
    data = describe(lengths, documents, args.max_length, overflow)
    none = f"{name} has no example with a scored token within --max_length {args.max_length}: {data}."
    refuse(len(documents) == 0, none)
    data["columns_unused"] = unused_columns(examples, columns)
    return encoded, documents, data


def describe(lengths, documents, max_length, overflow):
    """What became of the examples: their lengths (E,) in tokens, and the documents (D, 3) in them."""
    too_long, used = lengths > max_length, np.unique(documents[:, 0])
    num_long = int(too_long[used].sum())
    dropped = int(too_long.sum()) if overflow == "drop" else 0
    excess = {"truncate": lengths - max_length, "drop": lengths}.get(overflow, np.zeros_like(lengths))
    kept, cut = int((documents[:, 2] - documents[:, 1]).sum()), int(excess[too_long].sum())
    return {
        "examples_read": len(lengths),
        "examples_used": len(used),
        "examples_unscored": len(lengths) - len(used) - dropped,
        "examples_truncated": num_long if overflow == "truncate" else 0,
        "examples_split": num_long if overflow == "split" else 0,
        "examples_dropped": dropped,
        "tokens_cut": cut,
        "tokens_kept": kept,
        "tokens_unscored": int(lengths.sum()) - kept - cut,
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


class Rows(Epochs):
    """Rows of a plan, joined from the tokenised examples when a batch needs them, not in advance."""

    def __init__(self, examples, documents, data, args, pretrained, world):
        super().__init__(args, world)
        self.examples, self.documents = examples, documents
        self.arrays = examples.with_format("numpy", columns=["input_ids", "labels"])
        self.pad_token_id = pretrained.tokenizer.pad_token_id or 0  # masked: any id will do
        lengths = documents[:, 2] - documents[:, 1]
        if args.packing:
            strategy = args.packing_strategy.removesuffix("_split")
            self.row_offsets, spans = plan_rows(lengths, args.max_length, strategy, args.seed)
        else:
            self.row_offsets = np.arange(len(lengths) + 1)
            spans = np.stack([self.row_offsets[:-1], np.zeros_like(lengths), lengths], axis=1)
        if args.packing_strategy == "wrapped":
            data["examples_split"] = int((np.bincount(spans[:, 0]) > 1).sum())
        # of documents -> of examples
        offsets = documents[spans[:, 0]]
        self.spans = np.stack(
            [offsets[:, 0], offsets[:, 1] + spans[:, 1], offsets[:, 1] + spans[:, 2]], axis=1
        )
        data["rows"] = len(self)
        data["fill_fraction"] = int(lengths.sum()) / (len(self) * args.max_length)

    def __len__(self):
        return len(self.row_offsets) - 1

    def fingerprint(self):
        """Names this data and plan: a position in it means nothing in another one."""
        name = hashlib.sha256(self.spans.tobytes() + self.row_offsets.tobytes() + b"%d" % self.args.seed)
        for column in ("input_ids", "labels"):
            for batch in self.examples.with_format("arrow").iter(10_000):
                values = batch[column].combine_chunks().flatten()
                name.update(values.to_numpy(zero_copy_only=False).tobytes())
        return name.hexdigest()

    def cut(self, numbers):
        """Row numbers -> micro-batches of so many."""
        size = self.args.per_device_train_batch_size
        return (numbers[i : i + size] for i in range(0, len(numbers), size))

    def spans_of(self, numbers):
        return np.concatenate([self.spans[self.row_offsets[n] : self.row_offsets[n + 1]] for n in numbers])

    def name(self, numbers):
        """What an error message says of these rows."""
        return f"Rows {numbers.tolist()}, examples {sorted(set(self.spans_of(numbers)[:, 0].tolist()))}."

    def batch(self, numbers):
        """The batch of these rows: flat (no padding), or padded. No rows: two tokens, neither scored."""
        if len(numbers) == 0:
            return self.collate([{"input_ids": [0, 0], "labels": [IGNORE, IGNORE]}])
        spans = self.spans_of(numbers)
        found = self.arrays[spans[:, 0].tolist()]  # whole examples, of which a span may be a small part
        return self.collate(
            [
                {"input_ids": input_ids[start:stop], "labels": labels[start:stop]}
                for input_ids, labels, (_, start, stop) in zip(
                    found["input_ids"], found["labels"], spans.tolist()
                )
            ]
        )

    def collate(self, documents):
        flat = is_flat(self.args)
        return add_scored(flatten(documents) if flat else pad(documents, self.pad_token_id))


# --- 4. Loss ---


def loss_head(args):
    """Function of hidden (M, H), weight (V, H), target_ids (M,), bias: the sum of the negative
    log-likelihood, () float32. Its gradient is made in forward already: backward only scales it.
    """
    if args.liger_cross_entropy:
        return lambda hidden, weight, ids, bias: liger_nll_sum(hidden, weight, ids, bias=bias)
    chunk_size = args.loss_chunk_size
    return lambda hidden, weight, ids, bias: nll_sum(hidden, weight, ids, bias=bias, chunk_size=chunk_size)


def batch_loss(model, batch, args):
    """The loss, a sum over the batch's scored tokens; and further {name: sum}, of which the metrics have the
    mean over scored tokens.
    """
    loss = at_scored(model, batch, loss_head(args))
    return loss, {}


def set_kernels_and_prove(model, rows, args, run):
    """Set attention and kernels; prove on a few documents that the run computes what transformers does."""
    ids = []
    for example, start, stop in rows.documents[[0, -1, 0]].tolist():  # the first one at two places
        whole = rows.examples[example]["input_ids"][start:stop]
        ids.append(proof_tokens(whole, model.config, args.max_length))
    sequences = [(each, min(len(each) - 1, NUM_TOKENS)) for each in ids]
    expected = logps_alone(model, sequences, run.device) if args.check_exact else None
    set_kernels(model, args, is_flat(args))
    if not args.check_exact:
        return

    def each_alone(hidden, weight, target_ids, bias):  # the head gives sums: of one token at a time, then
        head = loss_head(args)
        tokens = zip(hidden.split(1), target_ids.split(1))
        return -torch.stack([head(one, weight, target, bias) for one, target in tokens])

    documents = [
        {"input_ids": each, "labels": [IGNORE] * (len(each) - scored) + each[len(each) - scored :]}
        for each, scored in sequences
    ]
    batch = run.to_device(rows.collate(documents))
    what = "in a packed row" if is_flat(args) else "in a padded batch"
    remedy = "Use --no_packing --no_padding_free" if is_flat(args) else "Drop --use_liger_kernel, if given,"
    check_exact(
        model,
        expected,
        lambda: at_scored(model, batch, each_alone),
        bf16=args.bf16,
        max_length=args.max_length,
        what=what,
        remedy=f"{remedy} or choose another model.",
    )


# --- 5. Training ---


def prepare_training(model, args, run):
    """What a real run and a dry run have to share: the optimizer, and what waits on the host.

    The place to freeze what is not to be trained: model.get_input_embeddings().requires_grad_(False), say.
    """
    groups = parameter_groups(model, args.weight_decay)
    # fused: the default makes temporaries as large as the weights while it updates
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    offloads = args.activation_offloading
    offload = OffloadActivations(model, decoder_layers(model), run.device) if offloads else None
    return optimizer, offload


def train_step(model, optimizer, batches, args, run, offload=None):
    """One optimizer step over this rank's micro-batches; without a scored token it changes nothing.

    Returns: counts over all ranks: num_scored_tokens, num_tokens (computed), padding among these; means over
             the scored tokens: loss, and what else `batch_loss` names; and grad_norm, before clipping.
    Raises:  FloatingPointError, before the update, if loss or gradient are not finite.
    """
    counts = {
        "num_scored_tokens": sum(len(batch["score_ids"]) for batch in batches),
        "num_tokens": sum(batch["input_ids"].numel() for batch in batches),
        "padding": sum(map(count_padding, batches)),
    }
    counts = run.sum(counts)
    # The mean runs over the scored tokens of the whole step, all micro-batches and all ranks: one batch of 8,
    # 8 batches of 1 and 2 ranks of 4 take the same step.
    num_items_in_batch = counts["num_scored_tokens"]
    if not num_items_in_batch:  # wrapped rows of a long prompt: not even AdamW's momentum may move a weight
        return dict.fromkeys(counts, 0.0), {"loss": 0.0, "grad_norm": 0.0}
    tally = Tally()
    for batch in batches:
        with offload or nullcontext():
            loss, sums = batch_loss(model, run.to_device(batch), args)
        # FSDP averages gradients over ranks: times world cancels that
        (loss * (run.world / num_items_in_batch)).backward()
        tally.add({"loss": loss, **sums})
    if offload:
        offload.end_step()
    grad_norm = run.value(clip_gradients(model, args.max_grad_norm))
    means = {name: total / num_items_in_batch for name, total in tally.of_all_ranks(run).items()}
    check_finite(means["loss"], grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return counts, means | {"grad_norm": grad_norm}


@torch.no_grad()
def evaluate(model, rows, args, run):
    """Means of `batch_loss` per scored token over all rows and ranks."""
    tally = Tally()
    for batch in rows.micro_batches(rows.in_order(), run):
        run.watch("evaluation")
        with nothing_random(model):
            loss, sums = batch_loss(model, run.to_device(batch), args)
        tally.add({"loss": loss, **sums, "scored": len(batch["score_ids"])})
    sums = tally.of_all_ranks(run)
    scored = max(sums.pop("scored"), 1)
    check_finite(sums["loss"] / scored)
    return {f"eval_{name}": total / scored for name, total in sums.items()}


def prepare_data(args, pretrained, world):
    """Returns training rows, evaluation rows (None without --eval_dataset_name), and counts."""
    *found, data = load_documents(args.dataset_name, args.dataset_train_split, pretrained, args)
    rows, eval_rows = Rows(*found, data, args, pretrained, world), None
    if args.eval_dataset_name:
        *found, data["eval"] = load_documents(
            args.eval_dataset_name, args.dataset_test_split, pretrained, args
        )
        eval_rows = Rows(*found, data["eval"], args, pretrained, world)
    return rows, eval_rows, data


def main(args):
    """Train. Returns what summary.json holds; {"stopped_at_step": step} if stopped; of a dry run, its
    counts. Raises what `Run` says.
    """
    check_arguments(args)
    if args.dry_run:
        return explore(args)
    with Run(args, "SFT") as run:
        torch.manual_seed(args.seed + run.rank)  # for dropout; the order of the data has its own generator
        pretrained = read_pretrained(args.model_name_or_path, args.max_length)
        if args.use_liger_kernel or args.liger_cross_entropy:
            check_liger(pretrained.config.model_type if args.use_liger_kernel else None)
        rows, eval_rows, data = run.on_each_machine(prepare_data, args, pretrained, run.world)
        run.resume()
        run.match("data", rows.fingerprint(), "Use its dataset, max_length and seed.")
        run.plan(rows.count_steps(run.progress))

        model = load_model(args, run, pretrained)
        set_kernels_and_prove(model, rows, args, run)
        optimizer, offload = prepare_training(model, args, run)
        run.match("optimizer", type(optimizer).__name__, "Use the one that it was trained with.")
        run.match("frozen_parameters", frozen_names(model), "Freeze what was frozen, or begin a new run.")
        if run.checkpoint:
            load_training_state(run, model, optimizer)
        try_to_write(run, model, pretrained)  # what cannot be written shows now, not after the last step
        run.start(data)
        options = {"offload": offload, "state_on_host": args.offload_param}
        meter = MemoryMeter(model, optimizer, run.device, args.measure_memory, run.counted_step, **options)

        for numbers, batches in rows.remaining_steps(run):
            with run.step(optimizer, partial(rows.name, numbers)), meter.step(batches):
                counts, means = train_step(model, optimizer, batches, args, run, offload)
            run.progress["updates"] += counts["num_scored_tokens"] > 0
            metrics = {
                "epoch": rows.advance(run.progress, numbers),
                **means,
                "num_tokens": counts["num_tokens"],
                "num_scored_tokens": counts["num_scored_tokens"],
            }
            if eval_rows and (run.due(args.eval_steps) or not run.unfinished):
                metrics |= evaluate(model, eval_rows, args, run)
            run.log(
                metrics, padding=counts["padding"], counts=not meter.counting, peak_bytes=meter.peak_bytes()
            )
            if run.save_when_due(lambda folder: save_training_state(folder, run, model, optimizer)):
                return {"stopped_at_step": run.progress["step"]}

        save_model(run, model, pretrained)
        data["padding_fraction"] = run.totals["padding"] / max(run.totals["num_tokens"], 1)
        return run.finish(data, meter.ledger(), offload and offload.report())


# --- 6. Memory before the GPU ---


def pretend_step(args, pretrained):
    """The bytes that one optimizer step holds on a rank, with as many tokens as the flags allow, all scored:
    {name: bytes}, and when the peak is.
    """
    documents = [{"input_ids": [0] * args.max_length, "labels": [0] * args.max_length}]
    documents *= args.per_device_train_batch_size
    batch = add_scored(flatten(documents) if is_flat(args) else pad(documents, 0))
    if not is_flat(args):
        batch["attention_mask"][0, -1] = 0  # one token of padding, so that there is a mask
    # later micro-batches hold what the second does
    batches = [batch] * (2 if args.gradient_accumulation_steps > 1 or args.offload_param else 1)
    with pretend(args, is_sharded(args, args.dry_run_world_size)) as run:
        model = load_model(args, run, pretrained)
        set_kernels(model, args, is_flat(args), pretends=True)
        optimizer, offload = prepare_training(model, args, run)
        step = partial(train_step, model, optimizer, batches, args, run, offload)
        return count_step(step, batches, model, optimizer, offload, (), args.offload_param)


def explore(args):
    """Count the bytes of one step; say whether it fits, what would help, and the longest rows that fit."""
    pretrained = read_pretrained(args.model_name_or_path, args.max_length, config_only=True)
    size = args.per_device_train_batch_size
    switches = ("bf16", "padding_free", "gradient_checkpointing")
    changes, others = single_changes(args, switches, size, ["max_length"])
    return dry_run(
        DryRun(args, check_arguments, partial(pretend_step, pretrained=pretrained)),
        changes,
        others,
        what=f"{size} x {args.max_length} tokens",
        host_flags=["--offload_param"],
        length_flag="max_length",
        most=max_positions(pretrained.config)[0] or args.max_length,
    )


if __name__ == "__main__":
    run_script(main, Arguments)
