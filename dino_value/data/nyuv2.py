"""NYU Depth v2, the labelled set: nyu_depth_v2_labeled.mat (MATLAB 7.3, that is HDF5) and splits.mat.

MATLAB stores columns first, so HDF5 shows `images` as (n, 3, W, H) and `depths` as (n, W, H).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from scipy.io import loadmat
from torch import Tensor

from dino_value.data.labelled import Kind, Split, index_groups
from dino_value.errors import UserError

MAT_NAME = "nyu_depth_v2_labeled.mat"
SPLITS_NAME = "splits.mat"


class NYUv2:
    """One split of NYUv2: training is `trainNdxs`, validation is `testNdxs`.

    Images are read when asked for, through one file handle a process; the source may be pickled and forked.

    Args:
        root: the folder that holds both files.
        split: `training` or `validation`.
        neighbours: for files that name no `scenes`, this many consecutive images form a group.

    Raises:
        UserError: a missing or damaged file, or indices outside the set.
    """

    kind: Kind = "depth"
    num_classes = 0

    def __init__(self, root: str | Path, split: Split, neighbours: int = 1) -> None:
        self.class_names: list[str] = []
        self._path = Path(root) / MAT_NAME
        self._handle: tuple[int, h5py.File] | None = None
        file = self._file()
        try:
            shapes = file["images"].shape, file["depths"].shape
        except (KeyError, AttributeError):
            raise UserError(f"{self._path}: lacks the datasets images and depths of NYUv2") from None
        (count, *image), (_, *depth) = shapes
        if len(image) != 3 or image[0] != 3 or [count, *image[1:]] != [shapes[1][0], *depth]:
            raise UserError(
                f"{self._path}: images {shapes[0]} and depths {shapes[1]} are not (n, 3, W, H) and (n, W, H)"
            )
        self._indices = _read_split(Path(root) / SPLITS_NAME, split, count)
        groups = _read_scenes(file, self._path) or index_groups(count, neighbours)
        if len(groups) != count:
            raise UserError(f"{self._path}: names {len(groups)} scenes for {count} images")
        self._groups = [groups[index] for index in self._indices]

    def _file(self) -> h5py.File:
        # An HDF5 handle must not cross a fork: keep one for this process only.
        if self._handle is None or self._handle[0] != os.getpid():
            if not self._path.is_file():
                raise UserError(f"{self._path}: no such file; the folder must hold {MAT_NAME} and {SPLITS_NAME}")
            try:
                self._handle = os.getpid(), h5py.File(self._path, "r")
            except OSError as error:
                raise UserError(f"{self._path}: not a complete HDF5 file ({error}); copy it again") from None
        return self._handle[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def __len__(self) -> int:
        return len(self._indices)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """Image uint8 [3 H W] and depth float32 [H W] metres, 0 where unknown or not finite.

        Raises:
            UserError: the file is damaged at this image.
        """
        file, row = self._file(), self._indices[index]
        try:
            image, depth = file["images"][row], file["depths"][row]
        except OSError as error:
            raise UserError(f"{self.name(index)}: cannot be read ({error}); the file is damaged") from None
        image = np.ascontiguousarray(image.transpose(0, 2, 1))
        metres = torch.from_numpy(np.ascontiguousarray(depth.T, dtype=np.float32))
        return torch.from_numpy(image), torch.where(metres.isfinite() & (metres > 0), metres, 0)

    def name(self, index: int) -> str:
        return f"{self._path} image {self._indices[index] + 1}"

    def group(self, index: int) -> str:
        return self._groups[index]


def _read_split(path: Path, split: Split, count: int) -> list[int]:
    """The zero-based indices of a split, from MATLAB's one-based ones."""
    key = "trainNdxs" if split == "training" else "testNdxs"
    if not path.is_file():
        raise UserError(f"{path}: no such file; it comes with {MAT_NAME} and says which images are for training")
    try:
        indices = loadmat(path)[key].reshape(-1).astype(np.int64) - 1
    except KeyError:
        raise UserError(f"{path}: holds no {key}") from None
    except Exception as error:  # scipy raises its own, zlib's and struct's errors on damaged files
        raise UserError(f"{path}: cannot be read as a MATLAB file ({error})") from None
    if not indices.size or indices.min() < 0 or indices.max() >= count:
        raise UserError(f"{path}: {key} must name images 1…{count} of {MAT_NAME}")
    return indices.tolist()


def _read_scenes(file: h5py.File, path: Path) -> list[str] | None:
    """The scene of each image, from the cell array of strings `scenes`; None where the file has none."""
    if "scenes" not in file:
        return None
    try:
        return ["".join(map(chr, file[reference][()].reshape(-1))) for reference in file["scenes"][()].reshape(-1)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its scenes cannot be read ({error})") from None
