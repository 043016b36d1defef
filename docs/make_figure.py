"""Draws docs/mechanism.png, the README's picture of the mechanism: `python docs/make_figure.py`.

The photograph is NASA's, from scikit-image. Only the attention is made up (two blobs, so that the picture is the
same everywhere); what follows from it, scores to regions, goes through flexcore's own selector, grid and overlay.
"""

# ruff: noqa: RUF001 (the picture is set with typographic signs)
from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, PathPatch, Rectangle
from matplotlib.path import Path as Curve
from PIL import Image, ImageDraw

from flexcore.grid import Grid
from flexcore.selection import ThresholdSelector
from flexcore.viz import overlay, region_boxes

WIDTH, HEIGHT = 1400, 800
INK, MUTED, FRAME = "#1f2933", "#5b6673", "#c3cad3"
TEXT, COARSE, FINE, READOUT = "#98a2ae", "#2f6db5", "#d9641e", "#16875a"
SEQUENCE_LANE, FINE_LANE = "#eef3fa", "#fdf2e9"

GRID = Grid.blocks((24, 24), (72, 72), region=8, tile=24)
# (row, column, width, height of the blob): what is asked for, and something that is only glanced at
BLOBS = ((0.752, 0.338, 0.052, 1.0), (0.70, 0.60, 0.035, 0.15))

# The rows of the sequence that are drawn, from the top: what each stands for, and how many coarse tokens.
SHOWN_COARSE = 9
ROWS = ["text"] * 2 + ["coarse"] * SHOWN_COARSE + ["text"] * 3 + ["readout"]
COLOURS = {"text": TEXT, "coarse": COARSE, "readout": READOUT}
TOP, STEP = 128, 17.5  # pixels
LAST = TOP + (len(ROWS) - 1) * STEP  # the readout row's height
TOKENS = 366  # where the column of tokens stands
VIEW, MAP, PAGE = 196, 150, 30  # sides of the two views, the two maps, one region
MIDDLE = 600  # of what stands outside the sequence
FLOOR = 676  # where layers that read end

LAYERS = {  # name: (left, right, what it does)
    "layers 0 … ℓ−1": (408, 508, "as they were"),
    "layer ℓ": (536, 690, "selects"),
    "layer ℓ+1": (965, 1146, "reads, then selects"),
    "layers ℓ+2 … last": (1224, 1322, "the same again"),
}


def main(path: Path) -> None:
    """Draw the picture and write it to `path`."""
    photo = _photo()
    scores = _scores()
    chosen = ThresholdSelector(threshold=48).select(
        scores[None], GRID, torch.ones(GRID.n_regions, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.long)
    )[0]

    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    ax.axis("off")
    _lanes(ax)
    _sequence(ax, photo, scores)
    _outside(ax, photo, scores, chosen)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    with Image.open(path) as drawn:
        drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _photo() -> Image.Image:
    with as_file(files("skimage") / "data" / "astronaut.png") as file:
        return Image.open(file).convert("RGB")


def _scores() -> torch.Tensor:
    """`[n_coarse]`: a readout row's attention over the coarse tokens, as it might be."""
    height, width = GRID.coarse
    v, u = np.mgrid[0:height, 0:width]
    v, u = (v + 0.5) / height, (u + 0.5) / width
    faint = np.random.default_rng(0).random((height, width)) * 0.05
    blobs = sum(h * np.exp(-((v - a) ** 2 + (u - b) ** 2) / (2 * s**2)) for a, b, s, h in BLOBS)
    return torch.tensor(faint + blobs, dtype=torch.float32).flatten()


# ---------------------------------------------------------------------- the two lanes


def _lanes(ax: Axes) -> None:
    for top, bottom, colour, ink, title in (
        (16, 416, SEQUENCE_LANE, COARSE, "in the language model's sequence"),
        (432, HEIGHT - 16, FINE_LANE, FINE, "outside the sequence"),
    ):
        _box(ax, 16, top, WIDTH - 16, bottom, face=colour, edge="none", radius=14)
        ax.text(34, top + 26, title, color=ink, fontsize=13.5, weight="bold", va="center")


def _sequence(ax: Axes, photo: Image.Image, scores: torch.Tensor) -> None:
    left, top = 34, TOP + 2
    _picture(
        ax, photo.resize((GRID.coarse[1], GRID.coarse[0]), Image.Resampling.BOX), left, top, VIEW, COARSE
    )
    _label(ax, left + VIEW / 2, top - 17, "coarse view, 336 px")
    _label(
        ax, left + VIEW / 2, top + VIEW + 20, f"{GRID.n_coarse} coarse tokens", color=COARSE, weight="bold"
    )

    for i, kind in enumerate(ROWS):
        y, last = TOP + i * STEP, kind == "readout"
        ax.plot(
            (TOKENS, 1322),
            (y, y),
            color=COLOURS[kind],
            zorder=1,
            lw=2.4 if last else 0.8,
            alpha=1 if last else 0.55,
        )
        ax.add_patch(Rectangle((TOKENS - 7, y - 7), 14, 14, color=COLOURS[kind], zorder=3, lw=0))
    first, final = TOP + 2 * STEP, TOP + (1 + SHOWN_COARSE) * STEP
    _arrow(ax, left + VIEW + 10, (first + final) / 2, TOKENS - 26, (first + final) / 2, COARSE)
    _bracket(ax, TOKENS - 20, first - 6, final + 6, COARSE)
    _label(ax, TOKENS - 18, TOP + STEP / 2, "text", ha="right", color=MUTED)
    _label(ax, TOKENS - 18, final + 2 * STEP, "question", ha="right", color=MUTED)
    _label(ax, TOKENS - 18, LAST, "readout row", ha="right", color=READOUT, weight="bold")
    _arrow(ax, 1321, LAST, 1364, LAST, READOUT, lw=2.4)
    _label(ax, 1352, LAST - 26, "next\ntoken", color=READOUT, weight="bold")

    for name, (x0, x1, does) in LAYERS.items():
        active = name in ("layer ℓ", "layer ℓ+1")
        floor = FLOOR if "ℓ+" in name else LAST + 18
        box = _box(ax, x0, TOP - 18, x1, floor, face="white", edge=INK if active else FRAME, radius=9)
        box.set(zorder=2, linewidth=1.6 if active else 1.2)
        _label(ax, (x0 + x1) / 2, TOP - 56, name, weight="bold", size=13)
        _label(ax, (x0 + x1) / 2, TOP - 34, does, color=MUTED)
    left, right, _ = LAYERS["layer ℓ"]
    _attention(ax, left, left + 16, right - 18, scores)
    left, right, _ = LAYERS["layer ℓ+1"]
    _attention(ax, left, left + 58, right - 18, scores)
    for name in ("layers 0 … ℓ−1", "layers ℓ+2 … last"):
        left, right, _ = LAYERS[name]
        _label(ax, (left + right) / 2, (TOP + LAST) / 2, "ordinary\nattention", color=MUTED)
    _label(ax, (left + right) / 2, MIDDLE - 20, "+ chosen\nfine K/V", color=FINE)


def _attention(ax: Axes, edge: float, x0: float, x1: float, scores: torch.Tensor) -> None:
    """The readout row, at the right, attends to the keys at the left; a drawn coarse row sums up its tokens."""
    mass = [float(part.sum()) for part in (scores - scores.min()).chunk(SHOWN_COARSE)]
    for i, kind in enumerate(ROWS):
        y = TOP + i * STEP
        share = mass[ROWS[:i].count("coarse")] / max(mass) if kind == "coarse" else 0.1
        ax.plot((edge, x0), (y, y), color=COLOURS[kind], lw=0.8, alpha=0.55, zorder=3)
        _key(ax, (x0, y), (x1, LAST), COLOURS[kind], share)
    ax.add_patch(Circle((x1, LAST), 5.5, color=READOUT, zorder=6, lw=0))


def _outside(ax: Axes, photo: Image.Image, scores: torch.Tensor, chosen: torch.Tensor) -> None:
    left, top = 34, MIDDLE - VIEW / 2
    _picture(
        ax, _with_lattice(photo.resize((2 * VIEW,) * 2, Image.Resampling.LANCZOS)), left, top, VIEW, FINE
    )
    _label(ax, left + VIEW / 2, top - 17, "fine view, 1008 px")
    _label(ax, left + VIEW / 2, top + VIEW + 20, f"{GRID.n_fine:,} fine tokens", color=FINE, weight="bold")
    across = " × ".join(str(n) for n in GRID.region_shape)
    _label(ax, left + VIEW / 2, top + VIEW + 42, f"in {across} regions", color=FINE)
    waiting = (
        "Fine tokens wait here:\nno rows of the sequence,\nonly keys and values\n"
        "for readout rows to read,\nregion by region."
    )
    _label(ax, 260, MIDDLE - 34, waiting, ha="left", color=MUTED, linespacing=1.5)

    # the selection, under the layer that makes it
    x0, x1, _ = LAYERS["layer ℓ"]
    centre, high = (x0 + x1) / 2, MIDDLE - MAP / 2
    _picture(ax, _heat(photo, scores), centre - MAP / 2, high, MAP, INK)
    _arrow(ax, centre, LAST + 20, centre, high - 5, INK)
    _label(
        ax,
        centre + 12,
        470,
        "the readout row's attention over the\ncoarse tokens, summed over heads",
        ha="left",
        color=MUTED,
        size=11,
    )
    _label(ax, centre, high + MAP + 18, "scores")
    picked = 780
    _picture(ax, overlay(photo.resize((2 * MAP,) * 2), GRID, chosen.float()), picked, high, MAP, INK)
    _arrow(ax, centre + MAP / 2 + 6, MIDDLE, picked - 6, MIDDLE, INK)
    _label(ax, (centre + MAP / 2 + picked) / 2, MIDDLE - 14, "threshold", size=10.5, color=MUTED)
    count = int(chosen.sum())
    _label(ax, picked + MAP / 2, high + MAP + 18, f"selection: {count} of {GRID.n_regions} regions")

    # what it opens, as more keys of the next layer
    x0, x1, _ = LAYERS["layer ℓ+1"]
    regions = chosen.nonzero().flatten().tolist()
    strength = GRID.pool(scores) / scores.max()
    boxes = region_boxes(GRID, photo.size)
    _arrow(ax, picked + MAP + 6, MIDDLE, x0 - 4, MIDDLE, INK)
    first = 456
    step = (FLOOR - 12 - PAGE - first) / (len(regions) - 1)
    for i, region in enumerate(regions):
        y = first + i * step
        page = photo.crop(boxes[region]).resize((2 * PAGE,) * 2, Image.Resampling.LANCZOS)
        _picture(ax, page, x0 + 14, y, PAGE, FINE)
        _key(ax, (x0 + 58, y + PAGE / 2), (x1 - 18, LAST), FINE, float(strength[region]))
    _label(ax, x1 - 10, FLOOR - 28, "one\nsoftmax", ha="right", weight="bold", size=11.5)
    fetched = 744
    corners = (left + VIEW + 10, MIDDLE + 60), (300, MIDDLE + 60), (300, fetched), (x0 + 29, fetched)
    ax.plot(*zip(*corners, strict=True), color=FINE, lw=1.8, zorder=6, solid_joinstyle="round")
    _arrow(ax, x0 + 29, fetched + 0.8, x0 + 29, FLOOR + 4, FINE)
    _label(
        ax, (300 + x0 + 29) / 2, fetched + 18, "features of the chosen regions, and of no others", color=FINE
    )
    tokens = int(GRID.region_lengths[chosen].sum())
    _label(ax, x0 + 44, FLOOR + 24, f"fine K/V of {tokens} fine tokens", ha="left", color=FINE, weight="bold")
    _label(ax, x0 + 44, FLOOR + 48, "projected once per layer, then cached", ha="left", color=FINE)
    _arrow(ax, x1 + 5, MIDDLE - 20, LAYERS["layers ℓ+2 … last"][0] - 4, MIDDLE - 20, INK)
    _label(
        ax, (x1 + LAYERS["layers ℓ+2 … last"][0]) / 2, MIDDLE - 44, "next\nselection", size=10.5, color=MUTED
    )


def _heat(photo: Image.Image, scores: torch.Tensor) -> Image.Image:
    side = 2 * MAP
    grey = photo.convert("L").convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    cells = ((scores - scores.min()) / (scores.max() - scores.min())).reshape(GRID.coarse).numpy()
    colours = Image.fromarray((matplotlib.colormaps["YlOrRd"](cells)[..., :3] * 255).astype(np.uint8))
    mask = Image.fromarray((235 * cells**0.5).astype(np.uint8))
    size, nearest = (side, side), Image.Resampling.NEAREST
    return Image.composite(colours.resize(size, nearest), grey, mask.resize(size, nearest))


def _with_lattice(picture: Image.Image) -> Image.Image:
    pen = ImageDraw.Draw(picture, "RGBA")
    for x0, y0, x1, y1 in region_boxes(GRID, picture.size).values():
        pen.rectangle((x0, y0, x1, y1), outline=(255, 255, 255, 150), width=2)
    return picture


# ---------------------------------------------------------------------- pens


def _label(
    ax: Axes, x: float, y: float, text: str, size: float = 12, ha: str = "center", **kind: Any
) -> None:
    ax.text(x, y, text, **{"fontsize": size, "ha": ha, "va": "center", "color": INK, "zorder": 8, **kind})


def _box(ax: Axes, x0: float, y0: float, x1: float, y1: float, face: str, edge: str, radius: float) -> Patch:
    style = f"round,pad=0,rounding_size={radius}"
    box = FancyBboxPatch((x0, y0), x1 - x0, y1 - y0, boxstyle=style, facecolor=face, edgecolor=edge, zorder=0)
    return ax.add_patch(box)


def _picture(ax: Axes, picture: Image.Image, x: float, y: float, side: float, edge: str) -> None:
    resampling = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
    pixels = np.asarray(picture.resize((round(side),) * 2, resampling))
    ax.imshow(pixels, extent=(x, x + side, y + side, y), interpolation="nearest", zorder=4, aspect="auto")
    ax.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=edge, lw=1.4, zorder=5))


def _arrow(ax: Axes, x0: float, y0: float, x1: float, y1: float, colour: str, lw: float = 1.8) -> None:
    head = "-|>,head_length=5,head_width=2.8"
    arrow = FancyArrowPatch(
        (x0, y0), (x1, y1), arrowstyle=head, color=colour, lw=lw, shrinkA=0, shrinkB=0, zorder=7
    )
    ax.add_patch(arrow)


def _key(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, share: float) -> None:
    """One key of a softmax: a dot, and a line to the row that attends to it, wider for more attention."""
    bend = (end[0] - start[0]) * 0.55
    points = [start, (start[0] + bend, start[1]), (end[0] - bend * 0.35, end[1]), end]
    codes = [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]
    ax.add_patch(
        PathPatch(Curve(points, codes), fill=False, edgecolor=colour, lw=0.7 + 4 * share, alpha=0.7, zorder=4)
    )
    ax.add_patch(Circle(start, 3.4, color=colour, zorder=5, lw=0))


def _bracket(ax: Axes, x: float, y0: float, y1: float, colour: str) -> None:
    ax.plot((x + 6, x, x, x + 6), (y0, y0, y1, y1), color=colour, lw=1.6, zorder=5)


if __name__ == "__main__":
    main(Path(__file__).with_name("mechanism.png"))
