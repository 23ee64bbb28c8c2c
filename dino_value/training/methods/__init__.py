"""What a step does: one file a kind of update, one line a method. To add one: a file, and a line in METHODS."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from dino_value.training.methods.finetune import finetune_update
from dino_value.training.methods.oracle import oracle_update
from dino_value.training.methods.self_supervised import self_supervised_update

if TYPE_CHECKING:
    from dino_value.training.trainer import Trainer

METHODS: dict[str, Callable[[Trainer, Tensor, Tensor], None]] = {
    "value": self_supervised_update,
    "baseline": self_supervised_update,
    "random": self_supervised_update,  # the direction is drawn, not taken from labels
    "adversarial": self_supervised_update,  # masks raise the loss: ADIOS
    "finetune": finetune_update,
    "oracle": oracle_update,
}
"""name -> update(trainer, large, small) on an unlabeled batch, or this process's shard of it, uint8 [2 B 3 H W] and
[N B 3 h w]. What a method's designer does is training/designer_update.py's; here is the learner's step."""
