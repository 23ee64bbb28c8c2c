"""`dino-value replay FILE`: a step whose loss or gradient was not finite, kept whole and computed again.

What is random in a step follows from (seed, name, step), so what `replay_file.py` keeps is enough. Labelled and meta
batches are read again from the data by their positions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dino_value.config import Config, load_config
from dino_value.errors import UserError
from dino_value.training.optim import NotFinite
from dino_value.training.replay_file import read_replay
from dino_value.training.trainer import Trainer


class Replay(NamedTuple):
    """What a replay found: `terms` as they were and as they are now, and where the first bad numbers come from."""

    step: int
    message: str
    terms: dict[str, tuple[float, float]]
    module: str | None  # the first whose output is not finite
    parameters: list[str]  # whose gradients are not finite


def replay(path: Path, overrides: Sequence[str] = ()) -> Replay:
    """Compute the step of a replay file again, with `key=value` overrides of its configuration.

    Raises:
        UserError: not a replay file, its data cannot be read, or all terms are finite this time.
    """
    content = read_replay(path)
    config = _config(path, content["config"], overrides)
    run = Trainer(config)
    run.guard.allowed = 0
    run.resume(content["state"])
    with _first_bad(run) as (found, bad):
        try:
            run.learner_update(*content["batch"])
            run.guard.check(wait=True)
        except NotFinite as refused:
            now = refused.terms
        else:
            raise UserError(f"{path}: every term of step {run.step - 1} is finite this time; is it the same device?")
    if now.keys() != content["terms"].keys():
        raise UserError(f"{path}: {' and '.join(now)} not finite this time, before {' and '.join(content['terms'])}")
    terms = {name: (value, now[name]) for name, value in content["terms"].items()}
    return Replay(run.step, content["message"], terms, found[0] if found else None, bad)


def print_replay(result: Replay) -> None:
    """A table of the terms, and one line on where they come from."""
    table = Table("term", "then", "now", title=f"step {result.step}")
    for name, values in result.terms.items():
        table.add_row(name, *(f"{value:.9g}" for value in values))
    console = Console()
    console.print(table)
    origin = "the output of every module is finite: look at the loss and its gradient"
    if result.module is not None:
        origin = f"first output that is not finite: {result.module}"
    elif result.parameters:
        origin = f"outputs are finite, gradients are not: {', '.join(result.parameters[:4])}"
    console.print(result.message, origin, sep="\n", markup=False, highlight=False, soft_wrap=True)


def _config(path: Path, text: str, overrides: Sequence[str]) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(text)
        try:
            return load_config(file, overrides)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


@contextmanager
def _first_bad(run: Trainer) -> Iterator[tuple[list[str], list[str]]]:
    """The names of modules whose outputs, and of student's parameters whose gradients, are not finite, in the order in
    which these are computed; before clipping, which spreads one bad gradient to all."""
    found: list[str] = []
    gradients: list[str] = []
    roots: dict[str, Any] = {"student": run.student, "teacher": run.teacher}
    if run.steer is not None:
        roots |= {f"{task.kind} head": task.head for task in run.steer.feedback}
        if run.steer.designer is not None:
            roots["designer"] = run.steer.designer

    def watch(name: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(tensor.isfinite().all() for tensor in _tensors(output)):
                found.append(name)

        return module.register_forward_hook(hook)

    handles = [
        watch(f"{root}.{name}" if name else root, part)
        for root, module in roots.items()
        for name, part in module.named_modules()
    ]

    def look(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                gradients.append(name)

        return hook

    handles += [value.register_post_accumulate_grad_hook(look(name)) for name, value in run.student.named_parameters()]
    try:
        yield found, gradients
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from _tensors(part)
