"""Engine: how ∇_φ ⟨u, ∇_{θ_S} L_pre(θ; φ)⟩ is taken.

Every engine runs the tail in full precision: differences and second derivatives do not survive bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dino_value.value.directions import Gradient, inner, norm
from dino_value.value.scope import with_values


class Task(Protocol):
    """How L_pre depends on φ and on θ_S. Parameters outside S are constants."""

    def trunk(self) -> tuple[Tensor, ...]:
        """What the tail needs and φ reaches (hidden states, targets), with φ's graph kept."""

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        """The scalar loss; pure in `parameters`, the values of θ_S."""


Engine = Callable[..., Tensor]
"""(task, hidden, parameters, u, phi, penalty=None, g_pre=None) -> ⟨u, g_pre⟩, detached.

Accumulates ∂(−V + penalty)/∂φ into the .grad of the tensors in `phi`, and into nothing else's.
"""


def double_backward(
    task: Task,
    hidden: tuple[Tensor, ...],
    parameters: dict[str, Tensor],
    u: Gradient,
    phi: Sequence[Tensor],
    penalty: Tensor | None = None,
    g_pre: Gradient | None = None,
) -> Tensor:
    """The reference: differentiate ⟨u, ∇_{θ_S} L⟩ through a gradient that keeps its graph.

    Flash and memory-efficient attention have no second derivative, so the tail runs on the math kernel.
    """
    _require_graph(hidden)
    leaves = [value.detach().requires_grad_() for value in parameters.values()]
    with full_precision(hidden), sdpa_kernel(SDPBackend.MATH):
        loss = task.tail(full(hidden), with_values(parameters, leaves))
        gradient = list(torch.autograd.grad(loss, leaves, create_graph=True))
        value = inner(u, gradient)
        objective = -value if penalty is None else penalty - value
        objective.backward(inputs=list(phi))
    return value.detach()


def finite_difference(
    task: Task,
    hidden: tuple[Tensor, ...],
    parameters: dict[str, Tensor],
    u: Gradient,
    phi: Sequence[Tensor],
    penalty: Tensor | None = None,
    g_pre: Gradient | None = None,
    radius: float = 1e-3,
) -> Tensor:
    """Central difference along u of the loss's gradient at the trunk's output, then one backward through the trunk.

    ct = [∂L/∂h(θ_S + εu) − ∂L/∂h(θ_S − εu)] / 2ε with ε = radius/‖u‖. First-order passes only; the trunk runs once,
    so it may use flash attention, compilation and checkpointing. The moved parameters are new tensors: adding and
    subtracting in place drifts in low precision.
    """
    _require_graph(hidden)
    epsilon = radius / norm(u).clamp_min(1e-20)
    step = torch._foreach_mul(u, epsilon)
    base = list(parameters.values())
    ahead = _hidden_gradient(task, hidden, with_values(parameters, torch._foreach_add(base, step)))
    behind = _hidden_gradient(task, hidden, with_values(parameters, torch._foreach_sub(base, step)))
    outputs: list[Tensor] = []
    cotangents: list[Tensor | None] = []
    for state, plus, minus in zip(hidden, ahead, behind, strict=True):
        if state.requires_grad and plus is not None and minus is not None:
            outputs.append(state)
            cotangents.append(((minus - plus) / (2 * epsilon)).to(state.dtype))
    if penalty is not None:
        outputs.append(penalty)
        cotangents.append(None)
    torch.autograd.backward(outputs, cotangents, inputs=list(phi))
    # Not from the two losses: their difference is lost in float32's rounding at this radius.
    return inner(u, pre_gradient(task, hidden, parameters) if g_pre is None else g_pre)


def pre_gradient(task: Task, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Gradient:
    """g_pre on S, without φ's graph: one tail forward and backward."""
    leaves = [value.detach().requires_grad_() for value in parameters.values()]
    constants = tuple(state.detach() for state in hidden)
    with full_precision(hidden):
        loss = task.tail(full(constants), with_values(parameters, leaves))
        return list(torch.autograd.grad(loss, leaves))


def _hidden_gradient(task: Task, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> list[Tensor | None]:
    with full_precision(hidden):
        leaves = tuple(state.detach().requires_grad_(state.requires_grad) for state in full(hidden))
        loss = task.tail(leaves, parameters)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(loss, wanted, allow_unused=True)) if wanted and loss.requires_grad else None
    return [next(found) if found and leaf.requires_grad else None for leaf in leaves]


def full_precision(hidden: tuple[Tensor, ...]) -> torch.autocast:
    """Autocast off on the device of `hidden`."""
    return torch.autocast(hidden[0].device.type, enabled=False)


def full(hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Low-precision states as float32; float32 and float64 as they are."""
    low = (torch.bfloat16, torch.float16)
    return tuple(state.float() if state.dtype in low else state for state in hidden)


def _require_graph(hidden: tuple[Tensor, ...]) -> None:
    # V itself always has a graph, to θ_S: only the trunk's output tells.
    if not any(state.requires_grad for state in hidden):
        raise ValueError("the loss does not depend on the designer: no tensor of task.trunk() carries its graph")


ENGINES: dict[str, Engine] = {"double_backward": double_backward, "finite_difference": finite_difference}
