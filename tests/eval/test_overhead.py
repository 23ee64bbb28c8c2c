"""The overhead measurements: what is counted, that it is counted right, and that the command runs end to end."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dino_value.arguments import exit_code
from dino_value.errors import EXIT_USER, UserError
from dino_value.eval import overhead
from dino_value.eval.overhead import Target

CPU = torch.device("cpu")


def test_ratios_are_taken_within_a_round() -> None:
    rows = {
        "a": {"seconds": [1.0, 20.0, 3.0], "peak_bytes": 10, "peak_resident_bytes": None},
        "b": {"seconds": [2.0, 40.0, 6.0], "peak_bytes": 40, "peak_resident_bytes": None},
    }
    (row,) = overhead.compare(rows, [Target("a", "b", 0.65, 0.5)])
    assert row["time"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert row["memory"] == 0.25
    assert row["memory_resident"] is None


def test_throughput_from_the_parts() -> None:
    seconds = {
        "learner step": [10.0, 20.0],
        "designed views, stride 4": [1.0, 1.0],
        "value update, finite_difference": [8.0, 8.0],
    }
    lost = overhead.throughput(seconds, 4)
    assert set(lost) == {1, 2, 4, 8, 16}
    for period, values in lost.items():
        for plain, found in zip((10.0, 20.0), values, strict=True):
            steered = period * (plain + 1) + 8
            assert found == pytest.approx(1 - period * plain / steered)


@pytest.fixture(scope="module")
def language() -> overhead.Problem:
    pytest.importorskip("transformers")
    return overhead.language_problem(argparse.Namespace(tiny=True, blocks=2), CPU)


def test_decoder_is_the_hugging_face_model(language: overhead.Problem) -> None:
    task = language.task
    assert isinstance(task, overhead.LanguageTask)
    with torch.no_grad():
        expected = task.learner.model(task.tokens).logits
        cut = task.learner(task.learner(task.tokens, stop=1), start=1)
        assert torch.allclose(task.learner(task.tokens), expected, atol=1e-5)
        assert torch.allclose(cut, expected, atol=1e-5)


def test_language_task_is_soft_target_cross_entropy(language: overhead.Problem) -> None:
    """Against a full-vocabulary target, which the task never builds."""
    task = language.task
    assert isinstance(task, overhead.LanguageTask)
    q, state = task.trunk()
    assert torch.allclose(q.sum(-1), torch.ones(()))
    assert all(len(set(row.tolist())) == len(row) for row in task.candidates.flatten(0, 1))
    logits = task.learner.model(task.tokens).logits
    target = torch.zeros_like(logits).scatter(-1, task.candidates, q)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))
    assert torch.allclose(task.tail((q, state), language.parameters), expected, atol=1e-6)


def test_measured_engines_do_their_work(language: overhead.Problem) -> None:
    """Every timed case leaves φ the reference's gradient, each time it is run."""
    cases = {case.name: case for case in overhead.engine_cases(language, overhead.ENGINES)}

    def gradient(name: str) -> Tensor:
        cases[name].prepare()()
        return torch.cat([tensor.grad.flatten() for tensor in language.phi if tensor.grad is not None])

    exact = gradient("engine, double_backward")
    assert exact.norm() > 0
    for kind in ("value step", "engine"):
        for engine in overhead.ENGINES:
            for _ in range(2):
                found = gradient(f"{kind}, {engine}")
                assert (found - exact).norm() < 2e-2 * exact.norm(), (kind, engine)
    for engine in overhead.ENGINES:  # no gradient of φ: it stops at the tail's inputs
        before = [tensor.grad for tensor in language.phi]
        cases[f"tail, {engine}"].prepare()()
        assert all(tensor.grad is kept for tensor, kept in zip(language.phi, before, strict=True))


@pytest.mark.slow
def test_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    path = tmp_path / "new" / "overhead.json"
    threads = torch.get_num_threads()
    arguments = ["--tiny", "--repeats=1", "--batch=4", "--device=cpu", f"--threads={threads}", f"--json={path}"]
    assert overhead.main([*arguments, "designer.width=4"]) == 0
    printed = capsys.readouterr().out
    assert "dino-value[language]" in printed
    assert "designed views, stride 1" in printed

    found = json.loads(path.read_text())
    assert set(found) == {"about", "cases", "ratios", "throughput_lost"}
    assert found["about"]["meta_batch"] == 2
    for kind in ("value update", "value step", "engine", "tail"):
        assert {f"{kind}, finite_difference", f"{kind}, double_backward"} <= set(found["cases"])
    for row in found["cases"].values():
        assert len(row["seconds"]) == 1
        assert row["seconds"][0] > 0
        assert row["peak_bytes"] > 0
    for row in found["ratios"]:
        case, reference = (found["cases"][row[name]]["seconds"][0] for name in ("case", "reference"))
        assert row["time"]["median"] == pytest.approx(case / reference)
        assert math.isfinite(row["memory"])
    assert set(found["throughput_lost"]) == {"1", "2", "4", "8", "16"}
    assert 0 < found["throughput_lost"]["8"]["cycles"]["median"] < 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--repeats=0"], "--repeats=0: must be at least 1"),
        (["--meta-batch=1"], "--meta-batch=1: must be at least 2"),
        (["--threads=0"], "--threads=0: must be at least 1"),
        (["--cycles=-1"], "--cycles=-1: must be at least 0"),
        (["--blocks=two"], "invalid int value"),
        (["--tiny", "--batch=4", "designer.widht=3"], "did you mean designer.width"),
        (["--tiny", "--batch=4", "--blocks=9"], "choose 1 … 3"),
        (["--tiny", "--batch=4", "--precision=fp8"], "choose auto, bf16, fp32"),
    ],
)
def test_mistakes(arguments: list[str], part: str) -> None:
    with pytest.raises(UserError, match=part.replace("…", ".")):
        overhead.main(arguments)


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: overhead.main(["--batch=1"])) == EXIT_USER
    assert capsys.readouterr().err == "error: --batch=1: must be at least 2\n"


def test_script() -> None:
    path = Path(overhead.__file__)
    done = subprocess.run([sys.executable, path, "--batch=1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_USER
    assert done.stderr == "error: --batch=1: must be at least 2\n"
