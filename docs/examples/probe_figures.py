"""Pearson's r of the value probe against time, scope, batches, direction and length of the step: a figure each.

    python docs/examples/probe_figures.py RUN OUT [--trials 24] [--held 96]

RUN needs feedback, and checkpoints of several steps (`checkpoint.keep_every`). What was measured is kept in OUT/*.json
and not measured again; the figures are the PNGs of docs/probe.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dino_value.config import load_config
from dino_value.files import write_bytes, write_json
from dino_value.report.drawing import INK, new_axes, to_png
from dino_value.studies.probe import Probed, probe_run

BATCHES, SCALES = (8, 32, 64), (0.01, 1.0, 10.0)
CURVES = {
    "designed_sgd": ("SGD step", "#d55e00", "s", "-"),
    "designed_optimizer": ("the run's AdamW", "#0072b2", "o", "--"),
}
Found = Mapping[Any, Mapping[str, Any]]
"""what was varied -> what the probe found"""


def measure(run: Path, out: Path, name: str, trials: int, held: int, what: Probed) -> dict[str, Any]:
    """`probe_run`, or what it found before."""
    path = out / f"{name}.json"
    if not path.is_file():
        print(name, flush=True)
        write_json(path, probe_run(run, trials, held, 0, what))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def spread(steps: Sequence[int], count: int = 4) -> list[int]:
    """At most `count` of them, evenly."""
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)] if len(steps) > count else [*steps]


def curve(path: Path, found: Found, label: str, log: bool = False) -> None:
    """r with its interval over `found`'s keys."""
    figure, axes = new_axes(4.8, 3.3)
    axes.axhline(0, color=INK, linewidth=0.8)
    for key, (name, colour, marker, line) in CURVES.items():
        r = np.array([row[key]["pearson"] for row in found.values()])
        ends = np.array([row[key]["interval"] for row in found.values()])
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "capsize": 3, "label": name}
        axes.errorbar(list(found), r, np.abs(ends.T - r), **style)
        print(f"{path.stem:10} {name:16}", "  ".join(f"{x}: {v:.2f}" for x, v in zip(found, r, strict=True)))
    finish(path, figure, axes, label, log, list(found))


def samples(path: Path, found: Mapping[str, Any], pool: int) -> None:
    """r against the number of labelled images behind g_down; a dot a sample of them."""
    figure, axes = new_axes(4.8, 3.3)
    axes.axhline(0, color=INK, linewidth=0.8)
    for key, (name, colour, marker, line) in CURVES.items():
        counts = {int(count): values for count, values in found[key]["by_images"].items()}
        counts[pool] = [found[key]["pearson"]]
        means = [float(np.mean(values)) for values in counts.values()]
        axes.plot(list(counts), means, color=colour, linestyle=line, label=name)
        for count, values in counts.items():
            axes.scatter([count] * len(values), values, s=22, color=colour, marker=marker)
        print(f"{path.stem:10} {name:16}", "  ".join(f"{n}: {v:.2f}" for n, v in zip(counts, means, strict=True)))
    finish(path, figure, axes, "labelled images of a task behind g_down", True, list(counts))


def directions(path: Path, found: Mapping[str, Any]) -> None:
    """r of what each direction climbs with what either step brings."""
    figure, axes = new_axes(4.8, 3.3)
    axes.axhline(0, color=INK, linewidth=0.8)
    names = ("dot", "cosine", "adam", "random")
    for offset, (key, (name, colour, _, _)) in zip((-0.2, 0.2), CURVES.items(), strict=True):
        scores = found[key]["by_score"] | {"adam": adam(found, key)}
        axes.bar([i + offset for i in range(len(names))], [scores[n] for n in names], 0.38, color=colour, label=name)
        print(f"{path.stem:10} {name:16}", "  ".join(f"{n}: {scores[n]:.2f}" for n in names))
    axes.set_xticks(range(len(names)), names)
    finish(path, figure, axes, "what a designer would climb", False, None)


def adam(found: Mapping[str, Any], key: str) -> float:
    """Of the decrease that Adam's step is predicted to bring, with what a step brings."""
    predicted, realised = found["designed_optimizer"]["predicted"], found[key]["realised"]
    return float(np.corrcoef(predicted, realised)[0, 1])


def finish(path: Path, figure: Any, axes: Any, label: str, log: bool, ticks: list[float] | None) -> None:
    if log:
        axes.set_xscale("log")
    if ticks:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.minorticks_off()
    axes.set_ylim(top=1.03)
    axes.set_ylabel("Pearson's r, predicted and realised", fontsize=10)
    axes.set_xlabel(label, fontsize=10)
    axes.legend(frameon=False, fontsize=9.5, ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 1.0))
    write_bytes(path, to_png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trials", type=int, default=24, help="one-step updates for each point (default: %(default)s)")
    parser.add_argument("--held", type=int, default=96, help="labelled images a task (default: %(default)s)")
    parser.add_argument("--step", type=int, help="the checkpoint where all but time is varied (default: the middle)")
    asked = parser.parse_args()
    run, out = asked.run, asked.out
    out.mkdir(parents=True, exist_ok=True)
    config = load_config(run / "config.yaml")
    files = {int(path.stem.removeprefix("step_")): path for path in (run / "checkpoints").glob("step_*.pt")}
    steps = spread(sorted(files))
    step = asked.step or steps[len(steps) // 2]
    middle = Probed(files[step], tasks=("designed",), samples=0)

    def at(name: str, what: Probed) -> dict[str, Any]:
        return measure(run, out, name, asked.trials, asked.held, what)

    base = at(f"step_{step}", replace(middle, samples=4))
    pool = min(task.meta for task in (config.feedback.seg, config.feedback.depth))
    samples(out / "images.png", base, pool)
    directions(out / "direction.png", base)
    curve(
        out / "time.png",
        {one: at(f"step_{one}", replace(middle, checkpoint=files[one])) for one in steps},
        "learner step",
    )
    scales = {scale: base if scale == 1 else at(f"scale_{scale:g}", replace(middle, scale=scale)) for scale in SCALES}
    curve(out / "scale.png", scales, "length of the step against the optimizer's", True)
    depth = int(config.backbone.kwargs.get("depth", 12))
    own = config.value.scope.blocks
    blocks = {k: base if k == own else at(f"blocks_{k}", replace(middle, blocks=k)) for k in sorted({1, own, depth})}
    curve(out / "scope.png", blocks, "blocks in scope S")
    same = config.optim.batch_size
    batches = {size: base if size == same else at(f"batch_{size}", replace(middle, batch=size)) for size in BATCHES}
    curve(out / "batch.png", batches, "unlabeled images of a step", True)


if __name__ == "__main__":
    main()
