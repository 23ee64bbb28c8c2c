"""The designer φ of language: a small decoder-only transformer that scores candidate targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_value.language.targets import soft_targets

_TINY = 1e-20


class TokenDesigner(nn.Module):
    """Reads the context and the true next token; says how much of the target leaves it, and where it goes.

    Width 256, 6 layers, 4 heads, float32 in the paper (method section 4). Tokens enter as the learner's own input
    embeddings, constants here, so φ knows what the learner knows of them and does not grow with the vocabulary.

    Args:
        embedding: width d of the learner's embeddings.
        gate: bias of the gate before training.
        prior: what r is before training: `flat`, or `learner`, its own prediction among the candidates.
    """

    def __init__(
        self,
        embedding: int,
        hidden: int,
        layers: int,
        heads: int,
        alpha_max: float,
        gate: float = 0.0,
        prior: str = "flat",
    ) -> None:
        super().__init__()
        self.alpha_max, self.prior = alpha_max, prior
        self.seen, self.truth = nn.Linear(embedding, hidden), nn.Linear(embedding, hidden, bias=False)
        self.blocks = nn.ModuleList(_Block(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.query = nn.Linear(hidden, embedding)
        self.gate = nn.Linear(hidden, 1)
        for layer in (self.gate, self.query):  # r begins as its prior, α as the same everywhere
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.query.bias)
        nn.init.constant_(self.gate.bias, gate)

    def forward(self, seen: Tensor, truth: Tensor, segments: Tensor | None = None) -> Tensor:
        """A state for each position [B L hidden].

        Args:
            seen: embeddings of the context up to and including each position, [B L d].
            truth: of the true next tokens, [B L d].
            segments: documents [B L], which do not see each other.
        """
        # Learners differ in the length of their embeddings, from 0.02 a number to 1.
        states = self.seen(_unit(seen)) + self.truth(_unit(truth))
        mask = None
        if segments is not None:
            length = segments.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
            mask = ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]
        for block in self.blocks:
            states = block(states, mask)
        out: Tensor = self.norm(states)
        return out

    def alpha(self, states: Tensor) -> Tensor:
        """α = α_max·sigmoid(gate): [t hidden] -> [t 1]."""
        return self.alpha_max * torch.sigmoid(self.gate(states))

    def proposal(self, states: Tensor, options: Tensor, own: Tensor) -> Tensor:
        """r over the candidates: [t hidden], [t K d], [t K] -> [t K].

        Args:
            options: the candidates' embeddings.
            own: the learner's probabilities of them, where r begins if the prior is `learner`.
        """
        # ⟨query, _unit(option)⟩/√d, without a second tensor of the options' size.
        length = torch.linalg.vector_norm(options, dim=-1).clamp_min(_TINY)
        scores = torch.bmm(options, self.query(states)[:, :, None]).squeeze(2) / length
        if self.prior == "learner":
            scores = scores + own.clamp_min(_TINY).log()
        return scores.softmax(1)

    def targets(self, states: Tensor, options: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """q = (1 − α)·onehot + α·r, [t K], candidate 0 being the true token; and α·KL(r‖own), [t].

        The second bounds KL(q‖q with r = own) from above, and is what a trust region holds down.
        """
        alpha, r = self.alpha(states), self.proposal(states, options, own)
        away = (r * (r.clamp_min(_TINY).log() - own.clamp_min(_TINY).log())).sum(1)
        return soft_targets(alpha, r), alpha.squeeze(1) * away


def _unit(embeddings: Tensor) -> Tensor:
    """Of mean square one a number; zero stays zero."""
    return F.rms_norm(embeddings, embeddings.shape[-1:], eps=1e-12)


class _Block(nn.Module):
    """Pre-norm causal attention with rotary positions, and an MLP."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(self.before_attention(states)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = rotate(q), rotate(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        states = states + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = states + self.mlp(self.before_mlp(states))
        return out


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on [B L heads d]; the last number of an odd d stays as it is."""
    half = x.shape[-1] // 2
    frequencies = 10_000 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / max(1, half))
    angles = torch.arange(x.shape[1], device=x.device)[:, None, None] * frequencies
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos(), rest], -1)
