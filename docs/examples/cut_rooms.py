"""A tuning split, so that no setting is chosen on held-out rooms: every fourth room of the training sets becomes its
validation split, the other rooms its training split.

    python docs/examples/cut_rooms.py ROOMS OUT

ROOMS has the rooms' layout (imagefolder, ADEChallengeData2016, nyu), four views of a room in a row; OUT gets the same
layout, with links to the images, and stands in for it. The unlabeled views stay as they are: their labels are not read.
"""

import shutil
import sys
from pathlib import Path

from scipy.io import loadmat, savemat

VIEWS, EVERY = 4, 4


def part_of(position: int) -> str:
    """Of the item in this place of a training set."""
    return "validation" if position // VIEWS % EVERY == EVERY - 1 else "training"


def cut_ade20k(root: Path, out: Path) -> None:
    for kind in ("images", "annotations"):
        for part in ("training", "validation"):
            (out / kind / part).mkdir(parents=True)
        for position, path in enumerate(sorted((root / kind / "training").iterdir())):
            (out / kind / part_of(position) / path.name).symlink_to(path.resolve())
    shutil.copy(root / "objectInfo150.txt", out)


def cut_nyuv2(root: Path, out: Path) -> None:
    out.mkdir(parents=True)
    name = "nyu_depth_v2_labeled.mat"
    (out / name).symlink_to((root / name).resolve())
    indices = sorted(int(index) for index in loadmat(root / "splits.mat")["trainNdxs"].ravel())
    parts = {
        part: [index for position, index in enumerate(indices) if part_of(position) == part]
        for part in ("training", "validation")
    }
    savemat(out / "splits.mat", {"trainNdxs": parts["training"], "testNdxs": parts["validation"]})


if __name__ == "__main__":
    rooms, target = map(Path, sys.argv[1:3])
    cut_ade20k(rooms / "ADEChallengeData2016", target / "ADEChallengeData2016")
    cut_nyuv2(rooms / "nyu", target / "nyu")
    (target / "imagefolder").symlink_to((rooms / "imagefolder").resolve())
