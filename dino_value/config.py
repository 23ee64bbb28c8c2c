"""The typed configuration: YAML and `key=value`, unknown keys refused.

Names of parts are written out here, so that a refusal does not wait for torch; tests hold them to the registries.
Defaults are the method's published setting where it gives one, else DINO's (main_dino.py); others say why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from dino_value.errors import UserError
from dino_value.files import write_text

MASKS = ["unet", "sit"]  # learned; plugins add to these and to CHOICES
CONTROLS = ("random_masks", "attention")  # masks that no label and no learning shape
LARGEST = 1e6  # `designer.strength`: value.targets.LARGEST
CLOSED_FORMS = ("weights", "best_of_n", "targets")
LABEL_KEYS = {"seg": "data.ade20k", "depth": "data.nyuv2", "classes": "data.classes"}
ADAM_BURN_IN = 20  # steps: after the first, Adam's direction lives in 6 of 150,080 coordinates (method section 8)
TRACKERS = ["tensorboard", "wandb"]
NOISE = ("random_targets",)  # the control of `targets` that no label shapes
RESERVED = (*CONTROLS, *CLOSED_FORMS, *NOISE)  # of `designer.name`: no plugin's


@dataclass
class DataConfig:
    """Where images and labels come from. `scenes` in place of a path is the embedded data set."""

    unlabeled: str = MISSING  # a folder of images, nested or not, or of WebDataset shards; or a pattern of them
    field: str | None = (
        None  # of shards: a sample's image, "input.jpg" or "jpg;img"; null: the first of jpg, jpeg, png, …
    )
    ade20k: str | None = None  # ADEChallengeData2016
    nyuv2: str | None = None  # the folder of nyu_depth_v2_labeled.mat and splits.mat, or of lists of pairs
    classes: str | None = None  # a folder with train/ and val/, one sub-folder of images a class
    workers: int = 2  # loader processes for the unlabeled stream
    in_memory: bool = False  # decode once, the labelled images too; for small sets of equally sized images
    skip_unreadable: bool = False  # go on without images that cannot be read, and count them; else they end the run
    # Values that become black and white in images deeper than 8 bits, [0, 4095] for 12 in 16; by default the type's or,
    # where it says, the file's own; pixels with a sign, of 32 bits or in floating point are refused without it.
    range: list[float] = dataclasses.field(default_factory=list)
    max_pixels: int = 178_956_970  # an image of more is refused by its header; PIL's own limit
    depth_units: float = 1000.0  # units a metre of depth maps in integers: millimetres; KITTI: 256, TUM: 5000
    max_depth: float = 10.0  # metres, beyond which depth counts as unknown: NYUv2's sensor; KITTI: 80
    group_pattern: str | None = None  # regex on a label file's stem; images of one group never part train from meta
    neighbours: int = 1  # or: this many consecutive labelled images are one group, as frames of one place


@dataclass
class ViewsConfig:
    """Multi-crop and DINO augmentations; sizes in pixels."""

    global_size: int = 224
    local_size: int = 96
    local_count: int = 6
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    flip: float = 0.5  # probability, as is jitter
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)  # probability for the first, second global and the local views
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.2  # second global view only
    augment: str = "kornia"  # on the device; or kornia_compiled: by torch.compile; or torchvision: in loader processes


@dataclass
class BackboneConfig:
    """Which model, what it begins with, how it runs. What it says of a weights file is `weights.Reading`."""

    name: str = "vit_base_patch16_224"  # any timm ViT
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed to timm
    weights: str | None = None  # a local file
    min_match: float = 0.9  # refuse weights that fill less of the model
    # Parts that may stay random where the file lacks them: patch_embed, pos_embed, cls_token, reg_token, norm_pre,
    # norm. None by default: no share of the whole would show that one is missing.
    random: list[str] = field(default_factory=list)
    prefix: str | None = None  # of the names to take; by default what a vision transformer's names show, EMA first
    table: list[int] = field(default_factory=list)  # rows and columns of the file's positions; by default a square
    positions: str = "auto"  # how they are resized: as the layout's authors do; or timm, dino, plain (docs/training.md)
    keep_grid: bool = False  # keep the positions' table as it was trained, not resampled to views.global_size
    attention: str = "sdpa"  # or math: plain matrix products; xformers; varlen: all crop sizes in one pass; auto
    drop_path_mode: str = "timm"  # a mask; or subset: stochastic depth that leaves out the work, as DINOv2's
    compile: bool = False  # torch.compile, block by block
    checkpointing: bool = False  # less memory for a third more work: the backward pass runs each block again


@dataclass
class IBOTConfig:
    """Patches that the student does not see (DINOv2; docs/architecture.md)."""

    weight: float = 0.0  # DINOv2: 1
    mask_probability: float = 0.5  # share of the global views that are masked
    mask_ratio: tuple[float, float] = (0.1, 0.5)  # hidden share of a masked view's patches, from … to
    separate_head: bool = False  # of its own for patches, of the same sizes; true in DINOv3


@dataclass
class GramConfig:
    """Patch similarities of an earlier teacher (DINOv3, section 4)."""

    weight: float = 0.0  # DINOv3's paper: 2
    start: int = 0  # step; the paper begins late, after 1M steps
    refresh: int = 10_000  # steps after which the Gram teacher is the EMA teacher again (the paper's)
    level: str = "image"  # similarities within an image, or among all patches of the batch
    negatives: str = "keep"  # or clip, clip_teacher: similarities below 0 count as 0
    normalise: bool = True  # patches first, so that similarities are cosines


@dataclass
class IJEPAConfig:
    """I-JEPA's predictor and blocks (arXiv 2301.08243, appendix A.1)."""

    width: int = 384  # of the predictor
    depth: int = 6  # published: 12 for ViT-H, 16 for ViT-g
    heads: int = 6  # width 64 each; the published code has the encoder's number
    targets: int = 4  # blocks to predict in each image
    target_scale: tuple[float, float] = (0.15, 0.2)  # share of the patches, from … to
    target_aspect: tuple[float, float] = (0.75, 1.5)  # height over width
    context_scale: tuple[float, float] = (0.85, 1.0)
    context_least: int = 5  # patches that must be left to see: what 64-pixel views allow; 11 in the published runs
    beta: float = 1.0  # where smooth ℓ1 turns from squares to distances (the published code's)


@dataclass
class ObjectiveConfig:
    """Which objective; DINO head, temperatures, centre (method section 3); what DINOv2 and DINOv3 add, each off."""

    name: str = "dino"  # or ijepa, which reads teacher_momentum and the section `ijepa`
    centering: str = "mean"  # or sinkhorn: Sinkhorn-Knopp in place of the moving centre (DINOv2)
    sinkhorn_iterations: int = 3  # DINOv2's
    koleo: float = 0.0  # weight of the spread of class tokens, summed over the two global views; DINOv2: 0.1
    ibot: IBOTConfig = field(default_factory=IBOTConfig)
    gram: GramConfig = field(default_factory=GramConfig)
    ijepa: IJEPAConfig = field(default_factory=IJEPAConfig)
    out_dim: int = 8192
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    batch_norm: bool = False  # in the head, as main_dino.py --use_bn_in_head
    student_temp: float = 0.1
    teacher_temp: float = 0.04
    teacher_temp_start: float = 0.04
    teacher_temp_warmup: int = 0  # steps from start to teacher_temp
    center_momentum: float = 0.9
    teacher_momentum: float = 0.996  # cosine to 1
    freeze_last_layer: int = 0  # steps
    head: str | None = None  # a DINO or DINOv2 training checkpoint whose heads, and centre, begin this run


@dataclass
class OptimConfig:
    batch_size: int = 256  # of all processes together
    lr: float = 4.15e-6  # ADE20K ViT-B, later text
    lr_end: float = 0.0
    warmup: int = 1000
    weight_decay: float = 0.04
    weight_decay_end: float = 0.04
    clip: float = 1.0
    freeze_backbone: int = 0  # steps: a fresh head warms up before it may move the backbone
    layer_decay: float = 1.0  # of lr, from one block to the block before it; 0.9 by default in DINOv2's code
    patch_embed_lr_mult: float = 1.0  # of the patch embedding's lr, besides; 0.2 in DINOv2
    skip_nonfinite: int = 0  # steps whose loss or gradient is not finite that are left out; one more ends the run
    accumulate: int = 1  # backward passes that share a step's batch, for less memory; docs/scaling.md


@dataclass
class ScopeConfig:
    blocks: int = 2  # the last k blocks and the final norm
    patterns: list[str] = field(default_factory=list)  # regexes over the backbone's parameter names, in place of blocks


@dataclass
class LookaheadConfig:
    """value.direction=lookahead: θ_S less a copy of it that the labels have trained (docs/steering.md)."""

    steps: int = 80  # m, ours: on photographs 20 steps were not reproducible, 80 were (method section 8)
    lr: float | None = None  # of the copy; null: optim.lr, as if the labels had the learner's own optimizer
    optimizer: str = "adamw"  # or sgd
    batches: int = 0  # labelled batches that the steps share in turn, their trunk run once; 0: one for each step
    contrast: bool = False  # less the same with shuffled labels: what is left is what the labels themselves say


@dataclass
class ValueConfig:
    period: int = 4  # r: designer updates every r learner steps
    burn_in: int = 0  # steps of plain self-supervision first
    warmup: int = 0  # designer-only updates when burn-in ends
    batch_size: int = 32  # the meta unlabeled batch
    direction: str = "dot"  # or cosine, adam, lookahead; random: a control
    lookahead: LookaheadConfig = field(default_factory=LookaheadConfig)
    combine: str = "weights"  # of the tasks' gradients: α (the paper), normalised, or a rule of torchjd
    guard_rate: float = 0.1  # of the multiplier that holds a guard task's V at 0 or above
    engine: str = "auto"  # the cheapest that is exact enough on the first meta batch
    radius: float | None = None  # of the finite difference, ε = radius/‖u‖; None: what is best on the first meta batch
    tolerance: float = 5e-2  # relative error of φ's gradient above which an engine is refused
    diagnose: int = 0  # designer updates between measurements on held feedback; 0 takes none
    agreement: int = (
        0  # updates between measurements of whether a direction is the labels' own (docs/steering.md); 0: none
    )
    scope: ScopeConfig = field(default_factory=ScopeConfig)


@dataclass
class DesignerConfig:
    """A mask generator or a control, a closed form without parameters, or both: `unet`, `targets`, `unet+targets`."""

    name: str = "unet"
    width: int = 16
    depth: int = 3
    stride: int = 1  # the mask is predicted at 1/stride of the resolution
    lr: float = 1.54e-4
    keep_ratio: float = 0.6
    lambda_spars: float = 0.131
    lambda_tv: float = 0.144
    fill: str = "blur"
    blur_sigma: float = 10.0  # pixels; the paper does not give it: enough to hide a 16-pixel patch
    crops: str = "global"  # or all
    teacher_views: str = "masked"  # or plain
    through_teacher: bool = False  # does φ's gradient also flow through the teacher's targets
    temperature: float = 1.0  # of `weights`: τ in standard deviations of the terms' values
    weight_clip: float = 10.0  # of `weights`: the largest weight against that of a mean term, and the inverse
    candidates: int = 4  # of `best_of_n`: local crops drawn for each one kept
    kl: float | None = 0.2  # of `targets`: the mean KL(q′‖q) of a step is at most this, in nats; null: no bound
    strength: float | None = (
        2.0  # of `targets`: s, or with kl the most it may be: long runs went to uniform outputs without
    )
    options: dict[str, Any] = field(default_factory=dict)  # what a plugin's mask generator takes besides
    start_from: str | None = None  # a run folder or checkpoint whose mask generator begins this run
    frozen: bool = False  # the mask generator stays as it is

    @property
    def mask(self) -> str | None:
        """The mask generator's name, if there is one."""
        return next((part for part in self.name.split("+") if part in MASKS), None)

    @property
    def control(self) -> str | None:
        """The control's name, if there is one."""
        return next((part for part in self.name.split("+") if part in CONTROLS), None)

    @property
    def closed_form(self) -> str | None:
        """The name of the closed form that follows labels, if there is one."""
        return next((part for part in self.name.split("+") if part in CLOSED_FORMS), None)

    @property
    def moves_targets(self) -> bool:
        """Are the teacher's targets changed?"""
        return bool({"targets", *NOISE}.intersection(self.name.split("+")))


@dataclass
class TaskConfig:
    weight: float = 1.0  # α
    head: str = "linear"
    train: int = 512  # images that fit the head
    meta: int = 128  # other images, that give g_down
    held: int = 0  # others still, that nothing learns from: for value.diagnose and the probe
    guard: bool = False  # hold this task's V at 0 or above rather than raise it


@dataclass
class FeedbackConfig:
    seg: TaskConfig = field(default_factory=lambda: TaskConfig(train=2000, meta=512))
    depth: TaskConfig = field(default_factory=lambda: TaskConfig(weight=8.0))
    classes: TaskConfig = field(default_factory=TaskConfig)  # ours: the paper's feedback is dense
    size: int = 224  # pixels, square
    batch_size: int = 32  # head-train and meta batches, each
    lr: float = 1e-3  # of the heads
    updates: int = 1  # head updates before each g_down
    pool: int = 0  # head-train batches whose features those updates share in turn, computed once; 0: one each
    lag_every: int = 10  # designer updates between measurements of how far the heads lag behind; 0: none
    warmup: int = 100  # head updates before the first g_down: a random head's gradient teaches nothing
    refresh: int = 0  # designer updates for which g_down of the whole meta pool is kept; 0: one meta batch an update
    ema: float = 0.0  # decay of a moving average of g_down; 0: none
    shuffle: bool = False  # a control: images carry each other's labels


@dataclass
class HealthConfig:
    """What a run tells of itself (docs/health.md); none of it changes what is learnt."""

    every: int = 0  # steps between measurements of RankMe, centre and k-NN; 0 takes none
    images: int = 256  # unlabeled images that RankMe is measured on: their number bounds it
    knn: str | None = None  # a folder with train/ and val/, one sub-folder a class; or scenes
    knn_images: int = 1000  # of each of the two, evenly spaced; kept in memory
    patience: int = 200  # steps that a collapse must last before it is said; healthy runs may begin uniform
    spike: float = 6.0  # standard deviations above its late mean at which a loss is said to spike; 0 says nothing


@dataclass
class CheckpointConfig:
    """Which checkpoints stay: the last ones, and if asked for some of long ago and the best."""

    every: int = 1000
    keep: int = 2
    keep_every: int = 0  # steps: checkpoints of their multiples stay for good; 0: none
    best: str | None = None  # a logged number, such as knn_top1: the checkpoint where it was best stays, as best.pt
    best_mode: str = "max"  # or min
    background: bool = False  # write from a copy in memory while training goes on


@dataclass
class DistributedConfig:
    """Several processes, started by torchrun or a cluster's launcher (docs/scaling.md)."""

    strategy: str = "ddp"  # each process holds all of the learner; or fsdp: its share of it, for less memory
    timeout: float = 600.0  # seconds that processes wait for each other, at the start and in a step; NCCL's default


@dataclass
class TrackConfig:
    """Where a run's numbers go besides metrics.jsonl (docs/tracking.md); nothing leaves the machine unless `online`."""

    to: list[str] = field(default_factory=list)  # tensorboard, wandb
    project: str = "dino-value"  # of W&B
    online: bool = False  # W&B: send at once; else RUN/wandb is for `wandb sync`

    def __post_init__(self) -> None:
        for name in self.to:
            if name not in TRACKERS:
                raise UserError(f"track.to={name}: choose {', '.join(TRACKERS)}, or several as [tensorboard,wandb]")


@dataclass
class EvaluationConfig:
    """Evaluations that `dino-value train` submits as jobs of their own (docs/launch.md); training does not wait."""

    every: int = 0  # steps between them; the last step is evaluated too; 0: none
    # what follows `dino-value eval`, without weights and --out: "seg --data ADEChallengeData2016"
    commands: list[str] = field(default_factory=list)
    job: str = ""  # flags of `dino-value launch`: "--partition NAME --gpus-per-node 1 --timeout 120"


@dataclass
class Config:
    out: str = MISSING
    # or baseline; random: φ follows a random direction; adversarial: φ raises the loss (ADIOS, arXiv 2201.13100);
    # finetune: the labels, head-train and meta, train the backbone, and nothing is self-supervised;
    # oracle: the learner steps along u itself, which no value method may; it tells whether the direction is any good
    method: str = "value"
    steps: int = 20_000
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"  # bf16 autocast where the device has it; or bf16, fp32
    matmul: str = "torch"  # of float32 linear layers on the CPU; or onednn: faster on AMD processors; or auto
    start_from: str | None = None  # a run folder or checkpoint whose teacher, head and centre begin this run
    log_every: int = 10
    plugins: list[str] = field(default_factory=list)  # modules or .py files that register parts: dino_value/plugins.py
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    value: ValueConfig = field(default_factory=ValueConfig)
    designer: DesignerConfig = field(default_factory=DesignerConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def labels(self) -> dict[str, str | None]:
        """Where the labels of each section of `feedback` lie."""
        return {kind: getattr(self.data, key.removeprefix("data.")) for kind, key in LABEL_KEYS.items()}

    @property
    def designs(self) -> bool:
        """Does a designer make the learner's task?"""
        return self.method in ("value", "random", "adversarial")

    @property
    def follows(self) -> bool:
        """Is a direction kept, and followed at every step?"""
        return self.method == "oracle" or (self.designs and self.designer.closed_form is not None)

    @property
    def learns_masks(self) -> bool:
        """Is there a mask generator that learns?"""
        return self.designs and self.designer.mask is not None and not self.designer.frozen

    @property
    def needs_labels(self) -> bool:
        """Do labels have a part in this run?"""
        return self.method == "finetune" or self.follows or (self.learns_masks and self.method != "adversarial")


CHOICES: dict[str, list[str]] = {
    "method": ["value", "baseline", "random", "adversarial", "finetune", "oracle"],
    "precision": ["auto", "bf16", "fp32"],
    "matmul": ["auto", "torch", "onednn"],
    "views.augment": ["kornia", "kornia_compiled", "torchvision"],
    "objective.name": ["dino", "ijepa"],
    "objective.centering": ["mean", "sinkhorn"],
    "objective.gram.level": ["image", "batch"],
    "objective.gram.negatives": ["keep", "clip", "clip_teacher"],
    "checkpoint.best_mode": ["max", "min"],
    "backbone.attention": ["auto", "sdpa", "math", "xformers", "varlen"],
    "backbone.drop_path_mode": ["timm", "subset"],
    "value.direction": ["dot", "cosine", "adam", "lookahead", "random"],
    "value.lookahead.optimizer": ["adamw", "sgd"],
    "value.engine": ["auto", "finite_difference", "double_backward"],
    "value.combine": [
        "weights",
        "normalised",
        "upgrad",
        "dualproj",
        "pcgrad",
        "cagrad",
        "mgda",
        "imtl_g",
        "aligned_mtl",
    ],
    "designer.fill": ["blur", "mean", "noise"],
    "designer.crops": ["global", "all"],
    "designer.teacher_views": ["masked", "plain"],
    "feedback.seg.head": ["linear", "conv"],
    "feedback.depth.head": ["linear"],
    "feedback.classes.head": ["linear"],
    "distributed.strategy": ["ddp", "fsdp"],
}
_TASK_AT_LEAST = (("weight", 0), ("train", 1), ("meta", 1), ("held", 0))
_AT_LEAST: dict[str, float] = {
    "steps": 1,
    "seed": 0,
    "log_every": 1,
    "optim.batch_size": 2,
    "optim.accumulate": 1,
    "value.period": 1,
    "value.lookahead.steps": 1,
    "value.lookahead.batches": 0,
    "value.batch_size": 2,
    "feedback.batch_size": 2,
    "feedback.updates": 0,
    "feedback.pool": 0,
    "feedback.lag_every": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "checkpoint.keep_every": 0,
    "health.every": 0,
    "evaluation.every": 0,
    "health.images": 2,
    "health.knn_images": 20,
    "health.patience": 0,
    "health.spike": 0,
    "views.global_size": 1,
    "views.local_size": 1,
    "views.local_count": 0,
    "views.brightness": 0,
    "views.contrast": 0,
    "views.saturation": 0,
    "data.workers": 0,
    "data.neighbours": 1,
    "objective.sinkhorn_iterations": 1,
    "objective.koleo": 0,
    "objective.ibot.weight": 0,
    "objective.gram.weight": 0,
    "objective.gram.start": 0,
    "objective.gram.refresh": 1,
    "objective.ijepa.width": 4,
    "objective.ijepa.depth": 1,
    "objective.ijepa.heads": 1,
    "objective.ijepa.targets": 1,
    "objective.ijepa.context_least": 1,
    "objective.out_dim": 1,
    "objective.hidden_dim": 1,
    "objective.bottleneck_dim": 1,
    "objective.teacher_temp_warmup": 0,
    "objective.freeze_last_layer": 0,
    "optim.lr": 0,
    "optim.lr_end": 0,
    "optim.warmup": 0,
    "optim.weight_decay": 0,
    "optim.weight_decay_end": 0,
    "optim.freeze_backbone": 0,
    "optim.skip_nonfinite": 0,
    "value.burn_in": 0,
    "value.warmup": 0,
    "value.guard_rate": 0,
    "value.diagnose": 0,
    "value.agreement": 0,
    "designer.candidates": 1,
    "designer.weight_clip": 1,
    "feedback.refresh": 0,
    "designer.width": 1,
    "designer.depth": 0,
    "designer.stride": 1,
    "designer.lr": 0,
    "designer.lambda_spars": 0,
    "designer.lambda_tv": 0,
    "feedback.size": 1,
    "feedback.lr": 0,
    "feedback.warmup": 0,
    **{f"feedback.{task}.{key}": least for task in ("seg", "depth", "classes") for key, least in _TASK_AT_LEAST},
}
_ABOVE_ZERO = {  # each with what the message says of it
    "objective.student_temp": "logits are divided by it; DINO uses 0.1",
    "objective.ijepa.beta": "errors are divided by it; I-JEPA uses 1",
    "objective.teacher_temp": "logits are divided by it; DINO uses 0.04",
    "objective.teacher_temp_start": "logits are divided by it; DINO uses 0.04",
    "optim.clip": "it is the largest gradient norm; inf clips nothing",
    "distributed.timeout": "it is how many seconds processes wait for each other",
    "optim.layer_decay": "it multiplies the learning rate; 1 changes nothing, DINOv2 uses 0.9",
    "value.lookahead.lr": "it is the rate at which the labels train the copy; null takes optim.lr",
    "value.radius": "it is the step of the finite difference; null chooses it",
    "value.tolerance": "it is a relative error; the default is 5e-2",
    "designer.temperature": "values are divided by it; lower follows them more closely",
    "designer.blur_sigma": "it is the blur's width in pixels; the default is 10",
}
_SHARES = (  # in [0, 1]
    "views.flip",
    "views.jitter",
    "views.grayscale",
    "views.solarize",
    "views.blur",
    "backbone.min_match",
    "optim.layer_decay",
    "optim.patch_embed_lr_mult",
    "objective.ibot.mask_probability",
    "objective.ibot.mask_ratio",
    "objective.center_momentum",
    "objective.teacher_momentum",
    "feedback.ema",
)
_RANGES = {  # (low, high): most
    "views.global_scale": 1.0,
    "views.local_scale": 1.0,
    "views.blur_sigma": math.inf,
    "objective.ijepa.target_scale": 1.0,
    "objective.ijepa.target_aspect": math.inf,
    "objective.ijepa.context_scale": 1.0,
}


def load_config(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """A YAML file, or the name of a packaged one (`rooms/cpu`), with `key=value` overrides, checked.

    Raises:
        UserError: no such file, bad YAML, an unknown key (the nearest valid one is named), a value of the wrong kind.
    """
    # designer=weights is short for designer.name=weights.
    overrides = [re.sub(r"^designer=(?!\s*\{)", "designer.name=", part) for part in overrides]
    config = load_structured(source, overrides, Config)
    assert isinstance(config, Config)
    return check(config)


def load_section(name: Literal["backbone", "data"], overrides: Sequence[str]) -> Any:
    """The section `name` from `key=value`s whose keys are its own, for commands that have no configuration.

    Raises:
        UserError: as `load_config`.
    """
    given = ["out=x", "data.unlabeled=x", *(f"{name}.{part}" for part in overrides)]
    return getattr(_merged(f"--{name}", OmegaConf.create({}), given, Config), name)


def load_structured(source: str | os.PathLike[str], overrides: Sequence[str], schema: type) -> Any:
    """A YAML file, or a packaged one by name, with `key=value` overrides, as the dataclass `schema`; not yet checked.

    Raises:
        UserError: as `load_config`.
    """
    try:
        loaded = OmegaConf.load(find_config(source))
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not valid YAML: {_one_line(error)}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: not valid YAML at {error.full_key or 'its top'}: mend its brackets") from None
    except OSError as error:  # also what OmegaConf makes of a file that holds bytes or a date alone
        raise UserError(f"{source}: cannot be read as keys and values: {_one_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{source}: expected keys and values at the top level")
    return _merged(str(source), loaded, overrides, schema)


def _merged(source: str, loaded: DictConfig, overrides: Sequence[str], schema: type) -> Any:
    """`loaded` with `key=value`s, one after the other, as the dataclass `schema`."""
    tree = OmegaConf.create({})
    for part in ("", *overrides):
        if part and "=" not in part:
            raise UserError(f"override {part!r}: write key=value, for example steps=300")
        try:
            given: Any = OmegaConf.to_container(OmegaConf.from_dotlist([part]) if part else loaded)
        except (YAMLError, OmegaConfBaseException):
            where = f"{part}: not valid YAML" if part else f"{source}: not valid: a ${{…}} in it is not closed"
            raise UserError(f"{where}; mend its brackets, or quote the value") from None
        _refuse_unknown(given, schema, "", schema)
        for key in _emptied(given, schema):
            OmegaConf.update(tree, key, {}, merge=False, force_add=True)
        tree = OmegaConf.merge(tree, given)  # type: ignore[assignment]
    if any(item.name == "plugins" for item in fields(schema)):
        _load_plugins(tree)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), tree))
    except MissingMandatoryValue as error:
        raise UserError(f"{source}: {error.full_key} is not set: give {error.full_key}=VALUE") from None
    except OmegaConfBaseException as error:
        value: Any = OmegaConf.to_container(tree)
        for name in str(error.full_key or "").split("."):
            value = value.get(name) if isinstance(value, dict) else value
        raise UserError(
            f"{source}: {error.full_key}={value}: refers to what is not there; write the value itself"
        ) from None


def _load_plugins(tree: DictConfig) -> None:
    """Before anything is checked, as plugins bring names of their own; files among them become absolute paths."""
    from dino_value import plugins

    given = tree.get("plugins")
    if given is None:
        plugins.load([])
    elif OmegaConf.is_list(given):  # else it is refused with what is not of its type
        tree.plugins = plugins.resolved([str(name) for name in given])
        plugins.load(tree.plugins)


def _emptied(given: Any, schema: type, prefix: str = "") -> list[str]:
    """Keys of free mappings that `given` empties, by `{}` or null: these take the place of what was there."""
    found = []
    for item in fields(schema):
        factory: Any = item.default_factory
        if item.name not in given or not callable(factory):
            continue
        if factory is dict and not given[item.name]:
            given[item.name] = {}
            found.append(f"{prefix}{item.name}")
        elif is_dataclass(inner := type(factory())):
            found += _emptied(given[item.name], inner, f"{prefix}{item.name}.")
    return found


def bounds(key: str) -> str:
    """What `check` asks of a number, in words; empty where nothing."""
    if key in _AT_LEAST:
        return f"at least {_AT_LEAST[key]:g}"
    if key in ("designer.kl", "designer.strength"):
        return "at least 0"
    if key in _RANGES:
        return "two numbers, 0 < low <= high" + (f" <= {_RANGES[key]:g}" if math.isfinite(_RANGES[key]) else "")
    alone = {"views.hue": "in [0, 0.5]", "designer.keep_ratio": "between 0 and 1"}
    parts = ["above 0"] * (key in _ABOVE_ZERO) + ["in [0, 1]"] * (key in _SHARES)
    return alone.get(key, ", ".join(parts))


def check(config: Config) -> Config:
    """Values that a type cannot rule out; returns `config`."""

    def get(key: str) -> Any:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        return value

    for key, choices in CHOICES.items():
        if get(key) not in choices:
            raise UserError(f"{key}={get(key)}: choose {', '.join(choices)}")
    for key in _all_keys(Config, ""):
        value = get(key)
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(number, float) and not math.isfinite(number) and (key, number) != ("optim.clip", math.inf):
                raise UserError(f"{key}={value}: must be finite")
    _check_accumulate(config)
    _check_koleo(config)
    for key, least in _AT_LEAST.items():
        if get(key) < least:
            why = " (batch statistics and the loss's pairs need it)" if key.endswith("batch_size") else ""
            raise UserError(f"{key}={get(key)}: must be at least {least}{why}")
    for key, why in _ABOVE_ZERO.items():
        if get(key) is not None and get(key) <= 0:
            raise UserError(f"{key}={get(key)}: must be above 0: {why}")
    for key in _SHARES:
        value = get(key)
        if not all(0 <= share <= 1 for share in (value if isinstance(value, (tuple, list)) else (value,))):
            raise UserError(f"{key}={value}: must lie in [0, 1]")
    for key, most in _RANGES.items():
        low, high = get(key)
        if not 0 < low <= high <= most:
            limit = f" <= {most:g}" if math.isfinite(most) else ""
            raise UserError(f"{key}={get(key)}: give two numbers with 0 < low <= high{limit}")
    if not 0 <= config.views.hue <= 0.5:
        raise UserError(f"views.hue={config.views.hue}: must lie in [0, 0.5], shares of the colour circle")
    if not 0 < config.designer.keep_ratio < 1:
        raise UserError(f"designer.keep_ratio={config.designer.keep_ratio}: must lie between 0 and 1")
    _check_designer(config.designer.name)
    _check_roles(config)
    _check_channels(config)
    heads = max(1, config.designer.width // 32)
    if config.designer.mask == "sit" and (config.designer.width % 4 or config.designer.width % heads):
        raise UserError(
            f"designer.width={config.designer.width}: designer.name=sit needs a multiple of 4 that its heads (one for "
            f"every 32 channels, {heads} here) divide; choose a multiple of 32, for example {32 * heads}"
        )
    _check_direction(config)
    if config.value.agreement and not (config.designs and config.follows):
        raise UserError(
            f"value.agreement with method={config.method}, designer.name={config.designer.name}: it measures what a "
            "closed form makes of a direction; choose method=value and designer.name=targets, or set it to 0"
        )
    if config.value.diagnose and config.designs and config.needs_labels:
        for kind, path in config.labels.items():
            task: TaskConfig = getattr(config.feedback, kind)
            if path is not None and task.weight and not task.held:
                raise UserError(f"value.diagnose measures on images that teach nothing: give feedback.{kind}.held=N")
    if config.designer.closed_form == "best_of_n" and not config.views.local_count:
        raise UserError("designer.name=best_of_n chooses among local crops: set views.local_count to 1 or more")
    if config.designer.through_teacher and config.designer.teacher_views == "plain":
        raise UserError(
            "designer.through_teacher=True has no effect with designer.teacher_views=plain, where the targets do not "
            "depend on the masks; choose designer.teacher_views=masked or designer.through_teacher=false"
        )
    _check_objective(config)
    if config.objective.teacher_temp >= config.objective.student_temp:
        raise UserError(
            f"objective.teacher_temp={config.objective.teacher_temp} is not below student_temp="
            f"{config.objective.student_temp}: the teacher would not sharpen; DINO uses 0.04 and 0.1"
        )
    warms_up = config.objective.teacher_temp_warmup > 1
    if warms_up and config.objective.teacher_temp_start >= config.objective.student_temp:
        raise UserError(
            f"objective.teacher_temp_start={config.objective.teacher_temp_start} is not below student_temp="
            f"{config.objective.student_temp}: the teacher would not sharpen at first; begin lower, DINO at 0.04"
        )
    if config.health.knn is not None and not config.health.every:
        raise UserError(
            f"health.knn={config.health.knn} is measured every health.every steps, which is 0: set it, for example "
            f"health.every={max(1, config.steps // 20)}"
        )
    if bool(config.evaluation.every) != bool(config.evaluation.commands):
        raise UserError(
            f"evaluation.every={config.evaluation.every} with {len(config.evaluation.commands)} evaluation.commands: "
            "one without the other submits nothing; give both, or neither"
        )
    if config.objective.head is not None and config.objective.name != "dino":
        raise UserError(f"objective.head is DINO's: objective.name={config.objective.name} has none; leave it out")
    if config.objective.head is not None and config.start_from is not None:
        raise UserError("start_from has a head of its own: leave out objective.head, or give backbone.weights instead")
    if config.needs_labels and not any(config.labels.values()):
        raise UserError(
            f"method={config.method} needs labels: give data.ade20k=PATH, data.nyuv2=PATH and/or data.classes=PATH"
        )
    return config


def _check_direction(config: Config) -> None:
    """What a direction needs, and what the targets that follow it do."""
    v, d = config.value, config.designer
    if v.direction == "adam" and v.burn_in < ADAM_BURN_IN and config.needs_labels:
        raise UserError(
            f"value.direction=adam with value.burn_in={v.burn_in}: it reads the second moments of the learner's "
            "optimizer, and those of its first steps point along a few coordinates alone (docs/steering.md); set "
            f"value.burn_in to {ADAM_BURN_IN} or more"
        )
    if v.direction == "adam" and config.method == "oracle":
        raise UserError(
            "method=oracle with value.direction=adam: the direction reads what the learner's optimizer remembers of "
            "self-supervised steps, and the oracle takes none; choose value.direction=dot or lookahead"
        )
    if v.direction == "lookahead" and v.combine != "weights" and config.needs_labels:
        raise UserError(
            f"value.combine={v.combine} combines gradients of single tasks, and value.direction=lookahead trains on "
            "all tasks at once; choose value.combine=weights"
        )
    for key, value in (("kl", d.kl), ("strength", d.strength)):
        if value is not None and value < 0:
            raise UserError(f"designer.{key}={value}: must be at least 0; 0 leaves the targets as they are")
    if d.strength is not None and d.strength > LARGEST:
        raise UserError(
            f"designer.strength={d.strength:g}: must be at most {LARGEST:g}, where targets are one-hot for long; set "
            "it to null for what designer.kl allows"
        )
    if config.method == "random" and not config.needs_labels and d.moves_targets:
        raise UserError(
            f"method=random with designer.name={d.name}: nothing follows a direction; choose method=value for noise or "
            "designer.name=targets for targets along a random direction"
        )
    if config.designs and d.moves_targets and d.kl is None and d.strength is None:
        raise UserError("designer.name=targets needs a bound or a strength: give designer.kl or designer.strength")


def _check_objective(config: Config) -> None:
    """Options of the objective that do not go together."""
    o, i, j = config.objective, config.objective.ibot, config.objective.ijepa
    if o.name == "ijepa":
        other = {
            "objective.ibot.weight": i.weight,
            "objective.koleo": o.koleo,
            "objective.gram.weight": o.gram.weight,
            "objective.freeze_last_layer": o.freeze_last_layer,
        }
        set_too = [f"{key}={value:g}" for key, value in other.items() if value]
        set_too += ["objective.centering=sinkhorn"] * (o.centering == "sinkhorn")
        set_too += ["objective.batch_norm=true"] * o.batch_norm
        if set_too:
            raise UserError(
                f"objective.name=ijepa with {set_too[0]}: I-JEPA has no prototypes and no class token to train; leave "
                "it out, or choose objective.name=dino"
            )
        if config.views.local_count:
            raise UserError(
                f"objective.name=ijepa with views.local_count={config.views.local_count}: I-JEPA predicts within a "
                "view and has no use for local ones; set views.local_count=0"
            )
        if j.width % 4 or j.width % j.heads:
            raise UserError(
                f"objective.ijepa.width={j.width}: must be a multiple of 4 and of objective.ijepa.heads={j.heads}"
            )
    low, high = i.mask_ratio
    if i.weight and not (low <= high and high > 0 and i.mask_probability > 0):
        raise UserError(
            f"objective.ibot.mask_ratio={i.mask_ratio}, mask_probability={i.mask_probability}: no patch would be "
            "hidden; give the lower ratio first, and both above 0"
        )
    if i.weight and o.batch_norm:
        raise UserError(
            "objective.ibot with objective.batch_norm=true: a batch may hide too few patches for statistics; set "
            "objective.batch_norm=false"
        )


def _check_accumulate(config: Config) -> None:
    size, passes = config.optim.batch_size, config.optim.accumulate
    if passes > 1 and size % passes:
        raise UserError(
            f"optim.accumulate={passes} passes cannot share optim.batch_size={size} equally; choose a divisor of it"
        )


def _check_koleo(config: Config) -> None:
    """Before the bounds, whose message would not say why."""
    sizes = {"optim.batch_size": config.optim.batch_size // max(1, config.optim.accumulate)}
    if config.designs:
        sizes["value.batch_size"] = config.value.batch_size
    for key, size in sizes.items():
        if config.objective.koleo and size < 2:
            raise UserError(
                f"objective.koleo={config.objective.koleo} with {key}={size}: a feature needs a neighbour among "
                f"the other images of its crop; raise {key} to 2 or more, or set objective.koleo=0"
            )


def _check_designer(name: str) -> None:
    parts = name.split("+")
    kinds = [[part for part in parts if part in kind] for kind in ((*MASKS, *CONTROLS), CLOSED_FORMS + NOISE)]
    if sum(map(len, kinds)) != len(parts) or any(len(found) > 1 for found in kinds):
        raise UserError(
            f"designer.name={name}: choose {', '.join([*MASKS, *RESERVED])}, or "
            f"masks and a closed form as in {MASKS[0]}+{CLOSED_FORMS[0]}"
        )


def _check_channels(config: Config) -> None:
    channels = config.backbone.kwargs.get("in_chans", 3)
    if channels != 3 and config.designs and (config.designer.mask or config.designer.control):
        raise UserError(
            f"backbone.kwargs.in_chans={channels} with designer.name={config.designer.name}: mask generators read "
            "three channels; choose designer.name=weights or best_of_n, or method=baseline or finetune"
        )


def _check_roles(config: Config) -> None:
    """What a method asks of the designer, and what a designer has no use for."""
    d = config.designer
    if config.method == "adversarial" and (not config.learns_masks or d.closed_form):
        raise UserError(
            f"method=adversarial needs a mask generator that learns: choose designer.name={MASKS[0]}, not frozen"
        )
    if config.designs and d.mask is None:
        for key, given in (("designer.start_from", d.start_from is not None), ("designer.frozen", d.frozen)):
            if given:
                raise UserError(f"{key}: designer.name={d.name} has no mask generator; leave it out")
    if d.control == "attention" and d.crops == "all":
        raise UserError("designer.name=attention looks at global crops: set designer.crops=global")


def save_config(config: Any, path: Path) -> None:
    """The resolved configuration as YAML, complete or not at all."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def packaged(source: str | os.PathLike[str]) -> Path:
    """The file `source`, or where there is none the packaged one of that name."""
    path = Path(source)
    inside = _packaged_folder() / path
    return inside if not path.exists() and inside.is_file() else path


def _packaged_folder() -> Path:
    # An editable installation is found through its finder; a plain checkout has the folder beside the package.
    with contextlib.suppress(ModuleNotFoundError):
        return Path(str(resources.files("dino_value.configs")))
    return Path(str(resources.files("dino_value"))).parent / "configs"


def find_config(source: str | os.PathLike[str]) -> Path:
    """The file `source`, or the packaged one of that name, with or without its ending.

    Raises:
        UserError: there is neither.
    """
    path = Path(source)
    if path.is_file():
        return path
    folder = _packaged_folder()
    for candidate in (folder / path, folder / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))
    raise UserError(f"{source}: no such configuration file; packaged ones: {', '.join(known)}")


def _refuse_unknown(given: Any, schema: type, prefix: str, root: type) -> None:
    if not isinstance(given, dict):
        raise UserError(
            f"{prefix.rstrip('.') or 'configuration'}: expected a section of keys and values, got {given!r}"
        )
    sections = {item.name: item for item in fields(schema)}
    for key, value in given.items():
        if key not in sections:
            near = difflib.get_close_matches(f"{prefix}{key}".lower(), _all_keys(root, "", True), n=1, cutoff=0.0)
            name = " ".join(f"{prefix}{key}".split())  # whatever is in it, one line
            raise UserError(f"unknown configuration key {name}; did you mean {near[0]}?")
        default = sections[key].default
        if isinstance(default, tuple) and isinstance(value, list) and len(value) != len(default):
            raise UserError(
                f"{prefix}{key}={value}: expected {len(default)} numbers"
            )  # OmegaConf does not name the key
        factory: Any = sections[key].default_factory
        inner = type(factory()) if callable(factory) else None
        if inner is not None and is_dataclass(inner):
            _refuse_unknown(value, inner, f"{prefix}{key}.", root)
        elif not _fits(schema, key, value):
            hint = get_type_hints(schema)[key]
            raise UserError(f"{prefix}{key}={'null' if value is None else value}: expected {_in_words(hint)}")


def _fits(schema: type, key: str, value: Any) -> bool:
    """Whether OmegaConf takes a value for a field; of a reference to another key that is known later."""
    if value is None and get_origin(get_type_hints(schema)[key]) is dict:
        return True
    try:
        OmegaConf.merge(OmegaConf.structured(schema), {key: value})
    except (OmegaConfBaseException, TypeError, ValueError):
        return False
    return True


def _in_words(hint: Any) -> str:
    """What a field's type asks for."""
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    if type(None) in get_args(hint):
        return f"{_in_words(kinds[0])}, or null"
    if get_origin(hint) is tuple:
        return f"{len(kinds)} numbers, for example [{', '.join('0.5' for _ in kinds)}]"
    if get_origin(hint) is list:
        return f"a list, for example [{'1, 2' if kinds[0] is int else 'a, b'}]"
    if get_origin(hint) is dict:
        return "keys and values, for example {depth: 3}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _all_keys(schema: type, prefix: str, sections: bool = False) -> list[str]:
    """With `sections`, their names too."""
    keys: list[str] = []
    for item in fields(schema):
        factory: Any = item.default_factory
        inner = type(factory()) if callable(factory) else None
        if inner is not None and is_dataclass(inner):
            keys += [f"{prefix}{item.name}"] * sections + _all_keys(inner, f"{prefix}{item.name}.", sections)
        else:
            keys.append(f"{prefix}{item.name}")
    return keys


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
