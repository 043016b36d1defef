"""Contact sheets: which frames of a clip were read, which parts of them, and how much over time.

Pillow is imported when a picture is made, not before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .grid import Grid
from .viz import COOL, WARM, Box, overlay, region_boxes

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

GROUND, INK, FAINT = (24, 25, 29), (236, 236, 232), (120, 122, 130)
UNREAD = (52, 54, 62)  # of the strip, where nothing was read
MARGIN, GAP, CAPTION, STRIP, AXIS = 24, 12, 24, 46, 26
COARSE_MARK = (150, 205, 255)


@dataclass(frozen=True)
class Step:
    """One fine step of time.

    Args:
        index: Step on the grid's time axis.
        share: Fine tokens read at this step, as a share of the step that was read most.
        weights: `[n]` how often each region of the step was read, in the raster order of `slice_grid`.
    """

    index: int
    share: float
    weights: Tensor


def slice_grid(grid: Grid) -> Grid:
    """The picture's part of a `(T, H, W)` grid: its last two axes.

    Raises:
        ValueError: The grid doesn't have three axes.
    """
    if len(grid.fine) != 3:
        raise ValueError(
            f"grid must have three axes (time, height, width), it has {len(grid.fine)}: {grid.fine}"
        )
    return Grid(grid.coarse[1:], grid.fine[1:], grid.edges[1:], grid.padding[1:])


def per_step(grid: Grid, weights: Tensor) -> list[Step]:
    """How much was read at every fine step of time.

    Args:
        grid: The medium's lattice, `(T, H, W)`.
        weights: `[n_regions]` in `[0, 1]`, how often each region was read (see `Trace.looked_at`).

    Raises:
        ValueError: The grid isn't a clip's, or the weights don't fit.
    """
    flat = slice_grid(grid)
    weights = torch.as_tensor(weights).detach().to("cpu", torch.float32)
    if weights.shape != (grid.n_regions,):
        raise ValueError(f"weights must be [n_regions={grid.n_regions}], got {list(weights.shape)}")
    slabs = weights.view(grid.region_shape[0], -1)
    lengths = torch.tensor(grid.edges[0]).diff()
    by_step = slabs.repeat_interleave(lengths, dim=0)
    read = by_step @ flat.region_lengths.float()
    most = float(read.max().clamp(min=torch.finfo(torch.float32).tiny))
    return [Step(i, float(r) / most, w) for i, (r, w) in enumerate(zip(read, by_step, strict=True))]


def contact_sheet(
    grid: Grid,
    weights: Tensor,
    frame: Callable[[int], Any],
    label: Callable[[int], str],
    *,
    columns: int = 4,
    most: int = 12,
    width: int = 1400,
    title: str = "",
    coarse: Sequence[float] = (),
) -> Image:
    """The frames that were read most, the regions read in them lit up, over a heat strip of the whole clip.

    Frames come in the order of time; each is tied to its place on the strip by its number.

    Args:
        grid: The medium's lattice, `(T, H, W)`.
        weights: `[n_regions]` in `[0, 1]`, how often each region was read (see `Trace.looked_at`).
        frame: The picture of a fine step, as `flexcore.viz.overlay` takes it.
        label: What to write under a step's picture, such as its time stamp.
        columns: Pictures side by side.
        most: Pictures in all.
        width: Of the sheet, in pixels.
        title: A line above the pictures.
        coarse: Where the coarse frames lie, as shares of the clip; marked under the strip.

    Raises:
        ValueError: The grid isn't a clip's, or the weights don't fit.
    """
    from PIL import Image, ImageDraw, ImageFont

    steps = per_step(grid, weights)
    shown = pick(steps, most)
    plane = slice_grid(grid)
    columns = max(1, min(columns, len(shown)))
    side = (width - 2 * MARGIN - (columns - 1) * GAP) // columns
    # one scale for all pictures: that of the clip's most-read region
    top = float(torch.as_tensor(weights).max())
    pictures = [overlay(frame(s.index), plane, s.weights, top) for s in shown]
    pictures = [p.resize((side, max(1, round(p.height * side / p.width)))) for p in pictures]
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(p.height for p in row) + CAPTION for row in rows]
    head = MARGIN + (40 if title else 0)
    height = head + sum(heights) + GAP * len(rows) + STRIP + 2 * AXIS + MARGIN
    sheet = Image.new("RGB", (width, height), GROUND)
    pen = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(size=16), ImageFont.load_default(size=22)
    if title:
        pen.text((MARGIN, MARGIN - 4), title, fill=INK, font=large)
    y, number = head, 1
    for row, tall in zip(rows, heights, strict=True):
        for i, picture in enumerate(row):
            x = MARGIN + i * (side + GAP)
            sheet.paste(picture, (x, y))
            step = shown[number - 1]
            below = y + picture.height + 3
            pen.text((x, below), f"{number}", fill=ramp(step.share), font=small)
            pen.text((x + 10 * len(str(number)) + 10, below), label(step.index), fill=INK, font=small)
            number += 1
        y += tall + GAP
    _strip(pen, (MARGIN, y + AXIS, width - MARGIN, y + AXIS + STRIP), steps, shown, coarse, label, small)
    return sheet


def boxes(grid: Grid, step: Step, size: tuple[int, int], most: int = 3) -> list[Box]:
    """Where in a frame of `(width, height)` pixels the regions lie that were read most at a step."""
    places = region_boxes(slice_grid(grid), size)
    order = [int(r) for r in step.weights.argsort(descending=True, stable=True) if step.weights[r] > 0]
    return [places[r] for r in order if r in places][:most]


def pick(steps: Sequence[Step], most: int) -> list[Step]:
    """The steps to show, in the order of time: the most-read one of each equal part of the clip that was read.

    Parts rather than the top of the list, since neighbours look alike. Where nothing was read at all, the middles
    of the parts.
    """
    parts = [steps[len(steps) * i // most : len(steps) * (i + 1) // most] for i in range(most)]
    best = [max(part, key=lambda s: s.share) for part in parts if part]
    read = [step for step in best if step.share > 0]
    return read or [part[len(part) // 2] for part in parts if part]


def ramp(strength: float) -> tuple[int, int, int]:
    """From the colour of what was read now and then to that of what was read most."""
    red, green, blue = (round(a + (b - a) * strength) for a, b in zip(COOL, WARM, strict=True))
    return red, green, blue


def _strip(
    pen: ImageDraw,
    box: tuple[int, int, int, int],
    steps: Sequence[Step],
    shown: Sequence[Step],
    coarse: Sequence[float],
    label: Callable[[int], str],
    font: FreeTypeFont | ImageFont,
) -> None:
    """Bars over time, the numbers of the pictures above them, and the coarse frames as ticks below."""
    left, top, right, bottom = box
    length = right - left
    for i, step in enumerate(steps):
        x0 = left + length * i // len(steps)
        x1 = max(x0, left + length * (i + 1) // len(steps) - (2 if length // len(steps) > 5 else 1))
        pen.rectangle((x0, top, x1, bottom), fill=UNREAD)
        if step.share > 0:
            tall = max(2, round((bottom - top) * step.share))
            pen.rectangle((x0, bottom - tall, x1, bottom), fill=ramp(step.share))
    last = -math.inf
    for number, step in enumerate(shown, start=1):
        x = left + length * (2 * step.index + 1) / (2 * len(steps))
        if x - last > 18:  # numbers that would overlap are left out
            pen.text((x, top - 5), str(number), fill=ramp(step.share), font=font, anchor="ms")
            last = x
    for share in coarse:
        x = left + length * share
        pen.polygon(((x, bottom + 4), (x - 5, bottom + 12), (x + 5, bottom + 12)), fill=COARSE_MARK)
    legend = "height: fine tokens read" + ("    triangles: coarse frames" if coarse else "")
    pen.text(((left + right) / 2, bottom + 16), legend, fill=FAINT, font=font, anchor="ma")
    pen.text((left, bottom + 16), label(0), fill=FAINT, font=font)
    pen.text((right, bottom + 16), label(len(steps) - 1), fill=FAINT, font=font, anchor="ra")
