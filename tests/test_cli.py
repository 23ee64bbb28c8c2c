"""The command line: exit codes, one line for a mistake, nothing left half-written."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dino_value import __version__, cli
from dino_value.arguments import exit_code
from dino_value.config import Config
from dino_value.errors import EXIT_FAULT
from dino_value.export.command import export
from dino_value.models.backbone import create_backbone, save_backbone
from dino_value.training.trainer import Trainer, train

KWARGS = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
Refused = Callable[..., str]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the data sets that a test may damage."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


@pytest.fixture
def refused(tiny_yaml: Path, out: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run `dino-value train` with overrides that must be refused; the one line on stderr."""

    def run(*overrides: str, said: Sequence[str] = ()) -> str:
        code = cli.main(["train", str(tiny_yaml), f"out={out}", *overrides])
        printed = capfd.readouterr()
        assert code == 2
        assert printed.out == ""
        lines = printed.err.splitlines()
        for pattern in said:  # before the refusal
            assert re.search(pattern, lines.pop(0))
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in lines[0]
        return lines[0]

    return run


def untouched(out: Path, *besides: str) -> bool:
    """Nothing that looks like a result, whole or half: no weights, no checkpoint, no row, no temporary file."""
    # What a step that is not finite was computed from is kept on purpose.
    found = [path for path in out.rglob("*") if path.is_file() and path.parent.name != "nonfinite"]
    rows = [path for path in found if path.name == "metrics.jsonl" and path.stat().st_size]
    made = {"config.yaml", "environment.json", "metrics.jsonl", "splits.json"}
    return not rows and {path.name for path in found} <= made.union(besides)


def test_a_run_prints_its_folder(tiny_yaml: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(tiny_yaml), f"out={out}", "method=baseline", "steps=1"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert "baseline 1/1" in printed.err


def test_quiet(tiny_yaml: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(tiny_yaml), f"out={out}", "method=baseline", "steps=1", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_overrides_may_follow_an_option(tiny_yaml: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(tiny_yaml), "--quiet", f"out={out}", "method=baseline", "steps=1"]) == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        [],
        ["train"],
        ["train", "a", "--fast"],
        ["quickstart", "steps=3"],
        ["quickstart", "--seeds", "many"],
        ["eval", "segg"],
        ["eval", "seg"],
        ["eval", "seg", "w", "--data", "d", "--out", "o", "--steps", "many"],
        ["eval", "depth", "w", "--data", "d", "--out", "o", "--min-match", "90"],
        ["eval", "linear", "w", "--data", "d", "--out", "o", "--fast"],
    ],
)
def test_a_command_that_cannot_be_parsed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("error: ")


# Data


@pytest.mark.parametrize("memory", ["true", "false"])
def test_a_missing_data_folder(refused: Refused, out: Path, memory: str) -> None:
    assert "no/such: no such folder of images" in refused("data.unlabeled=no/such", f"data.in_memory={memory}")
    assert not out.exists()


def test_an_empty_data_folder(refused: Refused, tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty: no images in this folder" in refused(f"data.unlabeled={tmp_path / 'empty'}")
    assert not out.exists()


@pytest.mark.parametrize("name", ["ade20k", "nyuv2"])
def test_a_missing_labelled_set(refused: Refused, out: Path, name: str) -> None:
    assert "no/such" in refused(f"data.{name}=no/such")
    assert not out.exists()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_label_outside_the_classes(refused: Refused, data: Path, out: Path, workers: int) -> None:
    for path in (data / "ade" / "annotations" / "training").iterdir():
        Image.new("L", (24, 24), 77).save(path)
    line = refused(f"data.ade20k={data / 'ade'}", f"data.workers={workers}")
    assert "label id 77 is outside 0…3" in line
    assert str(data / "ade" / "annotations" / "training") in line
    assert untouched(out)


@pytest.mark.parametrize("memory", ["true", "false"])
def test_an_image_that_cannot_be_decoded(refused: Refused, data: Path, out: Path, memory: str) -> None:
    for path in (data / "images").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    line = refused(f"data.unlabeled={data / 'images'}", f"data.in_memory={memory}", "method=baseline")
    assert str(data / "images") in line
    assert "cannot be read as an image" in line
    assert untouched(out)


@pytest.mark.slow
def test_an_image_that_a_worker_cannot_decode(refused: Refused, data: Path, out: Path) -> None:
    for path in (data / "images").iterdir():
        path.write_bytes(b"")
    line = refused(f"data.unlabeled={data / 'images'}", "data.workers=2", "method=baseline")
    assert "cannot be read as an image" in line
    assert untouched(out)


def test_a_labelled_image_that_cannot_be_decoded(refused: Refused, data: Path, out: Path) -> None:
    for path in (data / "ade" / "images" / "training").iterdir():
        path.write_bytes(b"")
    assert "cannot be read as an image" in refused(f"data.ade20k={data / 'ade'}")
    assert untouched(out)


def test_after_a_refusal_the_corrected_command_runs(refused: Refused, tiny_yaml: Path, data: Path, out: Path) -> None:
    for path in (data / "ade" / "annotations" / "training").iterdir():
        Image.new("L", (24, 24), 77).save(path)
    refused(f"data.ade20k={data / 'ade'}")
    assert cli.main(["train", str(tiny_yaml), f"out={out}", "steps=1", "--quiet"]) == 0


# Settings


def test_a_typo_in_the_configuration(refused: Refused, out: Path) -> None:
    assert "unknown configuration key optim.learning_rat; did you mean optim." in refused("optim.learning_rat=1")
    assert "unknown configuration key stesp; did you mean steps?" in refused("stesp=3")
    assert not out.exists()


def test_a_value_of_the_wrong_kind(refused: Refused, out: Path) -> None:
    assert "many" in refused("steps=many")
    assert not out.exists()


@pytest.mark.parametrize("part", ["optim", "value", "feedback"])
def test_batch_size_one(refused: Refused, out: Path, part: str) -> None:
    assert f"{part}.batch_size=1: must be at least 2" in refused(f"{part}.batch_size=1")
    assert not out.exists()


def test_an_unknown_timm_name(refused: Refused, out: Path) -> None:
    line = refused("backbone.name=vit_tiny_patch16_2244")
    assert "timm has no such model; near names: " in line
    assert "vit_tiny_patch16_224" in line.partition("near names")[2]
    assert not out.exists()


# Weights


def test_weights_of_another_architecture(refused: Refused, tiny_yaml: Path, tmp_path: Path, out: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_backbone(path, create_backbone("vit_tiny_patch16_224", 16, {**KWARGS, "depth": 2}))
    line = refused(f"backbone.weights={path}", "method=baseline")
    assert "matched 30, missing 12 (blocks.2." in line
    assert "unexpected 0" in line
    assert "71% is below backbone.min_match=90%" in line
    assert not out.exists()
    common = ["train", str(tiny_yaml), f"out={out}", "method=baseline", "steps=1", "--quiet"]
    assert cli.main([*common, f"backbone.weights={path}", "backbone.min_match=0"]) == 0


def test_weights_that_are_not_there_or_not_weights(refused: Refused, tmp_path: Path, out: Path) -> None:
    assert "no such weights file" in refused("backbone.weights=no/such.pth")
    (tmp_path / "notes.pth").write_text("no weights")
    assert "notes.pth" in refused(f"backbone.weights={tmp_path / 'notes.pth'}")
    assert not out.exists()


# Not finite


def test_weights_that_are_not_finite(refused: Refused, tmp_path: Path, out: Path) -> None:
    path = tmp_path / "broken.safetensors"
    save_backbone(path, create_backbone("vit_tiny_patch16_224", 16, KWARGS))
    weights = load_file(path)
    weights["norm.weight"][0] = float("nan")
    save_file(weights, path)
    line = refused(f"backbone.weights={path}", "method=baseline", said=[r"read as timm: matched \d+, missing 0"])
    assert "step 0: loss and gradient_norm not finite; nothing was applied. Batch 0 of unlabeled: images [" in line
    assert untouched(out, "step_00000000.pt")  # for replay


def test_a_loss_that_stops_being_finite(
    refused: Refused, out: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    update = Trainer.learner_update

    def spoilt(self: Trainer, large: torch.Tensor, small: torch.Tensor) -> None:
        if self.step == 3:
            with torch.no_grad():
                self.student.backbone.model.norm.weight.fill_(float("inf"))
        update(self, large, small)

    monkeypatch.setattr(Trainer, "learner_update", spoilt)
    line = refused("method=baseline", "--quiet")
    assert "step 3: loss" in line
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000002.pt"]
    weights = load_file(out / "backbone.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values())


# Folders


def test_a_folder_that_cannot_be_made(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written (Not a directory)" in refused(f"out={tmp_path / 'file' / 'run'}", "method=baseline")


def test_a_folder_that_is_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written (File exists)" in refused(f"out={tmp_path / 'file'}", "method=baseline")
    assert (tmp_path / "file").read_text() == "in the way"


def test_other_settings_on_an_existing_run(
    refused: Refused, tiny_yaml: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    common = ["train", str(tiny_yaml), f"out={out}", "method=baseline", "--quiet"]
    assert cli.main([*common, "steps=1"]) == 0
    capfd.readouterr()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    line = refused("method=baseline", "steps=1", "optim.lr=0.5", "seed=3", "--quiet")
    assert "optim.lr: 0.001 there, 0.5 now; seed: 0 there, 3 now" in line
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("limit", [1_000, 20_000, 200_000], ids=["settings", "weights", "later"])
def test_a_full_disk(refused: Refused, out: Path, limit: int) -> None:
    """No file may grow beyond `limit` bytes; writes fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        line = refused("method=baseline", "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "File too large" in line
    assert "choose another" in line
    assert not list(out.rglob("*.pt*"))
    assert not list(out.rglob(".*"))
    for weights in out.rglob("*.safetensors"):  # small enough to fit: then it is whole
        load_file(weights)
    assert not list(out.rglob("*.tmp"))


# Signals


@pytest.mark.slow
def test_a_stopped_run_is_resumable(tiny_yaml: Path, out: Path) -> None:
    command = [sys.executable, "-m", "dino_value.cli", "train", str(tiny_yaml), f"out={out}", "steps=100"]
    command += ["checkpoint.every=10000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    try:
        waited = time.monotonic()
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
            assert running.poll() is None
            assert time.monotonic() - waited < 120
            time.sleep(0.02)
        running.terminate()
        _, errors = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 75
    assert "Traceback" not in errors
    assert "the same command goes on from there" in errors.splitlines()[-1]
    (stopped,) = (out / "checkpoints").iterdir()
    assert 0 < int(stopped.stem.removeprefix("step_")) < 100
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert (again.returncode, again.stdout) == (0, f"{out}\n")
    assert (out / "checkpoints" / "step_00000100.pt").exists()


@pytest.mark.parametrize(
    "error", [RuntimeError("out of luck"), OSError(errno.EINVAL, "Invalid argument"), KeyError("k")]
)
def test_a_fault_of_the_program_has_a_code_of_its_own(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    """1 says that another process is gone, and nothing else does."""

    def fail() -> int:
        raise error

    assert exit_code(fail) == EXIT_FAULT == 70
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert str(error) in said


@pytest.mark.parametrize(
    ("umask", "mode", "folders"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770), (0o077, 0o600, 0o700)]
)
def test_files_follow_the_umask(
    tiny: Callable[..., Config], tmp_path: Path, umask: int, mode: int, folders: int
) -> None:
    """Whatever library wrote them: safetensors writes for its owner alone."""
    before = os.umask(umask)
    try:
        run = train(tiny("method=baseline", "steps=1", f"out={tmp_path / 'run'}"), quiet=True)
        export(run, "timm", tmp_path / "export")
    finally:
        os.umask(before)
    for place in (run, tmp_path / "export"):
        found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (place, *place.rglob("*"))}
        wanted = {path.name: folders if path.is_dir() else mode for path in (place, *place.rglob("*"))}
        assert found == wanted
    assert {"backbone.safetensors", "step_00000001.pt"} <= {path.name for path in run.rglob("*")}
