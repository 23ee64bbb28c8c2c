"""What value costs in language: tokens a second, step time, share of the value update, peak memory, against baseline.

Both methods live in this process and take turns, so that whatever else the machine does falls on both; ratios are taken
within a round, and a round has all steps of one period r. On the CPU, seconds are those of the processor. Memory is
measured apart: on the CPU each method in a process of its own, the peak above what the imports take.

--parts times one micro-batch, one optimizer step and one value update instead, and puts a step together from them, for
machines on which a period of the paper's steps (a quarter of a million tokens) takes hours.

    python docs/examples/language_overhead.py CONFIG [--rounds 5] [--parts] key=value …
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dino_value.language.config import load_language_config
from dino_value.language.trainer import Trainer

METHODS = ("baseline", "value")


@dataclass
class Times:
    """Seconds of each round, and of the value updates in it."""

    step: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`, what it queued on the device included."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def open_run(config: str, overrides: list[str], method: str) -> Trainer:
    return Trainer(load_language_config(config, [*overrides, "out=unused", f"method={method}"]))


def measure(config: str, rounds: int, overrides: list[str], parts: bool = False, memory: bool = True) -> str:
    """The table. The first round, with the engine's check and the optimizers' first steps, does not count."""
    peaks = {name: peak_of(config, overrides, name) for name in METHODS} if memory else {}
    runs = {name: open_run(config, overrides, name) for name in METHODS}
    times = {name: Times() for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items() if number % 2 else reversed(runs.items()):
            step, update = (from_parts if parts else period)(run)
            if number:
                times[name].step.append(step)
                times[name].update.append(update / step)
    return table(runs, times, peaks)


def period(run: Trainer) -> tuple[float, float]:
    """Seconds of a learner step, and of the value updates in it, over one period."""
    spent, steps = clocked(run), run.config.value.period
    return timed(lambda: [run.learner_update() for _ in range(steps)], run.device) / steps, sum(spent) / steps


def from_parts(run: Trainer) -> tuple[float, float]:
    """The same, from one micro-batch, one step of the optimizer and one value update."""
    o, v = run.config.optim, run.config.value

    def micro_batch() -> None:
        batch = run.stream.batch(o.batch_size).to(run.device)
        run._backward(batch, len(batch.counted), steered=True)

    def optimizer() -> None:
        torch.nn.utils.clip_grad_norm_(run.learner.trained().values(), o.clip)
        run.optimizer.step()
        run.optimizer.zero_grad()

    steer = run.steer
    update = 0.0 if steer is None else timed(lambda: steer.update_if_due(v.burn_in), run.device) / v.period
    return o.accumulation * timed(micro_batch, run.device) + timed(optimizer, run.device) + update, update


def clocked(run: Trainer) -> list[float]:
    """A list that gets the seconds of the run's value updates from here on."""
    spent: list[float] = []
    if (steer := run.steer) is not None:
        update = type(steer).update_if_due

        def due(step: int) -> None:
            spent.append(timed(lambda: update(steer, step), run.device))

        steer.update_if_due = due  # type: ignore[method-assign]
    return spent


def peak_of(config: str, overrides: list[str], method: str) -> int:
    """Peak bytes of two learner steps, each with a value update, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (config, overrides, method, torch.get_num_threads()))


def _peak(config: str, overrides: list[str], method: str, threads: int) -> int:
    torch.set_num_threads(threads)
    before = resident("VmRSS")
    run = open_run(config, overrides, method)
    run.learner_update()  # makes the optimizers' state
    run.step = 0
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
        run.learner_update()
        return torch.cuda.max_memory_allocated(run.device)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: loading does not count
    run.learner_update()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM); Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def table(runs: dict[str, Trainer], times: dict[str, Times], peaks: dict[str, int]) -> str:
    lines = [
        "| method | tokens/s | step s | ratio of throughput | value update | peak MiB | ratio of peak |",
        "|---|---|---|---|---|---|---|",
    ]
    plain = times["baseline"].step
    for name, run in runs.items():
        o, found = run.config.optim, times[name]
        tokens = o.batch_size * o.accumulation * run.config.data.length
        ratios = [a / b for a, b in zip(plain, found.step, strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        step = statistics.median(found.step)
        memory = f"{peaks[name] / 2**20:.0f} | {peaks[name] / peaks['baseline']:.3f}" if peaks else "not measured | "
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
    parser.add_argument("--parts", action="store_true", help="a step put together from its parts")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--no-memory", action="store_true", help="speed only")
    asked = parser.parse_intermixed_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    print(measure(asked.config, asked.rounds, asked.overrides, asked.parts, not asked.no_memory))


if __name__ == "__main__":
    main()
