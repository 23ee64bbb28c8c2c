"""A tiny model, synthetic problems and a configuration whose steps take hundredths of a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_value.config import ScopeConfig
from dino_value.language.arithmetic import write_problems, write_tiny_model
from dino_value.language.config import LanguageConfig, LearnerConfig, load_language_config
from dino_value.language.learner import Learner, load_model, load_tokenizer
from dino_value.language.text import Encoder

TINY = """
steps: 4
log_every: 1
device: cpu
precision: fp32
learner: {model: ROOT/model, lora: {rank: 0}}
data: {length: 40, stream: {main: ROOT/stream.jsonl}, buffer: 20}
optim: {lr: 1.0e-2, batch_size: 2, accumulation: 2}
targets: {candidates: 8, chunk: 16}
designer: {hidden: 16, layers: 1, heads: 2, lr: 1.0e-2}
value: {period: 2, batch_size: 2, length: 40}
feedback: {files: {main: ROOT/feedback.jsonl}, length: 64, batch_size: 4}
checkpoint: {every: 2, keep: 9, export: false}
"""


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, stream.jsonl (noisy), feedback.jsonl and test.jsonl (clean), tiny.yaml."""
    folder = tmp_path_factory.mktemp("language")
    write_tiny_model(folder / "model", width=16, layers=3, heads=2)
    write_problems(folder / "stream.jsonl", 200, 0, "stream", 0.6, 0.1)
    write_problems(folder / "feedback.jsonl", 16, 0, "feedback")
    write_problems(folder / "test.jsonl", 12, 0, "test")
    (folder / "tiny.yaml").write_text(TINY.replace("ROOT", str(folder)))
    return folder


@pytest.fixture
def tiny(root: Path, tmp_path: Path) -> Callable[..., LanguageConfig]:
    """The tiny configuration with `key=value` overrides; out= is a fresh folder unless given."""

    def make(*overrides: str) -> LanguageConfig:
        return load_language_config(root / "tiny.yaml", [f"out={tmp_path / 'run'}", *overrides])

    return make


@pytest.fixture
def learner(root: Path) -> Learner:
    torch.manual_seed(0)
    return Learner(load_model(LearnerConfig(str(root / "model")), torch.device("cpu"), False), ScopeConfig())


@pytest.fixture(scope="session")
def tokenizer(root: Path) -> Any:
    return load_tokenizer(LearnerConfig(str(root / "model")))


@pytest.fixture(scope="session")
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer)
