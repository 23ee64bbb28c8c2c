"""Folders of images: read one file, list a folder, and the class-per-folder layout of ImageNet."""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dino_value.data.labelled import Kind, Split, file_groups
from dino_value.data.tars import FORMATS, TarMember
from dino_value.data.walking import files_below, folders_in
from dino_value.errors import UserError

EXTENSIONS = frozenset(f".{name}" for name in FORMATS)
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
        raise UserError(f"{root}: no images in this folder (looked for {', '.join(sorted(EXTENSIONS))})")
    # By posix path: the same order on every file system.
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


@contextmanager
def decoded(path: str | os.PathLike[str], what: str = "an image") -> Iterator[Image.Image]:
    """An image file, decoded; what is raised while it is open is put down to it.

    Raises:
        UserError: naming the file when it cannot be opened or decoded, or has more pixels than PIL deems safe
            (2 · PIL.Image.MAX_IMAGE_PIXELS, 178,956,970): refused by its header, before any memory is taken.
    """
    try:
        content = io.BytesIO(path.read_bytes()) if isinstance(path, TarMember) else path
        with warnings.catch_warnings(), Image.open(content) as image:
            # Damaged EXIF, palettes with transparency: the pixels are still good.
            warnings.simplefilter("ignore")
            image.load()
            yield image
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path}: too large to decode safely ({_one_line(error)}); scale it down or remove it"
        ) from None
    except _DECODE_ERRORS as error:
        raise UserError(f"{path}: cannot be read as {what} ({_one_line(error)}); replace or remove it") from None


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """One image file, or member of a shard, as uint8 [3 H W] RGB, upright by its EXIF tag.

    Greyscale, palette and CMYK are converted, an alpha channel is dropped, 16-bit greyscale is scaled to 8.

    Raises:
        UserError: as `decoded`, or pixels in floating point or of 32 bits, which have no agreed range.
    """
    with decoded(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "I" and image.format == "TIFF":
            raise ValueError("pixels of 32 bits have no agreed range")
        if upright.mode.startswith("I"):  # I;16 is 16-bit grey, and I what some decoders make of it
            grey = np.asarray(upright, dtype=np.int64)
            upright = Image.fromarray((grey.clip(0, 65535) // 257).astype(np.uint8))
        elif upright.mode in ("P", "LA", "PA"):
            upright = upright.convert("RGBA")
        elif upright.mode == "F":
            raise ValueError("pixels in floating point have no agreed range")
        pixels = np.array(upright.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


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


def read_depth(path: str | os.PathLike[str], scale: float = 1000.0) -> Tensor:
    """One depth map as float32 [H W] metres: a 16-bit one-channel PNG of units of 1/`scale` metres.

    Raises:
        UserError: as `decoded`, or not 16 bits deep.
    """
    with decoded(path, "a depth map") as image:
        mode, units = image.mode, np.array(image)
    if not mode.startswith("I"):
        raise UserError(f"{path}: a depth map is a 16-bit one-channel PNG, this is of PIL's mode {mode}; convert it")
    return torch.from_numpy(units.astype(np.float32) / np.float32(scale))


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

    def __len__(self) -> int:
        return len(self._items)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        path, label = self._items[index]
        return read_image(path), torch.tensor(label)

    def name(self, index: int) -> str:
        return str(self._items[index][0])

    def group(self, index: int) -> str:
        return self._groups[index]


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
