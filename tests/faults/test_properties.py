"""Whatever the input: an answer or one line that says what is wrong, never a traceback, never a hang."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.extra import numpy as arrays
from PIL import Image

from dino_value.config import Config, _all_keys, load_config, save_config
from dino_value.data.folders import read_depth, read_image, read_labels
from dino_value.data.matlab import read_arrays
from dino_value.data.nyuv2 import valid_depth
from dino_value.errors import UserError
from dino_value.runs.checkpoint import read_state, snapshot, write_state
from dino_value.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File")

KEYS = _all_keys(Config, "")
quick = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
floats = functools.partial(st.floats, allow_subnormal=False)  # training flushes them to 0
numbers = st.one_of(st.integers(-3, 70000), floats(), st.booleans(), st.none())
texts = st.one_of(
    st.text(max_size=12), st.sampled_from(["[1, 2]", "{a: 1}", "[.nan, 1]", "1e400", "${seed}", "???", "'"])
)


def answered(call: Callable[[], Any]) -> Any:
    """The answer, or None for one line of refusal."""
    try:
        return call()
    except UserError as error:
        said = str(error)
    assert said
    assert "\n" not in said
    return None


@quick
@given(
    st.lists(st.tuples(st.one_of(st.sampled_from(KEYS), st.text(max_size=8)), st.one_of(numbers, texts)), max_size=5)
)
def test_settings(tmp_path: Path, pairs: list[tuple[str, Any]]) -> None:
    """What is accepted comes back the same from its own file."""
    file = tmp_path / "base.yaml"
    file.write_text("out: a\nmethod: baseline\ndata: {unlabeled: images}\n")
    config = answered(lambda: load_config(file, [f"{key}={value}" for key, value in pairs]))
    if config is not None:
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config


@quick
@given(st.binary(max_size=200))
def test_any_bytes_as_settings(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    answered(lambda: load_config(tmp_path / "config.yaml"))


@quick
@given(arrays.arrays(st.sampled_from([np.uint8, np.bool_]), arrays.array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_label_maps(tmp_path: Path, ids: np.ndarray) -> None:
    Image.fromarray(ids).save(tmp_path / "ids.png")
    assert torch.equal(read_labels(tmp_path / "ids.png"), torch.from_numpy(ids.astype(np.int64)))


@quick
@given(arrays.arrays(np.uint16, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9)), floats(1e-3, 1e6))
def test_depth_maps(tmp_path: Path, units: np.ndarray, scale: float) -> None:
    Image.fromarray(units).save(tmp_path / "depth.png")
    metres = read_depth(tmp_path / "depth.png", scale)
    assert torch.equal(metres, torch.from_numpy(units.astype(np.float32) / np.float32(scale)))
    known = valid_depth(metres)
    assert bool(((known == 0) | ((known > 0) & (known <= 10))).all())


@quick
@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=floats(width=32)))
def test_any_depths(depth: np.ndarray) -> None:
    """Infinities, negatives, no numbers: known depth is in (0, 10] and the rest 0."""
    known = valid_depth(torch.from_numpy(depth))
    assert bool(((known >= 0) & (known <= 10)).all())


MAGIC = (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xff\xd8\xff\xe0\0\x10JFIF\0", b"RIFF\x40\0\0\0WEBPVP8 ", b"BM", b"GIF89a")
MAGIC += (
    b"II*\0\x08\0\0\0",
    b"MM\0*\0\0\0\x08",
    b"P6\n",
    b"P5 65535 65535 255\n",
    b"P4\n",
    b"MATLAB 5.0" + b" " * 114 + b"\0\1IM",
)


@quick
@given(st.sampled_from(MAGIC), st.binary(max_size=120))
def test_image_headers(tmp_path: Path, magic: bytes, rest: bytes) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(magic + rest)
    for read in (read_image, read_labels, read_depth):
        answered(lambda read=read: read(path))  # type: ignore[misc]
    with contextlib.suppress(ValueError):
        read_arrays(path)


leaves = st.one_of(
    st.integers(-(2**60), 2**60),
    floats(allow_nan=False),
    st.booleans(),
    st.none(),
    st.text(max_size=6),
    arrays.arrays(
        np.float32, arrays.array_shapes(max_dims=2, max_side=4), elements=floats(width=32, allow_nan=False)
    ).map(torch.from_numpy),
)
trees = st.recursive(
    leaves, lambda part: st.one_of(st.lists(part, max_size=3), st.dictionaries(st.text(max_size=4), part, max_size=3))
)


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


@quick
@given(st.dictionaries(st.text(max_size=5), trees, max_size=4), st.integers(0, 10**6), st.integers(0, 7))
def test_checkpoints(state: dict[str, Any], place: int, bit: int) -> None:
    """What is written is read; one flipped bit is refused or has changed nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.pt")
        write_state(path, snapshot(state, "cpu"))
        assert equal(read_state(path), state)
        content = bytearray(path.read_bytes())
        content[place % len(content)] ^= 1 << bit
        path.write_bytes(content)
        found = answered(lambda: read_state(path))
        assert found is None or equal(found, state)


@pytest.fixture
def run(tiny: Callable[..., Config]) -> Trainer:
    return Trainer(tiny("method=baseline"))


@settings(quick, max_examples=30)
@given(data=st.data())
def test_trees_of_another_kind(run: Trainer, data: st.DataObject) -> None:
    """A whole checkpoint in which a part is missing or something else."""
    state = run.state_dict()
    name = data.draw(st.sampled_from(sorted(state)))
    if data.draw(st.booleans()):
        del state[name]
    else:
        state[name] = data.draw(trees)
    answered(lambda: run.resume(state))
