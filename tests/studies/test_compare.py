"""Comparisons: what a specification may say, what is shared, and that nothing is done twice."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dino_value.cli import main
from dino_value.config import Config, packaged
from dino_value.errors import EXIT_RESUMABLE, Interrupted, UserError
from dino_value.runs.checkpoint import latest_checkpoint, load_checkpoint
from dino_value.runs.process import stop_requests
from dino_value.studies import compare as module
from dino_value.studies.compare import Spec, compare, config_of, equal_time, load_spec, write_page
from dino_value.training.trainer import train

Make = Callable[..., Config]

SPEC = """
config: TINY
seeds: 2
overrides: [steps=2]
arms:
  baseline: [method=baseline]
  value: [method=value]
  frozen: [designer.start_from=@value, designer.frozen=true]
evaluate:
  seg: {data: DATA/ade, size: [24, 24], steps: 3, batch: 8}
  depth: {data: DATA/nyu, size: [24, 24], steps: 3, batch: 8, eigen_crop: false}
"""


@pytest.fixture
def spec_file(tiny_yaml: Path, tiny_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC.replace("TINY", str(tiny_yaml)).replace("DATA", str(tiny_data)))
    return path


def test_arms_are_paired_and_finished_work_is_kept(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_spec(spec_file, [f"out={tmp_path / 'out'}", "clock=cpu"])
    monkeypatch.setattr(module, "step_seconds", lambda spec, configs, arm: 2.0 if arm == "value" else 1.0)
    found = compare(spec)
    assert set(found["arms"]) == {"step0", "baseline", "value", "frozen"}
    assert all(len(values) == 2 for row in found["arms"].values() for values in row.values())
    assert found["steps"] == {"baseline": 2, "value": 2, "frozen": 2}
    timed = found["equal_time"]
    assert timed["steps"] == {"baseline": 2, "value": 1, "frozen": 2}
    # Runs that both budgets share are one run, and another number of steps is another result.
    assert timed["arms"]["baseline"] == found["arms"]["baseline"]
    assert timed["arms"]["value"]["miou_loss"] != found["arms"]["value"]["miou_loss"]
    assert [(claim["arm"], claim["against"]) for claim in found["claims"][::2]] == [
        ("value", "baseline"),
        ("value", "frozen"),
        ("value", "step0"),
    ]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["arms"] == found["arms"]

    def refused(*arguments: Any, **options: Any) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(module, "evaluate", refused)
    assert compare(spec)["arms"] == found["arms"]
    # Another start is another row, whatever lies in the folder.
    other = json.loads((tmp_path / "out" / "step0" / "1.json").read_text())
    (tmp_path / "out" / "step0" / "1.json").write_text(json.dumps(other | {"weights": "others"}))
    with pytest.raises(AssertionError, match="evaluated again"):
        module.start_rows(spec)
    page = write_page(spec, found, "title", "summary", ["command"]).read_text()
    assert "segmentation loss" in page
    assert found["clock"] == "cpu"
    assert "At equal processor time" in page
    assert "frozen" in page


def test_the_clock_is_the_one_asked_for(spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"step": 1, "seconds": 4.0, "cpu_seconds": 1.0}, {"step": 2, "event": "x"}, {"step": 2, "seconds": 4.0}]
    monkeypatch.setattr(module, "read_metrics", lambda folder: rows)
    for clock, seconds in (("wall", 4.0), ("cpu", 0.5)):
        spec = load_spec(spec_file, [f"clock={clock}"])
        assert (
            module.step_seconds(spec, {("value", n): config_of(spec, "value", n) for n in (0, 1)}, "value") == seconds
        )
    rows[0].pop("cpu_seconds")
    with pytest.raises(UserError, match=r"value_0: its metrics\.jsonl has no cpu_seconds"):
        module.step_seconds(spec, {("value", n): config_of(spec, "value", n) for n in (0, 1)}, "value")


@pytest.mark.slow
def test_processes_give_what_one_process_gives(spec_file: Path, tmp_path: Path) -> None:
    few = ["seeds=1", "equal_time=false"]
    here = compare(load_spec(spec_file, [*few, f"out={tmp_path / 'here'}"]))
    there = compare(load_spec(spec_file, [*few, f"out={tmp_path / 'there'}"]), jobs=2)
    assert there["arms"] == here["arms"]
    for arm in ("baseline", "value", "frozen"):
        left, right = (tmp_path / name / "runs" / f"{arm}_0" / "backbone.safetensors" for name in ("here", "there"))
        assert all(torch.equal(value, load_file(right)[name]) for name, value in load_file(left).items())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_what_runs_and_begins_nothing_more(
    spec_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    long = "overrides=[steps=1000000,checkpoint.every=1000000,log_every=1]"
    command = ["compare", str(spec_file), "--jobs", "2", f"out={tmp_path / 'out'}", "equal_time=false", long]
    program = f"import sys; from dino_value.cli import main; sys.exit(main({command!r}))"
    runs = tmp_path / "out" / "runs"
    with subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            until = time.monotonic() + 240
            while sum(path.stat().st_size > 0 for path in runs.glob("*/metrics.jsonl")) < 2:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.2)
            if number == signal.SIGINT:  # as a terminal does: all of them hear it
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            said = process.communicate(timeout=60)[1].splitlines()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == EXIT_RESUMABLE
    assert [line.split(":")[0] for line in said] == ["baseline, seed 0", "baseline, seed 1", "stopped"], said
    assert "the same command goes on" in said[-1]
    begun = sorted(path.name for path in runs.iterdir())
    assert begun == ["baseline_0", "baseline_1"]
    assert all(load_checkpoint(runs / name)["step"] > 0 for name in begun)


def test_a_stop_between_two_runs_is_heard(spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last step of a run, which then is finished: nothing more is begun."""

    def finished(config: Config, quiet: bool) -> Path:
        with stop_requests(held=False) as stopping:
            stopping.hold()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopping()
        return tmp_path

    monkeypatch.setattr(module, "train", finished)
    spec = load_spec(spec_file, [f"out={tmp_path / 'out'}"])
    with pytest.raises(Interrupted, match="the same command goes on"):
        module.run_one(config_of(spec, "value", 0), spec.evaluate)


def test_every_run_is_told_when_it_begins_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, Any]] = []
    calls = {name: functools.partial(dict, miou=value) for name, value in (("a", 0.1), ("b", 0.2), ("c", 0.3))}
    for jobs in (1, 2):
        told.clear()
        rows = module.each(
            calls, jobs, lambda key: told.append(("begins", key)), lambda key, row: told.append((key, row))
        )
        assert rows == {name: call() for name, call in calls.items()}
        assert [name for event, name in told if event == "begins"] == ["a", "b", "c"]
        assert all(told.index(("begins", name)) < told.index((name, row)) for name, row in rows.items())
        assert (told[1] == ("begins", "b")) == (jobs == 2)


def test_a_mistake_in_one_run_stops_the_others(spec_file: Path) -> None:
    calls = {"bad": functools.partial(load_spec, "no/such"), "long": functools.partial(_wait_for_a_stop, 600)}
    began = time.monotonic()
    with pytest.raises(UserError, match="no/such"):
        module.each(calls, 2)  # type: ignore[type-var]
    assert time.monotonic() - began < 60


def _wait_for_a_stop(seconds: float) -> dict[str, float]:
    with stop_requests() as stopping:
        until = time.monotonic() + seconds
        while not stopping() and time.monotonic() < until:
            time.sleep(0.1)
    return {}


def test_arms_share_all_but_their_own_list(spec_file: Path) -> None:
    spec = load_spec(spec_file)
    configs = {arm: config_of(spec, arm, 1) for arm in spec.arms}
    assert {config.seed for config in configs.values()} == {1}
    assert configs["frozen"].designer.start_from == configs["value"].out
    for config in configs.values():
        config.out, config.method, config.designer = "", "", Config().designer
    assert configs["baseline"] == configs["value"] == configs["frozen"]


def test_some_arms_may_go_first(spec_file: Path) -> None:
    spec = load_spec(spec_file, ["only=[baseline,value]"])
    assert list(spec.arms) == ["baseline", "value"]
    assert module.claims_of(spec) == [("value", "baseline"), ("value", "step0")]


@pytest.mark.parametrize(
    ("seconds", "reference", "steps"), [(1.0, 1.0, 100), (2.0, 1.0, 50), (0.5, 1.0, 200), (1.01, 1.0, 100), (1e9, 1, 1)]
)
def test_equal_time_is_the_references(seconds: float, reference: float, steps: int) -> None:
    assert equal_time(100, seconds, reference) == steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seeds=0", "seeds=0: at least one"),
        ("armz={}", "unknown key armz; a comparison has arms"),
        ("arms.step0=[a=b]", "none called step0"),
        ("arms.value=[method]", r"arms\.value: expected a list of key=value"),
        ("arms.value=[designer.start_from=@other]", "@other is not an arm"),
        ("arms.value=[designer.start_from=@frozen]", "@frozen is not an arm, or itself needs another one"),
        ("reference=nobody", "reference=nobody: not an arm"),
        ("clock=sundial", "clock=sundial: choose wall, cpu"),
        ("only=[nobody]", "only=nobody: not an arm; choose baseline, value, frozen"),
        ("only=[frozen]", "@value is not an arm"),
        ("claims=[[value, nobody]]", r"claims: .*two of step0, baseline"),
        ("evaluate.retrieval={}", r"evaluate\.retrieval: choose seg, depth, linear, knn"),
        ("evaluate.seg.step=3", r"evaluate\.seg: unknown option step"),
        ("evaluate.knn={k: 3}", r"evaluate\.knn: give data: ROOT"),
        ("evaluate.knn@few={k: 3}", r"evaluate\.knn@few: give data: ROOT, and options of `dino-value eval knn`"),
        ("evaluate.seg@32={data: x}", r"evaluate\.seg@32: says 32 labels; give labels: 32"),
        ("evaluate.seg@32_tuned={data: x, labels: 64}", r"seg@32_tuned: says 32 labels; give labels: 32"),
        ("evaluate.seg@={data: x}", r"evaluate\.seg@: what stands behind @ is letters, digits"),
        ("evaluate.retrieval@1={data: x}", r"evaluate\.retrieval@1: choose seg, depth, linear, knn"),
        ("evaluate.knn={data: x, finetune: true}", r"evaluate\.knn: unknown option finetune"),
        ("metrics=[miou@32]", "metrics: miou@32 is not measured; choose miou, miou_loss"),
    ],
)
def test_specifications_that_cannot_be_run(spec_file: Path, change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_spec(spec_file, [change])


def test_mistakes_end_in_one_line(spec_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("x")
    for arguments in ([str(spec_file), f"out={tmp_path / 'used'}"], ["no/such"], [str(spec_file), "--jobs", "0"]):
        assert main(["compare", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_starts_go_in_turn_and_both_networks_are_judged(tiny: Make, spec_file: Path, tmp_path: Path) -> None:
    starts = [
        train(tiny("method=baseline", f"seed={seed}", "steps=1", f"out={tmp_path / f'start_{seed}'}"), quiet=True)
        for seed in (5, 6)
    ]
    given = [f"starts=[{starts[0]},{starts[1]}]", "networks=[teacher,student]", "metrics=[miou,student_miou_loss]"]
    spec = load_spec(
        spec_file, [f"out={tmp_path / 'out'}", "only=[baseline,value]", "seeds=3", "equal_time=false", *given]
    )
    assert [config_of(spec, "value", seed).start_from for seed in range(3)] == [*map(str, starts), str(starts[0])]
    found = compare(spec)
    assert found["starts"] == [0, 1, 0]
    assert {one["metric"] for one in found["claims"]} == {"miou", "student_miou_loss"}
    step0, arm = found["arms"]["step0"], found["arms"]["value"]
    assert step0["student_miou_loss"] == step0["miou_loss"]
    assert len({*step0["miou_loss"]}) == 3  # another start, or other heads
    # The student's numbers are of the student's weights.
    assert arm["student_miou_loss"] != arm["miou_loss"]
    folder = tmp_path / "out" / "runs" / "value_0"
    state = torch.load(latest_checkpoint(folder / "checkpoints"), weights_only=True)["student"]  # type: ignore[arg-type]
    weights = module._student(folder).state_dict()
    assert all(torch.equal(state[f"backbone.{name}"], value) for name, value in weights.items())


@pytest.mark.parametrize(
    "name", sorted(f"compare/{path.stem}" for path in packaged("compare/rooms.yaml").parent.glob("*.yaml"))
)
def test_packaged_comparisons_are_valid(name: str) -> None:
    spec = load_spec(name)
    assert isinstance(spec, Spec)
    for arm in spec.arms:
        config_of(spec, arm, 0)


def test_several_evaluations_of_one_kind(spec_file: Path, tmp_path: Path) -> None:
    few = "{data: DATA/ade, size: [24, 24], steps: 2, batch: 4, inference: whole, finetune: true, labels: N}"
    few = few.replace("DATA/ade", str(load_spec(spec_file).evaluate["seg"]["data"]))
    given = [f"evaluate.seg@{n}_fine-tuned={few.replace('N', n)}" for n in ("4", "8")]
    spec = load_spec(
        spec_file, [f"out={tmp_path / 'out'}", "only=[baseline,value]", "seeds=1", "equal_time=false", *given]
    )
    found = compare(spec)
    assert list(found["arms"]["value"]) == [
        *("miou", "miou_loss", "rmse", "rmse_loss"),
        *(f"miou{end}@{n}_fine-tuned" for n in (4, 8) for end in ("", "_loss")),
    ]
    losses = [found["arms"]["step0"][key][0] for key in found["arms"]["step0"] if "miou_loss" in key]
    assert len({*losses}) == 3
    # By default the headline of each is claimed, and metrics may name one.
    assert [one["metric"] for one in found["claims"][:4]] == ["miou", "rmse", "miou@4_fine-tuned", "miou@8_fine-tuned"]
    spec.metrics = ["miou@8_fine-tuned"]
    assert "mIoU, 8 labels fine-tuned" in write_page(spec, found, "title", "summary", ["command"]).read_text()
    assert (tmp_path / "out" / "step0" / "seg@8_fine-tuned" / "pictures").is_dir()


def test_runs_end_with_a_comparison_that_is_killed() -> None:
    """Their processes would go on training for nobody."""
    program = (
        "import functools, os, time\n"
        "from dino_value.studies.compare import _processes\n"
        "if __name__ == '__main__':\n"
        "    with _processes(1) as (submit, stop):\n"
        "        print(submit(os.getpid).result(), flush=True)\n"
        "        submit(functools.partial(time.sleep, 600)).result()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        watched = os.pidfd_open(worker)
        parent.kill()
    assert select.select([watched], [], [], 60)[0], "it still runs"
