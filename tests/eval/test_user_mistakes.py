"""Bad input from the command line: one clear line that names the file, or, with --skip-unreadable, a count."""

from __future__ import annotations

import json
import pickle
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from dino_value import cli
from dino_value.arguments import exit_code
from dino_value.data import nyuv2
from dino_value.models.backbone import create_backbone, save_backbone

SIZE = 32


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kwargs = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
        save_backbone(path, create_backbone("vit_tiny_patch16_224", SIZE, kwargs))
    return str(path)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    """Six training and four validation images in the layout of ADE20K, three classes."""
    root = tmp_path / "ade"
    for split, count in (("training", 6), ("validation", 4)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            picture(index).save(root / "images" / split / f"{index}.jpg")
            ids = np.random.default_rng(index).integers(0, 4, (SIZE, SIZE), dtype=np.uint8)
            Image.fromarray(ids).save(root / "annotations" / split / f"{index}.png")
    names = "".join(f"{index}\t0\t0\t0\t{name}\n" for index, name in enumerate(("wall", "bed", "wall"), 1))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + names)
    return root


@pytest.fixture
def nyu(tmp_path: Path) -> Path:
    """Six training and two test images in the official .mat files."""
    return write_nyu(tmp_path / "nyu", 1.0)


def write_nyu(root: Path, units: float, training: int = 6) -> Path:
    root.mkdir()
    rng = np.random.default_rng(0)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = rng.integers(0, 256, (8, 3, SIZE, SIZE), dtype=np.uint8)
        file["depths"] = (units * rng.uniform(1, 5, (8, SIZE, SIZE))).astype(np.float32)
    savemat(root / "splits.mat", {"trainNdxs": np.arange(1, training + 1)[:, None], "testNdxs": np.array([[7], [8]])})
    return root


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Two classes of four images, training and validation."""
    root = tmp_path / "imagenet"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(4):
                picture(index).save(root / split / name / f"{index}.png")
    return root


Run = Callable[..., tuple[int, list[str], dict[str, object]]]


@pytest.fixture
def run(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command as a user gives it: its exit code, what it says on stderr, and its results."""

    def command(name: str, data: Path, *flags: str) -> tuple[int, list[str], dict[str, object]]:
        out = tmp_path / "out"
        steps = ["--steps", "4", "--batch", "4"] if name in ("linear", "seg", "depth") else []
        arguments = ["eval", name, weights, "--data", str(data), "--out", str(out), "--size", str(SIZE)]
        code = cli.main([*arguments, "--device", "cpu", *steps, *flags])
        said = [line for line in capsys.readouterr().err.splitlines() if "read as timm" not in line]
        results = json.loads((out / "results.json").read_text()) if code == 0 else {}
        return code, said, results

    return command


def bomb(path: Path) -> None:
    """A PNG whose header says 60,000 × 60,000."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


def smaller(path: Path) -> None:
    Image.open(path).crop((0, 0, SIZE - 1, SIZE)).save(path)


def too_high(path: Path) -> None:
    ids = np.array(Image.open(path))
    ids[3, 3] = 4
    Image.fromarray(ids).save(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


SEG = [
    ("annotations/training/1.png", smaller, "31×32 pixels, but its image has 32×32"),
    ("annotations/validation/1.png", too_high, "label id 4 is outside 0…3"),
    ("annotations/training/2.png", Path.unlink, "2.png is missing"),
    ("images/validation/1.jpg", cut, "cannot be read as an image"),
    ("annotations/training/0.png", bomb, "too large to decode safely"),
]


@pytest.mark.parametrize(("file", "spoil", "message"), SEG, ids=[case[2][:12] for case in SEG])
def test_segmentation(file: str, spoil: Callable[[Path], None], message: str, ade: Path, run: Run) -> None:
    spoil(ade / file)
    code, said, _ = run("seg", ade)
    assert code == 2
    assert len(said) == 1
    assert message in said[0]
    assert file.rpartition("/")[2].partition(".")[0] in said[0]
    code, said, results = run("seg", ade, "--skip-unreadable")
    assert code == 0
    assert len(said) == 1
    assert said[0].startswith("left out: ")
    assert file.rpartition("/")[2] in said[0]
    split = file.split("/")[1]
    assert results["unreadable"] == {"training": 0, "validation": 0} | {split: 1}


def test_classes_of_one_name_are_told_apart(ade: Path, run: Run) -> None:
    _, _, results = run("seg", ade)
    assert set(results["iou"]) == {"wall (0)", "bed", "wall (2)"}  # type: ignore[call-overload]


@pytest.mark.parametrize("split", ["training", "validation"])
def test_an_empty_split(split: str, ade: Path, run: Run) -> None:
    for path in (ade / "images" / split).iterdir():
        path.unlink()
    code, said, _ = run("seg", ade)
    assert (code, len(said)) == (2, 1)
    assert f"images/{split}: no images" in said[0]


def test_depth_in_millimetres(tmp_path: Path, run: Run) -> None:
    with pytest.warns(UserWarning, match=r"nyu_depth_v2_labeled\.mat: .* probably millimetres read as metres"):
        code, said, _ = run("depth", write_nyu(tmp_path / "nyu", 1000.0))
    assert (code, len(said)) == (2, 1)
    assert "no valid depth in the training split" in said[0]


def test_warnings_are_one_line() -> None:
    def shown(file: str) -> list[str]:
        lines: list[str] = []

        def command() -> int:
            lines.append(warnings.formatwarning("odd depths", UserWarning, file, 3))
            return 0

        assert exit_code(command) == 0
        return lines

    assert shown(nyuv2.__file__) == ["warning: odd depths\n"]
    (other,) = shown("elsewhere.py")
    assert other.startswith("elsewhere.py:3: UserWarning: odd depths")


def test_a_truncated_mat(nyu: Path, run: Run) -> None:
    path = nyu / "nyu_depth_v2_labeled.mat"
    path.write_bytes(path.read_bytes()[:5000])
    code, said, _ = run("depth", nyu)
    assert (code, len(said)) == (2, 1)
    assert "nyu_depth_v2_labeled.mat: not a complete HDF5 file" in said[0]


def test_a_split_without_depth_maps(tmp_path: Path, run: Run) -> None:
    code, said, _ = run("depth", write_nyu(tmp_path / "nyu", 1.0, training=0))
    assert (code, len(said)) == (2, 1)
    assert "splits.mat: trainNdxs must name images" in said[0]


@pytest.mark.parametrize("name", ["linear", "knn", "retrieval"])
def test_images_of_every_kind_are_read(name: str, imagenet: Path, run: Run) -> None:
    flags = ("--ks", "3") if name == "knn" else ()
    for split in ("train", "val"):
        folder = imagenet / split / "cat"
        picture(0).convert("RGBA").save(folder / "0.png")
        picture(1).convert("L").save(folder / "1.png")
        Image.fromarray(np.array(picture(2).convert("L")).astype(np.uint16) * 257).save(folder / "2.png")
        picture(3).convert("CMYK").save(folder / "4.jpg")
        exif = Image.Exif()
        exif[0x112] = 6
        picture(3).crop((0, 0, SIZE, 20)).save(folder / "5.jpg", exif=exif)
    code, said, results = run(name, imagenet, *flags)
    assert (code, said) == (0, [])
    assert results["images_per_second"]


def test_data_of_another_kind(ade: Path, run: Run) -> None:
    code, said, _ = run("depth", ade)
    assert (code, len(said)) == (2, 1)
    assert said[0].endswith("pair images with depth maps (this is the layout ade20k)")
    code, said, _ = run("seg", ade.parent)
    assert said[0].endswith(f"(did you mean {ade}?)")


def test_a_checkpoint_that_is_not_there(ade: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.pth"
    assert cli.main(["eval", "seg", str(missing), "--data", str(ade), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {missing}: no such run folder or weights file\n"


@pytest.mark.parametrize("name", ["linear", "knn", "retrieval"])
def test_a_zip_bomb_among_images(name: str, imagenet: Path, run: Run) -> None:
    flags = ("--ks", "3") if name == "knn" else ()
    bomb(imagenet / "val" / "dog" / "9.png")
    code, said, _ = run(name, imagenet, *flags)
    assert (code, len(said)) == (2, 1)
    assert "dog/9.png: too large to decode safely" in said[0]
    code, said, results = run(name, imagenet, *flags, "--skip-unreadable")
    assert (code, len(said)) == (0, 1)
    assert results["unreadable"]["validation"] == 1  # type: ignore[index]


@pytest.fixture
def oxford(tmp_path: Path) -> Path:
    """A tiny set in the layout of revisited Oxford: database 0 … 5, queries q0 and q1."""
    folder = tmp_path / "roxford5k"
    (folder / "jpg").mkdir(parents=True)
    names, queries = [str(index) for index in range(6)], ["q0", "q1"]
    for index, name in enumerate([*names, *queries]):
        picture(index % 3).save(folder / "jpg" / f"{name}.jpg")
    truth = [
        {"bbx": [0, 0, 32, 32], "easy": [3 + query], "hard": [query], "junk": [5]} for query in range(len(queries))
    ]
    content = {"imlist": names, "qimlist": queries, "gnd": truth}
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content))
    return tmp_path


def test_a_database_image_that_cannot_be_read(oxford: Path, run: Run) -> None:
    flags = ("--set", "roxford5k")
    code, said, whole = run("retrieval", oxford, *flags)
    assert (code, said) == (0, [])
    assert whole["data"] == {"path": str(oxford), "truth": "roxford5k", "database": 6, "queries": 2}
    assert "2 queries" in str(whole["interval_of"])
    (oxford / "roxford5k" / "jpg" / "0.jpg").unlink()
    code, said, _ = run("retrieval", oxford, *flags)
    assert (code, len(said)) == (2, 1)
    assert "jpg/0.jpg: no such file" in said[0]
    code, said, results = run("retrieval", oxford, *flags, "--skip-unreadable")
    assert (code, len(said)) == (0, 1)
    assert results["unreadable"] == {"roxford5k": 1}
    # The first query has lost its hard image; what is easy to it is found where it was, a place up.
    assert results["data"]["database"] == 5  # type: ignore[index]
    assert results["map_easy"] == whole["map_easy"]


def test_groups_instead_of_classes(imagenet: Path, run: Run) -> None:
    """The images of one number are alike in both classes: by number each finds the other first."""
    _, _, by_class = run("retrieval", imagenet)
    code, _, results = run("retrieval", imagenet, "--group-pattern", r"^\d")
    assert code == 0
    assert results["data"]["truth"] == "group"  # type: ignore[index]
    assert results["mp1"] == 1
    assert by_class["mp1"] == 0
    code, said, _ = run("retrieval", imagenet, "--group-pattern", "(")
    assert (code, len(said)) == (2, 1)
    assert "not a regular expression" in said[0]
