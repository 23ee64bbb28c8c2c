"""iBOT: loss, targets and centre against loops and recorded outputs; block masks against the draw written out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_value.models.backbone import create_backbone
from dino_value.objectives.dino import DINOHead, DINOLoss
from dino_value.objectives.ibot import IBOTLoss, Masks, MaskToken, block_mask, block_masks
from dino_value.objectives.sinkhorn import sinkhorn

REFERENCE = Path(__file__).parents[1] / "data" / "reference"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize(("images", "patches", "prototypes"), [(1, 3, 4), (3, 5, 2), (4, 8, 7)])
def test_loss_and_gradient_of_the_loop(images: int, patches: int, prototypes: int) -> None:
    student, teacher = draw(0, images, patches, prototypes).requires_grad_(), draw(1, images, patches, prototypes)
    hidden = torch.rand(images, patches, generator=generator(2)) < 0.5
    hidden[0] = True
    hidden[-1] &= images == 1  # an image without a hidden patch counts as 0
    center = torch.linspace(-1, 1, prototypes, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for image in range(images):
        terms = []
        for patch in range(patches):
            if hidden[image, patch]:
                scores = ((teacher[image, patch] - center) / 0.07).exp()
                shares = (student[image, patch] / 0.2).exp()
                terms.append(-(scores / scores.sum() * (shares / shares.sum()).log()).sum())
        if terms:
            total = total + torch.stack(terms).mean() / images

    loss, masks = IBOTLoss(prototypes, student_temp=0.2).double(), Masks.of(hidden)
    loss.center.copy_(center)
    found = loss(masks.pick(student), loss.targets(masks.pick(teacher), 0.07), masks)
    torch.testing.assert_close(found, total, rtol=1e-6, atol=0)  # the masks' weights are float32
    gradients = [torch.autograd.grad(value, student)[0] for value in (found, total)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)


def test_the_published_targets_and_loss() -> None:
    """DINOv2 with Sinkhorn targets over the hidden patches of the batch."""
    with np.load(REFERENCE / "dinov2_ibot.npz") as file:
        recorded = {key: torch.from_numpy(np.asarray(file[key])) for key in file}
    masks = Masks.of(recorded["masks"])
    targets = sinkhorn(masks.pick(recorded["teacher"]), float(recorded["temp"]))
    torch.testing.assert_close(targets, recorded["targets_of_masked"], rtol=1e-5, atol=1e-7)
    found = IBOTLoss(24)(masks.pick(recorded["student"]), targets, masks)
    torch.testing.assert_close(found, recorded["loss"], rtol=1e-5, atol=0)


def test_targets_and_centre_are_dinos() -> None:
    """The same formulas on other tokens."""
    ours, dino = IBOTLoss(6).double(), DINOLoss(6).double()
    for seed in range(3):
        logits = draw(seed, 9, 6)
        assert torch.equal(ours.targets(logits, 0.05), dino.targets(logits, 0.05))
        ours.update_center(logits)
        dino.update_center(logits[None])
        torch.testing.assert_close(ours.center, dino.center)
    assert set(ours.state_dict()) == {"center"}


def test_no_hidden_patch_at_all() -> None:
    loss, masks = IBOTLoss(4), Masks.of(torch.zeros(2, 6, dtype=torch.bool))
    tokens = torch.randn(2, 6, 4).requires_grad_()
    loss.center.fill_(0.5)
    value = loss(masks.pick(tokens), loss.targets(masks.pick(tokens.detach()), 0.04), masks)
    value.backward()
    loss.update_center(masks.pick(tokens.detach()))
    assert value == 0
    assert tokens.grad is not None
    assert not tokens.grad.any()
    assert bool((loss.center == 0.5).all())


def test_linear_in_the_weights_of_its_terms() -> None:
    loss, masks = IBOTLoss(4).double(), block_masks(3, (4, 4), generator(), probability=1.0)
    size = len(masks.indices)
    terms = loss.terms(draw(0, size, 4), draw(1, size, 4).softmax(-1))
    expected = sum(float(term * weight) for term, weight in zip(terms, masks.weights, strict=True) if weight) / 3
    assert float(loss.mean(terms, masks)) == pytest.approx(expected)
    assert torch.equal(loss.mean(terms, masks, torch.ones(size)), loss.mean(terms, masks))
    one = torch.eye(size, dtype=torch.float64)
    parts = torch.stack([loss.mean(terms, masks, row) for row in one])
    torch.testing.assert_close(parts.sum(), loss.mean(terms, masks))


def test_in_float32_under_autocast() -> None:
    loss, logits = IBOTLoss(4), draw(0, 5, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        targets = loss.targets(logits, 0.04)
        terms = loss.terms(logits, targets)
    assert targets.dtype == terms.dtype == torch.float32
    assert torch.equal(terms, loss.terms(logits.float(), targets))


def test_masks_name_the_hidden_patches() -> None:
    hidden = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    masks = Masks.of(hidden)
    assert masks.indices.tolist() == [0, 2, 7]
    assert masks.weights.tolist() == [0.5, 0.5, 1.0]
    tokens = draw(0, 3, 3, 2)
    assert torch.equal(masks.pick(tokens), tokens[hidden])
    assert all(map(torch.equal, masks.to("cpu"), masks))


def written_out(grid: tuple[int, int], count: int, rng: torch.Generator) -> np.ndarray:
    """BEiT's blockwise masking, patch by patch, from the same uniform numbers."""
    hidden = np.zeros(grid, dtype=bool)
    done = 0
    while done < count:
        limit = min(count - done, 0.5 * grid[0] * grid[1])
        uniforms = torch.rand(10, 4, generator=rng, dtype=torch.float64).numpy()
        delta = 0
        for area, aspect, down, right in uniforms:
            area = 4 + (limit - 4) * area
            aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * aspect)
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < grid[1] and h < grid[0]:
                top, left = math.floor(down * (grid[0] - h + 1)), math.floor(right * (grid[1] - w + 1))
                inside = [(i, j) for i in range(top, top + h) for j in range(left, left + w)]
                fresh = [place for place in inside if not hidden[place]]
                if 0 < len(fresh) <= limit:
                    for place in fresh:
                        hidden[place] = True
                        delta += 1
            if delta:
                break
        if not delta:
            break
        done += delta
    return hidden


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (2, 3), (5, 9), (1, 1)])
def test_block_mask_is_the_published_one(grid: tuple[int, int]) -> None:
    patches = grid[0] * grid[1]
    for seed in range(20):
        count = (seed * patches) // 30
        found = block_mask(grid, count, generator(seed))
        assert np.array_equal(found.numpy(), written_out(grid, count, generator(seed)))
        assert int(found.sum()) <= count


def test_masks_are_mostly_as_large_as_asked() -> None:
    sizes = [int(block_mask((14, 14), 60, generator(seed)).sum()) for seed in range(50)]
    assert min(sizes) >= 40
    assert sum(size >= 55 for size in sizes) > 40


@pytest.mark.parametrize(("images", "probability"), [(64, 1.0), (8, 0.5), (5, 0.5), (3, 1.0), (4, 0.0), (1, 0.5)])
def test_a_batch_of_masks(images: int, probability: float) -> None:
    masks = block_masks(images, (16, 16), generator(), probability)
    shares = masks.hidden.float().mean(1).sort(descending=True).values
    masked = int(images * probability)
    assert int((shares > 0).sum()) == masked
    assert not masked or 0.05 < float(shares[0]) <= 0.5
    ceilings = [0.5 - 0.4 * index / masked for index in range(masked)]  # one image in each part of the range
    assert all(float(share) <= ceiling for share, ceiling in zip(shares[:masked], ceilings, strict=True))
    assert len(masks.indices) == len(masks.weights) == int(masks.hidden.sum())
    per_image = masks.hidden.any(1).sum().float()
    torch.testing.assert_close(masks.weights.sum(), per_image)


def test_masks_follow_from_the_seed_and_every_place_is_hidden_sometimes() -> None:
    first, again, other = (block_masks(64, (6, 6), generator(seed)).hidden for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert bool(torch.cat([first, other]).any(0).all())
    assert bool(first.any(1)[:32].any())  # shuffled: not the first half, not the last
    assert bool(first.any(1)[32:].any())


@pytest.mark.parametrize(("probability", "ratio"), [(1.5, (0.1, 0.5)), (0.5, (0.5, 0.1)), (0.5, (0.1, 1.5))])
def test_bad_shares(probability: float, ratio: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"use shares in 0 … 1"):
        block_masks(2, (4, 4), generator(), probability, ratio)


def test_mask_token() -> None:
    module, hidden = MaskToken(3), torch.tensor([[True, False, False, False], [False, False, False, True]])
    assert not module.token.any()
    with torch.no_grad():
        module.token.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    tokens = torch.randn(2, 4, 3)
    flat = module(tokens, hidden)
    assert torch.equal(flat[~hidden], tokens[~hidden])
    assert flat[0, 0].tolist() == flat[1, 3].tolist() == [1, 2, 3]
    assert torch.equal(module(tokens.view(2, 2, 2, 3), hidden), flat.view(2, 2, 2, 3))
    assert module(tokens.bfloat16(), hidden).dtype == torch.bfloat16


@pytest.mark.parametrize("shared", [True, False])
def test_with_a_backbone_and_a_head(shared: bool) -> None:
    """The pieces as they are put together; what is hidden does not reach the student."""
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    backbone, token = create_backbone("vit_tiny_patch16_224", 32, kwargs), MaskToken(24)
    cls_head = DINOHead(24, 10, 16, 8)
    head = cls_head if shared else DINOHead(24, 10, 16, 8)
    masks = block_masks(4, (4, 4), generator(), probability=1.0)
    hook = backbone.model.patch_embed.register_forward_hook(lambda *call: token(call[2], masks.hidden))
    images = torch.randn(4, 3, 32, 32)
    student = head(masks.pick(backbone(images).patches))
    pixels = masks.hidden.view(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(student, head(masks.pick(backbone(torch.where(pixels, 7.0, images)).patches)))
    hook.remove()
    loss = IBOTLoss(10)
    with torch.no_grad():
        teacher = head(masks.pick(backbone(images).patches))
    loss(student, loss.targets(teacher, 0.04), masks).backward()
    assert token.token.grad is not None
    assert bool(token.token.grad.any())
    assert (cls_head.last_layer.weight.grad is not None) == shared
