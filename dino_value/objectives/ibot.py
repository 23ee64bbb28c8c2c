"""iBOT: the student names the teacher's prototypes for patches that it does not see (Zhou et al., 2021,
arXiv 2111.07832), with the block masks and the averaging of DINOv2 (arXiv 2304.07193).

The teacher sees the whole view, the student the view with masked patches replaced by a learned token; both heads run
on the masked patches only. The head may be the class token's own `DINOHead` or another one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_value.distributed.collectives import total
from dino_value.distributed.shards import BatchShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Masks(NamedTuple):
    """Which patches of n images with N patches are hidden, m in all.

    `hidden` bool [n N]; `indices` int64 [m] into n·N; `weights` float [m], one over the image's hidden patches.
    Made on the CPU, where counting m does not wait for a device.
    """

    hidden: Tensor
    indices: Tensor
    weights: Tensor

    @classmethod
    def of(cls, hidden: Tensor) -> Masks:
        """From bool [n N]."""
        share = 1 / hidden.sum(-1, keepdim=True).clamp_min(1)
        return cls(hidden, hidden.flatten().nonzero().flatten(), share.expand_as(hidden)[hidden])

    @classmethod
    def all(cls, images: int, patches: int) -> Masks:
        """Every patch is asked for, and none is hidden: to look at them."""
        hidden = torch.zeros(images, patches, dtype=torch.bool)
        return cls(hidden, torch.arange(hidden.numel()), torch.full((hidden.numel(),), 1 / patches))

    def to(self, device: torch.device | str) -> Masks:
        return Masks(*(tensor.to(device, non_blocking=True) for tensor in self))

    def part(self, part: BatchShard) -> tuple[Masks, Tensor]:
        """Those of a part of the images, of which there are two views; and which of the m patches they are, bool."""
        images = torch.arange(len(self.hidden), device=self.hidden.device)
        own = torch.zeros_like(images, dtype=torch.bool).index_fill_(0, part.rows(images, 2), True)
        return Masks.of(part.rows(self.hidden, 2)), own[self.indices // self.hidden.shape[1]]

    def pick(self, tokens: Tensor) -> Tensor:
        """The hidden ones [m D] of patch tokens [n N D]."""
        return tokens.flatten(0, 1).index_select(0, self.indices)


def block_masks(
    images: int,
    grid: tuple[int, int],
    generator: torch.Generator,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> Masks:
    """Masks of a batch of global crops: DINOv2's draw.

    A share `probability` of the images is masked; their target ratios fall one each into equal parts of `ratio`, and
    which image gets which is shuffled.

    Args:
        grid: patches (h, w).
        generator: on the CPU; the masks follow from its state alone.
        ratio: of hidden to all patches, from … to.

    Raises:
        ValueError: a share outside 0 … 1.
    """
    low, high = ratio
    if not (0 <= probability <= 1 and 0 <= low <= high <= 1):
        raise ValueError(f"block masks: probability={probability}, ratio={ratio}: use shares in 0 … 1, the lower first")
    rows, columns = grid
    hidden = torch.zeros(images, rows, columns, dtype=torch.bool)
    masked = int(images * probability)
    for index, uniform in enumerate(torch.rand(masked, generator=generator).tolist()):
        part = low + (high - low) * (index + uniform) / masked
        hidden[index] = block_mask(grid, int(rows * columns * part), generator)
    return Masks.of(hidden[torch.randperm(images, generator=generator)].flatten(1))


def block_mask(
    grid: tuple[int, int],
    count: int,
    generator: torch.Generator,
    smallest: int = 4,
    largest: float = 0.5,
    aspect: float = 0.3,
) -> Tensor:
    """bool [h w]: about `count` hidden patches, in rectangles added until there are enough (BEiT, arXiv 2106.08254).

    Never more than `count`; fewer where ten rectangles in a row did not fit.

    Args:
        smallest: patches of a rectangle.
        largest: its patches as a share of the grid.
        aspect: its sides' ratio lies in aspect … 1/aspect, uniform in the logarithm.
    """
    rows, columns = grid
    hidden = torch.zeros(grid, dtype=torch.bool)
    done = 0
    while done < count:
        room = min(count - done, largest * rows * columns)
        for area, shape, top, left in torch.rand(10, 4, generator=generator, dtype=torch.float64).tolist():
            area = smallest + (room - smallest) * area
            sides = math.exp((2 * shape - 1) * -math.log(aspect))
            height, width = round(math.sqrt(area * sides)), round(math.sqrt(area / sides))
            if height >= rows or width >= columns:
                continue
            first, second = int(top * (rows - height + 1)), int(left * (columns - width + 1))
            block = hidden[first : first + height, second : second + width]
            new = block.numel() - int(block.sum())
            if 0 < new <= room:
                block.fill_(True)
                done += new
                break
        else:
            break
    return hidden


class MaskToken(nn.Module):
    """The learned token in place of hidden patches, put there before the position embedding; zero at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, dim))

    def forward(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Embedded patches [n N D] or [n h w D], and which are hidden [n N]."""
        return torch.where(hidden.view(*tokens.shape[:-1], 1), self.token.to(tokens.dtype), tokens)


class IBOTLoss(nn.Module):
    """Cross-entropy of the student to the centred, sharpened teacher at the hidden patches (iBOT, eq. 2).

    The mean over an image's hidden patches, then over all images, those without any counted as 0.
    """

    center: Tensor

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def targets(self, teacher_logits: Tensor, temperature: float) -> Tensor:
        """Logits [m K] to probabilities [m K], with the centre of the steps before; or use `sinkhorn` in its place."""
        return F.softmax((teacher_logits.to(self.center.dtype) - self.center) / temperature, dim=-1)

    def log_probabilities(self, student_logits: Tensor) -> Tensor:
        """What the student says of hidden patches, [m K] to [m K], in full precision."""
        with torch.autocast(student_logits.device.type, enabled=False):
            return F.log_softmax(student_logits.to(self.center.dtype) / self.student_temp, dim=-1)

    def terms(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        """One cross-entropy for each hidden patch: [m K] and [m K] to [m]."""
        return self.cross_entropy(self.log_probabilities(student_logits), targets)

    @staticmethod
    def cross_entropy(log_probabilities: Tensor, targets: Tensor) -> Tensor:
        """The terms [m] of log-probabilities and targets [m K]."""
        return -(targets * log_probabilities).sum(-1)

    def mean(self, terms: Tensor, masks: Masks, weights: Tensor | None = None) -> Tensor:
        """The loss of terms [m], each times its weight [m], if any; 0 where no patch is hidden."""
        weighted = terms if weights is None else terms * weights
        return (weighted * masks.weights.to(terms.dtype)).sum() / len(masks.hidden)

    def forward(self, student_logits: Tensor, targets: Tensor, masks: Masks) -> Tensor:
        """Student logits [m K] and targets [m K] to a scalar."""
        return self.mean(self.terms(student_logits, targets), masks)

    @torch.no_grad()
    def update_center(self, teacher_logits: Tensor, group: ProcessGroup | None = None) -> None:
        """EMA of the mean teacher logits [m K] over the processes of `group`; unmoved where no patch is hidden."""
        logits = teacher_logits.to(self.center.dtype)
        count = total(self.center.new_tensor(float(len(logits))), group)
        mean = total(logits.sum(0, keepdim=True), group) / count.clamp_min(1)
        mean = torch.where(mean.isfinite(), mean, self.center)  # a step that is skipped must not spoil those after it
        self.center.lerp_(mean, (1 - self.center_momentum) * (count > 0).to(self.center.dtype))
