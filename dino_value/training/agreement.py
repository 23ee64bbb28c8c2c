"""Is a direction worth following? Measured at a start, before a run: `dino-value probe CONFIG … --agreement`.

Two directions are made independently, from disjoint halves of the labels and heads of their own, and a third from the
second half with shuffled labels. What reaches the learner of a direction u is not u but what moved targets (or
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
from dino_value.errors import UserError, refusing
from dino_value.training.feedback import FeedbackTask, fit_heads
from dino_value.training.steps import constant, evaluating, make_views
from dino_value.value import Gradient, alignment, average, mean_gradient, norm, pre_gradient

if TYPE_CHECKING:
    from dino_value.training.designer_update import DesignerUpdate

FROM = 2**24
"""The number of the first unlabeled batch: no cursor comes there."""
REPRODUCIBLE = 0.5
"""Least agreement of two changes: a half of what is followed is then the same whichever labels were drawn."""
OWN = 0.5
"""Largest agreement with shuffled labels, as a part of that."""


def direction_agreement(steer: DesignerUpdate, temperature: float, pairs: int = 1, batches: int = 2) -> dict[str, Any]:
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
    config = steer.config
    follows = config.designer.closed_form in ("targets", "weights") and config.value.direction != "random"
    if not (config.method == "value" and follows):
        raise UserError(
            "the agreement is of what a closed form makes of a direction: choose method=value, designer.name=targets "
            "or weights, and a value.direction that is not random"
        )
    if config.designer.closed_form == "targets" and 0 in (config.designer.kl, config.designer.strength):
        name = "kl" if config.designer.kl == 0 else "strength"
        raise UserError(
            f"designer.{name}=0 leaves targets as they are, and nothing is left to compare: give the value that the "
            "run is to have, or leave it out"
        )
    if config.value.direction == "adam" and not steer.optimizer.state:
        raise UserError(
            "value.direction=adam goes through the optimizer of a run, which before one has taken no step: measure it "
            "in a run folder, by value.agreement=N in a run, or choose value.direction=dot, cosine or lookahead"
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


def _pair(steer: DesignerUpdate, temperature: float, number: int, batches: int) -> dict[str, float]:
    tasks = [task for task in steer.feedback if not task.guard]
    seed = key(steer.config.seed, "agreement", number)
    halves = [[_half(steer, task, seed, half) for task in tasks] for half in (0, 1)]
    halves.append([_half(steer, task, seed, 1, shuffle=True) for task in tasks])
    a, b, shuffled = (_direction(steer, part, temperature, number) for part in halves)
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


def _half(steer: DesignerUpdate, task: FeedbackTask, seed: int, half: int, shuffle: bool = False) -> FeedbackTask:
    """The task on one of two halves of its images, groups of images kept together."""
    train, meta = (_of_groups(task, indices, seed, half) for indices in (task.train_indices, task.meta_indices))
    ahead = steer.config.value.direction == "lookahead"  # which has no use for meta images
    for name, part, least in (("train", train, steer.config.feedback.batch_size), ("meta", meta, 0 if ahead else 1)):
        if len(part) < least:
            every = {"train": task.train_indices, "meta": task.meta_indices}[name]
            raise UserError(
                f"feedback.{task.kind}.{name}={len(every)}: half of it, {len(part)}, is less than {least} for one "
                "batch; give more labels, or a smaller feedback.batch_size"
            )
    dim = steer.student.backbone.embed_dim
    return task.on(train, task.meta_indices if ahead else meta, dim, key(seed, half, shuffle), shuffle)


def _of_groups(task: FeedbackTask, indices: list[int], seed: int, half: int) -> list[int]:
    groups = sorted({task.source.group(index) for index in indices})
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {groups[place] for place in order[half::2]}
    return [index for index in indices if task.source.group(index) in chosen]


def _direction(steer: DesignerUpdate, tasks: list[FeedbackTask], temperature: float, number: int) -> Gradient:
    """u of these tasks, as the first update makes it."""
    own, kept, steer.feedback = steer.feedback, steer.direction, tasks
    steps = steer.config.feedback.warmup + steer.config.feedback.updates
    try:
        with steer.autocast():
            for task in tasks:
                fit_heads(task, steer.student.backbone, steer.device, steer.guard, steps)
            u = steer.downstream()[0]
        if not bool(norm(u).isfinite()):
            raise UserError(f"value.direction={steer.config.value.direction}: not finite; lower its learning rate")
        if steer.config.value.direction in ("cosine", "adam"):  # which read g_pre
            with refusing("value.direction"):
                g_pre = _g_pre(steer, temperature, "agreement, direction", number, designed=False)
                u = steer.direction_of({})(u, g_pre)
        return u
    finally:
        steer.feedback, steer.direction = own, kept


def _changes(steer: DesignerUpdate, u: Gradient, temperature: float, number: int, batches: int) -> Iterator[Gradient]:
    """g_pre as the designer makes it along u, less g_pre without it; one for each unlabeled batch."""
    kept, steer.direction = steer.direction, u
    try:
        for place in range(number * batches, (number + 1) * batches):
            found = [_g_pre(steer, temperature, "agreement", place, designed) for designed in (True, False)]
            yield list(torch._foreach_sub(*found))
    finally:
        steer.direction = kept


def _g_pre(steer: DesignerUpdate, temperature: float, name: str, place: int, designed: bool) -> Gradient:
    """On an unlabeled meta batch, as the designer makes it or plain."""
    backbone, config = steer.student.backbone, steer.config
    crops = steer.meta_stream.batch(FROM + place)
    views = make_views(backbone, crops, config.views, steer.device, config.seed, name, place, steer.part)
    with steer.autocast():
        task = steer.task(views, temperature, designed, seed=place)
        with torch.no_grad():
            hidden = task.trunk()
        return average(pre_gradient(task, hidden, steer.scope.parameters(backbone)))
