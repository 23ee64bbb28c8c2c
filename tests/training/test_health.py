"""Health: the numbers against naive forms, collapse said once and not of a healthy run, and training left alone."""

from __future__ import annotations

import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dino_value.config import Config
from dino_value.data import scenes as scenes_module
from dino_value.data.folders import read_image
from dino_value.data.labelled import cover_image, spread
from dino_value.data.scenes import scenes
from dino_value.errors import Interrupted, UserError
from dino_value.objectives.dino import DINOLoss
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.metrics import read_metrics
from dino_value.training import health as health_module
from dino_value.training.health import (
    Checkup,
    CollapseWatch,
    class_features,
    kept,
    open_splits,
    rankme,
    unlabeled_images,
)
from dino_value.training.trainer import Trainer, train

Make = Callable[..., Config]
TIMING = ("images_per_second", "data_wait", "seconds", "cpu_seconds")


def naive_rankme(features: Tensor) -> float:
    """exp(−Σ p log p), p = σ / Σσ + 1e-7, by numpy's own decomposition in double precision."""
    values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    total = 0.0
    for value in values:
        share = value / values.sum() + 1e-7
        total -= share * math.log(share)
    return math.exp(total)


@pytest.mark.parametrize("shape", [(2, 2), (40, 7), (7, 40), (64, 64)])
def test_rankme_is_its_formula(shape: tuple[int, int], generator: torch.Generator) -> None:
    features = torch.randn(shape, generator=generator) * torch.logspace(0, -3, shape[1]) + 0.5
    assert rankme(features).item() == pytest.approx(naive_rankme(features), rel=1e-4)
    assert rankme(features * 37).item() == pytest.approx(rankme(features).item(), rel=1e-4)


def test_rankme_from_one_to_all(generator: torch.Generator) -> None:
    line = torch.randn(50, 1, generator=generator) @ torch.randn(1, 20, generator=generator)
    assert rankme(line).item() == pytest.approx(1, abs=1e-3)
    assert rankme(torch.ones(50, 20)).item() == pytest.approx(1, abs=1e-3)
    assert rankme(torch.eye(20)).item() == pytest.approx(20, rel=1e-3)
    assert rankme(torch.zeros(5, 3)).item() == pytest.approx(1, abs=1e-3)


# What is measured, and on what


def test_indices_are_evenly_spread() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 9) == [0, 1, 2]
    assert len(set(spread(1000, 999))) == 999


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """An ImageNet-like folder: two colours, 14 images each to train on, 3 each to ask for."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 14), ("val", 3)):
        for name, channel in (("red", 0), ("blue", 2)):
            folder = tmp_path / "classes" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 60, (20, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 180
                Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return tmp_path / "classes"


def test_a_checkup_is_of_fixed_images(tiny: Make, classes: Path, tiny_data: Path) -> None:
    config = tiny("method=baseline", "health.every=1", "health.images=5", f"health.knn={classes}")
    run, checkup = Trainer(config), Checkup(config)
    files = sorted((tiny_data / "images").iterdir())
    images = torch.stack([cover_image(read_image(files[index]), (16, 16)) for index in (0, 3, 6, 9, 12)])
    assert torch.equal(checkup.images, images)
    run.loss.center.fill_(0.5)
    found = checkup.measure(run.teacher.backbone, run.loss.center)
    with torch.no_grad():
        expected = run.teacher.backbone(run.teacher.backbone.normalise(images)).cls
    assert found["rankme"] == pytest.approx(naive_rankme(expected), rel=1e-4)
    assert found["center_norm"] == pytest.approx(math.sqrt(16 * 0.25))
    assert found["knn_top1"] == 1.0  # colours, which any ViT's features carry
    assert checkup.measure(run.teacher.backbone, run.loss.center) == found


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.fixture
def nine(tmp_path: Path) -> Path:
    """Nine images of noise."""
    rng = np.random.default_rng(1)
    (tmp_path / "nine").mkdir()
    for index in range(9):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / "nine" / f"{index}.png")
    return tmp_path / "nine"


def test_unlabeled_images_that_training_skips_are_skipped(tiny: Make, nine: Path) -> None:
    """The next that can be read, and is not measured anyway, takes the place; else the run would end."""
    given = ["method=baseline", "health.every=1", "health.images=3", f"data.unlabeled={nine}"]
    whole = {index: cover_image(read_image(nine / f"{index}.png"), (16, 16)) for index in range(9)}
    for index in (3, 4, 6, 8):
        damage(nine / f"{index}.png")
    with pytest.raises(UserError, match=r"3\.png: cannot be read as an image"):
        Checkup(tiny(*given))
    checkup = Checkup(tiny(*given, "data.skip_unreadable=true"))
    assert torch.equal(checkup.images, torch.stack([whole[index] for index in (0, 5, 7)]))
    all_of_them = Checkup(tiny(*given, "data.skip_unreadable=true", "health.images=256"))
    assert torch.equal(all_of_them.images, torch.stack([whole[index] for index in (0, 1, 2, 5, 7)]))
    for index in range(9):
        damage(nine / f"{index}.png")
    with pytest.raises(UserError, match="none of 9 images can be read"):
        Checkup(tiny(*given, "data.skip_unreadable=true"))


def test_labelled_images_that_training_skips_are_skipped(tiny: Make, classes: Path) -> None:
    given = ["method=baseline", "health.every=1", f"health.knn={classes}"]
    for path in (classes / "train/red/05.png", classes / "val/blue/01.png"):
        damage(path)
    with pytest.raises(UserError, match=r"health\.knn: .*05\.png: cannot be read as an image"):
        Checkup(tiny(*given))
    checkup = Checkup(tiny(*given, "data.skip_unreadable=true"))
    assert checkup.train is not None
    assert checkup.train.labels.tolist() == [0] * 14 + [1] * 13  # blue is class 0
    assert checkup.queries.labels.tolist() == [0] * 2 + [1] * 3


@pytest.mark.parametrize("field", ["png", "view.png"])
def test_shards_are_measured_like_the_folder_they_were_made_of(tiny: Make, nine: Path, field: str) -> None:
    pytest.importorskip("webdataset")
    given = ["method=baseline", "health.every=1", "health.images=4"]
    folder = Checkup(tiny(*given, f"data.unlabeled={nine}"))
    (nine.parent / "shards").mkdir()
    for start in (0, 5):
        with tarfile.open(nine.parent / "shards" / f"{start}.tar", "w") as shard:
            for path in sorted(nine.iterdir())[start : start + 5 - start // 5]:
                shard.add(path, f"{path.stem}.{field}")
    shards = Checkup(tiny(*given, f"data.unlabeled={nine.parent / 'shards'}", f"data.field={field}"))
    assert torch.equal(shards.images, folder.images)


def test_a_run_with_health_goes_on_over_damaged_files(tiny: Make, nine: Path, classes: Path) -> None:
    damage(nine / "0.png")
    damage(classes / "val/red/00.png")
    given = [f"data.unlabeled={nine}", "data.skip_unreadable=true", "steps=2", "health.every=1"]
    rows = read_metrics(train(tiny("method=baseline", *given, f"health.knn={classes}"), quiet=True))
    assert {row["unreadable"] for row in rows} <= {0, 1}
    assert all(row["rankme"] > 1 and 0 <= row["knn_top1"] <= 1 for row in rows)


def test_features_in_batches_and_in_float32(tiny: Make) -> None:
    run = Trainer(tiny("method=baseline"))
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    whole = class_features(run.teacher.backbone, images)
    with torch.autocast("cpu", torch.bfloat16):
        parts = class_features(run.teacher.backbone, images, batch=2)
    assert parts.dtype == torch.float32
    torch.testing.assert_close(parts, whole)


def test_the_embedded_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rooms by their type; never those on which results are shown."""
    monkeypatch.setattr(scenes_module, "scenes", lambda split, size: scenes(split, 16, 8))
    train, queries = open_splits("scenes")
    assert torch.equal(queries.load(0)[0], scenes("tuning", 16, 8).images[0])
    some = kept(train, 4, 8)
    assert some.images.shape == (4, 3, 8, 8)
    assert torch.equal(some.labels, scenes("training", 16, 8).room[[0, 2, 4, 6]])


def test_scenes_without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    few = scenes("unlabeled", 16, 6)
    monkeypatch.setattr(scenes_module, "scenes", lambda split, size: few)
    assert torch.equal(unlabeled_images("scenes", 3, 16), few.images[[0, 2, 4]])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["health.knn=CLASSES"], "measured every health.every steps, which is 0: set it"),
        (["health.every=1", "health.knn=nowhere"], "health.knn: nowhere/train: no such folder"),
        (["health.every=1", "health.knn=CLASSES", "health.knn_images=19"], "health.knn_images=19: must be at least 20"),
        (["health.every=-1"], "health.every=-1: must be at least 0"),
        (["health.images=1"], "health.images=1: must be at least 2"),
    ],
)
def test_settings_that_cannot_be(tiny: Make, classes: Path, tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        train(tiny("method=baseline", *(part.replace("CLASSES", str(classes)) for part in overrides)), quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_too_few_neighbours(tiny: Make, classes: Path) -> None:
    for path in sorted((classes / "train" / "red").iterdir())[3:]:
        path.unlink()
    with pytest.raises(UserError, match="17 training images are fewer than the 20 neighbours"):
        Checkup(tiny("method=baseline", "health.every=1", f"health.knn={classes}"))


# Training is left alone


def same(left: Any, right: Any) -> bool:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMING} for row in read_metrics(folder)]


DROP = "backbone.kwargs.drop_path_rate=0.3"


@pytest.mark.parametrize("method", ["value", "baseline"])
def test_a_run_is_the_same_with_and_without(tiny: Make, classes: Path, tmp_path: Path, method: str) -> None:
    common = [f"method={method}", DROP]
    plain = train(tiny(f"out={tmp_path / 'plain'}", *common), quiet=True)
    watched = train(tiny(f"out={tmp_path / 'watched'}", "health.every=1", f"health.knn={classes}", *common), quiet=True)
    assert same(load_checkpoint(plain), load_checkpoint(watched))
    measured = ("rankme", "center_norm", "knn_top1")
    found = rows(watched)
    assert all(set(measured) <= row.keys() for row in found)
    assert rows(plain) == [{name: value for name, value in row.items() if name not in measured} for row in found]


def test_two_halves_are_a_whole(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["method=baseline", "steps=7", "log_every=2", "checkpoint.every=100", "health.every=3"]
    common += ["health.patience=4", DROP]
    monkeypatch.setattr(health_module, "CLOSE", 9.0)  # everything is uniform: said at step 6, first seen at step 2
    whole = train(tiny(f"out={tmp_path / 'whole'}", *common), quiet=True)
    config = tiny(f"out={tmp_path / 'halves'}", *common)
    update = Trainer.learner_update

    def stopped(self: Trainer, large: Tensor, small: Tensor) -> None:
        update(self, large, small)
        if self.step == 4:
            raise Interrupted("stop")

    monkeypatch.setattr(Trainer, "learner_update", stopped)
    config.checkpoint.every = 3
    with pytest.raises(Interrupted):
        train(config, quiet=True)
    monkeypatch.setattr(Trainer, "learner_update", update)
    halves = train(config, quiet=True)
    assert same(load_checkpoint(whole), load_checkpoint(halves))
    assert rows(whole) == rows(halves)
    numbers = [row for row in rows(whole) if "event" not in row]
    assert [row["step"] for row in numbers] == [2, 3, 4, 6, 7]
    assert [("rankme" in row, "loss" in row) for row in numbers] == [
        (False, True),
        (True, False),
        (False, True),
        (True, True),
        (True, True),
    ]
    assert [(row["step"], row["event"]) for row in rows(whole) if "event" in row] == [
        (6, "uniform"),
        (6, "one_prototype"),  # in truth: the centre has not settled
    ]


# Collapse


def events(folder: Path) -> list[tuple[str, str]]:
    return [(row["event"], row["message"]) for row in read_metrics(folder) if "event" in row]


def test_a_healthy_run_is_silent(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Although early on one prototype takes all for a while: the centre of a fresh head has yet to settle."""
    folder = train(tiny("method=baseline", "steps=60", "health.every=10", "health.patience=20"), quiet=True)
    assert max(row["prototype_share"] for row in read_metrics(folder)[:20]) > 0.95
    assert events(folder) == []
    assert "warning" not in capsys.readouterr().err


def spoiled(monkeypatch: pytest.MonkeyPatch, config: Config, spoil: Callable[[Tensor], Tensor]) -> Path:
    """A run whose teacher's targets are what `spoil` makes of them."""
    targets = DINOLoss.targets
    monkeypatch.setattr(DINOLoss, "targets", lambda self, logits, t: spoil(targets(self, logits, t)))
    return train(config, quiet=True)


def only_first(targets: Tensor) -> Tensor:
    spoiled = torch.zeros_like(targets)
    spoiled[..., 0] = 1
    return spoiled


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (
            lambda targets: torch.full_like(targets, 1 / targets.shape[-1]),
            "uniform",
            "since step 1: teacher entropy 2.77 is ln K = 2.77: the teacher is uniform and teaches nothing. "
            "Lower objective.teacher_temp (0.04;",
        ),
        (
            only_first,
            "one_prototype",
            "since step 1: teacher entropy 0.00, 100% of it all on one prototype: one prototype takes all, whatever "
            "the image. Check the centring: the centre lags behind the teacher; lower objective.center_momentum (0.9;",
        ),
    ],
)
def test_a_collapsed_teacher_is_said_once(
    tiny: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Tensor], Tensor],
    kind: str,
    said: str,
) -> None:
    folder = spoiled(monkeypatch, tiny("method=baseline", "steps=9", "health.patience=3", "health.spike=0"), spoil)
    found = [row for row in read_metrics(folder) if "event" in row]
    assert [(row["step"], row["event"]) for row in found] == [(4, kind)]
    assert found[0]["message"].startswith(said)
    assert capsys.readouterr().err.count(f"warning: {said}") == 1


def test_features_on_one_line_are_said_once(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    line = torch.arange(1.0, 17)[:, None] * torch.ones(24)
    monkeypatch.setattr(health_module, "class_features", lambda backbone, images: line)
    folder = train(tiny("method=baseline", "steps=6", "health.every=2", "health.patience=2"), quiet=True)
    (found,) = (message for kind, message in events(folder) if kind == "rank_one")
    assert found.startswith("since step 2: RankMe 1.00: the class features of all images point one way. Begin")


class Readings:
    """A watch, and what it says of one reading after another."""

    def __init__(self, config: Config) -> None:
        self.watch, self.step = CollapseWatch(config), 0

    def __call__(self, **values: float) -> list[str]:
        self.step += 10
        return [event.kind for event in self.watch.judge(self.step, values)]


@pytest.fixture
def readings(tiny: Make) -> Readings:
    return Readings(tiny("objective.out_dim=256", "health.patience=20"))


LN_K = math.log(256)
HEALTHY = {"loss": 4.0, "loss_dino": 4.0, "teacher_entropy": 3.0, "prototype_share": 0.05}


def test_it_must_last(readings: Readings) -> None:
    uniform = HEALTHY | {"teacher_entropy": LN_K - 0.01}
    assert [readings(**uniform) for _ in range(2)] == [[], []]
    assert readings(**HEALTHY) == []
    assert [readings(**uniform) for _ in range(5)] == [[], [], ["uniform"], [], []]
    assert readings(**HEALTHY) == []
    assert [readings(**uniform) for _ in range(4)] == [[]] * 4  # once a run


def test_a_student_that_learns_nothing(readings: Readings) -> None:
    assert [readings(**(HEALTHY | {"loss_dino": LN_K})) for _ in range(4)] == [[], [], ["uniform_student"], []]


def test_kinds_are_told_apart(readings: Readings) -> None:
    both = HEALTHY | {"loss_dino": LN_K, "teacher_entropy": LN_K}
    assert [readings(**both) for _ in range(4)] == [[], [], ["uniform"], []]
    one = {"loss": 4.0, "loss_dino": 0.01, "teacher_entropy": 0.0, "prototype_share": 1.0}
    assert [readings(**one) for _ in range(4)] == [[], [], ["one_prototype"], []]


def test_ijepas_targets(readings: Readings) -> None:
    assert [readings(loss=0.2, target_spread=0.9) for _ in range(4)] == [[]] * 4
    assert [readings(loss=0.2, target_spread=0.001) for _ in range(4)] == [[], [], ["constant_targets"], []]


def test_sharp_targets_on_many_prototypes_are_healthy(readings: Readings) -> None:
    sharp = HEALTHY | {"teacher_entropy": 0.01, "prototype_share": 0.2}
    assert [readings(**sharp) for _ in range(5)] == [[]] * 5
    assert [readings(loss=1.0, teacher_entropy=0.0) for _ in range(5)] == [[]] * 5  # unknown: not judged


def test_a_reading_without_a_number_neither_ends_nor_lengthens_it(readings: Readings) -> None:
    assert readings(rankme=1.0) == []
    assert [readings(**HEALTHY) for _ in range(3)] == [[]] * 3
    assert readings(rankme=1.0) == ["rank_one"]


def noise(count: int, seed: int = 0) -> list[float]:
    return (4 + 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(seed))).tolist()


def test_a_loss_that_only_varies_is_no_spike(readings: Readings) -> None:
    falling = [loss - 0.01 * step for step, loss in enumerate(noise(200))]
    assert not any(readings(loss=loss) for loss in falling)
    assert not any(readings(loss=2.0) for _ in range(30))  # constant, hence no deviation
    assert readings(loss=2.01) == []


def test_each_spike_is_said_once(readings: Readings) -> None:
    for loss in noise(20):
        assert readings(loss=loss) == []
    assert [readings(loss=loss) for loss in (6.0, 7.0, 5.5)] == [["loss_spike"], [], []]
    for loss in noise(5, seed=1):
        assert readings(loss=loss) == []
    assert readings(loss=6.0) == ["loss_spike"]
    assert [readings(loss=6.0 + loss / 100) for loss in noise(60)] == [[]] * 60  # the level from now on
    assert readings(loss=9.0) == ["loss_spike"]


def test_no_spike_before_there_is_a_mean(readings: Readings) -> None:
    assert [readings(loss=loss) for loss in (4.0, 90.0, 4.0)] == [[]] * 3


def test_spikes_may_be_left_out(tiny: Make) -> None:
    readings = Readings(tiny("health.spike=0"))
    assert not any(readings(loss=loss) for loss in [*noise(20), 100.0])
