"""Monocular depth on patch features, frozen or fine-tuned: `dino-value eval depth`, or `python eval/depth.py`.

Protocol: images at 480×640, linear-BN head with softplus, squared error, AdamW, 20k steps of 8 images;
predictions clamped to 1e-3…10 m, scored at each depth map's own resolution inside the Eigen crop. Metrics are computed
for each image and averaged over images, as DINOv3 does; `--average pixel` pools the pixels of all images instead, as
Eigen et al. (2014) did. The two differ (the root of a mean is not the mean of roots): compare like with like.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_value.data.labelled import LabelledSource
from dino_value.errors import UserError
from dino_value.eval import command, common, intervals
from dino_value.eval.seg import read_map
from dino_value.heads import LinearBNDepthHead, build_head, depth_loss
from dino_value.models.backbone import Backbone

HEADS = {"linear": "depth_linear"}
SUSPICIOUS_MEAN = 100.0
"""Metres; no room and no street is this deep on average."""
METRICS = ("rmse", "absrel", "delta1", "delta2", "delta3", "log10", "silog")


@dataclass(frozen=True)
class DepthOptions(common.HeadOptions):
    """Defaults: the NYUv2 protocol.

    Args:
        min_depth, max_depth: metres; predictions are clamped to this range, truth outside it is not scored.
        eigen_crop: score only the central region that Eigen et al. (2014) chose for NYUv2.
        flip: average with the mirrored image's prediction.
        average: `image`, metrics of each image and their mean; `pixel`, metrics of all pixels together.
    """

    size: tuple[int, int] = (480, 640)
    head: str = "linear"
    lr: float = 1e-3
    min_depth: float = 1e-3
    max_depth: float = 10.0
    eigen_crop: bool = True
    flip: bool = False
    average: str = "image"


def evaluate(
    backbone: Backbone,
    train_source: LabelledSource,
    val_source: LabelledSource,
    options: DepthOptions = DepthOptions(),
) -> dict[str, float]:
    """Train a head, alone or with a copy of the backbone, and score it on held-out depth maps.

    Returns:
        `rmse` (metres), `absrel`, `delta1`, `delta2`, `delta3`, `log10`, `silog`, each averaged as the options say,
        and `loss`: the held-out mean squared error over all valid pixels, neither cropped nor clamped.

    Raises:
        UserError: unfit data or settings; no valid depth; a head that diverges.
    """
    return measure(backbone, (train_source, val_source), options).metrics


def measure(backbone: Backbone, data: command.Pair, options: DepthOptions) -> common.Result:
    """`evaluate`, with what intervals, results.json and pictures need."""
    common.check_inputs(backbone, data, "depth", options)
    if not 0 < options.min_depth < options.max_depth:
        raise UserError(f"min_depth={options.min_depth}, max_depth={options.max_depth}: give 0 < least < most, metres")
    if options.average not in ("image", "pixel"):
        raise UserError(f"average={options.average}: choose image or pixel")
    training, validation = common.labelled(data[0], options), common.View(data[1])
    seconds: dict[str, float] = {}
    with common.frozen(backbone, read_map, options) as extractor:
        with common.timed(seconds, "fit"):
            reader, head = fit(extractor, training, options)
        with common.timed(seconds, "score"):
            result = score(reader, head, validation, options)
    result.seconds, result.about = seconds, common.names_of(training, options)
    return result


def fit(
    extractor: common.FrozenBackbone, source: LabelledSource, options: DepthOptions
) -> tuple[common.FrozenBackbone, nn.Module]:
    """A reader of images and a head trained on `source`, in eval mode, on the extractor's device."""
    dim = extractor.backbone.embed_dim * options.blocks
    head = common.seeded(lambda: build_head(HEADS[options.head], dim), options.seed)
    mean = mean_depth(source)
    if mean > SUSPICIOUS_MEAN:
        print(f"warning: depths are {mean:.0f} m on average; are they millimetres read as metres?", file=sys.stderr)
    if isinstance(head, LinearBNDepthHead):
        head.start_at(mean)
    head.to(extractor.device)
    return common.fit(extractor, head, partial(depth_loss, kind="l2"), source, options)


def score(
    extractor: common.FrozenBackbone, head: nn.Module, source: LabelledSource, options: DepthOptions
) -> common.Result:
    """The metrics of a trained head (`evaluate` names them).

    Raises:
        UserError: no pixel to score.
    """
    sums: list[Tensor] = []
    pictures: list[tuple[str, Any]] = []
    loss, pixels = (torch.zeros((), dtype=torch.float64, device=extractor.device) for _ in range(2))
    with torch.no_grad():
        for images, targets in common.validation_images(source, options):
            coarse = head(extractor(images))
            if options.flip:
                coarse = (coarse + head(extractor(images.flip(-1))).flip(-1)) / 2
            drawn = 0
            for prediction, truth in common.same_size_runs(coarse, targets):
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
                sums.append(depth_sums(prediction, truth, mask))
                for one, true in zip(prediction, truth, strict=True):
                    if len(pictures) < options.save_images:
                        pictures.append(_picture(len(pictures), images[drawn], true, one))
                    drawn += 1
    rows = torch.cat(sums)
    if not rows[:, 0].any():
        raise UserError(
            f"the validation split has no depth between {options.min_depth:g} and {options.max_depth:g} m"
            f"{' inside the Eigen crop' if options.eigen_crop else ''}"
        )
    statistic: intervals.Statistic
    if options.average == "pixel":
        means, statistic = metrics_of_sums(rows.sum(0)[None])[0].tolist(), _of_pixels
    else:
        per_image = metrics_of_sums(rows)
        means, statistic = per_image.nanmean(0).tolist(), intervals.means(*METRICS)
        rows = intervals.mean_rows(per_image)
    metrics = {**dict(zip(METRICS, means, strict=True)), "loss": float(loss / pixels)}
    return common.Result(metrics, rows.cpu(), statistic, pictures=pictures)


def _of_pixels(sums: Tensor) -> dict[str, Tensor]:
    return dict(zip(METRICS, metrics_of_sums(sums).unbind(1), strict=True))


def _picture(index: int, image: Tensor, truth: Tensor, prediction: Tensor) -> tuple[str, Any]:
    """Image, truth and prediction on one scale of colours: the truth's range."""
    from dino_value.eval import pictures

    known = truth[truth > 0]
    low, high = (float(known.min()), float(known.max())) if known.numel() else (0.0, 1.0)
    maps = [pictures.colour_depth(part, low, high) for part in (truth, prediction)]
    photograph = pictures.photograph(image, (truth.shape[0], truth.shape[1]))
    return f"{index:04d}_image_truth_prediction", pictures.beside([photograph, *maps])


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


def depth_sums(prediction: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """What the metrics are made of, summed over each image's masked pixels.

    Args:
        prediction, truth: [B H W] metres, positive where `mask` is true.
        mask: bool [B H W].

    Returns:
        float64 [B 9]: pixels; squared, relative error; ratio below 1.25, 1.25², 1.25³; |log10 error|; log error and
        its square.
    """
    # Where the mask is off both are 1, so that no logarithm or quotient there can be NaN.
    prediction, truth = (torch.where(mask, value, 1).double() for value in (prediction, truth))
    error, ratio = prediction - truth, torch.maximum(prediction / truth, truth / prediction)
    log_ratio = prediction.log() - truth.log()
    return torch.stack(
        [
            torch.where(mask, values, 0).sum((1, 2))
            for values in (
                torch.ones_like(error),
                error.square(),
                error.abs() / truth,
                *((ratio < 1.25**power).double() for power in (1, 2, 3)),
                (prediction.log10() - truth.log10()).abs(),
                log_ratio,
                log_ratio.square(),
            )
        ],
        dim=1,
    )


def metrics_of_sums(sums: Tensor) -> Tensor:
    """`depth_sums` [B 9] to float64 [B 7] in the order of `METRICS`; NaN without a pixel."""
    square, relative, *inside, log10, log, log_square = (sums[:, 1:] / sums[:, :1]).unbind(1)
    spread = (log_square - log.square()).clamp(min=0)
    return torch.stack([square.sqrt(), relative, *inside, log10, 100 * spread.sqrt()], dim=1)


def depth_metrics(prediction: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Metrics of each image over its masked pixels, as DINOv3 computes them.

    Args:
        prediction, truth: [B H W] metres, positive where `mask` is true.
        mask: bool [B H W].

    Returns:
        float64 [B 7] in the order of `METRICS`; NaN for an image without a masked pixel.
    """
    return metrics_of_sums(depth_sums(prediction, truth, mask))


def flags(parser: Any) -> None:
    defaults, switch = EVALUATION.defaults, argparse.BooleanOptionalAction
    parser.add_argument("--head", default=defaults.head, choices=list(HEADS), help="what is trained")
    parser.add_argument(
        "--eigen-crop", default=defaults.eigen_crop, action=switch, help="score its region only; on by default"
    )
    parser.add_argument("--min-depth", default=defaults.min_depth, type=float, help="metres")
    parser.add_argument("--max-depth", default=defaults.max_depth, type=float, help="metres")
    parser.add_argument("--flip", default=False, action=switch, help="average with the mirrored image's prediction")
    parser.add_argument(
        "--average", default=defaults.average, choices=["image", "pixel"], help="over images, or over all pixels"
    )


EVALUATION = common.Evaluation(
    name="depth",
    description="Depth by a light head on frozen patch features: RMSE, AbsRel, δ.",
    layout="nyuv2",
    defaults=DepthOptions(),
    open=command.open_pair("nyuv2"),
    measure=measure,
    describe=command.describe_pair,
    flags=flags,
    headline=("rmse", "absrel", "delta1"),
)


def main(argv: Sequence[str]) -> int:
    """The command; see `--help`."""
    return command.run(EVALUATION, argv)


if __name__ == "__main__":
    common.script(main)
