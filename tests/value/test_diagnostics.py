"""Diagnostics against the plain vectors they speak of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from dino_value.value import Gradient, double_backward, value_step
from dino_value.value.diagnostics import (
    Alignment,
    ValueGain,
    alignment,
    gradient_norm,
    spearman_brown,
    split_half,
    task_alignment,
    value_gain,
)
from dino_value.value.directions import dot

SHAPES = [(4, 3), (7,), (1, 2, 5)]


def draw(seed: int, shapes: list[tuple[int, ...]] = SHAPES) -> Gradient:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]


def flat(gradient: Gradient) -> Tensor:
    return torch.cat([part.flatten() for part in gradient])


def cos(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / a.norm() / b.norm()


def test_alignment_is_the_cosine() -> None:
    a, b = draw(0), draw(1)
    torch.testing.assert_close(alignment(a, b), cos(flat(a), flat(b)))
    torch.testing.assert_close(alignment(a, [-3 * part for part in a]), torch.tensor(-1.0, dtype=torch.float64))


def test_alignment_is_blind_to_scale_down_to_float32s_smallest_gradients() -> None:
    a, b = ([part.float() for part in draw(seed)] for seed in (0, 1))
    tiny = [1e-15 * part for part in a], [1e-15 * part for part in b]
    torch.testing.assert_close(alignment(*tiny), alignment(a, b))


def test_alignment_with_nothing_is_zero() -> None:
    assert alignment(draw(0), [torch.zeros_like(part) for part in draw(0)]) == 0


def test_gradient_norm_counts_what_has_a_gradient() -> None:
    first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
    (3 * first).sum().backward()
    (4 * second).sum().backward()
    torch.testing.assert_close(gradient_norm([first, second, third]), torch.tensor(50.0).sqrt())
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        gradient_norm([third])


@pytest.mark.parametrize("count", [4, 5])
def test_split_half_compares_even_with_odd(count: int) -> None:
    gradients = [draw(seed) for seed in range(count)]
    rows = [flat(gradient) for gradient in gradients]
    expected = cos(rows[0] + rows[2], rows[1] + rows[3])  # a fifth is left out
    torch.testing.assert_close(split_half(gradients), expected)


def test_split_half_leaves_its_input() -> None:
    gradients = [draw(seed) for seed in range(4)]
    split_half(gradients)
    for seed, gradient in enumerate(gradients):
        assert all(map(torch.equal, gradient, draw(seed)))


def test_split_half_needs_two() -> None:
    with pytest.raises(ValueError, match="at least two batches, not 1"):
        split_half([draw(0)])


def test_split_half_and_its_step_up_measure_signal_to_noise() -> None:
    """Signal of length 1, noise of squared length 6, 12 batches: r = 1/(1 + 1) and, stepped up, 1/(1 + 1/2)."""
    shapes = [(200, 100)]
    signal = draw(99, shapes)[0] / 20_000**0.5
    gradients = [[signal + part * (6 / 20_000) ** 0.5 for part in draw(seed, shapes)] for seed in range(12)]
    halves = split_half(gradients)
    assert float(halves) == pytest.approx(1 / 2, abs=0.03)
    whole = spearman_brown(halves)
    assert float(whole) == pytest.approx(2 / 3, abs=0.03)
    mean = torch.stack([gradient[0] for gradient in gradients]).mean(0)
    assert float(whole.sqrt()) == pytest.approx(float(alignment([mean], [signal])), abs=0.02)


def test_task_alignment_is_the_pairwise_cosine() -> None:
    gradients = [draw(seed) for seed in range(3)]
    found = task_alignment(gradients)
    assert found.shape == (3, 3)
    for row, a in enumerate(gradients):
        for column, b in enumerate(gradients):
            torch.testing.assert_close(found[row, column], cos(flat(a), flat(b)))
    with pytest.raises(ValueError, match="at least one task"):
        task_alignment([])


class Scaled:
    """L = Σ_i h_i w_i with h = strength · x: g_pre is h itself. `graph` tells whether the trunk recorded one."""

    def __init__(self, strength: Tensor, x: Tensor) -> None:
        self.strength, self.x = strength, x
        self.graph: bool | None = None

    def trunk(self) -> tuple[Tensor, ...]:
        hidden = self.strength * self.x
        self.graph = hidden.requires_grad
        return (hidden,)

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        return (hidden[0] * parameters["w"]).sum()


def test_value_gain_by_hand() -> None:
    phi = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    x, y = (torch.tensor(v, dtype=torch.float64) for v in ([3.0, 4.0], [0.0, 1.0]))
    held = [torch.tensor([1.0, 0.0], dtype=torch.float64)]
    designed = Scaled(phi, x)
    gain = value_gain(designed, Scaled(torch.ones(()), x), Scaled(phi.detach(), y), {"w": torch.zeros_like(x)}, held)
    assert [float(v) for pair in gain for v in pair] == pytest.approx([6, 0.6, 3, 0.6, 0, 0])
    assert [float(v) for v in gain.over_plain] == pytest.approx([3, 0])  # V doubles with ‖g_pre‖, the cosine does not
    assert [float(v) for v in gain.over_random] == pytest.approx([6, 0.6])
    assert designed.graph is False
    assert phi.grad is None
    assert not any(v.requires_grad for pair in gain for v in pair)


def test_value_gain_agrees_with_value_step(problem: Callable[..., Any]) -> None:
    p = problem()
    held = p.direction()
    step = value_step(p.task(), p.theta, held, dot, double_backward, p.phi)
    before = [part.clone() for part in p.take_phi_gradient()]
    gain = value_gain(p.task(), p.task(), p.task(), p.theta, held)
    assert isinstance(gain, ValueGain)
    assert isinstance(gain.designed, Alignment)
    torch.testing.assert_close(gain.designed.value, step.value)
    torch.testing.assert_close(gain.designed.cosine, step.cosine)
    assert [float(v) for v in (*gain.over_plain, *gain.over_random)] == [0, 0, 0, 0]
    assert len(before) == len(p.phi)
    assert all(parameter.grad is None for parameter in [*p.phi, *p.student.parameters()])


def gain_of_rows(rows: slice) -> ValueGain:
    """L is the mean over rows of strength · ⟨x, w⟩."""
    x = torch.tensor([[3.0, 4.0], [1.0, -1.0], [0.0, 2.0], [5.0, 1.0]], dtype=torch.float64)[rows] / len(range(4)[rows])
    tasks = [Scaled(torch.tensor(strength, dtype=torch.float64), x) for strength in (2.0, 1.0, -1.0)]
    theta = {"w": torch.zeros(2, dtype=torch.float64)}
    return value_gain(*tasks, theta, [torch.tensor([1.0, 3.0], dtype=torch.float64)])


def child(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    gain = gain_of_rows(slice(2 * rank, 2 * rank + 2))
    torch.save([float(v) for pair in gain for v in pair], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_gain_what_one_process_does(tmp_path: Path) -> None:
    mp.spawn(child, (str(tmp_path),), 2)
    whole = [float(v) for pair in gain_of_rows(slice(0, 4)) for v in pair]
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(whole)
    half = [float(v) for pair in gain_of_rows(slice(0, 2)) for v in pair]
    assert half[1] != pytest.approx(whole[1], rel=1e-2)
