"""Checkpoints: one tree of state in one file, complete or absent, and checked by its checksums when it is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_value.errors import UserError
from dino_value.files import damaged_part, replacing, sweep

_PATTERN = "step_*.pt"
BEST_NAME = "best.pt"
"""A link to the best checkpoint, where `checkpoint.best` names a metric."""


def save_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], keep: int, every: int = 0, best: int | None = None
) -> Path:
    """Write `state` for `step`, then `tidy`; a kill at any moment leaves the older
    ones whole.

    Raises:
        OSError: the disk refused it; nothing is left of the attempt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    path = folder / _name(step)
    write_state(path, state)
    tidy(folder, keep, every, best)
    return path


def tidy(folder: Path, keep: int, every: int = 0, best: int | None = None) -> None:
    """Point to the best checkpoint and drop those that `dropped` names; on resume: what a kill left undone of it."""
    steps = [_step(found) for found in _found(folder)]
    if best in steps:
        _link(folder / BEST_NAME, _name(best))
    for old in dropped(steps, keep, every, best):
        (folder / _name(old)).unlink()
    if (folder / BEST_NAME).is_symlink() and not (folder / BEST_NAME).exists():  # the best one was damaged
        (folder / BEST_NAME).unlink()


def dropped(steps: Sequence[int], keep: int, every: int = 0, best: int | None = None) -> list[int]:
    """Which of the checkpoints of `steps` (ascending) go: all but the last `keep`, the multiples of `every` (0: none)
    and `best`."""
    return [step for step in steps[:-keep] if step != best and not (every and step % every == 0)]


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """`torch.save`, complete or not at all.

    Raises:
        OSError: the disk refused it.
    """
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # what torch's writer makes of a full disk
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


FOREIGN = "for weights of others give backbone.weights, and objective.head for their head"


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run, if it has one."""
    found = _found(folder)
    return found[-1] if found else None


def newest_whole(folder: Path, part: str = "teacher") -> tuple[dict[str, Any], list[str]]:
    """The state of the newest checkpoint in `folder` that is whole; newer ones are set aside (`.damaged` is added to
    their names), each with a line on what is wrong with it.

    Raises:
        UserError: none is whole; all are left as they are.
    """
    problems: dict[Path, str] = {}
    for path in reversed(_found(folder)):
        try:
            state = load_checkpoint(path, part)
        except UserError as error:
            problems[path] = str(error)
            continue
        for bad in problems:
            bad.rename(bad.with_name(f"{bad.name}.damaged"))
        return state, [f"{text}; set aside, going on from {path.name}" for text in problems.values()]
    raise UserError(f"{'; '.join(problems.values())}. No older one is left: remove {folder} to begin again")


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
    state = read_state(path)
    if part not in state:
        raise UserError(f"{path}: not a checkpoint of this program (it has no {part}); {FOREIGN}")
    return state


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote; its checksums are verified, and nothing in it is executed.

    Raises:
        UserError: torn, damaged, or of another kind.
    """
    try:
        damaged = damaged_part(path)
        if damaged is not None:
            raise UserError(f"{path}: not a readable checkpoint: damaged, the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # torn zip, foreign pickle: whatever it is, it is not ours
        reason = (str(error) or type(error).__name__).splitlines()[0]
        reason = "it holds more than weights" if "eights only" in reason else reason
        raise UserError(f"{path}: not a readable checkpoint of this program: {reason}; {FOREIGN}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint of this program (no tree of state); {FOREIGN}")
    return state


class Best:
    """The checkpoint at which a logged number was best, of those that the schedule saves."""

    def __init__(self, metric: str | None, mode: str) -> None:
        self.metric, self.sign = metric, 1 if mode == "max" else -1
        self.step: int | None = None
        self.value: float | None = None
        self.latest: float | None = None  # what was logged since the last checkpoint

    def see(self, values: Mapping[str, Any]) -> None:
        """Take note of what is logged."""
        if self.metric is not None and self.metric in values:
            self.latest = float(values[self.metric])

    def judge(self, step: int) -> None:
        """A checkpoint of `step` is about to be saved."""
        if self.latest is not None and (self.value is None or self.sign * (self.latest - self.value) > 0):
            self.step, self.value = step, self.latest
        self.latest = None

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "value": self.value, "latest": self.latest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.value, self.latest = state["step"], state["value"], state["latest"]


class Writer:
    """Runs jobs one after the other, here or, with `background`, in a thread beside training."""

    def __init__(self, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._last: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job`, after the one before has ended.

        Raises:
            Whatever this job, or in the background the last one, raised.
        """
        self.wait()
        if self._pool is None:
            job()
        else:
            self._last = self._pool.submit(job)

    def wait(self) -> None:
        """Until all is written.

        Raises:
            Whatever the last job raised.
        """
        last, self._last = self._last, None
        if last is not None:
            last.result()


def snapshot(tree: Any, device: str | None = None) -> Any:
    """A tree of state that stays as it is while training goes on: its tensors are copied, to `device` if one is named
    (the host then waits for them)."""
    if isinstance(tree, Tensor):
        return tree.detach().clone() if device is None else tree.detach().to(device, copy=True)
    if isinstance(tree, Mapping):
        return {key: snapshot(value, device) for key, value in tree.items()}
    return type(tree)(snapshot(value, device) for value in tree) if type(tree) in (list, tuple) else tree


def _link(path: Path, target: str) -> None:
    """Have the symbolic link `path` lead to `target`, in one step."""
    if path.is_symlink() and os.readlink(path) == target:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, path)


def _name(step: int) -> str:
    return f"step_{step:08d}.pt"


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _found(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted((path for path in folder.glob(_PATTERN) if path.stem[5:].isdecimal()), key=_step)
