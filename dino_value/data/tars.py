"""WebDataset shards: samples in tar files, read by position.

A sample is what the members of one key make up (`000017.jpg`, `000017.json`). The webdataset package streams shards
from front to back through a shuffle buffer, whose state would have to be saved for every worker. Here the headers are
read once, and a member is then a place in a file: the order of a run stays a function of (seed, step), whatever the
workers. Names of shards and keys of samples are the package's own notation, read by the package.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dino_value.data.walking import files_below
from dino_value.errors import UserError

FORMATS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "gif")
"""Image formats by their extension; of a sample's several images the first in this order is taken."""
SHOWN = 8  # names of fields in a message
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|Z)|tgz|tbz2|txz)$")
_META = re.compile(r"(.*/)?__[^/]*__(/|$)")  # members that describe the shard, by webdataset's convention


@dataclass(frozen=True, slots=True)
class TarMember:
    """One file in an uncompressed tar: a path in all that `read_image` and the views ask of one."""

    shard: str
    member: str
    offset: int  # of the content, bytes
    size: int

    @property
    def name(self) -> str:
        return os.path.basename(self.member)

    def read_bytes(self) -> bytes:
        """The content.

        Raises:
            OSError: the shard cannot be read, or has become shorter.
        """
        with open(self.shard, "rb") as file:
            content = os.pread(file.fileno(), self.size, self.offset)
        if len(content) != self.size:
            raise OSError(f"the shard ends after {len(content)} of its {self.size} bytes")
        return content

    def __fspath__(self) -> str:
        return f"{self.shard}/{self.member}"

    def __str__(self) -> str:
        return self.__fspath__()


def is_shards(path: str | Path) -> bool:
    """Whether `path` means shards: a .tar file, a pattern of them, or a folder that holds some, compressed or not."""
    text = str(path)
    if re.search(r"[*?\[{]", text) and not os.path.exists(text):
        return bool(re.search(r"\.(tar|tgz)", text))
    if os.path.isdir(text):
        return any(_tars(text))
    return text.endswith(".tar") or bool(_COMPRESSED.search(text))


def find_shards(path: str | Path) -> list[str]:
    """The shards that a folder (nested or not), a pattern (`*`, `?`, `{0000..0099}`) or a file name means, in order.

    Raises:
        UserError: none; or an address that is not a local file; or compressed ones, which nothing can be read from by
            position.
    """
    text = str(path)
    if re.match(r"(\w+://|pipe:)", text):
        raise UserError(f"{text}: only local shards can be read by position; copy them to a disk first")
    if os.path.isdir(text):
        found, compressed = _tars(text)
    else:
        _, expand = _webdataset()
        try:
            names = [text] if os.path.exists(text) else expand(text)
        except Exception as error:  # braceexpand's own, an assertion about a variable
            raise UserError(f"{text}: not a pattern of shards ({error})") from None
        found = [shard for name in names for shard in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
        compressed = [shard for shard in found if _COMPRESSED.search(shard)]
    if compressed:
        raise UserError(
            f"{compressed[0]}: {len(compressed)} compressed shard{'s' * (len(compressed) > 1)}; members are read by "
            "position, so unpack them to .tar (gunzip, zstd -d)"
        )
    if not found:
        raise UserError(f"{text}: no shards (.tar) are found there")
    return found


def list_members(path: str | Path, field: str | None = None) -> list[TarMember]:
    """One image of every sample in the shards, in the order of the shards; samples without one are counted in a
    warning.

    Args:
        field: which member of a sample is its image, or several of which the first that a sample has is taken, with
            semicolons as webdataset writes them ("jpg;input.jpg"); by default those of `FORMATS`.

    Raises:
        UserError: no shards, no image in them, or a shard that is missing, compressed or cut off; or webdataset is not
            installed.
    """
    wanted = FORMATS if field is None else tuple(name.strip(" .").lower() for name in field.split(";"))
    shards = find_shards(path)
    key_of, _ = _webdataset()
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda shard: _index(shard, key_of, wanted), shards))
    members = [member for part in parts for member in part.members]
    samples = sum(part.samples for part in parts)
    seen = sum((part.fields for part in parts), Counter[str]())
    fields = ", ".join(f"{name} ({count})" for name, count in seen.most_common(SHOWN)) or "none"
    if len(seen) > SHOWN:
        fields += f" and {len(seen) - SHOWN} more"
    advice = "data.field=NAME (for data check: --field NAME) says which is the image"
    if not members:
        looked = f"looked for {', '.join(wanted)}; fields there: {fields}"
        raise UserError(f"{path}: no images in {len(shards)} shards ({looked}); {advice}")
    if len(members) < samples:
        missing = f"{samples - len(members)} of {samples} samples have none of {', '.join(wanted)} and are not read"
        warnings.warn(f"{path}: {missing} (fields there: {fields}); {advice}", stacklevel=2)
    return members


class _Shard(NamedTuple):
    """What is in a shard: an image of each sample that has one; how many samples; how often each field occurs."""

    members: list[TarMember]
    samples: int
    fields: Counter[str]


def _index(shard: str, key_of: Callable[[str], tuple[str | None, str | None]], wanted: Sequence[str]) -> _Shard:
    best: dict[str, tuple[int, TarMember]] = {}
    keys: set[str] = set()
    fields = Counter[str]()
    try:
        length = os.path.getsize(shard)
        with tarfile.open(shard, "r:") as file:
            for info in file:
                if info.isreg() and info.offset_data + info.size > length:
                    raise tarfile.ReadError(f"ends within {info.name}")
                key, field = key_of(info.name)
                if not info.isreg() or key is None or field is None or _META.match(info.name):
                    continue
                field = field.lower()
                keys.add(key)
                fields[field] += 1
                if field in wanted:
                    found = wanted.index(field), TarMember(shard, info.name, info.offset_data, info.size)
                    best[key] = min(best.get(key, found), found, key=lambda pair: pair[0])
    except (OSError, tarfile.TarError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise UserError(f"{shard}: not a complete, uncompressed tar file ({reason}); copy or unpack it again") from None
    return _Shard([member for _, member in best.values()], len(keys), fields)


def _tars(folder: str) -> tuple[list[str], list[str]]:
    """The shards in a folder, and the compressed ones that do not lie unpacked beside it."""
    found = sorted(path for path in files_below(folder) if not os.path.basename(path).startswith("."))
    plain = [path for path in found if path.endswith(".tar")]
    packed = [path for path in found if _COMPRESSED.search(path)]
    return plain, [path for path in packed if f"{_COMPRESSED.sub('', path)}.tar" not in plain]


def _webdataset() -> tuple[Callable[[str], tuple[str | None, str | None]], Callable[[str], Sequence[str]]]:
    """Its rules: file name → (key, field), and pattern → names."""
    try:
        from webdataset.shardlists import expand_urls
        from webdataset.tariterators import base_plus_ext
    except ImportError:
        raise UserError("shards need the package webdataset: pip install 'dino-value[webdataset]'") from None
    rules: tuple[Any, Any] = (base_plus_ext, expand_urls)
    return rules
