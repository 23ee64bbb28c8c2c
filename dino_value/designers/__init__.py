"""Task designers φ: a view in, a soft mask out. To add one: a file, and a line in DESIGNERS."""

from collections.abc import Callable

from torch import nn

from dino_value.designers.controls import AttentionMasks, RandomMasks
from dino_value.designers.masking import fill_in, learned_views, sparsity, total_variation
from dino_value.designers.sit import SiTDesigner
from dino_value.designers.unet import UNetDesigner

DESIGNERS: dict[str, Callable[..., nn.Module]] = {"unet": UNetDesigner, "sit": SiTDesigner}
"""name -> class(width, depth, stride, keep_ratio); forward: views [n 3 H W] -> mask [n 1 H W] in [0, 1]."""

__all__ = [
    "DESIGNERS",
    "AttentionMasks",
    "RandomMasks",
    "SiTDesigner",
    "UNetDesigner",
    "fill_in",
    "learned_views",
    "sparsity",
    "total_variation",
]
