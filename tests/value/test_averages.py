"""Averages of g_down over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dino_value.value.averages import GradientAverage, Refreshed, mean_gradient
from dino_value.value.directions import Gradient, inner, norm

SHAPES = [(4, 3), (7,), ()]


def gradients(count: int, dtype: torch.dtype = torch.float64) -> list[Gradient]:
    rng = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=rng, dtype=dtype) for shape in SHAPES] for _ in range(count)]


def through_a_file(state: Any, folder: Path) -> Any:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.99])
def test_the_average_is_the_naive_formula(decay: float) -> None:
    average, seen = GradientAverage(decay), gradients(6)
    for count, gradient in enumerate(seen, 1):
        found = average.update(gradient)
        weights = [decay ** (count - i) for i in range(1, count + 1)]
        for index, part in enumerate(found):
            expected = sum(w * g[index] for w, g in zip(weights, seen, strict=False)) / sum(weights)
            torch.testing.assert_close(part, expected)
        torch.testing.assert_close(found, average.value)


def test_the_average_keeps_its_own_tensors() -> None:
    average, (first, second) = GradientAverage(0.5), gradients(2)
    copy = [part.clone() for part in first]
    found = average.update(first)
    torch._foreach_zero_(found)
    average.update(second)
    assert all(map(torch.equal, first, copy))
    torch.testing.assert_close(average.value, [(a + 2 * b) / 3 for a, b in zip(first, second, strict=True)])


def test_averaging_lowers_the_variance() -> None:
    """Noise around one gradient: its variance falls by (1−δ)/(1+δ), here 19; and the bias stays none."""
    truth, rng = gradients(1)[0], torch.Generator().manual_seed(1)
    errors = {0.0: 0.0, 0.9: 0.0}
    mean = [torch.zeros_like(part) for part in truth]
    averages = {decay: GradientAverage(decay) for decay in errors}
    for step in range(600):
        noisy = [part + torch.randn(part.shape, generator=rng, dtype=part.dtype) for part in truth]
        for decay, average in averages.items():
            found = average.update(noisy)
            if step >= 50:
                errors[decay] += float(norm([a - b for a, b in zip(found, truth, strict=True)])) ** 2
                if decay:
                    torch._foreach_add_(mean, found, alpha=1 / 550)
    assert errors[0.9] < errors[0.0] / 12
    assert float(inner(mean, truth) / (norm(mean) * norm(truth))) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_average_continues_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    whole, first, second = (GradientAverage(0.9) for _ in range(3))
    seen = gradients(7, dtype)
    for gradient in seen:
        whole.update(gradient)
    for gradient in seen[:3]:
        first.update(gradient)
    state = first.state_dict()
    first.update(seen[5])  # what was saved does not move with it
    second.load_state_dict(through_a_file(state, tmp_path))
    for gradient in seen[3:]:
        second.update(gradient)
    assert all(map(torch.equal, second.value, whole.value))


def test_an_average_of_nothing(tmp_path: Path) -> None:
    average = GradientAverage(0.9)
    average.load_state_dict(through_a_file(average.state_dict(), tmp_path))
    with pytest.raises(ValueError, match="update it first"):
        average.value  # noqa: B018
    average.update([torch.zeros(3)])
    assert torch.equal(average.value[0], torch.zeros(3))


def test_an_average_of_another_scope() -> None:
    average = GradientAverage(0.9)
    average.update([torch.zeros(3)])
    for other in ([torch.zeros(4)], [torch.zeros(3), torch.zeros(3)]):
        with pytest.raises(ValueError, match="the scope changed"):
            average.update(other)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_is_none(decay: float) -> None:
    with pytest.raises(ValueError, match=r"choose it in \[0, 1\)"):
        GradientAverage(decay)


class Counter:
    """Gives the gradient [1], then [2], …"""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Gradient:
        self.calls += 1
        return [torch.full((2,), float(self.calls), requires_grad=True)]


def test_refreshed_every_m_uses() -> None:
    compute, kept = Counter(), Refreshed(3)
    assert [float(kept.get(compute)[0][0]) for _ in range(8)] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert compute.calls == 3
    assert not kept.get(compute)[0].requires_grad


def test_refreshed_always() -> None:
    compute, kept = Counter(), Refreshed(1)
    assert [float(kept.get(compute)[0][0]) for _ in range(3)] == [1, 2, 3]


def test_refreshed_continues_at_its_age(tmp_path: Path) -> None:
    compute, kept, again = Counter(), Refreshed(3), Refreshed(3)
    again.load_state_dict(through_a_file(again.state_dict(), tmp_path))  # before any use
    for _ in range(5):
        kept.get(compute)
    again.load_state_dict(through_a_file(kept.state_dict(), tmp_path), "cpu")
    assert [float(again.get(compute)[0][0]) for _ in range(3)] == [2, 3, 3]


def test_refreshed_never() -> None:
    with pytest.raises(ValueError, match="choose 1 or more"):
        Refreshed(0)


def test_mean_gradient() -> None:
    seen = gradients(5)
    copies = [[part.clone() for part in gradient] for gradient in seen]
    found = mean_gradient(iter(seen))
    for index, part in enumerate(found):
        torch.testing.assert_close(part, torch.stack([gradient[index] for gradient in copies]).mean(0))
    for gradient, copy in zip(seen, copies, strict=True):
        assert all(map(torch.equal, gradient, copy))


def test_the_mean_of_no_gradient() -> None:
    with pytest.raises(ValueError, match="the feedback gave no batch"):
        mean_gradient([])
