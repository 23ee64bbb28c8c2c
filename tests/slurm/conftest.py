"""A real SLURM cluster of two nodes on this machine, for the tests marked `slurm`."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "local_cluster.sh"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """slurm.conf of a cluster of its own, ended afterwards; SLURM's commands find it."""
    root = Path(tempfile.mkdtemp(prefix="dino-value-slurm-"))
    root.chmod(0o755)  # munge wants its socket where everybody may look, and pytest's folders are private
    folder = root / "cluster"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DINO_VALUE_SLURM", str(folder))
        patch.setenv("DINO_VALUE_SLURM_PORT", str(27000 + 10 * (os.getpid() % 500)))
        try:
            started = subprocess.run([SCRIPT, "start"], capture_output=True, text=True, timeout=300)
            assert started.returncode == 0, started.stderr
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            patch.setenv("OMP_NUM_THREADS", "1")
            yield folder / "slurm.conf"
        finally:
            subprocess.run([SCRIPT, "stop"], capture_output=True, timeout=300)
            shutil.rmtree(root)
