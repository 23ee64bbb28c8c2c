"""The one-step value probe."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dino_value.value import Gradient
from dino_value.value.probing import (
    ProbeResult,
    Trial,
    bootstrap_interval,
    optimizer_update,
    pearson,
    probe,
    sgd_update,
    slope,
)

SIZE = 6


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Quadratic:
    """L_down = ½ (θ − θ*)ᵀ A (θ − θ*), with θ in two parts; g_down is exact."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        root = torch.randn(SIZE, SIZE, generator=rng(0), dtype=torch.float64)
        self.curvature = (root @ root.T / SIZE).to(dtype)
        self.best = torch.randn(SIZE, generator=rng(1), dtype=torch.float64).to(dtype)
        theta = torch.randn(SIZE, generator=rng(2), dtype=torch.float64).to(dtype)
        self.theta = {"a": theta[:2], "b": theta[2:].view(2, 2)}

    def offset(self, parameters: dict[str, Tensor]) -> Tensor:
        return torch.cat([parameters["a"], parameters["b"].flatten()]) - self.best

    def loss(self, parameters: dict[str, Tensor]) -> Tensor:
        assert not torch.is_grad_enabled()
        offset = self.offset(parameters)
        return 0.5 * offset @ self.curvature @ offset

    def split(self, vector: Tensor) -> Gradient:
        return [vector[:2], vector[2:].view(2, 2)]

    @property
    def g_down(self) -> Gradient:
        return self.split(self.curvature @ self.offset(self.theta))

    def g_pre(self, seed: int) -> Gradient:
        """As of another unlabeled batch each time."""
        return self.split(torch.randn(SIZE, generator=rng(100 + seed), dtype=torch.float64).to(self.best.dtype))

    def trials(self, eta: float, count: int = 40) -> ProbeResult:
        steps = [(g, sgd_update(g, eta)) for g in map(self.g_pre, range(count))]
        return ProbeResult.of(probe(self.loss, self.theta, self.g_down, g, step) for g, step in steps)


def test_a_trial_by_hand() -> None:
    q = Quadratic()
    g, eta = q.g_pre(0), 0.1
    flat = torch.cat([part.flatten() for part in g])
    trial = probe(q.loss, q.theta, q.g_down, g, sgd_update(g, eta))
    value = flat @ q.curvature @ q.offset(q.theta)
    torch.testing.assert_close(trial.value, value)
    torch.testing.assert_close(trial.predicted, eta * value)  # ηV
    torch.testing.assert_close(trial.realised, eta * value - eta**2 / 2 * flat @ q.curvature @ flat)
    assert trial.realised.shape == ()


def test_a_loss_known_already_is_not_taken_again() -> None:
    q = Quadratic()
    g = q.g_pre(0)
    expected = probe(q.loss, q.theta, q.g_down, g, sgd_update(g, 0.1))
    with torch.no_grad():
        before = q.loss(q.theta)
    calls = []

    def counted(parameters: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        return q.loss(parameters)

    assert probe(counted, q.theta, q.g_down, g, sgd_update(g, 0.1), before) == expected
    assert len(calls) == 1


def test_a_tiny_step_is_foretold_exactly_and_a_large_one_is_not() -> None:
    q = Quadratic()
    tiny, large = q.trials(1e-6), q.trials(3.0)
    assert pearson(tiny.predicted, tiny.realised) > 1 - 1e-9
    assert slope(tiny.predicted, tiny.realised) == pytest.approx(1, abs=1e-4)
    assert pearson(large.predicted, large.realised) < 0.9
    low, high = bootstrap_interval(tiny.predicted, tiny.realised)
    assert 1 - 1e-8 < low <= high <= 1


def test_the_shuffled_control_finds_nothing() -> None:
    trials = Quadratic().trials(1e-3, count=200)
    shuffled = trials.predicted[torch.randperm(200, generator=rng(0))]
    assert abs(pearson(shuffled, trials.realised)) < 3 / 200**0.5
    low, high = bootstrap_interval(shuffled, trials.realised)
    assert low < 0 < high


def test_float32_losses_are_subtracted_in_float64_and_half_precision_is_refused() -> None:
    q = Quadratic(torch.float32)
    g = q.g_pre(0)
    with torch.autocast("cpu", torch.bfloat16):  # the caller's autocast does not reach the losses
        trial = probe(q.loss, q.theta, q.g_down, g, sgd_update(g, 0.05))
    assert trial.realised.dtype == torch.float64
    exact = Quadratic()
    expected = probe(exact.loss, exact.theta, exact.g_down, exact.g_pre(0), sgd_update(exact.g_pre(0), 0.05))
    torch.testing.assert_close(trial.realised, expected.realised, rtol=1e-4, atol=0)

    q.theta["b"] = q.theta["b"].bfloat16()
    with pytest.raises(ValueError, match=r"b is torch\.bfloat16, too coarse for one step"):
        probe(q.loss, q.theta, q.g_down, g, sgd_update(g, 0.05))


OPTIMIZERS: dict[str, Any] = {
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_the_update_of_a_real_optimizer(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))  # it wraps optimizer.step
    x = torch.randn(5, 3, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        schedule.step()
    scope = list(model[2].parameters())
    g_pre = [torch.randn_like(parameter) for parameter in scope]
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    grads = [parameter.grad for parameter in model.parameters()]

    update = optimizer_update(optimizer, scope, g_pre)

    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    assert all(now is before for now, before in zip((p.grad for p in model.parameters()), grads, strict=True))
    for parameter in model.parameters():
        parameter.grad = None
    for parameter, gradient in zip(scope, g_pre, strict=True):
        parameter.grad = gradient
    optimizer.step()
    for parameter, moved, before in zip(scope, update, list(weights.values())[2:], strict=True):
        torch.testing.assert_close(before + moved, parameter.detach(), rtol=0, atol=1e-15)
        assert float(moved.abs().min()) > 0


def test_an_optimizer_that_does_not_hold_the_scope() -> None:
    held, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(ValueError, match=r"does not hold tensors \[1\] of S"):
        optimizer_update(torch.optim.SGD([held], lr=0.1), [held, other], [torch.ones(2)] * 2)


def test_pearson_and_slope_against_numpy_form() -> None:
    x, y = torch.randn(2, 30, generator=rng(3), dtype=torch.float64)
    y = x + y
    both = torch.stack([x, y])
    assert pearson(x, y) == pytest.approx(float(torch.corrcoef(both)[0, 1]))
    cov = torch.cov(both)
    assert slope(x, y) == pytest.approx(float(cov[0, 1] / cov[0, 0]))
    assert pearson(1e-9 * x, -5 * y + 3) == pytest.approx(-pearson(x, y))


@pytest.mark.parametrize("function", [pearson, slope, bootstrap_interval])
@pytest.mark.parametrize(
    ("predicted", "realised", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0], "at least three trials, not 2"),
        ([0.1, 0.1, 0.1], [1.0, 2.0, 3.0], "the predicted decrease is the same in all trials"),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], "the realised decrease is the same in all trials"),
        ([1.0, 2.0, 3.0], [1.0, float("nan"), 3.0], "realised decrease of some trial is not finite"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], r"predicted \[3\] and realised \[2\]"),
    ],
)
def test_trials_without_a_correlation(
    function: Any, predicted: list[float], realised: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(torch.tensor(predicted, dtype=torch.float64), torch.tensor(realised, dtype=torch.float64))


def test_no_trials() -> None:
    with pytest.raises(ValueError, match="no trials"):
        ProbeResult.of([])


def test_a_result_keeps_its_columns_apart() -> None:
    result = ProbeResult.of(Trial(*(torch.tensor(v + step) for v in (1.0, 2.0, 3.0))) for step in (0.0, 10.0))
    assert [column.tolist() for column in result] == [[1, 11], [2, 12], [3, 13]]
    assert all(column.dtype == torch.float64 for column in result)


@pytest.mark.parametrize("arguments", [{"level": 1.0}, {"level": 0.0}, {"resamples": 0}])
def test_a_bootstrap_that_cannot_be(arguments: dict[str, Any]) -> None:
    x = torch.arange(5.0)
    with pytest.raises(ValueError, match="bootstrap: level"):
        bootstrap_interval(x, x.square(), **arguments)


def test_the_interval_against_a_plain_loop() -> None:
    x, y = torch.randn(2, 12, generator=rng(4), dtype=torch.float64)
    y = y + 0.5 * x
    draws = torch.randint(12, (300, 12), generator=rng(9))
    values = sorted(float(torch.corrcoef(torch.stack([x[row], y[row]]))[0, 1]) for row in draws)
    low, high = bootstrap_interval(x, y, resamples=300, level=0.8, seed=9)
    # quantiles of 300 numbers, interpolated between neighbours
    for found, at in ((low, 0.1 * 299), (high, 0.9 * 299)):
        below = int(at)
        assert found == pytest.approx(values[below] + (at - below) * (values[below + 1] - values[below]))


def test_draws_without_variance_are_left_out() -> None:
    """Of three trials one draw in nine is the same trial three times."""
    x = torch.tensor([0.1, 0.2, 0.4])
    low, high = bootstrap_interval(x, 7 * x)
    assert low == pytest.approx(1)
    assert high == pytest.approx(1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """ρ = .657, the paper's; 40 trials, 400 probes. A 90 % interval; the binomial error of the rate is .015."""
    truth, hits = 0.657, 0
    for seed in range(400):
        x, noise = torch.randn(2, 40, generator=rng(1000 + seed), dtype=torch.float64)
        low, high = bootstrap_interval(
            x, truth * x + (1 - truth**2) ** 0.5 * noise, resamples=400, level=0.9, seed=seed
        )
        hits += low <= truth <= high
    assert 0.84 < hits / 400 < 0.94
