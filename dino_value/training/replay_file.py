"""RUN/nonfinite/step_N.pt: a step whose loss or gradient was not finite, kept whole for `dino-value replay`.

The file holds the configuration, the state of the run as the step began, its number and its batch. On a GPU the host
hears of such a step a little later: the weights in the file are then those of that moment, which the refused step
itself did not change.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from dino_value.distributed import group as distributed
from dino_value.errors import UserError
from dino_value.files import sweep
from dino_value.runs.checkpoint import read_state, write_state
from dino_value.training.optim import NotFinite

if TYPE_CHECKING:
    from dino_value.training.trainer import Trainer


def save_replay(folder: Path, run: Trainer, refused: NotFinite) -> str:
    """Write RUN/nonfinite/step_N.pt; the command that replays it, or why it could not be written."""
    if distributed.world() > 1:
        return "a step of several processes is not kept: run it in one to replay it"
    step, batch = refused.evidence or (run.step, run.batch)
    state = run.state_dict() | {"step": step}
    if run.steer is not None:
        state["steer"] = run.steer.state_before(step)
    path = folder / "nonfinite" / f"step_{step:08d}.pt"
    try:
        path.parent.mkdir(exist_ok=True)
        sweep(path.parent)
        write_state(
            path,
            {
                "config": OmegaConf.to_yaml(OmegaConf.structured(run.config)),
                "message": str(refused),
                "terms": refused.terms,
                "batch": [part.cpu() for part in batch],
                "state": state,
            },
        )
    except OSError as error:
        return f"what it was computed from could not be kept ({error.strerror or error})"
    return f"to compute it again: dino-value replay {path}"


def read_replay(path: Path) -> dict[str, Any]:
    """What `save_replay` wrote.

    Raises:
        UserError: another file, or none.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give one of RUN/nonfinite")
    content = read_state(path)
    kinds = {"config": str, "message": str, "terms": dict, "batch": list, "state": dict}
    if any(not isinstance(content.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"{path}: not a file for replay; give one of RUN/nonfinite")
    return content
