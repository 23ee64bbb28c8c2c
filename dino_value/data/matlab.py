"""Numeric arrays of a MATLAB 5 file (splits.mat of NYUv2), every length checked against the file.

scipy.io.loadmat reads more kinds, but some damaged files crash its compiled reader, and the process with it. The format
is that of MathWorks' "MAT-File Format", Level 5.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED = 14, 15
_NUMERIC = range(6, 16)  # array classes, double to uint64
_MOST = 1 << 28  # bytes that one array may unpack to


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The real numeric arrays of a file by name, in their shapes; other kinds are left out.

    Raises:
        OSError: it cannot be read.
        ValueError: not such a file, or damaged.
    """
    content = path.read_bytes()
    if len(content) < 128 or content[126:128] not in (b"IM", b"MI") or content[128:132] == b"":
        raise ValueError("not a MATLAB 5 file")
    order = "<" if content[126:128] == b"IM" else ">"
    found = {}
    for kind, part in _elements(content[128:], order):
        if kind == _COMPRESSED:
            kind, part = next(_elements(_unpacked(part), order))
        array = _array(part, order) if kind == _MATRIX else None
        if array is not None:
            found[array[0]] = array[1]
    return found


def _elements(content: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, data) of each element of a sequence."""
    place = 0
    while place < len(content):
        if len(content) - place < 8:
            raise ValueError("it ends within a tag")
        kind, length = struct.unpack_from(f"{order}II", content, place)
        start, small = place + 8, kind >> 16
        if small:  # up to four bytes of data in the tag itself
            kind, length, start = kind & 0xFFFF, small, place + 4
        if (small and length > 4) or length > len(content) - start:
            raise ValueError("an element is longer than what is there")
        yield kind, content[start : start + length]
        padding = 0 if kind == _COMPRESSED else -length % 8
        place = place + 8 if small else start + length + padding


def _unpacked(part: bytes) -> bytes:
    try:
        unpacked = zlib.decompressobj().decompress(part, _MOST)
    except zlib.error as error:
        raise ValueError(f"it cannot be unpacked: {error}") from None
    if len(unpacked) < 8:
        raise ValueError("a compressed element is empty")
    return unpacked


def _array(part: bytes, order: str) -> tuple[str, np.ndarray] | None:
    """Name and values of one array; None of another kind than real and numeric."""
    parts = list(_elements(part, order))
    if len(parts) < 4 or len(parts[0][1]) != 8:
        return None
    (flags,) = struct.unpack_from(f"{order}I", parts[0][1])
    dtype = _TYPES.get(parts[3][0])
    if flags & 0xFF not in _NUMERIC or flags & 0x0800 or dtype is None:
        return None
    shape = np.frombuffer(parts[1][1], f"{order}i4").tolist()
    values = np.frombuffer(parts[3][1], f"{order}{dtype}")
    if min(shape, default=-1) < 0 or math.prod(shape) != values.size:
        raise ValueError(f"{values.size} values for an array of shape {shape}")
    return parts[2][1].decode("latin1"), values.reshape(shape, order="F")
