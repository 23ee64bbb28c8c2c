"""What the method claims of V, as measurements in float64. (The expansion on a ViT stands in test_proposition.py.)"""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dino_value.value import Gradient, double_backward, inner, matching, norm, pre_gradient, value_step
from dino_value.value.directions import AdamState, Direction, adam, cosine, dot
from dino_value.value.probing import optimizer_update, probe, sgd_update

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
INPUTS, CLASSES = 4, 3


class SoftLabels:
    """An MLP on a few examples; φ is a table of soft labels, one row a label."""

    def __init__(self, count: int = 6, scope: str = ".") -> None:
        rng = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
        self.x = torch.randn(count, INPUTS, generator=rng, dtype=torch.float64)
        self.labels, self.truth = torch.randint(CLASSES, (2, count), generator=rng)
        self.phi = nn.Parameter(torch.randn(CLASSES, CLASSES, generator=rng, dtype=torch.float64))
        self.rows = torch.arange(count)
        self.theta = matching(self.model, [scope]).parameters(self.model)

    def batch(self, rows: tuple[int, ...]) -> SoftLabels:
        self.rows = torch.tensor(rows)
        return self

    def trunk(self) -> tuple[Tensor, ...]:
        return (self.phi.softmax(1)[self.labels[self.rows]],)

    def predict(self, parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(self.model, parameters, (self.x[self.rows],))

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.predict(parameters), hidden[0])

    def downstream(self, parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.predict(parameters), self.truth[self.rows])

    def g_down(self) -> Gradient:
        leaves = {name: value.clone().requires_grad_() for name, value in self.theta.items()}
        return list(torch.autograd.grad(self.downstream(leaves), list(leaves.values())))

    def g_pre(self) -> Gradient:
        return pre_gradient(self, self.trunk(), self.theta)

    def g_pre_of_phi(self) -> Gradient:
        """With its graph to φ."""
        leaves = {name: value.clone().requires_grad_() for name, value in self.theta.items()}
        return list(torch.autograd.grad(self.tail(self.trunk(), leaves), list(leaves.values()), create_graph=True))

    def moved(self, update: Gradient) -> dict[str, Tensor]:
        return {name: value + step for (name, value), step in zip(self.theta.items(), update, strict=True)}

    def phi_gradient(self, direction: Direction, g_down: Gradient) -> Tensor:
        """∂⟨u, g_pre⟩/∂φ from the value core."""
        self.phi.grad = None
        value_step(self, self.theta, g_down, direction, double_backward, [self.phi])
        assert self.phi.grad is not None
        return -self.phi.grad


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def log_slope(x: list[float], y: list[float]) -> float:
    """Of log y on log x, least squares."""
    a, b = torch.tensor([x, y], dtype=torch.float64).log()
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a @ a))


# --- one step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [".", r"^2\."])
def test_the_first_order_misses_by_the_square_of_the_step(scope: str) -> None:
    p = SoftLabels(scope=scope)
    etas = [10 ** -(0.5 * k) for k in range(2, 8)]
    trials = [probe(p.downstream, p.theta, p.g_down(), p.g_pre(), sgd_update(p.g_pre(), eta)) for eta in etas]
    errors = [abs(float(trial.realised - trial.predicted)) for trial in trials]
    assert log_slope(etas, errors) == pytest.approx(2, abs=0.05)
    assert errors[-1] < 1e-2 * abs(float(trials[-1].predicted))


def test_the_lower_bound_holds_on_a_quadratic_and_is_tight() -> None:
    """L_down(θ) − L_down(θ − ηg) ≥ ηV − βη²‖g‖²/2, with equality along the top eigenvector and only there."""
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, generator=rng, dtype=torch.float64)
    curvature = root @ root.T
    eigenvalues, eigenvectors = torch.linalg.eigh(curvature)
    beta, top = eigenvalues[-1], eigenvectors[:, -1]
    theta = {"w": torch.randn(8, generator=rng, dtype=torch.float64)}
    g_down = curvature @ theta["w"]

    def slack(g: Tensor, eta: float, smoothness: Tensor) -> float:
        """Realised decrease above the bound."""
        trial = probe(lambda p: 0.5 * p["w"] @ curvature @ p["w"], theta, [g_down], [g], sgd_update([g], eta))
        return float(trial.realised - (eta * trial.value - smoothness * eta**2 / 2 * g.square().sum()))

    for eta in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            assert slack(torch.randn(8, generator=rng, dtype=torch.float64), eta, beta) > 1e-4 * eta**2
        assert slack(-3 * top, eta, beta) == pytest.approx(0, abs=1e-12 + 1e-10 * eta)
        assert slack(-3 * top, eta, 0.99 * beta) < 0  # no smaller constant would do


# --- in expectation -----------------------------------------------------------------------------------------


def test_value_is_unbiased_under_independent_batches() -> None:
    """All 15 × 20 pairs of an unlabeled batch of 2 and a feedback batch of 3, each as likely: V and φ's gradient."""
    p = SoftLabels()
    whole = tuple(range(6))
    g_down, g_pre = p.batch(whole).g_down(), p.g_pre()
    expected, expected_gradient = inner(g_down, g_pre), p.phi_gradient(dot, g_down)
    feedback = [p.batch(rows).g_down() for rows in itertools.combinations(whole, 3)]
    values, gradients, cosines = [], [], []
    for rows in itertools.combinations(whole, 2):
        p.batch(rows)
        for g in feedback:
            p.phi.grad = None
            step = value_step(p, p.theta, g, dot, double_backward, [p.phi])
            assert p.phi.grad is not None
            values.append(step.value)
            cosines.append(step.cosine)
            gradients.append(-p.phi.grad)
    torch.testing.assert_close(torch.stack(values).mean(), expected)
    torch.testing.assert_close(torch.stack(gradients).mean(0), expected_gradient)
    assert float(torch.stack(values).std()) > 0.1 * abs(float(expected))  # each alone is far off
    # The cosine is a ratio, and biased towards zero.
    assert float(torch.stack(cosines).mean().abs()) < 0.9 * float((expected / norm(g_down) / norm(g_pre)).abs())


def test_one_batch_for_both_gradients_biases_value_by_their_covariance() -> None:
    p = SoftLabels()
    whole, size = tuple(range(6)), 2
    single = [(p.batch((row,)).g_down(), p.g_pre()) for row in whole]
    g_down, g_pre = p.batch(whole).g_down(), p.g_pre()
    shared = [inner(p.batch(rows).g_down(), p.g_pre()) for rows in itertools.combinations(whole, size)]
    bias = torch.stack(shared).mean() - inner(g_down, g_pre)
    # Batches drawn without replacement: the covariance of their means.
    covariance = torch.stack([inner(down, pre) for down, pre in single]).sum() - 6 * inner(g_down, g_pre)
    torch.testing.assert_close(bias, covariance / 5 * (1 / size - 1 / 6))
    assert abs(float(bias)) > 0.1 * abs(float(inner(g_down, g_pre)))


# --- scope --------------------------------------------------------------------------------------------------


def test_what_a_narrow_scope_omits_is_bounded() -> None:
    """|V_full − V_S| ≤ ‖g_down‖‖g_pre‖ over the parameters outside S (paper, eq. 20); equal if parallel there."""
    full, narrow = SoftLabels(), SoftLabels(scope=r"^2\.")
    outside = [index for index, name in enumerate(full.theta) if name not in narrow.theta]
    assert 0 < len(outside) < len(full.theta)
    g_down, g_pre = full.g_down(), full.g_pre()

    def omitted(down: Gradient) -> tuple[Tensor, Tensor, Tensor]:
        inside = [part for index, part in enumerate(down) if index not in outside]
        rest = [down[index] for index in outside], [g_pre[index] for index in outside]
        return inner(down, g_pre) - inner(inside, narrow.g_pre()), inner(*rest), norm(rest[0]) * norm(rest[1])

    difference, rest, bound = omitted(g_down)
    torch.testing.assert_close(difference, rest)
    assert 1e-3 * float(bound) < abs(float(difference)) < 0.99 * float(bound)
    parallel = [-2 * g_pre[index] if index in outside else part for index, part in enumerate(g_down)]
    difference, _, bound = omitted(parallel)
    torch.testing.assert_close(-difference, bound)


# --- φ's gradient against the true update -------------------------------------------------------------------


def test_dot_is_the_limit_of_autograd_through_one_sgd_step() -> None:
    p = SoftLabels()
    found = p.phi_gradient(dot, p.g_down())

    def through(eta: float) -> Tensor:
        decrease = p.downstream(p.theta) - p.downstream(p.moved([-eta * g for g in p.g_pre_of_phi()]))
        return torch.autograd.grad(decrease / eta, p.phi)[0]

    etas = [1e-2, 1e-3, 1e-4, 1e-5]
    errors = [relative(found, through(eta)) for eta in etas]
    assert log_slope(etas, errors) == pytest.approx(1, abs=0.05)
    assert errors[-1] < 1e-4


def test_adam_is_the_limit_of_autograd_through_one_adam_step() -> None:
    p = SoftLabels()
    optimizer = torch.optim.AdamW(p.model.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.0)
    for rows in ((0, 1, 2), (3, 4), (1, 5)):
        optimizer.zero_grad()
        p.batch(rows).downstream(dict(p.model.named_parameters())).backward()
        optimizer.step()
    p.batch((0, 2, 3, 5))
    held = list(p.model.parameters())
    p.theta = matching(p.model, ["."]).parameters(p.model)

    def update(gradient: Gradient) -> Gradient:
        """Adam as published (arXiv 1412.6980, algorithm 1), per unit of learning rate; its fourth step."""
        moved = []
        for parameter, g in zip(held, gradient, strict=True):
            m = 0.8 * optimizer.state[parameter]["exp_avg"] + 0.2 * g
            v = 0.95 * optimizer.state[parameter]["exp_avg_sq"] + 0.05 * g**2
            moved.append(-(m / (1 - 0.8**4)) / ((v / (1 - 0.95**4)).sqrt() + 1e-3))
        return moved

    for own, real in zip(update(p.g_pre()), optimizer_update(optimizer, held, p.g_pre()), strict=True):
        torch.testing.assert_close(1e-2 * own, real, rtol=1e-9, atol=1e-14)

    g_down = p.g_down()
    found = p.phi_gradient(adam(AdamState.of(optimizer, held)), g_down)
    first_order = torch.autograd.grad(-inner(g_down, update(p.g_pre_of_phi())), p.phi)[0]
    assert relative(found, first_order) < 1e-9

    def through(eta: float) -> Tensor:
        decrease = p.downstream(p.theta) - p.downstream(p.moved([eta * d for d in update(p.g_pre_of_phi())]))
        return torch.autograd.grad(decrease / eta, p.phi)[0]

    etas = [1e-4, 1e-5, 1e-6, 1e-7]
    errors = [relative(found, through(eta)) for eta in etas]
    assert errors[-1] < 1e-5
    assert log_slope(etas[:3], errors[:3]) == pytest.approx(1, abs=0.05)
    # Which is not what SGD's direction says.
    sgd = p.phi_gradient(dot, g_down)
    assert float((sgd * found).sum() / sgd.norm() / found.norm()) < 0.99


def test_cosine_is_what_a_normalised_step_realises() -> None:
    """A step of fixed length η along −g_pre/‖g_pre‖ lowers L_down by η‖g_down‖ cos: φ's gradient is the cosine's."""
    p = SoftLabels()
    g_down = p.g_down()
    g_pre = p.g_pre_of_phi()
    eta, length = 1e-6, norm(g_pre)
    decrease = p.downstream(p.theta) - p.downstream(p.moved([-eta * g / length for g in g_pre]))
    expected = torch.autograd.grad(decrease / (eta * norm(g_down)), p.phi)[0]
    assert relative(p.phi_gradient(cosine, g_down), expected) < 1e-4


# --- finite differences against the radius (the figure of docs/value.md) ------------------------------------


@pytest.fixture(scope="module")
def figure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finite_difference_error", EXAMPLES / "finite_difference_error.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_error_in_float64_is_truncation(figure: ModuleType) -> None:
    radii = [1e-2, 1e-1, 1.0]
    assert log_slope(radii, figure.errors("float64", radii, seeds=1)) == pytest.approx(2, abs=0.1)


def test_the_error_in_float32_falls_and_rises(figure: ModuleType) -> None:
    """Rounding ∝ 1/R, truncation ∝ R²: below 1e-3 where they meet."""
    small, default, best, large = figure.errors("float32", [1e-5, 1e-3, 3e-2, 1.0], seeds=3)
    assert small > 0.1
    assert best < 1e-3
    assert small > 10 * default > 10 * best
    assert large > 10 * best
    rounding = [1e-5, 1e-4, 1e-3]
    assert log_slope(rounding, figure.errors("float32", rounding, seeds=3)) == pytest.approx(-1, abs=0.25)


def test_a_tail_in_bfloat16_fails_at_every_radius(figure: ModuleType) -> None:
    radii = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    low, single = (figure.errors(curve, radii, seeds=3) for curve in ("bfloat16 tail", "float32"))
    assert all(error > 1 for error in low[:3])
    assert min(low) > 100 * min(single)
    assert all(math.isfinite(error) for error in low)
