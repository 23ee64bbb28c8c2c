"""Classification on frozen features: `dino-value eval linear`, or `python eval/linear.py`.

Protocol: images scaled to cover 224 px and cropped at the centre, linear-BN head, AdamW, 20k steps of 256
images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dino_value.backbones import Backbone, Features
from dino_value.data.labelled import LabelledSource
from dino_value.errors import UserError
from dino_value.eval import common
from dino_value.heads import build_head, classification_loss

HEADS = {"linear": "classes_linear"}


def _read_cls(features: Features) -> Tensor:
    return features.cls


def _read_mean(features: Features) -> Tensor:
    return features.patches.mean(1)


POOLS: dict[str, common.Reader] = {"cls": _read_cls, "mean": _read_mean}


@dataclass(frozen=True)
class LinearOptions(common.HeadOptions):
    """Defaults: linear probing at ImageNet's scale.

    Args:
        pool: the vector that is classified: `cls`, the class token; `mean`, the mean of the patch tokens.
    """

    size: tuple[int, int] = (224, 224)
    head: str = "linear"
    batch: int = 256
    pool: str = "cls"


def evaluate(
    backbone: Backbone,
    train_source: LabelledSource,
    val_source: LabelledSource,
    options: LinearOptions = LinearOptions(),
) -> dict[str, float]:
    """Train a linear head on frozen features and score it on held-out images.

    Returns:
        `top1` in [0, 1] and `loss`, the held-out cross-entropy.

    Raises:
        UserError: unfit data or settings; a head that diverges.
    """
    common.check_inputs(backbone, (train_source, val_source), "classes", options)
    if options.batch < 2:
        raise UserError("batch=1: batch-norm on one vector has no statistics; use a batch of 2 or more")
    with common.frozen(backbone, POOLS[options.pool], options) as extractor:
        head = common.seeded(
            lambda: build_head(HEADS[options.head], backbone.embed_dim, train_source.num_classes),
            options.seed,
        )
        head.to(extractor.device)
        common.fit_head(head, classification_loss, common.training_batches(extractor, train_source, options), options)
        hits, loss = (torch.zeros((), dtype=torch.float64, device=extractor.device) for _ in range(2))
        with torch.no_grad():
            for features, targets in common.validation_batches(extractor, val_source, options):
                labels = torch.stack(targets).to(extractor.device)
                logits = head(features)
                hits += (logits.argmax(1) == labels).sum()
                loss += classification_loss(logits, labels).double() * len(labels)
    return {"top1": float(hits / len(val_source)), "loss": float(loss / len(val_source))}


def main(argv: Sequence[str]) -> int:
    """The command; see `--help`."""
    parser = common.build_parser("linear", "Linear classification on frozen features.", LinearOptions(), list(HEADS))
    parser.add_argument("--pool", default="cls", choices=list(POOLS), help="class token, or mean of the patch tokens")
    return common.run("linear", "imagefolder", evaluate, LinearOptions(), parser.parse_args(argv))


if __name__ == "__main__":
    common.script(main)
