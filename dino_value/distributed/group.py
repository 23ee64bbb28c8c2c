"""Several processes that train as one: how they meet, agree and part.

`torchrun`, submitit or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Each process
has its part of every batch (`shards.py`); what is random is drawn for the whole batch, sums go over all processes, and
process 0 writes. So any number of processes takes the steps of one, up to rounding. Alone, everything here is the
identity.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.nn.parallel import DistributedDataParallel

from dino_value.distributed.shards import WHOLE, BatchShard
from dino_value.errors import EXIT_LOST, EXIT_RESUMABLE, EXIT_USER, Interrupted, ProcessLost, UserError

if TYPE_CHECKING:
    from dino_value.config import Config

Result = TypeVar("Result")

BEAT = 1.0  # seconds between signs of life
SILENCE = 30.0  # seconds without one after which a process counts as lost: long pauses of a file system are shorter
GRACE = 3.0  # seconds that a process has to end by itself once another is known to be lost
_MEETINGS = itertools.count()


# Who is here


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return dist.get_rank() if world() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def own_part() -> BatchShard:
    """Of a batch, what is this process's."""
    return BatchShard(rank(), world()) if world() > 1 else WHOLE


def own_device(name: str) -> str:
    """The device for `name`: of several processes on a machine each has a GPU of its own, by LOCAL_RANK."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" and world() > 1 else name


# What is agreed


def from_first(function: Callable[[], Result]) -> Result:
    """What `function` gives on process 0, or the UserError that it raises there, on all of them."""
    if world() == 1:
        return function()
    said: list[Any] = [None, None]
    if is_first():
        try:
            said[0] = function()
        except UserError as error:
            said[1] = error
    dist.broadcast_object_list(said)
    if said[1] is not None:
        raise said[1]
    result: Result = said[0]
    return result


def anywhere(flag: bool) -> bool:
    """Whether it is true on any process; waits for the other hosts, not for a device."""
    if world() == 1:
        return flag
    found = torch.tensor(int(flag))
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def gather(rows: Tensor, total: int) -> Tensor:
    """Own rows, `own_part().of(total)`, to all [total …]; parts may be unequal. Passes no gradient."""
    if world() == 1:
        return rows
    sizes = [part.stop - part.start for part in (BatchShard(other, world()).of(total) for other in range(world()))]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def check_batches(config: Config) -> None:
    """Raises:
    UserError: a batch that the processes cannot share equally.
    """
    if world() == 1:
        return
    if config.method == "finetune":
        raise UserError(f"method=finetune runs in one process, here are {world()}")
    sizes = {"optim.batch_size": (config.optim.batch_size, world() * config.optim.accumulate)}
    if config.method != "baseline":
        sizes["value.batch_size"] = (config.value.batch_size, world())
    for key, (size, parts) in sizes.items():
        if size % parts:
            below = size // parts * parts
            near = f"{below} or {below + parts}" if below else str(parts)
            each = f" times optim.accumulate={config.optim.accumulate}" if parts != world() else ""
            raise UserError(f"{key}={size} is the batch of all {world()} processes{each}: choose a multiple, {near}")


# One backward pass for all


class Whole(nn.Module):
    """A learner behind one forward, whatever is done with it: where data parallelism has its hooks."""

    def __init__(self, learner: nn.Module) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(learner, *arguments)."""
        return function(self.learner, *arguments)


def shared(learner: nn.Module) -> nn.Module:
    """`Whole(learner)`, whose backward pass leaves the mean gradient over processes, reduced while it runs."""
    whole = Whole(learner)
    if world() == 1:
        return whole
    # No buffer of a learner changes; the option that says so has two names, the second deprecated.
    known = inspect.signature(DistributedDataParallel).parameters
    name = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in known)
    constant: dict[str, Any] = {name: False}
    return DistributedDataParallel(whole, gradient_as_bucket_view=True, **constant)


def reduced(whole: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Around one forward and backward pass of several: gradients are reduced in the `last`."""
    if last or not isinstance(whole, DistributedDataParallel):
        return contextlib.nullcontext()
    return whole.no_sync()


# How they meet and part


@contextlib.contextmanager
def joined(config: Config) -> Iterator[None]:
    """Be one of the processes that the launcher started; alone, and inside of another's process group, do nothing.

    Raises:
        UserError: not all of them came in time, they have different settings, or a batch is not theirs to share.
        ProcessLost: another has ended or gone silent.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or world() > 1:
        check_batches(config)
        yield
        return
    meeting = Meeting(count, config.distributed.timeout)
    meeting.watch.start()
    try:
        meeting.compare(config)
        cuda = config.device != "cpu" and torch.cuda.is_available()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=PrefixStore("group", meeting.store),
            rank=meeting.rank,
            world_size=count,
            timeout=timedelta(seconds=config.distributed.timeout),
        )
        check_batches(config)
        yield
    except Interrupted as stopped:  # agreed among all
        meeting.part()
        meeting.once(stopped, EXIT_RESUMABLE)
    except BaseException as error:
        with contextlib.suppress(ValueError):  # torchrun now ends the group; there is something to be said before
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        lost = meeting.lost() if isinstance(error, RuntimeError) else None
        if lost is None:
            meeting.fail(error)
            meeting.once(error, EXIT_USER)
        meeting.once(ProcessLost(f"{lost}; the same command goes on from the last checkpoint"), EXIT_LOST)
    else:
        meeting.part()


class Meeting:
    """The store that all processes know: roll call, settings, signs of life, last words.

    Raises:
        UserError: the launcher left out a variable, or somebody did not come within `timeout` seconds.
    """

    def __init__(self, count: int, timeout: float) -> None:
        self.count, self.host = count, socket.gethostname()
        try:
            self.rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
            address = os.environ["MASTER_ADDR"]
        except (KeyError, ValueError) as error:
            raise UserError(
                f"WORLD_SIZE={count}, but {error}: start the processes with torchrun or the launcher, or unset it"
            ) from None
        # torchrun has a store of its own, which outlives its workers.
        self.keeps = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        # What was said in another attempt, or at an earlier meeting of these processes, counts no more.
        prefix = f"dino-value/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_MEETINGS)}"

        def connect(master: bool) -> Store:
            limit = timedelta(seconds=timeout)
            store = TCPStore(address, port, count, master, timeout=limit, wait_for_workers=False)
            return PrefixStore(prefix, store)

        try:
            self.store = connect(self.keeps)
            self.watch = Watch(connect(False), self.rank, count, self.host)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"process {self.rank} of {count} ({self.host}): no store at {address}:{port} within {timeout:g} s "
                f"({' '.join(str(error).split())[:160]}); was process 0 started there, and is the port free?"
            ) from None
        self.timeout = timeout
        self.store.set(f"host/{self.rank}", self.host)
        self._rule("roll", self._missing)

    def _rule(self, name: str, find: Callable[[], str]) -> None:
        """What process 0 finds wrong, all refuse: each asks for one answer, not for everyone's."""
        try:
            if self.rank == 0:
                self.store.set(name, find() or " ")
            self.store.wait([name], timedelta(seconds=2 * self.timeout + 10))
            said = self.store.get(name).decode().strip()
        except RuntimeError:
            raise ProcessLost(f"process 0 of {self.count} ended before all had met; look at its log") from None
        if said:
            if self.keeps:
                time.sleep(GRACE)  # until the others have read it
            raise UserError(said)

    def _missing(self) -> str:
        away, until = list(range(self.count)), time.monotonic() + self.timeout
        while time.monotonic() < until:
            away = [other for other in away if not self.store.check([f"host/{other}"])]
            if not away:
                return ""
            time.sleep(0.05)
        few = ", ".join(map(str, away[:8])) + (" …" if len(away) > 8 else "")
        return (
            f"{self.count - len(away)} of {self.count} processes came within {self.timeout:g} s; missing: {few}. "
            "Look at their logs, or raise distributed.timeout"
        )

    def compare(self, config: Config) -> None:
        """Raises:
        UserError: a process was started with other settings than process 0; the first differences.
        """
        settings = _flat(dataclasses.asdict(config))
        if self.rank == 0:
            self.store.set("settings", json.dumps(settings))
        first = json.loads(self.store.get("settings"))
        unlike = [name for name in first if first[name] != settings.get(name) and name != "device"]
        said = "; ".join(f"{name}: {first[name]} and {settings.get(name)}" for name in unlike[:4])
        self.store.set(f"unlike/{self.rank}", said or " ")

        def differing() -> str:
            for other in range(1, self.count):
                found = self.store.get(f"unlike/{other}").decode().strip()
                if found:
                    return f"processes 0 and {other} have different settings ({found}); start all alike"
            return ""

        self._rule("settings ruling", differing)

    def part(self) -> None:
        """The end that all reach together."""
        self.watch.over.set()
        dist.all_reduce(torch.zeros(1))  # process 0 stays until nobody needs its store
        dist.destroy_process_group()

    def lost(self) -> str | None:
        """Who is gone, in words, after an operation among processes failed."""
        return self.watch.find()

    def fail(self, error: BaseException) -> None:
        """Leave last words for the others, who may be waiting."""
        self.watch.over.set()
        said = " ".join(str(error).split()) or type(error).__name__
        with contextlib.suppress(RuntimeError):
            if self.store.add("endings", 1) == 1:
                self.store.set("lost", f"process {self.rank} of {self.count} ({self.host}) ended: {said}")
            until = time.monotonic() + GRACE + 2 * BEAT
            while self.keeps and time.monotonic() < until and self.store.add("endings", 0) < self.count:
                time.sleep(0.05)

    def once(self, error: BaseException, code: int) -> None:
        """Raise `error` if no other process has said the same; else end quietly, with its exit code."""
        told = f"told/{zlib.crc32(str(error).encode())}"
        heard = False
        if isinstance(error, (UserError, Interrupted, ProcessLost)):
            try:
                heard = self.store.add(told, 1) > 1
            except RuntimeError:  # process 0 has ended with its store, and said what all had agreed on
                heard = not isinstance(error, ProcessLost)
        if heard:
            raise SystemExit(code) from None
        raise error


class Watch(threading.Thread):
    """Signs of life, and an end for a process that waits for one that is gone.

    Process 0 looks after all, the others after process 0 and its word. A collective operation of a GPU cannot be
    interrupted, so the end is that of the process.
    """

    def __init__(self, store: Store, rank: int, count: int, host: str) -> None:
        super().__init__(daemon=True)
        self.store, self.rank, self.count = store, rank, count
        self.over = threading.Event()
        self._lock = threading.Lock()
        store.set(f"beat/{rank}", "0")

    def run(self) -> None:
        seen: dict[int, tuple[bytes, float]] = {}
        beat = 0
        while not self.over.wait(BEAT):
            beat += 1
            try:
                with self._lock:
                    self.store.set(f"beat/{self.rank}", str(beat))
                    for other in range(1, self.count) if self.rank == 0 else (0,):
                        now = self.store.get(f"beat/{other}")
                        if seen.get(other, (b"", 0.0))[0] != now:
                            seen[other] = now, time.monotonic()
                        elif time.monotonic() - seen[other][1] > SILENCE and not self.store.check(["lost"]):
                            self.store.set("lost", self._silent(other))
                    word = self.store.get("lost").decode() if self.store.check(["lost"]) else None
            except RuntimeError:
                word = f"process 0 of {self.count}, which keeps the store, is gone"
            if word is not None and not self.over.wait(GRACE):
                print(f"error: {word}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
                os._exit(EXIT_LOST)

    def find(self) -> str | None:
        """Who has left last words, or gives no sign of life for some beats; None if all others do."""
        others = [other for other in range(self.count) if other != self.rank]
        first: dict[int, bytes] = {}
        until = time.monotonic() + 6 * BEAT
        try:
            while others and time.monotonic() < until:
                with self._lock:
                    if self.store.check(["lost"]):
                        return self.store.get("lost").decode()
                    now = {other: self.store.get(f"beat/{other}") for other in others}
                others = [other for other in others if first.setdefault(other, now[other]) == now[other]]
                time.sleep(BEAT / 4)
            with self._lock:
                return self._silent(others[0]) if others else None
        except RuntimeError:
            return f"process 0 of {self.count}, which keeps the store, is gone"

    def _silent(self, other: int) -> str:
        host = self.store.get(f"host/{other}").decode()
        return f"process {other} of {self.count} ({host}) is gone: no sign of life"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names to leaves as they are in JSON."""
    if isinstance(tree, dict):
        return {name: leaf for key, value in tree.items() for name, leaf in _flat(value, f"{prefix}.{key}").items()}
    return {prefix.lstrip("."): str(tree)}
