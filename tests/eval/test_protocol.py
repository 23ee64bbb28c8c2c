"""The published protocols as defaults, how a frozen backbone is run, and what the help says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dino_value.eval import EVALUATIONS, command, common, features, linear, seg
from dino_value.eval.base import use_bfloat16
from dino_value.models.backbone import Backbone, create_backbone

LINEAR = linear.LinearOptions(size=(32, 32), device="cpu")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_backbone(
            "vit_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
        )


def test_defaults_are_the_published_protocols() -> None:
    """What is written of the paper's evaluation, and of the sets' own; a number here changes with a reason only."""
    dense = {"steps": 20_000, "batch": 8, "weight_decay": 0.05, "clip": 1.0, "augment": False, "head": "linear"}
    wanted = {
        "seg": {**dense, "size": (512, 512), "lr": 5e-4, "inference": "slide", "stride": 0, "scales": (1.0,)},
        "depth": {**dense, "size": (480, 640), "lr": 1e-3, "min_depth": 1e-3, "max_depth": 10.0, "eigen_crop": True},
        "linear": {"steps": 20_000, "size": (224, 224), "pool": "cls", "finetune_blocks": 0, "clip": 1.0},
        "knn": {"size": (224, 224), "ks": (10, 20, 100, 200), "temperature": 0.07, "pool": "cls"},
        "retrieval": {"size": (224, 224), "pool": "mean"},
    }
    for name, values in wanted.items():
        defaults = command.evaluation(name).defaults
        assert {key: getattr(defaults, key) for key in values} == values
        assert use_bfloat16(defaults.bf16, torch.device("cuda"))
        assert not use_bfloat16(defaults.bf16, torch.device("cpu"))
        arguments = command.build_parser(command.evaluation(name)).parse_args(["weights", "--data=d", "--out=o"])
        options = replace(defaults, **{key: getattr(arguments, key) for key in values if key in vars(arguments)})
        assert replace(options, size=defaults.size) == defaults


def test_warm_up_is_a_twentieth() -> None:
    """1,000 of the protocol's 20,000 steps; here 2 of 40."""
    head = torch.nn.Linear(1, 1, bias=False)
    rates: list[float] = []

    class Recorded(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])

    options = common.HeadOptions(size=(1, 1), steps=40, lr=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Recorded)
        batches = [(torch.ones(1, 1), torch.ones(1, 1))] * 40
        common.fit_head(head, torch.nn.functional.mse_loss, batches, options)
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[21] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.0017, abs=1e-4)


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_cpu_takes_a_few_images_at_once(
    backbone: Backbone, blocks: int, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    images = torch.randint(0, 256, (5, 3, 32, 48), dtype=torch.uint8, generator=generator)
    extractor = common.FrozenBackbone(backbone, seg.read_map, replace(LINEAR, blocks=blocks))
    at_once = extractor(images)
    monkeypatch.setattr(features, "TOKENS", 49 / torch.get_num_threads())  # of 24 an image
    assert extractor.most(images) == 2
    assert at_once.shape == (5, 24 * blocks, 4, 6)
    torch.testing.assert_close(extractor(images), at_once)


def test_bfloat16_on_a_cpu_is_asked_for(backbone: Backbone) -> None:
    """Close to float32 and not the same; the default stays float32."""
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact, default, lowered = (
        common.FrozenBackbone(backbone, linear.POOLS["cls"], replace(LINEAR, bf16=bf16))(images)
        for bf16 in (False, None, True)
    )
    assert torch.equal(exact, default)
    assert lowered.dtype == torch.float32
    assert not torch.equal(exact, lowered)
    torch.testing.assert_close(exact, lowered, rtol=0.1, atol=0.1)


def test_help_says_what_each_is_and_where_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in (*EVALUATIONS, "all"))
    assert "For a first look on a CPU: --size 96" in text
    with pytest.raises(SystemExit):
        command.main(["depth", "--help"])
    assert "folder of nyu_depth_v2_labeled.mat and splits.mat" in " ".join(capsys.readouterr().out.split())
