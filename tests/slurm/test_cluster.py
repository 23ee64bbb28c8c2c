"""On a real SLURM: every job is submitted at once, and each test waits for its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGTERM, SIGUSR2
from typing import Any

import cloudpickle
import pytest
import submitit
import torch

from dino_value.config import Config
from dino_value.errors import EXIT_DONE, EXIT_RESUMABLE, UserError
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.metrics import read_metrics
from dino_value.slurm.jobs import describe, read_records
from dino_value.slurm.launch import Resources, submit
from dino_value.training.trainer import train

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 120
SMALL = Resources(cpus_per_task=1)
# More than half of a node's 8 CPUs: two such jobs fill the two nodes, and a third has to push one out.
BIG = 5
EVALUATION = "depth --data scenes --size 48 --steps 2 --batch 4 --workers 0"


def sum_of_ranks(arguments: list[str]) -> int:
    """World size and the sum of all ranks, through the variables that torch.distributed reads."""
    torch.distributed.init_process_group("gloo")
    total = torch.tensor([torch.distributed.get_rank()])
    torch.distributed.all_reduce(total)
    Path(arguments[0], os.environ["RANK"]).write_text(
        json.dumps(
            {
                "sum": int(total),
                "world": torch.distributed.get_world_size(),
                "node": os.environ["SLURMD_NODENAME"],
                "local": os.environ["LOCAL_RANK"],
            }
        )
    )
    torch.distributed.destroy_process_group()
    return EXIT_DONE


def until_stopped(arguments: list[str]) -> int:
    """Stands for training that takes for ever, and starts at once; the second attempt ends."""
    marker, received = Path(arguments[0]), []
    if marker.exists():
        return EXIT_DONE
    handlers = {number: signal.signal(number, lambda n, _: received.append(n)) for number in (SIGTERM, SIGUSR2)}
    marker.touch()
    while not received:
        time.sleep(0.1)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return EXIT_RESUMABLE


def write_down(arguments: list[str]) -> int:
    Path(arguments[0]).write_text(os.environ["SLURM_ARRAY_TASK_ID"])
    return EXIT_DONE


def wait(condition: Callable[[], Any], seconds: float = 500) -> None:
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last, "waited in vain"
        time.sleep(0.2)


def ended(job: submitit.Job[int]) -> int:
    """The exit code of a job, asked for more often than submitit would."""
    wait(lambda: job.done(force_check=True))
    return job.results()[0]


Jobs = dict[str, Any]


@pytest.fixture(scope="module")
def jobs(cluster: Path, tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Everything that runs on the cluster."""
    root = tmp_path_factory.mktemp("jobs")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a job cannot import the tests
    (root / "ranks").mkdir()

    def send(name: str, resources: Resources, *commands: list[str], entry: Any = None) -> Any:
        found[name] = submit(commands, resources, root / "folder", entry=entry, name=name)

    def training(name: str) -> list[str]:
        overrides = [f"steps={STEPS}", "log_every=10", "checkpoint.every=1000", f"out={root / name}"]
        return ["train", str(tiny_yaml), *overrides, "--quiet"]

    found: Jobs = {"root": root}
    # SLURM looks at time limits every 30 s: the signal comes after 45 to 75 s, and leaves as many to requeue in.
    limit = Resources(timeout_min=2, signal_delay_s=45, cpus_per_task=1, max_timeouts=3)
    send("timeout", limit, [str(root / "timed_out")], entry=until_stopped)
    send("disturbed", Resources(partition="low", cpus_per_task=BIG), training("disturbed"))
    send("undisturbed", Resources(partition="high", cpus_per_task=BIG), training("undisturbed"))
    send("cancelled", SMALL, [str(root / "cancelled")], entry=until_stopped)
    four = [f"out={root / 'four'}", "steps=4", "value.engine=finite_difference", "evaluation.every=4"]
    four += [f"evaluation.commands=['{EVALUATION}']", "evaluation.job='--partition high --cpus 1'"]
    nodes = Resources(nodes=2, tasks_per_node=2, cpus_per_task=1)
    send("four", nodes, ["train", str(tiny_yaml), *four, "--quiet"])
    send("array", SMALL, *([str(root / f"element_{index}")] for index in range(3)), entry=write_down)
    send("ranks", nodes, [str(root / "ranks")], entry=sum_of_ranks)
    return found


def test_a_refused_request_is_one_line_of_what_sbatch_said(cluster: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cannot submit to slurm: sbatch: invalid partition specified: nope .*$") as e:
        submit([["train", "x"]], Resources(partition="nope"), tmp_path)
    assert "\n" not in str(e.value)


def test_preempted_training_ends_as_if_undisturbed(jobs: Jobs) -> None:
    root, (low,), (high,) = jobs["root"], jobs["disturbed"], jobs["undisturbed"]
    wait(lambda: read_metrics(root / "disturbed"))
    rows = len(read_metrics(root / "disturbed"))
    assert rows < STEPS // 10, "training ended before it could be disturbed"
    stronger = Resources(partition="high", cpus_per_task=BIG)
    submit([[str(root / "nothing")]], stronger, root / "folder", entry=lambda arguments: EXIT_DONE)
    assert ended(low) == ended(high) == EXIT_DONE
    log = (low.stdout() or "") + (low.stderr() or "")
    assert "this job is preempted" in log
    assert "Requeued job" in log
    there, here = (load_checkpoint(root / name) for name in ("disturbed", "undisturbed"))
    assert there["step"] == here["step"] == STEPS
    for part in ("student", "teacher", "steer"):
        assert_equal(there[part], here[part])
    resumed = json.loads((root / "disturbed" / "environment.json").read_text())["resumed"]
    assert len(resumed) == 1
    assert [row["loss"] for row in read_metrics(root / "disturbed")] == [
        row["loss"] for row in read_metrics(root / "undisturbed")
    ]


def assert_equal(one: Any, other: Any) -> None:
    """Bit for bit, all the way down."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


def test_a_cancelled_job_is_shown_as_such_and_stays_away(jobs: Jobs) -> None:
    (job,) = jobs["cancelled"]
    wait((jobs["root"] / "cancelled").exists)
    subprocess.run(["scancel", job.job_id], check=True)
    wait(lambda: state_of(jobs, job) == "CANCELLED", 60)
    wait(lambda: not subprocess.check_output(["squeue", "-h", "-j", job.job_id, "-t", "R,PD,CG"]), 60)
    assert "saved; waiting for SLURM" in (job.stdout() or "")
    assert state_of(jobs, job) == "CANCELLED"


def state_of(jobs: Jobs, job: submitit.Job[int]) -> str:
    folder = jobs["root"] / "folder"
    (row,) = describe(read_records(folder, [job.job_id]), folder)
    return str(row["state"])


def test_an_array_is_one_submission(jobs: Jobs) -> None:
    array = jobs["array"]
    assert [ended(job) for job in array] == [EXIT_DONE] * 3
    assert len({job.job_id.partition("_")[0] for job in array}) == 1
    assert [(jobs["root"] / f"element_{index}").read_text() for index in range(3)] == ["0", "1", "2"]
    wait(
        lambda: [state_of(jobs, job) for job in array] == ["COMPLETED"] * 3, 60
    )  # the result is there a little earlier


def test_four_tasks_on_two_nodes_find_each_other(jobs: Jobs) -> None:
    ended(jobs["ranks"][0])
    ranks = [json.loads((jobs["root"] / "ranks" / str(rank)).read_text()) for rank in range(4)]
    assert [(rank["sum"], rank["world"]) for rank in ranks] == [(6, 4)] * 4
    assert [rank["local"] for rank in ranks] == ["0", "1", "0", "1"]
    assert [rank["node"] for rank in ranks] == ["n1", "n1", "n2", "n2"]


def test_four_tasks_on_two_nodes_train_as_one_and_submit_an_evaluation(
    jobs: Jobs, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    assert ended(jobs["four"][0]) == EXIT_DONE, jobs["four"][0].stderr()
    one = train(tiny(f"out={tmp_path / 'one'}", "steps=4", "value.engine=finite_difference"), quiet=True)
    there, here = (load_checkpoint(folder)["student"] for folder in (jobs["root"] / "four", one))
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=2e-3, atol=2e-3 * float(value.abs().max()))
    place = jobs["root"] / "four" / "evaluations"
    (record,) = read_records(place / "jobs")
    wait(lambda: describe([record], place / "jobs")[0]["state"] not in ("PENDING", "RUNNING", "COMPLETING"))
    (row,) = describe([record], place / "jobs", tail=20)
    assert row["state"] == "COMPLETED", row
    results = place / "step_00000004" / "results" / "depth" / "results.json"
    assert json.loads(results.read_text())["rmse"] > 0


def test_a_time_limit_requeues(jobs: Jobs) -> None:
    (job,) = jobs["timeout"]
    assert ended(job) == EXIT_DONE
    log = (job.stdout() or "") + (job.stderr() or "")
    assert "this job is timed-out" in log
    assert "Requeued job" in log
