"""What an installed copy consists of."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOVED = ("heads", "eval", "configs", "slurm")  # at the root, installed below dino_value


def installed_name(path: Path) -> str:
    """`heads/depth.py` -> `dino_value/heads/depth.py`."""
    relative = path.relative_to(ROOT)
    return str("dino_value" / relative if relative.parts[0] in MOVED else relative)


def sources(pattern: str) -> set[str]:
    return {installed_name(path) for folder in ("dino_value", *MOVED) for path in (ROOT / folder).rglob(pattern)}


def test_every_package_is_listed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    assert listed == {str(Path(name).parent).replace("/", ".") for name in sources("__init__.py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel, built from a copy: the build writes beside what it builds."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("dino_value", "tests", *MOVED):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: list[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"dino_value"}
    assert sources("*.py") <= set(wheel)
    assert not [name for name in wheel if "tests" in Path(name).parts or Path(name).name.startswith("test_")]


@pytest.mark.slow
def test_the_wheel_holds_the_data(wheel: list[str]) -> None:
    data = sources("*.yaml") | sources("*.safetensors") | sources("*.html") | sources("py.typed")
    assert data <= set(wheel)
    assert any(name.startswith("dino_value/configs/") and name.endswith(".yaml") for name in wheel)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)
