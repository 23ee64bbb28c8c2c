"""The tables of docs/evidence.md, from what `dino-value compare` has written:

python docs/examples/comparison_tables.py OUT/results.json [ARM,AGAINST …]
"""

import json
import sys
from pathlib import Path

from dino_value.report.statistics import arms_of, compare, metric_of, metrics_of, summarise


def arms_table(results: dict) -> list[str]:
    """Mean ± standard deviation over seeds."""
    arms = arms_of(results)
    keys = metrics_of(arms)
    lines = ["| arm | " + " | ".join(metric_of(key).heading for key in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    return lines + [
        f"| {arm} | " + " | ".join(summarise(row[key]).show(metric_of(key)) for key in keys) + " |"
        for arm, row in arms.items()
    ]


def claims_table(results: dict, claims: list[tuple[str, str]]) -> list[str]:
    """Seeds in which the arm is the better one, and the mean difference with its 95 % interval."""
    arms = arms_of(results)
    keys = metrics_of(arms)
    lines = ["| | " + " | ".join(metric_of(key).label for key in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for arm, against in claims:
        cells = []
        for key in keys:
            found = compare(results, arm, against, key)
            low, high = found.interval or (float("nan"),) * 2
            show = metric_of(key).show_difference
            cells.append(f"{found.wins}/{found.n}, {show(found.difference)} [{show(low)}, {show(high)}]")
        lines.append(f"| {arm} vs {against} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    path, *asked = sys.argv[1:]
    results = json.loads(Path(path).read_text())
    claims = [tuple(pair.split(",")) for pair in asked] or [
        tuple(pair) for pair in dict.fromkeys((one["arm"], one["against"]) for one in results["claims"])
    ]
    print("\n".join([*arms_table(results), "", *claims_table(results, claims)]))
