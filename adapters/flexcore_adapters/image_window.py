"""Pictures read window by window; `image_files` opens files too large to hold as such, `image_scaling` scales them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexcore.grid import Grid
from flexcore.tiled_source import TiledSource, UnitEncoder

from .image_io import turn
from .image_scaling import scaled

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

# EXIF orientation -> whether x and y change places, and which stored axis runs backwards (x, y).
_TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}

Cut = Callable[[int, int, int, int], "Image"]


@dataclass
class WindowStats:
    """What reading a picture by window has cost so far; read it at any time.

    Args:
        windows: Windows read; a large one is read in strips, each of which counts.
        peak_bytes: Bytes of the largest of them, as RGB.
        spool_bytes: Bytes of the decoded picture on disk, 0 without a spool.
        seconds: Seconds spent decoding, spooling and reading; scaling isn't among them.
    """

    windows: int = 0
    peak_bytes: int = 0
    spool_bytes: int = 0
    seconds: float = 0.0


class Windows(ABC):
    """A picture of which any window can be read, upright and RGB.

    Args:
        stored: `(width, height)` of the picture as it is stored.
        name: What to call it in messages.
        orientation: Its EXIF orientation.
    """

    def __init__(self, stored: tuple[int, int], name: str, orientation: int = 1):
        self.name = name
        self.orientation = orientation
        self.stats = WindowStats()
        self._stored = stored
        self.size = stored[::-1] if _TURNS[orientation][0] else stored
        # Rows that show something; in all others the picture is of this colour.
        self.rows = (0, self.size[1])
        self.colour: tuple[int, ...] = (0, 0, 0)

    @abstractmethod
    def _open(self) -> Any:
        """A context in which windows can be read: yields `cut(left, top, right, bottom)`, in stored coordinates."""

    @contextmanager
    def opened(self) -> Iterator[Cut]:
        """Open the picture for several windows: yields `read`, for one thread; several may open one picture."""
        with self._open() as cut:

            def read(left: int, top: int, right: int, bottom: int) -> Image:
                width, height = self.size
                if not (0 <= left < right <= width and 0 <= top < bottom <= height):
                    raise ValueError(
                        f"a window must lie in the {width}x{height} pixels of {self.name}, got "
                        f"{(left, top, right, bottom)}"
                    )
                started = time.perf_counter()
                window = turn(cut(*self._in_store(left, top, right, bottom)), self.orientation)
                self.stats.seconds += time.perf_counter() - started
                self.stats.windows += 1
                self.stats.peak_bytes = max(self.stats.peak_bytes, 3 * (right - left) * (bottom - top))
                return window

            yield read

    def read(self, left: int, top: int, right: int, bottom: int) -> Image:
        """One window, upright 8-bit RGB.

        Raises:
            ValueError: It reaches over the picture's edge, or the file is corrupt there or has changed.
            OSError: The file can't be read any more.
        """
        with self.opened() as read:
            return read(left, top, right, bottom)

    def scaled(
        self,
        size: tuple[int, int],
        resample: Resampling,
        part: tuple[int, int, int, int] | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Image:
        """What `picture.resize(size, resample).crop(part)` is, see `image_scaling.scaled`."""
        return scaled(self, size, resample, part, progress=progress)

    def _in_store(self, left: int, top: int, right: int, bottom: int) -> tuple[int, int, int, int]:
        swap, flip_x, flip_y = _TURNS[self.orientation]
        if swap:
            left, top, right, bottom = top, left, bottom, right
        width, height = self._stored
        if flip_x:
            left, right = width - right, width - left
        if flip_y:
            top, bottom = height - bottom, height - top
        return left, top, right, bottom


class PictureWindows(Windows):
    """Windows of a picture in memory, which is upright RGB already."""

    def __init__(self, picture: Image, name: str = "image"):
        super().__init__(picture.size, name)
        self.picture = picture

    @contextmanager
    def _open(self) -> Iterator[Cut]:
        yield lambda *box: self.picture.crop(box)


class PaddedWindows(Windows):
    """Windows of the square that a picture is centred in; the square itself is never held.

    Args:
        picture: What lies in the middle.
        colour: Of the padding.
    """

    def __init__(self, picture: Windows, colour: tuple[int, ...]):
        width, height = picture.size
        side = max(width, height)
        super().__init__((side, side), picture.name)
        self.picture = picture
        self.stats = picture.stats
        self.colour = colour
        self._at = (side - width) // 2, (side - height) // 2
        self.rows = (self._at[1], self._at[1] + height)

    @contextmanager
    def opened(self) -> Iterator[Cut]:
        """See `Windows.opened`; the picture's own window is what counts in `stats`."""
        with self._open() as cut:
            yield cut

    @contextmanager
    def _open(self) -> Iterator[Cut]:
        from PIL import Image

        (x, y), (width, height) = self._at, self.picture.size
        with self.picture.opened() as read:

            def cut(left: int, top: int, right: int, bottom: int) -> Image.Image:
                window = Image.new("RGB", (right - left, bottom - top), self.colour)
                inside = max(left - x, 0), max(top - y, 0), min(right - x, width), min(bottom - y, height)
                if inside[0] < inside[2] and inside[1] < inside[3]:
                    window.paste(read(*inside), (inside[0] + x - left, inside[1] + y - top))
                return window

            yield cut


class WindowedSource(TiledSource):
    """Fine features of a picture that is read by window.

    Args:
        grid: The picture's lattice.
        tile: A tile's side in fine tokens, per axis.
        encoder: What encodes.
        key: The picture's own number among those of the encoder.
        name: What to call it in errors.
        where: Says where a tile lies.
        windows: Counters of its windows.
    """

    def __init__(
        self,
        grid: Grid,
        tile: Sequence[int],
        encoder: UnitEncoder,
        key: int,
        name: str,
        where: Callable[[int], str],
        windows: WindowStats,
    ):
        super().__init__(grid, tile, encoder, key, name, where)
        self.windows = windows
