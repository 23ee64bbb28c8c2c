"""Feedback: labelled pools, the heads fitted on one half of them, and the downstream gradient from the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from dino_value.backbones import Backbone, Hidden
from dino_value.config import Config, TaskConfig
from dino_value.data.labelled import LabelledDataset, LabelledSource, Layout, open_labelled, split_by_group
from dino_value.data.sampling import Cursor, Stream, key
from dino_value.errors import UserError
from dino_value.heads import LinearBNDepthHead, build_head, depth_loss, feature_map, segmentation_loss
from dino_value.optim import FiniteGuard
from dino_value.value import Gradient, Scope
from dino_value.value.engines import full, full_precision

LAYOUTS: dict[str, Layout] = {"seg": "ade20k", "depth": "nyuv2"}


class FeedbackTask:
    """One kind of label: a head, its optimizer, and two streams that share no image and no group of images."""

    def __init__(
        self, kind: str, source: LabelledSource, settings: TaskConfig, config: Config, dim: int, device: torch.device
    ) -> None:
        self.kind, self.weight, self.source = kind, settings.weight, source
        self.train_indices, self.meta_indices = split_by_group(source, (settings.train, settings.meta), config.seed)
        self.head = build_head(f"{kind}_{settings.head}", dim, source.num_classes)
        size = (config.feedback.size, config.feedback.size)
        workers = 0 if config.data.in_memory else min(1, config.data.workers)

        def stream(name: str, indices: list[int]) -> Stream:
            data = LabelledDataset(source, indices, size=size, flip=True)
            return Stream(data, config.feedback.batch_size, config.seed, f"feedback {kind} {name}", workers)

        self.train_stream, self.meta_stream = stream("train", self.train_indices), stream("meta", self.meta_indices)
        if isinstance(
            self.head, LinearBNDepthHead
        ):  # from the mean depth, which would take thousands of steps to learn
            depths = self.train_stream.batch(0)[1]
            if (depths > 0).any():
                self.head.start_at(float(depths[depths > 0].mean()))
        self.head.to(device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=config.feedback.lr, fused=True)
        self.train, self.meta = Cursor(self.train_stream), Cursor(self.meta_stream)

    def loss(self, patches: Tensor, grid: tuple[int, int], labels: Tensor) -> Tensor:
        """L_down: cross-entropy (seg) or L1 in metres (depth), from patch features [B N D]."""
        predicted = self.head(feature_map(patches, grid))
        return segmentation_loss(predicted, labels) if self.kind == "seg" else depth_loss(predicted, labels)

    def state_dict(self) -> dict[str, Any]:
        return {
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "train": self.train.count,
            "meta": self.meta.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.train.seek(state["train"])
        self.meta.seek(state["meta"])


def open_feedback(config: Config, dim: int, device: torch.device) -> list[FeedbackTask]:
    """A task for each labelled set that the configuration names; head weights follow from the run's seed.

    Raises:
        UserError: unreadable data, or fewer labelled images than asked for.
    """
    tasks = []
    paths = {"seg": config.data.ade20k, "depth": config.data.nyuv2}
    for kind, path in paths.items():
        settings: TaskConfig = getattr(config.feedback, kind)
        if path is None or settings.weight == 0:
            continue
        source = open_labelled(
            LAYOUTS[kind],
            path,
            "training",
            group_pattern=config.data.group_pattern if kind == "seg" else None,
            neighbours=config.data.neighbours,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(config.seed, "head", kind))
            task = FeedbackTask(kind, source, settings, config, dim, device)
        tasks.append(task)
    if not tasks:
        raise UserError("no feedback left: give feedback.seg.weight or feedback.depth.weight a value above 0")
    return tasks


def fit_head(task: FeedbackTask, backbone: Backbone, device: torch.device, guard: FiniteGuard) -> Tensor:
    """One step of the head on a head-train batch, the backbone frozen; returns the loss, detached."""
    images, labels = (part.to(device, non_blocking=True) for part in task.train.next())
    number = task.train.count - 1
    with torch.no_grad():
        features = backbone(backbone.normalise(images))
    task.head.train()
    with torch.autocast(device.type, enabled=False):
        loss = task.loss(features.patches.float(), features.grid, labels)
    task.optimizer.zero_grad()
    loss.backward()

    def message(bad: str) -> str:
        return f"{bad} not finite; nothing was applied. {task.train_stream.describe(number)}. Lower feedback.lr"

    guard.watch(task.optimizer, message, **{f"loss_{task.kind}": loss})
    guard.step(task.optimizer)
    return loss.detach()


def downstream_gradient(
    task: FeedbackTask, backbone: Backbone, scope: Scope, device: torch.device
) -> tuple[Gradient, Tensor]:
    """g_down of one task on S from a meta batch, and the loss; both detached. The head is in inference mode."""
    images, labels = (part.to(device, non_blocking=True) for part in task.meta.next())
    with torch.no_grad():
        hidden = backbone(backbone.normalise(images), stop=scope.start)
    task.head.eval()
    leaves = {name: value.requires_grad_() for name, value in scope.parameters(backbone).items()}
    with full_precision((hidden.tokens,)):
        (tokens,) = full((hidden.tokens,))
        state = Hidden(tokens, hidden.rope, hidden.grid)
        features = functional_call(backbone, leaves, (state,), {"start": scope.start})
        loss = task.loss(features.patches, features.grid, labels)
    return list(torch.autograd.grad(loss, list(leaves.values()))), loss.detach()
