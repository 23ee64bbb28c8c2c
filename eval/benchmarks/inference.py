"""What `eval/throughput.py` times of evaluation: ours beside the plain ways that are common in published code.

- *segmentation*: windows in batches, logits merged in bands, counts on the device; against one window at a time, its
  logits at full resolution, summed on the host (as mmsegmentation's `slide_inference` with results moved to the host);
- *linear evaluation*: features computed once and kept; against computing them anew in each epoch;
- *a large image*: peak memory of segmenting it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_value.data.labelled import IGNORE, LabelledTensors
from dino_value.data.scenes import scenes
from dino_value.eval import common, linear, seg
from dino_value.eval.benchmarks.timing import CLASSES, Case
from dino_value.heads import build_head
from dino_value.models.backbone import Backbone

EPOCHS = 20
NAMES = [str(number) for number in range(CLASSES)]


def segmentation_source(height: int, width: int, count: int) -> LabelledTensors:
    """`count` scenes of that size with noise of ADE20K's 150 classes as labels."""
    drawn = scenes("unlabeled", 64, count).images.float()
    images = F.interpolate(drawn, (height, width), mode="bilinear").byte()
    cells = torch.randint(CLASSES, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    return LabelledTensors("seg", images, F.interpolate(cells, (height, width))[:, 0].long(), NAMES)


class Segmentation:
    """A backbone with a random linear head, and the two ways to score it.

    Args:
        window: side of the windows, pixels; they are two thirds of it apart.
        scale: of the images' shorter side over the window's; 1 is the protocol's.
        bf16: the backbone in bfloat16.
    """

    def __init__(
        self,
        backbone: Backbone,
        source: LabelledTensors,
        window: int,
        device: str,
        scale: float = 1.0,
        bf16: bool = False,
    ) -> None:
        self.source = source
        self.options = seg.SegOptions(size=(window, window), device=device, scales=(scale,), bf16=bf16)
        self.extractor = common.FrozenBackbone(backbone, seg.read_map, self.options)
        backbone.to(self.extractor.device).eval()
        head = common.seeded(lambda: build_head(seg.HEADS["linear"], backbone.embed_dim, CLASSES), 0)
        self.head: nn.Module = head.to(self.extractor.device).eval()
        self.dataset = seg.Scaled(source, self.options, backbone.patch_size)
        self.grids = [self.dataset.grid(self.dataset[index, common.FIXED][0][0]) for index in range(len(source))]

    @property
    def windows(self) -> int:
        return sum(map(len, self.grids))

    def ours(self) -> float:
        """Mean IoU of the images."""
        return seg.score(self.extractor, self.head, self.source, self.options).metrics["miou"]

    @torch.no_grad()
    def one_at_a_time(self) -> float:
        """The same."""
        confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
        for index, grid in enumerate(self.grids):
            (image,), labels = self.dataset[index, common.FIXED][0], self.source.load(index)[1]
            total, count = torch.zeros(CLASSES, *grid.size), torch.zeros(grid.size)
            height, width = grid.window
            for top in grid.tops:
                for left in grid.lefts:
                    place = (slice(top, top + height), slice(left, left + width))
                    coarse = self.head(self.extractor(image[None, :, place[0], place[1]]))
                    total[:, place[0], place[1]] += F.interpolate(coarse, grid.window, mode="bilinear")[0].cpu()
                    count[place] += 1
            total = F.interpolate((total / count)[None], tuple(labels.shape), mode="bilinear")[0]
            prediction, valid = total.argmax(0), labels != IGNORE
            cells = labels[valid] * CLASSES + prediction[valid]
            confusion += torch.bincount(cells, minlength=CLASSES**2).view(CLASSES, CLASSES)
        return seg.scores_of(confusion, NAMES)["miou"]


class Linear:
    """A linear evaluation of EPOCHS epochs on a few images."""

    def __init__(self, backbone: Backbone, size: int, count: int, device: str) -> None:
        images = scenes("unlabeled", size, count).images
        self.source = LabelledTensors("classes", images, torch.arange(count) % 10, NAMES[:10])
        batch = max(2, count // 4)
        steps = EPOCHS * count // batch
        self.options = linear.LinearOptions(size=(size, size), batch=batch, steps=steps, device=device)
        self.extractor = common.FrozenBackbone(backbone, linear.POOLS["cls"], self.options)
        backbone.to(self.extractor.device).eval()

    def fit(self, cache: bool) -> Tensor:
        """The head's weights, flat."""
        options = self.options if cache else replace(self.options, cache_gb=0.0)
        _, head = linear.fit(self.extractor, self.source, options)
        return torch.cat([value.detach().flatten().cpu() for value in head.parameters()])


def case(name: str, work: Callable[[], object]) -> Case:
    return Case(name, lambda: work)
