"""Revisited Oxford and Paris: the layout, and pickles that want more than to be read."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_value.data.revisited import open_revisited, read_plain_pickle
from dino_value.errors import UserError

NAME = "roxford5k"


def ground_truth() -> dict[str, Any]:
    return {
        "imlist": [f"all_souls_{index:06d}" for index in range(5)],
        "qimlist": ["query_a", "query_b"],
        "gnd": [
            {"bbx": [1.0, 2.0, 7.5, 6.0], "easy": np.array([0, 2]), "hard": np.array([3]), "junk": [1]},
            {"bbx": np.array([0, 0, 8, 6]), "easy": [], "hard": np.array([], int), "junk": np.array([4], np.int32)},
        ],
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / NAME / "jpg"
    folder.mkdir(parents=True)
    truth = ground_truth()
    for name in truth["imlist"] + truth["qimlist"]:
        Image.new("RGB", (8, 6)).save(folder / f"{name}.jpg")
    write(tmp_path, truth)
    return tmp_path


def write(root: Path, content: Any, protocol: int = 2) -> Path:
    path = root / NAME / f"gnd_{NAME}.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_reads_what_was_written(root: Path, protocol: int) -> None:
    write(root, ground_truth(), protocol)
    found = open_revisited(root, NAME)
    assert found.database[3] == root / NAME / "jpg" / "all_souls_000003.jpg"
    assert found.queries[0] == (root / NAME / "jpg" / "query_a.jpg", (1.0, 2.0, 7.5, 6.0))
    for level, expected in {"easy": ([0, 2], []), "hard": ([3], []), "junk": ([1], [4])}.items():
        assert tuple(truth[level].tolist() for truth in found.ground_truth) == expected
        assert all(truth[level].dtype == np.int64 for truth in found.ground_truth)
    assert open_revisited(root / NAME, NAME).database == found.database


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_survives(tmp_path: Path, protocol: int) -> None:
    content = [
        {"a": (1, 2.5, None, True), "b": {3}, "c": b"bytes"},
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(["ab", "c"]),
        np.float32(1.5),
        np.array(7),
    ]
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    found = read_plain_pickle(path)
    assert found[0] == content[0]
    for left, right in zip(found[1:], content[1:], strict=True):
        np.testing.assert_array_equal(left, right)


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.what = function, arguments

    def __reduce__(self) -> Any:
        return self.what


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_run(root: Path, protocol: int) -> None:
    marker = root / "was-run"
    for function, arguments in ((os.system, (f"touch {marker}",)), (eval, ("1",)), (getattr, ("a", "upper"))):
        content = ground_truth()
        content["gnd"].append(Runs(function, *arguments))
        write(root, content, protocol)
        with pytest.raises(UserError, match=rf"gnd_{NAME}\.pkl: names \S*{function.__name__}'?, .* refused") as raised:
            open_revisited(root, NAME)
        assert "\n" not in str(raised.value)
    assert not marker.exists()


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    for array in (np.array([{}, 1], dtype=object), np.zeros(2, dtype=[("a", "i4")])):
        path.write_bytes(pickle.dumps(array))
        with pytest.raises(UserError, match="refused"):
            read_plain_pickle(path)


def test_a_small_file_does_not_unfold_without_end(root: Path) -> None:
    shared: list[Any] = []
    for _ in range(200):  # 2**200 empty lists, were they told apart
        shared = [shared, shared]
    write(root, shared)
    with pytest.raises(UserError, match=rf"gnd_{NAME}\.pkl: not the ground truth"):
        open_revisited(root, NAME)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", pickle.dumps(ground_truth())[:60]])
def test_damaged_pickle(root: Path, content: bytes) -> None:
    write(root, content)
    with pytest.raises(UserError, match=r"cannot be read as a pickle"):
        open_revisited(root, NAME)


def test_other_content(root: Path) -> None:
    for content in ({}, [1], {**ground_truth(), "gnd": []}, {**ground_truth(), "imlist": []}):
        write(root, content)
        with pytest.raises(UserError, match=rf"gnd_{NAME}\.pkl: .*not .*{NAME}"):
            open_revisited(root, NAME)
    outside = ground_truth()
    outside["gnd"][1]["hard"] = [5]
    write(root, outside)
    with pytest.raises(UserError, match="hard of query query_b points outside the 5 images"):
        open_revisited(root, NAME)
    outside["gnd"][1]["hard"] = [0.5]
    write(root, outside)
    with pytest.raises(UserError, match="whole numbers"):
        open_revisited(root, NAME)


def test_missing_files(root: Path) -> None:
    (root / NAME / "jpg" / "query_a.jpg").unlink()
    with pytest.raises(UserError, match=r"query_a\.jpg: no such file \(1 images"):
        open_revisited(root, NAME)
    with pytest.raises(UserError, match=r"gnd_rparis6k\.pkl: no such file"):
        open_revisited(root, "rparis6k")
    with pytest.raises(UserError, match="unknown retrieval set"):
        open_revisited(root, "oxford")
