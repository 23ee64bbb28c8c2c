"""Frontier, hypervolume, and what the report shows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dino_value.arguments import exit_code
from dino_value.errors import EXIT_DONE, EXIT_USER, UserError
from dino_value.studies import pareto
from dino_value.studies.pareto import Axis, find_points, frontier, hypervolume

AXES = (Axis("seg.miou"), Axis("1-depth.rmse"))
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A run folder with two results."""

    def make(name: str, miou: float, rmse: float, method: str = "value", step: str = "9", **settings: Any) -> Path:
        run = tmp_path / "runs" / name
        for evaluation, metric, value in (("seg", "miou", miou), ("depth", "rmse", rmse)):
            (run / "results" / evaluation).mkdir(parents=True)
            content = {metric: value, "evaluation": evaluation, "settings": {"steps": 3, **settings}, "loss": 1}
            (run / "results" / evaluation / "results.json").write_text(json.dumps(content))
        (run / "config.yaml").write_text(
            f"method: {method}\nfeedback: {{seg: {{weight: 2.0}}, depth: {{weight: 1.0}}}}\n"
        )
        save_file({"x": torch.zeros(1)}, run / "backbone.safetensors", {"step": step, "model": "m"})
        return run

    return make


def naive(values: np.ndarray) -> list[bool]:
    return [
        not any(
            all(b >= a for a, b in zip(p, q, strict=True)) and any(b > a for a, b in zip(p, q, strict=True))
            for q in values
        )
        for p in values
    ]


def test_the_frontier_is_what_no_other_dominates(generator: torch.Generator) -> None:
    values = torch.randint(0, 6, (60, 2), generator=generator).double().numpy()  # with ties and repetitions
    assert frontier(values).tolist() == naive(values)
    assert frontier(np.array([[1.0, 1.0], [1.0, 1.0]])).tolist() == [True, True]


def test_the_hypervolume_is_the_area_of_the_staircase(generator: torch.Generator) -> None:
    pytest.importorskip("optuna")
    # Rectangles by hand: 3 × 1 + 2 × 1 + 1 × 2.
    values = np.array([[3.0, 1.0], [2.0, 2.0], [1.0, 4.0], [0.5, 0.5], [9.0, -1.0]])
    assert hypervolume(values, np.zeros(2)) == pytest.approx(7.0)
    assert hypervolume(-values, np.zeros(2)) == 0.0
    points = torch.rand(12, 2, generator=generator).double().numpy()
    grid = (np.arange(1000) + 0.5) / 1000
    x, y = np.meshgrid(grid, grid)
    covered = np.zeros_like(x, dtype=bool)
    for a, b in points:
        covered |= (x < a) & (y < b)
    assert hypervolume(points, np.zeros(2)) == pytest.approx(covered.mean(), abs=5e-3)


def test_the_report(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    pytest.importorskip("plotly")
    write("good", 0.5, 0.6)
    write("other", 0.4, 0.5)
    write("poor", 0.3, 0.7)
    write("plain", 0.35, 0.65, method="baseline")
    write("start", 0.2, 0.8, method="baseline", step="0")
    out = tmp_path / "out"
    assert pareto.main([str(tmp_path / "runs"), "--out", str(out)]) == EXIT_DONE
    content = json.loads((out / "pareto.json").read_text())
    rows = {row["run"]: row for row in content["points"]}
    assert [row["run"] for row in content["points"]] == ["good", "other", "plain", "poor", "start"]
    assert {name for name, row in rows.items() if row["frontier"]} == {"good", "other"}
    assert {name: row["kind"] for name, row in rows.items()} == {
        "good": "value",
        "other": "value",
        "poor": "value",
        "plain": "baseline",
        "start": "step-0",
    }
    assert rows["good"]["1-depth.rmse"] == pytest.approx(0.4)
    assert rows["good"]["settings"]["feedback.seg.weight"] == 2.0
    # over (0.2, 0.2): 0.3 × 0.2 + 0.2 × 0.1, and the baseline alone 0.15 × 0.15
    assert content["hypervolume"]["all, over step-0"] == pytest.approx(0.08)
    assert content["hypervolume"]["baseline, over the worst of each metric"] == pytest.approx(0.15 * 0.15)
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "pareto.html").read_text()
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page
    assert "hypervolume of all" in " ".join(capsys.readouterr().out.split())


def test_a_sweep_names_what_its_trials_tried(write: Write, tmp_path: Path) -> None:
    write("trials/0000", 0.5, 0.6)
    write("step0", 0.2, 0.8, step="0")
    (tmp_path / "runs" / "trials.json").write_text('[{"number": 0, "params": {"optim.lr": 0.001}}]')
    points = {point.name: point for point in find_points([tmp_path / "runs"])}
    assert points["trials/0000"].settings == {"optim.lr": 0.001}
    assert points["step0"].kind == "step-0"


def test_unequal_protocols_are_said(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    write("a", 0.5, 0.6)
    write("b", 0.4, 0.5, steps=7)
    assert pareto.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--no-html"]) == EXIT_DONE
    assert "seg was evaluated with steps=3 and 7: not comparable" in capsys.readouterr().err
    assert not (tmp_path / "out" / "pareto.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none"], "no such folder"),
        (["empty"], "no results; evaluate its runs"),
        (["runs", "--objectives", "seg.miou", "knn.top1"], "no run has seg.miou and knn.top1; they have depth.loss"),
        (["runs", "--objectives", "seg.miou", "rmse"], "write EVALUATION.METRIC"),
    ],
)
def test_mistakes(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    write("a", 0.5, 0.6)
    (tmp_path / "empty").mkdir()
    command = [str(tmp_path / arguments[0]), *arguments[1:], "--out", str(tmp_path / "out")]
    assert exit_code(lambda: pareto.main(command)) == EXIT_USER
    assert said in capsys.readouterr().err


def test_two_results_of_one_evaluation_are_refused(write: Write, tmp_path: Path) -> None:
    run = write("a", 0.5, 0.6)
    (run / "results" / "seg.json").write_text((run / "results" / "seg" / "results.json").read_text())
    with pytest.raises(UserError, match="two results of seg"):
        find_points([run])
