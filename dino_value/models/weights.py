"""Foreign weights: files as DINO, DINOv2, DINOv3, timm and transformers write them, under timm's names.

A layout is recognised by its names, and timm's own filter does the renaming that timm knows. What timm lacks is here:
the layouts of transformers, whole training checkpoints, and the interpolation of position embeddings as their authors
do it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_value.errors import UserError
from dino_value.models.weight_files import WRAPPING, network, read_pickle


class Positions(NamedTuple):
    """How a table of position embeddings is brought to another grid: bicubic, as timm unless told otherwise.

    `offset` is added to the wanted grid before the scale is taken (DINO and DINOv2: 0.1, against rounding), which moves
    the sampling points a little; `antialias` as in `torch.nn.functional.interpolate`. `grid` (h, w) is that of a table
    which is not square.
    """

    offset: float = 0.0
    antialias: bool = True
    grid: tuple[int, int] | None = None

    @classmethod
    def of(cls, saved: Sequence[Any]) -> Positions:
        """From what a header or a checkpoint keeps of it: a list."""
        offset, antialias, *grid = saved
        return cls(offset, antialias, tuple(grid[0]) if grid and grid[0] else None)

    def resample(self, table: Tensor, grid: tuple[int, int], prefix: int, old: tuple[int, int] | None = None) -> Tensor:
        """A table [1 P+N D] of N = h·w positions after P prefix tokens to [1 P+N' D] on `grid`; `old` is (h, w)."""
        side = math.isqrt(table.shape[1] - prefix)
        old = old or self.grid or (side, side)
        if old == grid:
            return table
        image = table[:, prefix:].float().unflatten(1, old).permute(0, 3, 1, 2)
        size: dict[str, Any] = {"size": grid}
        if self.offset:
            size = {"scale_factor": tuple((new + self.offset) / was for new, was in zip(grid, old, strict=True))}
        image = F.interpolate(image, mode="bicubic", antialias=self.antialias, **size)
        return torch.cat([table[:, :prefix], image.flatten(2).mT.to(table.dtype)], dim=1)


TIMM = Positions()
DINO = Positions(offset=0.1, antialias=False)
PLAIN = Positions(antialias=False)  # transformers
RULES = {"timm": TIMM, "dino": DINO, "plain": PLAIN}
"""What `backbone.positions` chooses from."""


@dataclass(frozen=True)
class Reading:
    """What a weights file cannot say of itself: the keys of the section `backbone` that are about reading it.

    Raises:
        UserError: a name or size that none can have.
    """

    prefix: str | None = None
    table: Sequence[int] = ()
    positions: str = "auto"
    random: Sequence[str] = ()

    @classmethod
    def of(cls, settings: Any) -> Reading:
        """From the configuration's section `backbone`."""
        return cls(settings.prefix, tuple(settings.table), settings.positions, tuple(settings.random))

    def __post_init__(self) -> None:
        if self.positions not in ("auto", *RULES):
            raise UserError(f"backbone.positions={self.positions}: choose auto, {', '.join(RULES)}")
        if self.table and not (len(self.table) == 2 and min(self.table) > 0):
            raise UserError(f"backbone.table={list(self.table)}: give rows and columns of patches, for example [14,28]")
        for name in self.random:
            if name not in PARTS:
                raise UserError(f"backbone.random={name}: choose among {', '.join(PARTS)}")


PARTS = {
    "patch_embed": r"patch_embed\.",
    "pos_embed": r"pos_embed$",
    "cls_token": r"cls_token$",
    "reg_token": r"reg_token$",
    "norm_pre": r"norm_pre\.",
    "norm": r"(fc_)?norm\.",
}
"""What every patch passes through: few tensors, whose loss no share of the whole would show."""


def part_of(name: str) -> str | None:
    """Which of `PARTS` a tensor of a timm model belongs to."""
    return next((part for part, pattern in PARTS.items() if re.match(pattern, name)), None)


@dataclass(frozen=True)
class Weights:
    """A network of a file: tensors as its author or timm names them, and what its layout implies."""

    tensors: dict[str, Tensor]
    format: str
    positions: Positions
    ignored: list[str]  # left out by intent: heads, mask tokens, constants

    def told(self, reading: Reading) -> Weights:
        """The same with what the user says of its positions."""
        positions = self.positions
        if reading.positions != "auto":
            positions = RULES[reading.positions]._replace(grid=positions.grid)
        if reading.table:
            positions = positions._replace(grid=(reading.table[0], reading.table[1]))
        return replace(self, positions=positions)

    @property
    def width(self) -> int | None:
        weight = self.tensors.get("patch_embed.proj.weight")
        return None if weight is None else weight.shape[0]

    @property
    def depth(self) -> int:
        blocks = [re.match(r"blocks\.(\d+)\.", name) for name in self.tensors]
        return 1 + max((int(found[1]) for found in blocks if found), default=-1)

    @property
    def registers(self) -> int:
        return next((self.tensors[n].shape[1] for n in _REGISTERS if n in self.tensors), 0)

    def biases(self) -> list[str]:
        """Names of DINOv3's query, key and value biases that do something; the key's never does."""
        if self.format.startswith("DINOv3"):
            names = [name for name in self.tensors if name.endswith("attn.qkv.bias")]
            return [name for name in names if any(part.any() for part in self.tensors[name].chunk(3)[::2])]
        return []


_REGISTERS = ("register_tokens", "storage_tokens", "reg_token")


# Recognising


def recognise(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> Weights:
    """Whose layout these names are; transformers' are changed into those of the code it follows.

    DINO's backbone and timm's ViT have the same names. A pickle (`header` None) without a classifier is then taken for
    DINO's, as its backbone-only files are; they differ in how positions are interpolated. A checkpoint of our own is
    timm's with `backbone.model.` before it.
    """
    whole = any(name.startswith("backbone.") for name in tensors)
    ours = any(name.startswith("backbone.model.") for name in tensors)
    body = {
        _PREFIX.sub("", name.removeprefix("backbone.")): value
        for name, value in tensors.items()
        if name.startswith("backbone.") or not whole
    }
    ignored = [name for name in tensors if whole and not name.startswith("backbone.")]
    library = ""
    if "embeddings.cls_token" in body:
        body, library = _from_transformers(body), " (transformers)"
    # FSDP's chunks of blocks, blocks.CHUNK.INDEX., carry the running index.
    body = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): value for name, value in body.items()}
    ignored += [name for name in body if _IGNORED.search(name)]
    # timm's filter knows DINOv2 by its mask token.
    body = {name: value for name, value in body.items() if name == "mask_token" or not _IGNORED.search(name)}
    scaled = any(name.endswith("ls1.gamma") for name in body)
    if "storage_tokens" in body:
        kind, positions = "DINOv3", TIMM
    elif "register_tokens" in body:  # its published models ask for offset 0 and antialias
        kind, positions = "DINOv2 with registers", TIMM
    elif "mask_token" in body and scaled:
        kind, positions = "DINOv2", PLAIN if library else DINO
    elif library:
        kind, positions = "ViT", PLAIN
    elif ours:
        kind, positions = "timm", TIMM
    elif whole or (header is None and "head.weight" not in body and not scaled and "reg_token" not in body):
        kind, positions = "DINO", DINO
    else:
        kind, positions = "timm", TIMM
    if header and "positions" in header:  # our own
        positions = Positions.of(json.loads(header["positions"]))
    return Weights(body, kind + library, positions, ignored)


_PREFIX = re.compile(r"^(model|vit|dinov2|dinov2_with_registers|dinov3_vit)\.")
# Used in pretraining alone, or constants that the model computes for itself.
_IGNORED = re.compile(
    r"^mask_token$|^rope_embed\.|\.bias_mask$|^local_cls_norm\.|^pooler\.|^(dino|ibot)_head\.|^head\.mlp"
)


def _from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ViTModel, Dinov2Model, Dinov2WithRegistersModel and DINOv3ViTModel, of transformers 4 and 5, to Meta's names."""
    v3 = "embeddings.position_embeddings" not in tensors
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        for pattern, new in _TRANSFORMERS:
            name = re.sub(pattern, new, name)
        found[name.replace("register_tokens", "storage_tokens") if v3 else name] = value
    gated = [name for name in found if name.endswith("mlp.gate.weight")]
    for name in sorted(found):
        if ".mlp.gate." in name:
            up = name.replace("gate", "up")
            if v3:
                found[name.replace("gate", "w1")], found[name.replace("gate", "w2")] = found.pop(name), found.pop(up)
            else:
                found[name.replace("gate", "w12")] = torch.cat([found.pop(name), found.pop(up)])
    for old, new in (("mlp.up.", "mlp.fc1."), ("mlp.down.", "mlp.w3." if gated else "mlp.fc2.")):
        found = {name.replace(old, new): value for name, value in found.items()}
    for name in [name for name in found if name.endswith("attn.q.weight")]:
        stem = name.removesuffix("q.weight")
        found[f"{stem}qkv.weight"] = torch.cat([found.pop(f"{stem}{part}.weight") for part in "qkv"])
        biases = [found.pop(f"{stem}{part}.bias", None) for part in "qkv"]
        known = next((bias for bias in biases if bias is not None), None)
        if known is not None:
            filled = [torch.zeros_like(known) if bias is None else bias for bias in biases]
            found[f"{stem}qkv.bias"] = torch.cat(filled)
    return found


_TRANSFORMERS = (
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.mlp\.(gate|up|down)_proj\.", r".mlp.\1."),
)


# To timm


def to_timm(weights: Weights, model: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under the names of `model`, a timm ViT, at its patch and grid; and what was resampled, in words."""
    tensors, notes = dict(weights.tensors), []
    if weights.format.startswith("DINOv2"):
        tensors.setdefault("mask_token", torch.zeros(1))
    if weights.format.startswith("DINOv3") and getattr(model.blocks[0].attn, "q_bias", None) is None:
        tensors = {name: value for name, value in tensors.items() if not name.endswith("attn.qkv.bias")}
    patch, wanted = tensors.get("patch_embed.proj.weight"), model.patch_embed.proj.weight
    if patch is not None and patch.ndim == 4 and patch.shape[2:] != wanted.shape[2:]:
        notes.append(f"patch embedding resampled from {patch.shape[-1]} to {wanted.shape[-1]} pixels")
    notes += _fit_table(tensors, weights, model)
    _fit_norm(tensors, model)
    module = importlib.import_module(type(model).__module__)
    # The filter may assume a layout that this file does not have; then the plain names are compared.
    with contextlib.suppress(KeyError, RuntimeError, AssertionError, ValueError, AttributeError):
        tensors = module.checkpoint_filter_fn(dict(tensors), model)
    return tensors, notes


def _fit_table(tensors: dict[str, Tensor], weights: Weights, model: Any) -> list[str]:
    """Bring the table of positions to the model's grid and prefix tokens; what was done, in words."""
    grid, old, notes = tuple(model.patch_embed.grid_size), table_grid(weights, model), list[str]()
    if old is None or model.pos_embed is None:
        return notes
    prefix = _prefix(weights, model)
    if old != grid:
        notes.append(f"position embedding resampled from {old[0]}×{old[1]} to {grid[0]}×{grid[1]}")
        tensors["pos_embed"] = weights.positions.resample(tensors["pos_embed"], grid, prefix, old)
    if "cls_token" not in tensors and prefix == 0 and _has_class(model) and not _apart(model):
        # The class token is asked for as a random one, which may begin at position nought.
        rows = tensors["pos_embed"].new_zeros(1, int(model.num_prefix_tokens), tensors["pos_embed"].shape[-1])
        tensors["pos_embed"] = torch.cat([rows, tensors["pos_embed"]], dim=1)
    elif prefix and "cls_token" in tensors and not _has_class(model):
        tensors["pos_embed"] = tensors["pos_embed"][:, prefix:]
        del tensors["cls_token"]
        notes.append("class token left out, which the model has none of")
    return notes


def _fit_norm(tensors: dict[str, Tensor], model: Any) -> None:
    """The last norm under the name that timm gives it: models that pool have it after the pooling."""
    old, new = ("norm.", "fc_norm.") if isinstance(model.norm, nn.Identity) else ("fc_norm.", "norm.")
    if not any(name.startswith(new) for name in tensors):
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[name.replace(old, new, 1)] = tensors.pop(name)


def table_grid(weights: Weights, model: Any) -> tuple[int, int] | None:
    """Rows and columns of the file's table of positions, as told or square; None where there is none, or no telling."""
    table = weights.tensors.get("pos_embed")
    if table is None or table.ndim != 3:
        return None
    count = table.shape[1] - _prefix(weights, model)
    told, side = weights.positions.grid, math.isqrt(max(count, 0))
    if told is not None and told[0] * told[1] == count:
        return told
    return (side, side) if told is None and side and side * side == count else None


def table_fault(weights: Weights, model: Any) -> str | None:
    """Why the file's table of positions cannot be read, and what to say of it; None if it can, or there is none."""
    table = weights.tensors.get("pos_embed")
    if table is None or table.ndim != 3 or model.pos_embed is None or table_grid(weights, model) is not None:
        return None
    count, told = table.shape[1] - _prefix(weights, model), weights.positions.grid
    if told is not None:
        return f"its table has {count} positions, which are not {told[0]}×{told[1]}: mend backbone.table"
    return (
        f"its table has {count} positions, which is no square: give its rows and columns of patches, "
        f"backbone.table=[HEIGHT,WIDTH] (height and width of the training images by the patch size)"
    )


def _apart(model: Any) -> bool:
    """Does the model's table leave out class token and registers?"""
    return bool(getattr(model, "no_embed_class", False))


def _has_class(model: Any) -> bool:
    return getattr(model, "cls_token", None) is not None


def _prefix(weights: Weights, model: Any) -> int:
    """Rows of the table before the patches': the class token's in all layouts but timm's, which has variants."""
    classes = int("cls_token" in weights.tensors)
    if not weights.format.startswith("timm"):
        return classes
    return 0 if _apart(model) else classes + weights.registers


def fit_positions(modules: Iterable[nn.Module], state: Mapping[str, Any], keep_grid: bool) -> str | None:
    """Have the backbones in `modules` place patches as those of `state` did, a checkpoint of ours, which is not loaded.

    They take its rule, and with `keep_grid` its grid; without, its tables [1 P+N D] are resampled to theirs. Parameters
    stay the objects that an optimizer may hold already.

    Returns:
        What was resampled, in words; None where nothing was.
    """
    rule, said = Positions.of(state.get("positions", TIMM)), None
    backbones: list[Any] = [part for module in modules for part in module.modules() if hasattr(part, "positions")]
    for backbone in backbones:
        backbone.positions = rule
    model = backbones[0].model
    for tensors in (state.get(part, {}) for part in ("student", "teacher", "objective")):
        for name in [name for name in tensors if name.endswith("model.pos_embed")]:
            prefix, grid = 0 if _apart(model) else int(model.num_prefix_tokens), tuple(model.patch_embed.grid_size)
            side = math.isqrt(max(tensors[name].shape[1] - prefix, 0))
            old = rule.grid or (side, side)
            if old[0] == 0 or old[0] * old[1] + prefix != tensors[name].shape[1] or grid == old:
                continue
            if not keep_grid:
                tensors[name] = rule.resample(tensors[name], grid, prefix, old)
                said = f"position embedding resampled from {old[0]}×{old[1]} to {grid[0]}×{grid[1]}"
                continue
            for backbone in backbones:
                backbone.kwargs["img_size"] = pixels(old, backbone.patch_size)
                height, width = (rows * backbone.patch_size for rows in old)
                backbone.model.patch_embed.set_input_size(img_size=(height, width))
                backbone.model.pos_embed.data = torch.empty_like(tensors[name], device=backbone.model.pos_embed.device)
    if not keep_grid:
        for backbone in backbones:
            backbone.positions = rule._replace(grid=None)
    return said


def pixels(grid: tuple[int, int], patch: int) -> int | list[int]:
    """timm's `img_size` of a grid: one side, or height and width."""
    return grid[0] * patch if grid[0] == grid[1] else [grid[0] * patch, grid[1] * patch]


def misfits(weights: Weights, model: Any, name: str) -> list[str]:
    """How the file's architecture differs from the model's, each with what to change; the width comes first."""
    found = []
    if weights.width not in (None, model.embed_dim):
        found.append(f"the file is {weights.width} wide, the model {model.embed_dim}: {_of_width(name, weights.width)}")
    if weights.depth != len(model.blocks):
        found.append(f"the file has {weights.depth} blocks, the model {len(model.blocks)}: set the depth to match")
    registers = 0 if getattr(model, "reg_token", None) is None else model.reg_token.shape[1]
    if weights.registers != registers:
        fix = "name a reg4 model" if weights.registers else "name a model without reg4"
        found.append(f"the file has {weights.registers} registers, the model {registers}: {fix}")
    if weights.biases() and getattr(model.blocks[0].attn, "q_bias", None) is None:
        other = _known(f"{name.split('.')[0]}_qkvb") or "a model named …_dinov3_qkvb"
        found.append(f"the file has query and value biases, which {name} would drop: use {other}")
    return found


def _of_width(name: str, width: int | None) -> str:
    size = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant", 4096: "7b"}.get(
        width or 0
    )
    other = size and _known(re.sub(r"^vit_[a-z0-9]+(?=_)", f"vit_{size}", name))
    return (
        f"use {other}"
        if other and other != name
        else f"use a model of width {width} (backbone.kwargs.embed_dim={width})"
    )


def _known(name: str) -> str | None:
    import timm

    return name if timm.is_model(name) else None


# DINO's head and centre


def head_from(content: Any, part: str | None = None) -> dict[str, Tensor]:
    """The projection head of a DINO or DINOv2 checkpoint (`read_pickle`), under the names of our DINOHead.

    Theirs keeps the last layer as gain and direction (weight norm). With the gain at one, as published, ours is the
    same function of the same directions. Running statistics of batch norm are left out: ours uses the batch's.

    Args:
        part: `teacher` or `student`; None takes the teacher's, where a file holds two.

    Raises:
        UserError: it has no head, or one whose gain was trained (norm_last_layer=False).
    """
    tensors = network(content) if part is None else _part(content, part)
    head: dict[str, Tensor] = {}
    for prefix in ("head.", "dino_head."):
        head = head or {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}
    for gain, direction in (
        ("weight_g", "weight_v"),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ):
        if f"last_layer.{direction}" in head:
            head["last_layer.weight"] = head.pop(f"last_layer.{direction}")
            scale = head.pop(f"last_layer.{gain}")
            if not torch.allclose(scale, torch.ones_like(scale)):
                raise UserError(
                    "the checkpoint's head has a trained gain in its last layer (norm_last_layer=False), and ours is "
                    "normalised: start with a fresh head"
                )
    head = {n: v for n, v in head.items() if n.startswith(("mlp.", "last_layer.")) and not _RUNNING.search(n)}
    if "last_layer.weight" not in head:
        raise UserError("no DINO head (head.mlp…, head.last_layer) in the checkpoint: start with a fresh head")
    return head


def _part(content: Any, part: str) -> dict[str, Tensor]:
    """The student's or the teacher's tensors of a training checkpoint; none, where it does not tell them apart."""
    if not isinstance(content, dict):
        return {}
    if isinstance(content.get(part), dict):
        return network(content[part])
    if isinstance(content.get("model"), dict):  # DINOv2 trains with both in one module
        return _part(content["model"], part)
    tensors = {name: value for name, value in content.items() if WRAPPING.sub("", str(name)).startswith(f"{part}.")}
    return network(tensors)


_RUNNING = re.compile(r"running_(mean|var)$|num_batches_tracked$")


def center_from(content: Any) -> Tensor | None:
    """The centre [1 K] of the teacher's logits in DINO's checkpoint.pth, if it is there."""
    loss = content.get("dino_loss") if isinstance(content, dict) else None
    found = loss.get("center") if isinstance(loss, dict) else None
    return found if isinstance(found, Tensor) else None


def load_head(
    path: str | os.PathLike[str], student: nn.Module, teacher: nn.Module, center: Tensor | None = None
) -> str:
    """Fill the DINOHeads of student and teacher, and `center` [1 K], from a checkpoint of DINO or DINOv2.

    Each takes its own part of the file. Where that has one head alone, or the student's gain was trained, both take the
    teacher's.

    Returns:
        What was taken, in words.

    Raises:
        UserError: the file is absent or unreadable, or has no head of this size.
    """
    if not Path(path).is_file():
        raise UserError(f"objective.head={path}: no such checkpoint")
    if Path(path).suffix == ".safetensors":
        raise UserError(
            f"objective.head={path}: give the checkpoint.pth that training left; weights files have no head"
        )
    content = read_pickle(path)
    try:
        theirs = head_from(content)
    except UserError as error:
        raise UserError(f"objective.head={path}: {error}") from None
    try:
        own, said = head_from(content, "student"), "student and teacher each their own"
    except UserError:
        own, said = theirs, "the teacher's for both"
    for module, tensors in ((student, own), (teacher, theirs)):
        _fill_head(path, module, tensors)
    said = f"{path}: read as DINO head ({said}): matched {len(theirs)}, missing 0, unexpected 0"
    found = center_from(content)
    if center is None or found is None:
        return said
    if found.numel() != center.numel():
        return f"{said}; its centre is of {found.numel()} outputs, not {center.numel()}, and left out"
    center.copy_(found.reshape(center.shape))
    return f"{said}; with its centre"


def _fill_head(path: str | os.PathLike[str], head: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    wanted = head.state_dict()
    ours, theirs = _head_sizes(wanted), _head_sizes(tensors)
    keys = [f"{key}={value}" for key, value in theirs.items() if key.startswith("objective.") and value != ours[key]]
    if theirs["width"] != ours["width"]:
        keys = [f"a backbone {theirs['width']} wide (this one is {ours['width']})", *keys]
    if keys:
        raise UserError(f"objective.head={path}: a head of another size: set {', '.join(keys)}")
    if {n: v.shape for n, v in tensors.items()} != {n: v.shape for n, v in wanted.items()}:
        missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        raise UserError(
            f"objective.head={path}: not DINO's head of three layers (missing {', '.join(missing) or 'none'}; "
            f"unexpected {', '.join(unexpected) or 'none'}): start with a fresh head"
        )
    head.load_state_dict({name: value.float() for name, value in tensors.items()})


def _head_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    first, last = tensors.get("mlp.0.weight"), tensors["last_layer.weight"]
    return {
        "width": None if first is None else first.shape[1],
        "objective.out_dim": last.shape[0],
        "objective.hidden_dim": None if first is None else first.shape[0],
        "objective.bottleneck_dim": last.shape[1],
        "objective.batch_norm": str(tensors.get("mlp.1.weight", last).ndim == 1).lower(),
    }
