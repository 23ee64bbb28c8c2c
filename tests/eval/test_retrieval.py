"""Retrieval against the published code's record, and against the definition written as loops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dino_value.data.labelled import LabelledTensors
from dino_value.errors import UserError
from dino_value.eval import retrieval
from dino_value.eval.retrieval import Relevance, class_gallery, rank, ranking_metrics, revisited_gallery
from dino_value.models.backbone import Backbone, create_backbone

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
OPTIONS = retrieval.RetrievalOptions(size=(32, 32), device="cpu")


def definition(ranking: list[int], relevant: set[int], junk: set[int]) -> list[float]:
    """AP and P@1,5,10 of one ranking, by walking down it."""
    clean = [item for item in ranking if item not in junk]
    area, found, last = 0.0, 0, 0
    for place, item in enumerate(clean, start=1):
        if item not in relevant:
            continue
        # Precision just before this image and just after it: the trapezoid above one step of recall.
        left = found / (place - 1) if place > 1 else 1.0
        found, last = found + 1, place
        area += (left + found / place) / 2 / len(relevant)
    precisions = []
    for k in (1, 5, 10):
        depth = min(k, last)
        precisions.append(sum(item in relevant for item in clean[:depth]) / depth)
    return [area, *precisions]


def masks(order: Tensor, sets: list[set[int]]) -> Tensor:
    """Membership bool [q n] of the ranked items."""
    return torch.tensor([[int(item) in members for item in row] for row, members in zip(order, sets, strict=True)])


def parse(text: str) -> set[int]:
    return {int(part) for part in str(text).split(",") if part}


def test_the_published_codes_numbers() -> None:
    with np.load(REFERENCE / "retrieval_map.npz") as reference:
        order = torch.from_numpy(reference["ranks"]).T
        relevant, junk = ([parse(text) for text in reference[key]] for key in ("ok", "junk"))
        found = ranking_metrics(masks(order, relevant), masks(order, junk)).numpy()
        np.testing.assert_allclose(found[:, 0], reference["aps"], atol=1e-6)
        assert np.nanmean(found[:, 0]) == pytest.approx(float(reference["map"]), abs=1e-6)
        np.testing.assert_allclose(np.nanmean(found[:, 1:], 0), reference["mean_precision_at_1_5_10"], atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_the_definition_on_random_rankings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 30))
    ranking = rng.permutation(count)
    kinds = rng.integers(0, 3, count)
    kinds[rng.integers(count)] = 1
    relevant, junk = ({int(i) for i in np.flatnonzero(kinds == kind)} for kind in (1, 2))
    order = torch.from_numpy(ranking)[None]
    found = ranking_metrics(masks(order, [relevant]), masks(order, [junk]))
    assert found[0].tolist() == pytest.approx(definition(ranking.tolist(), relevant, junk), abs=1e-12)


def test_nothing_to_find_is_no_value() -> None:
    none = torch.zeros(1, 4, dtype=torch.bool)
    assert ranking_metrics(none, none).isnan().all()


def test_junk_neither_helps_nor_hurts(generator: torch.Generator) -> None:
    relevant = torch.rand(6, 20, generator=generator) < 0.3
    relevant[:, 3] = True
    plain = ranking_metrics(relevant, torch.zeros_like(relevant))
    junk = torch.zeros(6, 26, dtype=torch.bool)
    places = torch.randperm(26, generator=generator)[:6]
    junk[:, places] = True
    padded = torch.zeros(6, 26, dtype=torch.bool)
    padded[:, ~junk[0]] = relevant
    torch.testing.assert_close(ranking_metrics(padded, junk), plain)
    torch.testing.assert_close(ranking_metrics(padded | junk, junk), plain)  # junk is never relevant


def test_chunks_change_nothing(generator: torch.Generator) -> None:
    database, queries = (torch.nn.functional.normalize(torch.randn(n, 5, generator=generator)) for n in (30, 11))
    wanted = torch.rand(11, 30, generator=generator) < 0.3

    def relevance(positions: Tensor) -> dict[str, Relevance]:
        return {"": Relevance(wanted[positions], ~wanted[positions] & (torch.arange(30) % 5 == 0))}

    assert torch.equal(rank(database, queries, relevance, 4)[""], rank(database, queries, relevance)[""])
    # And they are those of each query's own ranking.
    for query in range(11):
        ranking = (database @ queries[query]).argsort(descending=True).tolist()
        relevant, junk = ({int(i) for i in torch.nonzero(mask[0])} for mask in relevance(torch.tensor([query]))[""])
        assert rank(database, queries, relevance)[""][query].tolist() == pytest.approx(
            definition(ranking, relevant, junk)
        )


@dataclass
class Truth:
    """What open_revisited returns."""

    database: list[Path]
    queries: list[tuple[Path, tuple[float, float, float, float]]]
    ground_truth: list[dict[str, np.ndarray]]
    name: str = "truth"


def test_protocols_of_revisited_sets() -> None:
    truth = Truth(
        [Path(str(i)) for i in range(6)],
        [(Path("q"), (0, 0, 1, 1))],
        [{"easy": np.array([0, 1]), "hard": np.array([2]), "junk": np.array([3], dtype=np.int64)}],
    )
    found = revisited_gallery(truth).relevance(torch.tensor([0]), torch.zeros(6))
    listed = {name: tuple({int(i) for i in torch.nonzero(mask[0])} for mask in masks) for name, masks in found.items()}
    assert listed == {"easy": ({0, 1}, {2, 3}), "medium": ({0, 1, 2}, {3}), "hard": ({2}, {0, 1, 3})}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_backbone(
            "vit_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
        )


def test_queries_are_cut_to_their_boxes_and_find_their_likes(backbone: Backbone, tmp_path: Path) -> None:
    """Left halves of the queries are red or green, as the database images of two sizes are."""
    colours = [(200, 20, 20), (20, 200, 20)]
    for index in range(6):
        Image.new("RGB", (40, 24) if index % 3 else (24, 30), colours[index % 2]).save(tmp_path / f"{index}.png")
    for index, colour in enumerate(colours):
        query = Image.new("RGB", (80, 40), (0, 0, 255))
        query.paste(Image.new("RGB", (40, 40), colour), (0, 0))
        query.save(tmp_path / f"q{index}.png")
    empty = np.array([], dtype=np.int64)
    truth = Truth(
        [tmp_path / f"{index}.png" for index in range(6)],
        [(tmp_path / f"q{index}.png", (0.0, 0.0, 40.0, 40.0)) for index in range(2)],
        [{"easy": np.arange(index, 6, 2), "hard": empty, "junk": empty} for index in range(2)],
    )
    metrics = retrieval.evaluate(backbone, revisited_gallery(truth), OPTIONS)
    assert metrics["map_easy"] == metrics["map_medium"] == metrics["mp1_easy"] == 1
    assert np.isnan(metrics["map_hard"])
    box = truth.queries[0] = (tmp_path / "q0.png", (90.0, 0.0, 99.0, 9.0))
    with pytest.raises(UserError, match="lies outside the image"):
        retrieval.evaluate(backbone, revisited_gallery(truth), OPTIONS)
    assert box


@pytest.mark.parametrize("pool", retrieval.POOLS)
def test_images_of_one_class_find_each_other(backbone: Backbone, pool: str) -> None:
    shades = torch.tensor([[220, 30, 30], [30, 220, 30], [30, 30, 220]], dtype=torch.uint8)
    labels = torch.arange(3).repeat(4)
    images = shades[labels][:, :, None, None].expand(-1, -1, 40, 40).contiguous()
    gallery = class_gallery(LabelledTensors("classes", images, labels, ["a", "b", "c"]))
    found = retrieval.measure(backbone, gallery, replace(OPTIONS, pool=pool, save_images=2))
    assert found.metrics == pytest.approx({"map": 1, "mp1": 1, "mp5": 1, "mp10": 1})
    assert found.rows.shape[0] == 12
    assert len(found.pictures) == 2


def test_every_class_alone(backbone: Backbone) -> None:
    source = LabelledTensors("classes", torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(2), ["a", "b"])
    with pytest.raises(UserError, match="no query has anything to find"):
        retrieval.evaluate(backbone, class_gallery(source), OPTIONS)


@pytest.mark.parametrize(
    ("native", "size"),
    [((480, 640), (168, 224)), ((640, 480), (224, 168)), ((101, 90), (104, 88)), ((3, 500), (8, 224))],
)
def test_images_keep_their_aspect_and_are_never_enlarged(native: tuple[int, int], size: tuple[int, int]) -> None:
    assert retrieval.fitted_size(native, 224, 8) == size
