"""What a run has to show: masks over images, features in colour."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dino_value.backbones import Backbone
from dino_value.checkpoint import load_checkpoint
from dino_value.config import Config, load_config
from dino_value.data.conventions import as_configured
from dino_value.data.labelled import LabelledDataset
from dino_value.data.layouts import open_labelled
from dino_value.data.pixels import as_rgb
from dino_value.designers import fill_in, learned_views
from dino_value.steer import Steer

SHOWN = 6  # images


@as_configured
def held_out_images(config: Config, count: int = SHOWN) -> Tensor | None:
    """Images uint8 [n 3 H W] of the run's labelled validation split; None where it names none."""
    for layout, root in (("ade20k", config.data.ade20k), ("nyuv2", config.data.nyuv2)):
        if root is None:
            continue
        source = open_labelled(layout, root, "validation")  # type: ignore[arg-type]
        size = (config.views.global_size, config.views.global_size)
        shown = range(0, len(source), max(1, len(source) // count))[:count]
        images, _ = LabelledDataset(source, shown, size=size).batch(range(len(shown)))
        return images
    return None


def as_pictures(images: Tensor) -> Tensor:
    """Images uint8 [n C H W] as RGB to look at."""
    return torch.stack([as_rgb(image) for image in images])


def masked(run_folder: Path, images: Tensor, checkpoint: Path | None = None) -> tuple[Tensor, Tensor] | None:
    """`designed` by a run in its folder: its newest checkpoint, or `checkpoint`."""
    from dino_value.train import Run

    config = load_config(run_folder / "config.yaml")
    run = Run(config)
    run.load_state_dict(load_checkpoint(checkpoint or run_folder))
    return designed(config, run.steer, images)


@torch.no_grad()
def designed(config: Config, steer: Steer | None, images: Tensor) -> tuple[Tensor, Tensor] | None:
    """Masks [n 1 H W] over whole images uint8 [n 3 H W], and the learned views in uint8; None where no masks are made.

    The global generator is left as it was.
    """
    if steer is None or steer.designer is None:
        return None
    d, images = config.designer, images.to(steer.device)
    plain = images.float() / 255
    with torch.random.fork_rng([steer.device] if steer.device.type == "cuda" else []):
        torch.manual_seed(0)  # of masks that are drawn
        masks = steer.designer(steer.student.backbone.normalise(images))
        fill = fill_in(plain, d.fill, d.blur_sigma, torch.Generator().manual_seed(0))
    views = learned_views(plain, masks, fill)
    return masks.cpu(), (views * 255).to(torch.uint8).cpu()


def mask_pictures(config: Config, steer: Steer | None) -> dict[str, NDArray[np.uint8]]:
    """The masks as they are now over held-out images, drawn as in a report: `masks`, or nothing without any."""
    from dino_value.report.figures import masks_figure

    images = held_out_images(config)
    if images is None or (found := designed(config, steer, images)) is None:
        return {}
    figure = masks_figure(images, {config.method: found[0]}, {config.method: found[1]})
    return {"masks": np.asarray(Image.open(io.BytesIO(figure.panels[0].png)).convert("RGB"))}


@torch.no_grad()
def patch_map(backbone: Backbone, images: Tensor) -> Tensor:
    """Patch features [n h w D]."""
    features = backbone.eval()(backbone.normalise(images))
    return features.patches.unflatten(1, features.grid)
