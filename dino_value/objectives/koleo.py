"""KoLeo: spreads features over the sphere by their nearest-neighbour distances.

Kozachenko-Leonenko entropy estimate of Sablayrolles et al. (2019, arXiv 1806.03198), as in DINOv2 (arXiv 2304.07193,
section 4): on the student's class tokens before the head, each global crop on its own, with weight 0.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_value.distributed.collectives import gather, world_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def koleo(features: Tensor, eps: float = 1e-8, group: ProcessGroup | None = None) -> Tensor:
    """−mean_i log ‖x_i − x_nn(i)‖ of the ℓ2-normalised rows of [n D], a scalar in at least float32.

    Neighbours are looked for among the features of all processes, n on each, and the mean over processes is the whole
    batch's: DINOv2's published code looks on its own device only, so that its loss depends on how many there are.

    Args:
        eps: keeps the logarithm and the gradient of the distance finite where two rows coincide.
        group: processes that share the batch; None: all.

    Raises:
        ValueError: not [n D] with n ≥ 2: one feature has no neighbour, and its loss would be NaN or a constant.
    """
    if features.ndim != 2 or len(features) * world_size(group) < 2:
        raise ValueError(
            f"KoLeo of features {list(features.shape)}: it needs [n D] with at least 2 images of one crop in the "
            "batch; raise the batch size or set the KoLeo weight to 0"
        )
    with torch.autocast(features.device.type, enabled=False):
        points = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1, eps=eps)
        every, first = gather(points, group)
        with torch.no_grad():
            cosines = points @ every.T
            # Below every cosine: a point is never its own neighbour.
            cosines[:, first : first + len(points)].fill_diagonal_(-2)
            nearest = cosines.argmax(1)
        return -(F.pairwise_distance(points, every[nearest], eps=eps) + eps).log().mean()
