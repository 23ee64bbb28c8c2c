"""TensorBoard and Weights & Biases beside metrics.jsonl: the same names and numbers, and pictures.

To add one: a class that meets `Tracker`, a line in TRACKERS, an extra of that name in setup.cfg.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dino_value.config import TrackConfig
from dino_value.errors import UserError
from dino_value.files import write_json

Pictures = Mapping[str, NDArray[np.uint8]]
"""name -> [h w 3]."""


class Tracker(Protocol):
    """Where a run's numbers go; any method may raise, and is not called again then."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, name: str, message: str) -> None: ...

    def pictures(self, step: int, pictures: Pictures) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """RUN/tensorboard. What an earlier start of the run wrote beyond its checkpoint is purged."""

    def __init__(self, config: TrackConfig, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=30)
        if step == 0:
            self._writer.add_text("config", f"```json\n{json.dumps(settings, indent=1)}\n```", 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, message: str) -> None:
        self._writer.add_text(name, message, step)

    def pictures(self, step: int, pictures: Pictures) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """RUN/wandb, for `wandb sync`; with `track.online` sent at once.

    W&B cannot take back a step: those that it has seen of a run are not told again when the run goes on from an
    earlier checkpoint.
    """

    def __init__(self, config: TrackConfig, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read at import
        import wandb

        self._image, self._record = wandb.Image, folder / "wandb" / "run.json"
        try:
            known = json.loads(self._record.read_bytes())
            self._id, self._seen = str(known["id"]), int(known["step"])
        except (OSError, ValueError, LookupError, TypeError):
            self._id, self._seen = secrets.token_hex(4), -1
        self._record.parent.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=config.project,
            id=self._id,
            name=folder.resolve().name,
            resume="allow",
            reinit="create_new",  # beside a run that the caller may have, as an agent of a sweep does
            dir=str(folder),
            mode="online" if config.online else "offline",
            config=dict(settings),
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, values)

    def text(self, step: int, name: str, message: str) -> None:
        self._log(step, {name: message})

    def pictures(self, step: int, pictures: Pictures) -> None:
        self._log(step, {name: self._image(picture) for name, picture in pictures.items()})

    def close(self) -> None:
        self._run.finish()

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if step > self._seen:
            self._run.log(dict(values), step=step)
            write_json(self._record, {"id": self._id, "step": step})


TRACKERS: dict[str, tuple[str, Callable[[TrackConfig, Path, int, Mapping[str, Any]], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", WandB),
}
"""name, of the extra too -> package, and class(config, run folder, step of the start, settings)."""


def check_trackers(config: TrackConfig) -> None:
    """Raises:
    UserError: one that is asked for is not installed.
    """
    for name in config.to:
        try:
            import_module(TRACKERS[name][0])
        except ImportError as error:
            raise UserError(f"track.to={name}: pip install 'dino-value[{name}]' ({error})") from None


class Trackers:
    """Any number of them, none of which can end a run: one that fails is reported once and dropped."""

    def __init__(self, config: TrackConfig, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        """Args:
        step: where the run starts, or goes on.
        settings: what is shown as the run's configuration.
        """
        self._open: dict[str, Tracker] = {}
        self._draws = True
        for name in config.to:
            try:
                self._open[name] = TRACKERS[name][1](config, folder, step, settings)
            except Exception as error:
                _report(name, error)

    def write(self, step: int, row: Mapping[str, float | str]) -> None:
        """A row of metrics.jsonl: numbers, or an event and its message."""
        if "event" in row:
            self._tell(lambda tracker: tracker.text(step, f"event/{row['event']}", str(row["message"])))
        else:
            numbers = {name: float(value) for name, value in row.items()}
            self._tell(lambda tracker: tracker.scalars(step, numbers))

    def pictures(self, step: int, draw: Callable[[], Pictures]) -> None:
        """What `draw` makes, if anyone looks at it; where it cannot, it is not asked again."""
        if not (self._open and self._draws):
            return
        try:
            pictures = draw()
        except Exception as error:
            self._draws = False
            _report("pictures", error)
            return
        self._tell(lambda tracker: tracker.pictures(step, pictures))

    def close(self) -> None:
        self._tell(lambda tracker: tracker.close())
        self._open = {}

    def _tell(self, say: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                say(tracker)
            except Exception as error:
                del self._open[name]
                _report(name, error)


def _report(name: str, error: Exception) -> None:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    print(f"warning: track: {name} failed and is left out from here on: {reason}", file=sys.stderr)
