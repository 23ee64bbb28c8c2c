"""Jobs through submitit: run here (debug), in their own process (local), put back when interrupted."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest
import submitit

from dino_value.arguments import exit_code
from dino_value.cli import main as dino_value
from dino_value.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_USER, UserError
from dino_value.runs.process import stop_requests
from dino_value.slurm import jobs, launch, snapshot

Entry = Callable[[list[str]], int]


@pytest.fixture
def call(tiny_yaml: Path, tmp_path: Path) -> Callable[..., int]:
    """`dino-value launch` of the tiny configuration, in this process."""

    def run(*flags: str) -> int:
        out = f"out={tmp_path / 'run'}"
        command = ["launch", str(tiny_yaml), out, "--cluster", "debug", "--folder", str(tmp_path / "jobs"), *flags]
        return dino_value(command)

    return run


def test_debug_runs_the_train_command(
    call: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []

    def entry(arguments: list[str]) -> int:
        calls.append(arguments)
        return EXIT_DONE

    monkeypatch.setattr(launch, "dino_value_main", entry)
    assert call("steps=3", "seed=1") == EXIT_DONE
    assert calls[0][0] == "train"
    assert calls[0][2:] == [f"out={tmp_path / 'run'}", "steps=3", "seed=1"]
    assert capsys.readouterr().out.startswith("job DEBUG_")
    (record,) = jobs.read_records(tmp_path / "jobs")
    assert record["arguments"] == calls[0]
    assert record["run"] == str(tmp_path / "run")
    assert record["resources"]["partition"] is None


def test_an_evaluation_is_launched_as_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(launch, "dino_value_main", lambda arguments: calls.append(arguments) or EXIT_DONE)
    command = ["eval", "seg", "runs/a", "--data", "scenes", "--out", "x", "--steps", "3"]
    assert dino_value(["launch", "--cluster", "debug", "--folder", str(tmp_path), *command]) == EXIT_DONE
    assert calls == [command]


def test_a_language_run_is_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(launch, "dino_value_main", lambda arguments: calls.append(arguments) or EXIT_DONE)
    given = ["learner.model=m", "data.stream=s.jsonl", "feedback.files=f.jsonl", f"out={tmp_path / 'run'}"]
    command = ["language", "train", "language/lora", *given]
    flags = ["launch", "--cluster", "debug", "--folder", str(tmp_path / "jobs")]
    assert dino_value([*flags, *command]) == EXIT_DONE
    assert calls == [command]
    assert dino_value([*flags, *command, "targets.alpha_max=2"]) == 2
    assert "targets.alpha_max=2.0: must lie in" in capsys.readouterr().err
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["optim.lrr=1"], "unknown configuration key optim.lrr"),
        (["--node", "2"], "unrecognized arguments: --node"),
        (["--nodes", "0"], "--nodes 0: must be above 0"),
        (["--gpus-per-node", "-1"], "--gpus-per-node -1: must be at least 0"),
    ],
)
def test_a_mistake_is_found_before_the_job(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert call(*flags) == EXIT_USER
    assert said in capsys.readouterr().err
    assert not (tmp_path / "jobs").exists()


def test_a_failed_training_is_a_failed_job(
    call: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "dino_value_main", lambda arguments: EXIT_USER)
    assert call() == EXIT_USER
    assert capsys.readouterr().err.endswith("ended with exit code 2\n")


def interrupted_by(number: int | None) -> Entry:
    """A command that a signal interrupts, as training handles it: it is caught, and the exit code says so."""

    def entry(arguments: list[str]) -> int:
        if number is not None:
            before = signal.signal(number, lambda number, frame: None)
            os.kill(os.getpid(), number)
            signal.signal(number, before)
        return EXIT_RESUMABLE

    return entry


def test_only_the_schedulers_signal_is_raised_again() -> None:
    caught: list[int] = []
    previous = signal.signal(signal.SIGUSR2, lambda number, frame: caught.append(number))
    try:
        assert launch.Command([], interrupted_by(signal.SIGTERM))() == EXIT_RESUMABLE
        assert launch.Command([], interrupted_by(None))() == EXIT_RESUMABLE
        assert caught == []
        assert launch.Command([], interrupted_by(signal.SIGUSR2))() == EXIT_RESUMABLE
        assert caught == [signal.SIGUSR2]
        assert launch.Command([], lambda arguments: EXIT_DONE)() == EXIT_DONE
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert caught == [signal.SIGUSR2]


def test_terminated_on_slurm_it_waits_for_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled job that requeued itself would run again; a pre-empted one that ended would not."""
    slept: list[float] = []
    monkeypatch.setattr(launch.time, "sleep", slept.append)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert launch.Command([], interrupted_by(signal.SIGTERM))() == EXIT_RESUMABLE
    assert slept == [launch.GRACE]


def test_resources_as_submitit_names_them() -> None:
    asked = launch.Resources(nodes=2, gpus_per_node=8, partition="p", after="1:2", mem_gb=64)
    assert asked.parameters() == {
        "timeout_min": 60,
        "nodes": 2,
        "tasks_per_node": 8,
        "gpus_per_node": 8,
        "cpus_per_task": 2,
        "mem_gb": 64,
        "slurm_partition": "p",
        "slurm_dependency": "afterok:1:2",
        "slurm_signal_delay_s": 90,
        "slurm_array_parallelism": 256,
        "slurm_srun_args": ["--cpus-per-task=2"],
    }
    assert not {"slurm_partition", "slurm_account"} & set(launch.Resources().parameters())


def test_no_sbatch_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^cannot submit to slurm: .*srun") as raised:
        launch.submit([["train", "x"]], launch.Resources(), tmp_path / "jobs")
    assert "\n" not in str(raised.value)


# --- the frozen copy


def test_the_copy_wins_over_the_installed_package(tmp_path: Path) -> None:
    copy = snapshot.frozen_copy(tmp_path / "code")
    program = "import dino_value, dino_value.heads, dino_value.slurm as s; print(dino_value.heads.__file__, s.__file__)"
    found = subprocess.check_output(
        [sys.executable, "-c", program], text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(copy)}
    )
    assert [Path(name).parents[2] for name in found.split()] == [copy, copy]
    assert (copy / "dino_value" / "configs" / "rooms" / "cpu.yaml").is_file()
    assert not list(copy.rglob("__pycache__")) or not list((tmp_path / "code").rglob(".tmp*"))


def test_the_same_code_is_copied_once_and_changed_code_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(snapshot, "package_folders", lambda: iter([(Path("dino_value"), source)]))
    first = snapshot.frozen_copy(tmp_path / "code")
    assert snapshot.frozen_copy(tmp_path / "code") == first
    (source / "a.py").write_text("x = 2\n")
    second = snapshot.frozen_copy(tmp_path / "code")
    assert second != first
    assert [(copy / "dino_value" / "a.py").read_text() for copy in (first, second)] == ["x = 1\n", "x = 2\n"]
    assert {path.name for path in (tmp_path / "code").iterdir()} == {first.name, second.name}


# --- local jobs, and what `dino-value jobs` shows


def interrupted_once(arguments: list[str]) -> int:
    """Stands for training: leaves a file behind and asks to go on; the second time it finds it and ends."""
    marker = Path(arguments[0])
    if marker.exists():
        return EXIT_DONE
    marker.touch()
    return interrupted_by(signal.SIGUSR2)([])


def fails(arguments: list[str]) -> int:
    return EXIT_USER


def submit(folder: Path, entry: Entry, arguments: list[str]) -> submitit.Job[int]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the job's process cannot import the tests
    (job,) = launch.submit([arguments], launch.Resources(), folder, "local", entry)
    return job


@pytest.mark.slow
def test_local_jobs_go_on_or_fail_and_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    going_on = submit(tmp_path, interrupted_once, [str(tmp_path / "marker"), f"out={tmp_path / 'run'}"])
    failing = submit(tmp_path, fails, ["x"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\n{"step": 3, "event": "e"}\n')
    running = {row["job"]: row["state"] for row in jobs.describe(jobs.read_records(tmp_path), tmp_path)}
    assert running[going_on.job_id] == "RUNNING"
    assert going_on.result() == EXIT_DONE
    assert "Requeued job" in (going_on.stdout() or "")
    assert failing.exception() is not None

    assert jobs.main(["--folder", str(tmp_path), "--json"]) == EXIT_DONE
    rows = {row["job"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows[going_on.job_id]["state"] == "COMPLETED"
    assert rows[going_on.job_id]["metrics"] == {"step": 3, "loss": 1.5}
    assert rows[failing.job_id]["state"] == "FAILED"
    assert jobs.main([failing.job_id, "--folder", str(tmp_path), "--tail", "3"]) == EXIT_DONE
    shown = capsys.readouterr().out
    assert "ended with exit code 2" in shown
    assert going_on.job_id not in shown


def test_a_local_job_that_left_nothing_is_lost(tmp_path: Path) -> None:
    record = {"job": str(os.getpid()), "cluster": "local", "arguments": [], "run": "", "submitted": ""}
    (tmp_path / "1.json").write_text(json.dumps(record))  # the id of a living process that is not this job
    (row,) = jobs.describe(jobs.read_records(tmp_path), tmp_path)
    assert row["state"] == "LOST"


def test_no_job_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--folder", str(tmp_path / "none")], ["7", "--folder", str(tmp_path)]):
        assert exit_code(lambda given=arguments: jobs.main(given)) == EXIT_USER
        assert capsys.readouterr().err.count("\n") == 1


def test_a_launcher_hears_the_signals_that_training_answers() -> None:
    with launch.received_signals() as received:
        with stop_requests() as stopping:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert stopping()
        assert signal.SIGUSR2 in received()
