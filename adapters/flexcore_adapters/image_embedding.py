"""The image adapter for text-only models: a vision tower and a projector of one's own in front of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexcore.config import FlexConfig
from flexcore.errors import StreamError, UnsupportedModelError
from flexcore.hf.embedding import EmbeddingAdapter
from flexcore.sources import FineSource

from .image import ImageAdapter
from .image_files import WINDOW_PIXELS
from .image_kinds import KINDS
from .image_tower import tower_device
from .image_views import ImageView, pixels_of

if TYPE_CHECKING:
    from flexcore.hf.inputs import FlexInputs


class TowerModel:
    """A tower, a projector and a decoder, as `ImageAdapter` knows them from a LLaVA.

    Args:
        tower: A vision model whose `last_hidden_state` holds a feature per patch, after class and register tokens.
        projector: From the tower's width to the decoder's.
        decoder: The text-only model.
    """

    def __init__(self, tower: Any, projector: nn.Module, decoder: Any):
        self.vision_tower = tower
        self.projector = projector
        self.decoder = decoder
        self.config = SimpleNamespace(
            vision_config=tower.config, get_text_config=decoder.config.get_text_config
        )

    @property
    def flex_config(self) -> FlexConfig | None:
        """The wrapped decoder's config; None while it is plain."""
        return getattr(self.decoder, "flex_config", None)

    @torch.no_grad()
    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """`[k, cells * cells, V]` maps of `[k, 3, side, side]` pixels, as the tower makes them."""
        hidden: Tensor = self.vision_tower(pixel_values=pixel_values).last_hidden_state
        patch = _side(self.vision_tower.config.patch_size)
        cells = (pixel_values.shape[2] // patch) * (pixel_values.shape[3] // patch)
        if hidden.ndim != 3 or hidden.shape[1] < cells:
            raise StreamError(
                f"tower must make a feature per patch, [k, {cells} or more, width] of {cells} patches; "
                f"{type(self.vision_tower).__name__} makes {list(hidden.shape)}"
            )
        return hidden[:, hidden.shape[1] - cells :]


class ProjectedTiles(ImageAdapter):
    """Both views of pictures by `ImageAdapter`; their maps go through a projector that may be trained."""

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """`[k, cells * cells, C]` features of `[k, 3, side, side]` uint8 tiles; the projector's part carries grad."""
        return self.project(super().encode_tiles(tiles))

    def project(self, maps: Tensor) -> Tensor:
        """`[k, tokens, C]` in the dtype of the `[k, tokens, V]` maps, and where they are."""
        projector = self.model.projector
        weight = next(projector.parameters(), maps)
        features: Tensor = projector(maps.to(weight.device, weight.dtype))
        return features.to(maps.device, maps.dtype)


class EmbeddingImageAdapter(EmbeddingAdapter):
    """Pictures for a text-only model, through any vision tower (CLIP, SigLIP, DINOv2, ...) and a projector.

    In a prompt `<image>` stands for one picture. Its coarse view, at the tower's own size, becomes the decoder's input
    embeddings; the fine view is cut into tiles of that size, encoded as `ImageAdapter` does it. A fresh projector is
    noise to the decoder until it is trained, by `loss.backward()` on the adapter's inputs: call the adapter anew for
    every step, as the coarse embeddings carry the graph of one call. The gradient reaches the projector through the
    coarse tokens, and with `lazy=False` through the fine ones too; tiles encoded on demand are made without gradient.
    The tower is never trained.

    Args:
        model: The model, wrapped or plain; a wrapped one's config lays out the regions.
        processor: The model's tokenizer. The adapter works on a copy, which knows the placeholder.
        tower: A transformers vision model of one square size, with a `last_hidden_state` over patches.
        projector: A module from `[..., the tower's width]` to `[..., the decoder's]`. None makes an `nn.Linear` on the
            tower's device, in torch's own random initialisation.
        image_processor: The tower's own, for its mean, deviation, filter and size.
        zoom: Fine tokens per coarse cell and axis, or several for a pyramid, see `ImageAdapter`.
        aspect: `pad` or `native`, see `ImageAdapter`.
        region_size: Side of a region in fine tokens; None takes the wrapped model's, or 8.
        max_pixels: The largest picture accepted; None takes `PIL.Image.MAX_IMAGE_PIXELS`.
        micro_batch: Tiles per call of the tower.
        progress: Show a bar while encoding; None shows one on a terminal when there are many tiles.
        lazy: Encode a tile when one of its regions is first chosen; False encodes all of them in the call.
        tile_cache_bytes: Budget of the encoded tiles that a call's pictures keep; None is unlimited.
        window_pixels: A picture of more pixels (raise `max_pixels` too) is read by window, see `ImageAdapter`.
        spool_dir: The folder in which such a picture is spooled; None is the system's temporary folder.

    Raises:
        ValueError: An option is out of range, or the projector's output doesn't fit the decoder.
        UnsupportedModelError: No tower is given, or one of no fixed square size.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        tower: Any = None,
        projector: nn.Module | None = None,
        image_processor: Any = None,
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
        super().__init__(model, getattr(processor, "tokenizer", processor), **unknown)
        if tower is None:
            raise UnsupportedModelError(
                f"EmbeddingImageAdapter needs a vision tower, and {type(model).__name__} has none: give one with "
                f"tower=... and image_processor=... (ImageAdapter takes {KINDS})"
            )
        settings = getattr(processor, "image_processor", None) if image_processor is None else image_processor
        if settings is None:
            raise ValueError(
                "image_processor must be the tower's own, for its mean, deviation and size: "
                "AutoImageProcessor.from_pretrained(...); got None"
            )
        _check_tower(tower)
        if projector is None:
            projector = nn.Linear(tower.config.hidden_size, self.width, device=tower.device)
        self._tiles = ProjectedTiles(
            TowerModel(tower, projector, model),
            SimpleNamespace(image_processor=settings),
            zoom=zoom,
            aspect=aspect,
            region_size=region_size,
            max_pixels=max_pixels,
            micro_batch=micro_batch,
            progress=progress,
            lazy=lazy,
            tile_cache_bytes=tile_cache_bytes,
            window_pixels=window_pixels,
            spool_dir=spool_dir,
        )
        self._try_out()

    # Spelt out for its signature; the work is the base's.
    def __call__(self, text: str | Sequence[str], images: Any = None, **kwargs: Any) -> FlexInputs:
        """Make model inputs.

        Args:
            text: One prompt or a list of them, with `<image>` where a picture goes.
            images: None, one picture, a flat list that the placeholders take in order, or a list per sample. A
                picture is a PIL image, a path, a numpy array or a torch tensor, see `load_image`.
            **kwargs: For the tokenizer; `padding=True` unless given.

        Returns:
            `input_ids`, `attention_mask` and `flex_streams`, which hold the coarse embeddings too.

        Raises:
            StreamError: Pictures and placeholders differ in number.
            ValueError: A picture is unusable; the message says which and why.
        """
        return super().__call__(text, **{self.keyword: images}, **kwargs)

    def views(self, media: Sequence[Any]) -> list[ImageView]:
        """Load pictures and make both views of each; sizes are checked first, before any file is decoded."""
        config = self.flex_config
        if config is not None and config.regions == "official":
            raise ValueError(
                "regions='official' in the model's FlexConfig reproduces LLaVA's own pipeline; "
                f"{type(self).__name__} takes regions='blocks'"
            )
        return self._tiles.views(media)

    def sources(self, views: Sequence[ImageView]) -> list[FineSource]:
        """Tiles that are encoded when one of their regions is first chosen, or all of them now (`lazy=False`)."""
        return self._tiles.sources(views)

    def levels(self, view: ImageView) -> list[ImageView]:
        """A picture's views, by rising zoom."""
        return self._tiles.levels(view)

    @property
    def tower(self) -> Any:
        """The vision tower."""
        return self._tiles.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        """The module to train: `adapter.projector.parameters()`, `adapter.projector.state_dict()`."""
        return self._tiles.model.projector

    @property
    def image_processor(self) -> Any:
        """The tower's."""
        return self._tiles.processor.image_processor

    def embeds(self, views: Sequence[Any]) -> Sequence[Tensor]:
        """`[n_coarse, width]` per picture: its coarse view through tower and projector."""
        if not views:
            return []
        return list(self._tiles.encode_tiles(torch.stack([pixels_of(view.coarse) for view in views])))

    @torch.no_grad()
    def _try_out(self) -> None:
        """Raise ValueError unless tower and projector make embeddings of the decoder's width: of a black tile."""
        side, cells, tower = self._tiles.side, self._tiles.cells, self.tower
        black = torch.zeros(1, 3, side, side, device=tower_device(tower), dtype=tower.dtype)
        made = self._tiles.project(self._tiles.model.get_image_features(black))
        if list(made.shape) != [1, cells**2, self.width]:
            raise ValueError(
                f"projector must map the tower's features to the decoder's width, [1, {cells**2}, {self.width}] for "
                f"one tile; got {list(made.shape)}"
            )


def _check_tower(tower: Any) -> None:
    config = getattr(tower, "config", None)
    for field in ("image_size", "patch_size"):
        value = getattr(config, field, None)
        if _side(value) < 1:
            raise UnsupportedModelError(
                f"tower must be a vision model of one square size (CLIPVisionModel, not CLIPModel), with {field} in "
                f"its config; {type(tower).__name__} has {field}={value!r}"
            )


def _side(value: Any) -> int:
    """A side in pixels from a config's number or pair; 0 if it isn't a square's."""
    if isinstance(value, (list, tuple)):
        value = value[0] if len(set(value)) == 1 else None
    return value if isinstance(value, int) else 0
