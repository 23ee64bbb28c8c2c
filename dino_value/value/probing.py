"""The value probe: does V foretell what one step does to the downstream loss?

To first order a step Δ lowers L_down by −⟨g_down, Δ⟩, which is ηV for SGD (v1, eq. 4). A trial takes one step from θ
and sets that prediction beside the decrease that held-out feedback sees; Pearson's r over many trials, each with its
own unlabeled batch, says how well value ranks tasks. The paper has r = .657 in language, with an SGD-like step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_value.value.directions import Gradient, inner
from dino_value.value.scope import with_values

Downstream = Callable[[dict[str, Tensor]], Tensor]
"""Values of θ_S by name -> the scalar loss on held-out feedback. The same every time: no dropout, a fixed batch."""


class Trial(NamedTuple):
    """Scalars on the device, detached."""

    value: Tensor
    """V = ⟨g_down, g_pre⟩: what the designer climbs, whatever the optimizer makes of it."""
    predicted: Tensor
    """−⟨g_down, Δ⟩: the first-order decrease; ηV for SGD."""
    realised: Tensor
    """L_down(θ) − L_down(θ + Δ), float64."""


def probe(
    downstream: Downstream,
    parameters: dict[str, Tensor],
    g_down: Gradient,
    g_pre: Gradient,
    update: Gradient,
    before: Tensor | None = None,
) -> Trial:
    """One trial: the predicted and the realised decrease of the downstream loss in one step.

    The losses are taken without autocast and in the parameters' own dtype, and subtracted in float64. A float32 loss
    still carries a relative rounding of about 1e-7: where the decrease is not far above 1e-7 · L_down, take a larger
    step or float64 parameters. `predicted` may well come from another feedback sample than `realised`; that it does
    is what makes the probe more than a check of autograd.

    Args:
        downstream: no graph is recorded.
        parameters: θ_S by name, detached.
        g_down, g_pre: one tensor per parameter of S.
        update: Δ, one tensor per parameter of S: `sgd_update` or `optimizer_update`.
        before: L_down(θ), when several trials start from one θ.

    Raises:
        ValueError: parameters in half precision, where θ + Δ mostly rounds back to θ.
    """
    low = next((name for name, value in parameters.items() if value.dtype in (torch.bfloat16, torch.float16)), None)
    if low is not None:
        raise ValueError(f"probe: {low} is {parameters[low].dtype}, too coarse for one step; give a float32 copy of θ")
    base = list(parameters.values())
    with torch.no_grad(), torch.autocast(base[0].device.type, enabled=False):
        start = downstream(parameters) if before is None else before
        end = downstream(with_values(parameters, torch._foreach_add(base, update)))
    return Trial(inner(g_down, g_pre), -inner(g_down, update), start.double() - end.double())


def sgd_update(g_pre: Gradient, lr: float) -> Gradient:
    """Δ = −η g_pre."""
    return list(torch._foreach_mul(g_pre, -lr))


def optimizer_update(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], g_pre: Gradient) -> Gradient:
    """Δ that `optimizer` would make of g_pre in its present state, weight decay included; it is not stepped itself.

    A copy of the optimizer takes the step, so one more of all its parameters and state is held for a moment. Clip
    g_pre beforehand if the run does. Parameters outside S have no gradient and stay.

    Args:
        parameters: the learner's own tensors of S, in g_pre's order.

    Raises:
        ValueError: a parameter of S that the optimizer does not hold.
    """
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    twin = copy.deepcopy(optimizer)
    twins = {
        id(parameter): copied
        for parameter, copied in zip(held, (p for group in twin.param_groups for p in group["params"]), strict=True)
    }
    if missing := [index for index, parameter in enumerate(parameters) if id(parameter) not in twins]:
        raise ValueError(
            f"probe: the optimizer does not hold tensors {missing[:3]} of S; give the learner's own, not copies"
        )
    twin.zero_grad()
    for parameter, gradient in zip(parameters, g_pre, strict=True):
        twins[id(parameter)].grad = gradient.clone()
    twin.step()
    with torch.no_grad():
        return list(torch._foreach_sub([twins[id(parameter)] for parameter in parameters], list(parameters)))


class ProbeResult(NamedTuple):
    """n trials, float64 on the CPU."""

    value: Tensor
    """[n]"""
    predicted: Tensor
    """[n]"""
    realised: Tensor
    """[n]"""

    @classmethod
    def of(cls, trials: Iterable[Trial]) -> ProbeResult:
        """Raises ValueError when there are no trials."""
        columns = list(zip(*trials, strict=True))
        if not columns:
            raise ValueError("probe: no trials")
        return cls(*(torch.stack([part.detach().double() for part in column]).cpu() for column in columns))

    def summary(self) -> dict[str, Any]:
        """r with its interval, slope and means, and the columns themselves: what a file holds.

        Raises:
            ValueError: as `pearson`.
        """
        return {
            "pearson": pearson(self.predicted, self.realised),
            "interval": list(bootstrap_interval(self.predicted, self.realised)),
            "slope": slope(self.predicted, self.realised),
            "mean_predicted": float(self.predicted.mean()),
            "mean_realised": float(self.realised.mean()),
            **{name: column.tolist() for name, column in self._asdict().items()},
        }


def pearson(predicted: Tensor, realised: Tensor) -> float:
    """Pearson's r between two columns [n] of trials. Blind to scale: see `slope`.

    Raises:
        ValueError: fewer than three trials, columns of unlike length, numbers that are not finite, or a column that
            does not vary.
    """
    x, y = _columns(predicted, realised)
    return float(_pearson(x, y))


def slope(predicted: Tensor, realised: Tensor) -> float:
    """Least-squares slope of the realised on the predicted decrease: 1 where the first order is all there is.

    Raises:
        ValueError: as `pearson`.
    """
    x, y = (column - column.mean() for column in _columns(predicted, realised))
    return float((x @ y) / (x @ x))


def bootstrap_interval(
    predicted: Tensor, realised: Tensor, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """(low, high): the percentile bootstrap interval of Pearson's r; trials are drawn as pairs, with replacement.

    It takes trials to be independent, which needs an unlabeled batch each. Trials from one θ that share a feedback
    batch give the interval for that θ and that feedback. Draws in which a column does not vary have no r and are left
    out. With fewer than about 20 trials it is too narrow.

    Raises:
        ValueError: as `pearson`; or a level outside (0, 1), or no resamples.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"bootstrap: level {level} must lie between 0 and 1, resamples {resamples} above 0")
    x, y = _columns(predicted, realised)
    draws = torch.randint(len(x), (resamples, len(x)), generator=torch.Generator().manual_seed(seed))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=x.dtype)
    low, high = torch.nanquantile(_pearson(x[draws], y[draws]), tails).tolist()
    return low, high


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    """Over the last dimension; NaN where a column is constant."""
    undefined = _constant(x) | _constant(y)
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    r = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    return r.clamp(-1, 1).masked_fill(undefined, torch.nan)


def _constant(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)).norm(dim=-1) <= 1e-12 * x.norm(dim=-1)  # the mean itself is rounded


def _columns(predicted: Tensor, realised: Tensor) -> tuple[Tensor, Tensor]:
    x, y = predicted.detach().double().cpu(), realised.detach().double().cpu()
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"probe: predicted {list(x.shape)} and realised {list(y.shape)} must be one column each")
    if len(x) < 3:
        raise ValueError(f"probe: a correlation needs at least three trials, not {len(x)}")
    for name, column in (("predicted", x), ("realised", y)):
        if not bool(column.isfinite().all()):
            raise ValueError(f"probe: the {name} decrease of some trial is not finite; take a smaller step")
        if bool(_constant(column)):
            raise ValueError(f"probe: the {name} decrease is the same in all trials; vary the batch, or widen the step")
    return x, y
