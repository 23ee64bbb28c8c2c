"""Damaged files, thousands of them: every reader reads what is left or says in one line what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = int(os.environ.get("DINO_VALUE_FUZZ", "2000"))


@pytest.mark.slow
def test_every_reader() -> None:
    """In a process of its own: a crash of a compiled reader is a failure too."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), str(FILES)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tried"] >= FILES
    for name, tally in found["readers"].items():
        assert tally["refused"] > 0, f"{name} refuses nothing"
    print(found)
