"""Labelled images: the protocol that every data set meets, and what is built on it.

Whatever is read here is a pure function of (index, seed): no loader holds a random state, so a run that stops
and goes on reads the same data.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_value.distributed.shards import WHOLE, BatchShard
from dino_value.errors import UserError
from dino_value.seeds import exchange, generator

Kind = Literal["seg", "depth", "classes"]
Split = Literal["training", "validation"]

IGNORE = 255
"""Label of pixels without a class; the same number as in the heads."""


class TooFew(UserError):
    """Fewer labelled images than asked for, of those that are not in `exclude`."""

    def __init__(self, message: str, exclude: Collection[int]) -> None:
        super().__init__(message)
        self.exclude = exclude


class LabelledSource(Protocol):
    """Images with targets, at their own resolution.

    Targets by kind: `seg` int64 [H W] with 255 = ignore, `depth` float32 [H W] metres with 0 = unknown,
    `classes` int64 [].
    """

    @property
    def kind(self) -> Kind: ...

    @property
    def num_classes(self) -> int:
        """0 for depth."""
        ...

    @property
    def class_names(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """Image uint8 [3 H W] and its target."""
        ...

    def name(self, index: int) -> str:
        """What error messages call this item: its file."""
        ...

    def group(self, index: int) -> str:
        """What must stay on one side when a set is cut in two: views of one room share a group."""
        ...


class LabelledTensors:
    """A source held in memory.

    Args:
        kind: what the targets are.
        images: uint8 [n 3 H W].
        targets: [n H W] or [n], of the kind's type.
        class_names: empty for depth.
        groups: one a sample; by default every sample stands alone.
    """

    def __init__(
        self,
        kind: Kind,
        images: Tensor,
        targets: Tensor,
        class_names: Sequence[str] = (),
        groups: Sequence[str] | None = None,
    ) -> None:
        if len(images) != len(targets) or (groups is not None and len(groups) != len(images)):
            raise ValueError(f"{len(images)} images, {len(targets)} targets and their groups do not pair up")
        self.kind = kind
        self.images, self.targets, self.groups = images, targets, groups
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.targets[index]

    def name(self, index: int) -> str:
        return f"sample {index}"

    def group(self, index: int) -> str:
        return str(index) if self.groups is None else self.groups[index]


class Subset:
    """Some items of a source, in a given order.

    Args:
        source: where items come from.
        indices: which.
        skipped: why each of the items that cannot be used is not among them, one line each.
    """

    def __init__(self, source: LabelledSource, indices: Sequence[int], skipped: Sequence[str] = ()) -> None:
        self.source, self.indices, self.skipped = source, list(indices), list(skipped)
        self.kind, self.num_classes, self.class_names = source.kind, source.num_classes, source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        return self.source.load(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def group(self, index: int) -> str:
        return self.source.group(self.indices[index])

    def label(self, index: int) -> int:
        return class_of(self.source, self.indices[index])


class Shuffled:
    """A source whose images carry each other's targets, none of them its own: labels that say as much as before, and
    nothing of the image."""

    def __init__(self, source: LabelledSource, seed: int) -> None:
        self.source = source
        self.kind, self.num_classes, self.class_names = source.kind, source.num_classes, source.class_names
        self.order = exchange(len(source), torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        image, _ = self.source.load(index)
        _, target = self.source.load(self.order[index])
        return image, target if target.ndim == 0 else resize_target(target, (image.shape[-2], image.shape[-1]))

    def name(self, index: int) -> str:
        return self.source.name(index)

    def group(self, index: int) -> str:
        return self.source.group(index)


class Kept:
    """A source whose items are decoded once, when they are first asked for, and kept: for small sets."""

    def __init__(self, source: LabelledSource) -> None:
        self.source, self._items = source, dict[int, tuple[Tensor, Tensor]]()
        self.kind, self.num_classes, self.class_names = source.kind, source.num_classes, source.class_names
        self.skipped: list[str] = getattr(source, "skipped", [])

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self._items:
            image, target = self.source.load(index)
            self._items[index] = image, target.to(torch.uint8) if self.kind == "seg" else target
        image, target = self._items[index]
        return image, target.long() if self.kind == "seg" else target

    def name(self, index: int) -> str:
        return self.source.name(index)

    def group(self, index: int) -> str:
        return self.source.group(index)

    def label(self, index: int) -> int:
        return class_of(self.source, index)


def readable(source: LabelledSource) -> Subset:
    """What of a source can be read; reads everything once.

    Raises:
        UserError: nothing can.
    """

    def problem(index: int) -> str | None:
        try:
            source.load(index)
        except UserError as error:
            return " ".join(str(error).split())
        return None

    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(problem, range(len(source))))
    kept = [index for index, text in enumerate(problems) if text is None]
    skipped = [text for text in problems if text is not None]
    if skipped and not kept:
        raise UserError(f"none of {len(skipped)} images can be read; the first: {skipped[0]}")
    return Subset(source, kept, skipped)


Item = TypeVar("Item")


def some_items(load: Callable[[int], Item], count: int, most: int, skip_unreadable: bool = False) -> list[Item]:
    """At most `most` of `count` items, evenly spaced: of a sorted list, some of every folder.

    Args:
        load: gives an item by its index.
        skip_unreadable: in the place of one that cannot be read take the next that can and is not taken anyway.

    Raises:
        UserError: of the first that cannot be read; with `skip_unreadable`, none can.
    """
    places, items = spread(count, most), list[Item]()
    spare = set(range(count)).difference(places)
    for place in places:
        for index in chain([place], (later for later in range(place + 1, count) if later in spare)):
            spare.discard(index)
            try:
                items.append(load(index))
                break
            except UserError:
                if not skip_unreadable:
                    raise
    if not items:
        raise UserError(f"none of {count} images can be read")
    return items


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the indices below `count`, evenly spaced."""
    most = min(count, most)
    return [index * count // most for index in range(most)]


class LabelledDataset:
    """Some items of a source, brought to one size.

    Images are resampled bilinearly with antialiasing, targets by nearest neighbour (labels and depths must
    not be blended). Dense kinds are stretched to `size`; for `classes` the image covers `size` and is cropped
    at the centre.

    Args:
        source: where items come from.
        indices: which, in this order; all by default.
        size: (height, width) in pixels.
        flip: mirror left to right with probability 1/2, decided by (index, seed) alone.
        resize_targets: False keeps targets at their own resolution, as metrics want them.
    """

    def __init__(
        self,
        source: LabelledSource,
        indices: Sequence[int] | None = None,
        *,
        size: tuple[int, int],
        flip: bool = False,
        resize_targets: bool = True,
    ) -> None:
        self.source = source
        self.indices = range(len(source)) if indices is None else indices
        self.size, self.flip, self.resize_targets = size, flip, resize_targets

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Item `position` as `seed` draws it, key = (position, seed): image uint8 [3 h w] and target."""
        position, seed = key
        index = self.indices[position]
        image, target = self.source.load(index)
        dense = self.source.kind != "classes"
        image = resize_image(image, self.size) if dense else cover_image(image, self.size)
        if dense and self.resize_targets:
            target = resize_target(target, self.size)
        if self.flip and _coin(index, seed):
            image = image.flip(-1)
            target = target.flip(-1) if dense else target
        return image, target

    def batch(self, positions: Sequence[int], seed: int = 0, part: BatchShard = WHOLE) -> tuple[Tensor, Tensor]:
        """Images uint8 [B 3 h w] and targets [B …] at these positions, or a part of them, drawn with `seed`."""
        own = positions[part.of(len(positions))]
        # Of an empty part the shapes are still asked for.
        images, targets = zip(*(self[position, seed] for position in own or positions[:1]), strict=True)
        return torch.stack(images)[: len(own)], torch.stack(targets)[: len(own)]


def _coin(index: int, seed: int) -> bool:
    """A fair coin, the same for the same (index, seed) on every machine."""
    # splitmix64's finaliser over a linear mix of both.
    mixed = (index * 0x9E3779B97F4A7C15 + seed * 0xD1B54A32D192ED03 + 1) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return bool((mixed >> 63) & 1)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Image uint8 [3 H W] stretched to `size`, bilinear with antialiasing."""
    if image.shape[-2:] == size:
        return image
    # In float32 and rounded once: the uint8 kernel differs between CPU instruction sets.
    resized = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    return resized[0].round_().clamp_(0, 255).to(torch.uint8)


def cover_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Image uint8 [3 H W] scaled to cover `size` with its aspect kept, and cropped at the centre."""
    (height, width), (rows, columns) = image.shape[-2:], size
    scale = max(rows / height, columns / width)
    image = resize_image(image, (max(rows, round(height * scale)), max(columns, round(width * scale))))
    top, left = (image.shape[-2] - rows) // 2, (image.shape[-1] - columns) // 2
    return image[..., top : top + rows, left : left + columns]


def resize_target(target: Tensor, size: tuple[int, int]) -> Tensor:
    """Label or depth map [H W] brought to `size` by nearest neighbour, type kept."""
    if target.shape == size:
        return target
    # float32 holds every label exactly; interpolate has no integer kernel.
    return F.interpolate(target[None, None].float(), size=size, mode="nearest-exact")[0, 0].to(target.dtype)


def split_by_group(
    source: LabelledSource, counts: Sequence[int], seed: int = 0, exclude: Collection[int] = ()
) -> list[list[int]]:
    """Disjoint lists of indices, `counts[k]` long, such that no group has items in two of them.

    Groups are shuffled by `seed` and dealt in turn; what is left of a list's last group is used by nobody. Items in
    `exclude` are dealt to nobody, and do not change the order of the groups.

    Raises:
        TooFew: the groups do not suffice.
    """
    parts = _dealt(source, counts, seed, exclude)
    if parts is not None:
        return parts
    wanted = " + ".join(str(count) for count in counts if count)
    groups = len({source.group(index) for index in range(len(source))})
    raise TooFew(
        f"cannot cut {wanted} labelled samples, no group on two sides, out of {len(source)} in {groups} groups: lower "
        "the counts, or give more data",
        exclude,
    )


def fewer(
    source: LabelledSource, counts: Sequence[int], least: Sequence[int], seed: int, exclude: Collection[int]
) -> list[int] | None:
    """Counts that `split_by_group` can deal, in about the proportions of `counts`, 0 where that is 0 and else at least
    `least`; None where there are none."""
    left = len(source)
    while left:
        fit = [max(low, count * left // sum(counts)) if count else 0 for count, low in zip(counts, least, strict=True)]
        if _dealt(source, fit, seed, exclude) is not None:
            return fit
        left = min(left - 1, left * 19 // 20)
    return None


def _dealt(
    source: LabelledSource, counts: Sequence[int], seed: int, exclude: Collection[int]
) -> list[list[int]] | None:
    """`split_by_group`; None where the groups do not suffice."""
    members: dict[str, list[int]] = {}
    for index in range(len(source)):
        members.setdefault(source.group(index), []).append(index)
    names = sorted(members)
    order = iter(torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist())
    parts: list[list[int]] = []
    for count in counts:
        part: list[int] = []
        while len(part) < count:
            choice = next(order, None)
            if choice is None:
                return None
            part += [index for index in members[names[choice]] if index not in exclude]
        parts.append(part[:count])
    return parts


def class_of(source: LabelledSource, index: int) -> int:
    """The class of an item of kind `classes`, without its image where the source has a method `label`."""
    known: Callable[[int], int] | None = getattr(source, "label", None)
    return int(source.load(index)[1]) if known is None else known(index)


def few_labels(source: LabelledSource, count: int, seed: int) -> list[int]:
    """`count` indices chosen by `seed`, ascending: the first of one order, so that fewer are among more.

    Of kind `classes` every class has as many, or one more than another, as long as it lasts.

    Raises:
        UserError: `count` is below 1, or above what there is.
    """
    if not (isinstance(count, int) and 1 <= count <= len(source)):
        raise UserError(f"labels={count}: choose 1 … {len(source)}, the items of the training split")
    order: list[int] = torch.randperm(len(source), generator=generator(seed, "labels")).tolist()
    if source.kind == "classes":
        seen: Counter[int] = Counter()
        rounds: list[tuple[int, int]] = []  # which of its class an item is; sorting keeps the order within a round
        for index in order:
            label = class_of(source, index)
            rounds.append((seen[label], index))
            seen[label] += 1
        order = [index for _, index in sorted(rounds, key=lambda pair: pair[0])]
    return sorted(order[:count])


def file_groups(paths: Sequence[Path], pattern: str | None = None, neighbours: int = 1) -> list[str]:
    """The group of each file, from its name or from its place in the list.

    Args:
        paths: in the source's order.
        pattern: a regular expression searched for in the stem; its first bracket (or all it matches) is the
            group.
        neighbours: this many consecutive files form a group; excludes `pattern`.

    Raises:
        UserError: a bad pattern, one that a file does not match, or both ways asked for.
    """
    if neighbours < 1 or (pattern is not None and neighbours > 1):
        raise UserError(f"give either group_pattern or neighbours ≥ 1 (got {pattern!r} and {neighbours})")
    if pattern is None:
        return index_groups(len(paths), neighbours) if neighbours > 1 else [path.stem for path in paths]
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"group_pattern {pattern!r} is not a regular expression: {error}") from None
    groups = []
    for path in paths:
        found = compiled.search(path.stem)
        if found is None:
            raise UserError(f"{path}: group_pattern {pattern!r} does not match this name")
        groups.append(found[1] if compiled.groups else found[0])
    return groups


def index_groups(count: int, neighbours: int = 1) -> list[str]:
    """Groups of `neighbours` consecutive items."""
    return [str(index // neighbours) for index in range(count)]
