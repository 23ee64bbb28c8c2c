"""Dense prediction on images of any size: windows, and logits put together again in bands of bounded memory.

All windows go through the backbone in batches, and are kept at the resolution of the head (a few kB each). Only a band
of rows at a time is brought to full resolution: one row of windows of the scaled image, and STRIP_BYTES of the final
one. So memory grows with the width of an image, not with its area.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STRIP_BYTES = 2**28
"""Logits at full resolution that are held at once."""


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


def merged_bands(coarse: Sequence[Tensor], grid: Grid) -> Iterator[Tensor]:
    """The windows' logits, each [C h' w'], at the size of the image: bands [C rows W] from top to bottom.

    Where windows overlap their logits are averaged. A single window is passed on as it is, at its own resolution.
    """
    if len(grid) == 1:
        yield coarse[0]
        return
    (height, width), columns = grid.window, len(grid.lefts)
    covered = torch.zeros(grid.size[1], device=coarse[0].device)
    for left in grid.lefts:
        covered[left : left + width] += 1
    total = coarse[0].new_zeros(len(coarse[0]), height, grid.size[1])
    rows = torch.zeros(height, 1, device=coarse[0].device)
    for index, top in enumerate(grid.tops):
        for left, window in zip(grid.lefts, coarse[index * columns : (index + 1) * columns], strict=True):
            total[:, :, left : left + width] += _resize(window, grid.window)
        rows += 1
        last = index + 1 == len(grid.tops)
        done = height if last else min(height, grid.tops[index + 1] - top)
        yield total[:, :done] / (rows[:done] * covered)
        if not last:  # a band further down
            total = torch.cat([total[:, done:], torch.zeros_like(total[:, :done])], 1)
            rows = torch.cat([rows[done:], torch.zeros_like(rows[:done])])


def resized_bands(bands: Iterator[Tensor], height: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """Bands [C r w], together of `height` rows, resampled bilinearly to `size`: strips [C rows W], top to bottom.

    Equal to `interpolate` of the whole, which is never there.
    """
    held, first = next(bands), 0  # `held` begins at row `first`
    scale = height / size[0]
    strip = max(1, STRIP_BYTES // (4 * len(held) * size[1]))
    start = 0
    while start < size[0]:
        stop = min(start + strip, size[0])
        place = ((torch.arange(start, stop, dtype=torch.float64) + 0.5) * scale - 0.5).clamp(min=0)
        above = place.floor().long()
        below = (above + 1).clamp(max=height - 1)
        while int(below[-1]) >= first + held.shape[1]:
            keep = min(int(above[0]) - first, held.shape[1])
            held, first = torch.cat([held[:, keep:], next(bands)], 1), first + keep
        share = (place - above).to(held)[:, None]
        above, below = ((rows - first).to(held.device) for rows in (above, below))
        rows = held[:, above] if scale == 1 else torch.lerp(held[:, above], held[:, below], share)
        yield _resize(rows, (stop - start, size[1]))
        start = stop


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(logits.shape[-2:]) == size:
        return logits
    return F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
