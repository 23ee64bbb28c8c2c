"""A learner spread over processes (FSDP2, `torch.distributed.fsdp`; the idea is ZeRO's, arXiv 1910.02054).

Each process holds its share of every parameter, and of its gradient, optimizer state and moving average. A block or
head is gathered when it runs, and its gradient is reduced to the shares. What must see whole parameters outside of that
forward pass (the designer's update, which takes derivatives by them; loading) runs on plain copies, which have values
only while `Plain.filled`: hooks meet no `functional_call`, and no second derivative.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dino_value.distributed.group import Whole, is_first, world
from dino_value.errors import UserError
from dino_value.models.blocks import as_unit, run_in, unknown

if TYPE_CHECKING:
    from dino_value.config import Config
    from dino_value.models.learner import Learner

# torch.distributed.fsdp and .tensor take a second to import, which a run that shards nothing need not wait for.


def shard(learner: Learner, trains: bool) -> nn.Module:
    """`Whole(learner)`, with the learner's parameters spread over all processes from now on: one unit for each block
    and head, and one for the rest.

    Args:
        trains: a backward pass follows each forward pass, so what it needs first stays gathered.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Nothing here writes into what a block returns.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view", UserWarning)
    mesh = init_device_mesh(next(learner.parameters()).device.type, (world(),))
    for block in learner.backbone.model.blocks:
        known = unknown(block) is None
        if known:
            as_unit(block)
        fully_shard(block, mesh=mesh)
        if known:
            register_fsdp_forward_method(block, "through")
    for head in (learner.head, learner.patch_head):
        if head is not None:
            fully_shard(head, mesh=mesh, reshard_after_forward=not trains)
    as_unit(learner)
    fully_shard(learner, mesh=mesh, reshard_after_forward=not trains)
    register_fsdp_forward_method(learner, "through")
    return _Sharded(learner)


class _Sharded(Whole):
    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return run_in(self.learner, function, self.learner, *arguments)


def check_sharding(config: Config) -> None:
    """Raises:
    UserError: a setting that needs the whole learner at every step.
    """
    d, fault = config.designer, None
    if config.method == "oracle":
        fault = "method=oracle steps along a direction of the whole scope"
    elif config.designs and (d.closed_form is not None or d.moves_targets):
        fault = f"designer.name={d.name} runs the scope's blocks at other values at every step"
    elif config.designs and d.control == "attention":
        fault = "designer.name=attention reads the teacher's attention outside of its forward pass"
    if fault:
        raise UserError(f"distributed.strategy=fsdp: {fault}; choose distributed.strategy=ddp, or a learned mask")


class Plain:
    """Student and teacher as plain modules: themselves, or where they are to be `sharded` copies of them, empty but
    while `filled`. Made before they are sharded."""

    def __init__(self, student: Learner, teacher: Learner, sharded: bool) -> None:
        self.learners, self.sharded = (student, teacher), sharded
        self.student, self.teacher = (copy.deepcopy(part) for part in self.learners) if sharded else self.learners
        if sharded:
            self._empty()

    @contextlib.contextmanager
    def filled(self, write: bool = False) -> Iterator[Plain]:
        """Gather all parameters, by all processes together, and let go of them in the end.

        Args:
            write: what the body makes of the copies is spread again.

        Raises:
            UserError: with `write`, a parameter has become of another shape.
        """
        if not self.sharded:
            yield self
            return
        # What is gathered unit by unit is FSDP's own memory, no copy; but it cannot be written back.
        learners = () if write else self.learners
        units: list[Any] = [part for learner in learners for part in learner.modules() if _is_unit(part)]
        for unit in units:
            unit.unshard()
        try:
            for mine, theirs in self._pairs():
                mine.data = full(theirs.detach())
            yield self
            if write:
                self._write()
        finally:
            self._empty()
            for unit in units:
                unit.reshard()

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for mine, theirs in zip((self.student, self.teacher), self.learners, strict=True):
            yield from zip(mine.parameters(), theirs.parameters(), strict=True)

    @torch.no_grad()
    def _write(self) -> None:
        for mine, theirs in self._pairs():
            if mine.shape != theirs.shape:
                raise UserError(
                    f"distributed.strategy=fsdp: a parameter of {list(theirs.shape)} cannot become one of "
                    f"{list(mine.shape)} (positions of another grid?); choose distributed.strategy=ddp"
                )
            theirs.copy_(spread(mine, theirs))
        for copied, learner in zip((self.student, self.teacher), self.learners, strict=True):
            learner.backbone.positions = copied.backbone.positions
            for mine, theirs in zip(copied.buffers(), learner.buffers(), strict=True):
                theirs.copy_(mine)

    def _empty(self) -> None:
        for learner in (self.student, self.teacher):
            for parameter in learner.parameters():
                parameter.data = parameter.data.new_empty(0)


def _is_unit(module: nn.Module) -> Any:
    return hasattr(module, "unshard")


def full(tensor: Tensor) -> Tensor:
    """A spread tensor in one piece, gathered by all processes together; another as it is."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def shares(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of them."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor of process 0, spread over all as `like` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.detach().to(like.device), like.device_mesh, like.placements)


def collect(tree: Any) -> Any:
    """A tree of state whose spread tensors are whole, in the memory of process 0, and None elsewhere."""
    if isinstance(tree, Tensor):
        if not hasattr(tree, "full_tensor"):
            return tree
        whole = full(tree.detach())  # one at a time
        return whole.cpu() if is_first() else None
    if isinstance(tree, Mapping):
        return {key: collect(value) for key, value in tree.items()}
    return type(tree)(collect(value) for value in tree) if type(tree) in (list, tuple) else tree


def spread_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's whole `state_dict` as `optimizer` takes it, whose parameters may be spread."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(hasattr(parameter, "full_tensor") for parameter in parameters):
        return dict(state)

    def own(value: Any, parameter: Tensor) -> Any:
        alike = isinstance(value, Tensor) and value.shape == parameter.shape
        return spread(value, parameter) if alike else value

    found = {
        index: {name: own(value, parameters[index]) for name, value in memory.items()}
        for index, memory in state["state"].items()
    }
    return {**state, "state": found}
