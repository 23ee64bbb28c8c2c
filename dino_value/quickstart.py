"""The whole method on the embedded scenes, in minutes on a CPU: four arms, three evaluations, one report.

`python -m dino_value.quickstart FILE` makes again the checkpoint that the arms start from.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from dino_value.backbones import Backbone, create_backbone, load_backbone, load_weights
from dino_value.checkpoint import load_checkpoint
from dino_value.config import Config, load_config, packaged
from dino_value.data.labelled import open_labelled
from dino_value.designers import DESIGNERS, fill_in, learned_views
from dino_value.errors import UserError
from dino_value.eval import depth, linear, seg
from dino_value.files import write_json
from dino_value.process import choose_device
from dino_value.track import environment
from dino_value.train import train

ARMS = ("baseline", "value", "random")
START_CONFIG, ARM_CONFIG = "quickstart/start", "quickstart/arm"
HEAD_STEPS, HEAD_BATCH, HEAD_LR = 300, 64, 1e-2


def quickstart(out: Path, seeds: int = 1, steps: int | None = None) -> dict[str, Any]:
    """Continue the packaged checkpoint in every arm and seed, evaluate on held-out scenes, write the report.

    A stopped quickstart goes on from its runs' checkpoints when the same command is given again.

    Returns:
        What results.json holds: `{"arms": {arm: {"miou": [one a seed], "rmse": …, "top1": …}}, "seconds": …}`.

    Raises:
        UserError: `out` cannot be written or holds something else.
    """
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: at least one")
    began = time.monotonic()
    device = choose_device("auto")
    console = Console(stderr=True)
    prepare(out)
    configs = {(arm, seed): arm_config(out, arm, seed, steps) for seed in range(seeds) for arm in ARMS}
    for (arm, seed), config in configs.items():
        console.print(f"[bold]{arm}[/bold], seed {seed}: {config.steps} steps")
        train(config)

    results: dict[str, Any] = {"arms": {}, "seeds": list(range(seeds))}
    jobs = [(arm, seed) for arm in ("step0", *ARMS) for seed in range(seeds)]
    for arm, seed in track(jobs, "evaluating", console=console):
        backbone = start_backbone() if arm == "step0" else load_backbone(configs[arm, seed].out)
        rows = results["arms"].setdefault(arm, {})
        for metric, value in evaluate(backbone, seed).items():
            rows.setdefault(metric, []).append(value)
    results["seconds"] = round(time.monotonic() - began, 1)
    write_json(out / "results.json", results)
    report(out, results, configs, device, console)
    return results


def prepare(out: Path) -> None:
    """Make the folder.

    Raises:
        UserError: not writable, or in use for something else.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not (out / "runs").is_dir():
            raise UserError(f"--out {out}: is not empty and not a quickstart's folder; choose another")
        (out / "runs").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None


def arm_config(out: Path, arm: str, seed: int, steps: int | None) -> Config:
    """One arm's configuration: arms differ in `method` alone."""
    overrides = [f"out={out / 'runs' / f'{arm}_{seed}'}", f"method={arm}", f"seed={seed}"]
    return load_config(ARM_CONFIG, overrides + ([f"steps={steps}"] if steps else []))


def start_path() -> Path:
    """The packaged checkpoint."""
    return packaged("quickstart/start.pt")


def start_backbone() -> Backbone:
    """The untouched backbone: what every arm starts from."""
    config = load_config(START_CONFIG, ["out=unused"])
    backbone = create_backbone(config.backbone.name, config.views.global_size, config.backbone.kwargs)
    load_weights(backbone, start_path())
    return backbone


def evaluate(backbone: Backbone, seed: int, split: str = "validation") -> dict[str, float]:
    """mIoU, depth RMSE (metres) and linear top-1 on held-out scenes; settings may look at `tuning` only."""
    shared: dict[str, Any] = {"size": (64, 64), "steps": HEAD_STEPS, "batch": HEAD_BATCH, "lr": HEAD_LR, "seed": seed}
    found: dict[str, float] = {}
    for layout, module, options, metric in (
        ("ade20k", seg, seg.SegOptions(**shared), "miou"),
        ("nyuv2", depth, depth.DepthOptions(eigen_crop=False, **shared), "rmse"),
        ("imagefolder", linear, linear.LinearOptions(**shared), "top1"),
    ):
        sources = (open_labelled(layout, "scenes", part) for part in ("training", split))  # type: ignore[arg-type]
        scores = module.evaluate(backbone, *sources, options)
        found[metric] = scores[metric]
        found[f"{metric}_loss"] = scores["loss"]
    return found


def report(
    out: Path, results: dict[str, Any], configs: dict[tuple[str, int], Config], device: torch.device, console: Console
) -> None:
    """report.html and its pictures, and the same table and sentences on the terminal."""
    from dino_value.report.figures import curves_figure, masks_figure, pca_figure, results_figure
    from dino_value.report.page import Report, write_report
    from dino_value.report.statistics import compare_all, headline
    from dino_value.report.terminal import results_table

    seeds = results["seeds"]
    runs = {arm: [Path(configs[arm, seed].out) for seed in seeds] for arm in ARMS}
    images = torch.stack([open_labelled("ade20k", "scenes", "validation").load(index)[0] for index in range(6)])
    backbones = {"step0": start_backbone(), **{arm: load_backbone(runs[arm][0]) for arm in ARMS}}
    masks, views = {}, {}
    for arm in ("value", "random"):
        masks[arm], views[arm] = masked(configs[arm, seeds[0]], images)
    shown = {
        metric: {arm: rows[metric] for arm, rows in results["arms"].items()} for metric in ("miou", "rmse", "top1")
    }
    table = {"arms": {arm: {m: shown[m][arm] for m in shown} for arm in results["arms"]}, "seeds": seeds}
    comparisons = compare_all(table)
    config = configs["value", seeds[0]]
    page = Report(
        title="dino-value quickstart",
        summary=(
            "A small ViT, first trained with plain DINO on ray-cast rooms, is continued from that one checkpoint on "
            "rooms that carry a printed code, a shortcut which tells images apart and says nothing of the room, for "
            f"{config.steps} steps in each arm: baseline (plain DINO), value (a mask generator "
            "taught by the gradients of a few segmentation and depth labels) and random (the same generator, taught by "
            "a random direction of the same norm). step0 is the checkpoint itself. Frozen features, heads trained on "
            "labelled scenes, scored on held-out ones."
        ),
        results=table,
        comparisons=comparisons,
        figures=[
            results_figure(table),
            curves_figure(runs, keys=("loss", "value", "cosine", "mask_mean")),
            masks_figure(images, masks, views),
            pca_figure(images, {arm: patch_map(backbone, images) for arm, backbone in backbones.items()}),
        ],
        notes=[
            "Synthetic scenes of 64 pixels and a ViT of half a million parameters: this shows the mechanism, not the "
            "size of the effect on photographs.",
            "Arms take equal learner steps; value and random spend more time a step (seconds in metrics.jsonl).",
            "Settings were chosen without the scenes scored here: docs/results.md says what was tried.",
        ],
        settings={
            "steps": config.steps,
            "direction": config.value.direction,
            "engine": config.value.engine,
            "designer": config.designer.name,
            "update every": config.value.period,
            "batch": config.optim.batch_size,
        },
        commands=[
            f"dino-value quickstart --out {out.name} --seeds {len(seeds)} --steps {config.steps}",
            f"dino-value train quickstart/arm method=value seed=0 steps={config.steps} out=my_run",
            f"dino-value eval seg my_run --data scenes --size 64 --steps {HEAD_STEPS} --batch {HEAD_BATCH} "
            f"--lr {HEAD_LR} --out my_run/results",
        ],
        environment={k: v for k, v in environment(seeds[0], device).items() if k not in ("command", "seed")},
        seconds=results["seconds"],
    )
    path = write_report(out / "report.html", page)
    Console().print(results_table(table))
    sentences = [headline(comparisons), *(comparison.sentence for comparison in comparisons)]
    Console().print(*sentences, f"{path} ({results['seconds']:.0f} s)", sep="\n", markup=False, highlight=False)


@torch.no_grad()
def masked(config: Config, images: Tensor) -> tuple[Tensor, Tensor]:
    """A finished arm's masks [n 1 H W] over whole images uint8 [n 3 H W], and the learned views in uint8."""
    d = config.designer
    assert d.mask is not None
    designer = DESIGNERS[d.mask](d.width, d.depth, d.stride, d.keep_ratio)
    designer.load_state_dict(load_checkpoint(config.out)["steer"]["designer"])
    plain = images.float() / 255
    masks = designer(start_backbone().normalise(images))
    views = learned_views(plain, masks, fill_in(plain, d.fill, d.blur_sigma, torch.Generator().manual_seed(0)))
    return masks, (views * 255).to(torch.uint8)


@torch.no_grad()
def patch_map(backbone: Backbone, images: Tensor) -> Tensor:
    """Patch features [n h w D]."""
    features = backbone.eval()(backbone.normalise(images))
    return features.patches.unflatten(1, features.grid)


def make_start(path: Path) -> None:
    """Train the checkpoint of START_CONFIG and keep what an arm needs of it, in half precision."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(load_config(START_CONFIG, [f"out={folder}/start"]))
        state = load_checkpoint(run)
    half = {part: {name: value.half() for name, value in state[part].items()} for part in ("teacher", "objective")}
    torch.save({"step": state["step"], **half}, path)


if __name__ == "__main__":
    make_start(Path(sys.argv[1]))
