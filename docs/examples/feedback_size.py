"""Gain over the baseline against the number of labelled images: a figure of docs/lab-notes/value_weights_on_rooms.md.

    dino-value compare compare/rooms_labels --jobs 2
    python docs/examples/feedback_size.py labels/results.json docs/lab-notes/evidence_labels.png

Reads arms that are called value_N, N the number of labels, and the arm baseline; one dot a seed, paired.
"""

import json
import sys

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SHOWN = {"miou": ("mIoU, points over the baseline", 100.0), "rmse": ("depth RMSE, m below the baseline", -1.0)}


def gains(arms: dict[str, dict[str, list[float]]], metric: str, scale: float) -> dict[int, np.ndarray]:
    """Better is positive: by number of labels, one a seed."""
    base = np.array(arms["baseline"][metric])
    sizes = sorted(int(name.removeprefix("value_")) for name in arms if name.startswith("value_"))
    return {size: scale * (np.array(arms[f"value_{size}"][metric]) - base) for size in sizes}


def draw(arms: dict[str, dict[str, list[float]]], path: str) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (metric, (label, scale)) in zip(figure.subplots(1, 2), SHOWN.items(), strict=True):
        found = gains(arms, metric, scale)
        sizes = list(found)
        for seeds in zip(*found.values(), strict=True):
            axes.plot(sizes, seeds, "o", color="#6a6a6a", markersize=4, alpha=0.7)
        axes.plot(sizes, [part.mean() for part in found.values()], color="#0072b2", linewidth=2)
        axes.axhline(0, color="#9a9a9a", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("labelled images")
        axes.set_ylabel(label)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        draw(json.load(file)["arms"], sys.argv[2])
