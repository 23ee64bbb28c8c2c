"""What a run says: meters, one line a reading, the bar, and what `quiet` leaves."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dino_value.runs import metrics as track
from dino_value.runs.metrics import Clock, Meters, MetricsFile, Reporter, duration, follow, read_metrics, summary

VALUES = {"loss": 4.2087, "lr": 1e-4, "images_per_second": 38.21, "data_wait": 0.034, "rankme": 12.34}


def test_a_summary_is_of_what_there_is() -> None:
    assert summary(VALUES) == "loss 4.209  RankMe 12.3  38.21 images/s  3% waiting for data"
    assert summary({"lr": 1.0}) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (61.6, "0:01:02"), (3600 * 30, "1 day, 6:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_one_plain_line_a_reading_off_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(track.time, "monotonic", lambda: now[0])
    with Reporter("value", 40, 10) as reporter:
        now[0] += 20  # 10 steps of the 30: 40 seconds to go
        reporter.advance(20)
        reporter.say(20, VALUES)
        reporter.note("engine [double_backward] " + "x" * 200)
        reporter.warn("loss spike")
        now[0] += 40
        reporter.say(40, VALUES)
    out, lines = capsys.readouterr()
    assert out == ""
    assert lines.splitlines() == [
        f"value 20/40  {summary(VALUES)}  0:00:40 left",
        "engine [double_backward] " + "x" * 200,
        "warning: loss spike",
        f"value 40/40  {summary(VALUES)}  done in 0:01:00",
    ]


def test_quiet_leaves_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter("value", 4, 0, quiet=True) as reporter:
        reporter.say(1, VALUES)
        reporter.note("a note")
        reporter.warn("a warning")
    assert capsys.readouterr().err == "warning: a warning\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(track, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=200))
    with Reporter("value", 40, 10) as reporter:
        reporter.say(20, VALUES)
    shown = screen.getvalue()
    for text in ("20/40", "left", "loss 4.209", "38.21 images/s", "3% waiting for data"):
        assert text in shown


def test_steps_are_followed_by_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(track.time, "monotonic", lambda: now[0])
    for _ in follow(range(10), "head", 10):
        now[0] += 11
    for _ in follow(range(10), "head", 10, quiet=True):
        now[0] += 11
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["head 3/10  0:01:17 left", "head 6/10  0:00:44 left", "head 9/10  0:00:11 left"]


def test_meters_are_means_since_the_last_reading() -> None:
    meters = Meters()
    for value in (1.0, 2.0, 6.0):
        meters.add(loss=torch.tensor(value))
    meters.add(other=torch.tensor(5.0))
    assert meters.read() == {"loss": 3.0, "other": 5.0}
    assert meters.read() == {}


def test_waiting_for_data_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, worked = [0.0], [5.0]
    monkeypatch.setattr(track.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(track.time, "process_time", lambda: worked[0])

    def slow():  # type: ignore[no-untyped-def]
        for _ in range(2):
            now[0] += 1  # to fetch
            yield (torch.zeros(1),)

    clock = Clock()
    for _ in clock.waiting(slow()):
        now[0] += 3  # to train
        worked[0] += 2  # of which on a processor
    found = {"images_per_second": 1.0, "data_wait": 0.25, "seconds": 8.0, "cpu_seconds": 4.0}
    assert clock.read(batch_size=4) == found
    assert clock.read(batch_size=4)["cpu_seconds"] == 0


def test_events_stand_beside_numbers_and_go_with_their_steps(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.write(1, {"loss": 2.0})
    metrics.write(2, {"event": "uniform", "message": "teacher entropy …"})
    metrics.close()
    assert read_metrics(tmp_path)[1] == {"step": 2, "event": "uniform", "message": "teacher entropy …"}
    MetricsFile(tmp_path, 1).close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 2.0}
    ]
