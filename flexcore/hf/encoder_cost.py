"""What making features costs: the vision tower and the projector, run on one picture on the meta device."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import UnsupportedModelError
from .meta import counting

PROJECTOR = re.compile(
    r"(projector|projection|connector|merger|merger_list|aligner|resampler|perceiver|qformer)$"
)


@dataclass(frozen=True)
class Encoder:
    """What makes the tokens of one picture, or of one tile of a larger one.

    Args:
        tokens: Tokens that come out.
        tower_flops: FLOPs of the vision tower.
        projector_flops: FLOPs of what brings its features to the decoder's width.
        tower_params: The tower's weights.
        projector_params: The projector's.
    """

    tokens: int
    tower_flops: int
    projector_flops: int
    tower_params: int
    projector_params: int


def sized(config: Any, side: int | None) -> Any:
    """The config for pictures of another size, where a tower has one size."""
    vision = getattr(config, "vision_config", None)
    size = getattr(vision, "image_size", None)
    if vision is None or size is None or hasattr(vision, "temporal_patch_size"):
        return config
    patch = _first(getattr(vision, "patch_size", 1))
    if side is not None:
        if side < patch or side % patch:
            raise ValueError(f"side must be a multiple of vision_config.patch_size={patch}, got {side}")
        vision.image_size = [side, side] if isinstance(size, list | tuple) else side
    if hasattr(config, "image_grid_pinpoints"):
        config.image_grid_pinpoints = [[_first(vision.image_size)] * 2]
    return config


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def measure_encoder(model: Any, decoder: nn.Module, hidden: int, side: int | None) -> Encoder | None:
    """Run what makes features on one picture, the projector's share apart."""
    method = getattr(model, "get_image_features", None)
    vision = getattr(model.config, "vision_config", None)
    if method is None or vision is None:
        if hasattr(model.config, "audio_config"):
            raise ValueError(
                "audio_config: what makes features is counted for pictures; leave it out (encoder=False) and give the "
                "number of coarse tokens"
            )
        return None
    model.set_attn_implementation("eager")  # whose products are counted on any device
    inputs, tiles = _picture(method, model.config, side)
    projectors = outermost(model, decoder)
    share = 0
    with counting() as counter:

        def before(module: nn.Module, args: Any) -> None:
            nonlocal share
            share -= counter.get_total_flops()

        def after(module: nn.Module, args: Any, out: Any) -> None:
            nonlocal share
            share += counter.get_total_flops()

        for module in projectors:
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
        try:
            out = method(**inputs)
        except Exception as error:  # modeling code that asks for values that nobody has
            raise UnsupportedModelError(
                f"{type(model).__name__}: get_image_features doesn't run on the meta device "
                f"({type(error).__name__}: {error}); leave it out (encoder=False) and give the number of coarse tokens"
            ) from error
    made = getattr(out, "pooler_output", out)
    tokens = sum(t.numel() for t in tree_leaves(made) if isinstance(t, Tensor)) // hidden
    if tiles > 1:  # AnyRes packs tiles with separators between rows; a tile is its patches
        tokens = (_first(vision.image_size) // _first(vision.patch_size)) ** 2
    own = {id(p) for p in decoder.parameters()}
    for head in (model.get_output_embeddings(), model.get_input_embeddings()):
        own |= {id(p) for p in head.parameters()} if head is not None else set()
    projector = {id(p): p.numel() for m in projectors for p in m.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in own and id(p) not in projector)
    total = counter.get_total_flops()
    return Encoder(tokens, (total - share) // tiles, share // tiles, rest, sum(projector.values()))


def outermost(model: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """The modules outside the decoder whose name says that they project, less those inside such a one."""
    inside = {id(m) for m in decoder.modules()}
    found: list[nn.Module] = []
    for name, module in model.named_modules():
        parts = [p for p in name.split(".") if not p.isdigit()]
        if id(module) in inside or not parts or not PROJECTOR.search(parts[-1]):
            continue
        # a list of modules is never called itself
        called = list(module) if isinstance(module, nn.ModuleList) else [module]
        found += called
        inside |= {id(m) for c in called for m in c.modules()}
    return found


def _picture(method: Any, config: Any, side: int | None) -> tuple[dict[str, Any], int]:
    """What `get_image_features` takes for one picture, and how many tiles that is."""
    vision = config.vision_config
    names = ("num_channels", "in_channels", "in_chans")
    channels = next((c for n in names if (c := getattr(vision, n, None))), 3)
    parameters = inspect.signature(method).parameters
    tiles = 1
    given: dict[str, Any]
    if hasattr(vision, "temporal_patch_size") and hasattr(vision, "spatial_merge_size"):
        cell = vision.patch_size * vision.spatial_merge_size
        cells = (side or 336) // cell
        if not cells:
            raise ValueError(f"side must be at least one token's {cell} pixels, got {side}")
        rows = cells * vision.spatial_merge_size
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        given = {"pixel_values": torch.empty(rows * rows, width, device="meta")}
        given["image_grid_thw"] = torch.tensor([[1, rows, rows]])
    elif getattr(vision, "image_size", None) is not None:
        size = _first(vision.image_size)
        shape: tuple[int, ...] = (1, channels, size, size)
        if hasattr(config, "image_grid_pinpoints"):
            tiles, shape = 2, (1, 2, *shape[1:])
        given = {
            "pixel_values": torch.empty(shape, device="meta"),
            "image_sizes": torch.tensor([[size, size]]),
        }
    else:
        raise ValueError(
            "vision_config.image_size is missing, so the size of a picture isn't known; give side"
        )
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    lacking = [n for n in needed if n not in given]
    if lacking:
        raise ValueError(
            f"get_image_features asks for {', '.join(lacking)}, which can't be made up from the config; leave it out "
            "(encoder=False) and give the number of coarse tokens"
        )
    return {n: v for n, v in given.items() if n in parameters}, tiles
