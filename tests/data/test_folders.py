"""Reading image files and folders of them."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_value.data.folders import ImageFolder, list_images, open_imagefolder, read_image, read_labels
from dino_value.errors import UserError

Write = Callable[..., Path]
GREY = Image.fromarray(np.array([[0, 128, 255]], np.uint8))


def test_rgb(write_image: Write) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    image = read_image(write_image("a.png", Image.fromarray(pixels)))
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_every_mode_becomes_rgb(mode: str, write_image: Write) -> None:
    image = read_image(write_image("a.png", GREY.convert("RGB").convert(mode)))
    assert image.shape == (3, 1, 3)
    assert image[:, 0, 0].tolist() == [0, 0, 0]
    assert image[:, 0, 2].tolist() == [255, 255, 255]


def test_palette_with_transparency(write_image: Write) -> None:
    image = read_image(write_image("a.png", GREY.convert("P"), transparency=b"\x00\x80\xff"))
    assert image[0].tolist() == [[0, 128, 255]]


def test_cmyk(write_image: Write) -> None:
    image = read_image(write_image("a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100))
    assert image.float().mean((1, 2)).tolist() == pytest.approx([255, 0, 0], abs=4)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_is_scaled_not_clipped(name: str, write_image: Write) -> None:
    image = read_image(write_image(name, Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))))
    assert image[1].tolist() == [[0, 100, 255]]


@pytest.mark.parametrize("pixels", [np.zeros((2, 3), np.int32), np.zeros((2, 3), np.float32)])
def test_pixels_without_a_range_are_refused(pixels: np.ndarray, write_image: Write) -> None:
    """Scaled as 16 bits they would be black."""
    with pytest.raises(UserError, match=r"a\.tif: cannot be read as an image \(pixels .* have no agreed range\)"):
        read_image(write_image("a.tif", Image.fromarray(pixels)))


def test_exif_rotation_is_applied(write_image: Write) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    image = read_image(write_image("a.jpg", Image.fromarray(pixels), exif=exif, quality=100))
    assert image.shape == (3, 16, 8)
    assert image[:, :7].min() > 200
    assert image[:, 9:].max() < 55


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_damaged_file_is_named(suffix: str, damage: str, write_image: Write) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    path = write_image(f"bad{suffix}", Image.fromarray(noise))
    content = path.read_bytes()
    broken = {"empty": b"", "truncated": content[: len(content) // 2], "text": b"not an image"}[damage]
    path.write_bytes(broken)
    with pytest.raises(UserError, match=f"bad{suffix}: cannot be read as an image") as raised:
        read_image(path)
    assert "\n" not in str(raised.value)
    assert str(raised.value).count(str(path)) == 1


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.png"):
        read_image(tmp_path / "none.png")


def test_label_maps(write_image: Write) -> None:
    ids = np.array([[0, 3, 255]], np.uint8)
    palette = Image.fromarray(ids).copy()
    palette.putpalette(list(range(255, -1, -1)) * 3)
    assert read_labels(write_image("a.png", Image.fromarray(ids))).tolist() == ids.tolist()
    assert read_labels(write_image("b.png", palette)).tolist() == ids.tolist()
    assert read_labels(write_image("c.png", Image.fromarray(ids.astype(np.uint16)))).tolist() == ids.tolist()


def test_label_map_with_channels_is_refused(write_image: Write) -> None:
    with pytest.raises(UserError, match=r"a\.png: a label map has one channel"):
        read_labels(write_image("a.png", GREY.convert("RGB")))


def test_list_is_nested_sorted_and_only_images(tmp_path: Path, write_image: Write) -> None:
    for name in ("b/2.png", "b/10.JPG", "a.png", ".hidden.png"):
        write_image(name, GREY)
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)] == [
        "a.png",
        "b/10.JPG",
        "b/2.png",
    ]


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images"):
        list_images(tmp_path)
    with pytest.raises(UserError, match="no class folders"):
        ImageFolder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="cat: no images"):
        ImageFolder(tmp_path)
    with pytest.raises(UserError, match="train: no such folder"):
        open_imagefolder(tmp_path, "training")


def test_image_folder(tmp_path: Path, write_image: Write) -> None:
    for name in ("train/b/1_0.png", "train/a/2_0.png", "train/c/2_1.png", "val/c/3_0.png"):
        write_image(name, GREY)
    training = open_imagefolder(tmp_path, "training", group_pattern=r"^(\d+)_")
    assert training.class_names == ["a", "b", "c"]
    assert [int(training.load(index)[1]) for index in range(3)] == [0, 1, 2]
    assert [training.group(index) for index in range(3)] == ["2", "1", "2"]
    assert training.name(1).endswith("1_0.png")

    validation = open_imagefolder(tmp_path, "validation")  # lacks a and b: c is still 2
    assert validation.class_names == training.class_names
    assert int(validation.load(0)[1]) == 2

    write_image("val/d/4_0.png", GREY)
    with pytest.raises(UserError, match="d: not one of the 3 classes"):
        open_imagefolder(tmp_path, "validation")


@pytest.mark.parametrize("reader", [read_image, read_labels])
def test_an_image_of_too_many_pixels_is_refused_by_its_header(reader: Callable[[Path], object], tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))))
    with pytest.raises(UserError, match=r"bomb\.png: too large to decode safely .*3600000000 pixels") as raised:
        reader(path)
    assert "\n" not in str(raised.value)
