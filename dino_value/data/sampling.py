"""Batches as a pure function of (seed, stream, step).

No generator state has to be saved: the batch of step t, its order and its augmentation follow from three numbers,
whatever the number of workers, and a stopped run goes on by asking for step t.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import select
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_value.distributed.shards import WHOLE, BatchShard
from dino_value.errors import UserError
from dino_value.seeds import generator as generator
from dino_value.seeds import key as key


class Source(Protocol):
    """Items drawn by position; whatever is random about them follows from `key`. Of a `part`, they are its items of
    the batch as it is when drawn whole."""

    def __len__(self) -> int: ...

    def batch(self, positions: Sequence[int], key: int, part: BatchShard = WHOLE) -> tuple[Tensor, ...]: ...


class Stream:
    """An endless, shuffled, resumable stream of batches; each pass visits every item once (the remainder is dropped).

    Args:
        batch_size: of all processes together.
        part: this process's of every batch.

    Raises:
        UserError: fewer items than a batch.
    """

    def __init__(
        self, source: Source, batch_size: int, seed: int, name: str, workers: int = 0, part: BatchShard = WHOLE
    ) -> None:
        if len(source) < batch_size:
            raise UserError(
                f"{name}: {len(source)} images are fewer than a batch of {batch_size}; lower the batch size"
            )
        self.source, self.batch_size, self.seed, self.name, self.workers = source, batch_size, seed, name, workers
        self.part = part
        self.per_epoch = len(source) // batch_size

    def indices(self, step: int) -> Tensor:
        """Which items make batch `step`, [batch_size]."""
        epoch, position = divmod(step, self.per_epoch)
        order = torch.randperm(len(self.source), generator=generator(self.seed, self.name, epoch))
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def describe(self, step: int) -> str:
        """Batch `step` in words, for error messages."""
        batch = self.indices(step).tolist()
        return f"Batch {step} of {self.name}: images {batch[:8]}{' …' if len(batch) > 8 else ''} of the sorted list"

    def batch(self, step: int, part: BatchShard | None = None) -> tuple[Tensor, ...]:
        """Batch `step`, or this part of it, made here and now."""
        positions, drawn = self.indices(step).tolist(), key(self.seed, self.name, "batch", step)
        part = self.part if part is None else part
        return self.source.batch(positions, drawn) if part == WHOLE else self.source.batch(positions, drawn, part)

    def iterate(self, start: int, stop: int) -> Iterator[tuple[Tensor, ...]]:
        """Batches start … stop − 1, prepared ahead by `workers` processes where there are any."""
        if self.workers == 0 or start >= stop:
            yield from (self.batch(step) for step in range(start, stop))
            return
        # A fork copies locks and threads of the parent in whatever state they are in: fork from a clean server, which
        # has imported once what every worker needs.
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["dino_value.data.views", "dino_value.data.labelled", "torch.utils.data"])
        loader = DataLoader(
            _Steps(self),
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4,
            multiprocessing_context=processes,
            worker_init_fn=functools.partial(_follow, os.getpid()),
            generator=torch.Generator(),  # for the loader's base seed, which would be drawn from the global generator
        )
        # A signal to the whole group is the training process's to answer: workers, the server they are forked from and
        # the tracker of semaphores inherit the mask.
        before, others = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS), multiprocessing.active_children()
        try:
            resource_tracker.ensure_running()  # its start lifts the mask from SIGTERM and SIGINT
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _WORKERS.update(set(multiprocessing.active_children()).difference(others))
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_WORKERS: weakref.WeakSet[multiprocessing.process.BaseProcess] = weakref.WeakSet()


@atexit.register  # after multiprocessing's own, hence run before it: that one sends SIGTERM and waits
def _end() -> None:
    """End loader processes that an open iterator has kept; they do not hear SIGTERM."""
    for worker in _WORKERS:
        worker.kill()


def _follow(process: int, worker: int) -> None:
    """What a loader process begins with: it is deaf to signals, and ends with the training process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # a server that was there before us listens, and so its forks
    end_with(process)


def end_with(process: int) -> None:
    """Have this process end when `process` does, whatever ended it.

    torch's loaders watch their parent, which is the server here: it lives until the last of them has gone, and after a
    kill -9 they would wait for each other for ever.
    """

    def wait() -> None:
        with contextlib.suppress(ProcessLookupError):  # gone already
            select.select([os.pidfd_open(process)], [], [])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Cursor:
    """A place in a stream: `count` batches have been taken, and `count` is all that a checkpoint has to keep."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.count = stream, 0
        self._batches: Iterator[tuple[Tensor, ...]] | None = None

    def next(self) -> tuple[Tensor, ...]:
        """The next batch."""
        if self._batches is None:
            self._batches = self.stream.iterate(self.count, 2**31)
        self.count += 1
        return next(self._batches)

    def seek(self, count: int) -> None:
        """Go on as if `count` batches had been taken."""
        self.count, self._batches = count, None


class _Steps(Dataset["tuple[Tensor, ...] | UserError"]):
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __getitem__(self, step: int) -> tuple[Tensor, ...] | UserError:
        torch.set_num_threads(1)
        try:
            return self.stream.batch(step)
        except UserError as error:  # handed over as it is: the loader would wrap its message in a traceback
            return error
