"""`dino-value pareto`: runs in the plane of two metrics, which of them no other beats in both, and the volume below.

Checkpoints over α and designer settings in the (mIoU, 1 − RMSE) plane: the paper's Pareto figure (arXiv 2601.22108).
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dino_value.arguments import Parser
from dino_value.errors import EXIT_DONE, UserError
from dino_value.files import write_bytes, write_json, write_text
from dino_value.models.backbone import WEIGHTS_NAME
from dino_value.models.weight_files import read_header

Array = NDArray[np.float64]
STEP0, BASELINE = "step-0", "baseline"
DEFAULT = ("seg.miou", "1-depth.rmse")


@dataclass(frozen=True)
class Axis:
    """A metric of an evaluation; `1-NAME` counts it from 1 downwards, so that up is always better."""

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(1-)?[a-z0-9_]+\.[A-Za-z0-9_]+", self.name):
            raise UserError(
                f"objective {self.name!r}: write EVALUATION.METRIC, or 1-EVALUATION.METRIC where less is better"
            )

    @property
    def metric(self) -> str:
        return self.name.removeprefix("1-")

    @property
    def label(self) -> str:
        return self.name.replace("1-", "1 − ")

    def of(self, value: float) -> float:
        return 1 - value if self.name.startswith("1-") else value


@dataclass
class Point:
    """One evaluated checkpoint.

    Args:
        name: as it is called in tables.
        kind: `step-0`, `baseline` or the run's method.
        metrics: by `<evaluation>.<metric>`.
        settings: what tells it from the others.
        protocol: evaluation to the settings it was made with.
        frontier: no other point is at least as good in both metrics and better in one.
    """

    name: str
    kind: str
    metrics: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    frontier: bool = False


# --- points


def find_points(folders: Sequence[Path]) -> list[Point]:
    """Every run in or below `folders` (two levels, so that a sweep's folder will do) that has results.

    Raises:
        UserError: no such folder, or nothing evaluated in it.
    """
    points: dict[Path, Point] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        places = [folder, *sorted(folder.glob("*/")), *sorted(folder.glob("*/*/"))]
        found = [place for place in places if _results(place)]
        if not found:
            raise UserError(f"{folder}: no results; evaluate its runs with dino-value eval … --out RUN/results/NAME")
        params = _sweep_params(folder)
        for place in found:
            name = place.name if place == folder else str(place.relative_to(folder))
            points[place.resolve()] = read_point(place, name, params.get(place.name))
    return list(points.values())


def _results(place: Path) -> list[Path]:
    return [*sorted(place.glob("results/*.json")), *sorted(place.glob("results/*/results.json"))]


def _sweep_params(folder: Path) -> dict[str, dict[str, Any]]:
    """Trial folder to the point of the space, where `folder` is a sweep's."""
    path = folder / "trials.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    return {f"{row['number']:04d}": row["params"] for row in rows}


def read_point(place: Path, name: str, settings: dict[str, Any] | None = None) -> Point:
    """One run folder with its results.

    Raises:
        UserError: two results of one evaluation.
    """
    metrics: dict[str, float] = {}
    protocol: dict[str, Any] = {}
    for path in _results(place):
        content = json.loads(path.read_text())
        evaluation = content.get("evaluation") if isinstance(content, dict) else None
        if evaluation is None:
            continue  # a probe's, or someone else's
        if evaluation in protocol:
            raise UserError(f"{place}: two results of {evaluation}; keep the one to be shown below {place / 'results'}")
        protocol[evaluation] = {**content.get("settings", {}), "data": content.get("data", {}).get("path")}
        metrics |= {f"{evaluation}.{key}": float(v) for key, v in content.items() if type(v) in (int, float)}
    config: dict[str, Any] = {}
    if (place / "config.yaml").is_file():
        loaded = OmegaConf.to_container(OmegaConf.load(place / "config.yaml"))
        config = {str(key): value for key, value in loaded.items()} if isinstance(loaded, dict) else {}
    kind = STEP0 if untouched(place) else str(config.get("method", "run"))
    if settings is None and kind not in (STEP0, BASELINE):
        feedback = config.get("feedback", {})
        settings = {f"feedback.{task}.weight": feedback.get(task, {}).get("weight") for task in ("seg", "depth")}
        settings["designer.name"] = config.get("designer", {}).get("name")
    settings = {key: value for key, value in (settings or {}).items() if value is not None}
    return Point(name, kind, metrics, settings, protocol)


def untouched(place: Path) -> bool:
    """Whether a folder holds the weights of step 0, as a sweep's reference does; False where they cannot be read."""
    try:
        return (read_header(place / WEIGHTS_NAME) or {}).get("step") == "0"
    except UserError:
        return False


def differing_protocols(points: Sequence[Point], axes: Sequence[Axis]) -> list[str]:
    """What keeps the points from being compared: a line for each setting of an evaluation that is not the same."""
    lines = []
    for evaluation in sorted({axis.metric.partition(".")[0] for axis in axes}):
        rows = [point.protocol.get(evaluation, {}) for point in points]
        for key in sorted({key for row in rows for key in row}):
            values = list(dict.fromkeys(json.dumps(row.get(key)) for row in rows))
            if len(values) > 1:
                lines.append(f"{evaluation} was evaluated with {key}={' and '.join(values[:3])}")
    return lines


# --- dominance


def frontier(values: Array) -> NDArray[np.bool_]:
    """Which rows of `values` [n k] no other row dominates: at least as good (large) in all columns, better in one."""
    at_least = (values[None] >= values[:, None]).all(-1)  # [i j]: j at least as good as i
    better = (values[None] > values[:, None]).any(-1)
    dominated: NDArray[np.bool_] = np.any(at_least & better, axis=1)
    return ~dominated


def hypervolume(values: Array, reference: Array) -> float:
    """Volume between `reference` [k] and the points [n k] that exceed it; larger is better (Zitzler, Thiele 1999).

    Raises:
        UserError: Optuna, which computes it, is not installed.
    """
    try:
        from optuna._hypervolume import compute_hypervolume
    except ImportError:
        raise UserError("the hypervolume needs Optuna 4 or newer: pip install 'dino-value[sweep]'") from None
    above = values[(values > reference).all(1)]
    return float(compute_hypervolume(-above, -reference)) if len(above) else 0.0


@dataclass
class Pareto:
    """What is shown: the points that have both metrics, the best of the first one first."""

    axes: tuple[Axis, Axis]
    points: list[Point]
    left_out: list[str]
    volumes: dict[str, float]

    def value(self, point: Point) -> tuple[float, float]:
        x, y = (axis.of(point.metrics[axis.metric]) for axis in self.axes)
        return x, y

    @property
    def front(self) -> list[Point]:
        return [point for point in self.points if point.frontier]


def pareto(points: Sequence[Point], axes: tuple[Axis, Axis]) -> Pareto:
    """Frontier and hypervolumes.

    Raises:
        UserError: no point has both metrics.
    """
    has = [point for point in points if all(axis.metric in point.metrics for axis in axes)]
    if not has:
        known = sorted({key for point in points for key in point.metrics})
        wanted = " and ".join(axis.metric for axis in axes)
        raise UserError(f"no run has {wanted}; they have {', '.join(known[:12]) or 'no metrics'}")
    found = Pareto(axes, has, [point.name for point in points if point not in has], {})
    values = np.array([found.value(point) for point in has], dtype=np.float64)
    for point, on in zip(has, frontier(values), strict=True):
        point.frontier = bool(on)
    kinds = np.array([point.kind for point in has])
    worst = values.min(0)
    found.volumes["all, over the worst of each metric"] = hypervolume(values, worst)
    if (kinds == BASELINE).any():
        found.volumes["baseline, over the worst of each metric"] = hypervolume(values[kinds == BASELINE], worst)
    if (kinds == STEP0).any():
        found.volumes["all, over step-0"] = hypervolume(values, values[kinds == STEP0].max(0))
    order = np.lexsort((-values[:, 1], -values[:, 0]))
    found.points = [has[index] for index in order]
    return found


# --- what is shown


def print_pareto(found: Pareto, console: Console) -> None:
    table = Table("run", "kind", *(axis.label for axis in found.axes), "frontier", "settings")
    for point in found.points:
        numbers = [f"{value:.4f}" for value in found.value(point)]
        cells = [point.name, point.kind, *numbers, "yes" if point.frontier else "", describe(point.settings)]
        table.add_row(*map(Text, cells))
    console.print(table)
    for name, volume in found.volumes.items():
        console.print(f"hypervolume of {name}: {volume:.3e}", highlight=False)
    if found.left_out:
        console.print(f"without both metrics: {', '.join(found.left_out)}", highlight=False, soft_wrap=True)


def describe(settings: dict[str, Any], separator: str = "  ") -> str:
    def short(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return separator.join(f"{key}={short(value)}" for key, value in settings.items())


def as_json(found: Pareto) -> dict[str, Any]:
    keys = [axis.name for axis in found.axes]
    rows = [
        {
            "run": point.name,
            "kind": point.kind,
            **dict(zip(keys, found.value(point), strict=True)),
            "frontier": point.frontier,
            "settings": point.settings,
        }
        for point in found.points
    ]
    return {"points": rows, "hypervolume": found.volumes}


def groups(found: Pareto) -> list[tuple[str, list[Point], str, str]]:
    """(label, points, colour, marker): the frontier's line is drawn besides; colours are those of the reports."""
    ordinary = [point for point in found.points if point.kind not in (STEP0, BASELINE)]
    every = [
        ("dominated", [point for point in ordinary if not point.frontier], "#b8b8b8", "o"),
        ("frontier", [point for point in ordinary if point.frontier], "#d55e00", "o"),
        (BASELINE, [point for point in found.points if point.kind == BASELINE], "#0072b2", "s"),
        (STEP0, [point for point in found.points if point.kind == STEP0], "#222222", "D"),
    ]
    return [group for group in every if group[1]]


def draw(found: Pareto) -> bytes:
    """The plane as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    line = np.array([found.value(point) for point in found.front])
    axes.step(line[:, 0], line[:, 1], where="post", color="#d55e00", linewidth=1, zorder=1)
    for label, points, colour, marker in groups(found):
        values = np.array([found.value(point) for point in points])
        style: dict[str, Any] = {"c": colour, "marker": marker, "s": 42, "edgecolors": "white", "linewidths": 0.6}
        axes.scatter(values[:, 0], values[:, 1], label=label, zorder=3, **style)
    for point in found.front:
        name = Path(point.name).name
        axes.annotate(name, found.value(point), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel(f"{found.axes[0].label}  (right is better)")
    axes.set_ylabel(f"{found.axes[1].label}  (up is better)")
    axes.grid(color="#e8e8e8", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def page(found: Pareto, warnings: Sequence[str] = ()) -> str:
    """An interactive page of one file, without anything from the network.

    Raises:
        UserError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ModuleNotFoundError:
        raise UserError(
            "the interactive page needs plotly: pip install 'dino-value[sweep]'; or give --no-html"
        ) from None
    symbols = {"o": "circle", "s": "square", "D": "diamond"}
    figure = go.Figure()
    x, y = zip(*(found.value(point) for point in found.front), strict=True)
    # from right to left the frontier rises: along, then up
    figure.add_scatter(x=x, y=y, mode="lines", line={"shape": "hv", "color": "#d55e00", "width": 1}, showlegend=False)
    for label, points, colour, marker in groups(found):
        x, y = zip(*(found.value(point) for point in points), strict=True)
        shown = [
            f"<b>{html.escape(point.name)}</b><br>{html.escape(describe(point.settings, ' | '))}" for point in points
        ]
        figure.add_scatter(
            x=x,
            y=y,
            mode="markers",
            name=label,
            text=[text.replace(" | ", "<br>") for text in shown],
            marker={"color": colour, "symbol": symbols[marker], "size": 10},
            hovertemplate="%{text}<br>%{x:.4f}, %{y:.4f}<extra></extra>",
        )
    first, second = found.axes
    figure.update_layout(template="simple_white", xaxis_title=first.label, yaxis_title=second.label, height=560)
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ("run", "kind", first.label, second.label, "settings"))
    rows = "".join(
        f"<tr{' class=front' if point.frontier else ''}>"
        + "".join(
            f"<td>{html.escape(text)}</td>"
            for text in (point.name, point.kind, *(f"{v:.4f}" for v in found.value(point)), describe(point.settings))
        )
        + "</tr>"
        for point in found.points
    )
    lines = [*warnings, *(f"hypervolume of {name}: {volume:.3e}" for name, volume in found.volumes.items())]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Pareto frontier</title>"
        "<style>body{font:15px system-ui;margin:2em auto;max-width:72em;color:#222}table{border-collapse:collapse}"
        "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #e8e8e8}.front{font-weight:600}</style>"
        f"<h1>{html.escape(first.label)} and {html.escape(second.label)}</h1>"
        f"{figure.to_html(full_html=False, include_plotlyjs=True)}"
        f"{''.join(f'<p>{html.escape(line)}</p>' for line in lines)}"
        f"<p>Runs of the frontier are set bold.</p><table><tr>{head}</tr>{rows}</table></html>"
    )


def main(argv: Sequence[str]) -> int:
    """The command; see `--help`.

    Raises:
        UserError: whatever the user can mend.
    """
    parser = Parser("dino-value pareto", description="Evaluated runs and sweeps in the plane of two metrics.")
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="run folders, folders of runs, sweeps")
    parser.add_argument("--out", type=Path, default=Path("pareto"), help="folder of the report (default: %(default)s)")
    parser.add_argument(
        "--objectives",
        nargs=2,
        default=DEFAULT,
        metavar=("X", "Y"),
        help=f"EVALUATION.METRIC, 1-EVALUATION.METRIC where less is better (default: {' '.join(DEFAULT)})",
    )
    parser.add_argument("--no-html", action="store_true", help="without the interactive page, which needs plotly")
    arguments = parser.parse_args(list(argv))
    first, second = map(Axis, arguments.objectives)
    points = find_points(arguments.dirs)
    found = pareto(points, (first, second))
    warnings = differing_protocols(found.points, found.axes)
    console = Console()
    for line in warnings:
        Console(stderr=True).print(f"warning: {line}: not comparable", style="yellow", highlight=False, soft_wrap=True)
    interactive = None if arguments.no_html else page(found, [f"Not comparable: {line}." for line in warnings])
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_bytes(arguments.out / "pareto.png", draw(found))
        write_json(arguments.out / "pareto.json", as_json(found))
        if interactive is not None:
            write_text(arguments.out / "pareto.html", interactive)
    except OSError as error:
        raise UserError(f"{arguments.out}: cannot be written ({error.strerror})") from None
    print_pareto(found, console)
    print(arguments.out / ("pareto.png" if arguments.no_html else "pareto.html"))
    return EXIT_DONE
