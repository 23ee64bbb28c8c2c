"""What the benchmarks share: what is counted, and that it is counted right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dino_value.eval.benchmarks import timing
from dino_value.eval.benchmarks.timing import Case

CPU = torch.device("cpu")
MIB = 2**20


def mebibytes(count: int) -> Tensor:
    return torch.ones(count * MIB, dtype=torch.uint8)


def test_cases_take_turns_after_a_round_that_does_not_count() -> None:
    calls: list[str] = []

    def case(name: str) -> Case:
        def prepare() -> Callable[[], object]:
            calls.append(f"prepare {name}")
            return lambda: calls.append(name)

        return Case(name, prepare)

    seconds = timing.take_turns([case("a"), case("b")], 2, CPU)
    assert [name for name in calls if len(name) == 1] == ["b", "a", "a", "b", "b", "a"]
    assert calls[:2] == ["prepare b", "b"]
    assert {name: len(row) for name, row in seconds.items()} == {"a": 2, "b": 2}


def test_peak_of_tensors_is_exact() -> None:
    """Memory made by the set-up does not count, but its release during the work does."""

    def prepare() -> Callable[[], object]:
        kept = [mebibytes(8)]

        def work() -> None:
            first = mebibytes(2)  # +2
            kept.pop()  # −6
            second = mebibytes(5)  # −1
            del first, second
            mebibytes(3)

        return work

    assert timing.peak_tensors(Case("", prepare)) == 2 * MIB

    def work() -> None:
        both = [mebibytes(4), mebibytes(3)]
        both.clear()
        mebibytes(6)

    assert timing.peak_tensors(Case("", lambda: work)) == 7 * MIB


def test_peak_of_tensors_sees_what_a_backward_pass_keeps() -> None:
    x = mebibytes(4).view(torch.float32).requires_grad_()

    def work() -> None:
        (x.exp().exp()).sum().backward()

    x.grad = torch.zeros_like(x)
    # Two results are kept; then two gradients, one of which is added to .grad; the sum's is a broadcast scalar.
    assert 12 * MIB <= timing.peak_tensors(Case("", lambda: work)) <= 16 * MIB + 4096


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_resident_agrees_with_the_tensors() -> None:
    found = timing.peak_resident(lambda: [mebibytes(32), mebibytes(32)].clear())
    assert found is not None
    assert 60 * MIB < found < 100 * MIB


def test_spread() -> None:
    assert timing.spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert timing.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
