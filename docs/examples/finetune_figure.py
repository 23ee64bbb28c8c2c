"""A metric against the number of labels, a line an arm: what is left of pretraining after fine-tuning.

    python docs/examples/finetune_figure.py comparison/results.json figures

Reads evaluations that are told apart by their number of labels (`seg@32_fine-tuned`, `seg@128_fine-tuned`:
docs/evaluation.md), and writes one picture for each metric: means over seeds, bars of one standard deviation up and
down. The arms of a number of labels stand a little beside each other.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

from dino_value.errors import UserError
from dino_value.report.drawing import arm_styles, new_axes, to_png
from dino_value.report.statistics import Results, Summary, arm_label, arms_of, metric_of, metrics_of, summarise

Curves = dict[str, dict[int, Summary]]
"""arm -> number of labels -> mean and standard deviation over seeds."""

APART = 1.06  # from arm to arm, as a factor of the number of labels


def curves(results: Results) -> dict[str, Curves]:
    """By metric less its number of labels (`miou@fine-tuned` of `miou@32_fine-tuned`); losses are left out.

    Raises:
        UserError: no metric names its number of labels.
    """
    arms, found = arms_of(results), dict[str, Curves]()
    for key in metrics_of(arms):
        parts = re.fullmatch(r"(?P<metric>[^@]+)@(?P<labels>\d+)(?:_(?P<told>.+))?", key)
        if parts is None or "loss" in key:
            continue
        name = f"{parts['metric']}@{parts['told']}" if parts["told"] else parts["metric"]
        for arm, row in arms.items():
            if key in row:
                found.setdefault(name, {}).setdefault(arm, {})[int(parts["labels"])] = summarise(row[key])
    if not found:
        raise UserError("these results hold no metric of a number of labels, such as miou@32")
    return found


def draw(name: str, arms: Curves) -> bytes:
    """A picture of one metric, PNG."""
    metric, (figure, axes) = metric_of(name), new_axes(5.6, 3.6)
    middle = (len(arms) - 1) / 2
    for place, (arm, style) in enumerate(arm_styles(list(arms)).items()):
        counts = sorted(arms[arm])
        rows = [arms[arm][count] for count in counts]
        axes.errorbar(
            np.array(counts) * APART ** (place - middle),
            [row.mean * metric.scale for row in rows],
            [(row.sd or 0.0) * metric.scale for row in rows],
            color=style.colour,
            marker=style.marker,
            linestyle=style.line,
            capsize=3,
            label=arm_label(arm),
        )
    counts = sorted({count for row in arms.values() for count in row})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("labelled images")
    axes.set_title(f"{metric.heading}   ({metric.preference})", loc="left", fontsize=11.5)
    axes.legend(frameon=False, fontsize=10)
    return to_png(figure)


def main(results: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, arms in curves(json.loads(results.read_text())).items():
        path = folder / f"labels_{name.replace('@', '_')}.png"
        path.write_bytes(draw(name, arms))
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
