"""Scope S: which of the learner's parameters the value is measured on, and from which block they begin."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


@dataclass(frozen=True)
class Scope:
    """Parameter names of S, in the module's order, and `start`: the first block that holds any of them.

    Everything before block `start` is the trunk; `start` is 0 when S reaches outside the blocks and what follows them.
    """

    names: tuple[str, ...]
    start: int

    def parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """The current values of S, detached: the point that an engine moves from."""
        everything = dict(module.named_parameters())
        return {name: everything[name].detach() for name in self.names}


def last_blocks(module: nn.Module, count: int, after: Sequence[str] = ("norm",)) -> Scope:
    """The last `count` blocks of the numbered list `blocks`, and the modules named in `after` that follow it.

    Raises:
        ValueError: the module has no numbered blocks, or fewer than `count`.
    """
    names = [name for name, _ in module.named_parameters()]
    total = 1 + max((int(found[1]) for name in names if (found := _BLOCK.search(name))), default=-1)
    if not 1 <= count <= total:
        raise ValueError(f"scope of the last {count} blocks: this learner has {total}; choose 1 … {total}")
    block = "|".join(str(index) for index in range(total - count, total))
    # The trailing modules sit beside `blocks`, not inside a block.
    root = next(name[: found.start()] for name in names if (found := _BLOCK.search(name)))
    prefix = f"{re.escape(root)}\\." if root else ""
    trailing = "|".join(re.escape(name) for name in after)
    patterns = [rf"^{prefix}blocks\.({block})\.", rf"^{prefix}({trailing})\."]
    # Some models end without a norm of their own.
    return matching(module, [pattern for pattern in patterns if any(re.search(pattern, name) for name in names)], after)


def matching(module: nn.Module, patterns: Iterable[str], after: Sequence[str] = ("norm",)) -> Scope:
    """The parameters whose names match any of the regular expressions `patterns`.

    Raises:
        ValueError: a pattern that is not a regular expression, or matches nothing; near names are listed.
    """
    names = [name for name, _ in module.named_parameters()]
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"scope pattern {pattern!r} is not a regular expression: {error}") from None
        hits = [name for name in names if re.search(pattern, name)]
        if not hits:
            plain = re.sub(r"[^\w.]", "", pattern)
            near = difflib.get_close_matches(plain, names, n=3, cutoff=0.3) or names[-3:]
            raise ValueError(f"scope pattern {pattern!r} matches no parameter; near names: {', '.join(near)}")
        chosen.update(hits)
    if not chosen:
        raise ValueError(f"the scope is empty; the learner's parameters are named like {', '.join(names[-3:])}")
    ordered = tuple(name for name in names if name in chosen)
    return Scope(ordered, _start(ordered, after))


def _start(names: Iterable[str], after: Sequence[str]) -> int:
    first: int | None = None
    for name in names:
        if found := _BLOCK.search(name):
            first = int(found[1]) if first is None else min(first, int(found[1]))
        elif not any(part in after for part in name.split(".")):
            return 0
    return 0 if first is None else first


def with_values(names: Mapping[str, Tensor], values: Iterable[Tensor]) -> dict[str, Tensor]:
    """The same names with other tensors."""
    return dict(zip(names, values, strict=True))
