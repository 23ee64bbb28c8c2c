"""Feedback without a derivative: a reward on sampled outputs (pass or fail, a preference), not a loss on labels."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def leave_one_out(rewards: Tensor) -> Tensor:
    """r_i − mean_{j≠i} r_j over the samples of each prompt: [n k] -> [n k].

    Raises:
        ValueError: not two dimensions, or fewer than two samples.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards of shape {list(rewards.shape)}: leave-one-out needs [prompts, samples] with two samples or more "
            "of each prompt, the others being the baseline of one"
        )
    samples = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * (samples / (samples - 1))


def score_loss(log_probs: Tensor, rewards: Tensor) -> Tensor:
    """A scalar whose gradient estimates −∇_θ E[R] without bias; its gradient on S is the g_down of a reward.

    The score function with the leave-one-out baseline (RLOO: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline
    for free"; arXiv 2402.14740), the mean over n prompts and k samples. Its value has no meaning. Samples of one prompt
    that are all rewarded alike contribute nothing, so g_down can be exactly zero.

    Args:
        log_probs: [n k], log p_θ of each whole sampled output, with θ's graph: summed over its tokens, not averaged.
            The samples are independent draws from p_θ itself.
        rewards: [n k], numbers or booleans; constants, whatever made them. They are not checked, which would wait for
            the device: a reward that is not finite makes g_down so.

    Raises:
        ValueError: shapes that differ, not two dimensions, or fewer than two samples of a prompt.
    """
    if log_probs.shape != rewards.shape:
        raise ValueError(
            f"log-probabilities of shape {list(log_probs.shape)} for rewards of shape {list(rewards.shape)}: "
            "give both as [prompts, samples]"
        )
    return -(leave_one_out(rewards.to(log_probs.dtype)) * log_probs).mean()
