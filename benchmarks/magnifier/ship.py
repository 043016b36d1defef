"""Write the files that ship, from what `benchmarks.magnifier.train` left.

python -m benchmarks.magnifier.ship --seed 0
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flexcore.hf.magnifier import MAGNIFIER

from . import train
from .arms import ARMS
from .loop import generator
from .scenes import CANVAS, NAMES, canvas
from .weights import HERE, ship

PACKAGE_BYTES, ARMS_BYTES = 4_000_000, 12_000_000
_CARD = """# Weights of the magnifier benchmark

Made by `python -m benchmarks.magnifier.train all` and `python -m benchmarks.magnifier.ship --seed {seed}`: {what}.
{canvas}Trained on digits of `sklearn.datasets.load_digits` and on photographs that scikit-image carries, public
domain or CC0. What they are and how they were trained is in `benchmarks/magnifier/README.md`; what they reach is in
`benchmarks/RESULTS.md`. Licence: Apache-2.0.
"""


def write_canvas(folder: Path, seed: int = 0) -> None:
    """The canvas that `examples/image.py` shows: the first whose frames fit into wide photos, too.

    Its digits are test digits. Its photograph is a validation one: those of the test split may not be shipped without
    naming their authors.

    Args:
        folder: Where `canvas.png` and `canvas.json` go.
        seed: Which canvases are drawn.
    """
    i = 0
    while True:
        scene = canvas(generator(seed, 7, i), "test", ground="val")
        frames = scene.frames()
        # in a photo of 3:2 tops come closer by as much, and frames must not touch
        at = frames[:, :2] * [0.6, 1.0]
        apart = np.abs(at[:, None] - at[None]).max(-1) + CANVAS * np.eye(len(at))
        if apart.min() > frames[0, 2] + 1:
            break
        i += 1
    scene.image.save(folder / "canvas.png", optimize=True)
    shown = [
        {"colour": NAMES[c], "digit": int(d), "box": [int(v) for v in (left, top, left + side, top + side)]}
        for (top, left, side), c, d in zip(frames, scene.colours, scene.digits, strict=True)
    ]
    (folder / "canvas.json").write_text(json.dumps({"seed": [seed, 7, i], "frames": shown}, indent=1) + "\n")


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="whose arms ship")
    args = parser.parse_args(argv)
    ship(train.FOLDER, MAGNIFIER, train.prepared_base(), args.seed)
    write_canvas(MAGNIFIER)
    (MAGNIFIER / "README.md").write_text(
        _CARD.format(
            seed=args.seed,
            what="the arm `flex`, in float16",
            canvas="`canvas.png`, for `examples/image.py`, has test digits on a photograph that validation used.\n",
        )
    )
    others = ", ".join(f"`{name}`" for name in ARMS if name != "flex")
    (HERE / "README.md").write_text(
        _CARD.format(
            seed=args.seed,
            what=f"what the arms {others} trained, and the readers of true crops, in bfloat16",
            canvas="",
        )
    )
    for folder, limit in ((MAGNIFIER, PACKAGE_BYTES), (HERE, ARMS_BYTES)):
        print(f"{folder}: {size(folder):,} bytes, at most {limit:,}")
        if size(folder) > limit:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
