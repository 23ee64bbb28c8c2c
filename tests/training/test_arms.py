"""The arms that value is compared with: each does what its name says, from one checkpoint and one stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dino_value.config import Config
from dino_value.data.labelled import LabelledTensors, Shuffled
from dino_value.designers import AttentionMasks, RandomMasks
from dino_value.errors import UserError
from dino_value.models.backbone import create_backbone
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.metrics import read_metrics
from dino_value.training.steps import make_views
from dino_value.training.trainer import Trainer, train

Make = Callable[..., Config]


def rows(folder: Path, key: str) -> list[float]:
    return [row[key] for row in read_metrics(folder) if key in row]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", ["random_masks", "attention"])
def test_controls_hide_their_share_need_no_labels_and_resume_bit_for_bit(tiny: Make, tmp_path: Path, name: str) -> None:
    arm = [f"designer.name={name}", "designer.keep_ratio=0.5", "data.ade20k=null", "data.nyuv2=null"]
    whole = train(tiny(*arm, f"out={tmp_path / 'whole'}"), quiet=True)
    assert rows(whole, "mask_mean") == [0.5] * 4
    parted = tmp_path / "parted"
    train(tiny(*arm, f"out={parted}"), quiet=True)
    for path in (parted / "checkpoints").glob("*4.pt"):
        path.unlink()
    train(tiny(*arm, f"out={parted}"), quiet=True)
    assert same(load_checkpoint(whole)["student"], load_checkpoint(parted)["student"])


def test_attention_masks_keep_what_the_class_token_looks_at_least() -> None:
    scores = torch.tensor([[[4.0, 1.0], [3.0, 2.0]]])
    mask = AttentionMasks(0.5, lambda views: scores)(torch.zeros(1, 3, 4, 4))
    assert mask[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_random_masks_differ_and_keep_whole_patches() -> None:
    torch.manual_seed(0)
    masks = RandomMasks(0.25, 2)(torch.zeros(8, 3, 8, 8))
    assert masks.mean((-1, -2)).eq(0.25).all()
    assert masks.unique(dim=0).shape[0] > 1
    tiles = masks.unfold(2, 2, 2).unfold(3, 2, 2)
    assert tiles.amax((-1, -2)).equal(tiles.amin((-1, -2)))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "qk_norm": True}),
        ("vit_small_patch16_dinov3", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    ],
)
def test_class_attention_is_the_one_that_the_block_computes(name: str, kwargs: dict[str, object]) -> None:
    torch.manual_seed(0)
    backbone = create_backbone(name, 32, kwargs).eval()
    images = torch.randn(2, 3, 32, 32)
    attention = backbone.model.blocks[-1].attn
    attention.fused_attn = False
    kept: list[Tensor] = []
    hook = attention.attn_drop.register_forward_hook(lambda module, inputs, output: kept.append(output))
    backbone(images)
    hook.remove()
    expected = kept[0].mean(1)[:, 0, backbone.num_prefix_tokens :]
    found = backbone.class_attention(images)
    assert found.shape == (2, 32 // backbone.patch_size, 32 // backbone.patch_size)
    torch.testing.assert_close(found.flatten(1), expected)


def test_an_adversarial_designer_raises_the_loss(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = ["method=adversarial", "designer.lambda_spars=0", "designer.lambda_tv=0", "data.ade20k=null"]
    run = Trainer(tiny(*arm, "data.nyuv2=null", "designer.lr=1e-3"))
    steer = run.steer
    assert steer is not None
    assert steer.feedback == []
    batch = steer.meta_stream.batch(0)
    monkeypatch.setattr(steer.meta, "next", lambda: batch)  # the same batch again: its loss must rise
    monkeypatch.setattr("dino_value.training.designer_update.key", lambda *parts: 1)
    views = make_views(run.student.backbone, batch, run.config.views, run.device, run.config.seed, "meta", 0)
    monkeypatch.setattr("dino_value.training.designer_update.make_views", lambda *arguments: views)
    learner = {name: value.clone() for name, value in run.student.state_dict().items()}
    found = []
    for _ in range(20):
        steer.update(0, 0.04)
        found.append(steer.meters.read()["opposed_loss"])
    assert found[-1] > found[0]
    assert same(learner, run.student.state_dict())


def test_a_frozen_designer_is_the_other_runs_and_stays_so(tiny: Make, tmp_path: Path) -> None:
    value = train(tiny("method=value", f"out={tmp_path / 'value'}"), quiet=True)
    frozen = train(
        tiny(f"designer.start_from={value}", "designer.frozen=true", "data.ade20k=null", "data.nyuv2=null"), quiet=True
    )
    taught, kept = load_checkpoint(value)["steer"], load_checkpoint(frozen)["steer"]
    assert same(taught["designer"], kept["designer"])
    assert (taught["updates"], kept["updates"]) == (2, 0)
    with pytest.raises(UserError, match=r"of another architecture than designer\.name=unet, width=8"):
        Trainer(tiny(f"designer.start_from={value}", "designer.width=8"))
    baseline = train(tiny("method=baseline", f"out={tmp_path / 'baseline'}"), quiet=True)
    with pytest.raises(UserError, match="this run has no mask generator"):
        Trainer(tiny(f"designer.start_from={baseline}"))


def test_shuffled_labels_are_the_same_labels_on_other_images() -> None:
    images, targets = torch.arange(12, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), torch.arange(12)
    plain = LabelledTensors("classes", images, targets, ["a"])
    shuffled = Shuffled(plain, 0)
    found = [shuffled.load(index) for index in range(12)]
    assert [int(image[0, 0, 0]) for image, _ in found] == list(range(12))
    assert sorted(int(target) for _, target in found) == list(range(12))
    assert [int(Shuffled(plain, 1).load(index)[1]) for index in range(12)] != [int(target) for _, target in found]


@pytest.mark.parametrize("count", [2, 3, 12])
def test_no_image_keeps_its_own_label(count: int) -> None:
    for seed in range(50):
        order = Shuffled(LabelledTensors("classes", torch.zeros(count, 3, 2, 2), torch.arange(count)), seed).order
        assert sorted(order) == list(range(count))
        assert all(donor != own for own, donor in enumerate(order))


def test_shuffled_maps_take_the_size_of_their_new_image(tiny: Make) -> None:
    run = Trainer(tiny("feedback.shuffle=true"))
    assert run.steer is not None
    plain = Trainer(tiny()).steer
    assert plain is not None
    task, other = run.steer.feedback[0], plain.feedback[0]
    images, labels = task.train_stream.batch(0)
    same_images, true_labels = other.train_stream.batch(0)
    assert torch.equal(images, same_images)
    assert not torch.equal(labels, true_labels)


def test_finetuning_lowers_the_labels_loss_on_all_labels_and_resumes(tiny: Make, tmp_path: Path) -> None:
    arm = ["method=finetune", "feedback.warmup=1", "optim.lr=3e-3", "steps=30"]
    whole = train(tiny(*arm, f"out={tmp_path / 'whole'}"), quiet=True)
    losses = rows(whole, "loss")
    assert sum(losses[-5:]) < sum(losses[:5])
    run = Trainer(tiny(*arm))
    assert run.steer is None
    assert [len(task.train_indices) for task in run.feedback] == [12, 10]
    parted = tmp_path / "parted"
    train(tiny(*arm, f"out={parted}", "checkpoint.keep=99"), quiet=True)
    for path in (parted / "checkpoints").iterdir():
        if path.stem > "step_00000014":
            path.unlink()
    train(tiny(*arm, f"out={parted}"), quiet=True)
    left, right = load_checkpoint(whole), load_checkpoint(parted)
    assert same(left["student"], right["student"])
    assert same(left["labels"]["seg"]["head"], right["labels"]["seg"]["head"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=adversarial", "designer=weights"], "choose designer.name=unet"),
        (["method=adversarial", "designer.frozen=true"], "not frozen"),
        (["designer=random_masks", "designer.frozen=true"], "has no mask generator; leave it out"),
        (["designer=attention", "designer.crops=all"], "set designer.crops=global"),
        (["method=finetune", "data.ade20k=null", "data.nyuv2=null"], "method=finetune needs labels"),
    ],
)
def test_settings_that_an_arm_cannot_have(tiny: Make, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(*overrides)
