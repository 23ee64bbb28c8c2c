"""Parameter groups, schedules, the teacher's moving average, and a guard against steps that are not finite."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

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


class Evidence(NamedTuple):
    """What a step was computed from: its number and its batch."""

    step: int
    batch: Sequence[Tensor]


class NotFinite(UserError):
    """A step was refused because of terms that are not finite; nothing of it was applied.

    `terms` are all that were watched with their values, `evidence` what they came from where that is known.
    """

    def __init__(self, message: str, terms: dict[str, float], evidence: Evidence | None) -> None:
        super().__init__(message)
        self.terms, self.evidence = terms, evidence


class _Pending(NamedTuple):
    names: list[str]
    values: Tensor
    arrived: torch.cuda.Event | None
    message: Callable[[str], str]
    evidence: Evidence | None  # of a step that may be skipped


class FiniteGuard:
    """Keeps a step that is not finite from being applied, while the host does not wait for the device.

    The fused optimizers skip their update on the device where `found_inf` is set (the hook that gradient scaling uses).
    The host reads the same values when they have arrived: at once on a CPU, a step later on a GPU.

    Args:
        allowed: skippable steps that are left out before one is an error.
    """

    def __init__(self, allowed: int = 0) -> None:
        self.allowed, self.skipped = allowed, 0
        self.on_skip: Callable[[NotFinite], None] = lambda refused: None
        self._pending: deque[_Pending] = deque()

    def watch(self, optimizer: torch.optim.Optimizer, message: Callable[[str], str], **terms: Tensor) -> None:
        """Before `optimizer.step()`: watch the scalars `terms`; `message` makes the error of the names of bad ones."""
        self._watch(optimizer, message, terms, None)

    def watch_skippable(
        self, optimizer: torch.optim.Optimizer, message: Callable[[str], str], evidence: Evidence, **terms: Tensor
    ) -> None:
        """`watch` of a step that may be left out; `evidence` is kept until the host has read the values."""
        self._watch(optimizer, message, terms, evidence)

    def _watch(
        self,
        optimizer: torch.optim.Optimizer,
        message: Callable[[str], str],
        terms: dict[str, Tensor],
        evidence: Evidence | None,
    ) -> None:
        values = torch.stack([term.detach().float() for term in terms.values()])
        found = (~values.isfinite()).any().float()
        optimizer.found_inf = torch.maximum(found, getattr(optimizer, "found_inf", found))  # type: ignore[attr-defined]
        arrived = None
        if values.is_cuda:
            values = torch.empty(len(terms), pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending.append(_Pending(list(terms), values, arrived, message, evidence))

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step `optimizer` unless a term watched since its last step is not finite.

        Returns:
            Whether the host has just read of a step that was left out.

        Raises:
            NotFinite: as `check`.
        """
        before = self.skipped
        self.check()
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        return self.skipped > before

    def check(self, wait: bool = False) -> None:
        """Read the values that have arrived, or with `wait` all of them.

        Raises:
            NotFinite: the first step that was not finite and may not be skipped; nothing of it was applied.
        """
        while self._pending and (wait or self._pending[0].arrived is None or self._pending[0].arrived.query()):
            watched = self._pending.popleft()
            if watched.arrived is not None:
                watched.arrived.synchronize()
            terms = dict(zip(watched.names, watched.values.tolist(), strict=True))
            bad = [name for name, value in terms.items() if not math.isfinite(value)]
            if not bad:
                continue
            refused = NotFinite(watched.message(" and ".join(bad)), terms, watched.evidence)
            if watched.evidence is None or self.skipped >= self.allowed:
                raise refused
            self.skipped += 1
            self.on_skip(refused)
