"""Linear layers by oneDNN: torch's function, its gradients and its second derivatives, wherever layers are used."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dino_value.models.linear as linear_module
from dino_value.config import Config
from dino_value.errors import UserError
from dino_value.models.backbone import create_backbone
from dino_value.models.blocks import unknown
from dino_value.models.linear import OneDNNLinear, choose_matmul, linear, use_onednn
from dino_value.training.trainer import Trainer

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(linear_module._probe() is not None, reason="this torch has no oneDNN")


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def outcome(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Output, gradients, and the gradients of a function of those."""
    output = function(*leaves)
    first = torch.autograd.grad(output.tanh().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(part.sin().sum() for part in first), leaves)  # type: ignore[arg-type]
    return [output, *first, *second]


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_gradients_and_second_derivatives(shape: tuple[int, ...], bias: bool) -> None:
    leaves = drawn(shape, (16, 24), (16,))[: 3 if bias else 2]
    torch.testing.assert_close(outcome(linear, leaves), outcome(F.linear, leaves), rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_contiguous() -> None:
    x, weight = drawn((24, 7), (24, 16))
    torch.testing.assert_close(linear(x.t(), weight.t()), F.linear(x.t(), weight.t()), rtol=1e-4, atol=1e-5)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that reach oneDNN."""
    seen: list[tuple[int, ...]] = []
    product = linear_module._product

    def counted(x: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return product(x, *rest)

    monkeypatch.setattr(linear_module, "_product", counted)
    return seen


def test_what_it_does_not_fit_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    x, weight = drawn((7, 24), (16, 24))
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    assert linear(x[:0], weight).shape == (0, 16)
    assert linear(x[0], weight).shape == (16,)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert not seen
    linear(x, weight)
    assert seen == [(7, 24)]


def test_constants_cost_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    x, weight = drawn((7, 24), (16, 24))
    linear(x, weight.detach()).sum().backward()
    assert len(seen) == 2  # forward, and the gradient of x
    assert x.grad is not None


def test_a_module_keeps_its_names_and_its_values() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 4, bias=False))
    fast = copy.deepcopy(plain)
    use_onednn(fast)
    assert [type(part) for part in copy.deepcopy(fast)] == [OneDNNLinear, nn.GELU, OneDNNLinear]
    assert list(fast.state_dict()) == list(plain.state_dict())
    (x,) = drawn((7, 24))
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2"])
def test_a_backbone_runs_by_it_in_every_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    plain = create_backbone(name, 16, kwargs)
    fast = copy.deepcopy(plain)
    use_onednn(fast)
    assert not unknown(fast.model.blocks[0])
    (images,) = drawn((2, 3, 16, 16))

    def both(backbone: Any) -> list[Tensor]:
        found = []
        for read in (lambda: backbone(images).patches, lambda: backbone(images, cls_only=True)):
            output = read()
            found += [output, *torch.autograd.grad(output.tanh().sum(), [images, *backbone.parameters()][:12])]
        return found

    expected, seen = both(plain), calls(monkeypatch)
    torch.testing.assert_close(both(fast), expected, rtol=1e-3, atol=1e-4)
    assert len(seen) > 16  # forward and backward of four layers in two blocks


@pytest.mark.slow
def test_it_can_be_compiled() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile on the CPU needs a C++ compiler")
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 4))
    fast = copy.deepcopy(eager)
    use_onednn(fast)
    (x,) = drawn((7, 24))
    torch._dynamo.reset()

    def gradients(module: Any, owner: nn.Module) -> list[Tensor]:
        output = module(x)
        return [output, *torch.autograd.grad(output.tanh().sum(), [x, *owner.parameters()])]

    compiled = torch.compile(fast, fullgraph=True)
    torch.testing.assert_close(gradients(compiled, fast), gradients(eager, eager), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("overrides", [[], ["designer.stride=4", "value.engine=double_backward"]])
def test_a_run_by_it_is_the_run(tiny: Callable[..., Config], overrides: list[str]) -> None:
    """An update of φ and a learner step: the same but for rounding, which Adam would amplify in later ones."""
    found = []
    for matmul in ("torch", "onednn"):
        run = Trainer(tiny(f"matmul={matmul}", "value.burn_in=0", *overrides))
        layers = [part for part in run.student.modules() if isinstance(part, nn.Linear)]
        assert {type(part) for part in layers} == {nn.Linear if matmul == "torch" else OneDNNLinear}
        run.learner_update(*run.stream.batch(0))
        found.append((run.meters.read(), list(run.student.parameters())))
    (metrics, learner), (expected, other) = found
    assert {"loss", "value", "designer_gradient_norm"} <= set(metrics)
    assert metrics == pytest.approx(expected, rel=2e-2, abs=1e-5)
    torch.testing.assert_close(learner, other, rtol=1e-3, atol=1e-4)


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_matmul("torch", CPU) == "torch"
    assert choose_matmul("onednn", CPU) == "onednn"
    for slow, expected in ((True, "onednn"), (False, "torch")):
        monkeypatch.setattr(linear_module, "_mkl_is_slow", lambda slow=slow: slow)
        assert choose_matmul("auto", CPU) == expected
    assert choose_matmul("auto", torch.device("meta")) == "torch"
    monkeypatch.setattr(linear_module, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(linear_module, "_product", lambda x, weight, bias: 1.01 * F.linear(x, weight, bias))
    assert choose_matmul("auto", CPU) == "torch"
    with pytest.raises(UserError, match=r"off from torch's product by .*choose matmul=torch"):
        choose_matmul("onednn", CPU)
    with pytest.raises(UserError, match="it is for the CPU, and this runs on meta"):
        choose_matmul("onednn", torch.device("meta"))
    with pytest.raises(UserError, match="choose auto, torch, onednn"):
        choose_matmul("mkl", CPU)
