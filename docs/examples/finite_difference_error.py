"""The error of finite differences against their radius, in float64, float32 and with a tail in bfloat16.

The reference is double backward in float64, on a ViT-like learner: two pre-norm transformer blocks in scope, a soft
mask over 16 tokens as the designer's output. Writes finite_difference.svg, the figure of docs/value.md:

    python docs/examples/finite_difference_error.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call

from dino_value.value import double_backward, finite_difference, matching

BATCH, TOKENS, WIDTH, CLASSES = 8, 16, 64, 32
RADII = [10.0 ** (exponent / 2) for exponent in range(-13, 1)]
CURVES = ("float64", "float32", "bfloat16 tail")


class MaskedTokens:
    """hidden = tokens ⊙ sigmoid(φ); tail = two blocks, norm, linear, cross-entropy to soft targets."""

    def __init__(self, seed: int, dtype: torch.dtype, low_tail: bool = False) -> None:
        torch.manual_seed(seed)  # drawn in float32 and then cast: the same numbers in every dtype
        blocks = [
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(2)
        ]
        self.model = nn.Sequential(*blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)).to(dtype)
        self.tokens = torch.randn(BATCH, TOKENS, WIDTH).to(dtype)
        self.phi = nn.Parameter(torch.randn(BATCH, TOKENS, 1).to(dtype))
        self.targets = torch.randn(BATCH, CLASSES).to(dtype).mul(3).softmax(1)
        self.low_tail = low_tail
        scope = matching(self.model, [r"^[012]\."])
        self.parameters = scope.parameters(self.model)
        self.u = [torch.randn(value.shape).to(dtype) for value in self.parameters.values()]

    def trunk(self) -> tuple[Tensor, ...]:
        return (self.tokens * self.phi.sigmoid(),)

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        frozen = {name: value.detach() for name, value in self.model.named_parameters()}
        weights, states = {**frozen, **parameters}, hidden[0]
        if self.low_tail:  # what the engine forbids: it would give the tail float32
            weights, states = {name: value.bfloat16() for name, value in weights.items()}, states.bfloat16()
        pooled = functional_call(self.model, weights, (states,)).mean(1)
        return F.cross_entropy(pooled.to(self.targets.dtype), self.targets)


def relative_error(curve: str, radius: float, seed: int) -> float:
    """‖found − reference‖ / ‖reference‖ of φ's gradient."""
    exact = MaskedTokens(seed, torch.float64)
    double_backward(exact, exact.trunk(), exact.parameters, exact.u, [exact.phi])
    task = MaskedTokens(seed, torch.float64 if curve == "float64" else torch.float32, curve == "bfloat16 tail")
    finite_difference(task, task.trunk(), task.parameters, task.u, [task.phi], radius=radius)
    assert exact.phi.grad is not None
    assert task.phi.grad is not None
    return float((task.phi.grad.double() - exact.phi.grad).norm() / exact.phi.grad.norm())


def errors(curve: str, radii: list[float], seeds: int = 5) -> list[float]:
    """The median over seeds, at each radius."""
    return [
        float(torch.tensor([relative_error(curve, radius, seed) for seed in range(seeds)]).median()) for radius in radii
    ]


def main(path: Path) -> None:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for curve, colour, marker in zip(CURVES, ("#6b6b6b", "#0072b2", "#d55e00"), "Dos", strict=True):
        found = errors(curve, RADII)
        print(f"{curve:14}", " ".join(f"{radius:.0e}:{value:.1e}" for radius, value in zip(RADII, found, strict=True)))
        axes.loglog(RADII, found, color=colour, marker=marker, markersize=4, label=curve)
    axes.axhline(1, color="#d9d9d9", zorder=0)
    axes.set_xlabel("radius R: the length of the step, ε = R/‖u‖")
    axes.set_ylabel("relative error of φ's gradient")
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "dino-value"}):  # text as text, the same file every time
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "finite_difference.svg")
