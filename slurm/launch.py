"""Commands as jobs through submitit (SLURM, processes of this machine, or here), requeued when they are interrupted.

    dino-value launch CONFIG [key=value ...] --timeout 240 --nodes 2 --gpus-per-node 8 --partition NAME
    dino-value launch eval seg RUN --data PATH --out DIR --after JOB

What has no flag here (account, quality of service, constraints) goes through sbatch's own SBATCH_* variables. And in
Python:

    job = submit([["train", "rooms/cpu", "out=runs/a"]], Resources(timeout_min=240), Path("runs/jobs"))[0]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from dino_value.arguments import Parser
from dino_value.cli import check as check_command
from dino_value.cli import main as dino_value_main
from dino_value.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_USER, UserError
from dino_value.files import write_json
from dino_value.slurm.snapshot import frozen_copy

FOLDER = Path("runs/jobs")
GRACE = 600  # seconds that an interrupted job waits for SLURM's verdict; the longest GraceTime that it sits out


@dataclass(frozen=True)
class Resources:
    """What a job asks for; what is None is left to the cluster.

    Args:
        partition: SLURM's.
        nodes: machines; each runs `tasks_per_node` processes with the variables that torch.distributed reads.
        tasks_per_node: processes of a node; by default one a GPU, or one.
        gpus_per_node: GPUs of a node.
        cpus_per_task: cores of a process.
        mem_gb: memory of a node, GB.
        timeout_min: of one attempt, minutes.
        max_timeouts: attempts that may time out.
        signal_delay_s: seconds before the time limit at which the job is told to save.
        parallel: jobs of an array that may run at the same time.
        after: ids of jobs that must have ended well, separated by colons.
    """

    partition: str | None = None
    nodes: int = 1
    tasks_per_node: int | None = None
    gpus_per_node: int = 0
    cpus_per_task: int = 2
    mem_gb: float | None = None
    timeout_min: int = 60
    max_timeouts: int = 10
    signal_delay_s: int = 90
    parallel: int = 256
    after: str | None = None

    @property
    def tasks(self) -> int:
        """Processes of a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    def parameters(self) -> dict[str, Any]:
        """As submitit's AutoExecutor names them."""
        found: dict[str, Any] = {
            "timeout_min": self.timeout_min,
            "nodes": self.nodes,
            "tasks_per_node": self.tasks,
            "cpus_per_task": self.cpus_per_task,
            "slurm_signal_delay_s": self.signal_delay_s,
            "slurm_array_parallelism": self.parallel,
            # since SLURM 22.05 srun no longer takes over what sbatch was given, and the task would get one core
            "slurm_srun_args": [f"--cpus-per-task={self.cpus_per_task}"],
        }
        given = {
            "gpus_per_node": self.gpus_per_node or None,
            "mem_gb": self.mem_gb,
            "slurm_partition": self.partition,
            "slurm_dependency": f"afterok:{self.after}" if self.after else None,
        }
        return found | {name: value for name, value in given.items() if value is not None}


@dataclass
class Command:
    """One command line as a job. Giving it again continues the work, so its checkpoint is itself.

    Pre-emption and a time limit coming near both arrive as USR2. If the command handles that signal, it saves and
    returns EXIT_RESUMABLE; raising the signal once more hands over to submitit, which requeues the job. If it does
    not, submitit takes the signal at once and the work goes on from what is on the disk.
    """

    arguments: Sequence[str]
    entry: Callable[[list[str]], int]  # dino_value.cli.main

    def __call__(self) -> int:
        """Returns EXIT_DONE, or EXIT_RESUMABLE where nobody requeues (cluster=debug, ranks above 0);
        any other exit code raises RuntimeError, so that the scheduler sees a failed job."""
        cluster = os.environ.get("SUBMITIT_EXECUTOR")
        if cluster is not None and submitit.JobEnvironment().num_tasks > 1:
            distributed = submitit.helpers.TorchDistributedEnvironment()
            # every process sees all GPUs of its node and takes the one of its LOCAL_RANK, as under torchrun
            distributed.export(set_cuda_visible_devices=False, overwrite=True)
        with received_signals() as received:
            code = self.entry(list(self.arguments))
            interrupted = code == EXIT_RESUMABLE
            requeue = signal.SIGUSR2 in received() and callable(signal.getsignal(signal.SIGUSR2))
        if interrupted and requeue:
            os.kill(os.getpid(), signal.SIGUSR2)  # does not return on rank 0 when the job is requeued
        elif interrupted and cluster == "slurm":
            # TERM alone is pre-emption on clusters that send nothing else, or scancel: in either case SLURM ends the
            # job, and knows which it is. A job that ended by itself would not come back, and one that requeued itself
            # would outlive its cancellation.
            print("saved; waiting for SLURM to end this job", flush=True)
            time.sleep(GRACE)
        elif not interrupted and code != EXIT_DONE:
            raise RuntimeError(f"dino-value {shlex.join(self.arguments)} ended with exit code {code}")
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit pickles as the next attempt."""
        return submitit.helpers.DelayedSubmission(self)


@contextlib.contextmanager
def received_signals() -> Iterator[Callable[[], set[int]]]:
    """A function that tells which signals have come, whoever handles them."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    seen: set[int] = set()

    def received() -> set[int]:
        with contextlib.suppress(BlockingIOError):
            seen.update(os.read(reader, 4096))
        return seen

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield received
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def submit(
    commands: Sequence[Sequence[str]],
    resources: Resources,
    folder: Path = FOLDER,
    cluster: str = "slurm",
    entry: Callable[[list[str]], int] | None = None,
    name: str = "dino-value",
) -> list[submitit.Job[int]]:
    """Submit command lines of dino-value, several of them as one job array; their code is copied first.

    Each job leaves FOLDER/<job id>.json for `dino-value jobs`.

    Args:
        commands: as `dino-value` takes them, without the program's name.
        resources: of each of them.
        folder: for logs, pickles, records and the code's copies; on a cluster one that every node sees.
        cluster: `slurm`, `local` (processes of this machine) or `debug` (here, when the result is asked for).
        entry: runs a command line and returns its exit code, in place of dino-value's.
        name: the jobs' in the queue.

    Raises:
        UserError: there is no SLURM here, it refused the request, or the folder cannot be written.
    """
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        code = None if cluster == "debug" else frozen_copy(folder / "code")
        python = shlex.join(["env", *([f"PYTHONPATH={_path(code)}"] if code else []), sys.executable])
        given: dict[str, Any] = {
            f"{kind}_{option}": value
            for kind in ("slurm", "local")
            for option, value in (("max_num_timeout", resources.max_timeouts), ("python", python))
        }
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **given)
        executor.update_parameters(name=name, **resources.parameters())
        calls = [Command(list(arguments), entry or dino_value_main) for arguments in commands]
        # submitit prints what sbatch says, and then raises it
        with contextlib.redirect_stderr(io.StringIO()):
            if len(calls) == 1:
                jobs = [executor.submit(calls[0])]
            else:
                with executor.batch():
                    jobs = [executor.submit(call) for call in calls]
    except (FailedJobError, RuntimeError, OSError, ValueError) as error:  # no sbatch, refused request, folder
        raise UserError(f"cannot submit to {cluster}: {_reason(error)}") from None
    for job, arguments in zip(jobs, commands, strict=True):
        record = {
            "job": job.job_id,
            "cluster": cluster,
            "arguments": list(arguments),
            "run": str(_run_folder(arguments) or ""),
            "code": str(code or ""),
            "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "resources": asdict(resources),
        }
        write_json(folder / f"{job.job_id}.json", record)
    return jobs


def _path(code: Path) -> str:
    """The copy goes before whatever else stands in PYTHONPATH."""
    return os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])


def _reason(error: Exception) -> str:
    """One line; of what sbatch said, without the call of it."""
    text = " ".join(str(error).split())
    _, found, said = text.partition("sbatch: error:")
    return f"sbatch: {said.replace('sbatch: error:', '').strip()}" if found else text


def _run_folder(arguments: Sequence[str]) -> Path | None:
    """The folder that a command says it writes to."""
    for before, part in zip(["", *arguments], arguments, strict=False):
        if part.startswith("out="):
            return Path(part.removeprefix("out=")).absolute()
        if before == "--out":
            return Path(part).absolute()
    return None


def add_resources(parser: argparse.ArgumentParser) -> None:
    """The flags that `parse_resources` reads."""
    default = Resources()
    group = parser.add_argument_group("job")
    group.add_argument("--folder", type=Path, default=FOLDER, help="for logs, pickles and code (default: %(default)s)")
    group.add_argument("--partition", help="default: the cluster's own")
    group.add_argument("--nodes", type=int, default=default.nodes, help="machines (default: %(default)s)")
    group.add_argument("--tasks-per-node", type=int, metavar="N", help="processes (default: one a GPU, or one)")
    group.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--cpus", "--cpus-per-task", type=int, default=default.cpus_per_task, help="of a task (default: %(default)s)"
    )
    group.add_argument("--mem", type=float, metavar="GB", help="of a node (default: the cluster's own)")
    group.add_argument(
        "--timeout", type=int, default=default.timeout_min, metavar="MIN", help="per attempt (default: %(default)s)"
    )
    group.add_argument(
        "--max-timeouts", type=int, default=default.max_timeouts, help="attempts that may time out (%(default)s)"
    )
    group.add_argument(
        "--signal-delay",
        type=int,
        default=default.signal_delay_s,
        metavar="SECONDS",
        help="before the time limit, to save in (default: %(default)s)",
    )
    group.add_argument("--after", metavar="JOB[:JOB]", help="start when these jobs have ended well")


def job_parser(usage: str | None = None) -> Parser:
    """The flags of `dino-value launch`, --cluster among them."""
    parser = Parser(
        "dino-value launch",
        description="Run `dino-value train CONFIG key=value …`, or what begins with eval or language, as a job that is "
        "put back into the queue when it is interrupted.",
        usage=usage,
        allow_abbrev=False,
    )
    parser.add_argument("--cluster", choices=["slurm", "local", "debug"], default="slurm")
    add_resources(parser)
    return parser


def parse_resources(arguments: argparse.Namespace, parallel: int = Resources.parallel) -> Resources:
    """What the flags of `add_resources` ask for.

    Raises:
        UserError: a number that is not positive.
    """
    for flag in ("nodes", "cpus", "timeout", "mem", "tasks_per_node"):
        value = getattr(arguments, flag)
        if value is not None and value <= 0:
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be above 0")
    for flag in ("gpus_per_node", "max_timeouts", "signal_delay"):
        if getattr(arguments, flag) < 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(arguments, flag)}: must be at least 0")
    return Resources(
        partition=arguments.partition,
        nodes=arguments.nodes,
        tasks_per_node=arguments.tasks_per_node,
        gpus_per_node=arguments.gpus_per_node,
        cpus_per_task=arguments.cpus,
        mem_gb=arguments.mem,
        timeout_min=arguments.timeout,
        max_timeouts=arguments.max_timeouts,
        signal_delay_s=arguments.signal_delay,
        parallel=parallel,
        after=arguments.after,
    )


def main(argv: Sequence[str]) -> int:
    """Submit one command and print its job id and log; with --cluster debug run it here. Returns the exit code.

    Raises:
        UserError: a command that would be refused anyway, or a job that is.
    """
    parser = job_parser(
        "dino-value launch [job flags] (CONFIG [key=value …] | eval NAME RUN --data PATH … | language COMMAND …)"
    )
    arguments, rest = parser.parse_known_args(list(argv))
    if not rest:
        parser.error("give a configuration, or eval NAME …")
    command = rest if rest[0] in ("eval", "train", "language") else ["train", *rest]
    check_command(command)
    (job,) = submit([command], parse_resources(arguments), arguments.folder, arguments.cluster)
    print(f"job {job.job_id}, log {job.paths.stdout}")
    if arguments.cluster == "debug":  # a debug job runs when it is asked for; exception() does so without pdb
        failure = job.exception()
        if failure is not None:
            print(failure, file=sys.stderr)
            return EXIT_USER
        return int(job.result())
    return EXIT_DONE


if __name__ == "__main__":
    from dino_value.arguments import exit_code

    sys.exit(exit_code(lambda: main(sys.argv[1:])))
