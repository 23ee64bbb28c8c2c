"""WebDataset shards, against the package that defines them."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_value.config import ViewsConfig
from dino_value.data import open_views, unlabeled_files
from dino_value.data.check import check_data
from dino_value.data.folders import read_image
from dino_value.data.sampling import Stream
from dino_value.data.tars import TarMember, find_shards, is_shards, list_members
from dino_value.errors import UserError

webdataset = pytest.importorskip("webdataset")

SETTINGS = ViewsConfig(global_size=16, local_size=8, local_count=2)


def encoded(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of two samples with an image, a mask and a record each, as webdataset writes them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/train-%04d.tar", maxcount=2, verbose=0) as writer:
        for index in range(6):
            sample = {"png": encoded(index), "mask.png": encoded(100 + index), "json": {"index": index}}
            writer.write({"__key__": f"part/{index:03d}", **sample})
    return folder


def test_the_images_are_those_webdataset_gives(shards: Path) -> None:
    theirs = webdataset.WebDataset(sorted(map(str, shards.glob("*.tar"))), shardshuffle=False).decode("rgb8")
    ours = list_members(shards)
    samples = list(theirs)
    assert len(ours) == len(samples) == 6
    for member, sample in zip(ours, samples, strict=True):
        assert member.member == f"{sample['__key__']}.png"
        assert torch.equal(read_image(member), torch.from_numpy(sample["png"].copy()).permute(2, 0, 1))


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/train-{0000..0002}.tar", "/train-000[0-2].tar"])
def test_folders_and_patterns(shards: Path, pattern: str) -> None:
    path = f"{shards}{pattern}"
    assert is_shards(path)
    assert [Path(shard).name for shard in find_shards(path)] == [f"train-000{index}.tar" for index in range(3)]
    assert len(unlabeled_files(path)) == 6
    assert len(find_shards(f"{shards}/train-0001.tar")) == 1


def test_images_win_over_shards(shards: Path) -> None:
    Image.new("RGB", (4, 4)).save(shards / "a.png")
    assert unlabeled_files(shards) == [shards / "a.png"]


def test_of_several_images_the_first_format_is_taken(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "a", "png": encoded(0), "jpg": encoded(1)})
    assert [member.name for member in list_members(tmp_path)] == ["a.jpg"]


def test_batches_do_not_depend_on_workers_or_the_start(shards: Path) -> None:
    def batches(workers: int, start: int) -> list[tuple[torch.Tensor, ...]]:
        return list(Stream(open_views(str(shards), SETTINGS), 2, 0, "unlabeled", workers).iterate(start, 5))

    alone, ahead = batches(0, 0), batches(2, 2)
    assert len(alone) == 5
    for left, right in zip(alone[2:], ahead, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_shards_train_as_the_same_files_in_a_folder(shards: Path, tmp_path: Path) -> None:
    for index in range(6):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{index}.png").write_bytes(encoded(index))
    for in_memory in (False, True):
        left, right = (open_views(str(path), SETTINGS, in_memory) for path in (shards, tmp_path / "folder"))
        batches = zip(left.batch([4, 1], 7), right.batch([4, 1], 7), strict=True)
        assert all(torch.equal(a, b) for a, b in batches)


def test_a_shard_that_is_cut_off(shards: Path) -> None:
    shard = shards / "train-0001.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"train-0001\.tar: not a complete, uncompressed tar file") as raised:
        list_members(shards)
    assert "\n" not in str(raised.value)


def test_a_member_that_is_no_image(shards: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as file:
        info = tarfile.TarInfo("b.png")
        info.size = 4
        file.addfile(info, io.BytesIO(b"text"))
    with pytest.raises(UserError, match=r"bad\.tar/b\.png: cannot be read as an image"):
        read_image(list_members(tmp_path / "bad.tar")[0])
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(TarMember(str(tmp_path / "gone.tar"), "b.png", 0, 4))


def test_bad_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shards"):
        find_shards(tmp_path / "*.tar")
    with pytest.raises(UserError, match="only local shards"):
        find_shards("https://example.org/a-{000..010}.tar")
    with pytest.raises(UserError, match=r"none\.tar: not a complete"):
        list_members(tmp_path / "none.tar")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    (tmp_path / "a.tar.gz").rename(tmp_path / "a.tar")
    with pytest.raises(UserError, match="not a complete, uncompressed"):
        list_members(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(UserError, match="no images in 1 shards"):
        list_members(tmp_path)


def test_without_the_package_the_extra_is_named(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(UserError, match=r"dino-value\[webdataset\]"):
        unlabeled_files(shards)


def write_shard(path: Path, names: list[str], mode: str = "w") -> None:
    """Every member of an image's field is the noise of the number in its key."""
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name in names:
            content = b"{}" if name.endswith(("txt", "json")) else encoded(int(name.split(".")[0]))
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def test_a_refusal_names_the_fields(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [f"{k}.{field}" for k in range(3) for field in ("photo.PNG", "note.txt")])
    with pytest.raises(
        UserError, match=r"fields there: photo\.png \(3\), note\.txt \(3\)\); data\.field=NAME"
    ) as raised:
        list_members(tmp_path)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"looked for cover; fields there: photo\.png"):
        list_members(tmp_path, "cover")


@pytest.mark.parametrize("field", ["photo.png", "Photo.PNG", " .photo.png", "cover; photo.png"])
def test_the_field_is_chosen(tmp_path: Path, field: str) -> None:
    write_shard(tmp_path / "a.tar", [f"{k}.{part}" for k in range(3) for part in ("photo.PNG", "note.txt", "jpg")])
    members = list_members(tmp_path, field)
    assert [member.member for member in members] == [f"{k}.photo.PNG" for k in range(3)]
    assert torch.equal(read_image(members[2]), read_image(TarMember(*_place(tmp_path / "a.tar", "2.photo.PNG"))))
    views = open_views(str(tmp_path), SETTINGS, field=field)
    assert len(views) == 3


def _place(shard: Path, name: str) -> tuple[str, str, int, int]:
    with tarfile.open(shard) as file:
        info = file.getmember(name)
        return str(shard), name, info.offset_data, info.size


def test_of_several_fields_the_first_a_sample_has(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", ["0.img", "1.img", "1.png", "2.txt"])
    with pytest.warns(
        UserWarning, match=r"1 of 3 samples have none of png, img and are not read \(fields there: img \(2\)"
    ):
        members = list_members(tmp_path, "png;img")
    assert [member.member for member in members] == ["0.img", "1.png"]


def test_samples_that_are_not_read_are_counted(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [f"{k}.{'png' if k < 2 else 'side.png'}" for k in range(7)])
    with pytest.warns(UserWarning, match="5 of 7 samples have none of jpg, jpeg,") as said:
        assert len(list_members(tmp_path)) == 2
    assert "side.png (5)" in str(said[0].message)
    (part,) = check_data(str(tmp_path), "images", near=-1).parts
    assert part.images == 2
    assert "5 of 7 samples" in part.notes[0]
    (part,) = check_data(str(tmp_path), "images", near=-1, field="png;side.png").parts
    assert (part.images, part.notes) == (7, [])


@pytest.mark.filterwarnings("error")
def test_whole_shards_are_read_without_a_word(shards: Path) -> None:
    assert len(list_members(shards)) == 6


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz", "s.tar.zst", "s.tar.xz"])
def test_compressed_shards_are_refused_by_name(tmp_path: Path, name: str) -> None:
    write_shard(tmp_path / name, ["0.png"], "w:gz")
    for path in (tmp_path, tmp_path / name, tmp_path / f"*{name[1:]}", tmp_path / f"s{{0..0}}{name[1:]}"):
        if "{" in str(path):
            write_shard(tmp_path / f"s0{name[1:]}", ["0.png"], "w:gz")
        assert is_shards(path)
        with pytest.raises(UserError, match=rf"s0?\.{name[2:]}: [12] compressed shards?; .* unpack them to \.tar"):
            unlabeled_files(path)
    write_shard(tmp_path / "whole.tar", ["0.png"])
    with pytest.raises(UserError, match="compressed shard"):  # not a part of the set without a word
        unlabeled_files(tmp_path)
    for packed in ("s", "s0"):  # unpacked beside it
        write_shard(tmp_path / f"{packed}.tar", ["0.png"])
    assert len(unlabeled_files(tmp_path)) == 3
