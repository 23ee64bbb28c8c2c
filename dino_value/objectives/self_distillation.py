"""The objective of DINO, and with its options of DINOv2 (arXiv 2304.07193) and DINOv3 (arXiv 2508.10104).

    L = dino + ibot · (patches that the student does not see) + koleo · (spread of class tokens) + gram · (patch
        similarities of an earlier teacher)

DINOv2 is Sinkhorn-Knopp centring, ibot 1 and koleo 0.1; DINOv3 adds a head of its own for patches and, late, the Gram
term. All of them but the cross-entropy of local views are about the global views, where a designer's masks act.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino_value.distributed.collectives import in_one_piece, mean
from dino_value.distributed.shards import WHOLE, BatchShard
from dino_value.objectives.dino import DINOHead, DINOLoss
from dino_value.objectives.gram import gram_loss
from dino_value.objectives.ibot import IBOTLoss, Masks, MaskToken, block_masks
from dino_value.objectives.interface import Learner, LossTerms, Mover, Objective, State
from dino_value.objectives.koleo import koleo
from dino_value.objectives.sinkhorn import sinkhorn


class HeadSizes(NamedTuple):
    """Of `DINOHead`."""

    out_dim: int
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    batch_norm: bool = False


class IBOT(NamedTuple):
    """The patch loss; see `block_masks`."""

    weight: float = 0.0
    mask_probability: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    separate_head: bool = False


class Gram(NamedTuple):
    """The Gram term: from step `start` on, with the teacher of that step, renewed every `refresh` steps."""

    weight: float = 0.0
    start: int = 0
    refresh: int = 10_000
    level: str = "image"
    negatives: str = "keep"
    normalise: bool = True


class SelfDistillation(DINOLoss, Objective):
    """DINO's loss and centre, and what its successors add; an `Objective`.

    Args:
        student_temp: of iBOT's patches too, as the centre's momentum.
        sinkhorn_iterations: Sinkhorn-Knopp in place of the centres, this many times; 0: the centres.
        koleo_weight: of the sum over the two global views (the published code's; each view's images on their own, but
            those of all processes together).
        backbone: of the learner: its architecture is the Gram teacher's.
    """

    center: Tensor

    def __init__(
        self,
        sizes: HeadSizes,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        sinkhorn_iterations: int = 0,
        koleo_weight: float = 0.0,
        ibot: IBOT = IBOT(),  # noqa: B008 (immutable)
        gram: Gram = Gram(),  # noqa: B008
        backbone: nn.Module | None = None,
    ) -> None:
        super().__init__(sizes.out_dim, student_temp, center_momentum)
        self.sizes, self.sinkhorn_iterations = sizes, sinkhorn_iterations
        self.koleo_weight, self.ibot_settings, self.gram_settings = koleo_weight, ibot, gram
        self.ibot = IBOTLoss(sizes.out_dim, student_temp, center_momentum) if ibot.weight else None
        self.gram_teacher: Any = None
        if gram.weight:
            if backbone is None:
                raise ValueError("Gram anchoring needs the learner's backbone, to copy teachers into: give backbone=")
            self.gram_teacher = copy.deepcopy(backbone).requires_grad_(False).eval()
        self._anchored = False

    def heads(self, dim: int) -> dict[str, nn.Module]:
        heads: dict[str, nn.Module] = {"head": DINOHead(dim, *self.sizes)}
        if self.ibot is not None:
            heads["mask_token"] = MaskToken(dim)
            if self.ibot_settings.separate_head:
                heads["patch_head"] = DINOHead(dim, *self.sizes)
        return heads

    def begin(self, step: int, teacher: Learner) -> None:
        if self.gram_teacher is None:
            return
        since = step - self.gram_settings.start
        self._anchored = since >= 0
        if self._anchored and since % self.gram_settings.refresh == 0:
            self.gram_teacher.load_state_dict(in_one_piece(teacher.backbone.state_dict()))

    def draw(
        self, large: Tensor, patch_size: int, generator: torch.Generator, part: BatchShard = WHOLE
    ) -> Masks | None:
        if self.ibot is None:
            return None
        grid = (large.shape[-2] // patch_size, large.shape[-1] // patch_size)
        _, probability, ratio, _ = self.ibot_settings
        masks = block_masks(len(large) * part.world, grid, generator, probability, ratio)
        return (masks if part == WHOLE else masks.part(part)[0]).to(large.device)

    def cut(self, targets: LossTerms, draw: Masks | None, part: BatchShard) -> tuple[LossTerms, Masks | None]:
        own = {"dino": targets["dino"][:, part.of(targets["dino"].shape[1])]}
        if draw is not None:
            draw, chosen = draw.part(part)
            own["ibot"] = targets["ibot"][chosen]
        if "gram" in targets:
            own["gram"] = part.rows(targets["gram"], 2)
        return own, draw

    def teach(
        self, teacher: Learner, large: Tensor, temperature: float, draw: Masks | None
    ) -> tuple[LossTerms, LossTerms]:
        """Targets `dino` [2 B K], `ibot` [m K], and `gram` [2B N D], which never has a graph."""
        features = teacher.backbone(large) if self.ibot is not None else None
        cls = teacher.backbone(large, cls_only=True) if features is None else features.cls
        logits = {"dino": teacher.head(cls).unflatten(0, (2, -1))}
        targets = {"dino": self._sharpen(self, logits["dino"], temperature)}
        if self.ibot is not None:
            assert draw is not None
            assert features is not None
            logits["ibot"] = (teacher.patch_head or teacher.head)(draw.pick(features.patches))
            targets["ibot"] = self._sharpen(self.ibot, logits["ibot"], temperature)
        if self._anchored:
            with torch.no_grad():
                targets["gram"] = self.gram_teacher(large).patches
        return targets, logits

    def _sharpen(self, loss: DINOLoss | IBOTLoss, logits: Tensor, temperature: float) -> Tensor:
        if self.sinkhorn_iterations:
            return sinkhorn(logits, temperature, self.sinkhorn_iterations)
        return loss.targets(logits, temperature)

    def states(self, student: Learner, views: Sequence[Tensor], start: int | None, draw: Masks | None) -> list[State]:
        groups: list[State] = [group for group in views if len(group)]
        return groups if start is None else student.backbone(self._entered(student, groups, draw), stop=start)

    def _entered(self, student: Learner, states: Sequence[State], draw: Masks | None) -> list[State]:
        """Global views, if they are views still, embedded without the patches that iBOT hides."""
        large, *small = states
        if draw is not None and isinstance(large, Tensor):
            assert student.mask_token is not None
            hide = functools.partial(student.mask_token, hidden=draw.hidden)
            large = student.backbone(large, stop=0, replace=hide)
        return [large, *small]

    def predict(self, student: Learner, states: Sequence[State], start: int | None, draw: Masks | None) -> LossTerms:
        """Log-probabilities `dino` [V B K] and `ibot` [m K]; class tokens `koleo` [2B D] and patches `gram` [2B N D] of
        the global views."""
        entered, start = self._entered(student, states, draw), start or 0
        if self.ibot is None and not self._anchored:  # only class tokens are read
            cls, patches = student.backbone(entered, start=start, cls_only=True), torch.empty(0)
        else:
            seen = student.backbone(entered, start=start)
            cls, patches = [features.cls for features in seen], seen[0].patches
        found = {"dino": self._named(student, cls, len(cls[0]) // 2)}
        if self.ibot is not None:
            assert draw is not None
            found["ibot"] = self.ibot.log_probabilities((student.patch_head or student.head)(draw.pick(patches)))
        if self.koleo_weight:
            found["koleo"] = cls[0]
        if self._anchored:
            found["gram"] = patches
        return found

    def terms_of(self, predictions: LossTerms, targets: LossTerms) -> LossTerms:
        """Terms `dino` [2 V B], `ibot` [m], `koleo` [2], `gram` []."""
        terms = {"dino": self.cross_entropy(predictions["dino"], targets["dino"])}
        if self.ibot is not None:
            terms["ibot"] = self.ibot.cross_entropy(predictions["ibot"], targets["ibot"])
        if self.koleo_weight:
            terms["koleo"] = torch.stack([koleo(part) for part in predictions["koleo"].chunk(2)])
        if "gram" in targets:
            g = self.gram_settings
            terms["gram"] = gram_loss(predictions["gram"], targets["gram"], g.level, g.negatives, g.normalise)
        return terms

    def move(self, targets: LossTerms, here: LossTerms, there: LossTerms, mover: Mover) -> LossTerms:
        """`dino` [2 B K] to a target for each pair of views [2 V B K], by the student's view; `ibot` [m K] by patch."""
        moved = dict(targets)
        change = (there["dino"] - here["dino"])[None]  # [1 V B K]
        pairs = self.pairs(change[..., 0].expand(2, -1, -1))
        moved["dino"] = mover.distribution("dino", targets["dino"][:, None], change, pairs)
        if self.ibot is not None:
            moved["ibot"] = mover.distribution("ibot", targets["ibot"], there["ibot"] - here["ibot"])
        return moved

    def local_terms(self, student: Learner, state: State, targets: LossTerms, start: int | None) -> Tensor:
        """Local views' terms [2 n B], from their state alone: what `best_of_n` chooses by."""
        cls = [student.backbone(state, start=start or 0, cls_only=True)]
        return self.cross_entropy(self._named(student, cls, targets["dino"].shape[1]), targets["dino"])

    def _named(self, student: Learner, cls: list[Tensor], batch: int) -> Tensor:
        """Log-probabilities [V B K] of class tokens by crop size, each [v·B D]."""
        return self.log_probabilities(student.head(torch.cat(cls)).unflatten(0, (-1, batch)))

    def weighable(self, terms: LossTerms) -> dict[str, Tensor | None]:
        """Not KoLeo and Gram: they regularise the features, and their terms say nothing of single predictions."""
        found: dict[str, Tensor | None] = {"dino": self.pairs(terms["dino"])}
        return found | ({"ibot": None} if "ibot" in terms else {})

    def parts(
        self, terms: LossTerms, draw: Masks | None, weights: LossTerms | None = None, views: int | None = None
    ) -> LossTerms:
        weights = weights or {}
        parts = {"dino": self.mean(terms["dino"], weights.get("dino"))}
        if views is not None:
            parts["dino"] = parts["dino"] / (views - 1)  # both means are over 2 · (views − 1) pairs, here of two views
        if self.ibot is not None:
            assert draw is not None
            parts["ibot"] = self.ibot.mean(terms["ibot"], draw, weights.get("ibot"))
        return parts | {name: terms[name].sum() for name in ("koleo", "gram") if name in terms}

    def total(self, parts: LossTerms) -> Tensor:
        scales = {"ibot": self.ibot_settings.weight, "koleo": self.koleo_weight, "gram": self.gram_settings.weight}
        loss = parts["dino"]
        for name, scale in scales.items():
            if name in parts:
                loss = loss + scale * parts[name]
        return loss

    def update(self, logits: LossTerms) -> None:
        """The centres; Sinkhorn-Knopp has none."""
        if self.sinkhorn_iterations:
            return
        self.update_center(logits["dino"])
        if self.ibot is not None:
            self.ibot.update_center(logits["ibot"])

    def watch(self, targets: LossTerms) -> LossTerms:
        """The targets' entropy in nats (ln K where the teacher tells nothing apart, 0 where it always names one
        prototype), and the share of the favourite prototype (1/K … 1)."""
        dino = targets["dino"]
        entropy = -(dino * dino.clamp_min(1e-20).log()).sum(-1).mean()
        return {"teacher_entropy": entropy, "prototype_share": mean(dino.flatten(0, -2).mean(0)).max()}
