"""The packaged specifications, and those for W&B."""

import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dino_value.errors import UserError
from dino_value.sweep import agent, spec

FOLDER = Path(str(resources.files("dino_value.configs"))) / "sweeps"
DATA = ["data.unlabeled=u", "data.ade20k=a", "data.nyuv2=n"]
LANGUAGE = ["learner.model=m", "data.stream=s.jsonl", "feedback.files=f.jsonl", "held.file=h.jsonl"]
# arXiv 2601.22108 v1, sweep ranges.
PAPER: dict[str, Any] = {
    "optim.lr": {"low": 1e-6, "high": 5e-5, "log": True},
    "value.period": [2, 4, 8],
    "value.batch_size": [32, 64, 128],
    "value.scope.blocks": [2, 3, 4],
    "designer.lr": {"low": 1e-4, "high": 1e-3, "log": True},
    "designer.keep_ratio": [0.4, 0.5, 0.6, 0.7],
}
WEIGHTS = [0.5, 1, 2, 4, 8, 16]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_specifications_load(path: Path, tmp_path: Path) -> None:
    spec.load_sweep(f"sweeps/{path.stem}", LANGUAGE if path.stem == "language" else DATA, tmp_path)


def test_the_papers_learning_rates_of_language(tmp_path: Path) -> None:
    sweep = spec.load_sweep("sweeps/language", LANGUAGE, tmp_path)
    rates = sweep.space["optim.lr"]
    assert (rates[0], rates[-1], len(rates), sweep.trials) == (5e-6, 1e-5, 5, 5)
    assert [point["optim.lr"] for point in sweep.first] == rates  # each once


@pytest.mark.parametrize(
    ("name", "objectives", "free"),
    [
        ("segmentation", {"seg.miou": "maximize"}, ("seg",)),
        ("depth", {"depth.rmse": "minimize"}, ("depth",)),
        ("both", {"seg.miou": "maximize", "depth.rmse": "minimize"}, ("seg", "depth")),
    ],
)
def test_the_papers_spaces(name: str, objectives: dict[str, str], free: tuple[str, ...], tmp_path: Path) -> None:
    sweep = spec.load_sweep(f"sweeps/{name}", DATA, tmp_path)
    assert sweep.objectives == objectives
    assert {key: sweep.space[key] for key in PAPER} == PAPER
    assert list(sweep.space["designer"]) == ["unet", "sit"]
    weights = {key: value for key, value in sweep.space.items() if key.startswith("feedback.")}
    assert weights == {f"feedback.{task}.weight": WEIGHTS for task in free}


@pytest.mark.parametrize("path", sorted((FOLDER / "wandb").glob("*.yaml")), ids=lambda path: path.stem)
def test_wandb_files_search_the_same_space(path: Path, tmp_path: Path) -> None:
    """Against W&B's own JSON schema where its package `sweeps` is installed; its rules for what we use always."""
    content = yaml.safe_load(path.read_text())
    try:
        import jsonschema
        from sweeps.config import schema  # type: ignore[import-not-found]

        jsonschema.validate(content, schema.dereferenced_sweep_config_jsonschema)
    except ModuleNotFoundError:
        pass
    assert set(content) == {"program", "method", "metric", "run_cap", "command", "parameters"}
    assert content["method"] in ("bayes", "grid", "random")
    command = content["command"]
    assert command[:4] == ["dino-value", "sweep", f"sweeps/{path.stem}", "--agent"]
    assert command[-1] == "${args_no_hyphens}"
    sweep = spec.load_sweep(command[2], DATA, tmp_path)
    assert {content["metric"]["name"]: content["metric"]["goal"]} == sweep.objectives
    translated = {}
    for key, value in content["parameters"].items():
        if "values" in value:
            translated[key] = value["values"]
        else:
            assert value["distribution"] == "log_uniform_values"
            translated[key] = {"low": value["min"], "high": value["max"], "log": True}
    space = {key: list(value) if spec.is_named(value) else value for key, value in sweep.space.items()}
    assert translated == space


class Run:
    """What the agent uses of W&B's run."""

    id = "abc"

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def log(self, metrics: dict[str, float]) -> None:
        self.logged.append(metrics)


def test_what_an_agent_calls(spec: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, trained = Run(), []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda config: run))
    monkeypatch.setattr(agent, "train", lambda config, quiet: trained.append(config))
    monkeypatch.setattr(agent, "measure", lambda sweep, config, results: {"seg.miou": 0.5})
    settings = ["optim.lr=3e-06", "value.period=2", "α=depth", "steps=5"]
    assert agent.run_agent(str(spec()), settings, tmp_path / "out") == {"seg.miou": 0.5}
    assert run.logged == [{"seg.miou": 0.5}]
    (config,) = trained
    assert config.out == str(tmp_path / "out" / "abc")
    assert (config.optim.lr, config.value.period, config.feedback.depth.weight, config.steps) == (3e-6, 2, 4.0, 5)
    with pytest.raises(UserError, match="α=none: choose seg, depth"):
        agent.run_agent(str(spec()), ["α=none"], tmp_path / "out")
