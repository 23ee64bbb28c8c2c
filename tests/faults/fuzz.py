"""Damaged files for every reader: `python tests/faults/fuzz.py [COUNT [SEED [READER …]]]`.

Small good files are damaged (bits flipped, bytes set, parts cut out, doubled, swapped or replaced by those of another
file, the end torn off) and read. A reader may read what is left or raise UserError; anything else is printed, once a
kind, with the number that makes the same file again, and the exit code is 1. A line of JSON says what was tried.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import logging
import pickle
import random
import resource
import signal
import sys
import tarfile
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from scipy.io import savemat

from dino_value.config import Config, load_config
from dino_value.data.ade20k import ADE20K
from dino_value.data.folders import read_depth, read_image, read_labels
from dino_value.data.nyuv2 import NYUFolder, NYUv2
from dino_value.data.revisited import open_revisited
from dino_value.data.tars import list_members
from dino_value.errors import UserError
from dino_value.models.backbone import create_backbone, load_backbone, load_weights, save_backbone
from dino_value.runs.checkpoint import load_checkpoint, read_state, write_state
from dino_value.runs.folder import prepare_folder, record_environment
from dino_value.runs.metrics import MetricsFile
from dino_value.training.replay_file import read_replay

SECONDS = 20  # for one file: none may hang
MEMORY = 3 << 30  # above what the process has: none may take all
KWARGS = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 1}


class Case(NamedTuple):
    """A file inside a folder that is complete but for it, and what reads it."""

    file: Path
    read: Callable[[], Any]


Reader = Callable[[Path], list[Case]]
READERS: dict[str, Reader] = {}


def reader(make: Reader) -> Reader:
    READERS[make.__name__] = make
    return make


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@reader
def images(folder: Path) -> list[Case]:
    rgb, grey = Image.fromarray(noise(12, 14, 3)), Image.fromarray(noise(12, 14))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [saved(folder / f"rgb.{name}", rgb) for name in ("png", "jpg", "webp", "bmp", "tif", "ppm", "gif")]
    files += [saved(folder / f"grey.{name}", grey) for name in ("png", "jpg", "pgm", "tif")]
    files += [
        saved(folder / "palette.png", rgb.convert("P")),
        saved(folder / "alpha.png", rgb.convert("RGBA")),
        saved(folder / "sixteen.png", Image.fromarray(noise(12, 14).astype(np.uint16) * 257)),
        saved(folder / "turned.jpg", rgb, exif=exif),
        saved(folder / "cmyk.jpg", rgb.convert("CMYK")),
        saved(folder / "progressive.jpg", rgb, progressive=True),
        saved(folder / "packed.tif", rgb, compression="tiff_lzw"),
        saved(folder / "lossless.webp", rgb, lossless=True),
    ]
    return [Case(path, lambda path=path: read_image(path)) for path in files]  # type: ignore[misc]


@reader
def labels(folder: Path) -> list[Case]:
    for part in ("images", "annotations"):
        image = Image.fromarray(noise(8, 9, 3) if part == "images" else noise(8, 9) % 4)
        file = saved(folder / part / "training" / "a.png", image)
    (folder / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tfloor\n3\tdoor\n")
    palette = saved(folder / "palette.png", Image.fromarray(noise(8, 9) % 4).convert("P"))

    def read() -> Any:
        return ADE20K(folder, "training").load(0)

    return [Case(file, read), Case(folder / "objectInfo150.txt", read), Case(palette, lambda: read_labels(palette))]


@reader
def depths(folder: Path) -> list[Case]:
    depth = Image.fromarray(noise(8, 9).astype(np.uint16) * 20)
    file = saved(folder / "d.png", depth)
    saved(folder / "i.png", Image.fromarray(noise(8, 9, 3)))
    (folder / "train.txt").write_text("i.png d.png 518.8\n" * 3)

    def pairs() -> Any:
        return NYUFolder(folder, "training").load(0)

    return [Case(file, lambda: read_depth(file)), Case(folder / "train.txt", pairs), Case(file, pairs)]


@reader
def matlab(folder: Path) -> list[Case]:
    depth = np.random.default_rng(0).uniform(1, 5, (4, 9, 8)).astype(np.float32)
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = noise(4, 3, 9, 8)
        file["depths"] = depth
        names = [file.create_dataset(f"name{i}", data=np.array([[97], [98 + i]], np.uint16)).ref for i in range(4)]
        file["scenes"] = np.array([names], dtype=h5py.ref_dtype)
    savemat(folder / "splits.mat", {"trainNdxs": np.array([[1], [4]]), "testNdxs": np.array([[2]])})

    def read() -> Any:
        source = NYUv2(folder, "training")
        try:
            return [source.load(index) for index in range(len(source))]
        finally:
            if source._handle is not None:
                source._handle[1].close()

    return [Case(folder / "nyu_depth_v2_labeled.mat", read), Case(folder / "splits.mat", read)]


@reader
def shards(folder: Path) -> list[Case]:
    buffer = io.BytesIO()
    Image.fromarray(noise(6, 7, 3)).save(buffer, "PNG")
    with tarfile.open(folder / "a.tar", "w") as file:
        for index in range(3):
            info = tarfile.TarInfo(f"{index}.png")
            info.size = len(buffer.getvalue())
            file.addfile(info, io.BytesIO(buffer.getvalue()))
    return [Case(folder / "a.tar", lambda: [read_image(member) for member in list_members(folder / "a.tar")])]


@reader
def ground_truth(folder: Path) -> list[Case]:
    truth = {
        "imlist": ["a", "b"],
        "qimlist": ["q"],
        "gnd": [{"bbx": np.array([0.0, 0, 4, 4]), "easy": np.array([0]), "hard": [1], "junk": np.array([], int)}],
    }
    for name in ("a", "b", "q"):
        saved(folder / "roxford5k" / "jpg" / f"{name}.jpg", Image.fromarray(noise(6, 6, 3)))
    path = folder / "roxford5k" / "gnd_roxford5k.pkl"
    cases = []
    for protocol in (0, 2, 5):
        seed = path.with_name(f"seed{protocol}")
        seed.write_bytes(pickle.dumps(truth, protocol))

        def read(seed: Path = seed) -> Any:
            path.write_bytes(seed.read_bytes())
            return open_revisited(folder, "roxford5k")

        cases.append(Case(seed, read))
    return cases


@reader
def settings(folder: Path) -> list[Case]:
    path = folder / "config.yaml"
    path.write_text(
        "out: runs/a\nmethod: value\nsteps: 30\ndata: {unlabeled: images, ade20k: ADE, workers: 0}\n"
        "views:\n  global_size: 32\n  blur: [1.0, 0.1, 0.5]\noptim: {lr: 1.0e-4, batch_size: 8}\n"
        "backbone: {name: vit_tiny_patch16_224, kwargs: {embed_dim: 24}}\nvalue: {scope: {patterns: [norm]}}\n"
    )
    run = folder / "run"
    run.mkdir()
    config = Config(out=str(run), method="baseline")
    config.data.unlabeled = "images"
    row = '{"step": 3, "loss": 2.5}\n{"step": 4, "event": "loss_spike", "message": "loss 9 rose"}\n'

    def begun() -> None:
        if not (run / "metrics.jsonl").exists():
            (run / "metrics.jsonl").write_text(row)

    def prepared() -> Any:
        begun()
        return prepare_folder(config, run)

    def rows() -> None:
        MetricsFile(run, 3).close()

    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    (run / "metrics.jsonl").write_text(row)
    (run / "environment.json").write_text(json.dumps({"seed": 0, "packages": {"torch": "2"}, "resumed": [{}]}))
    return [
        Case(path, lambda: load_config(path)),
        Case(run / "config.yaml", prepared),
        Case(run / "metrics.jsonl", rows),
        Case(run / "environment.json", lambda: record_environment(run, {"seed": 0})),
    ]


@reader
def checkpoints(folder: Path) -> list[Case]:
    path, kept = folder / "step_00000002.pt", folder / "replay.pt"
    weight = torch.arange(30.0)
    state = {"teacher": {"w": weight}, "step": 2, "positions": [0.0, True], "best": {"step": None, "value": 0.5}}
    write_state(path, state)
    write_state(kept, {"config": "out: a\n", "message": "m", "terms": {"loss": 1.0}, "batch": [weight], "state": state})

    def whole() -> None:
        found = load_checkpoint(path)
        if not (torch.equal(found["teacher"]["w"], weight) and {**found, "teacher": 0} == {**state, "teacher": 0}):
            raise AssertionError("read as something else")

    return [Case(path, whole), Case(kept, lambda: read_replay(kept)), Case(path, lambda: read_state(path))]


@reader
def weights(folder: Path) -> list[Case]:
    backbone = create_backbone("vit_tiny_patch16_224", 16, KWARGS)
    plain, pickled = folder / "backbone.safetensors", folder / "dino.pth"
    save_backbone(plain, backbone, {"step": "3"})
    arguments = argparse.Namespace(arch="vit_tiny", lr=np.float64(1e-3))
    torch.save(
        {"teacher": {f"module.{k}": v for k, v in backbone.model.state_dict().items()}, "args": arguments}, pickled
    )
    return [
        Case(plain, lambda: load_backbone(plain)),
        Case(pickled, lambda: load_weights(backbone, pickled, min_match=0.0)),
    ]


def damaged(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """One to three kinds of damage."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.randrange(8)
        start = rng.randrange(len(found)) if found else 0
        length = rng.choice((1, 2, 4, 8, 64, len(found) // 2))
        if kind == 0:
            for _ in range(rng.choice((1, 1, 4, 32))):
                if found:
                    found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        elif kind == 1 and found:
            found[start : start + length] = bytes(rng.choice((0, 255, 127, rng.randrange(256))) for _ in range(length))
        elif kind == 2:
            del found[start:]
        elif kind == 3:
            del found[start : start + length]
        elif kind == 4:
            found[start:start] = found[start : start + length]
        elif kind == 5:
            found[start : start + length] = other[start : start + length]
        elif kind == 6:
            found[start : start + length] = rng.randbytes(length)
        else:  # the header: where formats say how large all is
            for _ in range(4):
                if found:
                    found[rng.randrange(min(64, len(found)))] = rng.randrange(256)
    return bytes(found)


def attempt(cases: list[Case], number: int, seed: int) -> str:
    """`read`, `refused`, or a traceback, of damage `number`."""
    rng = random.Random(f"{seed} {number}")
    file, read = cases[number % len(cases)]
    good, other = file.read_bytes(), rng.choice(cases).file.read_bytes()
    file.write_bytes(damaged(good, other, rng))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read()
        return "read"
    except UserError as error:
        return "refused" if "\n" not in str(error).strip() else f"several lines: {error!r}"
    except BaseException:
        return traceback.format_exc(limit=-4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        file.write_bytes(good)


def late(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"no answer after {SECONDS} s")


def main(arguments: list[str]) -> int:
    given = [*arguments, *("2000", "0")[len(arguments) :]]
    count, seed = int(given[0]), int(given[1])
    names = given[2:] or list(READERS)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, late)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    found: dict[str, dict[str, int]] = {}
    bad, seen = 0, set[str]()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            cases = READERS[name](Path(folder))
            tally = found[name] = {"read": 0, "refused": 0}
            for number in range(-(-count // len(names))):
                if "--trace" in sys.argv:
                    print(name, number, file=sys.stderr, flush=True)
                outcome = attempt(cases, number, seed)
                if outcome in tally:
                    tally[outcome] += 1
                    continue
                bad += 1
                kind = outcome.rstrip().splitlines()[-1][:60]
                if f"{name} {kind}" not in seen:
                    seen.add(f"{name} {kind}")
                    print(
                        f"{name} {cases[number % len(cases)].file.name} number {number} seed {seed}\n{outcome}",
                        file=sys.stderr,
                    )
    tried = sum(sum(tally.values()) for tally in found.values()) + bad
    print(json.dumps({"tried": tried, "bad": bad, "readers": found}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main([part for part in sys.argv[1:] if part != "--trace"]))
