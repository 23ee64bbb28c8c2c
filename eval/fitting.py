"""Training a head: AdamW with warm-up and cosine decay, stopped by a signal and resumed exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_value.data.labelled import LabelledSource
from dino_value.errors import Interrupted, UserError
from dino_value.eval.base import HeadOptions
from dino_value.eval.features import Items, Memory, shown, training_batches
from dino_value.runs.checkpoint import read_state, write_state
from dino_value.runs.process import stop_requests


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """`build()` under its own seed; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


Loss = Callable[[Tensor, Tensor], Tensor]
Groups = Sequence[tuple[Sequence[nn.Parameter], float]]


def train_head(
    extractor: Callable[[Tensor], Tensor],
    head: nn.Module,
    loss: Loss,
    source: LabelledSource,
    options: HeadOptions,
    *,
    dataset: Items | None = None,
    memory: Memory | None = None,
    groups: Groups | None = None,
    stage: str = "head",
) -> nn.Module:
    """`fit_head` on `training_batches`; with `options.resume`, from where the same command stopped.

    Args:
        memory: the features of `dataset`, where they are known already.
        stage: what the state of this training is called, among those of one evaluation.

    Raises:
        UserError: the head did not stay finite; a state of other settings.
        Interrupted: a signal came, and the state has been kept.
    """
    progress = Progress.of(options, stage, head, len(source))
    start = progress.step if progress else 0
    batches = training_batches(extractor, source, options, dataset, start, memory)
    if start < options.steps:
        return fit_head(head, loss, batches, options, groups, progress)
    assert progress is not None
    progress.load(head, None, None)
    return head.eval()


class Progress:
    """The state of one head training in one file: written now and then, and when a signal asks to stop."""

    SECONDS = 60.0

    def __init__(self, path: Path, key: str, resume: bool) -> None:
        self.path, self.key, self.step = path, key, 0
        self.saved = time.monotonic()
        self._state: dict[str, Any] = {}
        if resume and path.is_file():
            try:
                self._state = read_state(path)
                self.step = int(self._state["step"])
            except Exception as error:  # whatever the unpickler makes of a damaged file
                raise UserError(f"{path}: no state to resume from ({type(error).__name__}); delete it") from None
            if self._state["key"] != key:
                raise UserError(
                    f"{path}: was stopped under other settings, data or weights; "
                    "give those again, or leave --resume out to start anew"
                )

    @classmethod
    def of(cls, options: HeadOptions, stage: str, head: nn.Module, items: int) -> Progress | None:
        if options.state is None:
            return None
        # What may differ from one part of a training to the next.
        free = ("progress", "state", "resume", "device", "workers", "cache_gb", "save_images")
        settings = {name: value for name, value in asdict(options).items() if name not in free}
        shapes = [tuple(value.shape) for value in head.state_dict().values()]
        return cls(options.state / f".{stage}.pt", repr((settings, shapes, items)), options.resume)

    def load(self, head: nn.Module, optimizer: torch.optim.Optimizer | None, schedule: Any) -> None:
        head.load_state_dict(self._state["head"])
        if optimizer is not None:
            optimizer.load_state_dict(self._state["optimizer"])
            schedule.load_state_dict(self._state["schedule"])

    def save(self, step: int, head: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        state = {"step": step, "key": self.key, "head": head.state_dict()}
        write_state(self.path, {**state, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})
        self.saved = time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self.saved > self.SECONDS


def fit_head(
    head: nn.Module,
    loss: Loss,
    batches: Iterable[tuple[Tensor, Tensor]],
    options: HeadOptions,
    groups: Groups | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Train `head` on `batches` with AdamW, linear warm-up and cosine decay; returned in eval mode.

    Args:
        loss: (head output, target) to a scalar.
        batches: (features, target), those that are left of `options.steps`, on the head's device.
        groups: parameters and their peak learning rates, each clipped by itself; by default all at `options.lr`.
        progress: where the training stands, and is kept.

    Raises:
        UserError: the head, or every group of it, did not stay finite.
        Interrupted: a signal came, and `progress` has been kept.
    """
    groups = [(list(head.parameters()), options.lr)] if groups is None else groups
    optimizer = torch.optim.AdamW(
        [{"params": list(part), "lr": lr} for part, lr in groups], weight_decay=options.weight_decay
    )
    warmup = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warmup)
            * (0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / max(1, options.steps - warmup)))
        ),
    )
    step = progress.step if progress else 0
    batches = iter(batches)
    first = list(islice(batches, 1))  # features are computed here: until then a signal ends the process at once
    if progress and step:
        progress.load(head, optimizer, schedule)
    head.train()
    with _stops(progress) as stopping:
        for features, target in shown(chain(first, batches), "head", options.steps - step, options.progress):
            optimizer.zero_grad(set_to_none=True)
            loss(head(features), target).backward()
            for part, _ in groups:
                nn.utils.clip_grad_norm_(part, options.clip)
            optimizer.step()
            schedule.step()
            step += 1
            if progress and (progress.due or stopping()):
                progress.save(step, head, optimizer, schedule)
                if stopping():
                    raise Interrupted(f"{progress.path} holds {step} of {options.steps} head steps; add --resume")
    # Once, at the end: a non-finite step stays in the weights, and a check at each step would wait for the
    # device.
    buffers = list(head.buffers())
    if not any(all(bool(value.isfinite().all()) for value in (*part, *buffers)) for part, _ in groups):
        lrs = ", ".join(f"{lr:g}" for _, lr in groups)
        raise UserError(f"the head's weights became infinite or NaN: lower the learning rate ({lrs})")
    if progress:
        progress.save(step, head, optimizer, schedule)
    return head.eval()


@contextmanager
def _stops(progress: Progress | None) -> Iterator[Callable[[], bool]]:
    """Whether a signal asked to stop; where nothing can be kept, signals do what they always do."""
    if progress is None:
        yield lambda: False
        return
    with stop_requests() as stopping:
        yield stopping
