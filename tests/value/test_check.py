"""What is refused before any parameter changes, and which engines a learner supports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dino_value.value import double_backward, finite_difference, last_blocks, value_step
from dino_value.value.check import check_engine, check_start, choose_engine, choose_radius, engine_error, require
from dino_value.value.directions import dot
from dino_value.value.engines import ENGINES, linear


class Small:
    """A two-layer learner whose loss is linear in what φ makes: soft targets."""

    def __init__(self, dtype: torch.dtype = torch.float64, trunk_dtype: torch.dtype | None = None) -> None:
        rng = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=rng, dtype=torch.float64)
        self.trunk_dtype = trunk_dtype or dtype
        self.x = draw(5, 4).to(dtype)
        self.phi = [nn.Parameter(draw(4, 3).to(dtype)), nn.Parameter(draw(3).to(dtype))]
        self.parameters = {"first": draw(4, 4).to(dtype), "second": draw(4, 3).to(dtype)}
        self.u = [draw(4, 4).to(dtype), draw(4, 3).to(dtype)]

    def trunk(self) -> tuple[Tensor, ...]:
        return ((self.x @ self.phi[0] + self.phi[1]).softmax(-1).to(self.trunk_dtype), self.x)

    def terms(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        return -((hidden[1] @ parameters["first"]).tanh() @ parameters["second"]).log_softmax(-1)

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        return (hidden[0] * self.terms(hidden, parameters)).sum()

    @property
    def given(self) -> tuple[Any, ...]:
        return self, self.parameters, self.u, self.phi


class NoTerms:
    """The same without `terms`."""

    def __init__(self, task: Small) -> None:
        self.trunk, self.tail = task.trunk, task.tail
        self.given = (self, *task.given[1:])


# What the loop gives


def test_require_passes_what_fits() -> None:
    task = Small()
    require(task.parameters, task.u, task.phi)


def test_require_names_what_does_not_fit() -> None:
    task = Small()
    with pytest.raises(ValueError, match="1 tensors and the scope 2"):
        require(task.parameters, task.u[:1], task.phi)
    with pytest.raises(ValueError, match=r"g_down of first has shape \(4, 3\) and the parameter \(4, 4\)"):
        require(task.parameters, task.u[::-1], task.phi)
    for phi in ([], [parameter.detach() for parameter in task.phi]):
        with pytest.raises(ValueError, match="unfreeze it"):
            require(task.parameters, task.u, phi)


def test_value_step_requires_before_it_changes_anything() -> None:
    task = Small()
    with pytest.raises(ValueError, match="the same scope"):
        value_step(task, task.parameters, task.u[::-1], dot, double_backward, task.phi)
    assert all(parameter.grad is None for parameter in task.phi)


def test_check_start() -> None:
    good = [torch.ones(2), torch.zeros(3)]
    check_start(good)
    check_start(good, torch.tensor([0.0, 0.5, 1.0]))
    with pytest.raises(ValueError, match="g_down is zero"):
        check_start([torch.zeros(2)])
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"g_down is not finite \(1 of 2 tensors\)"):
            check_start([torch.ones(2), torch.tensor([1.0, bad])])


@pytest.mark.parametrize("masks", [[-0.1, 0.5], [0.5, 1.01], [0.5, torch.nan]])
def test_a_designer_output_that_is_no_mask(masks: list[float]) -> None:
    with pytest.raises(ValueError, match=r"not in \[0, 1\]"):
        check_start([torch.ones(1)], torch.tensor(masks))


# Is the engine exact?


def test_engine_error_is_the_relative_error() -> None:
    task = Small()

    def doubled(*arguments: Any) -> Tensor:
        value = double_backward(*arguments)
        for parameter in task.phi:
            parameter.grad = 2 * parameter.grad  # type: ignore[operator]
        return value

    assert engine_error(*task.given, double_backward) == 0
    assert engine_error(*task.given, doubled) == pytest.approx(1)
    assert engine_error(*task.given, double_backward, reference=doubled) == pytest.approx(0.5)
    assert 0 < engine_error(*task.given, finite_difference) < 1e-5
    assert engine_error(*task.given, partial(linear, derivative="jvp")) < 1e-14


def test_engine_error_leaves_everything_as_it_was() -> None:
    task = Small()
    mark = torch.full_like(task.phi[0], 7.0)
    task.phi[0].grad = mark
    plain = task.trunk
    # The trunk draws: both engines must see the same numbers, and the run's own stream must not move.
    task.trunk = lambda: (plain()[0] * torch.rand(5, 3, dtype=torch.float64), task.x)  # type: ignore[method-assign]
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert engine_error(*task.given, partial(linear, derivative="jvp")) < 1e-14
    assert torch.equal(torch.rand(3), expected)
    assert task.phi[0].grad is mark
    assert bool((mark == 7).all())
    assert task.phi[1].grad is None


def test_check_engine_passes_what_is_exact() -> None:
    assert check_engine(*Small(torch.float32).given, finite_difference) < 1e-2
    assert check_engine(*Small().given, double_backward) == 0


@pytest.mark.parametrize(
    ("engine", "radius", "cause"),
    [
        (finite_difference, 1e-6, "too small: rounding"),
        (finite_difference, 10.0, "too large: curvature"),
        (linear, 1e-6, "too small: rounding"),
        (linear, 10.0, "too large: curvature"),
    ],
)
def test_a_bad_radius_is_refused_with_one_that_works(engine: Any, radius: float, cause: str) -> None:
    task = Small(torch.float32)
    with pytest.raises(ValueError, match=f"{engine.__name__}.*{cause} takes over; set radius=") as caught:
        check_engine(*task.given, partial(engine, radius=radius))
    named = float(str(caught.value).split("set radius=")[1].split()[0])
    assert check_engine(*task.given, partial(engine, radius=named)) < 2e-2


def test_the_bound_is_the_callers() -> None:
    task = Small(torch.float32)
    error = engine_error(*task.given, finite_difference)
    assert check_engine(*task.given, finite_difference, 1.01 * error) == error
    with pytest.raises(ValueError, match=r"bound"):
        check_engine(*task.given, finite_difference, 1e-9)


def test_a_low_precision_trunk_is_named() -> None:
    task = Small(torch.float32, torch.bfloat16)
    task.x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))  # some of so many numbers round apart
    with pytest.raises(ValueError, match=r"trunk gives torch\.bfloat16.*float32"):
        check_engine(*task.given, finite_difference, 1e-6)


def test_an_engine_that_is_wrong_for_no_known_cause() -> None:
    def wrong(*arguments: Any) -> Tensor:
        value = double_backward(*arguments)
        arguments[4][0].grad.neg_()
        return value

    with pytest.raises(ValueError, match=r"wrong: .*no known cause"):
        check_engine(*Small().given, wrong)


def test_a_loss_that_does_not_depend_on_phi() -> None:
    constant = Small()
    constant.tail = lambda hidden, parameters: (parameters["second"] ** 2).sum() + 0 * hidden[0].sum()  # type: ignore[method-assign]
    for check in (check_engine, lambda *given: choose_engine(*given[:4])):
        with pytest.raises(ValueError, match="does not depend on the designer"):
            check(*constant.given, finite_difference)
    unused = Small()
    unused.tail = lambda hidden, parameters: (parameters["second"] ** 2).sum()  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="does not depend on the designer"):
        finite_difference(unused, unused.trunk(), *unused.given[1:])


def test_a_gradient_that_is_not_finite() -> None:
    task = Small()
    task.u[0][0, 0] = torch.nan
    with pytest.raises(ValueError, match="φ's gradient is not finite"):
        check_engine(*task.given, finite_difference)

    def broken(*arguments: Any) -> Tensor:
        value = double_backward(*arguments)
        arguments[4][0].grad.fill_(torch.nan)
        return value

    with pytest.raises(ValueError, match=r"broken: .*not finite, where the reference's is"):
        check_engine(*Small().given, broken)


# engine=auto


def test_the_cheapest_exact_engine_is_chosen() -> None:
    task = Small()
    assert choose_engine(*task.given)[0] == "linear"
    name, error = choose_engine(*NoTerms(task).given)
    assert name == "finite_difference"
    assert 0 < error < 1e-5
    coarse = {
        **ENGINES,
        "linear": partial(linear, radius=30.0),
        "finite_difference": partial(finite_difference, radius=30),
    }
    assert choose_engine(*task.given, coarse) == ("double_backward", 0.0)


def test_an_engine_that_refuses_the_task_is_passed_over() -> None:
    task = Small()
    weight = task.phi[0]
    task.trunk = lambda: ((task.x @ weight).softmax(-1), task.x + weight.mean())  # type: ignore[method-assign]
    assert choose_engine(*task.given)[0] == "finite_difference"


def test_no_engine_is_exact_enough() -> None:
    coarse = {"finite_difference": partial(finite_difference, radius=30.0)}
    with pytest.raises(ValueError, match=r"no engine is within 0\.02 .*finite_difference: error"):
        choose_engine(*Small().given, coarse)


def test_choose_radius() -> None:
    """Rounding pushes the best radius up: it lies higher in float32 than in float64."""
    (double, exact), (single, close) = (choose_radius(*Small(dtype).given) for dtype in (torch.float64, torch.float32))
    assert double < single < 1
    assert exact < 1e-8
    assert close < 1e-3
    assert close == engine_error(*Small(torch.float32).given, partial(finite_difference, radius=single))


# What a learner may do


class Masked:
    """A timm ViT of two blocks, S the last; φ is a mask. How the learner runs is the argument of each test."""

    def __init__(
        self,
        fused: bool = False,
        compiled: bool = False,
        remember: bool = True,
        tail_context: Callable[[], Any] = contextlib.nullcontext,
    ) -> None:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
        self.model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes).eval()
        for parameter in self.model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        for block in self.model.blocks:
            block.attn.fused_attn = fused
        self.scope = last_blocks(self.model, 1)
        self.parameters = self.scope.parameters(self.model)
        self.u = [torch.randn_like(value) for value in self.parameters.values()]
        self.images, self.read_out = torch.randn(4, 3, 16, 16), torch.randn(24, 7)
        self.phi = [nn.Parameter(torch.randn(4, 1, 16, 16))]
        if compiled:
            for block in self.model.blocks:
                block.compile(backend="aot_eager")
        self.remember, self.tail_context = remember, tail_context

    def trunk(self) -> tuple[Tensor, ...]:
        views = self.phi[0].sigmoid() * self.images
        tokens = self.model._pos_embed(self.model.patch_embed(views))
        for block in self.model.blocks[: self.scope.start]:
            tokens = block(tokens) if self.remember else checkpoint(block, tokens, use_reentrant=False)
        return (tokens,)

    def tail(self, hidden: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> Tensor:
        blocks = nn.Module()
        blocks.model = self.model
        blocks.forward = self._tail  # type: ignore[method-assign]
        named = {f"model.{name}": value for name, value in parameters.items()}
        with self.tail_context():
            return functional_call(blocks, named, hidden)

    def _tail(self, tokens: Tensor) -> Tensor:
        for block in self.model.blocks[self.scope.start :]:
            tokens = block(tokens)
        logits = self.model.norm(tokens)[:, 0].float() @ self.read_out
        return F.cross_entropy(logits, torch.arange(4))

    @property
    def given(self) -> tuple[Any, ...]:
        return self, self.parameters, self.u, self.phi

    def gradient(self, engine: Any, autocast: bool = False) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, autocast):
            engine(self, self.trunk(), *self.given[1:])
        found, self.phi[0].grad = self.phi[0].grad, None
        assert found is not None
        return found


LEARNERS: dict[str, tuple[dict[str, Any], bool, float]] = {
    "plain": ({}, False, 2e-3),
    "fused attention": ({"fused": True}, False, 2e-3),
    "checkpointed trunk": ({"remember": False}, False, 2e-3),
    "compiled blocks": ({"compiled": True}, False, 2e-3),
    "autocast": ({}, True, 3e-2),  # the trunk's own rounding
    "all at once": ({"fused": True, "remember": False, "compiled": True}, True, 3e-2),
}


@pytest.mark.parametrize(("learner", "autocast", "bound"), LEARNERS.values(), ids=LEARNERS.keys())
def test_finite_difference_is_right_for_any_learner(learner: dict[str, Any], autocast: bool, bound: float) -> None:
    expected = Masked().gradient(double_backward)
    found = Masked(**learner).gradient(partial(finite_difference, radius=0.1), autocast)
    assert float((found - expected).norm() / expected.norm()) < bound


def test_fused_attention_that_the_learner_insists_on() -> None:
    flash = partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
    task = Masked(fused=True, tail_context=flash)
    for check in (check_engine, lambda *given: choose_engine(*given[:4])):
        with pytest.raises(ValueError, match=r"attention=math.*engine=finite_difference"):
            check(*task.given, finite_difference)
    assert task.phi[0].grad is None
    assert task.gradient(finite_difference).isfinite().all()  # whose passes are first-order


def test_a_compiled_learner_has_no_second_derivative() -> None:
    with pytest.raises(ValueError, match=r"eager mode.*engine=finite_difference"):
        Masked(compiled=True).gradient(double_backward)


def test_checkpointing_that_would_recompute_from_other_parameters() -> None:
    """Inside functional_call the moved parameters are gone when the block is recomputed."""
    task = Masked()
    plain = task.model.blocks[1].forward
    task.model.blocks[1].forward = lambda tokens: checkpoint(plain, tokens, use_reentrant=False)
    with pytest.raises(ValueError, match=r"pass the parameters to checkpoint\(\)"):
        task.gradient(finite_difference)


def test_reentrant_checkpointing() -> None:
    task = Masked()
    plain = task.model.blocks[1].forward
    task.model.blocks[1].forward = lambda tokens: checkpoint(plain, tokens, use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        task.gradient(finite_difference)
