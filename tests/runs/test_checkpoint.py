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

from dino_value.errors import UserError
from dino_value.models.backbone import create_backbone, save_backbone
from dino_value.runs.checkpoint import (
    Best,
    Writer,
    dropped,
    latest_checkpoint,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
    snapshot,
    tidy,
)


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


def test_every_flipped_bit_is_seen_or_harmless(tmp_path: Path) -> None:
    """torch.load alone would read most of these as other numbers."""
    state = {"teacher": {"w": torch.randn(50)}, "step": 3, "nested": [1.5, None]}
    path = save_checkpoint(tmp_path, 3, state, keep=1)
    content, seen = path.read_bytes(), 0
    for place in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = load_checkpoint(path)
        except UserError:
            seen += 1
        else:
            assert torch.equal(found["teacher"]["w"], state["teacher"]["w"])  # type: ignore[index]
            assert (found["step"], found["nested"]) == (3, [1.5, None])
    assert seen > len(content) / 7 / 4  # the rest is padding


@pytest.mark.parametrize("harm", ["torn", "flipped", "empty"])
def test_the_newest_whole_one_is_found(tmp_path: Path, harm: str) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"teacher": {"w": torch.full((100,), float(step))}}, keep=3)
    for step in (2, 3):
        path = tmp_path / f"step_{step:08d}.pt"
        content = bytearray(path.read_bytes())
        content[content.index(b"\x00\x00@") + 1] ^= 4  # within the weights
        path.write_bytes({"torn": content[:-700], "flipped": content, "empty": b""}[harm])
    state, said = newest_whole(tmp_path)
    assert torch.equal(state["teacher"]["w"], torch.ones(100))
    assert len(said) == 2
    assert "step_00000003.pt: not a readable checkpoint" in said[0]
    assert said[0].endswith("set aside, going on from step_00000001.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000001.pt",
        "step_00000002.pt.damaged",
        "step_00000003.pt.damaged",
    ]
    # What was set aside counts for nothing: not even with one to keep is the good one dropped.
    save_checkpoint(tmp_path, 2, {"teacher": {}}, keep=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000002.pt"


def test_none_is_whole(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"step_{step:08d}.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match="No older one is left"):
        newest_whole(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001.pt", "step_00000002.pt"]


def test_what_is_kept(tmp_path: Path) -> None:
    assert dropped([10, 20, 30, 40, 50], keep=2) == [10, 20, 30]
    assert dropped([10, 20, 30, 40, 50], keep=1, every=20) == [10, 30]
    assert dropped([10, 20, 30, 40, 50], keep=1, every=20, best=10) == [30]
    for step in range(1, 8):
        save_checkpoint(tmp_path, step, {"teacher": {}, "step": step}, keep=1, every=3, best=min(step, 2))
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == ["best.pt", "step_00000002.pt", "step_00000003.pt", "step_00000006.pt", "step_00000007.pt"]
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2


def test_what_a_kill_after_the_last_file_left_undone(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, step, {"teacher": {}, "step": step}, keep=9)
    (tmp_path / "best.pt").symlink_to("step_00000005.pt")
    for _ in range(2):
        tidy(tmp_path, keep=1, best=10)
        names = ["best.pt", "step_00000010.pt", "step_00000015.pt"]
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        assert load_checkpoint(tmp_path / "best.pt")["step"] == 10
    tidy(tmp_path, keep=1, best=99)  # one that was set aside
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000015.pt"]


@pytest.mark.parametrize(("mode", "step", "value"), [("max", 2, 0.7), ("min", 3, 0.1)])
def test_the_best_of_what_is_logged(mode: str, step: int, value: float) -> None:
    best = Best("knn_top1", mode)
    for number, row in enumerate([{"loss": 1.0}, {"knn_top1": 0.3}, {"knn_top1": 0.7}, {"knn_top1": 0.1}, {"loss": 9}]):
        best.see(row)
        again = Best("knn_top1", mode)
        again.load_state_dict(best.state_dict())
        best = again
        best.judge(number)
    assert (best.step, best.value) == (step, value)


def test_a_kill_in_the_middle_leaves_nothing_for_good(tmp_path: Path) -> None:
    for name in (".step_00000009.pt.1234", ".backbone.safetensors.99", ".keep.me"):
        (tmp_path / name).write_bytes(b"half")
    save_checkpoint(tmp_path, 1, {"teacher": {}}, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".keep.me", "step_00000001.pt"]


def test_a_writer_in_the_background(tmp_path: Path) -> None:
    writer, written = Writer(background=True), []
    weight = torch.zeros(3)
    state = snapshot({"w": weight, "list": [weight], "none": None}, "cpu")
    weight.fill_(1)  # training goes on
    assert torch.equal(state["w"], torch.zeros(3))
    assert torch.equal(state["list"][0], torch.zeros(3))
    writer.submit(lambda: written.append(1))
    writer.submit(lambda: written.append(2))

    def fail() -> None:
        raise UserError("the disk is full")

    writer.submit(fail)
    with pytest.raises(UserError, match="the disk is full"):
        writer.submit(lambda: written.append(3))
    writer.wait()
    assert written == [1, 2]
