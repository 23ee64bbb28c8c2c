"""Depth maps as others write them: units, containers, sizes, maxima."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dino_value import cli
from dino_value.config import Config
from dino_value.data import open_views
from dino_value.data.check import check_data, recognise
from dino_value.data.conventions import Conventions, using
from dino_value.data.folders import read_depth
from dino_value.data.layouts import open_labelled
from dino_value.errors import UserError
from tests.data.test_pixels import SETTINGS, tiff

METRES = np.linspace(1, 9, 24, dtype=np.float32).reshape(4, 6)


def save(path: Path, metres: np.ndarray, units: float = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.round(metres * units).astype(np.uint16)).save(path)
    return path


def pairs(root: Path, units: float = 1000, metres: np.ndarray = METRES, size: tuple[int, int] = (6, 4)) -> Path:
    """Three pairs for training and one for testing, with lists."""
    for split, count in (("train", 3), ("test", 1)):
        lines = []
        for number in range(count):
            save(root / split / f"depth_{number}.png", metres, units)
            Image.new("RGB", size, (80 * number, len(split) * 20, 0)).save(root / split / f"rgb_{number}.jpg")
            lines.append(f"{split}/rgb_{number}.jpg {split}/depth_{number}.png 518.8\n")
        (root / f"nyu_{split}.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("units", [256.0, 1000.0, 5000.0])
def test_units_a_metre(units: float, tmp_path: Path) -> None:
    root = pairs(tmp_path, units)
    with using(Conventions(depth_units=units)):
        source = open_labelled("nyuv2", root)
        part = check_data(str(root), near=-1).parts[0]
    np.testing.assert_allclose(source.load(0)[1], METRES, atol=0.5 / units)  # the source keeps them
    assert part.notes == [f"depth maps in integers are read as {units:g} units a metre (data.depth_units)"]
    assert part.depth["max"] == pytest.approx(9, abs=0.5 / units)


def test_the_units_of_a_configuration_reach_feedback(tiny: Callable[..., Config], tmp_path: Path) -> None:
    from dino_value.training.trainer import Trainer

    root = pairs(tmp_path / "kitti", 256, np.full((24, 24), 40.0), (24, 24))
    keys = ["data.depth_units=256", "data.max_depth=80", f"data.nyuv2={root}", "data.ade20k=null"]
    run = Trainer(tiny(*keys, "feedback.batch_size=2", "feedback.depth={train: 2, meta: 1}", "designer.name=weights"))
    assert run.steer is not None
    (task,) = run.steer.feedback
    assert task.source.load(0)[1].unique().tolist() == [40]


def test_the_units_of_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pairs(tmp_path, 256)
    command = ["data", "check", str(root), "--near", "-1", "--json", str(tmp_path / "found.json"), "--files"]
    assert cli.main([*command, "depth_units=256"]) == 0
    depth = json.loads((tmp_path / "found.json").read_text())["parts"][0]["depth"]
    assert (depth["min"], depth["max"]) == (1, 9)
    assert cli.main([*command, "depth_unit=256"]) == 2
    assert "did you mean data.depth_units?" in capsys.readouterr().err


# Containers


def test_depths_in_floating_point_are_metres(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", METRES[None])
    Image.fromarray(METRES).save(tmp_path / "a.tiff")
    for name in ("a.npy", "a.tiff"):
        np.testing.assert_array_equal(read_depth(tmp_path / name, 256), METRES)
    np.save(tmp_path / "b.npy", (METRES * 256).astype(np.int32))
    np.testing.assert_allclose(read_depth(tmp_path / "b.npy", 256), METRES, atol=1 / 256)
    tiff(tmp_path / "b.tif", (METRES * 1000).astype(np.uint16))
    np.testing.assert_allclose(read_depth(tmp_path / "b.tif"), METRES, atol=1e-3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros((2, 3, 4)), r"an array of shape \(2, 3, 4\) where height × width is wanted"),
        (np.array([["a"]]), "not one array of numbers"),
        (np.array([[object()]]), "pickle"),
    ],
)
def test_arrays_that_are_no_depth_map(values: np.ndarray, said: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", values, allow_pickle=True)
    with pytest.raises(UserError, match=rf"a\.npy: cannot be read as a depth map \(.*{said}") as caught:
        read_depth(tmp_path / "a.npy")
    assert "\n" not in str(caught.value)


def test_exr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exr = pytest.importorskip("OpenEXR")
    for name, channels in (
        ("z", {"Z": METRES, "A": METRES * 0}),
        ("one", {"d": METRES}),
        ("rgb", dict.fromkeys("RGB", METRES)),
    ):
        exr.File({"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage}, channels).write(
            f"{tmp_path}/{name}.exr"
        )
    for name in ("z", "one"):
        np.testing.assert_array_equal(read_depth(tmp_path / f"{name}.exr"), METRES)
    with pytest.raises(UserError, match="none of them Z, depth or Y"):
        read_depth(tmp_path / "rgb.exr")
    (tmp_path / "bad.exr").write_bytes(b"no EXR")
    with pytest.raises(UserError, match=r"bad\.exr: cannot be read as a depth map \(not an EXR file"):
        read_depth(tmp_path / "bad.exr")
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(UserError, match=r"needs the package OpenEXR: pip install 'dino-value\[images\]'"):
        read_depth(tmp_path / "z.exr")


def test_matlab_5_is_called_that(tmp_path: Path) -> None:
    savemat(tmp_path / "nyu_depth_v2_labeled.mat", {"depths": METRES})
    with pytest.raises(UserError, match=r"labeled\.mat: a MATLAB 5 file, .*save it anew with save\(…, '-v7\.3'\)"):
        open_labelled("nyuv2", tmp_path)


# Sizes and maxima


def test_maps_of_another_size_are_resized_and_said(tmp_path: Path) -> None:
    root = pairs(tmp_path, size=(12, 8))
    with pytest.warns(UserWarning, match="depth maps of 6×4 pixels, images of 12×8: the maps are resized"):
        source = open_labelled("nyuv2", root)
    image, depth = source.load(0)
    assert image.shape[1:] == depth.shape == (8, 12)
    np.testing.assert_allclose(depth[::2, ::2], METRES, atol=1e-3)
    assert any("resized" in note for note in check_data(str(root), near=-1).parts[0].notes)


def test_a_turned_image_is_named_as_the_cause(tmp_path: Path) -> None:
    root, exif = pairs(tmp_path), Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (6, 4)).save(root / "train" / "rgb_0.jpg", exif=exif)
    with pytest.warns(UserWarning, match="1 of 3 labelled images are turned by their EXIF tag"):
        source = open_labelled("nyuv2", root)
    with pytest.raises(UserError, match=r"its image has 4×6; an EXIF tag turns the image"):
        source.load(0)


@pytest.mark.parametrize(("most", "said"), [(9.0, False), (8.0, False), (7.0, True), (2.0, True)])
def test_more_than_a_fifth_beyond_the_maximum_is_said(most: float, said: bool, tmp_path: Path) -> None:
    root = pairs(tmp_path)
    beyond = float((most + 1e-4 < METRES).mean())
    with using(Conventions(max_depth=most)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = open_labelled("nyuv2", root)
    texts = [str(warning.message) for warning in caught]
    assert (
        any(f"{beyond:.0%} of the known depths lie beyond data.max_depth={most:g} m" in text for text in texts) == said
    )
    assert float((source.load(0)[1] == 0).float().mean()) == pytest.approx(beyond)


def test_the_maximum_of_the_mat(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = np.zeros((2, 3, 6, 4), np.uint8)
        file["depths"] = np.stack([METRES.T, METRES.T])
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([1]), "testNdxs": np.array([2])})
    with using(Conventions(max_depth=5)), pytest.warns(UserWarning, match=r"beyond data\.max_depth=5 m"):
        source = open_labelled("nyuv2", tmp_path)
    assert float(source.load(0)[1].max()) <= 5


# Lists


def test_names_of_lists(tmp_path: Path) -> None:
    root = pairs(tmp_path / "set one")
    absolute = [f"{root}/train/rgb_{n}.jpg\t{root}/train/depth_{n}.png\n" for n in range(3)]
    (root / "nyu_train.txt").write_text("".join(absolute))
    assert open_labelled("nyuv2", root).load(2)[1].shape == (4, 6)
    (root / "nyu_train.txt").write_text("".join(line.replace("\t", " ") for line in absolute))
    with pytest.raises(UserError, match=r"line 1 has 4 parts .*if names have spaces in them, put tabs"):
        open_labelled("nyuv2", root)


def test_pairs_without_lists_are_not_photographs(tmp_path: Path) -> None:
    root = pairs(tmp_path)
    for file in root.glob("*.txt"):
        file.unlink()
    assert recognise(str(root)) == "nyuv2"
    report = check_data(str(root), near=-1)
    assert not report.usable
    assert "lists *train*.txt and *test*.txt" in (report.parts[0].error or "")
    with pytest.raises(UserError, match=r"4 of 8 files looked at are depth maps .*depth_0\.png\), not photographs"):
        open_views(str(root), SETTINGS)
    Image.new("RGB", (4, 4)).save(tmp_path / "in_depth.png")  # a name alone is none
    for file in root.rglob("depth_*.png"):
        file.unlink()
    assert recognise(str(root)) == "images"
