"""What files cannot say of themselves: how many channels are wanted, what their numbers mean.

Sources take the conventions that hold where they are made and keep them, so that loader processes read alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from dino_value.errors import UserError

MAX_PIXELS = 178_956_970
"""Where PIL takes an image for an attack (twice its MAX_IMAGE_PIXELS)."""
MAX_DEPTH = 10.0
"""Metres; the range of NYUv2's sensor, and what is beyond counts as unknown."""
MILLIMETRES = 1000.0
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Conventions:
    """The keys of the section `data` that are about reading, and the channels that the backbone takes.

    Attributes:
        channels: of images as they are handed on.
        range: values that become 0 and 255, in images deeper than 8 bits; None: the type's or the file's own.
        max_pixels: an image of more is refused by its header.
        depth_units: units a metre of depth maps in integers.
        max_depth: metres, beyond which depth counts as unknown.

    Raises:
        UserError: a value that none can have.
    """

    channels: int = 3
    range: tuple[float, float] | None = None
    max_pixels: int = MAX_PIXELS
    depth_units: float = MILLIMETRES
    max_depth: float = MAX_DEPTH

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise UserError(f"backbone.kwargs.in_chans={self.channels}: must be at least 1")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise UserError(f"data.range={list(self.range)}: give the lower value first, as in [0,4095]")
        for key in ("max_pixels", "depth_units", "max_depth"):
            if not getattr(self, key) > 0:
                raise UserError(f"data.{key}={getattr(self, key)}: must be above 0")

    @classmethod
    def of(cls, data: Any, channels: int = 3) -> Conventions:
        """From the configuration's section `data`."""
        return cls(channels, as_range(data.range), data.max_pixels, data.depth_units, data.max_depth)


def as_range(values: Sequence[float]) -> tuple[float, float] | None:
    """`data.range` as a pair, or none.

    Raises:
        UserError: not two numbers.
    """
    if not values:
        return None
    if len(values) != 2:
        raise UserError(f"data.range={list(values)}: give two numbers, as in [0,4095]")
    return float(values[0]), float(values[1])


_held: ContextVar[Conventions | None] = ContextVar("conventions", default=None)


def conventions() -> Conventions:
    """Those that hold here."""
    return _held.get() or Conventions()


@contextmanager
def using(told: Conventions) -> Iterator[None]:
    """Have `told` hold within."""
    token = _held.set(told)
    try:
        yield
    finally:
        _held.reset(token)


def as_configured(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which takes a run's `config`, or a `run` that has one, with the conventions of that configuration."""
    signature = inspect.signature(function)

    @wraps(function)
    def configured(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        config = given["config"] if "config" in given else given["run"].config
        channels = config.backbone.kwargs.get("in_chans", 3)
        if not isinstance(channels, int):
            raise UserError(f"backbone.kwargs.in_chans={channels}: expected a whole number")
        with using(Conventions.of(config.data, channels)):
            return function(*args, **kwargs)

    return configured
