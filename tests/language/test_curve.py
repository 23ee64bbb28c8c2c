"""Token efficiency: a metric against unlabeled tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dino_value.cli import main
from dino_value.language.config import LanguageConfig
from dino_value.language.curve import token_curve
from dino_value.language.trainer import train


def test_the_best_so_far() -> None:
    rows = [{"tokens": 10 * n, "loss": value, "reward": value} for n, value in enumerate((3.0, 1.0, 2.0, 0.5))]
    rows.insert(2, {"tokens": 15})  # logged without the metric
    falling, rising = token_curve(rows, "loss"), token_curve(rows, "reward")
    assert falling.tokens.tolist() == [0, 10, 20, 30]
    assert falling.raw.tolist() == [3, 1, 2, 0.5]
    assert falling.best.tolist() == [3, 1, 1, 0.5]
    assert rising.best.tolist() == [3, 3, 3, 3]


def test_the_command(
    tiny: Callable[..., LanguageConfig], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    runs = []
    for method, seed in (("baseline", 0), ("baseline", 1), ("uniform", 0)):
        held = [f"held.file={root}/test.jsonl", "held.every=2", "log_every=4"]
        options = [f"method={method}", f"seed={seed}", f"out={tmp_path}/{method}{seed}", *held]
        runs.append(str(train(tiny(*options), quiet=True)))
    assert main(["language", "curve", *runs, "--out", str(tmp_path / "curve.png")]) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "curve.json").read_text())["curves"]
    assert {method: len(curves) for method, curves in found.items()} == {"baseline": 2, "uniform": 1}
    curve = found["baseline"][0]
    assert curve["tokens"] == [0, 2 * 160, 4 * 160]  # 4 rows of 40 tokens a step
    assert curve["best"] == [min(curve["raw"][: n + 1]) for n in range(3)]
    capsys.readouterr()
    assert main(["language", "curve", runs[0], "--metric", "accuracy"]) == 2
    assert "metrics.jsonl has no accuracy, but gradient_norm, held_loss" in capsys.readouterr().err
    assert main(["language", "curve", str(root)]) == 2
    assert "not a run folder" in capsys.readouterr().err
