"""What the benchmarks share: cases that take turns, time, peak memory, and data to run on."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dino_value.data.scenes import scenes
from dino_value.errors import UserError

CLASSES = 150  # of ADE20K: the head's loss at full resolution is a part of the cost
_WORK = "measured work"
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` is what the process itself used: for one thread on a machine that has other things to do."""


@dataclass(frozen=True)
class Case:
    """Something to measure: `prepare` does the set-up and returns the work that counts."""

    name: str
    prepare: Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class Memory:
    """Most bytes alive at once beyond those at the start: of tensors, and (on Linux) of the process."""

    tensors: int
    resident: int | None


def take_turns(cases: Sequence[Case], rounds: int, device: torch.device, clock: str = "wall") -> dict[str, list[float]]:
    """Seconds of each case in each round, after one that does not count; every other round goes backwards."""
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for number in range(rounds + 1):
        for case in cases if number % 2 else reversed(cases):
            taken = timed(case.prepare(), device, clock)
            if number:
                seconds[case.name].append(taken)
    return seconds


def timed(work: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    """Seconds of `work` by one of CLOCKS, what it queued on the device included."""
    now = CLOCKS[clock]
    _wait(device)
    start = now()
    work()
    _wait(device)
    return now() - start


def check_clock(clock: str, threads: int, device: torch.device) -> None:
    """Raises:
    UserError: processor time would not be the time that one waits.
    """
    if clock == "cpu" and (threads != 1 or device.type != "cpu"):
        raise UserError("--clock=cpu: adds up all threads and sees no GPU; use it with --threads=1 --device=cpu")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(case: Case, device: torch.device) -> Memory:
    """On CUDA by the allocator's own peak. On the CPU from the profiler's record of every allocation, which is exact
    for tensors; and as a second opinion the process's high-water mark, which also holds scratch space of the kernels,
    and what the C library keeps of freed blocks."""
    gc.collect()
    if device.type != "cuda":
        return Memory(peak_tensors(case), peak_resident(case.prepare()))
    work = case.prepare()
    _wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    _wait(device)
    return Memory(torch.cuda.max_memory_allocated(device) - before, None)


def peak_tensors(case: Case) -> int:
    """How far the bytes of CPU tensors rise above those alive when the work starts."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it reports its start and stop on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as recorded:
        work = case.prepare()  # recorded too: the work may free what was made here
        with torch.profiler.record_function(_WORK):
            work()
    kineto: Any = recorded.profiler
    nodes, changes, start = list(kineto.kineto_results.experimental_event_tree()), [], 0
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.name == _WORK:
            start = node.start_time_ns
        elif node.name == "[memory]":
            changes.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    sizes: dict[int, int] = {}
    now = before = peak = 0
    for at, address, size in sorted(changes, key=lambda change: change[0]):
        if size > 0:
            sizes[address] = size
            now += size
        else:
            now -= sizes.pop(address, 0)
        before, peak = (now, now) if at < start else (before, max(peak, now))
    return peak - before


def peak_resident(work: Callable[[], object]) -> int | None:
    """How far `work` raises the process's resident memory, from Linux's resettable high-water mark."""
    give_back_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before
    except (OSError, AttributeError, KeyError):
        work()
        return None


def give_back_memory() -> None:
    """What the C library keeps of freed blocks, to the system; glibc only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)[field].split()[0])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def within(value: Mapping[str, float], digits: int = 3) -> str:
    """Of a `spread`: median (quartiles)."""
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f} – {value['high']:.{digits}f})"


def write_data(folder: Path, size: int, count: int) -> None:
    """`count` scenes of `size` pixels as the unlabeled folder, and as ADE20K's layout with noise of its 150 classes."""
    images = folder / "ade" / "images" / "training"
    annotations = folder / "ade" / "annotations" / "training"
    for path in (folder / "unlabeled", images, annotations):
        path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index, image in enumerate(scenes("unlabeled", size, count).images):
        for path in (folder / "unlabeled", images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{index}.png")
        cells = rng.integers(0, CLASSES + 1, (8, 8), dtype=np.uint8)
        Image.fromarray(cells).resize((size, size), Image.Resampling.NEAREST).save(annotations / f"{index}.png")
    names = "".join(f"{index}\tclass {index}\n" for index in range(1, CLASSES + 1))
    (folder / "ade" / "objectInfo150.txt").write_text("Idx\tName\n" + names)


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
