"""Pictures of how something came about: masks across training, a metric against what it cost, probe r over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from dino_value.report.drawing import (
    INK,
    Figure,
    Panel,
    arm_styles,
    new_axes,
    new_cells,
    style_of,
    to_images,
    to_png,
)
from dino_value.report.figures import MASK_COLOURS
from dino_value.report.statistics import arm_label, metric_of, order_arms

Array = NDArray[np.float64]


# --- masks ------------------------------------------------------------------------------------------------------


def mask_history_figure(images: ArrayLike, masks: Mapping[str, Mapping[int, ArrayLike]]) -> Figure:
    """A panel an arm: the image, and its mask at one step after another.

    ``images``: uint8 [n 3 h w]. ``masks``: arm -> learner step -> [n 1 h w] in [0, 1], 1 = kept.
    """
    originals, panels = to_images("images", images), []
    for arm in order_arms(masks):
        found = {step: np.asarray(mask, dtype=np.float64)[:, 0] for step, mask in sorted(masks[arm].items())}
        figure, cells = new_cells(
            len(originals), ["image", *(f"step {step}" for step in found)], above=0.55, below=0.02
        )
        for row, image in enumerate(originals):
            grey = image.mean(axis=-1, keepdims=True) / 255
            cells[row][0].imshow(image)
            for column, mask in enumerate(found.values(), 1):
                shade = colormaps[MASK_COLOURS](mask[row])[..., :3]
                cells[row][column].imshow((0.35 * grey + 0.65 * shade).clip(0, 1))
        top = 1 - 0.02 / figure.get_figheight()
        figure.text(0.01, top, arm_label(arm), fontsize=12, weight="bold", va="top", color=style_of(arm).colour)
        means = ", ".join(f"step {step}: {mask.mean():.0%}" for step, mask in found.items())
        spreads = [mask.std(axis=(1, 2)).mean() for mask in found.values()]
        alt = (
            f"{arm_label(arm)}'s masks over {len(originals)} images across training. Mean of the masks at {means}; "
            f"their spread within an image went from {spreads[0]:.2f} to {spreads[-1]:.2f}."
        )
        panels.append(Panel(arm, to_png(figure), alt))
    caption = "The same images at one checkpoint after another; bright is kept, dark is hidden."
    return Figure("mask_history", "Masks across training", caption, panels)


# --- efficiency -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spent:
    """A metric as a run saw it, and what had been spent by then; each [t], ascending."""

    values: Array
    amounts: Array
    """images or tokens"""
    seconds: Array


def spent(records: Sequence[Mapping[str, Any]], key: str, images: int | None) -> Spent:
    """From a run's metrics; ``images`` of a step, None where rows count ``tokens``."""
    passed, rows = 0.0, []
    for row in records:
        passed += row.get("seconds", 0.0)
        if isinstance(row.get(key), int | float) and np.isfinite(row[key]):
            rows.append((row[key], row["step"] * images if images else row.get("tokens", 0), passed))
    return Spent(*np.array(rows, dtype=np.float64).reshape(-1, 3).T)


def share_needed(run: Spent, reference: Spent, higher_is_better: bool) -> float | None:
    """What part of the reference's amount ``run`` took until it was as good as the reference at its end; None where it
    never was."""
    sign = 1.0 if higher_is_better else -1.0
    reached = np.flatnonzero(sign * run.values >= sign * reference.values[-1])
    return float(run.amounts[reached[0]] / reference.amounts[-1]) if reached.size else None


def efficiency_figure(key: str, runs: Mapping[str, Spent], what: str, reference: str = "baseline") -> Figure:
    """``key`` against images or tokens (``what``), and against time; an arm each, of its first seed."""
    metric, order = metric_of(key), order_arms(runs)
    panels = []
    for name, xlabel in ((what, f"{what} seen"), ("seconds", "seconds in the loop")):
        figure, axes = new_axes(4.4, 3.3)
        for arm, style in arm_styles(order).items():
            x = runs[arm].amounts if name == what else runs[arm].seconds
            y = runs[arm].values * metric.scale
            axes.plot(x, y, color=style.colour, linestyle=style.line, linewidth=2, marker=style.marker, markersize=4)
            axes.plot([], [], color=style.colour, linestyle=style.line, marker=style.marker, label=arm_label(arm))
        axes.set_title(f"{metric.heading} against {name}", loc="left", fontsize=11.5)
        axes.set_xlabel(xlabel, fontsize=10)
        axes.legend(frameon=False, fontsize=9.5, ncols=3, loc="upper left", bbox_to_anchor=(-0.02, -0.2))
        ends = "; ".join(f"{arm_label(arm)} ends at {metric.show(runs[arm].values[-1])}" for arm in order)
        panels.append(Panel(f"{key}_{name}", to_png(figure), f"{metric.heading[:-2]} against {xlabel}: {ends}."))
    told = []
    for arm in order if reference in runs else []:
        if arm != reference:
            share = share_needed(runs[arm], runs[reference], metric.higher_is_better)
            reached = "never reached it" if share is None else f"was there with {share:.0%} of its {what}"
            told.append(f"{arm_label(arm)} {reached}")
    compared = f" Of {arm_label(reference)}'s last value: {'; '.join(told)}." if told else ""
    return Figure("efficiency", "What was reached with how much", f"First seed of each arm.{compared}", panels)


# --- probe ------------------------------------------------------------------------------------------------------


def probe_history_figure(probes: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Figure:
    """Pearson's r of the value probe at several checkpoints; ``probes``: arm -> step -> what the probe found."""
    panels = []
    for key, title in (("designed_sgd", "SGD step"), ("designed_optimizer", "the run's optimizer")):
        figure, axes = new_axes(4.4, 3.3)
        axes.axhline(0, color=INK, linewidth=0.8)
        told = []
        for arm, style in arm_styles(order_arms(probes)).items():
            rows = {step: found[key] for step, found in sorted(probes[arm].items()) if key in found}
            r = np.array([row["pearson"] for row in rows.values()])
            intervals = np.array([row["interval"] for row in rows.values()]).reshape(-1, 2)
            axes.errorbar(
                list(rows), r, np.abs(intervals.T - r), color=style.colour, marker=style.marker, linestyle=style.line,
                linewidth=1.6, capsize=3, label=arm_label(arm),
            )  # fmt: skip
            told.append(f"{arm_label(arm)} " + ", ".join(f"{v:.2f} at step {s}" for s, v in zip(rows, r, strict=True)))
        axes.set_ylim(min(-0.1, axes.get_ylim()[0]), 1.02)
        axes.set_title(f"Pearson's r, {title}", loc="left", fontsize=11.5)
        axes.set_xlabel("learner step", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.legend(frameon=False, fontsize=9.5, loc="upper left", bbox_to_anchor=(-0.02, -0.2))
        panels.append(
            Panel(key, to_png(figure), f"Pearson's r of predicted and realised decrease, {title}: {'; '.join(told)}.")
        )
    caption = "The value probe at one checkpoint after another, with its 95 % bootstrap interval over trials."
    return Figure("probe_history", "Probe r across training", caption, panels)
