"""Arms against each other: one configuration, one start, one stream, paired by seed, and a sentence for every claim.

Two tables: arms at equal learner steps, and at equal wall-clock (or processor time), where an arm whose steps cost more
takes fewer of them (each with its own complete schedule).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from importlib import import_module
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from torch import Tensor
from yaml import YAMLError

from dino_value import plugins
from dino_value.config import Config, load_config, packaged
from dino_value.data.conventions import Conventions, as_configured, conventions, using
from dino_value.data.labelled import Kept, LabelledDataset, Split
from dino_value.data.layouts import Layout, open_labelled
from dino_value.data.sampling import end_with
from dino_value.errors import Interrupted, UserError
from dino_value.eval import EVALUATIONS
from dino_value.files import write_json
from dino_value.models.backbone import WEIGHTS_NAME, Backbone, create_backbone, load_backbone, load_weights
from dino_value.models.weights import Reading
from dino_value.report.statistics import Comparison, compare_all, metric_of
from dino_value.report.terminal import results_table
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.metrics import duration, environment, read_metrics
from dino_value.runs.process import STOPS, Stops, choose_device, stop_requests
from dino_value.training.trainer import train

HEADLINES = {"seg": "miou", "depth": "rmse", "linear": "top1", "knn": "knn_top1"}
"""The number of each kind of evaluation that arms are compared by."""

CLOCKS = {"wall": ("seconds", "wall-clock"), "cpu": ("cpu_seconds", "processor time")}
"""What `clock` may say: the logged number that it reads, and its name."""

NETWORKS = ("teacher", "student")
STEP0, RUNS = "step0", "runs"
PCA_ARMS = 5  # that a row of pictures has room for
DRAWN, PREDICTIONS = ("seg", "depth"), 4  # evaluations whose first predictions are drawn, of the first seed

Table = dict[str, dict[str, list[float]]]
"""arm -> metric -> one value a seed."""
Row = dict[str, float]
"""metric -> value, of one run."""
Key = TypeVar("Key")

POLL = 0.5  # seconds between two looks at whether a signal has come
NOTHING = "there was nothing to save; the same command goes on"
SAVED = "what ran is saved, and nothing more was begun; the same command goes on"
_stopped: Event  # of a process of several: whether all are to stop


@dataclass
class Spec:
    """What to compare; a YAML file, see configs/compare."""

    config: str = MISSING  # the training configuration that all arms share
    out: str = "compare"
    seeds: int = 5
    starts: list[str] = field(default_factory=list)  # each arm's start_from, in turn by seed; a random effect
    overrides: list[str] = field(default_factory=list)  # key=value, of every arm
    # name -> key=value of this arm alone; @name in a value is the run of that arm with the same seed
    arms: dict[str, Any] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)  # these arms alone, and what is claimed of them; the rest may follow
    # seg, depth, linear, knn -> {data: ROOT, option: value}; seg@32 is one more seg
    evaluate: dict[str, Any] = field(default_factory=dict)
    networks: list[str] = field(default_factory=lambda: ["teacher"])  # student too: student_miou beside miou
    metrics: list[str] = field(default_factory=list)  # what claims are about; by default each evaluation's headline
    equal_time: bool = True  # a second table, at equal wall-clock
    clock: str = "wall"  # or cpu: the run's processor time in its place, on a machine that has other work
    reference: str = "baseline"  # the arm whose time all then have
    claims: list[Any] = field(
        default_factory=list
    )  # [arm, against]; by default every arm named value… against the rest


def load_spec(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Spec:
    """A YAML file, or a packaged one (`compare/scenes`), with `key=value` of the specification itself, checked.

    Raises:
        UserError: what is wrong, in one line.
    """
    path = next((path for path in (packaged(source), packaged(f"{source}.yaml")) if path.is_file()), None)
    if path is None:
        raise UserError(f"{source}: no such file, and no packaged comparison of that name")
    try:
        loaded, given = OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))
        if not isinstance(loaded, DictConfig):
            raise UserError(f"{path}: expected keys and values at the top level")
        known = {item.name for item in fields(Spec)}
        for name in map(str, (*loaded, *given)):
            if name not in known:
                raise UserError(f"{path}: unknown key {name}; a comparison has {', '.join(sorted(known))}")
        spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Spec), loaded, given))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    assert isinstance(spec, Spec)
    check_spec(spec)
    return check_spec(narrowed(spec)) if spec.only else spec


def narrowed(spec: Spec) -> Spec:
    """The arms that `only` names and the claims among them, in the same folder: the other arms can be added later.

    Raises:
        UserError: one of them is not an arm.
    """
    for name in spec.only:
        if name not in spec.arms:
            raise UserError(f"only={name}: not an arm; choose {', '.join(spec.arms)}")
    arms = {name: changes for name, changes in spec.arms.items() if name in spec.only}
    return replace(spec, arms=arms, claims=[list(one) for one in claims_of(spec) if {*one} <= {*arms, STEP0}])


def check_spec(spec: Spec) -> Spec:
    """The same, if it can be run.

    Raises:
        UserError: it cannot.
    """
    if spec.seeds < 1:
        raise UserError(f"seeds={spec.seeds}: at least one")
    if STEP0 in spec.arms or not spec.arms:
        raise UserError(f"arms: give at least one, none called {STEP0}, which is always there")
    for name, changes in spec.arms.items():
        if not isinstance(changes, list) or not all(isinstance(change, str) and "=" in change for change in changes):
            raise UserError(f"arms.{name}: expected a list of key=value, found {changes!r}")
        if not name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"arms.{name}: a name is letters, digits, - and _")
        for other in _named(changes):
            if other not in spec.arms or _named(spec.arms[other]):
                raise UserError(f"arms.{name}: @{other} is not an arm, or itself needs another one")
    if spec.clock not in CLOCKS:
        raise UserError(f"clock={spec.clock}: choose {', '.join(CLOCKS)}")
    if spec.equal_time and spec.reference not in spec.arms:
        raise UserError(f"reference={spec.reference}: not an arm; choose one, or set equal_time=false")
    for name, options in spec.evaluate.items():
        if _kind(name) not in HEADLINES:
            raise UserError(f"evaluate.{name}: choose {', '.join(HEADLINES)}")
        if not isinstance(options, Mapping) or "data" not in options:
            raise UserError(f"evaluate.{name}: give data: ROOT, and options of `dino-value eval {_kind(name)}`")
        _options(name, options, 0)
        words = name.split("@", 1)[1].split("_") if "@" in name else ["all"]
        if not all(word.replace("-", "").isalnum() for word in words):
            raise UserError(f"evaluate.{name}: what stands behind @ is letters, digits, - and _")
        for word in words:
            if word.isdigit() and word != str(options.get("labels")):
                raise UserError(f"evaluate.{name}: says {word} labels; give labels: {word}")
    if not spec.evaluate:
        raise UserError(f"evaluate: give at least one of {', '.join(HEADLINES)}")
    if not spec.networks or not {*spec.networks} <= {*NETWORKS}:
        raise UserError(f"networks={spec.networks}: choose {', '.join(NETWORKS)}, or both")
    known = [f"{prefix}{metric}" for prefix in map(_prefix, spec.networks) for metric in _metrics(spec.evaluate)]
    for metric in spec.metrics:
        if metric not in known:
            raise UserError(f"metrics: {metric} is not measured; choose {', '.join(known)}")
    for claim in claims_of(spec):
        if len(claim) != 2 or not {*claim} <= {*spec.arms, STEP0}:
            raise UserError(f"claims: {list(claim)}: give [arm, against], two of {', '.join((STEP0, *spec.arms))}")
    return spec


def _metrics(evaluations: Iterable[str]) -> list[str]:
    """What `evaluate` finds: k-NN has no loss."""
    return [_metric(one, end) for one in evaluations for end in (("",) if _kind(one) == "knn" else ("", "_loss"))]


def _kind(evaluation: str) -> str:
    """`seg`, of `seg` and of `seg@32`: what stands behind an @ tells evaluations of one kind apart."""
    return evaluation.partition("@")[0]


def _metric(evaluation: str, end: str = "") -> str:
    """What arms are compared by: `miou` of `seg`, `miou@32` of `seg@32`; or, with an end, its loss."""
    kind, at, told = evaluation.partition("@")
    return f"{HEADLINES[kind]}{end}{at}{told}"


def _prefix(network: str) -> str:
    return "" if network == "teacher" else f"{network}_"


def _named(changes: Sequence[str]) -> list[str]:
    return [change.split("=@", 1)[1].split("/")[0] for change in changes if "=@" in change]


def claims_of(spec: Spec) -> list[tuple[str, ...]]:
    """The pairs to compare, in order."""
    if spec.claims:
        return [tuple(claim) for claim in spec.claims]
    ours = [name for name in spec.arms if name.startswith("value")]
    rest = [name for name in spec.arms if name not in ours]
    return [(arm, against) for arm in ours for against in (*rest, STEP0)]


def compare(spec: Spec, jobs: int = 1, quiet: bool = False) -> dict[str, Any]:
    """Train, evaluate and judge; what results.json holds.

    A comparison that was stopped goes on when the same is asked for again: finished runs and evaluations are kept.

    Args:
        jobs: runs at a time; above one, in processes of their own.
        quiet: no progress.

    Raises:
        UserError: the folder is in use for something else; a run's own error.
        Interrupted: a signal came; everything is saved.
    """
    began, out = time.monotonic(), Path(spec.out)
    prepare(out)
    start = {STEP0: start_rows(spec, jobs)}
    configs = {(arm, seed): config_of(spec, arm, seed) for arm in spec.arms for seed in range(spec.seeds)}
    seeds: dict[str, Any] = {"seeds": list(range(spec.seeds))}
    if spec.starts:
        seeds["starts"] = [seed % len(spec.starts) for seed in range(spec.seeds)]
    results: dict[str, Any] = seeds | {"arms": start | run_arms(spec, configs, jobs, quiet)}
    results["clock"] = spec.clock
    results["seconds_per_step"] = cost = {arm: step_seconds(spec, configs, arm) for arm in spec.arms}
    results["steps"] = {arm: configs[arm, 0].steps for arm in spec.arms}
    results["claims"] = _claims(spec, results)
    if spec.equal_time:
        for (arm, seed), config in configs.items():
            steps = equal_time(config.steps, cost[arm], cost[spec.reference])
            if steps != config.steps:
                folder = Path(config.out)
                configs[arm, seed] = replace(config, steps=steps, out=str(folder.with_name(f"{folder.name}_{steps}")))
        timed: dict[str, Any] = seeds | {"arms": start | run_arms(spec, configs, jobs, quiet)}
        timed["steps"] = {arm: configs[arm, 0].steps for arm in spec.arms}
        timed["claims"] = _claims(spec, timed)
        results["equal_time"] = timed
    results["environment"] = environment(0, choose_device("auto"))
    results["seconds"] = round(time.monotonic() - began, 1)
    write_json(out / "results.json", results)
    return results


def prepare(out: Path) -> None:
    """Make the folder.

    Raises:
        UserError: not writable, or in use for something else.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not (out / RUNS).is_dir():
            raise UserError(f"{out}: is not empty and not a comparison's folder; choose another")
        (out / RUNS).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another folder") from None


def config_of(spec: Spec, arm: str, seed: int) -> Config:
    """The configuration of an arm's run; nothing but the arm's own list tells arms apart."""
    runs = Path(spec.out) / RUNS
    changes = [change.replace("=@", f"={runs}/") for change in spec.arms[arm]]
    changes = [
        f"{change}_{seed}" if _named([old]) else change for old, change in zip(spec.arms[arm], changes, strict=True)
    ]
    start = [f"start_from={spec.starts[seed % len(spec.starts)]}"] if spec.starts else []
    own = [f"seed={seed}", f"out={runs / f'{arm}_{seed}'}"]
    return load_config(spec.config, [*start, *spec.overrides, *changes, *own])


def run_arms(spec: Spec, configs: Mapping[tuple[str, int], Config], jobs: int, quiet: bool = False) -> Table:
    """Every run trained and evaluated; arms that name no other arm go first."""
    console, rows = Console(stderr=True, quiet=quiet), dict[tuple[str, int], dict[str, float]]()
    began = time.monotonic()

    def begun(key: tuple[str, int]) -> None:
        arm, seed = key
        console.print(f"[bold]{arm}[/bold], seed {seed}: {configs[key].steps} steps")

    def ended(key: tuple[str, int], row: Row) -> None:
        """A line a run: its numbers, and the time that the others will take."""
        (arm, seed), rows[key] = key, row
        found = ", ".join(f"{metric_of(name).label} {value:.4f}" for name, value in row.items())
        left = (time.monotonic() - began) / len(rows) * (len(configs) - len(rows))
        console.print(f"[bold]{arm}[/bold], seed {seed}: {found}  ({len(rows)}/{len(configs)}, {duration(left)} left)")

    for wave in (False, True):
        work = [key for key in configs if bool(_named(spec.arms[key[0]])) == wave]
        calls = {key: partial(run_one, configs[key], spec.evaluate, quiet or jobs > 1, spec.networks) for key in work}
        each(calls, jobs, begun, ended)
    return {arm: _columns([rows[arm, seed] for seed in range(spec.seeds)]) for arm in spec.arms}


def each(
    calls: Mapping[Key, Callable[[], Row]],
    jobs: int,
    begun: Callable[[Key], None] = lambda key: None,
    ended: Callable[[Key, Row], None] = lambda key, row: None,
) -> dict[Key, Row]:
    """What each call gives, `jobs` at a time; above one, in processes of their own.

    Args:
        begun, ended: are told of each.

    Raises:
        Interrupted: a signal came. Nothing more was begun, and what ran has saved itself.
        UserError: of one of them; the others have saved themselves.
    """
    waiting, running, rows = dict(calls), dict[Future[Row], Key](), dict[Key, Row]()

    def end(key: Key, row: Row) -> None:
        rows[key] = row
        ended(key, row)

    if jobs == 1:
        for key, call in calls.items():
            begun(key)
            end(key, call())
        return rows
    with stop_requests() as stopping, _processes(jobs) as (submit, stop):
        while running or (waiting and not stopping()):
            while waiting and len(running) < jobs and not stopping():  # no queue: nothing could be taken out of it
                key = next(iter(waiting))
                begun(key)
                running[submit(waiting.pop(key))] = key
            for future in wait(running, POLL, FIRST_COMPLETED).done:
                end(running.pop(future), future.result())
            if stopping():
                stop()
        if stopping():
            raise Interrupted(SAVED)
    return rows


@contextlib.contextmanager
def _processes(jobs: int) -> Iterator[tuple[Callable[[Callable[[], Any]], Future[Any]], Callable[[], None]]]:
    """What has a process call something, and what has all of them save and stop. They start anew, as torch's threads
    and CUDA do not survive a fork, and end with this process, however it ends."""
    context = multiprocessing.get_context("spawn")
    stopped, others = context.Event(), {*multiprocessing.active_children()}

    def submit(call: Callable[[], Any]) -> Future[Any]:
        # A process that starts inherits the mask: until it is ready it would die of a signal.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            return pool.submit(_call, call)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def stop() -> None:
        if not stopped.is_set():
            stopped.set()
            for process in {*multiprocessing.active_children()} - others:
                process.terminate()

    with ProcessPoolExecutor(jobs, context, _begin, (jobs, os.getpid(), stopped)) as pool:
        try:
            yield submit, stop
        except Interrupted:
            stop()
            raise Interrupted(SAVED) from None
        except BrokenProcessPool:
            if stopped.is_set():  # one was busy, with nothing to save, and left at once
                raise Interrupted(SAVED) from None
            raise UserError("--jobs: a run's process was killed (no memory left?); run fewer at a time") from None
        except BaseException:
            stop()
            raise


def _begin(jobs: int, parent: int, stopped: Event) -> None:
    """What a process of several begins with: its share of the threads, and deaf between two calls."""
    global _stopped
    _stopped = stopped
    end_with(parent)
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def _call(call: Callable[[], Any]) -> Any:
    with stop_requests():
        if _stopped.is_set():  # while it could not hear
            raise Interrupted(NOTHING)
        return call()


def run_one(
    config: Config, evaluations: Mapping[str, Any], quiet: bool = False, networks: Sequence[str] = ("teacher",)
) -> Row:
    """Train one run, unless it is finished, and evaluate its networks, unless they have been.

    Raises:
        Interrupted: a signal came; what was trained is saved.
    """
    plugins.load(config.plugins)  # this may be another process than the one that read the specification
    found: Row = {}
    with stop_requests() as stopping:
        folder = train(config, quiet)
        _release(stopping)
        for network in networks:
            backbone = load_backbone(folder) if network == "teacher" else _student(folder)
            name = f"compare{'' if network == 'teacher' else f'_{network}'}.json"
            numbers = _kept(folder / "results" / name, evaluations, config, backbone)
            found |= {f"{_prefix(network)}{key}": value for key, value in numbers.items()}
    return found


def _student(folder: Path) -> Backbone:
    """The student's backbone of a finished run, from its last checkpoint."""
    backbone, own = load_backbone(folder), "backbone."
    state = load_checkpoint(folder, "student")["student"]
    backbone.load_state_dict({key.removeprefix(own): value for key, value in state.items() if key.startswith(own)})
    return backbone


def _release(stopping: Stops) -> None:
    """From here on there is nothing to save."""
    stopping.release()
    if stopping():
        raise Interrupted(NOTHING)


def start_rows(spec: Spec, jobs: int = 1) -> dict[str, list[float]]:
    """The untouched start, evaluated with the heads of every seed."""
    rows = each({seed: partial(_start_row, spec, seed) for seed in range(spec.seeds)}, jobs)
    return _columns([rows[seed] for seed in range(spec.seeds)])


def _start_row(spec: Spec, seed: int) -> Row:
    config = config_of(spec, next(iter(spec.arms)), seed)
    path = Path(spec.out) / STEP0 / f"{seed}.json"
    with stop_requests() as stopping:
        _release(stopping)
        numbers = _kept(path, spec.evaluate, config, start_backbone(config))
    # Both networks continue the same weights.
    return {f"{_prefix(network)}{key}": value for network in spec.networks for key, value in numbers.items()}


@as_configured
def _kept(path: Path, evaluations: Mapping[str, Any], config: Config, backbone: Backbone) -> dict[str, float]:
    """The evaluation's numbers, from `path` if it holds them of these weights."""
    weights = digest(backbone)
    if path.is_file():
        found = json.loads(path.read_text())
        if found["evaluate"] == evaluations and found.get("weights", weights) == weights:
            numbers: dict[str, float] = found["metrics"]
            return numbers
    path.parent.mkdir(exist_ok=True)
    pictures = path.parent if config.seed == 0 else None
    metrics = evaluate(backbone, evaluations, config.seed, config.data.in_memory, pictures)
    write_json(path, {"evaluate": dict(evaluations), "seed": config.seed, "weights": weights, "metrics": metrics})
    return metrics


def digest(backbone: Backbone) -> str:
    """A hash of the weights."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(backbone.state_dict().items()):
        found.update(name.encode() + value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def start_backbone(config: Config) -> Backbone:
    """The untouched backbone that a run begins with."""
    b = config.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone(
            b.name, config.views.global_size, b.kwargs, b.weights, b.min_match, b.keep_grid, reading=Reading.of(b)
        )
    if config.start_from is not None:
        path = packaged(config.start_from)
        load_weights(backbone, path / WEIGHTS_NAME if path.is_dir() else path)
    return backbone


def evaluate(
    backbone: Backbone, evaluations: Mapping[str, Any], seed: int, keep: bool = False, pictures: Path | None = None
) -> dict[str, float]:
    """The headline of each evaluation on held-out images, and the loss where there is one: `miou` and `miou_loss`,
    or of `seg@32` `miou@32` and `miou_loss@32`.

    Args:
        keep: have the images stay in memory for this process's next evaluation.
        pictures: a folder; the first predictions are drawn beside the truth, to `pictures`/NAME/pictures.
    """
    opened = partial(_open_kept, conventions()) if keep else open_labelled
    found: dict[str, float] = {}
    told = replace(conventions(), channels=backbone.channels)
    for name, settings in evaluations.items():
        kind = _kind(name)
        evaluation = import_module(EVALUATIONS[kind]).EVALUATION
        with using(told):
            parts = [opened(evaluation.layout, settings["data"], part) for part in ("training", "validation")]
        options = _options(name, settings, seed)
        if pictures is not None and kind in DRAWN:
            options = replace(options, save_images=PREDICTIONS)
        result = evaluation.measure(backbone, tuple(parts), options)
        if pictures is not None and result.pictures:
            from dino_value.eval.pictures import write_pictures  # matplotlib is slow to import

            write_pictures(pictures / name / "pictures", result.pictures)
        metrics = result.metrics
        found[_metric(name)] = metrics[HEADLINES[kind].removeprefix(f"{kind}_")]
        if "loss" in metrics:
            found[_metric(name, "_loss")] = metrics["loss"]
    return found


@lru_cache(maxsize=8)
def _open_kept(told: Conventions, layout: Layout, path: str, part: Split) -> Kept:
    """`told` holds already; it is here to be remembered by."""
    return Kept(open_labelled(layout, path, part))


def _options(name: str, settings: Mapping[str, Any], seed: int) -> Any:
    defaults = import_module(EVALUATIONS[_kind(name)]).EVALUATION.defaults
    given = {
        key: tuple(value) if isinstance(value, list) else value for key, value in settings.items() if key != "data"
    }
    unknown = given.keys() - {item.name for item in fields(defaults)}
    if unknown:
        raise UserError(f"evaluate.{name}: unknown option {', '.join(sorted(unknown))}")
    return replace(defaults, seed=seed, **given)


def step_seconds(spec: Spec, configs: Mapping[tuple[str, int], Config], arm: str) -> float:
    """Time of a learner step of an arm by the specification's clock, designer updates included: the median over seeds.

    Raises:
        UserError: a run that logged no such time.
    """
    found, key = [], CLOCKS[spec.clock][0]
    for seed in range(spec.seeds):
        config = configs[arm, seed]
        seconds = [row[key] for row in read_metrics(Path(config.out)) if key in row]
        if not seconds:
            raise UserError(f"{config.out}: its metrics.jsonl has no {key}; delete the run, to train it again")
        found.append(sum(seconds) / config.steps)
    return statistics.median(found)


def equal_time(steps: int, seconds: float, reference: float) -> int:
    """How many steps of `seconds` take the time of `steps` of `reference`; a difference under 2 % is the clock's."""
    ratio = reference / seconds
    return steps if abs(ratio - 1) < 0.02 else max(1, round(steps * ratio))


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def headlines(results: Mapping[str, Any], metrics: Sequence[str] = ()) -> dict[str, Any]:
    """The same results with `metrics` alone, by default without losses: what is claimed, and drawn seed by seed."""
    chosen = metrics or [f"{_prefix(network)}{name}" for network in NETWORKS for name in HEADLINES.values()]
    arms = {
        arm: {name: values for name, values in row.items() if (name if metrics else _kind(name)) in chosen}
        for arm, row in results["arms"].items()
    }
    return {**results, "arms": arms}


def judge(spec: Spec, results: Mapping[str, Any]) -> list[Comparison]:
    """Every claim on every headline."""
    return compare_all(headlines(results, spec.metrics), [(arm, against) for arm, against in claims_of(spec)])


def _claims(spec: Spec, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "arm": one.arm,
            "against": one.against,
            "metric": one.metric.key,
            "difference": one.difference,
            "interval": None if one.interval is None else list(one.interval),
            "wins": one.wins,
            "n": one.n,
            "effect": one.effect,
            "p": one.p,
            "verdict": one.outcome,
            "sentence": one.sentence,
        }
        for one in judge(spec, results)
    ]


def write_page(
    spec: Spec,
    results: Mapping[str, Any],
    title: str,
    summary: str,
    commands: Sequence[str],
    notes: Sequence[str] = (),
) -> Path:
    """report.html, and its pictures: the tables, the claims, curves, masks and features of the first seed."""
    from dino_value.report.figures import curves_figure, masks_figure, pca_figure, results_figure, targets_figure
    from dino_value.report.gallery import as_pictures, masked, moved, patch_map
    from dino_value.report.page import Report, Section, write_report
    from dino_value.report.runs import headings, pictures_figure

    out = Path(spec.out)
    runs = {arm: [Path(config_of(spec, arm, seed).out) for seed in results["seeds"]] for arm in spec.arms}
    first = config_of(spec, next(iter(spec.arms)), 0)
    images = _pictures(spec, first)
    titles = headings(config_of(spec, arm, 0) for arm in spec.arms)
    curves = curves_figure(runs, keys=("loss", "value", "cosine", "mask_mean"), headings=titles)
    figures = [results_figure(headlines(results, spec.metrics)), curves]
    if images is not None:
        shown = {arm: masked(folders[0], images) for arm, folders in runs.items()}
        drawn = {arm: found for arm, found in shown.items() if found is not None}
        if drawn:
            masks, views = ({arm: found[part] for arm, found in drawn.items()} for part in (0, 1))
            figures.append(masks_figure(images, masks, views))
        maps = {arm: found for arm, folders in runs.items() if (found := moved(folders[0], images)) is not None}
        if maps:
            figures.append(targets_figure(as_pictures(images), maps))
        backbones = {STEP0: start_backbone(first), **{arm: load_backbone(folders[0]) for arm, folders in runs.items()}}
        few = dict(list(backbones.items())[:PCA_ARMS])
        figures.append(
            pca_figure(as_pictures(images), {arm: patch_map(backbone, images) for arm, backbone in few.items()})
        )
    for arm in [arm for claim in claims_of(spec)[:1] for arm in claim]:
        drawings = pictures_figure(arm, runs[arm][0] if arm in runs else out / arm)
        figures += [drawings] if drawings else []
    cost, clock = results["seconds_per_step"], CLOCKS[spec.clock][1]
    sections = []
    if "equal_time" in results:
        timed = results["equal_time"]
        told = ", ".join(f"{arm} {steps}" for arm, steps in timed["steps"].items())
        text = (
            f"Every arm has the {clock} that {spec.reference} takes for {results['steps'][spec.reference]} steps, and "
            f"a schedule of its own. Steps: {told}."
        )
        sections.append(Section(f"At equal {clock}", text, timed, judge(spec, timed)))
    page = Report(
        title=title,
        summary=summary,
        results=results,
        comparisons=judge(spec, results),
        sections=sections,
        figures=figures,
        notes=[
            "The first table has equal learner steps; an arm whose designer learns needs longer for each. Seconds of "
            f"{clock} a step, median over seeds: {', '.join(f'{arm} {seconds:.3f}' for arm, seconds in cost.items())}.",
            "Frozen features, or a copy of the backbone where an evaluation fine-tunes; trained on labelled images, "
            "scored on held-out ones.",
            *notes,
        ],
        settings={arm: " ".join(changes) or "as configured" for arm, changes in spec.arms.items()},
        commands=commands,
        environment={k: v for k, v in results["environment"].items() if k not in ("command", "seed")},
        seconds=results["seconds"],
    )
    return write_report(out / "report.html", page)


@as_configured
def _pictures(spec: Spec, config: Config, count: int = 6) -> Tensor | None:
    """Held-out images uint8 [n C size size] of the first evaluation, at the size of the global views."""
    size = config.views.global_size
    name, settings = next(iter(spec.evaluate.items()))
    layout = import_module(EVALUATIONS[_kind(name)]).EVALUATION.layout
    source = open_labelled(layout, settings["data"], "validation")
    data = LabelledDataset(source, range(min(count, len(source))), size=(size, size))
    return data.batch(range(len(data)))[0] if len(data) else None


def print_claims(spec: Spec, results: Mapping[str, Any]) -> None:
    """Tables and sentences for a terminal."""
    console = Console()
    rules = [("equal learner steps", results)]
    rules += [(f"equal {CLOCKS[spec.clock][1]}", results["equal_time"])] if "equal_time" in results else []
    for title, found in rules:
        console.print(results_table(found, title))
        comparisons = judge(spec, found)
        console.print(*(one.sentence for one in comparisons), sep="\n", markup=False, highlight=False)
