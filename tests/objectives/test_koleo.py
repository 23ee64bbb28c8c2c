"""KoLeo: against a loop over all pairs, and what the published code returned."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_value.objectives.koleo import koleo

REFERENCE = Path(__file__).parents[1] / "data" / "reference"


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def naive(features: Tensor) -> Tensor:
    """The estimator pair by pair: −1/n Σ_i log min_{j≠i} ‖x_i − x_j‖ on the unit sphere."""
    points = [row / row.square().sum().sqrt() for row in features]
    logs = []
    for i, point in enumerate(points):
        distances = [(point - other).square().sum().sqrt() for j, other in enumerate(points) if j != i]
        logs.append(torch.stack(distances).min().log())
    return -sum(logs) / len(points)  # type: ignore[return-value]


@pytest.mark.parametrize(("images", "width"), [(2, 3), (3, 2), (8, 16), (17, 5)])
def test_value_and_gradient_of_the_loop(images: int, width: int) -> None:
    features = draw(images, width).requires_grad_()
    found, expected = koleo(features), naive(features)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    gradients = [torch.autograd.grad(value, features)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_the_published_loss_and_gradient() -> None:
    with np.load(REFERENCE / "dinov2_koleo.npz") as file:
        recorded = {key: torch.from_numpy(np.asarray(file[key])) for key in file}
    features = recorded["x"].requires_grad_()
    loss = koleo(features)
    (gradient,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(loss, recorded["loss"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, recorded["grad"], rtol=1e-4, atol=1e-6)


def test_two_opposite_points() -> None:
    """Distance 2; a diagonal of −1 would let each be its own neighbour."""
    assert float(koleo(torch.tensor([[3.0, 0.0], [-1.0, 0.0]]))) == pytest.approx(-math.log(2), rel=1e-6)


def test_coinciding_features_stay_finite() -> None:
    features = torch.ones(4, 8).requires_grad_()
    loss = koleo(features)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_in_float32_under_autocast() -> None:
    features = draw(6, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = koleo(features)
    assert found.dtype == torch.float32
    assert torch.equal(found, koleo(features.float()))


@pytest.mark.parametrize("shape", [(1, 8), (0, 8), (2, 3, 8)])
def test_a_batch_without_neighbours_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"at least 2 images of one crop.*raise the batch size"):
        koleo(torch.ones(shape))
