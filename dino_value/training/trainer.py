"""Continued pretraining, steered: the loop is Algorithm 1 of the paper (arXiv 2601.22108).

Labels reach the backbone by one path only: feedback → g_down → φ → task → ∇_θ L_pre. The learner's own step is plain
self-supervision on views whose masks were made under no_grad.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_value import plugins
from dino_value.config import Config, packaged
from dino_value.data import open_views
from dino_value.data.conventions import as_configured
from dino_value.data.sampling import Stream, key
from dino_value.distributed import group as distributed
from dino_value.distributed.fsdp import Plain, check_sharding, collect, shard, spread_state
from dino_value.errors import UserError
from dino_value.files import write_json
from dino_value.models.backbone import WEIGHTS_NAME, backbone_weights, create_backbone, write_weights
from dino_value.models.learner import Learner
from dino_value.models.linear import choose_matmul, use_onednn
from dino_value.models.weight_files import is_whole
from dino_value.models.weights import Reading, fit_positions
from dino_value.runs.checkpoint import (
    Best,
    Writer,
    latest_checkpoint,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
    snapshot,
    tidy,
)
from dino_value.runs.folder import prepare_folder, record_environment
from dino_value.runs.loop import Concern, Log, interrupted, say_warnings
from dino_value.runs.metrics import Clock, Meters, MetricsFile, Reporter, environment
from dino_value.runs.process import Stops, choose_device, stop_requests, use_bfloat16
from dino_value.runs.trackers import Trackers, check_trackers
from dino_value.training.after_step import Checkpoints, Evaluate, Evaluations, Measurements, Pictures, Progress
from dino_value.training.designer_update import DesignerUpdate, not_finite
from dino_value.training.feedback import FeedbackTask, Labels
from dino_value.training.health import Checkup, CollapseWatch, Event
from dino_value.training.methods import METHODS
from dino_value.training.optim import (
    Evidence,
    FiniteGuard,
    NotFinite,
    cosine_schedule,
    linear_schedule,
    parameter_groups,
)
from dino_value.training.replay_file import save_replay
from dino_value.training.start import start_from, start_head
from dino_value.training.steps import build_objective, update_teacher


def train(
    config: Config,
    quiet: bool = False,
    override: bool = False,
    until: int | None = None,
    evaluate: Evaluate | None = None,
) -> Path:
    """Train to `config.steps`, going on from the newest checkpoint in `config.out` if there is one; the run folder.

    Args:
        quiet: no progress; warnings are said all the same.
        override: go on with a run although its settings were others.
        until: pause after so many of these steps, saved: the same call without it goes on, exactly.
        evaluate: starts evaluations of the weights in a folder, every `evaluation.every` steps and at the end, and says
            what it did; if it cannot (UserError), training goes on.

    Raises:
        UserError: bad data, weights or settings; a loss that is not finite.
        Interrupted: a signal asked to stop; everything is saved.
        ProcessLost: another of several processes is gone.
    """
    with distributed.joined(config), stop_requests(held=False) as stopping:
        return _train(config, quiet or not distributed.is_first(), override, until, evaluate, stopping)


@as_configured
def _train(
    config: Config,
    quiet: bool,
    override: bool,
    until: int | None,
    evaluate: Evaluate | None,
    stopping: Stops,
) -> Path:
    folder, end = Path(config.out), min(config.steps, until or config.steps)
    trainer, checkup, warnings = open_run(config, folder, override, end)
    if trainer.step >= end:
        return folder
    if distributed.anywhere(stopping()):
        raise interrupted(trainer.step, config.steps)
    clock = Clock()
    with open_log(config, folder, trainer.step, quiet) as log, trainer.evidence(folder):
        log.resumed(trainer.step, warnings)
        checkpoints = Checkpoints(trainer, folder, end, stopping)
        concerns: list[Concern] = [
            Progress(log, trainer.steer),
            Measurements(trainer, log, clock, checkup),
            Evaluations(trainer, log, folder, evaluate),
            checkpoints,
            Pictures(trainer, log, checkpoints),
            checkpoints.stop,
        ]
        for large, small in clock.waiting(trainer.stream.iterate(trainer.step, end)):
            trainer.learner_update(large, small)
            stopping.hold()  # there is a step to save
            for concern in concerns:
                concern(trainer.step)
    trainer.writer.wait()
    return folder


def open_run(config: Config, folder: Path, override: bool, end: int) -> tuple[Trainer, Checkup | None, list[str]]:
    """The run of these settings, new or gone on with, its folder made; and what there is to be said.

    Raises:
        UserError: settings, data, weights or the folder's other settings do not allow it.
    """
    first = distributed.is_first()
    check_trackers(config.track)
    newest = distributed.from_first(lambda: latest_checkpoint(folder / "checkpoints"))
    trainer = Trainer(config)
    checkup = Checkup(config) if config.health.every and first else None
    if newest is None and config.start_from is not None:
        start_from(trainer, load_checkpoint(packaged(config.start_from)))
    if newest is None and config.objective.head is not None:
        start_head(trainer, config.objective.head)
    # After all that may refuse: a mistake leaves no folder behind.
    changed = distributed.from_first(lambda: prepare_folder(config, folder, override))
    warnings = [f"other settings from here on: {'; '.join(changed)}"] if changed else []
    if newest is not None:
        warnings += go_on(trainer, folder)
    if first:
        say_warnings(warnings)
    if first and trainer.step < end:
        found = environment(config.seed, trainer.device) | {"processes": distributed.world()}
        record_environment(folder, found | ({"changed": changed} if changed else {}))
        if trainer.feedback:
            write_json(folder / "splits.json", {task.kind: task.splits() for task in trainer.feedback})
    return trainer, checkup, warnings


def go_on(trainer: Trainer, folder: Path) -> list[str]:
    """Resume from the newest whole checkpoint; which ones were damaged."""
    config, state = trainer.config, dict[str, Any]()

    def look() -> list[str]:
        nonlocal state
        state, damaged = newest_whole(folder / "checkpoints")
        return damaged

    damaged = distributed.from_first(look)
    trainer.resume(state or load_checkpoint(folder))
    if distributed.is_first():
        with contextlib.suppress(OSError):  # the next checkpoint says what is wrong with the disk
            tidy(folder / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_every, trainer.best.step)
    if distributed.from_first(lambda: not is_whole(folder / WEIGHTS_NAME)):
        trainer.save_weights(folder)
    return damaged


@contextlib.contextmanager
def open_log(config: Config, folder: Path, step: int, quiet: bool) -> Iterator[Log]:
    """Of several processes the first alone writes metrics.jsonl and tells the trackers."""
    with contextlib.ExitStack() as stack:
        metrics = None
        if distributed.is_first():
            trackers = Trackers(config.track, folder, step, dataclasses.asdict(config))
            metrics = stack.enter_context(MetricsFile(folder, step, trackers))
        yield Log(metrics, stack.enter_context(Reporter(config.method, config.steps, step, quiet)))


class Trainer:
    """Everything that must survive a kill; what a step does to it is in methods/ and designer_update.py."""

    @as_configured
    def __init__(self, config: Config) -> None:
        plugins.load(config.plugins)  # in this process too: a configuration may have come from another
        self.config, self.step, self.part = config, 0, distributed.own_part()
        self.device = choose_device(config.device)
        self.autocast = functools.partial(
            torch.autocast, self.device.type, torch.bfloat16, use_bfloat16(config, self.device)
        )
        torch.manual_seed(key(config.seed, "weights"))
        backbone = create_backbone(
            config.backbone.name,
            config.views.global_size,
            config.backbone.kwargs,
            config.backbone.weights,
            config.backbone.min_match,
            config.backbone.keep_grid,
            "views.global_size",
            Reading.of(config.backbone),
        )
        backbone.configure(config.backbone, self.device, use_bfloat16(config, self.device))
        if config.views.local_count:
            backbone.check_size(config.views.local_size, "views.local_size")
        self.loss = build_objective(config, backbone, self.device)
        self.student = Learner(backbone, **self.loss.heads(backbone.embed_dim)).to(self.device)
        if choose_matmul(config.matmul, self.device) == "onednn":
            for part in (self.student, self.loss):
                use_onednn(part)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        if config.distributed.strategy == "fsdp":  # of one process too, whose run may go on with several
            check_sharding(config)
        sharded = config.distributed.strategy == "fsdp" and distributed.world() > 1
        self.plain = Plain(self.student, self.teacher, sharded)
        self.whole = shard(self.student, trains=True) if sharded else distributed.shared(self.student)
        self.whole_teacher = shard(self.teacher, trains=False) if sharded else distributed.Whole(self.teacher)
        groups = parameter_groups(self.student, config.optim.layer_decay, config.optim.patch_embed_lr_mult)
        self.optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, fused=True)

        workers = 0 if config.data.in_memory else config.data.workers
        reading = (config.data.in_memory, config.data.skip_unreadable, config.data.field)
        sources = open_views(config.data.unlabeled, config.views, *reading)
        self.meters = Meters()
        self.guard = FiniteGuard(config.optim.skip_nonfinite)
        self.best = Best(config.checkpoint.best, config.checkpoint.best_mode)
        self.writer = Writer(config.checkpoint.background)
        self.batch: tuple[Tensor, ...] = ()  # of the present step
        self._events: list[Event] = []
        self.collapse = CollapseWatch(config, use_bfloat16(config, self.device))
        self.steer: DesignerUpdate | None = None
        self.labels: Labels | None = None
        if config.method == "finetune":
            self.labels = Labels(config, backbone.embed_dim, self.device)
        if config.designs or config.method == "oracle":
            self.steer = DesignerUpdate(
                config,
                self.plain,
                self.loss,
                self.optimizer,
                self.guard,
                self.meters,
                sources,
                self.autocast,
            )
            if config.designs and config.designer.closed_form == "best_of_n":
                count = config.views.local_count * config.designer.candidates
                drawn = dataclasses.replace(config.views, local_count=count)
                sources = open_views(config.data.unlabeled, drawn, *reading)
        self.stream = Stream(sources, config.optim.batch_size, config.seed, "unlabeled", workers, self.part)

    def learner_update(self, large: Tensor, small: Tensor) -> None:
        """One step of the configured method on an unlabeled batch, or this process's shard of it, uint8 [2 B 3 H W] and
        [N B 3 h w]."""
        METHODS[self.config.method](self, large, small)
        self.step += 1

    @property
    def feedback(self) -> list[FeedbackTask]:
        """What reads labels, if anything does."""
        user = self.steer or self.labels
        return [] if user is None else user.feedback

    def apply(self, **terms: Tensor) -> bool:
        """The optimizer's step with this step's schedules, unless a term is not finite; whether it was taken."""
        step, stream = self.step, self.stream

        def message(bad: str) -> str:
            return not_finite(step, bad, stream, step)

        self.set_schedules()
        self.guard.watch_skippable(self.optimizer, message, Evidence(step, self.batch), **terms)
        return not self.guard.step(self.optimizer)

    def update_teacher(self) -> None:
        """The teacher's moving average."""
        momentum = cosine_schedule(self.step, self.config.steps, self.config.objective.teacher_momentum, 1.0)
        update_teacher(self.student, self.teacher, momentum)

    @contextlib.contextmanager
    def evidence(self, folder: Path) -> Iterator[None]:
        """What is computed inside and is not finite leaves a file for `dino-value replay` in the run folder.

        Raises:
            UserError: as `FiniteGuard.check`, with the file's name.
        """

        def skip(refused: NotFinite) -> None:
            kept = save_replay(folder, self, refused) if self.guard.skipped == 1 else "see the first such step"
            count = f"{self.guard.skipped} of optim.skip_nonfinite={self.guard.allowed}"
            self._events.append(Event("skipped", f"{refused}; the step was left out ({count}); {kept}"))

        self.guard.on_skip = skip
        try:
            yield
        except NotFinite as refused:
            raise UserError(f"{refused}; {save_replay(folder, self, refused)}") from None

    def take_events(self) -> list[Event]:
        """What is to be said since the last call."""
        events, self._events = self._events, []
        return events

    def teacher_temperature(self) -> float:
        c = self.config.objective
        return linear_schedule(self.step, c.teacher_temp_start, c.teacher_temp, c.teacher_temp_warmup)

    def schedules(self, step: int) -> dict[str, float]:
        """Learning rate and weight decay of a step."""
        o, steps = self.config.optim, self.config.steps
        return {
            "lr": cosine_schedule(step, steps, o.lr, o.lr_end, o.warmup),
            "weight_decay": cosine_schedule(step, steps, o.weight_decay, o.weight_decay_end),
        }

    def set_schedules(self) -> None:
        now = self.schedules(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = now["lr"] * group.get("lr_scale", 1.0)
            if group["decay"]:
                group["weight_decay"] = now["weight_decay"]

    def save(self, folder: Path) -> None:
        """A checkpoint, and the teacher's backbone as timm-keyed weights."""
        self.guard.check(wait=True)
        self.meters.average()  # what process 0 saves is what all go on with
        state = self.state_dict()
        if self.plain.sharded:
            state = collect(state)
        if not distributed.is_first():
            return
        c, step, best = self.config.checkpoint, self.step, self.best.step
        tensors, header = backbone_weights(self.teacher.backbone, {"step": str(step)}, state["teacher"])
        if c.background:
            tensors, state = snapshot((tensors, state), "cpu")

        def write() -> None:
            try:
                # The checkpoint last: whatever a kill leaves undone before it is done again on resume.
                write_weights(folder / WEIGHTS_NAME, tensors, header)
                save_checkpoint(folder / "checkpoints", step, state, c.keep, c.keep_every, best)
            except OSError as error:
                raise _not_saved(folder, step, error) from None

        self.writer.submit(write)

    def save_weights(self, folder: Path) -> None:
        """The teacher's backbone as timm-keyed weights."""
        teacher = collect(self.teacher.state_dict())
        if not distributed.is_first():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_weights(
                folder / WEIGHTS_NAME, *backbone_weights(self.teacher.backbone, {"step": str(self.step)}, teacher)
            )
        except OSError as error:
            raise _not_saved(folder, self.step, error) from None

    def state_dict(self) -> dict[str, Any]:
        state = {
            "step": self.step,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "objective": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meters": self.meters.state_dict(),
            "positions": list(self.student.backbone.positions),
            "collapse": self.collapse.state_dict(),
            "best": self.best.state_dict(),
            "skipped": self.guard.skipped,
        }
        if self.steer is not None:
            state["steer"] = self.steer.state_dict()
        if self.labels is not None:
            state["labels"] = self.labels.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        with self.plain.filled(write=True) as plain:
            fit_positions((plain.student, plain.teacher, self.loss), state, keep_grid=True)
            plain.student.load_state_dict(state["student"])
            plain.teacher.load_state_dict(state["teacher"])
        self.loss.load_state_dict(state["objective"])
        self.loss.begin(self.step, self.teacher)
        self.optimizer.load_state_dict(spread_state(self.optimizer, state["optimizer"]))
        self.meters.load_state_dict(state["meters"], self.device)
        self.collapse.load_state_dict(state["collapse"])
        if "best" in state:  # not in checkpoints of before these were kept
            self.best.load_state_dict(state["best"])
            self.guard.skipped = state["skipped"]
        if self.steer is not None:
            self.steer.load_state_dict(state["steer"])
        if self.labels is not None:
            self.labels.load_state_dict(state["labels"])

    def resume(self, state: dict[str, Any]) -> None:
        """`load_state_dict` of a file.

        Raises:
            UserError: it is of another architecture or method.
        """
        try:
            self.load_state_dict(state)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            first = " ".join((str(error) or type(error).__name__).split())[:300]
            raise UserError(
                f"{self.config.out}: its checkpoint does not fit these settings ({first}); choose another out="
            ) from None


def _not_saved(folder: Path, step: int, error: OSError) -> UserError:
    return UserError(
        f"{folder}: step {step} could not be saved ({error.strerror or error}); "
        "free space or choose another out=; earlier checkpoints are whole"
    )
