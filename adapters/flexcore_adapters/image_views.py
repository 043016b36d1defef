"""The views of one picture: the coarse one for the processor, the fine one to cut into tiles, and their lattice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flexcore.grid import Grid
from flexcore.hf.processing import View

from .tiling import cut_tiles

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

# Pixels of the padded square that are held at once, and the most that its squeezed form may have.
_STRIP = 1 << 24
_SQUEEZED = 1 << 27
# A layout may stretch the picture this much more than the best one if that buys tiles.
_STRETCH = math.log(1.1)


@dataclass(frozen=True, eq=False)
class ImageView(View):
    """One picture at both resolutions.

    Args:
        grid: Its lattice.
        coarse: The coarse view, a PIL image of the encoder's side.
        pixels: `[3, rows * side, cols * side]` uint8, the fine view.
        rows: Tiles from top to bottom.
        cols: Tiles from left to right.
    """

    pixels: Tensor
    rows: int
    cols: int

    def tiles(self, indices: Tensor | None = None) -> Tensor:
        """`[k, 3, side, side]` uint8: the given tiles, or all of them, in raster order."""
        tiles = cut_tiles(self.pixels[None], self.rows, self.cols)
        return tiles if indices is None else tiles[indices]

    def describe(self, tile: int) -> str:
        """Where a tile lies, for messages."""
        return (
            f"row {tile // self.cols + 1} and column {tile % self.cols + 1} of {self.rows}x{self.cols} tiles"
        )

    def tiles_of(self, regions: Tensor) -> Tensor:
        """`[k]` ascending indices of the tiles that hold any fine token of the given `[n]` regions."""
        tokens = self.grid.tokens(regions)
        tokens = tokens[tokens >= 0]
        height, width = self.grid.fine
        row = tokens // width // (height // self.rows)
        col = tokens % width // (width // self.cols)
        return (row * self.cols + col).unique()


def padded_view(
    image: Image,
    side: int,
    cells: int,
    zoom: int,
    region: int | None,
    colour: tuple[int, ...],
    resample: Resampling,
) -> ImageView:
    """The picture in the middle of a square of the processor's mean colour, as LLaVA sees it.

    Args:
        image: Upright RGB picture.
        side: The encoder's side in pixels.
        cells: Coarse cells per side.
        zoom: Tiles per side.
        region: Side of a region in fine tokens; None lays out the official lattice.
        colour: Of the padding.
        resample: Pillow's filter.
    """
    if region is None:
        grid = Grid.official(cells, zoom * cells, size=image.size)
    else:
        grid = Grid.blocks(
            (cells,) * 2, (zoom * cells,) * 2, region, tile=cells, padding=margins(*image.size)
        )
    fine = fit_square(image, zoom * side, colour, resample)
    coarse = fit_square(image, side, colour, resample)
    return ImageView(grid, coarse, _tensor(fine), zoom, zoom)


def native_view(
    image: Image, side: int, cells: int, zoom: int, region: int, resample: Resampling
) -> ImageView:
    """The picture without padding: both views show all of it, stretched, so that cells still match on each axis.

    Args:
        image: Upright RGB picture.
        side: The encoder's side in pixels.
        cells: Coarse cells per side.
        zoom: The fine view gets at most `zoom * zoom` tiles, see `tile_layout`.
        region: Side of a region in fine tokens.
        resample: Pillow's filter.
    """
    rows, cols = tile_layout(*image.size, zoom * zoom)
    grid = Grid.blocks((cells, cells), (rows * cells, cols * cells), region, tile=cells)
    fine = image.resize((cols * side, rows * side), resample)
    return ImageView(grid, image.resize((side, side), resample), _tensor(fine), rows, cols)


def tile_layout(width: int, height: int, tiles: int) -> tuple[int, int]:
    """Rows and columns of at most `tiles` tiles whose shape comes closest to the picture's.

    Of all layouts within a tenth of the closest shape, the one with the most tiles is taken: 2x4 rather than 1x2.

    >>> tile_layout(1600, 800, 9)
    (2, 4)
    """
    options = []
    for rows in range(1, tiles + 1):
        for cols in range(1, tiles // rows + 1):
            options.append((abs(math.log(cols * height / (rows * width))), rows, cols))
    best = min(options)[0]
    near = [option for option in options if option[0] <= best + _STRETCH]
    _, rows, cols = max(near, key=lambda option: (option[1] * option[2], -option[0]))
    return rows, cols


def margins(width: int, height: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Shares of the square above and below, left and right of a picture in its middle."""
    side = max(width, height)
    top, left = (side - height) // 2, (side - width) // 2
    return (top / side, (side - height - top) / side), (left / side, (side - width - left) / side)


def fit_square(image: Image, size: int, colour: tuple[int, ...], resample: Resampling) -> Image:
    """Pad a picture to a centred square and resize that; the square itself is never held.

    Pillow filters rows first and columns then, so rows can be squeezed strip by strip with the same result, and a
    panorama doesn't cost the square of its width.

    Args:
        image: Upright RGB picture.
        size: Side of the result in pixels.
        colour: Of the padding.
        resample: Pillow's filter.

    Raises:
        ValueError: The picture is so elongated that even the squeezed square is too large.
    """
    from PIL import Image

    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    if size * side > max(_SQUEEZED, width * height):
        raise ValueError(
            f"a picture of {width}x{height} is too elongated to pad to a square; use aspect='native'"
        )
    squeezed = Image.new("RGB", (size, side), colour)
    step = max(1, _STRIP // side)
    for y in range(0, height, step):
        rows = min(step, height - y)
        strip = Image.new("RGB", (side, rows), colour)
        strip.paste(image.crop((0, y, width, y + rows)), (left, 0))
        squeezed.paste(strip.resize((size, rows), resample), (0, top + y))
    return squeezed.resize((size, size), resample)


def mean_colour(image_processor: Any) -> tuple[int, ...]:
    """The processor's mean as an 8-bit colour."""
    # Cut off and not rounded, as LLaVA does it.
    return tuple(int(255 * mean) for mean in image_processor.image_mean)


def resample_filter(image_processor: Any) -> Resampling:
    """The processor's filter, as Pillow's."""
    from PIL import Image

    value = getattr(image_processor, "resample", None)
    if value is None:
        return Image.Resampling.BILINEAR
    # Some processors hold Pillow's number, others torchvision's name of the same filter.
    by_name = str(getattr(value, "value", value)).upper()
    return (
        Image.Resampling[by_name] if by_name in Image.Resampling.__members__ else Image.Resampling(int(value))
    )


def _tensor(image: Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
