"""Few labels, and a backbone that is trained with its head."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_value import cli
from dino_value.data.labelled import Kept, LabelledTensors, Subset, few_labels
from dino_value.data.scenes import labelled
from dino_value.errors import Interrupted, UserError
from dino_value.eval import common, depth, fitting, linear, seg
from dino_value.models.backbone import Backbone, create_backbone, save_backbone

SIZE = (32, 32)
SEG = seg.SegOptions(size=SIZE, steps=30, batch=8, lr=1e-2, inference="whole", device="cpu")
DEPTH = depth.DepthOptions(size=SIZE, steps=30, batch=8, lr=1e-2, device="cpu")
LINEAR = linear.LinearOptions(size=SIZE, steps=30, batch=8, lr=1e-2, device="cpu")
EACH = [("ade20k", seg, SEG), ("nyuv2", depth, DEPTH), ("imagefolder", linear, LINEAR)]


def build(**kwargs: Any) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, **kwargs}
        return create_backbone("vit_tiny_patch16_224", 32, given)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return build()


def scenes(layout: str, training: int = 24, validation: int = 8) -> tuple[Subset, Subset]:
    return Subset(labelled(layout, "training"), range(training)), Subset(
        labelled(layout, "validation"), range(validation)
    )


def state_of(backbone: Backbone) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in backbone.state_dict().items()}


# The backbone


@pytest.mark.parametrize(("layout", "module", "options"), EACH)
def test_a_copy_is_trained(backbone: Backbone, layout: str, module: Any, options: Any) -> None:
    before, random = state_of(backbone), torch.get_rng_state()
    data = scenes(layout)
    tuned = replace(options, finetune=True, finetune_lr=1e-3, steps=3)
    with common.frozen(backbone, linear.POOLS["cls"] if module is linear else seg.read_map, tuned) as extractor:
        reader, head = module.fit(extractor, common.View(data[0]), tuned)
        assert not reader.backbone.training
        assert not head.training
        moved = [not torch.equal(value, before[name]) for name, value in reader.backbone.state_dict().items()]
    assert sum(moved) > len(moved) / 2  # not, for one, the classifier's class token where patches are read
    found = module.measure(backbone, data, tuned).metrics
    assert found != module.measure(backbone, data, replace(tuned, finetune=False)).metrics
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(("layout", "module", "options"), EACH)
@pytest.mark.parametrize("blocks", [1, 2])
def test_at_a_rate_of_nothing_it_is_the_frozen_evaluation(
    backbone: Backbone, layout: str, module: Any, options: Any, blocks: int
) -> None:
    data, options = scenes(layout), replace(options, blocks=blocks)
    frozen = module.evaluate(backbone, *data, options)
    tuned = module.evaluate(backbone, *data, replace(options, finetune=True, finetune_lr=1e-30))
    assert tuned == pytest.approx(frozen, rel=1e-3, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize(("layout", "module", "options"), EACH)
def test_it_fits_few_labels_better_than_a_frozen_backbone(
    backbone: Backbone, layout: str, module: Any, options: Any
) -> None:
    data = scenes(layout, 16, 1)
    options = replace(options, steps=60)
    frozen, tuned = (
        module.evaluate(backbone, data[0], data[0], replace(options, finetune=finetune, finetune_lr=1e-3))["loss"]
        for finetune in (False, True)
    )
    assert tuned < 0.9 * frozen


def test_in_bfloat16_it_is_almost_the_same(backbone: Backbone) -> None:
    data, options = scenes("imagefolder"), replace(LINEAR, finetune=True, steps=5)
    full, half = (linear.evaluate(backbone, *data, replace(options, bf16=bf16))["loss"] for bf16 in (False, True))
    assert full != half
    assert half == pytest.approx(full, rel=0.1)


def test_stochastic_depth_is_a_function_of_the_seed() -> None:
    data, options = scenes("imagefolder"), replace(LINEAR, finetune=True, steps=5)
    plain, dropping = build(), build(drop_path_rate=0.5)
    dropping.load_state_dict(plain.state_dict())
    found = linear.evaluate(dropping, *data, options)
    torch.rand(3)
    assert linear.evaluate(dropping, *data, options) == found
    assert linear.evaluate(plain, *data, options) != found
    # Frozen features are those of the whole network.
    frozen = replace(options, finetune=False)
    assert linear.evaluate(dropping, *data, frozen) == linear.evaluate(plain, *data, frozen)


@pytest.mark.parametrize("changes", [{}, {"cache_gb": 0.0}, {"augment": True, "labels": 12}])
def test_a_stopped_training_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    data, backbone = scenes("ade20k"), build(drop_path_rate=0.3)
    options = replace(SEG, finetune=True, finetune_lr=1e-3, steps=6, **changes)
    whole = seg.evaluate(backbone, *data, options)
    kept, batches = replace(options, state=tmp_path), fitting.training_batches

    def stopping(*arguments: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for index, batch in enumerate(batches(*arguments), 1):
            if index == 3:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "training_batches", stopping)
        with pytest.raises(Interrupted, match="holds 3 of 6 head steps"):
            seg.evaluate(backbone, *data, kept)
    for change in ({"finetune": False}, {"finetune_lr": 1e-4}, {"labels": 11}):
        with pytest.raises(UserError, match="stopped under other settings"):
            seg.evaluate(backbone, *data, replace(kept, resume=True, **change))
    for _ in range(2):  # the second time from a state that is complete
        assert seg.evaluate(backbone, *data, replace(kept, resume=True)) == whole


@pytest.mark.parametrize(
    ("module", "options", "layout", "change", "message"),
    [
        (seg, SEG, "ade20k", {"finetune_lr": 0.0}, r"finetune_lr=0\.0 must be positive"),
        (seg, SEG, "ade20k", {"finetune_lr": 1e30}, "became infinite or NaN: lower the learning rate"),
        (seg, SEG, "ade20k", {"backend": "mmseg"}, "finetune: --backend mmseg trains a head alone"),
        (linear, LINEAR, "imagefolder", {"lrs": (1e-3, 1e-2)}, "leave out lrs and finetune_blocks"),
        (linear, LINEAR, "imagefolder", {"finetune_blocks": 1}, "leave out lrs and finetune_blocks"),
        (depth, DEPTH, "nyuv2", {"labels": 0}, "labels=0: choose 1 … 24, the items of the training split"),
        (depth, DEPTH, "nyuv2", {"labels": 25}, "labels=25: choose 1 … 24"),
        (seg, SEG, "ade20k", {"labels": "many"}, "labels=many: choose 1 … 24"),
        (linear, LINEAR, "imagefolder", {"labels": -3}, "labels=-3: choose 1 … 24"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    backbone: Backbone, module: Any, options: Any, layout: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        module.evaluate(backbone, *scenes(layout), replace(options, finetune=True, **change))
    assert "\n" not in str(error.value)


# Few labels


def test_fewer_labels_are_among_more() -> None:
    source = labelled("ade20k", "training")
    chosen = {count: few_labels(source, count, 3) for count in (1, 32, 128, len(source))}
    assert [len(set(indices)) for indices in chosen.values()] == list(chosen)
    assert set(chosen[1]) < set(chosen[32]) < set(chosen[128])
    assert chosen[len(source)] == list(range(len(source)))
    assert few_labels(source, 32, 3) == chosen[32] != few_labels(source, 32, 4)


def test_classes_are_even_as_long_as_they_last() -> None:
    classes = torch.tensor([0] * 30 + [1] * 6 + [2] * 4)
    source = LabelledTensors("classes", torch.zeros(40, 3, 8, 8, dtype=torch.uint8), classes, ["a", "b", "c"])
    before: set[int] = set()
    for count, even in ((2, None), (3, [1, 1, 1]), (12, [4, 4, 4]), (17, None), (16, [6, 6, 4]), (40, [30, 6, 4])):
        indices = few_labels(source, count, 0)
        found = classes[indices].bincount(minlength=3).tolist()
        assert even is None or found == even
        if count != 16:
            assert before <= set(indices)
            before = set(indices)
    assert max(classes[few_labels(source, 5, 0)].bincount(minlength=3).tolist()) == 2
    # By the folder, where a source knows it; no image is read.
    source.load = None  # type: ignore[assignment, method-assign]
    source.label = lambda index: int(classes[index])  # type: ignore[attr-defined]
    wrapped = Kept(Subset(common.View(source), range(40)))
    assert few_labels(wrapped, 17, 0) == few_labels(source, 17, 0)


@pytest.mark.parametrize("finetune", [False, True])
@pytest.mark.parametrize(("layout", "module", "options"), EACH)
def test_only_these_are_trained_on(
    backbone: Backbone, layout: str, module: Any, options: Any, finetune: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, held_out = scenes(layout)
    options = replace(options, steps=4, batch=4, labels=6, seed=1, finetune=finetune)
    chosen = few_labels(training, 6, 1)
    result = module.measure(backbone, (training, held_out), options)
    assert result.about["labelled"] == [training.name(index) for index in chosen]
    # As if the others were not there.
    alone = replace(options, labels=None)
    assert module.measure(backbone, (Subset(training, chosen), held_out), alone).metrics == pytest.approx(
        result.metrics, nan_ok=True
    )
    assert "labelled" not in module.measure(backbone, (training, held_out), alone).about


# The command


@pytest.fixture(scope="module")
def weights(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_backbone(path, backbone)
    return str(path)


def test_results_say_what_was_trained_and_keep_apart(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", "scenes", "--steps", "2", "--batch", "4", "--size", "32", "--device", "cpu", "--quiet"]
    arguments = ["eval", "seg", weights, *arguments, "--out", str(tmp_path / "seg"), "--inference", "whole"]
    tuned = [*arguments, "--finetune", "--finetune-lr", "3e-4", "--labels", "8"]
    assert cli.main(tuned) == 0
    path = tmp_path / "seg" / "results.json"
    results = json.loads(path.read_text())
    settings = results["settings"]
    assert (settings["finetune"], settings["finetune_lr"], settings["labels"]) == (True, 3e-4, 8)
    assert len(results["labelled"]) == 8
    assert cli.main(tuned) == 0  # the same again may take its place
    kept = path.read_bytes()
    capsys.readouterr()
    for flags in ([], ["--finetune"], ["--labels", "8"]):
        assert cli.main([*arguments, *flags]) == 2
        error = capsys.readouterr().err
        assert "holds results with --finetune, 8 labels, these are with" in error
        assert error.count("\n") == 1
    assert path.read_bytes() == kept
    # Results that were written before there was such a choice are frozen ones.
    del settings["finetune"], settings["labels"]
    path.write_text(json.dumps(results))
    assert cli.main(tuned) == 2
    assert cli.main(arguments) == 0


@pytest.mark.parametrize("name", ["knn", "retrieval"])
def test_what_has_no_head_has_no_such_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", name, "run", "--data", "scenes", "--out", "out", "--finetune"]) == 2
    assert "unrecognized arguments: --finetune" in capsys.readouterr().err
