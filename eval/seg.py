"""Semantic segmentation on patch features, frozen or fine-tuned: `dino-value eval seg`, or `python eval/seg.py`.

Protocol: images scaled to a short side of 512 px; random crops of 512 px to train a linear-BN head with AdamW, 20k
steps of 8; sliding windows of 512 px, two thirds apart, to test; scored at each label map's own resolution; mean IoU
over the classes that the labels or the predictions contain, as mmsegmentation reports it. `--inference whole` stretches
images to the size instead, in training too.

`--backend mmseg` has mmsegmentation do all of this on the same backbone (mmseg_backend.py, docs/mmseg.md).
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_value.data.labelled import LabelledDataset, LabelledSource, resize_image, resize_target
from dino_value.errors import UserError
from dino_value.eval import command, common, windows
from dino_value.heads import IGNORE, build_head, feature_map, segmentation_loss
from dino_value.models.backbone import Backbone, Features

HEADS = {"linear": "seg_linear", "conv": "seg_conv"}
BACKENDS = {"own": tuple(HEADS), "mmseg": ("linear", "upernet")}
"""The heads of each backend; mmseg's are files of configs/mmseg."""


@dataclass(frozen=True)
class SegOptions(common.HeadOptions):
    """Defaults: the ADE20K protocol.

    Args:
        backend: `own`, or `mmseg`: mmsegmentation's Runner, with the extra [mmseg].
        inference: `slide`, windows over an image of its own aspect; `whole`, the image stretched to `size`.
        stride: pixels from window to window; 0 is two thirds of the window, as mmsegmentation's 341 of 512.
        flip: average with the mirrored image's prediction.
        scales: average over images scaled by these; DINOv2's multi-scale test takes .5 … 1.75.
        random_scale: smallest and largest factor of the training images' size, before the crop.
    """

    size: tuple[int, int] = (512, 512)
    lr: float = 5e-4
    backend: str = "own"
    inference: str = "slide"
    stride: int = 0
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    random_scale: tuple[float, float] = (1.0, 1.0)


def read_map(features: Features) -> Tensor:
    """What dense heads see: patch tokens as a map [B D h w]."""
    return feature_map(features.patches, features.grid)


def evaluate(
    backbone: Backbone,
    train_source: LabelledSource,
    val_source: LabelledSource,
    options: SegOptions = SegOptions(),
) -> dict[str, float]:
    """Train a head, alone or with a copy of the backbone, and score it on held-out label maps.

    Returns:
        `miou`, `macc`, `aacc` in [0, 1], `loss` (held-out cross-entropy, mean over pixels), and
        `iou/<class>`.

    Raises:
        UserError: unfit data or settings; a head that diverges.
    """
    return measure(backbone, (train_source, val_source), options).metrics


def measure(backbone: Backbone, data: command.Pair, options: SegOptions) -> common.Result:
    """`evaluate`, with what intervals, results.json and pictures need."""
    common.check_inputs(backbone, data, "seg", options)
    check_settings(options)
    training, validation = common.labelled(data[0], options), common.View(data[1])
    if options.backend == "mmseg":
        from dino_value.eval import mmseg_backend

        result = mmseg_backend.measure(backbone, (training, validation), options)
        result.about |= common.names_of(training, options)
        return result
    seconds: dict[str, float] = {}
    with common.frozen(backbone, read_map, options) as extractor:
        with common.timed(seconds, "fit"):
            reader, head = fit(extractor, training, options)
        with common.timed(seconds, "score"):
            result = score(reader, head, validation, options)
    result.seconds, result.about = seconds, common.names_of(training, options)
    return result


def check_settings(options: SegOptions) -> None:
    """Raises UserError for a setting out of range."""
    if options.backend not in BACKENDS:
        raise UserError(f"backend={options.backend}: choose {' or '.join(BACKENDS)}")
    if options.head not in BACKENDS[options.backend]:
        heads = "; ".join(f"--backend {name} has {' and '.join(known)}" for name, known in BACKENDS.items())
        raise UserError(f"head={options.head} with --backend {options.backend}: {heads}")
    if options.finetune and options.backend == "mmseg":
        raise UserError("finetune: --backend mmseg trains a head alone; --backend own trains the backbone with it")
    if options.inference not in ("slide", "whole"):
        raise UserError(f"inference={options.inference}: choose slide or whole")
    if not 0 <= options.stride <= min(options.size):
        raise UserError(f"stride={options.stride}: choose 0 (two thirds of the window) … {min(options.size)}")
    if not options.scales or not all(0 < scale < math.inf for scale in options.scales):
        raise UserError(f"scales={options.scales}: must be positive, one or more")
    if not 0 < options.random_scale[0] <= options.random_scale[1]:
        raise UserError(f"random_scale={options.random_scale}: give the smallest and the largest factor")


def fit(
    extractor: common.FrozenBackbone, source: LabelledSource, options: SegOptions
) -> tuple[common.FrozenBackbone, nn.Module]:
    """A reader of images and a head trained on `source`, in eval mode, on the extractor's device."""
    dim = extractor.backbone.embed_dim * options.blocks
    head = common.seeded(lambda: build_head(HEADS[options.head], dim, source.num_classes), options.seed)
    head.to(extractor.device)
    dataset = Crops(source, options) if options.inference == "slide" else None
    return common.fit(extractor, head, segmentation_loss, source, options, dataset=dataset)


# --- images at the sizes that the backbone sees


def cover_size(native: Sequence[int], size: tuple[int, int], factor: float = 1.0) -> tuple[int, int]:
    """(height, width) of an image scaled, its aspect kept, to just cover `size`, times `factor`."""
    scale = max(size[0] / native[0], size[1] / native[1]) * factor
    height, width = (max(1, round(side * scale)) for side in native)
    # Rounding must not leave it a pixel short.
    return (max(size[0], height), max(size[1], width)) if factor >= 1 else (height, width)


class Crops:
    """Training crops of `options.size`: images scaled to cover it, mirrored at random if augmented."""

    def __init__(self, source: LabelledSource, options: SegOptions) -> None:
        self.source, self.options = source, options
        self.scaled = tuple(options.random_scale) != (1.0, 1.0)
        self.whole = LabelledDataset(source, size=options.size)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Image uint8 [3 h w] and labels int64 [h w]: a function of key = (position, seed)."""
        position, seed = key
        image, labels = self.source.load(position)
        size = self.options.size
        fits = cover_size(image.shape[-2:], size) == size and not self.scaled
        if fits and not self.options.augment:
            return resize_image(image, size), resize_target(labels, size)
        if seed == common.FIXED:
            raise common.Varies
        draw = np.random.default_rng([seed, position])
        scaled = cover_size(image.shape[-2:], size, draw.uniform(*self.options.random_scale))
        image, labels = resize_image(image, scaled), resize_target(labels, scaled)
        missing = [max(0, side - have) for side, have in zip(size, scaled, strict=True)]
        if any(missing):
            pad = (0, missing[1], 0, missing[0])
            image, labels = F.pad(image, pad), F.pad(labels, pad, value=IGNORE)
        top, left = (draw.integers(have - side + 1) for have, side in zip(labels.shape, size, strict=True))
        image, labels = (part[..., top : top + size[0], left : left + size[1]] for part in (image, labels))
        if self.options.augment and draw.random() < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        return image.contiguous(), labels.contiguous()


class Scaled:
    """Held-out images at every scale of the options, as a list, with labels uint8 at their own resolution."""

    def __init__(self, source: LabelledSource, options: SegOptions, patch: int) -> None:
        self.source, self.options, self.patch = source, options, patch

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
        image, labels = self.source.load(key[0])
        images = [resize_image(image, self.size_at(image.shape[-2:], scale)) for scale in self.options.scales]
        return images, common.compact(labels)

    def size_at(self, native: Sequence[int], scale: float) -> tuple[int, int]:
        """The size at a scale; a side that one window spans is brought to a multiple of the patch."""
        size, patch = self.options.size, self.patch
        found = cover_size(native, size, scale)
        if self.options.inference == "whole":
            found = (round(size[0] * scale), round(size[1] * scale))
        spans = [have < side or self.options.inference == "whole" for have, side in zip(found, size, strict=True)]
        height, width = (
            max(1, round(side / patch)) * patch if span else side for side, span in zip(found, spans, strict=True)
        )
        return height, width

    def grid(self, image: Tensor) -> windows.Grid:
        """The windows of a scaled image."""
        size = (image.shape[-2], image.shape[-1])
        if self.options.inference == "whole":
            return windows.Grid.over(size, size, size)
        stride = self.options.stride
        strides = [stride or max(1, round(side * 2 / 3)) for side in self.options.size]
        return windows.Grid.over(size, self.options.size, (strides[0], strides[1]))


# --- scoring


@dataclass
class _Pass:
    """One image at one scale, mirrored or not: its windows, and the head's logits for them."""

    grid: windows.Grid
    mirrored: bool
    coarse: list[Tensor]

    def strips(self, size: tuple[int, int]) -> Iterator[Tensor]:
        """Logits [rows W C] at `size`, top to bottom."""
        for strip in windows.strips(self.coarse, self.grid, size):
            yield strip.flip(1) if self.mirrored else strip


def score(
    extractor: common.FrozenBackbone, head: nn.Module, source: LabelledSource, options: SegOptions
) -> common.Result:
    """The metrics of a trained head (`evaluate` names them); windows of several images share a forward pass.

    Raises:
        UserError: not one labelled pixel.
    """
    classes = source.num_classes
    tally = _Tally(classes, options, extractor.device)
    dataset = Scaled(source, options, extractor.backbone.patch_size)
    with torch.no_grad():
        for images, targets in common.in_order(dataset, options, "validation"):
            passes = predict(extractor, head, dataset, images, options)
            simple = all(_is_simple(row, labels, classes) for row, labels in zip(passes, targets, strict=True))
            alike = len({row[0].coarse[0].shape for row in passes}) == 1
            if simple and alike:
                tally.together(torch.stack([row[0].coarse[0] for row in passes]), targets)
            else:
                for row, labels in zip(passes, targets, strict=True):
                    tally.in_strips(row, labels.to(extractor.device))
            tally.draw([row[0] for row in images], targets)
    return tally.result(source.class_names)


def predict(
    extractor: common.FrozenBackbone, head: nn.Module, dataset: Scaled, images: Any, options: SegOptions
) -> list[list[_Pass]]:
    """For each image its passes: scale by scale, plain and (with `flip`) mirrored."""
    passes, cut = [], []
    for scaled in images:
        row = []
        for image in scaled:
            grid = dataset.grid(image)
            for mirrored in (False, True) if options.flip else (False,):
                row.append(_Pass(grid, mirrored, []))
                cut += [(row[-1], window) for window in grid.cut(image.flip(-1) if mirrored else image)]
        passes.append(row)
    most = common.forward_batch(options.batch)
    for run in _same_shape(cut, most):
        logits = head(extractor(torch.stack([window for _, window in run])))
        for (owner, _), found in zip(run, logits, strict=True):
            owner.coarse.append(found)
    return passes


def _same_shape(cut: list[tuple[_Pass, Tensor]], most: int) -> Iterator[list[tuple[_Pass, Tensor]]]:
    """At most `most` windows of one shape at a time; each pass's stay in their order."""
    shapes: dict[tuple[int, ...], list[tuple[_Pass, Tensor]]] = {}
    for item in cut:
        shapes.setdefault(tuple(item[1].shape), []).append(item)
    for alike in shapes.values():
        for start in range(0, len(alike), most):
            yield alike[start : start + most]


def _is_simple(row: list[_Pass], labels: Tensor, classes: int) -> bool:
    """One window, and small enough to be brought to full resolution at once."""
    if len(row) > 1 or len(row[0].grid) > 1:
        return False
    return 4 * classes * labels.numel() <= windows.strip_bytes(row[0].coarse[0].device)


class _Tally:
    """Counts on the device: each image's confusion matrix, as its hits, true and predicted pixels; and the loss."""

    def __init__(self, classes: int, options: SegOptions, device: torch.device) -> None:
        self.classes, self.options, self.device = classes, options, device
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self.loss, self.pixels = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        self.rows: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.pictures: list[tuple[str, Any]] = []

    def together(self, coarse: Tensor, targets: Sequence[Tensor]) -> None:
        """Logits [B C h w] of whole images."""
        most = self.options.batch
        for run, truth in common.same_size_runs(coarse, targets):
            # Logits of all classes at full resolution are what fills the memory: a few images at a time.
            for logits, labels in zip(run.split(most), truth.long().split(most), strict=True):
                logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
                valid = (labels != IGNORE).sum()
                self.loss += segmentation_loss(logits, labels).double() * valid
                self.pixels += valid
                prediction = logits.max(1).indices  # on a CPU twice as fast as argmax
                self.count(confusion_matrices(prediction, labels, self.classes))
                self.keep(prediction)

    def in_strips(self, row: list[_Pass], labels: Tensor) -> None:
        """One image, a strip of rows at a time; several passes are averaged as probabilities."""
        confusion = torch.zeros(1, self.classes, self.classes, dtype=torch.int64, device=self.device)
        prediction, top = [], 0
        for strips in zip(*(one.strips((labels.shape[0], labels.shape[1])) for one in row), strict=True):
            logits = strips[0] if len(row) == 1 else torch.stack([s.softmax(2) for s in strips]).mean(0).log()
            truth = labels[None, top : top + len(logits)].long()
            self.loss += F.cross_entropy(
                logits.flatten(0, 1), truth.flatten(), ignore_index=IGNORE, reduction="sum"
            ).double()
            self.pixels += (truth != IGNORE).sum()
            prediction.append(logits.max(2).indices[None].to(torch.uint8 if self.classes <= 256 else torch.int32))
            confusion += confusion_matrices(prediction[-1].long(), truth, self.classes)
            top += len(logits)
        self.count(confusion)
        self.keep(torch.cat(prediction, 1))

    def count(self, confusion: Tensor) -> None:
        self.confusion += confusion.sum(0)
        hit, true, predicted = confusion.diagonal(dim1=1, dim2=2), confusion.sum(2), confusion.sum(1)
        self.rows.append(torch.cat([hit, true, predicted], 1))

    def keep(self, prediction: Tensor) -> None:
        wanted = self.options.save_images - len(self.pictures) - len(self.kept)
        if wanted > 0:
            self.kept += list(prediction[:wanted].cpu())

    def draw(self, images: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Image, truth and prediction of those that were kept."""
        if not self.kept:
            return
        from dino_value.eval import pictures

        for image, truth, prediction in zip(images, targets, self.kept, strict=False):
            size = (truth.shape[0], truth.shape[1])
            maps = [pictures.colour_labels(part, self.classes) for part in (truth, prediction)]
            name = f"{len(self.pictures):04d}_image_truth_prediction"
            self.pictures.append((name, pictures.beside([pictures.photograph(image, size), *maps])))
        self.kept = []

    def result(self, class_names: Sequence[str]) -> common.Result:
        if not self.pixels:
            raise UserError("the validation split has no labelled pixel: every one is to be ignored")
        metrics = {**scores_of(self.confusion, class_names), "loss": float(self.loss / self.pixels)}
        return common.Result(metrics, torch.cat(self.rows).double().cpu(), statistic, pictures=self.pictures)


def confusion_matrices(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Pixel counts int64 [B C C] of each image, rows the truth, columns the prediction; ignored pixels left out.

    Args:
        prediction, labels: int64 [B H W]; ids below `classes`, or IGNORE in the labels.
    """
    valid = labels != IGNORE
    cell = torch.where(valid, labels * classes + prediction, classes * classes).flatten(1)  # ignored: one cell more
    counts = torch.zeros(len(labels), classes * classes + 1, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(1, cell, torch.ones_like(cell))
    return counts[:, :-1].unflatten(1, (classes, classes))


def confusion_matrix(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
    """`confusion_matrices` of all images together [C C]."""
    return confusion_matrices(prediction, labels, classes).sum(0)


def statistic(sums: Tensor) -> dict[str, Tensor]:
    """The metrics of summed hits, true and predicted pixels, float64 [R 3C]."""
    hit, true, predicted = sums.chunk(3, dim=1)
    return {
        "miou": (hit / (true + predicted - hit)).nanmean(1),
        "macc": (hit / true).nanmean(1),
        "aacc": hit.sum(1) / true.sum(1),
    }


def scores_of(confusion: Tensor, class_names: Sequence[str]) -> dict[str, float]:
    """The metrics of a confusion matrix [C C].

    A class in neither labels nor predictions has no IoU (NaN) and does not enter `miou`; one that is
    predicted but never true has IoU 0 and does. `macc` averages over the classes that are true somewhere.
    """
    confusion = confusion.double().cpu()
    hit, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    found = statistic(torch.cat([hit, true, predicted])[None])
    iou = hit / (true + predicted - hit)
    return {
        **{name: float(value) for name, value in found.items()},
        **{f"iou/{name}": float(value) for name, value in zip(told_apart(class_names), iou, strict=True)},
    }


def told_apart(names: Sequence[str]) -> list[str]:
    """Names with their place behind those that occur twice: two classes of one name are two classes."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({index})" for index, name in enumerate(names)]


def flags(parser: Any) -> None:
    defaults, switch = EVALUATION.defaults, argparse.BooleanOptionalAction
    heads = list(dict.fromkeys(head for known in BACKENDS.values() for head in known))
    parser.add_argument(
        "--head",
        default=defaults.head,
        choices=heads,
        help="linear batch-norm; conv: own backend only; upernet: mmseg only",
    )
    parser.add_argument(
        "--backend", default=defaults.backend, choices=list(BACKENDS), help="who trains and scores; see docs/mmseg.md"
    )
    parser.add_argument(
        "--inference", default=defaults.inference, choices=["slide", "whole"], help="windows, or stretch"
    )
    parser.add_argument("--stride", default=defaults.stride, type=int, help="of the windows; 0: two thirds of one")
    parser.add_argument("--flip", default=False, action=switch, help="average with the mirrored image's prediction")
    parser.add_argument("--scales", default=defaults.scales, type=float, nargs="+", help="average over these scales")
    parser.add_argument(
        "--random-scale", default=defaults.random_scale, type=float, nargs=2, help="of training images: least, most"
    )


EVALUATION = common.Evaluation(
    name="seg",
    description="Segmentation by a light head on patch features, frozen or fine-tuned: mean IoU.",
    layout="ade20k",
    defaults=SegOptions(),
    open=command.open_pair("ade20k"),
    measure=measure,
    describe=command.describe_pair,
    flags=flags,
    headline=("miou", "macc", "aacc"),
)


def main(argv: Sequence[str]) -> int:
    """The command; see `--help`."""
    return command.run(EVALUATION, argv)


if __name__ == "__main__":
    common.script(main)
