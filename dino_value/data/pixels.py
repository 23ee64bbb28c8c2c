"""Pixels of image files: what readers hand over, brought to uint8 [C H W]; and readers beside PIL."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from dino_value.data.conventions import Conventions
from dino_value.data.tars import TarMember

DICOM = (".dcm", ".dicom")
DEPTH_FILES = (".npy", ".exr")
"""Depth maps that PIL does not read."""
_ORIENTATION = 0x0112  # EXIF
_SAMPLES, _BITS, _FORMAT, _MOST = 277, 258, 339, 281  # TIFF: samples a pixel, bits and kind of each, MaxSampleValue
EIGHT, SIXTEEN = (0.0, 255.0), (0.0, 65535.0)


class NoRange(ValueError):
    """Pixels of a kind whose black and white nobody has agreed on."""


class NoReader(ValueError):
    """A file that an optional package reads, which is not installed."""


Path_ = str | os.PathLike[str]


def from_pil(image: Image.Image, told: Conventions) -> NDArray[np.uint8]:
    """A decoded picture, turned upright, as uint8 [H W C] of `told.channels`.

    Raises:
        ValueError: it has other channels, or its numbers have no agreed range.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        return deep(np.asarray(upright), told, _span(image))
    if told.channels == 3:
        if upright.mode in ("P", "LA", "PA"):
            upright = upright.convert("RGBA")
        return np.array(upright.convert("RGB"))
    if told.channels == 1:
        return np.array(upright.convert("L"))[..., None]
    if upright.mode in ("P", "1"):
        upright = upright.convert("RGBA" if "transparency" in upright.info else "RGB")
    return _of(np.array(upright), told.channels)


def from_tiff(path: Path_, told: Conventions) -> NDArray[np.uint8]:
    """A TIFF of any number of channels, by tifffile.

    Raises:
        ValueError: as `from_pil`; or tifffile is not installed, or cannot read it.
    """
    try:
        import tifffile
    except ImportError:
        raise NoReader("a TIFF of this kind needs the package tifffile: pip install 'dino-value[images]'") from None
    with tifffile.TiffFile(_content(path)) as file:
        page = file.pages[0]
        if page.imagewidth * page.imagelength > told.max_pixels:
            raise ValueError(f"{page.imagewidth}×{page.imagelength} pixels are more than data.max_pixels")
        values, axes = page.asarray(), page.axes
        most = page.tags.get(_MOST)
    if axes.startswith("S") and values.ndim == 3:
        values = np.moveaxis(values, 0, -1)
    if values.dtype == np.uint8:
        return _of(values, told.channels)
    top = None if most is None else float(np.max(most.value))
    return deep(values, told, (0.0, top or SIXTEEN[1]) if values.dtype == np.uint16 else _named(values.dtype))


def from_dicom(path: Path_, told: Conventions) -> NDArray[np.uint8]:
    """A DICOM image (its first frame), by pydicom: the modality's units, and as range its stored bits.

    Raises:
        ValueError: as `from_pil`; or pydicom is not installed, or cannot read it.
    """
    try:
        import pydicom
    except ImportError:
        raise NoReader("a DICOM file needs the package pydicom: pip install 'dino-value[images]'") from None
    try:
        file = pydicom.dcmread(_content(path))
        if int(file.Rows) * int(file.Columns) > told.max_pixels:
            raise ValueError(f"{file.Columns}×{file.Rows} pixels are more than data.max_pixels")
        stored = np.asarray(file.pixel_array)
    except (pydicom.errors.InvalidDicomError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"not a DICOM image that pydicom reads: {error}") from None
    if int(getattr(file, "NumberOfFrames", 1) or 1) > 1:
        stored = stored[0]
    slope, shift = float(getattr(file, "RescaleSlope", 1)), float(getattr(file, "RescaleIntercept", 0))
    values = stored * slope + shift
    if told.range is None and file.PixelRepresentation:
        raise NoRange("pixels with a sign (as Hounsfield units)")
    ends = told.range or (shift, (2 ** int(file.BitsStored) - 1) * slope + shift)
    if file.PhotometricInterpretation == "MONOCHROME1":  # white is 0
        values = ends[0] + ends[1] - values
    return _of(_scaled(values, ends), told.channels)


def depth_of_npy(path: Path_) -> NDArray[Any]:
    """An array [H W] of a .npy file, axes of length one left out.

    Raises:
        ValueError: not such a file, or not such an array.
    """
    values = np.load(os.fspath(path), allow_pickle=False)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf":
        raise ValueError("not one array of numbers")
    flat = values.squeeze()
    if flat.ndim != 2:
        raise ValueError(f"an array of shape {values.shape} where height × width is wanted")
    return flat


def depth_of_exr(path: Path_) -> NDArray[Any]:
    """The channel Z, depth or Y of an OpenEXR file, or the one that it has, [H W].

    Raises:
        ValueError: the package OpenEXR is not installed, or cannot read it, or there are several channels.
    """
    try:
        import OpenEXR
    except ImportError:
        raise NoReader("an EXR file needs the package OpenEXR: pip install 'dino-value[images]'") from None
    try:
        with OpenEXR.File(os.fspath(path), separate_channels=True) as file:
            channels = {name: np.asarray(channel.pixels) for name, channel in file.channels().items()}
    except RuntimeError as error:
        raise ValueError(f"not an EXR file that OpenEXR reads: {error}") from None
    name = next((name for name in ("Z", "depth", "Depth", "Y") if name in channels), None)
    if name is None and len(channels) > 1:
        raise ValueError(f"channels {', '.join(channels)}, none of them Z, depth or Y")
    return channels[name] if name is not None else next(iter(channels.values()))


def deep(values: NDArray[Any], told: Conventions, span: tuple[float, float] | str) -> NDArray[np.uint8]:
    """Values [H W] or [H W C] of more than 8 bits as uint8 [H W C]; `span` is their range, or why they have none.

    Raises:
        NoRange: none, and `told` has none.
    """
    if told.range is None and isinstance(span, str):
        raise NoRange(span)
    ends = told.range or span
    assert not isinstance(ends, str)
    return _of(_scaled(values, ends), told.channels)


def _scaled(values: NDArray[Any], ends: tuple[float, float]) -> NDArray[np.uint8]:
    scaled = (values.astype(np.float64) - ends[0]) * (255 / (ends[1] - ends[0]))
    # 16 bits fall into 256 steps of 257; a hair above what rounding takes away.
    return np.nan_to_num(scaled + 1e-9, nan=0.0).clip(0, 255).astype(np.uint8)


def _of(values: NDArray[Any], channels: int) -> NDArray[np.uint8]:
    """uint8 [H W] or [H W C'] with the channels that are wanted: grey is repeated, a fourth dropped where 3 are."""
    values = values[..., None] if values.ndim == 2 else values
    has = values.shape[-1]
    if has == channels:
        return np.ascontiguousarray(values)
    if has == 1:
        return np.repeat(values, channels, axis=-1)
    if channels == 3 and has == 4:
        return np.ascontiguousarray(values[..., :3])
    wanted = f"backbone.kwargs.in_chans={channels}" if channels != 3 else "the model"
    raise ValueError(f"it has {has} channels, and {wanted} takes {channels}")


def _span(image: Image.Image) -> tuple[float, float] | str:
    """The range of a deep picture, or what kind it is that has none."""
    tags: Any = getattr(image, "tag_v2", {})
    bits, kind = tags.get(_BITS, (0,))[0], tags.get(_FORMAT, (1,))[0]
    if image.mode == "F":
        return "pixels in floating point"
    if kind == 2:
        return f"pixels of {bits} bits with a sign (int{bits})"
    if image.mode == "I" and image.format == "TIFF" and bits != 16:
        return "pixels of 32 bits"
    return 0.0, float(np.max(tags[_MOST])) if _MOST in tags else SIXTEEN[1]


def _named(dtype: np.dtype[Any]) -> str:
    if dtype.kind == "f":
        return "pixels in floating point"
    bits = dtype.itemsize * 8
    return f"pixels of {bits} bits" + (f" with a sign (int{bits})" if dtype.kind == "i" else "")


def _content(path: Path_) -> Any:
    return io.BytesIO(path.read_bytes()) if isinstance(path, TarMember) else os.fspath(path)


# What a folder's pictures have in common


class Look(NamedTuple):
    """What the header of a picture says: bands, whether EXIF turns it, whether it is deeper than 8 bits, and its size
    (height, width) upright.
    """

    bands: int
    turned: bool
    deep: bool
    size: tuple[int, int]


def look_at(path: Path_) -> Look | None:
    """The header of a picture, nothing decoded; None where PIL knows none."""
    with suppress(Exception), Image.open(_content(path)) as image:
        tags: Any = getattr(image, "tag_v2", {})
        bands = 0 if image.mode == "CMYK" else int(tags.get(_SAMPLES, len(image.getbands())))
        way = image.getexif().get(_ORIENTATION, 1)
        size = (image.width, image.height) if way in (5, 6, 7, 8) else (image.height, image.width)
        return Look(bands, way not in (0, 1), image.mode.startswith("I"), size)
    return None


def remarks(looks: Sequence[Look | None], told: Conventions, labelled: bool = False) -> list[str]:
    """What readers do with these pictures that their owner may not expect, one line each."""
    known = [look for look in looks if look is not None]
    extra = sum(look.bands == 4 for look in known)
    turned = sum(look.turned for look in known)
    found = []
    if extra and told.channels == 3:
        found.append(
            f"{extra} of {len(looks)} images have a fourth channel, which is dropped; "
            "backbone.kwargs.in_chans=4 keeps it"
        )
    if turned and labelled:
        found.append(
            f"{turned} of {len(looks)} labelled images are turned by their EXIF tag: label maps must be drawn on the "
            "upright picture"
        )
    return found


def shallow(look: Look | None, image: Any) -> bool:
    """Whether a 16-bit picture, scaled to uint8, used less than a sixteenth of its range: 12 bits in 16."""
    return look is not None and look.deep and int(image.max()) < 16


SHALLOW = "have 16 bits and use less than a sixteenth of them (12 bits in 16?): give data.range=[0,4095]"
"""What is said of `shallow` pictures."""


def turned(path: Path_, image: Tensor, other: Tensor) -> str:
    """The end of a message about sizes that do not agree: that an EXIF tag is the cause, where they are transposed."""
    look = look_at(path) if image.shape[-2:] == other.shape[::-1] else None
    return "; an EXIF tag turns the image: draw its map on the upright picture" if look and look.turned else ""


def as_rgb(image: Tensor) -> Tensor:
    """[C H W] as three channels to look at: the first three, or the first as grey."""
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)


def is_dicom(path: Path_) -> bool:
    return Path(os.fspath(path)).suffix.lower() in DICOM


def is_tiff(path: Path_) -> bool:
    return Path(os.fspath(path)).suffix.lower() in (".tif", ".tiff")
