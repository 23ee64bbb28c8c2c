"""Trackers get what metrics.jsonl gets, once, and cannot end a run."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dino_value.cli import main
from dino_value.config import Config, TrackConfig
from dino_value.errors import UserError
from dino_value.report.gallery import mask_pictures
from dino_value.runs import trackers
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.metrics import read_metrics
from dino_value.runs.trackers import Trackers
from dino_value.training.trainer import Trainer, train

Make = Callable[..., Config]


class Recorder:
    """Keeps what it is told."""

    def __init__(self, config: TrackConfig, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        self.start, self.settings, self.closed = step, settings, False
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def text(self, step: int, name: str, message: str) -> None:
        self.rows.append((step, {name: message}))

    def pictures(self, step: int, pictures: trackers.Pictures) -> None:
        self.rows.append((step, dict(pictures)))

    def close(self) -> None:
        self.closed = True


class Broken(Recorder):
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        super().scalars(step, values)
        if step == 2:
            raise RuntimeError("the disk is\nfull")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """`track.to=[tensorboard,wandb]` opens a recorder and one that breaks at step 2; both are kept here."""
    found: list[Recorder] = []

    def keep(kind: type[Recorder]) -> Callable[..., Recorder]:
        def make(*arguments: Any) -> Recorder:
            found.append(kind(*arguments))
            return found[-1]

        return make

    monkeypatch.setattr(
        trackers, "TRACKERS", {"tensorboard": ("json", keep(Recorder)), "wandb": ("json", keep(Broken))}
    )
    return found


def numbers(rows: list[dict[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    return [(row["step"], {k: v for k, v in row.items() if k != "step"}) for row in rows if "event" not in row]


def test_the_same_rows_and_masks_and_a_broken_one_is_dropped(
    tiny: Make, made: list[Recorder], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plain = train(tiny(f"out={tmp_path / 'plain'}"), quiet=True)
    folder = train(tiny("track.to=[tensorboard,wandb]"), quiet=True)
    good, broken = made
    pictures = [row for row in good.rows if "masks" in row[1]]
    assert [row for row in good.rows if row not in pictures] == numbers(read_metrics(folder))
    assert [step for step, _ in pictures] == [2, 4]  # at the checkpoints
    assert pictures[0][1]["masks"].dtype == np.uint8
    assert (pictures[0][1]["masks"] != pictures[1][1]["masks"]).any()
    assert good.settings["method"] == "value"
    assert good.closed
    assert [step for step, _ in broken.rows] == [1, 2]
    assert capsys.readouterr().err.count("track: wandb failed and is left out from here on: the disk is full") == 1
    same, other = load_checkpoint(plain), load_checkpoint(folder)  # they change nothing of the run
    assert same.keys() == other.keys()
    assert all(torch.equal(same["student"][name], value) for name, value in other["student"].items())


def test_pictures_that_cannot_be_drawn_are_not_asked_for_again(
    made: list[Recorder], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = Trackers(TrackConfig(to=["tensorboard"]), tmp_path, 0, {})

    def draw() -> trackers.Pictures:
        raise UserError("the data moved")

    for step in (1, 2):
        found.pictures(step, draw)
    found.write(3, {"event": "spike", "message": "loss 9"})
    assert made[0].rows == [(3, {"event/spike": "loss 9"})]
    assert capsys.readouterr().err.count("pictures failed") == 1


def test_one_that_cannot_be_opened_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refuse(*_: Any) -> Recorder:
        raise ValueError("no login")

    monkeypatch.setattr(trackers, "TRACKERS", {"wandb": ("json", refuse)})
    Trackers(TrackConfig(to=["wandb"]), tmp_path, 0, {}).write(1, {"loss": 1.0})
    assert "wandb failed and is left out from here on: no login" in capsys.readouterr().err


def test_a_run_without_masks_has_no_picture(tiny: Make) -> None:
    config = tiny("method=baseline")
    assert mask_pictures(config, Trainer(config).steer) == {}


def test_mistakes_are_named_before_anything_is_done(
    tiny: Make, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tiny_yaml), f"out={tmp_path / 'run'}", "track.to=[mlflow]"]) == 2
    assert "track.to=mlflow: choose tensorboard, wandb" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'dino-value\[wandb\]'"):
        train(tiny("track.to=[wandb]"), quiet=True)
    assert not (tmp_path / "run").exists()


def interrupted(config: Config) -> Path:
    """A run of 4 steps that was told to the trackers to step 3 and goes on from its checkpoint of step 2."""
    folder = train(config, quiet=True, until=3)
    (folder / "checkpoints" / "step_00000003.pt").unlink()  # as if killed before it was written
    assert train(config, quiet=True) == folder
    return folder


def test_tensorboard_has_every_step_once(tiny: Make) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = interrupted(tiny("track.to=[tensorboard]"))
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    rows = numbers(read_metrics(folder))
    assert {name for _, row in rows for name in row} == set(events.Tags()["scalars"])
    for name in ("loss", "value", "lr"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert told == [(step, np.float32(row[name])) for step, row in rows if name in row]
    assert [image.step for image in events.Images("masks")] == [2, 4]
    assert events.Images("masks")[0].width > events.Images("masks")[0].height > 100


def test_wandb_offline_has_every_step_once(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    folder = interrupted(tiny("track.to=[wandb]"))
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # two starts of one run
    history: list[dict[str, Any]] = []
    patience = time.monotonic() + 30  # W&B writes from a process of its own, that outlives the run
    while len(history) < 4 and time.monotonic() < patience:
        time.sleep(0.1)
        history = [row for file in files for row in wandb_history(file)]
    assert [row["_step"] for row in history] == [1, 2, 3, 4]
    rows = dict(numbers(read_metrics(folder)))
    for row in history:
        assert row["loss"] == pytest.approx(rows[row["_step"]]["loss"])
        names = {name.partition("/")[0] for name in row if name[0] != "_"}  # a picture is masks/path, masks/width, …
        assert names - {"masks"} == set(rows[row["_step"]])
        assert ("masks" in names) == (row["_step"] != 1)  # of the checkpoints, and where the first start paused
    assert list((folder / "wandb").glob("offline-run-*/files/media/images/*.png"))


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """The rows that `wandb sync` would send."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for data in log_records(file.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
            rows.append({name: json.loads(value) for name, value in items.items()})
    return rows


def log_records(content: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format, in blocks of 32 KiB, after W&B's header of 7 bytes."""
    block, at, record = 32768, 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:  # no room for a header: the rest of a block is padding
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if kind == 0:
            return
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""
