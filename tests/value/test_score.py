"""The score-function direction."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dino_value.value.score import leave_one_out, score_loss

REWARD = torch.tensor([13.0, 9.0, 20.0], dtype=torch.float64)  # of the three outcomes; far from zero on average


def logits() -> Tensor:
    return torch.tensor([0.3, -1.1, 0.8], dtype=torch.float64, requires_grad=True)


def exact(theta: Tensor) -> Tensor:
    """−∇E[R]"""
    (found,) = torch.autograd.grad(-(theta.softmax(0) * REWARD).sum(), theta)
    return found


def estimate(theta: Tensor, samples: Tensor) -> Tensor:
    """The estimator of `score_loss` on samples [n k]."""
    (found,) = torch.autograd.grad(score_loss(theta.log_softmax(0)[samples], REWARD[samples]), theta)
    return found


def without_baseline(theta: Tensor, samples: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(-(REWARD[samples] * theta.log_softmax(0)[samples]).mean(), theta)
    return found


def moments(estimator: object, k: int) -> tuple[Tensor, Tensor]:
    """Mean and total variance of an estimator over every k-tuple of outcomes, each with its probability."""
    theta = logits()
    probabilities = theta.softmax(0).detach()
    mean, square = torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for outcomes in itertools.product(range(3), repeat=k):
        samples = torch.tensor([outcomes])
        weight = probabilities[samples].prod()
        found = estimator(theta, samples)  # type: ignore[operator]
        mean += weight * found
        square += weight * found.square().sum()
    return mean, square - mean.square().sum()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_unbiased(k: int) -> None:
    mean, _ = moments(estimate, k)
    torch.testing.assert_close(mean, exact(logits()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("k", [2, 4])
def test_the_baseline_lowers_the_variance(k: int) -> None:
    _, with_it = moments(estimate, k)
    plain_mean, plain = moments(without_baseline, k)
    torch.testing.assert_close(plain_mean, exact(logits()), rtol=1e-10, atol=1e-10)
    assert with_it < 0.8 * plain


def test_leave_one_out_is_the_naive_formula() -> None:
    rewards = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i, j in itertools.product(range(3), range(4)):
        others = [float(rewards[i, other]) for other in range(4) if other != j]
        assert float(leave_one_out(rewards)[i, j]) == pytest.approx(float(rewards[i, j]) - sum(others) / 3)


def test_prompts_and_samples_are_averaged() -> None:
    """Every prompt has its own baseline; the loss is the mean of the prompts' losses."""
    rng = torch.Generator().manual_seed(0)
    log_probs = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    rewards = torch.randn(5, 3, generator=rng, dtype=torch.float64) + 100 * torch.arange(5)[:, None]
    single = [score_loss(log_probs[i : i + 1], rewards[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(score_loss(log_probs, rewards), torch.stack(single).mean())


def test_rewards_are_constants() -> None:
    log_probs = torch.zeros(2, 2, requires_grad=True)
    rewards = torch.randn(2, 2, requires_grad=True)
    score_loss(log_probs, rewards).backward()
    assert rewards.grad is None
    assert log_probs.grad is not None


def test_pass_or_fail() -> None:
    log_probs = torch.zeros(1, 4, requires_grad=True)
    score_loss(log_probs, torch.tensor([[True, False, False, False]])).backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-1.0, 1 / 3, 1 / 3, 1 / 3]]) / 4)


def test_equal_rewards_teach_nothing() -> None:
    log_probs = torch.zeros(2, 4, requires_grad=True)
    score_loss(log_probs, torch.ones(2, 4)).backward()
    assert log_probs.grad is not None
    assert not log_probs.grad.any()


def test_a_reward_that_is_not_finite_shows() -> None:
    log_probs = torch.zeros(2, 2, requires_grad=True)
    score_loss(log_probs, torch.tensor([[1.0, torch.nan], [0.0, 1.0]])).backward()
    assert log_probs.grad is not None
    assert bool(log_probs.grad[0].isnan().all())
    assert bool(log_probs.grad[1].isfinite().all())


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="two samples or more of each prompt"):
        score_loss(torch.zeros(5, 1), torch.zeros(5, 1))
    with pytest.raises(ValueError, match=r"\[prompts, samples\]"):
        score_loss(torch.zeros(5), torch.zeros(5))
    with pytest.raises(ValueError, match=r"shape \[5, 2\] for rewards of shape \[2, 5\]"):
        score_loss(torch.zeros(5, 2), torch.zeros(2, 5))
