"""Parameter groups, schedules and the moving average, against what the published code returned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dino_value.config import Config, load_config
from dino_value.errors import UserError
from dino_value.models.backbone import create_backbone
from dino_value.models.learner import Learner
from dino_value.objectives.dino import DINOHead
from dino_value.training.optim import cosine_schedule, linear_schedule, lr_scale, parameter_groups, update_ema
from dino_value.training.trainer import Trainer

REFERENCE = Path(__file__).parents[1] / "data" / "reference"


@pytest.mark.parametrize(
    ("name", "start", "end", "warmup"),
    [("lr", 5e-4, 1e-6, 21), ("weight_decay", 0.04, 0.4, 0), ("momentum", 0.996, 1, 0)],
)
def test_the_published_schedules(name: str, start: float, end: float, warmup: int) -> None:
    with np.load(REFERENCE / "dino_schedules.npz") as recorded:
        expected = recorded[name]
    found = [cosine_schedule(step, 70, start, end, warmup) for step in range(70)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_one_step_of_warmup_is_the_published_one() -> None:
    """numpy.linspace(0, lr, 1) is [0]."""
    assert [cosine_schedule(step, 3, 1.0, 0.0, 1) for step in range(3)] == pytest.approx([0, 1, 0.5])


def test_a_schedule_that_is_all_warmup() -> None:
    assert [cosine_schedule(step, 4, 3.0, 0.0, 4) for step in range(4)] == pytest.approx([0, 1, 2, 3])


def test_linear_schedule() -> None:
    assert [linear_schedule(step, 0.02, 0.05, 4) for step in range(6)] == pytest.approx(
        [0.02, 0.03, 0.04, 0.05, 0.05, 0.05]
    )
    assert linear_schedule(0, 0.02, 0.05, 0) == 0.05
    assert linear_schedule(0, 0.02, 0.05, 1) == 0.05


def published_name(name: str) -> str:
    """Ours to theirs: timm's model is one level down, and the last layer is not split into length and direction."""
    return name.replace("backbone.model.", "backbone.").replace("last_layer.weight", "last_layer.weight_v")


def test_the_published_parameter_groups() -> None:
    kwargs = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    learner = Learner(create_backbone("vit_tiny_patch16_224", 32, kwargs), DINOHead(48, 40, 32, 16))
    names = {id(parameter): published_name(name) for name, parameter in learner.named_parameters()}
    decayed, plain = parameter_groups(learner)
    with np.load(REFERENCE / "dino_param_groups.npz") as recorded:
        assert {names[id(p)] for p in decayed["params"]} == set(recorded["decayed"].tolist())  # type: ignore[attr-defined]
        assert {names[id(p)] for p in plain["params"]} == set(recorded["not_decayed"].tolist())  # type: ignore[attr-defined]
    assert plain["weight_decay"] == 0


def test_every_parameter_is_in_one_group() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 1, bias=False))
    grouped = [id(p) for group in parameter_groups(module) for p in group["params"]]  # type: ignore[attr-defined]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters())


def test_moving_average() -> None:
    teacher, student = [torch.ones(3), torch.zeros(2, 2)], [torch.zeros(3), torch.ones(2, 2)]
    update_ema(teacher, student, 0.9)
    torch.testing.assert_close(teacher, [torch.full((3,), 0.9), torch.full((2, 2), 0.1)])
    update_ema(teacher, student, 1.0)
    torch.testing.assert_close(teacher, [torch.full((3,), 0.9), torch.full((2, 2), 0.1)])
    update_ema(teacher, student, 0.0)
    assert all(map(torch.equal, teacher, student))
    assert bool((student[0] == 0).all())


def published_rate(name: str, rate: float, blocks: int) -> float:
    """DINOv2's rule in words of its own names: embeddings, then the blocks, then everything else."""
    layers = ["embeddings", *range(blocks), "else"]
    if name.split(".")[0] != "backbone":
        layer: int | str = "else"
    elif name.split(".")[1] in ("pos_embed", "patch_embed", "mask_token", "cls_token"):
        layer = "embeddings"
    elif name.split(".")[1] == "blocks":
        layer = int(name.split(".")[2])
    else:
        layer = "else"
    return rate ** (len(layers) - 1 - layers.index(layer))


def small_learner(registers: bool = False) -> Learner:
    kwargs = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_tiny_patch16_224"
    return Learner(create_backbone(name, 32, kwargs), DINOHead(48, 40, 32, 16))


def test_the_published_layer_decay() -> None:
    """Registers are not among DINOv2's embeddings: they learn at the full rate."""
    learner = small_learner(registers=True)
    names = {
        id(parameter): name.replace("backbone.model.", "backbone.") for name, parameter in learner.named_parameters()
    }
    seen = set()
    for group in parameter_groups(learner, layer_decay=0.9, patch_embed_scale=0.2):
        for parameter in group["params"]:  # type: ignore[attr-defined]
            name = names[id(parameter)]
            expected = published_rate(name, 0.9, 3) * (0.2 if "patch_embed" in name else 1)
            assert group["lr_scale"] == pytest.approx(expected, rel=1e-15)
            decayed = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
            assert group["decay"] is decayed
            assert group.get("weight_decay", 0.04) == (0.04 if decayed else 0.0)
            seen.add(name)
    assert seen == set(names.values())


@pytest.mark.parametrize(
    ("name", "power"),
    [
        ("backbone.model.pos_embed", 4),
        ("backbone.model.patch_embed.proj.weight", 4),
        ("mask_token.token", 4),
        ("backbone.model.blocks.0.attn.qkv.weight", 3),
        ("backbone.model.blocks.2.norm1.bias", 1),
        ("model.blocks.1.mlp.fc1.weight", 2),
        ("backbone.model.norm.weight", 0),
        ("backbone.model.reg_token", 0),
        ("head.last_layer.weight", 0),
        ("head.blocks.1.attn.qkv.weight", 0),  # a predictor's, not the backbone's
    ],
)
def test_layers_by_name(name: str, power: int) -> None:
    assert lr_scale(name, 3, 0.5) == 0.5**power


def test_one_group_for_each_rate_and_decay() -> None:
    groups = parameter_groups(small_learner(), layer_decay=0.8)
    kinds = [(group["lr_scale"], group["decay"]) for group in groups]
    assert len(set(kinds)) == len(kinds) == 2 * 5
    assert sorted({scale for scale, _ in kinds}) == pytest.approx([0.8**power for power in (4, 3, 2, 1, 0)])
    torch.optim.AdamW(groups, lr=1e-3, fused=True)


def test_without_layer_decay_the_groups_are_as_ever() -> None:
    learner = small_learner()
    decayed, plain = parameter_groups(learner, layer_decay=1.0, patch_embed_scale=1.0)
    assert set(decayed) == {"params", "decay"}
    assert set(plain) == {"params", "decay", "weight_decay"}
    assert [group["lr_scale"] for group in parameter_groups(learner, patch_embed_scale=0.2)].count(0.2) == 2


def test_layer_decay_cuts_the_published_groups_and_moves_nothing_between_them() -> None:
    learner = small_learner()
    names = {id(parameter): published_name(name) for name, parameter in learner.named_parameters()}
    groups = parameter_groups(learner, layer_decay=0.9, patch_embed_scale=0.2)
    with np.load(REFERENCE / "dino_param_groups.npz") as recorded:
        for key, decay in (("decayed", True), ("not_decayed", False)):
            found = [names[id(p)] for group in groups if group["decay"] is decay for p in group["params"]]  # type: ignore[attr-defined]
            assert sorted(found) == sorted(recorded[key].tolist())


DECAYED = ["method=baseline", "optim.layer_decay=0.5", "optim.patch_embed_lr_mult=0.2", "optim.warmup=2", "steps=6"]


def steps(run: Trainer, count: int) -> Trainer:
    for large, small in run.stream.iterate(run.step, run.step + count):
        run.learner_update(large, small)
    return run


def test_a_run_scales_its_schedule_by_layer(tiny: Callable[..., Config]) -> None:
    run = Trainer(tiny(*DECAYED, "optim.weight_decay_end=0.4"))
    names = {id(parameter): name for name, parameter in run.student.named_parameters()}
    for step in range(4):
        steps(run, 1)
        rate, decay = cosine_schedule(step, 6, 1e-3, 0, 2), cosine_schedule(step, 6, 0.04, 0.4)
        assert run.schedules(step) == pytest.approx({"lr": rate, "weight_decay": decay})
        for group in run.optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                scale = lr_scale(name, 3, 0.5) * (0.2 if "patch_embed" in name else 1)
                assert group["lr"] == pytest.approx(rate * scale)
                assert group["weight_decay"] == pytest.approx(decay if group["decay"] else 0)


def test_early_blocks_move_less(tiny: Callable[..., Config]) -> None:
    """One step of Adam without decay moves every weight by its learning rate."""
    plain = ["method=baseline", "optim.weight_decay=0", "optim.weight_decay_end=0", "optim.clip=.inf"]
    run = Trainer(tiny(*plain, "optim.layer_decay=0.5"))
    names = [f"backbone.model.blocks.{block}.mlp.fc1.weight" for block in range(3)] + ["head.mlp.0.weight"]
    before = [run.student.get_parameter(name).detach().clone() for name in names]
    steps(run, 1)
    moved = [
        (run.student.get_parameter(name) - old).abs().max().item() for name, old in zip(names, before, strict=True)
    ]
    assert moved == pytest.approx([1e-3 * 0.5**power for power in (3, 2, 1, 0)], rel=1e-3)


def test_a_resumed_run_keeps_its_rates(tiny: Callable[..., Config]) -> None:
    whole, first, second = Trainer(tiny(*DECAYED)), Trainer(tiny(*DECAYED)), Trainer(tiny(*DECAYED))
    steps(whole, 4)
    second.load_state_dict(steps(first, 2).state_dict())
    steps(second, 2)
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, second.student.state_dict()[name]), name
    assert [group["lr"] for group in whole.optimizer.param_groups] == [g["lr"] for g in second.optimizer.param_groups]


@pytest.mark.parametrize("key", ["optim.layer_decay", "optim.patch_embed_lr_mult"])
@pytest.mark.parametrize("value", ["-0.1", "1.5"])
def test_factors_outside_their_range(tiny_yaml: Path, key: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{key}={value}: must"):
        load_config(tiny_yaml, ["out=run", f"{key}={value}"])


def test_a_frozen_backbone_is_untouched(tiny: Callable[..., Config]) -> None:
    """Bit for bit, the student's by the optimizer (weight decay, moments) and the teacher's by the average."""
    run = Trainer(
        tiny("method=baseline", "optim.freeze_backbone=3", "optim.weight_decay=0.5", "optim.weight_decay_end=0.5")
    )
    before = {name: value.clone() for name, value in run.student.backbone.state_dict().items()}
    steps(run, 3)
    for learner in (run.student, run.teacher):
        for name, value in learner.backbone.state_dict().items():
            assert torch.equal(value, before[name]), name
    backbone = set(map(id, run.student.backbone.parameters()))
    assert not any(id(parameter) in backbone for parameter in run.optimizer.state)  # moments begin when it moves
    steps(run, 1)
    for learner in (run.student, run.teacher):
        assert not torch.equal(learner.backbone.model.norm.weight, before["model.norm.weight"])
