"""Images that are not three channels of eight bits: read as told, or refused by what they are."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_value.config import DataConfig
from dino_value.data import open_views
from dino_value.data.check import check_data
from dino_value.data.conventions import Conventions, conventions, using
from dino_value.data.folders import list_images, read_image
from dino_value.data.layouts import open_labelled
from dino_value.data.views import BACKENDS, augment
from dino_value.errors import UserError

Write = Callable[..., Path]
BANDS = np.random.default_rng(0).integers(0, 256, (6, 4, 5), dtype=np.uint8)


def tiff(path: Path, values: np.ndarray, **options: Any) -> Path:
    pytest.importorskip("tifffile").imwrite(path, values, **options)
    return path


# Channels


def test_four_channels_are_kept_where_four_are_wanted(tmp_path: Path, write_image: Write) -> None:
    path = write_image("a.png", Image.fromarray(BANDS[..., :4], "RGBA"))
    assert torch.equal(read_image(path), torch.from_numpy(BANDS[..., :3]).permute(2, 0, 1))
    assert torch.equal(read_image(path, Conventions(4)), torch.from_numpy(BANDS[..., :4]).permute(2, 0, 1))
    with pytest.raises(UserError, match=r"it has 3 channels, and backbone\.kwargs\.in_chans=4 takes 4"):
        read_image(write_image("b.png", Image.fromarray(BANDS[..., :3])), Conventions(4))


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_of_many_channels(planes: bool, bits: int, tmp_path: Path) -> None:
    values = BANDS if bits == 8 else BANDS.astype(np.uint16) * 257
    kept = np.moveaxis(values, -1, 0) if planes else values
    layout = "separate" if planes else "contig"
    path = tiff(tmp_path / "a.tif", kept, photometric="minisblack", planarconfig=layout)
    assert torch.equal(read_image(path, Conventions(5)), torch.from_numpy(BANDS).permute(2, 0, 1))
    with pytest.raises(UserError, match="it has 5 channels, and the model takes 3"):
        read_image(path)


def test_grey_stays_grey(write_image: Write) -> None:
    path = write_image("a.png", Image.fromarray(BANDS[..., 0]))
    assert torch.equal(read_image(path, Conventions(1)), torch.from_numpy(BANDS[..., 0])[None])


def test_a_dropped_channel_is_said(write_image: Write, tmp_path: Path) -> None:
    for index in range(3):
        write_image(f"images/{index}.png", Image.fromarray(BANDS[..., : 4 - index % 2]))
    said = "2 of 3 images have a fourth channel, which is dropped; backbone.kwargs.in_chans=4 keeps it"
    with pytest.warns(UserWarning, match="2 of 3 images have a fourth channel"):
        open_views(str(tmp_path / "images"), SETTINGS)
    assert check_data(str(tmp_path / "images")).parts[0].notes == [said]
    with using(Conventions(4)), warnings.catch_warnings():
        warnings.simplefilter("error")
        open_views(str(tmp_path / "images"), SETTINGS)


class SETTINGS:
    global_size, local_size, local_count = 8, 4, 2
    global_scale, local_scale = (0.4, 1.0), (0.1, 0.4)
    flip = jitter = grayscale = solarize = 1.0
    brightness = contrast = saturation = 0.4
    hue, blur, blur_sigma = 0.1, (1.0, 1.0, 1.0), (0.1, 1.0)
    augment = "kornia"


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "kornia_compiled"])
def test_views_of_any_channels(channels: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours apart, every operation is done; the channels are not mixed up."""
    monkeypatch.setattr(SETTINGS, "augment", backend)
    large = torch.randint(0, 256, (2, 3, channels, 8, 8), dtype=torch.uint8)
    small = torch.zeros(0, 3, channels, 4, 4, dtype=torch.uint8)
    found = augment(large, small, SETTINGS, 0)  # type: ignore[arg-type]
    assert found[0].shape == (6, channels, 8, 8)
    monkeypatch.setattr(SETTINGS, "jitter", 0.0)
    monkeypatch.setattr(SETTINGS, "blur", (0.0, 0.0, 0.0))
    monkeypatch.setattr(SETTINGS, "solarize", 0.0)
    monkeypatch.setattr(SETTINGS, "augment", "kornia")
    plain, _ = augment(large, small, SETTINGS, 0)  # type: ignore[arg-type]
    assert torch.equal(plain, large.flatten(0, 1).flip(-1).float() / 255)


# Range


def test_twelve_bits_in_sixteen(write_image: Write, tmp_path: Path) -> None:
    values = np.array([[0, 1000, 4095]], np.uint16)
    path = write_image("scans/a.png", Image.fromarray(values))
    assert read_image(path, Conventions(range=(0, 4095)))[0].tolist() == [[0, 62, 255]]
    (note,) = check_data(str(tmp_path / "scans")).parts[0].notes
    assert note.startswith("1 of 1 images have 16 bits and use less than a sixteenth of them")
    assert note.endswith("give data.range=[0,4095]")
    with pytest.warns(UserWarning, match="12 bits in 16"):
        open_views(str(tmp_path / "scans"), SETTINGS)
    with using(Conventions(range=(0, 4095))):
        assert check_data(str(tmp_path / "scans")).parts[0].notes == []
    declared = tiff(tmp_path / "b.tif", values, extratags=[(281, "H", 1, 4095, False)])
    assert read_image(declared)[0].tolist() == [[0, 62, 255]]


@pytest.mark.parametrize(
    ("dtype", "said"), [("int16", r"16 bits with a sign \(int16\)"), ("float32", "floating point"), ("uint32", "32")]
)
def test_kinds_without_a_range_are_called_by_name_and_read_with_one(dtype: str, said: str, tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", np.array([[10, 35, 60]]).astype(dtype))
    with pytest.raises(UserError, match=rf"a\.tif: .*pixels .*{said}.* no agreed range\); .*data\.range=\[LOW,HIGH\]"):
        read_image(path)
    assert read_image(path, Conventions(range=(10, 60)))[2].tolist() == [[0, 127, 255]]
    many = tiff(tmp_path / "b.tif", np.full((3, 2, 4), 35).astype(dtype), photometric="minisblack")
    assert read_image(many, Conventions(4, (10, 60))).unique().tolist() == [127]


def test_dicom(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    values = np.array([[0, 2048, 4095]], np.uint16)
    file = pydicom.Dataset()
    file.Rows, file.Columns, file.SamplesPerPixel, file.PhotometricInterpretation = 1, 3, 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
    file.RescaleSlope, file.RescaleIntercept, file.PixelData = 1, -1000, values.tobytes() + b"\0\0"
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.SOPClassUID, file.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
    path = tmp_path / "scans" / "a.dcm"
    path.parent.mkdir()
    pydicom.dcmwrite(path, file, enforce_file_format=True)
    assert list_images(path.parent) == [path]
    assert read_image(path)[1].tolist() == [[0, 127, 255]]  # by the bits it says it stores
    assert read_image(path, Conventions(range=(-1000, 1048)))[1].tolist() == [[0, 255, 255]]
    file.PhotometricInterpretation = "MONOCHROME1"
    pydicom.dcmwrite(path, file, enforce_file_format=True)
    assert read_image(path)[1].tolist() == [[255, 127, 0]]
    path.write_bytes(b"no DICOM")
    with pytest.raises(UserError, match=r"a\.dcm: cannot be read as an image \(not a DICOM"):
        read_image(path)


@pytest.mark.parametrize(("name", "package"), [("a.dcm", "pydicom"), ("a.tif", "tifffile")])
def test_a_reader_that_is_not_installed_is_named(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    Image.fromarray(BANDS[..., 0]).save(tmp_path / "a.tif")
    (tmp_path / "a.dcm").touch()
    with pytest.raises(UserError, match=rf"needs the package {package}: pip install 'dino-value\[images\]'"):
        read_image(tmp_path / name, Conventions(4))


# What is not read


def test_files_that_are_not_read_are_counted(write_image: Write, tmp_path: Path) -> None:
    write_image("images/a.png", Image.fromarray(BANDS[..., 0]))
    for name in ("b.heic", "c.HEIC", "deep/d.nef", "notes.txt"):
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).touch()
    assert f"{tmp_path / 'images'}: not read: 2 .heic, 1 .nef, 1 .txt" in check_data(str(tmp_path / "images")).notes
    with pytest.warns(UserWarning, match=r"not read: 2 \.heic, 1 \.nef$"):
        open_views(str(tmp_path / "images"), SETTINGS)
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(UserError, match=r"no images in this folder .*; it holds 2 \.heic"):
        list_images(tmp_path / "images")


def test_max_pixels(write_image: Write) -> None:
    path = write_image("a.png", Image.new("RGB", (30, 20)))
    assert read_image(path, Conventions(max_pixels=600)).shape == (3, 20, 30)
    with pytest.raises(UserError, match=r"a\.png: too large .*600 pixels where 599 are the most.*data\.max_pixels"):
        read_image(path, Conventions(max_pixels=599))


def test_a_higher_limit_than_pils_is_heard(write_image: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_image("a.png", Image.new("L", (30, 20)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="too large"):
        read_image(path, Conventions(max_pixels=200))
    assert read_image(path, Conventions(max_pixels=1000)).shape == (3, 20, 30)


# EXIF


def turned_set(root: Path, orientation: int, size: tuple[int, int], upright: bool) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for split in ("training", "validation"):
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        Image.new("RGB", size).save(root / "images" / split / "0.jpg", exif=exif)
        ids = Image.fromarray((np.arange(size[0] * size[1]) % 3).reshape(size[::-1]).astype(np.uint8))
        ids = ids.transpose(Image.Transpose.ROTATE_270) if upright else ids
        ids.save(root / "annotations" / split / "0.png")
    (root / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tfloor\n")
    return root


def test_turned_photographs_of_a_labelled_set(tmp_path: Path) -> None:
    said = "1 of 1 labelled images are turned by their EXIF tag: label maps must be drawn on the upright picture"
    square = turned_set(tmp_path / "square", 6, (4, 4), upright=False)
    with pytest.warns(UserWarning, match=said):
        open_labelled("ade20k", square)
    assert said in check_data(str(square)).parts[0].notes
    oblong = open_labelled("ade20k", turned_set(tmp_path / "oblong", 6, (6, 4), upright=False), warn=False)
    with pytest.raises(UserError, match="its image has 4×6; an EXIF tag turns the image: draw its map on the upright"):
        oblong.load(0)
    upright = open_labelled("ade20k", turned_set(tmp_path / "upright", 6, (6, 4), upright=True), warn=False)
    assert upright.load(0)[1].shape == (6, 4)


# Conventions


def test_conventions_hold_where_they_are_told_and_stay_with_a_source(write_image: Write, tmp_path: Path) -> None:
    write_image("images/a.png", Image.fromarray(BANDS[..., :4], "RGBA"))
    with using(Conventions(4)):
        views = open_views(str(tmp_path / "images"), SETTINGS)
    assert conventions() == Conventions()
    assert views.batch([0], 0)[0].shape == (2, 1, 4, 8, 8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"range": [1]}, r"data\.range=\[1\]: give two numbers"),
        ({"range": [5, 5]}, "lower value first"),
        ({"max_pixels": 0}, r"data\.max_pixels=0: must be above 0"),
        ({"depth_units": -1}, r"data\.depth_units=-1: must be above 0"),
    ],
)
def test_conventions_that_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Conventions.of(DataConfig(unlabeled="x", **given))
