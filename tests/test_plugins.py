"""Parts from a user's own file go through training, resuming, evaluation and the report as ours do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dino_value import config as config_module
from dino_value import plugins
from dino_value.cli import main
from dino_value.config import Config, load_config, save_config
from dino_value.designers import DESIGNERS
from dino_value.errors import UserError
from dino_value.heads import HEADS
from dino_value.runs.trackers import TRACKERS
from dino_value.training.methods import METHODS
from dino_value.training.steps import OBJECTIVES
from dino_value.training.trainer import Trainer, train
from dino_value.value import DIRECTIONS

PARTS = """
import json
import torch
from torch import nn
from dino_value import plugins
from dino_value.training.methods.self_supervised import self_supervised_update
from dino_value.training.steps import build_dino


@plugins.mask_generator("bias")
class Bias(nn.Module):
    def __init__(self, width, depth, stride, keep_ratio, offset=0.0):
        super().__init__()
        self.level = nn.Parameter(torch.full((1, 1, 1, 1), offset))
        self.look = nn.Conv2d(3, 1, 1)

    def forward(self, views):
        return (self.look(views) + self.level).sigmoid()


@plugins.head("seg", "deep")
class Deep(nn.Sequential):
    def __init__(self, dim, classes):
        super().__init__(nn.BatchNorm2d(dim), nn.Conv2d(dim, dim, 1), nn.ReLU(), nn.Conv2d(dim, classes, 1))


@plugins.objective("again")
def again(config, backbone):
    return build_dino(config, backbone)


@plugins.method("noted")
def noted(trainer, large, small):
    self_supervised_update(trainer, large, small)
    trainer.meters.add(noted=torch.ones(()))


@plugins.direction("halved")
def halved(g_down, g_pre):
    return [part / 2 for part in g_down]


@plugins.tracker("lines")
class Lines:
    def __init__(self, config, folder, step, settings):
        self.file = open(folder / "lines.txt", "a")

    def scalars(self, step, values):
        self.file.write(json.dumps(sorted(values)) + "\\n")

    def text(self, step, name, message):
        pass

    def pictures(self, step, pictures):
        pass

    def close(self):
        self.file.close()
"""


def forget(registries: Any, before: Any, names: Any, kept: Any) -> None:
    for registry, old in zip(registries, before, strict=True):
        registry.clear()
        registry.update(old)
    for choices, old_names in zip(names, kept, strict=True):
        choices[:] = old_names
    plugins._registered.clear()
    plugins._load.cache_clear()
    plugins._load_installed.cache_clear()
    for name in [name for name in sys.modules if name.startswith(("dino_value_plugin_", "my_parts"))]:
        del sys.modules[name]


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file of parts in the working directory; nothing of it stays registered."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_parts.py").write_text(PARTS)
    registries = (DESIGNERS, HEADS, OBJECTIVES, METHODS, DIRECTIONS, TRACKERS)
    before = [dict(registry) for registry in registries]
    names = [config_module.MASKS, config_module.TRACKERS, *config_module.CHOICES.values()]
    kept = [list(choices) for choices in names]
    yield "plugins=[my_parts.py]"
    forget(registries, before, names, kept)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_parts_of_every_kind_go_through_a_run(parts: str, tiny: Callable[..., Config], tmp_path: Path) -> None:
    save_config(tiny("steps=2", "log_every=1"), tmp_path / "tiny.yaml")
    own = ["designer.name=bias", "designer.options.offset=0.5", "objective.name=again", "value.direction=halved"]
    own += ["feedback.seg.head=deep", "track.to=[lines]"]
    train(load_config("tiny.yaml", [parts, "out=mine", *own]), until=1)
    assert main(["train", "tiny.yaml", parts, "out=mine", *own]) == 0  # goes on
    whole = ["train", "tiny.yaml", parts, "out=whole", *own]
    assert main(whole) == 0
    first, second = rows(tmp_path / "mine"), rows(tmp_path / "whole")
    assert [row["loss"] for row in first] == [row["loss"] for row in second]
    assert "value" in (tmp_path / "mine" / "lines.txt").read_text()
    assert "my_parts.py" in (tmp_path / "mine" / "config.yaml").read_text()
    assert main(["report", "mine", "--out", "page.html"]) == 0


def test_the_example_of_the_page(parts: str, tiny: Callable[..., Config], tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()
    (tmp_path / "page_parts.py").write_text(page.split("```python\n")[1].split("```")[0])
    save_config(tiny("steps=1"), tmp_path / "tiny.yaml")
    given = ["plugins=[page_parts.py]", "out=run", "designer.name=constant", "designer.options.start=1.0"]
    assert main(["train", "tiny.yaml", *given]) == 0


def test_a_method_from_outside(parts: str, tiny: Callable[..., Config], tmp_path: Path) -> None:
    save_config(tiny("steps=1", "log_every=1"), tmp_path / "tiny.yaml")
    assert main(["train", "tiny.yaml", parts, "out=noted", "method=noted"]) == 0
    assert rows(tmp_path / "noted")[0]["noted"] == 1.0


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        ("", "plugins=[nowhere]", "plugins=nowhere: no such module"),
        ("", "plugins=[nowhere.py]", "nowhere.py: no such file"),
        ("", "plugins=[nopkg.mod]", "plugins=nopkg.mod: no such module"),
        ("", "plugins=['']", "not the name of a module"),
        ("x = 1", "plugins=[bad.py]", "registers nothing"),
        ("raise SystemExit(1)", "plugins=[bad.py]", "fails as it is imported: SystemExit"),
        (
            "from dino_value import plugins\nplugins.mask_generator('targets')(int)",
            "plugins=[bad.py]",
            "designer.name=targets is taken",
        ),
        ("from dino_value import plugins\nplugins.method('a+b')(int)", "plugins=[bad.py]", "a name has letters"),
        ("from dino_value import plugins\nplugins.method('three')(3)", "plugins=[bad.py]", "neither a class nor"),
        ("", "plugins=parts", "plugins=parts: expected a list"),
        ("import nowhere_else", "plugins=[bad.py]", "imports nowhere_else, which is not installed"),
        ("1 / 0", "plugins=[bad.py]", "fails as it is imported: ZeroDivisionError"),
        (
            "from dino_value import plugins\nplugins.mask_generator('unet')(int)",
            "plugins=[bad.py]",
            "designer.name=unet is taken",
        ),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_line(
    text: str,
    given: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(text)
    plugins._load.cache_clear()
    assert main(["train", "rooms/cpu", "out=run", "data.unlabeled=scenes", given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_options_that_a_mask_generator_does_not_take(
    parts: str, tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(tiny(), tmp_path / "tiny.yaml")
    given = ["designer.name=bias", "designer.options.colour=1"]
    assert main(["train", "tiny.yaml", parts, "out=run", *given]) == 2
    assert "designer.options={'colour': 1}: bias does not take them" in capsys.readouterr().err


def test_a_run_finds_its_plugin_from_anywhere(
    parts: str, tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_config(tiny("steps=2", "log_every=1"), tmp_path / "tiny.yaml")
    train(load_config("tiny.yaml", [parts, f"out={tmp_path}/run", "designer.name=bias"]), until=1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["train", "../run/config.yaml"]) == 0
    assert main(["train", "../run/config.yaml", "plugins=[../my_parts.py]"]) == 0  # another spelling of the same
    assert rows(tmp_path / "run")[-1]["step"] == 2


def test_a_configuration_from_another_process_brings_its_plugins(
    parts: str, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """`compare --jobs` sends configurations to new processes, which know no plugin."""
    save_config(tiny("steps=1"), tmp_path / "tiny.yaml")
    config = load_config("tiny.yaml", [parts, "out=run", "designer.name=bias"])
    for registry, name, choices, shown in plugins._registered:  # as in a new process
        del registry[name]
        choices.remove(shown)
    plugins._registered.clear()
    plugins._load.cache_clear()
    run = Trainer(config)
    assert run.steer is not None
    assert type(run.steer.designer).__name__ == "Bias"


def test_a_failed_plugin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: str) -> None:
    text = (tmp_path / "my_parts.py").read_text()
    (tmp_path / "my_parts.py").write_text(text + "\n1 / 0\n")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        plugins.load(["my_parts.py"])
    assert "bias" not in DESIGNERS
    (tmp_path / "my_parts.py").write_text(text)
    plugins.load(["my_parts.py"])
    assert "bias" in DESIGNERS


def test_a_file_named_like_a_module_does_not_stand_in_for_it(parts: str, tmp_path: Path) -> None:
    (tmp_path / "my_parts.py").rename(tmp_path / "json.py")
    plugins.load(["json.py"])
    assert sys.modules["json"] is json


def test_an_installed_plugin_is_loaded_with_every_configuration(
    parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Config]
) -> None:
    info = tmp_path / "site" / "mine-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[dino_value.plugins]\nmine = my_parts_installed\n")
    (tmp_path / "my_parts.py").rename(tmp_path / "site" / "my_parts_installed.py")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    plugins._load_installed.cache_clear()
    save_config(tiny(), tmp_path / "tiny.yaml")
    text = (tmp_path / "tiny.yaml").read_text().replace("plugins: []\n", "")
    (tmp_path / "tiny.yaml").write_text(text)
    assert load_config("tiny.yaml", ["designer.name=bias"]).designer.mask == "bias"
