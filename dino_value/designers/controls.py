"""Designers that learn nothing: what a learned one has to beat."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dino_value.parts import WHOLE, Part


class RandomMasks(nn.Module):
    """Views [n 3 H W] -> masks [n 1 H W] that keep a random `keep_ratio` of the patches and hide the others.

    Drawn for all of the batch, two views of each image, of which these are a `part`.
    """

    def __init__(self, keep_ratio: float, patch_size: int, part: Part = WHOLE) -> None:
        super().__init__()
        self.keep_ratio, self.patch_size, self.part = keep_ratio, patch_size, part

    def forward(self, views: Tensor) -> Tensor:
        rows, columns = (side // self.patch_size for side in views.shape[-2:])
        kept = round(self.keep_ratio * rows * columns)
        drawn = torch.rand(len(views) * self.part.world, rows * columns, device=views.device)
        order = self.part.rows(drawn, math.gcd(2, len(drawn))).argsort(1).argsort(1)
        mask = (order < kept).to(views.dtype).view(-1, 1, rows, columns)
        return mask.repeat_interleave(self.patch_size, -2).repeat_interleave(self.patch_size, -1)
