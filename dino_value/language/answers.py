"""What a model answered: extraction, normalisation, and whether it is right, each rule on its own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dino_value.language.verifier import verified

_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|[-+−]?\.\d+")
_CHOICE = re.compile(r"(?<![A-Za-z])\(?([A-J])\)?(?![A-Za-z'’])")


def final_answer(text: str) -> str | None:
    """GSM8K: what stands behind the first "####"; else the last \\boxed{…}; else the last number."""
    marked = re.search(r"####[ \t]*([^\n]+)", text)
    if marked:
        return marked[1].strip()
    boxed = boxed_answer(text)
    return boxed if boxed is not None else last_number(text)


def boxed_answer(text: str) -> str | None:
    """The content of the last whole \\boxed{…} or \\fbox{…}, nested braces included (OMEGA, MATH)."""
    for found in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for place in range(found.end(), len(text)):
            escaped = text[place - 1] == "\\"
            depth += (text[place] == "{" and not escaped) - (text[place] == "}" and not escaped)
            if depth == 0:
                return text[found.end() : place].strip()
    return None


def last_number(text: str) -> str | None:
    """The last number in `text`; a comma groups thousands, a hyphen between digits or words is no sign."""
    text = re.sub(r"(?<=[\w)])[-−](?=[\d.])", " ", text)  # 7-3, covid-19
    found = _NUMBER.findall(text)
    return found[-1] if found else None


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
    answer = answer.strip().replace("−", "-").replace("\\$", "").replace("$", "").replace("\\%", "").replace("%", "")
    answer = re.sub(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\\(?:d|t)?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", answer).replace("\\,", "").replace("\\!", "")
    answer = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer).strip().rstrip(".").strip()
    number = re.fullmatch(r"([-+]?)(\d*)(?:\.(\d*))?(?:\s*[a-zA-Z]+)?", answer)
    if number and (number[2] or number[3]):
        whole, part = number[2].lstrip("0") or "0", (number[3] or "").rstrip("0")
        plain = f"{whole}.{part}" if part else whole
        return f"-{plain}" if number[1] == "-" and plain != "0" else plain
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
