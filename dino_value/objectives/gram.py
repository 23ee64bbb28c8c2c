"""Gram anchoring: the student's patches keep the similarities among each other that they had in a Gram teacher.

DINOv3 (Siméoni et al., 2025, arXiv 2508.10104, section 4). The Gram teacher is an earlier EMA teacher, renewed now and
then; the features are those of the backbone after its final norm, no head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_value.distributed.collectives import gather

LEVELS = ("image", "batch")
NEGATIVES = ("keep", "clip", "clip_teacher")


def gram_loss(
    student: Tensor, teacher: Tensor, level: str = "image", negatives: str = "keep", normalise: bool = True
) -> Tensor:
    """Mean squared difference of two Gram matrices of patch features, [n N D] each (widths D may differ); a scalar.

    The paper's squared Frobenius norm divided by the number of entries. The defaults are the paper's; the published
    class itself starts at `negatives="clip"`.

    Args:
        level: "image", similarities within an image; "batch", among all n·N patches, whose matrix has (n·N)² entries;
            with several processes the mean over them is the whole batch's.
        negatives: "keep"; "clip", similarities below 0 count as 0; "clip_teacher", the teacher's do, and the
            student's too where the teacher's is below 0, so that they cost nothing there.
        normalise: ℓ2-normalise each patch first, so that similarities are cosines.

    Raises:
        ValueError: an unknown option, or patches that do not match.
    """
    if level not in LEVELS or negatives not in NEGATIVES:
        raise ValueError(f"gram: level={level!r}, negatives={negatives!r}: choose of {LEVELS} and of {NEGATIVES}")
    if student.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"gram: student patches {list(student.shape)}, teacher patches {list(teacher.shape)}: both must be "
            "[n N D] of the same images and grid; see resample_patches"
        )
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (_similarities(features, level, normalise) for features in (student, teacher.detach()))
        if negatives == "clip":
            ours, theirs = ours.relu(), theirs.relu()
        elif negatives == "clip_teacher":
            ours, theirs = torch.where(theirs < 0, ours.relu(), ours), theirs.relu()
        return F.mse_loss(ours, theirs.to(ours.dtype))


def resample_patches(patches: Tensor, grid: tuple[int, int], size: tuple[int, int], antialias: bool = False) -> Tensor:
    """Patch features [n N D] of a `grid` (h, w), N = h·w, to those of another grid `size` [n h'·w' D], bicubic.

    For a Gram teacher that sees the images at a higher resolution (section 4.3).

    Raises:
        ValueError: the grid is not that of the patches.
    """
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"resample_patches: {patches.shape[1]} patches are not a grid of {grid[0]} × {grid[1]}")
    maps = patches.transpose(1, 2).unflatten(-1, grid)
    maps = F.interpolate(maps, size=size, mode="bicubic", align_corners=False, antialias=antialias)
    return maps.flatten(2).transpose(1, 2)


def _similarities(features: Tensor, level: str, normalise: bool) -> Tensor:
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    features = F.normalize(features, dim=-1) if normalise else features
    if level == "image":
        return features @ features.mT
    features = features.flatten(0, 1)
    return features @ gather(features)[0].mT
