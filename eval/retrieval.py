"""Instance retrieval by frozen features: `dino-value eval retrieval`, or `python eval/retrieval.py`.

Protocol: revisited Oxford and Paris (Radenović et al. 2018, arXiv 1803.11285): queries cropped to their box, images
scaled down to at most `size` on the long side, mean-pooled patch tokens, ℓ2, cosine ranking; mAP and mP@k for Easy,
Medium and Hard with the official junk images. On an ImageFolder each held-out image asks for the others of its class,
or of its group (`--group-pattern`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_value.data.conventions import conventions
from dino_value.data.folders import read_image
from dino_value.data.labelled import LabelledSource, resize_image
from dino_value.errors import UserError
from dino_value.eval import command, common
from dino_value.models.backbone import Backbone, Features

SETS = ("roxford5k", "rparis6k")
CUTS = (1, 5, 10)
"""k of mP@k, as in the official evaluation."""


def _read_gem(features: Features, power: float = 3.0) -> Tensor:
    """Generalised mean of the patch tokens; p = 3 is where Radenović et al. (arXiv 1711.02512) start."""
    return features.patches.clamp(min=1e-6).pow(power).mean(1).pow(1 / power)


POOLS: dict[str, common.Reader] = {
    "mean": lambda features: features.patches.mean(1),
    "cls": lambda features: features.cls,
    "gem": _read_gem,
}


@dataclass(frozen=True)
class RetrievalOptions(common.Options):
    """Defaults: mean-pooled patches at 224 px.

    Args:
        size: the long side's limit is the larger of the two.
        pool: `mean` of the patch tokens, `cls`, or `gem`.
    """

    size: tuple[int, int] = (224, 224)
    pool: str = "mean"


class Relevance(NamedTuple):
    """What counts as found, bool [q n], and what counts neither for nor against."""

    relevant: Tensor
    junk: Tensor


class Images(Protocol):
    """Images uint8 [3 H W] and their classes (0 where there are none) by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Gallery:
    """What is searched and with what.

    Args:
        database: images that are ranked.
        queries: images to rank them by; None if each database image is one.
        relevance: positions of queries, int64 [q], and the database's classes, int64 [n], to the `Relevance` of each
            protocol, whose name ends those of its metrics.
        truth: where that is from, for results.json.
    """

    database: Images
    queries: Images | None
    relevance: Callable[[Tensor, Tensor], dict[str, Relevance]]
    truth: str = "class"


class Files:
    """Images from files, each cut to its box (left, top, right, bottom) if it has one."""

    def __init__(self, paths: Sequence[Path], boxes: Sequence[Sequence[float]] | None = None) -> None:
        self.paths, self.boxes, self.told = paths, boxes, conventions()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = read_image(self.paths[index], self.told), torch.tensor(0)
        if self.boxes is None:
            return image, label
        left, top, right, bottom = (round(float(edge)) for edge in self.boxes[index])
        cut = image[:, max(0, top) : bottom, max(0, left) : right]
        if not cut.numel():
            raise UserError(f"{self.paths[index]}: its box {tuple(self.boxes[index])} lies outside the image")
        return cut, label


class _OfSource:
    def __init__(self, source: LabelledSource) -> None:
        self.source = common.View(source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.source.load(index)


def class_gallery(source: LabelledSource, by_group: bool = False) -> Gallery:
    """Each image of a classified source asks for the others of its class; itself is junk.

    Args:
        by_group: it asks for the others of its group instead: views of one room, not rooms of one kind.

    Raises:
        UserError: labels of another kind.
    """
    if source.kind != "classes":
        raise UserError(f"retrieval needs labels of kind classes, the data has {source.kind}")

    if by_group:
        numbers: dict[str, int] = {}
        groups = torch.tensor([numbers.setdefault(source.group(i), len(numbers)) for i in range(len(source))])

    def relevance(queries: Tensor, labels: Tensor) -> dict[str, Relevance]:
        labels = groups if by_group else labels
        same = labels[queries][:, None] == labels
        itself = queries[:, None] == torch.arange(len(labels))
        return {"": Relevance(same & ~itself, itself)}

    return Gallery(_OfSource(source), None, relevance, "group" if by_group else "class")


def revisited_gallery(data: Any) -> Gallery:
    """The three protocols of `data.revisited.open_revisited`: what is neither sought nor wrong is junk.

    Easy seeks the easy images and passes over the hard ones, Medium seeks both, Hard seeks the hard ones and passes
    over the easy ones; junk images are passed over by all (Radenović et al. 2018, section 3.2).
    """
    count = len(data.database)

    def marked(queries: Tensor, *kinds: str) -> Tensor:
        mask = torch.zeros(len(queries), count, dtype=torch.bool)
        for row, query in enumerate(queries.tolist()):
            for kind in kinds:
                mask[row, torch.as_tensor(data.ground_truth[query][kind], dtype=torch.int64)] = True
        return mask

    def relevance(queries: Tensor, labels: Tensor) -> dict[str, Relevance]:
        return {
            "easy": Relevance(marked(queries, "easy"), marked(queries, "junk", "hard")),
            "medium": Relevance(marked(queries, "easy", "hard"), marked(queries, "junk")),
            "hard": Relevance(marked(queries, "hard"), marked(queries, "junk", "easy")),
        }

    paths, boxes = ([query[part] for query in data.queries] for part in (0, 1))
    return Gallery(Files(data.database), Files(paths, boxes), relevance, data.name)


def evaluate(backbone: Backbone, gallery: Gallery, options: RetrievalOptions = RetrievalOptions()) -> dict[str, float]:
    """Rank the database by cosine similarity to each query.

    Returns:
        `map`, `mp1`, `mp5`, `mp10` in [0, 1], for each protocol: `map_easy`, …

    Raises:
        UserError: unfit data or settings; no query with anything to find.
    """
    return measure(backbone, gallery, options).metrics


def measure(backbone: Backbone, data: Gallery, options: RetrievalOptions) -> common.Result:
    """`evaluate`, with what intervals (over queries), results.json and pictures need."""
    common.check_options(backbone, options)
    if options.pool not in POOLS:
        raise UserError(f"pool={options.pool}: choose {', '.join(POOLS)}")
    if not len(data.database) or (data.queries is not None and not len(data.queries)):
        raise UserError("there is nothing to search, or no query")
    seconds: dict[str, float] = {}
    with common.frozen(backbone, POOLS[options.pool], options) as extractor:
        with common.timed(seconds, "database"):
            database, labels = extract(extractor, data.database, options, "database")
        with common.timed(seconds, "queries"):
            queries = database if data.queries is None else extract(extractor, data.queries, options, "queries")[0]
        with common.timed(seconds, "ranking"):
            found = rank(database, queries, lambda positions: data.relevance(positions, labels))
    seconds["score"] = sum(seconds.values())
    # A query without anything to find counts in no mean, and so for each protocol by itself.
    values = torch.cat([*found.values()], 1)
    names = [f"{metric}{'_' if key else ''}{key}" for key in found for metric in ("map", *(f"mp{k}" for k in CUTS))]
    counted = values.isfinite()
    if not counted.any():
        raise UserError("no query has anything to find: every class has one image, or the ground truth is empty")
    rows = torch.cat([values.where(counted, 0), counted.double()], 1)

    def statistic(sums: Tensor) -> dict[str, Tensor]:
        totals, counts = sums.chunk(2, dim=1)
        return dict(zip(names, (totals / counts).unbind(1), strict=True))

    metrics = {name: float(value) for name, value in statistic(rows.sum(0)[None]).items()}
    pictures = _pictures(data, database, queries, labels, options)
    images = len(database) if data.queries is None else len(database) + len(queries)
    return common.Result(metrics, rows, statistic, seconds, {}, pictures, images, "queries")


class _Fitted:
    """Images scaled down to a long side of at most `longest`, and to sides that the patch divides."""

    def __init__(self, images: Images, longest: int, patch: int) -> None:
        self.images, self.longest, self.patch = images, longest, patch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
        image, label = self.images[key[0]]
        return [resize_image(image, fitted_size(image.shape[-2:], self.longest, self.patch))], label


def fitted_size(native: Sequence[int], longest: int, patch: int) -> tuple[int, int]:
    """(height, width) scaled down, never up, to a long side of at most `longest`; then to the nearest multiples."""
    scale = min(1.0, longest / max(native))
    height, width = (max(1, round(side * scale / patch)) * patch for side in native)
    return height, width


def extract(
    extractor: common.FrozenBackbone, images: Images, options: RetrievalOptions, title: str
) -> tuple[Tensor, Tensor]:
    """Features [n D] of unit length, on the device, and classes [n]; images of one shape share a forward pass."""
    dataset = _Fitted(images, max(options.size), extractor.backbone.patch_size)
    parts, labels = [], []
    for batch, classes in common.in_order(dataset, options, title):
        shapes: dict[tuple[int, ...], list[int]] = {}
        for index, (image,) in enumerate(batch):
            shapes.setdefault(tuple(image.shape), []).append(index)
        rows: dict[int, Tensor] = {}
        for indices in shapes.values():
            features = extractor(torch.stack([batch[index][0] for index in indices]))
            rows |= dict(zip(indices, features, strict=True))
        parts += [rows[index] for index in range(len(batch))]
        labels += classes
    return F.normalize(torch.stack(parts), dim=1), torch.stack(labels)


def rank(
    database: Tensor, queries: Tensor, relevance: Callable[[Tensor], dict[str, Relevance]], chunk: int = 256
) -> dict[str, Tensor]:
    """For each protocol float64 [q 1 + len(CUTS)]: AP and P@k of each query, NaN where it has nothing to find.

    Args:
        database, queries: unit features [n D], [q D].
        chunk: queries ranked at a time, which bounds memory to [chunk n].
    """
    found: dict[str, list[Tensor]] = {}
    for positions in torch.arange(len(queries)).split(chunk):
        order = (queries[positions.to(queries.device)] @ database.T).argsort(dim=1, descending=True, stable=True)
        for name, (relevant, junk) in relevance(positions).items():
            sought, passed = (mask.to(order.device).gather(1, order) for mask in (relevant, junk))
            found.setdefault(name, []).append(ranking_metrics(sought, passed).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def ranking_metrics(relevant: Tensor, junk: Tensor, cuts: Sequence[int] = CUTS) -> Tensor:
    """Average precision and precision at k of rankings, as revisited Oxford and Paris define them.

    Junk is taken out of the ranking. The area under the precision-recall curve is by trapezoids. P@k stops at the last
    relevant image where that comes before k.

    Args:
        relevant, junk: bool [q n], best first.

    Returns:
        float64 [q 1 + len(cuts)]; NaN for a query with nothing relevant.
    """
    relevant, kept = relevant & ~junk, ~junk
    before = kept.cumsum(1).double() - 1  # images ahead, 0 for the first
    hits = relevant.cumsum(1).double()
    total = hits[:, -1:]
    ahead = torch.where(before == 0, 1, (hits - 1) / before.clamp(min=1))
    area = torch.where(relevant, (ahead + hits / (before + 1)) / 2, 0).sum(1, keepdim=True) / total
    last = torch.where(relevant, before + 1, 0).amax(1, keepdim=True)
    columns = [area]
    for cut in cuts:
        depth = last.clamp(max=cut)
        columns.append((relevant & (before < depth)).sum(1, keepdim=True) / depth)
    return torch.where(total > 0, torch.cat(columns, 1), torch.nan)


def _pictures(
    data: Gallery, database: Tensor, queries: Tensor, labels: Tensor, options: RetrievalOptions
) -> list[tuple[str, Any]]:
    """Each query and the five best that are not junk, framed by the last protocol's relevance."""
    if not options.save_images:
        return []
    from dino_value.eval import pictures

    positions = torch.arange(min(options.save_images, len(queries)))
    key, (relevant, junk) = list(data.relevance(positions, labels).items())[-1]
    scores = (queries[: len(positions)] @ database.T).cpu().masked_fill(junk, -torch.inf)
    asked = data.database if data.queries is None else data.queries

    def small(image: Tensor, right: bool | None) -> Any:
        height, width = image.shape[-2:]
        scale = 128 / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        return pictures.framed(pictures.photograph(image, size), right)

    drawn = []
    for query, row in enumerate(scores.topk(min(5, scores.shape[1]), dim=1).indices.tolist()):
        panels = [small(asked[query][0], None), *(small(data.database[i][0], bool(relevant[query, i])) for i in row)]
        drawn.append((f"{query:04d}_query_best{'_' if key else ''}{key}", pictures.beside(panels)))
    return drawn


def open_gallery(arguments: Any) -> Gallery:
    """Revisited Oxford or Paris with `--set`, else the held-out images of an ImageFolder."""
    pattern = arguments.group_pattern
    if not arguments.set:
        source = command.open_split("imagefolder", arguments, "validation", pattern)
        return class_gallery(source, by_group=pattern is not None)
    if pattern is not None:
        raise UserError("group_pattern goes with an ImageFolder: the set has its own ground truth")
    from dino_value.data.revisited import open_revisited, readable_revisited

    if not arguments.skip_unreadable:
        return revisited_gallery(open_revisited(arguments.data, arguments.set))
    found, skipped = readable_revisited(open_revisited(arguments.data, arguments.set, check_files=False))
    command.count_skipped(arguments, arguments.set, skipped)
    return revisited_gallery(found)


def describe(data: Gallery) -> dict[str, Any]:
    queries = data.database if data.queries is None else data.queries
    return {"truth": data.truth, "database": len(data.database), "queries": len(queries)}


def flags(parser: Any) -> None:
    defaults = EVALUATION.defaults
    parser.add_argument("--set", choices=SETS, help="revisited Oxford or Paris, in --data; else it is an ImageFolder")
    parser.add_argument(
        "--group-pattern",
        metavar="REGEX",
        help="of an ImageFolder: ask for images whose file names agree in what this finds, not for those of the class",
    )
    parser.add_argument("--pool", default=defaults.pool, choices=list(POOLS), help="mean or GeM of patches, or cls")


EVALUATION = common.Evaluation(
    name="retrieval",
    description="Retrieval by frozen features, revisited Oxford and Paris or an ImageFolder: mAP.",
    layout="imagefolder",
    defaults=RetrievalOptions(),
    open=open_gallery,
    measure=measure,
    describe=describe,
    flags=flags,
    headline=("map", "map_easy", "map_medium", "map_hard"),
)


def main(argv: Sequence[str]) -> int:
    """The command; see `--help`."""
    return command.run(EVALUATION, argv)


if __name__ == "__main__":
    common.script(main)
