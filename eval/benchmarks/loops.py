"""The loops that `eval/throughput.py` times, each in a process of its own that answers batches of views.

- *ours*: a training run's own step;
- *plain*: the loop of the paper (Caron et al., 2021, arXiv 2104.14294, algorithm 1), written here with timm and torch
  alone, in the published program's ways: a list of crops, a sum over pairs of views, an average of the teacher tensor
  by tensor, `.item()` in every step;
- *lightly*: what lightly's DINO example does, with its head, loss and averaging (`pip install 'dino-value[bench]'`).

All start from the same weights and see the same views, so that their losses must agree. A process of its own keeps
denormal flag, compiled code and peak of memory each loop's own.
"""

from __future__ import annotations

import contextlib
import copy
import math
import multiprocessing
import re
import resource
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dino_value.config import Config, packaged
from dino_value.errors import UserError
from dino_value.eval.benchmarks.timing import give_back_memory, spread, timed
from dino_value.objectives.dino import DINOHead
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.process import choose_device
from dino_value.training import trainer as train
from dino_value.training.methods import self_supervised
from dino_value.training.optim import parameter_groups
from dino_value.training.start import start_from
from dino_value.training.steps import Views

END = "end"
START = "spawn"
"""How processes begin: from nothing, as the denormal flag must be set before there are threads."""


@dataclass(frozen=True)
class Setting:
    """One row of the table: `loop` is ours, plain or lightly; `config` is the run that it is, or takes its weights
    and settings from."""

    name: str
    loop: str
    config: Config
    bf16: bool = False
    flush: bool = True


# --- the loops: `step` takes normalised views to a function that reads the loss


class Ours:
    """`dino-value train method=baseline`, all of it but the making of views."""

    def __init__(self, run: train.Trainer, bf16: bool) -> None:
        self.run = run

    def step(self, views: Views) -> Callable[[], float]:
        with mock.patch.object(self_supervised, "make_views", return_value=views):
            self.run.learner_update(views.large, views.small)
        return self._loss

    def _loss(self) -> float:
        self.run.guard.check(wait=True)
        return self.run.meters.read()["loss"]


class Peer:
    """Student and teacher with the weights of `run`, heads of another make, and AdamW as torch has it by default."""

    def __init__(self, run: train.Trainer, head: Callable[[int, int, int, int], nn.Module], bf16: bool) -> None:
        model: Any = run.student.backbone.model
        c = run.config.objective

        def learner() -> nn.ModuleDict:
            made = head(model.embed_dim, c.hidden_dim, c.bottleneck_dim, c.out_dim)
            copy_head(run.student.head, made)
            return nn.ModuleDict({"backbone": copy.deepcopy(model), "head": made}).to(run.device)

        self.student, self.teacher = learner(), learner().requires_grad_(False).eval()
        self.autocast = lambda: torch.autocast(run.device.type, torch.bfloat16, bf16)
        decay = {"weight_decay": run.config.optim.weight_decay}
        self.optimizer = torch.optim.AdamW(
            [decay | group for group in parameter_groups(self.student)], lr=run.config.optim.lr
        )


class PlainHead(nn.Module):
    """Appendix C of the paper: three layers, a unit-norm bottleneck, a weight-normalised last layer of gain one."""

    def __init__(self, dim: int, hidden: int, bottleneck: int, out: int) -> None:
        super().__init__()
        layers = [nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck, out, bias=False))  # as published
        self.last_layer.weight_g.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Plain(Peer):
    """The paper's loop."""

    def __init__(self, run: train.Trainer, bf16: bool) -> None:
        super().__init__(run, PlainHead, bf16)
        loss: Any = run.loss
        self.center, self.settings = loss.center.clone(), run.config.objective
        self.meter: list[float] = []

    @staticmethod
    def forward(model: nn.ModuleDict, crops: Sequence[Tensor]) -> Tensor:
        """A list of crops to logits: neighbours of one size go through the backbone together, all through the head."""
        sizes = [crop.shape[-1] for crop in crops]
        groups = [[crop for crop in crops if crop.shape[-1] == size] for size in dict.fromkeys(sizes)]
        return model["head"](torch.cat([model["backbone"](torch.cat(group)) for group in groups]))

    def loss(self, student: Tensor, teacher: Tensor, views: int) -> Tensor:
        targets = F.softmax((teacher - self.center) / self.settings.teacher_temp, dim=-1).detach().chunk(2)
        logits = (student / self.settings.student_temp).chunk(views)
        terms = [
            torch.sum(-target * F.log_softmax(logit, dim=-1), dim=-1).mean()
            for one, target in enumerate(targets)
            for other, logit in enumerate(logits)
            if one != other
        ]
        return sum(terms, torch.zeros(())) / len(terms)

    def step(self, views: Views) -> Callable[[], float]:
        crops = list_of_crops(views)
        with self.autocast():
            teacher = self.forward(self.teacher, crops[:2]).float()
            loss = self.loss(self.forward(self.student, crops).float(), teacher, len(crops))
        if not math.isfinite(loss.item()):
            raise UserError(f"plain: the loss is {loss.item()}")
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():  # clipped one by one; nothing reaches this bound
            if parameter.grad is not None and parameter.grad.norm(2).item() == math.inf:
                parameter.grad.zero_()
        self.optimizer.step()
        momentum = self.settings.teacher_momentum
        with torch.no_grad():
            self.center = 0.9 * self.center + 0.1 * teacher.mean(0, keepdim=True)
            for mean, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mean.data.mul_(momentum).add_((1 - momentum) * new.detach().data)
        self.meter.append(loss.item())
        return lambda: self.meter[-1]


class Lightly(Peer):
    """lightly's example for DINO, on this backbone and with this optimizer.

    Raises:
        UserError: lightly is not installed.
    """

    def __init__(self, run: train.Trainer, bf16: bool) -> None:
        try:
            from lightly.loss import DINOLoss
            from lightly.models.modules import DINOProjectionHead
            from lightly.models.utils import update_momentum
        except ImportError as error:
            raise UserError(f"lightly's row: {error}: pip install 'dino-value[bench]', or --without lightly") from None
        super().__init__(run, DINOProjectionHead, bf16)
        self.average: Any = update_momentum
        c, loss = run.config.objective, run.loss
        self.momentum = c.teacher_momentum
        self.criterion: Any = DINOLoss(c.out_dim, c.teacher_temp, c.teacher_temp, 1, c.student_temp)
        self.criterion.to(run.device).center.copy_(getattr(loss, "center"))  # noqa: B009

    def step(self, views: Views) -> Callable[[], float]:
        for part in ("backbone", "head"):
            self.average(self.student[part], self.teacher[part], m=self.momentum)
        crops = list_of_crops(views)
        with self.autocast():
            taught = [self.teacher["head"](self.teacher["backbone"](crop)) for crop in crops[:2]]
            made = [self.student["head"](self.student["backbone"](crop)) for crop in crops]
        loss = self.criterion([part.float() for part in taught], [part.float() for part in made])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item


LOOPS: dict[str, Callable[[train.Trainer, bool], Any]] = {"ours": Ours, "plain": Plain, "lightly": Lightly}


def list_of_crops(views: Views) -> list[Tensor]:
    """[B 3 h w] each, the global ones first."""
    return [crop for group in views if len(group) for crop in group.split(views.batch)]


def copy_head(ours: Any, other: Any) -> None:
    """The weights of a `DINOHead` into one of three linear layers and a weight-normalised last one."""
    assert type(ours) is DINOHead
    theirs = [layer for layer in other.modules() if isinstance(layer, nn.Linear) and layer is not other.last_layer]
    for mine, layer in zip([layer for layer in ours.mlp if isinstance(layer, nn.Linear)], theirs, strict=True):
        layer.load_state_dict(mine.state_dict())
    with torch.no_grad():
        other.last_layer.weight_v.copy_(ours.last_layer.weight)
        other.last_layer.weight_g.fill_(1)


# --- the processes


def serve(pipe: Connection, setting: Setting, threads: int, clock: str) -> None:
    """Build the loop; answer each batch of views with (seconds, loss), and END with what is known at the end: peak of
    memory, FLOPs of a step, and where its time goes."""
    try:
        torch.set_num_threads(threads)
        device = choose_device(setting.config.device)
        if device.type == "cpu":
            torch.set_flush_denormal(setting.flush)  # before there are threads, which inherit it
        before, flops, views = _peak(device), 0, Views(torch.empty(0), torch.empty(0))
        with mock.patch.object(train, "choose_device", return_value=device):  # which would set the flag
            run = train.Trainer(setting.config)
        if setting.config.start_from is not None:
            start_from(run, load_checkpoint(packaged(setting.config.start_from)))
        loop = LOOPS[setting.loop](run, setting.bf16)
        del run
        pipe.send("ready")
        while (given := wait_for(pipe)) != END:
            views = Views(*(torch.from_numpy(group).to(device) for group in given))
            losses: list[Callable[[], float]] = []
            first = FlopCounterMode(display=False) if setting.loop == "plain" and not flops else None
            with first or contextlib.nullcontext():
                seconds = timed(lambda: losses.append(loop.step(views)), device, clock)  # noqa: B023 (called at once)
            flops = first.get_total_flops() if first else flops
            loss = losses.pop()()
            give_back_memory()  # so that many rows fit into the machine; each pays for it alike in its next step
            pipe.send((seconds, loss))
        peak = _peak(device) - before
        pipe.send({"peak_bytes": peak, "flops": flops, "shares": shares(lambda: loop.step(views))})
    except UserError as error:
        pipe.send(error)


def wait_for(pipe: Connection) -> Any:
    """What comes next, or END where the parent is gone: siblings keep its end of the pipe open."""
    parent = multiprocessing.parent_process()
    if parent is not None and pipe not in connection.wait([pipe, parent.sentinel]):
        return END
    return pipe.recv()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


GROUPS = {
    "linear layers": r"aten::(mm|addmm|linear)|_linear_pointwise",
    "attention": r"scaled_dot_product|aten::bmm|softmax",
    "convolution": r"convolution",
    "optimizer, average": r"adamw|lerp|_foreach|addcdiv|addcmul|linalg_vector_norm",
    "compiled": r"[Cc]ompiled|cpp_fused|triton",
}


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Where the time of `work` goes on the CPU: the share of each group of operators, and of all others."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        work()
    found = dict.fromkeys([*GROUPS, "all else"], 0.0)
    for event in recorded.key_averages():
        group = next((name for name, pattern in GROUPS.items() if re.search(pattern, event.key)), "all else")
        found[group] += event.self_cpu_time_total
    return {name: time / max(1e-9, sum(found.values())) for name, time in found.items()}


def ask(pipe: Connection, given: Any = None) -> Any:
    """What a row's process answers, to `given` or of itself.

    Raises:
        UserError: it refuses, or has died.
    """
    try:
        if given is not None:
            pipe.send(given)
        answer = pipe.recv()
    except (EOFError, ConnectionError):
        raise UserError("a row's process ended early; if memory ran out, lower --batch or choose fewer rows") from None
    if isinstance(answer, UserError):
        raise answer
    return answer


def measure(
    settings: Sequence[Setting], batches: Iterable[Views], threads: int, clock: str = "wall"
) -> dict[str, dict[str, Any]]:
    """By row: `seconds` of each step with their median and quartiles, `losses`, `peak_bytes` above the imports,
    `flops` (of the plain loop), `shares` of the time.

    The rows take turns at each batch. The first step, with its compilation and AdamW's allocations, gives a loss and
    no time.
    """
    context: Any = multiprocessing.get_context(START)
    found: dict[str, dict[str, Any]] = {row.name: {"seconds": [], "losses": []} for row in settings}
    pipes: dict[str, Connection] = {}
    children = []
    try:
        for row in settings:
            pipes[row.name], end = context.Pipe()
            children.append(context.Process(target=serve, args=(end, row, threads, clock), daemon=True))
            children[-1].start()
            end.close()
            ask(pipes[row.name])  # one after the other: they would fight over the processor
        for number, views in enumerate(batches):
            for row in settings if number % 2 else reversed(settings):
                seconds, loss = ask(pipes[row.name], [group.numpy() for group in views])
                found[row.name]["losses"].append(loss)
                found[row.name]["seconds"] += [seconds] if number else []
        for name, pipe in pipes.items():
            found[name] |= ask(pipe, END) | spread(found[name]["seconds"])
        return found
    finally:
        for child in children:
            child.terminate()
            child.join()
