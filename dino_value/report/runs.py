"""`dino-value report RUN…`: one page about finished or unfinished runs, from what lies in their folders."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from dino_value.config import CONTROLS, NOISE, Config, load_config
from dino_value.errors import UserError
from dino_value.language.config import LanguageConfig, load_language_config
from dino_value.models.backbone import WEIGHTS_NAME, load_backbone
from dino_value.report.drawing import Figure, Panel
from dino_value.report.figures import (
    curves_figure,
    masks_figure,
    pca_figure,
    probe_figure,
    results_figure,
    targets_figure,
)
from dino_value.report.gallery import SHOWN, as_pictures, held_out_images, masked, moved, patch_map
from dino_value.report.history import efficiency_figure, mask_history_figure, probe_history_figure, spent
from dino_value.report.page import Report, Table, write_report
from dino_value.runs.metrics import METRICS_NAME, read_metrics
from dino_value.studies.pareto import DEFAULT, STEP0, Axis, draw, find_points, pareto, untouched

Drawn = TypeVar("Drawn")
Settings = Config | LanguageConfig

CURVES = (
    "loss",
    "held_loss",
    "value",
    "cosine",
    "mask_mean",
    "alpha",
    "held_cosine_designed",
    "plain_value",
    "moved_value",
    "best_value",
    "target_kl_dino",
    "target_kl_ibot",
    "target_kl_ijepa",
    "loss_seg",
    "loss_depth",
    "loss_classes",
    "rankme",
    "knn_top1",
    "teacher_entropy",
    "images_per_second",
    "tokens_per_second",
)
HEADLINES = {"seg": ("miou",), "depth": ("rmse", "absrel", "delta1"), "linear": ("top1",), "knn": ("top1",)}
LANGUAGE_HEADLINES = ("answer_loss", "pass@1_exact", "pass@1_verified", "accuracy")
EFFICIENCY = ("held_loss", "knn_top1", "rankme")  # measured alike in every arm, while it runs
MOMENTS = 4  # checkpoints whose masks are shown
FRONT = 6  # runs of a sweep's frontier that are shown


def report_runs(places: Sequence[Path], path: Path) -> Path:
    """Write the page and its pictures.

    Args:
        places: run folders of vision or of language, and folders of sweeps. Runs that differ in nothing but method and
            seed are shown as arms with paired seeds; a sweep adds its Pareto front and, where it is all that is given,
            the runs on it.

    What cannot be drawn, because data or weights have moved or are damaged, is left out, and the page says so.

    Raises:
        UserError: not a run folder, or a sweep without a run to show.
    """
    missing: list[str] = []
    sweeps = [place for place in places if (place / "trials").is_dir()]
    front = pareto_figure([*places], required=bool(sweeps))
    runs = [place for place in places if place not in sweeps] or frontier_runs(sweeps, missing)
    configs = {run: _config(run) for run in runs}
    arms = arms_of_runs(configs)
    first = configs[runs[0]]
    results = evaluated(arms)
    figures = [results_figure(results)] if results is not None and len(runs) > 1 else []  # a lone dot shows nothing
    figures += [front] if front else []
    logged = {arm: found for arm, folders in arms.items() if (found := [run for run in folders if _logged(run)])}
    figures += [curves_figure(logged, CURVES, headings=headings(configs.values()))] if logged else []
    figures += [figure for figure in (efficiency(arms, configs),) if figure is not None]
    figures += _probes(arms)
    figures += _galleries(arms, configs, missing)
    figures += [figure for arm, folders in arms.items() if (figure := pictures_figure(arm, folders[0])) is not None]
    about = _json(runs[0] / "environment.json")
    page = Report(
        title=f"Run {runs[0].resolve().name}" if len(runs) == 1 else f"{len(runs)} runs",
        summary=_summary(configs),
        results=results,
        tables=[cost] if (cost := cost_table(arms)) else [],
        figures=figures,
        notes=[*missing, *_notes(arms)],
        settings=_settings(first),
        commands=[command for run in runs for command in _commands(run)],
        environment=_environment(about),
        seconds=sum(_seconds(run) for run in runs),
    )
    return write_report(path, page)


def _config(run: Path) -> Settings:
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: not a run folder (it has no config.yaml); give folders made by `dino-value train`")
    try:
        language = "learner" in OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError):
        raise UserError(f"{path}: not a run's configuration") from None
    return load_language_config(path) if language else load_config(path)


def arms_of_runs(configs: Mapping[Path, Settings]) -> dict[str, list[Path]]:
    """Runs by method, in the order of their seeds, if every method has the same seeds; else each run by its name."""
    by_method: dict[str, dict[int, Path]] = {}
    for run, config in configs.items():
        by_method.setdefault(_method(run, config), {})[config.seed] = run
    paired = len({frozenset(seeds) for seeds in by_method.values()}) == 1
    if paired and sum(map(len, by_method.values())) == len(configs):
        return {method: [seeds[seed] for seed in sorted(seeds)] for method, seeds in by_method.items()}
    names = [run.resolve().name for run in configs]
    if len(set(names)) < len(names):
        names = [str(run) for run in configs]
    return {name: [run] for name, run in zip(names, configs, strict=True)}


def _method(run: Path, config: Settings) -> str:
    """What a run did: its method, or the designer's name where that is a control without labels; of a sweep's untouched
    start `step0`, whatever its settings."""
    if untouched(run):
        return "step0"
    if isinstance(config, Config) and config.method == "value":
        name = config.designer.name
        return name if {*name.split("+")} <= {*CONTROLS, *NOISE} else config.method
    return config.method


def headings(configs: Iterable[Settings]) -> dict[str, str]:
    """Titles of curves whose meaning the runs' settings decide."""
    vision = [config for config in configs if isinstance(config, Config)]
    losses = list(dict.fromkeys(_loss_of(config) for config in vision))
    found = {"loss": losses[0] if len(losses) == 1 else "The learner's loss, each arm's own"} if losses else {}
    if any(config.value.direction == "lookahead" and config.needs_labels for config in vision):
        found |= {"value": "Value V = ⟨u, g_pre⟩", "cosine": "Alignment: cosine of u and g_pre"}
    return found


def _loss_of(config: Config) -> str:
    if config.method == "finetune":
        return "Loss on the labels"
    moves = config.designs and config.designer.moves_targets
    return "Self-supervised loss, moved targets" if moves else "Self-supervised loss"


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
    for path in sorted((run / "results").rglob("*.json")):
        content = _json(path)
        name = content.get("evaluation", "")
        for metric in HEADLINES.get(name, ()):
            if isinstance(content.get(metric), float):
                key = f"knn_{metric}" if name == "knn" else metric
                found[f"{key}{_measured(content.get('settings', {}))}"] = content[metric]
        rows = content.get("metrics", {}) if "asked" in content else {}
        for metric in LANGUAGE_HEADLINES:
            if metric in rows and metric not in found:
                found[metric] = float(rows[metric]["mean"])
    return found


def _measured(settings: Mapping[str, Any]) -> str:
    """What tells results with few labels, or of a fine-tuned backbone, from the others: `@32_fine-tuned`."""
    labels = settings.get("labels")
    words = [*([] if labels is None else [str(labels)]), *(["fine-tuned"] if settings.get("finetune") else [])]
    return f"@{'_'.join(words)}" if words else ""


def _galleries(
    arms: Mapping[str, Sequence[Path]], configs: Mapping[Path, Settings], missing: list[str]
) -> list[Figure]:
    """Masks and features of each arm's first seed, over images of the first run's data as large as the arm's views."""
    first = next(iter(configs.values()))
    if not isinstance(first, Config):
        return []
    finished = {arm: folders[0] for arm, folders in arms.items() if (folders[0] / WEIGHTS_NAME).is_file()}
    by_size: dict[int, dict[str, Path]] = {}
    for arm, run in finished.items():
        config = configs[run]
        if isinstance(config, Config):
            by_size.setdefault(config.views.global_size, {})[arm] = run
    figures, shown, features = list[Figure](), None, dict[str, Tensor]()
    for size, group in by_size.items():
        images = _tried("masks and features", missing, held_out_images, first, SHOWN, size)
        if images is None:
            continue
        found = _mask_figures(group, images, missing)
        figures += found if shown is None else [_renamed(figure, size) for figure in found]
        shown = images if shown is None else shown
        for arm, run in group.items():
            maps = _tried(f"features of {arm}", missing, _features, run, images)
            features |= {} if maps is None else {arm: maps}
    return [*figures, pca_figure(as_pictures(shown), features)] if shown is not None and features else figures


def _mask_figures(runs: Mapping[str, Path], images: Tensor, missing: list[str]) -> list[Figure]:
    """The last masks of each arm, and how they came about."""
    last, history = dict[str, tuple[Tensor, Tensor]](), dict[str, dict[int, Tensor]]()
    for arm, run in runs.items():
        moments: dict[int, tuple[Tensor, Tensor]] = {}
        for step, path in _moments(run).items():
            found = _tried(f"masks of {arm}", missing, masked, run, images, path)
            moments |= {} if found is None else {step: found}
        if moments:
            last[arm] = moments[max(moments)]
        if len(moments) > 1:
            history[arm] = {step: masks for step, (masks, _) in moments.items()}
    figures = []
    if last:
        masks, views = ({arm: found[part] for arm, found in last.items()} for part in (0, 1))
        figures.append(masks_figure(images, masks, views))
    if history:
        few = 4  # rows: the pictures of one moment are small enough already
        shown = {arm: {step: masks[:few] for step, masks in moments.items()} for arm, moments in history.items()}
        figures.append(mask_history_figure(images[:few], shown))
    maps: dict[str, Tensor] = {}
    for arm, run in runs.items():
        drawn = _tried(f"targets of {arm}", missing, lambda: moved(run, images))  # noqa: B023
        maps |= {} if drawn is None else {arm: drawn}
    if maps:
        figures.append(targets_figure(as_pictures(images), maps))
    return figures


def _features(run: Path, images: Tensor) -> Tensor:
    return patch_map(load_backbone(run), images)


def _tried(what: str, missing: list[str], draw: Callable[..., Drawn], *arguments: Any) -> Drawn | None:
    """What `draw` gives; where it cannot, nothing, and why is noted once."""
    try:
        return draw(*arguments)
    except UserError as error:
        text = f"Left out: {what}. {error}"
        missing += [] if text in missing else [text]
        return None


def _renamed(figure: Figure, size: int) -> Figure:
    """The figure of arms whose views have another size than the first one's."""
    return dataclasses.replace(figure, name=f"{figure.name}_{size}", title=f"{figure.title}, {size} pixels")


def _moments(run: Path) -> dict[int, Path]:
    """Some of a run's checkpoints by step, evenly spread, the first and the last among them."""
    found = {int(path.stem.removeprefix("step_")): path for path in (run / "checkpoints").glob("step_*.pt")}
    steps = sorted(found)
    if len(steps) > MOMENTS:
        steps = [steps[round(i * (len(steps) - 1) / (MOMENTS - 1))] for i in range(MOMENTS)]
    return {step: found[step] for step in steps}


def _probes(arms: Mapping[str, Sequence[Path]]) -> list[Figure]:
    """What `dino-value probe` left in the first run of each arm: the last state, and r across training."""
    found: dict[str, dict[int, Any]] = {}
    for arm, folders in arms.items():
        for path in (folders[0] / "results").glob("probe*.json"):
            content = _json(path)
            if "designed_sgd" in content and re.fullmatch(r"probe(_step_\d+)?", path.stem):
                found.setdefault(arm, {})[int(content.get("step", _steps(folders[0])))] = content
    if not found:
        return []
    figures = [probe_figure({arm: rows[max(rows)] for arm, rows in found.items()})]
    history = {arm: rows for arm, rows in found.items() if len(rows) > 1}
    return [*figures, probe_history_figure(history)] if history else figures


def efficiency(arms: Mapping[str, Sequence[Path]], configs: Mapping[Path, Settings]) -> Figure | None:
    """Of the first metric that every arm has measured more than once while it ran; None without one."""
    what = "tokens" if any(isinstance(config, LanguageConfig) for config in configs.values()) else "images"
    for key in EFFICIENCY:
        found = {}
        for arm, (run, *_) in arms.items():
            config = configs[run]
            images = config.optim.batch_size if isinstance(config, Config) else None
            found[arm] = spent(read_metrics(run), key, images)
        if all(len(row.values) > 1 for row in found.values()):
            return efficiency_figure(key, found, what)
    return None


def cost_table(arms: Mapping[str, Sequence[Path]]) -> Table | None:
    """What a learner step costs, designer updates included; None before anything was logged."""
    costs = {arm: _seconds(folders[0]) / steps for arm, folders in arms.items() if (steps := _steps(folders[0]))}
    costs = {arm: cost for arm, cost in costs.items() if cost}
    if not costs:
        return None
    against = "baseline" if "baseline" in costs else min(costs, key=lambda arm: costs[arm])
    rows = {}
    for arm, cost in costs.items():
        run, paces = arms[arm][0], ("images_per_second", "tokens_per_second")
        amount = sum(row.get(pace, 0.0) * row.get("seconds", 0.0) for row in read_metrics(run) for pace in paces)
        rows[arm] = (str(_steps(run)), f"{cost:.3f}", f"{cost / costs[against]:.2f}×", f"{amount / _seconds(run):.4g}")
    unit = "tokens" if any("tokens" in row for row in read_metrics(arms[next(iter(rows))][0])) else "images"
    note = "Wall-clock of the loop with its designer updates, first seed of each arm."
    return Table("What it cost", ["steps", "seconds a step", f"against {against}", f"{unit} a second"], rows, note)


def pareto_figure(places: Sequence[Path], required: bool) -> Figure | None:
    """Runs and sweeps in the plane of mIoU and 1 − RMSE; None below three points, unless `required` by a sweep.

    Raises:
        UserError: a sweep without a trial that has both metrics.
    """
    axes = (Axis(DEFAULT[0]), Axis(DEFAULT[1]))
    try:
        found = pareto(find_points(places), axes)
    except UserError:
        if required:
            raise
        return None
    if len(found.points) < 3 and not required:
        return None
    best = "; ".join(f"{point.name} {', '.join(f'{v:.4f}' for v in found.value(point))}" for point in found.front)
    alt = f"{len(found.points)} runs in the plane of {axes[0].label} and {axes[1].label}. On the front: {best}."
    caption = "No other run is at least as good in both metrics and better in one than a run on the line."
    return Figure("pareto", "Pareto front", caption, [Panel("pareto", draw(found), alt)])


def frontier_runs(sweeps: Sequence[Path], missing: list[str]) -> list[Path]:
    """Folders of the runs on the sweeps' fronts, at most FRONT; where nothing trained is on one, those behind it too.

    Raises:
        UserError: no sweep has a run left.
    """
    runs: list[Path] = []
    for sweep in sweeps:
        points = pareto(find_points([sweep]), (Axis(DEFAULT[0]), Axis(DEFAULT[1]))).points  # best first
        there = [point for point in points if (sweep / point.name / "config.yaml").is_file()]
        front = [point for point in there if point.frontier]
        if any(point.kind != STEP0 for point in front):
            there = front
        else:
            missing.append(f"No trained run of {sweep} is on its Pareto front; those behind it are shown.")
        runs += [sweep / point.name for point in there]
    if not runs:
        raise UserError(f"{sweeps[0]}: no run folder is left in this sweep; give runs, or the sweep as it was")
    return runs[:FRONT]


def pictures_figure(arm: str, run: Path) -> Figure | None:
    """What `dino-value eval --save-images` drew, beside the truth; None where it did not."""
    panels = []
    for folder in sorted(run.rglob("pictures")):
        for path in sorted(folder.glob("*.png"))[:SHOWN]:
            name = folder.parent.name
            panels.append(Panel(f"{name}_{path.stem}", path.read_bytes(), f"{name}: image, truth and prediction"))
    caption = "From left to right: the image, the truth, the prediction of a head on the frozen backbone."
    return Figure(f"predictions_{arm}", f"Predictions: {arm}", caption, panels) if panels else None


def _summary(configs: Mapping[Path, Settings]) -> str:
    first = next(iter(configs.values()))
    methods = ", ".join(sorted({_method(run, config) for run, config in configs.items()}))
    steps = " and ".join(map(str, sorted({config.steps for config in configs.values()})))
    if isinstance(first, LanguageConfig):
        o, model = first.optim, "random weights of " * first.learner.random_weights + first.learner.model
        return (
            f"{model}, {steps} steps of next-token prediction with batches of {o.batch_size * o.accumulation} rows of "
            f"{first.data.length} tokens from {', '.join(first.data.stream.values())}; methods: {methods}."
        )
    return (
        f"{first.backbone.name}, {steps} steps of {first.objective.name} with batches of {first.optim.batch_size}; "
        f"methods: {methods}; started from {first.start_from or first.backbone.weights or 'random weights'}."
    )


def _settings(config: Settings) -> dict[str, object]:
    shown: dict[str, object] = {
        "steps": config.steps,
        "batch": config.optim.batch_size,
        "learning rate": config.optim.lr,
        "precision": config.precision,
    }
    v = config.value
    steering: dict[str, object] = {
        "direction": v.direction,
        "engine": v.engine,
        "update every": v.period,
        "scope": f"last {v.scope.blocks} blocks" if not v.scope.patterns else ", ".join(v.scope.patterns),
    }
    if v.direction == "lookahead":
        steering |= {f"value.lookahead.{key}": value for key, value in dataclasses.asdict(v.lookahead).items()}
        steering["value.lookahead.lr"] = config.optim.lr if v.lookahead.lr is None else v.lookahead.lr
    if isinstance(config, LanguageConfig):
        lora = config.learner.lora
        shown |= {"accumulation": config.optim.accumulation, "LoRA rank": lora.rank or "all weights"}
        targets = {"candidates": config.targets.candidates, "most mass off the truth": config.targets.alpha_max}
        return shown if config.method == "baseline" else shown | targets | steering
    d, designer = config.designer, dict[str, object]()
    if config.designs:
        designer = {"designer": d.name} | ({"keep ratio": d.keep_ratio} if d.mask or d.control else {})
    if config.designs and d.moves_targets:
        bounds = {"designer.kl": d.kl, "designer.strength": d.strength}
        designer |= {key: "null" if value is None else value for key, value in bounds.items()}
    steers = config.follows or config.learns_masks
    return shown | designer | (steering if steers else {})


def _notes(arms: Mapping[str, Sequence[Path]]) -> list[str]:
    return [
        f"{arm}, step {row['step']}: {row['message']}"
        for arm, folders in arms.items()
        for row in read_metrics(folders[0])
        if "event" in row
    ]


def _logged(run: Path) -> bool:
    return (run / METRICS_NAME).is_file()


def _steps(run: Path) -> int:
    return max((int(row["step"]) for row in read_metrics(run)), default=0)


def _seconds(run: Path) -> float:
    return sum(row.get("seconds", 0.0) for row in read_metrics(run))


def _commands(run: Path) -> list[str]:
    """What made the run, and what evaluated it."""
    files = [run / "environment.json", *sorted((run / "results").rglob("results.json"))]
    found = [content if "command" in content else content.get("environment", {}) for content in map(_json, files)]
    commands = [_command(about["command"]) for about in found if about.get("command")]
    return list(dict.fromkeys(commands))


def _command(command: Sequence[str]) -> str:
    """As one types it: the program without the path that it was started by."""
    name = re.sub(r"\.py$", "", Path(command[0]).name)
    return shlex.join([name if name.startswith("dino-value") else "dino-value", *command[1:]])


def _environment(about: Mapping[str, Any]) -> dict[str, object]:
    """Versions as a list; what else is worth a line."""
    found = {name: value for name, value in about.items() if name not in ("command", "seed", "resumed", "packages")}
    if starts := len(about.get("resumed", [])):
        found["resumed"] = f"{starts} time{'s' * (starts > 1)}"
    return {name.replace("_", " "): value for name, value in found.items() if value is not None} | about.get(
        "packages", {}
    )


def _json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where it is absent or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
