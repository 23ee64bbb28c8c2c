"""Monocular depth on frozen patch features: `dino-value eval depth`, or `python eval/depth.py`.

Protocol: images at 480×640, linear-BN head with softplus, squared error, AdamW, 20k steps of 8 images;
predictions clamped to 1e-3…10 m, scored at each depth map's own resolution inside the Eigen crop, averaged
over images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_value.backbones import Backbone
from dino_value.data.labelled import LabelledSource
from dino_value.errors import UserError
from dino_value.eval import common
from dino_value.eval.seg import read_map
from dino_value.heads import LinearBNDepthHead, build_head, depth_loss

HEADS = {"linear": "depth_linear"}
METRICS = ("rmse", "absrel", "delta1", "delta2", "delta3", "log10", "silog")


@dataclass(frozen=True)
class DepthOptions(common.HeadOptions):
    """Defaults: the NYUv2 protocol.

    Args:
        min_depth, max_depth: metres; predictions are clamped to this range, truth outside it is not scored.
        eigen_crop: score only the central region that Eigen et al. (2014) chose for NYUv2.
    """

    size: tuple[int, int] = (480, 640)
    head: str = "linear"
    lr: float = 1e-3
    min_depth: float = 1e-3
    max_depth: float = 10.0
    eigen_crop: bool = True


def evaluate(
    backbone: Backbone,
    train_source: LabelledSource,
    val_source: LabelledSource,
    options: DepthOptions = DepthOptions(),
) -> dict[str, float]:
    """Train a head on frozen features and score it on held-out depth maps.

    Returns:
        `rmse` (metres), `absrel`, `delta1`, `delta2`, `delta3`, `log10`, `silog`, each a mean over images,
        and `loss`: the held-out mean squared error over all valid pixels, neither cropped nor clamped.

    Raises:
        UserError: unfit data or settings; no valid depth; a head that diverges.
    """
    common.check_inputs(backbone, (train_source, val_source), "depth", options)
    with common.frozen(backbone, read_map, options) as extractor:
        head = common.seeded(lambda: build_head(HEADS[options.head], backbone.embed_dim), options.seed)
        if isinstance(head, LinearBNDepthHead):
            head.start_at(mean_depth(train_source))
        head.to(extractor.device)
        common.fit_head(
            head,
            partial(depth_loss, kind="l2"),
            common.training_batches(extractor, train_source, options),
            options,
        )
        per_image: list[Tensor] = []
        loss, pixels = (torch.zeros((), dtype=torch.float64, device=extractor.device) for _ in range(2))
        with torch.no_grad():
            for features, targets in common.validation_batches(extractor, val_source, options):
                for prediction, truth in common.same_size_runs(head(features), targets):
                    valid = (truth > 0).sum()
                    loss += depth_loss(prediction, truth, kind="l2").double() * valid
                    pixels += valid
                    prediction = F.interpolate(
                        prediction, size=truth.shape[-2:], mode="bilinear", align_corners=False
                    ).squeeze(1)
                    prediction = prediction.clamp(options.min_depth, options.max_depth)
                    mask = (truth > options.min_depth) & (truth < options.max_depth)
                    if options.eigen_crop:
                        mask &= eigen_crop(truth.shape[-2], truth.shape[-1]).to(mask.device)
                    per_image.append(depth_metrics(prediction, truth, mask))
    means = torch.cat(per_image).nanmean(0).tolist()
    return {**dict(zip(METRICS, means, strict=True)), "loss": float(loss / pixels)}


def mean_depth(source: LabelledSource, most: int = 64) -> float:
    """Mean valid depth in metres of at most `most` maps, spread evenly over the source.

    Raises:
        UserError: they hold no valid depth.
    """
    stride = -(-len(source) // most)
    valid = torch.cat([depth[depth > 0] for depth in (source.load(i)[1] for i in range(0, len(source), stride))])
    if not valid.numel():
        raise UserError(f"{source.name(0)} and others: no valid depth in the training split")
    return float(valid.double().mean())


def eigen_crop(height: int, width: int) -> Tensor:
    """Mask bool [H W] of the Eigen crop: rows 45:471, columns 41:601 of 480×640; scaled for other sizes."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    rows, columns = (
        (round(edge * height / 480) for edge in (45, 471)),
        (round(edge * width / 640) for edge in (41, 601)),
    )
    mask[slice(*rows), slice(*columns)] = True
    return mask


def depth_metrics(prediction: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Metrics of each image over its masked pixels, as DINOv3 computes them.

    Args:
        prediction, truth: [B H W] metres, positive where `mask` is true.
        mask: bool [B H W].

    Returns:
        float64 [B 7] in the order of `METRICS`; NaN for an image without a masked pixel.
    """
    count = mask.sum((1, 2)).double()

    def mean(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0).sum((1, 2)) / count

    # Where the mask is off both are 1, so that no logarithm or quotient there can be NaN.
    prediction, truth = (torch.where(mask, value, 1).double() for value in (prediction, truth))
    error, ratio = prediction - truth, torch.maximum(prediction / truth, truth / prediction)
    log_ratio = prediction.log() - truth.log()
    spread = mean(log_ratio.square()) - mean(log_ratio).square()
    return torch.stack(
        [
            mean(error.square()).sqrt(),
            mean(error.abs() / truth),
            *(mean((ratio < 1.25**power).double()) for power in (1, 2, 3)),
            mean((prediction.log10() - truth.log10()).abs()),
            100 * spread.clamp(min=0).sqrt(),
        ],
        dim=1,
    )


def main(argv: Sequence[str]) -> int:
    """The command; see `--help`."""
    parser = common.build_parser("depth", "Depth on frozen features.", DepthOptions(), list(HEADS))
    parser.add_argument("--no-eigen-crop", dest="eigen_crop", action="store_false", help="score the whole image")
    return common.run("depth", "nyuv2", evaluate, DepthOptions(), parser.parse_args(argv))


if __name__ == "__main__":
    common.script(main)
