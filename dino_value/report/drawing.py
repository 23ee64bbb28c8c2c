"""What every picture of a report is drawn with: an arm's style, quiet axes, sheets of images, PNG bytes.

One colour, marker and line style an arm, everywhere; the colours are those of Okabe and Ito, told apart by
colour-blind readers. Drawn on matplotlib's Agg canvas without pyplot: no display is needed and no global
state is touched.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as MplFigure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

Images = NDArray[np.uint8]

DPI = 160
INK, FAINT, PAPER = "#222222", "#d9d9d9", "#ffffff"


@dataclass(frozen=True)
class ArmStyle:
    colour: str
    marker: str
    line: str


_STYLES = {
    "step0": ArmStyle("#6b6b6b", "D", ":"),
    "baseline": ArmStyle("#0072b2", "o", "-"),
    "random": ArmStyle("#009e73", "^", "--"),
    "value": ArmStyle("#d55e00", "s", "-"),
}
_SPARE_STYLES = [
    ArmStyle("#cc79a7", "v", "-."),
    ArmStyle("#56b4e9", "P", "--"),
    ArmStyle("#e69f00", "X", "-."),
    ArmStyle("#000000", "*", ":"),
]


def arm_styles(arms: Sequence[str]) -> dict[str, ArmStyle]:
    """A style for each arm: the standard arms always look the same, others take the spare styles in turn."""
    spare = itertools.cycle(_SPARE_STYLES)
    return {arm: _STYLES[arm] if arm in _STYLES else next(spare) for arm in arms}


@dataclass(frozen=True)
class Panel:
    """One picture. ``name`` becomes its file's name, ``alt`` says in words what it shows."""

    name: str
    png: bytes
    alt: str


@dataclass(frozen=True)
class Figure:
    """Panels under one title and caption, side by side on a wide page and stacked on a narrow one."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]


def style_of(arm: str) -> ArmStyle:
    return arm_styles([arm])[arm]


def to_images(what: str, images: ArrayLike) -> Images:
    """uint8 [n 3 h w], checked, as uint8 [n h w 3] to draw."""
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[1] != 3 or array.dtype != np.uint8:
        raise ValueError(f"{what} must be uint8 [n 3 h w], found {array.dtype} {array.shape}")
    return array.transpose(0, 2, 3, 1)


def new_axes(width: float, height: float) -> tuple[MplFigure, Axes]:
    """A figure of ``width`` x ``height`` inches with one quiet pair of axes."""
    figure = MplFigure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor=PAPER)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8a8a8a")
    axes.tick_params(colors=INK, labelsize=10, length=3)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    return figure, axes


def new_cells(rows: int, columns: Sequence[str], *, above: float, below: float) -> tuple[MplFigure, list[list[Axes]]]:
    """A sheet of cells with a small gap and headed columns; ``above``, ``below``: margins in inches."""
    width, gap = 5.4, 0.05
    side = (width - gap * (len(columns) - 1)) / len(columns)
    height = rows * side + (rows - 1) * gap + above + below
    figure = MplFigure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    frame = {"left": 0, "right": 1, "bottom": below / height, "top": 1 - above / height}
    grid = figure.add_gridspec(rows, len(columns), **frame, wspace=gap / side, hspace=gap / side)
    cells = [[figure.add_subplot(grid[r, c]) for c in range(len(columns))] for r in range(rows)]
    for axes in itertools.chain.from_iterable(cells):
        axes.set_axis_off()
    for axes, title in zip(cells[0], columns, strict=True):
        axes.set_title(title, fontsize=11, pad=4, color=INK)
    return figure, cells


def to_png(figure: MplFigure) -> bytes:
    buffer = io.BytesIO()
    # No software version in the file: the same numbers give the same bytes.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
