"""Files of pictures too large to hold.

A tiled TIFF keeps its pixels in pieces that can be decoded alone, so windows are read from the file itself. Any other
file is decoded once, from top to bottom, into a spool: a file without a name, which the system takes back when the
picture goes away, however the process ends. libvips does both in the memory of some rows, but for what a format keeps
to the end: the coefficients of a progressive JPEG, the passes of an interlaced PNG.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from flexcore.viz import need_vips

from .image_io import (
    check_size,
    default_max_pixels,
    from_block,
    image_size,
    load_image,
    open_header,
    orientation,
)
from .image_scaling import STRIP
from .image_window import Cut, PictureWindows, Windows

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's own limit: a picture that needs a larger max_pixels is read by window.
WINDOW_PIXELS = (1 << 30) // 12
# Formats that libvips decodes row by row, and to the same bits as Pillow.
_STREAMED = ("JPEG", "MPO", "PNG", "TIFF")
# Rows that libvips is asked for at once: it holds some twenty times as much on the way.
_ROWS = 16
_TILE_WIDTH, _PLANAR = 322, 284  # TIFF's tags
_WHOLE = "save it in another way, or raise window_pixels to decode it whole"
_DTYPES = {"uchar": "u1", "ushort": "u2", "short": "i2", "uint": "u4", "int": "i4", "float": "f4"}


@dataclass(frozen=True)
class Stored:
    """How a picture's pixels are stored, and how a block of them becomes RGB.

    Args:
        name: What to call the picture in messages.
        size: Width and height, as stored.
        bands: Channels.
        dtype: Of a channel, as numpy spells it.
        kept: Channels that are looked at, such as 3 of 4 where the fourth isn't alpha.
        cmyk: Whether they are CMYK.
        orientation: EXIF orientation.
    """

    name: str
    size: tuple[int, int]
    bands: int = 3
    dtype: str = "u1"
    kept: int = 3
    cmyk: bool = False
    orientation: int = 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.size[0] * self.bands * np.dtype(self.dtype).itemsize

    def rgb(self, block: np.ndarray) -> Image:
        """The picture of a `[H, W, bands]` block."""
        return from_block(np.ascontiguousarray(block[..., : self.kept]), self.name, self.cmyk)


class TiledWindows(Windows):
    """Windows of a tiled TIFF, decoded from the tiles they touch.

    The file is opened for every use and not kept open: a handle can't be shared by threads.

    Args:
        path: The file.
        stored: How its pixels are stored.
    """

    def __init__(self, path: str, stored: Stored):
        super().__init__(stored.size, stored.name, stored.orientation)
        self.path = path
        self.stored = stored
        self._written = _written(path)

    @contextmanager
    def _open(self) -> Iterator[Cut]:
        if _written(self.path) != self._written:
            raise ValueError(f"{self.name} was changed since it was first read")
        region = need_vips().Region.new(_vips_image(self.path, self.name, "random"))

        def cut(left: int, top: int, right: int, bottom: int) -> Image:
            return self.stored.rgb(_fetch(region, self.stored, left, top, right - left, bottom - top))

        yield cut


class SpooledWindows(Windows):
    """Windows of a decoded picture on disk, row after row as it was stored.

    Args:
        file: The spool; it is closed when the picture goes away.
        stored: How its pixels are stored.
    """

    def __init__(self, file: BinaryIO, stored: Stored):
        super().__init__(stored.size, stored.name, stored.orientation)
        self.stored = stored
        self.stats.spool_bytes = stored.row_bytes * stored.size[1]
        self._file = file
        weakref.finalize(self, file.close)

    @contextmanager
    def _open(self) -> Iterator[Cut]:
        stored = self.stored
        width = stored.size[0]
        step = max(1, STRIP // width)

        def cut(left: int, top: int, right: int, bottom: int) -> Image:
            block = np.empty((bottom - top, right - left, stored.bands), stored.dtype)
            # A map of a few rows at a time: what was touched of a map, and around it, counts as the process' memory.
            for y in range(top, bottom, step):
                shape = (min(step, bottom - y), width, stored.bands)
                rows = np.memmap(self._file, stored.dtype, "r", y * stored.row_bytes, shape)
                block[y - top : y - top + step] = rows[:, left:right]
            return stored.rgb(block)

        yield cut


def load_pictures(
    media: Sequence[Any],
    max_pixels: int | None,
    window_pixels: int = WINDOW_PIXELS,
    spool_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> list[Image | Windows]:
    """Load a call's pictures; the sizes of all are checked first, before any file is decoded.

    Args:
        media: As for `load_image`, called `image 0` and so on in messages.
        max_pixels: The most pixels allowed; None takes Pillow's limit.
        window_pixels: See `open_picture`.
        spool_dir: See `open_picture`.
        progress: See `open_picture`.
    """
    limit = default_max_pixels() if max_pixels is None else max_pixels
    named = [(medium, limit, f"image {i}") for i, medium in enumerate(media)]
    for one in named:
        check_size(*one)
    return [open_picture(*one, window_pixels, spool_dir, progress) for one in named]


def open_picture(
    image: Any,
    max_pixels: int | None = None,
    name: str = "image",
    window_pixels: int = WINDOW_PIXELS,
    spool_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Image | Windows:
    """Load an image as `load_image` does, or, if it is large, open it to be read by window.

    What is in memory already stays there; to have a file read by window, pass its path.

    Args:
        image: As for `load_image`.
        max_pixels: The most pixels allowed, None for any number.
        name: What to call the image in messages; files go by their path.
        window_pixels: A picture of more pixels than these is read by window.
        spool_dir: Where the spool of a file goes that can't be decoded in pieces; None is the system's temporary
            folder. It needs room for the decoded picture.
        progress: Show a bar while spooling; None shows one on a terminal.

    Raises:
        ValueError: The image is unusable, see `load_image`, or of a kind that can't be read by window.
        OSError: The spool doesn't fit on the disk.
        ImportError: pyvips is missing.
    """
    check_size(image, max_pixels, name)
    width, height = image_size(image, name)
    if width * height <= window_pixels:
        return load_image(image, max_pixels, name)
    if not isinstance(image, (str, os.PathLike)):
        return PictureWindows(load_image(image, max_pixels, name), name)
    path = os.fspath(image)
    name = repr(path)
    with open_header(path) as header:
        streamed, mode = header.format in _STREAMED, header.mode
        alpha, turned = header.has_transparency_data, orientation(header)
        tags = getattr(header, "tag_v2", {})
    if not streamed:  # decoded whole, this once
        picture = load_image(path, max_pixels, name)

        def rows_of(y: int, rows: int) -> np.ndarray:
            return np.asarray(picture.crop((0, y, picture.width, y + rows)))

        return _spool(rows_of, Stored(name, picture.size), spool_dir, progress)
    tiled = _TILE_WIDTH in tags
    if mode == "LAB" or (tiled and tags.get(_PLANAR) == 2):
        what = "LAB colours" if mode == "LAB" else "a plane of tiles for each colour"
        raise ValueError(f"{name} holds {what}, which can't be read by window; {_WHOLE}")
    vips = _vips_image(path, name, "random" if tiled else "sequential")
    kept = vips.bands if alpha or mode == "CMYK" else 1 if vips.bands < 3 else 3
    size, dtype = (vips.width, vips.height), _DTYPES[vips.format]
    stored = Stored(name, size, vips.bands, dtype, kept, mode == "CMYK", turned)
    if tiled:
        return TiledWindows(path, stored)
    region = need_vips().Region.new(vips)
    return _spool(lambda y, rows: _fetch(region, stored, 0, y, size[0], rows), stored, spool_dir, progress)


def _spool(
    read: Callable[[int, int], np.ndarray],
    stored: Stored,
    folder: str | os.PathLike[str] | None,
    progress: bool | None,
) -> SpooledWindows:
    """Write what `read(y, rows)` gives, from top to bottom, to a file without a name."""
    from tqdm.auto import tqdm

    height, started = stored.size[1], time.perf_counter()
    need, where = stored.row_bytes * height, os.fspath(folder or tempfile.gettempdir())
    if (free := shutil.disk_usage(where).free) < need:
        raise OSError(errno.ENOSPC, _full(stored.name, need, where, f"only {free:,} are free"))
    step = max(1, STRIP // stored.size[0])
    hidden = not progress if progress is not None else None
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile(dir=where, prefix="flexcore-"))
        with tqdm(total=height, desc=f"spooling {stored.name}", unit="row", disable=hidden) as bar:
            for y in range(0, height, step):
                rows = min(step, height - y)
                block = read(y, rows)
                try:
                    file.write(np.ascontiguousarray(block).data)
                    file.flush()
                except OSError as error:
                    message = _full(stored.name, need, where, error.strerror)
                    raise OSError(error.errno, message) from error
                bar.update(rows)
        stack.pop_all()  # from here on the file is the picture's
    windows = SpooledWindows(file, stored)
    windows.stats.seconds = time.perf_counter() - started
    return windows


def _full(name: str, need: int, where: str, why: str | None) -> str:
    return f"{name} takes {need:,} bytes to spool in {where!r}: {why}; name a roomier folder with spool_dir"


def _vips_image(path: str, name: str, access: str) -> Any:
    """The file as libvips opens it; no pixel is decoded yet."""
    pyvips = need_vips()
    try:
        # of a source, as a path might carry options, and libvips keeps what it opened by path
        source = pyvips.Source.new_from_file(path)
        # libvips calls a tile that it can't read a warning, and would leave it black
        fail_on = "warning" if access == "random" else "error"
        return pyvips.Image.new_from_source(source, "", access=access, fail_on=fail_on)
    except pyvips.Error as error:
        raise ValueError(f"{name} can't be read by window: {_reason(error)}; {_WHOLE}") from error


def _fetch(region: Any, stored: Stored, left: int, top: int, width: int, height: int) -> np.ndarray:
    """`[height, width, bands]` of a window, as stored."""
    pyvips = need_vips()
    block = np.empty((height, width, stored.bands), stored.dtype)
    for y in range(0, height, _ROWS):
        rows = block[y : y + _ROWS]
        try:
            data = region.fetch(left, top + y, width, len(rows))
        except pyvips.Error as error:
            raise ValueError(
                f"{stored.name} is corrupt or truncated in rows {top + y}..{top + y + len(rows) - 1} (as stored): "
                f"{_reason(error)}"
            ) from error
        rows[:] = np.frombuffer(data, stored.dtype).reshape(rows.shape)
    return block


def _reason(error: Any) -> str:
    """What libvips says, on one line."""
    lines = [line.strip() for line in str(error.detail or error.message).splitlines()]
    return "; ".join(dict.fromkeys(filter(None, lines)))


def _written(path: str) -> tuple[int, int]:
    """What tells that a file is still the same one: its size, and when it was written."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns
