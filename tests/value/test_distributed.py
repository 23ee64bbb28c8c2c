"""Two processes with half of a batch each (gloo) against one with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from dino_value.value.directions import cosine, dot
from dino_value.value.distributed import average, average_gradients, ranks, total
from dino_value.value.engines import ENGINES, pre_gradient
from dino_value.value.step import value_step
from dino_value.value.terms import term_values, value_weights

WORLD, BATCH, WIDTH, CLASSES = 2, 6, 5, 4
DIRECTIONS = {"dot": dot, "cosine": cosine}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Soft:
    """A learner with soft targets that φ makes of the input; the loss is a mean over the batch."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.phi = [nn.Parameter(draw(1, WIDTH, CLASSES)), nn.Parameter(draw(2, CLASSES))]
        self.parameters = {"hidden": draw(3, WIDTH, WIDTH), "out": draw(4, WIDTH, CLASSES)}

    def trunk(self) -> tuple[Tensor, ...]:
        weight, bias = self.phi
        return (self.x @ weight + bias).softmax(-1) / len(self.x), self.x

    def terms(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        return -((hidden[1] @ parameters["hidden"]).tanh() @ parameters["out"]).log_softmax(-1)

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        return (hidden[0] * self.terms(hidden, parameters)).sum()


def downstream(task: Soft, x: Tensor) -> list[Tensor]:
    """A stand-in for g_down: the gradient of another loss, a mean over its batch."""
    leaves = {name: value.clone().requires_grad_() for name, value in task.parameters.items()}
    loss = task.terms((x, x), leaves)[:, 0].mean()
    return list(torch.autograd.grad(loss, list(leaves.values())))


def quantities(rank: int, world: int) -> dict[str, Any]:
    """Everything that a value step makes of part `rank` of `world`, and how many reductions it took."""
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    task = Soft(draw(5, BATCH, WIDTH)[part])
    reductions = 0
    all_reduce = dist.all_reduce

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal reductions
        reductions += 1
        return all_reduce(*arguments, **keywords)

    dist.all_reduce = counted
    try:
        g_down = average(downstream(task, draw(6, BATCH, WIDTH)[part]))
        g_pre = average(pre_gradient(task, task.trunk(), task.parameters))
        found: dict[str, Any] = {"g_down": g_down, "g_pre": g_pre, "reductions of two gradients": reductions}
        for name, direction in DIRECTIONS.items():
            found[f"u {name}"] = direction(g_down, g_pre)
            for engine in ENGINES:
                reductions = 0
                step = value_step(task, task.parameters, g_down, direction, ENGINES[engine], task.phi)
                found[f"step {name} {engine}"] = list(step)
                found[f"φ {name} {engine}"] = [parameter.grad for parameter in task.phi]
                found[f"reductions {name} {engine}"] = reductions
                for parameter in task.phi:
                    parameter.grad = None
    finally:
        dist.all_reduce = all_reduce
    values = term_values(lambda theta: task.terms(task.trunk(), theta), task.parameters, found["u dot"])
    valid = torch.ones(BATCH, CLASSES, dtype=torch.bool)
    valid[1] = False
    found["rows"] = [values, value_weights(values, 0.7, 1.5), value_weights(values, 0.7, valid=valid[part])]
    return found


def child(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    found = quantities(rank, WORLD)

    # The odds and ends: mixed dtypes, a rank without a gradient, a group of one.
    mixed = average([torch.full((2, 1), float(rank)), torch.full((3,), 1.0 + rank).bfloat16(), torch.empty(0)])
    lonely = nn.Parameter(torch.zeros(2))
    if rank == 0:
        lonely.grad = torch.ones(2)
    average_gradients([lonely])
    own = [dist.new_group([other]) for other in range(WORLD)][rank]
    alone = average([torch.full((1,), float(rank))], own)
    found["odds"] = {"mixed": mixed, "lonely": lonely.grad, "alone": alone, "total": total(torch.tensor(rank + 1.0))}
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(child, (str(folder),), WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """What one process finds on the whole batch."""
    return quantities(0, 1)


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["g_down", "g_pre", "u dot", "u cosine"])
def test_gradients_and_direction(both: list[dict[str, Any]], whole: dict[str, Any], name: str) -> None:
    for found in both:
        same(found[name], whole[name])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_value_step(both: list[dict[str, Any]], whole: dict[str, Any], direction: str, engine: str) -> None:
    for found in both:
        same(found[f"step {direction} {engine}"], whole[f"step {direction} {engine}"])
        same(found[f"φ {direction} {engine}"], whole[f"φ {direction} {engine}"])
    for part, other in zip(*(found[f"φ {direction} {engine}"] for found in both), strict=True):
        assert torch.equal(part, other)  # or φ would drift apart


def test_a_value_step_reduces_twice_and_g_down_once(both: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    for found in both:
        assert found["reductions of two gradients"] == 2
        assert {count for name, count in found.items() if name.startswith("reductions ")} == {2}
    assert {count for name, count in whole.items() if name.startswith("reductions ")} == {0}


def test_value_weights_take_their_statistics_over_all_ranks(both: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    same([torch.cat(parts) for parts in zip(*(found["rows"] for found in both), strict=True)], whole["rows"])


def test_odds_and_ends(both: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(both):
        first, second, empty = found["odds"]["mixed"]
        assert first.tolist() == [[0.5], [0.5]]
        assert second.tolist() == [1.5] * 3
        assert second.dtype == torch.bfloat16
        assert empty.shape == (0,)
        assert found["odds"]["lonely"].tolist() == [0.5, 0.5]
        assert found["odds"]["alone"][0].item() == rank
        assert found["odds"]["total"].item() == 3


def test_the_parts_do_differ(both: list[dict[str, Any]]) -> None:
    """Or the comparisons above would hold without any reduction."""
    first, second = (found["rows"][0] for found in both)
    assert not torch.allclose(first, second)
    half = Soft(draw(5, BATCH, WIDTH)[: BATCH // 2])
    assert not torch.allclose(pre_gradient(half, half.trunk(), half.parameters)[0], both[0]["g_pre"][0])


def test_one_process_is_the_identity() -> None:
    tensors = [torch.randn(2), torch.randn(3, 1)]
    assert ranks() == 1
    assert all(map(torch.equal, average(tensors), tensors))
    assert total(tensors[0]) is tensors[0]
    assert average([]) == []
