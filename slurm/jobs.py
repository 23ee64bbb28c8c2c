"""`dino-value jobs`: what became of the launched jobs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
from rich.console import Console
from rich.table import Table
from rich.text import Text
from submitit.core.utils import JobPaths

from dino_value.arguments import Parser
from dino_value.errors import EXIT_DONE, UserError
from dino_value.runs.metrics import read_metrics, summary
from dino_value.slurm.launch import FOLDER

_ANSWER_SECONDS = 20


def main(argv: Sequence[str]) -> int:
    """Print the table, and the end of each log that `--tail` asks for.

    Raises:
        UserError: no such folder, or no such job in it.
    """
    parser = Parser("dino-value jobs", description="State, last metrics and log of launched jobs, the newest last.")
    parser.add_argument("job", nargs="*", metavar="JOB", help="ids (default: all of the folder)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="as for dino-value launch (default: %(default)s)")
    parser.add_argument("--tail", type=int, default=0, metavar="N", help="show the last N lines of each log")
    parser.add_argument("--json", action="store_true", help="one JSON object a job")
    arguments = parser.parse_args(list(argv))
    found = describe(read_records(arguments.folder, arguments.job), arguments.folder, arguments.tail)
    if arguments.json:
        for row in found:
            print(json.dumps(row))
        return EXIT_DONE
    console = Console()
    table = Table("job", "state", "command", "last metrics")
    for row in found:
        metrics = f"step {row['metrics']['step']}  {summary(row['metrics'])}" if row["metrics"] else "–"
        table.add_row(*(Text(text) for text in (row["job"], row["state"], " ".join(row["arguments"]), metrics)))
    console.print(table)
    for row in found:
        if row["tail"]:
            console.print(f"\n{row['job']}: {row['log']}", markup=False, highlight=False, soft_wrap=True)
            console.print("\n".join(row["tail"]), markup=False, highlight=False, soft_wrap=True)
    return EXIT_DONE


def read_records(folder: Path, wanted: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What `submit` left in FOLDER, oldest first; an array's id stands for all of its jobs.

    Raises:
        UserError: no such folder, or no such job in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; nothing was launched from here, or give --folder")
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    if missing := [job for job in wanted if not any(_is(job, record) for record in records)]:
        raise UserError(f"{folder} has no job {missing[0]}; dino-value jobs --folder {folder} lists those it has")
    chosen = [record for record in records if not wanted or any(_is(job, record) for job in wanted)]
    return sorted(chosen, key=lambda record: (record["submitted"], len(record["job"]), record["job"]))


def _is(job: str, record: dict[str, Any]) -> bool:
    return record["job"] == job or record["job"].startswith(f"{job}_")


def describe(records: Sequence[dict[str, Any]], folder: Path, tail: int = 0) -> list[dict[str, Any]]:
    """The records with `state`, `metrics` (the last row of the run's metrics.jsonl), `log` and `tail`."""
    slurm = slurm_states(record["job"] for record in records if record["cluster"] == "slurm")
    rows = []
    for record in records:
        paths = JobPaths(folder.absolute(), record["job"])
        if record["cluster"] == "slurm":
            state = slurm.get(record["job"]) or outcome(paths) or "UNKNOWN"
        else:
            state = outcome(paths) or ("RUNNING" if _alive(record["job"], folder) else "LOST")
        log = paths.stderr if state == "FAILED" else max((paths.stdout, paths.stderr), key=_modified)
        metrics = [row for row in read_metrics(Path(record["run"])) if "event" not in row] if record["run"] else []
        rows.append(
            {**record, "state": state, "metrics": metrics[-1] if metrics else {}, "log": str(log)}
            | {"tail": log.read_text(errors="replace").splitlines()[-tail:] if tail and log.exists() else []}
        )
    return rows


def slurm_states(jobs: Iterable[str]) -> dict[str, str]:
    """States by job id, from the accounting, or where there is none from the queue; empty without SLURM."""
    jobs = list(jobs)
    if not jobs:
        return {}
    ids = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    found: dict[str, str] = {}
    for command in (
        ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T", f"--jobs={ids}"],
        ["sacct", "--noheader", "--array", "--allocations", "--parsable2", "--format=JobID,State", f"--jobs={ids}"],
    ):
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            continue
        for line in answer.stdout.splitlines():
            job, _, state = line.partition("|")
            if state:
                found[job] = state.split()[0].rstrip("+")  # "CANCELLED by 1000"
    return found


def outcome(paths: JobPaths) -> str | None:
    """COMPLETED or FAILED by what the job left behind, if it has."""
    if not paths.result_pickle.is_file():
        return None
    kind, _ = cloudpickle.loads(paths.result_pickle.read_bytes())  # written by our own job, in our own folder
    return "COMPLETED" if kind == "success" else "FAILED"


def _modified(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _alive(job: str, folder: Path) -> bool:
    """Whether the process of a local job still controls it; process ids are used again by others."""
    try:
        os.kill(int(job), 0)
        command = Path(f"/proc/{job}/cmdline").read_bytes().split(b"\0")
    except (ValueError, OSError):
        return False
    return str(folder.absolute()).encode() in command
