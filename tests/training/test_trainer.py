"""The loop: what a run leaves, that it goes on where it stopped, and that arms differ in nothing but the method."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dino_value.config import Config, load_config
from dino_value.data.sampling import Stream
from dino_value.errors import Interrupted, UserError
from dino_value.models.backbone import load_backbone
from dino_value.runs import process as process_module
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.folder import prepare_folder
from dino_value.runs.metrics import read_metrics
from dino_value.runs.process import stop_requests
from dino_value.training import trainer as train_module
from dino_value.training.methods import self_supervised as step_module
from dino_value.training.optim import cosine_schedule
from dino_value.training.start import start_from
from dino_value.training.trainer import Trainer, train

TIMING = ("images_per_second", "data_wait", "seconds", "cpu_seconds")
METHODS = ("value", "baseline", "random")
SMALL_PREDICTOR = [f"objective.ijepa.{key}" for key in ("width=8", "depth=1", "heads=2")]


def same(left: Any, right: Any) -> bool:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def rows(folder: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in TIMING} for row in read_metrics(folder)]


def steps(run: Trainer, count: int) -> Trainer:
    for large, small in run.stream.iterate(run.step, run.step + count):
        run.learner_update(large, small)
    return run


def learner(run: Trainer) -> dict[str, Any]:
    """All that pretraining is made of: student, teacher, centre and the learner's optimizer."""
    state = run.state_dict()
    return {name: state[name] for name in ("step", "student", "teacher", "objective", "optimizer")}


@pytest.mark.parametrize("method", METHODS)
def test_the_run_folder(tiny: Callable[..., Config], method: str) -> None:
    config = tiny(f"method={method}")
    folder = train(config, quiet=True)
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "backbone.safetensors",
        *(["splits.json"] if method != "baseline" else []),
    }
    assert load_config(folder / "config.yaml") == config
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step_00000002.pt",
        "step_00000004.pt",
    ]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["seed"] == 0
    assert {"torch", "timm", "dino-value"} <= set(environment["packages"])
    found = read_metrics(folder)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert all({"loss", "gradient_norm", "teacher_entropy", "lr", "weight_decay"} <= row.keys() for row in found)
    steered = {"value", "cosine", "g_down_norm", "g_pre_norm", "loss_seg", "loss_depth", "mask_spread"}
    for row in found:
        assert (steered <= row.keys()) == (method != "baseline" and row["step"] in (1, 3))
        assert ("mask_mean" in row) == (method != "baseline")


def test_the_weights_are_the_teachers_under_timms_names(tiny: Callable[..., Config]) -> None:
    folder = train(tiny("method=baseline"), quiet=True)
    state = load_checkpoint(folder)
    weights = load_file(folder / "backbone.safetensors")
    teacher = {
        name.removeprefix("backbone.model."): value
        for name, value in state["teacher"].items()
        if name.startswith("backbone.")
    }
    assert same(weights, teacher)
    assert not same(state["student"], state["teacher"])
    assert same(dict(load_backbone(folder).model.state_dict()), teacher)


# Everything that a resumed run could get wrong: head updates before the first designer step, the noise of the fill,
# the random direction, stochastic depth, the meters of an interval that the stop cuts in two.
RESUMED = {
    "value": ["method=value"],
    "baseline": ["method=baseline"],
    "random": ["method=random", "value.direction=random"],
    "noise, all crops, stochastic depth": [
        "designer.fill=noise",
        "designer.crops=all",
        "designer.through_teacher=true",
        "backbone.kwargs.drop_path_rate=0.3",
    ],
    "burn-in and warm-up": ["value.burn_in=3", "value.warmup=2", "value.period=3"],
    "schedules and freezing": [
        "optim.warmup=3",
        "objective.freeze_last_layer=3",
        "optim.freeze_backbone=1",
        "objective.teacher_temp_start=0.02",
        "objective.teacher_temp_warmup=5",
        "optim.weight_decay_end=0.4",
    ],
    "SiT, cosine, reference engine": [
        "designer.name=sit",
        "designer.width=8",
        "designer.stride=4",
        "value.direction=cosine",
        "value.engine=double_backward",
        "backbone.attention=math",
    ],
    "weights, g_down kept and averaged": [
        "designer=weights",
        "feedback.refresh=2",
        "feedback.ema=0.5",
        "value.direction=cosine",
    ],
    "masks and best of n, a guard": [
        "designer.name=unet+best_of_n",
        "designer.candidates=2",
        "value.burn_in=1",
        "feedback.depth.guard=true",
    ],
    "everything in scope, measured": [
        "value.scope.patterns=[.]",
        "value.diagnose=1",
        "value.combine=normalised",
        "feedback.seg.held=2",
        "feedback.depth.held=1",
    ],
}


@pytest.mark.parametrize("overrides", RESUMED.values(), ids=RESUMED.keys())
def test_two_halves_are_a_whole(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    common = ["steps=6", "log_every=2", "checkpoint.every=100", *overrides]
    whole = train(tiny(f"out={tmp_path / 'whole'}", *common), quiet=True)
    config = tiny(f"out={tmp_path / 'halves'}", *common)
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
        train(config, quiet=True)
    monkeypatch.undo()
    halves = train(config, quiet=True)
    assert same(load_checkpoint(whole), load_checkpoint(halves))
    assert rows(whole) == rows(halves)
    assert [row["step"] for row in rows(whole)] == [2, 4, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_stop_is_saved_whatever_asked_for_it(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(process_module, "GRACE", 60.0)  # a busy machine may not finish its first step in a second
    stop_after(monkeypatch, 1, number)
    with pytest.raises(Interrupted, match="stopped at step 1 of 4; the same command goes on from there"):
        train(tiny("method=baseline"), quiet=True)
    assert load_checkpoint(tmp_path / "run")["step"] == 1
    assert signal.getsignal(number) == before


def test_a_stop_is_heard_though_the_parent_had_blocked_it() -> None:
    """As processes do that are forked from the loaders' server, which does not listen."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        with stop_requests() as stopping:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopping()
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_second_interrupt_leaves_at_once() -> None:
    with stop_requests() as stopping:
        assert not stopping()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.set_wakeup_fd(-1) == -1
    assert "signals" not in [thread.name for thread in threading.enumerate()]


def test_a_second_interrupt_does_not_wait_for_a_long_call() -> None:
    """A backward pass is one call, during which Python's handlers do not run."""
    process = os.fork()
    if process == 0:
        with stop_requests():
            for after in (0.1, 0.2):
                threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # a quarter of an hour
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 75


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """The signal arrives while step number `step` is computed."""
    update = Trainer.learner_update

    def interrupted(self: Trainer, large: Tensor, small: Tensor) -> None:
        if self.step == step - 1:
            os.kill(os.getpid(), number)
        update(self, large, small)

    monkeypatch.setattr(Trainer, "learner_update", interrupted)


def test_a_pause_changes_nothing(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Sweeps judge a run in between: at a step that would neither be logged nor saved."""
    few = ("log_every=4", "checkpoint.every=4")
    train(tiny(*few), quiet=True, until=3)
    assert load_checkpoint(tmp_path / "run")["step"] == 3
    assert read_metrics(tmp_path / "run") == []
    train(tiny(*few), quiet=True, until=2)
    assert load_checkpoint(tmp_path / "run")["step"] == 3
    train(tiny(*few), quiet=True)
    train(tiny(*few, f"out={tmp_path / 'whole'}"), quiet=True)
    assert same(load_checkpoint(tmp_path / "run"), load_checkpoint(tmp_path / "whole"))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.slow
def test_workers_and_a_stop_change_nothing(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["steps=6", "checkpoint.every=100"]
    alone = train(tiny(f"out={tmp_path / 'alone'}", *common), quiet=True)
    config = tiny(f"out={tmp_path / 'workers'}", *common, "data.workers=2")
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train(config, quiet=True)
    monkeypatch.undo()
    assert same(load_checkpoint(alone), load_checkpoint(train(config, quiet=True)))
    assert rows(alone) == rows(tmp_path / "workers")


def test_rows_after_the_checkpoint_are_dropped(tiny: Callable[..., Config]) -> None:
    """A kill between checkpoints: the rows of the lost steps must not appear twice."""
    config = tiny("method=baseline")
    folder = train(config, quiet=True)
    expected, state = rows(folder), load_checkpoint(folder)
    (folder / "checkpoints" / "step_00000004.pt").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # torn by the kill
    train(config, quiet=True)
    assert rows(folder) == expected
    assert same(load_checkpoint(folder), state)


def test_a_finished_run_stays_as_it_is(tiny: Callable[..., Config]) -> None:
    folder = train(tiny("method=baseline"), quiet=True)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    train(tiny("method=baseline"), quiet=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_moved_run_goes_on(tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(tiny("method=baseline"), quiet=True)
    monkeypatch.undo()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    train(tiny("method=baseline", f"out={tmp_path / 'moved'}"), quiet=True)
    assert [row["step"] for row in rows(tmp_path / "moved")] == [1, 2, 3, 4]


def test_the_same_seed_gives_the_same_run_and_another_another(tiny: Callable[..., Config]) -> None:
    first, again, other = (steps(Trainer(tiny(f"seed={seed}")), 2) for seed in (0, 0, 1))
    assert same(first.state_dict(), again.state_dict())
    assert not same(first.state_dict()["student"], other.state_dict()["student"])


def learner_views(run: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The learner's augmented views of three steps, before any mask."""
    seen = []
    make = step_module.make_views

    def recorded(*arguments: Any) -> Any:
        views = make(*arguments)
        seen.append((views.large.clone(), views.small.clone()))
        return views

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "make_views", recorded)
        steps(run, 3)
    return seen


def test_arms_begin_alike_and_see_the_same_views(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [Trainer(tiny(f"method={method}")) for method in METHODS]
    assert all(same(learner(runs[0]), learner(run)) for run in runs[1:])
    assert same(runs[0].steer.designer.state_dict(), runs[2].steer.designer.state_dict())
    seen = [learner_views(run, monkeypatch) for run in runs]
    assert len(seen[0]) == 3
    assert same(seen[0], seen[1])
    assert same(seen[0], seen[2])
    assert not same(learner(runs[0]), learner(runs[1]))  # while the arms did part


@pytest.mark.parametrize("method", ["value", "random"])
def test_before_burn_in_ends_an_arm_is_the_baseline(tiny: Callable[..., Config], method: str) -> None:
    """Bit for bit, stochastic depth included."""
    drop = "backbone.kwargs.drop_path_rate=0.3"
    arm = steps(Trainer(tiny(f"method={method}", "value.burn_in=5", drop)), 4)
    baseline = steps(Trainer(tiny("method=baseline", drop)), 4)
    assert same(learner(arm), learner(baseline))
    assert arm.steer.updates == 0


def test_value_and_random_differ_in_the_direction_alone(tiny: Callable[..., Config]) -> None:
    """Until φ has moved they fit the same heads and take the same first step of the head optimizers."""
    value, random = (steps(Trainer(tiny(f"method={method}", "designer.lr=0")), 3) for method in ("value", "random"))
    assert same(learner(value), learner(random))
    assert same([t.state_dict() for t in value.steer.feedback], [t.state_dict() for t in random.steer.feedback])
    found, expected = random.meters.read(), value.meters.read()
    for name in ("g_down_norm", "g_pre_norm", "loss_seg", "loss_depth"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert found["cosine"] != pytest.approx(expected["cosine"])


def test_stochastic_depth_is_the_same_in_every_arm(tiny: Callable[..., Config]) -> None:
    """Whole masks (keep nothing back) make value the baseline, unless its designer steps disturb the random state."""
    drop = "backbone.kwargs.drop_path_rate=0.5"
    value, baseline = Trainer(tiny("designer.lr=0", drop)), Trainer(tiny("method=baseline", drop))
    value.steer.update(0, 0.04)  # whose check would refuse masks that nothing moves
    torch.nn.init.constant_(value.steer.designer.out.bias, 1e4)  # type: ignore[union-attr,arg-type]
    assert same(learner(steps(value, 3)), learner(steps(baseline, 3)))
    assert value.steer.updates == 3


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_both_engines_take_the_same_designer_step(tiny: Callable[..., Config], drop: float) -> None:
    """With stochastic depth too: the value is measured on one function, not on four random ones."""
    gradients = []
    for engine in ("double_backward", "finite_difference"):
        run = Trainer(
            tiny(f"value.engine={engine}", "backbone.attention=math", f"backbone.kwargs.drop_path_rate={drop}")
        )
        run.steer.update(0, 0.04)
        gradients.append(torch.cat([p.grad.flatten() for p in run.steer.designer.parameters() if p.grad is not None]))
        assert run.student.training
    assert (gradients[1] - gradients[0]).norm() < 1e-2 * gradients[0].norm()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [1, 1, 2, 2, 3, 3]),
        (["value.period=1"], [1, 2, 3, 4, 5, 6]),
        (["value.burn_in=3"], [0, 0, 0, 1, 1, 2]),
        (["value.burn_in=1", "value.warmup=4"], [0, 5, 5, 6, 6, 7]),
    ],
)
def test_when_the_designer_is_updated(tiny: Callable[..., Config], overrides: list[str], expected: list[int]) -> None:
    run = Trainer(tiny(*overrides))
    assert [steps(run, 1).steer.updates for _ in range(6)] == expected


def test_heads_warm_up_once_and_then_take_their_updates(tiny: Callable[..., Config]) -> None:
    run = Trainer(tiny("feedback.updates=3", "feedback.warmup=4"))
    counts = [(steps(run, 1).steer.feedback[0].train.count, run.steer.feedback[0].meta.count) for _ in range(4)]
    assert counts == [(7, 1), (7, 1), (10, 2), (10, 2)]


def test_a_task_of_weight_zero_is_left_out(tiny: Callable[..., Config]) -> None:
    assert [task.kind for task in Trainer(tiny("feedback.seg.weight=0")).steer.feedback] == ["depth"]
    with pytest.raises(UserError, match="no feedback left"):
        Trainer(tiny("feedback.seg.weight=0", "feedback.depth.weight=0"))


def test_the_teacher_is_the_moving_average_of_the_student(tiny: Callable[..., Config]) -> None:
    run = Trainer(tiny("method=baseline", "steps=10"))
    expected = {name: value.clone() for name, value in run.teacher.named_parameters()}
    for step in range(3):
        steps(run, 1)
        momentum = cosine_schedule(step, 10, 0.9, 1.0)
        for name, value in run.student.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * value.detach()
    for name, value in run.teacher.named_parameters():
        torch.testing.assert_close(value, expected[name])
        assert not value.requires_grad


def test_learning_rate_and_weight_decay_follow_their_schedules(tiny: Callable[..., Config]) -> None:
    run = Trainer(
        tiny("method=baseline", "steps=8", "optim.warmup=3", "optim.weight_decay_end=0.4", "optim.lr_end=1e-5")
    )
    decayed, plain = run.optimizer.param_groups
    for step in range(8):
        steps(run, 1)
        assert decayed["lr"] == plain["lr"] == pytest.approx(cosine_schedule(step, 8, 1e-3, 1e-5, 3))
        assert decayed["weight_decay"] == pytest.approx(cosine_schedule(step, 8, 0.04, 0.4))
        assert plain["weight_decay"] == 0


def test_the_last_layer_is_frozen_at_first(tiny: Callable[..., Config]) -> None:
    run = Trainer(tiny("method=baseline", "objective.freeze_last_layer=2"))
    last, first = run.student.head.last_layer.weight, run.student.head.mlp.get_parameter("0.weight")
    before = last.clone(), first.clone()
    steps(run, 2)
    assert torch.equal(last, before[0])
    assert not torch.equal(first, before[1])
    steps(run, 1)
    assert not torch.equal(last, before[0])


def test_the_backbone_is_frozen_at_first(tiny: Callable[..., Config]) -> None:
    run = Trainer(tiny("method=baseline", "optim.freeze_backbone=2"))
    before = {name: value.clone() for name, value in run.student.backbone.state_dict().items()}
    head = run.student.head.mlp.get_parameter("0.weight").clone()
    steps(run, 2)
    assert same(dict(run.student.backbone.state_dict()), before)
    assert not torch.equal(run.student.head.mlp.get_parameter("0.weight"), head)
    steps(run, 1)
    assert not same(dict(run.student.backbone.state_dict()), before)


def test_gradients_are_clipped(tiny: Callable[..., Config]) -> None:
    run = steps(Trainer(tiny("method=baseline", "optim.clip=1e-3")), 1)
    norm = torch.cat([p.grad.flatten() for p in run.student.parameters() if p.grad is not None]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert run.meters.read()["gradient_norm"] > 1e-2  # what is logged is the norm before


def test_start_from_takes_the_teacher_of_another_run(tiny: Callable[..., Config], tmp_path: Path) -> None:
    first = train(tiny("method=baseline", f"out={tmp_path / 'first'}"), quiet=True)
    state = load_checkpoint(first)
    for source in (first, first / "checkpoints" / "step_00000004.pt"):
        run = Trainer(tiny(f"start_from={source}"))
        start_from(run, load_checkpoint(source))
        assert same(dict(run.student.state_dict()), state["teacher"])
        assert same(dict(run.teacher.state_dict()), state["teacher"])
        assert same(run.loss.state_dict(), state["objective"])
        assert run.step == 0
    second = train(tiny(f"start_from={first}", "steps=1"), quiet=True)
    assert load_checkpoint(second)["step"] == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["objective.out_dim=20"],
            r"heads of another size.*last_layer.* \[16, 8\] there, \[20, 8\] here.*backbone\.weights",
        ),
        (
            ["backbone.kwargs.embed_dim=48"],
            r"a backbone of another architecture: .*24\] there, .*48\] here; set backbone",
        ),
        (["backbone.kwargs.depth=4"], r"a backbone of another architecture: 12 tensors .*blocks\.3.*set backbone"),
        (
            ["objective.name=ijepa", "views.local_count=0", "views.global_size=32", *SMALL_PREDICTOR],
            r"heads of another size or objective: .*backbone\.weights in place of start_from",
        ),
    ],
    ids=["head", "width", "depth", "objective"],
)
def test_start_from_another_architecture(
    tiny: Callable[..., Config], tmp_path: Path, overrides: list[str], said: str
) -> None:
    first = train(tiny("method=baseline", "steps=1", f"out={tmp_path / 'first'}"), quiet=True)
    with pytest.raises(UserError, match=said) as caught:
        train(tiny("method=baseline", f"start_from={first}", *overrides), quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("namespace", [False, True])
def test_start_from_a_checkpoint_of_another_program(
    tiny: Callable[..., Config], tmp_path: Path, namespace: bool
) -> None:
    """DINO's own: what to give instead is said."""
    content: dict[str, object] = {"teacher": {"backbone.cls_token": torch.zeros(1, 1, 24)}, "student": {}}
    torch.save(content | ({"args": argparse.Namespace()} if namespace else {}), tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"of this program.*give backbone\.weights, and objective\.head") as caught:
        train(tiny("method=baseline", f"start_from={tmp_path / 'checkpoint.pth'}"), quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# Not finite: nothing is applied, and the message says what, when and where


def spoil(run: Trainer) -> None:
    with torch.no_grad():
        run.student.head.mlp.get_parameter("0.weight").fill_(float("nan"))


def test_a_loss_that_is_not_finite_stops_before_it_is_applied(tiny: Callable[..., Config]) -> None:
    run = steps(Trainer(tiny("method=baseline")), 1)
    spoil(run)
    before = {name: value.clone() for name, value in run.student.state_dict().items()}
    moments = [value.clone() for state in run.optimizer.state.values() for value in state.values()]
    centre = run.loss.center.clone()
    images = run.stream.indices(1).tolist()
    with pytest.raises(UserError) as caught:
        steps(run, 1)
    message = str(caught.value)
    assert message.startswith("step 1: loss and gradient_norm not finite; nothing was applied")
    assert f"Batch 1 of unlabeled: images {images}" in message
    for name, value in run.student.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert same([value for state in run.optimizer.state.values() for value in state.values()], moments)
    assert torch.equal(run.loss.center, centre)
    assert run.step == 1


def test_feedback_that_is_not_finite_stops_before_phi_moves(tiny: Callable[..., Config]) -> None:
    run = Trainer(tiny("designer.lr=1"))
    run.steer.update(0, 0.04)
    run.steer.feedback[1].weight = 1e38
    before = {name: value.clone() for name, value in run.steer.designer.state_dict().items()}
    images = run.steer.meta_stream.indices(1).tolist()
    with pytest.raises(UserError) as caught:
        run.steer.update(0, 0.04)
    assert "designer_gradient_norm not finite; nothing was applied" in str(caught.value)
    assert f"Batch 1 of meta unlabeled: images {images}" in str(caught.value)
    assert same(dict(run.steer.designer.state_dict()), before)


def test_the_feedback_task_that_went_wrong_is_named(tiny: Callable[..., Config]) -> None:
    run = Trainer(tiny())
    run.steer.update(0, 0.04)
    with torch.no_grad():
        run.steer.feedback[1].head.regress.bias.fill_(float("nan"))
    with pytest.raises(UserError, match=r"loss_depth not finite"):
        run.steer.update(0, 0.04)


# The run folder's own refusals


def test_a_run_with_other_settings_is_not_overwritten(tiny: Callable[..., Config], tmp_path: Path) -> None:
    folder = train(tiny("method=baseline"), quiet=True)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"holds a run with other settings \(optim\.lr: 0\.001 there, 0\.002 now\)"):
        train(tiny("method=baseline", "optim.lr=0.002"), quiet=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_left_alone(tiny: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty and not a run folder"):
        train(tiny("method=baseline"), quiet=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_run_refused_at_its_first_step_may_be_corrected(tiny: Callable[..., Config], tmp_path: Path) -> None:
    prepare_folder(tiny("method=baseline", "data.unlabeled=wrong"), tmp_path / "run")
    prepare_folder(tiny("method=baseline"), tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.yaml") == tiny("method=baseline")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("views.global_size=20", r"views\.global_size=20: not a multiple of the patch size 8 .* choose 16 or 24"),
        ("views.global_size=6", r"views\.global_size=6: .* smaller than one patch; choose 8 or more"),
        ("views.local_size=12", r"views\.local_size=12: not a multiple of the patch size 8 .* choose 8 or 16"),
        ("views.local_size=4", r"views\.local_size=4: .* smaller than one patch; choose 8 or more"),
        ("feedback.size=20", r"feedback\.size=20: not a multiple of the patch size 8; choose 16 or 24"),
        ("feedback.size=4", r"feedback\.size=4: not a multiple of the patch size 8; choose 8 or 16"),
        ("backbone.kwargs.drop_path_rate=1", r"backbone\.kwargs\.drop_path_rate=1: .* in \[0, 1\)"),
        ("value.scope.blocks=7", r"value\.scope: scope of the last 7 blocks: this learner has 3"),
        ("value.scope.patterns=[atn]", r"value\.scope: scope pattern 'atn' matches no parameter"),
        ("designer.stride=3", r"designer\.stride=3: must divide"),
        ("optim.batch_size=17", r"16 images are fewer than a batch of 17; lower the batch size"),
        ("value.batch_size=17", r"meta unlabeled: 16 images are fewer than a batch of 17; lower the batch size"),
        (
            "feedback.seg.meta=99",
            r"^feedback\.seg\.train=8, feedback\.seg\.meta=99: data\.ade20k=\S+/ade: cannot cut 8 \+ 99 labelled "
            r"samples, .* out of 14 in 14 groups: .*; feedback\.seg\.train=4, feedback\.seg\.meta=10 would do$",
        ),
        ("device=cuda:99", r"device=cuda:99: not available here"),
        ("device=toaster", r"device=toaster: not available here"),
    ],
)
def test_settings_that_do_not_fit_each_other(
    tiny: Callable[..., Config], tmp_path: Path, override: str, said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        train(tiny(override), quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_no_local_views(tiny: Callable[..., Config]) -> None:
    run = steps(Trainer(tiny("views.local_count=0", "designer.crops=all")), 3)
    assert torch.isfinite(torch.tensor(run.meters.read()["loss"]))


@pytest.mark.parametrize("model", ["vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_backbones_and_precisions(tiny: Callable[..., Config], model: str, precision: str) -> None:
    run = steps(Trainer(tiny(f"backbone.name={model}", f"precision={precision}")), 3)
    values = run.meters.read()
    assert all(torch.isfinite(torch.tensor(value)) for value in values.values())
    assert all(parameter.dtype == torch.float32 for parameter in run.student.parameters())


def test_data_in_memory(tiny: Callable[..., Config]) -> None:
    run = steps(Trainer(tiny("data.in_memory=true", "data.workers=2")), 2)
    assert isinstance(run.stream, Stream)
    assert run.stream.workers == 0


def test_feedback_keeps_apart_from_the_evaluation_and_says_which_images_it_used(
    tiny: Callable[..., Config], tiny_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_data / "ade", tmp_path / "ade")
    plain = train(tiny("method=value", "steps=1", f"data.ade20k={tmp_path / 'ade'}", f"out={tmp_path / 'plain'}"), True)
    before = json.loads((plain / "splits.json").read_text())
    assert [len(before["seg"][part]) for part in ("train", "meta", "in_evaluation")] == [8, 4, 0]
    assert [len(before["depth"][part]) for part in ("train", "meta", "in_evaluation")] == [6, 4, 0]
    copied = Path(before["seg"]["meta"][0])
    shutil.copy(copied, tmp_path / "ade" / "images" / "validation" / "another name.png")
    shutil.copy(
        tmp_path / "ade" / "annotations" / "validation" / "00.png",
        tmp_path / "ade" / "annotations" / "validation" / "another name.png",
    )
    apart = train(tiny("method=value", "steps=1", f"data.ade20k={tmp_path / 'ade'}", f"out={tmp_path / 'apart'}"), True)
    after = json.loads((apart / "splits.json").read_text())["seg"]
    assert after["in_evaluation"] == [str(copied)]
    assert str(copied) not in after["train"] + after["meta"]
    assert [len(after[part]) for part in ("train", "meta")] == [8, 4]


# Going on: damaged checkpoints, other settings, what is kept


def test_a_damaged_checkpoint_is_passed_over(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("steps=6")
    folder = train(config, quiet=True)
    expected, lines = load_checkpoint(folder), rows(folder)
    for step, harm in ((6, "flipped"), (4, "torn")):
        path = folder / "checkpoints" / f"step_{step:08d}.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content if harm == "flipped" else content[: len(content) // 2])
    (folder / "backbone.safetensors").unlink()
    train(config, quiet=True)
    said = capsys.readouterr().err.splitlines()
    assert ["set aside, going on from step_00000002.pt" in line for line in said] == [True, True]
    assert same(load_checkpoint(folder), expected)
    found = [row for row in rows(folder) if "event" not in row]
    assert found == lines
    assert (folder / "backbone.safetensors").is_file()


def test_weights_are_written_again_for_a_finished_run(tiny: Callable[..., Config]) -> None:
    folder = train(tiny("method=baseline"), quiet=True)
    path = folder / "backbone.safetensors"
    content, weights = path.read_bytes(), load_file(path)
    path.unlink()
    for _ in range(2):
        train(tiny("method=baseline"), quiet=True)
        assert same(load_file(path), weights)
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])  # one bit of a weight
    with pytest.raises(UserError, match="the command that trained it writes it again"):
        load_backbone(folder)


def test_other_settings_are_taken_when_told(tiny: Callable[..., Config], tmp_path: Path) -> None:
    train(tiny("method=baseline", "steps=2"), quiet=True)
    later = tiny("method=baseline", "steps=4", "optim.lr=0.002")
    with pytest.raises(UserError, match=r"optim\.lr: 0\.001 there, 0\.002 now; steps: 2 there, 4 now.*--override"):
        train(later, quiet=True)
    folder = train(later, quiet=True, override=True)
    assert load_checkpoint(folder)["step"] == 4
    assert load_config(folder / "config.yaml") == later
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["resumed"][0]["changed"] == [
        "optim.lr: 0.001 there, 0.002 now",
        "steps: 2 there, 4 now",
    ]
    with pytest.raises(UserError, match=r"does not fit these settings \(.*size mismatch.*choose another out="):
        train(tiny("method=baseline", "objective.out_dim=20"), quiet=True, override=True)


def test_checkpoints_of_earlier_versions_go_on(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny("method=baseline")
    folder = train(config, quiet=True)
    state = load_checkpoint(folder)
    (folder / "checkpoints" / "step_00000004.pt").unlink()
    older = folder / "checkpoints" / "step_00000002.pt"
    content = load_checkpoint(older)
    del content["best"], content["skipped"]
    torch.save(content, older)
    settings = (folder / "config.yaml").read_text()
    assert "  flip: 0.5\n" in settings
    (folder / "config.yaml").write_text(settings.replace("  flip: 0.5\n", ""))  # then it was 0.5 for all
    train(config, quiet=True)
    assert same(load_checkpoint(folder), state)


def test_what_is_kept_of_a_run(tiny: Callable[..., Config]) -> None:
    common = ["method=baseline", "steps=8", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_every=4"]
    folder = train(tiny(*common, "checkpoint.best=loss", "checkpoint.best_mode=max"), quiet=True)
    losses = {row["step"]: row["loss"] for row in read_metrics(folder)}
    best = max(losses, key=lambda step: losses[step])
    kept = sorted({4, 8, best})
    found = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert found == ["best.pt", *(f"step_{step:08d}.pt" for step in kept)]
    assert load_checkpoint(folder / "checkpoints" / "best.pt")["step"] == best


def test_writing_in_the_background_changes_nothing(tiny: Callable[..., Config], tmp_path: Path) -> None:
    plain, beside = (
        train(tiny(f"out={tmp_path / name}", "steps=6", f"checkpoint.background={name}"), quiet=True)
        for name in ("false", "true")
    )
    for step in (2, 4, 6):
        name = f"step_{step:08d}.pt"
        assert same(load_checkpoint(plain / "checkpoints" / name), load_checkpoint(beside / "checkpoints" / name))
    assert same(load_file(plain / "backbone.safetensors"), load_file(beside / "backbone.safetensors"))


def test_a_stop_during_set_up(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = train_module.record_environment

    def interrupted(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)
        record(*arguments)

    monkeypatch.setattr(train_module, "record_environment", interrupted)
    monkeypatch.setattr(process_module, "GRACE", 60.0)
    with pytest.raises(Interrupted, match="stopped at step 0 of 4; the same command goes on from there"):
        train(tiny("method=baseline"), quiet=True)
    monkeypatch.undo()
    assert load_checkpoint(train(tiny("method=baseline"), quiet=True))["step"] == 4


@pytest.mark.slow
def test_the_number_of_workers_may_change_and_the_group_may_be_signalled(
    tiny_yaml: Path, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """Augmentation drawn in loader processes; SIGTERM reaches these too, as on a cluster, and all is saved."""
    common = ["steps=60", "checkpoint.every=10000", "views.augment=torchvision", "value.engine=finite_difference"]
    alone = train(tiny(f"out={tmp_path / 'alone'}", *common), quiet=True)
    out = tmp_path / "group"
    command = [sys.executable, "-m", "dino_value.cli", "train", str(tiny_yaml), f"out={out}", *common, "data.workers=2"]
    running = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        waited = time.monotonic()
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
            assert running.poll() is None
            assert time.monotonic() - waited < 240
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGTERM)
        _, errors = running.communicate(timeout=240)
    finally:
        running.kill()
    assert running.returncode == 75, errors
    assert 0 < load_checkpoint(out)["step"] < 60
    train(tiny(f"out={out}", *common, "data.workers=1"), quiet=True)
    assert same(load_checkpoint(alone), load_checkpoint(out))
