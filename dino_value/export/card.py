"""What an export says of itself: use, method, data, settings, results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dino_value import __version__
from dino_value.errors import UserError
from dino_value.export.torchhub import pixels
from dino_value.models.backbone import WEIGHTS_NAME, Backbone
from dino_value.models.weight_files import read_header
from dino_value.models.weights import DINO, PLAIN, TIMM


def model_card(backbone: Backbone, source: Path, format: str, difference: float) -> str:
    """README.md as on the hub, from what the run folder says; the licence is left to its owner."""
    run = source if source.is_dir() else source.parent
    header = read_header(source / WEIGHTS_NAME if source.is_dir() else source) or {}
    config = _config(run) if "model" in header else {}  # a foreign file's neighbours are not its run
    height, width = pixels(backbone)
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
    if backbone.model.pos_embed is None or backbone.positions._replace(grid=None) == rule:
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
    "baseline": "Continued pretraining with {objective}, without labels.",
    "random": "Continued pretraining with {objective} on randomly masked views, the control of dino-value.",
    "value": "Continued pretraining with {objective}, its views chosen by a designer that a few labels teach what is "
    "valuable (arXiv 2601.22108). The labels reach the backbone by no other path.",
}


def _objective(config: Mapping[str, Any]) -> str:
    """The loss in words, with what was added to DINO's."""
    settings = config.get("objective") or {}
    if settings.get("name") == "ijepa":
        return "I-JEPA (arXiv 2301.08243)"
    weight = {name: (settings.get(name) or {}).get("weight") for name in ("ibot", "gram")}
    added = ["Sinkhorn-Knopp centring"] * (settings.get("centering") == "sinkhorn")
    added += ["iBOT"] * bool(weight["ibot"]) + ["KoLeo"] * bool(settings.get("koleo"))
    added += ["Gram anchoring"] * bool(weight["gram"])
    return "DINO (arXiv 2104.14294)" + (f" with {', '.join(added)}" if added else "")


def _method(config: Mapping[str, Any], header: Mapping[str, str]) -> list[str]:
    if not config:
        return []
    data, weights = config.get("data") or {}, (config.get("backbone") or {}).get("weights")
    labels = [f"{name} ({data[name]})" for name in ("ade20k", "nyuv2") if data.get(name)]
    steered = _METHODS.get(str(config.get("method")), f"Method: {config.get('method')}.")
    steered = steered.format(objective=_objective(config))
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
