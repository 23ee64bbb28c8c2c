"""Direction u: what "valuable" means. One tensor per parameter of S, detached: frozen while φ is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gradient = list[Tensor]
Direction = Callable[[Gradient, Gradient], Gradient]
"""(g_down, g_pre) -> u; lists of one tensor per parameter of S."""

_TINY = 1e-20


def inner(a: Gradient, b: Gradient) -> Tensor:
    """⟨a, b⟩ over all tensors; a scalar on their device."""
    return torch.stack([product.sum() for product in torch._foreach_mul(a, b)]).sum()


def norm(a: Gradient) -> Tensor:
    """The Euclidean norm over all tensors."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(a)))


def dot(g_down: Gradient, g_pre: Gradient) -> Gradient:
    """u = g_down: V is the first-order decrease of the downstream loss under an SGD step (v1, eq. 4)."""
    return g_down


def cosine(g_down: Gradient, g_pre: Gradient) -> Gradient:
    """u = g_d/(‖g_d‖‖g_p‖) − cos·g_p/‖g_p‖²: the gradient of cos(g_d, g_p) with respect to g_p.

    Unlike `dot` it cannot be raised by inflating ‖g_pre‖, which the learner's optimizer would cancel.
    """
    norm_down, norm_pre = norm(g_down).clamp_min(_TINY), norm(g_pre).clamp_min(_TINY)
    cos = inner(g_down, g_pre) / (norm_down * norm_pre)
    along = torch._foreach_mul(g_down, 1 / (norm_down * norm_pre))
    return list(torch._foreach_sub(along, torch._foreach_mul(g_pre, cos / norm_pre**2)))


def random(g_down: Gradient, g_pre: Gradient) -> Gradient:
    """`dot` with a random direction of g_down's norm: the control that must not help."""
    return random_like(g_down)


def random_like(g_down: Gradient, generator: torch.Generator | None = None) -> Gradient:
    """Gaussian tensors, each scaled to the norm of its counterpart in `g_down`."""
    noise = [
        torch.randn(g.shape, generator=generator, dtype=g.dtype, device=generator.device if generator else g.device).to(
            g.device
        )
        for g in g_down
    ]
    scales = torch._foreach_div(torch._foreach_norm(g_down), torch._foreach_norm(noise))
    return list(torch._foreach_mul(noise, scales))


def combine(gradients: Sequence[Gradient], weights: Sequence[float]) -> Gradient:
    """Σ_j α_j g_j over feedback tasks."""
    total = list(torch._foreach_mul(gradients[0], weights[0]))
    for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
        torch._foreach_add_(total, gradient, alpha=weight)
    return total


DIRECTIONS: dict[str, Direction] = {"dot": dot, "cosine": cosine, "random": random}
