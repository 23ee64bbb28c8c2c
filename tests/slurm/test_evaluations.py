"""Evaluations that a training run submits."""

import json
import time
from pathlib import Path

import pytest

from dino_value.cli import main as dino_value
from dino_value.errors import EXIT_DONE, EXIT_USER, UserError
from dino_value.runs.metrics import read_metrics
from dino_value.slurm import evaluations
from dino_value.slurm.jobs import describe, read_records

DEPTH = "depth --data scenes --size 48 --steps 2 --batch 4 --workers 0"


def train(tiny_yaml: Path, out: Path, *given: str) -> int:
    common = [
        f"out={out}",
        "method=baseline",
        "steps=4",
        "checkpoint.every=2",
        "checkpoint.keep=1",
        "evaluation.every=3",
    ]
    return dino_value(["train", str(tiny_yaml), *common, *given, "--quiet"])


@pytest.mark.slow
def test_a_run_has_its_weights_evaluated(tiny_yaml: Path, tmp_path: Path) -> None:
    given = [f"evaluation.commands=['{DEPTH}']", "evaluation.job='--cluster local'", "evaluation.every=4"]
    assert train(tiny_yaml, tmp_path, *given) == EXIT_DONE
    place, folder = tmp_path / "evaluations" / "step_00000004", tmp_path / "evaluations" / "jobs"
    last = time.monotonic() + 300
    while (rows := describe(read_records(folder), folder, tail=20))[0]["state"] == "RUNNING":
        assert time.monotonic() < last
        time.sleep(0.5)
    assert [row["state"] for row in rows] == ["COMPLETED"], rows
    assert json.loads((place / "jobs.json").read_text()) == {"depth": rows[0]["job"]}
    assert json.loads((place / "results" / "depth" / "results.json").read_text())["rmse"] > 0


def test_a_step_that_comes_again_is_not_submitted_again(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[list[list[str]]] = []

    class Job:
        job_id = "7"

    monkeypatch.setattr(evaluations, "submit", lambda commands, *_, **__: [sent.append(commands), [Job] * 2][1])
    given = [f"evaluation.commands=['{DEPTH}', 'seg --data scenes']"]
    assert train(tiny_yaml, tmp_path, *given) == EXIT_DONE
    assert [[command[:2] for command in commands] for commands in sent] == [[["eval", "depth"], ["eval", "seg"]]] * 2
    (tmp_path / "checkpoints" / "step_00000004.pt").unlink()
    (tmp_path / "evaluations" / "step_00000004" / "jobs.json").unlink()
    assert train(tiny_yaml, tmp_path, *given) == EXIT_DONE  # from the start, by steps 3 and 4
    assert len(sent) == 3
    assert json.loads((tmp_path / "evaluations" / "step_00000004" / "jobs.json").read_text()) == {
        "depth": "7",
        "seg": "7",
    }


def test_a_disk_that_refuses_the_record_does_not_end_training(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Job:
        job_id = "7"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folders: list[Path] = []
    monkeypatch.setattr(evaluations, "submit", lambda _, __, folder, *___, **____: [folders.append(folder), [Job]][1])
    monkeypatch.setattr(evaluations, "write_json", full)
    given = [f"evaluation.commands=['{DEPTH}']", f"evaluation.job='--folder {tmp_path / 'elsewhere'}'"]
    assert train(tiny_yaml, tmp_path / "run", *given) == EXIT_DONE
    assert folders == [tmp_path / "elsewhere"] * 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_cluster_that_refuses_does_not_end_training(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UserError("cannot submit to slurm: sbatch: invalid account")

    monkeypatch.setattr(evaluations, "submit", refuse)
    assert train(tiny_yaml, tmp_path, f"evaluation.commands=['{DEPTH}']") == EXIT_DONE
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: step_00000003: not evaluated: cannot submit to slurm: sbatch: invalid account" in said
    events = [row for row in read_metrics(tmp_path) if row.get("event") == "not evaluated"]
    assert [row["step"] for row in events] == [3, 4]
    assert (tmp_path / "evaluations" / "step_00000003" / "backbone.safetensors").is_file()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["evaluation.commands=[]"], "one without the other submits nothing"),
        (["evaluation.commands=['segg --data scenes']"], "eval segg: choose linear"),
        (["evaluation.commands=['seg --dta scenes']"], "--data"),
        (["evaluation.commands=['']"], "an empty command"),
        (["evaluation.commands=['seg --data \"x']"], "No closing quotation"),
        (["evaluation.commands=['seg --data x', 'seg --data y']"], "seg is given twice"),
        (["evaluation.commands=['seg --data x --out y']"], "leave out --out"),
        (["evaluation.commands=['seg --data x']", "evaluation.job='--node 2'"], "unrecognized arguments: --node 2"),
        (["evaluation.commands=['seg --data x']", "evaluation.job='--cluster debug'"], "choose slurm or local"),
        (["evaluation.commands=['seg --data x']", "evaluation.job='--timeout 0'"], "--timeout 0: must be above 0"),
    ],
)
def test_a_mistake_is_found_before_training(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    out = tmp_path / "run"
    assert train(tiny_yaml, out, *given) == EXIT_USER
    assert said in capsys.readouterr().err
    assert not out.exists()
    assert dino_value(["launch", str(tiny_yaml), f"out={out}", "evaluation.every=3", *given]) == EXIT_USER
    assert said in capsys.readouterr().err
