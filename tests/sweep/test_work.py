"""Trials are run once each, whatever happens to the processes that run them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dino_value.config import Config
from dino_value.errors import EXIT_DONE, Interrupted, UserError
from dino_value.sweep import command, work
from dino_value.sweep.claims import Claim
from dino_value.sweep.spec import Sweep

pytest.importorskip("optuna")

Make = Callable[..., Sweep]


class Double:
    """Stands for training and evaluation: mIoU is the learning rate, RMSE the period."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, int | None]] = []
        self.fail: Callable[[Config, int | None], None] = lambda config, until: None

    def train(self, config: Config, quiet: bool = False, until: int | None = None) -> None:
        name = Path(config.out).name
        self.fail(config, until)
        Path(config.out).mkdir(parents=True, exist_ok=True)
        (Path(config.out) / "lr").write_text(f"{config.optim.lr} {config.value.period}")
        self.trained.append((name, until))

    def evaluate(self, arguments: Sequence[str]) -> int:
        folder = Path(arguments[arguments.index("--out") + 1])
        lr, period = map(float, (Path(arguments[1]) / "lr").read_text().split())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"seg": {"miou": lr}, "depth": {"rmse": period}}[arguments[0]]))
        return EXIT_DONE


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Double:
    found = Double()
    monkeypatch.setattr(work, "train", found.train)
    monkeypatch.setattr(work, "evaluate", found.evaluate)
    return found


def run(sweep: Sweep, limit: int | None = None) -> list[dict[str, Any]]:
    work.prepare(sweep)
    work.work(sweep, limit)
    return rows(sweep)


def rows(sweep: Sweep) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((sweep.out / "trials.json").read_text())
    return found


ONE: dict[str, Any] = {"objectives": {"seg.miou": "maximize"}}
SMALL = {"size": 16, "steps": 2, "batch": 4, "device": "cpu"}


def test_a_sweep_stops_at_its_number_and_goes_on_to_a_larger_one(sweep: Make, double: Double) -> None:
    first = run(sweep())
    assert [row["state"] for row in first] == ["complete"] * 3
    assert double.trained == [(f"{number:04d}", None) for number in range(3)]
    run(sweep())
    assert len(double.trained) == 3
    more = run(sweep(trials=5))
    assert [row["number"] for row in more] == list(range(5))
    assert [row["params"] for row in more[:3]] == [row["params"] for row in first]
    # What a trial draws depends on the seed, its number and what came before, not on where the sweep was stopped.
    assert [row["params"] for row in run(sweep(trials=5, out=str(sweep().out) + "_whole"))] == [
        row["params"] for row in more
    ]
    assert len({row["params"]["optim.lr"] for row in more}) == 5


def test_the_space_reaches_the_configuration(sweep: Make, monkeypatch: pytest.MonkeyPatch, double: Double) -> None:
    seen: list[Config] = []
    double.fail = lambda config, until: seen.append(config)
    for row, config in zip(run(sweep()), seen, strict=True):
        assert row["params"]["optim.lr"] == config.optim.lr == row["values"]["seg.miou"]
        assert row["params"]["value.period"] == config.value.period == row["values"]["depth.rmse"]
        weights = {"seg": (2.0, 8.0), "depth": (1.0, 4.0)}[row["params"]["α"]]
        assert (config.feedback.seg.weight, config.feedback.depth.weight) == weights
        assert config.steps == 3


def test_first_points_and_references(sweep: Make, double: Double) -> None:
    point = {"optim.lr": 5.0e-3, "value.period": 2, "α": "seg"}
    found = run(sweep(first=[point], references=["baseline"]))
    assert found[0]["params"] == point
    assert [name for name, _ in double.trained] == ["baseline", "0000", "0001", "0002"]
    assert (sweep(first=[point], references=["baseline"]).out / "baseline" / "results" / "seg").is_dir()


def test_a_failed_trial_is_recorded_and_the_others_go_on(sweep: Make, double: Double) -> None:
    def fail(config: Config, until: int | None) -> None:
        if config.out.endswith("0001"):
            raise UserError("the loss is not finite")

    double.fail = fail
    found = run(sweep())
    assert [row["state"] for row in found] == ["complete", "fail", "complete"]
    assert found[1]["error"] == "the loss is not finite"
    assert "Traceback" in (sweep().out / "errors" / "0001.txt").read_text()


def test_an_objective_that_no_evaluation_gives(sweep: Make, double: Double) -> None:
    found = run(sweep(objectives={"seg.mioo": "maximize"}, trials=1))
    assert found[0]["state"] == "fail"
    assert found[0]["error"].startswith("objective seg.mioo: the evaluation gives ")


def test_an_interrupted_trial_is_taken_up_as_itself(sweep: Make, double: Double) -> None:
    def interrupt(config: Config, until: int | None) -> None:
        if config.out.endswith("0001") and len(double.trained) == 1:
            double.trained.append(("interrupted", None))
            raise Interrupted("by a signal")

    double.fail = interrupt
    with pytest.raises(Interrupted):
        run(sweep())
    found = run(sweep())
    assert [row["state"] for row in found] == ["complete"] * 3
    assert [name for name, _ in double.trained] == ["0000", "interrupted", "0001", "0002"]


def test_a_trial_whose_process_keeps_dying_fails(sweep: Make, double: Double) -> None:
    chosen = sweep(deaths=2)
    work.prepare(chosen)
    work.open_study(chosen).ask()
    (chosen.out / "claims" / "0").write_text("the start\nstep_00000002.pt\nthe start\n")
    found = run(chosen)
    assert [row["state"] for row in found] == ["fail", "complete", "complete"]
    assert found[0]["error"] == "its process died 2 times after the start"


def test_pruning(sweep: Make, double: Double) -> None:
    chosen = sweep(**ONE, trials=8, sampler="random", overrides={"steps": 4}, prune={"every": 2, "startup": 2}, seed=3)
    found = run(chosen)
    pruned = [row for row in found if row["state"] == "pruned"]
    assert pruned
    assert {row["state"] for row in found} == {"pruned", "complete"}
    for row in found:
        name = f"{row['number']:04d}"
        wanted = [(name, 2)] + ([(name, None)] if row["state"] == "complete" else [])
        assert [entry for entry in double.trained if entry[0] == name] == wanted
    complete = [row["params"]["optim.lr"] for row in found[:2]]  # what the median of the first pruned one was of
    assert all(row["params"]["optim.lr"] < max(complete) for row in pruned)


def test_a_sweep_of_other_settings_is_refused(sweep: Make, double: Double) -> None:
    run(sweep(trials=1))
    with pytest.raises(UserError, match=r"holds a sweep with another seed \(0 there, 1 now\)"):
        work.prepare(sweep(seed=1))
    with pytest.raises(UserError, match="is not empty and not a sweep"):
        work.prepare(sweep(out=str(sweep().out / "trials")))


def test_a_database(sweep: Make, double: Double, tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy")
    found = run(sweep(storage=f"sqlite:///{tmp_path / 'study.db'}"))
    assert [row["state"] for row in found] == ["complete"] * 3
    assert not (sweep().out / "study.journal").exists()


def test_a_database_that_does_not_answer(sweep: Make, tmp_path: Path) -> None:
    chosen = sweep(storage="postgresql://somebody:secret@127.0.0.1:1/studies")
    work.prepare(chosen)
    with pytest.raises(UserError, match=r"^storage postgresql://127.0.0.1:1/studies does not answer: ") as raised:
        work.open_study(chosen)
    assert "secret" not in str(raised.value)


def test_a_torn_journal_is_mended(sweep: Make, double: Double) -> None:
    run(sweep(trials=2))
    with open(sweep().out / "study.journal", "ab") as file:
        file.write(b'{"op_code":5,"worker_id"')
    assert [row["state"] for row in run(sweep())] == ["complete"] * 3
    for line in (sweep().out / "study.journal").read_text().splitlines():
        json.loads(line)


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    program = (
        "import sys, time; from pathlib import Path; from dino_value.sweep.claims import Claim\n"
        "claim = Claim.take(Path(sys.argv[1])); print(claim is not None, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"True\n"
        assert Claim.take(path) is None
        holder.kill()
    claim = Claim.take(path)
    assert claim is not None
    claim.release()


# --- with real training, real evaluations and real kills


def start(spec: Path, *flags: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "dino_value.cli", "sweep", str(spec), *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait(condition: Callable[[], Any], seconds: float = 500) -> None:
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last, "waited in vain"
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_undisturbed(spec: Callable[..., Path], sweep: Make, tmp_path: Path) -> None:
    changes = {"overrides": {"steps": 6, "checkpoint.every": 1}, "references": ["step0"], "trials": 2}
    undisturbed = run(sweep(**changes, out=str(tmp_path / "undisturbed")))
    path, out = spec(**changes), tmp_path / "sweep"
    for moment in ("trials/0000/checkpoints/step_00000003.pt", "trials/0001/results/seg"):
        process = start(path)
        wait(lambda moment=moment, process=process: (out / moment).exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0].decode()
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = start(path)
    assert process.wait(timeout=500) == EXIT_DONE, process.communicate()[0].decode()
    found = rows(sweep(**changes))
    for row in (*found, *undisturbed):
        row.pop("seconds")
    assert found == undisturbed
    environment = json.loads((out / "trials" / "0000" / "environment.json").read_text())
    assert len(environment["resumed"]) == 1
    results = json.loads((out / "step0" / "results" / "seg" / "results.json").read_text())
    same = json.loads((tmp_path / "undisturbed" / "step0" / "results" / "seg" / "results.json").read_text())
    assert results["miou"] == same["miou"]


@pytest.mark.slow
def test_two_workers_share_and_die_with_their_parent(spec: Callable[..., Path], sweep: Make, tmp_path: Path) -> None:
    changes = {**ONE, "trials": 3, "overrides": {"steps": 2, "method": "baseline"}, "evaluations": {"seg": SMALL}}
    path, out = spec(**changes), tmp_path / "sweep"
    process = start(path, "--workers", "2")
    wait(lambda: len(list((out / "trials").glob("*/config.yaml"))) == 2)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 60)
    process = start(path, "--workers", "2")
    assert process.wait(timeout=500) == EXIT_DONE, process.communicate()[0].decode()
    found = rows(sweep(**changes))
    assert [row["state"] for row in found] == ["complete"] * 3
    assert len({row["params"]["optim.lr"] for row in found}) == 3


def test_the_command_prints_where_it_stands(
    spec: Callable[..., Path], double: Double, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(spec()), "steps=2"]) == EXIT_DONE
    assert "3 complete, of 3" in capsys.readouterr().out
    assert command.main([str(spec()), "steps=2", "--status", "--trials", "9"]) == EXIT_DONE
    assert "3 complete, of 9" in capsys.readouterr().out
    saved = OmegaConf.to_container(OmegaConf.load(spec().parent / "sweep" / "sweep.yaml"))
    assert isinstance(saved, dict)
    assert saved["overrides"] == {"steps": 2, "value.warmup": 0}
