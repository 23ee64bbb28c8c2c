"""The paper's learners by name, without weights: for speed, memory and shapes where no checkpoint can be had.

Sizes are those of the published config.json files.
"""

from __future__ import annotations

from typing import Any

_QWEN = {"vocab_size": 151_936, "max_position_embeddings": 32_768, "tie_word_embeddings": True}


def _qwen(hidden: int, layers: int, heads: int, mlp: int, **other: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**_QWEN, **sizes, "num_key_value_heads": heads, "intermediate_size": mlp, **other}


QWEN: dict[str, dict[str, Any]] = {
    "qwen1.5-0.5b": _qwen(1024, 24, 16, 2816),
    "qwen1.5-4b": _qwen(2560, 40, 20, 6912, tie_word_embeddings=False),
    "qwen1.5-7b": _qwen(4096, 32, 32, 11_008, tie_word_embeddings=False),
    "qwen2.5-0.5b": _qwen(896, 24, 14, 4864, num_key_value_heads=2),
    "qwen-tiny": _qwen(16, 2, 2, 24, vocab_size=1000, max_position_embeddings=128),
}
"""Options of transformers' Qwen2Config."""


def architecture(name: str) -> Any:
    """The configuration of a model in QWEN, or None for any other name."""
    from transformers import Qwen2Config

    return Qwen2Config(**QWEN[name]) if name in QWEN else None
