"""Parts from outside: a mask generator, head, objective, method, direction or tracker that this package does not have.

A plugin is a Python module that registers its parts as it is imported:

    from dino_value import plugins

    @plugins.mask_generator("stripes")
    class Stripes(nn.Module): ...

It is named in the configuration (`plugins=[my_module]`, or a file, `plugins=[my_parts.py]`), or an installed package
announces it under the entry point group `dino_value.plugins`. A run's config.yaml keeps the name, so that whoever goes
on with the run, or reports about it, loads the same parts.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import zlib
from collections.abc import Callable, MutableMapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from dino_value import config as names
from dino_value.errors import UserError

GROUP = "dino_value.plugins"
NAME = re.compile(r"[A-Za-z0-9_-]+")
Part = TypeVar("Part")
_registered: list[tuple[MutableMapping[str, Any], str, list[str], str]] = []
"""registry, name in it, names of the configuration, name there: in the order of registering."""


def resolved(modules: Sequence[str]) -> list[str]:
    """The same with `.py` files as absolute paths, as a run is gone on with from anywhere."""
    return [str(Path(name).resolve()) if name.lower().endswith(".py") else name for name in modules]


def load(modules: Sequence[str]) -> None:
    """Import the installed plugins, and those named: modules, also of the working directory, or `.py` files.

    Raises:
        UserError: one is not there, fails as it is imported, or registers nothing.
    """
    _load_installed()
    for name in resolved(modules):
        _load(name)


@cache
def _load_installed() -> None:
    for point in entry_points(group=GROUP):
        _enter(f"the installed plugin {point.value}", point.value.split(":")[0], point.load)


@cache
def _load(name: str) -> None:
    if not name.endswith(".py"):
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"plugins={name}: not the name of a module; give one, or a .py file")
        return _enter(f"plugins={name}", name, lambda: importlib.import_module(name))
    path = Path(name)
    if not path.is_file():
        raise UserError(f"plugins={name}: no such file")
    # a name of its own: json.py must not stand in for the module json
    own = f"dino_value_plugin_{path.stem}_{zlib.crc32(name.encode()):08x}"
    _enter(f"plugins={name}", own, lambda: _import_file(path, own), path.parent)


def _import_file(path: Path, name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)


def _enter(what: str, module: str, run: Callable[[], Any], folder: Path | None = None) -> None:
    """Import a plugin, its folder within reach; where it fails, nothing of it stays.

    Raises:
        UserError: it fails, or registers nothing.
    """
    before, place = len(_registered), str(folder or Path.cwd())
    loaded = module in sys.modules
    sys.path.append(place)  # last: a torch.py there is not torch
    try:
        run()
        if len(_registered) == before and not loaded:
            raise UserError(f"{what}: registers nothing; see docs/plugins.md")
    except BaseException as error:
        while len(_registered) > before:
            registry, name, choices, shown = _registered.pop()
            del registry[name]
            choices.remove(shown)
        if not loaded:
            sys.modules.pop(module, None)
        if isinstance(error, UserError):
            raise
        if isinstance(error, ModuleNotFoundError):
            missing = error.name or ""
            if f"{module}.".startswith(f"{missing}."):
                raise UserError(
                    f"{what}: no such module here or among what is installed; give a module's name or a .py file"
                ) from None
            raise UserError(f"{what}: imports {missing}, which is not installed") from None
        if isinstance(error, (Exception, SystemExit)):
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"{what}: fails as it is imported: {said}") from None
        raise
    finally:
        sys.path.remove(place)


def mask_generator(name: str) -> Callable[[Part], Part]:
    """A class of (width, depth, stride, keep_ratio, **designer.options): views [n 3 H W] -> masks [n 1 H W] in [0, 1].
    It is chosen by `designer.name`."""
    from dino_value.designers import DESIGNERS

    return _registering("designer.name", name, DESIGNERS, names.MASKS)


def head(task: str, name: str) -> Callable[[Part], Part]:
    """A class of (dim D, classes): feature maps [B D h w] (class features [B D] for `classes`) -> predictions. It is
    chosen by `feedback.TASK.head`; `task` is `seg`, `depth` or `classes`."""
    from dino_value.heads import HEADS

    key = f"feedback.{task}.head"
    if key not in names.CHOICES:
        raise ValueError(f"plugins.head({task!r}, …): no such task; choose seg, depth or classes")
    return _registering(key, f"{task}_{name}", HEADS, names.CHOICES[key], shown=name)


def objective(name: str) -> Callable[[Part], Part]:
    """A function of (configuration, backbone) that returns an `Objective` (objectives/interface.py). It is chosen by
    `objective.name`."""
    from dino_value.training.steps import OBJECTIVES

    return _registering("objective.name", name, OBJECTIVES, names.CHOICES["objective.name"])


def method(name: str) -> Callable[[Part], Part]:
    """A function of (trainer, large crops, small crops) that takes one step (training/methods). It is chosen by
    `method`."""
    from dino_value.training.methods import METHODS

    return _registering("method", name, METHODS, names.CHOICES["method"])


def direction(name: str) -> Callable[[Part], Part]:
    """A function of (g_down, g_pre), one tensor a parameter of the scope, that returns u likewise. It is chosen by
    `value.direction`."""
    from dino_value.value import DIRECTIONS

    return _registering("value.direction", name, DIRECTIONS, names.CHOICES["value.direction"])


def tracker(name: str, needs: str = "dino_value") -> Callable[[Part], Part]:
    """A class of (track configuration, run folder, step, settings) that meets `Tracker` (runs/trackers.py); `needs` is
    the package that it imports. It is chosen by `track.to`."""
    from dino_value.runs.trackers import TRACKERS

    def keep(part: Part) -> Part:
        _registering("track.to", name, TRACKERS, names.TRACKERS)((needs, part))
        return part

    return keep


def _registering(
    key: str, name: str, registry: MutableMapping[str, Any], choices: list[str], shown: str | None = None
) -> Callable[[Part], Part]:
    """Enters a part under its name, which nothing else may have, and lets the configuration take it."""
    shown = shown or name

    def enter(part: Part) -> Part:
        if not NAME.fullmatch(shown):
            raise ValueError(f"{key}={shown}: a name has letters, digits, _ and - alone")
        if name in registry or shown in choices or (key == "designer.name" and shown in names.RESERVED):
            raise ValueError(f"{key}={shown} is taken; give the part another name")
        if not callable(part) and not isinstance(part, tuple):
            raise ValueError(f"{key}={shown}: {part!r} is neither a class nor a function")
        registry[name] = part
        choices.append(shown)
        _registered.append((registry, name, choices, shown))
        return part

    return enter
