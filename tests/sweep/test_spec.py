"""Specifications: what is refused, before anything is run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dino_value.errors import UserError
from dino_value.sweep.spec import load_sweep

EVALUATION = {"size": 16}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spaces": {}}, "unknown key spaces; choose config, deaths"),
        ({"space": None}, "space is missing"),
        ({"out": None}, "out is missing (--out DIR)"),
        ({"space": {"optim.lrr": [1.0]}}, "unknown configuration key optim.lrr"),
        ({"space": {"optim.lr": []}}, "space.optim.lr: an empty list"),
        ({"space": {"optim.lr": {"low": 2, "high": 1}}}, "low 2, high 1: give two numbers, the lower first"),
        ({"space": {"optim.lr": {"low": 0.0, "high": 1.0, "log": True}}}, "log needs a low above 0"),
        ({"space": {"optim.lr": {"min": 0.0}}}, "space.optim.lr: write {low: …"),
        ({"space": {"value.period": [2, 0]}}, "value.period=0: must be at least 1"),
        ({"space": {"steps": [2, 3]}}, "steps is searched and cannot also be given"),
        ({"objectives": {"seg.miou": "up"}}, "objectives.seg.miou: up: choose maximize, minimize"),
        ({"objectives": {"knn.top1": "maximize"}}, "objectives.knn.top1: write EVALUATION.METRIC of seg, depth"),
        ({"evaluations": {"segg": {}}}, "evaluations: segg: choose linear, knn, seg"),
        ({"evaluations": {"seg": {"sizes": 3}, "depth": {}}}, "unrecognized arguments: --sizes"),
        ({"evaluations": {"seg": {}, "depth": {}, "linear": {}}}, "evaluations.linear: give data=PATH"),
        ({"sampler": "gp"}, "sampler: gp: choose tpe, random, nsga2"),
        ({"trials": 0}, "trials: 0: must be a whole number, at least 1"),
        ({"prune": {"every": 2}}, "prune: trials are pruned by one objective"),
        ({"prune": {"each": 2}}, "prune takes every, pruner and startup"),
        ({"first": [{"optim.wd": 1}]}, "first: optim.wd is not in space"),
        ({"references": ["start"]}, "references: start: choose step0, baseline"),
    ],
)
def test_what_is_refused(spec: Callable[..., Path], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        load_sweep(str(spec(**changes)))
    assert said in str(raised.value)


def test_settings_from_the_command_line(spec: Callable[..., Path], tmp_path: Path) -> None:
    sweep = load_sweep(str(spec()), ["steps=7", "data.ade20k=elsewhere"], tmp_path / "other", 9)
    assert (sweep.out, sweep.trials) == (tmp_path / "other", 9)
    config = sweep.configure(sweep.settings({"α": "depth", "value.period": 2}), tmp_path)
    assert (config.steps, config.value.period, config.feedback.depth.weight) == (7, 2, 4.0)
    assert sweep.flags("seg", config)[:2] == ["--data", "elsewhere"]
    assert sweep.flags("depth", config)[-1] == "--no-eigen-crop"
