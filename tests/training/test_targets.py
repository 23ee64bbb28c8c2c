"""Runs whose targets are moved, whose direction is a lookahead, and the oracle; classes of images as feedback."""

from __future__ import annotations

import copy
import itertools
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dino_value.config import Config
from dino_value.data.sampling import generator
from dino_value.distributed.fsdp import check_sharding
from dino_value.errors import UserError
from dino_value.models.backbone import Features
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.metrics import read_metrics
from dino_value.training import lookahead as lookahead_module
from dino_value.training.feedback import FeedbackTask
from dino_value.training.lookahead import Labelled, labelled_loss, labelled_state, look_ahead, shuffled
from dino_value.training.trainer import Trainer, train
from dino_value.value import Gradient, alignment, contrast, inner, mean_gradient, norm

Make = Callable[..., Config]

TARGETS = ["designer=targets"]
AHEAD = ["value.direction=lookahead", "value.lookahead.steps=3"]
UNBOUND = ["designer.kl=null", "designer.strength=null"]
GRID = ["views.global_size=32"]
IBOT = [*GRID, "objective.ibot.weight=1"]
IJEPA = [*GRID, "views.local_count=0", "objective.name=ijepa", "objective.ijepa.context_least=1"]
IJEPA += ["objective.ijepa.width=8", "objective.ijepa.depth=1", "objective.ijepa.heads=2"]
OBJECTIVES = {
    "dino": [],
    "ibot": IBOT,
    "ibot, a head of its own, koleo, gram": [
        *IBOT,
        "objective.ibot.separate_head=true",
        "objective.koleo=0.1",
        "objective.gram.weight=1",
    ],
    "ijepa": IJEPA,
    "sinkhorn": ["objective.centering=sinkhorn"],
}


def steps(run: Trainer, count: int) -> Trainer:
    for large, small in run.stream.iterate(run.step, run.step + count):
        run.learner_update(large, small)
    return run


def tensors(state: Any) -> Iterable[Tensor]:
    """Every tensor of a tree, in order."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors(value)


def same(left: Any, right: Any) -> bool:
    pairs = list(tensors(left)), list(tensors(right))
    return len(pairs[0]) == len(pairs[1]) and all(map(torch.equal, *pairs))


def theta(run: Trainer) -> dict[str, Any]:
    """Student, teacher, centre and the learner's optimizer."""
    state = run.state_dict()
    return {name: copy.deepcopy(state[name]) for name in ("student", "teacher", "objective", "optimizer")}


def logged(folder: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(folder) if name in row]


class Relabelled:
    """A source whose labels are made of the image and the label; images, groups and order as they were."""

    def __init__(self, source: Any, label: Callable[[Tensor, Any], Any]) -> None:
        self._source, self._label = source, label

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def load(self, index: int) -> tuple[Tensor, Any]:
        image, target = self._source.load(index)
        return image, self._label(image, target)


def relabel(run: Trainer, **labels: Callable[[Tensor, Any], Any]) -> Trainer:
    """With other labels of each kind; by default with other ones than they are."""

    def other(kind: str, classes: int) -> Callable[[Tensor, Any], Any]:
        return lambda image, target: 9 - target.flip(0) if kind == "depth" else (target + 1) % classes

    for task in run.feedback:
        label = labels.get(task.kind) or other(task.kind, task.source.num_classes)
        for stream in (task.train_stream, task.meta_stream):
            stream.source.source = Relabelled(stream.source.source, label)  # type: ignore[attr-defined]
    return run


# Nothing to move


@pytest.mark.parametrize("nothing", ["designer.strength=0", "designer.kl=0"])
@pytest.mark.parametrize("name", ["targets", "random_targets"])
@pytest.mark.parametrize("overrides", [[], IBOT, IJEPA], ids=["dino", "ibot", "ijepa"])
def test_targets_that_may_not_move_are_the_baseline(tiny: Make, overrides: list[str], name: str, nothing: str) -> None:
    """Bit for bit, stochastic depth included, though heads are fitted and directions made."""
    common = [*overrides, "backbone.kwargs.drop_path_rate=0.3"]
    arm = steps(Trainer(tiny(*common, *AHEAD, f"designer={name}", nothing)), 4)
    assert same(theta(arm), theta(steps(Trainer(tiny("method=baseline", *common)), 4)))
    assert (arm.steer.direction is not None) == (name == "targets")  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["targets", "random_targets"])
def test_before_burn_in_ends_targets_stay(tiny: Make, name: str) -> None:
    arm, plain = (Trainer(tiny(*given)) for given in ([f"designer={name}", "value.burn_in=3"], ["method=baseline"]))
    assert same(theta(steps(arm, 3)), theta(steps(plain, 3)))
    assert not same(theta(steps(arm, 1)), theta(steps(plain, 1)))


# The trust region


@pytest.mark.parametrize("name", ["targets", "random_targets"])
@pytest.mark.parametrize("overrides", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_no_step_exceeds_the_budget_and_every_one_is_worth_more(tiny: Make, overrides: list[str], name: str) -> None:
    """At each step: the divergence of each part of the loss, and ⟨u, g_pre⟩ without and with the moved targets."""
    given = [f"designer={name}", *AHEAD, "designer.kl=0.05", "designer.strength=null", "steps=6", *overrides]
    folder = train(tiny(*given), quiet=True)
    parts = ["ijepa"] if overrides == IJEPA else ["dino", *(["ibot"] if overrides[:2] == IBOT else [])]
    found = {key for row in read_metrics(folder) for key in row if key.startswith("target_kl_")}
    assert found == {f"target_kl_{part}" for part in parts}
    for part in parts:
        spent, strengths = (logged(folder, f"target_{key}_{part}") for key in ("kl", "strength"))
        assert len(spent) == 6
        assert all(0.049 < one <= 0.05 * (1 + 1e-6) for one in spent)
        assert all(strength > 0 for strength in strengths)
    plain, moved, best = (logged(folder, f"{key}_value") for key in ("plain", "moved", "best"))
    assert len(plain) == len(moved) == 6
    assert all(before < after for before, after in zip(plain, moved, strict=True))
    if overrides != IJEPA:  # a point has no best place
        assert all(after < most for after, most in zip(moved, best, strict=True))


@pytest.mark.parametrize("overrides", [[], IBOT, IJEPA], ids=["dino", "ibot", "ijepa"])
def test_the_logged_values_are_those_of_the_learners_gradients(tiny: Make, overrides: list[str]) -> None:
    """⟨u, g_pre⟩ by autograd, with targets as they were and as they are, on a direction near enough to be a slope."""
    given = [*overrides, "optim.lr=0", "optim.clip=inf", "value.period=1", "designer.kl=0.1"]
    found, values = {}, {}
    for name in ("plain", "moved"):
        run = Trainer(tiny(*TARGETS, "value.direction=dot", *given))
        with torch.no_grad():  # a fresh predictor hardly looks at its context: values would drown in rounding
            for parameter in run.student.head.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(0, "stir", parameter.numel())))
        if name == "plain":
            run.loss.move = lambda targets, here, there, mover, move=run.loss.move: (  # type: ignore[method-assign]
                move(targets, here, there, mover),
                targets,
            )[1]
        steps(run, 1)
        values[name] = run.meters.read()
        named = dict(run.student.backbone.named_parameters())
        gradient = [named[key].grad for key in run.steer.scope.names]  # type: ignore[union-attr]
        found[name] = float(inner(run.steer.direction, gradient))  # type: ignore[union-attr,arg-type]
    for name, value in found.items():
        assert values[name][f"{name}_value"] == pytest.approx(value, rel=0.05, abs=0.02 * abs(found["moved"]))
    assert found["moved"] > found["plain"]


def test_a_strength_in_place_of_a_budget(tiny: Make) -> None:
    values = steps(Trainer(tiny(*TARGETS, *AHEAD, "designer.kl=null", "designer.strength=0.7")), 1).meters.read()
    assert values["target_strength_dino"] == pytest.approx(0.7)
    both = steps(Trainer(tiny(*TARGETS, *AHEAD, "designer.kl=50", "designer.strength=0.7")), 1).meters.read()
    assert both["target_strength_dino"] == pytest.approx(0.7)


def test_passes_of_a_step_each_keep_the_budget(tiny: Make) -> None:
    run = Trainer(tiny(*TARGETS, *AHEAD, *IBOT, "optim.accumulate=2", "designer.kl=0.05"))
    for _ in range(3):
        values = steps(run, 1).meters.read()
        assert values["target_kl_dino"] <= 0.05 * (1 + 1e-6)
        assert values["moved_value"] > values["plain_value"]


# Every direction with every designer


DIRECTIONS = {
    "dot": ["value.direction=dot"],
    "cosine": ["value.direction=cosine"],
    "adam": ["value.direction=adam", "value.burn_in=20", "steps=24"],
    "lookahead": AHEAD,
    "contrast": [*AHEAD, "value.lookahead.contrast=true", "value.lookahead.optimizer=sgd", "value.lookahead.lr=0.1"],
    "random": ["value.direction=random"],
    "method=random": ["method=random"],
    "method=random, lookahead": ["method=random", *AHEAD],
}


@pytest.mark.parametrize("name", ["targets", "weights", "best_of_n", "unet", "unet+targets"])
@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS.keys())
def test_every_direction_steers_every_designer(tiny: Make, name: str, direction: list[str]) -> None:
    run = Trainer(tiny(f"designer={name}", *direction, "views.local_count=2", "designer.candidates=2"))
    burn_in, steer = run.config.value.burn_in, run.steer
    assert steer is not None
    steps(run, burn_in).meters.read()
    values: dict[str, float] = {}
    for _ in range(4):
        values |= steps(run, 1).meters.read()
    assert steer.updates == 2
    assert all(math.isfinite(value) for value in values.values())
    assert steer.direction is not None
    assert ("lookahead_norm" in values) == (run.config.value.direction == "lookahead")
    if "lookahead" in direction[0] and run.config.method == "value":
        assert values["lookahead_norm"] == pytest.approx(values["g_down_norm"]) != 0
    assert ("target_kl_dino" in values) == ("targets" in name)
    assert ("mask_mean" in values) == ("unet" in name)
    if "unet" not in name:  # masks alone part the arms
        plain = steps(Trainer(tiny("method=baseline", f"steps={run.config.steps}")), burn_in + 4)
        assert not same(theta(run)["student"], theta(plain)["student"])


# An update of the direction


@pytest.mark.parametrize("more", [[], ["value.lookahead.contrast=true"], ["value.scope.patterns=[.]"]])
@pytest.mark.parametrize("designer", ["targets", "unet+targets"])
def test_an_update_with_a_lookahead_leaves_the_learner_as_it_was(tiny: Make, designer: str, more: list[str]) -> None:
    """Student, teacher, optimizer, buffers, gradients; and whether they train."""
    run = steps(Trainer(tiny(f"designer={designer}", *AHEAD, *more, "value.lookahead.lr=0.1")), 1)
    steer = run.steer
    assert steer is not None
    before, flags = (
        theta(run),
        [(part.training, [p.requires_grad for p in part.parameters()]) for part in run.student.modules()],
    )
    buffers = [value.clone() for value in run.student.buffers()]
    marks = []
    for parameter in [*run.student.parameters(), *run.teacher.parameters()]:
        parameter.grad = torch.full_like(parameter, 7.0)
        marks.append((parameter, parameter.grad))
    direction = steer.direction
    steer.update(2, 0.04)
    steer.update_if_due(2, 0.04)
    assert steer.updates == 3
    assert same(before, theta(run))
    assert same(buffers, list(run.student.buffers()))
    assert all(parameter.grad is mark and bool((mark == 7).all()) for parameter, mark in marks)
    assert flags == [(part.training, [p.requires_grad for p in part.parameters()]) for part in run.student.modules()]
    assert not same(direction, steer.direction)
    assert float(norm(steer.direction)) > 1e-2  # type: ignore[arg-type]
    assert not any(part.requires_grad for part in steer.direction)  # type: ignore[union-attr]


def ahead(run: Trainer, number: int = 0) -> tuple[Gradient, dict[str, Tensor]]:
    assert run.steer is not None
    return look_ahead(run.steer.feedback, run.student.backbone, run.steer.scope, run.config, number, run.device)


def test_the_heads_that_tasks_keep_do_not_look_ahead(tiny: Make) -> None:
    run = Trainer(tiny(*TARGETS, *AHEAD))
    kept = [copy.deepcopy((task.head.state_dict(), task.optimizer.state_dict())) for task in run.feedback]
    training = [task.head.training for task in run.feedback]
    u, found = ahead(run)
    assert same(kept, [(task.head.state_dict(), task.optimizer.state_dict()) for task in run.feedback])
    assert training == [task.head.training for task in run.feedback]
    assert all(parameter.grad is None for task in run.feedback for parameter in task.head.parameters())
    assert found["lookahead_norm"] == norm(u)
    assert found["lookahead_after"] < found["lookahead_before"]


def test_one_step_of_sgd_is_the_gradient_of_all_tasks_with_their_weights(tiny: Make) -> None:
    """Of heads in training mode, on the next head-train batches; against autograd through the whole backbone."""
    run = Trainer(
        tiny(
            *TARGETS,
            "value.direction=lookahead",
            "value.lookahead.steps=1",
            "value.lookahead.optimizer=sgd",
            "value.lookahead.lr=0.5",
        )
    )
    assert run.steer is not None
    backbone = copy.deepcopy(run.student.backbone)
    named = dict(backbone.named_parameters())
    losses = []
    for task in run.feedback:
        images, labels = task.train_stream.batch(task.train.count)
        losses.append(
            task.weight * task.loss(backbone(backbone.normalise(images)), labels, copy.deepcopy(task.head).train())
        )
    assert [task.weight for task in run.feedback] == [1, 8]
    expected = torch.autograd.grad(sum(losses), [named[name] for name in run.steer.scope.names])
    u, found = ahead(run)
    assert float(found["lookahead_before"]) == pytest.approx(float(sum(losses).detach()), rel=1e-5)  # type: ignore[union-attr]
    for mine, theirs in zip(u, expected, strict=True):
        torch.testing.assert_close(mine, 0.5 * theirs, rtol=1e-3, atol=1e-6)


def test_the_shadows_rate_is_the_learners_unless_it_is_given(tiny: Make) -> None:
    lengths = []
    for given in ([], ["value.lookahead.lr=1e-3"], ["value.lookahead.lr=2e-3"]):
        lengths.append(float(norm(ahead(Trainer(tiny(*TARGETS, *AHEAD, *given)))[0])))
    assert lengths[0] == lengths[1] < 0.7 * lengths[2]


@pytest.mark.parametrize(("batches", "expected"), [(0, [0, 1, 2, 3, 4]), (2, [0, 1, 0, 1, 0]), (9, [0, 1, 2, 3, 4])])
def test_batches_are_shared_in_turn(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, batches: int, expected: list[int]
) -> None:
    run = Trainer(
        tiny(*TARGETS, "value.direction=lookahead", "value.lookahead.steps=5", f"value.lookahead.batches={batches}")
    )
    drawn: list[Labelled] = []
    used: list[Labelled] = []

    def made(*arguments: Any) -> Labelled:
        drawn.append(labelled_state(*arguments))
        return drawn[-1]

    def spent(task: FeedbackTask, head: nn.Module, batch: Labelled, *rest: Any) -> Tensor:
        used.append(batch)
        return labelled_loss(task, head, batch, *rest)

    monkeypatch.setattr(lookahead_module, "labelled_state", made)
    monkeypatch.setattr(lookahead_module, "labelled_loss", spent)
    counts = [task.train.count for task in run.feedback]
    ahead(run)
    each = len(set(expected))
    assert [task.train.count - count for task, count in zip(run.feedback, counts, strict=True)] == [each] * 2
    for place in range(2):  # the tasks take turns within a step
        own = drawn[each * place : each * (place + 1)]
        found = [next(i for i, batch in enumerate(own) if batch is one) for one in used[place::2][:5]]
        assert found == expected
    assert len(used) == 2 * (5 + 1)  # and the first batch again, for the loss that is left


# Contrast


def test_labels_that_say_nothing_have_no_contrast(tiny: Make) -> None:
    """All maps alike: shuffled they are the same labels, and the difference is zero to the last bit."""
    run = Trainer(tiny(*TARGETS, *AHEAD, "value.lookahead.contrast=true"))
    labels = {
        "seg": lambda image, target: torch.arange(target.numel()).view(target.shape).remainder(3),
        "depth": lambda image, target: torch.full_like(target, 2.0),
    }
    # Not by chance flipped: a flip would make two maps of one.
    for task in run.feedback:
        task.train_stream.source.flip = False  # type: ignore[attr-defined]
    relabel(run, **labels)
    u, found = ahead(run)
    assert all(not part.any() for part in u)
    assert found["lookahead_norm"] == 0
    assert found["lookahead_after"] < found["lookahead_before"]  # while the shadow itself did move


def test_a_contrast_takes_out_what_shuffled_labels_ask_for(tiny: Make) -> None:
    """Over many draws the contrast of shuffled labels averages away; that of labels made of the image does not."""
    run = Trainer(
        tiny(*TARGETS, *AHEAD, "feedback.depth.weight=0", "value.lookahead.steps=8", "value.lookahead.lr=1e-3")
    )
    assert run.steer is not None
    backbone, scope = run.student.backbone, run.steer.scope
    # A label that patches can tell: each image is one colour, which is its class.
    source = run.feedback[0].train_stream.source

    class Coloured(Relabelled):
        def load(self, index: int) -> tuple[Tensor, Any]:
            image, target = self._source.load(index)
            return torch.full_like(image, (40, 120, 220)[index % 3]), torch.full_like(target, index % 3)

    source.source = Coloured(source.source, lambda image, target: target)  # type: ignore[attr-defined]
    tasks = run.steer.feedback
    batches = [[labelled_state(task, backbone, scope, run.device) for _ in range(4)] for task in tasks]

    def u(given: list[list[Labelled]]) -> Gradient:
        return lookahead_module._run(tasks, backbone, scope, run.config, given)[0].u

    def mixed(number: int) -> list[list[Labelled]]:
        return [shuffled(part, generator(0, "mixed", number)) for part in batches]

    count = 16
    told = [contrast(u(batches), u(mixed(number))) for number in range(count)]
    noise = [contrast(u(mixed(100 + number)), u(mixed(200 + number))) for number in range(count)]

    def kept(found: list[Gradient]) -> float:
        """The mean's length, as a share of the lengths."""
        mean = mean_gradient(found)
        return float(norm(mean)) / (sum(float(norm(one)) for one in found) / count)

    assert kept(told) > 0.6
    assert kept(noise) < 0.45


def test_shuffling_keeps_labels_and_images_and_parts_them() -> None:
    batches = [Labelled(torch.full((3, 1), float(n)), torch.arange(3) + 3 * n) for n in range(4)]
    found = shuffled(batches, torch.Generator().manual_seed(0))
    assert all(torch.equal(mine.state, theirs.state) for mine, theirs in zip(found, batches, strict=True))
    labels = torch.cat([batch.labels for batch in found])
    assert labels.sort().values.tolist() == list(range(12))
    assert sum(int(label) // 3 != number // 3 for number, label in enumerate(labels.tolist())) > 4  # over all batches
    again = shuffled(batches, torch.Generator().manual_seed(1))
    assert not torch.equal(labels, torch.cat([batch.labels for batch in again]))


def test_labels_are_shuffled_anew_for_each_lookahead(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trainer(tiny(*TARGETS, *AHEAD, "value.lookahead.contrast=true", "value.period=1"))
    seen: list[Tensor] = []

    def watched(batches: Any, drawn: torch.Generator) -> Any:
        seen.append(torch.randperm(50, generator=torch.Generator().set_state(drawn.get_state())))
        return shuffled(batches, drawn)

    monkeypatch.setattr(lookahead_module, "shuffled", watched)
    steps(run, 3)
    assert len(seen) == 6  # of two tasks
    assert len({tuple(order.tolist()) for order in seen[::2]}) == 3


# Labels reach θ through u alone


STEERED = {
    "lookahead": AHEAD,
    "contrast": [*AHEAD, "value.lookahead.contrast=true"],
    "dot": ["value.direction=dot"],
    "two images": [*AHEAD, "optim.accumulate=2", *IBOT],
}


@pytest.mark.parametrize("overrides", STEERED.values(), ids=STEERED.keys())
def test_labels_enter_nothing_but_the_evaluators_loss(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    """With that loss cut off from them, a run with other labels is the same run, heads and direction included."""

    def blind(self: Any, features: Features, labels: Tensor, head: nn.Module | None = None) -> Tensor:
        return (head or self.head)(self.label.read(features)).square().mean()

    monkeypatch.setattr(FeedbackTask, "loss", blind)
    if "value.lookahead.contrast=true" in overrides:  # of a loss without labels there is none: its check would say so
        monkeypatch.setattr("dino_value.training.designer_update.check_start", lambda *arguments: None)
    truth, false = steps(Trainer(tiny(*TARGETS, *overrides)), 4), steps(relabel(Trainer(tiny(*TARGETS, *overrides))), 4)
    assert same(truth.state_dict(), false.state_dict())


@pytest.mark.parametrize("overrides", STEERED.values(), ids=STEERED.keys())
def test_where_targets_may_not_move_labels_cannot_change_theta_and_else_they_do(
    tiny: Make, overrides: list[str]
) -> None:
    for given, equal in (["designer.kl=0"], True), (["designer.kl=0.1"], False):
        truth, false = (change(Trainer(tiny(*TARGETS, *overrides, *given))) for change in (lambda run: run, relabel))
        assert same(theta(steps(truth, 3)), theta(steps(false, 3))) is equal
        assert not same(truth.steer.direction, false.steer.direction)  # type: ignore[union-attr]


@pytest.mark.parametrize("overrides", [[], IBOT, IJEPA], ids=["dino", "ibot", "ijepa"])
def test_theta_steps_on_the_self_supervised_loss_to_constant_moved_targets(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    """The gradient of the step, against autograd through the whole student."""
    run = steps(Trainer(tiny(*TARGETS, *AHEAD, *overrides, "optim.clip=inf", "designer.strength=null")), 1)
    student, kept = copy.deepcopy(run.student), {}
    states, move = run.loss.states, run.loss.move

    def seen(learner: Any, views: Any, start: Any, draw: Any) -> Any:
        kept["views"], kept["draw"] = views, draw
        return states(learner, views, start, draw)

    def watched(targets: Any, *arguments: Any) -> Any:
        kept["targets"], kept["moved"] = targets, move(targets, *arguments)
        return kept["moved"]

    monkeypatch.setattr(run.loss, "states", seen)
    monkeypatch.setattr(run.loss, "move", watched)
    steps(run, 1)
    assert not any(part.requires_grad for part in kept["moved"].values())
    draw = kept["draw"]
    gradients = []
    for targets in (kept["moved"], kept["targets"]):
        predictions = run.loss.predict(student, states(student, kept["views"], None, draw), None, draw)
        loss = run.loss.total(run.loss.parts(run.loss.terms_of(predictions, targets), draw))
        gradients.append(torch.autograd.grad(loss, list(student.parameters()), allow_unused=True))
    found = [parameter.grad for parameter in run.student.parameters()]
    for mine, expected in zip(found, gradients[0], strict=True):
        if expected is not None:
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-6)
    both = [[part for part in each if part is not None] for each in gradients]
    assert float(alignment(*both)) < 0.999  # and not the plain one


# Precision and stochastic depth


def test_what_draws_at_random_in_the_learners_forward_pass_is_known(tiny: Make) -> None:
    for given, draws in (
        ([], False),
        (["backbone.kwargs.drop_path_rate=0.3"], True),
        (["backbone.kwargs.drop_path_rate=0.3", "backbone.drop_path_mode=subset"], True),
        (["backbone.kwargs.proj_drop_rate=0.1"], True),
        (["backbone.kwargs.patch_drop_rate=0.5"], True),
    ):
        steer = Trainer(tiny(*TARGETS, *AHEAD, *given)).steer
        assert steer is not None
        assert steer._draws is draws, given


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("drop", [[], ["backbone.kwargs.drop_path_rate=0.5"]], ids=["", "drop"])
@pytest.mark.parametrize("overrides", [[], IBOT, IJEPA], ids=["dino", "ibot", "ijepa"])
def test_a_direction_of_zero_is_no_change_at_all(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, overrides: list[str], drop: list[str], precision: str
) -> None:
    """Both ends are one function in one precision: with stochastic depth the learner's own predictions are not, and
    a second pass is taken at θ."""
    run = steps(Trainer(tiny(*TARGETS, *AHEAD, *overrides, *drop, f"precision={precision}")), 1)
    steer = run.steer
    assert steer is not None
    assert steer.direction is not None
    steer.direction = [torch.zeros_like(part) for part in steer.direction]
    ends: list[Any] = []
    passes: list[bool] = []
    move, predict = run.loss.move, run.loss.predict

    def moved(targets: Any, here: Any, there: Any, mover: Any) -> Any:
        ends.append((here, there))
        return move(targets, here, there, mover)

    def said(student: Any, *arguments: Any) -> Any:
        passes.append(student.training)
        return predict(student, *arguments)

    monkeypatch.setattr(run.loss, "move", moved)
    monkeypatch.setattr(run.loss, "predict", said)
    run.meters.read()
    steps(run, 1)
    assert passes == ([True, False, False] if drop else [True, False])
    ((here, there),) = ends
    for name in here:
        assert torch.equal(here[name], there[name]), name
        assert not here[name].requires_grad
    spent = [value for name, value in run.meters.read().items() if name.startswith("target_kl")]
    assert spent
    assert max(spent) < 1e-5
    assert run.student.training


@pytest.mark.parametrize("overrides", [[], IBOT, IJEPA], ids=["dino", "ibot", "ijepa"])
def test_the_far_end_is_the_shadows_own_prediction(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    """Of a student whose parameters in the scope are θ − u, whole and uncut."""
    run = steps(Trainer(tiny(*TARGETS, *AHEAD, *overrides)), 1)
    steer = run.steer
    assert steer is not None
    assert steer.direction is not None
    student, u = copy.deepcopy(run.student), [part.clone() for part in steer.direction]
    kept: list[Any] = []
    states, move = run.loss.states, run.loss.move
    monkeypatch.setattr(
        run.loss,
        "states",
        lambda student, views, start, draw: kept.append((views, draw)) or states(student, views, start, draw),
    )
    monkeypatch.setattr(
        run.loss, "move", lambda targets, here, there, mover: kept.append(there) or move(targets, here, there, mover)
    )
    steps(run, 1)
    (views, draw), there = kept
    named = dict(student.backbone.named_parameters())
    with torch.no_grad():
        for name, part in zip(steer.scope.names, u, strict=True):
            named[name].sub_(part)
        expected = run.loss.predict(student, states(student, views, None, draw), None, draw)
    for name, value in expected.items():
        torch.testing.assert_close(there[name], value, rtol=1e-4, atol=1e-4)


# What must survive a stop


RESUMED = {
    "lookahead": [*TARGETS, *AHEAD],
    "contrast, bf16, stochastic depth": [
        *TARGETS,
        *AHEAD,
        "value.lookahead.contrast=true",
        "value.lookahead.batches=2",
        "precision=bf16",
        "backbone.kwargs.drop_path_rate=0.3",
    ],
    "masks and targets, a guard": ["designer=unet+targets", *AHEAD, "feedback.depth.guard=true"],
    "random, averaged": [*TARGETS, "method=random", "feedback.ema=0.5", "value.period=1"],
    "random, kept": [*TARGETS, "method=random", "feedback.refresh=2", "value.period=1"],
    "random targets": ["designer=random_targets", *IBOT],
    "oracle": ["method=oracle", *AHEAD],
    "masks and best of n, Adam, a guard": [
        "designer=unet+best_of_n",
        "designer.candidates=2",
        "value.direction=adam",
        "value.burn_in=20",
        "steps=23",
        "feedback.depth.guard=true",
    ],
}


@pytest.mark.parametrize("overrides", RESUMED.values(), ids=RESUMED.keys())
def test_a_run_that_pauses_is_the_run_that_does_not(tiny: Make, tmp_path: Path, overrides: list[str]) -> None:
    """At a step between two updates."""
    common = ["steps=4", "log_every=1", "checkpoint.every=100", *overrides]
    whole = train(tiny(f"out={tmp_path / 'whole'}", *common), quiet=True)
    parted = tiny(f"out={tmp_path / 'parted'}", *common)
    for until in (parted.value.burn_in + 1, None):
        train(parted, quiet=True, until=until)
    left, right = load_checkpoint(whole), load_checkpoint(tmp_path / "parted")
    assert same(left, right)
    assert same(left["steer"]["direction"], right["steer"]["direction"])
    timing = ("images_per_second", "data_wait", "seconds", "cpu_seconds")
    rows = [
        [{key: value for key, value in row.items() if key not in timing} for row in read_metrics(folder)]
        for folder in (whole, tmp_path / "parted")
    ]
    assert rows[0] == rows[1]


# The random arm


def directions(config: Config, count: int) -> list[Gradient]:
    run, found = Trainer(config), []
    for _ in range(count):
        steps(run, 1)
        assert run.steer is not None
        found.append([part.clone() for part in run.steer.direction or []])
    return found


def test_a_random_direction_changes_when_the_real_one_does(tiny: Make) -> None:
    """And has its norms, tensor by tensor; targets stay, so that the learners are one."""
    given = [*TARGETS, "designer.kl=0", "value.period=1", "feedback.refresh=3", "steps=8"]
    real, noise = (directions(tiny(*given, f"method={method}"), 8) for method in ("value", "random"))
    expected = [step in (3, 6) for step in range(1, 8)]
    for found in (real, noise):
        assert [not same(found[step], found[step - 1]) for step in range(1, 8)] == expected
    for mine, theirs in zip(noise, real, strict=True):
        for part, like in zip(mine, theirs, strict=True):
            assert float(part.norm()) == pytest.approx(float(like.norm()), rel=1e-4)
    assert abs(float(alignment(noise[0], real[0]))) < 0.3  # a few tensors hold most of the length
    assert abs(float(alignment(noise[0], noise[3]))) < 0.3


def test_a_random_direction_turns_as_slowly_as_an_averaged_one(tiny: Make) -> None:
    given = [*TARGETS, "designer.kl=0", "value.period=1", "method=random", "steps=8"]

    def turns(*more: str) -> list[float]:
        found = directions(tiny(*given, *more), 8)
        return [float(alignment(a, b)) for a, b in itertools.pairwise(found)]

    assert max(map(abs, turns())) < 0.3  # a few tensors hold most of the length
    averaged = turns("feedback.ema=0.9")
    assert averaged[0] > 0.5  # of one and of two draws: √½
    assert averaged[-1] > 0.8
    # A lookahead is made anew for each update, and never averaged: nor is its noise.
    assert max(map(abs, turns("feedback.ema=0.9", *AHEAD))) < 0.3
    assert max(map(abs, turns("feedback.refresh=3", *AHEAD))) < 0.3


@pytest.mark.parametrize("overrides", [[], IBOT, IJEPA], ids=["dino", "ibot", "ijepa"])
def test_random_targets_need_no_labels_and_differ_from_step_to_step(tiny: Make, overrides: list[str]) -> None:
    none = ["data.ade20k=null", "data.nyuv2=null"]
    run = Trainer(tiny("designer=random_targets", *none, *overrides, "optim.lr=0", "designer.kl=0.1"))
    assert run.feedback == []
    assert run.steer is not None
    moved: list[Any] = []
    move = run.loss.move
    run.loss.move = lambda targets, here, there, mover: (  # type: ignore[method-assign]
        moved.append({name: there[name] - here[name] for name in targets}) or move(targets, here, there, mover)
    )
    part = "ijepa" if overrides == IJEPA else "dino"
    for _ in range(2):
        torch.manual_seed(5)
        values = steps(run, 1).meters.read()
        assert 0.099 < values[f"target_kl_{part}"] <= 0.1 * (1 + 1e-6)
    assert run.steer.updates == 0
    noise = moved[0][part]
    assert float(noise.std()) == pytest.approx(1, abs=0.15)
    assert abs(float(torch.corrcoef(torch.stack([part_[part].flatten()[:200] for part_ in moved]))[0, 1])) < 0.3


# The oracle


def test_the_oracle_moves_the_scope_alone_and_nothing_is_self_supervised(tiny: Make) -> None:
    run = Trainer(tiny("method=oracle", *AHEAD, "value.burn_in=2", "optim.weight_decay=0.5"))
    assert run.steer is not None
    before = {name: value.clone() for name, value in run.student.named_parameters()}
    steps(run, 2)
    assert all(torch.equal(before[name], value) for name, value in run.student.named_parameters())  # burn-in
    steps(run, 2)
    moved = {name for name, value in run.student.named_parameters() if not torch.equal(before[name], value)}
    assert moved == {f"backbone.{name}" for name in run.steer.scope.names}
    assert not run.loss.center.any()
    assert "loss" not in run.meters.read()


@pytest.mark.parametrize("direction", ["lookahead", "dot"])
def test_the_oracle_lowers_the_labels_loss(tiny: Make, folders: Path, direction: str) -> None:
    """On a batch that is always the same, by the head that was fitted at the start."""
    given = ["optim.lr=2e-3", "feedback.updates=0", "feedback.warmup=20", "value.period=1", "steps=50"]
    given += ["value.lookahead.steps=2", f"value.direction={direction}"]
    run = Trainer(tiny("method=oracle", *of_classes(folders), *given))
    (task,) = run.feedback
    images, labels = task.meta_stream.batch(0)
    found = []
    for _ in range(16):
        steps(run, 1)
        task.head.eval()
        with torch.no_grad():
            found.append(float(task.loss(run.student.backbone(run.student.backbone.normalise(images)), labels)))
    assert found[-1] < 0.92 * found[0]


def test_the_oracles_step_is_along_u(tiny: Make) -> None:
    run = Trainer(tiny("method=oracle", *AHEAD, "optim.clip=1e-3"))
    steps(run, 1)
    steer = run.steer
    assert steer is not None
    assert steer.direction is not None
    found = [parameter.grad for parameter in steer.trained]
    assert float(alignment(found, steer.direction)) == pytest.approx(1, abs=1e-5)  # type: ignore[arg-type]
    assert float(norm(found)) == pytest.approx(1e-3, rel=1e-3)  # type: ignore[arg-type]
    steps(run, 1)  # the kept one again, though clipping has shortened what was given to the optimizer
    assert run.meters.read()["gradient_norm"] == pytest.approx(float(norm(steer.direction)), rel=1e-4)


@pytest.mark.parametrize("method", ["finetune", "oracle"])
def test_shuffled_labels_train_other_learners(tiny: Make, method: str) -> None:
    given = [f"method={method}", *AHEAD]
    true, mixed = (Trainer(tiny(*given, f"feedback.shuffle={flag}")) for flag in ("false", "true"))
    for mine, theirs in zip(true.feedback, mixed.feedback, strict=True):
        (images, labels), (same_images, others) = (task.train_stream.batch(0) for task in (mine, theirs))
        assert torch.equal(images, same_images)
        assert not torch.equal(labels, others)
    assert not same(theta(steps(true, 2)), theta(steps(mixed, 2)))
    assert all(math.isfinite(value) for value in mixed.meters.read().values())


# Classes of images


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ of three classes, each a colour with noise."""
    root, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(1)
    for split, count in (("train", 8), ("val", 2)):
        for place, name in enumerate(("blue", "green", "red")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                image = rng.integers(0, 90, (24, 24, 3), dtype=np.uint8)
                image[..., 2 - place] += 120
                Image.fromarray(image).save(root / split / name / f"{name}{index}.png")
    return root


def of_classes(folders: Path) -> list[str]:
    return [
        f"data.classes={folders}",
        "data.ade20k=null",
        "data.nyuv2=null",
        "feedback.classes.train=12",
        "feedback.classes.meta=6",
    ]


@pytest.mark.parametrize(
    "overrides",
    [[*TARGETS, *AHEAD], [*TARGETS, "value.direction=dot"], ["designer=unet"], ["method=oracle", *AHEAD]],
    ids=["lookahead", "dot", "masks", "oracle"],
)
def test_classes_of_images_steer(tiny: Make, folders: Path, overrides: list[str]) -> None:
    given = [*of_classes(folders), *overrides]
    true, false = Trainer(tiny(*given)), relabel(Trainer(tiny(*given)))
    assert [task.kind for task in true.feedback] == ["classes"]
    assert true.feedback[0].head.classify.out_features == 3  # type: ignore[union-attr]
    for run in (true, false):
        steps(run, 3)
    assert not same(true.steer.direction, false.steer.direction)  # type: ignore[union-attr]
    assert not same(theta(true)["student"], theta(false)["student"])
    values = true.meters.read()
    assert values["loss_classes"] == pytest.approx(math.log(3), abs=0.7)


def test_a_lookahead_learns_classes(tiny: Make, folders: Path) -> None:
    run = Trainer(tiny(*of_classes(folders), *TARGETS, "value.direction=lookahead", "value.lookahead.steps=30"))
    _, found = ahead(run)
    assert float(found["lookahead_after"]) < 0.7 * float(found["lookahead_before"])


def test_classes_beside_maps_and_finetuning_on_them(tiny: Make, folders: Path) -> None:
    labels = [part for part in of_classes(folders) if "null" not in part]
    run = steps(Trainer(tiny(*labels, *TARGETS, *AHEAD)), 2)
    assert [task.kind for task in run.feedback] == ["seg", "depth", "classes"]
    assert {"loss_seg", "loss_depth", "loss_classes"} <= run.meters.read().keys()
    tuned = Trainer(tiny("method=finetune", *of_classes(folders), "steps=25", "optim.lr=3e-3"))
    assert len(tuned.feedback[0].train_indices) == 18
    losses = [steps(tuned, 1).meters.read()["loss_classes"] for _ in range(25)]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_classes_are_split_apart_from_each_other_and_recorded(tiny: Make, folders: Path) -> None:
    folder = train(tiny(*of_classes(folders), *TARGETS, *AHEAD, "steps=1"), quiet=True)
    assert (folder / "splits.json").is_file()
    (task,) = Trainer(tiny(*of_classes(folders), *TARGETS, *AHEAD)).feedback
    assert (len(task.train_indices), len(task.meta_indices)) == (12, 6)
    assert not set(task.train_indices) & set(task.meta_indices)


def refused(tiny: Make, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        Trainer(tiny(*TARGETS, *AHEAD, *overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_class_folders_that_cannot_be_used_are_named_with_their_keys(tiny: Make, folders: Path, tmp_path: Path) -> None:
    given = [part for part in of_classes(folders) if part.startswith("data")]
    few = refused(tiny, *given)  # 512 + 128 by default
    assert few.startswith(f"feedback.classes.train=512, feedback.classes.meta=128: data.classes={folders}: cannot cut")
    assert "out of 24 in 24 groups" in few
    works = few.removesuffix(" would do").split("; ")[-1].split(", ")
    assert works == ["feedback.classes.train=19", "feedback.classes.meta=4"]
    assert len(Trainer(tiny(*given, *TARGETS, *AHEAD, *works)).feedback[0].train_indices) == 19
    smaller = refused(tiny, *given, "feedback.batch_size=64").removesuffix(" would do").split("; ")[-1].split(", ")
    assert smaller[-1] == "feedback.batch_size=19"
    Trainer(tiny(*given, *TARGETS, *AHEAD, *smaller))

    alone = tmp_path / "alone"
    shutil.copytree(folders / "train" / "red", alone / "train" / "red")
    one = refused(tiny, *given[1:], f"data.classes={alone}")
    assert one.startswith(f"data.classes={alone}: 1 class, red, with 8 images")
    assert f"give 2 or more folders in {alone}/train" in one
    bare = refused(tiny, *given[1:], f"data.classes={folders / 'train'}")
    assert bare.startswith(f"data.classes={folders / 'train'}: {folders / 'train' / 'train'}: no such folder; ")


# What cannot be


def test_a_lookahead_that_diverges_is_refused_before_anything_moves(tiny: Make) -> None:
    run = Trainer(tiny(*TARGETS, *AHEAD, "value.lookahead.lr=1e30", "value.lookahead.optimizer=sgd"))
    before = theta(run)
    with pytest.raises(UserError, match=r"value\.lookahead diverges, at a rate of .*lower value\.lookahead\.lr"):
        steps(run, 1)
    assert same(before, theta(run))


def test_a_rate_that_overflows_is_refused(tiny: Make) -> None:
    run = Trainer(tiny(*TARGETS, *AHEAD, "value.lookahead.lr=1e38"))
    before = theta(run)
    with pytest.raises(UserError, match=r"^value\.lookahead: it overflowed at a rate of 1e\+38; lower value\.look"):
        steps(run, 1)
    assert same(before, theta(run))


def test_a_later_lookahead_that_diverges_is_refused(tiny: Make) -> None:
    run = steps(Trainer(tiny(*TARGETS, *AHEAD, "value.lookahead.optimizer=sgd")), 2)
    before = theta(run)
    run.config.value.lookahead.lr = 1e30
    with pytest.raises(UserError, match=r"step 2: .*lookahead.* not finite; nothing was applied"):
        steps(run, 1)
    assert same(before["student"], theta(run)["student"])


def test_a_change_that_is_not_finite_ends_the_run(tiny: Make) -> None:
    """Not by targets that are quietly no probabilities."""
    run = steps(Trainer(tiny(*TARGETS, *AHEAD)), 1)
    assert run.steer is not None
    assert run.steer.direction is not None
    run.steer.direction[0].fill_(math.nan)
    before = theta(run)
    with pytest.raises(UserError, match=r"step 1: loss.* not finite; nothing was applied"):
        steps(run, 1)
    assert same(before["student"], theta(run)["student"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["designer.kl=-0.1"], r"designer\.kl=-0\.1: must be at least 0; 0 leaves the targets as they are"),
        (["designer.strength=-1"], r"designer\.strength=-1\.0: must be at least 0"),
        (
            [*TARGETS, "designer.kl=null", "designer.strength=null"],
            r"designer\.name=targets needs a bound or a strength: give designer\.kl",
        ),
        (["designer=random_targets", *UNBOUND], r"needs a bound or a strength"),
        (["designer=unet+targets", *UNBOUND], r"needs a bound or a strength"),
        ([*TARGETS, "designer.kl=.inf"], r"designer\.kl=inf: must be finite"),
        ([*AHEAD, "value.combine=normalised"], r"value\.combine=normalised .* choose value\.combine=weights"),
        (["value.direction=adam", "value.burn_in=19"], r"set value\.burn_in to 20 or more"),
        (["method=oracle", "value.direction=adam", "value.burn_in=20"], r"method=oracle with value\.direction=adam"),
        (["value.lookahead.steps=0"], r"value\.lookahead\.steps=0: must be at least 1"),
        (["value.lookahead.batches=-1"], r"value\.lookahead\.batches=-1: must be at least 0$"),
        ([*TARGETS, "designer.strength=1.1e6"], r"designer\.strength=1\.1e\+06: must be at most 1e\+06"),
        (["value.lookahead.lr=0"], r"value\.lookahead\.lr=0\.0: must be above 0"),
        (["value.lookahead.optimizer=lion"], r"value\.lookahead\.optimizer=lion: choose adamw, sgd"),
        (["value.direction=ahead"], r"value\.direction=ahead: choose dot, cosine, adam, lookahead, random"),
        (["designer=targets+weights"], r"designer\.name=targets\+weights: choose"),
        (["designer=targets+random_targets"], r"designer\.name=targets\+random_targets: choose"),
        (["method=oracle", "data.ade20k=null", "data.nyuv2=null"], r"method=oracle needs labels: .*data\.classes=PATH"),
        ([*TARGETS, "data.ade20k=null", "data.nyuv2=null"], r"method=value needs labels"),
        ([*TARGETS, "designer.frozen=true"], r"designer\.frozen: designer\.name=targets has no mask generator"),
        (["method=adversarial", "designer=unet+targets"], r"method=adversarial needs a mask generator that learns"),
    ],
)
def test_settings_that_cannot_work(tiny: Make, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tiny(*overrides)
    assert "\n" not in str(caught.value)


def test_settings_that_others_do_not_need(tiny: Make) -> None:
    """A bound for targets that do not move, and Adam's burn-in without labels."""
    tiny("designer=weights", "designer.kl=null", "designer.strength=null")
    tiny("method=baseline", "designer=targets", "designer.kl=null", "designer.strength=null", "value.direction=adam")
    tiny("value.direction=adam", "value.burn_in=20")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (TARGETS, r"designer\.name=targets runs the scope's blocks at other values at every step"),
        (
            ["designer=unet+targets"],
            r"designer\.name=unet\+targets runs the scope's blocks at other values at every step",
        ),
        (
            ["designer=random_targets"],
            r"designer\.name=random_targets runs the scope's blocks at other values at every step",
        ),
        (["method=oracle"], r"method=oracle steps along a direction of the whole scope"),
    ],
)
def test_what_needs_the_whole_learner_at_every_step(tiny: Make, overrides: list[str], message: str) -> None:
    config = tiny(*overrides, "distributed.strategy=fsdp")
    with pytest.raises(
        UserError, match=rf"distributed\.strategy=fsdp: {message}; choose distributed\.strategy=ddp"
    ) as e:
        check_sharding(config)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=message):  # of one process too
        Trainer(config)
    check_sharding(tiny("method=baseline", *TARGETS, "distributed.strategy=fsdp"))
