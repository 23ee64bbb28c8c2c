"""A frozen copy of the code: what a job runs is what was submitted, whatever is edited while it waits."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import dino_value

MOVED = ("heads", "eval", "configs", "slurm")  # at the root of the sources, installed below dino_value
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def frozen_copy(folder: Path) -> Path:
    """Copy the package as it is installed to FOLDER/<hash of its contents>; the same code is copied once.

    Returns:
        The folder to put first in PYTHONPATH: its `dino_value` wins over the installed one, editable or not.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / digest()
    if target.is_dir():
        return target
    temporary = folder / f".{target.name}.{os.getpid()}"
    try:
        for name, source in package_folders():
            shutil.copytree(source, temporary / name, ignore=_LEFT_OUT, dirs_exist_ok=True)
        os.replace(temporary, target)
    except OSError:
        if not target.is_dir():  # else another launch was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def package_folders() -> Iterator[tuple[Path, Path]]:
    """(path below the copy, folder) of the package, and of its parts that an editable installation has elsewhere."""
    root = Path(dino_value.__path__[0])
    yield Path("dino_value"), root
    for name in MOVED:
        spec = importlib.util.find_spec(f"dino_value.{name}")
        found = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
        if found and found[0].parent != root:
            yield Path("dino_value") / name, found[0]


def digest() -> str:
    """A name for the code that changes with any file of it."""
    found = hashlib.sha256()
    for name, folder in package_folders():
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder)
            if path.is_file() and path.suffix != ".pyc" and not any(part[0] == "." for part in relative.parts):
                found.update(f"{name / relative}\0".encode())
                found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]
