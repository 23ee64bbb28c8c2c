"""What mmsegmentation's registries learn from us; importing this module registers it, as `custom_imports` does.

mmsegmentation 1.2.2 imports mmcv's compiled operators whether or not a model uses them. None of ours does, so mmcv-lite
suffices, with a stand-in for the compiled module while mmsegmentation is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_value.data.ade20k import INFO_NAME, read_class_names
from dino_value.data.folders import read_image
from dino_value.errors import Interrupted, UserError
from dino_value.eval.base import use_bfloat16
from dino_value.heads import IGNORE, LinearBNSegHead, feature_map
from dino_value.models.backbone import Backbone, Hidden, load_backbone

COMPILED = "mmcv._ext"


class _Absent(ModuleType):
    """Has every operator, and each one says when called that it is not there."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(f"{name} is a compiled operator of mmcv, and mmcv-lite has none: install the full mmcv")

        return missing


@contextmanager
def without_compiled_ops() -> Iterator[None]:
    """Imports inside find a stand-in for mmcv's compiled operators, where there are none."""
    stand_in = importlib.util.find_spec("mmcv") is not None and importlib.util.find_spec(COMPILED) is None
    if stand_in:
        sys.modules[COMPILED] = _Absent(COMPILED)
    try:
        yield
    finally:
        if stand_in:
            del sys.modules[COMPILED]


with without_compiled_ops():
    from mmengine.hooks import Hook
    from mmengine.model import BaseModule
    from mmseg.datasets import ADE20KDataset
    from mmseg.evaluation import IoUMetric
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    from mmseg.registry import DATASETS, HOOKS, METRICS, MODELS, TRANSFORMS


@MODELS.register_module()
class DinoValueBackbone(BaseModule):
    """A backbone of ours, or any ViT that `load_backbone` reads, as mmsegmentation wants one.

    Args:
        weights: a run folder or a weights file; or a backbone that has been loaded, which stays the caller's.
        model: timm name, for a file that does not name its architecture.
        out_indices: blocks whose patches are returned, each after the final norm; negative ones count from the end.
        frozen: no gradients, and eval mode throughout.
        bf16: run a frozen backbone in bfloat16; None: on CUDA, not on a CPU.
        img_size: what a table of positions is made for, if the weights bring none.

    Raises:
        UserError: weights that cannot be used; a block that the backbone does not have.
    """

    def __init__(
        self,
        weights: str | Path | Backbone | None = None,
        model: str | None = None,
        out_indices: Sequence[int] = (-1,),
        frozen: bool = True,
        bf16: bool | None = None,
        img_size: int = 512,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(init_cfg)
        if weights is None:
            raise UserError("DinoValueBackbone: set model.backbone.weights to a run folder or a weights file")
        loaded = isinstance(weights, Backbone)
        self.backbone = weights if isinstance(weights, Backbone) else load_backbone(weights, model, img_size)
        depth = self.backbone.depth
        self.out_indices = [index + depth if index < 0 else index for index in out_indices]
        if (
            self.out_indices != sorted(set(self.out_indices))
            or not 0 <= self.out_indices[0] <= self.out_indices[-1] < depth
        ):
            raise UserError(f"out_indices={tuple(out_indices)}: give blocks in ascending order, 0 … {depth - 1}")
        self.frozen, self.bf16 = frozen, bf16
        if frozen and not loaded:
            self.backbone.requires_grad_(False)
        self.train()

    def init_weights(self) -> None:
        """Nothing: they are loaded."""

    def train(self, mode: bool = True) -> DinoValueBackbone:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """RGB images in 0 … 255, float [B 3 H W], to a map [B D h w] for each of `out_indices`."""
        if not self.frozen:
            return self._maps(images)
        lowered = use_bfloat16(self.bf16, images.device)
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=lowered):
            return self._maps(images)

    def _maps(self, images: Tensor) -> tuple[Tensor, ...]:
        hidden: Tensor | Hidden = self.backbone.normalise(images / 255)
        maps, start = [], 0
        for index in self.out_indices:
            hidden = self.backbone(hidden, start=start, stop=index + 1)
            start = index + 1
            features = self.backbone(hidden, start=self.backbone.depth)  # past the last block: the norm alone
            maps.append(feature_map(features.patches, features.grid).float())
        return tuple(maps)


@MODELS.register_module()
class LinearBN(BaseDecodeHead):
    """`heads.LinearBNSegHead` as a decode head, under the name `head`; without dropout unless asked for."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"dropout_ratio": 0.0, "init_cfg": None, **kwargs})
        self.head = LinearBNSegHead(self.in_channels, self.out_channels, self.dropout_ratio)
        del self.conv_seg  # the base's own classifier

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        return self.head(self._transform_inputs(inputs))


@DATASETS.register_module()
class ChallengeADE20K(ADE20KDataset):
    """mmsegmentation's ADE20KDataset with the classes of objectInfo150.txt, however many.

    ADE20KDataset itself maps labels by the names of its own 150 classes; a smaller set in this layout has others.

    Args:
        classes: names in label order; None reads them from `data_root`.

    Raises:
        UserError: an image or annotation that cannot be read, once it is asked for.
    """

    METAINFO: ClassVar[dict[str, Any]] = {}

    def __init__(self, classes: Sequence[str] | None = None, **kwargs: Any) -> None:
        names = read_class_names(Path(kwargs["data_root"]) / INFO_NAME) if classes is None else classes
        super().__init__(metainfo={"classes": tuple(names)}, **kwargs)

    def get_data_info(self, idx: int) -> dict[str, Any]:
        return {**super().get_data_info(idx), "num_classes": len(self.metainfo["classes"])}

    def prepare_data(self, idx: int) -> Any:
        try:
            return super().prepare_data(idx)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            paths = [self.get_data_info(idx)[key] for key in ("img_path", "seg_map_path")]
            raise UserError(f"{' or '.join(paths)} cannot be read ({error})") from None


@TRANSFORMS.register_module()
class ReadImage:
    """Our reader in place of LoadImageFromFile, which clips 16 bits and lays a grey ground under transparent pixels.

    Raises:
        UserError: an image that cannot be read.
    """

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        image = read_image(results["img_path"]).numpy()[::-1]  # OpenCV's order of colours
        size = image.shape[1:]
        return {**results, "img": np.ascontiguousarray(image.transpose(1, 2, 0)), "img_shape": size, "ori_shape": size}


@TRANSFORMS.register_module()
class CheckLabels:
    """Refuse what mmsegmentation would silently resize or leave out of the counts; goes after LoadAnnotations.

    Raises:
        UserError: image and labels of different size, or an id above the number of classes.
    """

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        labels, path = results["gt_seg_map"], results["seg_map_path"]
        if labels.shape != tuple(results["ori_shape"]):
            sizes = ["x".join(map(str, shape)) for shape in (labels.shape, results["ori_shape"])]
            raise UserError(f"{path}: {sizes[0]} pixels, but its image has {sizes[1]}; they must agree")
        highest = int(labels[labels != IGNORE].max(initial=0))
        if highest >= results["num_classes"]:
            raise UserError(f"{path}: label id {highest + 1} is outside 0…{results['num_classes']}")
        return results


@METRICS.register_module()
class ExactIoU(IoUMetric):
    """mmsegmentation's IoU, not rounded to two digits, with what each image contributes and the cross-entropy.

    Args:
        keep: hold on to the predictions of the first so many images.

    Attributes:
        rows: float64 [n 3C], hits, true and predicted pixels of each image, after an evaluation.
        kept: the predictions, int64 [H W].
    """

    def __init__(self, keep: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keep = keep
        self.rows = torch.empty(0)
        self.kept: list[Tensor] = []

    def process(self, data_batch: dict[str, Any], data_samples: Sequence[dict[str, Any]]) -> None:
        super().process(data_batch, data_samples)
        for place, sample in enumerate(data_samples, len(self.results) - len(data_samples)):
            logits, labels = sample["seg_logits"]["data"], sample["gt_sem_seg"]["data"].squeeze(0)
            loss = F.cross_entropy(logits[None], labels[None].to(logits.device), ignore_index=IGNORE, reduction="sum")
            self.results[place] = (*self.results[place], loss.double().cpu())
            if len(self.kept) < self.keep:
                self.kept.append(sample["pred_sem_seg"]["data"].squeeze(0).cpu())

    def compute_metrics(self, results: list[tuple[Tensor, ...]]) -> dict[str, float]:
        """As `dino_value.eval.seg.evaluate` names them."""
        hit, union, predicted, true, loss = (torch.stack(part).double() for part in zip(*results, strict=True))
        self.rows = torch.cat([hit, true, predicted], 1)
        pixels = true.sum()
        if not pixels:
            raise UserError("the validation split has no labelled pixel: every one is to be ignored")
        found = self.total_area_to_metrics(*(part.sum(0) for part in (hit, union, predicted, true)), ["mIoU"])
        names = self.dataset_meta["classes"]
        return {
            "miou": float(np.nanmean(found["IoU"])),
            "macc": float(np.nanmean(found["Acc"])),
            "aacc": float(found["aAcc"]),
            "loss": float(loss.sum() / pixels),
            **{f"iou/{name}": float(value) for name, value in zip(names, found["IoU"], strict=True)},
        }


@HOOKS.register_module()
class PlainCheckpoint(Hook):
    """Keeps mmengine's log out of checkpoints: torch.load refuses its classes (weights only, torch 2.6 and later)."""

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}


class Watch(Hook):
    """Tells the progress, and ends a training by a checkpoint when asked to; after all other hooks.

    Args:
        progress: gets the number of steps done.
        stopping: whether to stop.
    """

    def __init__(self, progress: Callable[[int], None], stopping: Callable[[], bool]) -> None:
        self.progress, self.stopping = progress, stopping

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        step = runner.iter + 1
        self.progress(step)
        if self.stopping():
            path = Path(runner.work_dir, f"iter_{step}.pth")
            runner.save_checkpoint(str(path.parent), path.name, by_epoch=False)
            path.with_name("last_checkpoint").write_text(str(path), encoding="utf-8")
            raise Interrupted(f"{path} holds {step} of {runner.max_iters} head steps; add --resume")
