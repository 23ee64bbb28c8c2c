"""What to watch while φ learns: is g_down more than noise, do tasks agree, does the designer add value?

Pure functions of gradients. They return tensors on the gradients' device, so that nothing waits for the host. ‖g_down‖
and ‖g_pre‖ come with every `value_step`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dino_value.value.directions import Gradient, inner, norm, weighted_sum
from dino_value.value.distributed import average
from dino_value.value.engines import Task, pre_gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_TINY = 1e-20


def alignment(a: Gradient, b: Gradient) -> Tensor:
    """cos(a, b) over all tensors, a scalar; 0 where either is zero."""
    return inner(a, b) / norm(a).clamp_min(_TINY) / norm(b).clamp_min(_TINY)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """‖.grad‖ over the parameters that have one: of φ after an engine has run, say.

    Raises:
        ValueError: no parameter has a gradient.
    """
    gradient = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradient:
        raise ValueError("gradient_norm: no parameter has a gradient; call it after the engine and before zero_grad")
    return norm(gradient)


def split_half(gradients: Sequence[Gradient]) -> Tensor:
    """Signal to noise of a gradient: the cosine r between its mean over the even and over the odd batches.

    With g_i = g + noise of squared length σ², n batches and many parameters, r ≈ ‖g‖²/(‖g‖² + 2σ²/n): 0 is all noise, 1
    all signal, and a negative value says that g is too weak to be told from zero. That is for half of the batches;
    `spearman_brown(r)` is the same for all of them.

    Args:
        gradients: one for each independent batch, all at the same θ; at least two. The last of an odd number is left
            out, to keep the halves equal.

    Raises:
        ValueError: fewer than two gradients.
    """
    half = len(gradients) // 2
    if half == 0:
        raise ValueError(f"split_half needs the gradients of at least two batches, not {len(gradients)}")
    even, odd = (weighted_sum(gradients[start : 2 * half : 2], [1 / half] * half) for start in (0, 1))
    return alignment(even, odd)


def spearman_brown(split: Tensor) -> Tensor:
    """2r/(1 + r): from the agreement r of two halves to the reliability of the whole (Spearman 1910, Brown 1910).

    For gradients this is about ‖g‖²/(‖g‖² + σ²/n), the part of the mean's squared length that is signal; its root is
    the cosine to expect between the mean over all n batches and the true gradient. Not meaningful below r = 0.
    """
    return 2 * split / (1 + split)


def task_alignment(gradients: Sequence[Gradient]) -> Tensor:
    """Cosines between the gradients of m feedback tasks, [m m]: below zero, a step for one harms the other.

    Raises:
        ValueError: no gradient at all.
    """
    if not gradients:
        raise ValueError("task_alignment needs the gradient of at least one task")
    return torch.stack([torch.stack([alignment(a, b) for b in gradients]) for a in gradients])


class Alignment(NamedTuple):
    """Scalars, detached."""

    value: Tensor
    """V = ⟨g_held, g_pre⟩; a longer g_pre alone raises it."""
    cosine: Tensor
    """cos(g_held, g_pre): the one to trust."""


class ValueGain(NamedTuple):
    """How three tasks on one batch lie to the same gradient, and what the designed one adds."""

    designed: Alignment
    plain: Alignment
    random: Alignment

    @property
    def over_plain(self) -> Alignment:
        """Designed minus undesigned."""
        return _difference(self.designed, self.plain)

    @property
    def over_random(self) -> Alignment:
        """Designed minus random: what is left once any task as strong as the designer's could have done it."""
        return _difference(self.designed, self.random)


def value_gain(
    task_designed: Task,
    task_plain: Task,
    task_random: Task,
    parameters: dict[str, Tensor],
    g_held: Gradient,
    group: ProcessGroup | None = None,
) -> ValueGain:
    """What the designer adds: V and cosine of three tasks that differ in their design only.

    Paired, so that the batch's own value cancels. φ gets no graph and no gradient: it costs three tail backwards.

    Args:
        task_designed: the designer's task.
        task_plain: the same batch, undesigned.
        task_random: the same batch, with a random design of equal strength (masks of the same keep ratio, say).
        parameters: θ_S by name, detached.
        g_held: the gradient on feedback that the designer never used; one tensor per parameter of S. On the
            designer's own feedback the gain is that of a training set. With several ranks, already their mean.
        group: the ranks that share the batch, in equal parts; all by default. g_pre is averaged over them.
    """
    tasks = (task_designed, task_plain, task_random)
    designed, plain, random = (_aligned(task, parameters, g_held, group) for task in tasks)
    return ValueGain(designed, plain, random)


def _aligned(task: Task, parameters: dict[str, Tensor], g_held: Gradient, group: ProcessGroup | None) -> Alignment:
    with torch.no_grad():
        hidden = task.trunk()
    g_pre = average(pre_gradient(task, hidden, parameters), group)
    return Alignment(inner(g_held, g_pre), alignment(g_held, g_pre))


def _difference(a: Alignment, b: Alignment) -> Alignment:
    return Alignment(a.value - b.value, a.cosine - b.cosine)
