"""Classification by a linear head: `dino-value eval linear`, or `python eval/linear.py`.

Protocol: images scaled to cover 224 px and cropped at the centre, linear-BN head on frozen features, AdamW, 20k steps
of 256 images. With several `--lrs` all are fitted at once on 90 % of the training split, the one that does best on the
other 10 % is fitted anew on all of it: the images that are scored choose nothing. `--finetune-blocks K` trains the
last K blocks too, `--finetune` the whole backbone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dino_value.data.labelled import LabelledDataset, LabelledSource
from dino_value.errors import UserError
from dino_value.eval import command, common, intervals
from dino_value.heads import LinearBNHead, LinearBNHeads, build_head, classification_loss, heads_loss
from dino_value.models.backbone import Backbone, Features, Hidden

HEADS = {"linear": "classes_linear"}
HELD_OUT = 0.1
"""Share of the training split that chooses the learning rate."""


def _read_cls(features: Features) -> Tensor:
    return features.cls


def _read_mean(features: Features) -> Tensor:
    return features.patches.mean(1)


def _read_both(features: Features) -> Tensor:
    return torch.cat([features.cls, features.patches.mean(1)], 1)


POOLS: dict[str, common.Reader] = {"cls": _read_cls, "mean": _read_mean, "cls+mean": _read_both}


@dataclass(frozen=True)
class LinearOptions(common.HeadOptions):
    """Defaults: linear probing at ImageNet's scale.

    Args:
        pool: the vector that is classified: `cls`, the class token; `mean`, the mean of the patch tokens; `cls+mean`,
            both.
        lrs: learning rates to choose among; none: `lr` is used.
        finetune_blocks: train so many last blocks and the final norm with the head.
        backbone_lr: their peak learning rate; ours, a hundredth of the head's default.
        crop_share: the side of the centre crop over that of the scaled image; 0.875 is the usual 224 of 256.
    """

    size: tuple[int, int] = (224, 224)
    batch: int = 256
    pool: str = "cls"
    lrs: tuple[float, ...] = ()
    finetune_blocks: int = 0
    backbone_lr: float = 1e-5
    crop_share: float = 1.0


def evaluate(
    backbone: Backbone,
    train_source: LabelledSource,
    val_source: LabelledSource,
    options: LinearOptions = LinearOptions(),
) -> dict[str, float]:
    """Train a linear head, alone or with a copy of the backbone, and score it on held-out images.

    Returns:
        `top1` in [0, 1] and `loss`, the held-out cross-entropy.

    Raises:
        UserError: unfit data or settings; a head that diverges.
    """
    return measure(backbone, (train_source, val_source), options).metrics


def measure(backbone: Backbone, data: command.Pair, options: LinearOptions) -> common.Result:
    """`evaluate`, with what intervals, results.json and pictures need."""
    common.check_inputs(backbone, data, "classes", options)
    check_settings(backbone, options)
    training, validation = common.labelled(data[0], options), common.View(data[1])
    seconds: dict[str, float] = {}
    about: dict[str, Any] = common.names_of(training, options)
    with common.frozen(backbone, POOLS[options.pool], options) as extractor:
        with common.timed(seconds, "fit"):
            memory = None
            if options.lrs:
                memory = common.remember(extractor, training_set(training, options), options)
                chosen, tried = choose_lr(extractor, training, options, memory)
                about["chosen_lr"] = {"lr": chosen, "held_out_top1": tried, "images": round(HELD_OUT * len(training))}
                options = replace(options, lr=chosen, lrs=())
            reader, head = fit(extractor, training, options, memory)
        with common.timed(seconds, "score"):
            result = score(reader, head, validation, options)
    result.seconds, result.about = seconds, about
    return result


def check_settings(backbone: Backbone, options: LinearOptions) -> None:
    """Raises UserError for a setting out of range."""
    if options.batch < 2:
        raise UserError("batch=1: batch-norm on one vector has no statistics; use a batch of 2 or more")
    if options.pool not in POOLS:
        raise UserError(f"pool={options.pool}: choose {', '.join(POOLS)}")
    if not all(0 < lr < math.inf for lr in (*options.lrs, options.backbone_lr)):
        raise UserError(f"lrs={list(options.lrs)}, backbone_lr={options.backbone_lr}: must be positive")
    if not 0 <= options.finetune_blocks <= backbone.depth:
        raise UserError(f"finetune_blocks={options.finetune_blocks}: choose 0 … {backbone.depth} of {backbone.name}")
    if options.finetune_blocks and (options.lrs or options.blocks > 1):
        raise UserError("finetune_blocks trains one copy of the last blocks, and reads one: leave out lrs and blocks")
    if options.finetune and (options.lrs or options.finetune_blocks):
        raise UserError("finetune trains the whole backbone with one head: leave out lrs and finetune_blocks")
    if not 0 < options.crop_share <= 1:
        raise UserError(f"crop_share={options.crop_share}: choose a share in (0, 1]")


class CentreCropped:
    """Images scaled to cover `size / share` and cropped to `size` at the centre; mirrored at random with `flip`."""

    def __init__(self, source: LabelledSource, size: tuple[int, int], share: float, flip: bool = False) -> None:
        self.size = size
        self.covering = LabelledDataset(source, size=(round(size[0] / share), round(size[1] / share)), flip=flip)

    def __len__(self) -> int:
        return len(self.covering)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        image, label = self.covering[key]
        top, left = (
            (have - want) // 2 for have, want in zip((image.shape[-2], image.shape[-1]), self.size, strict=True)
        )
        return image[:, top : top + self.size[0], left : left + self.size[1]], label


def training_set(source: LabelledSource, options: LinearOptions) -> CentreCropped:
    return CentreCropped(source, options.size, options.crop_share, options.augment)


def new_head(backbone: Backbone, classes: int, options: LinearOptions) -> nn.Module:
    """The head's first weights: a function of the seed."""
    width = backbone.embed_dim * options.blocks * (2 if options.pool == "cls+mean" else 1)
    return common.seeded(lambda: build_head(HEADS[options.head], width, classes), options.seed)


def choose_lr(
    extractor: common.FrozenBackbone,
    source: LabelledSource,
    options: LinearOptions,
    memory: common.Memory | None = None,
) -> tuple[float, dict[str, float]]:
    """The learning rate whose head does best on a held-out tenth of the training split, and what each did there.

    All heads are fitted at once: same first weights, same batches, their own steps.

    Args:
        memory: the features of the training split, if they are kept.

    Raises:
        UserError: too few images; every head diverges.
    """
    held = round(HELD_OUT * len(source))
    if held < 1 or len(source) - held < 2:
        raise UserError(f"{len(source)} training images are too few to hold a tenth out: give one --lr")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(options.seed)).tolist()
    rest, aside = (common.View(source, indices) for indices in (order[held:], order[:held]))
    heads = [new_head(extractor.backbone, source.num_classes, options) for _ in options.lrs]
    together = LinearBNHeads([head for head in heads if isinstance(head, LinearBNHead)]).to(extractor.device)
    groups = [(list(head.parameters()), lr) for head, lr in zip(together.heads, options.lrs, strict=True)]
    common.train_head(
        extractor,
        together,
        heads_loss,
        rest,
        options,
        dataset=training_set(rest, options),
        memory=None if memory is None else memory.subset(order[held:]),
        groups=groups,
        stage="choice",
    )
    with torch.no_grad():
        if memory is None:
            features, labels = common.extract(
                extractor, CentreCropped(aside, options.size, options.crop_share), options, "choosing"
            )
        else:
            features, labels = memory.batch(order[:held], extractor.device)
        hits = (together(features).argmax(2) == labels).sum(1)
    diverged = [not all(bool(value.isfinite().all()) for value in head.parameters()) for head in together.heads]
    shares = [0.0 if bad else share for bad, share in zip(diverged, (hits / held).tolist(), strict=True)]
    # The smallest of those that do best.
    best = max(zip(shares, options.lrs, strict=True), key=lambda pair: (pair[0], -pair[1]))[1]
    return best, {f"{lr:g}": share for lr, share in zip(options.lrs, shares, strict=True)}


Extractor = Any


def fit(
    extractor: common.FrozenBackbone,
    source: LabelledSource,
    options: LinearOptions,
    memory: common.Memory | None = None,
) -> tuple[Extractor, nn.Module]:
    """A reader of images and a trained module on what it reads: frozen features and the head, or hidden states and
    the last blocks with the head.
    """
    head = new_head(extractor.backbone, source.num_classes, options).to(extractor.device)
    dataset = training_set(source, options)
    if not options.finetune_blocks:
        return common.fit(extractor, head, classification_loss, source, options, dataset=dataset, memory=memory)
    trunk = Trunk(extractor, options.finetune_blocks)
    tail = Tail(trunk, options.finetune_blocks, head)
    groups = [(list(head.parameters()), options.lr), (tail.trained, options.backbone_lr)]
    trained = common.train_head(trunk, tail, classification_loss, source, options, dataset=dataset, groups=groups)
    return trunk, trained


class Trunk:
    """Images to the tokens [B T D] that enter the last `blocks` blocks, without gradients."""

    def __init__(self, extractor: common.FrozenBackbone, blocks: int) -> None:
        self.extractor, self.device = extractor, extractor.device
        self.stop = extractor.backbone.depth - blocks
        self.state: Hidden | None = None

    def __call__(self, images: Tensor) -> Tensor:
        extractor = self.extractor
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=extractor.bf16):
            hidden = extractor.backbone(extractor.normalised(images), stop=self.stop)
        self.state = hidden._replace(tokens=hidden.tokens[:0])  # the rotary table and the grid: the same for all
        return hidden.tokens.float()


class Tail(nn.Module):
    """A copy of the last blocks and the final norm, and the head on them; stochastic depth stays off."""

    def __init__(self, trunk: Trunk, blocks: int, head: nn.Module) -> None:
        super().__init__()
        extractor = trunk.extractor
        self.trunk, self.head, self.read, self.bf16 = trunk, head, extractor.read, extractor.bf16
        self.backbone = copy.deepcopy(extractor.backbone)
        model = self.backbone.model
        for index in range(trunk.stop):
            model.blocks[index] = nn.Identity()  # the trunk has them
        parts = [*model.blocks[trunk.stop :], getattr(model, self.backbone.final_norm)]
        self.backbone.requires_grad_(False)
        self.trained = [parameter.requires_grad_() for part in parts for parameter in part.parameters()]

    def train(self, mode: bool = True) -> Tail:
        self.training = mode
        self.head.train(mode)
        self.backbone.eval()
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """[B T D] to logits [B C]."""
        assert self.trunk.state is not None
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.backbone(self.trunk.state._replace(tokens=tokens), start=self.trunk.stop)
        return self.head(self.read(features).float())


def score(reader: Extractor, head: nn.Module, source: LabelledSource, options: LinearOptions) -> common.Result:
    """The metrics of a trained head (`evaluate` names them)."""
    hits: list[Tensor] = []
    losses: list[Tensor] = []
    pictures: list[tuple[str, Any]] = []
    loss = torch.zeros((), dtype=torch.float64, device=reader.device)
    with torch.no_grad():
        for images, targets in common.in_order(
            CentreCropped(source, options.size, options.crop_share), options, "validation"
        ):
            labels = torch.stack(targets).to(reader.device)
            logits = head(reader(images))
            found = logits.argmax(1)
            hits.append(found == labels)
            loss += classification_loss(logits, labels).double() * len(labels)
            losses.append(nn.functional.cross_entropy(logits, labels, reduction="none"))
            for image, label, guess in zip(images, targets, found.tolist(), strict=True):
                if len(pictures) >= options.save_images:
                    break
                pictures.append(_picture(len(pictures), image, int(label), guess, source.class_names))
    metrics = {"top1": float(torch.cat(hits).sum().double() / len(source)), "loss": float(loss / len(source))}
    rows = intervals.mean_rows(torch.stack([torch.cat(hits).double(), torch.cat(losses).double()], 1).cpu())
    return common.Result(metrics, rows, intervals.means("top1", "loss"), pictures=pictures)


def _picture(index: int, image: Tensor, label: int, guess: int, names: Sequence[str]) -> tuple[str, Any]:
    """The image in a frame, and both classes in its name."""
    from dino_value.eval import pictures

    true, said = (names[one].replace("/", "_") for one in (label, guess))
    return f"{index:04d}_is_{true}_said_{said}", pictures.framed(pictures.photograph(image), label == guess)


def flags(parser: Any) -> None:
    defaults = EVALUATION.defaults
    parser.add_argument("--head", default=defaults.head, choices=list(HEADS), help="what is trained")
    parser.add_argument("--pool", default=defaults.pool, choices=list(POOLS), help="class token, mean patch, or both")
    parser.add_argument(
        "--lrs", default=defaults.lrs, type=float, nargs="+", help="choose among these on a tenth of the training split"
    )
    parser.add_argument(
        "--finetune-blocks", default=defaults.finetune_blocks, type=int, metavar="K", help="train the last K blocks too"
    )
    parser.add_argument("--backbone-lr", default=defaults.backbone_lr, type=float, help="of the blocks trained")
    parser.add_argument(
        "--crop-share", default=defaults.crop_share, type=float, help="of the scaled side; 0.875 is 224 of 256"
    )


EVALUATION = common.Evaluation(
    name="linear",
    description="Classification by a linear head on features, frozen or fine-tuned: top-1.",
    layout="imagefolder",
    defaults=LinearOptions(),
    open=command.open_pair("imagefolder"),
    measure=measure,
    describe=command.describe_pair,
    flags=flags,
    headline=("top1",),
)


def main(argv: Sequence[str]) -> int:
    """The command; see `--help`."""
    return command.run(EVALUATION, argv)


if __name__ == "__main__":
    common.script(main)
