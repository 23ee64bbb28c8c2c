"""Parameter groups, schedules, the teacher's moving average, and a guard against steps that are not finite."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dino_value.errors import UserError


def parameter_groups(
    module: nn.Module, layer_decay: float = 1.0, patch_embed_scale: float = 1.0
) -> list[dict[str, object]]:
    """Two groups: weights, and the biases and norms (1-D tensors), which are never decayed (main_dino.py).

    With a factor below, there are such groups for each learning rate, and `lr_scale` is what to multiply it by.

    Args:
        layer_decay: of the learning rate, from one block to the block before it (`lr_scale`); 0.9 in DINOv2.
        patch_embed_scale: of the patch embedding's learning rate, besides; 0.2 in DINOv2.
    """
    scaled = not layer_decay == patch_embed_scale == 1
    depth = 1 + max((_block(name) for name, _ in module.named_parameters()), default=-1)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {} if scaled else {(1.0, True): [], (1.0, False): []}
    for name, parameter in module.named_parameters():
        plain = name.endswith(".bias") or parameter.ndim == 1
        scale = lr_scale(name, depth, layer_decay) * (patch_embed_scale if "patch_embed" in name else 1)
        groups.setdefault((scale, not plain), []).append(parameter)
    return [
        {"params": parameters, "decay": decay}
        | ({} if decay else {"weight_decay": 0.0})
        | ({"lr_scale": scale} if scaled else {})
        for (scale, decay), parameters in groups.items()
    ]


def lr_scale(name: str, depth: int, layer_decay: float) -> float:
    """Factor of a parameter's learning rate, `layer_decay` to the power of the layers after its own (DINOv2).

    The embeddings of a backbone of `depth` blocks are layer 0, block i is layer i + 1; all else, its final norm,
    registers and the head included, is layer depth + 1 and has factor 1. `name` is as in a learner (`backbone.…`) or
    in a backbone (`model.…`).
    """
    layer = _block(name) + 1
    if layer == 0:
        embedding = _in_backbone(name) and any(part in name for part in _EMBEDDINGS)
        layer = 0 if embedding else depth + 1
    return layer_decay ** (depth + 1 - layer)


_EMBEDDINGS = ("pos_embed", "patch_embed", "mask_token", "cls_token")


def _in_backbone(name: str) -> bool:
    return name.startswith(("backbone.", "model.", "mask_token."))


def _block(name: str) -> int:
    """Number of the backbone's block that a parameter is in; −1 outside."""
    found = re.search(r"\.blocks\.(\d+)\.", name) if _in_backbone(name) else None
    return int(found[1]) if found else -1


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


class FiniteGuard:
    """Keeps a step that is not finite from being applied, while the host does not wait for the device.

    The fused optimizers skip their update on the device where `found_inf` is set (the hook that gradient scaling uses).
    The host reads the same flags when they have arrived: at once on a CPU, a step later on a GPU.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[list[str], Tensor, torch.cuda.Event | None, Callable[[str], str]]] = deque()

    def watch(self, optimizer: torch.optim.Optimizer, message: Callable[[str], str], **terms: Tensor) -> None:
        """Before `optimizer.step()`: watch the scalars `terms`; `message` makes the error of the names of bad ones."""
        bad = ~torch.stack([term.detach().float() for term in terms.values()]).isfinite()
        found = bad.any().float()
        optimizer.found_inf = torch.maximum(found, getattr(optimizer, "found_inf", found))  # type: ignore[attr-defined]
        event = None
        if bad.is_cuda:
            bad = torch.empty(len(terms), dtype=torch.bool, pin_memory=True).copy_(bad, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((list(terms), bad, event, message))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step `optimizer` unless a term watched since its last step is not finite.

        Raises:
            UserError: as `check`.
        """
        self.check()
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]

    def check(self, wait: bool = False) -> None:
        """Read the flags that have arrived, or with `wait` all of them.

        Raises:
            UserError: the message of the first step that was not finite; nothing of it was applied.
        """
        while self._pending and (wait or self._pending[0][2] is None or self._pending[0][2].query()):
            names, bad, event, message = self._pending.popleft()
            if event is not None:
                event.synchronize()
            found = [name for name, flag in zip(names, bad.tolist(), strict=True) if flag]
            if found:
                raise UserError(message(" and ".join(found)))
