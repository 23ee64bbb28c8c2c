"""Which parameters the value is measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from dino_value.models.backbone import Backbone, create_backbone
from dino_value.value import last_blocks, matching
from dino_value.value.scope import everything


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


def names_of(module: nn.Module, *beginnings: str) -> tuple[str, ...]:
    return tuple(name for name, _ in module.named_parameters() if name.startswith(beginnings))


# Where the tail begins


def test_what_lies_before_the_blocks_leaves_no_trunk(backbone: Backbone) -> None:
    for pattern in ("patch_embed", "cls_token", "pos_embed"):
        assert matching(backbone, [pattern]).start is None
        assert matching(backbone, [pattern, r"blocks\.3\."]).start is None


def test_the_final_norm_alone_leaves_no_block_in_the_tail(backbone: Backbone) -> None:
    assert matching(backbone, [r"^model\.norm\."]).start == 4


def test_everything(backbone: Backbone) -> None:
    scope = everything(backbone)
    assert scope.names == tuple(name for name, _ in backbone.named_parameters())
    assert scope.start is None
    assert everything(nn.Linear(2, 2)).start is None


def test_a_norm_elsewhere_is_not_the_final_one() -> None:
    """Swin's and hybrid stems' patch embeddings have a `norm` of their own."""
    model = nn.Module()
    model.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(2)})
    model.blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    model.norm = nn.LayerNorm(2)
    assert last_blocks(model, 1).names == names_of(model, "blocks.2.", "norm.")
    assert matching(model, ["norm"]).start is None


def test_what_follows_the_blocks_is_the_callers_to_say(backbone: Backbone) -> None:
    assert matching(backbone, [r"^model\.norm\."], after=()).start is None
    assert last_blocks(backbone, 1, after=()).names == names_of(backbone, "model.blocks.3.")


def test_frozen_parameters_are_in_no_scope(backbone: Backbone) -> None:
    backbone.model.blocks[3].attn.requires_grad_(False)
    backbone.model.norm.requires_grad_(False)
    scope = last_blocks(backbone, 1)
    assert scope.names == tuple(name for name in names_of(backbone, "model.blocks.3.") if ".attn." not in name)
    assert not set(names_of(backbone, "model.norm.")) & set(everything(backbone).names)
    with pytest.raises(ValueError, match=r"model\.blocks\.3\.attn\.qkv\.weight is frozen"):
        matching(backbone, [r"blocks\.3\.attn"])
    backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="all their parameters are frozen"):
        last_blocks(backbone, 2)


# timm

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("vit_tiny_patch16_224", ("norm.",)),
        ("vit_small_patch16_dinov3", ("norm.",)),
        ("vit_base_patch16_clip_224", ("norm.",)),  # its norm_pre comes before the blocks
        ("deit_tiny_distilled_patch16_224", ("norm.",)),
        ("beit_base_patch16_224", ("fc_norm.",)),
        ("eva02_tiny_patch14_224", ("fc_norm.",)),
    ],
)
def test_timm(name: str, after: tuple[str, ...]) -> None:
    model = timm.create_model(name, **SMALL)
    scope = last_blocks(model, 2)
    assert scope.names == names_of(model, "blocks.1.", "blocks.2.", *after)
    assert len(scope.names) > 20
    assert scope.start == 1
    assert everything(model).start is None
    with_head = matching(model, [r"blocks\.2\.", *([r"^head\."] if names_of(model, "head.") else [])])
    assert with_head.start == 2


def test_the_blocks_of_a_convolutional_stem_are_not_the_blocks() -> None:
    model = timm.create_model("vit_small_r26_s32_224", img_size=64, embed_dim=24, depth=3, num_heads=3)
    assert last_blocks(model, 1).names == names_of(model, "blocks.2.", "norm.")
    assert matching(model, [r"stages\.0\.blocks\.0\.conv1"]).start is None


def test_compiled_blocks_keep_their_place() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    plain = last_blocks(model, 1)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    wrapped = last_blocks(model, 1)
    assert tuple(name.replace("_orig_mod.", "") for name in wrapped.names) == plain.names
    assert wrapped.start == plain.start == 2


# Hugging Face

TINY = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
LLAMA = {**TINY, "intermediate_size": 24, "num_key_value_heads": 1}


def causal_lm(kind: str) -> Any:
    """A randomly initialised causal LM of three layers."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, dict[str, Any]] = {
        "Llama": LLAMA,
        "Qwen2": {**LLAMA, "tie_word_embeddings": True},
        "GPT2": {"vocab_size": 13, "n_embd": 16, "n_layer": 3, "n_head": 2},
        "GPTNeoX": {**TINY, "intermediate_size": 24},
        "OPT": {**TINY, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 16},
    }
    config = getattr(transformers, f"{kind}Config")(**sizes[kind])
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("kind", "blocks", "norm", "embedding"),
    [
        ("Llama", "model.layers", "model.norm.", "embed_tokens"),
        ("Qwen2", "model.layers", "model.norm.", "embed_tokens"),
        ("GPT2", "transformer.h", "transformer.ln_f.", "wte"),
        ("GPTNeoX", "gpt_neox.layers", "gpt_neox.final_layer_norm.", "embed_in"),
        (
            "OPT",
            "model.decoder.layers",
            "model.decoder.final_layer_norm.",
            "embed_positions",
        ),  # listed before the layers
    ],
)
def test_causal_language_models(kind: str, blocks: str, norm: str, embedding: str) -> None:
    model = causal_lm(kind)
    scope = last_blocks(model, 2)
    assert scope.names == names_of(model, f"{blocks}.1.", f"{blocks}.2.", norm)
    assert any(name.startswith(norm) for name in scope.names)
    assert scope.start == 1
    assert everything(model).start is None
    assert matching(model, [embedding]).start is None
    with pytest.raises(ValueError, match="this learner has 3"):
        last_blocks(model, 4)


def test_the_head_follows_the_layers_unless_it_is_tied() -> None:
    assert matching(causal_lm("Llama"), [r"layers\.2\.", r"^lm_head\."]).start == 2
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight; name that one"):
        matching(causal_lm("Qwen2"), [r"^lm_head\."])


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(causal_lm("Llama"), peft.LoraConfig(r=2, target_modules="all-linear"))
    every = tuple(name for name, _ in model.named_parameters() if "lora_" in name)
    assert len(every) == 3 * 7 * 2  # layers, linear projections, A and B
    assert matching(model, [r"lora_"]).names == everything(model).names == every
    assert matching(model, [r"lora_"]).start == 0
    last = last_blocks(model, 2)
    assert last.names == tuple(name for name in every if ".layers.1." in name or ".layers.2." in name)
    assert last.start == 1
    assert matching(model, [r"layers\.2\..*lora_B"]).start == 2
    with pytest.raises(ValueError, match="is frozen"):
        matching(model, [r"layers\.2\.self_attn\.q_proj\.base_layer"])


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
