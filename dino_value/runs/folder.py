"""The run folder: made once, and only ever continued by the run that made it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dino_value.config import DistributedConfig, EvaluationConfig, HealthConfig, TrackConfig, save_config
from dino_value.errors import UserError
from dino_value.files import sweep, write_json
from dino_value.runs.checkpoint import latest_checkpoint
from dino_value.runs.metrics import read_metrics


def prepare_folder(config: Any, folder: Path, override: bool = False) -> list[str]:
    """Create the run folder, or see that it holds this very run; with `override` a run of other settings takes these.

    Returns:
        The settings that change now, one line each.

    Raises:
        UserError: not writable, in use by something else, or holding a run of other settings (differences named).
    """
    differences: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / "config.yaml"
        strangers = sorted(path.name for path in folder.iterdir() if path.name not in _OURS and path.name[0] != ".")
        if saved.exists():
            # Through YAML, so that tuples are lists as in the file.
            now = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config)))
            differences = _differences(OmegaConf.load(saved), now, OmegaConf.structured(type(config)))
            # A run that was refused at its first step left no row and no checkpoint: nothing is lost with it.
            begun = latest_checkpoint(folder / "checkpoints") is not None or read_metrics(folder)
            if differences and not begun and (strangers or not _is_config(saved, type(config))):
                raise UserError(f"out={folder} is not empty and not a run folder; choose another out=")
            if differences and begun and not override:
                more = f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
                raise UserError(
                    f"out={folder} holds a run with other settings ({'; '.join(differences[:8])}{more}); choose "
                    "another out=, or go on with the new ones by --override"
                )
            differences = differences if begun else []
        elif strangers:
            raise UserError(f"out={folder} is not empty and not a run folder; choose another out=")
        save_config(config, saved)
        for place in (folder, folder / "checkpoints"):
            sweep(place)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError):
        raise UserError(f"{folder / 'config.yaml'}: not a run's configuration; choose another out=") from None
    except OSError as error:
        raise UserError(f"out={folder}: cannot be written ({error.strerror}); choose another out=") from None
    return differences


def record_environment(folder: Path, found: dict[str, Any]) -> None:
    """environment.json: what the run began with, and under `resumed` what it went on with.

    Raises:
        UserError: there is one, and it is damaged.
    """
    path = folder / "environment.json"
    if path.exists():
        try:
            first = json.loads(path.read_bytes())
            found = {**first, "resumed": [*first.get("resumed", []), found]}
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path}: not what a run writes; remove it, and the run goes on") from None
    write_json(path, found)


_OURS = {
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "splits.json",
    "checkpoints",
    "nonfinite",
    "backbone.safetensors",
    "learner",
    "results",
    "export",
    "evaluations",
    "tensorboard",
    "wandb",
    "report.html",
    "report_figures",
}
# What a run may change when it goes on: it decides how it runs, not what it computes.
_FREE = {"out", "device", "log_every", "plugins", "data.workers", "optim.skip_nonfinite", "backbone.checkpointing"} | {
    f"{part}.{item.name}"
    for part, schema in (
        ("health", HealthConfig),
        ("distributed", DistributedConfig),
        ("track", TrackConfig),
        ("evaluation", EvaluationConfig),
    )
    for item in fields(schema)
}


def _is_config(path: Path, schema: type) -> bool:
    saved = OmegaConf.load(path)
    return isinstance(saved, DictConfig) and {str(key) for key in saved} <= {item.name for item in fields(schema)}


def _differences(old: Any, new: Any, defaults: Any) -> list[str]:
    """Settings in which a run's file differs; one that its version did not have yet had its default's effect."""

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {
            name: leaf
            for part, value in tree.items()
            for name, leaf in flat(value, f"{prefix}.{part}".lstrip(".")).items()
        }

    before, after, usual = (flat(OmegaConf.to_container(each)) for each in (old, new, defaults))
    before = {**{name: usual[name] for name in after if name in usual}, **before}
    return [
        f"{name}: {before.get(name)} there, {after.get(name)} now"
        for name in sorted({*before, *after} - _FREE)
        if before.get(name) != after.get(name) and not name.startswith("checkpoint.")
    ]
