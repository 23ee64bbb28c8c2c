"""Weighted nearest neighbours on frozen features: DINO's classifier that has nothing to train.

`dino-value eval knn`, or `python eval/knn.py`. Protocol: images scaled to cover 224 px and cropped at the centre, class
tokens, cosine similarity, votes of the k = 10, 20, 100, 200 nearest training images weighted by exp(s / 0.07).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_value.data.labelled import LabelledSource
from dino_value.errors import UserError
from dino_value.eval import command, common, intervals
from dino_value.eval.linear import POOLS, CentreCropped
from dino_value.models.backbone import Backbone


@dataclass(frozen=True)
class KNNOptions(common.Options):
    """Defaults: DINO's protocol.

    Args:
        pool: as in the linear evaluation.
        ks: numbers of neighbours; those beyond the training images are left out. `top1` is that of 20, DINO's best
            whatever the model, or else of the first.
        temperature: of the votes.
        crop_share: as in the linear evaluation.
    """

    size: tuple[int, int] = (224, 224)
    batch: int = 256
    pool: str = "cls"
    ks: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    crop_share: float = 1.0


def evaluate(
    backbone: Backbone,
    train_source: LabelledSource,
    val_source: LabelledSource,
    options: KNNOptions = KNNOptions(),
) -> dict[str, float]:
    """Classify held-out images by their nearest training images.

    Returns:
        `top1`, and for each k `top1_k<k>` and `top5_k<k>`, in [0, 1].

    Raises:
        UserError: unfit data or settings.
    """
    return measure(backbone, (train_source, val_source), options).metrics


def measure(backbone: Backbone, data: command.Pair, options: KNNOptions) -> common.Result:
    """`evaluate`, with what intervals, results.json and pictures need."""
    common.check_inputs(backbone, data, "classes", options)
    if options.pool not in POOLS:
        raise UserError(f"pool={options.pool}: choose {', '.join(POOLS)}")
    if not options.temperature > 0:
        raise UserError(f"temperature={options.temperature}: must be positive")
    if not 0 < options.crop_share <= 1:
        raise UserError(f"crop_share={options.crop_share}: choose a share in (0, 1]")
    ks = [k for k in options.ks if 1 <= k <= len(data[0])]
    if not ks:
        raise UserError(f"ks={list(options.ks)}: choose among 1 … {len(data[0])} training images")
    training, validation = map(common.View, data)
    seconds: dict[str, float] = {}
    with common.frozen(backbone, POOLS[options.pool], options) as extractor:
        sets = [CentreCropped(source, options.size, options.crop_share) for source in (training, validation)]
        with common.timed(seconds, "fit"):
            train, labels = common.extract(extractor, sets[0], options, "training")
        with common.timed(seconds, "score"):
            queries, truth = common.extract(extractor, sets[1], options, "validation")
            found: dict[str, Tensor] = {}
            for k in ks:
                votes = knn_predict(train, labels, queries, k, options.temperature, training.num_classes)
                best = votes.topk(min(5, training.num_classes), dim=1).indices == truth[:, None]
                found[f"top1_k{k}"], found[f"top5_k{k}"] = best[:, 0], best.any(1)
            found = {"top1": found[f"top1_k{20 if 20 in ks else ks[0]}"], **found}
    values = torch.stack(list(found.values()), 1).double().cpu()
    return common.Result(
        dict(zip(found, values.mean(0).tolist(), strict=True)),
        intervals.mean_rows(values),
        intervals.means(*found),
        seconds,
        {"neighbours": {"used": ks, "left_out": [k for k in options.ks if k not in ks]}},
        _pictures(sets, F.normalize(train, dim=1), labels, queries, truth, options.save_images),
    )


@torch.no_grad()
def knn_predict(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    classes: int | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Votes of the k nearest training features, weighted by exp(cosine / temperature) (arXiv 2104.14294, section 4.1;
    arXiv 1805.01978, section 3.4).

    Args:
        train: features [n D]; they need not be normalised.
        labels: their classes, int64 [n].
        queries: features [q D].
        k: neighbours; DINO finds 20 best, whatever the model.
        temperature: of the weights.
        classes: how many there are; by default the labels' largest + 1.
        chunk: queries compared at a time, which bounds memory to [chunk n].

    Returns:
        Votes [q classes], summing to 1; argmax(1) is the prediction.

    Raises:
        ValueError: k outside 1 … n, or shapes that do not pair up.
    """
    if not 1 <= k <= len(train):
        raise ValueError(f"k={k} neighbours out of {len(train)} training features: choose k in 1 … {len(train)}")
    if len(labels) != len(train) or train.shape[1:] != queries.shape[1:]:
        shapes = ", ".join(str(tuple(part.shape)) for part in (train, labels, queries))
        raise ValueError(f"train [n D], labels [n] and queries [q D] do not pair up: got {shapes}")
    classes = int(labels.max()) + 1 if classes is None else classes
    train = F.normalize(train, dim=1)
    votes = []
    for part in F.normalize(queries, dim=1).split(chunk):
        nearness, nearest = (part @ train.T).topk(k, dim=1)
        weights = (nearness / temperature).softmax(1)  # exp(·) up to a factor of each query's own
        votes.append(weights.new_zeros(len(part), classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(votes) if votes else train.new_zeros(0, classes)


def _pictures(
    sets: Sequence[CentreCropped], train: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, count: int
) -> list[tuple[str, Any]]:
    """Each query and its five nearest, framed by whether they share its class."""
    if not count:
        return []
    from dino_value.eval import pictures

    nearest = (F.normalize(queries[:count], dim=1) @ train.T).topk(min(5, len(train)), dim=1).indices.cpu()
    drawn = []
    for query, row in enumerate(nearest.tolist()):
        panels = [pictures.framed(pictures.photograph(sets[1][query, common.FIXED][0]), None)]
        for index in row:
            image = pictures.photograph(sets[0][index, common.FIXED][0])
            panels.append(pictures.framed(image, bool(labels[index] == truth[query])))
        drawn.append((f"{query:04d}_query_nearest", pictures.beside(panels)))
    return drawn


def flags(parser: Any) -> None:
    defaults = EVALUATION.defaults
    parser.add_argument("--pool", default=defaults.pool, choices=list(POOLS), help="class token, mean patch, or both")
    parser.add_argument("--ks", default=defaults.ks, type=int, nargs="+", help="numbers of neighbours")
    parser.add_argument("--temperature", default=defaults.temperature, type=float, help="of the votes")
    parser.add_argument(
        "--crop-share", default=defaults.crop_share, type=float, help="of the scaled side; 0.875 is 224 of 256"
    )


EVALUATION = common.Evaluation(
    name="knn",
    description="Classification by the k nearest neighbours, nothing to train: top-1.",
    layout="imagefolder",
    defaults=KNNOptions(),
    open=command.open_pair("imagefolder"),
    measure=measure,
    describe=command.describe_pair,
    flags=flags,
    headline=("top1",),
)


def main(argv: Sequence[str]) -> int:
    """The command; see `--help`."""
    return command.run(EVALUATION, argv)


if __name__ == "__main__":
    common.script(main)
