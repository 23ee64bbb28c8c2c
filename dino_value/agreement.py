"""Is a direction worth following? Measured at a start, before a run: `dino-value probe CONFIG … --agreement`.

Two directions are made independently, from disjoint halves of the head-train labels and heads of their own, and a third
from the second half with shuffled labels. What reaches the learner of a direction u is not u but what moved targets (or
another designer) make of it on unlabeled images: the change of g_pre, written C u (to first order s·C u with C the
Fisher information where q = p). A direction is *reproducible* if the two changes agree, and *the labels' own* if they
agree more with each other than with that of shuffled labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from dino_value.data.sampling import key
from dino_value.errors import UserError
from dino_value.feedback import FeedbackTask, fit_heads
from dino_value.steps import constant, evaluating, make_views
from dino_value.value import Gradient, alignment, average, mean_gradient, pre_gradient

if TYPE_CHECKING:
    from dino_value.steer import Steer

FROM = 2**24
"""The number of the first unlabeled batch: no cursor comes there."""
REPRODUCIBLE = 0.5
"""Least agreement of two changes: a half of what is followed is then the same whichever labels were drawn."""
OWN = 0.5
"""Largest agreement with shuffled labels, as a part of that."""


def direction_agreement(steer: Steer, temperature: float, pairs: int = 1, batches: int = 2) -> dict[str, Any]:
    """Cosines of directions (`u`) and of what they change (`step`), each a list with one number a pair. Nothing that
    learns is changed.

    Args:
        temperature: the teacher's.
        pairs: independent repetitions, each with halves of its own.
        batches: unlabeled meta batches that a change is averaged over, 2 or more.

    Returns:
        `u_true`, `step_true`: of two independent directions; `u_shuffled`, `step_shuffled`: of one of them and that of
        shuffled labels; `unlabeled`: of the changes on two unlabeled batches; `kept`: of a change with its own u,
        `other`: with the other true u.

    Raises:
        UserError: no designer that follows a direction, or too few labels for two halves.
    """
    if not (steer.config.designs and steer.config.follows):
        raise UserError(
            "the agreement is of what a closed form makes of a direction: choose method=value and designer.name=targets"
        )
    with constant(steer.student), evaluating(steer.student):
        rows = [_pair(steer, temperature, number, max(2, batches)) for number in range(pairs)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def verdict(found: dict[str, list[float]]) -> str:
    """Of `direction_agreement`, from the means over its pairs."""
    true, shuffled = (sum(found[name]) / len(found[name]) for name in ("step_true", "step_shuffled"))
    if true < REPRODUCIBLE:
        return "neither"
    return "the labels' own" if shuffled <= OWN * true else "reproducible"


def _pair(steer: Steer, temperature: float, number: int, batches: int) -> dict[str, float]:
    tasks = [task for task in steer.feedback if not task.guard]
    seed = key(steer.config.seed, "agreement", number)
    a, b = (_direction(steer, [_half(steer, task, seed, half) for task in tasks]) for half in (0, 1))
    shuffled = _direction(steer, [_half(steer, task, seed, 1, shuffle=True) for task in tasks])
    changes = [list(_changes(steer, u, temperature, number, batches)) for u in (a, b, shuffled)]
    step_a, step_b, step_shuffled = map(mean_gradient, changes)
    found = {
        "u_true": alignment(a, b),
        "u_shuffled": alignment(a, shuffled),
        "step_true": alignment(step_a, step_b),
        "step_shuffled": alignment(step_a, step_shuffled),
        "unlabeled": torch.stack([alignment(x, y) for x, y in itertools.pairwise(changes[0])]).mean(),
        "kept": alignment(step_a, a),
        "other": alignment(step_a, b),
    }
    return {name: float(value) for name, value in found.items()}


def _half(steer: Steer, task: FeedbackTask, seed: int, half: int, shuffle: bool = False) -> FeedbackTask:
    """The task on one of two halves of its head-train images, groups of images kept together."""
    groups = sorted({task.source.group(index) for index in task.train_indices})
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {groups[place] for place in order[half::2]}
    indices = [index for index in task.train_indices if task.source.group(index) in chosen]
    size = task.config.feedback.batch_size
    if len(indices) < size:
        raise UserError(
            f"feedback.{task.kind}.train={len(task.train_indices)}: half is below feedback.batch_size={size}; "
            "give more labels, or a smaller batch"
        )
    return task.on(indices, steer.student.backbone.embed_dim, key(seed, half, shuffle), shuffle)


def _direction(steer: Steer, tasks: list[FeedbackTask]) -> Gradient:
    """u of these tasks, as the first update makes it."""
    own, steer.feedback = steer.feedback, tasks
    steps = steer.config.feedback.warmup + steer.config.feedback.updates
    try:
        with steer.autocast():
            for task in tasks:
                fit_heads(task, steer.student.backbone, steer.device, steer.guard, steps)
            return steer.downstream()[0]
    finally:
        steer.feedback = own


def _changes(steer: Steer, u: Gradient, temperature: float, number: int, batches: int) -> Iterator[Gradient]:
    """g_pre as the designer makes it along u, less g_pre without it; one for each unlabeled batch."""
    kept, steer.direction = steer.direction, u
    backbone, config = steer.student.backbone, steer.config
    parameters = steer.scope.parameters(backbone)
    try:
        for place in range(number * batches, (number + 1) * batches):
            crops = steer.meta_stream.batch(FROM + place)
            views = make_views(backbone, crops, config.views, steer.device, config.seed, "agreement", place, steer.part)
            found = []
            for designed in (True, False):
                with steer.autocast():
                    task = steer.task(views, temperature, designed, seed=place)
                    with torch.no_grad():
                        hidden = task.trunk()
                    found.append(average(pre_gradient(task, hidden, parameters)))
            yield list(torch._foreach_sub(*found))
    finally:
        steer.direction = kept
