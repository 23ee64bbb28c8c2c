"""The typed configuration of `dino-value language`; the conventions are those of dino_value/config.py.

Defaults are the method's published setting for the LoRA branch where it gives one (section 4); others say why.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from dino_value.config import ADAM_BURN_IN, LookaheadConfig, ScopeConfig, TrackConfig, load_structured
from dino_value.errors import UserError
from dino_value.value import LOOKAHEAD_OPTIMIZERS

CLOSED_FORMS = ("closed_form", "random_closed_form")
RANDOM = ("random", "random_closed_form")
"""Controls: a Gaussian of g_down's norms in place of it, drawn anew when it is."""
STEERED = ("value", "random", *CLOSED_FORMS)
"""Methods that take g_down."""
SOFT = (*STEERED, "uniform", "self_distillation")
METHODS = (*SOFT, "baseline", "sft")
"""Methods whose targets are not one-hot."""


@dataclass
class TextConfig:
    """Unlabeled text: problems and solutions, or plain documents."""

    stream: dict[str, str] = field(default_factory=dict)  # domain: file (.jsonl, .parquet, .txt) or hf:NAME
    weights: dict[str, float] = field(default_factory=dict)  # of the domains in the mixture; 1 where not given
    length: int = 1024  # tokens in a packed row
    packing: str = "concat"  # one after the other, as in the paper; or best_fit: whole documents, isolated
    buffer: int = 10_000  # examples among which the next one is drawn
    answer_only: bool = True  # loss on answers; false: on the prompt too. Plain documents count throughout


@dataclass
class LoRAConfig:
    """Low-rank weights on every linear projection (peft)."""

    rank: int = 8  # 0 trains all weights
    alpha: int = 16
    dropout: float = 0.05


@dataclass
class LearnerConfig:
    model: str = MISSING  # a folder, a GGUF file, a name in the Hugging Face cache or in architectures.QWEN
    tokenizer: str | None = None  # where it is not beside the model
    random_weights: bool = False  # only the architecture is taken from `model`
    checkpointing: bool = False  # recompute activations in the backward pass
    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass
class LanguageOptimConfig:
    lr: float = 2e-4  # full weights: 1.5e-5
    lr_end: float = 0.0
    warmup: float = 0.03  # share of the run (the paper's full branch)
    weight_decay: float = 0.0
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    batch_size: int = 4  # rows of a micro-batch
    accumulation: int = 8  # micro-batches of a step


@dataclass
class TargetsConfig:
    """Soft targets on the candidates {y} ∪ top-(K−1)."""

    candidates: int = 64  # K
    alpha_max: float = 0.5  # most mass that may leave the true token
    alpha: float | None = None  # of the methods without a gate; None: alpha_max
    temperature: float = 1.0  # τ of closed_form, in standard deviations of D over the batch
    chunk: int = 256  # tokens whose logits are in memory at once


@dataclass
class LanguageDesignerConfig:
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    lr: float = 1e-4
    gate: float = 0.0  # the gate's bias before training: α begins at alpha_max·sigmoid(gate)
    prior: str = "flat"  # r before training, as scores alone make it; or learner: its own prediction, which φ tilts
    kl: float = 0.0  # weight of α·KL(r‖the learner's own prediction), in standard deviations of D; the paper has none


@dataclass
class LanguageValueConfig:
    period: int = 8  # r: designer updates every r learner steps
    burn_in: int = 0  # steps of plain next-token training first
    warmup: int = 0  # designer-only updates when burn-in ends
    batch_size: int = 4  # rows of the meta unlabeled batch
    length: int = 256  # tokens in one of them
    direction: str = "dot"  # or cosine, adam, lookahead
    lookahead: LookaheadConfig = field(default_factory=LookaheadConfig)
    engine: str = "auto"  # the cheapest that is exact enough on the first meta batch
    tolerance: float = 5e-2  # relative error of φ's gradient above which an engine is refused
    scope: ScopeConfig = field(default_factory=ScopeConfig)


@dataclass
class LanguageFeedbackConfig:
    """Examples that say what is wanted: their answers' tokens, or a reward on sampled answers."""

    files: dict[str, str] = field(default_factory=dict)  # domain: file of prompts and answers
    limit: int | None = 1024  # only the first so many of each file
    test: list[str] = field(default_factory=list)  # evaluation files that feedback must not overlap
    batch_size: int = 16  # not given in the paper
    length: int = 512  # tokens; longer examples are refused, or cut from the right where `cut`
    cut: bool = False
    shuffle: bool = False  # a control: prompts carry each other's answers
    kind: str = "loss"  # answer-token cross-entropy; or reward: sampled answers scored by math-verify
    samples: int = 4  # answers sampled for each prompt (reward)
    new_tokens: int = 128  # of a sampled answer, at most (reward)


@dataclass
class BudgetConfig:
    seconds: float | None = None  # end after so much time in the loop, and run the schedules over it


@dataclass
class HeldConfig:
    """Answer loss on examples that teach nothing, while the run goes on."""

    file: str | None = None
    every: int = 100  # steps
    limit: int = 256  # examples, the first ones


@dataclass
class LanguageCheckpointConfig:
    every: int = 500
    keep: int = 1
    export: bool = True  # at the end write learner/ for transformers (LoRA: peft)


@dataclass
class LanguageConfig:
    out: str = MISSING
    method: str = "value"
    steps: int = 2000
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"  # bf16 autocast where the device has it; or bf16, fp32
    log_every: int = 10
    data: TextConfig = field(default_factory=TextConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    optim: LanguageOptimConfig = field(default_factory=LanguageOptimConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    designer: LanguageDesignerConfig = field(default_factory=LanguageDesignerConfig)
    value: LanguageValueConfig = field(default_factory=LanguageValueConfig)
    feedback: LanguageFeedbackConfig = field(default_factory=LanguageFeedbackConfig)
    held: HeldConfig = field(default_factory=HeldConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    checkpoint: LanguageCheckpointConfig = field(default_factory=LanguageCheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


_CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "precision": ("auto", "bf16", "fp32"),
    "data.packing": ("concat", "best_fit"),
    "designer.prior": ("flat", "learner"),
    "value.direction": ("dot", "cosine", "adam", "lookahead"),
    "value.lookahead.optimizer": LOOKAHEAD_OPTIMIZERS,
    "value.engine": ("auto", "linear", "finite_difference", "double_backward"),
    "feedback.kind": ("loss", "reward"),
}
_AT_LEAST: dict[str, float] = {
    "steps": 1,
    "seed": 0,
    "log_every": 1,
    "data.length": 2,
    "data.buffer": 1,
    "learner.lora.rank": 0,
    "optim.lr": 0,
    "optim.lr_end": 0,
    "optim.weight_decay": 0,
    "optim.batch_size": 1,
    "optim.accumulation": 1,
    "targets.candidates": 1,
    "targets.chunk": 1,
    "designer.hidden": 1,
    "designer.layers": 1,
    "designer.heads": 1,
    "designer.lr": 0,
    "designer.kl": 0,
    "value.period": 1,
    "value.burn_in": 0,
    "value.warmup": 0,
    "value.batch_size": 1,
    "value.length": 2,
    "value.lookahead.steps": 1,
    "value.lookahead.batches": 0,
    "feedback.batch_size": 1,
    "feedback.length": 2,
    "feedback.samples": 2,
    "feedback.new_tokens": 1,
    "held.every": 1,
    "held.limit": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
}
_ABOVE_ZERO = (
    "optim.clip",
    "targets.temperature",
    "value.lookahead.lr",
    "value.tolerance",
    "budget.seconds",
    "feedback.limit",
)
_SHARES = ("targets.alpha_max", "targets.alpha", "learner.lora.dropout", "optim.warmup")
_INFINITE = ("optim.clip", "targets.temperature")


def load_language_config(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LanguageConfig:
    """A YAML file or a packaged one (`language/lora`), with `key=value` overrides, checked.

    `data.stream=FILE` and `feedback.files=FILE` are short for one domain called `main`.

    Raises:
        UserError: as `dino_value.config.load_config`.
    """
    overrides = [re.sub(r"^(data\.stream|feedback\.files)=(?!\s*\{)", r"\1.main=", part) for part in overrides]
    config = load_structured(source, overrides, LanguageConfig)
    assert isinstance(config, LanguageConfig)
    return check(config)


def check(config: LanguageConfig) -> LanguageConfig:
    """Values that a type cannot rule out; returns `config`.

    Raises:
        UserError: one of them, named.
    """
    flat = _flat(dataclasses.asdict(config))
    for key, choices in _CHOICES.items():
        if flat[key] not in choices:
            raise UserError(f"{key}={flat[key]}: choose {', '.join(choices)}")
    for key, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value) and not (key in _INFINITE and value == math.inf):
            raise UserError(f"{key}={value}: must be finite")
    for key, least in _AT_LEAST.items():
        if flat[key] < least:
            raise UserError(f"{key}={flat[key]}: must be at least {least}")
    for key in _ABOVE_ZERO:
        if flat[key] is not None and flat[key] <= 0:
            raise UserError(f"{key}={flat[key]}: must be above 0")
    for key in _SHARES:
        if flat[key] is not None and not 0 <= flat[key] <= 1:
            raise UserError(f"{key}={flat[key]}: must lie in [0, 1]")
    if config.designer.hidden % config.designer.heads:
        raise UserError(f"designer.hidden={config.designer.hidden}: must be a multiple of designer.heads")
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise UserError(f"optim.betas={list(config.optim.betas)}: must lie in [0, 1)")
    _check_domains(config)
    _check_direction(config)
    return config


def _check_direction(config: LanguageConfig) -> None:
    v = config.value
    if config.method not in STEERED:
        return
    if v.direction == "adam" and v.burn_in < ADAM_BURN_IN:
        raise UserError(
            f"value.direction=adam with value.burn_in={v.burn_in}: it reads the second moments of the learner's "
            "optimizer, and those of its first steps point along a few coordinates alone (docs/language.md); set "
            f"value.burn_in to {ADAM_BURN_IN} or more"
        )
    if v.direction == "lookahead" and config.feedback.kind == "reward":
        raise UserError(
            "value.direction=lookahead trains a copy on given answers, and feedback.kind=reward scores sampled ones; "
            "choose feedback.kind=loss or value.direction=dot"
        )


def _check_domains(config: LanguageConfig) -> None:
    stream, files, weights = config.data.stream, config.feedback.files, config.data.weights
    if not stream:
        raise UserError("data.stream is empty: give data.stream=FILE, or data.stream.NAME=FILE for each domain")
    if strange := sorted(set(weights) - set(stream)):
        raise UserError(f"data.weights.{strange[0]}: no such domain in data.stream ({', '.join(stream)})")
    if bad := next((name for name, weight in weights.items() if not 0 < weight < math.inf), None):
        raise UserError(f"data.weights.{bad}={weights[bad]}: must be above 0 and finite")
    if config.method in (*STEERED, "sft") and not files:
        raise UserError(f"method={config.method} needs feedback: give feedback.files=FILE (prompts and answers)")
    if len(files) > 1 and not set(files) <= set(stream):
        raise UserError(
            f"feedback.files has the domains {', '.join(files)} and data.stream {', '.join(stream)}: with several, "
            "each is paired with the stream of its own name"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found[prefix + name] = value
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
    return found
