"""`dino-value report RUN…`: one page about finished or unfinished runs, from what lies in their folders."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dino_value.backbones import WEIGHTS_NAME, load_backbone
from dino_value.checkpoint import latest_checkpoint
from dino_value.config import Config, load_config
from dino_value.errors import UserError
from dino_value.gallery import SHOWN, held_out_images, masked, patch_map
from dino_value.report.figures import (
    Figure,
    Panel,
    curves_figure,
    masks_figure,
    pca_figure,
    probe_figure,
    results_figure,
)
from dino_value.report.page import Report, write_report
from dino_value.track import read_metrics

CURVES = (
    "loss",
    "value",
    "cosine",
    "mask_mean",
    "held_cosine_designed",
    "loss_seg",
    "loss_depth",
    "rankme",
    "knn_top1",
    "teacher_entropy",
    "images_per_second",
)
HEADLINES = {"seg": ("miou",), "depth": ("rmse", "absrel", "delta1"), "linear": ("top1",), "knn": ("top1",)}


def report_runs(runs: Sequence[Path], path: Path) -> Path:
    """Write the page and its pictures.

    Args:
        runs: run folders. Runs that differ in nothing but method and seed are shown as arms with paired seeds.

    Raises:
        UserError: not a run folder; a data set of the run that has moved.
    """
    configs = {run: _config(run) for run in runs}
    arms = arms_of_runs(configs)
    first = configs[runs[0]]
    results = evaluated(arms)
    figures = [results_figure(results)] if results is not None else []
    figures.append(curves_figure(arms, CURVES))
    images = held_out_images(first)
    if images is not None:
        figures += _galleries(arms, images)
    probes = {arm: found for arm, folders in arms.items() if (found := _json(folders[0] / "results" / "probe.json"))}
    figures += [probe_figure(probes)] if probes else []
    figures += [figure for arm, folders in arms.items() if (figure := pictures_figure(arm, folders[0])) is not None]
    about = _json(runs[0] / "environment.json") or {}
    page = Report(
        title=f"Run {runs[0].resolve().name}" if len(runs) == 1 else f"{len(runs)} runs",
        summary=_summary(configs),
        results=results,
        figures=figures,
        notes=_notes(arms),
        settings=_settings(first),
        commands=[command for run in runs if (command := _command(run))],
        environment={name: value for name, value in about.items() if name not in ("command", "seed", "resumed")},
        seconds=sum(_seconds(run) for run in runs),
    )
    return write_report(path, page)


def _config(run: Path) -> Config:
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run folder (it has no config.yaml); give folders made by `dino-value train`")
    return load_config(run / "config.yaml")


def arms_of_runs(configs: Mapping[Path, Config]) -> dict[str, list[Path]]:
    """Runs by method, in the order of their seeds, if every method has the same seeds; else each run by its name."""
    by_method: dict[str, dict[int, Path]] = {}
    for run, config in configs.items():
        by_method.setdefault(config.method, {})[config.seed] = run
    paired = len({frozenset(seeds) for seeds in by_method.values()}) == 1
    if paired and sum(map(len, by_method.values())) == len(configs):
        return {method: [seeds[seed] for seed in sorted(seeds)] for method, seeds in by_method.items()}
    names = [run.resolve().name for run in configs]
    if len(set(names)) < len(names):
        names = [str(run) for run in configs]
    return {name: [run] for name, run in zip(names, configs, strict=True)}


def evaluated(arms: Mapping[str, Sequence[Path]]) -> dict[str, Any] | None:
    """What `dino-value eval` left in the runs' folders, for the metrics that every run has; None if there is none."""
    rows = {arm: [_metrics(run) for run in folders] for arm, folders in arms.items()}
    shared = set.intersection(*(set(row) for found in rows.values() for row in found))
    if not shared:
        return None
    order = [name for name in next(iter(rows.values()))[0] if name in shared]
    return {"arms": {arm: {name: [row[name] for row in found] for name in order} for arm, found in rows.items()}}


def _metrics(run: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for path in sorted((run / "results").rglob("results.json")):
        content = _json(path) or {}
        name = content.get("evaluation", "")
        for metric in HEADLINES.get(name, ()):
            if isinstance(content.get(metric), float):
                found[f"knn_{metric}" if name == "knn" else metric] = content[metric]
    return found


def _galleries(arms: Mapping[str, Sequence[Path]], images: Tensor) -> list[Figure]:
    figures, masks, views = [], dict[str, Tensor](), dict[str, Tensor]()
    finished = {arm: folders[0] for arm, folders in arms.items() if (folders[0] / WEIGHTS_NAME).is_file()}
    for arm, run in finished.items():
        for checkpoint in sorted((run / "checkpoints").glob("step_*.pt")):
            found = masked(run, images, checkpoint)
            if found is not None:
                name = arm if checkpoint == latest_checkpoint(run / "checkpoints") else f"{arm}, {checkpoint.stem}"
                masks[name], views[name] = found
    if masks:
        figures.append(masks_figure(images, masks, views))
    if finished:
        features = {arm: patch_map(load_backbone(run), images) for arm, run in finished.items()}
        figures.append(pca_figure(images, features))
    return figures


def pictures_figure(arm: str, run: Path) -> Figure | None:
    """What `dino-value eval --save-images` drew, beside the truth; None where it did not."""
    panels = []
    for folder in sorted((run / "results").rglob("pictures")):
        for path in sorted(folder.glob("*.png"))[:SHOWN]:
            name = folder.parent.name
            panels.append(Panel(f"{name}_{path.stem}", path.read_bytes(), f"{name}: image, truth and prediction"))
    caption = "From left to right: the image, the truth, the prediction of a head on the frozen backbone."
    return Figure(f"predictions_{arm}", f"Predictions: {arm}", caption, panels) if panels else None


def _summary(configs: Mapping[Path, Config]) -> str:
    first = next(iter(configs.values()))
    methods = sorted({config.method for config in configs.values()})
    steps = sorted({config.steps for config in configs.values()})
    return (
        f"{first.backbone.name}, {' and '.join(map(str, steps))} steps of {first.objective.name} with batches of "
        f"{first.optim.batch_size}; methods: {', '.join(methods)}; started from "
        f"{first.start_from or first.backbone.weights or 'random weights'}."
    )


def _settings(config: Config) -> dict[str, object]:
    shown: dict[str, object] = {
        "steps": config.steps,
        "batch": config.optim.batch_size,
        "learning rate": config.optim.lr,
        "precision": config.precision,
    }
    if config.designs:
        v, d = config.value, config.designer
        shown |= {
            "designer": d.name,
            "direction": v.direction,
            "engine": v.engine,
            "update every": v.period,
            "scope": f"last {v.scope.blocks} blocks" if not v.scope.patterns else ", ".join(v.scope.patterns),
            "keep ratio": d.keep_ratio,
        }
    return shown


def _notes(arms: Mapping[str, Sequence[Path]]) -> list[str]:
    notes = []
    costs = {arm: _seconds(folders[0]) / steps for arm, folders in arms.items() if (steps := _steps(folders[0]))}
    if costs:
        least = min(costs.values())
        told = ", ".join(f"{arm} {cost:.3f} s ({cost / least:.2f}×)" for arm, cost in costs.items())
        notes.append(f"Time of a learner step, designer updates included: {told}.")
    for arm, folders in arms.items():
        for row in read_metrics(folders[0]):
            if "event" in row:
                notes.append(f"{arm}, step {row['step']}: {row['message']}")
    return notes


def _steps(run: Path) -> int:
    return max((int(row["step"]) for row in read_metrics(run)), default=0)


def _seconds(run: Path) -> float:
    return sum(row.get("seconds", 0.0) for row in read_metrics(run))


def _command(run: Path) -> str | None:
    command = (_json(run / "environment.json") or {}).get("command")
    return shlex.join(["dino-value", *command[1:]]) if command else None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found
