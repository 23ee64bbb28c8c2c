"""`dino-value language map`: v and q of every token, against what they are the derivative of."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dino_value.cli import main
from dino_value.language.config import LanguageConfig
from dino_value.language.designer_update import TargetTask
from dino_value.language.probe import feedback_gradient, open_steered
from dino_value.language.trainer import train
from dino_value.language.value_map import map_run

Tiny = Callable[..., LanguageConfig]


@pytest.fixture
def folder(tiny: Tiny) -> Path:
    return train(tiny("method=value", "targets.chunk=7"), quiet=True)


def test_v_is_what_a_step_along_u_does_to_the_losses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TargetTask] = []
    trunk = TargetTask.trunk
    monkeypatch.setattr(TargetTask, "trunk", lambda task: [seen.append(task), trunk(task)][1])
    (one,) = map_run(folder, rows=2).values()
    (task,) = seen
    _, steer = open_steered(folder)
    u, parameters = feedback_gradient(steer, "main"), task.learner.parameters_in_scope()
    with torch.no_grad():
        task.learner.eval()
        hidden = trunk(task)
        radius = 1e-2 / float(torch.stack([part.norm() for part in u]).norm())
        moved = [
            dict(zip(parameters, torch._foreach_add(list(parameters.values()), u, alpha=sign * radius), strict=True))
            for sign in (1, -1)
        ]
        slope = (task.terms(hidden, moved[0]) - task.terms(hidden, moved[1])) / (2 * radius)
    found = torch.tensor([[token[name]["v"] for name in ("best", "chosen")] + [token["v"]] for token in one["tokens"]])
    assert len(found) == len(slope) == len(task.batch.counted)
    torch.testing.assert_close(found[:, 2], slope[:, 0], rtol=2e-2, atol=2e-2 * float(slope.std()))
    torch.testing.assert_close(found[:, 0], slope.max(1).values, rtol=2e-2, atol=2e-2 * float(slope.std()))
    assert one["spread"] == pytest.approx(float(slope.std()), rel=1e-2)


def test_its_numbers_belong_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["language", "map", str(folder), "--rows", "2"]) == 0
    path = folder / "results" / "map.json"
    assert str(path) in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    (one,) = json.loads(path.read_text()).values()
    assert one["regret"] == pytest.approx(one["oracle_gain"] - one["value_gain"], abs=1e-6)
    assert one["oracle_gain"] >= max(0, one["value_gain"])
    tokens = one["tokens"]
    assert {token["row"] for token in tokens} == {0, 1}
    assert all(token["best"]["v"] >= max(token["v"], token["chosen"]["v"]) for token in tokens)
    assert all(0.5 <= token["q"] <= 1 and token["q"] + token["chosen"]["q"] <= 1.0001 for token in tokens)
    assert 1 - sum(token["q"] for token in tokens) / len(tokens) == pytest.approx(one["alpha"], abs=1e-5)
    other = map_run(folder, rows=2, seed=1)["main"]["tokens"]
    assert [token["text"] for token in other] != [token["text"] for token in tokens]


def test_a_closed_form_has_a_map_too(tiny: Tiny) -> None:
    (one,) = map_run(train(tiny("method=closed_form"), quiet=True)).values()
    assert one["oracle_gain"] >= one["value_gain"] > 0


def test_mistakes(tiny: Tiny, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = train(tiny("method=baseline", f"out={tmp_path / 'plain'}"), quiet=True)
    for given, said in (
        ([str(tmp_path / "none")], "not a run folder"),
        ([str(plain)], "method=baseline has no g_down"),
        ([str(folder), "--rows", "0"], "--rows 0: must be 1 or more"),
    ):
        assert main(["language", "map", *given]) == 2
        assert said in capsys.readouterr().err
