"""Clips: a moving view of a photograph whose border changes colour, and digits that show for less than half a second.

24 seconds at 25 frames a second, 16x16 pixels. Six stretches of two seconds and more, each with a border of its own
colour, and in each a digit for 9 to 12 frames while no coarse frame is taken. Digits without a border distract.
Digits, photographs and contrasts are those of `scenes`, and so are the splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexcore_adapters.video_io import Video
from flexcore_adapters.video_time import frames_at

from .scenes import COLOURS, CONTRAST, NAMES, NOISE, background, ink

FPS, SECONDS, SIDE, DIGIT, BORDER = 25, 24, 16, 8, 2
FRAMES = FPS * SECONDS
# Coarse frames in all, and fine ones for each: one and six a second.
COARSE_FRAMES, PER_COARSE = 24, 6
FINE_FRAMES = COARSE_FRAMES * PER_COARSE
STRETCH, SHOWN = (50, 62), (9, 12)  # frames, from and to
_DISTRACTORS, _GAP, _PAN, _ALPHA = 3, 8, 24, 0.9
_TIMES = Video("clip", np.arange(FRAMES) / FPS, SECONDS, (SIDE, SIDE))
# The frames that the video adapter takes of such a clip.
COARSE_AT = frames_at(_TIMES, 0.0, SECONDS, COARSE_FRAMES)
FINE_AT = frames_at(_TIMES, 0.0, SECONDS, FINE_FRAMES)


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip and what shows when.

    Args:
        frames: `[600, 16, 16, 3]` uint8.
        stretches: `[6, 2]` first frame of each coloured stretch and the one after its last, in order of time.
        shown: `[6, 2]` the same of the digit in each.
        colours: `[6]` indices into `NAMES`.
        digits: `[6]`.
    """

    frames: np.ndarray
    stretches: np.ndarray
    shown: np.ndarray
    colours: np.ndarray
    digits: np.ndarray

    def by_colour(self) -> tuple[np.ndarray, np.ndarray]:
        """`[6]` digits and `[6, 2]` fine steps in which they show, first and one after the last, by colour named."""
        order = np.argsort(self.colours)
        steps = np.searchsorted(FINE_AT, self.shown[order])
        return self.digits[order], steps


def stretches(rng: np.random.Generator) -> np.ndarray:
    """`[6, 2]` frames between which borders are coloured, gaps of at least a few frames between them."""
    lengths = rng.integers(STRETCH[0], STRETCH[1] + 1, len(NAMES))
    gaps = len(NAMES) + 1
    free = FRAMES - int(lengths.sum()) - gaps * _GAP
    cuts = np.sort(rng.integers(0, free + 1, gaps - 1))
    before = np.diff(cuts, prepend=0) + _GAP
    starts = np.cumsum(before) + np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return np.stack([starts, starts + lengths], axis=1)


def moment(rng: np.random.Generator, stretch: np.ndarray, seen: bool) -> tuple[int, int]:
    """When a stretch's digit shows: between two coarse frames that see the stretch, or while one of them is taken.

    Args:
        rng: Where it is drawn from.
        stretch: First frame, and the one after the last.
        seen: Whether a coarse frame sees the digit.
    """
    length = int(rng.integers(SHOWN[0], SHOWN[1] + 1))
    taken = COARSE_AT[(stretch[0] <= COARSE_AT) & (stretch[1] > COARSE_AT)]
    if seen:
        at = int(rng.choice(taken))
        start = int(rng.integers(max(stretch[0], at - length + 1), min(at, stretch[1] - length) + 1))
    else:
        which = int(rng.integers(len(taken) - 1))
        start = int(rng.integers(taken[which] + 1, taken[which + 1] - length + 1))
    return start, start + length


def border() -> np.ndarray:
    """`[16, 16]` bool: the border's pixels."""
    ring = np.ones((SIDE, SIDE), bool)
    ring[BORDER:-BORDER, BORDER:-BORDER] = False
    return ring


def paint_border(pixels: np.ndarray, colour: int) -> None:
    """Colour the border of `[..., 16, 16, 3]` frames, in place."""
    ring, rgb = border(), np.asarray(list(COLOURS.values()), np.float32)[colour]
    pixels[..., ring, :] = (1 - _ALPHA) * pixels[..., ring, :] + _ALPHA * rgb


def write_digit(rng: np.random.Generator, pixels: np.ndarray, glyph: np.ndarray) -> None:
    """Write a digit `[8, 8]` on `[T, 16, 16, 3]` frames inside the border, at one place in all of them, in place."""
    top, left = rng.integers(BORDER, SIDE - BORDER - DIGIT + 1, 2)
    inside = pixels[:, top : top + DIGIT, left : left + DIGIT]
    sign = 1.0 if inside.mean() < 0.5 else -1.0
    inside += sign * rng.uniform(*CONTRAST) * glyph[..., None]


def noisy(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Frames as uint8, with noise on each."""
    pixels = pixels + NOISE * rng.standard_normal(pixels.shape, np.float32)
    return (255 * pixels.clip(0, 1) + 0.5).astype(np.uint8)


def moving(rng: np.random.Generator, split: str) -> np.ndarray:
    """`[600, 16, 16, 3]` float32 in `[0, 1]`: a view that wanders in a straight line over a photograph."""
    whole = background(rng, split, SIDE + _PAN)
    ends = rng.integers(0, _PAN + 1, (2, 2))
    path = np.linspace(ends[0], ends[1], FRAMES).round().astype(int)
    views = np.lib.stride_tricks.sliding_window_view(whole, (SIDE, SIDE), axis=(0, 1))
    return views[path[:, 0], path[:, 1]].transpose(0, 2, 3, 1).copy()


def clip(rng: np.random.Generator, split: str, seen: bool = False) -> Clip:
    """Draw a clip.

    Args:
        rng: Where it is drawn from.
        split: Whose digits and photographs.
        seen: Show each digit while a coarse frame is taken, as for the coarse-only base.
    """
    pixels = moving(rng, split)
    bank, labels = ink(split, DIGIT, split == "train")
    when, colours = stretches(rng), rng.permutation(len(NAMES))
    chosen = rng.integers(len(bank), size=len(NAMES))
    shown = []
    for stretch, colour, which in zip(when, colours, chosen, strict=True):
        start, stop = moment(rng, stretch, seen)
        write_digit(rng, pixels[start:stop], bank[which, rng.integers(bank.shape[1])])
        paint_border(pixels[stretch[0] : stretch[1]], colour)
        shown.append((start, stop))
    gaps = np.stack([np.append(0, when[:, 1]), np.append(when[:, 0], FRAMES)], axis=1)
    wide = np.flatnonzero(gaps[:, 1] - gaps[:, 0] > SHOWN[1])
    for gap in rng.permutation(wide)[:_DISTRACTORS]:
        length = int(rng.integers(SHOWN[0], SHOWN[1] + 1))
        start = int(rng.integers(gaps[gap, 0], gaps[gap, 1] - length + 1))
        which = rng.integers(len(bank))
        write_digit(rng, pixels[start : start + length], bank[which, rng.integers(bank.shape[1])])
    return Clip(noisy(rng, pixels), when, np.array(shown), colours, labels[chosen].astype(np.int64))
