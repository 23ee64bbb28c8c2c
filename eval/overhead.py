"""What steering costs, in time and memory: `python eval/overhead.py [--json FILE]`.

A plain learner step, a value update with each engine and its parts, the designers inside the learner's step, the whole
run's throughput at r = 1 … 16, and the engines on a small causal language model. Every case runs in this process and
they take turns, so that whatever else the machine does falls on all of them: ratios are taken within a round. The
learner, its data and its settings are a training run's, with the paper's ADE20K configuration where no option or
`key=value` says otherwise; only the weights are random and the labels noise.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

from dino_value.arguments import Parser
from dino_value.config import Config, load_config
from dino_value.designers import sparsity, total_variation
from dino_value.errors import EXIT_DONE, UserError
from dino_value.eval import common
from dino_value.eval.benchmarks.timing import (
    CLOCKS,
    Case,
    check_clock,
    peak_memory,
    processor,
    spread,
    take_turns,
    timed,
    within,
    write_data,
)
from dino_value.runs.process import use_bfloat16
from dino_value.training.designer_update import DesignerUpdate
from dino_value.training.feedback import downstream_gradient
from dino_value.training.steps import SSLTask, constant, evaluating, make_views
from dino_value.training.trainer import Trainer
from dino_value.value import (
    DIRECTIONS,
    ENGINES,
    Engine,
    Gradient,
    Scope,
    Task,
    last_blocks,
    pre_gradient,
    value_step,
)

PERIODS = (1, 2, 4, 8, 16)
STRIDES = (1, 4)
LOOKAHEADS = (8, 16, 32)
DIFFERENCE, REFERENCE = "finite_difference", "double_backward"


@dataclass(frozen=True)
class Target:
    """What the ratio of two cases should stay below, where there is an aim at all."""

    case: str
    reference: str
    time: float | None = None
    memory: float | None = None


# --- engines, of any task


@dataclass(frozen=True)
class Problem:
    """A task and what its engines are given. `around` is the context that all of it runs in."""

    task: Task
    parameters: dict[str, Tensor]
    u: Gradient
    phi: list[Tensor]
    penalty: Callable[[], Tensor | None]
    around: Callable[[], contextlib.AbstractContextManager[object]]


def engine_cases(problem: Problem, named: Mapping[str, Engine], prefix: str = "") -> list[Case]:
    """For each engine the value step (trunk, g_pre, engine), what comes after the trunk and g_pre (the tail, and one
    backward pass through trunk and designer), and the tail alone."""
    p = problem
    with p.around():
        kept = [(state.detach(), state.requires_grad) for state in p.task.trunk()]
        g_pre = pre_gradient(p.task, tuple(state for state, _ in kept), p.parameters)

    def fresh() -> None:
        for tensor in p.phi:
            tensor.grad = None

    def step(engine: Engine) -> Callable[[], object]:
        fresh()

        def work() -> None:
            with p.around():
                hidden = p.task.trunk()
                value_step(p.task, p.parameters, p.u, DIRECTIONS["dot"], engine, p.phi, p.penalty(), hidden)

        return work

    def after_trunk(engine: Engine) -> Callable[[], object]:
        fresh()
        with p.around():
            hidden = [p.task.trunk()]  # a list, so that the engine's call is the last to hold the graph
            penalty = p.penalty()

        def work() -> None:
            with p.around():
                engine(p.task, hidden.pop(), p.parameters, p.u, p.phi, penalty, g_pre)

        return work

    def tail(engine: Engine) -> Callable[[], object]:
        hidden = tuple(state.clone().requires_grad_(wanted) for state, wanted in kept)
        leaves = [state for state in hidden if state.requires_grad]

        def work() -> None:
            with p.around():
                engine(p.task, hidden, p.parameters, p.u, leaves, None, g_pre)

        return work

    kinds = {"value step": step, "engine": after_trunk, "tail": tail}
    return [
        Case(f"{prefix}{kind}, {name}", functools.partial(prepare, engine))
        for kind, prepare in kinds.items()
        for name, engine in named.items()
    ]


# --- vision


def configure(options: argparse.Namespace, folder: Path, *more: str) -> Config:
    """The paper's configuration for ADE20K on ViT-B, with the options' learner and batch sizes.

    Raises:
        UserError: an override that the configuration refuses.
    """
    meta = options.meta_batch
    pools = [f"feedback.{task}.{part}={2 * meta}" for task in ("seg", "depth") for part in ("train", "meta")]
    settings = [
        f"out={folder / 'run'}",
        f"device={options.device}",
        f"precision={options.precision}",
        "steps=1000000",
        f"data.unlabeled={folder / 'unlabeled'}",
        f"data.ade20k={folder / 'ade'}",
        "data.nyuv2=scenes",
        "data.in_memory=true",  # no loader process beside what is timed
        f"backbone.name={options.model}",
        f"views.global_size={options.image_size}",
        f"views.local_size={max(16, round(options.image_size * 96 / 224 / 16) * 16)}",
        f"feedback.size={options.image_size}",
        f"optim.batch_size={options.batch}",
        f"value.batch_size={meta}",
        f"value.scope.blocks={options.blocks}",
        f"value.period={10**9}",  # updates when a case asks for one
        f"feedback.batch_size={meta}",
        "feedback.warmup=0",
        f"designer.stride={options.stride}",
        *pools,
        *(TINY_OVERRIDES if options.tiny else ()),
    ]
    return load_config("paper/ade20k_vitb", [*settings, *options.overrides, *more])


TINY_OVERRIDES = (
    "backbone.kwargs={patch_size: 8, embed_dim: 24, depth: 3, num_heads: 3}",
    "views.local_count=2",
    "feedback.depth.weight=0",
    "objective.out_dim=16",
    "objective.hidden_dim=16",
    "objective.bottleneck_dim=8",
    "value.tolerance=1",
)


class Vision:
    """A plain run and a steered one, both past their first step, and the parts of a step that are measured alone."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        open_run = functools.partial(configure, options, folder)
        self.plain, self.steered = Trainer(open_run("method=baseline")), Trainer(open_run())
        self.batch = self.plain.stream.batch(0)
        for run in (self.plain, self.steered):
            run.learner_update(*self.batch)  # AdamW makes its state; φ has its first update, the engine is checked
        self.device, self.temperature = self.plain.device, self.plain.teacher_temperature()
        strides = {options.stride: self.steered}
        strides |= {
            stride: Trainer(open_run(f"designer.stride={stride}")) for stride in STRIDES if stride not in strides
        }
        self.steer = self._steer(self.steered)
        self.views = make_views(
            self.steered.student.backbone,
            self.batch,
            self.plain.config.views,
            self.device,
            0,
            "learner",
            0,
        )
        self.designers = {stride: self._steer(run) for stride, run in sorted(strides.items())}
        self.weighted = Trainer(open_run("designer=weights"))
        self.moved = Trainer(open_run("designer=targets", "value.direction=lookahead", "feedback.lag_every=0"))

    @staticmethod
    def _steer(run: Trainer) -> DesignerUpdate:
        assert run.steer is not None
        return run.steer

    def cases(self) -> list[Case]:
        return [
            Case("learner step", self._step),
            *(
                Case(f"designed views, stride {stride}", lambda steer=steer: lambda: self._design(steer))  # type: ignore[misc]
                for stride, steer in self.designers.items()
            ),
            Case("value weights", self._weights()),
            Case("moved targets", self._moved()),
            *(Case(f"lookahead, m = {steps}", functools.partial(self._lookahead, steps)) for steps in LOOKAHEADS),
            *(Case(f"value update, {name}", functools.partial(self._update, name)) for name in (DIFFERENCE, REFERENCE)),
            *engine_cases(self._problem(), {name: ENGINES[name] for name in (DIFFERENCE, REFERENCE)}),
        ]

    def targets(self) -> list[Target]:
        parts = ("value update", "value step", "engine", "tail")
        return [
            *(Target(f"{part}, {DIFFERENCE}", f"{part}, {REFERENCE}", 0.65, 0.5) for part in parts),
            *(Target(f"value update, {name}", "learner step") for name in (DIFFERENCE, REFERENCE)),
            *(Target(f"designed views, stride {stride}", "learner step", 0.03) for stride in self.designers),
            Target("value weights", "learner step", 0.10),
            Target("moved targets", "learner step", 0.10),
            # every m steps, a tenth of a step each
            *(Target(f"lookahead, m = {steps}", "learner step", 0.10 * steps) for steps in LOOKAHEADS),
        ]

    def cycle(self, period: int, clock: str = "wall") -> float:
        """The steered run's throughput over `period` steps, one of them with an update, as a share of the plain
        run's: the two take turns step by step."""
        self.steered.config.value.period = period
        seconds = dict.fromkeys((self.plain, self.steered), 0.0)
        for number in range(period):
            for run in list(seconds) if number % 2 else reversed(list(seconds)):
                seconds[run] += timed(lambda run=run: run.learner_update(*self.batch), self.device, clock)  # type: ignore[misc]
        return seconds[self.plain] / seconds[self.steered]

    def _step(self) -> Callable[[], object]:
        self.plain.optimizer.zero_grad()  # so that the gradients count as the step's
        return lambda: self.plain.learner_update(*self.batch)

    def _design(self, steer: DesignerUpdate) -> None:
        with self.steered.autocast():
            steer.learned_views(self.views, 1)

    def _weights(self) -> Callable[[], Callable[[], object]]:
        """What `designer=weights` adds to a learner step: from hidden states and targets that the step has made."""
        run, steer = self.weighted, self._steer(self.weighted)
        with run.autocast():
            steer.update(0, self.temperature)
            with torch.no_grad():
                targets, _ = run.loss.teach(run.teacher, self.views.large, self.temperature, None)
        with run.autocast(), torch.no_grad():
            states = run.loss.states(run.student, self.views, steer.scope.start, None)

        def work() -> None:
            with run.autocast():
                steer.term_weights(states, targets, None)

        return lambda: work

    def _moved(self) -> Callable[[], Callable[[], object]]:
        """What `designer=targets` adds to a learner step, from states, predictions and targets that it has made."""
        run, steer = self.moved, self._steer(self.moved)
        with run.autocast():
            steer.update(0, self.temperature)
        with run.autocast(), torch.no_grad():
            targets, _ = run.loss.teach(run.teacher, self.views.large, self.temperature, None)
            states = run.loss.states(run.student, self.views, steer.scope.start, None)
            predictions = run.loss.predict(run.student, states, steer.scope.start, None)

        def work() -> None:
            with run.autocast():
                steer.moved_targets(states, predictions, targets, None, 0)

        return lambda: work

    def _lookahead(self, steps: int) -> Callable[[], object]:
        """A lookahead of so many steps, and nothing else of an update."""
        run, steer = self.moved, self._steer(self.moved)

        def work() -> None:
            run.config.value.lookahead.steps = steps
            with constant(run.student), evaluating(run.student), run.autocast():
                steer.downstream()

        return work

    def _update(self, name: str) -> Callable[[], object]:
        """All of an update: heads, g_down, the value step, φ's optimizer."""
        self.steer.engine_name = name

        def work() -> None:
            with self.steered.autocast():
                self.steer.update(0, self.temperature)

        return work

    def _problem(self) -> Problem:
        run, steer, config = self.steered, self.steer, self.steered.config
        backbone, d = run.student.backbone, config.designer
        assert steer.designer is not None
        views = make_views(backbone, steer.meta.next(), config.views, self.device, 0, "meta", 0)
        with self._evaluating():
            g_down, _ = downstream_gradient(steer.feedback[0], backbone, steer.scope, self.device)
        task = SSLTask(
            run.student, run.teacher, run.loss, self.temperature, steer.designer, views, d, steer.scope, config.seed
        )

        def penalty() -> Tensor:
            assert task.masks is not None
            return d.lambda_spars * sparsity(task.masks, d.keep_ratio) + d.lambda_tv * total_variation(task.masks)

        phi: list[Tensor] = list(steer.designer.parameters())
        return Problem(task, steer.scope.parameters(backbone), g_down, phi, penalty, self._evaluating)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """As in `DesignerUpdate.update`."""
        self.steered.student.eval()
        with self.steered.autocast():
            yield
        self.steered.student.train()


def throughput(seconds: Mapping[str, list[float]], stride: int) -> dict[int, list[float]]:
    """Lost throughput at each r, one value a round: designer and update are added to the plain step of their round."""
    rows = zip(
        seconds["learner step"],
        seconds[f"designed views, stride {stride}"],
        seconds[f"value update, {DIFFERENCE}"],
        strict=True,
    )
    parts = list(rows)
    return {r: [1 - plain / (plain + views + update / r) for plain, views, update in parts] for r in PERIODS}


# --- language


class Decoder(nn.Module):
    """A Hugging Face decoder that can be cut between two layers, as the vision backbone can."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Token ids [B T] or hidden states [B T D] to hidden states, or without `stop` to logits [B T vocabulary]."""
        inner = self.model.model
        state = x if x.is_floating_point() else inner.embed_tokens(x)
        places = torch.arange(state.shape[1], device=state.device)[None]
        rotary = inner.rotary_emb(state, places)
        for layer in inner.layers[start:stop]:
            found = layer(state, attention_mask=None, position_ids=places, position_embeddings=rotary)
            state = found[0] if isinstance(found, tuple) else found
        return state if stop is not None else self.model.lm_head(inner.norm(state))


class SoftTargets(nn.Module):
    """A small designer: ids [B T] and candidates [B T K], the truth first, to a target q [B T K] (method section 4)."""

    def __init__(self, vocabulary: int, dim: int = 64, most: float = 0.5) -> None:
        super().__init__()
        self.embed, self.most = nn.Embedding(vocabulary, dim), most
        self.mix = nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, dim + 1))

    def forward(self, tokens: Tensor, candidates: Tensor) -> Tensor:
        known = self.embed(candidates)
        read, gate = self.mix(torch.cat([self.embed(tokens), known[..., 0, :]], -1)).split([known.shape[-1], 1], -1)
        share = self.most * gate.sigmoid()
        scores = torch.softmax((known * read[..., None, :]).sum(-1), -1)
        truth = torch.zeros_like(scores)
        truth[..., 0] = 1
        return (1 - share) * truth + share * scores


class LanguageTask:
    """Soft-target cross-entropy on K candidates; a `LinearTask` with hidden[0] = q."""

    def __init__(self, learner: Decoder, designer: SoftTargets, scope: Scope, tokens: Tensor, count: int) -> None:
        self.learner, self.designer, self.scope, self.tokens = learner, designer, scope, tokens[:, :-1]
        truth = tokens[:, 1:, None]
        with torch.no_grad():  # the learner's own best guesses beside the truth
            guesses = learner(self.tokens).scatter(-1, truth, -torch.inf).topk(count - 1, -1).indices
        self.candidates = torch.cat([truth, guesses], -1)
        self._constants = {name: value.detach() for name, value in learner.named_parameters()}

    def trunk(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            state = self.learner(self.tokens, stop=self.scope.start)
        return self.designer(self.tokens, self.candidates), state

    def terms(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        start = {"start": self.scope.start}
        logits = functional_call(self.learner, {**self._constants, **parameters}, (hidden[1],), start)
        chosen = logits.gather(-1, self.candidates)
        return (logits.logsumexp(-1, keepdim=True) - chosen) / self.tokens.numel()

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        return (hidden[0] * self.terms(hidden, parameters)).sum()


def language_problem(options: argparse.Namespace, device: torch.device) -> Problem:
    """A randomly initialised Llama of 25 million weights and 8 layers.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, words, length, candidates = (32, 3, 64, 8, 4) if options.tiny else (512, 8, 8192, 256, 64)
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16 if options.tiny else width // 64,
    )
    learner = Decoder(LlamaForCausalLM(settings)).to(device).eval()
    scope = last_blocks(learner, min(options.blocks, layers))
    designer = SoftTargets(words).to(device)
    pretraining, feedback = torch.randint(words, (2, 2, length + 1), device=device)
    task = LanguageTask(learner, designer, scope, pretraining, candidates)
    parameters = scope.parameters(learner)
    labelled = LanguageTask(learner, designer, scope, feedback, 2)
    state = labelled.trunk()[1]
    truth = torch.tensor([1.0, 0.0], device=device).expand(*labelled.tokens.shape, 2)
    g_down = pre_gradient(labelled, (truth, state), parameters)
    phi: list[Tensor] = list(designer.parameters())
    return Problem(task, parameters, g_down, phi, lambda: None, contextlib.nullcontext)


def language_cases(options: argparse.Namespace, device: torch.device) -> tuple[list[Case], list[Target]]:
    """Every engine, and its ratio to the reference."""
    cases = engine_cases(language_problem(options, device), ENGINES, "language ")
    targets = [
        Target(f"language {part}, {name}", f"language {part}, {REFERENCE}")
        for part in ("value step", "engine", "tail")
        for name in ENGINES
        if name != REFERENCE
    ]
    return cases, targets


# --- the report


def measure(
    cases: Sequence[Case], repeats: int, device: torch.device, clock: str = "wall"
) -> dict[str, dict[str, Any]]:
    """By case: `seconds` of each round with their median and quartiles, and peak memory in bytes."""
    seconds = take_turns(cases, repeats, device, clock)
    rows: dict[str, dict[str, Any]] = {}
    for case in cases:
        memory = peak_memory(case, device)
        rows[case.name] = {
            "seconds": seconds[case.name],
            **spread(seconds[case.name]),
            "peak_bytes": memory.tensors,
            "peak_resident_bytes": memory.resident,
        }
    return rows


def some(cases: Sequence[Case], pattern: str | None) -> list[Case]:
    """Those whose names match; all without a pattern."""
    return [case for case in cases if not pattern or re.search(pattern, case.name)]


def compare(rows: Mapping[str, Mapping[str, Any]], targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Ratios of time, within rounds, and of peak memory, with their targets."""
    found = []
    for target in targets:
        if not {target.case, target.reference} <= rows.keys():
            continue  # left out by --only
        case, reference = rows[target.case], rows[target.reference]
        ratios = [a / b for a, b in zip(case["seconds"], reference["seconds"], strict=True)]
        resident = case["peak_resident_bytes"], reference["peak_resident_bytes"]
        found.append(
            {
                "case": target.case,
                "reference": target.reference,
                "time": spread(ratios),
                "time_target": target.time,
                "memory": case["peak_bytes"] / max(1, reference["peak_bytes"]),
                "memory_resident": resident[0] / max(1, resident[1]) if None not in resident else None,
                "memory_target": target.memory,
            }
        )
    return found


def report(rows: Mapping[str, Mapping[str, Any]], ratios: Sequence[Mapping[str, Any]], losses: Any) -> None:
    """The tables."""
    console = Console(width=120) if not sys.stdout.isatty() else Console()

    def against(value: float, target: float | None) -> str:
        return "" if target is None else f"≤ {target:g}: " + ("yes" if value <= target else "no")

    table = Table("case", "seconds: median (quartiles)", "peak tensors, MiB", "peak resident, MiB")
    for name, row in rows.items():
        resident = row["peak_resident_bytes"]
        shown = "–" if resident is None else f"{resident / 2**20:.0f}"
        table.add_row(name, within(row), f"{row['peak_bytes'] / 2**20:.0f}", shown)
    console.print(table)

    table = Table("case", "against", "time", "reached", "memory", "reached")
    for row in ratios:
        time_, memory = row["time"], row["memory"]
        table.add_row(
            row["case"],
            row["reference"],
            within(time_),
            against(time_["median"], row["time_target"]),
            f"{memory:.2f}",
            against(memory, row["memory_target"]),
        )
    console.print(table)

    if not losses:
        return
    table = Table("r", "throughput lost, %: from the parts", "from whole cycles", "reached")
    for period, row in losses.items():
        percent = {key: 100 * value for key, value in row["parts"].items()}
        whole = within({k: 100 * v for k, v in row["cycles"].items()}, 1) if row["cycles"] else "–"
        table.add_row(str(period), within(percent, 1), whole, against(percent["median"], 4.0 if period == 8 else None))
    console.print(table)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "overhead.py",
        description="Time and memory of steering.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the training configuration")
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm ViT")
    parser.add_argument("--image-size", default=224, type=int, help="of global views and feedback, pixels")
    parser.add_argument("--batch", default=16, type=int, help="images of a learner step")
    parser.add_argument("--meta-batch", type=int, help="images of each batch of a value update; batch/8 by default")
    parser.add_argument("--blocks", default=2, type=int, help="k of the scope")
    parser.add_argument("--stride", default=4, type=int, help="of the U-Net that the value updates use")
    parser.add_argument("--repeats", default=5, type=int, help="rounds")
    parser.add_argument("--only", metavar="REGEX", help="these cases alone, for example 'learner step|lookahead'")
    parser.add_argument("--cycles", default=1, type=int, help="whole cycles to run at r = 8")
    parser.add_argument("--threads", type=int, help="of the CPU; PyTorch's choice by default")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: the processor's time, of one thread")
    parser.add_argument("--device", default="auto", help="cpu, cuda, …")
    parser.add_argument("--precision", default="auto", help="auto, bf16 or fp32")
    parser.add_argument("--tiny", action="store_true", help="a learner of seconds, to see that it runs")
    parser.add_argument("--json", type=Path, help="file for all of the numbers")
    return parser


def main(argv: Sequence[str]) -> int:
    """The command; see `--help`.

    Raises:
        UserError: settings that the machine, the model or the configuration refuses.
    """
    options = build_parser().parse_args(argv)
    if options.tiny:
        options.model, options.image_size, options.stride = "vit_tiny_patch16_224", 32, 4
    options.meta_batch = max(2, options.batch // 8) if options.meta_batch is None else options.meta_batch
    for name in ("batch", "meta_batch", "repeats", "image_size"):
        least = 2 if "batch" in name else 1
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')}={getattr(options, name)}: must be at least {least}")
    try:
        re.compile(options.only or "")
    except re.error as error:
        raise UserError(f"--only={options.only}: not a regular expression: {error}") from None
    if options.cycles < 0:
        raise UserError(f"--cycles={options.cycles}: must be at least 0")
    if options.threads is not None:
        if options.threads < 1:
            raise UserError(f"--threads={options.threads}: must be at least 1")
        torch.set_num_threads(options.threads)
    if options.json is not None:
        common.prepare_folder(options.json.parent)

    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), options.image_size, max(options.batch, 4 * options.meta_batch))
        vision = Vision(options, Path(folder))
        check_clock(options.clock, torch.get_num_threads(), vision.device)
        rows = measure(some(vision.cases(), options.only), options.repeats, vision.device, options.clock)
        ratios = compare(rows, vision.targets())
        losses: dict[int, dict[str, Any]] = {}
        if not options.only:
            parts = throughput({name: row["seconds"] for name, row in rows.items()}, options.stride)
            losses = {period: {"parts": spread(values), "cycles": None} for period, values in parts.items()}
            vision.steer.engine_name = DIFFERENCE
            if shares := [1 - vision.cycle(8, options.clock) for _ in range(options.cycles)]:
                losses[8]["cycles"] = spread(shares)
        device, settings = vision.device, vision.steered.config
        del vision
    try:
        cases, targets = language_cases(options, device)
        cases = some(cases, options.only)
    except ImportError as error:
        print(f"language: left out, {error.name or error} is missing: pip install 'dino-value[language]'")
    else:
        found = measure(cases, options.repeats, device, options.clock)
        rows |= found
        ratios += compare(found, targets)

    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "memory": "max_memory_allocated" if device.type == "cuda" else "profiler's allocations; VmHWM",
        "torch": torch.__version__,
        "timm": metadata.version("timm"),
        "bfloat16": use_bfloat16(settings, device),
        "attention": settings.backbone.attention,
        "model": options.model,
        "image_size": options.image_size,
        "batch": options.batch,
        "meta_batch": options.meta_batch,
        "blocks": options.blocks,
        "stride": options.stride,
        "repeats": options.repeats,
        "overrides": options.overrides,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items() if value not in (None, [])))
    report(rows, ratios, losses)
    if options.json is not None:
        content = {"about": about, "cases": rows, "ratios": ratios, "throughput_lost": losses}
        common.write_results(options.json, content)
    return EXIT_DONE


if __name__ == "__main__":
    common.script(main)
