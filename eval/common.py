"""What the evaluations share: frozen features, head training, intervals.

An evaluation is a pure function of (backbone, sources, options): nothing here reads or moves a global random
state. On CUDA it repeats to rounding only, because bilinear upsampling adds its gradients in no fixed order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dino_value.backbones import Backbone, Features
from dino_value.checkpoint import read_state, write_state
from dino_value.data.labelled import IGNORE, Kind, LabelledDataset, LabelledSource
from dino_value.errors import Interrupted, UserError
from dino_value.eval.output import format_size, prepare_folder, script, write_results
from dino_value.process import stop_requests

__all__ = ["prepare_folder", "script", "write_results"]

Reader = Callable[[Features], Tensor]
"""What a head reads of a backbone's features: a map [B D h w] or a vector [B D]."""


@dataclass(frozen=True)
class Options:
    """Settings that every evaluation has.

    Args:
        size: (height, width) that images are resized to, pixels; multiples of the patch size.
        blocks: features of the last so many blocks, each after the final norm, side by side (DINOv2 uses 1 and 4).
        batch: images per forward pass, at least 32; per head update where there is a head.
        seed: of every random choice.
        device: a torch device, or "auto": CUDA where there is one.
        workers: processes that read images.
        bf16: run the backbone in bfloat16, on CUDA only.
        save_images: draw the predictions of the first so many images.
        progress: show a progress bar.
    """

    size: tuple[int, int]
    blocks: int = 1
    batch: int = 32
    seed: int = 0
    device: str = "auto"
    workers: int = 0
    bf16: bool = True
    save_images: int = 0
    progress: bool = False


@dataclass(frozen=True)
class HeadOptions(Options):
    """Settings of an evaluation that trains a head; each has its own defaults.

    Args:
        head: a name in the evaluation's `HEADS`.
        steps: head updates; 5 % of them warm up linearly, then the learning rate falls along a cosine to 0.
        clip: largest gradient norm.
        augment: mirror training images at random; features are then computed anew each step.
        cache_gb: RAM that unaugmented training features may take; above it they too are computed anew.
        state: folder that keeps the state of a training under way, for `resume`.
        resume: go on from there.
        origin: what the weights are called; a state of other weights is refused.
    """

    head: str = "linear"
    steps: int = 20_000
    batch: int = 8
    lr: float = 1e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    augment: bool = False
    cache_gb: float = 4.0
    state: Path | None = None
    resume: bool = False
    origin: str = ""


AnyOptions = TypeVar("AnyOptions", bound=Options)
Step = TypeVar("Step")

NOT_SETTINGS = ("progress", "state", "resume", "origin")
"""Options that change no number, and are not recorded."""


class Items(Protocol):
    """What `loader` reads: items by (position, seed), as LabelledDataset has them."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Tensor]: ...


FIXED = -1
"""The seed by which `Items` are asked for what is the same under every seed; where nothing is, they raise `Varies`."""


class Varies(Exception):
    """This item differs from seed to seed, so its features cannot be kept."""


@dataclass
class Result:
    """What an evaluation found.

    Args:
        metrics: by name; a slash in it makes a mapping of its own in results.json.
        rows: float64 [n F], what each held-out image contributes to sums.
        statistic: sums of rows, float64 [R F], to metrics, each [R]; intervals resample its argument.
        seconds: of each phase.
        about: what else results.json should say.
        pictures: (file name, uint8 [H W 3]) of the first images.
    """

    metrics: dict[str, float]
    rows: Tensor
    statistic: Callable[[Tensor], dict[str, Tensor]]
    seconds: dict[str, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    pictures: list[tuple[str, NDArray[np.uint8]]] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation(Generic[AnyOptions]):
    """One entry of `EVALUATIONS`: what the command line needs to know.

    Args:
        name: on the command line.
        description: a line of help.
        layout: which `--data-<layout>` of `eval all` it reads.
        defaults: the published protocol.
        open: command line to data.
        measure: (backbone, data, options) to what was found.
        describe: data to what results.json says of it.
        flags: adds its own flags; each is named as the field of the options that it sets.
        headline: the metrics of comparison tables.
    """

    name: str
    description: str
    layout: str
    defaults: AnyOptions
    open: Callable[[Any], Any]
    measure: Callable[[Backbone, Any, AnyOptions], Result]
    describe: Callable[[Any], dict[str, int]]
    flags: Callable[[Any], None]
    headline: tuple[str, ...]


def pick_device(name: str) -> torch.device:
    """The device `name`, or the best there is for "auto".

    Raises:
        UserError: unknown, or absent from this machine.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def check_options(backbone: Backbone, options: Options) -> None:
    """Refuse settings that cannot work, before anything is computed.

    Raises:
        UserError: a value out of range, or an image size that the patch does not divide.
    """
    for key in ("steps", "batch", "lr"):
        if getattr(options, key, 1) <= 0:
            raise UserError(f"{key}={getattr(options, key)} must be positive")
    for key in ("workers", "save_images"):
        if getattr(options, key) < 0:
            raise UserError(f"{key}={getattr(options, key)} must be at least 0")
    if not 1 <= options.blocks <= backbone.depth:
        raise UserError(f"blocks={options.blocks}: {backbone.name} has {backbone.depth}; choose 1 … {backbone.depth}")
    if min(options.size) < 1 or any(side % backbone.patch_size for side in options.size):
        fitting = "x".join(
            str(max(1, round(side / backbone.patch_size)) * backbone.patch_size) for side in options.size
        )
        raise UserError(
            f"image size {format_size(options.size)} is not a multiple of {backbone.name}'s patch size "
            f"{backbone.patch_size}; the nearest that is: {fitting}"
        )


def check_inputs(backbone: Backbone, sources: Sequence[LabelledSource], kind: Kind, options: Options) -> None:
    """`check_options`, and sources that fit each other: a training and a held-out one.

    Raises:
        UserError: unfit settings; an empty source, or one of another kind.
    """
    check_options(backbone, options)
    for source in sources:
        if source.kind != kind:
            raise UserError(f"this evaluation needs labels of kind {kind}, the data has {source.kind}")
        if not len(source):
            raise UserError("a labelled split is empty")
    if sources[0].class_names != sources[1].class_names:
        raise UserError("the training and the validation split do not list the same classes")


class View:
    """A source, or some of its items, each checked as it is read: readers differ in what they promise."""

    def __init__(self, source: LabelledSource, indices: Sequence[int] | None = None) -> None:
        self.source, self.indices = source, range(len(source)) if indices is None else indices
        self.kind, self.num_classes, self.class_names = source.kind, source.num_classes, source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def group(self, index: int) -> str:
        return self.source.group(self.indices[index])

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """As the source's.

        Raises:
            UserError: image and target of different size, or a label above the number of classes.
        """
        image, target = self.source.load(self.indices[index])
        if self.kind != "classes" and image.shape[-2:] != target.shape:
            raise UserError(
                f"{self.name(index)}: the image has {format_size(image.shape[-2:])} pixels and its "
                f"{'labels' if self.kind == 'seg' else 'depth map'} {format_size(target.shape)}; they must agree"
            )
        if self.kind != "depth":
            valid = target if self.kind == "classes" else target[target != IGNORE]
            if valid.numel() and not 0 <= int(valid.min()) <= int(valid.max()) < self.num_classes:
                raise UserError(
                    f"{self.name(index)}: labels {int(valid.min())} … {int(valid.max())}, "
                    f"but there are {self.num_classes} classes (0 … {self.num_classes - 1}, {IGNORE} = ignore)"
                )
        return image, target


def readable(source: LabelledSource) -> tuple[View, list[str]]:
    """The items of `source` that can be read, and why each of the others cannot; reads everything once.

    Raises:
        UserError: none can.
    """
    view, kept, errors = View(source), [], []
    for index in range(len(view)):
        try:
            view.load(index)
            kept.append(index)
        except UserError as error:
            errors.append(" ".join(str(error).split()))
    if errors and not kept:
        raise UserError(f"no item can be read; the first: {errors[0]}")
    return View(source, kept), errors


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
        self.bf16 = options.bf16 and self.device.type == "cuda"

    def __call__(self, images: Tensor) -> Tensor:
        """Images uint8 [B 3 H W] to float32 features on the device."""
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            features = last_blocks(self.backbone, self.normalised(images), self.blocks)
            return self.read(features).float()

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


def training_batches(
    extractor: Callable[[Tensor], Tensor],
    source: LabelledSource,
    options: HeadOptions,
    dataset: Items | None = None,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`options.steps` batches (features, targets) on the device, targets at `options.size`; the first `start` left out.

    Features are computed once and kept in RAM when they are the same in every epoch, fit in `options.cache_gb`, and
    would otherwise be computed more than once; else each batch goes through the backbone.
    """
    if dataset is None:
        dataset = LabelledDataset(source, size=options.size, flip=options.augment)
    keys = islice(shuffled_keys(len(dataset), options.batch, options.steps, options.seed), start, None)
    device = pick_device(options.device)
    if not options.augment and options.steps * options.batch >= len(dataset):
        cache = _cache(extractor, dataset, options)
        if cache is not None:
            features, targets = cache
            for batch in keys:
                index = torch.tensor([position for position, _ in batch])
                yield features[index].to(device), expand(targets[index]).to(device)
            return
    for images, raw in loader(dataset, keys, options.workers):
        yield extractor(images), torch.stack(raw).to(device)


def _cache(extractor: Callable[[Tensor], Tensor], dataset: Items, options: HeadOptions) -> tuple[Tensor, Tensor] | None:
    """Features and compact targets of a whole set, in order, in RAM; None where they exceed the budget or vary."""
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
    return features, targets


def in_order(dataset: Items, options: Options, title: str) -> Iterator[tuple[Any, list[Tensor]]]:
    """Every item once, in order, in batches for one forward pass each."""
    keys = ordered_keys(len(dataset), options.batch)
    batches = loader(dataset, keys, options.workers)
    yield from shown(batches, title, len(keys), options.progress)


def shown(steps: Iterable[Step], title: str, total: int, progress: bool) -> Iterator[Step]:
    """The same steps behind a progress bar on stderr."""
    yield from track(steps, title, total=total, disable=not progress, transient=True, console=Console(stderr=True))


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


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """`build()` under its own seed; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


Loss = Callable[[Tensor, Tensor], Tensor]
Groups = Sequence[tuple[Sequence[nn.Parameter], float]]


def train_head(
    extractor: Callable[[Tensor], Tensor],
    head: nn.Module,
    loss: Loss,
    source: LabelledSource,
    options: HeadOptions,
    *,
    dataset: Items | None = None,
    groups: Groups | None = None,
    stage: str = "head",
) -> nn.Module:
    """`fit_head` on `training_batches`; with `options.resume`, from where the same command stopped.

    Args:
        stage: what the state of this training is called, among those of one evaluation.

    Raises:
        UserError: the head did not stay finite; a state of other settings.
        Interrupted: a signal came, and the state has been kept.
    """
    progress = Progress.of(options, stage, head, len(source))
    start = progress.step if progress else 0
    batches = training_batches(extractor, source, options, dataset, start)
    if start < options.steps:
        return fit_head(head, loss, batches, options, groups, progress)
    assert progress is not None
    progress.load(head, None, None)
    return head.eval()


class Progress:
    """The state of one head training in one file: written now and then, and when a signal asks to stop."""

    SECONDS = 60.0

    def __init__(self, path: Path, key: str, resume: bool) -> None:
        self.path, self.key, self.step = path, key, 0
        self.saved = time.monotonic()
        self._state: dict[str, Any] = {}
        if resume and path.is_file():
            try:
                self._state = read_state(path)
                self.step = int(self._state["step"])
            except Exception as error:  # whatever the unpickler makes of a damaged file
                raise UserError(f"{path}: no state to resume from ({type(error).__name__}); delete it") from None
            if self._state["key"] != key:
                raise UserError(
                    f"{path}: was stopped under other settings, data or weights; "
                    "give those again, or leave --resume out to start anew"
                )

    @classmethod
    def of(cls, options: HeadOptions, stage: str, head: nn.Module, items: int) -> Progress | None:
        if options.state is None:
            return None
        # What may differ from one part of a training to the next.
        free = ("progress", "state", "resume", "device", "workers", "cache_gb", "save_images")
        settings = {name: value for name, value in asdict(options).items() if name not in free}
        shapes = [tuple(value.shape) for value in head.state_dict().values()]
        return cls(options.state / f".{stage}.pt", repr((settings, shapes, items)), options.resume)

    def load(self, head: nn.Module, optimizer: torch.optim.Optimizer | None, schedule: Any) -> None:
        head.load_state_dict(self._state["head"])
        if optimizer is not None:
            optimizer.load_state_dict(self._state["optimizer"])
            schedule.load_state_dict(self._state["schedule"])

    def save(self, step: int, head: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        state = {"step": step, "key": self.key, "head": head.state_dict()}
        write_state(self.path, {**state, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})
        self.saved = time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self.saved > self.SECONDS


def fit_head(
    head: nn.Module,
    loss: Loss,
    batches: Iterable[tuple[Tensor, Tensor]],
    options: HeadOptions,
    groups: Groups | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Train `head` on `batches` with AdamW, linear warm-up and cosine decay; returned in eval mode.

    Args:
        loss: (head output, target) to a scalar.
        batches: (features, target), those that are left of `options.steps`, on the head's device.
        groups: parameters and their peak learning rates, each clipped by itself; by default all at `options.lr`.
        progress: where the training stands, and is kept.

    Raises:
        UserError: the head, or every group of it, did not stay finite.
        Interrupted: a signal came, and `progress` has been kept.
    """
    groups = [(list(head.parameters()), options.lr)] if groups is None else groups
    optimizer = torch.optim.AdamW(
        [{"params": list(part), "lr": lr} for part, lr in groups], weight_decay=options.weight_decay
    )
    warmup = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warmup)
            * (0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / max(1, options.steps - warmup)))
        ),
    )
    step = progress.step if progress else 0
    if progress and step:
        progress.load(head, optimizer, schedule)
    head.train()
    with _stops(progress) as stopping:
        for features, target in shown(batches, "head", options.steps - step, options.progress):
            optimizer.zero_grad(set_to_none=True)
            loss(head(features), target).backward()
            for part, _ in groups:
                nn.utils.clip_grad_norm_(part, options.clip)
            optimizer.step()
            schedule.step()
            step += 1
            if progress and (progress.due or stopping()):
                progress.save(step, head, optimizer, schedule)
                if stopping():
                    raise Interrupted(f"{progress.path} holds {step} of {options.steps} head steps; add --resume")
    # Once, at the end: a non-finite step stays in the weights, and a check at each step would wait for the
    # device.
    buffers = list(head.buffers())
    if not any(all(bool(value.isfinite().all()) for value in (*part, *buffers)) for part, _ in groups):
        lrs = ", ".join(f"{lr:g}" for _, lr in groups)
        raise UserError(f"the head's weights became infinite or NaN: lower the learning rate ({lrs})")
    if progress:
        progress.save(step, head, optimizer, schedule)
    return head.eval()


@contextmanager
def _stops(progress: Progress | None) -> Iterator[Callable[[], bool]]:
    """Whether a signal asked to stop; where nothing can be kept, signals do what they always do."""
    if progress is None:
        yield lambda: False
        return
    with stop_requests() as stopping:
        yield stopping


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time spent inside to `seconds[phase]`."""
    began = time.monotonic()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - began
