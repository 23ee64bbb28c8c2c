"""The quickstart on few scenes and few steps: every file that others script against is there and says what was run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dino_value.cli import main
from dino_value.config import load_config, packaged
from dino_value.data import scenes
from dino_value.studies import quickstart as module
from dino_value.studies.compare import start_backbone
from dino_value.studies.quickstart import quickstart

ARMS = ("baseline", "value", "shuffled_labels", "random")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arm = packaged("quickstart/arm.yaml").read_text()
    assert "warmup: 50" in arm
    assert "lookahead: {steps: 30}" in arm
    arm = arm.replace("warmup: 50", "warmup: 2").replace("lookahead: {steps: 30}", "lookahead: {steps: 2}")
    (tmp_path / "arm.yaml").write_text(arm)
    spec = packaged("compare/quickstart.yaml").read_text()
    assert "steps: 200" in spec
    spec = spec.replace("steps: 200", "steps: 5").replace("quickstart/arm", str(tmp_path / "arm.yaml"))
    (tmp_path / "spec.yaml").write_text(spec)
    monkeypatch.setattr(module, "SPEC", str(tmp_path / "spec.yaml"))
    monkeypatch.setattr(scenes, "COUNTS", {"unlabeled": 64, "training": 640, "validation": 16, "tuning": 16})
    scenes.scenes.cache_clear()


@pytest.mark.slow
def test_two_seeds_give_the_promised_files(small: None, tmp_path: Path) -> None:
    out = tmp_path / "quick"
    results = quickstart(out, seeds=2, steps=2)
    assert json.loads((out / "results.json").read_text()) == results
    assert set(results["arms"]) == {"step0", *ARMS}
    for rows in results["arms"].values():
        for metric in ("miou", "rmse", "top1"):
            assert len(rows[metric]) == 2
            assert all(0 <= value < 10 for value in rows[metric])
    assert results["seconds"] > 0
    page = (out / "report.html").read_text()
    assert "value" in page
    assert "baseline" in page
    for arm in ARMS:
        assert (out / "runs" / f"{arm}_0" / "backbone.safetensors").is_file()
    # Arms start from the same weights and see the same images, so nothing but the method parts them.
    assert results["arms"]["value"]["miou_loss"] != results["arms"]["baseline"]["miou_loss"]


def test_the_packaged_checkpoint_fits_and_is_small() -> None:
    assert packaged("quickstart/start.pt").stat().st_size <= 2 * 2**20
    backbone = start_backbone(load_config("quickstart/arm", ["out=unused"]))
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, 64, 64))
    assert features.patches.shape == (1, 64, 96)


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert main(["quickstart", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_scenes_are_a_function_of_split_and_index() -> None:
    first, again = scenes.scenes("training", 32, 3), scenes.scenes.__wrapped__("training", 32, 3)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.depth, again.depth)
    assert not torch.equal(first.images, scenes.scenes("validation", 32, 3).images)
    assert first.classes.min() >= 0
    assert first.classes.max() < len(scenes.CLASSES)
    assert first.depth.min() > 0.3
    assert first.depth.max() < 20


def test_layout_says_nothing_and_content_does() -> None:
    """Where a pixel lies does not tell its class; haze tells its depth."""
    data = scenes.scenes("tuning", 16, 300)
    shares = torch.stack([(data.classes == index).float().mean(0) for index in range(3)])  # floor, wall, ceiling
    spread = shares.std((1, 2))  # over places; sampling alone gives √(p(1 − p) / 300) ≈ .025
    assert (spread < 0.06).all(), spread
    grey = data.images.float().std(1).flatten()  # haze takes colour away
    joint = torch.stack([grey, data.depth.flatten()])
    assert torch.corrcoef(joint)[0, 1] < -0.3
