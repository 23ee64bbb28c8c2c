"""The NYUv2 reader: MATLAB's order and indices, laziness, and damaged files."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch.utils.data import DataLoader

from dino_value.data.labelled import LabelledDataset
from dino_value.data.nyuv2 import NYUv2
from dino_value.errors import UserError

MAT, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"


def test_rows_are_rows_and_indices_start_at_one(nyu_root: Path) -> None:
    source = NYUv2(nyu_root, "training")
    assert (len(source), source.kind, source.num_classes) == (2, "depth", 0)
    image, depth = source.load(1)  # the file's fourth image
    assert (image.shape, image.dtype, depth.shape, depth.dtype) == (
        (3, 3, 5),
        torch.uint8,
        (3, 5),
        torch.float32,
    )
    assert image[1, 2, 4] == 124
    assert depth[2, 4].item() == pytest.approx(4 + 2 + 0.4)
    assert source.name(1).endswith(f"{MAT} image 4")
    assert NYUv2(nyu_root, "validation").load(0)[1][0, 0] == 2


def test_unknown_depth_is_zero(nyu_root: Path) -> None:
    depth = NYUv2(nyu_root, "training").load(0)[1]
    assert depth[:, 0].tolist() == [0, 0, 0]
    assert (depth[:, 1:] > 0).all()


def test_groups_are_neighbours(nyu_root: Path) -> None:
    source = NYUv2(nyu_root, "training", neighbours=3)
    assert [source.group(0), source.group(1)] == ["0", "1"]


def test_groups_are_scenes_where_the_file_names_them(nyu_root: Path) -> None:
    with h5py.File(nyu_root / MAT, "a") as file:  # MATLAB's cell array of strings: references to uint16 arrays
        for index, name in enumerate(["kitchen_0001", "office_0001", "office_0002", "kitchen_0001"]):
            file[f"#refs#/{index}"] = np.array([[ord(letter)] for letter in name], np.uint16)
        references = [[file[f"#refs#/{index}"].ref for index in range(4)]]
        file["scenes"] = np.array(references, dtype=h5py.ref_dtype)
    source = NYUv2(nyu_root, "training")
    assert [source.group(0), source.group(1)] == ["kitchen_0001", "kitchen_0001"]


def test_pickles_and_crosses_processes(nyu_root: Path) -> None:
    source = NYUv2(nyu_root, "training")
    source.load(0)
    assert torch.equal(pickle.loads(pickle.dumps(source)).load(1)[0], source.load(1)[0])
    dataset = LabelledDataset(source, size=(3, 5))
    here = [image for image, _ in DataLoader(dataset, batch_sampler=[[(0, 0)], [(1, 0)]])]
    there = [image for image, _ in DataLoader(dataset, batch_sampler=[[(0, 0)], [(1, 0)]], num_workers=1)]
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_missing_files(nyu_root: Path) -> None:
    (nyu_root / SPLITS).unlink()
    with pytest.raises(UserError, match=r"splits\.mat: no such file"):
        NYUv2(nyu_root, "training")
    (nyu_root / MAT).unlink()
    with pytest.raises(UserError, match=rf"{MAT}: no such file"):
        NYUv2(nyu_root, "training")


@pytest.mark.parametrize("keep", [0, 100, 1500])
def test_truncated_mat(nyu_root: Path, keep: int) -> None:
    path = nyu_root / MAT
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{MAT}: not a complete HDF5 file") as raised:
        NYUv2(nyu_root, "training")
    assert "\n" not in str(raised.value)


def test_truncated_splits(nyu_root: Path) -> None:
    path = nyu_root / SPLITS
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(UserError, match=r"splits\.mat: cannot be read"):
        NYUv2(nyu_root, "training")


@pytest.mark.parametrize("indices", [[0, 1], [1, 5], []])
def test_indices_outside_the_set(nyu_root: Path, indices: list[int]) -> None:
    savemat(nyu_root / SPLITS, {"trainNdxs": np.array(indices), "testNdxs": np.array([1])})
    with pytest.raises(UserError, match="must name images 1…4"):
        NYUv2(nyu_root, "training")


def test_split_without_indices(nyu_root: Path) -> None:
    savemat(nyu_root / SPLITS, {"trainNdxs": np.array([1])})
    with pytest.raises(UserError, match="holds no testNdxs"):
        NYUv2(nyu_root, "validation")


def test_other_hdf5_file(nyu_root: Path) -> None:
    with h5py.File(nyu_root / MAT, "w") as file:
        file["images"] = np.zeros((4, 3, 5, 3), np.uint8)
    with pytest.raises(UserError, match="lacks the datasets"):
        NYUv2(nyu_root, "training")
    with h5py.File(nyu_root / MAT, "a") as file:
        file["depths"] = np.zeros((4, 3, 5), np.float32)
    with pytest.raises(UserError, match=r"are not \(n, 3, W, H\)"):
        NYUv2(nyu_root, "training")
