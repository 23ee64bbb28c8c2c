"""The throughput measurements: the loops compute one thing, and so do the ways of evaluation; the command's output."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_value.errors import UserError
from dino_value.eval import throughput
from dino_value.eval.benchmarks import inference, loops, timing
from dino_value.eval.throughput import Target
from dino_value.models.backbone import create_backbone

TINY = ["--tiny", "--batch=4", "--repeats=3", "--device=cpu", "--precision=fp32", "--best=backbone.attention=math"]
peer = pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="lightly is not installed")


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    found = throughput.build_parser().parse_args([*TINY, "--threads=1"])
    found.model, found.size, found.window = "vit_tiny_patch16_224", 32, 32
    timing.write_data(tmp_path, found.size, found.batch)
    found.data = tmp_path / "unlabeled"
    return found


def curve(options: argparse.Namespace, loop: str, *overrides: str) -> list[float]:
    """Losses of a loop, in this process."""
    run = loops.train.Trainer(throughput.configure(options, "precision=fp32", *overrides))
    made = loops.LOOPS[loop](run, False)
    return [made.step(views)() for views in throughput.view_batches(options)]


def test_the_plain_loop_and_ours_are_one_algorithm(options: argparse.Namespace) -> None:
    """Equal losses while weights, centre, teacher and optimizer move, so that a difference in any of them shows."""
    ours = curve(options, "ours")
    assert len(ours) == 4
    assert ours[0] != pytest.approx(ours[1], rel=1e-3)
    assert curve(options, "plain") == pytest.approx(ours, rel=1e-4)
    assert curve(options, "ours", "matmul=auto") == pytest.approx(ours, rel=1e-4)


@peer
def test_lightlys_loop_begins_as_ours(options: argparse.Namespace) -> None:
    """Its average comes before the step, where ours and the paper's come after: later losses drift a little apart."""
    ours, other = curve(options, "ours"), curve(options, "lightly")
    assert other[0] == pytest.approx(ours[0], rel=1e-4)
    assert other == pytest.approx(ours, rel=2e-2)


@pytest.fixture(scope="module")
def backbone() -> Any:
    torch.manual_seed(0)
    return create_backbone("vit_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3})


def test_both_ways_to_segment_agree(backbone: Any) -> None:
    source = inference.segmentation_source(48, 80, 3)
    both = inference.Segmentation(backbone, source, 32, "cpu", scale=1.5)
    assert both.windows == 3 * 2 * 4
    assert both.ours() == pytest.approx(both.one_at_a_time(), rel=1e-3)


def test_kept_features_give_the_head_that_features_made_anew_give(backbone: Any) -> None:
    fit = inference.Linear(backbone, 32, 16, "cpu")
    assert fit.options.steps * fit.options.batch == inference.EPOCHS * 16
    torch.testing.assert_close(fit.fit(True), fit.fit(False), rtol=1e-3, atol=1e-5)


def test_shares_of_the_time() -> None:
    a = torch.randn(300, 300)
    found = loops.shares(lambda: [a @ a for _ in range(20)])
    assert sum(found.values()) == pytest.approx(1)
    assert max(found, key=lambda name: found[name]) == "linear layers"


def test_ratios() -> None:
    rows = {
        "a": {"seconds": [1.0, 20.0, 3.0], "peak_bytes": 10},
        "b": {"seconds": [2.0, 40.0, 6.0], "peak_bytes": 40},
    }
    (row,) = throughput.compare(rows, [Target("a", "b", 2.5)])
    assert row["faster"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert row["memory"] == 0.25
    assert row["reached"] is False


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that need not import everything again; where there is CUDA they must."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(loops, "START", "fork")


@pytest.mark.slow
def test_the_command(tmp_path: Path, forked: None, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "throughput.json"
    threads = torch.get_num_threads()
    arguments = [*TINY, "--without=lightly", "--images=16", "--large", "100", "70", f"--threads={threads}"]
    assert throughput.main([*arguments, f"--json={path}"]) == 0
    printed = capsys.readouterr().out
    assert "an image of 100 × 70" in printed
    assert "plain, unflushed" in printed

    found = json.loads(path.read_text())
    assert set(found) == {"about", "training", "evaluation"}
    rows = found["training"]["steps"]
    assert set(rows) == {"ours", "ours, fast", "ours, best", "plain", "plain, unflushed"}
    for row in rows.values():
        assert len(row["seconds"]) == 3
        assert len(row["losses"]) == 4
        assert row["losses"] == pytest.approx(rows["plain"]["losses"], rel=1e-4)
        assert row["peak_bytes"] >= 0
        assert 0 < row["flop_share"] < 1
        assert sum(row["shares"].values()) == pytest.approx(1)
    for table in ("training", "evaluation"):
        cases = rows if table == "training" else found[table]["rows"]
        for ratio in found[table]["ratios"]:
            mine, other = (cases[ratio[name]]["seconds"] for name in ("name", "reference"))
            assert ratio["faster"] == timing.spread([b / a for a, b in zip(mine, other, strict=True)])
            assert ratio["reached"] in (None, ratio["faster"]["median"] >= (ratio["least"] or 0))
    assert {"ours, kornia", "ours, torchvision", "plain, torchvision on PIL"} == set(found["training"]["data"])
    assert all(math.isfinite(row["rate"]) for row in found["evaluation"]["rows"].values())
    large = found["evaluation"]["large_image"]
    assert large["windows"] == 3 * 5
    assert large["whole_logits_bytes"] == 4 * 150 * 100 * 70


def test_evaluation_alone_needs_no_lightly(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(throughput.metadata, "version", lambda name: asked.append(name) or "1")
    monkeypatch.setattr(throughput, "measure_evaluation", lambda options: {})
    monkeypatch.setattr(throughput, "report_evaluation", lambda result, console: None)
    arguments = ["--tiny", "--batch=4", "--device=cpu", f"--threads={torch.get_num_threads()}", "--tables=evaluation"]
    assert throughput.main(arguments) == 0
    assert asked == ["torch", "timm"]


def test_a_row_that_refuses_is_one_line(options: argparse.Namespace, forked: None) -> None:
    row = loops.Setting("ours", "ours", throughput.configure(options, "optim.batch_size=64"))
    with pytest.raises(UserError, match="4 images are fewer than a batch of 64"):
        loops.measure([row], [], 1)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--repeats=0"], "--repeats=0: must be at least 1"),
        (["--batch=1"], "--batch=1: must be at least 2"),
        (["--images=4"], "--images=4: must be at least 16"),
        (["--tiny", "--batch=4", "--rows", "plane"], "no row 'plane'; choose among 'ours', "),
        (["--threads=2", "--clock=cpu"], "use it with --threads=1"),
        (["--tables=serving"], "invalid choice"),
        (["--tiny", "--batch=4", "optim.lrr=3"], "did you mean optim.lr"),
    ],
)
def test_mistakes(arguments: list[str], part: str) -> None:
    with pytest.raises(UserError, match=part):
        throughput.main(arguments)
