"""Files that are complete or absent."""

from __future__ import annotations

import json
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; after the block its content is on the disk and takes the place of `path` in
    one step. A kill, a full disk or an error leaves the old file or the new one; `sweep` removes what a kill leaves.
    The file's mode is what the umask asks for, whatever wrote it.

    Raises:
        OSError: the disk refused it; nothing is left of the attempt.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = _mode(temporary)
        yield temporary
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)  # the new name itself
    finally:
        temporary.unlink(missing_ok=True)


def follow_umask(folder: Path) -> None:
    """Give a folder and all in it the modes that the umask asks for: some libraries write for their owner alone.

    Raises:
        OSError: the disk refused it.
    """
    probe = folder / f".umask.{os.getpid()}"
    probe.touch()
    mode = _mode(probe)
    probe.unlink()
    for path in (folder, *folder.rglob("*")):
        path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)  # a folder that may be read may be entered


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what kills in the middle of `replacing` left in `folder`; no other process may be writing there."""
    for torn in folder.glob(".*"):
        if re.fullmatch(r"\..+\.\d+", torn.name) and torn.is_file():
            torn.unlink()


def damaged_part(path: Path) -> str | None:
    """Which part of a zip archive, such as `torch.save` writes, does not have its CRC-32; None if all have it.

    `torch.load` does not look at these: a flipped bit of a weight would go unseen.

    Raises:
        zipfile.BadZipFile, OSError, …: not an archive that can be read.
    """
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` in one step: a kill, or a full disk, leaves the old file or the new one.

    Raises:
        OSError: the disk refused it; nothing is left of the attempt.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


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
