"""The steps that the loop calls: small functions, shapes in their signatures. B images, 2 global and N local views."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dino_value.config import Config, DesignerConfig, ViewsConfig
from dino_value.data.sampling import generator
from dino_value.data.views import augment
from dino_value.designers import fill_in, learned_views
from dino_value.distributed.fsdp import shares
from dino_value.distributed.shards import WHOLE, BatchShard
from dino_value.errors import UserError
from dino_value.models.backbone import Backbone, Hidden
from dino_value.models.learner import Learner
from dino_value.objectives.ijepa import IJEPA, PredictorSizes
from dino_value.objectives.interface import Draw, LossTerms, Objective, State
from dino_value.objectives.self_distillation import IBOT, Gram, HeadSizes, SelfDistillation
from dino_value.training.optim import update_ema
from dino_value.value import Scope


def build_objective(config: Config, backbone: Backbone, device: torch.device) -> Objective:
    """The configured objective, on `device`, for a backbone that it can train.

    Raises:
        UserError: the backbone cannot have patches hidden, or I-JEPA's blocks do not fit its grid.
    """
    return OBJECTIVES[config.objective.name](config, backbone).to(device)


def build_dino(config: Config, backbone: Backbone) -> Objective:
    """DINO, with what DINOv2 and DINOv3 add to it."""
    c, i, g = config.objective, config.objective.ibot, config.objective.gram
    if i.weight > 0:
        check_hiding(backbone, config.views.global_size)
    return SelfDistillation(
        HeadSizes(c.out_dim, c.hidden_dim, c.bottleneck_dim, c.batch_norm),
        c.student_temp,
        c.center_momentum,
        c.sinkhorn_iterations if c.centering == "sinkhorn" else 0,
        c.koleo,
        IBOT(i.weight, i.mask_probability, i.mask_ratio, i.separate_head),
        Gram(g.weight, g.start, g.refresh, g.level, g.negatives, g.normalise),
        backbone,
    )


def build_ijepa(config: Config, backbone: Backbone) -> Objective:
    """I-JEPA."""
    j, size = config.objective.ijepa, config.views.global_size
    check_hiding(backbone, size)
    blocks = {
        "targets": j.targets,
        "target_scale": j.target_scale,
        "target_aspect": j.target_aspect,
        "context_scale": j.context_scale,
        "least": j.context_least,
    }
    objective = IJEPA(PredictorSizes(j.width, j.depth, j.heads), blocks, j.beta)
    check_blocks(objective, size, backbone.patch_size)
    return objective


OBJECTIVES: dict[str, Callable[[Config, Backbone], Objective]] = {"dino": build_dino, "ijepa": build_ijepa}
"""name -> function of (configuration, backbone). To add one: a file in objectives/, and a line here."""


@torch.no_grad()
def check_hiding(backbone: Backbone, size: int) -> None:
    """Raises:
    UserError: what enters the backbone's blocks is not one token for each patch of the image.
    """
    shapes: list[torch.Size] = []

    def seen(tokens: Tensor) -> Tensor:
        shapes.append(tokens.shape)
        return tokens

    images = torch.zeros(1, backbone.channels, size, size, device=next(backbone.parameters()).device)
    entered = backbone(images, stop=0, replace=seen).tokens.shape[1] - backbone.num_prefix_tokens
    patches = (size // backbone.patch_size) ** 2
    if entered != patches or shapes[0][1:-1].numel() != patches:
        raise UserError(
            f"backbone.name={backbone.name} cannot have patches hidden, as objective.ibot and objective.name=ijepa "
            f"need: {entered} patch tokens enter its blocks where the image has {patches}; choose a plain vit_* model, "
            "without patch_drop_rate"
        )


def check_blocks(objective: IJEPA, size: int, patch_size: int, draws: int = 100) -> None:
    """Raises:
    UserError: I-JEPA's blocks leave no context on this grid.
    """
    images = torch.empty(2, 3, size, size, device="meta")
    try:
        for number in range(draws):
            objective.draw(images, patch_size, generator(0, "try blocks", number))
    except ValueError as error:
        raise UserError(f"objective.ijepa with views.global_size={size}: {error}") from None


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

    def part(self, part: BatchShard) -> Views:
        """The views of a part of the images."""
        return Views(part.rows(self.large, 2), part.rows(self.small, len(self.small) // self.batch))


def make_views(
    backbone: Backbone,
    crops: tuple[Tensor, ...],
    settings: ViewsConfig,
    device: torch.device,
    seed: int,
    name: str,
    number: int,
    part: BatchShard = WHOLE,
) -> Views:
    """Augmented, normalised views of batch `number` of a stream; crops, of a part of it, are uint8 [2 B 3 H W] and
    [N B 3 h w]."""
    large, small = (group.to(device, non_blocking=True) for group in crops)
    with torch.autocast(device.type, enabled=False):
        return Views(
            *(backbone.normalise(group) for group in augment(large, small, settings, seed, name, number, part=part))
        )


def design(
    designer: nn.Module, views: Tensor, config: DesignerConfig, seed: int, part: BatchShard = WHOLE, count: int = 2
) -> tuple[Tensor, Tensor]:
    """Learned views [n 3 H W], `count` of each image of a part of the batch, and their masks [n 1 H W]; with φ's graph
    unless called under no_grad."""
    with torch.autocast(views.device.type, enabled=False):  # small, and its gradient is: float32 throughout
        masks = designer(views)
        with torch.no_grad():
            fill = fill_in(views, config.fill, config.blur_sigma, generator(seed, "fill"), part, count)
        return learned_views(views, masks, fill), masks


def design_views(
    designer: nn.Module, views: Views, config: DesignerConfig, seed: int, part: BatchShard = WHOLE
) -> tuple[Views, Tensor]:
    """The learned views of a batch, and the masks [2B 1 H W] of its global crops; local crops only when asked."""
    large, masks = design(designer, views.large, config, seed, part)
    small = views.small
    if config.crops == "all" and len(small):
        small, _ = design(designer, small, config, seed + 1, part, len(small) // views.batch)
    return Views(large, small), masks


@contextlib.contextmanager
def constant(*modules: nn.Module) -> Iterator[None]:
    """Parameters without gradients, so that no graph reaches them.

    Backward passes through such a graph belong inside too: activation checkpointing runs its blocks again there, and
    must find them as they were.
    """
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Without stochastic depth, which would make every pass, and both ends of a difference, another function."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


class Tail(nn.Module):
    """Functions of the student at other values of θ_S; everything else about it is constant."""

    def __init__(self, student: Learner) -> None:
        super().__init__()
        self.student = student
        self._constants = {f"student.{name}": value.detach() for name, value in student.named_parameters()}

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.student, *arguments)

    def at(self, parameters: dict[str, Tensor], function: Callable[..., Any], *arguments: Any) -> Any:
        """function(student, *arguments), with `parameters` of its backbone in place of its own."""
        moved = {f"student.backbone.{name}": value for name, value in parameters.items()}
        return functional_call(self, {**self._constants, **moved}, (function, *arguments))


class SSLTask:
    """How L_pre depends on φ and on θ_S (contract of `dino_value.value`): views → masks → student trunk → tail → loss.

    Both learners' parameters are constants of the trunk, and all but S of the tail: no graph ever reaches θ. Without a
    `designer` the views are seen as they are. `weigh`, if it is set, gives the loss's terms constant weights, from
    (states, targets, draw), and `move` other targets, from (states, predictions, targets, draw). What is random about
    masks and objective follows from `seed`, for all of the batch of which
    `views` are a `part`.
    """

    def __init__(
        self,
        student: Learner,
        teacher: Learner,
        loss: Objective,
        temperature: float,
        designer: nn.Module | None,
        views: Views,
        config: DesignerConfig,
        scope: Scope,
        seed: int,
        part: BatchShard = WHOLE,
    ) -> None:
        self.student, self.teacher, self.loss, self.temperature = student, teacher, loss, temperature
        self.part = part
        self.designer, self.views, self.config, self.scope, self.seed = designer, views, config, scope, seed
        self.draw: Draw = loss.draw(views.large, student.backbone.patch_size, generator(seed, "objective"), part)
        self.masks: Tensor | None = None
        self.weigh: Callable[[Sequence[State], LossTerms, Draw], LossTerms | None] | None = None
        self.move: Callable[[Sequence[State], LossTerms, LossTerms, Draw], LossTerms] | None = None
        self._weights: LossTerms | None = None
        self._cuts: list[tuple[Tensor | None, tuple[int, int]] | None] = []
        self._targets: list[str] = []
        self._tail = Tail(student)

    def trunk(self) -> tuple[Tensor, ...]:
        """Student states at the scope's first block, one a crop size, and then the targets."""
        designed = self.views
        if self.designer is not None:
            designed, self.masks = design_views(self.designer, self.views, self.config, self.seed, self.part)
        seen = designed.large if self.config.teacher_views == "masked" else self.views.large
        with constant(self.student, self.teacher):
            with torch.set_grad_enabled(self.config.through_teacher and torch.is_grad_enabled()):
                targets, _ = self.loss.teach(self.teacher, seen, self.temperature, self.draw)
            states = self.loss.states(self.student, designed, self.scope.start, self.draw)
        if self.move is not None:
            with torch.no_grad():
                said = self.loss.predict(self.student, states, self.scope.start, self.draw)
                targets = self.move(states, said, targets, self.draw)
        if self.weigh is not None:
            self._weights = self.weigh(states, targets, self.draw)
        self._targets = list(targets)
        self._cuts = [None if isinstance(state, Tensor) else (state.rope, state.grid) for state in states]
        return (*(state if isinstance(state, Tensor) else state.tokens for state in states), *targets.values())

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        """The loss, pure in `parameters`."""
        return self._loss(hidden, parameters, len(self._cuts), self._weights)

    def reached(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        """The part of the loss that φ reaches: what is about the global crops alone, where φ leaves the local ones and
        the targets as they are, and images do not meet in the head's batch norm; else all of the loss."""
        small = len(self._cuts) > 1
        mixed = self._weights is not None or any(isinstance(m, nn.BatchNorm1d) for m in self.student.head.modules())
        if not small or mixed or any(state.requires_grad for state in hidden[1:]):
            return self.tail(hidden, parameters)
        return self._loss(hidden, parameters, 1, views=2 + len(self.views.small) // self.views.batch)

    def _loss(
        self,
        hidden: tuple[Tensor, ...],
        parameters: dict[str, Tensor],
        groups: int,
        weights: LossTerms | None = None,
        views: int | None = None,
    ) -> Tensor:
        """From the first `groups` of the student's states."""
        tokens = zip(hidden[:groups], self._cuts, strict=False)
        states = [part if cut is None else Hidden(part, *cut) for part, cut in tokens]
        targets = dict(zip(self._targets, hidden[len(self._cuts) :], strict=True))
        terms = self._tail.at(parameters, self.loss.losses, states, targets, self.scope.start, self.draw)
        return self.loss.total(self.loss.parts(terms, self.draw, weights, views))


def update_teacher(student: Learner, teacher: Learner, momentum: float) -> None:
    """The teacher's moving average, parameters only: a ViT has no running statistics."""
    update_ema(shares(teacher.parameters()), shares(student.parameters()), momentum)
