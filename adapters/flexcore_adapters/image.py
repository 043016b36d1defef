"""The image adapter for models that are built like LLaVA: one fixed-size vision tower and a projector."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexcore.hf.processing import Adapter
from flexcore.hookspecs import Register, hookimpl
from flexcore.sources import FineSource, TensorSource
from flexcore.tiled_source import TiledSource, UnitEncoder

from .image_files import WINDOW_PIXELS, load_pictures
from .image_kinds import OneOfSeveral
from .image_tower import encode_tiles, lead_tokens, native_size, normalise, tower_device, vision_tower
from .image_views import ImageView, WindowedView, mean_colour, native_view, padded_view, resample_filter
from .image_window import WindowedSource
from .tiling import downscale, paste_tiles

if TYPE_CHECKING:
    from transformers import BatchFeature

    from flexcore.hf.inputs import FlexInputs

_ASPECTS = ("pad", "native")
_REGION_SIZE = 8
# Both views of a picture must come from the same settings, so these belong on the processor, not on a call.
_IMAGE_SETTINGS = {
    *("images_kwargs", "do_resize", "size", "default_to_square", "resample", "do_center_crop", "crop_size"),
    *("do_pad", "pad_size", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    *("do_convert_rgb", "data_format", "input_data_format"),
}


@hookimpl
def flexcore_register_adapters(register: Register) -> None:
    """Register the image adapter."""
    register("image", ImageAdapter)


class ImageAdapter(OneOfSeveral, Adapter):
    """Pictures for a LLaVA-architecture model: a coarse view in the sequence, tiles of a finer one on demand.

    Models of another kind (AnyRes, native resolution, text only) get the adapter for theirs, see `image_kinds`.

    With `aspect="pad"` a picture is centred in a square of the processor's mean colour, as LLaVA was trained; both
    views show that square, and its margins are never read. With `aspect="native"` nothing is padded: the fine view is
    the layout of at most `zoom * zoom` tiles that fits the picture best, the coarse view shows the same picture
    stretched to a square, and coarse cells and fine tokens match on each axis.

    Args:
        model: The model, wrapped or plain; a wrapped one's config lays out the regions.
        processor: The model's own processor.
        zoom: Fine tokens per coarse cell and axis; a picture's fine view has `zoom * zoom` tiles. Several that rise
            make a pyramid: regions of the first are chosen by the coarse tokens, those of each further one by what was
            read of the one before (`flexcore.pyramid`).
        aspect: `pad` or `native`.
        region_size: Side of a region in fine tokens; None takes the wrapped model's, or 8.
        max_pixels: The largest picture accepted; None takes `PIL.Image.MAX_IMAGE_PIXELS`.
        micro_batch: Tiles per call of the vision tower.
        progress: Show a bar while encoding; None shows one on a terminal when there are many tiles.
        lazy: Encode a tile when one of its regions is first chosen; False encodes all of them in the call.
        tile_cache_bytes: Budget of the encoded tiles that a call's pictures keep; None is unlimited.
        window_pixels: A picture of more pixels (raise `max_pixels` too) is read by window: never held whole, nor is
            its fine view. Its source's `windows` counts what that took.
        spool_dir: The folder in which such a picture is spooled, if its file can't be decoded in pieces; None is the
            system's temporary folder.

    Raises:
        ValueError: An option is out of range.
        UnsupportedModelError: The model has no fixed-size vision tower.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        zoom: int | Sequence[int] = 3,
        aspect: str = "pad",
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
        zooms = tuple(zoom) if isinstance(zoom, (list, tuple)) else (zoom,)
        numbers = {
            **{"zoom" if n == 0 else f"zoom[{n}]": number for n, number in enumerate(zooms)},
            "region_size": region_size,
            "max_pixels": max_pixels,
            "micro_batch": micro_batch,
            "window_pixels": window_pixels,
        }
        for name, value in numbers.items():
            if value is None and name in ("region_size", "max_pixels"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not zooms or list(zooms) != sorted(set(zooms)):
            raise ValueError(f"zoom must be one integer or several that rise, got {zoom!r}")
        if aspect not in _ASPECTS:
            raise ValueError(f"aspect must be one of {', '.join(_ASPECTS)}, got {aspect!r}")
        if progress is not None and not isinstance(progress, bool):
            raise ValueError(f"progress must be a bool or None, got {progress!r}")
        self.zooms = zooms
        self.zoom = zooms[0]
        self.aspect = aspect
        self.region_size = region_size
        self.max_pixels = max_pixels
        self.micro_batch = micro_batch
        if not isinstance(lazy, bool):
            raise ValueError(f"lazy must be a bool, got {lazy!r}")
        self.progress = progress
        self.lazy = lazy
        self.tile_cache_bytes = tile_cache_bytes
        if spool_dir is not None and not os.path.isdir(spool_dir):
            raise ValueError(f"spool_dir must be a folder, got {spool_dir!r}")
        self.window_pixels = window_pixels
        self.spool_dir = spool_dir
        self.side, self.cells = native_size(model, processor)

    # Spelt out for its signature; the work is the base's.
    def __call__(self, text: str | Sequence[str], images: Any = None, **kwargs: Any) -> FlexInputs:
        """Make model inputs.

        Args:
            text: One prompt or a list of them, with the processor's `<image>` where a picture goes.
            images: None, one picture, a flat list that the placeholders take in order, or a list per sample. A
                picture is a PIL image, a path, a numpy array or a torch tensor, see `load_image`.
            **kwargs: For the processor's text side; `padding=True` unless given.

        Returns:
            `input_ids`, `attention_mask`, `flex_streams`, and `pixel_values` (the coarse views) if there are any.

        Raises:
            StreamError: Pictures and placeholders differ in number.
            ValueError: A picture is unusable; the message says which and why.
        """
        return super().__call__(text, **{self.keyword: images}, **kwargs)

    def views(self, media: Sequence[Any]) -> list[ImageView]:
        """Load pictures and make their views; sizes are checked first, before any file is decoded."""
        official = self._official()
        pictures = load_pictures(media, self.max_pixels, self.window_pixels, self.spool_dir, self.progress)
        settings = self.processor.image_processor
        colour, resample = mean_colour(settings), resample_filter(settings)
        config = self.flex_config
        region = self.region_size or (config.region_size if config is not None else _REGION_SIZE)
        out = []
        for picture in pictures:
            levels: list[ImageView] = []
            for zoom in self.zooms:
                coarse = levels[0].coarse if levels else None
                if self.aspect == "native":
                    lay_out = (self.side, self.cells, zoom, region, resample, self.progress, coarse)
                    levels.append(native_view(picture, *lay_out))
                else:
                    layout = (self.side, self.cells, zoom, None if official else region)
                    look = (colour, resample, self.progress, coarse)
                    levels.append(padded_view(picture, *layout, *look))
            out.append(replace(levels[0], finer=tuple(levels[1:])))
        return out

    def levels(self, view: ImageView) -> list[ImageView]:
        """A picture's views, by rising zoom."""
        return [view, *view.finer]

    def sources(self, views: Sequence[ImageView]) -> list[FineSource]:
        """Tiles that are encoded when one of their regions is first chosen, or all of them now (`lazy=False`)."""
        if not self.lazy:
            return [
                TensorSource(paste_tiles(maps, view.rows, view.cols)[0], view.grid)
                for view, maps in zip(views, self.encode(views), strict=True)
            ]

        def encode(units: Sequence[tuple[int, int]]) -> Tensor:
            return self.encode_tiles(torch.cat([views[k].tiles(torch.tensor([tile])) for k, tile in units]))

        tower = vision_tower(self.model)
        width = self.model.config.get_text_config().hidden_size
        # one encoder for all pictures of the call, so that a layer's tiles share micro-batches
        encoder = UnitEncoder(
            encode, width, tower.dtype, tower_device(tower), self.micro_batch, self.tile_cache_bytes
        )
        sources: list[FineSource] = []
        for i, view in enumerate(views):
            name = f"image {i // len(self.zooms)}"
            about = (view.grid, (self.cells, self.cells), encoder, i, name, view.describe)
            if isinstance(view, WindowedView):
                sources.append(WindowedSource(*about, view.ground.stats))
            else:
                sources.append(TiledSource(*about))
        return sources

    def encode(self, views: Sequence[ImageView], regions: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Encode the tiles that hold the given regions.

        Args:
            views: Pictures made ready by `views`.
            regions: `[n]` region indices for each view; None for all tiles.

        Returns:
            `[k, cells * cells, C]` per view: the maps of its tiles `view.tiles_of(regions)`, ascending.
        """
        wanted = [
            view.tiles(None if regions is None else view.tiles_of(regions[i])) for i, view in enumerate(views)
        ]
        # One run over all pictures, so that the last batch of each isn't a small one.
        maps = self.encode_tiles(torch.cat(wanted))
        return list(maps.split([len(tiles) for tiles in wanted]))

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """`[k, cells * cells, C]` features of `[k, 3, side, side]` uint8 tiles, each encoded on its own."""
        return encode_tiles(
            self.model,
            self.processor.image_processor,
            tiles,
            self.cells,
            self.lead_tokens,
            self.micro_batch,
            self.progress,
        )

    def process(self, texts: list[str], views: Sequence[ImageView], **kwargs: Any) -> BatchFeature:
        """Run the processor with its resize and crop off: the coarse views have their size already."""
        if mine := sorted(_IMAGE_SETTINGS & set(kwargs)):
            raise ValueError(
                f"{', '.join(mine)}: image settings hold for both views of a picture; set them on "
                "processor.image_processor"
            )
        fixed = {"do_resize": False, "do_center_crop": False, "do_pad": False}
        inputs = super().process(texts, views, images_kwargs=fixed, **kwargs)
        if not views:
            return inputs
        expected = (len(views), 3, self.side, self.side)
        if tuple(inputs["pixel_values"].shape) != expected:
            raise ValueError(
                f"the processor made pixel_values of {tuple(inputs['pixel_values'].shape)} from coarse views of "
                f"{self.side}x{self.side}, so cells and pixels no longer match; expected {expected}"
            )
        if self._official():
            fine = [normalise(self.processor.image_processor, view.pixels[None]) for view in views]
            inputs["pixel_values"] = torch.cat([downscale(pixels, self.side) for pixels in fine])
        return inputs

    @property
    def lead_tokens(self) -> int:
        """Class and register tokens, as far as the model keeps them (`vision_feature_select_strategy`)."""
        return lead_tokens(self.model, self.processor)

    def _official(self) -> bool:
        """Whether the model's config asks for the official code's lattice and coarse view."""
        config = self.flex_config
        if config is None or config.regions != "official":
            return False
        if self.aspect != "pad" or self.region_size is not None:
            raise ValueError(
                "regions='official' in the model's FlexConfig is a 9x9 lattice over a padded square; it takes "
                f"aspect='pad' and no region_size, got aspect={self.aspect!r} and region_size={self.region_size!r}"
            )
        if len(self.zooms) > 1:
            raise ValueError(f"zoom must be one integer with regions='official', got {self.zooms}")
        return True
