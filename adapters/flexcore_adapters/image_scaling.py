"""Scaling pictures that are read by window: a part of the result from its own window, equal to a part of the whole."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

    from .image_window import Windows

# Pixels of a window that are held at once while it is scaled, and while a picture is spooled.
STRIP = 1 << 20
# How far each of Pillow's filters reaches, in pixels of the result, or of the picture where that has fewer.
_REACH = {"NEAREST": 0.5, "BOX": 0.5, "BILINEAR": 1.0, "HAMMING": 1.0, "BICUBIC": 2.0, "LANCZOS": 3.0}
_FURTHEST = 4.5  # MKS2021, which not every Pillow has
# Filters with a sharp edge: where it falls on a pixel's centre, rounding decides, and not alike for part and whole.
UNSTEADY = ("NEAREST", "BOX")


def scaled(
    picture: Windows,
    size: tuple[int, int],
    resample: Resampling,
    part: tuple[int, int, int, int] | None = None,
    strip: int = STRIP,
    progress: Callable[[int], Any] | None = None,
) -> Image:
    """What `picture.resize(size, resample).crop(part)` is, made from the part's own window.

    Pillow scales along one axis and then along the other, so the window can be squeezed strip by strip; its margin
    is as wide as the filter reaches. With an `UNSTEADY` filter a part may differ from the crop, the whole doesn't.

    Args:
        size: `(width, height)` of the whole result.
        resample: Pillow's filter.
        part: `(left, top, right, bottom)` in pixels of the result; None is all of it.
        strip: Pixels that are held at once.
        progress: Called after each strip with rows that were read; for the whole picture they add up to its height.
    """
    from PIL import Image

    left, top, right, bottom = (0, 0, *size) if part is None else part
    reach = _REACH.get(resample.name, _FURTHEST)
    first = _Axis.of(left, right, size[0], picture.size[0], reach)
    then = _Axis.of(top, bottom, size[1], picture.size[1], reach)
    begin, end = max(then.first, picture.rows[0]), min(then.last, picture.rows[1])
    seen = then.last - then.first
    if columns_first := _columns_first(picture.size, size):
        first, then = then, first
        begin, end = then.first, then.last

    def xy(i: int, j: int) -> tuple[int, int]:
        return (j, i) if columns_first else (i, j)

    def box(i0: float, j0: float, i1: float, j1: float) -> Any:  # ints stay ints
        return (j0, i0, j1, i1) if columns_first else (i0, j0, i1, j1)

    squeezed = Image.new("RGB", xy(first.kept, then.end - then.origin), picture.colour)
    step = max(1, strip // (first.end - first.origin))
    with picture.opened() as read:
        for at in range(begin, end, step):
            n = min(step, end - at)
            window = read(*box(first.first, at, first.last, at + n))
            if (first.first, first.last) != (first.origin, first.end):
                ground = Image.new("RGB", xy(first.end - first.origin, n))
                ground.paste(window, xy(first.first - first.origin, 0))
                window = ground
            once = window.resize(xy(first.made, n), resample, box(first.start, 0, first.stop, n))
            kept = once.crop(box(first.skip, 0, first.skip + first.kept, n))
            squeezed.paste(kept, xy(0, at - then.origin))
            if progress is not None:
                # strips of columns stand for as many rows
                progress(seen * (at + n - begin) // (end - begin) - seen * (at - begin) // (end - begin))
    twice = squeezed.resize(xy(first.kept, then.made), resample, box(0, then.start, first.kept, then.stop))
    return twice.crop(box(0, then.skip, first.kept, then.skip + then.kept))


@dataclass(frozen=True)
class _Axis:
    """One axis of a picture, a part of which is scaled as if it were the whole.

    Args:
        first: First pixel that the filter sees.
        last: One past the last.
        origin: First pixel of the ground that they are laid on.
        end: One past its last.
        start: Where the scaled part begins on that ground.
        stop: Where it ends.
        made: Pixels made of it.
        skip: How many of these come before the ones asked for.
        kept: How many were asked for.
    """

    first: int
    last: int
    origin: int
    end: int
    start: float
    stop: float
    made: int
    skip: int
    kept: int

    @classmethod
    def of(cls, start: int, stop: int, made: int, size: int, reach: float) -> _Axis:
        """For pixels `start .. stop - 1` of the `made` that `size` pixels become."""
        # Pillow keeps a box in single precision. Every `period` pixels of the result begin at a binary fraction of a
        # pixel, which that holds exactly. What is added to the part to get there is blank ground, and isn't read.
        odd = made // (made & -made)
        period = odd // math.gcd(size, odd)
        a, b = start // period * period, min(made, -(-stop // period) * period)
        margin = math.ceil(reach * max(size / made, 1.0)) + 1
        first = max(0, start * size // made - margin)
        last = min(size, -(-stop * size // made) + margin)
        origin, end = min(first, a * size // made), max(last, -(-b * size // made))
        begin, until = (a * size - origin * made) / made, (b * size - origin * made) / made
        return cls(first, last, origin, end, begin, until, b - a, start - a, stop - start)


def _columns_first(size: tuple[int, int], made: tuple[int, int]) -> bool:
    """Whether Pillow scales columns before rows, which rounds otherwise."""
    fewer_rows, fewer_columns = size[1] - made[1], size[0] - made[0]
    return fewer_rows > max(0, 2 * fewer_columns) and _minds_height()


@functools.cache
def _minds_height() -> bool:
    """Whether this Pillow chooses the order by what is fewer work, as Pillow 13 does, or always takes rows first."""
    from PIL import Image

    picture = Image.frombytes("L", (7, 61), bytes(i * i * 37 % 251 for i in range(7 * 61)))
    bicubic = Image.Resampling.BICUBIC
    whole, rows_first = (
        picture.resize((5, 9), bicubic),
        picture.resize((5, 61), bicubic).resize((5, 9), bicubic),
    )
    return whole.tobytes() != rows_first.tobytes()
