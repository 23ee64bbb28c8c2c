"""A patchwise transformer mask generator in the style of SiT and DiT (Ma et al., 2024; Peebles & Xie, 2023)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class SiTDesigner(nn.Module):
    """Views [n 3 H W] -> soft mask [n 1 H W]: one logit per `stride`-pixel patch, upsampled.

    Position is a fixed 2-D sine table, so any image size that `stride` divides will do.
    """

    def __init__(self, width: int = 128, depth: int = 4, stride: int = 8, keep_ratio: float = 0.5) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, stride, stride)
        self.blocks = nn.Sequential(*(Block(width, num_heads=max(1, width // 32)) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 1)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.constant_(self.out.bias, math.log(keep_ratio / (1 - keep_ratio)))

    def forward(self, views: Tensor) -> Tensor:
        patches = self.embed(views)
        rows, columns = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = self.blocks(tokens + _sine_table(rows, columns, tokens.shape[-1], tokens))
        logits = self.out(self.norm(tokens)).transpose(1, 2).unflatten(-1, (rows, columns))
        return F.interpolate(logits, size=views.shape[-2:], mode="bilinear", align_corners=False).sigmoid()


def _sine_table(rows: int, columns: int, width: int, like: Tensor) -> Tensor:
    """[rows·columns width]: a quarter each of sine and cosine of the row and of the column."""
    frequencies = torch.exp(torch.arange(width // 4, device=like.device) * (-math.log(10_000) / (width // 4)))
    row = torch.arange(rows, device=like.device)[:, None] * frequencies
    column = torch.arange(columns, device=like.device)[:, None] * frequencies
    along = torch.cat([row.sin(), row.cos()], -1)[:, None].expand(-1, columns, -1)
    across = torch.cat([column.sin(), column.cos()], -1)[None].expand(rows, -1, -1)
    return torch.cat([along, across], dim=-1).flatten(0, 1).to(like.dtype)
