"""What a language model can do: answer loss, Pass@1 and Pass@k, multiple choice; each with its interval.

Accuracy is scored twice, by exact match after normalisation and by math-verify; loss stands beside it, since the value
is about the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dino_value.errors import UserError
from dino_value.language.answers import boxed_answer, choice, equivalent, exact_match, final_answer
from dino_value.language.config import LanguageConfig, LearnerConfig, load_language_config
from dino_value.language.generate import generate
from dino_value.language.learner import Learner, evaluating, load_model, load_tokenizer, load_trained
from dino_value.language.omega import Part, instructed, omega_answer, omega_match, omega_parts
from dino_value.language.stream import ExampleSet
from dino_value.language.targets import negative_log_probs
from dino_value.language.text import Encoder, Example, open_source, read_record, records
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.process import bfloat16, choose_device
from dino_value.seeds import generator, key

LETTERS = "ABCDEFGHIJ"
Found = TypeVar("Found")
TASKS = ("gsm8k", "boxed", "omega", "mmlu")
KS = (1, 2, 4, 8, 16)


class Interval(NamedTuple):
    """A mean over `number` examples, and its 95 % interval."""

    mean: float
    low: float
    high: float
    number: int


def answer_loss(learner: Learner, examples: ExampleSet) -> Interval:
    """Cross-entropy of the answer tokens, all examples' tokens counting alike; 95 % bootstrap over examples."""
    device, sums, counts = learner.embedding.device, [], []
    order = sorted(range(len(examples)), key=lambda index: len(examples.tokens[index].ids))
    with torch.no_grad():
        for start in range(0, len(order), examples.batch_size):
            batch = examples.rows(order[start : start + examples.batch_size]).to(device)
            final = learner.run(batch).final.flatten(0, 1)[batch.counted]
            labels = batch.labels.flatten()[batch.counted, None]
            losses = negative_log_probs(final, learner.head, labels).squeeze(1).double()
            owner = batch.counted // batch.ids.shape[1]
            sums.append(losses.new_zeros(len(batch.ids)).index_add(0, owner, losses))
            counts.append(torch.bincount(owner, minlength=len(batch.ids)))
    return ratio_interval(torch.cat(sums).cpu(), torch.cat(counts).cpu())


def ratio_interval(sums: Tensor, counts: Tensor, resamples: int = 2000, seed: int = 0) -> Interval:
    """Σ sums/Σ counts and its percentile bootstrap interval over examples."""
    draws = torch.randint(len(sums), (resamples, len(sums)), generator=torch.Generator().manual_seed(seed))
    found = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    return Interval(float(sums.sum() / counts.sum()), low, high, len(sums))


def share_interval(right: Sequence[float]) -> Interval:
    """The share of correct answers, with Wilson's 95 % interval."""
    n, k, z = len(right), sum(right), 1.959963984540054
    center, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return Interval(k / n, (center - half) / (n + z * z), (center + half) / (n + z * z), n)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 − C(n−c, k)/C(n, k): the unbiased estimate from n samples of which c are right (arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_interval(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> Interval:
    """A mean over problems and its percentile bootstrap interval."""
    array, rng = np.array(values), np.random.default_rng(seed)
    means = array[rng.integers(len(array), size=(resamples, len(array)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return Interval(float(array.mean()), low, high, len(array))


def few_shot(examples: Sequence[Example], shots: int, seed: int, number: int) -> str:
    """A prefix of `shots` solved examples, drawn for problem `number`."""
    if shots > len(examples):
        raise UserError(f"--shots {shots}: the demonstrations hold {len(examples)} examples; choose fewer")
    order = torch.randperm(len(examples), generator=generator(seed, "shots", number)).tolist()[:shots]
    return "".join(f"{examples[index].prompt}{examples[index].answer}\n\n" for index in order)


class Problem(NamedTuple):
    """A question to be answered freely."""

    example: Example
    truth: str
    setting: str = ""
    split: str = ""

    def part(self) -> dict[str, str]:
        """Its setting and split, where it has them."""
        return {name: value for name, value in {"setting": self.setting, "split": self.split}.items() if value}


def read_problems(path: str, task: str, limit: int | None) -> list[Problem]:
    """Problems with their reference answers (gsm8k: behind "####"; boxed: the field as it is, or what is boxed in it;
    omega: the same, of all parts of a set, the first `limit` of each).

    Raises:
        UserError: a reference without an answer.
    """
    found = []
    for part in omega_parts(path) if task == "omega" else [Part(path, "", "")]:
        for number, record in enumerate(records(part.file)):
            if limit is not None and number >= limit:
                break
            one = read_record(record, f"{part.file}, record {number + 1}")
            reference = one.answer.strip()
            truth = final_answer(reference) if task == "gsm8k" else boxed_answer(reference) or reference
            if not one.prompt or not truth:
                where = f"{part.file}, record {number + 1}"
                raise UserError(f"{where}: no question with a final answer; --task {task} needs one")
            one = instructed(one, truth) if task == "omega" else one
            found.append(Problem(one, truth, part.setting, part.split))
    return found


class Score(NamedTuple):
    """One sampled completion."""

    text: str
    answer: str | None
    exact: bool
    verified: bool


def score(text: str, truth: str, task: str) -> Score:
    """gsm8k: the final answer; boxed: nothing but a \\boxed{} counts; omega: its own rules."""
    answer = {"boxed": boxed_answer, "omega": omega_answer}.get(task, final_answer)(text)
    exact = omega_match(answer, truth) if task == "omega" else exact_match(answer, truth)
    return Score(text, answer, exact, equivalent(answer, truth))


def solve(
    learner: Learner,
    encoder: Encoder,
    problems: Sequence[Problem],
    task: str,
    prefixes: Sequence[str],
    new_tokens: int,
    samples: int,
    temperature: float,
    batch_size: int,
    seed: int,
) -> list[list[Score]]:
    """Scores of `samples` completions of each problem."""
    prompts = [prefix + problem.example.prompt for prefix, problem in zip(prefixes, problems, strict=True)]
    # A model that has learned no end of text goes on with a question of its own.
    stop = ("\nQuestion:", "\n\nQuestion")
    completions = generate(learner.model, encoder, prompts, new_tokens, samples, temperature, batch_size, seed, stop)
    return [
        [score(one.text, problem.truth, task) for one in row]
        for row, problem in zip(completions, problems, strict=True)
    ]


class Choice(NamedTuple):
    """A multiple-choice question."""

    prompt: str
    truth: int
    options: int
    subject: str


def read_choices(path: str, limit: int | None) -> list[Choice]:
    """MMLU's records: `question`; `choices` (a list) or A, B, C, D; `answer`, a letter or a position from 0; `subject`.

    Raises:
        UserError: a record of another form.
    """
    source, found = open_source(path), []
    for index in range(min(len(source), limit or len(source))):
        record: Mapping[str, Any] = source.record(index)
        options = record.get("choices") or [record[letter] for letter in LETTERS if letter in record]
        answer = record.get("answer")
        if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in LETTERS:
            answer = LETTERS.index(answer.strip().upper())
        if "question" not in record or not options or not isinstance(answer, int) or not 0 <= answer < len(options):
            raise UserError(f"{path}, record {index + 1}: expected question, choices (or A, B, C, D) and answer")
        subject = str(record.get("subject", "")).replace("_", " ")
        about = f" about {subject}" if subject else ""
        listed = "".join(f"{LETTERS[i]}. {option}\n" for i, option in enumerate(options))
        head = f"The following are multiple choice questions (with answers){about}.\n\n"
        found.append(Choice(f"{head}{record['question']}\n{listed}Answer:", answer, len(options), subject))
    return found


@torch.no_grad()
def choose(learner: Learner, encoder: Encoder, questions: Sequence[Choice], batch_size: int) -> list[int]:
    """Zero-shot MMLU: the letter of highest probability right after "Answer:" (arXiv 2009.03300)."""
    letters = [encoder.plain(f" {letter}")[-1] for letter in LETTERS]
    device, found = learner.embedding.device, []
    for start in range(0, len(questions), batch_size):
        part = questions[start : start + batch_size]
        rows = [encoder.prompt(question.prompt) for question in part]
        if (longest := max(map(len, rows))) > learner.window:
            raise UserError(f"a question of {longest} tokens exceeds the model's window of {learner.window}")
        ids = torch.full((len(rows), longest), encoder.end)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        ends = torch.tensor([len(tokens) - 1 for tokens in rows])
        out = learner.decoder(input_ids=ids.to(device), use_cache=False).last_hidden_state
        logits = learner.head(out[torch.arange(len(rows)), ends.to(device)])[:, letters].cpu()
        found += [int(z[: one.options].argmax()) for z, one in zip(logits, part, strict=True)]
    return found


def open_learner(path: str, device: torch.device) -> tuple[Learner, Encoder, LanguageConfig | None]:
    """A run folder's last checkpoint, or any model (folder, GGUF file, cached name); in evaluation mode.

    Raises:
        UserError: neither.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        config = LearnerConfig(model=path)
        learner = Learner(load_model(config, device, training=False), LanguageConfig().value.scope)
        return learner.eval(), Encoder(load_tokenizer(config)), None
    run = load_language_config(folder / "config.yaml", [f"out={folder}"])
    state = load_checkpoint(folder, "learner")
    torch.manual_seed(key(run.seed, "weights"))
    learner = Learner(load_model(run.learner, device), run.value.scope)
    load_trained(learner, state)
    return learner.eval(), Encoder(load_tokenizer(run.learner)), run


def evaluate(
    path: str,
    file: str,
    task: str = "gsm8k",
    limit: int | None = None,
    samples: int = 0,
    temperature: float = 0.7,
    shots: int = 0,
    demonstrations: str | None = None,
    new_tokens: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "auto",
    loss_only: bool = False,
) -> dict[str, Any]:
    """Evaluate a run or a model on a file.

    Args:
        file: of problems; for omega also the folder of a set.
        task: `gsm8k` (final answer behind "####"), `boxed` (MATH: in \\boxed{}), `omega` or `mmlu`.
        samples: completions of each problem for Pass@k, k = 1, 2, 4, … up to it; 0 decodes greedily only.
        temperature: of these samples.
        shots: solved examples of `demonstrations` before each question.
        loss_only: no generation.

    Returns:
        Metrics, each {mean, low, high, number}, and the completions.

    Raises:
        UserError: unreadable files, demonstrations or feedback that overlap the file, prompts beyond the window.
    """
    where = choose_device(device)
    learner, encoder, run = open_learner(path, where)
    if run is not None and run.feedback.files:
        from dino_value.language.decontaminate import refuse_overlap

        for feedback in run.feedback.files.values():
            tests = [part.file for part in omega_parts(file)] if task == "omega" else [file]
            refuse_overlap(feedback, tests, run.feedback.limit)
    autocast = torch.autocast(where.type, torch.bfloat16, bfloat16(run.precision if run else "fp32", where))
    with evaluating(learner), autocast:
        if task == "mmlu":
            return _multiple_choice(learner, encoder, read_choices(file, limit), batch_size)
        problems = read_problems(file, task, limit)
        examples = ExampleSet([one.example for one in problems], encoder, learner.window, batch_size, seed, file)
        metrics: dict[str, Any] = {"answer_loss": answer_loss(learner, examples)._asdict()}
        if loss_only:
            return {"metrics": metrics, "completions": []}
        pool = [one.example for one in read_problems(demonstrations, task, None)] if demonstrations else []
        if shots and not pool:
            raise UserError(f"--shots {shots} needs solved examples: give --demonstrations FILE, other than the test")
        prefixes = [few_shot(pool, shots, seed, number) for number in range(len(problems))]
        settings = (new_tokens, 1, 0.0, batch_size, seed)
        greedy = [row[0] for row in solve(learner, encoder, problems, task, prefixes, *settings)]
        metrics |= greedy_metrics(problems, greedy)
        if samples:
            drawn = solve(
                learner, encoder, problems, task, prefixes, new_tokens, samples, temperature, batch_size, seed
            )
            metrics |= sampled_metrics(problems, drawn, samples)
    completions = [
        {"prompt": problem.example.prompt, "truth": problem.truth, **problem.part(), **one._asdict()}
        for problem, one in zip(problems, greedy, strict=True)
    ]
    return {"metrics": metrics, "completions": completions}


def by_part(problems: Sequence[Problem], found: Sequence[Found]) -> dict[str, list[Found]]:
    """What was found of all problems (""), of each split ("OOD"), and of each setting in it ("OOD arithmetic_gcd")."""
    groups: dict[str, list[Found]] = {}
    for problem, one in zip(problems, found, strict=True):
        for name in {"", problem.split, f"{problem.split} {problem.setting}".strip()}:
            groups.setdefault(name, []).append(one)
    return dict(sorted(groups.items()))


def greedy_metrics(problems: Sequence[Problem], greedy: Sequence[Score]) -> dict[str, dict[str, float]]:
    """Pass@1 by both rules, of all and of each part."""
    return {
        f"pass@1_{rule} {name}".strip(): share_interval([getattr(one, rule) for one in scores])._asdict()
        for name, scores in by_part(problems, greedy).items()
        for rule in ("exact", "verified")
    }


def sampled_metrics(
    problems: Sequence[Problem], drawn: Sequence[Sequence[Score]], samples: int
) -> dict[str, dict[str, float]]:
    """Unbiased Pass@k by both rules, for k = 1, 2, 4, … up to `samples`, of all and of each part."""
    metrics = {}
    for name, rows in by_part(problems, drawn).items():
        for rule in ("exact", "verified"):
            correct = [sum(getattr(one, rule) for one in row) for row in rows]
            for k in (k for k in KS if k <= samples):
                found = mean_interval([pass_at_k(samples, c, k) for c in correct])
                metrics[f"sampled_pass@{k}_{rule} {name}".strip()] = found._asdict()
    return metrics


def _multiple_choice(
    learner: Learner, encoder: Encoder, questions: Sequence[Choice], batch_size: int
) -> dict[str, Any]:
    chosen = choose(learner, encoder, questions, batch_size)
    right = [float(pick == one.truth) for pick, one in zip(chosen, questions, strict=True)]
    metrics: dict[str, Any] = {"accuracy": share_interval(right)._asdict()}
    for subject in sorted({one.subject for one in questions} - {""}):
        part = [value for value, one in zip(right, questions, strict=True) if one.subject == subject]
        metrics[f"accuracy {subject}"] = share_interval(part)._asdict()
    return {
        "metrics": metrics,
        "completions": [
            {"prompt": one.prompt, "truth": LETTERS[one.truth], "answer": LETTERS[pick]}
            for pick, one in zip(chosen, questions, strict=True)
        ],
    }


def print_metrics(metrics: Mapping[str, Mapping[str, float]]) -> None:
    """A line for each."""
    table = Table()
    for heading in ("metric", "mean", "95 % interval", "n"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for name, row in metrics.items():
        table.add_row(name, f"{row['mean']:.4f}", f"[{row['low']:.4f}, {row['high']:.4f}]", str(row["number"]))
    Console().print(table)


__all__ = ["TASKS", "answer_loss", "choice", "evaluate", "pass_at_k", "print_metrics"]
