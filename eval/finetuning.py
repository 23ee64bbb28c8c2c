"""Fine-tuning: a head and a copy of the backbone, trained together on the labelled images."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dino_value.data.labelled import LabelledSource
from dino_value.eval.base import HeadOptions
from dino_value.eval.features import FrozenBackbone, Items, Memory, last_blocks
from dino_value.eval.fitting import Loss, train_head
from dino_value.seeds import key


def fit(
    extractor: FrozenBackbone,
    head: nn.Module,
    loss: Loss,
    source: LabelledSource,
    options: HeadOptions,
    *,
    dataset: Items | None = None,
    memory: Memory | None = None,
) -> tuple[FrozenBackbone, nn.Module]:
    """`train_head`; with `options.finetune` on a copy of the backbone that learns too, at its own rate.

    Args:
        memory: the features of `dataset`, where they are known already; of no use to fine-tuning.

    Returns:
        What reads images for the head, and the head, trained: the extractor that was given, or one of the copy.

    Raises:
        UserError: the weights did not stay finite; a state of other settings.
        Interrupted: a signal came, and the state has been kept.
    """
    if not options.finetune:
        return extractor, train_head(extractor, head, loss, source, options, dataset=dataset, memory=memory)
    tuned = FineTuned(extractor, head, options.seed)
    groups = [(list(head.parameters()), options.lr), (list(tuned.backbone.parameters()), options.finetune_lr)]

    def images(batch: Tensor) -> Tensor:
        return batch.to(extractor.device, non_blocking=True)

    train_head(images, tuned, loss, source, options, dataset=dataset, groups=groups)
    return FrozenBackbone(tuned.backbone, extractor.read, options), head


class FineTuned(nn.Module):
    """A copy of the backbone and the head on it, for training: images to the head's output.

    Stochastic depth is on where the backbone has it. What it drops follows from the seed and the step, so the global
    random state stays as it is, and a training that was stopped goes on exactly.
    """

    def __init__(self, extractor: FrozenBackbone, head: nn.Module, seed: int) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(extractor.backbone).requires_grad_()
        self.head, self.read, self.blocks, self.bf16 = head, extractor.read, extractor.blocks, extractor.bf16
        self.seed, self.step = seed, 0

    def forward(self, images: Tensor) -> Tensor:
        """One training step's images uint8 [B 3 H W], on the device, to what the head makes of them, float32."""
        device = images.device
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.type == "cuda" else ()):
            torch.manual_seed(key(self.seed, "finetune", self.step))
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                features = self.read(last_blocks(self.backbone, self.backbone.normalise(images), self.blocks))
        self.step += 1
        return self.head(features.float())

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.step)

    def set_extra_state(self, state: Any) -> None:
        self.step = int(state)
