"""The value core with another learner, another loss, another designer: an MLP whose label smoothing is learned.

Two of six classes are mostly labelled as their neighbour. The designer φ is a table: for each label the soft target to
train on in its place. 128 clean labels are the feedback: they teach φ, and enter the learner's own loss only in the arm
"trained on feedback".

    python docs/examples/label_smoothing.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dino_value.value import DIRECTIONS, double_backward, everything, value_step

CLASSES, STEPS, PERIOD, BATCH = 6, 500, 4, 64


def draw(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [n 52], two of them informative; their classes [n]; and the labels [n] that the learner is given."""
    classes = torch.randint(CLASSES, (count,), generator=rng)
    angle = 2 * torch.pi * classes / CLASSES
    inputs = torch.randn(count, 52, generator=rng)
    inputs[:, :2] = 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.5 * inputs[:, :2]
    confused = (torch.rand(count, generator=rng) < 0.6) & ((classes == 1) | (classes == 4))
    return inputs, classes, torch.where(confused, classes - 1, classes)


class SmoothedLabels:
    """How L_pre depends on φ (through the targets) and on θ (through the prediction)."""

    def __init__(self, model: nn.Module, table: Tensor, inputs: Tensor, labels: Tensor) -> None:
        self.model, self.table, self.inputs, self.labels = model, table, inputs, labels

    def trunk(self) -> tuple[Tensor, ...]:
        return (self.table.softmax(1)[self.labels],)

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(self.model, parameters, (self.inputs,)), hidden[0])


def train(seed: int, direction: str | None = None, train_on_feedback: bool = False) -> tuple[float, float]:
    """Accuracy and loss on held-out clean labels. Without a direction the targets stay as they begin."""
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    (inputs, _, labels), (clean, truth, _), (test, answer, _) = (draw(count, rng) for count in (4000, 128, 4000))
    model = nn.Sequential(nn.Linear(52, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    table = nn.Parameter(3 * torch.eye(CLASSES))
    learner, designer = torch.optim.SGD(model.parameters(), lr=0.3), torch.optim.Adam([table], lr=0.1)
    scope = everything(model)

    for step in range(STEPS):
        if direction and step % PERIOD == 0:
            g_down = list(torch.autograd.grad(F.cross_entropy(model(clean), truth), list(model.parameters())))
            batch = torch.randint(len(inputs), (BATCH,), generator=rng)
            task = SmoothedLabels(model, table, inputs[batch], labels[batch])
            designer.zero_grad()
            value_step(task, scope.parameters(model), g_down, DIRECTIONS[direction], double_backward, [table])
            designer.step()
        batch = torch.randint(len(inputs), (BATCH,), generator=rng)
        targets = table.detach().softmax(1)[labels[batch]]
        learner.zero_grad()
        loss = F.cross_entropy(model(inputs[batch]), targets)
        if train_on_feedback:
            loss = loss + F.cross_entropy(model(clean), truth)
        loss.backward()
        learner.step()

    with torch.no_grad():
        logits = model(test)
        return float((logits.argmax(1) == answer).float().mean()), float(F.cross_entropy(logits, answer))


def main(seeds: int = 5) -> dict[str, list[tuple[float, float]]]:
    """(accuracy, loss) of each seed, by arm."""
    arms: dict[str, dict[str, Any]] = {
        "no designer": {},
        "no designer, trained on feedback": {"train_on_feedback": True},
        "designer, random direction": {"direction": "random"},
        "designer, value": {"direction": "dot"},
    }
    results = {name: [train(seed, **settings) for seed in range(seeds)] for name, settings in arms.items()}
    for name, found in results.items():
        accuracy, loss = (sum(column) / seeds for column in zip(*found, strict=True))
        print(f"{name:33} accuracy {accuracy:.3f}  loss {loss:.3f}  accuracy by seed {[round(a, 3) for a, _ in found]}")
    return results


if __name__ == "__main__":
    main()
