"""Sequences -> the batch that the model sees: padded (the baseline) or one flat row without a padding
token.
"""

import torch

IGNORE = -100  # transformers' and cross_entropy's "not scored"


def _check(sequences):
    if len(sequences) == 0:
        raise ValueError("no sequences: a batch needs at least one.")
    for i, sequence in enumerate(sequences):
        if len(sequence["input_ids"]) != len(sequence["labels"]):
            lengths = f"{len(sequence['input_ids'])} input_ids and {len(sequence['labels'])} labels"
            raise ValueError(f"sequence {i} has {lengths}; they must be of one length.")
        if len(sequence["input_ids"]) == 0:
            raise ValueError(f"sequence {i} is empty; drop it before batching.")


def _offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def pad(sequences, pad_token_id):
    """Stack B sequences, padded on the right to the longest: B * max(T_i) tokens.

    Args:    sequences: dicts with input_ids and labels, lists of one length T_i >= 1; labels -100 = not
             scored. pad_token_id: may equal a real token's id: the mask comes from the lengths, never from
             the ids.
    Returns: input_ids, attention_mask, labels (B, T) int64. Each sequence's first label is -100.
    Raises:  ValueError for no sequences, an empty one, or lists of different lengths.

    >>> batch = pad([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}], 0)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].tolist()
    ([[5, 6], [7, 0]], [[-100, 6], [-100, -100]], [[1, 1], [1, 0]])
    """
    _check(sequences)
    shape = len(sequences), max(len(s["input_ids"]) for s in sequences)
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORE)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for b, sequence in enumerate(sequences):
        length = len(sequence["input_ids"])
        input_ids[b, :length] = torch.as_tensor(sequence["input_ids"])
        labels[b, :length] = torch.as_tensor(sequence["labels"])
        attention_mask[b, :length] = 1
    labels[:, 0] = IGNORE
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def flatten(sequences):
    """Join B sequences into one flat row: sum(T_i) tokens, no padding.

    Args:    sequences: dicts with input_ids and labels, lists of one length T_i >= 1; labels -100 = not
             scored.
    Returns: input_ids, labels, position_ids (1, N) int64; cu_seq_lens_q, cu_seq_lens_k (B+1,) int32;
             max_length_q, max_length_k int. Each document's first label is -100: nothing precedes it.
    Raises:  ValueError for no sequences, an empty one, or lists of different lengths.
    Source:  transformers.DataCollatorWithFlattening gives the same keys.

    >>> row = flatten([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}])
    >>> row["position_ids"].tolist(), row["labels"].tolist()
    ([[0, 1, 0]], [[-100, 6, -100]])
    """
    _check(sequences)
    lengths = [len(s["input_ids"]) for s in sequences]
    offsets = _offsets(lengths)
    input_ids = torch.cat([torch.as_tensor(s["input_ids"], dtype=torch.int64) for s in sequences])
    labels = torch.cat([torch.as_tensor(s["labels"], dtype=torch.int64) for s in sequences])
    # Without this, the last token of one document would be trained to predict the first of the next.
    labels[offsets[:-1].long()] = IGNORE
    return {
        "input_ids": input_ids[None],
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def flatten_shared_prompt(groups):
    """Lay each prompt out once, before its G completions: P + sum(C_i) tokens instead of G*P + sum(C_i).

    Query segments: prompt, c1, .., cG. Key segments: prompt, prompt+c1, .., prompt+cG, picked by kv_index.
    With causal masks aligned bottom-right, each completion sees its prompt and itself, and nothing else.

    A completion's first token is predicted by the prompt's last token, which lies up to sum(C_i) tokens back
    in the row: labels shifted by one cannot say so. Use score_index, and read labels only for what is scored.

    Args:    groups: [(prompt_ids, [completion_ids, ..]), ..]; P >= 1, G >= 1, each C_i >= 1.
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
    """
    if len(groups) == 0:
        raise ValueError("no groups: a row needs at least one prompt with its completions.")
    input_ids, labels, position_ids, kv_index, score_index = [], [], [], [], []
    lengths_q, lengths_k, completion_lengths = [], [], []
    for g, (prompt_ids, completions) in enumerate(groups):
        if len(prompt_ids) == 0 or len(completions) == 0 or any(len(c) == 0 for c in completions):
            raise ValueError(f"group {g} has an empty prompt or completion, or no completions.")
        prompt_start, prompt_length = len(input_ids), len(prompt_ids)
        prompt = range(prompt_start, prompt_start + prompt_length)
        input_ids += list(prompt_ids)
        labels += [IGNORE] * prompt_length
        position_ids += range(prompt_length)
        kv_index += prompt
        lengths_q.append(prompt_length)
        lengths_k.append(prompt_length)
        for completion_ids in completions:
            start, length = len(input_ids), len(completion_ids)
            input_ids += list(completion_ids)
            labels += list(completion_ids)
            position_ids += range(prompt_length, prompt_length + length)
            kv_index += [*prompt, *range(start, start + length)]
            score_index += [prompt[-1], *range(start, start + length - 1)]
            lengths_q.append(length)
            lengths_k.append(prompt_length + length)
            completion_lengths.append(length)
    score_index = torch.tensor(score_index)
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
        "score_index": score_index,
        "score_ids": labels[labels != IGNORE],
        "completion_lengths": torch.tensor(completion_lengths),
    }
