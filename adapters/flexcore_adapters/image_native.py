"""The image adapter for models that take pictures of any size: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and their kin."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flexcore.grid import Grid
from flexcore.hf.processing import Adapter, View
from flexcore.sources import FineSource
from flexcore.tiled_source import TiledSource, UnitEncoder

from .image_files import WINDOW_PIXELS, load_pictures
from .image_tower import tower_device
from .image_views import overview, pixels_of, resample_filter
from .image_window import PictureWindows, WindowedSource, Windows
from .native_tower import cell_of, encode_native, fit_cells, tower_of

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling
    from transformers import BatchFeature

    from flexcore.hf.inputs import FlexInputs

_COARSE_CELLS = 256
_ZOOM = 3
_REGION_SIZE = 8
_MANY_TILES = 64


@dataclass(frozen=True, eq=False)
class NativeView(View):
    """One picture: its coarse view, and what the tiles of the fine one are made of.

    Args:
        picture: The picture itself; a tile is scaled from its own part of it when it is asked for.
        zoom: Tiles per axis; each has the coarse view's shape.
        resample: Pillow's filter, for both views.
    """

    picture: Windows
    zoom: int
    resample: Resampling

    def tile(self, index: int) -> Tensor:
        """`[3, height, width]` uint8: a tile by raster index, as a crop of the whole fine view would show it."""
        row, col = divmod(index, self.zoom)
        wide, high = self.coarse.size
        part = (col * wide, row * high, (col + 1) * wide, (row + 1) * high)
        return pixels_of(self.picture.scaled((self.zoom * wide, self.zoom * high), self.resample, part))

    def describe(self, tile: int) -> str:
        """Where a tile lies, for messages."""
        row, col = divmod(tile, self.zoom)
        return f"row {row + 1} and column {col + 1} of {self.zoom}x{self.zoom} tiles"


class NativeImageAdapter(Adapter):
    """Pictures for a model that takes them at any size: a small view in the sequence, tiles of a large one on demand.

    The coarse view is what the model's own processor would make of the picture under a budget of `coarse_pixels`. The
    fine view is `zoom` times as large on both axes and cut into `zoom * zoom` tiles of the coarse view's shape, each
    encoded as a picture of its own when one of its regions is first chosen. So the cost follows what is looked at;
    the price is that the tower sees each tile alone, where the model itself would be shown all of the large picture at
    once. Both views show the whole picture, stretched to whole numbers of coarse cells: `zoom * zoom` fine tokens to
    each of them, and no margins.

    Args:
        model: The model, wrapped or plain; a wrapped one's config lays out the regions.
        processor: The model's own processor.
        coarse_pixels: Budget of the coarse view, which is never larger than the picture; None is 256 cells.
        zoom: Fine tokens per coarse cell and axis; None is 3, or what `fine_pixels` allows.
        fine_pixels: Budget of the fine view, instead of `zoom`: each picture gets the largest whole zoom within the
            budget that still shows more of it.
        region_size: Side of a region in fine tokens; None takes the wrapped model's, or 8.
        max_pixels: The largest picture accepted; None takes `PIL.Image.MAX_IMAGE_PIXELS`.
        micro_batch: Tiles per call of the vision tower.
        progress: Show a bar while encoding up front; None shows one on a terminal when there are many tiles.
        lazy: Encode a tile when one of its regions is first chosen; False encodes all of them in the call.
        tile_cache_bytes: Budget of the encoded tiles that a call's pictures keep; None is unlimited.
        window_pixels: A picture of more pixels (raise `max_pixels` too) is read by window, see `ImageAdapter`.
        spool_dir: The folder in which such a picture is spooled; None is the system's temporary folder.

    Raises:
        ValueError: An option is out of range, or the processor isn't the model's.
        UnsupportedModelError: The model's vision tower doesn't take pictures of any size.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        coarse_pixels: int | None = None,
        zoom: int | None = None,
        fine_pixels: int | None = None,
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
        super().__init__(model, processor, **unknown)
        numbers = {
            "zoom": zoom,
            "fine_pixels": fine_pixels,
            "region_size": region_size,
            "max_pixels": max_pixels,
            "micro_batch": micro_batch,
            "window_pixels": window_pixels,
        }
        for name, value in numbers.items():
            if value is None and name not in ("micro_batch", "window_pixels"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if progress is not None and not isinstance(progress, bool):
            raise ValueError(f"progress must be a bool or None, got {progress!r}")
        if not isinstance(lazy, bool):
            raise ValueError(f"lazy must be a bool, got {lazy!r}")
        if zoom is not None and fine_pixels is not None:
            raise ValueError(
                f"zoom={zoom} and fine_pixels={fine_pixels} say the same thing; give one of them"
            )
        self.cell = cell_of(model, processor, "image_processor")
        self.coarse_pixels = self.cell.budget(coarse_pixels, _COARSE_CELLS)
        if fine_pixels is not None and fine_pixels < self.coarse_pixels:
            raise ValueError(f"fine_pixels must be >= coarse_pixels={self.coarse_pixels}, got {fine_pixels}")
        self.zoom, self.fine_pixels = zoom, fine_pixels
        self.region_size, self.max_pixels = region_size, max_pixels
        self.micro_batch, self.progress, self.lazy = micro_batch, progress, lazy
        self.tile_cache_bytes = tile_cache_bytes
        if spool_dir is not None and not os.path.isdir(spool_dir):
            raise ValueError(f"spool_dir must be a folder, got {spool_dir!r}")
        self.window_pixels, self.spool_dir = window_pixels, spool_dir

    # Spelt out for its signature; the work is the base's.
    def __call__(self, text: str | Sequence[str], images: Any = None, **kwargs: Any) -> FlexInputs:
        """Make model inputs.

        Args:
            text: One prompt or a list of them, with the processor's own placeholder where a picture goes.
            images: None, one picture, a flat list that the placeholders take in order, or a list per sample. A
                picture is a PIL image, a path, a numpy array or a torch tensor, see `load_image`.
            **kwargs: For the processor's text side; `padding=True` unless given.

        Returns:
            What the processor returns (`mm_token_type_ids` among it, which the model needs), and `flex_streams`.

        Raises:
            StreamError: Pictures and placeholders differ in number.
            ValueError: A picture is unusable; the message says which and why.
        """
        return super().__call__(text, **{self.keyword: images}, **kwargs)

    def views(self, media: Sequence[Any]) -> list[NativeView]:
        """Load pictures and make their coarse views; sizes are checked first, before any file is decoded."""
        config = self.flex_config
        if config is not None and config.regions == "official":
            raise ValueError(
                "regions='official' in the model's FlexConfig is a 9x9 lattice over a padded square, which models "
                "of the LLaVA kind see; use regions='blocks' with this one"
            )
        region = self.region_size or (config.region_size if config is not None else _REGION_SIZE)
        pictures = load_pictures(media, self.max_pixels, self.window_pixels, self.spool_dir, self.progress)
        return [self._view(picture, region) for picture in pictures]

    def _view(self, picture: Image | Windows, region: int) -> NativeView:
        settings, side = self.processor.image_processor, self.cell.side
        width, height = picture.size
        least = settings.size.get("shortest_edge", 0)
        rows, cols = fit_cells(height, width, side, self.coarse_pixels, least)
        zoom = self.zoom or _ZOOM
        if self.fine_pixels is not None:
            most = math.isqrt(self.fine_pixels // (rows * cols * side * side))
            zoom = max(1, min(most, math.ceil(max(height / (rows * side), width / (cols * side)))))
        grid = Grid.blocks((rows, cols), (zoom * rows, zoom * cols), region, tile=(rows, cols))
        resample = resample_filter(settings)
        size = (cols * side, rows * side)
        if isinstance(picture, Windows):
            ground: Windows = picture
            coarse = overview(picture, size, resample, self.progress)
        else:  # Pillow itself, so that the view is the processor's to the bit
            ground, coarse = PictureWindows(picture), picture.resize(size, resample)
        return NativeView(grid, coarse, ground, zoom, resample)

    def sources(self, views: Sequence[NativeView]) -> list[FineSource]:
        """Tiles that are encoded when one of their regions is first chosen, or all of them now (`lazy=False`)."""
        settings, tower = self.processor.image_processor, tower_of(self.model)

        def encode(units: Sequence[tuple[int, int]]) -> Tensor:
            tiles = [views[key].tile(tile) for key, tile in units]
            return encode_native(self.model, settings, tiles, self.cell)

        # one encoder for all pictures of the call, so that a layer's tiles share micro-batches
        encoder = UnitEncoder(
            encode,
            self.model.config.get_text_config().hidden_size,
            tower.dtype,
            tower_device(tower),
            self.micro_batch,
            self.tile_cache_bytes if self.lazy else None,
        )
        sources = [
            WindowedSource(
                view.grid, view.grid.coarse, encoder, i, f"image {i}", view.describe, view.picture.stats
            )
            for i, view in enumerate(views)
        ]
        if not self.lazy:
            self._up_front(sources, encoder)
        return list(sources)

    def _up_front(self, sources: Sequence[TiledSource], encoder: UnitEncoder) -> None:
        """Have all tiles encoded, of all pictures in one run, so that the last batch of each isn't a small one."""
        from tqdm.auto import tqdm

        units = [(source.key, tile) for source in sources for tile in range(source.n_tiles)]
        total = len(units)
        hidden = not self.progress if self.progress is not None else None if total >= _MANY_TILES else True
        with tqdm(total=total, desc="encoding tiles", unit="tile", disable=hidden) as bar:
            encoder.run(units, lambda unit, features: bar.update(), lambda u: sources[u[0]].describe(u[1]))

    def process(self, texts: list[str], views: Sequence[NativeView], **kwargs: Any) -> BatchFeature:
        """Run the processor with its resize off: the coarse views have their size already."""
        settings = self.processor.image_processor
        own = getattr(getattr(settings, "valid_kwargs", None), "__annotations__", {})
        if mine := sorted({"images_kwargs", *own} & set(kwargs)):
            raise ValueError(
                f"{', '.join(mine)}: image settings hold for both views of a picture; set them on "
                "processor.image_processor"
            )
        inputs = super().process(texts, views, images_kwargs={"do_resize": False}, **kwargs)
        expected = [self.cell.grid(1, *view.grid.coarse) for view in views]
        made = inputs["image_grid_thw"].tolist() if views else []
        if made != expected:
            raise ValueError(
                f"the processor made image_grid_thw {made} from coarse views of {expected}, so cells and tokens no "
                "longer match: does it resize whatever it is told?"
            )
        return inputs
