"""Cutting pictures into tiles and pasting the tiles' feature maps together: plain tensor arithmetic."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def cut_tiles(images: Tensor, rows: int, cols: int) -> Tensor:
    """Cut every image into rows x cols tiles of one size.

    Args:
        images: `[B, C, H, W]`, any dtype.
        rows: Tiles from top to bottom.
        cols: Tiles from left to right.

    Returns:
        `[B * rows * cols, C, H / rows, W / cols]`: image after image, each in raster order.

    Raises:
        ValueError: The image isn't a whole number of tiles.
    """
    if images.ndim != 4 or images.shape[2] % rows or images.shape[3] % cols:
        raise ValueError(
            f"images must be [B, C, H, W] with H, W multiples of {(rows, cols)}, got {list(images.shape)}"
        )
    tiles = images.unflatten(3, (cols, -1)).unflatten(2, (rows, -1))
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def paste_tiles(features: Tensor, rows: int, cols: int) -> Tensor:
    """Put the tiles' square feature maps back where the tiles came from.

    Args:
        features: `[B * rows * cols, n * n, C]`, tiles in the order of `cut_tiles`, each map in raster order.
        rows: Tiles from top to bottom.
        cols: Tiles from left to right.

    Returns:
        `[B, rows * n * cols * n, C]`: one map per image in raster order.

    Raises:
        ValueError: A map isn't square, or there isn't a whole number of images.
    """
    side = math.isqrt(features.shape[1]) if features.ndim == 3 else 0
    if side == 0 or side * side != features.shape[1] or features.shape[0] % (rows * cols):
        raise ValueError(
            f"features must be [B * {rows * cols}, n * n, C] for {rows} x {cols} tiles, got {list(features.shape)}"
        )
    maps = features.unflatten(1, (side, side)).unflatten(0, (-1, rows, cols))
    return maps.permute(0, 1, 3, 2, 4, 5).flatten(1, 4)


def downscale(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Shrink images as the official code makes its coarse view: bilinear with antialiasing.

    Args:
        images: `[B, C, H, W]` floats.
        size: Target side, or `(height, width)`.
    """
    size = (size, size) if isinstance(size, int) else size
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
