"""Which labelled images a run used, and that none of them is one it will be judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dino_value.data.labelled import LabelledSource, split_by_group


class Named(Protocol):
    """What of a source is needed to hash its images."""

    def name(self, index: int) -> str: ...

    def load(self, index: int) -> tuple[Tensor, Any]: ...


def content_hash(source: Named, index: int, image: Tensor | None = None) -> str:
    """The same for two copies of an image, whatever they are called: a hash of the file or, where a source keeps its
    images in one file or in memory, of the pixels (of `image`, if it has been read already).

    Raises:
        UserError: the image has no file of its own and cannot be read.
        OSError: its file cannot be read.
    """
    path = Path(source.name(index))
    if path.is_file():
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    image = source.load(index)[0] if image is None else image
    return hashlib.blake2b(repr(tuple(image.shape)).encode() + image.numpy().tobytes(), digest_size=16).hexdigest()


def content_hashes(source: LabelledSource, indices: Sequence[int] | None = None) -> list[str]:
    """`content_hash` of these items, all by default."""
    with ThreadPoolExecutor() as pool:
        return list(
            pool.map(lambda index: content_hash(source, index), range(len(source)) if indices is None else indices)
        )


def split_apart(
    source: LabelledSource, counts: Sequence[int], seed: int, evaluation: LabelledSource
) -> tuple[list[list[int]], list[int]]:
    """`split_by_group`, with no image in it whose content is in `evaluation`.

    Returns:
        The lists, and the indices that were left out for it. Without any, the lists are those of `split_by_group`.

    Raises:
        UserError: too few images are left, or see `content_hash`.
    """
    forbidden = set(content_hashes(evaluation))
    excluded: set[int] = set()
    while True:  # only what has been dealt is read: a pool may be much smaller than the set
        parts = split_by_group(source, counts, seed, excluded)
        dealt = [index for part in parts for index in part]
        hashes = content_hashes(source, dealt) if dealt else []
        found = {index for index, value in zip(dealt, hashes, strict=True) if value in forbidden}
        if not found:
            return parts, sorted(excluded)
        excluded |= found


def split_record(
    source: LabelledSource, parts: Mapping[str, Sequence[int]], seed: int, excluded: Sequence[int] = ()
) -> dict[str, Any]:
    """What a run folder keeps of one labelled set's splits, for JSON: the seed, the names in each part in order, and
    those left out because the evaluation has them too."""
    names = {part: [source.name(index) for index in indices] for part, indices in parts.items()}
    return {"seed": seed, **names, "in_evaluation": [source.name(index) for index in excluded]}
