"""Segmentation heads: patch features [B D h w] to class logits [B C h' w'], and their loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = 255
"""Label of pixels that count neither in the loss nor in the metrics."""


class LinearBNSegHead(nn.Module):
    """Batch-norm, dropout, 1×1 convolution: the linear probe of DINOv2 and DINOv3."""

    def __init__(self, dim: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(dim, classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """[B D h w] to logits [B C h w]."""
        return self.classify(self.dropout(self.norm(features)))


class ConvSegHead(nn.Module):
    """A small decoder: two 3×3 convolutions with batch-norm, the second at twice the grid, and a 1×1."""

    def __init__(self, dim: int, classes: int, width: int = 128) -> None:
        super().__init__()
        self.coarse = nn.Sequential(nn.Conv2d(dim, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU())
        self.fine = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU())
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[B D h w] to logits [B C 2h 2w]."""
        coarse = F.interpolate(self.coarse(features), scale_factor=2, mode="bilinear", align_corners=False)
        return self.classify(self.fine(coarse))


def segmentation_loss(logits: Tensor, labels: Tensor, ignore: int = IGNORE) -> Tensor:
    """Mean cross-entropy over valid pixels, at the resolution of the labels.

    Args:
        logits: [B C h w], upsampled bilinearly.
        labels: int64 [B H W]; pixels equal to `ignore` do not count.

    Returns:
        A scalar; zero, with zero gradient, when no pixel is valid.
    """
    logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels, ignore_index=ignore, reduction="sum")
    return total / (labels != ignore).sum().clamp(min=1)
