"""The page about runs says what lies in their folders, and nothing that does not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dino_value.cli import main
from dino_value.config import Config, load_config
from dino_value.files import write_bytes, write_json
from dino_value.report.figures import results_figure
from dino_value.run_report import arms_of_runs, evaluated, report_runs
from dino_value.train import train

Make = Callable[..., Config]


@pytest.fixture
def runs(tiny: Make, tmp_path: Path) -> list[Path]:
    found = []
    for method in ("value", "baseline"):
        folder = train(tiny(f"method={method}", f"out={tmp_path / method}"), quiet=True)
        (folder / "results" / "seg").mkdir(parents=True)
        score = {"evaluation": "seg", "miou": 0.25 if method == "value" else 0.125}
        write_json(folder / "results" / "seg" / "results.json", score)
        found.append(folder)
    return found


def test_one_run(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = runs[0]
    picture = results_figure({"arms": {"value": {"miou": [0.5]}}}).panels[0].png
    (run / "results" / "seg" / "pictures").mkdir()
    write_bytes(run / "results" / "seg" / "pictures" / "0000_image_truth_prediction.png", picture)
    row = {"pearson": 0.5, "interval": [0.25, 0.75], "predicted": [0.0, 1.0], "realised": [0.0, 1.0]}
    write_json(run / "results" / "probe.json", {"designed_sgd": row, "designed_optimizer": row})
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    assert "25.00" in page
    for title in (
        "Training curves",
        "What the student sees",
        "Patch features",
        "Does V foretell",
        "Predictions: value",
    ):
        assert title in page
    assert "value, step_00000002" in page  # masks across training
    assert page.count("<img") == len(list((run / "report_figures").glob("*.png")))
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert train(load_config(run / "config.yaml"), quiet=True) == run  # still a run folder, and finished


def test_methods_with_the_same_seeds_are_arms(runs: list[Path], tmp_path: Path) -> None:
    page = report_runs(runs, tmp_path / "page.html").read_text()
    assert "12.50" in page
    configs = {run: load_config(run / "config.yaml") for run in runs}
    assert arms_of_runs(configs) == {"value": [runs[0]], "baseline": [runs[1]]}
    configs[runs[1]].seed = 5
    assert arms_of_runs(configs) == {"value": [runs[0]], "baseline": [runs[1]]}  # by folder name
    configs[runs[1]].method = "value"
    assert arms_of_runs(configs) == {"value": runs}  # two seeds of one method


def test_only_what_every_run_has_is_compared(runs: list[Path]) -> None:
    arms = {"value": [runs[0]], "baseline": [runs[1]]}
    write_json(runs[0] / "results" / "depth.results.json", {"evaluation": "depth", "rmse": 1.0})
    assert evaluated(arms) == {"arms": {"value": {"miou": [0.25]}, "baseline": {"miou": [0.125]}}}
    (runs[1] / "results" / "seg" / "results.json").unlink()
    assert evaluated(arms) is None


def test_a_run_without_evaluations_has_a_page(tiny: Make, tmp_path: Path) -> None:
    run = train(tiny("method=baseline", "data.ade20k=null", "data.nyuv2=null"), quiet=True)
    page = report_runs([run], run / "report.html").read_text()
    assert "Training curves" in page
    assert "Results</h2>" not in page


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err
