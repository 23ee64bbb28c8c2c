"""DINO head, loss, targets and centre: against loops written out, and against what the published code returned."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_value.objectives.dino import DINOHead, DINOLoss
from dino_value.training.optim import linear_schedule

REFERENCE = Path(__file__).parents[1] / "data" / "reference"


def load(name: str) -> dict[str, Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """Student [5 views, 3 images, 7], teacher [2 views, 3 images, 7]."""
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(views, 3, 7, generator=rng, dtype=torch.float64) for views in (5, 2))
    return student, teacher


def test_loss_is_the_double_loop_over_views(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    loss = DINOLoss(7, student_temp=0.2).double()
    loss.center.copy_(torch.linspace(-1, 1, 7))
    total, pairs = 0.0, 0
    for t in range(2):
        for s in range(5):
            if t == s:
                continue
            for image in range(3):
                scores = ((teacher[t, image] - loss.center[0]) / 0.07).exp()
                target = scores / scores.sum()
                shares = (student[s, image] / 0.2).exp()
                total -= float((target * (shares / shares.sum()).log()).sum()) / 3
            pairs += 1
    assert pairs == 8
    assert float(loss(student, loss.targets(teacher, 0.07))) == pytest.approx(total / pairs, rel=1e-12)


def test_two_views_only(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    loss = DINOLoss(7).double()
    targets = loss.targets(teacher, 0.05)
    logs = torch.log_softmax(student[:2] / 0.1, -1)
    expected = -((targets[0] * logs[1]).sum(-1) + (targets[1] * logs[0]).sum(-1)).mean() / 2
    torch.testing.assert_close(loss(student[:2], targets), expected)


def test_the_published_loss_gradient_and_centre() -> None:
    """Four epochs in a row: the centre of one enters the next."""
    recorded = load("dino_loss")
    crops = int(recorded["ncrops"])
    loss = DINOLoss(32, float(recorded["student_temp"]), float(recorded["centre_momentum"]))
    for epoch in range(4):
        student = recorded["student"][epoch].unflatten(0, (crops, -1)).requires_grad_()
        teacher = recorded["teacher"][epoch].unflatten(0, (2, -1))
        value = loss(student, loss.targets(teacher, float(recorded["teacher_temp"][epoch])))
        (gradient,) = torch.autograd.grad(value, student)
        loss.update_center(teacher)
        torch.testing.assert_close(value, recorded["loss"][epoch], rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient.flatten(0, 1), recorded["grad"][epoch], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(loss.center[0], recorded["centre"][epoch], rtol=1e-5, atol=1e-7)


def test_the_published_teacher_temperature() -> None:
    recorded = load("dino_loss")["teacher_temp"].tolist()
    assert [linear_schedule(epoch, 0.02, 0.04, 2) for epoch in range(4)] == pytest.approx(recorded)


def test_targets_use_the_old_centre_and_are_sharp(logits: tuple[Tensor, Tensor]) -> None:
    _, teacher = logits
    loss = DINOLoss(7).double()
    before = loss.targets(teacher, 0.04)
    torch.testing.assert_close(before, torch.softmax(teacher / 0.04, -1))
    loss.update_center(teacher)
    torch.testing.assert_close(loss.center, 0.1 * teacher.mean((0, 1))[None])
    assert not torch.equal(loss.targets(teacher, 0.04), before)


def test_the_centre_survives_a_checkpoint() -> None:
    loss = DINOLoss(7)
    loss.center.normal_()
    other = DINOLoss(7)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.center, loss.center)


def test_targets_of_low_precision_are_full_precision() -> None:
    assert DINOLoss(7).targets(torch.randn(2, 3, 7).bfloat16(), 0.04).dtype == torch.float32


def test_targets_keep_double_precision(logits: tuple[Tensor, Tensor]) -> None:
    assert DINOLoss(7).double().targets(logits[1], 0.04).dtype == torch.float64


@pytest.fixture
def published_head() -> tuple[DINOHead, dict[str, Tensor]]:
    """The published head with its weight-normalised last layer (weight_v of any length, gain weight_g = 1)."""
    state = load("dino_head")
    head = DINOHead(48, out_dim=40, hidden_dim=32, bottleneck_dim=16)
    ours = {name: value for name, value in state.items() if name.startswith("mlp.")}
    head.load_state_dict({**ours, "last_layer.weight": state["last_layer.weight_v"]})
    return head, state


def test_the_published_head(published_head: tuple[DINOHead, dict[str, Tensor]]) -> None:
    head, state = published_head
    recorded = load("dino_vit")
    assert bool((state["last_layer.weight_g"] == 1).all())
    torch.testing.assert_close(head(recorded["cls32"]), recorded["head_of_cls32"], rtol=1e-5, atol=1e-6)


def test_the_last_layer_has_the_gradient_of_weight_norm(
    published_head: tuple[DINOHead, dict[str, Tensor]],
) -> None:
    head, state = published_head
    features = load("dino_vit")["cls32"]
    twin = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(16, 40, bias=False), dim=0)
    parametrization = twin.parametrizations.weight
    with torch.no_grad():
        parametrization.original0.fill_(1)
        parametrization.original1.copy_(3 * state["last_layer.weight_v"])  # any length
        head.last_layer.weight.mul_(3)
    cotangent = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    (head(features) * cotangent).sum().backward()
    (twin(torch.nn.functional.normalize(head.mlp(features), dim=-1)) * cotangent).sum().backward()
    torch.testing.assert_close(head.last_layer.weight.grad, parametrization.original1.grad)


def test_logits_are_cosines() -> None:
    head = DINOHead(6, out_dim=9, hidden_dim=8, bottleneck_dim=4)
    assert head(100 * torch.randn(5, 6)).abs().max() <= 1 + 1e-6


def test_uniform_prediction_costs_the_logarithm_of_the_prototypes() -> None:
    loss = DINOLoss(16)
    targets = loss.targets(torch.randn(2, 3, 16), 0.04)
    assert float(loss(torch.zeros(4, 3, 16), targets)) == pytest.approx(math.log(16), rel=1e-6)
