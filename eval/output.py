"""What an evaluation leaves behind: a folder, results.json, a table; and how a file of eval/ runs as a script."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dino_value.arguments import exit_code
from dino_value.errors import UserError
from dino_value.files import write_json

Intervals = Mapping[str, tuple[float, float]]


def format_size(size: Sequence[int]) -> str:
    """(height, width) as `480x640`."""
    return "x".join(str(side) for side in size)


def nest(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Metrics as JSON takes them: `iou/wall` in a mapping `iou`, and null for what has no value."""
    nested: dict[str, Any] = {}
    for key, value in metrics.items():
        number = value if math.isfinite(value) else None  # JSON has no NaN: a class that appears nowhere is null
        head, slash, tail = key.partition("/")
        if slash:
            nested.setdefault(head, {})[tail] = number
        else:
            nested[key] = number
    return nested


def format_value(value: float, interval: tuple[float, float] | None = None) -> str:
    """`0.2341 [0.2310, 0.2377]`."""
    if math.isnan(value):
        return "–"
    return f"{value:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def print_table(metrics: Mapping[str, float], intervals: Intervals) -> None:
    """The metrics of one evaluation, without those of single classes."""
    table = Table("metric", "value", "95 % interval")
    for key, value in metrics.items():
        if "/" not in key:
            low, high = intervals.get(key, (math.nan, math.nan))
            table.add_row(key, format_value(value), "" if math.isnan(low) else f"{low:.4f} … {high:.4f}")
    Console().print(table)


def print_comparison(title: str, rows: Mapping[str, Mapping[str, str]]) -> None:
    """A row a checkpoint, a column a metric."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    table = Table("checkpoint", *columns, title=title)
    for name, row in rows.items():
        table.add_row(name, *(row.get(column, "–") for column in columns))
    Console().print(table)


def training_of(settings: Mapping[str, Any]) -> str:
    """Whether the backbone was trained, and on how many labels, in words."""
    with_or_without = "with" if settings.get("finetune") else "without"
    labels = "all" if settings.get("labels") is None else settings["labels"]
    return f"{with_or_without} --finetune, {labels} labels"


def settings_in(path: Path) -> dict[str, Any]:
    """The settings in a results.json; none where there is no such file, or nothing to read in it."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found


def prepare_folder(path: Path) -> None:
    """Make the output folder now, so that a missing permission is not found after the work.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot make the output folder ({error.strerror})") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path}: no permission to write in the output folder")


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """`files.write_json`, with the disk's refusal as the user's error.

    Raises:
        UserError: the disk refused it.
    """
    try:
        write_json(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def script(main: Callable[[Sequence[str]], int]) -> None:
    """Run `main` as `python eval/<name>.py …`, with the exit codes of the dino-value command."""
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
