"""V is the first-order term of the decrease of the downstream loss in one self-supervised step (method section 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from dino_value.value import double_backward, pre_gradient, value_step
from dino_value.value.directions import dot


@pytest.mark.parametrize("case", [{}, {"model": "vit_small_patch16_dinov3", "crops": "all"}])
def test_value_predicts_the_one_step_decrease(problem: Callable[..., Any], case: dict[str, Any]) -> None:
    p = problem(**case)
    rng = torch.Generator().manual_seed(5)
    images = torch.randn(3, 3, 16, 16, generator=rng, dtype=torch.float64)
    classify = torch.randn(p.student.backbone.embed_dim, 5, generator=rng, dtype=torch.float64)
    labels = torch.randint(5, (3 * 4,), generator=rng)

    def downstream(theta: dict[str, Tensor]) -> Tensor:
        patches = functional_call(p.student.backbone, theta, (images,)).patches
        return F.cross_entropy(patches.flatten(0, 1) @ classify, labels)

    theta = p.theta
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    g_down = list(torch.autograd.grad(downstream(leaves), list(leaves.values())))
    task = p.task()
    g_pre = pre_gradient(task, task.trunk(), theta)
    value = value_step(p.task(), theta, g_down, dot, double_backward, p.phi).value.item()
    before = downstream(theta).item()

    def error(eta: float) -> float:
        moved = {name: old - eta * g for (name, old), g in zip(theta.items(), g_pre, strict=True)}
        return abs((before - downstream(moved).item()) / eta - value)

    etas = [1e-2, 1e-3, 1e-4]
    errors = [error(eta) for eta in etas]
    assert abs(value) > 1e-3
    assert errors[-1] < 1e-2 * abs(value)
    for coarse, fine in pairwise(errors):
        assert math.log10(coarse / fine) == pytest.approx(1, abs=0.1)  # O(η), no more and no less
