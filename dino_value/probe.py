"""`dino-value probe RUN`: does V foretell, on feedback that taught nothing, what one step of the learner does?

From a run's last checkpoint many steps are tried, each on an unlabeled batch of its own and none of them kept. V is
measured with g_down of the meta images, the decrease on held-out ones; a step is taken by SGD and by the run's own
optimizer.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.func import functional_call

from dino_value.backbones import Backbone, Hidden
from dino_value.checkpoint import load_checkpoint
from dino_value.config import load_config
from dino_value.data import open_views
from dino_value.data.sampling import Stream
from dino_value.errors import UserError
from dino_value.feedback import FeedbackTask, batch_gradient
from dino_value.objectives.interface import State
from dino_value.steer import Steer
from dino_value.steps import make_views
from dino_value.train import Run
from dino_value.value import (
    Gradient,
    ProbeResult,
    bootstrap_interval,
    combine,
    mean_gradient,
    norm,
    optimizer_update,
    pearson,
    pre_gradient,
    probe,
    sgd_update,
    slope,
)


def probe_run(folder: Path, trials: int = 32, held: int = 64, seed: int = 0) -> dict[str, Any]:
    """Probe a run's last checkpoint; the run itself is left as it is.

    Args:
        trials: one-step updates, each on an unlabeled batch of its own.
        held: labelled images per task, among those that neither fitted the heads nor gave g_down, on which the decrease
            is measured; the run's own feedback.*.held where that is more.
        seed: of the unlabeled batches.

    Returns:
        For each task (designed, plain) and each update (sgd, optimizer): Pearson's r, its 95 % bootstrap interval, the
        slope, and the trials' columns.

    Raises:
        UserError: not a run with feedback, no labelled images left over, too few trials.
    """
    if trials < 3:
        raise UserError(f"--trials {trials}: a correlation needs 3 or more")
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{folder}: not a run folder (no config.yaml)")
    config = load_config(config_file, [f"out={folder}"])
    if not (config.designs and config.needs_labels):
        raise UserError(f"{folder}: a baseline run has no feedback; probe a run of method=value or method=random")
    for task in (config.feedback.seg, config.feedback.depth):
        task.held = max(task.held, held)
    run = Run(config)
    run.load_state_dict(load_checkpoint(folder))
    assert run.steer is not None
    if run.steer.updates == 0:
        raise UserError(f"{folder}: stopped before the first designer update (value.burn_in); nothing to probe")
    if next(iter(run.optimizer.state.values()), None) is None:
        raise UserError(f"{folder}: stopped before its first step; nothing to probe")
    return _Probe(run, run.steer, seed).trials(trials)


class _Probe:
    """One θ, its g_down and held-out feedback, and any number of trial steps."""

    def __init__(self, run: Run, steer: Steer, seed: int) -> None:
        self.run, self.steer, config = run, steer, run.config
        run.student.eval()
        backbone = run.student.backbone
        named = dict(backbone.named_parameters())
        self.live = [named[name] for name in steer.scope.names]
        self.parameters = steer.scope.parameters(backbone)
        targets = [task for task in steer.feedback if not task.guard]
        weights = [task.weight for task in targets]
        self.g_down = combine([_pool_gradient(run, steer, task) for task in targets], weights)
        self.held = [_Held(run, steer, task) for task in targets]
        views = open_views(config.data.unlabeled, config.views, config.data.in_memory, config.data.skip_unreadable)
        images = {task.source.name(i) for task in steer.feedback for i in task.meta_indices + task.held_indices}
        self.stream = Stream(views.without(images), config.optim.batch_size, seed, "probe")

    def downstream(self, parameters: dict[str, Tensor]) -> Tensor:
        """Σ α_j L_j on the held-out images, float64."""
        return torch.stack([held.weight * held.loss(parameters) for held in self.held]).sum()

    @torch.no_grad()
    def g_pre(self, number: int, designed: bool) -> Gradient:
        """The gradient of the learner's own task on batch `number`, scaled as the learner's clipping would."""
        run, steer = self.run, self.steer
        views = make_views(
            run.student.backbone, self.stream.batch(number), run.config.views, run.device, 0, "probe", number
        )
        with run.autocast():
            task = steer.task(views, run.teacher_temperature(), designed, seed=number)
            hidden = task.trunk()
            with torch.enable_grad():
                gradient = pre_gradient(task, hidden, self.parameters)
        return list(torch._foreach_mul(gradient, (run.config.optim.clip / norm(gradient)).clamp_max(1)))

    def trials(self, count: int) -> dict[str, Any]:
        before = self.downstream(_double(self.parameters))
        found: dict[tuple[str, str], list[Any]] = {}
        for number in track(range(count), "probing", console=Console(stderr=True)):
            for task in ("designed", "plain"):
                g_pre = self.g_pre(number, task == "designed")
                step = optimizer_update(self.run.optimizer, self.live, g_pre)
                updates = {"sgd": sgd_update(g_pre, float(norm(step) / norm(g_pre))), "optimizer": step}
                for name, update in updates.items():
                    columns = (
                        _double(dict(zip(self.parameters, part, strict=True))) for part in (self.g_down, g_pre, update)
                    )
                    down, pre, delta = (list(column.values()) for column in columns)
                    trial = probe(self.downstream, _double(self.parameters), down, pre, delta, before)
                    found.setdefault((task, name), []).append(trial)
        return {f"{task}_{name}": _summary(ProbeResult.of(rows)) for (task, name), rows in found.items()}


class _Held:
    """One task's loss on its held-out images as a function of θ_S, from hidden states computed once, in float64."""

    def __init__(self, run: Run, steer: Steer, task: FeedbackTask) -> None:
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
            losses.append(self.task.loss(features.patches, features.grid, labels))
        return torch.stack(losses).mean()


def _pool_gradient(run: Run, steer: Steer, task: FeedbackTask) -> Gradient:
    backbone = run.student.backbone
    batches = range(task.meta_stream.per_epoch)
    return mean_gradient(
        batch_gradient(task, task.meta_stream.batch(number), backbone, steer.scope, run.device)[0] for number in batches
    )


def _double(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in parameters.items()}


def _summary(result: ProbeResult) -> dict[str, Any]:
    low, high = bootstrap_interval(result.predicted, result.realised)
    return {
        "pearson": pearson(result.predicted, result.realised),
        "interval": [low, high],
        "slope": slope(result.predicted, result.realised),
        "mean_predicted": float(result.predicted.mean()),
        "mean_realised": float(result.realised.mean()),
        **{name: column.tolist() for name, column in result._asdict().items()},
    }


def print_result(found: dict[str, Any]) -> None:
    """A line for each task and update."""
    table = Table(title="one-step value probe: predicted and realised decrease of the held-out downstream loss")
    for heading in ("task, update", "Pearson r", "95 % interval", "slope", "mean predicted", "mean realised"):
        table.add_column(heading, justify="right" if heading != "task, update" else "left")
    for name, row in found.items():
        table.add_row(
            name.replace("_", ", "),
            f"{row['pearson']:.3f}",
            "[{:.3f}, {:.3f}]".format(*row["interval"]),
            f"{row['slope']:.2f}",
            f"{row['mean_predicted']:.3g}",
            f"{row['mean_realised']:.3g}",
        )
    Console().print(table)
