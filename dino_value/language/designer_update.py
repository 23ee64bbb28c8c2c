"""The designer's side: feedback → g_down → direction → φ, and what φ makes of the learner's targets.

L_pre is linear in the targets q, so V = Σ q v / T with v = −D = ∂_ε(−log p_{θ+εu}): one directional derivative
without a graph gives v for every candidate of every token (engine `linear`), and only the designer is differentiated.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dino_value.errors import UserError
from dino_value.language.answers import rewards
from dino_value.language.config import CLOSED_FORMS, RANDOM, SOFT, STEERED, LanguageConfig
from dino_value.language.designer import TokenDesigner
from dino_value.language.downstream import answer_gradient, full_precision, look_ahead, token_losses
from dino_value.language.generate import generate
from dino_value.language.learner import Cut, Learner, Pass, evaluating
from dino_value.language.stream import Batch, ExampleSet, TextStream, padded
from dino_value.language.targets import (
    TargetRule,
    candidates,
    next_token,
    self_distillation,
    soft_targets,
    uniform,
)
from dino_value.language.text import Encoder, Source, Tokens, open_source, read_examples
from dino_value.runs.metrics import Meters
from dino_value.seeds import generator, key
from dino_value.training.optim import FiniteGuard
from dino_value.value import (
    DIRECTIONS,
    ENGINES,
    AdamState,
    Direction,
    Engine,
    Gradient,
    Shadow,
    ValueStep,
    adam,
    check_engine,
    check_start,
    choose_engine,
    contrast,
    norm,
    pre_gradient,
    random_like,
    score_loss,
    term_values,
    tilt,
    value_step,
)

CHECK_ROWS = 2  # of a meta batch, for the engine's start-up check

ENGINE_CHOICES: dict[str, Engine] = {
    # Forward mode: exact, where a difference of losses in float32 would keep three digits.
    "linear": functools.partial(ENGINES["linear"], derivative="jvp"),
    "finite_difference": ENGINES["finite_difference"],
    "double_backward": ENGINES["double_backward"],
}


class TargetTask:
    """How L_pre depends on φ, through the targets, and on θ_S (a `LinearTask` of dino_value.value).

    hidden = (w, what enters the scope's first layer, candidate ids, counted positions), w = q/T [T K]. Without a
    designer the targets are `alpha` of the learner's own prediction, q₀ of the closed form.
    """

    def __init__(
        self, learner: Learner, designer: TokenDesigner | None, batch: Batch, count: int, chunk: int, alpha: float
    ) -> None:
        self.learner, self.designer, self.batch = learner, designer, batch
        self.count, self.chunk, self.alpha = count, chunk, alpha
        self._calls: Any = ()
        self._targets: Tensor | None = None
        self.away: Tensor | None = None  # mean of α·KL(r‖the learner's own prediction), with φ's graph
        self.cotangent: Tensor | None = None

    def trunk(self) -> tuple[Tensor, ...]:
        """The learner's states without a graph; w with φ's."""
        batch, embedding = self.batch, self.learner.embedding
        with torch.no_grad():
            found = self.learner.run(batch)
            final, labels = found.final.flatten(0, 1)[batch.counted], batch.labels.flatten()[batch.counted]
            self._calls = found.cut.calls
            pairs = zip(final.split(self.chunk), labels.split(self.chunk), strict=True)
            ids, own = map(torch.cat, zip(*(self._choose(*pair) for pair in pairs), strict=True))
        with full_precision(final):
            if self.designer is None:
                q = soft_targets(own.new_full((len(ids), 1), self.alpha), own)
            else:
                states = designed_states(self.designer, embedding, batch)
                parts = zip(*(part.split(self.chunk) for part in (states, ids, own)), strict=True)
                found_targets = [_targets(self.designer, embedding, *part) for part in parts]
                q, away = (torch.cat(part) for part in zip(*found_targets, strict=True))
                self.away = away.sum() / max(1, len(ids))
        self._targets, weights = q.detach(), q / max(1, len(ids))
        if weights.requires_grad:
            weights.register_hook(self._keep)
        return weights, found.cut.hidden, ids, batch.counted

    def _choose(self, final: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates of some tokens, and what the learner thinks of them: [t d], [t] -> [t K], [t K]."""
        logits = self.learner.head(final).float()
        ids = candidates(logits, labels, self.count)
        return ids, logits.gather(1, ids).softmax(1)

    def terms(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        """−log p of every candidate, [T K]."""
        _, entered, ids, counted = hidden
        losses: Tensor = self.learner.at(parameters, token_losses, Cut(entered, self._calls), counted, ids, self.chunk)
        return losses

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        """The soft cross-entropy, a mean over tokens."""
        return (hidden[0] * self.terms(hidden, parameters)).sum()

    def values_along(self, u: Gradient, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        """v = −D of every candidate, [T K], without φ."""
        with full_precision(hidden[0]):
            return term_values(lambda theta: self.terms(_float(hidden), theta), parameters, u, derivative="jvp")

    def _keep(self, gradient: Tensor) -> None:
        self.cotangent = -gradient.detach()  # v: what the engine sent to w

    def value_map(self) -> ValueMap:
        """v and q, once a value step has run this task."""
        assert self.cotangent is not None
        return ValueMap(self.cotangent, self.targets)

    @property
    def targets(self) -> Tensor:
        """q [T K], of the last `trunk`."""
        assert self._targets is not None
        return self._targets


def designed_states(designer: TokenDesigner, embedding: Tensor, batch: Batch) -> Tensor:
    """The designer's states at the counted positions, [T hidden]."""
    truth = F.embedding(batch.labels.clamp_min(0), embedding) * (batch.labels >= 0)[..., None]
    states: Tensor = designer(F.embedding(batch.ids, embedding), truth, batch.segments)
    return states.flatten(0, 1)[batch.counted]


def _targets(designer: TokenDesigner, embedding: Tensor, states: Tensor, ids: Tensor, own: Tensor) -> Any:
    """q [t K] and α·KL [t]; the candidates' embeddings [t K d] are not kept for the backward pass."""

    def compute(states: Tensor, ids: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        return designer.targets(states, F.embedding(ids, embedding), own)

    if not torch.is_grad_enabled():
        return compute(states, ids, own)
    return checkpoint(compute, states, ids, own, use_reentrant=False)


class ValueMap(NamedTuple):
    """What each candidate of each token is worth along u, and the best that targets can do with it."""

    values: Tensor
    """v = −D, [T K]: positive where more mass would lower the downstream loss."""
    targets: Tensor
    """q, [T K]."""

    @property
    def value(self) -> Tensor:
        """V of the targets, a mean over tokens."""
        return (self.targets * self.values).sum(1).mean()

    @property
    def plain(self) -> Tensor:
        """V of the one-hot targets."""
        return self.values[:, 0].mean()

    def oracle(self, alpha: float) -> Tensor:
        """V*: the best any targets with at most `alpha` off the true token could have. A vertex for each token."""
        return ((1 - alpha) * self.values[:, 0] + alpha * self.values.max(1).values).mean()

    def summary(self, alpha: float) -> dict[str, Tensor]:
        """For the metrics: along u; `regret` is never negative."""
        best = self.oracle(alpha)
        return {
            "value_gain": self.value - self.plain,
            "oracle_gain": best - self.plain,
            "regret": best - self.value,
            "alpha": 1 - self.targets[:, 0].mean(),
        }


class DesignerUpdate:
    """φ or its stand-in, the feedback that teaches it, and all of their state."""

    def __init__(
        self,
        config: LanguageConfig,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        encoder: Encoder,
        sources: Mapping[str, Source],
        guard: FiniteGuard,
        meters: Meters,
        autocast: Callable[[], torch.autocast],
    ) -> None:
        self.config, self.learner, self.optimizer, self.encoder = config, learner, optimizer, encoder
        self.guard, self.meters, self.autocast = guard, meters, autocast
        self.device = learner.embedding.device
        check_candidates(config, learner)
        self.designer: TokenDesigner | None = None
        self.designer_optimizer: torch.optim.Optimizer | None = None
        if config.method in ("value", "random"):
            d, width = config.designer, learner.embedding.shape[1]
            torch.manual_seed(key(config.seed, "designer"))
            self.designer = TokenDesigner(width, d.hidden, d.layers, d.heads, config.targets.alpha_max, d.gate, d.prior)
            self.designer.to(self.device)
            self.designer_optimizer = torch.optim.AdamW(
                self.designer.parameters(), lr=d.lr, weight_decay=0.0, fused=True
            )
        if config.method in CLOSED_FORMS and _head_in_scope(learner):
            raise UserError(f"method={config.method} needs a scope without the output head; choose value.scope.blocks")
        self.feedback: dict[str, ExampleSet] = {}
        self.meta: dict[str, TextStream] = {}
        if config.method in STEERED:
            self.feedback = open_feedback(config, encoder, learner.window)
            taught = frozenset(one for examples in self.feedback.values() for one in examples.originals)
            v, data = config.value, config.data
            for domain in self.feedback:
                paired = {domain: sources[domain]} if domain in sources else sources
                name = f"meta {domain}"
                self.meta[domain] = TextStream(
                    paired, data.weights, encoder, v.length, data.packing, data.buffer, config.seed, name, taught
                )
        self.updates = 0
        self.engine_name: str | None = None if config.value.engine == "auto" else config.value.engine
        self.direction: Gradient | None = None  # the last u, which the closed form follows between updates
        self.spread = torch.ones((), device=self.device)  # standard deviation of v on the last meta batch
        self.clip_scale = torch.ones((), device=self.device)  # what clipping left of the learner's last gradient
        self.diverged: list[str] = []  # domains of which that was said
        self.notes: list[str] = []  # for the log
        self.warnings: list[str] = []

    # What the learner is asked to predict

    @torch.no_grad()
    def rule(self, batch: Batch, found: Pass, step: int) -> TargetRule:
        """The targets of a micro-batch: one-hot during burn-in, and before a closed form has a direction."""
        config, t = self.config, self.config.targets
        labels = batch.labels.flatten()[batch.counted]
        alpha = t.alpha_max if t.alpha is None else t.alpha
        if step < config.value.burn_in:
            return next_token(labels)
        if config.method == "uniform":
            return uniform(labels, t.candidates, alpha)
        if config.method == "self_distillation":
            return self_distillation(labels, t.candidates, alpha)
        if self.designer is not None:
            return self._designed(batch, labels)
        return next_token(labels) if self.direction is None else self._tilted(batch, found, labels, alpha)

    def _designed(self, batch: Batch, labels: Tensor) -> TargetRule:
        designer, embedding, count = self.designer, self.learner.embedding, self.config.targets.candidates
        assert designer is not None
        with full_precision(embedding):
            states = designed_states(designer, embedding, batch)

        def rule(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
            ids = candidates(logits, labels[rows], count)
            with torch.no_grad(), full_precision(embedding):
                own = logits.gather(1, ids).softmax(1)
                return ids, _targets(designer, embedding, states[rows], ids, own)[0]

        return rule

    def _tilted(self, batch: Batch, found: Pass, labels: Tensor, alpha: float) -> TargetRule:
        """q ∝ q₀·exp(v/τ), τ in standard deviations of v."""
        t, head = self.config.targets, self.learner.head
        moved = self._tangent(found.cut).flatten(0, 1)[batch.counted]

        def rule(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
            ids = candidates(logits, labels[rows], t.candidates)
            with full_precision(moved):
                slope = F.linear(moved[rows], head.weight)  # ∂z/∂ε
                values = (logits.softmax(1) * slope).sum(1, keepdim=True) - slope.gather(1, ids)
                strength = logits.new_full((len(ids), 1), alpha)
                base = soft_targets(strength, logits.gather(1, ids).softmax(1))
                return ids, tilt(base, values, self.strength)

        return rule

    def _tangent(self, cut: Cut) -> Tensor:
        """∂_ε of the final hidden states along u, [B L d]."""
        assert self.direction is not None
        parameters = self.learner.parameters_in_scope()
        along = dict(zip(parameters, self.direction, strict=True))
        cut = Cut(cut.hidden.detach().float() if cut.hidden.is_floating_point() else cut.hidden, cut.calls)
        with evaluating(self.learner), full_precision(cut.hidden), sdpa_kernel(SDPBackend.MATH):
            moved: Tensor = torch.func.jvp(
                lambda theta: self.learner.at(theta, Learner.finish, cut), (parameters,), (along,)
            )[1]
        return moved

    # How φ learns

    def update_if_due(self, step: int) -> None:
        """The updates that come before learner step `step`: one every r steps after burn-in, more at its end."""
        v = self.config.value
        since = step - v.burn_in
        if self.feedback and since >= 0 and since % v.period == 0:
            for _ in range(1 + (v.warmup if since == 0 else 0)):
                with evaluating(self.learner), constant(self.learner), self.autocast(), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", r".*torch\.jit\.script")  # torch's own, in forward mode
                    self.update(step)

    def update(self, step: int) -> None:
        """One step of φ on −V: the mean over domains, each with its own unlabeled text (method section 4)."""
        torch.manual_seed(key(self.config.seed, "designer step", self.updates))
        parameters = self.learner.parameters_in_scope()
        if self.designer_optimizer is not None:
            self.designer_optimizer.zero_grad()
        directions: list[Gradient] = []
        for domain in self.feedback:
            g_down, metrics = self.downstream(domain, self.updates)
            task = self.task(self.meta[domain].batch(self.config.value.batch_size))
            direction = self.current_direction()
            if self.updates == 0:
                self._check(domain, task, parameters, g_down)
            if self.designer is None:
                directions.append(self._aim(task, parameters, g_down, direction, metrics))
            else:
                metrics |= self._teach(task, parameters, g_down, direction)
            self.meters.add(**metrics)
        if directions:
            self.direction = [torch.stack(parts).mean(0) for parts in zip(*directions, strict=True)]
        self._learn(step)
        self.updates += 1

    def _teach(
        self, task: TargetTask, parameters: dict[str, Tensor], g_down: Gradient, direction: Direction
    ) -> dict[str, Tensor]:
        """φ's gradient of −V, and of what holds its proposals near the learner's own prediction."""
        assert self.designer is not None
        hidden, weight, penalty = task.trunk(), self.config.designer.kl, None
        if weight and task.away is not None:
            penalty = weight * self.spread * task.away
        phi = list(self.designer.parameters())
        step = value_step(task, parameters, g_down, direction, self._engine(), phi, penalty, hidden)
        found = step._asdict()
        if task.cotangent is not None:
            values = task.value_map()
            self.spread = values.values.std().clamp_min(1e-20)
            found |= values.summary(self.config.targets.alpha_max)
        return found

    def _learn(self, step: int) -> None:
        if self.designer is None or self.designer_optimizer is None:
            return
        phi = list(self.designer.parameters())
        torch._foreach_div_([p.grad for p in phi if p.grad is not None], len(self.feedback))
        length = torch.nn.utils.clip_grad_norm_(phi, self.config.optim.clip)
        message = f"step {step}: the designer's gradient is not finite; nothing was applied. Lower designer.lr"
        self.guard.watch(self.designer_optimizer, lambda bad: message, designer_gradient_norm=length)
        self.guard.step(self.designer_optimizer)
        self.meters.add(designer_gradient_norm=length)

    def _aim(
        self,
        task: TargetTask,
        parameters: dict[str, Tensor],
        g_down: Gradient,
        direction: Direction,
        metrics: dict[str, Tensor],
    ) -> Gradient:
        """The closed form's u, and v on the meta batch."""
        hidden = task.trunk()
        g_pre = pre_gradient(task, hidden, parameters)
        u = direction(g_down, g_pre)
        values = task.values_along(u, hidden, parameters)
        self.spread = (values - (values * hidden[0]).sum(1, keepdim=True) * len(values)).std().clamp_min(1e-20)
        q = tilt(hidden[0] * len(values), values, self.strength)
        metrics |= ValueStep.of(g_down, g_pre)._asdict() | ValueMap(values, q).summary(1.0)
        return u

    def task(self, batch: Batch) -> TargetTask:
        """The learner's task on a batch of unlabeled text."""
        t = self.config.targets
        alpha = t.alpha_max if t.alpha is None else t.alpha
        return TargetTask(self.learner, self.designer, batch.to(self.device), t.candidates, t.chunk, alpha)

    def downstream(self, domain: str, number: int) -> tuple[Gradient, dict[str, Tensor]]:
        """g_down of feedback batch `number`, or u of lookahead `number`; in the random arm a Gaussian of its norms."""
        config, examples = self.config, self.feedback[domain]
        if config.feedback.kind == "reward":
            gradient, found = self._reward_gradient(examples, number)
        elif config.value.direction == "lookahead":
            gradient, found = self._look_ahead(domain, number)
        else:
            gradient, loss = answer_gradient(self.learner, examples.batch(number).to(self.device), config.targets.chunk)
            found = {"feedback_loss": loss}
        if config.method in RANDOM:
            gradient = random_like(gradient, generator(config.seed, "random direction", domain, number))
        return gradient, found

    def _look_ahead(self, domain: str, number: int) -> tuple[Gradient, dict[str, Tensor]]:
        """u = θ_S − θ_S′ with θ_S′ trained on the next feedback batches. With `contrast` less the same where each
        prompt among those batches has the answer of another one among them, drawn anew for each lookahead.

        Raises:
            UserError: it is not finite.
        """
        settings, examples = self.config.value.lookahead, self.feedback[domain]
        lr, chunk = self.config.optim.lr if settings.lr is None else settings.lr, self.config.targets.chunk
        count = min(settings.batches or settings.steps, settings.steps)
        numbers = range(number * count, (number + 1) * count)

        def shadow(examples: ExampleSet) -> Shadow:
            batches = [examples.batch(index).to(self.device) for index in numbers]
            with refusing("value.lookahead"):
                return look_ahead(self.learner, batches, settings.steps, lr, settings.optimizer, chunk)

        u, before, after = shadow(examples)
        if settings.contrast:
            among = [index for batch in numbers for index in examples.indices(batch)]
            drawn = generator(self.config.seed, "contrast", domain, number)
            u = contrast(u, shadow(examples.exchanged(among, drawn)).u)
        length = norm(u)
        self._judge(domain, *torch.stack([before, after, length]).tolist())
        found = {"feedback_loss": before, "lookahead_before": before, "lookahead_after": after}
        return u, found | {"lookahead_norm": length}

    def _judge(self, domain: str, before: float, after: float, length: float) -> None:
        """Refuse a lookahead that is not finite; say once of a domain that one has diverged."""
        steps = self.config.value.lookahead.steps
        if not all(map(math.isfinite, (before, after, length))):
            raise UserError(
                f"value.lookahead: on feedback.{domain} the answer loss is not finite within {steps} steps; nothing "
                "was applied. Lower value.lookahead.lr"
            )
        if after > before and domain not in self.diverged:
            self.diverged.append(domain)
            self.warnings.append(
                f"value.lookahead: on feedback.{domain} the answer loss rose from {before:.4g} to {after:.4g} in "
                f"{steps} steps; lower value.lookahead.lr (said once; see lookahead_before and lookahead_after)"
            )

    def _reward_gradient(self, examples: ExampleSet, number: int) -> tuple[Gradient, dict[str, Tensor]]:
        """−∇_{θ_S} E[R] by the score function: sampled answers, scored by math-verify (method section 2)."""
        f, encoder, learner = self.config.feedback, self.encoder, self.learner
        chosen = [examples.examples[index] for index in examples.indices(number)]
        prompts, seed = [one.prompt for one in chosen], key(self.config.seed, "samples", number)
        with torch.autocast(self.device.type, enabled=False):
            sampled = generate(
                learner.model, encoder, prompts, f.new_tokens, f.samples, 1.0, len(prompts), seed % 2**63
            )
        scores = torch.tensor(
            rewards([[one.text for one in row] for row in sampled], [one.answer for one in chosen]), device=self.device
        )
        rows = []
        for prompt, row in zip(prompts, sampled, strict=True):
            given = encoder.prompt(prompt)
            rows += [Tokens(given + one.tokens, [False] * len(given) + [True] * len(one.tokens)) for one in row]
        batch = padded(rows, encoder.end).to(self.device)
        owner = batch.counted // batch.ids.shape[1]

        def loss(losses: Tensor) -> Tensor:
            whole = losses.new_zeros(len(rows)).index_add(0, owner, -losses)
            return score_loss(whole.view(scores.shape), scores)

        gradient, _ = answer_gradient(learner, batch, self.config.targets.chunk, loss)
        return gradient, {"reward": scores.mean()}

    @property
    def strength(self) -> Tensor:
        """s = 1/τ of the closed form, whose q ∝ q₀·exp(s·v) is of all targets the one of highest Σ q v − KL(q‖q₀)/s."""
        return 1 / (self.config.targets.temperature * self.spread)

    def current_direction(self) -> Direction:
        name = self.config.value.direction
        if name != "adam":
            return DIRECTIONS["dot" if name == "lookahead" else name]
        named = dict(self.learner.model.named_parameters())
        return adam(AdamState.of(self.optimizer, [named[name] for name in self.learner.scope.names]), self.clip_scale)

    def _engine(self) -> Engine:
        assert self.engine_name is not None
        return ENGINE_CHOICES[self.engine_name]

    def _check(self, domain: str, task: TargetTask, parameters: dict[str, Tensor], g_down: Gradient) -> None:
        """Before the first update: is g_down usable, and the engine exact enough on a few rows?"""
        if self.config.feedback.kind == "loss":  # rewards that are all alike give zero, and that is right
            with refusing(f"feedback.{domain}"):
                check_start(g_down)
        if self.designer is None or self.config.targets.alpha_max == 0 or not any(map(torch.any, g_down)):
            self.engine_name = self.engine_name or "linear"
            return
        few = self.task(task.batch.to(torch.device("cpu")).rows(0, CHECK_ROWS))
        phi, bound = list(self.designer.parameters()), self.config.value.tolerance
        if not len(few.batch.counted):
            self.engine_name = self.engine_name or "linear"
            return
        with refusing("value.engine"):
            if self.engine_name is None:
                self.engine_name, error = choose_engine(few, parameters, g_down, phi, ENGINE_CHOICES, bound)
            else:
                error = check_engine(few, parameters, g_down, phi, self._engine(), bound)
        self.notes.append(f"engine {self.engine_name}: relative error {error:.1e} on {len(few.batch.ids)} rows")

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "updates": self.updates,
            "engine": self.engine_name,
            "direction": self.direction,
            "spread": self.spread,
            "clip_scale": self.clip_scale,
            "diverged": list(self.diverged),
            "meta": {domain: stream.state_dict() for domain, stream in self.meta.items()},
        }
        if self.designer is not None and self.designer_optimizer is not None:
            state["designer"] = self.designer.state_dict()
            state["optimizer"] = self.designer_optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates, self.engine_name = state["updates"], state["engine"]
        self.diverged = list(state.get("diverged", []))  # older checkpoints have none
        direction = state["direction"]
        self.direction = None if direction is None else [part.to(self.device) for part in direction]
        self.spread, self.clip_scale = state["spread"].to(self.device), state["clip_scale"].to(self.device)
        for domain, stream in self.meta.items():
            stream.load_state_dict(state["meta"][domain])
        if self.designer is not None and self.designer_optimizer is not None:
            self.designer.load_state_dict(state["designer"])
            self.designer_optimizer.load_state_dict(state["optimizer"])


def open_feedback(config: LanguageConfig, encoder: Encoder, window: int) -> dict[str, ExampleSet]:
    """The feedback examples of each domain, with each other's answers where `feedback.shuffle` is set.

    Raises:
        UserError: unreadable, too long, found in an evaluation file too, or too few to exchange answers.
    """
    f, found = config.feedback, {}
    answers = Encoder(encoder.tokenizer)
    for domain, path in f.files.items():
        examples = read_examples(path, f.limit)
        if f.test:
            from dino_value.language.decontaminate import refuse_overlap

            refuse_overlap(path, f.test, f.limit)
        length = min(f.length, window)
        found[domain] = ExampleSet(examples, answers, length, f.batch_size, config.seed, path, f.cut)
        if f.shuffle:
            everyone = range(len(examples))
            found[domain] = found[domain].exchanged(everyone, generator(config.seed, "shuffled answers", domain))
    return found


def open_streams(config: LanguageConfig) -> dict[str, Source]:
    """The unlabeled text of each domain."""
    return {domain: open_source(path) for domain, path in config.data.stream.items()}


def check_candidates(config: LanguageConfig, learner: Learner) -> None:
    """Raises:
    UserError: more candidates than tokens.
    """
    count = config.targets.candidates
    if config.method in SOFT and count > learner.vocabulary:
        raise UserError(
            f"targets.candidates={count}: the model's vocabulary has {learner.vocabulary} tokens; choose fewer"
        )


def _head_in_scope(learner: Learner) -> bool:
    head = learner.head.weight
    named = dict(learner.model.named_parameters())
    return any(named[name] is head for name in learner.scope.names)


def _float(hidden: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(state.detach().float() if state.is_floating_point() else state for state in hidden)


@contextlib.contextmanager
def constant(module: nn.Module) -> Iterator[None]:
    """Parameters without gradients, so that no graph reaches them."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def refusing(name: str) -> Iterator[None]:
    """The core's errors as the user's, with the part of the configuration that they are about."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
