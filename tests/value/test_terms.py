"""Terms of a loss: their values, the designers without parameters, and the linear engine."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_value.value import Gradient, double_backward, finite_difference, inner, norm, pre_gradient
from dino_value.value.engines import linear
from dino_value.value.terms import best_of, term_values, value_weights

WIDTH, WORDS, TOKENS, HEADS, CANDIDATES = 16, 11, 6, 2, 4


class Language:
    """A transformer block and head as tail; φ gives the target q over a few candidates of each token's successor."""

    def __init__(self, dtype: torch.dtype, fused: bool = False) -> None:
        rng = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

        self.fused = fused
        self.context = draw(2, TOKENS, WIDTH)
        self.candidates = torch.randint(WORDS, (2, TOKENS, CANDIDATES), generator=rng)
        self.head = draw(WIDTH, WORDS)
        self.phi = nn.Parameter(draw(2, TOKENS, CANDIDATES))
        self.parameters = {
            "qkv": draw(WIDTH, 3 * WIDTH) / math.sqrt(WIDTH),
            "mlp": draw(WIDTH, WIDTH) / math.sqrt(WIDTH),
            "norm.weight": 1 + 0.1 * draw(WIDTH),
            "norm.bias": 0.1 * draw(WIDTH),
        }
        self.u: Gradient = [draw(*value.shape) for value in self.parameters.values()]

    def trunk(self) -> tuple[Tensor, ...]:
        return self.phi.softmax(-1) / (2 * TOKENS), self.context

    def terms(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        x = hidden[1]
        normed = F.layer_norm(x, (WIDTH,), parameters["norm.weight"], parameters["norm.bias"])
        q, k, v = (normed @ parameters["qkv"]).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
            mixed = scores.softmax(-1) @ v
        x = x + mixed.transpose(1, 2).flatten(-2)
        x = F.layer_norm(x + F.gelu(x @ parameters["mlp"]), (WIDTH,), parameters["norm.weight"])
        return -(x @ self.head).log_softmax(-1).gather(-1, self.candidates)

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        return (hidden[0] * self.terms(hidden, parameters)).sum()

    def take(self) -> Tensor:
        found, self.phi.grad = self.phi.grad, None
        assert found is not None
        return found.double()


def exact() -> tuple[float, Tensor]:
    """V and ∂(−V)/∂φ in float64 by plain autograd."""
    task = Language(torch.float64)
    leaves = {name: value.requires_grad_() for name, value in task.parameters.items()}
    gradient = torch.autograd.grad(task.tail(task.trunk(), leaves), list(leaves.values()), create_graph=True)
    value = inner(task.u, list(gradient))
    return value.item(), torch.autograd.grad(-value, task.phi)[0]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("derivative", "dtype", "bound"),
    [
        ("jvp", torch.float64, 1e-13),
        ("jvp", torch.float32, 3e-6),
        ("difference", torch.float64, 1e-4),
        ("difference", torch.float32, 1e-3),
    ],
)
def test_linear_is_the_mixed_derivative(derivative: str, dtype: torch.dtype, bound: float, fused: bool) -> None:
    value, gradient = exact()
    task = Language(dtype, fused)
    found = linear(task, task.trunk(), task.parameters, task.u, [task.phi], derivative=derivative)
    assert not found.requires_grad
    assert found.item() == pytest.approx(value, rel=10 * bound)
    assert error(task.take(), gradient) < bound


def test_a_small_radius_makes_the_difference_exact_in_float64() -> None:
    _, gradient = exact()
    task = Language(torch.float64)
    linear(task, task.trunk(), task.parameters, task.u, [task.phi], radius=1e-5)
    assert error(task.take(), gradient) < 1e-9


@pytest.mark.parametrize("other", [double_backward, finite_difference])
def test_the_engines_agree_on_a_linear_task(other: object) -> None:
    value, gradient = exact()
    task = Language(torch.float64)
    assert other(task, task.trunk(), task.parameters, task.u, [task.phi]).item() == pytest.approx(value)  # type: ignore[operator]
    assert error(task.take(), gradient) < 1e-6


def test_linear_adds_the_penalty_and_accumulates() -> None:
    _, gradient = exact()
    task = Language(torch.float64)
    for _ in range(2):
        hidden = task.trunk()
        linear(task, hidden, task.parameters, task.u, [task.phi], 3 * hidden[0].square().sum(), derivative="jvp")
    (own,) = torch.autograd.grad(3 * task.trunk()[0].square().sum(), task.phi)
    assert error(task.take(), 2 * (gradient + own)) < 1e-12


def test_linear_takes_v_from_a_g_pre_that_it_is_given() -> None:
    """The mean over ranks is of more than this batch."""
    task = Language(torch.float64)
    g_pre = [torch.ones_like(part) for part in task.u]
    found = linear(task, task.trunk(), task.parameters, task.u, [task.phi], None, g_pre)
    assert found.item() == pytest.approx(inner(task.u, g_pre).item())


def test_linear_keeps_no_graph_of_the_learner() -> None:
    task = Language(torch.float64)
    modes: list[bool] = []
    inner_terms = task.terms

    def terms(hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        found = inner_terms(hidden, parameters)
        modes.append(found.requires_grad)
        return found

    task.terms = terms  # type: ignore[method-assign]
    for value in task.parameters.values():
        value.requires_grad_()
    linear(task, task.trunk(), task.parameters, task.u, [task.phi])
    assert modes == [False, False]
    assert all(value.grad is None for value in task.parameters.values())


def test_linear_under_autocast() -> None:
    value, gradient = exact()
    task = Language(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(task, task.trunk(), task.parameters, task.u, [task.phi], derivative="jvp")
    assert found.item() == pytest.approx(value, rel=1e-5)
    assert error(task.take(), gradient) < 1e-5


def test_linear_refuses_a_task_without_terms() -> None:
    class Plain:
        def __init__(self, task: Language) -> None:
            self.trunk, self.tail = task.trunk, task.tail

    task = Language(torch.float64)
    plain = Plain(task)
    with pytest.raises(ValueError, match=r"has no terms.*finite_difference"):
        linear(plain, plain.trunk(), task.parameters, task.u, [task.phi])
    assert task.phi.grad is None


def test_linear_refuses_phi_elsewhere_than_in_the_weights() -> None:
    task = Language(torch.float64)
    weights, context = task.trunk()
    with pytest.raises(ValueError, match=r"more than hidden\[0\]"):
        linear(task, (weights, context * task.phi.mean()), task.parameters, task.u, [task.phi])
    with pytest.raises(ValueError, match="does not depend on the designer"):
        linear(task, (weights.detach(), context), task.parameters, task.u, [task.phi])


def test_linear_refuses_terms_of_another_shape() -> None:
    task = Language(torch.float64)
    weights, context = task.trunk()
    with pytest.raises(ValueError, match=r"shape \(2, 6, 4\) for weights hidden\[0\] of \(48,\)"):
        linear(task, (weights.flatten(), context), task.parameters, task.u, [task.phi])


@pytest.mark.parametrize("derivative", ["difference", "jvp"])
def test_term_values_are_the_inner_products_of_each_terms_gradient(derivative: str) -> None:
    task = Language(torch.float64)
    hidden = tuple(state.detach() for state in task.trunk())
    values = term_values(
        lambda theta: task.terms(hidden, theta), task.parameters, task.u, radius=1e-4, derivative=derivative
    )
    leaves = {name: value.clone().requires_grad_() for name, value in task.parameters.items()}
    terms = task.terms(hidden, leaves)
    assert values.shape == terms.shape
    for index in [(0, 0, 0), (0, 5, 3), (1, 2, 1)]:
        gradient = torch.autograd.grad(terms[index], list(leaves.values()), retain_graph=True)
        assert values[index].item() == pytest.approx(inner(task.u, list(gradient)).item(), rel=1e-6)
    assert not values.requires_grad


def test_the_weighted_values_sum_to_v() -> None:
    task = Language(torch.float64)
    hidden = tuple(state.detach() for state in task.trunk())
    values = term_values(lambda theta: task.terms(hidden, theta), task.parameters, task.u, derivative="jvp")
    expected = inner(task.u, pre_gradient(task, hidden, task.parameters))
    assert (hidden[0] * values).sum().item() == pytest.approx(expected.item())


def test_term_values_know_two_derivatives() -> None:
    with pytest.raises(ValueError, match="choose difference or jvp"):
        term_values(lambda theta: theta["a"], {"a": torch.ones(1)}, [torch.ones(1)], derivative="exact")


def test_a_zero_direction_gives_zero_values() -> None:
    values = term_values(lambda theta: theta["a"] ** 2, {"a": torch.ones(3)}, [torch.zeros(3)])
    assert values.tolist() == [0, 0, 0]


def test_value_weights_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 100.0], dtype=torch.float64)
    valid = torch.tensor([True, True, True, False])
    weights = value_weights(values, 2.0, valid=valid)
    raw = ((values[:3] - 2) / (math.sqrt(2 / 3) * 2)).exp()
    torch.testing.assert_close(weights[:3], raw / raw.mean())
    assert weights[3] == 0


def test_value_weights_are_clipped_before_they_are_normalised() -> None:
    values = torch.cat([torch.zeros(99), torch.tensor([1000.0])]).double()
    weights = value_weights(values, 0.1, clip=5.0)
    assert weights.mean().item() == pytest.approx(1)
    # the 99 lie a tenth of a deviation below the mean, e⁻¹ at τ = 0.1; the other far above
    assert (weights[-1] / weights[0]).item() == pytest.approx(5 * math.exp(1 / math.sqrt(99) * 10), rel=1e-6)


def test_value_weights_do_not_see_units_and_end_at_equal_weights() -> None:
    values = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(value_weights(7 * values + 3, 1.0), value_weights(values, 1.0))
    assert value_weights(values, math.inf).tolist() == [[1.0] * 5] * 2
    assert value_weights(torch.ones(3), 1.0).tolist() == [1.0] * 3


def test_best_of() -> None:
    values = torch.tensor([[1.0, 9.0], [3.0, 2.0], [5.0, 6.0], [4.0, 7.0]])  # two slots of two candidates, two images
    assert best_of(values, 2).tolist() == [[1, 0], [2, 3]]
    assert best_of(values, 4).tolist() == [[2, 0]]
    assert norm([values.gather(0, best_of(values, 1)) - values]) == 0
