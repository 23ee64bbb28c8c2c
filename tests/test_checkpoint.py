"""One tree of state in one file, complete or absent."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dino_value.backbones import create_backbone, save_backbone
from dino_value.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from dino_value.errors import UserError


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: writes fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = {"teacher": {"w": torch.randn(3)}, "step": 4, "nested": {"count": {"a": 1}, "list": [1.5, None]}}
    path = save_checkpoint(tmp_path, 4, state, keep=2)
    for source in (path, tmp_path):
        if source == tmp_path:
            (tmp_path / "checkpoints").mkdir()
            os.replace(path, tmp_path / "checkpoints" / path.name)
        loaded = load_checkpoint(source)
        assert torch.equal(loaded["teacher"]["w"], state["teacher"]["w"])  # type: ignore[index]
        assert loaded["nested"] == state["nested"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (5, 10, 999, 100_000, 20_000_000):
        save_checkpoint(tmp_path, step, {"teacher": {}}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00100000.pt", "step_20000000.pt"]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step_20000000.pt"


def test_a_folder_that_cannot_exist_has_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert latest_checkpoint(tmp_path / "file" / "checkpoints") is None


def test_a_full_disk_leaves_the_older_checkpoint_whole(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"teacher": {"w": torch.zeros(10)}}, keep=1)
    with small_disk(50_000), pytest.raises(OSError) as caught:  # noqa: PT011
        save_checkpoint(tmp_path, 2, {"teacher": {"w": torch.zeros(100_000)}}, keep=1)
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.pt"]
    assert load_checkpoint(tmp_path / "step_00000001.pt")["teacher"]["w"].shape == (10,)


def test_a_full_disk_leaves_the_older_weights_whole(tmp_path: Path) -> None:
    backbone = create_backbone("vit_tiny_patch16_224", 16, {"embed_dim": 24, "depth": 1, "num_heads": 3})
    path = tmp_path / "backbone.safetensors"
    path.write_text("older")
    with small_disk(5_000), pytest.raises(OSError, match="too large"):
        save_backbone(path, backbone)
    assert path.read_text() == "older"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_leftover_of_a_killed_write_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".step_00000009.pt.1234").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "not a readable checkpoint"), (b"PK\x03\x04 torn", "not a readable checkpoint")],
)
def test_damaged_files(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "step_00000001.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_checkpoint(path)


def test_a_torn_checkpoint(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"teacher": {"w": torch.zeros(1000)}}, keep=1)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(path)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


def test_code_is_never_executed(tmp_path: Path) -> None:
    torch.save({"teacher": Payload()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "a.pt")


def test_what_is_no_checkpoint_of_ours(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="has no teacher"):
        load_checkpoint(tmp_path / "a.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="a folder without checkpoints"):
        load_checkpoint(tmp_path)
