"""What only a CUDA device can show; skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from dino_value.config import Config
from dino_value.errors import UserError
from dino_value.training.trainer import Trainer, train
from dino_value.value import ENGINES

pytestmark = pytest.mark.gpu
Make = Callable[..., Config]


@pytest.mark.parametrize("method", ["baseline", "value", "random"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_trains_and_goes_on(tiny: Make, method: str, precision: str) -> None:
    overrides = ("device=cuda", f"method={method}", f"precision={precision}")
    folder = train(tiny(*overrides), quiet=True)
    assert (folder / "backbone.safetensors").is_file()
    run = Trainer(tiny(*overrides))
    run.load_state_dict(torch.load(folder / "checkpoints" / "step_00000002.pt", weights_only=True))
    run.learner_update(*run.stream.batch(run.step))
    run.guard.check(wait=True)


def test_a_step_that_is_not_finite_is_not_applied(tiny: Make) -> None:
    run = Trainer(tiny("device=cuda", "method=baseline"))
    before = [value.clone() for value in run.student.parameters()]
    run.loss.center.fill_(torch.nan)

    def step() -> None:
        run.learner_update(*run.stream.batch(0))
        run.guard.check(wait=True)

    with pytest.raises(UserError, match=r"step 0: loss and gradient_norm not finite"):
        step()
    assert all(torch.equal(old, new) for old, new in zip(before, run.student.parameters(), strict=True))


def test_the_engines_agree(tiny: Make) -> None:
    gradients = []
    for engine in (ENGINES["double_backward"], partial(ENGINES["finite_difference"], radius=1e-3)):
        run = Trainer(tiny("device=cuda", "designer.lr=0", "designer.lambda_spars=0", "designer.lambda_tv=0"))
        run.steer.engine = engine
        run.steer.update(0, 0.04)
        gradients.append(torch.cat([value.grad.flatten() for value in run.steer.designer.parameters()]))
    assert torch.linalg.vector_norm(gradients[0] - gradients[1]) < 1e-2 * torch.linalg.vector_norm(gradients[0])
