"""A loss that is a mean of terms: the value of each term, and designers that need no parameters.

For L_pre = Σ w_i ℓ_i(θ_S) the value is Σ w_i v_i with v_i = ⟨u, ∇ℓ_i⟩, the directional derivative of one term: two tail
forwards without a graph give all of them (method section 2, "closed forms").
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dino_value.value.directions import Gradient, norm
from dino_value.value.scope import with_values

Terms = Callable[[dict[str, Tensor]], Tensor]
"""Values of θ_S by name -> ℓ, every term of the loss, of any shape."""

_TINY = 1e-20


@torch.no_grad()
def term_values(terms: Terms, parameters: dict[str, Tensor], u: Gradient, radius: float = 1e-2) -> Tensor:
    """v_i = ∂_ε ℓ_i(θ_S + εu): ⟨u, ∇ℓ_i⟩ for every term, by a central difference with ε = radius/‖u‖.

    The radius is larger than an engine's: here losses are subtracted, not their gradients, and float32 keeps seven
    digits of a loss.

    Returns:
        The shape of ℓ; detached.
    """
    epsilon = radius / norm(u).clamp_min(_TINY)
    step = torch._foreach_mul(u, epsilon)
    base = list(parameters.values())
    ahead = terms(with_values(parameters, torch._foreach_add(base, step)))
    behind = terms(with_values(parameters, torch._foreach_sub(base, step)))
    return (ahead - behind) / (2 * epsilon)


@torch.no_grad()
def value_weights(values: Tensor, temperature: float, clip: float = 10.0, valid: Tensor | None = None) -> Tensor:
    """The closed-form designer w ∝ exp(v/τ): terms of high value count more. Detached, mean one over `valid` terms.

    Args:
        values: v, any shape.
        temperature: τ in standard deviations of v over the valid terms; infinity gives equal weights.
        clip: no weight is more than this many times, or less than this part of, that of a term of mean value.
        valid: bool, broadcastable to `values`; the weight of the other terms is 0.
    """
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid.expand_as(values)
    count = valid.sum()
    mean = values.where(valid, 0).sum() / count
    deviation = (values - mean).where(valid, 0)
    spread = (deviation.square().sum() / count).sqrt().clamp_min(_TINY)
    weights = (deviation / (spread * temperature)).exp().clamp(1 / clip, clip).where(valid, 0)
    return weights * (count / weights.sum())


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
