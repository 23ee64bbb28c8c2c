"""I-JEPA: blocks, choice of patches, predictor and loss written out. In training: test_objectives_in_training.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_value.models.backbone import Backbone, Hidden, create_backbone
from dino_value.models.learner import Learner
from dino_value.objectives.dino import DINOLoss
from dino_value.objectives.ijepa import (
    IJEPA,
    Blocks,
    IJEPALoss,
    Predictor,
    PredictorSizes,
    multi_block,
    select,
)

KWARGS = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
ROTARY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


OBJECTIVE = IJEPA(PredictorSizes(width=16, depth=2, num_heads=2))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def sharpened(backbone: Backbone) -> Backbone:
    """With attention that is far from uniform, as it is at first: places then matter."""
    with torch.no_grad():
        for name, value in backbone.named_parameters():
            if "attn" in name and value.ndim == 2:
                value.mul_(30)
    return backbone.eval()


def some_blocks() -> Blocks:
    """Two images, a grid of 4 × 4, five context patches and two targets of two."""
    return Blocks(
        torch.tensor([[0, 1, 4, 5, 15], [3, 6, 9, 12, 13]]),
        torch.tensor([[[2, 3], [10, 11]], [[0, 4], [1, 5]]]),
    )


@pytest.fixture
def learner() -> Learner:
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", 32, KWARGS)
    return Learner(backbone, **OBJECTIVE.heads(24))


@pytest.fixture
def targets() -> dict[str, Tensor]:
    """Of some images and blocks."""
    torch.manual_seed(1)
    backbone = create_backbone("vit_tiny_patch16_224", 32, KWARGS).requires_grad_(False)
    found, logits = OBJECTIVE.teach(Learner(backbone, torch.nn.Identity()), draw(0, 2, 3, 32, 32), 0.04, some_blocks())
    assert logits == {}
    return found


@pytest.mark.parametrize("grid", [(14, 14), (8, 12), (4, 4)])
@pytest.mark.parametrize("images", [1, 5])
def test_blocks_are_rectangles_and_the_context_keeps_off_them(images: int, grid: tuple[int, int]) -> None:
    rows, columns = grid
    for seed in range(10):
        blocks = multi_block(images, grid, generator(seed))
        assert blocks.context.shape[0] == blocks.targets.shape[0] == images
        assert blocks.targets.shape[1] == 4
        assert blocks.context.shape[1] >= 5
        sizes = set()
        for context, targets in zip(blocks.context, blocks.targets, strict=True):
            assert not set(context.tolist()) & set(targets.flatten().tolist())
            assert context.tolist() == sorted(set(context.tolist()))
            for target in targets:
                down, right = target // columns, target % columns
                height, width = (int(axis.max() - axis.min()) + 1 for axis in (down, right))
                assert height * width == len(set(target.tolist())) == len(target)
                assert int(down.max()) < rows
                sizes.add((height, width))
        assert len(sizes) == 1  # of the batch
        ((height, width),) = sizes
        if grid == (14, 14):  # 29.4 … 39.2 patches, before rounding the sides
            assert 24 <= height * width <= 46
            assert 0.6 < height / width < 1.8


def test_blocks_cover_the_scales_and_every_place() -> None:
    drawn = [multi_block(4, (14, 14), generator(seed)) for seed in range(100)]
    sizes = [blocks.targets.shape[2] for blocks in drawn]
    assert min(sizes) < 31
    assert max(sizes) > 37
    assert set(torch.cat([blocks.targets.flatten() for blocks in drawn]).tolist()) == set(range(196))
    assert set(torch.cat([blocks.context.flatten() for blocks in drawn]).tolist()) == set(range(196))


def test_blocks_follow_from_the_seed() -> None:
    first, again, other = (multi_block(3, (14, 14), generator(seed)) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert first.targets.shape != other.targets.shape or not torch.equal(first.targets, other.targets)
    assert all(map(torch.equal, first.to("cpu"), first))


def test_no_room_for_a_context() -> None:
    with pytest.raises(ValueError, match=r"leave no context of 5 on a grid of 2 × 2; use larger images"):
        multi_block(1, (2, 2), generator())


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", KWARGS),
        ("vit_small_patch14_reg4_dinov2", {**KWARGS, "init_values": 1e-5}),
        ("vit_small_patch16_dinov3", ROTARY),
        ("vit_small_patch16_rope_mixed_224", ROTARY),
    ],
)
def test_a_batch_of_selections_is_each_image_on_its_own(name: str, kwargs: dict[str, Any]) -> None:
    """Class token, registers and both kinds of rotary table; ours have a batch dimension, those of one image none."""
    torch.manual_seed(0)
    backbone = sharpened(create_backbone(name, 32, kwargs))
    prefix, images, patches = backbone.num_prefix_tokens, draw(0, 2, 3, 32, 32), some_blocks().context
    found = backbone(select(backbone(images, stop=0), patches, prefix), start=0)
    assert found.patches.shape == (2, 5, 24)
    for index in range(2):
        whole = backbone(images[index : index + 1], stop=0)
        kept = [*range(prefix), *(patches[index] + prefix).tolist()]
        rope = None if whole.rope is None else whole.rope[..., patches[index], :]
        alone = backbone(Hidden(whole.tokens[:, kept], rope, whole.grid), start=0)
        torch.testing.assert_close(found.patches[index], alone.patches[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.cls[index], alone.cls[0], rtol=1e-4, atol=1e-4)


def test_all_patches_in_another_order_are_the_same_features() -> None:
    """So the rotary table goes with its token."""
    torch.manual_seed(0)
    backbone = sharpened(create_backbone("vit_small_patch16_dinov3", 32, ROTARY))
    images = draw(0, 2, 3, 32, 32)
    order = torch.stack([torch.randperm(16, generator=generator(seed)) for seed in range(2)])
    found = backbone(select(backbone(images, stop=0), order, backbone.num_prefix_tokens), start=0)
    expected = torch.stack([patches[row] for patches, row in zip(backbone(images).patches, order, strict=True)])
    torch.testing.assert_close(found.patches, expected, rtol=1e-4, atol=1e-4)


def test_the_student_sees_its_context_only(learner: Learner, targets: dict[str, Tensor]) -> None:
    blocks, images = some_blocks(), draw(0, 2, 3, 32, 32)

    def terms(images: Tensor) -> Tensor:
        return OBJECTIVE.losses(learner, [images], targets, None, blocks)["ijepa"]

    seen = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, blocks.context, True).view(2, 1, 4, 4)
    pixels = seen.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(terms(images), terms(images.where(pixels, images + 9)))
    assert not torch.allclose(terms(images), terms(images.where(~pixels, images + 9)))


@pytest.mark.parametrize("start", [0, 1, 3])
def test_cut_and_continued_is_the_whole(learner: Learner, targets: dict[str, Tensor], start: int) -> None:
    blocks, images = some_blocks(), draw(0, 2, 3, 32, 32)
    states = OBJECTIVE.states(learner, (images, images[:0]), start, blocks)
    assert states[0].tokens.shape == (2, 1 + 5, 24)
    cut = OBJECTIVE.losses(learner, states, targets, start, blocks)
    whole = OBJECTIVE.losses(learner, [images], targets, None, blocks)
    torch.testing.assert_close(cut, whole)


def test_the_predictor_one_block_at_a_time() -> None:
    """Each target block alone with the context; sine places of row and column; only its own tokens are read."""
    torch.manual_seed(0)
    predictor, blocks, grid = Predictor(10, width=8, depth=2, num_heads=2), some_blocks(), (4, 4)
    context = draw(0, 2, 5, 10)
    found = predictor(context, blocks, grid)
    assert found.shape == (2, 2, 2, 10)

    def place(patch: int) -> Tensor:
        row, column = divmod(patch, grid[1])
        waves = [torch.tensor([1.0, 0.01]) * axis for axis in (row, column)]  # 10000^(−i/2), i = 0, 1
        return torch.cat([part for wave in waves for part in (wave.sin(), wave.cos())])

    for image in range(2):
        for number in range(2):
            tokens = [
                predictor.embed(features) + place(int(patch))
                for features, patch in zip(context[image], blocks.context[image], strict=True)
            ]
            tokens += [predictor.token + place(int(patch)) for patch in blocks.targets[image, number]]
            sequence = torch.stack(tokens)[None]
            for block in predictor.blocks:
                sequence = block(sequence)
            expected = predictor.out(predictor.norm(sequence))[0, 5:]
            torch.testing.assert_close(found[image, number], expected, rtol=1e-5, atol=1e-6)


def test_deeper_residual_branches_start_smaller() -> None:
    torch.manual_seed(0)
    predictor = Predictor(32, width=64, depth=8, num_heads=2)
    for index, block in enumerate(predictor.blocks, 1):
        assert float(block.mlp.fc2.weight.detach().std()) == pytest.approx(0.02 / (2 * index) ** 0.5, rel=0.1)
        assert float(block.mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("width", "heads"), [(10, 2), (16, 3)])
def test_a_width_that_does_not_divide(width: int, heads: int) -> None:
    with pytest.raises(ValueError, match="use a multiple of 4"):
        Predictor(24, width, 1, heads)


def test_targets_and_loss_entry_by_entry() -> None:
    blocks, loss = some_blocks(), IJEPALoss(beta=0.7)
    patches = 3 + 2 * draw(0, 2, 16, 6).double()
    outputs = draw(1, 2, 2, 2, 6).double().requires_grad_()
    targets = loss.targets(patches, blocks)
    total = torch.zeros((), dtype=torch.float64)
    for image in range(2):
        for block in range(2):
            for token in range(2):
                feature = patches[image, blocks.targets[image, block, token]]
                centred = feature - feature.sum() / 6
                wanted = centred / (centred.square().sum() / 6 + 1e-5).sqrt()
                torch.testing.assert_close(targets[image, block, token], wanted)
                for entry in range(6):
                    error = (outputs[image, block, token, entry] - wanted[entry]).abs()
                    total = total + (error.square() / 1.4 if float(error.detach()) < 0.7 else error - 0.35)
    found = loss(outputs, targets)
    torch.testing.assert_close(found, total / 48)
    gradients = [torch.autograd.grad(value, outputs)[0] for value in (found, total / 48)]
    torch.testing.assert_close(*gradients)


def test_in_float32_under_autocast() -> None:
    blocks, loss = some_blocks(), IJEPALoss()
    patches, outputs = draw(0, 2, 16, 6).bfloat16(), draw(1, 2, 2, 2, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        targets = loss.targets(patches, blocks)
        value = loss(outputs, targets)
    assert targets.dtype == value.dtype == torch.float32
    assert torch.equal(value, loss(outputs.float(), loss.targets(patches.float(), blocks)))


def linear(objective: Any, outputs: Tensor, targets: Tensor) -> None:
    """The loss is linear in the weights of its terms."""
    terms = objective.terms(outputs, targets)
    plain = objective.mean(terms)
    torch.testing.assert_close(objective.mean(terms, torch.ones_like(terms)), plain)
    first, second = torch.rand_like(terms), torch.rand_like(terms)
    both = objective.mean(terms, first + 2 * second)
    torch.testing.assert_close(both, objective.mean(terms, first) + 2 * objective.mean(terms, second))


def test_both_objectives_keep_the_promise() -> None:
    linear(IJEPALoss(), draw(0, 2, 3, 4, 5), draw(1, 2, 3, 4, 5))
    linear(DINOLoss(5), draw(0, 4, 3, 5), draw(1, 2, 3, 5).softmax(-1))


def test_it_learns(learner: Learner, targets: dict[str, Tensor]) -> None:
    blocks, images = some_blocks(), draw(0, 2, 3, 32, 32)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        terms = OBJECTIVE.losses(
            learner, OBJECTIVE.states(learner, (images, images[:0]), 0, blocks), targets, 0, blocks
        )
        value = OBJECTIVE.total(OBJECTIVE.parts(terms, blocks))
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    wanted = targets["ijepa"]
    constant = F.smooth_l1_loss(torch.zeros_like(wanted), wanted)  # what predicting nothing costs
    assert values[-1] < 0.6 * float(constant) < values[0]
