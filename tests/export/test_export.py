"""Weights out: what other libraries read back gives our features, and the card says where they came from."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from dino_value.errors import UserError
from dino_value.export import torchhub as module
from dino_value.export.command import export
from dino_value.export.torchhub import official
from dino_value.models.backbone import Backbone, create_backbone, load_backbone, save_backbone
from dino_value.models.weight_files import read_pickle
from dino_value.models.weights import DINO

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
VIT, V2, V2_REG = "vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"
GIANT, V3, V3_BIAS = "vit_giant_patch14_dinov2", "vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"
V3_PLUS = "vit_small_plus_patch16_dinov3_qkvb"
EVERY = (VIT, V2, V2_REG, GIANT, V3, V3_BIAS, V3_PLUS)
ELSEWHERE = ("vit_small_patch16_rope_mixed_224", "vit_base_patch16_clip_224", "vit_medium_patch16_gap_256")


def run_folder(folder: Path, name: str, **kwargs: Any) -> Backbone:
    """A run folder's weights, far from their initialisation, so that every tensor counts."""
    backbone = create_backbone(name, 32, {**TINY, **kwargs}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter_name, value in backbone.named_parameters():
        about = 1.0 if "norm" in parameter_name and "weight" in parameter_name else 0.0
        torch.nn.init.normal_(value, about, 0.3, generator=generator)
    folder.mkdir(exist_ok=True)
    save_backbone(folder / "backbone.safetensors", backbone, {"step": "7"})
    return backbone


def close(tokens: Tensor, backbone: Backbone, images: Tensor) -> None:
    with torch.no_grad():
        features = backbone(images)
    torch.testing.assert_close(tokens[:, 0], features.cls, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens[:, backbone.num_prefix_tokens :], features.patches, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", [*EVERY, ELSEWHERE[0]])
def test_timm_reads_it(name: str, tmp_path: Path) -> None:
    backbone = run_folder(tmp_path / "run", name)
    written = export(tmp_path / "run", "timm")
    assert written.folder == tmp_path / "run" / "export" / "timm"
    assert written.difference < 1e-5
    model = timm.create_model(f"local-dir:{written.folder}", pretrained=True).eval()
    for size in ((32, 32), (48, 32)):
        images = torch.randn(2, 3, *size)
        close(model.forward_features(images), backbone, images)
        torch.testing.assert_close(model(images), backbone(images).cls, rtol=1e-5, atol=1e-5)
    assert model.pretrained_cfg["input_size"] == [3, 32, 32]
    assert model.pretrained_cfg["mean"] == list(backbone.mean)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_transformers_reads_it(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    backbone = run_folder(tmp_path / "run", name)
    written = export(tmp_path / "run", "hf", tmp_path / "out")
    assert written.difference < 1e-5
    model = transformers.AutoModel.from_pretrained(written.folder).eval()
    images = torch.randn(2, 3, 32, 32)
    close(model(pixel_values=images).last_hidden_state, backbone, images)
    processor = transformers.AutoImageProcessor.from_pretrained(written.folder)
    assert tuple(processor.image_mean) == backbone.mean


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_all_formats_come_back_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    backbone, images = run_folder(tmp_path / "run", name), torch.randn(1, 3, 32, 32)
    for format, file in (("timm", "model.safetensors"), ("hf", "model.safetensors"), ("torchhub", "backbone.pth")):
        folder = export(tmp_path / "run", format, tmp_path / format).folder
        again = load_backbone(folder / file, name, 32, TINY, min_match=1.0).eval()
        torch.testing.assert_close(again(images).patches, backbone(images).patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "model", "kwargs"),
    [
        ("dino_backbone_only", VIT, {"patch_size": 8}),
        ("dinov2_vit", V2, {}),
        ("dinov2_vit_reg4", V2_REG, {}),
        ("dinov3_vit", V3_BIAS, {}),
    ],
)
def test_the_official_layout_is_the_published_files(file: str, model: str, kwargs: dict[str, Any]) -> None:
    """In and out again: every name and shape, and every value that features depend on."""
    published = read_pickle(REFERENCE / f"{file}.pth")
    sizes = {"embed_dim": 48, "depth": 3, "num_heads": 3, **kwargs}
    layout, tensors = official(load_backbone(REFERENCE / f"{file}.pth", model, kwargs=sizes))
    assert layout == file.split("_")[0]
    assert {name: value.shape for name, value in tensors.items()} == {n: v.shape for n, v in published.items()}
    for name, value in published.items():
        if name == "mask_token":
            continue  # for pretraining
        if name.endswith("qkv.bias") and layout == "dinov3":
            value = value * published[f"{name}_mask"]  # of the key's, which the model masks, nothing is kept
        if name in ("cls_token", "pos_embed") and "reg" in file:
            continue  # their sum, in the first row, is what counts
        torch.testing.assert_close(tensors[name], value, rtol=1e-6, atol=1e-6)
    if "reg" in file:
        sums = [each["cls_token"] + each["pos_embed"][:, :1] for each in (tensors, published)]
        torch.testing.assert_close(*sums)
        assert torch.equal(tensors["pos_embed"][:, 1:], published["pos_embed"][:, 1:])


@pytest.mark.parametrize("format", ["hf", "torchhub"])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_architecture_of_none_of_them(name: str, format: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run_folder(tmp_path / "run", name)
    with pytest.raises(UserError, match=r"have no such architecture .*; use --format timm") as caught:
        export(tmp_path / "run", format)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == ["backbone.safetensors"]


def test_what_does_not_come_back_the_same_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder(tmp_path / "run", V2)
    whole = module.official

    def broken(backbone: Backbone) -> tuple[str, dict[str, Tensor]]:
        layout, tensors = whole(backbone)
        return layout, {**tensors, "blocks.1.ls2.gamma": tensors["blocks.1.ls1.gamma"]}

    monkeypatch.setattr(module, "official", broken)
    with pytest.raises(UserError, match="read back from torchhub differ by"):
        export(tmp_path / "run", "torchhub", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_mistakes(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", VIT)
    with pytest.raises(UserError, match="--format onnx: choose timm, hf, torchhub"):
        export(tmp_path / "run", "onnx")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        export(tmp_path / "run", "timm", tmp_path / "out")
    with pytest.raises(UserError, match="cannot be written"):
        export(tmp_path / "run", "timm", tmp_path / "out" / "notes.txt" / "deeper")
    with pytest.raises(UserError, match="not a run folder with weights"):
        export(tmp_path / "out", "timm")


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder(tmp_path / "run", VIT)
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"pip install 'dino-value\[language\]'"):
        export(tmp_path / "run", "hf")


def test_a_weights_file_of_others(tmp_path: Path) -> None:
    backbone = run_folder(tmp_path / "run", VIT)
    path = tmp_path / "other.safetensors"
    save_file({name: value.contiguous() for name, value in backbone.model.state_dict().items()}, path)
    (tmp_path / "config.yaml").write_text("method: value\n")  # of something else
    with pytest.raises(UserError, match="add --model"):
        export(path, "timm")
    with pytest.raises(UserError, match="24 wide, the model 192"):
        export(path, "timm", model=VIT)
    small = create_backbone(VIT, 32, {"depth": 1})
    save_file({name: value.contiguous() for name, value in small.model.state_dict().items()}, path)
    with pytest.raises(UserError, match="1 blocks, the model 12"):
        export(path, "timm", model=VIT)


def test_the_card(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_folder(run, VIT)
    (run / "config.yaml").write_text(
        "method: value\nsteps: 9\ndata: {unlabeled: /data/plants, ade20k: /data/ade}\n"
        "backbone: {weights: /w/dino.pth}\noptim: {batch_size: 32}\n"
    )
    (run / "results").mkdir()
    (run / "results" / "seg.json").write_text(json.dumps({"miou": 0.4321, "settings": {"lr": 1}, "seconds": 3}))
    card = (export(run, "timm").folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\npipeline_tag: image-feature-extraction\n")
    header = card.split("---")[1]
    assert "# license: yours to choose" in header
    for said in (
        "# run",
        "arXiv 2601.22108",
        "/data/plants",
        "ade20k (/data/ade)",
        "Began with /w/dino.pth; 7 of 9 steps of 32 images",
        "batch_size: 32",
        "| seg | miou | 0.4321 |",
        "features differ by at most",
    ):
        assert said in card
    assert "seconds" not in card
    assert "another rule" not in card


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "DINO (arXiv 2104.14294)"),
        ({"name": "ijepa", "ibot": {"weight": 0.0}}, "I-JEPA (arXiv 2301.08243)"),
        (
            {"centering": "sinkhorn", "ibot": {"weight": 1.0}, "koleo": 0.1, "gram": {"weight": 2.0}},
            "DINO (arXiv 2104.14294) with Sinkhorn-Knopp centring, iBOT, KoLeo, Gram anchoring",
        ),
    ],
)
def test_the_card_names_the_objective(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    save_backbone(run / "backbone.safetensors", create_backbone("vit_tiny_patch16_224", 16, TINY))
    (run / "config.yaml").write_text(OmegaConf.to_yaml({"method": "baseline", "objective": settings}))
    card = (export(run, "timm").folder / "README.md").read_text()
    assert f"Continued pretraining with {said}, without labels." in card


def test_the_card_warns_of_another_interpolation(tmp_path: Path) -> None:
    backbone = run_folder(tmp_path / "run", VIT)
    backbone.positions = DINO
    save_backbone(tmp_path / "run" / "backbone.safetensors", backbone)
    said = {
        format: "another rule" in (export(tmp_path / "run", format).folder / "README.md").read_text()
        for format in ("timm", "torchhub")
    }
    assert said == {"timm": True, "torchhub": False}


def test_weights_are_the_teachers(tmp_path: Path) -> None:
    backbone = run_folder(tmp_path / "run", V2)
    found = load_file(export(tmp_path / "run", "timm").folder / "model.safetensors")
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in backbone.model.state_dict().items()
    }
