"""Checks before any parameter changes: what a value step is given, and whether an engine is exact for this learner.

PyTorch has silent wrong second derivatives, and a difference has a radius: so an engine is measured against
`double_backward` on a small slice of the first batch, not trusted. All but `require` wait for the host: call them once,
at the start.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dino_value.value.directions import Gradient, norm
from dino_value.value.engines import ENGINES, Engine, Task, double_backward, finite_difference

BOUND = 2e-2
"""Largest relative error of φ's gradient: far below the noise between two batches, above float32's."""

_RADII = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def require(parameters: Mapping[str, Tensor], g_down: Gradient, phi: Sequence[Tensor]) -> None:
    """That g_down fits S and φ can learn: shapes and flags only, so it costs no wait for the device.

    Raises:
        ValueError: one gradient too many or too few, one of another shape, or a φ without trainable tensors.
    """
    if len(g_down) != len(parameters):
        raise ValueError(
            f"g_down has {len(g_down)} tensors and the scope {len(parameters)}: measure it on the same scope"
        )
    for (name, value), gradient in zip(parameters.items(), g_down, strict=True):
        if value.shape != gradient.shape:
            raise ValueError(
                f"g_down of {name} has shape {tuple(gradient.shape)} and the parameter {tuple(value.shape)}: "
                "measure it on the same scope, in the same order"
            )
    if not any(parameter.requires_grad for parameter in phi):
        raise ValueError("the designer has no parameter that requires a gradient: unfreeze it, or leave it out")


def check_start(g_down: Gradient, masks: Tensor | None = None) -> None:
    """What only the values tell, before the first step; later steps are the training loop's finite guard's.

    Raises:
        ValueError: g_down zero or not finite, or a designer output outside [0, 1].
    """
    length = float(norm(g_down))
    if not math.isfinite(length):
        bad = sum(not bool(part.isfinite().all()) for part in g_down)
        raise ValueError(
            f"g_down is not finite ({bad} of {len(g_down)} tensors): look at the feedback labels and loss, and lower "
            "the heads' learning rate"
        )
    if length == 0:
        raise ValueError(
            "g_down is zero: the feedback loss does not reach the scope; widen the scope, or check that the labels "
            "are not all ignored"
        )
    if masks is not None:
        low, high = (float(end) for end in masks.detach().aminmax())
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise ValueError(
                f"the designer's output lies in [{low:.3g}, {high:.3g}], not in [0, 1]: end it in a sigmoid"
            )


def engine_error(
    task: Task,
    parameters: dict[str, Tensor],
    u: Gradient,
    phi: Sequence[Tensor],
    engine: Engine,
    reference: Engine = double_backward,
) -> float:
    """‖g − g_ref‖/‖g_ref‖ of φ's gradient. φ's .grad and the random state stay as they were.

    Args:
        task: on a small slice of a batch; its trunk runs once for each engine, with the same random numbers.
        u: the direction, one tensor per parameter of S.

    Raises:
        ValueError: an engine that this learner does not support.
    """
    return _error(_gradient(task, parameters, u, phi, engine), _gradient(task, parameters, u, phi, reference))


def check_engine(
    task: Task,
    parameters: dict[str, Tensor],
    u: Gradient,
    phi: Sequence[Tensor],
    engine: Engine,
    bound: float = BOUND,
    reference: Engine = double_backward,
) -> float:
    """`engine_error`, which must not exceed `bound`.

    Raises:
        ValueError: it does, or a gradient is zero or not finite; with the cause where it is known.
    """
    exact = _reference(task, parameters, u, phi, reference)
    error = _error(_gradient(task, parameters, u, phi, engine), exact)
    if error <= bound:
        return error
    if math.isnan(error):
        raise ValueError(
            f"{_name(engine)}: φ's gradient is not finite, where the reference's is; choose another engine"
        )
    raise ValueError(
        f"{_name(engine)}: φ's gradient is off by {error:.2g} of its length (bound {bound:.2g}): "
        + _cause(task, parameters, u, phi, engine, exact, bound)
    )


def choose_engine(
    task: Task,
    parameters: dict[str, Tensor],
    u: Gradient,
    phi: Sequence[Tensor],
    candidates: Mapping[str, Engine] = ENGINES,
    bound: float = BOUND,
) -> tuple[str, float]:
    """The name and error of the first engine that is exact enough; `candidates` are in order, the cheapest first.

    `linear` is left out for a task without `terms`.

    Raises:
        ValueError: none is, with the error of each; or this learner does not support the reference.
    """
    exact = _reference(task, parameters, u, phi, double_backward)
    failed: dict[str, str] = {}
    for name, engine in candidates.items():
        if engine is double_backward:
            return name, 0.0
        if name == "linear" and not hasattr(task, "terms"):
            continue
        try:
            error = _error(_gradient(task, parameters, u, phi, engine), exact)
        except ValueError as refusal:
            failed[name] = str(refusal)
            continue
        if error <= bound:
            return name, error
        failed[name] = f"error {error:.2g}"
    found = "; ".join(f"{name}: {why}" for name, why in failed.items()) or "no candidate fits this task"
    raise ValueError(f"no engine is within {bound:.2g} of the reference; allow engine=double_backward ({found})")


def choose_radius(
    task: Task, parameters: dict[str, Tensor], u: Gradient, phi: Sequence[Tensor], engine: Engine = finite_difference
) -> tuple[float, float]:
    """The radius, a power of ten, at which `engine` is nearest to the reference, and its error there.

    Below it rounding takes over, above it curvature; where they meet depends on the learner and how far it is trained.
    """
    return _best_radius(task, parameters, u, phi, engine, _reference(task, parameters, u, phi, double_backward))


def _gradient(
    task: Task, parameters: dict[str, Tensor], u: Gradient, phi: Sequence[Tensor], engine: Engine
) -> Gradient:
    """φ's gradient by `engine`, zeros where there is none."""
    kept = [tensor.grad for tensor in phi]
    for tensor in phi:
        tensor.grad = None
    try:
        with _same_random_numbers(phi):
            engine(task, task.trunk(), parameters, u, phi)
        return [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in phi]
    finally:
        for tensor, gradient in zip(phi, kept, strict=True):
            tensor.grad = gradient


def _same_random_numbers(phi: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Undo what is drawn within, on the CPU and on φ's devices."""
    return torch.random.fork_rng(sorted({tensor.get_device() for tensor in phi if tensor.is_cuda}))


def _reference(
    task: Task, parameters: dict[str, Tensor], u: Gradient, phi: Sequence[Tensor], reference: Engine
) -> Gradient:
    exact = _gradient(task, parameters, u, phi, reference)
    length = float(norm(exact))
    if not math.isfinite(length):
        raise ValueError("φ's gradient is not finite: look for infinities in the designer's output, the loss or g_down")
    if length == 0:
        raise ValueError(
            "the loss does not depend on the designer: φ's gradient is zero; see whether its output is detached or "
            "saturated, and whether task.tail() uses both its hidden states and its parameters"
        )
    return exact


def _error(found: Gradient, exact: Gradient) -> float:
    """NaN, which is within no bound, for gradients that are not finite."""
    return float(norm(list(torch._foreach_sub(found, exact))) / norm(exact))


def _cause(
    task: Task,
    parameters: dict[str, Tensor],
    u: Gradient,
    phi: Sequence[Tensor],
    engine: Engine,
    exact: Gradient,
    bound: float,
) -> str:
    settings = inspect.signature(engine).parameters
    if "radius" in settings:
        radius = settings["radius"].default
        best, error = _best_radius(task, parameters, u, phi, engine, exact)
        if error <= bound:
            cause = "small: rounding" if best > radius else "large: curvature"
            return f"radius={radius:.2g} is too {cause} takes over; set radius={best:.2g} (error {error:.2g})"
    with _same_random_numbers(phi), torch.no_grad():
        low = [state.dtype for state in task.trunk() if state.dtype in (torch.bfloat16, torch.float16)]
    if low:
        return (
            f"the trunk gives {low[0]}, and so does its gradient; run it in float32, or choose engine=double_backward"
        )
    return "no known cause: choose engine=double_backward, and report the layers of the tail"


def _best_radius(
    task: Task, parameters: dict[str, Tensor], u: Gradient, phi: Sequence[Tensor], engine: Engine, exact: Gradient
) -> tuple[float, float]:
    def error(radius: float) -> float:
        found = _error(_gradient(task, parameters, u, phi, functools.partial(engine, radius=radius)), exact)
        return math.inf if math.isnan(found) else found

    errors = {radius: error(radius) for radius in _RADII}
    best = min(errors, key=errors.__getitem__)
    return best, errors[best]


def _name(engine: Engine) -> str:
    return getattr(getattr(engine, "func", engine), "__name__", "engine")
