"""Packing: plan_rows against TRL's pack_dataset, on the same lengths: time, rows, tokens lost, growth.

Timed are, of ours, the plan with its assignment of every document (rows are joined later, when a batch needs
them); of TRL, pack_dataset from a data set in memory to the packed one. TRL moves the tokens as well, so they
are made cheap: one byte each. Nothing answers from a cache: data sets in memory have none.

BENCH_MODEL=<folder> BENCH_DATA=<folder> python benchmarks/packing.py
"""

import json
import os
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from harness import ROOT, alternate, case, data_file, parse, ratio, write
from transformers import AutoTokenizer

from sft_packing import plan_rows, tokenize

MAX_LENGTH = 2048
CLASSES = 128  # documents are numbered modulo this: what one byte of a token can hold


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
    """A data set of these documents; each token is its document's number modulo CLASSES, in one byte."""
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    tokens = np.repeat((np.arange(len(lengths)) % CLASSES).astype(np.int8), lengths)
    return datasets.Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, tokens)}))


def checked(lengths, kept, longest, rows):
    """What a way is judged by. kept (CLASSES,): tokens in its rows, by document number modulo CLASSES."""
    assert longest <= MAX_LENGTH, f"a row of {longest} tokens"
    given = np.bincount(np.arange(len(lengths)) % CLASSES, weights=lengths, minlength=CLASSES)
    bound = lower_bound(lengths, MAX_LENGTH)
    lost = int(np.maximum(given - kept, 0).sum())
    return {"rows": rows, "lower_bound": bound, "rows_over_bound": rows / bound - 1, "tokens_lost": lost}


def check_ours(lengths, plan):
    row_offsets, spans = plan
    size = spans[:, 2] - spans[:, 1]
    kept = np.bincount(spans[:, 0] % CLASSES, weights=size, minlength=CLASSES)
    return checked(lengths, kept, np.add.reduceat(size, row_offsets[:-1]).max(), len(row_offsets) - 1)


def check_trl(lengths, packed):
    kept, longest = np.zeros(CLASSES), 0
    for part in packed.data.column("input_ids").chunks:
        tokens = part.flatten().to_numpy()
        for start in range(0, len(tokens), 10**7):  # bincount makes eight bytes of each
            kept += np.bincount(tokens[start : start + 10**7], minlength=CLASSES)
        longest = max(longest, part.value_lengths().to_numpy().max())
    return checked(lengths, kept, longest, len(packed))


def measure(name, lengths, ours_only, one_batch, repeats):
    """One case: ours, TRL as it comes, and TRL with all documents in one batch of `map` (its fewest rows)."""
    from trl.data_utils import pack_dataset  # here: the bound's tests run without TRL

    dataset = None if ours_only else in_memory(lengths)
    packers = {"ours": partial(plan_rows, lengths, MAX_LENGTH)}
    if not ours_only:
        packers["TRL"] = partial(pack_dataset, dataset, MAX_LENGTH, "bfd", {})
    if not ours_only and one_batch:
        packers["TRL, one batch"] = partial(
            pack_dataset, dataset, MAX_LENGTH, "bfd", {"batch_size": len(lengths)}
        )
    results = {}

    def pack(way):
        results[way] = None  # the last repetition's rows are checked afterwards
        results[way] = packers[way]()

    ways = {way: partial(pack, way) for way in packers}
    runs = alternate(ways, repeats, warm_up=int(len(lengths) < 10**6))
    once = {way: (check_ours if way == "ours" else check_trl)(lengths, results[way]) for way in ways}
    setup = {
        "lengths": name,
        "documents": len(lengths),
        "mean_length": float(lengths.mean()),
        "max_length": MAX_LENGTH,
        "timed": "ours: plan and assignment. TRL: pack_dataset in memory, one byte a token, nothing cached",
    }
    found = case(f"{name}, {len(lengths):,}", setup, runs, once)
    found["ratios"] = {way: ratio(found, "ours", way) for way in ways if way != "ours"}
    for way, values in found["ways"].items():
        factor = f"{found['ratios'][way]['median']:7.1f}x" if way != "ours" else ""
        print(
            f"{found['case']:<34}{way:<16}{values['median']['seconds']:9.4f} s {values['rows']:9,} rows, "
            f"{values['rows_over_bound']:7.3%} over L2, {values['tokens_lost']} tokens lost {factor}",
            flush=True,
        )
    return found


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
    cases, repeats = [], options.repeats
    for name, lengths in (("chats", chats), ("GSM8K", problems)):
        cases.append(measure(name, lengths, False, True, repeats))
    for n in (10**3, 10**4) if options.quick else (10**4, 10**5, 10**6, 10**7):
        for name, draw in draws.items():
            if n == 10**7 and name != "lognormal":
                continue
            lengths = np.clip(draw(n), 1, MAX_LENGTH).astype(np.int64)
            one_batch = n < 10**5 or name == "lognormal"  # TRL takes as long again for it
            # TRL takes some ten seconds for a million: one distribution is enough
            ours_only = n > 10**6 or n == 10**6 and name != "lognormal"
            cases.append(measure(name, lengths, ours_only, one_batch, repeats))
    write("packing", options, f"{model.name} (tokenizer only)", cases)


if __name__ == "__main__":
    main()
