"""Candidates, soft targets and their cross-entropy, without a tensor of the vocabulary's size for a whole batch.

For a target q with Σq = 1 on K candidates, cross-entropy is logsumexp(z) − Σ_k q_k z_k (method section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TargetRule = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""(rows, logits [t V], float32) -> candidate ids [t K] and their probabilities q [t K]; `rows` of the T tokens."""


def candidates(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """{y} ∪ top-(K−1) of the prediction without y: [t V], [t] -> ids [t K], the true token first."""
    truth, best = labels[:, None], logits.topk(count, dim=1).indices
    # y goes last, if it is there, and the last goes: no copy of the logits without y.
    kept = (best == truth).to(torch.uint8).argsort(dim=1, stable=True)[:, :-1]
    return torch.cat([truth, best.gather(1, kept)], 1)


def soft_targets(alpha: Tensor, proposal: Tensor) -> Tensor:
    """q = (1 − α)·onehot(y) + α·r, the true token being candidate 0: [t 1], [t K] -> [t K]."""
    truth = F.one_hot(torch.zeros(len(proposal), dtype=torch.int64, device=proposal.device), proposal.shape[1])
    return (1 - alpha) * truth + alpha * proposal


def next_token(labels: Tensor) -> TargetRule:
    """The one-hot target: plain next-token training."""

    def rule(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        truth = labels[rows, None]
        return truth, logits.new_ones(truth.shape)

    return rule


def uniform(labels: Tensor, count: int, alpha: float) -> TargetRule:
    """Control: α spread evenly over the candidates."""

    def rule(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = candidates(logits, labels[rows], count)
        return ids, soft_targets(logits.new_full((len(ids), 1), alpha), logits.new_full(ids.shape, 1 / count))

    return rule


def self_distillation(labels: Tensor, count: int, alpha: float) -> TargetRule:
    """Control: α spread as the learner itself predicts, among the candidates."""

    def rule(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = candidates(logits, labels[rows], count)
        return ids, soft_targets(logits.new_full((len(ids), 1), alpha), logits.gather(1, ids).softmax(1))

    return rule


def soft_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: TargetRule, chunk: int = 256
) -> Tensor:
    """Σ_t [logsumexp(z_t) − Σ_k q_{t,k} z_{t,k}] with z = hidden·weightᵀ; a scalar, float32.

    The gradient is made chunk by chunk on the way forward, so logits exist for `chunk` tokens at a time and are
    computed once. It has no second derivative: `negative_log_probs` has. q is a constant.

    Args:
        hidden: [T d], the final hidden states of the tokens that count.
        weight: of the head, [V d]; bias: [V].
    """
    loss: Tensor = _SoftCrossEntropy.apply(hidden, weight, bias, target, chunk)
    return loss


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: TargetRule, chunk: int
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        total = hidden.new_zeros((), dtype=torch.float32)
        by_hidden = torch.zeros_like(hidden) if wanted[0] else None
        by_weight = torch.zeros_like(weight) if wanted[1] else None
        by_bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], weight, bias).float()
            ids, q = target(rows, logits)
            norm = logits.logsumexp(1)
            total += (norm - (q * logits.gather(1, ids)).sum(1)).sum()
            # ∂/∂z = softmax(z) − q
            slope = (logits - norm[:, None]).exp_().scatter_add_(1, ids, -q.to(logits.dtype))
            if by_hidden is not None:
                by_hidden[rows] = slope.to(weight.dtype) @ weight
            if by_weight is not None:
                by_weight += slope.to(hidden.dtype).T @ hidden[rows]
            if by_bias is not None:
                by_bias += slope.sum(0)
        ctx.save_for_backward(by_hidden, by_weight, by_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        return (*(None if part is None else part * upstream for part in parts), None, None)


def negative_log_probs(hidden: Tensor, head: nn.Linear, ids: Tensor, chunk: int = 256) -> Tensor:
    """ℓ = −log p of the candidates: [T d], [T K] -> [T K]. Twice differentiable; chunks are recomputed."""

    # As arguments: a chunk is run again when the head may have other parameters than under functional_call.
    weight, bias = head.weight, head.bias

    def part(states: Tensor, wanted: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(states, weight, bias)
        return logits.logsumexp(1, keepdim=True) - logits.gather(1, wanted)

    pairs = zip(hidden.split(chunk), ids.split(chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([part(*pair, weight, bias) for pair in pairs])
    return torch.cat([checkpoint(part, *pair, weight, bias, use_reentrant=False) for pair in pairs])
