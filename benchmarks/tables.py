"""README's tables, written from benchmarks/results/*.json, and its lists of flags, from the scripts.

python benchmarks/tables.py           writes what stands between <!-- table: NAME --> and <!-- end -->
python benchmarks/tables.py --check   ends with 1 where README says something else
"""

import argparse
import dataclasses
import importlib
import re
import statistics
import sys
from functools import partial
from pathlib import Path

from cases import RESULTS, caption, load, number, ratio

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
MISSING = "not measured"

# script, technique, what a step pays for, measurement, and its ways: naive, ours, TRL
HEADLINE = [
    (
        "sft_packing.py",
        "packing, chunked loss",
        "sum(T_i) tokens and chunk * V logits",
        ("sft", "padded", "packed + checkpointing", "TRL padded"),
    ),
    (
        "dpo_padding_free.py",
        "the prompt once for both completions (reference in each step)",
        "sum(P + C + R) tokens",
        ("dpo", "padded, reference each step", "shared, reference each step", "TRL padded"),
    ),
    (
        "grpo_zero3.py",
        "the prompt once for its group (the update alone, in a plain module without DeepSpeed)",
        "P + sum(C) tokens of a group",
        ("grpo_update", "padding-free", "shared", "TRL"),
    ),
]


def times(found, way, baseline, measure="seconds"):
    """How many times faster `way` is, as median (least to most) of the pairs."""
    if baseline not in found["ways"]:
        return MISSING
    if way == baseline:
        return "1"
    r = ratio(found, way, baseline, measure)
    return f"{number(r['median'])} ({number(r['min'])} to {number(r['max'])})"


def markdown(header, rows, texts=1):
    """A table; all columns but the first `texts` are numbers, and stand to the right."""
    lines = [header, ["---"] * texts + ["---:"] * (len(header) - texts), *rows]
    return "\n".join("| " + " | ".join(map(number, line)) + " |" for line in lines)


def measured(what, draw, documents):
    """All tables of one measurement, one for each device, with captions."""
    found = [document for (name, _), document in sorted(documents.items()) if name == what]
    parts = [f"{draw(document)}\n\n*{caption(document)}; `{document['command']}`*" for document in found]
    return "\n\n".join(parts) or f"*{what}: {MISSING}*"


def headline(documents):
    """Peak and tokens/s of each script's naive, own and TRL's way, on the first case of each measurement."""
    titles = ["script", "technique", "a step pays for", "peak GiB: naive", "ours", "TRL"]
    parts = []
    devices = sorted({device for what, device in documents if what in {row[3][0] for row in HEADLINE}})
    for device in devices or ["cpu"]:
        rows, notes, sources = [], [], []
        for script, technique, formula, (what, *ways) in HEADLINE:
            document = documents.get((what, device))
            if documents and not document:
                continue
            first = document["cases"][0] if document else {"ways": {}}
            values = [first["ways"].get(way) for way in ways]
            peaks = [v["peak_bytes"] / 2**30 if v else MISSING for v in values]
            speeds = [v["median"]["real_tokens_per_second"] if v else MISSING for v in values]
            rows.append([f"`{script}`", technique, formula, *peaks, *speeds])
            if document:
                named = ", ".join(f'"{way}"' for way in ways if way in first["ways"])
                sizes = ", ".join(
                    f"{key.replace('_', ' ')} {value}"
                    for key, value in first["setup"].items()
                    if "step" in key
                )
                notes.append(f"{what}: {first['case']}, {named}, {sizes}")
                sources.append(caption(document))
        table = markdown([*titles, "tokens/s: naive", "ours", "TRL"], rows, texts=3)
        notes = ["; ".join(notes), *dict.fromkeys(sources)] if notes else []  # a shared source once
        parts.append("\n\n".join([table, *(f"*{note}*" for note in notes)]))
    return "\n\n".join(parts)


def packing(document):
    rows = []
    for found in document["cases"]:
        ours, theirs, best = (found["ways"].get(way) for way in ("ours", "TRL", "TRL, one batch"))
        rows.append(
            [
                found["case"],
                ours["median"]["seconds"],
                *[way["median"]["seconds"] if way else MISSING for way in (theirs, best)],
                times(found, "ours", "TRL"),
                *[f"{way['rows_over_bound']:.2%}" if way else MISSING for way in (ours, theirs, best)],
                *[way["tokens_lost"] if way else MISSING for way in (ours, theirs)],
            ]
        )
    header = ["lengths, documents", "ours, s", "TRL, s", "TRL in one batch, s", "times faster than TRL"]
    header += ["rows over L2: ours", "TRL", "TRL in one batch", "tokens lost: ours", "TRL"]
    return markdown(header, rows)


def loss_head(document):
    rows = []
    for found in document["cases"]:
        for way, values in found["ways"].items():
            # seconds of this way over seconds of the three products, pair by pair
            units = [
                run["seconds"] / floor["seconds"]
                for run, floor in zip(values["repetitions"], found["ways"]["three products"]["repetitions"])
            ]
            peak = values.get("peak_bytes")
            peak = MISSING if peak is None else peak / 2**20
            loss = values["median"].get("loss")
            rows.append(
                [found["case"], way, statistics.median(units), values["median"]["seconds"], peak]
                + ["" if loss is None else f"{loss:.6f}"]
            )
    return markdown(["case", "way", "three products", "s", "peak MiB beyond inputs", "loss"], rows, texts=2)


def setup_line(found):
    """What a case measured, as a line below its table."""
    return "*" + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found["setup"].items()) + "*"


def against_trl(baselines, document):
    """One row for each way; times faster: against each baseline on the same documents, step by step."""
    parts = []
    for found in document["cases"]:
        rows = []
        for way, values in found["ways"].items():
            median, peak = values["median"], values.get("peak_bytes")
            row = [way, median["seconds"], median["real_tokens_per_second"]]
            row += [times(found, way, baseline) for baseline in baselines]
            rows.append([*row, MISSING if peak is None else peak / 2**30])
        faster = [f'times faster than "{baseline}"' for baseline in baselines]
        header = [found["case"], "s/step", "tokens/s", *faster, "peak GiB"]
        parts.append(f"{markdown(header, rows)}\n\n{setup_line(found)}")
    return "\n\n".join(parts)


def generation(document):
    rows = []
    for found in document["cases"]:
        for way, values in found["ways"].items():
            row = [found["case"], way, values["median"]["seconds_per_token"]]
            row += [times(found, way, "hooks per module", "seconds_per_token"), values["median"]["seconds"]]
            row += [values["gathered_bytes_per_token"] / 2**20, values["peak_whole_bytes"] / 2**20]
            rows.append([*row, "yes" if values["same_tokens_on_all_ranks"] else "NO"])
    header = ["case", "way", "s/token", 'times faster than "hooks per module", per token', "s, whole rollout"]
    header += ["gathered MiB/token", "whole at once, MiB", "same tokens"]
    return f"{markdown(header, rows, texts=2)}\n\n{setup_line(document['cases'][0])}"


def ladder(document):
    rows = []
    for found in document["cases"]:
        for way, values in found["ways"].items():
            row = [found["case"], way, values["longest"], values["median"]["seconds"]]
            rows.append([*row, values["peak_bytes"] / 2**30])
    return markdown(["model", "switch", "tokens", "s/step", "peak GiB"], rows, texts=2)


def dry_runs(document):
    rows = []
    for found in document["cases"]:
        for way, values in found["ways"].items():
            predicted, measured = values["predicted_bytes"], values["peak_bytes"]
            difference = f"{predicted / measured - 1:+.1%}"
            row = [f"`{found['case']}`", way, predicted / 2**30, measured / 2**30, difference]
            rows.append([*row, values["median"]["seconds"]])
    header = ["script", "mode", "dry run, peak GiB", "measured", "difference", "dry run, s"]
    setups = "\n\n".join(f"{found['case']}: {setup_line(found)}" for found in document["cases"])
    return f"{markdown(header, rows, texts=2)}\n\n{setups}"


def flags(script, _):
    """Every flag of a script with its default and its help, from the fields of its Arguments."""
    sys.path.insert(0, str(ROOT))
    rows = []
    for field in dataclasses.fields(importlib.import_module(script).Arguments):
        default = field.default
        if isinstance(default, str) and Path(default).is_relative_to(ROOT):
            default = Path(default).relative_to(ROOT).as_posix()
        off = f", `--no_{field.name}`" if default is True else ""
        rows.append([f"`--{field.name}`{off}", f"`{default}`", field.metadata["help"].replace("|", "\\|")])
    return markdown(["flag", "default", "meaning"], rows, texts=3)


TABLES = {
    "headline": headline,
    "packing": partial(measured, "packing", packing),
    "loss_head": partial(measured, "loss_head", loss_head),
    "sft": partial(measured, "sft", partial(against_trl, ["TRL padded", "TRL packed"])),
    "dpo": partial(measured, "dpo", partial(against_trl, ["TRL padded", "TRL padded, precomputed"])),
    "grpo": partial(measured, "grpo_update", partial(against_trl, ["TRL", "TRL, tuned"])),
    "generation": partial(measured, "generation", generation),
    "ladder": partial(measured, "ladder", ladder),
    "dry_runs": partial(measured, "dry_runs", dry_runs),
    "flags-sft": partial(flags, "sft_packing"),
    "flags-dpo": partial(flags, "dpo_padding_free"),
    "flags-grpo": partial(flags, "grpo_zero3"),
}


def filled(text, documents, tables=TABLES):
    """README's text with each marked table made anew. Raises KeyError for a name that is no table."""
    return MARKED.sub(lambda m: f"{m[1]}{tables[m[2]](documents)}\n{m[3]}", text)


def differing(text, documents, tables=TABLES):
    """Names of the marked tables that say something else than the measurements."""
    new = {m[2]: m[0] for m in MARKED.finditer(filled(text, documents, tables))}
    return [m[2] for m in MARKED.finditer(text) if m[0] != new[m[2]]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 on a difference")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args()
    text, documents = options.readme.read_text(), load(options.results)
    wrong = differing(text, documents)
    if not options.check:
        options.readme.write_text(filled(text, documents))
    for name in wrong:
        print(f"{name}: {'differs from the measurements' if options.check else 'written'}")
    return int(options.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
