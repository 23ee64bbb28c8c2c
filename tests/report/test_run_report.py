"""The page about runs says what lies in their folders, and nothing that does not."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dino_value.cli import main
from dino_value.config import Config, load_config
from dino_value.errors import UserError
from dino_value.files import write_bytes, write_json, write_text
from dino_value.language.arithmetic import write_problems, write_tiny_model
from dino_value.language.config import load_language_config
from dino_value.language.trainer import train as train_language
from dino_value.models.backbone import save_backbone
from dino_value.report.figures import results_figure
from dino_value.report.gallery import held_out_images
from dino_value.report.runs import arms_of_runs, evaluated, headings, report_runs
from dino_value.runs.folder import prepare_folder
from dino_value.training.trainer import Trainer, train

Make = Callable[..., Config]

LANGUAGE = """
steps: 4
log_every: 1
device: cpu
precision: fp32
learner: {model: ROOT/model, lora: {rank: 0}}
data: {length: 40, stream: {main: ROOT/stream.jsonl}, buffer: 20}
optim: {batch_size: 2, accumulation: 1}
targets: {candidates: 8, chunk: 16}
designer: {hidden: 16, layers: 1, heads: 2}
value: {period: 2, batch_size: 2, length: 40}
feedback: {files: {main: ROOT/feedback.jsonl}, length: 64, batch_size: 4}
held: {file: ROOT/feedback.jsonl, every: 2}
checkpoint: {every: 4, export: false}
"""


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the data sets, which a test may move."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def config_of(tiny: Make, data: Path, *overrides: str) -> Config:
    places = (f"data.unlabeled={data / 'images'}", f"data.ade20k={data / 'ade'}", f"data.nyuv2={data / 'nyu'}")
    return tiny(*places, *overrides)


@pytest.fixture
def runs(tiny: Make, data: Path, tmp_path: Path) -> list[Path]:
    found = []
    for method in ("value", "baseline"):
        folder = train(config_of(tiny, data, f"method={method}", f"out={tmp_path / method}"), quiet=True)
        (folder / "results" / "seg").mkdir(parents=True)
        score = {"evaluation": "seg", "miou": 0.25 if method == "value" else 0.125}
        write_json(folder / "results" / "seg" / "results.json", score)
        found.append(folder)
    return found


def test_one_run(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = runs[0]
    picture = results_figure({"arms": {"value": {"miou": [0.5]}}}).panels[0].png
    (run / "results" / "seg" / "pictures").mkdir()
    write_bytes(run / "results" / "seg" / "pictures" / "0000_image_truth_prediction.png", picture)
    row = {"pearson": 0.5, "interval": [0.25, 0.75], "predicted": [0.0, 1.0], "realised": [0.0, 1.0]}
    for step in (2, 4):
        found = {"step": step, "designed_sgd": row, "designed_optimizer": row}
        write_json(run / "results" / f"probe_step_{step}.json", found)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    assert "25.00" in page
    for title in (
        "Training curves",
        "What the student sees",
        "Patch features",
        "Masks across training",
        "Does V foretell",
        "Probe r across training",
        "Predictions: value",
        "What it cost",
        "Reproduce this",
    ):
        assert f"{title}" in page
    assert page.count("<img") == len(list((run / "report_figures").glob("*.png")))
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert train(load_config(run / "config.yaml"), quiet=True) == run  # still a run folder, and finished


def test_methods_with_the_same_seeds_are_arms(runs: list[Path], tmp_path: Path) -> None:
    page = report_runs(runs, tmp_path / "page.html").read_text()
    assert "12.50" in page
    configs = {run: load_config(run / "config.yaml") for run in runs}
    assert arms_of_runs(configs) == {"value": [runs[0]], "baseline": [runs[1]]}
    configs[runs[1]].seed = 5
    assert arms_of_runs(configs) == {"value": [runs[0]], "baseline": [runs[1]]}  # by folder name
    configs[runs[1]].method = "value"
    assert arms_of_runs(configs) == {"value": runs}  # two seeds of one method


def test_only_what_every_run_has_is_compared(runs: list[Path]) -> None:
    arms = {"value": [runs[0]], "baseline": [runs[1]]}
    write_json(runs[0] / "results" / "depth.results.json", {"evaluation": "depth", "rmse": 1.0})
    assert evaluated(arms) == {"arms": {"value": {"miou": [0.25]}, "baseline": {"miou": [0.125]}}}
    for run, miou in zip(runs, (0.5, 0.625), strict=True):
        settings = {"labels": 32, "finetune": True}
        content = {"evaluation": "seg", "miou": miou, "settings": settings}
        (run / "results" / "seg_32").mkdir()
        write_json(run / "results" / "seg_32" / "results.json", content)
    found = evaluated(arms)
    assert found is not None
    assert found["arms"]["value"] == {"miou": [0.25], "miou@32_fine-tuned": [0.5]}
    for folder in ("seg", "seg_32"):
        (runs[1] / "results" / folder / "results.json").unlink()
    assert evaluated(arms) is None


def test_a_run_without_evaluations_has_a_page(tiny: Make, tmp_path: Path) -> None:
    run = train(tiny("method=baseline", "data.ade20k=null", "data.nyuv2=null"), quiet=True)
    page = report_runs([run], run / "report.html").read_text()
    assert "Training curves" in page
    assert "Results</h2>" not in page


@pytest.mark.slow
def test_moved_targets_and_labels_are_called_what_they_are(tiny: Make, tmp_path: Path) -> None:
    ahead = [
        "designer=targets",
        "value.direction=lookahead",
        "value.lookahead.steps=2",
        "value.lookahead.contrast=true",
        "objective.ibot.weight=1",
    ]
    value, noise, tuned, plain = configs = [
        tiny(*given) for given in (ahead, ["designer=random_targets"], ["method=finetune"], ["method=baseline"])
    ]
    arms = arms_of_runs({tmp_path / str(place): config for place, config in enumerate(configs)})
    assert list(arms) == ["value", "random_targets", "finetune", "baseline"]
    assert headings([tuned])["loss"] == "Loss on the labels"
    assert headings([plain]) == {"loss": "Self-supervised loss"}
    assert headings([noise]) == {"loss": "Self-supervised loss, moved targets"}
    assert headings([tuned, value])["loss"] == "The learner's loss, each arm's own"
    page = html.unescape(report_runs([train(value, quiet=True)], tmp_path / "page.html").read_text())
    for title in (
        "Self-supervised loss, moved targets over",
        "Value V = ⟨u, g_pre⟩",
        "cosine of u and g_pre",
        "⟨u, g_pre⟩ with plain targets",
        "⟨u, g_pre⟩ with moved targets",
        "⟨u, g_pre⟩ at best, of any targets",
        "KL of moved targets, DINO (nats)",
        "KL of moved targets, iBOT (nats)",
        "What the student is asked for",
    ):
        assert title in page
    shown = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    expected = {"designer.kl": "0.2", "designer.strength": "2.0", "value.lookahead.steps": "2"}
    expected |= {
        "value.lookahead.lr": "0.001",
        "value.lookahead.optimizer": "adamw",
        "value.lookahead.contrast": "True",
    }
    assert expected.items() <= shown.items()
    assert "keep ratio" not in shown


def test_efficiency_is_of_what_every_arm_has_measured(tiny: Make, tmp_path: Path) -> None:
    found = [
        train(tiny(f"method={method}", f"out={tmp_path / method}", "health.every=2", "health.images=8"), quiet=True)
        for method in ("value", "baseline")
    ]
    page = report_runs(found, tmp_path / "page.html").read_text()
    assert "What was reached with how much" in page
    assert "RankMe" in page
    assert "Of baseline&#x27;s last value: value" in page


def test_three_runs_have_a_pareto_front(runs: list[Path], tmp_path: Path) -> None:
    third = tmp_path / "again"
    shutil.copytree(runs[1], third)
    write_text(third / "config.yaml", (third / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
    for number, run in enumerate((*runs, third)):
        (run / "results" / "depth").mkdir()
        score = {"evaluation": "depth", "rmse": 1.0 + number / 10}
        write_json(run / "results" / "depth" / "results.json", score)
    assert "Pareto front" not in report_runs(runs, tmp_path / "two.html").read_text()
    page = report_runs([*runs, third], tmp_path / "three.html").read_text()
    assert "Pareto front" in page
    sweep = tmp_path / "sweep"
    (sweep / "trials").mkdir(parents=True)
    for number, run in enumerate((*runs, third)):
        shutil.move(run, sweep / "trials" / f"{number:04d}")
    page = report_runs([sweep], tmp_path / "sweep.html").read_text()
    assert "On the front: trials/0000" in page
    assert "Run 0000" in page  # the only trial on the front


@pytest.mark.parametrize("alone", [True, False])
def test_a_front_that_holds_the_untouched_start(runs: list[Path], tmp_path: Path, tiny: Make, alone: bool) -> None:
    """As a sweep writes it: settings and weights, no step, no row. It is no baseline, and not all there is to show."""
    sweep = tmp_path / "sweep"
    (sweep / "trials").mkdir(parents=True)
    start = Trainer(tiny(f"out={sweep / 'step0'}", "method=baseline"))
    prepare_folder(start.config, sweep / "step0")
    save_backbone(sweep / "step0" / "backbone.safetensors", start.teacher.backbone, {"step": "0"})
    for number, run in enumerate(runs):
        shutil.move(run, sweep / "trials" / f"{number:04d}")
    scores = {"step0": (0.5, 1.0), "trials/0000": (0.25, 2.0 if alone else 0.5), "trials/0001": (0.125, 2.5)}
    for name, (miou, rmse) in scores.items():
        for evaluation, score in (("seg", {"miou": miou}), ("depth", {"rmse": rmse})):
            path = sweep / name / "results" / evaluation / "results.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"evaluation": evaluation, **score})
    page = report_runs([sweep], tmp_path / "sweep.html").read_text()
    assert ("No trained run of" in page) == alone
    assert "step 0" in page
    assert "50.00" in page
    assert ("12.50" in page) == alone  # the baseline, behind the front
    assert "Training curves" in page
    shutil.rmtree(sweep / "trials")
    page = report_runs([sweep / "step0"], tmp_path / "start.html").read_text()
    assert "methods: step0" in page
    assert "Patch features" in page


@pytest.mark.parametrize(
    "other",
    [
        ["backbone.kwargs.patch_size=4"],
        ["views.global_size=24"],
        ["views.global_size=24", "backbone.kwargs.patch_size=12", "views.local_size=12", "feedback.size=24"],
    ],
)
def test_runs_of_different_grids_have_a_page(runs: list[Path], tiny: Make, tmp_path: Path, other: list[str]) -> None:
    run = train(tiny(*other, f"out={tmp_path / 'other'}", "seed=3"), quiet=True)
    for given in ([*runs, run], [run, *runs]):
        page = report_runs(given, tmp_path / "page.html").read_text()
        for title in ("What the student sees", "Masks across training", "Patch features"):
            assert title in page
            larger = f"{title}, " in page
            assert larger == ("views.global_size=24" in other and title != "Patch features")
        assert "Left out" not in page
        pictures = {path.name for path in (tmp_path / "page_figures").glob("masks*.png")}
        assert {name.split("-", 1)[1] for name in pictures} == {"value.png", "other.png"}


def test_what_cannot_be_drawn_is_left_out_and_said(runs: list[Path], data: Path, tmp_path: Path) -> None:
    """Data gone, weights gone, weights and a checkpoint damaged: the rest of the page stays."""

    def page() -> str:
        return report_runs(runs, tmp_path / "page.html").read_text()

    assert "Left out" not in page()
    (runs[0] / "checkpoints" / "step_00000002.pt").write_bytes(b"torn")
    found = page()
    assert found.count("Left out: masks of value.") == 1
    assert "What the student sees" in found
    assert "Masks across training" not in found
    weights = runs[0] / "backbone.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    found = page()
    assert "Left out: features of value." in found
    assert "Patch features" in found  # of the other
    shutil.move(data / "images", data / "elsewhere")
    found = page()
    assert "What the student sees" not in found
    assert "no such folder of images" in found
    shutil.move(data / "ade", data / "away")
    shutil.move(data / "nyu", data / "gone")
    found = page()
    assert "Left out: masks and features." in found
    for title in ("Training curves", "Results", "What it cost"):
        assert title in found
    assert "Patch features" not in found


def test_a_damaged_held_out_image_is_passed_over_where_training_skips(tiny: Make, data: Path, tmp_path: Path) -> None:
    bad = sorted((data / "ade" / "images" / "validation").iterdir())[0]
    bad.write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be read as an image"):
        held_out_images(config_of(tiny, data))
    images = held_out_images(config_of(tiny, data, "data.skip_unreadable=true"))
    assert images is not None
    assert len(images) == 1


def test_a_language_run_has_a_page(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    write_tiny_model(tmp_path / "model", width=16, layers=3, heads=2)
    write_problems(tmp_path / "stream.jsonl", 60, 0, "stream", 0.6, 0.1)
    write_problems(tmp_path / "feedback.jsonl", 16, 0, "feedback")
    write_text(tmp_path / "tiny.yaml", LANGUAGE.replace("ROOT", str(tmp_path)))
    found = []
    for method in ("value", "baseline"):
        config = load_language_config(tmp_path / "tiny.yaml", [f"method={method}", f"out={tmp_path / method}"])
        run = train_language(config, quiet=True)
        (run / "results").mkdir()
        score = {"mean": 1.5, "low": 1.25, "high": 1.75, "number": 8}
        write_json(run / "results" / "gsm8k_test.json", {"asked": {}, "metrics": {"answer_loss": score}})
        found.append(run)
    page = report_runs(found, tmp_path / "page.html").read_text()
    for text in ("next-token prediction", "answer loss", "1.5000", "tokens a second", "held loss", "against tokens"):
        assert text in page


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_how_far_targets_moved_is_drawn(tiny: Make, tmp_path: Path) -> None:
    settings = ["designer=targets", "value.direction=lookahead", "value.lookahead.steps=3", "views.local_count=0"]
    run = train(tiny(*settings, "objective.ibot.weight=1", "objective.ibot.mask_probability=1.0"), quiet=True)
    page = report_runs([run], tmp_path / "page.html").read_text()
    assert "What the student is asked for" in page
    plain = train(tiny(*settings, f"out={tmp_path / 'plain'}"), quiet=True)  # no patch has a target of its own
    assert "What the student is asked for" not in report_runs([plain], tmp_path / "plain.html").read_text()
