"""What a table of results allows one to say: paired differences, intervals and one sentence a claim.

Results are ``{"arms": {arm: {metric: [one value a seed]}}}``; position i of every list belongs to the same
seed, so arms are compared pairwise. ``starts`` beside ``arms`` says which start each seed continues: starts are
then a random effect, and what is claimed holds for another start too. Fractions (``miou``, ``top1``, ``delta1``) are
stored in [0, 1] and shown in percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from dino_value.errors import UserError

Array = NDArray[np.float64]
Results = Mapping[str, Any]
Outcome = Literal["better", "worse", "unclear", "few seeds", "one seed", "no data"]

MIN_SEEDS = 5
"""Fewer allow no claim: n seeds all agree by chance alone with probability 2^(1-n), 1 in 8 at n = 4."""

LEVEL = 0.95
STUDENT = "student_"
"""What the metrics of the student's backbone begin with; the others are the teacher's."""
ARM_ORDER = ("step0", "baseline", "random", "value")
CLAIMS = (("value", "baseline"), ("value", "random"), ("value", "step0"), ("baseline", "step0"))


@dataclass(frozen=True)
class Metric:
    """How one metric is read and shown: ``scale`` times the stored value, ``digits`` decimals, ``unit``."""

    key: str
    label: str
    higher_is_better: bool
    scale: float = 1.0
    digits: int = 4
    unit: str = ""
    difference_unit: str = ""

    @property
    def heading(self) -> str:
        """The name for a table's or an axis' head, such as ``mIoU (%) ↑``."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.label}{unit} {'↑' if self.higher_is_better else '↓'}"

    @property
    def preference(self) -> str:
        return "higher is better" if self.higher_is_better else "lower is better"

    def show(self, value: float) -> str:
        return f"{value * self.scale:.{self.digits}f}" if math.isfinite(value) else "n/a"

    def show_difference(self, value: float) -> str:
        shown = f"{value * self.scale:+.{self.digits}f}"
        return shown.replace("-", "+") if float(shown) == 0 else shown  # no "-0.00"


def _percent(key: str, label: str) -> Metric:
    return Metric(key, label, higher_is_better=True, scale=100.0, digits=2, unit="%", difference_unit=" points")


_METRICS = {
    m.key: m
    for m in (
        _percent("miou", "mIoU"),
        _percent("top1", "top-1"),
        _percent("knn_top1", "k-NN top-1"),
        _percent("delta1", "depth δ₁"),
        Metric("rmse", "depth RMSE", higher_is_better=False, unit="m", difference_unit=" m"),
        Metric("absrel", "depth AbsRel", higher_is_better=False),
        Metric("loss", "loss", higher_is_better=False),
        Metric("miou_loss", "segmentation loss", higher_is_better=False),
        Metric("rmse_loss", "depth loss", higher_is_better=False),
        Metric("top1_loss", "linear loss", higher_is_better=False),
        _percent("accuracy", "accuracy"),
        _percent("pass@1_exact", "Pass@1, exact match"),
        _percent("pass@1_verified", "Pass@1, math-verify"),
        Metric("rankme", "RankMe", higher_is_better=True, digits=1),
    )
}


def metric_of(key: str) -> Metric:
    """The metric called ``key``; any name with "loss" in it is a loss.

    What stands behind an @ says how it was measured, a number how many labels: ``miou@32_fine-tuned`` is
    "mIoU, 32 labels fine-tuned". Raises UserError for another name.
    """
    if key in _METRICS:
        return _METRICS[key]
    if key.startswith(STUDENT):
        plain = metric_of(key.removeprefix(STUDENT))
        return replace(plain, key=key, label=f"student's {plain.label}")
    name, _, measured = key.partition("@")
    if measured:
        words = (f"{word} labels" if word.isdigit() else word for word in measured.split("_"))
        plain = metric_of(name)
        return replace(plain, key=key, label=f"{plain.label}, {' '.join(words)}")
    if "loss" in key:
        return Metric(key, key.replace("_", " "), higher_is_better=False)
    raise UserError(f"results hold the metric {key!r}, and the report knows only {', '.join(_METRICS)} and losses")


def arm_label(arm: str) -> str:
    return "step 0" if arm == "step0" else arm


def order_arms(names: Iterable[str]) -> list[str]:
    """The standard arms first, step 0 at their head, then the others as they come."""
    names = list(names)
    return [a for a in ARM_ORDER if a in names] + [a for a in names if a not in ARM_ORDER]


def arms_of(results: Results) -> dict[str, dict[str, Array]]:
    """``results["arms"]`` checked and as arrays [seeds], step 0 first; a missing value (None) becomes NaN.

    Raises UserError when there is nothing to show, or when the lists of one metric differ in length (they
    could not be paired).
    """
    arms = results.get("arms")
    if not isinstance(arms, Mapping) or not arms:
        raise UserError('results have no "arms": expected {"arms": {arm: {metric: [one value a seed]}}}')
    table = {arm: {key: _values(arm, key, v) for key, v in arms[arm].items()} for arm in order_arms(arms)}
    keys = metrics_of(table)
    if not keys:
        raise UserError(f"results hold no metric for any of the arms {', '.join(table)}")
    for key in keys:
        lengths = {arm: len(row[key]) for arm, row in table.items() if key in row}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{arm} {n}" for arm, n in lengths.items())
            raise UserError(f"results for {key!r} cannot be paired: seeds per arm differ ({told}); evaluate all")
    return table


def _values(arm: str, key: str, values: Sequence[float | None]) -> Array:
    metric = metric_of(key)
    try:
        array = np.array([math.nan if v is None else v for v in values], dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 1 or not array.size:
        raise UserError(f"results of {arm!r}, metric {key!r}: expected one number a seed, found {values!r}")
    if metric.unit == "%" and np.nanmax(array, initial=0.0) > 1:
        raise UserError(f"results of {arm!r}, metric {key!r}: expected fractions in [0, 1], found {values!r}")
    return array


def metrics_of(arms: Mapping[str, Mapping[str, Array]]) -> list[str]:
    """The metrics that any arm has, in the order in which they first appear."""
    return list(dict.fromkeys(key for row in arms.values() for key in row))


def seeds_of(results: Results) -> int:
    return max(len(values) for row in arms_of(results).values() for values in row.values())


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n - 1) of the ``n`` finite values; ``sd`` is None if n < 2."""

    mean: float
    sd: float | None
    n: int

    def show(self, metric: Metric) -> str:
        """``23.76 ± 0.41``; the mean alone for one seed, or where every seed has the same value."""
        spread = f" ± {metric.show(self.sd)}" if self.sd else ""
        return metric.show(self.mean) + spread


def summarise(values: Array) -> Summary:
    values = values[np.isfinite(values)]
    if not values.size:
        return Summary(math.nan, None, 0)
    same = bool(np.all(values == values[0]))  # a rounding error in the mean is not a spread
    sd = None if values.size == 1 else 0.0 if same else float(values.std(ddof=1))
    return Summary(float(values[0] if same else values.mean()), sd, values.size)


@dataclass(frozen=True)
class Estimate:
    """A mean difference, its interval and the two-sided p-value of no difference; None where there is too little."""

    mean: float
    interval: tuple[float, float] | None = None
    p: float | None = None


def estimate(differences: Array, starts: Sequence[int] | None = None, level: float = LEVEL) -> Estimate:
    """Student's t over seeds, or over the means of starts.

    Seeds that share a start share its luck, so where there are several starts each counts once: the interval is then of
    a mean over all starts that there could be, with one freedom less than starts. It is exact where every start has as
    many seeds.

    Args:
        differences: [n], one a seed.
        starts: [n], the start of each seed; None, or the same for all: one start, of which the interval then is.
    """
    if starts is not None and len({*starts}) > 1:
        groups = np.asarray(starts)
        differences = np.array([differences[groups == one].mean() for one in sorted({*starts})])
    n = differences.size
    mean = float(differences.mean()) if n else math.nan
    if n < 2:
        return Estimate(mean)
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    if error <= 1e-12 * abs(mean):  # all alike
        return Estimate(mean, (mean, mean), 1.0 if mean == 0 else 0.0)
    half = float(student.ppf((1 + level) / 2, n - 1)) * error
    return Estimate(mean, (mean - half, mean + half), float(2 * student.sf(abs(mean) / error, n - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being many: below α with a chance of at most α that any of them is by luck (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """``arm`` minus ``against`` over the ``n`` seeds that have both.

    ``wins``: the seeds where ``arm`` is strictly better; ``left_out``: those where one has no value; ``effect``: the
    mean difference in standard deviations of the differences (Cohen's d_z), None where they do not vary; ``starts``:
    how many the seeds continue, 0 where that is not known; ``p``: of no difference, corrected for all claims of the
    page once `corrected` has seen them.
    """

    arm: str
    against: str
    metric: Metric
    difference: float
    interval: tuple[float, float] | None
    wins: int
    n: int
    left_out: int = 0
    effect: float | None = None
    starts: int = 0
    p: float | None = None

    @property
    def outcome(self) -> Outcome:
        if self.n == 0:
            return "no data"
        if self.interval is None:
            return "one seed"
        if self.n < MIN_SEEDS:
            return "few seeds"
        if self.p is None or self.p >= 1 - LEVEL:
            return "unclear"
        return "better" if (self.difference > 0) == self.metric.higher_is_better else "worse"

    @property
    def sentence(self) -> str:
        """The claim as one honest sentence; numbers are ``arm`` minus ``against`` in shown units."""
        verb = {"better": "beats", "worse": "is worse than"}.get(self.outcome, "vs")
        hint = "" if self.metric.higher_is_better else f" ({self.metric.preference})"
        head = f"{arm_label(self.arm)} {verb} {arm_label(self.against)} on {self.metric.label}{hint}"
        if self.outcome == "no data":
            return f"{head}: no seed has both values."
        size = self.metric.show_difference(self.difference) + self.metric.difference_unit
        if self.interval is None:
            return f"{head}: one seed only: {size}, no interval can be given."
        low, high = (self.metric.show_difference(x) for x in self.interval)
        of = f"{self.wins}/{self.n} seeds" + (f" of {self.starts} starts" if self.starts > 1 else "")
        chance = "" if self.p is None else f", p {_p(self.p)}"
        body = f"{of}, {size} [{low}, {high}]{chance}"
        if self.outcome == "unclear":
            body = f"no clear difference, {body}"
        elif self.outcome == "few seeds":
            body = f"too few seeds for a claim ({MIN_SEEDS} needed), {body}"
        missing = f" ({self.left_out} left out: no value)" if self.left_out else ""
        return f"{head}: {body}{missing}."


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def compare(results: Results, arm: str, against: str, key: str, *, level: float = LEVEL) -> Comparison:
    """Arm ``arm`` against arm ``against`` on metric ``key``, paired by seed. Raises UserError for a missing
    arm or metric, or where ``starts`` names none for a seed.
    """
    arms = arms_of(results)
    for name in (arm, against):
        if key not in arms.get(name, {}):
            raise UserError(f"results have no {key!r} for arm {name!r}; arms: {', '.join(arms)}")
    metric = metric_of(key)
    differences = arms[arm][key] - arms[against][key]
    starts = results.get("starts")
    if starts is not None and len(starts) != differences.size:
        raise UserError(f"results name {len(starts)} starts for {differences.size} seeds: give one a seed")
    valid = np.isfinite(differences)
    kept = differences[valid]
    ours = None if starts is None else [one for one, there in zip(starts, valid, strict=True) if there]
    found = estimate(kept, ours, level)
    return Comparison(
        arm=arm,
        against=against,
        metric=metric,
        difference=found.mean,
        interval=found.interval,
        wins=int(np.sum(kept > 0 if metric.higher_is_better else kept < 0)),
        n=kept.size,
        left_out=differences.size - kept.size,
        effect=float(kept.mean() / kept.std(ddof=1)) if kept.size > 1 and kept.std() > 0 else None,
        starts=0 if ours is None else len({*ours}),
        p=found.p,
    )


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same with p-values corrected for how many there are (Holm); intervals stay those of each alone."""
    told = [c for c in comparisons if c.p is not None]
    adjusted = iter(holm([c.p for c in told if c.p is not None]))
    return [c if c.p is None else replace(c, p=next(adjusted)) for c in comparisons]


def compare_all(results: Results, claims: Sequence[tuple[str, str]] = CLAIMS) -> list[Comparison]:
    """Every claim (arm, against) on every metric that both arms have, in the claims' order; p is corrected for all."""
    arms = arms_of(results)
    return corrected(
        [
            compare(results, arm, against, key)
            for arm, against in claims
            if arm in arms and against in arms
            for key in arms[arm]
            if key in arms[against]
        ]
    )


def headline(comparisons: Sequence[Comparison], arm: str = "value") -> str:
    """One sentence for the top of the page: where ``arm`` beats, or loses to, each arm it was compared to."""
    ours = [c for c in comparisons if c.arm == arm and c.n]
    if not ours:
        return f"No comparison of {arm_label(arm)} with another arm could be made."
    seeds = max(c.n for c in ours)
    if seeds == 1:
        return "One seed only: the differences below carry no interval, and nothing can be claimed from them."
    if seeds < MIN_SEEDS:
        return f"Only {seeds} seeds: too few for a claim ({MIN_SEEDS} needed); differences are descriptive."
    pairs = [[c for c in ours if c.against == other] for other in dict.fromkeys(c.against for c in ours)]
    alike: dict[tuple[Any, ...], list[list[Comparison]]] = {}  # arms of which the same is to be said
    for pair in pairs:
        alike.setdefault(tuple((c.metric.label, c.outcome) for c in pair), []).append(pair)
    parts = [
        _headline_part(_listed([arm_label(pair[0].against) for pair in group]), group[0]) for group in alike.values()
    ]
    return f"Over {seeds} paired seeds, {arm_label(arm)} {'; it '.join(parts)}."


def _headline_part(against: str, comparisons: Sequence[Comparison]) -> str:
    """Against one or more arms: ``beats baseline on mIoU but is worse on top-1 (no clear difference on ...)``."""
    better, worse = ([c.metric.label for c in comparisons if c.outcome == o] for o in ("better", "worse"))
    rest = [c.metric.label for c in comparisons if c.outcome not in ("better", "worse")]
    if not better and not worse:
        return f"cannot be told from {against} on {_listed(rest)}"
    told = f"beats {against} on {_listed(better)}" if better else f"is worse than {against} on {_listed(worse)}"
    if better and worse:
        told += f" but is worse on {_listed(worse)}"
    return told + (f" (no clear difference on {_listed(rest)})" if rest else "")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
