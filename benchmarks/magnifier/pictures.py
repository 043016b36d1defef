"""Canvases as the frozen encoder sees them: features of the coarse view and of nine tiles, kept on disk.

The encoder never trains again, so a picture has to be encoded only once, whatever is asked about it and by whichever
arm. The views are the image adapter's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
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
from .scenes import COLOURS, DIGIT, Scene, canvas

ZOOM, REGION = 3, 3
COARSE, FINE = CELLS**2, (ZOOM * CELLS) ** 2
# What the image adapter lays out: blocks of three fine tokens that restart at every tile of eight.
GRID = flexcore.Grid.blocks((CELLS,) * 2, (ZOOM * CELLS,) * 2, REGION, tile=CELLS)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Encoded canvases and the answers to all questions about them.

    Args:
        features: `[n, 64 + 576, C]` float16, before the projector, coarse view first, both in raster order.
        digits: `[n, 2, 6]` answers by kind of question and colour named, -1 where there is none.
        boxes: `[n, 2, 6, 2]` top and left of the digit that is the answer, in canvas pixels.
    """

    features: np.ndarray
    digits: np.ndarray
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.features)

    def look_up(self, which: np.ndarray) -> Tensor:
        """`[B, 640, C]` float32 features of some pictures."""
        return torch.from_numpy(np.asarray(self.features[which], np.float32))


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
    """`digits` and `boxes` of `Pictures`."""
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


def make(model: Any, processor: Any, split: str, n: int, seed: int, progress: bool | None = None) -> Pictures:
    """Draw and encode canvases, in memory.

    Args:
        model: A LLaVA whose tower encodes.
        processor: Its processor.
        split: Whose digits and photographs.
        n: How many canvases.
        seed: Which ones; another seed draws others.
        progress: Show a bar; None shows one on a terminal.
    """
    features, digits, boxes = [], [], []
    hidden = None if progress is None else not progress
    for start in tqdm(range(0, n, 10), desc=f"pictures {split}", disable=hidden):
        scenes = [canvas(generator(seed, 5, i), split) for i in range(start, min(start + 10, n))]
        features.append(encode(model, processor, scenes))
        for found, more in zip((digits, boxes), answers(scenes), strict=True):
            found.append(more)
    return Pictures(np.concatenate(features), np.concatenate(digits), np.concatenate(boxes))


def cached(folder: Path, model: Any, processor: Any, split: str, n: int, seed: int) -> Pictures:
    """The same from disk, written there a part at a time if it isn't there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    ready = folder / "pictures.json"
    if not ready.exists():
        shape = (n, COARSE + FINE, model.config.vision_config.hidden_size)
        whole = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, shape)
        digits, boxes = [], []
        for start in tqdm(range(0, n, 10), desc=f"pictures {split}", disable=None):
            scenes = [canvas(generator(seed, 5, i), split) for i in range(start, min(start + 10, n))]
            whole[start : start + len(scenes)] = encode(model, processor, scenes)
            for found, more in zip((digits, boxes), answers(scenes), strict=True):
                found.append(more)
        whole.flush()
        np.save(folder / "digits.npy", np.concatenate(digits))
        np.save(folder / "boxes.npy", np.concatenate(boxes))
        ready.write_text(json.dumps({"split": split, "n": n, "seed": seed}))
    elif (found := json.loads(ready.read_text())) != {"split": split, "n": n, "seed": seed}:
        raise ValueError(
            f"{folder} holds pictures of {found}, asked for are split={split}, n={n}, seed={seed}"
        )
    return Pictures(
        np.load(folder / "features.npy", mmap_mode="r"),
        np.load(folder / "digits.npy"),
        np.load(folder / "boxes.npy"),
    )
