"""The steps that the loop calls: small functions, shapes in their signatures. B images, 2 global and N local views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dino_value.backbones import Backbone, Hidden
from dino_value.config import DesignerConfig, ViewsConfig
from dino_value.data.sampling import generator
from dino_value.data.views import augment
from dino_value.designers import fill_in, learned_views
from dino_value.objectives.dino import DINOHead, DINOLoss
from dino_value.optim import update_ema
from dino_value.value import Scope


class Learner(nn.Module):
    """Backbone and projection head: the student, and with averaged weights the teacher."""

    def __init__(self, backbone: Backbone, head: DINOHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *groups: Tensor) -> Tensor:
        """Views grouped by size, each [V_i·B 3 h w] -> logits [ΣV_i·B K]; crops of one size are one batch."""
        return self.head(torch.cat([self.backbone(group).cls for group in groups if len(group)]))


class Views(NamedTuple):
    """Normalised views, view-major: `large` [2B 3 H W] and `small` [NB 3 h w]."""

    large: Tensor
    small: Tensor

    @property
    def batch(self) -> int:
        return len(self.large) // 2

    def first(self, count: int) -> Views:
        """The views of the first `count` images."""
        return Views(*(group.unflatten(0, (-1, self.batch))[:, :count].flatten(0, 1) for group in self))


State = Tensor | Hidden
"""Where a learner is cut: views of one size, or the tokens that enter the scope's first block."""


def make_views(
    backbone: Backbone,
    crops: tuple[Tensor, ...],
    settings: ViewsConfig,
    device: torch.device,
    seed: int,
    name: str,
    number: int,
) -> Views:
    """Augmented, normalised views of batch `number` of a stream; crops are uint8 [2 B 3 H W] and [N B 3 h w]."""
    large, small = (group.to(device, non_blocking=True) for group in crops)
    with torch.autocast(device.type, enabled=False):
        return Views(*(backbone.normalise(group) for group in augment(large, small, settings, seed, name, number)))


def design(designer: nn.Module, views: Tensor, config: DesignerConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Learned views [n 3 H W] and their masks [n 1 H W]; with φ's graph unless called under no_grad."""
    with torch.autocast(views.device.type, enabled=False):  # small, and its gradient is: float32 throughout
        masks = designer(views)
        with torch.no_grad():
            fill = fill_in(views, config.fill, config.blur_sigma, generator(seed, "fill"))
        return learned_views(views, masks, fill), masks


def design_views(designer: nn.Module, views: Views, config: DesignerConfig, seed: int) -> tuple[Views, Tensor]:
    """The learned views of a batch, and the masks [2B 1 H W] of its global crops; local crops only when asked."""
    large, masks = design(designer, views.large, config, seed)
    small = views.small
    if config.crops == "all" and len(small):
        small, _ = design(designer, small, config, seed + 1)
    return Views(large, small), masks


@torch.no_grad()
def teacher_targets(teacher: Learner, large: Tensor, loss: DINOLoss, temperature: float) -> tuple[Tensor, Tensor]:
    """Global views [2B 3 H W] to targets [2 B K], and the logits that the centre is updated with."""
    logits = teacher(large).unflatten(0, (2, -1))
    return loss.targets(logits, temperature), logits


def student_states(student: Learner, views: Views, start: int | None) -> list[State]:
    """The student's states as they enter block `start`, one a crop size; the views themselves where `start` is None."""
    groups = [group for group in views if len(group)]
    return list(groups) if start is None else [student.backbone(group, stop=start) for group in groups]


def student_logits(student: Learner, states: Sequence[State], start: int | None, batch: int) -> Tensor:
    """Onward from `student_states` to logits [V B K]."""
    cls = torch.cat([student.backbone(state, start=start or 0).cls for state in states])
    return student.head(cls).unflatten(0, (-1, batch))


class Tail:
    """The student from `student_states` on, as a function of θ_S alone; everything else is constant."""

    def __init__(self, student: Learner, scope: Scope, batch: int) -> None:
        self.student, self.scope, self.batch = student, scope, batch
        self._backbone = {name: value.detach() for name, value in student.backbone.named_parameters()}
        self._head = {name: value.detach() for name, value in student.head.named_parameters()}

    def logits(self, states: Sequence[State], parameters: Mapping[str, Tensor]) -> Tensor:
        """[V B K] at other values of θ_S."""
        weights = {**self._backbone, **parameters}
        start = {"start": self.scope.start or 0}
        cls = [functional_call(self.student.backbone, weights, (state,), start).cls for state in states]
        return functional_call(self.student.head, self._head, (torch.cat(cls),)).unflatten(0, (-1, self.batch))


class SSLTask:
    """How L_pre depends on φ and on θ_S (contract of `dino_value.value`): views → masks → student trunk → tail → loss.

    Both learners' parameters are constants of the trunk, and all but S of the tail: no graph ever reaches θ. Without a
    `designer` the views are seen as they are. `weigh`, if it is set, gives the loss's terms constant weights.
    """

    def __init__(
        self,
        student: Learner,
        teacher: Learner,
        loss: DINOLoss,
        temperature: float,
        designer: nn.Module | None,
        views: Views,
        config: DesignerConfig,
        scope: Scope,
        seed: int,
    ) -> None:
        self.student, self.teacher, self.loss, self.temperature = student, teacher, loss, temperature
        self.designer, self.views, self.config, self.scope, self.seed = designer, views, config, scope, seed
        self.masks: Tensor | None = None
        self.weigh: Callable[[Sequence[State], Tensor], Tensor | None] | None = None
        self._weights: Tensor | None = None
        self._cuts: list[tuple[Tensor | None, tuple[int, int]] | None] = []
        self._backbone = {name: value.detach() for name, value in student.backbone.named_parameters()}
        self._teacher = {name: value.detach() for name, value in teacher.named_parameters()}
        self._tail = Tail(student, scope, views.batch)

    def trunk(self) -> tuple[Tensor, ...]:
        """(student states at the scope's first block, one a crop size; teacher targets [2 B K])."""
        designed = self.views
        if self.designer is not None:
            designed, self.masks = design_views(self.designer, self.views, self.config, self.seed)
        seen = designed.large if self.config.teacher_views == "masked" else self.views.large
        with torch.set_grad_enabled(self.config.through_teacher and torch.is_grad_enabled()):
            logits = functional_call(self.teacher, self._teacher, (seen,)).unflatten(0, (2, -1))
            targets = self.loss.targets(logits, self.temperature)
        states: list[State] = [group for group in designed if len(group)]
        if self.scope.start is not None:
            stop = {"stop": self.scope.start}
            states = [functional_call(self.student.backbone, self._backbone, (group,), stop) for group in states]
        if self.weigh is not None:
            self._weights = self.weigh(states, targets)
        self._cuts = [None if isinstance(state, Tensor) else (state.rope, state.grid) for state in states]
        return (*(state if isinstance(state, Tensor) else state.tokens for state in states), targets)

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        """The DINO loss, pure in `parameters`."""
        *tokens, targets = hidden
        states = [part if cut is None else Hidden(part, *cut) for part, cut in zip(tokens, self._cuts, strict=True)]
        return self.loss.mean(self.loss.terms(self._tail.logits(states, parameters), targets), self._weights)

    def reached(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        """The part of the loss that φ reaches: the terms of the global crops, where φ leaves the local ones and the
        targets as they are, and images do not meet in the head's batch norm; else all of the loss."""
        large, *small, targets = hidden
        mixed = self._weights is not None or any(isinstance(part, nn.BatchNorm1d) for part in self.student.head.mlp)
        if mixed or any(state.requires_grad for state in (*small, targets)):
            return self.tail(hidden, parameters)
        cut, views = self._cuts[0], 2 + len(self.views.small) // self.views.batch
        state = large if cut is None else Hidden(large, *cut)
        terms = self.loss.terms(self._tail.logits([state], parameters), targets)
        return self.loss.mean(terms) / (views - 1)  # both means are over 2 · (views − 1) pairs, here of two views


def update_teacher(student: Learner, teacher: Learner, momentum: float) -> None:
    """The teacher's moving average, parameters only: a ViT has no running statistics."""
    update_ema(teacher.parameters(), student.parameters(), momentum)
