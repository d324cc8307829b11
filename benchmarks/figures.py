"""Figures of the measurements: benchmarks/figures/*.png, from benchmarks/results/*.json and nothing else.

python benchmarks/figures.py

A figure is a list of panels, plain data made by the functions below: {"title", "x", "y", "log": "x" or
"xy", "curves": {label: [(x, y), ..]}} or {"title", "y", "bars": {label: value}}. `draw` puts them on paper.
"""

import argparse
import sys
import textwrap
from functools import partial
from pathlib import Path

from cases import RESULTS, caption, load, number, series

FIGURES = Path(__file__).resolve().parent / "figures"


def curves(document, x, measure, scale=1.0, **where):
    """{way: points} for every way of the document that has this measure along x, in their order."""
    ways = dict.fromkeys(way for found in document["cases"] for way in found["ways"])
    found = {way: series(document, x, way, measure, **where) for way in ways}
    points = {way: [(a, b * scale) for a, b in values if b is not None] for way, values in found.items()}
    return {way: values for way, values in points.items() if values}


def packing(document):
    shared = {"x": "documents", "log": "xy"}
    lognormal = curves(document, "documents", "seconds", lengths="lognormal")
    ours = {}
    for name in dict.fromkeys(found["setup"]["lengths"] for found in document["cases"]):
        points = series(document, "documents", "ours", "seconds", lengths=name)
        if len(points) > 1:
            ours[name] = points
    return [
        {"title": "Planning lognormal lengths", "y": "seconds", "curves": lognormal, **shared},
        {"title": "Ours, by distribution", "y": "seconds", "curves": ours, **shared},
    ]


def growth_tokens(document):
    of = partial(curves, document, "tokens", axis="tokens per row")
    shared = {"x": "tokens in a row of whole documents", "log": "x"}
    return [
        {"title": "Time", "y": "milliseconds per token", "curves": of("seconds_per_token", 1e3), **shared},
        {"title": "Memory", "y": "peak KiB per token", "curves": of("bytes_per_token", 1 / 1024), **shared},
        {
            "title": "Activations held for backward",
            "y": "KiB per token",
            "curves": of("activation_bytes_per_token", 1 / 1024),
            **shared,
        },
    ]


def growth_documents(document):
    of = partial(curves, document, "documents", axis="documents per row")
    shared = {"x": "documents in a row of one length", "log": "x"}
    return [
        {"title": "Time", "y": "seconds per step", "curves": of("seconds"), **shared},
        {"title": "Memory", "y": "peak GiB", "curves": of("peak_bytes", 2**-30), **shared},
    ]


def ranks(document):
    speeds = {}
    for found in document["cases"]:
        if found["setup"].get("axis") == "ranks":
            for values in found["ways"].values():
                speeds[f"{found['setup']['ranks']} rank(s)"] = values["median"]["tokens_per_second"]
    return [{"title": "Ranks of one thread each", "y": "tokens/s", "bars": speeds}]


def ways(document):
    """Peak bytes and speed of each way, for each case."""
    panels = []
    for found in document["cases"]:
        peaks = {way: values.get("peak_bytes") for way, values in found["ways"].items()}
        peaks = {way: peak / 2**30 for way, peak in peaks.items() if peak is not None}
        speeds = {way: v["median"]["real_tokens_per_second"] for way, v in found["ways"].items()}
        panels += [
            {"title": f"{found['case']}: memory", "y": "peak GiB", "bars": peaks},
            {"title": f"{found['case']}: speed", "y": "tokens of data per second", "bars": speeds},
        ]
    return panels


def generation(document):
    """Seconds of each token: with the share of the weights that stays whole, and with the batch."""
    share = {}
    for found in document["cases"]:
        points = [
            (values["resident_share"], values["median"]["seconds_per_token"])
            for values in found["ways"].values()
            if "resident_share" in values
        ]
        if points:
            share[found["case"]] = sorted(points)
    batch = curves(document, "sequences", "seconds_per_token")
    batch = {way: points for way, points in batch.items() if len(points) > 1}
    return [
        {"title": "Weights held", "x": "resident share", "y": "seconds per token", "curves": share},
        {"title": "Batch", "x": "sequences per rank", "y": "seconds per token", "curves": batch},
    ]


def ladder(document):
    """The longest document of each rung, for each model."""
    panels = []
    for found in document["cases"]:
        reached = {way: values["longest"] for way, values in found["ways"].items()}
        title = f"{found['case']}, {number(found['setup']['memory_gib'])} GiB"
        panels.append({"title": title, "y": "tokens of the longest document", "bars": reached})
    return panels


# name of the figure -> (measurement, its panels)
PANELS = {
    "packing": ("packing", packing),
    "growth_tokens": ("growth", growth_tokens),
    "growth_documents": ("growth", growth_documents),
    "ranks": ("growth", ranks),
    "sft": ("sft", ways),
    "dpo": ("dpo", ways),
    "grpo": ("grpo_update", ways),
    "generation": ("generation", generation),
    "ladder": ("ladder", ladder),
}


def panels(name, document):
    """A figure's panels, without those that nothing was measured for."""
    found = PANELS[name][1](document)
    return [panel for panel in found if panel.get("curves") or panel.get("bars")]


def draw(shown, text, path):
    """Panels side by side, two in a row, with the caption below."""
    import matplotlib  # here: the data of a figure needs none

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.2 * rows), squeeze=False)
    for ax in axes.flat[len(shown) :]:
        ax.remove()
    for ax, panel in zip(axes.flat, shown):
        ax.set_title(panel["title"], fontsize=10)
        if "bars" in panel:
            labels, values = list(panel["bars"]), list(panel["bars"].values())
            colors = ["tab:orange" if label.startswith("TRL") else "tab:blue" for label in labels]
            ax.bar_label(ax.barh(labels, values, color=colors), fmt=number, fontsize=7, padding=2)
            ax.invert_yaxis()
            ax.margins(x=0.15)
            ax.set_xlabel(panel["y"], fontsize=8)
        else:
            for label, points in panel["curves"].items():
                ax.plot(*zip(*points), marker="o", markersize=3, label=label)
            if "log" in panel:
                ax.set_xscale("log")
            if panel.get("log") == "xy":
                ax.set_yscale("log")
            else:
                ticks = sorted({x for points in panel["curves"].values() for x, _ in points})
                ax.set_xticks(ticks, map(number, ticks))
                ax.minorticks_off()
                top = max(y for points in panel["curves"].values() for _, y in points)
                ax.set_ylim(min(0, ax.get_ylim()[0]), 1.1 * top)
            ax.set_xlabel(panel["x"], fontsize=8)
            ax.set_ylabel(panel["y"], fontsize=8)
            ax.legend(fontsize=7)
            ax.grid(alpha=0.3)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    lines = textwrap.fill(text, 60 * columns)
    figure.supxlabel(lines, fontsize=6, color="gray")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder for the PNG files")
    options = parser.parse_args()
    documents = load(options.results)
    for name, (what, _) in PANELS.items():
        found = {device: document for (w, device), document in documents.items() if w == what}
        if not found:
            print(f"{name}: no measurement of {what} in {options.results}, skipped")
        for device, document in found.items():
            shown, path = panels(name, document), options.figures / f"{name}-{device}.png"
            if shown:
                draw(shown, caption(document), path)
            print(f"{name}: {path.name if shown else f'{what} on {device} holds none of it, skipped'}")


if __name__ == "__main__":
    sys.exit(main())
