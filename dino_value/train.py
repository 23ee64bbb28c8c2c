"""Continued pretraining, steered: the loop is Algorithm 1 of the paper (arXiv 2601.22108).

Labels reach the backbone by one path only: feedback → g_down → φ → task → ∇_θ L_pre. The learner's own step is plain
self-supervision on views whose masks were made under no_grad.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_value.backbones import WEIGHTS_NAME, create_backbone, save_backbone
from dino_value.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from dino_value.config import Config, packaged
from dino_value.data import SkippingViews, open_views
from dino_value.data.sampling import Stream, generator, key
from dino_value.errors import Interrupted, UserError
from dino_value.health import Checkup, CollapseWatch
from dino_value.optim import FiniteGuard, cosine_schedule, linear_schedule, parameter_groups
from dino_value.process import choose_device, stop_requests, use_bfloat16
from dino_value.run_folder import prepare_folder, record_environment
from dino_value.steer import Steer, not_finite
from dino_value.steps import Learner, build_objective, make_views, update_teacher
from dino_value.track import Clock, Meters, MetricsFile, Reporter, environment
from dino_value.weights import fit_positions, load_head

OPTIONAL = ("patch_head", "mask_token", "ibot", "gram_teacher")  # parts of learners and objectives


def train(config: Config, quiet: bool = False, until: int | None = None) -> Path:
    """Train to `config.steps`, going on from the newest checkpoint in `config.out` if there is one; the run folder.

    With `until`, pause after so many of these steps, saved: the same call without it goes on, exactly.

    Raises:
        UserError: bad data, weights or settings; a loss that is not finite.
        Interrupted: a signal asked to stop; everything is saved.
    """
    folder = Path(config.out)
    newest = latest_checkpoint(folder / "checkpoints")
    run = Run(config)
    checkup = Checkup(config) if config.health.every else None
    if newest is None and config.start_from is not None:
        run.start_from(load_checkpoint(packaged(config.start_from)))
    if newest is None and config.objective.head is not None:
        run.start_head(config.objective.head)
    prepare_folder(config, folder)  # after all that may refuse: a mistake leaves no folder behind
    if newest is not None:
        run.load_state_dict(load_checkpoint(newest))
    stop = min(config.steps, until or config.steps)
    if run.step >= stop:
        return folder
    record_environment(folder, environment(config.seed, run.device))

    metrics = MetricsFile(folder, run.step)
    clock = Clock()
    with stop_requests() as stopping, Reporter(config.method, config.steps, run.step, quiet) as reporter:
        for large, small in clock.waiting(run.stream.iterate(run.step, stop)):
            run.learner_update(large, small)
            reporter.advance(run.step)
            while run.steer is not None and run.steer.notes:
                reporter.note(run.steer.notes.pop(0))
            last = run.step == config.steps
            values: dict[str, float] = {}
            if checkup is not None and (run.step % config.health.every == 0 or last):
                values |= checkup.measure(run.teacher.backbone, getattr(run.loss, "center", None))
            if run.step % config.log_every == 0 or last:
                run.guard.check(wait=True)
                values |= run.meters.read() | run.schedules(run.step - 1) | clock.read(config.optim.batch_size)
                if isinstance(run.stream.source, SkippingViews):
                    values["unreadable"] = run.stream.source.unreadable
            if values:
                metrics.write(run.step, values)
                reporter.say(run.step, values)
                for event in run.collapse.judge(run.step, values):
                    metrics.write(run.step, {"event": event.kind, "message": event.text})
                    reporter.warn(event.text)
            if run.step % config.checkpoint.every == 0 or run.step == stop or stopping():
                run.save(folder)
            if stopping() and not last:
                raise Interrupted(f"stopped at step {run.step} of {config.steps}; the same command goes on from there")
    metrics.close()
    return folder


class Run:
    """Everything that must survive a kill, and the two updates of Algorithm 1."""

    def __init__(self, config: Config) -> None:
        self.config, self.step = config, 0
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
        )
        backbone.configure(config.backbone, self.device, use_bfloat16(config, self.device))
        for name, size in (("global", config.views.global_size), ("local", config.views.local_size)):
            backbone.check_size(size, f"views.{name}_size")
        self.loss = build_objective(config, backbone, self.device)
        self.student = Learner(backbone, **self.loss.heads(backbone.embed_dim)).to(self.device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        groups = parameter_groups(self.student, config.optim.layer_decay, config.optim.patch_embed_lr_mult)
        self.optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, fused=True)

        workers = 0 if config.data.in_memory else config.data.workers
        in_memory, skip = config.data.in_memory, config.data.skip_unreadable
        sources = open_views(config.data.unlabeled, config.views, in_memory, skip)
        self.meters = Meters()
        self.guard = FiniteGuard()
        self.collapse = CollapseWatch(config)
        self.steer: Steer | None = None
        if config.method != "baseline":
            self.steer = Steer(
                config,
                self.student,
                self.teacher,
                self.loss,
                self.optimizer,
                self.guard,
                self.meters,
                sources,
                self.autocast,
            )
            if config.designer.closed_form == "best_of_n":
                count = config.views.local_count * config.designer.candidates
                drawn = dataclasses.replace(config.views, local_count=count)
                sources = open_views(config.data.unlabeled, drawn, in_memory, skip)
        self.stream = Stream(sources, config.optim.batch_size, config.seed, "unlabeled", workers)

    def learner_update(self, large: Tensor, small: Tensor) -> None:
        """One step of Algorithm 1 on an unlabeled batch, uint8 [2 B 3 H W] and [N B 3 h w]."""
        config, steer = self.config, self.steer
        backbone, temperature = self.student.backbone, self.teacher_temperature()
        views = make_views(backbone, (large, small), config.views, self.device, config.seed, "learner", self.step)
        self.loss.begin(self.step, self.teacher)
        if steer is not None:
            steer.update_if_due(self.step, temperature)
        start = 0 if steer is None else steer.scope.start
        draw = self.loss.draw(views.large, backbone.patch_size, generator(config.seed, "objective", self.step))
        with torch.no_grad(), self.autocast():
            learned = views if steer is None else steer.learned_views(views, self.step)
            seen = learned if config.designer.teacher_views == "masked" else views
            targets, logits = self.loss.teach(self.teacher, seen.large, temperature, draw)
            learned = learned if steer is None else steer.chosen_views(learned, targets)
        # Stochastic depth is a function of the step, like the data, and the same in every arm.
        torch.manual_seed(key(config.seed, "step", self.step))
        # A context of its own: autocast would go on using the casts of weights that it made without a graph.
        with self.autocast():
            states = self.loss.states(self.student, learned, start, draw)
            weights = None if steer is None else steer.term_weights(states, targets, draw)
            terms = self.loss.losses(self.student, states, targets, start, draw)
            parts = self.loss.parts(terms, draw, weights)
            loss = self.loss.total(parts)
        self.optimizer.zero_grad()
        loss.backward()
        if self.step < config.objective.freeze_last_layer:
            self.student.zero_last_layers()
        if self.step < config.optim.freeze_backbone:
            backbone.zero_grad()
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), config.optim.clip)
        self.set_schedules()
        self.watch(loss=loss, gradient_norm=gradient_norm)
        self.guard.step(self.optimizer)
        if steer is not None:
            steer.clip_scale = (config.optim.clip / gradient_norm.detach().clamp_min(1e-20)).clamp_max(1)
        self.loss.update(logits)
        momentum = cosine_schedule(self.step, config.steps, config.objective.teacher_momentum, 1.0)
        update_teacher(self.student, self.teacher, momentum)
        named = {f"loss_{name}": part for name, part in parts.items()}
        self.meters.add(loss=loss, **named, gradient_norm=gradient_norm, **self.loss.watch(targets))
        self.step += 1

    def watch(self, **terms: Tensor) -> None:
        """Have the guard refuse the learner's step if a term is not finite."""
        step, stream = self.step, self.stream
        self.guard.watch(self.optimizer, lambda bad: not_finite(step, bad, stream, step), **terms)

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
            UserError: it is of another architecture.
        """
        noted = fit_positions((self.student, self.teacher, self.loss), state, self.config.backbone.keep_grid)
        if noted:
            print(f"{self.config.start_from}: {noted}", file=sys.stderr)
        for module, part in ((self.student, "teacher"), (self.teacher, "teacher"), (self.loss, "objective")):
            try:
                values = {name: value.float() for name, value in state[part].items()}
                found = module.load_state_dict(values, strict=False)
                odd = [*found.missing_keys, *found.unexpected_keys]
                odd = [name for name in odd if name.split(".")[0] not in OPTIONAL]
                if odd:
                    raise RuntimeError(f"{len(odd)} tensors are in one of them only, {odd[0]} the first")
            except RuntimeError as error:
                first = " ".join(str(error).split())[:300]
                raise UserError(
                    f"start_from={self.config.start_from}: of another architecture than backbone and objective: {first}"
                ) from None

    def start_head(self, path: str) -> None:
        """Begin with the projection heads, and the centre, of a DINO or DINOv2 training checkpoint.

        Raises:
            UserError: it has none, or of another size.
        """
        center = getattr(self.loss, "center", None)
        print(load_head(path, self.student.head, self.teacher.head, center), file=sys.stderr)

    def save(self, folder: Path) -> None:
        """A checkpoint, and the teacher's backbone as timm-keyed weights."""
        self.guard.check(wait=True)
        keep = self.config.checkpoint.keep
        try:
            # The checkpoint last: whatever a kill leaves undone before it is done again on resume.
            save_backbone(folder / WEIGHTS_NAME, self.teacher.backbone, {"step": str(self.step)})
            save_checkpoint(folder / "checkpoints", self.step, self.state_dict(), keep)
        except OSError as error:
            raise UserError(
                f"{folder}: step {self.step} could not be saved ({error.strerror or error}); "
                "free space or choose another out=; earlier checkpoints are whole"
            ) from None

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
        }
        if self.steer is not None:
            state["steer"] = self.steer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        fit_positions((self.student, self.teacher, self.loss), state, keep_grid=True)
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.loss.load_state_dict(state["objective"])
        self.loss.begin(self.step, self.teacher)
        self.optimizer.load_state_dict(state["optimizer"])
        self.meters.load_state_dict(state["meters"], self.device)
        self.collapse.load_state_dict(state["collapse"])
        if self.steer is not None:
            self.steer.load_state_dict(state["steer"])
