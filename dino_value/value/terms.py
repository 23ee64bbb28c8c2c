"""A loss that is a mean of terms: the value of each term, and designers that need no parameters.

For L_pre = Σ w_i ℓ_i(θ_S) the value is Σ w_i v_i with v_i = ⟨u, ∇ℓ_i⟩, the directional derivative of one term: two tail
forwards without a graph give all of them (method section 2, "closed forms").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dino_value.value.directions import Gradient, norm
from dino_value.value.distributed import total
from dino_value.value.scope import with_values

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Terms = Callable[[dict[str, Tensor]], Tensor]
"""Values of θ_S by name -> ℓ, every term of the loss, of any shape."""

_TINY = 1e-20


@torch.no_grad()
def term_values(
    terms: Terms, parameters: dict[str, Tensor], u: Gradient, radius: float = 1e-2, derivative: str = "difference"
) -> Tensor:
    """v_i = ∂_ε ℓ_i(θ_S + εu): ⟨u, ∇ℓ_i⟩ for every term.

    Args:
        radius: of the difference, ε = radius/‖u‖. Larger than an engine's: here losses are subtracted, not their
            gradients, and float32 keeps seven digits of a loss.
        derivative: `difference`, a central one, two forwards of whatever kernels; or `jvp`, forward mode, exact up to
            rounding: one forward on math attention, as the fused kernels have no forward derivative.

    Returns:
        The shape of ℓ; detached.

    Raises:
        ValueError: another `derivative`.
    """
    if derivative == "jvp":
        with sdpa_kernel(SDPBackend.MATH):
            values: Tensor = torch.func.jvp(terms, (parameters,), (with_values(parameters, u),))[1]
        return values
    if derivative != "difference":
        raise ValueError(f"derivative={derivative}: choose difference or jvp")
    epsilon = radius / norm(u).clamp_min(_TINY)
    step = torch._foreach_mul(u, epsilon)
    base = list(parameters.values())
    ahead = terms(with_values(parameters, torch._foreach_add(base, step)))
    behind = terms(with_values(parameters, torch._foreach_sub(base, step)))
    return (ahead - behind) / (2 * epsilon)


@torch.no_grad()
def value_weights(
    values: Tensor,
    temperature: float,
    clip: float = 10.0,
    valid: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The closed-form designer w ∝ exp(v/τ): terms of high value count more. Detached, mean one over `valid` terms.

    Args:
        values: v, any shape.
        temperature: τ in standard deviations of v over the valid terms; infinity gives equal weights.
        clip: no weight is more than this many times, or less than this part of, that of a term of mean value.
        valid: bool, broadcastable to `values`; the weight of the other terms is 0.
        group: the ranks whose terms make up the loss, over which mean and deviation are taken; all by default.
    """
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid.expand_as(values)
    # In the dtype of the values: float32 counts exactly to 16 million, and one tensor is reduced for the two sums.
    summed, count = total(torch.stack([values.where(valid, 0).sum(), valid.sum().to(values.dtype)]), group)
    deviation = (values - summed / count).where(valid, 0)
    spread = (total(deviation.square().sum(), group) / count).sqrt().clamp_min(_TINY)
    weights = (deviation / (spread * temperature)).exp().clamp(1 / clip, clip).where(valid, 0)
    return weights * (count / total(weights.sum(), group))


@torch.no_grad()
def best_of(values: Tensor, candidates: int) -> Tensor:
    """The closed-form designer "best of n views": for every slot the candidate of highest value.

    Args:
        values: [slots·n B], candidates of one slot adjacent.
        candidates: n.

    Returns:
        Row indices [slots B] into `values`.
    """
    grouped = values.unflatten(0, (-1, candidates))
    first = torch.arange(len(grouped), device=values.device)[:, None] * candidates
    return first + grouped.argmax(1)
