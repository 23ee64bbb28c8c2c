"""Disks that fill up, folders that may not be written, data that disappear: one clear line, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dino_value import cli
from dino_value.config import Config
from dino_value.errors import UserError
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.training.trainer import Trainer, train

Make = Callable[..., Config]


def same_end(left: Path, right: Path) -> bool:
    """Whether two runs ended at the same weights, bit for bit."""
    states = [load_checkpoint(folder) for folder in (left, right)]
    return all(
        value.equal(states[1][part][name])
        for part in ("student", "teacher", "objective")
        for name, value in states[0][part].items()
    )


@pytest.mark.slow
def test_a_disk_that_fills_up_later(runner: Callable[..., int], tiny_yaml: Path, tmp_path: Path) -> None:
    """Every write that a run makes is refused at some limit; with room again, it goes on as if nothing had been."""
    common = ["train", str(tiny_yaml), "method=baseline", "steps=8", "--quiet"]
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert runner(*common, f"out={whole}") == 0
    sizes = sorted({path.stat().st_size for path in whole.rglob("*") if path.is_file()})
    shutil.copytree(whole, out)
    for path in out.glob("checkpoints/step_*[468].pt"):
        path.unlink()
    for limit in [size - 1 for size in sizes]:
        assert runner(*common, f"out={out}", file_limit=limit) == 2
        assert len(runner.said) == 1  # type: ignore[attr-defined]
        assert "File too large" in runner.said[0]  # type: ignore[attr-defined]
        assert load_checkpoint(out)["step"] >= 2
        assert not list(out.rglob(".*"))
    assert runner(*common, f"out={out}") == 0
    assert same_end(out, whole)


@pytest.mark.slow
def test_a_disk_of_8_mb(tiny_yaml: Path, tmp_path: Path) -> None:
    """A file system that is really full."""
    place = tmp_path / "disk"
    place.mkdir()
    script = f'mount -t tmpfs -o size=8m none {place} && exec "$@"'
    mounted = ["unshare", "-m", "sh", "-c", script, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    train_here = [sys.executable, "-m", "dino_value.cli", "train", str(tiny_yaml), f"out={place / 'run'}"]
    train_here += ["method=baseline", "steps=400", "checkpoint.every=1", "checkpoint.keep=400", "--quiet"]
    look = f'{sys.executable} -c "import sys; from dino_value.runs.checkpoint import load_checkpoint as l; '
    look += f'print(len(l(sys.argv[1])))" {place / "run"}; ls -A {place / "run"}'
    command = [*mounted, "sh", "-c", f"{' '.join(train_here)}; echo code $?; {look}"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=500
    )
    assert "code 2" in done.stdout, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("error: ")
    assert "No space left on device" in line
    assert "Traceback" not in done.stderr
    names = done.stdout.splitlines()[2:]
    assert "checkpoints" in names  # and the newest of them could be read
    assert not [name for name in names if name.startswith(".")]


def test_a_folder_that_may_not_be_written(runner: Callable[..., int], tiny_yaml: Path, tmp_path: Path) -> None:
    common = ["train", str(tiny_yaml), "method=baseline", "--quiet"]
    parent = tmp_path / "mine"
    parent.mkdir()
    assert runner(*common, f"out={parent / 'run'}", "steps=2") == 0
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    for path in [parent, *parent.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        for name, override in (("run", "steps=2"), ("other", "steps=2")):
            code = runner(*common, f"out={parent / name}", override, "checkpoint.keep=1", unprivileged=True)
            assert (code, len(runner.said)) == (2, 1)  # type: ignore[attr-defined]
            assert "Permission denied" in runner.said[0]  # type: ignore[attr-defined]
        assert {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()} == before
    finally:
        for path in [parent, *parent.rglob("*")]:
            path.chmod(0o755)


@pytest.mark.parametrize("lost", ["images", "ade"])
@pytest.mark.parametrize("skip", [False, True])
def test_data_that_disappear(
    tiny: Make, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, skip: bool
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    paths = [f"data.unlabeled={data / 'images'}", f"data.ade20k={data / 'ade'}", f"data.nyuv2={data / 'nyu'}"]
    config = tiny("steps=6", *paths, f"data.skip_unreadable={skip}".lower())
    whole = train(
        tiny("steps=6", *paths, f"data.skip_unreadable={skip}".lower(), f"out={tmp_path / 'whole'}"), quiet=True
    )
    update = Trainer.learner_update

    def updated(self: Trainer, *batch: object) -> None:
        if self.step == 3:
            (data / lost).rename(data / "gone")
        update(self, *batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "learner_update", updated)
    said = "none of 1?[0-9] images can be read" if skip and lost == "images" else rf"{lost}.*cannot be read as an image"
    with pytest.raises(UserError, match=said) as caught:
        train(config, quiet=True)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "run")["step"] >= 2
    (data / "gone").rename(data / lost)
    assert same_end(train(config, quiet=True), whole)


def test_a_run_folder_that_disappears(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    update, out = Trainer.learner_update, tmp_path / "run"

    def updated(self: Trainer, *batch: object) -> None:
        if self.step == 3:
            shutil.rmtree(out)
        update(self, *batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "learner_update", updated)
    assert cli.main(["train", str(tiny_yaml), f"out={out}", "method=baseline", "--quiet"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "step 4 could not be saved (" in line
    assert "No such file or directory" in line
