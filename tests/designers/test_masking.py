"""From a mask to a view, and the regularisers."""

from __future__ import annotations

import pytest
import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor

from dino_value.designers import fill_in, learned_views, sparsity, total_variation
from dino_value.designers.masking import blur

FILLS = ("blur", "mean", "noise")


@pytest.fixture
def views(generator: torch.Generator) -> Tensor:
    return torch.randn(4, 3, 16, 24, generator=generator)


@pytest.mark.parametrize("kind", FILLS)
@pytest.mark.parametrize("size", [(16, 24), (4, 4), (2, 2)])
def test_a_fill_is_a_view(kind: str, size: tuple[int, int]) -> None:
    views = torch.randn(2, 3, *size)
    fill = fill_in(views, kind, 10.0, torch.Generator().manual_seed(0))
    assert fill.shape == views.shape
    assert bool(fill.isfinite().all())


@pytest.mark.parametrize(("size", "sigma"), [((24, 24), 2.0), ((16, 40), 10.0), ((8, 8), 0.4)])
def test_blur_is_the_librarys(size: tuple[int, int], sigma: float) -> None:
    views = torch.rand(3, 3, *size, dtype=torch.float64)
    radius = min(int(3 * sigma + 0.5), min(size) - 1)
    expected = gaussian_blur2d(views, (2 * radius + 1, 2 * radius + 1), (sigma, sigma))
    torch.testing.assert_close(blur(views, sigma), expected, rtol=1e-6, atol=1e-6)


def test_blur_keeps_the_mean_colour_and_removes_detail(views: Tensor) -> None:
    fill = fill_in(views, "blur", 3.0)
    assert fill.std((-1, -2)).max() < 0.4 * views.std((-1, -2)).min()
    flat = torch.full((1, 3, 16, 16), 0.7)
    torch.testing.assert_close(fill_in(flat, "blur", 3.0), flat)


def test_mean_is_each_images_own_colour(views: Tensor) -> None:
    fill = fill_in(views, "mean", 0.0)
    torch.testing.assert_close(fill[2, 1], views[2, 1].mean().expand(16, 24))


def test_noise_has_the_views_mean_and_spread(generator: torch.Generator) -> None:
    views = 3 + 2 * torch.randn(2, 3, 64, 64, generator=generator)
    fill = fill_in(views, "noise", 0.0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(fill.mean((-1, -2)), views.mean((-1, -2)), atol=0.15, rtol=0)
    torch.testing.assert_close(fill.std((-1, -2)), views.std((-1, -2)), atol=0.15, rtol=0)
    again = fill_in(views, "noise", 0.0, torch.Generator().manual_seed(1))
    assert torch.equal(fill, again)


def test_an_unknown_fill(views: Tensor) -> None:
    with pytest.raises(ValueError, match="choose blur, mean or noise"):
        fill_in(views, "zeros", 1.0)


def test_the_learned_view(views: Tensor, generator: torch.Generator) -> None:
    masks, fill = torch.rand(4, 1, 16, 24, generator=generator), torch.zeros_like(views) - 5
    torch.testing.assert_close(learned_views(views, masks, fill), masks * views + (1 - masks) * fill)


def test_full_masks_keep_and_empty_masks_hide(views: Tensor) -> None:
    fill = torch.full_like(views, -5)
    ones = torch.ones(4, 1, 16, 24)
    assert torch.equal(learned_views(views, ones, fill), views)
    assert torch.equal(learned_views(views, 0 * ones, fill), fill)


def test_a_mask_gets_the_gradient_of_what_it_uncovers(views: Tensor) -> None:
    masks = torch.full((4, 1, 16, 24), 0.3, requires_grad=True)
    fill = torch.zeros_like(views)
    learned_views(views, masks, fill).sum().backward()
    assert masks.grad is not None
    torch.testing.assert_close(masks.grad, (views - fill).sum(1, keepdim=True))


def test_sparsity_is_per_image() -> None:
    """One image all kept and one all hidden are not two images half kept."""
    masks = torch.stack([torch.ones(1, 4, 4), torch.zeros(1, 4, 4)])
    assert sparsity(masks, 0.5).item() == pytest.approx(0.25)
    assert sparsity(torch.full((2, 1, 4, 4), 0.6), 0.6).item() == pytest.approx(0)


def test_total_variation() -> None:
    checkers = (torch.arange(4)[:, None] + torch.arange(4)) % 2
    assert total_variation(checkers[None, None].float()).item() == pytest.approx(2)
    assert total_variation(torch.full((1, 1, 4, 4), 0.3)).item() == 0
    halves = torch.zeros(1, 1, 4, 4)
    halves[..., 2:] = 1  # one of three column steps, no row step
    assert total_variation(halves).item() == pytest.approx(1 / 3)
