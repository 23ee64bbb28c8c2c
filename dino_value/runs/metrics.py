"""What a run says while it runs: metrics.jsonl, a progress bar or plain lines, and meters that stay on the device."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import rich.progress
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from dino_value.files import write_text
from dino_value.runs.trackers import Pictures, Trackers
from dino_value.value import average

METRICS_NAME = "metrics.jsonl"


class Meters:
    """Running means of scalars, kept where they were made; the host waits only when they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            value = value.detach().double() if value.device.type != "mps" else value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def average(self) -> None:
        """Replace the sums by their means over processes; to call on all of them."""
        self._sums = dict(zip(self._sums, average(list(self._sums.values())), strict=True))

    def read(self) -> dict[str, float]:
        """The means since the last reading, over processes too, in one transfer; empties the meters."""
        self.average()
        if not self._sums:
            return {}
        names = list(self._sums)
        sums = torch.stack([self._sums[name] for name in names]).tolist()
        means = {name: total / self._counts[name] for name, total in zip(names, sums, strict=True)}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._counts = dict(state["counts"])


class MetricsFile:
    """metrics.jsonl: one object a line, each with its `step`; a resumed run drops the lines after its checkpoint.

    A line with `event` and `message` is something that was said, not measured. `also` is told each line too.
    """

    def __init__(self, folder: Path, step: int, also: Trackers | None = None) -> None:
        self.path, self.also = folder / METRICS_NAME, also
        if self.path.exists():
            kept = [row for row in read_metrics(folder) if row["step"] <= step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed with the run)

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self.also is not None:
            self.also.write(step, values)

    def pictures(self, step: int, draw: Callable[[], Pictures]) -> None:
        """For those who take pictures."""
        if self.also is not None:
            self.also.pictures(step, draw)

    def close(self) -> None:
        self._file.close()
        if self.also is not None:
            self.also.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, if it has any; a line torn by a kill, or damaged, is left out."""
    rows: list[dict[str, Any]] = []
    if not (folder / METRICS_NAME).exists():
        return rows
    for line in (folder / METRICS_NAME).read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


_SHOWN = {
    "loss": "loss {:.4g}",
    "cosine": "cosine {:.4g}",
    "rankme": "RankMe {:.1f}",
    "knn_top1": "k-NN {:.1%}",
    "images_per_second": "{:.4g} images/s",
    "tokens_per_second": "{:.4g} tokens/s",
    "data_wait": "{:.0%} waiting for data",
}


def summary(values: Mapping[str, float]) -> str:
    """What progress shows of the logged values, those that are there: one line."""
    return "  ".join(text.format(values[name]) for name, text in _SHOWN.items() if name in values)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


class Reporter:
    """A progress bar on a terminal; one plain line an interval elsewhere; all on stderr. `quiet` leaves warnings."""

    def __init__(self, title: str, steps: int, start: int, quiet: bool = False) -> None:
        self.steps, self.title, self.quiet = steps, title, quiet
        self.console = Console(stderr=True)
        self.began, self.first = time.monotonic(), start
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("left  {task.fields[note]}", markup=False),
                console=self.console,
            )
            self._task = self._bar.add_task(title, total=steps, completed=start, note="")

    def __enter__(self) -> Reporter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, step: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step)

    def note(self, text: str) -> None:
        """A line of its own."""
        if not self.quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """A line that is said even when all else is quiet."""
        self._print(f"warning: {text}", style="yellow")

    def say(self, step: int, values: Mapping[str, float]) -> None:
        """What was logged at `step`."""
        if self._bar:
            self._bar.update(self._task, completed=step, note=summary(values))
        elif not self.quiet:
            passed = time.monotonic() - self.began
            left = passed / max(1, step - self.first) * (self.steps - step)
            time_left = f"{duration(left)} left" if step < self.steps else f"done in {duration(passed)}"
            self._print(f"{self.title} {step}/{self.steps}  {summary(values)}  {time_left}")

    def _print(self, text: str, style: str | None = None) -> None:
        # Unwrapped: in a log every line stands for itself.
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


Step = TypeVar("Step")
QUIET_SECONDS = 30.0  # between two plain lines


def follow(steps: Iterable[Step], title: str, total: int, quiet: bool = False) -> Iterator[Step]:
    """The same steps, followed on stderr: a bar on a terminal, elsewhere a plain line now and then; each with the time
    left."""
    console = Console(stderr=True)
    if quiet or console.is_terminal:
        yield from rich.progress.track(steps, title, total=total, disable=quiet, transient=True, console=console)
        return
    began = said = time.monotonic()
    for number, step in enumerate(steps):
        now = time.monotonic()
        if now - said >= QUIET_SECONDS:
            left = duration((now - began) / number * (total - number))
            console.print(f"{title} {number}/{total}  {left} left", markup=False, highlight=False, soft_wrap=True)
            said = now
        yield step


def environment(seed: int, device: torch.device) -> dict[str, Any]:
    """Versions, machine, git state and seed: what a reader needs to repeat the run."""
    from importlib import metadata

    packages = ("dino-value", "torch", "torchvision", "timm", "kornia", "numpy", "omegaconf", "torchmetrics")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "packages": versions,
        "git": _git_state(),
        "seed": seed,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git_state() -> str | None:
    """The commit of this program's own checkout, with a mark when it has changes; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class Clock:
    """Images a second, the share of the time spent waiting for data, and what was spent: seconds, by wall-clock and of
    this process's processors (which other work on the machine takes less part in; loader processes are not in it)."""

    def __init__(self) -> None:
        self.began, self.waited, self.steps = time.monotonic(), 0.0, 0
        self.worked = time.process_time()

    def waiting(self, batches: Iterator[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        """The same batches, timed."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            self.steps += 1
            yield batch

    def read(self, batch_size: int) -> dict[str, float]:
        elapsed, worked = max(1e-9, time.monotonic() - self.began), time.process_time()
        values = {
            "images_per_second": self.steps * batch_size / elapsed,
            "data_wait": self.waited / elapsed,
            "seconds": elapsed,
            "cpu_seconds": worked - self.worked,
        }
        self.worked = worked
        self.began, self.waited, self.steps = time.monotonic(), 0.0, 0
        return values
