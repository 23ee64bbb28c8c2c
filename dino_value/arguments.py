"""What the command lines share: a mistake is one line on stderr, and every ending has its exit code."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from typing import NoReturn

from dino_value.errors import EXIT_LOST, EXIT_RESUMABLE, EXIT_USER, Interrupted, ProcessLost, UserError

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def exit_code(command: Callable[[], int]) -> int:
    """Run `command`; its exit code, or after one line on stderr 2 (the user's mistake), 1 (another process is
    gone) or 75 (stopped, resumable)."""
    try:
        return command()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; free space or choose another folder", file=sys.stderr)
        return EXIT_USER
    except ProcessLost as lost:
        print(f"error: {lost}", file=sys.stderr)
        return EXIT_LOST
    except Interrupted as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return EXIT_RESUMABLE
    except KeyboardInterrupt:
        print("stopped at once: what came after the last checkpoint is not kept", file=sys.stderr)
        return EXIT_RESUMABLE
