"""What φ and the closed forms make of the learner's task, and how g_down reaches them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from dino_value.config import Config, load_config
from dino_value.errors import UserError
from dino_value.objectives.self_distillation import SelfDistillation
from dino_value.training.feedback import batch_gradient, downstream_gradient
from dino_value.training.steps import Views, make_views
from dino_value.training.trainer import Trainer
from dino_value.value import alignment, inner, mean_gradient, norm, value_weights

Make = Callable[..., Config]


def steps(run: Trainer, count: int) -> Trainer:
    for large, small in run.stream.iterate(run.step, run.step + count):
        run.learner_update(large, small)
    return run


def terms(run: Trainer, views: Views, targets: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    """[2 V B], written out: the whole student, no trunk and no tail."""
    backbone, batch = run.student.backbone, views.batch
    cls = torch.cat([functional_call(backbone, leaves, (group,)).cls for group in views])
    outputs = torch.log_softmax(run.student.head(cls) / 0.1, -1).unflatten(0, (-1, batch))
    rows = [[-(targets[t] * outputs[v]).sum(-1) for v in range(len(outputs))] for t in range(2)]
    return torch.stack([torch.stack(row) for row in rows])


def naive_values(run: Trainer, views: Views, targets: Tensor) -> Tensor:
    """⟨u, ∇ℓ_i⟩ of every term, one backward pass each."""
    assert run.steer is not None
    assert run.steer.direction is not None
    leaves = {name: value.requires_grad_() for name, value in run.steer.scope.parameters(run.student.backbone).items()}
    found = terms(run, views, targets, leaves)
    flat = [
        inner(run.steer.direction, list(torch.autograd.grad(term, list(leaves.values()), retain_graph=True)))
        for term in found.flatten()
    ]
    return torch.stack(flat).view_as(found)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The last learner step's student before the step, its views, targets and gradient."""
    seen: dict[str, Any] = {}
    states, clip = SelfDistillation.states, torch.nn.utils.clip_grad_norm_

    def kept(self: Any, student: Any, views: Views, start: int | None, draw: Any) -> Any:
        seen["views"], seen["student"] = views, copy.deepcopy(student)
        return states(self, student, views, start, draw)

    def unclipped(parameters: Any, limit: float) -> Tensor:
        parameters = list(parameters)
        seen["gradient"] = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        return clip(parameters, limit)

    teach = SelfDistillation.teach

    def made(*arguments: Any) -> Any:
        targets, logits = teach(*arguments)
        seen["targets"] = targets["dino"]
        return targets, logits

    monkeypatch.setattr(SelfDistillation, "states", kept)
    monkeypatch.setattr(SelfDistillation, "teach", made)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", unclipped)
    return seen


@pytest.mark.parametrize("name", ["weights", "unet+weights"])
def test_the_learner_steps_on_terms_weighted_by_their_value(tiny: Make, watched: dict[str, Any], name: str) -> None:
    run = steps(Trainer(tiny(f"designer={name}", "designer.temperature=0.7", "optim.lr=0")), 1)
    run.meters.read()
    steps(run, 1)
    assert run.steer is not None
    views, targets = watched["views"], watched["targets"]
    values = naive_values(run, views, targets)
    valid = run.loss.pairs(values)
    weights = value_weights(values, 0.7, run.config.designer.weight_clip, valid)
    torch.testing.assert_close(weights[valid.expand_as(weights)].mean(), torch.tensor(1.0))
    assert weights[valid.expand_as(weights)].std() > 0.3
    metrics = run.meters.read()
    assert metrics["plain_value"] == pytest.approx(float(run.loss.mean(values)), rel=0.05, abs=1e-4)
    assert metrics["weighted_value"] > metrics["plain_value"]

    leaves = dict(run.student.backbone.named_parameters())
    loss = (terms(run, views, targets, leaves) * weights).sum() / valid.expand_as(weights).sum()
    expected = torch.autograd.grad(loss, list(leaves.values()))
    found = watched["gradient"][: len(expected)]
    assert float(alignment(list(expected), found)) > 0.9999
    assert float(norm(found) / norm(list(expected))) == pytest.approx(1, abs=0.01)


def test_the_best_of_n_views_are_those_of_highest_value(tiny: Make, watched: dict[str, Any]) -> None:
    run = Trainer(tiny("designer=best_of_n", "designer.candidates=3", "optim.lr=0"))
    large, small = run.stream.batch(0)
    assert small.shape[0] == 3 * run.config.views.local_count
    run.learner_update(large, small)
    all_views = make_views(run.student.backbone, (large, small), run.config.views, run.device, 0, "learner", 0)
    values = naive_values(run, all_views, watched["targets"])[:, 2:].mean(0)  # [6 B]
    chosen = watched["views"].small.unflatten(0, (-1, large.shape[1]))
    offered = all_views.small.unflatten(0, (-1, large.shape[1]))
    assert len(chosen) == 2
    others = 0
    for slot in range(2):
        for image in range(large.shape[1]):
            best = 3 * slot + int(values[3 * slot : 3 * slot + 3, image].argmax())
            assert torch.equal(chosen[slot, image], offered[best, image])
            others += best != 3 * slot
    assert others > 0


def test_before_any_update_the_first_candidate_is_taken(tiny: Make, watched: dict[str, Any]) -> None:
    run = Trainer(tiny("designer=best_of_n", "designer.candidates=3", "value.burn_in=2"))
    large, small = run.stream.batch(0)
    run.learner_update(large, small)
    offered = make_views(run.student.backbone, (large, small), run.config.views, run.device, 0, "learner", 0).small
    rows = offered.unflatten(0, (-1, large.shape[1]))
    assert torch.equal(watched["views"].small, rows[::3].flatten(0, 1))


def test_without_an_update_weights_are_the_baseline(tiny: Make) -> None:
    weighted = steps(Trainer(tiny("designer=weights", "value.burn_in=9")), 3)
    plain = steps(Trainer(tiny("method=baseline")), 3)
    for mine, theirs in zip(weighted.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_closed_forms_have_no_phi(tiny: Make) -> None:
    run = steps(Trainer(tiny("designer=weights")), 1)
    assert run.steer is not None
    assert run.steer.designer is None
    assert "designer" not in run.steer.state_dict()
    metrics = run.meters.read()
    assert metrics["cosine"] == pytest.approx(metrics["value"] / metrics["g_down_norm"] / metrics["g_pre_norm"])


# g_down


def test_a_refreshed_g_down_is_the_mean_over_the_pool_and_kept(tiny: Make) -> None:
    run = Trainer(tiny("feedback.refresh=3", "feedback.batch_size=2"))
    assert run.steer is not None
    task, backbone, scope = run.steer.feedback[0], run.student.backbone, run.steer.scope
    batches = [task.meta_stream.batch(number) for number in range(2)]
    expected = mean_gradient(batch_gradient(task, batch, backbone, scope, run.device)[0] for batch in batches)
    first, _ = downstream_gradient(task, backbone, scope, run.device)
    for mine, theirs in zip(first, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    for _ in range(2):
        again, _ = downstream_gradient(task, backbone, scope, run.device)
        assert all(map(torch.equal, first, again))
    assert task.meta.count == 2
    downstream_gradient(task, backbone, scope, run.device)
    assert task.meta.count == 4


def test_an_averaged_g_down_is_the_moving_average_of_meta_batches(tiny: Make) -> None:
    run = Trainer(tiny("feedback.ema=0.5", "feedback.batch_size=2"))
    assert run.steer is not None
    task, backbone, scope = run.steer.feedback[0], run.student.backbone, run.steer.scope
    a, b = (batch_gradient(task, task.meta_stream.batch(number), backbone, scope, run.device)[0] for number in range(2))
    for expected in (a, [x / 3 + 2 * y / 3 for x, y in zip(a, b, strict=True)]):
        found, _ = downstream_gradient(task, backbone, scope, run.device)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_guard_bends_the_direction_once_its_value_is_negative(tiny: Make) -> None:
    run = Trainer(tiny("feedback.depth.guard=true", "value.guard_rate=5", "designer=weights"))
    assert run.steer is not None
    g_down, gradients, _ = run.steer.downstream()
    assert gradients.keys() == {"seg", "depth"}
    assert all(map(torch.equal, g_down, gradients["seg"]))  # a guard is no target
    direction = run.steer.direction_of({"depth": gradients["depth"]})
    against = [-part for part in gradients["depth"]]
    before = direction(gradients["seg"], against)
    assert all(map(torch.equal, before, gradients["seg"]))
    after = direction(gradients["seg"], against)
    assert alignment(after, gradients["depth"]) > alignment(before, gradients["depth"]) + 0.3


def test_held_images_teach_nothing(tiny: Make) -> None:
    run = Trainer(tiny("feedback.seg.held=2", "feedback.depth.held=1", "value.diagnose=1"))
    assert run.steer is not None
    for task in run.steer.feedback:
        held = set(task.held_indices)
        assert len(held) == (2 if task.kind == "seg" else 1)
        assert not held & (set(task.train_indices) | set(task.meta_indices))
    steps(run, 1)
    metrics = run.meters.read()
    for name in ("designed", "plain", "random"):
        assert -1 <= metrics[f"held_cosine_{name}"] <= 1
    assert metrics["held_cosine_designed"] != metrics["held_cosine_plain"] != metrics["held_cosine_random"]
    assert -1 <= metrics["task_cosine"] <= 1


def test_measuring_changes_nothing(tiny: Make) -> None:
    common = ("feedback.seg.held=2", "feedback.depth.held=1")
    runs = [steps(Trainer(tiny(*common, f"value.diagnose={every}")), 3) for every in (0, 1)]
    for mine, theirs in zip(runs[0].student.parameters(), runs[1].student.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# The engine's start-up check


def test_auto_takes_the_cheap_engine_and_says_so(tiny: Make) -> None:
    run = steps(Trainer(tiny("value.engine=auto")), 1)
    assert run.steer is not None
    assert run.steer.engine_name == "finite_difference"
    assert len(run.steer.notes) == 1
    assert run.steer.notes[0].startswith("engine finite_difference at radius 1e-03: relative error")


def test_auto_falls_back_to_the_reference(tiny: Make) -> None:
    run = steps(Trainer(tiny("value.engine=auto", "value.radius=30")), 1)
    assert run.steer is not None
    assert run.steer.engine_name == "double_backward"


def test_an_engine_that_is_off_is_refused_before_anything_moves(tiny: Make) -> None:
    run = Trainer(tiny("value.engine=finite_difference", "value.radius=30"))
    assert run.steer is not None
    assert run.steer.designer is not None
    before = copy.deepcopy([run.student.state_dict(), run.steer.designer.state_dict()])
    with pytest.raises(UserError, match=r"value\.engine: finite_difference: .* set radius=") as caught:
        steps(run, 1)
    assert "\n" not in str(caught.value)
    for old, new in zip(before, [run.student.state_dict(), run.steer.designer.state_dict()], strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


# Settings


@pytest.mark.parametrize("name", ["best", "unet+sit", "weights+best_of_n", "unet+unet", "unet+", ""])
def test_a_designer_that_does_not_exist(tiny: Make, name: str) -> None:
    with pytest.raises(UserError, match=r"designer\.name=.*choose unet, sit, .*, weights, best_of_n"):
        tiny(f"designer.name={name!r}")


def test_a_name_is_short_for_a_designer(tiny_yaml: Any) -> None:
    assert load_config(tiny_yaml, ["out=x", "designer=unet+weights"]).designer.name == "unet+weights"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["value.direction=adam", "value.burn_in=19"], r"set value\.burn_in to 20 or more"),
        (["value.diagnose=2"], r"give feedback\.seg\.held=N"),
        (["designer=best_of_n", "views.local_count=0"], r"set views\.local_count to 1 or more"),
        (["designer.temperature=0"], r"designer\.temperature=0\.0: must be above 0"),
    ],
)
def test_settings_that_cannot_work(tiny: Make, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(*overrides)


def test_feedback_of_guards_alone(tiny: Make) -> None:
    with pytest.raises(UserError, match="no feedback left"):
        Trainer(tiny("feedback.seg.guard=true", "feedback.depth.guard=true"))
