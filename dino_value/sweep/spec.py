"""What a sweep searches: a YAML file beside the configuration that it varies.

config: rooms/cpu                 # as for dino-value train
overrides: {steps: 100}           # settings of every trial
space:
  optim.lr: {low: 1.0e-6, high: 5.0e-5, log: true}
  value.period: [2, 4, 8]
  designer:                       # named choices of several keys
    unet: {designer.name: unet}
    sit: {designer.name: sit, designer.width: 128}
evaluations:                      # flags of dino-value eval; data is the training's own unless given
  seg: {size: 96, steps: 600}
  depth: {size: 96, steps: 600}
objectives: {seg.miou: maximize, depth.rmse: minimize}
trials: 60

With `kind: language` the configuration is that of dino-value language train, and evaluations are names of one's own,
with flags of dino-value language eval: `gsm8k: {file: test.jsonl, limit: 200}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dino_value.config import find_config, load_config
from dino_value.errors import UserError
from dino_value.eval import EVALUATIONS
from dino_value.eval.command import build_parser, evaluation
from dino_value.language.config import load_language_config
from dino_value.sweep import language

KINDS = ("vision", "language")
SAMPLERS = ("tpe", "random", "nsga2")
PRUNERS = ("median", "halving", "hyperband")
REFERENCES = ("step0", "baseline")
DIRECTIONS = ("maximize", "minimize")

Params = dict[str, Any]


@dataclass(frozen=True)
class Prune:
    """Stop trials that fall behind: evaluate the objective every `every` steps (one objective only).

    Args:
        every: learner steps between evaluations.
        pruner: Optuna's `median`, successive `halving`, or `hyperband`.
        startup: finished trials before `median` stops any (Optuna's default).
    """

    every: int
    pruner: str = "median"
    startup: int = 5


@dataclass(frozen=True)
class Sweep:
    """A checked specification.

    Args:
        config: a configuration, as for `dino-value train`.
        space: key to `{low, high, log, step}`, a list of values, or named choices `{name: {key: value}}`.
        evaluations: name to flags.
        objectives: `<evaluation>.<metric>` to `maximize` or `minimize`; several search the Pareto frontier.
        overrides: settings of every trial.
        trials: how many, failed and pruned ones included.
        sampler: Optuna's `tpe` (also of several objectives), `random` or `nsga2`.
        startup: trials that `tpe` draws at random first (Optuna's default).
        seed: of the sampler.
        first: settings to try before any is drawn, each a point of `space`.
        references: `step0` (the untouched start) and `baseline` (method=baseline), evaluated beside the trials.
        prune: see `Prune`.
        storage: an Optuna database URL; by default a journal file in the sweep's folder.
        kind: `vision`, or `language` for runs of `dino-value language train`.
        deaths: attempts that may end a trial's process at the same checkpoint before it counts as failed.
        out: the sweep's folder.
        name: of the study in the storage.
    """

    config: str
    space: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]
    objectives: dict[str, str]
    out: Path
    overrides: dict[str, Any] = field(default_factory=dict)
    trials: int = 20
    sampler: str = "tpe"
    startup: int = 10
    seed: int = 0
    first: list[Params] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    prune: Prune | None = None
    storage: str | None = None
    kind: str = "vision"
    deaths: int = 3
    name: str = "sweep"

    def settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Configuration keys of a point in the space: named choices spelt out."""
        found: dict[str, Any] = {}
        for key, value in params.items():
            choices = self.space[key]
            if is_named(choices):
                found |= choices[value]
            else:
                found[key] = value
        return found

    def configure(self, settings: Mapping[str, Any], out: Path) -> Any:
        """The training configuration: a `Config`, or a `LanguageConfig`.

        Raises:
            UserError: as `load_config`.
        """
        merged = {**self.overrides, **settings, "out": str(out)}
        load = load_language_config if self.kind == "language" else load_config
        return load(self.config, [f"{key}={as_yaml(value)}" for key, value in merged.items()])

    def flags(self, name: str, config: Any) -> list[str]:
        """Flags of `dino-value eval NAME` or `dino-value language eval RUN`, the data's included.

        Raises:
            UserError: neither the evaluation nor the training says where the data is.
        """
        given = dict(self.evaluations[name])
        if self.kind == "language":
            return language.flags(name, given, config)
        data = given.pop("data", None) or getattr(config.data, evaluation(name).layout, None)
        if data is None:
            raise UserError(f"evaluations.{name}: give data=PATH, the training has none of this kind")
        return ["--data", str(data), *language.as_flags(given)]

    def pauses(self, steps: int) -> list[int]:
        """Steps before the last at which a trial is judged."""
        return list(range(self.prune.every, steps, self.prune.every)) if self.prune else []


def is_named(choices: Any) -> bool:
    """Whether an entry of the space is `{name: {key: value}}`."""
    return isinstance(choices, dict) and bool(choices) and all(isinstance(value, dict) for value in choices.values())


def as_yaml(value: Any) -> str:
    """A value as `key=value` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def read_spec(source: str) -> dict[str, Any]:
    """The keys of a specification, unchecked but for their names.

    Raises:
        UserError: no such file, bad YAML, an unknown key.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(find_config(source)))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected keys and values at the top level")
    known = {item.name for item in fields(Sweep)}
    if strange := [str(key) for key in content if key not in known]:
        raise UserError(f"{source}: unknown key {strange[0]}; choose {', '.join(sorted(known))}")
    return {str(key): value for key, value in content.items()}


def parse_overrides(parts: Sequence[str]) -> dict[str, Any]:
    """`key=value`, values as YAML.

    Raises:
        UserError: not of that form.
    """
    found: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{part!r}: write key=value, for example steps=300")
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.create(f"value: {value}"))
        except (YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{part!r}: not valid YAML: {' '.join(str(error).split())}") from None
        found[key] = parsed["value"]
    return found


def load_sweep(source: str, overrides: Sequence[str] = (), out: Path | None = None, trials: int | None = None) -> Sweep:
    """A YAML file, or a packaged one such as `sweeps/both`, checked.

    Args:
        overrides: `key=value` for every trial's configuration, over the file's.
        out: the sweep's folder, over the file's.
        trials: how many, over the file's.

    Raises:
        UserError: no such file, bad YAML, an unknown key, a value that no trial could use.
    """
    content = read_spec(source)
    for key, value in (("out", out), ("trials", trials)):
        content |= {} if value is None else {key: value}
    if lacking := [key for key in ("config", "space", "evaluations", "objectives", "out") if not content.get(key)]:
        hint = " (--out DIR)" if lacking[0] == "out" else ""
        raise UserError(f"{source}: {lacking[0]} is missing{hint}")
    for key in ("space", "evaluations", "objectives", "overrides"):
        if not isinstance(content.get(key, {}), dict):
            raise UserError(f"{source}: {key} takes keys and values")
    content["overrides"] = {**content.get("overrides", {}), **parse_overrides(overrides)}
    content["evaluations"] = {name: flags or {} for name, flags in content["evaluations"].items()}
    content["out"] = Path(content["out"])
    if content.get("prune") is not None:
        try:
            content["prune"] = Prune(**content["prune"])
        except TypeError:
            raise UserError(f"{source}: prune takes every, pruner and startup") from None
    return check(Sweep(**content))


def check(sweep: Sweep) -> Sweep:
    """Refuse what would fail in every trial; returns `sweep`."""
    known = tuple(sweep.evaluations if sweep.kind == "language" else EVALUATIONS)
    for key, value, choices in (
        ("kind", sweep.kind, KINDS),
        ("sampler", sweep.sampler, SAMPLERS),
        *(("references", name, REFERENCES) for name in sweep.references),
        *(("evaluations", name, known) for name in sweep.evaluations),
        *((f"objectives.{key}", way, DIRECTIONS) for key, way in sweep.objectives.items()),
        *((("prune.pruner", sweep.prune.pruner, PRUNERS),) if sweep.prune else ()),
    ):
        if value not in choices:
            raise UserError(f"{key}: {value}: choose {', '.join(choices)}")
    for key, number in (("trials", sweep.trials), ("startup", sweep.startup), ("deaths", sweep.deaths)):
        if not isinstance(number, int) or number < 1:
            raise UserError(f"{key}: {number}: must be a whole number, at least 1")
    for key in sweep.objectives:
        name, _, metric = key.partition(".")
        if name not in sweep.evaluations or not metric:
            raise UserError(f"objectives.{key}: write EVALUATION.METRIC of {', '.join(sweep.evaluations)}")
    if sweep.prune and sweep.kind == "language":
        raise UserError("prune: not of language runs; leave it out")
    if sweep.prune and len(sweep.objectives) > 1:
        raise UserError("prune: trials are pruned by one objective; leave it out, or leave one objective")
    if sweep.prune and sweep.prune.every < 1:
        raise UserError(f"prune.every: {sweep.prune.every}: must be at least 1")
    for key, choices in sweep.space.items():
        if problem := _unfit(choices):
            raise UserError(f"space.{key}: {problem}")
        if key in sweep.overrides:
            raise UserError(f"{key} is searched and cannot also be given; take it out of space or of overrides")
    # Each value once, the others at their first: what the configuration refuses is refused here.
    base = {key: _values(choices)[0] for key, choices in sweep.space.items()}
    config = sweep.configure(sweep.settings(base), sweep.out)
    for key, choices in sweep.space.items():
        for value in _values(choices):
            sweep.configure(sweep.settings({**base, key: value}), sweep.out)
    for point in sweep.first:
        if unknown := [key for key in point if key not in sweep.space]:
            raise UserError(f"first: {unknown[0]} is not in space")
        sweep.configure(sweep.settings({**base, **point}), sweep.out)
    for name in sweep.evaluations:
        flags = sweep.flags(name, config)
        if sweep.kind == "language":
            language.check_flags(flags)
        else:
            build_parser(evaluation(name)).parse_args(["w", "--out", "o", *flags])
    return sweep


def _values(choices: Any) -> list[Any]:
    """The ends of a range, or all choices."""
    if is_named(choices) or isinstance(choices, list):
        return list(choices)
    return [choices["low"], choices["high"]]


def _unfit(choices: Any) -> str | None:
    """Why an entry of the space is none."""
    if isinstance(choices, list):
        return None if choices else "an empty list"
    if is_named(choices):
        return None
    if not isinstance(choices, dict) or not {"low", "high"} <= set(choices) <= {"low", "high", "log", "step"}:
        return "write {low: …, high: …, log: true}, a list of values, or {name: {key: value}}"
    low, high = choices["low"], choices["high"]
    if not all(isinstance(end, (int, float)) for end in (low, high)) or low > high:
        return f"low {low}, high {high}: give two numbers, the lower first"
    if choices.get("log") and (low <= 0 or "step" in choices):
        return "log needs a low above 0 and takes no step"
    return None
