"""A backbone as transformers' ViT, Dinov2 and DINOv3 ViT models."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dino_value.errors import UserError
from dino_value.export.torchhub import heads, official, pixels
from dino_value.files import write_json
from dino_value.models.backbone import Backbone, Features, write_weights


def to_hf(backbone: Backbone, folder: Path) -> nn.Module:
    """Write what AutoModel loads, and read it back.

    Raises:
        UserError: transformers is absent, or has no place for the architecture.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            "--format hf reads its files back with transformers: pip install 'dino-value[language]'"
        ) from None
    layout, tensors = official(backbone)
    config = _hf_config(backbone, layout, tensors)
    if not hasattr(transformers, config["architectures"][0]):
        raise UserError(
            f"transformers {transformers.__version__} has no {config['architectures'][0]}; "
            "pip install --upgrade 'dino-value[language]'"
        )
    write_json(folder / "config.json", config)
    height, width = pixels(backbone)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        **{"do_resize": True, "size": {"height": height, "width": width}, "resample": 3},
        **{"do_rescale": True, "rescale_factor": 1 / 255},
        **{"do_normalize": True, "image_mean": list(backbone.mean), "image_std": list(backbone.std)},
    }
    write_json(folder / "preprocessor_config.json", processor)
    if not config.get("query_bias", True):  # DINOv3's, that our model does without
        tensors = {name: value for name, value in tensors.items() if not name.endswith("qkv.bias")}
    tensors = dict(_hf_tensors(layout, tensors))
    write_weights(folder / "model.safetensors", tensors, {"format": "pt"})
    more = {"add_pooling_layer": False} if layout == "dino" else {}
    model_class = getattr(transformers, config["architectures"][0])
    try:
        with _quiet(transformers.logging):
            model, said = model_class.from_pretrained(folder, local_files_only=True, output_loading_info=True, **more)
    except (RuntimeError, ValueError, TypeError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{backbone.name}: transformers does not take it: {first}; use --format timm") from None
    wrong = [*said["missing_keys"], *said["unexpected_keys"], *said.get("mismatched_keys", [])]
    if wrong:
        raise UserError(f"{backbone.name}: transformers has no place for it ({wrong[0]}); use --format timm")
    return _Hub(model, backbone.num_prefix_tokens)


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """No progress bar and no table from transformers: what matters of it is said in our own errors."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


class _Hub(nn.Module):
    """A model of transformers with the outputs of a Backbone."""

    def __init__(self, model: Any, prefix: int) -> None:
        super().__init__()
        self.model, self.prefix = model, prefix

    def forward(self, images: Tensor) -> Features:
        tokens = self.model(pixel_values=images).last_hidden_state
        return Features(tokens[:, 0], tokens[:, self.prefix :], (0, 0))


def _hf_config(backbone: Backbone, layout: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    block = backbone.model.blocks[0]
    gated = isinstance(block.mlp.act, nn.SiLU)
    hidden = tensors["blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight"].shape[1]
    height, width = pixels(backbone)
    config = {
        "dtype": "float32",
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": heads(backbone),
        "image_size": height if height == width else [height, width],
        "patch_size": backbone.patch_size,
        "num_channels": backbone.channels,
        "hidden_act": "silu" if gated else "gelu",
        "layer_norm_eps": block.norm1.eps,
    }
    if layout == "dino":
        return {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            **config,
            "intermediate_size": hidden,
            "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        }
    if layout == "dinov3":
        biased = getattr(block.attn, "q_bias", None) is not None
        return {
            "architectures": ["DINOv3ViTModel"],
            "model_type": "dinov3_vit",
            **config,
            "intermediate_size": hidden,
            "num_register_tokens": tensors["storage_tokens"].shape[1],
            "rope_theta": float(backbone.model.rope.temperature),
            "use_gated_mlp": gated,
            **{"query_bias": biased, "key_bias": False, "value_bias": biased},
        }
    registers = "register_tokens" in tensors
    ratio = hidden / backbone.embed_dim
    if gated:  # Dinov2Config gives the width before the two thirds that SwiGLU takes of it
        ratio = next((r for r in range(1, 17) if (int(backbone.embed_dim * r * 2 / 3) + 7) // 8 * 8 == hidden), ratio)
    if ratio != int(ratio):
        raise UserError(f"{backbone.name}: Dinov2Config takes whole mlp ratios, not {ratio:g}; use --format timm")
    return {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        **config,
        "hidden_act": "gelu",
        "mlp_ratio": int(ratio),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "use_swiglu_ffn": gated,
        **({"num_register_tokens": tensors["register_tokens"].shape[1]} if registers else {}),
    }


def _hf_tensors(layout: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Under the names of the files on the hub, which every version of transformers reads."""
    for name, value in tensors.items():
        if name.startswith("rope_embed.") or name.endswith("bias_mask"):
            continue
        if name == "mask_token" and layout == "dinov3":
            value = value[None]
        for pattern, new in _HUB[layout]:
            name = re.sub(pattern, new, name)
        if ".qkv." not in name:
            yield name, value.contiguous()
            continue
        for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
            if layout != "dinov3":
                yield name.replace("qkv", part), third.contiguous()
            elif (part, name.rsplit(".", 1)[1]) != ("key", "bias"):
                yield name.replace("qkv", f"{part[0]}_proj"), third.contiguous()


_FRONT = (
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
)
_DINOV2_HUB = (
    *_FRONT,
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.qkv\.", ".attention.attention.qkv."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
)
_HUB: dict[str, tuple[tuple[str, str], ...]] = {
    "dino": (
        *_DINOV2_HUB,
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
    "dinov2": _DINOV2_HUB,
    "dinov3": (
        (r"^storage_tokens$", "register_tokens"),
        *_FRONT,
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
        (r"^blocks\.", "layer."),
        (r"\.attn\.qkv\.", ".attention.qkv."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
        (r"\.mlp\.(fc1|w2)\.", ".mlp.up_proj."),
        (r"\.mlp\.w1\.", ".mlp.gate_proj."),
        (r"\.mlp\.(fc2|w3)\.", ".mlp.down_proj."),
    ),
}
