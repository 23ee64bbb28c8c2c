"""Random numbers as a function of what they are drawn for: no generator state has to be saved."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def key(seed: int, *parts: int | str) -> int:
    """A 63-bit seed from a run's seed and the names and numbers of what is being drawn."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0]) >> 1


def generator(seed: int, *parts: int | str) -> torch.Generator:
    """A CPU generator for one draw: the same on every device."""
    return torch.Generator().manual_seed(key(seed, *parts))
