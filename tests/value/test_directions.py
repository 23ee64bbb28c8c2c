"""Directions: what they are, and what φ climbs when it follows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dino_value.value import DIRECTIONS, combine, double_backward, inner, norm, random_like, value_step
from dino_value.value.directions import cosine, dot, random


@pytest.fixture
def gradients() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    rng = torch.Generator().manual_seed(1)
    shapes = [(4, 3), (7,), (1, 2, 5)]
    return tuple([torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes] for _ in range(2))  # type: ignore[return-value]


def test_the_registry() -> None:
    assert {"dot": dot, "cosine": cosine, "random": random} == DIRECTIONS


def test_inner_and_norm(gradients: Any) -> None:
    a, b = (torch.cat([part.flatten() for part in g]) for g in gradients)
    assert inner(*gradients).item() == pytest.approx(float(a @ b))
    assert norm(gradients[0]).item() == pytest.approx(float(a.norm()))


def test_dot_is_g_down(gradients: Any) -> None:
    g_down, g_pre = gradients
    assert all(map(torch.equal, dot(g_down, g_pre), g_down))


def test_cosine_is_the_gradient_of_the_cosine(gradients: Any) -> None:
    g_down, g_pre = gradients
    leaves = [part.clone().requires_grad_() for part in g_pre]
    objective = inner(g_down, leaves) / (norm(g_down) * norm(leaves))
    for found, expected in zip(cosine(g_down, g_pre), torch.autograd.grad(objective, leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_cosine_is_blind_to_scale(gradients: Any) -> None:
    g_down, g_pre = gradients
    assert abs(inner(cosine(g_down, g_pre), g_pre)) < 1e-12  # no reward for a longer g_pre
    for found, expected in zip(cosine([5 * g for g in g_down], g_pre), cosine(g_down, g_pre), strict=True):
        torch.testing.assert_close(found, expected)


def test_cosine_of_nothing_is_finite(gradients: Any) -> None:
    zero = [torch.zeros_like(part) for part in gradients[0]]
    assert all(bool(part.isfinite().all()) for part in cosine(zero, gradients[1]))


@pytest.mark.parametrize("case", [{}, {"through_teacher": True, "crops": "all"}])
def test_phi_climbs_the_cosine(problem: Callable[..., Any], case: dict[str, Any]) -> None:
    """The frozen direction gives φ the same gradient as the cosine objective differentiated as a whole."""
    p = problem(**case)
    g_down, g_pre = p.direction(), p.plain_gradient()
    objective = inner(g_down, g_pre) / (norm(g_down) * norm(g_pre))
    expected = torch.autograd.grad(-objective, p.phi)
    value_step(p.task(), p.theta, g_down, cosine, double_backward, p.phi)
    for found, want in zip(p.take_phi_gradient(), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-12)


def test_random_like_has_the_norm_of_each_tensor(gradients: Any) -> None:
    g_down, _ = gradients
    noise = random_like(g_down, torch.Generator().manual_seed(0))
    for found, like in zip(noise, g_down, strict=True):
        assert (found.shape, found.dtype) == (like.shape, like.dtype)
        assert found.norm().item() == pytest.approx(like.norm().item())
    assert abs(inner(noise, g_down)) < 0.9 * norm(noise) * norm(g_down)


def test_random_like_follows_its_generator(gradients: Any) -> None:
    g_down, _ = gradients
    first, again, other = (random_like(g_down, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_random_like_does_not_look_at_the_direction(gradients: Any) -> None:
    """The control sees norms only: another g_down of equal norms gives the same draw."""
    g_down, _ = gradients
    mirrored = [-part.flip(0) for part in g_down]
    for found, expected in zip(
        random_like(mirrored, torch.Generator().manual_seed(0)),
        random_like(g_down, torch.Generator().manual_seed(0)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_random_like_of_a_zero_gradient_is_zero() -> None:
    """A scope parameter that the feedback does not reach."""
    assert float(random_like([torch.zeros(3)])[0].norm()) == 0


def test_combine_is_the_weighted_sum_and_leaves_its_input(gradients: Any) -> None:
    first, second = gradients
    copies = [part.clone() for part in first]
    for found, a, b in zip(combine([first, second], [0.5, 8.0]), first, second, strict=True):
        torch.testing.assert_close(found, 0.5 * a + 8.0 * b)
    assert all(map(torch.equal, first, copies))


def test_combine_wants_a_weight_each(gradients: Any) -> None:
    with pytest.raises(ValueError, match="zip"):
        combine(list(gradients), [1.0])
