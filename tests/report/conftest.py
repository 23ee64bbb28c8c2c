from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def results() -> dict[str, object]:
    """Five seeds with a win (mIoU), a null (depth RMSE) and a loss (top-1) of value against baseline."""
    return {
        "arms": {
            "baseline": {
                "miou": [0.231, 0.238, 0.229, 0.235, 0.233],
                "rmse": [0.612, 0.605, 0.618, 0.609, 0.611],
                "top1": [0.71, 0.72, 0.70, 0.715, 0.705],
            },
            "value": {
                "miou": [0.249, 0.252, 0.241, 0.257, 0.252],
                "rmse": [0.602, 0.613, 0.611, 0.612, 0.604],
                "top1": [0.69, 0.705, 0.69, 0.70, 0.695],
            },
            "random": {
                "miou": [0.232, 0.237, 0.231, 0.234, 0.236],
                "rmse": [0.611, 0.607, 0.616, 0.610, 0.612],
                "top1": [0.712, 0.718, 0.703, 0.714, 0.707],
            },
            "step0": {"miou": [0.2202] * 5, "rmse": [0.634] * 5, "top1": [0.66] * 5},
        },
        "seconds": 212.4,
    }


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, list[Path]]:
    """Two run folders an arm; the baseline logs no value."""
    made: dict[str, list[Path]] = {}
    generator = np.random.default_rng(0)
    for arm in ("value", "baseline"):
        for seed in range(2):
            folder = tmp_path / f"{arm}-{seed}"
            folder.mkdir()
            lines = []
            for step in range(40):
                record = {"step": step, "loss": 8 - step / 20 + float(generator.normal(0, 0.1))}
                if arm == "value" and step % 4 == 0:
                    record |= {"value": 1e-3 * step, "cosine": 0.001 * step, "mask_mean": 0.6}
                lines.append(json.dumps(record))
            (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            made.setdefault(arm, []).append(folder)
    return made
