"""Frozen features, heads fitted at once, fine-tuning, resuming, intervals, and the commands that join them."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dino_value import cli
from dino_value.data.labelled import LabelledTensors, readable
from dino_value.errors import Interrupted, UserError
from dino_value.eval import EVALUATIONS, command, common, depth, fitting, intervals, knn, linear, output, seg
from dino_value.heads import LinearBNHead, LinearBNHeads, classification_loss, heads_loss
from dino_value.models.backbone import Backbone, create_backbone, save_backbone

SIZE = (32, 32)
NAMES = ["a", "b", "c"]
LINEAR = linear.LinearOptions(size=SIZE, steps=30, batch=8, lr=1e-2, device="cpu")
DEPTH = depth.DepthOptions(size=SIZE, steps=3, batch=4, lr=1e-2, device="cpu", eigen_crop=False)


def build(seed: int = 0, blocks: int = 4) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_backbone(
            "vit_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 24, "depth": blocks, "num_heads": 3}
        )


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return build()


def class_source(count: int = 30, seed: int = 0, noise: float = 60) -> LabelledTensors:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    shades = torch.tensor([[150, 100, 100], [100, 150, 100], [100, 100, 150]])[labels][:, :, None, None]
    images = shades + noise * torch.randn(count, 3, 32, 32, generator=generator)
    return LabelledTensors("classes", images.clamp(0, 255).to(torch.uint8), labels, NAMES)


def depth_source(count: int = 6, seed: int = 0, height: int = 32) -> LabelledTensors:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, height, 40), dtype=torch.uint8, generator=generator)
    metres = torch.rand(count, height, 40, generator=generator) * 6
    metres[torch.rand(metres.shape, generator=generator) < 0.2] = 0
    return LabelledTensors("depth", images, metres)


# Features


@pytest.mark.parametrize("count", [1, 2, 4])
def test_last_blocks_are_timms(backbone: Backbone, count: int, generator: torch.Generator) -> None:
    images = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        found = common.last_blocks(backbone.eval(), images, count)
        expected = backbone.model.forward_intermediates(
            images, indices=count, norm=True, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
        )
    torch.testing.assert_close(found.patches, torch.cat([patches for patches, _ in expected], -1))
    torch.testing.assert_close(found.cls, torch.cat([prefix[:, 0] for _, prefix in expected], -1))


@pytest.mark.parametrize(("pool", "blocks"), [("cls+mean", 1), ("cls", 4), ("cls+mean", 4)])
def test_more_features_are_classified(backbone: Backbone, pool: str, blocks: int) -> None:
    metrics = linear.evaluate(backbone, class_source(), class_source(9, 1), replace(LINEAR, pool=pool, blocks=blocks))
    assert metrics["top1"] > 0.6


def test_dense_heads_read_four_blocks(backbone: Backbone) -> None:
    metrics = depth.evaluate(backbone, depth_source(), depth_source(3, 1), replace(DEPTH, blocks=4))
    assert math.isfinite(metrics["rmse"])


def test_views_and_unreadable_items() -> None:
    source = class_source(6)
    source.targets[2] = 3
    view = readable(common.View(source))
    assert (len(view), view.skipped) == (5, ["sample 2: labels 3 … 3, but there are 3 classes (0 … 2, 255 = ignore)"])
    assert view.name(2) == "sample 3"
    source.targets[:] = 3
    with pytest.raises(UserError, match="none of 6 images can be read"):
        readable(common.View(source))


def test_the_centre_of_a_larger_image() -> None:
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    images[:, :, 16:48, 16:48] = 200
    source = LabelledTensors("classes", images, torch.tensor([0]), ["a"])
    assert (linear.CentreCropped(source, SIZE, 0.5)[0, 0][0] == 200).all()
    assert (linear.CentreCropped(source, SIZE, 1.0)[0, 0][0] != 200).any()


# Several learning rates at once


def test_heads_fitted_at_once_are_heads_fitted_alone(generator: torch.Generator) -> None:
    rates = (1e-3, 1e-2, 1e-1)
    options = common.HeadOptions(size=SIZE, steps=12, clip=0.1)
    batches = [
        (torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(12)
    ]

    def head() -> Any:
        return common.seeded(lambda: LinearBNHead(6, 3), 0)

    together = LinearBNHeads([head() for _ in rates])
    groups = [(list(one.parameters()), lr) for one, lr in zip(together.heads, rates, strict=True)]
    common.fit_head(together, heads_loss, batches, options, groups)
    for index, lr in enumerate(rates):
        alone = common.fit_head(head(), classification_loss, batches, replace(options, lr=lr))
        for name in ("weight", "bias"):
            torch.testing.assert_close(
                getattr(together.heads[index], name), getattr(alone.classify, name), atol=1e-5, rtol=1e-4
            )
        torch.testing.assert_close(together(batches[0][0])[index], alone(batches[0][0]), atol=1e-4, rtol=1e-4)


def test_the_training_split_chooses_the_rate(backbone: Backbone) -> None:
    options = replace(LINEAR, lrs=(1e-7, 1e-2))
    training, held_out = class_source(40), class_source(12, 1)
    result = linear.measure(backbone, (training, held_out), options)
    chosen = result.about["chosen_lr"]
    assert chosen["lr"] == 1e-2
    assert chosen["held_out_top1"]["0.01"] >= chosen["held_out_top1"]["1e-07"]
    assert chosen["images"] == 4
    # The head is then fitted anew on all of it, as if the rate had been given.
    assert result.metrics == linear.evaluate(backbone, training, held_out, replace(options, lrs=(), lr=1e-2))
    # Held-out labels choose nothing.
    other = LabelledTensors("classes", held_out.images, 2 - held_out.targets, NAMES)
    assert linear.measure(backbone, (training, other), options).about["chosen_lr"] == chosen


def test_a_rate_that_diverges_is_not_chosen(backbone: Backbone) -> None:
    with common.frozen(backbone, linear.POOLS["cls"], LINEAR) as extractor:
        best, shares = linear.choose_lr(extractor, class_source(40), replace(LINEAR, lrs=(1e30, 1e-2)))
    assert best == 1e-2
    assert shares["1e+30"] == 0


def test_too_few_images_to_choose(backbone: Backbone) -> None:
    with pytest.raises(UserError, match="too few to hold a tenth out"):
        linear.evaluate(backbone, class_source(4), class_source(4), replace(LINEAR, lrs=(1e-3, 1e-2)))


# Fine-tuning


@pytest.mark.parametrize("blocks", [1, 4])
def test_finetuning_trains_a_copy_of_the_last_blocks(backbone: Backbone, blocks: int) -> None:
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    options = replace(LINEAR, finetune_blocks=blocks, backbone_lr=1e-3)
    with common.frozen(backbone, linear.POOLS["cls"], options) as extractor:
        trunk, tail = linear.fit(extractor, class_source(), options)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    moved = {
        name.split(".")[3]
        for name, value in tail.named_parameters()
        if name.startswith("backbone.model.blocks") and not torch.equal(value, before[name.removeprefix("backbone.")])
    }
    assert moved == {str(index) for index in range(4 - blocks, 4)}
    assert not torch.equal(tail.backbone.model.norm.weight, backbone.model.norm.weight)
    assert trunk.stop == 4 - blocks


def test_finetuning_starts_where_frozen_features_are(backbone: Backbone) -> None:
    """With a rate of the blocks near zero it is the frozen evaluation."""
    options = replace(LINEAR, finetune_blocks=2, backbone_lr=1e-12)
    frozen = linear.evaluate(backbone, class_source(), class_source(9, 1), LINEAR)
    found = linear.evaluate(backbone, class_source(), class_source(9, 1), options)
    assert found["loss"] == pytest.approx(frozen["loss"], rel=0.05)  # weight decay aside
    assert linear.evaluate(backbone, class_source(), class_source(9, 1), replace(options, cache_gb=0)) == pytest.approx(
        found, abs=1e-4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finetune_blocks": 5}, "finetune_blocks=5: choose 0 … 4"),
        ({"finetune_blocks": 1, "lrs": (1e-3,)}, "leave out lrs and blocks"),
        ({"lrs": (0.0,)}, "must be positive"),
        ({"lrs": (math.nan, 1e-3)}, "must be positive"),
        ({"blocks": 5}, "blocks=5"),
        ({"pool": "max"}, "choose cls, mean"),
        ({"crop_share": 0.0}, "crop_share=0"),
        ({"save_images": -1}, "save_images=-1"),
    ],
)
def test_bad_linear_settings(backbone: Backbone, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        linear.evaluate(backbone, class_source(), class_source(4), replace(LINEAR, **change))


# k-NN


def test_knn_leaves_out_what_it_cannot_find(backbone: Backbone) -> None:
    options = knn.KNNOptions(size=SIZE, device="cpu", ks=(5, 20, 100), save_images=1)
    result = knn.measure(backbone, (class_source(30, noise=20), class_source(12, 1, noise=20)), options)
    assert result.about["neighbours"] == {"used": [5, 20], "left_out": [100]}
    assert set(result.metrics) == {"top1", "top1_k5", "top5_k5", "top1_k20", "top5_k20"}
    assert result.metrics["top1"] == result.metrics["top1_k20"] > 0.8
    assert len(result.pictures) == 1
    with pytest.raises(UserError, match="ks="):
        knn.evaluate(backbone, class_source(4), class_source(4), replace(options, ks=(5,)))


# Depth


def naive_depth(pairs: list[tuple[Tensor, Tensor]], low: float, high: float) -> dict[str, float]:
    """Pixel by pixel over all the images that are given."""
    square = relative = log10 = count = 0.0
    inside = [0, 0, 0]
    logs = []
    for prediction, truth in pairs:
        for p, t in zip(prediction.flatten().tolist(), truth.flatten().tolist(), strict=True):
            if not low < t < high:
                continue
            p = min(max(p, low), high)
            count += 1
            square += (p - t) ** 2
            relative += abs(p - t) / t
            log10 += abs(math.log10(p) - math.log10(t))
            logs.append(math.log(p) - math.log(t))
            for power in (1, 2, 3):
                inside[power - 1] += max(p / t, t / p) < 1.25**power
    mean = sum(logs) / count
    return {
        "rmse": math.sqrt(square / count),
        "absrel": relative / count,
        **{f"delta{power}": inside[power - 1] / count for power in (1, 2, 3)},
        "log10": log10 / count,
        "silog": 100 * math.sqrt(max(0.0, sum(value**2 for value in logs) / count - mean**2)),
    }


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("average", ["image", "pixel"])
def test_depth_against_loops(backbone: Backbone, average: str, flip: bool) -> None:
    options = replace(DEPTH, average=average, flip=flip, min_depth=0.5, max_depth=5.0)
    held_out = depth_source(4, 1)
    with common.frozen(backbone, seg.read_map, options) as extractor:
        _, head = depth.fit(extractor, depth_source(), options)
        result = depth.score(extractor, head, held_out, options)
        pairs = []
        with torch.no_grad():
            for images, targets in common.validation_images(held_out, options):
                coarse = head(extractor(images))
                if flip:
                    coarse = (coarse + head(extractor(images.flip(-1))).flip(-1)) / 2
                full = nn.functional.interpolate(coarse, size=(32, 40), mode="bilinear", align_corners=False)
                pairs += list(zip(full[:, 0], targets, strict=True))
    if average == "pixel":
        expected = naive_depth(pairs, 0.5, 5.0)
    else:
        rows = [naive_depth([pair], 0.5, 5.0) for pair in pairs]
        expected = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    for name, value in expected.items():
        assert result.metrics[name] == pytest.approx(value, rel=1e-5), name
    whole = result.statistic(result.rows.sum(0)[None])
    assert float(whole["rmse"]) == pytest.approx(result.metrics["rmse"])


def test_depth_settings_and_data(backbone: Backbone, capsys: pytest.CaptureFixture[str]) -> None:
    for change, message in (({"average": "set"}, "choose image or pixel"), ({"min_depth": 11.0}, "min_depth=11")):
        with pytest.raises(UserError, match=message):
            depth.evaluate(backbone, depth_source(), depth_source(), replace(DEPTH, **change))  # type: ignore[arg-type]
    far = depth_source()
    far.targets = far.targets * 1000
    with pytest.raises(UserError, match=r"no depth between 0\.001 and 10 m"):
        depth.evaluate(backbone, far, LabelledTensors("depth", far.images, far.targets + 11), DEPTH)
    assert "are they millimetres read as metres?" in capsys.readouterr().err


# Intervals


def test_interval_of_a_mean() -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(3, 2, (400, 1)))
    draws = intervals.bootstrap(intervals.mean_rows(values), intervals.means("x"))
    ends = intervals.interval(draws["x"])
    assert ends is not None
    half = 1.96 * float(values.std()) / 20
    assert ends == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=0.03)


def test_images_without_a_value_do_not_count() -> None:
    values = torch.tensor([[1.0], [math.nan], [3.0]])
    sums = intervals.mean_rows(values).sum(0)[None]
    assert intervals.means("x")(sums)["x"].item() == 2


def test_the_same_images_are_resampled_alike() -> None:
    rows = intervals.mean_rows(torch.rand(50, 1))
    better = rows + torch.tensor([0.01, 0.0])
    first, second = (intervals.bootstrap(one, intervals.means("x"))["x"] for one in (rows, better))
    torch.testing.assert_close(second - first, torch.full_like(first, 0.01))
    scored = [command.Scored({"x": float(d.mean())}, {"x": d}) for d in (first, second)]
    found = command.difference("x", scored[1], scored[0])
    assert found is not None
    assert found["low"] == pytest.approx(0.01)
    assert found["high"] == pytest.approx(0.01)


# Resuming


class StopAfter:
    """Raise SIGTERM in this process while batch `count` is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        batches = fitting.training_batches

        def stopping(*args: Any, **kwargs: Any) -> Iterator[tuple[Tensor, Tensor]]:
            for index, batch in enumerate(batches(*args, **kwargs), start=1):
                if index == count:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        monkeypatch.setattr(fitting, "training_batches", stopping)


@pytest.mark.parametrize("cache_gb", [0.0, 4.0])
def test_a_stopped_training_goes_on_exactly(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_gb: float
) -> None:
    options = replace(LINEAR, cache_gb=cache_gb, lrs=(1e-3, 1e-2), steps=10)
    data = (class_source(40), class_source(9, 1))
    whole = linear.evaluate(backbone, *data, options)
    kept = replace(options, state=tmp_path)
    for stage, count in (("choice", 4), ("head", 7)):
        with monkeypatch.context() as patch:
            # After the choice is resumed its batches are 6, and then those of the head.
            StopAfter(patch, count)
            with pytest.raises(Interrupted, match=rf"\.{stage}\.pt holds {count} of 10 head steps; add --resume"):
                linear.evaluate(backbone, *data, replace(kept, resume=stage == "head"))
    assert linear.evaluate(backbone, *data, replace(kept, resume=True)) == whole
    # Once more, from states that are complete.
    assert linear.evaluate(backbone, *data, replace(kept, resume=True)) == whole
    with pytest.raises(UserError, match="stopped under other settings, data or weights"):
        linear.evaluate(backbone, *data, replace(kept, resume=True, seed=1))
    (tmp_path / ".head.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match="no state to resume from"):
        linear.evaluate(backbone, *data, replace(kept, resume=True))
    assert linear.evaluate(backbone, *data, kept) == whole


# The commands


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("weights")
    for seed in range(2):
        save_backbone(folder / f"{'ab'[seed]}.safetensors", build(seed, 2))
    return [str(folder / f"{name}.safetensors") for name in "ab"]


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path "scenes" gives the small sets of this file."""

    def seg_source(count: int) -> LabelledTensors:
        images = class_source(count).images
        return LabelledTensors("seg", images, (images.sum(1) // 300).long().clamp(max=2), NAMES)

    sources = {"ade20k": seg_source, "nyuv2": depth_source, "imagefolder": class_source}
    monkeypatch.setattr("dino_value.data.scenes.labelled", lambda layout, split: sources[layout](20))


@pytest.mark.usefixtures("embedded")
def test_all_evaluations_in_one_call(two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["steps=2", "size=32", "device=cpu", "batch=4", "save-images=2", "seg.steps=3", "depth.flip=true"]
    assert cli.main(["eval", "all", *two, "--data", "scenes", "--out", str(tmp_path), *settings]) == 0
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert list(content) == list(EVALUATIONS)
    headline = {"linear": "top1", "knn": "top1", "seg": "miou", "depth": "rmse", "retrieval": "map"}
    for name, metric in headline.items():
        assert set(content[name]) == {"a", "b"}
        first, second = (json.loads((tmp_path / name / one / "results.json").read_text()) for one in "ab")
        assert content[name]["a"][metric]["value"] == first[metric]
        low, high = first["interval"][metric]
        assert low <= first[metric] <= high
        assert content[name]["b"][metric]["difference"]["value"] == pytest.approx(second[metric] - first[metric])
        assert first["images_per_second"] > 0
        assert first["evaluation"] == name
        assert len(list((tmp_path / name / "a" / "pictures").glob("*.png"))) == 2
        assert not list((tmp_path / name).rglob(".*.pt"))
    assert json.loads((tmp_path / "seg" / "a" / "results.json").read_text())["settings"]["steps"] == 3
    assert json.loads((tmp_path / "depth" / "a" / "results.json").read_text())["settings"]["flip"] is True
    printed = capsys.readouterr().out
    assert "retrieval map" in printed
    assert "Δ" in printed


@pytest.mark.usefixtures("embedded")
def test_a_stopped_command_goes_on_where_it_was(
    two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM in the second of two head trainings: the first is not trained again, and the numbers are the same."""
    settings = ["steps=6", "size=32", "device=cpu", "batch=4", "linear.lr=1e-2"]
    arguments = ["eval", "all", two[0], "--data-imagefolder", "scenes", "--data-ade20k", "scenes", *settings]
    assert cli.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    arguments = [*arguments, "--out", str(tmp_path / "stopped")]
    batches, seen = fitting.training_batches, list[int]()

    def stopping(*args: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches(*args):
            seen.append(1)
            if len(seen) == 9:  # the third of seg, after six of linear
                signal.raise_signal(signal.SIGTERM)
            yield batch

    def counting(*args: Any) -> Iterator[tuple[Tensor, Tensor]]:
        seen.append(args[4])
        return batches(*args)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "training_batches", stopping)
        assert cli.main(arguments) == 75
    assert len(seen) == 9
    assert "stopped: " in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "training_batches", counting)
        assert cli.main([*arguments, "resume=true"]) == 0
    assert seen[9:] == [6, 3]  # both begin where they were: nothing is left of linear, half of seg
    for name in ("linear", "knn", "seg", "retrieval"):
        first, second = (
            json.loads((tmp_path / kind / name / "results.json").read_text()) for kind in ("whole", "stopped")
        )
        for key in ("seconds", "phases", "images_per_second", "environment"):
            del first[key], second[key]
        assert first == second
    assert not list(tmp_path.rglob(".*.pt"))


@pytest.mark.usefixtures("embedded")
def test_switches_and_data_of_one_evaluation(two: list[str], tmp_path: Path) -> None:
    settings = ["steps=2", "size=32", "device=cpu", "batch=4", "depth.eigen-crop=false", "depth.flip=false"]
    arguments = ["eval", "all", two[0], "--data-nyuv2", "scenes", "retrieval.data=scenes", "--out", str(tmp_path)]
    assert cli.main([*arguments, *settings]) == 0
    assert set(json.loads((tmp_path / "comparison.json").read_text())) == {"depth", "retrieval"}
    results = json.loads((tmp_path / "depth" / "results.json").read_text())
    assert results["settings"]["eigen_crop"] is results["settings"]["flip"] is False


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "scenes"], "no checkpoint given"),
        (["W"], "no data given"),
        (["W", "--data", "scenes", "stesp=3"], "stesp=3: no evaluation has this flag"),
        (["W", "--data", "scenes", "seg.lrs=3"], "seg.lrs=3: no evaluation has this flag"),
        (["W", "--data", "scenes", "seg.steps=many"], "invalid int value"),
        (["W", "W", "--data", "scenes"], "given twice"),
        (["W", "--data", "scenes", "steps=0"], "steps=0 must be positive"),
        (["W", "--data", "scenes", "seg.flip=maybe"], "seg.flip=maybe: choose true or false"),
    ],
)
def test_all_refuses(
    arguments: list[str], said: str, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [two[0] if part == "W" else part for part in arguments]
    assert cli.main(["eval", "all", *arguments, "--out", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "read as timm" not in line]
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.usefixtures("embedded")
def test_a_default_size_that_the_patch_does_not_divide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.safetensors"
    save_backbone(
        path,
        create_backbone("vit_tiny_patch16_224", 28, {"patch_size": 14, "embed_dim": 24, "depth": 1, "num_heads": 3}),
    )
    arguments = command.build_parser(seg.EVALUATION).parse_args([str(path), "--data", "d", "--out", "o"])
    options, _ = command.prepare(seg.EVALUATION, arguments, str(path))
    assert options.size == (518, 518)
    assert "seg: size 518x518, which 14 px patches divide" in capsys.readouterr().err


def test_unreadable_items_are_skipped_and_counted(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        for index, name in enumerate(NAMES):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (32, 32), (80 * index, 40, 40)).save(tmp_path / split / name / f"{number}.png")
    (tmp_path / "train" / "b" / "3.png").write_bytes(b"")
    common_arguments = ["--data", str(tmp_path), "--size", "32", "--device", "cpu"]
    for name in ("linear", "knn", "retrieval"):
        out = tmp_path / "out" / name
        arguments = ["eval", name, two[0], *common_arguments, "--out", str(out), "--skip-unreadable"]
        steps = ["--steps", "2", "--batch", "4"] if name == "linear" else []
        assert cli.main([*arguments, *steps]) == 0
        results = json.loads((out / "results.json").read_text())
        if name == "retrieval":
            assert results["unreadable"] == {"validation": 0}
        else:
            assert results["unreadable"] == {"training": 1, "validation": 0}
            assert results["data"]["training"] == 11
    assert "3.png" in capsys.readouterr().err


def test_names_that_tell_checkpoints_apart() -> None:
    assert command.unique_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert command.unique_names(["x/a/w.pth", "x/b/w.pth"]) == ["a_w", "b_w"]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_entry_of_the_registry(name: str) -> None:
    found = command.evaluation(name)
    assert found.name == name
    flags = set(vars(command.build_parser(found).parse_args(["w", "--data", "d", "--out", "o"])))
    # Every flag sets an option, or is one that the command line knows.
    known = {
        "weights",
        "data",
        "out",
        "model",
        "min_match",
        "backbone",
        "files",
        "skip_unreadable",
        "set",
        "group_pattern",
        "matmul",
        "quiet",
    }
    assert flags - known <= set(found.defaults.__dataclass_fields__)


def test_numbers_of_tables() -> None:
    assert output.format_value(0.25, (0.2, 0.3)) == "0.2500 [0.2000, 0.3000]"
    assert output.format_value(math.nan) == "–"
    assert output.nest({"iou/wall": math.nan, "iou/bed": 0.5, "miou": 0.5}) == {
        "iou": {"wall": None, "bed": 0.5},
        "miou": 0.5,
    }
