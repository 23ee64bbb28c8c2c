"""A tuning split of a folder of image classes, so that no setting is chosen on held-out images: every fifth image of
each training class becomes its validation split, the others its training split.

    python docs/examples/cut_classes.py CLASSES OUT

CLASSES holds train/ and val/, one sub-folder a class; OUT gets the same layout, with links to images of train/ alone.
"""

import sys
from pathlib import Path

EVERY = 5


def cut(root: Path, out: Path) -> None:
    for folder in sorted(path for path in (root / "train").iterdir() if path.is_dir()):
        for position, path in enumerate(sorted(folder.iterdir())):
            target = out / ("val" if position % EVERY == EVERY - 1 else "train") / folder.name
            target.mkdir(parents=True, exist_ok=True)
            (target / path.name).symlink_to(path.resolve())


if __name__ == "__main__":
    cut(*map(Path, sys.argv[1:3]))
