"""The loop: what a run leaves, that it goes on bit for bit, and that arms differ in nothing but the targets."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_value.errors import UserError
from dino_value.language.config import METHODS, LanguageConfig, load_language_config
from dino_value.language.learner import available_memory, memory_needed
from dino_value.language.trainer import Trainer, train
from dino_value.runs.checkpoint import load_checkpoint
from dino_value.runs.metrics import read_metrics

TIMING = ("tokens_per_second", "seconds")


def same(left: Any, right: Any) -> bool:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def steps(run: Trainer, count: int) -> Trainer:
    for _ in range(count):
        run.learner_update()
    return run


def weights(run: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in run.learner.model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_bit_for_bit(tiny: Callable[..., LanguageConfig], method: str) -> None:
    options = (f"method={method}", "learner.lora.rank=2" if method == "closed_form" else "data.packing=best_fit")
    config = tiny(*options)
    folder = train(config, quiet=True)
    whole, rows = load_checkpoint(folder, "learner"), read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    (folder / "checkpoints" / "step_00000004.pt").unlink()
    train(config, quiet=True)
    again = load_checkpoint(folder, "learner")
    assert same({**whole, "seconds": 0}, {**again, "seconds": 0})
    untimed = [
        [{name: value for name, value in row.items() if name not in TIMING} for row in part]
        for part in (rows, read_metrics(folder))
    ]
    assert untimed[0] == untimed[1]


def test_alpha_zero_is_the_baseline_bit_for_bit(tiny: Callable[..., LanguageConfig]) -> None:
    plain = weights(steps(Trainer(tiny("method=baseline")), 3))
    for method in ("value", "random", "uniform", "self_distillation"):
        found = weights(steps(Trainer(tiny(f"method={method}", "targets.alpha_max=0")), 3))
        assert same(plain, found), method
    designed = weights(steps(Trainer(tiny("method=value")), 3))
    assert not same(plain, designed)


def test_burn_in_is_the_baseline(tiny: Callable[..., LanguageConfig]) -> None:
    plain = weights(steps(Trainer(tiny("method=baseline")), 3))
    for method in ("value", "closed_form", "uniform"):
        assert same(plain, weights(steps(Trainer(tiny(f"method={method}", "value.burn_in=3")), 3)))


def test_the_learners_step_is_plain_cross_entropy(tiny: Callable[..., LanguageConfig]) -> None:
    """Against Hugging Face's own loss and torch's AdamW, micro-batches weighted by their tokens."""
    config = tiny("method=baseline", "optim.warmup=0")
    run, other = Trainer(config), Trainer(config)
    model = other.learner.model
    batch = other.stream.batch(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=other.lr(), betas=config.optim.betas, weight_decay=0.0)
    logits = model(input_ids=batch.ids).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
    optimizer.step()
    steps(run, 1)
    for a, b in zip(run.learner.parameters(), other.learner.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_lora_trains_its_own_weights_alone(tiny: Callable[..., LanguageConfig]) -> None:
    run = Trainer(tiny("method=value", "learner.lora.rank=2", "learner.lora.dropout=0.1"))
    assert all("lora_" in name for name in run.learner.trained())
    assert run.learner.scope.start == 1
    before = weights(run)
    after = weights(steps(run, 2))
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(run.learner.trained())
    assert set(run.state_dict()["learner"]) == set(run.learner.trained())


def test_the_export_is_the_learner(tiny: Callable[..., LanguageConfig], root: Path) -> None:
    import transformers

    folder = train(tiny("method=baseline", "learner.lora.rank=2", "checkpoint.export=true"), quiet=True)
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder / "learner")
    run = Trainer(load_language_config(folder / "config.yaml"))
    run.load_state_dict(load_checkpoint(folder, "learner"))
    ids = torch.arange(10)[None]
    run.learner.eval()
    assert torch.allclose(exported(ids).logits, run.learner.model(ids).logits, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(folder / "learner").eos_token == "<end>"


def write_gguf(path: Path, width: int = 32, layers: int = 2, heads: int = 2) -> Tensor:
    """A random Llama; its embeddings."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(100)
    square, up, down = (width, width), (2 * width, width), (width, 2 * width)
    block = {"attn_q": square, "attn_k": square, "attn_v": square, "attn_output": square}
    block |= {"ffn_gate": up, "ffn_up": up, "ffn_down": down, "attn_norm": (width,), "ffn_norm": (width,)}
    shapes = {f"blk.{n}.{name}": shape for n in range(layers) for name, shape in block.items()}
    tensors = {name: torch.randn(shape) / 8 for name, shape in {"token_embd": (100, width), **shapes}.items()}
    for name, tensor in {**tensors, "output_norm": torch.ones(width)}.items():
        if name == "blk.0.ffn_up":  # one of them quantized
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors["token_embd"]


def test_a_gguf_file_is_trained_and_exported(tiny: Callable[..., LanguageConfig], root: Path, tmp_path: Path) -> None:
    import transformers

    embeddings = write_gguf(tmp_path / "tiny.gguf")
    given = [f"learner.model={tmp_path}/tiny.gguf", f"learner.tokenizer={root}/model", "checkpoint.export=true"]
    config = tiny("method=baseline", "steps=1", *given)
    run = Trainer(config)
    assert torch.equal(run.learner.embedding, embeddings)
    assert len(run.learner.trained()) == len(list(run.learner.model.parameters()))
    folder = train(config, quiet=True)
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder / "learner")
    run.load_state_dict(load_checkpoint(folder, "learner"))
    ids = torch.arange(10)[None]
    assert torch.allclose(exported(ids).logits, run.learner.eval().model(ids).logits, atol=1e-5)


def test_sft_trains_on_feedback_too(tiny: Callable[..., LanguageConfig], root: Path) -> None:
    run = steps(Trainer(tiny("method=sft", f"held.file={root}/test.jsonl")), 2)
    assert run.steer is None
    assert {"feedback_loss", "loss"} <= set(run.meters.read())
    assert run.held_loss()["held_loss"] > 0


def test_the_budget_ends_a_run(tiny: Callable[..., LanguageConfig]) -> None:
    config = tiny("method=baseline", "budget.seconds=0.001", "steps=100")
    folder = train(config, quiet=True)
    assert read_metrics(folder)[-1]["step"] == 1
    run = Trainer(config)
    run.seconds = 0.0005
    middle = run.lr()
    run.seconds = 0.001
    assert 0 == run.lr() < middle < config.optim.lr


@pytest.mark.parametrize(("direction", "burn_in"), [("adam", 20), ("cosine", 0)])
def test_adam_and_cosine_directions(tiny: Callable[..., LanguageConfig], direction: str, burn_in: int) -> None:
    run = Trainer(tiny("method=value", f"value.direction={direction}", f"value.burn_in={burn_in}"))
    assert steps(run, burn_in + 1).steer.updates == 1  # type: ignore[union-attr]


def test_checkpointing_changes_nothing(tiny: Callable[..., LanguageConfig]) -> None:
    one, other = (steps(Trainer(tiny(f"learner.checkpointing={flag}")), 3) for flag in ("false", "true"))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(one).values(), weights(other).values()))  # noqa: B905


def test_bfloat16(tiny: Callable[..., LanguageConfig]) -> None:
    run = steps(Trainer(tiny("method=value", "precision=bf16", "data.packing=best_fit")), 3)
    assert run.meters.read()["loss"] < 10
    assert {value.dtype for value in run.learner.trained().values()} == {torch.float32}


REFUSED = [
    ("targets.alpha_max=1.5", "targets.alpha_max=1.5: must lie in"),
    ("method=magic", "method=magic: choose"),
    ("steps=0", "steps=0: must be at least 1"),
    ("data.weights.other=1", "data.weights.other: no such domain"),
    ("data.weights.main=0", "must be above 0"),
    ("designer.hidden=15", "multiple of designer.heads"),
    ("optim.learning_rate=1", "unknown configuration key optim.learning_rate; did you mean"),
    ("value.direction=adam", "set value.burn_in to 20 or more"),
    ("optim.lr=.nan", "must be finite"),
    ("feedback.files.a=x", "each is paired with the stream of its own name"),
]


@pytest.mark.parametrize(("override", "said"), REFUSED)
def test_settings_that_are_refused(tiny: Callable[..., LanguageConfig], override: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        tiny(override)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


LATER = [
    ("targets.candidates=1000", "vocabulary has"),
    ("data.length=500", "window is 128"),
    ("value.length=500", "window is 128"),
    ("feedback.length=20", "longer than 20"),
    ("learner.model=/nowhere", "no tokenizer"),
    ("learner.model=nobody/nothing", "not in the local Hugging Face cache"),
    ("data.stream=/nowhere.jsonl", "no such file"),
]


@pytest.mark.parametrize(("override", "said"), LATER)
def test_what_only_the_files_tell(tiny: Callable[..., LanguageConfig], override: str, said: str) -> None:
    config = tiny(override)
    with pytest.raises(UserError, match=said):
        train(config, quiet=True)
    assert not Path(config.out).exists()


def test_feedback_that_is_in_the_test_set(tiny: Callable[..., LanguageConfig], root: Path, tmp_path: Path) -> None:
    leaked = (root / "feedback.jsonl").read_text().splitlines()[3]
    test = tmp_path / "test.jsonl"
    test.write_text(leaked + "\n")
    with pytest.raises(UserError, match=r"overlaps the test file .*for example") as error:
        Trainer(tiny(f"feedback.test=[{test}]"))
    assert json.loads(leaked)["question"][:20] in str(error.value)


@pytest.mark.parametrize(("free", "advice"), [(1, "a smaller model"), (10, "a smaller model or learner.lora.rank=8")])
def test_a_model_that_cannot_fit(
    tiny: Callable[..., LanguageConfig], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    free: int, advice: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("dino_value.language.learner.available_memory", lambda device: free * 2**30)
    huge = tmp_path / "huge"
    shutil.copytree(root / "model", huge)
    config = json.loads((huge / "config.json").read_text())
    (huge / "config.json").write_text(json.dumps({**config, "hidden_size": 65536, "num_hidden_layers": 200}))
    with pytest.raises(UserError, match=r"needs at least .* GiB on cpu") as error:
        Trainer(tiny(f"learner.model={huge}"))
    assert str(error.value).endswith(f"{free}.0 GiB are free; choose {advice}")
    assert memory_needed(10, trained=True) == 160
    assert available_memory(torch.device("cpu")) > 0


def test_another_run_in_the_folder(tiny: Callable[..., LanguageConfig]) -> None:
    train(tiny("method=baseline", "steps=1"), quiet=True)
    with pytest.raises(UserError, match="holds a run with other settings"):
        train(tiny("method=baseline", "steps=1", "optim.lr=1e-3"), quiet=True)


def test_going_on_with_other_settings_and_past_a_damaged_checkpoint(
    tiny: Callable[..., LanguageConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(tiny("method=baseline", "steps=4"), quiet=True)
    newest = folder / "checkpoints" / "step_00000004.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    train(tiny("method=baseline", "steps=5"), quiet=True, override=True)
    said = capsys.readouterr().err
    assert "other settings from here on: steps" in said
    assert "set aside, going on from step_00000002.pt" in said
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "event" not in row] == [1, 2, 3, 4, 5]
    assert sum("event" in row for row in rows) == 2


@pytest.mark.parametrize(("name", "rank", "lr"), [("lora", 8, 2e-4), ("full", 0, 1.5e-5)])
def test_the_papers_settings(name: str, rank: int, lr: float) -> None:
    given = ["out=a", "learner.model=m", "data.stream=s.jsonl", "feedback.files=f.jsonl"]
    c = load_language_config(f"language/{name}", given)
    assert (c.learner.lora.rank, c.optim.lr, c.value.period, c.targets.candidates, c.targets.alpha_max) == (
        rank,
        lr,
        8,
        64,
        0.5,
    )
    assert c.data.stream == {"main": "s.jsonl"}


def test_a_tracker_gets_what_the_metrics_get(tiny: Callable[..., LanguageConfig]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(tiny("track.to=[tensorboard]"), quiet=True)
    events, rows = EventAccumulator(str(folder / "tensorboard")).Reload(), read_metrics(folder)
    assert set(events.Tags()["scalars"]) == {name for row in rows for name in row} - {"step"}
    assert [event.step for event in events.Scalars("loss")] == [row["step"] for row in rows]


def test_the_exported_learner_follows_the_umask(tiny: Callable[..., LanguageConfig]) -> None:
    before = os.umask(0o027)
    try:
        run = train(tiny("method=baseline", "steps=1", "checkpoint.export=true"), quiet=True)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (run / "learner").iterdir()}
    assert set(modes.values()) == {0o640}
    assert "model.safetensors" in modes
    assert stat.S_IMODE((run / "learner").stat().st_mode) == 0o750
