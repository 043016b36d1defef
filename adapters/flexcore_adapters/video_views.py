"""The views of one clip: its lattice, coarse frames for the processor, and fine ones that are cut into tiles."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flexcore.grid import Grid
from flexcore.hf.processing import View
from flexcore.viz_video import contact_sheet

from .image_views import fit_square, margins
from .tiling import cut_tiles
from .video_io import Video
from .video_time import clock

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

# Bytes of fitted frames that a clip keeps at hand: a frame's tiles come in several micro-batches and layers, and
# going back in a clip with few key frames is slow.
_AT_HAND = 1 << 25


@dataclass(frozen=True)
class Layout:
    """How a model sees one frame.

    Args:
        coarse: Cells of the coarse view, `(H, W)`.
        coarse_size: Its pixels, `(height, width)`.
        tile: Cells of one tile of the fine view, what the encoder sees at once.
        tile_size: Its pixels.
        rows: Tiles from top to bottom.
        cols: Tiles from left to right.
        pad: Whether frames are centred in a square; else they are stretched.
        stack: Frames that the encoder merges into one step of time.
    """

    coarse: tuple[int, int]
    coarse_size: tuple[int, int]
    tile: tuple[int, int]
    tile_size: tuple[int, int]
    rows: int
    cols: int
    pad: bool
    stack: int = 1

    @property
    def fine(self) -> tuple[int, int]:
        """Cells of the fine view, `(H, W)`."""
        return self.rows * self.tile[0], self.cols * self.tile[1]

    @property
    def fine_size(self) -> tuple[int, int]:
        """Pixels of the fine view, `(height, width)`."""
        return self.rows * self.tile_size[0], self.cols * self.tile_size[1]


@dataclass(frozen=True)
class Look:
    """How frames become pixels: the processor's colour for padding, and its filter."""

    colour: tuple[int, ...]
    resample: Resampling

    def fit(self, frame: np.ndarray, size: tuple[int, int], pad: bool) -> Image:
        """A frame `[H, W, 3]` as a picture of the given `(height, width)`."""
        from PIL import Image

        picture = Image.fromarray(frame)
        if pad:
            return fit_square(picture, size[0], self.colour, self.resample)
        return picture.resize((size[1], size[0]), self.resample)

    def blank(self, size: tuple[int, int]) -> Image:
        """What stands in for a frame that can't be read."""
        from PIL import Image

        return Image.new("RGB", (size[1], size[0]), self.colour)


@dataclass(frozen=True, eq=False)
class VideoView(View):
    """One clip at both resolutions; fine frames are decoded when their tiles are asked for.

    Args:
        grid: Its lattice, `(T, H, W)`.
        coarse: The coarse frames, `coarse_index.size` PIL images.
        video: The clip.
        layout: How the model sees a frame.
        look: How frames become pixels.
        coarse_index: `[T, stack]` frames of the coarse view.
        fine_index: `[steps, stack]` frames of the fine view.
        span: The seconds that both views cover.
    """

    video: Video
    layout: Layout
    look: Look
    coarse_index: np.ndarray
    fine_index: np.ndarray
    span: tuple[float, float]
    _fitted: OrderedDict[int, Tensor] = field(default_factory=OrderedDict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    @property
    def n_tiles(self) -> int:
        """Tiles in all, of all steps of time."""
        return len(self.fine_index) * self.layout.rows * self.layout.cols

    def tiles(self, indices: Sequence[int]) -> Tensor:
        """Tiles by raster index (step of time, row, column), `[k, stack, 3, height, width]` uint8.

        Raises:
            RuntimeError: A frame can't be decoded.
            TimeoutError: The decoder hangs on it.
        """
        each = self.layout.rows * self.layout.cols
        with self._lock:
            steps = self._steps(sorted({i // each for i in indices}))
            return torch.stack([steps[i // each][i % each] for i in indices])

    def _steps(self, wanted: list[int]) -> dict[int, Tensor]:
        """The tiles of each step of time, `[rows * cols, stack, 3, height, width]`; frames are read in one pass."""
        out = {step: self._fitted[step] for step in wanted if step in self._fitted}
        missing = [step for step in wanted if step not in out]
        owners: dict[int, list[int]] = {}
        for step in missing:
            for index in self.fine_index[step]:
                owners.setdefault(int(index), []).append(step)
        pixels: dict[int, Tensor] = {}
        failed: Exception | None = None
        for index, frame in self.video.frames(owners):
            if isinstance(frame, Exception):
                failed = failed or frame
                continue
            fitted = self.look.fit(frame, self.layout.fine_size, self.layout.pad)
            pixels[index] = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
            for step in owners[index]:
                stack = [pixels.get(int(i)) for i in self.fine_index[step]]
                if step not in out and all(p is not None for p in stack):
                    tiles = cut_tiles(
                        torch.stack([p for p in stack if p is not None]), self.layout.rows, self.layout.cols
                    )
                    out[step] = tiles.unflatten(0, (len(stack), -1)).transpose(0, 1)
        self._keep(out)
        if failed is not None:
            raise failed
        return out

    def _keep(self, steps: dict[int, Tensor]) -> None:
        for step, tiles in steps.items():
            self._fitted[step] = tiles
            self._fitted.move_to_end(step)
            while len(self._fitted) > 1 and len(self._fitted) * tiles.nbytes > _AT_HAND:
                self._fitted.popitem(last=False)

    def describe(self, tile: int) -> str:
        """Where and when a tile is, for messages."""
        step, place = divmod(tile, self.layout.rows * self.layout.cols)
        row, col = divmod(place, self.layout.cols)
        frame, seconds = self.moment(step)
        where = f"row {row + 1} and column {col + 1} of {self.layout.rows}x{self.layout.cols} tiles"
        return f"frame {frame} at {clock(seconds)}, {where}"

    def moment(self, step: int) -> tuple[int, float]:
        """Frame of a fine step of time, and its time stamp in seconds."""
        frame = int(self.fine_index[step][0])
        return frame, float(self.video.times[frame])

    def contact_sheet(self, weights: Tensor, title: str = "", **options: Any) -> Image:
        """A picture of what was read when, see `flexcore.viz_video.contact_sheet`; frames are decoded for it.

        Args:
            weights: `[n_regions]`, how often each region was read (see `Trace.looked_at`).
            title: A line above the pictures.
            **options: For `flexcore.viz_video.contact_sheet`.
        """
        from PIL import Image

        n = len(self.coarse_index)
        return contact_sheet(
            self.grid,
            weights,
            frame=lambda step: Image.fromarray(self.video.frame(self.moment(step)[0])),
            label=lambda step: clock(self.moment(step)[1]),
            title=title,
            coarse=[(i + 0.5) / n for i in range(n)],
            **options,
        )


def lattice(
    video: Video, layout: Layout, coarse_steps: int, fine_steps: int, region: tuple[int, int, int]
) -> Grid:
    """The grid of a clip: a whole number of fine steps to a coarse one, regions that start anew with each.

    Args:
        video: The clip, for its margins.
        layout: How the model sees a frame.
        coarse_steps: Steps of time in the sequence.
        fine_steps: Steps of time of the fine view, a multiple.
        region: Sides of a region in fine tokens, `(t, h, w)`.
    """
    height, width = video.size
    padding = ((0.0, 0.0), *(margins(width, height) if layout.pad else ((0.0, 0.0), (0.0, 0.0))))
    return Grid.blocks(
        (coarse_steps, *layout.coarse),
        (fine_steps, *layout.fine),
        region,
        tile=(fine_steps // coarse_steps, *layout.tile),
        padding=padding,
    )
