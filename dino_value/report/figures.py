"""The report's pictures, as PNG bytes: results by seed, training curves, masks over images, PCA of patch
features.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from dino_value.errors import UserError
from dino_value.report.drawing import (
    INK,
    PAPER,
    Figure,
    Images,
    Panel,
    arm_styles,
    new_axes,
    new_cells,
    style_of,
    to_images,
    to_png,
)
from dino_value.report.statistics import (
    Metric,
    Results,
    arm_label,
    arms_of,
    metric_of,
    metrics_of,
    order_arms,
)

Array = NDArray[np.float64]

MASK_COLOURS = "viridis"


# --- results ------------------------------------------------------------------------------------------------


def results_figure(results: Results) -> Figure:
    """A panel a metric: one dot a seed, a line joining each seed across the arms, a bar at an arm's mean."""
    arms = arms_of(results)
    panels = [
        Panel(
            key,
            _results_png(metric_of(key), {a: row[key] for a, row in arms.items() if key in row}),
            _results_alt(key, arms),
        )
        for key in metrics_of(arms)
    ]
    caption = (
        "One dot is one seed; a thin line joins the same seed across the arms; the bar is the arm's mean. "
        "The axes do not start at zero."
    )
    return Figure("results", "Results by seed", caption, panels)


def _results_alt(key: str, arms: Mapping[str, Mapping[str, Array]]) -> str:
    metric = metric_of(key)
    rows = [
        f"{arm_label(arm)} {', '.join(metric.show(v) for v in row[key])}" for arm, row in arms.items() if key in row
    ]
    return f"{metric.heading[:-2]} by seed ({metric.preference}): {'; '.join(rows)}."


def _results_png(metric: Metric, rows: Mapping[str, Array]) -> bytes:
    many = len(rows) > _SIDE_BY_SIDE  # their names stand below each other then
    figure, axes = new_axes(5.6, 0.9 + 0.3 * len(rows)) if many else new_axes(4.4, 3.3)
    values = np.stack(list(rows.values())) * metric.scale  # [arms, seeds]
    # Seeds are spread a little to the sides, so that dots of equal height stay apart.
    offsets = np.linspace(-0.12, 0.12, values.shape[1]) if values.shape[1] > 1 else np.zeros(1)
    at = np.arange(len(rows))[:, None] + offsets

    def turned(place: Any, value: Any) -> tuple[Any, Any]:
        return (value, place) if many else (place, value)

    axes.plot(*turned(at, values), color="#9a9a9a", linewidth=0.8, alpha=0.3 if many else 0.6, zorder=1)
    for i, style in enumerate(arm_styles(list(rows)).values()):
        finite = values[i][np.isfinite(values[i])]
        if finite.size:
            bar = axes.vlines if many else axes.hlines
            bar(finite.mean(), i - 0.3, i + 0.3, color=style.colour, linewidth=2.6, zorder=2)
        axes.scatter(
            *turned(at[i], values[i]),
            s=38,
            color=style.colour,
            marker=style.marker,
            edgecolors=PAPER,
            linewidths=0.7,
            zorder=3,
        )
    ticks, limits = (axes.set_yticks, axes.set_ylim) if many else (axes.set_xticks, axes.set_xlim)
    ticks(range(len(rows)), [arm_label(a) for a in rows])
    ends = (-0.5, len(rows) - 0.5)
    limits(*(reversed(ends) if many else ends))  # the first arm on top
    axes.set_title(f"{metric.heading}   ({metric.preference})", loc="left", fontsize=11.5)
    axes.grid(axis="y" if many else "x", visible=False)
    return to_png(figure)


_SIDE_BY_SIDE = 6  # arms whose names have room below an axis


# --- curves -------------------------------------------------------------------------------------------------

_CURVES = {
    "loss": "Self-supervised loss",
    "value": "Value V = ⟨g_down, g_pre⟩",
    "cosine": "Alignment: cosine of g_down and g_pre",
    "mask_mean": "Mask mean (share of a view kept)",
    "g_down_norm": "Norm of g_down",
    "g_pre_norm": "Norm of g_pre",
    "loss_seg": "Segmentation head's loss",
    "loss_depth": "Depth head's loss",
    "loss_classes": "Class head's loss",
    "plain_value": "⟨u, g_pre⟩ with plain targets",
    "moved_value": "⟨u, g_pre⟩ with moved targets",
    "best_value": "⟨u, g_pre⟩ at best, of any targets",
    "target_kl_dino": "KL of moved targets, DINO (nats)",
    "target_kl_ibot": "KL of moved targets, iBOT (nats)",
    "target_kl_ijepa": "KL of moved targets, I-JEPA (nats)",
    "teacher_entropy": "Teacher's entropy (nats)",
    "images_per_second": "Images per second",
}
_SIGNED = ("value", "cosine", "plain_value", "moved_value", "best_value")  # a line at zero tells helping from hurting


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of ``run/metrics.jsonl``, less a last line cut short by a kill.

    Raises UserError naming the file and line when it cannot be read.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; a run folder made by `dino-value train` has it"
        ) from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not JSON; delete the line or run again") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int | float):
            raise UserError(f'{path}, line {number}: expected an object with a number under "step"')
        records.append(record)
    return records


def series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[Array, Array]:
    """Ascending steps [t] and values [t] where ``key`` is a finite number; the last of a repeated step."""
    points = {
        float(r["step"]): float(r[key])
        for r in records
        if isinstance(r.get(key), int | float) and math.isfinite(r[key])
    }
    steps = np.array(sorted(points), dtype=np.float64)
    return steps, np.array([points[s] for s in steps], dtype=np.float64)


def running_mean(values: Array, window: int) -> Array:
    """Centred mean over ``window`` values; at the ends, over those that exist."""
    ones = np.ones(window)
    counts = np.convolve(np.ones_like(values), ones, mode="full")
    sums = np.convolve(values, ones, mode="full")
    start = (window - 1) // 2
    return (sums / counts)[start : start + values.size]


def over_seeds(curves: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Curves (steps, values) on the steps [t] that all of them span: values [seeds t], interpolated."""
    grid = np.unique(np.concatenate([steps for steps, _ in curves]))
    first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    grid = grid[(grid >= first) & (grid <= last)]
    return grid, np.stack([np.interp(grid, steps, values) for steps, values in curves])


def curves_figure(
    runs: Mapping[str, Sequence[Path]],
    keys: Sequence[str] = ("loss", "value", "cosine", "mask_mean"),
    *,
    name: str = "curves",
    title: str = "Training curves",
    headings: Mapping[str, str] | None = None,
) -> Figure:
    """A panel for each of ``keys`` that some run has logged; ``runs``: arm -> run folders, one a seed. ``headings``: of
    keys that mean something else in these runs than they do by default.
    """
    named = {**_CURVES, **(headings or {})}
    order = order_arms(runs)
    records = {arm: [read_metrics(run) for run in runs[arm]] for arm in order}
    panels = []
    for key in keys:
        curves = {arm: [c for c in (series(r, key) for r in records[arm]) if c[0].size] for arm in order}
        curves = {arm: found for arm, found in curves.items() if found}
        if curves:
            heading = named.get(key, key.replace("_", " "))
            panels.append(Panel(key, _curves_png(heading, curves, signed=key in _SIGNED), _curves_alt(heading, curves)))
    seeds = max((len(found) for found in records.values()), default=0)
    spread = "the band reaches from the lowest to the highest seed" if seeds > 1 else "one seed, so no spread is shown"
    return Figure(name, title, f"Running means over learner steps; {spread}.", panels)


def _curves_alt(heading: str, curves: Mapping[str, Sequence[tuple[Array, Array]]]) -> str:
    told = []
    for arm, found in curves.items():
        first = np.mean([running_mean(v, _window(v.size))[0] for _, v in found])
        last = np.mean([running_mean(v, _window(v.size))[-1] for _, v in found])
        told.append(f"{arm_label(arm)} from {first:.3g} to {last:.3g}")
    return f"{heading} over learner steps: {'; '.join(told)}."


def _window(points: int) -> int:
    return max(1, points // 20)


def _curves_png(heading: str, curves: Mapping[str, Sequence[tuple[Array, Array]]], *, signed: bool) -> bytes:
    figure, axes = new_axes(4.4, 3.3)
    if signed:
        axes.axhline(0, color=INK, linewidth=0.8)
    for (arm, found), style in zip(curves.items(), arm_styles(list(curves)).values(), strict=True):
        steps, values = over_seeds([(s, running_mean(v, _window(v.size))) for s, v in found])
        if not steps.size:
            continue
        marker = style.marker if steps.size == 1 else None
        axes.plot(
            steps,
            values.mean(0),
            color=style.colour,
            linestyle=style.line,
            linewidth=2,
            marker=marker,
            label=arm_label(arm),
        )
        if len(found) > 1:
            axes.fill_between(steps, values.min(0), values.max(0), color=style.colour, alpha=0.16, linewidth=0)
    axes.set_title(heading, loc="left", fontsize=11.5)
    axes.set_xlabel("learner step", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.margins(x=0.02)
    axes.legend(
        frameon=False,
        fontsize=9.5,
        ncols=len(curves),
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.2),
        handlelength=2.4,
    )
    return to_png(figure)


# --- probe ------------------------------------------------------------------------------------------------------

_UPDATES = {"designed_sgd": "SGD step", "designed_optimizer": "the run's optimizer"}


def probe_figure(probes: Mapping[str, Mapping[str, Any]]) -> Figure:
    """What V foretells of one step and what the step brings, on held-out feedback; ``probes``: arm -> probe.json."""
    panels = []
    for key, title in _UPDATES.items():
        found = {arm: probes[arm][key] for arm in order_arms(probes) if key in probes[arm]}
        if found:
            told = "; ".join(f"{arm_label(arm)} r = {row['pearson']:.2f}" for arm, row in found.items())
            panels.append(Panel(key, _probe_png(title, found), f"Predicted and realised decrease, {title}: {told}."))
    caption = (
        "One dot is one unlabeled batch: the decrease of the downstream loss that V predicts, and what a step gives."
    )
    return Figure("probe", "Does V foretell the step?", caption, panels)


def _probe_png(title: str, rows: Mapping[str, Mapping[str, Any]]) -> bytes:
    figure, axes = new_axes(4.4, 3.3)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.axvline(0, color=INK, linewidth=0.6)
    for (arm, row), style in zip(rows.items(), arm_styles(list(rows)).values(), strict=True):
        low, high = row["interval"]
        label = f"{arm_label(arm)}: r = {row['pearson']:.2f} [{low:.2f}, {high:.2f}]"
        axes.scatter(row["predicted"], row["realised"], s=22, color=style.colour, marker=style.marker, label=label)
    axes.set_title(title, loc="left", fontsize=11.5)
    axes.set_xlabel("predicted decrease", fontsize=10)
    axes.set_ylabel("realised decrease", fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(-0.02, -0.2))
    return to_png(figure)


# --- images -------------------------------------------------------------------------------------------------


def denormalise(images: ArrayLike, mean: ArrayLike, std: ArrayLike) -> Images:
    """Views [n 3 h w] normalised with a backbone's ``mean`` and ``std`` [3], back to uint8 [n 3 h w]."""
    scale = np.asarray(std, dtype=np.float64).reshape(1, 3, 1, 1)
    shift = np.asarray(mean, dtype=np.float64).reshape(1, 3, 1, 1)
    return ((np.asarray(images, dtype=np.float64) * scale + shift).clip(0, 1) * 255).round().astype(np.uint8)


def masks_figure(images: ArrayLike, masks: Mapping[str, ArrayLike], views: Mapping[str, ArrayLike]) -> Figure:
    """A panel an arm that designs views: image, soft mask drawn over it, learned view; a row an image.

    ``images``: uint8 [n 3 h w]. ``masks``: arm -> [n h w] or [n 1 h w] in [0, 1], 1 = kept.
    ``views``: arm -> uint8 [n 3 h w]. Raises ValueError when the shapes do not fit.
    """
    originals = to_images("images", images)
    panels = []
    for arm in order_arms(masks):
        mask = np.asarray(masks[arm], dtype=np.float64)
        mask = mask[:, 0] if mask.ndim == 4 else mask
        view = to_images(f"views of {arm!r}", views[arm])
        if mask.shape != originals.shape[:3] or view.shape != originals.shape:
            raise ValueError(f"{arm}: masks {mask.shape} and views {view.shape} do not fit images {originals.shape}")
        kept = ", ".join(f"{m:.0%}" for m in mask.mean(axis=(1, 2)))
        alt = f"{len(originals)} images, {arm_label(arm)}'s soft masks, learned views. Mask means: {kept}."
        panels.append(Panel(arm, _masks_png(arm, originals, mask, view), alt))
    caption = (
        "Left: the image; middle: the soft mask over it (bright: kept, dark: hidden) with its mean; "
        "right: the view that the student is given."
    )
    return Figure("masks", "What the student sees", caption, panels)


def _masks_png(arm: str, images: Images, masks: Array, views: Images) -> bytes:
    rows = len(images)
    figure, cells = new_cells(rows, ["image", "mask", "learned view"], above=0.52, below=0.42)
    shade = colormaps[MASK_COLOURS]
    for row, (image, mask, view) in enumerate(zip(images, masks, views, strict=True)):
        grey = image.mean(axis=-1, keepdims=True) / 255
        cells[row][0].imshow(image)
        cells[row][1].imshow((0.35 * grey + 0.65 * shade(mask)[..., :3]).clip(0, 1))
        cells[row][1].text(
            0.03, 0.03, f"{mask.mean():.0%}", transform=cells[row][1].transAxes, fontsize=9, color=INK,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
        )  # fmt: skip
        cells[row][2].imshow(view)
    height = figure.get_figheight()
    bar = figure.add_axes((0.36, 0.26 / height, 0.28, 0.1 / height))
    figure.colorbar(ScalarMappable(cmap=shade), cax=bar, orientation="horizontal", ticks=[0, 1])
    bar.set_xticks([0, 1], ["0 hidden", "1 kept"], fontsize=9)
    bar.tick_params(length=0, pad=2)
    figure.text(
        0.01,
        1 - 0.02 / height,
        arm_label(arm),
        fontsize=12,
        weight="bold",
        va="top",
        color=style_of(arm).colour,
    )
    return to_png(figure)


def targets_figure(images: ArrayLike, maps: Mapping[str, ArrayLike]) -> Figure:
    """A panel an arm that moves targets: image, and how far the target of each patch has gone; a row an image.

    ``images``: uint8 [n 3 h w]. ``maps``: arm -> KL(q′‖q) in nats [n rows columns]; one scale for all arms. Raises
    ValueError when the shapes do not fit.
    """
    originals = to_images("images", images)
    values = {arm: np.asarray(maps[arm], dtype=np.float64) for arm in order_arms(maps)}
    top = max((float(value.max()) for value in values.values()), default=0.0) or 1.0
    panels = []
    for arm, value in values.items():
        if value.ndim != 3 or len(value) != len(originals):
            raise ValueError(f"{arm}: maps {value.shape} do not fit {len(originals)} images")
        alt = (
            f"{len(originals)} images, and how far {arm_label(arm)} moves each patch's target: {value.mean():.2f} nats."
        )
        panels.append(Panel(arm, _maps_png(arm, originals, value, top), alt))
    caption = (
        "Left: the image; right: KL(q′‖q) of each patch's target over it, with its mean in nats: bright patches are "
        "asked for something else than the teacher says."
    )
    return Figure("targets", "What the student is asked for", caption, panels)


def _maps_png(arm: str, images: Images, maps: Array, top: float) -> bytes:
    figure, cells = new_cells(len(images), ["image", "target moved"], above=0.52, below=0.42)
    shade = colormaps[MASK_COLOURS]
    for row, (image, values) in enumerate(zip(images, maps, strict=True)):
        cells[row][0].imshow(image)
        places = [np.arange(side) * count // side for side, count in zip(image.shape[:2], values.shape, strict=True)]
        grey = image.mean(axis=-1, keepdims=True) / 255
        cells[row][1].imshow((0.35 * grey + 0.65 * shade(values[np.ix_(*places)] / top)[..., :3]).clip(0, 1))
        cells[row][1].text(
            0.03, 0.03, f"{values.mean():.2f}", transform=cells[row][1].transAxes, fontsize=9, color=INK,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
        )  # fmt: skip
    height = figure.get_figheight()
    bar = figure.add_axes((0.36, 0.26 / height, 0.28, 0.1 / height))
    figure.colorbar(ScalarMappable(cmap=shade), cax=bar, orientation="horizontal", ticks=[0, 1])
    bar.set_xticks([0, 1], ["0", f"{top:.2g} nats"], fontsize=9)
    bar.tick_params(length=0, pad=2)
    figure.text(
        0.01, 1 - 0.02 / height, arm_label(arm), fontsize=12, weight="bold", va="top", color=style_of(arm).colour
    )  # fmt: skip
    return to_png(figure)


def pca_rgb(features: ArrayLike, reference: ArrayLike | None = None) -> Array:
    """First three principal components of patch features [n h w d] as colours [n h w 3] in [0, 1].

    One basis for all n images of a backbone. Signs are fixed by the data, not by the solver: each component's
    third moment is positive. With ``reference``, another backbone's colours [n h w 3] of the same images, the
    components are reordered and flipped to correlate with it as well as they can, so that like parts get like
    colours; nothing else changes.
    """
    data = np.asarray(features, dtype=np.float64)
    if data.ndim != 4:
        raise ValueError(f"features must be [n h w d], found shape {data.shape}")
    flat = data.reshape(-1, data.shape[-1])
    flat = flat - flat.mean(axis=0)
    _, _, basis = np.linalg.svd(flat, full_matrices=False)
    parts = np.zeros((flat.shape[0], 3))  # fewer than three dimensions leave the rest grey
    parts[:, : min(3, len(basis))] = flat @ basis[:3].T
    parts *= np.where((parts**3).sum(axis=0) < 0, -1.0, 1.0)
    if reference is not None:
        parts = _match(parts, np.asarray(reference, dtype=np.float64).reshape(-1, 3))
    # Percentiles, not extremes: one odd patch must not wash out all others.
    low, high = np.percentile(parts, [1, 99], axis=0)
    flatness = high - low <= 1e-9 * max(1.0, float(np.abs(flat).max()))
    scaled = np.where(flatness, 0.5, (parts - low) / np.where(flatness, 1.0, high - low))
    colours: Array = scaled.clip(0, 1).reshape(*data.shape[:-1], 3)
    return colours


def _match(parts: Array, reference: Array) -> Array:
    """Columns of ``parts`` [m 3], reordered and flipped to correlate most with ``reference`` [m 3]."""
    a, b = parts - parts.mean(axis=0), reference - reference.mean(axis=0)
    norms = np.linalg.norm(a, axis=0)[:, None] * np.linalg.norm(b, axis=0)
    correlation = np.divide(a.T @ b, norms, out=np.zeros((3, 3)), where=norms > 0)
    best = max(
        itertools.permutations(range(3)),
        key=lambda order: sum(abs(correlation[order[j], j]) for j in range(3)),
    )
    signs = np.array([-1.0 if correlation[best[j], j] < 0 else 1.0 for j in range(3)])
    matched: Array = parts[:, list(best)] * signs
    return matched


def _nearest(maps: Array, height: int, width: int) -> Array:
    """[n h w c] by nearest neighbour to [n height width c]."""
    rows, columns = (np.arange(new) * old // new for new, old in zip((height, width), maps.shape[1:3], strict=True))
    resized: Array = maps[:, rows][:, :, columns]
    return resized


def pca_figure(images: ArrayLike, features: Mapping[str, ArrayLike]) -> Figure:
    """The first three principal components of each arm's patch features as colours, next to the image.

    ``images``: uint8 [n 3 H W]; ``features``: arm -> [n h w d] of the same images, step 0 among them. Grids may differ.
    """
    originals = to_images("images", images)
    order = order_arms(features)
    colours: dict[str, Array] = {}
    for arm in order:
        grid = np.shape(features[arm])[1:3]
        colours[arm] = pca_rgb(features[arm], _nearest(colours[order[0]], *grid) if colours else None)
    figure, cells = new_cells(len(originals), ["image", *map(arm_label, order)], above=0.3, below=0.02)
    for row, image in enumerate(originals):
        cells[row][0].imshow(image)
        for column, arm in enumerate(order, 1):
            cells[row][column].imshow(colours[arm][row], interpolation="nearest")
    longest = max(map(len, map(arm_label, order)))
    # points above a cell; a bold letter is three quarters of its size wide
    room = 72 * figure.get_figwidth() / (len(order) + 1)
    size = min(11, room / (0.75 * longest))
    for column, arm in enumerate(order, 1):
        cells[0][column].set_title(arm_label(arm), fontsize=size, pad=4, color=style_of(arm).colour, weight="bold")
    arms = ", ".join(map(arm_label, order))
    alt = f"{len(originals)} images, and for each the PCA colours of the patch features of the arms {arms}."
    caption = (
        "The first three principal components of the patch features as red, green and blue, one basis per "
        "arm over all the images shown. Components of the later arms are reordered and flipped to match the "
        "first one's; like colours mean like features within an arm, and only roughly so across arms."
    )
    return Figure("pca", "Patch features", caption, [Panel("pca", to_png(figure), alt)])
