"""Dense prediction on images of any size: windows, and logits put together again in bands of bounded memory.

All windows go through the backbone in batches, and are kept at the resolution of the head (a few kB each). Only a strip
of rows at a time is brought to full resolution, small enough for a processor's cache. So memory grows with the width of
an image, not with its area.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STRIP_BYTES = 2**22
"""Logits at full resolution that are held at once on a CPU."""


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride` pixels, the last one flush with the end.

    mmsegmentation's grid, and DINOv2's and DINOv3's.
    """
    if length <= window:
        return [0]
    count = -(-(length - window) // stride) + 1
    return [min(index * stride, length - window) for index in range(count)]


@dataclass(frozen=True)
class Grid:
    """The windows of one image of `size`: each at a pair of `tops` and `lefts`, row by row."""

    size: tuple[int, int]
    window: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @classmethod
    def over(cls, size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]) -> Grid:
        window = (min(window[0], size[0]), min(window[1], size[1]))
        starts = [tuple(window_starts(*sides)) for sides in zip(size, window, stride, strict=True)]
        return cls(size, window, starts[0], starts[1])

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def cut(self, image: Tensor) -> list[Tensor]:
        """Image [3 H W] to its windows [3 h w]."""
        height, width = self.window
        return [image[:, top : top + height, left : left + width] for top in self.tops for left in self.lefts]


def strips(coarse: Sequence[Tensor], grid: Grid, size: tuple[int, int]) -> Iterator[Tensor]:
    """The windows' logits, each [C h' w'], on an image of `size`: strips [rows W C], top to bottom.

    Bilinear to the resolution of the windows, averaged where they overlap, then bilinear to `size`; all of that is
    linear and acts on one axis at a time, so it is two matrix products for each window and strip, and nothing is ever
    whole. A single window goes to `size` at once.
    """
    (height, width), classes = size, len(coarse[0])
    rows, columns = (
        _shares(*sides, like=coarse[0], alone=len(grid) == 1)
        for sides in zip(grid.size, grid.window, (grid.tops, grid.lefts), coarse[0].shape[1:], size, strict=True)
    )
    held: dict[int, Tensor] = {}  # rows of windows at full width: those that the strip meets
    step = max(1, strip_bytes(coarse[0].device) // (4 * width * classes))
    for top in range(0, height, step):
        stop = min(top + step, height)
        strip = coarse[0].new_zeros(stop - top, width * classes)
        for index, (first, end, share) in enumerate(rows):
            if end <= top:
                held.pop(index, None)
            elif first < stop:
                if index not in held:
                    held[index] = _widened(coarse[index * len(columns) :], columns, width).flatten(1)
                start, last = max(first, top), min(end, stop)
                strip[start - top : last - top].addmm_(share[start - first : last - first], held[index])
        yield strip.view(-1, width, classes)


def strip_bytes(device: torch.device) -> int:
    """Logits at full resolution that are held at once."""
    return 2**28 if device.type == "cuda" else STRIP_BYTES


def _shares(
    length: int, window: int, starts: Sequence[int], coarse: int, out: int, like: Tensor, alone: bool
) -> list[tuple[int, int, Tensor]]:
    """Along one side, for each window: the output pixels that it reaches, first and end, and what its coarse values
    give to each, [end − first, coarse]. A window that is `alone` does not go by way of its own resolution."""
    eye = torch.eye(coarse, device=like.device, dtype=like.dtype)
    if alone:
        return [(0, out, _linear(eye, out).t())]
    up, shares = _linear(eye, window), like.new_zeros(len(starts), coarse, length)
    count = like.new_zeros(length)
    for share, start in zip(shares, starts, strict=True):
        share[:, start : start + window] = up
        count[start : start + window] += 1
    found = []
    for share, start in zip(shares / count, starts, strict=True):
        scale = out / length
        # Bilinear sampling reaches less than a pixel, of either resolution, beyond the window's edges.
        first = max(0, int((start - 1) * scale) - 1)
        end = min(out, int((start + window + 1) * scale) + 2)
        found.append((first, end, _linear(share, out)[:, first:end].t().contiguous()))
    return found


def _linear(values: Tensor, out: int) -> Tensor:
    """[n length] to [n out], linear."""
    return values if values.shape[1] == out else F.interpolate(values[None], out, mode="linear", align_corners=False)[0]


def _widened(coarse: Sequence[Tensor], columns: Sequence[tuple[int, int, Tensor]], width: int) -> Tensor:
    """The first windows of `coarse`, side by side at full width: [h' W C]."""
    classes, height, _ = coarse[0].shape
    found = coarse[0].new_zeros(height, width, classes)
    for window, (first, end, share) in zip(coarse, columns, strict=False):
        found[:, first:end] += share @ window.permute(1, 2, 0)
    return found
