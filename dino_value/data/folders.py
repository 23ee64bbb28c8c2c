"""Folders of images: read one file, list a folder, and the class-per-folder layout of ImageNet."""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dino_value.data.conventions import Conventions, conventions
from dino_value.data.labelled import Kind, Split, file_groups
from dino_value.data.pixels import (
    DEPTH_FILES,
    DICOM,
    NoRange,
    NoReader,
    depth_of_exr,
    depth_of_npy,
    from_dicom,
    from_pil,
    from_tiff,
    is_dicom,
    is_tiff,
    look_at,
)
from dino_value.data.tars import FORMATS, TarMember
from dino_value.data.walking import files_below, folders_in
from dino_value.errors import UserError

EXTENSIONS = frozenset((*(f".{name}" for name in FORMATS), *DICOM))
PICTURES = frozenset(
    (".heic", ".heif", ".avif", ".jp2", ".j2k", ".jfif", ".jxl", ".nef", ".cr2", ".cr3", ".arw", ".dng", ".psd", ".exr")
)
"""Pictures that no reader here takes."""
# What PIL's decoders raise on damaged files, as seen: not only OSError.
_DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    IndexError,
)


def list_images(root: str | Path) -> list[Path]:
    """Every image under `root` and its sub-folders (links are followed, each folder once), sorted by relative path.

    Raises:
        UserError: no such folder, or no image in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of images")
    found = [
        Path(file)
        for file in files_below(root)
        if os.path.splitext(file)[1].lower() in EXTENSIONS and not os.path.basename(file).startswith(".")
    ]
    if not found:
        held = not_read(root)
        raise UserError(
            f"{root}: no images in this folder (looked for {', '.join(sorted(EXTENSIONS))})"
            + (f"; it holds {held}" if held else "")
        )
    # By posix path: the same order on every file system.
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def not_read(root: str | Path, among: Collection[str] | None = None) -> str:
    """How many files under a folder no reader takes, by extension, in words; only those `among` these if given."""
    names = [name for name in map(os.path.basename, files_below(root)) if not name.startswith(".")]
    endings = Counter(os.path.splitext(name)[1].lower() for name in names)
    left = {
        ending: count
        for ending, count in sorted(endings.items())
        if ending not in EXTENSIONS and ending != ".tar" and (among is None or ending in among)
    }
    return ", ".join(f"{count} {ending or 'without extension'}" for ending, count in left.items())


@contextmanager
def decoded(
    path: str | os.PathLike[str], what: str = "an image", told: Conventions | None = None
) -> Iterator[Image.Image]:
    """An image file, decoded; what is raised while it is open is put down to it.

    Raises:
        UserError: naming the file when it cannot be opened or decoded, or has more pixels than `data.max_pixels` (by
            default what PIL deems safe): refused by its header, before any memory is taken.
    """
    most = (told or conventions()).max_pixels
    if most > 2 * (Image.MAX_IMAGE_PIXELS or most):
        Image.MAX_IMAGE_PIXELS = (most + 1) // 2
    try:
        content = io.BytesIO(path.read_bytes()) if isinstance(path, TarMember) else path
        with warnings.catch_warnings(), Image.open(content) as image:
            # Damaged EXIF, palettes with transparency: the pixels are still good.
            warnings.simplefilter("ignore")
            if image.width * image.height > most:
                raise Image.DecompressionBombError(f"{image.width * image.height} pixels where {most} are the most")
            image.load()
            yield image
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path}: too large to decode safely ({_one_line(error)}); scale it down, remove it, or raise "
            "data.max_pixels"
        ) from None
    except _DECODE_ERRORS as error:
        raise _unreadable(path, what, error) from None


def _unreadable(path: str | os.PathLike[str], what: str, error: Exception) -> UserError:
    if isinstance(error, NoRange):
        return UserError(
            f"{path}: cannot be read as {what} ({error} have no agreed range); say which values are black and white, "
            "data.range=[LOW,HIGH], or convert it"
        )
    if isinstance(error, NoReader):
        return UserError(f"{path}: cannot be read: {error}")
    return UserError(f"{path}: cannot be read as {what} ({_one_line(error)}); replace or remove it")


def read_image(path: str | os.PathLike[str], told: Conventions | None = None) -> Tensor:
    """One image file, or member of a shard, as uint8 [C H W], upright by its EXIF tag.

    For three channels, RGB: greyscale, palette and CMYK are converted, an alpha channel is dropped. Greyscale of 16
    bits is scaled to 8, from `told.range` where that is given.

    Args:
        told: the conventions; those that hold here by default.

    Raises:
        UserError: as `decoded`, or pixels in floating point, with a sign or of 32 bits without a range, or channels
            that the model has no use for.
    """
    told = told or conventions()
    try:
        if is_dicom(path):
            pixels = from_dicom(path, told)
        elif is_tiff(path) and told.channels not in (1, 3):
            pixels = from_tiff(path, told)
        else:
            pixels = _by_pil(path, told)
    except _DECODE_ERRORS as error:
        raise _unreadable(path, "an image", error) from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _by_pil(path: str | os.PathLike[str], told: Conventions) -> NDArray[np.uint8]:
    try:
        with decoded(path, told=told) as image:
            return from_pil(image, told)
    except UserError:
        # Kinds of TIFF that PIL does not know, where another reader is at hand.
        if is_tiff(path) and find_spec("tifffile") is not None and look_at(path) is None:
            return from_tiff(path, told)
        raise


def read_labels(path: str | os.PathLike[str]) -> Tensor:
    """One label map as int64 [H W]: a one-channel image of ids (the indices, if it has a palette).

    Raises:
        UserError: as `decoded`, or several channels.
    """
    with decoded(path, "a label map") as image:
        ids = np.array(image)
    if ids.ndim != 2:
        raise UserError(f"{path}: a label map has one channel of class ids, this image has {ids.shape[-1]}")
    return torch.from_numpy(ids.astype(np.int64))


def read_depth(path: str | os.PathLike[str], scale: float | None = None) -> Tensor:
    """One depth map as float32 [H W] metres: integers are units of 1/`scale` metres, floating point is in metres.

    A 16-bit one-channel PNG or TIFF, a TIFF in floating point, `.npy`, or `.exr` (the package OpenEXR).

    Args:
        scale: units a metre; `data.depth_units` by default.

    Raises:
        UserError: as `decoded`, or 8 bits deep, or of several channels.
    """
    scale = conventions().depth_units if scale is None else scale
    ending = Path(path).suffix.lower()
    if ending in DEPTH_FILES:
        try:
            units = depth_of_npy(path) if ending == ".npy" else depth_of_exr(path)
        except _DECODE_ERRORS as error:
            raise _unreadable(path, "a depth map", error) from None
    else:
        with decoded(path, "a depth map") as image:
            mode, units = image.mode, np.array(image)
        if not (mode.startswith("I") or mode == "F"):
            raise UserError(
                f"{path}: a depth map is a 16-bit one-channel PNG, this is of PIL's mode {mode}; convert it"
            )
    metres = units.astype(np.float32)
    return torch.from_numpy(metres if units.dtype.kind == "f" else metres / np.float32(scale))


def _one_line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text names the file once more, or a buffer
        return "its content is of no known image format"
    return (str(error) or type(error).__name__).splitlines()[0]


class ImageFolder:
    """One sub-folder a class: the layout of ImageNet.

    Args:
        root: holds one folder of images per class (images may be nested in it).
        classes: the class names in label order; by default the sub-folders, sorted. A validation split is
            given those of training, so that a class it lacks does not shift the labels.
        group_pattern, neighbours: see `labelled.file_groups`.

    Raises:
        UserError: no folder, no class, an empty class, or a folder outside `classes`.
    """

    kind: Kind = "classes"

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str] | None = None,
        group_pattern: str | None = None,
        neighbours: int = 1,
    ) -> None:
        self.root = Path(root)
        folders = class_folders(self.root)
        self.class_names = list(folders if classes is None else classes)
        self.num_classes = len(self.class_names)
        unknown = sorted(set(folders) - set(self.class_names))
        if unknown:
            raise UserError(
                f"{self.root / unknown[0]}: not one of the {self.num_classes} classes of the training split"
            )
        labels = {name: label for label, name in enumerate(self.class_names)}
        self._items = [(path, labels[name]) for name in folders for path in list_images(self.root / name)]
        self._groups = file_groups([path for path, _ in self._items], group_pattern, neighbours)
        self._told = conventions()

    def __len__(self) -> int:
        return len(self._items)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        path, label = self._items[index]
        return read_image(path, self._told), torch.tensor(label)

    def name(self, index: int) -> str:
        return str(self._items[index][0])

    def group(self, index: int) -> str:
        return self._groups[index]

    def label(self, index: int) -> int:
        return self._items[index][1]


def class_folders(root: Path) -> list[str]:
    """The names of the class folders of `root`, sorted.

    Raises:
        UserError: no such folder, or no folder in it.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of classes")
    names = folders_in(root)
    if not names:
        raise UserError(f"{root}: no class folders in it; expected one sub-folder of images per class")
    return names


def open_imagefolder(
    root: str | Path, split: Split, group_pattern: str | None = None, neighbours: int = 1
) -> ImageFolder:
    """The train/ or val/ half of an ImageNet-like root; both use the classes of train/."""
    root = Path(root)
    folder = root / ("train" if split == "training" else "val")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; the data set root must hold train/ and val/")
    return ImageFolder(folder, class_folders(root / "train"), group_pattern, neighbours)
