"""Segmentation heads: patch features [B D h w] to class logits [B C h' w'], and their loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


STRIPS_FROM = 32
"""Classes from which `segmentation_loss` works in strips; with fewer, all pixels at once are as fast."""
STRIP_BYTES = 2**20
"""Logits in a strip on a CPU: what fits its second-level cache."""


def segmentation_loss(logits: Tensor, labels: Tensor, ignore: int = IGNORE) -> Tensor:
    """Mean cross-entropy over valid pixels, at the resolution of the labels.

    Args:
        logits: [B C h w], upsampled bilinearly; where there are many classes a few rows at a time, so that logits of
            all classes at full resolution are never there.
        labels: int64 [B H W]; pixels equal to `ignore` do not count.

    Returns:
        A scalar; zero, with zero gradient, when no pixel is valid. In strips it can be differentiated once.
    """
    upsampled = logits.shape[-2:] == labels.shape[-2:]
    if logits.shape[1] >= STRIPS_FROM and not upsampled:
        total: Tensor = _CrossEntropyInStrips.apply(logits, labels, ignore)
    else:
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        total = F.cross_entropy(logits, labels, ignore_index=ignore, reduction="sum")
    return total / (labels != ignore).sum().clamp(min=1)


class _CrossEntropyInStrips(torch.autograd.Function):
    """Σ −log softmax(upsampled logits)[label] over valid pixels, and its gradient, in one pass over strips of rows.

    Bilinear upsampling is a matrix product along each axis. A strip fits a processor's cache (or, on a GPU, is large
    enough to fill it), and its softmax is turned into a gradient of the coarse logits while it is there.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            coarse = logits.float().permute(0, 2, 3, 1)
            (count, height, _, classes), (tall, wide) = coarse.shape, labels.shape[-2:]
            rows, columns = _bilinear(height, tall, coarse), _bilinear(coarse.shape[2], wide, coarse)
            widened = (columns @ coarse).flatten(2)  # [B h W·C]
            gradient, total = torch.zeros_like(widened), widened.new_zeros(())
            strip = max(1, (2**28 if logits.is_cuda else STRIP_BYTES) // (4 * wide * classes))
            for image in range(count):
                for top in range(0, tall, strip):
                    weights = rows[top : top + strip]
                    pixels = (weights @ widened[image]).view(-1, classes)
                    truth = labels[image, top : top + strip].flatten()[:, None]
                    valid = truth != ignore
                    truth = truth.where(valid, 0)
                    logs = pixels.log_softmax(1)
                    picked = logs.gather(1, truth)
                    total -= picked.where(valid, 0).sum()
                    share = logs.exp_().scatter_(1, truth, picked.exp() - 1)
                    share *= valid
                    gradient[image].addmm_(weights.t(), share.view(len(weights), -1))
            back = columns.t() @ gradient.unflatten(2, (wide, classes))
        ctx.save_for_backward(back.permute(0, 3, 1, 2).to(logits.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None, None


def _bilinear(size: int, to: int, like: Tensor) -> Tensor:
    """[to size]: what each of `size` values gives to each of `to` in between (pixel centres, `align_corners=False`)."""
    identity = torch.eye(size, device=like.device, dtype=like.dtype)[None]
    return F.interpolate(identity, size=to, mode="linear", align_corners=False)[0].t()
