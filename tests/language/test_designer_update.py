"""The value step on a causal LM: engines agree, the oracle bounds the designer, feedback reaches φ and only φ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_value.config import ScopeConfig
from dino_value.errors import UserError
from dino_value.language import designer_update as steer_module
from dino_value.language.architectures import architecture
from dino_value.language.config import LanguageConfig
from dino_value.language.designer import TokenDesigner
from dino_value.language.designer_update import ENGINE_CHOICES, TargetTask, constant
from dino_value.language.downstream import answer_gradient, token_losses
from dino_value.language.learner import Cut, Learner
from dino_value.language.stream import Batch, ExampleSet
from dino_value.language.targets import soft_targets
from dino_value.language.text import Encoder, read_examples
from dino_value.language.trainer import Trainer
from dino_value.value import DIRECTIONS, engine_error, pre_gradient, score_loss, value_step


@pytest.fixture
def batch(root: Any, encoder: Encoder) -> Batch:
    return ExampleSet(read_examples(str(root / "test.jsonl")), encoder, 64, 3, 0, "test").batch(0)


@pytest.fixture
def task(learner: Learner, batch: Batch) -> TargetTask:
    torch.manual_seed(1)
    designer = TokenDesigner(16, 16, 1, 2, 0.5, 0.0)
    return TargetTask(learner.eval(), designer, batch, 8, 16, 0.5)


def direction(learner: Learner) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn_like(value) for value in learner.parameters_in_scope().values()]


@pytest.mark.parametrize("engine", ["linear", "finite_difference"])
def test_engines_agree_with_double_backward(learner: Learner, task: TargetTask, engine: str) -> None:
    phi, parameters = list(task.designer.parameters()), learner.parameters_in_scope()  # type: ignore[union-attr]
    error = engine_error(task, parameters, direction(learner), phi, ENGINE_CHOICES[engine])
    assert error < (1e-5 if engine == "linear" else 2e-2)


def test_the_tail_is_the_model(learner: Learner, batch: Batch) -> None:
    learner.eval()
    with torch.no_grad():
        whole = learner.model(input_ids=batch.ids).logits
        found = learner.run(batch)
        again = learner.at(learner.parameters_in_scope(), Learner.finish, found.cut)
    assert torch.equal(again, found.final)
    assert torch.allclose(learner.head(found.final), whole, atol=1e-6)
    assert learner.scope.start == 1
    assert len(found.cut.calls) == 3  # two blocks and the norm


def test_answer_gradient_is_the_models_own(learner: Learner, batch: Batch) -> None:
    learner.eval()
    found, loss = answer_gradient(learner, batch, 16)
    logits = learner.model(input_ids=batch.ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
    named = dict(learner.model.named_parameters())
    wanted = torch.autograd.grad(expected, [named[name] for name in learner.scope.names])
    assert torch.allclose(loss, expected, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_values_are_directional_derivatives_and_the_oracle_bounds_them(learner: Learner, task: TargetTask) -> None:
    parameters, u = learner.parameters_in_scope(), direction(learner)
    phi = list(task.designer.parameters())  # type: ignore[union-attr]
    value_step(task, parameters, u, DIRECTIONS["dot"], ENGINE_CHOICES["linear"], phi)
    assert task.cotangent is not None
    weights, entered, ids, counted = (part.detach() for part in task.trunk())
    found = task.value_map()
    assert torch.allclose(found.targets, weights * len(weights))
    # Against one backward pass for each of a few candidates.
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    cut = Cut(entered, task._calls)
    losses = learner.at(leaves, token_losses, cut, counted, ids, 16)
    for token, candidate in ((0, 0), (3, 5), (7, 2)):
        gradient = torch.autograd.grad(losses[token, candidate], list(leaves.values()), retain_graph=True)
        exact = sum((g * direct).sum() for g, direct in zip(gradient, u, strict=True))
        assert torch.allclose(found.values[token, candidate], exact, rtol=1e-3, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(found.targets.sum(1), torch.ones(len(ids)), atol=1e-5)
    assert found.oracle(0.5) >= found.value
    assert found.oracle(0.5) >= found.plain
    for _ in range(20):  # no targets within the bound do better
        strength = 0.5 * torch.rand(len(ids), 1)
        other = strength * torch.randn(len(ids), 8).softmax(1)
        other[:, 0] += 1 - strength[:, 0]
        assert (other * found.values).sum(1).mean() <= found.oracle(0.5) + 1e-6
    assert found.summary(0.5)["regret"] >= 0


def test_v_predicts_the_decrease(learner: Learner, task: TargetTask, batch: Batch) -> None:
    """A small step on −g_pre lowers the answer loss by ηV."""
    learner.eval()
    g_down, before = answer_gradient(learner, batch, 16)
    g_pre = pre_gradient(task, task.trunk(), learner.parameters_in_scope())
    value = sum((a * b).sum() for a, b in zip(g_down, g_pre, strict=True))
    named, eta = dict(learner.model.named_parameters()), 1e-2
    with torch.no_grad():
        for name, gradient in zip(learner.scope.names, g_pre, strict=True):
            named[name] -= eta * gradient
    _, after = answer_gradient(learner, batch, 16)
    assert torch.allclose(before - after, eta * value, rtol=0.1)  # type: ignore[operator]


def test_alpha_zero_designer_gives_one_hot(learner: Learner, batch: Batch) -> None:
    designer = TokenDesigner(16, 16, 1, 2, 0.0, 0.0)
    weights = TargetTask(learner, designer, batch, 8, 16, 0.5).trunk()[0]
    assert torch.equal(weights[:, 0] * len(weights), torch.ones(len(weights)))
    assert not weights[:, 1:].any()


def test_the_designer_sees_no_future(learner: Learner) -> None:
    torch.manual_seed(0)
    designer, seen, truth = TokenDesigner(16, 16, 2, 2, 0.5, 0.0), torch.randn(1, 9, 16), torch.randn(1, 9, 16)
    states = designer(seen, truth)
    changed, later = seen.clone(), truth.clone()
    changed[:, 6:] += 1
    later[:, 6:] += 1
    assert torch.allclose(designer(changed, later)[:, :6], states[:, :6], atol=1e-6)
    assert not torch.allclose(designer(changed, later)[:, 6:], states[:, 6:], atol=1e-3)
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    changed = seen.clone()
    changed[:, :4] += 1
    assert torch.allclose(designer(changed, truth, segments)[:, 4:], designer(seen, truth, segments)[:, 4:], atol=1e-6)


def test_feedback_reaches_phi_alone(tiny: Callable[..., LanguageConfig]) -> None:
    run = Trainer(tiny("method=value"))
    assert run.steer is not None
    before = {name: value.clone() for name, value in run.learner.model.named_parameters()}
    phi = [value.clone() for value in run.steer.designer.parameters()]  # type: ignore[union-attr]
    run.steer.update_if_due(0)
    assert all(torch.equal(value, before[name]) for name, value in run.learner.model.named_parameters())
    assert all(parameter.grad is None for parameter in run.learner.parameters())
    assert all(parameter.requires_grad for parameter in run.learner.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(run.steer.designer.parameters(), phi, strict=True))  # type: ignore[union-attr]


def test_the_designer_learns_to_raise_v(tiny: Callable[..., LanguageConfig]) -> None:
    """On one batch and one g_down, the gain of the designed targets over one-hot ones becomes positive."""
    run = Trainer(tiny("method=value", "designer.lr=3e-2"))
    steer = run.steer
    assert steer is not None
    assert steer.designer is not None
    assert steer.designer_optimizer is not None
    batch = steer.meta["main"].batch(2)
    g_down, _ = steer.downstream("main", 0)
    gains = []
    for _ in range(40):
        task = steer.task(batch)
        steer.designer_optimizer.zero_grad()
        with constant(run.learner):
            value_step(
                task,
                run.learner.parameters_in_scope(),
                g_down,
                DIRECTIONS["dot"],
                ENGINE_CHOICES["linear"],
                list(steer.designer.parameters()),
            )
        gains.append(float(task.value_map().summary(0.5)["value_gain"]))
        steer.designer_optimizer.step()
    assert gains[-1] > max(0.0, gains[0])


def test_a_penalty_holds_the_proposal_to_the_learners_own_prediction(tiny: Callable[..., LanguageConfig]) -> None:
    distances = []
    for weight in (0, 10):
        run = Trainer(tiny("method=value", "designer.lr=3e-2", "designer.prior=learner", f"designer.kl={weight}"))
        steer = run.steer
        assert steer is not None
        with constant(run.learner):
            for _ in range(15):
                steer.update(0)
            task = steer.task(steer.meta["main"].batch(2))
            task.trunk()
        assert task.away is not None
        distances.append(float(task.away.detach()))
    assert 0 <= 3 * distances[1] < distances[0]


def test_the_distance_bounds_that_of_the_targets() -> None:
    """α·KL(r‖own) is at least KL(q‖q with r = own), and zero where r is the learner's own."""
    torch.manual_seed(0)
    designer, own = TokenDesigner(16, 16, 1, 2, 0.5, 0.0, "learner"), torch.randn(6, 8).softmax(1)
    states, options = torch.randn(6, 16), torch.randn(6, 8, 16)
    assert designer.targets(states, options, own)[1].abs().max() < 1e-6
    torch.nn.init.normal_(designer.query.weight)
    q, away = designer.targets(states, options, own)
    base = soft_targets(designer.alpha(states), own)
    assert (away >= (q * (q / base).log()).sum(1) - 1e-6).all()
    assert away.min() > 1e-3


def test_rewards_point_where_the_score_function_does(
    tiny: Callable[..., LanguageConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """g_down of sampled answers is the score function's, whatever scored them."""
    run = Trainer(tiny("method=value", "feedback.kind=reward", "feedback.samples=3", "feedback.new_tokens=4"))
    assert run.steer is not None
    seen: dict[str, Any] = {}

    def scoring(texts: list[list[str]], truths: list[str]) -> list[list[float]]:
        seen["texts"] = texts
        return [[1.0, 0.0, 0.0] for _ in texts]

    monkeypatch.setattr(steer_module, "rewards", scoring)
    examples, number = run.steer.feedback["main"], 0
    sampled = []
    real = steer_module.generate
    monkeypatch.setattr(steer_module, "generate", lambda *a, **k: sampled.append(real(*a, **k)) or sampled[-1])
    run.learner.eval()
    found, metrics = run.steer.downstream("main", number)
    assert float(metrics["reward"]) == pytest.approx(1 / 3)
    logs = []
    for index, row in zip(examples.indices(number), sampled[0], strict=True):
        given = run.encoder.prompt(examples.examples[index].prompt)
        for one in row:
            ids = torch.tensor([given + one.tokens])
            logits = run.learner.model(input_ids=ids).logits[0].log_softmax(-1)
            places = range(len(given) - 1, ids.shape[1] - 1)
            logs.append(sum(logits[place, ids[0, place + 1]] for place in places))
    scores = torch.tensor([[1.0, 0, 0]] * len(sampled[0]))
    named = dict(run.learner.model.named_parameters())
    expected = torch.autograd.grad(
        score_loss(torch.stack(logs).view(-1, 3), scores),  # type: ignore[arg-type]
        [named[name] for name in run.learner.scope.names],
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_domains_are_paired_and_their_alignments_averaged(root: Any, tiny: Callable[..., LanguageConfig]) -> None:
    pair = [f"data.stream.b={root}/test.jsonl", f"feedback.files.b={root}/test.jsonl", "feedback.limit=8"]
    run = Trainer(tiny("method=value", *pair, "value.engine=linear"))
    assert run.steer is not None
    assert {name: list(stream.sources) for name, stream in run.steer.meta.items()} == {"main": ["main"], "b": ["b"]}
    run.steer.update_if_due(0)
    assert run.steer.updates == 1


def test_a_scope_with_the_head_has_no_closed_form(tiny: Callable[..., LanguageConfig]) -> None:
    with pytest.raises(UserError, match="without the output head"):
        Trainer(tiny("method=closed_form", "value.scope.patterns=['embed_tokens','layers.2']"))


def test_the_whole_model_as_scope(root: Any, tiny: Callable[..., LanguageConfig]) -> None:
    run = Trainer(tiny("method=value", "value.scope.patterns=['.']"))
    assert run.steer is not None
    assert run.learner.scope.start is None
    run.steer.update_if_due(0)
    assert "error" in run.steer.notes[0]


def test_scope_beyond_the_model(tiny: Callable[..., LanguageConfig]) -> None:
    with pytest.raises(UserError, match=r"value.scope: .*this learner has 3"):
        Trainer(tiny("value.scope.blocks=9"))


def test_other_architectures_come_apart() -> None:
    import transformers

    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    narrow = {**small, "intermediate_size": 24}
    torch.manual_seed(0)
    for model in (
        transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**narrow, num_key_value_heads=1)),
        transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**narrow)),
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
            )
        ),
    ):
        assert Learner(model, ScopeConfig(blocks=1)).scope.start == 1


# What the models' cards say.
PARAMETERS = {"qwen1.5-0.5b": 463_987_712, "qwen1.5-4b": 3_950_369_280, "qwen1.5-7b": 7_721_324_544,
              "qwen2.5-0.5b": 494_032_768}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_papers_learners_by_name(name: str) -> None:
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(architecture(name))
    assert sum(value.numel() for value in model.parameters()) == PARAMETERS[name]


def test_a_name_without_weights(root: Any, tiny: Callable[..., LanguageConfig]) -> None:
    given = ["learner.model=qwen-tiny", f"learner.tokenizer={root}/model"]
    run = Trainer(tiny("method=value", *given, "learner.random_weights=true"))
    run.learner_update()
    assert run.learner.vocabulary == 1000
    with pytest.raises(UserError, match=r"without weights; set learner.random_weights=true"):
        Trainer(tiny(*given))
    with pytest.raises(UserError, match=r"give learner.tokenizer=DIR"):
        Trainer(tiny(given[0], "learner.random_weights=true"))
