"""Each rule of extraction and comparison on strings that trick simpler ones."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from dino_value.language import verifier
from dino_value.language.answers import (
    boxed_answer,
    choice,
    equivalent,
    exact_match,
    final_answer,
    last_number,
    normalise,
    rewards,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234\nQuestion: next\n Answer: #### 9", "1,234"),  # the model goes on with another question
        ("#### $5.00 ", "5.00"),
        ("#### **18**", "18"),
        ("#### $18", "18"),
        ("#### \\$1,234.00", "1,234.00"),
        ("#### -$7.50.", "-7.50"),
        ("#### €18", "18"),
        ("#### 18 dollars per hour", "18"),
        ("#### 9{,}500", "9,500"),
        ("#### 9\u202f500 m", "9,500"),
        ("#### 20 (twenty)", "20"),
        ("#### 72, altogether", "72"),
        ("#### 18 apples and 3 pears", "18"),
        ("#### 10 * 2 = 20", "20"),
        ("#### x = \\boxed{20}", "20"),
        ("#### 20/day", "20"),
        ("#### 20th", "20"),
        ("#### 3/4 of it", "3/4"),
        ("#### \\frac{3}{4}", "3/4"),
        ("#### 50\\%", "50"),
        ("#### 12:30", "12:30"),  # no number
        ("#### Answer: 41 cm", "41"),
        ("#### Step 1: 3 pairs\n#### Step 2\n#### 6 shoes", "6"),  # headings
        ("#### Step 1: 3 pairs\nso \\boxed{6}, 9", "6"),
        ("#### yes", "yes"),
        ("it is 20\n#### ", "20"),
        ("The answer is 20.\n\nQuestion: what is 3?", "20"),
        ("So it is $9{,}500.", "9,500"),
        ("The answer is 1\u202f234.", "1,234"),
        ("####12", "12"),
        ("it is \\boxed{8} apples, 9 pears", "8"),  # no mark: the box
        ("7 and then 12 apples.", "12"),  # neither: the last number
        ("no answer", None),
        ("####\nnothing behind it, 3", "3"),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("first \\boxed{1}, then \\boxed{2}", "2"),
        ("\\boxed{ {a}_{b} }.", "{a}_{b}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{1} and a torn \\boxed{2", "1"),
        ("\\fbox {3}", "3"),
        ("boxed{4}", None),
        ("no box", None),
    ],
)
def test_boxed_answer(text: str, answer: str | None) -> None:
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("He has 1,234.50 dollars.", "1,234.50"),
        ("from 3 to -4", "-4"),
        ("7-3", "3"),
        ("in 2020, 5 of 6", "6"),
        ("1/2 of it", "1/2"),
        ("covid-19", "19"),
        ("costs .5", ".5"),
        ("item 3.", "3"),
        ("1,23", "23"),  # no thousands
        ("none", None),
    ],
)
def test_last_number(text: str, answer: str | None) -> None:
    assert last_number(text) == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" B", "B"),
        ("(C) because", "C"),
        ("The answer is D.", "D"),
        ("Answer: **A**", "A"),
        ("The answer is (B), not C", "B"),
        ("answer is: $\\boxed{C}$", "C"),
        ("A cat is no letter", None),
        ("I think so", None),
        ("The answer is B. Wait. The answer is C.", "C"),
        ("Both", None),
    ],
)
def test_choice(text: str, letter: str | None) -> None:
    assert choice(text) == letter


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1,000", "1000"),
        ("$5.00", "5"),
        ("7.", "7"),
        ("007", "7"),
        ("12 apples", "12"),
        ("50\\%", "50"),
        ("−3", "-3"),
        ("0.50", ".5"),
        ("\\text{Yes}", "yes"),
        ("\\dfrac{1}{2}", "1/2"),
        ("+4", "4"),
        ("-0", "0"),
        ("9{,}500", "9500"),
        ("9\\,500", "9500"),
        ("£18", "18"),
        ("18 dollars per hour", "18"),
        ("18\\text{ dollars per hour}", "18"),
    ],
)
def test_normalise(a: str, b: str) -> None:
    assert exact_match(a, b)
    assert normalise(normalise(a)) == normalise(a)


def test_what_is_not_equal() -> None:
    for a, b in (
        ("12", "1.2"),
        ("1,23", "123"),
        ("x", "y"),
        ("10", "1"),
        ("-3", "3"),
        (None, "0"),
        ("2x", "2y"),
        ("2x", "2"),
    ):
        assert not exact_match(a, b)


def test_math_verify_sees_more_than_spelling() -> None:
    pytest.importorskip("math_verify")
    assert equivalent("\\frac{1}{2}", "0.5")
    assert not exact_match("\\frac{1}{2}", "0.5")
    assert equivalent("1,000", "1000")
    assert not equivalent("7", "8")
    assert not equivalent(None, "8")
    assert rewards([["#### 7", "it is 8"]], [" 3+4 = 7\n#### 7"]) == [[1.0, 0.0]]


@pytest.mark.slow
def test_what_cannot_be_finished_is_wrong_and_the_next_is_compared() -> None:
    pytest.importorskip("math_verify")
    began = time.monotonic()
    sampled = ["\\boxed{7^{8^{7^{8}}}}", "\\boxed{8/2}", "\\boxed{90000001!}", "\\boxed{7^{8^{7^{8}}}}"]
    assert rewards([sampled], ["#### 4"]) == [[0.0, 1.0, 0.0, 0.0]]
    assert time.monotonic() - began < 100  # two that end at the limit of 5 seconds' processor time
    began = time.monotonic()
    assert not equivalent("7^{8^{7^{8}}}", "4")
    assert time.monotonic() - began < 0.1  # known by now


def test_signals_to_all_processes_do_not_make_an_answer_wrong() -> None:
    pytest.importorskip("math_verify")
    one = verifier.Verifier()
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            one.process.send_signal(number)
        assert one("\\boxed{3/6}", "\\boxed{0.5}")
        assert one("\\boxed{3/6}", "\\boxed{0.25}") is False
        one.process.kill()
        assert one("\\boxed{3/6}", "\\boxed{0.5}") is None
    finally:
        one.end()


def test_the_verifier_reads_no_module_of_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    (tmp_path / "math_verify.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path)
    one = verifier.Verifier()
    try:
        assert one("\\boxed{2}", "\\boxed{2}")
    finally:
        one.end()
