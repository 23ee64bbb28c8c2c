"""What lies below a folder, each folder once: links may lead back up, or twice to one place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def files_below(root: str | Path) -> Iterator[str]:
    """Every file under `root` and its sub-folders, links followed: each folder once, by device and inode.

    Of several ways to a folder the first is taken, real folders before links and both by name, so that the paths are
    the same at every call.
    """
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if not _first_time(folder, seen):
            folders.clear()
            continue
        folders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        yield from (os.path.join(folder, name) for name in files)


def folders_in(root: str | Path) -> list[str]:
    """The names of the folders in `root`, sorted, without hidden ones, `root` itself and second names of another."""
    seen: set[tuple[int, int]] = set()
    _first_time(root, seen)
    found = [entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]
    found.sort(key=lambda name: (os.path.islink(os.path.join(root, name)), name))
    return sorted(name for name in found if _first_time(os.path.join(root, name), seen))


def _first_time(folder: str | Path, seen: set[tuple[int, int]]) -> bool:
    """Whether the folder is not among those seen; from now on it is."""
    there = os.stat(folder)
    known = (there.st_dev, there.st_ino) in seen
    seen.add((there.st_dev, there.st_ino))
    return not known
