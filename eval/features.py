"""Frozen features: a backbone that is lent to an evaluation, the images it sees, and its features kept in RAM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_value.data.labelled import LabelledDataset, LabelledSource
from dino_value.errors import UserError
from dino_value.eval.base import HeadOptions, Options, pick_device, use_bfloat16
from dino_value.models.backbone import Backbone, Features
from dino_value.runs.metrics import follow

Reader = Callable[[Features], Tensor]
"""What a head reads of a backbone's features: a map [B D h w] or a vector [B D]."""

Step = TypeVar("Step")


class Items(Protocol):
    """What `loader` reads: items by (position, seed), as LabelledDataset has them."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Tensor]: ...


FIXED = -1
"""The seed by which `Items` are asked for what is the same under every seed; where nothing is, they raise `Varies`."""

TOKENS = 4096
"""Of a forward pass, for each thread of a CPU: more do not stay in its caches, and take longer (docs/speed.md)."""


class Varies(Exception):
    """This item differs from seed to seed, so its features cannot be kept."""


def last_blocks(backbone: Backbone, images: Tensor, count: int) -> Features:
    """Features of the last `count` blocks, each after the final norm, side by side: cls [B count·D], the last block's
    last. DINOv2's linear evaluation (arXiv 2304.07193, section 7) reads 1 or 4.
    """
    if count == 1:
        return backbone(images)
    hidden = backbone(images, stop=backbone.depth - count + 1)
    found = [backbone(hidden, start=backbone.depth)]  # past the last block: the norm alone
    for index in range(backbone.depth - count + 1, backbone.depth):
        hidden = backbone(hidden, start=index, stop=index + 1)
        found.append(backbone(hidden, start=backbone.depth))
    cls, patches = (torch.cat([getattr(features, part) for features in found], -1) for part in ("cls", "patches"))
    return Features(cls, patches, found[0].grid)


class FrozenBackbone:
    """A backbone on its device, in eval mode, without gradients; images in, what a head reads out."""

    def __init__(self, backbone: Backbone, read: Reader, options: Options) -> None:
        self.backbone, self.read, self.blocks = backbone, read, options.blocks
        self.device = pick_device(options.device)
        self.bf16 = use_bfloat16(options.bf16, self.device)

    def __call__(self, images: Tensor) -> Tensor:
        """Images uint8 [B 3 H W] to float32 features on the device."""
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            parts = [
                self.read(last_blocks(self.backbone, self.normalised(part), self.blocks)).float()
                for part in images.split(self.most(images))
            ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def most(self, images: Tensor) -> int:
        """How many of these go through the backbone at once."""
        if self.device.type == "cuda":
            return len(images)
        tokens = images.shape[-2] * images.shape[-1] // self.backbone.patch_size**2
        return max(1, int(TOKENS * torch.get_num_threads() / max(1, tokens)))

    def normalised(self, images: Tensor) -> Tensor:
        return self.backbone.normalise(images.to(self.device, non_blocking=True))


@contextmanager
def frozen(backbone: Backbone, read: Reader, options: Options) -> Iterator[FrozenBackbone]:
    """Lend `backbone` to an evaluation: moved and in eval mode inside, as it was before outside."""
    training, home = backbone.training, next(backbone.parameters()).device
    extractor = FrozenBackbone(backbone, read, options)
    backbone.to(extractor.device).eval()
    try:
        yield extractor
    finally:
        backbone.to(home).train(training)


def shuffled_keys(count: int, batch: int, steps: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """`steps` lists of `batch` (position, epoch seed) pairs: one permutation after another."""
    generator = torch.Generator().manual_seed(seed)
    pool: list[tuple[int, int]] = []
    epoch = 0
    for _ in range(steps):
        while len(pool) < batch:
            order = torch.randperm(count, generator=generator).tolist()
            pool += [(position, seed * 1_000_003 + epoch) for position in order]
            epoch += 1
        yield pool[:batch]
        del pool[:batch]


class _Items(Dataset["tuple[Any, Tensor] | Exception"]):
    """A data set whose mistakes are handed over as they are: the loader would wrap them in a traceback."""

    def __init__(self, dataset: Items) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Tensor] | Exception:
        try:
            return self.dataset[key]
        except (UserError, Varies) as error:
            return error


def _collate(items: list[tuple[Any, Tensor] | Exception]) -> tuple[Any, list[Tensor]] | Exception:
    pairs = []
    for item in items:
        if isinstance(item, Exception):
            return item
        pairs.append(item)
    images, targets = zip(*pairs, strict=True)
    alike = all(isinstance(image, Tensor) and image.shape == images[0].shape for image in images)
    return (torch.stack(images) if alike else list(images)), list(targets)


def loader(dataset: Items, keys: Iterable[list[tuple[int, int]]], workers: int) -> Iterator[tuple[Any, list[Tensor]]]:
    """Batches in the order of `keys`: images uint8 [B 3 h w], a list where they differ in shape, and their targets.

    Raises:
        UserError: an item that cannot be read, also where a worker found it.
    """
    # The keys carry every random choice, so the order of workers cannot change the data; the generator is
    # there only so that DataLoader does not draw its base seed from the global one.
    batches = DataLoader(
        _Items(dataset),
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),
    )
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        yield batch


@dataclass(frozen=True)
class Memory:
    """Frozen features of a set, or its images where the backbone is trained, and its targets, in RAM.

    Args:
        features: float32 [n …], or images uint8 [n 3 h w]; targets: [n …], label maps as uint8.
        order: positions of the items within them, int64; subsets share the tensors.
    """

    features: Tensor
    targets: Tensor
    order: Tensor

    def __len__(self) -> int:
        return len(self.order)

    def subset(self, positions: Sequence[int]) -> Memory:
        return replace(self, order=self.order[torch.tensor(positions)])

    def batch(self, positions: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Features and targets of these items, on `device`."""
        index = self.order[torch.tensor(positions)]
        return self.features[index].to(device), expand(self.targets[index]).to(device)


def training_batches(
    extractor: Callable[[Tensor], Tensor],
    source: LabelledSource,
    options: HeadOptions,
    dataset: Items | None = None,
    start: int = 0,
    memory: Memory | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`options.steps` batches (features, targets) on the device, targets at `options.size`; the first `start` left out.

    Args:
        memory: the features, where they are known already; else `remember` computes them, or each batch goes through
            the backbone.
    """
    if dataset is None:
        dataset = LabelledDataset(source, size=options.size, flip=options.augment)
    keys = islice(shuffled_keys(len(dataset), options.batch, options.steps, options.seed), start, None)
    device = pick_device(options.device)
    if memory is None:
        memory = remember(extractor, dataset, options)
    if memory is not None:
        for batch in keys:
            yield memory.batch([position for position, _ in batch], device)
        return
    for images, raw in loader(dataset, keys, options.workers):
        yield extractor(images), torch.stack(raw).to(device)


def remember(extractor: Callable[[Tensor], Tensor], dataset: Items, options: HeadOptions) -> Memory | None:
    """The features of a whole set, if they are the same in every epoch, fit in `options.cache_gb` and would otherwise
    be computed more than once; else None.
    """
    if options.augment or options.steps * options.batch < len(dataset):
        return None
    try:
        image, target = dataset[0, FIXED]
        samples = extractor(image[None])[0].cpu(), compact(target)
        if sum(sample.nbytes for sample in samples) * len(dataset) > options.cache_gb * 1e9:
            return None
        features, targets = (sample.new_empty(len(dataset), *sample.shape) for sample in samples)
        filled = 0
        for images, raw in in_order(dataset, options, "features"):
            stop = filled + len(images)
            features[filled:stop] = extractor(images)
            targets[filled:stop] = compact(torch.stack(raw))
            filled = stop
    except Varies:
        return None
    return Memory(features, targets, torch.arange(len(dataset)))


def in_order(dataset: Items, options: Options, title: str) -> Iterator[tuple[Any, list[Tensor]]]:
    """Every item once, in order, in batches for one forward pass each."""
    keys = ordered_keys(len(dataset), options.batch)
    batches = loader(dataset, keys, options.workers)
    yield from shown(batches, title, len(keys), options.progress)


def shown(steps: Iterable[Step], title: str, total: int, progress: bool) -> Iterator[Step]:
    """The same steps, followed on stderr where that is asked for."""
    yield from follow(steps, title, total, quiet=not progress)


def forward_batch(batch: int) -> int:
    """Images in a forward pass: a head's step may be small, a forward pass need not be."""
    return max(batch, 32)


def ordered_keys(count: int, batch: int) -> list[list[tuple[int, int]]]:
    """Every position once, in order, in chunks for one forward pass."""
    batch = forward_batch(batch)
    return [
        [(position, FIXED) for position in range(start, min(start + batch, count))] for start in range(0, count, batch)
    ]


def compact(target: Tensor) -> Tensor:
    """Label maps [… H W] as uint8, an eighth of the RAM: ids end at 254, and 255 is ignore."""
    return target.to(torch.uint8) if target.dtype == torch.int64 and target.ndim >= 2 else target


def expand(target: Tensor) -> Tensor:
    return target.long() if target.dtype == torch.uint8 else target


def validation_images(
    source: LabelledSource, options: Options, title: str = "validation"
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Every item once: images uint8 [B 3 h w] at `options.size`, and targets at their own resolution."""
    yield from in_order(LabelledDataset(source, size=options.size, resize_targets=False), options, title)


def extract(extractor: FrozenBackbone, dataset: Items, options: Options, title: str) -> tuple[Tensor, Tensor]:
    """Features [n D] of every item, in order, on the device, and its targets [n]."""
    features, targets = [], []
    for images, raw in in_order(dataset, options, title):
        features.append(extractor(images))
        targets += raw
    return torch.cat(features), torch.stack(targets).to(extractor.device)


def same_size_runs(outputs: Tensor, targets: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a batch into runs of equal target shape, so that each is computed at its own resolution at once."""
    start = 0
    for stop in range(1, len(targets) + 1):
        if stop == len(targets) or targets[stop].shape != targets[start].shape:
            yield outputs[start:stop], torch.stack(list(targets[start:stop])).to(outputs.device)
            start = stop
