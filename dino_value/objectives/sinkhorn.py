"""Sinkhorn-Knopp centring: teacher targets that use every prototype equally often over the batch.

SwAV (Caron et al., 2020, arXiv 2006.09882, section 3.1); takes the place of DINO's moving centre in DINOv2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dino_value.distributed.collectives import total, world_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3, group: ProcessGroup | None = None) -> Tensor:
    """Teacher logits [… K] to targets [… K], probabilities over K; all leading dimensions are one batch.

    Each iteration gives every prototype the same mass over the batch, then every sample the same mass over the
    prototypes. In logarithms, so that no temperature overflows; the paper's factors 1/K and 1/n cancel in the last
    normalisation and are left out.

    Args:
        group: processes that share the batch, which may hold unequal parts of it, or none; `None` is every process.

    Raises:
        ValueError: no iteration, or a temperature that is not above 0.
    """
    if iterations < 1 or not temperature > 0:
        raise ValueError(
            f"sinkhorn: iterations={iterations}, temperature={temperature}: use at least 1 and a temperature above 0"
        )
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2) / temperature
        for _ in range(iterations):
            scores = scores - _log_total(scores.logsumexp(0), group)
            scores = scores.log_softmax(-1)
        return scores.exp().view(logits.shape)


def _log_total(logs: Tensor, group: ProcessGroup | None) -> Tensor:
    """log Σ exp over processes; −inf is the logarithm of a process's empty batch."""
    if world_size(group) == 1:
        return logs
    largest = logs.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest + total((logs - largest).exp(), group).log()
