"""Figures of the measurements: benchmarks/figures/*.png, from benchmarks/results/*.json and nothing else.

python benchmarks/figures.py

A figure is a list of panels, plain data made by the functions below: {"title", "x", "y", "log": "x" or
"xy", "curves": {label: [(x, y), ..]}} or {"title", "y", "bars": {label: value}}. `draw` puts them on paper.
"""

import argparse
import textwrap
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
    shared = {"x": "documents", "y": "seconds", "log": "xy"}
    lognormal = curves(document, "documents", "seconds", lengths="lognormal")
    names = dict.fromkeys(found["setup"]["lengths"] for found in document["cases"])
    ours = {name: series(document, "documents", "ours", "seconds", lengths=name) for name in names}
    ours = {name: points for name, points in ours.items() if len(points) > 1}
    return [
        {"title": "Planning lognormal lengths", "curves": lognormal, **shared},
        {"title": "Ours, by distribution", "curves": ours, **shared},
    ]


def generation(document):
    """Seconds of each token, for each number of sequences."""
    panels, y = [], "seconds per token"
    for found in document["cases"]:
        bars = {way: values["median"]["seconds_per_token"] for way, values in found["ways"].items()}
        panels.append({"title": found["case"], "y": y, "bars": bars})
    return panels


def steps(document):
    """Peak bytes and speed of each way, for each case."""
    panels = []
    for found in document["cases"]:
        peaks = {way: values["peak_bytes"] / 2**30 for way, values in found["ways"].items()}
        speeds = {way: v["median"]["real_tokens_per_second"] for way, v in found["ways"].items()}
        panels.append({"title": f"{found['case']}: memory", "y": "peak GiB", "bars": peaks})
        panels.append({"title": f"{found['case']}: speed", "y": "tokens of data per second", "bars": speeds})
    return panels


def ladder(document):
    """The longest document of each rung, for each model."""
    panels, y = [], "tokens of the longest document"
    for found in document["cases"]:
        title = f"{found['case']}, {number(found['setup']['memory_gib'])} GiB"
        reached = {way: values["longest"] for way, values in found["ways"].items()}
        panels.append({"title": title, "y": y, "bars": reached})
    return panels


# name of the figure -> (measurement, its panels)
PANELS = {
    "packing": ("packing", packing),
    "sft": ("sft", steps),
    "dpo": ("dpo", steps),
    "grpo": ("grpo_update", steps),
    "generation": ("generation", generation),
    "ladder": ("ladder", ladder),
}


def panels(name, document):
    """A figure's panels, without those that nothing was measured for."""
    return [found for found in PANELS[name][1](document) if found.get("curves") or found.get("bars")]


def draw_bars(ax, shown):
    labels, values = list(shown["bars"]), list(shown["bars"].values())
    colors = ["tab:orange" if label.startswith("TRL") else "tab:blue" for label in labels]
    ax.bar_label(ax.barh(labels, values, color=colors), fmt=number, fontsize=7, padding=2)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set_xlabel(shown["y"], fontsize=8)


def draw_curves(ax, shown):
    for label, points in shown["curves"].items():
        ax.plot(*zip(*points), marker="o", markersize=3, label=label)
    if "log" in shown:
        ax.set_xscale("log")
    if shown.get("log") == "xy":
        ax.set_yscale("log")
    else:
        ticks = sorted({x for points in shown["curves"].values() for x, _ in points})
        ax.set_xticks(ticks, map(number, ticks))
        ax.minorticks_off()
        top = max(y for points in shown["curves"].values() for _, y in points)
        ax.set_ylim(min(0, ax.get_ylim()[0]), 1.1 * top)
    ax.set_xlabel(shown["x"], fontsize=8)
    ax.set_ylabel(shown["y"], fontsize=8)
    ax.legend(fontsize=7)
    ax.grid(alpha=0.3)


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
    for ax, each in zip(axes.flat, shown):
        ax.set_title(each["title"], fontsize=10)
        (draw_bars if "bars" in each else draw_curves)(ax, each)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(textwrap.fill(text, 60 * columns), fontsize=6, color="gray")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder for the PNG files")
    options = parser.parse_args()
    for (what, device), document in load(options.results).items():
        for name in [name for name, (measured, _) in PANELS.items() if measured == what]:
            if shown := panels(name, document):
                draw(shown, caption(document), options.figures / f"{name}-{device}.png")
                print(f"{name}-{device}.png")


if __name__ == "__main__":
    main()
