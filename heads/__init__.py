"""Light heads on frozen features, and their losses: for feedback (g_down passes through them) and evaluation.

Every head is a module on a feature map [B D h w] or a vector [B D], differentiable with respect to it. In
`.eval()` mode batch-norm uses its running statistics, so a gradient taken through the head does not couple
the images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .classification import UNKNOWN, LinearBNHead, LinearBNHeads, classification_loss, heads_loss
from .depth import LinearBNDepthHead, depth_loss
from .segmentation import IGNORE, ConvSegHead, LinearBNSegHead, segmentation_loss

__all__ = [
    "HEADS",
    "IGNORE",
    "UNKNOWN",
    "ConvSegHead",
    "LinearBNDepthHead",
    "LinearBNHead",
    "LinearBNHeads",
    "LinearBNSegHead",
    "build_head",
    "classification_loss",
    "depth_loss",
    "feature_map",
    "heads_loss",
    "segmentation_loss",
]

HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "seg_linear": LinearBNSegHead,
    "seg_conv": ConvSegHead,
    "depth_linear": lambda dim, classes: LinearBNDepthHead(dim),
    "classes_linear": LinearBNHead,
}


def build_head(kind: str, dim: int, classes: int = 0) -> nn.Module:
    """A new head by its registry name.

    Args:
        kind: a key of `HEADS`.
        dim: width D of the features.
        classes: number of classes; depth heads ignore it.

    Raises:
        ValueError: `kind` is not registered.
    """
    if kind not in HEADS:
        raise ValueError(f"unknown head {kind!r}; choose one of {', '.join(HEADS)}")
    return HEADS[kind](dim, classes)


def feature_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens [B N D], row by row over `grid` (h, w), to a feature map [B D h w]."""
    return patches.transpose(1, 2).unflatten(2, grid)
