"""Going on without what cannot be read, and counting it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_value.config import Config, ViewsConfig
from dino_value.data import SkippingViews, open_views
from dino_value.data.labelled import Subset
from dino_value.data.layouts import open_labelled
from dino_value.data.sampling import Stream
from dino_value.errors import UserError
from dino_value.runs.metrics import read_metrics
from dino_value.training.trainer import train

SETTINGS = ViewsConfig(global_size=16, local_size=8, local_count=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six files, of which the third and the sixth are damaged."""
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / f"{index}.png")
    for index in (2, 5):
        (root / f"{index}.png").write_bytes(b"not an image")
    return root


def skipping(folder: Path) -> SkippingViews:
    views = open_views(str(folder), SETTINGS, skip_unreadable=True)
    assert isinstance(views, SkippingViews)
    return views


def test_the_next_readable_file_takes_the_place(folder: Path) -> None:
    views = skipping(folder)
    assert views.unreadable == 0
    large, small = views.batch([1, 2, 5], key=3)
    expected = open_views(str(folder), SETTINGS).batch([1, 3, 0], key=3)
    assert torch.equal(large, expected[0])
    assert torch.equal(small, expected[1])
    assert views.unreadable == 2
    views.batch([2, 2], key=4)
    assert views.unreadable == 2


def test_without_the_setting_the_file_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"2\.png: cannot be read"):
        open_views(str(folder), SETTINGS).batch([2], 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_workers_find_is_counted_here(folder: Path, workers: int) -> None:
    views = skipping(folder)
    batches = list(Stream(views, 3, 0, "unlabeled", workers).iterate(0, 4))  # two passes
    assert views.unreadable == 2
    again = [Stream(skipping(folder), 3, 0, "unlabeled").batch(step) for step in range(4)]
    for left, right in zip(batches, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_in_memory_they_are_left_out(folder: Path) -> None:
    views = open_views(str(folder), SETTINGS, in_memory=True, skip_unreadable=True)
    assert isinstance(views, SkippingViews)
    assert (len(views), views.unreadable) == (4, 2)
    held = open_views(str(folder), SETTINGS, in_memory=False).without([str(folder / "0.png")])
    assert len(views.without([str(folder / "0.png")])) == 3
    assert len(held) == 5


def test_nothing_readable(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of 6 images can be read"):
        skipping(folder).batch([0], 0)
    with pytest.raises(UserError, match="none of its 6 images can be read"):
        open_views(str(folder), SETTINGS, in_memory=True, skip_unreadable=True)


def test_a_run_goes_on_and_counts(tiny: Callable[..., Config], tiny_data: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(tiny_data / "images", tmp_path / "images"))
    (images / "07.png").write_bytes(b"damaged")
    settings = ("method=baseline", "steps=4", f"data.unlabeled={images}")  # one pass
    with pytest.raises(UserError, match=r"07\.png: cannot be read"):
        train(tiny(*settings), quiet=True)
    folder = train(tiny(*settings, "data.skip_unreadable=true", f"out={tmp_path / 'other'}"), quiet=True)
    assert read_metrics(folder)[-1]["unreadable"] == 1


def test_labelled_sets_say_what_they_skip(ade_root: Path) -> None:
    images, annotations = ade_root / "images/training", ade_root / "annotations/training"
    (images / "ADE_train_00000001.jpg").write_bytes(b"damaged")
    (annotations / "ADE_train_00000003.png").unlink()
    Image.fromarray(np.full((6, 8), 9, np.uint8)).save(annotations / "ADE_train_00000004.png")
    with pytest.raises(UserError, match=r"ADE_train_00000003\.jpg: its annotation .* is missing"):
        open_labelled("ade20k", ade_root)
    source = open_labelled("ade20k", ade_root, skip_unreadable=True)
    assert isinstance(source, Subset)
    assert (len(source), source.kind, source.num_classes) == (1, "seg", 3)
    assert source.name(0).endswith("ADE_train_00000002.jpg")
    assert source.group(0) == "ADE_train_00000002"
    assert source.load(0)[1].unique().tolist() == [0]
    assert [("00001.jpg" in line, "00003.png" in line, "00004.png" in line) for line in source.skipped] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    (annotations / "ADE_train_00000002.png").unlink()
    with pytest.raises(UserError, match="none of 4 images can be read"):
        open_labelled("ade20k", ade_root, skip_unreadable=True)
