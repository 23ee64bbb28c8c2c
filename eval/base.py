"""What every evaluation has: settings, a result, an entry in the registry, and sources checked as they are read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_value.data.labelled import IGNORE, Kind, LabelledSource, class_of, few_labels
from dino_value.errors import UserError
from dino_value.eval.output import format_size
from dino_value.models.backbone import Backbone


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
        bf16: run the backbone in bfloat16; None: on CUDA, not on a CPU.
        save_images: draw the predictions of the first so many images.
        progress: show a progress bar.
    """

    size: tuple[int, int]
    blocks: int = 1
    batch: int = 32
    seed: int = 0
    device: str = "auto"
    workers: int = 0
    bf16: bool | None = None
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
        labels: train on so many of the training items, a choice by `seed` (`few_labels`); None: on all.
        finetune: train a copy of the backbone with the head, as `FineTuned` says.
        finetune_lr: the backbone's peak learning rate; 1e-4 is what mmsegmentation fine-tunes MAE's ViT-B with on
            ADE20K (AdamW, weight decay 0.05; it lets the rate fall from block to block, here all have the same).
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
    labels: int | None = None
    finetune: bool = False
    finetune_lr: float = 1e-4
    cache_gb: float = 4.0
    state: Path | None = None
    resume: bool = False
    origin: str = ""


AnyOptions = TypeVar("AnyOptions", bound=Options)

NOT_SETTINGS = ("progress", "state", "resume", "origin")
"""Options that change no number, and are not recorded."""


@dataclass
class Result:
    """What an evaluation found.

    Args:
        metrics: by name; a slash in it makes a mapping of its own in results.json.
        rows: float64 [n F], what each held-out image contributes to sums.
        statistic: sums of rows, float64 [R F], to metrics, each [R]; intervals resample its argument.
        seconds: of each phase.
        about: what else results.json should say.
        images: how many were put through the backbone to score; by default as many as rows.
        unit: what a row stands for.
        pictures: (file name, uint8 [H W 3]) of the first images.
    """

    metrics: dict[str, float]
    rows: Tensor
    statistic: Callable[[Tensor], dict[str, Tensor]]
    seconds: dict[str, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    pictures: list[tuple[str, NDArray[np.uint8]]] = field(default_factory=list)
    images: int | None = None
    unit: str = "images"


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
    describe: Callable[[Any], dict[str, Any]]
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


def use_bfloat16(choice: bool | None, device: torch.device) -> bool:
    """Whether the backbone runs in bfloat16: as `Options.bf16` says, or on CUDA."""
    return device.type == "cuda" if choice is None else choice


def check_options(backbone: Backbone, options: Options) -> None:
    """Refuse settings that cannot work, before anything is computed.

    Raises:
        UserError: a value out of range, or an image size that the patch does not divide.
    """
    for key in ("steps", "batch", "lr", "finetune_lr"):
        if not 0 < getattr(options, key, 1) < math.inf:
            raise UserError(f"{key}={getattr(options, key)} must be positive")
    for key in ("workers", "save_images", "seed", "weight_decay"):
        if not getattr(options, key, 0) >= 0:
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

    def label(self, index: int) -> int:
        return class_of(self.source, self.indices[index])

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


def labelled(source: LabelledSource, options: HeadOptions) -> View:
    """What a head is trained on: the source's items, or `options.labels` of them.

    Raises:
        UserError: there are not so many.
    """
    return View(source, None if options.labels is None else few_labels(source, options.labels, options.seed))


def names_of(source: View, options: HeadOptions) -> dict[str, Any]:
    """For results.json: which items `options.labels` chose; nothing where it is all of them."""
    return {} if options.labels is None else {"labelled": [source.name(index) for index in range(len(source))]}


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time spent inside to `seconds[phase]`."""
    began = time.monotonic()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - began
