"""What value costs in language: tokens a second, step time, share of the value update, peak memory, against baseline.

Both methods live in this process and take turns, so that whatever else the machine does falls on both; ratios are taken
within a round, and a round has all steps of one period r.

    python docs/examples/language_overhead.py CONFIG [--rounds 5] key=value …
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dino_value.language.config import load_language_config
from dino_value.language.train import Run


@dataclass
class Times:
    """Seconds of each round, and of the value updates in it."""

    step: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`, what it queued on the device included."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(config: str, rounds: int, overrides: list[str]) -> str:
    """The table. The first round, with the engine's check and the optimizers' first steps, does not count."""
    given = [*overrides, "out=unused"]
    runs = {name: Run(load_language_config(config, [*given, f"method={name}"])) for name in ("baseline", "value")}
    period = runs["value"].config.value.period
    times = {name: Times() for name in runs}
    peak = dict.fromkeys(runs, 0)
    for number in range(rounds + 1):
        for name, run in runs.items() if number % 2 else reversed(runs.items()):
            spent = clocked(run)
            if run.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(run.device)
            seconds = timed(lambda run=run: [run.learner_update() for _ in range(period)], run.device)  # type: ignore[misc]
            if number:
                times[name].step.append(seconds / period)
                times[name].update.append(sum(spent) / seconds)
                if run.device.type == "cuda":
                    peak[name] = max(peak[name], torch.cuda.max_memory_allocated(run.device))
    return table(runs, times, peak)


def clocked(run: Run) -> list[float]:
    """A list that gets the seconds of the run's value updates from here on."""
    spent: list[float] = []
    if (steer := run.steer) is not None:
        update = type(steer).update_if_due

        def due(step: int) -> None:
            spent.append(timed(lambda: update(steer, step), run.device))

        steer.update_if_due = due  # type: ignore[method-assign]
    return spent


def table(runs: dict[str, Run], times: dict[str, Times], peak: dict[str, int]) -> str:
    lines = [
        "| method | tokens/s | step s | ratio of throughput | value update | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    plain = times["baseline"].step
    for name, run in runs.items():
        o, found = run.config.optim, times[name]
        tokens = o.batch_size * o.accumulation * run.config.data.length
        ratios = [a / b for a, b in zip(plain, found.step, strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        step = statistics.median(found.step)
        memory = f"{peak[name] / 2**20:.0f}" if peak[name] else "not measured"
        lines.append(
            f"| {name} | {tokens / step:.0f} | {step:.3f} | {middle:.3f} [{low:.3f}, {high:.3f}] | "
            f"{statistics.median(found.update):.1%} | {memory} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_intermixed_args()
    print(measure(asked.config, asked.rounds, asked.overrides))


if __name__ == "__main__":
    main()
