"""Is the run healthy? Features measured at intervals on images that stay the same, and collapse said in words.

Nothing here trains or draws: a run is bit for bit the same with and without it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dino_value.config import Config
from dino_value.data import scenes, unlabeled_files
from dino_value.data.folders import open_imagefolder, read_image
from dino_value.data.labelled import LabelledDataset, LabelledSource, cover_image, some_items, spread
from dino_value.errors import UserError
from dino_value.eval.knn import knn_predict
from dino_value.models.backbone import Backbone

NEIGHBOURS, KNN_TEMPERATURE = 20, 0.07  # the published k-NN's
CLOSE = 0.05  # nats: a distribution this near to ln K, or to 0, is uniform, or one-hot
ONE_LINE = 1.05  # RankMe of features that differ by no more than rounding
CONSTANT = 0.01  # standard deviation of normalised targets, which is near 1 in health
LAG = 0.1  # share of the heads' loss that a few more steps would take off
ROUNDING = 0.05  # nats: bfloat16 leaves an error of .005 in a difference of log-probabilities (docs/steering.md)
# said without patience: they are no beginnings
AT_ONCE = ("lookahead_diverges", "direction_reverses", "targets_follow_rounding", "heads_lag")
WINDOW = 20  # readings that a loss is compared with


def rankme(features: Tensor) -> Tensor:
    """The effective rank of features [n D], a scalar in [1, min(n, D)]: exp of the entropy of their singular values.

    RankMe (arXiv 2210.02885, eq. 1 and 2), with its ε of 1e-7 and, like it, without centring.
    """
    values = torch.linalg.svdvals(features.float())
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + 1e-7
    return torch.exp(-(shares * shares.log()).sum())


@torch.no_grad()
def class_features(backbone: Backbone, images: Tensor, batch: int = 64) -> Tensor:
    """Class features [n D] of images uint8 [n 3 H W], on the backbone's device; it is in eval mode already.

    In float32 whatever the run's precision: rounding to bfloat16 alone lifts the rank of collapsed features.
    """
    device = next(backbone.parameters()).device
    with torch.autocast(device.type, enabled=False):
        parts = [backbone(backbone.normalise(part.to(device))).cls for part in images.split(batch)]
    return torch.cat(parts)


class Labelled(NamedTuple):
    """`images` uint8 [n 3 s s] and their classes, int64 [n]."""

    images: Tensor
    labels: Tensor


class Checkup:
    """RankMe and k-NN of a backbone, on images that are read once and kept.

    Raises:
        UserError: images that cannot be read, or fewer labelled ones than neighbours.
    """

    def __init__(self, config: Config) -> None:
        health, size, data = config.health, config.views.global_size, config.data
        self.images = unlabeled_images(data.unlabeled, health.images, size, data.skip_unreadable, data.field)
        self.train: Labelled | None = None
        if health.knn is None:
            return
        try:
            train, validation = open_splits(health.knn)
            self.classes = train.num_classes
            self.train, self.queries = (
                kept(split, health.knn_images, size, data.skip_unreadable) for split in (train, validation)
            )
        except UserError as error:
            raise UserError(f"health.knn: {error}") from None
        if len(self.train.labels) < NEIGHBOURS:
            raise UserError(
                f"health.knn={health.knn}: {len(self.train.labels)} training images are fewer than the {NEIGHBOURS} "
                "neighbours that vote; give more, or raise health.knn_images"
            )

    def measure(self, backbone: Backbone, center: Tensor | None = None) -> dict[str, float]:
        """`rankme`; `center_norm` of a centre [1 K]; and with labelled images `knn_top1` in [0, 1]."""
        features = class_features(backbone, self.images)
        if not features.isfinite().all():  # the guard stops such a run at its next step, and says why
            return {}
        found = {"rankme": float(rankme(features))}
        if center is not None:
            found["center_norm"] = float(center.norm())
        if self.train is not None:
            train, queries = (class_features(backbone, part.images) for part in (self.train, self.queries))
            votes = knn_predict(
                train, self.train.labels.to(train.device), queries, NEIGHBOURS, KNN_TEMPERATURE, self.classes
            )
            found["knn_top1"] = float((votes.argmax(1).cpu() == self.queries.labels).double().mean())
        return found


def unlabeled_images(
    path: str, most: int, size: int, skip_unreadable: bool = False, field: str | None = None
) -> Tensor:
    """Images of the unlabeled data, whole or cropped at the centre, uint8 [n 3 size size]; the same at every call.

    They are found and read as the training's: see `data.open_views` for `path`, `skip_unreadable` and `field`.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    if path == "scenes":
        split = scenes.scenes("unlabeled", size)
        return split.images[torch.tensor(spread(len(split.images), most))]
    files = unlabeled_files(path, field)

    def load(index: int) -> Tensor:
        return cover_image(read_image(files[index]), (size, size))

    return torch.stack(some_items(load, len(files), most, skip_unreadable))


def open_splits(path: str) -> tuple[LabelledSource, LabelledSource]:
    """Training and validation images with one class each: train/ and val/ of a folder, or the embedded `scenes`."""
    if path == "scenes":  # `tuning`, not `validation`: whoever watches a run chooses by what is seen
        return scenes.labelled("imagefolder", "training"), scenes.labelled("imagefolder", "tuning")
    return open_imagefolder(path, "training"), open_imagefolder(path, "validation")


def kept(source: LabelledSource, most: int, size: int, skip_unreadable: bool = False) -> Labelled:
    """At most `most` items of a source, evenly spaced, in memory.

    Raises:
        UserError: as `some_items`.
    """
    items = LabelledDataset(source, size=(size, size))
    images, labels = zip(*some_items(lambda index: items[index, 0], len(items), most, skip_unreadable), strict=True)
    return Labelled(torch.stack(images), torch.stack(labels))


class Event(NamedTuple):
    """Something went wrong: its kind, and one line that says what was seen and what to change."""

    kind: str
    text: str


class CollapseWatch:
    """Judges the numbers that a run logs anyway, and speaks once about each kind of collapse.

    A condition must hold for `health.patience` steps, because a healthy run may begin with it: before the centre has
    settled one prototype takes all, and until features differ the teacher is uniform.
    """

    def __init__(self, config: Config, low_precision: bool = False) -> None:
        self.config, self.low_precision = config, low_precision
        self._since: dict[str, int] = {}  # the first reading of each condition that has held ever since
        self._said: list[str] = []
        self._losses: list[float] = []  # the last readings that were no spike
        self._high = 0  # readings that the present spike has lasted

    def judge(self, step: int, values: Mapping[str, float]) -> list[Event]:
        """What is to be said of the values logged at `step`; a name that is absent is not judged."""
        found = [
            Event(kind, f"since step {self._since[kind]}: {text}")
            for kind, text in self._conditions(values).items()
            if self._lasts(kind, step, bool(text))
        ]
        self._said += [event.kind for event in found]
        spike = self._spike(values["loss"]) if "loss" in values else None
        return found + ([Event("loss_spike", f"step {step}: {spike}")] if spike else [])

    def _conditions(self, values: Mapping[str, float]) -> dict[str, str | Literal[False]]:
        """Each condition that can be judged: what to say where it holds, False where it does not."""
        objective, optim = self.config.objective, self.config.optim
        found: dict[str, str | Literal[False]] = {}
        if "teacher_entropy" in values and "prototype_share" in values:
            entropy, share = max(0.0, values["teacher_entropy"]), values["prototype_share"]  # rounding: −0.00
            loss, most = values.get("loss_dino", math.nan), math.log(objective.out_dim)
            uniform = most - entropy < CLOSE
            found["uniform"] = uniform and (
                f"teacher entropy {entropy:.2f} is ln K = {most:.2f}: the teacher is uniform and teaches nothing. "
                f"Lower objective.teacher_temp ({objective.teacher_temp:g}; above 0.06 only after a warm-up: "
                f"teacher_temp_start, teacher_temp_warmup), or lower optim.lr ({optim.lr:g})"
            )
            found["one_prototype"] = (entropy < CLOSE and share > 1 - CLOSE) and (
                f"teacher entropy {entropy:.2f}, {share:.0%} of it all on one prototype: one prototype takes all, "
                "whatever the image. Check the centring: the centre lags behind the teacher; lower "
                f"objective.center_momentum ({objective.center_momentum:g}; DINO 0.9) or optim.lr ({optim.lr:g}), or "
                f"raise objective.teacher_temp ({objective.teacher_temp:g})"
            )
            found["uniform_student"] = (abs(loss - most) < CLOSE and not uniform) and (
                f"loss {loss:.2f} is ln K = {most:.2f}, teacher entropy {entropy:.2f}: the student is uniform and "
                f"learns nothing of the teacher. Lower objective.teacher_temp ({objective.teacher_temp:g}), crop less "
                f"(views.local_scale {tuple(self.config.views.local_scale)}), or raise optim.lr ({optim.lr:g})"
            )
        if "target_spread" in values:
            deviation = values["target_spread"]
            found["constant_targets"] = deviation < CONSTANT and (
                f"standard deviation of the targets {deviation:.3f}: all patches have become one and teach "
                f"nothing. Lower optim.lr ({optim.lr:g}) or raise objective.teacher_momentum "
                f"({objective.teacher_momentum:g})"
            )
        if "rankme" in values:
            found["rank_one"] = values["rankme"] < ONE_LINE and (
                f"RankMe {values['rankme']:.2f}: the class features of all images point one way. Begin again from "
                f"weights of an earlier step with a lower optim.lr ({optim.lr:g}) or a higher objective.koleo "
                f"({objective.koleo:g}; DINOv2 0.1)"
            )
        return found | self._of_the_direction(values)

    def _of_the_direction(self, values: Mapping[str, float]) -> dict[str, str | Literal[False]]:
        """What is wrong with what the designer follows, at once."""
        feedback, value = self.config.feedback, self.config.value
        found: dict[str, str | Literal[False]] = {}
        if "lookahead_after" in values:
            before, after = values["lookahead_before"], values["lookahead_after"]
            found["lookahead_diverges"] = after > before and (
                f"the labels' loss was {before:.3g} and is {after:.3g} after a lookahead of "
                f"{value.lookahead.steps} steps: its direction leads away from them. Lower value.lookahead.lr"
            )
        if "direction_drift" in values:
            drift = values["direction_drift"]
            found["direction_reverses"] = drift < 0 and (
                f"a direction and the next one have a cosine of {drift:.2f}: kept for value.period={value.period} "
                "steps it has turned round. Lower value.period, or choose value.direction=lookahead"
            )
        spread = min((v for name, v in values.items() if name.startswith("target_spread")), default=math.inf)
        if math.isfinite(spread) and "lookahead_after" in values and self.low_precision:
            found["targets_follow_rounding"] = spread < ROUNDING and (
                f"the lookahead changes the student's log-probabilities by {spread:.2g} nats, near what bfloat16 "
                "rounds off: the targets follow rounding. Raise value.lookahead.steps or value.lookahead.lr, or set "
                "precision=fp32"
            )
        if "head_lag" in values:
            lag = values["head_lag"]
            found["heads_lag"] = lag > LAG and (
                f"more steps would take {lag:.0%} off the heads' loss: g_down asks mostly for heads to be repaired. "
                f"Raise feedback.updates ({feedback.updates}), feedback.warmup ({feedback.warmup}) or feedback.lr "
                f"({feedback.lr:g}), or choose value.direction=lookahead"
            )
        return found

    def _lasts(self, kind: str, step: int, holds: bool) -> bool:
        """Whether the condition has now held for long enough, for the first time."""
        if not holds:
            self._since.pop(kind, None)
            return False
        patience = 0 if kind in AT_ONCE else self.config.health.patience
        return step - self._since.setdefault(kind, step) >= patience and kind not in self._said

    def _spike(self, loss: float) -> str | None:
        """What to say when a loss leaves the running mean: once a spike, which ends when the loss is back."""
        factor, seen = self.config.health.spike, self._losses
        if not factor or not math.isfinite(loss):
            return None
        if len(seen) >= WINDOW // 2:
            mean, deviation = statistics.fmean(seen), statistics.stdev(seen)
            # A loss that hardly moves has no deviation to speak of: a hundredth of its size is no spike.
            limit = mean + max(factor * deviation, 0.01 * abs(mean))
            if loss > limit:
                self._high += 1
                if self._high >= WINDOW:  # not a spike but its level from now on
                    self._losses, self._high = [], 0
                if self._high != 1:
                    return None
                return (
                    f"loss {loss:.4g} rose above {limit:.4g}, {factor:g} standard deviations over its mean of late "
                    f"({mean:.4g}). If it does not come down: lower optim.lr ({self.config.optim.lr:g}) or "
                    f"optim.clip ({self.config.optim.clip:g}), or lengthen optim.warmup ({self.config.optim.warmup})"
                )
        self._losses, self._high = [*seen, loss][-WINDOW:], 0
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "since": dict(self._since),
            "said": list(self._said),
            "losses": list(self._losses),
            "high": self._high,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._since, self._said = dict(state["since"]), list(state["said"])
        self._losses, self._high = list(state["losses"]), state["high"]
