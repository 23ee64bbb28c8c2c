"""Several feedback tasks made one, and guards."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_value.value.combination import COMBINATIONS, Guard, check_method, combine
from dino_value.value.directions import Gradient, cosine, dot, inner, norm
from dino_value.value.engines import double_backward, pre_gradient

RULES = [name for name in COMBINATIONS if name not in ("weights", "normalised")]
PACKAGES = {
    "upgrad": ("qpsolvers", "quadprog"),
    "dualproj": ("qpsolvers", "quadprog"),
    "cagrad": ("cvxpy", "clarabel"),
}  # what a rule needs besides torchjd; all of it comes with the extra
SHAPES = [(4, 3), (7,), (1, 2, 5), ()]
ALPHA = [0.5, 8.0, 2.0]


def torchjd(*methods: str) -> Any:
    """torchjd.aggregation, or skip: the extra `torchjd` is optional (and part of `dev`)."""
    for package in (package for method in methods for package in PACKAGES.get(method, ())):
        pytest.importorskip(package)
    return pytest.importorskip("torchjd.aggregation")


def gradient(seed: int, scale: float = 1.0) -> Gradient:
    rng = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=rng, dtype=torch.float64) for shape in SHAPES]


def conflicting() -> list[Gradient]:
    """Three tasks of different lengths; two of their three cosines are well below zero, and the sum harms the first."""
    first, second, third = gradient(0, 0.3), gradient(1), gradient(2, 5.0)
    torch._foreach_sub_(second, first, alpha=4.0)
    torch._foreach_sub_(third, first, alpha=10.0)
    torch._foreach_sub_(third, second, alpha=2.0)
    return [first, second, third]


def flat(part: Gradient) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in part])


def jacobian(gradients: list[Gradient], weights: list[float]) -> Tensor:
    """[m |S|], the rows α_j g_j."""
    return torch.stack([alpha * flat(g) for alpha, g in zip(weights, gradients, strict=True)])


def test_the_toy_conflicts() -> None:
    rows = jacobian(conflicting(), ALPHA)
    assert ((rows @ rows.T).triu(1) < 0).sum() >= 2
    assert (rows @ rows.sum(0)).min() < 0


def test_weights_is_the_weighted_sum_and_leaves_its_input() -> None:
    first, second = gradient(0), gradient(1)
    copies = [part.clone() for part in first]
    for found, a, b in zip(combine([first, second], [0.5, 8.0]), first, second, strict=True):
        torch.testing.assert_close(found, 0.5 * a + 8.0 * b)
    assert all(map(torch.equal, first, copies))


def test_normalised() -> None:
    gradients = conflicting()
    found = flat(combine(gradients, ALPHA, "normalised"))
    rows = [flat(g) for g in gradients]
    mean = sum(float(row.norm()) for row in rows) / 3
    expected = sum(alpha * row / row.norm() for alpha, row in zip(ALPHA, rows, strict=True)) * mean
    torch.testing.assert_close(found, expected)


def test_normalised_is_the_weighted_sum_of_equally_long_gradients() -> None:
    gradients = [[part / norm(g) for part in g] for g in (gradient(0), gradient(1))]
    torch.testing.assert_close(combine(gradients, [0.5, 8.0], "normalised"), combine(gradients, [0.5, 8.0]))


@pytest.mark.parametrize(
    ("method", "name", "arguments", "tasks"),
    [
        ("upgrad", "UPGrad", {}, 3),
        ("dualproj", "DualProj", {}, 3),
        ("pcgrad", "PCGrad", {}, 1),
        ("cagrad", "CAGrad", {"c": 0.5}, 3),
        ("mgda", "MGDA", {}, 3),
        ("imtl_g", "IMTLG", {}, 3),
        ("aligned_mtl", "AlignedMTL", {}, 3),
    ],
)
def test_a_rule_is_torchjds_on_the_whole_jacobian(
    method: str, name: str, arguments: dict[str, float], tasks: int
) -> None:
    aggregator = getattr(torchjd(method), name)(**arguments)
    gradients = [[part / norm(g) for part in g] for g in conflicting()]
    weights = [1.0, 2.0, 0.5]
    torch.default_generator.manual_seed(4)  # pcgrad draws the order of its projections
    expected = tasks * aggregator(jacobian(gradients, weights))
    found = combine(gradients, weights, method, seed=4)
    assert [part.shape for part in found] == [part.shape for part in gradients[0]]
    torch.testing.assert_close(flat(found), expected, rtol=0, atol=1e-3 * float(expected.norm()))


@pytest.mark.parametrize("first", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("method", ["upgrad", "dualproj", "mgda"])
def test_what_conflicts_with_no_task(method: str, first: float) -> None:
    """However short or long the gradient of one task is beside the others: losses have units."""
    torchjd(method)
    gradients = conflicting()
    torch._foreach_mul_(gradients[0], first)
    rows, found = jacobian(gradients, ALPHA), flat(combine(gradients, ALPHA, method))
    harm = rows @ found / (rows.norm(dim=1) * found.norm())
    assert harm.min() > -2e-3  # the solvers' tolerance
    assert found.norm() > 0.01 * rows.norm(dim=1).min()


@pytest.mark.parametrize("method", ["upgrad", "dualproj", "pcgrad"])
def test_a_projection_without_conflict_is_the_weighted_sum(method: str) -> None:
    torchjd(method)
    base = gradient(0)
    gradients = [base, [2 * b + 0.1 * n for b, n in zip(base, gradient(1), strict=True)]]
    for found, expected in zip(combine(gradients, [3.0, 0.5], method), combine(gradients, [3.0, 0.5]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", RULES)
def test_a_rule_is_blind_to_the_common_scale(method: str) -> None:
    """Small gradients are the usual case: a fixed threshold in a solver must not see them as zero."""
    torchjd(method)
    small = [[1e-6 * part for part in g] for g in conflicting()]
    expected = 1e-6 * flat(combine(conflicting(), ALPHA, method))
    torch.testing.assert_close(
        flat(combine(small, ALPHA, method)), expected, rtol=1e-4, atol=1e-4 * float(expected.norm())
    )


@pytest.mark.parametrize("method", COMBINATIONS)
def test_one_task_is_weighted(method: str) -> None:
    torchjd(method)
    for found, part in zip(combine([gradient(0)], [8.0], method), gradient(0), strict=True):
        torch.testing.assert_close(found, 8.0 * part)


@pytest.mark.parametrize("method", COMBINATIONS)
def test_a_task_of_weight_zero_takes_no_part(method: str) -> None:
    torchjd(method)
    first, second, third = conflicting()
    found = combine([first, second, third], [0.5, 0.0, 2.0], method)
    torch.testing.assert_close(found, combine([first, third], [0.5, 2.0], method))


@pytest.mark.parametrize("method", COMBINATIONS)
@pytest.mark.parametrize("tasks", ["one zero", "all zero"])
def test_a_zero_gradient_gives_no_nan(method: str, tasks: str) -> None:
    torchjd(method)
    zero = [torch.zeros(shape) for shape in SHAPES]
    other = zero if tasks == "all zero" else [part.float() for part in gradient(0)]
    found = combine([zero, other], [0.5, 8.0], method)
    assert all(bool(part.isfinite().all()) for part in found)
    if tasks == "all zero":
        assert not any(part.any() for part in found)


def test_pcgrad_follows_its_seed_and_leaves_the_generator() -> None:
    torchjd("pcgrad")
    before = torch.get_rng_state()
    found = [flat(combine(conflicting(), ALPHA, "pcgrad", seed)) for seed in (0, 0, *range(1, 8))]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found[0], found[1])
    assert any(not torch.equal(found[0], other) for other in found[2:])


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown combination 'median'.* weights, normalised, upgrad, .*aligned_mtl"):
        combine([gradient(0)], [1.0], "median")
    with pytest.raises(ValueError, match="unknown combination"):
        check_method("median")


def test_a_weight_for_each_task() -> None:
    with pytest.raises(ValueError, match="2 feedback gradients, 1 weights"):
        combine([gradient(0), gradient(1)], [1.0])
    with pytest.raises(ValueError, match="0 feedback gradients"):
        combine([], [])


def test_a_gradient_that_is_not_finite_is_named() -> None:
    torchjd("mgda")
    bad = gradient(1)
    bad[1][0] = torch.nan
    with pytest.raises(ValueError, match=r"feedback tasks \[1\] are not finite"):
        combine([gradient(0), bad], [1.0, 1.0], "mgda")


@pytest.mark.parametrize("missing", ["torchjd", "solver"])
def test_a_missing_package_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "torchjd":
        monkeypatch.setitem(sys.modules, "torchjd", None)
    else:
        aggregation = torchjd()

        def refuse(**_: Any) -> None:
            raise ImportError("QuadprogProjector requires ['quadprog']")

        monkeypatch.setattr(aggregation, "UPGradWeighting", refuse)
    with pytest.raises(ImportError, match=r"'upgrad' needs more packages: pip install 'dino-value\[torchjd\]'"):
        check_method("upgrad")
    check_method("weights")
    combine([gradient(0), gradient(1)], [1.0, 1.0], "normalised")


# --- guards


class LinearTask:
    """L = ⟨Mφ/‖φ‖, θ⟩: whatever φ, g_pre = Mφ/‖φ‖, a unit vector when M is a rotation. φ only turns it."""

    def __init__(self, phi: Tensor, rotation: Tensor) -> None:
        self.phi, self.rotation = phi, rotation

    def trunk(self) -> tuple[Tensor, ...]:
        return (self.rotation @ (self.phi / self.phi.norm()),)

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        return (hidden[0] * parameters["theta"]).sum()


def train_designer(
    guard: Guard | None, direction: Callable[..., Gradient], noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """cos of g_pre with the main task's gradient and with the guard's, at the last 100 of 500 designer updates [100].

    `noise`: of both gradients as the designer and the guard see them, in lengths per coordinate.
    """
    rng = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=rng, dtype=torch.float64))[0]
    phi = torch.randn(4, generator=rng, dtype=torch.float64, requires_grad=True)
    theta = {"theta": torch.zeros(4, dtype=torch.float64)}
    main = [torch.tensor([3.0, 1.0, 0.0, 0.0], dtype=torch.float64)]
    held = [torch.tensor([-0.02, 0.01, 0.01, 0.0], dtype=torch.float64)]  # cos with main −.65, and much shorter
    task, optimizer = LinearTask(phi, rotation), torch.optim.Adam([phi], lr=0.03)

    def cos(a: Gradient, b: Gradient) -> Tensor:
        return inner(a, b) / (norm(a) * norm(b))

    def seen(g: Gradient) -> Gradient:
        return [part + noise * norm(g) * torch.randn(4, generator=rng, dtype=torch.float64) for part in g]

    history = []
    for _ in range(500):
        hidden = task.trunk()
        g_pre = pre_gradient(task, hidden, theta)
        history.append(torch.stack([cos(main, g_pre), cos(held, g_pre)]))
        u = direction(seen(main), g_pre)
        if guard is not None:
            g_guard = seen(held)
            u = guard.direct(u, g_guard)
            guard.update(cos(g_guard, g_pre))
        optimizer.zero_grad()
        double_backward(task, hidden, theta, u, [phi])
        optimizer.step()
    main_cos, held_cos = torch.stack(history[-100:]).T
    return main_cos, held_cos


@pytest.mark.parametrize("direction", [dot, cosine])
def test_a_guard_is_kept_at_zero(direction: Callable[..., Gradient]) -> None:
    main, held = train_designer(None, direction)
    assert main.min() > 0.99
    assert held.max() < -0.5  # unguarded, the main task is served at the guard's cost
    for noise in (0.0, 0.3):
        main, held = train_designer(Guard(rate=0.1), direction, noise)
        assert held.mean() > -0.02
        assert held.min() > (-0.1 if noise else -0.01)
        assert main.mean() > 0.7  # of at most √(1 − .65²) = .76: the guard costs no more than it must


def test_the_damping_settles_the_guard() -> None:
    _, plain = train_designer(Guard(rate=0.1, damping=0.0), cosine)
    _, damped = train_designer(Guard(rate=0.1), cosine)
    assert damped.std() < 0.01 < 0.1 < plain.std()


def test_a_guard_that_agrees_changes_nothing() -> None:
    guard, u = Guard(0.1), gradient(0)
    for _ in range(5):
        guard.update(torch.tensor(0.4))
    assert float(guard.multiplier) == 0
    assert all(map(torch.equal, guard.direct(u, gradient(1)), u))


@pytest.mark.parametrize(
    ("damping", "expected"), [(0.0, [0.2, 0.7, 0.4, 0.4, 0.0, 0.1]), (2.0, [1.0, 2.7, 0.0, 0.0, 0.0, 0.5])]
)
def test_dual_ascent(damping: float, expected: list[float]) -> None:
    """A cosine that is not finite is passed over."""
    guard, found = Guard(0.5, damping=damping), []
    for cos in [-0.4, -1.0, 0.6, torch.nan, 1.0, -0.2]:
        guard.update(torch.tensor(cos))
        found.append(float(guard.multiplier))
    assert found == pytest.approx(expected)


def test_the_guards_direction_is_measured_in_lengths_of_u() -> None:
    """λ has no unit: the added part is λ‖u‖ long, whatever the guard's own gradient measures."""
    guard, u, held = Guard(1.0, damping=0.0), gradient(0), gradient(1, 1e-4)
    guard.update(torch.tensor(-0.3))
    turned = guard.direct(u, held)
    added = [a - b for a, b in zip(turned, u, strict=True)]
    assert float(norm(added)) == pytest.approx(0.3 * float(norm(u)))
    assert float(inner(added, held)) == pytest.approx(float(norm(added) * norm(held)))
    assert [part.dtype for part in turned] == [part.dtype for part in u]


def test_a_zero_gradient_guards_nothing() -> None:
    guard, u = Guard(1.0), gradient(0)
    guard.update(torch.tensor(-0.3))
    zero = [torch.zeros_like(part) for part in u]
    assert all(map(torch.equal, guard.direct(u, zero), u))
    assert not any(part.any() for part in guard.direct(zero, zero))


def test_the_multiplier_survives(tmp_path: Any) -> None:
    guard, other = Guard(1.0), Guard(1.0)
    guard.update(torch.tensor(-0.3))
    torch.save(guard.state_dict(), tmp_path / "guard.pt")
    other.load_state_dict(torch.load(tmp_path / "guard.pt", weights_only=True))
    guard.update(torch.tensor(-0.1))
    assert float(other.multiplier) == pytest.approx(1.2)  # its own copy
    other.update(torch.tensor(-0.1))
    assert torch.equal(other.multiplier, guard.multiplier)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none(rate: float) -> None:
    with pytest.raises(ValueError, match="choose a positive number"):
        Guard(rate)
    with pytest.raises(ValueError, match="0 is plain dual ascent"):
        Guard(0.1, damping=-1.0)
