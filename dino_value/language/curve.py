"""`dino-value language curve RUN …`: token efficiency, a metric of runs against the unlabeled tokens they have seen.

As measured, and the best so far: what one would hold who keeps the best checkpoint. Runs of one method are its seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dino_value.errors import UserError
from dino_value.files import write_bytes, write_json
from dino_value.language.config import load_language_config
from dino_value.report.drawing import DPI, PAPER, arm_styles, to_png
from dino_value.report.figures import over_seeds
from dino_value.report.statistics import order_arms
from dino_value.runs.metrics import read_metrics

Array = NDArray[np.float64]


class Curve(NamedTuple):
    """One run's metric; all [t]."""

    tokens: Array
    raw: Array
    best: Array
    """The best up to here: the lowest of a loss, the highest of anything else."""


def token_curve(rows: Sequence[Mapping[str, Any]], metric: str) -> Curve:
    """From the rows of a metrics.jsonl, those that hold `metric`."""
    found = [(row["tokens"], row[metric]) for row in rows if metric in row and "tokens" in row]
    tokens, raw = np.array(found, dtype=np.float64).reshape(-1, 2).T
    best = np.minimum if metric.endswith("loss") else np.maximum
    return Curve(tokens, raw, best.accumulate(raw))


def curves_of_runs(runs: Sequence[Path], metric: str) -> dict[str, list[Curve]]:
    """Method -> a curve for each of its runs.

    Raises:
        UserError: not a run folder, or one that has not logged `metric`.
    """
    found: dict[str, list[Curve]] = {}
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run}: not a run folder (no config.yaml)")
        method = load_language_config(run / "config.yaml", [f"out={run}"]).method
        rows = read_metrics(run)
        curve = token_curve(rows, metric)
        if not curve.tokens.size:
            known = sorted({name for row in rows for name in row} - {"step", "tokens"})
            asked = "; held_loss needs held.file=FILE" if metric == "held_loss" else ""
            raise UserError(f"{run}: metrics.jsonl has no {metric}, but {', '.join(known) or 'nothing'}{asked}")
        found.setdefault(method, []).append(curve)
    return {method: found[method] for method in order_arms(found)}


def draw(curves: Mapping[str, Sequence[Curve]], metric: str) -> bytes:
    """A PNG with a panel as measured and one of the best so far; lines are means over seeds, bands reach from the
    lowest seed to the highest."""
    figure = Figure(figsize=(8.4, 3.6), dpi=DPI, layout="constrained", facecolor=PAPER)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title in zip(panels, ("raw", "best"), strict=True):
        for (method, found), style in zip(curves.items(), arm_styles(list(curves)).values(), strict=True):
            tokens, values = over_seeds([(curve.tokens, getattr(curve, title)) for curve in found])
            marker = style.marker if tokens.size == 1 else None
            axes.plot(tokens, values.mean(0), color=style.colour, linestyle=style.line, marker=marker, label=method)
            if len(found) > 1:
                axes.fill_between(tokens, values.min(0), values.max(0), color=style.colour, alpha=0.16, linewidth=0)
        axes.set_title({"raw": "as measured", "best": "best so far"}[title], loc="left", fontsize=11)
        axes.set_xlabel("unlabeled tokens")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(metric.replace("_", " "))
    panels[0].legend(frameon=False, fontsize=9)
    return to_png(figure)


def write_curves(runs: Sequence[Path], out: Path, metric: str = "held_loss") -> None:
    """The figure as `out`, and its points beside it as JSON: method -> one {tokens, raw, best} a run."""
    curves = curves_of_runs(runs, metric)
    out.parent.mkdir(parents=True, exist_ok=True)
    points = {m: [{k: v.tolist() for k, v in c._asdict().items()} for c in found] for m, found in curves.items()}
    write_json(out.with_suffix(".json"), {"metric": metric, "curves": points})
    write_bytes(out, draw(curves, metric))
