"""Weights & Biases in place of Optuna: what an agent of `wandb sweep configs/sweeps/wandb/….yaml` calls.

W&B draws the settings; training, evaluations and their names are those of `dino-value sweep`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dino_value.errors import UserError
from dino_value.sweep.spec import is_named, load_sweep, parse_overrides, read_spec
from dino_value.sweep.work import measure
from dino_value.training.trainer import train


def run_agent(source: str, settings: Sequence[str], out: Path | None = None) -> dict[str, float]:
    """Train and evaluate one point that W&B has drawn, and log the metrics to its run.

    Args:
        source: a specification; its space says what the names of named choices stand for.
        settings: `key=value`: keys of the space, and of the configuration.
        out: the run goes to OUT/<W&B's id of it>.

    Raises:
        UserError: W&B is not installed, or settings that do not fit.
    """
    try:
        import wandb
    except ModuleNotFoundError:
        raise UserError("--agent needs Weights & Biases: pip install wandb") from None
    space = read_spec(source).get("space", {})
    params = {key: value for key, value in parse_overrides(settings).items() if key in space}
    for key, value in params.items():
        if is_named(space[key]) and value not in space[key]:
            raise UserError(f"{key}={value}: choose {', '.join(space[key])}")
    sweep = load_sweep(source, [part for part in settings if part.partition("=")[0] not in space], out)
    with wandb.init(config=params) as run:
        config = sweep.configure(sweep.settings(params), sweep.out / str(run.id))
        train(config, quiet=True)
        metrics = measure(sweep, config, Path(config.out) / "results")
        run.log(metrics)
    return metrics
