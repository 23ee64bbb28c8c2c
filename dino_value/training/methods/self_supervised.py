"""The learner's step of Algorithm 1: plain self-supervision on what the designer has made of views and targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dino_value.data.sampling import generator, key
from dino_value.distributed import group as distributed
from dino_value.distributed.fsdp import full
from dino_value.distributed.shards import WHOLE
from dino_value.models.learner import Learner
from dino_value.objectives.interface import Draw, LossTerms
from dino_value.training.steps import Views, make_views
from dino_value.value import average

if TYPE_CHECKING:
    from dino_value.training.trainer import Trainer


def self_supervised_update(trainer: Trainer, large: Tensor, small: Tensor) -> None:
    """Views → designer → targets → loss → step → teacher. u never reaches the optimizer."""
    config, steer, step, loss = trainer.config, trainer.steer, trainer.step, trainer.loss
    backbone, part, temperature = trainer.student.backbone, trainer.part, trainer.teacher_temperature()
    trainer.batch = (large, small)
    views = make_views(backbone, trainer.batch, config.views, trainer.device, config.seed, "learner", step, part)
    loss.begin(step, trainer.teacher)
    if steer is not None:
        steer.update_if_due(step, temperature)
    draw = loss.draw(views.large, backbone.patch_size, generator(config.seed, "objective", step), part)

    with torch.no_grad(), trainer.autocast():
        learned = views if steer is None else steer.learned_views(views, step)
        seen = learned if config.designer.teacher_views == "masked" else views
        targets, logits = trainer.whole_teacher(loss.teach, seen.large, temperature, draw)
        learned = learned if steer is None else steer.chosen_views(learned, targets)

    # Stochastic depth is a function of the step, like the data, and the same in every arm.
    torch.manual_seed(key(config.seed, "step", step, *([part.rank] if part != WHOLE else [])))
    value, parts = backward(trainer, learned, targets, draw)
    if step < config.objective.freeze_last_layer:
        trainer.student.zero_last_layers()
    if step < config.optim.freeze_backbone:
        backbone.zero_grad()
    gradient_norm = full(torch.nn.utils.clip_grad_norm_(trainer.student.parameters(), config.optim.clip))

    named = {f"loss_{name}": part for name, part in parts.items()}
    taken = trainer.apply(loss=value, gradient_norm=gradient_norm, **(named if len(named) > 1 else {}))
    if steer is not None:
        scale = (config.optim.clip / gradient_norm.detach().clamp_min(1e-20)).clamp_max(1)
        steer.clip_scale = torch.where(gradient_norm.isfinite(), scale, steer.clip_scale)
    loss.update(logits)
    trainer.update_teacher()
    if taken:
        trainer.meters.add(loss=value, **named, gradient_norm=gradient_norm, **loss.watch(targets))


def backward(trainer: Trainer, views: Views, targets: LossTerms, draw: Draw) -> tuple[Tensor, LossTerms]:
    """The loss and, of this process, its parts; its gradient is left in the student, taken in `optim.accumulate` passes
    over equal shards of the batch."""
    steer, step, objective = trainer.steer, trainer.step, trainer.loss
    start = 0 if steer is None else steer.scope.start

    def parts_of(student: Learner, views: Views, targets: LossTerms, draw: Draw) -> LossTerms:
        states, weights = objective.states(student, views, start, draw), None
        predictions = objective.predict(student, states, start, draw)
        if steer is not None:
            weights = steer.term_weights(states, targets, draw)
            targets = steer.moved_targets(states, predictions, targets, draw, step)
        return objective.parts(objective.terms_of(predictions, targets), draw, weights)

    passes = WHOLE.split(trainer.config.optim.accumulate)
    found: list[tuple[Tensor, LossTerms]] = []
    trainer.optimizer.zero_grad()
    for part in passes:
        own = (targets, draw) if part == WHOLE else objective.cut(targets, draw, part)
        with distributed.reduced(trainer.whole, last=part == passes[-1]):
            # A context of its own: autocast would go on using the casts of weights that it made without a graph.
            with trainer.autocast():
                parts = trainer.whole(parts_of, views.part(part), *own)
                loss = objective.total(parts)
            (loss / len(passes)).backward()
        found.append((loss.detach(), {name: value.detach() for name, value in parts.items()}))
    losses, many = zip(*found, strict=True)
    mean = {name: torch.stack([parts[name] for parts in many]).mean(0) for name in many[0]}
    return average([torch.stack(losses).mean(0)])[0], mean
