"""Other people's checkpoints: which copy is taken, and what must not stay random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_value.config import Config, load_config, load_section
from dino_value.errors import UserError
from dino_value.export.command import export
from dino_value.models.backbone import Backbone, LoadReport, create_backbone, load_backbone, load_weights, save_backbone
from dino_value.models.weight_files import copy_in
from dino_value.models.weights import DINO, PLAIN, TIMM, Positions, Reading
from dino_value.training.trainer import train

VIT = "vit_tiny_patch16_224"
TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
REFERENCE = Path(__file__).parents[1] / "data" / "reference"


def vit(seed: int, size: int | tuple[int, int] = 32, **kwargs: Any) -> Backbone:
    backbone = create_backbone(VIT, size, {**TINY, **kwargs}).eval()
    generator = torch.Generator().manual_seed(seed)
    for value in backbone.parameters():
        torch.nn.init.normal_(value, 0.5, 0.3, generator=generator)
    return backbone


def tensors(backbone: Backbone, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{name}": value.clone() for name, value in backbone.model.state_dict().items()}


def loaded(content: object, path: Path, **kwargs: Any) -> tuple[Backbone, LoadReport]:
    """A fresh model, filled from a file of `content`."""
    torch.save(content, path / "w.pth")
    reading = Reading(**kwargs.pop("reading", {}))
    backbone = create_backbone(VIT, 32, {**TINY, **kwargs}).eval()
    return backbone, load_weights(backbone, path / "w.pth", reading=reading)


# Which copy


WANTED, OTHER = tensors(vit(1)), tensors(vit(2))


def under(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in values.items()}


LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "I-JEPA": (
        {
            "encoder": under("module.", OTHER),
            "predictor": {"module.predictor_blocks.0.norm1.weight": torch.ones(2)},
            "opt": {"state": {0: {"exp_avg": torch.ones(2)}}},
            "target_encoder": under("module.", WANTED),
        },
        "took target_encoder, not encoder",
    ),
    "solo-learn": (
        {"state_dict": {**under("backbone.", OTHER), **under("momentum_backbone.", WANTED)}},
        "took state_dict.momentum_backbone, not state_dict",
    ),
    "timm": ({"state_dict": OTHER, "state_dict_ema": WANTED}, "took state_dict_ema, not state_dict"),
    "MAE and ConvNeXt": ({"model": OTHER, "model_ema": WANTED}, "took model_ema, not model"),
    "DINOv3": (
        {"model": {**under("student.backbone.", OTHER), **under("model_ema.backbone.", WANTED)}},
        "took model.model_ema, not model.student",
    ),
    "Lightning": (
        {"state_dict": {**under("student_backbone.vit.", OTHER), **under("teacher_backbone.vit.", WANTED)}},
        "took state_dict.teacher_backbone.vit, not state_dict.student_backbone.vit",
    ),
    "lightly-train": (
        {
            "state_dict": {
                **under("student_embedding_model.wrapped_model._model.", OTHER),
                **under("teacher_embedding_model.wrapped_model._model.", WANTED),
            }
        },
        "took state_dict.teacher_embedding_model",
    ),
    "DeepSpeed": ({"module": WANTED, "optimizer": {"a": torch.ones(1)}}, ""),
    "AveragedModel": ({"n_averaged": torch.ones(()), **under("module.", WANTED)}, ""),
    "a name of nobody's": ({"nets": {"f": under("trunk.inner.", WANTED)}}, ""),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_averaged_copy_is_taken_and_said(name: str, tmp_path: Path) -> None:
    content, said = LAYOUTS[name]
    backbone, report = loaded(content, tmp_path)
    found = backbone.model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in WANTED.items())
    assert said in str(report)
    assert bool(said) == any(note.startswith("took") for note in report.notes)


def test_a_prefix_takes_another_copy(tmp_path: Path) -> None:
    content, _ = LAYOUTS["I-JEPA"]
    backbone, _ = loaded(content, tmp_path, reading={"prefix": "encoder"})
    assert torch.equal(backbone.model.cls_token, OTHER["cls_token"])
    with pytest.raises(UserError, match=r"backbone\.prefix=teacher: no tensor's name begins so; names begin with enc"):
        loaded(content, tmp_path, reading={"prefix": "teacher"})


def test_a_file_without_a_transformer_names_its_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"matched 0, .*prefix=NAME .*top of the file: stem, layers\)") as caught:
        loaded({"stem": {"weight": torch.ones(3)}, "layers": {"bias": torch.ones(2)}}, tmp_path)
    assert "\n" not in str(caught.value)
    assert copy_in({"epoch": 1}).tensors == {}


# What must not stay random


@pytest.mark.parametrize(
    ("part", "gone"),
    [
        ("pos_embed", ["pos_embed"]),
        ("cls_token", ["cls_token"]),
        ("patch_embed", ["patch_embed.proj.bias"]),
        ("norm", ["norm.weight", "norm.bias"]),
    ],
)
def test_a_missing_part_is_refused_unless_named(part: str, gone: list[str], tmp_path: Path) -> None:
    content = {name: value for name, value in WANTED.items() if name not in gone}
    if part == "cls_token":  # and so its row of the table
        content["pos_embed"] = WANTED["pos_embed"][:, 1:]
    with pytest.raises(UserError, match=rf"its {part} is missing: name it in backbone\.random=\[{part}\]") as caught:
        loaded(content, tmp_path)
    assert "\n" not in str(caught.value)
    backbone, report = loaded(content, tmp_path, reading={"random": [part]})
    assert report.random == [part]
    assert str(report).endswith(f"; random: {part}")
    found = backbone.model.state_dict()
    same = {name for name, value in WANTED.items() if torch.equal(found[name], value)}
    assert set(WANTED) - same == {*gone, *(["pos_embed"] if part == "cls_token" else [])}
    assert torch.equal(found["pos_embed"][:, 1:], WANTED["pos_embed"][:, 1:]) or part == "pos_embed"


def test_parts_of_another_shape(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its cls_token is of another shape"):
        loaded({**WANTED, "cls_token": torch.ones(1, 2, 24)}, tmp_path)
    grey = {**WANTED, "patch_embed.proj.weight": WANTED["patch_embed.proj.weight"].sum(1, keepdim=True)}
    with pytest.raises(UserError, match=r"of 1 channels, the model's of 3: set backbone\.kwargs\.in_chans=1"):
        loaded(grey, tmp_path)
    assert loaded(grey, tmp_path, in_chans=1)[1].missing == []
    with pytest.raises(UserError, match=r"backbone\.random=heads: choose among patch_embed, pos_embed"):
        loaded(WANTED, tmp_path, reading={"random": ["heads"]})


def test_the_last_norm_is_found_where_timm_moved_it(tmp_path: Path) -> None:
    """I-JEPA's encoder: no class token, a table of the patches alone, and a norm that timm calls fc_norm."""
    content = {**WANTED, "pos_embed": WANTED["pos_embed"][:, 1:]}
    del content["cls_token"]
    with pytest.raises(UserError, match=r"cls_token is missing: .*\{class_token: false, global_pool: avg\}"):
        loaded(content, tmp_path)
    backbone, report = loaded(content, tmp_path, class_token=False, global_pool="avg")
    assert (report.missing, report.unexpected) == ([], [])
    assert torch.equal(backbone.model.fc_norm.weight, WANTED["norm.weight"])
    assert torch.equal(backbone.model.pos_embed, content["pos_embed"])
    back, report = loaded(tensors(backbone), tmp_path, class_token=False, global_pool="avg", fc_norm=False)
    assert torch.equal(back.model.norm.weight, WANTED["norm.weight"])
    assert report.missing == []


def test_a_class_token_that_the_model_has_not(tmp_path: Path) -> None:
    backbone, report = loaded(WANTED, tmp_path, class_token=False, global_pool="avg")
    assert torch.equal(backbone.model.pos_embed, WANTED["pos_embed"][:, 1:])
    assert "class token left out" in str(report)


def test_our_ijepa_recipe_takes_a_published_encoder(tmp_path: Path) -> None:
    kwargs = {"embed_dim": 24, "depth": 1, "num_heads": 3, "class_token": False, "global_pool": "avg"}
    encoder = create_backbone("vit_base_patch16_224", 64, kwargs)
    content = {name.replace("fc_norm", "norm"): value + 0.5 for name, value in encoder.model.state_dict().items()}
    torch.save({"target_encoder": under("module.", content)}, tmp_path / "ijepa.pth.tar")
    given = ["out=a", "data.unlabeled=b", "method=baseline", "backbone.kwargs={class_token: false, global_pool: avg}"]
    b = load_config("recipes/ijepa_vitb16", [*given, f"backbone.weights={tmp_path / 'ijepa.pth.tar'}"]).backbone
    b.kwargs |= {"embed_dim": 24, "depth": 1, "num_heads": 3}
    found = create_backbone(b.name, 64, b.kwargs, b.weights, 1.0, reading=Reading.of(b))
    assert torch.equal(found.model.fc_norm.bias, content["norm.bias"])


# Positions


@pytest.mark.parametrize("rows_and_columns", [(3, 8), (2, 8)])  # 24 is no square; 16 is, but this table is not
def test_rectangular_tables_are_read(rows_and_columns: tuple[int, int], tmp_path: Path) -> None:
    rows, columns = rows_and_columns
    wide = vit(3, (8 * rows, 8 * columns))
    if rows == 3:
        with pytest.raises(UserError, match=r"24 positions, which is no square: give .*backbone\.table=\[HEIGHT,WIDTH"):
            loaded(tensors(wide), tmp_path)
    with pytest.raises(UserError, match=r"which are not 5×5: mend backbone\.table"):
        loaded(tensors(wide), tmp_path, reading={"table": [5, 5]})
    square, report = loaded(tensors(wide), tmp_path, reading={"table": [rows, columns]})
    assert f"position embedding resampled from {rows}×{columns} to 4×4" in report.notes
    expected = DINO.resample(wide.model.pos_embed, (4, 4), 1, rows_and_columns)
    assert torch.equal(square.model.pos_embed, expected)
    kept = load_backbone(tmp_path / "w.pth", VIT, 32, TINY, reading=Reading(table=[rows, columns])).eval()
    images = torch.randn(1, 3, 8 * rows, 8 * columns)
    assert torch.equal(kept(images).patches, wide(images).patches)
    save_backbone(tmp_path / "ours.safetensors", kept)
    again = load_backbone(tmp_path / "ours.safetensors").eval()
    assert torch.equal(again(images).patches, wide(images).patches)
    export(tmp_path / "ours.safetensors", "torchhub", out=tmp_path / "hub")  # compares what it wrote
    other = torch.randn(1, 3, 40, 24)
    assert torch.equal(again(other).patches, kept(other).patches)


def test_a_rectangular_table_stays_through_runs(tiny: Callable[..., Config], tmp_path: Path) -> None:
    wide = vit(4, (16, 32), depth=3)
    torch.save(tensors(wide), tmp_path / "wide.pth")
    common = ["method=baseline", "optim.lr=0", "steps=2"]
    keys = [f"backbone.weights={tmp_path / 'wide.pth'}", "backbone.table=[2,4]", "backbone.keep_grid=true"]
    first = train(tiny(*common, *keys, f"out={tmp_path / 'first'}"), quiet=True)
    second = train(
        tiny(*common, f"start_from={first}", "backbone.keep_grid=true", f"out={tmp_path / 'second'}"), quiet=True
    )
    images = torch.randn(1, 3, 16, 32)
    for folder in (first, second):
        assert torch.equal(load_backbone(folder).eval()(images).patches, wide(images).patches)


def test_a_rule_of_positions_is_said_and_can_be_chosen(tmp_path: Path) -> None:
    """Published DINOv2 resizes without antialiasing, with registers it does with; others' files do either."""
    narrow = {"embed_dim": 48, "depth": 3, "num_heads": 3}
    rules: dict[str, Positions] = {"auto": DINO, "timm": TIMM, "plain": PLAIN, "dino": DINO}
    for key, rule in rules.items():
        backbone = create_backbone("vit_small_patch14_dinov2", 56, narrow)
        report = load_weights(backbone, REFERENCE / "dinov2_vit.pth", reading=Reading(positions=key))
        assert backbone.positions == rule
        assert f"positions resized {'with' if rule.antialias else 'without'} antialiasing" in str(report)
        assert ("as told" in str(report)) == (key != "auto")
    registers = create_backbone("vit_small_patch14_reg4_dinov2", 56, narrow)
    report = load_weights(registers, REFERENCE / "dinov2_vit_reg4.pth")
    assert "with antialiasing (timm, by the layout; backbone.positions=dino for the other)" in str(report)
    with pytest.raises(UserError, match=r"backbone\.positions=lanczos: choose auto, timm, dino, plain"):
        Reading(positions="lanczos")


def test_the_same_keys_for_evaluations() -> None:
    found = load_section("backbone", ["prefix=encoder", "table=[3,8]", "kwargs.in_chans=4"])
    assert Reading.of(found) == Reading("encoder", (3, 8))
    assert found.kwargs == {"in_chans": 4}
    with pytest.raises(UserError, match=r"unknown configuration key backbone\.prefx; did you mean backbone\.prefix"):
        load_section("backbone", ["prefx=a"])
