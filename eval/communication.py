"""What processes send each other in a training step: `python eval/communication.py [key=value …]`.

Two processes (gloo) take a learner step and a designer update, and every collective operation is counted: how many, and
the bytes that a process hands over. Beside that stands what `volume` expects from the sizes of the model alone, which
is then evaluated for ViT-S, B, L and g (docs/scaling.md).
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from dino_value.arguments import Parser
from dino_value.config import Config, load_config
from dino_value.designers import DESIGNERS
from dino_value.errors import EXIT_DONE
from dino_value.eval import common
from dino_value.files import write_json
from dino_value.models.backbone import create_backbone
from dino_value.objectives.dino import DINOHead
from dino_value.training.designer_update import open_scope
from dino_value.training.trainer import Trainer

SMALL = [
    *("out=unused", "data.unlabeled=scenes", "data.ade20k=scenes", "data.nyuv2=scenes", "data.in_memory=true"),
    *("device=cpu", "precision=fp32", "steps=9", "views.global_size=64", "views.local_size=32", "views.local_count=2"),
    *("optim.batch_size=4", "value.batch_size=4", "value.period=1", "value.engine=finite_difference"),
    *("value.warmup=0", "value.tolerance=10", "designer.width=8", "designer.depth=2", "feedback.size=64"),
    *("feedback.batch_size=4", "feedback.warmup=0", "feedback.seg.train=16", "feedback.seg.meta=8"),
    *("feedback.depth.train=16", "feedback.depth.meta=8", "feedback.lag_every=0"),  # a measurement now and then
]
BASE = "paper/ade20k_vitb"
PAPER = ["out=unused", "data.unlabeled=scenes", "data.ade20k=scenes", "data.nyuv2=scenes"]
MODELS = {
    "ViT-S/16": "vit_small_patch16_224",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-g/14": "vit_giant_patch14_224",
}


HELD = 4 * 5
"""Bytes of a parameter that a process keeps between steps: itself, its gradient, two moments, its moving average."""
WORLDS = (1, 8, 16, 32, 64, 128, 256, 512)


class Sizes(NamedTuple):
    """Parameters of backbone, learner (with its head), S and φ; widths; patches of a feedback image; and of sharding:
    blocks and the parameters in them, the learner's tensors, and how many numbers are in those of a single row, which
    one process holds alone (FSDP cuts rows; position embeddings and class token have one)."""

    backbone: int
    learner: int
    scope: int
    designer: int
    width: int
    prototypes: int
    patches: int
    depth: int
    blocks: int
    tensors: int
    single: int

    def share(self, world: int) -> float:
        """Of the learner's parameters, what travels of one process to the others; up to padding."""
        return (self.learner - self.single) / world + self.single


Volume = dict[str, tuple[int, float]]
"""What is sent for -> how many collective operations, and the bytes that a process hands over to them."""


def volume(config: Config, sizes: Sizes, world: int = 2) -> tuple[Volume, Volume]:
    """Of a learner step and of a designer update with one meta batch; DINO with a centre, a mask generator, float32.

    The learner's gradient counts as one operation, which DDP cuts into buckets of 25 MiB. Integers have 8 bytes. With
    distributed.strategy=fsdp a unit is a block, the head or the rest; student and teacher gather each in the forward
    pass, and the student its blocks once more in the backward pass; an update gathers both.
    """
    f = config.feedback
    labels = labels_of(config)
    fits, part = f.updates * len(labels), -(-f.batch_size // world)
    features = 4 * sizes.patches * sizes.width
    step: Volume = {
        "gradient of θ": (1, 4 * sizes.learner),
        "centre, prototype share": (2, 2 * 4 * sizes.prototypes),
        "loss": (1, 4),
    }
    update: Volume = {
        "features and labels to fit heads": (
            2 * fits,
            part * (fits * features + f.updates * sum(labels) * f.size**2),
        ),
        "g_down": (len(labels), len(labels) * 4 * (sizes.scope + 2)),
        "g_pre": (1, 4 * sizes.scope),
        "gradient of φ": (1, 4 * sizes.designer),
    }
    if config.distributed.strategy == "fsdp":
        units, share = sizes.depth + 2, sizes.share(world)
        step |= {
            "parameters ahead": (2 * units, 2 * 4 * share),
            "parameters back": (sizes.depth, 4 * sizes.blocks / world),
            "gradient of θ": (units, 4 * world * share),
            "gradient norm": (1, 4 * sizes.tensors),
        }
        update["parameters"] = (2 * units, 2 * 4 * share)
    return step, update


def labels_of(config: Config) -> list[int]:
    """Bytes of a label of each feedback task: class numbers and metres."""
    return [size for path, size in ((config.data.ade20k, 8), (config.data.nyuv2, 4)) if path is not None]


def summed(parts: Volume) -> tuple[int, int]:
    """Operations and bytes in all."""
    calls, sizes = zip(*parts.values(), strict=True)
    return sum(calls), round(sum(sizes))


class Machine(NamedTuple):
    """What the model of docs/scaling.md assumes of a cluster; nothing of it is measured here."""

    flops: float = 3.5e14  # that training reaches a second and GPU, bfloat16: 35 % of an H100's 989e12
    inside: float = 3.0e11  # bytes a second and GPU that an all-reduce reaches within a machine (NVLink)
    outside: float = 4.0e10  # and between machines: 80 % of one 400 Gb/s adapter a GPU
    latency: float = 2.0e-5  # seconds of one hop
    gpus: int = 8  # of a machine


def reduce_seconds(calls: int, size: float, world: int, machine: Machine) -> float:
    """Of all-reduces over `world` GPUs: a ring passes 2 (W − 1)/W of the bytes, a tree has 2 log₂ W hops."""
    if world == 1:
        return 0.0
    rate = machine.inside if world <= machine.gpus else machine.outside
    return 2 * (world - 1) / world * size / rate + calls * 2 * math.log2(world) * machine.latency


def gather_seconds(calls: int, size: float, world: int, machine: Machine) -> float:
    """Of all-gathers (or, the other way round, reduce-scatters) of so many bytes of each GPU, as `reduce_seconds`."""
    return reduce_seconds(calls, size * world, world, machine) / 2


def step_seconds(config: Config, sizes: Sizes, world: int, machine: Machine) -> tuple[float, float]:
    """A baseline step, and a value step on average over the r steps of an update, with the batches of `config`.

    Floating-point operations: 2 a parameter and token, and 4 T² D a block for attention's products; a backward pass is
    two forward passes. The reduction of θ's gradient overlaps with the backward pass, and with FSDP the gathering of
    parameters with the pass that needs them; the others with nothing.
    """
    v, patch = config.views, round(config.feedback.size / math.sqrt(sizes.patches))

    def forward(side: int) -> float:
        tokens = (side // patch) ** 2 + 1
        return 2.0 * sizes.backbone * tokens + 4 * sizes.depth * tokens**2 * sizes.width

    large, small, labelled = (forward(side) for side in (v.global_size, v.local_size, config.feedback.size))
    student, teacher = 2 * large + v.local_count * small, 2 * large
    ahead, back = student + teacher, 2 * student
    step, update = volume(config, sizes, world)

    images = config.optim.batch_size / world
    overlapping, needed, gathering = reduce_seconds(*step.pop("gradient of θ"), world, machine), 0.0, 0.0
    if config.distributed.strategy == "fsdp":
        needed = gather_seconds(*step.pop("parameters ahead"), world, machine)
        overlapping = overlapping / 2 + gather_seconds(*step.pop("parameters back"), world, machine)
        gathering = gather_seconds(*update.pop("parameters"), world, machine)
    plain = max(images * ahead / machine.flops, needed) + max(images * back / machine.flops, overlapping)
    plain += reduce_seconds(*summed(step), world, machine)

    # The trunk there and back, three passes through the tail there and back, and both kinds of labelled batch.
    tail = config.value.scope.blocks / sizes.depth
    meta = config.value.batch_size * (student + teacher + student + 3 * 3 * tail * student)
    feedback = config.feedback.batch_size * len(labels_of(config)) * labelled * (1 + config.feedback.updates + 2 * tail)
    updating = (meta + feedback) / world / machine.flops + reduce_seconds(*summed(update), world, machine) + gathering
    return plain, plain + updating / config.value.period


def sizes_of(config: Config) -> Sizes:
    """From the configuration alone, with no memory for the model."""
    with torch.device("meta"):
        backbone = create_backbone(config.backbone.name, config.views.global_size, config.backbone.kwargs)
        o, d = config.objective, config.designer
        head = DINOHead(backbone.embed_dim, o.out_dim, o.hidden_dim, o.bottleneck_dim, o.batch_norm)
        designer = DESIGNERS[d.mask or "unet"](d.width, d.depth, d.stride, d.keep_ratio)
        scope = open_scope(config, backbone, backbone.final_norm).parameters(backbone)
    counts = [sum(value.numel() for value in module.parameters()) for module in (backbone, head, designer)]
    patches = (config.feedback.size // backbone.patch_size) ** 2
    learner = [*backbone.parameters(), *head.parameters()]
    return Sizes(
        backbone=counts[0],
        learner=counts[0] + counts[1],
        scope=sum(value.numel() for value in scope.values()),
        designer=counts[2],
        width=backbone.embed_dim,
        prototypes=o.out_dim,
        patches=patches,
        depth=backbone.depth,
        blocks=sum(value.numel() for value in backbone.model.blocks.parameters()),
        tensors=len(learner),
        single=sum(value.numel() for value in learner if len(value) == 1),
    )


class Counting(TorchDispatchMode):
    """Every collective operation of this process: its name, and the bytes that it hands over."""

    HANDED: ClassVar = {  # which argument that is
        "allreduce_": ("all_reduce", 0),
        "allgather_": ("all_gather", 1),
        "_allgather_base_": ("all_gather", 1),
        "all_gather_into_tensor": ("all_gather", 0),
        "all_reduce": ("all_reduce", 0),
        "_reduce_scatter_base_": ("reduce_scatter", 1),
    }

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def take(self) -> list[tuple[str, int]]:
        """What was seen since the last call."""
        seen, self.seen = self.seen, []
        return seen

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if any(hasattr(kind, "full_tensor") for kind in types):
            return NotImplemented  # a spread tensor: what it does with its shares comes by again
        name = function._schema.name.split("::")
        if name[0] in ("c10d", "_c10d_functional") and name[1] in self.HANDED:
            what, place = self.HANDED[name[1]]
            given: Tensor | list[Tensor] = arguments[place]
            tensors = [given] if isinstance(given, Tensor) else given
            self.seen.append((what, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))
        return function(*arguments, **(keywords or {}))


def show_reduction(whole: nn.Module) -> None:
    """Have DDP reduce gradients where `Counting` sees it."""
    if not isinstance(whole, DistributedDataParallel):
        return

    def hook(state: Any, bucket: dist.GradBucket) -> Any:  # type: ignore[name-defined]
        return allreduce_hook(state, bucket)  # what DDP does unseen, through the function that is counted

    hook.__annotations__.clear()  # postponed ones are text, which DDP refuses
    whole.register_comm_hook(None, hook)


def _child(rank: int, overrides: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    run = Trainer(load_config(BASE, overrides))
    batches = run.stream.iterate(0, 2)
    run.learner_update(*next(batches))  # the first update checks its engine
    assert run.steer is not None
    show_reduction(run.whole)
    with Counting() as counting:
        with run.plain.filled(), run.autocast():
            run.steer.update(run.step, run.teacher_temperature())
        update = counting.take()
        run.config.method, run.steer = "baseline", None
        run.learner_update(*next(batches))
    if rank == 0:
        torch.save({"step": counting.take(), "update": update}, f"{folder}/seen.pt")
    dist.destroy_process_group()


def count(overrides: Sequence[str] = ()) -> dict[str, list[tuple[str, int]]]:
    """The collectives of a learner's `step` and of a designer's `update`, of two processes on small embedded images."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_child, ([*SMALL, *overrides], folder), 2, start_method="forkserver")
        seen: dict[str, list[tuple[str, int]]] = torch.load(Path(folder) / "seen.pt", weights_only=True)
        return seen


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Count what processes send each other, and set it beside what is expected.")
    parser.add_argument("--count", default="ViT-S/16", choices=MODELS, help="the model that two processes run")
    for name, value in Machine()._asdict().items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="of the model (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for dino-value train")
    arguments = parser.parse_args(argv)

    name = MODELS[arguments.count]
    small = [f"backbone.name={name}", *arguments.overrides]
    seen = count(small)
    config = load_config(BASE, [*SMALL, *small])
    table = Table("two processes", "counted", "bytes", "expected bytes")
    found: dict[str, Any] = {"counted": seen, "expected": {}, "models": {}, "scaling": {}}
    configured: dict[str, tuple[Config, Sizes]] = {}
    for what, parts in zip(("step", "update"), volume(config, sizes_of(config)), strict=True):
        calls = [size for _, size in seen[what]]
        table.add_row(f"{arguments.count}, {what}", str(len(calls)), f"{sum(calls):,}", f"{summed(parts)[1]:,}")
        found["expected"][what] = parts

    models = Table(
        "paper's settings", "θ", "S", "φ", "step, MB", "update, MB", "a step at r, MB", "held, GB", "of 8, FSDP"
    )
    for label, timm_name in MODELS.items():
        config = load_config(BASE, [*PAPER, f"backbone.name={timm_name}", *arguments.overrides])
        sizes = sizes_of(config)
        step, update = volume(config, sizes)
        mean = summed(step)[1] + summed(update)[1] / config.value.period
        millions = [f"{count / 1e6:.2f} M" for count in (sizes.learner, sizes.scope, sizes.designer)]
        handed = [f"{size / 1e6:.1f}" for size in (summed(step)[1], summed(update)[1], mean)]
        kept = [f"{HELD * numbers / 1e9:.2f}" for numbers in (sizes.learner, sizes.share(8))]
        models.add_row(label, *millions, *handed, *kept)
        configured[label] = config, sizes
        found["models"][label] = {"sizes": sizes._asdict(), "step": step, "update": update}
    machine = Machine(**{name: getattr(arguments, name) for name in Machine._fields})
    scaling = Table("images/s by the model", "batch", *(f"{world} GPUs" for world in WORLDS))
    for label in MODELS:
        config, sizes = configured[label]
        # The paper's batch, and one that grows with the GPUs.
        for each, strategy in ((None, "ddp"), (32, "ddp"), (32, "fsdp")):
            config.distributed.strategy = strategy
            rows: dict[str, list[str]] = {"baseline": [], "value": []}
            for world in WORLDS:
                batch = config.optim.batch_size if each is None else each * world
                if batch % world:
                    rows = {name: [*row, "–"] for name, row in rows.items()}
                    continue
                meta = max(config.value.batch_size, world)
                now = dataclasses.replace(config, optim=dataclasses.replace(config.optim, batch_size=batch))
                now.value = dataclasses.replace(config.value, batch_size=meta)
                for name, seconds in zip(rows, step_seconds(now, sizes, world, machine), strict=True):
                    rows[name].append(f"{batch / seconds:,.0f}")
            for name, row in rows.items():
                scaling.add_row(f"{label}, {strategy}, {name}", "256" if each is None else f"{each} a GPU", *row)
                found["scaling"][f"{label}, {strategy}, {name}, {each or 256}"] = row
    console = Console()
    for each_table in (table, models, scaling):
        console.print(each_table)
    if arguments.json:
        write_json(arguments.json, found)
    return EXIT_DONE


if __name__ == "__main__":
    common.script(main)
