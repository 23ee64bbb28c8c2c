"""The feedback's loss on the scope's parameters: its gradient, and where it would take a copy of them.

The trunk, up to the scope's first layer, runs once a batch and without a graph; the tail in full precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dino_value.language.learner import Cut, Learner
from dino_value.language.stream import Batch
from dino_value.language.targets import negative_log_probs
from dino_value.value import Gradient, Shadow, lookahead


class Entered(NamedTuple):
    """A feedback batch as it enters the scope."""

    cut: Cut
    counted: Tensor
    """[T], the answers' positions in the flattened batch."""
    labels: Tensor
    """[T 1], their tokens."""


@torch.no_grad()
def enter(learner: Learner, batch: Batch) -> Entered:
    cut = learner.run(batch).cut
    hidden = cut.hidden.float() if cut.hidden.is_floating_point() else cut.hidden
    return Entered(cut._replace(hidden=hidden), batch.counted, batch.labels.flatten()[batch.counted, None])


def answer_losses(learner: Learner, parameters: dict[str, Tensor], entered: Entered, chunk: int) -> Tensor:
    """−log p of the answers' tokens [T] at the values `parameters` of θ_S."""
    found: Tensor = learner.at(parameters, token_losses, entered.cut, entered.counted, entered.labels, chunk)
    return found.squeeze(1)


def token_losses(learner: Learner, cut: Cut, counted: Tensor, ids: Tensor, chunk: int) -> Tensor:
    """−log p of `ids` [T K] at the `counted` positions, from the scope's first layer on."""
    return negative_log_probs(learner.finish(cut).flatten(0, 1)[counted], learner.head, ids, chunk)


def answer_gradient(
    learner: Learner, batch: Batch, chunk: int, loss: Callable[[Tensor], Tensor] = torch.mean
) -> tuple[Gradient, Tensor]:
    """∇_{θ_S} of `loss` of the answer tokens' −log p [T], and that loss; detached."""
    entered = enter(learner, batch)
    leaves = {name: value.requires_grad_() for name, value in learner.parameters_in_scope().items()}
    with torch.enable_grad(), full_precision(entered.cut.hidden):
        total = loss(answer_losses(learner, leaves, entered, chunk))
        gradient = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return list(gradient), total.detach()


def look_ahead(learner: Learner, batches: Sequence[Batch], steps: int, lr: float, optimizer: str, chunk: int) -> Shadow:
    """Where the answers of `batches`, taken in turn, lead a copy of θ_S in so many steps; θ stays as it is.

    All batches are kept as they enter the scope, so that each runs through the trunk once.
    """
    entered = [enter(learner, batch) for batch in batches]

    def loss(step: int, parameters: dict[str, Tensor]) -> Tensor:
        return answer_losses(learner, parameters, entered[step % len(entered)], chunk).mean()

    with full_precision(entered[0].cut.hidden):
        losses = [functools.partial(loss, step) for step in range(steps)]
        return lookahead(losses, learner.parameters_in_scope(), lr=lr, optimizer=optimizer)


def full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast off on the device of `tensor`."""
    return torch.autocast(tensor.device.type, enabled=False)
