"""What is odd about label maps, with what was assumed of them: ids may begin at 0, lists may have no header."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from dino_value.data.conventions import conventions
from dino_value.data.labelled import IGNORE, LabelledSource
from dino_value.data.pixels import look_at, remarks
from dino_value.errors import UserError

LOOKED_AT = 64
"""Label maps that are looked at when a set is opened, evenly spaced."""
SHOWN = 3


def count_ids(target: Tensor) -> dict[int, int]:
    """Pixels of each id as files have them: 0 is ignored, k the k-th class."""
    ids, counts = torch.where(target == IGNORE, 0, target + 1).unique(return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def remark(counts: Mapping[int, int], names: Sequence[str], whole: bool) -> str | None:
    """One line about ids that look as if other things were meant; None where nothing does.

    Args:
        counts: pixels of each id of the files.
        names: of the classes 1 … N.
        whole: all of a split that teaches was counted, so that a class without pixels never occurs.
    """
    seen = {index for index, count in counts.items() if index and count}
    absent = [name for index, name in enumerate(names, 1) if index not in seen]
    found = []
    if counts.get(0, 0) and seen and seen == set(range(1, len(names))):
        found.append(f"id {len(names)} = {names[-1]} never occurs: if ids begin at 0, add 1 to them")
    elif len(seen) == 1:
        found.append(f"no other class than {names[min(seen) - 1]} occurs, so that to predict it is always right")
    elif absent and seen and whole:
        more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
        found.append(f"never there: {', '.join(absent[:SHOWN])}{more}")
    if not found:
        return None
    share = counts.get(0, 0) / max(1, sum(counts.values()))
    last = f" … id {len(names)} = {names[-1]}" if len(names) > 1 else ""
    return f"id 0 is ignored: {share:.0%} of pixels; id 1 = {names[0]}{last}; {'; '.join(found)}"


def header_remark(line: str) -> str | None:
    """What to say of a class list's first line, which is taken for its header; None if it looks like one."""
    words = {word.strip().lower() for word in line.split("\t")}
    if words & {"idx", "name", "ratio"}:
        return None
    return f"the first line, {line.strip()!r}, is taken for a header; if it is a class, put a line Idx<TAB>Name first"


def oddities(source: LabelledSource, teaches: bool, target: Callable[[int], Tensor] | None = None) -> list[str]:
    """What to say of a labelled set after a look at some of its files; nothing of what cannot be read.

    Args:
        teaches: it is a training split.
        target: reads a label map without its image.
    """
    count = len(source)
    places = range(count) if count <= LOOKED_AT else [place * count // LOOKED_AT for place in range(LOOKED_AT)]
    found = remarks([look_at(source.name(place)) for place in places], conventions(), labelled=True)
    if source.kind == "seg":
        counts = Counter[int]()
        for place in places:
            with suppress(UserError):
                counts.update(count_ids(target(place) if target is not None else source.load(place)[1]))
        said = remark(counts, source.class_names, teaches and len(places) == count)
        found += [said] if said else []
    return found
