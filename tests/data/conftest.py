"""Tiny data sets in the official layouts, written by the tests."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

INFO = "Idx\tRatio\tTrain\tVal\tName\n1\t0\t0\t0\twall\n2\t0\t0\t0\tbuilding, edifice\n3\t0\t0\t0\tsky\n"


@pytest.fixture
def ade_root(tmp_path: Path) -> Path:
    """ADEChallengeData2016 with 3 classes, 4 training images 8 wide × 6 high, 1 validation image.

    Training annotation n is all of id n − 1, so that ids 0 to 3 all occur.
    """
    root = tmp_path / "ADEChallengeData2016"
    for split, short, count in (("training", "train", 4), ("validation", "val", 1)):
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations" / split).mkdir(parents=True)
        for index in range(count):
            stem = f"ADE_{short}_{index + 1:08d}"
            image = np.full((6, 8, 3), 40 * index, np.uint8)
            Image.fromarray(image).save(root / "images" / split / f"{stem}.jpg")
            ids = np.full((6, 8), index, np.uint8)
            Image.fromarray(ids).save(root / "annotations" / split / f"{stem}.png")
    (root / "objectInfo150.txt").write_text(INFO)
    return root


@pytest.fixture
def nyu_root(tmp_path: Path) -> Path:
    """NYUv2 with 4 images 5 wide × 3 high: 1 and 4 train, 2 tests. Values tell their row and column."""
    root = tmp_path / "nyu"
    root.mkdir()
    row, column = np.mgrid[0:3, 0:5]
    images = np.stack([np.stack([100 * c + 10 * row + column for c in (0, 1, 2)]) for _ in range(4)])
    depths = np.stack([n + 1 + row + column / 10 for n in range(4)]).astype(np.float32)
    depths[0, 0, 0], depths[0, 1, 0], depths[0, 2, 0] = np.nan, np.inf, -1
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = images.astype(np.uint8).transpose(0, 1, 3, 2)  # MATLAB's columns first
        file["depths"] = depths.transpose(0, 2, 1)
    savemat(root / "splits.mat", {"trainNdxs": np.array([[1], [4]]), "testNdxs": np.array([[2]])})
    return root


@pytest.fixture
def write_image(tmp_path: Path) -> Callable[..., Path]:
    """Save a PIL image under a name in a fresh folder."""

    def write(name: str, image: Image.Image, **options: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)  # type: ignore[arg-type]
        return path

    return write
