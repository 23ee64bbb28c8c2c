from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_value.errors import UserError
from dino_value.report import figures


def picture(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


def test_results_figure_has_a_panel_a_metric(results: Mapping[str, object]) -> None:
    figure = figures.results_figure(results)
    assert [p.name for p in figure.panels] == ["miou", "rmse", "top1"]
    assert all(picture(p.png).width > 500 for p in figure.panels)
    assert "step 0 22.02" in figure.panels[0].alt
    assert "higher is better" in figure.panels[0].alt
    assert figures.results_figure(results).panels[0].png == figure.panels[0].png  # same numbers, same bytes


def test_results_figure_of_one_seed_with_a_gap() -> None:
    figure = figures.results_figure({"arms": {"value": {"miou": [None]}, "baseline": {"miou": [0.2]}}})
    assert picture(figure.panels[0].png).height > 300


def test_curves_show_only_what_was_logged(runs: dict[str, list[Path]]) -> None:
    figure = figures.curves_figure(runs, keys=("loss", "value", "cosine", "mask_mean", "images_per_second"))
    assert [p.name for p in figure.panels] == ["loss", "value", "cosine", "mask_mean"]
    alts = {p.name: p.alt for p in figure.panels}
    assert "baseline" in alts["loss"]
    assert "baseline" not in alts["value"]
    assert all(picture(p.png) for p in figure.panels)


def test_read_metrics_forgives_a_cut_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert figures.read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    path.write_text('{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 1"):
        figures.read_metrics(tmp_path)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match="step"):
        figures.read_metrics(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        figures.read_metrics(tmp_path / "absent")


def test_series_keeps_the_last_of_a_repeated_step_and_drops_what_is_no_number() -> None:
    records: list[dict[str, float]] = [
        {"step": 2, "v": 1.0},
        {"step": 1, "v": 5.0},
        {"step": 2, "v": 3.0},
        {"step": 3, "v": float("nan")},
        {"step": 4},
    ]
    steps, values = figures.series(records, "v")
    assert steps.tolist() == [1, 2]
    assert values.tolist() == [5, 3]


def test_running_mean_and_common_grid() -> None:
    assert figures.running_mean(np.array([1.0, 2.0, 6.0, 3.0]), 3).tolist() == pytest.approx([1.5, 3, 11 / 3, 4.5])
    assert figures.running_mean(np.array([1.0, 2.0]), 1).tolist() == [1, 2]
    a = (np.array([0.0, 2.0, 4.0]), np.array([0.0, 2.0, 4.0]))
    b = (np.array([1.0, 3.0]), np.array([10.0, 30.0]))
    grid, values = figures.over_seeds([a, b])
    assert grid.tolist() == [1, 2, 3]
    assert values.tolist() == [[1, 2, 3], [10, 20, 30]]


def test_each_arm_has_one_style_of_its_own() -> None:
    styles = figures.arm_styles(["step0", "baseline", "random", "value", "adios", "frozen"])
    assert len({s.colour for s in styles.values()}) == len({s.marker for s in styles.values()}) == 6
    assert figures.arm_styles(["value"])["value"] == styles["value"]


def test_masks_figure() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    masks = {"value": np.full((2, 1, 32, 32), 0.25), "random": np.full((2, 32, 32), 0.5)}
    figure = figures.masks_figure(images, masks, {"value": images, "random": images})
    assert [p.name for p in figure.panels] == ["random", "value"]
    assert "25%, 25%" in figure.panels[1].alt
    assert picture(figure.panels[0].png).width > 500
    with pytest.raises(ValueError, match="do not fit"):
        figures.masks_figure(images, {"value": np.zeros((2, 16, 16))}, {"value": images})
    with pytest.raises(ValueError, match="uint8"):
        figures.masks_figure(images / 255, masks, {})


def test_denormalise_undoes_normalisation() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4), dtype=np.uint8)
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.25])
    views = (images / 255 - mean[:, None, None]) / std[:, None, None]
    assert np.array_equal(figures.denormalise(views, mean, std), images)


def planted(n: int = 3, side: int = 8, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Features [n h w d] that hold three skewed factors [n h w 3] of falling strength in a random orthonormal
    basis.
    """
    generator = np.random.default_rng(0)
    factors = generator.exponential(size=(n, side, side, 3)) * [9.0, 3.0, 1.0]
    basis = np.linalg.qr(generator.normal(size=(dim, dim)))[0][:3]
    return factors @ basis, factors


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([np.corrcoef(a[..., j].ravel(), b[..., j].ravel())[0, 1] for j in range(3)])


def test_pca_finds_planted_factors_with_their_sign() -> None:
    features, factors = planted()
    colours = figures.pca_rgb(features)
    assert colours.shape == factors.shape
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert (correlations(colours, factors) > 0.9).all()


def test_pca_does_not_depend_on_the_basis_of_the_features() -> None:
    features, _ = planted()
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(16, 16)))[0]
    assert figures.pca_rgb(features @ rotation + 3) == pytest.approx(figures.pca_rgb(features), abs=1e-6)


def test_pca_matches_a_reference_through_flips_and_order() -> None:
    features, _ = planted()
    reference = figures.pca_rgb(features)[..., [2, 0, 1]] * [-1, 1, -1]
    assert (correlations(figures.pca_rgb(features, reference), reference) > 0.99).all()


def test_pca_of_flat_or_narrow_features_is_grey() -> None:
    assert (figures.pca_rgb(np.ones((1, 4, 4, 8))) == 0.5).all()
    narrow = figures.pca_rgb(np.random.default_rng(0).normal(size=(1, 4, 4, 2)))
    assert (narrow[..., 2] == 0.5).all()
    assert narrow[..., 0].std() > 0.1
    with pytest.raises(ValueError, match="n h w d"):
        figures.pca_rgb(np.zeros((4, 8)))


def test_pca_figure() -> None:
    features, _ = planted()
    images = np.zeros((3, 3, 32, 32), dtype=np.uint8)
    figure = figures.pca_figure(images, {"value": features, "step0": features})
    assert "step 0, value" in figure.panels[0].alt
    assert picture(figure.panels[0].png).width > 500


def test_many_arms_stand_below_each_other() -> None:
    """Side by side their names would cover each other."""
    arms = {f"arm_with_a_name_{number}": {"miou": [0.05 * number, 0.2]} for number in range(12)}
    sizes = {}
    for count in (8, 12):
        (panel,) = figures.results_figure({"arms": dict(list(arms.items())[:count])}).panels
        sizes[count] = picture(panel.png).size
    assert sizes[12][0] == pytest.approx(sizes[8][0], rel=0.05)
    assert sizes[12][1] > 1.2 * sizes[8][1]


def test_targets_figure() -> None:
    images = np.zeros((2, 3, 8, 8), np.uint8)
    maps = {"value": np.array([[[0.0, 0.1], [0.2, 0.5]]] * 2), "random": np.zeros((2, 2, 2))}
    figure = figures.targets_figure(images, maps)
    assert [panel.name for panel in figure.panels] == ["random", "value"]
    assert "0.20 nats" in figure.panels[1].alt
    still, moved = (np.asarray(picture(panel.png).convert("RGB"), dtype=float) for panel in figure.panels)
    rows, columns = slice(still.shape[0] // 4, still.shape[0] // 2), slice(still.shape[1] * 5 // 8, still.shape[1])
    assert moved[rows, columns].mean() > still[rows, columns].mean() + 5  # one scale: no change is dark
    with pytest.raises(ValueError, match="do not fit"):
        figures.targets_figure(images, {"value": np.zeros((3, 2, 2))})
