from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dino_value.errors import UserError
from dino_value.report.drawing import Figure, Panel
from dino_value.report.figures import results_figure
from dino_value.report.page import Report, render, write_report
from dino_value.report.statistics import metric_of
from dino_value.report.terminal import results_table

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers what the tests ask about: tables' cells, images, ids of outside
    resources.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: dict[str, list[dict[str, str | None]]] = {}
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.setdefault(tag, []).append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def report(results: Mapping[str, Any], **more: Any) -> Report:
    return Report(title="dino-value quickstart", summary="What was run.", results=results, **more)


def test_the_tables_hold_exactly_the_results(results: dict[str, Any]) -> None:
    page = Page(render(report(results)))
    summary, by_seed = page.rows[:5], page.rows[5:]
    assert summary[0] == ["arm", "mIoU (%) ↑", "depth RMSE (m) ↓", "top-1 (%) ↑"]
    assert [row[0] for row in summary[1:]] == ["step 0", "baseline", "random", "value"]
    for row in summary[1:]:
        arm = results["arms"][row[0].replace(" ", "")]
        for key, cell in zip(("miou", "rmse", "top1"), row[1:], strict=True):
            metric = metric_of(key)
            mean, _, sd = cell.replace(" (best mean)", "").partition(" ± ")
            assert mean == f"{np.mean(arm[key]) * metric.scale:.{metric.digits}f}"
            assert sd == ("" if row[0] == "step 0" else f"{np.std(arm[key], ddof=1) * metric.scale:.{metric.digits}f}")
    assert ["(best mean)" in cell for cell in summary[4]] == [False, True, True, False]  # value: mIoU, RMSE
    assert "(best mean)" in summary[3][3]  # random: top-1, by the mean
    assert len(by_seed) == 1 + 3 * 4
    for row in by_seed[1:]:
        key = {"mIoU": "miou", "depth": "rmse", "top-1": "top1"}[row[0].split()[0]]
        metric = metric_of(key)
        assert row[2:] == [
            f"{v * metric.scale:.{metric.digits}f}" for v in results["arms"][row[1].replace(" ", "")][key]
        ]


def test_the_page_stands_alone_and_is_accessible(results: dict[str, Any]) -> None:
    text = render(report(results, figures=[results_figure(results)], commands=["dino-value quickstart"], seconds=212.4))
    page = Page(text)
    assert page.tags["html"] == [{"lang": "en"}]
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"""\b(?:src|href)\s*=\s*(?!"data:)|\burl\(|@import|https?://""", text)
    assert len(page.tags["h1"]) == 1
    assert page.tags["th"]
    assert all(th["scope"] in ("col", "row") for th in page.tags["th"])
    assert len(page.images) == 3
    for image in page.images:
        source, alt = image["src"], image["alt"]
        assert alt
        assert source
        assert source.startswith("data:image/png;base64,")
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).load()
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert "3 min 32 s" in page.text
    assert "5 seeds" in page.text
    assert "$" not in text.replace("dino-value quickstart", "")  # every field of the template was filled


def test_verdicts_come_before_the_table_and_empty_sections_are_left_out(results: dict[str, Any]) -> None:
    text = render(report(results))
    assert text.index("value beats baseline on mIoU: 5/5 seeds, +1.70 points") < text.index("<table")
    assert "−0.0026 m" in text  # a real minus sign
    for absent in ("Settings", "Environment", "Reproduce this", "Keep in mind"):
        assert absent not in text


def test_every_text_is_escaped(results: dict[str, Any]) -> None:
    evil = '<script>alert("1")</script> & ${title} $HOME'
    results["arms"][evil] = results["arms"]["random"]
    text = render(
        Report(
            title=evil,
            summary=evil,
            results=results,
            figures=[Figure("f", evil, evil, [Panel("p", b"png", evil)])],
            notes=[evil],
            settings={evil: evil},
            commands=[evil],
            environment={evil: evil},
        )
    )
    assert "<script" not in text
    page = Page(text)
    assert page.images[0]["alt"] == evil
    assert (
        page.text.count(evil) == 1 + 1 + 1 + 2 + 1 + 2 + 1 + 2 + 1 + 3
    )  # title twice; arm in one summary and three seed rows


def test_write_report_writes_page_and_pictures(results: dict[str, Any], tmp_path: Path) -> None:
    figure = results_figure(results)
    path = write_report(tmp_path / "new" / "report.html", report(results, figures=[figure]))
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    names = sorted(p.name for p in (tmp_path / "new" / "report_figures").iterdir())
    assert names == ["results-miou.png", "results-rmse.png", "results-top1.png"]
    assert (tmp_path / "new" / "report_figures" / "results-miou.png").read_bytes() == figure.panels[0].png
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "report.html",
        "report_figures",
    ]  # no temporary file stays


def test_a_failed_write_keeps_the_old_page(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_report(path, report(results))
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_path_through_a_file_is_the_users_mistake(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(tmp_path / "file" / "report.html", report(results))


def test_bad_results_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        write_report(
            tmp_path / "report.html",
            report({"arms": {}}, figures=[Figure("f", "t", "c", [Panel("p", b"", "a")])]),
        )
    assert not list(tmp_path.iterdir())


def test_terminal_table_shows_the_same_numbers(results: dict[str, Any]) -> None:
    console = Console(width=120, file=io.StringIO())
    with console.capture() as capture:
        console.print(results_table(results, title="held-out scenes"))
    shown = capture.get()
    for row in Page(render(report(results))).rows[1:5]:
        for cell in row:
            assert cell.replace(" (best mean)", "") in shown
