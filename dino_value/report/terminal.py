"""The report's table and sentences for a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from dino_value.report.statistics import (
    Results,
    arm_label,
    arms_of,
    metric_of,
    metrics_of,
    seeds_of,
    summarise,
)


def results_table(results: Results, title: str | None = None) -> Table:
    """Mean ± standard deviation over the seeds, a row an arm and a column a metric; print it with a rich
    console.
    """
    arms = arms_of(results)
    keys = metrics_of(arms)
    seeds = seeds_of(results)
    table = Table(title=title, caption=f"mean ± sd over {seeds} seeds" if seeds > 1 else "one seed")
    table.add_column("arm")
    for key in keys:
        table.add_column(Text(metric_of(key).heading), justify="right")
    for arm, row in arms.items():
        table.add_row(Text(arm_label(arm)), *(summarise(row[k]).show(metric_of(k)) if k in row else "–" for k in keys))
    return table
