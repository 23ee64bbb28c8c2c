"""The designer's side of Algorithm 1: labels → heads → g_down → direction → φ, and what φ makes of the learner's task.

A designer is a mask generator (`unet`, `sit`), a closed form without parameters (`weights`, `best_of_n`, `targets`;
method sections 2 and 8), or one of each (`unet+targets`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dino_value.config import Config, packaged
from dino_value.data.sampling import Cursor, Source, Stream, generator, key
from dino_value.designers import DESIGNERS, AttentionMasks, RandomMasks, sparsity, total_variation
from dino_value.distributed.collectives import alone
from dino_value.distributed.fsdp import Plain
from dino_value.distributed.fsdp import full as in_one_piece
from dino_value.distributed.group import from_first, own_part
from dino_value.distributed.shards import WHOLE, BatchShard
from dino_value.errors import UserError, refusing
from dino_value.models.learner import Learner
from dino_value.objectives.interface import Draw, LossTerms, Objective, State
from dino_value.objectives.self_distillation import SelfDistillation
from dino_value.runs.checkpoint import load_checkpoint, snapshot
from dino_value.runs.metrics import Meters
from dino_value.training.agreement import direction_agreement
from dino_value.training.feedback import downstream_gradient, fit_heads, head_lag, held_gradients, open_feedback
from dino_value.training.lookahead import look_ahead
from dino_value.training.optim import FiniteGuard
from dino_value.training.steps import SSLTask, Tail, Views, constant, design_views, evaluating, make_views
from dino_value.value import (
    DIRECTIONS,
    ENGINES,
    AdamState,
    Direction,
    Engine,
    Gradient,
    GradientAverage,
    Guard,
    Mover,
    Scope,
    ValueStep,
    adam,
    alignment,
    average,
    best_of,
    check_engine,
    check_method,
    check_start,
    choose_engine,
    choose_radius,
    combine,
    engine_error,
    last_blocks,
    matching,
    mean_gradient,
    norm,
    pre_gradient,
    random_like,
    split_half,
    task_alignment,
    term_values,
    value_gain,
    value_step,
    value_weights,
)

CHECK_IMAGES = 4  # of a meta batch, for the engine's start-up check
RADIUS = 1e-2  # of the difference of log-probabilities along a direction; as `term_values`


class DesignerUpdate:
    """φ, the feedback that teaches it, and all of their state."""

    def __init__(
        self,
        config: Config,
        plain: Plain,
        loss: Objective,
        optimizer: torch.optim.Optimizer,
        guard: FiniteGuard,
        meters: Meters,
        views: Source,
        autocast: Callable[[], torch.autocast],
    ) -> None:
        self.config, self.guard, self.meters, self.autocast = config, guard, meters, autocast
        self.part = own_part()
        self.plain, self.student, self.teacher = plain, plain.student, plain.teacher
        self.device = device = next(self.student.parameters()).device
        self.loss, self.optimizer = loss, optimizer
        backbone = self.student.backbone
        self.scope = open_scope(config, backbone, backbone.final_norm)
        named = dict(plain.learners[0].backbone.named_parameters())
        self.trained = [named[name] for name in self.scope.names]  # as the optimizer knows them
        check_sizes(config, backbone.patch_size)
        with refusing("value.combine"):
            check_method(config.value.combine)

        torch.manual_seed(key(config.seed, "designer"))
        self.designer = open_designer(config, self.teacher) if config.designs else None
        self.designer_optimizer: torch.optim.Optimizer | None = None
        if self.designer is not None and config.learns_masks:
            phi = self.designer.parameters()
            self.designer_optimizer = torch.optim.AdamW(phi, lr=config.designer.lr, weight_decay=0.0, fused=True)
        self.feedback = open_feedback(config, backbone.embed_dim, device) if config.needs_labels else []
        self.guards = {task.kind: Guard(config.value.guard_rate) for task in self.feedback if task.guard}
        # No image of the g_down batches may be among those of g_pre.
        held = {task.source.name(index) for task in self.feedback for index in task.meta_indices + task.held_indices}
        workers = 0 if config.data.in_memory else min(1, config.data.workers)
        self.meta_stream = Stream(
            views.without(held),  # type: ignore[attr-defined]
            config.value.batch_size,
            config.seed,
            "meta unlabeled",
            workers,
            self.part,
        )
        self.meta = Cursor(self.meta_stream)
        self.updates = 0
        self.engine_name: str | None = None if config.value.engine == "auto" else config.value.engine
        self.radius = config.value.radius or 1.0
        self.direction: Gradient | None = None  # the last u, which the closed forms follow between updates
        # Of the random arm: noise that is renewed, and averaged, as g_down is; a lookahead is not averaged.
        averaged = config.feedback.ema and config.value.direction != "lookahead"
        self.noise = GradientAverage(config.feedback.ema) if averaged else None
        self.clip_scale = torch.ones((), device=device)  # what clipping left of the learner's last gradient
        self.notes: list[str] = []  # for the log
        self._before: tuple[int, dict[str, Any]] = (-1, {})

    # What φ makes of the learner's task

    @torch.no_grad()
    def learned_views(self, views: Views, step: int) -> Views:
        """What the learner sees at `step`: the views as they are during burn-in, or without a mask generator."""
        if self.designer is None or step < self.config.value.burn_in:
            return views
        torch.manual_seed(key(self.config.seed, "masks", step))  # of masks that are drawn
        seed = key(self.config.seed, "fill", step)
        learned, masks = design_views(self.designer, views, self.config.designer, seed, self.part)
        self.meters.add(mask_mean=masks.mean())
        return learned

    @torch.no_grad()
    def chosen_views(self, views: Views, targets: LossTerms) -> Views:
        """Of n candidates for each local slot the one of highest value, or the first before any update:
        [N·n·B 3 h w] to [N·B 3 h w]. The views as they are with another designer."""
        if self.config.designer.closed_form != "best_of_n":
            return views
        n, small = self.config.designer.candidates, views.small.unflatten(0, (-1, views.batch))
        if self.direction is None:
            return Views(views.large, small[::n].flatten(0, 1))
        assert isinstance(self.loss, SelfDistillation)  # config.py: no other has local crops
        start = self.scope.start
        with evaluating(self.student):
            state = views.small if start is None else self.student.backbone(views.small, stop=start)
        values = self._values(self.loss.local_terms, full(state), targets, start).mean(0)
        images = torch.arange(views.batch, device=values.device)
        return Views(views.large, small[best_of(values, n), images].flatten(0, 1))

    def term_weights(self, states: Sequence[State], targets: LossTerms, draw: Draw) -> LossTerms | None:
        """Weights of the loss's terms, of mean one in each part of it, from hidden states that the step has anyway;
        none before the first update, or with another designer."""
        if self.config.designer.closed_form != "weights" or self.direction is None:
            return None
        weights, values = self._weights(states, targets, draw)
        # ⟨u, g_pre⟩ of the very step, without and with the weights: the loss is linear in its terms.
        plain, weighted = (self.loss.total(self.loss.parts(values, draw, given)) for given in (None, weights))
        self.meters.add(plain_value=plain, weighted_value=weighted)
        return weights

    def moved_targets(
        self, states: Sequence[State], predictions: LossTerms, targets: LossTerms, draw: Draw, step: int
    ) -> LossTerms:
        """The targets that the learner is given at `step`: moved to where its predictions would go along −u, by at most
        `designer.kl`; as they are before the first update, or with another designer.

        Args:
            predictions: the learner's own, from `states`.
        """
        if not self.steers or step < self.config.value.burn_in:
            return targets
        moved, mover = self._move(states, predictions, targets, draw, self._noise_key(step))
        if mover is None:
            return targets
        found = {f"target_kl_{part}": spent for part, spent in mover.spent.items()}
        found |= {f"target_strength_{part}": strength for part, strength in mover.strengths.items()}
        found |= {f"target_spread_{part}": spread for part, spread in mover.spread.items()}
        # ⟨u, g_pre⟩ of the very step, with the targets as they were, as they are, and at best.
        names = {"plain_value": mover.plain, "moved_value": mover.moved, "best_value": mover.best}
        self.meters.add(**found, **{name: self._along(terms, draw) for name, terms in names.items() if terms})
        return moved

    def _noise_key(self, number: int) -> int:
        return key(self.config.seed, "noise", number, self.part.rank)

    def moved(
        self, states: Sequence[State], predictions: LossTerms, targets: LossTerms, draw: Draw, seed: int
    ) -> LossTerms:
        """`moved_targets`, and nothing is logged."""
        return self._move(states, predictions, targets, draw, seed)[0] if self.steers else targets

    @property
    def steers(self) -> bool:
        """Are targets moved, and is there something to move them by?"""
        followed = self.direction is not None or self.config.designer.closed_form is None
        return self.config.designer.moves_targets and followed

    def _along(self, terms: LossTerms, draw: Draw) -> Tensor:
        """The loss's total of terms, of those parts alone that have targets."""
        with torch.autocast(self.device.type, enabled=False):
            return self.loss.total(self.loss.parts(terms, draw))

    @torch.no_grad()
    def _move(
        self, states: Sequence[State], predictions: LossTerms, targets: LossTerms, draw: Draw, seed: int
    ) -> tuple[LossTerms, Mover | None]:
        """The moved targets, and what moved them; none where nothing is to move."""
        d, v = self.config.designer, self.config.value
        mover = functools.partial(Mover, d.kl, d.strength)
        if mover().idle:
            return targets, None
        if d.closed_form is None:  # noise, of the same KL
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(seed)
                noisy = {name: value + torch.randn_like(value) for name, value in predictions.items()}
            return self.loss.move(targets, predictions, noisy, drawn := mover(relative=True)), drawn
        assert self.direction is not None
        parameters, u = self.scope.parameters(self.student.backbone), self.direction
        tail, base = Tail(self.student), list(parameters.values())

        def at(values: Sequence[Tensor]) -> LossTerms:
            place, given = dict(zip(parameters, values, strict=True)), [detached(state) for state in states]
            with evaluating(self.student):
                return tail.at(place, self.loss.predict, given, self.scope.start, draw)

        if v.direction == "lookahead":
            # To the shadow itself, in the learner's own precision: the difference is of finite size.
            here = at(base) if self._draws else {name: value.detach() for name, value in predictions.items()}
            there = at(torch._foreach_sub(base, u))
            return self.loss.move(targets, here, there, plain := mover()), plain
        with torch.autocast(self.device.type, enabled=False):
            states = [full(state) for state in states]
            step = torch._foreach_mul(u, RADIUS / norm(u).clamp_min(1e-20))
            here, there = (at(place(base, step)) for place in (torch._foreach_add, torch._foreach_sub))
        scale = norm(u) / (2 * RADIUS)
        return self.loss.move(targets, here, there, slope := mover(scale=scale, relative=True)), slope

    @functools.cached_property
    def _draws(self) -> bool:
        """Does the learner's own forward pass draw something (stochastic depth), so that it is another function?"""
        rates = (getattr(m, n, 0.0) for m in self.student.modules() for n in ("drop_prob", "prob", "p"))
        return any(isinstance(rate, float) and rate > 0 for rate in rates)

    def _weights(self, states: Sequence[State], targets: LossTerms, draw: Draw) -> tuple[LossTerms, LossTerms]:
        d = self.config.designer
        shapes: dict[str, torch.Size] = {}

        def flat(student: Learner, *arguments: Any) -> Tensor:
            terms = self.loss.losses(student, *arguments)
            shapes.update({name: part.shape for name, part in terms.items()})
            return torch.cat([part.flatten() for part in terms.values()])

        found = self._values(flat, [full(state) for state in states], targets, self.scope.start, draw)
        sizes = [shape.numel() for shape in shapes.values()]
        values = {name: v.view(shapes[name]) for name, v in zip(shapes, found.split(sizes), strict=True)}
        weights = {
            name: value_weights(values[name], d.temperature, d.weight_clip, valid)
            for name, valid in self.loss.weighable(values).items()
        }
        return weights, values

    @torch.no_grad()
    def _values(self, terms: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """v, of the shape of terms(student, *arguments): how much one step on each lowers the downstream loss."""
        assert self.direction is not None
        tail = Tail(self.student)
        with evaluating(self.student), torch.autocast(self.device.type, enabled=False):
            return term_values(
                lambda parameters: tail.at(parameters, terms, *arguments),
                self.scope.parameters(self.student.backbone),
                self.direction,
            )

    # How φ learns

    def update_if_due(self, step: int, temperature: float) -> None:
        """The updates of φ that come before learner step `step`: one every r steps after burn-in, more at its end."""
        v = self.config.value
        if not (self.config.needs_labels or self.config.learns_masks):
            return  # nothing here follows or learns anything
        since = step - v.burn_in
        if since >= 0 and since % v.period == 0:
            self._before = step, snapshot(self.state_dict())
            with self.plain.filled():
                for _ in range(1 + (v.warmup if since == 0 else 0)):
                    with self.autocast():
                        self.update(step, temperature)

    def update(self, step: int, temperature: float) -> None:
        """One step of φ on −V + λR, on labelled train and meta batches and an unlabeled meta batch of their own.

        Args:
            step: the learner's, for messages.
            temperature: the teacher's.
        """
        # No pass of an update may give θ a gradient, or differ from the next by what stochastic depth has drawn.
        with constant(self.student), evaluating(self.student):
            (self._oppose if self.config.method == "adversarial" else self._update)(step, temperature)

    def _update(self, step: int, temperature: float) -> None:
        config, number, backbone = self.config, self.updates, self.student.backbone
        torch.manual_seed(key(config.seed, "designer step", number))
        for one in self.feedback:
            steps = config.feedback.updates + (config.feedback.warmup if number == 0 else 0)
            fit_heads(one, backbone, self.device, self.guard, steps)
        g_down, gradients, metrics = self.downstream()
        direction = self.direction_of({kind: gradients[kind] for kind in self.guards})
        views = make_views(
            backbone, self.meta.next(), config.views, self.device, config.seed, "meta", number, self.part
        )
        task = self._task(views, temperature, self.designer)
        parameters = self.scope.parameters(backbone)
        if number == 0:
            checked = {f"feedback.{kind}": gradient for kind, gradient in gradients.items()}
            if config.value.direction == "lookahead":
                checked["value.lookahead"] = g_down
            self._check(views, temperature, parameters, checked, g_down)

        with torch.set_grad_enabled(self.designer_optimizer is not None):
            hidden = task.trunk()
        kept = self.direction
        if self.designer_optimizer is None:
            g_pre = average(pre_gradient(task, hidden, parameters))
            direction(g_down, g_pre)
            metrics |= ValueStep.of(g_down, g_pre)._asdict()
        else:
            metrics |= self._learn(task, hidden, parameters, g_down, direction)
        self._watch(step, number, metrics)
        if self.designer_optimizer is not None:
            self.guard.step(self.designer_optimizer)
        if kept is not None and self.direction is not None and config.follows:
            metrics["direction_drift"] = alignment(kept, self.direction)
        if config.value.diagnose and number % config.value.diagnose == 0:
            metrics |= self._diagnose(views, temperature, parameters, list(gradients.values()))
        if config.value.agreement and number % config.value.agreement == 0:
            found = direction_agreement(self, temperature)
            metrics |= {
                f"agreement_{name}": torch.tensor(value[0], device=self.device) for name, value in found.items()
            }
        self.updates += 1
        self.meters.add(**metrics)

    def _learn(
        self,
        task: SSLTask,
        hidden: tuple[Tensor, ...],
        parameters: dict[str, Tensor],
        g_down: Gradient,
        direction: Direction,
    ) -> dict[str, Tensor]:
        """φ's gradient, clipped, in φ's .grad."""
        assert self.designer is not None
        assert self.designer_optimizer is not None
        assert task.masks is not None
        phi = list(self.designer.parameters())
        self.designer_optimizer.zero_grad()
        penalty = self._penalty(task.masks)
        found = value_step(task, parameters, g_down, direction, self._engine(), phi, penalty, hidden)
        length = torch.nn.utils.clip_grad_norm_(phi, self.config.optim.clip)
        spread = task.masks.detach().std((-1, -2)).mean()
        return found._asdict() | {"designer_gradient_norm": length, "mask_spread": spread}

    def _penalty(self, masks: Tensor) -> Tensor:
        """λR(φ), method section 3."""
        d = self.config.designer
        return d.lambda_spars * sparsity(masks, d.keep_ratio) + d.lambda_tv * total_variation(masks)

    def _oppose(self, step: int, temperature: float) -> None:
        """A step of φ on −L_pre + λR: masks that make the task as hard as they can (ADIOS)."""
        assert self.designer is not None
        assert self.designer_optimizer is not None
        config, number, backbone = self.config, self.updates, self.student.backbone
        torch.manual_seed(key(config.seed, "designer step", number))
        views = make_views(backbone, self.meta.next(), config.views, self.device, config.seed, "meta", number)
        task, phi = self._task(views, temperature, self.designer), list(self.designer.parameters())
        self.designer_optimizer.zero_grad()
        with torch.enable_grad():
            loss = task.tail(task.trunk(), self.scope.parameters(backbone))
            assert task.masks is not None
            (self._penalty(task.masks) - loss).backward(inputs=phi)
        length = torch.nn.utils.clip_grad_norm_(phi, config.optim.clip)
        metrics = {"opposed_loss": loss.detach(), "designer_gradient_norm": length}
        self.guard.watch(
            self.designer_optimizer, lambda bad: not_finite(step, bad, self.meta_stream, number), **metrics
        )
        self.guard.step(self.designer_optimizer)
        self.updates += 1
        self.meters.add(**metrics, mask_spread=task.masks.detach().std((-1, -2)).mean())

    def downstream(self) -> tuple[Gradient, dict[str, Gradient], dict[str, Tensor]]:
        """One g_down of the tasks that are not guards, or where a lookahead takes them; the gradients of single tasks;
        what to log. In the random arm a Gaussian of its norms, kept just as long."""
        config, backbone = self.config, self.student.backbone
        ahead = config.value.direction == "lookahead"
        asked = [task for task in self.feedback if task.guard or not ahead]
        found = {task.kind: downstream_gradient(task, backbone, self.scope, self.device) for task in asked}
        metrics = {f"loss_{kind}": loss for kind, (_, loss) in found.items()}
        every = config.feedback.lag_every
        if asked and every and self.updates % every == 0:
            number = self.updates // every
            lags = [head_lag(task, backbone, self.device, number) for task in asked]
            metrics["head_lag"] = torch.stack(lags).max()
        gradients = {kind: gradient for kind, (gradient, _) in found.items()}
        targets = [task for task in self.feedback if not task.guard]
        if ahead:
            g_down, said = look_ahead(targets, backbone, self.scope, config, self.updates, self.device)
            metrics |= said
        else:
            g_down = self._g_down(gradients)
        if "random" in (config.method, config.value.direction):
            g_down = self._random(g_down)
        return g_down, gradients, metrics

    def _g_down(self, gradients: dict[str, Gradient]) -> Gradient:
        """One g_down of the gradients of tasks that are not guards."""
        targets = [task for task in self.feedback if not task.guard]
        alphas = [task.weight for task in targets]
        return combine([gradients[task.kind] for task in targets], alphas, self.config.value.combine, self.updates)

    def _random(self, g_down: Gradient) -> Gradient:
        """Gaussian tensors of g_down's norms that change when, and as slowly as, it does."""
        refresh = self.config.feedback.refresh if self.config.value.direction != "lookahead" else 0
        number = self.updates // max(1, refresh)
        noise = random_like(g_down, generator(self.config.seed, "random direction", number))
        return noise if self.noise is None else random_scaled(self.noise.update(noise), g_down)

    def direction_of(self, guarded: dict[str, Gradient]) -> Direction:
        """The configured direction, bent by the guards, and kept for the closed forms."""
        name = self.config.value.direction
        if name == "adam":
            state = AdamState.of(self.optimizer, self.trained)
            means, squares = ([in_one_piece(part) for part in parts] for parts in (state.exp_avg, state.exp_avg_sq))
            base = adam(state._replace(exp_avg=means, exp_avg_sq=squares), self.clip_scale)
        else:  # a random g_down is drawn above, from a generator of its own, and a lookahead is a direction already
            base = DIRECTIONS["dot" if name in ("random", "lookahead") else name]

        def direction(g_down: Gradient, g_pre: Gradient) -> Gradient:
            u = base(g_down, g_pre)
            if self.config.method != "random":
                for kind, gradient in guarded.items():
                    u = self.guards[kind].direct(u, gradient)
                    self.guards[kind].update(alignment(gradient, g_pre))
            self.direction = u
            return u

        return direction

    def task(self, views: Views, temperature: float, designed: bool = True, seed: int = 0) -> SSLTask:
        """The learner's task on `views`: as the designer makes it, or plain."""
        designer = self.designer if designed else None
        task = self._task(views, temperature, designer, seed)
        if designed and self.config.designer.closed_form == "weights" and self.direction is not None:
            task.weigh = lambda *arguments: self._weights(*arguments)[0]
        if designed and self.steers:
            task.move = lambda states, said, targets, draw: self.moved(states, said, targets, draw, task.seed)
        return task

    def _task(
        self,
        views: Views,
        temperature: float,
        designer: nn.Module | None,
        seed: int | None = None,
        part: BatchShard | None = None,
    ) -> SSLTask:
        seed = key(self.config.seed, "meta fill", self.updates) if seed is None else seed
        part = self.part if part is None else part
        d, scope = self.config.designer, self.scope
        return SSLTask(self.student, self.teacher, self.loss, temperature, designer, views, d, scope, seed, part)

    def _engine(self) -> Engine:
        assert self.engine_name is not None
        return engines(self.radius)[self.engine_name]

    def _check(
        self,
        views: Views,
        temperature: float,
        parameters: dict[str, Tensor],
        gradients: dict[str, Gradient],
        g_down: Gradient,
    ) -> None:
        """Before the first update: is each gradient usable, by the setting that made it, and the engine exact enough on
        a few images?

        Raises:
            UserError: no.
        """
        for name, gradient in gradients.items():
            if name == "value.lookahead" and not bool(norm(gradient).isfinite()):
                rate = self.config.value.lookahead.lr or self.config.optim.lr
                raise UserError(f"value.lookahead diverges, at a rate of {rate:g}: lower value.lookahead.lr")
            with refusing(name):
                check_start(gradient)
        if self.designer is None or self.designer_optimizer is None:
            return
        found = from_first(lambda: self._choose(views.first(CHECK_IMAGES), temperature, parameters, g_down))
        self.engine_name, self.radius, note = found
        self.notes.append(note)

    def _choose(
        self, views: Views, temperature: float, parameters: dict[str, Tensor], g_down: Gradient
    ) -> tuple[str | None, float, str]:
        """Engine and radius, and what to say of them; of these images alone, whatever other processes do."""
        assert self.designer is not None
        tolerance, phi = self.config.value.tolerance, list(self.designer.parameters())
        task = self._task(views, temperature, self.designer, part=WHOLE)
        with refusing("value.engine"), alone():
            if self.config.value.radius is None and self.engine_name != "double_backward":
                self.radius, _ = choose_radius(task, parameters, g_down, phi)
            if self.engine_name is None:
                self.engine_name, error = choose_engine(task, parameters, g_down, phi, engines(self.radius), tolerance)
            else:
                error = check_engine(task, parameters, g_down, phi, self._engine(), bound=tolerance)
        with refusing("designer"):
            check_start(g_down, task.masks)
        at = f" at radius {self.radius:.0e}" if self.engine_name == "finite_difference" else ""
        note = f"engine {self.engine_name}{at}: relative error {error:.1e} on {task.views.batch} images"
        return self.engine_name, self.radius, note

    def _watch(self, step: int, number: int, metrics: dict[str, Tensor]) -> None:
        """Have the guard refuse the next step of φ, or without φ of the learner, if a term is not finite."""
        optimizer = self.designer_optimizer or self.optimizer

        def watch(stream: Stream, batch: int, names: Sequence[str]) -> None:
            terms = {name: metrics[name] for name in names}
            self.guard.watch(optimizer, lambda bad: not_finite(step, bad, stream, batch), **terms)

        for task in self.feedback:
            taken = task.meta if task.guard or self.config.value.direction != "lookahead" else task.train
            watch(taken.stream, taken.count - 1, [f"loss_{task.kind}"])
        ahead = [name for name in metrics if name.startswith("lookahead")]
        if ahead and self.feedback:
            watch(self.feedback[0].train_stream, self.feedback[0].train.count - 1, ahead)
        watch(self.meta_stream, number, [name for name in ("value", "designer_gradient_norm") if name in metrics])

    def _diagnose(
        self, views: Views, temperature: float, parameters: dict[str, Tensor], gradients: list[Gradient]
    ) -> dict[str, Tensor]:
        """What the designer adds, on feedback it never uses, against the plain task and random masks on one batch."""
        config, backbone = self.config, self.student.backbone
        held = {task.kind: held_gradients(task, backbone, self.scope, self.device) for task in self.feedback}
        targets = [task for task in self.feedback if not task.guard]
        g_held = combine([mean_gradient(held[task.kind]) for task in targets], [task.weight for task in targets])
        noise = RandomMasks(config.designer.keep_ratio, backbone.patch_size, self.part)
        gain = value_gain(
            self.task(views, temperature),
            self.task(views, temperature, designed=False),
            self._task(views, temperature, noise, 0),  # what the objective draws as in the other two
            parameters,
            g_held,
        )
        metrics: dict[str, Tensor] = {}
        for name, found in gain._asdict().items():
            metrics |= {f"held_value_{name}": found.value, f"held_cosine_{name}": found.cosine}
        if self.direction is not None:
            metrics["held_survival"] = self._survival(views, temperature, parameters, g_held)
        metrics |= {f"split_half_{kind}": split_half(parts) for kind, parts in held.items() if len(parts) > 1}
        if self.designer is not None and self.designer_optimizer is not None:
            few = self._task(views.first(CHECK_IMAGES), temperature, self.designer, part=WHOLE)
            phi = list(self.designer.parameters())
            with alone():  # of several processes, the mean of their errors is logged
                error = engine_error(few, parameters, g_held, phi, self._engine())
            metrics["engine_error"] = torch.tensor(error, device=self.device)
        if len(gradients) > 1:
            metrics["task_cosine"] = task_alignment(gradients)[0, 1]
        return metrics

    def _survival(self, views: Views, temperature: float, parameters: dict[str, Tensor], g_held: Gradient) -> Tensor:
        """What is left on labels that taught nothing: the cosine of their gradient with the closed form's change of
        g_pre, over that of the direction that it follows."""
        assert self.direction is not None
        found = []
        for designed in (True, False):
            task = self.task(views, temperature, designed)
            with torch.no_grad():
                hidden = task.trunk()
            found.append(average(pre_gradient(task, hidden, parameters)))
        change = list(torch._foreach_sub(*found))
        return alignment(change, g_held) / alignment(change, self.direction).abs().clamp_min(1e-20)

    def state_before(self, step: int) -> dict[str, Any]:
        """`state_dict` as it was when the present learner step, `step`, began: to compute that step again."""
        number, state = self._before
        return state if number == step else self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "updates": self.updates,
            "engine": self.engine_name,
            "radius": self.radius,
            "direction": self.direction if self.config.follows else None,
            "clip_scale": self.clip_scale,
            "feedback": {task.kind: task.state_dict() for task in self.feedback},
            "guards": {kind: guard.state_dict() for kind, guard in self.guards.items()},
        }
        if self.noise is not None:
            state["noise"] = self.noise.state_dict()
        if self.designer is not None and self.config.designer.mask:
            state["designer"] = self.designer.state_dict()
        if self.designer_optimizer is not None:
            state["optimizer"] = self.designer_optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self.engine_name, self.radius = state["updates"], state["engine"], state["radius"]
        self.meta.seek(self.updates)
        direction = state["direction"]
        self.direction = None if direction is None else [part.to(self.device) for part in direction]
        self.clip_scale = state["clip_scale"].to(self.device)
        if self.noise is not None and "noise" in state:  # not in checkpoints of before it was kept
            self.noise.load_state_dict(state["noise"])
        for task in self.feedback:
            task.load_state_dict(state["feedback"][task.kind], self.device)
        for kind, guard in self.guards.items():
            guard.load_state_dict(state["guards"][kind])
        if self.designer is not None and self.config.designer.mask:
            self.designer.load_state_dict(state["designer"])
        if self.designer_optimizer is not None:
            self.designer_optimizer.load_state_dict(state["optimizer"])


def random_scaled(noise: Gradient, like: Gradient) -> Gradient:
    """`noise` with each tensor at the norm of its counterpart in `like`."""
    scales = torch._foreach_div(torch._foreach_norm(like), torch._foreach_norm(noise))
    return list(torch._foreach_mul(noise, scales))


def detached(state: State) -> State:
    """Without the learner's graph."""
    return state.detach() if isinstance(state, Tensor) else state._replace(tokens=state.tokens.detach())


def full(state: State) -> State:
    """In float32: differences do not survive bfloat16."""
    return state.float() if isinstance(state, Tensor) else state.full()


def not_finite(step: int, terms: str, stream: Stream, batch: int) -> str:
    """The error's text: which terms, and of which batch."""
    return (
        f"step {step}: {terms} not finite; nothing was applied. {stream.describe(batch)}. "
        "Lower optim.lr or raise teacher_temp"
    )


def engines(radius: float) -> dict[str, Engine]:
    """The engines that a mask generator can use, cheapest first."""
    return {
        "finite_difference": functools.partial(ENGINES["finite_difference"], radius=radius),
        "double_backward": ENGINES["double_backward"],
    }


def open_designer(config: Config, teacher: Learner) -> nn.Module | None:
    """What makes masks, if anything does; with `designer.start_from`, as another run left it.

    Raises:
        UserError: that run has no mask generator, or one of other sizes.
    """
    d, backbone = config.designer, teacher.backbone
    if d.control == "random_masks":
        return RandomMasks(d.keep_ratio, backbone.patch_size)
    if d.control == "attention":
        size, device = config.views.global_size, next(teacher.parameters()).device
        backbone.class_attention(torch.zeros(1, 3, size, size, device=device))  # refuse now what cannot be read
        return AttentionMasks(d.keep_ratio, backbone.class_attention)
    if d.mask is None:
        return None
    try:
        inspect.signature(DESIGNERS[d.mask]).bind(d.width, d.depth, d.stride, d.keep_ratio, **d.options)
    except TypeError as error:
        raise UserError(f"designer.options={d.options}: {d.mask} does not take them ({error})") from None
    designer = DESIGNERS[d.mask](d.width, d.depth, d.stride, d.keep_ratio, **d.options)
    designer = designer.to(next(teacher.parameters()).device)
    if d.start_from is not None:
        state = load_checkpoint(packaged(d.start_from)).get("steer", {}).get("designer")
        if state is None:
            raise UserError(f"designer.start_from={d.start_from}: this run has no mask generator")
        try:
            designer.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"designer.start_from={d.start_from}: of another architecture than designer.name={d.name}, width="
                f"{d.width}, depth={d.depth}, stride={d.stride}: {' '.join(str(error).split())[:200]}"
            ) from None
    return designer


def open_scope(config: Config, backbone: nn.Module, final_norm: str) -> Scope:
    """S of the student's backbone.

    Raises:
        UserError: it matches nothing, or more blocks than there are.
    """
    s, after = config.value.scope, (final_norm,)
    with refusing("value.scope"):
        return matching(backbone, s.patterns, after) if s.patterns else last_blocks(backbone, s.blocks, after)


def check_sizes(config: Config, patch_size: int) -> None:
    """Raises:
    UserError: views or feedback images that the designer or the backbone cannot be given.
    """
    d = config.designer
    if config.feedback.size % patch_size:
        near = max(config.feedback.size // patch_size, 1) * patch_size
        raise UserError(
            f"feedback.size={config.feedback.size}: not a multiple of the patch size {patch_size}; choose {near} or "
            f"{near + patch_size}"
        )
    sizes = [config.views.global_size] + [config.views.local_size] * (d.crops == "all")
    if d.mask and any(size % d.stride for size in sizes):
        raise UserError(f"designer.stride={d.stride}: must divide the views' sizes {sizes}")
