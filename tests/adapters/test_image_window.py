"""Pictures read by window: the same pixels as from memory, whatever the file, and never more than a window of them."""

import errno
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import flexcore_adapters.image_files as image_files
import flexcore_adapters.image_scaling as image_scaling
from flexcore import FlexConfig, viz
from flexcore.errors import SourceError
from flexcore.grid import Grid
from flexcore.sources import TensorSource
from flexcore.tiled_source import gather
from flexcore_adapters.image import ImageAdapter
from flexcore_adapters.image_files import SpooledWindows, TiledWindows, open_picture
from flexcore_adapters.image_io import load_image
from flexcore_adapters.image_views import WindowedView, native_view, padded_view
from flexcore_adapters.image_window import PaddedWindows, PictureWindows, WindowedSource, Windows

pytest.importorskip("pyvips", reason="pyvips reads large pictures (pip install 'flexcore[big]')")
tifffile = pytest.importorskip("tifffile", reason="tifffile writes the TIFFs (pip install scikit-image)")

Photo = Callable[[str], Path]
SIDE, CELLS = 48, 6
MEAN = (122, 116, 104)  # 255 * CLIP's mean, cut off
PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"
TILES = {"tile": (64, 64)}


@pytest.fixture
def rgb(photo: Photo) -> np.ndarray:
    """An odd size, of no whole number of tiles."""
    return np.array(Image.open(photo("astronaut.png")).convert("RGB"))[:201, :299]


def alpha(rgb: np.ndarray) -> np.ndarray:
    ramp = np.linspace(0, 255, rgb.shape[1]).astype(np.uint8)
    return np.dstack([rgb, np.tile(ramp, (rgb.shape[0], 1))])


def wide(values: np.ndarray) -> np.ndarray:
    """The same in 16 bits, with something in the lower ones."""
    noise = np.random.default_rng(0).integers(-120, 120, values.shape)
    return (values.astype(np.int64) * 257 + noise).clip(0, 65535).astype(np.uint16)


def tiff(
    make: Callable[[np.ndarray], np.ndarray] = lambda a: a, **options: Any
) -> Callable[[np.ndarray, Path], Path]:
    def write(rgb: np.ndarray, folder: Path) -> Path:
        pixels = make(rgb)
        options.setdefault("photometric", "minisblack" if pixels.ndim == 2 else "rgb")
        tifffile.imwrite(folder / "a.tif", pixels, **options)
        return folder / "a.tif"

    return write


def vips(**options: Any) -> Callable[[np.ndarray, Path], Path]:
    def write(rgb: np.ndarray, folder: Path) -> Path:
        import pyvips

        settings = {"tile": True, "tile_width": 64, "tile_height": 64, **options}
        pyvips.Image.new_from_array(rgb).tiffsave(str(folder / "a.tif"), **settings)
        return folder / "a.tif"

    return write


def pillow(mode: str, suffix: str, **options: Any) -> Callable[[np.ndarray, Path], Path]:
    def write(rgb: np.ndarray, folder: Path) -> Path:
        picture = Image.fromarray(alpha(rgb) if mode in ("RGBA", "LA") else rgb).convert(mode)
        picture.save(folder / f"a.{suffix}", **options)
        return folder / f"a.{suffix}"

    return write


def grey16(rgb: np.ndarray, folder: Path) -> Path:
    Image.fromarray(wide(rgb[..., 1])).save(folder / "a.png")
    return folder / "a.png"


def png16(rgb: np.ndarray, folder: Path) -> Path:
    import pyvips

    picture = pyvips.Image.new_from_array(wide(alpha(rgb))).copy(interpretation="rgb16")
    picture.pngsave(str(folder / "a.png"))
    return folder / "a.png"


TILED: dict[str, Callable[[np.ndarray, Path], Path]] = {
    "plain": tiff(**TILES),
    "BigTIFF": tiff(bigtiff=True, **TILES),
    "big-endian": tiff(byteorder=">", **TILES),
    "deflate": tiff(compression="deflate", predictor=True, **TILES),
    "LZW": vips(compression="lzw"),
    "JPEG": vips(compression="jpeg", Q=90),
    "pyramid": vips(compression="jpeg", pyramid=True),
    "pyramid in SubIFDs": vips(compression="deflate", pyramid=True, subifd=True),
    "grey": tiff(lambda a: a[..., 1], **TILES),
    "grey, white is zero": tiff(lambda a: a[..., 1], photometric="miniswhite", **TILES),
    "grey of 16 bits": tiff(lambda a: wide(a[..., 1]), **TILES),
    "grey floats": tiff(lambda a: (a[..., 1] / 255).astype(np.float32), **TILES),
    "16 bits": tiff(wide, **TILES),
    "alpha": tiff(alpha, extrasamples=["unassalpha"], **TILES),
    "alpha of 16 bits": tiff(lambda a: wide(alpha(a)), extrasamples=["unassalpha"], **TILES),
    "a fourth channel that isn't alpha": tiff(alpha, extrasamples=["unspecified"], **TILES),
    "unknown tags": tiff(extratags=[(65000, 2, None, "hello", True)], **TILES),
}
SPOOLED: dict[str, Callable[[np.ndarray, Path], Path]] = {
    "TIFF in strips": tiff(compression="deflate", rowsperstrip=16),
    "TIFF in one strip": tiff(),
    "TIFF in planes": tiff(lambda a: a.transpose(2, 0, 1), planarconfig="separate"),
    "TIFF, CMYK": pillow("CMYK", "tif"),
    "TIFF, palette": pillow("P", "tif"),
    "TIFF, one bit": pillow("1", "tif", compression="group4"),
    "JPEG": pillow("RGB", "jpg", quality=90),
    "JPEG, progressive": pillow("RGB", "jpg", progressive=True),
    "JPEG, grey": pillow("L", "jpg"),
    "JPEG, CMYK": pillow("CMYK", "jpg"),
    "PNG": pillow("RGB", "png"),
    "PNG, alpha": pillow("RGBA", "png"),
    "PNG, grey and alpha": pillow("LA", "png"),
    "PNG, palette": pillow("P", "png"),
    "PNG, one colour clear": pillow("RGB", "png", transparency=(1, 2, 3)),
    "PNG, grey of 16 bits": grey16,
    "PNG, 16 bits and alpha": png16,
    "BMP": pillow("RGB", "bmp"),  # libvips doesn't know it: Pillow decodes it whole
}


def boxes(size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    width, height = size
    return [
        (0, 0, width, height),
        (width // 3, height // 5, width // 2, height - 3),
        (width - 1, 0, width, 1),
    ]


# ---------------------------------------------------------------------- windows


@pytest.mark.parametrize("case", [*TILED, *(f"spooled {name}" for name in SPOOLED)])
def test_windows_show_what_the_whole_file_shows(rgb: np.ndarray, tmp_path: Path, case: str) -> None:
    tiled = case in TILED
    path = (TILED[case] if tiled else SPOOLED[case.removeprefix("spooled ")])(rgb, tmp_path)
    whole = load_image(path)
    windows = open_picture(path, window_pixels=1)
    assert isinstance(windows, TiledWindows if tiled else SpooledWindows)
    assert windows.size == whole.size == (299, 201)
    for box in boxes(whole.size):
        assert np.array_equal(np.asarray(windows.read(*box)), np.asarray(whole.crop(box))), box
    assert windows.stats.windows == 3 and windows.stats.peak_bytes == 3 * 299 * 201
    assert windows.stats.seconds > 0 and (windows.stats.spool_bytes > 0) != tiled
    # Negative control: the picture isn't the same everywhere.
    assert np.asarray(whole.crop((0, 0, 50, 50))).tolist() != np.asarray(whole.crop((9, 9, 59, 59))).tolist()


def test_premultiplied_alpha_lies_on_white_too(rgb: np.ndarray, tmp_path: Path) -> None:
    rgba = alpha(rgb).astype(np.int64)
    rgba[..., :3] = rgba[..., :3] * rgba[..., 3:] // 255
    path = tiff(lambda _: rgba.astype(np.uint8), extrasamples=["assocalpha"], **TILES)(rgb, tmp_path)
    got = np.asarray(open_picture(path, window_pixels=1).read(0, 0, 299, 201)).astype(int)
    assert np.abs(got - np.asarray(load_image(path))).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["tif", "png"])
def test_windows_stand_upright(rgb: np.ndarray, tmp_path: Path, orientation: int, kind: str) -> None:
    path = tmp_path / f"turned.{kind}"
    if kind == "tif":
        tifffile.imwrite(path, rgb, photometric="rgb", extratags=[(274, 3, 1, orientation, True)], **TILES)
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(rgb).save(path, exif=exif)
    whole, windows = load_image(path), open_picture(path, window_pixels=1)
    assert isinstance(windows, TiledWindows if kind == "tif" else SpooledWindows)
    assert windows.size == whole.size == ((201, 299) if orientation > 4 else (299, 201))
    for box in boxes(whole.size):
        assert np.array_equal(np.asarray(windows.read(*box)), np.asarray(whole.crop(box))), box
    # Negative control: every other orientation moves the pixels.
    assert np.array_equal(np.asarray(whole), rgb) == (orientation == 1)


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 300, 5), (5, 5, 5, 9), (0, 9, 5, 5)], ids=str)
def test_windows_over_the_edge_are_refused(rgb: np.ndarray, tmp_path: Path, box: Any) -> None:
    windows = open_picture(TILED["plain"](rgb, tmp_path), window_pixels=1)
    with pytest.raises(ValueError, match=rf"in the 299x201 pixels of .*a\.tif', got {re.escape(str(box))}"):
        windows.read(*box)


def test_small_pictures_are_loaded_as_ever(rgb: np.ndarray, tmp_path: Path) -> None:
    path = TILED["plain"](rgb, tmp_path)
    for limit in (299 * 201, image_files.WINDOW_PIXELS):
        picture = open_picture(path, window_pixels=limit)
        assert isinstance(picture, Image.Image) and np.array_equal(np.asarray(picture), rgb)
    assert isinstance(open_picture(path, window_pixels=299 * 201 - 1), Windows)
    with pytest.raises(ValueError, match="more than max_pixels=1000"):
        open_picture(path, 1000, window_pixels=1)
    assert image_files.WINDOW_PIXELS == Image.MAX_IMAGE_PIXELS


# ---------------------------------------------------------------------- scaling

SIZES = [(299, 201), (640, 427), (427, 640), (97, 131), (900, 60), (37, 11)]


@pytest.mark.parametrize(
    "resample", [r for r in Image.Resampling if r.name not in image_scaling.UNSTEADY], ids=lambda r: r.name
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parts_of_a_scaled_picture(
    rgb: np.ndarray, resample: Image.Resampling, size: tuple[int, int]
) -> None:
    picture = Image.fromarray(rgb).resize(size)
    windows = PictureWindows(picture)
    for made in ((144, 144), (240, 96), (336, 336), (336, 11), (11, 336)):
        whole = picture.resize(made, resample)
        (width, height), some = made, (min(48, made[0]), min(11, made[1]))
        corners = (0, 0, *some), (width - some[0], height - some[1], width, height)
        for part in (None, *corners, (width // 3, 5, width // 3 + 3, 10)):
            got = image_scaling.scaled(windows, made, resample, part, strip=2000)  # several strips
            expected = whole if part is None else whole.crop(part)
            assert np.array_equal(np.asarray(got), np.asarray(expected)), (made, part)


def test_a_part_needs_the_filters_reach(rgb: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with no margin, a part's edge differs from the whole's."""
    picture, made, part = Image.fromarray(rgb), (96, 96), (48, 48, 96, 96)
    expected = np.asarray(picture.resize(made, Image.Resampling.LANCZOS).crop(part)).astype(int)
    monkeypatch.setattr(image_scaling, "_REACH", {"LANCZOS": -1.0})
    got = np.asarray(PictureWindows(picture).scaled(made, Image.Resampling.LANCZOS, part)).astype(int)
    assert np.abs(got - expected).max() > 3


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_padding_is_never_held(rgb: np.ndarray, size: tuple[int, int]) -> None:
    picture = Image.fromarray(rgb).resize(size)
    side = max(size)
    square = Image.new("RGB", (side, side), MEAN)
    square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    windows = PaddedWindows(PictureWindows(picture), MEAN)
    assert windows.size == (side, side)
    for box in (*boxes((side, side)), (0, 0, 3, 3)):
        assert np.array_equal(np.asarray(windows.read(*box)), np.asarray(square.crop(box)))
    assert windows.stats.peak_bytes <= 3 * size[0] * size[1]


def test_a_part_reads_its_own_window_only(rgb: np.ndarray, tmp_path: Path) -> None:
    windows = open_picture(TILED["plain"](np.tile(rgb, (4, 4, 1)), tmp_path), window_pixels=1)
    assert isinstance(windows, Windows) and windows.size == (1196, 804)
    windows.scaled((40 * SIDE, 40 * SIDE), Image.Resampling.BICUBIC, (960, 960, 1008, 1008))
    # a fortieth of each axis is 30 x 21 pixels; bicubic sees two more on either side, and one is for rounding
    assert windows.stats.peak_bytes <= 3 * (31 + 2 * 3) * (22 + 2 * 3)


# ---------------------------------------------------------------------- views


@pytest.mark.parametrize("zoom", [1, 3, 7])
@pytest.mark.parametrize("aspect", ["pad", "native"])
@pytest.mark.parametrize("size", [(299, 201), (201, 299), (640, 427), (61, 37)], ids=str)
def test_views_equal_those_from_memory(
    rgb: np.ndarray, tmp_path: Path, size: tuple[int, int], aspect: str, zoom: int
) -> None:
    """Odd sizes, shrunk and enlarged: tiles are what cutting the whole fine view gives."""
    pixels = np.asarray(Image.fromarray(rgb).resize(size))
    path = TILED["deflate"](pixels, tmp_path)
    small, large = (open_picture(path, window_pixels=n) for n in (1 << 20, 1))
    view = {
        "pad": lambda p: padded_view(p, SIDE, CELLS, zoom, 8, MEAN, Image.Resampling.BICUBIC),
        "native": lambda p: native_view(p, SIDE, CELLS, zoom, 8, Image.Resampling.BICUBIC),
    }[aspect]
    expected, got = view(small), view(large)
    assert isinstance(got, WindowedView) and not isinstance(expected, WindowedView)
    assert got.pixels.numel() == 0
    assert got.grid == expected.grid and (got.rows, got.cols) == (expected.rows, expected.cols)
    assert np.array_equal(np.asarray(got.coarse), np.asarray(expected.coarse))
    difference = (got.tiles().int() - expected.tiles().int()).abs()
    assert int(difference.max()) <= 1
    some = torch.tensor([got.rows * got.cols - 1, 0])
    assert torch.equal(got.tiles(some), got.tiles()[some])
    assert got.describe(0) == expected.describe(0)


@pytest.mark.parametrize("resample", image_scaling.UNSTEADY)
def test_filters_with_an_edge_take_the_fine_view_whole(
    rgb: np.ndarray, tmp_path: Path, resample: str
) -> None:
    path = TILED["plain"](rgb, tmp_path)
    views = [
        padded_view(open_picture(path, window_pixels=n), SIDE, CELLS, 3, 8, MEAN, Image.Resampling[resample])
        for n in (1 << 20, 1)
    ]
    assert torch.equal(views[1].tiles(), views[0].tiles())


def test_the_official_view_is_read_by_window_too(
    llava: tuple[Any, Any], rgb: np.ndarray, tmp_path: Path
) -> None:
    model, processor = llava
    path = TILED["plain"](rgb, tmp_path)
    try:
        model.flex_config = FlexConfig.reference()
        first, second = (
            ImageAdapter(model, processor, window_pixels=n)(PROMPT, images=path) for n in (1 << 20, 1)
        )
    finally:
        del model.flex_config
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    regions = torch.arange(9)
    one, two = (inputs["flex_streams"].samples[0][0].source for inputs in (first, second))
    assert isinstance(two, WindowedSource) and torch.equal(one.features(regions), two.features(regions))


def test_a_picture_too_elongated_for_a_square_is_refused(llava: tuple[Any, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("flexcore_adapters.image_views._SQUEEZED", 100_000)
    picture = Image.new("RGB", (5000, 2))
    with pytest.raises(ValueError, match=r"5000x2 is too elongated .* aspect='native'"):
        ImageAdapter(*llava, window_pixels=1)(PROMPT, images=picture)
    ImageAdapter(*llava, window_pixels=1, aspect="native")(PROMPT, images=picture)


# ---------------------------------------------------------------------- the adapter


@pytest.mark.parametrize("kind", ["TIFF", "JPEG", "PIL", "numpy"])
@pytest.mark.parametrize("aspect", ["pad", "native"])
def test_the_adapter_gives_the_same_inputs(
    llava: tuple[Any, Any], rgb: np.ndarray, tmp_path: Path, kind: str, aspect: str
) -> None:
    image = {
        "TIFF": lambda: TILED["deflate"](rgb, tmp_path),
        "JPEG": lambda: str(SPOOLED["JPEG"](rgb, tmp_path)),
        "PIL": lambda: Image.fromarray(rgb),
        "numpy": lambda: rgb,
    }[kind]()
    small = Image.fromarray(rgb).resize((20, 30))
    inputs = [
        ImageAdapter(*llava, aspect=aspect, zoom=4, window_pixels=n, spool_dir=tmp_path)(
            [PROMPT, PROMPT], images=[image, small]
        )
        for n in (1 << 20, 20 * 30)
    ]
    assert torch.equal(inputs[0]["pixel_values"], inputs[1]["pixel_values"])
    (whole, _), (windowed, beside) = ([s[0].source for s in one["flex_streams"].samples] for one in inputs)
    assert isinstance(windowed, WindowedSource) and not isinstance(whole, WindowedSource)
    assert not isinstance(beside, WindowedSource) and beside.encoder is windowed.encoder
    before = windowed.windows.windows
    some = torch.tensor([1, 5])
    together = gather([(windowed, some), (beside, some)])
    assert windowed.windows.windows > before
    assert torch.allclose(together[0], whole.features(some), atol=1e-5)
    everything = torch.arange(whole.grid.n_regions)
    assert torch.allclose(windowed.features(everything), whole.features(everything), atol=1e-5)
    assert (windowed.windows.spool_bytes == rgb.nbytes) == (kind == "JPEG")


def test_everything_up_front(llava: tuple[Any, Any], rgb: np.ndarray, tmp_path: Path) -> None:
    path = TILED["plain"](rgb, tmp_path)
    late, early = (
        ImageAdapter(*llava, window_pixels=1, lazy=lazy).streams(path)[0] for lazy in (True, False)
    )
    assert isinstance(early.source, TensorSource)
    regions = torch.arange(late.grid.n_regions)
    assert torch.allclose(late.source.features(regions), early.source.features(regions), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_pixels": 0}, "window_pixels must be an integer >= 1, got 0"),
        ({"window_pixels": None}, "window_pixels must be an integer >= 1, got None"),
        ({"spool_dir": "/no/such/folder"}, "spool_dir must be a folder, got '/no/such/folder'"),
    ],
    ids=str,
)
def test_options_out_of_range(llava: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageAdapter(*llava, **options)


def test_without_pyvips_the_extra_is_named(
    rgb: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = TILED["plain"](rgb, tmp_path)
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(ImportError, match=r"pip install 'flexcore\[big\]'"):
        open_picture(path, window_pixels=1)
    # what is in memory, or small, doesn't need it
    assert isinstance(open_picture(rgb, window_pixels=1), PictureWindows)
    assert isinstance(open_picture(path), Image.Image)


# ---------------------------------------------------------------------- the spool


def nameless() -> list[str]:
    """Files that this process holds open and that have no name any more."""
    links = [os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
    return [
        os.readlink(link)
        for link in links
        if os.path.islink(link) and os.readlink(link).endswith(" (deleted)")
    ]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_the_spool_goes_with_the_picture(rgb: np.ndarray, tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    before = nameless()
    windows = open_picture(SPOOLED["JPEG"](rgb, tmp_path), window_pixels=1, spool_dir=folder)
    assert isinstance(windows, SpooledWindows) and windows.stats.spool_bytes == rgb.nbytes
    assert list(folder.iterdir()) == [] and len(nameless()) == len(before) + 1
    window = windows.read(0, 0, 9, 9)
    del windows
    gc.collect()
    assert nameless() == before and window.size == (9, 9)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
@pytest.mark.parametrize("what", [KeyboardInterrupt, MemoryError])
def test_nothing_is_left_of_an_interrupted_spool(
    rgb: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: type[BaseException]
) -> None:
    before, done, real = nameless(), [], image_files._fetch

    def fetch(*args: Any) -> np.ndarray:
        done.append(args)
        if len(done) == 3:
            assert len(nameless()) == len(before) + 1
            raise what
        return real(*args)

    path = SPOOLED["JPEG"](rgb, tmp_path)
    monkeypatch.setattr(image_files, "_fetch", fetch)
    monkeypatch.setattr(image_files, "STRIP", 299 * 16)
    folder = tmp_path / "spool"
    folder.mkdir()
    with pytest.raises(what):
        open_picture(path, window_pixels=1, spool_dir=folder)
    assert list(folder.iterdir()) == [] and nameless() == before


def test_files_are_closed(rgb: np.ndarray, tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open files are counted in /proc")
    before = len(os.listdir("/proc/self/fd"))
    for case in (TILED["deflate"], SPOOLED["JPEG"], SPOOLED["PNG"]):
        windows = open_picture(case(rgb, tmp_path), window_pixels=1)
        windows.read(0, 0, 50, 50)
        del windows
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_bar_shows_the_rows(rgb: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = SPOOLED["JPEG"](rgb, tmp_path)
    open_picture(path, window_pixels=1, progress=True)
    assert re.search(r"spooling .*a\.jpg': 100%.* 201/201 ", capsys.readouterr().err)
    padded_view(open_picture(path, window_pixels=1), SIDE, CELLS, 2, 8, MEAN, Image.Resampling.BICUBIC, True)
    assert re.search(r"reading .*a\.jpg': 100%.* 299/299 ", capsys.readouterr().err)
    open_picture(path, window_pixels=1)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "case",
    [
        "plain",
        "deflate",
        "spooled JPEG",
        "spooled JPEG, progressive",
        "spooled PNG",
        "spooled TIFF in strips",
    ],
)
@pytest.mark.parametrize("share", [0.9, 0.4])
def test_truncated_files_are_refused_by_name(
    llava: tuple[Any, Any], rgb: np.ndarray, tmp_path: Path, case: str, share: float
) -> None:
    path = {**TILED, **{f"spooled {name}": make for name, make in SPOOLED.items()}}[case](rgb, tmp_path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=rf"{path.name}' is corrupt or truncated in rows \d+\.\.\d+"):
        ImageAdapter(*llava, window_pixels=1).streams(path)


@pytest.mark.parametrize("case", ["LZW", "spooled PNG"])
def test_corrupt_files_are_refused_by_name(
    llava: tuple[Any, Any], rgb: np.ndarray, tmp_path: Path, case: str
) -> None:
    path = (TILED[case] if case in TILED else SPOOLED[case.removeprefix("spooled ")])(rgb, tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{path.name}' is corrupt or truncated"):
        ImageAdapter(*llava, window_pixels=1).streams(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            tiff(lambda a: a.transpose(2, 0, 1), planarconfig="separate", **TILES),
            "a plane of tiles for each colour",
        ),
        (pillow("LAB", "tif"), "holds LAB colours"),
    ],
    ids=["planes of tiles", "LAB"],
)
def test_kinds_that_cannot_be_read_by_window(
    rgb: np.ndarray, tmp_path: Path, write: Any, message: str
) -> None:
    path = write(rgb, tmp_path)
    with pytest.raises(
        ValueError, match=rf"a\.tif' holds .*{message.split()[-1]}.*raise window_pixels to decode it whole"
    ):
        open_picture(path, window_pixels=1)
    assert isinstance(open_picture(path), Image.Image)


def test_a_file_that_vanishes_or_changes_before_a_tile_is_read(
    llava: tuple[Any, Any], rgb: np.ndarray, tmp_path: Path
) -> None:
    path = TILED["plain"](rgb, tmp_path)
    (stream,) = ImageAdapter(*llava, zoom=4, window_pixels=1).streams(path)
    first = stream.source.features(torch.tensor([0]))
    data = path.read_bytes()
    path.unlink()
    where = r"^image 0, tile 6 of 16, row 2 and column 3 of 4x4 tiles can't be read: "
    with pytest.raises(SourceError, match=where + r".*No such file.*a\.tif"):
        stream.source.features(torch.tensor([6]))
    # what was encoded is still there, and the file may come back
    assert torch.equal(stream.source.features(torch.tensor([0])), first)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match=where + r".*a\.tif' was changed since it was first read"):
        stream.source.features(torch.tensor([6]))


def test_a_full_disk_is_noticed_before_decoding(
    rgb: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = SPOOLED["JPEG"](rgb, tmp_path)
    usage = image_files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(image_files.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(image_files, "_fetch", lambda *_: pytest.fail("decoded"))
    with pytest.raises(
        OSError, match=r"a\.jpg' takes 180,297 bytes to spool .* only 1,000 are free.* spool_dir"
    ) as caught:
        open_picture(path, window_pixels=1, spool_dir=tmp_path)
    assert caught.value.errno == errno.ENOSPC


FULL = """
import os, resource, signal, sys
from flexcore_adapters.image_files import open_picture

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    open_picture(sys.argv[1], window_pixels=1, spool_dir=sys.argv[2])
except OSError as error:
    print(error)
links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
print(os.listdir(sys.argv[2]), [os.readlink(link) for link in links if os.path.lexists(link)])
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="files are limited in size as Linux does it")
def test_a_disk_that_fills_up_while_spooling(rgb: np.ndarray, tmp_path: Path) -> None:
    path = SPOOLED["JPEG"](rgb, tmp_path)
    folder = tmp_path / "spool"
    folder.mkdir()
    done = run(FULL, path, folder)
    message, left = done.stdout.splitlines()[-2:]
    assert re.search(r"a\.jpg' takes 180,297 bytes to spool in .*: File too large; .* spool_dir", message)
    assert left.startswith("[]") and "deleted" not in left


def run(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    code = f"import sys; sys.path[:0] = {[str(root), str(root / 'adapters')]!r}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )


# ---------------------------------------------------------------------- overlays


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", ["deflate", "grey of 16 bits", "spooled JPEG", "spooled PNG, alpha"])
@pytest.mark.parametrize("share", [0.9, 0.3], ids=["Pillow warns", "Pillow refuses"])
def test_a_huge_file_is_reduced_for_its_overlay(
    rgb: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, share: float
) -> None:
    margin = 49 / 299
    grid = Grid.blocks((CELLS,) * 2, (18, 18), 8, tile=CELLS, padding=((margin, margin), (0.0, 0.0)))
    weights = torch.zeros(grid.n_regions)
    weights[4] = 1
    path = (TILED[case] if case in TILED else SPOOLED[case.removeprefix("spooled ")])(rgb, tmp_path)
    assert viz.overlay(path, grid, weights).size == (299, 201)
    expected = viz.overlay(load_image(path).resize((100, 67)), grid, weights)

    monkeypatch.setattr(viz, "SHOWN", 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(299 * 201 * share))
    got = viz.overlay(path, grid, weights)
    assert got.size == (100, 67)
    assert np.abs(np.asarray(got).astype(int) - np.asarray(expected)).mean() < 4
    # a picture that is in memory already is reduced as well
    assert viz.overlay(rgb, grid, weights).size == (100, 67)

    monkeypatch.setitem(sys.modules, "pyvips", None)
    if share < 0.5:
        with pytest.raises(ImportError, match=r"flexcore\[big\]"):
            viz.overlay(path, grid, weights)


# ---------------------------------------------------------------------- memory

WATCH = """
import json, sys
from pathlib import Path
import torch
from PIL import Image
from flexcore_adapters.image_files import open_picture
from flexcore_adapters.image_views import padded_view
torch.set_num_threads(1)

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) << 10

def look(path, window_pixels):
    picture = open_picture(path, window_pixels=window_pixels, spool_dir=sys.argv[3])
    view = padded_view(picture, 336, 24, 40, 8, (0, 0, 0), Image.Resampling.BICUBIC)
    view.tiles(torch.tensor([0, 41, 820, 1599]))

look(sys.argv[1], 1000)
before = peak()
look(sys.argv[2], 1000)
print(json.dumps(peak() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", ["TIFF", pytest.param("JPEG", marks=pytest.mark.slow)])
def test_memory_stays_far_below_the_pictures_own(rgb: np.ndarray, tmp_path: Path, kind: str) -> None:
    """6000 x 6000 pixels are 103 MiB, and their fine view at zoom 40 is another 517."""
    small, large = tmp_path / "small", tmp_path / "large"
    name = "a.tif" if kind == "TIFF" else "a.jpg"
    for folder, times in ((small, 4), (large, 30)):
        folder.mkdir()
        pixels = np.tile(rgb[:200, :200], (times, times, 1))
        if kind == "TIFF":
            vips(compression="jpeg", tile_width=256, tile_height=256)(pixels, folder)
        else:
            pillow("RGB", "jpg")(pixels, folder)
    taken = json.loads(run(WATCH, small / name, large / name, tmp_path).stdout)
    print(f"{taken / 2**20:.0f} MiB")
    # libvips holds some hundred rows of a JPEG while it decodes it
    assert taken < (60 << 20 if kind == "TIFF" else 85 << 20)


def test_the_files_of_the_benchmark(photo: Photo, tmp_path: Path) -> None:
    from benchmarks.big_image import make

    files = make(tmp_path, 700)
    expected = np.asarray(Image.open(photo("astronaut.png")).convert("RGB").resize((2048, 2048)))[:700, :700]
    with tifffile.TiffFile(files["TIFF"]) as file:
        assert file.pages[0].is_tiled and file.pages[0].compression.name.endswith("DEFLATE")
    for kind in ("TIFF", "JPEG"):
        picture = load_image(files[kind])
        assert picture.size == (700, 700)
        assert np.abs(np.asarray(picture).astype(int) - expected).mean() < 4


@pytest.mark.slow
def test_twenty_thousand_pixels_on_a_side(tmp_path: Path) -> None:
    """1.2 GB decoded: the whole way from file to answer and overlay, as the benchmark measures it."""
    from benchmarks.big_image import compare, report

    results = compare(tmp_path, 20_000, 20)
    report(results, 20_000)
    whole = 3 * 20_000**2
    for kind in ("TIFF", "JPEG"):
        one = results[kind]
        assert one["peak bytes with overlay"] - results["photo"]["peak bytes with overlay"] < whole / 3
        assert one["largest window, bytes"] < whole / 100
        assert 0 < one["tiles encoded"] < one["tiles"] / 4
    assert results["TIFF"]["spool bytes"] == 0 and results["JPEG"]["spool bytes"] == whole
