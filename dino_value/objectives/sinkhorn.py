"""Sinkhorn-Knopp centring: teacher targets that use every prototype equally often over the batch.

SwAV (Caron et al., 2020, arXiv 2006.09882, section 3.1); takes the place of DINO's moving centre in DINOv2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

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
        ValueError: no iteration, or a temperature that is not above 0; or a gradient is wanted through several ranks.
    """
    if iterations < 1 or not temperature > 0:
        raise ValueError(
            f"sinkhorn: iterations={iterations}, temperature={temperature}: use at least 1 and a temperature above 0"
        )
    if world_size(group) > 1 and logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("sinkhorn over several processes passes no gradient to the teacher: call it under no_grad")
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2) / temperature
        for _ in range(iterations):
            scores = scores - _log_total(scores.logsumexp(0), group)
            scores = scores.log_softmax(-1)
        return scores.exp().view(logits.shape)


def world_size(group: ProcessGroup | None = None) -> int:
    """How many processes share the batch; 1 without an initialised process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def total(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The sum over processes, detached; the tensor itself where there is one."""
    if world_size(group) == 1:
        return tensor
    summed = tensor.detach().clone()
    dist.all_reduce(summed, group=group)
    return summed


def _log_total(logs: Tensor, group: ProcessGroup | None) -> Tensor:
    """log Σ exp over processes; −inf is the logarithm of a process's empty batch."""
    if world_size(group) == 1:
        return logs
    largest = logs.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest + total((logs - largest).exp(), group).log()
