"""Kinds of labels: the layout that each is read from, the features that its head reads, its loss, and what counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from dino_value.data.layouts import Layout
from dino_value.heads import IGNORE, UNKNOWN, classification_loss, depth_loss, feature_map, segmentation_loss
from dino_value.models.backbone import Features


class LabelKind(NamedTuple):
    """One kind of label; its settings are the section of `feedback` of the same name."""

    layout: Layout
    part: str
    """Which of the features the head reads: `patches` or `cls`."""
    read: Callable[[Features], Tensor]
    """Features to what the head reads."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """The head's output and labels [B …] to a scalar, the mean over what counts."""
    counts: Callable[[Tensor], Tensor]
    """Labels to bool, which of them count."""
    blank: int
    """A label that counts for nothing."""


def _map(features: Features) -> Tensor:
    return feature_map(features.patches, features.grid)


KINDS: dict[str, LabelKind] = {
    "seg": LabelKind("ade20k", "patches", _map, segmentation_loss, lambda labels: labels != IGNORE, IGNORE),
    "depth": LabelKind("nyuv2", "patches", _map, depth_loss, lambda labels: labels > 0, 0),
    "classes": LabelKind(
        "imagefolder", "cls", lambda seen: seen.cls, classification_loss, lambda labels: labels != UNKNOWN, UNKNOWN
    ),
}
