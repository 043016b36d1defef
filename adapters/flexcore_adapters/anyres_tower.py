"""AnyRes models (LLaVA-NeXT, LLaVA-OneVision) taken apart: tiles without the packing, overviews without tiles.

Such a model encodes an overview and the tiles of a picture in one go and packs the tiles' features, with a newline
token after each row, behind the overview's. Here a tile is encoded alone, and the sequence gets the overview alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Side of a picture so elongated that its short side is no pixel high on any layout of tiles.
_FAR = 1_000_000


def is_anyres(model: Any) -> bool:
    """Whether a model packs an overview and tiles laid out by pinpoints."""
    inner = getattr(model, "model", model)
    parts = ("vision_tower", "multi_modal_projector", "image_newline", "pack_image_features")
    return hasattr(model.config, "image_grid_pinpoints") and all(hasattr(inner, part) for part in parts)


class TileTower:
    """A model's tower and projector, as `encode_tiles` asks for features.

    Args:
        model: An AnyRes model.
    """

    def __init__(self, model: Any):
        self._model = model  # and no part of it: whoever copies an adapter leaves its model out

    @property
    def vision_tower(self) -> Any:
        """The model's own."""
        return getattr(self._model, "model", self._model).vision_tower

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """`[k, tokens, C]` features of `[k, 3, side, side]` pixels, each tile on its own and nothing packed."""
        inner, config = getattr(self._model, "model", self._model), self._model.config
        hidden = inner.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        chosen = torch.cat([hidden[layer] for layer in layers], dim=-1)
        if config.vision_feature_select_strategy == "default":
            chosen = chosen[:, 1:]
        features: Tensor = inner.multi_modal_projector(chosen)
        return features


def tile_processor(image_processor: Any, side: int) -> Callable[..., dict[str, Tensor]]:
    """An AnyRes image processor as one that takes tiles of `side` pixels, its own size, for what they are."""

    def process(
        images: Sequence[Any], *, input_data_format: str, return_tensors: str, **no_ops: bool
    ) -> dict[str, Tensor]:
        # `normalise` switches resizing and cropping off, which not every release knows, and which change no tile
        layout = {"image_grid_pinpoints": [[side, side]]}
        made = image_processor(
            images, input_data_format=input_data_format, return_tensors=return_tensors, **layout
        )
        # of one tile it makes an overview and one tile, the same pixels twice
        return {"pixel_values": made["pixel_values"][:, 0]}

    return process


@dataclass(frozen=True)
class Overview:
    """How a model's forward is made to embed the overview alone.

    Args:
        trail: Tokens that the model puts behind the overview's cells.
        blanks: Blank tiles that it has to be given beside the overview.
        size: Size of the picture it is told, `(height, width)`.
        several: Whether it is told that the picture is one of several in its sample.
    """

    trail: int
    blanks: int
    size: tuple[int, int]
    several: bool

    def inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        """What the forward takes for `[N, 3, side, side]` overviews, a row per picture in every tensor."""
        n = len(pixels)
        blank = torch.zeros_like(pixels)[:, None].expand(-1, self.blanks, -1, -1, -1)
        out = {
            "pixel_values": torch.cat([pixels[:, None], blank], dim=1),
            "image_sizes": torch.tensor([self.size] * n),
        }
        if self.several:
            out["batch_num_images"] = torch.full((n,), 2)
        return out


def overview_of(model: Any, side: int, cells: int) -> Overview:
    """How this model's forward is made to embed an overview alone.

    LLaVA-OneVision does so for the pictures of a sample that has several, and adds one newline token; one that is
    told so of every picture never asks for tiles. LLaVA-NeXT always wants the tiles of some layout, but drops the
    tokens outside the picture's own shape: of a picture told to be a line, no token of the tiles is left. They are
    blank then, and encoding them is the price (two tiles a picture with the layouts of the released checkpoints).

    Args:
        model: An AnyRes model.
        side: A tile's side in pixels.
        cells: Its side in cells.
    """
    inner = getattr(model, "model", model)
    if "batch_num_images" in inspect.signature(inner.get_image_features).parameters:
        return Overview(trail=1, blanks=0, size=(side, side), several=True)
    pinpoints = model.config.image_grid_pinpoints
    options = []
    for flat, size in ((True, (1, _FAR)), (False, (_FAR, 1))):
        height, width = best_resolution(size, pinpoints)
        rows, cols = height // side * cells, width // side * cells
        # the model cuts off half of the difference on either side, so an odd one leaves a row or column
        left = (rows % 2, cols) if flat else (rows, cols % 2)
        tiles = (height // side) * (width // side)
        options.append(Overview(left[0] * (left[1] + 1), tiles, size, several=False))
    return min(options, key=lambda option: (option.trail, option.blanks))


def best_resolution(size: tuple[int, int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The layout that the model's own processor takes for a picture, both as `(height, width)` in pixels."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(size, list(pinpoints))
    return height, width
