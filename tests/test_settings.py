"""`dino-value help` and docs/settings.md say what the dataclasses and the checks say."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_value.cli import main
from dino_value.config import Config, _all_keys
from dino_value.settings import help_text, page, settings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"


def test_every_key_is_there() -> None:
    found = [one.key for one in settings()]
    assert len(found) == len(set(found)) > 150
    for key in found:
        assert key in set(_all_keys(Config, ""))


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "python -m dino_value.settings > docs/settings.md"


def test_one_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "designer.kl"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("designer.kl=0.2")
    assert "KL(q′‖q)" in said
    assert "objective" not in said


def test_a_section_choices_and_bounds() -> None:
    said = help_text("value")
    assert "value.direction=" in said
    assert "dot, cosine, adam, lookahead" in said
    assert "at least 1" in help_text("value.period")
    assert "designer.kl" not in said


def test_a_comment_above_and_one_within_are_both_read() -> None:
    assert "ADIOS" in help_text("method")
    assert "long runs" in help_text("designer.strength")


def test_an_unknown_key_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "designr.kl"]) == 2
    assert "designer.kl" in capsys.readouterr().err
