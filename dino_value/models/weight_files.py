"""Weights files, others' too: read without running anything they hold, and refused where their checksums are wrong."""

from __future__ import annotations

import argparse
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dino_value.errors import UserError
from dino_value.files import damaged_part

# What main_dino.py leaves in its checkpoints beside tensors and containers: its arguments, and as learning rate and
# weight decay of the optimizer's groups scalars of its schedules' numpy arrays, under numpy 1's or numpy 2's names.
_float64 = np.dtype(np.float64)
_scalar = _float64.type(0).__reduce__()[0]
_KNOWN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    type(_float64),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """What a .pth file holds, weights-only: tensors, containers, and what main_dino.py writes beside them.

    Of an argparse.Namespace the unpickler sets attributes, and of numpy it makes numbers: no code of the file's
    choosing can run.

    Raises:
        UserError: unreadable, or holding an object of any other class.
    """
    try:
        damaged = damaged_part(Path(path)) if zipfile.is_zipfile(path) else None  # files of torch < 1.6 are none
        if damaged is not None:
            raise UserError(f"{path}: not a readable weights file: damaged, the checksum of {damaged} is wrong")
        with torch.serialization.safe_globals(_KNOWN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a readable weights file: {_first_line(error)}") from None
    except Exception as error:  # pickle.UnpicklingError: an object that weights-only loading refuses
        raise UserError(f"{path}: refused by weights-only loading: {_first_line(error)}") from None


def read_header(path: str | os.PathLike[str]) -> dict[str, str] | None:
    """The metadata of a .safetensors file; None of any other.

    Raises:
        UserError: the file is not readable.
    """
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable weights file: {_first_line(error)}") from None


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of the network in a .safetensors or .pth file: the teacher, where a file holds two.

    Raises:
        UserError: the file is absent, unreadable, or holds no tensors.
    """
    return read_weights(path)[0]


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """`read_tensors`, and the metadata beside them: a .safetensors file's, or what a checkpoint of ours says of its
    positions; None of any other pickle.

    Raises:
        UserError: as `read_tensors`.
    """
    copy, header = read_copy(path)
    return copy.tensors, header


def read_copy(path: str | os.PathLike[str], prefix: str | None = None) -> tuple[Copy, dict[str, str] | None]:
    """`read_weights`, with which of a file's copies of the network was taken; `prefix` as in `copy_in`.

    Raises:
        UserError: as `read_weights`, or nothing has that prefix.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        header = read_header(path)  # says what is wrong with a damaged one
        content: Any = load_file(path)
        if header and CHECKSUM in header and header[CHECKSUM] != checksum(content, header):
            raise UserError(
                f"{path}: damaged, its checksum is wrong; if it is a run's, the command that trained it writes it again"
            )
    else:
        content = read_pickle(path)
        own = isinstance(content, dict) and "objective" in content and "positions" in content
        header = {"positions": json.dumps(content["positions"])} if own else None
    try:
        copy = copy_in(content, prefix)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not copy.tensors:
        raise UserError(f"{path}: holds no tensors")
    return copy, header


CHECKSUM = "dino_value.crc32"
"""The entry of a .safetensors header where our files have their checksum; others have none."""


def checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """CRC-32 of tensors, in the order of their names, and of a header's other entries; 8 hexadecimal digits."""
    total = zlib.crc32(json.dumps(sorted(item for item in header.items() if item[0] != CHECKSUM)).encode())
    for name, value in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), total)
        total = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def with_checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, str]:
    """The header to save `tensors` (on the CPU, contiguous) with."""
    return {**header, CHECKSUM: checksum(tensors, header)}


def is_whole(path: Path) -> bool:
    """Whether a weights file is there, readable, and has the checksum that it names."""
    try:
        read_weights(path)
    except UserError:
        return False
    return True


@dataclass(frozen=True)
class Copy:
    """One network of a file, its names without what stands before the backbone's or the whole learner's.

    `name` says where it lay, '' at the top; `others` are the copies that were not taken, `keys` the file's top-level
    names.
    """

    tensors: dict[str, Tensor]
    name: str = ""
    others: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


def network(content: Any) -> dict[str, Tensor]:
    """The tensors of the network in a checkpoint's content; see `copy_in`."""
    return copy_in(content).tensors


def copy_in(content: Any, prefix: str | None = None) -> Copy:
    """The network in a checkpoint's content, without the wrappings of DDP, FSDP, DeepSpeed and torch.compile.

    A vision transformer is found by its own names, whatever stands before them. Of several the averaged one is taken
    (teacher, EMA, momentum, target), then one that is not called a student, then the first.

    Args:
        prefix: what stands before the names to take instead, keys of the dictionaries around them included.

    Raises:
        UserError: nothing has that prefix.
    """
    places = list(_places(content))
    keys = tuple(str(key) for key in content) if isinstance(content, dict) else ()
    if prefix:
        return Copy(_below(places, prefix), prefix, (), keys)
    for anchor in (_PATCHES, _INSIDE, _PARTS):
        found = [(path, start, tensors) for path, tensors in places for start in _starts(anchor, tensors)]
        if not found:
            continue
        path, start, tensors = min(found, key=lambda one: _rank(_joined(*one[:2])))
        inner = tuple(other for place, other, _ in found if place == path and len(other) > len(start))
        names = [name for name in tensors if name.startswith(start) and not name.startswith(inner)]
        taken = {name.removeprefix(start): tensors[name] for name in names}
        others = [_joined(*one[:2]) for one in found if one[:2] != (path, start)]
        return Copy(taken, _joined(path, start), tuple(others), keys)
    if not places:
        return Copy({}, keys=keys)
    path, tensors = min(places, key=lambda place: (_rank(place[0]) > 0, -len(place[1])))
    return Copy(tensors, path, keys=keys)


def _places(content: Any, path: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each dictionary that holds tensors, with the keys that lead to it; optimizers' are passed over."""
    if not isinstance(content, dict):
        return
    tensors = {WRAPPING.sub("", str(name)): value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield WRAPPING.sub("", f"{path}.").rstrip("."), tensors
    for key, value in content.items():
        if isinstance(value, dict) and not _OPTIMIZER.match(str(key)):
            yield from _places(value, f"{path}.{key}" if path else str(key))


def _starts(anchor: re.Pattern[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """What stands before each network's names; `backbone.` is one of them, as heads may lie beside it."""
    matches = [anchor.match(name) for name in tensors]
    return list(dict.fromkeys(_BACKBONE.sub(r"\1", found[1]) for found in matches if found))


def _rank(name: str) -> int:
    return 0 if _AVERAGED.search(name) else 2 if _RAW.search(name) else 1


def _joined(path: str, name: str) -> str:
    return ".".join(part for part in (path, name.rstrip(".")) if part)


def _below(places: list[tuple[str, dict[str, Tensor]]], prefix: str) -> dict[str, Tensor]:
    """The tensors whose full names begin with `prefix`, without it."""
    start = WRAPPING.sub("", f"{prefix.rstrip('.')}.")
    full = {_joined(path, name): value for path, tensors in places for name, value in tensors.items()}
    found = {name.removeprefix(start): value for name, value in full.items() if name.startswith(start)}
    if not found:
        known = dict.fromkeys(".".join(name.split(".")[:2]) for name in full)
        some = ", ".join(list(known)[:8]) + (", …" if len(known) > 8 else "")
        raise UserError(f"backbone.prefix={prefix}: no tensor's name begins so; names begin with {some or 'nothing'}")
    return found


# Names that no vision transformer lacks; where a file has none, what most have; then the parts of a learner.
_PATCHES = re.compile(r"^((?:.*\.)?)(?:patch_embed\.proj|embeddings\.patch_embeddings(?:\.projection)?)\.weight$")
_INSIDE = re.compile(r"^((?:.*?\.)?)(?:cls_token|pos_embed|blocks\.\d+\..*|embeddings\.cls_token)$")
_PARTS = re.compile(r"^((?:teacher|student)\.)")
_BACKBONE = re.compile(r"(^|\.)backbone\.(\w+\.)?$")
_AVERAGED = re.compile(r"(?:^|[._])(teacher|ema|target|momentum|averaged|swa)(?:[._]|$)", re.IGNORECASE)
_RAW = re.compile(r"(?:^|[._])(student|gram)(?:[._]|$)", re.IGNORECASE)
_OPTIMIZER = re.compile(r"opt(im.*)?$")
WRAPPING = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
