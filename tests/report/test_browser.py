"""The page of a tiny comparison in a real browser: Chromium, headless, where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_value.config import Config
from dino_value.files import write_text
from dino_value.report.runs import report_runs
from dino_value.report.statistics import metric_of, summarise
from dino_value.studies.compare import compare, load_spec, write_page
from dino_value.training.trainer import train

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (apt-get install chromium)")

LOOK = """<!DOCTYPE html><meta charset="utf-8"><body><script>
const frame = document.createElement("iframe");
frame.style = "width: WIDTHpx; height: 900px; border: 0";
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement, text = (cell) => cell.textContent.trim();
  const wide = (e) => !e.closest(".scroll, pre, .hidden") && e.getBoundingClientRect().right > root.clientWidth + 1;
  document.body.dataset.seen = JSON.stringify({
    width: frame.contentWindow.innerWidth,
    overflow: root.scrollWidth - root.clientWidth,
    pictures: [...page.images].map((image) => [image.complete, image.naturalWidth]),
    tables: [...page.querySelectorAll("table")].map((table) => [...table.rows].map((row) => [...row.cells].map(text))),
    wide: [...page.querySelectorAll("body *")].filter(wide).map((e) => e.tagName + "." + e.className),
  });
};
frame.srcdoc = PAGE;
document.body.append(frame);
</script>"""


def look(page: Path, width: int) -> tuple[dict[str, Any], list[str]]:
    """What the browser makes of the page in a frame of a width in pixels, and the lines of its console.

    In a frame, because a window of Chromium is never narrower than 500 pixels.
    """
    around = page.with_name(f"looked_at_{width}.html")
    quoted = json.dumps(page.read_text()).replace("</", "<\\/")
    write_text(around, LOOK.replace("WIDTH", str(width)).replace("PAGE", quoted))
    assert CHROMIUM is not None
    found = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={page.parent / 'profile'}",
            "--window-size=1300,950",
            "--virtual-time-budget=10000",
            "--enable-logging=stderr",
            "--dump-dom",
            around.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    seen = re.search(r'data-seen="([^"]*)"', found.stdout)
    assert seen is not None, found.stderr[-2000:]
    return json.loads(html.unescape(seen.group(1))), [line for line in found.stderr.splitlines() if "CONSOLE" in line]


def check(page: Path) -> list[list[list[str]]]:
    """No errors, every picture there, nothing wider than a wide, a narrow window; the tables."""
    for width in (1200, 380):
        seen, console = look(page, width)
        assert console == []
        assert seen["width"] == width
        assert seen["pictures"]
        assert all(complete and across > 0 for complete, across in seen["pictures"])
        assert seen["wide"] == []
        assert seen["overflow"] <= 0
    tables: list[list[list[str]]] = seen["tables"]
    return tables


@needs_chromium
def test_a_comparison(tiny_yaml: Path, tiny_data: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    write_text(
        spec,
        f"""
config: {tiny_yaml}
out: {tmp_path / "out"}
seeds: 2
equal_time: false
arms:
  baseline: [method=baseline]
  value: [method=value]
evaluate:
  seg: {{data: {tiny_data / "ade"}, size: [16, 16], steps: 2, batch: 4}}
  depth: {{data: {tiny_data / "nyu"}, size: [16, 16], steps: 2, batch: 4}}
""",
    )
    asked = load_spec(spec)
    page = write_page(asked, compare(asked), "A comparison", "What was run.", ["dino-value compare spec.yaml"])
    tables = check(page)
    assert "Predictions: value" in page.read_text()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    head, *rows = tables[0]
    assert head[0] == "arm"
    shown = {metric_of(key).heading: key for key in ("miou", "miou_loss", "rmse", "rmse_loss")}
    assert set(head[1:]) == set(shown)
    assert len(rows) == 3
    for arm, *cells in rows:
        for heading, cell in zip(head[1:], cells, strict=True):
            key = shown[heading]
            values = results["arms"][arm.replace("step 0", "step0")][key]
            expected = summarise(np.array(values, dtype=np.float64)).show(metric_of(key))
            assert cell.replace(" (best mean)", "") == expected


@needs_chromium
def test_a_run(tiny: Callable[..., Config], tmp_path: Path) -> None:
    run = train(tiny(f"out={tmp_path / ('a_rather_long_name_' * 4)}"), quiet=True)
    tables = check(report_runs([run], run / "report.html"))
    assert tables[0][0][0] == "arm"
