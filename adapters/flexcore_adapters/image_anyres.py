"""The image adapter for AnyRes models (LLaVA-NeXT, LLaVA-OneVision): the overview in the sequence, tiles on demand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexcore.grid import Grid
from flexcore.hf.processing import Adapter, find_positions
from flexcore.sources import FineSource, TensorSource

from .anyres_tower import TileTower, best_resolution, overview_of, tile_processor
from .image import _IMAGE_SETTINGS, _REGION_SIZE, ImageAdapter
from .image_files import WINDOW_PIXELS, load_pictures
from .image_tower import encode_tiles, normalise
from .image_views import ImageView, WindowedView, overview, pixels_of, resample_filter, tile_layout
from .image_window import PictureWindows, Windows
from .tiling import paste_tiles

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature


@dataclass(frozen=True, eq=False)
class AnyResView(WindowedView):
    """One picture at both resolutions; its fine grid ends where the picture ends, inside the last tiles."""

    def tiles(self, indices: Tensor | None = None) -> Tensor:
        """`[k, 3, side, side]` uint8: the given tiles, or all of them, in raster order; black beyond the picture."""
        from PIL import Image

        (side, _), (cells, _), (rows, cols) = self.coarse.size, self.grid.coarse, self.grid.fine
        whole = width, height = cols * side // cells, rows * side // cells
        out = []
        for index in range(self.rows * self.cols) if indices is None else indices.tolist():
            top, left = (n * side for n in divmod(index, self.cols))
            part = left, top, min(left + side, width), min(top + side, height)
            tile = Image.new("RGB", (side, side))
            tile.paste(self.ground.scaled(whole, self.resample, part))
            out.append(pixels_of(tile))
        return torch.stack(out)

    def tiles_of(self, regions: Tensor) -> Tensor:
        """`[k]` ascending indices of the tiles that hold any fine token of the given `[n]` regions."""
        tokens = self.grid.tokens(regions)
        tokens = tokens[tokens >= 0]
        (cells, _), (_, width) = self.grid.coarse, self.grid.fine
        return (tokens // width // cells * self.cols + tokens % width // cells).unique()


class AnyResImageAdapter(ImageAdapter):
    """Pictures for a model that packs an overview and tiles into its sequence: here the overview stays alone there.

    The overview is the one of the model's processor: the whole picture, stretched to a tile's size. The tiles are laid
    out as the processor would, and the picture keeps its shape on them, as the model was trained. But it starts in the
    upper left corner of the first tile and not in the middle of the layout: so the fine grid can end where the picture
    ends, both grids show the picture and nothing else, and coarse cells and fine tokens match on each axis. What the
    last tiles show beyond the picture is black, as in training, and belongs to no region. The picture is resized to
    whole fine tokens.

    Fine features are the tower's and projector's, without the newline tokens that the model packs them with, and
    without the shrinking of LLaVA-OneVision's large layouts: they cost no room in the sequence.

    Args:
        model: The model, wrapped or plain; a wrapped one's config lays out the regions.
        processor: The model's own processor.
        zoom: None lays tiles out by the processor's `image_grid_pinpoints`; a number takes the layout of at most
            `zoom * zoom` tiles that comes closest to the picture's shape.
        max_tiles: Only layouts of at most so many tiles; None is all of the processor's.
        region_size: Side of a region in fine tokens; None takes the wrapped model's, or 8.
        max_pixels: The largest picture accepted; None takes `PIL.Image.MAX_IMAGE_PIXELS`.
        micro_batch: Tiles per call of the vision tower.
        progress: Show a bar while encoding; None shows one on a terminal when there are many tiles.
        lazy: Encode a tile when one of its regions is first chosen; False encodes all of them in the call.
        tile_cache_bytes: Budget of the encoded tiles that a call's pictures keep; None is unlimited.
        window_pixels: A picture of more pixels (raise `max_pixels` too) is read by window, see `ImageAdapter`.
        spool_dir: The folder in which such a picture is spooled; None is the system's temporary folder.

    Raises:
        ValueError: An option is out of range, or the processor isn't the model's.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        zoom: int | None = None,
        max_tiles: int | None = None,
        region_size: int | None = None,
        max_pixels: int | None = None,
        micro_batch: int = 8,
        progress: bool | None = None,
        lazy: bool = True,
        tile_cache_bytes: int | None = None,
        window_pixels: int = WINDOW_PIXELS,
        spool_dir: str | os.PathLike[str] | None = None,
        **unknown: Any,
    ):
        if unknown:
            Adapter.__init__(self, model, processor, **unknown)  # says which options there are
        numbers = {"zoom": zoom, "max_tiles": max_tiles}
        for name, value in numbers.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer >= 1 or None, got {value!r}")
        if zoom is not None and max_tiles is not None:
            raise ValueError(
                f"max_tiles={max_tiles} limits the processor's layouts and takes zoom=None, got {zoom}"
            )
        _check_tile(model, processor)
        super().__init__(
            model,
            processor,
            zoom=1 if zoom is None else zoom,
            region_size=region_size,
            max_pixels=max_pixels,
            micro_batch=micro_batch,
            progress=progress,
            lazy=lazy,
            tile_cache_bytes=tile_cache_bytes,
            window_pixels=window_pixels,
            spool_dir=spool_dir,
        )
        self.tower = TileTower(model)
        self.overview = overview_of(model, self.side, self.cells)
        self.pinpoints = None if zoom is not None else self._pinpoints(max_tiles)

    def views(self, media: Sequence[Any]) -> list[ImageView]:
        """Load pictures and make both views of each; sizes are checked first, before any file is decoded."""
        config = self.flex_config
        if config is not None and config.regions == "official":
            raise ValueError(
                "regions='official' in the model's FlexConfig is a lattice over LLaVA's padded square; "
                f"{type(self).__name__} takes regions='blocks'"
            )
        pictures = load_pictures(media, self.max_pixels, self.window_pixels, self.spool_dir, self.progress)
        region = self.region_size or (config.region_size if config is not None else _REGION_SIZE)
        return [self._view(picture, region) for picture in pictures]

    def _view(self, picture: Image | Windows, region: int) -> AnyResView:
        side, cells = self.side, self.cells
        rows, cols = self.layout(*picture.size)
        fine = content(*picture.size, rows * cells, cols * cells)
        rows, cols = -(-fine[0] // cells), -(-fine[1] // cells)  # a layout may be larger than it needs to be
        grid = Grid.blocks((cells, cells), fine, region, tile=cells)
        resample = resample_filter(self.processor.image_processor)
        if isinstance(picture, Windows):
            ground, coarse = picture, overview(picture, (side, side), resample, self.progress)
        else:
            ground, coarse = PictureWindows(picture), picture.resize((side, side), resample)
        return AnyResView(grid, coarse, torch.empty(3, 0, 0), rows, cols, ground, resample)

    def layout(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles for a picture of the given pixels."""
        if self.pinpoints is None:
            return tile_layout(width, height, self.zoom**2)
        rows, cols = (n // self.side for n in best_resolution((height, width), self.pinpoints))
        return rows, cols

    def sources(self, views: Sequence[ImageView]) -> list[FineSource]:
        """Tiles that are encoded when one of their regions is first chosen, or all of them now (`lazy=False`)."""
        if self.lazy:
            return super().sources(views)
        out: list[FineSource] = []
        for view, maps in zip(views, self.encode(views), strict=True):
            height, width = view.grid.fine
            whole = paste_tiles(maps, view.rows, view.cols)[0].unflatten(0, (-1, view.cols * self.cells))
            out.append(TensorSource(whole[:height, :width].flatten(0, 1), view.grid))
        return out

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """`[k, cells * cells, C]` features of `[k, 3, side, side]` uint8 tiles, each encoded on its own."""
        return encode_tiles(
            self.tower, self._tile_processor, tiles, self.cells, 0, self.micro_batch, self.progress
        )

    def process(self, texts: list[str], views: Sequence[ImageView], **kwargs: Any) -> BatchFeature:
        """Tokenize, with a placeholder for every token of an overview, and add the overviews' pixels."""
        if mine := sorted(_IMAGE_SETTINGS & set(kwargs)):
            raise ValueError(
                f"{', '.join(mine)}: image settings hold for both views of a picture; set them on "
                "processor.image_processor"
            )
        if kwargs.pop("videos", None) is not None:
            raise ValueError("videos beside pictures aren't supported; the video adapter takes clips")
        # the tokenizer itself: the processor would count the tokens of the tiles too
        token, each = self.placeholder, self.cells**2 + self.overview.trail
        settings = {**kwargs.pop("text_kwargs", {}), **kwargs}
        spread = [text.replace(token, each * token) for text in texts]
        inputs: BatchFeature = self.processor.tokenizer(spread, return_tensors="pt", **settings)
        if views:
            shown = torch.stack([pixels_of(view.coarse) for view in views])
            inputs.update(self.overview.inputs(normalise(self._tile_processor, shown)))
        return inputs

    def positions(self, input_ids: Tensor, media: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
        """Where the cells of every sample's overviews sit; what follows an overview is no cell."""
        each = self.cells**2 + self.overview.trail
        found = find_positions(input_ids, self._token_id(), [[each] * len(sample) for sample in media])
        return [[one[: self.cells**2] for one in sample] for sample in found]

    @property
    def lead_tokens(self) -> int:
        """None: the models know no class token before the overview."""
        return 0

    @property
    def _tile_processor(self) -> Any:
        return tile_processor(self.processor.image_processor, self.side)

    def _pinpoints(self, max_tiles: int | None) -> list[tuple[int, int]]:
        """The layouts to choose from, `(height, width)` in pixels."""
        own = getattr(self.processor.image_processor, "image_grid_pinpoints", None)
        every = [(int(h), int(w)) for h, w in own or self.model.config.image_grid_pinpoints]
        if any(h % self.side or w % self.side for h, w in every):
            raise ValueError(
                f"image_grid_pinpoints must hold multiples of a tile's {self.side} pixels, got {every}"
            )
        kept = [(h, w) for h, w in every if max_tiles is None or h * w <= max_tiles * self.side**2]
        if not kept:
            least = min(h * w for h, w in every) // self.side**2
            raise ValueError(
                f"max_tiles must be >= {least}, the processor's smallest layout, got {max_tiles}"
            )
        return kept


def content(width: int, height: int, rows: int, cols: int) -> tuple[int, int]:
    """The fine tokens, `(rows, columns)`, that a picture takes on a layout of that many at most.

    >>> content(600, 400, 48, 48)
    (32, 48)
    """
    scale = min(rows / height, cols / width)
    return min(rows, max(1, round(height * scale))), min(cols, max(1, round(width * scale)))


def _check_tile(model: Any, processor: Any) -> None:
    """Raise ValueError unless the processor cuts tiles of the size that the model's tower takes."""
    settings = getattr(processor, "image_processor", None)
    if settings is None:
        raise ValueError(
            f"processor must be {type(model).__name__}'s own, with an image_processor; "
            f"got {type(processor).__name__}"
        )
    square = dict(getattr(settings, "crop_size", None) or getattr(settings, "size", None) or {})
    made = square.get("height") or square.get("shortest_edge")
    taken = model.config.vision_config.image_size
    if made != taken:
        raise ValueError(
            f"processor.image_processor cuts tiles of {made} pixels and the vision tower takes {taken}; they must be "
            "equal"
        )
