"""The benchmark of several processes, on one."""

import json
from pathlib import Path

import pytest

from dino_value.eval.scaling import main

TINY = ["backbone.name=vit_tiny_patch16_224", "backbone.kwargs={embed_dim: 48, depth: 3, num_heads: 3}"]
TINY += ["objective.hidden_dim=64", "objective.out_dim=128", "views.global_size=32", "views.local_size=16"]


@pytest.mark.slow  # starts a process
def test_images_a_second_and_memory(tmp_path: Path) -> None:
    assert main(["--arms", "1x1", "--rounds", "2", "--steps", "1", "--json", str(tmp_path / "found.json"), *TINY]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["1x1"]
    assert len(found["images_per_second"]) == 2
    assert found["of_first"] == [1, 1]
    # Student, gradient, two moments, teacher; and a step counter for each tensor.
    assert found["held"] == pytest.approx(5 * 4 * 179_392, rel=1e-2)
    assert found["peak"] > found["held"]
