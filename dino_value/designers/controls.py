"""Designers that learn nothing: what a learned one has to beat."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dino_value.distributed.shards import WHOLE, BatchShard


class RandomMasks(nn.Module):
    """Views [n 3 H W] -> masks [n 1 H W] that keep a random `keep_ratio` of the patches and hide the others.

    Drawn for all of the batch, two views of each image, of which these are a `part`.
    """

    def __init__(self, keep_ratio: float, patch_size: int, part: BatchShard = WHOLE) -> None:
        super().__init__()
        self.keep_ratio, self.patch_size, self.part = keep_ratio, patch_size, part

    def forward(self, views: Tensor) -> Tensor:
        rows, columns = (side // self.patch_size for side in views.shape[-2:])
        kept = round(self.keep_ratio * rows * columns)
        drawn = torch.rand(len(views) * self.part.world, rows, columns, device=views.device)
        scores = self.part.rows(drawn, math.gcd(2, len(drawn)))
        return keep_lowest(scores, kept, views.shape[-1] // columns).to(views.dtype)


class AttentionMasks(nn.Module):
    """Views [n 3 H W] -> masks [n 1 H W] that hide the patches which a teacher's class token looks at most, and keep a
    `keep_ratio` of them: AttMask-High (Kakogeorgiou et al., arXiv 2203.12719).

    Args:
        attention: views to what the class token pays each patch, [n h w].
    """

    def __init__(self, keep_ratio: float, attention: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.keep_ratio, self.attention = keep_ratio, attention

    @torch.no_grad()
    def forward(self, views: Tensor) -> Tensor:
        scores = self.attention(views)
        kept = round(self.keep_ratio * scores[0].numel())
        return keep_lowest(scores, kept, views.shape[-1] // scores.shape[-1]).to(views.dtype)


def keep_lowest(scores: Tensor, kept: int, patch_size: int) -> Tensor:
    """Patch scores [n h w] to bool masks [n 1 h·p w·p], true on the `kept` patches of lowest score."""
    ranks = scores.flatten(1).argsort(1).argsort(1)
    mask = (ranks < kept).view(-1, 1, *scores.shape[1:])
    return mask.repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)
