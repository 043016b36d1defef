"""collate: pad and join samples with different lengths and media counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexcore.errors import StreamError
from flexcore.streams import StreamBatch

if TYPE_CHECKING:
    from .inputs import FlexInputs

_SIDES = ("right", "left")
_PIXELS = ("pixel_values", "pixel_values_videos")
# a row per window of sound, those of all samples one after the other
_WINDOWS = ("input_features", "input_features_mask", "feature_attention_mask")
# a row per medium: what models of AnyRes and of native resolution are told about its pixels
_SIZES = ("image_sizes", "batch_num_images", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
_OF_MEDIA = (*_PIXELS, *_WINDOWS, *_SIZES, "flex_streams")


def collate(
    features: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    pad_token_id: int | None = None,
    padding_side: str = "right",
    label_pad: int = -100,
) -> FlexInputs:
    """Join an adapter's outputs, one sample or a small batch each, into one batch.

    Args:
        features: Mappings with `input_ids` `[T]` or `[b, T]`; `attention_mask` (default all ones) and other
            tensors of that shape, such as `labels` or `readout_mask`; `pixel_values` `[media, ...]` (a clip's
            coarse frames one by one), `pixel_values_videos` `[media, ...]` or an audio model's `input_features` and
            their mask unless there is none; `image_sizes`, `image_grid_thw` and their kin `[media, ...]`;
            `flex_streams`, a `StreamBatch` of the `b` samples, unless they are text only.
        tokenizer: Where the padding token is taken from; a processor or an adapter will do.
        pad_token_id: The padding token itself, instead of `tokenizer`.
        padding_side: `right`, or `left` for generation. Padding on the left shifts the media's positions.
        label_pad: Padding of `labels`.

    Returns:
        The padded batch, in the order of `features`.

    Raises:
        ValueError: No padding token where one is needed, or tensors that can't be joined; the message names them.
        StreamError: `flex_streams` doesn't fit `input_ids` or `pixel_values`.

    >>> batch = collate([{"input_ids": torch.tensor([5, 6])}, {"input_ids": torch.tensor([7])}], pad_token_id=0)
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[5, 6], [7, 0]], [[1, 1], [1, 0]])
    """
    from .inputs import FlexInputs

    if not features:
        raise ValueError("features must hold at least one sample, got none")
    if padding_side not in _SIDES:
        raise ValueError(f"padding_side must be one of {', '.join(_SIDES)}, got {padding_side!r}")
    parts = [_part(i, feature) for i, feature in enumerate(features)]
    length = max(part["input_ids"].shape[1] for part in parts)
    missing = [length - part["input_ids"].shape[1] for part in parts]
    if pad_token_id is None and any(missing):
        pad_token_id = _pad_token(tokenizer)

    out: dict[str, Any] = {}
    for key in _keys(parts):
        values = [part[key] for part in parts if key in part]
        if key in _OF_MEDIA:
            continue
        fill = {"input_ids": pad_token_id or 0, "labels": label_pad}.get(key, 0)
        out[key] = torch.cat([_pad(v, n, fill, padding_side) for v, n in zip(values, missing, strict=True)])
    # a model that takes the coarse view otherwise has no pixels at all
    seen = [any(key in part for key in _PIXELS) for part in parts]
    for i, part in enumerate(parts):
        if any(seen) and not seen[i] and "flex_streams" in part and part["flex_streams"].n_media:
            raise StreamError(
                f"features[{i}]['flex_streams'] holds {part['flex_streams'].n_media} media, pixel_values 0"
            )
    for key in (*_PIXELS, *_WINDOWS, *_SIZES):
        pixels = [part[key] for part in parts if key in part]
        shapes = {tuple(p.shape[1:]) for p in pixels}
        if len(shapes) > 1:
            raise ValueError(f"{key} must agree in all but the first dimension, got {sorted(shapes)}")
        if pixels:
            out[key] = torch.cat(pixels)
    if any("flex_streams" in part for part in parts):
        # A sample without streams is text only: it still takes its place in the batch.
        streams = [p.get("flex_streams", StreamBatch(((),) * len(p["input_ids"]))) for p in parts]
        out["flex_streams"] = StreamBatch.cat(streams, missing if padding_side == "left" else None)
    return FlexInputs(out)


def _part(index: int, feature: Mapping[str, Any]) -> dict[str, Any]:
    """One feature with a batch dimension everywhere, checked."""
    where = f"features[{index}]"
    part = {key: value for key, value in feature.items() if value is not None}
    if "input_ids" not in part:
        raise ValueError(f"{where} must hold input_ids, got {sorted(feature)}")
    ids = torch.as_tensor(part["input_ids"])
    if ids.ndim not in (1, 2):
        raise ValueError(f"{where}['input_ids'] must be [T] or [b, T], got {list(ids.shape)}")
    part.setdefault("attention_mask", torch.ones_like(ids))
    for key, value in part.items():
        if key in _OF_MEDIA:
            continue
        value = torch.as_tensor(value)
        if value.shape != ids.shape:
            raise ValueError(
                f"{where}[{key!r}] must have the shape of input_ids, {list(ids.shape)}, to be padded with it; "
                f"got {list(value.shape)}"
            )
        part[key] = value.reshape(-1, ids.shape[-1])
    streams = part.get("flex_streams")
    if streams is None:
        return part
    if not isinstance(streams, StreamBatch):
        raise StreamError(f"{where}['flex_streams'] must be a StreamBatch, got {type(streams).__name__}")
    if len(streams) != len(part["input_ids"]):
        raise StreamError(
            f"{where}['flex_streams'] is for {len(streams)} sample(s), input_ids for {len(part['input_ids'])}"
        )
    pixels = part.get("image_grid_thw", part.get("pixel_values"))
    # a clip may come as one picture for each of its coarse frames
    frames = sum(s.grid.coarse[0] if len(s.grid.coarse) == 3 else 1 for sample in streams for s in sample)
    if pixels is not None and len(pixels) not in (streams.n_media, frames):
        raise StreamError(
            f"{where}['flex_streams'] holds {streams.n_media} media, pixel_values {len(pixels)}"
        )
    return part


def _keys(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = list(dict.fromkeys(key for part in parts for key in part))
    for key in keys:
        lacking = [i for i, part in enumerate(parts) if key not in part]
        if lacking and key not in _OF_MEDIA:
            raise ValueError(
                f"{key} must be in all features or in none, it is missing from features {lacking}"
            )
    return keys


def _pad_token(tokenizer: Any) -> int:
    # Processors and adapters carry their tokenizer as an attribute.
    token = getattr(getattr(tokenizer, "tokenizer", tokenizer), "pad_token_id", None)
    if token is None:
        raise ValueError("features of different lengths need pad_token_id, or a tokenizer that has one")
    return int(token)


def _pad(values: Tensor, missing: int, fill: int, side: str) -> Tensor:
    padding = values.new_full((len(values), missing), fill)
    return torch.cat([padding, values] if side == "left" else [values, padding], dim=1)
