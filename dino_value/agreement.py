"""Is a direction worth following? Measured at a start, before a run: `dino-value probe CONFIG … --agreement`.

Two directions are made independently, from disjoint halves of the labels and heads of their own, and a third from the
second half with shuffled labels. What reaches the learner of a direction u is not u but what moved targets (or
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
from dino_value.steer import Steer, evaluating, refusing
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
    follows = config.designer.closed_form in ("targets", "weights") and config.value.direction != "random"
    if steer is None or not (config.method == "value" and follows):
        raise UserError(
            "--agreement measures what a closed form makes of a direction: choose designer.name=targets (or weights), "
            "method=value, and a value.direction that is not random"
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
    """The task on one of two halves of its images, groups of images kept together."""
    config = task.config
    train, meta = (_of_groups(task, indices, seed, half) for indices in (task.train_indices, task.meta_indices))
    ahead = config.value.direction == "lookahead"  # which has no use for meta images
    for name, part, least in (("train", train, config.feedback.batch_size), ("meta", meta, 0 if ahead else 1)):
        if len(part) < least:
            every = {"train": task.train_indices, "meta": task.meta_indices}[name]
            raise UserError(
                f"feedback.{task.kind}.{name}={len(every)}: half of it, {len(part)}, is less than {least} for one "
                "batch; give more labels, or a smaller feedback.batch_size"
            )
    return task.on(train, task.meta_indices if ahead else meta, dim, key(seed, half, shuffle), shuffle)


def _of_groups(task: FeedbackTask, indices: Sequence[int], seed: int, half: int) -> list[int]:
    groups = sorted({task.source.group(index) for index in indices})
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {groups[place] for place in order[half::2]}
    return [index for index in indices if task.source.group(index) in chosen]


def _direction(run: Run, steer: Steer, tasks: Sequence[FeedbackTask], number: int) -> Gradient:
    """u of these tasks, as an update makes it; heads fitted first as before the first update."""
    own, kept = steer.feedback, steer.direction
    steer.feedback = list(tasks)
    try:
        for task in tasks:
            for _ in range(run.config.feedback.warmup + run.config.feedback.updates):
                fit_head(task, run.student.backbone, run.device, run.guard)
        with run.autocast():
            u, _, _ = steer.downstream()
        if run.config.value.direction in ("cosine", "adam"):  # which read g_pre
            with refusing("value.direction"):
                u = steer._direction({})(u, _g_pre(run, steer, "agreement, direction", number, designed=False))
        return u
    finally:
        steer.feedback, steer.direction = own, kept


def _changes(run: Run, steer: Steer, u: Gradient, number: int, batches: int) -> Iterator[Gradient]:
    """g_pre as the designer makes it along u, less g_pre without it; one for each unlabeled batch."""
    kept, steer.direction = steer.direction, u
    count = max(2, batches)
    try:
        for place in range(number * count, (number + 1) * count):
            found = [_g_pre(run, steer, "agreement", place, designed) for designed in (True, False)]
            yield list(torch._foreach_sub(*found))
    finally:
        steer.direction = kept


def _g_pre(run: Run, steer: Steer, name: str, place: int, designed: bool) -> Gradient:
    """On unlabeled batch `place`, as the designer makes it or plain."""
    backbone = run.student.backbone
    crops = run.stream.batch(place)
    views = make_views(backbone, crops, run.config.views, run.device, run.config.seed, name, place)
    with run.autocast():
        task = steer.task(views, run.teacher_temperature(), designed, seed=place)
        with torch.no_grad():
            hidden = task.trunk()
        return pre_gradient(task, hidden, steer.scope.parameters(backbone))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
