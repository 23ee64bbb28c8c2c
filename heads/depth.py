"""Depth heads: patch features [B D h w] to metres [B 1 h w], and their loss."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearBNDepthHead(nn.Module):
    """Batch-norm, 1×1 convolution, softplus.

    Its output is positive and unbounded: the depth range of a benchmark is applied by the evaluation only,
    because a clamp here would stop the gradient wherever the prediction leaves the range.
    """

    def __init__(self, dim: int, initial_depth: float = 2.5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.regress = nn.Conv2d(dim, 1, 1)
        nn.init.normal_(self.regress.weight, std=0.01)
        self.start_at(initial_depth)

    def start_at(self, metres: float) -> None:
        """Set the bias so that the head predicts `metres` for an average feature.

        Normalised features have zero mean, so the mean depth is the bias's alone to learn; from a bias of
        zero that takes AdamW thousands of steps.
        """
        # The inverse of softplus, log(exp(y) − 1), in the form that does not overflow.
        bias = metres + math.log(-math.expm1(-metres))
        nn.init.constant_(self.regress.bias, bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """[B D h w] to depth [B 1 h w], metres."""
        return F.softplus(self.regress(self.norm(features)))


def depth_loss(prediction: Tensor, depth: Tensor, kind: Literal["l1", "l2"] = "l1") -> Tensor:
    """Mean absolute (`l1`, m) or squared (`l2`, m²) error over valid pixels, at the truth's resolution.

    Args:
        prediction: [B 1 h w], upsampled bilinearly.
        depth: [B H W] metres; 0 where unknown.

    Returns:
        A scalar; zero, with zero gradient, when no pixel is valid.

    Raises:
        ValueError: unknown `kind`.
    """
    if kind not in ("l1", "l2"):
        raise ValueError(f"unknown depth loss {kind!r}; choose l1 or l2")
    prediction = F.interpolate(prediction, size=depth.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)
    valid = depth > 0
    error = torch.where(valid, prediction - depth, 0)
    total = error.abs().sum() if kind == "l1" else error.square().sum()
    return total / valid.sum().clamp(min=1)
