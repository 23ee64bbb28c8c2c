"""Checkpoints: one tree of state in one file, complete or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from dino_value.errors import UserError

_PATTERN = "step_*.pt"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` for `step`, then drop all but the newest `keep`; a kill at any moment leaves the older ones whole.

    Raises:
        OSError: the disk refused it; nothing is left of the attempt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob(".step_*.pt.*"):  # left by a kill in the middle of a write
        torn.unlink()
    path = folder / f"step_{step:08d}.pt"
    temporary = folder / f".{path.name}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # what torch's writer makes of a full disk
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    finally:
        temporary.unlink(missing_ok=True)
    for old in sorted(folder.glob(_PATTERN))[:-keep]:
        old.unlink()
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run, if it has one."""
    found = sorted(folder.glob(_PATTERN))
    return found[-1] if found else None


def load_checkpoint(path: str | os.PathLike[str], part: str = "teacher") -> dict[str, Any]:
    """The state tree of a checkpoint, or of a run folder's newest one; weights-only, never executed.

    Args:
        part: what such a checkpoint must have.

    Raises:
        UserError: nothing there, or not a readable checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        newest = latest_checkpoint(path / "checkpoints")
        if newest is None:
            raise UserError(f"{path}: a folder without checkpoints; give a run folder or a checkpoint file")
        path = newest
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torn zip, foreign pickle: whatever it is, it is not ours
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a readable checkpoint: {reason}") from None
    if not isinstance(state, dict) or part not in state:
        raise UserError(f"{path}: not a checkpoint of this program (it has no {part})")
    return state
