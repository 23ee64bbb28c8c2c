"""The one-step value probe of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dino_value.checkpoint import load_checkpoint
from dino_value.cli import main
from dino_value.config import Config
from dino_value.errors import UserError
from dino_value.probe import probe_run
from dino_value.train import train

Make = Callable[..., Config]


@pytest.mark.parametrize(
    "overrides",
    [[], ["designer=weights"], ["value.scope.patterns=[.]"], ["feedback.depth.guard=true", "method=random"]],
    ids=["masks", "weights", "everything", "random"],
)
def test_columns_and_summaries(tiny: Make, overrides: list[str]) -> None:
    folder = train(tiny(*overrides), quiet=True)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = probe_run(folder, trials=4, held=1)
    assert set(found) == {"designed_sgd", "designed_optimizer", "plain_sgd", "plain_optimizer"}
    for row in found.values():
        assert -1 <= row["interval"][0] <= row["interval"][1] <= 1
        assert len(row["value"]) == len(row["predicted"]) == len(row["realised"]) == 4
    columns = found["plain_sgd"]
    for value, predicted in zip(columns["value"], columns["predicted"], strict=True):
        assert predicted * value > 0  # ηV, with a step size of its own for each trial
    assert found["designed_sgd"]["predicted"] != found["plain_sgd"]["predicted"]
    assert found == probe_run(folder, trials=4, held=1)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_on_the_designers_own_feedback_a_small_step_does_what_it_foretells(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the meta images as held-out ones and steps of a thousandth, the prediction is the first-order truth."""
    from dino_value import probe as module

    folder = train(tiny("feedback.seg.weight=1", "feedback.depth.weight=1"), quiet=True)

    class Own(module._Held):
        def __init__(self, run, steer, task) -> None:  # type: ignore[no-untyped-def]
            class Pool:
                stream = task.meta_stream
                count = -1

                def next(self) -> tuple[torch.Tensor, ...]:
                    self.count += 1
                    return task.meta_stream.batch(self.count)

            task.held = Pool()
            super().__init__(run, steer, task)

    small = module.optimizer_update
    monkeypatch.setattr(module, "_Held", Own)
    monkeypatch.setattr(module, "optimizer_update", lambda *parts: [1e-3 * part for part in small(*parts)])
    found = probe_run(folder, trials=6, held=1)
    for name in ("plain_sgd", "plain_optimizer"):
        assert found[name]["pearson"] > 0.999
        assert found[name]["slope"] == pytest.approx(1, abs=0.05)


def test_the_command_writes_and_prints(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(tiny(), quiet=True)
    assert main(["probe", str(folder), "--trials", "3", "--held", "1"]) == 0
    written = json.loads((folder / "results" / "probe.json").read_text())
    assert "designed_sgd" in written
    assert "Pearson" in capsys.readouterr().out
    train(tiny(), quiet=True)  # the run is still a run
    assert load_checkpoint(folder)["step"] == 4


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        (["method=baseline"], [], "a baseline run has no feedback"),
        (["value.burn_in=99"], [], "before the first designer update"),
        ([], ["--trials", "2"], "a correlation needs 3"),
        ([], ["--held", "99"], "cannot cut"),
    ],
)
def test_what_cannot_be_probed(
    tiny: Make, capsys: pytest.CaptureFixture[str], overrides: list[str], arguments: list[str], message: str
) -> None:
    folder = train(tiny(*overrides), quiet=True)
    assert main(["probe", str(folder), "--held", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder"):
        probe_run(tmp_path)
