"""NYUv2 as files, and depths of the wrong unit."""

from __future__ import annotations

import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from dino_value.data.folders import read_depth
from dino_value.data.labelled import LabelledSource, Subset
from dino_value.data.layouts import open_labelled
from dino_value.data.nyuv2 import NYUFolder, suspicion
from dino_value.errors import UserError


def pair(folder: Path, number: int, millimetres: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    height, width = millimetres.shape
    Image.fromarray(np.full((height, width, 3), number, np.uint8)).save(folder / f"rgb_{number:05d}.jpg")
    Image.fromarray(millimetres.astype(np.uint16)).save(folder / f"sync_depth_{number:05d}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two scenes for training and one for testing, listed as BTS lists them; 3 pixels high, 4 wide."""
    depth = np.full((3, 4), 2500)
    depth[0] = [0, 1, 10_000, 10_001]
    for number, scene in ((1, "kitchen_0001"), (2, "kitchen_0001"), (3, "office_0002")):
        pair(tmp_path / "sync" / scene, number, depth)
    pair(tmp_path / "official_splits/test/bathroom", 45, depth + 1)
    lines = [
        f"/{scene}/rgb_{number:05d}.jpg /{scene}/sync_depth_{number:05d}.png 518.8579\n"
        for number, scene in ((1, "kitchen_0001"), (2, "kitchen_0001"), (3, "office_0002"))
    ]
    (tmp_path / "nyudepthv2_train_files_with_gt.txt").write_text("".join(lines))
    (tmp_path / "nyudepthv2_test_files_with_gt.txt").write_text(
        "bathroom/rgb_00045.jpg bathroom/sync_depth_00045.png 518.8579\n\n"
    )
    return tmp_path


def opened(root: Path, split: str = "training") -> LabelledSource:
    return open_labelled("nyuv2", root, split)  # type: ignore[arg-type]


def test_pairs_in_metres(root: Path) -> None:
    source = opened(root)
    assert isinstance(source, NYUFolder)
    assert (len(source), source.kind, source.num_classes, source.class_names) == (3, "depth", 0, [])
    image, depth = source.load(2)
    assert (image.shape, image.dtype, depth.dtype) == ((3, 3, 4), torch.uint8, torch.float32)
    assert int(image[0, 0, 0]) == pytest.approx(3, abs=1)
    # 0 is unknown, and so is what lies beyond 10 m.
    assert depth[0].tolist() == pytest.approx([0, 0.001, 10, 0])
    assert depth[1].tolist() == [2.5] * 4
    assert source.name(0).endswith("sync/kitchen_0001/rgb_00001.jpg")
    assert len({source.group(0), source.group(1)}) == 1
    assert source.group(2) != source.group(0)
    assert opened(root, "validation").load(0)[1][1, 0].item() == pytest.approx(2.501)


def test_lists_beside_the_files(root: Path) -> None:
    (root / "nyudepthv2_train_files_with_gt.txt").unlink()
    pair(root / "flat", 1, np.full((3, 4), 1000))
    pair(root / "flat", 2, np.full((3, 4), 1000))
    lines = [f"flat/rgb_0000{n}.jpg flat/sync_depth_0000{n}.png\n" for n in (1, 2)]
    (root / "train.txt").write_text("".join(lines))
    source = open_labelled("nyuv2", root, neighbours=2)
    assert [source.group(0), source.group(1)] == ["0", "0"]
    assert source.load(0)[1].unique().tolist() == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "an empty list"),
        ("a.jpg\n", "line 1 names no pair"),
        ("a.jpg b.png\n", r"a\.jpg: no such file"),
        ("/kitchen_0001/rgb_00001.jpg None 518.8579\n", "None: no such file, but the training list pairs it"),
    ],
)
def test_bad_lists(root: Path, content: str, message: str) -> None:
    (root / "nyudepthv2_train_files_with_gt.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        opened(root)


def test_no_list_or_two(root: Path) -> None:
    (root / "train_more.txt").write_text("")
    with pytest.raises(UserError, match=r"holds 2 lists .*train_more\.txt"):
        opened(root)
    (root / "nyudepthv2_test_files_with_gt.txt").unlink()
    with pytest.raises(UserError, match="holds 0 lists"):
        opened(root, "validation")


def test_a_missing_pair_can_be_skipped(root: Path) -> None:
    (root / "sync/kitchen_0001/sync_depth_00002.png").unlink()
    with pytest.raises(UserError, match=r"sync_depth_00002\.png: no such file"):
        opened(root)
    source = open_labelled("nyuv2", root, skip_unreadable=True)
    assert isinstance(source, Subset)
    assert len(source) == 2
    assert "sync_depth_00002.png" in source.skipped[0]


def test_sizes_differ(root: Path) -> None:
    Image.fromarray(np.full((3, 5), 1000, np.uint16)).save(root / "sync/office_0002/sync_depth_00003.png")
    with pytest.raises(UserError, match=r"sync_depth_00003\.png: 5×3 pixels, but its image has 4×3"):
        opened(root).load(2)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_depth_maps_are_16_bits_deep(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 3)).save(tmp_path / "a.png")
    with pytest.raises(
        UserError, match=rf"a\.png: a depth map is a 16-bit one-channel PNG, this is of PIL's mode {mode}"
    ):
        read_depth(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("metres", "cause"),
    [
        (2500.0, "millimetres read as metres"),
        (40.0, "another unit"),
        (0.003, "divided by 1000"),
        (0.0, "no known depth"),
    ],
)
def test_suspicious_ranges(metres: float, cause: str) -> None:
    assert cause in (suspicion([torch.full((2, 2), metres)]) or "")
    assert suspicion([torch.full((2, 2), 2.5)]) is None


def test_millimetres_in_the_mat_are_warned_of(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = np.zeros((2, 3, 5, 3), np.uint8)
        file["depths"] = np.full((2, 5, 3), 2500, np.float32)
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([1]), "testNdxs": np.array([2])})
    with pytest.warns(UserWarning, match=r"labeled\.mat: the median depth is 2500 m: probably millimetres"):
        opened(tmp_path)


def test_usual_depths_are_not_warned_of(root: Path, nyu_root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(root)
        opened(nyu_root)
