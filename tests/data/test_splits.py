"""Splits by seed, apart from the evaluation, as a run keeps them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dino_value.data.labelled import LabelledTensors, split_by_group
from dino_value.data.layouts import open_labelled
from dino_value.data.splits import content_hashes, split_apart, split_record
from dino_value.errors import UserError


def source(values: list[int], groups: list[str] | None = None) -> LabelledTensors:
    images = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    return LabelledTensors("classes", images, torch.zeros(len(values)), ["one"], groups)


def test_hashes_follow_content_not_names() -> None:
    assert content_hashes(source([1, 2, 1])) == content_hashes(source([1, 2, 1]))
    first, second, third = content_hashes(source([1, 2, 1]))
    assert first == third != second
    assert content_hashes(source([1, 2]), [1]) == [second]
    assert content_hashes(source([1]), []) == []


def test_without_overlap_the_split_is_the_plain_one() -> None:
    training = source(list(range(20)))
    parts, excluded = split_apart(training, (8, 4), 3, source([100, 101]))
    assert parts == split_by_group(training, (8, 4), 3)
    assert excluded == []


def test_images_of_the_evaluation_are_left_out() -> None:
    training, evaluation = source(list(range(20))), source([3, 7, 200])
    parts, excluded = split_apart(training, (12, 6), 0, evaluation)
    assert [len(part) for part in parts] == [12, 6]
    assert excluded == [3, 7]  # all the others were needed
    assert not {3, 7} & {index for part in parts for index in part}
    with pytest.raises(UserError, match=r"cannot cut 12 \+ 7"):
        split_apart(training, (12, 7), 0, evaluation)


def test_a_copied_file_under_another_name(ade_root: Path) -> None:
    for part, end in (("images", "jpg"), ("annotations", "png")):
        copy = ade_root / part / "validation" / f"other.{end}"
        shutil.copy(ade_root / part / "training" / f"ADE_train_00000002.{end}", copy)
    training, validation = (open_labelled("ade20k", ade_root, split) for split in ("training", "validation"))  # type: ignore[arg-type]
    parts, excluded = split_apart(training, (2,), 0, validation)
    # Both conftest's single validation image and the first training one are black squares.
    assert 1 not in parts[0]
    assert len(excluded) <= 2


def test_exclusion_keeps_the_order_of_the_rest() -> None:
    training = source(list(range(10)))
    whole = split_by_group(training, (10,), 1)[0]
    assert split_by_group(training, (8,), 1, exclude={2, 5})[0] == [i for i in whole if i not in (2, 5)]


def test_record() -> None:
    training = source(list(range(6)))
    record = split_record(training, {"train": [4, 1], "meta": [2], "held": []}, seed=5, excluded=[3])
    assert json.loads(json.dumps(record)) == {
        "seed": 5,
        "train": ["sample 4", "sample 1"],
        "meta": ["sample 2"],
        "held": [],
        "in_evaluation": ["sample 3"],
    }
