"""Packing: plan_rows against TRL's pack_dataset, on the same lengths: time, rows, tokens lost, growth.

Timed are, of ours, the plan with its assignment of every document (rows are joined later, when a batch needs
them); of TRL, pack_dataset from a data set in memory to the packed one. TRL moves the tokens as well, so they
are made cheap: one byte each. Nothing answers from a cache: data sets in memory have none.

BENCH_MODEL=<folder> BENCH_DATA=<folder> python benchmarks/packing.py
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from harness import ROOT, alternate, case, data_file, parse, write
from transformers import AutoTokenizer

from sft_packing import plan_rows, tokenize

MAX_LENGTH = 2048


def lower_bound(lengths, max_length):
    """Martello and Toth's L2: no packing has fewer rows. Exact, from the histogram of the lengths.

    For each alpha up to half a row: items above max_length - alpha fill a row alone; those above half a row
    need one each, too, and what they leave must take the items from alpha to half a row, or more rows must.

    Args: lengths (E,) ints, 1 <= length <= max_length.
    """
    counts = np.bincount(lengths, minlength=max_length + 1)
    items, tokens = counts.cumsum(), (counts * np.arange(max_length + 1)).cumsum()  # of lengths <= index
    half = max_length // 2
    alpha = np.arange(half + 1)
    large = items[-1] - items[half]  # above half a row
    shared = items[max_length - alpha] - items[half]  # of those, the ones that may share their row
    space = shared * max_length - (tokens[max_length - alpha] - tokens[half])
    small = tokens[half] - np.where(alpha > 0, tokens[alpha - 1], 0)
    further = -((space - small) // max_length)  # ceil((small - space) / max_length)
    return int(large + np.maximum(further, 0).max())


def in_memory(lengths):
    """A data set of these documents, each token one byte."""
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    tokens = np.zeros(offsets[-1], dtype=np.int8)
    return datasets.Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, tokens)}))


def judge(lengths, row_lengths):
    """What a way is judged by; row_lengths (R,): the tokens in each of its rows."""
    assert row_lengths.max() <= MAX_LENGTH, f"a row of {row_lengths.max()} tokens"
    bound, rows = lower_bound(lengths, MAX_LENGTH), len(row_lengths)
    over, lost = rows / bound - 1, int(lengths.sum() - row_lengths.sum())
    return {"rows": rows, "lower_bound": bound, "rows_over_bound": over, "tokens_lost": lost}


def row_lengths(packed):
    """(R,) tokens in each row: of plan_rows' result, or of the data set that TRL has packed."""
    if isinstance(packed, tuple):
        row_offsets, spans = packed
        return np.add.reduceat(spans[:, 2] - spans[:, 1], row_offsets[:-1])
    parts = packed.data.column("input_ids").chunks
    return np.concatenate([part.value_lengths().to_numpy() for part in parts])


def compare(name, lengths, against, repeats):
    """One case: ours; if wanted, TRL as it comes, and with all in one batch of `map` (its fewest rows)."""
    packers = {"ours": partial(plan_rows, lengths, MAX_LENGTH)}
    if against:
        from trl.data_utils import pack_dataset  # here: the bound's tests run without TRL

        trl = partial(pack_dataset, in_memory(lengths), MAX_LENGTH, "bfd")
        packers |= {"TRL": partial(trl, {}), "TRL, one batch": partial(trl, {"batch_size": len(lengths)})}
    results = {}

    def pack(way):
        results[way] = None  # the last repetition's rows are checked afterwards
        results[way] = packers[way]()

    ways = {way: partial(pack, way) for way in packers}
    runs = alternate(ways, repeats, warm_up=int(len(lengths) < 10**6))
    once = {way: judge(lengths, row_lengths(packed)) for way, packed in results.items()}
    setup = {"lengths": name, "documents": len(lengths), "max_length": MAX_LENGTH}
    print(f"packing: {name}, {len(lengths):,} is measured", file=sys.stderr)
    return case(f"{name}, {len(lengths):,}", setup, runs, once)


def main():
    options = parse(__doc__)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    rng = np.random.default_rng(0)
    named = os.environ.get("BENCH_MODEL")
    model = Path(named) if named and not options.quick else ROOT / "demo/model"
    tokenizer = AutoTokenizer.from_pretrained(model)

    def real(name):
        rows = [json.loads(line) for line in open(data_file(name, options, "sft.jsonl"), encoding="utf-8")]
        return np.array([min(len(tokenize(row, tokenizer, False)[0]), MAX_LENGTH) for row in rows])

    chats, problems = real("chat_messages"), real("gsm8k_prompt_completion")
    draws = {
        "lognormal": lambda n: rng.lognormal(5, 0.8, n),
        "gamma": lambda n: rng.gamma(2, 150, n),
        "uniform": lambda n: rng.integers(1, MAX_LENGTH + 1, n),
        "chats, resampled": lambda n: rng.choice(chats, n),
        "GSM8K, resampled": lambda n: rng.choice(problems, n),
    }
    found = {"chats": chats, "GSM8K": problems}
    cases = [compare(name, lengths, True, options.repeats) for name, lengths in found.items()]
    for n in (10**3, 10**4) if options.quick else (10**4, 10**5, 10**6, 10**7):
        for name, draw in draws.items():
            if n < 10**7 or name == "lognormal":
                lengths = np.clip(draw(n), 1, MAX_LENGTH).astype(np.int64)
                # TRL takes some ten seconds for a million: one distribution is enough
                against = n < 10**6 or n == 10**6 and name == "lognormal"
                cases.append(compare(name, lengths, against, options.repeats))
    write("packing", options, f"{model.name} (tokenizer only)", cases)


if __name__ == "__main__":
    main()
