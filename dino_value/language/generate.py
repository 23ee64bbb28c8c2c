"""Batched sampling with left padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_value.errors import UserError
from dino_value.language.text import Encoder


class Completion(NamedTuple):
    tokens: list[int]
    """Up to and including the end token, where it was reached."""
    text: str
    """Without special tokens."""


@torch.no_grad()
def generate(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[str],
    new_tokens: int,
    samples: int = 1,
    temperature: float = 0.0,
    batch_size: int = 16,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> list[list[Completion]]:
    """Completions of each prompt, [n][samples]; temperature 0 is greedy, 1 draws from p_θ itself.

    What is drawn depends on the batch, as everywhere; with greedy decoding padding changes rounding alone.

    Args:
        samples: of each prompt; 1 when greedy.
        stop: strings that end a completion, and are left off its text.

    Raises:
        UserError: a prompt and `new_tokens` do not fit the model's window.
    """
    window = getattr(model.config, "max_position_embeddings", None)
    encoded = [encoder.prompt(prompt) for prompt in prompts]
    for number, ids in enumerate(encoded):
        if window is not None and len(ids) + new_tokens > window:
            raise UserError(
                f"prompt {number + 1} has {len(ids)} tokens; with {new_tokens} new ones it exceeds the model's window "
                f"of {window}: fewer shots (--shots) or fewer new tokens (--new-tokens)"
            )
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    device, found = next(model.parameters()).device, []
    training = model.training
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(encoded), batch_size):
            padded, mask = left_padded(encoded[start : start + batch_size], encoder.end)
            out = model.generate(
                input_ids=padded.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=new_tokens,
                num_return_sequences=samples,
                pad_token_id=encoder.end,
                eos_token_id=encoder.end,
                **({"stopping_criteria": [_stopping(encoder, stop, padded.shape[1])]} if stop else {}),
                **options,
            )
            rows = [_completion(row, encoder, stop) for row in out[:, padded.shape[1] :].tolist()]
            found += [rows[first : first + samples] for first in range(0, len(rows), samples)]
    model.train(training)
    return found


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, [n L], so that every prompt ends where its completion begins."""
    length = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), length), pad), torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def _stopping(encoder: Encoder, stop: Sequence[str], start: int) -> Callable[..., Tensor]:
    """Whether each row's completion, which begins at `start`, has reached a stop string."""
    reach = 1 + max(map(len, stop))  # tokens: none is shorter than a character, but for pieces of one

    def stopped(ids: Tensor, scores: object, **options: object) -> Tensor:
        ends = encoder.tokenizer.batch_decode(ids[:, start:][:, -reach:], skip_special_tokens=True)
        return torch.tensor([any(mark in end for mark in stop) for end in ends], device=ids.device)

    return stopped


def _completion(tokens: list[int], encoder: Encoder, stop: Sequence[str]) -> Completion:
    if encoder.end in tokens:
        tokens = tokens[: tokens.index(encoder.end) + 1]
    text: str = encoder.tokenizer.decode(tokens, skip_special_tokens=True)
    for mark in stop:
        text = text.split(mark)[0]
    return Completion(tokens, text)
