"""What every objective keeps of the contract (interface.py), whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dino_value.distributed.shards import BatchShard
from dino_value.models.backbone import create_backbone
from dino_value.models.learner import Learner
from dino_value.objectives.ijepa import IJEPA, PredictorSizes
from dino_value.objectives.interface import LossTerms, Objective
from dino_value.objectives.self_distillation import IBOT, Gram, HeadSizes, SelfDistillation
from dino_value.value import Mover

KWARGS = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SIZES = HeadSizes(out_dim=12, hidden_dim=16, bottleneck_dim=8)
IMAGES = 3


def distillation(**options: Any) -> Callable[[Any], Objective]:
    return lambda backbone: SelfDistillation(SIZES, backbone=backbone, **options)


OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "dino": distillation(),
    "sinkhorn": distillation(sinkhorn_iterations=3),
    "koleo": distillation(koleo_weight=0.1),
    "ibot": distillation(ibot=IBOT(1.0)),
    "ibot, a head of its own": distillation(ibot=IBOT(0.5, separate_head=True)),
    "gram": distillation(gram=Gram(2.0)),
    "all of DINOv3": distillation(
        sinkhorn_iterations=3, koleo_weight=0.1, ibot=IBOT(1.0, separate_head=True), gram=Gram(2.0)
    ),
    "ijepa": lambda backbone: IJEPA(PredictorSizes(8, 1, 2), {"least": 1}, beta=0.5),
}
objectives = pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES.keys())


class Batch(NamedTuple):
    """Three images, two global views of 32 pixels and two local ones of 16, as a student and a teacher see them."""

    loss: Objective
    student: Learner
    teacher: Learner
    views: tuple[Tensor, Tensor]
    draw: Any
    targets: LossTerms

    def states(self, start: int | None) -> list[Any]:
        return self.loss.states(self.student, self.views, start, self.draw)


def batch(make: Callable[[Any], Objective]) -> Batch:
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", 32, KWARGS)
    loss = make(backbone)
    student, teacher = (
        Learner(create_backbone("vit_tiny_patch16_224", 32, KWARGS), **loss.heads(backbone.embed_dim)) for _ in "st"
    )
    for learner in (student, teacher):
        for parameter in learner.parameters():  # away from the symmetric start
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    small = 0 if isinstance(loss, IJEPA) else 2 * IMAGES
    views = torch.randn(2 * IMAGES, 3, 32, 32), torch.randn(small, 3, 16, 16)
    loss.begin(0, teacher)
    draw = loss.draw(views[0], 8, torch.Generator().manual_seed(1))
    with torch.no_grad():
        targets, _ = loss.teach(teacher, views[0], 0.05, draw)
    return Batch(loss, student, teacher, views, draw, targets)


@pytest.mark.parametrize("start", [None, 0, 1])
@objectives
def test_the_losses_are_the_terms_of_what_is_predicted(make: Callable[[Any], Objective], start: int | None) -> None:
    """And wherever the student is cut, its parts have the same terms."""
    one = batch(make)
    loss = one.loss
    states = one.states(start)
    predictions = loss.predict(one.student, states, start, one.draw)
    terms = loss.terms_of(predictions, one.targets)
    losses = loss.losses(one.student, states, one.targets, start, one.draw)
    assert terms.keys() == losses.keys()
    assert terms.keys() == {name for name in ("dino", "ibot", "ijepa", "koleo", "gram") if name in predictions}
    assert all(torch.equal(terms[name], losses[name]) for name in terms)
    whole = loss.losses(one.student, one.states(None), one.targets, None, one.draw)
    for name, term in losses.items():
        torch.testing.assert_close(term, whole[name], rtol=1e-4, atol=1e-5)
    total = loss.total(loss.parts(terms, one.draw))
    (gradient,) = torch.autograd.grad(total, [next(one.student.backbone.parameters())])
    assert gradient.abs().max() > 0  # through the predictions


@objectives
def test_every_target_is_compared_with_a_prediction(make: Callable[[Any], Objective]) -> None:
    one = batch(make)
    predictions = one.loss.predict(one.student, one.states(None), None, one.draw)
    assert one.targets.keys() <= predictions.keys()
    for name in {"dino", "ibot"} & predictions.keys():
        torch.testing.assert_close(predictions[name].exp().sum(-1), torch.ones(predictions[name].shape[:-1]))
    views = 2 + len(one.views[1]) // IMAGES
    if "dino" in predictions:
        assert predictions["dino"].shape == (views, IMAGES, SIZES.out_dim)
    if "koleo" in predictions:
        assert predictions["koleo"].shape == (2 * IMAGES, KWARGS["embed_dim"])


def said(one: Batch) -> LossTerms:
    with torch.no_grad():
        return one.loss.predict(one.student, one.states(None), None, one.draw)


@pytest.mark.parametrize("given", [(0.3, None), (None, 2.0)], ids=["budget", "strength"])
@objectives
def test_no_change_of_the_predictions_leaves_targets_and_loss_as_they_are(
    make: Callable[[Any], Objective], given: tuple[float | None, float | None]
) -> None:
    one = batch(make)
    here = said(one)
    moved = one.loss.move(one.targets, here, here, mover := Mover(*given))
    assert moved.keys() == one.targets.keys()
    assert all(float(spent) < 1e-6 for spent in mover.spent.values())
    for name, target in one.targets.items():
        if name == "dino":  # one for each pair of views
            assert moved[name].shape == (2, *here["dino"].shape)
            target = target[:, None].expand_as(moved[name])
        torch.testing.assert_close(moved[name], target, rtol=1e-5, atol=1e-6)
    terms = [one.loss.terms_of(here, targets) for targets in (one.targets, moved)]
    for name in terms[0]:
        torch.testing.assert_close(terms[1][name], terms[0][name], rtol=1e-5, atol=1e-5)


@objectives
def test_a_change_moves_what_is_predicted_towards_it_and_no_regulariser(make: Callable[[Any], Objective]) -> None:
    """Each pair's target by its student view's change: against loops over the terms."""
    one = batch(make)
    here = said(one)
    there = {name: value + 0.3 * torch.randn_like(value) for name, value in here.items()}
    kept = {name: value.clone() for name, value in one.targets.items()}
    moved = one.loss.move(one.targets, here, there, mover := Mover(strength=1.5))
    assert all(torch.equal(kept[name], one.targets[name]) for name in kept)  # not in place
    assert mover.spent.keys() == one.targets.keys() - {"gram"}
    if "gram" in one.targets:
        assert torch.equal(moved["gram"], one.targets["gram"])
    if "ijepa" in one.targets:
        change = there["ijepa"] - here["ijepa"]
        torch.testing.assert_close(moved["ijepa"], one.targets["ijepa"] + 1.5 * change)
        return
    for teacher in range(2):
        for view in range(4):
            for image in range(IMAGES):
                change = there["dino"][view, image] - here["dino"][view, image]
                expected = one.targets["dino"][teacher, image] * (1.5 * change).exp()
                torch.testing.assert_close(
                    moved["dino"][teacher, view, image], expected / expected.sum(), rtol=1e-4, atol=1e-6
                )
    if "ibot" in one.targets:
        expected = one.targets["ibot"] * (1.5 * (there["ibot"] - here["ibot"])).exp()
        torch.testing.assert_close(moved["ibot"], expected / expected.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    # The loss's terms are those of each pair's own target.
    terms = one.loss.terms_of(here, moved)
    for teacher in range(2):
        for view in range(4):
            expected = -(moved["dino"][teacher, view] * here["dino"][view]).sum(-1)
            torch.testing.assert_close(terms["dino"][teacher, view], expected, rtol=1e-5, atol=1e-5)


def test_dinos_budget_is_of_the_pairs_that_count() -> None:
    """A view is never matched with itself: what would happen to that pair has no part in the mean."""
    one = batch(OBJECTIVES["dino"])
    here = said(one)
    there = {"dino": here["dino"] + torch.randn_like(here["dino"])}
    moved = one.loss.move(one.targets, here, there, mover := Mover(0.2))["dino"]
    q = one.targets["dino"][:, None].expand_as(moved)
    rows = (moved * (moved / q).log()).sum(-1)
    pairs = [rows[teacher, view] for teacher in range(2) for view in range(4) if teacher != view]
    assert float(torch.stack(pairs).mean()) == pytest.approx(float(mover.spent["dino"]), rel=1e-3)
    assert float(mover.spent["dino"]) == pytest.approx(0.2, rel=2e-3)
    assert abs(float(rows.mean()) / 0.2 - 1) > 2e-3  # so that the two can be told apart


@pytest.mark.parametrize("name", ["ibot", "all of DINOv3", "ijepa"])
def test_a_part_of_a_batch_is_moved_as_in_the_whole(name: str) -> None:
    one = batch(OBJECTIVES[name])
    here = said(one)
    there = {key: value + 0.3 * torch.randn_like(value) for key, value in here.items()}
    whole = one.loss.move(one.targets, here, there, Mover(strength=1.0))
    part = BatchShard(1, 3)
    targets, draw = one.loss.cut(one.targets, one.draw, part)
    views = [part.rows(group, len(group) // IMAGES) if len(group) else group for group in one.views]
    with torch.no_grad():
        own = one.loss.predict(one.student, one.loss.states(one.student, views, None, draw), None, draw)
    rows = torch.arange(IMAGES)[part.of(IMAGES)]
    changes = {}
    if "dino" in own:
        torch.testing.assert_close(own["dino"], here["dino"][:, rows], rtol=1e-4, atol=1e-4)
        changes["dino"] = (there["dino"] - here["dino"])[:, rows]
    if "ibot" in own:
        chosen = one.draw.part(part)[1]
        changes["ibot"] = (there["ibot"] - here["ibot"])[chosen]
    if "ijepa" in own:
        changes["ijepa"] = part.rows(there["ijepa"] - here["ijepa"], 2)
    own_there = own | {key: own[key] + change for key, change in changes.items()}
    moved = one.loss.move(targets, own, own_there, Mover(strength=1.0))
    if "dino" in moved:
        torch.testing.assert_close(moved["dino"], whole["dino"][:, :, rows], rtol=1e-4, atol=1e-5)
    if "ibot" in moved:
        torch.testing.assert_close(moved["ibot"], whole["ibot"][chosen], rtol=1e-4, atol=1e-5)
    if "ijepa" in moved:
        torch.testing.assert_close(moved["ijepa"], part.rows(whole["ijepa"], 2), rtol=1e-4, atol=1e-5)
