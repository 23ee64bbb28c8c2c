"""Heads that lag behind the backbone: head steps on cached features, what lag is, what is said of directions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_value.config import Config
from dino_value.runs.metrics import read_metrics
from dino_value.training import feedback as feedback_module
from dino_value.training.feedback import FeedbackTask, fit_head, fit_heads, head_lag
from dino_value.training.health import CollapseWatch
from dino_value.training.optim import FiniteGuard
from dino_value.training.steps import evaluating
from dino_value.training.trainer import Trainer, train

Make = Callable[..., Config]


def task_of(run: Trainer) -> FeedbackTask:
    assert run.steer is not None
    return run.steer.feedback[0]


def weights(task: FeedbackTask) -> list[torch.Tensor]:
    return [value.clone() for value in task.head.state_dict().values()]


def test_without_a_pool_every_step_has_a_batch_of_its_own(tiny: Make) -> None:
    runs = [Trainer(tiny()) for _ in range(2)]
    for _ in range(3):
        fit_head(task_of(runs[0]), runs[0].student.backbone, runs[0].device, FiniteGuard())
    fit_heads(task_of(runs[1]), runs[1].student.backbone, runs[1].device, FiniteGuard(), 3)
    assert all(map(torch.equal, weights(task_of(runs[0])), weights(task_of(runs[1]))))
    assert task_of(runs[1]).train.count == 3


def test_a_pool_is_seen_once_and_used_in_turn(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trainer(tiny("feedback.pool=2"))
    task, backbone = task_of(run), run.student.backbone
    batches = [task.train_stream.batch(number) for number in range(2)]
    expected = copy.deepcopy(task)
    kept = [feedback_module.seen(expected, backbone, batch, run.device) for batch in batches]
    for step in range(5):
        feedback_module.step_head(expected, kept[step % 2], FiniteGuard())
    calls: list[int] = []
    made = feedback_module.seen
    monkeypatch.setattr(feedback_module, "seen", lambda *arguments: calls.append(1) or made(*arguments))
    fit_heads(task, backbone, run.device, FiniteGuard(), 5)
    assert len(calls) == 2
    assert all(map(torch.equal, weights(task), weights(expected)))


def test_lag_is_large_for_a_fresh_head_and_falls_as_it_is_fitted(tiny: Make) -> None:
    scenes = ["data.ade20k=scenes", "feedback.seg.train=128", "feedback.batch_size=16"]  # labels that can be learnt
    run = Trainer(tiny("feedback.lr=0.02", *scenes, "feedback.depth.weight=0"))
    task, backbone = task_of(run), run.student.backbone
    with evaluating(run.student):
        fresh = float(head_lag(task, backbone, run.device, 0))
        fit_heads(task, backbone, run.device, FiniteGuard(), 200)
        fitted = float(head_lag(task, backbone, run.device, 0))
    assert fresh > 0.1 > fitted
    assert fresh > fitted + 0.1


def test_measuring_lag_changes_nothing(tiny: Make) -> None:
    run = Trainer(tiny())
    task = task_of(run)
    before, count = weights(task), task.train.count
    first = float(head_lag(task, run.student.backbone, run.device, 3))
    assert all(map(torch.equal, before, weights(task)))
    assert task.train.count == count
    assert float(head_lag(task, run.student.backbone, run.device, 3)) == first


def test_lag_and_drift_are_logged(tiny: Make, tmp_path: Path) -> None:
    settings = ["designer=targets", "value.direction=dot", "feedback.lag_every=2", "steps=6", "value.period=1"]
    rows = read_metrics(train(tiny(*settings), quiet=True))
    assert [row["step"] for row in rows if "head_lag" in row] == [1, 3, 5]
    drifts = [row["direction_drift"] for row in rows if "direction_drift" in row]
    assert len(drifts) == 5
    assert all(-1 <= drift <= 1 for drift in drifts)
    ahead = read_metrics(
        train(
            tiny(
                "designer=targets", "value.direction=lookahead", "value.lookahead.steps=2", f"out={tmp_path / 'ahead'}"
            ),
            quiet=True,
        )
    )
    assert not any("head_lag" in row for row in ahead)  # its heads repair themselves


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        ({"lookahead_before": 1.0, "lookahead_after": 1.5}, "lookahead_diverges", "Lower value.lookahead.lr"),
        ({"direction_drift": -0.2}, "direction_reverses", "cosine of -0.20"),
        ({"head_lag": 0.3}, "heads_lag", "take 30% off the heads' loss"),
        (
            {"target_spread_dino": 0.01, "lookahead_before": 1.0, "lookahead_after": 0.5},
            "targets_follow_rounding",
            "set precision=fp32",
        ),
    ],
)
def test_what_is_said_of_directions_is_said_at_once_and_once(
    tiny: Make, values: dict[str, float], kind: str, said: str
) -> None:
    watch = CollapseWatch(tiny(), low_precision=True)
    (event,) = watch.judge(7, values)
    assert event.kind == kind
    assert said in event.text
    assert "\n" not in event.text
    assert watch.judge(8, values) == []


@pytest.mark.parametrize(
    "values",
    [
        {"lookahead_before": 1.5, "lookahead_after": 1.0},
        {"direction_drift": 0.0},
        {"head_lag": 0.05},
        {"target_spread_dino": 0.5, "lookahead_before": 1.0, "lookahead_after": 0.5},
    ],
)
def test_a_sound_direction_is_silent(tiny: Make, values: dict[str, Any]) -> None:
    assert CollapseWatch(tiny(), low_precision=True).judge(7, values) == []


def test_rounding_is_of_low_precision_alone(tiny: Make) -> None:
    values = {"target_spread_dino": 0.01, "lookahead_before": 1.0, "lookahead_after": 0.5}
    assert CollapseWatch(tiny()).judge(7, values) == []


def test_what_survives_on_held_labels_is_measured(tiny: Make, tmp_path: Path) -> None:
    held = ["feedback.seg.held=2", "feedback.depth.held=1", "value.diagnose=1"]
    settings = ["designer=targets", "value.direction=lookahead", "value.lookahead.steps=3"]
    runs = [
        train(tiny(*settings, *held, f"out={tmp_path / 'measured'}"), quiet=True),
        train(tiny(*settings, *held[:2]), quiet=True),
    ]
    found = [row["held_survival"] for row in read_metrics(runs[0]) if "held_survival" in row]
    assert found
    assert all(value == value for value in found)
    losses = [[row["loss"] for row in read_metrics(run)] for run in runs]
    assert losses[0] == losses[1]  # measuring changes nothing
