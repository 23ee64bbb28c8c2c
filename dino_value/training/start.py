"""Where a new run begins: at the teacher of another, or at the heads of a training checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dino_value.errors import UserError
from dino_value.models.weights import fit_positions, load_head
from dino_value.runs.checkpoint import FOREIGN

if TYPE_CHECKING:
    from dino_value.training.trainer import Trainer

OPTIONAL = ("patch_head", "mask_token", "ibot", "gram_teacher")  # parts of learners and objectives


def start_from(trainer: Trainer, state: dict[str, Any]) -> None:
    """Begin a new run at the teacher of another: backbone, head and centre, for student and teacher alike.

    What only options of the objective have (iBOT's head and mask token, a Gram teacher) stays fresh where the other
    run lacks it.

    Raises:
        UserError: it is of another architecture or program.
    """
    if not isinstance(state.get("objective"), dict):
        raise UserError(f"start_from={trainer.config.start_from}: not a checkpoint of this program; {FOREIGN}")
    with trainer.plain.filled(write=True) as plain:
        modules = (plain.student, plain.teacher, trainer.loss)
        noted = fit_positions(modules, state, trainer.config.backbone.keep_grid)
        if noted:
            print(f"{trainer.config.start_from}: {noted}", file=sys.stderr)
        for module, part in zip(modules, ("teacher", "teacher", "objective"), strict=True):
            try:
                values = {name: value.float() for name, value in state[part].items()}
                found = module.load_state_dict(values, strict=False)
                odd = [*found.missing_keys, *found.unexpected_keys]
                odd = [name for name in odd if name.split(".")[0] not in OPTIONAL]
                if odd:
                    raise RuntimeError(f"{len(odd)} tensors are in one of them only, {odd[0]} the first")
            except RuntimeError as error:
                source = f"start_from={trainer.config.start_from}"
                raise UserError(f"{source}: {unlike(module, state[part], str(error))}") from None


def start_head(trainer: Trainer, path: str) -> None:
    """Begin with the projection heads, and the centre, of a DINO or DINOv2 training checkpoint.

    Raises:
        UserError: it has none, or of another size.
    """
    center = getattr(trainer.loss, "center", None)
    with trainer.plain.filled(write=True) as plain:
        print(load_head(path, plain.student.head, plain.teacher.head, center), file=sys.stderr)


def unlike(module: nn.Module, given: Mapping[str, Tensor], error: str) -> str:
    """Why the tensors `given`, of a checkpoint, do not fit `module`, and what to do; `error` is what torch said."""
    shapes = {name: list(value.shape) for name, value in module.state_dict().items()}
    wrong = [name for name in given if name in shapes and list(given[name].shape) != shapes[name]]
    alone = [name for name in given.keys() ^ shapes.keys() if name.split(".")[0] not in OPTIONAL]
    if any(name.startswith("backbone.") for name in [*wrong, *alone]):
        what, fix = "a backbone of another architecture", "set backbone.name and backbone.kwargs as that run had them"
    else:
        what = "heads of another size or objective"
        fix = "set objective.* as that run had it, or give backbone.weights in place of start_from for a fresh head"
    name = next((name for name in shapes if name in wrong), None)
    detail = (
        f"{name} is {list(given[name].shape)} there, {shapes[name]} here" if name else " ".join(error.split())[:200]
    )
    return f"{what}: {detail}; {fix}"
