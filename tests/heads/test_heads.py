"""Heads and losses: shapes, gradients, values against the written-out form, and empty targets."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_value.heads import (
    HEADS,
    LinearBNDepthHead,
    build_head,
    classification_loss,
    depth_loss,
    feature_map,
    segmentation,
    segmentation_loss,
)
from dino_value.heads.segmentation import IGNORE

DIM, CLASSES = 12, 5


def features(kind: str, generator: torch.Generator) -> Tensor:
    shape = (4, DIM) if kind.startswith("classes") else (4, DIM, 3, 4)
    return torch.randn(shape, generator=generator)


def test_feature_map_keeps_row_order() -> None:
    patches = torch.arange(2 * 6 * 1.0).view(2, 6, 1)
    assert torch.equal(feature_map(patches, (2, 3))[1, 0], torch.tensor([[6.0, 7, 8], [9, 10, 11]]))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("seg_linear", (4, CLASSES, 3, 4)),
        ("seg_conv", (4, CLASSES, 6, 8)),
        ("depth_linear", (4, 1, 3, 4)),
        ("classes_linear", (4, CLASSES)),
    ],
)
def test_registry_builds_each_head(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> None:
    assert build_head(kind, DIM, CLASSES)(features(kind, generator)).shape == shape


def test_unknown_head_is_refused() -> None:
    with pytest.raises(ValueError, match="seg_linear"):
        build_head("seg_linaer", DIM, CLASSES)


@pytest.mark.parametrize("kind", HEADS)
def test_eval_mode_is_differentiable_and_does_not_couple_images(kind: str, generator: torch.Generator) -> None:
    head = build_head(kind, DIM, CLASSES)
    head(features(kind, generator))  # running statistics that are not the trivial ones
    before = {name: value.clone() for name, value in head.state_dict().items()}
    head.eval()
    inputs = features(kind, generator).requires_grad_()
    (gradient,) = torch.autograd.grad(head(inputs)[0].square().sum(), inputs)
    assert gradient[0].abs().sum() > 0
    assert not gradient[1:].any()
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_segmentation_loss_is_the_mean_over_valid_pixels(generator: torch.Generator) -> None:
    logits = torch.randn(2, CLASSES, 3, 4, generator=generator)
    labels = torch.randint(0, CLASSES, (2, 6, 8), generator=generator)
    labels[0, :3] = 255
    upsampled = F.interpolate(logits, size=(6, 8), mode="bilinear", align_corners=False)
    log_probabilities = upsampled.log_softmax(1).permute(0, 2, 3, 1)[labels != 255]
    expected = -log_probabilities.gather(1, labels[labels != 255][:, None]).mean()
    torch.testing.assert_close(segmentation_loss(logits, labels), expected)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_depth_loss_is_the_mean_over_valid_pixels(kind: str, generator: torch.Generator) -> None:
    prediction = torch.rand(2, 1, 4, 4, generator=generator)
    depth = torch.rand(2, 8, 8, generator=generator) + 0.1
    depth[1, :, 5:] = 0
    error = F.interpolate(prediction, size=(8, 8), mode="bilinear", align_corners=False)[:, 0] - depth
    error = error[depth > 0]
    expected = error.abs().mean() if kind == "l1" else error.square().mean()
    torch.testing.assert_close(depth_loss(prediction, depth, kind), expected)  # type: ignore[arg-type]


def test_no_valid_pixel_gives_zero_loss_and_zero_gradient(generator: torch.Generator) -> None:
    logits = torch.randn(1, CLASSES, 2, 2, generator=generator, requires_grad=True)
    depth = torch.rand(1, 1, 2, 2, generator=generator, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 4, 4), 255)) + depth_loss(depth, torch.zeros(1, 4, 4))
    loss.backward()
    assert loss.item() == 0
    for value in (logits, depth):
        assert value.grad is not None
        assert not value.grad.any()


def test_unknown_depth_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="l1 or l2"):
        depth_loss(torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2), "huber")  # type: ignore[arg-type]


@pytest.mark.parametrize("metres", [0.01, 2.5, 80.0, 1000.0])
def test_depth_head_starts_where_it_is_told(metres: float) -> None:
    head = LinearBNDepthHead(DIM)
    head.start_at(metres)
    assert head.eval()(torch.zeros(1, DIM, 1, 1)).item() == pytest.approx(metres, rel=1e-4)


def test_depth_is_positive_and_not_clamped() -> None:
    head = LinearBNDepthHead(DIM)
    head.start_at(50.0)
    assert head(torch.randn(2, DIM, 3, 3)).min() > 10


def test_classification_loss() -> None:
    assert classification_loss(torch.zeros(3, 4), torch.tensor([0, 1, 3])).item() == pytest.approx(math.log(4))


@pytest.mark.parametrize(("size", "strip"), [((37, 50), 3), ((37, 50), 64), ((5, 4), 2)])
def test_cross_entropy_in_strips_is_the_whole_ones(
    generator: torch.Generator, size: tuple[int, int], strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against every logit at full resolution, in value and gradient; the last strip is cut short."""
    classes = segmentation.STRIPS_FROM
    monkeypatch.setattr(segmentation, "STRIP_BYTES", strip * 4 * size[1] * classes)
    logits = torch.randn(2, classes, 5, 7, generator=generator).requires_grad_()
    labels = torch.randint(classes, (2, *size), generator=generator)
    labels[:, :2] = IGNORE
    whole = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    expected = F.cross_entropy(whole, labels, ignore_index=IGNORE)
    found = segmentation_loss(logits, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(segmentation_loss(whole, labels), expected)  # nothing to upsample
    for scale in (1.0, -2.5):
        ours, theirs = (torch.autograd.grad(scale * loss, logits, retain_graph=True) for loss in (found, expected))
        torch.testing.assert_close(ours, theirs)
    assert not torch.autograd.grad(segmentation_loss(logits, torch.full_like(labels, IGNORE)), logits)[0].any()
    low = logits.detach().bfloat16().requires_grad_()
    (gradient,) = torch.autograd.grad(segmentation_loss(low, labels), low)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(segmentation_loss(low, labels), expected, rtol=2e-2, atol=2e-2)
