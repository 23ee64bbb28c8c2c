"""Blocks run otherwise than timm runs them: the same function, and the work that is left out is left out."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import dino_value.models.attention as attention
from dino_value.errors import UserError
from dino_value.models.backbone import Backbone, create_backbone
from dino_value.models.blocks import unknown

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
KNOWN = {
    "plain": ("vit_tiny_patch16_224", {}),
    "layerscale": ("vit_tiny_patch16_224", {"init_values": 0.3}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3-qkvb": ("vit_small_patch16_dinov3_qkvb", {}),
    "mixed-rope": ("vit_small_patch16_rope_mixed_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
}
known = pytest.mark.parametrize("build", KNOWN)


def make(build: str, **kwargs: Any) -> Backbone:
    torch.manual_seed(0)
    name, extra = KNOWN[build]
    backbone = create_backbone(name, 16, {**TINY, **extra, **kwargs})
    with torch.no_grad():  # biases, scales and norms that start as constants would hide a mistake
        for value in backbone.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return backbone.double()


def crops(requires_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((4, 3, 24, 16), (6, 3, 8, 8))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [images.requires_grad_(requires_grad) for images in drawn]


def probe_loss(outputs: list[Tensor]) -> Tensor:
    """A scalar to which every entry matters, and not linearly."""
    return torch.stack([(output * torch.linspace(-1, 1, output.shape[-1])).tanh().sum() for output in outputs]).sum()


def gradients(
    backbone: Backbone, outputs: list[Tensor], images: list[Tensor], retain_graph: bool = False
) -> list[Tensor]:
    leaves = [*images, *backbone.parameters()]
    return list(torch.autograd.grad(probe_loss(outputs), leaves, retain_graph=retain_graph, materialize_grads=True))


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@known
@pytest.mark.parametrize("kind", ["sdpa", "math", "varlen"])
def test_the_class_token_alone_has_the_values_and_gradients_of_the_whole_block(build: str, kind: str) -> None:
    backbone, images = make(build), crops(requires_grad=True)
    assert unknown(backbone.model.blocks[-1]) is None
    whole = [backbone(part).cls for part in images]
    backbone.set_attention(kind)
    alone = backbone(images, cls_only=True)
    same(alone, whole)
    same(gradients(backbone, alone, images), gradients(backbone, whole, images))


@known
@pytest.mark.parametrize("fused", [True, False])
def test_the_class_token_alone_can_be_differentiated_twice(build: str, fused: bool) -> None:
    backbone, images = make(build), crops(requires_grad=True)
    backbone.set_attention("sdpa" if fused else "math")
    parameters = [value for value in backbone.model.blocks[-1].parameters() if value.requires_grad]

    def second(outputs: list[Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(probe_loss(outputs), parameters, create_graph=True, materialize_grads=True)
        return list(torch.autograd.grad(sum(part.square().sum() for part in first), images))

    with sdpa_kernel(SDPBackend.MATH):
        same(second(backbone(images, cls_only=True)), second([backbone(part).cls for part in images]))


@known
def test_the_class_token_alone_after_a_cut_with_other_weights_and_in_bfloat16(build: str) -> None:
    backbone, images = make(build).eval(), crops()
    moved = {name: value + 0.01 for name, value in backbone.named_parameters()}
    for start in (None, 1, 2):
        state = images[0] if start is None else backbone(images[0], stop=start)
        span = {"start": start or 0}
        whole = functional_call(backbone, moved, (state,), span).cls
        same(functional_call(backbone, moved, (state,), {**span, "cls_only": True}), whole)
    backbone.float()
    with torch.autocast("cpu", torch.bfloat16):
        alone, whole = backbone(images[0].float(), cls_only=True), backbone(images[0].float()).cls
    assert alone.dtype == whole.dtype
    torch.testing.assert_close(alone, whole, rtol=0.1, atol=0.1)


def test_the_last_block_works_on_one_token_an_image() -> None:
    backbone, rows = make("plain"), []
    for block in backbone.model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[:-1].numel()))
    backbone(torch.randn(4, 3, 24, 16).double(), cls_only=True)
    assert rows == [4 * 7, 4]


@pytest.mark.parametrize("kind", ["sdpa", "varlen"])
def test_checkpointed_blocks_have_the_same_gradients(kind: str) -> None:
    backbone, images = dropping(0.5), crops(requires_grad=True)
    backbone.set_attention(kind)

    def outcome() -> list[Tensor]:
        torch.manual_seed(0)
        outputs = backbone(images, cls_only=True)
        return gradients(backbone, outputs, images)

    wanted = outcome()
    backbone.model.set_grad_checkpointing()
    same(outcome(), wanted)


class Shifted(nn.Linear):
    """A projection that is not the weight's alone, as an adapter's is not."""

    def forward(self, given: Tensor) -> Tensor:
        return super().forward(given) + 1


def wrapped(backbone: Backbone) -> None:
    qkv = backbone.model.blocks[-1].attn.qkv
    other = Shifted(qkv.in_features, qkv.out_features).double()
    other.load_state_dict(qkv.state_dict())
    backbone.model.blocks[-1].attn.qkv = other


def hooked(backbone: Backbone) -> None:
    backbone.model.blocks[-1].attn.register_forward_hook(lambda _, given, output: output * 2)


@pytest.mark.parametrize("change", [wrapped, hooked])
def test_a_block_that_is_not_known_runs_whole(change: Any) -> None:
    backbone, images = make("plain"), crops()
    change(backbone)
    same(backbone(images[0], cls_only=True), backbone(images[0]).cls)
    with pytest.raises(UserError, match=r"backbone.drop_path_mode=subset cannot run .*: its|it has hooks"):
        backbone.set_drop_path("subset")
    with pytest.raises(UserError, match=r"backbone.attention=varlen cannot run this model: .*choose"):
        backbone.set_attention("varlen")


@pytest.mark.parametrize(
    "name", ["vit_base_patch32_plus_256", "vit_small_patch16_36x1_224", "vit_small_patch16_18x2_224"]
)
def test_other_architectures(name: str) -> None:
    backbone = create_backbone(name, 16, TINY).double().eval()
    images = crops()
    same(backbone(images, cls_only=True), [backbone(part).cls for part in images])


def test_a_model_without_a_class_token_is_described_by_its_patches() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", 16, {**TINY, "class_token": False, "global_pool": "avg"})
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(backbone(images, cls_only=True), backbone(images).cls)


@known
def test_crops_of_two_sizes_packed_are_as_one_by_one(build: str) -> None:
    backbone, images = make(build), crops(requires_grad=True)
    apart = [backbone(part) for part in images]
    backbone.set_attention("varlen")
    packed = backbone(images)
    for name in ("cls", "patches"):
        found, wanted = ([getattr(part, name) for part in outputs] for outputs in (packed, apart))
        same(found, wanted)
        same(gradients(backbone, found, images, True), gradients(backbone, wanted, images, True))
    assert [part.grid for part in packed] == [(3, 2), (1, 1)]
    onward = backbone(backbone(images, stop=1), start=1)
    same([part.cls for part in onward], [part.cls for part in apart])


def test_packed_crops_share_the_projections_and_not_the_attention() -> None:
    backbone, rows = make("plain"), []
    backbone.model.blocks[0].mlp.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    backbone.set_attention("varlen")
    images = crops()
    before = backbone(images)
    assert rows == [4 * 7 + 6 * 2]
    images[1] = torch.zeros_like(images[1])
    after = backbone(images)
    same(after[0].cls, before[0].cls)
    assert not torch.allclose(after[1].cls, before[1].cls)


def drawn(queries: int | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((3, 2, 7, 4), (5, 2, 3, 4))
    triples = [tuple(torch.randn(s, generator=generator, dtype=torch.float64) for _ in range(3)) for s in shapes]
    return [(q[:, :, :queries], k, v) for q, k, v in triples]


@pytest.mark.parametrize("kind", ["sdpa", "math", "varlen"])
@pytest.mark.parametrize("queries", [None, 1])
def test_each_backend_is_attention_under_a_block_diagonal_mask(kind: str, queries: int | None) -> None:
    triples = drawn(queries)
    q, k, v = (torch.cat([part[i].transpose(1, 2).flatten(0, 1) for part in triples]) for i in range(3))
    owner_q, owner_k = (
        torch.cat([torch.arange(len(t[i])).repeat_interleave(t[i].shape[2]) + 100 * n for n, t in enumerate(triples)])
        for i in (0, 1)
    )
    mask = owner_q[:, None] == owner_k[None]
    wanted = F.scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in (q, k, v)), attn_mask=mask)[0]
    found = attention.BACKENDS[kind](triples, 0.0)
    rows = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in found]).transpose(0, 1)
    same(rows, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["varlen", "xformers"])
def test_a_kernel_of_a_cuda_device_passes_its_probe_or_says_why(kind: str) -> None:
    fault = attention.probe(kind, torch.device("cuda"))
    if fault:
        pytest.skip(f"{kind}: {fault}")


def test_a_backend_that_does_not_run_is_refused_with_the_extra_named() -> None:
    fault = attention.probe("xformers", torch.device("cpu"))
    if fault is None:
        pytest.skip("xformers runs on this CPU")
    with pytest.raises(UserError, match=r"xformers does not run on cpu: .*dino-value\[xformers\].*attention=sdpa"):
        make("plain").set_attention("xformers")


def test_a_backend_with_wrong_values_fails_its_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(triples: Any, dropout: float) -> list[Tensor]:
        return [output * 1.01 for output in attention.sdpa(triples, dropout)]

    monkeypatch.setitem(attention.BACKENDS, "varlen", wrong)
    with pytest.raises(UserError, match=r"off from plain attention by 2\.0e-02"):
        make("plain").set_attention("varlen")


def test_auto_says_what_it_took_and_what_it_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert attention.choose("auto", cpu, bfloat16=True)[0] == "math"
    assert attention.choose("auto", cpu)[0] == "sdpa"
    faults = {"varlen": "no kernel", "xformers": "no package"}
    monkeypatch.setattr(attention, "probe", lambda kind, *_: faults.get(kind))
    chosen, said = attention.choose("auto", cuda)
    assert chosen == "sdpa"
    assert said == "attention: sdpa (not varlen: no kernel; not xformers: no package)"
    with pytest.raises(UserError, match=r"backbone.attention=flash: choose auto, sdpa, math, xformers, varlen"):
        attention.choose("flash", cpu)


# Stochastic depth that leaves out the work


def dropping(rate: float, mode: str = "subset", build: str = "layerscale") -> Backbone:
    backbone = make(build, drop_path_rate=rate).train()
    backbone.set_drop_path(mode)
    return backbone


@known
@pytest.mark.parametrize("cls_only", [False, True])
def test_without_a_rate_and_in_evaluation_a_subset_is_everything(build: str, cls_only: bool) -> None:
    images = crops()

    def outputs(backbone: Backbone) -> list[Tensor]:
        return [backbone(part, cls_only=True) if cls_only else backbone(part).patches for part in images]

    same(outputs(dropping(0.0, build=build)), outputs(dropping(0.0, "timm", build)))
    same(outputs(dropping(0.5, build=build).eval()), outputs(dropping(0.0, "timm", build)))


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("kind", ["sdpa", "varlen"])
def test_a_subset_has_the_mean_of_the_whole(kind: str, cls_only: bool) -> None:
    """One block alone: the mean of a branch of a branch is another thing, with a mask as well."""
    backbone = dropping(0.5)
    backbone.set_attention(kind)
    block, images = backbone.model.blocks[1], crops()
    block.mlp = type(block.mlp)(24, 24).double().requires_grad_(False)
    nn.init.zeros_(block.mlp.fc2.weight)  # leaves one branch: attention
    nn.init.zeros_(block.mlp.fc2.bias)
    states = backbone(images, stop=1)
    backbone.final_norm = "identity"
    backbone.model.identity = nn.Identity()

    def cls() -> Tensor:
        found = backbone(states, start=1, cls_only=True) if cls_only else backbone(states, start=1)
        return torch.cat(found if cls_only else [part.cls for part in found])

    with torch.no_grad():
        wanted = torch.cat([part.cls for part in backbone.eval()(states, start=1)])
        backbone.train()
        torch.manual_seed(3)
        draws = torch.stack([cls() for _ in range(600)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - wanted).abs() <= 5 * error + 1e-12).all()
    # Each image is either left alone or moved by twice the branch: B over the half that was chosen.
    before = torch.cat([state.tokens[:, 0] for state in states])
    share = (draws - before) / (wanted - before)
    assert ((share.abs() < 1e-6) | ((share - 2).abs() < 1e-6)).all()


@pytest.mark.parametrize("kind", ["sdpa", "varlen"])
def test_a_subset_leaves_out_the_work_and_a_mask_does_not(kind: str) -> None:
    counts = {}
    for mode in ("subset", "timm"):
        backbone, rows = dropping(0.5, mode), []
        backbone.set_attention(kind)
        backbone.model.blocks[1].mlp.register_forward_pre_hook(
            lambda _, given, rows=rows: rows.append(given[0].shape[:-1].numel())
        )
        backbone(crops())
        counts[mode] = sum(rows)
    assert counts == {"subset": 2 * 7 + 3 * 2, "timm": 4 * 7 + 6 * 2}


def test_draws_are_the_global_generators_and_gradients_follow_them() -> None:
    backbone, images = dropping(0.5), crops(requires_grad=True)

    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [backbone(part).cls for part in images]

    same(run(0), run(0))
    assert any(not torch.equal(*pair) for pair in zip(run(0), run(1), strict=True))
    leaf = images[1]
    torch.manual_seed(5)
    found = torch.autograd.grad(probe_loss([backbone(leaf).cls]), leaf)[0]
    step = torch.zeros_like(leaf)
    step[2, 1, 3, 4] = 1e-6
    losses = []
    for sign in (1, -1):
        torch.manual_seed(5)
        losses.append(probe_loss([backbone(leaf + sign * step).cls]))
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-6, found[2, 1, 3, 4], rtol=1e-5, atol=1e-8)


def test_masked_depth_on_the_class_token_alone_draws_as_timm_draws() -> None:
    backbone, images = dropping(0.5, "timm"), crops()

    def run(**how: Any) -> Any:
        torch.manual_seed(0)
        return backbone(images[0], **how)

    same(run(cls_only=True), run().cls)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UserError, match=r"backbone.drop_path_mode=half: choose timm, subset"):
        make("plain").set_drop_path("half")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (4, "views.local_size=4: not a multiple of the patch size 8 of .* smaller than one patch; choose 8 or more"),
        (20, "choose 16 or 24"),
    ],
)
def test_sizes_that_the_patch_does_not_divide(size: int, said: str) -> None:
    backbone = make("plain")
    backbone.check_size(24, "views.local_size")
    with pytest.raises(UserError, match=said):
        backbone.check_size(size, "views.local_size")


# Compiled blocks


@pytest.fixture
def compiler() -> Iterator[None]:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile on the CPU needs a C++ compiler (g++ or clang++), and none is here")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("build", ["layerscale", "dinov3"])
def test_compiled_blocks_are_the_eager_ones_and_compile_once_a_crop_size(build: str, compiler: None) -> None:
    eager = make(build).float()
    fast = copy.deepcopy(eager)
    fast.compiled = True
    assert list(fast.state_dict()) == list(eager.state_dict())
    images = [part.detach().float().requires_grad_() for part in crops()]

    def outcome(backbone: Backbone, given: list[Tensor]) -> list[Tensor]:
        outputs = backbone(given, cls_only=True)
        return [*outputs, *gradients(backbone, outputs, given)]

    torch.testing.assert_close(outcome(fast, images), outcome(eager, images), rtol=1e-3, atol=1e-4)
    seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert seen <= 4  # two crop sizes, and of each the last block apart
    more = [part.detach().repeat(2, 1, 1, 1).requires_grad_() for part in images]
    torch.testing.assert_close(outcome(fast, more), outcome(eager, more), rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == seen  # another batch size is no other graph
    with sdpa_kernel(SDPBackend.MATH):  # to differentiate twice, eager
        first = torch.autograd.grad(probe_loss(fast(images, cls_only=True)), images, create_graph=True)
        torch.autograd.grad(sum(part.square().sum() for part in first), images)
