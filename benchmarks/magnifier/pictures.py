"""Canvases as the frozen encoder sees them: features of the coarse view and of nine tiles, kept on disk.

The encoder never trains again, so a picture has to be encoded only once, whatever is asked about it and by whichever
arm. The views are the image adapter's own.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import flexcore
from flexcore_adapters.image_tower import normalise
from flexcore_adapters.tiling import paste_tiles

from .encoder import CELLS, PATCH
from .loop import generator
from .questions import KINDS
from .scenes import CANVAS, COLOURS, DIGIT, Scene, canvas
from .task import PLACES, Close, Encoded, kept

ZOOM, REGION = 3, 3
COARSE, FINE = CELLS**2, (ZOOM * CELLS) ** 2
# What the image adapter lays out: blocks of three fine tokens that restart at every tile of eight.
GRID = flexcore.Grid.blocks((CELLS,) * 2, (ZOOM * CELLS,) * 2, REGION, tile=CELLS)


def touched(boxes: Tensor, side: int = DIGIT) -> Tensor:
    """`[..., n_regions]` bool: regions that boxes `[..., 2]` (top and left in canvas pixels) touch."""
    axes = []
    for axis, edges in enumerate(GRID.edges):
        pixels, start = PATCH * torch.tensor(edges), boxes[..., axis, None]
        axes.append((pixels[:-1] < start + side) & (pixels[1:] > start))
    return (axes[0][..., :, None] & axes[1][..., None, :]).flatten(-2)


@torch.no_grad()
def encode(model: Any, processor: Any, scenes: list[Scene]) -> np.ndarray:
    """`[n, 640, C]` float16, the encoder's features of some scenes, in the image adapter's views."""
    adapter = flexcore.load_adapter("image", model, processor, zoom=ZOOM, region_size=REGION)
    views = adapter.views([scene.image for scene in scenes])
    coarse = np.stack([np.asarray(view.coarse) for view in views])
    shown = torch.cat([torch.from_numpy(coarse).permute(0, 3, 1, 2), *(view.tiles() for view in views)])
    maps = model.model.vision_tower(normalise(processor.image_processor, shown)).last_hidden_state
    n = len(scenes)
    fine = paste_tiles(maps[n:], ZOOM, ZOOM)
    return torch.cat([maps[:n], fine], dim=1).to(torch.float16).numpy()


def targets(scenes: list[Scene]) -> np.ndarray:
    """`[n, 2, 6]` colour of the frame that each question is about, -1 where there is none."""
    out = np.full((len(scenes), len(KINDS), len(COLOURS)), -1)
    for i, scene in enumerate(scenes):
        for k, kind in enumerate(KINDS):
            for colour in range(len(COLOURS)):
                if (target := scene.target(colour, kind)) is not None:
                    out[i, k, colour] = scene.colours[target]
    return out


def answers(scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """`digits` `[n, 2, 6]` by kind of question and colour named, -1 for none, and `boxes`, in canvas pixels."""
    digits = np.full((len(scenes), len(KINDS), len(COLOURS)), -1)
    boxes = np.zeros((*digits.shape, 2), np.int64)
    for i, scene in enumerate(scenes):
        for k, kind in enumerate(KINDS):
            for colour in range(len(COLOURS)):
                target = scene.target(colour, kind)
                if target is not None:
                    digits[i, k, colour] = scene.digits[target]
                    boxes[i, k, colour] = scene.boxes[target, :2]
    return digits, boxes


def found(pictures: Encoded) -> Close:
    """Where everything is in encoded canvases, for what the coarse view alone shows."""
    boxes = pictures.boxes
    same = (boxes[:, :, :, None] == boxes[:, :1, None]).all(
        -1
    )  # each answer's box among those of the six frames
    aims = np.where(pictures.digits >= 0, same.argmax(-1), -1)
    columns = (boxes[:, :1, :, 1] + DIGIT // 2) * PLACES // CANVAS
    coarse = torch.from_numpy(np.asarray(pictures.features[:, :COARSE], np.float32))
    return Close(coarse, pictures.digits, aims, columns.repeat(len(KINDS), axis=1))


def drawn(
    model: Any, processor: Any, split: str, seed: int, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, digits and boxes of some canvases, as `Encoded` takes them.

    Args:
        model: A LLaVA whose tower encodes.
        processor: Its processor.
        split: Whose digits and photographs.
        seed: Which canvases; another seed draws others.
        start: The first.
        stop: The one after the last.
    """
    scenes = [canvas(generator(seed, 5, i), split) for i in range(start, stop)]
    return encode(model, processor, scenes), *answers(scenes)


def make(model: Any, processor: Any, split: str, n: int, seed: int, progress: bool | None = None) -> Encoded:
    """Draw and encode the first `n` canvases in memory; see `drawn`. A bar is shown on a terminal, if not told."""
    hidden = None if progress is None else not progress
    starts = tqdm(range(0, n, 10), desc=f"pictures {split}", disable=hidden)
    parts = [drawn(model, processor, split, seed, start, min(start + 10, n)) for start in starts]
    return Encoded(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def cached(folder: Path, model: Any, processor: Any, split: str, n: int, seed: int) -> Encoded:
    """The same from disk, written there a part at a time if it isn't there yet."""
    shape = (n, COARSE + FINE, model.config.vision_config.hidden_size)
    return kept(
        folder, {"split": split, "n": n, "seed": seed}, shape, partial(drawn, model, processor, split, seed)
    )
