"""Backbones: any timm ViT behind one small contract, and their weights in and out.

timm owns the architectures. What is added here is the cut that the value core needs: a ViT can be run
up to a block (`stop`) and continued from there (`start`), so that a scope of the last k blocks costs k
blocks.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_value.errors import UserError
from dino_value.files import replacing
from dino_value.models.attention import AsNow, choose, kernel, wants_math
from dino_value.models.blocks import apply_block, class_attention, compiled_block, is_unit, run_in, unknown
from dino_value.models.weight_files import Copy, read_copy, read_header, with_checksum
from dino_value.models.weights import (
    RULES,
    TIMM,
    Reading,
    Weights,
    misfits,
    part_of,
    pixels,
    recognise,
    table_fault,
    table_grid,
    to_timm,
)

WEIGHTS_NAME = "backbone.safetensors"


class Features(NamedTuple):
    """What a backbone returns: `cls` [B D], `patches` [B N D] after the final norm, `grid` (h, w) with N = h·w."""

    cls: Tensor
    patches: Tensor
    grid: tuple[int, int]


class Hidden(NamedTuple):
    """The state between two blocks: `tokens` [B T D], the rotary table if the model has one, and the patch grid."""

    tokens: Tensor
    rope: Tensor | None
    grid: tuple[int, int]

    def full(self) -> Hidden:
        """The same in float32 where it was in less: differences and second derivatives do not survive bfloat16."""
        low = self.tokens.dtype in (torch.bfloat16, torch.float16)
        return self._replace(tokens=self.tokens.float()) if low else self


Replace = Callable[[Tensor], Tensor]
"""Embedded patches [B N D] or [B h w D] to the same, some of them replaced (iBOT's mask token)."""


class Backbone(nn.Module):
    """A timm VisionTransformer or EVA/DINOv3-style ViT, without its classifier.

    Images are float [B C H W], normalised with `mean` and `std`; H and W are multiples of `patch_size`.

    Attributes:
        channels: C, timm's `in_chans`; 3 are red, green and blue.
        attention: the backend, see `set_attention`.
        subset: stochastic depth runs a branch on a subset of the images, see `blocks.run_block`.
        compiled: blocks run compiled, except where the caller asks for the math kernel to differentiate twice.
    """

    def __init__(self, name: str, model: Any, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.name, self.kwargs = name, dict(kwargs)
        self.model = model
        self.patch_size = int(model.patch_embed.patch_size[0])
        self.embed_dim = int(model.embed_dim)
        self.depth = len(model.blocks)
        self.num_prefix_tokens = int(model.num_prefix_tokens)
        # Not timm's global_pool: it says `avg` of DINOv3, whose own objective reads the class token.
        self.has_cls = getattr(model, "cls_token", None) is not None
        self.channels = int(model.patch_embed.proj.weight.shape[1])
        self.mean: tuple[float, ...] = per_channel(model.pretrained_cfg["mean"], self.channels)
        self.std: tuple[float, ...] = per_channel(model.pretrained_cfg["std"], self.channels)
        # Models that pool keep their last norm for after the pooling; dense features want it on every token.
        self.final_norm = "fc_norm" if isinstance(model.norm, nn.Identity) else "norm"
        self.attention = "sdpa"
        self.subset = self.compiled = False
        # How the authors of its weights bring its position embeddings to another grid than the table's.
        self.positions = TIMM
        self._mean: Tensor
        self._std: Tensor
        for buffer, values in (("_mean", self.mean), ("_std", self.std)):
            self.register_buffer(buffer, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @overload
    def forward(
        self, x: Tensor | Hidden, start: int = 0, stop: None = None, replace: Replace | None = None
    ) -> Features: ...

    @overload
    def forward(self, x: Tensor | Hidden, start: int = 0, *, stop: int, replace: Replace | None = None) -> Hidden: ...

    @overload
    def forward(
        self, x: Tensor | Hidden, start: int = 0, *, replace: Replace | None = None, cls_only: Literal[True]
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: list[Tensor] | list[Hidden], start: int = 0, stop: None = None, replace: Replace | None = None
    ) -> list[Features]: ...

    @overload
    def forward(
        self, x: list[Tensor] | list[Hidden], start: int = 0, *, stop: int, replace: Replace | None = None
    ) -> list[Hidden]: ...

    @overload
    def forward(
        self,
        x: list[Tensor] | list[Hidden],
        start: int = 0,
        *,
        replace: Replace | None = None,
        cls_only: Literal[True],
    ) -> list[Tensor]: ...

    def forward(
        self,
        x: Tensor | Hidden | list[Tensor] | list[Hidden],
        start: int = 0,
        stop: int | None = None,
        replace: Replace | None = None,
        cls_only: bool = False,
    ) -> Any:
        """Images to features; or, with `stop`, to the state that enters block `stop`; or onward from such a state.

        `replace` says what becomes of the embedded patches of images, before they are told their places.
        With `cls_only` the result is `Features.cls` alone, [B D], and the last block computes no more than that needs.
        A list of several crop sizes gives a list; with attention `varlen` they share one pass without padding.
        """
        given = x if isinstance(x, list) else [x]
        states = [self._embed(part, replace) if isinstance(part, Tensor) else part for part in given]
        # Varlen attention wants them so, and of a block that is spread over processes one gathering does for all.
        once = self.attention == "varlen" or all(is_unit(block) for block in self.model.blocks)
        together = [states] if once else [[state] for state in states]
        results = [result for group in together for result in self._run(group, start, stop, cls_only)]
        return results if isinstance(x, list) else results[0]

    def _run(self, states: Sequence[Hidden], start: int, stop: int | None, cls_only: bool) -> Sequence[Any]:
        """Blocks `start` to `stop`, or to the features; several states as one batch of rows."""
        end = self.depth if stop is None else stop
        # Only a block that can be run on the class token alone is; another runs whole.
        short = cls_only and self.has_cls and stop is None and start < end and not unknown(self.model.blocks[-1])
        tokens = [state.tokens for state in states]
        for index in range(start, end - 1 if short else end):
            tokens = self._block(index, tokens, states)
        if stop is not None:
            return [Hidden(part, state.rope, state.grid) for part, state in zip(tokens, states, strict=True)]
        norm = getattr(self.model, self.final_norm)
        if short:
            return [norm(part[:, 0]) for part in self._block(end - 1, tokens, states, first=True)]
        features = [self._features(norm(part), state.grid) for part, state in zip(tokens, states, strict=True)]
        return [part.cls for part in features] if cls_only else features

    def _features(self, tokens: Tensor, grid: tuple[int, int]) -> Features:
        patches = tokens[:, self.num_prefix_tokens :]
        # Models without a class token describe an image by the mean of its patches.
        return Features(tokens[:, 0] if self.has_cls else patches.mean(1), patches, grid)

    def configure(self, settings: Any, device: torch.device, bfloat16: bool = False) -> None:
        """Run as the configuration's section `backbone` says (`attention`, `drop_path_mode`, `compile`,
        `checkpointing`); `auto` says on stderr what it took.

        Raises:
            UserError: see `set_attention` and `set_drop_path`.
        """
        said = self.set_attention(settings.attention, device, bfloat16)
        if said:
            print(said, file=sys.stderr)
        self.set_drop_path(settings.drop_path_mode)
        self.compiled = settings.compile
        self.model.set_grad_checkpointing(settings.checkpointing)

    def set_attention(self, kind: str, device: torch.device | None = None, bfloat16: bool = False) -> str:
        """How attention is computed, the same function whichever way; a line for the log, '' if there was no choice.

        `sdpa` (torch's fused kernels), `math` (plain matrix products), `xformers`, `varlen` (several crop sizes in one
        pass) or `auto`; see attention.py. `device` and `bfloat16` say what will run, for the probe and for `auto`.

        Raises:
            UserError: no such backend, or it does not run there, or not with these blocks.
        """
        head_dim = int(getattr(getattr(self.model.blocks[0], "attn", None), "head_dim", 64))
        self.attention, said = choose(
            kind, device or torch.device("cpu"), head_dim, bfloat16, lambda _: self._unknown()
        )
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = self.attention != "math"
        return said

    def set_drop_path(self, mode: str) -> None:
        """How stochastic depth is done: `timm` masks the branches, `subset` leaves out their work (DINOv2).

        Raises:
            UserError: no such mode, or these blocks cannot be run on a subset.
        """
        if mode not in ("timm", "subset"):
            raise UserError(f"backbone.drop_path_mode={mode}: choose timm, subset")
        fault = self._unknown() if mode == "subset" else None
        if fault:
            raise UserError(
                f"backbone.drop_path_mode=subset cannot run {self.name}: {fault}; choose backbone.drop_path_mode=timm"
            )
        self.subset = mode == "subset"

    def check_size(self, size: int, key: str) -> None:
        """Refuse square images of `size` pixels, which the setting `key` asks for, if the patch does not divide them.

        Raises:
            UserError: they are smaller than a patch, or not a multiple of it, with the nearest sizes that are.
        """
        patch = self.patch_size
        if size < patch:
            raise UserError(
                f"{key}={size}: not a multiple of the patch size {patch} of {self.name}, and smaller than one patch; "
                f"choose {patch} or more"
            )
        if size % patch:
            below = size // patch * patch
            raise UserError(
                f"{key}={size}: not a multiple of the patch size {patch} of {self.name}; choose {below} or "
                f"{below + patch}"
            )

    def _unknown(self) -> str | None:
        return next((fault for fault in map(unknown, self.model.blocks) if fault), None)

    def _embed(self, images: Tensor, replace: Replace | None = None) -> Hidden:
        model = self.model
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        tokens, rope = model.patch_embed(images), None
        if replace is not None:
            tokens = replace(tokens)
        if self.positions != TIMM and grid != tuple(model.patch_embed.grid_size):
            tokens = self._add_positions(tokens, grid)
        else:
            tokens = model._pos_embed(tokens)
        if isinstance(tokens, tuple):  # EVA-style models return the rotary table beside the tokens
            tokens, rope = tokens
        else:
            tokens = model.patch_drop(tokens)
        return Hidden(model.norm_pre(tokens), rope, grid)

    def _add_positions(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """timm's `_pos_embed` of a VisionTransformer [B h w D], interpolating as `positions` says."""
        model = self.model
        prefix = [
            token.expand(len(tokens), -1, -1) for token in (model.cls_token, model.reg_token) if token is not None
        ]
        shared = 0 if model.no_embed_class else self.num_prefix_tokens  # rows of the table that are not the patches'
        table = self.positions.resample(model.pos_embed, grid, shared, tuple(model.patch_embed.grid_size))
        patches = tokens.flatten(1, 2) + table[:, shared:]
        before = torch.cat(prefix, dim=1) if prefix else patches[:, :0]
        return model.pos_drop(torch.cat([before + table[:, :shared] if shared else before, patches], dim=1))

    def _block(
        self, index: int, tokens: Sequence[Tensor], states: Sequence[Hidden], first: bool = False
    ) -> list[Tensor]:
        """One block on the tokens of each state; `first` leaves [B 1 D], the class tokens."""
        block: Any = self.model.blocks[index]
        mixed = getattr(self.model, "rope_mixed", False)  # a table of its own for each block
        ropes = [None if state.rope is None else state.rope[index] if mixed else state.rope for state in states]
        # Above timm's own forward, only where that cannot do it.
        attend = None
        timm_can = not first and len(tokens) == 1 and not self.subset and self.attention in ("sdpa", "math")
        if not timm_can or is_unit(block):
            attend = kernel(self.attention, block.attn)
        run = compiled_block() if self.compiled and not wants_math() else apply_block
        given = (block, list(tokens), ropes, attend, first, self.subset)
        if self._checkpoints(index):
            run = functools.partial(checkpoint, run, use_reentrant=False, context_fn=_as_now)
        found: list[Tensor] = run_in(block, run, *given)
        return found

    def _checkpoints(self, index: int) -> bool:
        """timm's `set_grad_checkpointing`; not where `functional_call` runs the block with other parameters than its
        own, which are what a recomputation would find."""
        wanted = getattr(self.model, "grad_checkpointing", False) and torch.is_grad_enabled()
        return wanted and all(isinstance(value, nn.Parameter) for value in self.model.blocks[index].parameters())

    @torch.no_grad()
    def class_attention(self, images: Tensor) -> Tensor:
        """What the class token pays each patch in the last block, [B h w], mean of heads.

        Raises:
            UserError: there is no class token, or the block's attention cannot be read.
        """
        fault = "it has no class token" if not self.has_cls else unknown(self.model.blocks[-1])
        if fault:
            raise UserError(f"{self.name}: the attention of its class token cannot be read: {fault}")
        state = self(images, stop=self.depth - 1)
        rope = state.rope[-1] if state.rope is not None and getattr(self.model, "rope_mixed", False) else state.rope
        paid = class_attention(self.model.blocks[-1], state.tokens, rope)
        return paid[:, self.num_prefix_tokens :].unflatten(1, state.grid)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [… C H W] or float in [0, 1] to what the model expects."""
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        return (images - self._mean.to(images.device)) / self._std.to(images.device)


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Statistics of red, green and blue for other channels: their mean for each that is none of these."""
    mean = sum(values) / len(values)
    return tuple(values[:channels]) + (mean,) * (channels - len(values)) if channels >= 3 else (mean,) * channels


def _as_now() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Contexts of a checkpointed pass and of its repetition."""
    return contextlib.nullcontext(), AsNow()


def create_backbone(
    name: str,
    img_size: int | Sequence[int],
    kwargs: Mapping[str, Any] | None = None,
    weights: str | os.PathLike[str] | None = None,
    min_match: float = 0.9,
    keep_grid: bool = False,
    size_key: str = "img_size",
    reading: Reading | None = None,
) -> Backbone:
    """A timm ViT by name, for inputs of any size that the patch divides.

    Args:
        img_size: the size its position embedding is made for, pixels: of a side, or height and width.
        kwargs: passed to timm (`patch_size`, `embed_dim`, `depth`, `num_heads`, `drop_path_rate`, …).
        weights: a local file to start from, in any layout of weights.py; nothing is ever downloaded.
        min_match: the share of the model's tensors that the file must fill, and of the file's that must find a place.
        keep_grid: take the file's own table of positions, whatever `img_size`; see `load_weights`.
        size_key: what the user calls `img_size`, for messages.
        reading: what the file cannot say of itself.

    Raises:
        UserError: unknown name (with the nearest known ones), not a ViT, arguments timm refuses, or bad weights.
    """
    kwargs = dict(kwargs or {})
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or timm.list_models("vit_small*dino*")
        raise UserError(f"backbone.name={name}: timm has no such model; near names: {', '.join(near)}")
    for rate in [key for key in kwargs if key.endswith("_rate")]:
        if not (isinstance(kwargs[rate], (int, float)) and 0 <= kwargs[rate] < 1):
            raise UserError(f"backbone.kwargs.{rate}={kwargs[rate]}: a share that is dropped must lie in [0, 1)")
    size: Any = img_size if isinstance(img_size, int) else tuple(img_size)
    try:
        model: Any = timm.create_model(
            name, pretrained=False, num_classes=0, img_size=size, dynamic_img_size=True, **kwargs
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"backbone.name={name} with {kwargs or 'no extra arguments'}: timm refused it: {error}"
        ) from None
    if not all(hasattr(model, part) for part in ("blocks", "patch_embed", "_pos_embed", "norm")):
        raise UserError(f"backbone.name={name} is not a vision transformer; choose a timm vit_* model")
    if len(set(model.patch_embed.patch_size)) > 1:
        raise UserError(f"backbone.kwargs.patch_size={list(model.patch_embed.patch_size)}: patches must be square")
    backbone = Backbone(name, model, {**kwargs, "img_size": img_size})
    for side in (size,) if isinstance(size, int) else size:
        backbone.check_size(side, size_key)
    if weights is not None:
        print(f"{weights}: {load_weights(backbone, weights, min_match, keep_grid, reading)}", file=sys.stderr)
    return backbone


@dataclass(frozen=True)
class LoadReport:
    """What a weights file filled: names of the model's tensors, and of the file's tensors that had no place.

    Beside them the layout the file was read as, tensors left out by intent (heads, mask tokens, constants), what was
    taken or resampled, and the parts that stay random because they were named.
    """

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    format: str = "timm"
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)
    rule: str = ""  # how positions are resized, where files of this layout differ in it

    @property
    def share(self) -> float:
        """Of the model that the file fills, or of the file that found a place, whichever is less."""
        return len(self.matched) / max(1, len(self.matched) + max(len(self.missing), len(self.unexpected)))

    def __str__(self) -> str:
        def some(names: list[str]) -> str:
            return f"{len(names)}" + (f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else "")

        left = [f"left out {some(self.ignored)}"] if self.ignored else []
        aside = "; ".join([*left, *self.notes, *([self.rule] if self.rule else [])])
        return (
            f"read as {self.format}{f' ({aside})' if aside else ''}: "
            f"matched {len(self.matched)}, missing {some(self.missing)}, unexpected {some(self.unexpected)}"
            f"{'; random: ' + ', '.join(self.random) if self.random else ''}"
        )


def load_weights(
    backbone: Backbone,
    path: str | os.PathLike[str],
    min_match: float = 0.9,
    keep_grid: bool = False,
    reading: Reading | None = None,
) -> LoadReport:
    """Fill `backbone` from a local .safetensors or .pth file of DINO, DINOv2, DINOv3, timm or transformers.

    Position embeddings are interpolated as the layout's authors do it, from here on and for other image sizes too.
    With `keep_grid` the model takes the file's own table, so that features of every size are the published ones;
    without, the table is resampled once to the model's grid, and its shape depends on the model alone.

    A tensor of another shape counts as missing *and* unexpected: nothing is half-loaded in silence. What every patch
    passes through (`weights.PARTS`) must be there, whatever the share, unless `reading.random` names it.

    Raises:
        UserError: the file is absent or unreadable; its width is another; less than `min_match` fits; a part is missing
            that is not named as random; or, unless `min_match` is 0, it has another number of registers, or biases that
            the model lacks.
    """
    model, reading = backbone.model, reading or Reading()
    copy, header = read_copy(path, reading.prefix)
    weights = recognise(copy.tensors, header).told(reading)
    wrong = misfits(weights, model, backbone.name)
    fault = None if wrong else table_fault(weights, model)
    if fault:
        raise UserError(f"{path}: {fault}")
    if keep_grid and not wrong and model.pos_embed is not None:
        grid = table_grid(weights, model)
        if grid is not None and grid != tuple(model.patch_embed.grid_size):
            model.set_input_size(img_size=(grid[0] * backbone.patch_size, grid[1] * backbone.patch_size))
            backbone.kwargs["img_size"] = pixels(grid, backbone.patch_size)
    tensors, notes = to_timm(weights, model)
    wanted = model.state_dict()
    matched = [name for name, value in wanted.items() if name in tensors and tensors[name].shape == value.shape]
    keep = set(matched)
    missing = [name for name in wanted if name not in keep]
    absent = list(dict.fromkeys(part for part in map(part_of, missing) if part is not None))
    report = LoadReport(
        matched,
        missing,
        [name for name in tensors if name not in keep],
        weights.format,
        weights.ignored,
        [*_taken(copy), *notes],
        [part for part in absent if part in reading.random],
        _rule(weights, model, reading),
    )
    reasons = [f"{report.share:.0%} is below backbone.min_match={min_match:.0%}"] if report.share < min_match else []
    if min_match > 0 or weights.width not in (None, backbone.embed_dim):
        reasons += wrong
    reasons += [_lacking(part, missing, tensors, model) for part in absent if part not in reading.random]
    if reasons:
        advice = "" if wrong or len(matched) > len(missing) else ". Name the architecture that wrote the file"
        if not matched and copy.keys:
            keys = ", ".join(copy.keys[:8]) + (", …" if len(copy.keys) > 8 else "")
            advice += f", or backbone.prefix=NAME where its names begin so (at the top of the file: {keys})"
        raise UserError(f"{path}: these weights do not fit {backbone.name}: {report}; {'; '.join(reasons)}{advice}")
    model.load_state_dict({name: tensors[name] for name in matched}, strict=False)
    # Rotary models are timm's: the rules are for a table alone.
    learned = model.pos_embed is not None and getattr(model, "rope", None) is None
    grid = tuple(model.patch_embed.grid_size)
    rule = weights.positions._replace(grid=None if grid[0] == grid[1] else grid)
    backbone.positions = rule if learned else TIMM
    return report


def _taken(copy: Copy) -> list[str]:
    """Which copy of the network was taken, where a file holds several, in words."""
    return [f"took {copy.name or 'the top level'}, not {', '.join(copy.others)}"] if copy.others else []


def _rule(weights: Weights, model: Any, reading: Reading) -> str:
    """How positions are resized, in words, where it was chosen or files of one form differ in it."""
    if model.pos_embed is None or not (weights.format.startswith("DINOv2") or reading.positions != "auto"):
        return ""
    name = next((name for name, rule in RULES.items() if rule == weights.positions._replace(grid=None)), "its header's")
    other = "dino" if name == "timm" else "timm"
    chosen = "as told" if reading.positions != "auto" else f"by the layout; backbone.positions={other} for the other"
    how = "with" if weights.positions.antialias else "without"
    return f"positions resized {how} antialiasing ({name}, {chosen})"


def _lacking(part: str, missing: Sequence[str], tensors: Mapping[str, Tensor], model: Any) -> str:
    """Why a part that must be there is not, and what to do."""
    if part == "patch_embed" and "patch_embed.proj.weight" in tensors:
        theirs, ours = tensors["patch_embed.proj.weight"], model.patch_embed.proj.weight
        if theirs.ndim == ours.ndim and theirs.shape[1] != ours.shape[1]:
            return (
                f"its patch embedding is of {theirs.shape[1]} channels, the model's of {ours.shape[1]}: set "
                f"backbone.kwargs.in_chans={theirs.shape[1]}, or backbone.random=[patch_embed] to begin a new one"
            )
    there = any(part_of(name) == part for name in missing if name in tensors)
    ways = f"name it in backbone.random=[{part}] if it may begin at random"
    if part == "cls_token" and not there:
        ways += ", or set backbone.kwargs={class_token: false, global_pool: avg} for a model without one"
    return f"its {part} is {'of another shape' if there else 'missing'}: {ways}"


def save_backbone(path: str | os.PathLike[str], backbone: Backbone, extra: Mapping[str, str] | None = None) -> None:
    """Write timm-keyed weights with the architecture in the header; complete or not at all.

    Raises:
        OSError: the disk refused it.
    """
    write_weights(path, *backbone_weights(backbone, extra))


def backbone_weights(
    backbone: Backbone, extra: Mapping[str, str] | None = None, learner: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save_backbone` writes: timm-keyed tensors, those of a CPU not copied, and the header.

    Args:
        learner: where the tensors are, if not in the backbone: the state of a learner that has it.
    """
    metadata = {"model": backbone.name, "kwargs": json.dumps(backbone.kwargs), **(extra or {})}
    if backbone.positions != TIMM:
        metadata["positions"] = json.dumps(backbone.positions)
    given = backbone.model.state_dict()
    if learner is not None:
        given = {name: learner[f"backbone.model.{name}"] for name in given}
    tensors = {name: value.detach().cpu().contiguous() for name, value in given.items()}
    return tensors, metadata


def write_weights(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A .safetensors file with its checksum, complete or not at all.

    Raises:
        OSError: the disk refused it.
    """
    try:
        with replacing(Path(path)) as temporary:
            save_file(tensors, temporary, metadata=with_checksum(tensors, metadata))
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(str(error)) from None


def load_backbone(
    run_or_weights: str | os.PathLike[str],
    model: str | None = None,
    img_size: int = 224,
    kwargs: Mapping[str, Any] | None = None,
    min_match: float = 0.9,
    reading: Reading | None = None,
) -> Backbone:
    """The backbone of a run folder, or of a weights file.

    Our own files name their architecture in the header; for any other file give `model`, a timm name. The table of
    positions stays the file's own, and is interpolated as its authors do it; `img_size` counts where there is none.

    Raises:
        UserError: nothing there, no architecture known, or the weights do not fit it.
    """
    path = Path(run_or_weights)
    if path.is_dir():
        path = path / WEIGHTS_NAME
        if not path.is_file():
            raise UserError(f"{path.parent}: not a run folder with weights (no {WEIGHTS_NAME} in it)")
    if not path.exists():
        raise UserError(f"{path}: no such run folder or weights file")
    if model is None:
        header = read_header(path) or {}
        if "model" in header:
            model = header["model"]
            kwargs = {**json.loads(header.get("kwargs", "{}")), **(kwargs or {})}
    if model is None:
        raise UserError(f"{path}: the file does not name its architecture; add --model with a timm name")
    kwargs = dict(kwargs or {})
    size = kwargs.pop("img_size", img_size)
    return create_backbone(model, size, kwargs, path, min_match, keep_grid=True, reading=reading)
