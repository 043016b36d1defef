"""Reading images: every kind a user may hold becomes an upright 8-bit RGB picture, or a clear error.

Transparent pixels are composited on white, what drawings with a transparent ground are made for.
"""

from __future__ import annotations

import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from .extras import need

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

# Rounding in a resize may step a little outside [0, 1]; anything further is another range.
_SLACK = 1e-3


def default_max_pixels() -> int | None:
    """Pillow's own limit; None where the user switched it off."""
    limit: int | None = need("PIL.Image", "image").MAX_IMAGE_PIXELS
    return limit


def check_size(image: Any, max_pixels: int | None, name: str = "image") -> None:
    """Refuse an image that is empty or too large, reading no more of a file than its header.

    Args:
        image: As for `load_image`.
        max_pixels: The most pixels allowed, None for any number.
        name: What to call the image in messages; files go by their path.

    Raises:
        ValueError: The image is too large or empty, or its header is corrupt.
        FileNotFoundError: No such file.
    """
    file = repr(os.fspath(image)) if isinstance(image, (str, os.PathLike)) else name
    _check(image_size(image, name), max_pixels, file)


def image_size(image: Any, name: str = "image") -> tuple[int, int]:
    """Width and height of an image, as its array or its file's header has them; see `check_size`."""
    need("PIL.Image", "image")  # every way on from here takes Pillow
    if isinstance(image, (str, os.PathLike)):
        with open_header(image) as picture:
            return picture.size
    if hasattr(image, "getbands"):
        width, height = image.size
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        height, width = _hwc(image, name).shape[:2]
    else:
        raise TypeError(
            f"{name} must be a PIL image, a path, a numpy array or a torch tensor, got {type(image).__name__}"
        )
    return width, height


def load_image(image: Any, max_pixels: int | None = None, name: str = "image") -> Image:
    """Turn an image of any supported kind into an upright 8-bit RGB picture.

    Args:
        image: PIL image of any mode; path of a file; numpy `[H, W]` or `[H, W, 1|3|4]`; torch the same or
            `[1|3|4, H, W]`. Arrays hold uint8, or floats in `[0, 1]`. 16-bit pictures are scaled to 8 bits, an EXIF
            orientation is applied, and of an animation the current (first) frame is taken.
        max_pixels: The most pixels allowed, None for any number.
        name: What to call the image in messages; files go by their path.

    Raises:
        ValueError: The image is empty, too large, corrupt, truncated, not finite or of an unknown layout.
        FileNotFoundError: No such file.
    """
    check_size(image, max_pixels, name)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _from_array(_hwc(image, name), name)
    if not isinstance(image, (str, os.PathLike)):
        return _from_pil(image, name)
    with open_header(image) as picture:
        # Once more on what is decoded now: the file may have changed since it was checked.
        _check(picture.size, max_pixels, repr(os.fspath(image)))
        return _from_pil(picture, repr(os.fspath(image)))


def _check(size: tuple[int, ...], max_pixels: int | None, name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{name} has no pixels: its size is {width}x{height}")
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(
            f"{name} has {width}x{height} = {width * height} pixels, more than max_pixels={max_pixels}; "
            "ask for it with a larger max_pixels if you trust it"
        )


@contextmanager
def open_header(path: str | os.PathLike[str]) -> Iterator[Image]:
    """A file as Pillow opens it, whatever its size: header and metadata are read, pixels are not."""
    if str(path).startswith(("http://", "https://", "data:")):
        raise ValueError(
            f"{str(path)[:60]!r} isn't a file: load the picture first and pass it, nothing is downloaded"
        )
    with open(path, "rb") as file:
        yield _read_header(file, os.fspath(path))


def _read_header(file: BinaryIO, path: str) -> Image:
    """What `PIL.Image.open` does, less its check of the size, which is `max_pixels`' business.

    Pillow's limit is a global; changing it for one image would change it for every thread.
    """
    from PIL import Image

    prefix = file.read(16)
    seen: set[str] = set()
    for load_plugins in (Image.preinit, Image.init):
        load_plugins()
        for kind in [k for k in Image.ID if k not in seen]:
            seen.add(kind)
            factory, accept = Image.OPEN[kind]
            try:
                # A format that knows the file but can't read it here answers with a text.
                answer = accept(prefix) if accept else True
                if not answer or isinstance(answer, str):
                    continue
                file.seek(0)
                return factory(file, path)
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue  # the format's way of saying that the file isn't one of its own
            except Image.DecompressionBombError as error:
                # A few formats ask Pillow's check themselves, and only its global moves that.
                raise ValueError(
                    f"{path!r} needs a larger PIL.Image.MAX_IMAGE_PIXELS too: {error}"
                ) from error
            except Exception as error:
                raise ValueError(f"{path!r} is corrupt or truncated: {error}") from error
    raise ValueError(f"{path!r} is no image that Pillow knows, or its header is corrupt")


def _from_pil(image: Image, name: str) -> Image:
    from PIL import Image

    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they stumble over
        raise ValueError(f"{name} is corrupt or truncated: {error}") from error
    image = turn(image, orientation(image))
    if image.mode.startswith("I") or image.mode == "F":
        return _from_wide(np.asarray(image), name)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def orientation(image: Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none."""
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # a broken tag block says nothing about the pixels
        return 1
    return found if found in range(2, 9) else 1


def turn(image: Image, orientation: int) -> Image:
    """Stand a picture upright that was stored in this EXIF orientation."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def from_block(pixels: np.ndarray, name: str, cmyk: bool = False) -> Image:
    """RGB of a part of a picture that another decoder than Pillow's read, as `load_image` makes it of the whole.

    Args:
        pixels: `[H, W, channels]`: grey, RGB, with or without alpha, or CMYK.
        name: What to call the picture in messages.
        cmyk: Whether the four channels are CMYK.

    Raises:
        ValueError: Values are out of range.
    """
    from PIL import Image

    height, width, channels = pixels.shape
    if channels == 1 and pixels.dtype != np.uint8:
        return _from_wide(pixels[..., 0], name)
    if pixels.dtype == np.uint16:
        # Pillow opens 16 bits as 8 wherever there are several channels
        pixels = (pixels >> 8).astype(np.uint8)
    if cmyk:
        return Image.frombytes("CMYK", (width, height), pixels.tobytes()).convert("RGB")
    return _from_array(pixels, name)


def _from_wide(values: np.ndarray, name: str) -> Image:
    """A picture of one channel with more than 8 bits: integers hold 16 bits, floats lie in [0, 1]."""
    from PIL import Image

    if values.dtype.kind == "f":
        return _from_array(values[..., None], name)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"{name} must hold 16-bit values in [0, 65535], got {low}..{high}")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")


def _hwc(image: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """The same values as `[H, W, channels]`; torch tensors put their channels first if they can."""
    shape = list(image.shape)
    channels = (1, 3, 4)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        # numpy has no bfloat16; wider floats hold every value of it
        image = image.float() if image.dtype == torch.bfloat16 else image
        if image.ndim == 3 and image.shape[0] in channels:
            image = image.permute(1, 2, 0)
        array, layouts = image.numpy(), "[H, W], [1|3|4, H, W] or [H, W, 1|3|4]"
    else:
        array, layouts = image, "[H, W] or [H, W, 1|3|4]"
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in channels:
        hint = "; pass several images as a list" if array.ndim == 4 else ""
        raise ValueError(f"{name} must be {layouts}, got {shape}{hint}")
    return array


def _from_array(array: np.ndarray, name: str) -> Image:
    from PIL import Image

    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds values that are not finite (NaN or infinity)")
        low, high = float(array.min()), float(array.max())
        if low < -_SLACK or high > 1 + _SLACK:
            raise ValueError(f"{name} holds floats in [{low:g}, {high:g}]; floats must lie in [0, 1]")
        array = np.rint(array.clip(0, 1).astype(np.float64) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"{name} must hold uint8 or floats in [0, 1], got {array.dtype}")
    array = np.ascontiguousarray(array)
    return _from_pil(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array), name)
