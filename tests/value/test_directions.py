"""Directions: what they are, and what φ climbs when it follows them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dino_value.value import DIRECTIONS, double_backward, inner, norm, random_like, value_step
from dino_value.value.directions import AdamState, adam, adam_update, cosine, dot, random, weighted_sum


@pytest.fixture
def gradients() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    rng = torch.Generator().manual_seed(1)
    shapes = [(4, 3), (7,), (1, 2, 5)]
    return tuple([torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes] for _ in range(2))  # type: ignore[return-value]


def test_the_registry() -> None:
    assert {"dot": dot, "cosine": cosine, "random": random} == DIRECTIONS


def test_inner_and_norm(gradients: Any) -> None:
    a, b = (torch.cat([part.flatten() for part in g]) for g in gradients)
    assert inner(*gradients).item() == pytest.approx(float(a @ b))
    assert norm(gradients[0]).item() == pytest.approx(float(a.norm()))


def test_dot_is_g_down(gradients: Any) -> None:
    g_down, g_pre = gradients
    assert all(map(torch.equal, dot(g_down, g_pre), g_down))


def test_cosine_is_the_gradient_of_the_cosine(gradients: Any) -> None:
    g_down, g_pre = gradients
    leaves = [part.clone().requires_grad_() for part in g_pre]
    objective = inner(g_down, leaves) / (norm(g_down) * norm(leaves))
    for found, expected in zip(cosine(g_down, g_pre), torch.autograd.grad(objective, leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_cosine_is_blind_to_scale(gradients: Any) -> None:
    g_down, g_pre = gradients
    assert abs(inner(cosine(g_down, g_pre), g_pre)) < 1e-12  # no reward for a longer g_pre
    for found, expected in zip(cosine([5 * g for g in g_down], g_pre), cosine(g_down, g_pre), strict=True):
        torch.testing.assert_close(found, expected)


def test_cosine_of_nothing_is_finite(gradients: Any) -> None:
    zero = [torch.zeros_like(part) for part in gradients[0]]
    assert all(bool(part.isfinite().all()) for part in cosine(zero, gradients[1]))


@pytest.mark.parametrize("case", [{}, {"through_teacher": True, "crops": "all"}])
def test_phi_climbs_the_cosine(problem: Callable[..., Any], case: dict[str, Any]) -> None:
    """The frozen direction gives φ the same gradient as the cosine objective differentiated as a whole."""
    p = problem(**case)
    g_down, g_pre = p.direction(), p.plain_gradient()
    objective = inner(g_down, g_pre) / (norm(g_down) * norm(g_pre))
    expected = torch.autograd.grad(-objective, p.phi)
    value_step(p.task(), p.theta, g_down, cosine, double_backward, p.phi)
    for found, want in zip(p.take_phi_gradient(), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-12)


def test_random_like_has_the_norm_of_each_tensor(gradients: Any) -> None:
    g_down, _ = gradients
    noise = random_like(g_down, torch.Generator().manual_seed(0))
    for found, like in zip(noise, g_down, strict=True):
        assert (found.shape, found.dtype) == (like.shape, like.dtype)
        assert found.norm().item() == pytest.approx(like.norm().item())
    assert abs(inner(noise, g_down)) < 0.9 * norm(noise) * norm(g_down)


def test_random_like_follows_its_generator(gradients: Any) -> None:
    g_down, _ = gradients
    first, again, other = (random_like(g_down, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_random_like_does_not_look_at_the_direction(gradients: Any) -> None:
    """The control sees norms only: another g_down of equal norms gives the same draw."""
    g_down, _ = gradients
    mirrored = [-part.flip(0) for part in g_down]
    for found, expected in zip(
        random_like(mirrored, torch.Generator().manual_seed(0)),
        random_like(g_down, torch.Generator().manual_seed(0)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_random_like_of_a_zero_gradient_is_zero() -> None:
    """A scope parameter that the feedback does not reach."""
    assert float(random_like([torch.zeros(3)])[0].norm()) == 0


def test_weighted_sum_leaves_its_input(gradients: Any) -> None:
    first, second = gradients
    copies = [part.clone() for part in first]
    for weights in ([0.5, 8.0], [torch.tensor(0.5), torch.tensor(8.0)]):
        for found, a, b in zip(weighted_sum([first, second], weights), first, second, strict=True):
            torch.testing.assert_close(found, 0.5 * a + 8.0 * b)
    assert all(map(torch.equal, first, copies))


def test_cosine_of_two_zeros_is_zero(gradients: Any) -> None:
    zero = [torch.zeros_like(part) for part in gradients[0]]
    for pair in ((zero, zero), (gradients[0], zero)):
        assert all(not part.any() for part in cosine(*pair))


# --- the direction of an Adam learner


HYPER = {"betas": (0.8, 0.95), "eps": 1e-3}  # far from the defaults, so that every term of the derivative is seen


def _trained(
    steps: int = 3, optimizer: Any = torch.optim.AdamW, **options: Any
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Parameters in two groups of different hyperparameters, the second one step younger than the first."""
    rng = torch.Generator().manual_seed(5)
    parameters = [
        torch.nn.Parameter(torch.randn(s, generator=rng, dtype=torch.float64)) for s in [(4, 3), (7,), (1, 2, 5), ()]
    ]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "betas": (0.5, 0.9), "eps": 1e-2}]
    learner = optimizer(groups, lr=0.1, **{"weight_decay": 0.0, **HYPER, **options})
    for number in range(steps):
        for parameter in parameters if number else parameters[:2]:
            parameter.grad = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        learner.step()
        learner.zero_grad()
    return parameters, learner


def _random(like: list[torch.nn.Parameter], seed: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(part.shape, generator=rng, dtype=torch.float64) for part in like]


def _realised(
    parameters: list[torch.nn.Parameter], learner: torch.optim.Optimizer, gradient: list[torch.Tensor]
) -> list[torch.Tensor]:
    """What one step of a copy of the real optimizer on `gradient` adds to the parameters, over its learning rate."""
    moved, twin = copy.deepcopy((parameters, learner))
    for parameter, part in zip(moved, gradient, strict=True):
        parameter.grad = part.clone()
    twin.step()
    rate = learner.param_groups[0]["lr"]
    return [(after.detach() - before.detach()) / rate for before, after in zip(parameters, moved, strict=True)]


def _written_out(
    parameters: list[torch.nn.Parameter], learner: torch.optim.Optimizer, gradient: list[torch.Tensor]
) -> list[torch.Tensor]:
    """−m̂/(√v̂ + ε) of the next step (arXiv 1412.6980, algorithm 1), differentiable in `gradient`."""
    updates = []
    for parameter, g in zip(parameters, gradient, strict=True):
        group = next(group for group in learner.param_groups if any(parameter is p for p in group["params"]))
        memory = learner.state[parameter]
        beta1, beta2 = group["betas"]
        step = float(memory["step"]) + 1
        mean = (beta1 * memory["exp_avg"] + (1 - beta1) * g) / (1 - beta1**step)
        square = (beta2 * memory["exp_avg_sq"] + (1 - beta2) * g**2) / (1 - beta2**step)
        updates.append(-mean / (square.sqrt() + group["eps"]))
    return updates


KINDS = [{}, {"fused": True}, {"capturable": False, "foreach": True}]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_update_is_the_real_optimizers(optimizer: Any, options: dict[str, Any]) -> None:
    parameters, learner = _trained(optimizer=optimizer, **options)
    g_pre = _random(parameters, 6)
    found = adam_update(AdamState.of(learner, parameters), g_pre, scale=0.3)
    for update, expected in zip(found, _realised(parameters, learner, [0.3 * g for g in g_pre]), strict=True):
        torch.testing.assert_close(update, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 0.3, torch.tensor(0.3, dtype=torch.float64)], ids=str)
def test_adam_is_the_gradient_through_the_update(scale: Any) -> None:
    parameters, learner = _trained()
    g_down, g_pre = _random(parameters, 7), _random(parameters, 6)
    leaves = [g.clone().requires_grad_() for g in g_pre]
    value = -inner(g_down, _written_out(parameters, learner, [scale * g for g in leaves]))
    found = adam(AdamState.of(learner, parameters), scale)(g_down, g_pre)
    for part, expected in zip(found, torch.autograd.grad(value, leaves), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-11)


def test_adam_is_the_slope_of_the_real_optimizers_step() -> None:
    """⟨u, δ⟩ against the change of −⟨g_down, AdamW's own step⟩/η from g_pre − εδ to g_pre + εδ."""
    parameters, learner = _trained()
    g_down, g_pre, delta = (_random(parameters, seed) for seed in (7, 6, 8))
    epsilon = 1e-5

    def value(sign: float) -> torch.Tensor:
        moved = [g + sign * epsilon * d for g, d in zip(g_pre, delta, strict=True)]
        return -inner(g_down, _realised(parameters, learner, moved))

    u = adam(AdamState.of(learner, parameters))(g_down, g_pre)
    slope = (value(1) - value(-1)) / (2 * epsilon)
    torch.testing.assert_close(inner(u, delta), slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_at_float32_and_the_usual_hyperparameters(optimizer: Any) -> None:
    """β₂ = .999 and few steps: where 1 − β₂ᵗ loses its digits."""
    weight = torch.nn.Parameter(torch.zeros(50))
    learner = optimizer([weight], lr=1e-3, weight_decay=0.0)
    weight.grad = torch.linspace(-1, 1, 50) * 1e-3
    learner.step()
    g_down, g_pre = [torch.ones(50)], [torch.linspace(2, -1, 50) * 1e-3]
    leaf = g_pre[0].double().requires_grad_()
    memory = {key: part.double() for key, part in learner.state[weight].items()}
    exact = SimpleNamespace(param_groups=learner.param_groups, state={weight: memory})
    (update,) = _written_out([weight], exact, [leaf])  # type: ignore[arg-type]
    (expected,) = torch.autograd.grad(-update.sum(), leaf)
    (found,) = adam(AdamState.of(learner, [weight]))(g_down, g_pre)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-4 * float(expected.abs().max()) * 1e-2)


def test_adam_and_plain_values_can_disagree_in_sign() -> None:
    """One steep coordinate decides the plain value; Adam levels the coordinates, and the loss moves the other way."""
    theta = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    learner = torch.optim.AdamW([theta], lr=1e-3, weight_decay=0.0)
    g_pre = [torch.tensor([10.0, 0.1, 0.1], dtype=torch.float64)]
    theta.grad = g_pre[0].clone()
    learner.step()
    downhill = [torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)]  # of the downstream loss ⟨g_down, θ⟩
    plain = inner(downhill, g_pre)
    state = AdamState.of(learner, [theta])
    predicted = -inner(downhill, adam_update(state, g_pre))
    realised = -inner(downhill, _realised([theta], learner, g_pre))
    assert plain > 0 > predicted
    torch.testing.assert_close(predicted, realised, rtol=1e-6, atol=0)
    # And coordinate by coordinate: after a small steady past, a gradient that jumps is answered with a smaller step
    # the larger it is, so u opposes g_down there.
    (u,) = adam(state)([torch.ones(3, dtype=torch.float64)], [torch.tensor([1e4, 1e-3, -1e2], dtype=torch.float64)])
    assert u[0] < 0 < u[1]
    assert u[2] > 0


def test_phi_climbs_the_adam_value(problem: Callable[..., Any]) -> None:
    """The frozen direction gives φ the same gradient as −⟨g_down, Adam's step⟩/η differentiated as a whole."""
    p = problem()
    module = p.student.backbone
    named = dict(module.named_parameters())
    parameters = [named[name] for name in p.scope.names]
    learner = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.0)
    for parameter, part in zip(parameters, _random(parameters, 9), strict=True):
        parameter.grad = 0.1 * part
    before = [parameter.detach().clone() for parameter in parameters]
    learner.step()
    learner.zero_grad()
    with torch.no_grad():
        torch._foreach_copy_(parameters, before)
    g_down = p.direction()
    objective = inner(g_down, _written_out(parameters, learner, p.plain_gradient()))  # = −V
    expected = torch.autograd.grad(objective, p.phi)
    value_step(p.task(), p.theta, g_down, adam(AdamState.of(learner, parameters)), double_backward, p.phi)
    for found, want in zip(p.take_phi_gradient(), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-10)


def test_adam_leaves_the_optimizer_alone_and_follows_it() -> None:
    parameters, learner = _trained()
    g_down, g_pre = _random(parameters, 7), _random(parameters, 6)
    state, before = AdamState.of(learner, parameters), copy.deepcopy(learner.state_dict())
    first = adam(state)(g_down, g_pre)
    after = learner.state_dict()
    for index, memory in before["state"].items():
        assert all(torch.equal(part, after["state"][index][key]) for key, part in memory.items())
    for parameter, part in zip(parameters, g_pre, strict=True):
        parameter.grad = part
    learner.step()
    fresh = adam(AdamState.of(learner, parameters))(g_down, g_pre)
    assert not any(map(torch.equal, first, fresh))
    for found, expected in zip(adam(state)(g_down, g_pre), fresh, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_adam_of_nothing_is_zero(eps: float) -> None:
    """A zero g_down; and, where no gradient was ever seen, a finite direction."""
    weight = torch.nn.Parameter(torch.zeros(4))
    learner = torch.optim.AdamW([weight], eps=eps)
    weight.grad = torch.zeros(4)
    if eps:
        learner.step()
    else:  # its own step would be 0/0
        learner.state[weight] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    direction = adam(AdamState.of(learner, [weight]))
    assert not direction([torch.zeros(4)], [torch.ones(4)])[0].any()
    assert not direction([torch.zeros(4)], [torch.zeros(4)])[0].any()
    assert bool(direction([torch.ones(4)], [torch.zeros(4)])[0].isfinite().all())
    assert bool(adam_update(AdamState.of(learner, [weight]), [torch.zeros(4)])[0].isfinite().all())


def test_adam_before_the_first_step() -> None:
    parameters, learner = _trained(steps=0)
    with pytest.raises(ValueError, match="shape \\[4, 3\\], has no optimizer state yet; take one learner step first"):
        AdamState.of(learner, parameters)
    parameters, learner = _trained(steps=1)  # the second group has not moved
    with pytest.raises(ValueError, match=r"parameter 2 .* no optimizer state yet"):
        AdamState.of(learner, parameters)


def test_adam_of_a_parameter_that_the_optimizer_does_not_hold() -> None:
    parameters, learner = _trained()
    with pytest.raises(ValueError, match="parameter 1 of the scope, shape \\[7\\], is in no group"):
        AdamState.of(learner, [parameters[0], parameters[1].detach()])


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_adam_refuses_what_it_does_not_know(option: str) -> None:
    parameters, learner = _trained(**{option: True})
    with pytest.raises(ValueError, match=f"{option}=True"):
        AdamState.of(learner, parameters)


def test_adam_refuses_coupled_decay_and_ignores_the_decoupled() -> None:
    parameters, learner = _trained(optimizer=torch.optim.Adam, weight_decay=0.1)
    with pytest.raises(ValueError, match="decoupled"):
        AdamState.of(learner, parameters)
    parameters, learner = _trained(weight_decay=0.1)
    AdamState.of(learner, parameters)


def test_adam_refuses_another_optimizer() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="not SGD; choose dot or cosine"):
        AdamState.of(torch.optim.SGD([weight], lr=0.1), [weight])
