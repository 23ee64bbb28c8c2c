"""Fixtures and rules for every test."""

import os
import shutil
import subprocess

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # A sharp teacher drives softmax outputs into denormals, which are several times slower on a CPU.
    torch.set_flush_denormal(True)
    # Small tensors: more threads than this only wait for each other.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def slurm_is_up() -> bool:
    """Whether a SLURM controller answers."""
    if shutil.which("sinfo") is None:
        return False
    try:
        return subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=10).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say so, rather than leave it out of the selection."""
    needs_slurm = [item for item in items if item.get_closest_marker("slurm")]
    if needs_slurm and not slurm_is_up():
        for item in needs_slurm:
            item.add_marker(pytest.mark.skip(reason="no SLURM controller answers"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(0)
