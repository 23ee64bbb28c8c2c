"""`--backend mmseg`: mmsegmentation on our backbone, against our own segmentation."""

from __future__ import annotations

import gc
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dino_value.data.labelled import LabelledSource, LabelledTensors, Subset
from dino_value.data.layouts import open_labelled
from dino_value.errors import Interrupted, UserError
from dino_value.eval import common, mmseg_backend, seg
from dino_value.heads import IGNORE, LinearBNSegHead
from dino_value.models.backbone import Backbone, create_backbone, save_backbone

NAMES = ["red", "green", "blue", "yellow"]
COLOURS = np.array([[0, 0, 0], [230, 30, 30], [30, 230, 30], [30, 30, 230], [230, 230, 30]], dtype=np.uint8)
OWN = seg.SegOptions(size=(32, 32), steps=60, batch=8, lr=1e-2, device="cpu")
MMSEG = replace(OWN, backend="mmseg")
Pair = tuple[LabelledSource, LabelledSource]


@pytest.fixture(scope="session")
def parts() -> Iterator[ModuleType]:
    """mmseg_parts, where it can be imported."""
    pytest.importorskip("mmengine", reason="needs the extra [mmseg]")
    from dino_value.eval import mmseg_parts

    gc.freeze()  # mmengine collects garbage for every data set that it opens: seconds, with all of torch in memory
    yield mmseg_parts
    gc.unfreeze()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_backbone(
            "vit_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
        )


def write_squares(root: Path, size: tuple[int, int], counts: tuple[int, int] = (24, 8), suffix: str = "png") -> Path:
    """A folder in ADE20K's layout: squares of 8 px, each of the colour of its label; black ones are not labelled."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    rows = [f"{index}\t{name}" for index, name in enumerate(NAMES, 1)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tName", *rows]))
    for split, count in zip(("training", "validation"), counts, strict=True):
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            squares = rng.integers(0, 5, (-(-size[0] // 8), -(-size[1] // 8)))
            ids = squares.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]
            Image.fromarray(COLOURS[ids]).save(root / "images" / split / f"{index:02d}.{suffix}")
            Image.fromarray(ids.astype(np.uint8)).save(root / "annotations" / split / f"{index:02d}.png")
    return root


def opened(root: Path) -> Pair:
    return open_labelled("ade20k", root, "training"), open_labelled("ade20k", root, "validation")


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("squares"), (32, 32))


# --- the metric


@pytest.mark.filterwarnings("ignore:invalid value")
def test_iou_agrees_with_theirs(parts: ModuleType, generator: torch.Generator) -> None:
    """Random maps with pixels to ignore, a class that is nowhere, and one that is predicted but never true."""
    names = ["a", "b", "c", "d", "predicted", "nowhere"]
    labels = torch.randint(0, 4, (5, 20, 30), generator=generator)
    prediction = torch.where(torch.rand(labels.shape, generator=generator) < 0.6, labels, labels.flip(0))
    prediction[:, :2, :5] = 4
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = IGNORE
    ours = seg.scores_of(seg.confusion_matrix(prediction, labels, 6), names)

    logits = 10.0 * torch.nn.functional.one_hot(prediction, 6).movedim(-1, 1)
    samples = [
        {"pred_sem_seg": {"data": p[None]}, "gt_sem_seg": {"data": t[None]}, "seg_logits": {"data": z}}
        for p, t, z in zip(prediction, labels, logits, strict=True)
    ]
    exact, theirs = parts.ExactIoU(), parts.IoUMetric()
    for metric in (exact, theirs):
        metric.dataset_meta = {"classes": names}
        metric.process({}, samples)
    found = exact.compute_metrics(exact.results)
    loss = torch.nn.functional.cross_entropy(logits.double(), labels, ignore_index=IGNORE)
    assert found.pop("loss") == pytest.approx(float(loss), rel=1e-5)
    assert found == pytest.approx(ours, abs=1e-9, nan_ok=True)
    rounded = theirs.compute_metrics(theirs.results)  # per cent, two digits
    assert [rounded[key] for key in ("mIoU", "mAcc", "aAcc")] == pytest.approx(
        [100 * ours[key] for key in ("miou", "macc", "aacc")], abs=0.0051
    )
    summed = seg.statistic(exact.rows.sum(0, keepdim=True))
    assert {name: float(value) for name, value in summed.items()} == pytest.approx(
        {name: ours[name] for name in ("miou", "macc", "aacc")}
    )


# --- the same head weights


def both(backbone: Backbone, data: Pair, options: seg.SegOptions, folder: Path) -> tuple[common.Result, common.Result]:
    """One head, trained by us, scored by us and by mmsegmentation."""
    with common.frozen(backbone, seg.read_map, options) as extractor:
        _, head = seg.fit(extractor, data[0], options)
        ours = seg.score(extractor, head, data[1], options)
        with mmseg_backend.isolated(options):
            runner = mmseg_backend.build_runner(backbone, data, replace(options, backend="mmseg"), folder)
            runner.model.decode_head.head.load_state_dict(head.state_dict())
            theirs = mmseg_backend.score(runner, data[1], options)
    return ours, theirs


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("native", "inference", "tolerance"),
    [
        ((32, 32), "whole", 1e-4),
        ((32, 75), "slide", 1e-4),  # windows, the last flush with the end
        ((96, 136), "slide", 1e-3),  # scaled, by two libraries: a grey level here and there
        ((20, 24), "whole", 3e-3),  # logits to the labels' resolution at once, or by way of the image's
    ],
)
def test_same_head_same_scores(
    backbone: Backbone, tmp_path: Path, native: tuple[int, int], inference: str, tolerance: float
) -> None:
    data = opened(write_squares(tmp_path / "data", native))
    options = replace(OWN, inference=inference, stride=16)
    ours, theirs = both(backbone, data, options, tmp_path / "work")
    assert ours.metrics["miou"] > 0.2
    assert theirs.metrics == pytest.approx(ours.metrics, abs=tolerance)
    pixels = native[0] * native[1]
    assert theirs.rows.shape == ours.rows.shape
    assert float((theirs.rows - ours.rows).abs().max()) <= 10 * tolerance * pixels


@pytest.mark.usefixtures("parts")
def test_resizing_without_antialiasing_is_what_differs(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mmsegmentation's own default, in place of the Pillow that our configs ask for."""
    fit = mmseg_backend.fit_pipeline
    monkeypatch.setattr(
        mmseg_backend,
        "fit_pipeline",
        lambda *given: [{key: value for key, value in step.items() if key != "backend"} for step in fit(*given)],
    )
    data = opened(write_squares(tmp_path / "data", (96, 136)))
    ours, theirs = both(backbone, data, replace(OWN, stride=16), tmp_path / "work")
    assert abs(ours.metrics["aacc"] - theirs.metrics["aacc"]) > 5e-3


# --- training


@contextmanager
def untouched(backbone: Backbone) -> Iterator[None]:
    """What is inside leaves the backbone and the random states as they were."""
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    backbone.train()
    yield
    assert backbone.training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]  # noqa: NPY002
    assert random.getstate() == before[2]
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.usefixtures("parts")
def test_training_learns_as_ours_does(backbone: Backbone, squares: Path) -> None:
    data = opened(squares)
    with untouched(backbone):
        theirs = seg.evaluate(backbone, *data, MMSEG)
    ours = seg.evaluate(backbone, *data, OWN)
    assert set(theirs) == set(ours)
    assert ours["miou"] > 0.6
    assert theirs["miou"] == pytest.approx(ours["miou"], abs=0.05)  # other starting weights, other batches
    assert theirs["loss"] == pytest.approx(ours["loss"], abs=0.1)


@pytest.mark.usefixtures("parts")
def test_upernet(backbone: Backbone, squares: Path) -> None:
    data = opened(squares)
    few = Subset(data[0], range(4)), Subset(data[1], range(2))
    with untouched(backbone):
        found = seg.evaluate(backbone, *few, replace(MMSEG, head="upernet", steps=1, batch=2))
    assert 0 <= found["miou"] <= 1
    with pytest.raises(UserError, match="reads four blocks of its own choice"):
        seg.evaluate(backbone, *few, replace(MMSEG, head="upernet", blocks=2))


@pytest.mark.usefixtures("parts")
def test_learning_rates_are_ours(backbone: Backbone, squares: Path, tmp_path: Path) -> None:
    """The linear warm-up and the cosine of `common.fit_head`, step by step."""
    from mmengine.hooks import Hook

    steps, warmup = 40, 2
    options = replace(MMSEG, steps=steps, batch=2)
    seen: list[float] = []

    class Rates(Hook):
        def before_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
            seen.append(runner.optim_wrapper.param_groups[0]["lr"])

    with mmseg_backend.isolated(options):
        runner = mmseg_backend.build_runner(backbone, opened(squares), options, tmp_path)
        runner.register_hook(Rates(), priority="HIGHEST")
        mmseg_backend.train(runner, options)
    wanted = [
        options.lr
        * min(1, (step + 1) / warmup)
        * (0.5 + 0.5 * np.cos(np.pi * max(0, step - warmup) / (steps - warmup)))
        for step in range(steps)
    ]
    assert seen == pytest.approx(wanted, rel=1e-4, abs=1e-9)


# --- the command


@pytest.fixture(scope="module")
def weights(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_backbone(path, backbone)
    return path


@pytest.mark.usefixtures("parts")
def test_command_stops_and_goes_on(
    weights: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(weights), "--data", str(squares), "--out", str(tmp_path), "--backend", "mmseg", "--size", "32"]
    arguments += ["--steps", "6", "--batch", "4", "--device", "cpu", "--save-images", "1"]

    @contextmanager
    def at_once() -> Iterator[Any]:
        yield lambda: True

    with monkeypatch.context() as patch:
        patch.setattr(mmseg_backend, "stop_requests", at_once)
        with pytest.raises(Interrupted, match="holds 1 of 6 head steps; add --resume"):
            seg.main(arguments)
    with pytest.raises(UserError, match="was stopped under other settings"):
        seg.main([*arguments, "--resume", "--lr", "1e-4"])
    capsys.readouterr()
    assert seg.main([*arguments, "--resume"]) == 0
    assert len(capsys.readouterr().out.splitlines()) < 12  # the table, and nothing of the Runner's log

    results = json.loads((tmp_path / "results.json").read_text())
    assert {"miou", "macc", "aacc", "loss", "iou", "interval"} <= set(results)
    assert set(results["iou"]) == set(NAMES)
    assert results["settings"]["backend"] == "mmseg"
    assert (tmp_path / "pictures" / "0000_image_truth_prediction.png").is_file()
    assert (tmp_path / "mmseg" / "last_checkpoint").read_text().endswith("iter_6.pth")


# --- for mmsegmentation's users


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(("name", "maps"), [("linear", [(4, 4)]), ("upernet", [(16, 16), (8, 8), (4, 4), (2, 2)])])
def test_configs_build(weights: Path, name: str, maps: list[tuple[int, int]]) -> None:
    """As mmsegmentation's own tools do it: from the file, with the values that a user changes."""
    from mmseg.registry import MODELS

    config = mmseg_backend.load_config(name)
    config.merge_from_dict({"model.backbone.weights": str(weights)})
    dims = [48] * len(maps)
    config.merge_from_dict({"model.decode_head.in_channels": dims, "model.decode_head.channels": 48})
    if name == "upernet":
        config.merge_from_dict({"model.neck.in_channels": dims, "model.neck.out_channels": 48})
        config.model.backbone.out_indices = (0, 1, 2, 3)
    with torch.random.fork_rng(devices=[]):
        model = MODELS.build(config.model)
        features = model.extract_feat(torch.rand(2, 3, 32, 32) * 255)
    assert [tuple(part.shape) for part in features] == [(2, 48, *size) for size in maps]
    assert model.decode_head.out_channels == 150
    assert config.train_dataloader.dataset.data_root == "data/ADEChallengeData2016"
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert not model.train().backbone.backbone.training


OWN_CONFIG = """
_base_ = "{base}"
size = (32, 32)
model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(weights="{weights}"),
    decode_head=dict(in_channels=[48], channels=48, num_classes=4, out_channels=4),
    test_cfg=dict(crop_size=size, stride=(16, 16)),
)
steps = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
data = dict(data_root="{data}", img_suffix=".png", pipeline=steps)
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=data)
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=data)
train_cfg = dict(max_iters=2, val_interval=3)
work_dir = "{work}"
"""


def test_a_users_own_config_runs(parts: ModuleType, weights: Path, squares: Path, tmp_path: Path) -> None:
    """As mmsegmentation's tools/train.py and tools/test.py run it."""
    from mmengine.config import Config
    from mmengine.runner import Runner

    config = tmp_path / "own.py"
    with as_file(files("dino_value.configs") / "mmseg" / "linear.py") as base:
        config.write_text(OWN_CONFIG.format(base=base, weights=weights, data=squares, work=tmp_path / "work"))
        loaded = Config.fromfile(config)
    with mmseg_backend.isolated(OWN):
        runner = Runner.from_cfg(loaded)
        runner.train()
        assert 0 <= runner.test()["miou"] <= 1
    assert runner.iter == 2
    saved = torch.load(tmp_path / "work" / "iter_2.pth", weights_only=True)
    assert "decode_head.head.classify.weight" in saved["state_dict"]
    assert isinstance(runner.model.backbone, parts.DinoValueBackbone)


def test_backbone_returns_maps_of_blocks(parts: ModuleType, backbone: Backbone, generator: torch.Generator) -> None:
    backbone.eval()
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=generator)
    first, last = parts.DinoValueBackbone(backbone, out_indices=(1, -1))(images.float())
    options = replace(OWN, blocks=3)
    expected = seg.read_map(common.last_blocks(backbone, backbone.normalise(images), options.blocks))
    torch.testing.assert_close(torch.cat([first, last], 1), torch.cat([expected[:, :48], expected[:, 96:]], 1))
    thawed = parts.DinoValueBackbone(backbone, frozen=False)
    assert thawed(images.float())[0].requires_grad
    with pytest.raises(UserError, match="give blocks in ascending order, 0 … 3"):
        parts.DinoValueBackbone(backbone, out_indices=(2, 1))
    with pytest.raises(UserError, match=r"set model\.backbone\.weights"):
        parts.DinoValueBackbone()


def test_labels_are_read_as_ours(parts: ModuleType, squares: Path) -> None:
    dataset = parts.ChallengeADE20K(
        data_root=str(squares),
        data_prefix={"img_path": "images/validation", "seg_map_path": "annotations/validation"},
        img_suffix=".png",
        pipeline=[{"type": "ReadImage"}, {"type": "LoadAnnotations"}],
    )
    source = opened(squares)[1]
    assert list(dataset.metainfo["classes"]) == NAMES
    assert len(dataset) == len(source)
    for index in range(len(source)):
        image, labels = source.load(index)
        assert np.array_equal(dataset[index]["gt_seg_map"], labels)
        assert np.array_equal(dataset[index]["img"][..., ::-1], image.movedim(0, -1))


def test_odd_images_are_read_as_ours(parts: ModuleType, tmp_path: Path) -> None:
    """Alpha is dropped, 16 bits are scaled: LoadImageFromFile lays a grey ground, and clips."""
    grey = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(np.dstack([grey, grey, grey, grey])).save(tmp_path / "alpha.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("alpha", "deep"):
        found = parts.ReadImage()({"img_path": str(tmp_path / f"{name}.png")})
        assert np.array_equal(found["img"], np.dstack([grey, grey, grey]))
        assert found["img_shape"] == found["ori_shape"] == (16, 16)


def test_a_compiled_operator_says_what_is_missing(parts: ModuleType) -> None:
    stand_in = parts._Absent("mmcv._ext")
    with pytest.raises(RuntimeError, match="nms is a compiled operator of mmcv"):
        stand_in.nms(Tensor())


# --- what bad input gets


def test_without_the_extra(backbone: Backbone, squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dino_value.eval.mmseg_parts", None)
    with pytest.raises(UserError, match=r"--backend mmseg needs the extra: pip install 'dino-value\[mmseg\]'"):
        seg.evaluate(backbone, *opened(squares), MMSEG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "other"}, "backend=other: choose own or mmseg"),
        ({"head": "conv"}, "head=conv with --backend mmseg: --backend own has linear and conv; --backend mmseg has"),
        ({"head": "upernet", "backend": "own"}, "head=upernet with --backend own"),
        ({"size": (30, 32)}, "30x32 is not a multiple"),
    ],
)
def test_settings_of_neither(backbone: Backbone, squares: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        seg.evaluate(backbone, *opened(squares), replace(MMSEG, **change))


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip": True}, "leave out --flip and --scales"),
        ({"scales": (0.5, 1.0)}, "leave out --flip and --scales"),
        ({"size": (32, 48)}, "slides square windows; or add --inference whole"),
        ({"head": "upernet", "batch": 1}, "--batch ≥ 2"),
        ({"lr": 1e30}, "lower the learning rate"),
    ],
)
def test_settings_without_counterpart(backbone: Backbone, squares: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        seg.evaluate(backbone, *opened(squares), replace(MMSEG, steps=3, **change))


@pytest.mark.usefixtures("parts")
def test_data_without_counterpart(backbone: Backbone, squares: Path, tmp_path: Path) -> None:
    held = LabelledTensors("seg", torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 32, 32).long(), NAMES)
    with pytest.raises(UserError, match="reads the files of an ADEChallengeData2016 folder"):
        seg.evaluate(backbone, held, held, MMSEG)
    held.class_names = [str(index) for index in range(255)]
    held.num_classes = 255
    with pytest.raises(UserError, match=r"255 classes: .* 254 at most"):
        seg.evaluate(backbone, held, held, MMSEG)
    root = write_squares(tmp_path / "mixed", (32, 32), (4, 2))
    Image.open(root / "images" / "training" / "00.png").save(root / "images" / "training" / "00.jpg")
    (root / "images" / "training" / "00.png").unlink()
    with pytest.raises(UserError, match=r"images of one format, here are \.jpg, \.png"):
        seg.evaluate(backbone, *opened(root), MMSEG)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("damage", "workers", "message"),
    [
        ("size", 0, r"00\.png: 16x32 pixels, but its image has 32x32; they must agree$"),
        ("id", 1, r"^\S*00\.png: label id 5 is outside 0…4$"),
        ("image", 0, r"00\.png: cannot be read as an image \(its content is of no known image format\)"),
    ],
)
def test_unfit_files(backbone: Backbone, tmp_path: Path, damage: str, workers: int, message: str) -> None:
    root = write_squares(tmp_path / "data", (32, 32), (1, 1))
    annotation = root / "annotations" / "training" / "00.png"
    if damage == "image":
        (root / "images" / "training" / "00.png").write_bytes(b"none")
    else:
        shape, fill = ((16, 32), 1) if damage == "size" else ((32, 32), 5)
        Image.fromarray(np.full(shape, fill, dtype=np.uint8)).save(annotation)
    with pytest.raises(UserError, match=message) as raised:
        seg.evaluate(backbone, *opened(root), replace(MMSEG, steps=1, batch=1, workers=workers))
    assert "\n" not in str(raised.value)


def test_linear_head_is_ours(parts: ModuleType, generator: torch.Generator) -> None:
    """The decode head's maps, side by side, through the same module."""
    with torch.random.fork_rng(devices=[]):
        head = parts.LinearBN(
            in_channels=[6, 6], in_index=[0, 1], input_transform="resize_concat", channels=12, num_classes=5
        ).eval()
    assert isinstance(head.head, LinearBNSegHead)
    maps = [torch.rand(2, 6, 4, 4, generator=generator) for _ in range(2)]
    assert torch.equal(head(maps), head.head(torch.cat(maps, 1)))
    assert set(head.state_dict()) == {f"head.{name}" for name in head.head.state_dict()}
