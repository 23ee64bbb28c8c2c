"""One value step: trunk once, g_pre, u, then the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from dino_value.value.check import require
from dino_value.value.directions import Direction, Gradient, inner, norm
from dino_value.value.distributed import average, average_gradients
from dino_value.value.engines import Engine, Task, pre_gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ValueStep(NamedTuple):
    """Scalars on the device, detached: nothing here waits for the host."""

    value: Tensor
    """V = ⟨g_down, g_pre⟩, whatever the direction: the predicted downstream decrease per unit of SGD step."""
    cosine: Tensor
    """cos(g_down, g_pre): unlike V it does not grow with ‖g_pre‖."""
    g_down_norm: Tensor
    g_pre_norm: Tensor

    @classmethod
    def of(cls, g_down: Gradient, g_pre: Gradient) -> ValueStep:
        value, norm_down, norm_pre = inner(g_down, g_pre), norm(g_down), norm(g_pre)
        return cls(value, value / (norm_down * norm_pre).clamp_min(1e-20), norm_down, norm_pre)


def value_step(
    task: Task,
    parameters: dict[str, Tensor],
    g_down: Gradient,
    direction: Direction,
    engine: Engine,
    phi: Sequence[Tensor],
    penalty: Tensor | None = None,
    hidden: tuple[Tensor, ...] | None = None,
    group: ProcessGroup | None = None,
) -> ValueStep:
    """Accumulate ∂(−⟨u, g_pre⟩ + penalty)/∂φ into φ's .grad, and say how g_pre and g_down lie to each other.

    Args:
        parameters: θ_S by name, detached (`Scope.parameters`).
        g_down: one detached tensor per parameter of S, same order; with several ranks, already their mean
            (`distributed.average`).
        hidden: the trunk's output, when the caller has already run it.
        group: the ranks that share the batch, in equal parts; all by default. g_pre and φ's .grad are averaged over
            them, so every rank gets what one process would on the whole batch. The penalty's gradient is averaged too.

    Raises:
        ValueError: g_down does not fit the scope, φ is frozen or does not reach the loss, or the learner does not
            support the engine; no parameter has changed.
    """
    require(parameters, g_down, phi)
    hidden = task.trunk() if hidden is None else hidden
    g_pre = average(pre_gradient(task, hidden, parameters), group)
    u = direction(g_down, g_pre)
    engine(task, hidden, parameters, u, phi, penalty, g_pre)
    average_gradients(phi, group)
    return ValueStep.of(g_down, g_pre)
