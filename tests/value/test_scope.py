"""Which parameters the value is measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dino_value.backbones import Backbone, create_backbone
from dino_value.value import last_blocks, matching


@pytest.fixture
def backbone() -> Backbone:
    return create_backbone("vit_tiny_patch16_224", 16, {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3})


def test_last_blocks_are_the_blocks_and_the_final_norm(backbone: Backbone) -> None:
    scope = last_blocks(backbone, 2)
    expected = [
        name
        for name, _ in backbone.named_parameters()
        if name.startswith(("model.blocks.2.", "model.blocks.3.", "model.norm."))
    ]
    assert list(scope.names) == expected
    assert scope.start == 2


def test_all_blocks_begin_at_the_first(backbone: Backbone) -> None:
    scope = last_blocks(backbone, 4)
    assert scope.start == 0
    assert not any("embed" in name or "cls_token" in name for name in scope.names)


def test_block_1_is_not_block_10() -> None:
    deep = nn.Module()
    deep.blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(12))
    scope = last_blocks(deep, 2)
    assert scope.names == ("blocks.10.weight", "blocks.10.bias", "blocks.11.weight", "blocks.11.bias")
    assert scope.start == 10


def test_a_norm_inside_a_block_does_not_count_as_the_final_one(backbone: Backbone) -> None:
    assert not any("blocks.0" in name or "blocks.1." in name for name in last_blocks(backbone, 2).names)


@pytest.mark.parametrize("count", [0, -1, 5])
def test_a_count_that_the_learner_does_not_have(backbone: Backbone, count: int) -> None:
    with pytest.raises(ValueError, match=rf"last {count} blocks: this learner has 4; choose 1 … 4"):
        last_blocks(backbone, count)


def test_a_module_without_blocks() -> None:
    with pytest.raises(ValueError, match="has 0"):
        last_blocks(nn.Linear(2, 2), 1)


def test_patterns(backbone: Backbone) -> None:
    scope = matching(backbone, [r"blocks\.3\.attn\.", r"blocks\.1\.mlp\.fc2\.weight"])
    assert scope.start == 1
    assert len(scope.names) == 5
    order = [name for name, _ in backbone.named_parameters()]
    assert sorted(scope.names, key=order.index) == list(scope.names)


def test_the_final_norm_does_not_widen_the_tail(backbone: Backbone) -> None:
    scope = matching(backbone, [r"blocks\.3\.", r"model\.norm\."])
    assert scope.start == 3


@pytest.mark.parametrize("pattern", [r"blocks\.3\.atn\.", r"^model\.blocks\.3\.atn\."])
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(backbone: Backbone, pattern: str) -> None:
    with pytest.raises(ValueError, match=r"matches no parameter; near names: .*blocks\.3\.attn"):
        matching(backbone, [r"blocks\.3\.mlp\.", pattern])


def test_a_pattern_that_is_no_regular_expression(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="not a regular expression"):
        matching(backbone, ["blocks.(3"])


def test_a_model_without_a_final_norm() -> None:
    plain = nn.Module()
    plain.blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    assert last_blocks(plain, 1).start == 2


def test_the_scopes_values_are_detached_and_live(backbone: Backbone) -> None:
    scope = last_blocks(backbone, 1)
    values = scope.parameters(backbone)
    assert tuple(values) == scope.names
    assert not any(value.requires_grad for value in values.values())
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1)
    live = dict(backbone.named_parameters())
    assert all(torch.equal(value, live[name]) for name, value in values.items())


def test_the_value_is_measured_on_the_scope_only(problem: Callable[..., Any]) -> None:
    """A narrower scope gives the matching part of the wider one's gradient."""
    p = problem()
    whole = dict(zip(p.theta, p.plain_gradient(), strict=True))
    p.scope = matching(p.student.backbone, [r"blocks\.2\.attn\."])
    narrow = dict(zip(p.theta, p.plain_gradient(), strict=True))
    assert set(narrow) < set(whole)
    for name, value in narrow.items():
        torch.testing.assert_close(value, whole[name])
