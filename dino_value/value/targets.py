"""Targets moved towards where the labels would take the learner: the closed-form designer of a loss linear in them.

The cross-entropy −Σ_k q_k log p_k is linear in q, so of all targets near q the best is closed:

    q′ ∝ q · exp(s·Δ),    Δ_k = log p_{θ−u}(k) − log p_θ(k)   (or −D_k, D the derivative of log p along u)

the target of highest Σ q′ Δ − KL(q′‖q)/s. To first order in s the learner's step becomes g_pre + s·C u, with C the mean
over rows of the covariance under q of the scores ∇log p_k (the Fisher matrix where q = p). So the value of the step
along u grows by s·uᵀCu = s·mean Var_q(D), which is never below 0.

For a regression target y of unit variance the same is y′ = y + s·(f_{θ−u} − f_θ), with KL = ‖y′ − y‖²/2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dino_value.value.distributed import ranks, total

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ROUNDS = 8
"""Of the search for s: the last digit moves by less than a thousandth."""
LARGEST = 1e6
"""Of s, where Δ is so small that no s reaches the budget."""


def tilt(q: Tensor, delta: Tensor, strength: float | Tensor) -> Tensor:
    """q′ ∝ q·exp(s·Δ), [… K], over the last dimension; q and Δ may broadcast. Where q is 0, so is q′ (to rounding)."""
    return _tilted(_log(q), delta, strength)


class Mover:
    """Moves targets within a trust region, and remembers what that did.

    Args:
        budget: nats; the mean over rows of KL(q′‖q) is at or below it. None: no trust region.
        strength: s, or the most it may be where there is a budget. None: whatever the budget allows.
        scale: what Δ is multiplied by before it counts: 1/(2ε) for a central difference.
        relative: s in standard deviations of Δ under q (over all rows), for directions whose length means nothing.
        group: the ranks whose rows make up a batch; all by default.

    Raises:
        ValueError: neither budget nor strength, or one of them below 0.
    """

    def __init__(
        self,
        budget: float | None = None,
        strength: float | None = None,
        scale: float | Tensor = 1.0,
        relative: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        if budget is None and strength is None:
            raise ValueError("targets: give a budget in nats, a strength, or both")
        for name, value in (("budget", budget), ("strength", strength)):
            if value is not None and not value >= 0:
                raise ValueError(f"targets: {name} {value} is below 0")
        self.budget, self.strength, self.scale, self.relative, self.group = budget, strength, scale, relative, group
        self.spent: dict[str, Tensor] = {}
        """KL by part of the loss, mean over rows; 0-dim."""
        self.strengths: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}
        """Standard deviation of Δ under q: what s is to be compared with, and rounding."""
        self.plain: dict[str, Tensor] = {}
        """⟨u, ∇ℓ⟩ of every term with its target as it was; `moved` as it is now; `best` of the best target there is."""
        self.moved: dict[str, Tensor] = {}
        self.best: dict[str, Tensor] = {}

    @property
    def idle(self) -> bool:
        """Does it leave targets as they are? Then nothing needs to be computed for it."""
        return 0 in (self.budget, self.strength)

    @torch.no_grad()
    def distribution(self, part: str, q: Tensor, delta: Tensor, valid: Tensor | None = None) -> Tensor:
        """q′ [… K] of the rows of q [… K] by Δ [… K], which may broadcast.

        Args:
            part: of the loss, for the record.
            valid: bool, broadcastable to the rows: the others count nowhere and are tilted alike.
        """
        delta, log_q = delta * self.scale, _log(q)
        if valid is None:
            valid = torch.ones((), dtype=torch.bool, device=q.device)
        mean = (q * delta).sum(-1, keepdim=True)
        centred = delta - mean  # the same tilt, and sums that do not cancel
        variance = self._mean((q * centred.square()).sum(-1), valid)

        base = log_q.logsumexp(-1)

        def spent(strength: Tensor) -> Tensor:
            """KL(q′‖q) = s·E_{q′}[Δ] − log E_q[exp(s·Δ)]; rounding never makes it negative."""
            exponents = log_q + strength * centred
            partition = exponents.logsumexp(-1, keepdim=True)
            mean = (exponents.sub_(partition).exp_() * centred).sum(-1)
            return self._mean((strength * mean - partition[..., 0] + base).clamp_min(0), valid)

        self.spread[part] = variance.sqrt()
        strength = self._strength(variance, spent)
        moved = _tilted(log_q, centred, strength)
        self.strengths[part], self.spent[part] = strength, spent(strength)
        self.plain[part] = mean[..., 0]
        self.moved[part] = (moved * centred).sum(-1) + mean[..., 0]
        self.best[part] = delta.amax(-1)
        return moved

    @torch.no_grad()
    def point(self, part: str, y: Tensor, delta: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
        """y′ = y + s·Δ of rows [… D].

        Args:
            slope: −∂ℓ/∂f of every number of the prediction, for a target: for the record's ⟨u, ∇ℓ⟩.
        """
        delta = delta * self.scale
        variance = self._mean(delta.square().sum(-1), torch.ones((), dtype=torch.bool, device=y.device))
        self.spread[part] = variance.sqrt()
        strength = self._strength(variance, lambda s: s.square() * variance / 2)
        self.strengths[part], self.spent[part] = strength, strength.square() * variance / 2
        moved = y + strength * delta
        self.plain[part], self.moved[part] = ((slope(target) * delta).sum(-1) for target in (y, moved))
        return moved

    def _strength(self, variance: Tensor, spent: Callable[[Tensor], Tensor]) -> Tensor:
        asked = None
        if self.strength is not None:
            asked = variance.new_tensor(self.strength)
            if self.relative:
                asked = asked / variance.sqrt().clamp_min(torch.finfo(variance.dtype).tiny)
        if self.budget is None:
            assert asked is not None
            return asked
        return within(self.budget, variance, spent, asked)

    def _mean(self, rows: Tensor, valid: Tensor) -> Tensor:
        """Over the valid rows of all ranks."""
        valid = valid.expand_as(rows)
        sums = torch.stack([rows.where(valid, 0).sum(), valid.sum().to(rows.dtype)])
        if ranks(self.group) > 1:
            sums = total(sums, self.group)
        return sums[0] / sums[1].clamp_min(1)


def within(budget: float, variance: Tensor, spent: Callable[[Tensor], Tensor], most: Tensor | None = None) -> Tensor:
    """The largest s, to a thousandth, whose KL `spent(s)` is at or below `budget`; never one that is above.

    KL grows with s, near 0 as s²·variance/2: each round rescales s as if it always did, inside a bracket. Nothing waits
    for the device. A KL that is not finite counts as above.

    Args:
        most: an upper bound on s.
    """
    aim, tiny = budget * 0.9995, torch.finfo(variance.dtype).tiny
    top = variance.new_tensor(LARGEST) if most is None else most.clamp_max(LARGEST)
    low, high = torch.zeros_like(variance), top * 2
    guess = (2 * aim / variance.clamp_min(tiny)).sqrt().minimum(top)
    for _ in range(ROUNDS):
        cost = spent(guess)
        fits = cost <= budget
        low, high = torch.where(fits, guess, low), torch.where(fits, high, guess)
        better = guess * (aim / cost.clamp_min(tiny)).sqrt()
        inside = (better > low) & (better < high)
        guess = torch.where(inside, better, (low + high) / 2).minimum(top)
    return low


def _log(q: Tensor) -> Tensor:
    return q.clamp_min(torch.finfo(q.dtype).tiny).log()


def _tilted(log_q: Tensor, delta: Tensor, strength: float | Tensor) -> Tensor:
    return (log_q + strength * delta).softmax(-1)
