"""The recipes of configs/recipes and docs/training.md, at toy size, by the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dino_value import cli
from dino_value.config import load_config
from dino_value.models.backbone import load_backbone
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.metrics import read_metrics

TOY = (
    "steps=4 log_every=1 device=cpu precision=fp32 data.workers=0 backbone.kwargs={embed_dim:24,depth:3,num_heads:3} "
    "optim.batch_size=4 optim.freeze_backbone=2 value.period=2 value.batch_size=4 value.radius=1e-3 value.tolerance=1 "
    "designer.width=4 designer.depth=1 feedback.size=SIZE feedback.batch_size=4 feedback.warmup=1 "
    "feedback.seg={train:8,meta:4} checkpoint.every=4 health.every=4 health.images=8"
)
HEAD = (
    "objective.out_dim=16 objective.hidden_dim=16 objective.bottleneck_dim=8 views.global_size=56 views.local_size=28"
)
PREDICTOR = (
    "objective.ijepa.context_least=5 objective.ijepa.width=8 objective.ijepa.depth=1 objective.ijepa.heads=2 "
    "views.global_size=64"
)
RECIPES = {"dinov2_vitb14": (HEAD, "28"), "ijepa_vitb16": (PREDICTOR, "32")}


def run(name: str, root: Path, out: Path, *extra: str) -> Path:
    sizes, size = RECIPES[name]
    overrides = [part.replace(":", ": ").replace(",", ", ") for part in f"{TOY.replace('SIZE', size)} {sizes}".split()]
    data = [f"data.unlabeled={root / 'images'}", f"data.ade20k={root / 'ade'}"]
    assert cli.main(["train", f"recipes/{name}", f"out={out}", *overrides, *data, "--quiet", *extra]) == 0
    return out


@pytest.mark.parametrize("method", ["value", "random", "baseline"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name: str, method: str, tiny_data: Path, tmp_path: Path) -> None:
    rows = read_metrics(run(name, tiny_data, tmp_path / "run", f"method={method}"))
    values = {key: value for row in rows for key, value in row.items() if isinstance(value, (int, float))}
    assert all(torch.isfinite(torch.tensor(value)) for value in values.values())
    parts = {key for key in values if key.startswith("loss_")} - {"loss_seg", "loss_depth"}
    assert parts == ({"loss_ijepa"} if "ijepa" in name else {"loss_dino", "loss_ibot", "loss_koleo"})
    assert ("value" in values) == (method != "baseline")
    assert "rankme" in values


def test_high_resolution_adaptation(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run at 56 pixels goes on at 84: its table of positions is resampled, its head and centre are kept."""
    first = run("dinov2_vitb14", tiny_data, tmp_path / "first", "method=baseline")
    larger = ["views.global_size=84", "views.local_size=42", "optim.freeze_backbone=0", "optim.lr=1e-3"]
    capsys.readouterr()
    second = run("dinov2_vitb14", tiny_data, tmp_path / "second", "method=value", f"start_from={first}", *larger)
    assert "position embedding resampled from 4×4 to 6×6" in capsys.readouterr().err
    assert load_checkpoint(second)["teacher"]["backbone.model.pos_embed"].shape == (1, 37, 24)
    backbone = load_backbone(second)
    assert backbone.model.patch_embed.grid_size == (6, 6)
    assert backbone.eval()(torch.zeros(1, 3, 112, 112)).grid == (8, 8)


def test_the_pages_keys_and_configurations_exist() -> None:
    """Every `key=value` and packaged name in docs/training.md can be given."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    keys = set(re.findall(r"(?<![\w./])((?:[a-z_]+\.)+[a-z_]+)=", page))
    assert len(keys) > 20
    config = load_config("recipes/dinov2_vitb14", ["out=x", "data.unlabeled=y", "method=baseline"])
    for key in keys:
        value: object = config
        for part in key.split("."):
            value = value.get(part, 0) if isinstance(value, dict) else getattr(value, part)
    for name in set(re.findall(r"dino-value train ([a-z0-9]+/\w+)", page)):
        load_config(name, ["out=x", "data.unlabeled=y", "method=baseline"])
