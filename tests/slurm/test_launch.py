"""Jobs through submitit: run here (debug), in their own process (local), put back when interrupted."""

import signal
import sys
from pathlib import Path

import cloudpickle
import pytest
import submitit

from dino_value.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_USER
from dino_value.slurm import launch


def test_debug_runs_the_train_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []

    def entry(arguments: list[str]) -> int:
        calls.append(arguments)
        return EXIT_DONE

    monkeypatch.setattr(launch, "dino_value_main", entry)
    code = launch.main(["tiny.yaml", "steps=3", "--cluster", "debug", "--folder", str(tmp_path), "seed=1"])
    assert code == EXIT_DONE
    assert calls == [["train", "tiny.yaml", "steps=3", "seed=1"]]
    assert capsys.readouterr().out.startswith("job DEBUG_")


def test_a_failed_training_is_a_failed_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "dino_value_main", lambda arguments: EXIT_USER)
    assert launch.main(["tiny.yaml", "--cluster", "debug", "--folder", str(tmp_path)]) == EXIT_USER
    assert capsys.readouterr().err == "dino-value train tiny.yaml ended with exit code 2\n"


def test_an_interrupted_training_raises_the_schedulers_signal() -> None:
    caught: list[int] = []
    previous = signal.signal(signal.SIGUSR2, lambda number, frame: caught.append(number))
    try:
        assert launch.Train(["tiny.yaml"], lambda arguments: EXIT_RESUMABLE)() == EXIT_RESUMABLE
        assert launch.Train(["tiny.yaml"], lambda arguments: EXIT_DONE)() == EXIT_DONE
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert caught == [signal.SIGUSR2]


def test_no_sbatch_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.main(["tiny.yaml", "--folder", str(tmp_path / "jobs")]) == EXIT_USER
    error = capsys.readouterr().err
    assert error.startswith("cannot submit to slurm: ")
    assert error.count("\n") == 1


def interrupted_once(arguments: list[str]) -> int:
    """Stands for training: leaves a file behind and asks to go on; the second time it finds it and ends."""
    marker = Path(arguments[1])
    if marker.exists():
        return EXIT_DONE
    marker.touch()
    return EXIT_RESUMABLE


def submit(cluster: str, folder: Path) -> submitit.Job[int]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the job's process cannot import the tests
    executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=cluster)
    executor.update_parameters(timeout_min=60)
    return executor.submit(launch.Train([str(folder / "marker")], interrupted_once))


@pytest.mark.slow
def test_an_interrupted_local_job_goes_on(tmp_path: Path) -> None:
    job = submit("local", tmp_path)
    assert job.result() == EXIT_DONE
    assert "Requeued job" in (job.stdout() or "")


@pytest.mark.slurm
def test_an_interrupted_slurm_job_goes_on(tmp_path: Path) -> None:
    job = submit("slurm", tmp_path)
    assert job.result() == EXIT_DONE
    assert "Requeued job" in (job.stdout() or "")
