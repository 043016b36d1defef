"""Encoding tiles with a vision tower that takes pictures of any size (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).

Such a tower sees patches, a few frames deep, and its merger makes one token of the decoder's width of every square
of patches: a *cell*. Pictures of any whole number of cells share one call, one after the other. A tile is a picture
of its own there (or a clip of one step of time): nothing outside of it is seen, and its positions begin at its corner.

Qwen3-VL's tower also makes features that its decoder adds to the coarse tokens in its first layers (deepstack). Fine
tokens are never in the decoder's sequence, so they have the merged features alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexcore.errors import StreamError, UnsupportedModelError

from .image_tower import tower_device


@dataclass(frozen=True)
class Cell:
    """What one token of the tower shows.

    Args:
        patch: Side of a patch in pixels.
        merge: Patches that are merged into one token, per side.
        stack: Frames of one step of time; a picture is that many copies of itself.
    """

    patch: int
    merge: int
    stack: int

    @property
    def side(self) -> int:
        """Side in pixels."""
        return self.patch * self.merge

    def grid(self, steps: int, rows: int, cols: int) -> list[int]:
        """What the processor calls `grid_thw`: steps of time and patches of a picture of that many cells."""
        return [steps, rows * self.merge, cols * self.merge]

    def budget(self, coarse_pixels: int | None, cells: int) -> int:
        """Pixels of a coarse view.

        Args:
            coarse_pixels: What was asked for, or None.
            cells: What it gets if that is None.

        Raises:
            ValueError: It isn't an integer, or doesn't allow for one cell.
        """
        area = self.side**2
        if coarse_pixels is None:
            return cells * area
        if isinstance(coarse_pixels, bool) or not isinstance(coarse_pixels, int) or coarse_pixels < area:
            raise ValueError(
                f"coarse_pixels must be an integer that allows for one token, which shows {self.side}x{self.side} = "
                f"{area} pixels; got {coarse_pixels!r}"
            )
        return coarse_pixels


def takes_any_size(model: Any) -> bool:
    """Whether the model's vision tower is one of this kind."""
    vision = getattr(getattr(model, "config", None), "vision_config", None)
    fields = ("patch_size", "spatial_merge_size", "temporal_patch_size")
    return hasattr(_inner(model), "visual") and all(isinstance(getattr(vision, f, None), int) for f in fields)


def cell_of(model: Any, processor: Any, part: str) -> Cell:
    """What a token of the model's tower shows.

    Args:
        model: The model.
        processor: Its own processor.
        part: `image_processor` or `video_processor`.

    Raises:
        UnsupportedModelError: The model has no such tower.
        ValueError: The processor isn't the model's.
    """
    name = type(model).__name__
    if not takes_any_size(model):
        raise UnsupportedModelError(
            f"{name} has no vision tower that takes pictures of any size (model.visual, and config.vision_config "
            "with patch_size, spatial_merge_size and temporal_patch_size)"
        )
    settings = getattr(processor, part, None)
    if settings is None:
        article = "an" if part.startswith("image") else "a"
        raise ValueError(
            f"processor must be {name}'s own, with {article} {part}; got {type(processor).__name__}"
        )
    vision = model.config.vision_config
    cell = Cell(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    theirs = {"patch_size": cell.patch, "merge_size": cell.merge, "temporal_patch_size": cell.stack}
    for field, value in theirs.items():
        if getattr(settings, field, None) != value:
            raise ValueError(
                f"processor.{part}.{field} is {getattr(settings, field, None)} and the vision tower's is {value}; "
                f"they must be equal for the processor to make one token per cell: is it {name}'s own?"
            )
    return cell


def tower_of(model: Any) -> Any:
    """The model's vision tower."""
    return _inner(model).visual


def fit_cells(height: int, width: int, side: int, most: int, least: int = 0) -> tuple[int, int]:
    """Rows and columns of cells for a picture, by the processors' own rule: its shape kept as closely as cells allow.

    A picture with less than `most` pixels isn't enlarged, unless it has less than `least`.

    Args:
        height: Of the picture in pixels.
        width: Of the picture in pixels.
        side: Of a cell in pixels.
        most: The most pixels that the cells may have; one cell at least.
        least: The fewest, unless that would be more than `most`.

    >>> fit_cells(600, 800, side=28, most=256 * 28 * 28)
    (13, 18)
    """
    area = side * side
    least = max(least, area)
    rows, cols = round(height / side), round(width / side)
    if rows * cols * area < least:
        scale = math.sqrt(least / (height * width))
        rows, cols = math.ceil(height * scale / side), math.ceil(width * scale / side)
    if rows * cols * area > most:
        scale = math.sqrt(height * width / most)
        rows, cols = max(1, int(height / scale / side)), max(1, int(width / scale / side))
    # what is thinner than a cell still takes one, at the expense of its length
    return min(rows, most // area // min(rows, cols)), min(cols, most // area // min(rows, cols))


def as_is(settings: Any) -> dict[str, Any]:
    """Arguments of an image or video processor that leave the pixels' number alone."""
    # the cap is a matter of resizing, but releases that have it warn when nobody has decided on it
    off = [n for n in ("do_resize", "do_sample_frames", "cap_pixels_per_frame") if hasattr(settings, n)]
    return {"input_data_format": "channels_first", **dict.fromkeys(off, False)}


@torch.no_grad()
def encode_native(model: Any, settings: Any, tiles: Sequence[Tensor], cell: Cell) -> Tensor:
    """Features of tiles, each encoded on its own, all in one call of the tower.

    The processor itself normalises them and cuts them into patches.

    Args:
        model: The model.
        settings: Its image or video processor.
        tiles: `[3, height, width]` uint8 for pictures, `[stack, 3, height, width]` for one step of time; whole numbers
            of cells, and each of its own shape.
        cell: What a token shows.

    Returns:
        `[k, tokens, C]` in the tower's dtype, on its device: a tile's cells in raster order, and zeros after those of
        the smaller tiles.

    Raises:
        StreamError: The tower makes another number of features.
    """
    clips = tiles[0].ndim == 4
    made = settings(list(tiles), return_tensors="pt", **as_is(settings))
    if clips:
        pixels, grid = made["pixel_values_videos"], made["video_grid_thw"]
    else:
        pixels, grid = made["pixel_values"], made["image_grid_thw"]
    tower = tower_of(model)
    device = tower_device(tower)
    pixels, grid = pixels.to(device, tower.dtype), grid.to(device)
    if clips:
        encoded = model.get_video_features(pixel_values_videos=pixels, video_grid_thw=grid)
    else:
        encoded = model.get_image_features(pixel_values=pixels, image_grid_thw=grid)
    features = list(encoded.pooler_output)
    for tile, found in zip(tiles, features, strict=True):
        rows, cols = (side // cell.side for side in tile.shape[-2:])
        if found.ndim != 2 or len(found) != rows * cols:
            raise StreamError(
                f"the vision tower makes {list(found.shape[:-1])} features of a tile of {rows}x{cols} cells"
            )
    return torch.nn.utils.rnn.pad_sequence(features, batch_first=True)


def _inner(model: Any) -> Any:
    return getattr(model, "model", model)
