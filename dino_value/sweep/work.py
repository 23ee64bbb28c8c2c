"""One trial after another: whoever is free takes the next that nobody works on, begun or new.

A trial is a run folder and a row of the study. What is done is on the disk: training goes on from its checkpoint,
an evaluation that has left its results is not repeated, and the study holds the settings. So a trial whose process was
killed is simply taken up by the next that looks, as the same trial.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from dino_value.config import packaged
from dino_value.errors import Interrupted, UserError
from dino_value.eval.command import build_parser, evaluation
from dino_value.eval.command import main as evaluate
from dino_value.files import write_json, write_text
from dino_value.models.backbone import WEIGHTS_NAME, save_backbone
from dino_value.runs.checkpoint import latest_checkpoint, load_checkpoint
from dino_value.runs.folder import prepare_folder
from dino_value.runs.metrics import duration
from dino_value.sweep import language
from dino_value.sweep.claims import Claim, alone
from dino_value.sweep.spec import Params, Sweep, is_named
from dino_value.training.start import start_from
from dino_value.training.trainer import Trainer, train

if TYPE_CHECKING:
    import optuna

FREE = ("trials", "storage", "deaths", "out")  # what may differ when a sweep goes on


def import_optuna() -> Any:
    """The library, quiet.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise UserError("sweeps need Optuna: pip install 'dino-value[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


# --- the study


def prepare(sweep: Sweep) -> None:
    """Make the sweep's folder, or see that it holds this very sweep.

    Raises:
        UserError: it cannot be written, or holds something else.
    """
    path = sweep.out / "sweep.yaml"
    now = {**dataclasses.asdict(sweep), "out": str(sweep.out)}
    try:
        if path.exists():
            saved = OmegaConf.to_container(OmegaConf.load(path))
            assert isinstance(saved, dict)
            changed = [key for key in now if key not in FREE and saved.get(key) != now[key]]
            if changed:
                raise UserError(
                    f"{sweep.out} holds a sweep with another {changed[0]} ({saved.get(changed[0])} there, "
                    f"{now[changed[0]]} now); choose another --out"
                )
        elif sweep.out.is_dir() and any(sweep.out.iterdir()):
            raise UserError(f"{sweep.out} is not empty and not a sweep; choose another --out")
        for part in ("claims", "trials", "errors"):
            (sweep.out / part).mkdir(parents=True, exist_ok=True)
        write_text(path, OmegaConf.to_yaml(OmegaConf.create(now)))
    except OSError as error:
        raise UserError(f"{sweep.out}: cannot be written ({error.strerror}); choose another --out") from None


def open_study(sweep: Sweep) -> optuna.Study:
    """The study, made where there is none yet.

    Raises:
        UserError: the storage does not answer, or has a study of that name with other objectives.
    """
    optuna = import_optuna()
    url = sweep.storage
    if url is None:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        path = sweep.out / "study.journal"
        mend_journal(path)
        storage = JournalStorage(JournalFileBackend(str(path)))
    else:
        # The drivers of PostgreSQL and MySQL know this; SQLite is a file, and waits for its lock instead.
        connect = {"timeout": 60} if url.startswith("sqlite") else {"connect_timeout": 15}
        try:
            storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": connect})
        except Exception as error:  # whatever the driver makes of it, or there is no driver
            first = " ".join((str(error).splitlines() or [type(error).__name__])[0].split())
            raise UserError(f"storage {without_password(url)} does not answer: {first}") from None
    with alone(sweep.out / "claims" / "lock"):
        study = optuna.create_study(
            study_name=sweep.name,
            storage=storage,
            directions=list(sweep.objectives.values()),
            load_if_exists=True,
            pruner=build_pruner(sweep),
        )
        if [direction.name.lower() for direction in study.directions] != list(sweep.objectives.values()):
            raise UserError(f"the storage's study {sweep.name!r} has other objectives; give another name")
        if not study.get_trials(deepcopy=False):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(list(sweep.objectives))
            for point in sweep.first:
                study.enqueue_trial(point, skip_if_exists=True)
    return study


def mend_journal(path: Path) -> None:
    """Drop the half line that a kill in mid-write leaves at a journal's end, and that would spoil the next."""
    from optuna.storages.journal import JournalFileSymlinkLock

    if not path.exists() or path.read_bytes()[-1:] in (b"", b"\n"):
        return
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        with open(path, "r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()


def without_password(url: str) -> str:
    """A database URL as it may be shown."""
    scheme, found, rest = url.partition("://")
    return f"{scheme}{found}{rest.rpartition('@')[2]}"


def build_sampler(sweep: Sweep, number: int) -> Any:
    """The sampler of one trial: what it draws depends on the seed, the trial's number and the trials before it."""
    optuna = import_optuna()
    seed = sweep.seed * 100_003 + number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if sweep.sampler == "tpe":
            # constant_liar: trials under way count as bad, so that workers do not all try the same corner
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=sweep.startup, constant_liar=True)
        if sweep.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)


def build_pruner(sweep: Sweep) -> Any:
    optuna = import_optuna()
    if sweep.prune is None:
        return optuna.pruners.NopPruner()
    if sweep.prune.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=sweep.prune.startup)
    if sweep.prune.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=sweep.prune.every)
    return optuna.pruners.HyperbandPruner(min_resource=sweep.prune.every)


def suggest(sweep: Sweep, trial: optuna.Trial) -> Params:
    """A point of the space; what the trial has already drawn stays as it is."""
    found: Params = {}
    for key, choices in sweep.space.items():
        if isinstance(choices, list) or is_named(choices):
            # Optuna's categories are scalars; a list stands for itself by its place
            plain = [value if not isinstance(value, (list, dict)) else json.dumps(value) for value in choices]
            found[key] = trial.suggest_categorical(key, plain)
        elif all(isinstance(choices[end], int) for end in ("low", "high")):
            found[key] = trial.suggest_int(
                key, choices["low"], choices["high"], step=choices.get("step", 1), log=bool(choices.get("log"))
            )
        else:
            found[key] = trial.suggest_float(
                key, choices["low"], choices["high"], step=choices.get("step"), log=bool(choices.get("log"))
            )
    return found


# --- one trial


def measure(sweep: Sweep, config: Any, results: Path, names: list[str] | None = None) -> dict[str, float]:
    """Evaluate a run's backbone; metrics as `seg.miou`. What has left its results is read, not repeated."""
    found: dict[str, float] = {}
    for name in names or sweep.evaluations:
        path = results / name / "results.json"
        if sweep.kind == "language":
            metrics = language.measure(config.out, sweep.flags(name, config), path)
            found |= {f"{name}.{metric}": value for metric, value in metrics.items()}
            continue
        if not path.is_file():
            flags = [config.out, "--out", str(path.parent), *sweep.flags(name, config)]
            resumable = "resume" in vars(build_parser(evaluation(name)).parse_args(flags))
            evaluate([name, *flags, *(["--resume"] if resumable else [])])
        content = json.loads(path.read_text())
        headline = {*evaluation(name).headline, *(key.partition(".")[2] for key in sweep.objectives)}
        found |= {f"{name}.{metric}": content[metric] for metric in headline if content.get(metric) is not None}
    return found


def objectives(sweep: Sweep, metrics: dict[str, float]) -> list[float]:
    """The values of the objectives, in order.

    Raises:
        UserError: an evaluation that does not give one of them.
    """
    for key in sweep.objectives:
        if key not in metrics:
            raise UserError(f"objective {key}: the evaluation gives {', '.join(sorted(metrics))}")
    return [metrics[key] for key in sweep.objectives]


def run_trial(sweep: Sweep, trial: optuna.Trial) -> dict[str, float]:
    """Train, pausing to be judged where the sweep prunes, and evaluate.

    Raises:
        optuna.TrialPruned: it fell behind.
        Interrupted: a signal came; everything is saved.
    """
    optuna = import_optuna()
    folder = sweep.out / "trials" / f"{trial.number:04d}"
    config = sweep.configure(sweep.settings(suggest(sweep, trial)), folder)
    (objective,) = sweep.objectives if sweep.prune else (None,)
    for step in sweep.pauses(config.steps):
        results = folder / "results" / f"step_{step:08d}"
        name = str(objective).partition(".")[0]
        if not (results / name / "results.json").is_file():
            train(config, quiet=True, until=step)
        value = objectives(sweep, measure(sweep, config, results, [name]))[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trial that goes on has reported this step before
            trial.report(value, step)
        if trial.should_prune():
            raise optuna.TrialPruned
    _train(sweep, config)
    return measure(sweep, config, folder / "results")


def _train(sweep: Sweep, config: Any) -> None:
    if sweep.kind == "vision":
        train(config, quiet=True)
    else:
        from dino_value.language.trainer import train as train_language  # its libraries are an extra

        train_language(config, quiet=True)


def run_reference(sweep: Sweep, name: str) -> dict[str, float]:
    """The untouched start, or plain self-supervision under the sweep's own settings, evaluated like a trial."""
    folder = sweep.out / name
    config = sweep.configure({"method": "baseline"}, folder)
    if name == "baseline":
        _train(sweep, config)
    elif sweep.kind == "language":
        config.out = config.learner.model
    elif not (folder / WEIGHTS_NAME).is_file():
        run = Trainer(config)
        if config.start_from is not None:
            start_from(run, load_checkpoint(packaged(config.start_from)))
        prepare_folder(config, folder)
        save_backbone(folder / WEIGHTS_NAME, run.teacher.backbone, {"step": "0"})
    return measure(sweep, config, folder / "results")


# --- whose turn it is


@dataclass
class Item:
    """A trial or a reference that this process has claimed."""

    name: str
    claim: Claim
    trial: optuna.Trial | None


@contextlib.contextmanager
def next_item(sweep: Sweep, study: optuna.Study) -> Iterator[Item | None]:
    """What nobody works on: a reference, a trial that was begun and dropped, or a new one; None when all is taken."""
    optuna = import_optuna()
    claims = sweep.out / "claims"
    item: Item | None = None
    with alone(claims / "lock"):
        for name in sweep.references:
            if not reference_done(sweep, name) and (claim := Claim.take(claims / name)):
                item = Item(name, claim, None)
                break
        trials = study.get_trials(deepcopy=False) if item is None else []
        for frozen in trials:
            if frozen.state == optuna.trial.TrialState.RUNNING and (claim := Claim.take(claims / str(frozen.number))):
                study.sampler = build_sampler(sweep, frozen.number)
                item = Item(f"trial {frozen.number}", claim, optuna.trial.Trial(study, frozen._trial_id))
                break
        begun = [frozen for frozen in trials if frozen.state != optuna.trial.TrialState.WAITING]
        if item is None and len(begun) < sweep.trials:
            study.sampler = build_sampler(sweep, len(begun))
            trial = study.ask()
            taken = Claim.take(claims / str(trial.number))
            assert taken is not None, "claims are taken under the lock only"
            item = Item(f"trial {trial.number}", taken, trial)
    try:
        yield item
    finally:
        if item is not None:
            item.claim.release()


def reference_done(sweep: Sweep, name: str) -> bool:
    """Whether it has all its results, or failed."""
    failed = (sweep.out / "errors" / f"{name}.txt").is_file()
    return failed or all((sweep.out / name / "results" / part / "results.json").is_file() for part in sweep.evaluations)


def work(sweep: Sweep, limit: int | None = None) -> int:
    """Take items, at most `limit`, until none is left; how many were worked on.

    Raises:
        Interrupted: a signal came; what was under way is saved, and taken up by whoever looks next.
    """
    study, began = open_study(sweep), time.monotonic()
    done = 0
    while limit is None or done < limit:
        with next_item(sweep, study) as item:
            if item is None:
                return done
            pace = f", {done} done here in {duration(time.monotonic() - began)}" if done else ""
            print(f"{item.name} of {sweep.out}{pace}", flush=True)
            try:
                settle(sweep, study, item)
            except (Interrupted, KeyboardInterrupt):
                item.claim.take_back()
                raise
        write_summary(sweep, study)
        done += 1
    return done


def settle(sweep: Sweep, study: optuna.Study, item: Item) -> None:
    """Run an item to its end, and tell the study which it was: values, pruned, or failed and why."""
    optuna = import_optuna()
    state = optuna.trial.TrialState
    folder = sweep.out / (f"trials/{item.trial.number:04d}" if item.trial else item.name)
    newest = latest_checkpoint(folder / "checkpoints")
    place = newest.name if newest else "the start"
    try:
        if item.claim.attempt(place) >= sweep.deaths:
            raise UserError(f"its process died {sweep.deaths} times after {place}")
        metrics = run_trial(sweep, item.trial) if item.trial else run_reference(sweep, item.name)
        if item.trial:
            values = objectives(sweep, metrics)
            item.trial.set_user_attr("metrics", metrics)
            study.tell(item.trial, values)
        told = ", ".join(f"{name} {metrics[name]:.4f}" for name in sweep.objectives if name in metrics)
        print(f"{item.name}: {told}", flush=True)
    except (Interrupted, KeyboardInterrupt):
        raise
    except optuna.TrialPruned:
        assert item.trial is not None, "references are not pruned"
        study.tell(item.trial, state=state.PRUNED)
    except Exception as error:  # of one trial, whatever it is: the others go on
        line = " ".join(str(error).split()) or type(error).__name__
        name = folder.name
        write_text(sweep.out / "errors" / f"{name}.txt", traceback.format_exc())
        print(f"{item.name} failed: {line}", flush=True)
        if item.trial:
            item.trial.set_user_attr("error", line)
            study.tell(item.trial, state=state.FAIL)


def summary(sweep: Sweep, study: optuna.Study) -> list[dict[str, Any]]:
    """A row a trial: number, state, params, values by objective, all metrics, error, seconds."""
    rows = []
    for frozen in study.get_trials(deepcopy=False):
        values = dict(zip(sweep.objectives, frozen.values, strict=True)) if frozen.values else {}
        rows.append(
            {
                "number": frozen.number,
                "state": frozen.state.name.lower(),
                "params": frozen.params,
                "values": values if frozen.state.name == "COMPLETE" else {},
                "metrics": frozen.user_attrs.get("metrics", {}),
                "error": frozen.user_attrs.get("error"),
                "seconds": round(frozen.duration.total_seconds(), 1) if frozen.duration else None,
            }
        )
    return rows


def write_summary(sweep: Sweep, study: optuna.Study) -> list[dict[str, Any]]:
    """trials.json, for readers without Optuna."""
    with alone(sweep.out / "claims" / "lock"):
        rows = summary(sweep, study)
        write_json(sweep.out / "trials.json", rows)
    return rows
