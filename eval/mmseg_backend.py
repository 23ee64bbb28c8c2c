"""Segmentation by mmsegmentation: `dino-value eval seg … --backend mmseg`, with the extra [mmseg].

Its Runner, data pipeline, segmentor and counting, on our backbone: a second opinion on the numbers of seg.py, and the
way to mmsegmentation's heads. docs/mmseg.md says what the two do differently.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from copy import deepcopy
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import torch
from rich.progress import Progress

from dino_value.data.labelled import LabelledSource
from dino_value.errors import UserError
from dino_value.eval import common
from dino_value.heads import IGNORE
from dino_value.models.backbone import Backbone
from dino_value.runs.process import stop_requests

if TYPE_CHECKING:
    from dino_value.eval.seg import SegOptions

Pair = tuple[LabelledSource, LabelledSource]

UNBOUNDED = 1_000_000
"""Longest side of a scaled image, pixels: the short side alone decides."""


def measure(backbone: Backbone, data: Pair, options: SegOptions) -> common.Result:
    """`seg.measure` by mmsegmentation, which calls this: its Runner trains a head, and its metric scores it.

    Args:
        data: what the files of an ADEChallengeData2016 folder hold; mmsegmentation reads the files.
        options: as `seg.measure` has checked them; with `state`, checkpoints and logs stay in its folder `mmseg`.

    Raises:
        UserError: mmsegmentation is not installed; settings or data that it has no counterpart for.
        Interrupted: a signal came, and a checkpoint has been written.
    """
    require_mmseg()
    check_settings(backbone, data[0].num_classes, options)
    seconds: dict[str, float] = {}
    with _folder(options) as folder, isolated(options), common.frozen(backbone, lambda found: found.patches, options):
        runner = build_runner(backbone, data, options, folder)
        with common.timed(seconds, "fit"), plain_errors():
            train(runner, options)
        with common.timed(seconds, "score"), plain_errors():
            result = score(runner, data[1], options)
    result.seconds = seconds
    return result


def require_mmseg() -> None:
    """Raises UserError where mmsegmentation cannot be imported."""
    try:
        import dino_value.eval.mmseg_parts  # noqa: F401
    except (ImportError, AssertionError) as error:  # mmseg asserts the versions of mmcv and mmengine
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--backend mmseg needs the extra: pip install 'dino-value[mmseg]' ({reason})") from None


def check_settings(backbone: Backbone, classes: int, options: SegOptions) -> None:
    """Raises UserError for what only our own backend can do."""
    if classes >= IGNORE:
        raise UserError(f"{classes} classes: mmsegmentation takes the last for pixels to ignore; {IGNORE - 1} at most")
    if options.flip or tuple(options.scales) != (1.0,):
        raise UserError("--backend mmseg scores images once, as they are: leave out --flip and --scales")
    if options.inference == "slide" and options.size[0] != options.size[1]:
        raise UserError(f"size={options.size}: --backend mmseg slides square windows; or add --inference whole")
    if options.head == "upernet" and (options.blocks != 1 or backbone.depth < 4 or options.batch < 2):
        raise UserError("head=upernet reads four blocks of its own choice: it needs 4 or more, --blocks 1, --batch ≥ 2")


@contextmanager
def _folder(options: SegOptions) -> Iterator[Path]:
    """Where the Runner writes; without `state`, what it wrote is thrown away."""
    if options.state is not None:
        yield options.state / "mmseg"
        return
    with TemporaryDirectory() as name:
        yield Path(name)


@contextmanager
def plain_errors() -> Iterator[None]:
    """What a worker raised comes as a text with its traceback, whose last line is the message."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("dino_value.errors.UserError: ")) from None


@contextmanager
def isolated(options: SegOptions) -> Iterator[None]:
    """mmengine seeds, and sets how processes start, for everybody; afterwards both are as they were before."""
    device = common.pick_device(options.device)
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    method = multiprocessing.get_start_method(allow_none=True)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            multiprocessing.set_start_method(method, force=True)


# --- configuration


def load_config(name: str) -> Any:
    """A file of configs/mmseg as mmengine's Config, unchanged."""
    from mmengine.config import Config

    with as_file(files("dino_value.configs") / "mmseg") as folder:
        return Config.fromfile(folder / f"{name}.py")


def configure(backbone: Backbone, data: Pair, options: SegOptions, folder: Path) -> Any:
    """configs/mmseg/<head>.py with the sizes, files and lengths of a run."""
    config = load_config(options.head)
    size, dim, depth = options.size, backbone.embed_dim, backbone.depth
    stride = [options.stride or max(1, round(side * 2 / 3)) for side in size]
    slide = options.inference == "slide"
    config.work_dir, config.origin = str(folder), options.origin
    config.embed_dim, config.crop_size = dim, size
    config.data_preprocessor.size = config.model.data_preprocessor.size = size

    config.model.backbone.bf16 = options.bf16
    config.model.decode_head.num_classes = data[0].num_classes
    config.model.decode_head.out_channels = data[0].num_classes
    config.model.test_cfg = {"mode": "slide", "crop_size": size, "stride": stride} if slide else {"mode": "whole"}
    if options.head == "linear":
        indices = list(range(depth - options.blocks, depth))
        config.model.decode_head.channels = dim * options.blocks
    else:
        indices = [depth * part // 4 - 1 for part in (1, 2, 3, 4)]
        config.model.neck.in_channels, config.model.neck.out_channels = [dim] * 4, dim
    config.model.backbone.out_indices = indices
    config.model.decode_head.in_channels = [dim] * len(indices)
    config.model.decode_head.in_index = list(range(len(indices)))

    loaders = (config.train_dataloader, config.test_dataloader)
    for loader, source in zip(loaders, data, strict=True):
        loader.num_workers, loader.persistent_workers = options.workers, options.workers > 0
        loader.dataset.update(files_of(source, folder), classes=list(source.class_names))
        loader.dataset.pipeline = fit_pipeline(loader.dataset.pipeline, options)
    config.train_dataloader.batch_size = options.batch
    config.data_root = config.train_dataloader.dataset.data_root
    config.classes = list(data[0].class_names)
    config.train_pipeline = config.train_dataloader.dataset.pipeline
    config.test_pipeline = config.test_dataloader.dataset.pipeline
    config.test_evaluator.keep = options.save_images

    steps, warmup = options.steps, max(1, options.steps // 20)
    config.max_iters, config.warmup = steps, warmup
    config.train_cfg.update(max_iters=steps, val_interval=steps + 1)
    config.optim_wrapper.optimizer.update(lr=options.lr, weight_decay=options.weight_decay)
    config.optim_wrapper.clip_grad.max_norm = options.clip
    config.param_scheduler = schedule(steps, warmup)
    config.default_hooks.checkpoint.interval = max(1, steps // 10)
    if options.state is None:
        config.default_hooks.checkpoint = None
    return config


def schedule(steps: int, warmup: int) -> list[dict[str, Any]]:
    """The learning rate of `common.fit_head`: a linear warm-up, then a cosine to 0."""
    parts = []
    if warmup > 1:  # of one step, it is the full rate already
        parts.append({"type": "LinearLR", "start_factor": 1 / warmup, "by_epoch": False, "begin": 0, "end": warmup})
    if steps > warmup:
        cosine = {"type": "CosineAnnealingLR", "T_max": steps - warmup, "eta_min": 0.0, "by_epoch": False}
        parts.append({**cosine, "begin": warmup, "end": steps})
    return parts


def fit_pipeline(pipeline: Sequence[Any], options: SegOptions) -> list[Any]:
    """A pipeline at the sizes of the options: short side and crop to slide, stretched for whole images."""
    height, width = options.size
    if options.inference == "whole":
        size: dict[str, Any] = {"scale": (width, height), "keep_ratio": False, "backend": "pillow"}
        random_size = dict(type="Resize", **size)
    else:
        size = {"scale": (UNBOUNDED, min(options.size)), "keep_ratio": True, "backend": "pillow"}
        random_size = dict(type="RandomResize", ratio_range=tuple(options.random_scale), **size)
    changed = {
        "Resize": dict(type="Resize", **size),
        "RandomResize": random_size,
        "RandomCrop": {"type": "RandomCrop", "crop_size": options.size},
        "RandomFlip": {"type": "RandomFlip", "prob": 0.5 if options.augment else 0.0},
    }
    return [changed.get(step["type"], step) for step in pipeline]


def files_of(source: LabelledSource, folder: Path) -> dict[str, Any]:
    """Where mmsegmentation finds the items of `source`, all of them and no others.

    Raises:
        UserError: they are not files in the layout of ADEChallengeData2016, or of several image formats.
    """
    paths = [Path(source.name(index)).absolute() for index in range(len(source))]
    found = next((path for path in paths[0].parents if path.parent.name == "images"), None)
    if found is None or not paths[0].is_file():
        raise UserError("--backend mmseg reads the files of an ADEChallengeData2016 folder, which this data is not")
    suffixes = sorted({path.suffix for path in paths})
    if len(suffixes) > 1:
        raise UserError(f"{found}: --backend mmseg reads images of one format, here are {', '.join(suffixes)}")
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / f"{found.name}.txt"
    listing.write_text("".join(f"{path.relative_to(found).with_suffix('')}\n" for path in paths), encoding="utf-8")
    return {
        "data_root": str(found.parent.parent),
        "data_prefix": {"img_path": f"images/{found.name}", "seg_map_path": f"annotations/{found.name}"},
        "ann_file": str(listing.absolute()),
        "img_suffix": suffixes[0],
    }


# --- the Runner


def build_runner(backbone: Backbone, data: Pair, options: SegOptions, folder: Path) -> Any:
    """mmengine's Runner, on the options' device, silent on the terminal; its log lies in `folder`.

    Raises:
        UserError: data of another layout; with `resume`, a folder of other settings.
    """
    from mmengine.runner import Runner

    config = configure(backbone, data, options, folder)
    # What may differ from one part of a training to the next.
    settings_of = configure(backbone, data, replace(options, workers=0, save_images=0), folder).to_dict()
    key = repr((settings_of, options.labels, options.seed))
    settings, checkpoint = folder / "settings.txt", folder / "last_checkpoint"
    resume = options.resume and checkpoint.is_file()
    if resume and not (settings.is_file() and settings.read_text(encoding="utf-8") == key):
        raise UserError(
            f"{folder}: was stopped under other settings, data or weights; "
            "give those again, or leave --resume out to start anew"
        )
    settings.write_text(key, encoding="utf-8")
    model = deepcopy(config.model)  # the configuration itself is written to a file: no place for a module
    model.backbone.weights = backbone
    # The Runner's log goes to where stdout is when it is made, and to a file.
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "``build_loss`` would be deprecated")  # mmsegmentation calls its own
        runner = Runner(
            model=model,
            work_dir=str(folder),
            train_dataloader=config.train_dataloader,
            train_cfg=config.train_cfg,
            optim_wrapper=config.optim_wrapper,
            param_scheduler=config.param_scheduler or None,
            test_dataloader=config.test_dataloader,
            test_cfg=config.test_cfg,
            test_evaluator=config.test_evaluator,
            default_hooks=config.default_hooks,
            custom_hooks=config.custom_hooks,
            log_processor=config.log_processor,
            default_scope="mmseg",
            randomness={"seed": options.seed},
            resume=resume,
            experiment_name=f"dino_value_{uuid4().hex}",  # mmengine keeps loggers and counters by this name
            cfg=config,
        )
    for handler in list(runner.logger.handlers):
        if type(handler) is logging.StreamHandler:
            runner.logger.removeHandler(handler)
    runner.model.to(common.pick_device(options.device))  # mmengine takes CUDA where there is one
    return runner


def train(runner: Any, options: SegOptions) -> None:
    """Train the head, from the checkpoint in the Runner's folder if it resumes.

    Raises:
        UserError: the head did not stay finite.
        Interrupted: a signal came; with `state`, a checkpoint has been written.
    """
    from dino_value.eval.mmseg_parts import Watch

    bar = Progress(transient=True, disable=not options.progress)
    # Without a folder nothing can be kept, and signals do what they always do.
    signals: AbstractContextManager[Any] = stop_requests() if options.state else nullcontext(lambda: False)
    with bar, signals as stopping:
        task = bar.add_task("head", total=options.steps)
        runner.register_hook(Watch(lambda step: bar.update(task, completed=step), stopping), priority="LOWEST")
        runner.train()
    head = [*runner.model.decode_head.parameters(), *runner.model.decode_head.buffers()]
    if not all(bool(value.isfinite().all()) for value in head):
        raise UserError(f"the head's weights became infinite or NaN: lower the learning rate ({options.lr:g})")


def score(runner: Any, source: LabelledSource, options: SegOptions) -> common.Result:
    """The metrics of the Runner's model on its test set, `source`."""
    from dino_value.eval.seg import statistic

    metrics = runner.test()
    (counts,) = runner.test_loop.evaluator.metrics
    return common.Result(
        metrics,
        counts.rows,
        statistic,
        pictures=[_picture(source, index, kept) for index, kept in enumerate(counts.kept)],
    )


def _picture(source: LabelledSource, index: int, prediction: torch.Tensor) -> tuple[str, Any]:
    from dino_value.eval import pictures

    image, truth = source.load(index)
    maps = [pictures.colour_labels(part, source.num_classes) for part in (truth, prediction)]
    size = (truth.shape[0], truth.shape[1])
    return f"{index:04d}_image_truth_prediction", pictures.beside([pictures.photograph(image, size), *maps])
