"""Sweeps with `kind: language`: runs of `dino-value language train`, judged by `dino-value language eval`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dino_value.errors import UserError
from dino_value.language import command
from dino_value.language.config import LanguageConfig


def flags(name: str, given: Mapping[str, Any], config: LanguageConfig) -> list[str]:
    """FILE and flags of `dino-value language eval`; the file is the training's `held.file` unless given.

    Raises:
        UserError: there is none.
    """
    rest = dict(given)
    file = rest.pop("file", None) or config.held.file
    if file is None:
        raise UserError(f"evaluations.{name}: give file=PATH, or held.file to the training")
    return [str(file), *as_flags(rest)]


def as_flags(given: Mapping[str, Any]) -> list[str]:
    """`{loss_only: true, limit: 8}` to `--loss-only --limit 8`."""
    found: list[str] = []
    for key, value in given.items():
        option = f"--{key.replace('_', '-')}"
        if value is True:
            found.append(option)
        elif value is not False:
            found += [option, *map(str, value if isinstance(value, list) else [value])]
    return found


def check_flags(given: Sequence[str]) -> None:
    """Raises:
    UserError: `dino-value language eval` would not take them.
    """
    command._parser().parse_args(["eval", "RUN", *given])


def measure(run_or_model: str, given: Sequence[str], path: Path) -> dict[str, float]:
    """Means of the metrics that `dino-value language eval` finds and leaves in `path`, which is read if it is there."""
    if not path.is_file():
        command.main(["eval", run_or_model, *given, "--out", str(path)])
    content = json.loads(path.read_text())
    return {name: float(row["mean"]) for name, row in content["metrics"].items()}
