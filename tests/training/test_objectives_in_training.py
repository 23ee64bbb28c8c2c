"""What DINOv2, DINOv3 and I-JEPA add, in the learner's step and under the value core; all of it off by default."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dino_value.config import Config, load_config
from dino_value.data.sampling import generator
from dino_value.errors import Interrupted, UserError
from dino_value.objectives.gram import gram_loss
from dino_value.objectives.ibot import block_masks
from dino_value.objectives.ijepa import multi_block, select
from dino_value.objectives.koleo import koleo
from dino_value.objectives.sinkhorn import sinkhorn
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.metrics import read_metrics
from dino_value.training.start import start_from
from dino_value.training.steps import SSLTask, Views, design_views, make_views
from dino_value.training.trainer import Trainer, train
from dino_value.value import ENGINES, everything, inner, last_blocks, value_step

Make = Callable[..., Config]

GRID = ["views.global_size=32"]  # 4 × 4 patches
IBOT = [*GRID, "objective.ibot.weight=1"]
GRAM = [*GRID, "objective.gram.weight=2", "objective.gram.start=1", "objective.gram.refresh=2"]
IJEPA = [*GRID, "views.local_count=0", "objective.name=ijepa"]
IJEPA += ["objective.ijepa.width=8", "objective.ijepa.depth=1", "objective.ijepa.heads=2"]
DINOV3 = [*IBOT, "objective.ibot.separate_head=true", *GRAM[1:], "objective.koleo=0.1", "objective.centering=sinkhorn"]
OPTIONS = {
    "sinkhorn": ["objective.centering=sinkhorn"],
    "koleo": ["objective.koleo=0.1"],
    "ibot": IBOT,
    "gram": GRAM,
    "all of DINOv3": DINOV3,
    "ijepa": IJEPA,
}
options = pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS.keys())


def steps(run: Trainer, count: int) -> Trainer:
    for large, small in run.stream.iterate(run.step, run.step + count):
        run.learner_update(large, small)
    return run


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


# The learner's step


def by_hand(run: Trainer, student: Any, teacher: Any, loss: Any, views: Views, step: int) -> dict[str, Tensor]:
    """The parts of the learner's loss at `step`, from the backbones' pieces, image by image where that is not slow."""
    config, o = run.config, run.config.objective
    draws = generator(config.seed, "objective", step)
    count = len(views.large)
    if o.name == "ijepa":
        blocks = multi_block(count, (4, 4), draws)
        with torch.no_grad():
            targets = torch.layer_norm(teacher.backbone(views.large).patches, (24,))
        state = select(student.backbone(views.large, stop=0), blocks.context, 1)
        outputs = student.head(student.backbone(state, start=0).patches, blocks, (4, 4))
        wanted = torch.stack([targets[i][blocks.targets[i]] for i in range(count)])
        return {"ijepa": torch.nn.functional.smooth_l1_loss(outputs, wanted)}

    hidden = torch.zeros(count, 16, dtype=torch.bool)
    if o.ibot.weight:
        hidden = block_masks(count, (4, 4), draws).hidden
        assert 0 < int(hidden.sum()) < 16 * count

    def features(backbone: Any, images: Tensor, token: Tensor | None = None) -> Tensor:
        model = backbone.model
        tokens = model.patch_embed(images)
        if token is not None:
            rows = [
                torch.stack([token[0] if hide else patch for patch, hide in zip(patches, row, strict=True)])
                for patches, row in zip(tokens.flatten(1, 2), hidden, strict=True)
            ]
            tokens = torch.stack(rows).view(tokens.shape)
        tokens = model._pos_embed(tokens)
        for block in model.blocks:
            tokens = block(tokens)
        return model.norm(tokens)

    with torch.no_grad():
        whole = features(teacher.backbone, views.large)
        logits = teacher.head(whole[:, 0])

        def target(logits: Tensor, center: Tensor) -> Tensor:
            if o.centering == "sinkhorn":
                return sinkhorn(logits, 0.04, 3)
            return torch.softmax((logits - center) / 0.04, -1)

        targets = target(logits, loss.center).chunk(2)
    large = features(student.backbone, views.large, student.mask_token.token if o.ibot.weight else None)
    seen = [*large[:, 0].chunk(2), *features(student.backbone, views.small)[:, 0].chunk(2)]
    outputs = [torch.log_softmax(student.head(cls) / 0.1, -1) for cls in seen]
    pairs = [-(targets[t] * outputs[v]).sum(-1).mean() for t in range(2) for v in range(4) if t != v]
    parts = {"dino": torch.stack(pairs).mean()}
    if o.ibot.weight:
        heads = [learner.patch_head or learner.head for learner in (student, teacher)]
        with torch.no_grad():
            named = target(heads[1](whole[:, 1:][hidden]), loss.ibot.center)
        errors = -(named * torch.log_softmax(heads[0](large[:, 1:][hidden]) / 0.1, -1)).sum(-1)
        images = [part.mean() for part in errors.split(hidden.sum(1).tolist()) if len(part)]
        parts["ibot"] = torch.stack(images).sum() / count
    if o.koleo:
        parts["koleo"] = koleo(seen[0]) + koleo(seen[1])
    if o.gram.weight and step >= o.gram.start:
        with torch.no_grad():
            anchor = features(loss.gram_teacher, views.large)[:, 1:]
        parts["gram"] = gram_loss(large[:, 1:], anchor)
    return parts


@options
def test_the_learners_step_is_the_loss_by_hand(tiny: Make, overrides: list[str]) -> None:
    run = steps(Trainer(tiny("method=baseline", "optim.clip=inf", *overrides)), 2)
    student, teacher, loss = copy.deepcopy([run.student, run.teacher, run.loss])
    run.meters.read()
    large, small = run.stream.batch(2)
    run.learner_update(large, small)
    found = run.meters.read()

    settings = run.config.views
    views = make_views(student.backbone, (large, small), settings, run.device, run.config.seed, "learner", 2)
    parts = by_hand(run, student, teacher, loss, views, 2)
    assert {name for name in found if name.startswith("loss_")} == {f"loss_{name}" for name in parts}
    for name, part in parts.items():
        assert found[f"loss_{name}"] == pytest.approx(float(part.detach()), rel=1e-5)
    o = run.config.objective
    scales = {"ibot": o.ibot.weight, "koleo": o.koleo, "gram": o.gram.weight}
    total = torch.stack([scales.get(name, 1) * part for name, part in parts.items()]).sum()
    assert found["loss"] == pytest.approx(float(total.detach()), rel=1e-5)
    total.backward()
    for (name, mine), theirs in zip(student.named_parameters(), run.student.parameters(), strict=True):
        assert mine.grad is not None, name
        assert theirs.grad is not None, name
        torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-3, atol=1e-6)


def test_by_default_there_is_dino_and_nothing_else(tiny: Make) -> None:
    run = steps(Trainer(tiny("method=baseline")), 2)
    values = run.meters.read()
    assert values["loss"] == values["loss_dino"]
    assert [name for name in values if name.startswith("loss_")] == ["loss_dino"]
    state = run.state_dict()
    assert list(state["objective"]) == ["center"]
    assert {name.split(".")[0] for name in state["student"]} == {"backbone", "head"}


def test_centres_follow_both_heads_and_sinkhorn_has_none(tiny: Make) -> None:
    moved = steps(Trainer(tiny("method=baseline", *IBOT)), 1)
    assert moved.loss.center.abs().max() > 0
    assert moved.loss.ibot.center.abs().max() > 0
    still = steps(Trainer(tiny("method=baseline", *IBOT, "objective.centering=sinkhorn")), 1)
    assert not still.loss.center.any()
    assert not still.loss.ibot.center.any()


def test_the_gram_teacher_is_the_ema_teacher_of_its_last_refresh(tiny: Make) -> None:
    run = Trainer(tiny("method=baseline", *GRAM))
    expected: Any = None
    for step in range(5):
        if step in (1, 3):
            expected = copy.deepcopy(run.teacher.backbone.state_dict())
        steps(run, 1)
        assert ("loss_gram" in run.meters.read()) == (step >= 1)
        if step >= 1:
            assert same(dict(run.loss.gram_teacher.state_dict()), dict(expected))
    assert not same(dict(run.loss.gram_teacher.state_dict()), dict(run.teacher.backbone.state_dict()))
    held = {id(value) for group in run.optimizer.param_groups for value in group["params"]}
    assert not held & {id(value) for value in run.loss.parameters()}


def test_every_last_layer_is_frozen_at_first(tiny: Make) -> None:
    run = Trainer(tiny("method=baseline", *IBOT, "objective.ibot.separate_head=true", "objective.freeze_last_layer=1"))
    layers = [run.student.head.last_layer.weight, run.student.patch_head.last_layer.weight]
    before = [layer.clone() for layer in layers]
    steps(run, 1)
    assert all(map(torch.equal, layers, before))
    steps(run, 1)
    assert not any(map(torch.equal, layers, before))


@options
def test_two_halves_are_a_whole(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    common = ["steps=4", "log_every=2", "checkpoint.every=100", *overrides]
    whole = train(tiny(f"out={tmp_path / 'whole'}", *common), quiet=True)
    config = tiny(f"out={tmp_path / 'halves'}", *common)
    update = Trainer.learner_update

    def interrupted(self: Trainer, large: Tensor, small: Tensor) -> None:
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, large, small)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "learner_update", interrupted)
        with pytest.raises(Interrupted):
            train(config, quiet=True)
    halves = train(config, quiet=True)
    assert same(load_checkpoint(whole), load_checkpoint(halves))
    for row, again in zip(read_metrics(whole), read_metrics(halves), strict=True):
        parts = [name for name in row if name.startswith("loss")]
        assert [row[name] for name in parts] == [again[name] for name in parts]


def test_a_run_may_start_from_one_with_fewer_options(tiny: Make, tmp_path: Path) -> None:
    first = train(tiny("method=baseline", *GRID, "steps=1", f"out={tmp_path / 'first'}"), quiet=True)
    run = Trainer(tiny("method=baseline", *DINOV3, f"start_from={first}"))
    start_from(run, load_checkpoint(first))
    state = load_checkpoint(first)
    loaded = dict(run.student.state_dict())
    assert all(torch.equal(loaded[name], value) for name, value in state["teacher"].items())
    assert not loaded["mask_token.token"].any()
    steps(run, 1)


# Under the value core


class Setting:
    """A run's task in float64, away from the symmetric start, on its first meta batch at learner step `step`."""

    def __init__(self, config: Config, whole: bool = False, step: int = 1) -> None:
        run = Trainer(config)
        assert run.steer is not None
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in [*run.student.parameters(), *run.teacher.parameters()]:
                parameter.add_(0.05 * torch.randn_like(parameter))
            torch.nn.init.normal_(run.steer.designer.out.weight, std=0.5)  # type: ignore[union-attr,arg-type]
        for module in (run.student, run.teacher, run.loss, run.steer.designer):
            module.double()  # type: ignore[union-attr]
        run.loss.begin(step, run.teacher)
        with torch.no_grad():  # so that the Gram teacher is not the student's equal
            for parameter in run.student.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        backbone = run.student.backbone
        backbone.set_attention("math")
        self.run, self.steer, self.phi = run, run.steer, list(run.steer.designer.parameters())  # type: ignore[union-attr]
        views = make_views(backbone, run.steer.meta.next(), config.views, run.device, 0, "meta", 0)
        self.views = Views(*(group.double() for group in views))
        self.scope = everything(backbone) if whole else last_blocks(backbone, 2, ("norm",))
        self.parameters = self.scope.parameters(backbone)
        rng = torch.Generator().manual_seed(3)
        shapes = [value.shape for value in self.parameters.values()]
        self.u = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]

    def task(self) -> SSLTask:
        run = self.run
        return SSLTask(
            run.student,
            run.teacher,
            run.loss,
            0.04,
            self.steer.designer,
            self.views,
            run.config.designer,
            self.scope,
            seed=5,
        )

    def by(self, engine: Any) -> Tensor:
        for parameter in self.phi:
            parameter.grad = None
        value_step(self.task(), self.parameters, self.u, lambda g_down, g_pre: g_down, engine, self.phi)
        return torch.cat([value.grad.flatten() for value in self.phi if value.grad is not None])

    def by_autograd(self) -> Tensor:
        """∇_φ −⟨u, ∇_{θ_S} L⟩, L the loss that the learner takes, the student whole and uncut."""
        run, config, loss = self.run, self.run.config.designer, self.run.loss
        with sdpa_kernel(SDPBackend.MATH):
            designed, _ = design_views(self.steer.designer, self.views, config, 5)  # type: ignore[arg-type]
            draw = loss.draw(self.views.large, 8, generator(5, "objective"))
            seen = designed.large if config.teacher_views == "masked" else self.views.large
            with torch.set_grad_enabled(config.through_teacher):
                targets, _ = loss.teach(run.teacher, seen, 0.04, draw)
            states = loss.states(run.student, designed, 0, draw)
            whole = loss.total(loss.parts(loss.losses(run.student, states, targets, 0, draw), draw))
            named = dict(run.student.backbone.named_parameters())
            wanted = [named[name] for name in self.parameters]
            gradient = torch.autograd.grad(whole, wanted, create_graph=True)
            found = torch.autograd.grad(-inner(self.u, list(gradient)), self.phi)
        return torch.cat([part.flatten() for part in found])


@pytest.mark.parametrize("extra", [[], ["designer.through_teacher=true", "designer.crops=all"]], ids=["", "all"])
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "everything"])
@options
def test_engines_agree_on_the_whole_loss(tiny: Make, overrides: list[str], whole: bool, extra: list[str]) -> None:
    setting = Setting(tiny(*overrides, *extra), whole)
    expected = setting.by_autograd()
    assert expected.norm() > 1e-6
    exact = setting.by(ENGINES["double_backward"])
    assert (exact - expected).norm() < 1e-8 * expected.norm()
    cheap = setting.by(partial(ENGINES["finite_difference"], radius=1e-4))
    assert (cheap - expected).norm() < 1e-4 * expected.norm()
    assert all(parameter.grad is None for parameter in setting.run.student.parameters())
    assert all(parameter.requires_grad for parameter in setting.run.student.parameters())


@pytest.mark.parametrize("overrides", [IBOT, DINOV3, IJEPA], ids=["ibot", "all of DINOv3", "ijepa"])
def test_each_part_changes_phis_gradient(tiny: Make, overrides: list[str]) -> None:
    """So that agreement says something of all of them."""
    setting = Setting(tiny(*overrides))
    before, loss = setting.by_autograd(), setting.run.loss
    if overrides is IJEPA:
        return
    for name in {"ibot_settings", "gram_settings"}:
        settings = getattr(loss, name)
        if settings.weight:
            setattr(loss, name, settings._replace(weight=2 * settings.weight))
            assert (setting.by_autograd() - before).norm() > 1e-3 * before.norm()
            setattr(loss, name, settings)
    if loss.koleo_weight:
        loss.koleo_weight *= 2
        assert (setting.by_autograd() - before).norm() > 1e-3 * before.norm()


@pytest.mark.parametrize("name", ["weights", "unet+weights"])
@pytest.mark.parametrize("overrides", [IBOT, DINOV3, IJEPA], ids=["ibot", "all of DINOv3", "ijepa"])
def test_the_weighted_value_is_that_of_the_learners_gradient(tiny: Make, overrides: list[str], name: str) -> None:
    """⟨u, g_pre⟩ of the step that was taken, with weights on the terms of predictions."""
    run = Trainer(tiny(*overrides, f"designer={name}", "optim.lr=0", "optim.clip=inf", "designer.lr=0"))
    with torch.no_grad():  # a fresh predictor hardly looks at its context: values would drown in rounding
        for parameter in run.student.head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(0, "stir", parameter.numel())))
    steps(run, 2).meters.read()
    steps(run, 1)
    found = run.meters.read()
    assert run.steer is not None
    assert run.steer.direction is not None
    named = dict(run.student.backbone.named_parameters())
    gradient = [named[key].grad for key in run.steer.scope.names]
    value = float(inner(run.steer.direction, gradient))  # type: ignore[arg-type]
    assert found["weighted_value"] == pytest.approx(value, rel=0.05)
    assert found["weighted_value"] > found["plain_value"]


@options
def test_a_value_run_trains(tiny: Make, overrides: list[str]) -> None:
    run = steps(Trainer(tiny(*overrides, "feedback.seg.held=2", "feedback.depth.held=1", "value.diagnose=1")), 3)
    assert run.steer is not None
    assert run.steer.updates == 2
    values = run.meters.read()
    assert all(torch.isfinite(torch.tensor(value)) for value in values.values())
    assert {"value", "cosine", "held_cosine_designed"} <= values.keys()


# Activation checkpointing


@pytest.mark.parametrize("engine", ["finite_difference", "double_backward"])
@pytest.mark.parametrize("overrides", [[], DINOV3, IJEPA], ids=["dino", "all of DINOv3", "ijepa"])
def test_checkpointing_changes_no_gradient(tiny: Make, overrides: list[str], engine: str) -> None:
    found = []
    for on in (False, True):
        run = Trainer(tiny(*overrides, f"value.engine={engine}", f"backbone.checkpointing={on}"))
        calls = [0]

        def count(*_: Any, calls: list[int] = calls) -> None:
            calls[0] += 1

        run.student.backbone.model.blocks[0].register_forward_pre_hook(count)
        run.loss.begin(1, run.teacher)
        assert run.steer is not None
        run.steer.update(1, 0.04)
        phi = [parameter.grad.clone() for parameter in run.steer.designer.parameters()]  # type: ignore[union-attr]
        updates = calls[0]
        steps(run, 1)
        theta = [parameter.grad.clone() for parameter in run.student.parameters() if parameter.grad is not None]
        found.append((phi, theta, updates))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert all(map(torch.equal, found[0][1], found[1][1]))
    assert found[1][2] > found[0][2]  # the first block, which is no part of S, did run again


# Settings that cannot work


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["objective.koleo=0.1", "optim.batch_size=1"],
            r"koleo=0\.1 with optim\.batch_size=1: .* 2 or more",
        ),
        (
            ["objective.koleo=0.1", "value.batch_size=1"],
            r"koleo=0\.1 with value\.batch_size=1: .* 2 or more",
        ),
        ([*IJEPA, "objective.ibot.weight=1"], r"objective\.name=ijepa with objective\.ibot\.weight=1: .* leave it out"),
        ([*IJEPA, "objective.koleo=0.1"], r"ijepa with objective\.koleo=0\.1"),
        ([*IJEPA, "objective.gram.weight=1"], r"ijepa with objective\.gram\.weight=1"),
        ([*IJEPA, "objective.centering=sinkhorn"], r"ijepa with objective\.centering=sinkhorn"),
        ([*IJEPA, "objective.freeze_last_layer=5"], r"ijepa with objective\.freeze_last_layer=5"),
        ([*IJEPA, "views.local_count=2"], r"set views\.local_count=0"),
        ([*IJEPA, "objective.ijepa.heads=3"], r"objective\.ijepa\.width=8: must be a multiple of 4 and of"),
        (["objective.ibot.weight=1", "objective.batch_norm=true"], r"set objective\.batch_norm=false"),
        (["objective.ibot.weight=1", "objective.ibot.mask_ratio=[0.5,0.1]"], r"give the lower ratio first"),
        (["objective.ibot.weight=1", "objective.ibot.mask_probability=0"], r"no patch would be hidden"),
        (["objective.sinkhorn_iterations=0"], r"objective\.sinkhorn_iterations=0: must be at least 1"),
        (["objective.gram.refresh=0"], r"objective\.gram\.refresh=0: must be at least 1"),
        (["objective.name=mae"], r"objective\.name=mae: choose dino, ijepa"),
        (["objective.gram.level=patch"], r"objective\.gram\.level=patch: choose image, batch"),
    ],
)
def test_options_that_contradict_each_other(tiny_yaml: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_config(tiny_yaml, ["out=x", *overrides])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([*IJEPA, "views.global_size=16"], r"objective\.ijepa with views\.global_size=16: .* use larger images"),
        (
            [*IJEPA, "backbone.kwargs.patch_drop_rate=0.5"],
            r"backbone\.name=vit_tiny_patch16_224 cannot have patches hidden",
        ),
        ([*IBOT, "backbone.kwargs.patch_drop_rate=0.5"], r"without patch_drop_rate"),
        ([*IBOT, "views.local_size=4"], r"views\.local_size=4: not a multiple of the patch size 8"),
    ],
)
def test_backbones_and_grids_that_cannot_do_it(tiny: Make, tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        train(tiny(*overrides), quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
