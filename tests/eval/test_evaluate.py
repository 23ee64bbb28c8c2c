"""Each evaluation end to end, on images whose labels the features of any backbone carry."""

import errno
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dino_value.data.labelled import LabelledTensors
from dino_value.errors import Interrupted, UserError
from dino_value.eval import command, common, depth, fitting, linear, seg
from dino_value.models.backbone import Backbone, create_backbone, save_backbone
from dino_value.models.weight_files import with_checksum

SIZE = (32, 32)
COLOURS = torch.tensor([[230, 30, 30], [30, 230, 30], [30, 30, 230], [230, 230, 30]], dtype=torch.uint8)
NAMES = ["red", "green", "blue", "yellow"]
SEG = seg.SegOptions(size=SIZE, steps=120, batch=8, lr=1e-2)
DEPTH = depth.DepthOptions(size=SIZE, steps=120, batch=8, lr=1e-2)
LINEAR = linear.LinearOptions(size=SIZE, steps=60, batch=16, lr=1e-2)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_backbone(
            "vit_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
        )


def coloured(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of 4 × 4 squares of 8 pixels, and the colour of each pixel: uint8 [n 3 32 32], int64 [n 32 32]."""
    labels = torch.randint(0, 4, (count, 4, 4), generator=torch.Generator().manual_seed(seed))
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return COLOURS[labels].permute(0, 3, 1, 2).contiguous(), labels


def seg_source(count: int = 32, seed: int = 0) -> LabelledTensors:
    images, labels = coloured(count, seed)
    labels[:, :2] = 255
    return LabelledTensors("seg", images, labels, NAMES)


def depth_source(count: int = 32, seed: int = 0) -> LabelledTensors:
    images, labels = coloured(count, seed)
    metres = (labels + 1).float()
    metres[:, :, :2] = 0
    return LabelledTensors("depth", images, metres)


def class_source(count: int = 32, seed: int = 0) -> LabelledTensors:
    labels = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(seed))
    images = COLOURS[labels][:, :, None, None].expand(-1, -1, 32, 32).contiguous()
    return LabelledTensors("classes", images, labels, NAMES)


def test_segmentation_learns_what_the_features_carry(backbone: Backbone) -> None:
    metrics = seg.evaluate(backbone, seg_source(), seg_source(12, 1), SEG)
    assert metrics["miou"] > 0.7  # the squares' borders are lost to the upsampling
    assert metrics["aacc"] > 0.85
    assert metrics["loss"] < 0.6
    assert {name for name in metrics if "/" in name} == {f"iou/{name}" for name in NAMES}


def test_conv_head(backbone: Backbone) -> None:
    metrics = seg.evaluate(backbone, seg_source(), seg_source(12, 1), replace(SEG, head="conv", steps=80))
    assert metrics["miou"] > 0.7


def test_depth_learns_what_the_features_carry(backbone: Backbone) -> None:
    metrics = depth.evaluate(backbone, depth_source(), depth_source(12, 1), DEPTH)
    assert metrics["rmse"] < 0.7  # the truth spreads by 1.1 m
    assert metrics["delta1"] > 0.6
    assert set(metrics) == {*depth.METRICS, "loss"}


@pytest.mark.parametrize("pool", linear.POOLS)
def test_classification_learns_what_the_features_carry(backbone: Backbone, pool: str) -> None:
    metrics = linear.evaluate(backbone, class_source(), class_source(12, 1), replace(LINEAR, pool=pool))
    assert metrics["top1"] == 1
    assert metrics["loss"] < 0.5


def test_depth_range_and_crop(backbone: Backbone) -> None:
    options = replace(DEPTH, steps=2)
    near = depth.evaluate(backbone, depth_source(), depth_source(4, 1), replace(options, max_depth=1.5))
    assert near["rmse"] < 0.6  # truth of 1 m only, predictions clamped to 1.5 m
    whole = depth.evaluate(backbone, depth_source(), depth_source(4, 1), replace(options, eigen_crop=False))
    assert whole["rmse"] != depth.evaluate(backbone, depth_source(), depth_source(4, 1), options)["rmse"]


def test_results_are_a_function_of_the_seed(backbone: Backbone) -> None:
    options = replace(SEG, steps=4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = seg.evaluate(backbone, seg_source(), seg_source(4, 1), options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert seg.evaluate(backbone, seg_source(), seg_source(4, 1), options) == first
    assert seg.evaluate(backbone, seg_source(), seg_source(4, 1), replace(options, seed=1)) != first


def test_cached_features_change_nothing(backbone: Backbone) -> None:
    options = replace(SEG, steps=8)
    cached = seg.evaluate(backbone, seg_source(16), seg_source(4, 1), options)
    computed = seg.evaluate(backbone, seg_source(16), seg_source(4, 1), replace(options, cache_gb=0))
    assert computed == pytest.approx(cached, abs=1e-5)


def test_workers_change_nothing(backbone: Backbone) -> None:
    options = replace(SEG, steps=3, augment=True)
    here = seg.evaluate(backbone, seg_source(16), seg_source(4, 1), options)
    assert seg.evaluate(backbone, seg_source(16), seg_source(4, 1), replace(options, workers=2)) == here
    plain = seg.evaluate(backbone, seg_source(16), seg_source(4, 1), replace(options, augment=False))
    assert plain != here


def test_backbone_is_returned_as_it_was(backbone: Backbone) -> None:
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.train()
    seg.evaluate(backbone, seg_source(8), seg_source(4, 1), replace(SEG, steps=2))
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_label_maps_keep_their_own_resolution(backbone: Backbone) -> None:
    """A set of two sizes scores as its two halves together."""

    class Mixed(LabelledTensors):
        def load(self, index: int) -> tuple[Tensor, Tensor]:
            image, labels = super().load(index)
            return (image, labels) if index % 3 else (image[:, :16], labels[:16])

    source = seg_source(9, 1)
    mixed = Mixed("seg", source.images, source.targets, NAMES)
    pixels = []

    def count(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
        pixels.append(tuple(labels.shape))
        return confusion(prediction, labels, classes)

    confusion = seg.confusion_matrices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seg, "confusion_matrices", count)
        seg.evaluate(backbone, seg_source(8), mixed, replace(SEG, steps=2, inference="whole"))
    assert pixels == [(1, 16, 32), (2, 32, 32)] * 3


def test_validation_is_upsampled_a_few_images_at_a_time(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than a batch at full resolution, and the same scores however large that is."""
    seen: list[int] = []
    loss = seg.segmentation_loss

    def count(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(len(logits))
        return loss(logits, labels)

    monkeypatch.setattr(seg, "segmentation_loss", count)
    monkeypatch.setattr(fitting, "fit_head", lambda head, *_: head.eval())
    few = seg.evaluate(backbone, seg_source(8), seg_source(10, 1), replace(SEG, batch=4))
    assert seen == [4, 4, 2]
    assert seg.evaluate(backbone, seg_source(8), seg_source(10, 1), replace(SEG, batch=10)) == pytest.approx(few)
    assert seen[3:] == [10]


def test_every_item_is_drawn_once_an_epoch() -> None:
    batches = list(common.shuffled_keys(count=10, batch=4, steps=5, seed=3))
    assert [len(batch) for batch in batches] == [4] * 5
    drawn = [key for batch in batches for key in batch]
    assert sorted(position for position, _ in drawn) == sorted([*range(10)] * 2)
    assert len(set(drawn)) == 20  # each epoch has its own seed, so its own flips


def test_head_that_diverges_is_reported() -> None:
    options = common.HeadOptions(size=SIZE, head="linear", steps=2)
    batches = [(torch.full((4, 3), float("nan")), torch.zeros(4, dtype=torch.int64))] * 2
    with pytest.raises(UserError, match="lower the learning rate"):
        common.fit_head(nn.Linear(3, 2), nn.functional.cross_entropy, batches, options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (30, 32)}, "30x32 is not a multiple .* patch size 8; the nearest that is: 32x32"),
        ({"steps": 0}, "steps=0 must be positive"),
        ({"batch": -1}, "batch=-1"),
        ({"lr": 0.0}, "lr=0"),
        ({"lr": math.nan}, "lr=nan must be positive"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"scales": (math.nan,)}, "must be positive, one or more"),
        ({"workers": -1}, "workers=-1 must be at least 0"),
        ({"device": "warp"}, "device 'warp' cannot be used here"),
    ],
)
def test_bad_settings(backbone: Backbone, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        seg.evaluate(backbone, seg_source(8), seg_source(4), replace(SEG, **change))


def test_unfit_sources(backbone: Backbone) -> None:
    with pytest.raises(UserError, match="needs labels of kind seg, the data has depth"):
        seg.evaluate(backbone, depth_source(4), depth_source(4), SEG)
    other = seg_source(4)
    other.class_names = NAMES[::-1]
    with pytest.raises(UserError, match="same classes"):
        seg.evaluate(backbone, seg_source(4), other, SEG)
    with pytest.raises(UserError, match="empty"):
        seg.evaluate(backbone, seg_source(4), seg_source(0), SEG)
    dark = depth_source(4)
    dark.targets = torch.zeros_like(dark.targets)
    with pytest.raises(UserError, match="no valid depth in the training split"):
        depth.evaluate(backbone, dark, depth_source(4), DEPTH)
    with pytest.raises(UserError, match="batch=1"):
        linear.evaluate(backbone, class_source(4), class_source(4), replace(LINEAR, batch=1))


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_backbone(path, backbone)
    return str(path)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path "scenes" gives the small sets of this file."""
    sources = {"ade20k": seg_source, "nyuv2": depth_source, "imagefolder": class_source}
    monkeypatch.setattr("dino_value.data.scenes.labelled", lambda layout, split: sources[layout](8))


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize(
    ("main", "keys", "flags"),
    [
        (seg.main, {"miou", "macc", "aacc", "loss", "iou"}, ["--head", "conv"]),
        (depth.main, {*depth.METRICS, "loss"}, ["--no-eigen-crop"]),
        (linear.main, {"top1", "loss"}, ["--pool", "mean"]),
    ],
)
def test_command_writes_results(
    main: Any, keys: set[str], flags: list[str], weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    arguments = [weights, "--data", "scenes", "--out", str(out), "--steps", "3", "--batch", "4", "--device", "cpu"]
    assert main([*arguments, "--size", "32", *flags]) == 0
    results = json.loads((out / "results.json").read_text())
    about = {"evaluation", "backbone", "data", "settings", "seconds", "device", "matmul", "bf16", "torch"}
    about |= {"interval", "interval_of", "phases", "images_per_second", "environment"}
    assert set(results) == keys | about
    assert results["settings"]["steps"] == 3
    assert results["settings"]["size"] == [32, 32]
    assert results["data"] == {"path": "scenes", "training": 8, "validation": 8}
    assert [path.name for path in out.iterdir()] == ["results.json"]
    assert "loss" in capsys.readouterr().out


def test_command_reads_folders(weights: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name, colour in zip(NAMES, COLOURS.tolist(), strict=True):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (40, 32), tuple(colour)).save(tmp_path / split / name / f"{index}.png")
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--steps", "40", "--lr", "1e-2"]
    assert linear.main([weights, *arguments, "--batch", "8", "--size", "32x32", "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["top1"] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read(weights: str, tmp_path: Path, workers: int) -> None:
    for split in ("train", "val"):
        for name in NAMES[:2]:
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (32, 32)).save(tmp_path / split / name / f"{index}.png")
    (tmp_path / "train" / "red" / "3.png").write_bytes(b"")
    arguments = [weights, "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--size", "32", "--device", "cpu"]
    with pytest.raises(UserError, match=r"3\.png") as raised:
        linear.main([*arguments, "--steps", "4", "--batch", "4", "--workers", str(workers)])
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("embedded")
def test_min_match_reaches_the_loader(weights: str, tmp_path: Path) -> None:
    tensors = load_file(weights)
    del tensors["blocks.0.norm1.weight"], tensors["blocks.0.norm1.bias"]
    part = tmp_path / "part.safetensors"
    with safe_open(weights, framework="pt") as file:
        save_file(tensors, part, metadata=with_checksum(tensors, file.metadata()))
    arguments = [str(part), "--data", "scenes", "--out", str(tmp_path / "out"), "--size", "32", "--device", "cpu"]
    with pytest.raises(UserError, match="missing 2"):
        seg.main([*arguments, "--steps", "1", "--min-match", "1"])
    assert seg.main([*arguments, "--steps", "1", "--min-match", "0.5"]) == 0


@pytest.mark.usefixtures("embedded")
def test_output_folder_that_cannot_be_made(weights: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the output folder"):
        seg.main([weights, "--data", "scenes", "--out", str(tmp_path / "file" / "out"), "--size", "32"])


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    common.write_results(target, {"miou": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        common.write_results(target, {"miou": float("nan")})
    assert json.loads(target.read_text()) == {"miou": 0.5}
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(UserError, match="cannot be written"):
        common.write_results(tmp_path / "none" / "results.json", {})


@pytest.mark.parametrize(("text", "size"), [("512", (512, 512)), ("480x640", (480, 640))])
def test_size(text: str, size: tuple[int, int]) -> None:
    assert command.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "1x2x3", "big", "64x"])
def test_bad_size(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a size.*; see dino-value eval seg --help"):
        seg.main(["w", "--data", "d", "--out", "o", "--size", text])


@pytest.mark.parametrize("text", ["-0.1", "1.5", "nan", "most"])
def test_bad_min_match(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a number in \[0, 1\]"):
        seg.main(["w", "--data", "d", "--out", "o", f"--min-match={text}"])


@pytest.mark.parametrize(
    ("flags", "said"), [([], "none.safetensors"), (["--head", "none"], "argument --head: invalid choice: 'none'")]
)
def test_file_runs_as_a_script(tmp_path: Path, flags: list[str], said: str) -> None:
    script = Path(__file__).parents[2] / "eval" / "seg.py"
    arguments = [str(tmp_path / "none.safetensors"), "--data", "scenes", "--out", str(tmp_path / "out"), *flags]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("two\nlines"), 2, "error: two lines"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a"), 2, "error: out/a: No space left on device; free"),
        (Interrupted("saved"), 75, "stopped: saved"),
        (KeyboardInterrupt(), 75, "stopped at once"),
    ],
)
def test_a_script_ends_as_the_command_does(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Sequence[str]) -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        common.script(main)
    assert ended.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
