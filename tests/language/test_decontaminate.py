"""Copies go, with the test text that they copy; everything else stays byte for byte."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dino_value.cli import main
from dino_value.errors import UserError
from dino_value.language.decontaminate import (
    Settings,
    decontaminate,
    jaccard,
    ngrams,
    overlap,
    refuse_overlap,
    words,
)

pytest.importorskip("datasketch")

WORDS = [
    *("river", "stone", "bridge", "seven", "green", "walks", "little"),
    *("boat", "many", "carry", "nine", "apples"),
]


def sentence(seed: int, count: int = 30) -> str:
    rng = random.Random(seed)
    return " ".join(f"{rng.choice(WORDS)}{rng.randrange(9)}" for _ in range(count))


@pytest.fixture
def test_file(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"question": sentence(n), "answer": f"#### {n}"}) + "\n" for n in range(40)))
    return path


def test_words_and_ngrams() -> None:
    assert words("It costs $1,200.50 — “Yes”, she\tSAID.") == ["it", "costs", "1,200.50", "yes", "she", "said"]
    assert ngrams("a b c d", 3) == {"a b c", "b c d"}
    assert ngrams("a b", 3) == {"a b"}
    assert ngrams("…", 3) == frozenset()
    assert jaccard(ngrams("a b c d", 3), ngrams("b c d e", 3)) == 1 / 3
    assert jaccard(frozenset(), frozenset()) == 0


def test_what_is_removed_and_what_stays(tmp_path: Path, test_file: Path) -> None:
    copied, words_of = sentence(3), sentence(7).split()
    words_of[10] = "changed"
    clean = [json.dumps({"problem": sentence(100 + n), "solution": "x"}, indent=None) for n in range(20)]
    leaks = {
        5: json.dumps({"problem": copied, "solution": "another answer entirely"}),
        9: json.dumps({"question": " ".join(words_of).upper() + "!!", "answer": "#### 7"}),  # one word of 30 changed
        14: json.dumps({"text": f"{sentence(500, 300)} {sentence(11)} {sentence(501, 300)}"}),  # inside a long text
    }
    lines = list(clean)
    for place, line in leaks.items():
        lines.insert(place, line)
    lines[2] = "  " + lines[2].replace(": ", " :  ")  # odd spacing is kept
    stream = tmp_path / "stream.jsonl"
    stream.write_text("\n".join(lines))  # no newline at the end
    report = decontaminate(stream, [str(test_file)], tmp_path / "out")
    kept = [line for number, line in enumerate(lines) if number not in leaks]
    assert (tmp_path / "out" / "stream.jsonl").read_text() == "\n".join(kept)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (report["lines"], report["kept"], report["removed_count"]) == (23, 20, 3)
    found = {row["line"]: row for row in report["removed"]}
    assert set(found) == {6, 10, 15}
    assert [found[line]["test_record"] for line in (6, 10, 15)] == [4, 8, 12]
    assert found[6]["test_text"] == copied
    assert found[6]["similarity"] == 1
    exact = jaccard(ngrams(" ".join(words_of), 5), ngrams(sentence(7), 5))
    assert found[10]["similarity"] >= round(exact, 4)
    assert found[15]["rule"] == "containment"


def test_the_same_every_time_and_in_any_order(tmp_path: Path, test_file: Path) -> None:
    stream = tmp_path / "stream.jsonl"
    rows = [json.dumps({"question": sentence(n), "answer": "1"}) for n in (3, 200, 4, 201)]
    stream.write_text("\n".join(rows) + "\n")
    first = decontaminate(stream, [str(test_file)], tmp_path / "a")
    assert decontaminate(stream, [str(test_file)], tmp_path / "b") == first
    stream.write_text("\n".join(reversed(rows)) + "\n")
    other = decontaminate(stream, [str(test_file)], tmp_path / "c")
    assert (
        {row["test_record"] for row in other["removed"]} == {row["test_record"] for row in first["removed"]} == {4, 5}
    )


def test_lsh_misses_nothing_that_the_exact_rule_finds(tmp_path: Path, test_file: Path) -> None:
    """Every pair at or above the threshold, by comparing all with all."""
    rng, stream = random.Random(0), tmp_path / "stream.jsonl"
    rows = []
    for number in range(40):
        changed = sentence(number).split()
        for place in rng.sample(range(30), number % 8):
            changed[place] = "other"
        rows.append(" ".join(changed))
    stream.write_text("".join(json.dumps({"question": row, "answer": str(n)}) + "\n" for n, row in enumerate(rows)))
    settings = Settings(containment=1.0)
    expected = {
        number + 1 for number, row in enumerate(rows) if jaccard(ngrams(row, 5), ngrams(sentence(number), 5)) >= 0.5
    }
    found = {row["line"] for row in decontaminate(stream, [str(test_file)], tmp_path / "o", settings)["removed"]}
    assert expected <= found
    assert len(found) < 40


def test_feedback_that_overlaps_is_refused(tmp_path: Path, test_file: Path) -> None:
    feedback = tmp_path / "feedback.jsonl"
    feedback.write_text(json.dumps({"question": sentence(900), "answer": "1"}) + "\n")
    assert overlap(str(feedback), [str(test_file)]) == []
    refuse_overlap(str(feedback), [str(test_file)])
    feedback.write_text(feedback.read_text() + json.dumps({"question": sentence(5), "answer": "1"}) + "\n")
    with pytest.raises(UserError, match=r"1 records, for example .* is its record 6 .*jaccard 1\.00"):
        refuse_overlap(str(feedback), [str(test_file)])
    refuse_overlap(str(feedback), [str(test_file)], limit=1)


def test_the_command(tmp_path: Path, test_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = tmp_path / "stream.jsonl"
    stream.write_text(json.dumps({"question": sentence(3), "answer": "1"}) + "\n")
    command = ["language", "decontaminate", str(stream), "--against", str(test_file), "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    assert "1 lines: 0 kept, 1 removed" in capsys.readouterr().out
    assert (tmp_path / "out" / "stream.jsonl").read_text() == ""
    for extra, said in (
        ([str(tmp_path)], "holds the stream itself"),
        ([str(tmp_path / "out"), "--jaccard", "2"], "at most 1"),
    ):
        assert main([*command, *extra]) == 2
        assert said in capsys.readouterr().err
    stream.write_text("{}\nnot json\n")
    assert main([*command, str(tmp_path / "out")]) == 2
    assert "line 2: not JSON" in capsys.readouterr().err
    assert main([*command[:2], "missing.jsonl", "--against", "x", "--out", "y"]) == 2
