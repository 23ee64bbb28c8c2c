"""Parameter groups, schedules and the moving average, against what the published code returned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dino_value.backbones import create_backbone
from dino_value.objectives.dino import DINOHead
from dino_value.optim import cosine_schedule, linear_schedule, parameter_groups, update_ema
from dino_value.steps import Learner

REFERENCE = Path(__file__).parent / "data" / "reference"


@pytest.mark.parametrize(
    ("name", "start", "end", "warmup"),
    [("lr", 5e-4, 1e-6, 21), ("weight_decay", 0.04, 0.4, 0), ("momentum", 0.996, 1, 0)],
)
def test_the_published_schedules(name: str, start: float, end: float, warmup: int) -> None:
    with np.load(REFERENCE / "dino_schedules.npz") as recorded:
        expected = recorded[name]
    found = [cosine_schedule(step, 70, start, end, warmup) for step in range(70)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_one_step_of_warmup_is_the_published_one() -> None:
    """numpy.linspace(0, lr, 1) is [0]."""
    assert [cosine_schedule(step, 3, 1.0, 0.0, 1) for step in range(3)] == pytest.approx([0, 1, 0.5])


def test_a_schedule_that_is_all_warmup() -> None:
    assert [cosine_schedule(step, 4, 3.0, 0.0, 4) for step in range(4)] == pytest.approx([0, 1, 2, 3])


def test_linear_schedule() -> None:
    assert [linear_schedule(step, 0.02, 0.05, 4) for step in range(6)] == pytest.approx(
        [0.02, 0.03, 0.04, 0.05, 0.05, 0.05]
    )
    assert linear_schedule(0, 0.02, 0.05, 0) == 0.05
    assert linear_schedule(0, 0.02, 0.05, 1) == 0.05


def published_name(name: str) -> str:
    """Ours to theirs: timm's model is one level down, and the last layer is not split into length and direction."""
    return name.replace("backbone.model.", "backbone.").replace("last_layer.weight", "last_layer.weight_v")


def test_the_published_parameter_groups() -> None:
    kwargs = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    learner = Learner(create_backbone("vit_tiny_patch16_224", 32, kwargs), DINOHead(48, 40, 32, 16))
    names = {id(parameter): published_name(name) for name, parameter in learner.named_parameters()}
    decayed, plain = parameter_groups(learner)
    with np.load(REFERENCE / "dino_param_groups.npz") as recorded:
        assert {names[id(p)] for p in decayed["params"]} == set(recorded["decayed"].tolist())  # type: ignore[attr-defined]
        assert {names[id(p)] for p in plain["params"]} == set(recorded["not_decayed"].tolist())  # type: ignore[attr-defined]
    assert plain["weight_decay"] == 0


def test_every_parameter_is_in_one_group() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 1, bias=False))
    grouped = [id(p) for group in parameter_groups(module) for p in group["params"]]  # type: ignore[attr-defined]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters())


def test_moving_average() -> None:
    teacher, student = [torch.ones(3), torch.zeros(2, 2)], [torch.zeros(3), torch.ones(2, 2)]
    update_ema(teacher, student, 0.9)
    torch.testing.assert_close(teacher, [torch.full((3,), 0.9), torch.full((2, 2), 0.1)])
    update_ema(teacher, student, 1.0)
    torch.testing.assert_close(teacher, [torch.full((3,), 0.9), torch.full((2, 2), 0.1)])
    update_ema(teacher, student, 0.0)
    assert all(map(torch.equal, teacher, student))
    assert bool((student[0] == 0).all())
