"""What runs did, over their steps: python -m common.plot outputs/a outputs/b draws them beside one another.

Each run that ends draws its own training.png, where matplotlib is installed.
"""

import argparse
import json
from pathlib import Path

# what is drawn where a run has it: metric, title, unit
PANELS = (
    ("loss", "loss", 1),
    ("reward", "reward", 1),
    ("rewards/margins", "reward margin", 1),
    ("tokens_per_second", "tokens/s computed", 1),
    ("peak_memory_bytes", "peak memory so far, GiB", 2**30),
)


def read_metrics(folder):
    """The lines of a run's metrics.jsonl, as dicts."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def draw(folders, file):
    """Draw the metrics of runs over their steps into `file`, a picture; evaluations as dots.

    Args:   folders: output folders, each with a metrics.jsonl.
    Raises: ImportError without matplotlib; OSError for a folder without metrics.
    """
    from matplotlib.figure import Figure  # without pyplot no window, and no state, is left behind

    runs = {str(folder): read_metrics(folder) for folder in folders}
    there = {name for steps in runs.values() for step in steps for name in step}
    panels = [panel for panel in PANELS if panel[0] in there]
    figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
    for axes, (metric, title, unit) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for folder, steps in runs.items():
            drawn = {name: _points(steps, name, unit) for name in (metric, f"eval_{metric}")}
            [line] = axes.plot(*drawn[metric], linewidth=1, label=folder)
            axes.plot(*drawn[f"eval_{metric}"], "o", markersize=4, color=line.get_color())
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if metric in ("tokens_per_second", "peak_memory_bytes"):  # of which a small change is not a large one
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    if len(runs) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    figure.savefig(file, dpi=120)


def _points(steps, metric, unit):
    """Steps, and the metric's values there."""
    return [step["step"] for step in steps if metric in step], [
        step[metric] / unit for step in steps if metric in step
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", help="output folders of runs")
    parser.add_argument("--output", default="training.png", help="the picture to write")
    options = parser.parse_args()
    for folder in options.folders:
        if not (Path(folder) / "metrics.jsonl").exists():
            parser.error(f"{folder} holds no metrics.jsonl: it is no run's folder.")
    draw(options.folders, options.output)
    print(f"wrote {options.output}")
