"""Pictures of what was looked at. Pillow is imported when a picture is made, not before."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .grid import Grid

if TYPE_CHECKING:
    from PIL.Image import Image

COOL = (255, 214, 102)  # a region that was read now and then
WARM = (255, 77, 26)  # the region that was read most
LATTICE = (255, 255, 255)
LATTICE_OPACITY = 60  # of 255
DIM = 0.38  # brightness and colour that an unread region keeps
LIT = 0.55  # how far a region that was hardly read comes out of the dark
FAINT = 0.35  # opacity of its outline
TINT = 0.22  # opacity of the tint on the region that was read most
HUGE = (1 << 30) // 12  # Pillow's limit of pixels, where it is switched off
SHOWN = 2048  # longest side that a picture beyond Pillow's limit is reduced to

Box = tuple[int, int, int, int]


def overlay(image: Any, grid: Grid, weights: Tensor, top: float | None = None) -> Image:
    """Show what was read: regions nobody read are dimmed, read ones light up, brighter and warmer the more often.

    Colours are relative to the region that was read most, so that a long answer stays as readable as a short one.

    Args:
        image: PIL image (EXIF rotation is respected), path, or array or tensor `[H, W]`, `[H, W, 3]` or
            `[3, H, W]`; floats in `[0, 1]`.
        grid: The medium's lattice, two axes; its padding is cut away, since the image has none.
        weights: `[n_regions]` in `[0, 1]`, how often each region was read (see `Trace.looked_at`).
        top: The weight that is shown warmest, for pictures that are compared; None takes this picture's largest.

    Returns:
        An RGB picture of the image's own size; one of more pixels than `PIL.Image.MAX_IMAGE_PIXELS` is reduced to
        `SHOWN` pixels on its longer side, and a file of that kind is never decoded at its full size.

    Raises:
        ValueError: The grid isn't an image's, or image or weights don't fit.
        ImportError: pyvips is missing, for a file that is to be reduced.
    """
    from PIL import Image, ImageDraw, ImageEnhance

    shares = _relative(weights, grid, top)
    photo = open_photo(image)
    if _huge(photo.size):
        photo.thumbnail((SHOWN, SHOWN))
    boxes = region_boxes(grid, photo.size)
    shown = ImageEnhance.Brightness(ImageEnhance.Color(photo).enhance(DIM)).enhance(DIM)
    for region, box in boxes.items():
        if shares[region] > 0:
            bright = photo.crop(box)
            tint = Image.new("RGB", bright.size, _ramp(shares[region]))
            lit = Image.blend(bright, tint, TINT * shares[region])
            shown.paste(Image.blend(shown.crop(box), lit, LIT + (1 - LIT) * shares[region]), box)

    sides = sorted(min(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes.values())
    side = sides[len(sides) // 2]
    # lines grow with the picture, but never so far that they hide the regions they separate
    line = max(1, min(round(max(photo.size) / 450), side // 12))
    if side >= 8:
        shown.paste(LATTICE, (0, 0), _lattice(list(boxes.values()), photo.size, max(1, line // 2)))
    # the most read last: where outlines meet, the warmer one lies on top
    for region in sorted(boxes, key=lambda r: shares[r]):
        box = boxes[region]
        width, height = box[2] - box[0], box[3] - box[1]
        if shares[region] > 0 and min(width, height) >= 4:
            plain = shown.crop(box)
            framed = plain.copy()
            frame = (0, 0, width - 1, height - 1)
            ImageDraw.Draw(framed).rectangle(frame, outline=_ramp(shares[region]), width=line)
            shown.paste(Image.blend(plain, framed, FAINT + (1 - FAINT) * shares[region]), box)
    return shown


def region_boxes(grid: Grid, size: tuple[int, int]) -> dict[int, Box]:
    """Where regions lie on the photo itself.

    Args:
        grid: The medium's lattice, two axes, padding included.
        size: The photo's `(width, height)` in pixels, without padding.

    Returns:
        `(left, top, right, bottom)` in pixels for each region that shows some of the photo.

    Raises:
        ValueError: The grid doesn't have two axes.
    """
    if len(grid.fine) != 2:
        raise ValueError(
            f"grid must have two axes (height, width) to be drawn on an image, it has {len(grid.fine)}: {grid.fine}"
        )
    width, height = size
    out = {}
    for region in range(grid.n_regions):
        (top, bottom), (left, right) = (
            [round(_unpad(share, padding) * pixels) for share in shares]
            for shares, padding, pixels in zip(grid.box(region), grid.padding, (height, width), strict=True)
        )
        if right > left and bottom > top:
            out[region] = (left, top, right, bottom)
    return out


def _lattice(boxes: list[Box], size: tuple[int, int], width: int) -> Image:
    """A mask of the lines between regions, each drawn once; the picture's own edge needs none."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", size, 0)
    pen = ImageDraw.Draw(mask)
    for x in {box[0] for box in boxes} - {0}:
        pen.rectangle((x - width // 2, 0, x - width // 2 + width - 1, size[1]), fill=LATTICE_OPACITY)
    for y in {box[1] for box in boxes} - {0}:
        pen.rectangle((0, y - width // 2, size[0], y - width // 2 + width - 1), fill=LATTICE_OPACITY)
    return mask


def open_photo(image: Any) -> Image:
    """An upright RGB picture from a PIL image, a path, an array or a tensor; a huge file's is reduced, see `overlay`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It isn't a picture.
        ImportError: pyvips is missing, for a file that is to be reduced.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(image, str | os.PathLike):
        try:
            with Image.open(image) as opened:
                # without pyvips Pillow decodes whole what it doesn't refuse
                if not _huge(opened.size) or importlib.util.find_spec("pyvips") is None:
                    return open_photo(opened)
        except UnidentifiedImageError:
            raise ValueError(
                f"image must be a picture that Pillow can read, {os.fspath(image)!r} is not"
            ) from None
        except Image.DecompressionBombError:
            pass  # Pillow's word for huge; its size alone is no reason to refuse it here
        return _reduced(image)
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            # white is what drawings with a transparent ground are made for
            canvas = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
        return image.convert("RGB")
    pixels = np.asarray(image.detach().cpu() if isinstance(image, Tensor) else image)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if 0 in pixels.shape or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise ValueError(
            f"image must be [H, W], [H, W, 3] or [3, H, W] with pixels in it, got {list(pixels.shape)}"
        )
    if np.issubdtype(pixels.dtype, np.floating):
        if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
            raise ValueError(f"image must hold floats in [0, 1], got {pixels.min()}..{pixels.max()}")
        pixels = (pixels * 255).round()
    elif pixels.dtype != np.uint8:
        raise ValueError(f"image must hold uint8 or floats in [0, 1], got {pixels.dtype}")
    return open_photo(Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8))))


def need_vips() -> Any:
    """pyvips, which reads pictures too large to hold; imported when it is first used.

    Raises:
        ImportError: It is missing or doesn't load; the message says what to install.
    """
    try:
        return importlib.import_module("pyvips")
    except (ImportError, OSError) as error:
        raise ImportError(
            "pyvips is needed for pictures too large to hold in memory and can't be imported: "
            f"pip install 'flexcore[big]': {error}"
        ) from error


def _huge(size: tuple[int, int]) -> bool:
    from PIL import Image

    # who switches Pillow's limit off doesn't ask for copies of a picture of any size
    return size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or HUGE)


def _reduced(path: str | os.PathLike[str]) -> Image:
    """A file's picture, decoded row by row or tile by tile while it shrinks."""
    from PIL import Image

    pyvips = need_vips()
    try:
        source = pyvips.Source.new_from_file(os.fspath(path))  # a path itself might carry options
        shown = pyvips.Image.thumbnail_source(source, SHOWN, height=SHOWN, size="down", fail_on="error")
        shown = shown.flatten(background=255) if shown.hasalpha() else shown
        pixels = shown.colourspace("srgb").cast("uchar").numpy()
    except pyvips.Error as error:
        raise ValueError(
            f"{os.fspath(path)!r} is too large to show whole, and can't be reduced: {error}"
        ) from error
    return Image.fromarray(pixels)


def _relative(weights: Tensor, grid: Grid, top: float | None = None) -> list[float]:
    """The weights, checked, as shares of the largest one, or of `top`."""
    weights = torch.as_tensor(weights).detach().to("cpu", torch.float32)
    if weights.shape != (grid.n_regions,):
        raise ValueError(f"weights must be [n_regions={grid.n_regions}], got {list(weights.shape)}")
    if not bool(((weights >= 0) & (weights <= 1)).all()):
        raise ValueError(f"weights must lie in [0, 1], got {float(weights.min())}..{float(weights.max())}")
    largest = max(float(weights.max()) if top is None else top, torch.finfo(torch.float32).tiny)
    shares: list[float] = (weights / largest).clamp(max=1).tolist()
    return shares


def _unpad(share: float, padding: tuple[float, float]) -> float:
    """A share of the padded axis as a share of the content, clipped to it."""
    before, after = padding
    return min(1.0, max(0.0, (share - before) / (1.0 - before - after)))


def _ramp(strength: float) -> tuple[int, int, int]:
    red, green, blue = (round(a + (b - a) * strength) for a, b in zip(COOL, WARM, strict=True))
    return red, green, blue
