"""Several ranks, each with its part of the batch: what is averaged so that V and φ's gradient are the whole batch's.

With the loss a mean over equally large parts, g_pre and φ's gradient are means over ranks; u is made from averaged
gradients, so it is the same everywhere. `group=None` means every rank, as in torch.distributed; without an initialised
process group everything here is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def total(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The sum over ranks; a new tensor where there are several."""
    if ranks(group) == 1:
        return tensor
    summed = tensor.detach().clone()
    dist.all_reduce(summed, group=group)
    return summed


def average(tensors: Sequence[Tensor], group: ProcessGroup | None = None) -> list[Tensor]:
    """The mean over ranks of each tensor, detached; one all-reduce for all of them, in their widest dtype.

    Reduce g_down with this once, when it is measured; `value_step` averages the rest.
    """
    if ranks(group) == 1 or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = (flat / ranks(group)).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def average_gradients(phi: Sequence[Tensor], group: ProcessGroup | None = None) -> None:
    """Replace the .grad of each tensor by its mean over ranks; a rank without one counts as zero.

    The tensors must not be those of a DistributedDataParallel module, which would reduce them a second time.
    """
    if ranks(group) == 1:
        return
    gradients = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in phi]
    for tensor, mean in zip(phi, average(gradients, group), strict=True):
        tensor.grad = mean


def ranks(group: ProcessGroup | None = None) -> int:
    """How many processes share the batch; 1 without an initialised process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
