"""Revisited Oxford and Paris (Radenović et al., arXiv 1803.11285): images, queries and what is relevant to each.

- ROOT/roxford5k/jpg/*.jpg and ROOT/roxford5k/gnd_roxford5k.pkl; likewise rparis6k

The ground truth is a pickle. It is read by an unpickler that builds plain containers, numbers, strings and numeric
arrays and knows no other name, so that nothing in the file can be run.
"""

from __future__ import annotations

import io
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino_value.data.folders import read_image
from dino_value.errors import UserError

NAMES = ("roxford5k", "rparis6k")
LEVELS = ("easy", "hard", "junk")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Revisited:
    """One of the two sets.

    `queries` are cut to their boxes (left, top, right, bottom; pixels of the file). `ground_truth` has for every query
    the indices into `database`, int64, of its easy, hard and junk images.
    """

    name: str
    database: list[Path]
    queries: list[tuple[Path, Box]]
    ground_truth: list[dict[str, np.ndarray]]


def open_revisited(root: str | Path, name: str, check_files: bool = True) -> Revisited:
    """Open `roxford5k` or `rparis6k`.

    Args:
        root: the folder that holds the set's folder, or that folder itself.
        name: which of the two.
        check_files: False leaves a missing image to `readable_revisited`.

    Raises:
        UserError: another name; no ground truth, one that holds more than data, or one that is not of this form; an
            image that is missing.
    """
    if name not in NAMES:
        raise UserError(f"unknown retrieval set {name!r}; choose {' or '.join(NAMES)}")
    folders = (Path(root) / name, Path(root))
    folder = next((folder for folder in folders if (folder / f"gnd_{name}.pkl").is_file()), None)
    if folder is None:
        raise UserError(f"{folders[0] / f'gnd_{name}.pkl'}: no such file; it comes with the revisited annotations")
    path = folder / f"gnd_{name}.pkl"
    content = read_plain_pickle(path)
    try:
        names, queries = ([str(item) for item in content[key]] for key in ("imlist", "qimlist"))
        truth = [{level: _indices(entry[level]) for level in LEVELS} for entry in content["gnd"]]
        boxes = [[float(corner) for corner in entry["bbx"]] for entry in content["gnd"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not the ground truth of {name} ({type(error).__name__}: {error})") from None
    if not names or not queries or len(queries) != len(truth) or any(len(box) != 4 for box in boxes):
        raise UserError(
            f"{path}: {len(names)} images, {len(queries)} queries, {len(truth)} lists of relevant images: not {name}"
        )
    for query, levels in zip(queries, truth, strict=True):
        for level, found in levels.items():
            if len(found) and not 0 <= found.min() <= found.max() < len(names):
                raise UserError(f"{path}: {level} of query {query} points outside the {len(names)} images")
    images, wanted = ([folder / "jpg" / f"{item}.jpg" for item in items] for items in (names, queries))
    missing = [image for image in (*images, *wanted) if not image.is_file()]
    if missing and check_files:
        raise UserError(f"{missing[0]}: no such file ({len(missing)} images of {path.name} are missing)")
    pairs = [(image, (box[0], box[1], box[2], box[3])) for image, box in zip(wanted, boxes, strict=True)]
    return Revisited(name, images, pairs, truth)


def readable_revisited(data: Revisited) -> tuple[Revisited, list[str]]:
    """What of a set can be read, its ground truth renumbered, and a line for each image that is left out.

    Raises:
        UserError: not one image or not one query can be read.
    """
    bad = {path: line for path in (*data.database, *(path for path, _ in data.queries)) if (line := _problem(path))}
    kept = [index for index, path in enumerate(data.database) if path not in bad]
    asked = [index for index, (path, _) in enumerate(data.queries) if path not in bad]
    if not kept or not asked:
        first = next(iter(bad.values()))
        raise UserError(f"none of the images or none of the queries of {data.name} can be read; the first: {first}")
    place = np.full(len(data.database), -1)
    place[kept] = np.arange(len(kept))
    renumbered = [
        {level: place[indices][place[indices] >= 0] for level, indices in data.ground_truth[query].items()}
        for query in asked
    ]
    found = Revisited(data.name, [data.database[i] for i in kept], [data.queries[i] for i in asked], renumbered)
    return found, list(bad.values())


def _problem(path: Path) -> str | None:
    try:
        read_image(path)
    except UserError as error:
        return " ".join(str(error).split())
    return None


def _indices(value: Any) -> np.ndarray:
    found = np.asarray(value)
    if found.size and (found.ndim != 1 or found.dtype.kind not in "iu"):
        raise ValueError("indices must be a list of whole numbers")
    return found.reshape(-1).astype(np.int64)


def read_plain_pickle(path: Path) -> Any:
    """A pickle of plain data: containers, numbers, strings, and numpy arrays of numbers or strings.

    Raises:
        UserError: it names anything else (which is neither imported nor called), or cannot be read.
    """
    try:
        return _plain(_PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can fail anywhere
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as a pickle ({reason}); copy it again") from None


class _DType:
    """Stands in for numpy.dtype: numpy's own takes a state that could pass bytes off as pointers."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not re.fullmatch(r"[<>|=]?(b1|[iuf][1248]|[SU]\d+)", str(code)):
            raise UserError(f"holds a numpy array of {code!r}, not of numbers: refused")
        self.value = np.dtype(str(code))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array:
    """Stands in for numpy.ndarray, for the same reason."""

    value = np.zeros(0)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, content = state
        self.value = _from_bytes(content, dtype, shape, "F" if by_columns else "C").value


def _from_bytes(content: Any, dtype: _DType, shape: Any, order: Any = "C") -> _Array:
    """As numpy's `_frombuffer`."""
    raw = content.encode("latin1") if isinstance(content, str) else bytes(content)
    array = _Array()
    array.value = np.frombuffer(raw, dtype.value).reshape(shape, order=order)
    return array


def _scalar(dtype: _DType, content: Any) -> Any:
    """As numpy's `scalar`."""
    return _from_bytes(content, dtype, ()).value.item()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """As `_codecs.encode`, by which old protocols write bytes."""
    return text.encode("latin1")


def _known() -> dict[tuple[str, str], Any]:
    known: dict[tuple[str, str], Any] = {("_codecs", "encode"): _encode}
    known |= {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _DType}
    for core in ("numpy.core", "numpy._core"):
        known |= {
            (f"{core}.multiarray", "_reconstruct"): _Array,
            (f"{core}.multiarray", "scalar"): _scalar,
            (f"{core}.numeric", "_frombuffer"): _from_bytes,
        }
    for module in ("builtins", "__builtin__"):
        known |= {(module, kind.__name__): kind for kind in (set, frozenset, list, tuple, dict, bytes, bytearray)}
    return known


_KNOWN = _known()


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise UserError(
                f"names {f'{module}.{name}'!r}, which is not plain data: refused, and nothing of it was run"
            )
        return _KNOWN[module, name]


def _plain(tree: Any, done: dict[int, Any] | None = None) -> Any:
    """`tree` with real arrays in place of the stand-ins; what is shared in it stays shared, or a small file could
    unfold without end."""
    done = {} if done is None else done
    if id(tree) not in done:
        found = tree
        if isinstance(tree, (_Array, _DType)):
            found = tree.value
        elif isinstance(tree, dict):
            found = {_plain(key, done): _plain(value, done) for key, value in tree.items()}
        elif isinstance(tree, (list, tuple)):
            found = type(tree)(_plain(item, done) for item in tree)
        done[id(tree)] = found
    return done[id(tree)]
