"""The steps that the loop calls: small functions, shapes in their signatures. B images, 2 global and N local views."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dino_value.backbones import Backbone, Hidden
from dino_value.config import DesignerConfig
from dino_value.data.sampling import generator
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


def ssl_loss(student: Learner, views: Views, loss: DINOLoss, targets: Tensor) -> Tensor:
    """L_pre on detached views: a scalar."""
    return loss(student(*views).unflatten(0, (-1, views.batch)), targets)


class SSLTask:
    """How L_pre depends on φ and on θ_S (contract of `dino_value.value`): views → masks → student trunk → tail → loss.

    Both learners' parameters are constants of the trunk, and all but S of the tail: no graph ever reaches θ.
    """

    def __init__(
        self,
        student: Learner,
        teacher: Learner,
        loss: DINOLoss,
        temperature: float,
        designer: nn.Module,
        views: Views,
        config: DesignerConfig,
        scope: Scope,
        seed: int,
    ) -> None:
        self.student, self.teacher, self.loss, self.temperature = student, teacher, loss, temperature
        self.designer, self.views, self.config, self.scope, self.seed = designer, views, config, scope, seed
        self.masks: Tensor | None = None
        self._shapes: list[tuple[Tensor | None, tuple[int, int]]] = []
        self._backbone = {name: value.detach() for name, value in student.backbone.named_parameters()}
        self._head = {name: value.detach() for name, value in student.head.named_parameters()}
        self._teacher = {name: value.detach() for name, value in teacher.named_parameters()}

    def trunk(self) -> tuple[Tensor, ...]:
        """(student states at the scope's first block, one a crop size; teacher targets [2 B K])."""
        designed, self.masks = design_views(self.designer, self.views, self.config, self.seed)
        seen = designed.large if self.config.teacher_views == "masked" else self.views.large
        with torch.set_grad_enabled(self.config.through_teacher and torch.is_grad_enabled()):
            logits = functional_call(self.teacher, self._teacher, (seen,)).unflatten(0, (2, -1))
            targets = self.loss.targets(logits, self.temperature)
        states = [
            functional_call(self.student.backbone, self._backbone, (group,), {"stop": self.scope.start})
            for group in designed
            if len(group)
        ]
        self._shapes = [(state.rope, state.grid) for state in states]
        return (*(state.tokens for state in states), targets)

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        """The DINO loss, pure in `parameters`."""
        *states, targets = hidden
        weights = {**self._backbone, **parameters}
        cls = [
            functional_call(self.student.backbone, weights, (Hidden(tokens, *shape),), {"start": self.scope.start}).cls
            for tokens, shape in zip(states, self._shapes, strict=True)
        ]
        logits = functional_call(self.student.head, self._head, (torch.cat(cls),))
        return self.loss(logits.unflatten(0, (-1, self.views.batch)), targets)


def update_teacher(student: Learner, teacher: Learner, momentum: float) -> None:
    """The teacher's moving average, parameters only: a ViT has no running statistics."""
    update_ema(teacher.parameters(), student.parameters(), momentum)
