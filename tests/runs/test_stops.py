"""SIGTERM and SIGINT are heard within two seconds wherever a run may be busy for long; nothing saved is lost."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dino_value import data as data_module
from dino_value.config import Config
from dino_value.errors import EXIT_RESUMABLE, Interrupted
from dino_value.models.backbone import Backbone
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.process import stop_requests
from dino_value.training import designer_update as steer_module
from dino_value.training.designer_update import DesignerUpdate
from dino_value.training.trainer import train

IN_TIME = 2.0  # seconds from the signal to the end


def busy() -> NoReturn:
    """One call that lasts for hours, in which Python's handlers do not run, as in a compiler or a large product."""
    while True:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def forked(work: Callable[[Callable[[], NoReturn]], object], number: int) -> tuple[int, float]:
    """The exit code of `work` in a process of its own, to which the signal is sent once it calls what it is given, and
    the seconds that it then took to end."""
    heard, told = os.pipe()
    process = os.fork()
    if process == 0:
        try:

            def stuck(*arguments: Any, **options: Any) -> NoReturn:
                os.write(told, b"!")
                busy()

            work(stuck)
        finally:
            os._exit(3)
    os.close(told)
    guard = threading.Timer(120, os.kill, (process, signal.SIGKILL))
    guard.start()
    try:
        if not os.read(heard, 1):  # it has ended before it was stuck
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), 0.0
        time.sleep(0.1)
        os.kill(process, number)
        began = time.monotonic()
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), time.monotonic() - began
    finally:
        guard.cancel()
        os.close(heard)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_stop_that_is_not_held_does_not_wait(number: signal.Signals) -> None:
    def work(stuck: Callable[[], NoReturn]) -> None:
        with stop_requests(held=False):
            stuck()

    code, seconds = forked(work, number)
    assert code == EXIT_RESUMABLE
    assert seconds < IN_TIME


def test_where_python_is_busy_an_exception_says_so() -> None:
    """Whoever runs a run inside, as sweeps and comparisons do, can put its things in order."""
    began = time.monotonic()

    def wait() -> None:
        with stop_requests(held=False):
            os.kill(os.getpid(), signal.SIGTERM)
            while time.monotonic() - began < 60:
                with contextlib.suppress(Exception):  # as libraries do that go on over what they do not know
                    time.sleep(30)

    with pytest.raises(Interrupted, match="nothing to save yet; the same command goes on"):
        wait()
    assert time.monotonic() - began < IN_TIME


def test_a_stop_that_is_held_waits_until_it_is_released() -> None:
    with stop_requests(held=False) as stopping:
        stopping.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.3)  # longer than an unheld one would wait: this process still lives
        assert stopping()

    def work(stuck: Callable[[], NoReturn]) -> None:
        with stop_requests() as stopping:
            stopping.release()
            stuck()

    assert forked(work, signal.SIGTERM)[0] == EXIT_RESUMABLE


BUSY: dict[str, tuple[Any, str, Sequence[str]]] = {
    "listing": (data_module, "list_images", []),
    "decoding into memory": (data_module, "read_image", ["data.in_memory=true"]),
    "compiling": (Backbone, "configure", []),
    "fitting heads": (steer_module, "fit_heads", []),
    "warming a designer up": (DesignerUpdate, "update", ["value.warmup=3"]),
    "warming a designer up after burn-in": (DesignerUpdate, "update", ["value.burn_in=3", "checkpoint.every=100"]),
}


@pytest.mark.parametrize("place", BUSY)
def test_a_run_hears_it(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    owner, name, overrides = BUSY[place]
    config = tiny(*overrides)

    def work(stuck: Callable[[], NoReturn]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stuck)
            train(config, quiet=True)

    code, seconds = forked(work, signal.SIGTERM)
    assert code == EXIT_RESUMABLE
    assert seconds < IN_TIME
    if "value.burn_in=3" in overrides:
        assert load_checkpoint(tmp_path / "run")["step"] == 3
    else:
        assert not list(tmp_path.glob("run/checkpoints/*"))
