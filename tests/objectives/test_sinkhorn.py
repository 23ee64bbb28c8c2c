"""Sinkhorn-Knopp targets: against loops written out, what the published code returned, and several processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dino_value.objectives.dino import DINOLoss
from dino_value.objectives.ibot import IBOTLoss
from dino_value.objectives.sinkhorn import sinkhorn, total, world_size

REFERENCE = Path(__file__).parents[1] / "data" / "reference"


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def naive(logits: list[list[float]], temperature: float, iterations: int) -> list[list[float]]:
    """SwAV's algorithm with its own constants: Q [K n], rows to 1/K, columns to 1/n, entry by entry."""
    samples, prototypes = len(logits), len(logits[0])
    q = [[np.exp(logits[i][k] / temperature) for i in range(samples)] for k in range(prototypes)]
    everything = sum(map(sum, q))
    q = [[entry / everything for entry in row] for row in q]
    for _ in range(iterations):
        q = [[entry / sum(row) / prototypes for entry in row] for row in q]
        columns = [sum(row[i] for row in q) for i in range(samples)]
        q = [[row[i] / columns[i] / samples for i in range(samples)] for row in q]
    return [[q[k][i] * samples for k in range(prototypes)] for i in range(samples)]


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(("samples", "prototypes"), [(1, 4), (2, 2), (6, 3), (5, 9)])
def test_the_algorithm_entry_by_entry(samples: int, prototypes: int, iterations: int) -> None:
    logits = draw(samples, prototypes)
    expected = torch.tensor(naive(logits.tolist(), 0.3, iterations), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(logits, 0.3, iterations), expected, rtol=1e-11, atol=1e-14)


def test_the_published_targets_and_loss() -> None:
    with np.load(REFERENCE / "dinov2_sinkhorn.npz") as file:
        recorded = {key: torch.from_numpy(np.asarray(file[key])) for key in file}
    temperature, iterations = float(recorded["temp"]), int(recorded["iterations"])
    targets = sinkhorn(recorded["teacher"], temperature, iterations)
    torch.testing.assert_close(targets, recorded["targets"], rtol=1e-5, atol=1e-7)
    # DINOv2 sums over all pairs, those of one view with itself too.
    terms = DINOLoss(24, 0.1).terms(recorded["student"], sinkhorn(recorded["teacher"].view(2, 6, 24), temperature))
    expected = recorded["loss_of_3_students_2_teachers"]
    torch.testing.assert_close(terms.mean(-1).sum(), expected, rtol=1e-5, atol=0)


def test_leading_dimensions_are_one_batch() -> None:
    logits = draw(2, 3, 5)
    assert torch.equal(sinkhorn(logits, 0.1), sinkhorn(logits.flatten(0, 1), 0.1).view(2, 3, 5))


def test_many_iterations_use_every_prototype_equally() -> None:
    targets = sinkhorn(3 * draw(12, 4), 1.0, 200)
    torch.testing.assert_close(targets.sum(-1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(targets.sum(0), torch.full((4,), 3.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_logits_whose_exponential_overflows() -> None:
    """exp(50 / 0.04) is no float: the published form would return NaN."""
    logits = 50 * draw(6, 5, dtype=torch.float32)
    found = sinkhorn(logits, 0.04)
    assert found.isfinite().all()
    torch.testing.assert_close(found, sinkhorn(logits.double(), 0.04).float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_never_in_less_than_float32(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        targets = sinkhorn(draw(4, 6).to(dtype), 0.05)
    assert targets.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(targets.sum(-1), torch.ones(4, dtype=targets.dtype))


def test_its_gradient() -> None:
    assert torch.autograd.gradcheck(lambda logits: sinkhorn(logits, 0.7), draw(4, 3).requires_grad_())


@pytest.mark.parametrize(("temperature", "iterations"), [(0.1, 0), (0.0, 3), (-1.0, 3), (float("nan"), 3)])
def test_bad_settings(temperature: float, iterations: int) -> None:
    with pytest.raises(ValueError, match=r"use at least 1 and a temperature above 0"):
        sinkhorn(draw(2, 3), temperature, iterations)


SPLITS = ((7, 0), (3, 4))


def child(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    logits = draw(7, 5)
    found: dict[str, object] = {"ranks": world_size(), "total": total(torch.tensor(rank + 1.0))}
    for split in SPLITS:
        part = logits[: split[0]] if rank == 0 else logits[split[0] :]
        loss = IBOTLoss(5).double()
        loss.update_center(part)
        found[f"{split}"] = (sinkhorn(part, 0.2), loss.center)
    found["alone"] = sinkhorn(logits[rank:], 0.2, group=[dist.new_group([other]) for other in range(2)][rank])
    own = slice(0, 3) if rank == 0 else slice(3, 7)
    part = logits[own].requires_grad_()
    (found["gradient"],) = torch.autograd.grad((sinkhorn(part, 0.2) * draw(7, 5)[own].sin()).sum(), part)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # starts two interpreters
def test_two_processes_with_unequal_parts(tmp_path: Path) -> None:
    mp.spawn(child, (str(tmp_path),), 2)
    both = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    logits = draw(7, 5)
    whole = IBOTLoss(5).double()
    whole.update_center(logits)
    for split in SPLITS:
        targets = torch.cat([found[f"{split}"][0] for found in both])
        torch.testing.assert_close(targets, sinkhorn(logits, 0.2), rtol=1e-12, atol=1e-15)
        for found in both:
            torch.testing.assert_close(found[f"{split}"][1], whole.center)
    for rank, found in enumerate(both):
        assert (found["ranks"], found["total"]) == (2, 3)
        assert torch.equal(found["alone"], sinkhorn(logits[rank:], 0.2))
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad((sinkhorn(logits, 0.2) * draw(7, 5).sin()).sum(), logits)
    torch.testing.assert_close(torch.cat([found["gradient"] for found in both]), gradient)
    logits = logits.detach()
    assert not torch.allclose(sinkhorn(logits[:3], 0.2), sinkhorn(logits, 0.2)[:3])  # the parts do need each other
