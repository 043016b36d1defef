import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from flexcore_adapters.image_io import check_size, load_image

Photo = Callable[[str], Path]


def pixels(image: Any, **options: Any) -> np.ndarray:
    loaded = load_image(image, **options)
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


@pytest.fixture
def rgb(photo: Photo) -> np.ndarray:
    return np.array(Image.open(photo("coffee.png")).convert("RGB"))[:200, :300]


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "pil": Image.fromarray,
    "numpy-uint8": lambda a: a,
    "numpy-strided": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "numpy-float64": lambda a: a / 255,
    "numpy-float32": lambda a: (a / 255).astype(np.float32),
    "numpy-float16": lambda a: (a / 255).astype(np.float16),
    "numpy-rgba": lambda a: np.concatenate([a, np.full_like(a[..., :1], 255)], axis=2),
    "torch-hwc": torch.from_numpy,
    "torch-chw": lambda a: torch.from_numpy(a).permute(2, 0, 1),
    "torch-float-chw": lambda a: (torch.from_numpy(a).permute(2, 0, 1) / 255).requires_grad_(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_pixels(rgb: np.ndarray, kind: str) -> None:
    assert np.array_equal(pixels(KINDS[kind](rgb)), rgb)


def test_paths_are_strings_or_path_objects(rgb: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(rgb).save(path)
    assert np.array_equal(pixels(path), rgb)
    assert np.array_equal(pixels(str(path)), rgb)


def test_torch_bfloat16_keeps_what_it_holds() -> None:
    values = torch.rand(3, 5, 7).bfloat16()
    expected = (values.float() * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels(values), expected)


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1)], ids=str)
def test_grey_arrays_become_rgb(shape: tuple[int, ...]) -> None:
    grey = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(pixels(grey), np.repeat(grey.reshape(9, 7, 1), 3, axis=2))
    assert np.array_equal(pixels(torch.from_numpy(grey.reshape(9, 7))), pixels(grey))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("how", ["path", "pil", "pil-lazy"])
def test_exif_orientation_is_applied(photo: Photo, tmp_path: Path, orientation: int, how: str) -> None:
    # Lossless, so that the upright picture can be compared pixel by pixel.
    picture = Image.open(photo("chelsea.png")).convert("RGB").resize((31, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    picture.save(path, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    image: Any = path
    if how != "path":
        image = Image.open(path)
    if how == "pil":
        image.load()
    assert np.array_equal(pixels(image), expected)
    # Negative control: every other orientation moves the pixels.
    assert np.array_equal(pixels(image), np.asarray(picture)) == (orientation == 1)


def test_rotated_jpeg_stands_upright(photo: Photo, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "phone.jpg"
    Image.open(photo("rocket.jpg")).save(path, exif=exif, quality=95)
    with Image.open(path) as stored:
        assert load_image(path).size == stored.size[::-1]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_hide_the_picture(rgb: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    Image.fromarray(rgb).save(path, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xffrubbish")
    assert pixels(path).shape == rgb.shape


def test_transparency_lies_on_white() -> None:
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:, 3:, 3] = 255
    rgba[:, 2, 3] = 128
    expected = np.array([[255, 255, 255]] * 2 + [[227, 127, 127]] + [[200, 0, 0]] * 3)
    for image in (rgba, Image.fromarray(rgba), torch.from_numpy(rgba).permute(2, 0, 1), rgba / 255):
        assert np.abs(pixels(image).astype(int) - expected).max() <= 1
    grey = Image.fromarray(np.dstack([np.full((2, 3), 40, np.uint8), np.zeros((2, 3), np.uint8)]), "LA")
    assert (pixels(grey) == 255).all()


def test_palette_with_and_without_transparency(rgb: np.ndarray, tmp_path: Path) -> None:
    palette = Image.fromarray(rgb).quantize(16)
    assert np.array_equal(pixels(palette), np.asarray(palette.convert("RGB")))
    path = tmp_path / "palette.png"
    palette.save(path, transparency=int(np.asarray(palette)[0, 0]))
    loaded = pixels(path)
    clear = np.asarray(palette) == np.asarray(palette)[0, 0]
    assert (loaded[clear] == 255).all()
    assert np.array_equal(loaded[~clear], np.asarray(palette.convert("RGB"))[~clear])


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_other_modes_are_converted(rgb: np.ndarray, mode: str) -> None:
    image = Image.fromarray(rgb).convert(mode)
    assert np.array_equal(pixels(image), np.asarray(image.convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 12 * 9).reshape(12, 9).astype(np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)[..., None].repeat(3, axis=2)
    path = tmp_path / "scan.png"
    Image.fromarray(values).save(path)
    assert np.array_equal(pixels(path), expected)
    assert np.array_equal(pixels(Image.fromarray(values)), expected)
    assert np.array_equal(pixels(Image.fromarray(values.astype(np.int32))), expected)
    assert np.array_equal(pixels(Image.fromarray((values / 65535).astype(np.float32))), expected)


def test_real_files_of_many_formats(photo: Photo) -> None:
    for name in (
        "astronaut.png",
        "camera.png",
        "rocket.jpg",
        "multipage.tif",
        "no_time_for_that_tiny.gif",
        "logo.png",
    ):
        with Image.open(photo(name)) as image:
            assert load_image(photo(name)).size == image.size


BAD: dict[str, tuple[Any, str]] = {
    "zero-size PIL": (Image.new("RGB", (0, 5)), "no pixels"),
    "zero-size array": (np.zeros((5, 0, 3), np.uint8), "no pixels"),
    "zero-size tensor": (torch.zeros(3, 0, 4), "no pixels"),
    "nan": (np.full((4, 4, 3), np.nan), "not finite"),
    "infinity": (torch.full((3, 4, 4), float("inf")), "not finite"),
    "nan in a float picture": (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "not finite"),
    "0..255 floats": (np.full((4, 4, 3), 255.0), r"floats in \[255, 255\]"),
    "normalised floats": (
        torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)),
        r"lie in \[0, 1\]",
    ),
    "int64": (np.zeros((4, 4, 3), np.int64), "uint8 or floats in .* got int64"),
    "channels first in numpy": (np.zeros((3, 5, 7), np.uint8), r"\[H, W, 1\|3\|4\], got \[3, 5, 7\]"),
    "two channels": (np.zeros((5, 7, 2), np.uint8), r"got \[5, 7, 2\]"),
    "one dimension": (np.zeros(7, np.uint8), r"got \[7\]"),
    "a batch": (torch.zeros(2, 3, 5, 7), "several images as a list"),
    "32-bit integers": (Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "16-bit"),
    "address": ("https://example.org/cat.png", "nothing is downloaded"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_refused(case: str) -> None:
    image, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        load_image(image, name="image 3")


def test_messages_name_the_image() -> None:
    with pytest.raises(ValueError, match=r"^image 3 holds values"):
        load_image(np.full((4, 4), np.nan), name="image 3")
    with pytest.raises(TypeError, match=r"image 3 must be a PIL image, .* got bytes"):
        load_image(b"not an image", name="image 3")


def test_rounding_errors_around_the_range_are_forgiven() -> None:
    assert pixels(np.array([[-1e-6, 1 + 1e-6]]))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        load_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize(
    "name", ["astronaut.png", "rocket.jpg", "multipage_rgb.tif", "no_time_for_that_tiny.gif"]
)
def test_truncated_files_are_refused_by_name(photo: Photo, tmp_path: Path, name: str) -> None:
    data = photo(name).read_bytes()
    for share in (0.9, 0.5, 0.1):
        path = tmp_path / f"cut-{share}-{name}"
        # The GIF is an animation: what must be cut is its first frame.
        path.write_bytes(data[: int(len(data) * share * (0.05 if name.endswith("gif") else 1))])
        with pytest.raises(ValueError, match=f"cut-{share}-{name}.* corrupt"):
            load_image(path)


def test_corrupt_files_are_refused_by_name(photo: Photo, tmp_path: Path) -> None:
    path = tmp_path / "bent.png"
    data = bytearray(photo("astronaut.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"bent\.png.* corrupt or truncated"):
        load_image(path)
    for content in (b"", b"plain text, no picture at all", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bent\.png"):
            load_image(path)
    lazy = tmp_path / "half.jpg"
    lazy.write_bytes(photo("rocket.jpg").read_bytes()[:20000])
    with Image.open(lazy) as image, pytest.raises(ValueError, match="image 0 is corrupt or truncated"):
        load_image(image, name="image 0")


def bomb(path: Path, width: int, height: int) -> Path:
    """A valid PNG header over next to no data: decoding it would fail, its size can be read."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_the_header_is_checked_before_decoding(tmp_path: Path) -> None:
    path = bomb(tmp_path / "bomb.png", 50_000, 50_000)
    with pytest.raises(
        ValueError, match=r"bomb\.png' has 50000x50000 = 2500000000 pixels, more than max_pixels=1000"
    ):
        load_image(path, max_pixels=1000)
    # Only decoding notices that the data are missing, so the size passed.
    with pytest.raises(ValueError, match="corrupt or truncated"):
        load_image(bomb(tmp_path / "small.png", 50, 50), max_pixels=2500)


@pytest.mark.parametrize("kind", ["path", "pil", "numpy", "torch"])
def test_max_pixels_holds_for_every_kind(tmp_path: Path, kind: str) -> None:
    array = np.zeros((30, 40, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    image = {
        "path": tmp_path / "a.png",
        "pil": Image.fromarray(array),
        "numpy": array,
        "torch": torch.from_numpy(array).permute(2, 0, 1),
    }[kind]
    with pytest.raises(ValueError, match="40x30 = 1200 pixels, more than max_pixels=1199"):
        check_size(image, 1199)
    check_size(image, 1200)
    check_size(image, None)


def test_a_larger_limit_gets_past_pillow_and_leaves_its_limit_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    Image.new("RGB", (300, 200), "red").save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    seen, done = set(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.add(Image.MAX_IMAGE_PIXELS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_image(path, max_pixels=60_000).size == (300, 200)
    finally:
        done.set()
        watcher.join()
    assert seen == {1000}
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
