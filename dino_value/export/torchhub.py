"""A backbone under the names of facebookresearch's dino, dinov2 and dinov3."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from dino_value.errors import UserError
from dino_value.models.backbone import Backbone, create_backbone, load_weights
from dino_value.models.weights import Reading


def pixels(backbone: Backbone) -> tuple[int, int]:
    """Height and width that the backbone's own table of positions is for."""
    height, width = backbone.model.patch_embed.grid_size
    return height * backbone.patch_size, width * backbone.patch_size


def tensors_of(backbone: Backbone) -> dict[str, Tensor]:
    """Under timm's names, float32."""
    state = backbone.model.state_dict()
    return {name: value.detach().cpu().float().contiguous() for name, value in state.items()}


def official(backbone: Backbone) -> tuple[str, dict[str, Tensor]]:
    """The layout whose code computes this model — `dino`, `dinov2` or `dinov3` — and the tensors under its names.

    Tensors that those files have and a run has not are filled with what leaves the features as they are: mask tokens
    of zeros, LayerScale of ones, biases of zeros.

    Raises:
        UserError: a part of the model has no place there.
    """
    model, tensors = backbone.model, tensors_of(backbone)
    block = model.blocks[0]
    if hasattr(model, "rope"):
        layout, names = "dinov3", _DINOV3
        known = type(model.rope).__name__ == "RotaryEmbeddingDinoV3" and model.pos_embed is None
    else:
        layout, names = ("dinov2" if "reg_token" in tensors or "blocks.0.ls1.gamma" in tensors else "dino"), _VIT
        known = model.pos_embed is not None and ("reg_token" in tensors) == bool(model.no_embed_class)
    if backbone.final_norm == "fc_norm":  # which we apply to every token
        tensors = {re.sub(r"^fc_norm\.", "norm.", name): value for name, value in tensors.items()}
    strange = [name for name in tensors if not names.fullmatch(name)]
    if strange or not known or not backbone.has_cls or not isinstance(block.mlp.act, (nn.GELU, nn.SiLU)):
        part = strange[0] if strange else "its positions, class token or activation"
        raise UserError(
            f"{backbone.name}: DINO, DINOv2 and DINOv3 have no such architecture ({part}); use --format timm, which "
            "takes any"
        )
    if layout == "dinov3":
        return layout, _as_dinov3(backbone, tensors)
    if layout == "dinov2":
        tensors = _as_dinov2(backbone, tensors)
    return layout, tensors


_PART = r"(norm[12]\.(weight|bias)|attn\.(qkv|proj)\.(weight|bias)|mlp\.fc[12]\.(weight|bias)|"
_VIT = re.compile(
    r"cls_token|pos_embed|reg_token|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)|"
    rf"blocks\.\d+\.{_PART}ls[12]\.gamma)"
)
_DINOV3 = re.compile(
    r"cls_token|reg_token|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)|"
    rf"blocks\.\d+\.{_PART}gamma_[12]|attn\.[qv]_bias|mlp\.fc1_[gx]\.(weight|bias))"
)


def _as_dinov2(backbone: Backbone, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    width = backbone.embed_dim
    if "reg_token" in tensors:  # timm keeps the class token's row of the table in the token itself
        tensors["register_tokens"] = tensors.pop("reg_token")
        tensors["pos_embed"] = torch.cat([torch.zeros(1, 1, width), tensors["pos_embed"]], dim=1)
    tensors["mask_token"] = torch.zeros(1, width)
    for index, block in enumerate(backbone.model.blocks):
        for number in (1, 2):
            tensors.setdefault(f"blocks.{index}.ls{number}.gamma", torch.ones(width))
        if isinstance(block.mlp.act, nn.SiLU):  # gate and value in one matrix
            for old, new in (("fc1", "w12"), ("fc2", "w3")):
                for kind in ("weight", "bias"):
                    tensors[f"blocks.{index}.mlp.{new}.{kind}"] = tensors.pop(f"blocks.{index}.mlp.{old}.{kind}")
    return tensors


def _as_dinov3(backbone: Backbone, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    model, width = backbone.model, backbone.embed_dim
    found: dict[str, Tensor] = {}
    gated = hasattr(model.blocks[0].mlp, "fc1_g")
    for name, value in tensors.items():
        name = (
            name.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        )
        name = name.replace("mlp.fc1_g", "mlp.w1").replace("mlp.fc1_x", "mlp.w2")
        found[name.replace("mlp.fc2", "mlp.w3") if gated else name] = value
    for index in range(backbone.depth):
        stem, zeros = f"blocks.{index}.attn", torch.zeros(width)
        query, value = (found.pop(f"{stem}.{part}_bias", zeros) for part in "qv")
        found[f"{stem}.qkv.bias"] = torch.cat([query, zeros, value])
        found[f"{stem}.qkv.bias_mask"] = torch.cat([torch.ones(width), zeros, torch.ones(width)])
        for number in (1, 2):
            found.setdefault(f"blocks.{index}.ls{number}.gamma", torch.ones(width))
    found.setdefault("storage_tokens", torch.zeros(1, 0, width))
    found["mask_token"] = torch.zeros(1, width)
    quarter = width // heads(backbone) // 4
    found["rope_embed.periods"] = float(model.rope.temperature) ** (torch.arange(quarter) / quarter)
    return found


def heads(backbone: Backbone) -> int:
    """Attention heads."""
    return int(backbone.model.blocks[0].attn.num_heads)


def to_torchhub(backbone: Backbone, folder: Path) -> nn.Module:
    """Write the .pth that Meta's hub models load, and read it back."""
    _, tensors = official(backbone)
    torch.save({name: value.clone() for name, value in tensors.items()}, folder / "backbone.pth")
    again = _twin(backbone)
    height, width = backbone.model.patch_embed.grid_size
    table = () if height == width else (height, width)  # the layout cannot say it
    load_weights(again, folder / "backbone.pth", min_match=1.0, reading=Reading(table=table))
    return again


def _twin(backbone: Backbone) -> Backbone:
    kwargs = {name: value for name, value in backbone.kwargs.items() if name != "img_size"}
    height, width = pixels(backbone)
    return create_backbone(backbone.name, height if height == width else (height, width), kwargs)
