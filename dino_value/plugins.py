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
import sys
from collections.abc import Callable, MutableMapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from dino_value import config as names
from dino_value.errors import UserError

GROUP = "dino_value.plugins"
Part = TypeVar("Part")


def load(modules: Sequence[str]) -> None:
    """Import the installed plugins, and those named: modules, also of the working directory, or `.py` files.

    Raises:
        UserError: one is not there, or fails as it is imported.
    """
    _load_installed()
    for name in modules:
        _load(name)


@cache
def _load_installed() -> None:
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            raise UserError(f"the installed plugin {point.value} fails: {_said(error)}; mend or remove it") from None


@cache
def _load(name: str) -> None:
    try:
        if name.endswith(".py"):
            path = Path(name).resolve()
            if not path.is_file():
                raise UserError(f"plugins={name}: no such file in {Path.cwd()}")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = module  # where pickles and dataclasses look for it
            spec.loader.exec_module(module)
            return
        sys.path.insert(0, str(Path.cwd()))
        try:
            importlib.import_module(name)
        finally:
            sys.path.remove(str(Path.cwd()))
    except ModuleNotFoundError as error:
        if error.name != name:
            raise UserError(f"plugins={name}: imports {error.name}, which is not installed") from None
        raise UserError(
            f"plugins={name}: no such module here or among what is installed; give a module's name or a .py file"
        ) from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"plugins={name}: fails as it is imported: {_said(error)}") from None


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

    def enter(part: Part) -> Part:
        if name in registry or (shown or name) in choices:
            raise ValueError(f"{key}={shown or name} is taken; give the part another name")
        registry[name] = part
        choices.append(shown or name)
        return part

    return enter


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
