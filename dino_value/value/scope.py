"""Scope S: which of the learner's parameters the value is measured on, and from which block they begin.

Only parameters that require a gradient can be in S: a frozen one never moves, so no step on it has a value. Under
LoRA, where the base weights are frozen, "the last k layers" are therefore their LoRA weights.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

# What timm and Hugging Face call the numbered list of blocks, and what they put behind it.
_BLOCK = re.compile(r"(?:^|(?P<above>.*?)\.)(?P<list>blocks|layers|layer|h)\.(?P<index>\d+)\.")
FINAL_NORMS = (
    *("norm", "fc_norm", "final_norm", "norm_f", "ln_f", "ln_out", "ln_post"),
    *("layer_norm", "layernorm", "final_layer_norm", "final_layernorm", "post_layernorm"),
)
"""Names of the norm that follows the last block."""
HEADS = ("head", "lm_head", "embed_out")
"""Names of what follows that norm."""


@dataclass(frozen=True)
class Scope:
    """Parameter names of S, in the module's order, and `start`: the first block that holds any of them.

    Everything before block `start` is the trunk; `start` is the number of blocks when S holds only what follows them.
    It is None when S reaches what lies before the blocks, or in a module without blocks: then nothing is trunk, and
    the tail is the whole learner.
    """

    names: tuple[str, ...]
    start: int | None

    def parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """The current values of S, detached: the point that an engine moves from."""
        everything = dict(module.named_parameters())
        return {name: everything[name].detach() for name in self.names}


def last_blocks(module: nn.Module, count: int, after: Sequence[str] = FINAL_NORMS) -> Scope:
    """The last `count` blocks of a timm ViT or a Hugging Face causal LM, and the norm that follows them.

    The blocks are the outermost numbered list called `blocks`, `layers`, `layer` or `h`; the norm is what is named in
    `after`, beside that list or above it. With LoRA these are the LoRA weights of those blocks.

    Raises:
        ValueError: the module has no numbered blocks, or fewer than `count`; or nothing in them can be trained.
    """
    names = [name for name, _ in module.named_parameters()]
    blocks = _Blocks.find(names)
    if blocks is None:
        raise ValueError(
            f"scope of the last {count} blocks: this learner has 0 (no numbered list called blocks, layers, layer or "
            "h); choose parameters by name patterns"
        )
    if not 1 <= count <= blocks.count:
        raise ValueError(
            f"scope of the last {count} blocks: this learner has {blocks.count}; choose 1 … {blocks.count}"
        )
    first = blocks.count - count
    chosen = [
        name
        for name in _trainable(module)
        if ((index := blocks.index(name)) is not None and index >= first) or blocks.followed_by(name, after)
    ]
    if not any(blocks.index(name) is not None for name in chosen):
        raise ValueError(f"scope of the last {count} blocks: all their parameters are frozen; unfreeze some")
    return Scope(tuple(chosen), _start(chosen, blocks, after))


def matching(module: nn.Module, patterns: Iterable[str], after: Sequence[str] = FINAL_NORMS + HEADS) -> Scope:
    """The trainable parameters whose names match any of the regular expressions `patterns`.

    `r"lora_"` is every LoRA weight; `r"layers\\.(22|23)\\..*lora_"` those of two layers.

    Args:
        after: names of modules that run after the blocks. Whatever else lies outside the blocks counts as before.

    Raises:
        ValueError: a pattern that is not a regular expression, or matches nothing that can be trained; near names are
            listed.
    """
    names, trainable = [name for name, _ in module.named_parameters()], _trainable(module)
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"scope pattern {pattern!r} is not a regular expression: {error}") from None
        hits = [name for name in trainable if re.search(pattern, name)]
        if not hits:
            raise ValueError(f"scope pattern {pattern!r} matches no parameter{_hint(module, pattern)}")
        chosen.update(hits)
    if not chosen:
        raise ValueError(f"the scope is empty; the learner's parameters are named like {', '.join(names[-3:])}")
    ordered = tuple(name for name in trainable if name in chosen)
    return Scope(ordered, _start(ordered, _Blocks.find(names), after))


def everything(module: nn.Module, after: Sequence[str] = FINAL_NORMS + HEADS) -> Scope:
    """Every trainable parameter.

    Raises:
        ValueError: the learner has none.
    """
    return matching(module, [""], after)


@dataclass(frozen=True)
class _Blocks:
    """The numbered list of blocks: the module that holds it, its name there, and its length."""

    above: str
    name: str
    count: int

    @classmethod
    def find(cls, names: Iterable[str]) -> _Blocks | None:
        """The outermost list; of several as far out the last one, a decoder rather than its encoder."""
        counts: dict[tuple[str, str], int] = {}
        for name in names:
            if found := _BLOCK.match(name):
                key = (found["above"] or "", found["list"])
                counts[key] = max(counts.get(key, 0), int(found["index"]) + 1)
        if not counts:
            return None
        above, name = min(reversed(counts), key=lambda key: len(key[0].split(".")) if key[0] else 0)
        return cls(above, name, counts[above, name])

    def index(self, name: str) -> int | None:
        """Which block holds the parameter `name`."""
        found = _BLOCK.match(name)
        inside = found is not None and (found["above"] or "", found["list"]) == (self.above, self.name)
        return int(found["index"]) if found is not None and inside else None

    def followed_by(self, name: str, after: Sequence[str]) -> bool:
        """Whether `name` belongs to a module of `after` that sits beside the list or above it, and nowhere else."""
        *above, _ = name.split(".")
        path = self.above.split(".") if self.above else []
        depth = next((i for i, part in enumerate(above) if i >= len(path) or part != path[i]), None)
        return depth is not None and above[depth] in after


def _start(names: Iterable[str], blocks: _Blocks | None, after: Sequence[str]) -> int | None:
    if blocks is None:
        return None
    first = blocks.count
    for name in names:
        index = blocks.index(name)
        if index is None and not blocks.followed_by(name, after):
            return None
        first = min(first, blocks.count if index is None else index)
    return first


def _trainable(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def _hint(module: nn.Module, pattern: str) -> str:
    """Why `pattern` matches nothing that can be trained."""
    parameters = dict(module.named_parameters())
    if frozen := next((name for name in parameters if re.search(pattern, name)), None):
        return f" that is trained: {frozen} is frozen; unfreeze it or choose another"
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if re.search(pattern, name):
            tied = next(other for other, value in parameters.items() if value is parameter)
            return f" of its own: {name} is tied to {tied}; name that one"
    plain = re.sub(r"[^\w.]", "", pattern)
    near = difflib.get_close_matches(plain, parameters, n=3, cutoff=0.3) or list(parameters)[-3:]
    return f"; near names: {', '.join(near)}"


def with_values(names: Mapping[str, Tensor], values: Iterable[Tensor]) -> dict[str, Tensor]:
    """The same names with other tensors."""
    return dict(zip(names, values, strict=True))
