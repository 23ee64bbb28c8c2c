"""Is a direction worth following: what is measured at a start, and what that leaves as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_value.config import Config
from dino_value.errors import UserError
from dino_value.training import agreement as agreement_module
from dino_value.training.agreement import OWN, REPRODUCIBLE, direction_agreement, verdict
from dino_value.training.trainer import Trainer

Make = Callable[..., Config]

AHEAD = ["designer=targets", "value.direction=lookahead", "value.lookahead.steps=2", "feedback.warmup=1"]
LABELS = ["feedback.batch_size=2"]  # half of 6 images is a batch


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def measured(run: Trainer, pairs: int = 1) -> dict[str, list[float]]:
    assert run.steer is not None
    return direction_agreement(run.steer, run.teacher_temperature(), pairs)


def cosines(found: dict[str, list[float]]) -> list[float]:
    return [value for part in found.values() for value in part]


@pytest.mark.parametrize(
    ("true", "shuffled", "expected"),
    [
        (REPRODUCIBLE - 1e-6, -1.0, "neither"),
        (-1.0, -1.0, "neither"),
        (REPRODUCIBLE, OWN * REPRODUCIBLE, "the labels' own"),
        (REPRODUCIBLE, OWN * REPRODUCIBLE + 1e-6, "reproducible"),
        (1.0, 1.0, "reproducible"),
        (1.0, OWN, "the labels' own"),
        (0.9, -0.9, "the labels' own"),
    ],
)
def test_the_verdict(true: float, shuffled: float, expected: str) -> None:
    assert (REPRODUCIBLE, OWN) == (0.5, 0.5)
    assert verdict({"step_true": [true], "step_shuffled": [shuffled]}) == expected


GIVEN = {
    "lookahead": AHEAD,
    "contrast": [*AHEAD, "value.lookahead.contrast=true"],
    "dot, kept and averaged": [
        "designer=targets",
        "value.direction=dot",
        "feedback.refresh=2",
        "feedback.ema=0.5",
        "feedback.warmup=1",
    ],
    "cosine, weights": ["designer=weights", "value.direction=cosine", "feedback.warmup=1"],
    "masks": [*AHEAD, "designer=unet+targets", "backbone.kwargs.drop_path_rate=0.3"],
}


@pytest.mark.parametrize("overrides", GIVEN.values(), ids=GIVEN.keys())
def test_measuring_leaves_the_run_as_it_was_and_says_the_same_again(tiny: Make, overrides: list[str]) -> None:
    run = Trainer(tiny(*overrides, *LABELS))
    for large, small in run.stream.iterate(0, 1):  # with a direction of its own, and memories
        run.learner_update(large, small)
    steer = run.steer
    assert steer is not None
    kept, feedback = copy.deepcopy(run.state_dict()), list(steer.feedback)
    direction = [part.clone() for part in steer.direction or []]
    training = [part.training for part in run.student.modules()]
    first = measured(run)
    assert same(kept, run.state_dict())
    assert all(mine is theirs for mine, theirs in zip(feedback, steer.feedback, strict=True))
    assert same(direction, steer.direction)
    assert training == [part.training for part in run.student.modules()]
    assert all(parameter.requires_grad for parameter in run.student.parameters())
    assert first == measured(run)

    found = cosines(first)
    assert len(found) == 7
    assert all(-1 - 1e-5 <= cosine <= 1 + 1e-5 for cosine in found)
    assert all(cosine == cosine for cosine in found)
    # Nothing agrees with itself: the halves, their labels and their heads are others.
    assert all(0 < abs(cosine) < 0.9999 for cosine in found)


def test_pairs_are_repetitions(tiny: Make) -> None:
    found = measured(Trainer(tiny(*AHEAD, *LABELS)), pairs=2)
    assert all(len(part) == 2 for part in found.values())
    assert found["u_true"][0] != found["u_true"][1]
    mean = {name: [sum(found[name]) / 2] for name in ("step_true", "step_shuffled")}
    assert verdict(found) == verdict(mean)


def test_halves_share_no_image_and_only_the_third_is_shuffled(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trainer(tiny("designer=targets", "value.direction=dot", "feedback.warmup=0", *LABELS))
    seen: list[list[Any]] = []
    made = agreement_module._direction

    def watched(steer: Any, tasks: Any, temperature: float, number: int) -> Any:
        seen.append(list(tasks))
        return made(steer, tasks, temperature, number)

    monkeypatch.setattr(agreement_module, "_direction", watched)
    measured(run)
    first, second, third = seen
    for whole, a, b, c in zip(run.feedback, first, second, third, strict=True):
        for name in ("train_indices", "meta_indices"):
            halves = [set(getattr(task, name)) for task in (a, b)]
            assert not halves[0] & halves[1]
            assert halves[0] | halves[1] == set(getattr(whole, name))
            assert getattr(c, name) == getattr(b, name)
        weights = [next(iter(task.head.state_dict().values())) for task in (whole, a, b)]
        assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 3
        index = b.train_indices[0]
        assert torch.equal(b.images.load(index)[0], c.images.load(index)[0])
        assert all(torch.equal(whole.images.load(i)[1], a.images.load(i)[1]) for i in range(4))
        for indices in (b.train_indices, b.meta_indices):
            assert any(not torch.equal(b.images.load(i)[1], c.images.load(i)[1]) for i in indices)
        assert c.meta_stream.source.source is c.images  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "overrides",
    [
        ["designer=unet"],
        ["designer=random_targets"],
        ["designer=best_of_n"],
        ["designer=targets", "method=random"],
        ["designer=targets", "value.direction=random"],
        ["method=oracle"],
    ],
)
def test_a_run_whose_direction_no_closed_form_follows(tiny: Make, overrides: list[str]) -> None:
    with pytest.raises(UserError, match=r"choose method=value, designer\.name=targets or weights") as caught:
        measured(Trainer(tiny(*overrides)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*AHEAD, "feedback.batch_size=4"], r"feedback\.depth\.train=6: half of it, 3, is less than 4"),
        (["designer=targets", *LABELS, "feedback.seg.meta=1"], r"feedback\.seg\.meta=1: half of it, 0, is less than 1"),
    ],
)
def test_too_few_labels_for_two_halves(tiny: Make, overrides: list[str], message: str) -> None:
    run = Trainer(tiny(*overrides))
    assert run.steer is not None
    feedback = list(run.steer.feedback)
    with pytest.raises(UserError, match=message):
        measured(run)
    assert run.steer.feedback == feedback
    assert all(parameter.requires_grad for parameter in run.student.parameters())


def test_adam_without_a_step_of_the_optimizer(tiny: Make) -> None:
    run = Trainer(tiny("designer=targets", "value.direction=adam", "value.burn_in=20", *LABELS))
    with pytest.raises(UserError, match=r"value\.direction=adam .* before one has taken no step: measure it in a run"):
        measured(run)
