"""OMEGA by its publishers' rules: the first box, what counts without one, tolerance, instruction, splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dino_value.cli import main
from dino_value.errors import UserError
from dino_value.language.decontaminate import overlap
from dino_value.language.evaluate import Problem, Score, greedy_metrics, read_problems, sampled_metrics, score
from dino_value.language.omega import omega_answer, omega_match, omega_parts
from dino_value.language.text import INSTRUCTION


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is \\boxed{12}. Or is it \\boxed{13}?", "12"),
        ("\\boxed{1,250}", "1250"),
        ("\\boxed{\\frac{5}{8}} then", "\\frac{5}{8}"),
        ("\\boxed{torn and \\boxed{7}", "7"),
        ("12.", "12"),
        ("$12$", "12"),
        ("\\(12\\)", "12"),
        ("**12**.", "12"),
        ("\\[ -1,000.5 \\]", "-1000.5"),
        ("$$12$$", "12"),
        ("the whole of it", "the whole of it"),
        (" . ", None),
        ("", None),
    ],
)
def test_answers(text: str, answer: str | None) -> None:
    assert omega_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("0.3333333", "0.33333333", True),
        ("0.33333", "0.33333333", False),
        ("-4", "-4.0", True),
        ("1000", "1,000", True),
        ("TRUE", "true", True),
        ("4x", "4", False),
        ("nan", "nan", True),
        ("nan", "3", False),
        (None, "3", False),
        ("", "3", False),
    ],
)
def test_matches(answer: str | None, truth: str, right: bool) -> None:
    assert omega_match(answer, truth) is right


def test_scores() -> None:
    pytest.importorskip("math_verify")
    assert score("first \\boxed{3}, then \\boxed{4}", "3", "omega")[1:] == ("3", True, True)
    assert score("\\boxed{\\frac{1}{4}}", "0.25", "omega")[2:] == (False, True)
    assert score("**2.0000001**", "2", "omega")[1:3] == ("2.0000001", True)


def record(question: str, truth: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}], "ground_truth": truth, "dataset": "ours"}


@pytest.fixture
def omega(tmp_path: Path) -> Path:
    """Two settings with three splits each; the instruction in half of the questions."""
    for setting in ("sums", "products"):
        (tmp_path / "omega" / setting).mkdir(parents=True)
        for number, split in enumerate(("train", "test_in", "test_out")):
            rows = [
                record(f"{setting} {split} {index}?{INSTRUCTION * (index % 2)}", str(10 * number + index))
                for index in range(3)
            ]
            path = tmp_path / "omega" / setting / f"{split}-00000-of-00001.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "omega"


def test_parquet_as_the_hub_has_it(omega: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    before = read_problems(str(omega), "omega", None)
    for path in list(omega.rglob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        parquet.write_table(arrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
        path.unlink()
    assert read_problems(str(omega), "omega", None) == before


def test_a_set_is_read_by_setting_and_split(omega: Path) -> None:
    problems = read_problems(str(omega), "omega", None)
    places = [(one.setting, one.split) for one in problems]
    assert places == [(s, p) for s in ("products", "sums") for p in ("ID", "OOD") for _ in range(3)]
    assert [one.truth for one in problems] == ["10", "11", "12", "20", "21", "22"] * 2
    first = problems[0].example
    assert first.prompt == f"Question: products test_in 0?{INSTRUCTION}\n Answer:"
    assert first.answer == " \\boxed{10}"
    assert all(one.example.prompt.count(INSTRUCTION) == 1 for one in problems)
    assert len(read_problems(str(omega), "omega", 1)) == 4
    (alone,) = omega_parts(str(omega / "sums" / "test_out-00000-of-00001.jsonl"))
    assert (alone.setting, alone.split) == ("", "OOD")
    (omega / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no test_in, test_out or test"):
        omega_parts(str(omega / "empty"))


def test_metrics_by_part() -> None:
    problems = [Problem(None, "", setting, split) for setting in ("a", "b") for split in ("ID", "OOD")]  # type: ignore[arg-type]
    greedy = [Score("", None, exact, True) for exact in (True, False, True, True)]
    found = greedy_metrics(problems, greedy)
    assert list(found)[::2] == [
        f"pass@1_exact{part}" for part in ("", " ID", " ID a", " ID b", " OOD", " OOD a", " OOD b")
    ]
    assert [found[f"pass@1_exact{part}"]["mean"] for part in ("", " ID", " OOD", " OOD a")] == [0.75, 1.0, 0.5, 0.0]
    assert found["pass@1_exact OOD"]["number"] == 2
    drawn = [[one, Score("", None, False, False)] for one in greedy]
    sampled = sampled_metrics(problems, drawn, 2)
    assert sampled["sampled_pass@1_exact ID"]["mean"] == 0.5
    assert sampled["sampled_pass@2_exact OOD"]["mean"] == 0.5
    plain = [Problem(None, "") for _ in greedy]  # type: ignore[arg-type]
    assert list(greedy_metrics(plain, greedy)) == ["pass@1_exact", "pass@1_verified"]


def test_the_overlap_with_feedback_is_looked_for_in_every_part(omega: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    row = record("How many grey seals swim past the old harbour on a windy day in spring?", "5")
    (omega / "sums" / "test_out.jsonl").write_text(json.dumps(row) + "\n")
    feedback = tmp_path / "feedback.jsonl"
    feedback.write_text(json.dumps({"question": row["messages"][0]["content"], "answer": "#### 5"}) + "\n")  # type: ignore[index]
    assert len(overlap(str(feedback), [part.file for part in omega_parts(str(omega))])) == 1
    # What ends every question makes no two alike.
    row = record(f"Six times seven?{INSTRUCTION}", "42")
    (omega / "sums" / "test_out.jsonl").write_text(json.dumps(row) + "\n")
    feedback.write_text(json.dumps(record(f"Nine plus three?{INSTRUCTION}", "12")) + "\n")
    assert overlap(str(feedback), [str(omega / "sums" / "test_out.jsonl")]) == []


def test_the_command(root: Path, omega: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("math_verify")
    out = tmp_path / "found.json"
    given = ["language", "eval", str(root / "model"), str(omega), "--task", "omega", "--new-tokens", "2"]
    assert main([*given, "--limit", "1", "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["metrics"]["pass@1_exact OOD"]["number"] == 2
    assert [(one["setting"], one["split"]) for one in found["completions"]][:2] == [
        ("products", "ID"),
        ("products", "OOD"),
    ]
