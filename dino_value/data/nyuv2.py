"""NYU Depth v2, in its two usual layouts.

- The labelled set: nyu_depth_v2_labeled.mat (MATLAB 7.3, that is HDF5) and splits.mat. MATLAB stores columns first, so
  HDF5 shows `images` as (n, 3, W, H) and `depths` as (n, W, H), in metres.
- Folders, as BTS (arXiv 1907.10326) and AdaBins (arXiv 2011.14141) lay them out: RGB files, 16-bit depth PNG in
  millimetres, and lists whose lines name a pair.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from dino_value.data.conventions import MAX_DEPTH, conventions
from dino_value.data.folders import read_depth, read_image
from dino_value.data.labelled import Kind, LabelledSource, Split, index_groups, resize_target
from dino_value.data.matlab import read_arrays
from dino_value.data.pixels import look_at, turned
from dino_value.errors import UserError

MAT_NAME = "nyu_depth_v2_labeled.mat"
SPLITS_NAME = "splits.mat"
FIFTH = 0.2
"""Of the known depths: when more lie beyond the maximum, it is said."""
_LISTS: dict[Split, tuple[str, ...]] = {"training": ("*train*.txt",), "validation": ("*test*.txt", "*val*.txt")}
# What h5py makes of a damaged file, as seen.
_DAMAGED = (OSError, KeyError, ValueError, TypeError, RuntimeError, IndexError)
# Where the names of a list may begin, as the preparation scripts of BTS leave the files.
_BASES = ("", "sync", "train", "test", "official_splits/train", "official_splits/test")


def open_nyuv2(root: str | Path, split: Split, neighbours: int = 1, check_pairs: bool = True) -> LabelledSource:
    """One split in whichever layout lies under `root`; warns of depths that look like another unit's.

    Raises:
        UserError: neither layout, or see `NYUv2` and `NYUFolder`.
    """
    root = Path(root)
    lists = any(next(root.glob(pattern), None) for patterns in _LISTS.values() for pattern in patterns)
    if lists and not (root / MAT_NAME).exists():
        return NYUFolder(root, split, neighbours, check_pairs=check_pairs)
    return NYUv2(root, split, neighbours)


def valid_depth(metres: Tensor, max_depth: float = MAX_DEPTH) -> Tensor:
    """Depth [H W] with 0 wherever it is unknown: not finite, not positive, or beyond `max_depth`."""
    return torch.where(metres.isfinite() & (metres > 0) & (metres <= max_depth), metres, 0)


def suspicion(depths: Iterable[Tensor], max_depth: float = MAX_DEPTH) -> str | None:
    """What is odd about depth maps in metres as they were read, with its likely cause; None if nothing is."""
    known = [depth[depth.isfinite() & (depth > 0)] for depth in depths]
    pooled = torch.cat(known) if known else torch.zeros(0)
    if not len(pooled):
        return "no known depth at all; are these depth maps?"
    median = float(pooled.median())
    if median > 100:
        return f"the median depth is {median:.4g} m: probably millimetres read as metres; divide by 1000"
    beyond = float((pooled > max_depth).float().mean())
    if beyond > FIFTH:
        said = f"{beyond:.0%} of the known depths lie beyond data.max_depth={max_depth:g} m and count as unknown"
        return f"{said} (the median is {median:.4g} m): raise it, or if they are in another unit give data.depth_units"
    if median < 0.05:
        said = f"the median depth is {median:.4g} m: probably metres, or 8-bit levels, divided by 1000 once too often"
        return f"{said}; see data.depth_units"
    return None


def _warn_if_suspicious(depths: Iterable[Tensor], where: object, max_depth: float) -> None:
    found = suspicion(depths, max_depth)
    if found:
        warnings.warn(f"{where}: {found}", stacklevel=3)


def _spread(count: int) -> list[int]:
    """At most nine, evenly spaced, the first and the last among them."""
    return sorted({place * (count - 1) // 8 for place in range(9)})


class NYUv2:
    """One split of NYUv2: training is `trainNdxs`, validation is `testNdxs`.

    Images are read when asked for, through one file handle a process; the source may be pickled and forked.

    Args:
        root: the folder that holds both files.
        split: `training` or `validation`.
        neighbours: for files that name no `scenes`, this many consecutive images form a group.
        max_depth: metres, beyond which depth counts as unknown; `data.max_depth` by default.

    Raises:
        UserError: a missing or damaged file, or indices outside the set.
    """

    kind: Kind = "depth"
    num_classes = 0

    def __init__(self, root: str | Path, split: Split, neighbours: int = 1, max_depth: float | None = None) -> None:
        self.class_names: list[str] = []
        self.max_depth = conventions().max_depth if max_depth is None else max_depth
        if conventions().channels != 3:
            raise UserError(f"{root}: NYUv2's images have 3 channels, the backbone takes {conventions().channels}")
        self._path = Path(root) / MAT_NAME
        self._handle: tuple[int, h5py.File] | None = None
        file = self._file()
        try:
            shapes = file["images"].shape, file["depths"].shape
            kinds = file["images"].dtype, file["depths"].dtype
        except (AttributeError, *_DAMAGED):
            raise UserError(f"{self._path}: lacks the datasets images and depths of NYUv2") from None
        (count, *image), (_, *depth) = shapes
        if len(image) != 3 or image[0] != 3 or [count, *image[1:]] != [shapes[1][0], *depth]:
            raise UserError(
                f"{self._path}: images {shapes[0]} and depths {shapes[1]} are not (n, 3, W, H) and (n, W, H)"
            )
        if kinds[0] != np.uint8 or kinds[1].kind != "f":
            raise UserError(f"{self._path}: images {kinds[0]} and depths {kinds[1]} are not uint8 and floating point")
        self._indices = _read_split(Path(root) / SPLITS_NAME, split, count)
        groups = _read_scenes(file, self._path) or index_groups(count, neighbours)
        if len(groups) != count:
            raise UserError(f"{self._path}: names {len(groups)} scenes for {count} images")
        self._groups = [groups[index] for index in self._indices]
        _warn_if_suspicious((self._metres(place) for place in _spread(len(self))), self._path, self.max_depth)

    def _file(self) -> h5py.File:
        # An HDF5 handle must not cross a fork: keep one for this process only.
        if self._handle is None or self._handle[0] != os.getpid():
            if not self._path.is_file():
                raise UserError(
                    f"{self._path}: no such file; the folder must hold {MAT_NAME} and {SPLITS_NAME}, or lists "
                    "*train*.txt and *test*.txt that pair images with depth maps"
                )
            try:
                self._handle = os.getpid(), h5py.File(self._path, "r")
            except OSError as error:
                if _begins_with(self._path, b"MATLAB 5.0"):
                    raise UserError(
                        f"{self._path}: a MATLAB 5 file, and NYUv2's is MATLAB 7.3 (HDF5): save it anew with "
                        "save(…, '-v7.3')"
                    ) from None
                raise UserError(f"{self._path}: not a complete HDF5 file ({error}); copy it again") from None
        return self._handle[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def __len__(self) -> int:
        return len(self._indices)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """Image uint8 [3 H W] and depth float32 [H W] metres, 0 where unknown, not finite or out of range.

        Raises:
            UserError: the file is damaged at this image.
        """
        image = np.ascontiguousarray(self._row("images", index).transpose(0, 2, 1))
        return torch.from_numpy(image), valid_depth(self._metres(index), self.max_depth)

    def _metres(self, index: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._row("depths", index).T, dtype=np.float32))

    def _row(self, dataset: str, index: int) -> np.ndarray:
        try:
            return np.asarray(self._file()[dataset][self._indices[index]])
        except _DAMAGED as error:
            raise UserError(f"{self.name(index)}: cannot be read ({error}); the file is damaged") from None

    def name(self, index: int) -> str:
        return f"{self._path} image {self._indices[index] + 1}"

    def group(self, index: int) -> str:
        return self._groups[index]


class NYUFolder:
    """One split of NYUv2, or of another set, as files: RGB, depth maps (see `read_depth`), and a list.

    A line of the list holds the image and its depth map, relative to `root` or to the folders that BTS' scripts make
    (sync, official_splits/test, …), and perhaps a focal length, which is not read. The list of the training split has
    `train` in its name, that of the validation split `test` or `val`.

    Args:
        root: the folder that holds the lists.
        split: `training` or `validation`.
        neighbours: where all images lie in one folder, this many consecutive ones form a group; else the folder, which
            is a scene, is the group.
        scale: units a metre of maps in integers, 1000 for millimetres; `data.depth_units` by default.
        max_depth: metres, beyond which depth counts as unknown; `data.max_depth` by default.
        check_pairs: False leaves a missing file to `load`, for a caller that goes on without the pair.

    Raises:
        UserError: no list or several, an empty one, a line that names no pair, or a file that is missing.
    """

    kind: Kind = "depth"
    num_classes = 0

    def __init__(
        self,
        root: str | Path,
        split: Split,
        neighbours: int = 1,
        scale: float | None = None,
        max_depth: float | None = None,
        check_pairs: bool = True,
    ) -> None:
        self.class_names: list[str] = []
        self._told = told = conventions()
        self.scale = told.depth_units if scale is None else scale
        self.max_depth = told.max_depth if max_depth is None else max_depth
        self._pairs = _read_pairs(Path(root), split)
        if check_pairs:
            for image, depth in self._pairs:
                for path in (image, depth):
                    if not path.is_file():
                        raise UserError(f"{path}: no such file, but the {split} list pairs it")
        folders = [str(image.parent) for image, _ in self._pairs]
        self._groups = folders if len(set(folders)) > 1 else index_groups(len(folders), neighbours)
        if check_pairs:
            shown = [self._pairs[place] for place in _spread(len(self))]
            depths = [read_depth(path, self.scale) for _, path in shown]
            _warn_if_suspicious(depths, shown[0][1].parent, self.max_depth)
            _warn_of_sizes(root, [image for image, _ in shown], depths)

    def __len__(self) -> int:
        return len(self._pairs)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """Image uint8 [3 H W] and depth float32 [H W] metres, 0 where unknown or out of range.

        Raises:
            UserError: an unreadable file, a depth map that is not 16 bits deep, or of another shape than its image (of
                another size it is resized).
        """
        files = self._pairs[index]
        image, metres = read_image(files[0], self._told), read_depth(files[1], self.scale)
        height, width = image.shape[-2:]
        if not _alike((height, width), metres.shape):
            raise UserError(
                f"{files[1]}: {metres.shape[1]}×{metres.shape[0]} pixels, but its image has "
                f"{width}×{height}{turned(files[0], image, metres)}"
            )
        return image, resize_target(valid_depth(metres, self.max_depth), (height, width))

    def name(self, index: int) -> str:
        return str(self._pairs[index][0])

    def group(self, index: int) -> str:
        return self._groups[index]


def _alike(size: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two sizes (height, width) are of one shape, but for rounding to whole pixels."""
    return abs(size[0] * other[1] / (size[1] * other[0]) - 1) < 0.02


def _warn_of_sizes(root: object, images: Sequence[Path], depths: Sequence[Tensor]) -> None:
    """Say once that maps are of other sizes than their images, where they can be resized."""
    looks = [look_at(path) for path in images]
    for look, depth in zip(looks, depths, strict=True):
        if look is not None and look.size != depth.shape and _alike(look.size, depth.shape):
            height, width = look.size
            warnings.warn(
                f"{root}: depth maps of {depth.shape[1]}×{depth.shape[0]} pixels, images of {width}×{height}: the maps "
                "are resized to their images (nearest neighbour)",
                stacklevel=3,
            )
            return


def _begins_with(path: Path, text: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(text)) == text


def _fields(line: str) -> list[str]:
    """Image, depth map and what follows; names with spaces are told apart by tabs."""
    return [part.strip() for part in line.split("\t")] if "\t" in line else line.split()


def _read_pairs(root: Path, split: Split) -> list[tuple[Path, Path]]:
    """The image and the depth map of every line of a split's list."""
    found = sorted({path for pattern in _LISTS[split] for path in root.glob(pattern)})
    wanted = " or ".join(_LISTS[split])
    if len(found) != 1:
        names = f": {', '.join(path.name for path in found)}" if found else ""
        raise UserError(f"{root}: holds {len(found)} lists {wanted} where one is needed{names}")
    try:
        lines = [_fields(line) for line in found[0].read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{found[0]}: cannot be read as a list of files ({error})") from None
    if not lines:
        raise UserError(f"{found[0]}: an empty list")
    short = next((number for number, line in enumerate(lines, 1) if len(line) < 2), None)
    if short is not None:
        raise UserError(f"{found[0]}: line {short} names no pair; expected IMAGE DEPTH")
    long = next((number for number, line in enumerate(lines, 1) if len(line) > 3), None)
    if long is not None:
        raise UserError(
            f"{found[0]}: line {long} has {len(lines[long - 1])} parts where IMAGE DEPTH [FOCAL] is expected; if names "
            "have spaces in them, put tabs between the names"
        )
    if all(Path(name).is_file() for name in lines[0][:2]):  # absolute, or from where the command runs
        return [(Path(line[0]), Path(line[1])) for line in lines]
    pairs = [(line[0].lstrip("/"), line[1].lstrip("/")) for line in lines]
    bases = [root / base for base in _BASES if any((root / base / name).is_file() for pair in pairs for name in pair)]
    if not bases:
        raise UserError(f"{root / pairs[0][0]}: no such file, nor any other of {found[0].name}")
    return [(bases[0] / image, bases[0] / depth) for image, depth in pairs]


def _read_split(path: Path, split: Split, count: int) -> list[int]:
    """The zero-based indices of a split, from MATLAB's one-based ones."""
    key = "trainNdxs" if split == "training" else "testNdxs"
    if not path.is_file():
        raise UserError(f"{path}: no such file; it comes with {MAT_NAME} and says which images are for training")
    try:
        found = read_arrays(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a MATLAB file ({error})") from None
    if key not in found:
        raise UserError(f"{path}: holds no {key}")
    with np.errstate(invalid="ignore"):  # what is no number becomes an index that is refused below
        indices = found[key].reshape(-1).astype(np.int64) - 1
    if not indices.size or indices.min() < 0 or indices.max() >= count:
        raise UserError(f"{path}: {key} must name images 1…{count} of {MAT_NAME}")
    return indices.tolist()


def _read_scenes(file: h5py.File, path: Path) -> list[str] | None:
    """The scene of each image, from the cell array of strings `scenes`; None where the file has none."""
    try:
        if "scenes" not in file:
            return None
        return ["".join(map(chr, file[reference][()].reshape(-1))) for reference in file["scenes"][()].reshape(-1)]
    except (AttributeError, OverflowError, *_DAMAGED) as error:
        raise UserError(f"{path}: its scenes cannot be read ({error})") from None
