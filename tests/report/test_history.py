"""Pictures of how something came about, and the numbers in them."""

from __future__ import annotations

import numpy as np
import pytest

from dino_value.report.history import (
    Spent,
    efficiency_figure,
    mask_history_figure,
    probe_history_figure,
    share_needed,
    spent,
)

ROWS = [
    {"step": 1, "loss": 3.0, "seconds": 2.0},
    {"step": 2, "rankme": 5.0},
    {"step": 3, "loss": 2.0, "seconds": 4.0, "rankme": 7.0},
    {"step": 4, "rankme": float("nan")},
]


def test_what_was_spent_by_then() -> None:
    found = spent(ROWS, "rankme", images=8)
    assert found.values.tolist() == [5.0, 7.0]
    assert found.amounts.tolist() == [16.0, 24.0]
    assert found.seconds.tolist() == [2.0, 6.0]
    tokens = spent([{"step": 5, "tokens": 90, "held_loss": 1.0, "seconds": 1.0}], "held_loss", images=None)
    assert tokens.amounts.tolist() == [90.0]
    assert spent(ROWS, "absent", 8).values.tolist() == []


def run(*values: float) -> Spent:
    steps = np.arange(1.0, len(values) + 1)
    return Spent(np.array(values), 100 * steps, steps)


def test_the_share_needed_for_the_references_end() -> None:
    reference = run(1.0, 2.0, 3.0, 4.0)
    assert share_needed(run(2.0, 4.0, 5.0), reference, higher_is_better=True) == 0.5
    assert share_needed(run(1.0, 2.0), reference, higher_is_better=True) is None
    assert share_needed(run(9.0, 5.0, 4.0), reference, higher_is_better=False) == 0.75


def test_efficiency_is_said_in_words() -> None:
    runs = {"value": run(2.0, 4.0), "baseline": run(1.0, 2.0, 3.0, 4.0), "random": run(1.0, 1.0)}
    figure = efficiency_figure("rankme", runs, "images")
    assert "value was there with 50% of its images" in figure.caption
    assert "random never reached it" in figure.caption
    assert [panel.name for panel in figure.panels] == ["rankme_images", "rankme_seconds"]
    assert all(panel.png.startswith(b"\x89PNG") for panel in figure.panels)
    assert "last value" not in efficiency_figure("rankme", {"value": runs["value"]}, "images").caption


def test_masks_across_training() -> None:
    images = np.zeros((2, 3, 8, 8), np.uint8)
    masks = {step: np.full((2, 1, 8, 8), step / 10) for step in (2, 4)}
    (panel,) = mask_history_figure(images, {"value": masks}).panels
    assert "step 2: 20%, step 4: 40%" in panel.alt


@pytest.mark.parametrize("intervals", [(0.1, 0.6), (-0.9, 0.99)])
def test_probe_across_training(intervals: tuple[float, float]) -> None:
    row = {"pearson": 0.5, "interval": list(intervals)}
    probes = {"value": {10: {"designed_sgd": row, "designed_optimizer": row}, 5: {"designed_sgd": row}}}
    panels = probe_history_figure(probes).panels
    assert "0.50 at step 5, 0.50 at step 10" in panels[0].alt
    assert "step 5" not in panels[1].alt
