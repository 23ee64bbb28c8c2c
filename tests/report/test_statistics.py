from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from dino_value.errors import UserError
from dino_value.report.statistics import (
    Estimate,
    arms_of,
    compare,
    compare_all,
    estimate,
    headline,
    holm,
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
def test_estimate_is_the_paired_t_test(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.3, 1, n)
    known, found = stats.ttest_1samp(differences, 0), estimate(differences)
    assert found.p == pytest.approx(known.pvalue)
    assert found.interval == pytest.approx(tuple(known.confidence_interval(0.95)))
    assert found.mean == pytest.approx(differences.mean())
    assert estimate(differences, [7] * n) == found  # of one start


def test_starts_count_once_each() -> None:
    differences, starts = np.array([1.0, 2.0, 6.0, 3.0, 3.0]), [0, 1, 2, 0, 1]
    means = np.array([2.0, 2.5, 6.0])
    known, found = stats.ttest_1samp(means, 0), estimate(differences, starts)
    assert (found.mean, found.p) == (pytest.approx(3.5), pytest.approx(known.pvalue))
    order = [4, 0, 3, 2, 1]
    assert estimate(differences[order], [starts[i] for i in order]) == found


@pytest.mark.parametrize(
    ("seeds", "several", "spread"), [(5, 1, 0.0), (10, 1, 0.0), (10, 3, 0.0), (10, 3, 2.0), (10, 5, 1.0)]
)
def test_the_interval_covers_the_mean_as_often_as_it_says(seeds: int, several: int, spread: float) -> None:
    """Of 2,000 studies of seeds with noise 1 on starts with `spread`; 10 seeds on 3 starts are not balanced."""
    generator, starts = np.random.default_rng(0), [seed % several for seed in range(seeds)]
    hits = false = 0
    for _ in range(2000):
        found = estimate(generator.normal(0, spread, several)[starts] + generator.normal(0, 1, seeds), starts)
        assert found.interval is not None
        assert found.p is not None
        hits += found.interval[0] <= 0 <= found.interval[1]
        false += found.p < 0.05
    assert 0.935 < hits / 2000 < 0.965
    assert hits + false == 2000


def test_an_interval_needs_two_and_zero_spread_has_none() -> None:
    assert estimate(np.array([0.5])) == Estimate(0.5)
    assert estimate(np.array([])).interval is None
    assert estimate(np.array([0.5, 0.5, 0.5])) == Estimate(0.5, (0.5, 0.5), 0.0)
    assert estimate(np.zeros(4)) == Estimate(0, (0, 0), 1.0)


def test_holm_against_its_definition() -> None:
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_by_luck_alone_a_page_claims_something_about_as_often_as_it_says() -> None:
    generator, pages = np.random.default_rng(1), 300
    wrong = 0
    for _ in range(pages):
        arms = {
            name: {"miou": list(generator.uniform(0.2, 0.3, 6))} for name in ("value", "baseline", "random", "step0")
        }
        wrong += any(one.outcome in ("better", "worse") for one in compare_all({"arms": arms}))
    assert wrong / pages < 0.08


def test_starts_must_be_one_a_seed(results: dict[str, object]) -> None:
    with pytest.raises(UserError, match="2 starts for 5 seeds"):
        compare({**results, "starts": [0, 1]}, "value", "baseline", "miou")
    found = compare({**results, "starts": [0, 1, 2, 0, 1]}, "value", "baseline", "miou")
    assert "5/5 seeds of 3 starts" in found.sentence


def test_the_students_metrics_are_read_as_the_teachers_are() -> None:
    ours = metric_of("student_rmse")
    assert (ours.label, ours.higher_is_better, ours.unit) == ("student's depth RMSE", False, "m")


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("miou@32", "mIoU, 32 labels"),
        ("miou@32_fine-tuned", "mIoU, 32 labels fine-tuned"),
        ("student_miou@fine-tuned", "student's mIoU, fine-tuned"),
        ("rmse_loss@128", "depth loss, 128 labels"),
    ],
)
def test_how_a_metric_was_measured_stands_behind_its_name(key: str, label: str) -> None:
    ours, plain = metric_of(key), metric_of(key.split("@")[0])
    assert (ours.key, ours.label) == (key, label)
    assert (ours.unit, ours.scale, ours.higher_is_better) == (plain.unit, plain.scale, plain.higher_is_better)
    for unknown in ("miou@", "@32", "what@32"):
        with pytest.raises(UserError, match="the report knows only"):
            metric_of(unknown)


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
    assert "too few seeds for a claim (5 needed), 3/3 seeds, +3.00 points [+0.52, +5.48]" in few.sentence


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
