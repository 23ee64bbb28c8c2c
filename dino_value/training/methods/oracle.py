"""Steps along u itself: is the direction any good? No value method may do this, and no loss is self-supervised here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dino_value.training.trainer import Trainer


def oracle_update(trainer: Trainer, large: Tensor, small: Tensor) -> None:
    """A step along u by the learner's own optimizer."""
    steer = trainer.steer
    assert steer is not None
    trainer.loss.begin(trainer.step, trainer.teacher)
    steer.update_if_due(trainer.step, trainer.teacher_temperature())
    trainer.optimizer.zero_grad()
    if steer.direction is not None:  # none before burn-in is over
        for parameter, part in zip(steer.trained, steer.direction, strict=True):
            parameter.grad = part.to(parameter.dtype, copy=True)
    gradient_norm = torch.nn.utils.clip_grad_norm_(steer.trained, trainer.config.optim.clip)
    trainer.apply(gradient_norm=gradient_norm)
    trainer.update_teacher()
    trainer.meters.add(gradient_norm=gradient_norm)
