"""Who works on what: locks of the file system, which end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dino_value.errors import UserError


class Claim:
    """A file that one process holds, and in which it notes its attempts.

    POSIX record locks (fcntl): kept over NFS too, not inherited by child processes, and per process, so one process
    must not take the same claim twice.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    @staticmethod
    def take(path: Path, wait: bool = False) -> Claim | None:
        """The claim on `path`; None where another process has it and `wait` is false.

        Raises:
            UserError: a file system without locks.
        """
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed with the claim)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            file.close()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return None
            raise UserError(
                f"{path}: cannot be locked ({error.strerror}); put the sweep on a file system with POSIX locks"
            ) from None
        return Claim(file)

    def attempt(self, place: str) -> int:
        """Note that work begins at `place`; how many earlier attempts began there and were not taken back."""
        self._file.seek(0)
        before = self._file.read().splitlines().count(place)
        self._file.write(f"{place}\n")
        self._file.flush()
        return before

    def take_back(self) -> None:
        """Forget the attempts: the last one did not die."""
        self._file.truncate(0)

    def release(self) -> None:
        self._file.close()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Inside, no other process is inside."""
    claim = Claim.take(path, wait=True)
    assert claim is not None
    try:
        yield
    finally:
        claim.release()
