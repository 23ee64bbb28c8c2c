"""Gram anchoring: against loops over pairs of patches, and what the published code returned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_value.objectives.gram import gram_loss, resample_patches

REFERENCE = Path(__file__).parents[1] / "data" / "reference"


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(student: Tensor, teacher: Tensor, level: str, negatives: str, normalise: bool) -> Tensor:
    """Pair by pair."""
    squares = []
    images, patches = student.shape[:2]
    places = [(image, patch) for image in range(images) for patch in range(patches)]
    for first in places:
        for second in places:
            if level == "image" and first[0] != second[0]:
                continue
            pair = []
            for features in (student, teacher):
                a, b = features[first], features[second]
                scale = a.norm() * b.norm() if normalise else 1
                pair.append((a * b).sum() / scale)
            ours, theirs = pair
            if negatives == "clip":
                ours, theirs = ours.clamp_min(0), theirs.clamp_min(0)
            if negatives == "clip_teacher":
                if bool(theirs < 0) and bool(ours < 0):
                    ours = ours * 0
                theirs = theirs.clamp_min(0)
            squares.append((ours - theirs).square())
    return torch.stack(squares).mean()


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("negatives", ["keep", "clip", "clip_teacher"])
@pytest.mark.parametrize("level", ["image", "batch"])
@pytest.mark.parametrize("shape", [(1, 4, 3), (2, 3, 5), (3, 1, 2)])
def test_value_and_gradient_of_the_loop(
    shape: tuple[int, int, int], level: str, negatives: str, normalise: bool
) -> None:
    student, teacher = draw(0, *shape).requires_grad_(), draw(1, *shape[:2], shape[2] + 1)
    found = gram_loss(student, teacher, level, negatives, normalise)
    expected = naive(student, teacher, level, negatives, normalise)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(value, student)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("level", ["image", "batch"])
def test_the_published_loss(level: str) -> None:
    with np.load(REFERENCE / "dinov3_gram.npz") as file:
        recorded = {key: torch.from_numpy(np.asarray(file[key])) for key in file}
    found = gram_loss(recorded["output"], recorded["target"], level, negatives="clip")
    torch.testing.assert_close(found, recorded[f"loss_{level}_level"], rtol=1e-5, atol=0)


def test_the_papers_frobenius_norm() -> None:
    student, teacher = draw(0, 1, 6, 4), draw(1, 1, 6, 4)
    grams = [(unit := x[0] / x[0].norm(dim=-1, keepdim=True)) @ unit.T for x in (student, teacher)]
    expected = (grams[0] - grams[1]).norm() ** 2 / 36
    torch.testing.assert_close(gram_loss(student, teacher), expected)


def test_rotated_features_cost_nothing() -> None:
    student = draw(0, 2, 5, 4)
    rotation, _ = torch.linalg.qr(draw(1, 4, 4))
    assert float(gram_loss(student, student @ rotation)) < 1e-28


def test_no_gradient_reaches_the_gram_teacher() -> None:
    student, teacher = draw(0, 1, 4, 3).requires_grad_(), draw(1, 1, 4, 3).requires_grad_()
    gram_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_in_float32_under_autocast() -> None:
    student, teacher = draw(0, 2, 4, 3).bfloat16(), draw(1, 2, 4, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = gram_loss(student, teacher)
    assert torch.equal(found, gram_loss(student.float(), teacher.float()))


def test_resampled_patches_keep_their_order() -> None:
    """A map that is linear in row and column stays it; rows and columns are not exchanged."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    patches = torch.stack([rows, columns], -1).flatten(0, 1)[None]
    found = resample_patches(patches, (8, 12), (4, 6)).unflatten(1, (4, 6))
    torch.testing.assert_close(found[0, 1:-1, 2, 0], 2 * torch.arange(1.0, 3) + 0.5)
    torch.testing.assert_close(found[0, 1, 1:-1, 1], 2 * torch.arange(1.0, 5) + 0.5)
    torch.testing.assert_close(resample_patches(patches, (8, 12), (8, 12)), patches)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="choose of"):
        gram_loss(draw(0, 1, 4, 3), draw(0, 1, 4, 3), level="pixel")
    with pytest.raises(ValueError, match="choose of"):
        gram_loss(draw(0, 1, 4, 3), draw(0, 1, 4, 3), negatives="drop")
    with pytest.raises(ValueError, match="resample_patches"):
        gram_loss(draw(0, 1, 4, 3), draw(0, 1, 16, 3))
    with pytest.raises(ValueError, match="not a grid of 2 × 3"):
        resample_patches(draw(0, 1, 4, 3), (2, 3), (4, 6))
