"""Weights in: every published layout, read safely, named as timm does, and giving the published features."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from dino_value.config import Config
from dino_value.errors import UserError
from dino_value.export.command import export
from dino_value.models.backbone import Backbone, create_backbone, load_backbone, load_weights, save_backbone
from dino_value.models.weight_files import read_header, read_pickle, read_tensors
from dino_value.models.weights import (
    DINO,
    PLAIN,
    TIMM,
    Positions,
    center_from,
    head_from,
    load_head,
    recognise,
)
from dino_value.objectives.dino import DINOHead
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.training.start import start_from, start_head
from dino_value.training.trainer import Trainer, train

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
RECORDED = {"embed_dim": 48, "depth": 3, "num_heads": 3}
TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
VIT, V2, V2_REG = "vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"
V3, V3_BIAS = "vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"


def recorded(name: str) -> dict[str, Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def build(name: str, size: int = 32, **kwargs: Any) -> Backbone:
    """Weights far from their initialisation, so that every tensor counts."""
    backbone = create_backbone(name, size, {**TINY, **kwargs}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter_name, value in backbone.named_parameters():
        about = 1.0 if "norm" in parameter_name and "weight" in parameter_name else 0.0
        torch.nn.init.normal_(value, about, 0.3, generator=generator)
    return backbone


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# What the published models return


@pytest.mark.parametrize("img_size", [224, 56])
@pytest.mark.parametrize(
    ("file", "record", "model", "sizes"),
    [
        ("dino_backbone_only", "dino_vit", VIT, (32, 48)),
        ("dinov2_vit", "dinov2_vit", V2, (56, 84)),
        ("dinov2_vit_reg4", "dinov2_vit_reg4", V2_REG, (56, 84)),
        ("dinov3_vit", "dinov3_vit", V3_BIAS, (64, 96)),
    ],
)
def test_features_are_the_published_ones(
    file: str, record: str, model: str, sizes: tuple[int, int], img_size: int
) -> None:
    """At the size of the training and at another, whatever size the model was asked for: the table is the file's."""
    kwargs = {**RECORDED, **({"patch_size": 8} if model == VIT else {})}
    if img_size % (8 if model == VIT else 14 if "14" in model else 16):
        img_size = 64
    backbone = load_backbone(REFERENCE / f"{file}.pth", model, img_size, kwargs, min_match=1.0).eval()
    values = recorded(record)
    for size in sizes:
        features = backbone(values[f"x{size}"])
        close(features.cls, values[f"cls{size}"])
        patches = values.get(f"patch{size}", values.get(f"tokens{size}"))
        if patches is not None:
            close(features.patches, patches[:, -features.patches.shape[1] :])


def test_dinov3_without_biases_in_the_model_is_refused_with_the_model_to_use() -> None:
    with pytest.raises(UserError, match=f"biases, which {V3} would drop: use {V3_BIAS}"):
        load_backbone(REFERENCE / "dinov3_vit.pth", V3, 64, RECORDED)


def test_dinov3_biases_of_zero_may_be_dropped(tmp_path: Path) -> None:
    tensors = read_pickle(REFERENCE / "dinov3_vit.pth")
    for name, value in tensors.items():
        if name.endswith("qkv.bias"):
            value[:48], value[96:] = 0, 0  # what is left is the key's, which the published mask takes out
    torch.save(tensors, tmp_path / "w.pth")
    images = torch.randn(1, 3, 64, 64)
    plain, biased = (load_backbone(tmp_path / "w.pth", name, 64, RECORDED).eval() for name in (V3, V3_BIAS))
    close(plain(images).patches, biased(images).patches)


# Positions


@pytest.mark.parametrize("rule", [TIMM, DINO, PLAIN])
@pytest.mark.parametrize("grid", [(4, 4), (6, 4), (2, 3), (7, 7)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_resampling_against_the_published_rule(rule: Positions, grid: tuple[int, int], prefix: int) -> None:
    table = torch.randn(1, prefix + 16, 6)
    found = rule.resample(table, grid, prefix)
    image = table[0, prefix:].T.reshape(1, 6, 4, 4)
    if grid == (4, 4):
        expected = image
    elif rule.offset:  # dino's vision_transformer.py: w0, h0 = w0 + 0.1, h0 + 0.1
        scale = ((grid[0] + 0.1) / 4, (grid[1] + 0.1) / 4)
        expected = F.interpolate(image, scale_factor=scale, mode="bicubic")
    else:
        expected = F.interpolate(image, size=grid, mode="bicubic", antialias=rule.antialias)
    assert torch.equal(found[:, :prefix], table[:, :prefix])
    torch.testing.assert_close(found[0, prefix:], expected.flatten(2)[0].T)


@pytest.mark.parametrize("name", [VIT, V2_REG, "vit_base_patch16_siglip_gap_224"])
@pytest.mark.parametrize("size", [(32, 32), (48, 32), (16, 64)])
def test_our_own_addition_of_positions_is_timms(name: str, size: tuple[int, int]) -> None:
    backbone, images = build(name), torch.randn(2, 3, *size)
    expected = backbone(images)
    backbone.positions = TIMM._replace(offset=1e-9)  # timm's rule by our code
    found = backbone(images)
    torch.testing.assert_close(found.cls, expected.cls, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.patches, expected.patches, rtol=1e-4, atol=1e-4)


def test_a_table_for_another_size_is_resampled_once_as_its_authors_do() -> None:
    tensors = read_pickle(REFERENCE / "dinov2_vit.pth")
    backbone = create_backbone(V2, 84, RECORDED, REFERENCE / "dinov2_vit.pth")
    assert torch.equal(backbone.model.pos_embed, DINO.resample(tensors["pos_embed"], (6, 6), 1))
    assert backbone.positions == DINO
    report = load_weights(create_backbone(V2, 84, RECORDED), REFERENCE / "dinov2_vit.pth")
    assert report.notes == ["position embedding resampled from 4×4 to 6×6"]


def test_the_rule_stays_with_our_own_file(tmp_path: Path) -> None:
    values = recorded("dino_vit")
    first = load_backbone(REFERENCE / "dino_backbone_only.pth", VIT, kwargs={**RECORDED, "patch_size": 8}).eval()
    save_backbone(tmp_path / "backbone.safetensors", first)
    again = load_backbone(tmp_path).eval()
    assert again.positions == DINO
    close(again(values["x48"]).cls, values["cls48"])


@pytest.mark.parametrize("published", [True, False])
def test_the_rule_stays_with_our_own_checkpoint(
    tiny: Callable[..., Config], tmp_path: Path, published: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of a run, given as weights, is not taken for one of main_dino.py."""
    weights = PUBLISHED if published else ["method=baseline", "steps=1"]
    first = train(tiny(*weights, f"out={tmp_path / 'first'}"), quiet=True)
    name, kwargs = (V2, {**RECORDED, "img_size": 28}) if published else (VIT, {**TINY, "depth": 3, "img_size": 16})
    capsys.readouterr()
    path = max((first / "checkpoints").iterdir())
    again = load_backbone(path, name, kwargs=kwargs)
    assert again.positions == (DINO if published else TIMM)
    assert "read as " in capsys.readouterr().err
    whole, taken = load_backbone(first).model.state_dict(), again.model.state_dict()
    assert all(torch.equal(whole[key], value) for key, value in taken.items())


# Layouts


@pytest.mark.parametrize(
    ("file", "said", "model"),
    [
        ("dino_backbone_only", "DINO", VIT),
        ("dino_checkpoint", "DINO", VIT),
        ("dinov2_vit", "DINOv2", V2),
        ("dinov2_vit_reg4", "DINOv2 with registers", V2_REG),
        ("dinov3_vit", "DINOv3", V3_BIAS),
    ],
)
def test_the_report_names_the_layout(file: str, said: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    kwargs = {**RECORDED, **({"patch_size": 8} if model == VIT else {})}
    load_backbone(REFERENCE / f"{file}.pth", model, kwargs=kwargs)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"\.pth: read as {said}( \(left out .*\))?: matched \d+, missing 0, unexpected 0$", line)


def chunked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"^blocks\.(\d+)", r"blocks.0.\1", name): value for name, value in tensors.items()}


def test_training_checkpoints_of_dinov2(tmp_path: Path) -> None:
    """Student and teacher in one module, heads, FSDP's wrappers and chunks of blocks."""
    tensors = chunked(read_pickle(REFERENCE / "dinov2_vit.pth"))
    teacher = {
        f"teacher.backbone._fsdp_wrapped_module.{name}".replace("norm1", "_orig_mod.norm1"): value
        for name, value in tensors.items()
    }
    student = {f"student.backbone.{name}": torch.zeros_like(value) for name, value in tensors.items()}
    heads = {"teacher.dino_head.mlp.0.weight": torch.ones(3), "teacher.ibot_head.mlp.0.weight": torch.ones(3)}
    torch.save({"model": {**student, **teacher, **heads}, "iteration": 9}, tmp_path / "model.rank_0.pth")
    target = create_backbone(V2, 56, RECORDED)
    report = load_weights(target, tmp_path / "model.rank_0.pth", min_match=1.0)
    assert (report.missing, report.unexpected, report.format) == ([], [], "DINOv2")
    assert {"dino_head.mlp.0.weight", "ibot_head.mlp.0.weight"} <= set(report.ignored)
    close(target.eval()(recorded("dinov2_vit")["x56"]).cls, recorded("dinov2_vit")["cls56"])


HUGGING = [
    ("ViT", {"intermediate_size": 96}, VIT, PLAIN),
    ("Dinov2", {"mlp_ratio": 4}, V2, PLAIN),
    ("Dinov2", {"mlp_ratio": 4, "use_swiglu_ffn": True}, "vit_giant_patch14_dinov2", PLAIN),
    ("Dinov2WithRegisters", {"mlp_ratio": 4, "num_register_tokens": 4}, V2_REG, TIMM),
    ("DINOv3ViT", {"intermediate_size": 96, "num_register_tokens": 4}, V3_BIAS, TIMM),
    (
        "DINOv3ViT",
        {"intermediate_size": 96, "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
        "vit_small_plus_patch16_dinov3_qkvb",
        TIMM,
    ),
]


@pytest.mark.parametrize("names", ["file", "memory"])
@pytest.mark.parametrize(("family", "more", "model", "rule"), HUGGING)
def test_files_of_transformers(
    family: str, more: dict[str, Any], model: str, rule: Positions, names: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    eps = {"layer_norm_eps": 1e-5 if family == "DINOv3ViT" else 1e-6}
    theirs = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**sizes, **eps, **more))
    for name, value in theirs.named_parameters():
        torch.nn.init.normal_(value, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
    if names == "file":  # transformers changes names on the way to the disk
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.save_pretrained(tmp_path)
    else:
        save_file(theirs.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = load_backbone(tmp_path / "model.safetensors", model, 32, TINY, min_match=1.0).eval()
    assert ours.positions == rule
    theirs.eval()
    for size in ((32, 32), (48, 32), (16, 16)):
        images = torch.randn(2, 3, *size)
        option = {"interpolate_pos_encoding": True} if family == "ViT" else {}
        expected = theirs(pixel_values=images, **option).last_hidden_state
        features = ours(images)
        torch.testing.assert_close(features.cls, expected[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features.patches, expected[:, ours.num_prefix_tokens :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [VIT, V2, V2_REG, V3, V3_BIAS, "vit_small_plus_patch16_dinov3_qkvb"])
def test_timms_own_safetensors(name: str, tmp_path: Path) -> None:
    first = build(name)
    save_file({k: v.contiguous() for k, v in first.model.state_dict().items()}, tmp_path / "model.safetensors")
    again = create_backbone(name, 32, TINY)
    report = load_weights(again, tmp_path / "model.safetensors", min_match=1.0)
    assert (report.format, report.ignored, report.notes) == ("timm", [], [])
    images = torch.randn(1, 3, 48, 32)
    assert torch.equal(again.eval()(images).patches, first(images).patches)


@pytest.mark.parametrize("name", ["vit_small_patch16_rope_224", "vit_small_patch16_rope_mixed_224"])
def test_a_pickle_of_a_rotary_model(name: str, tmp_path: Path) -> None:
    """Its names are those of DINO's files, whose rule for positions it has no use for."""
    first = build(name)
    torch.save(first.model.state_dict(), tmp_path / "w.pth")
    again = create_backbone(name, 32, TINY, tmp_path / "w.pth", min_match=1.0).eval()
    images = torch.randn(1, 3, 48, 32)
    assert torch.equal(again(images).patches, first(images).patches)


# Refusals


@pytest.mark.parametrize(
    ("file", "model", "kwargs", "said"),
    [
        (
            "dino_backbone_only",
            VIT,
            {"depth": 3, "patch_size": 8},
            "48 wide, the model 192: use a model of width 48 .*embed_dim=48",
        ),
        ("dinov2_vit", V2_REG, RECORDED, "0 registers, the model 4: name a model without reg4"),
        ("dinov2_vit_reg4", V2, RECORDED, "4 registers, the model 0: name a reg4 model"),
        ("dinov2_vit", V2, {**RECORDED, "depth": 2}, "3 blocks, the model 2: set the depth"),
        ("dinov2_vit", V2, {**RECORDED, "embed_dim": 96}, r"48 wide, the model 96: .*backbone\.kwargs\.embed_dim=48"),
        ("dinov2_vit", V2, {**RECORDED, "depth": 4}, "3 blocks, the model 4: set the depth"),
    ],
)
def test_another_architecture(file: str, model: str, kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        create_backbone(model, 56, kwargs, REFERENCE / f"{file}.pth")
    assert "\n" not in str(caught.value)


def test_a_published_width_names_the_model(tmp_path: Path) -> None:
    torch.save(create_backbone("vit_base_patch16_224", 32, {"depth": 1}).model.state_dict(), tmp_path / "base.pth")
    with pytest.raises(UserError, match="768 wide, the model 384: use vit_base_patch16_224"):
        create_backbone("vit_small_patch16_224", 32, {"depth": 1}, tmp_path / "base.pth")


def test_told_otherwise_a_part_is_loaded_and_reported() -> None:
    target = create_backbone(V2, 56, {**RECORDED, "depth": 2})
    report = load_weights(target, REFERENCE / "dinov2_vit.pth", min_match=0)
    assert report.missing == []
    assert report.unexpected
    assert all(name.startswith("blocks.2.") for name in report.unexpected)
    assert report.share == len(report.matched) / (len(report.matched) + len(report.unexpected))


def test_another_patch_size_is_said() -> None:
    report = load_weights(create_backbone(VIT, 64, RECORDED), REFERENCE / "dino_backbone_only.pth")
    assert "patch embedding resampled from 8 to 16 pixels" in report.notes


# Safety


class Burglar:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("hidden", ["beside", "in the namespace", "as its state"])
def test_nothing_in_a_file_is_executed(hidden: str, tmp_path: Path) -> None:
    trap, namespace = tmp_path / "opened", argparse.Namespace(arch="vit_tiny")
    content: dict[str, Any] = {"teacher": {"backbone.cls_token": torch.zeros(1)}, "args": namespace}
    if hidden == "beside":
        content["more"] = Burglar(trap)
    elif hidden == "in the namespace":
        namespace.more = Burglar(trap)
    else:
        namespace.__dict__["__setstate__"] = Burglar(trap)
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="refused by weights-only loading") as caught:
        read_tensors(tmp_path / "checkpoint.pth")
    assert "\n" not in str(caught.value)
    assert not trap.exists()
    torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert trap.exists()  # the trap works


def test_the_namespace_is_allowed_for_the_load_alone() -> None:
    content = read_pickle(REFERENCE / "dino_checkpoint.pth")
    assert content["args"] == argparse.Namespace(arch="vit_tiny", patch_size=8, out_dim=40)
    with pytest.raises(Exception, match="argparse"):
        torch.load(REFERENCE / "dino_checkpoint.pth", weights_only=True)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_the_numbers_of_numpy_in_a_full_checkpoint(module: str, tmp_path: Path) -> None:
    """main_dino.py sets lr and weight decay from numpy arrays, so its optimizer's groups hold numpy.float64."""
    content = {"teacher": {"backbone.cls_token": torch.ones(1)}, "optimizer": {"lr": np.float64(0.0005)}, "epoch": 3}
    torch.save(content, tmp_path / "now.pth")
    with zipfile.ZipFile(tmp_path / "now.pth") as old, zipfile.ZipFile(tmp_path / "full.pth", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):  # the module's name as numpy 1 or numpy 2 writes it
                data, count = re.subn(rb"cnumpy\.\w+\.multiarray\n", f"c{module}\n".encode(), data)
                assert count == 1
            new.writestr(name, data)
    found = read_pickle(tmp_path / "full.pth")
    assert found["optimizer"]["lr"] == 0.0005
    assert read_tensors(tmp_path / "full.pth").keys() == {"backbone.cls_token"}


# DINO's head


def test_the_head_of_a_checkpoint_gives_the_published_logits() -> None:
    content, values = read_pickle(REFERENCE / "dino_checkpoint.pth"), recorded("dino_vit")
    head = DINOHead(48, 40, 32, 16)
    head.load_state_dict(head_from(content))
    close(head(values["cls32"]), values["head_of_cls32"])
    center = center_from(content)
    assert center is not None
    assert torch.equal(center, content["dino_loss"]["center"])
    assert center_from({}) is None


def test_the_teacher_comes_before_the_student() -> None:
    content = read_pickle(REFERENCE / "dino_checkpoint.pth")
    content["student"]["module.head.mlp.0.weight"] += 1
    content["student"]["module.head.last_layer.weight_g"].fill_(1)  # recorded with another gain than the teacher's
    assert torch.equal(head_from(content)["mlp.0.weight"], content["teacher"]["head.mlp.0.weight"])
    del content["teacher"]
    assert torch.equal(head_from(content)["mlp.0.weight"], content["student"]["module.head.mlp.0.weight"])


def test_a_head_with_batch_norm_and_new_weight_norm_names() -> None:
    head = DINOHead(8, 6, 5, 4, batch_norm=True)
    state = {f"head.{name}": value for name, value in head.state_dict().items() if "last_layer" not in name}
    state |= {"head.mlp.1.running_mean": torch.zeros(5), "head.mlp.1.num_batches_tracked": torch.tensor(3)}
    state["head.last_layer.parametrizations.weight.original0"] = torch.ones(6, 1)
    state["head.last_layer.parametrizations.weight.original1"] = head.last_layer.weight
    found = head_from(state)
    assert set(found) == set(head.state_dict())
    head.load_state_dict(found)


def test_heads_that_cannot_be_taken() -> None:
    content = read_pickle(REFERENCE / "dino_checkpoint.pth")
    with pytest.raises(UserError, match="no DINO head"):
        head_from({"teacher": {"backbone.cls_token": torch.zeros(1)}})
    content["teacher"]["head.last_layer.weight_g"][0] = 2
    with pytest.raises(UserError, match="trained gain"):
        head_from(content)


HEAD = ["objective.out_dim=40", "objective.hidden_dim=32", "objective.bottleneck_dim=16", "method=baseline"]
NARROW = ["backbone.kwargs={patch_size: 8, embed_dim: 48, depth: 3, num_heads: 3}"]


def training_checkpoint(path: Path, **changes: Any) -> dict[str, Any]:
    """The recorded checkpoint with the student's gain at one, as trained, and a centre of the head's size."""
    content: dict[str, Any] = read_pickle(REFERENCE / "dino_checkpoint.pth")
    content["student"]["module.head.last_layer.weight_g"].fill_(1)
    content["dino_loss"]["center"] = torch.linspace(-1, 1, 40)[None]
    content |= changes
    torch.save(content, path)
    return content


def test_a_run_begins_with_the_heads_of_a_checkpoint(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Student and teacher each with their own, whose logits are the published ones; and the teacher's centre."""
    content = training_checkpoint(tmp_path / "checkpoint.pth")
    run = Trainer(tiny(*HEAD, *NARROW))
    start_head(run, str(tmp_path / "checkpoint.pth"))
    values = recorded("dino_vit")
    close(run.teacher.head(values["cls32"]), values["head_of_cls32"])
    for part, head in (("student", run.student.head), ("teacher", run.teacher.head)):
        prefix = "module.head" if part == "student" else "head"
        assert torch.equal(head.mlp[0].weight, content[part][f"{prefix}.mlp.0.weight"])
        assert torch.equal(head.last_layer.weight, content[part][f"{prefix}.last_layer.weight_v"])
    assert torch.equal(run.loss.center, content["dino_loss"]["center"])
    assert capsys.readouterr().err.strip() == (
        f"{tmp_path / 'checkpoint.pth'}: read as DINO head (student and teacher each their own): matched 7, missing 0, "
        "unexpected 0; with its centre"
    )


def test_the_head_is_taken_once_and_a_resumed_run_needs_no_file(tiny: Callable[..., Config], tmp_path: Path) -> None:
    content = training_checkpoint(tmp_path / "checkpoint.pth")
    config = tiny(*HEAD, *NARROW, f"objective.head={tmp_path / 'checkpoint.pth'}", "optim.lr=0", "steps=2")
    train(config, quiet=True)
    (tmp_path / "checkpoint.pth").unlink()
    (tmp_path / "run" / "checkpoints" / "step_00000002.pt").rename(tmp_path / "elsewhere.pt")
    torch.save(torch.load(tmp_path / "elsewhere.pt") | {"step": 1}, tmp_path / "run/checkpoints/step_00000001.pt")
    state = load_checkpoint(train(config, quiet=True))
    assert state["step"] == 2
    close(state["student"]["head.mlp.0.weight"], content["student"]["module.head.mlp.0.weight"])


def test_one_head_serves_both(tmp_path: Path) -> None:
    """Where there is no student's, or its gain was trained, as in the recorded file; the centre there is of K = 32."""
    content = read_pickle(REFERENCE / "dino_checkpoint.pth")
    del content["student"]
    torch.save(content, tmp_path / "alone.pth")
    for path in (tmp_path / "alone.pth", REFERENCE / "dino_checkpoint.pth"):
        heads, center = (DINOHead(48, 40, 32, 16), DINOHead(48, 40, 32, 16)), torch.zeros(1, 40)
        said = load_head(path, *heads, center)
        assert said.endswith(
            "(the teacher's for both): matched 7, missing 0, unexpected 0; its centre is of 32 outputs, "
            "not 40, and left out"
        )
        for head in heads:
            assert torch.equal(head.mlp[0].weight, content["teacher"]["head.mlp.0.weight"])
        assert not center.any()


def test_heads_of_dinov2_in_one_module(tmp_path: Path) -> None:
    own, theirs = DINOHead(24, 12, 10, 8), DINOHead(24, 12, 10, 8)
    model: dict[str, Tensor] = {}
    for part, head in (("student", own), ("teacher", theirs)):
        for name, value in head.state_dict().items():
            model[f"{part}.dino_head.{name}".replace("last_layer.weight", "last_layer.weight_v")] = value
        model[f"{part}.dino_head.last_layer.weight_g"] = torch.ones(12, 1)
    torch.save({"model": model, "iteration": 9}, tmp_path / "model.pth")
    student, teacher = DINOHead(24, 12, 10, 8), DINOHead(24, 12, 10, 8)
    assert "student and teacher each their own" in load_head(tmp_path / "model.pth", student, teacher)
    for found, expected in ((student, own), (teacher, theirs)):
        assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((48, 40, 32, 8), "set objective.bottleneck_dim=16$"),
        ((48, 41, 32, 16), "set objective.out_dim=40$"),
        ((48, 20, 64, 8), "set objective.out_dim=40, objective.hidden_dim=32, objective.bottleneck_dim=16$"),
        ((48, 40, 32, 16, True), "set objective.batch_norm=false$"),
        ((24, 40, 32, 16), r"set a backbone 48 wide \(this one is 24\)$"),
    ],
)
def test_a_head_of_another_size(sizes: tuple[int, ...], said: str) -> None:
    head = DINOHead(*sizes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=said) as caught:
        load_head(REFERENCE / "dino_checkpoint.pth", head, head)
    assert "\n" not in str(caught.value)


def test_files_without_a_head_of_ours(tmp_path: Path) -> None:
    head, content = DINOHead(48, 40, 32, 16), training_checkpoint(tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"objective\.head=absent\.pth: no such checkpoint"):
        load_head("absent.pth", head, head)
    save_backbone(tmp_path / "w.safetensors", build(VIT))
    with pytest.raises(UserError, match="weights files have no head"):
        load_head(tmp_path / "w.safetensors", head, head)
    with pytest.raises(UserError, match=r"no DINO head.*start with a fresh head"):
        load_head(REFERENCE / "dino_backbone_only.pth", head, head)
    del content["teacher"]["head.mlp.4.weight"], content["teacher"]["head.mlp.4.bias"]
    del content["student"]
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"three layers \(missing mlp\.4\.bias, mlp\.4\.weight; unexpected none\)"):
        load_head(tmp_path / "checkpoint.pth", head, head)


def test_a_refused_head_leaves_no_folder(tiny: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set a backbone 48 wide \(this one is 24\), objective\.out_dim=40"):
        train(tiny("method=baseline", f"objective.head={REFERENCE / 'dino_checkpoint.pth'}"), quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"objective\.name=ijepa has none"):
        tiny(
            "method=baseline",
            f"objective.head={REFERENCE / 'dino_checkpoint.pth'}",
            "objective.name=ijepa",
            "views.local_count=0",
        )
    with pytest.raises(UserError, match=r"leave out objective\.head"):
        tiny(f"objective.head={REFERENCE / 'dino_checkpoint.pth'}", f"start_from={tmp_path}")


# Positions of a run

PUBLISHED = [
    f"backbone.name={V2}",
    "backbone.kwargs={patch_size: 14, embed_dim: 48, depth: 3, num_heads: 3}",
    f"backbone.weights={REFERENCE / 'dinov2_vit.pth'}",
    "views.global_size=28",
    "views.local_size=14",
    "method=baseline",
    "optim.lr=0",
]


@pytest.mark.parametrize("keep", [True, False])
def test_positions_stay_as_they_were_through_runs_and_export(
    tiny: Callable[..., Config], tmp_path: Path, keep: bool
) -> None:
    """Nothing is learnt (lr 0), so that features of every size are those of the file, or of its resampled table."""
    if keep:
        expected = load_backbone(REFERENCE / "dinov2_vit.pth", V2, kwargs=RECORDED).eval()
    else:
        expected = create_backbone(V2, 28, RECORDED, REFERENCE / "dinov2_vit.pth").eval()
    values = recorded("dinov2_vit")
    keep_grid = f"backbone.keep_grid={str(keep).lower()}"
    first = train(tiny(*PUBLISHED, keep_grid, f"out={tmp_path / 'first'}"), quiet=True)
    fresh = [part for part in PUBLISHED if "weights" not in part]
    second = train(tiny(*fresh, keep_grid, f"start_from={first}", f"out={tmp_path / 'second'}"), quiet=True)
    shutil.copytree(second, tmp_path / "third")
    (tmp_path / "third" / "checkpoints" / "step_00000004.pt").unlink()
    third = train(tiny(*fresh, keep_grid, f"start_from={first}", f"out={tmp_path / 'third'}"), quiet=True)
    exported = export(second, "torchhub").folder / "backbone.pth"
    for found in (first, second, third):
        again = load_backbone(found).eval()
        assert again.positions == DINO
        for size in (56, 84):
            assert torch.equal(again(values[f"x{size}"]).patches, expected(values[f"x{size}"]).patches)
    hub = load_backbone(exported, V2, 28, RECORDED).eval()
    close(hub(values["x84"]).cls, expected(values["x84"]).cls)
    if keep:
        close(expected(values["x84"]).cls, values["cls84"])


def test_a_run_at_another_resolution_starts_from_the_resampled_table(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(tiny(*PUBLISHED, f"out={tmp_path / 'first'}"), quiet=True)
    table = load_checkpoint(first)["teacher"]["backbone.model.pos_embed"]
    larger = [part for part in PUBLISHED if "weights" not in part and "global" not in part]
    run = Trainer(tiny(*larger, "views.global_size=42", f"start_from={first}"))
    start_from(run, load_checkpoint(first))
    for learner in (run.student, run.teacher):
        assert torch.equal(learner.backbone.model.pos_embed, DINO.resample(table, (3, 3), 1))
        assert learner.backbone.positions == DINO
    assert f"{first}: position embedding resampled from 2×2 to 3×3" in capsys.readouterr().err
    held = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in run.student.parameters()} == held


def test_a_kept_grid_learns(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """The table that training changes is the one that the optimizer holds and the checkpoint keeps."""
    first = train(tiny(*PUBLISHED, "backbone.keep_grid=true", f"out={tmp_path / 'first'}"), quiet=True)
    fresh = [part for part in PUBLISHED if "weights" not in part and "lr" not in part]
    second = train(tiny(*fresh, "backbone.keep_grid=true", f"start_from={first}"), quiet=True)
    before, after = (load_checkpoint(folder)["student"]["backbone.model.pos_embed"] for folder in (first, second))
    assert before.shape == after.shape == (1, 17, 48)
    assert not torch.equal(before, after)
    assert load_backbone(second).kwargs["img_size"] == 56


def test_headers(tmp_path: Path) -> None:
    save_backbone(tmp_path / "w.safetensors", build(VIT), {"step": "7"})
    header = read_header(tmp_path / "w.safetensors")
    assert header is not None
    assert header["step"] == "7"
    assert "positions" not in header
    assert read_header(REFERENCE / "dinov2_vit.pth") is None
    # The names of DINO's backbone and of timm's ViT are the same: the container decides.
    tensors = read_tensors(tmp_path / "w.safetensors")
    assert (recognise(tensors, header).format, recognise(tensors, None).format) == ("timm", "DINO")
