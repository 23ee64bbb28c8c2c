"""Files of text → prompts and answers → tokens.

A record has a prompt and an answer (`question`/`answer`, `problem`/`solution`, …) or is a plain document (`text`).
"""

from __future__ import annotations

import itertools
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dino_value.errors import UserError

PROMPTS = ("question", "problem", "prompt", "instruction", "input")
ANSWERS = ("answer", "solution", "response", "output", "completion")
DOCUMENTS = ("text", "content", "document")
CHOICES = ("choices", "subject", *"ABCDEFGHIJ")  # multiple choice
INSTRUCTION = "\n\nPresent the answer in LaTex format: \\boxed{Your answer}"
"""Ends the questions of OMEGA as published, and of other sets for training on mathematics."""
CHAT = ("messages", "ground_truth")


class Example(NamedTuple):
    """`answer` follows `prompt` word for word; a plain document has no prompt."""

    prompt: str
    answer: str


def format_example(question: str, answer: str) -> Example:
    """The paper's form for NuminaMath and GSM8K: "Question: …\\n Answer: …"."""
    return Example(f"Question: {question}\n Answer:", f" {answer}")


def question_of(example: Example) -> str:
    """The question of an example of this form."""
    return example.prompt.removeprefix("Question: ").removesuffix("\n Answer:")


def read_record(record: Mapping[str, Any], where: str) -> Example:
    """One record as an example; `messages` with a `ground_truth` (a chat of one question, as the Hub has OMEGA) too.

    Raises:
        UserError: no known field, a field that is not text, or an empty answer.
    """
    asked, answered = _field(record, PROMPTS), _field(record, ANSWERS)
    if (question := first_message(record)) and _field(record, CHAT[1:]):
        return format_example(question, str(record[CHAT[1]]))
    if asked and answered:
        question, answer = str(record[asked]), str(record[answered])
        if not answer.strip():
            raise UserError(f"{where}: the {answered} is empty; remove the record")
        return format_example(question, answer)
    if (plain := _field(record, DOCUMENTS)) is not None:
        if not str(record[plain]).strip():
            raise UserError(f"{where}: the {plain} is empty; remove the record")
        return Example("", str(record[plain]))
    raise UserError(
        f"{where}: fields {', '.join(map(str, record)) or 'none'}; expected one of {', '.join(PROMPTS)} with one of "
        f"{', '.join(ANSWERS)}, or one of {', '.join(DOCUMENTS)}"
    )


def _field(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if isinstance(record.get(name), (str, int, float))), None)


def first_message(record: Mapping[str, Any]) -> str:
    """What the user says first in a chat, less `INSTRUCTION`; empty without one."""
    said = record.get(CHAT[0])
    first = said[0] if isinstance(said, Sequence) and said else None
    return str(first.get("content") or "").removesuffix(INSTRUCTION) if isinstance(first, Mapping) else ""


class Source(Protocol):
    """Records by position."""

    name: str

    def __len__(self) -> int: ...

    def record(self, index: int) -> Mapping[str, Any]: ...


def example(source: Source, index: int) -> Example:
    """Record `index` of a source as an example."""
    return read_record(source.record(index), place(source, index))


def place(source: Source, index: int) -> str:
    """A record in words, counted from 1 as editors count lines."""
    return f"{source.name}, record {index + 1}"


def open_source(path: str) -> Source:
    """A .jsonl, .parquet or .txt file, or `hf:NAME[:SPLIT]`, a data set in the local cache of `datasets`.

    Raises:
        UserError: it is not there, cannot be read, or is empty.
    """
    if path.startswith("hf:"):
        return _filled(_hub(path))
    file = Path(path)
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; give a .jsonl, .parquet or .txt file, or hf:NAME for a cached data set")
    openers = {".jsonl": _Lines, ".json": _Lines, ".parquet": _parquet, ".txt": _Documents}
    if file.suffix not in openers:
        raise UserError(f"{path}: expected .jsonl, .parquet or .txt, or hf:NAME for a cached data set")
    return _filled(openers[file.suffix](file))


def read_examples(path: str, limit: int | None = None) -> list[Example]:
    """The first `limit` examples of a file, all by default."""
    source = open_source(path)
    return [example(source, index) for index in range(min(len(source), limit or len(source)))]


def records(path: str) -> Iterator[Mapping[str, Any]]:
    """Every record of a file, in order."""
    source = open_source(path)
    return (source.record(index) for index in range(len(source)))


def _filled(source: Source) -> Source:
    if not len(source):
        raise UserError(f"{source.name}: holds no records")
    return source


class _Lines:
    """JSON Lines: only the offsets of the lines are kept in memory."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._map, starts = _mapped(path), [0]
        while self._map and (end := self._map.find(b"\n", starts[-1])) >= 0:
            starts.append(end + 1)
        if starts[-1] < len(self._map):
            starts.append(len(self._map))
        spans = itertools.pairwise(starts)
        self._spans = np.array([(a, b) for a, b in spans if self._map[a:b].strip()], dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def record(self, index: int) -> Mapping[str, Any]:
        start, end = self._spans[index].tolist()
        try:
            found = json.loads(self._map[start:end])
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{self.name}, record {index + 1}: not JSON ({error})") from None
        if not isinstance(found, dict):
            raise UserError(f"{self.name}, record {index + 1}: expected an object, one on each line")
        return found


class _Documents:
    """Plain text; an empty line ends a document."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            parts = path.read_text(encoding="utf-8").split("\n\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
        self._parts = [part.strip("\n") for part in parts if part.strip()]

    def __len__(self) -> int:
        return len(self._parts)

    def record(self, index: int) -> Mapping[str, Any]:
        return {"text": self._parts[index]}


class _Table:
    """Anything with a length that gives a dictionary for a position."""

    def __init__(self, name: str, rows: Any) -> None:
        self.name, self._rows = name, rows

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._rows[index]
        return found


def _parquet(path: Path) -> Source:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'dino-value[language]'") from None
    try:
        columns = {*PROMPTS, *ANSWERS, *DOCUMENTS, *CHAT, *CHOICES}
        names = [name for name in parquet.read_schema(path).names if name in columns]
        return _Table(str(path), parquet.read_table(path, columns=names).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _hub(name: str) -> Source:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: needs the package datasets: pip install 'dino-value[language]'") from None
    _, dataset, *split = name.split(":")
    download = datasets.DownloadConfig(local_files_only=True)
    try:
        rows = datasets.load_dataset(dataset, split=split[0] if split else "train", download_config=download)
    except Exception as error:  # whatever the library raises, the data set cannot be had
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: not in the local cache of datasets, and nothing is downloaded ({reason})") from None
    return _Table(name, rows)


def _mapped(path: Path) -> Any:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


class Tokens(NamedTuple):
    """Token ids, and which of them count as labels; equal lengths."""

    ids: list[int]
    counted: list[bool]


class Encoder:
    """Examples to tokens: [begin] prompt answer end. Prompt and answer are tokenized apart, so the border is exact.

    Args:
        answer_only: only the answer, with the end token, counts.

    Raises:
        UserError: the tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer: Any, answer_only: bool = True) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path or ''} has no end-of-text token, which closes every answer; "
                "set eos_token in its tokenizer_config.json"
            )
        self.tokenizer, self.answer_only = tokenizer, answer_only
        self.end: int = tokenizer.eos_token_id
        self.begin = [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]

    def plain(self, text: str) -> list[int]:
        """Token ids of `text` alone."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def prompt(self, text: str) -> list[int]:
        """What the model is given before it answers."""
        return [*self.begin, *self.plain(text)]

    def encode(self, example: Example) -> Tokens:
        """An example with its begin and end tokens."""
        prompt, answer = self.prompt(example.prompt) if example.prompt else self.begin, self.plain(example.answer)
        before = not self.answer_only and bool(example.prompt)
        return Tokens([*prompt, *answer, self.end], [before] * len(prompt) + [True] * (len(answer) + 1))
