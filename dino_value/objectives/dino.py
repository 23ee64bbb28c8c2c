"""DINO: self-distillation with no labels (Caron et al., 2021, arXiv 2104.14294): head, targets, loss, centre."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_value.distributed.collectives import mean, total, world_size


class DINOHead(nn.Module):
    """Three-layer MLP, ℓ2 bottleneck, and a last layer of unit-norm prototypes (appendix C).

    The published head holds the last layer as weight norm with its gain frozen at one; normalising the rows at use
    is the same function with the same gradient.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int = 8192,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()

        def hidden(inputs: int) -> list[nn.Module]:
            # Statistics of the batch alone: no running buffers, so the head stays a pure function of its parameters.
            norm: list[nn.Module] = [BatchNorm(hidden_dim, track_running_stats=False)] if batch_norm else []
            return [nn.Linear(inputs, hidden_dim), *norm, nn.GELU()]

        self.mlp = nn.Sequential(*hidden(dim), *hidden(hidden_dim), nn.Linear(hidden_dim, bottleneck_dim))
        self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and layer is not self.last_layer:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, cls: Tensor) -> Tensor:
        """[n D] -> logits [n K]."""
        bottleneck = F.normalize(self.mlp(cls), dim=-1)
        return F.linear(bottleneck, F.normalize(self.last_layer.weight, dim=-1))


class BatchNorm(nn.BatchNorm1d):
    """Statistics of the whole batch, whatever part of it each process has. torch's SyncBatchNorm has no second
    derivative and runs on GPUs only."""

    def forward(self, rows: Tensor) -> Tensor:
        """[n C] -> [n C]."""
        if world_size() == 1:
            return super().forward(rows)
        with torch.autocast(rows.device.type, enabled=False):
            values = rows.float()
            count = len(values) * world_size()
            centred = values - total(values.sum(0)) / count
            scale = (total(centred.square().sum(0)) / count + self.eps).rsqrt()
            return (centred * scale * self.weight + self.bias).to(rows.dtype)


class DINOLoss(nn.Module):
    """Cross-entropy of the student to the centred, sharpened teacher over pairs of different views (eq. 3)."""

    center: Tensor

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def targets(self, teacher_logits: Tensor, temperature: float) -> Tensor:
        """Teacher logits [2 B K] to probabilities [2 B K], with the centre of the steps before."""
        return F.softmax((teacher_logits.to(self.center.dtype) - self.center) / temperature, dim=-1)

    def log_probabilities(self, student_logits: Tensor) -> Tensor:
        """What the student says, [… K] to [… K], in full precision."""
        with torch.autocast(student_logits.device.type, enabled=False):
            return F.log_softmax(student_logits.to(self.center.dtype) / self.student_temp, dim=-1)

    def terms(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        """One cross-entropy for each (teacher view, student view, image): [V B K] and [2 B K] to [2 V B]."""
        return self.cross_entropy(self.log_probabilities(student_logits), targets)

    @staticmethod
    def cross_entropy(log_probabilities: Tensor, targets: Tensor) -> Tensor:
        """The terms [2 V B] of the student's log-probabilities [V B K] and targets [2 B K], or [2 V B K] where each
        pair has its own.

        The first two of the V views are the teacher's; `pairs` says which terms count.
        """
        # Autocast would take the sums of this product in bfloat16.
        with torch.autocast(targets.device.type, enabled=False):
            if targets.ndim == 4:
                return -torch.einsum("tvbk,vbk->tvb", targets, log_probabilities)
            return -torch.einsum("tbk,vbk->tvb", targets, log_probabilities)

    @staticmethod
    def pairs(terms: Tensor) -> Tensor:
        """bool [2 V 1]: a view is never matched with itself."""
        return ~torch.eye(*terms.shape[:2], dtype=torch.bool, device=terms.device)[..., None]

    def mean(self, terms: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss: the mean of the terms [2 V B] over pairs of different views, each times its weight, if any."""
        teachers, views, images = terms.shape
        weighted = terms if weights is None else terms * weights
        return weighted.masked_fill(~self.pairs(terms), 0).sum() / (teachers * (views - 1) * images)

    def forward(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        """Student logits [V B K], whose first two views are the teacher's, and targets [2 B K], to a scalar."""
        return self.mean(self.terms(student_logits, targets))

    @torch.no_grad()
    def update_center(self, teacher_logits: Tensor) -> None:
        """EMA of the teacher's mean logits [2 B K] (eq. 4); after the loss that used the old one.

        Where the mean is not finite the centre stays: a step that is skipped must not spoil those after it.
        """
        logits = teacher_logits.to(self.center.dtype).flatten(0, -2)
        batch = mean(logits.mean(0, keepdim=True))
        self.center.lerp_(torch.where(batch.isfinite(), batch, self.center), 1 - self.center_momentum)
