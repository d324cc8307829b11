"""The tables of README.md and of benchmarks/README.md, written from benchmarks/results/*.json.

python benchmarks/tables.py           writes what stands between <!-- table: NAME --> and <!-- end -->
python benchmarks/tables.py --check   ends with 1 where a page says something else
"""

import argparse
import re
import statistics
import sys
from functools import partial
from pathlib import Path

from cases import RESULTS, caption, load, number, ratio

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md"]
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
    if not {way, baseline} <= found["ways"].keys():
        return MISSING
    if way == baseline:
        return "1"
    r = ratio(found, way, baseline, measure)
    return f"{number(r['median'])} ({number(r['min'])} to {number(r['max'])})"


def gib(values):
    peak = values.get("peak_bytes")
    return MISSING if peak is None else peak / 2**30


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
    titles += ["tokens/s: naive", "ours", "TRL"]
    parts = []
    for device in sorted({device for what, device in documents if what in ("sft", "dpo", "grpo_update")}):
        rows, notes, sources = [], [], []
        for script, technique, formula, (what, *ways) in HEADLINE:
            if not (document := documents.get((what, device))):
                continue
            first = document["cases"][0]
            values = [first["ways"].get(way) for way in ways]
            speeds = [v["median"]["real_tokens_per_second"] if v else MISSING for v in values]
            rows.append([f"`{script}`", technique, formula, *[gib(v or {}) for v in values], *speeds])
            named = ", ".join(f'"{way}"' for way in ways if way in first["ways"])
            sizes = {key: value for key, value in first["setup"].items() if "step" in key}
            notes.append(f"{what}: {first['case']}, {named}, {listed(sizes)}")
            sources.append(caption(document))
        notes = ["; ".join(notes), *dict.fromkeys(sources)]  # a shared source once
        parts.append("\n\n".join([markdown(titles, rows, texts=3), *(f"*{note}*" for note in notes)]))
    return "\n\n".join(parts) or f"*{MISSING}*"


def packing(document):
    rows = []
    for found in document["cases"]:
        ways = [found["ways"].get(way) for way in ("ours", "TRL", "TRL, one batch")]
        seconds = [way["median"]["seconds"] if way else MISSING for way in ways]
        over = [f"{way['rows_over_bound']:.2%}" if way else MISSING for way in ways]
        lost = [way["tokens_lost"] if way else MISSING for way in ways[:2]]
        rows.append([found["case"], *seconds, times(found, "ours", "TRL"), *over, *lost])
    header = ["lengths, documents", "ours, s", "TRL, s", "TRL in one batch, s", "times faster than TRL"]
    header += ["rows over L2: ours", "TRL", "TRL in one batch", "tokens lost: ours", "TRL"]
    return markdown(header, rows)


def loss_head(document):
    rows = []
    for found in document["cases"]:
        products = found["ways"]["three products"]["repetitions"]
        for way, values in found["ways"].items():
            # seconds of this way over seconds of the three products, pair by pair
            units = [a["seconds"] / b["seconds"] for a, b in zip(values["repetitions"], products)]
            peak, loss = values.get("peak_bytes"), values["median"].get("loss")
            row = [found["case"], way, statistics.median(units), values["median"]["seconds"]]
            row.append(MISSING if peak is None else peak / 2**20)
            rows.append([*row, "" if loss is None else f"{loss:.6f}"])
    return markdown(["case", "way", "three products", "s", "peak MiB beyond inputs", "loss"], rows, texts=2)


def listed(setup):
    """What a case measured, as text."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in setup.items())


def steps(baselines, document):
    """One row for each way; times faster: against each baseline on the same documents, step by step."""
    parts = []
    for found in document["cases"]:
        rows = []
        for way, values in found["ways"].items():
            median = values["median"]
            row = [way, median["seconds"], median["real_tokens_per_second"]]
            row += [f"{median['mfu']:.0%}"] if "mfu" in median else []
            rows.append([*row, *(times(found, way, baseline) for baseline in baselines), gib(values)])
        faster = [f'times faster than "{baseline}"' for baseline in baselines]
        speed = ["s/step", "tokens/s", *(["MFU"] if "mfu" in median else [])]
        table = markdown([found["case"], *speed, *faster, "peak GiB"], rows)
        apart = ", ".join(f"{name} {x:.1e}" for name, x in found.get("disagreement", {}).items())
        note = f"; largest relative difference between two ways in one step: {apart}" if apart else ""
        parts.append(f"{table}\n\n*{listed(found['setup'])}{note}*")
    return "\n\n".join(parts)


def generation(document):
    rows = []
    for found in document["cases"]:
        for way, values in found["ways"].items():
            row = [found["case"], way, values["median"]["seconds_per_token"]]
            row += [times(found, way, "hooks per module", "seconds_per_token"), values["median"]["seconds"]]
            exchanged = values.get("exchanged_bytes_per_token")
            row.append(values["gathered_bytes_per_token"] / 2**20)
            row.append(MISSING if exchanged is None else exchanged / 2**20)
            row.append(values["peak_whole_bytes"] / 2**20)
            rows.append([*row, "yes" if values["same_tokens_on_all_ranks"] else "NO"])
    header = ["case", "way", "s/token", 'times faster than "hooks per module", per token', "s, whole rollout"]
    header += ["gathered MiB/token", "exchanged MiB/token", "whole at once, MiB", "same tokens"]
    return f"{markdown(header, rows, texts=2)}\n\n*{listed(document['cases'][0]['setup'])}*"


def ladder(document):
    rows = []
    for found in document["cases"]:
        for way, values in found["ways"].items():
            rows.append([found["case"], way, values["longest"], values["median"]["seconds"], gib(values)])
    return markdown(["model", "switch", "tokens", "s/step", "peak GiB"], rows, texts=2)


def reliability(document):
    """What happened to runs, how often, and whether all was as it has to be."""
    rows = [
        [found["case"], found["count"], found.get("runs", ""), "; ".join(found["wrong"]) or "nothing"]
        for found in document["cases"]
    ]
    return markdown(["what happened", "times", "runs", "what was wrong"], rows)


def refusals(document):
    """Each bad input, and the line that refused it."""
    [found] = document["cases"]
    rows = [
        [f"`{each['script']}.py`", f"`{each['input']}`", cut(each["message"])] for each in found["inputs"]
    ]
    wrong = "; ".join(found["wrong"]) or "nothing"
    table = markdown(["script", "bad input", "its message"], rows, texts=3)
    return f"{table}\n\n*{found['count']} bad inputs; what was wrong: {wrong}*"


def cut(text, length=120):
    text = text.replace("|", "\\|")
    return text if len(text) <= length else f"{text[:length]} .."


DRAWN = {
    "packing": packing,
    "loss_head": loss_head,
    "sft": partial(steps, ["TRL padded", "TRL packed"]),
    "sft_liger": partial(steps, ["TRL packed + checkpointing", "TRL packed"]),
    "sft_large": partial(steps, ["TRL packed + checkpointing", "TRL packed"]),
    "dpo": partial(steps, ["TRL padded", "TRL padded, precomputed"]),
    "grpo_update": partial(steps, ["TRL", "TRL, tuned"]),
    "generation": generation,
    "ladder": ladder,
    "reliability": reliability,
    "refusals": refusals,
}
TABLES = {"headline": headline, **{what: partial(measured, what, draw) for what, draw in DRAWN.items()}}


def filled(text, documents):
    """A page's text with each of its tables made anew; marks of other names are left alone."""

    def fill(mark):
        draw = TABLES.get(mark[2])
        return f"{mark[1]}{draw(documents)}\n{mark[3]}" if draw else mark[0]

    return MARKED.sub(fill, text)


def differing(text, documents):
    """Names of the marked tables that say something else than the measurements."""
    made = MARKED.finditer(filled(text, documents))
    return [old[2] for old, new in zip(MARKED.finditer(text), made) if old[0] != new[0]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 on a difference")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES)
    options = parser.parse_args()
    documents, wrong = load(options.results), []
    for page in options.pages:
        text = page.read_text()
        found = differing(text, documents)
        wrong += found
        if not options.check:
            page.write_text(filled(text, documents))
        for name in found:
            print(f"{page}: {name} {'differs from the measurements' if options.check else 'written'}")
    return int(options.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
