"""Several feedback tasks: their gradients kept apart, then made one; and tasks that must not be harmed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_value.value.directions import Gradient, inner, norm, safe_reciprocal, weighted_sum


class _Rule(NamedTuple):
    weighting: str
    """The class in torchjd.aggregation that makes weights of a Gramian."""
    kind: str
    """`mean` or `sum`: of the rows, which the rule generalises; `cone`: it projects rows on their dual cone."""
    arguments: Mapping[str, float] = {}


_RULES = {
    "upgrad": _Rule("UPGradWeighting", "cone"),
    "dualproj": _Rule("DualProjWeighting", "cone"),
    "pcgrad": _Rule("PCGradWeighting", "sum"),
    "cagrad": _Rule("CAGradWeighting", "mean", {"c": 0.5}),
    "mgda": _Rule("MGDAWeighting", "mean"),
    "imtl_g": _Rule("IMTLGWeighting", "mean"),
    "aligned_mtl": _Rule("AlignedMTLWeighting", "mean"),
}

COMBINATIONS: tuple[str, ...] = ("weights", "normalised", *_RULES)
"""What `combine` knows by name:

    weights      Σ α_j g_j, the paper's
    normalised   Σ α_j g_j/‖g_j‖, times the mean ‖g_j‖: no task counts more because its gradient is longer
    upgrad       each α_j g_j projected to conflict with none, then summed (arXiv 2406.16232)
    dualproj     the sum, projected to conflict with none (GEM, arXiv 1706.08840)
    pcgrad       each α_j g_j projected off those it conflicts with, one by one, then summed (arXiv 2001.06782)
    cagrad       the sum, moved by at most half its length to help the least-served task (arXiv 2110.14048, c = 0.5)
    mgda         the shortest convex combination, zero if one task's gradient is (arXiv 1810.04650)
    imtl_g       an equal projection on every α_j g_j (Liu et al., ICLR 2021)
    aligned_mtl  the principal axes of the α_j g_j made equally long (arXiv 2305.19000)

NashMTL is left out: torchjd has it for whole Jacobians only, and with a state.
"""


def combine(
    gradients: Sequence[Gradient], weights: Sequence[float], method: str = "weights", seed: int = 0
) -> Gradient:
    """One g_down of the gradients of several feedback tasks; a single task is α₁g₁ under every method.

    The conflict-aware rules see the m×m Gramian of the α_j g_j only, never an m×|S| Jacobian. torchjd states most of
    them for the mean of the tasks; here they are multiplied by m, so that upgrad, dualproj and pcgrad *are* Σ α_j g_j
    when no two tasks conflict. They solve on the host: one wait for the device per call. `weights` and `normalised`
    wait for nothing. A task of weight 0 takes no part.

    Args:
        gradients: one per task, each a list of one tensor per parameter of S; left unchanged.
        weights: α_j.
        method: a name of `COMBINATIONS`.
        seed: of the rules that draw (pcgrad: the order of projections, for three tasks or more); the same on every
            rank, for example the step.

    Raises:
        ValueError: no gradient, another number of weights, an unknown method, or (conflict-aware rules) a gradient that
            is not finite.
        ImportError: the method needs torchjd.
    """
    if not gradients or len(gradients) != len(weights):
        raise ValueError(f"{len(gradients)} feedback gradients, {len(weights)} weights: give one weight for each task")
    check_method(method)
    used = [j for j, weight in enumerate(weights) if weight != 0]
    if method == "weights" or len(used) < 2:
        return weighted_sum(gradients, weights)
    gradients, weights = [gradients[j] for j in used], [weights[j] for j in used]
    if method == "normalised":
        norms = torch.stack([norm(gradient) for gradient in gradients])
        shares = (safe_reciprocal(norms) * norms.mean()).unbind()
        return weighted_sum(gradients, [share * weight for share, weight in zip(shares, weights, strict=True)])
    return weighted_sum(gradients, _conflict_aware(gradients, weights, method, seed))


def check_method(method: str) -> None:
    """Whether `combine` can run `method` here: for the start of a run, before anything is trained.

    Raises:
        ValueError: an unknown name; the known ones are listed.
        ImportError: the packages of the extra `torchjd` are missing.
    """
    if method not in COMBINATIONS:
        raise ValueError(f"unknown combination {method!r}; choose one of {', '.join(COMBINATIONS)}")
    if method in _RULES:
        _weighting(method)


def _weighting(method: str, **arguments: Tensor) -> Any:
    rule = _RULES[method]
    try:
        from torchjd import aggregation

        # Also an ImportError where a rule's own solver is missing.
        return getattr(aggregation, rule.weighting)(**rule.arguments, **arguments)
    except ImportError as error:
        raise ImportError(
            f"the combination {method!r} needs more packages: pip install 'dino-value[torchjd]' ({error})"
        ) from error


def _conflict_aware(gradients: Sequence[Gradient], weights: Sequence[float], method: str, seed: int) -> list[float]:
    count = len(gradients)
    products = torch.stack([inner(gradients[j], gradients[k]) for j in range(count) for k in range(j + 1)])
    gramian = torch.zeros(count, count, dtype=torch.float64)
    row, column = torch.tril_indices(count, count)
    gramian[row, column] = gramian[column, row] = products.to("cpu", torch.float64)
    bad = [j for j, square in enumerate(gramian.diagonal().tolist()) if not math.isfinite(square)]
    if bad:
        raise ValueError(f"the gradients of feedback tasks {bad} are not finite")
    alpha = torch.tensor(weights, dtype=torch.float64)
    gramian *= alpha[:, None] * alpha
    rule = _RULES[method]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if rule.kind == "cone":
            # A cone knows no lengths, but torchjd's solver adds 1e-4 to the diagonal of the Gramian, which drowns a
            # short gradient among long ones. So: rows of length one, asked for in the proportion of their lengths.
            lengths = gramian.diagonal().sqrt()
            unit = safe_reciprocal(lengths)
            found: Tensor = _weighting(method, pref_vector=lengths)(gramian * unit[:, None] * unit) * unit
        else:
            # The rules are blind to a common scale; their thresholds are not.
            found = _weighting(method)(gramian * safe_reciprocal(gramian.trace()))
    return (found * alpha * (count if rule.kind == "mean" else 1)).tolist()


class Guard:
    """A guard task, held to V_guard ≥ 0 by dual ascent: u ← u + λ·(‖u‖/‖g_guard‖)·g_guard, with a multiplier λ ≥ 0.

    λ has no unit: it is the length of the added part, in lengths of u. With c = cos(g_guard, g_pre) it is
    max(0, Λ − damping·c), where Λ ← max(0, Λ − rate·c) sums up the violations. Dual ascent alone (damping 0) swings
    around the bound, worst with the cosine direction; the term in the present c settles it (arXiv 2007.03964). It moves
    on the device, and nothing waits for it.

    Several guards: one each, applied one after another. A guard that no task can satisfy grows without bound, until u
    serves it alone: watch `multiplier`.

    Args:
        rate: how much Λ changes per value step and unit of cosine.
        device: where λ lives.
        damping: λ's answer to the present violation.
    """

    def __init__(self, rate: float, device: torch.device | str | None = None, damping: float = 3.0) -> None:
        if not 0 < rate < math.inf:
            raise ValueError(f"guard rate {rate}: it is how fast the multiplier moves; choose a positive number")
        if not 0 <= damping < math.inf:
            raise ValueError(f"guard damping {damping}: choose a number that is not negative; 0 is plain dual ascent")
        self.rate, self.damping = rate, damping
        self.multiplier = torch.zeros((), device=device)
        self._violations = torch.zeros((), device=device)

    @torch.no_grad()
    def direct(self, u: Gradient, g_guard: Gradient) -> Gradient:
        """The direction u, turned towards the guard's gradient; a zero gradient turns nothing."""
        factor = self.multiplier * norm(u) * safe_reciprocal(norm(g_guard))
        return weighted_sum([u, g_guard], [torch.ones_like(factor), factor])

    @torch.no_grad()
    def update(self, cosine: Tensor) -> None:
        """Move λ by what the last task did to the guard; a cosine that is not finite changes nothing.

        Args:
            cosine: cos(g_guard, g_pre), 0-dim; the same on every rank.
        """
        cosine = cosine.to(self.multiplier)
        known = cosine.isfinite()
        violations = (self._violations - self.rate * cosine).clamp_min(0)
        self.multiplier = torch.where(known, (violations - self.damping * cosine).clamp_min(0), self.multiplier)
        self._violations = torch.where(known, violations, self._violations)

    def state_dict(self) -> dict[str, Tensor]:
        return {"multiplier": self.multiplier, "violations": self._violations}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._violations = state["violations"].to(self.multiplier, copy=True)
        self.multiplier = state["multiplier"].to(self.multiplier, copy=True)
