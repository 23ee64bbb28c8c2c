"""The four bottlenecks of the method, on real runs.

1. Feedback labels appear only in the evaluator's loss.
2. g_down never reaches the learner's optimizer.
3. The learner's step is the plain self-supervised step on detached views.
4. The only path from feedback to θ is feedback → g_down → φ → task → ∇_θ L_pre.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dino_value.config import Config
from dino_value.data.labelled import LabelledSource
from dino_value.data.sampling import generator, key
from dino_value.designers import fill_in
from dino_value.models.backbone import Features
from dino_value.objectives.self_distillation import SelfDistillation
from dino_value.training import designer_update as steer_module
from dino_value.training.designer_update import DesignerUpdate
from dino_value.training.feedback import FeedbackTask, downstream_gradient, fit_head
from dino_value.training.optim import FiniteGuard, cosine_schedule
from dino_value.training.steps import Views, make_views
from dino_value.training.trainer import Trainer

Make = Callable[..., Config]


class Relabelled:
    """A source with every label replaced; images, groups and order as they were."""

    def __init__(self, source: LabelledSource) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self._source.load(index)
        if self._source.kind == "depth":
            return image, 9 - target.flip(0)
        return image, (target.flip(0) + 1) % self._source.num_classes


def relabel(run: Trainer) -> Trainer:
    for task in run.steer.feedback:
        for stream in (task.train_stream, task.meta_stream):
            stream.source.source = Relabelled(stream.source.source)  # type: ignore[attr-defined]
    return run


def steps(run: Trainer, count: int = 4) -> Trainer:
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
    return {name: state[name] for name in ("student", "teacher", "objective", "optimizer")}


def viewed(run: Trainer, large: Tensor, small: Tensor, name: str, number: int) -> Views:
    settings = run.config.views
    return make_views(run.student.backbone, (large, small), settings, run.device, run.config.seed, name, number)


FIXED = "designer.lr=0"


# 1. labels


@pytest.mark.parametrize("method", ["value", "random"])
@pytest.mark.parametrize("extra", [[], ["designer.crops=all", "designer.through_teacher=true"]])
def test_with_phi_fixed_labels_cannot_change_theta(tiny: Make, method: str, extra: list[str]) -> None:
    truth = steps(Trainer(tiny(f"method={method}", FIXED, *extra)))
    false = steps(relabel(Trainer(tiny(f"method={method}", FIXED, *extra))))
    assert same(theta(truth), theta(false))
    # The labels did differ: the heads learnt something else, and so did V.
    assert not same(
        [task.head.state_dict() for task in truth.steer.feedback],
        [task.head.state_dict() for task in false.steer.feedback],
    )
    assert truth.meters.read()["g_down_norm"] != false.meters.read()["g_down_norm"]


def test_with_phi_free_labels_do_change_theta(tiny: Make) -> None:
    """The test above is not blind: the one allowed path is open."""
    truth, false = steps(Trainer(tiny())), steps(relabel(Trainer(tiny())))
    assert not same(truth.steer.designer.state_dict(), false.steer.designer.state_dict())
    assert not same(theta(truth)["student"], theta(false)["student"])


def test_labels_enter_nothing_but_the_evaluators_loss(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With that loss cut off from them, a run with other labels is the same run, φ and heads included."""

    def blind(self: Any, features: Features, labels: Tensor, head: nn.Module | None = None) -> Tensor:
        return (head or self.head)(self.label.read(features)).square().mean()

    monkeypatch.setattr(FeedbackTask, "loss", blind)
    assert same(steps(Trainer(tiny())).state_dict(), steps(relabel(Trainer(tiny()))).state_dict())


SIGNALS: dict[str, list[str]] = {
    "no head updates": ["feedback.updates=0", "feedback.warmup=0"],
    "more head updates": ["feedback.updates=3"],
    "segmentation only": ["feedback.depth.weight=0"],
    "depth only": ["feedback.seg.weight=0"],
    "other weights": ["feedback.seg.weight=5"],
    "another direction": ["value.direction=cosine"],
    "a random direction": ["value.direction=random"],
    "another scope": ["value.scope.blocks=1"],
    "another engine": ["value.engine=double_backward", "backbone.attention=math"],
    "no regularisers": ["designer.lambda_spars=0", "designer.lambda_tv=0"],
    "another meta batch": ["value.batch_size=3"],
    "other feedback batches": ["feedback.batch_size=2"],
    "other head-train and meta sets": ["feedback.seg.train=5", "feedback.seg.meta=7"],
    "a warmed-up designer": ["value.warmup=3"],
    "fewer updates": ["value.period=4"],
}


@pytest.mark.parametrize("removed", SIGNALS.values(), ids=SIGNALS.keys())
def test_with_phi_fixed_no_learning_signal_reaches_theta(tiny: Make, removed: list[str]) -> None:
    attention = [part for part in removed if part.startswith("backbone")]
    assert same(theta(steps(Trainer(tiny(FIXED, *attention)), 3)), theta(steps(Trainer(tiny(FIXED, *removed)), 3)))


def test_with_phi_fixed_the_designers_update_is_nothing_to_theta(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    drop = "backbone.kwargs.drop_path_rate=0.3"
    updated = theta(steps(Trainer(tiny(FIXED, drop))))
    monkeypatch.setattr(DesignerUpdate, "update", lambda self, step, temperature: None)
    assert same(updated, theta(steps(Trainer(tiny(FIXED, drop)))))


# 2. g_down and the learner's optimizer


def test_the_learners_optimizer_holds_the_student_and_nothing_else(tiny: Make) -> None:
    run = Trainer(tiny())

    def held(optimizer: torch.optim.Optimizer) -> set[int]:
        return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}

    def of(*modules: nn.Module) -> set[int]:
        return {id(parameter) for module in modules for parameter in module.parameters()}

    assert held(run.optimizer) == of(run.student)
    assert held(run.steer.designer_optimizer) == of(run.steer.designer)
    for task in run.steer.feedback:
        assert held(task.optimizer) == of(task.head)
    sets = [of(run.student), of(run.teacher), of(run.steer.designer), *(of(task.head) for task in run.steer.feedback)]
    assert len(set().union(*sets)) == sum(map(len, sets))


@pytest.mark.parametrize("engine", ["finite_difference", "double_backward"])
def test_the_designers_update_leaves_no_gradient_in_theta(tiny: Make, engine: str) -> None:
    run = Trainer(tiny(f"value.engine={engine}", "backbone.attention=math", "designer.through_teacher=true"))
    marks = []
    for parameter in [*run.student.parameters(), *run.teacher.parameters()]:
        parameter.grad = torch.full_like(parameter, 7.0)
        marks.append((parameter, parameter.grad))
    before = copy.deepcopy(theta(run))
    run.steer.update(0, 0.04)
    assert all(parameter.grad is mark and bool((mark == 7).all()) for parameter, mark in marks)
    assert same(theta(run), before)
    assert all(parameter.grad is not None for parameter in run.steer.designer.parameters())


def test_at_the_learners_step_the_optimizer_holds_g_pre(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With g_down made enormous and φ held, the gradients that the optimizer steps on do not change by a bit."""
    seen: list[list[Tensor]] = []
    downstream = downstream_gradient

    def enormous(*arguments: Any) -> Any:
        gradient, loss = downstream(*arguments)
        return [1e6 * part for part in gradient], loss

    for replacement in (downstream, enormous):
        monkeypatch.setattr(steer_module, "downstream_gradient", replacement)
        run = Trainer(tiny(FIXED))
        step: Any = run.optimizer.step
        grads: list[Tensor] = []

        def spy(step: Any = step, grads: list[Tensor] = grads, run: Trainer = run) -> None:
            grads.extend(p.grad.clone() for p in run.student.parameters() if p.grad is not None)
            step()

        monkeypatch.setattr(run.optimizer, "step", spy)
        steps(run, 3)
        seen.append(grads)
    assert len(seen[0]) == 3 * len(list(run.student.parameters()))
    assert all(map(torch.equal, *seen))


def test_g_down_and_the_heads_take_no_part_in_each_others_steps(tiny: Make) -> None:
    """g_down leaves nothing in the heads; fitting the heads leaves nothing in the backbone."""
    run = Trainer(tiny())
    before = copy.deepcopy(theta(run)), [copy.deepcopy(task.head.state_dict()) for task in run.steer.feedback]
    for task in run.steer.feedback:
        gradient, loss = downstream_gradient(task, run.student.backbone, run.steer.scope, run.device)
        assert not loss.requires_grad
        assert not any(part.requires_grad for part in gradient)
        assert all(parameter.grad is None for parameter in task.head.parameters())
    assert same([task.head.state_dict() for task in run.steer.feedback], before[1])
    assert all(parameter.grad is None for parameter in run.student.parameters())
    for task in run.steer.feedback:
        fit_head(task, run.student.backbone, run.device, FiniteGuard())
    assert all(parameter.grad is None for parameter in run.student.parameters())
    assert same(theta(run), before[0])


@pytest.mark.parametrize("kind", ["seg", "depth"])
def test_g_down_is_the_gradient_of_the_evaluators_loss(tiny: Make, kind: str) -> None:
    """Against autograd through the whole backbone, on the next meta batch, the head in inference mode."""
    run = Trainer(tiny())
    task = next(task for task in run.steer.feedback if task.kind == kind)
    for _ in range(3):
        fit_head(task, run.student.backbone, run.device, FiniteGuard())
    images, labels = task.meta_stream.batch(0)
    backbone = copy.deepcopy(run.student.backbone)
    features = backbone(backbone.normalise(images))
    task.head.eval()
    expected_loss = task.loss(features, labels)
    wanted = [parameter for name, parameter in backbone.named_parameters() if name in run.steer.scope.names]
    expected = torch.autograd.grad(expected_loss, wanted)
    gradient, loss = downstream_gradient(task, run.student.backbone, run.steer.scope, run.device)
    torch.testing.assert_close(loss, expected_loss.detach())
    for found, want in zip(gradient, expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-7)


# 3. the learner's step


PLAIN: dict[str, list[str]] = {
    "value": [],
    "all crops, noise": ["designer.crops=all", "designer.fill=noise"],
    "plain teacher": ["designer.teacher_views=plain"],
    "random": ["method=random"],
    "baseline": ["method=baseline"],
}


@pytest.mark.parametrize("overrides", PLAIN.values(), ids=PLAIN.keys())
def test_the_learners_step_is_a_plain_dino_step_on_detached_views(tiny: Make, overrides: list[str]) -> None:
    run = steps(Trainer(tiny("optim.warmup=2", "optim.weight_decay_end=0.2", "steps=9", *overrides)), 2)
    student, teacher, centre = copy.deepcopy(run.student), copy.deepcopy(run.teacher), run.loss.center.clone()
    optimizer_state = copy.deepcopy(run.optimizer.state_dict())
    large, small = run.stream.batch(2)
    run.learner_update(large, small)  # φ moves first, then the learner: what follows uses φ as it is now
    config = run.config

    views = viewed(run, large, small, "learner", 2)
    learned, seed = views, key(config.seed, "fill", 2)
    if run.steer:
        with torch.no_grad():

            def hide(images: Tensor, seed: int) -> Tensor:
                mask = run.steer.designer(images)
                fill = fill_in(images, config.designer.fill, config.designer.blur_sigma, generator(seed, "fill"))
                return mask * images + (1 - mask) * fill

            every = config.designer.crops == "all"
            learned = Views(hide(views.large, seed), hide(views.small, seed + 1) if every else views.small)
    seen = views.large if config.designer.teacher_views == "plain" else learned.large
    with torch.no_grad():
        logits = teacher.head(teacher.backbone(seen).cls)
        targets = torch.softmax((logits - centre) / 0.04, dim=-1).chunk(2)
    outputs = torch.cat([student.head(student.backbone(group).cls) for group in learned]).chunk(4)
    losses = [
        -(targets[t] * torch.log_softmax(outputs[v] / 0.1, dim=-1)).sum(-1).mean()
        for t in range(2)
        for v in range(4)
        if v != t
    ]
    torch.stack(losses).mean().backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    for mine, theirs in zip(student.parameters(), run.student.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-3, atol=1e-6)

    # From the same gradients, AdamW at the scheduled rate and decay: bit for bit.
    named = dict(student.named_parameters())
    plain = {name for name, value in named.items() if name.endswith(".bias") or value.ndim == 1}
    groups = [[named[name] for name in named if (name in plain) == flag] for flag in (False, True)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], fused=True)
    optimizer.load_state_dict(optimizer_state)
    now = cosine_schedule(2, 9, 0.04, 0.2)
    for group, decay in zip(optimizer.param_groups, (now, 0.0), strict=True):
        group |= {"lr": cosine_schedule(2, 9, 1e-3, 0.0, 2), "weight_decay": decay}
    for mine, theirs in zip(student.parameters(), run.student.parameters(), strict=True):
        assert theirs.grad is not None
        mine.grad = theirs.grad.clone()
    optimizer.step()
    assert same(list(student.state_dict().values()), list(run.student.state_dict().values()))

    momentum = cosine_schedule(2, 9, 0.9, 1.0)
    torch.testing.assert_close(run.loss.center, 0.9 * centre + 0.1 * logits.mean(0))
    for mine, theirs, new in zip(teacher.parameters(), run.teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(theirs, momentum * mine + (1 - momentum) * new.detach())


def test_the_learners_step_leaves_phi_alone(tiny: Make) -> None:
    run = steps(Trainer(tiny()), 1)  # step 1 has no designer update
    before = copy.deepcopy(run.steer.designer.state_dict())
    gradients = [copy.deepcopy(parameter.grad) for parameter in run.steer.designer.parameters()]
    steps(run, 1)
    assert run.steer.updates == 1
    assert same(run.steer.designer.state_dict(), before)
    assert same([parameter.grad for parameter in run.steer.designer.parameters()], gradients)


def test_the_learner_sees_views_without_a_graph(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trainer(tiny("designer.crops=all", "designer.through_teacher=true", "value.burn_in=1"))
    seen = []
    states, teach = SelfDistillation.states, SelfDistillation.teach

    def watched(self: Any, student: Any, views: Views, start: int | None, draw: Any) -> Any:
        seen.extend(views)
        return states(self, student, views, start, draw)

    def made(*arguments: Any) -> Any:
        targets, logits = teach(*arguments)
        seen.extend([targets["dino"], logits["dino"]])
        return targets, logits

    steps(run, 2)  # the designer's update is over: what follows is the learner's
    monkeypatch.setattr(SelfDistillation, "states", watched)
    monkeypatch.setattr(SelfDistillation, "teach", made)
    monkeypatch.setattr(DesignerUpdate, "update", lambda self, step, temperature: None)
    steps(run, 2)
    assert len(seen) == 8
    assert not any(part.requires_grad for part in seen)


# 4. batches


def test_head_train_and_meta_images_are_disjoint(tiny: Make) -> None:
    for seed in range(3):
        for task in Trainer(tiny(f"seed={seed}")).steer.feedback:
            train, meta = set(task.train_indices), set(task.meta_indices)
            assert (len(train), len(meta)) == (8 if task.kind == "seg" else 6, 4)
            assert not train & meta
            source = task.train_stream.source.source  # type: ignore[attr-defined]
            names = [{source.name(index) for index in part} for part in (train, meta)]
            assert not names[0] & names[1]


def test_no_group_of_images_is_on_both_sides(tiny: Make) -> None:
    run = Trainer(
        tiny("data.group_pattern=.", "feedback.seg.train=4", "feedback.seg.meta=4", "feedback.depth.weight=0")
    )
    (task,) = run.steer.feedback
    source = task.train_stream.source.source  # type: ignore[attr-defined]
    groups = [{source.group(index) for index in part} for part in (task.train_indices, task.meta_indices)]
    assert set().union(*groups) == {"0", "1"}  # 00 … 09 and 10 … 13
    assert not groups[0] & groups[1]


def test_g_down_comes_from_meta_images_and_the_heads_from_the_others(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer(tiny())
    loaded: dict[str, set[int]] = {}
    for task in run.steer.feedback:
        for name, stream in (("train", task.train_stream), ("meta", task.meta_stream)):
            data = stream.source
            fetch = data.batch

            def spy(
                positions: Any, seed: int, fetch: Any = fetch, data: Any = data, tag: str = task.kind + name
            ) -> Any:
                loaded.setdefault(tag, set()).update(data.indices[position] for position in positions)
                return fetch(positions, seed)

            monkeypatch.setattr(data, "batch", spy)
    steps(run, 8)
    for task in run.steer.feedback:
        assert loaded[task.kind + "train"] == set(task.train_indices)
        assert loaded[task.kind + "meta"] == set(task.meta_indices)


def test_the_meta_unlabeled_stream_is_independent_of_the_learners(tiny: Make) -> None:
    run = Trainer(tiny())
    ours = [run.stream.indices(step).tolist() for step in range(8)]
    meta = [run.steer.meta_stream.indices(step).tolist() for step in range(8)]
    assert all(a != b for a, b in zip(ours, meta, strict=True))
    assert not torch.equal(run.stream.batch(0)[0], run.steer.meta_stream.batch(0)[0])
    # The same crops, augmented for the one and for the other, differ too.
    large, small = run.stream.batch(0)
    assert not torch.equal(viewed(run, large, small, "learner", 0).large, viewed(run, large, small, "meta", 0).large)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_meta_image_is_never_in_the_unlabeled_meta_batch(tiny: Make, tiny_data: Path, in_memory: bool) -> None:
    """Also where the unlabeled folder is the labelled one."""
    run = Trainer(tiny(f"data.unlabeled={tiny_data / 'ade' / 'images'}", f"data.in_memory={in_memory}"))
    held = {Path(task.source.name(index)).resolve() for task in run.steer.feedback for index in task.meta_indices}
    source: Any = run.steer.meta_stream.source
    offered = {Path(name).resolve() for name in (source.names if in_memory else source.paths)}
    assert len(offered) == 16 - 4
    assert not offered & held
    assert len(run.stream.source) == 16  # the learner's own stream keeps everything
