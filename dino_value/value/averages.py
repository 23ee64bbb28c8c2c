"""Averages of g_down over time, for lower variance: a small meta batch points only roughly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from dino_value.value.directions import Gradient


class GradientAverage:
    """The exponential moving average of a gradient, corrected for its start from zero as Adam's moments are.

    After n updates it is Σ_i δ^{n−i} g_i / Σ_i δ^{n−i}. The learner moves meanwhile, so a longer memory has less
    variance and more bias. A gradient that is not finite stays in it: refuse that before.

    Args:
        decay: δ in [0, 1); it remembers about 1/(1−δ) gradients, and 0 keeps the last one only.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay} of a gradient average: choose it in [0, 1), 0.9 for about ten gradients")
        self.decay = decay
        self._count = 0
        self._sum: Gradient = []

    @torch.no_grad()
    def update(self, gradient: Gradient) -> Gradient:
        """Take in one gradient, a list of one tensor per parameter of S, and give the average.

        Raises:
            ValueError: the shapes are not those seen before.
        """
        if not self._count:
            self._sum = [torch.zeros_like(part) for part in gradient]
        shapes, known = [[list(part.shape) for part in parts] for parts in (gradient, self._sum)]
        if shapes != known:
            raise ValueError(
                f"gradient of shapes {shapes} for an average of {known}: the scope changed; start a new average"
            )
        # A checkpoint may have come to another device.
        self._sum = [average.to(part) for average, part in zip(self._sum, gradient, strict=True)]
        torch._foreach_lerp_(self._sum, gradient, 1 - self.decay)
        self._count += 1
        return self.value

    @property
    def value(self) -> Gradient:
        """The average; new tensors.

        Raises:
            ValueError: nothing has been averaged.
        """
        if not self._count:
            raise ValueError("the average of no gradient: update it first")
        return list(torch._foreach_div(self._sum, 1 - self.decay**self._count))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and one number: loads with weights_only=True."""
        return {"count": self._count, "sum": [part.clone() for part in self._sum]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._count = state["count"]
        self._sum = [part.clone() for part in state["sum"]]


class Refreshed:
    """A gradient that is dear to compute, g_down of the whole feedback set, kept for `every` uses.

    Args:
        every: M; 1 computes it anew each time.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"a gradient refreshed every {every} uses: choose 1 or more")
        self.every = every
        self._age = 0
        self._gradient: Gradient = []

    def get(self, compute: Callable[[], Gradient]) -> Gradient:
        """The gradient of the last refresh; `compute` is called on the first use and after every M uses.

        The tensors are detached and shared between uses: do not change them in place.
        """
        if not self._gradient or self._age >= self.every:
            self._gradient, self._age = [part.detach() for part in compute()], 0
        self._age += 1
        return self._gradient

    def state_dict(self) -> dict[str, Any]:
        """Age (uses since the refresh) and tensors: loads with weights_only=True."""
        return {"age": self._age, "gradient": [part.clone() for part in self._gradient]}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str | None = None) -> None:
        """Continue at the saved age; `device` is the learner's, when the state was read to another."""
        self._age = state["age"]
        self._gradient = [part.to(device, copy=True) for part in state["gradient"]]


def mean_gradient(gradients: Iterable[Gradient]) -> Gradient:
    """The mean over equally large batches, holding two at a time.

    Raises:
        ValueError: there is none.
    """
    total: Gradient = []
    count = 0
    for gradient in gradients:
        with torch.no_grad():  # not around the loop: a generator computes its gradients in here
            if not total:
                total = [torch.zeros_like(part) for part in gradient]
            torch._foreach_add_(total, gradient)
        count += 1
    if not count:
        raise ValueError("the mean of no gradient: the feedback gave no batch")
    torch._foreach_div_(total, count)
    return total
