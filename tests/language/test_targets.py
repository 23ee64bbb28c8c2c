"""Soft targets against their published forms, written out densely."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_value.language.targets import (
    candidates,
    negative_log_probs,
    next_token,
    self_distillation,
    soft_cross_entropy,
    soft_targets,
    uniform,
)
from dino_value.value import tilt

T, D, V, K = 23, 12, 31, 7


@pytest.fixture
def parts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(T, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        torch.randn(V, requires_grad=True),
        torch.randint(V, (T,)),
    )


def dense(logits: Tensor, ids: Tensor, q: Tensor) -> Tensor:
    """Cross-entropy against a target over the whole vocabulary."""
    full = torch.zeros_like(logits).scatter(1, ids, q)
    return -(full * logits.log_softmax(1)).sum()


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_soft_cross_entropy_is_the_dense_one(parts: tuple[Tensor, ...], chunk: int) -> None:
    hidden, weight, bias, labels = parts
    ids = candidates(F.linear(hidden, weight, bias).detach(), labels, K)
    q = torch.rand(T, K).softmax(1)
    found = soft_cross_entropy(hidden, weight, bias, lambda rows, logits: (ids[rows], q[rows]), chunk)
    expected = dense(F.linear(hidden, weight, bias), ids, q)
    assert abs(found.item() - expected.item()) <= 1e-6 * expected.item()
    for a, b in zip(
        torch.autograd.grad(found, (hidden, weight, bias)),
        torch.autograd.grad(expected, (hidden, weight, bias)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_no_tensor_of_the_vocabulary_for_the_whole_batch(parts: tuple[Tensor, ...]) -> None:
    hidden, weight, _, labels = parts
    seen = []
    rule = next_token(labels)

    def watching(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(tuple(logits.shape))
        return rule(rows, logits)

    soft_cross_entropy(hidden, weight, None, watching, 10)
    assert seen == [(10, V), (10, V), (3, V)]


def test_one_hot_is_next_token_training(parts: tuple[Tensor, ...]) -> None:
    hidden, weight, _, labels = parts
    found = soft_cross_entropy(hidden, weight, None, next_token(labels), 8)
    assert torch.allclose(found, F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum"), rtol=1e-6)


@pytest.mark.parametrize("rule", [uniform, self_distillation])
def test_alpha_zero_is_next_token_training_bit_for_bit(parts: tuple[Tensor, ...], rule: Any) -> None:
    hidden, weight, _, labels = parts
    plain = soft_cross_entropy(hidden, weight, None, next_token(labels), 8)
    soft = soft_cross_entropy(hidden, weight, None, rule(labels, K, 0.0), 8)
    assert torch.equal(plain, soft)
    for a, b in zip(
        torch.autograd.grad(plain, (hidden, weight)), torch.autograd.grad(soft, (hidden, weight)), strict=True
    ):
        assert torch.equal(a, b)


def test_candidates_hold_the_truth_and_the_best_of_the_rest() -> None:
    logits = torch.tensor([[4.0, 3, 2, 1, 0], [0.0, 1, 2, 3, 4]])
    assert candidates(logits, torch.tensor([3, 4]), 3).tolist() == [[3, 0, 1], [4, 3, 2]]
    assert candidates(logits, torch.tensor([3, 4]), 1).tolist() == [[3], [4]]
    assert sorted(candidates(logits, torch.tensor([3, 4]), 5)[0].tolist()) == [0, 1, 2, 3, 4]


def test_controls_spread_alpha() -> None:
    logits = torch.randn(4, V)
    labels = torch.tensor([1, 2, 3, 4])
    ids, q = uniform(labels, K, 0.4)(slice(0, 4), logits)
    assert torch.allclose(q[:, 1:], torch.full((4, K - 1), 0.4 / K))
    assert torch.allclose(q.sum(1), torch.ones(4))
    ids, q = self_distillation(labels, K, 0.4)(slice(0, 4), logits)
    own = logits.gather(1, ids).softmax(1)
    assert torch.allclose(q[:, 1:], 0.4 * own[:, 1:])
    assert torch.allclose(q[:, 0], 0.6 + 0.4 * own[:, 0])


def test_the_closed_form_is_the_best_trade_of_value_for_divergence() -> None:
    """q* maximises Σ q v − τ KL(q‖q₀): no other distribution near it does better."""
    torch.manual_seed(0)
    base, values, tau = torch.rand(5, K, dtype=torch.float64).softmax(1), torch.randn(5, K, dtype=torch.float64), 0.7

    def worth(q: Tensor) -> Tensor:
        return (q * values).sum(1) - tau * (q * (q / base).log()).sum(1)

    best = tilt(base, values, 1 / tau)
    for _ in range(50):
        other = (best.log() + 0.1 * torch.randn(5, K, dtype=torch.float64)).softmax(1)
        assert (worth(best) >= worth(other)).all()
    assert torch.allclose(tilt(base, values, 0.0), base)
    assert torch.allclose(best, (base.log() + values / tau).softmax(1))
    vertex = tilt(base, values, 1e4)
    assert torch.equal(vertex.argmax(1), values.argmax(1))
    assert (vertex.max(1).values > 0.999).all()


def test_soft_targets_are_distributions() -> None:
    q = soft_targets(torch.tensor([[0.5], [0.0]]), torch.tensor([[0.2, 0.8], [0.3, 0.7]]))
    assert torch.allclose(q, torch.tensor([[0.6, 0.4], [1.0, 0.0]]))


def test_negative_log_probs_and_their_second_derivative() -> None:
    torch.manual_seed(0)
    head = nn.Linear(4, 9).double()
    hidden, ids = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randint(9, (5, 3))
    found = negative_log_probs(hidden, head, ids, chunk=2)
    assert torch.allclose(found, -head(hidden).log_softmax(1).gather(1, ids))
    assert torch.autograd.gradgradcheck(lambda h: negative_log_probs(h, head, ids, chunk=2).pow(2).sum(), hidden)
    with torch.no_grad():
        assert torch.allclose(negative_log_probs(hidden, head, ids, chunk=2), found)
