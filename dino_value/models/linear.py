"""Linear layers of float32 on the CPU by oneDNN in place of MKL: the same function, where MKL leaves speed behind.

torch hands float32 matrix products to MKL, which on processors of other makers than Intel uses half of the vector
width (on an AMD EPYC of family 26: 95 GFLOP/s a core against oneDNN's 200). oneDNN's kernels are in every build of
torch; what is added here is a derivative, so that a layer can be trained with them, and differentiated twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_value.errors import UserError


@torch.library.custom_op("dino_value::onednn_linear", mutates_args=())
def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[… I], [O I], [O] to [… O]; strides of any kind."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


@_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Made of the product itself, so that it can be differentiated again."""
    x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias = ctx.needs_input_grad
    rows = gradient.flatten(0, -2)
    return (
        _product(gradient, weight.t(), None) if of_x else None,
        _product(rows.t(), x.flatten(0, -2).t(), None) if of_weight else None,
        rows.sum(0) if of_bias else None,
    )


_product.register_autograd(_backward, setup_context=_keep)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by oneDNN where it applies: float32 on the CPU, outside autocast. No forward-mode derivative."""
    fits = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.ndim > 1
    if fits and x.numel() and not torch.is_autocast_enabled("cpu"):
        return _product(x, weight, bias)
    return F.linear(x, weight, bias)


class OneDNNLinear(nn.Linear):
    """`nn.Linear` by `linear`; parameters, names and state as there."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def function_of(layer: nn.Module) -> Callable[..., Tensor]:
    """What a caller that takes a layer's weights apart multiplies them by: `linear` or `F.linear`."""
    return linear if isinstance(layer, OneDNNLinear) else F.linear


def use_onednn(module: nn.Module) -> None:
    """Every plain linear layer of `module` runs by oneDNN from now on, copies of it included."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = OneDNNLinear


def choose_matmul(kind: str, device: torch.device) -> str:
    """`torch` or `onednn`. `auto` is onednn on an x86 CPU with AVX-512 that Intel did not make, and torch elsewhere.

    Raises:
        UserError: no such choice; onednn on another device, or where it does not run.
    """
    if kind not in ("auto", "torch", "onednn"):
        raise UserError(f"matmul={kind}: choose auto, torch, onednn")
    if kind == "torch" or (kind == "auto" and (device.type != "cpu" or not _mkl_is_slow())):
        return "torch"
    fault = f"it is for the CPU, and this runs on {device.type}" if device.type != "cpu" else _probe()
    if fault is None:
        return "onednn"
    if kind == "auto":
        return "torch"
    raise UserError(f"matmul=onednn does not run here: {fault}; choose matmul=torch or auto")


@functools.cache
def _mkl_is_slow() -> bool:
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return torch.backends.mkl.is_available() and "AuthenticAMD" in processor and "avx512f" in processor


def _probe() -> str | None:
    """Run forward and backward and compare with torch's own; what failed, or None."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in ((5, 3, 24), (16, 24), (16,))]

    def outcome(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [part.clone().requires_grad_() for part in drawn]
        output = function(*leaves)
        return [output, *torch.autograd.grad(output, leaves, output.detach())]

    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            pairs = zip(outcome(_product), outcome(F.linear), strict=True)
            worst = max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)
    except Exception as error:  # a build without oneDNN, or an operator of another signature
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None if worst <= 1e-4 else f"it is off from torch's product by {worst:.1e} (bound 1e-4)"
