"""Attention by several libraries, one function; each is tried by a real forward and backward before it is used."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dino_value.errors import UserError
from dino_value.models.blocks import Attend, Queries


def math(triples: Sequence[Queries], dropout: float) -> list[Tensor]:
    """Plain matrix products; differentiable any number of times."""
    outputs = []
    for q, k, v in triples:
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        outputs.append((F.dropout(weights, dropout) if dropout else weights) @ v)
    return outputs


def sdpa(triples: Sequence[Queries], dropout: float) -> list[Tensor]:
    """torch's fused kernels, one call a crop size; within `sdpa_kernel(MATH)` differentiable twice."""
    return [F.scaled_dot_product_attention(q, k, v, dropout_p=dropout) for q, k, v in triples]


def xformers(triples: Sequence[Queries], dropout: float) -> list[Tensor]:
    """memory_efficient_attention, one call a crop size. Where the caller asks for the math kernel, `sdpa`."""
    if wants_math():
        return sdpa(triples, dropout)
    from xformers.ops import memory_efficient_attention

    return [
        memory_efficient_attention(*(part.transpose(1, 2) for part in triple), p=dropout).transpose(1, 2)
        for triple in triples
    ]


def varlen(triples: Sequence[Queries], dropout: float) -> list[Tensor]:
    """torch's variable-length flash attention: all crop sizes in one call without padding (half precision, CUDA).

    Elsewhere, with dropout and where the caller asks for the math kernel, one call of `sdpa` a crop size: nothing is
    padded there either.
    """
    q = triples[0][0]
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or dropout or wants_math():
        return sdpa(triples, dropout)
    from torch.nn.attention.varlen import varlen_attn

    queries, keys, values = (torch.cat([t[i].transpose(1, 2).flatten(0, 1) for t in triples]) for i in range(3))
    shapes = tuple((len(q), q.shape[2], k.shape[2]) for q, k, _ in triples)
    starts_q, starts_k = (_starts(tuple((shape[0], shape[i]) for shape in shapes), q.device) for i in (1, 2))
    longest = [max(shape[i] for shape in shapes) for i in (1, 2)]
    rows = varlen_attn(queries, keys, values, starts_q, starts_k, *longest)
    assert isinstance(rows, Tensor)
    parts = rows.split([count * length for count, length, _ in shapes])
    return [
        part.unflatten(0, (count, length)).transpose(1, 2)
        for part, (count, length, _) in zip(parts, shapes, strict=True)
    ]


@functools.lru_cache(maxsize=64)  # a run has a handful of shapes, and each table is a copy to the device
def _starts(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Where each sequence starts, and the end: int32 [N + 1], for (count, length) of each crop size."""
    lengths = [length for count, length in sizes for _ in range(count)]
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)


BACKENDS: dict[str, Attend] = {"sdpa": sdpa, "math": math, "xformers": xformers, "varlen": varlen}
_FIXES = {
    "xformers": "install the extra with pip install 'dino-value[xformers]'; it has kernels for CUDA only",
    "varlen": "it needs a torch with torch.nn.attention.varlen, and on CUDA a device with flash attention",
}


def wants_math() -> bool:
    """Has the caller ruled out fused kernels, with `sdpa_kernel(MATH)`, as one does to differentiate twice?"""
    return not (torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled())


_KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class AsNow:
    """The kernels that torch may choose from as this is made, again: a checkpointed block must be run a second time as
    it was the first, though a reference that rules out fused kernels asks for it."""

    def __init__(self) -> None:
        self._kernels = [SDPBackend.MATH] if wants_math() else _KERNELS
        self._inside: list[contextlib.AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._inside.append(sdpa_kernel(self._kernels))
        self._inside[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inside.pop().__exit__(*error)


def probe(kind: str, device: torch.device, head_dim: int = 64, dtype: torch.dtype | None = None) -> str | None:
    """Run forward and backward on crops of two sizes and compare with `math` in float32; what failed, or None.

    Without a `dtype`, bfloat16 on CUDA and float32 elsewhere.
    """
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    generator = torch.Generator().manual_seed(0)  # leaves the run's own draws alone
    shapes = ((2, 2, 17, head_dim), (3, 2, 5, head_dim))
    drawn = [[torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)] for shape in shapes]
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            found, wanted = _outcome(BACKENDS[kind], drawn), _outcome(math, [[p.float() for p in t] for t in drawn])
    except Exception as error:  # a missing package, symbol, kernel or driver: each library has its own
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    worst = max(
        float((a.float() - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in zip(found, wanted, strict=True)
    )
    return None if worst <= bound else f"it is off from plain attention by {worst:.1e} (bound {bound:.0e})"


def _outcome(attend: Attend, drawn: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    leaves = [[part.detach().requires_grad_() for part in triple] for triple in drawn]
    outputs = attend([(q, k, v) for q, k, v in leaves], 0.0)
    flat = [leaf for triple in leaves for leaf in triple]
    gradients = torch.autograd.grad(outputs, flat, [output.detach() for output in outputs])
    return [*(output.detach() for output in outputs), *gradients]


def choose(
    kind: str,
    device: torch.device,
    head_dim: int = 64,
    bfloat16: bool = False,
    able: Callable[[str], str | None] = lambda kind: None,
) -> tuple[str, str]:
    """The backend to use for `backbone.attention=kind`, and a line for the log on why ('' if there was no choice).

    `auto` takes on CUDA the first of varlen, xformers, sdpa that passes `probe`; on the CPU plain products under
    bfloat16 autocast, where the backward pass of torch's fused kernel is slow, and else sdpa.

    Args:
        able: what keeps a model from a backend, or None.

    Raises:
        UserError: no such backend, or it does not run here, with what failed and what to do.
    """
    if kind != "auto":
        if kind not in BACKENDS:
            raise UserError(f"backbone.attention={kind}: choose auto, {', '.join(BACKENDS)}")
        if kind in ("sdpa", "math"):  # torch's own, on every device
            return kind, ""
        fault = probe(kind, device, head_dim)
        if fault:
            raise UserError(
                f"backbone.attention={kind} does not run on {device.type}: {fault}; {_FIXES[kind]}, or choose "
                "backbone.attention=sdpa"
            )
        fault = able(kind)
        if fault:
            raise UserError(f"backbone.attention={kind} cannot run this model: {fault}; choose backbone.attention=sdpa")
        return kind, ""
    if device.type != "cuda":
        chosen = "math" if bfloat16 else "sdpa"
        return chosen, f"attention: {chosen} ({device.type}, {'bfloat16' if bfloat16 else 'float32'})"
    passed: list[str] = []
    for candidate in ("varlen", "xformers", "sdpa"):
        fault = able(candidate) or probe(candidate, device, head_dim)
        if fault is None:
            return candidate, f"attention: {candidate}" + (f" (not {'; not '.join(passed)})" if passed else "")
        passed.append(f"{candidate}: {fault}")
    return "math", f"attention: math (not {'; not '.join(passed)})"


def kernel(kind: str, attention: Any) -> Attend:
    """The function that a block calls; `sdpa` and `math` stand in the module, where timm keeps them."""
    if kind in ("sdpa", "math"):
        kind = "sdpa" if attention.fused_attn else "math"
    return BACKENDS[kind]
