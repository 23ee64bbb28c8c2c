"""What the evaluations share: frozen features, head training, the command line, results.json.

An evaluation is a pure function of (backbone, sources, options): nothing here reads or moves a global random
state. On CUDA it repeats to rounding only, because bilinear upsampling adds its gradients in no fixed order.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dino_value.arguments import Parser, exit_code
from dino_value.backbones import Backbone, Features, load_backbone
from dino_value.data.labelled import LabelledDataset, LabelledSource, Layout, open_labelled
from dino_value.errors import EXIT_DONE, UserError
from dino_value.files import write_json

Reader = Callable[[Features], Tensor]
"""What a head reads of a backbone's features: a map [B D h w] or a vector [B D]."""


@dataclass(frozen=True)
class HeadOptions:
    """Settings of one frozen-feature evaluation; each evaluation has its own defaults.

    Args:
        size: (height, width) that images are resized to, pixels; multiples of the patch size.
        head: a name in the evaluation's `HEADS`.
        steps: head updates; 5 % of them warm up linearly, then the learning rate falls along a cosine to 0.
        batch: labelled images per head update, and images per forward pass.
        clip: largest gradient norm.
        seed: fixes the head's first weights, the order of the data and its augmentation.
        device: a torch device, or "auto": CUDA where there is one.
        augment: mirror training images at random; features are then computed anew each step.
        cache_gb: RAM that unaugmented training features may take; above it they too are computed anew.
        workers: processes that read images.
        bf16: run the backbone in bfloat16, on CUDA only.
        progress: show a progress bar.
    """

    size: tuple[int, int]
    head: str
    steps: int = 20_000
    batch: int = 8
    lr: float = 1e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    device: str = "auto"
    augment: bool = False
    cache_gb: float = 4.0
    workers: int = 0
    bf16: bool = True
    progress: bool = False


Options = TypeVar("Options", bound=HeadOptions)


def pick_device(name: str) -> torch.device:
    """The device `name`, or the best there is for "auto".

    Raises:
        UserError: unknown, or absent from this machine.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def check_inputs(backbone: Backbone, sources: Sequence[LabelledSource], kind: str, options: HeadOptions) -> None:
    """Refuse what cannot work, before anything is computed.

    Raises:
        UserError: a bad setting, an image size that the patch does not divide, an empty source, or one of
            another kind.
    """
    for key in ("steps", "batch", "lr"):
        if getattr(options, key) <= 0:
            raise UserError(f"{key}={getattr(options, key)} must be positive")
    if options.workers < 0:
        raise UserError(f"workers={options.workers} must be at least 0 (0 reads images in this process)")
    if min(options.size) < 1 or any(side % backbone.patch_size for side in options.size):
        fitting = "x".join(
            str(max(1, round(side / backbone.patch_size)) * backbone.patch_size) for side in options.size
        )
        raise UserError(
            f"image size {format_size(options.size)} is not a multiple of {backbone.name}'s patch size "
            f"{backbone.patch_size}; the nearest that is: {fitting}"
        )
    for source in sources:
        if source.kind != kind:
            raise UserError(f"this evaluation needs labels of kind {kind}, the data has {source.kind}")
        if not len(source):
            raise UserError("a labelled split is empty")
    if sources[0].class_names != sources[1].class_names:
        raise UserError("the training and the validation split do not list the same classes")


class FrozenBackbone:
    """A backbone on its device, in eval mode, without gradients; images in, what a head reads out."""

    def __init__(self, backbone: Backbone, read: Reader, options: HeadOptions) -> None:
        self.backbone, self.read = backbone, read
        self.device = pick_device(options.device)
        self.bf16 = options.bf16 and self.device.type == "cuda"

    def __call__(self, images: Tensor) -> Tensor:
        """Images uint8 [B 3 H W] to float32 features on the device."""
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.backbone(self.backbone.normalise(images.to(self.device, non_blocking=True)))
            return self.read(features).float()


@contextmanager
def frozen(backbone: Backbone, read: Reader, options: HeadOptions) -> Iterator[FrozenBackbone]:
    """Lend `backbone` to an evaluation: moved and in eval mode inside, as it was before outside."""
    training, home = backbone.training, next(backbone.parameters()).device
    extractor = FrozenBackbone(backbone, read, options)
    backbone.to(extractor.device).eval()
    try:
        yield extractor
    finally:
        backbone.to(home).train(training)


def shuffled_keys(count: int, batch: int, steps: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """`steps` lists of `batch` (position, epoch seed) pairs: one permutation after another."""
    generator = torch.Generator().manual_seed(seed)
    pool: list[tuple[int, int]] = []
    epoch = 0
    for _ in range(steps):
        while len(pool) < batch:
            order = torch.randperm(count, generator=generator).tolist()
            pool += [(position, seed * 1_000_003 + epoch) for position in order]
            epoch += 1
        yield pool[:batch]
        del pool[:batch]


class _Items(Dataset["tuple[Tensor, Tensor] | UserError"]):
    """A data set whose mistakes are handed over as they are: the loader would wrap them in a traceback."""

    def __init__(self, dataset: LabelledDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor] | UserError:
        try:
            return self.dataset[key]
        except UserError as error:
            return error


def _collate(items: list[tuple[Tensor, Tensor] | UserError]) -> tuple[Tensor, list[Tensor]] | UserError:
    pairs = []
    for item in items:
        if isinstance(item, UserError):
            return item
        pairs.append(item)
    images, targets = zip(*pairs, strict=True)
    return torch.stack(images), list(targets)


def loader(
    dataset: LabelledDataset, keys: Iterable[list[tuple[int, int]]], workers: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Batches in the order of `keys`: images uint8 [B 3 h w] and a list of targets.

    Raises:
        UserError: an item that cannot be read, also where a worker found it.
    """
    # The keys carry every random choice, so the order of workers cannot change the data; the generator is
    # there only so that DataLoader does not draw its base seed from the global one.
    batches = DataLoader(
        _Items(dataset),
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),
    )
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def training_batches(
    extractor: FrozenBackbone, source: LabelledSource, options: HeadOptions
) -> Iterator[tuple[Tensor, Tensor]]:
    """`options.steps` batches (features, targets) on the device, targets at `options.size`.

    Features are computed once and kept in RAM when they are not augmented, fit in `options.cache_gb`, and
    would otherwise be computed more than once; else each batch goes through the backbone.
    """
    dataset = LabelledDataset(source, size=options.size, flip=options.augment)
    keys = shuffled_keys(len(dataset), options.batch, options.steps, options.seed)
    if not options.augment and options.steps * options.batch >= len(dataset):
        cache = _cache(extractor, dataset, options)
        if cache is not None:
            features, targets = cache
            for batch in keys:
                index = torch.tensor([position for position, _ in batch])
                yield features[index].to(extractor.device), _expand(targets[index]).to(extractor.device)
            return
    for images, raw in loader(dataset, keys, options.workers):
        yield extractor(images), torch.stack(raw).to(extractor.device)


def _cache(extractor: FrozenBackbone, dataset: LabelledDataset, options: HeadOptions) -> tuple[Tensor, Tensor] | None:
    """Features and compact targets of a whole set, in order, in RAM; None where they exceed the budget."""
    image, target = dataset[0, 0]
    samples = extractor(image[None])[0].cpu(), _compact(target)
    if sum(sample.nbytes for sample in samples) * len(dataset) > options.cache_gb * 1e9:
        return None
    features, targets = (sample.new_empty(len(dataset), *sample.shape) for sample in samples)
    keys = ordered_keys(len(dataset), options.batch)
    filled = 0
    for images, raw in track(
        loader(dataset, keys, options.workers),
        "features",
        total=len(keys),
        disable=not options.progress,
        transient=True,
    ):
        stop = filled + len(images)
        features[filled:stop] = extractor(images)
        targets[filled:stop] = _compact(torch.stack(raw))
        filled = stop
    return features, targets


def ordered_keys(count: int, batch: int) -> list[list[tuple[int, int]]]:
    """Every position once, in order, in chunks for one forward pass."""
    batch = max(batch, 32)  # a head's step may be small; a forward pass need not be
    return [[(position, 0) for position in range(start, min(start + batch, count))] for start in range(0, count, batch)]


def _compact(target: Tensor) -> Tensor:
    """Label maps [… H W] as uint8, an eighth of the RAM: ids end at 254, and 255 is ignore."""
    return target.to(torch.uint8) if target.dtype == torch.int64 and target.ndim >= 2 else target


def _expand(target: Tensor) -> Tensor:
    return target.long() if target.dtype == torch.uint8 else target


def validation_batches(
    extractor: FrozenBackbone, source: LabelledSource, options: HeadOptions
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Every item once: features on the device, and targets at their own resolution."""
    dataset = LabelledDataset(source, size=options.size, resize_targets=False)
    keys = ordered_keys(len(dataset), options.batch)
    for images, targets in track(
        loader(dataset, keys, options.workers),
        "validation",
        total=len(keys),
        disable=not options.progress,
        transient=True,
    ):
        yield extractor(images), targets


def same_size_runs(outputs: Tensor, targets: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a batch into runs of equal target shape, so that each is computed at its own resolution at once."""
    start = 0
    for stop in range(1, len(targets) + 1):
        if stop == len(targets) or targets[stop].shape != targets[start].shape:
            yield outputs[start:stop], torch.stack(list(targets[start:stop])).to(outputs.device)
            start = stop


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """`build()` under its own seed; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def fit_head(
    head: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    options: HeadOptions,
) -> nn.Module:
    """Train `head` on `batches` with AdamW, linear warm-up and cosine decay; returned in eval mode.

    Args:
        loss: (head output, target) to a scalar.
        batches: (features, target), `options.steps` of them, on the head's device.

    Raises:
        UserError: the head did not stay finite.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    warmup = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warmup)
            * (0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / max(1, options.steps - warmup)))
        ),
    )
    head.train()
    for features, target in track(batches, "head", total=options.steps, disable=not options.progress, transient=True):
        optimizer.zero_grad(set_to_none=True)
        loss(head(features), target).backward()
        nn.utils.clip_grad_norm_(head.parameters(), options.clip)
        optimizer.step()
        schedule.step()
    # Once, at the end: a non-finite step stays in the weights, and a check at each step would wait for the
    # device.
    if not all(bool(value.isfinite().all()) for value in head.state_dict().values()):
        raise UserError(f"the head's weights became infinite or NaN: lower the learning rate ({options.lr:g})")
    return head.eval()


# --- the command line
# ------------------------------------------------------------------------------------------------


def parse_size(text: str) -> tuple[int, int]:
    """`512` or `480x640` (height × width) to (height, width)."""
    parts = text.lower().split("x")
    try:
        height, width = int(parts[0]), int(parts[-1])
    except ValueError:
        height = width = 0
    if len(parts) > 2 or min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 512 or 480x640 (height x width)")
    return height, width


def parse_share(text: str) -> float:
    """A number in [0, 1]."""
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in [0, 1]")
    return share


def format_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def build_parser(name: str, description: str, defaults: HeadOptions, heads: Sequence[str]) -> argparse.ArgumentParser:
    """The flags that every evaluation has; its defaults are the published protocol."""
    parser = Parser(
        f"dino-value eval {name}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run_or_weights", metavar="RUN_OR_WEIGHTS", help="a run folder, or a .safetensors or .pth file")
    parser.add_argument("--data", required=True, help='root of the data set, or "scenes" for the embedded one')
    parser.add_argument("--out", required=True, type=Path, help="folder that gets results.json")
    parser.add_argument("--model", help="timm name, for a weights file that does not name its architecture")
    parser.add_argument(
        "--min-match", default=0.9, type=parse_share, help="refuse weights that fill less of the model, a share"
    )
    parser.add_argument("--head", default=defaults.head, choices=heads)
    parser.add_argument(
        "--size",
        default=format_size(defaults.size),
        type=parse_size,
        help="height x width of the images, or one side",
    )
    parser.add_argument("--steps", default=defaults.steps, type=int, help="head updates")
    parser.add_argument("--batch", default=defaults.batch, type=int, help="images per head update")
    parser.add_argument("--lr", default=defaults.lr, type=float, help="the head's peak learning rate")
    parser.add_argument("--seed", default=defaults.seed, type=int, help="of the head and the order of the data")
    parser.add_argument("--device", default=defaults.device, help="cpu, cuda, cuda:1, …; auto takes CUDA if present")
    parser.add_argument("--augment", action="store_true", help="mirror at random; features are computed each step")
    parser.add_argument("--cache-gb", default=defaults.cache_gb, type=float, help="RAM for frozen features")
    parser.add_argument("--workers", default=defaults.workers, type=int, help="processes that read images")
    return parser


def run(
    name: str,
    layout: Layout,
    evaluate: Callable[[Backbone, LabelledSource, LabelledSource, Options], dict[str, float]],
    defaults: Options,
    arguments: argparse.Namespace,
) -> int:
    """Load, evaluate, print the table, write results.json.

    Keys of the metrics with a slash, such as `iou/wall`, go into a mapping of their own: `{"iou": {"wall":
    …}}`.

    Raises:
        UserError: whatever the user can mend.
    """
    known = {field.name for field in fields(defaults)}
    options = replace(defaults, progress=True, **{k: v for k, v in vars(arguments).items() if k in known})
    if pick_device(options.device).type == "cpu":
        torch.set_flush_denormal(True)
    backbone = load_backbone(
        arguments.run_or_weights,
        model=arguments.model,
        img_size=max(options.size),
        min_match=arguments.min_match,
    )
    training = open_labelled(layout, arguments.data, "training")
    validation = open_labelled(layout, arguments.data, "validation")
    prepare_folder(arguments.out)

    start = time.perf_counter()
    metrics = evaluate(backbone, training, validation, options)
    seconds = time.perf_counter() - start

    nested: dict[str, Any] = {}
    for key, value in metrics.items():
        number = value if math.isfinite(value) else None  # JSON has no NaN: a class that appears nowhere is null
        head, slash, tail = key.partition("/")
        if slash:
            nested.setdefault(head, {})[tail] = number
        else:
            nested[key] = number
    write_results(
        arguments.out / "results.json",
        {
            **nested,
            "evaluation": name,
            "backbone": {"path": str(arguments.run_or_weights), "name": backbone.name},
            "data": {"path": str(arguments.data), "training": len(training), "validation": len(validation)},
            "settings": {key: value for key, value in asdict(options).items() if key != "progress"},
            "seconds": round(seconds, 2),
            "device": _describe(pick_device(options.device)),
            "torch": torch.__version__,
        },
    )
    print(f"{name}: {arguments.run_or_weights} on {arguments.data}")
    print_table({key: value for key, value in metrics.items() if "/" not in key})
    return EXIT_DONE


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def print_table(metrics: Mapping[str, float]) -> None:
    table = Table("metric", "value")
    for key, value in metrics.items():
        table.add_row(key, "–" if math.isnan(value) else f"{value:.4f}")
    Console().print(table)


def prepare_folder(path: Path) -> None:
    """Make the output folder now, so that a missing permission is not found after the work.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot make the output folder ({error.strerror})") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path}: no permission to write in the output folder")


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """`files.write_json`, with the disk's refusal as the user's error.

    Raises:
        UserError: the disk refused it.
    """
    try:
        write_json(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def script(main: Callable[[Sequence[str]], int]) -> None:
    """Run `main` as `python eval/<name>.py …`, with the exit codes of the dino-value command."""
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
