"""OMEGA (arXiv 2506.18880) as its publishers evaluate it (allenai/olmo-eval, task omega): where an answer stands, when
it is right, what is asked for, and the files of the explorative, compositional and transformative sets.

One thing differs: a box ends at its own brace, not at the first one, so that \\boxed{\\frac{1}{2}} is one half.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from dino_value.errors import UserError
from dino_value.language.answers import boxes
from dino_value.language.text import INSTRUCTION, Example, format_example, question_of

TOLERANCE = 1e-6  # between numbers
SPLITS = {"test_in": "ID", "test_out": "OOD"}  # of the explorative set; the others have `test` alone
_AROUND = (r"\$+([^$]*)\$+", r"\\\((.*?)\\\)", r"\*{2,}(.*?)\*{2,}", r"\\\[(.*?)\\\]")


def omega_answer(text: str) -> str | None:
    """The content of the first \\boxed{}; without one, all that was said, less a full stop and what encloses it
    ($…$, \\(…\\), **…**, \\[…\\]). Commas between digits go."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    found = boxes(text)
    if found:
        return found[0]
    text = re.sub(r"\.\s*$", "", text).strip()
    for around in _AROUND:
        text = re.sub(around, r"\1", text).strip()
    return text or None


def omega_match(answer: str | None, truth: str) -> bool:
    """The same but for capitals, or numbers within `TOLERANCE`."""
    if answer is None:
        return False
    said, true = (part.strip().lower() for part in (answer, truth))
    try:
        return said == true or abs(float(said.replace(",", "")) - float(true.replace(",", ""))) < TOLERANCE
    except ValueError:
        return False


def instructed(example: Example, truth: str) -> Example:
    """The example with the instruction at the end of its question, and the answer in the form asked for."""
    question = question_of(example).removesuffix(INSTRUCTION)
    return format_example(question + INSTRUCTION, f"\\boxed{{{truth}}}")


class Part(NamedTuple):
    """A file of problems, the setting they are of and their split; either is empty where the names do not say."""

    file: str
    setting: str
    split: str


def omega_parts(path: str) -> list[Part]:
    """The test files of a set: a file, or a folder with SETTING/test_in*.parquet, test_out* and test* (as the Hub has
    them), or .jsonl; a setting is a folder's name.

    Raises:
        UserError: a folder without any.
    """
    root = Path(path)
    if not root.is_dir():
        return [Part(path, "", _split(root.name))]
    files = sorted(file for file in root.rglob("test*") if file.suffix in (".parquet", ".jsonl"))
    if not files:
        raise UserError(
            f"{path}: no test_in, test_out or test .parquet or .jsonl in this folder; give OMEGA's, or a file"
        )
    return [Part(str(file), "" if file.parent == root else file.parent.name, _split(file.name)) for file in files]


def _split(name: str) -> str:
    return next((label for split, label in SPLITS.items() if re.search(rf"{split}(?![a-z])", name)), "")
