"""The one-step value probe of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dino_value.cli import main
from dino_value.config import Config, load_config
from dino_value.errors import UserError
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.studies.probe import Probed, probe_run
from dino_value.training.trainer import Trainer, train

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
    rows = {name: row for name, row in found.items() if name not in ("step", "settings")}
    assert set(rows) == {"designed_sgd", "designed_optimizer", "plain_sgd", "plain_optimizer"}
    assert found["step"] == 4
    for row in rows.values():
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
    from dino_value.studies import probe as module

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


def test_what_is_varied(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from dino_value.studies import probe as module

    monkeypatch.setattr(module, "LEAST", 2)
    folder = train(tiny("feedback.seg.train=4", "feedback.seg.meta=8", "data.nyuv2=null"), quiet=True)
    found = probe_run(folder, trials=4, held=1)["plain_sgd"]
    assert {count: len(rs) for count, rs in found["by_images"].items()} == {"2": 4, "4": 2}
    assert set(found["by_score"]) == {"dot", "cosine", "random"}
    earlier = probe_run(folder, 4, 1, 0, Probed(folder / "checkpoints" / "step_00000002.pt"))
    assert earlier["step"] == 2
    assert earlier["plain_sgd"]["realised"] != found["realised"]
    half = probe_run(folder, 4, 1, 0, Probed(scale=0.5))["plain_sgd"]
    assert half["predicted"] == pytest.approx([value / 2 for value in found["predicted"]])
    wide = probe_run(folder, 4, 1, 0, Probed(blocks=3, batch=8))
    assert (wide["settings"]["blocks"], wide["settings"]["batch"]) == (3, 8)
    assert wide["plain_sgd"]["value"] != found["value"]


def test_g_down_of_all_batches_is_their_mean(tiny: Make) -> None:
    from dino_value.studies.probe import _meta_gradient
    from dino_value.value import combine

    folder = train(tiny("feedback.seg.train=4", "feedback.seg.meta=8", "data.nyuv2=null"), quiet=True)
    run = Trainer(load_config(folder / "config.yaml"))
    run.load_state_dict(load_checkpoint(folder))
    assert run.steer is not None
    (task,) = run.steer.feedback
    parts = [_meta_gradient(run, run.steer, task, first, 4) for first in (0, 4)]
    whole = _meta_gradient(run, run.steer, task, 0, None)
    for mean, one in zip(combine(parts, [0.5, 0.5]), whole, strict=True):
        torch.testing.assert_close(mean, one)


def test_the_command_writes_and_prints(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(tiny(), quiet=True)
    assert main(["probe", str(folder), "--trials", "3", "--held", "1"]) == 0
    written = json.loads((folder / "results" / "probe.json").read_text())
    assert "designed_sgd" in written
    earlier = folder / "checkpoints" / "step_00000002.pt"
    assert main(["probe", str(folder), "--trials", "3", "--held", "1", "--checkpoint", str(earlier)]) == 0
    assert json.loads((folder / "results" / "probe_step_2.json").read_text())["step"] == 2
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
        ([], ["--scale", "0"], "--scale 0"),
        ([], ["--batch", "1"], "--batch 1"),
        ([], ["--checkpoint", "absent.pt"], "no such file"),
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


AHEAD = ["designer=targets", "value.direction=lookahead", "value.lookahead.steps=2", "feedback.batch_size=2"]


FLAGS = ("trials", "held", "seed", "blocks", "batch", "scale")


def test_agreement_says_where_it_is_written(tiny_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(tiny_yaml), *AHEAD, "--agreement", "--pairs", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing was written; --out FILE writes it"


def test_agreement_of_adam_in_a_run(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    adam = ["designer=targets", "value.direction=adam", "value.burn_in=20", "feedback.batch_size=2", "steps=21"]
    folder = train(tiny(*adam, "checkpoint.every=21"), quiet=True)
    assert main(["probe", str(folder), "--agreement", "--pairs", "1"]) == 0
    assert "two directions u" in capsys.readouterr().out


def test_agreement_before_a_run_and_of_one(
    tiny: Make, tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "agreement.json"
    arguments = ["--agreement", "--pairs", "2", "--out", str(file)]
    assert main(["probe", str(tiny_yaml), *AHEAD, *arguments]) == 0
    found = json.loads(file.read_text())
    assert found.pop("verdict") in capsys.readouterr().out
    assert all(len(values) == 2 for values in found.values())
    folder = train(tiny(*AHEAD), quiet=True)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["probe", str(folder), *arguments]) == 0
    later = json.loads(file.read_text())
    assert later["step_true"] != found["step_true"]  # of the trained student
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*AHEAD, "--pairs", "0", "--agreement"], "--pairs 0: must be 1 or more"),
        (["method=baseline", "--agreement"], "follows no direction: choose method=value and designer.name=targets"),
        (["designer=unet", "--agreement"], "choose method=value, designer.name=targets or weights"),
        ([*AHEAD, "feedback.depth.train=3", "--agreement"], "feedback.depth.train=3: half of it"),
        (["steps=3"], "key=value goes with --agreement"),
        (["--pairs", "3"], "--pairs 3: goes with --agreement"),
        *((["--agreement", f"--{name}", "3"], f"--{name} is not for --agreement") for name in FLAGS),
        ([*AHEAD, "designer.kl=0", "--agreement"], "designer.kl=0 leaves targets as they are"),
        ([*AHEAD, "designer.strength=0", "--agreement"], "designer.strength=0 leaves targets as they are"),
        ([*AHEAD, "value.direction=adam", "--agreement"], "which before one has taken no step: measure it in a run"),
        ([*AHEAD, "value.lookahead.lr=1e30", "--agreement"], "value.direction=lookahead: not finite"),
    ],
)
def test_agreement_that_cannot_be_measured(
    tiny_yaml: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["probe", str(tiny_yaml), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
