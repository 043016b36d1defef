"""Write the files that ship, from what `benchmarks.magnifier.train` left.

python -m benchmarks.magnifier.ship --seed 0
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flexcore.hf.magnifier import MAGNIFIER

from . import train
from .arms import ARMS
from .weights import HERE, ship

PACKAGE_BYTES, ARMS_BYTES = 4_000_000, 12_000_000
_CARD = """# Weights of the magnifier benchmark

Made by `python -m benchmarks.magnifier.train all` and `python -m benchmarks.magnifier.ship --seed {seed}`: {what}.
Trained on digits of `sklearn.datasets.load_digits` and on photographs that scikit-image carries, public domain or CC0.
What they are and how they were trained is in `benchmarks/magnifier/README.md`; what they reach is in
`benchmarks/RESULTS.md`. Licence: Apache-2.0.
"""


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="whose arms ship")
    args = parser.parse_args(argv)
    ship(train.FOLDER, MAGNIFIER, train.prepared_base(), args.seed)
    (MAGNIFIER / "README.md").write_text(_CARD.format(seed=args.seed, what="the arm `flex`, in float16"))
    others = ", ".join(f"`{name}`" for name in ARMS if name != "flex")
    (HERE / "README.md").write_text(
        _CARD.format(
            seed=args.seed, what=f"what the arms {others} trained, and the readers of true crops, in bfloat16"
        )
    )
    for folder, limit in ((MAGNIFIER, PACKAGE_BYTES), (HERE, ARMS_BYTES)):
        print(f"{folder}: {size(folder):,} bytes, at most {limit:,}")
        if size(folder) > limit:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
