"""What the command line turns into one line and an exit code."""

import contextlib
from collections.abc import Iterator

EXIT_DONE = 0
EXIT_LOST = 1  # another process of the group is gone
EXIT_USER = 2
EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h: a fault of the program, with its traceback
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again

LEFT_AT_ONCE = "stopped at once: what came after the last checkpoint is not kept"


class UserError(Exception):
    """A mistake the user can mend. The message says what was wrong, where, and what to do."""


class ProcessLost(Exception):
    """Another process of the group has ended or gone silent. The message says which."""


class Interrupted(BaseException):
    """The run was asked to stop and has saved all that it needs to go on. `except Exception` does not mean it."""


@contextlib.contextmanager
def refusing(name: str) -> Iterator[None]:
    """The core's errors as the user's, with the part of the configuration that they are about."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise UserError(f"{name}: {error}") from None
