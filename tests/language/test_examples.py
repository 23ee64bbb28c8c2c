"""The measuring scripts of docs/examples run, on the tiny model."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dino_value.language.config import LanguageConfig

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)


@pytest.mark.parametrize("parts", [False, True])
def test_overhead(tiny: Callable[..., LanguageConfig], root: Path, parts: bool) -> None:
    found = load("language_overhead")["measure"](str(root / "tiny.yaml"), 1, [], parts=parts, memory=False)
    rows = {line.split("|")[1].strip(): line.split("|") for line in found.splitlines()[2:]}
    assert set(rows) == {"baseline", "value"}
    assert rows["baseline"][5].strip() == "0.0%"  # no value update in the baseline
    assert 0 < float(rows["value"][5].strip().rstrip("%")) < 100


def test_the_table_of_methods() -> None:
    pytest.importorskip("scipy")
    results = [
        {"baseline": {"loss": 1.0, "accuracy": 0.5}, "value": {"loss": 0.8, "accuracy": 0.5}},
        {"baseline": {"loss": 2.0, "accuracy": 0.6}, "value": {"loss": 1.8, "accuracy": 0.7}},
    ]
    value = load("language_arithmetic")["table"](results).splitlines()[-1]
    assert value.startswith("| value | 1.3000 ± ")
    assert "| -0.2000 ± 0.0000 |" in value
    assert "| +5.0 ± " in value
