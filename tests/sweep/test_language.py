"""Trials that are language runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dino_value.errors import UserError
from dino_value.language.arithmetic import write_problems, write_tiny_model
from dino_value.sweep import work
from dino_value.sweep.spec import Sweep, load_sweep

pytest.importorskip("optuna")


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., Sweep]:
    """Of the learning rate of a tiny model; keywords replace the specification's keys."""
    write_tiny_model(tmp_path / "model", width=16, layers=2, heads=2)
    for name, count in (("stream", 40), ("held", 6)):
        write_problems(tmp_path / f"{name}.jsonl", count, 0, name)

    def make(**changes: Any) -> Sweep:
        content = {
            "kind": "language",
            "config": "language/full",
            "overrides": {
                **{"method": "baseline", "steps": 2, "device": "cpu", "precision": "fp32", "checkpoint.export": False},
                **{"learner.model": str(tmp_path / "model"), "data.stream": str(tmp_path / "stream.jsonl")},
                **{
                    "data.length": 40,
                    "value.length": 40,
                    "optim.batch_size": 2,
                    "optim.accumulation": 1,
                    "held.every": 9,
                },
                "held.file": str(tmp_path / "held.jsonl"),
            },
            "space": {"optim.lr": [1e-3, 1e-2]},
            "first": [{"optim.lr": 1e-2}, {"optim.lr": 1e-3}],
            "evaluations": {"held": {"loss_only": True, "device": "cpu"}},
            "objectives": {"held.answer_loss": "minimize"},
            "references": ["step0"],
            "trials": 2,
            "out": str(tmp_path / "sweep"),
            **changes,
        }
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return load_sweep(str(path))

    return make


def test_language_runs_are_trained_and_judged(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    work.prepare(made)
    work.work(made)
    rows = json.loads((made.out / "trials.json").read_text())
    assert [(row["state"], row["params"]["optim.lr"]) for row in rows] == [("complete", 1e-2), ("complete", 1e-3)]
    losses = [row["values"]["held.answer_loss"] for row in rows]
    start = json.loads((made.out / "step0" / "results" / "held" / "results.json").read_text())
    assert len({*losses, start["metrics"]["answer_loss"]["mean"]}) == 3
    assert (made.out / "trials" / "0001" / "checkpoints").is_dir()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "speech"}, "kind: speech: choose vision, language"),
        ({"space": {"value.radius": [1.0]}}, "unknown configuration key value.radius"),
        ({"evaluations": {"held": {"loss_onyl": True}}}, "unrecognized arguments: --loss-onyl"),
        ({"prune": {"every": 1}}, "prune: not of language runs"),
        ({"objectives": {"gsm8k.answer_loss": "minimize"}}, "write EVALUATION.METRIC of held"),
    ],
)
def test_what_is_refused(sweep: Callable[..., Sweep], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        sweep(**changes)
    assert said in str(raised.value)
