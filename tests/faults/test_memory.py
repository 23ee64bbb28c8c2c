"""Memory, open files and threads of a long run stay level. DINO_VALUE_STEPS sets how long."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

STEPS = int(os.environ.get("DINO_VALUE_STEPS", "400"))
SLACK = 6_000  # KiB: arenas and caches that fill up late; a leak of one small tensor a step would show


@pytest.mark.slow
@pytest.mark.timeout(1200 + 3 * STEPS)
def test_memory_is_flat(runner: Callable[..., int], tiny_yaml: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    settings = [f"steps={STEPS}", "log_every=10", f"checkpoint.every={STEPS // 8}", "checkpoint.keep=2", "--quiet"]
    settings += ["health.every=50", "health.images=4"]
    assert runner("train", str(tiny_yaml), f"out={tmp_path / 'run'}", *settings, watch=str(rows)) == 0
    memory, files, threads = zip(*map(json.loads, rows.read_text().splitlines()), strict=True)
    assert len(memory) == STEPS
    quarter = STEPS // 4
    early, late = statistics.median(memory[quarter : 2 * quarter]), statistics.median(memory[-quarter:])
    print(f"{STEPS} steps: {early:.0f} KiB in the second quarter, {late:.0f} in the last; {files[-1]} files")
    assert late - early < SLACK
    assert files[-1] == files[quarter]
    assert threads[-1] == threads[quarter]
