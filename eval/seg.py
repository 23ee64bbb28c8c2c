"""Semantic segmentation on frozen patch features: `dino-value eval seg`, or `python eval/seg.py`.

Protocol: images at 512 px, linear-BN head, AdamW, 20k steps of 8 images; whole-image inference, scored at
each label map's own resolution; mean IoU over the classes that the labels or the predictions contain, as
mmsegmentation reports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from dino_value.backbones import Backbone, Features
from dino_value.data.labelled import LabelledSource
from dino_value.eval import common
from dino_value.heads import IGNORE, build_head, feature_map, segmentation_loss

HEADS = {"linear": "seg_linear", "conv": "seg_conv"}


@dataclass(frozen=True)
class SegOptions(common.HeadOptions):
    """Defaults: the ADE20K protocol."""

    size: tuple[int, int] = (512, 512)
    head: str = "linear"
    lr: float = 5e-4


def read_map(features: Features) -> Tensor:
    """What dense heads see: patch tokens as a map [B D h w]."""
    return feature_map(features.patches, features.grid)


def evaluate(
    backbone: Backbone,
    train_source: LabelledSource,
    val_source: LabelledSource,
    options: SegOptions = SegOptions(),
) -> dict[str, float]:
    """Train a head on frozen features and score it on held-out label maps.

    Returns:
        `miou`, `macc`, `aacc` in [0, 1], `loss` (held-out cross-entropy, mean over pixels), and
        `iou/<class>`.

    Raises:
        UserError: unfit data or settings; a head that diverges.
    """
    common.check_inputs(backbone, (train_source, val_source), "seg", options)
    classes = train_source.num_classes
    with common.frozen(backbone, read_map, options) as extractor:
        head = common.seeded(lambda: build_head(HEADS[options.head], backbone.embed_dim, classes), options.seed)
        head.to(extractor.device)
        common.fit_head(head, segmentation_loss, common.training_batches(extractor, train_source, options), options)
        confusion = torch.zeros(classes, classes, dtype=torch.int64, device=extractor.device)
        loss, pixels = (torch.zeros((), dtype=torch.float64, device=extractor.device) for _ in range(2))
        with torch.no_grad():
            for features, targets in common.validation_batches(extractor, val_source, options):
                for coarse, truth in common.same_size_runs(head(features), targets):
                    # Logits of all classes at full resolution are what fills the memory: a few images at a time.
                    for logits, labels in zip(coarse.split(options.batch), truth.split(options.batch), strict=True):
                        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
                        valid = (labels != IGNORE).sum()
                        loss += segmentation_loss(logits, labels).double() * valid
                        pixels += valid
                        confusion += confusion_matrix(logits.argmax(1), labels, classes)
    scores = scores_of(confusion, train_source.class_names)
    return {**scores, "loss": float(loss / pixels)}


def confusion_matrix(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Pixel counts int64 [C C], rows the truth, columns the prediction; ignored pixels left out."""
    return multiclass_confusion_matrix(
        prediction, labels, num_classes=classes, ignore_index=IGNORE, validate_args=False
    )


def scores_of(confusion: Tensor, class_names: Sequence[str]) -> dict[str, float]:
    """The metrics of a confusion matrix [C C].

    A class in neither labels nor predictions has no IoU (NaN) and does not enter `miou`; one that is
    predicted but never true has IoU 0 and does. `macc` averages over the classes that are true somewhere.
    """
    confusion = confusion.double().cpu()
    hit, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    iou, accuracy = hit / (true + predicted - hit), hit / true
    return {
        "miou": float(iou.nanmean()),
        "macc": float(accuracy.nanmean()),
        "aacc": float(hit.sum() / confusion.sum()),
        **{f"iou/{name}": float(value) for name, value in zip(class_names, iou, strict=True)},
    }


def main(argv: Sequence[str]) -> int:
    """The command; see `--help`."""
    parser = common.build_parser("seg", "Segmentation on frozen features.", SegOptions(), list(HEADS))
    return common.run("seg", "ade20k", evaluate, SegOptions(), parser.parse_args(argv))


if __name__ == "__main__":
    common.script(main)
