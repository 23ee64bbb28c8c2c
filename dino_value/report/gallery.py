"""What a run has to show: masks over images, features in colour."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dino_value.config import Config, load_config
from dino_value.data.conventions import as_configured
from dino_value.data.labelled import LabelledDataset, some_items
from dino_value.data.layouts import open_labelled
from dino_value.data.pixels import as_rgb
from dino_value.designers import fill_in, learned_views
from dino_value.models.backbone import Backbone
from dino_value.objectives.ibot import Masks
from dino_value.objectives.self_distillation import SelfDistillation
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.tasks.kinds import KINDS
from dino_value.training.designer_update import DesignerUpdate
from dino_value.training.steps import Views, evaluating

SHOWN = 6  # images


@as_configured
def held_out_images(config: Config, count: int = SHOWN, size: int | None = None) -> Tensor | None:
    """Images uint8 [n 3 size size] of the run's labelled validation split, by default as large as its views; None where
    it names none.

    Raises:
        UserError: they are not there, or cannot be read.
    """
    kind, root = next(((kind, root) for kind, root in config.labels.items() if root is not None), ("", None))
    if root is None:
        return None
    skip, side = config.data.skip_unreadable, size or config.views.global_size
    source = open_labelled(KINDS[kind].layout, root, "validation", check_pairs=not skip)
    items = LabelledDataset(source, size=(side, side))
    return torch.stack(some_items(lambda index: items[index, 0][0], len(items), count, skip))


def as_pictures(images: Tensor) -> Tensor:
    """Images uint8 [n C H W] as RGB to look at."""
    return torch.stack([as_rgb(image) for image in images])


def masked(run_folder: Path, images: Tensor, checkpoint: Path | None = None) -> tuple[Tensor, Tensor] | None:
    """`designed` by a run in its folder: its newest checkpoint, or `checkpoint`."""
    from dino_value.training.trainer import Trainer

    config = load_config(run_folder / "config.yaml")
    run = Trainer(config)
    run.load_state_dict(load_checkpoint(checkpoint or run_folder))
    return designed(config, run.steer, images)


@torch.no_grad()
def designed(config: Config, steer: DesignerUpdate | None, images: Tensor) -> tuple[Tensor, Tensor] | None:
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


def moved(run_folder: Path, images: Tensor) -> Tensor | None:
    """`target_map` of a run in its folder, by its newest checkpoint."""
    from dino_value.training.trainer import Trainer

    config = load_config(run_folder / "config.yaml")
    if not (config.designs and config.designer.moves_targets):
        return None
    run = Trainer(config)
    run.load_state_dict(load_checkpoint(run_folder))
    assert run.steer is not None
    return target_map(run.steer, run.teacher_temperature(), images)


@torch.no_grad()
def target_map(steer: DesignerUpdate, temperature: float, images: Tensor) -> Tensor | None:
    """KL(q′‖q) in nats of each patch's target, [n h w], over whole images uint8 [n 3 H W] that hide nothing; None where
    no patch has a target of its own (iBOT's), or nothing moves it."""
    loss, student = steer.loss, steer.student
    if not isinstance(loss, SelfDistillation) or loss.ibot is None or not steer.steers:
        return None
    views = student.backbone.normalise(images.to(steer.device))
    large, size = torch.cat([views, views]), student.backbone.patch_size
    grid = (large.shape[-2] // size, large.shape[-1] // size)
    draw = Masks.all(len(large), grid[0] * grid[1]).to(large.device)
    with evaluating(student):
        targets, _ = loss.teach(steer.teacher, large, temperature, draw)
        states = loss.states(student, Views(large, large[:0]), steer.scope.start, draw)
        said = loss.predict(student, states, steer.scope.start, draw)
        changed = steer.moved(states, said, targets, draw, seed=0)["ibot"]
    q, tiny = targets["ibot"], torch.finfo(targets["ibot"].dtype).tiny
    spent = (changed * (changed.clamp_min(tiny).log() - q.clamp_min(tiny).log())).sum(-1)
    return spent.view(len(large), *grid)[: len(images)].clamp_min(0).cpu()


def mask_pictures(config: Config, steer: DesignerUpdate | None) -> dict[str, NDArray[np.uint8]]:
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
