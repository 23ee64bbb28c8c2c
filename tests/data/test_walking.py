"""Link loops: each folder once, whatever the links; and the same paths at every call."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from dino_value.data import unlabeled_files
from dino_value.data.check import check_data
from dino_value.data.folders import class_folders, list_images
from dino_value.data.tars import find_shards
from dino_value.data.walking import files_below


@pytest.fixture
def looped(tmp_path: Path) -> Path:
    """Two images; one link to the root, one to the folder above it, one from a sub-folder back up, one to a folder
    elsewhere, and that folder twice."""
    root, other = tmp_path / "above" / "root", tmp_path / "other"
    (root / "inner").mkdir(parents=True)
    other.mkdir()
    for path in (root / "a.png", root / "inner" / "b.png", other / "c.png"):
        Image.new("RGB", (9, 9)).save(path)
    for name, target in {"self": ".", "up": "..", "inner/back": "..", "z": other, "elsewhere": other}.items():
        (root / name).symlink_to(target)
    return root


def test_each_folder_is_listed_once(looped: Path) -> None:
    names = [path.relative_to(looped).as_posix() for path in list_images(looped)]
    assert names == ["a.png", "elsewhere/c.png", "inner/b.png"]
    assert unlabeled_files(looped) == list_images(looped)


def test_shards_too(looped: Path) -> None:
    for path in looped.rglob("*.png"):
        path.unlink()
    for folder in (looped, looped / "inner"):
        with tarfile.open(folder / "s.tar", "w") as file:
            file.addfile(tarfile.TarInfo("0.jpg"), io.BytesIO())
    assert find_shards(looped) == [str(looped / "inner" / "s.tar"), str(looped / "s.tar")]


def test_many_links_to_the_root_end(tmp_path: Path) -> None:
    """Two of them, and a walk that follows both doubles with every level until names are too long."""
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    for name in ("l1", "l2", "l3"):
        (tmp_path / name).symlink_to(".")
    assert list(files_below(tmp_path)) == [str(tmp_path / "0.png")]
    (part,) = check_data(str(tmp_path), "images", near=-1).parts
    assert part.images == 1


def test_a_link_is_no_class_of_its_own(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    (tmp_path / "all").symlink_to(".")
    (tmp_path / "bird").symlink_to("dog")
    (tmp_path / "elsewhere").symlink_to(os.path.dirname(__file__))
    assert class_folders(tmp_path) == ["cat", "dog", "elsewhere"]
