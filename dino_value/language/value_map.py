"""`dino-value language map RUN`: token by token, which targets the feedback asks for and which the run makes.

v = −D is by how much mass on a candidate lowers the downstream loss, to first order along u; the colours of the printed
text are v of the true token, in standard deviations of all of v.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dino_value.errors import UserError
from dino_value.language.designer_update import ValueMap, constant
from dino_value.language.learner import evaluating
from dino_value.language.probe import feedback_gradient, open_steered
from dino_value.value import pre_gradient, tilt


def map_run(folder: Path, rows: int = 1, seed: int = 0) -> dict[str, Any]:
    """The map of unlabeled text, by a run's last checkpoint; the run itself is left as it is.

    Args:
        rows: of text, each of `value.length` tokens.
        seed: of the text, which comes from the run's stream.

    Returns:
        For each domain of the feedback `value_gain`, `oracle_gain`, `regret`, `alpha` (as in metrics.jsonl), `spread`
        (the standard deviation of v) and `tokens`: row and place in it, text, `v` and `q` of the true token, and of the
        candidate that the feedback would rather see (`best`) and that most mass is moved to (`chosen`).

    Raises:
        UserError: not a run with feedback, or no rows asked for.
    """
    if rows < 1:
        raise UserError(f"--rows {rows}: must be 1 or more")
    run, steer = open_steered(folder)
    learner, t = run.learner.eval(), run.config.targets
    parameters, tokenizer = learner.parameters_in_scope(), run.encoder.tokenizer
    found: dict[str, Any] = {}
    for domain, stream in steer.meta.items():
        for order in stream.order.values():  # text that the run has not seen
            order.seed += 1 + seed
        task = steer.task(stream.batch(rows))
        with torch.no_grad(), constant(learner), evaluating(learner), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*torch\.jit\.script")  # torch's own, in forward mode
            hidden = task.trunk()
            with torch.enable_grad():
                g_down, g_pre = feedback_gradient(steer, domain), pre_gradient(task, hidden, parameters)
            values = task.values_along(steer.current_direction()(g_down, g_pre), hidden, parameters)
            closed = steer.designer is None  # whose targets follow v itself
            q = tilt(task.targets, values, steer.strength) if closed else task.targets
            seen = ValueMap(values, q)
            others = seen.targets[:, 1:].max(1).indices + 1  # the first candidate is the true token
            places = {"best": values.max(1).indices, "chosen": others}
        ids, length = hidden[2], task.batch.ids.shape[1]
        numbers = {name: value.item() for name, value in seen.summary(1.0 if closed else t.alpha_max).items()}

        def described(token: int, place: int, ids: Any = ids, seen: ValueMap = seen) -> dict[str, Any]:
            text = tokenizer.decode([int(ids[token, place])])
            return {"text": text, "v": float(seen.values[token, place]), "q": float(seen.targets[token, place])}

        tokens = [
            {"row": int(position) // length, "place": int(position) % length}
            | described(token, 0)
            | {name: described(token, int(where[token])) for name, where in places.items()}
            for token, position in enumerate(task.batch.counted)
        ]
        found[domain] = {**numbers, "spread": float(values.std()), "tokens": tokens}
    return found


def print_map(found: dict[str, Any], shown: int = 12) -> None:
    """The text, blue where the true token is worth most and red where least, and the `shown` tokens that lose most."""
    for domain, one in found.items():
        text, spread = Text(), max(one["spread"], 1e-30)
        for row in sorted({token["row"] for token in one["tokens"]}):
            for token in one["tokens"]:
                if token["row"] == row:
                    text.append(token["text"], style=_colour(token["v"] / spread))
            text.append("\n")
        table = Table("token", "v", "q", "the feedback would rather", "v", "moved to", "v", "q")
        worst = sorted(one["tokens"], key=lambda token: token["v"] - token["best"]["v"])[:shown]
        for token in worst:
            best, chosen = token["best"], token["chosen"]
            parts = [repr(token["text"]), f"{token['v'] / spread:+.1f}", f"{token['q']:.3f}"]
            parts += [repr(best["text"]), f"{best['v'] / spread:+.1f}"]
            parts += [repr(chosen["text"]), f"{chosen['v'] / spread:+.1f}", f"{chosen['q']:.3f}"]
            table.add_row(*map(Text, parts))
        numbers = ", ".join(f"{name} {one[name]:.3g}" for name in ("value_gain", "oracle_gain", "regret", "alpha"))
        Console().print(Group(Text(f"{domain}: {numbers}; v in standard deviations, {spread:.3g}"), text, table))


def _colour(v: float) -> str:
    """From red (−2 and less) through plain to blue (2 and more)."""
    strength = round(min(abs(v) / 2, 1) * 200)
    low = 255 - strength
    return f"black on rgb({low},{low},255)" if v > 0 else f"black on rgb(255,{low},{low})"
