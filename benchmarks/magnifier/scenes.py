"""Scenes: photographs with coloured frames, a handwritten digit in each, and questions about them.

Digits are scikit-learn's `load_digits`, 1,797 pictures of 8x8 pixels. Who wrote which isn't published, but a writer's
digits follow one another, so the splits are contiguous blocks of the file. Backgrounds are photographs that
scikit-image and scikit-learn carry; no photograph is in two splits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CANVAS = 192
DIGIT = 6
FRAMES = 6
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.80, 0.10),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "pink": (0.95, 0.20, 0.90),
    "cyan": (0.10, 0.90, 0.90),
}
NAMES = tuple(COLOURS)
QUESTIONS = {"frame": "What is in the {} frame?", "left": "What is in the frame left of {}?"}
SPLITS = {"train": (0, 1258), "val": (1258, 1438), "test": (1438, 1797)}
# All of them public domain or CC0 but for china and flower, which are CC-BY-2.0.
PHOTOS = {
    "train": (
        *("astronaut.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png"),
        *("camera.png", "brick.png", "grass.png", "gravel.png", "moon.png"),
    ),
    "val": ("chelsea.png", "retina.jpg"),
    "test": ("china.jpg", "flower.jpg", "motorcycle_left.png"),
}
CONTRAST, NOISE = (0.35, 0.65), 0.05
_VARIANTS = 12
_FRAME_ALPHA = 0.9


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and what is in it.

    Args:
        pixels: `[side, side, 3]` uint8.
        boxes: `[n, 3]` top, left and side of each digit in pixels.
        digits: `[n]`.
        colours: `[n]` indices into `NAMES`.
    """

    pixels: np.ndarray
    boxes: np.ndarray
    digits: np.ndarray
    colours: np.ndarray

    @property
    def image(self) -> Image.Image:
        """The picture as PIL takes it."""
        return Image.fromarray(self.pixels)

    def frames(self) -> np.ndarray:
        """`[n, 3]` top, left and side of each frame: a digit, a gap of a sixth of it, and a border of a third."""
        margin = self.boxes[:, 2] // 2
        return np.stack(
            [self.boxes[:, 0] - margin, self.boxes[:, 1] - margin, self.boxes[:, 2] + 2 * margin], 1
        )

    def target(self, colour: int, kind: str) -> int | None:
        """The frame that a question is about; None if it has no answer here.

        Args:
            colour: Index into `NAMES` of the colour that is named.
            kind: `frame`, or `left`: the next frame to the left, whatever its height.
        """
        named = int(np.flatnonzero(self.colours == colour)[0])
        if kind == "frame":
            return named
        at = self.boxes[:, 1] + self.boxes[:, 2] / 2
        left = np.flatnonzero(at < at[named])
        return int(left[at[left].argmax()]) if len(left) else None


@functools.cache
def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """`[n, 8, 8]` digits in `[0, 1]` and their `[n]` labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    start, stop = SPLITS[split]
    return (data.images[start:stop] / 16).astype(np.float32), data.target[start:stop]


@functools.cache
def ink(split: str, side: int, varied: bool) -> tuple[np.ndarray, np.ndarray]:
    """Digits at a size, `[n, variants, side, side]` in `[0, 1]`, and their labels.

    Args:
        split: Whose digits.
        side: In pixels.
        varied: Turn, shear and stretch each a little, in a dozen ways; else one variant, resized and no more.
    """
    images, labels = digits(split)
    rng = np.random.default_rng(side)
    out = np.zeros((len(images), _VARIANTS if varied else 1, side, side), np.float32)
    for i, image in enumerate(images):
        picture = Image.fromarray((255 * image).astype(np.uint8))
        if varied:
            picture = picture.resize((32, 32), Image.Resampling.BICUBIC)
        for v in range(out.shape[1]):
            one = picture
            if varied:
                turn, shear, (sx, sy) = rng.normal(0, 0.12), rng.normal(0, 0.12), rng.normal(1, 0.07, 2)
                a, b = np.cos(turn) / sx, (np.sin(turn) + shear) / sx
                c, d = -np.sin(turn) / sy, np.cos(turn) / sy
                dx, dy = rng.normal(0, 1.0, 2)
                move = (16 - 16 * a - 16 * b + dx, 16 - 16 * c - 16 * d + dy)
                one = picture.transform(
                    (32, 32),
                    Image.Transform.AFFINE,
                    (a, b, move[0], c, d, move[1]),
                    Image.Resampling.BILINEAR,
                )
            out[i, v] = np.asarray(one.resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255
    return out, labels


@functools.cache
def photographs(split: str) -> tuple[Image.Image, ...]:
    """The split's photographs."""
    import skimage
    import sklearn

    folders = (Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images")
    found = []
    for name in PHOTOS[split]:
        path = next(folder / name for folder in folders if (folder / name).is_file())
        with Image.open(path) as image:
            found.append(image.convert("RGB"))
    return tuple(found)


def cut(rng: np.random.Generator, split: str, side: int) -> np.ndarray:
    """`[side, side, 3]` float32 in `[0, 1]`, cut from a photograph; training ones vary in colour and orientation."""
    photos = photographs(split)
    photo = photos[rng.integers(len(photos))]
    extent = min(side * rng.uniform(0.7, 2.0), *photo.size)
    x, y = rng.uniform(0, photo.width - extent), rng.uniform(0, photo.height - extent)
    piece = photo.resize((side, side), Image.Resampling.BILINEAR, box=(x, y, x + extent, y + extent))
    out = np.asarray(piece, np.float32) / 255
    if split == "train":
        out = out[:: rng.choice((-1, 1)), :: rng.choice((-1, 1)), rng.permutation(3)]
        if rng.random() < 0.5:
            out = out.transpose(1, 0, 2)
        out = np.clip((out - 0.5) * rng.uniform(0.6, 1.3, 3) + 0.5 + rng.normal(0, 0.08, 3), 0, 1)
    return np.array(out, np.float32)


def background(rng: np.random.Generator, split: str, side: int) -> np.ndarray:
    """`[side, side, 3]` float32 in `[0, 1]`, cut from a photograph.

    Every other training one is pieced together from several: ten photographs have few sharp edges between one colour
    and another, and a picture of anything else is full of them.
    """
    out = cut(rng, split, side)
    if split == "train" and rng.random() < 0.5:
        for _ in range(rng.integers(1, 5)):
            piece = int(side * rng.uniform(0.2, 0.6))
            y, x = rng.integers(0, side - piece + 1, 2)
            height = int(piece * rng.uniform(0.3, 1))
            out[y : y + height, x : x + piece] = cut(rng, split, piece)[:height]
    return out


def places(rng: np.random.Generator, n: int, side: int, frame: int, apart: int, columns: int) -> np.ndarray:
    """`[n, 2]` tops and lefts of frames that don't touch.

    Args:
        rng: Where they are drawn from.
        n: How many.
        side: Of the picture.
        frame: Side of a frame.
        apart: Least distance of two frames' tops or lefts, whichever is larger.
        columns: Least distance of two frames' lefts, so that "left of" can be told from coarse tokens.
    """
    while True:
        out: list[tuple[int, int]] = []
        for y, x in rng.integers(0, side - frame + 1, (40 * n, 2)).tolist():
            if all(max(abs(y - v), abs(x - u)) >= apart and abs(x - u) >= columns for v, u in out):
                out.append((y, x))
                if len(out) == n:
                    return np.array(out)


def draw(
    rng: np.random.Generator,
    split: str,
    pixels: np.ndarray,
    at: np.ndarray,
    colours: Sequence[int] | np.ndarray,
    digit: int = DIGIT,
    ease: float = 0.0,
) -> Scene:
    """Put frames with digits on a background, and noise on all of it.

    Args:
        rng: Where digits, contrasts and noise are drawn from.
        split: Whose digits.
        pixels: `[side, side, 3]` float32 in `[0, 1]`; drawn on.
        at: `[n, 2]` tops and lefts of the frames.
        colours: `[n]` indices into `NAMES`.
        digit: Side of the digits in pixels.
        ease: 0 for the task's contrast and noise, up to 1 for twice the contrast and no noise.
    """
    bank, labels = ink(split, digit, split == "train")
    margin, border = digit // 2, max(1, digit // 3)
    palette = np.asarray(list(COLOURS.values()), np.float32)
    chosen = rng.integers(len(bank), size=len(at))
    for (top, left), colour, which in zip(at, colours, chosen, strict=True):
        frame = pixels[top : top + digit + 2 * margin, left : left + digit + 2 * margin]
        ring = np.ones(frame.shape[:2], bool)
        ring[border:-border, border:-border] = False
        frame[ring] = (1 - _FRAME_ALPHA) * frame[ring] + _FRAME_ALPHA * palette[colour]
        inside = frame[margin:-margin, margin:-margin]
        # ink is lighter than a dark ground and darker than a light one
        sign = 1.0 if inside.mean() < 0.5 else -1.0
        inside += (
            sign * (1 + ease) * rng.uniform(*CONTRAST) * bank[which, rng.integers(bank.shape[1])][..., None]
        )
    noisy = pixels + (1 - ease) * NOISE * rng.standard_normal(pixels.shape, np.float32)
    boxes = np.concatenate([at + margin, np.full((len(at), 1), digit)], axis=1)
    shown = (255 * noisy.clip(0, 1) + 0.5).astype(np.uint8)
    return Scene(shown, boxes, labels[chosen].astype(np.int64), np.asarray(colours))


def canvas(rng: np.random.Generator, split: str, ground: str | None = None) -> Scene:
    """The task's picture: six frames of different colours at arbitrary places, with digits of six pixels.

    Args:
        rng: Where it is drawn from.
        split: Whose digits and photographs.
        ground: Whose photographs, instead.
    """
    at = places(rng, FRAMES, CANVAS, 2 * DIGIT, apart=2 * DIGIT + 4, columns=2 * DIGIT)
    return draw(rng, split, background(rng, ground or split, CANVAS), at, rng.permutation(len(NAMES)))


def readable(rng: np.random.Generator, split: str, side: int = 64) -> Scene:
    """What the coarse-only base learns on: the same with frames so large that the coarse view can be read."""
    digit = int(rng.choice((6, 6, 7)))
    frame = digit + 2 * (digit // 2)
    at = places(rng, FRAMES, side, frame, apart=frame, columns=4)
    return draw(rng, split, background(rng, split, side), at, rng.permutation(len(NAMES)), digit)


def crowded(rng: np.random.Generator, split: str, n: int = 64, ease: float = 0.0) -> Scene:
    """What the encoder learns on: many frames, colours repeating, with digits of six to ten pixels.

    Args:
        rng: Where it is drawn from.
        split: Whose digits and photographs.
        n: Frames with the smallest digits; fewer of larger ones.
        ease: See `draw`.
    """
    digit = int(rng.choice((6, 6, 6, 7, 8, 10)))
    n = max(1, n * DIGIT**2 // digit**2)
    frame = digit + 2 * (digit // 2)
    at = places(rng, n, CANVAS, frame, apart=frame + 1, columns=0)
    colours = rng.integers(len(NAMES), size=n)
    return draw(rng, split, background(rng, split, CANVAS), at, colours, digit, ease)


def placed(rng: np.random.Generator, photo: Image.Image, split: str) -> Scene:
    """A photo of any size with a canvas's frames in it, as large as they have to be to be seen like a canvas's.

    Args:
        rng: Where places, digits and contrasts are drawn from.
        photo: The photo; it isn't changed.
        split: Whose digits.
    """
    scale = max(photo.size) / CANVAS
    small = np.asarray(
        photo.convert("RGB").resize([round(v / scale) for v in photo.size], Image.Resampling.BILINEAR)
    )
    height, width = small.shape[:2]
    at = places(rng, FRAMES, CANVAS, 2 * DIGIT, apart=2 * DIGIT + 4, columns=2 * DIGIT)
    at = np.floor(at * np.array([height - 2 * DIGIT, width - 2 * DIGIT]) / (CANVAS - 2 * DIGIT)).astype(int)
    while any(np.abs(a - b).max() < 2 * DIGIT + 2 for i, a in enumerate(at) for b in at[:i]):
        at = rng.integers(0, [height - 2 * DIGIT + 1, width - 2 * DIGIT + 1], (FRAMES, 2))
    scene = draw(rng, split, small.astype(np.float32) / 255, at, rng.permutation(len(NAMES)))
    whole = photo.convert("RGB")
    for top, left, side in scene.frames():
        patch = Image.fromarray(scene.pixels[top : top + side, left : left + side])
        corners = [round(v * scale) for v in (left, top, left + side, top + side)]
        size = (corners[2] - corners[0], corners[3] - corners[1])
        whole.paste(patch.resize(size, Image.Resampling.BICUBIC), tuple(corners[:2]))
    return Scene(np.asarray(whole), np.round(scene.boxes * scale).astype(int), scene.digits, scene.colours)
