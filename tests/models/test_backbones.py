"""Backbones: the contract, the cut between blocks, and weights in and out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dino_value.errors import UserError
from dino_value.models.backbone import Backbone, create_backbone, load_backbone, load_weights, save_backbone
from dino_value.models.weight_files import read_tensors
from dino_value.models.weights import Reading

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
TINY = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
MODELS = (
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",  # registers, LayerScale
    "vit_small_patch16_dinov3",  # rotary positions
    "vit_small_patch16_rope_mixed_224",  # a rotary table of its own for each block
)
every = pytest.mark.parametrize("name", MODELS)


def build(name: str = MODELS[0], **kwargs: Any) -> Backbone:
    torch.manual_seed(0)
    return create_backbone(name, 16, {**TINY, **kwargs})


@every
@pytest.mark.parametrize("size", [(16, 16), (8, 8), (24, 16)])
def test_the_contract(name: str, size: tuple[int, int]) -> None:
    backbone = build(name).eval()
    features = backbone(torch.randn(2, 3, *size))
    grid = (size[0] // 8, size[1] // 8)
    assert features.grid == grid
    assert features.cls.shape == (2, 24)
    assert features.patches.shape == (2, grid[0] * grid[1], 24)
    assert (backbone.patch_size, backbone.embed_dim, backbone.depth) == (8, 24, 3)


@every
@pytest.mark.parametrize("size", [(16, 16), (8, 8), (24, 16)])
def test_it_is_timms_own_forward(name: str, size: tuple[int, int]) -> None:
    backbone = build(name).eval()
    images = torch.randn(2, 3, *size)
    features, tokens = backbone(images), backbone.model.forward_features(images)
    torch.testing.assert_close(features.cls, tokens[:, 0])
    torch.testing.assert_close(features.patches, tokens[:, backbone.num_prefix_tokens :])


@every
@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_a_run_cut_at_a_block_is_the_whole_run(name: str, cut: int) -> None:
    backbone = build(name).eval()
    images = torch.randn(2, 3, 24, 16)
    whole, parts = backbone(images), backbone(backbone(images, stop=cut), start=cut)
    assert torch.equal(whole.cls, parts.cls)
    assert torch.equal(whole.patches, parts.patches)


@every
def test_both_attentions_are_one_function(name: str) -> None:
    backbone = build(name).eval()
    images = torch.randn(2, 3, 16, 16)
    backbone.set_attention("sdpa")
    fused = backbone(images).cls
    backbone.set_attention("math")
    torch.testing.assert_close(backbone(images).cls, fused, rtol=1e-4, atol=1e-5)


def test_normalisation() -> None:
    backbone = build()
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    torch.testing.assert_close(backbone.normalise(images), (images.float() / 255 - mean) / std)
    torch.testing.assert_close(backbone.normalise(images.float() / 255), backbone.normalise(images))


def test_an_unknown_name_lists_near_ones() -> None:
    with pytest.raises(
        UserError, match=r"vit_tiny_patch16_225: timm has no such model; near names: .*vit_tiny_patch16"
    ):
        create_backbone("vit_tiny_patch16_225", 16)


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("resnet18", {}, "not a vision transformer|timm refused it"),
        (MODELS[0], {"embed_dims": 3}, "timm refused it"),
        (MODELS[0], {"embed_dim": 25, "num_heads": 3}, "timm refused it"),
        (MODELS[0], {"img_size": 32}, "timm refused it"),
        (MODELS[0], {"patch_size": 5}, "not a multiple of the patch size 5"),
    ],
)
def test_what_cannot_be_built(name: str, kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        create_backbone(name, 16, kwargs)


def published() -> Backbone:
    return create_backbone(MODELS[0], 32, {**TINY, "embed_dim": 48}, REFERENCE / "dino_backbone_only.pth").eval()


def test_published_dino_weights_give_the_published_features() -> None:
    with np.load(REFERENCE / "dino_vit.npz") as file:
        recorded = {name: torch.from_numpy(file[name]) for name in file}
    backbone = published()
    features = backbone(recorded["x32"])
    torch.testing.assert_close(features.cls, recorded["cls32"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.patches, recorded["tokens32"][:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(backbone(recorded["x48"]).cls, recorded["cls48"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("outer", [None, "teacher", "student", "state_dict", "model"])
def test_the_usual_wrappings(tmp_path: Path, prefix: str, outer: str | None) -> None:
    tensors = {f"{prefix}{name}": value for name, value in build().model.state_dict().items()}
    torch.save({outer: tensors, "epoch": 3} if outer else tensors, tmp_path / "w.pth")
    target = create_backbone(MODELS[0], 16, TINY)
    report = load_weights(target, tmp_path / "w.pth", min_match=1.0)
    assert (report.missing, report.unexpected) == ([], [])
    assert all(map(torch.equal, target.model.state_dict().values(), tensors.values()))


def test_the_namespace_of_main_dino_is_known_and_other_objects_are_refused(tmp_path: Path) -> None:
    """main_dino.py's own checkpoint.pth holds an argparse.Namespace beside the weights."""
    weights = {f"module.backbone.{name}": value for name, value in build().model.state_dict().items()}
    torch.save({"student": weights, "args": argparse.Namespace(arch="vit_tiny")}, tmp_path / "checkpoint.pth")
    assert load_weights(build(), tmp_path / "checkpoint.pth").share == 1
    torch.save({"student": weights, "args": Path("of/another/class")}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="refused by weights-only loading") as caught:
        read_tensors(tmp_path / "checkpoint.pth")
    assert "\n" not in str(caught.value)


def test_positions_of_another_size_are_resampled(tmp_path: Path) -> None:
    save_backbone(tmp_path / "w.safetensors", build())
    larger = create_backbone(MODELS[0], 32, TINY)
    assert load_weights(larger, tmp_path / "w.safetensors").share == 1
    assert larger.model.pos_embed.shape[1] == 17


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    save_backbone(tmp_path / "w.safetensors", build("vit_small_patch16_dinov3", depth=2))
    target = build()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(
        UserError, match=r"matched \d+, missing \d+ \(.+\), unexpected \d+ \(.+\); \d+% is below"
    ) as caught:
        load_weights(target, tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    report = load_weights(target, tmp_path / "w.safetensors", min_match=0.0, reading=Reading(random=["pos_embed"]))
    assert len(report.matched) + len(report.missing) == len(target.model.state_dict())
    assert not set(report.matched) & set(report.missing)
    now = target.model.state_dict()
    source = load_file(tmp_path / "w.safetensors")
    for name in report.matched:
        assert torch.equal(now[name], source[name])
    for name in report.missing:
        assert torch.equal(now[name], before[f"model.{name}"])


def test_tensors_of_another_shape_do_not_count_as_matched(tmp_path: Path) -> None:
    save_backbone(tmp_path / "w.safetensors", build(embed_dim=48))
    with pytest.raises(UserError, match=r"matched 0, missing"):
        load_weights(build(), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.safetensors", b"junk", "not a readable weights file"),
        ("a.pth", b"junk", "weights-only|not a readable"),
        ("a.pth", b"", "not a readable|weights-only"),
    ],
)
def test_damaged_weights(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        load_weights(build(), tmp_path / name)
    assert "\n" not in str(caught.value)


def test_absent_or_empty_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such weights file"):
        load_weights(build(), tmp_path / "absent.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds no tensors"):
        load_weights(build(), tmp_path / "empty.pth")


@every
def test_our_own_files_name_their_architecture(tmp_path: Path, name: str) -> None:
    backbone = build(name).eval()
    save_backbone(tmp_path / "backbone.safetensors", backbone, {"step": "7"})
    with safe_open(tmp_path / "backbone.safetensors", framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(backbone.model.state_dict())  # timm's own names
    assert metadata["step"] == "7"
    assert json.loads(metadata["kwargs"])["embed_dim"] == 24
    images = torch.randn(1, 3, 16, 16)
    for source in (tmp_path, tmp_path / "backbone.safetensors"):
        assert torch.equal(load_backbone(source).eval()(images).cls, backbone(images).cls)


def test_a_foreign_file_needs_a_name(tmp_path: Path) -> None:
    save_file({k: v.contiguous() for k, v in build().model.state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="add --model"):
        load_backbone(tmp_path / "w.safetensors")
    loaded = load_backbone(tmp_path / "w.safetensors", model=MODELS[0], img_size=16, kwargs=TINY)
    assert torch.equal(loaded.model.cls_token, build().model.cls_token)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder with weights"):
        load_backbone(tmp_path)
