"""What the command lines share: a mistake is one line on stderr, and every ending has its exit code."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from dino_value.errors import (
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_LOST,
    EXIT_RESUMABLE,
    EXIT_USER,
    LEFT_AT_ONCE,
    Interrupted,
    ProcessLost,
    UserError,
)

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_GONE = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO, errno.EHOSTDOWN}


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Our warnings as one line, each once, without the place in the source where Python would put them."""
    before = warnings.formatwarning

    def short(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category is UserWarning and Path(__file__).parent in Path(filename).parents:
            return f"warning: {message}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = short
    try:
        yield
    finally:
        warnings.formatwarning = before


def exit_code(command: Callable[[], int]) -> int:
    """Run `command`; its exit code, or after one line on stderr 2 (the user's mistake), 1 (another process is
    gone) or 75 (stopped, resumable); after a traceback 70 (a fault of the program)."""
    try:
        with _short_warnings():
            return command()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER
    except BrokenPipeError:  # whoever read has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except OSError as error:
        if error.errno not in _DISK | _GONE:
            return _fault()
        where = f"{error.filename}: " if error.filename else ""
        advice = "the file system is gone" if error.errno in _GONE else "free space or choose another folder"
        print(f"error: {where}{error.strerror}; {advice}", file=sys.stderr)
        return EXIT_USER
    except ProcessLost as lost:
        print(f"error: {lost}", file=sys.stderr)
        return EXIT_LOST
    except Interrupted as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return EXIT_RESUMABLE
    except KeyboardInterrupt:
        print(LEFT_AT_ONCE, file=sys.stderr)
        return EXIT_RESUMABLE
    except Exception:
        return _fault()


def _fault() -> int:
    """Show the exception at hand. Python's own code for it is 1, which says here that another process is gone."""
    traceback.print_exc()
    return EXIT_FAULT
