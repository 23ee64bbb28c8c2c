"""Direction u: what "valuable" means. One tensor per parameter of S, detached: frozen while φ is differentiated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

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


def safe_reciprocal(x: Tensor) -> Tensor:
    """1/x for a norm x ≥ 0, and 0 where there is nothing to divide by: a zero gradient stays zero, never NaN."""
    return torch.where(x > _TINY, 1 / x.clamp_min(_TINY), 0)


def weighted_sum(gradients: Sequence[Gradient], weights: Sequence[float | Tensor]) -> Gradient:
    """Σ_j w_j g_j; the weights are numbers or 0-dim tensors."""
    total = list(torch._foreach_mul(gradients[0], weights[0]))
    for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
        torch._foreach_add_(total, torch._foreach_mul(gradient, weight))
    return total


def dot(g_down: Gradient, g_pre: Gradient) -> Gradient:
    """u = g_down: V is the first-order decrease of the downstream loss under an SGD step (v1, eq. 4)."""
    return g_down


def cosine(g_down: Gradient, g_pre: Gradient) -> Gradient:
    """u = g_d/(‖g_d‖‖g_p‖) − cos·g_p/‖g_p‖²: the gradient of cos(g_d, g_p) with respect to g_p.

    Unlike `dot` it cannot be raised by inflating ‖g_pre‖, which the learner's optimizer would cancel.
    """
    per_down, per_pre = safe_reciprocal(norm(g_down)), safe_reciprocal(norm(g_pre))
    cos = inner(g_down, g_pre) * per_down * per_pre
    along = torch._foreach_mul(g_down, per_down * per_pre)
    return list(torch._foreach_sub(along, torch._foreach_mul(g_pre, cos * per_pre**2)))


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


class AdamState(NamedTuple):
    """What Adam remembers of the parameters of S: lists of one entry per parameter.

    The tensors are the optimizer's own, so they follow its steps; after `optimizer.load_state_dict` take a new one.
    """

    exp_avg: Gradient
    """m, the running mean of the gradient."""
    exp_avg_sq: Gradient
    """v, the running mean of its square."""
    step: list[Tensor]
    """Updates taken so far, 0-dim; on the device when the optimizer is fused or capturable."""
    betas: list[tuple[float, float]]
    eps: list[float]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> AdamState:
        """The state of `parameters`, the module's own tensors, in torch.optim.Adam or AdamW.

        Raises:
            ValueError: another optimizer; amsgrad, maximize or Adam's coupled weight decay; a parameter that is in no
                group or has no state yet.
        """
        if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            found = type(optimizer).__name__
            raise ValueError(f"the adam direction reads torch.optim.Adam or AdamW, not {found}; choose dot or cosine")
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        state = cls([], [], [], [], [])
        for index, parameter in enumerate(parameters):
            which = f"parameter {index} of the scope, shape {list(parameter.shape)},"
            group = groups.get(id(parameter))
            if group is None:
                raise ValueError(
                    f"{which} is in no group of the optimizer; pass the module's own parameters, not detached ones, "
                    "and keep the scope to what the learner trains"
                )
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"the adam direction does not know {option}=True; set it to False")
            decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
            if group["weight_decay"] != 0 and not decoupled:
                raise ValueError("the adam direction leaves out decoupled weight decay only; use torch.optim.AdamW")
            memory = optimizer.state.get(parameter)
            if not memory or "exp_avg" not in memory:
                raise ValueError(
                    f"{which} has no optimizer state yet; take one learner step first, for example value.burn_in=1"
                )
            state.exp_avg.append(memory["exp_avg"])
            state.exp_avg_sq.append(memory["exp_avg_sq"])
            state.step.append(memory["step"])
            state.betas.append((float(group["betas"][0]), float(group["betas"][1])))
            state.eps.append(float(group["eps"]))
        return state


class _NextStep(NamedTuple):
    """The parts of Adam's next update."""

    gradient: Gradient
    mean: Gradient
    root: Gradient
    """√v̂, at least a tiny number."""
    denominator: Gradient
    """√v̂ + ε."""
    correction1: list[Tensor]
    """1 − β₁ᵗ, 0-dim."""
    correction2: list[Tensor]


def _correction(step: Gradient, betas: Sequence[float]) -> list[Tensor]:
    # 1 − βᵗ as −expm1(t ln β), which keeps its digits in float32 when β is near 1.
    logarithms = [math.log(beta) if beta > 0 else -math.inf for beta in betas]
    result = list(torch._foreach_expm1(torch._foreach_mul(step, logarithms)))
    torch._foreach_neg_(result)
    return result


def _next_step(state: AdamState, g_pre: Gradient, scale: float | Tensor) -> _NextStep:
    beta1, beta2 = (list(betas) for betas in zip(*state.betas, strict=True))
    dtype = torch.promote_types(state.exp_avg[0].dtype, torch.float32)
    step = list(torch._foreach_add([count.to(dtype) for count in state.step], 1))
    correction1, correction2 = _correction(step, beta1), _correction(step, beta2)
    gradient = list(torch._foreach_mul(g_pre, scale))
    mean = list(torch._foreach_mul(state.exp_avg, beta1))
    torch._foreach_add_(mean, torch._foreach_mul(gradient, [1 - beta for beta in beta1]))
    root = list(torch._foreach_mul(state.exp_avg_sq, beta2))
    torch._foreach_addcmul_(root, gradient, gradient, [1 - beta for beta in beta2])
    torch._foreach_div_(root, correction2)
    torch._foreach_sqrt_(root)
    torch._foreach_clamp_min_(root, _TINY)
    denominator = list(torch._foreach_add(root, state.eps))
    return _NextStep(gradient, mean, root, denominator, correction1, correction2)


@torch.no_grad()
def adam_update(state: AdamState, g_pre: Gradient, scale: float | Tensor = 1.0) -> Gradient:
    """d/η = −m̂/(√v̂ + ε): what Adam's next step on scale·g_pre adds to the parameters, per unit of learning rate.

    AdamW's weight decay is left out: it does not depend on g_pre. The optimizer's state is read, not changed.
    """
    parts = _next_step(state, g_pre, scale)
    update = torch._foreach_div(parts.mean, parts.denominator)
    torch._foreach_div_(update, parts.correction1)
    torch._foreach_neg_(update)
    return list(update)


def adam(state: AdamState, scale: float | Tensor = 1.0) -> Direction:
    """u_i = −g_down,i · ∂d_i/∂g_pre,i / η: `dot` for a learner that takes Adam's step d, not SGD's (method, section 2).

    d is the realised update on scale·g_pre (`adam_update`), the next one after `state`, bias correction and ε included.

    Args:
        scale: the coefficient by which gradient clipping shortens g_pre, a number or a 0-dim tensor; held constant.
    """

    @torch.no_grad()
    def direction(g_down: Gradient, g_pre: Gradient) -> Gradient:
        # With m = β₁m₀ + (1−β₁)g and v = β₂v₀ + (1−β₂)g², and b₁, b₂ the corrections, the terms in g² cancel:
        # −∂d/∂g/η = ([(1−β₁)β₂v₀ − (1−β₂)β₁m₀g] / (b₂√v̂) + (1−β₁)ε) / (b₁(√v̂+ε)²).
        parts = _next_step(state, g_pre, scale)
        slope = torch._foreach_mul(state.exp_avg_sq, [(1 - beta1) * beta2 for beta1, beta2 in state.betas])
        moment = torch._foreach_mul(state.exp_avg, parts.gradient)
        torch._foreach_mul_(moment, [(1 - beta2) * beta1 for beta1, beta2 in state.betas])
        torch._foreach_sub_(slope, moment)
        for divisor in (parts.correction2, parts.root):
            torch._foreach_div_(slope, divisor)
        torch._foreach_add_(slope, [(1 - beta1) * eps for (beta1, _), eps in zip(state.betas, state.eps, strict=True)])
        # Twice by the denominator: its square can underflow.
        for divisor in (parts.denominator, parts.denominator, parts.correction1):
            torch._foreach_div_(slope, divisor)
        torch._foreach_mul_(slope, scale)
        return list(torch._foreach_mul(g_down, slope))

    return direction


DIRECTIONS: dict[str, Direction] = {"dot": dot, "cosine": cosine, "random": random}
