"""The learner: any Hugging Face causal language model, whole or by LoRA, and its cut at the scope's first layer."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dino_value.config import ScopeConfig
from dino_value.errors import UserError
from dino_value.files import follow_umask
from dino_value.language.architectures import architecture
from dino_value.language.config import LearnerConfig
from dino_value.language.stream import Batch, attention
from dino_value.value import Scope, last_blocks, matching

_AGREEMENT = 1e-4  # relative difference between a model and its parts put together


class Cut(NamedTuple):
    """What the tail needs to go on from the scope's first layer."""

    hidden: Tensor
    """[B L d], what enters it."""
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    """Other arguments of each layer of the tail, as the model itself passed them."""


class Pass(NamedTuple):
    final: Tensor
    """[B L d], after the last norm: what the head reads."""
    cut: Cut


class Learner(nn.Module):
    """A causal LM as trunk, tail and head.

    Args:
        model: a Hugging Face causal LM, with LoRA weights in it or without.
        settings: the scope S.

    Raises:
        UserError: the scope matches nothing; or the model's logits are not one linear head on blocks and a norm.
    """

    def __init__(self, model: nn.Module, settings: ScopeConfig) -> None:
        super().__init__()
        self.model: Any = model
        patterns = settings.patterns
        try:
            self.scope: Scope = matching(model, patterns) if patterns else last_blocks(model, settings.blocks)
        except ValueError as error:
            raise UserError(f"value.scope: {error}") from None
        self._check()

    @property
    def decoder(self) -> Any:
        return self.model.base_model

    @property
    def head(self) -> nn.Linear:
        head: nn.Linear = self.model.get_output_embeddings()
        return head

    @property
    def embedding(self) -> Tensor:
        """The table of input embeddings [V d], detached."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight.detach()

    @property
    def vocabulary(self) -> int:
        return self.head.weight.shape[0]

    @property
    def window(self) -> int:
        """Tokens of context that the model has positions for."""
        return int(getattr(self.model.config, "max_position_embeddings", 2**31))

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def parameters_in_scope(self) -> dict[str, Tensor]:
        """θ_S, detached."""
        return self.scope.parameters(self.model)

    def run(self, batch: Batch) -> Pass:
        """All of the decoder, and what its tail would need to run again."""
        start, given = self.scope.start, attention(batch)
        met: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            met.append((arguments, options))

        hooks = [part.register_forward_pre_hook(note, with_kwargs=True) for part in self._tail()]
        try:
            final: Tensor = self.decoder(input_ids=batch.ids, use_cache=False, **given).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        if start is None:
            return Pass(final, Cut(batch.ids, (((), given),)))
        return Pass(final, Cut(met[0][0][0], tuple((arguments[1:], options) for arguments, options in met)))

    def finish(self, cut: Cut) -> Tensor:
        """The tail: from the scope's first layer to the final hidden states [B L d]."""
        hidden = cut.hidden
        if self.scope.start is None:
            whole: Tensor = self.decoder(input_ids=hidden, use_cache=False, **cut.calls[0][1]).last_hidden_state
            return whole
        for part, (arguments, options) in zip(self._tail(), cut.calls, strict=True):
            out = part(hidden, *arguments, **options)
            hidden = out if isinstance(out, Tensor) else out[0]
        return hidden

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self, *arguments)

    def at(self, parameters: dict[str, Tensor], function: Callable[..., Any], *arguments: Any) -> Any:
        """function(learner, *arguments) with other values of θ_S; all other parameters are constants."""
        moved = {f"model.{name}": value for name, value in parameters.items()}
        fixed = {f"model.{name}": value.detach() for name, value in self.model.named_parameters()}
        return functional_call(self, {**fixed, **moved}, (function, *arguments))

    def _tail(self) -> list[nn.Module]:
        """Blocks from the scope's first one on, and the norm after them; none where everything is tail."""
        if self.scope.start is None:
            return []
        children = list(self.decoder.children())
        blocks = next(part for part in children if isinstance(part, nn.ModuleList) and len(part))
        after = [part for part in children[children.index(blocks) + 1 :] if next(part.parameters(), None) is not None]
        return [*blocks[self.scope.start :], after[0]]

    @torch.no_grad()
    def _check(self) -> None:
        """That the parts put together give the model's own logits."""
        name, training = type(self.model).__name__, self.training
        self.eval()
        ids = torch.arange(min(8, self.window), device=self.embedding.device)[None] % self.vocabulary
        whole: Tensor = self.model(input_ids=ids, use_cache=False).logits
        try:
            found = self.run(Batch(ids, ids, ids[0]))
            again = self.at(self.parameters_in_scope(), Learner.finish, found.cut)
            parts = self.head(again)
        except (AttributeError, TypeError, ValueError, IndexError, StopIteration) as error:
            raise UserError(f"learner.model: {name} does not come apart into blocks, norm and head ({error})") from None
        if not torch.allclose(parts.float(), whole.float(), rtol=_AGREEMENT, atol=_AGREEMENT):
            raise UserError(f"learner.model: the logits of {name} are not a linear head on its blocks; not supported")
        self.train(training)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout and activation checkpointing."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def load_tokenizer(settings: LearnerConfig) -> Any:
    """Raises:
    UserError: there is none.
    """
    transformers = _transformers()
    folder, options = _located(settings.model)
    try:
        if settings.tokenizer is not None:
            folder, options = settings.tokenizer, {}
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # the library raises what it likes
        where = settings.tokenizer or settings.model
        raise UserError(
            f"{where}: no tokenizer to be read ({_first_line(error)}); give learner.tokenizer=DIR"
        ) from None


def load_model(settings: LearnerConfig, device: torch.device, training: bool = True) -> Any:
    """The causal LM in float32 on `device`, with fresh LoRA weights where they are asked for.

    Args:
        training: count gradients and optimizer state in the memory estimate, and add LoRA.

    Raises:
        UserError: it cannot be read, or cannot fit in memory, which is estimated before anything is loaded.
    """
    transformers = _transformers()
    folder, options = _located(settings.model)
    rank = settings.lora.rank if training else 0
    named = architecture(settings.model)
    if named is not None and not settings.random_weights:
        raise UserError(
            f"learner.model={settings.model} is an architecture without weights; set learner.random_weights=true, or "
            "give a model's folder"
        )
    try:
        config = named or transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **options)
        with torch.device("meta"):
            empty = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise UserError(f"learner.model={settings.model}: no model to be read ({_first_line(error)})") from None
    count, there = sum(p.numel() for p in empty.parameters()), available_memory(device)
    needed = memory_needed(count, training and not rank)
    if needed > there:
        lora = " or learner.lora.rank=8" if memory_needed(count, False) < min(there, needed) else ""
        raise UserError(
            f"learner.model={settings.model} needs at least {needed / 2**30:.1f} GiB on {device} and "
            f"{there / 2**30:.1f} GiB are free; choose a smaller model{lora}"
        )
    if settings.random_weights:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, **options, **_unpacked(transformers, options)
            )
        except Exception as error:
            raise UserError(
                f"learner.model={settings.model}: its weights cannot be read ({_first_line(error)}); "
                "learner.random_weights=true takes the architecture only"
            ) from None
    if rank:
        model = with_lora(model, settings)
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if rank:
            model.enable_input_require_grads()
    return model.to(device)


def with_lora(model: Any, settings: LearnerConfig) -> Any:
    """The same model with LoRA weights on all its linear projections; these alone are trained."""
    try:
        import peft
    except ImportError:
        raise UserError("learner.lora needs peft: pip install 'dino-value[language]', or learner.lora.rank=0") from None
    wanted = peft.LoraConfig(
        r=settings.lora.rank,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, wanted).get_base_model()


def memory_needed(parameters: int, trained: bool) -> int:
    """Bytes at least: float32 weights, and where they are trained gradients and Adam's two moments; no activations."""
    return parameters * (16 if trained else 4)


def available_memory(device: torch.device) -> int:
    """Free bytes on a CUDA device, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def export_learner(model: Any, tokenizer: Any, folder: Path) -> None:
    """Weights and tokenizer for transformers, LoRA merged into the weights it was added to."""
    merged = copy.deepcopy(model)
    for name, part in list(merged.named_modules()):
        if hasattr(part, "lora_A") and hasattr(part, "merge"):
            part.merge()
            above, _, last = name.rpartition(".")
            setattr(merged.get_submodule(above), last, part.get_base_layer())
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    follow_umask(folder)


def _located(model: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for a folder, a GGUF file or a name in the cache."""
    path = Path(model)
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (model, {})


def _unpacked(transformers: Any, options: dict[str, str]) -> dict[str, Any]:
    """Newer transformers may keep a GGUF file's weights quantized, which neither train nor can be saved."""
    if "gguf_file" in options and hasattr(transformers, "GgufConfig"):
        return {"quantization_config": transformers.GgufConfig(dequantize=True)}
    return {}


def _first_line(error: Exception) -> str:
    if "couldn't connect" in str(error):  # nobody tried: the library was told to stay with its cache
        return "no such folder, and not in the local Hugging Face cache; nothing is downloaded"
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("dino-value language needs transformers: pip install 'dino-value[language]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@torch.no_grad()
def load_trained(learner: Learner, state: dict[str, Any]) -> None:
    """The trained weights of a checkpoint.

    Raises:
        UserError: of another model.
    """
    trained, found = learner.trained(), state["learner"]
    if {name: value.shape for name, value in trained.items()} != {name: value.shape for name, value in found.items()}:
        raise UserError("the checkpoint is of another model, or of other LoRA settings")
    for name, value in trained.items():
        value.copy_(found[name])
