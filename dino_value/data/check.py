"""`dino-value data check`: what lies under a path, and what is wrong with it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dino_value.data import depth_maps, unlabeled_files
from dino_value.data.conventions import conventions
from dino_value.data.folders import list_images, not_read, read_image
from dino_value.data.labelled import LabelledSource, Split
from dino_value.data.labels import count_ids, remark
from dino_value.data.layouts import Layout, open_labelled
from dino_value.data.nyuv2 import MAT_NAME, NYUFolder
from dino_value.data.pixels import SHALLOW, Look, as_rgb, look_at, remarks, shallow
from dino_value.data.revisited import NAMES, open_revisited
from dino_value.data.splits import content_hash
from dino_value.data.tars import TarMember, is_shards
from dino_value.errors import UserError

CheckLayout = Literal["auto", "ade20k", "nyuv2", "imagefolder", "revisited", "images"]
NEAR_BITS = 4
"""Of a perceptual hash's 64: a scaled or recompressed copy differs in fewer almost always (docs/data/check.md)."""
SHOWN = 5


@dataclass
class Part:
    """What was found in one split. Depths in metres; `unknown` is the share of pixels without a depth."""

    name: str
    images: int = 0
    groups: int = 0
    smallest: str = ""
    median: str = ""
    largest: str = ""
    classes: int = 0
    class_share: dict[str, float] = field(default_factory=dict)  # of images, or of labelled pixels
    depth: dict[str, float] = field(default_factory=dict)  # min, median (of the images' medians), max, unknown
    copies: int = 0  # images whose content an earlier one of the split has
    unreadable: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str | None = None  # the split cannot be opened


@dataclass
class Shared:
    """Images of `right` that are in `left` too: the same content, or nearly the same look."""

    left: str
    right: str
    kind: Literal["copy", "near-duplicate"]
    images: int
    examples: list[tuple[str, str]]


@dataclass
class Report:
    root: str
    layout: str
    parts: list[Part]
    shared: list[Shared]
    notes: list[str]

    @property
    def usable(self) -> bool:
        """Whether training and evaluation would take the data as they are."""
        return not any(part.error or part.unreadable for part in self.parts)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Seen(NamedTuple):
    """One image: its size, a hash of its content, its perceptual hash ±1 [64], and what its target says."""

    name: str
    height: int
    width: int
    content: str
    look: Tensor | None
    target: dict[str, Any]
    header: Look | None = None
    shallow: bool = False


def check_data(
    root: str,
    layout: CheckLayout = "auto",
    unlabeled: str | None = None,
    near: int | None = None,
    field: str | None = None,
) -> Report:
    """Read all of a data set once and say what it holds.

    Args:
        root: a labelled set, a folder of images, or WebDataset shards.
        layout: how its files lie; `auto` recognises it.
        unlabeled: a stream of images to compare with the held-out ones.
        near: perceptual hashes that differ in at most so many bits are near-duplicates; below 0 none are looked for;
            None is `NEAR_BITS`, where imagehash is installed.
        field: of shards, which member of a sample is its image (`data.field`).

    Raises:
        UserError: nothing that can be recognised, or `near` is asked for without imagehash.
    """
    chosen = recognise(root) if layout == "auto" else layout
    notes: list[str] = []
    bits = NEAR_BITS if near is None else near
    look: Callable[[Tensor], Tensor] | None = None
    if bits >= 0:
        try:
            look = perceptual_hash()
        except UserError as error:
            if near is not None:
                raise
            notes.append(f"near-duplicates were not looked for: {error}")
    for path in (root, unlabeled) if chosen == "images" else (unlabeled,):
        left = not_read(path) if path is not None and Path(path).is_dir() else ""
        notes += [f"{path}: not read: {left}"] if left else []
    if chosen == "images" and unlabeled is None:
        notes += inner_sets(root)
    parts, seen = [], {}
    for name, opener in openers(root, chosen, unlabeled, field).items():
        part, found = _inspect(name, opener, look)
        parts.append(part)
        seen[name] = found
    shared = []
    for left, right in _pairs(list(seen)):
        shared += _copies(left, seen[left], right, seen[right])
        if look is not None:
            shared += _near(left, seen[left], right, seen[right], bits)
    return Report(root, chosen, parts, shared, notes)


def recognise(root: str) -> CheckLayout:
    """The layout under `root`.

    Raises:
        UserError: no such folder.
    """
    path = Path(root)
    if not path.is_dir() and is_shards(root):
        return "images"
    if not path.is_dir():
        raise UserError(f"{root}: no such folder")
    if (path / "annotations").is_dir() or (path / "objectInfo150.txt").exists():
        return "ade20k"
    if (path / MAT_NAME).exists() or any(path.glob("*train*.txt")) or any(path.glob("*test*.txt")):
        return "nyuv2"
    if any(next(path.glob(pattern), None) for pattern in ("gnd_*.pkl", "*/gnd_*.pkl")):
        return "revisited"
    if (path / "train").is_dir() and (path / "val").is_dir():
        return "imagefolder"
    with suppress(UserError):
        if depth_maps(list_images(path)):
            return "nyuv2"
    return "images"


def inner_sets(root: str) -> list[str]:
    """A hint for each folder directly under `root` that is a labelled set of its own."""
    folders = sorted(path for path in Path(root).glob("*") if path.is_dir())
    layouts = [(path, recognise(str(path))) for path in folders]
    return [
        f"{path} is a labelled set ({layout}), read here as images: check it by itself"
        for path, layout in layouts
        if layout != "images"
    ]


def other_place(root: str, layout: Layout) -> str:
    """What a root that could not be opened was perhaps meant to be, as the end of a message; or nothing."""
    path = Path(root)
    if not path.is_dir():
        return ""
    found = recognise(root)
    if found not in (layout, "images"):
        return f" (this is the layout {found})"
    inner = [str(one) for one in sorted(path.iterdir()) if one.is_dir() and recognise(str(one)) == layout]
    return f" (did you mean {inner[0]}?)" if inner and found != layout else ""


class _Files:
    """Images without labels, as a source."""

    def __init__(self, paths: Sequence[Path] | Sequence[TarMember]) -> None:
        self.paths, self.told = paths, conventions()

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> tuple[Tensor, None]:
        return read_image(self.paths[index], self.told), None

    def name(self, index: int) -> str:
        return str(self.paths[index])


Opened = LabelledSource | _Files


def openers(
    root: str, layout: CheckLayout, unlabeled: str | None, field: str | None = None
) -> dict[str, Callable[[], Opened]]:
    """What opens each part of a data set; held-out parts come after those that teach."""
    found: dict[str, Callable[[], Opened]] = {}
    if unlabeled is not None:
        found["unlabeled"] = lambda: _Files(unlabeled_files(unlabeled, field))
    if layout == "images":
        found["images"] = lambda: _Files(unlabeled_files(root, field))
    elif layout == "revisited":
        for name in NAMES:
            if any(folder.exists() for folder in (Path(root) / name, Path(root) / f"gnd_{name}.pkl")):
                found[name] = lambda name=name: _Files(open_revisited(root, name).database)  # type: ignore[misc]
    else:
        for split in get_args(Split):
            found[split] = lambda split=split: open_labelled(cast(Layout, layout), root, split, warn=False)  # type: ignore[misc]
    return found


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Which parts are compared: whatever teaches with whatever is held out."""
    teaching = [name for name in names if name in ("unlabeled", "training")]
    held_out = [name for name in names if name not in ("unlabeled", "training")]
    return [(left, right) for left in teaching for right in held_out]


def _inspect(
    name: str, opener: Callable[[], Opened], look: Callable[[Tensor], Tensor] | None
) -> tuple[Part, list[Seen]]:
    part = Part(name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            source = opener()
        except UserError as error:
            part.error = str(error)
            return part, []
        found = _read_all(name, source, look)
    part.notes = sorted({str(warning.message) for warning in said if warning.category is UserWarning})
    part.unreadable = [line for line in found if isinstance(line, str)]
    seen = [item for item in found if isinstance(item, Seen)]
    part.notes += _remarks(seen, labelled=not isinstance(source, _Files))
    if isinstance(source, NYUFolder):
        part.notes.append(f"depth maps in integers are read as {source.scale:g} units a metre (data.depth_units)")
    if not isinstance(source, _Files) and source.kind == "seg":
        ids = Counter[int]()
        for item in seen:
            ids.update(item.target["ids"])
        odd = remark(ids, source.class_names, whole=name == "training")
        part.notes += [odd] if odd else []
    part.images = len(source)
    part.copies = len(seen) - len({item.content for item in seen})
    if not isinstance(source, _Files):
        part.groups = len({source.group(index) for index in range(len(source))})
        part.classes = source.num_classes
        _sum_up_targets(part, seen, source.class_names)
        if seen and source.kind == "depth" and not part.depth:
            part.error = "not one pixel has a known depth"
        if seen and source.kind == "seg" and not any(part.class_share.values()):
            part.error = "not one pixel is labelled: all are 0 (other)"
    if seen:
        sizes = sorted(seen, key=lambda item: item.height * item.width)
        part.smallest, part.median, part.largest = (
            f"{item.width}×{item.height}" for item in (sizes[0], sizes[len(sizes) // 2], sizes[-1])
        )
    return part, seen


def _read_all(name: str, source: Opened, look: Callable[[Tensor], Tensor] | None) -> list[Seen | str]:
    def read(index: int) -> Seen | str:
        try:
            image, target = source.load(index)
            content = content_hash(source, index, image)
        except (UserError, OSError) as error:
            return " ".join(str(error).split())
        height, width = image.shape[-2:]
        header = look_at(source.paths[index] if isinstance(source, _Files) else source.name(index))
        kind = None if isinstance(source, _Files) else source.kind
        return Seen(
            source.name(index),
            height,
            width,
            content,
            None if look is None else look(image),
            {} if target is None else _describe(kind, target),
            header,
            shallow(header, image),
        )

    console = Console(stderr=True)
    with ThreadPoolExecutor() as pool:
        rows = pool.map(read, range(len(source)))
        return list(track(rows, name, len(source), console=console, transient=True, disable=not console.is_terminal))


def _remarks(seen: Sequence[Seen], labelled: bool) -> list[str]:
    """What readers do with the pictures that their owner may not expect."""
    dark = sum(item.shallow for item in seen)
    found = remarks([item.header for item in seen], conventions(), labelled)
    return [*found, *([f"{dark} of {len(seen)} images {SHALLOW}"] if dark else [])]


def _describe(kind: str | None, target: Tensor) -> dict[str, Any]:
    if kind == "classes":
        return {"counts": {int(target): 1}}
    if kind == "seg":
        ids = count_ids(target)
        return {"ids": ids, "counts": {index - 1: count for index, count in ids.items() if index}}
    known = target[target > 0]
    unknown = 1 - len(known) / max(1, target.numel())
    if not len(known):
        return {"unknown": unknown}
    return {"min": float(known.min()), "median": float(known.median()), "max": float(known.max()), "unknown": unknown}


def _sum_up_targets(part: Part, seen: Sequence[Seen], class_names: Sequence[str]) -> None:
    counts: Counter[int] = Counter()
    for item in seen:
        counts.update(item.target.get("counts", {}))
    if class_names and seen:
        total = max(1, sum(counts.values()))
        # Two classes of one name are two classes: objectInfo150.txt has such names.
        names = [
            name if class_names.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(class_names)
        ]
        part.class_share = {name: round(counts[index] / total, 6) for index, name in enumerate(names)}
    depths = [item.target for item in seen if "max" in item.target]
    if depths:
        part.depth = {
            "min": round(min(depth["min"] for depth in depths), 4),
            "median": round(float(np.median([depth["median"] for depth in depths])), 4),
            "max": round(max(depth["max"] for depth in depths), 4),
            "unknown": round(float(np.mean([item.target["unknown"] for item in seen])), 4),
        }


def _copies(left: str, taught: Sequence[Seen], right: str, held: Sequence[Seen]) -> list[Shared]:
    known = {item.content: item.name for item in taught}
    found = [(known[item.content], item.name) for item in held if item.content in known]
    return [Shared(left, right, "copy", len(found), found[:SHOWN])] if found else []


def _near(left: str, taught: Sequence[Seen], right: str, held: Sequence[Seen], bits: int) -> list[Shared]:
    """Each held-out image whose nearest look among `taught` is within `bits`; copies are left to `_copies`."""
    contents = {item.content for item in taught}
    held = [item for item in held if item.content not in contents]
    if not taught or not held:
        return []
    table = torch.stack([item.look for item in taught if item.look is not None])
    found = []
    for start in range(0, len(held), 256):
        rows = torch.stack([item.look for item in held[start : start + 256] if item.look is not None])
        # Of vectors of ±1 the product is 64 − 2 · distance.
        similarity, nearest = (rows @ table.T).max(1)
        for row in (similarity >= 64 - 2 * bits).nonzero()[:, 0].tolist():
            found.append((taught[int(nearest[row])].name, held[start + row].name))
    return [Shared(left, right, "near-duplicate", len(found), found[:SHOWN])] if found else []


def perceptual_hash() -> Callable[[Tensor], Tensor]:
    """imagehash's phash: image uint8 [3 H W] -> ±1 float32 [64].

    Raises:
        UserError: it is not installed.
    """
    try:
        import imagehash
    except ImportError:
        raise UserError("near-duplicates need the package imagehash: pip install 'dino-value[data]'") from None

    def look(image: Tensor) -> Tensor:
        picture = Image.fromarray(as_rgb(image).permute(1, 2, 0).numpy())
        return torch.from_numpy(imagehash.phash(picture).hash.reshape(-1)).float() * 2 - 1

    return look


def print_report(report: Report) -> None:
    """The report as tables and lines on the terminal."""
    console = Console()
    table = Table("", title=f"{report.root} ({report.layout})")
    for part in report.parts:
        table.add_column(part.name, justify="right", overflow="fold")
    for label, cell in _ROWS.items():
        cells = [cell(part) for part in report.parts]
        if any(cells):
            table.add_row(label, *(text or "–" for text in cells))
    console.print(table)
    for part in report.parts:
        lines = [*([part.error] if part.error else []), *part.unreadable[:SHOWN], *part.notes]
        if len(part.unreadable) > SHOWN:
            lines.append(f"… and {len(part.unreadable) - SHOWN} more that cannot be used")
        for line in lines:
            console.print(f"{part.name}: {line}", markup=False, highlight=False, soft_wrap=True)
    for pair in report.shared:
        what = "copies" if pair.kind == "copy" else "near-duplicates"
        examples = "; ".join(f"{right} ~ {left}" for left, right in pair.examples[:2])
        text = f"{pair.right}: {pair.images} of its images have {what} in {pair.left}: {examples}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    for note in report.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _absent(part: Part) -> str:
    absent = [name for name, share in part.class_share.items() if share == 0]
    return ", ".join(absent[:SHOWN]) + (f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else "")


def _common(part: Part) -> str:
    top = sorted(part.class_share.items(), key=lambda pair: -pair[1])[:3]
    return ", ".join(f"{name} {share:.1%}" for name, share in top)


def _depth(part: Part) -> str:
    return "{min:.2f} … {median:.2f} … {max:.2f}".format(**part.depth) if part.depth else ""


_ROWS: dict[str, Callable[[Part], str]] = {
    "images": lambda part: str(part.images),
    "unusable": lambda part: "all" if part.error else str(len(part.unreadable)),
    "groups": lambda part: str(part.groups or ""),
    "sizes, by area": lambda part: (
        part.smallest if part.smallest == part.largest else f"{part.smallest} … {part.median} … {part.largest}"
    ),
    "classes": lambda part: str(part.classes or ""),
    "most common": _common,
    "absent": _absent,
    "depth, metres": _depth,
    "unknown depth": lambda part: f"{part.depth['unknown']:.1%}" if part.depth else "",
    "copies within": lambda part: str(part.copies or ""),
}
