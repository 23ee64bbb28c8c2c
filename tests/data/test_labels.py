"""Label maps that look as if other things were meant."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_value.data.ade20k import read_class_names
from dino_value.data.check import check_data
from dino_value.data.labels import header_remark, remark
from dino_value.data.layouts import open_labelled
from dino_value.errors import UserError

NAMES = ["wall", "floor", "door"]


def label_set(root: Path, *maps: object, header: str = "Idx\tName\n", names: list[str] = NAMES) -> Path:
    """A set in ADE20K's layout whose label maps are `maps`, in both splits."""
    for split in ("training", "validation"):
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        for index, ids in enumerate(maps):
            pixels = np.asarray(ids, np.uint8)
            Image.new("RGB", pixels.shape[::-1]).save(root / "images" / split / f"{index}.png")
            Image.fromarray(pixels).save(root / "annotations" / split / f"{index}.png")
    lines = "".join(f"{index}\t{name}\n" for index, name in enumerate(names, 1))
    (root / "objectInfo150.txt").write_text(header + lines)
    return root


def said_of(root: Path) -> list[str]:
    """By training and evaluation, which open a split; and it is what `data check` says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_labelled("ade20k", root, "training")
    found = [str(warning.message).removeprefix(f"{root}: ") for warning in caught]
    assert check_data(str(root), near=-1).parts[0].notes == found
    return found


def test_ids_that_begin_at_0(tmp_path: Path) -> None:
    assert said_of(label_set(tmp_path / "a", [[0, 1], [2, 0]], [[0, 1], [1, 1]])) == [
        "id 0 is ignored: 38% of pixels; id 1 = wall … id 3 = door; id 3 = door never occurs: if ids begin at 0, add 1 "
        "to them"
    ]


def test_a_class_that_never_occurs(tmp_path: Path) -> None:
    (said,) = said_of(label_set(tmp_path / "a", [[1, 3], [3, 1]]))
    assert said == "id 0 is ignored: 0% of pixels; id 1 = wall … id 3 = door; never there: floor"


def test_one_class_alone(tmp_path: Path) -> None:
    (said,) = said_of(label_set(tmp_path / "a", [[0, 1], [1, 1]], names=["target"]))
    assert said.startswith("id 0 is ignored: 25% of pixels; id 1 = target; no other class than target occurs")


def test_nothing_is_said_of_what_is_as_it_should_be(tmp_path: Path) -> None:
    assert said_of(label_set(tmp_path / "a", [[0, 1], [2, 3]])) == []
    assert remark({0: 9, 1: 3, 2: 1}, NAMES[:2], whole=True) is None
    # Of some files only: a class may be in the others.
    assert remark({0: 1, 1: 3, 3: 1}, NAMES, whole=False) is None
    assert remark({0: 1, 1: 3, 2: 1}, NAMES, whole=False) is not None


def test_a_class_list_without_a_header(tmp_path: Path) -> None:
    root = label_set(tmp_path / "a", [[1, 2], [2, 1]], header="")
    with pytest.warns(UserWarning, match=r"the first line, '1\\twall', is taken for a header; if it is a class"):
        assert read_class_names(root / "objectInfo150.txt") == ["floor", "door"]
    assert any("taken for a header" in note for note in check_data(str(root), near=-1).parts[0].notes)
    assert header_remark("Idx\tRatio\tTrain\tVal\tName") is None
    assert header_remark("background") is not None


def test_255_is_not_what_is_ignored(tmp_path: Path) -> None:
    source = open_labelled("ade20k", label_set(tmp_path / "a", [[1, 255], [2, 3]]), warn=False)
    with pytest.raises(UserError, match=r"label id 255 is outside 0…3.*what is ignored here is 0, not 255"):
        source.load(0)
