"""ADE20K in the layout of the SceneParsing challenge (ADEChallengeData2016).

- images/{training,validation}/*.jpg
- annotations/{training,validation}/*.png: 0 = other, k = the k-th class
- objectInfo150.txt: tab-separated, a header, then one class a line with its name last
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from dino_value.data.conventions import conventions
from dino_value.data.folders import list_images, read_image, read_labels
from dino_value.data.labelled import IGNORE, Kind, Split, file_groups
from dino_value.data.labels import header_remark
from dino_value.data.pixels import turned
from dino_value.errors import UserError

INFO_NAME = "objectInfo150.txt"
_IGNORED = "; what is ignored here is 0, not 255: replace it"


class ADE20K:
    """One split of ADE20K, or of any set in its layout; the class list is as long as objectInfo150.txt.

    Args:
        root: the ADEChallengeData2016 folder.
        split: `training` or `validation`.
        group_pattern, neighbours: see `labelled.file_groups`; the default group is the file's stem.
        check_pairs: False leaves a missing annotation to `load`, for a caller that goes on without the image.

    Raises:
        UserError: missing folders, or an image and an annotation that do not pair up.
    """

    kind: Kind = "seg"

    def __init__(
        self,
        root: str | Path,
        split: Split,
        group_pattern: str | None = None,
        neighbours: int = 1,
        check_pairs: bool = True,
    ) -> None:
        root = Path(root)
        images, annotations = root / "images" / split, root / "annotations" / split
        for folder in (root, images, annotations):
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; expected the ADEChallengeData2016 layout under {root}")
        self.class_names = read_class_names(root / INFO_NAME)
        self.num_classes = len(self.class_names)
        self._images = list_images(images)
        self._annotations = [annotations / path.relative_to(images).with_suffix(".png") for path in self._images]
        if check_pairs:
            for image, annotation in zip(self._images, self._annotations, strict=True):
                if not annotation.is_file():
                    raise UserError(f"{image}: its annotation {annotation} is missing")
            spare = set(list_images(annotations)) - set(self._annotations)
            if spare:
                raise UserError(f"{min(spare)}: no image in {images} belongs to this annotation")
        self._groups = file_groups(self._images, group_pattern, neighbours)
        self._told = conventions()

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """Image uint8 [3 H W] and labels int64 [H W]: 0 of the file becomes 255 (ignore), k becomes k − 1.

        Raises:
            UserError: an unreadable file, different sizes, or an id above the number of classes.
        """
        image, labels = read_image(self._images[index], self._told), self.target(index)
        if image.shape[-2:] != labels.shape:
            raise UserError(
                f"{self._annotations[index]}: {labels.shape[1]}×{labels.shape[0]} pixels, but its image has "
                f"{image.shape[-1]}×{image.shape[-2]}{turned(self._images[index], image, labels)}"
            )
        return image, labels

    def target(self, index: int) -> Tensor:
        """The labels alone.

        Raises:
            UserError: as `load`.
        """
        ids = read_labels(self._annotations[index])
        highest = int(ids.max())
        if highest > self.num_classes or int(ids.min()) < 0:
            wrong = highest if highest > self.num_classes else int(ids.min())
            raise UserError(
                f"{self._annotations[index]}: label id {wrong} is outside 0…{self.num_classes}, "
                f"the classes of {INFO_NAME}{_IGNORED if wrong == IGNORE else ''}"
            )
        return torch.where(ids == 0, IGNORE, ids - 1)

    def name(self, index: int) -> str:
        return str(self._images[index])

    def group(self, index: int) -> str:
        return self._groups[index]


def read_class_names(path: Path) -> list[str]:
    """The names of objectInfo150.txt, in label order.

    Raises:
        UserError: no such file, no class in it, or more than labels can tell from 255 (ignore).
    """
    try:
        header, *rest = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()] or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the class list ({error})") from None
    if not 0 < len(rest) <= IGNORE:
        raise UserError(f"{path}: lists {len(rest)} classes after its header; 1 to {IGNORE} are supported")
    odd = header_remark(header)
    if odd:
        warnings.warn(f"{path}: {odd}", stacklevel=3)
    return [line.split("\t")[-1].strip() for line in rest]
