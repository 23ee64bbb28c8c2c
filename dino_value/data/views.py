"""Multi-crop: where to cut, cutting, and DINO's photometric augmentations.

Every draw comes from a CPU generator, so that the views of a step do not depend on the device. What is drawn is apart
from what is done with it: `draw` is one function for all backends of `views.augment`, which differ in the rounding of
pixels only.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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
from torchvision.transforms.v2 import functional as TF

from dino_value.data.conventions import Conventions, conventions
from dino_value.data.folders import read_image
from dino_value.data.sampling import generator as keyed_generator
from dino_value.data.sampling import key as derive
from dino_value.distributed.shards import WHOLE, BatchShard


class ViewSettings(Protocol):
    """The fields of `config.ViewsConfig` that are read here."""

    global_size: int
    local_size: int
    local_count: int
    global_scale: tuple[float, float]
    local_scale: tuple[float, float]
    flip: float
    jitter: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale: float
    blur: tuple[float, float, float]
    blur_sigma: tuple[float, float]
    solarize: float
    augment: str


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

    def batch(self, positions: Sequence[int], key: int, part: BatchShard = WHOLE) -> tuple[Tensor, Tensor]:
        """Global crops uint8 [2 B 3 H W] and local crops [N B 3 h w], of the images of `part`."""
        generator = torch.Generator().manual_seed(key)
        images = self.images[torch.as_tensor(positions[part.of(len(positions))])]
        height, width = images.shape[-2:]

        def views(count: int, size: int, scale: tuple[float, float]) -> Tensor:
            boxes = part.rows(sample_boxes(count * len(positions), height, width, scale, generator), count)
            return crop(images.repeat(count, 1, 1, 1), boxes, size).unflatten(0, (count, len(images)))

        return _augmented(*_two_groups(views, self.settings), self.settings, key, part)


class FolderViews:
    """Crops from image files, decoded as they are needed."""

    def __init__(self, paths: Sequence[Path], settings: ViewSettings, told: Conventions | None = None) -> None:
        self.paths, self.settings, self.told = list(paths), settings, told or conventions()

    def __len__(self) -> int:
        return len(self.paths)

    def without(self, names: Collection[str]) -> FolderViews:
        """The same source less the files `names`."""
        held = {os.path.realpath(name) for name in names}
        kept = [path for path in self.paths if os.path.realpath(path) not in held]
        return FolderViews(kept, self.settings, self.told)

    def batch(self, positions: Sequence[int], key: int, part: BatchShard = WHOLE) -> tuple[Tensor, Tensor]:
        """As `MemoryViews.batch`; the crops of a file follow from (key, its place in the batch)."""
        slots = range(len(positions))[part.of(len(positions))]
        rows = [self._one(self.paths[positions[slot]], derive(key, slot)) for slot in slots]
        large, small = zip(*rows, strict=True)
        return _augmented(torch.stack(large, 1), torch.stack(small, 1), self.settings, key, part)

    def _one(self, path: Path, key: int) -> tuple[Tensor, Tensor]:
        image = read_image(path, self.told)
        generator = torch.Generator().manual_seed(key)
        height, width = image.shape[-2:]

        def views(count: int, size: int, scale: tuple[float, float]) -> Tensor:
            boxes = sample_boxes(count, height, width, scale, generator).int().tolist()
            cuts = [image[None, :, top:bottom, left:right].float() for left, top, right, bottom in boxes]
            resized = [F.interpolate(cut, (size, size), mode="bicubic", antialias=True) for cut in cuts]
            return torch.cat(resized).round_().clamp_(0, 255).to(torch.uint8)

        return _two_groups(views, self.settings)


def _two_groups(views: Callable[..., Tensor], settings: ViewSettings) -> tuple[Tensor, Tensor]:
    large = views(2, settings.global_size, settings.global_scale)
    if settings.local_count:
        return large, views(settings.local_count, settings.local_size, settings.local_scale)
    shape = (0, *large.shape[1:-2])
    return large, torch.zeros(*shape, settings.local_size, settings.local_size, dtype=torch.uint8)


def _augmented(
    large: Tensor, small: Tensor, settings: ViewSettings, key: int, part: BatchShard = WHOLE
) -> tuple[Tensor, Tensor]:
    """The crops of a batch as its source hands them over: augmented already, where loader processes do that."""
    if settings.augment != "torchvision":
        return large, small
    views = _photometric_groups(large, small, settings, part, key)
    rounded = [(group * 255).round_().to(torch.uint8) for group in views]
    return rounded[0].view_as(large), rounded[1].view_as(small)


def augment(
    large: Tensor, small: Tensor, settings: ViewSettings, seed: int, *keys: int | str, part: BatchShard = WHOLE
) -> tuple[Tensor, Tensor]:
    """DINO's flips, colours, blur and solarisation, unless the crops come with them (`views.augment=torchvision`).

    uint8 [2 B 3 H W] and [N B 3 h w] -> float in [0, 1], [2B 3 H W] and [NB 3 h w]. The B images are a `part` of the
    batch.
    """
    if settings.augment == "torchvision":
        return large.flatten(0, 1).float() / 255, small.flatten(0, 1).float() / 255
    return _photometric_groups(large, small, settings, part, seed, *keys)


def _photometric_groups(
    large: Tensor, small: Tensor, settings: ViewSettings, part: BatchShard, seed: int, *keys: int | str
) -> tuple[Tensor, Tensor]:
    batch = large.shape[1] * part.world
    first, second, local = settings.blur
    # One probability a row: the two global views are treated differently (main_dino.py).
    blur = torch.tensor([first, second]).repeat_interleave(batch)
    solar = torch.tensor([0.0, settings.solarize]).repeat_interleave(batch)
    globals_ = photometric(
        large.flatten(0, 1), blur, solar, settings, keyed_generator(seed, "global", *keys), part, len(large)
    )
    count = small.shape[0] * batch
    locals_ = photometric(
        small.flatten(0, 1),
        torch.full((count,), local),
        torch.zeros(count),
        settings,
        keyed_generator(seed, "local", *keys),
        part,
        len(small),
    )
    return globals_, locals_


class Draws(NamedTuple):
    """What happens to each of n views, [n] on the CPU, in the order in which it happens."""

    flip: Tensor  # bool, as are jitter, grey, blur and solarize
    jitter: Tensor
    order: tuple[str, ...]  # of the jitter's operations, one for all of the views
    factors: dict[str, Tensor]  # of brightness, contrast, saturation; of hue a share of the colour circle
    grey: Tensor
    blur: Tensor
    sigma: Tensor  # pixels
    solarize: Tensor

    def part(self, part: BatchShard, views: int) -> Draws:
        """Those of a part of the batch, `views` of each image."""
        factors = {name: part.rows(values, views) for name, values in self.factors.items()}
        own: dict[str, Any] = {
            name: part.rows(values, views) for name, values in self._asdict().items() if isinstance(values, Tensor)
        }
        return self._replace(**own, factors=factors)

    def without_colour(self) -> Draws:
        """The same for images whose channels are not red, green and blue."""
        return self._replace(
            order=tuple(name for name in self.order if name not in _COLOUR), grey=torch.zeros_like(self.grey)
        )


_COLOUR = ("saturation", "hue")


def draw(blur: Tensor, solar: Tensor, settings: ViewSettings, generator: torch.Generator) -> Draws:
    """DINO's distributions (main_dino.py); `blur` and `solar` are probabilities [n]."""
    count = len(blur)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    def happens(probability: float | Tensor) -> Tensor:
        return torch.rand(count, generator=generator) < probability

    flip, jitter = happens(settings.flip), happens(settings.jitter)
    factors = {
        "brightness": uniform(max(0.0, 1 - settings.brightness), 1 + settings.brightness),
        "contrast": uniform(max(0.0, 1 - settings.contrast), 1 + settings.contrast),
        "saturation": uniform(max(0.0, 1 - settings.saturation), 1 + settings.saturation),
        "hue": uniform(-settings.hue, settings.hue),
    }
    names = list(factors)
    if bool(jitter.any()):
        names = [names[place] for place in torch.randperm(len(names), generator=generator).tolist()]
    grey, blurred, sigma, inverted = (
        happens(settings.grayscale),
        happens(blur),
        uniform(*settings.blur_sigma),
        happens(solar),
    )
    return Draws(flip, jitter, tuple(names), factors, grey, blurred, sigma, inverted)


def photometric(
    views: Tensor,
    blur: Tensor,
    solar: Tensor,
    settings: ViewSettings,
    generator: torch.Generator,
    part: BatchShard = WHOLE,
    count: int = 1,
) -> Tensor:
    """Flip, jitter, greyscale, blur, solarise, each row by its own draw, with the backend `settings.augment`.

    Args:
        views: uint8 [n 3 s s].
        blur, solar: probabilities [n], of the whole batch.
        generator: on the CPU: the host knows the rows that an operation touches, so nothing waits for the device.
        part: of the batch, `count` views of each image, that `views` are.

    Returns:
        float [n 3 s s] in [0, 1].
    """
    images = views.float() / 255
    if len(views) == 0:
        return images
    draws, backend = draw(blur, solar, settings, generator).part(part, count), settings.augment
    if views.shape[1] != 3:  # no colours: neither hue nor saturation nor grey; torchvision refuses such channels
        draws = draws.without_colour()
        backend = "kornia" if backend == "torchvision" else backend
    radius = max(1, min(int(3 * settings.blur_sigma[1] + 0.5), views.shape[-1] - 1))
    return BACKENDS[backend](images, draws, 2 * radius + 1)


_JITTER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": adjust_brightness_accumulative,
    "contrast": adjust_contrast_with_mean_subtraction,
    "saturation": adjust_saturation_with_gray_subtraction,
    "hue": lambda images, share: adjust_hue(images, share * 2 * math.pi),
}


def by_rows(images: Tensor, draws: Draws, kernel: int) -> Tensor:
    """Kornia's operations, each on the rows of float [n 3 s s] that it touches; works in place.

    `kernel` is the width of the blur's kernel in pixels, odd.
    """

    def rows(happens: Tensor) -> Tensor:
        return happens.nonzero()[:, 0]

    def on(chosen: Tensor, tensor: Tensor) -> Tensor:
        return tensor[chosen].to(images.device, non_blocking=True)

    def put(chosen: Tensor, changed: Tensor) -> None:
        images[chosen.to(images.device, non_blocking=True)] = changed

    def take(chosen: Tensor) -> Tensor:
        return images[chosen.to(images.device, non_blocking=True)]

    flipped = rows(draws.flip)
    put(flipped, take(flipped).flip(-1))

    jittered = rows(draws.jitter)
    if len(jittered):
        changed = take(jittered)
        for name in draws.order:
            changed = _JITTER[name](changed, on(jittered, draws.factors[name]))
        put(jittered, changed.clamp(0, 1))

    grey = rows(draws.grey)
    if len(grey):
        put(grey, rgb_to_grayscale(take(grey)).expand(-1, 3, -1, -1))

    blurred = rows(draws.blur)
    if len(blurred):
        put(blurred, gaussian_blur2d(take(blurred), (kernel, kernel), draws.sigma[blurred][:, None].expand(-1, 2)))

    inverted = rows(draws.solarize)
    if len(inverted):
        put(inverted, solarize(take(inverted), 0.5))
    return images


def compiled(images: Tensor, draws: Draws, kernel: int) -> Tensor:
    """Kornia's operations on all rows, keeping those that they touch: fixed shapes, so that each is compiled once."""

    def on(tensor: Tensor) -> Tensor:
        return tensor.to(images.device, non_blocking=True)

    images = _compiled("flip")(images, on(draws.flip), None)
    jitter = on(draws.jitter)
    for name in draws.order:
        images = _compiled(name)(images, jitter, on(draws.factors[name]))
    if images.shape[1] == 3:
        images = _compiled("grey")(images, on(draws.grey), None)
    if bool(draws.blur.any()):  # the dearest; known on the host
        images = _compiled("blur")(images, on(draws.blur), (kernel, on(draws.sigma)))
    return _compiled("solarize")(images, on(draws.solarize), None)


def _where(happens: Tensor, changed: Tensor, images: Tensor) -> Tensor:
    return torch.where(happens[:, None, None, None], changed.clamp(0, 1), images)


# A function each: compiled ones are told apart by their code, of which only a few shapes are kept.
_ON_ALL: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "flip": lambda x, on, _: _where(on, x.flip(-1), x),
    "brightness": lambda x, on, factor: _where(on, _JITTER["brightness"](x, factor), x),
    "contrast": lambda x, on, factor: _where(on, _JITTER["contrast"](x, factor), x),
    "saturation": lambda x, on, factor: _where(on, _JITTER["saturation"](x, factor), x),
    "hue": lambda x, on, share: _where(on, _JITTER["hue"](x, share), x),
    "grey": lambda x, on, _: _where(on, rgb_to_grayscale(x), x),
    "blur": lambda x, on, by: _where(on, gaussian_blur2d(x, (by[0],) * 2, by[1][:, None].expand(-1, 2)), x),
    "solarize": lambda x, on, _: _where(on, solarize(x, 0.5), x),
}


@functools.cache
def _compiled(name: str) -> Callable[[Tensor, Tensor, Any], Tensor]:
    return torch.compile(_ON_ALL[name], dynamic=False)


def by_image(images: Tensor, draws: Draws, kernel: int) -> Tensor:
    """torchvision's operations, image by image, as the published loader does it; for float [n 3 s s] on the CPU."""
    return torch.stack([_one_image(image, place, draws, kernel) for place, image in enumerate(images)])


def _one_image(image: Tensor, place: int, draws: Draws, kernel: int) -> Tensor:
    if draws.flip[place]:
        image = TF.horizontal_flip(image)
    if draws.jitter[place]:
        for name in draws.order:
            image = getattr(TF, f"adjust_{name}")(image, draws.factors[name][place].item())
    if draws.grey[place]:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if draws.blur[place]:
        image = TF.gaussian_blur(image, [kernel, kernel], [draws.sigma[place].item()] * 2)
    if draws.solarize[place]:
        image = TF.solarize(image, 0.5)
    return image


BACKENDS: dict[str, Callable[[Tensor, Draws, int], Tensor]] = {
    "kornia": by_rows,
    "kornia_compiled": compiled,
    "torchvision": by_image,
}
"""What `views.augment` chooses. kornia: on the device, in the training step; torchvision: in the loader processes."""
