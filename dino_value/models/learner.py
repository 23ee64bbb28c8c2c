"""Backbone and heads together: what is trained, and averaged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_value.models.backbone import Backbone


class Learner(nn.Module):
    """Backbone and an objective's heads: the student, and with averaged weights the teacher.

    `patch_head` and `mask_token` are iBOT's, where it has them.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        patch_head: nn.Module | None = None,
        mask_token: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.patch_head, self.mask_token = backbone, head, patch_head, mask_token

    def forward(self, *groups: Tensor) -> Tensor:
        """Views grouped by size, each [V_i·B 3 h w] -> logits [ΣV_i·B K]; crops of one size are one batch."""
        return self.head(torch.cat(self.backbone([group for group in groups if len(group)], cls_only=True)))

    def zero_last_layers(self) -> None:
        """Drop the gradient of the prototypes."""
        for name, module in self.named_modules():
            if name.endswith("last_layer"):
                module.zero_grad()
