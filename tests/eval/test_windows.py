"""Sliding windows and bands against the whole at once, and segmentation's counts against torchmetrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from dino_value.data.labelled import LabelledTensors
from dino_value.errors import UserError
from dino_value.eval import common, seg, windows
from dino_value.eval.benchmarks import timing
from dino_value.models.backbone import Backbone, Features, create_backbone

OPTIONS = seg.SegOptions(size=(32, 32), steps=2, batch=4, lr=1e-2, device="cpu")
NAMES = ["a", "b", "c", "d", "e"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_backbone(
            "vit_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
        )


def source(height: int, width: int, count: int = 3, seed: int = 0) -> LabelledTensors:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 5, (count, height, width), generator=generator)
    labels[:, :3] = 255
    return LabelledTensors("seg", images, labels, NAMES)


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [
        (32, 32, 21, [0]),
        (20, 32, 21, [0]),
        (33, 32, 21, [0, 1]),
        (64, 32, 32, [0, 32]),
        (64, 32, 16, [0, 16, 32]),
        (65, 32, 16, [0, 16, 32, 33]),
        (683, 512, 341, [0, 171]),
    ],
)
def test_window_starts(length: int, window: int, stride: int, starts: list[int]) -> None:
    assert windows.window_starts(length, window, stride) == starts


@pytest.mark.parametrize("size", [(32, 32), (32, 80), (77, 32), (90, 71)])
@pytest.mark.parametrize("stride", [8, 21, 32])
@pytest.mark.parametrize("to", [None, (64, 50), (160, 201), (9, 1)])
@pytest.mark.parametrize("strip_rows", [1, 7, 1000])
def test_strips_are_the_mean_of_the_windows(
    size: tuple[int, int],
    stride: int,
    to: tuple[int, int] | None,
    strip_rows: int,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against everything at full resolution, then resized."""
    grid, to = windows.Grid.over(size, (32, 32), (stride, stride)), to or size
    monkeypatch.setattr(windows, "STRIP_BYTES", 4 * 5 * to[1] * strip_rows)
    coarse = torch.randn(len(grid), 5, 4, 4, generator=generator)
    total, count = torch.zeros(5, *size), torch.zeros(size)
    for index, one in enumerate(coarse):
        top, left = grid.tops[index // len(grid.lefts)], grid.lefts[index % len(grid.lefts)]
        here = (..., slice(top, top + 32), slice(left, left + 32))
        total[here] += F.interpolate(one[None], size=(32, 32), mode="bilinear", align_corners=False)[0]
        count[here] += 1
    assert count.min() >= 1
    merged = coarse[0] if len(grid) == 1 else total / count
    found = list(windows.strips(list(coarse), grid, to))
    assert max(map(len, found)) <= strip_rows
    expected = F.interpolate(merged[None], size=to, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(torch.cat(found).permute(2, 0, 1), expected, atol=1e-5, rtol=1e-5)


def test_windows_that_tile_agree_with_the_whole(generator: torch.Generator) -> None:
    """Where nothing is interpolated and every window holds its part of one map, merging gives the map."""
    whole = torch.randn(5, 64, 96, generator=generator)
    for stride in (16, 32):
        grid = windows.Grid.over((64, 96), (32, 32), (stride, stride))
        merged = torch.cat(list(windows.strips(grid.cut(whole), grid, (64, 96)))).permute(2, 0, 1)
        torch.testing.assert_close(merged, whole)


def naive(
    backbone: Backbone, head: torch.nn.Module, data: LabelledTensors, options: seg.SegOptions
) -> dict[str, float]:
    """One image at a time, one window at a time, everything at full resolution."""
    dataset = seg.Scaled(data, options, backbone.patch_size)
    extractor = common.FrozenBackbone(backbone, seg.read_map, options)
    confusion = torch.zeros(5, 5, dtype=torch.int64)
    for index in range(len(data)):
        images, labels = dataset[index, 0]
        passes = []
        for image in images:
            for mirrored in (False, True) if options.flip else (False,):
                grid = dataset.grid(image)
                shown = image.flip(-1) if mirrored else image
                total, count = torch.zeros(5, *grid.size), torch.zeros(grid.size)
                for top in grid.tops:
                    for left in grid.lefts:
                        here = (..., slice(top, top + grid.window[0]), slice(left, left + grid.window[1]))
                        logits = head(extractor(shown[None][here]))
                        total[here] += F.interpolate(logits, size=grid.window, mode="bilinear", align_corners=False)[0]
                        count[here] += 1
                logits = F.interpolate((total / count)[None], size=labels.shape, mode="bilinear", align_corners=False)
                passes.append((logits.flip(-1) if mirrored else logits).softmax(1))
        confusion += seg.confusion_matrix(torch.stack(passes).mean(0).argmax(1), labels[None].long(), 5)
    return seg.scores_of(confusion, NAMES)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"stride": 8},
        {"flip": True},
        {"scales": (1.0, 1.5)},
        {"scales": (0.75, 1.0), "flip": True, "stride": 16},
        {"head": "conv"},
    ],
)
def test_scores_are_those_of_one_window_at_a_time(
    backbone: Backbone, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "STRIP_BYTES", 4 * 5 * 70 * 9)  # several strips an image
    options = replace(OPTIONS, **change)  # type: ignore[arg-type]
    data = source(45, 70)
    with common.frozen(backbone, seg.read_map, options) as extractor:
        _, head = seg.fit(extractor, source(32, 32, 8), options)
        found = seg.score(extractor, head, data, options).metrics
        with torch.no_grad():
            expected = naive(backbone, head, data, options)
    for name in ("miou", "macc", "aacc"):
        assert found[name] == pytest.approx(expected[name], abs=2e-3), name  # a few pixels lie on a tie


class EachPatchAlone(torch.nn.Module):
    """A backbone without attention or position: a patch's feature is its mean colour, wherever a window begins."""

    patch_size, embed_dim, depth, name = 8, 3, 1, "mean colour"

    def __init__(self) -> None:
        super().__init__()
        self.still = torch.nn.Parameter(torch.zeros(()))

    def normalise(self, images: Tensor) -> Tensor:
        return images.float() / 255

    def forward(self, images: Tensor) -> Features:
        means = F.avg_pool2d(images, 8)
        return Features(means.mean((2, 3)), means.flatten(2).transpose(1, 2), (means.shape[2], means.shape[3]))


@pytest.mark.parametrize("stride", [16, 24, 32])
def test_windows_and_the_whole_image_agree_inside(stride: int, generator: torch.Generator) -> None:
    """From the image to the logits at full size. Where a patch is seen alone, windows on the patch grid can differ from
    the whole in the bilinear upsampling alone, within half a patch of a window's edge.
    """
    height, width = 64, 88
    data = LabelledTensors(
        "seg",
        torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=generator),
        torch.zeros(1, height, width, dtype=torch.int64),
        NAMES,
    )
    options = replace(OPTIONS, stride=stride)
    extractor = common.FrozenBackbone(EachPatchAlone(), seg.read_map, options)  # type: ignore[arg-type]
    head = torch.nn.Conv2d(3, 5, 1)
    dataset = seg.Scaled(data, options, 8)
    image = data.images[0]
    with torch.no_grad():
        ((found,),) = seg.predict(extractor, head, dataset, [[image]], options)
        slid = torch.cat(list(found.strips((height, width)))).permute(2, 0, 1)
        coarse = head(extractor(image[None]))
        whole = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)[0]
    assert len(found.grid) > 1
    inside = torch.ones(height, width, dtype=torch.bool)
    for starts, side, mask in ((found.grid.tops, height, inside), (found.grid.lefts, width, inside.T)):
        for edge in {cut for start in starts for cut in (start, start + 32)} - {0, side}:
            mask[edge - 4 : edge + 4] = False
    assert inside.float().mean() > 0.2
    torch.testing.assert_close(slid[:, inside], whole[:, inside], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(slid[:, ~inside], whole[:, ~inside], atol=1e-3)


def test_one_window_is_the_whole_image(backbone: Backbone) -> None:
    """Square images at the window's size: nothing slides, so nothing may differ."""
    results = [
        seg.evaluate(backbone, source(32, 32, 8), source(64, 64), replace(OPTIONS, inference=kind))
        for kind in ("slide", "whole")
    ]
    assert results[0] == results[1]


def test_strips_change_no_score(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = seg.evaluate(backbone, source(32, 32, 8), source(64, 64), OPTIONS)
    monkeypatch.setattr(windows, "STRIP_BYTES", 4 * 5 * 64 * 5)
    assert seg.evaluate(backbone, source(32, 32, 8), source(64, 64), OPTIONS) == pytest.approx(plain, abs=1e-3)


def test_mirrored_images_score_the_same_with_flip(backbone: Backbone) -> None:
    options = replace(OPTIONS, flip=True, stride=16, steps=4)
    data = source(40, 56)  # mirrored, its windows fall on the same places
    mirrored = LabelledTensors("seg", data.images.flip(-1), data.targets.flip(-1), NAMES)
    first, second = (seg.evaluate(backbone, source(32, 32, 8), one, options) for one in (data, mirrored))
    assert second["loss"] == pytest.approx(first["loss"], abs=1e-5)
    assert second["miou"] == pytest.approx(first["miou"], abs=2e-3)


def test_memory_grows_with_the_width_not_the_area(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of 60 classes on 1000 × 800 pixels are 192 MB; held are a band and a strip."""
    monkeypatch.setattr(windows, "STRIP_BYTES", 2**22)
    classes, labels = 60, torch.randint(0, 60, (1000, 800))
    grid = windows.Grid.over((128, 104), (64, 64), (43, 43))
    coarse = list(torch.randn(len(grid), classes, 8, 8))

    def work() -> None:
        tally = seg._Tally(classes, OPTIONS, torch.device("cpu"))
        tally.in_strips([seg._Pass(grid, False, coarse)], labels)

    def prepare() -> Callable[[], object]:
        return work

    assert timing.peak_tensors(timing.Case("", prepare)) < 32e6


@pytest.mark.parametrize("seed", range(5))
def test_iou_agrees_with_torchmetrics(seed: int) -> None:
    """Random maps with ignored pixels, a class that is nowhere and one that is only predicted."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (4, 17, 13), generator=generator)
    prediction = torch.randint(0, 6, (4, 17, 13), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    confusion = seg.confusion_matrices(prediction, labels, 7)
    expected = multiclass_confusion_matrix(prediction, labels, num_classes=7, ignore_index=255)
    assert torch.equal(confusion.sum(0), expected)
    for one, image, truth in zip(confusion, prediction, labels, strict=True):
        assert torch.equal(one, multiclass_confusion_matrix(image, truth, num_classes=7, ignore_index=255))
    scores = seg.scores_of(confusion.sum(0), "abcdefg")
    per_class = multiclass_jaccard_index(prediction, labels, num_classes=7, average="none", ignore_index=255)
    for name, value in zip("abcdef", per_class.tolist(), strict=False):
        assert scores[f"iou/{name}"] == pytest.approx(value, abs=1e-6)
    assert scores["iou/f"] == 0
    assert scores["miou"] == pytest.approx(float(per_class[:6].double().mean()), abs=1e-6)


def test_rows_add_up_to_the_score(backbone: Backbone) -> None:
    with common.frozen(backbone, seg.read_map, OPTIONS) as extractor:
        _, head = seg.fit(extractor, source(32, 32, 8), OPTIONS)
        result = seg.score(extractor, head, source(40, 60, 5), OPTIONS)
    assert result.rows.shape == (5, 15)
    whole = result.statistic(result.rows.sum(0)[None])
    for name in ("miou", "macc", "aacc"):
        assert float(whole[name]) == pytest.approx(result.metrics[name], abs=1e-12)


# Training crops


def test_crops_are_a_function_of_position_and_seed() -> None:
    crops = seg.Crops(source(40, 70), replace(OPTIONS, augment=True, random_scale=(0.5, 2.0)))
    image, labels = crops[1, 5]
    assert (image.shape, labels.shape) == ((3, 32, 32), (32, 32))
    assert all(torch.equal(a, b) for a, b in zip(crops[1, 5], (image, labels), strict=True))
    assert not torch.equal(crops[1, 6][0], image)


def test_a_crop_moves_image_and_labels_together() -> None:
    labels = torch.arange(5).repeat_interleave(40)[None, None].expand(2, 32, -1).contiguous()
    images = (labels * 40).to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()
    crops = seg.Crops(LabelledTensors("seg", images, labels, NAMES), replace(OPTIONS, augment=True))
    for seed in range(8):
        image, found = crops[0, seed]
        assert torch.equal(image[0].long() // 40, found)


def test_features_are_kept_only_where_crops_do_not_vary(backbone: Backbone) -> None:
    with common.frozen(backbone, seg.read_map, OPTIONS) as extractor:
        square, wide = (seg.Crops(source(32, width, 8), OPTIONS) for width in (32, 50))
        assert common.remember(extractor, square, OPTIONS) is not None
        assert common.remember(extractor, wide, OPTIONS) is None


def test_a_small_scale_is_padded_with_ignored_pixels() -> None:
    crops = seg.Crops(source(32, 32), replace(OPTIONS, random_scale=(0.5, 0.5)))
    image, labels = crops[0, 0]
    assert image.shape == (3, 32, 32)
    assert (labels[16:] == 255).all()
    assert (labels[2:16, :16] != 255).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inference": "tile"}, "choose slide or whole"),
        ({"stride": 33}, "stride=33"),
        ({"scales": (0.0,)}, "scales="),
        ({"random_scale": (2.0, 1.0)}, "random_scale="),
    ],
)
def test_bad_settings(backbone: Backbone, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        seg.evaluate(backbone, source(32, 32), source(32, 32), replace(OPTIONS, **change))  # type: ignore[arg-type]


def test_a_split_without_labels(backbone: Backbone, tmp_path: Path) -> None:
    empty = source(32, 32)
    empty.targets = torch.full_like(empty.targets, 255)
    with pytest.raises(UserError, match="no labelled pixel"):
        seg.evaluate(backbone, source(32, 32), empty, OPTIONS)


def test_labels_above_the_classes_name_the_item(backbone: Backbone) -> None:
    wrong = source(32, 32)
    wrong.targets[2, 9, 9] = 5
    with pytest.raises(UserError, match=r"sample 2: labels 0 … 5, but there are 5 classes"):
        seg.evaluate(backbone, wrong, source(32, 32), OPTIONS)


def test_an_image_and_labels_of_different_size(backbone: Backbone) -> None:
    wrong = LabelledTensors("seg", source(32, 32).images, Tensor(source(32, 40).targets), NAMES)
    with pytest.raises(UserError, match="sample 0: the image has 32x32 pixels and its labels 32x40; they must agree"):
        seg.evaluate(backbone, source(32, 32), wrong, OPTIONS)
