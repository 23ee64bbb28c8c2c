"""Parameter groups, schedules and the teacher's moving average."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def parameter_groups(module: nn.Module) -> list[dict[str, object]]:
    """Two groups: weights, and the biases and norms (1-D tensors), which are never decayed (main_dino.py)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        (plain if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed, "decay": True}, {"params": plain, "decay": False, "weight_decay": 0.0}]


def cosine_schedule(step: int, steps: int, start: float, end: float, warmup: int = 0) -> float:
    """Linear from 0 to `start` over `warmup` steps, then half a cosine to `end`; steps from 0 (main_dino.py)."""
    if step < warmup:
        return start * step / max(1, warmup - 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def linear_schedule(step: int, start: float, end: float, over: int) -> float:
    """From `start` to `end` in `over` steps, then `end`; the published teacher temperature."""
    return end if step >= over - 1 else start + (end - start) * step / max(1, over - 1)


@torch.no_grad()
def update_ema(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, in one fused pass."""
    torch._foreach_lerp_(list(teacher), list(student), 1 - momentum)
