"""Evaluation: unbiased estimates, batched generation, prompts, and the commands around it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_value.cli import main
from dino_value.errors import UserError
from dino_value.language.config import LanguageConfig
from dino_value.language.evaluate import (
    answer_loss,
    choose,
    evaluate,
    few_shot,
    pass_at_k,
    read_choices,
    read_problems,
    score,
    share_interval,
)
from dino_value.language.generate import generate
from dino_value.language.learner import Learner
from dino_value.language.stream import ExampleSet
from dino_value.language.text import Encoder, read_examples
from dino_value.language.trainer import train


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 4), (5, 3, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int, c: int, k: int) -> None:
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_wilson_interval() -> None:
    scipy = pytest.importorskip("scipy.stats")
    found = share_interval([1.0] * 7 + [0.0] * 13)
    expected = scipy.binomtest(7, 20).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_answer_loss_is_that_of_one_example_at_a_time(learner: Learner, encoder: Encoder, root: Path) -> None:
    examples = read_examples(str(root / "test.jsonl"))
    learner.eval()
    found = answer_loss(learner, ExampleSet(examples, encoder, 64, 5, 0, "test"))
    losses = []
    for one in examples:
        tokens = encoder.encode(one)
        with torch.no_grad():
            logits = learner.model(torch.tensor([tokens.ids])).logits[0].log_softmax(-1)
        losses += [
            -float(logits[place - 1, token])
            for place, (token, counted) in enumerate(zip(tokens.ids, tokens.counted, strict=True))
            if counted
        ]
    assert found.mean == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.low < found.mean < found.high


def test_batched_greedy_decoding_is_that_of_one_prompt_at_a_time(
    learner: Learner, encoder: Encoder, root: Path
) -> None:
    prompts = [one.prompt for one in read_examples(str(root / "test.jsonl"))][:5]
    prompts.append("Question: Ann")  # of another length
    together = generate(learner.model, encoder, prompts, 6, batch_size=6)
    alone = [generate(learner.model, encoder, [prompt], 6)[0] for prompt in prompts]
    assert together == alone
    drawn = generate(learner.model, encoder, prompts, 6, samples=3, temperature=1.0, seed=1)
    assert [len(row) for row in drawn] == [3] * 6
    assert drawn == generate(learner.model, encoder, prompts, 6, samples=3, temperature=1.0, seed=1)
    assert drawn != generate(learner.model, encoder, prompts, 6, samples=3, temperature=1.0, seed=2)
    with pytest.raises(UserError, match="exceeds the model's window of 128"):
        generate(learner.model, encoder, prompts, 120)


def test_stop_strings_end_a_completion(learner: Learner, encoder: Encoder) -> None:
    prompt = ["Question: Ann has 3 apples"]
    whole = generate(learner.model, encoder, prompt, 8)[0][0]
    mark = encoder.tokenizer.decode(whole.tokens[2:3])
    cut = generate(learner.model, encoder, prompt, 8, stop=[mark])[0][0]
    assert len(cut.tokens) <= 3 < len(whole.tokens)
    assert cut.text == whole.text.split(mark)[0]


def test_few_shot_is_seeded(root: Path) -> None:
    pool = read_examples(str(root / "feedback.jsonl"))
    first = few_shot(pool, 2, 0, 5)
    assert first == few_shot(pool, 2, 0, 5) != few_shot(pool, 2, 1, 5)
    assert first.count("Question:") == first.count("####") == 2
    with pytest.raises(UserError, match="choose fewer"):
        few_shot(pool, 99, 0, 0)


def test_scores_by_task() -> None:
    pytest.importorskip("math_verify")
    assert score("it is 7", "7", "gsm8k")[2:] == (True, True)
    assert score("it is 7", "7", "boxed")[2:] == (False, False)  # nothing but a box counts
    assert score("\\boxed{\\frac{2}{4}}", "0.5", "boxed")[2:] == (False, True)


def test_references(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "1+1\n#### 2"}) + "\n")
    assert read_problems(str(path), "gsm8k", None)[0].truth == "2"
    path.write_text(json.dumps({"problem": "q", "solution": "so \\boxed{x}"}) + "\n")
    assert read_problems(str(path), "boxed", None)[0].truth == "x"
    path.write_text(json.dumps({"question": "q", "answer": "nothing"}) + "\n")
    with pytest.raises(UserError, match="record 1: no question with a final answer"):
        read_problems(str(path), "gsm8k", None)


def test_multiple_choice(tmp_path: Path, learner: Learner, encoder: Encoder, monkeypatch: Any) -> None:
    path = tmp_path / "mmlu.jsonl"
    rows = [
        {"question": "How many?", "choices": ["1", "2", "3", "4"], "answer": 2, "subject": "high_school"},
        {"question": "How many are left?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    questions = read_choices(str(path), None)
    assert [one.truth for one in questions] == [2, 1]
    assert questions[0].prompt.startswith(
        "The following are multiple choice questions (with answers) about high school.\n\nHow many?\nA. 1\nB. 2"
    )
    assert questions[0].prompt.endswith("D. 4\nAnswer:")
    letters = [" 1", " 2", " 3", " 4"]
    monkeypatch.setattr("dino_value.language.evaluate.LETTERS", "1234")
    for batch in (1, 2):  # right padding changes nothing
        picked = choose(learner.eval(), encoder, questions, batch)
        for one, pick in zip(questions, picked, strict=True):
            with torch.no_grad():
                logits = learner.model(torch.tensor([encoder.prompt(one.prompt)])).logits[0, -1]
            assert pick == int(logits[[encoder.plain(letter)[-1] for letter in letters]].argmax())
    path.write_text(json.dumps({"question": "q", "choices": ["1"], "answer": 3}))
    with pytest.raises(UserError, match="expected question, choices"):
        read_choices(str(path), None)


def test_a_run_is_evaluated_and_probed(
    tiny: Callable[..., LanguageConfig], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("math_verify")
    folder = train(tiny("method=value", "checkpoint.export=true"), quiet=True)
    test = str(root / "test.jsonl")
    shots = ["--shots", "1", "--demonstrations", str(root / "feedback.jsonl")]
    command = ["language", "eval", str(folder), test, "--limit", "4", "--samples", "4", "--new-tokens", "8", *shots]
    assert main(command) == 0
    found = json.loads((folder / "results" / "gsm8k_test.json").read_text())
    assert {"answer_loss", "pass@1_exact", "pass@1_verified", "sampled_pass@4_exact"} <= set(found["metrics"])
    assert "sampled_pass@8_exact" not in found["metrics"]
    assert len(found["completions"]) == 4
    exported = evaluate(str(folder / "learner"), test, limit=4, loss_only=True, device="cpu")
    assert exported["metrics"]["answer_loss"]["mean"] == pytest.approx(
        found["metrics"]["answer_loss"]["mean"], rel=1e-4
    )
    assert main(["language", "probe", str(folder), test, "--trials", "4"]) == 0
    probed = json.loads((folder / "results" / "probe.json").read_text())
    assert set(probed) == {"designed_sgd", "designed_optimizer", "plain_sgd", "plain_optimizer"}
    assert -1 <= probed["designed_sgd"]["pearson"] <= 1
    capsys.readouterr()
    assert main(["language", "eval", str(folder), str(root / "feedback.jsonl")]) == 2
    assert "overlaps the test file" in capsys.readouterr().err
    assert main(["language", "probe", str(folder), str(root / "feedback.jsonl")]) == 2
    assert "nothing but the run's own feedback" in capsys.readouterr().err
    assert main(["language", "eval", str(folder), test, "--shots", "1"]) == 2


def test_the_training_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["language", "train", str(root / "tiny.yaml"), "--quiet", f"out={out}", "steps=1"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert main(["language", "train", str(root / "tiny.yaml"), f"out={out}", "targets.alpha_max=2"]) == 2
    assert capsys.readouterr().err.startswith("error: targets.alpha_max=2.0: must lie in")
    assert main(["language"]) == 2
