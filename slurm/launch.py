"""Submit `dino-value train` to SLURM, and put it back into the queue for as long as it is interrupted.

    python slurm/launch.py CONFIG [key=value ...] --timeout 240 --cpus 8 --gpus 1 --partition NAME

What has no flag here (account, quality of service, constraints) goes through sbatch's own SBATCH_* variables.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import submitit
from submitit.core.utils import FailedJobError

from dino_value.cli import main as dino_value_main
from dino_value.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_USER


@dataclass
class Train:
    """One training job. Running it again continues the run, so its checkpoint is itself.

    Pre-emption and a time limit coming near both arrive as USR2. If training handles that signal, it saves
    and returns EXIT_RESUMABLE; raising the signal once more hands over to submitit, which requeues the job.
    If it does not, submitit takes the signal at once and the job goes on from its last checkpoint on disk.
    """

    arguments: Sequence[str]
    entry: Callable[[list[str]], int]  # dino_value.cli.main

    def __call__(self) -> int:
        """Returns EXIT_DONE, or EXIT_RESUMABLE where nobody requeues (cluster=debug, ranks above 0);
        any other exit code raises RuntimeError, so that the scheduler sees a failed job."""
        code = self.entry(["train", *self.arguments])
        if code == EXIT_RESUMABLE and callable(signal.getsignal(signal.SIGUSR2)):
            os.kill(os.getpid(), signal.SIGUSR2)  # does not return on rank 0 when the job is requeued
        elif code not in (EXIT_DONE, EXIT_RESUMABLE):
            raise RuntimeError(f"dino-value train {' '.join(self.arguments)} ended with exit code {code}")
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit pickles as the next attempt."""
        return submitit.helpers.DelayedSubmission(self)


def main(argv: Sequence[str] | None = None) -> int:
    """Submit one job and print its id and log; with --cluster debug run it here. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Submit `dino-value train` as a job.")
    parser.add_argument("config", help="as for dino-value train")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for dino-value train")
    parser.add_argument("--cluster", choices=["slurm", "local", "debug"], default="slurm")
    parser.add_argument("--folder", default="runs/jobs", help="for logs and pickles (default: %(default)s)")
    parser.add_argument("--partition", help="default: the cluster's own")
    parser.add_argument("--timeout", type=int, default=60, metavar="MIN", help="per attempt (default: %(default)s)")
    parser.add_argument(
        "--max-timeouts", type=int, default=10, help="attempts that may time out (default: %(default)s)"
    )
    parser.add_argument("--cpus", type=int, default=2, help="for the one task (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=0, help="for the one task (default: %(default)s)")
    arguments = parser.parse_intermixed_args(argv)

    options: dict[str, object] = {
        "timeout_min": arguments.timeout,
        "cpus_per_task": arguments.cpus,
        # since SLURM 22.05 srun no longer takes over what sbatch was given, and the task would get one core
        "slurm_srun_args": [f"--cpus-per-task={arguments.cpus}"],
    }
    if arguments.gpus:
        options["gpus_per_node"] = arguments.gpus
    if arguments.partition:
        options["slurm_partition"] = arguments.partition
    try:
        executor = submitit.AutoExecutor(
            folder=arguments.folder,
            cluster=arguments.cluster,
            slurm_max_num_timeout=arguments.max_timeouts,
            local_max_num_timeout=arguments.max_timeouts,
        )
        executor.update_parameters(name="dino-value", **options)
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what sbatch says, and then raises it
            job = executor.submit(Train([arguments.config, *arguments.overrides], dino_value_main))
    except (FailedJobError, RuntimeError, OSError, ValueError) as error:  # no sbatch, refused request, folder
        print(f"cannot submit to {arguments.cluster}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER
    print(f"job {job.job_id}, log {job.paths.stdout}")
    if arguments.cluster == "debug":  # a debug job runs when it is asked for; exception() does so without pdb
        failure = job.exception()
        if failure is not None:
            print(failure, file=sys.stderr)
            return EXIT_USER
        return int(job.result())
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
