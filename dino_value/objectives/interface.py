"""What training and the value core ask of a self-supervised objective, and nothing more: neither asks which one it is.

An objective is a module of what a loss must remember (centres, a Gram teacher) beside pure functions of the student:

    begin(step, teacher)                                the Gram teacher is renewed
    draw(large, patch_size, generator) -> draw          constants of a batch: which patches are hidden
    teach(teacher, large, temperature, draw)            -> targets, and what the centres are updated with
    states(student, views, start, draw)                 -> the student's states where the value core cuts it
    predict(student, states, start, draw)               -> what the student says, by part
    move(targets, here, there, mover)                   -> targets that a designer has moved, if there is one
    terms_of(predictions, targets)                      -> every term of the loss, by part
    parts(terms, draw, weights) -> total(parts)         linear in the terms, and in their weights
    update(logits)                                      after the step: the centres

B images, each with two global and maybe some local views.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dino_value.distributed.shards import WHOLE, BatchShard


class Mover(Protocol):
    """How far targets go, and a record of it (`dino_value.value.Mover`)."""

    def distribution(self, part: str, q: Tensor, delta: Tensor, valid: Tensor | None = None) -> Tensor: ...

    def point(self, part: str, y: Tensor, delta: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor: ...


class Hidden(Protocol):
    """A backbone's state between two blocks (`dino_value.models.backbone.Hidden`)."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def rope(self) -> Tensor | None: ...

    def _replace(self, **changes: Any) -> Any: ...


State = Tensor | Any
"""Where a student is cut: views of one size, or the `Hidden` tokens that enter the scope's first block."""

LossTerms = dict[str, Tensor]
"""Tensors by the part of the loss that they belong to: `dino`, `ibot`, …"""

Draw = Any
"""What is drawn for a batch: masks or blocks, on the batch's device; None where nothing is."""


class Learner(Protocol):
    """A student or teacher (`dino_value.training.steps.Learner`)."""

    @property
    def backbone(self) -> Any: ...

    @property
    def head(self) -> Callable[..., Tensor]: ...

    @property
    def patch_head(self) -> Callable[..., Tensor] | None: ...

    @property
    def mask_token(self) -> Callable[..., Tensor] | None: ...


class Objective(nn.Module, abc.ABC):
    """A self-supervised loss; see the module's text for the order of its calls."""

    center: Tensor | None
    """Of the prototypes, for the log; None where there are none."""

    @abc.abstractmethod
    def heads(self, dim: int) -> dict[str, nn.Module]:
        """New heads for a backbone of width `dim`, by their names in `dino_value.training.steps.Learner`."""

    @abc.abstractmethod
    def begin(self, step: int, teacher: Learner) -> None:
        """Before learner step `step`; a second call at the same step changes nothing."""

    @abc.abstractmethod
    def draw(self, large: Tensor, patch_size: int, generator: torch.Generator, part: BatchShard = WHOLE) -> Draw:
        """What is random about the loss on global views [2B 3 H W], a part of the batch; follows from the (CPU)
        generator alone, which draws for all of the batch."""

    @abc.abstractmethod
    def cut(self, targets: LossTerms, draw: Draw, part: BatchShard) -> tuple[LossTerms, Draw]:
        """What `teach` and `draw` gave, for a part of their images."""

    @abc.abstractmethod
    def teach(self, teacher: Learner, large: Tensor, temperature: float, draw: Draw) -> tuple[LossTerms, LossTerms]:
        """Global views [2B 3 H W] to targets, with a graph where gradients are enabled, and to `update`'s logits."""

    @abc.abstractmethod
    def states(self, student: Learner, views: Sequence[Tensor], start: int | None, draw: Draw) -> list[State]:
        """(large, small) views to states as they enter block `start`, one a crop size, global views first; the views
        themselves where `start` is None."""

    @abc.abstractmethod
    def predict(self, student: Learner, states: Sequence[State], start: int | None, draw: Draw) -> LossTerms:
        """Onward from `states`, all of them or those of the global views alone, to what `targets` are compared with."""

    @abc.abstractmethod
    def terms_of(self, predictions: LossTerms, targets: LossTerms) -> LossTerms:
        """The terms of each part."""

    def losses(
        self, student: Learner, states: Sequence[State], targets: LossTerms, start: int | None, draw: Draw
    ) -> LossTerms:
        """Onward from `states` to the terms of each part."""
        return self.terms_of(self.predict(student, states, start, draw), targets)

    @abc.abstractmethod
    def move(self, targets: LossTerms, here: LossTerms, there: LossTerms, mover: Mover) -> LossTerms:
        """The targets, moved by how the student's predictions change from `here` to `there`, detached. Regularisers
        have none to move. A cut of a batch (`cut`) comes before this, never after."""

    @abc.abstractmethod
    def weighable(self, terms: LossTerms) -> dict[str, Tensor | None]:
        """The parts whose terms may be given weights, each with which of its terms count (bool; None: all)."""

    @abc.abstractmethod
    def parts(
        self, terms: LossTerms, draw: Draw, weights: LossTerms | None = None, views: int | None = None
    ) -> LossTerms:
        """The loss's parts, scalars; linear in the terms and in their weights, which are 1 where there are none.

        Args:
            views: how many the student sees, if `terms` are of the two global ones alone.
        """

    @abc.abstractmethod
    def total(self, parts: LossTerms) -> Tensor:
        """The loss: the parts, each times its setting."""

    @abc.abstractmethod
    def update(self, logits: LossTerms) -> None:
        """After the step whose `teach` gave `logits`."""

    @abc.abstractmethod
    def watch(self, targets: LossTerms) -> LossTerms:
        """Scalars that tell of collapse, for the log."""
