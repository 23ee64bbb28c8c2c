"""Whose part of a batch: several processes share one, and several backward passes may share a step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BatchShard(NamedTuple):
    """Part `rank` of `world`. What is random is drawn for the whole batch and cut: the parts of any number of
    processes are the batch that one would have."""

    rank: int = 0
    world: int = 1

    def of(self, images: int) -> slice:
        """Which of a batch of `images` images; where `world` does not divide them some parts have one more."""
        return slice(self.rank * images // self.world, (self.rank + 1) * images // self.world)

    def rows(self, batch: Tensor, views: int) -> Tensor:
        """Own rows of a view-major batch [views·B …]."""
        if self.world == 1 or views == 0:
            return batch
        grouped = batch.unflatten(0, (views, -1))
        return grouped[:, self.of(grouped.shape[1])].flatten(0, 1)

    def split(self, parts: int) -> list[BatchShard]:
        """This part in `parts` equal ones."""
        return [BatchShard(self.rank * parts + index, self.world * parts) for index in range(parts)]


WHOLE = BatchShard()
