"""Continued pretraining, steered: the loop is Algorithm 1 of the paper (arXiv 2601.22108).

Labels reach the backbone by one path only: feedback → g_down → φ → task → ∇_θ L_pre. The learner's own step is plain
self-supervision on views whose masks were made under no_grad.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_value.config import Config, packaged
from dino_value.data import SkippingViews, open_views
from dino_value.data.conventions import as_configured
from dino_value.data.sampling import Stream, generator, key
from dino_value.distributed import group as distributed
from dino_value.distributed.fsdp import Plain, check_sharding, collect, full, shard, spread_state
from dino_value.distributed.shards import WHOLE
from dino_value.errors import Interrupted, UserError
from dino_value.files import write_json
from dino_value.models.backbone import WEIGHTS_NAME, backbone_weights, create_backbone, write_weights
from dino_value.models.linear import choose_matmul, use_onednn
from dino_value.models.weight_files import is_whole
from dino_value.models.weights import Reading, fit_positions, load_head
from dino_value.objectives.interface import Draw, LossTerms
from dino_value.report.gallery import mask_pictures
from dino_value.runs.checkpoint import (
    FOREIGN,
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
from dino_value.runs.metrics import Clock, Meters, MetricsFile, Reporter, environment
from dino_value.runs.process import Stops, choose_device, stop_requests, use_bfloat16
from dino_value.runs.trackers import Trackers, check_trackers
from dino_value.training.designer_update import DesignerUpdate, not_finite
from dino_value.training.feedback import FeedbackTask, Labels
from dino_value.training.health import Checkup, CollapseWatch, Event
from dino_value.training.optim import (
    Evidence,
    FiniteGuard,
    NotFinite,
    cosine_schedule,
    linear_schedule,
    parameter_groups,
)
from dino_value.training.replay_file import save_replay
from dino_value.training.steps import Learner, Views, build_objective, make_views, update_teacher
from dino_value.value import average

OPTIONAL = ("patch_head", "mask_token", "ibot", "gram_teacher")  # parts of learners and objectives


Evaluate = Callable[[Path], str]


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
    folder, first = Path(config.out), distributed.is_first()
    check_trackers(config.track)
    newest = distributed.from_first(lambda: latest_checkpoint(folder / "checkpoints"))
    run = Trainer(config)
    checkup = Checkup(config) if config.health.every and first else None
    if newest is None and config.start_from is not None:
        run.start_from(load_checkpoint(packaged(config.start_from)))
    if newest is None and config.objective.head is not None:
        run.start_head(config.objective.head)
    # After all that may refuse: a mistake leaves no folder behind.
    changed = distributed.from_first(lambda: prepare_folder(config, folder, override))
    warnings = [f"other settings from here on: {'; '.join(changed)}"] if changed else []
    if newest is not None:
        state: dict[str, Any] = {}

        def look() -> list[str]:
            nonlocal state
            state, damaged = newest_whole(folder / "checkpoints")
            return damaged

        warnings += distributed.from_first(look)
        run.resume(state or load_checkpoint(folder))
        if first:
            with contextlib.suppress(OSError):  # the next checkpoint says what is wrong with the disk
                tidy(folder / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_every, run.best.step)
        if distributed.from_first(lambda: not is_whole(folder / WEIGHTS_NAME)):
            run.save_weights(folder)
    for text in warnings if first else ():
        print(f"warning: {text}", file=sys.stderr)
    end = min(config.steps, until or config.steps)
    if run.step >= end:
        return folder
    metrics: MetricsFile | None = None
    if first:
        found = environment(config.seed, run.device) | {"processes": distributed.world()}
        record_environment(folder, found | ({"changed": changed} if changed else {}))
        if run.feedback:
            write_json(folder / "splits.json", {task.kind: task.splits() for task in run.feedback})
    if distributed.anywhere(stopping()):
        raise Interrupted(f"stopped at step {run.step} of {config.steps}; the same command goes on from there")
    if first:
        trackers = Trackers(config.track, folder, run.step, dataclasses.asdict(config))
        metrics = MetricsFile(folder, run.step, trackers)
        for text in warnings:
            metrics.write(run.step, {"event": "resumed", "message": text})
    clock = Clock()
    with (
        metrics or contextlib.nullcontext(),
        Reporter(config.method, config.steps, run.step, quiet) as reporter,
        run.evidence(folder),
    ):
        for large, small in clock.waiting(run.stream.iterate(run.step, end)):
            run.learner_update(large, small)
            stopping.hold()  # there is a step to save
            reporter.advance(run.step)
            while run.steer is not None and run.steer.notes:
                reporter.note(run.steer.notes.pop(0))
            last = run.step == config.steps
            values: dict[str, float] = {}
            if config.health.every and (run.step % config.health.every == 0 or last):
                with run.plain.filled() as plain:
                    if checkup is not None:
                        values |= checkup.measure(plain.teacher.backbone, getattr(run.loss, "center", None))
            if run.step % config.log_every == 0 or last:
                run.guard.check(wait=True)
            events = run.take_events()
            if run.step % config.log_every == 0 or last:
                values |= run.meters.read() | run.schedules(run.step - 1) | clock.read(config.optim.batch_size)
                if isinstance(run.stream.source, SkippingViews):
                    values["unreadable"] = run.stream.source.unreadable
            if values:
                run.best.see(values)
            if values and metrics is not None:
                metrics.write(run.step, values)
                reporter.say(run.step, values)
                events += run.collapse.judge(run.step, values)
            if metrics is not None:
                for event in events:
                    metrics.write(run.step, {"event": event.kind, "message": event.text})
                    reporter.warn(event.text)
            if config.evaluation.every and (run.step % config.evaluation.every == 0 or last):
                place = folder / "evaluations" / f"step_{run.step:08d}"
                run.save_weights(place)
                if evaluate is not None and metrics is not None:
                    try:
                        reporter.note(evaluate(place))
                    except UserError as error:
                        metrics.write(run.step, {"event": "not evaluated", "message": str(error)})
                        reporter.warn(f"{place.name}: not evaluated: {error}")
            stop, due = distributed.anywhere(stopping()), run.step % config.checkpoint.every == 0 or run.step == end
            if due:
                run.best.judge(run.step)
            first_update = run.steer is not None and run.step == config.value.burn_in  # is next, and may take long
            if due or stop or first_update:
                run.save(folder)
                if not config.checkpoint.background:
                    stopping.release()
            if due and metrics is not None:
                metrics.pictures(run.step, lambda: mask_pictures(config, run.steer))
            if stop and run.step < end:
                run.writer.wait()
                raise Interrupted(f"stopped at step {run.step} of {config.steps}; the same command goes on from there")
        run.writer.wait()
    return folder


class Trainer:
    """Everything that must survive a kill, and the two updates of Algorithm 1."""

    @as_configured
    def __init__(self, config: Config) -> None:
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
        """One step of Algorithm 1 on an unlabeled batch, or this process's part of it, uint8 [2 B 3 H W] and
        [N B 3 h w]."""
        if self.labels is not None:
            return self.supervised_update(self.labels)
        if self.config.method == "oracle":
            return self.oracle_update()
        config, steer, self.batch = self.config, self.steer, (large, small)
        backbone, temperature = self.student.backbone, self.teacher_temperature()
        views = make_views(
            backbone, (large, small), config.views, self.device, config.seed, "learner", self.step, self.part
        )
        self.loss.begin(self.step, self.teacher)
        if steer is not None:
            steer.update_if_due(self.step, temperature)
        start = 0 if steer is None else steer.scope.start
        drawing = generator(config.seed, "objective", self.step)
        draw = self.loss.draw(views.large, backbone.patch_size, drawing, self.part)
        with torch.no_grad(), self.autocast():
            learned = views if steer is None else steer.learned_views(views, self.step)
            seen = learned if config.designer.teacher_views == "masked" else views
            targets, logits = self.whole_teacher(self.loss.teach, seen.large, temperature, draw)
            learned = learned if steer is None else steer.chosen_views(learned, targets)
        # Stochastic depth is a function of the step, like the data, and the same in every arm.
        torch.manual_seed(key(config.seed, "step", self.step, *([self.part.rank] if self.part != WHOLE else [])))
        loss, parts = self.backward(learned, targets, draw, start)
        if self.step < config.objective.freeze_last_layer:
            self.student.zero_last_layers()
        if self.step < config.optim.freeze_backbone:
            backbone.zero_grad()
        gradient_norm = full(torch.nn.utils.clip_grad_norm_(self.student.parameters(), config.optim.clip))
        self.set_schedules()
        named = {f"loss_{name}": part for name, part in parts.items()}
        self.watch(loss=loss, gradient_norm=gradient_norm, **(named if len(named) > 1 else {}))
        skipped = self.guard.step(self.optimizer)
        if steer is not None:
            scale = (config.optim.clip / gradient_norm.detach().clamp_min(1e-20)).clamp_max(1)
            steer.clip_scale = torch.where(gradient_norm.isfinite(), scale, steer.clip_scale)
        self.loss.update(logits)
        momentum = cosine_schedule(self.step, config.steps, config.objective.teacher_momentum, 1.0)
        update_teacher(self.student, self.teacher, momentum)
        if not skipped:
            self.meters.add(loss=loss, **named, gradient_norm=gradient_norm, **self.loss.watch(targets))
        self.step += 1

    def backward(self, views: Views, targets: LossTerms, draw: Draw, start: int | None) -> tuple[Tensor, LossTerms]:
        """The loss and, of this process, its parts; its gradient is left in the student, taken in
        `optim.accumulate` passes over equal parts of the batch."""

        def parts_of(student: Learner, views: Views, targets: LossTerms, draw: Draw) -> LossTerms:
            steer, states, weights = self.steer, self.loss.states(student, views, start, draw), None
            predictions = self.loss.predict(student, states, start, draw)
            if steer is not None:
                weights = steer.term_weights(states, targets, draw)
                targets = steer.moved_targets(states, predictions, targets, draw, self.step)
            return self.loss.parts(self.loss.terms_of(predictions, targets), draw, weights)

        passes = WHOLE.split(self.config.optim.accumulate)
        found: list[tuple[Tensor, LossTerms]] = []
        self.optimizer.zero_grad()
        for part in passes:
            own = (targets, draw) if part == WHOLE else self.loss.cut(targets, draw, part)
            with distributed.reduced(self.whole, last=part == passes[-1]):
                # A context of its own: autocast would go on using the casts of weights that it made without a graph.
                with self.autocast():
                    parts = self.whole(parts_of, views.part(part), *own)
                    loss = self.loss.total(parts)
                (loss / len(passes)).backward()
            found.append((loss.detach(), {name: value.detach() for name, value in parts.items()}))
        losses, many = zip(*found, strict=True)
        mean = {name: torch.stack([parts[name] for parts in many]).mean(0) for name in many[0]}
        return average([torch.stack(losses).mean(0)])[0], mean

    def supervised_update(self, labels: Labels) -> None:
        """A step on labels alone, with the learner's optimizer, schedules and average: what the labels are worth if
        they are spent on the backbone itself."""
        config, backbone = self.config, self.student.backbone
        if self.step == 0:
            labels.warm_up(backbone, self.guard)
        torch.manual_seed(key(config.seed, "step", self.step))
        with self.autocast():
            losses = labels.losses(backbone)
        loss = labels.total(losses)
        for optimizer in (self.optimizer, *labels.optimizers):
            optimizer.zero_grad()
        loss.backward()
        gradient_norm = torch.nn.utils.clip_grad_norm_(backbone.parameters(), config.optim.clip)
        self.set_schedules()
        numbers = {task.kind: task.train.count - 1 for task in labels.feedback}
        batches = "; ".join(task.train_stream.describe(numbers[task.kind]) for task in labels.feedback)
        step = self.step
        for optimizer in (self.optimizer, *labels.optimizers):
            self.guard.watch(
                optimizer,
                lambda bad: f"step {step}: {bad} not finite; nothing was applied. {batches}. Lower optim.lr",
                loss=loss,
                gradient_norm=gradient_norm,
            )
        for optimizer in (self.optimizer, *labels.optimizers):
            self.guard.step(optimizer)
        momentum = cosine_schedule(self.step, config.steps, config.objective.teacher_momentum, 1.0)
        update_teacher(self.student, self.teacher, momentum)
        self.meters.add(loss=loss, **losses, gradient_norm=gradient_norm)
        self.step += 1

    def oracle_update(self) -> None:
        """A step along u itself by the learner's own optimizer: is the direction any good? No value method may do this,
        and no loss is self-supervised here."""
        config, steer = self.config, self.steer
        assert steer is not None
        self.loss.begin(self.step, self.teacher)
        steer.update_if_due(self.step, self.teacher_temperature())
        self.optimizer.zero_grad()
        if steer.direction is not None:  # none before burn-in is over
            for parameter, part in zip(steer.trained, steer.direction, strict=True):
                parameter.grad = part.to(parameter.dtype, copy=True)
        gradient_norm = torch.nn.utils.clip_grad_norm_(steer.trained, config.optim.clip)
        self.set_schedules()
        self.watch(gradient_norm=gradient_norm)
        self.guard.step(self.optimizer)
        momentum = cosine_schedule(self.step, config.steps, config.objective.teacher_momentum, 1.0)
        update_teacher(self.student, self.teacher, momentum)
        self.meters.add(gradient_norm=gradient_norm)
        self.step += 1

    @property
    def feedback(self) -> list[FeedbackTask]:
        """What reads labels, if anything does."""
        user = self.steer or self.labels
        return [] if user is None else user.feedback

    def watch(self, **terms: Tensor) -> None:
        """Have the guard refuse the learner's step if a term is not finite."""
        step, stream = self.step, self.stream

        def message(bad: str) -> str:
            return not_finite(step, bad, stream, step)

        self.guard.watch_skippable(self.optimizer, message, Evidence(step, self.batch), **terms)

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

    def start_from(self, state: dict[str, Any]) -> None:
        """Begin a new run at the teacher of another: backbone, head and centre, for student and teacher alike.

        What only options of the objective have (iBOT's head and mask token, a Gram teacher) stays fresh where the other
        run lacks it.

        Raises:
            UserError: it is of another architecture or program.
        """
        if not isinstance(state.get("objective"), dict):
            raise UserError(f"start_from={self.config.start_from}: not a checkpoint of this program; {FOREIGN}")
        with self.plain.filled(write=True) as plain:
            modules = (plain.student, plain.teacher, self.loss)
            noted = fit_positions(modules, state, self.config.backbone.keep_grid)
            if noted:
                print(f"{self.config.start_from}: {noted}", file=sys.stderr)
            for module, part in zip(modules, ("teacher", "teacher", "objective"), strict=True):
                try:
                    values = {name: value.float() for name, value in state[part].items()}
                    found = module.load_state_dict(values, strict=False)
                    odd = [*found.missing_keys, *found.unexpected_keys]
                    odd = [name for name in odd if name.split(".")[0] not in OPTIONAL]
                    if odd:
                        raise RuntimeError(f"{len(odd)} tensors are in one of them only, {odd[0]} the first")
                except RuntimeError as error:
                    source = f"start_from={self.config.start_from}"
                    raise UserError(f"{source}: {unlike(module, state[part], str(error))}") from None

    def start_head(self, path: str) -> None:
        """Begin with the projection heads, and the centre, of a DINO or DINOv2 training checkpoint.

        Raises:
            UserError: it has none, or of another size.
        """
        center = getattr(self.loss, "center", None)
        with self.plain.filled(write=True) as plain:
            print(load_head(path, plain.student.head, plain.teacher.head, center), file=sys.stderr)

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
