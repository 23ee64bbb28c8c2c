"""Engine: how ∇_φ ⟨u, ∇_{θ_S} L_pre(θ; φ)⟩ is taken.

Every engine runs the tail in full precision: differences and second derivatives do not survive bfloat16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dino_value.value.directions import Gradient, inner, norm
from dino_value.value.scope import with_values
from dino_value.value.terms import term_values


class Task(Protocol):
    """How L_pre depends on φ and on θ_S. Parameters outside S are constants.

    Activation checkpointing recomputes a block from the module's own parameters, at the time of the backward pass. So
    a checkpointed trunk calls the module itself (no gradient reaches θ: engines ask for φ's alone), and a tail
    checkpoints with `parameters` among the arguments, or not at all.

    A task may also have `reached(hidden, parameters)`: a scalar with the tail's derivative by every state that carries
    φ's graph, whatever it leaves out of the rest of the loss. `finite_difference` then differentiates that.
    """

    def trunk(self) -> tuple[Tensor, ...]:
        """What the tail needs and φ reaches (hidden states, targets), with φ's graph kept."""

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        """The scalar loss; pure in `parameters`, the values of θ_S."""


class LinearTask(Task, Protocol):
    """A loss linear in what φ makes: L_pre = Σ_i w_i ℓ_i(θ_S), with w = hidden[0].

    In language w is the target distribution q and ℓ = −log p; in vision w are the weights of the loss's terms. Only w
    carries φ's graph: the other hidden states are constants.
    """

    def terms(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        """ℓ, of the shape of hidden[0], which it must not depend on; pure in `parameters`."""


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

    Raises:
        ValueError: φ does not reach the loss; or the learner cannot be differentiated twice, with the fix.
    """
    _require_graph(hidden)
    leaves = [value.detach().requires_grad_() for value in parameters.values()]
    with _explained(), full_precision(hidden), sdpa_kernel(SDPBackend.MATH):
        loss = task.tail(full(hidden), with_values(parameters, leaves))
        gradient = list(torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True))
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

    Raises:
        ValueError: φ does not reach the loss; or the learner cannot be run as the task asks, with the fix.
    """
    _require_graph(hidden)
    epsilon = radius / norm(u).clamp_min(1e-20)
    base = list(parameters.values())

    def gradient_at(distance: Tensor) -> list[Tensor | None]:
        # One copy of θ_S at a time: the step along u is gone before the pass.
        moved = torch._foreach_add(base, torch._foreach_mul(u, distance))
        return _hidden_gradient(task, hidden, with_values(parameters, moved))

    with _explained():
        ahead, behind = gradient_at(epsilon), gradient_at(-epsilon)
        outputs: list[Tensor] = []
        cotangents: list[Tensor | None] = []
        for state, plus, minus in zip(hidden, ahead, behind, strict=True):
            if plus is not None and minus is not None:
                outputs.append(state)
                cotangents.append(((minus - plus) / (2 * epsilon)).to(state.dtype))
        if not outputs:
            raise ValueError(_NO_GRAPH.format("the tail uses no tensor of task.trunk() that carries its graph"))
        if penalty is not None and penalty.requires_grad:
            outputs.append(penalty)
            cotangents.append(None)
        torch.autograd.backward(outputs, cotangents, inputs=list(phi))
        # Not from the two losses: their difference is lost in float32's rounding at this radius.
        return inner(u, pre_gradient(task, hidden, parameters) if g_pre is None else g_pre)


def linear(
    task: Task,
    hidden: tuple[Tensor, ...],
    parameters: dict[str, Tensor],
    u: Gradient,
    phi: Sequence[Tensor],
    penalty: Tensor | None = None,
    g_pre: Gradient | None = None,
    derivative: str = "difference",
    radius: float = 1e-2,
) -> Tensor:
    """For a `LinearTask`: V = Σ_i w_i v_i with v_i = ⟨u, ∇ℓ_i⟩, so −v is φ's cotangent at w = hidden[0].

    Nothing of the learner is kept for a backward pass; only what made w is differentiated.

    Args:
        derivative: how v is taken, see `term_values`.
        radius: of the difference.

    Raises:
        ValueError: the task has no `terms`, they have another shape than w, or φ does not reach the loss through w
            alone.
    """
    weights, *rest = hidden
    if not hasattr(task, "terms"):
        raise ValueError(
            "engine linear: the task has no terms(hidden, parameters); write the loss as Σ hidden[0]·terms, or choose "
            "engine=finite_difference"
        )
    if any(state.requires_grad for state in rest):
        raise ValueError(
            "engine linear: φ reaches the loss by more than hidden[0], so the loss is not linear in what it makes; "
            "detach the other states, or choose engine=finite_difference"
        )
    _require_graph((weights,))
    constants = full(tuple(state.detach() for state in hidden))
    with _explained(), full_precision(hidden):
        values = term_values(lambda theta: task.terms(constants, theta), parameters, u, radius, derivative)
        if values.shape != weights.shape:
            raise ValueError(
                f"engine linear: terms of shape {tuple(values.shape)} for weights hidden[0] of {tuple(weights.shape)}"
            )
        value = (full((weights,))[0] * values).sum()
        objective = -value if penalty is None else penalty - value
        objective.backward(inputs=list(phi))
    # g_pre may be of more than this batch (the mean over ranks); then so is V.
    return value.detach() if g_pre is None else inner(u, g_pre)


def pre_gradient(task: Task, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Gradient:
    """g_pre on S, without φ's graph: one tail forward and backward; zero for a parameter that the tail does not use."""
    leaves = [value.detach().requires_grad_() for value in parameters.values()]
    constants = tuple(state.detach() for state in hidden)
    with _explained(), full_precision(hidden):
        loss = task.tail(full(constants), with_values(parameters, leaves))
        return list(torch.autograd.grad(loss, leaves, materialize_grads=True))


def _hidden_gradient(task: Task, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> list[Tensor | None]:
    with full_precision(hidden):
        leaves = tuple(state.detach().requires_grad_(state.requires_grad) for state in full(hidden))
        loss = getattr(task, "reached", task.tail)(leaves, parameters)
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


_NO_GRAPH = "the loss does not depend on the designer: {}"


def _require_graph(hidden: tuple[Tensor, ...]) -> None:
    # V itself always has a graph, to θ_S: only the trunk's output tells.
    if not any(state.requires_grad for state in hidden):
        raise ValueError(_NO_GRAPH.format("no tensor of task.trunk() carries its graph"))


_SECOND = (
    "which double_backward needs, also as the reference of an engine's check; {}, or choose engine=finite_difference"
)
_COMPILED = "a compiled learner has no second derivative, " + _SECOND.format("run it in eager mode")
# Part of what PyTorch says -> what to do.
_CAUSES = {
    "derivative for aten::_scaled_dot_product": (
        "fused attention has no second derivative, " + _SECOND.format("set attention=math on the learner")
    ),
    "does not currently support double backward": _COMPILED,
    "was compiled with": _COMPILED,
    "use_reentrant=True": "checkpoint the learner with use_reentrant=False",
    "torch.utils.checkpoint: ": (
        "checkpointing recomputed a block from other parameters than the first pass had; in task.trunk() call the "
        "module itself, not functional_call, and in task.tail() pass the parameters to checkpoint() as arguments"
    ),
}


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What a learner cannot support, as a ValueError that names the fix."""
    try:
        yield
    except RuntimeError as error:
        for part, advice in _CAUSES.items():
            if part in str(error):
                raise ValueError(f"this learner does not support the engine: {advice}") from error
        raise


ENGINES: dict[str, Engine] = {
    "linear": linear,
    "finite_difference": finite_difference,
    "double_backward": double_backward,
}
"""By name, the cheapest first; `linear` is for a `LinearTask` only."""
