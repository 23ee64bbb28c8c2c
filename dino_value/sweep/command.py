"""`dino-value sweep`: begin a sweep, or go on with it, here, in processes, or as a job array."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dino_value.arguments import Parser
from dino_value.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_USER, Interrupted, UserError
from dino_value.sweep.spec import Sweep, load_sweep
from dino_value.sweep.work import open_study, prepare, reference_done, summary, work, write_summary

FINISHED = ("complete", "pruned", "fail")


def main(argv: Sequence[str]) -> int:
    """The command; see `--help`.

    Raises:
        UserError: whatever the user can mend.
        Interrupted: a signal came; the same command goes on.
    """
    parser = Parser(
        "dino-value sweep",
        description="Search settings by evaluation results. The same command goes on after any stop: a trial that was "
        "under way is taken up where it stood.",
        allow_abbrev=False,
    )
    parser.add_argument("spec", metavar="SPEC", help="a YAML file, or a packaged one such as sweeps/both")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every trial: data.unlabeled=… …")
    parser.add_argument("--out", type=Path, help="the sweep's folder (default: the specification's)")
    parser.add_argument("--trials", type=int, help="how many, in all (default: the specification's)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="trials at a time (default: %(default)s)")
    parser.add_argument("--cluster", choices=["slurm"], help="run as a job array (default: processes of this machine)")
    parser.add_argument("--status", action="store_true", help="only print where the sweep stands")
    parser.add_argument("--agent", action="store_true", help="one trial of a W&B sweep: its settings are key=value")
    # What the processes and jobs are started with.
    parser.add_argument("--limit", type=int, metavar="N", help="stop after so many trials")
    parser.add_argument("--follow-stdin", action="store_true", help="stop when standard input closes")
    if "--cluster" in argv or any(part.startswith("--cluster=") for part in argv) or "-h" in argv or "--help" in argv:
        from dino_value.slurm.launch import add_resources

        add_resources(parser)
    arguments = parser.parse_intermixed_args(list(argv))
    if arguments.agent:
        from dino_value.sweep.agent import run_agent

        run_agent(arguments.spec, arguments.overrides, arguments.out)
        return EXIT_DONE
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: at least 1")
    if arguments.follow_stdin:
        threading.Thread(target=stop_with_parent, daemon=True).start()
    sweep = load_sweep(arguments.spec, arguments.overrides, arguments.out, arguments.trials)
    if not arguments.status:
        prepare(sweep)
    elif not (sweep.out / "sweep.yaml").is_file():
        raise UserError(f"{sweep.out}: no sweep here")
    if arguments.limit is not None:  # of someone else's sweep: its own command tells the user
        work(sweep, arguments.limit or None)
        return EXIT_DONE
    for name in sweep.references:  # one that failed is tried again when the user asks again
        (sweep.out / "errors" / f"{name}.txt").unlink(missing_ok=True)
    study = open_study(sweep)
    rows = summary(sweep, study)
    if arguments.status:
        print_summary(sweep, rows)
        return EXIT_DONE
    left = remaining(sweep, rows)
    again = ["sweep", arguments.spec, *arguments.overrides, "--out", str(sweep.out), "--trials", str(sweep.trials)]
    if arguments.cluster and left:
        from dino_value.slurm.launch import parse_resources, submit

        # An element a trial: SLURM shares the machines out between them and others' jobs.
        resources = parse_resources(arguments, parallel=arguments.workers)
        jobs = submit([[*again, "--limit", "1"]] * left, resources, arguments.folder, arguments.cluster, name="sweep")
        print(f"jobs {jobs[0].job_id} … {jobs[-1].job_id}: {left} left of {sweep.out}; dino-value jobs shows them")
        return EXIT_DONE
    if arguments.workers > 1 and left > 1:
        code = in_processes([*again, "--limit", "0", "--follow-stdin"], min(arguments.workers, left), sweep)
        if code != EXIT_DONE:
            return code
    else:
        work(sweep)
    rows = write_summary(sweep, open_study(sweep))
    print_summary(sweep, rows)
    return EXIT_DONE if any(row["state"] == "complete" for row in rows) else EXIT_USER


def remaining(sweep: Sweep, rows: Sequence[dict[str, Any]]) -> int:
    """Trials and references that are not finished."""
    finished = sum(row["state"] in FINISHED for row in rows)
    return sweep.trials - finished + sum(not reference_done(sweep, name) for name in sweep.references)


def in_processes(command: Sequence[str], count: int, sweep: Sweep) -> int:
    """Run `count` workers to their end; they stop when this process does, however it does. The exit code.

    Raises:
        Interrupted: a signal came, and the workers have saved.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    log = sweep.out / "workers.log"
    workers: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: Any) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)

    for number in before:
        signal.signal(number, pass_on)
    try:
        with open(log, "ab") as file:
            for _ in range(count):
                workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "dino_value.cli", *command],
                        stdin=subprocess.PIPE,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        print(f"{count} workers of {sweep.out}, log {log}", file=sys.stderr)
        codes = [worker.wait() for worker in workers]
    except KeyboardInterrupt:  # the terminal has sent it to the workers too
        codes = [worker.wait() for worker in workers] + [EXIT_RESUMABLE]
    finally:
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if all(code == EXIT_DONE for code in codes):
        return EXIT_DONE
    if any(code in (EXIT_RESUMABLE, -signal.SIGTERM) for code in codes):
        raise Interrupted(f"the same command goes on with {sweep.out}")
    tail = " ".join(log.read_text(errors="replace").splitlines()[-1:])
    raise UserError(f"a worker ended with exit code {max(codes, key=abs)}: {tail} ({log}); the same command goes on")


def stop_with_parent() -> None:
    """Ask this process to stop when its standard input closes: a worker must not outlive who started it."""
    while os.read(0, 4096):  # not sys.stdin, whose lock this thread would hold when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)  # long enough to save what is under way
    os._exit(EXIT_RESUMABLE)


def print_summary(sweep: Sweep, rows: Sequence[dict[str, Any]]) -> None:
    """Counts by state, and the finished trials, the best first (in order, where several objectives count)."""
    console = Console()
    states = {state: sum(row["state"] == state for row in rows) for state in (*FINISHED, "running", "waiting")}
    counted = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    console.print(f"{counted or 'no trial yet'}, of {sweep.trials}: {sweep.out}", highlight=False, soft_wrap=True)
    complete = [row for row in rows if row["state"] == "complete"]
    if len(sweep.objectives) == 1:
        ((key, way),) = sweep.objectives.items()
        complete.sort(key=lambda row: row["values"][key], reverse=way == "maximize")
    table = Table("trial", *sweep.objectives, *sweep.space)
    for row in complete:
        values = [f"{row['values'][key]:.4f}" for key in sweep.objectives]
        params = [_short(row["params"].get(key)) for key in sweep.space]
        table.add_row(*(Text(text) for text in (str(row["number"]), *values, *params)))
    if complete:
        console.print(table)
    for row in rows:
        if row["error"]:
            console.print(f"trial {row['number']} failed: {row['error']}", markup=False, highlight=False)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
