"""Overlays: regions land on the right pixels of the unpadded photo, whatever its size, shape or kind."""

import builtins
import importlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from flexcore import viz
from flexcore.grid import Grid
from flexcore.viz import open_photo, overlay, region_boxes


def padded(width: int, height: int, coarse: int = 24, fine: int = 72) -> Grid:
    """The grid of a picture that was centred in a square."""
    share = abs(width - height) / 2 / max(width, height)
    padding = [(share, share), (0.0, 0.0)] if width > height else [(0.0, 0.0), (share, share)]
    return Grid.blocks((coarse, coarse), (fine, fine), region=8, tile=24, padding=padding)


def weights(grid: Grid, **regions: float) -> torch.Tensor:
    out = torch.zeros(grid.n_regions)
    for region, weight in regions.items():
        out[int(region[1:])] = weight
    return out


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(120, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def inner(picture: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    """The middle of a box, away from lines."""
    x0, y0, x1, y1 = box
    dx, dy = (x1 - x0) // 4, (y1 - y0) // 4
    return np.asarray(picture)[y0 + dy : y1 - dy, x0 + dx : x1 - dx].astype(float)


SIZES = [(741, 500), (500, 741), (640, 640), (1999, 301), (90, 700)]


@pytest.mark.parametrize("width, height", SIZES, ids=lambda n: str(n))
def test_boxes_tile_the_photo(width, height):
    """Every pixel belongs to one region, and padding to none."""
    seen = np.zeros((height, width), dtype=int)
    for x0, y0, x1, y1 in region_boxes(padded(width, height), (width, height)).values():
        seen[y0:y1, x0:x1] += 1
    assert (seen == 1).all()


def test_boxes_follow_padding():
    """A 9x9 lattice over a photo twice as wide as high: rows 0, 1, 7 and 8 are padding, 2 and 6 are cut."""
    boxes = region_boxes(padded(900, 450), (900, 450))
    assert sorted({region // 9 for region in boxes}) == [2, 3, 4, 5, 6]
    assert boxes[2 * 9] == (0, 0, 100, 75)
    assert boxes[4 * 9 + 5] == (500, 175, 600, 275)
    assert boxes[6 * 9 + 8] == (800, 375, 900, 450)


def test_boxes_of_ragged_regions_and_uneven_padding():
    grid = Grid((4, 5), (10, 10), ((0, 3, 10), (0, 6, 7, 10)), padding=((0.1, 0.3), (0.0, 0.5)))
    # height: padded 0.3 is (0.3 - 0.1) / 0.6 of the content; width: 0.6 lies beyond the content's end
    assert region_boxes(grid, (50, 60)) == {0: (0, 0, 50, 20), 3: (0, 20, 50, 60)}


def test_official_lattice_with_empty_regions():
    grid = Grid.official(6, 6, (120, 60))
    boxes = region_boxes(grid, (120, 60))
    assert overlay(noise(120, 60), grid, torch.ones(81)).size == (120, 60)
    assert len(boxes) < 81


@pytest.mark.parametrize("width, height", SIZES, ids=lambda n: str(n))
def test_read_regions_stay_bright(width, height):
    photo, grid = noise(width, height), padded(width, height)
    boxes = region_boxes(grid, photo.size)
    much, little, unread = sorted(
        boxes, key=lambda r: -(boxes[r][2] - boxes[r][0]) * (boxes[r][3] - boxes[r][1])
    )[:3]
    shown = overlay(photo, grid, weights(grid, **{f"r{much}": 0.8, f"r{little}": 0.2}))
    assert (shown.size, shown.mode) == (photo.size, "RGB")
    light = {r: inner(shown, boxes[r]).mean() / inner(photo, boxes[r]).mean() for r in (much, little, unread)}
    assert light[much] > 0.8
    assert light[unread] < 0.5
    assert light[unread] + 0.1 < light[little] < light[much]
    # warm by weight: red gains on blue
    warmth = [
        inner(shown, boxes[r])[..., 0].mean() - inner(shown, boxes[r])[..., 2].mean() for r in (much, little)
    ]
    assert warmth[0] > warmth[1] > 0


def test_colours_are_relative():
    photo, grid = noise(200, 200), padded(200, 200)
    few, many = weights(grid, r3=0.1, r40=0.05), weights(grid, r3=1.0, r40=0.5)
    assert np.array_equal(overlay(photo, grid, few), overlay(photo, grid, many))


def test_nothing_read_is_all_dim():
    photo, grid = noise(300, 200), padded(300, 200)
    shown = np.asarray(overlay(photo, grid, weights(grid))).astype(float)
    assert shown.mean() < 0.5 * np.asarray(photo).mean()


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (40, 60)], ids=str)
def test_small_photos_stay_visible(size):
    """Lines never cover what they frame."""
    photo = Image.new("RGB", size, (0, 0, 255))
    shown = np.asarray(overlay(photo, padded(*size), torch.ones(81)))
    assert shown.shape == (size[1], size[0], 3)
    assert (shown[..., 2] > 150).mean() > 0.5


def test_exif_rotation(tmp_path):
    upright = noise(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    with Image.open(path) as opened:
        assert opened.size == (40, 60)
        assert np.array_equal(open_photo(opened), upright)
    assert np.array_equal(open_photo(path), upright)
    assert overlay(str(path), padded(60, 40), torch.ones(81)).size == (60, 40)


def test_kinds_of_pictures():
    photo = noise(9, 5)
    array = np.asarray(photo)
    unit = torch.tensor(array).float() / 255
    for same in (array, unit, unit.permute(2, 0, 1), torch.tensor(array).permute(2, 0, 1)):
        assert np.array_equal(open_photo(same), photo)
    assert open_photo(array[..., 0]).getpixel((2, 1)) == (array[1, 2, 0],) * 3
    clear = np.dstack([array, np.zeros((5, 9), np.uint8)])
    assert np.array_equal(open_photo(clear), np.full((5, 9, 3), 255))
    deep = Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert np.array_equal(np.asarray(open_photo(deep))[..., 1], array[..., 0])


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((4, 0, 3), np.uint8), "with pixels in it"),
        (np.zeros((2, 3, 4, 3), np.uint8), r"got \[2, 3, 4, 3\]"),
        (np.full((4, 4), 2.0), r"floats in \[0, 1\], got 2.0..2.0"),
        (np.full((4, 4), np.nan), r"floats in \[0, 1\]"),
        (np.zeros((4, 4), np.int32), "uint8 or floats"),
    ],
)
def test_bad_pictures(image, message):
    with pytest.raises(ValueError, match=message):
        overlay(image, padded(4, 4), torch.ones(81))


def test_bad_files(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    with pytest.raises(ValueError, match=r"text\.png"):
        open_photo(text)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_photo(tmp_path / "nowhere.png")


@pytest.mark.parametrize(
    "grid", [Grid.blocks((8,), (24,)), Grid.blocks((2, 2, 2), (4, 4, 4))], ids=["1d", "3d"]
)
def test_only_images_are_drawn(grid):
    with pytest.raises(ValueError, match="grid must have two axes"):
        overlay(noise(20, 20), grid, torch.ones(grid.n_regions))


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.ones(80), r"\[n_regions=81\], got \[80\]"),
        (torch.full((81,), 1.5), r"weights must lie in \[0, 1\]"),
        (torch.full((81,), -0.1), r"weights must lie in \[0, 1\]"),
        (torch.full((81,), float("nan")), r"weights must lie in \[0, 1\]"),
    ],
)
def test_bad_weights(bad, message):
    with pytest.raises(ValueError, match=message):
        overlay(noise(20, 20), padded(20, 20), bad)


def test_importing_needs_no_pillow(monkeypatch):
    real = builtins.__import__

    def without_pillow(name, *args, **kwargs):
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    monkeypatch.delitem(sys.modules, "flexcore.viz")
    fresh = importlib.import_module("flexcore.viz")
    assert fresh is not viz
    with pytest.raises(ImportError, match="PIL"):
        fresh.overlay(noise(9, 9), padded(9, 9), torch.ones(81))
