"""Data: images and labels in, batches out. Nothing here knows of models."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from dino_value.data.conventions import conventions
from dino_value.data.folders import PICTURES, list_images, not_read, read_image
from dino_value.data.pixels import SHALLOW, look_at, remarks, shallow
from dino_value.data.tars import TarMember, is_shards, list_members
from dino_value.data.views import FolderViews, MemoryViews, ViewSettings
from dino_value.distributed.shards import WHOLE, BatchShard
from dino_value.errors import UserError

LOOKED_AT = 16
"""Images whose headers are looked at when a stream is opened."""
__all__ = ["SkippingViews", "open_views", "unlabeled_files"]


def unlabeled_files(path: str | Path, field: str | None = None) -> list[Path] | list[TarMember]:
    """The images of a folder, nested or not, or one of every sample in WebDataset shards (a folder of .tar files that
    holds no images, a pattern, or one file); `field` as in `list_members`.

    Raises:
        UserError: neither.
    """
    try:
        return list_images(path)
    except UserError:
        if not is_shards(path):
            raise
    return list_members(path, field)


def open_views(
    path: str,
    settings: ViewSettings,
    in_memory: bool = False,
    skip_unreadable: bool = False,
    field: str | None = None,
) -> MemoryViews | FolderViews | SkippingViews:
    """The unlabeled stream's source: see `unlabeled_files`; or the embedded `scenes`.

    Args:
        in_memory: decode everything once; the images must be of one size.
        skip_unreadable: go on without images that cannot be read, and count them.
        field: of shards, see `unlabeled_files`.

    Raises:
        UserError: no images, or images of several sizes where one is needed.
    """
    if path == "scenes":
        from dino_value.data.scenes import scenes

        if conventions().channels != 3:
            raise UserError(f"{path}: the embedded images have 3 channels, the backbone takes {conventions().channels}")
        return MemoryViews(scenes("unlabeled", settings.global_size).images, settings)
    paths = unlabeled_files(path, field)
    _say_what_is_odd(path, paths)
    if not in_memory:
        views = FolderViews(paths, settings)  # type: ignore[arg-type]
        return SkippingViews(views) if skip_unreadable else views
    images: list[Tensor] = []
    names: list[str] = []
    for file in paths:
        try:
            image = read_image(file)
        except UserError:
            if not skip_unreadable:
                raise
            continue
        if images and image.shape != images[0].shape:
            raise UserError(
                f"{file}: {tuple(image.shape[1:])} pixels where {names[0]} has {tuple(images[0].shape[1:])}; "
                "data.in_memory needs one size: set data.in_memory=false"
            )
        images.append(image)
        names.append(str(file))
    if not images:
        raise UserError(f"{path}: none of its {len(paths)} images can be read")
    held = MemoryViews(torch.stack(images), settings, names)
    return SkippingViews(held, len(paths) - len(images)) if skip_unreadable else held


def _some(paths: Sequence[Path] | Sequence[TarMember]) -> list[Path | TarMember]:
    """At most `LOOKED_AT` of the files, evenly spaced."""
    count = len(paths)
    return [paths[place * count // LOOKED_AT] for place in range(LOOKED_AT)] if count > LOOKED_AT else list(paths)


def depth_maps(paths: Sequence[Path] | Sequence[TarMember]) -> list[Path | TarMember]:
    """Those of some of the files that are depth maps: of 16 bits, with `depth` in the name."""
    named = [path for path in _some(paths) if "depth" in path.name.lower()]
    return [path for path in named if (look := look_at(path)) is not None and look.deep]


def _say_what_is_odd(root: str, paths: Sequence[Path] | Sequence[TarMember]) -> None:
    """Warn of what becomes of some of the images, evenly spaced, and of pictures that are not read."""
    some = _some(paths)
    maps = depth_maps(paths)
    if maps:
        raise UserError(
            f"{root}: {len(maps)} of {len(some)} files looked at are depth maps (16 bits, `depth` in the name, "
            f"{os.path.basename(maps[0])}), not photographs: move them elsewhere; to use them as labels give "
            "data.nyuv2 a folder with lists of pairs"
        )
    looks, dark = [look_at(path) for path in some], 0
    for path, look in zip(some, looks, strict=True):
        if look is not None and look.deep and conventions().range is None:
            with suppress(UserError):
                dark += shallow(look, read_image(path))
    found = remarks(looks, conventions()) + ([f"{dark} of {len(some)} images {SHALLOW}"] if dark else [])
    left = not_read(root, PICTURES) if Path(root).is_dir() else ""
    for text in [*found, *([f"not read: {left}"] if left else [])]:
        warnings.warn(f"{root}: {text}", stacklevel=3)


class SkippingViews:
    """Crops as `views` makes them, with the next readable file in the place of one that cannot be read.

    What a batch holds still follows from (positions, key) and the files alone. The marks lie in shared memory, so that
    what a loader process finds out is known to all.

    Args:
        views: files, or images in memory that have been read already.
        left_out: how many files never came into `views` because they cannot be read.
    """

    def __init__(self, views: MemoryViews | FolderViews, left_out: int = 0) -> None:
        self.views, self.left_out = views, left_out
        self._bad = torch.zeros(len(views), dtype=torch.bool).share_memory_()

    @property
    def unreadable(self) -> int:
        """How many files have been found unreadable so far."""
        return self.left_out + int(self._bad.sum())

    def __len__(self) -> int:
        return len(self.views)

    def without(self, names: Collection[str]) -> SkippingViews:
        """The same source less the files `names`."""
        return SkippingViews(self.views.without(names), self.left_out)

    def batch(self, positions: Sequence[int], key: int, part: BatchShard = WHOLE) -> tuple[Tensor, Tensor]:
        """As `views.batch`.

        Raises:
            UserError: no file can be read, or `views` fails over something else.
        """
        chosen = [self._next(position, look=False) for position in positions]
        try:
            return self.views.batch(chosen, key, part)
        except UserError:
            own = part.of(len(chosen))
            chosen[own] = [self._next(position, look=True) for position in chosen[own]]
            return self.views.batch(chosen, key, part)

    def _next(self, position: int, look: bool) -> int:
        """The first file from `position` on that is not known as bad or, to `look` closer, that can be read."""
        count = len(self)
        for place in ((position + step) % count for step in range(count)):
            if self._bad[place]:
                continue
            if not look or self._readable(place):
                return place
        raise UserError(f"none of {count} images can be read")

    def _readable(self, place: int) -> bool:
        if isinstance(self.views, MemoryViews):
            return True
        try:
            read_image(self.views.paths[place], self.views.told)
        except UserError:
            self._bad[place] = True
            return False
        return True
