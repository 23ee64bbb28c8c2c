"""`dino-value language probe RUN FILE`: does V foretell, on examples that taught nothing, what one step does?

From a run's last checkpoint many steps are tried, each on an unlabeled batch of its own and none of them kept. V is
measured with g_down of the run's feedback, the decrease on FILE; a step is taken by SGD and by the run's own optimizer,
at its highest learning rate.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_value.errors import UserError
from dino_value.language.config import STEERED, load_language_config
from dino_value.language.designer_update import DesignerUpdate, TargetTask, constant
from dino_value.language.downstream import token_losses
from dino_value.language.learner import Cut, evaluating
from dino_value.language.stream import Batch, ExampleSet
from dino_value.language.text import Encoder, read_examples
from dino_value.language.trainer import Trainer
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.metrics import follow
from dino_value.value import (
    Gradient,
    ProbeResult,
    mean_gradient,
    norm,
    optimizer_update,
    pre_gradient,
    probe,
    sgd_update,
)


def probe_run(folder: Path, file: str, trials: int = 32, limit: int = 64, seed: int = 0) -> dict[str, Any]:
    """Probe a run's last checkpoint; the run itself is left as it is.

    Args:
        file: examples on which the decrease is measured; they must not be the run's feedback.
        trials: one-step updates, each on an unlabeled batch of its own.
        limit: examples of `file`.
        seed: of the unlabeled batches.

    Returns:
        For the designed and the plain task and each update (sgd, optimizer): Pearson's r, its 95 % bootstrap interval,
        the slope, and the trials' columns.

    Raises:
        UserError: not a run with feedback, feedback found in `file`, too few trials.
    """
    if trials < 3:
        raise UserError(f"--trials {trials}: a correlation needs 3 or more")
    run, steer = open_steered(folder)
    taught = {one for examples in steer.feedback.values() for one in examples.originals}
    held = [one for one in read_examples(file, limit) if one not in taught]
    if not held:
        raise UserError(f"{file}: holds nothing but the run's own feedback; give other examples")
    examples = ExampleSet(held, Encoder(run.encoder.tokenizer), run.learner.window, len(held), seed, file)
    return _Probe(run, steer, examples, seed).trials(trials)


def open_steered(folder: Path) -> tuple[Trainer, DesignerUpdate]:
    """A run with feedback, at its last checkpoint.

    Raises:
        UserError: no such run, or one that has not used its feedback.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder (no config.yaml)")
    config = load_language_config(folder / "config.yaml", [f"out={folder}"])
    if config.method not in STEERED:
        raise UserError(f"{folder}: method={config.method} has no g_down; choose a run of {', '.join(STEERED)}")
    run = Trainer(config)
    run.load_state_dict(load_checkpoint(folder, "learner"))
    assert run.steer is not None
    if not run.steer.updates:
        raise UserError(f"{folder}: stopped before the first designer update (value.burn_in); nothing to look at")
    return run, run.steer


def feedback_gradient(steer: DesignerUpdate, domain: str) -> Gradient:
    """g_down of a domain, over at most eight batches of its examples; or one lookahead, which takes several itself."""
    ahead = steer.config.value.direction == "lookahead"
    batches = range(1 if ahead else min(8, steer.feedback[domain].per_epoch))
    return mean_gradient(steer.downstream(domain, number)[0] for number in batches)


class _Probe:
    """One θ, its g_down, the held-out examples, and any number of trial steps."""

    def __init__(self, run: Trainer, steer: DesignerUpdate, held: ExampleSet, seed: int) -> None:
        self.run, self.steer, self.learner = run, steer, run.learner.eval()
        self.chunk = run.config.targets.chunk
        named = dict(self.learner.model.named_parameters())
        self.live = [named[name] for name in self.learner.scope.names]
        self.parameters = self.learner.parameters_in_scope()
        with constant(self.learner):
            self.g_down = {domain: feedback_gradient(steer, domain) for domain in steer.feedback}
        batch = held.rows(range(len(held))).to(run.device)
        # In float64: the decrease of one step is lost in float32's rounding.
        self.exact = copy.deepcopy(self.learner).double()
        with torch.no_grad():
            self.cut = _double(self.learner.run(batch).cut)
        self.counted, self.labels = batch.counted, batch.labels.flatten()[batch.counted, None]
        for group in run.optimizer.param_groups:  # the schedule has ended near zero
            group["lr"] = run.config.optim.lr
        for stream in steer.meta.values():  # batches that the run has not seen
            for order in stream.order.values():
                order.seed += 1 + seed

    def downstream(self, parameters: dict[str, Tensor]) -> Tensor:
        """The mean answer-token loss on the held-out examples, float64."""
        losses: Tensor = self.exact.at(parameters, token_losses, self.cut, self.counted, self.labels, self.chunk)
        return losses.mean()

    def g_pre(self, batch: Batch, designed: bool) -> Gradient:
        """The gradient of the learner's own task, scaled as its clipping would."""
        t, steer = self.run.config.targets, self.steer
        alpha = (t.alpha_max if t.alpha is None else t.alpha) if designed else 0.0
        task = TargetTask(self.learner, steer.designer if designed else None, batch, t.candidates, t.chunk, alpha)
        with torch.no_grad(), constant(self.learner):
            hidden = task.trunk()
            with torch.enable_grad():
                gradient = pre_gradient(task, hidden, self.parameters)
        return list(torch._foreach_mul(gradient, (self.run.config.optim.clip / norm(gradient)).clamp_max(1)))

    def trials(self, count: int) -> dict[str, Any]:
        rows: dict[str, list[Any]] = {}
        before, domains = self.downstream(_doubled(self.parameters)), list(self.g_down)
        for number in follow(range(count), "probing", count):
            domain = domains[number % len(domains)]
            batch = self.steer.meta[domain].batch(self.run.config.value.batch_size).to(self.run.device)
            for name, designed in (("designed", True), ("plain", False)):
                with evaluating(self.learner):
                    g_pre = self.g_pre(batch, designed)
                step = optimizer_update(self.run.optimizer, self.live, g_pre)
                updates = {"sgd": sgd_update(g_pre, float(norm(step) / norm(g_pre))), "optimizer": step}
                for kind, update in updates.items():
                    down, pre, delta = ([x.double() for x in part] for part in (self.g_down[domain], g_pre, update))
                    trial = probe(self.downstream, _doubled(self.parameters), down, pre, delta, before)
                    rows.setdefault(f"{name}_{kind}", []).append(trial)
        return {name: ProbeResult.of(found).summary() for name, found in rows.items()}


def _double(cut: Cut) -> Cut:
    def double(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() else value
        return tuple(map(double, value)) if isinstance(value, tuple) else value

    calls = tuple(
        (double(args), {name: double(value) for name, value in options.items()}) for args, options in cut.calls
    )
    return Cut(double(cut.hidden), calls)


def _doubled(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in parameters.items()}
