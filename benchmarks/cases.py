"""Comparisons as the JSON holds them, written by harness.py and read by tables.py and figures.py.

The standard library is all it needs: tables and figures can be drawn where nothing can be measured.
"""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def case(name, setup, repetitions, once=None):
    """One comparison as the JSON holds it.

    Args: name: what is compared, e.g. a data set; setup: dict of its sizes; repetitions: of `alternate`;
          once: {way: {measure: value}}, of what was counted once, like peak_bytes.
    """
    ways = {}
    for way, runs in repetitions.items():
        medians = {
            key: statistics.median(run[key] for run in runs)
            for key, value in runs[0].items()
            if isinstance(value, (int, float))
        }
        ways[way] = {"median": medians, "repetitions": runs, **(once or {}).get(way, {})}
    return {"case": name, "setup": setup, "ways": ways}


def ratio(found, way, baseline, measure="seconds"):
    """baseline / way, pair by pair: how many times faster (or smaller) `way` is.

    Returns: {"median": .., "min": .., "max": .., "pairs": ..}.
    """
    a, b = (found["ways"][name]["repetitions"] for name in (way, baseline))
    ratios = [y[measure] / x[measure] for x, y in zip(a, b)]
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "pairs": len(ratios),
    }


def load(results=RESULTS):
    """Every measurement of a folder. Returns: {(what, device): the document that harness.write wrote}."""
    documents = [json.loads(path.read_text()) for path in sorted(Path(results).glob("*.json"))]
    return {(document["what"], document["device"]): document for document in documents}


def series(document, x, way, measure, **where):
    """Points of a curve: of all cases that have this way, and whose setup says `where`.

    Args:    x: the name in setup of what grows; measure: among the medians, or counted once beside them.
    Returns: [(setup[x], value), ..], sorted.
    """
    points = []
    for found in document["cases"]:
        setup, values = found["setup"], found["ways"].get(way)
        if values and x in setup and all(setup.get(key) == wanted for key, wanted in where.items()):
            points.append((setup[x], values["median"].get(measure, values.get(measure))))
    return sorted(points)


def number(value):
    """Three digits that count: 0.0123, 1.23, 123, 12,300. Counts are given in full."""
    if isinstance(value, str | int):
        return value if isinstance(value, str) else f"{value:,}"
    digits = f"{value:.3g}"
    return f"{float(digits):,.0f}" if abs(float(digits)) >= 100 else digits


def caption(document):
    """Where the numbers come from: hardware, model, versions, commit, command."""
    names = {"python": "Python"}
    versions = ", ".join(f"{names.get(name, name)} {number}" for name, number in document["versions"].items())
    model = f"; {document['model']}" if document["model"] else ""
    threads = f"{document['threads']} thread" + "s" * (document["threads"] > 1)
    return (
        f"{document['hardware']}, {threads}{model}; {versions}; "
        f"commit {document['commit']}, {document['date']}"
    )
