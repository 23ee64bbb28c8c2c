"""What the formula of the volumes says, against two processes whose collective operations are counted."""

from __future__ import annotations

import math

import pytest

from dino_value.config import load_config
from dino_value.eval.communication import (
    BASE,
    PAPER,
    SMALL,
    Machine,
    count,
    reduce_seconds,
    sizes_of,
    step_seconds,
    summed,
    volume,
)


@pytest.mark.slow  # starts two processes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_formula_is_what_is_counted(strategy: str) -> None:
    tiny = ["backbone.name=vit_tiny_patch16_224", "backbone.kwargs={embed_dim: 48, depth: 3, num_heads: 3}"]
    tiny += ["objective.hidden_dim=64", "objective.out_dim=128", f"distributed.strategy={strategy}"]
    seen, config = count(tiny), load_config(BASE, [*SMALL, *tiny])
    step, update = volume(config, sizes_of(config))
    # One bucket holds this gradient.
    assert [len(seen["step"]), sum(size for _, size in seen["step"])] == list(summed(step))
    assert [len(seen["update"]), sum(size for _, size in seen["update"])] == list(summed(update))


def test_the_model_of_larger_machines() -> None:
    machine = Machine()
    assert reduce_seconds(1, 10**9, 1, machine) == 0
    expected = 2 * 15 / 16 * 1e9 / machine.outside + 2 * math.log2(16) * machine.latency
    assert reduce_seconds(1, 10**9, 16, machine) == pytest.approx(expected)
    config = load_config(BASE, [*PAPER, "backbone.name=vit_base_patch16_224"])
    sizes = sizes_of(config)
    # θ: the backbone of 85.8 million and DINO's head; S: two blocks and the final norm.
    assert (sizes.backbone, sizes.scope) == (85_798_656, 2 * 7_087_872 + 2 * 768)
    times = [step_seconds(config, sizes, world, machine) for world in (1, 8, 256)]
    assert all(plain < value for plain, value in times)
    assert times[0][0] > times[1][0] > times[0][0] / 8  # never more than 8 times as fast
    assert times[2][0] > times[0][0] / 256 * 2  # one image a GPU: waiting for the network
    config.distributed.strategy = "fsdp"
    spread = [step_seconds(config, sizes, world, machine) for world in (8, 256)]
    assert spread[0][0] == pytest.approx(times[1][0], rel=0.1)  # parameters come while others are used
    assert spread[1][0] > times[2][0]  # or do not come in time
