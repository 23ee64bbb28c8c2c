"""Models of other than three channels, from images to results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_value import cli
from dino_value.config import Config
from dino_value.errors import UserError
from dino_value.export.command import export
from dino_value.models.backbone import create_backbone, load_backbone, save_backbone
from dino_value.report.figures import pca_figure
from dino_value.report.gallery import as_pictures, held_out_images, patch_map
from dino_value.runs.metrics import read_metrics
from dino_value.training.trainer import train

KWARGS = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
MODES = {1: "L", 4: "RGBA"}


@pytest.fixture(scope="module", params=MODES, ids=lambda count: f"{count} channels")
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """images/ and ade/ of noise, of so many channels."""
    channels: int = request.param
    root, rng = tmp_path_factory.mktemp("channels"), np.random.default_rng(1)

    def noise(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (24, 24, channels), dtype=np.uint8)
        Image.fromarray(pixels.squeeze(), MODES[channels]).save(path)

    for index in range(8):
        noise(root / "images" / f"{index}.png")
    for split, count in (("training", 12), ("validation", 3)):
        for index in range(count):
            noise(root / "ade" / "images" / split / f"{index}.png")
            label = root / "ade" / "annotations" / split / f"{index}.png"
            label.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 3, (24, 24), dtype=np.uint8)).save(label)
    (root / "ade" / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tfloor\n")
    return channels, root


@pytest.mark.parametrize("method", ["baseline", "finetune", "value"])
def test_training_and_evaluation(
    method: str, data: tuple[int, Path], tiny: Callable[..., Config], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    channels, root = data
    config = tiny(
        f"method={method}",
        f"backbone.kwargs.in_chans={channels}",
        f"data.unlabeled={root / 'images'}",
        f"data.ade20k={root / 'ade'}",
        "data.nyuv2=null",
        "designer.name=weights",
        "data.workers=1",
        "health.every=2",
        "health.images=4",
        "objective.ibot.weight=1",
    )
    run = train(config, quiet=True)
    losses = [row["loss"] for row in read_metrics(run) if "loss" in row]
    assert np.isfinite(losses).all()
    assert not [str(warning.message) for warning in recwarn if "fourth channel" in str(warning.message)]
    backbone = load_backbone(run)
    assert backbone.channels == channels
    assert backbone.normalise(torch.zeros(channels, 8, 8, dtype=torch.uint8)).shape == (channels, 8, 8)
    images = held_out_images(config)
    assert images is not None
    assert images.shape[1] == channels
    assert pca_figure(as_pictures(images), {"step0": patch_map(backbone, images)}).panels
    out = tmp_path / "seg"
    flags = ["--size", "16", "--steps", "2", "--batch", "2", "--workers", "0", "--save-images", "1", "--device", "cpu"]
    assert cli.main(["eval", "seg", str(run), "--data", str(root / "ade"), "--out", str(out), *flags]) == 0
    assert json.loads((out / "results.json").read_text())["miou"] >= 0
    assert list((out / "pictures").iterdir())


def test_the_channels_of_a_foreign_file_are_told(data: tuple[int, Path], tmp_path: Path) -> None:
    channels, root = data
    torch.save(
        create_backbone("vit_tiny_patch16_224", 16, {**KWARGS, "in_chans": channels}).model.state_dict(), "w.pth"
    )
    flags = ["--size", "16", "--steps", "2", "--batch", "2", "--workers", "0", "--device", "cpu"]
    told = [f"--backbone=kwargs.{key}={value}" for key, value in KWARGS.items()]
    command = ["eval", "seg", "w.pth", "--model", "vit_tiny_patch16_224", "--data", str(root / "ade"), *told, *flags]
    with pytest.raises(UserError, match=rf"of {channels} channels, the model's of 3: set .*in_chans={channels}"):
        _run(*command, "--out", str(tmp_path / "a"))
    _run(*command, f"--backbone=kwargs.in_chans={channels}", "--out", str(tmp_path / "b"))
    assert (tmp_path / "b" / "results.json").is_file()


def _run(*arguments: str) -> None:
    from dino_value.eval import command

    command.main(list(arguments[1:]))


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_mask_generators_and_embedded_images_are_of_three_channels(tiny: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"in_chans=4 with designer\.name=unet: mask generators read three channels"):
        tiny("backbone.kwargs.in_chans=4")
    with pytest.raises(UserError, match="the embedded images have 3 channels, the backbone takes 4"):
        train(tiny("backbone.kwargs.in_chans=4", "method=baseline", "data.unlabeled=scenes"), quiet=True)
    with pytest.raises(UserError, match=r"patch_size=\[8, 16\]: patches must be square"):
        create_backbone("vit_tiny_patch16_224", 32, {**KWARGS, "patch_size": (8, 16)})


@pytest.mark.parametrize("format", ["timm", "hf", "torchhub"])
def test_exports_keep_the_channels(format: str, tmp_path: Path) -> None:
    backbone = create_backbone("vit_tiny_patch16_224", 16, {**KWARGS, "in_chans": 4})
    save_backbone(tmp_path / "backbone.safetensors", backbone)
    assert export(tmp_path, format, out=tmp_path / "out").difference < 1e-5  # reads back what it wrote


def test_statistics_of_other_channels() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", 16, {**KWARGS, "in_chans": 5})
    plain = create_backbone("vit_tiny_patch16_224", 16, KWARGS)
    assert backbone.mean[:3] == plain.mean
    assert backbone.mean[3:] == pytest.approx([sum(plain.mean) / 3] * 2)
    assert len(create_backbone("vit_tiny_patch16_224", 16, {**KWARGS, "in_chans": 1}).std) == 1
