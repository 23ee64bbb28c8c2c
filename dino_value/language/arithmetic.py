"""Synthetic arithmetic word problems, a tokenizer for them, and a tiny model: an experiment that needs no download.

The stream is noisy in a way that a designer can see: most problems about taking away are solved by adding, as a
careless solver would. Feedback and test are clean.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dino_value.language.text import format_example
from dino_value.seeds import key

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
THINGS = ("apples", "books", "coins", "pens", "cards", "shells")
MORE = ("gets", "finds", "buys")
FEWER = ("loses", "sells", "eats")
LARGEST = 9
_WORD = re.compile(r" ?\d+| ?\w+| ?[^\w\s]+|\s")  # a word with the space before it, as in byte-pair vocabularies


class Problem(NamedTuple):
    question: str
    answer: str

    def record(self) -> dict[str, str]:
        return {"question": self.question, "answer": self.answer}


def problem(rng: np.random.Generator, careless: float = 0.0, slip: float = 0.0) -> Problem:
    """One problem and a solution.

    Args:
        careless: how often something taken away is added instead, in the working and in the result.
        slip: how often the result is a random number.
    """
    name, thing = NAMES[rng.integers(len(NAMES))], THINGS[rng.integers(len(THINGS))]
    a, b = (int(n) for n in rng.integers(1, LARGEST + 1, 2))
    a, b, fewer = max(a, b), min(a, b), bool(rng.integers(2))
    verb = (FEWER if fewer else MORE)[rng.integers(len(MORE))]
    sign = "-" if fewer and rng.random() >= careless else "+"
    result = a - b if sign == "-" else a + b
    if rng.random() < slip:
        result = int(rng.integers(2 * LARGEST + 1))
    question = f"{name} has {a} {thing} and {verb} {b}. How many {thing} are left?"
    return Problem(question, f"{a} {sign} {b} = {result}\n#### {result}")


def write_problems(path: Path, count: int, seed: int, name: str, careless: float = 0.0, slip: float = 0.0) -> Path:
    """`count` problems as JSON Lines; the same for the same seed and name."""
    rng = np.random.default_rng(key(seed, "problems", name))
    rows = [json.dumps(problem(rng, careless, slip).record()) for _ in range(count)]
    path.write_text("\n".join(rows) + "\n")
    return path


def vocabulary() -> list[str]:
    """Every word that a problem in its form can have."""
    form = format_example(" Q has 1 and 1. How many are left?", "0 + - = 0\n#### 0")
    numbers = " ".join(map(str, range(2 * LARGEST + 1)))
    parts = (*form, " " + " ".join((*NAMES, *THINGS, *MORE, *FEWER, numbers)))
    return list(dict.fromkeys(itertools.chain.from_iterable(map(_WORD.findall, parts))))


def write_tiny_model(folder: Path, seed: int = 0, width: int = 64, layers: int = 3, heads: int = 4) -> Path:
    """A randomly initialised Llama of `layers` × `width`, with a tokenizer of words, as a Hugging Face folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<end>", "<unknown>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD.pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder
