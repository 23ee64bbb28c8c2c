"""The import rule of docs/architecture.md."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOVED = ("heads", "eval", "slurm")  # at the root, installed below dino_value

# Rooms that know nothing of each other; training/ joins them.
LEAVES = ("objectives", "designers", "heads", "data", "models")
# What a room may import of ours beside itself and errors: rooms, or modules of them. (value/ is stricter: see below.)
ONLY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LEAVES, ("distributed.shards", "distributed.collectives", "seeds", "files")),
    "seeds": (),
    "errors": (),
    "files": (),
    "config": ("files", "plugins"),
    "settings": ("config", "plugins"),
    "distributed": ("config", "models.blocks", "models.learner", "value"),
    "runs": ("config", "distributed", "files", "value", "training.optim"),
    "tasks": ("heads", "data", "models"),
    "training": (
        *("value", *LEAVES, "tasks", "runs", "distributed", "config", "seeds", "arguments", "files", "plugins"),
        "report.gallery",  # the pictures that a run shows its trackers
        "eval.knn",
    ),
    "export": ("models", "runs", "config", "files"),
    "language": (
        *("value", "runs", "config", "seeds", "arguments", "files", "distributed", "training.optim"),
        *("report.figures", "report.history", "report.drawing", "report.statistics", "report.terminal"),
    ),
    "slurm": ("cli", "arguments", "config", "files", "runs"),
}
NEVER = {"eval": ("training.trainer", "training.designer_update", "studies")}
BENCHMARKS = (
    "dino_value.eval.overhead",
    "dino_value.eval.benchmarks.loops",
    "dino_value.eval.communication",
    "dino_value.eval.scaling",
)  # they time training itself


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Absolute dotted names that `source`, the text of `module`, imports anywhere, functions included."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            # `from dino_value import train` imports a module as `from dino_value.training.trainer import run` does
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def is_of(name: str, rooms: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the rooms or modules, or lies in one."""
    return any(f"{name}.".startswith(f"{room}.") for room in rooms)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Lines "module imports name" for every import of `source` that the rule forbids."""
    room = [*module.split("."), ""][1]
    found = []
    for name in imports(source, module, is_package):
        top, target = [*name.split("."), ""][:2]
        within = ".".join(name.split(".")[1:])  # "training.optim.AdamW"
        if top in MOVED:  # a second name for dino_value.<folder> would make a second copy of its classes
            forbidden = True
        elif room == "value":  # for any model and any loss; torchjd is an extra, imported where it is used
            ours = (top, target) == ("dino_value", "value")
            forbidden = not ours and top not in ("torch", "torchjd") and top not in sys.stdlib_module_names
        elif top != "dino_value" or target in (room, "errors", "__version__", ""):
            forbidden = False
        else:
            never = () if module in BENCHMARKS else NEVER.get(room, ())
            forbidden = (room in ONLY and not is_of(within, ONLY[room])) or is_of(within, never)
        if forbidden:
            found.append(f"{module} imports {name}")
    return found


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in MOVED:
        parts.insert(0, "dino_value")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(path for folder in ("dino_value", *MOVED) for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_rule(path: Path) -> None:
    assert violations(path.read_text(), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dino_value.value.engines", "import timm"),
        ("dino_value.value.engines", "from dino_value.errors import UserError"),
        ("dino_value.designers.unet", "from dino_value.objectives.dino import DINOLoss"),
        ("dino_value.designers.unet", "from ..objectives import dino"),
        ("dino_value.data.folders", "def f():\n    import dino_value.models.backbone"),
        ("dino_value.heads.depth", "from dino_value import train"),
        ("dino_value.eval.seg", "from dino_value.training.trainer import train"),
        ("dino_value.language.trainer", "from dino_value.models.backbone import Backbone"),
        ("dino_value.slurm.launch", "from dino_value.training.trainer import train"),
        ("dino_value.training.trainer", "from heads.depth import DepthHead"),
    ],
)
def test_a_violation_is_caught(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dino_value.value.engines", "import math\nimport torch\nfrom dino_value.value.scope import Scope"),
        ("dino_value.value.combination", "def f():\n    from torchjd import aggregation"),
        ("dino_value.data.folders", "from dino_value.errors import UserError\nimport numpy"),
        ("dino_value.eval.seg", "from dino_value.heads.segmentation import LinearBN"),
        (
            "dino_value.training.trainer",
            "from dino_value.models import backbone\nfrom dino_value.designers import build",
        ),
        ("dino_value.slurm.launch", "from dino_value.cli import main\nimport submitit"),
    ],
)
def test_what_the_rule_allows(module: str, source: str) -> None:
    assert violations(source, module) == []


def loaded_at_import(path: Path) -> Iterator[str]:
    """Modules of ours that importing the file loads: not what functions and type checkers import."""
    module, package = module_name(path), path.name == "__init__.py"
    body = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    for name in imports(ast.unparse(ast.Module(body, [])), module, package):
        parts = name.split(".")
        while parts and ".".join(parts) not in MODULES:
            parts.pop()
        if len(parts) > 1 and ".".join(parts) != module:
            yield ".".join(parts)


MODULES = {module_name(path): path for path in FILES}


def test_modules_import_each_other_in_no_circle() -> None:
    graph = {module: set(loaded_at_import(path)) for module, path in MODULES.items()}
    order = graphlib.TopologicalSorter(graph)
    order.prepare()  # raises CycleError, which names the circle
    assert len(graph) > 150
