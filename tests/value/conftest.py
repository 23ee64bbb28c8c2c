"""A DINO task small enough to write out in plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dino_value.config import DesignerConfig
from dino_value.data.sampling import generator as keyed
from dino_value.designers import UNetDesigner, fill_in
from dino_value.models.backbone import create_backbone
from dino_value.models.learner import Learner
from dino_value.objectives.self_distillation import HeadSizes, SelfDistillation
from dino_value.training.steps import SSLTask, Views
from dino_value.value import Gradient, Scope, last_blocks

TEMPERATURE, FILL_SEED = 0.05, 7
KWARGS = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
ROPE_KWARGS = {**KWARGS, "init_values": 1.0}  # its LayerScale of 1e-5 would leave the blocks without influence


@dataclass
class Problem:
    """Student, teacher, designer and a batch of 2 images, 16-pixel global and 8-pixel local views."""

    student: Learner
    teacher: Learner
    loss: SelfDistillation
    designer: nn.Module
    views: Views
    config: DesignerConfig
    scope: Scope

    def task(self) -> SSLTask:
        return SSLTask(
            self.student,
            self.teacher,
            self.loss,
            TEMPERATURE,
            self.designer,
            self.views,
            self.config,
            self.scope,
            FILL_SEED,
        )

    @property
    def phi(self) -> list[nn.Parameter]:
        return list(self.designer.parameters())

    @property
    def theta(self) -> dict[str, Tensor]:
        """θ_S, detached."""
        return self.scope.parameters(self.student.backbone)

    def direction(self) -> Gradient:
        """A stand-in for g_down."""
        rng = torch.Generator().manual_seed(3)
        return [
            torch.randn(value.shape, generator=rng, dtype=torch.float64).to(value.dtype)
            for value in self.theta.values()
        ]

    def take_phi_gradient(self) -> Gradient:
        """φ's .grad; leaves None behind."""
        found = [parameter.grad for parameter in self.phi if parameter.grad is not None]
        assert len(found) == len(self.phi)
        for parameter in self.phi:
            parameter.grad = None
        return found

    def plain_gradient(self) -> Gradient:
        """g_pre(φ) with its graph to φ, written out: no trunk, no tail, no engine."""
        leaves = {name: value.requires_grad_() for name, value in self.theta.items()}

        def masked(views: Tensor, seed: int) -> Tensor:
            mask = self.designer(views)
            fill = fill_in(views, self.config.fill, self.config.blur_sigma, keyed(seed, "fill"))
            return mask * views + (1 - mask) * fill

        large = masked(self.views.large, FILL_SEED)
        every = self.config.crops == "all"
        small = masked(self.views.small, FILL_SEED + 1) if every and len(self.views.small) else self.views.small
        seen = large if self.config.teacher_views == "masked" else self.views.large
        targets = torch.softmax((self.teacher(seen) - self.loss.center) / TEMPERATURE, dim=-1)
        if not self.config.through_teacher:
            targets = targets.detach()

        groups = [large, small] if len(small) else [large]
        cls = [functional_call(self.student.backbone, leaves, (group,)).cls for group in groups]
        outputs = self.student.head(torch.cat(cls))
        batch = self.views.batch
        terms = []
        for teacher_view in range(2):
            for student_view in range(len(outputs) // batch):
                if student_view == teacher_view:
                    continue
                for image in range(batch):
                    target = targets[teacher_view * batch + image]
                    predicted = torch.log_softmax(outputs[student_view * batch + image] / 0.1, dim=-1)
                    terms.append(-(target * predicted).sum())
        return list(torch.autograd.grad(torch.stack(terms).mean(), list(leaves.values()), create_graph=True))


def make_problem(
    dtype: torch.dtype = torch.float64,
    model: str = "vit_tiny_patch16_224",
    local: int = 2,
    batch_norm: bool = False,
    **config: object,
) -> Problem:
    """The same numbers in every `dtype`."""
    torch.manual_seed(0)
    backbone = create_backbone(model, 16, ROPE_KWARGS if "dinov3" in model else KWARGS)
    backbone.set_attention("math")  # the reference differentiates twice
    loss = SelfDistillation(HeadSizes(out_dim=12, hidden_dim=16, bottleneck_dim=8, batch_norm=batch_norm))
    student = Learner(backbone, **loss.heads(backbone.embed_dim))
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in [*student.parameters(), *teacher.parameters()]:  # away from the symmetric start
            parameter.add_(0.05 * torch.randn_like(parameter))
    loss.center.normal_(std=0.1)
    designer = UNetDesigner(width=4, depth=1, keep_ratio=0.6)
    nn.init.normal_(designer.out.weight, std=0.5)
    views = Views(torch.randn(4, 3, 16, 16).to(dtype), torch.randn(2 * local, 3, 8, 8).to(dtype))
    settings = DesignerConfig(blur_sigma=2.0, **config)  # type: ignore[arg-type]
    for module in (student, teacher, loss, designer):
        module.to(dtype)
    return Problem(student, teacher.requires_grad_(False), loss, designer, views, settings, last_blocks(backbone, 2))


@pytest.fixture
def problem() -> Callable[..., Problem]:
    return make_problem
