"""Bootstrap intervals over held-out images.

Not `report/statistics.bootstrap_interval`, which resamples a handful of seeds and means only: mIoU is no mean over
images, and there are thousands of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 1000

Statistic = Callable[[Tensor], dict[str, Tensor]]
Draws = dict[str, Tensor]


def bootstrap(rows: Tensor, statistic: Statistic, resamples: int = RESAMPLES, seed: int = 0) -> Draws:
    """Metrics of resampled sets of images (Efron 1979).

    Two models scored on the same images get the same resamples, so their draws may be subtracted: a paired bootstrap.

    Args:
        rows: float64 [n F], each image's contribution to sums.
        statistic: sums [R F] to metrics, each [R].

    Returns:
        Draws [resamples] of each metric.
    """
    count = len(rows)
    rows = rows.double().cpu()
    generator = np.random.default_rng(seed)
    sums = []
    for start in range(0, resamples, 100):  # counts of 100 resamples at a time: [100 n]
        draws = min(100, resamples - start)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=draws)
        sums.append(torch.from_numpy(weights).double() @ rows)
    return statistic(torch.cat(sums))


def interval(draws: Tensor, level: float = LEVEL) -> tuple[float, float] | None:
    """The percentile interval of draws [R]; None where one of them has no value."""
    if not bool(draws.isfinite().all()):
        return None
    low, high = np.quantile(draws.numpy(), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def means(*names: str) -> Statistic:
    """The statistic of rows that hold the metrics `names` and then a 1, or zeros where the image does not count."""

    def statistic(sums: Tensor) -> dict[str, Tensor]:
        return {name: sums[:, column] / sums[:, -1] for column, name in enumerate(names)}

    return statistic


def mean_rows(values: Tensor) -> Tensor:
    """Rows for `means`: values [n M], an image with a NaN in it left out."""
    counts = values.isfinite().all(1, keepdim=True)
    return torch.cat([values.where(counts, 0), counts.to(values)], 1).double()
