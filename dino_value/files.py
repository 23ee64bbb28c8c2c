"""Files that are complete or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` in one step: a kill, or a full disk, leaves the old file or the new one, and nothing beside it.

    Raises:
        OSError: the disk refused it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """`write_bytes` of JSON that every reader accepts.

    Raises:
        ValueError: a number that is not finite.
        OSError: the disk refused it.
    """
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
