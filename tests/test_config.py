"""The typed configuration: what it takes, and what it says about what it does not take."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dino_value.config import CHOICES, LARGEST, MASKS, TRACKERS, Config, load_config, save_config
from dino_value.designers import DESIGNERS
from dino_value.errors import UserError
from dino_value.heads import HEADS
from dino_value.models.backbone import create_backbone
from dino_value.runs import trackers
from dino_value.training.methods import METHODS
from dino_value.training.steps import OBJECTIVES
from dino_value.value import COMBINATIONS, DIRECTIONS, ENGINES, LOOKAHEAD_OPTIMIZERS, targets


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("out: runs/a\nmethod: baseline\ndata: {unlabeled: images}\noptim: {lr: 1.0e-4}\n")
    return path


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_file_then_overrides(file: Path) -> None:
    config = load_config(file, ["optim.lr=3e-4", "steps=7", "backbone.kwargs.depth=2", "views.blur_sigma=[0.1,0.5]"])
    assert isinstance(config, Config)
    assert (config.optim.lr, config.steps, config.method) == (3e-4, 7, "baseline")
    assert config.backbone.kwargs == {"depth": 2}
    assert tuple(config.views.blur_sigma) == (0.1, 0.5)
    assert config.optim.weight_decay == 0.04  # a default


def test_what_is_saved_loads_as_the_same(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["value.scope.patterns=[a,b]", "backbone.kwargs={depth: 3}", "data.ade20k=x"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("optm.lr=1", "optim?"),
        ("optim.learning_rate=1", "optim."),
        ("stpes=3", "steps"),
        ("designer.keep_ration=0.4", "designer.keep_ratio"),
        ("value.scope.block=2", "value.scope.blocks"),
        ("feedback.seg.wieght=2", "feedback.seg.weight"),
        ("data.unlabelled=x", "data.unlabeled"),
        ("feedback.class=x", "feedback.classes?"),
        ("designer.KL=0.1", "designer.kl?"),
        ("Steps=3", "steps?"),
    ],
)
def test_an_unknown_key_names_the_nearest(file: Path, typo: str, nearest: str) -> None:
    message = refusal(file, typo)
    assert f"unknown configuration key {typo.split('=')[0].split('.lr')[0]}" in message
    assert f"did you mean {nearest}" in message


def test_an_unknown_key_in_the_file(file: Path) -> None:
    file.write_text("out: a\noptim:\n  lr: 1.0e-4\n  batchsize: 4\n")
    assert "did you mean optim.batch_size?" in refusal(file)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps=many", "steps"),
        ("optim.lr=fast", "optim.lr"),
        ("optim=3", "optim: expected a section"),
        ("views.global_scale=[1,2,3]", "views.global_scale=[1, 2, 3]: expected 2 numbers"),
        ("steps", "write key=value"),
        ("steps=0", "steps=0: must be at least 1"),
        ("optim.batch_size=1", "optim.batch_size=1: must be at least 2"),
        ("value.batch_size=1", "value.batch_size=1: must be at least 2"),
        ("feedback.batch_size=1", "feedback.batch_size=1: must be at least 2"),
        ("designer.keep_ratio=1", "designer.keep_ratio=1"),
        ("objective.teacher_temp=0.2", "would not sharpen; DINO uses 0.04 and 0.1"),
        ("objective.teacher_temp=0.1", "would not sharpen"),
        (
            "objective={teacher_temp_start: 0.2, teacher_temp_warmup: 2}",
            "objective.teacher_temp_start=0.2 is not below",
        ),
        ("method=values", "choose value, baseline, random"),
        ("method=value", "needs labels: give data.ade20k=PATH"),
        ("method=random", "needs labels"),
        ("views.blur_sigma=[", "not valid YAML"),
    ],
)
def test_bad_values(file: Path, override: str, said: str) -> None:
    assert said in refusal(file, override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=-1", "at least 0"),
        ("designer.stride=0", "at least 1"),
        ("designer.depth=-1", "at least 0"),
        ("designer.width=0", "at least 1"),
        ("designer.lr=-1", "at least 0"),
        ("designer.blur_sigma=0", "above 0: it is the blur's width in pixels"),
        ("optim.lr=-1", "at least 0"),
        ("optim.lr=nan", "must be finite"),
        ("optim.lr_end=-1e-6", "at least 0"),
        ("optim.clip=0", "above 0"),
        ("optim.warmup=-1", "at least 0"),
        ("optim.weight_decay=-0.1", "at least 0"),
        ("optim.weight_decay_end=-0.1", "at least 0"),
        ("optim.freeze_backbone=-1", "at least 0"),
        ("objective.teacher_temp=0", "above 0: logits are divided by it"),
        ("objective.student_temp=0", "above 0: logits are divided by it"),
        ("objective.teacher_temp_start=0", "above 0"),
        ("objective.teacher_temp_warmup=-1", "at least 0"),
        ("objective.freeze_last_layer=-1", "at least 0"),
        ("objective.teacher_momentum=1.1", "lie in [0, 1]"),
        ("objective.center_momentum=-0.1", "lie in [0, 1]"),
        ("objective.out_dim=0", "at least 1"),
        ("value.radius=0", "above 0"),
        ("value.burn_in=-1", "at least 0"),
        ("value.warmup=-1", "at least 0"),
        ("views.global_size=0", "at least 1"),
        ("views.local_size=0", "at least 1"),
        ("views.global_scale=[0.5,0.4]", "0 < low <= high <= 1"),
        ("views.local_scale=[0,0.4]", "0 < low <= high <= 1"),
        ("views.local_scale=[0.1,1.5]", "0 < low <= high <= 1"),
        ("views.blur_sigma=[2,1]", "0 < low <= high"),
        ("views.blur_sigma=[0.1,.inf]", "must be finite"),
        ("views.jitter=2", "lie in [0, 1]"),
        ("views.flip=1.5", "lie in [0, 1]"),
        ("views.grayscale=-0.1", "lie in [0, 1]"),
        ("views.solarize=1.1", "lie in [0, 1]"),
        ("views.blur=[1,1,2]", "lie in [0, 1]"),
        ("views.hue=0.6", "lie in [0, 0.5]"),
        ("views.contrast=-1", "at least 0"),
        ("backbone.min_match=90", "lie in [0, 1]"),
        ("feedback.lr=-1", "at least 0"),
        ("feedback.warmup=-1", "at least 0"),
        ("feedback.size=0", "at least 1"),
        ("feedback.seg.train=0", "at least 1"),
        ("feedback.depth.meta=0", "at least 1"),
        ("feedback.depth.weight=-1", "at least 0"),
        ("feedback.seg.weight=inf", "must be finite"),
    ],
)
def test_numbers_out_of_range(file: Path, override: str, said: str) -> None:
    message = refusal(file, override)
    assert message.startswith(f"{override.partition('=')[0]}=")
    assert said in message


@pytest.mark.parametrize("width", [1, 6, 66, 100])
def test_a_transformer_designer_refuses_an_odd_width(file: Path, width: int) -> None:
    assert f"designer.width={width}: designer.name=sit" in refusal(file, "designer.name=sit", f"designer.width={width}")
    assert load_config(file, [f"designer.width={width}"]).designer.width == width


@pytest.mark.parametrize("width", [4, 36, 64, 96])
def test_the_widths_that_pass_can_be_built(file: Path, width: int) -> None:
    load_config(file, ["designer.name=sit", f"designer.width={width}"])
    masks = DESIGNERS["sit"](width=width, depth=1, stride=8, keep_ratio=0.5)(torch.zeros(1, 3, 16, 16))
    assert masks.shape == (1, 1, 16, 16)


def test_a_plain_teacher_passes_no_gradient_on(file: Path) -> None:
    message = refusal(file, "designer.through_teacher=true", "designer.teacher_views=plain")
    assert "choose designer.teacher_views=masked or designer.through_teacher=false" in message


@pytest.mark.parametrize(
    "override",
    [
        "designer.lr=0",
        "optim.clip=.inf",
        "views.global_scale=[1,1]",
        "objective.teacher_momentum=1",
        "designer.depth=0",
    ],
)
def test_numbers_at_the_edge(file: Path, override: str) -> None:
    load_config(file, [override])


def test_a_missing_value_is_named(file: Path) -> None:
    file.write_text("method: baseline\ndata: {unlabeled: images}\n")
    assert "out" in refusal(file)
    file.write_text("method: baseline\nout: a\n")
    assert "data.unlabeled" in refusal(file)


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_is_checked(file: Path, key: str) -> None:
    assert f"{key}=nonsense: choose {', '.join(CHOICES[key])}" in refusal(file, f"{key}=nonsense")


def test_choices_are_the_registries() -> None:
    assert set(MASKS) == set(DESIGNERS)
    assert set(CHOICES["value.engine"]) - {"auto"} == set(ENGINES) - {"linear"}
    assert set(CHOICES["value.direction"]) == {*DIRECTIONS, "adam", "lookahead"}
    assert set(CHOICES["value.combine"]) == set(COMBINATIONS)
    assert set(CHOICES["value.lookahead.optimizer"]) == set(LOOKAHEAD_OPTIMIZERS)
    assert set(CHOICES["objective.name"]) == set(OBJECTIVES)
    assert set(CHOICES["method"]) == set(METHODS)
    assert set(TRACKERS) == set(trackers.TRACKERS)
    assert targets.LARGEST == LARGEST
    for kind in ("seg", "depth", "classes"):
        assert {f"{kind}_{name}" for name in CHOICES[f"feedback.{kind}.head"]} == {
            name for name in HEADS if name.startswith(kind)
        }


def test_no_such_file_lists_the_packaged_ones() -> None:
    with pytest.raises(UserError, match=r"no such configuration file; packaged ones: .*quickstart/arm"):
        load_config("no/such")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "out: a\n\tmethod: b\n"])
def test_files_that_are_not_configurations(file: Path, text: str) -> None:
    file.write_text(text)
    assert str(file) in refusal(file)


def packaged() -> list[str]:
    root = Path(str(resources.files("dino_value.configs")))
    found = sorted(path.relative_to(root).with_suffix("") for path in root.rglob("*.yaml"))
    other = ("compare", "sweeps", "language")  # of other schemas, tried elsewhere
    return [str(path) for path in found if path.parts[0] not in other]


@pytest.mark.parametrize("name", packaged())
def test_packaged_configurations_load(name: str) -> None:
    config = load_config(name, ["out=a", "data.unlabeled=b", "data.ade20k=c", "data.nyuv2=d"])
    assert config.steps >= 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ade20k_vitb", (4.15e-6, 256, 4, 32, 2, "unet", 1.54e-4, 0.6, 0.131, 0.144, 1, 8)),
        ("ade20k_vitl", (4.50e-5, 50, 4, 16, 4, "unet", 2.17e-4, 0.5, 0.196, 0.0399, 4, 1)),
        ("nyuv2_vitb", (8.58e-6, 256, 8, 64, 3, "sit", 2.21e-4, 0.4, 0.111, 0.0417, 16, 2)),
        ("nyuv2_vitl", (1.94e-6, 50, 2, 32, 4, "unet", 8.03e-4, 0.4, 0.401, 0.159, 32, 16)),
    ],
)
def test_the_papers_selected_settings(name: str, expected: tuple[object, ...]) -> None:
    c = load_config(f"paper/{name}", ["out=a", "data.unlabeled=b", "data.ade20k=c", "data.nyuv2=d"])
    found = (
        *(c.optim.lr, c.optim.batch_size, c.value.period, c.value.batch_size, c.value.scope.blocks),
        *(c.designer.name, c.designer.lr, c.designer.keep_ratio, c.designer.lambda_spars, c.designer.lambda_tv),
        *(c.feedback.seg.weight, c.feedback.depth.weight),
    )
    assert found == expected
    assert (c.steps, c.optim.warmup, c.optim.clip, c.optim.weight_decay) == (20_000, 1000, 1.0, 0.04)
    assert (c.objective.out_dim, c.objective.student_temp, c.objective.teacher_temp) == (8192, 0.1, 0.04)
    assert (c.objective.center_momentum, c.objective.teacher_momentum) == (0.9, 0.996)
    assert (c.feedback.seg.train, c.feedback.seg.meta) == (2000, 512)
    assert (c.feedback.depth.train, c.feedback.depth.meta) == (512, 128)


def test_every_default_is_a_value_that_yaml_holds() -> None:
    """Nothing in the resolved configuration needs Python to be read."""
    config = Config(out="a")
    config.data.unlabeled = "b"
    assert OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config))).out == "a"


@pytest.mark.parametrize("nothing", ["{}", "null"])
def test_an_empty_mapping_takes_the_place_of_what_was_there(nothing: str, file: Path) -> None:
    given = ["out=a", "data.unlabeled=b", "method=baseline"]
    assert load_config("rooms/cpu", given).backbone.kwargs["patch_size"] == 12
    assert load_config("rooms/cpu", [*given, f"backbone.kwargs={nothing}"]).backbone.kwargs == {}
    later = load_config("rooms/cpu", [*given, f"backbone.kwargs={nothing}", "backbone.kwargs.depth=2"])
    assert later.backbone.kwargs == {"depth": 2}
    small = ["backbone.name=vit_small_patch16_224", f"backbone={{kwargs: {nothing}}}"]
    b = load_config("rooms/cpu", [*given, *small]).backbone
    assert create_backbone(b.name, 96, b.kwargs).embed_dim == 384
    file.write_text(f"out: a\nmethod: baseline\ndata: {{unlabeled: b}}\nbackbone: {{kwargs: {nothing}}}\n")
    assert load_config(file).backbone.kwargs == {}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps=1.5", "steps=1.5: expected a whole number"),
        ("steps=null", "steps=null: expected a whole number"),
        ("optim.lr=fast", "optim.lr=fast: expected a number"),
        ("data.in_memory=perhaps", "data.in_memory=perhaps: expected true or false"),
        ("out=[1]", "out=[1]: expected text"),
        ("data.ade20k={a: 1}", "expected text, or null"),
        ("views.blur=[a,b,c]", "views.blur=['a', 'b', 'c']: expected 3 numbers"),
        ("views.blur=7", "expected 3 numbers"),
        ("track.to={a: 1}", "track.to={'a': 1}: expected a list"),
        ("backbone.kwargs=[1]", "backbone.kwargs=[1]: expected keys and values"),
        ("optim.lr=${x.y}", "optim.lr=${x.y}: refers to what is not there"),
        ("optim.lr=${", "mend its brackets"),
    ],
)
def test_no_sentence_of_omegaconf(file: Path, override: str, said: str) -> None:
    message = refusal(file, override)
    assert said in message
    with pytest.raises(UserError, match=r"rooms/cpu: data\.unlabeled is not set: give data\.unlabeled=VALUE"):
        load_config("rooms/cpu", ["out=a"])
    for theirs in ("full_key", "object_type", "Config'", "mandatory", "Interpolation", "could not be converted"):
        assert theirs not in message


def test_a_refusal_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from dino_value.cli import main; code = main(['train', 'rooms/cpu', 'stepz=1']); "
        "sys.exit(code if 'torch' not in sys.modules else 99)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 2, found.stderr
    assert "did you mean steps?" in found.stderr
