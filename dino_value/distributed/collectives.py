"""Sums and rows over the processes that share a batch, with derivatives of any order.

Every process takes the gradient of its own part's loss, and the gradients are averaged: so the backward pass of a sum
is the sum of what the processes send back, which the adjoint pairs below are. `group=None` is every process; where
there is one, everything here is the identity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_alone = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What this process has is the whole batch: nothing in here waits for another process."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size(group: ProcessGroup | None = None) -> int:
    """How many processes share the batch; 1 without an initialised process group."""
    return 1 if _alone or not (dist.is_available() and dist.is_initialized()) else dist.get_world_size(group)


def total(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The sum over processes; the tensor itself where there is one."""
    return tensor if world_size(group) == 1 else _Total.apply(tensor, group)


def mean(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The mean over processes, of equal parts of the batch the batch's; the tensor itself where there is one."""
    return tensor if world_size(group) == 1 else total(tensor, group) / world_size(group)


def gather(tensor: Tensor, group: ProcessGroup | None = None) -> tuple[Tensor, int]:
    """The rows [W·n …] of all processes, n of each, and where this process's begin."""
    if world_size(group) == 1:
        return tensor, 0
    return _Gather.apply(tensor, group), len(tensor) * dist.get_rank(group)


def in_one_piece(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gathered by all processes together, where they are spread over them (distributed/fsdp.py)."""
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in tensors.items()}


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        summed = tensor.detach().clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(cotangents[0].contiguous(), ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size(group))]
        dist.all_gather(parts, tensor.detach().contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(cotangents[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    """The sum over processes, own rows: the adjoint of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        summed = rows.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=group)
        return summed.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(cotangents[0], ctx.group), None
