"""The views of one picture: the coarse one for the processor, the fine one to cut into tiles, and their lattice."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flexcore.grid import Grid
from flexcore.hf.processing import View

from .image_scaling import UNSTEADY, scaled
from .image_window import PaddedWindows, PictureWindows, Windows
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
        pixels: `[3, rows * side, cols * side]` uint8, the fine view; a `WindowedView` may leave it empty.
        rows: Tiles from top to bottom.
        cols: Tiles from left to right.
        finer: Views of the same picture at higher resolutions, by rising zoom.
    """

    pixels: Tensor
    rows: int
    cols: int
    finer: tuple[ImageView, ...] = field(default=(), kw_only=True)

    def tiles(self, indices: Tensor | None = None) -> Tensor:
        """`[k, 3, side, side]` uint8: the given tiles, or all of them, in raster order."""
        if indices is None:
            return cut_tiles(self.pixels[None], self.rows, self.cols)
        # cutting all of them would copy the whole view for every tile that is asked for
        height, width = self.pixels.shape[1] // self.rows, self.pixels.shape[2] // self.cols
        tiles = self.pixels.new_empty(len(indices), 3, height, width)
        for tile, index in zip(tiles, indices.tolist(), strict=True):
            row, col = divmod(index, self.cols)
            tile.copy_(self.pixels[:, row * height : (row + 1) * height, col * width : (col + 1) * width])
        return tiles

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


@dataclass(frozen=True, eq=False)
class LateView(ImageView):
    """A picture of whose fine view only the tiles are made that are asked for, each scaled from its own window.

    Args:
        ground: What both views show.
        resample: Pillow's filter.
    """

    ground: Windows
    resample: Resampling

    def tiles(self, indices: Tensor | None = None) -> Tensor:
        """`[k, 3, side, side]` uint8: the given tiles, or all of them, in raster order."""
        if self.pixels.numel():
            return super().tiles(indices)
        side, whole = self.coarse.width, (self.cols * self.coarse.width, self.rows * self.coarse.height)
        out = []
        for index in range(self.rows * self.cols) if indices is None else indices.tolist():
            top, left = (n * side for n in divmod(index, self.cols))
            part = (left, top, left + side, top + side)
            out.append(pixels_of(self.ground.scaled(whole, self.resample, part)))
        return torch.stack(out)


class WindowedView(LateView):
    """A picture too large to hold, whose windows are read from a file."""


def padded_view(
    image: Image | Windows,
    side: int,
    cells: int,
    zoom: int,
    region: int | None,
    colour: tuple[int, ...],
    resample: Resampling,
    progress: bool | None = None,
    coarse: Image | None = None,
) -> ImageView:
    """The picture in the middle of a square of the processor's mean colour, as LLaVA sees it.

    Args:
        image: Upright RGB picture, or its windows.
        side: The encoder's side in pixels.
        cells: Coarse cells per side.
        zoom: Tiles per side.
        region: Side of a region in fine tokens; None lays out the official lattice.
        colour: Of the padding.
        resample: Pillow's filter.
        progress: Show a bar while a picture is read by window; None shows one on a terminal.
        coarse: The coarse view, if another level of the picture has made it.
    """
    if region is None:
        grid = Grid.official(cells, zoom * cells, size=image.size)
    else:
        grid = Grid.blocks(
            (cells,) * 2, (zoom * cells,) * 2, region, tile=cells, padding=margins(*image.size)
        )
    if isinstance(image, Windows):
        _check_square(image.size, side)
        ground = PaddedWindows(image, colour)
        # the official coarse view is made of the whole fine one
        return _windowed(grid, ground, side, zoom, zoom, resample, region is None, progress, coarse)
    coarse = coarse or fit_square(image, side, colour, resample)
    if region is None:
        fine = fit_square(image, zoom * side, colour, resample)
        return ImageView(grid, coarse, pixels_of(fine), zoom, zoom)
    ground = PaddedWindows(PictureWindows(image), colour)
    return _late(LateView, grid, coarse, ground, side, zoom, zoom, resample)


def native_view(
    image: Image | Windows,
    side: int,
    cells: int,
    zoom: int,
    region: int,
    resample: Resampling,
    progress: bool | None = None,
    coarse: Image | None = None,
) -> ImageView:
    """The picture without padding: both views show all of it, stretched, so that cells still match on each axis.

    Args:
        image: Upright RGB picture, or its windows.
        side: The encoder's side in pixels.
        cells: Coarse cells per side.
        zoom: The fine view gets at most `zoom * zoom` tiles, see `tile_layout`.
        region: Side of a region in fine tokens.
        resample: Pillow's filter.
        progress: Show a bar while a picture is read by window; None shows one on a terminal.
        coarse: The coarse view, if another level of the picture has made it.
    """
    rows, cols = tile_layout(*image.size, zoom * zoom)
    grid = Grid.blocks((cells, cells), (rows * cells, cols * cells), region, tile=cells)
    if isinstance(image, Windows):
        return _windowed(grid, image, side, rows, cols, resample, False, progress, coarse)
    coarse = coarse or image.resize((side, side), resample)
    return _late(LateView, grid, coarse, PictureWindows(image), side, rows, cols, resample)


def _windowed(
    grid: Grid,
    ground: Windows,
    side: int,
    rows: int,
    cols: int,
    resample: Resampling,
    whole: bool,
    progress: bool | None,
    coarse: Image | None,
) -> ImageView:
    """Both views of what is read by window: the coarse one now, tiles of the fine one when they are asked for."""
    coarse = coarse or overview(ground, (side, side), resample, progress)
    return _late(WindowedView, grid, coarse, ground, side, rows, cols, resample, whole)


def _late(
    kind: type[LateView],
    grid: Grid,
    coarse: Image,
    ground: Windows,
    side: int,
    rows: int,
    cols: int,
    resample: Resampling,
    whole: bool = False,
) -> LateView:
    """A view that makes tiles when they are asked for, with all its pixels where that can't be."""
    pixels = torch.empty(3, 0, 0, dtype=torch.uint8)
    # whole if it is needed whole, or if its parts would not fit
    if whole or resample.name in UNSTEADY:
        pixels = pixels_of(ground.scaled((cols * side, rows * side), resample))
    return kind(grid, coarse, pixels, rows, cols, ground=ground, resample=resample)


def overview(ground: Windows, size: tuple[int, int], resample: Resampling, progress: bool | None) -> Image:
    """All of a picture that is read by window, stretched to a size; a bar shows the rows that were read."""
    from tqdm.auto import tqdm

    hidden = None if progress is None else not progress
    with tqdm(total=ground.size[1], desc=f"reading {ground.name}", unit="row", disable=hidden) as bar:
        return ground.scaled(size, resample, progress=bar.update)


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

    Rows are squeezed strip by strip, see `scaled`, so a panorama doesn't cost the square of its width.

    Args:
        image: Upright RGB picture.
        size: Side of the result in pixels.
        colour: Of the padding.
        resample: Pillow's filter.

    Raises:
        ValueError: The picture is so elongated that even the squeezed square is too large.
    """
    _check_square(image.size, size)
    square = PaddedWindows(PictureWindows(image), colour)
    return scaled(square, (size, size), resample, strip=_STRIP)


def _check_square(picture: tuple[int, int], size: int) -> None:
    """Raise ValueError where a picture's square, its rows squeezed to `size` pixels, takes more than the picture."""
    width, height = picture
    if size * max(width, height) > max(_SQUEEZED, width * height):
        raise ValueError(
            f"a picture of {width}x{height} is too elongated to pad to a square; use aspect='native'"
        )


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


def pixels_of(image: Image) -> Tensor:
    """`[3, H, W]` uint8 pixels of an RGB picture."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
