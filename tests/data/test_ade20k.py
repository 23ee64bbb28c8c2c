"""The ADE20K reader: label ids at their edges, and every way a tree can be wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_value.data.ade20k import ADE20K
from dino_value.errors import UserError


def annotate(root: Path, ids: np.ndarray) -> None:
    """Overwrite the first training annotation."""
    Image.fromarray(ids).save(root / "annotations/training/ADE_train_00000001.png")


def test_ids_become_labels(ade_root: Path) -> None:
    source = ADE20K(ade_root, "training")
    assert (len(source), source.kind, source.num_classes) == (4, "seg", 3)
    assert source.class_names == ["wall", "building, edifice", "sky"]
    for index, label in enumerate((255, 0, 1, 2)):
        image, labels = source.load(index)
        assert (image.shape, image.dtype) == ((3, 6, 8), torch.uint8)
        assert (labels.shape, labels.dtype) == ((6, 8), torch.int64)
        assert labels.unique().tolist() == [label]
    assert len(ADE20K(ade_root, "validation")) == 1


def test_groups(ade_root: Path) -> None:
    assert ADE20K(ade_root, "training").group(1) == "ADE_train_00000002"
    pairs = ADE20K(ade_root, "training", neighbours=2)
    assert [pairs.group(index) for index in range(4)] == ["0", "0", "1", "1"]
    parity = ADE20K(ade_root, "training", group_pattern=r"\d$")
    assert [parity.group(index) for index in range(4)] == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("pattern", "neighbours", "message"),
    [
        ("(", 1, "not a regular expression"),
        ("room", 1, "does not match"),
        ("a", 2, "either"),
        (None, 0, "either"),
    ],
)
def test_bad_groups(ade_root: Path, pattern: str | None, neighbours: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ADE20K(ade_root, "training", pattern, neighbours)


def test_id_above_the_classes(ade_root: Path) -> None:
    annotate(ade_root, np.full((6, 8), 4, np.uint8))
    with pytest.raises(UserError, match=r"ADE_train_00000001\.png: label id 4 is outside 0…3"):
        ADE20K(ade_root, "training").load(0)


def test_sizes_differ(ade_root: Path) -> None:
    annotate(ade_root, np.zeros((6, 7), np.uint8))
    with pytest.raises(UserError, match=r"ADE_train_00000001\.png: 7×6 pixels, but its image has 8×6"):
        ADE20K(ade_root, "training").load(0)


def test_annotation_missing(ade_root: Path) -> None:
    (ade_root / "annotations/training/ADE_train_00000003.png").unlink()
    with pytest.raises(UserError, match=r"ADE_train_00000003\.jpg: its annotation .* is missing"):
        ADE20K(ade_root, "training")


def test_image_missing(ade_root: Path) -> None:
    (ade_root / "images/training/ADE_train_00000003.jpg").unlink()
    with pytest.raises(UserError, match=r"ADE_train_00000003\.png: no image"):
        ADE20K(ade_root, "training")


def test_folder_missing(ade_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        ADE20K(tmp_path / "nowhere", "training")
    for path in (ade_root / "images/validation").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="validation: no images"):
        ADE20K(ade_root, "validation")


@pytest.mark.parametrize("lines", [None, 0, 256])
def test_class_list(ade_root: Path, lines: int | None) -> None:
    path = ade_root / "objectInfo150.txt"
    if lines is None:
        path.unlink()
    else:
        path.write_text("Idx\tRatio\tTrain\tVal\tName\n" + "1\t0\t0\t0\tthing\n" * lines)
    with pytest.raises(UserError, match=r"objectInfo150\.txt"):
        ADE20K(ade_root, "training")


def test_every_edge_id_of_the_full_class_list(ade_root: Path) -> None:
    rows = "".join(f"{index}\t0\t0\t0\tclass {index}\n" for index in range(1, 151))
    (ade_root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + rows)
    ids = np.zeros((6, 8), np.uint8)
    ids[0, :4] = [0, 1, 149, 150]
    annotate(ade_root, ids)
    source = ADE20K(ade_root, "training")
    assert (source.num_classes, source.class_names[0], source.class_names[149]) == (150, "class 1", "class 150")
    labels = source.load(0)[1]
    assert labels[0, :4].tolist() == [255, 0, 148, 149]
    assert (labels[1:] == 255).all()
    for wrong in (151, 255):
        ids[3, 3] = wrong
        annotate(ade_root, ids)
        with pytest.raises(UserError, match=rf"ADE_train_00000001\.png: label id {wrong} is outside 0…150"):
            ADE20K(ade_root, "training").load(0)
