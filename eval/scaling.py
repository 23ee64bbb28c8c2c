"""Images a second, and memory, of one and of two processes that train here: `python eval/scaling.py [key=value …]`.

All are started at once and take turns, a few learner steps each, so that what else the machine does falls on all alike.
Views are drawn before; reading images is not measured (docs/scaling.md).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from dino_value.arguments import Parser
from dino_value.config import load_config
from dino_value.distributed.fsdp import shares
from dino_value.errors import EXIT_DONE
from dino_value.eval import common
from dino_value.eval.communication import BASE, SMALL
from dino_value.files import write_json
from dino_value.training.trainer import Trainer


class Arm(NamedTuple):
    """How many processes, threads of each, and what a process holds."""

    processes: int
    threads: int
    strategy: str = "ddp"

    def __str__(self) -> str:
        return f"{self.processes}x{self.threads}" + (f"-{self.strategy}" if self.processes > 1 else "")


ARMS = {str(arm): arm for arm in (Arm(1, 1), Arm(1, 2), Arm(2, 1), Arm(2, 1, "fsdp"))}
DEFAULTS = [
    *("backbone.name=vit_small_patch16_224", "method=baseline", "steps=100000", "optim.batch_size=8"),
    *("views.global_size=96", "views.local_size=48"),
]


def held(run: Trainer) -> int:
    """Bytes that a process keeps between steps: its parameters, gradients, moments and moving averages."""
    parameters = [*run.student.parameters(), *run.teacher.parameters()]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    moments = [value for memory in run.optimizer.state.values() for value in memory.values()]
    return sum(part.numel() * part.element_size() for part in shares([*parameters, *gradients, *moments]))


def peak() -> int:
    """Bytes that this process has had in memory at most since `forget_peak`, the interpreter's included."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _work(arm: Arm, rank: int, overrides: list[str], folder: str, orders: Connection) -> None:
    torch.set_num_threads(arm.threads)
    torch.set_flush_denormal(True)
    if arm.processes > 1:
        dist.init_process_group("gloo", f"file://{folder}/{arm}", rank=rank, world_size=arm.processes)
    run = Trainer(load_config(BASE, [*overrides, f"distributed.strategy={arm.strategy}"]))
    batches = list(run.stream.iterate(0, 2))
    run.learner_update(*batches[0])
    forget_peak()
    while steps := orders.recv():
        began = time.perf_counter()
        for number in range(steps):
            run.learner_update(*batches[number % 2])
        orders.send(time.perf_counter() - began)
    orders.send({"held": held(run), "peak": peak()})


@contextlib.contextmanager
def started(arm: Arm, overrides: list[str], folder: str) -> Iterator[list[Connection]]:
    """The processes of an arm, each by the pipe that takes its orders."""
    context = multiprocessing.get_context("forkserver")
    pairs = [context.Pipe() for _ in range(arm.processes)]
    processes = [
        context.Process(target=_work, args=(arm, rank, overrides, folder, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    for _, theirs in pairs:
        theirs.close()  # an end of the process is then an end of the pipe
    try:
        yield [ours for ours, _ in pairs]
    finally:
        for process in processes:
            process.kill()


def measure(arms: Sequence[Arm], overrides: list[str], rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Of each arm: seconds of each round of so many steps, and the bytes of a process, `held` and `peak`."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        pipes = {arm: stack.enter_context(started(arm, overrides, folder)) for arm in arms}
        seconds: dict[Arm, list[float]] = {arm: [] for arm in arms}

        def turn(arm: Arm, order: int) -> list[Any]:
            for pipe in pipes[arm]:
                pipe.send(order)
            return [pipe.recv() for pipe in pipes[arm]]

        for arm in arms:
            turn(arm, 1)  # all are ready
        for _ in range(rounds):
            for arm in arms:
                seconds[arm].append(max(turn(arm, steps)))
        return {str(arm): {"seconds": seconds[arm], **max(turn(arm, 0), key=lambda row: row["peak"])} for arm in arms}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Images a second and memory of one and two processes, taking turns.")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="processes x threads of each")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="of a round (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for dino-value train")
    arguments = parser.parse_intermixed_args(argv)
    overrides = [*SMALL, *DEFAULTS, *arguments.overrides]
    found = measure([ARMS[name] for name in arguments.arms], overrides, arguments.rounds, arguments.steps)
    images = load_config(BASE, overrides).optim.batch_size * arguments.steps
    table = Table("", "images/s, median", "quartiles", "of the first, median of rounds", "held, MB", "peak, MB")
    for row in found.values():
        row["images_per_second"] = [images / each for each in row["seconds"]]
        row["of_first"] = [
            one / each for one, each in zip(next(iter(found.values()))["seconds"], row["seconds"], strict=True)
        ]
    for name, row in found.items():
        rates = row["images_per_second"]
        quartiles = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
        ratio = f"{statistics.median(row['of_first']):.2f}"
        memory = [f"{row[kind] / 1e6:.0f}" for kind in ("held", "peak")]
        table.add_row(name, f"{quartiles[1]:.2f}", f"{quartiles[0]:.2f} … {quartiles[2]:.2f}", ratio, *memory)
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, found)
    return EXIT_DONE


if __name__ == "__main__":
    common.script(main)
