"""The classification head: a feature vector [B D] to class logits [B C], and its loss."""

from __future__ import annotations

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


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B C] against labels int64 [B]."""
    return F.cross_entropy(logits, labels)
