"""`dino-value language train|eval|decontaminate|probe|map|curve`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dino_value.arguments import Parser
from dino_value.errors import EXIT_DONE, UserError
from dino_value.files import write_json


def main(arguments: Sequence[str]) -> int:
    """Run one command; the exit code."""
    parsed = _parse(arguments)
    code: int = parsed.command(parsed)
    return code


def check(arguments: Sequence[str]) -> None:
    """Refuse what would be refused before it has done anything.

    Raises:
        UserError: bad flags or settings.
    """
    parsed = _parse(arguments)
    if parsed.command is _train:
        from dino_value.language.config import load_language_config

        load_language_config(parsed.config, parsed.overrides)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    parsed, rest = parser.parse_known_args(list(arguments))
    # argparse takes a list of positionals only once: key=value may also follow an option.
    if rest and (any("=" not in part or part.startswith("-") for part in rest) or "overrides" not in parsed):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = Parser("dino-value language", description="Causal language models, steered by a few examples.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="continue pretraining; the same command goes on after a stop")
    train.add_argument("config", metavar="CONFIG", help="a YAML file, or a packaged one such as language/lora")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="out=DIR method=value learner.model=DIR …")
    train.add_argument("--quiet", action="store_true", help="no progress")
    train.add_argument("--override", action="store_true", help="go on with a run although its settings are others now")
    train.set_defaults(command=_train)

    look = commands.add_parser("eval", help="answer loss, Pass@1 and Pass@k, multiple choice")
    look.add_argument("model", metavar="RUN_OR_MODEL", help="a run folder, a model folder or a GGUF file")
    look.add_argument("file", metavar="FILE", help="problems with answers: .jsonl, .parquet; omega: a folder too")
    look.add_argument(
        "--task", default="gsm8k", choices=("gsm8k", "boxed", "omega", "mmlu"), help="(default: %(default)s)"
    )
    look.add_argument("--limit", type=int, help="only the first so many problems")
    look.add_argument("--samples", type=int, default=0, help="completions a problem for Pass@k (default: greedy only)")
    look.add_argument("--temperature", type=float, default=0.7, help="of the samples (default: %(default)s)")
    look.add_argument("--shots", type=int, default=0, help="solved examples before each question")
    look.add_argument("--demonstrations", metavar="FILE", help="where these come from")
    look.add_argument("--new-tokens", type=int, default=256, help="of a completion, at most (default: %(default)s)")
    look.add_argument("--batch", type=int, default=16, help="(default: %(default)s)")
    look.add_argument("--seed", type=int, default=0)
    look.add_argument("--device", default="auto")
    look.add_argument("--loss-only", action="store_true", help="no generation")
    look.add_argument("--out", type=Path, help="the JSON file (default for a run: RUN/results/FILE.json)")
    look.set_defaults(command=_evaluate)

    clean = commands.add_parser("decontaminate", help="remove from a stream what is also in evaluation sets")
    clean.add_argument("stream", type=Path, metavar="STREAM.jsonl")
    clean.add_argument("--against", nargs="+", required=True, metavar="TEST.jsonl", help="evaluation files")
    clean.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets STREAM.jsonl and report.json")
    clean.add_argument("--ngram", type=int, default=5, help="words (default: %(default)s)")
    clean.add_argument("--jaccard", type=float, default=0.5, help="similarity of texts (default: %(default)s)")
    clean.add_argument(
        "--containment", type=float, default=0.8, help="share of a test question in a text (default: %(default)s)"
    )
    clean.set_defaults(command=_decontaminate)

    probe = commands.add_parser("probe", help="does V foretell what one step of a run does to held-out feedback?")
    probe.add_argument("run", type=Path, metavar="RUN", help="folder of a run with feedback")
    probe.add_argument("held", metavar="FILE", help="examples that taught nothing, on which the decrease is measured")
    probe.add_argument("--trials", type=int, default=32, help="one-step updates tried (default: %(default)s)")
    probe.add_argument("--limit", type=int, default=64, help="examples of FILE (default: %(default)s)")
    probe.add_argument("--seed", type=int, default=0, help="of the unlabeled batches (default: %(default)s)")
    probe.add_argument("--out", type=Path, help="the JSON file (default: RUN/results/probe.json)")
    probe.set_defaults(command=_probe)

    look = commands.add_parser("map", help="token by token: targets the feedback asks for, targets the run makes")
    look.add_argument("run", type=Path, metavar="RUN", help="folder of a run with feedback")
    look.add_argument("--rows", type=int, default=1, help="of unlabeled text (default: %(default)s)")
    look.add_argument("--seed", type=int, default=0, help="of the text (default: %(default)s)")
    look.add_argument("--out", type=Path, help="the JSON file (default: RUN/results/map.json)")
    look.set_defaults(command=_map)

    curve = commands.add_parser("curve", help="token efficiency: a metric of runs against unlabeled tokens")
    curve.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders; of one method: its seeds")
    curve.add_argument("--metric", default="held_loss", help="a key of metrics.jsonl (default: %(default)s)")
    curve.add_argument("--out", type=Path, help="the .png; .json goes beside it (default: RUN/results/METRIC.png)")
    curve.set_defaults(command=_curve)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from dino_value.language.config import load_language_config
    from dino_value.language.trainer import train

    config = load_language_config(arguments.config, arguments.overrides)
    print(train(config, quiet=arguments.quiet, override=arguments.override))
    return EXIT_DONE


def _evaluate(arguments: argparse.Namespace) -> int:
    from dino_value.language.evaluate import evaluate, print_metrics

    for name in ("limit", "new_tokens", "batch"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if min(arguments.samples, arguments.shots) < 0 or arguments.temperature <= 0:
        raise UserError("--samples and --shots must not be negative, --temperature must be above 0")
    found = evaluate(
        arguments.model,
        arguments.file,
        arguments.task,
        arguments.limit,
        arguments.samples,
        arguments.temperature,
        arguments.shots,
        arguments.demonstrations,
        arguments.new_tokens,
        arguments.batch,
        arguments.seed,
        arguments.device,
        arguments.loss_only,
    )
    path = arguments.out
    if path is None and (Path(arguments.model) / "config.yaml").is_file():
        path = Path(arguments.model) / "results" / f"{arguments.task}_{Path(arguments.file).stem}.json"
    print_metrics(found["metrics"])
    if path is not None:
        asked = {name: str(value) for name, value in vars(arguments).items() if name != "command"}
        _write(path, {"asked": asked, **found})
        print(path)
    return EXIT_DONE


def _decontaminate(arguments: argparse.Namespace) -> int:
    from dino_value.language.decontaminate import Settings, decontaminate

    settings = Settings(arguments.ngram, arguments.jaccard, arguments.containment)
    if settings.ngram < 1 or not all(0 < share <= 1 for share in settings[1:]):
        raise UserError("--ngram must be 1 or more, --jaccard and --containment above 0 and at most 1")
    report = decontaminate(arguments.stream, arguments.against, arguments.out, settings)
    print(f"{report['lines']} lines: {report['kept']} kept, {report['removed_count']} removed")
    print(arguments.out / arguments.stream.name)
    print(arguments.out / "report.json")
    return EXIT_DONE


def _probe(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from dino_value.language.probe import probe_run
    from dino_value.report.terminal import probe_table

    path = arguments.out or arguments.run / "results" / "probe.json"
    found = probe_run(arguments.run, arguments.held, arguments.trials, arguments.limit, arguments.seed)
    _write(path, found)
    Console().print(probe_table(found, "answer"))
    print(path)
    return EXIT_DONE


def _map(arguments: argparse.Namespace) -> int:
    from dino_value.language.value_map import map_run, print_map

    path = arguments.out or arguments.run / "results" / "map.json"
    found = map_run(arguments.run, arguments.rows, arguments.seed)
    _write(path, found)
    print_map(found)
    print(path)
    return EXIT_DONE


def _curve(arguments: argparse.Namespace) -> int:
    from dino_value.language.curve import write_curves

    path = arguments.out or arguments.runs[0] / "results" / f"{arguments.metric}.png"
    if path.suffix != ".png":
        raise UserError(f"--out {path}: must end in .png")
    try:
        write_curves(arguments.runs, path, arguments.metric)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    print(path)
    return EXIT_DONE


def _write(path: Path, content: object) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
