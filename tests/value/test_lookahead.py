"""Where the labels would take a copy of θ_S: closed forms, torch's own optimizers, and what must stay as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dino_value.value import contrast, inner, lookahead, norm
from dino_value.value.lookahead import OPTIMIZERS

Loss = Callable[[dict[str, Tensor]], Tensor]


class Labelled:
    """A backbone, a head and batches of labels, in float64; one parameter of the backbone is no part of θ_S."""

    def __init__(self, batches: int = 5, heads: int = 1) -> None:
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
        self.head = nn.Linear(5, 3).double()
        self.theta = {name: value for name, value in self.backbone.named_parameters() if name != "0.bias"}
        self.batches = [(torch.randn(7, 4, dtype=torch.float64), torch.randint(3, (7,))) for _ in range(batches)]

    def loss(self, number: int, head: nn.Module | None = None) -> Loss:
        images, labels = self.batches[number % len(self.batches)]

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy((head or self.head)(functional_call(self.backbone, parameters, (images,))), labels)

        return loss

    def losses(self, count: int, head: nn.Module | None = None) -> list[Loss]:
        return [self.loss(number, head) for number in range(count)]

    def g_down(self, number: int = 0) -> list[Tensor]:
        leaves = {name: value.detach().requires_grad_() for name, value in self.theta.items()}
        return list(torch.autograd.grad(self.loss(number)(leaves), list(leaves.values())))

    def naive(
        self, count: int, kind: type, lr: float, heads_lr: float | None, **settings: float
    ) -> tuple[list[Tensor], nn.Module]:
        """u and the heads by a loop over whole modules with an optimizer of torch's, one tensor at a time."""
        backbone, head = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        named = dict(backbone.named_parameters())
        groups = [{"params": [named[name] for name in self.theta], "lr": lr}]
        if heads_lr is not None:
            groups.append({"params": list(head.parameters()), "lr": heads_lr})
        optimizer = kind(groups, foreach=False, **settings)
        for number in range(count):
            images, labels = self.batches[number % len(self.batches)]
            optimizer.zero_grad()
            F.cross_entropy(head(backbone(images)), labels).backward()
            optimizer.step()
        return [self.theta[name].detach() - named[name].detach() for name in self.theta], head


def close(found: list[Tensor], expected: list[Tensor], relative: float) -> None:
    difference = [a - b for a, b in zip(found, expected, strict=True)]
    assert float(norm(difference)) <= relative * float(norm(expected))


def test_one_step_of_sgd_with_fixed_heads_is_the_gradient_times_the_rate() -> None:
    problem = Labelled()
    shadow = lookahead(problem.losses(1), problem.theta, lr=0.3, optimizer="sgd")
    close(shadow.u, [0.3 * part for part in problem.g_down()], 1e-6)
    assert not any(part.requires_grad for part in shadow.u)


@pytest.mark.parametrize("steps", [1, 2, 9, 60])
def test_on_a_quadratic_it_is_the_closed_form(steps: int) -> None:
    """u = (I − (I − ηH)^m) H⁻¹ g, g the gradient where it begins."""
    rng = torch.Generator().manual_seed(1)
    root = torch.randn(6, 6, generator=rng, dtype=torch.float64)
    hessian = root @ root.T / 6 + 0.1 * torch.eye(6, dtype=torch.float64)
    start, lowest = torch.randn(2, 6, generator=rng, dtype=torch.float64)
    lr = 0.2

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        away = torch.cat([parameters["a"], parameters["b"].flatten()]) - lowest
        return away @ hessian @ away / 2

    theta = {"a": start[:2].clone(), "b": start[2:].view(2, 2).clone()}
    found = torch.cat([part.flatten() for part in lookahead([loss] * steps, theta, lr=lr, optimizer="sgd").u])
    decay = torch.linalg.matrix_power(torch.eye(6, dtype=torch.float64) - lr * hessian, steps)
    gradient = hessian @ (start - lowest)
    expected = (torch.eye(6, dtype=torch.float64) - decay) @ torch.linalg.solve(hessian, gradient)
    assert float((found - expected).norm()) < 1e-10 * float(expected.norm())


@pytest.mark.parametrize("heads_lr", [None, 0.05])
def test_adamw_is_torchs_own_on_backbone_and_heads(heads_lr: float | None) -> None:
    """Without weight decay, whose default in torch is not 0, and each group at its own rate."""
    problem = Labelled()
    given, steps = {} if heads_lr is None else {"heads_lr": heads_lr}, 13
    expected, head = problem.naive(steps, torch.optim.AdamW, 0.02, heads_lr or 0.02, weight_decay=0.0)
    trained = copy.deepcopy(problem.head)
    shadow = lookahead(
        problem.losses(steps, trained), problem.theta, list(trained.parameters()), lr=0.02, optimizer="adamw", **given
    )
    close(shadow.u, expected, 1e-9)
    close([p.detach() for p in trained.parameters()], [p.detach() for p in head.parameters()], 1e-9)


def test_sgd_too_trains_heads_at_their_rate() -> None:
    problem = Labelled()
    expected, head = problem.naive(6, torch.optim.SGD, 0.1, 0.7)
    trained = copy.deepcopy(problem.head)
    shadow = lookahead(
        problem.losses(6, trained), problem.theta, list(trained.parameters()), lr=0.1, heads_lr=0.7, optimizer="sgd"
    )
    close(shadow.u, expected, 1e-12)
    close([p.detach() for p in trained.parameters()], [p.detach() for p in head.parameters()], 1e-12)


def test_heads_repair_themselves_and_fixed_ones_stay() -> None:
    """Heads that can fit what the backbone shows take the loss's fall on themselves: u need not move for them."""
    problem = Labelled(batches=1)
    before = copy.deepcopy(problem.head.state_dict())
    fixed = lookahead(problem.losses(40), problem.theta, lr=1e-3)
    assert all(torch.equal(before[name], value) for name, value in problem.head.state_dict().items())
    assert all(parameter.grad is None for parameter in problem.backbone.parameters())
    repaired = lookahead(problem.losses(40), problem.theta, list(problem.head.parameters()), lr=1e-3, heads_lr=0.1)
    assert all(not torch.equal(before[name], value) for name, value in problem.head.state_dict().items())
    assert repaired.after < 0.8 * fixed.after
    assert torch.equal(repaired.before, fixed.before)


def test_parameters_are_never_written_to() -> None:
    problem = Labelled()
    kept = copy.deepcopy(problem.backbone.state_dict())
    for optimizer in OPTIMIZERS:
        lookahead(problem.losses(4), problem.theta, lr=0.1, optimizer=optimizer)
    assert all(torch.equal(kept[name], value) for name, value in problem.backbone.state_dict().items())
    assert all(value.grad is None and value.requires_grad for value in problem.backbone.parameters())


def test_nothing_is_carried_from_one_lookahead_to_the_next() -> None:
    problem = Labelled()
    for optimizer in OPTIMIZERS:
        first, again = (lookahead(problem.losses(5), problem.theta, lr=0.05, optimizer=optimizer).u for _ in range(2))
        assert all(map(torch.equal, first, again))


def test_the_losses_before_and_after_are_of_the_first_batch() -> None:
    problem = Labelled(batches=3)
    shadow = lookahead(problem.losses(30), problem.theta, lr=0.05)
    there = {name: value - part for (name, value), part in zip(problem.theta.items(), shadow.u, strict=True)}
    torch.testing.assert_close(shadow.before, problem.loss(0)(problem.theta).detach())
    torch.testing.assert_close(shadow.after, problem.loss(0)(there).detach())
    assert shadow.before.ndim == shadow.after.ndim == 0
    assert shadow.after < shadow.before
    assert not (shadow.before.requires_grad)
    assert not (shadow.after.requires_grad)


def test_it_trains_inside_no_grad_too() -> None:
    problem = Labelled()
    free = lookahead(problem.losses(3), problem.theta, lr=0.05)
    with torch.no_grad():
        inside = lookahead(problem.losses(3), problem.theta, lr=0.05)
        assert not torch.is_grad_enabled()
    assert all(map(torch.equal, free.u, inside.u))


def test_descending_along_it_lowers_the_labels_loss() -> None:
    problem = Labelled()
    u = lookahead(problem.losses(20), problem.theta, lr=0.01).u
    assert float(inner(u, problem.g_down())) > 0


def test_a_contrast_is_the_true_direction_less_the_shuffled_one() -> None:
    true, shuffled = [torch.tensor([3.0, 1.0]), torch.tensor(2.0)], [torch.tensor([1.0, 1.0]), torch.tensor(5.0)]
    kept = copy.deepcopy((true, shuffled))
    found = contrast(true, shuffled)
    assert [part.tolist() for part in found] == [[2.0, 0.0], -3.0]
    assert all(map(torch.equal, (*true, *shuffled), (*kept[0], *kept[1])))
    assert float(norm(contrast(true, true))) == 0


@pytest.mark.parametrize(
    ("count", "optimizer", "message"),
    [(0, "adamw", "a lookahead of no step"), (1, "lion", "lookahead optimizer 'lion': choose adamw, sgd")],
)
def test_a_lookahead_that_cannot_be(count: int, optimizer: str, message: str) -> None:
    problem = Labelled()
    with pytest.raises(ValueError, match=message):
        lookahead(problem.losses(count), problem.theta, lr=0.1, optimizer=optimizer)
