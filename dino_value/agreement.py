"""Is a direction worth following? Measured at a start, before a run: `dino-value probe CONFIG … --agreement`.

Two directions are made independently, from disjoint halves of the head-train labels and heads of their own, and a third
from the second half with shuffled labels. What reaches the learner of a direction u is not u but what moved targets (or
another designer) make of it on unlabeled images: the change of g_pre, written C u (to first order s·C u with C the
Fisher information where q = p). A direction is *reproducible* if the two changes agree, and *the labels' own* if they
agree more with each other than with that of shuffled labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dino_value.data.sampling import key
from dino_value.errors import UserError
from dino_value.feedback import FeedbackTask, fit_head
from dino_value.steer import Steer, evaluating
from dino_value.steps import constant, make_views
from dino_value.train import Run
from dino_value.value import Gradient, alignment, mean_gradient, pre_gradient

REPRODUCIBLE = 0.5
"""Least agreement of two changes: a half of what is followed is then the same whichever labels were drawn."""
OWN = 0.5
"""Largest agreement with shuffled labels, as a part of that."""


def direction_agreement(run: Run, pairs: int = 1, batches: int = 2) -> dict[str, Any]:
    """Cosines of directions (`u`) and of what they change (`step`), each a list with one number a pair.

    Args:
        pairs: independent repetitions, each with its own halves.
        batches: unlabeled batches, of the learner's size, that a change is averaged over.

    Returns:
        `u` and `step`: `true` (two independent directions), `shuffled` (one of them and shuffled labels'); `unlabeled`:
        the change on two halves of the unlabeled batches; `kept`: the cosine of a change with its own u, `other` with
        the other true u; and `verdict`.

    Raises:
        UserError: no designer that follows a direction, or too few labels for two halves.
    """
    steer, config = run.steer, run.config
    if steer is None or not (config.designs and config.follows):
        raise UserError(
            "--agreement measures what a closed form makes of a direction: choose designer.name=targets (or weights), "
            "method=value"
        )
    rows: list[dict[str, float]] = []
    with constant(run.student), evaluating(run.student):
        for number in range(pairs):
            rows.append(_pair(run, steer, number, batches))
    names = {name: [row[name] for row in rows] for name in rows[0]}
    found: dict[str, Any] = {
        "u": {"true": names["u_true"], "shuffled": names["u_shuffled"]},
        "step": {"true": names["step_true"], "shuffled": names["step_shuffled"]},
        **{name: names[name] for name in ("unlabeled", "kept", "other")},
    }
    return found | {"verdict": verdict(_mean(names["step_true"]), _mean(names["step_shuffled"]))}


def verdict(true: float, shuffled: float) -> str:
    """From the mean cosines of two true changes, and of a true with a shuffled one."""
    if true < REPRODUCIBLE:
        return "neither"
    return "the labels' own" if shuffled <= OWN * true else "reproducible"


def _pair(run: Run, steer: Steer, number: int, batches: int) -> dict[str, float]:
    tasks = [task for task in steer.feedback if not task.guard]
    seed, dim = key(run.config.seed, "agreement", number), run.student.backbone.embed_dim
    first, second = ([_half(task, seed, half, dim) for task in tasks] for half in (0, 1))
    third = [_half(task, seed, 1, dim, shuffle=True) for task in tasks]
    a, b, shuffled = (_direction(run, steer, part, number) for part in (first, second, third))
    steps = [list(_changes(run, steer, u, number, batches)) for u in (a, b, shuffled)]
    step_a, step_b, step_shuffled = map(mean_gradient, steps)
    found = {
        "u_true": alignment(a, b),
        "u_shuffled": alignment(a, shuffled),
        "step_true": alignment(step_a, step_b),
        "step_shuffled": alignment(step_a, step_shuffled),
        "unlabeled": torch.stack([alignment(x, y) for x, y in itertools.pairwise(steps[0])]).mean(),
        "kept": alignment(step_a, a),
        "other": alignment(step_a, b),
    }
    return {name: float(value) for name, value in found.items()}


def _half(task: FeedbackTask, seed: int, half: int, dim: int, shuffle: bool = False) -> FeedbackTask:
    """The task on one of two halves of its head-train images, groups of images kept together."""
    groups = sorted({task.source.group(index) for index in task.train_indices})
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {groups[place] for place in order[half::2]}
    indices = [index for index in task.train_indices if task.source.group(index) in chosen]
    if len(indices) < task.config.feedback.batch_size:
        raise UserError(
            f"feedback.{task.kind}.train={len(task.train_indices)}: half of it is less than feedback.batch_size="
            f"{task.config.feedback.batch_size}; give more labels, or a smaller batch"
        )
    return task.on(indices, dim, key(seed, half, shuffle), shuffle)


def _direction(run: Run, steer: Steer, tasks: Sequence[FeedbackTask], number: int) -> Gradient:
    """u of these tasks, as an update makes it; heads fitted first as before the first update."""
    own, steer.feedback = steer.feedback, list(tasks)
    try:
        for task in tasks:
            for _ in range(run.config.feedback.warmup + run.config.feedback.updates):
                fit_head(task, run.student.backbone, run.device, run.guard)
        with run.autocast():
            g_down, _, _ = steer.downstream()
        return g_down
    finally:
        steer.feedback = own


def _changes(run: Run, steer: Steer, u: Gradient, number: int, batches: int) -> Iterator[Gradient]:
    """g_pre as the designer makes it along u, less g_pre without it; one for each unlabeled batch."""
    kept, steer.direction = steer.direction, u
    parameters = steer.scope.parameters(run.student.backbone)
    try:
        for batch in range(max(2, batches)):
            place = number * batches + batch
            crops = run.stream.batch(place)
            views = make_views(
                run.student.backbone, crops, run.config.views, run.device, run.config.seed, "agreement", place
            )
            found = []
            for designed in (True, False):
                with run.autocast():
                    task = steer.task(views, run.teacher_temperature(), designed, seed=place)
                    with torch.no_grad():
                        hidden = task.trunk()
                    found.append(pre_gradient(task, hidden, parameters))
            yield list(torch._foreach_sub(*found))
    finally:
        steer.direction = kept


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
