"""All methods of dino_value.language on synthetic word problems: loss and accuracy on clean ones, over paired seeds.

For each seed a tiny model is trained from scratch on the noisy stream (`start`); every method then goes on from it,
with the same stream and steps. Feedback and test are drawn from the same few thousand problems.

    python docs/examples/language_arithmetic.py OUT [--seeds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from dino_value.language.arithmetic import write_problems, write_tiny_model
from dino_value.language.config import METHODS, load_language_config
from dino_value.language.evaluate import evaluate
from dino_value.language.train import train

CARELESS, SLIP = 0.6, 0.1
BASE = """
device: cpu
precision: fp32
learner: {lora: {rank: 0}}
data: {length: 63}
optim: {batch_size: 16, accumulation: 1}
targets: {candidates: 16}
designer: {hidden: 32, layers: 2, prior: learner, lr: 1.0e-3, gate: 1.0}
value: {length: 63, batch_size: 8, period: 2, warmup: 60, direction: cosine}
feedback: {length: 64, batch_size: 64, limit: 128}
log_every: 20
"""


def run(out: Path, seed: int, start_steps: int, steps: int) -> dict[str, dict[str, float]]:
    """Metrics of the start and of every method; finished runs are not run again."""
    folder = out / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    stream = write_problems(folder / "stream.jsonl", 20_000, seed, "stream", CARELESS, SLIP)
    feedback = write_problems(folder / "feedback.jsonl", 128, seed, "feedback")
    test = write_problems(folder / "test.jsonl", 256, seed, "test")
    (folder / "base.yaml").write_text(BASE)
    common = [f"seed={seed}", f"data.stream={stream}"]
    if not (folder / "start" / "learner").exists():
        # Another seed: the methods do not go through the same examples in the same order once more.
        tiny = write_tiny_model(folder / "model", seed)
        first = [
            f"out={folder / 'start'}",
            f"seed={seed + 1000}",
            f"learner.model={tiny}",
            f"steps={start_steps}",
            "optim.lr=3e-3",
        ]
        train(load_language_config(folder / "base.yaml", [*common, *first, "method=baseline"]), quiet=True)
    found = {"start": measure(folder / "start", test)}
    for method in METHODS:
        second = [
            *(f"out={folder / method}", f"method={method}", f"steps={steps}", "optim.lr=1e-3"),
            *(f"learner.model={folder / 'start' / 'learner'}", f"feedback.files={feedback}"),
        ]
        train(load_language_config(folder / "base.yaml", [*common, *second]), quiet=True)
        found[method] = measure(folder / method, test)
        print(seed, method, found[method], flush=True)
    return found


def measure(folder: Path, test: Path) -> dict[str, float]:
    """Answer loss and greedy accuracy of a finished run, kept beside it."""
    path = folder / "results" / "test.json"
    if not path.exists():
        metrics = evaluate(str(folder / "learner"), str(test), new_tokens=12, batch_size=64, device="cpu")["metrics"]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({name: row["mean"] for name, row in metrics.items()}))
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
    parser.add_argument("--start-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=120)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = [run(asked.out, seed, asked.start_steps, asked.steps) for seed in range(asked.seeds)]
    (asked.out / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))
    return {"results": results}


if __name__ == "__main__":
    main()
