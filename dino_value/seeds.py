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


def exchange(count: int, drawn: torch.Generator) -> list[int]:
    """Who gives to each of `count`: a random cycle through all of them, so that with two or more nobody keeps their
    own."""
    order = torch.randperm(count, generator=drawn).tolist()
    donors = dict(zip(order, order[1:] + order[:1], strict=True))
    return [donors[place] for place in range(count)]
