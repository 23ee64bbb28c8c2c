"""A run in a process of its own, with things going wrong in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class Runner:
    """Runs `dino-value` in forks of one process that has imported everything (zygote.py)."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.txt"
        command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, *arguments: str, kill_after: float | None = None, **faults: Any) -> int:
        """The exit code of `dino-value *arguments`, negative for a signal; with `kill_after` seconds it is killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"arguments": arguments, "log": str(self.log), **faults}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        # The zygote has not reaped it before it has printed the code, so the id is still its own.
        timer = threading.Timer(kill_after or 0, os.kill, (pid, signal.SIGKILL))
        if kill_after is not None:
            timer.start()
        code = int(self.process.stdout.readline())
        timer.cancel()
        return code

    @property
    def said(self) -> list[str]:
        """What the last one printed, line by line."""
        return self.log.read_text().splitlines()

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    started = Runner(tmp_path_factory.mktemp("faults"))
    yield started
    started.close()
