"""A recording as the encoder gets to see it: windows of equal length, their lattice, and the seconds they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexcore.grid import Grid
from flexcore.hf.processing import View

from .audio_io import Recording, clock


@dataclass(frozen=True)
class Layout:
    """How a window's samples become tokens.

    Args:
        rate: Samples per second that the encoder takes.
        window: Samples per window.
        frames: Fine frames per window.
        pool: Fine frames per coarse cell; divides `frames`.
        bands: Fine tokens, and coarse cells, per frame: 1 for a `(T,)` lattice, more for `(T, F)`.

    Raises:
        ValueError: `pool` doesn't divide `frames`.
    """

    rate: int
    window: int
    frames: int
    pool: int
    bands: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.pool, bool) or not isinstance(self.pool, int) or self.pool < 1:
            raise ValueError(f"pool must be an integer >= 1, got {self.pool!r}")
        if self.frames % self.pool:
            fits = [p for p in range(1, self.frames + 1) if self.frames % p == 0]
            raise ValueError(
                f"pool must divide the {self.frames} fine frames of a window (one of {fits}), got {self.pool}"
            )

    @property
    def cells(self) -> int:
        """Coarse cells along time per window."""
        return self.frames // self.pool

    @property
    def frame_seconds(self) -> float:
        """Seconds per fine frame."""
        return self.window / self.rate / self.frames

    @property
    def tile(self) -> tuple[int, ...]:
        """A window's side in fine tokens, per axis."""
        return (self.frames,) if self.bands == 1 else (self.frames, self.bands)

    def grid(self, cells: int, content: float, region: tuple[int, ...]) -> Grid:
        """The lattice of a recording.

        Args:
            cells: Coarse cells along time.
            content: Fine frames along time that hold sound; what is left of the last cell is padding.
            region: Side of a region in fine tokens, per axis.
        """
        frames = cells * self.pool
        rest = max(0.0, 1.0 - content / frames)
        axes = len(self.tile)
        return Grid.blocks(
            (cells, self.bands)[:axes],
            (frames, self.bands)[:axes],
            region,
            tile=self.tile,
            padding=((0.0, rest), (0.0, 0.0))[:axes],
        )


@dataclass(frozen=True, eq=False)
class AudioView(View):
    """One recording, opened and checked.

    Args:
        grid: Its lattice.
        coarse: `[n_coarse, C]` features in the sequence, or None where the model makes them itself.
        recording: Where its samples come from.
        layout: Its windows.
    """

    recording: Recording
    layout: Layout

    @property
    def samples(self) -> int:
        """Samples in all, at the encoder's rate."""
        return self.recording.length(self.layout.rate)

    @property
    def n_windows(self) -> int:
        """Windows in all; the last one is padded with silence."""
        return -(-self.samples // self.layout.window)

    def window(self, index: int) -> tuple[Tensor, int]:
        """A window's `[window]` samples, and how many of them are the recording's."""
        return read_window(self.recording, self.layout, index)

    def describe(self, window: int) -> str:
        """A window's time stamps, for messages."""
        length = self.layout.window / self.layout.rate
        stop = min((window + 1) * length, self.recording.seconds)
        return f"{clock(window * length)} to {clock(stop)}"


def read_window(recording: Recording, layout: Layout, index: int) -> tuple[Tensor, int]:
    """See `AudioView.window`."""
    start = index * layout.window
    held = min(layout.window, recording.length(layout.rate) - start)
    return recording.read(start, start + layout.window, layout.rate), held


def windows(recording: Recording, layout: Layout, micro_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A recording's windows in order, `[k, window]` samples and `[k]` lengths at a time."""
    total = -(-recording.length(layout.rate) // layout.window)
    for start in range(0, total, micro_batch):
        parts = [read_window(recording, layout, i) for i in range(start, min(start + micro_batch, total))]
        yield torch.stack([p for p, _ in parts]), torch.tensor([n for _, n in parts])


def region_seconds(grid: Grid, region: int, layout: Layout) -> tuple[float, float]:
    """A region's extent in seconds, cut off where the recording ends."""
    (start, stop), (_, after) = grid.box(region)[0], grid.padding[0]
    total = grid.fine[0] * layout.frame_seconds
    return start * total, min(stop, 1.0 - after) * total
