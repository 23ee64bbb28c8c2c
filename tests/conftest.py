"""Fixtures and rules for every test."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from dino_value.config import Config, load_config


def pytest_configure(config: pytest.Config) -> None:
    # A sharp teacher drives softmax outputs into denormals, which are several times slower on a CPU.
    torch.set_flush_denormal(True)
    # Small tensors: more threads than this only wait for each other.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def why_no_slurm() -> str | None:
    """What keeps slurm/local_cluster.sh from starting its cluster here, which tests/slurm uses and nothing else."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    programs = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd")
    missing = [name for name in programs if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed (slurm/local_cluster.sh install)"
    return None if os.geteuid() == 0 else "slurm/local_cluster.sh needs root"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say so, rather than leave it out of the selection."""
    needs_slurm = [item for item in items if item.get_closest_marker("slurm")]
    if needs_slurm and (reason := why_no_slurm()):
        for item in needs_slurm:
            item.add_marker(pytest.mark.skip(reason=reason))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def same_arithmetic() -> None:
    """What a command that ran before may have changed for the whole process: sums depend on the number of threads."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.set_flush_denormal(True)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(0)


TINY = """
steps: 4
log_every: 1
device: cpu
precision: fp32
data: {unlabeled: DATA/images, ade20k: DATA/ade, nyuv2: DATA/nyu, workers: 0}
views: {global_size: 16, local_size: 8, local_count: 2, blur_sigma: [0.1, 0.5]}
backbone:
  name: vit_tiny_patch16_224
  kwargs: {patch_size: 8, embed_dim: 24, depth: 3, num_heads: 3}
objective: {out_dim: 16, hidden_dim: 16, bottleneck_dim: 8, teacher_momentum: 0.9}
optim: {batch_size: 4, lr: 1.0e-3, warmup: 0}
value: {period: 2, batch_size: 4, radius: 1.0e-3} # a fresh head bends sharply
designer: {width: 4, depth: 1, lr: 1.0e-2, blur_sigma: 2.0}
feedback: {size: 16, batch_size: 4, warmup: 2, seg: {train: 8, meta: 4}, depth: {train: 6, meta: 4}}
checkpoint: {every: 2, keep: 9}
"""


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ (16 files), ade/ (ADE20K layout: 14 for training, 3 classes) and nyu/ (NYUv2: 12), noise of 24 × 24."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape, dtype=np.uint8)

    (root / "images").mkdir()
    for index in range(16):
        Image.fromarray(noise(24, 24, 3)).save(root / "images" / f"{index:02d}.png")
    for split, count in (("training", 14), ("validation", 2)):
        for part in ("images", "annotations"):
            (root / "ade" / part / split).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(noise(24, 24, 3)).save(root / "ade" / "images" / split / f"{index:02d}.png")
            Image.fromarray(noise(24, 24) % 4).save(root / "ade" / "annotations" / split / f"{index:02d}.png")
    (root / "ade" / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tfloor\n3\tdoor\n")
    (root / "nyu").mkdir()
    with h5py.File(root / "nyu" / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = noise(12, 3, 24, 24)
        file["depths"] = rng.uniform(1, 5, (12, 24, 24)).astype(np.float32)
    savemat(root / "nyu" / "splits.mat", {"trainNdxs": np.arange(1, 12)[:, None], "testNdxs": np.array([[12]])})
    return root


@pytest.fixture(scope="session")
def tiny_yaml(tiny_data: Path) -> Path:
    """A configuration file whose steps take hundredths of a second."""
    path = tiny_data / "tiny.yaml"
    path.write_text(TINY.replace("DATA", str(tiny_data)))
    return path


@pytest.fixture
def tiny(tiny_yaml: Path, tmp_path: Path) -> Callable[..., Config]:
    """The tiny configuration with `key=value` overrides; out= is a fresh folder unless given."""

    def make(*overrides: str) -> Config:
        return load_config(tiny_yaml, [f"out={tmp_path / 'run'}", *overrides])

    return make
