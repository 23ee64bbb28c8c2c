"""Targets moved towards where the labels would take the learner: the closed-form designer of a loss linear in them.

The cross-entropy −Σ_k q_k log p_k is linear in q, so of all targets near q the best is closed:

    q′ ∝ q · exp(s·Δ),    Δ_k = log p_{θ−u}(k) − log p_θ(k)   (or −D_k, D the derivative of log p along u)

the target of highest Σ q′ Δ − KL(q′‖q)/s. To first order in s the learner's step becomes g_pre + s·C u, with C the mean
over rows of the covariance under q of the scores ∇log p_k (the Fisher matrix where q = p). So the value of the step
along u grows by s·uᵀCu = s·mean Var_q(D), which is never below 0.

For a regression target y of unit variance the same is y′ = y + s·(f_{θ−u} − f_θ), with KL = ‖y′ − y‖²/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dino_value.value.distributed import ranks, total

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ROUNDS = 24
"""Of the search for s, at most: three or four where KL grows as it does near s = 0, more where q is peaked."""
NEAR = 0.999
"""Share of the budget at which the search ends."""
LARGEST = 1e6
"""Of s (where it is relative, in standard deviations of Δ), where Δ is so small that no s reaches the budget."""
_TINY = 1e-18
"""Below every standard deviation of Δ that float32 can square."""


def tilt(q: Tensor, delta: Tensor, strength: float | Tensor) -> Tensor:
    """q′ ∝ q·exp(s·Δ), [… K], over the last dimension; q and Δ may broadcast. Where q is 0, so is q′."""
    return _tilted(q.log(), delta, strength)


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
        delta, log_q = delta * self.scale, q.log()
        if valid is None:
            valid = torch.ones((), dtype=torch.bool, device=q.device)
        mean = (q * delta).sum(-1, keepdim=True)
        variance = self._mean((q * (delta - mean).square()).sum(-1), valid)
        # Δ against the row's largest: the same tilt, and however large s is, the largest keeps all of its digits.
        peak = delta.where(q > 0, -math.inf).amax(-1, keepdim=True)
        below = (delta - peak).where(q > 0, 0)
        base = log_q.logsumexp(-1)

        def spent(strength: Tensor) -> Tensor:
            """KL(q′‖q) = Σ q′·(s·Δ − log E_q[exp(s·Δ)]); rounding never makes it negative."""
            exponents = log_q + strength * below
            partition = exponents.logsumexp(-1, keepdim=True)
            ratios = strength * below - partition
            return self._mean(((exponents.sub_(partition).exp_() * ratios).sum(-1) + base).clamp_min(0), valid)

        self.spread[part] = variance.sqrt()
        strength = self._strength(variance, self._mean(below.amin(-1).square(), valid), spent)
        moved = _tilted(log_q, below, strength)
        self.strengths[part], self.spent[part] = strength, spent(strength)
        self.plain[part] = mean[..., 0]
        self.moved[part] = (moved * below).sum(-1) + peak[..., 0]
        self.best[part] = peak[..., 0]
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
        strength = self._strength(variance, 4 * variance, lambda s: s.square() * variance / 2)
        self.strengths[part], self.spent[part] = strength, strength.square() * variance / 2
        moved = y + strength * delta
        self.plain[part], self.moved[part] = ((slope(target) * delta).sum(-1) for target in (y, moved))
        return moved

    def _strength(self, variance: Tensor, spread: Tensor, spent: Callable[[Tensor], Tensor]) -> Tensor:
        unit = 1 / variance.sqrt().clamp_min(_TINY) if self.relative else torch.ones_like(variance)
        most = unit * (LARGEST if self.strength is None else min(self.strength, LARGEST))
        return most if self.budget is None else within(self.budget, variance, spread, spent, most)

    def _mean(self, rows: Tensor, valid: Tensor) -> Tensor:
        """Over the valid rows of all ranks."""
        valid = valid.expand_as(rows)
        sums = torch.stack([rows.where(valid, 0).sum(), valid.sum().to(rows.dtype)])
        if ranks(self.group) > 1:
            sums = total(sums, self.group)
        return sums[0] / sums[1].clamp_min(1)


def within(budget: float, variance: Tensor, spread: Tensor, spent: Callable[[Tensor], Tensor], most: Tensor) -> Tensor:
    """The largest s up to `most` whose KL `spent(s)` is at or below `budget`, to NEAR of it; never one that is above.

    KL is the integral of s·Var over s, so it never falls, is s²·variance/2 near 0, and below s²·spread/8 everywhere:
    that brackets the root, and logarithms of s and KL, nearly on a line, close in on it. Nothing waits for a GPU. A KL
    that is not finite counts as above.

    Args:
        variance: of Δ under q, mean over rows.
        spread: the square of Δ's range over a row, mean over rows.
    """
    tiny = torch.finfo(variance.dtype).tiny
    aim = budget * (1 + NEAR) / 2
    low = (8 * aim / spread.clamp_min(tiny)).sqrt().minimum(most)
    high = most
    # log(KL/aim) at both ends; below, an estimate for the first line
    under = (low.square() * variance.clamp_min(tiny) / 2 / aim).clamp_min(tiny).log()
    over = torch.full_like(most, math.inf)
    guess = (2 * aim / variance.clamp_min(tiny)).sqrt().minimum(most)
    before = torch.zeros_like(most)
    for _ in range(ROUNDS):
        cost = spent(guess)
        fits = cost <= budget
        done = fits & ((cost >= NEAR * budget) | (guess >= most))
        ratio, side = (cost / aim).clamp_min(tiny).log(), torch.where(fits, 1.0, -1.0).to(most.dtype)
        again = side == before  # an end that stays counts half: the line would close in from one side (Illinois)
        low, high, before = torch.where(fits, guess, low), torch.where(fits, high, guess), side
        under, over = (
            torch.where(fits, ratio, torch.where(again, under / 2, under)),
            torch.where(fits, torch.where(again, over / 2, over), ratio),
        )
        if not done.is_cuda and bool(done):
            break
        line = low * ((high / low).log() * under / (under - over)).exp()
        further = (guess * torch.where(again & fits, 16.0, (-ratio / 2).exp())).minimum(most)
        better = torch.where(over.isfinite(), line, further)
        inside = (better > low) & ((better < high) | over.isinf())
        guess = torch.where(done, guess, torch.where(inside, better, low.sqrt() * high.sqrt()))
    return low


def _tilted(log_q: Tensor, delta: Tensor, strength: float | Tensor) -> Tensor:
    return (log_q + strength * delta).softmax(-1)
