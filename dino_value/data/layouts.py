"""Labelled data sets by the layout of their files: which reader opens which."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal, get_args

from dino_value.data import ade20k, folders, nyuv2, scenes
from dino_value.data.conventions import conventions
from dino_value.data.labelled import LabelledSource, Split, readable
from dino_value.data.labels import oddities
from dino_value.errors import UserError

Layout = Literal["ade20k", "nyuv2", "imagefolder"]


def open_labelled(
    layout: Layout,
    path: str | Path,
    split: Split = "training",
    *,
    group_pattern: str | None = None,
    neighbours: int = 1,
    skip_unreadable: bool = False,
    check_pairs: bool = True,
    warn: bool = True,
) -> LabelledSource:
    """Open one split of a labelled data set.

    Args:
        layout: how the files lie.
        path: the root of the data set (ADEChallengeData2016, the folder of nyu_depth_v2_labeled.mat, or a
            folder with train/ and val/), or "scenes" for the embedded set.
        split: `training` or `validation`.
        group_pattern, neighbours: see `file_groups`.
        skip_unreadable: read everything once and leave out what cannot be used: the `Subset` that is returned says
            in `skipped` what and why.
        check_pairs: refuse files without their other half now, not when they are loaded.
        warn: look at some of the files, and say in a warning what is odd about them and what is assumed.

    Raises:
        UserError: no such data, or data that does not follow the layout.
    """
    if layout not in get_args(Layout):
        raise UserError(f"unknown labelled layout {layout!r}; choose one of {', '.join(get_args(Layout))}")
    if split not in get_args(Split):
        raise UserError(f"unknown split {split!r}; choose training or validation")
    if str(path) == "scenes":
        if conventions().channels != 3:
            raise UserError(f"scenes: the embedded images have 3 channels, the backbone takes {conventions().channels}")
        return scenes.labelled(layout, split)
    check_pairs = check_pairs and not skip_unreadable
    source: LabelledSource
    if layout == "ade20k":
        source = ade20k.ADE20K(path, split, group_pattern, neighbours, check_pairs=check_pairs)
    elif layout == "nyuv2":
        source = nyuv2.open_nyuv2(path, split, neighbours, check_pairs=check_pairs)
    else:
        source = folders.open_imagefolder(path, split, group_pattern, neighbours)
    if warn and layout != "imagefolder":
        for text in oddities(source, split == "training", getattr(source, "target", None)):
            warnings.warn(f"{path}: {text}", stacklevel=2)
    return readable(source) if skip_unreadable else source
