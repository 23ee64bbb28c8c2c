"""math-verify in a process of its own, with limits.

An answer can ask for more digits than there is time or memory for (9^{9^{9^9}}, 100000000!), and nothing but the end of
the process ends such a sum: it is one call that no signal handler and no thread interrupts.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from dino_value.errors import UserError

SECONDS = 5  # of processor time for one answer, math-verify's own limit: the same on a busy machine
MEMORY = 4 * 2**30  # bytes of address space
LONGEST = 1000  # characters of an answer; longer is no answer
PATIENCE = 60.0  # seconds of wall clock for one answer, and for the start
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_RUN = "from dino_value.language.verifier import serve; serve()"


class Verifier:
    """A process that compares answers; it ends with its standard input."""

    def __init__(self) -> None:
        # Stops are the caller's to answer, also those that a terminal or a cluster sends to all its processes. An
        # answer must not be wrong because of one.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _RUN],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=Path(__file__).parents[2],  # where this package is found, and no module of the user's folder
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self._line() is None:
            raise UserError("math-verify does not start; python -c 'import math_verify' says why")

    def __call__(self, answer: str, truth: str) -> bool | None:
        """Whether they are equal; None if the process has ended over it, or was ended."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([answer, truth]).encode() + b"\n")
            self.process.stdin.flush()
        line = self._line()
        return None if line is None else line == b"True\n"

    def _line(self) -> bytes | None:
        """What it says next; None, and it is ended, if that is nothing."""
        assert self.process.stdout is not None
        until = time.monotonic() + PATIENCE
        ready = select.select([self.process.stdout], [], [], PATIENCE)[0]
        line = self.process.stdout.readline() if ready and time.monotonic() < until else b""
        if not line:
            self.end()
        return line or None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


_running: list[Verifier] = []  # one or none


@functools.lru_cache(maxsize=2**14)
def verified(answer: str, truth: str) -> bool:
    """Whether math-verify holds two LaTeX expressions equal; one that it cannot finish is wrong.

    Raises:
        UserError: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("scoring needs math-verify: pip install 'dino-value[language]'")
    if max(len(answer), len(truth)) > LONGEST:
        return False
    verifier = _running.pop() if _running else Verifier()
    found = verifier(answer, truth)
    if found is not None:  # one that was interrupted over an answer would give it to the next
        _running.append(verifier)
    return bool(found)


@atexit.register
def _end() -> None:
    while _running:
        _running.pop().end()


def serve() -> None:
    """Answer every line [answer, truth] of standard input with True or False, until it ends or a limit ends it."""
    import math_verify

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    print("ready", file=answers)
    for line in sys.stdin:
        # SIGXCPU, whose handler is the kernel's, ends the process.
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + SECONDS, hard))
        try:
            # Without its timeouts, which are signals that a long sum does not hear.
            found, gold = (math_verify.parse(text, parsing_timeout=None) for text in json.loads(line))
            equal = bool(math_verify.verify(gold, found, timeout_seconds=None))
        except Exception:  # too deep, too large: whatever the parser or sympy makes of it
            equal = False
        print(equal, file=answers)
