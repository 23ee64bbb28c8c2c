"""What every entry of DESIGNERS must do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dino_value.designers import DESIGNERS

STRIDE = 4
every = pytest.mark.parametrize("name", DESIGNERS)


def build(name: str, keep_ratio: float = 0.5, stride: int = STRIDE) -> nn.Module:
    torch.manual_seed(0)
    return DESIGNERS[name](32, 1, stride, keep_ratio)


@every
@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
def test_a_mask_a_view(name: str, size: tuple[int, int]) -> None:
    masks = build(name)(torch.randn(3, 3, *size))
    assert masks.shape == (3, 1, *size)
    assert masks.dtype == torch.float32
    assert bool(((masks >= 0) & (masks <= 1)).all())


@every
def test_one_pixel_strides(name: str) -> None:
    assert build(name, stride=1)(torch.randn(1, 3, 12, 12)).shape == (1, 1, 12, 12)


@every
def test_masks_stay_in_range_for_extreme_views(name: str) -> None:
    designer = build(name)
    nn.init.normal_(designer.out.weight, std=100.0)  # type: ignore[union-attr,arg-type]
    masks = designer(100 * torch.randn(2, 3, 16, 16))
    assert bool(masks.isfinite().all())
    assert bool(((masks >= 0) & (masks <= 1)).all())


@every
@pytest.mark.parametrize("keep_ratio", [0.2, 0.6, 0.9])
def test_it_begins_at_the_keep_ratio(name: str, keep_ratio: float) -> None:
    masks = build(name, keep_ratio)(torch.randn(8, 3, 16, 16))
    assert masks.mean().item() == pytest.approx(keep_ratio, abs=0.05)
    assert masks.std().item() < 0.05


@every
def test_every_parameter_is_taught(name: str) -> None:
    """With a target that differs from pixel to pixel, no parameter is left without gradient, and one step goes down."""
    designer = build(name)
    views = torch.randn(2, 3, 16, 16)
    target = (torch.rand(2, 1, 16, 16) > 0.5).float()
    optimizer = torch.optim.Adam(designer.parameters(), 1e-2)
    losses = []
    for _ in range(2):
        loss = (designer(views) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in designer.parameters())
    assert losses[1] < losses[0]


@every
def test_images_do_not_see_each_other(name: str) -> None:
    """No batch statistics: a mask depends on its own view, in training mode too."""
    designer = build(name).train()
    views = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(designer(views)[:1], designer(views[:1]), rtol=1e-4, atol=1e-6)


@every
def test_masks_depend_on_the_view(name: str) -> None:
    designer = build(name)
    first, second = designer(torch.randn(2, 3, 16, 16))
    assert not torch.allclose(first, second, atol=1e-7)


@every
def test_twice_differentiable_in_double_precision(name: str) -> None:
    designer = build(name).double()
    views = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(designer, (views,), fast_mode=True)
