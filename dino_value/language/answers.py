"""What a model answered: extraction, normalisation, and whether it is right, each rule on its own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dino_value.language.verifier import verified

_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|[-+−]?\.\d+")
_CHOICE = re.compile(r"(?<![A-Za-z])\(?([A-J])\)?(?![A-Za-z'’])")


def final_answer(text: str) -> str | None:
    """GSM8K: the number behind the first "####" that one follows, whatever stands around it; else the last
    \\boxed{…}; else what stands behind the first "####"; else the last number. A next question is not read."""
    text = re.split(r"\n\s*Question:", text)[0]
    marked = [line for line in re.findall(r"####([^\n]*)", text) if line.strip()]
    found = next((number for line in marked if (number := stated_number(line)) is not None), None)
    if found is None:
        found = boxed_answer(text)
    if found is None and marked:
        found = first_number(marked[0]) or marked[0].strip()
    return last_number(text) if found is None else found


def stated_number(line: str) -> str | None:
    """The number that a line begins with, or that follows its last "=": **18**, $18, 18 dollars an hour, 9{,}500,
    2 · 9 = 18. None where there is no such number, or it is a time of day."""
    said = plain(line).rpartition("=")[2]
    found = re.match(rf"[\s*_`~≈:#()\[\]{{}}\\\"']*(?:\\?boxed\{{)?\s*({_NUMBER.pattern})(?!:\d)(?!\d)", said)
    return found[1] if found else None


def first_number(line: str) -> str | None:
    """The first number of a line that is not a time of day."""
    return None if re.search(r"\d:\d", line) else next(iter(_numbers(line)), None)


def boxed_answer(text: str) -> str | None:
    """The content of the last whole \\boxed{…} or \\fbox{…} (MATH)."""
    return next(reversed(boxes(text)), None)


def boxes(text: str) -> list[str]:
    """The contents of all whole \\boxed{…} and \\fbox{…}, nested braces included."""
    contents = []
    for found in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth = 1
        for place in range(found.end(), len(text)):
            escaped = text[place - 1] == "\\"
            depth += (text[place] == "{" and not escaped) - (text[place] == "}" and not escaped)
            if depth == 0:
                contents.append(text[found.end() : place].strip())
                break
    return contents


def last_number(text: str) -> str | None:
    """The last number in `text`; a comma groups thousands, a hyphen between digits or words is no sign."""
    found = _numbers(text)
    return found[-1] if found else None


def _numbers(text: str) -> list[str]:
    return _NUMBER.findall(re.sub(r"(?<=[\w)])[-−](?=[\d.])", " ", plain(text)))  # 7-3, covid-19


def plain(text: str) -> str:
    """`text` with numbers as one types them: no currency, percent sign or LaTeX spacing, thousands by a comma, simple
    fractions with a slash."""
    text = text.replace("−", "-").replace("{,}", ",")
    text = re.sub(r"\\?[$%]|[€£¥₹]", "", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:d|t)?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text)
    return re.sub(r"(?<=\d)(?:\\[,;: ]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ",", text)


def choice(text: str) -> str | None:
    """A letter of a multiple-choice answer: behind the last "answer is" or "answer:", else a letter that begins the
    text, alone, in brackets or before a full stop (MMLU)."""
    said = list(re.finditer(r"(?i:answer)\s*(?i:is|:)\s*:?\s*", text))
    for place in [found.end() for found in reversed(said)] + [len(text) - len(text.lstrip())]:
        rest = re.sub(r"^[\s*$\\({\[]*(?:boxed\{|text\{)*", "", text[place:])
        if (found := re.match(r"([A-J])(?![A-Za-z'’])(?!\s+[a-z])", rest)) is not None:
            return found[1]
    return None


def normalise(answer: str) -> str:
    """One spelling of an answer: no currency, units, thousands commas, trailing zeros or full stop; lower case."""
    answer = plain(answer.strip()).replace("\\,", "").replace("\\!", "")
    answer = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer).strip().rstrip(".").strip()
    number = re.fullmatch(r"([-+]?)(\d*)(?:\.(\d*))?(?:\s+[a-zA-Z][a-zA-Z\s]*)?", answer)
    if number and (number[2] or number[3]):
        whole, part = number[2].lstrip("0") or "0", (number[3] or "").rstrip("0")
        exact = f"{whole}.{part}" if part else whole
        return f"-{exact}" if number[1] == "-" and exact != "0" else exact
    return re.sub(r"\s+", " ", answer).lower()


def exact_match(answer: str | None, truth: str) -> bool:
    """Equal after `normalise`; no answer is wrong."""
    return answer is not None and normalise(answer) == normalise(truth)


def equivalent(answer: str | None, truth: str) -> bool:
    """Mathematically equal as the package math-verify sees it: 0.5 is 1/2, 2·3 is 6. What it cannot finish is wrong.

    Raises:
        UserError: math-verify is not installed.
    """
    if answer is None:
        return False
    return verified(*(f"\\boxed{{{normalise(part)}}}" for part in (answer, truth)))


def rewards(texts: Sequence[Sequence[str]], truths: Sequence[str]) -> list[list[float]]:
    """1 for a sampled text whose final answer is equivalent to the truth, 0 for another; [n][k]."""
    return [
        [float(equivalent(final_answer(text), final_answer(truth) or truth)) for text in samples]
        for samples, truth in zip(texts, truths, strict=True)
    ]
