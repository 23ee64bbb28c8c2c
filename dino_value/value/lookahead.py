"""Lookahead: a direction that is not one gradient, but where the labels would take the learner.

A *shadow* of θ_S, and copies of the heads, take m steps of an ordinary optimizer on the labels' loss; then
u = θ_S − θ_S′, and the shadow is thrown away. The heads repair themselves within those steps, curvature and the
optimizer are in u, and u points where fine-tuning would go. With one step of SGD and fixed heads u is η·g_down, so
`dot` is a special case; on a quadratic it is (I − (I − ηH)^m) H⁻¹ g_down. Many inner steps as one direction is
the idea of Reptile (Nichol et al., 2018, arXiv 1803.02999) and of the Lookahead optimizer (Zhang et al., 2019, arXiv
1907.08610).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dino_value.value.directions import Gradient
from dino_value.value.scope import with_values

Loss = Callable[[dict[str, Tensor]], Tensor]
"""Values of θ_S by name -> the labels' loss on one batch, a scalar. It reads the heads that `lookahead` trains."""

OPTIMIZERS = ("adamw", "sgd")


class Shadow(NamedTuple):
    """Where the labels took a copy of θ_S."""

    u: Gradient
    """θ_S − θ_S′, detached: descending along it is moving towards the shadow."""
    before: Tensor
    """The first batch's loss at the start; 0-dim, detached."""
    after: Tensor
    """The same batch's loss at the shadow: not below `before`, the lookahead has diverged or its rate is too low."""


def lookahead(
    losses: Sequence[Loss],
    parameters: dict[str, Tensor],
    heads: Sequence[Tensor] = (),
    *,
    lr: float,
    heads_lr: float | None = None,
    optimizer: str = "adamw",
) -> Shadow:
    """One step on each of `losses` from θ_S, and how far they led. Reads `parameters`, writes only to `heads`.

    Nothing is reduced over ranks: where several give the same losses, they have the same shadow.

    Args:
        losses: one a step, so their number is m. They may share what was computed once, such as the trunk's output.
        parameters: θ_S by name; never written to.
        heads: what is trained beside the shadow, in place: copies, unless the caller wants them fitted.
        lr: of the shadow; `heads_lr` of the heads, the same by default. No weight decay, no schedule.
        optimizer: `adamw` or `sgd`, from its first step: nothing is carried over between calls.

    Raises:
        ValueError: no loss, another optimizer, or a rate whose steps are no float32.
    """
    if not losses:
        raise ValueError("a lookahead of no step: give at least one loss")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"lookahead optimizer {optimizer!r}: choose {', '.join(OPTIMIZERS)}")
    start = [value.detach() for value in parameters.values()]
    shadow = [value.clone().requires_grad_() for value in start]
    groups = [{"params": shadow, "lr": lr}]
    if heads:
        groups.append({"params": list(heads), "lr": lr if heads_lr is None else heads_lr})
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    descent = kind(groups, lr=lr, weight_decay=0.0, foreach=True)
    moved = with_values(parameters, shadow)
    before: Tensor | None = None
    with torch.enable_grad():
        for loss_of in losses:
            descent.zero_grad()
            loss = loss_of(moved)
            loss.backward(inputs=[*shadow, *heads])
            try:
                descent.step()
            except RuntimeError as error:
                if "overflow" not in str(error):
                    raise
                raise ValueError(f"it overflowed at a rate of {lr:g}; lower value.lookahead.lr") from None
            before = loss.detach() if before is None else before
    assert before is not None
    with torch.no_grad():
        after = losses[0](moved).detach()
        return Shadow(list(torch._foreach_sub(start, [value.detach() for value in shadow])), before, after)


def contrast(true: Gradient, shuffled: Gradient) -> Gradient:
    """What the labels themselves say: the direction of a lookahead less that of another on the same batches with
    shuffled labels, from the same heads. Where labels say nothing it is noise around zero."""
    return list(torch._foreach_sub(true, shuffled))
