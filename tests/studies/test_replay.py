"""Steps that are not finite: left out where that is allowed, kept whole, and computed again."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dino_value import cli
from dino_value.config import Config
from dino_value.errors import UserError
from dino_value.models.learner import Learner
from dino_value.objectives.self_distillation import SelfDistillation
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.metrics import read_metrics
from dino_value.studies.replay import replay
from dino_value.training.feedback import FeedbackTask
from dino_value.training.trainer import Trainer, train

Make = Callable[..., Config]


def spoil_batches(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """At these steps the loss of the image that comes first is not a number."""
    update = Trainer.learner_update

    def updated(self: Trainer, large: torch.Tensor, small: torch.Tensor) -> None:
        if self.step in bad:
            large = large.float().index_fill(1, torch.tensor([0]), math.nan)
        update(self, large, small)

    monkeypatch.setattr(Trainer, "learner_update", updated)


@pytest.mark.parametrize("method", ["value", "baseline"])
def test_a_refused_step_is_kept_and_computed_again(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    spoil_batches(monkeypatch, {2})  # one before which the designer learns, too
    with pytest.raises(UserError, match=r"step 2: loss and gradient_norm not finite.*dino-value replay (.*)") as caught:
        train(tiny(f"method={method}", "steps=6"), quiet=True)
    monkeypatch.undo()
    path = tmp_path / "run" / "nonfinite" / "step_00000002.pt"
    assert str(caught.value).endswith(f"dino-value replay {path}")
    found = replay(path)
    assert found.step == 2
    assert found.terms.keys() == {"loss", "gradient_norm"}
    assert all(math.isnan(value) for pair in found.terms.values() for value in pair)
    assert found.module is not None
    assert found.module.startswith("designer" if method == "value" else "teacher.backbone.")


def test_a_replay_is_exact(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms that are finite beside one that is not come out bit for bit: state and draws are those of then."""
    predict, terms_of = SelfDistillation.predict, SelfDistillation.terms_of

    def watched(self: SelfDistillation, student: Learner, *arguments: object) -> dict[str, torch.Tensor]:
        learning[:] = [True] * student.training  # the learner's step, not the designer's before it
        return predict(self, student, *arguments)  # type: ignore[arg-type]

    def spoilt(self: SelfDistillation, *arguments: object) -> dict[str, torch.Tensor]:
        found = terms_of(self, *arguments)  # type: ignore[arg-type]
        if learning and armed:
            found["koleo"] = found["koleo"] * math.inf
        return found

    armed, learning = list[bool](), list[bool]()
    monkeypatch.setattr(SelfDistillation, "predict", watched)
    monkeypatch.setattr(SelfDistillation, "terms_of", spoilt)
    update = Trainer.learner_update

    def updated(self: Trainer, large: torch.Tensor, small: torch.Tensor) -> None:
        armed[:] = [True] * (self.step == 3)
        update(self, large, small)

    monkeypatch.setattr(Trainer, "learner_update", updated)
    config = tiny(
        "steps=6",
        "value.period=3",
        "objective.koleo=0.1",
        "objective.ibot.weight=1",
        "backbone.kwargs.drop_path_rate=0.3",
    )
    with pytest.raises(UserError, match="step 3: loss and gradient_norm and loss_koleo not finite"):
        train(config, quiet=True)
    found = replay(tmp_path / "run" / "nonfinite" / "step_00000003.pt")
    assert found.terms.keys() == {"loss", "gradient_norm", "loss_dino", "loss_ibot", "loss_koleo"}
    for name in ("loss_dino", "loss_ibot"):
        then, now = found.terms[name]
        assert math.isfinite(then)
        assert then == now
    assert math.isinf(found.terms["loss_koleo"][0])
    assert found.module is None  # the loss itself
    armed.clear()
    monkeypatch.setattr(Trainer, "learner_update", update)
    with pytest.raises(UserError, match="every term of step 3 is finite this time"):
        replay(tmp_path / "run" / "nonfinite" / "step_00000003.pt")


def test_a_refused_step_of_the_heads_is_kept(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before it in the same step, head updates too, is computed again from where the step began."""
    loss = FeedbackTask.loss

    def spoilt(self: FeedbackTask, *arguments: object) -> torch.Tensor:
        found = loss(self, *arguments)  # type: ignore[arg-type]
        bad = self.kind == "depth" and self.train.count == 4  # the second fit of the second update
        return found * math.nan if bad else found

    monkeypatch.setattr(FeedbackTask, "loss", spoilt)
    with pytest.raises(UserError, match=r"loss_depth not finite.*step_00000002\.pt"):
        train(tiny("feedback.updates=2", "feedback.warmup=0", "steps=6"), quiet=True)
    found = replay(tmp_path / "run" / "nonfinite" / "step_00000002.pt")
    assert found.terms.keys() == {"loss_depth"}


def test_steps_are_left_out_up_to_a_number(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_batches(monkeypatch, {1, 4})
    config = tiny("steps=6", "optim.skip_nonfinite=2", "method=baseline", "log_every=2")
    folder = train(config, quiet=True)
    state = load_checkpoint(folder)
    assert (state["step"], state["skipped"]) == (6, 2)
    assert all(value.isfinite().all() for part in ("student", "teacher", "objective") for value in state[part].values())
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {4}  # of Adam
    said = [row for row in read_metrics(folder) if "event" in row]
    assert [(row["step"], row["event"]) for row in said] == [(2, "skipped"), (5, "skipped")]
    assert (
        "the step was left out (1 of optim.skip_nonfinite=2); to compute it again: dino-value replay"
        in said[0]["message"]
    )
    assert all(math.isfinite(row["loss"]) for row in read_metrics(folder) if "event" not in row)
    assert [path.name for path in (folder / "nonfinite").iterdir()] == ["step_00000001.pt"]


def test_one_more_ends_the_run(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_batches(monkeypatch, {1, 3})
    with pytest.raises(UserError, match="step 3: loss and"):
        train(tiny("steps=6", "optim.skip_nonfinite=1", "method=baseline"), quiet=True)
    assert load_checkpoint(tmp_path / "run")["skipped"] == 1  # counted across resumes
    with pytest.raises(UserError, match="step 3: loss and"):
        train(tiny("steps=6", "optim.skip_nonfinite=1", "method=baseline"), quiet=True)
    train(tiny("steps=6", "optim.skip_nonfinite=2", "method=baseline"), quiet=True)  # a setting that may change


def test_the_command(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_batches(monkeypatch, {1})
    with pytest.raises(UserError):
        train(tiny("method=baseline"), quiet=True)
    monkeypatch.undo()
    path = tmp_path / "run" / "nonfinite" / "step_00000001.pt"
    assert cli.main(["replay", str(path), "log_every=3"]) == 0
    printed = capsys.readouterr().out
    assert "gradient_norm" in printed
    assert "first output that is not finite: teacher.backbone" in printed
    for content in (b"", path.read_bytes()[:-10], b"PK\x03\x04"):
        path.write_bytes(content)
        assert cli.main(["replay", str(path)]) == 2
    torch.save({"teacher": {}}, path)
    assert cli.main(["replay", str(path)]) == 2
    assert cli.main(["replay", str(tmp_path / "none.pt")]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 5
    assert all(line.startswith("error: ") for line in printed)
