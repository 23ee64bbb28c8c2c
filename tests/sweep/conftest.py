"""A sweep over the tiny configuration, whose trials take a second or two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dino_value.sweep.spec import Sweep, load_sweep


@pytest.fixture
def spec(tiny_yaml: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a specification; keywords replace its keys, None leaves one out."""

    def write(**changes: Any) -> Path:
        evaluation = {"size": 16, "steps": 2, "batch": 4, "device": "cpu"}
        content = {
            "config": str(tiny_yaml),
            "overrides": {"steps": 3, "value.warmup": 0},
            "space": {
                "optim.lr": {"low": 1.0e-4, "high": 1.0e-2, "log": True},
                "value.period": [1, 2],
                "α": {"seg": {"feedback.seg.weight": 2.0}, "depth": {"feedback.depth.weight": 4.0}},
            },
            "evaluations": {"seg": evaluation, "depth": {**evaluation, "no_eigen_crop": True}},
            "objectives": {"seg.miou": "maximize", "depth.rmse": "minimize"},
            "trials": 3,
            "startup": 2,
            "out": str(tmp_path / "sweep"),
            **changes,
        }
        path = tmp_path / "spec.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
        )
        return path

    return write


@pytest.fixture
def sweep(spec: Callable[..., Path]) -> Callable[..., Sweep]:
    """The same, loaded."""
    return lambda **changes: load_sweep(str(spec(**changes)))
