"""What happens after a learner's step: each concern is called with the number of steps taken, in the loop's order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dino_value.data import SkippingViews
from dino_value.distributed import group as distributed
from dino_value.errors import UserError
from dino_value.report.gallery import mask_pictures
from dino_value.runs.loop import Log, due, interrupted
from dino_value.runs.metrics import Clock
from dino_value.runs.process import Stops
from dino_value.training.designer_update import DesignerUpdate
from dino_value.training.health import Checkup

if TYPE_CHECKING:
    from dino_value.training.trainer import Trainer

Evaluate = Callable[[Path], str]


class Progress:
    """The bar moves, and what the designer's update has to say is said."""

    def __init__(self, log: Log, steer: DesignerUpdate | None) -> None:
        self.log, self.steer = log, steer

    def __call__(self, step: int) -> None:
        self.log.reporter.advance(step)
        while self.steer is not None and self.steer.notes:
            self.log.note(self.steer.notes.pop(0))


class Measurements:
    """One row of metrics.jsonl: meters and schedules every `log_every` steps, health every `health.every`, and in words
    what is wrong with them."""

    def __init__(self, trainer: Trainer, log: Log, clock: Clock, checkup: Checkup | None) -> None:
        self.trainer, self.log, self.clock, self.checkup = trainer, log, clock, checkup

    def __call__(self, step: int) -> None:
        trainer, config = self.trainer, self.trainer.config
        values: dict[str, float] = {}
        if due(step, config.health.every, config.steps):
            values |= self.health()
        logged = due(step, config.log_every, config.steps)
        if logged:
            trainer.guard.check(wait=True)
        events = trainer.take_events()
        if logged:
            values |= trainer.meters.read() | trainer.schedules(step - 1) | self.clock.read(config.optim.batch_size)
            if isinstance(trainer.stream.source, SkippingViews):
                values["unreadable"] = trainer.stream.source.unreadable
        if values:
            trainer.best.see(values)
        self.log.write(step, values)
        if values and self.log.metrics is not None:
            events += trainer.collapse.judge(step, values)
        for event in events:
            self.log.warn(step, event.kind, event.text)

    def health(self) -> dict[str, float]:
        with self.trainer.plain.filled() as plain:
            if self.checkup is None:
                return {}
            return self.checkup.measure(plain.teacher.backbone, getattr(self.trainer.loss, "center", None))


class Evaluations:
    """Weights kept every `evaluation.every` steps, and evaluations of them started; one that fails stops nothing."""

    def __init__(self, trainer: Trainer, log: Log, folder: Path, evaluate: Evaluate | None) -> None:
        self.trainer, self.log, self.folder, self.evaluate = trainer, log, folder, evaluate

    def __call__(self, step: int) -> None:
        if not due(step, self.trainer.config.evaluation.every, self.trainer.config.steps):
            return
        place = self.folder / "evaluations" / f"step_{step:08d}"
        self.trainer.save_weights(place)
        if self.evaluate is None or self.log.metrics is None:
            return
        try:
            self.log.note(self.evaluate(place))
        except UserError as error:
            self.log.warn(step, "not evaluated", str(error), f"{place.name}: not evaluated: {error}")


class Checkpoints:
    """Saved every `checkpoint.every` steps, at the end, before the first of the designer's updates, and when asked to
    stop; `stop` then ends the run."""

    def __init__(self, trainer: Trainer, folder: Path, end: int, stopping: Stops) -> None:
        self.trainer, self.folder, self.end, self.stopping = trainer, folder, end, stopping
        self.asked = False  # to stop, by a signal to any process, when this step was saved

    def due(self, step: int) -> bool:
        return due(step, self.trainer.config.checkpoint.every, self.end)

    def __call__(self, step: int) -> None:
        trainer, config = self.trainer, self.trainer.config
        self.asked = distributed.anywhere(self.stopping())
        if self.due(step):
            trainer.best.judge(step)
        first_update = trainer.steer is not None and step == config.value.burn_in  # is next, and may take long
        if self.due(step) or self.asked or first_update:
            trainer.save(self.folder)
            if not config.checkpoint.background:
                self.stopping.release()

    def stop(self, step: int) -> None:
        """Raises:
        Interrupted: a signal has asked to stop; everything is saved.
        """
        if self.asked and step < self.end:
            self.trainer.writer.wait()
            raise interrupted(step, self.trainer.config.steps)


class Pictures:
    """Of the designer's masks, for trackers that take pictures, with each checkpoint."""

    def __init__(self, trainer: Trainer, log: Log, checkpoints: Checkpoints) -> None:
        self.trainer, self.log, self.checkpoints = trainer, log, checkpoints

    def __call__(self, step: int) -> None:
        if self.checkpoints.due(step) and self.log.metrics is not None:
            self.log.metrics.pictures(step, lambda: mask_pictures(self.trainer.config, self.trainer.steer))
