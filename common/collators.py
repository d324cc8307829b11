"""Sequences -> the batch that the model sees: padded (the baseline), or one flat row without padding."""

import os

import torch
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100  # transformers' and cross_entropy's "not scored"


def _tensors(sequences):
    """input_ids and labels of each sequence, (T_i,) int64; each first label is -100."""
    if len(sequences) == 0:
        raise ValueError("no sequences: a batch needs at least one.")
    input_ids = [torch.tensor(s["input_ids"], dtype=torch.int64) for s in sequences]
    labels = [torch.tensor(s["labels"], dtype=torch.int64) for s in sequences]
    for i, (ids, marks) in enumerate(zip(input_ids, labels)):
        if len(ids) != len(marks) or len(ids) == 0:
            lengths = f"{len(ids)} input_ids and {len(marks)} labels"
            raise ValueError(f"sequence {i} has {lengths}; they must be of one length, at least 1.")
        # Without this, the last token of one document would be trained to predict the first of the next.
        marks[0] = IGNORE
    return input_ids, labels


def _offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def pad(sequences, pad_token_id):
    """Stack B sequences, padded on the right to the longest: B * max(T_i) tokens.

    Args:    sequences: dicts with input_ids and labels, lists of one length T_i >= 1; labels -100 = unscored.
             pad_token_id: may equal a real token's id: the mask comes from the lengths, never from the ids.
    Returns: input_ids, attention_mask, labels (B, T) int64. Each sequence's first label is -100.
    Raises:  ValueError for no sequences, an empty one, or lists of different lengths.

    >>> batch = pad([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}], 0)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].tolist()
    ([[5, 6], [7, 0]], [[-100, 6], [-100, -100]], [[1, 1], [1, 0]])
    """
    input_ids, labels = _tensors(sequences)
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    }


def flatten(sequences):
    """Join B sequences into one flat row: sum(T_i) tokens, no padding.

    Args:    sequences: dicts with input_ids and labels, lists of one length T_i >= 1; labels -100 = unscored.
    Returns: input_ids, labels, position_ids (1, N) int64; cu_seq_lens_q, cu_seq_lens_k (B+1,) int32;
             max_length_q, max_length_k int. Each document's first label is -100: nothing precedes it.
    Raises:  ValueError for no sequences, an empty one, or lists of different lengths.
    Source:  transformers.DataCollatorWithFlattening gives the same keys.

    >>> row = flatten([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}])
    >>> row["position_ids"].tolist(), row["labels"].tolist()
    ([[0, 1, 0]], [[-100, 6, -100]])
    """
    input_ids, labels = _tensors(sequences)
    lengths = [len(ids) for ids in input_ids]
    return {
        "input_ids": torch.cat(input_ids)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": _offsets(lengths),
        "cu_seq_lens_k": _offsets(lengths),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def add_scored(batch):
    """What the loss head sees of a batch of `pad` or `flatten`, beside that batch.

    Args:    batch: labels (B, T) int64; each sequence's first label is -100.
    Returns: batch with score_index (M,) int64: which flattened position, of B * T, predicts the m-th scored
             token; score_ids (M,) int64: that token.

    >>> batch = add_scored(pad([{"input_ids": [5, 6], "labels": [5, 6]}] * 2, 0))
    >>> batch["score_index"].tolist(), batch["score_ids"].tolist()
    ([0, 2], [6, 6])
    """
    # position t predicts the label at t + 1
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
    score_index = (targets != IGNORE).nonzero()[:, 0]
    return batch | {"score_index": score_index, "score_ids": targets[score_index]}


def count_padding(batch):
    """How many of a batch's tokens are padding, () int64: 0 in a flat row, which has no mask."""
    # a tensor still: in a dry run it has no value to read
    return (batch["attention_mask"] == 0).sum() if "attention_mask" in batch else 0


def _root_length(prompts):
    """How many tokens all prompts begin with; each keeps one of its own, and a single one keeps all."""
    # in spite of its name, commonprefix takes lists of anything
    return len(os.path.commonprefix([prompt[:-1] for prompt in prompts])) if len(prompts) > 1 else 0


def flatten_shared_prompt(groups):
    """Lay each prompt out once, before its G completions: P + sum(C_i) tokens instead of G*P + sum(C_i).

    The row is a tree. Each segment of queries is a node; its keys are those of the nodes above it and its
    own, picked by kv_index, and with causal masks aligned bottom-right it sees nothing else:

        root  r                  keys r            what all prompts begin with: a system prompt, examples
          prompt  p              keys r, p         the rest of each prompt, one token at least
            completion  c        keys r, p, c

    A completion's first token is predicted by its prompt's last token, which lies up to sum(C_i) tokens back
    in the row: labels shifted by one cannot say so. Use score_index, and read labels only for what is scored.

    Args:    groups: [(prompt_ids, [completion_ids, ..]), ..]; P >= 1, G >= 1, each C_i >= 1. One group has no
             root: all of its prompt is its own.
    Returns: the keys of `flatten`, with kv_index (Nk,) int64; labels (1, N) int64, -100 on prompts;
             position_ids of a completion start at P;
             score_index (M,) int64: the row position whose hidden state predicts the m-th completion token;
             score_ids (M,) int64: that token; completion_lengths (sum of G,) int64: how many each one has.
    Raises:  ValueError for no groups, an empty prompt or completion, or a group without completions.

    >>> row = flatten_shared_prompt([([1, 2], [[3, 4], [5]])])
    >>> row["input_ids"].tolist(), row["position_ids"].tolist(), row["kv_index"].tolist()
    ([[1, 2, 3, 4, 5]], [[0, 1, 2, 3, 2]], [0, 1, 0, 1, 2, 3, 0, 1, 4])
    >>> row["score_index"].tolist(), row["score_ids"].tolist()
    ([1, 2, 1], [3, 4, 5])
    >>> flatten_shared_prompt([([1, 2], [[3]]), ([1, 4], [[5]])])["input_ids"].tolist()
    [[1, 2, 3, 4, 5]]
    """
    if len(groups) == 0:
        raise ValueError("no groups: a row needs at least one prompt with its completions.")
    input_ids, labels, position_ids, kv_index, score_index = [], [], [], [], []
    lengths_q, lengths_k, completion_lengths = [], [], []

    def lay_out(ids, above, scored=False):
        """Add a node below the row positions `above`. Returns these and its own."""
        own = range(len(input_ids), len(input_ids) + len(ids))
        input_ids.extend(ids)
        labels.extend(ids if scored else [IGNORE] * len(ids))
        position_ids.extend(range(len(above), len(above) + len(ids)))
        seen = [*above, *own]
        kv_index.extend(seen)
        lengths_q.append(len(ids))
        lengths_k.append(len(seen))
        return seen

    prompts = [list(prompt_ids) for prompt_ids, _ in groups]
    shared = _root_length(prompts)
    root = lay_out(prompts[0][:shared], []) if shared else []
    for g, (prompt_ids, (_, completions)) in enumerate(zip(prompts, groups)):
        if len(prompt_ids) == 0 or len(completions) == 0 or any(len(c) == 0 for c in completions):
            raise ValueError(f"group {g} has an empty prompt or completion, or no completions.")
        prompt = lay_out(prompt_ids[shared:], root)
        for completion_ids in completions:
            seen = lay_out(completion_ids, prompt, scored=True)
            score_index += seen[len(prompt) - 1 : -1]
            completion_lengths.append(len(completion_ids))
    labels = torch.tensor(labels)
    return {
        "input_ids": torch.tensor(input_ids)[None],
        "labels": labels[None],
        "position_ids": torch.tensor(position_ids)[None],
        "cu_seq_lens_q": _offsets(lengths_q),
        "cu_seq_lens_k": _offsets(lengths_k),
        "max_length_q": max(lengths_q),
        "max_length_k": max(lengths_k),
        "kv_index": torch.tensor(kv_index),
        "score_index": torch.tensor(score_index),
        "score_ids": labels[labels != IGNORE],
        "completion_lengths": torch.tensor(completion_lengths),
    }
