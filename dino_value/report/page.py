"""The report: one HTML file that needs no other file, no network and no script; its pictures also as PNGs."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template

from dino_value.errors import UserError
from dino_value.files import write_bytes
from dino_value.report.drawing import Figure, Panel, arm_styles
from dino_value.report.statistics import (
    LEVEL,
    MIN_SEEDS,
    Comparison,
    Metric,
    Results,
    Summary,
    arm_label,
    arms_of,
    compare_all,
    headline,
    metric_of,
    metrics_of,
    seeds_of,
    summarise,
)

_BADGES = {
    "better": "better",
    "worse": "worse",
    "unclear": "no clear difference",
    "few seeds": "too few seeds",
    "one seed": "one seed",
    "no data": "no data",
}


@dataclass(frozen=True)
class Section:
    """Another table with its claims: the same arms under another rule. ``text`` says which."""

    title: str
    text: str
    results: Results
    comparisons: Sequence[Comparison]


@dataclass(frozen=True)
class Table:
    """Numbers that no claim is made of. ``rows``: an arm's name, and a cell for each of ``heads``."""

    title: str
    heads: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What the page says. Text fields are plain text and are escaped; an empty part leaves its section out.

    ``summary``: what was run, in a paragraph. ``results``: None without any. ``comparisons``: the claims, by
    default every standard one that ``results`` allows. ``notes``: caveats, a sentence each. ``settings`` and
    ``environment``: name -> value. ``commands``: shell lines.
    """

    title: str
    summary: str
    results: Results | None
    comparisons: Sequence[Comparison] | None = None
    sections: Sequence[Section] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    commands: Sequence[str] = ()
    environment: Mapping[str, object] = field(default_factory=dict)
    seconds: float | None = None


def write_report(path: str | Path, report: Report) -> Path:
    """Write the page to ``path`` and its pictures to ``<stem>_figures/`` beside it, each whole or not at all.

    Returns the page's path. Raises UserError when the folder cannot be written.
    """
    path = Path(path)
    page = render(report)  # what is wrong with the content shows before the first byte is written
    try:
        for figure in report.figures:
            for panel in figure.panels:
                picture = path.parent / f"{path.stem}_figures" / f"{_slug(figure.name)}-{_slug(panel.name)}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(picture, panel.png)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, page.encode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot write the report {path}: {error.strerror}; choose another --out") from error
    return path


def render(report: Report) -> str:
    """The page as HTML."""
    template = Template(resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=_text(report.title),
        summary=_text(report.summary),
        byline=_byline(report),
        results=_results(report),
        sections="".join(_further(section) for section in report.sections),
        tables="".join(_plain(table) for table in report.tables),
        figures="".join(_figure(f) for f in report.figures if f.name != "results"),
        notes=_section("Keep in mind", _list(report.notes), report.notes),
        settings=_section("Settings", _pairs(report.settings), report.settings),
        commands=_section("Reproduce this", _commands(report.commands), report.commands),
        environment=_section("Environment", _pairs(report.environment), report.environment),
    )


def _results(report: Report) -> str:
    """The claims, and then the numbers that they are made of."""
    if report.results is None:
        return ""
    comparisons = compare_all(report.results) if report.comparisons is None else report.comparisons
    claims = f"<section><h2>What it brought</h2>{_verdicts(comparisons)}</section>" if comparisons else ""
    figure = "".join(_figure(f, heading=False) for f in report.figures if f.name == "results")
    return (
        f"{claims}<section><h2>Results</h2>{_results_table(report.results)}"
        '<p class="small">Mean ± standard deviation over the seeds; bold marks the best mean, not yet a claim.</p>'
        f"<details><summary>Every seed</summary>{_seeds_table(report.results)}</details>{figure}</section>"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _claim(sentence: str) -> str:
    return _text(re.sub(r"(?<![\w-])-(?=\d)", "\N{MINUS SIGN}", sentence))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "figure"


def _byline(report: Report) -> str:
    parts = []
    if report.results is not None:
        seeds, arms = seeds_of(report.results), len(arms_of(report.results))
        parts = [f"{seeds} seed{'s' if seeds != 1 else ''}", f"{arms} arm{'s' if arms != 1 else ''}"]
    if report.seconds is not None:
        parts.append(f"took {_duration(report.seconds)}")
    return _text(" · ".join(parts))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _verdicts(comparisons: Sequence[Comparison]) -> str:
    parts = [f'<p class="headline">{_claim(headline(comparisons))}</p>']
    for arm, against in dict.fromkeys((c.arm, c.against) for c in comparisons):
        rows = "".join(_verdict(c) for c in comparisons if (c.arm, c.against) == (arm, against))
        title = f"{_text(arm_label(arm))} against {_text(arm_label(against))}"
        parts.append(f'<h3>{title}</h3><ul class="verdicts">{rows}</ul>')
    parts.append(
        '<p class="small">Differences are first arm minus second, paired by seed, in the unit shown; in '
        f"brackets, the {LEVEL:.0%} t-interval of the mean over seeds (over starts, where there are several), of this "
        f"difference alone. p-values are corrected for the {len(comparisons)} differences judged here (Holm). A claim "
        f"needs at least {MIN_SEEDS} seeds and p < {1 - LEVEL:.2g}. The effect size is the mean difference in standard "
        "deviations of the differences.</p>"
    )
    return "".join(parts)


def _further(section: Section) -> str:
    return (
        f"<section><h2>{_text(section.title)}</h2><p>{_text(section.text)}</p>"
        f"{_results_table(section.results)}{_verdicts(section.comparisons)}</section>"
    )


def _plain(table: Table) -> str:
    styles = arm_styles(list(table.rows))
    rows = [
        _row_head(arm, styles[arm].colour) + "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        for arm, cells in table.rows.items()
    ]
    note = f'<p class="small">{_text(table.note)}</p>' if table.note else ""
    return f"<section><h2>{_text(table.title)}</h2>{_table(table.title, ['arm', *table.heads], rows)}{note}</section>"


def _verdict(comparison: Comparison) -> str:
    badge = f'<span class="badge {_slug(comparison.outcome)}">{_BADGES[comparison.outcome]}</span>'
    effect = "" if comparison.effect is None else f' <span class="small">effect size {comparison.effect:+.1f}</span>'
    return f"<li>{badge} <span>{_claim(comparison.sentence)}{effect}</span></li>"


def _results_table(results: Results) -> str:
    arms = arms_of(results)
    keys = metrics_of(arms)
    summaries = {(arm, key): summarise(row[key]) for arm, row in arms.items() for key in row}
    best = {key: _best(metric_of(key), {a: summaries[a, key] for a in arms if key in arms[a]}) for key in keys}
    rows = []
    for arm, style in arm_styles(list(arms)).items():
        cells = [_row_head(arm, style.colour)]
        for key in keys:
            shown = _text(summaries[arm, key].show(metric_of(key))) if (arm, key) in summaries else "–"
            mark = '<span class="hidden"> (best mean)</span>'
            cells.append(f'<td class="best">{shown}{mark}</td>' if best[key] == arm else f"<td>{shown}</td>")
        rows.append("".join(cells))
    return _table("Results", ["arm", *(metric_of(key).heading for key in keys)], rows)


def _best(metric: Metric, summaries: Mapping[str, Summary]) -> str | None:
    """The arm with the best mean; None where there is nothing to be better than."""
    means = {arm: summary.mean for arm, summary in summaries.items() if summary.n}
    choose = max if metric.higher_is_better else min
    return choose(means, key=lambda arm: means[arm]) if len(means) > 1 else None


def _seeds_table(results: Results) -> str:
    arms = arms_of(results)
    rows = []
    for key in metrics_of(arms):
        metric = metric_of(key)
        for arm, style in arm_styles(list(arms)).items():
            if key in arms[arm]:
                cells = "".join(f"<td>{_text(metric.show(value))}</td>" for value in arms[arm][key])
                head = f'<th scope="row">{_text(metric.heading)}</th>'
                rows.append(head + _row_head(arm, style.colour) + cells)
    seeds = results.get("seeds", range(seeds_of(results)))
    return _table("Every seed", ["metric", "arm", *(f"seed {seed}" for seed in seeds)], rows)


def _row_head(arm: str, colour: str) -> str:
    chip = f'<span class="chip" style="background:{colour}"></span>'
    return f'<th scope="row">{chip}{_text(arm_label(arm))}</th>'


def _table(label: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls sideways by itself where the page is narrower; ``rows`` hold cells as HTML."""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _figure(figure: Figure, *, heading: bool = True) -> str:
    if not figure.panels:
        return ""
    # Four panels in rows of three would leave one alone.
    layout = {1: " one", 2: " two", 4: " two"}.get(len(figure.panels), "")
    images = "".join(_image(panel) for panel in figure.panels)
    title = f"<h2>{_text(figure.title)}</h2>" if heading else ""
    return (
        f'<section class="figure">{title}<figure><div class="panels{layout}">{images}</div>'
        f"<figcaption>{_text(figure.caption)}</figcaption></figure></section>"
    )


def _image(panel: Panel) -> str:
    data = base64.b64encode(panel.png).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{_text(panel.alt)}">'


def _section(title: str, body: str, content: Sequence[object] | Mapping[str, object]) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>" if content else ""


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in items)}</ul>"


def _pairs(pairs: Mapping[str, object]) -> str:
    rows = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in pairs.items())
    return f'<dl class="pairs">{rows}</dl>'


def _commands(commands: Sequence[str]) -> str:
    lines = "\n".join(_text(command) for command in commands)
    return f'<pre tabindex="0" role="region" aria-label="Commands"><code>{lines}</code></pre>'
