"""The command line: parse, load, call. Every command is one function elsewhere, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dino_value import __version__
from dino_value.arguments import Parser, exit_code
from dino_value.errors import EXIT_DONE, EXIT_USER, UserError

if TYPE_CHECKING:
    from dino_value.config import Config

# Commands with a parser of their own, each a function of the arguments that follow its name.
DELEGATED = {
    "eval": (
        "dino_value.eval.command",
        "linear, knn, seg, depth, retrieval, all: what the features of runs are worth",
    ),
    "language": ("dino_value.language.command", "causal language models: train, eval, decontaminate, probe, curve"),
    "launch": ("dino_value.slurm.launch", "train or evaluate as a job, on SLURM or in processes here"),
    "jobs": ("dino_value.slurm.jobs", "the launched jobs: state, last metrics, end of the log"),
    "sweep": ("dino_value.sweep.command", "search settings by evaluation results (Optuna); goes on after any stop"),
    "pareto": (
        "dino_value.studies.pareto",
        "runs and sweeps in the plane of two metrics: front, hypervolume, figure",
    ),
}
PAIRS = 3  # of halves of the labels
CHECK_LAYOUTS = ("auto", "ade20k", "nyuv2", "imagefolder", "revisited", "images")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 2 the user's mistake, 75 stopped but resumable."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: _command(arguments))


def _command(arguments: list[str]) -> int:
    if arguments and arguments[0] in DELEGATED:
        module, _ = DELEGATED[arguments[0]]
        return int(importlib.import_module(module).main(arguments[1:]))
    parsed = _parse(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    return command(parsed)


def check(arguments: Sequence[str]) -> None:
    """Refuse a `train`, `eval` or `language` command that would be refused before it has done anything.

    Raises:
        UserError: bad flags or settings, or another command.
    """
    if arguments[0] == "train":
        from dino_value.config import load_config

        parsed = _parse(list(arguments))
        _evaluations(load_config(parsed.config, parsed.overrides))
    elif arguments[0] == "eval" and len(arguments) > 1:
        from dino_value.eval.command import build_parser, evaluation

        build_parser(evaluation(arguments[1])).parse_args(list(arguments[2:]))
    elif arguments[0] == "language" and len(arguments) > 1:
        from dino_value.language.command import check as check_language

        check_language(arguments[1:])
    else:
        raise UserError(f"{' '.join(arguments)}: give a configuration to train, or eval NAME and its flags")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes a list of positionals only once: key=value may also follow an option.
    if rest and (any("=" not in part or part.startswith("-") for part in rest) or "overrides" not in parsed):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = Parser("dino-value", description="DINO pretraining, steered by a few labels.")
    parser.add_argument("--version", action="version", version=f"dino-value {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    quickstart = commands.add_parser("quickstart", help="the whole method on embedded scenes, in minutes on a CPU")
    quickstart.add_argument(
        "--out", type=Path, default=Path("quickstart"), help="folder of the report (default: %(default)s)"
    )
    quickstart.add_argument("--seeds", type=int, default=1, help="paired repetitions (default: %(default)s)")
    quickstart.add_argument("--steps", type=int, help="learner steps of each arm (default: the configuration's)")
    quickstart.set_defaults(command=_quickstart)

    train = commands.add_parser("train", help="continue pretraining; the same command goes on after a stop")
    train.add_argument("config", metavar="CONFIG", help="a YAML file, or a packaged one such as rooms/cpu")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="out=DIR method=value steps=300 optim.lr=1e-4 …"
    )
    train.add_argument("--quiet", action="store_true", help="no progress")
    train.add_argument("--override", action="store_true", help="go on with a run although its settings are others now")
    train.set_defaults(command=_train)

    help_ = commands.add_parser("help", help="every setting of train, or one: its default, choices and what it does")
    help_.add_argument("key", nargs="?", metavar="KEY", help="a key or a section, such as designer.kl or value")
    help_.set_defaults(command=_help)

    compare = commands.add_parser("compare", help="arms against each other, paired by seed, a verdict for each claim")
    compare.add_argument("spec", metavar="SPEC", help="a YAML file, or a packaged one such as compare/scenes")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="of the specification: out=DIR seeds=5 …")
    compare.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    compare.add_argument("--quiet", action="store_true", help="no progress")
    compare.set_defaults(command=_compare)

    report = commands.add_parser("report", help="one HTML page about runs: curves, masks, features, evaluations")
    report.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run folders; one method a seed are paired arms"
    )
    report.add_argument("--out", type=Path, help="the page (default: RUN/report.html, or runs.html for several)")
    report.set_defaults(command=_report)

    probe = commands.add_parser("probe", help="does V foretell what one step of a run does to held-out feedback?")
    probe.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a run with feedback; with --agreement or CONFIG"
    )
    probe.add_argument("overrides", nargs="*", metavar="key=value", help="with --agreement: of the configuration")
    probe.add_argument("--agreement", action="store_true", help="before a run: is its direction the labels' own?")
    probe.add_argument("--pairs", type=int, help=f"with --agreement: repetitions (default: {PAIRS})")
    probe.add_argument("--trials", type=int, help="one-step updates tried (default: 32)")
    probe.add_argument("--held", type=int, help="labelled images a task, to measure on (default: 64)")
    probe.add_argument("--seed", type=int, help="of the unlabeled batches (default: 0)")
    probe.add_argument("--checkpoint", type=Path, metavar="FILE", help="of RUN/checkpoints (default: the newest)")
    probe.add_argument("--blocks", type=int, metavar="K", help="S is the last K blocks (default: the run's scope)")
    probe.add_argument("--batch", type=int, metavar="B", help="unlabeled images of a step (default: the run's)")
    probe.add_argument("--scale", type=float, help="length of the steps against the optimizer's (default: 1)")
    probe.add_argument("--out", type=Path, help="the JSON file (default: RUN/results/probe….json; --agreement: none)")
    probe.set_defaults(command=_probe)

    replay = commands.add_parser("replay", help="compute again a step whose loss or gradient was not finite")
    replay.add_argument("file", type=Path, metavar="FILE", help="of RUN/nonfinite")
    replay.add_argument("overrides", nargs="*", metavar="key=value", help="where data lie now, another device")
    replay.set_defaults(command=_replay)

    export = commands.add_parser("export", help="write a run's backbone for timm, transformers or torch.hub")
    export.add_argument("run", type=Path, metavar="RUN_OR_WEIGHTS", help="a run folder or a weights file")
    export.add_argument("--format", required=True, choices=("timm", "hf", "torchhub"))
    export.add_argument("--out", type=Path, help="folder that gets weights and model card (default: RUN/export/FORMAT)")
    export.add_argument("--model", help="timm name, for a file that names none")
    export.set_defaults(command=_export)

    data = commands.add_parser("data", help="look at data sets").add_subparsers(required=True, metavar="COMMAND")
    look = data.add_parser("check", help="counts, classes, sizes, depths, unreadable files, overlaps, near-duplicates")
    look.add_argument("root", metavar="ROOT", help="a data set: a folder, or a pattern of WebDataset shards")
    look.add_argument("--layout", default="auto", choices=CHECK_LAYOUTS, help="how its files lie (default: recognised)")
    look.add_argument("--unlabeled", metavar="PATH", help="also compare this unlabeled stream with the held-out images")
    look.add_argument("--field", metavar="NAME", help="of shards: which member of a sample is its image (data.field)")
    look.add_argument(
        "--files",
        action="append",
        metavar="KEY=VALUE",
        help="what the files cannot say, as data.KEY of training: range, max_pixels, depth_units, max_depth",
    )
    look.add_argument("--channels", type=int, default=3, help="that the backbone takes (default: 3)")
    look.add_argument(
        "--near",
        type=int,
        metavar="BITS",
        help="perceptual hashes that differ in at most so many of 64 bits are near-duplicates (default: 4, and nothing "
        "where imagehash is not installed; -1: do not look)",
    )
    look.add_argument("--json", type=Path, metavar="FILE", help="write all that was found")
    look.set_defaults(command=_check_data)

    for name, (_, text) in DELEGATED.items():  # only for the help text
        commands.add_parser(name, help=text)
    return parser


def _quickstart(arguments: argparse.Namespace) -> int:
    from dino_value.studies.quickstart import quickstart

    quickstart(arguments.out, arguments.seeds, arguments.steps)
    return EXIT_DONE


def _train(arguments: argparse.Namespace) -> int:
    from dino_value.config import load_config

    config = load_config(arguments.config, arguments.overrides)  # a refusal does not wait for torch
    from dino_value.training.trainer import train

    evaluate = _evaluations(config)
    folder = train(config, quiet=arguments.quiet, override=arguments.override, evaluate=evaluate)
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(folder)
    return EXIT_DONE


def _evaluations(config: Config) -> Callable[[Path], str] | None:
    """What submits a run's evaluations, if it has any.

    Raises:
        UserError: one of them would be refused.
    """
    if not config.evaluation.every:
        return None
    from dino_value.slurm.evaluations import Evaluations

    return Evaluations(config.evaluation).submit


def _help(parsed: argparse.Namespace) -> int:
    from dino_value.settings import help_text

    print(help_text(parsed.key))
    return EXIT_DONE


def _compare(arguments: argparse.Namespace) -> int:
    from dino_value.studies.compare import compare, load_spec, print_claims, write_page

    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: at least one")
    spec = load_spec(arguments.spec, arguments.overrides)
    results = compare(spec, arguments.jobs, arguments.quiet)
    command = " ".join(["dino-value", "compare", arguments.spec, *arguments.overrides])
    summary = (
        f"{len(spec.arms)} arms of {spec.config}, continued from one start on one stream with {spec.seeds} paired "
        "seeds; step 0 is the start itself."
    )
    path = write_page(spec, results, f"Comparison: {arguments.spec}", summary, [command])
    print_claims(spec, results)
    print(path)
    return EXIT_DONE


def _report(arguments: argparse.Namespace) -> int:
    from dino_value.report.runs import report_runs

    default = arguments.runs[0] / "report.html" if len(arguments.runs) == 1 else Path("runs.html")
    print(report_runs(arguments.runs, arguments.out or default))
    return EXIT_DONE


def _probe(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from dino_value.files import write_json
    from dino_value.report.terminal import probe_table
    from dino_value.studies.probe import Probed, probe_run

    if arguments.agreement:
        return _probe_start(arguments)
    if arguments.pairs is not None:
        raise UserError(f"--pairs {arguments.pairs}: goes with --agreement")
    if arguments.overrides:
        raise UserError(f"{arguments.overrides[0]}: a run is probed as it was; key=value goes with --agreement")
    for name in ("blocks", "batch"):
        value = getattr(arguments, name)
        if value is not None and value < 1 + (name == "batch"):
            raise UserError(f"--{name} {value}: must be {1 + (name == 'batch')} or more")
    if arguments.checkpoint is not None and not arguments.checkpoint.is_file():
        raise UserError(f"--checkpoint {arguments.checkpoint}: no such file")
    given = {name: value for name in ("trials", "held", "seed") if (value := getattr(arguments, name)) is not None}
    scale = 1.0 if arguments.scale is None else arguments.scale
    what = Probed(arguments.checkpoint, arguments.blocks, arguments.batch, scale)
    found = probe_run(arguments.run, what=what, **given)
    other = {"step": arguments.checkpoint and found["step"], "blocks": what.blocks, "batch": what.batch}
    parts = [f"_{name}_{value}" for name, value in other.items() if value is not None]
    parts += [f"_scale_{what.scale:g}"] if what.scale != 1 else []
    path = arguments.out or arguments.run / "results" / f"probe{''.join(parts)}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    Console().print(probe_table(found, "downstream"))
    print(path)
    return EXIT_DONE


def _probe_start(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from dino_value.files import write_json
    from dino_value.report.terminal import agreement_table
    from dino_value.studies.probe import probe_start

    pairs = PAIRS if arguments.pairs is None else arguments.pairs
    if pairs < 1:
        raise UserError(f"--pairs {pairs}: must be 1 or more")
    if arguments.out is not None:
        try:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{arguments.out}: cannot be written ({error.strerror})") from None
        if arguments.out.is_dir():
            raise UserError(f"{arguments.out}: is a folder; name a file")
    for name in ("trials", "held", "seed", "checkpoint", "blocks", "batch", "scale"):
        if getattr(arguments, name) is not None:
            raise UserError(
                f"--{name} is not for --agreement: give --pairs, and key=value of the configuration, as seed=1 or "
                "value.scope.blocks=2"
            )
    found = probe_start(arguments.run, arguments.overrides, pairs)
    if arguments.out is not None:
        try:
            write_json(arguments.out, found)
        except OSError as error:
            raise UserError(f"{arguments.out}: cannot be written ({error.strerror})") from None
    Console().print(agreement_table(found))
    print("nothing was written; --out FILE writes it" if arguments.out is None else arguments.out)
    return EXIT_DONE


def _replay(arguments: argparse.Namespace) -> int:
    from dino_value.studies.replay import print_replay, replay

    print_replay(replay(arguments.file, arguments.overrides))
    return EXIT_DONE


def _export(arguments: argparse.Namespace) -> int:
    from dino_value.export.command import export

    written = export(arguments.run, arguments.format, arguments.out, arguments.model)
    print(written.folder)
    return EXIT_DONE


def _check_data(arguments: argparse.Namespace) -> int:
    from dino_value.config import load_section
    from dino_value.data.check import check_data, print_report
    from dino_value.data.conventions import Conventions, using
    from dino_value.files import write_json

    with using(Conventions.of(load_section("data", arguments.files or ()), arguments.channels)):
        report = check_data(arguments.root, arguments.layout, arguments.unlabeled, arguments.near, arguments.field)
    if arguments.json is not None:
        try:
            write_json(arguments.json, report.as_json())
        except OSError as error:
            raise UserError(f"{arguments.json}: cannot be written ({error.strerror})") from None
    print_report(report)
    return EXIT_DONE if report.usable else EXIT_USER


if __name__ == "__main__":
    sys.exit(main())
