"""Continued pretraining, steered: the loop is Algorithm 1 of the paper (arXiv 2601.22108).

Labels reach the backbone by one path only: feedback → g_down → φ → task → ∇_θ L_pre. The learner's own step is plain
self-supervision on views whose masks were made under no_grad.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_value.backbones import WEIGHTS_NAME, create_backbone, save_backbone
from dino_value.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from dino_value.config import Config, packaged
from dino_value.data import open_views
from dino_value.data.sampling import Cursor, Stream, generator, key
from dino_value.data.views import augment
from dino_value.designers import DESIGNERS, sparsity, total_variation
from dino_value.errors import Interrupted, UserError
from dino_value.feedback import downstream_gradient, fit_head, open_feedback
from dino_value.objectives.dino import DINOHead, DINOLoss
from dino_value.optim import FiniteGuard, cosine_schedule, linear_schedule, parameter_groups
from dino_value.process import choose_device, stop_requests, use_bfloat16
from dino_value.run_folder import prepare_folder, record_environment
from dino_value.steps import Learner, SSLTask, Views, design_views, ssl_loss, teacher_targets, update_teacher
from dino_value.track import Clock, Meters, MetricsFile, Reporter, environment
from dino_value.value import DIRECTIONS, ENGINES, combine, last_blocks, matching, random_like, value_step


def train(config: Config, quiet: bool = False) -> Path:
    """Train to `config.steps`, going on from the newest checkpoint in `config.out` if there is one; the run folder.

    Raises:
        UserError: bad data, weights or settings; a loss that is not finite.
        Interrupted: a signal asked to stop; everything is saved.
    """
    folder = Path(config.out)
    newest = latest_checkpoint(folder / "checkpoints")
    run = Run(config)
    if newest is None and config.start_from is not None:
        run.start_from(load_checkpoint(packaged(config.start_from)))
    prepare_folder(config, folder)  # after all that may refuse: a mistake leaves no folder behind
    if newest is not None:
        run.load_state_dict(load_checkpoint(newest))
    if run.step >= config.steps:
        return folder
    record_environment(folder, environment(config.seed, run.device))

    metrics = MetricsFile(folder, run.step)
    clock = Clock()
    with stop_requests() as stopping, Reporter(config.method, config.steps, run.step, quiet) as reporter:
        for large, small in clock.waiting(run.stream.iterate(run.step, config.steps)):
            run.learner_update(large, small)
            reporter.advance(run.step)
            last = run.step == config.steps
            if run.step % config.log_every == 0 or last:
                run.guard.check(wait=True)
                values = run.meters.read() | run.schedules(run.step - 1) | clock.read(config.optim.batch_size)
                metrics.write(run.step, values)
                reporter.say(run.step, values)
            if run.step % config.checkpoint.every == 0 or last or stopping():
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
        c = config.objective
        backbone = create_backbone(
            config.backbone.name,
            config.views.global_size,
            config.backbone.kwargs,
            config.backbone.weights,
            config.backbone.min_match,
        )
        backbone.set_attention(config.backbone.attention)
        for name, size in (("global", config.views.global_size), ("local", config.views.local_size)):
            if size % backbone.patch_size or size < backbone.patch_size:
                raise UserError(f"views.{name}_size={size}: not a multiple of the patch size {backbone.patch_size}")
        head = DINOHead(backbone.embed_dim, c.out_dim, c.hidden_dim, c.bottleneck_dim, c.batch_norm)
        self.student = Learner(backbone, head).to(self.device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.loss = DINOLoss(c.out_dim, c.student_temp, c.center_momentum).to(self.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.student), lr=config.optim.lr, fused=True)

        views = open_views(config.data.unlabeled, config.views, config.data.in_memory)
        workers = 0 if config.data.in_memory else config.data.workers
        self.stream = Stream(views, config.optim.batch_size, config.seed, "unlabeled", workers)
        self.meters = Meters()
        self.guard = FiniteGuard()
        self.steered = config.method != "baseline"
        if self.steered:
            self._build_designer()
            # No image of the g_down batches may be among those of g_pre.
            held = {task.source.name(index) for task in self.feedback for index in task.meta_indices}
            self.meta_stream = Stream(
                views.without(held), config.value.batch_size, config.seed, "meta unlabeled", min(1, workers)
            )
            self.meta = Cursor(self.meta_stream)

    def _build_designer(self) -> None:
        config, backbone = self.config, self.student.backbone
        d, s, after = config.designer, config.value.scope, (backbone.final_norm,)
        try:
            self.scope = matching(backbone, s.patterns, after) if s.patterns else last_blocks(backbone, s.blocks, after)
        except ValueError as error:
            raise UserError(f"value.scope: {error}") from None
        torch.manual_seed(key(config.seed, "designer"))
        before = [
            name for name in self.scope.names if not name.startswith(("model.blocks.", f"model.{backbone.final_norm}."))
        ]
        if before:
            raise UserError(
                f"value.scope.patterns: {before[0]} lies before the blocks; choose parameters of blocks and norm"
            )
        if config.feedback.size % backbone.patch_size:
            raise UserError(
                f"feedback.size={config.feedback.size}: not a multiple of the patch size {backbone.patch_size}"
            )
        sizes = [config.views.global_size] + [config.views.local_size] * (d.crops == "all")
        if any(size % d.stride for size in sizes):
            raise UserError(f"designer.stride={d.stride}: must divide the views' sizes {sizes}")
        self.designer = DESIGNERS[d.name](d.width, d.depth, d.stride, d.keep_ratio).to(self.device)
        self.designer_optimizer = torch.optim.AdamW(self.designer.parameters(), lr=d.lr, weight_decay=0.0, fused=True)
        self.feedback = open_feedback(config, backbone.embed_dim, self.device)
        self.engine = functools.partial(ENGINES[config.value.engine], **self._engine_settings())
        self.designer_updates = 0

    def _engine_settings(self) -> dict[str, float]:
        return {"radius": self.config.value.radius} if self.config.value.engine == "finite_difference" else {}

    def learner_update(self, large: Tensor, small: Tensor) -> None:
        """One step of Algorithm 1 on an unlabeled batch, uint8 [2 B 3 H W] and [N B 3 h w]."""
        config, o = self.config, self.config.optim
        views = self.make_views(large, small, "learner", self.step)

        since = self.step - config.value.burn_in
        designing = self.steered and since >= 0
        if designing and since % config.value.period == 0:
            for _ in range(1 + (config.value.warmup if since == 0 else 0)):
                self.designer_update()
        with torch.no_grad(), self.autocast():
            learned = views
            if designing:
                learned, masks = design_views(
                    self.designer, views, config.designer, key(config.seed, "fill", self.step)
                )
                self.meters.add(mask_mean=masks.mean())
            seen = learned.large if config.designer.teacher_views == "masked" else views.large
            targets, logits = teacher_targets(self.teacher, seen, self.loss, self.teacher_temperature())

        # Stochastic depth is a function of the step, like the data, and the same in every arm.
        torch.manual_seed(key(config.seed, "step", self.step))
        with self.autocast():
            loss = ssl_loss(self.student, learned, self.loss, targets)
        self.optimizer.zero_grad()
        loss.backward()
        if self.step < config.objective.freeze_last_layer:
            self.student.head.last_layer.zero_grad()
        if self.step < o.freeze_backbone:
            self.student.backbone.zero_grad()
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), o.clip)
        self.set_schedules()
        self.watch(self.optimizer, self.stream, self.step, loss=loss, gradient_norm=gradient_norm)
        self.guard.step(self.optimizer)
        self.loss.update_center(logits)
        momentum = cosine_schedule(self.step, config.steps, config.objective.teacher_momentum, 1.0)
        update_teacher(self.student, self.teacher, momentum)
        entropy = -(targets * targets.clamp_min(1e-20).log()).sum(-1).mean()
        self.meters.add(loss=loss, gradient_norm=gradient_norm, teacher_entropy=entropy)
        self.step += 1

    def designer_update(self) -> None:
        """One step of φ on −V + λR, on labelled train and meta batches and an unlabeled meta batch of their own."""
        config, number = self.config, self.designer_updates
        d = config.designer
        torch.manual_seed(key(config.seed, "designer step", number))
        self.student.eval()  # stochastic depth would make every pass, and both ends of a difference, another function
        large, small = self.meta.next()
        views = self.make_views(large, small, "meta", number)
        with self.autocast():
            for task in self.feedback:
                for _ in range(config.feedback.updates + (config.feedback.warmup if number == 0 else 0)):
                    fit_head(task, self.student.backbone, self.device, self.guard)
            found = [
                downstream_gradient(task, self.student.backbone, self.scope, self.device) for task in self.feedback
            ]
            gradients, losses = zip(*found, strict=True)
            g_down = combine(gradients, [task.weight for task in self.feedback])
            if config.method == "random" or config.value.direction == "random":
                g_down = random_like(g_down, generator(config.seed, "random direction", number))

            seed = key(config.seed, "meta fill", number)
            ssl = SSLTask(
                self.student,
                self.teacher,
                self.loss,
                self.teacher_temperature(),
                self.designer,
                views,
                d,
                self.scope,
                seed,
            )
            hidden = ssl.trunk()
            assert ssl.masks is not None
            penalty = d.lambda_spars * sparsity(ssl.masks, d.keep_ratio) + d.lambda_tv * total_variation(ssl.masks)
            phi = list(self.designer.parameters())
            self.designer_optimizer.zero_grad()
            parameters = self.scope.parameters(self.student.backbone)
            # A random g_down, drawn above from a generator of its own, is a random direction already.
            direction = DIRECTIONS["dot" if config.value.direction == "random" else config.value.direction]
            found_value = value_step(ssl, parameters, g_down, direction, self.engine, phi, penalty, hidden)
        designer_norm = torch.nn.utils.clip_grad_norm_(phi, config.optim.clip)
        feedback = {f"loss_{task.kind}": loss for task, loss in zip(self.feedback, losses, strict=True)}
        for task, (name, loss) in zip(self.feedback, feedback.items(), strict=True):
            self.watch(self.designer_optimizer, task.meta_stream, task.meta.count - 1, **{name: loss})
        terms = {"value": found_value.value, "designer_gradient_norm": designer_norm}
        self.watch(self.designer_optimizer, self.meta_stream, number, **terms)
        self.guard.step(self.designer_optimizer)
        self.student.train()
        self.designer_updates += 1
        self.meters.add(
            **found_value._asdict(),
            designer_gradient_norm=designer_norm,
            mask_spread=ssl.masks.detach().std((-1, -2)).mean(),
            **feedback,
        )

    def make_views(self, large: Tensor, small: Tensor, name: str, number: int) -> Views:
        """Augmented, normalised views of one batch of crops."""
        device = self.device
        large, small = large.to(device, non_blocking=True), small.to(device, non_blocking=True)
        views = augment(large, small, self.config.views, self.config.seed, name, number)
        return Views(*(self.student.backbone.normalise(group) for group in views))

    def watch(self, optimizer: torch.optim.Optimizer, stream: Stream, number: int, **terms: Tensor) -> None:
        """Have the guard refuse `optimizer`'s next step if a term is not finite; they came from batch `number`."""
        step = self.step

        def message(bad: str) -> str:
            return (
                f"step {step}: {bad} not finite; nothing was applied. {stream.describe(number)}. "
                "Lower optim.lr or raise teacher_temp"
            )

        self.guard.watch(optimizer, message, **terms)

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
            group["lr"] = now["lr"]
            if group["decay"]:
                group["weight_decay"] = now["weight_decay"]

    def start_from(self, state: dict[str, Any]) -> None:
        """Begin a new run at the teacher of another: backbone, head and centre, for student and teacher alike.

        Raises:
            UserError: it is of another architecture.
        """
        for module, part in ((self.student, "teacher"), (self.teacher, "teacher"), (self.loss, "objective")):
            try:
                module.load_state_dict({name: value.float() for name, value in state[part].items()})
            except RuntimeError as error:
                first = " ".join(str(error).split())[:300]
                raise UserError(
                    f"start_from={self.config.start_from}: of another architecture than backbone and objective: {first}"
                ) from None

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
        }
        if self.steered:
            state["designer"] = self.designer.state_dict()
            state["designer_optimizer"] = self.designer_optimizer.state_dict()
            state["designer_updates"] = self.designer_updates
            state["feedback"] = {task.kind: task.state_dict() for task in self.feedback}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.loss.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.meters.load_state_dict(state["meters"], self.device)
        if self.steered:
            self.designer.load_state_dict(state["designer"])
            self.designer_optimizer.load_state_dict(state["designer_optimizer"])
            self.designer_updates = state["designer_updates"]
            self.meta.seek(self.designer_updates)
            for task in self.feedback:
                task.load_state_dict(state["feedback"][task.kind])
