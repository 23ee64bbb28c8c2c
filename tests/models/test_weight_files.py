"""Weights files say when they are damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dino_value.config import Config
from dino_value.errors import UserError
from dino_value.export.command import export
from dino_value.models.backbone import create_backbone, load_backbone, save_backbone
from dino_value.models.weight_files import CHECKSUM, checksum, is_whole, read_tensors, read_weights
from dino_value.training.trainer import train

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run folder with weights."""
    save_backbone(tmp_path / "backbone.safetensors", create_backbone("vit_tiny_patch16_224", 16, TINY), {"step": "7"})
    return tmp_path


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_every_flipped_bit_is_seen_or_harmless(saved: Path) -> None:
    path = saved / "backbone.safetensors"
    content, (tensors, header) = path.read_bytes(), read_weights(path)
    assert header is not None
    begin = 8 + int.from_bytes(content[:8], "little")  # of the tensors' bytes
    for place in [*range(0, begin, 11), *range(begin, len(content), 499)]:
        flip(path, place, place % 8)
        try:
            found, said = read_weights(path)
        except UserError:
            pass
        else:  # the name of the entry itself: then there is no checksum, and all else is as it was
            assert place < begin
            assert said is not None
            assert {**said, CHECKSUM: ""} == {**header, CHECKSUM: "", **{k: said[k] for k in said.keys() - header}}
            assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        path.write_bytes(content)


def test_a_flipped_bit_of_a_weight_is_said_by_all_that_load_it(
    saved: Path, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    path = saved / "backbone.safetensors"
    assert is_whole(path)
    flip(path, -2)
    assert not is_whole(path)
    assert not is_whole(saved / "absent.safetensors")
    for use in (
        lambda: load_backbone(saved),
        lambda: export(saved, "timm"),
        lambda: train(tiny(f"out={tmp_path / 'out'}", f"backbone.weights={path}"), quiet=True),
    ):
        with pytest.raises(UserError, match=r"backbone.safetensors: damaged, its checksum is wrong; if it is a run's"):
            use()


def test_files_of_others_have_no_checksum(tmp_path: Path) -> None:
    """Nor do our own of earlier versions; a checksum of another make means nothing to us."""
    path, tensors = tmp_path / "w.safetensors", {"a": torch.zeros(3)}
    for metadata in (None, {"format": "pt"}, {"checksum": "of mine"}):
        save_file(tensors, path, metadata=metadata)
        assert torch.equal(read_tensors(path)["a"], tensors["a"])


def test_a_checksum_is_of_names_types_shapes_numbers_and_header() -> None:
    w = torch.arange(6.0)
    alike = [({"a": w, "b": w}, {"x": "1", "y": "2"}), ({"b": w, "a": w}, {"y": "2", CHECKSUM: "?", "x": "1"})]
    other = [
        ({"a": w, "c": w}, {"x": "1", "y": "2"}),
        ({"a": w, "b": w.view(2, 3)}, {"x": "1", "y": "2"}),
        ({"a": w, "b": w.view(torch.int32)}, {"x": "1", "y": "2"}),
        ({"a": w, "b": w + 1}, {"x": "1", "y": "2"}),
        ({"a": w, "b": w}, {"x": "1", "y": "3"}),
    ]
    assert len({checksum(*each) for each in alike}) == 1
    assert len({checksum(*each) for each in (*alike, *other)}) == 1 + len(other)
    assert len(checksum({"": torch.tensor(1, dtype=torch.bfloat16), "none": torch.empty(0, 3)}, {})) == 8


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_exports_have_one_too(saved: Path, format: str) -> None:
    folder = export(saved, format).folder
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # transformers asks for it
    flip(folder / "model.safetensors", -2)
    with pytest.raises(UserError, match="its checksum is wrong"):
        read_tensors(folder / "model.safetensors")


def test_pickles_have_the_checksums_of_their_archive(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.full((100,), 2.0)}, path)
    flip(path, path.read_bytes().index(b"\x00\x00\x00@" * 50) + 100)
    with pytest.raises(UserError, match=r"damaged, the checksum of \S+ is wrong"):
        read_tensors(path)
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)  # as old files are: no archive
    assert torch.equal(read_tensors(path)["a"], torch.ones(1))
