"""Weights files, others' too: read without running anything they hold, and refused where their checksums are wrong."""

from __future__ import annotations

import argparse
import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
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
    tensors = network(content)
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return tensors, header


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


def network(content: Any) -> dict[str, Tensor]:
    """The network in a checkpoint's content, without the wrappings of DDP, FSDP and torch.compile."""
    outer = next((key for key in _OUTER if isinstance(content, dict) and isinstance(content.get(key), dict)), None)
    if outer is not None:
        return network(content[outer])
    if not isinstance(content, dict):
        return {}
    tensors = {WRAPPING.sub("", str(name)): value for name, value in content.items() if isinstance(value, Tensor)}
    for part in ("teacher.", "student."):  # DINOv2 and DINOv3 train with both in one module
        chosen = {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)}
        if chosen:
            return chosen
    return tensors


_OUTER = ("teacher", "student", "state_dict", "model")
WRAPPING = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
