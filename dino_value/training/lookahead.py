"""The lookahead direction of labelled images: a shadow of θ_S, and copies of the heads, trained on their batches."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dino_value.config import Config
from dino_value.data.sampling import generator
from dino_value.distributed.group import gather
from dino_value.errors import refusing
from dino_value.models.backbone import Backbone, Features
from dino_value.objectives.interface import State
from dino_value.seeds import exchange
from dino_value.training.feedback import FeedbackTask, never_empty
from dino_value.value import Gradient, Scope, Shadow, contrast, lookahead, norm


class Labelled(NamedTuple):
    """A labelled batch as it enters the scope, without a graph, and its labels."""

    state: State
    labels: Tensor


def look_ahead(
    tasks: Sequence[FeedbackTask],
    backbone: Backbone,
    scope: Scope,
    config: Config,
    number: int,
    device: torch.device,
) -> tuple[Gradient, dict[str, Tensor]]:
    """u of all tasks together, each with its weight, and what to log of it: the losses where it began, the weighted sum
    of them on the first batch before and after, ‖u‖.

    Every process looks at the whole of each batch: the batch norm of the heads sees it all, and the shadows are equal.
    The heads that the tasks keep do not change.

    Args:
        number: of the lookahead; labels are shuffled anew for each.
    """
    settings = config.value.lookahead
    steps, count = settings.steps, settings.batches or settings.steps
    batches = [[labelled_state(task, backbone, scope, device) for _ in range(min(count, steps))] for task in tasks]
    run = functools.partial(_run, tasks, backbone, scope, config)
    shadow, found = run(batches)
    u = shadow.u
    if settings.contrast:
        drawn = generator(config.seed, "contrast", number)
        u = contrast(u, run([shuffled(part, drawn) for part in batches])[0].u)
    found |= {"lookahead_before": shadow.before, "lookahead_after": shadow.after, "lookahead_norm": norm(u)}
    return u, found


def _run(
    tasks: Sequence[FeedbackTask],
    backbone: Backbone,
    scope: Scope,
    config: Config,
    batches: Sequence[Sequence[Labelled]],
) -> tuple[Shadow, dict[str, Tensor]]:
    settings = config.value.lookahead
    heads = [copy.deepcopy(task.head).requires_grad_(True).train() for task in tasks]
    first: dict[str, Tensor] = {}

    def loss(step: int, parameters: dict[str, Tensor]) -> Tensor:
        losses = []
        for task, head, part in zip(tasks, heads, batches, strict=True):
            one = labelled_loss(task, head, part[step % len(part)], backbone, scope, parameters)
            first.setdefault(f"loss_{task.kind}", one.detach())
            losses.append(task.weight * one)
        return torch.stack(losses).sum()

    with refusing("value.lookahead"):
        shadow = lookahead(
            [functools.partial(loss, step) for step in range(settings.steps)],
            scope.parameters(backbone),
            [parameter for head in heads for parameter in head.parameters()],
            lr=config.optim.lr if settings.lr is None else settings.lr,
            heads_lr=config.feedback.lr,
            optimizer=settings.optimizer,
        )
    return shadow, first


@torch.no_grad()
def labelled_state(task: FeedbackTask, backbone: Backbone, scope: Scope, device: torch.device) -> Labelled:
    """The next head-train batch, all of it, up to the scope."""
    images, labels = (part.to(device, non_blocking=True) for part in task.train.next())
    own, size = len(labels), task.train_stream.batch_size
    views = backbone.normalise(never_empty(task, images, labels)[0])
    labels = gather(labels, size)
    if scope.start is None:
        return Labelled(gather(views[:own], size), labels)
    state = backbone(views, stop=scope.start).full()
    return Labelled(state._replace(tokens=gather(state.tokens[:own], size)), labels)


def labelled_loss(
    task: FeedbackTask,
    head: nn.Module,
    batch: Labelled,
    backbone: Backbone,
    scope: Scope,
    parameters: dict[str, Tensor],
) -> Tensor:
    """L_down of `head` at the values `parameters` of θ_S: the backbone in the learner's precision, as the shadow is
    trained and not differenced, the head in float32."""
    device = batch.labels.device.type
    # Without the cache, which would keep casts of a shadow that has moved on.
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    with torch.autocast(device, dtype, enabled, cache_enabled=False):
        features = functional_call(backbone, parameters, (batch.state,), {"start": scope.start or 0})
    with torch.autocast(device, enabled=False):
        features = Features(features.cls.float(), features.patches.float(), features.grid)
        return task.loss(features, batch.labels, head)


def shuffled(batches: Sequence[Labelled], drawn: torch.Generator) -> list[Labelled]:
    """The same images with each other's labels, over all the batches; no place keeps its own."""
    labels = torch.cat([batch.labels for batch in batches])
    order = torch.tensor(exchange(len(labels), drawn), device=labels.device)
    parts = labels[order].split([len(batch.labels) for batch in batches])
    return [batch._replace(labels=part) for batch, part in zip(batches, parts, strict=True)]
