"""The labels spent on the backbone itself: what they are worth when nothing is self-supervised. A control."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dino_value.data.sampling import key

if TYPE_CHECKING:
    from dino_value.training.trainer import Trainer


def finetune_update(trainer: Trainer, large: Tensor, small: Tensor) -> None:
    """A step on labels alone, with the learner's optimizer, schedules and average."""
    config, backbone, labels, step = trainer.config, trainer.student.backbone, trainer.labels, trainer.step
    assert labels is not None
    if step == 0:
        labels.warm_up(backbone, trainer.guard)
    torch.manual_seed(key(config.seed, "step", step))
    with trainer.autocast():
        losses = labels.losses(backbone)
    loss = labels.total(losses)
    optimizers = (trainer.optimizer, *labels.optimizers)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    gradient_norm = torch.nn.utils.clip_grad_norm_(backbone.parameters(), config.optim.clip)
    trainer.set_schedules()
    numbers = {task.kind: task.train.count - 1 for task in labels.feedback}
    batches = "; ".join(task.train_stream.describe(numbers[task.kind]) for task in labels.feedback)
    for optimizer in optimizers:
        trainer.guard.watch(
            optimizer,
            lambda bad: f"step {step}: {bad} not finite; nothing was applied. {batches}. Lower optim.lr",
            loss=loss,
            gradient_norm=gradient_norm,
        )
    for optimizer in optimizers:
        trainer.guard.step(optimizer)
    trainer.update_teacher()
    trainer.meters.add(loss=loss, **losses, gradient_norm=gradient_norm)
