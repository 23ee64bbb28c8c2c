"""Evaluations that a training run hands over as jobs of their own, and does not wait for."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import submitit

from dino_value.cli import check
from dino_value.config import EvaluationConfig
from dino_value.errors import UserError
from dino_value.files import write_json
from dino_value.slurm.launch import job_parser, parse_resources, submit

# Of a job's environment, what says how to reach the cluster and not which job this is.
_KEPT = ("SBATCH_", "SLURM_CONF")


class Evaluations:
    """Submits the `commands` of an EvaluationConfig; made before training begins, so that mistakes are found then.

    Raises:
        UserError: a command that `dino-value eval` would refuse, or flags that `dino-value launch` would.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self.commands: dict[str, list[str]] = {}
        for text in config.commands:
            name, *flags = _words("evaluation.commands", text)
            if name in self.commands:
                raise UserError(f"evaluation.commands: {name} is given twice; its results would have one folder")
            if "--out" in flags:
                raise UserError(f"evaluation.commands={text!r}: leave out --out; results go below the run")
            self.commands[name] = flags
            check(["eval", name, "WEIGHTS", *flags, "--out", "DIR"])
        parser = job_parser()
        parser.set_defaults(folder=None)  # below the run, unless --folder is given
        self.job = parser.parse_args(_words("evaluation.job", config.job))
        if self.job.cluster == "debug":
            raise UserError("evaluation.job: a debug job runs in the place of training; choose slurm or local")
        self.resources = parse_resources(self.job)

    def submit(self, place: Path) -> str:
        """Submit the evaluations of the weights in `place`, which gets jobs.json and results/NAME; what was done.

        Where jobs.json is already, nothing is: a run that was killed passes the same step again.

        Raises:
            UserError: the cluster refused them, or the disk what was to be noted of it.
        """
        weights, record = place / "backbone.safetensors", place / "jobs.json"
        if record.exists():
            return f"{place.name}: its evaluations were submitted before"
        commands = [
            ["eval", name, str(weights), *flags, "--out", str(place / "results" / name), "--quiet"]
            for name, flags in self.commands.items()
        ]
        with _as_if_outside():
            folder = self.job.folder or place.parent / "jobs"
            jobs = submit(commands, self.resources, folder, self.job.cluster, name="dino-value-eval")
        ids = {name: job.job_id for name, job in zip(self.commands, jobs, strict=True)}
        try:
            write_json(record, ids)
        except OSError as error:
            raise UserError(f"submitted, but {record} cannot be written ({error.strerror})") from None
        return f"{place.name}: " + ", ".join(f"{name} is job {number}" for name, number in ids.items())


def _words(key: str, text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{key}={text!r}: {error}") from None
    if key == "evaluation.commands" and not words:
        raise UserError(f"{key}: an empty command; give an evaluation and its flags, such as 'seg --data PATH'")
    return words


@contextlib.contextmanager
def _as_if_outside() -> Iterator[None]:
    """Without the variables of the job that this is, which a job submitted from it would take for its own."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(_KEPT)}
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield
