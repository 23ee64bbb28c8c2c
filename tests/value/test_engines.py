"""Both engines against the mixed second derivative written out in plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dino_value.value import (
    ENGINES,
    Engine,
    Gradient,
    double_backward,
    finite_difference,
    inner,
    norm,
    pre_gradient,
    value_step,
)
from dino_value.value.directions import cosine, dot
from dino_value.value.engines import linear

# Every way in which φ reaches the loss.
CASES: dict[str, dict[str, Any]] = {
    "masked teacher, constant targets": {},
    "through the teacher": {"through_teacher": True},
    "plain teacher": {"teacher_views": "plain"},
    "plain teacher, nothing to go through": {"teacher_views": "plain", "through_teacher": True},
    "no local views": {"local": 0},
    "all crops": {"crops": "all"},
    "all crops, through the teacher": {"crops": "all", "through_teacher": True},
    "mean fill": {"fill": "mean"},
    "noise fill, all crops": {"fill": "noise", "crops": "all"},
    "batch-norm in the head": {"batch_norm": True},
    "rotary positions": {"model": "vit_small_patch16_dinov3"},
    "rotary positions, all crops": {"model": "vit_small_patch16_dinov3", "crops": "all", "through_teacher": True},
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
# `linear` has its own tests, with the terms that it wants: test_terms.
engines = pytest.mark.parametrize("engine", [double_backward, finite_difference])


def test_the_registry() -> None:
    assert {"linear": linear, "finite_difference": finite_difference, "double_backward": double_backward} == ENGINES
    assert list(ENGINES) == ["linear", "finite_difference", "double_backward"]  # the cheapest first


def error(found: Gradient, expected: Gradient) -> float:
    """Relative, over all tensors."""
    return float(norm(list(torch._foreach_sub(found, expected))) / norm(expected))


def reference(problem: Any, u: Gradient) -> tuple[float, Gradient]:
    """V and ∂(−V)/∂φ."""
    value = inner(u, problem.plain_gradient())
    return value.item(), list(torch.autograd.grad(-value, problem.phi))


@cases
def test_double_backward_is_exact(problem: Callable[..., Any], case: dict[str, Any]) -> None:
    p = problem(**case)
    u = p.direction()
    value, gradient = reference(p, u)
    task = p.task()
    found = double_backward(task, task.trunk(), p.theta, u, p.phi)
    assert found.item() == pytest.approx(value, rel=1e-8)
    assert error(p.take_phi_gradient(), gradient) < 1e-8


@cases
def test_finite_difference_in_float64(problem: Callable[..., Any], case: dict[str, Any]) -> None:
    p = problem(**case)
    u = p.direction()
    value, gradient = reference(p, u)
    task = p.task()
    found = finite_difference(task, task.trunk(), p.theta, u, p.phi, radius=1e-4)
    assert found.item() == pytest.approx(value, rel=1e-6)
    assert error(p.take_phi_gradient(), gradient) < 1e-6


@cases
def test_finite_difference_in_float32_at_the_default_radius(problem: Callable[..., Any], case: dict[str, Any]) -> None:
    exact = problem(**case)
    value, gradient = reference(exact, exact.direction())
    p = problem(dtype=torch.float32, **case)
    task = p.task()
    found = finite_difference(task, task.trunk(), p.theta, p.direction(), p.phi)
    assert found.item() == pytest.approx(value, rel=1e-2)
    assert error([part.double() for part in p.take_phi_gradient()], gradient) < 1e-2


def test_the_error_of_finite_differences_falls_with_the_square_of_the_radius(problem: Callable[..., Any]) -> None:
    p = problem(through_teacher=True)
    u = p.direction()
    _, gradient = reference(p, u)
    errors = []
    for radius in (1e-1, 1e-2):
        task = p.task()
        finite_difference(task, task.trunk(), p.theta, u, p.phi, radius=radius)
        errors.append(error(p.take_phi_gradient(), gradient))
    assert 50 < errors[0] / errors[1] < 200


@engines
def test_the_penalty_is_added(problem: Callable[..., Any], engine: Engine) -> None:
    p = problem()
    u = p.direction()
    value, gradient = reference(p, u)
    task = p.task()
    hidden = task.trunk()
    assert task.masks is not None
    penalty = 3 * (task.masks.mean() - 0.2).square()
    own = torch.autograd.grad(penalty, p.phi, retain_graph=True)
    found = engine(task, hidden, p.theta, u, p.phi, penalty)
    assert found.item() == pytest.approx(value, rel=1e-3)  # V alone, without the penalty
    assert not found.requires_grad
    assert error(p.take_phi_gradient(), [a + b for a, b in zip(gradient, own, strict=True)]) < 1e-3


@engines
def test_the_gradient_accumulates(problem: Callable[..., Any], engine: Engine) -> None:
    p = problem()
    for _ in range(2):
        task = p.task()
        engine(task, task.trunk(), p.theta, p.direction(), p.phi)
    twice = p.take_phi_gradient()
    task = p.task()
    engine(task, task.trunk(), p.theta, p.direction(), p.phi)
    assert error(twice, [2 * part for part in p.take_phi_gradient()]) < 1e-10


@engines
@pytest.mark.parametrize("case", [{}, {"through_teacher": True, "crops": "all"}])
def test_the_learner_is_never_touched(problem: Callable[..., Any], engine: Engine, case: dict[str, Any]) -> None:
    p = problem(**case)
    learners = [*p.student.parameters(), *p.teacher.parameters()]
    marks = [torch.full_like(parameter, 7.0) for parameter in learners]
    for parameter, mark in zip(learners, marks, strict=True):
        parameter.grad = mark
    before = [parameter.detach().clone() for parameter in learners]
    centre = p.loss.center.clone()
    value_step(p.task(), p.theta, p.direction(), cosine, engine, p.phi)
    for parameter, mark, old in zip(learners, marks, before, strict=True):
        assert parameter.grad is mark
        assert bool((mark == 7).all())
        assert torch.equal(parameter, old)
    assert torch.equal(p.loss.center, centre)


@engines
def test_only_phi_receives_a_gradient(problem: Callable[..., Any], engine: Engine) -> None:
    p = problem()
    first, rest = p.phi[:1], p.phi[1:]
    task = p.task()
    engine(task, task.trunk(), p.theta, p.direction(), first)
    assert first[0].grad is not None
    assert all(parameter.grad is None for parameter in [*rest, *p.student.parameters()])


@cases
def test_pre_gradient_is_the_learners_gradient(problem: Callable[..., Any], case: dict[str, Any]) -> None:
    p = problem(**case)
    task = p.task()
    found = pre_gradient(task, task.trunk(), p.theta)
    assert error(found, [part.detach() for part in p.plain_gradient()]) < 1e-10
    assert not any(part.requires_grad for part in found)


def test_a_parameter_that_the_tail_does_not_use_has_a_zero_gradient() -> None:
    phi = nn.Parameter(torch.tensor([0.3, -0.7, 1.1]))
    parameters = {"weight": torch.linspace(0.5, 1.5, 5), "unused": torch.ones(2)}
    task = HalfTask(phi)
    g_pre = pre_gradient(task, task.trunk(), parameters)
    assert g_pre[0].norm() > 0
    assert g_pre[1].tolist() == [0, 0]
    u = [torch.linspace(-1, 2, 5), torch.ones(2)]
    values = [engine(task, task.trunk(), parameters, u, [phi]) for engine in (double_backward, finite_difference)]
    for value in values:
        assert value.item() == pytest.approx(inner(u, g_pre).item(), rel=1e-5)


def test_value_step_reports_value_and_cosine(problem: Callable[..., Any]) -> None:
    p = problem()
    g_down, g_pre = p.direction(), [part.detach() for part in p.plain_gradient()]
    for direction in (dot, cosine):  # V is what it is, whatever φ climbs
        step = value_step(p.task(), p.theta, g_down, direction, double_backward, p.phi)
        flat_down, flat_pre = (torch.cat([part.flatten() for part in g]) for g in (g_down, g_pre))
        assert step.value.item() == pytest.approx(float(flat_down @ flat_pre), rel=1e-9)
        assert step.cosine.item() == pytest.approx(float(flat_down @ flat_pre / flat_down.norm() / flat_pre.norm()))
        assert step.g_down_norm.item() == pytest.approx(float(flat_down.norm()))
        assert step.g_pre_norm.item() == pytest.approx(float(flat_pre.norm()))


@engines
def test_a_loss_that_phi_does_not_reach_is_refused(problem: Callable[..., Any], engine: Engine) -> None:
    p = problem()
    p.designer.requires_grad_(False)
    task = p.task()
    with pytest.raises(ValueError, match="does not depend on the designer"):
        engine(task, task.trunk(), p.theta, p.direction(), p.phi)


@engines
def test_under_autocast(problem: Callable[..., Any], engine: Engine) -> None:
    exact = problem()
    value, gradient = reference(exact, exact.direction())
    p = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        task = p.task()
        found = engine(task, task.trunk(), p.theta, p.direction(), p.phi)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(value, rel=0.2)  # the trunk's own rounding, not the engine's
    got = [part.double() for part in p.take_phi_gradient()]
    assert float(inner(got, gradient) / norm(got) / norm(gradient)) > 0.99


class HalfTask:
    """A trunk that hands over bfloat16; the tail is quadratic in θ: finite differences are exact but for rounding."""

    def __init__(self, phi: Tensor) -> None:
        self.phi = phi

    def trunk(self) -> tuple[Tensor, ...]:
        return (torch.outer(self.phi, torch.linspace(-1, 1, 5)).bfloat16(),)

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        assert hidden[0].dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        return (hidden[0] @ parameters["weight"]).square().mean()


@engines
def test_a_bfloat16_trunk(engine: Engine) -> None:
    theta, u = torch.linspace(0.5, 1.5, 5), torch.linspace(-1, 2, 5)
    phi = nn.Parameter(torch.tensor([0.3, -0.7, 1.1]))
    task = HalfTask(phi)
    with torch.autocast("cpu", torch.bfloat16):
        found = engine(task, task.trunk(), {"weight": theta}, [u], [phi])
    # L = mean (φ_i a)² with a = ⟨x, θ⟩, so V = 2 a ⟨x, u⟩ mean φ².
    x = torch.linspace(-1, 1, 5)
    slope = float(2 * (x @ theta) * (x @ u))
    assert found.item() == pytest.approx(slope * float(phi.detach().square().mean()), rel=1e-2)
    assert phi.grad is not None
    assert torch.allclose(phi.grad, -slope * 2 * phi.detach() / 3, rtol=2e-2)
