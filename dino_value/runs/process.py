"""The process that trains: its device, its precision, and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import torch

from dino_value.config import Config
from dino_value.distributed.group import own_device, world
from dino_value.errors import EXIT_RESUMABLE, LEFT_AT_ONCE, Interrupted, UserError

GRACE = 1.0  # seconds that a process told to leave at once has to leave by itself
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_heard: list[int] | None = None  # what has come, of the innermost `stop_requests`


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; on a CPU denormals are flushed, which the sharp teacher is full of.

    Raises:
        UserError: a device that is not here.
    """
    try:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        device = torch.device(own_device(name))
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"device={name}: choose cpu, cuda, cuda:1, … or auto")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: not available here: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and capability questions go to the current device
    else:
        torch.set_flush_denormal(True)
    return device


def use_bfloat16(config: Config, device: torch.device) -> bool:
    """Whether the learner's passes run under bfloat16 autocast."""
    return bfloat16(config.precision, device)


def bfloat16(precision: str, device: torch.device) -> bool:
    """Whether `precision` (auto, bf16 or fp32) means bfloat16 autocast on `device`."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # Without the instructions bfloat16 is emulated, and slower than float32.
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


class Stops:
    """Whether SIGTERM, SIGINT or SIGUSR2 has come: call it.

    `held` is whether a stop waits until it is asked for, however long that takes: because there is something to save,
    or nobody who would go on. Before, when nobody has asked for a second, Interrupted is raised where the process is;
    in one long call, or of several processes, it ends there.
    """

    def __init__(self, held: bool) -> None:
        self.held, self.late = held, False
        self.requested: list[int] = []

    def __call__(self) -> bool:
        return bool(self.requested)

    def hold(self) -> None:
        """From here on a stop waits until it is asked for."""
        self.held = True

    def release(self) -> None:
        """All is saved: from here on a stop need not wait. Of several processes, all stop at the end of a step."""
        self.held = world() > 1


@contextlib.contextmanager
def stop_requests(held: bool = True) -> Iterator[Stops]:
    """What says whether SIGTERM, SIGINT or SIGUSR2 has come; a second SIGINT leaves at once. Of two, one within the
    other, both are told.

    Args:
        held: as in `Stops`; False while a run is set up, which can take hours (listing, decoding, compiling).
    """
    global _heard
    stops, outer = Stops(held), _heard
    if outer is not None:
        stops.requested = outer

    def on_signal(number: int, frame: Any) -> None:
        if number == signal.SIGINT and signal.SIGINT in stops.requested:
            raise KeyboardInterrupt
        stops.requested.append(number)
        if stops.late and not stops.held:
            raise Interrupted("there was nothing to save yet; the same command goes on")

    try:
        before = {number: signal.signal(number, on_signal) for number in STOPS}
    except ValueError:  # not the main thread: the caller handles signals
        yield stops
        return
    _heard = stops.requested
    # A process inherits its parent's mask, and would never hear what that has blocked.
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    try:
        with _leaving_at_once(stops):
            yield stops
    finally:
        _heard = outer
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _leaving_at_once(stops: Stops) -> Iterator[None]:
    """A second SIGINT, or any stop that is not held, ends the process although the main thread is busy: Python's
    handlers wait until it comes back from torch, and a backward pass of a large model is one call."""
    over, main = threading.Event(), threading.get_ident()
    heard, told = socket.socketpair()
    told.setblocking(False)

    def raised() -> bool:
        """Whether the main thread has left, now that its handler raises Interrupted, or a stop is held by now."""
        stops.late = True
        if world() == 1 and not stops.held:
            signal.pthread_kill(main, signal.SIGTERM)
        return stops.held or over.wait(GRACE / 2)

    def listen() -> None:
        count = 0
        while True:
            numbers = heard.recv(64)
            if not numbers:  # the other end is closed
                return
            if before != -1:  # whoever listened before still hears all: a launcher tells pre-emption by it
                with contextlib.suppress(OSError):
                    os.write(before, numbers)
            count += numbers.count(signal.SIGINT)
            if stops.held or set(STOPS).isdisjoint(numbers):
                leaving = count > 1 and not over.wait(GRACE)
            else:
                leaving = not over.wait(GRACE) and not raised()
            if leaving:
                os.write(2, f"{LEFT_AT_ONCE}\n".encode())
                os._exit(EXIT_RESUMABLE)

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    listener.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        told.close()
        listener.join()
        heard.close()
