"""All methods of dino_value.language on synthetic word problems: loss and accuracy on clean ones, over paired seeds.

A tiny model is trained from scratch on the noisy stream (`start`); for each seed every method goes on from it, with the
same stream and steps. Seeds differ in stream, feedback, designer and test. Settings were chosen on other seeds (100).

    python docs/examples/language_arithmetic.py OUT [--seeds 5]
    python docs/examples/language_arithmetic.py OUT --lookahead --seeds 3

--only does some of the seeds, for several processes: the command without it then finds them done.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from dino_value.files import write_json
from dino_value.language.arithmetic import write_problems, write_tiny_model
from dino_value.language.config import METHODS, STEERED, load_language_config
from dino_value.language.evaluate import evaluate
from dino_value.language.trainer import train
from dino_value.runs.metrics import read_metrics

CARELESS, SLIP = 0.6, 0.1
BEGIN = 101  # the seed of the start
BASE = """
device: cpu
precision: fp32
learner: {lora: {rank: 0}}
data: {length: 63}
optim: {batch_size: 16, accumulation: 1}
targets: {candidates: 16, temperature: 20}
designer: {hidden: 32, layers: 2, prior: learner, lr: 3.0e-3, kl: 10}
value: {length: 63, batch_size: 16, period: 6, warmup: 30}
feedback: {length: 64, batch_size: 128, limit: 128}
log_every: 20
"""


ARMS: dict[str, list[str]] = {method: [f"method={method}"] for method in METHODS}
_CLOSED = ["method=closed_form", "value.warmup=0"]
_AHEAD = [
    *_CLOSED,
    "value.direction=lookahead",
    "value.lookahead.batches=1",
    "value.lookahead.steps=20",
    "value.lookahead.lr=3e-4",
    "targets.temperature=10",
]
LOOKAHEAD: dict[str, list[str]] = {
    "baseline": ["method=baseline"],
    "dot": _CLOSED,
    "dot_shuffled": [*_CLOSED, "feedback.shuffle=true"],
    "lookahead": _AHEAD,
    "lookahead_shuffled": [*_AHEAD, "feedback.shuffle=true"],
    "lookahead_contrast": [*_AHEAD, "value.lookahead.contrast=true"],
}
"""The closed form along one gradient, and along lookaheads on all of the feedback (one batch)."""


def begin(out: Path, steps: int) -> Path:
    """The model that every method goes on from, and its folder; of a seed that no comparison has."""
    folder = out / "begin"
    if not (folder / "start" / "learner").exists():
        folder.mkdir(parents=True, exist_ok=True)
        stream = write_problems(folder / "stream.jsonl", 20_000, BEGIN, "stream", CARELESS, SLIP)
        (folder / "base.yaml").write_text(BASE)
        tiny = write_tiny_model(folder / "model", BEGIN)
        given = [f"out={folder / 'start'}", f"seed={1000 + BEGIN}", f"learner.model={tiny}", f"data.stream={stream}"]
        first = ["method=baseline", f"steps={steps}", "optim.lr=6e-3", "optim.batch_size=32"]
        train(load_language_config(folder / "base.yaml", [*given, *first]), quiet=True)
    return folder / "start"


def run(
    out: Path, seed: int, start: Path, steps: int, arms: dict[str, list[str]] = ARMS
) -> dict[str, dict[str, float]]:
    """Metrics of the start and of every arm; finished runs are not run again."""
    folder = out / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    stream = write_problems(folder / "stream.jsonl", 20_000, seed, "stream", CARELESS, SLIP)
    feedback = write_problems(folder / "feedback.jsonl", 128, seed, "feedback")
    test = write_problems(folder / "test.jsonl", 256, seed, "test")
    (folder / "base.yaml").write_text(BASE)
    given = [f"seed={seed}", f"data.stream={stream}", f"feedback.files={feedback}", f"learner.model={start}/learner"]
    found = {"start": measure(start / "learner", folder / "start.json", test)}
    for method, settings in arms.items():
        second = [f"out={folder / method}", *settings, f"steps={steps}", "optim.lr=1e-3"]
        train(load_language_config(folder / "base.yaml", [*given, *second]), quiet=True)
        found[method] = measure(folder / method / "learner", folder / method / "results" / "test.json", test)
        print(seed, method, found[method], flush=True)
    return found


def measure(model: Path, path: Path, test: Path) -> dict[str, float]:
    """Answer loss and greedy accuracy of a model, kept in `path`."""
    if not path.exists():
        metrics = evaluate(str(model), str(test), new_tokens=12, batch_size=64, device="cpu")["metrics"]
        path.parent.mkdir(exist_ok=True)
        write_json(path, {name: row["mean"] for name, row in metrics.items()})
    found: dict[str, float] = json.loads(path.read_text())
    return {"loss": found["answer_loss"], "accuracy": found["pass@1_exact"]}


def table(results: list[dict[str, dict[str, float]]]) -> str:
    """Means over seeds with 95 % t intervals, and paired differences from the baseline."""
    lines = ["| method | loss | against baseline | accuracy % | against baseline |", "|---|---|---|---|---|"]
    for method in results[0]:
        cells = []
        for metric, scale in (("loss", 1.0), ("accuracy", 100.0)):
            values = [scale * seed[method][metric] for seed in results]
            apart = [value - scale * seed["baseline"][metric] for value, seed in zip(values, results, strict=True)]
            cells += [interval(values), "" if method == "baseline" else interval(apart, sign="+")]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def diagnostics(out: Path, seeds: int, arms: dict[str, list[str]] = ARMS) -> str:
    """What the steered arms logged of V along u, means over the run's second half and seeds."""
    keys = ("alpha", "value_gain", "oracle_gain", "regret", "cosine")
    lines = ["| method | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    steered = [name for name, settings in arms.items() if {f"method={one}" for one in STEERED} & set(settings)]
    for method in steered:
        rows = [row for seed in range(seeds) for row in second_half(out / f"seed{seed}" / method)]
        cells = [f"{statistics.mean(row[key] for row in rows if key in row):.3g}" for key in keys]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def second_half(run: Path) -> list[dict[str, Any]]:
    rows = [row for row in read_metrics(run) if "alpha" in row]
    return rows[len(rows) // 2 :]


def interval(values: list[float], sign: str = "") -> str:
    mean, digits = statistics.mean(values), 4 if max(map(abs, values)) < 10 else 1
    if len(values) < 2:
        return f"{mean:{sign}.{digits}f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="+", metavar="SEED", help="of the seeds, these")
    parser.add_argument("--lookahead", action="store_true", help="the closed form along gradients and lookaheads")
    parser.add_argument("--start-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=60)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = begin(asked.out, asked.start_steps)
    arms = LOOKAHEAD if asked.lookahead else ARMS
    results = [run(asked.out, seed, start, asked.steps, arms) for seed in asked.only or range(asked.seeds)]
    if asked.only:
        return {"results": results}
    (asked.out / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results), diagnostics(asked.out, asked.seeds, arms), sep="\n\n")
    return {"results": results}


if __name__ == "__main__":
    main()
