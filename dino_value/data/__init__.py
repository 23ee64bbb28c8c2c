"""Data: images and labels in, batches out. Nothing here knows of models."""

from __future__ import annotations

import torch

from dino_value.data.folders import list_images, read_image
from dino_value.data.views import FolderViews, MemoryViews, ViewSettings
from dino_value.errors import UserError

__all__ = ["open_views"]


def open_views(path: str, settings: ViewSettings, in_memory: bool = False) -> MemoryViews | FolderViews:
    """The unlabeled stream's source: a folder of images, nested or not, or the embedded `scenes` or `scenes/clean`.

    Args:
        in_memory: decode everything once; the images must be of one size.

    Raises:
        UserError: no images, or images of several sizes where one is needed.
    """
    if path in ("scenes", "scenes/clean"):
        from dino_value.data.scenes import scenes

        split = scenes("unlabeled" if path == "scenes" else "clean", settings.global_size)
        return MemoryViews(split.images, settings)
    paths = list_images(path)
    if not in_memory:
        return FolderViews(paths, settings)
    images: list[torch.Tensor] = []
    for file in paths:
        image = read_image(file)
        if images and image.shape != images[0].shape:
            raise UserError(
                f"{file}: {tuple(image.shape[1:])} pixels where {paths[0].name} has {tuple(images[0].shape[1:])}; "
                "data.in_memory needs one size: set data.in_memory=false"
            )
        images.append(image)
    return MemoryViews(torch.stack(images), settings, [str(file) for file in paths])
