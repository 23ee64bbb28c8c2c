"""A small U-Net mask generator (Ronneberger et al., 2015), base 16 channels and depth 3 in the paper's runs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNetDesigner(nn.Module):
    """Views [n 3 H W] -> soft mask [n 1 H W].

    With `stride` s the network sees s × s pixel tiles as channels and predicts at 1/s of the resolution (the mask is
    upsampled): 1/s² of the cost, with nothing of the input averaged away.
    """

    def __init__(self, width: int = 16, depth: int = 3, stride: int = 1, keep_ratio: float = 0.5) -> None:
        super().__init__()
        self.stride, self.depth = stride, depth
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList()
        channels = 3 * stride**2
        for level_width in widths:
            self.down.append(_stage(channels, level_width))
            channels = level_width
        self.up = nn.ModuleList(_stage(widths[i + 1] + widths[i], widths[i]) for i in reversed(range(depth)))
        self.out = nn.Conv2d(width, 1, 1)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.constant_(self.out.bias, math.log(keep_ratio / (1 - keep_ratio)))  # type: ignore[arg-type]

    def forward(self, views: Tensor) -> Tensor:
        size = views.shape[-2:]
        state = F.pixel_unshuffle(views, self.stride)
        skips: list[Tensor] = []
        for level, stage in enumerate(self.down):
            state = stage(F.avg_pool2d(state, 2, ceil_mode=True) if level else state)
            skips.append(state)
        skips.pop()
        for stage in self.up:
            skip = skips.pop()
            state = F.interpolate(state, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            state = stage(torch.cat([state, skip], dim=1))
        logits = self.out(state)
        if self.stride > 1:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits.sigmoid()


def _stage(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.GroupNorm(math.gcd(8, width), width),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GroupNorm(math.gcd(8, width), width),
        nn.SiLU(),
    )
