"""Continued pretraining of a language model, steered: Algorithm 1 with soft targets in place of views.

Feedback reaches θ by one path only: feedback → g_down → φ → targets → ∇_θ L_pre. The learner's own step is plain
cross-entropy against targets made under no_grad. `sft` is the exception that it is there to be: it trains on the
feedback too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_value.errors import UserError
from dino_value.language.config import SOFT, LanguageConfig
from dino_value.language.designer_update import DesignerUpdate, check_candidates, open_feedback, open_streams
from dino_value.language.evaluate import answer_loss
from dino_value.language.learner import Learner, evaluating, export_learner, load_model, load_tokenizer, load_trained
from dino_value.language.stream import Batch, ExampleSet, TextStream
from dino_value.language.targets import next_token, soft_cross_entropy
from dino_value.language.text import Encoder, read_examples
from dino_value.runs.checkpoint import latest_checkpoint, newest_whole, save_checkpoint, tidy
from dino_value.runs.folder import prepare_folder, record_environment
from dino_value.runs.loop import Concern, Log, interrupted, say_warnings
from dino_value.runs.metrics import Meters, MetricsFile, Reporter, environment
from dino_value.runs.process import Stops, bfloat16, choose_device, stop_requests
from dino_value.runs.trackers import Trackers, check_trackers
from dino_value.seeds import key
from dino_value.training.optim import FiniteGuard, cosine_schedule

SCHEDULE = 10_000  # ticks of a schedule over a run


def train(config: LanguageConfig, quiet: bool = False, override: bool = False) -> Path:
    """Train to `config.steps` or `config.budget.seconds`, going on from the newest whole checkpoint; the run folder.

    Args:
        override: go on with a run although its settings were others.

    Raises:
        UserError: bad data, model or settings; a loss that is not finite.
        Interrupted: a signal asked to stop; everything is saved.
    """
    with stop_requests(held=False) as stopping:
        return _train(config, quiet, override, stopping)


def _train(config: LanguageConfig, quiet: bool, override: bool, stopping: Stops) -> Path:
    folder = Path(config.out)
    trainer, warnings = open_run(config, folder, override)
    if trainer.done():
        return folder
    trackers = Trackers(config.track, folder, trainer.step, dataclasses.asdict(config))
    with (
        MetricsFile(folder, trainer.step, trackers) as metrics,
        Reporter(config.method, config.steps, trainer.step, quiet) as reporter,
    ):
        log = Log(metrics, reporter)
        log.resumed(trainer.step, warnings)
        checkpoints = Checkpoints(trainer, folder, stopping)
        concerns: list[Concern] = [Measurements(trainer, log), checkpoints, checkpoints.stop]
        while not trainer.done():
            trainer.learner_update()
            stopping.hold()  # there is a step to save
            for concern in concerns:
                concern(trainer.step)
    stopping.hold()  # a run that is done is not exported again
    if config.checkpoint.export:
        export_learner(trainer.learner.model, trainer.encoder.tokenizer, folder / "learner")
    return folder


def open_run(config: LanguageConfig, folder: Path, override: bool) -> tuple[Trainer, list[str]]:
    """The run of these settings, new or gone on with, its folder made; and what there is to be said.

    Raises:
        UserError: settings, data, the model or the folder's other settings do not allow it.
    """
    check_trackers(config.track)
    newest = latest_checkpoint(folder / "checkpoints")
    trainer = Trainer(config)
    changed = prepare_folder(config, folder, override)  # after all that may refuse: a mistake leaves no folder behind
    warnings = [f"other settings from here on: {'; '.join(changed)}"] if changed else []
    if newest is not None:
        state, damaged = newest_whole(folder / "checkpoints", "learner")
        trainer.load_state_dict(state)
        warnings += damaged
        with contextlib.suppress(OSError):  # the next checkpoint says what is wrong with the disk
            tidy(folder / "checkpoints", config.checkpoint.keep)
    say_warnings(warnings)
    if not trainer.done():
        found = environment(config.seed, trainer.device)
        record_environment(folder, found | ({"changed": changed} if changed else {}))
    return trainer, warnings


class Measurements:
    """One row of metrics.jsonl every `log_every` steps, the held-out loss every `held.every`; the bar, and what the
    designer's update has to say."""

    def __init__(self, trainer: Trainer, log: Log) -> None:
        self.trainer, self.log = trainer, log
        self.start = trainer.held_loss() if trainer.step == 0 and trainer.held is not None else None

    def __call__(self, step: int) -> None:
        trainer, config, last = self.trainer, self.trainer.config, self.trainer.done()
        if self.start is not None:  # where the curve against tokens begins
            self.log.write(0, {"tokens": 0, **self.start}, shown=False)
            self.start = None
        self.log.reporter.advance(step)
        while trainer.steer is not None and trainer.steer.notes:
            self.log.note(trainer.steer.notes.pop(0))
        while trainer.steer is not None and trainer.steer.warnings:
            self.log.warn(step, "lookahead", trainer.steer.warnings.pop(0))
        values: dict[str, float] = {}
        if trainer.held is not None and (step % config.held.every == 0 or last):
            values |= trainer.held_loss()
        if step % config.log_every == 0 or last:
            trainer.guard.check(wait=True)
            values |= trainer.meters.read() | trainer.pace()
        if values:
            self.log.write(step, {"tokens": trainer.tokens, **values})


class Checkpoints:
    """Saved every `checkpoint.every` steps, at the end, before the first of the designer's updates, and when asked to
    stop; `stop` then ends the run."""

    def __init__(self, trainer: Trainer, folder: Path, stopping: Stops) -> None:
        self.trainer, self.folder, self.stopping = trainer, folder, stopping
        self.asked = False

    def __call__(self, step: int) -> None:
        trainer, config = self.trainer, self.trainer.config
        self.asked = self.stopping()
        first_update = trainer.steer is not None and step == config.value.burn_in  # is next, and may take long
        if step % config.checkpoint.every == 0 or trainer.done() or self.asked or first_update:
            trainer.save(self.folder)
            self.stopping.release()

    def stop(self, step: int) -> None:
        """Raises:
        Interrupted: a signal has asked to stop; everything is saved.
        """
        if (self.asked or self.stopping()) and not self.trainer.done():  # it may have come during the save
            raise interrupted(step, self.trainer.config.steps)


class Trainer:
    """Everything that must survive a kill, and the learner's update."""

    def __init__(self, config: LanguageConfig) -> None:
        self.config, self.step, self.tokens, self.seconds = config, 0, 0, 0.0
        self.device = choose_device(config.device)
        bf16 = bfloat16(config.precision, self.device)
        self.autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16, bf16)
        tokenizer = load_tokenizer(config.learner)
        self.encoder = Encoder(tokenizer, config.data.answer_only)
        torch.manual_seed(key(config.seed, "weights"))
        self.learner = Learner(load_model(config.learner, self.device), config.value.scope)
        self.learner.train()
        check_fit(config, self.learner, tokenizer)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.learner, config.optim.weight_decay),
            lr=config.optim.lr,
            betas=(config.optim.betas[0], config.optim.betas[1]),
            fused=True,
        )
        sources, d = open_streams(config), config.data
        self.stream = TextStream(sources, d.weights, self.encoder, d.length, d.packing, d.buffer, config.seed, "stream")
        self.meters, self.guard = Meters(), FiniteGuard()
        self.steer: DesignerUpdate | None = None
        if config.method in SOFT:
            self.steer = DesignerUpdate(
                config, self.learner, self.optimizer, self.encoder, sources, self.guard, self.meters, self.autocast
            )
        self.feedback: list[ExampleSet] = []  # sft alone
        if config.method == "sft":
            self.feedback = list(open_feedback(config, self.encoder, self.learner.window).values())
        self.held: ExampleSet | None = None
        if config.held.file is not None:
            examples = read_examples(config.held.file, config.held.limit)
            window, size = self.learner.window, config.feedback.batch_size
            self.held = ExampleSet(examples, Encoder(tokenizer), window, size, config.seed, config.held.file)
        self._shown = (0, 0.0)  # tokens and seconds when the pace was last read

    def learner_update(self) -> None:
        """One step: accumulated micro-batches, each token of the whole step counting alike."""
        began = time.monotonic()
        o, steer = self.config.optim, self.steer
        if steer is not None:
            steer.update_if_due(self.step)  # before the first micro-batch: all of a step have the same targets
        whole = self.stream.batch(o.batch_size * o.accumulation)
        # Dropout is a function of the step, like the data, and the same in every arm.
        torch.manual_seed(key(self.config.seed, "step", self.step))
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for start in range(0, len(whole.ids), o.batch_size):
            batch = whole.rows(start, start + o.batch_size).to(self.device)
            total += self._backward(batch, max(1, len(whole.counted)), steered=True)
        for examples in self.feedback:
            batch = examples.batch(self.step).to(self.device)
            self.meters.add(feedback_loss=self._backward(batch, len(batch.counted), steered=False))
        norm = torch.nn.utils.clip_grad_norm_(self.learner.trained().values(), o.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr()
        step, names = self.step, "step {}: {} not finite; nothing was applied. Lower optim.lr"
        self.guard.watch(self.optimizer, lambda bad: names.format(step, bad), loss=total, gradient_norm=norm)
        self.guard.step(self.optimizer)
        if steer is not None:
            steer.clip_scale = (o.clip / norm.detach().clamp_min(1e-20)).clamp_max(1)
        self.meters.add(loss=total, gradient_norm=norm)
        self.step += 1
        self.tokens += whole.ids.numel()
        self.seconds += time.monotonic() - began

    def _backward(self, batch: Batch, tokens: int, steered: bool) -> Tensor:
        """Accumulate the gradient of a micro-batch's part of the loss; that part."""
        with self.autocast():
            found = self.learner.run(batch)
            labels = batch.labels.flatten()[batch.counted]
            rule = next_token(labels)
            if steered and self.steer is not None:
                rule = self.steer.rule(batch, found, self.step)
            head, final = self.learner.head, found.final.flatten(0, 1)[batch.counted]
            loss = soft_cross_entropy(final, head.weight, head.bias, rule, self.config.targets.chunk) / tokens
        loss.backward()
        return loss.detach()

    def held_loss(self) -> dict[str, float]:
        """Answer loss on the held-out examples; its time counts neither in the pace nor in the budget."""
        assert self.held is not None
        with evaluating(self.learner), self.autocast():
            return {"held_loss": answer_loss(self.learner, self.held).mean}

    def lr(self) -> float:
        """Linear warm-up, then half a cosine, over the steps or the seconds of the run."""
        o, seconds = self.config.optim, self.config.budget.seconds
        part = (self.step + 0.5) / self.config.steps if seconds is None else min(1.0, self.seconds / seconds)
        return cosine_schedule(round(part * SCHEDULE), SCHEDULE, o.lr, o.lr_end, round(o.warmup * SCHEDULE))

    def done(self) -> bool:
        seconds = self.config.budget.seconds
        return self.step >= self.config.steps or (seconds is not None and self.seconds >= seconds)

    def pace(self) -> dict[str, float]:
        """Tokens a second since the last reading, and the learning rate."""
        tokens, seconds = self.tokens - self._shown[0], self.seconds - self._shown[1]
        self._shown = (self.tokens, self.seconds)
        return {"lr": self.lr(), "tokens_per_second": tokens / max(1e-9, seconds), "seconds": seconds}

    def save(self, folder: Path) -> None:
        self.guard.check(wait=True)
        try:
            save_checkpoint(folder / "checkpoints", self.step, self.state_dict(), self.config.checkpoint.keep)
        except OSError as error:
            raise UserError(
                f"{folder}: step {self.step} could not be saved ({error.strerror or error}); "
                "free space or choose another out=; earlier checkpoints are whole"
            ) from None

    def state_dict(self) -> dict[str, Any]:
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "learner": {name: value.detach() for name, value in self.learner.trained().items()},
            "optimizer": self.optimizer.state_dict(),
            "stream": self.stream.state_dict(),
            "meters": self.meters.state_dict(),
        }
        if self.steer is not None:
            state["steer"] = self.steer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self._shown = (self.tokens, self.seconds)
        load_trained(self.learner, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.load_state_dict(state["stream"])
        self.meters.load_state_dict(state["meters"], self.device)
        if self.steer is not None:
            self.steer.load_state_dict(state["steer"])


def parameter_groups(learner: Learner, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which are decayed, and the rest; only what is trained."""
    trained = list(learner.trained().values())
    return [
        {"params": [value for value in trained if value.ndim > 1], "weight_decay": weight_decay},
        {"params": [value for value in trained if value.ndim <= 1], "weight_decay": 0.0},
    ]


def check_fit(config: LanguageConfig, learner: Learner, tokenizer: Any) -> None:
    """Raises:
    UserError: lengths beyond the model's window, a tokenizer of another vocabulary, or too many candidates.
    """
    lengths = {"data.length": config.data.length}
    if config.method in SOFT:
        lengths["value.length"] = config.value.length
    for name, length in lengths.items():
        if length > learner.window:
            raise UserError(f"{name}={length}: the model's window is {learner.window} tokens; choose at most that")
    if len(tokenizer) > len(learner.embedding):
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeds {len(learner.embedding)}: they do not "
            "belong together; give learner.tokenizer=DIR"
        )
    check_candidates(config, learner)
