"""Images a second of a DINO step, ours beside two others: `python eval/throughput.py [--json FILE]`.

- *plain*: the loop of the paper (Caron et al., 2021, arXiv 2104.14294, algorithm 1), written here with timm and torch
  alone, in the published program's ways: a list of crops, a sum over pairs of views, an average of the teacher tensor
  by tensor, `.item()` in every step.
- *lightly*: what lightly's DINO example does, with its head, loss and averaging (`pip install 'dino-value[bench]'`).

All start from the same weights and see the same views, so that their losses must agree: the curves are printed. Every
row is a process of its own, which keeps denormal flag, compiled code and peak of memory its own. They take turns, and
ratios are taken within a round, so that whatever else the machine does falls on all of them. A step is the teacher's
and the student's pass, the backward pass, the optimizer and the average; making the views is timed apart.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import math
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

from dino_value import train
from dino_value.arguments import Parser
from dino_value.backbones import create_backbone
from dino_value.checkpoint import load_checkpoint
from dino_value.config import Config, ViewsConfig, load_config, packaged
from dino_value.data.scenes import scenes
from dino_value.data.views import MemoryViews, augment
from dino_value.errors import EXIT_DONE, UserError
from dino_value.eval import common
from dino_value.eval.overhead import Case, _processor, spread, take_turns, timed
from dino_value.objectives.dino import DINOHead
from dino_value.optim import parameter_groups
from dino_value.process import choose_device, use_bfloat16
from dino_value.steps import Views

LR, MOMENTUM, STUDENT_TEMP, TEACHER_TEMP = 1e-4, 0.996, 0.1, 0.04  # constant: the loops differ in nothing but the code
SETTINGS = (
    "out=unused method=baseline data.unlabeled=scenes data.ade20k=null data.nyuv2=null data.in_memory=true "
    f"steps=1000000000 optim.lr={LR} optim.lr_end={LR} optim.warmup=0 optim.clip=inf "
    f"objective.teacher_momentum={MOMENTUM} objective.student_temp={STUDENT_TEMP} "
    f"objective.teacher_temp={TEACHER_TEMP} objective.teacher_temp_start={TEACHER_TEMP} objective.freeze_last_layer=0"
).split()


@dataclass(frozen=True)
class Setting:
    """One row of the table: `loop` is ours, plain or lightly."""

    name: str
    loop: str
    bf16: bool = False
    flush: bool = True
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """How many times as fast one row should be as another, where there is an aim."""

    name: str
    reference: str
    least: float | None = None


# --- the loops: `step` takes normalised views to the loss


class Ours:
    """`dino-value train method=baseline`, all of it but the making of views."""

    def __init__(self, run: train.Run, bf16: bool) -> None:
        self.run = run

    def step(self, views: Views) -> Callable[[], float]:
        with mock.patch.object(train, "make_views", return_value=views):
            self.run.learner_update(views.large, views.small)
        return self._loss

    def _loss(self) -> float:
        self.run.guard.check(wait=True)
        return self.run.meters.read()["loss"]


class Peer:
    """Student and teacher with the weights of `run`, heads of another make, and AdamW as torch has it by default."""

    def __init__(self, run: train.Run, head: Callable[[int, int, int, int], nn.Module], bf16: bool) -> None:
        model: Any = run.student.backbone.model
        c = run.config.objective

        def learner() -> nn.ModuleDict:
            made = head(model.embed_dim, c.hidden_dim, c.bottleneck_dim, c.out_dim)
            copy_head(run.student.head, made)
            return nn.ModuleDict({"backbone": copy.deepcopy(model), "head": made}).to(run.device)

        self.student, self.teacher = learner(), learner().requires_grad_(False).eval()
        self.autocast = lambda: torch.autocast(run.device.type, torch.bfloat16, bf16)
        decay = {"weight_decay": run.config.optim.weight_decay}
        self.optimizer = torch.optim.AdamW([decay | group for group in parameter_groups(self.student)], lr=LR)


class PlainHead(nn.Module):
    """Appendix C of the paper: three layers, a unit-norm bottleneck, a weight-normalised last layer of gain one."""

    def __init__(self, dim: int, hidden: int, bottleneck: int, out: int) -> None:
        super().__init__()
        layers = [nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck, out, bias=False))  # as published
        self.last_layer.weight_g.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Plain(Peer):
    """The paper's loop."""

    def __init__(self, run: train.Run, bf16: bool) -> None:
        super().__init__(run, PlainHead, bf16)
        assert run.loss.center is not None
        self.center = run.loss.center.clone()
        self.meter: list[float] = []

    @staticmethod
    def forward(model: nn.ModuleDict, crops: Sequence[Tensor]) -> Tensor:
        """A list of crops to logits: neighbours of one size go through the backbone together, all through the head."""
        sizes = [crop.shape[-1] for crop in crops]
        groups = [[crop for crop in crops if crop.shape[-1] == size] for size in dict.fromkeys(sizes)]
        return model["head"](torch.cat([model["backbone"](torch.cat(group)) for group in groups]))

    def loss(self, student: Tensor, teacher: Tensor, views: int) -> Tensor:
        targets = F.softmax((teacher - self.center) / TEACHER_TEMP, dim=-1).detach().chunk(2)
        logits = (student / STUDENT_TEMP).chunk(views)
        terms = [
            torch.sum(-target * F.log_softmax(logit, dim=-1), dim=-1).mean()
            for one, target in enumerate(targets)
            for other, logit in enumerate(logits)
            if one != other
        ]
        return sum(terms, torch.zeros(())) / len(terms)

    def step(self, views: Views) -> Callable[[], float]:
        crops = list_of_crops(views)
        with self.autocast():
            teacher = self.forward(self.teacher, crops[:2]).float()
            loss = self.loss(self.forward(self.student, crops).float(), teacher, len(crops))
        if not math.isfinite(loss.item()):
            raise UserError(f"plain: the loss is {loss.item()}")
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():  # clipped one by one; nothing reaches this bound
            if parameter.grad is not None and parameter.grad.norm(2).item() == math.inf:
                parameter.grad.zero_()
        self.optimizer.step()
        with torch.no_grad():
            self.center = 0.9 * self.center + 0.1 * teacher.mean(0, keepdim=True)
            for mean, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mean.data.mul_(MOMENTUM).add_((1 - MOMENTUM) * new.detach().data)
        self.meter.append(loss.item())
        return lambda: self.meter[-1]


class Lightly(Peer):
    """lightly's example for DINO, on this backbone and with this optimizer.

    Raises:
        UserError: lightly is not installed.
    """

    def __init__(self, run: train.Run, bf16: bool) -> None:
        try:
            from lightly.loss import DINOLoss
            from lightly.models.modules import DINOProjectionHead
            from lightly.models.utils import update_momentum
        except ImportError as error:
            raise UserError(f"lightly's row: {error}: pip install 'dino-value[bench]', or --without lightly") from None
        super().__init__(run, DINOProjectionHead, bf16)
        self.average: Any = update_momentum
        self.criterion: Any = DINOLoss(run.config.objective.out_dim, TEACHER_TEMP, TEACHER_TEMP, 1, STUDENT_TEMP)
        self.criterion.to(run.device).center.copy_(run.loss.center)

    def step(self, views: Views) -> Callable[[], float]:
        for part in ("backbone", "head"):
            self.average(self.student[part], self.teacher[part], m=MOMENTUM)
        crops = list_of_crops(views)
        with self.autocast():
            taught = [self.teacher["head"](self.teacher["backbone"](crop)) for crop in crops[:2]]
            made = [self.student["head"](self.student["backbone"](crop)) for crop in crops]
        loss = self.criterion([part.float() for part in taught], [part.float() for part in made])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item


LOOPS: dict[str, Callable[[train.Run, bool], Any]] = {"ours": Ours, "plain": Plain, "lightly": Lightly}


def list_of_crops(views: Views) -> list[Tensor]:
    """[B 3 h w] each, the global ones first."""
    return [crop for group in views if len(group) for crop in group.split(views.batch)]


def copy_head(ours: Any, other: Any) -> None:
    """The weights of a `DINOHead` into one of three linear layers and a weight-normalised last one."""
    assert type(ours) is DINOHead
    theirs = [layer for layer in other.modules() if isinstance(layer, nn.Linear) and layer is not other.last_layer]
    for mine, layer in zip([layer for layer in ours.mlp if isinstance(layer, nn.Linear)], theirs, strict=True):
        layer.load_state_dict(mine.state_dict())
    with torch.no_grad():
        other.last_layer.weight_v.copy_(ours.last_layer.weight)
        other.last_layer.weight_g.fill_(1)


# --- settings


def configure(options: argparse.Namespace, *more: str) -> Config:
    """The configuration that all rows share, then the command line's `key=value`, then `more`.

    Raises:
        UserError: one that is refused.
    """
    sizes = [f"views.global_size={options.size}", f"views.local_size={max(16, round(options.size * 6 / 224) * 16)}"]
    given = [f"backbone.name={options.model}", f"device={options.device}", f"optim.batch_size={options.batch}"]
    return load_config("paper/ade20k_vitb", [*SETTINGS, *sizes, *given, *options.overrides, *more])


def choose_settings(options: argparse.Namespace) -> tuple[list[Setting], list[Target]]:
    """The rows and the ratios between them."""
    config = configure(options, f"precision={options.precision}")
    low = use_bfloat16(config, choose_device(config.device))
    # On short sequences a CPU's plain matrix products are faster in bfloat16 than its fused attention.
    best = tuple(options.best or ["backbone.compile=true", *(["backbone.attention=math"] if low else [])])
    rows = [
        Setting("ours", "ours"),
        Setting("plain", "plain"),
        Setting("ours, best", "ours", low, overrides=best),
        *([Setting("ours, bf16", "ours", True), Setting("plain, bf16", "plain", True)] if low else []),
    ]
    targets = [Target("ours", "plain", 1.2), Target("ours, best", "plain", 2.0)]
    targets += [Target("ours, bf16", "plain, bf16"), Target("ours, best", "plain, bf16")] if low else []
    if "lightly" not in options.without:
        rows.append(Setting("lightly", "lightly"))
        targets += [Target("ours", "lightly"), Target("ours, best", "lightly", 1.8)]
    if "unflushed" not in options.without:
        peers = list(dict.fromkeys(row.loop for row in rows if row.loop != "ours"))
        rows += [Setting(f"{name}, unflushed", name, flush=False) for name in peers]
        targets += [Target("ours, best", f"{name}, unflushed") for name in peers]
    return rows, targets


# --- measuring


def serve(pipe: Connection, setting: Setting, options: argparse.Namespace) -> None:
    """A row's process: build its loop, answer views with (seconds, loss), and the end with its memory and FLOPs."""
    try:
        torch.set_num_threads(options.threads)
        config = configure(options, f"precision={'bf16' if setting.bf16 else 'fp32'}", *setting.overrides)
        device = choose_device(config.device)
        torch.set_flush_denormal(setting.flush)  # before there are threads, which inherit it
        before, flops = _peak(device), 0
        with mock.patch.object(train, "choose_device", return_value=device):  # which would set the flag
            run = train.Run(config)
        if config.start_from is not None:
            run.start_from(load_checkpoint(packaged(config.start_from)))
        loop = LOOPS[setting.loop](run, setting.bf16)
        del run
        pipe.send("ready")
        while (given := pipe.recv()) is not None:
            views, losses = Views(*(torch.from_numpy(group).to(device) for group in given)), []
            first = FlopCounterMode(display=False) if setting.name == "plain" and not flops else None
            with first or contextlib.nullcontext():
                seconds = timed(lambda: losses.append(loop.step(views)), device)  # noqa: B023 (called at once)
            flops = first.get_total_flops() if first else flops
            pipe.send((seconds, losses[0]()))
        pipe.send({"peak_bytes": _peak(device) - before, "flops": flops})
    except UserError as error:
        pipe.send(error)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB


def receive(pipe: Connection) -> Any:
    """What a row's process answers.

    Raises:
        UserError: it refuses, or has died.
    """
    try:
        answer = pipe.recv()
    except EOFError:
        raise UserError("a row's process ended early; if memory ran out, lower --batch") from None
    if isinstance(answer, UserError):
        raise answer
    return answer


def measure(settings: Sequence[Setting], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By row: `seconds` of each step with their median and quartiles, `losses`, `peak_bytes` above the imports.

    The first step, with its compilation and AdamW's allocations, gives a loss and no time.
    """
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, Any]] = {row.name: {"seconds": [], "losses": []} for row in settings}
    pipes: dict[str, Connection] = {}
    children = []
    try:
        for row in settings:
            pipes[row.name], end = context.Pipe()
            children.append(context.Process(target=serve, args=(end, row, options), daemon=True))
            children[-1].start()
            end.close()
            receive(pipes[row.name])  # one after the other: they would fight over the processor
        for number, views in enumerate(view_batches(options)):
            for row in settings if number % 2 else reversed(settings):
                pipes[row.name].send([group.numpy() for group in views])
                seconds, loss = receive(pipes[row.name])
                found[row.name]["losses"].append(loss)
                found[row.name]["seconds"] += [seconds] if number else []
        for name, pipe in pipes.items():
            pipe.send(None)
            found[name] |= receive(pipe) | spread(found[name]["seconds"])
        return found
    finally:
        for child in children:
            child.terminate()
            child.join()


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


def matmul_rate(dtype: torch.dtype, side: int = 1536) -> float:
    """FLOP/s of a square matrix product, the best of five: what the processor does when nothing is in its way."""
    a = torch.ones(side, side, dtype=dtype)
    return 2 * side**3 / min(timed(lambda: a @ a, a.device) for _ in range(5))


# --- the report


def compare(rows: Mapping[str, Mapping[str, Any]], targets: Sequence[Target]) -> list[dict[str, Any]]:
    """How many times as fast, within rounds, and the share of the memory."""
    found = []
    for target in targets:
        mine, other = rows[target.name], rows[target.reference]
        faster = spread([b / a for a, b in zip(mine["seconds"], other["seconds"], strict=True)])
        memory = mine["peak_bytes"] / max(1, other["peak_bytes"])
        reached = None if target.least is None else faster["median"] >= target.least
        found.append({**dataclasses.asdict(target), "faster": faster, "memory": memory, "reached": reached})
    return found


def report(result: Mapping[str, Any], batch: int) -> None:
    """The tables."""
    console = Console(width=120)
    rows, data = result["steps"], result["data"]

    def within(value: Mapping[str, float], digits: int = 2) -> str:
        return f"{value['median']:.{digits}f} ({value['low']:.{digits}f} – {value['high']:.{digits}f})"

    table = Table("step", "seconds: median (quartiles)", "images/s", "peak memory, MiB", "share of a matmul's FLOP/s")
    for name, row in rows.items():
        share = f"{row['flop_share']:.0%}" if "flop_share" in row else "–"
        peak = f"{row['peak_bytes'] / 2**20:.0f}"
        table.add_row(name, within(row, 3), f"{batch / row['median']:.2f}", peak, share)
    console.print(table)
    table = Table("step", "against", "times as fast", "aim", "memory")
    for row in result["ratios"]:
        aim = "" if row["least"] is None else f"≥ {row['least']:g}: {'yes' if row['reached'] else 'no'}"
        table.add_row(row["name"], row["reference"], within(row["faster"]), aim, f"{row['memory']:.2f}")
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


def build_parser() -> argparse.ArgumentParser:
    description = "Images a second of a DINO step, beside a plain loop and lightly's."
    parser = Parser("throughput.py", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the training configuration, for all rows")
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm ViT")
    parser.add_argument("--size", default=224, type=int, help="of global views, pixels; local ones have 96/224 of it")
    parser.add_argument("--batch", default=8, type=int, help="images of a step")
    parser.add_argument("--repeats", default=10, type=int, help="steps that count, one a round")
    parser.add_argument("--threads", default=len(os.sched_getaffinity(0)), type=int, help="of the CPU")
    parser.add_argument("--device", default="auto", help="cpu, cuda, …")
    parser.add_argument("--precision", default="auto", help="of our best row: auto, bf16 or fp32")
    parser.add_argument("--best", action="append", metavar="key=value", help="settings of our best row")
    parser.add_argument("--without", action="append", default=[], choices=("lightly", "unflushed"), help="rows")
    parser.add_argument("--json", type=Path, help="file for all of the numbers")
    return parser


def main(argv: Sequence[str]) -> int:
    """The command; see `--help`.

    Raises:
        UserError: settings that the machine, the model or the configuration refuses; a package that is missing.
    """
    options = build_parser().parse_args(argv)
    for name, least in (("batch", 2), ("repeats", 1), ("threads", 1), ("size", 32)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}={getattr(options, name)}: must be at least {least}")
    if options.json is not None:
        common.prepare_folder(options.json.parent)
    torch.set_num_threads(options.threads)
    settings, targets = choose_settings(options)
    on_cpu = choose_device(options.device).type == "cpu"
    rows = measure(settings, options)
    for row in settings if on_cpu else ():
        rate = matmul_rate(torch.bfloat16 if row.bf16 else torch.float32)
        rows[row.name]["flop_share"] = rows["plain"]["flops"] / rows[row.name]["median"] / rate
    torch.set_num_threads(1)
    times = take_turns(data_cases(options), min(5, options.repeats), torch.device("cpu"))
    about = {
        "processor": _processor() if on_cpu else torch.cuda.get_device_name(),
        "versions": {
            name: metadata.version(name) for name in ("torch", "timm", "lightly") if name not in options.without
        },
        "best": next(row for row in settings if row.name == "ours, best").overrides,
        **{name: value for name, value in vars(options).items() if name not in ("best", "json")},
    }
    result = {
        "about": about,
        "steps": rows,
        "ratios": compare(rows, targets),
        "data": {name: {"seconds": seconds, **spread(seconds)} for name, seconds in times.items()},
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    report(result, options.batch)
    if options.json is not None:
        common.write_results(options.json, result)
    return EXIT_DONE


if __name__ == "__main__":
    common.script(main)
