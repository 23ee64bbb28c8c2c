"""I-JEPA: predict the features of hidden blocks from a visible one (Assran et al., 2023, arXiv 2301.08243).

The target encoder, the moving average of the student's backbone, sees the whole image; the context encoder (the
student) sees only the patches of a context block; a narrow predictor names the target encoder's features at the
places of each target block. No prototypes, no centre, no class token is trained.

`IJEPA` puts it behind the interface that DINO stands behind. B images, N patches, C of them context, M target blocks
of m patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dino_value.distributed.collectives import total, world_size
from dino_value.distributed.shards import WHOLE, BatchShard
from dino_value.objectives.interface import Hidden, Learner, LossTerms, Mover, Objective, State

AnyHidden = TypeVar("AnyHidden", bound=Hidden)


class Blocks(NamedTuple):
    """Patch numbers, row by row: `context` int64 [B C], `targets` int64 [B M m]."""

    context: Tensor
    targets: Tensor

    def part(self, part: BatchShard) -> Blocks:
        """Those of a part of the images, of which there are two views."""
        return Blocks(*(part.rows(tensor, 2) for tensor in self))

    def to(self, device: torch.device | str) -> Blocks:
        return Blocks(*(tensor.to(device, non_blocking=True) for tensor in self))


def multi_block(
    images: int,
    grid: tuple[int, int],
    generator: torch.Generator,
    targets: int = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    least: int = 5,
    tries: int = 20,
) -> Blocks:
    """Draw context and target blocks for a batch (section 3 and appendix A.1).

    The batch shares the blocks' sizes, each image has its own places. The context is a square block without the
    patches of the targets, cut to the batch's smallest (its last patches go) so that it is one tensor. Every place is
    equally likely; the published code never reaches the last row and column, and ties the aspect to the scale.

    Args:
        grid: patches (h, w).
        generator: on the CPU; the blocks follow from its state alone.
        target_scale: area as a share of the grid, from … to.
        target_aspect: height over width, from … to.
        least: patches that a context must have; the targets move until it does.

    Raises:
        ValueError: no such context in `tries` draws.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    def size(scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
        area, ratio = uniform(*scale) * grid[0] * grid[1], uniform(*aspect)
        return _side(math.sqrt(area * ratio), grid[0]), _side(math.sqrt(area / ratio), grid[1])

    def place(height: int, width: int) -> Tensor:
        block = torch.zeros(grid, dtype=torch.bool)
        top = int(uniform(0, grid[0] - height + 1))
        left = int(uniform(0, grid[1] - width + 1))
        block[top : top + height, left : left + width] = True
        return block

    target_size, context_size = size(target_scale, target_aspect), size(context_scale, (1.0, 1.0))
    contexts: list[Tensor] = []
    predicted: list[Tensor] = []
    for _ in range(images):
        for _ in range(tries):
            blocks = torch.stack([place(*target_size) for _ in range(targets)])
            context = place(*context_size) & ~blocks.any(0)
            if int(context.sum()) >= least:
                break
        else:
            raise ValueError(
                f"I-JEPA: {targets} targets of {target_size[0]} × {target_size[1]} patches leave no context of {least} "
                f"on a grid of {grid[0]} × {grid[1]}; use larger images, smaller patches, or fewer or smaller targets"
            )
        contexts.append(context.flatten().nonzero().flatten())
        predicted.append(blocks.flatten(1).nonzero()[:, 1].view(targets, -1))
    shortest = min(map(len, contexts))
    return Blocks(torch.stack([context[:shortest] for context in contexts]), torch.stack(predicted))


def _side(length: float, limit: int) -> int:
    return min(max(round(length), 1), limit)


def select(hidden: AnyHidden, patches: Tensor, prefix: int) -> AnyHidden:
    """The state with only some patches: `patches` int64 [B C]; the first `prefix` tokens (class, registers) stay.

    A rotary table follows its tokens and gains a batch dimension.
    """
    tokens = hidden.tokens
    chosen = tokens[:, prefix:].gather(1, patches[..., None].expand(-1, -1, tokens.shape[-1]))
    rope = hidden.rope
    if rope is not None:
        # [N r] to [B 1 C r]; with a table for each block and attention head, [L h N r] to [L B h C r].
        rope = rope[..., patches, :]
        rope = rope.unsqueeze(1) if rope.ndim == 3 else rope.transpose(1, 2)
    return hidden._replace(tokens=torch.cat([tokens[:, :prefix], chosen], 1), rope=rope)


class PredictorSizes(NamedTuple):
    """The paper's for ViT-B: its heads are the backbone's in the published code, fewer here."""

    width: int = 384
    depth: int = 6
    num_heads: int = 6


class Predictor(nn.Module):
    """A narrow ViT from the context's features to those of each target block (section 3, "Prediction").

    Each block is predicted on its own, from the context and m tokens that hold nothing but their place.
    """

    def __init__(self, dim: int, width: int = 384, depth: int = 6, num_heads: int = 6) -> None:
        super().__init__()
        if width % 4 or width % num_heads:
            raise ValueError(f"predictor width {width}: use a multiple of 4 and of its {num_heads} attention heads")
        self.embed = nn.Linear(dim, width)
        self.token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, num_heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, dim)
        nn.init.trunc_normal_(self.token, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        for index, block in enumerate(self.blocks, 1):  # the residual branches of deeper blocks start smaller
            for name in ("attn.proj", "mlp.fc2"):
                block.get_parameter(f"{name}.weight").data.div_(math.sqrt(2 * index))

    def forward(self, context: Tensor, blocks: Blocks, grid: tuple[int, int]) -> Tensor:
        """Context features [B C D] -> predictions [B M m D]."""
        batch, count, size = blocks.targets.shape
        width = self.token.shape[-1]
        places = build_sincos2d_pos_embed(list(grid), width, interleave_sin_cos=True, device=context.device)
        tokens = self.embed(context)
        places = places.to(tokens.dtype)
        tokens = (tokens + places[blocks.context]).repeat_interleave(count, 0)
        asked = self.token.to(tokens.dtype) + places[blocks.targets].flatten(0, 1)
        tokens = torch.cat([tokens, asked], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.out(self.norm(tokens[:, -size:])).unflatten(0, (batch, count))


class IJEPALoss(nn.Module):
    """Smooth ℓ1 to the target encoder's normalised features; its terms are target blocks.

    The paper's ℓ2 distance is the published code's smooth ℓ1, which is what is taken here.
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def targets(self, patches: Tensor, blocks: Blocks) -> Tensor:
        """Target encoder's normed patches [B N D] to [B M m D], each of mean 0 and variance 1 over D."""
        patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
        images = torch.arange(len(patches), device=patches.device)[:, None, None]
        return F.layer_norm(patches, patches.shape[-1:])[images, blocks.targets]

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Predictions and targets [B M m D] to one loss a block [B M]."""
        with torch.autocast(outputs.device.type, enabled=False):
            return F.smooth_l1_loss(outputs.to(targets.dtype), targets, reduction="none", beta=self.beta).mean((-2, -1))

    def mean(self, terms: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of terms [B M], each times its weight, if any."""
        return (terms if weights is None else terms * weights).mean()

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.mean(self.terms(outputs, targets))


class IJEPA(IJEPALoss, Objective):
    """I-JEPA as an `Objective`: every global view is an image of its own, local views have no place in it.

    A soft mask designer acts on the pixels of the views, so φ decides what can be seen of the patches that the drawn
    context leaves. The student is cut after the choice of patches: only the context's C tokens enter its blocks.

    Args:
        predictor: width, depth and attention heads.
        blocks: settings of `multi_block`.
    """

    def __init__(self, predictor: PredictorSizes, blocks: Mapping[str, Any] | None = None, beta: float = 1.0) -> None:
        super().__init__(beta)
        self.center = None
        self.predictor, self.blocks = predictor, dict(blocks or {})

    def heads(self, dim: int) -> dict[str, nn.Module]:
        return {"head": Predictor(dim, *self.predictor)}

    def begin(self, step: int, teacher: Learner) -> None:
        pass

    def draw(self, large: Tensor, patch_size: int, generator: torch.Generator, part: BatchShard = WHOLE) -> Blocks:
        grid = (large.shape[-2] // patch_size, large.shape[-1] // patch_size)
        return multi_block(len(large) * part.world, grid, generator, **self.blocks).part(part).to(large.device)

    def cut(self, targets: LossTerms, draw: Blocks, part: BatchShard) -> tuple[LossTerms, Blocks]:
        return {"ijepa": part.rows(targets["ijepa"], 2)}, draw.part(part)

    def teach(self, teacher: Learner, large: Tensor, temperature: float, draw: Blocks) -> tuple[LossTerms, LossTerms]:
        """Targets `ijepa` [2B M m D]; there are no prototypes, so no temperature and no logits."""
        return {"ijepa": self.targets(teacher.backbone(large).patches, draw)}, {}

    def states(self, student: Learner, views: Sequence[Tensor], start: int | None, draw: Blocks) -> list[State]:
        large, _ = views
        return [large] if start is None else [student.backbone(_context(student, large, draw), stop=start)]

    def predict(self, student: Learner, states: Sequence[State], start: int | None, draw: Blocks) -> LossTerms:
        """Predicted features `ijepa` [2B M m D]."""
        (state,) = states
        if isinstance(state, Tensor):
            state = _context(student, state, draw)
        features = student.backbone(state, start=start or 0)
        return {"ijepa": student.head(features.patches, draw, features.grid)}

    def terms_of(self, predictions: LossTerms, targets: LossTerms) -> LossTerms:
        """Terms `ijepa` [2B M]."""
        return {"ijepa": self.terms(predictions["ijepa"], targets["ijepa"])}

    def move(self, targets: LossTerms, here: LossTerms, there: LossTerms, mover: Mover) -> LossTerms:
        """Each hidden patch's target [D] by how its prediction changes."""
        y = targets["ijepa"]
        before, after = (part["ijepa"].to(y.dtype) for part in (here, there))

        def slope(target: Tensor) -> Tensor:
            """−∂ℓ/∂f of smooth ℓ1, a mean over D."""
            return ((target - before) / self.beta).clamp(-1, 1) / y.shape[-1]

        return {"ijepa": mover.point("ijepa", y, after - before, slope)}

    def weighable(self, terms: LossTerms) -> dict[str, Tensor | None]:
        return {"ijepa": None}

    def parts(
        self, terms: LossTerms, draw: Blocks, weights: LossTerms | None = None, views: int | None = None
    ) -> LossTerms:
        return {"ijepa": self.mean(terms["ijepa"], None if weights is None else weights["ijepa"])}

    def total(self, parts: LossTerms) -> Tensor:
        return parts["ijepa"]

    def update(self, logits: LossTerms) -> None:
        pass

    def watch(self, targets: LossTerms) -> LossTerms:
        """The targets' standard deviation over the batch: near 1, and 0 where all patches have become one."""
        rows = targets["ijepa"].flatten(0, -2)
        if world_size() == 1:
            return {"target_spread": rows.std(0).mean()}
        count = len(rows) * world_size()
        centred = rows - total(rows.sum(0)) / count
        return {"target_spread": (total(centred.square().sum(0)) / (count - 1)).sqrt().mean()}


def _context(student: Learner, images: Tensor, blocks: Blocks) -> Any:
    return select(student.backbone(images, stop=0), blocks.context, student.backbone.num_prefix_tokens)
