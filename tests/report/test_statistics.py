from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from dino_value.errors import UserError
from dino_value.report.statistics import (
    arms_of,
    bootstrap_interval,
    compare,
    compare_all,
    headline,
    metric_of,
    summarise,
)


def two_arms(key: str, value: Sequence[float | None], baseline: Sequence[float | None]) -> dict[str, object]:
    return {"arms": {"baseline": {key: baseline}, "value": {key: value}}}


def test_summary_by_hand() -> None:
    summary = summarise(np.array([1.0, 2.0, 6.0]))
    assert summary.mean == 3
    assert summary.n == 3
    assert summary.sd == pytest.approx(math.sqrt((4 + 1 + 9) / 2))


def test_summary_shows_no_spread_where_there_is_none() -> None:
    miou = metric_of("miou")
    assert summarise(np.array([0.2376])).show(miou) == "23.76"
    assert summarise(np.array([0.1, 0.1, 0.1])).show(miou) == "10.00"
    assert summarise(np.array([0.2, 0.3])).show(miou) == "25.00 ± 7.07"
    assert summarise(np.array([np.nan])).show(miou) == "n/a"


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_interval_against_a_naive_bootstrap(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.3, 1, n)
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    generator = np.random.default_rng(123)
    means = sorted(np.mean([differences[generator.integers(n)] for _ in range(n)]) for _ in range(20_000))
    naive = np.quantile(means, [tail, 1 - tail])
    found = bootstrap_interval(differences)
    assert found is not None
    assert found == pytest.approx(tuple(naive), abs=0.12 * float(np.ptp(differences)))
    assert found == bootstrap_interval(differences)  # seeded


def test_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        interval = bootstrap_interval(generator.normal(0, 1, 5), resamples=3000)
        assert interval is not None
        hits += interval[0] <= 0 <= interval[1]
    assert 0.87 < hits / 400 < 0.98


def test_interval_of_two_is_their_range_and_of_one_is_none() -> None:
    assert bootstrap_interval(np.array([0.5, -0.25])) == (-0.25, 0.5)
    assert bootstrap_interval(np.array([0.5])) is None


def test_win_null_and_loss(results: dict[str, object]) -> None:
    win = compare(results, "value", "baseline", "miou")
    assert (win.outcome, win.wins, win.n) == ("better", 5, 5)
    assert win.difference == pytest.approx(0.017)
    assert win.sentence.startswith("value beats baseline on mIoU: 5/5 seeds, +1.70 points [+1.")

    null = compare(results, "value", "baseline", "rmse")
    assert (null.outcome, null.wins) == ("unclear", 3)
    assert null.sentence.startswith(
        "value vs baseline on depth RMSE (lower is better): no clear difference, 3/5 seeds, -0.0026 m [-0."
    )

    loss = compare(results, "value", "baseline", "top1")
    assert (loss.outcome, loss.wins) == ("worse", 0)
    assert loss.sentence.startswith("value is worse than baseline on top-1: 0/5 seeds, -1.40 points [-")


def test_lower_is_better_turns_the_sign() -> None:
    lower = [0.50, 0.51, 0.52, 0.49, 0.50]
    higher = [0.60, 0.62, 0.61, 0.60, 0.59]
    for key in ("rmse", "absrel", "loss", "loss_seg"):
        assert compare(two_arms(key, lower, higher), "value", "baseline", key).outcome == "better"
    for key in ("miou", "top1", "delta1"):
        assert compare(two_arms(key, lower, higher), "value", "baseline", key).outcome == "worse"


def test_one_seed_and_few_seeds_claim_nothing() -> None:
    one = compare(two_arms("miou", [0.244], [0.232]), "value", "baseline", "miou")
    assert one.outcome == "one seed"
    assert one.interval is None
    assert one.sentence == "value vs baseline on mIoU: one seed only: +1.20 points, no interval can be given."
    few = compare(two_arms("miou", [0.25, 0.26, 0.27], [0.23, 0.23, 0.23]), "value", "baseline", "miou")
    assert few.outcome == "few seeds"
    assert "too few seeds for a claim (5 needed), 3/3 seeds, +3.00 points [+2.00, +4.00]" in few.sentence


def test_equal_arms_are_no_difference_and_show_no_negative_zero() -> None:
    same = compare(two_arms("miou", [0.2] * 5, [0.2] * 5), "value", "baseline", "miou")
    assert same.outcome == "unclear"
    assert same.wins == 0
    assert "-0.00" not in same.sentence
    assert metric_of("miou").show_difference(-1e-9) == "+0.00"


def test_missing_values_are_left_out_and_told() -> None:
    values = [0.25, None, 0.27, 0.26, 0.25, 0.26]
    found = compare(two_arms("miou", values, [0.23] * 6), "value", "baseline", "miou")
    assert (found.n, found.left_out, found.outcome) == (5, 1, "better")
    assert found.sentence.endswith("(1 left out: no value).")
    nothing = compare(two_arms("miou", [None], [0.2]), "value", "baseline", "miou")
    assert nothing.outcome == "no data"


def test_claims_and_headline(results: dict[str, object]) -> None:
    comparisons = compare_all(results)
    assert [(c.arm, c.against) for c in comparisons[::3]] == [
        ("value", "baseline"),
        ("value", "random"),
        ("value", "step0"),
        ("baseline", "step0"),
    ]
    told = headline(comparisons)
    assert told.startswith("Over 5 paired seeds, value beats baseline and random on mIoU but is worse on ")
    assert "beats step 0 on mIoU, depth RMSE and top-1." in told
    one_seed = {"arms": {a: {k: v[:1] for k, v in row.items()} for a, row in results["arms"].items()}}  # type: ignore[attr-defined]
    assert headline(compare_all(one_seed)).startswith("One seed only")


def test_arms_are_ordered_step0_first(results: dict[str, object]) -> None:
    assert list(arms_of(results)) == ["step0", "baseline", "random", "value"]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({}, 'no "arms"'),
        ({"arms": {"value": {"miou": [0.1, 0.2]}, "baseline": {"miou": [0.1]}}}, "cannot be paired"),
        ({"arms": {"value": {"accuracyy": [0.1]}}}, "accuracyy"),
        ({"arms": {"value": {"miou": []}}}, "one number a seed"),
        ({"arms": {"value": {"miou": ["x"]}}}, "one number a seed"),
        ({"arms": {"value": {"miou": 0.1}}}, "one number a seed"),
        ({"arms": {"value": {"miou": [23.8]}}}, "fractions"),
        ({"arms": {"value": {}}}, "no metric"),
    ],
)
def test_bad_results_get_one_clear_line(bad: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        arms_of(bad)
    assert "\n" not in str(error.value)


def test_comparing_a_missing_arm_names_it(results: dict[str, object]) -> None:
    with pytest.raises(UserError, match="'adios'"):
        compare(results, "adios", "baseline", "miou")
