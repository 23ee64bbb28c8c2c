"""One value step: trunk once, g_pre, u, then the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dino_value.value.directions import Direction, Gradient, inner, norm
from dino_value.value.engines import Engine, Task, pre_gradient


class ValueStep(NamedTuple):
    """Scalars on the device, detached: nothing here waits for the host."""

    value: Tensor
    """V = ⟨g_down, g_pre⟩, whatever the direction: the predicted downstream decrease per unit of SGD step."""
    cosine: Tensor
    """cos(g_down, g_pre): unlike V it does not grow with ‖g_pre‖."""
    g_down_norm: Tensor
    g_pre_norm: Tensor


def value_step(
    task: Task,
    parameters: dict[str, Tensor],
    g_down: Gradient,
    direction: Direction,
    engine: Engine,
    phi: Sequence[Tensor],
    penalty: Tensor | None = None,
    hidden: tuple[Tensor, ...] | None = None,
) -> ValueStep:
    """Accumulate ∂(−⟨u, g_pre⟩ + penalty)/∂φ into φ's .grad, and say how g_pre and g_down lie to each other.

    Args:
        parameters: θ_S by name, detached (`Scope.parameters`).
        g_down: one detached tensor per parameter of S, same order.
        hidden: the trunk's output, when the caller has already run it.
    """
    hidden = task.trunk() if hidden is None else hidden
    g_pre = pre_gradient(task, hidden, parameters)
    u = direction(g_down, g_pre)
    engine(task, hidden, parameters, u, phi, penalty, g_pre)
    value, norm_down, norm_pre = inner(g_down, g_pre), norm(g_down), norm(g_pre)
    return ValueStep(value, value / (norm_down * norm_pre).clamp_min(1e-20), norm_down, norm_pre)
