"""How models that take frames of any size take a video: Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexcore.hf.processing import find_positions

from .image_tower import tower_device
from .image_views import pixels_of
from .native_tower import as_is, cell_of, encode_native, fit_cells, tower_of
from .video_families import Family
from .video_views import Layout, VideoView

if TYPE_CHECKING:
    from transformers import BatchFeature

# The least that Qwen2-VL's own video processor makes of a frame.
_COARSE_CELLS = 128
# To the processor a clip has a frame for every millisecond, of which ours are a few. So whatever it works out from
# the frames' numbers (time stamps in the text, seconds per step) is right to a millisecond at any frame rate.
_TICKS = 1000


class NativeFamily(Family):
    """A tower that takes frames of any size, and merges a few of them (`stack`) into one step of time.

    The coarse clip goes through the model's own video processor as a video, and nothing is padded: a frame is
    stretched to whole numbers of cells. A tile of the fine view is one step of time of a part of the picture, encoded
    as a clip of its own.

    Qwen3-VL's processor writes the time of every step into the text, so a clip's coarse tokens aren't side by side;
    a fine token that lies between two steps takes a position between theirs, across that text.

    Args:
        model: The model.
        processor: Its own processor.
        aspect: None or `stretch`.
        zoom: Tiles of the fine view per axis, each of the coarse frame's shape.
        coarse_pixels: Budget of a coarse frame, which is never larger than the clip's; None is 128 cells.

    Raises:
        ValueError: An argument is out of range, or the processor isn't the model's.
        UnsupportedModelError: The model has no such tower.
    """

    def __init__(
        self, model: Any, processor: Any, aspect: str | None, zoom: int, coarse_pixels: int | None = None
    ):
        super().__init__(model, processor, aspect or "stretch", zoom)
        self.cell = cell_of(model, processor, "video_processor")
        if self.aspect != "stretch":
            raise ValueError(
                f"aspect must be None or 'stretch' for {type(model).__name__}, which takes frames of any shape and "
                f"needs no padding; got {aspect!r}"
            )
        self.coarse_pixels = self.cell.budget(coarse_pixels, _COARSE_CELLS)
        self.placeholder = str(processor.video_token)
        self.token_id = int(model.config.video_token_id)

    @property
    def settings(self) -> Any:
        return self.processor.video_processor

    @property
    def device(self) -> torch.device:
        return tower_device(tower_of(self.model))

    @property
    def dtype(self) -> torch.dtype:
        return tower_of(self.model).dtype

    def layout(self, height: int, width: int) -> Layout:
        cells = fit_cells(height, width, self.cell.side, self.coarse_pixels)
        size = (cells[0] * self.cell.side, cells[1] * self.cell.side)
        return Layout(cells, size, cells, size, self.zoom, self.zoom, pad=False, stack=self.cell.stack)

    def process(self, texts: list[str], views: Sequence[VideoView], **kwargs: Any) -> BatchFeature:
        if not views:
            return self.processor(text=texts, return_tensors="pt", **kwargs)
        clips = [torch.stack([pixels_of(frame) for frame in view.coarse]) for view in views]
        fixed = {**as_is(self.settings), "video_metadata": [_timing(view) for view in views]}
        inputs = self.processor(text=texts, videos=clips, return_tensors="pt", videos_kwargs=fixed, **kwargs)
        expected = [self.cell.grid(len(view.coarse_index), *view.layout.coarse) for view in views]
        made = inputs["video_grid_thw"].tolist()
        if made != expected:
            raise ValueError(
                f"the processor made video_grid_thw {made} from coarse clips of {expected}, so cells and tokens no "
                "longer match: does it resize or sample whatever it is told?"
            )
        return inputs

    def positions(self, input_ids: Tensor, media: Sequence[Sequence[VideoView]]) -> list[list[Tensor]]:
        cells = [[view.grid.n_coarse for view in sample] for sample in media]
        return find_positions(input_ids, self.token_id, cells, 0, "video")

    def encode(self, tiles: Sequence[Tensor]) -> Tensor:
        return encode_native(self.model, self.settings, tiles, self.cell)


def _timing(view: VideoView) -> dict[str, Any]:
    """When the coarse frames are shown, as the processors take it; see `_TICKS`."""
    first, last = view.span
    return {
        "fps": float(_TICKS),
        "total_num_frames": max(1, round(_TICKS * (last - first))),
        "duration": last - first,
        "frames_indices": [round(_TICKS * float(view.video.times[i])) for i in view.coarse_index.ravel()],
    }
