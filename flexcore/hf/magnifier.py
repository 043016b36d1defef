"""The trained model that ships with flexcore: a small LLaVA that reads digits of six pixels in coloured frames.

It was made by `benchmarks/magnifier`, where it is compared with coarse-only and dense models. It knows two questions,
"What is in the red frame?" and "What is in the frame left of red?", about red, green, blue, yellow, pink and cyan
frames, and answers with a digit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import WeightsMismatchError
from .pretrained import from_pretrained

MAGNIFIER = Path(__file__).parents[1] / "weights" / "magnifier"


def load_magnifier(folder: str | Path = MAGNIFIER) -> tuple[Any, Any]:
    """The wrapped model in eval mode and float32, and its processor.

    Args:
        folder: Where its files are; default: those in the package.

    Raises:
        WeightsMismatchError: The folder holds no such model.
    """
    import torch
    from transformers import AutoProcessor

    from . import conv_tower  # noqa: F401  makes the tower's name known to transformers

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise WeightsMismatchError(
            f"{folder} must hold the magnifier's config.json and weights; is the package complete?"
        )
    model = from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)
