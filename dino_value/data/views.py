"""Multi-crop: where to cut, cutting, and DINO's photometric augmentations.

Every draw comes from a CPU generator, so that the views of a step do not depend on the device; the pixels are
worked on wherever they are, a whole batch at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_hue,
    adjust_saturation_with_gray_subtraction,
    solarize,
)
from kornia.filters import gaussian_blur2d
from torch import Tensor
from torchvision.ops import roi_align

from dino_value.data.folders import read_image
from dino_value.data.sampling import generator as keyed_generator
from dino_value.data.sampling import key as derive


class ViewSettings(Protocol):
    """The fields of `config.ViewsConfig` that are read here."""

    global_size: int
    local_size: int
    local_count: int
    global_scale: tuple[float, float]
    local_scale: tuple[float, float]
    jitter: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale: float
    blur: tuple[float, float, float]
    blur_sigma: tuple[float, float]
    solarize: float


def sample_boxes(count: int, height: int, width: int, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """`count` random-resized-crop boxes [count 4] as (left, top, right, bottom), whole pixels.

    The distribution is torchvision's: area share uniform in `scale`, log aspect uniform in 3/4 … 4/3, ten tries, then
    the largest central box of an allowed aspect.
    """
    tries = 10
    draws = torch.rand(count, tries, 4, generator=generator, dtype=torch.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = math.log(3 / 4), math.log(4 / 3)
    aspect = torch.exp(low + (high - low) * draws[..., 1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    left = (draws[..., 2] * (width - w + 1)).floor()
    top = (draws[..., 3] * (height - h + 1)).floor()
    boxes = torch.stack([left, top, left + w, top + h], dim=-1)
    first = fits.float().argmax(dim=1)
    chosen = boxes[torch.arange(count), first]
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    w0, h0 = min(width, round(height * ratio)), min(height, round(width / ratio))
    left0, top0 = (width - w0) // 2, (height - h0) // 2
    fallback = torch.tensor([left0, top0, left0 + w0, top0 + h0], dtype=torch.float64)
    return torch.where(fits.any(1, keepdim=True), chosen, fallback).float()


def crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut box i out of image i and resample it to `size`: uint8 [n 3 H W], [n 4] -> uint8 [n 3 size size].

    Bilinear where a box is enlarged, averaging over its samples where it shrinks (RoIAlign's adaptive sampling).
    """
    rows = torch.arange(len(images), dtype=torch.float32)[:, None]
    rois = torch.cat([rows, boxes], dim=1).to(images.device)
    cut = roi_align(images.float(), rois, output_size=size, sampling_ratio=-1, aligned=True)
    return cut.round_().clamp_(0, 255).to(torch.uint8)


class MemoryViews:
    """Crops from images held in memory, uint8 [n 3 H W]."""

    def __init__(self, images: Tensor, settings: ViewSettings, names: Sequence[str] | None = None) -> None:
        self.images, self.settings = images, settings
        self.names = [""] * len(images) if names is None else list(names)

    def without(self, names: Collection[str]) -> MemoryViews:
        """The same source less the files `names`."""
        held = {os.path.realpath(name) for name in names}
        keep = [place for place, name in enumerate(self.names) if not name or os.path.realpath(name) not in held]
        if len(keep) == len(self.names):
            return self
        return MemoryViews(self.images[torch.tensor(keep)], self.settings, [self.names[place] for place in keep])

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, positions: Sequence[int], key: int) -> tuple[Tensor, Tensor]:
        """Global crops uint8 [2 B 3 H W] and local crops [N B 3 h w]."""
        generator = torch.Generator().manual_seed(key)
        images = self.images[torch.as_tensor(positions)]
        height, width = images.shape[-2:]

        def views(count: int, size: int, scale: tuple[float, float]) -> Tensor:
            boxes = sample_boxes(count * len(images), height, width, scale, generator)
            return crop(images.repeat(count, 1, 1, 1), boxes, size).unflatten(0, (count, len(images)))

        return _two_groups(views, self.settings, len(images))


class FolderViews:
    """Crops from image files, decoded as they are needed."""

    def __init__(self, paths: Sequence[Path], settings: ViewSettings) -> None:
        self.paths, self.settings = list(paths), settings

    def __len__(self) -> int:
        return len(self.paths)

    def without(self, names: Collection[str]) -> FolderViews:
        """The same source less the files `names`."""
        held = {os.path.realpath(name) for name in names}
        return FolderViews([path for path in self.paths if os.path.realpath(path) not in held], self.settings)

    def batch(self, positions: Sequence[int], key: int) -> tuple[Tensor, Tensor]:
        """As `MemoryViews.batch`; the crops of a file follow from (key, its place in the batch)."""
        rows = [self._one(self.paths[position], derive(key, slot)) for slot, position in enumerate(positions)]
        large, small = zip(*rows, strict=True)
        return torch.stack(large, 1), torch.stack(small, 1)

    def _one(self, path: Path, key: int) -> tuple[Tensor, Tensor]:
        image = read_image(path)
        generator = torch.Generator().manual_seed(key)
        height, width = image.shape[-2:]

        def views(count: int, size: int, scale: tuple[float, float]) -> Tensor:
            boxes = sample_boxes(count, height, width, scale, generator).int().tolist()
            cuts = [image[None, :, top:bottom, left:right].float() for left, top, right, bottom in boxes]
            resized = [F.interpolate(cut, (size, size), mode="bicubic", antialias=True) for cut in cuts]
            return torch.cat(resized).round_().clamp_(0, 255).to(torch.uint8)

        return _two_groups(views, self.settings, None)


def _two_groups(views, settings: ViewSettings, images: int | None) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    large = views(2, settings.global_size, settings.global_scale)
    if settings.local_count:
        return large, views(settings.local_count, settings.local_size, settings.local_scale)
    shape = (0, 3) if images is None else (0, images, 3)
    return large, torch.zeros(*shape, settings.local_size, settings.local_size, dtype=torch.uint8)


def augment(large: Tensor, small: Tensor, settings: ViewSettings, seed: int, *keys: int | str) -> tuple[Tensor, Tensor]:
    """DINO's flips, colours, blur and solarisation.

    uint8 [2 B 3 H W] and [N B 3 h w] -> float in [0, 1], [2B 3 H W] and [NB 3 h w].
    """
    _, batch = large.shape[:2]
    first, second, local = settings.blur
    # One probability a row: the two global views are treated differently (main_dino.py).
    blur = torch.tensor([first, second]).repeat_interleave(batch)
    solar = torch.tensor([0.0, settings.solarize]).repeat_interleave(batch)
    globals_ = photometric(large.flatten(0, 1), blur, solar, settings, keyed_generator(seed, "global", *keys))
    count = small.shape[0] * batch
    locals_ = photometric(
        small.flatten(0, 1),
        torch.full((count,), local),
        torch.zeros(count),
        settings,
        keyed_generator(seed, "local", *keys),
    )
    return globals_, locals_


def photometric(
    views: Tensor, blur: Tensor, solar: Tensor, settings: ViewSettings, generator: torch.Generator
) -> Tensor:
    """Flip, jitter, greyscale, blur, solarise, each row by its own draw.

    Args:
        views: uint8 [n 3 s s].
        blur, solar: probabilities [n].
        generator: on the CPU: the host knows the rows that an operation touches, so nothing waits for the device.

    Returns:
        float [n 3 s s] in [0, 1].
    """
    count = len(views)
    images = views.float() / 255
    if count == 0:
        return images

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    def rows(probability: float | Tensor) -> Tensor:
        return (torch.rand(count, generator=generator) < probability).nonzero()[:, 0]

    def on(chosen: Tensor, tensor: Tensor) -> Tensor:
        return tensor[chosen].to(images.device, non_blocking=True)

    def put(chosen: Tensor, changed: Tensor) -> None:
        images[chosen.to(images.device, non_blocking=True)] = changed

    def take(chosen: Tensor) -> Tensor:
        return images[chosen.to(images.device, non_blocking=True)]

    flipped = rows(0.5)
    put(flipped, take(flipped).flip(-1))

    jittered = rows(settings.jitter)
    factors = {
        "brightness": uniform(max(0.0, 1 - settings.brightness), 1 + settings.brightness),
        "contrast": uniform(max(0.0, 1 - settings.contrast), 1 + settings.contrast),
        "saturation": uniform(max(0.0, 1 - settings.saturation), 1 + settings.saturation),
        "hue": uniform(-settings.hue, settings.hue) * 2 * math.pi,
    }
    change = {
        "brightness": adjust_brightness_accumulative,
        "contrast": adjust_contrast_with_mean_subtraction,
        "saturation": adjust_saturation_with_gray_subtraction,
        "hue": adjust_hue,
    }
    if len(jittered):
        changed = take(jittered)
        names = list(factors)
        for place in torch.randperm(len(names), generator=generator).tolist():
            changed = change[names[place]](changed, on(jittered, factors[names[place]]))
        put(jittered, changed.clamp(0, 1))

    grey = rows(settings.grayscale)
    put(grey, rgb_to_grayscale(take(grey)).expand(-1, 3, -1, -1))

    blurred, sigma = rows(blur), uniform(*settings.blur_sigma)
    if len(blurred):
        radius = min(int(3 * settings.blur_sigma[1] + 0.5), views.shape[-1] - 1)
        width = 2 * max(1, radius) + 1
        put(blurred, gaussian_blur2d(take(blurred), (width, width), sigma[blurred][:, None].expand(-1, 2)))

    inverted = rows(solar)
    if len(inverted):
        put(inverted, solarize(take(inverted), 0.5))
    return images
