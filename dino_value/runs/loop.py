"""What both training loops share: a run's log, and what a concern is, one call after each step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from dino_value.errors import Interrupted
from dino_value.runs.metrics import MetricsFile, Reporter

Concern = Callable[[int], None]  # of the number of steps taken


class Log:
    """Where a run's numbers and sentences go: metrics.jsonl, where this process writes one, and the terminal."""

    def __init__(self, metrics: MetricsFile | None, reporter: Reporter) -> None:
        self.metrics, self.reporter = metrics, reporter

    def write(self, step: int, values: Mapping[str, float], shown: bool = True) -> None:
        if values and self.metrics is not None:
            self.metrics.write(step, values)
            if shown:
                self.reporter.say(step, values)

    def note(self, text: str) -> None:
        """A sentence that explains; not kept."""
        self.reporter.note(text)

    def warn(self, step: int, event: str, text: str, shown: str | None = None) -> None:
        """A sentence that asks for attention, kept as an event; `shown` where the terminal is told another."""
        if self.metrics is not None:
            self.metrics.write(step, {"event": event, "message": text})
            self.reporter.warn(shown or text)

    def resumed(self, step: int, warnings: Iterable[str]) -> None:
        """What was said before the log was open."""
        if self.metrics is not None:
            for text in warnings:
                self.metrics.write(step, {"event": "resumed", "message": text})


def say_warnings(warnings: Sequence[str]) -> None:
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)


def due(step: int, every: int, end: int) -> bool:
    """Every so many steps, and at the end; 0: never."""
    return bool(every) and (step % every == 0 or step == end)


def interrupted(step: int, steps: int) -> Interrupted:
    return Interrupted(f"stopped at step {step} of {steps}; the same command goes on from there")
