"""Weights out: a run's backbone as timm, transformers or Meta's own code would have written it, with a model card.

Every export is read back and compared with the backbone it came from before its folder takes its name.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from dino_value.errors import UserError
from dino_value.export.card import model_card
from dino_value.export.hf import to_hf
from dino_value.export.torchhub import pixels, tensors_of, to_torchhub
from dino_value.files import write_json, write_text
from dino_value.models.backbone import Backbone, load_backbone, write_weights

FORMATS = ("timm", "hf", "torchhub")
TOLERANCE = 1e-5


class Exported(NamedTuple):
    """The folder written, and by how much features read back from it differ, against the largest of them."""

    folder: Path
    difference: float


def export(
    run_or_weights: str | os.PathLike[str],
    format: str,
    out: str | os.PathLike[str] | None = None,
    model: str | None = None,
) -> Exported:
    """Write the backbone of a run folder or weights file for others to load, in a new folder.

    Args:
        format: `timm` (timm.create_model("local-dir:…")), `hf` (transformers' AutoModel) or `torchhub` (the .pth that
            facebookresearch's dino, dinov2 and dinov3 load).
        out: the folder; default export/FORMAT below the run, or beside the weights file.
        model: a timm name, for a weights file that does not name its architecture.

    Raises:
        UserError: the format has no place for this architecture, the folder is taken or cannot be written, or what was
            written does not give the same features.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: choose {', '.join(FORMATS)}")
    source = Path(run_or_weights)
    backbone = load_backbone(source, model).eval()
    run = source if source.is_dir() else source.parent
    folder = Path(out) if out is not None else run / "export" / format
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; remove it or choose another --out")
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        again = {"timm": to_timm, "hf": to_hf, "torchhub": to_torchhub}[format](backbone, scratch)
        difference = _difference(backbone, again)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{run_or_weights}: features of {backbone.name} read back from {format} differ by {difference:.1e}; "
                "this format has no place for the architecture: choose another --format"
            )
        write_text(scratch / "README.md", model_card(backbone, source, format, difference))
        if folder.exists():
            folder.rmdir()
        os.replace(scratch, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another --out") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Exported(folder, difference)


@torch.no_grad()
def _difference(backbone: Backbone, other: nn.Module) -> float:
    """Of two images' features, at the size of the backbone's own table of positions."""
    images = torch.randn(2, backbone.channels, *pixels(backbone), generator=torch.Generator().manual_seed(0))
    expected, found = backbone(images), other.eval()(images)
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected[:2], found[:2], strict=True))
    return worst if math.isfinite(worst) else math.inf


# timm


def to_timm(backbone: Backbone, folder: Path) -> nn.Module:
    model = backbone.model
    arguments: dict[str, Any] = {**backbone.kwargs, "dynamic_img_size": True}
    arguments.pop("drop_path_rate", None)
    if backbone.has_cls and backbone.final_norm == "norm":
        arguments["global_pool"] = "token"  # what DINO trains; timm pools some of these models over patches
    else:
        arguments["global_pool"] = model.global_pool
    described = {key: model.pretrained_cfg[key] for key in ("mean", "std", "interpolation", "crop_pct", "first_conv")}
    if backbone.channels != 3:  # or timm fits the patch embedding to what it takes for a file of three
        described |= {"mean": list(backbone.mean), "std": list(backbone.std), "first_conv": None}
    config = {
        "architecture": backbone.name.split(".")[0],
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            **described,
            "tag": "dino_value",
            "custom_load": False,
            "input_size": [backbone.channels, *pixels(backbone)],
            "fixed_input_size": False,
            "num_classes": 0,
            "classifier": "head",
        },
    }
    write_json(folder / "config.json", config)
    tensors = tensors_of(backbone)
    write_weights(folder / "model.safetensors", tensors, {"format": "pt"})
    return Backbone(backbone.name, timm.create_model(f"local-dir:{folder}", pretrained=True), backbone.kwargs)
