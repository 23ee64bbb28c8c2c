"""kill -9 at random moments: what is there at the end is what an undisturbed run leaves, bit for bit.

DINO_VALUE_KILLS sets how many (docs/reliability.md has the count of a full run).
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dino_value.models.weight_files import read_header
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.metrics import read_metrics

KILLS = int(os.environ.get("DINO_VALUE_KILLS", "12"))
TIMING = ("images_per_second", "data_wait", "seconds", "cpu_seconds")


def same(left: Any, right: Any) -> bool:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def left_by(folder: Path) -> dict[str, Any]:
    """All that a run leaves but times and the machine."""
    rows = [{name: value for name, value in row.items() if name not in TIMING} for row in read_metrics(folder)]
    return {
        "names": sorted(f"{path.relative_to(folder)} {os.path.basename(path.resolve())}" for path in folder.rglob("*")),
        "rows": rows,
        "weights": load_file(folder / "backbone.safetensors"),
        "header": read_header(folder / "backbone.safetensors"),  # its order in the file is nobody's promise
        "state": load_checkpoint(folder),
    }


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kills(runner: Callable[..., int], tiny_yaml: Path, tmp_path: Path) -> None:
    steps = 300 if KILLS >= 50 else 40
    rng, kills, inside, runs = random.Random(KILLS), 0, 0, 0
    settings = [f"steps={steps}", "checkpoint.every=5", "checkpoint.keep=2", "log_every=3", "method=value"]
    settings += ["value.engine=finite_difference", "views.augment=torchvision", "checkpoint.best=loss"]

    def run(name: str, **faults: Any) -> int:
        return runner("train", str(tiny_yaml), f"out={tmp_path / name}", *settings, "--quiet", **faults)

    began = time.monotonic()
    assert run("whole") == 0, runner.said  # type: ignore[attr-defined]
    a_step = (time.monotonic() - began) / steps
    expected = left_by(tmp_path / "whole")
    while kills < KILLS:
        runs += 1
        while True:
            writing = kills % 2 == 0
            faults: dict[str, Any] = {"kill_at": rng.randrange(1, 80)}
            if not writing:  # at any moment at all: most of the time of a short life is setting up
                faults = {"kill_after": rng.uniform(0, 1 + 15 * a_step)}
            code = run(str(runs), **(faults if kills < KILLS else {}))
            if code == 0:
                break
            assert code == -signal.SIGKILL, runner.said  # type: ignore[attr-defined]
            kills += 1
            inside += writing
        found = left_by(tmp_path / str(runs))
        assert [name for name in found if not same(found[name], expected[name])] == []
    print(f"{kills} kills, {inside} of them inside a write, {runs} runs of {steps} steps, nothing lost")


@pytest.mark.slow
def test_a_kill_with_workers(runner: Callable[..., int], tiny_yaml: Path, tmp_path: Path) -> None:
    """Loader processes end with a run that is killed, and a run without them goes on from it."""
    settings = ["steps=12", "checkpoint.every=3", "views.augment=torchvision", "--quiet"]

    def run(name: str, *more: str, **faults: Any) -> int:
        return runner("train", str(tiny_yaml), f"out={tmp_path / name}", *settings, *more, **faults)

    def loaders() -> list[str]:
        """Processes that were forked for the run: its output folder is not in their command, its log file is open."""
        found = []
        for path in Path("/proc").glob("[0-9]*/fd/1"):
            try:
                if os.readlink(path) == str(runner.log):  # type: ignore[attr-defined]
                    found.append(path.parts[2])
            except OSError:
                continue
        return found

    assert run("whole") == 0
    assert run("killed", "data.workers=2", kill_at=40) == -signal.SIGKILL
    until = time.monotonic() + 60
    while loaders() and time.monotonic() < until:
        time.sleep(0.2)
    assert not loaders()
    step = load_checkpoint(tmp_path / "killed")["step"]
    assert 0 < step < 12
    assert run("killed", "data.workers=1") == 0
    assert same(left_by(tmp_path / "killed"), left_by(tmp_path / "whole"))
