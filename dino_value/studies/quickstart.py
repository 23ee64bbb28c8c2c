"""The whole method on the embedded scenes, in minutes on a CPU: four arms, three evaluations, one report.

`python -m dino_value.studies.quickstart FILE` makes again the checkpoint that the arms start from.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dino_value.config import load_config
from dino_value.errors import UserError
from dino_value.report.statistics import headline
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.studies.compare import compare, config_of, judge, load_spec, print_claims, write_page
from dino_value.training.trainer import train

SPEC, START_CONFIG = "compare/quickstart", "quickstart/start"


def quickstart(out: Path, seeds: int = 1, steps: int | None = None) -> dict[str, Any]:
    """Continue the packaged checkpoint in every arm and seed, evaluate on held-out scenes, write the report.

    A stopped quickstart goes on from its runs' checkpoints when the same command is given again.

    Returns:
        What results.json holds: `{"arms": {arm: {"miou": [one a seed], "rmse": …, "top1": …}}, "seconds": …}`.

    Raises:
        UserError: `out` cannot be written or holds something else.
    """
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: at least one")
    overrides = [f"steps={steps}"] if steps else []
    spec = replace(load_spec(SPEC), out=str(out), seeds=seeds, overrides=overrides)
    results = compare(spec)
    config = config_of(spec, "value", 0)
    head = spec.evaluate["seg"]
    path = write_page(
        spec,
        results,
        "dino-value quickstart",
        "A small ViT, first trained with plain DINO on ray-cast rooms seen from any side, is continued from that one "
        f"checkpoint for {config.steps} steps in each arm: baseline (plain DINO), value (the teacher's targets moved "
        "along a lookahead on a few segmentation and depth labels), shuffled labels (the same with the labels "
        "of other images) and random (targets moved along a random direction of the same norms). step0 is the "
        "checkpoint itself.",
        [
            f"dino-value quickstart --out {out.name} --seeds {seeds} --steps {config.steps}",
            f"dino-value train quickstart/arm method=value seed=0 steps={config.steps} out=my_run",
            f"dino-value eval seg my_run --data scenes --size 64 --steps {head['steps']} --batch {head['batch']} "
            f"--lr {head['lr']} --out my_run/results",
        ],
        [
            "Synthetic scenes of 64 pixels and a ViT of half a million parameters: this shows the mechanism, not the "
            "size of the effect on photographs.",
            "Settings were chosen without the scenes scored here: docs/results.md says what was tried.",
        ],
    )
    print_claims(spec, results)
    said = f"{headline(judge(spec, results))}\n{path} ({results['seconds']:.0f} s)"
    Console().print(said, markup=False, highlight=False)
    return results


def make_start(path: Path) -> None:
    """Train the checkpoint of START_CONFIG and keep what an arm needs of it, in half precision."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(load_config(START_CONFIG, [f"out={folder}/start"]))
        state = load_checkpoint(run)
    half = {part: {name: value.half() for name, value in state[part].items()} for part in ("teacher", "objective")}
    torch.save({"step": state["step"], **half}, path)


if __name__ == "__main__":
    make_start(Path(sys.argv[1]))
