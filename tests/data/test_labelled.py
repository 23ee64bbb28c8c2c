"""Resizing, flipping, cutting by group, and opening by layout."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dino_value.data.labelled import Kept, LabelledDataset, LabelledSource, LabelledTensors, split_by_group
from dino_value.data.layouts import Layout, open_labelled
from dino_value.errors import UserError


def depth_source(count: int = 4, height: int = 4, width: int = 6) -> LabelledTensors:
    """Image and depth both rise by one a column, so that any misalignment shows."""
    ramp = torch.arange(1, width + 1).expand(height, width)
    return LabelledTensors("depth", ramp.to(torch.uint8).expand(count, 3, -1, -1), ramp.float().expand(count, -1, -1))


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="do not pair up"):
        LabelledTensors("depth", torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4))


def test_resizing_keeps_image_and_target_aligned() -> None:
    image, depth = LabelledDataset(depth_source(), size=(8, 12))[0, 0]
    assert (image.shape, image.dtype, depth.shape) == ((3, 8, 12), torch.uint8, (8, 12))
    assert depth.unique().tolist() == [1, 2, 3, 4, 5, 6]  # nearest: no depth that was not there
    assert (image[0] - depth).abs().max() <= 0.5


def test_labels_are_never_blended() -> None:
    labels = torch.randint(0, 2, (1, 9, 9)) * 255
    source = LabelledTensors("seg", torch.zeros(1, 3, 9, 9, dtype=torch.uint8), labels, ["one"])
    _, resized = LabelledDataset(source, size=(5, 4))[0, 0]
    assert resized.dtype == torch.int64
    assert set(resized.unique().tolist()) <= {0, 255}


def test_what_is_kept_is_read_once_and_stays_the_same() -> None:
    labels = torch.randint(0, 3, (2, 4, 4))
    labels[0, 0] = 255
    for source in (depth_source(), LabelledTensors("seg", torch.zeros(2, 3, 4, 4, dtype=torch.uint8), labels, "abc")):
        kept, asked = Kept(source), list[int]()
        load = source.load
        source.load = lambda index, load=load, asked=asked: (asked.append(index), load(index))[1]  # type: ignore[method-assign]
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(kept.load(1), load(1), strict=True))
            assert kept.load(1)[1].dtype == load(1)[1].dtype
        assert asked == [1]
        assert (len(kept), kept.name(1), kept.group(1)) == (len(source), source.name(1), source.group(1))


def test_targets_may_stay_as_they_are() -> None:
    image, depth = LabelledDataset(depth_source(), size=(8, 8), resize_targets=False)[0, 0]
    assert (image.shape, depth.shape) == ((3, 8, 8), (4, 6))


def test_classes_are_cropped_at_the_centre() -> None:
    images = torch.zeros(1, 3, 4, 8, dtype=torch.uint8)
    images[..., 2:6] = 200
    image, label = LabelledDataset(LabelledTensors("classes", images, torch.tensor([1]), "ab"), size=(4, 4))[0, 0]
    assert (image == 200).all()
    assert label == 1


def test_flip_is_a_fair_coin_of_index_and_seed() -> None:
    data = LabelledDataset(depth_source(), size=(4, 6), flip=True)
    flips = torch.tensor([[data[i, seed][1][0, 0] == 6 for seed in range(200)] for i in range(4)])
    assert flips.float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert (flips[0] != flips[1]).any()
    for seed in range(5):
        image, depth = data[0, seed]
        assert torch.equal(image[0].float(), depth)
        assert torch.equal(data[0, seed][1], depth)


def test_flip_follows_the_item_not_its_place() -> None:
    data = LabelledDataset(depth_source(), size=(4, 6), flip=True)
    part = LabelledDataset(depth_source(), [2], size=(4, 6), flip=True)
    assert all(torch.equal(data[2, seed][1], part[0, seed][1]) for seed in range(20))


def test_batch() -> None:
    images, depth = LabelledDataset(depth_source(), [3, 1], size=(2, 2)).batch([0, 1], seed=5)
    assert (images.shape, depth.shape) == ((2, 3, 2, 2), (2, 2, 2))


def grouped(groups: list[int]) -> LabelledTensors:
    count = len(groups)
    images, depth = torch.zeros(count, 3, 1, 1, dtype=torch.uint8), torch.ones(count, 1, 1)
    return LabelledTensors("depth", images, depth, groups=[str(group) for group in groups])


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=30),
    st.lists(st.integers(0, 8), min_size=1, max_size=3),
    st.integers(0, 3),
)
def test_no_group_on_two_sides(groups: list[int], counts: list[int], seed: int) -> None:
    source = grouped(groups)
    try:
        parts = split_by_group(source, counts, seed)
    except UserError:
        return
    assert [len(part) for part in parts] == counts
    assert all(len(set(part)) == len(part) for part in parts)
    sides = [{source.group(index) for index in part} for part in parts]
    assert sum(map(len, sides)) == len(set().union(*sides))
    assert parts == split_by_group(source, counts, seed)


def test_too_few_groups() -> None:
    source = grouped([0, 0, 0, 1, 1, 1])
    assert [len(part) for part in split_by_group(source, (3, 3))] == [3, 3]
    with pytest.raises(UserError, match=r"cannot cut 2 \+ 2 \+ 1 .* out of 6 in 2 groups"):
        split_by_group(source, (2, 2, 1))


def test_split_depends_on_the_seed() -> None:
    source = grouped(list(range(20)))
    assert split_by_group(source, (10, 10), 0) != split_by_group(source, (10, 10), 1)


@pytest.mark.parametrize("layout", get_args(Layout))
def test_scenes_open_as_every_layout(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def labelled(layout: str, split: str) -> LabelledSource:
        asked.append((layout, split))
        return depth_source()

    monkeypatch.setattr("dino_value.data.scenes.labelled", labelled)
    assert len(open_labelled(layout, "scenes", "validation")) == 4
    assert asked == [(layout, "validation")]


def test_open_by_layout(ade_root: Path, nyu_root: Path) -> None:
    ade = open_labelled("ade20k", ade_root, neighbours=4)
    assert (ade.kind, ade.group(3)) == ("seg", "0")
    assert open_labelled("nyuv2", str(nyu_root), "validation").kind == "depth"
    with pytest.raises(UserError, match="unknown labelled layout 'coco'"):
        open_labelled("coco", ade_root)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown split 'test'"):
        open_labelled("ade20k", ade_root, "test")  # type: ignore[arg-type]
