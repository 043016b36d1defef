"""Encoding tiles with a model's own vision tower and projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexcore.errors import StreamError, UnsupportedModelError

# From here on a wait is worth a progress bar.
_MANY_TILES = 64


@torch.no_grad()
def encode_tiles(
    model: Any,
    image_processor: Any,
    tiles: Tensor,
    cells: int,
    lead: int = 0,
    micro_batch: int = 8,
    progress: bool | None = None,
) -> Tensor:
    """Features of tiles, each encoded on its own.

    Args:
        model: A model with `get_image_features`.
        image_processor: Its image processor, for rescaling and normalising; it neither resizes nor crops here.
        tiles: `[k, 3, side, side]` uint8.
        cells: Cells per side of a tile's map.
        lead: Features before the map, such as a class token's; they are dropped.
        micro_batch: Tiles per call of the encoder.
        progress: Show a bar; None shows one on a terminal when there are many tiles.

    Returns:
        `[k, cells * cells, C]` in the tower's dtype, on its device.

    Raises:
        StreamError: The encoder makes another number of features.
    """
    from tqdm.auto import tqdm

    tower = vision_tower(model)
    device = tower_device(tower)
    out: list[Tensor] = []
    hidden = not progress if progress is not None else None if len(tiles) >= _MANY_TILES else True
    with tqdm(total=len(tiles), desc="encoding tiles", unit="tile", disable=hidden) as bar:
        for chunk in tiles.split(micro_batch):
            pixels = normalise(image_processor, chunk).to(device, tower.dtype)
            encoded = model.get_image_features(pixel_values=pixels)
            maps = getattr(encoded, "pooler_output", encoded)
            maps = torch.stack(list(maps))
            if maps.ndim != 3 or maps.shape[1] != lead + cells * cells:
                raise StreamError(
                    f"the vision tower makes {list(maps.shape[1:-1])} features of a tile, but the map needs "
                    f"{lead} + {cells}x{cells}: do the processor's num_additional_image_tokens and "
                    "vision_feature_select_strategy agree with the model's config?"
                )
            out.append(maps[:, lead:])
            bar.update(len(chunk))
    return torch.cat(out)


def vision_tower(model: Any) -> Any:
    """The model's vision tower; the model itself where it has none of that name."""
    return getattr(getattr(model, "model", model), "vision_tower", model)


def tower_device(tower: Any) -> torch.device:
    """Where the tower takes its inputs."""
    # Offloaded weights sit on the meta device between calls; their hooks move the inputs.
    return torch.device("cpu") if tower.device.type == "meta" else tower.device


def normalise(image_processor: Any, pixels: Tensor) -> Tensor:
    """Rescale and normalise `[k, 3, H, W]` uint8 pixels as the processor does, and nothing else."""
    made = image_processor(
        list(pixels),
        do_resize=False,
        do_center_crop=False,
        do_pad=False,
        input_data_format="channels_first",
        return_tensors="pt",
    )
    return made["pixel_values"]


def native_size(model: Any, processor: Any) -> tuple[int, int]:
    """The side of a picture as the vision tower gets to see it, in pixels and in cells.

    That is the config's `image_size`, or the processor's size where the tower takes that one too: DINOv2 was trained
    on 518 pixels, interpolates its positions for any other size, and is mostly shown 224.

    Raises:
        UnsupportedModelError: The model has no vision tower of one square size.
        ValueError: The processor isn't the model's.
    """
    name = type(model).__name__
    vision = getattr(getattr(model, "config", None), "vision_config", None)
    side, patch = (_square(getattr(vision, field, None)) for field in ("image_size", "patch_size"))
    if side is None or patch is None or not hasattr(model, "get_image_features"):
        raise UnsupportedModelError(
            f"ImageAdapter needs a model with get_image_features and a vision tower of one fixed square size "
            f"(config.vision_config.image_size and patch_size); {name} has none"
        )
    if not hasattr(processor, "image_processor"):
        raise ValueError(
            f"processor must be {name}'s own, with an image_processor; got {type(processor).__name__}"
        )
    # A processor without the attribute counts its tokens in some other way, checked when it is used.
    if getattr(processor, "patch_size", patch) != patch:
        raise ValueError(
            f"processor.patch_size is {processor.patch_size} and the vision tower's {patch}; they must be equal "
            "for the processor to make one token per cell"
        )
    shown = _processor_side(processor.image_processor)
    if shown is not None and shown != side and shown % patch == 0 and _takes(model, shown):
        side = shown
    return side, side // patch


def lead_tokens(model: Any, processor: Any) -> int:
    """Features that the model keeps before a picture's map: class and register tokens."""
    strategy = getattr(model.config, "vision_feature_select_strategy", None)
    if strategy is None:
        return 0
    # `default` drops the first feature, whatever it is; a tower without a class token is used with `full`.
    return max(0, int(getattr(processor, "num_additional_image_tokens", 0)) - (strategy == "default"))


def _processor_side(image_processor: Any) -> int | None:
    """Side of the square that the processor makes of any picture; None if it makes something else."""
    crops = getattr(image_processor, "do_center_crop", False)
    size = getattr(image_processor, "crop_size" if crops else "size", None)
    try:
        return _square((size["height"], size["width"]))  # type: ignore[index]
    except (KeyError, TypeError):
        return None


@torch.no_grad()
def _takes(model: Any, side: int) -> bool:
    """Whether the vision tower takes pictures of this side; asked of the tower, as no config says it."""
    tower = vision_tower(model)
    pixels = torch.zeros(1, 3, side, side, device=tower_device(tower), dtype=tower.dtype)
    try:
        model.get_image_features(pixel_values=pixels)
    except (RuntimeError, ValueError):
        return False
    return True


def _square(value: Any) -> int | None:
    if isinstance(value, (list, tuple)):
        value = value[0] if len(set(value)) == 1 else None
    return value if isinstance(value, int) else None
