"""The command line of the evaluations: `dino-value eval NAME …`, `dino-value eval all …`, `python eval/NAME.py …`."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from dino_value.arguments import Parser
from dino_value.config import load_section
from dino_value.data.check import other_place
from dino_value.data.conventions import Conventions, conventions, using
from dino_value.data.labelled import LabelledSource, Split, Subset
from dino_value.data.layouts import Layout, open_labelled
from dino_value.errors import EXIT_DONE, EXIT_USER, UserError
from dino_value.eval import EVALUATIONS, intervals, output
from dino_value.eval.base import NOT_SETTINGS, Evaluation, HeadOptions, Options, pick_device, timed, use_bfloat16
from dino_value.models.backbone import Backbone, load_backbone
from dino_value.models.linear import choose_matmul, use_onednn
from dino_value.models.weights import Reading
from dino_value.runs.metrics import environment

Pair = tuple[LabelledSource, LabelledSource]
SHOWN = 5
"""Reasons for leaving something out that are printed, of a split."""
ADVICE = """The defaults are the published protocols, for a GPU. For a first look on a CPU: --size 96, and --steps 300
where a head is trained. Protocols, flags and results.json: docs/evaluation.md; data sets: docs/data."""
ROOTS: dict[str, str] = {
    "imagefolder": "folder of train/CLASS/ and val/CLASS/",
    "ade20k": "ADEChallengeData2016, or any set in its layout",
    "nyuv2": "folder of nyu_depth_v2_labeled.mat and splits.mat, or of lists of pairs",
}


def evaluation(name: str) -> Evaluation[Any]:
    """The registered evaluation of that name.

    Raises:
        UserError: there is none.
    """
    if name not in EVALUATIONS:
        raise UserError(f"eval {name}: choose {', '.join([*EVALUATIONS, 'all'])}")
    found: Evaluation[Any] = importlib.import_module(EVALUATIONS[name]).EVALUATION
    return found


def main(arguments: Sequence[str]) -> int:
    """`dino-value eval …`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        names = ",".join([*EVALUATIONS, "all"])
        print(f"usage: dino-value eval {{{names}}} RUN_OR_WEIGHTS … --data PATH --out DIR [--help]\n")
        for name in EVALUATIONS:
            print(f"  {name:<10} {evaluation(name).description}")
        print(f"  {'all':<10} Every evaluation whose data is given, and one table.\n\n{ADVICE}")
        return EXIT_DONE if arguments else EXIT_USER
    if arguments[0] == "all":
        return run_all(arguments[1:])
    return run(evaluation(arguments[0]), arguments[1:])


# --- flags


def parse_size(text: str) -> tuple[int, int]:
    """`512` or `480x640` (height × width) to (height, width)."""
    parts = text.lower().split("x")
    try:
        height, width = int(parts[0]), int(parts[-1])
    except ValueError:
        height = width = 0
    if len(parts) > 2 or min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 512 or 480x640 (height x width)")
    return height, width


def parse_share(text: str) -> float:
    """A number in [0, 1]."""
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in [0, 1]")
    return share


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, of flags that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default is None or action.default == ()
        return action.help if unset or action.nargs == 0 else super()._get_help_string(action)


def build_parser(found: Evaluation[Any]) -> argparse.ArgumentParser:
    """The flags that every evaluation has, and its own; the defaults are the published protocol."""
    switch = argparse.BooleanOptionalAction
    defaults = found.defaults
    parser = Parser(
        f"dino-value eval {found.name}",
        description=found.description,
        epilog=ADVICE,
        formatter_class=_Help,
    )
    parser.add_argument(
        "weights",
        metavar="RUN_OR_WEIGHTS",
        nargs="+",
        help="run folders, or .safetensors or .pth files; several give one comparison table",
    )
    parser.add_argument("--data", required=True, help=f'{ROOTS[found.layout]}; or "scenes", the embedded set')
    parser.add_argument(
        "--out", required=True, type=Path, help="folder that gets results.json, pictures and what --resume needs"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--model", help="timm name, for a weights file that does not name its architecture")
    parser.add_argument(
        "--min-match", default=0.9, type=parse_share, help="refuse weights that fill less of the model, a share"
    )
    parser.add_argument(
        "--backbone",
        action="append",
        metavar="KEY=VALUE",
        help="how a weights file is read or its model built, as backbone.KEY of training; may be repeated: "
        "prefix, table, positions, random, kwargs.in_chans, …",
    )
    parser.add_argument(
        "--files",
        action="append",
        metavar="KEY=VALUE",
        help="what the data's files cannot say, as data.KEY of training; may be repeated: range, max_pixels, "
        "depth_units, max_depth",
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        help=f"height x width, or one side (default: {output.format_size(defaults.size)}, "
        "or the nearest that the patch size divides)",
    )
    parser.add_argument(
        "--blocks", default=defaults.blocks, type=int, help="features of the last so many blocks, side by side"
    )
    parser.add_argument("--batch", default=defaults.batch, type=int, help="images per head update and forward pass")
    parser.add_argument("--seed", default=defaults.seed, type=int, help="of every random choice")
    parser.add_argument("--device", default=defaults.device, help="cpu, cuda, cuda:1, …; auto takes CUDA if present")
    parser.add_argument("--matmul", default="torch", help="on the CPU: torch, onednn or auto (docs/speed.md)")
    parser.add_argument(
        "--bf16", action=switch, default=defaults.bf16, help="backbone in bfloat16; by default on CUDA, not on a CPU"
    )
    parser.add_argument("--workers", default=defaults.workers, type=int, help="processes that read images; 0: this one")
    parser.add_argument("--save-images", default=0, type=int, metavar="N", help="draw the first N predictions")
    parser.add_argument(
        "--skip-unreadable", action=switch, default=False, help="go on without items that cannot be read"
    )
    if isinstance(defaults, HeadOptions):
        parser.add_argument("--steps", default=defaults.steps, type=int, help="head updates")
        parser.add_argument("--lr", default=defaults.lr, type=float, help="the head's peak learning rate")
        parser.add_argument(
            "--weight-decay", default=defaults.weight_decay, type=float, help="of the head, and of a backbone trained"
        )
        parser.add_argument("--labels", type=int, metavar="N", help="train on N of the training items; default: all")
        parser.add_argument(
            "--finetune", action=switch, default=False, help="train a copy of the backbone with the head"
        )
        parser.add_argument(
            "--finetune-lr", default=defaults.finetune_lr, type=float, help="the backbone's peak learning rate"
        )
        parser.add_argument(
            "--augment", action=switch, default=False, help="mirror at random; features are computed each step"
        )
        parser.add_argument(
            "--cache-gb",
            default=defaults.cache_gb,
            type=float,
            help="RAM for frozen features, or they are computed each step",
        )
        parser.add_argument(
            "--resume", action=switch, default=False, help="go on with a head training that was stopped"
        )
    found.flags(parser)
    return parser


def open_pair(layout: Layout) -> Any:
    """An `Evaluation.open` for sources of `layout`: one to train on and one held out."""

    def open_sources(arguments: argparse.Namespace) -> Pair:
        return open_split(layout, arguments, "training"), open_split(layout, arguments, "validation")

    return open_sources


def open_split(
    layout: Layout, arguments: argparse.Namespace, split: Split, group_pattern: str | None = None
) -> LabelledSource:
    """One split; with `--skip-unreadable` without what cannot be read."""
    try:
        source = open_labelled(
            layout, arguments.data, split, group_pattern=group_pattern, skip_unreadable=arguments.skip_unreadable
        )
    except UserError as error:
        raise UserError(f"{error}{other_place(arguments.data, layout)}") from None
    if isinstance(source, Subset):
        count_skipped(arguments, split, source.skipped)
    return source


def count_skipped(arguments: argparse.Namespace, part: str, reasons: Sequence[str]) -> None:
    """Say what is left out, and keep how many for results.json."""
    for reason in reasons[:SHOWN]:
        print(f"left out: {reason}", file=sys.stderr)
    if len(reasons) > SHOWN:
        print(f"left out: {len(reasons) - SHOWN} more of {part}", file=sys.stderr)
    arguments.unreadable = {**getattr(arguments, "unreadable", {}), part: len(reasons)}


def describe_pair(data: Pair) -> dict[str, Any]:
    """An `Evaluation.describe` for `open_pair`."""
    return {"training": len(data[0]), "validation": len(data[1])}


# --- one evaluation, of one checkpoint or several


@dataclass(frozen=True)
class Scored:
    """One checkpoint's metrics, and the draws of their intervals."""

    metrics: dict[str, float]
    draws: intervals.Draws

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        found = {name: intervals.interval(draws) for name, draws in self.draws.items()}
        return {name: ends for name, ends in found.items() if ends is not None}


def run(found: Evaluation[Any], argv: Sequence[str]) -> int:
    """Load, evaluate, print the table, write results.json.

    Keys of the metrics with a slash, such as `iou/wall`, go into a mapping of their own: `{"iou": {"wall":
    …}}`. With several checkpoints each has a folder below `--out`, which gets comparison.json.

    Raises:
        UserError: whatever the user can mend.
    """
    arguments = build_parser(found).parse_args(argv)
    check_kept([arguments])
    scored = run_each(found, arguments)
    if len(scored) > 1:
        rows = {
            name: shown(found.name, found.headline, one, next(iter(scored.values()))) for name, one in scored.items()
        }
        output.print_comparison(f"{found.name} on {arguments.data}", rows)
        content = {name: compared(found.headline, one, next(iter(scored.values()))) for name, one in scored.items()}
        output.write_results(arguments.out / "comparison.json", {found.name: content})
    remove_states([arguments])
    return EXIT_DONE


def folders(arguments: argparse.Namespace) -> dict[str, Path]:
    """Where each checkpoint's results go."""
    names = unique_names(arguments.weights)
    return {name: arguments.out if len(names) == 1 else arguments.out / name for name in names}


def remove_states(calls: Iterable[argparse.Namespace]) -> None:
    """Trained heads are kept until all of a command is done: with `--resume` none is trained twice."""
    for out in (out for arguments in calls for out in folders(arguments).values()):
        for state in out.glob(".*.pt"):
            state.unlink()


def check_kept(calls: Iterable[argparse.Namespace]) -> None:
    """Frozen and fine-tuned results, and those of other numbers of labels, do not take each other's place.

    Raises:
        UserError: a folder holds the others.
    """
    for arguments in (arguments for arguments in calls if hasattr(arguments, "finetune")):
        wanted = output.training_of(vars(arguments))
        for path in (out / "results.json" for out in folders(arguments).values()):
            held = output.training_of(output.settings_in(path) or vars(arguments))
            if held != wanted:
                raise UserError(f"{path}: holds results {held}, these are {wanted}: give another --out")


def run_each(found: Evaluation[Any], arguments: argparse.Namespace) -> dict[str, Scored]:
    """Every checkpoint by name, and its results.json."""
    device = pick_device(arguments.device)
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    scored: dict[str, Scored] = {}
    data, first = None, conventions()
    for (name, out), weights in zip(folders(arguments).items(), arguments.weights, strict=True):
        options, backbone = prepare(found, arguments, weights)
        told = conventions_of(arguments, backbone.channels)
        if data is None:
            first = told
            with using(told):
                data = found.open(arguments)
        if told != first:
            raise UserError(f"{weights}: takes {told.channels} channels, the one before it {first.channels}")
        output.prepare_folder(out)
        if isinstance(options, HeadOptions):
            options = replace(options, state=out, resume=arguments.resume, origin=identity(weights))
        scored[name] = run_one(found, arguments, options, backbone, data, weights, out)
    return scored


def conventions_of(arguments: argparse.Namespace, channels: int) -> Conventions:
    """How a command line has the data's files read, for a backbone of `channels`."""
    told = Conventions.of(load_section("data", arguments.files or ()), channels)
    return replace(told, max_depth=arguments.max_depth) if hasattr(arguments, "max_depth") else told


def prepare(found: Evaluation[Any], arguments: argparse.Namespace, weights: str) -> tuple[Options, Backbone]:
    """The options of a command line, and the backbone."""
    known = {field.name for field in fields(found.defaults)}
    given = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in vars(arguments).items()
        if key in known
    }
    size = arguments.size or found.defaults.size
    told = load_section("backbone", arguments.backbone or ())
    backbone = load_backbone(weights, arguments.model, max(size), told.kwargs, arguments.min_match, Reading.of(told))
    if choose_matmul(arguments.matmul, pick_device(arguments.device)) == "onednn":
        use_onednn(backbone)
    if arguments.size is None:
        patch = backbone.patch_size
        size = tuple(max(1, round(side / patch)) * patch for side in size)
        if size != found.defaults.size:
            print(f"{found.name}: size {output.format_size(size)}, which {patch} px patches divide", file=sys.stderr)
    return replace(found.defaults, **{**given, "size": size, "progress": not arguments.quiet}), backbone


def identity(weights: str) -> str:
    """A name for the weights that changes when the file does."""
    path = Path(weights) / "backbone.safetensors" if Path(weights).is_dir() else Path(weights)
    found = path.stat()
    return f"{path.resolve()} {found.st_size} {found.st_mtime_ns}"


def unique_names(weights: Sequence[str]) -> list[str]:
    """What each checkpoint is called: the end of its path, as long as it takes to tell them apart.

    Raises:
        UserError: one is given twice.
    """
    paths = [Path(text).absolute() for text in weights]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["_".join(part for part in path.with_suffix("").parts[-length:] if part != "/") for path in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{', '.join(weights)}: a checkpoint is given twice")


def run_one(
    found: Evaluation[Any],
    arguments: argparse.Namespace,
    options: Options,
    backbone: Backbone,
    data: Any,
    weights: str,
    out: Path,
) -> Scored:
    """Evaluate, write results.json and the pictures, print the table."""
    spent: dict[str, float] = {}
    with timed(spent, "total"):
        result = found.measure(backbone, data, options)
    scored = Scored(result.metrics, intervals.bootstrap(result.rows, result.statistic))
    device = pick_device(options.device)
    score_seconds = result.seconds.get("score", spent["total"])
    about = {
        "evaluation": found.name,
        "interval": {name: list(ends) for name, ends in scored.intervals.items()},
        "interval_of": f"95 %, percentile bootstrap over {len(result.rows)} {result.unit}, "
        f"{intervals.RESAMPLES} resamples",
        "backbone": {"path": str(weights), "name": backbone.name},
        "data": {"path": str(arguments.data), **found.describe(data)},
        "settings": {key: value for key, value in asdict(options).items() if key not in NOT_SETTINGS},
        "seconds": round(spent["total"], 2),
        "phases": {name: round(seconds, 2) for name, seconds in result.seconds.items()},
        "images_per_second": round((result.images or len(result.rows)) / max(score_seconds, 1e-9), 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "matmul": choose_matmul(arguments.matmul, device),
        "bf16": use_bfloat16(options.bf16, device),
        "torch": torch.__version__,
        "environment": environment(options.seed, device),
        **result.about,
    }
    if arguments.skip_unreadable:
        about["unreadable"] = getattr(arguments, "unreadable", {})
    output.write_results(out / "results.json", {**output.nest(result.metrics), **about})
    if result.pictures:
        from dino_value.eval.pictures import write_pictures

        write_pictures(out / "pictures", result.pictures)
    print(f"{found.name}: {weights} on {arguments.data}")
    output.print_table(result.metrics, scored.intervals)
    return scored


def shown(name: str, headline: Sequence[str], one: Scored, first: Scored) -> dict[str, str]:
    """A row of the comparison table."""
    row = {}
    for metric in headline:
        if metric in one.metrics:
            row[f"{name} {metric}"] = output.format_value(one.metrics[metric], one.intervals.get(metric))
            ends = difference(metric, one, first) if one is not first else None
            if ends:
                row[f"{name} {metric}"] += f"\nΔ {ends['value']:+.4f} [{ends['low']:+.4f}, {ends['high']:+.4f}]"
    return row


def compared(headline: Sequence[str], one: Scored, first: Scored) -> dict[str, Any]:
    """The same as JSON: value, interval, and the difference from the first checkpoint."""
    content: dict[str, Any] = {}
    for metric in headline:
        if metric in one.metrics:
            content[metric] = {"value": output.nest({"": one.metrics[metric]})[""]}
            if metric in one.intervals:
                content[metric]["interval"] = list(one.intervals[metric])
            ends = difference(metric, one, first) if one is not first else None
            if ends:
                content[metric]["difference"] = ends
    return content


def difference(metric: str, one: Scored, first: Scored) -> dict[str, float] | None:
    """`one` minus `first` with its paired interval: both were scored on the same images, and resampled alike."""
    if metric not in one.draws or metric not in first.draws:
        return None
    ends = intervals.interval(one.draws[metric] - first.draws[metric])
    if ends is None:
        return None
    return {"value": one.metrics[metric] - first.metrics[metric], "low": ends[0], "high": ends[1]}


# --- all evaluations in one call


def run_all(argv: Sequence[str]) -> int:
    """`dino-value eval all`: every evaluation whose data is given, and one table.

    `NAME.flag=value` sets a flag of one evaluation (`seg.steps=300`), `flag=value` of all that have it.

    Raises:
        UserError: whatever the user can mend.
    """
    every = {name: evaluation(name) for name in EVALUATIONS}
    layouts = sorted({found.layout for found in every.values()})
    parser = Parser(
        "dino-value eval all",
        description="Every evaluation whose data is given. NAME.flag=value sets a flag of one evaluation, "
        "flag=value of all that have it: seg.steps=300 device=cpu flip=true depth.eigen-crop=false "
        "retrieval.data=ROOT retrieval.set=roxford5k",
    )
    parser.add_argument("weights", metavar="RUN_OR_WEIGHTS", nargs="*", help="run folders or weights files")
    for layout in layouts:
        names = ", ".join(name for name, found in every.items() if found.layout == layout)
        parser.add_argument(f"--data-{layout}", help=f"root of the data of {names}")
    parser.add_argument("--data", help='what stands for those not given: "scenes"')
    parser.add_argument("--out", required=True, type=Path, help="folder that gets a folder for each evaluation")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parsed = parser.parse_intermixed_args(argv)  # settings may also follow an option
    settings = [part for part in parsed.weights if "=" in part and not Path(part).exists()]
    weights = [part for part in parsed.weights if part not in settings]
    if not weights:
        raise UserError("eval all: no checkpoint given; see dino-value eval all --help")
    flags = split_settings(settings, every)
    jobs = {name: getattr(parsed, f"data_{found.layout}") or parsed.data for name, found in every.items()}
    jobs |= {name: given[given.index("--data") + 1] for name, given in flags.items() if "--data" in given}
    jobs = {name: data for name, data in jobs.items() if data}
    if not jobs:
        raise UserError(f"eval all: no data given; add {' or '.join(f'--data-{layout}' for layout in layouts)}")
    output.prepare_folder(parsed.out)
    # All of them are parsed before the first is run.
    calls = {
        name: build_parser(every[name]).parse_args(
            [*weights, "--data", str(data), "--out", str(parsed.out / name), *["--quiet"] * parsed.quiet, *flags[name]]
        )
        for name, data in jobs.items()
    }
    check_kept(calls.values())
    rows: dict[str, dict[str, str]] = {name: {} for name in unique_names(weights)}
    content: dict[str, Any] = {}
    for name, arguments in calls.items():
        scored = run_each(every[name], arguments)
        first = next(iter(scored.values()))
        headline = every[name].headline
        content[name] = {one: compared(headline, found, first) for one, found in scored.items()}
        for one, found in scored.items():
            rows[one] |= shown(name, headline, found, first)
    output.write_results(parsed.out / "comparison.json", content)
    output.print_comparison("all evaluations [95 % interval]", transpose(rows))
    remove_states(calls.values())
    return EXIT_DONE


def transpose(rows: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """A row a metric: there are more of them than checkpoints."""
    turned: dict[str, dict[str, str]] = {}
    for name, row in rows.items():
        for metric, text in row.items():
            turned.setdefault(metric, {})[name] = text
    return turned


def split_settings(settings: Sequence[str], every: Mapping[str, Evaluation[Any]]) -> dict[str, list[str]]:
    """`seg.steps=300` as flags of seg, `steps=300` as flags of every evaluation that has them.

    Raises:
        UserError: no evaluation has it.
    """
    actions = {
        name: {action.dest: action for action in build_parser(found)._actions if action.option_strings}
        for name, found in every.items()
    }
    flags: dict[str, list[str]] = {name: [] for name in every}
    for setting in settings:
        key, _, value = setting.partition("=")
        target, dot, flag = key.partition(".")
        names, flag = ([target], flag) if dot else (list(every), key)
        takers = [name for name in names if flag.replace("-", "_") in actions.get(name, ())]
        if not takers:
            raise UserError(f"{setting}: no evaluation has this flag; choose NAME.flag=value with {', '.join(every)}")
        option = f"--{flag.replace('_', '-')}"
        for name in takers:
            if isinstance(actions[name][flag.replace("-", "_")], argparse.BooleanOptionalAction):
                if value not in ("true", "false"):
                    raise UserError(f"{setting}: choose true or false")
                flags[name].append(option if value == "true" else option.replace("--", "--no-", 1))
            else:
                flags[name] += [option, *value.split(",")]
    return flags
