"""Lookahead directions of language: what the shadow is, that nothing but u leaves it, and what is refused."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_value.errors import UserError
from dino_value.language import designer_update as steer_module
from dino_value.language.config import LanguageConfig
from dino_value.language.designer_update import DesignerUpdate, TargetTask, ValueMap
from dino_value.language.downstream import answer_gradient, look_ahead
from dino_value.language.learner import Learner
from dino_value.language.probe import probe_run
from dino_value.language.stream import Batch, ExampleSet
from dino_value.language.text import Encoder, read_examples
from dino_value.language.trainer import Trainer, train
from dino_value.language.value_map import map_run
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.metrics import read_metrics
from dino_value.value import Shadow, inner, norm, pre_gradient, tilt

Tiny = Callable[..., LanguageConfig]
AHEAD = ("value.direction=lookahead", "value.lookahead.steps=3", "value.lookahead.batches=2")
CONTRAST = (*AHEAD, "value.lookahead.contrast=true")
LORA = ("learner.lora.rank=2", "learner.lora.dropout=0.1")


@pytest.fixture
def batches(root: Path, encoder: Encoder) -> list[Batch]:
    examples = ExampleSet(read_examples(str(root / "test.jsonl")), encoder, 64, 4, 0, "test")
    return [examples.batch(number) for number in range(2)]


def steered(config: LanguageConfig, steps: int = 0) -> tuple[Trainer, DesignerUpdate]:
    run = Trainer(config)
    for _ in range(steps):
        run.learner_update()
    assert run.steer is not None
    return run, run.steer


def close(left: list[Tensor], right: list[Tensor], tolerance: float) -> bool:
    return float(norm(list(torch._foreach_sub(left, right)))) <= tolerance * float(norm(right))


def equal(left: Any, right: Any) -> bool:
    """Bit for bit, through what a state is made of."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


# The shadow


def test_one_step_of_sgd_is_the_gradient(learner: Learner, batches: list[Batch]) -> None:
    g_down, loss = answer_gradient(learner.eval(), batches[0], 16)
    for lr in (0.03, 1.0):
        u, before, after = look_ahead(learner, batches[:1], 1, lr, "sgd", 16)
        assert all(torch.allclose(a, lr * b, rtol=0, atol=1e-6) for a, b in zip(u, g_down, strict=True))
        assert torch.equal(before, loss)
        assert after < before


@pytest.mark.parametrize("options", [(), LORA])
def test_one_step_of_sgd_in_a_run(tiny: Tiny, options: tuple[str, ...]) -> None:
    sgd = ("value.lookahead.optimizer=sgd", "value.lookahead.steps=1")
    config = tiny("method=value", *options, *AHEAD[:1], *sgd, "optim.lr=0.1")
    run, steer = steered(config, 2)
    run.learner.eval()
    g_down, _ = answer_gradient(run.learner, steer.feedback["main"].batch(1), 16)
    u, found = steer.downstream("main", 1)
    assert all(torch.allclose(a, 0.1 * b, rtol=0, atol=1e-6) for a, b in zip(u, g_down, strict=True))
    assert float(found["lookahead_norm"]) == pytest.approx(0.1 * float(norm(g_down)), rel=1e-4)


def test_steps_take_the_batches_in_turn(learner: Learner, batches: list[Batch]) -> None:
    """Against torch's AdamW on a copy of the model, whole, on Hugging Face's logits."""
    learner.eval()
    u, before, after = look_ahead(learner, batches, 5, 3e-3, "adamw", 7)
    other = copy.deepcopy(learner.model)
    named = dict(other.named_parameters())
    trained = [named[name] for name in learner.scope.names]
    start = [value.detach().clone() for value in trained]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)

    def loss(batch: Batch) -> Tensor:
        logits = other(input_ids=batch.ids).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)

    first = loss(batches[0]).item()
    for step in range(5):
        optimizer.zero_grad()
        loss(batches[step % 2]).backward()
        optimizer.step()
    assert close(u, list(torch._foreach_sub(start, [value.detach() for value in trained])), 1e-3)
    assert before.item() == pytest.approx(first, rel=1e-5)
    assert after.item() == pytest.approx(loss(batches[0]).item(), rel=1e-4)


@pytest.mark.parametrize(("batches", "runs"), [(2, 2), (0, 3), (9, 3)])
def test_the_trunk_runs_once_a_batch(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, batches: int, runs: int
) -> None:  # fmt: skip
    _, steer = steered(tiny("method=value", *AHEAD, f"value.lookahead.batches={batches}"))
    seen: list[Batch] = []
    real = Learner.run
    monkeypatch.setattr(Learner, "run", lambda learner, batch: [seen.append(batch), real(learner, batch)][1])
    steer.downstream("main", 0)
    assert len(seen) == runs
    steer.downstream("main", 1)
    batches_of = steer.feedback["main"].batch
    assert all(torch.equal(batch.ids, batches_of(number).ids) for number, batch in enumerate(seen))
    assert len(seen) == 2 * runs


def test_contrast_is_less_the_shadow_of_others_answers(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    _, steer = steered(tiny("method=value", *CONTRAST))
    made: list[tuple[list[Batch], Any]] = []

    def noting(learner: Learner, batches: list[Batch], *rest: Any) -> Any:
        made.append((batches, look_ahead(learner, batches, *rest)))
        return made[-1][1]

    monkeypatch.setattr(steer_module, "look_ahead", noting)
    u, found = steer.downstream("main", 0)
    (true, own), (shuffled, others) = made
    assert equal(u, [a - b for a, b in zip(own.u, others.u, strict=True)])
    assert found["lookahead_after"] == own.after
    assert equal([batch.ids[:, :12] for batch in true], [batch.ids[:, :12] for batch in shuffled])  # of the prompts
    assert not all(torch.equal(a.labels, b.labels) for a, b in zip(true, shuffled, strict=True))
    again, _ = steer.downstream("main", 0)
    assert equal(u, again)


# In a run


@pytest.mark.parametrize("method", ["value", "closed_form", "random"])
@pytest.mark.parametrize("options", [AHEAD, (*CONTRAST, *LORA)])
def test_an_update_leaves_the_learner_and_its_optimizer(tiny: Tiny, method: str, options: tuple[str, ...]) -> None:
    run, steer = steered(tiny(f"method={method}", *options), 2)
    kept = {name: value.detach().clone() for name, value in run.learner.model.named_parameters()}
    state = copy.deepcopy(run.optimizer.state_dict())
    grads = [parameter.grad.clone() for parameter in run.learner.trained().values() if parameter.grad is not None]
    steer.update_if_due(2)
    assert steer.updates == 2
    assert equal(kept, dict(run.learner.model.named_parameters()))
    assert equal(state, run.optimizer.state_dict())
    assert equal(grads, [value.grad for value in run.learner.trained().values() if value.grad is not None])
    assert set(steer.learner.scope.names) <= set(run.learner.trained())  # which is what requires a gradient


@pytest.mark.parametrize(
    ("method", "options"),
    [("value", AHEAD), ("closed_form", CONTRAST), ("random", AHEAD), ("random_closed_form", (*CONTRAST, *LORA))],
)
def test_a_stopped_run_goes_on_bit_for_bit(tiny: Tiny, method: str, options: tuple[str, ...]) -> None:
    config = tiny(f"method={method}", *options)
    folder = train(config, quiet=True)
    whole = load_checkpoint(folder, "learner")
    assert whole["steer"]["updates"] == 2
    rows = [row for row in read_metrics(folder) if "lookahead_norm" in row]
    assert [row["step"] for row in rows] == [1, 3]
    assert all(row["lookahead_after"] < row["lookahead_before"] == row["feedback_loss"] for row in rows)
    (folder / "checkpoints" / "step_00000004.pt").unlink()
    train(config, quiet=True)
    assert equal({**whole, "seconds": 0}, {**load_checkpoint(folder, "learner"), "seconds": 0})


@pytest.mark.parametrize("methods", [("value", "random"), ("closed_form", "random_closed_form")])
def test_a_random_direction_has_its_norms_and_is_kept_as_long(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, methods: tuple[str, str]
) -> None:
    seen: dict[str, list[list[Tensor]]] = {method: [] for method in methods}
    real = DesignerUpdate.downstream

    def noting(steer: DesignerUpdate, domain: str, number: int) -> Any:
        gradient, found = real(steer, domain, number)
        seen[steer.config.method].append(gradient)
        return gradient, found

    monkeypatch.setattr(DesignerUpdate, "downstream", noting)
    for method in seen:
        _, steer = steered(tiny(f"method={method}", *AHEAD, "targets.alpha_max=0"), 5)  # the learners stay the same
        if "closed_form" in method:
            assert steer.direction is not None
            assert equal(seen[method][-1], steer.direction)
    assert [len(part) for part in seen.values()] == [3, 3]  # each from one update to the next
    for true, random in zip(*seen.values(), strict=True):
        assert torch.allclose(torch.stack(torch._foreach_norm(true)), torch.stack(torch._foreach_norm(random)))
        assert abs(inner(true, random)) < 0.2 * norm(true) * norm(random)
    first, second, _ = seen[methods[1]]
    assert abs(inner(first, second)) < 0.2 * norm(first) * norm(second)


def test_the_probe_and_the_map_take_a_lookahead(tiny: Tiny, root: Path) -> None:
    folder = train(tiny("method=closed_form", *AHEAD), quiet=True)
    found = probe_run(folder, str(root / "test.jsonl"), trials=3)
    assert all(math.isfinite(value) for value in found["designed_sgd"]["value"])
    (one,) = map_run(folder).values()
    assert one["oracle_gain"] >= one["value_gain"] > 0


def test_low_precision(tiny: Tiny) -> None:
    run, steer = steered(tiny("method=closed_form", "precision=bf16", *CONTRAST), 3)
    assert steer.direction is not None
    assert {part.dtype for part in steer.direction} == {torch.float32}
    assert run.meters.read()["loss"] < 10


def test_moving_targets_never_lowers_the_value(tiny: Tiny) -> None:
    """dV/ds ≥ 0 for the learner's own gradient, at s = 0 the mean variance of v under q."""
    run, steer = steered(tiny("method=closed_form", *AHEAD), 2)
    learner, parameters = run.learner.eval(), run.learner.parameters_in_scope()
    u, _ = steer.downstream("main", 5)
    task: TargetTask = steer.task(steer.meta["main"].batch(2))
    with torch.no_grad():
        weights, *rest = task.trunk()
        values, count = task.values_along(u, (weights, *rest), parameters), len(weights)
    q = weights * count

    def value(strength: float) -> float:
        moved = tilt(q, values, strength / float(values.std()))
        return float(inner(u, pre_gradient(task, (moved / count, *rest), parameters)))

    strengths = [0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0]
    found = [value(strength) for strength in strengths]
    assert all(later >= earlier for earlier, later in itertools.pairwise(found))
    assert found[0] == pytest.approx(float(ValueMap(values, q).value), rel=1e-3)
    variance = float(((q * values.square()).sum(1) - (q * values).sum(1).square()).mean())
    assert (value(1e-2) - found[0]) / 1e-2 == pytest.approx(variance / float(values.std()), rel=0.05)
    assert learner.scope.start == 1


# What is said and refused


def test_one_that_diverges_is_said_once(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverging(*arguments: Any) -> Shadow:  # a tiny model that knows nothing hardly can
        found = look_ahead(*arguments)
        return found._replace(after=2 * found.before)

    monkeypatch.setattr(steer_module, "look_ahead", diverging)
    folder = train(tiny("method=closed_form", *AHEAD), quiet=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "value.lookahead" in line]
    assert len(said) == 1
    assert said[0].startswith("warning: value.lookahead: on feedback.main the answer loss rose from ")
    rows = read_metrics(folder)
    assert [row["message"] for row in rows if "event" in row] == [said[0].removeprefix("warning: ")]
    ahead = [row for row in rows if "lookahead_after" in row]
    assert [row["lookahead_after"] for row in ahead] == [2 * row["lookahead_before"] for row in ahead]
    (folder / "checkpoints" / "step_00000004.pt").unlink()
    train(tiny("method=closed_form", *AHEAD), quiet=True)
    assert "value.lookahead" not in capsys.readouterr().err  # nor again after a stop


@pytest.mark.parametrize("method", ["value", "closed_form", "random"])
def test_one_that_is_not_finite_is_refused(tiny: Tiny, method: str) -> None:
    run, _ = steered(tiny(f"method={method}", *AHEAD, "value.lookahead.lr=1e30", "value.burn_in=1"), 1)
    kept = copy.deepcopy(run.state_dict()["learner"])
    with pytest.raises(UserError, match=r"feedback\.main the answer loss is not finite within 3 steps") as error:
        run.learner_update()
    assert "\n" not in str(error.value)
    assert equal(kept, run.state_dict()["learner"])
    assert all(value.requires_grad for value in run.learner.trained().values())


def test_a_rate_that_overflows_is_refused(tiny: Tiny) -> None:
    run, _ = steered(tiny("method=value", *AHEAD, "value.lookahead.lr=1e38", "value.burn_in=1"), 1)
    with pytest.raises(UserError, match=r"^value\.lookahead: it overflowed at a rate of 1e\+38; lower value\.look"):
        run.learner_update()


REFUSED = [
    (["feedback.kind=reward"], "choose feedback.kind=loss"),
    (["value.lookahead.steps=0"], "value.lookahead.steps=0: must be at least 1"),
    (["value.lookahead.batches=-1"], "must be at least 0"),
    (["value.lookahead.lr=0"], "must be above 0"),
    (["value.lookahead.optimizer=lion"], "choose adamw, sgd"),
    (["value.lookahead.step=1"], "did you mean"),
]


@pytest.mark.parametrize(("overrides", "said"), REFUSED)
def test_settings_that_are_refused(tiny: Tiny, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        tiny("method=value", *AHEAD, *overrides)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    tiny("method=baseline", *AHEAD, "feedback.kind=reward")  # which reads no feedback


def test_a_contrast_needs_two_prompts(tiny: Tiny) -> None:
    _, steer = steered(tiny("method=value", *CONTRAST, "feedback.batch_size=1", "value.lookahead.batches=1"))
    with pytest.raises(UserError, match=r"value\.lookahead\.contrast\) among 1 prompts"):
        steer.downstream("main", 0)


# The control of shuffled answers


def test_shuffled_feedback_has_others_answers_and_all_else_the_same(tiny: Tiny) -> None:
    (_, plain), (_, shuffled) = (
        steered(tiny("method=value", f"feedback.shuffle={flag}")) for flag in ("false", "true")
    )
    true, other = plain.feedback["main"], shuffled.feedback["main"]
    assert other.originals == tuple(true.examples) == true.originals
    assert plain.meta["main"].without == shuffled.meta["main"].without
    assert [one.prompt for one in true.examples] == [one.prompt for one in other.examples]
    assert sorted(one.answer for one in true.examples) == sorted(one.answer for one in other.examples)
    assert [one.answer for one in true.examples] != [one.answer for one in other.examples]
    assert [true.indices(n) for n in range(6)] == [other.indices(n) for n in range(6)]
    assert equal(plain.designer.state_dict(), shuffled.designer.state_dict())  # type: ignore[union-attr]
    _, again = steered(tiny("method=value", "feedback.shuffle=true"))
    assert again.feedback["main"].examples == other.examples
    _, seeded = steered(tiny("method=value", "feedback.shuffle=true", "seed=1"))
    assert seeded.feedback["main"].examples != other.examples


@pytest.mark.parametrize("options", [("method=sft",), ("method=closed_form", *CONTRAST), ("method=random",)])
def test_every_method_reads_the_shuffled_answers(tiny: Tiny, options: tuple[str, ...]) -> None:
    losses = []
    for flag in ("false", "true"):
        run = Trainer(tiny(*options, f"feedback.shuffle={flag}"))
        run.learner_update()
        losses.append(run.meters.read()["feedback_loss"])
    assert losses[0] != losses[1]
