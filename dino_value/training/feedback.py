"""Feedback: labelled pools, the heads fitted on one half of them, and the downstream gradient from the other."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dino_value.config import LABEL_KEYS, Config, TaskConfig
from dino_value.data.labelled import Kept, LabelledDataset, LabelledSource, Shuffled, TooFew, fewer, split_by_group
from dino_value.data.layouts import open_labelled
from dino_value.data.sampling import Cursor, Stream, key
from dino_value.data.splits import split_apart, split_record
from dino_value.distributed.group import gather, own_part, world
from dino_value.distributed.shards import WHOLE
from dino_value.errors import UserError
from dino_value.heads import LinearBNDepthHead, build_head
from dino_value.models.backbone import Backbone, Features
from dino_value.tasks.kinds import KINDS
from dino_value.training.optim import FiniteGuard
from dino_value.value import Gradient, GradientAverage, Refreshed, Scope, average, mean_gradient

PARTS = ("train", "meta", "held")
LAG_BATCHES, LAG_STEPS = 4, 20
LAG_FROM = 2**24  # the number of the first batch that a measurement draws: no cursor comes there


class FeedbackTask:
    """One kind of label: a head, its optimizer, and two streams that share no image and no group of images, and none
    with `evaluation`."""

    def __init__(
        self,
        kind: str,
        source: LabelledSource,
        settings: TaskConfig,
        config: Config,
        dim: int,
        device: torch.device,
        evaluation: LabelledSource | None = None,
    ) -> None:
        self.kind, self.weight, self.guard, self.source = kind, settings.weight, settings.guard, source
        self.label = KINDS[kind]
        counts = (settings.train, settings.meta, settings.held)
        with _said_of(kind, config, source, counts):
            parts, self.excluded = split_by_group(source, counts, config.seed), list[int]()
            if evaluation is not None:
                parts, self.excluded = split_apart(source, counts, config.seed, evaluation)
        self.train_indices, self.meta_indices, self.held_indices = parts
        self.seed = config.seed
        if config.method == "finetune":  # all labels that the other methods see
            self.train_indices = self.train_indices + self.meta_indices
        if config.feedback.shuffle:
            source = Shuffled(source, key(config.seed, "shuffle", kind))
        self.images, self.settings, self.config, self.device = source, settings, config, device
        self.held = Cursor(self._stream("held", self.held_indices)) if self.held_indices else None
        self._begin(dim)

    def _begin(self, dim: int) -> None:
        """A new head, and head-train and meta streams from the start: nothing is remembered of a gradient."""
        feedback = self.config.feedback
        self.meta_stream = self._stream("meta", self.meta_indices)
        self.meta = Cursor(self.meta_stream)
        self.refreshed = Refreshed(feedback.refresh) if feedback.refresh else None
        self.average = GradientAverage(feedback.ema) if feedback.ema else None
        self.train_stream = self._stream("train", self.train_indices)
        self.train = Cursor(self.train_stream)
        self.head = build_head(f"{self.kind}_{self.settings.head}", dim, self.source.num_classes)
        if isinstance(
            self.head, LinearBNDepthHead
        ):  # from the mean depth, which would take thousands of steps to learn
            depths = self.train_stream.batch(0, WHOLE)[1]
            if (depths > 0).any():
                self.head.start_at(float(depths[depths > 0].mean()))
        self.head.to(self.device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=feedback.lr, fused=True)

    def _stream(self, name: str, indices: list[int]) -> Stream:
        f = self.config.feedback
        data = LabelledDataset(self.images, indices, size=(f.size, f.size), flip=True)
        # All of a pool smaller than a batch is a batch, but for the heads, whose batch norm wants what it was told.
        batch = f.batch_size if name == "train" else min(f.batch_size, len(indices))
        workers = 0 if self.config.data.in_memory else min(1, self.config.data.workers)
        return Stream(data, batch, self.seed, f"feedback {self.kind} {name}", workers, own_part())

    def on(self, train: Sequence[int], meta: Sequence[int], dim: int, seed: int, shuffle: bool = False) -> FeedbackTask:
        """The same task on other images, with a head, an order and a memory of its own; for measurements."""
        other = copy.copy(self)
        other.train_indices, other.meta_indices, other.seed = list(train), list(meta), seed
        if shuffle:
            other.images = Shuffled(self.source, key(seed, "shuffle", self.kind))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "head", self.kind))
            other._begin(dim)
        return other

    def loss(self, features: Features, labels: Tensor, head: nn.Module | None = None) -> Tensor:
        """L_down, by the task's head or a copy of it: cross-entropy, or L1 in metres for depth."""
        return self.label.loss((head or self.head)(self.label.read(features)), labels)

    def splits(self) -> dict[str, Any]:
        """Which images the task uses for what; see `split_record`."""
        parts = {"train": self.train_indices, "meta": self.meta_indices, "held": self.held_indices}
        record = split_record(self.source, parts, self.seed, self.excluded)
        return record | {"skipped": getattr(self.source, "skipped", [])}

    def state_dict(self) -> dict[str, Any]:
        kept = {"refreshed": self.refreshed, "average": self.average}
        return {
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "train": self.train.count,
            "meta": self.meta.count,
            "held": self.held.count if self.held else 0,
            **{name: part.state_dict() for name, part in kept.items() if part is not None},
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.train.seek(state["train"])
        self.meta.seek(state["meta"])
        if self.held:
            self.held.seek(state["held"])
        if self.refreshed:
            self.refreshed.load_state_dict(state["refreshed"], device)
        if self.average:
            self.average.load_state_dict(state["average"])


def open_feedback(config: Config, dim: int, device: torch.device) -> list[FeedbackTask]:
    """A task for each labelled set that the configuration names; head weights follow from the run's seed.

    Raises:
        UserError: unreadable data, or fewer labelled images than asked for.
    """
    tasks = []
    for kind, path in config.labels.items():
        settings: TaskConfig = getattr(config.feedback, kind)
        if path is None or settings.weight == 0:
            continue
        with _said_of(kind, config):
            source = open_labelled(
                KINDS[kind].layout,
                path,
                "training",
                group_pattern=config.data.group_pattern if kind == "seg" else None,
                neighbours=1 if kind == "classes" else config.data.neighbours,
                skip_unreadable=config.data.skip_unreadable,
            )
            if kind == "classes" and source.num_classes < 2:
                raise UserError(
                    f"1 class, {source.class_names[0]}, with {len(source)} images: a single class says nothing of an "
                    f"image; give 2 or more folders in {path}/train, one a class"
                )
        source = Kept(source) if config.data.in_memory else source
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(config.seed, "head", kind))
            task = FeedbackTask(kind, source, settings, config, dim, device, evaluation_split(kind, path))
        tasks.append(task)
    if not any(not task.guard for task in tasks):
        raise UserError(
            f"no feedback left: give feedback.KIND.weight a value above 0, and guard=false (KIND: {', '.join(KINDS)})"
        )
    return tasks


@contextlib.contextmanager
def _said_of(
    kind: str, config: Config, source: LabelledSource | None = None, counts: Sequence[int] = ()
) -> Iterator[None]:
    """What is wrong with a labelled set, or with how many images of it are asked for, with the keys to mend it by."""
    place = f"{LABEL_KEYS[kind]}={config.labels[kind]}"
    try:
        yield
    except TooFew as error:
        assert source is not None

        def said(numbers: Sequence[int]) -> str:
            return ", ".join(f"feedback.{kind}.{part}={n}" for part, n in zip(PARTS, numbers, strict=True) if n)

        text, batch = f"{said(counts)}: {place}: {error}", config.feedback.batch_size
        for size in (batch, 2):  # the least that head-train images may be
            fit = fewer(source, counts, (size, 1, 1), config.seed, error.exclude)
            if fit is not None:
                smaller = f", feedback.batch_size={fit[0]}" if fit[0] < batch else ""
                raise UserError(f"{text}; {said(fit)}{smaller} would do") from None
        raise UserError(text) from None
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def evaluation_split(kind: str, path: str) -> LabelledSource | None:
    """The images that the run will be judged by; None where there are none yet, or the embedded ones, which differ."""
    if path == "scenes":
        return None
    try:
        return open_labelled(KINDS[kind].layout, path, "validation")
    except UserError:
        return None


class Seen(NamedTuple):
    """What the frozen backbone makes of a labelled batch: what the head reads of it is whole on every process."""

    features: Features
    labels: Tensor


@torch.no_grad()
def seen(task: FeedbackTask, backbone: Backbone, batch: tuple[Tensor, ...], device: torch.device) -> Seen:
    """Of this process's part of a head-train batch. Each process runs the backbone on its part."""
    images, labels = (part.to(device, non_blocking=True) for part in batch)
    features = backbone(backbone.normalise(never_empty(task, images, labels)[0]))
    size = task.train_stream.batch_size
    part = task.label.part
    read = gather(getattr(features, part)[: len(labels)].float(), size)
    return Seen(features._replace(**{part: read}), gather(labels, size))


def fit_head(task: FeedbackTask, backbone: Backbone, device: torch.device, guard: FiniteGuard) -> Tensor:
    """One step of the head on the next head-train batch, the backbone frozen; returns the loss, detached."""
    return step_head(task, seen(task, backbone, task.train.next(), device), guard)


def step_head(task: FeedbackTask, batch: Seen, guard: FiniteGuard) -> Tensor:
    """The head's own step, little work, every process takes on all of a batch: its batch norm sees the whole batch, and
    the heads stay equal."""
    number = task.train.count - 1
    task.head.train()
    with torch.autocast(batch.labels.device.type, enabled=False):
        loss = task.loss(*batch)
    task.optimizer.zero_grad()
    loss.backward()

    def message(bad: str) -> str:
        return f"{bad} not finite; nothing was applied. {task.train_stream.describe(number)}. Lower feedback.lr"

    guard.watch(task.optimizer, message, **{f"loss_{task.kind}": loss})
    guard.step(task.optimizer)
    return loss.detach()


def fit_heads(task: FeedbackTask, backbone: Backbone, device: torch.device, guard: FiniteGuard, steps: int) -> None:
    """`steps` steps of the head, each on a batch of its own; or with feedback.pool in turn on the features of so many
    batches, which the backbone sees once: as many steps as the head needs, at the price of the pool."""
    pool = task.config.feedback.pool
    kept: list[Seen] = []
    for step in range(steps):
        if not pool or step < pool:
            batch = seen(task, backbone, task.train.next(), device)
            kept += [batch] if pool else []
        step_head(task, kept[step % pool] if pool else batch, guard)


def head_lag(task: FeedbackTask, backbone: Backbone, device: torch.device, number: int) -> Tensor:
    """How much of its loss the head would still lose: 1 − after/before on a head-train batch, for LAG_STEPS steps of a
    copy on others; in eval mode. Changes nothing.

    Args:
        number: of the measurement: it draws batches of its own.
    """
    stream = task.train_stream
    first, *others = (
        seen(task, backbone, stream.batch(LAG_FROM + number * LAG_BATCHES + place), device)
        for place in range(LAG_BATCHES)
    )
    head = copy.deepcopy(task.head).requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=task.config.feedback.lr)
    with torch.autocast(first.labels.device.type, enabled=False):

        def measured() -> Tensor:
            with torch.no_grad():
                return task.loss(*first, head.eval())

        before = measured()
        head.train()
        for step in range(LAG_STEPS):
            optimizer.zero_grad()
            task.loss(*others[step % len(others)], head).backward()
            optimizer.step()
        return 1 - measured() / before


def downstream_gradient(
    task: FeedbackTask, backbone: Backbone, scope: Scope, device: torch.device
) -> tuple[Gradient, Tensor]:
    """g_down of one task on S, and the loss; both detached.

    From the next meta batch (the paper); or with feedback.refresh the mean over the whole meta pool, kept for that many
    calls; or with feedback.ema a moving average of either: the noise of one batch is most of what a designer would
    otherwise be taught (docs/results.md).
    """

    def mean(batches: int) -> Gradient:  # the loss travels as the last tensor, so that it is kept and averaged alike
        rows = (batch_gradient(task, task.meta.next(), backbone, scope, device) for _ in range(batches))
        return mean_gradient([*gradient, loss] for gradient, loss in rows)

    pool = task.meta_stream.per_epoch
    found = mean(1) if task.refreshed is None else task.refreshed.get(lambda: mean(pool))
    if task.average is not None:
        found = task.average.update(found)
    return found[:-1], found[-1]


def held_gradients(task: FeedbackTask, backbone: Backbone, scope: Scope, device: torch.device) -> list[Gradient]:
    """g_down of every batch of the held pool, which teaches neither heads nor designer: for measurements only."""
    assert task.held is not None
    count = task.held.stream.per_epoch
    return [batch_gradient(task, task.held.next(), backbone, scope, device)[0] for _ in range(count)]


def batch_gradient(
    task: FeedbackTask, batch: tuple[Tensor, ...], backbone: Backbone, scope: Scope, device: torch.device
) -> tuple[Gradient, Tensor]:
    """∇_{θ_S} L_down on one labelled batch, and the loss; both detached. The head is in inference mode.

    Of several processes each has its part, and all get the whole batch's: L_down is a mean over valid pixels.
    """
    images, labels = never_empty(task, *(part.to(device, non_blocking=True) for part in batch))
    views = backbone.normalise(images)
    task.head.eval()
    leaves = {name: value.requires_grad_() for name, value in scope.parameters(backbone).items()}
    with torch.no_grad():
        state = views if scope.start is None else backbone(views, stop=scope.start).full()
    with torch.autocast(device.type, enabled=False):
        features = functional_call(backbone, leaves, (state,), {"start": scope.start or 0})
        loss = task.loss(features, labels)
    found = [*torch.autograd.grad(loss, list(leaves.values())), loss.detach()]
    if world() > 1:
        valid = task.label.counts(labels).sum().to(loss.dtype)
        *found, count = average([*torch._foreach_mul(found, valid), valid])
        torch._foreach_div_(found, count.clamp_min(1 / world()))
    return found[:-1], found[-1]


def never_empty(task: FeedbackTask, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same, or where more processes share a batch than it has images one image without a valid label, which counts
    for nothing."""
    if len(images):
        return images, labels
    return images.new_zeros(1, *images.shape[1:]), labels.new_full((1, *labels.shape[1:]), task.label.blank)


class Labels:
    """The feedback tasks as the objective of a fine-tuning: heads and backbone follow the labels together."""

    def __init__(self, config: Config, dim: int, device: torch.device) -> None:
        self.device, self.warmup = device, config.feedback.warmup
        self.feedback = open_feedback(config, dim, device)

    def warm_up(self, backbone: Backbone, guard: FiniteGuard) -> None:
        """Fit the heads first, as the other methods do before they take a gradient from them."""
        for task in self.feedback:
            for _ in range(self.warmup):
                fit_head(task, backbone, self.device, guard)

    def losses(self, backbone: Backbone) -> dict[str, Tensor]:
        """L_down of each task on its next batch; the heads are in training mode."""
        found = {}
        for task in self.feedback:
            images, labels = (part.to(self.device, non_blocking=True) for part in task.train.next())
            features = backbone(backbone.normalise(images))
            task.head.train()
            with torch.autocast(self.device.type, enabled=False):
                found[f"loss_{task.kind}"] = task.loss(
                    Features(features.cls.float(), features.patches.float(), features.grid), labels
                )
        return found

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Σ α L_down."""
        return torch.stack([task.weight * losses[f"loss_{task.kind}"] for task in self.feedback]).sum()

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Of the heads."""
        return [task.optimizer for task in self.feedback]

    def state_dict(self) -> dict[str, Any]:
        return {task.kind: task.state_dict() for task in self.feedback}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for task in self.feedback:
            task.load_state_dict(state[task.kind], self.device)
