"""Predictions beside the truth, as arrays uint8 [H W 3]."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dino_value.data.labelled import IGNORE
from dino_value.data.pixels import as_rgb
from dino_value.errors import UserError

Picture = NDArray[np.uint8]
GAP = 4


def photograph(image: Tensor, size: tuple[int, int] | None = None) -> Picture:
    """Image uint8 [C H W], at `size` (height, width), see `as_rgb`."""
    pixels = np.ascontiguousarray(as_rgb(image).cpu().permute(1, 2, 0).numpy())
    if size is None or pixels.shape[:2] == tuple(size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def colour_labels(labels: Tensor, classes: int) -> Picture:
    """Label map [H W] in hues a golden angle apart, so that neighbouring ids differ; ignored pixels black."""
    palette = np.zeros((256, 3), np.uint8)
    for index in range(classes):
        shade = colorsys.hsv_to_rgb(index * 0.61803398875 % 1, 0.55 + 0.4 * (index % 2), 0.95 - 0.3 * (index // 2 % 2))
        palette[index % IGNORE] = [round(255 * part) for part in shade]
    return palette[labels.cpu().numpy().astype(np.uint8)]


def colour_depth(depth: Tensor, low: float, high: float) -> Picture:
    """Depth map [H W] in metres from `low` (dark) to `high` (bright); unknown pixels (0) black."""
    metres = depth.cpu().numpy()
    shades = colormaps["viridis"](np.clip((metres - low) / max(high - low, 1e-9), 0, 1))[..., :3]
    return np.where(metres[..., None] > 0, (255 * shades).astype(np.uint8), np.uint8(0))


def framed(picture: Picture, right: bool | None) -> Picture:
    """A frame: green where the answer is right, red where it is wrong, white where it is a question."""
    colour = {True: (30, 160, 60), False: (200, 30, 30), None: (255, 255, 255)}[right]
    frame = np.full((picture.shape[0] + 2 * GAP, picture.shape[1] + 2 * GAP, 3), colour, np.uint8)
    frame[GAP:-GAP, GAP:-GAP] = picture
    return frame


def beside(panels: Sequence[Picture]) -> Picture:
    """Pictures side by side, padded with white to the tallest."""
    height = max(panel.shape[0] for panel in panels)
    padded = [np.pad(panel, ((0, height - len(panel)), (0, GAP), (0, 0)), constant_values=255) for panel in panels]
    return np.concatenate(padded, axis=1)[:, :-GAP]


def write_pictures(folder: Path, pictures: Sequence[tuple[str, Picture]]) -> None:
    """PNG files.

    Raises:
        UserError: the disk refused them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, pixels in pictures:
            Image.fromarray(pixels).save(folder / f"{name}.png")
    except OSError as error:
        raise UserError(f"{folder}: pictures cannot be written ({error.strerror})") from None
