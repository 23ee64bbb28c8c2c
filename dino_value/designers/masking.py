"""From a soft mask to a learned view, and what keeps the mask honest (method section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_value.distributed.shards import WHOLE, BatchShard


def fill_in(
    views: Tensor,
    kind: str,
    blur_sigma: float,
    generator: torch.Generator | None = None,
    part: BatchShard = WHOLE,
    count: int = 1,
) -> Tensor:
    """What shows where the mask hides: the view blurred, its mean colour, or noise of its mean and spread.

    Args:
        views: [n 3 H W].
        blur_sigma: pixels.
        generator: draws the noise (a CPU generator, so that every device sees the same).
        part: of the batch, `count` views of each image, that `views` are; noise is drawn for all of it.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "blur":
        return blur(views, blur_sigma)
    mean = views.mean((-2, -1), keepdim=True)
    if kind == "mean":
        return mean.expand_as(views)
    if kind == "noise":
        noise = torch.randn((len(views) * part.world, *views.shape[1:]), generator=generator)
        noise = part.rows(noise, count).to(views.device, views.dtype)
        return mean + views.std((-2, -1), keepdim=True) * noise
    raise ValueError(f"fill {kind!r}: choose blur, mean or noise")


def blur(views: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with reflection at the borders, [n 3 H W] -> the same.

    As two matrix products: for a kernel as wide as hides a patch they are several times faster than a convolution.
    """
    rows, columns = (_blur_matrix(size, sigma, min(views.shape[-2:]), views) for size in views.shape[-2:])
    return rows @ views @ columns.T


def _blur_matrix(size: int, sigma: float, shorter: int, like: Tensor) -> Tensor:
    """[out in]: row i holds what each pixel of a line gives to pixel i."""
    radius = min(int(3 * sigma + 0.5), shorter - 1)  # reflection cannot reach beyond the image
    offsets = torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    padded = F.pad(torch.eye(size, device=like.device, dtype=like.dtype)[:, None], (radius, radius), mode="reflect")
    return F.conv1d(padded, (kernel / kernel.sum())[None, None])[:, 0].T


def learned_views(views: Tensor, masks: Tensor, fill: Tensor) -> Tensor:
    """ṽ = μ⊙v + (1−μ)⊙fill, with masks [n 1 H W] (later text, eq. 50)."""
    return torch.lerp(fill, views, masks.expand_as(views))


def sparsity(masks: Tensor, keep_ratio: float) -> Tensor:
    """Mean squared distance of each image's kept share from `keep_ratio`."""
    return (masks.mean((-3, -2, -1)) - keep_ratio).square().mean()


def total_variation(masks: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring mask values, both axes."""
    return masks.diff(dim=-1).abs().mean() + masks.diff(dim=-2).abs().mean()
