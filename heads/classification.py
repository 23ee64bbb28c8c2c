"""The classification head: a feature vector [B D] to class logits [B C], and its loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearBNHead(nn.Module):
    """Batch-norm without learned scale, then a linear classifier: MAE's linear probe."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.classify = nn.Linear(dim, classes)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B D] to logits [B C]."""
        return self.classify(self.norm(features))


UNKNOWN = -100
"""Label of an image that counts for nothing."""


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B C] against labels int64 [B]; zero, with zero gradient, where none is known."""
    total = F.cross_entropy(logits, labels, ignore_index=UNKNOWN, reduction="sum")
    return total / (labels != UNKNOWN).sum().clamp(min=1)


class LinearBNHeads(nn.Module):
    """Several `LinearBNHead`s that read the same features: one batch-norm, which learns nothing, and one product."""

    def __init__(self, heads: Sequence[LinearBNHead]) -> None:
        super().__init__()
        self.norm = heads[0].norm
        self.heads = nn.ModuleList(head.classify for head in heads)

    def forward(self, features: Tensor) -> Tensor:
        """[B D] to logits [n B C]."""
        weight, bias = (torch.cat([getattr(head, part) for head in self.heads]) for part in ("weight", "bias"))
        return F.linear(self.norm(features), weight, bias).unflatten(1, (len(self.heads), -1)).transpose(0, 1)


def heads_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over heads of `classification_loss`: each head's gradient is that of its own loss alone."""
    count = len(logits)
    return count * F.cross_entropy(logits.flatten(0, 1), labels.repeat(count))
