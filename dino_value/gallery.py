"""What a finished run has to show: masks over images, features in colour."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dino_value.backbones import Backbone
from dino_value.checkpoint import load_checkpoint
from dino_value.config import load_config
from dino_value.designers import fill_in, learned_views
from dino_value.train import Run


@torch.no_grad()
def masked(run_folder: Path, images: Tensor, checkpoint: Path | None = None) -> tuple[Tensor, Tensor] | None:
    """A run's masks [n 1 H W] over whole images uint8 [n 3 H W], and the learned views in uint8; None where the run
    makes no masks. The newest checkpoint's, or those of `checkpoint`."""
    config = load_config(run_folder / "config.yaml")
    run = Run(config)
    run.load_state_dict(load_checkpoint(checkpoint or run_folder))
    if run.steer is None or run.steer.designer is None:
        return None
    d, images = config.designer, images.to(run.device)
    plain = images.float() / 255
    torch.manual_seed(0)  # of masks that are drawn
    masks = run.steer.designer(run.student.backbone.normalise(images))
    fill = fill_in(plain, d.fill, d.blur_sigma, torch.Generator().manual_seed(0))
    views = learned_views(plain, masks, fill)
    return masks.cpu(), (views * 255).to(torch.uint8).cpu()


@torch.no_grad()
def patch_map(backbone: Backbone, images: Tensor) -> Tensor:
    """Patch features [n h w D]."""
    features = backbone.eval()(backbone.normalise(images))
    return features.patches.unflatten(1, features.grid)
