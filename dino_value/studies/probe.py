"""`dino-value probe RUN`: does V foretell, on feedback that taught nothing, what one step of the learner does?

From a run's last checkpoint many steps are tried, each on an unlabeled batch of its own and none of them kept. V is
measured with g_down of the meta images, the decrease on held-out ones; a step is taken by SGD and by the run's own
optimizer. Beside it: what fewer labelled images behind g_down, and other scores than V, would have foretold.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from dino_value.config import ADAM_BURN_IN, ScopeConfig, load_config, packaged
from dino_value.data import open_views
from dino_value.data.conventions import as_configured
from dino_value.data.sampling import Stream, generator
from dino_value.errors import UserError
from dino_value.models.backbone import Backbone, Hidden
from dino_value.objectives.interface import State
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.metrics import follow
from dino_value.training.agreement import direction_agreement, verdict
from dino_value.training.designer_update import DesignerUpdate, open_scope
from dino_value.training.feedback import FeedbackTask, batch_gradient
from dino_value.training.start import start_from
from dino_value.training.steps import make_views
from dino_value.training.trainer import Trainer
from dino_value.value import (
    Gradient,
    ProbeResult,
    Trial,
    combine,
    inner,
    mean_gradient,
    norm,
    optimizer_update,
    pearson,
    pre_gradient,
    probe,
    random_like,
    sgd_update,
)

LEAST = 8  # labelled images of a sample


@dataclass(frozen=True)
class Probed:
    """What is probed of a run; by default what it trained with.

    Args:
        checkpoint: which, of `RUN/checkpoints`; the newest.
        blocks: S is so many last blocks.
        batch: unlabeled images of a step.
        scale: the steps' length against those of the run's optimizer.
        tasks: the task that φ designs, and the plain one.
        samples: of fewer labelled images than the meta pool, at most so many of each number.
    """

    checkpoint: Path | None = None
    blocks: int | None = None
    batch: int | None = None
    scale: float = 1.0
    tasks: tuple[str, ...] = ("designed", "plain")
    samples: int = 4


def probe_run(
    folder: Path,
    trials: int = 32,
    held: int = 64,
    seed: int = 0,
    what: Probed = Probed(),
) -> dict[str, Any]:
    """Probe a run; the run itself is left as it is.

    Args:
        trials: one-step updates, each on an unlabeled batch of its own.
        held: labelled images per task, among those that neither fitted the heads nor gave g_down, on which the decrease
            is measured; the run's own feedback.*.held where that is more.
        seed: of the unlabeled batches.

    Returns:
        `step`, the checkpoint's, and `settings`; for each task (designed, plain) and each update (sgd, optimizer):
        Pearson's r, its 95 % bootstrap interval, the slope, the trials' columns; `by_images`, r with fewer labelled
        images behind g_down, one a sample; `by_score`, r of other scores of a step than the predicted decrease:
        V before clipping (`dot`), its `cosine`, V of a `random` direction.

    Raises:
        UserError: not a run with feedback, no labelled images left over, too few trials.
    """
    if trials < 3:
        raise UserError(f"--trials {trials}: a correlation needs 3 or more")
    if not 0 < what.scale < math.inf:
        raise UserError(f"--scale {what.scale:g}: it multiplies the steps, give a number above 0")
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{folder}: not a run folder (no config.yaml)")
    config = load_config(config_file, [f"out={folder}"])
    if not (config.designs and config.needs_labels):
        raise UserError(f"{folder}: a baseline run has no feedback; probe a run of method=value or method=random")
    for task in (config.feedback.seg, config.feedback.depth, config.feedback.classes):
        task.held = max(task.held, held)
    run = Trainer(config)
    run.load_state_dict(load_checkpoint(what.checkpoint or folder))
    assert run.steer is not None
    if run.steer.updates == 0:
        raise UserError(f"{folder}: stopped before the first designer update (value.burn_in); nothing to probe")
    if next(iter(run.optimizer.state.values()), None) is None:
        raise UserError(f"{folder}: stopped before its first step; nothing to probe")
    if what.blocks is not None:
        config.value.scope = ScopeConfig(blocks=what.blocks)
        backbone = run.student.backbone
        run.steer.scope = open_scope(config, backbone, backbone.final_norm)
    settings = {
        "blocks": None if config.value.scope.patterns else config.value.scope.blocks,
        "batch": what.batch or config.optim.batch_size,
        "scale": what.scale,
        "trials": trials,
        "held": {task.kind: len(task.held_indices) for task in run.steer.feedback},
    }
    return {"step": run.step, "settings": settings} | _Probe(run, run.steer, seed, what).trials(trials)


def probe_start(source: Path, overrides: Sequence[str], pairs: int) -> dict[str, Any]:
    """Whether the direction of a configuration is worth following (`agreement.py`), at the start that it names, or at
    the last checkpoint of a run folder.

    Returns:
        `direction_agreement`'s lists, and `verdict`.

    Raises:
        UserError: neither, or no direction that is followed.
    """
    file = source / "config.yaml"
    # Before a run there is no burn-in to be too short: `direction_agreement` says what adam needs.
    before = [] if file.is_file() else [f"value.burn_in={ADAM_BURN_IN}"]
    config = load_config(file if file.is_file() else source, ["out=unused", *before, *overrides])
    run = Trainer(config)
    if file.is_file():
        run.load_state_dict(load_checkpoint(source))
    elif config.start_from is not None:
        start_from(run, load_checkpoint(packaged(config.start_from)))
    if run.steer is None:
        raise UserError(f"method={config.method} follows no direction: choose method=value and designer.name=targets")
    run.loss.begin(run.step, run.teacher)
    found = direction_agreement(run.steer, run.teacher_temperature(), pairs)
    return found | {"verdict": verdict(found)}


class _Probe:
    """One θ, its g_down and held-out feedback, and any number of trial steps."""

    @as_configured
    def __init__(self, run: Trainer, steer: DesignerUpdate, seed: int, what: Probed) -> None:
        self.run, self.steer, self.what, config = run, steer, what, run.config
        run.student.eval()
        backbone = run.student.backbone
        named = dict(backbone.named_parameters())
        self.live = [named[name] for name in steer.scope.names]
        self.parameters = steer.scope.parameters(backbone)
        targets = [task for task in steer.feedback if not task.guard]
        self.g_down = self._g_down(targets, 0, None)
        pool = min(task.meta_stream.per_epoch * task.meta_stream.batch_size for task in targets)
        self.fewer = {
            count: [self._g_down(targets, first, count) for first in range(0, min(pool, what.samples * count), count)]
            for count in _sizes(config.feedback.batch_size, pool)
            if what.samples
        }
        self.random = random_like(self.g_down, generator(seed, "probe direction"))
        self.held = [_Held(run, steer, task) for task in targets]
        reading = (config.data.in_memory, config.data.skip_unreadable, config.data.field)
        views = open_views(config.data.unlabeled, config.views, *reading)
        images = {task.source.name(i) for task in steer.feedback for i in task.meta_indices + task.held_indices}
        size = what.batch or config.optim.batch_size
        self.stream = Stream(views.without(images), size, seed, "probe")

    def _g_down(self, targets: Sequence[FeedbackTask], first: int, count: int | None) -> Gradient:
        """Of `count` meta images of each task from `first` on, or of all."""
        gradients = [_meta_gradient(self.run, self.steer, task, first, count) for task in targets]
        return combine(gradients, [task.weight for task in targets])

    def downstream(self, parameters: dict[str, Tensor]) -> Tensor:
        """Σ α_j L_j on the held-out images, float64."""
        return torch.stack([held.weight * held.loss(parameters) for held in self.held]).sum()

    @torch.no_grad()
    def g_pre(self, number: int, designed: bool) -> tuple[Gradient, Tensor]:
        """The gradient of the learner's own task on batch `number`, scaled as the learner's clipping would; and the
        norm that it had."""
        run, steer = self.run, self.steer
        views = make_views(
            run.student.backbone, self.stream.batch(number), run.config.views, run.device, 0, "probe", number
        )
        with run.autocast():
            task = steer.task(views, run.teacher_temperature(), designed, seed=number)
            hidden = task.trunk()
            with torch.enable_grad():
                gradient = pre_gradient(task, hidden, self.parameters)
        length = norm(gradient)
        return list(torch._foreach_mul(gradient, (run.config.optim.clip / length).clamp_max(1))), length

    def trials(self, count: int) -> dict[str, Any]:
        before, base = self.downstream(_double(self.parameters)), _double(self.parameters)
        down = _doubled(self.g_down)
        found: dict[tuple[str, str], list[tuple[Trial, dict[Any, Any]]]] = {}
        for number in follow(range(count), "probing", count):
            for task in self.what.tasks:
                g_pre, length = self.g_pre(number, task == "designed")
                step = optimizer_update(self.run.optimizer, self.live, g_pre)
                updates = {"sgd": sgd_update(g_pre, float(norm(step) / norm(g_pre))), "optimizer": step}
                scores = self._scores(g_pre, length)
                for name, update in updates.items():
                    delta = _doubled(torch._foreach_mul(update, self.what.scale))
                    trial = probe(self.downstream, base, down, _doubled(g_pre), delta, before)
                    fewer = {n: [-inner(g, update) for g in samples] for n, samples in self.fewer.items()}
                    found.setdefault((task, name), []).append((trial, scores | fewer))
        return {f"{task}_{name}": _summary(rows) for (task, name), rows in found.items()}

    def _scores(self, g_pre: Gradient, length: Tensor) -> dict[str, Any]:
        """What else a designer could climb than the predicted decrease."""
        cosine = inner(self.g_down, g_pre) / (norm(self.g_down) * norm(g_pre))
        return {"dot": cosine * norm(self.g_down) * length, "cosine": cosine, "random": inner(self.random, g_pre)}


class _Held:
    """One task's loss on its held-out images as a function of θ_S, from hidden states computed once, in float64."""

    def __init__(self, run: Trainer, steer: DesignerUpdate, task: FeedbackTask) -> None:
        self.weight, self.start = task.weight, steer.scope.start
        self.backbone: Backbone = copy.deepcopy(run.student.backbone).double()
        self.task = copy.copy(task)
        self.task.head = copy.deepcopy(task.head).double().eval()
        self.batches: list[tuple[State, Tensor]] = []
        assert task.held is not None
        backbone = run.student.backbone
        for _ in range(task.held.stream.per_epoch):
            images, labels = (part.to(run.device) for part in task.held.next())
            views = backbone.normalise(images)
            if self.start is None:
                self.batches.append((views.double(), labels))
                continue
            with torch.no_grad():
                state: Hidden = backbone(views, stop=self.start)
            rope = None if state.rope is None else state.rope.double()
            self.batches.append((Hidden(state.tokens.double(), rope, state.grid), labels))

    def loss(self, parameters: dict[str, Tensor]) -> Tensor:
        """The mean over equal batches."""
        losses = []
        for state, labels in self.batches:
            features = functional_call(self.backbone, parameters, (state,), {"start": self.start or 0})
            labels = labels.double() if labels.is_floating_point() else labels
            losses.append(self.task.loss(features, labels))
        return torch.stack(losses).mean()


def _sizes(batch: int, pool: int) -> list[int]:
    """LEAST labelled images and more: divisors or multiples of a batch, and less than the pool."""
    sizes = [
        batch >> shift for shift in range(batch.bit_length()) if batch % (1 << shift) == 0 and batch >> shift >= LEAST
    ]
    sizes += [batch << shift for shift in range(1, 16)]
    return sorted(size for size in sizes if size < pool)


def _meta_gradient(run: Trainer, steer: DesignerUpdate, task: FeedbackTask, first: int, count: int | None) -> Gradient:
    """The mean over meta images `first` to `first + count`, or over the whole pool."""
    stream, size = task.meta_stream, task.meta_stream.batch_size
    last = stream.per_epoch * size if count is None else first + count

    def part(number: int) -> Gradient:
        images, labels = stream.batch(number)
        cut = slice(max(0, first - number * size), min(size, last - number * size))
        return batch_gradient(task, (images[cut], labels[cut]), run.student.backbone, steer.scope, run.device)[0]

    return mean_gradient(part(number) for number in range(first // size, -(-last // size)))


def _double(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in parameters.items()}


def _doubled(gradient: Sequence[Tensor]) -> Gradient:
    return [part.double() for part in gradient]


def _summary(rows: Sequence[tuple[Trial, dict[Any, Any]]]) -> dict[str, Any]:
    trials, others = zip(*rows, strict=True)
    result = ProbeResult.of(trials)

    def r(scores: Sequence[Tensor]) -> float:
        return pearson(torch.stack(list(scores)), result.realised)

    counts = [name for name in others[0] if isinstance(name, int)]
    samples = {n: [r(column) for column in zip(*(row[n] for row in others), strict=True)] for n in counts}
    names = [name for name in others[0] if isinstance(name, str)]
    return result.summary() | {
        "by_images": {str(n): values for n, values in samples.items()},
        "by_score": {name: r([row[name] for row in others]) for name in names},
    }
