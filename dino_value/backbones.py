"""Backbones: any timm ViT behind one small contract, and their weights in and out.

timm owns the architectures. What is added here is the cut that the value core needs: a ViT can be run
up to a block (`stop`) and continued from there (`start`), so that a scope of the last k blocks costs k
blocks.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dino_value.errors import UserError

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


class Backbone(nn.Module):
    """A timm VisionTransformer or EVA/DINOv3-style ViT, without its classifier.

    Images are float [B 3 H W], normalised with `mean` and `std`; H and W are multiples of `patch_size`.
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
        self.mean: tuple[float, ...] = tuple(model.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(model.pretrained_cfg["std"])
        # Models that pool keep their last norm for after the pooling; dense features want it on every token.
        self.final_norm = "fc_norm" if isinstance(model.norm, nn.Identity) else "norm"
        self._mean: Tensor
        self._std: Tensor
        for buffer, values in (("_mean", self.mean), ("_std", self.std)):
            self.register_buffer(buffer, torch.tensor(values).view(3, 1, 1), persistent=False)

    @overload
    def forward(self, x: Tensor | Hidden, start: int = 0, stop: None = None) -> Features: ...

    @overload
    def forward(self, x: Tensor | Hidden, start: int = 0, *, stop: int) -> Hidden: ...

    def forward(self, x: Tensor | Hidden, start: int = 0, stop: int | None = None) -> Features | Hidden:
        """Images to features; or, with `stop`, to the state that enters block `stop`; or onward from such a state."""
        hidden = self._embed(x) if isinstance(x, Tensor) else x
        tokens = hidden.tokens
        for index in range(start, self.depth if stop is None else stop):
            tokens = self._block(index, tokens, hidden.rope)
        if stop is not None:
            return Hidden(tokens, hidden.rope, hidden.grid)
        tokens = getattr(self.model, self.final_norm)(tokens)
        patches = tokens[:, self.num_prefix_tokens :]
        # Models without a class token describe an image by the mean of its patches.
        cls = tokens[:, 0] if self.has_cls else patches.mean(1)
        return Features(cls, patches, hidden.grid)

    def set_attention(self, kind: str) -> None:
        """`sdpa` (fused kernels) or `math` (plain matrix products); the same function either way."""
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = kind == "sdpa"

    def _embed(self, images: Tensor) -> Hidden:
        model = self.model
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        tokens, rope = model.patch_embed(images), None
        tokens = model._pos_embed(tokens)
        if isinstance(tokens, tuple):  # EVA-style models return the rotary table beside the tokens
            tokens, rope = tokens
        else:
            tokens = model.patch_drop(tokens)
        return Hidden(model.norm_pre(tokens), rope, grid)

    def _block(self, index: int, tokens: Tensor, rope: Tensor | None) -> Tensor:
        block = self.model.blocks[index]
        if rope is None:
            return block(tokens)
        return block(tokens, rope=rope[index] if getattr(self.model, "rope_mixed", False) else rope)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [… 3 H W] or float in [0, 1] to what the model expects."""
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        return (images - self._mean.to(images.device)) / self._std.to(images.device)


def create_backbone(
    name: str,
    img_size: int,
    kwargs: Mapping[str, Any] | None = None,
    weights: str | os.PathLike[str] | None = None,
    min_match: float = 0.9,
) -> Backbone:
    """A timm ViT by name, for inputs of any size that the patch divides.

    Args:
        img_size: the size its position embedding is made for, pixels.
        kwargs: passed to timm (`patch_size`, `embed_dim`, `depth`, `num_heads`, `drop_path_rate`, …).
        weights: a local file to start from; nothing is ever downloaded.
        min_match: the share of the model's tensors that the file must fill.

    Raises:
        UserError: unknown name (with the nearest known ones), not a ViT, arguments timm refuses, or bad weights.
    """
    kwargs = dict(kwargs or {})
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or timm.list_models("vit_small*dino*")
        raise UserError(f"backbone.name={name}: timm has no such model; near names: {', '.join(near)}")
    try:
        model: Any = timm.create_model(
            name, pretrained=False, num_classes=0, img_size=img_size, dynamic_img_size=True, **kwargs
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"backbone.name={name} with {kwargs or 'no extra arguments'}: timm refused it: {error}"
        ) from None
    if not all(hasattr(model, part) for part in ("blocks", "patch_embed", "_pos_embed", "norm")):
        raise UserError(f"backbone.name={name} is not a vision transformer; choose a timm vit_* model")
    patch = int(model.patch_embed.patch_size[0])
    if img_size % patch:
        raise UserError(f"image size {img_size} is not a multiple of the patch size {patch} of {name}")
    backbone = Backbone(name, model, {**kwargs, "img_size": img_size})
    if weights is not None:
        report = load_weights(backbone, weights, min_match)
        if report.missing or report.unexpected:
            print(f"{weights}: {report}", file=sys.stderr)
    return backbone


@dataclass(frozen=True)
class LoadReport:
    """What a weights file filled: names of the model's tensors, and of the file's tensors that had no place."""

    matched: list[str]
    missing: list[str]
    unexpected: list[str]

    @property
    def share(self) -> float:
        return len(self.matched) / max(1, len(self.matched) + len(self.missing))

    def __str__(self) -> str:
        def some(names: list[str]) -> str:
            return f"{len(names)}" + (f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else "")

        return f"matched {len(self.matched)}, missing {some(self.missing)}, unexpected {some(self.unexpected)}"


def load_weights(backbone: Backbone, path: str | os.PathLike[str], min_match: float = 0.9) -> LoadReport:
    """Fill `backbone` from a local .safetensors or .pth file, through timm's own key and position-embedding filter.

    A tensor of another shape counts as missing *and* unexpected: nothing is half-loaded in silence.

    Raises:
        UserError: the file is absent, unreadable, or fills less than `min_match` of the model.
    """
    tensors = read_tensors(path)
    model = backbone.model
    filter_fn = __import__(type(model).__module__, fromlist=["checkpoint_filter_fn"]).checkpoint_filter_fn
    wanted = model.state_dict()
    # The filter may assume a layout that this file does not have; then the plain names are compared.
    with contextlib.suppress(KeyError, RuntimeError, AssertionError, ValueError):
        tensors = filter_fn(dict(tensors), model)
    matched = [name for name, value in wanted.items() if name in tensors and tensors[name].shape == value.shape]
    keep = set(matched)
    report = LoadReport(
        matched, [name for name in wanted if name not in keep], [name for name in tensors if name not in keep]
    )
    if report.share < min_match:
        raise UserError(
            f"{path}: these weights do not fit {backbone.name}: {report}; "
            f"{report.share:.0%} is below backbone.min_match={min_match:.0%}. Name the architecture that wrote the file"
        )
    model.load_state_dict({name: tensors[name] for name in matched}, strict=False)
    return report


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .safetensors or weights-only .pth file, unwrapped from the usual outer dictionaries."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a readable weights file: {_first_line(error)}") from None
    except Exception as error:  # pickle.UnpicklingError: an object that weights-only loading refuses
        raise UserError(f"{path}: refused by weights-only loading: {_first_line(error)}") from None
    for key in ("teacher", "student", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    prefixes = ("module.", "backbone.", "model.")
    tensors: dict[str, Tensor] = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        if isinstance(value, Tensor):
            tensors[name] = value
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def save_backbone(path: str | os.PathLike[str], backbone: Backbone, extra: Mapping[str, str] | None = None) -> None:
    """Write timm-keyed weights with the architecture in the header; complete or not at all.

    Raises:
        OSError: the disk refused it.
    """
    path = Path(path)
    metadata = {"model": backbone.name, "kwargs": json.dumps(backbone.kwargs), **(extra or {})}
    tensors = {name: value.detach().cpu().contiguous() for name, value in backbone.model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata=metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(str(error)) from None
    finally:
        temporary.unlink(missing_ok=True)


def load_backbone(
    run_or_weights: str | os.PathLike[str],
    model: str | None = None,
    img_size: int = 224,
    kwargs: Mapping[str, Any] | None = None,
    min_match: float = 0.9,
) -> Backbone:
    """The backbone of a run folder, or of a weights file.

    Our own files name their architecture in the header; for any other file give `model`, a timm name.

    Raises:
        UserError: nothing there, no architecture known, or the weights do not fit it.
    """
    path = Path(run_or_weights)
    if path.is_dir():
        path = path / WEIGHTS_NAME
        if not path.is_file():
            raise UserError(f"{path.parent}: not a run folder with weights (no {WEIGHTS_NAME} in it)")
    if path.suffix == ".safetensors" and path.is_file() and model is None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable weights file: {error}") from None
        if "model" in metadata:
            model = metadata["model"]
            kwargs = {**json.loads(metadata.get("kwargs", "{}")), **(kwargs or {})}
    if model is None:
        raise UserError(f"{path}: the file does not name its architecture; add --model with a timm name")
    kwargs = dict(kwargs or {})
    return create_backbone(model, int(kwargs.pop("img_size", img_size)), kwargs, path, min_match)
