"""Remove from a stream of text what is also in evaluation sets, and say what was removed and why.

Candidates come from MinHash LSH (datasketch) and, for questions inside longer texts, from an index of their word
n-grams; what decides is exact: the Jaccard similarity of the two sets of n-grams, or the share of a test question's
n-grams that the text contains. One pass over the stream, in memory only the test sets; the same result every time.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dino_value.errors import UserError
from dino_value.files import write_json
from dino_value.language.text import ANSWERS, CHAT, DOCUMENTS, PROMPTS, first_message, records

PERMUTATIONS = 128
_SHOWN = 500  # characters of a text in the report
_WORDS = re.compile(r"[^\W_]+(?:[.,]\d+)*")


class Settings(NamedTuple):
    """What counts as the same text."""

    ngram: int = 5  # words
    jaccard: float = 0.5  # similarity of whole texts, or of their questions
    containment: float = 0.8  # share of a test question's n-grams found in a text


class Reference(NamedTuple):
    """A text of a test set that must not be in the stream."""

    file: str
    record: int
    text: str
    ngrams: frozenset[str]


class Match(NamedTuple):
    reference: Reference
    rule: str
    """`jaccard` or `containment`."""
    similarity: float
    text: str
    """The part of the record that matched."""


def words(text: str) -> list[str]:
    """Lower-case words and numbers; punctuation, mark-up and the width of spaces do not count."""
    return _WORDS.findall(unicodedata.normalize("NFKC", text).lower())


def ngrams(text: str, size: int) -> frozenset[str]:
    """The set of word n-grams; a text of fewer words is one n-gram."""
    found = words(text)
    if not found:
        return frozenset()
    return frozenset(" ".join(found[i : i + size]) for i in range(max(1, len(found) - size + 1)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """|a ∩ b| / |a ∪ b|; 0 for empty sets."""
    return len(a & b) / len(a | b) if a and b else 0.0


def views(record: Mapping[str, Any]) -> list[str]:
    """The texts of a record that are compared: its question, and question and answer together, or the document."""
    asked = next((str(record[name]) for name in PROMPTS if isinstance(record.get(name), str)), None)
    prompt = first_message(record) or asked
    answers = (*CHAT, *ANSWERS)
    answer = next((str(record[name]) for name in answers if isinstance(record.get(name), (str, int, float))), None)
    if prompt is not None:
        return [prompt, f"{prompt}\n{answer}"] if answer else [prompt]
    plain = next((str(record[name]) for name in DOCUMENTS if isinstance(record.get(name), str)), None)
    return [plain] if plain is not None else [" ".join(str(v) for v in record.values() if isinstance(v, str))]


class Index:
    """Test sets, to be asked about one record after another.

    Raises:
        UserError: datasketch is missing, or a file cannot be read.
    """

    def __init__(self, files: Sequence[str], settings: Settings) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise UserError("decontamination needs datasketch: pip install 'dino-value[language]'") from None
        self.settings, self._minhash = settings, MinHash
        # Leans to finding too much: the exact similarity decides.
        wanted = min(0.99, max(0.1, settings.jaccard - 0.1))
        self._lsh = MinHashLSH(threshold=wanted, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
        self.references: list[Reference] = []
        self._holders: dict[str, list[int]] = {}  # n-gram -> references that it may be contained from
        for file in files:
            for number, record in enumerate(records(file)):
                for place, text in enumerate(views(record)):
                    reference = Reference(file, number + 1, text, ngrams(text, settings.ngram))
                    if not reference.ngrams:
                        continue
                    self._lsh.insert(len(self.references), self._hash(reference.ngrams))
                    if place == 0 and len(words(text)) >= settings.ngram:
                        for gram in reference.ngrams:
                            self._holders.setdefault(gram, []).append(len(self.references))
                    self.references.append(reference)

    def match(self, record: Mapping[str, Any]) -> Match | None:
        """The closest test text that `record` is a copy of."""
        found: list[Match] = []
        for text in views(record):
            grams = ngrams(text, self.settings.ngram)
            if not grams:
                continue
            for number in self._lsh.query(self._hash(grams)):
                similarity = jaccard(grams, self.references[number].ngrams)
                if similarity >= self.settings.jaccard:
                    found.append(Match(self.references[number], "jaccard", similarity, text))
            shared = Counter(number for gram in grams for number in self._holders.get(gram, ()))
            for number, count in shared.items():
                share = count / len(self.references[number].ngrams)
                if share >= self.settings.containment:
                    found.append(Match(self.references[number], "containment", share, text))
        order = {reference: -number for number, reference in enumerate(self.references)} if found else {}
        return max(found, key=lambda one: (one.similarity, one.rule, order[one.reference]), default=None)

    def _hash(self, grams: Iterable[str]) -> Any:
        sketch = self._minhash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch([gram.encode() for gram in sorted(grams)])
        return sketch


def decontaminate(stream: Path, against: Sequence[str], out: Path, settings: Settings | None = None) -> dict[str, Any]:
    """Write the lines of `stream` that are in no file of `against`, unchanged, to out/STREAM, and out/report.json.

    Args:
        stream: JSON Lines.
        against: evaluation files, of any form that `dino_value.language.text` reads.

    Returns:
        The report: counts, settings, and each removed line with the test text that it matched.

    Raises:
        UserError: unreadable files, or an `out` that is the stream's own folder.
    """
    settings = settings or Settings()
    if not stream.is_file():
        raise UserError(f"{stream}: no such file; give a .jsonl stream")
    target = out / stream.name
    if out.resolve() == stream.resolve().parent:
        raise UserError(f"--out {out} holds the stream itself; choose another folder")
    index = Index(against, settings)
    removed: list[dict[str, Any]] = []
    total = 0
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{stream.name}.part"
    try:
        with open(stream, "rb") as lines, open(temporary, "wb") as kept:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    kept.write(line)
                    continue
                total += 1
                match = index.match(_record(line, stream, number))
                if match is None:
                    kept.write(line)
                else:
                    removed.append({"line": number, **_told(match)})
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    report = {
        "stream": str(stream),
        "against": list(against),
        "settings": settings._asdict(),
        "lines": total,
        "kept": total - len(removed),
        "removed_count": len(removed),
        "removed": removed,
    }
    write_json(out / "report.json", report)
    return report


def overlap(
    file: str, against: Sequence[str], limit: int | None = None, settings: Settings | None = None
) -> list[Match]:
    """Matches of the first `limit` records of a file with evaluation files."""
    index = Index(against, settings or Settings())
    chosen = [record for number, record in enumerate(records(file)) if limit is None or number < limit]
    return [match for record in chosen if (match := index.match(record)) is not None]


def refuse_overlap(file: str, against: Sequence[str], limit: int | None = None) -> None:
    """Raises:
    UserError: feedback that is also in a test file, with the overlap shown.
    """
    found = overlap(file, against, limit)
    if found:
        first = found[0]
        raise UserError(
            f"feedback {file} overlaps the test file {first.reference.file}: {len(found)} records, for example "
            f"{_short(first.text, 120)!r} is its record {first.reference.record} {_short(first.reference.text, 120)!r} "
            f"({first.rule} {first.similarity:.2f}); take feedback from training examples"
        )


def _told(match: Match) -> dict[str, Any]:
    return {
        "text": _short(match.text, _SHOWN),
        "rule": match.rule,
        "similarity": round(match.similarity, 4),
        "test_file": match.reference.file,
        "test_record": match.reference.record,
        "test_text": _short(match.reference.text, _SHOWN),
    }


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _record(line: bytes, stream: Path, number: int) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{stream}, line {number}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{stream}, line {number}: expected an object")
    return found
