"""`dino-value data check`: what it finds, and what it says of it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import get_args

import h5py
import numpy as np
import pytest
from PIL import Image, ImageFilter

from dino_value import cli
from dino_value.data.check import CheckLayout, Part, Shared, check_data, other_place, perceptual_hash, recognise
from dino_value.data.folders import read_image
from dino_value.errors import UserError


def scene(seed: int, side: int = 64) -> Image.Image:
    """A picture with structure at low frequencies, as photographs have."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """train/ and val/ of two classes, three images each; of the held-out ones one is a copy, one is smaller."""
    for split, first in (("train", 0), ("val", 10)):
        for offset, name in enumerate(("cat", "dog")):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                scene(first + 3 * offset + index).save(folder / f"{index}.png")
    root = tmp_path / "set"
    shutil.copy(root / "train/cat/0.png", root / "val/cat/0.png")
    scene(4).resize((48, 48)).save(root / "val/dog/1.jpg", quality=60)
    (root / "val/dog/1.png").unlink()
    return root


def parts(root: Path, **options: object) -> dict[str, Part]:
    return {part.name: part for part in check_data(str(root), near=-1, **options).parts}  # type: ignore[arg-type]


def test_copies_and_near_duplicates(folders: Path) -> None:
    pytest.importorskip("imagehash")
    report = check_data(str(folders))
    assert (report.layout, report.usable) == ("imagefolder", True)
    assert [(part.name, part.images, part.classes) for part in report.parts] == [
        ("training", 6, 2),
        ("validation", 6, 2),
    ]
    copy, near = report.shared
    assert copy == Shared(
        "training", "validation", "copy", 1, [(f"{folders}/train/cat/0.png", f"{folders}/val/cat/0.png")]
    )
    assert (near.kind, near.images) == ("near-duplicate", 1)
    assert near.examples == [(f"{folders}/train/dog/1.png", f"{folders}/val/dog/1.jpg")]
    assert [pair.kind for pair in check_data(str(folders), near=-1).shared] == ["copy"]


def test_the_unlabeled_stream_is_compared_with_what_is_held_out(folders: Path, tmp_path: Path) -> None:
    stream = tmp_path / "stream"
    stream.mkdir()
    scene(20).save(stream / "new.png")
    shutil.copy(folders / "val/dog/2.png", stream / "leak.png")
    report = check_data(str(folders), unlabeled=str(stream), near=-1)
    leaks = [pair for pair in report.shared if pair.left == "unlabeled"]
    assert leaks == [Shared("unlabeled", "validation", "copy", 1, [(f"{stream}/leak.png", f"{folders}/val/dog/2.png")])]


def test_hashes_survive_scaling_and_compression(tmp_path: Path) -> None:
    pytest.importorskip("imagehash")
    look = perceptual_hash()
    image = scene(0, 128).filter(ImageFilter.GaussianBlur(1))
    image.save(tmp_path / "a.png")
    image.resize((64, 64)).save(tmp_path / "b.jpg", quality=60)
    scene(1, 128).save(tmp_path / "c.png")
    a, b, c = (look(read_image(tmp_path / name)) for name in ("a.png", "b.jpg", "c.png"))
    assert a.unique().tolist() == [-1, 1]
    assert (a != b).sum() <= 4 < 16 < (a != c).sum()


def test_segmentation(ade_root: Path) -> None:
    found = parts(ade_root)
    training = found["training"]
    assert (training.images, training.groups, training.classes, training.smallest) == (4, 4, 3, "8×6")
    assert training.class_share == {"wall": 0.333333, "building, edifice": 0.333333, "sky": 0.333333}
    assert found["validation"].class_share == {"wall": 0, "building, edifice": 0, "sky": 0}


def test_depth(nyu_root: Path) -> None:
    training = parts(nyu_root)["training"]
    assert training.depth == {"min": 1.1, "median": pytest.approx(3.7, abs=0.5), "max": 6.4, "unknown": 0.1}
    assert training.notes == []


def test_what_cannot_be_used_is_listed_and_the_exit_code_says_so(
    ade_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (ade_root / "images/training/ADE_train_00000002.jpg").write_bytes(b"damaged")
    (ade_root / "annotations/validation/ADE_val_00000001.png").unlink()
    path = tmp_path / "found.json"
    assert cli.main(["data", "check", str(ade_root), "--near", "-1", "--json", str(path)]) == 2
    printed = capsys.readouterr()
    assert "training: " in printed.out
    assert "ADE_train_00000002.jpg: cannot be read as an image" in printed.out
    assert "validation: " in printed.out
    assert printed.err == ""
    found = json.loads(path.read_text())
    training, validation = found["parts"]
    assert (training["images"], len(training["unreadable"])) == (4, 1)
    assert "annotation" in validation["error"]


def test_a_good_set_ends_in_0(nyu_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(nyu_root), "--near", "-1"]) == 0
    assert "depth, metres" in capsys.readouterr().out


def test_the_command_offers_every_layout() -> None:
    assert get_args(CheckLayout) == cli.CHECK_LAYOUTS


def test_layouts_are_recognised(ade_root: Path, nyu_root: Path, folders: Path, tmp_path: Path) -> None:
    assert [recognise(str(path)) for path in (ade_root, nyu_root, folders, folders / "train")] == [
        "ade20k",
        "nyuv2",
        "imagefolder",
        "images",
    ]
    (tmp_path / "sets/roxford5k").mkdir(parents=True)
    (tmp_path / "sets/roxford5k/gnd_roxford5k.pkl").write_bytes(b"")
    assert recognise(str(tmp_path / "sets")) == "revisited"
    assert [part.error is None for part in parts(tmp_path / "sets").values()] == [False]
    with pytest.raises(UserError, match="no such folder"):
        recognise(str(tmp_path / "nowhere"))


def test_sets_inside_a_folder_of_images_are_named(folders: Path) -> None:
    report = check_data(str(folders.parent), near=-1)
    assert report.layout == "images"
    assert report.notes == [f"{folders} is a labelled set (imagefolder), read here as images: check it by itself"]
    assert check_data(str(folders / "train"), near=-1).notes == []


def test_a_set_without_a_depth_or_a_label_is_not_usable(ade_root: Path, nyu_root: Path) -> None:
    for split, fill in (("training", 0), ("validation", 1)):
        for path in (ade_root / "annotations" / split).iterdir():
            Image.fromarray(np.full((6, 8), fill, np.uint8)).save(path)
    assert parts(ade_root)["training"].error == "not one pixel is labelled: all are 0 (other)"
    assert parts(ade_root)["validation"].error is None
    with h5py.File(nyu_root / "nyu_depth_v2_labeled.mat", "r+") as file:
        file["depths"][...] = file["depths"][...] * 1000
    report = check_data(str(nyu_root), near=-1)
    assert not report.usable
    assert report.parts[0].error == "not one pixel has a known depth"
    assert "probably millimetres" in report.parts[0].notes[0]


def test_a_root_of_another_kind_is_said(ade_root: Path, folders: Path) -> None:
    assert other_place(str(ade_root), "nyuv2") == " (this is the layout ade20k)"
    assert other_place(str(folders.parent), "imagefolder") == f" (did you mean {folders}?)"
    assert other_place(str(folders.parent), "nyuv2") == ""
    assert other_place(str(folders), "imagefolder") == ""
    assert other_place("nowhere", "ade20k") == ""


def test_without_imagehash_the_extra_is_named(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagehash", None)
    report = check_data(str(folders))
    assert "dino-value[data]" in report.notes[0]
    assert [pair.kind for pair in report.shared] == ["copy"]
    with pytest.raises(UserError, match=r"dino-value\[data\]"):
        check_data(str(folders), near=2)
