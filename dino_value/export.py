"""Weights out: a run's backbone as timm, transformers or Meta's own code would have written it, with a model card.

Every export is read back and compared with the backbone it came from before its folder takes its name.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import save_file
from torch import Tensor, nn
from yaml import YAMLError

from dino_value import __version__
from dino_value.backbones import WEIGHTS_NAME, Backbone, Features, create_backbone, load_backbone, load_weights
from dino_value.errors import UserError
from dino_value.files import write_json, write_text
from dino_value.weights import DINO, PLAIN, TIMM, read_header

FORMATS = ("timm", "hf", "torchhub")
TOLERANCE = 1e-5


class Exported(NamedTuple):
    """The folder written, and by how much features read back from it differ, against the largest of them."""

    folder: Path
    difference: float


def export(
    run_or_weights: str | os.PathLike[str],
    format: str,
    out: str | os.PathLike[str] | None = None,
    model: str | None = None,
) -> Exported:
    """Write the backbone of a run folder or weights file for others to load, in a new folder.

    Args:
        format: `timm` (timm.create_model("local-dir:…")), `hf` (transformers' AutoModel) or `torchhub` (the .pth that
            facebookresearch's dino, dinov2 and dinov3 load).
        out: the folder; default export/FORMAT below the run, or beside the weights file.
        model: a timm name, for a weights file that does not name its architecture.

    Raises:
        UserError: the format has no place for this architecture, the folder is taken or cannot be written, or what was
            written does not give the same features.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: choose {', '.join(FORMATS)}")
    source = Path(run_or_weights)
    backbone = load_backbone(source, model).eval()
    run = source if source.is_dir() else source.parent
    folder = Path(out) if out is not None else run / "export" / format
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; remove it or choose another --out")
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        again = {"timm": _to_timm, "hf": _to_hf, "torchhub": _to_torchhub}[format](backbone, scratch)
        difference = _difference(backbone, again)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{run_or_weights}: features of {backbone.name} read back from {format} differ by {difference:.1e}; "
                "this format has no place for the architecture: choose another --format"
            )
        write_text(scratch / "README.md", model_card(backbone, source, format, difference))
        if folder.exists():
            folder.rmdir()
        os.replace(scratch, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another --out") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Exported(folder, difference)


@torch.no_grad()
def _difference(backbone: Backbone, other: nn.Module) -> float:
    """Of two images' features, at the size of the backbone's own table of positions."""
    images = torch.randn(2, 3, *_size(backbone), generator=torch.Generator().manual_seed(0))
    expected, found = backbone(images), other.eval()(images)
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected[:2], found[:2], strict=True))
    return worst if math.isfinite(worst) else math.inf


def _size(backbone: Backbone) -> tuple[int, int]:
    height, width = backbone.model.patch_embed.grid_size
    return height * backbone.patch_size, width * backbone.patch_size


def _tensors(backbone: Backbone) -> dict[str, Tensor]:
    state = backbone.model.state_dict()
    return {name: value.detach().cpu().float().contiguous() for name, value in state.items()}


# timm


def _to_timm(backbone: Backbone, folder: Path) -> nn.Module:
    model = backbone.model
    arguments: dict[str, Any] = {**backbone.kwargs, "dynamic_img_size": True}
    arguments.pop("drop_path_rate", None)
    if backbone.has_cls and backbone.final_norm == "norm":
        arguments["global_pool"] = "token"  # what DINO trains; timm pools some of these models over patches
    else:
        arguments["global_pool"] = model.global_pool
    described = {key: model.pretrained_cfg[key] for key in ("mean", "std", "interpolation", "crop_pct", "first_conv")}
    config = {
        "architecture": backbone.name.split(".")[0],
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            **described,
            "tag": "dino_value",
            "custom_load": False,
            "input_size": [3, *_size(backbone)],
            "fixed_input_size": False,
            "num_classes": 0,
            "classifier": "head",
        },
    }
    write_json(folder / "config.json", config)
    save_file(_tensors(backbone), folder / "model.safetensors", metadata={"format": "pt"})
    return Backbone(backbone.name, timm.create_model(f"local-dir:{folder}", pretrained=True), backbone.kwargs)


# Meta's names


def official(backbone: Backbone) -> tuple[str, dict[str, Tensor]]:
    """The layout whose code computes this model — `dino`, `dinov2` or `dinov3` — and the tensors under its names.

    Tensors that those files have and a run has not are filled with what leaves the features as they are: mask tokens
    of zeros, LayerScale of ones, biases of zeros.

    Raises:
        UserError: a part of the model has no place there.
    """
    model, tensors = backbone.model, _tensors(backbone)
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
    quarter = width // _heads(backbone) // 4
    found["rope_embed.periods"] = float(model.rope.temperature) ** (torch.arange(quarter) / quarter)
    return found


def _heads(backbone: Backbone) -> int:
    return int(backbone.model.blocks[0].attn.num_heads)


def _to_torchhub(backbone: Backbone, folder: Path) -> nn.Module:
    _, tensors = official(backbone)
    torch.save({name: value.clone() for name, value in tensors.items()}, folder / "backbone.pth")
    again = _twin(backbone)
    load_weights(again, folder / "backbone.pth", min_match=1.0)
    return again


def _twin(backbone: Backbone) -> Backbone:
    kwargs = {name: value for name, value in backbone.kwargs.items() if name != "img_size"}
    return create_backbone(backbone.name, _size(backbone)[0], kwargs)


# transformers


def _to_hf(backbone: Backbone, folder: Path) -> nn.Module:
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
    height, width = _size(backbone)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        **{"do_resize": True, "size": {"height": height, "width": width}, "resample": 3},
        **{"do_rescale": True, "rescale_factor": 1 / 255},
        **{"do_normalize": True, "image_mean": list(backbone.mean), "image_std": list(backbone.std)},
    }
    write_json(folder / "preprocessor_config.json", processor)
    if not config.get("query_bias", True):  # DINOv3's, that our model does without
        tensors = {name: value for name, value in tensors.items() if not name.endswith("qkv.bias")}
    save_file(dict(_hf_tensors(layout, tensors)), folder / "model.safetensors", metadata={"format": "pt"})
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
    height, width = _size(backbone)
    config = {
        "dtype": "float32",
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": _heads(backbone),
        "image_size": height if height == width else [height, width],
        "patch_size": backbone.patch_size,
        "num_channels": 3,
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


# The card


def model_card(backbone: Backbone, source: Path, format: str, difference: float) -> str:
    """README.md as on the hub, from what the run folder says; the licence is left to its owner."""
    run = source if source.is_dir() else source.parent
    header = read_header(source / WEIGHTS_NAME if source.is_dir() else source) or {}
    config = _config(run) if "model" in header else {}  # a foreign file's neighbours are not its run
    height, width = _size(backbone)
    parts = [
        "---",
        f"library_name: {'transformers' if format == 'hf' else 'timm' if format == 'timm' else 'pytorch'}",
        "pipeline_tag: image-feature-extraction",
        "tags: [dino, self-supervised-learning, dino-value]",
        "# license: yours to choose; the weights this began with, and the data, may bind you",
        "---",
        "",
        f"# {source.resolve().name if source.is_dir() else source.stem}",
        "",
        f"{backbone.name}: {backbone.depth} blocks of width {backbone.embed_dim}, patches of {backbone.patch_size} "
        f"pixels, {sum(p.numel() for p in backbone.model.parameters()) / 1e6:.1f} M parameters, made for "
        f"{height} × {width} images normalised with mean {list(backbone.mean)} and standard deviation "
        f"{list(backbone.std)}.",
        "",
        "## Use",
        "",
        "```python",
        _USE[format],
        "```",
        "",
        f"Written by dino-value {__version__}, read back, and compared: features differ by at most {difference:.1e} of "
        f"the largest, at {height} × {width}.{_elsewhere(backbone, format)}",
        "",
        *_method(config, header),
        *(_results(run / "results") if config else []),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _elsewhere(backbone: Backbone, format: str) -> str:
    """A warning, where the library interpolates positions by another rule than ours did."""
    registers = backbone.model.reg_token is not None
    rule = TIMM if format == "timm" or registers else PLAIN if format == "hf" else DINO
    if backbone.model.pos_embed is None or backbone.positions == rule:
        return ""
    return " At other sizes it interpolates the position embedding by another rule than ours: a small difference."


_USE = {
    "timm": 'import timm\n\nmodel = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()\n'
    "tokens = model.forward_features(images)",
    "hf": 'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("PATH_OF_THIS_FOLDER").eval()\n'
    "tokens = model(pixel_values=images).last_hidden_state",
    "torchhub": "import torch\n\n# a model of facebookresearch/dino, dinov2 or dinov3 of this architecture\n"
    'model.load_state_dict(torch.load("backbone.pth", weights_only=True))',
}


def _config(run: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    except FileNotFoundError:
        return {}
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError):
        raise UserError(f"{run / 'config.yaml'}: not a run's configuration") from None
    return {str(key): value for key, value in loaded.items()} if isinstance(loaded, dict) else {}


_METHODS = {
    "baseline": "Continued pretraining with DINO (arXiv 2104.14294), without labels.",
    "random": "Continued pretraining with DINO (arXiv 2104.14294) on randomly masked views, the control of dino-value.",
    "value": "Continued pretraining with DINO (arXiv 2104.14294), its views chosen by a designer that a few labels "
    "teach what is valuable (arXiv 2601.22108). The labels reach the backbone by no other path.",
}


def _method(config: Mapping[str, Any], header: Mapping[str, str]) -> list[str]:
    if not config:
        return []
    data, weights = config.get("data") or {}, (config.get("backbone") or {}).get("weights")
    labels = [f"{name} ({data[name]})" for name in ("ade20k", "nyuv2") if data.get(name)]
    steered = _METHODS.get(str(config.get("method")), f"Method: {config.get('method')}.")
    start = weights or config.get("start_from")
    lines = ["## Method", "", steered, "", "## Data", "", f"Unlabelled images: {data.get('unlabeled')}."]
    if labels and config.get("method") != "baseline":
        lines.append(f"Labels of the designer: {', '.join(labels)}.")
    lines += ["", "## Training", "", f"Began with {start or 'random weights'}; {_steps(config, header)}.", ""]
    settings = ["```yaml", OmegaConf.to_yaml(config).rstrip(), "```"]
    return [*lines, "<details><summary>Settings</summary>", "", *settings, "</details>", ""]


def _steps(config: Mapping[str, Any], header: Mapping[str, str]) -> str:
    batch = (config.get("optim") or {}).get("batch_size")
    return f"{header.get('step', 'an unknown number')} of {config.get('steps')} steps of {batch} images"


def _results(folder: Path) -> list[str]:
    """A table of the numbers at the top of each results/NAME.json."""
    rows: list[str] = []
    for path in sorted(folder.glob("**/*.json")):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            name = str(path.relative_to(folder).with_suffix("")).removesuffix("/results")
            rows += [
                f"| {name} | {key} | {value:.4g} |"
                for key, value in content.items()
                if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "seconds"
            ]
    return ["## Results", "", "| evaluation | metric | value |", "|---|---|---|", *rows, ""] if rows else []
