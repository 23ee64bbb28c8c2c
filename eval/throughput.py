"""Throughput of training and of evaluation beside others' ways: `python eval/throughput.py [--json FILE]`.

Training: images a second and peak memory of a whole DINO step, ours beside a plain loop of the paper and lightly's
(`eval/benchmarks/loops.py`), in one run. Rows are processes that take turns at the same views, and ratios are taken
within a turn, so that whatever else the machine does falls on all of them. A step is the teacher's and the student's
pass, the backward pass, the optimizer and the average; making the views is timed apart. Denormals are flushed for all;
the peers as they come, unflushed, stand beside.

Evaluation: sliding windows, linear evaluation and a large image (`eval/benchmarks/inference.py`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision import transforms as T

from dino_value.arguments import Parser
from dino_value.config import Config, ViewsConfig, load_config
from dino_value.data.scenes import scenes
from dino_value.data.views import MemoryViews, augment
from dino_value.errors import EXIT_DONE, UserError
from dino_value.eval import common
from dino_value.eval.benchmarks import inference, loops
from dino_value.eval.benchmarks.loops import Setting
from dino_value.eval.benchmarks.timing import (
    CLASSES,
    CLOCKS,
    Case,
    check_clock,
    peak_memory,
    processor,
    spread,
    take_turns,
    timed,
    within,
    write_data,
)
from dino_value.models.backbone import Backbone, create_backbone
from dino_value.models.linear import choose_matmul, linear, use_onednn
from dino_value.runs.process import bfloat16, choose_device, use_bfloat16
from dino_value.training.steps import Views

# Constant, so that the loops differ in nothing but the code.
SETTINGS = (
    "out=unused",
    "method=baseline",
    "data.ade20k=null",
    "data.nyuv2=null",
    "data.in_memory=true",
    "steps=1000000000",
    "optim.lr=1e-4",
    "optim.lr_end=1e-4",
    "optim.warmup=0",
    "optim.clip=inf",
    "objective.teacher_momentum=0.996",
    "objective.student_temp=0.1",
    "objective.teacher_temp=0.04",
    "objective.teacher_temp_start=0.04",
    "objective.freeze_last_layer=0",
)
FAST = ("matmul=auto", "backbone.attention=auto")
BEST = (*FAST, "backbone.compile=true")
TINY = (
    "backbone.kwargs={patch_size: 8, embed_dim: 24, depth: 3, num_heads: 3}",
    "views.local_count=2",
    "objective.out_dim=16",
    "objective.hidden_dim=16",
    "objective.bottleneck_dim=8",
)


@dataclass(frozen=True)
class Target:
    """How many times as fast one row should be as another, where there is an aim."""

    name: str
    reference: str
    least: float | None = None


# --- training


def configure(options: argparse.Namespace, *more: str) -> Config:
    """The configuration that all rows share, then the command line's `key=value`, then `more`.

    Raises:
        UserError: one that is refused.
    """
    sizes = [f"views.global_size={options.size}", f"views.local_size={max(16, round(options.size * 6 / 224) * 16)}"]
    given = [f"backbone.name={options.model}", f"device={options.device}", f"optim.batch_size={options.batch}"]
    given += [f"data.unlabeled={options.data}", *(TINY if options.tiny else ())]
    return load_config("paper/ade20k_vitb", [*SETTINGS, *sizes, *given, *options.overrides, *more])


def choose_settings(options: argparse.Namespace) -> tuple[list[Setting], list[Target]]:
    """The rows and the ratios between them."""
    config = configure(options, f"precision={options.precision}")
    low = use_bfloat16(config, choose_device(config.device))
    fast, best = tuple(options.fast or FAST), tuple(options.best or BEST)

    def row(name: str, loop: str, overrides: Sequence[str] = (), bf16: bool = False, flush: bool = True) -> Setting:
        precision = f"precision={'bf16' if bf16 else 'fp32'}"
        return Setting(name, loop, configure(options, precision, *overrides), bf16, flush)

    rows = [row("ours", "ours"), row("ours, fast", "ours", fast), row("plain", "plain")]
    rows += [row("ours, best", "ours", best, low)]
    rows += [row("plain, bf16", "plain", bf16=True)] if low else []
    targets = [Target("ours", "plain"), Target("ours, fast", "plain", 1.2), Target("ours, best", "plain", 2.0)]
    targets += [Target("ours, best", "plain, bf16")] if low else []
    if "lightly" not in options.without:
        rows.append(row("lightly", "lightly"))
        targets += [Target("ours, fast", "lightly"), Target("ours, best", "lightly", 1.8)]
    if "unflushed" not in options.without:
        peers = list(dict.fromkeys(row.loop for row in rows if row.loop != "ours"))
        rows += [row(f"{name}, unflushed", name, flush=False) for name in peers]
        targets += [Target("ours, best", f"{name}, unflushed") for name in peers]
    return rows, targets


def view_batches(options: argparse.Namespace) -> Iterator[Views]:
    """One batch of normalised views more than `options.repeats`, of the embedded scenes."""
    config = configure(options)
    backbone = create_backbone(config.backbone.name, config.views.global_size, config.backbone.kwargs)
    source = MemoryViews(scenes("unlabeled", options.size, 4 * options.batch).images, config.views)
    for number in range(options.repeats + 1):
        places = [(number * options.batch + place) % len(source) for place in range(options.batch)]
        groups = augment(*source.batch(places, number), source.settings, 0, number)
        yield Views(*(backbone.normalise(group) for group in groups))


def data_cases(options: argparse.Namespace) -> list[Case]:
    """One batch of views, from images in memory, by each way of making them."""
    settings = configure(options).views
    images = scenes("unlabeled", options.size, options.batch).images
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]

    def ours(backend: str) -> Callable[[], object]:
        source = MemoryViews(images, dataclasses.replace(settings, augment=backend))
        return lambda: augment(*source.batch(range(len(images)), 0), source.settings, 0, 0)

    def each(pipelines: Sequence[Callable[[Image.Image], object]]) -> Callable[[], object]:
        return lambda: [[pipeline(picture) for pipeline in pipelines] for picture in pictures]

    found = {name: ours(name.split()[1]) for name in ("ours, kornia", "ours, torchvision")}
    found["plain, torchvision on PIL"] = each(published_pipelines(settings))
    if "lightly" not in options.without:
        from lightly.transforms.dino_transform import DINOTransform

        sizes = settings.global_size, settings.global_scale, settings.local_size, settings.local_scale
        found["lightly, DINOTransform"] = each([DINOTransform(*sizes, settings.local_count)])
    return [Case(name, lambda work=work: work) for name, work in found.items()]  # type: ignore[misc]


def published_pipelines(settings: ViewsConfig) -> list[Callable[[Image.Image], object]]:
    """One a view: the paper's augmentation of PIL images, by torchvision."""
    jitter = T.ColorJitter(settings.brightness, settings.contrast, settings.saturation, settings.hue)
    normal = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def pipeline(size: int, scale: tuple[float, float], blur: float, solar: float) -> T.Compose:
        cut = T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC)
        colours = [T.RandomApply([jitter], settings.jitter), T.RandomGrayscale(settings.grayscale)]
        blurred = T.RandomApply([T.GaussianBlur(13, settings.blur_sigma)], blur)
        last = [blurred, T.RandomSolarize(128, solar), T.ToTensor(), normal]
        return T.Compose([cut, T.RandomHorizontalFlip(), *colours, *last])

    large, small = (settings.global_size, settings.global_scale), (settings.local_size, settings.local_scale)
    first, second, local = settings.blur
    locals_ = [pipeline(*small, local, 0)] * settings.local_count
    return [pipeline(*large, first, 0), pipeline(*large, second, settings.solarize), *locals_]


def matmul_rate(dtype: torch.dtype, clock: str = "wall", side: int = 1536) -> float:
    """FLOP/s of a square matrix product, the best of five and of both libraries: what the processor does when nothing
    is in its way."""
    a = torch.ones(side, side, dtype=dtype)
    kinds = [torch.mm] + ([linear] if choose_matmul("auto", a.device) == "onednn" else [])
    return 2 * side**3 / min(timed(lambda: kind(a, a), a.device, clock) for kind in kinds for _ in range(5))  # noqa: B023


def measure_training(options: argparse.Namespace) -> dict[str, Any]:
    """The rows, their ratios, and the ways to make views."""
    settings, targets = choose_settings(options)
    if options.rows:
        names = [row.name for row in settings]
        if unknown := [name for name in options.rows if name not in names]:
            raise UserError(f"--rows: no row {unknown[0]!r}; choose among {', '.join(map(repr, names))}")
        settings = [row for row in settings if row.name in options.rows]
        targets = [one for one in targets if {one.name, one.reference} <= set(options.rows)]
    rows = loops.measure(settings, view_batches(options), options.threads, options.clock)
    if choose_device(options.device).type == "cpu" and "plain" in rows:
        for row in settings:
            rate = matmul_rate(torch.bfloat16 if row.bf16 else torch.float32, options.clock)
            rows[row.name]["flop_share"] = rows["plain"]["flops"] / rows[row.name]["median"] / rate
    torch.set_num_threads(1)
    times = take_turns(data_cases(options), min(5, options.repeats), torch.device("cpu"), options.clock)
    torch.set_num_threads(options.threads)
    data = {name: {"seconds": seconds, **spread(seconds)} for name, seconds in times.items()}
    return {"steps": rows, "ratios": compare(rows, targets), "data": data}


# --- evaluation


def measure_evaluation(options: argparse.Namespace) -> dict[str, Any]:
    """Rows with `seconds`, `rate` and its unit, `peak_bytes`; ratios between them; the large image's memory."""
    device = choose_device(options.device)
    config = configure(options)
    backbone = create_backbone(config.backbone.name, options.window, config.backbone.kwargs)
    count, window, large = options.images, options.window, tuple(options.large)
    source = inference.segmentation_source(window, 2 * window, max(2, count // 8))
    low = bfloat16(options.precision, device)
    plain = inference.Segmentation(backbone, source, window, options.device)
    # The others' backbone keeps torch's products; a copy has ours.
    ours = inference.Segmentation(quick_copy(backbone, device), source, window, options.device, bf16=low)
    single = "segmentation, one window at a time"
    cases = [
        inference.case("segmentation, ours, fast", ours.ours),
        inference.case("segmentation, ours", plain.ours),
        inference.case(single, plain.one_at_a_time),
    ]
    targets = [Target("segmentation, ours, fast", single, 2.0), Target("segmentation, ours", single)]
    if low:
        lowered = inference.Segmentation(backbone, source, window, options.device, bf16=True)
        cases.append(inference.case(f"{single}, bf16", lowered.one_at_a_time))
        targets.append(Target("segmentation, ours, fast", f"{single}, bf16", 2.0))
    size = configure(options).views.global_size
    small = create_backbone(config.backbone.name, size, config.backbone.kwargs)
    fit = inference.Linear(small, size, count, options.device)
    fits = [
        inference.case("linear, features kept", lambda: fit.fit(True)),
        inference.case("linear, features anew each epoch", lambda: fit.fit(False)),
    ]
    repeats = options.repeats
    clock = options.clock
    seconds = take_turns(cases, min(5, repeats), device, clock) | take_turns(fits, min(2, repeats), device, clock)
    rows: dict[str, dict[str, Any]] = {}
    for case in (*cases, *fits):
        done = plain.windows if case in cases else inference.EPOCHS * count
        found = spread(seconds[case.name])
        rows[case.name] = {"seconds": seconds[case.name], **found, "rate": done / found["median"]}
        if case in cases:
            rows[case.name]["peak_bytes"] = peak_memory(case, device).tensors
    targets.append(Target("linear, features kept", "linear, features anew each epoch", 5.0))
    # In windows of its own pixels, not scaled to the protocol's size.
    picture, scale = inference.segmentation_source(large[1], large[0], 1), min(large) / window
    image = inference.Segmentation(ours.extractor.backbone, picture, window, options.device, scale, low)
    memory = peak_memory(inference.case("large image", image.ours), device)
    return {
        "rows": rows,
        "ratios": compare(rows, targets),
        "large_image": {
            "size": large,
            "windows": image.windows,
            "peak_bytes": memory.tensors,
            "peak_resident_bytes": memory.resident,
            "whole_logits_bytes": 4 * CLASSES * large[0] * large[1],
        },
    }


def quick_copy(backbone: Backbone, device: torch.device) -> Backbone:
    """The backbone with the products that `matmul=auto` chooses."""
    found = copy.deepcopy(backbone)
    if choose_matmul("auto", device) == "onednn":
        use_onednn(found)
    return found


# --- the report


def compare(rows: Mapping[str, Mapping[str, Any]], targets: Sequence[Target]) -> list[dict[str, Any]]:
    """How many times as fast, within rounds, and the share of the memory."""
    found = []
    for target in targets:
        mine, other = rows[target.name], rows[target.reference]
        faster = spread([b / a for a, b in zip(mine["seconds"], other["seconds"], strict=True)])
        memory = mine["peak_bytes"] / max(1, other["peak_bytes"]) if "peak_bytes" in mine else None
        reached = None if target.least is None else faster["median"] >= target.least
        found.append({**dataclasses.asdict(target), "faster": faster, "memory": memory, "reached": reached})
    return found


def ratio_table(ratios: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("row", "against", "times as fast", "aim", "memory")
    for row in ratios:
        aim = "" if row["least"] is None else f"≥ {row['least']:g}: {'yes' if row['reached'] else 'no'}"
        memory = "–" if row["memory"] is None else f"{row['memory']:.2f}"
        table.add_row(row["name"], row["reference"], within(row["faster"], 2), aim, memory)
    return table


def report_training(result: Mapping[str, Any], batch: int, console: Console) -> None:
    rows, data = result["steps"], result["data"]
    table = Table("step", "seconds: median (quartiles)", "images/s", "peak memory, MiB", "share of a matmul's FLOP/s")
    for name, row in rows.items():
        share = f"{row['flop_share']:.0%}" if "flop_share" in row else "–"
        peak = f"{row['peak_bytes'] / 2**20:.0f}"
        table.add_row(name, within(row, 3), f"{batch / row['median']:.2f}", peak, share)
    console.print(table)
    console.print(ratio_table(result["ratios"]))
    groups = list(next(iter(rows.values()))["shares"])
    table = Table("where the time of a step goes", *groups)
    for name, row in rows.items():
        table.add_row(name, *(f"{row['shares'][group]:.0%}" for group in groups))
    console.print(table)
    table = Table("views of a batch, one thread", "seconds: median (quartiles)", "images/s")
    for name, row in data.items():
        table.add_row(name, within(row, 3), f"{batch / row['median']:.1f}")
    console.print(table)
    table = Table("loss of step", *rows)
    steps = len(next(iter(rows.values()))["losses"])
    for step in sorted({*range(0, steps, max(1, steps // 10)), steps - 1}):
        table.add_row(str(step), *(f"{row['losses'][step]:.4f}" for row in rows.values()))
    console.print(table)


def report_evaluation(result: Mapping[str, Any], console: Console) -> None:
    table = Table("evaluation", "seconds: median (quartiles)", "windows or images a second", "peak tensors, MiB")
    for name, row in result["rows"].items():
        peak = f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "–"
        table.add_row(name, within(row, 2), f"{row['rate']:.2f}", peak)
    console.print(table)
    console.print(ratio_table(result["ratios"]))
    large = result["large_image"]
    resident = "" if large["peak_resident_bytes"] is None else f", {large['peak_resident_bytes'] / 2**20:.0f} resident"
    console.print(
        f"an image of {large['size'][0]} × {large['size'][1]} ({large['windows']} windows): peak of tensors "
        f"{large['peak_bytes'] / 2**20:.0f} MiB{resident}; its logits alone would be "
        f"{large['whole_logits_bytes'] / 2**20:.0f} MiB"
    )


def build_parser() -> argparse.ArgumentParser:
    description = "Throughput of training and evaluation, beside others' ways."
    parser = Parser("throughput.py", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the training configuration, for all rows")
    parser.add_argument("--tables", nargs="+", default=["training", "evaluation"], choices=("training", "evaluation"))
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm ViT")
    parser.add_argument("--size", default=224, type=int, help="of global views, pixels; local ones have 96/224 of it")
    parser.add_argument("--batch", default=8, type=int, help="images of a step")
    parser.add_argument("--repeats", default=10, type=int, help="rounds that count; at most 5 of evaluation")
    parser.add_argument("--threads", default=len(os.sched_getaffinity(0)), type=int, help="of the CPU")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: the processor's time, of one thread")
    parser.add_argument("--device", default="auto", help="cpu, cuda, …")
    parser.add_argument("--precision", default="auto", help="of our best and fast rows: auto, bf16 or fp32")
    parser.add_argument("--fast", action="append", metavar="key=value", help="settings of our fast row, float32")
    parser.add_argument("--best", action="append", metavar="key=value", help="settings of our best row")
    parser.add_argument(
        "--without", action="append", default=[], choices=("lightly", "unflushed"), help="leave out these rows"
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="of training, only these: where memory is short")
    parser.add_argument("--window", default=512, type=int, help="of segmentation, pixels")
    parser.add_argument("--images", default=32, type=int, help="of linear evaluation; an eighth of segmentation")
    parser.add_argument("--large", default=(4000, 3000), type=int, nargs=2, metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--tiny", action="store_true", help="a learner of seconds, to see that it runs")
    parser.add_argument("--json", type=Path, help="file for all of the numbers")
    return parser


def main(argv: Sequence[str]) -> int:
    """The command; see `--help`.

    Raises:
        UserError: settings that the machine, the model or the configuration refuses; a package that is missing.
    """
    options = build_parser().parse_args(argv)
    if options.tiny:
        options.model, options.size, options.window = "vit_tiny_patch16_224", 32, 32
    least = {"batch": 2, "repeats": 1, "threads": 1, "size": 32, "window": 32, "images": 16}
    for name, value in least.items():
        if getattr(options, name) < value:
            raise UserError(f"--{name}={getattr(options, name)}: must be at least {value}")
    if options.json is not None:
        common.prepare_folder(options.json.parent)
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    check_clock(options.clock, options.threads, device)
    beside = "training" in options.tables and "lightly" not in options.without
    packages = ("torch", "timm", *(("lightly",) if beside else ()))
    about = {
        "processor": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "fast": options.fast or FAST,
        "best": options.best or BEST,
        **{name: value for name, value in vars(options).items() if name not in ("fast", "best", "json")},
    }
    result: dict[str, Any] = {"about": about}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), options.size, options.batch)
        options.data = Path(folder) / "unlabeled"
        if "training" in options.tables:
            result["training"] = measure_training(options)
        if "evaluation" in options.tables:
            result["evaluation"] = measure_evaluation(options)
    about["versions"] = {name: metadata.version(name) for name in packages}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    console = Console(width=140)
    if "training" in result:
        report_training(result["training"], options.batch, console)
    if "evaluation" in result:
        report_evaluation(result["evaluation"], console)
    if options.json is not None:
        common.write_results(options.json, result)
    return EXIT_DONE


if __name__ == "__main__":
    common.script(main)
