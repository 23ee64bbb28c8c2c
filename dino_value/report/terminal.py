"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def probe_table(found: Mapping[str, Any], loss: str) -> Table:
    """A line for each task and update of what `dino-value probe` found about `loss`."""
    table = Table(title=f"one-step value probe: predicted and realised decrease of the held-out {loss} loss")
    for heading in ("task, update", "Pearson r", "95 % interval", "slope", "mean predicted", "mean realised"):
        table.add_column(heading, justify="right" if heading != "task, update" else "left")
    for name, row in found.items():
        if name in ("step", "settings"):
            continue
        table.add_row(
            name.replace("_", ", "),
            f"{row['pearson']:.3f}",
            "[{:.3f}, {:.3f}]".format(*row["interval"]),
            f"{row['slope']:.2f}",
            f"{row['mean_predicted']:.3g}",
            f"{row['mean_realised']:.3g}",
        )
    return table


_VERDICTS = {
    "the labels' own": "other labels of the same kind would change the step alike, and shuffled ones would not",
    "reproducible": "other labels would change the step alike, but so would shuffled ones: it is not what labels say",
    "neither": "other labels would change the step otherwise: mostly noise. Raise value.lookahead.steps or the batch",
}


def agreement_table(found: Mapping[str, Any]) -> Table:
    """What `dino-value probe --agreement` found: cosines, mean and range over the pairs, and what they mean."""
    table = Table(
        title="agreement of directions: cosines",
        caption=f"{found['verdict']}: {_VERDICTS[found['verdict']]}",
    )
    for heading in ("of", "mean", "from", "to"):
        table.add_column(heading, justify="left" if heading == "of" else "right")
    rows = {
        "step_true": "two steps, independent labels",
        "step_shuffled": "a step and one of shuffled labels",
        "unlabeled": "a step on two unlabeled batches",
        "u_true": "two directions u, independent labels",
        "u_shuffled": "a direction u and one of shuffled labels",
        "kept": "a step and its own u",
        "other": "a step and another u",
    }
    for name, text in rows.items():
        values = found[name]
        table.add_row(text, *(f"{value:+.2f}" for value in (sum(values) / len(values), min(values), max(values))))
    return table
