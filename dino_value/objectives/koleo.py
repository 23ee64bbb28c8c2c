"""KoLeo: spreads features over the sphere by their nearest-neighbour distances.

Kozachenko-Leonenko entropy estimate of Sablayrolles et al. (2019, arXiv 1806.03198), as in DINOv2 (arXiv 2304.07193,
section 4): on the student's class tokens before the head, each global crop on its own, with weight 0.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def koleo(features: Tensor, eps: float = 1e-8) -> Tensor:
    """−mean_i log ‖x_i − x_nn(i)‖ of the ℓ2-normalised rows of [n D], a scalar in at least float32.

    Args:
        eps: keeps the logarithm and the gradient of the distance finite where two rows coincide.

    Raises:
        ValueError: not [n D] with n ≥ 2: one feature has no neighbour, and its loss would be NaN or a constant.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"KoLeo of features {list(features.shape)}: it needs [n D] with at least 2 images of one crop on this "
            "device; raise the batch size or set the KoLeo weight to 0"
        )
    with torch.autocast(features.device.type, enabled=False):
        points = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1, eps=eps)
        with torch.no_grad():
            # Below every cosine: a point is never its own neighbour.
            nearest = (points @ points.T).fill_diagonal_(-2).argmax(1)
        return -(F.pairwise_distance(points, points[nearest], eps=eps) + eps).log().mean()
